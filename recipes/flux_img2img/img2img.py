"""Edit pictures with FLUX.1 and a prompt by SDEdit: encode the picture, add the noise of a step in the middle of the
schedule, and denoise from there with the prompt (Meng et al. 2022, SDEdit; x = (1 - sigma) z + sigma eps for FLUX).

    MODEL_PATH=/path/to/FLUX.1-dev python -m recipes.flux_img2img.img2img --image cat.jpg --prompt "A picture of a cow"
    python -m recipes.flux_img2img.img2img --pretrained_model_name_or_path assets/tiny-kontext --image cat.jpg \\
        --width 128 --height 128 --max_sequence_length 16 --guidance_scale 1 --prompt "Generate a photograph" \\
        --sweep_strength 0.3,0.6,0.9
    python -m recipes.flux_img2img.img2img --show outputs/img2img/cat_strength0.9_seed100.png

Defaults are those of stock FluxImg2ImgPipeline as the tutorial calls it: seed 100, 1024 x 1024, 28 steps, strength 0.9,
guidance 3.5, int8 transformer, int4 T5. In fp32 on a CPU the pixels are stock's own."""

import argparse
import itertools
import json
import math
import os
import resource
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import accelerate
import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import free_memory
from PIL import Image
from tqdm import tqdm

from my_dataset.dataset_deg_paired import to_tensor
from my_dataset.images import MAX_PIXELS
from recipes.flux_img2img.pictures import (
    FITS,
    MAX_BYTES,
    TIMEOUT_S,
    URL,
    find_pictures,
    fit_picture,
    open_picture,
    picture_name,
    read_parameters,
    resize_image_center_crop,
    save_png,
)
from recipes.flux_img2img.quantised import BACKENDS, KINDS, choose_backend, convert
from utils import flux, lora
from utils.checkpoint import sha256
from utils.offload import BlockOffload
from utils.parse import check_least, make_parser, run_main, writable_folder, write_json
from utils.restore import draw_noise, noise_levels
from utils.session import add_device_args, choose_device, out_of_memory_explained
from utils.utils import image_grid, to_uint8

STRENGTH = 0.9
OFFLOADS = ("none", "model", "sequential", "group")
SIGMA_DIGITS = 3  # as sigmas are printed, so --start_sigma is compared
MAX_TIMEOUT_S = 86400
TILE_PX = 512  # of --vae_tiling; diffusers' own, FLUX's 1024, would leave the default size whole
GRID_ENDING, REPORT_ENDING = "_grid.png", ".json"  # after the stem
NAME_BYTES = 255  # of a file's name, on most file systems


def add_model_args(parser):
    """Options of model, picture, prompt, schedule, quantisation and device, which compare_quantised has too."""
    add = parser.add_argument_group("model").add_argument
    # as a default, because configargparse's env_var would win over --config
    add("--pretrained_model_name_or_path", "--model",
        default=os.environ.get("MODEL_PATH") or "black-forest-labs/FLUX.1-dev",
        help="folder of a FLUX.1 pipeline, or its hub id; the environment's MODEL_PATH is the default where it is set")
    add("--revision", help="branch, tag or commit of the hub model")
    add("--variant", help="weight variant of the model files, such as fp16")
    add("--cache_dir", help="where hub downloads are kept")
    add("--lora", nargs="+", default=[], metavar="FILE[:WEIGHT]", help="LoRA files or their folders, weight 1 unless "
        "given; they act together")
    add = parser.add_argument_group("picture").add_argument
    add("--image", nargs="+", default=[], help="pictures: paths, http(s) addresses, folders")
    add("--width", type=int, default=1024, help="px, a multiple of 16 for FLUX")
    add("--height", type=int, default=1024, help="px, likewise")
    add("--fit", default="crop", choices=FITS, help="how a picture of another shape gets that size; pad: with white; "
        "keep: its own size, cropped to the model's multiple")
    add("--timeout", type=float, default=TIMEOUT_S, help="seconds for a download, all of it")
    add("--max_bytes", type=int, default=MAX_BYTES, help="refuse downloads larger than this")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="refuse pictures with more pixels than this")
    add = parser.add_argument_group("prompt").add_argument
    add("--prompt", default="A picture of a Tiger", help="what to make of it")
    add("--prompt_2", help="another text for T5; default: --prompt for both encoders")
    add("--negative_prompt", default="", help="what to lead away from, with --true_cfg_scale above 1")
    add("--true_cfg_scale", type=float, default=1.0, help="v = v_neg + scale (v - v_neg); above 1 it costs twice")
    add("--guidance_scale", type=float, default=3.5, help="guidance that a distilled model is told")
    add("--max_sequence_length", type=int, default=512, help="T5 tokens: 512 for dev, 256 for schnell")
    add = parser.add_argument_group("sampling").add_argument
    add("--num_inference_steps", "--steps", type=int, default=28, help="steps of the whole schedule; those before the "
        "start are not run")
    add("--strength", type=float, help=f"above 0, to 1: share of the steps that are run; default {STRENGTH}")
    add("--start_sigma", type=float, help="instead: start at the first noise level of the schedule that is not above "
        "this, 1 being pure noise")
    add("--seed", type=int, default=100, help="seed of the noise")
    add("--num_images", type=int, default=1, help="results of each, with the seeds seed, seed + 1, ...")
    add = parser.add_argument_group("quantisation").add_argument
    add("--quant_transformer", default="int8", choices=KINDS, help="weights of the transformer's blocks")
    add("--quant_t5", default="int4", choices=KINDS, help="weights of T5 (text_encoder_2)")
    add("--quant_clip", default="none", choices=KINDS, help="weights of CLIP (text_encoder), 0.25 GB in bf16")
    add("--quant_backend", default="auto", choices=["auto", *BACKENDS], help="for all that is quantised; auto: "
        "torchao, for nf4 bitsandbytes")
    add_device_args(parser)


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_model_args(parser)
    add = parser.add_argument
    add("--show", metavar="PNG", help="print the parameters that a result was made with, and do nothing else")
    add("--output", default="outputs/img2img", help="folder for pictures, grids and parameters")
    add("--sweep_strength", help="instead of --strength: several, such as 0.3,0.6,0.9, side by side")
    add("--offload", default="none", choices=OFFLOADS, help="what waits in host memory: model: transformer and VAE "
        "while the other computes; group: also blocks of the transformer, two at a time on the GPU; sequential: also "
        "every layer, slowest")
    add("--vae_tiling", action=argparse.BooleanOptionalAction, default=False, help="encode and "
        f"decode in overlapping tiles of {TILE_PX} px, with less memory and slightly other pixels")
    args = parser.parse_args(argv)
    if args.show is None:
        check_model_args(args)
        check_args(args)
    return args


def check_model_args(args):
    """Refuse what can be refused of `add_model_args` before anything loads, and set args.loras, args.strengths and
    args.backends. ValueError naming the flag."""
    if not args.image:
        raise ValueError("--image is needed: a path, an http(s) address or a folder")
    check_least(args, width=16, height=16, max_bytes=1, max_pixels=1, num_inference_steps=1, seed=0, true_cfg_scale=1,
                guidance_scale=0, max_sequence_length=1, num_images=1)
    if args.max_sequence_length > 512:
        raise ValueError(f"--max_sequence_length {args.max_sequence_length}: give 1 to 512")
    if args.negative_prompt and args.true_cfg_scale == 1:
        raise ValueError("--negative_prompt acts with --true_cfg_scale above 1 only; give both, or neither")
    if not 0 < args.timeout <= MAX_TIMEOUT_S:
        raise ValueError(f"--timeout {args.timeout:g}: give seconds above 0, at most {MAX_TIMEOUT_S}")
    if args.strength is not None and args.start_sigma is not None:
        raise ValueError("--strength and --start_sigma both say where to start; leave one out")
    if args.start_sigma is not None and not 0 < args.start_sigma <= 1:
        raise ValueError(f"--start_sigma {args.start_sigma:g}: give a noise level above 0, at most 1")
    args.strengths = [STRENGTH if args.strength is None else args.strength]
    start_index(args.num_inference_steps, args.strengths[0])
    flux.check_model(args.pretrained_model_name_or_path, "FluxPipeline",
                     "download FLUX.1-dev and name its folder, or use assets/tiny-kontext")
    args.loras = [parse_lora(text) for text in args.lora]
    args.backends = {component: choose_backend(kind, args.quant_backend) for component, kind in kinds(args).items()
                     if kind != "none"}


def check_args(args):
    """As `check_model_args`, for the rest."""
    if args.sweep_strength:
        if args.strength is not None or args.start_sigma is not None:
            raise ValueError("--sweep_strength says where to start; leave --strength and --start_sigma out")
        try:
            args.strengths = [float(part) for part in args.sweep_strength.split(",")]
        except ValueError as error:
            raise ValueError(f"--sweep_strength {args.sweep_strength}: give numbers, such as 0.3,0.6,0.9") from error
        for strength in args.strengths:
            start_index(args.num_inference_steps, strength)
        labels = [strength_label(strength) for strength in args.strengths]
        if len(set(labels)) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise ValueError(f"--sweep_strength {args.sweep_strength}: {twice} stands there twice, in the six digits "
                             "that name its files; give each once")
    if args.offload != "none" and (args.quant_transformer in ("int4", "nf4") or args.backends.get(
            "transformer") == "quanto"):
        raise ValueError(f"--offload {args.offload} moves plain weights and torchao's int8 and fp8; give "
                         "--quant_transformer int8, or --offload none")
    if args.offload == "sequential" and args.quant_transformer != "none":
        raise ValueError("--offload sequential moves plain weights; give --quant_transformer none, or --offload group")


def kinds(args):
    return {"text_encoder": args.quant_clip, "text_encoder_2": args.quant_t5, "transformer": args.quant_transformer}


def parse_lora(text):
    """(path, weight) of FILE or FILE:WEIGHT. ValueError where there is no such LoRA file, it is damaged, or the weight
    is no finite number."""
    path, _, weight = text.rpartition(":")
    try:
        path, weight = (path, float(weight)) if path and not Path(text).exists() else (text, 1.0)
    except ValueError:  # the colon belongs to the path
        path, weight = text, 1.0
    if not math.isfinite(weight):
        raise ValueError(f"--lora {text}: give a finite weight")
    path = lora.find_file(path)
    lora.read_settings(path)  # refuses a damaged file
    return path, weight


def start_index(steps, strength):
    """The first step that runs, of `steps`, as stock FluxImg2ImgPipeline.get_timesteps: rounded down, so that at least
    the share `strength` of them runs. ValueError where none would."""
    if not 0 < strength <= 1:
        raise ValueError(f"--strength {strength:g}: give more than 0, where no step would run, and at most 1")
    index = int(max(steps - min(steps * strength, steps), 0))
    if index == steps:
        raise ValueError(f"--strength {strength:g}: no step of {steps} would run; give more")
    return index


def strength_label(strength):
    """What a strength is called in file names and grids."""
    return f"strength {strength:g}"


@dataclass(frozen=True)
class Start:
    """Where a run enters the schedule. index: of its first step. sigma: the noise level there. steps: that run."""

    label: str
    index: int
    sigma: float
    steps: int

    def in_words(self):
        return (f"{self.label}: enters at step {self.index} of {self.index + self.steps}, sigma {self.sigma:.3f}; "
                f"{self.steps} steps run")


def choose_starts(sigmas, strengths, start_sigma=None):
    """The Starts for a schedule of noise levels that ends in 0: one for each of `strengths`, or one for `start_sigma`,
    the first level not above it. ValueError where all levels but the last are above."""
    steps = len(sigmas) - 1
    if start_sigma is None:
        entries = [(strength_label(strength), start_index(steps, strength)) for strength in strengths]
    else:
        index = next((i for i, sigma in enumerate(sigmas[:-1]) if round(sigma, SIGMA_DIGITS) <= start_sigma), None)
        if index is None:
            raise ValueError(f"--start_sigma {start_sigma:g}: the lowest level of {steps} steps is {sigmas[-2]:.3f}; "
                             "give that, or more --num_inference_steps")
        entries = [(f"start sigma {start_sigma:g}", index)]
    return [Start(label, index, sigmas[index], steps - index) for label, index in entries]


def read_pictures(args, vae):
    """[(source, PIL picture at its final size)]. Every picture is read before anything large loads. ValueError or
    OSError that names it, or the flag of a size that the model cannot do."""
    multiple = flux.size_multiple(vae)
    for flag in ("width", "height"):
        if args.fit != "keep" and getattr(args, flag) % multiple:
            raise ValueError(f"--{flag} {getattr(args, flag)}: this model needs multiples of {multiple} px")
    limits = {"timeout_s": args.timeout, "max_bytes": args.max_bytes, "max_pixels": args.max_pixels}
    pictures = []
    for source in find_pictures(args.image):
        if args.fit == "crop":
            picture = resize_image_center_crop(source, args.width, args.height, **limits)
        else:
            picture = fit_picture(open_picture(source, **limits), args.width, args.height, args.fit, multiple)
        pictures.append((str(source), picture))
    return pictures


@torch.no_grad()
def encode_text(args, device, dtype):
    """({"prompt": TextEmbeds of batch 1, with true CFG also "negative"} on the CPU, conversions): the text encoders
    come, are quantised as asked, and are gone again. ValueError where two LoRAs change CLIP."""
    with_text = [(path, weight) for path, weight in args.loras if lora.has_text_part(path)]
    if len(with_text) > 1:
        raise ValueError(f"--lora: {with_text[0][0]} and {with_text[1][0]} both change CLIP; give one of them")
    pipe = flux.load_pipeline(args.pretrained_model_name_or_path, dtype, skip=flux.IMAGE_PARTS + flux.OPTIONAL_PARTS,
                              **flux.source(args))
    if (device.type == "cuda" and args.quant_t5 == "none"
            and torch.cuda.mem_get_info(device)[0] < flux.TEXT_ENCODER_BYTES):
        device = torch.device("cpu")
    conversions = [convert(getattr(pipe, part), part, kinds(args)[part], device, args.backends.get(part, "auto"))
                   for part in ("text_encoder", "text_encoder_2")]
    for path, weight in with_text:
        lora.load_into_text_encoder(pipe.text_encoder, path, weight)
    pipe.to(device)
    prompts = {"prompt": (args.prompt, args.prompt_2)}
    if args.true_cfg_scale > 1:
        prompts["negative"] = args.negative_prompt, None
    text = {}
    for name, (prompt, prompt_2) in prompts.items():
        states, pooled, _ = pipe.encode_prompt(prompt, prompt_2, device=device,
                                               max_sequence_length=args.max_sequence_length)
        text[name] = flux.TextEmbeds(states, pooled).to("cpu", dtype)
    del pipe
    free_memory()
    return text, conversions


def load_models(args, device, dtype, offload="none"):
    """(pipe, Conversion): VAE, scheduler and the transformer, quantised, with its LoRAs, placed as `offload` says."""
    pipe = flux.load_models(args.pretrained_model_name_or_path, device, dtype, transformer_device="cpu",
                            **flux.source(args))
    for path, _ in args.loras:
        lora.check(path, pipe.transformer)  # while weights still show their shapes
        settings = lora.read_settings(path)
        if settings and settings["start_noise"][1] < 1:
            print(f"warning: {path.name} was trained to restore from start noise {settings['start_noise'][1]:g}, not "
                  "for SDEdit", flush=True)
    conversion = convert(pipe.transformer, "transformer", args.quant_transformer,
                         device if offload == "none" else "cpu", args.backends.get("transformer", "auto"))
    load_loras(pipe, args.loras)
    place(pipe, offload, device)
    return pipe, conversion


def load_loras(pipe, loras):
    """Load checked LoRA files, [(path, weight)], into the transformer; they act together."""
    names = [f"lora_{i}" for i in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass")  # for merging, which is not done
            lora.add(pipe, name, *lora.read(path))
    if loras:
        pipe.set_adapters(names, [weight for _, weight in loras])


def place(pipe, offload, device):
    """Put the transformer, and with offload the VAE, where `offload`, of OFFLOADS, lets them wait."""
    if offload == "none":
        pipe.transformer.to(device)
        return
    pipe.vae.to("cpu")
    if offload == "group":
        BlockOffload(pipe.transformer, device)
    elif offload == "sequential":
        accelerate.cpu_offload(pipe.transformer, execution_device=device)


def check_tiling(vae):
    """ValueError where `tile` cannot work: AutoencoderKLHunyuanImage's encoder (diffusers 0.42.1) cuts tiles along a
    dimension that images do not have."""
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(f"--vae_tiling works with an AutoencoderKL; this model has an {type(vae).__name__}, leave it "
                         "out")


def tile(vae):
    """Let an AutoencoderKL encode and decode what is larger than TILE_PX along a side in tiles of that size."""
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE_PX, TILE_PX // flux.latent_scale(vae)


@torch.no_grad()
def encode(pipe, images, seeds, device, offload="none"):
    """(latents, noise), both (B, C, h, w) on `device`: a draw from the posterior of images (B, 3, H, W) in [-1, 1], and
    what SDEdit adds. Item i's numbers come from a CPU generator of seeds[i], in stock's order."""
    shape = flux.latent_shape(pipe.vae, *images.shape[-2:])
    posterior_noise, noise = draw_noise((2, *shape), seeds).to(device).unbind(1)
    with flux.on_device(pipe.vae, device, offload != "none"):
        return flux.encode(pipe.vae, images.to(device), posterior_noise), noise


@torch.no_grad()
def decode(pipe, latents, device, offload="none"):
    """Images (B, 3, H, W) in [-1, 1] on the CPU."""
    with flux.on_device(pipe.vae, device, offload != "none"):
        return flux.decode(pipe.vae, latents).clamp(-1, 1).cpu()


@torch.no_grad()
def sdedit(pipe, latents, noise, sigmas, first, text, guidance_scale, negative=None, true_cfg_scale=1.0,
           offload="none"):
    """Latents (B, C, h, w) in fp32 of the edit of `latents`, clean and normalised: (1 - s) latents + s noise at
    s = sigmas[first], then Euler's steps along the velocity down to sigmas[-1] = 0.

    text, negative: TextEmbeds of batch 1 on the latents' device; negative is for true_cfg_scale above 1."""
    batch, device = len(latents), latents.device

    def predict(z, sigma, embeds):
        return flux.predict_velocity(pipe.transformer, z, torch.full((batch,), sigma), None, embeds.expand(batch),
                                     guidance_scale).float()

    z = (1 - sigmas[first]) * latents + sigmas[first] * noise
    with flux.on_device(pipe.transformer, device, offload == "model"):
        for i in tqdm(range(first, len(sigmas) - 1), unit="step", leave=False, disable=None):
            velocity = predict(z, sigmas[i], text)
            if true_cfg_scale > 1:
                away = predict(z, sigmas[i], negative)
                velocity = away + true_cfg_scale * (velocity - away)
            z = z + (sigmas[i + 1] - sigmas[i]) * velocity
    return z


def edit(args, pipe, latents, noise, sigmas, start, text, device, offload="none"):
    """The edited images (B, 3, H, W) in [-1, 1] on the CPU, from a Start. ValueError where the model gives no
    numbers."""
    height, width = (side * flux.latent_scale(pipe.vae) for side in latents.shape[-2:])
    with out_of_memory_explained(f"{width}x{height} px", "--offload, --vae_tiling, a smaller --width and --height"):
        z = sdedit(pipe, latents, noise, sigmas, start.index, text["prompt"], args.guidance_scale,
                   text.get("negative"), args.true_cfg_scale, offload)
        images = decode(pipe, z, device, offload)
    if not images.isfinite().all():
        raise ValueError("the model gave NaN or infinity; use --dtype fp32, other --quant_transformer weights or "
                         "smaller LoRA weights")
    return images


def describe(args, dtype):
    """What every result depends on but its picture, start and seed; JSON-safe, and no path of this machine."""
    return {
        "model": flux.model_id(args.pretrained_model_name_or_path), "revision": args.revision, "variant": args.variant,
        "loras": [{"file": path.name, "sha256": sha256(path), "weight": weight} for path, weight in args.loras],
        "prompt": args.prompt, "prompt_2": args.prompt_2, "negative_prompt": args.negative_prompt,
        "true_cfg_scale": args.true_cfg_scale, "guidance_scale": args.guidance_scale,
        "max_sequence_length": args.max_sequence_length, "num_inference_steps": args.num_inference_steps,
        "fit": args.fit, "dtype": str(dtype),
        "quantised": {part: {"kind": kind, "backend": args.backends.get(part)} for part, kind in kinds(args).items()},
    }


def result_ending(start, seed):
    """What follows the stem in a result's file name."""
    return f"_{start.label.replace(' ', '')}_seed{seed}.png"


def free_stem(folder, source, endings):
    """A file name's beginning, after the picture: one under which the folder holds nothing that ends in one of
    `endings`, and so short that all these names fit a file system, also while they are written."""
    name = Path(urlsplit(source).path if URL.match(source) else source).stem or "image"
    room = NAME_BYTES - max(len(f".{ending}.tmp") for ending in endings)
    for number in itertools.count(1):
        suffix = f"-{number}" if number > 1 else ""
        stem = name.encode()[: room - len(suffix)].decode(errors="ignore") + suffix  # whole characters
        if not any((folder / f"{stem}{ending}").exists() for ending in endings):
            return stem


def edit_picture(args, pipe, picture, sigmas, starts, text, device, stem, common):
    """Write the results of one picture into --output, named after `stem`; returns (rows of its grid, one for each seed:
    picture, VAE's round trip, results; records of the results, each as in its PNG). common: what all records share."""
    image, rows, records = to_tensor(np.asarray(picture))[None], [], []
    for seed in range(args.seed, args.seed + args.num_images):
        latents, noise = encode(pipe, image, [seed], device, args.offload)
        row = [image[0], decode(pipe, latents, device, args.offload)[0]]
        for start in starts:
            row.append(edit(args, pipe, latents, noise, sigmas, start, text, device, args.offload)[0])
            edited = Image.fromarray(to_uint8(row[-1]))
            edited.info["icc_profile"] = picture.info.get("icc_profile")
            records.append({"file": stem + result_ending(start, seed)} | common | {
                "start": start.label, "start_index": start.index, "sigma": start.sigma, "executed_steps": start.steps,
                "seed": seed})
            save_png(Path(args.output, records[-1]["file"]), edited, records[-1])
        rows.append(row)
    return rows, records


def peak_memory(device):
    """Bytes: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(args):
    if args.show is not None:
        print(json.dumps(read_parameters(args.show), indent=2, ensure_ascii=False))
        return
    begun = time.monotonic()
    device, dtype = choose_device(args)
    folder = writable_folder(args.output, "--output")
    small = flux.load_pipeline(args.pretrained_model_name_or_path, dtype, skip=(
        *flux.TEXT_PARTS, *flux.OPTIONAL_PARTS, "transformer"), **flux.source(args))
    if args.vae_tiling:
        check_tiling(small.vae)
    jobs = []
    for source, picture in read_pictures(args, small.vae):
        sigmas = noise_levels(small.vae, small.scheduler, args.num_inference_steps, *picture.size)
        starts = choose_starts(sigmas, args.strengths, args.start_sigma)
        jobs.append((source, picture, sigmas, starts))
        for start in starts:
            print(f"{picture_name(source)} {picture.width}x{picture.height} px, {start.in_words()}", flush=True)
        if len({start.index for start in starts}) < len(starts):
            print(f"note: some strengths enter at the same step; {args.num_inference_steps} steps cannot tell them "
                  "apart", flush=True)

    del small
    text, conversions = encode_text(args, device, dtype)
    text = {name: embeds.to(device, dtype) for name, embeds in text.items()}
    pipe, conversion = load_models(args, device, dtype, args.offload)
    conversions.append(conversion)
    print("\n".join(part.in_words() for part in conversions), flush=True)
    if args.vae_tiling:
        tile(pipe.vae)
    loaded = time.monotonic()

    run, written = describe(args, dtype) | {"vae_tiling": args.vae_tiling}, 0
    for source, picture, sigmas, starts in jobs:
        endings = [result_ending(start, args.seed + i) for start in starts for i in range(args.num_images)]
        stem = free_stem(folder, source, [GRID_ENDING, REPORT_ENDING, *endings])
        rows, records = edit_picture(args, pipe, picture, sigmas, starts, text, device, stem, run | {
            "image": picture_name(source), "image_sha256": picture.info["sha256"], "width": picture.width,
            "height": picture.height})
        captions = [["", "", *(f"sigma {start.sigma:.3f}, seed {args.seed + i}" for start in starts)]
                    for i in range(len(rows))]
        image_grid(rows, ["picture", "VAE", *(start.label for start in starts)], captions).save(
            folder / f"{stem}{GRID_ENDING}")
        write_json(folder / f"{stem}{REPORT_ENDING}", {
            "results": records, "conversions": {part.component: part.record() for part in conversions},
            "offload": args.offload, "seconds_loading": round(loaded - begun, 2),
            "seconds": round(time.monotonic() - begun, 2), "peak_memory_bytes": peak_memory(device)})
        written += len(records)
    print(f"{written} results in {time.monotonic() - begun:.1f} s, of which {loaded - begun:.1f} s loading; "
          f"{peak_memory(device) / 1e9:.2f} GB at most: {folder}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

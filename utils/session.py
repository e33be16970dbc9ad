"""A session of inference, as every script that samples has it: options, device, settings, models, out-of-memory."""

import argparse
import contextlib
import itertools
import json
import math
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from utils import flow_matching as fm
from utils import flux, lora, speed
from utils.checkpoint import sha256
from utils.color import COLOR_FIXES, color_fix
from utils.generate import generate
from utils.lora_files import weightless_transformer
from utils.parse import check_least, public_args, write_json
from utils.restore import SETTINGS_FILE, STOCK_SETTINGS, choose_start_noise, fidelity_start_noise
from utils.tiles import (
    WHOLE,
    add_tile_args,
    check_tile_args,
    choose_tiling,
    restore_tiled,
    tile_options,
    trained_side,
    within_memory,
)
from utils.utils import image_grid, to_pil
from utils.validation import default_steps


def add_sampling_args(parser, has_lora=True):
    """Options of everything that samples: model, prompt, LoRA, seed and device. Settings that are not given are None
    and stand for the LoRA file's, or stock Kontext's. has_lora: False for a script of the base model alone."""
    flux.add_model_args(parser)
    parser.set_defaults(guidance_scale=None, max_sequence_length=None, vae_encode_mode=None, lora=None)
    add = parser.add_argument_group("sampling").add_argument
    if has_lora:
        add("--lora", help="LoRA file, or the folder that holds it; default: the base model alone")
        add("--lora_weight", type=float, default=1.0, help="strength of the LoRA; 0 switches it off")
    add("--prompt", help="default: the LoRA file's, if any" if has_lora else "what to make")
    add("--num_inference_steps", type=int,
        help="default: 28 for a LoRA trained at start noise 1; below, 4 or what its list of sigmas allows")
    add("--seed", type=int, default=0, help="seed of the noise, and of degradations")
    add_device_args(parser)
    add = parser.add_argument_group("speed").add_argument
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="compile the transformer's blocks when they first run; for many images")
    add("--attention_backend", default="native", choices=speed.ATTENTION_BACKENDS,
        help="diffusers' name of the attention kernel")


def add_device_args(parser):
    add = parser.add_argument_group("device").add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda where there is one")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on cuda, fp32 on the CPU")


def add_restoration_args(parser):
    """Options of everything that restores images: those of sampling, the start, colours and tiles."""
    add_sampling_args(parser)
    add = parser.add_argument_group("restoration").add_argument
    add("--start_noise", type=float, help="within the LoRA's trained range; default: its middle")
    add("--fidelity", type=float, help="instead of --start_noise; 1: the lowest that was trained, closest to the "
        "image; 0: the highest, which invents most")
    add("--color_fix", default="off", choices=COLOR_FIXES, help="take colours from the degraded image: its low "
        "frequencies (wavelet) or its channels' mean and spread (adain); brings back fading, yellowing and darkness")
    add("--merge_lora", action=argparse.BooleanOptionalAction, default=None, help="add the LoRA to the model's "
        "weights, so that no step computes it apart; default: wherever no base row needs it switched off")
    add_tile_args(parser)


def add_generation_args(parser, has_lora):
    """Options of what generates images from text, alone or with reference images."""
    add_sampling_args(parser, has_lora)
    add = parser.add_argument_group("generation").add_argument
    add("--image", nargs="+", default=[], metavar="FILE", help="reference images to edit; without one: text to image")
    add("--height", type=int, help="px; default: the first reference's, without one --resolution")
    add("--width", type=int, help="px; as --height")
    add("--resolution", type=int, help="side in px of a square: references with a larger area are shrunk to its area; "
        "default: the side the LoRA was trained at, else the model's own, 1024 for FLUX")
    add("--num_images", type=int, default=1, help="images, with the seeds seed, seed + 1, ...")
    add("--output", required=True, help="folder for pictures, grid and settings")


def check_sampling_args(args):
    """Refuse senseless numbers of sampling. ValueError naming the flag."""
    check_least(args, seed=0, max_sequence_length=1)
    if (args.max_sequence_length or 1) > 512:
        raise ValueError(f"--max_sequence_length {args.max_sequence_length}: give 1 to 512")
    for flag in ("lora_weight", "guidance_scale"):
        if not math.isfinite(getattr(args, flag, 0) or 0):
            raise ValueError(f"--{flag} {getattr(args, flag)}: give a finite number")


def check_generation_args(args):
    """Refuse what can be refused of `add_generation_args` before a model loads. ValueError naming the flag."""
    check_sampling_args(args)
    check_least(args, height=16, width=16, resolution=16, num_images=1, num_inference_steps=1)
    if bool(args.height) != bool(args.width):
        raise ValueError("--height and --width: give both, or neither for the size of the first --image")
    if args.vae_encode_mode == "sample":
        raise ValueError("--vae_encode_mode sample: references are encoded by their mean; leave it out")
    flux.check_model(args.pretrained_model_name_or_path)


def check_restoration_args(args, has_base_row=False):
    """Refuse what can be refused of `add_restoration_args` before a model loads, and settle --merge_lora.
    has_base_row: the base model is run beside the LoRA, by `without_lora`. ValueError naming the flag."""
    if args.merge_lora and has_base_row:
        raise ValueError("--merge_lora: the base row needs the LoRA switched off; add --no-base_row, or leave it out")
    if args.merge_lora is None:
        args.merge_lora = not has_base_row
    check_sampling_args(args)
    check_least(args, num_inference_steps=1)
    check_tile_args(args)
    if args.fidelity is not None and (args.start_noise is not None or not 0 <= args.fidelity <= 1):
        raise ValueError(f"--fidelity {args.fidelity}: give 0 to 1, without --start_noise, which it stands for")
    flux.check_model(args.pretrained_model_name_or_path)


def choose_device(args):
    """(device, dtype) that --device and --dtype ask for. ValueError where the machine has no such thing."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device; use --device cpu, or install its CUDA build")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    if args.dtype == "bf16" and device == "cpu":
        raise ValueError("--dtype bf16 is slow and inexact on a CPU; use --dtype fp32")
    if args.dtype == "bf16" and not torch.cuda.is_bf16_supported():
        raise ValueError("--dtype bf16: this GPU has no bf16; use --dtype fp32")
    dtype = torch.float32 if device == "cpu" or args.dtype == "fp32" else torch.bfloat16
    return torch.device(device), dtype


def start_processes(device):
    """accelerate's PartialState: one process, or one of those that `torch.distributed.run` or `accelerate launch`
    started, each with a GPU of its own. They meet again in gather_object, which waits for the slowest."""
    from accelerate import PartialState

    return PartialState(cpu=device.type == "cpu", timeout=timedelta(hours=12))


def choose_settings(args, defaults=STOCK_SETTINGS):
    """The settings to sample with: `defaults`, over them what the LoRA file stores, or the folder of a model that one
    was merged into, over all what the command line says."""
    stored = lora.read_settings(args.lora) if args.lora else None
    merged = Path(args.pretrained_model_name_or_path, SETTINGS_FILE)
    if not args.lora and merged.is_file():
        try:
            stored = json.loads(merged.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{merged} is not JSON ({error}); write the merged model again") from error
    if args.lora and stored is None:
        print(f"warning: {args.lora} holds no sampling settings; it is sampled as stock Kontext is", file=sys.stderr)
    settings = defaults | (stored or {})
    base, model = settings["base_model"], args.pretrained_model_name_or_path
    if args.lora and base and Path(base).name != Path(model).name:
        print(f"warning: {args.lora} was trained on {base}, and the model is {model}", file=sys.stderr)
    for name in ("prompt", "guidance_scale", "max_sequence_length", "vae_encode_mode"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    return settings


def choose_generation_settings(args):
    """(settings, steps) to generate with. ValueError where no prompt is given or stored, or where the LoRA never saw
    pure noise, which generation begins with."""
    settings = choose_settings(args, STOCK_SETTINGS | {"prompt": None})
    if settings["prompt"] is None:
        raise ValueError(f"--prompt is needed{f': {args.lora} stores none' if args.lora else ''}; say what to make")
    if settings["start_noise"][1] < 1:
        raise ValueError(f"--lora {args.lora} was trained to restore, from start noise {settings['start_noise'][1]:g}; "
                         "use it with test_deg_lora_flux_kontext.py")
    if settings.get("references", len(args.image)) != len(args.image):
        print(f"warning: {args.lora} was trained with {settings['references']} references an image, and --image names "
              f"{len(args.image)}", file=sys.stderr)
    return settings, args.num_inference_steps or default_steps(settings)


def resolve_settings(args, defaults=STOCK_SETTINGS):
    """(settings, steps, start noise) to restore with: those of `choose_settings`, and what goes with them."""
    settings = choose_settings(args, defaults)
    if settings["start_noise"][0] == 1 and not settings["reference_tokens"]:
        raise ValueError(f"--lora {args.lora} was trained on text alone and would never see the image; "
                         "use it with scripts.test_kontext_withlora")
    wanted = args.start_noise if args.fidelity is None else fidelity_start_noise(settings, args.fidelity)
    start_noise = choose_start_noise(settings, wanted)
    steps = args.num_inference_steps or default_steps(settings)
    if start_noise < 1:
        fm.sampling_positions(steps, settings["train_sigmas"])  # refuses steps that were never trained
    return settings, steps, start_noise


@contextlib.contextmanager
def out_of_memory_explained(what, smaller="a smaller --tile, --crop_px in scoring"):
    """Turn CUDA's out-of-memory error into a ValueError with the cure. smaller: the options that take less memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise ValueError(f"{what}: out of GPU memory; use --dtype bf16, {smaller}, another GPU, or --device "
                         "cpu") from error


def encode_text(args, settings, device, dtype, lora_file=None):
    """TextEmbeds of batch 1 of the prompt. lora_file: a LoRA whose part for CLIP, if it has one, is applied."""
    where = flux.source(args)
    encoded = flux.encode_prompts(args.pretrained_model_name_or_path, [settings["prompt"]], device, dtype,
                                  settings["max_sequence_length"], lora_file, getattr(args, "lora_weight", 1.0),
                                  **where)
    return encoded[settings["prompt"]].to(device, dtype)


def load_models(args, settings, device, dtype, prepare=None):
    """(pipe, text): VAE, transformer and scheduler with the LoRA in, and the encoded prompt. The transformer is merged,
    compiled and given its attention kernel as args ask; `prepare(pipe, text)` comes before the latter two. ValueError
    where the kernel does not run here."""
    speed.check_attention(args.attention_backend, device)
    where = flux.source(args)
    path = args.pretrained_model_name_or_path
    if args.lora:
        lora.check(args.lora, weightless_transformer(path, **where))  # before the text encoders are read
    with out_of_memory_explained(path):
        text = encode_text(args, settings, device, dtype, args.lora)
        pipe = flux.load_models(path, device, dtype, **where)
        if args.lora:
            lora.load(pipe, args.lora, args.lora_weight)
            if is_merged(args):
                lora.merge(pipe.transformer)
        if prepare:
            prepare(pipe, text)
    speed.choose_attention(pipe.transformer, args.attention_backend, 0, device, dtype)
    if args.compile:
        speed.compile_blocks(pipe.transformer)
    return pipe, text


def is_merged(args):
    """Whether the LoRA goes into the weights. Scripts that always show the base model beside it have no such option."""
    return bool(args.lora and getattr(args, "merge_lora", False))


def by_tiles(run, vae, image, tiling):
    """(run(tiling), its tile_options), with smaller tiles where memory does not suffice for `image`."""
    size, multiple = image.shape[-2:], flux.size_multiple(vae)
    result, used = within_memory(run, tiling, *size, multiple)
    return result, tile_options(used, *size, multiple)


def restore_image(pipe, control, text, settings, steps, seed, start_noise, tiling=WHOLE, color="off"):
    """(restored image of `control`, its tile_options), both images (1, 3, H, W) in [-1, 1]: in tiles, then `color`, one
    of COLOR_FIXES. On the CPU. ValueError where the model gives no numbers."""

    def run(tiling):
        return restore_tiled(pipe, control, text, settings, steps, seed, start_noise, tiling)

    restored, used = by_tiles(run, pipe.vae, control, tiling)
    return color_fix(restored, control.cpu(), color), used


def generate_images(args, pipe, text, references, settings, steps):
    """--num_images images (3, H, W) in [-1, 1] on the CPU, of the asked size or the first reference's.
    references: as for generate. ValueError where the model gives no numbers."""
    side = args.resolution or trained_side(settings, pipe.vae)
    height, width = references[0].shape[-2:] if references else (side, side)
    height, width = args.height or height, args.width or width
    images = []
    for seed in tqdm(range(args.seed, args.seed + args.num_images), unit="image", disable=None):
        with out_of_memory_explained(f"{width}x{height} px", "a smaller --resolution"):
            image = generate(pipe, text, references, settings, steps, height, width, [seed])[0].cpu()
        if not image.isfinite().all():
            raise ValueError("the model gave NaN or infinity; use --dtype fp32 or a smaller --lora_weight")
        images.append(image)
    return images


def write_generated(args, columns, references, described, icc_profile=None):
    """Write the pictures STEM_WxH_I[_COLUMN].png, STEM_WxH_grid.png with the references beside them, and the settings
    STEM_WxH.json into --output; STEM: of the first --image, or "text"; a second run writes STEM_WxH-2. Returns the path
    of the grid.

    columns: {column or "": images (3, H, W)}, a list for each, all of one length. described: from describe_model.
    icc_profile: of the first reference, whose colour space an edit keeps."""
    height, width = next(iter(columns.values()))[0].shape[-2:]
    name, files = f"{Path(args.image[0]).stem if args.image else 'text'}_{width}x{height}", []
    names = (name if i == 1 else f"{name}-{i}" for i in itertools.count(1))
    stem = next(stem for stem in names if not Path(args.output, f"{stem}.json").exists())  # nothing is written over
    for column, images in columns.items():
        for i, image in enumerate(images):
            path = Path(args.output, f"{stem}_{i}{column and '_'}{column}.png")
            to_pil(image).save(path, icc_profile=icc_profile)
            files.append({"file": path.name, "seed": args.seed + i})
    grid = Path(args.output, f"{stem}_grid.png")
    labels = [f"reference {i + 1}" for i in range(len(references))] + [column or "image" for column in columns]
    rows = [[*(image[0] for image in references), *row] for row in zip(*columns.values(), strict=True)]
    captions = [[*[""] * len(references), *[f"seed {args.seed + i}"] * len(columns)] for i in range(len(rows))]
    image_grid(rows, labels, captions).save(grid)
    inputs = [{"file": Path(path).name, "sha256": sha256(path)} for path in args.image]
    write_json(Path(args.output, f"{stem}.json"), {
        "images": files, "references": inputs, "height": height, "width": width, **described,
        "arguments": public_args(args)})
    return grid


def describe_model(args, settings, steps, dtype):
    """What every sample depends on, JSON-safe: model, LoRA, steps and settings."""
    file = lora.find_file(args.lora) if args.lora else None
    return {
        "model": args.pretrained_model_name_or_path, "revision": args.revision, "variant": args.variant,
        "lora": file and {"file": file.name, "sha256": sha256(file), "weight": args.lora_weight,
                          "merged": is_merged(args)},
        "steps": steps, "dtype": str(dtype), "settings": settings,
    }


def describe_run(args, settings, steps, start_noise, dtype):
    """All that a restoration depends on but its input and seed, JSON-safe: for sidecars and metrics.json, which also
    name the tiles_used of each image: what --tile auto, --tile_overlap and the memory came to."""
    return describe_model(args, settings, steps, dtype) | {
        "sampled_start_noise": start_noise, "tile": args.tile, "tile_overlap": args.tile_overlap,
        "token_shifts": args.token_shifts, "color_fix": args.color_fix,
    }


class Restorer:
    """Restores images from Python, as the test script does: Restorer(model, lora)(image) -> image, both PIL.

    model: folder or hub id of a FluxKontextPipeline. lora: file or folder. options: those of add_restoration_args by
    name, fidelity=1 for instance. ValueError naming what is wrong before anything loads."""

    def __init__(self, model, lora=None, **options):
        parser = argparse.ArgumentParser(allow_abbrev=False)
        add_restoration_args(parser)

        def refuse(message):
            raise ValueError(message)

        parser.error = refuse
        words = [f"--pretrained_model_name_or_path={model}"]
        known = vars(parser.parse_args(words))
        if unknown := sorted(options.keys() - known.keys()):
            raise ValueError(f"{unknown[0]} is no option of a Restorer; choose from {', '.join(known)}")
        words += [f"--{'no-' * (value is False)}{name}" + f"={value}" * (not isinstance(value, bool))
                  for name, value in (options | {"lora": lora}).items() if value is not None]
        args = parser.parse_args(words)  # by the command line's own rules
        check_restoration_args(args)
        device, dtype = choose_device(args)
        settings, steps, start_noise = resolve_settings(args)
        self.pipe, text = load_models(args, settings, device, dtype)
        tiling = choose_tiling(args, settings, self.pipe.vae)
        self.restore = partial(restore_image, text=text, settings=settings, steps=steps, seed=args.seed,
                               start_noise=start_noise, tiling=tiling, color=args.color_fix)

    def __call__(self, image):
        control = pil_to_tensor(image.convert("RGB"))[None] / 127.5 - 1
        return to_pil(self.restore(self.pipe, control)[0][0])


@contextlib.contextmanager
def without_lora(pipe, loaded):
    """Inside, the base model restores; afterwards, also after an error, the LoRA again, if one is loaded."""
    if loaded:
        pipe.disable_lora()
    try:
        yield
    finally:
        if loaded:
            pipe.enable_lora()

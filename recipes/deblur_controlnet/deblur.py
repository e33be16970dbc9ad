"""Deblur images with a trained ControlNet: a folder in, a folder out.

    python -m recipes.deblur_controlnet.deblur --pretrained_model_name_or_path assets/tiny-sd \\
        --model trained-deblur-controlnet --input blurred --output deblurred

    from recipes.deblur_controlnet.deblur import DeblurControlNet
    model = DeblurControlNet.load_from_checkpoint("trained-deblur-controlnet", "assets/tiny-sd")
    result = model.sample(cond={"c_concat": [blur_image], "c_crossattn": [text_prompt]}, batch_size=1, ddim_steps=50)

Steps, guidance, strength and tile size come from what was stored in training, unless they are given. An image of any
size comes out at exactly its size; what is larger than a tile is deblurred in overlapping ones."""

import sys
from functools import partial

import torch
from tqdm import tqdm

from my_dataset.dataset_deg_paired import to_tensor
from my_dataset.images import MAX_PIXELS, load_image, save_image
from my_dataset.outputs import check_ours, is_done, plan_outputs, sidecar_path
from recipes.deblur_controlnet import deblur_controlnet as deblur
from recipes.deblur_controlnet.deblur_dataset import BLUR_TYPES, prompts
from utils import flux
from utils.checkpoint import sha256
from utils.color import COLOR_FIXES, color_fix
from utils.failures import check_report, report_failures
from utils.parse import check_least, make_parser, run_main, writable_folder, write_json
from utils.restore import draw_noise, pad_to_multiple
from utils.session import add_device_args, choose_device, out_of_memory_explained
from utils.tiles import Tiling, blend_tiles
from utils.utils import to_uint8

SAMPLED = ("num_inference_steps", "guidance_scale", "strength")


def add_sampling_args(parser):
    """Add the options of everything that deblurs: model, sampling, tiles, device."""
    add = parser.add_argument
    add("--model", required=True, help="--output_dir of a training, one of its checkpoints, any ControlNet of "
        "diffusers, or a .ckpt of the original implementation")
    add("--pretrained_model_name_or_path", default=deblur.BASE_MODEL, help="the base model it was trained on: folder "
        "or hub id")
    add("--num_inference_steps", type=int, help="DDIM steps; default: as stored in training, else 50")
    add("--guidance_scale", type=float, help="classifier-free guidance, 1 = off; less stays closer to the image. "
        "Default: as stored, else 3")
    add("--strength", type=float, help="in (0, 1]: start from noise at 1, below from the blurred image with the noise "
        "of t = strength * 1000; default: as stored, else 1")
    add("--controlnet_conditioning_scale", type=float, default=1.0, help="how strongly the hint steers")
    add("--negative_prompt", default="", help="prompt on guidance's other side")
    add("--color_fix", default="off", choices=COLOR_FIXES, help="take colours from the blurred image: its low "
        "frequencies (wavelet) or its channels' mean and spread (adain)")
    add("--tile", type=int, help="side in px of the tiles; 0: whole images; default: the side of training")
    add("--tile_overlap", type=int, help="px that neighbouring tiles share, at most half of --tile; default: a quarter")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="leave out images with more pixels than this")
    add_device_args(parser)


def check_sampling_args(args):
    """ValueError naming the flag, before a model loads."""
    check_least(args, guidance_scale=0, controlnet_conditioning_scale=0, tile=0, seed=0, tile_overlap=0, max_pixels=1)
    deblur.check_sampling(args.num_inference_steps, args.strength)
    if args.tile and (args.tile_overlap or 0) > args.tile // 2:
        raise ValueError(f"--tile_overlap {args.tile_overlap}: give 0 to half of --tile {args.tile}")
    deblur.check_base(args.pretrained_model_name_or_path)
    deblur.check_source(deblur.find_model(args.model), "--model")


def sampled(args):
    """What args say of SAMPLED; None where they say nothing."""
    return {name: getattr(args, name) for name in SAMPLED}


def choose(settings, scheduler, **given):
    """`settings`, as stored beside a ControlNet, over them what is given and not None. ValueError where sampling would
    begin, or end, at noise that was never trained."""
    chosen = settings | {name: value for name, value in given.items() if value is not None}
    deblur.check_sampling(chosen["num_inference_steps"], chosen["strength"])
    highest = settings["t_max"] / scheduler.config.num_train_timesteps
    if chosen["strength"] > highest:
        raise ValueError(f"--strength {chosen['strength']:g}: this ControlNet was trained up to {highest:g}; give less")
    deblur.sampling_timesteps(scheduler, chosen["num_inference_steps"], chosen["strength"], settings["t_min"])
    return chosen


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_sampling_args(parser)
    add = parser.add_argument
    add("--input", required=True, help="image, or folder searched recursively; its structure is mirrored in --output")
    add("--output", required=True, help="folder for everything that is written")
    add("--blur_type", default="auto", choices=["auto", *BLUR_TYPES], help="what the prompt says; auto: nothing, it is "
        "left empty")
    add("--prompt", help="instead of the one for --blur_type")
    args = parser.parse_args(argv)
    check_sampling_args(args)
    return args


class DeblurControlNet:
    """A base model with a trained ControlNet, ready to deblur. settings: as stored beside the ControlNet."""

    def __init__(self, pipe, model, settings):
        self.pipe, self.model, self.settings = pipe, model, settings
        self.multiple = deblur.size_multiple(pipe)
        self.embedded = {}

    @classmethod
    def load_from_checkpoint(cls, path, base_model=deblur.BASE_MODEL, device="cpu", dtype=torch.float32):
        """path: as --model. dtype: fp32, or bf16 on a GPU; the autoencoder stays fp32."""
        source = deblur.find_model(path)
        deblur.check_controlnet(deblur.read_base(base_model), source, "--model")
        pipe = deblur.load_base(base_model)
        model, settings = deblur.load_model(pipe, source, dtype)
        if settings["base_model"] not in (None, flux.model_id(base_model)):
            print(f"warning: {path} was trained on {settings['base_model']}, and the model is {base_model}",
                  file=sys.stderr)
        pipe.to(device)
        return cls(pipe, model.to(device), settings)

    @classmethod
    def base_alone(cls, base_model, settings, device="cpu", dtype=torch.float32):
        """The base model with a ControlNet that was not trained and adds nothing, sampled by `settings`."""
        pipe = deblur.load_base(base_model).to(device)
        model = deblur.ControlledUNet(pipe.unet, deblur.make_controlnet(pipe), dtype=dtype).to(device, dtype)
        return cls(pipe, model.eval().requires_grad_(False), settings)

    def embed(self, prompts):
        """(len(prompts), 77, D); each prompt is encoded once."""
        for prompt in prompts:
            if prompt not in self.embedded:
                self.embedded[prompt] = deblur.encode_text(self.pipe, [prompt])[0]
        return torch.stack([self.embedded[prompt] for prompt in prompts])

    def choose(self, **given):
        """`choose` for this model."""
        return choose(self.settings, self.pipe.scheduler, **given)

    def sample(self, cond, batch_size=1, ddim_steps=None, guidance_scale=None, strength=None, seed=0):
        """Deblurred images (B, 3, H, W) in [-1, 1]. cond: "c_concat": [blurred images (B, 3, H, W) in [0, 1]],
        "c_crossattn": [a prompt, or a list of B]. batch_size: B."""
        (images,), (text,) = cond["c_concat"], cond["c_crossattn"]
        text = [text] * batch_size if isinstance(text, str) else text
        if len(images) != batch_size or len(text) != batch_size:
            raise ValueError(f"batch_size {batch_size}, but {len(images)} images and {len(text)} prompts in cond")
        return torch.cat([self.deblur(image[None] * 2 - 1, prompt, seed=seed + i, num_inference_steps=ddim_steps,
                                      guidance_scale=guidance_scale, strength=strength)
                          for i, (image, prompt) in enumerate(zip(images, text, strict=True))])

    @torch.no_grad()
    def deblur(self, image, prompt="", seed=0, tile=None, tile_overlap=None, negative_prompt="", color="off",
               controlnet_conditioning_scale=1.0, **given):
        """Deblurred image (1, 3, H, W) in [-1, 1], on the CPU, of a blurred one in [-1, 1] of any size. tile: side in
        px, 0 for the whole image, None for the side of training. given: of SAMPLED. The noise is drawn for the whole
        image, so that tiles agree where they overlap."""
        settings, device, vae = self.choose(**given), self.pipe.vae.device, self.pipe.vae
        scale = flux.latent_scale(vae)
        padded = pad_to_multiple(image, self.multiple)
        noise = draw_noise((vae.config.latent_channels, *(side // scale for side in padded.shape[-2:])), [seed])
        text, negative = self.embed([prompt]), self.embed([negative_prompt])

        def work(tiles, boxes):
            (rows, columns), = boxes
            crop = noise[..., rows.start // scale : rows.stop // scale, columns.start // scale : columns.stop // scale]
            return deblur.deblur_images(
                self.model, vae, self.pipe.scheduler, tiles.to(device), text, crop.to(device),
                settings["num_inference_steps"], settings["guidance_scale"], settings["strength"], negative,
                controlnet_conditioning_scale)

        tiling = Tiling(settings["image_size"] if tile is None else tile, tile_overlap)
        return color_fix(blend_tiles(image, tiling, self.multiple, work), image.cpu(), color)

    def from_args(self, args):
        """`deblur` with the options of `add_sampling_args`, but for the seed."""
        return partial(self.deblur, tile=args.tile, tile_overlap=args.tile_overlap, color=args.color_fix,
                       negative_prompt=args.negative_prompt,
                       controlnet_conditioning_scale=args.controlnet_conditioning_scale,
                       **sampled(args))


def load(args, settings=None):
    """The DeblurControlNet that the options of `add_sampling_args` ask for, or with `settings` its base model alone."""
    device, dtype = choose_device(args)
    if settings:
        return DeblurControlNet.base_alone(args.pretrained_model_name_or_path, settings, device, dtype)
    choose(deblur.read_settings(deblur.find_model(args.model)),
           deblur.read_base(args.pretrained_model_name_or_path).scheduler, **sampled(args))
    return DeblurControlNet.load_from_checkpoint(args.model, args.pretrained_model_name_or_path, device, dtype)


def main(args):
    check_report(writable_folder(args.output, "--output"))
    plan = plan_outputs(args.input, args.output)
    check_ours(plan)
    model = load(args)
    prompt = args.prompt
    if prompt is None:
        prompt = (prompts(model.settings["use_augmentation"]) | {"auto": ""})[args.blur_type]
    run = {name: getattr(args, name) for name in (
        "model", "pretrained_model_name_or_path", "controlnet_conditioning_scale", "negative_prompt", "color_fix",
        "tile", "tile_overlap", "seed", "dtype")} | {"prompt": prompt} | model.choose(**sampled(args))
    run["weights"] = deblur.hash_weights(deblur.find_model(args.model))  # a training may write the folder anew
    run_deblur, failures, skipped = model.from_args(args), [], 0
    for path, _, output in tqdm(plan, unit="image", disable=None):
        try:
            sidecar = {"input": path.name, "input_sha256": sha256(path)} | run
            if is_done(output, sidecar):
                skipped += 1
                continue
            image = load_image(path, args.max_pixels)
            with out_of_memory_explained(f"{image.rgb.shape[1]}x{image.rgb.shape[0]} px", "a smaller --tile"):
                restored = run_deblur(to_tensor(image.rgb)[None], prompt, args.seed)
            output.parent.mkdir(parents=True, exist_ok=True)
            save_image(output, to_uint8(restored[0]), image.alpha, image.icc_profile, image.exif)
            write_json(sidecar_path(output), sidecar)
        except (ValueError, OSError) as error:
            failures.append((path, error))
    print(f"{len(plan) - skipped - len(failures)} deblurred, {skipped} already there, {len(failures)} failed: "
          f"{args.output}")
    return report_failures(failures, args.output)


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(parse_args())))

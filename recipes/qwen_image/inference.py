"""Make an image with Qwen-Image and a prompt, or edit one with Qwen-Image-Edit, with or without a LoRA, through the
stock pipeline. With v_p and v_n the velocities for prompt and negative prompt, true classifier-free guidance is
    v = (v_n + s (v_p - v_n)) |v_p| / |v_n + s (v_p - v_n)|     for every token, |.| being its norm

    python -m recipes.qwen_image.inference --lora_weights output --prompt "man in the city" --output_image city.png
    python -m recipes.qwen_image.inference --model_name Qwen/Qwen-Image-Edit --image city.png --prompt "at night" \\
        --quantization fp8 --lora_weights output/checkpoint-500 --lora_weight 0.8
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from my_dataset.images import load_rgb, save_image
from recipes.qwen_image import qwen
from utils import flux, lora, quantise
from utils.parse import check_finite, check_least, make_parser, run_main, writable_folder
from utils.session import add_device_args, choose_device

QUANTISATIONS = {"none": "bf16", "int8": "int8", "fp8": "fp8", "nf4": "nf4", "qfloat8": "fp8"}
STOCK_TOKENS = 512
DEFAULT_OUTPUT = "generated_image.png"


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model_name", "--pretrained_model_name_or_path", dest="pretrained_model_name_or_path",
        default="Qwen/Qwen-Image", help="folder of a Qwen-Image or Qwen-Image-Edit pipeline, or its hub id")
    add("--revision", help="branch, tag or commit of the hub model")
    add("--variant", help="weight variant of the model files, such as fp16")
    add("--cache_dir", help="where hub downloads are kept")
    add("--lora_weights", default="", help="LoRA file, or the folder that holds it; default: the base model alone")
    add("--lora_weight", type=float, default=1.0, help="strength of the LoRA; 0 switches it off")
    add("--output_image", help=f"where the image is written, over one that is there; default: {DEFAULT_OUTPUT}, and "
        "generated_image-2.png, -3 and so on where it is there")
    add("--prompt", default="man in the city", help="what to make, or how to edit")
    add("--negative_prompt", default=" ", help="what to lead away from")
    add("--image", help="the image that an edit model edits")
    add("--width", type=int, help="px, a multiple of 16; default: 1024, of an edit the model's own choice of one "
        "megapixel in the image's shape")
    add("--height", type=int, help="px, likewise")
    add("--num_inference_steps", type=int, default=50, help="sampling steps")
    add("--true_cfg_scale", type=float, default=5.0, help="s of the formula; 1 = off, which is twice as fast")
    add("--seed", type=int, default=655, help="seed of the noise")
    add("--max_sequence_length", type=int, help=f"tokens of the prompt, 1 to 1024; default: the LoRA's, or "
        f"{STOCK_TOKENS}")
    add("--quantization", choices=QUANTISATIONS, default="none", help="weights of the transformer; qfloat8 is fp8, nf4 "
        "needs a CUDA GPU")
    add("--cpu_offload", action=argparse.BooleanOptionalAction, default=True, help="on a GPU: models wait in host "
        "memory while another computes")
    add_device_args(parser)
    args = parser.parse_args(argv)

    check_finite(args)
    check_least(args, width=16, height=16, num_inference_steps=2, true_cfg_scale=1, seed=0, max_sequence_length=1)
    if (args.max_sequence_length or 1) > 1024:
        raise ValueError(f"--max_sequence_length {args.max_sequence_length}: give 1 to 1024")
    for flag in ("width", "height"):
        if (getattr(args, flag) or 0) % 16:
            raise ValueError(f"--{flag} {getattr(args, flag)}: give a multiple of 16")
    if bool(args.width) != bool(args.height):
        raise ValueError("--width and --height: give both, or neither")
    args.base_precision, args.bnb_options = QUANTISATIONS[args.quantization], None
    if args.quantization == "nf4":
        args.bnb_options = quantise.NF4
        if not torch.cuda.is_available():
            raise ValueError("--quantization nf4: bitsandbytes quantises on a CUDA GPU only; give int8 or fp8")
    output = Path(args.output_image or DEFAULT_OUTPUT)
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--output_image {output}: end it in .png, .jpg or .webp")
    writable_folder(output.parent, "--output_image")
    if args.lora_weights:
        args.lora_weights = lora.find_file(args.lora_weights)
    qwen.check_model(args.pretrained_model_name_or_path)
    return args


def load(args, device, dtype):
    """The stock pipeline on `device`, quantised before the LoRA is put in, which stays as it is."""
    where = flux.source(args)
    pipe = flux.load_pipeline(args.pretrained_model_name_or_path, dtype, bnb_options=args.bnb_options,
                              base_precision=args.base_precision, pipeline_class=DiffusionPipeline, **where)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    if args.lora_weights:
        load_lora(pipe, args.lora_weights, args.lora_weight)
    if device.type == "cuda" and args.cpu_offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)
    return pipe


def load_lora(pipe, file, weight):
    """Load a LoRA file, in diffusers' layout or one of those that diffusers converts, at `weight`. ValueError where it
    does not fit the model, which diffusers would pass over in silence."""
    lora.read_settings(file)  # refuses a damaged file
    tensors, metadata = pipe.lora_state_dict(str(file.parent), weight_name=file.name, return_lora_metadata=True)
    for fault in lora.tensor_faults(file, tensors, pipe.transformer):
        raise ValueError(fault)
    pipe.load_lora_into_transformer(tensors, pipe.transformer, adapter_name="lora", metadata=metadata, _pipeline=pipe)
    pipe.set_adapters(["lora"], [weight])
    lora.compute_in_input_dtype(pipe.transformer)  # the numerics of training
    pipe.transformer.eval()  # a foreign file may bring dropout, in training mode


def unused(path):
    """`path`, or the first of path-2, path-3, ... where it is there."""
    paths = (path if i == 1 else path.with_stem(f"{path.stem}-{i}") for i in itertools.count(1))
    return next(path for path in paths if not path.exists())


def main(args):
    is_edit = qwen.is_edit_model(args.pretrained_model_name_or_path, **flux.source(args))
    if is_edit != bool(args.image):
        raise ValueError("--image: this model edits images; name one" if is_edit else
                         "--image: this model makes images from text alone; name a Qwen-Image-Edit, or leave it out")
    edited = {"image": Image.fromarray(load_rgb(args.image))} if is_edit else {}
    settings = (lora.read_settings(args.lora_weights) if args.lora_weights else None) or {}
    device, dtype = choose_device(args)
    pipe = load(args, device, dtype)
    negative = {"negative_prompt": args.negative_prompt} if args.true_cfg_scale > 1 else {}
    image = pipe(prompt=args.prompt, **negative, **edited, true_cfg_scale=args.true_cfg_scale, width=args.width,
                 height=args.height, num_inference_steps=args.num_inference_steps,
                 generator=torch.Generator().manual_seed(args.seed),
                 max_sequence_length=args.max_sequence_length or settings.get("max_sequence_length", STOCK_TOKENS),
                 ).images[0]
    output = Path(args.output_image) if args.output_image else unused(Path(DEFAULT_OUTPUT))
    save_image(output, np.asarray(image))
    print(f"{output}: {image.width} x {image.height}, seed {args.seed}"
          + (f", LoRA {args.lora_weights} at {args.lora_weight:g}" if args.lora_weights else ""))


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

"""Generate images with FLUX.1 Kontext and a LoRA, beside what the base model makes of the same noise:

    python -m scripts.test_kontext_withlora --pretrained_model_name_or_path /path/to/FLUX.1-Kontext-dev \\
        --lora outputs/my_lora --image photo.jpg --output edited

Prompt, guidance and text length come from the LoRA file unless given. A LoRA that was trained to start from the
degraded image is refused: test_deg_lora_flux_kontext.py samples it as it was trained."""

from my_dataset.images import load_image
from my_dataset.references import reference_tensors
from utils import lora
from utils.parse import make_parser, run_main, writable_folder
from utils.session import (
    add_generation_args,
    check_generation_args,
    choose_device,
    choose_generation_settings,
    describe_model,
    encode_text,
    generate_images,
    load_models,
    without_lora,
    write_generated,
)
from utils.tiles import trained_side


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_generation_args(parser, has_lora=True)
    args = parser.parse_args(argv)
    if not args.lora:
        raise ValueError("--lora is needed: a LoRA file or its folder; scripts.test_kontext runs the base model alone")
    check_generation_args(args)
    return args


def main(args):
    device, dtype = choose_device(args)
    settings, steps = choose_generation_settings(args)
    images = [load_image(path) for path in args.image]
    writable_folder(args.output, "--output")

    pipe, text = load_models(args, settings, device, dtype)
    references = reference_tensors(images, args.resolution or trained_side(settings, pipe.vae))
    with_lora = generate_images(args, pipe, text, references, settings, steps)
    base_text = encode_text(args, settings, device, dtype) if lora.has_text_part(args.lora) else text
    with without_lora(pipe, True):
        base = generate_images(args, pipe, base_text, references, settings, steps)
    grid = write_generated(args, {"base": base, "lora": with_lora}, references,
                           describe_model(args, settings, steps, dtype), images[0].icc_profile if images else None)
    print(f"{len(with_lora)} generated with and without the LoRA in {steps} steps: {grid}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

"""Generate images with plain FLUX.1 Kontext: from text alone, or by editing one or several reference images.

    python -m scripts.test_kontext --pretrained_model_name_or_path /path/to/FLUX.1-Kontext-dev \\
        --image photo.jpg --prompt "Make the sky orange" --output edited

Sampled as the stock pipeline does: from pure noise, on the model folder's own schedule. Written: the images, a grid
with the references beside them, and all settings as JSON."""

from my_dataset.images import load_image
from my_dataset.references import reference_tensors
from utils.parse import make_parser, run_main, writable_folder
from utils.session import (
    add_generation_args,
    check_generation_args,
    choose_device,
    choose_generation_settings,
    describe_model,
    generate_images,
    load_models,
    write_generated,
)
from utils.tiles import trained_side


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_generation_args(parser, has_lora=False)
    args = parser.parse_args(argv)
    check_generation_args(args)
    return args


def main(args):
    device, dtype = choose_device(args)
    settings, steps = choose_generation_settings(args)
    images = [load_image(path) for path in args.image]
    writable_folder(args.output, "--output")

    pipe, text = load_models(args, settings, device, dtype)
    references = reference_tensors(images, args.resolution or trained_side(settings, pipe.vae))
    generated = generate_images(args, pipe, text, references, settings, steps)
    grid = write_generated(args, {"": generated}, references, describe_model(args, settings, steps, dtype),
                           images[0].icc_profile if images else None)
    print(f"{len(generated)} generated in {steps} steps: {grid}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

"""Enhance photographs with FLUX.1 Kontext by a prompt alone; --lora adds a LoRA:

    python -m scripts.demo_enhance_image --pretrained_model_name_or_path /path/to/FLUX.1-Kontext-dev \\
        --input photo.jpg --output enhanced

An image comes out at exactly its size: padded for the model and cropped again, in tiles where it is larger than the
model's training size. test_deg_lora_flux_kontext.py does more: it skips what is done and scores on clean images."""

from tqdm import tqdm

from my_dataset.dataset_deg_paired import to_tensor
from my_dataset.images import MAX_PIXELS, load_image, save_image
from my_dataset.outputs import check_ours, plan_outputs, sidecar_path
from utils.checkpoint import sha256
from utils.failures import check_report, report_failures
from utils.parse import check_least, make_parser, run_main, writable_folder, write_json
from utils.restore import STOCK_SETTINGS
from utils.session import (
    add_restoration_args,
    check_restoration_args,
    choose_device,
    describe_run,
    load_models,
    out_of_memory_explained,
    resolve_settings,
    restore_image,
)
from utils.tiles import choose_tiling
from utils.utils import to_uint8

# Where neither the command line nor a LoRA file says otherwise.
ENHANCE = STOCK_SETTINGS | {
    "prompt": "Enhance image clarity and sharpness: ultra high-resolution, ultra-detailed textures, crisp edges.",
    "guidance_scale": 3.5,
}


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_restoration_args(parser)
    parser.add_argument("--input", required=True, help="image, or folder searched recursively")
    parser.add_argument("--output", required=True, help="folder that mirrors --input")
    parser.add_argument("--max_pixels", type=int, default=MAX_PIXELS, help="leave out images with more pixels")
    args = parser.parse_args(argv)
    check_least(args, max_pixels=1)
    check_restoration_args(args)
    return args


def main(args):
    device, dtype = choose_device(args)
    settings, steps, start_noise = resolve_settings(args, ENHANCE)
    plan = plan_outputs(args.input, args.output)
    check_ours(plan)
    check_report(writable_folder(args.output, "--output"))

    pipe, text = load_models(args, settings, device, dtype)
    tiling, run = choose_tiling(args, settings, pipe.vae), describe_run(args, settings, steps, start_noise, dtype)
    failures = []
    for path, _, output in tqdm(plan, unit="image", disable=None):
        try:
            image = load_image(path, args.max_pixels)
            height, width = image.rgb.shape[:2]
            with out_of_memory_explained(f"{width}x{height} px"):
                enhanced, tiles = restore_image(pipe, to_tensor(image.rgb)[None], text, settings, steps, args.seed,
                                                start_noise, tiling, args.color_fix)
            output.parent.mkdir(parents=True, exist_ok=True)
            save_image(output, to_uint8(enhanced[0]), image.alpha, image.icc_profile, image.exif)
            write_json(sidecar_path(output), {"input": path.name, "input_sha256": sha256(path), "seed": args.seed}
                       | run | {"tiles_used": tiles})
        except (ValueError, OSError) as error:
            failures.append((path, error))
    print(f"{len(plan) - len(failures)} enhanced, {len(failures)} failed: {args.output}")
    return report_failures(failures, args.output)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

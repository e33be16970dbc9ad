"""Degrade photographs and let FLUX.1 Kontext restore them, alone or with a restoration LoRA:

    python -m scripts.test_kontext_deg --pretrained_model_name_or_path /path/to/FLUX.1-Kontext-dev \\
        --input photos --degradation_types downsample,noise --lora outputs/my_lora --output compared

Written for each photograph: NAME_original.png, NAME_degraded.png and NAME_restored.png, all of one size; and for all of
them grid.png with PSNR, and results.json with PSNR, the drawn degradations and all settings. What is larger than the
model's training size is restored in tiles. What a run for the same --input wrote there, by its outputs.json, is written
over, and nothing else is. test_deg_lora_flux_kontext.py --clean measures more, on the same damage."""

from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from my_dataset.dataset_deg_paired import DEGRADATION_STREAM, heldout_seed, item_rng, item_seed, to_tensor
from my_dataset.degradations import add_degradation_args, degrader_from_args
from my_dataset.images import MAX_PIXELS, load_image, save_image
from my_dataset.outputs import claim, plan_outputs
from my_dataset.scored_pairs import crop_boxes
from utils import metrics
from utils.failures import check_report, report_failures
from utils.parse import check_least, make_parser, public_args, run_main, writable_folder, write_json
from utils.score import caption
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
from utils.utils import image_grid, to_uint8

KINDS = ("original", "degraded", "restored")


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_restoration_args(parser)
    add = parser.add_argument
    add("--input", required=True, help="clean photograph, or folder searched recursively")
    add("--output", required=True, help="folder for everything that is written; mirrors --input")
    add("--crop_px", type=int, default=0, help="use the middle of each photograph, a square of this side; 0: all of it")
    add("--grid_images", type=int, default=6, help="photographs drawn in grid.png")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="leave out images with more pixels than this")
    add_degradation_args(parser)
    args = parser.parse_args(argv)
    check_least(args, crop_px=0, grid_images=0, max_pixels=1)
    check_restoration_args(args)
    return args


def main(args):
    device, dtype = choose_device(args)
    degrade = degrader_from_args(args)
    settings, steps, start_noise = resolve_settings(args)
    outputs = [plan_outputs(args.input, args.output, f"_{kind}", "png") for kind in KINDS]
    folder = writable_folder(args.output, "--output")
    grid, report = folder / "grid.png", folder / "results.json"
    inputs = {grid: Path(args.input), report: Path(args.input)}
    inputs |= {path: source for planned in outputs for source, _, path in planned}
    check_report(folder)
    for file, record in claim({folder: inputs}).items():
        write_json(file, record)

    pipe, text = load_models(args, settings, device, dtype)
    tiling = choose_tiling(args, settings, pipe.vae)
    results, rows, captions, failures = [], [], [], []
    for index, planned in enumerate(tqdm(list(zip(*outputs, strict=True)), unit="image", disable=None)):
        source = planned[0][0]
        try:
            image = load_image(source, args.max_pixels)
            [(top, left, bottom, right)] = crop_boxes(*image.rgb.shape[:2], args.crop_px, 1)
            clean = image.rgb[top:bottom, left:right]
            degraded, params = degrade(clean, item_rng(heldout_seed(args.seed), 0, index, DEGRADATION_STREAM))
            target, control = to_tensor(clean)[None], to_tensor(degraded)[None]
            with out_of_memory_explained(f"{clean.shape[1]}x{clean.shape[0]} px"):
                restored, tiles = restore_image(pipe, control, text, settings, steps, item_seed(args.seed, 0, index),
                                                start_noise, tiling, args.color_fix)
            images = dict(zip(KINDS, (target[0], control[0], restored[0]), strict=True))
            for (_, _, path), picture in zip(planned, images.values(), strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_image(path, to_uint8(picture), icc_profile=image.icc_profile)
        except (ValueError, OSError) as error:
            failures.append((source, error))
            continue
        psnr = {kind: metrics.psnr(picture[None], target).item() for kind, picture in images.items()}
        results.append({"image": str(source), "psnr_degraded": psnr["degraded"], "psnr_restored": psnr["restored"],
                        "degradation": params, "tiles_used": tiles})
        if len(rows) < args.grid_images:
            rows.append(list(images.values()))
            captions.append(["", *(caption({"psnr": psnr[kind]}) for kind in KINDS[1:])])
    code = report_failures(failures, args.output)
    if not results:
        raise ValueError(f"--input {args.input}: not one image could be restored, see failures.json in {args.output}")
    if rows:
        image_grid(rows, KINDS, captions).save(grid)
    write_json(report, {
        "images": results, "run": describe_run(args, settings, steps, start_noise, dtype),
        "arguments": public_args(args)})
    before, after = (fmean(result[f"psnr_{kind}"] for result in results) for kind in KINDS[1:])
    print(f"{len(results)} photographs, mean PSNR {before:.2f} dB degraded, {after:.2f} dB restored: {args.output}")
    return code


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

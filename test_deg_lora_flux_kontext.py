"""Restore degraded photographs with FLUX.1 Kontext and a restoration LoRA, or score the LoRA on clean photographs.

    python test_deg_lora_flux_kontext.py --pretrained_model_name_or_path /path/to/FLUX.1-Kontext-dev \
        --lora outputs/my_lora --input old_photos --output restored
    python test_deg_lora_flux_kontext.py --pretrained_model_name_or_path /path/to/FLUX.1-Kontext-dev \
        --lora outputs/my_lora --clean heldout --degradation_types downsample,noise --output scores

Start noise, sigmas, guidance, prompt and text length come from the LoRA file. An image of any size comes out at exactly
its size, in 8 bits, with its ICC profile and EXIF; an alpha channel is carried over unchanged. What is larger than the
LoRA's training size is restored in overlapping tiles. `accelerate launch --num_processes N` in place of `python` shares
the images between N GPUs."""

import argparse
import itertools
import json
import math
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from PIL import Image
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

from my_dataset.dataset_deg_paired import KERNELS, folder_records, heldout_seed, item_seed, pair_records, to_tensor
from my_dataset.degradations import add_degradation_args, degrader_from_args
from my_dataset.images import MAX_PIXELS, load_image, load_rgb, save_image
from my_dataset.outputs import check_ours, is_done, plan_outputs, sidecar_path
from my_dataset.scored_pairs import denoise_bilateral, denoise_nlm, load_pairs
from utils import metrics
from utils.checkpoint import sha256
from utils.failures import check_report, report_failures
from utils.parse import check_least, make_parser, public_args, run_main, writable_folder, write_json
from utils.quantise import quantise_blocks
from utils.report import item_name, picture, section, write_report
from utils.restore import STOCK_SETTINGS
from utils.score import (
    DEFINITIONS,
    GRID_LABELS,
    ROWS,
    keep_best,
    measure,
    package_versions,
    readable,
    summarise,
    write_scores,
)
from utils.session import (
    add_restoration_args,
    by_tiles,
    check_restoration_args,
    choose_device,
    describe_run,
    load_models,
    out_of_memory_explained,
    resolve_settings,
    restore_image,
    start_processes,
    without_lora,
)
from utils.tiles import choose_tiling, round_trip_tiled, trained_side
from utils.utils import to_uint8

NLM_STRENGTHS = (3, 6, 10, 15, 20, 25, 30, 40, 60)
BILATERAL = tuple(itertools.product((20, 45, 80, 110, 150, 200, 300), (1, 1.5, 2, 3)))  # color in levels, space in px

FEW_IMAGES = 10  # below, the percentile bootstrap covers the mean clearly less often than it says


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_restoration_args(parser)
    add = parser.add_argument
    add("--output", required=True, help="folder for everything that is written")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="leave out images with more pixels than this")
    add("--grid_images", type=int, default=6, help="images in report.html and, when scoring, in grid.png")

    add = parser.add_argument_group("restoring degraded images").add_argument
    add("--input", help="image, or folder searched recursively; its structure is mirrored in --output")
    add("--suffix", default="", help="added to the file name, before the extension")
    add("--ext", default="auto", choices=["auto", "png", "jpg", "webp"], help="file format; auto: the input's")
    add("--skip_existing", action=argparse.BooleanOptionalAction, default=True,
        help="keep an output that decodes and was made from the same input with the same settings")
    add("--base_precision", default="bf16", choices=["bf16", "int8", "fp8"], help="weights of the transformer's "
        "blocks, quantised after the LoRA was merged into them; what that changes is measured on the first image")
    add("--num_images", type=int, default=1, help="restorations per image, with the seeds seed, seed + 1, ...")

    add = parser.add_argument_group("scoring on clean images").add_argument
    add("--clean", "--hr_root", help="folder of clean images: they are degraded, restored and compared")
    add("--degraded", "--lr_root", help="folder of their stored degraded partners, instead of degrading them")
    add("--allow_missing", action="store_true", help="leave out stored images without partner instead of stopping")
    add("--upscale_kernel", choices=sorted(KERNELS), default="bicubic", help="enlarges smaller stored partners")
    add("--max_images", type=int, help="score this many images, spread evenly over the sorted files")
    add("--crop_px", type=int, default=0, help="score square crops of this side; 0: whole images")
    add("--crops_per_image", type=int, default=1, help="crops per image, of a centred grid without overlap")
    add("--metrics", help="comma list of psnr, ssim, lpips; default: psnr, ssim, and lpips if its weights are there")
    add("--lpips_net", default="alex", choices=sorted(metrics.BACKBONES), help="backbone of LPIPS")
    add("--lpips_backbone", help="its torchvision weight file; default: its place in the torch cache")
    add("--base_row", action=argparse.BooleanOptionalAction, default=True,
        help="also score the base model without LoRA, from pure noise at the same steps, prompt and guidance")
    add("--bilateral_row", action=argparse.BooleanOptionalAction, default=True,
        help="also score OpenCV's bilateral filter, likewise at its best")
    add("--nlm_row", action=argparse.BooleanOptionalAction, default=True,
        help="also score OpenCV's non-local means, at the strength that is best on the scored images")
    add_degradation_args(parser)
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args):
    """Refuse what can be refused before a model loads. ValueError naming the flag."""
    if bool(args.input) == bool(args.clean):
        raise ValueError("give either --input (restore degraded images) or --clean (score on clean images)")
    if args.base_precision != "bf16" and (args.clean or args.merge_lora is False):
        raise ValueError(f"--base_precision {args.base_precision} is for --input, with the LoRA merged; drop it, or "
                         "--no-merge_lora")
    if args.degraded and not args.clean:
        raise ValueError("--degraded needs --clean with the clean images of the pairs")
    check_least(args, num_images=1, crops_per_image=1, max_pixels=1, max_images=1, crop_px=0, grid_images=0)
    if Path(args.suffix).name != args.suffix:
        raise ValueError(f"--suffix {args.suffix}: a part of a file name, without folders")
    check_restoration_args(args, has_base_row=bool(args.clean) and args.base_row)


def restore_files(args, settings, steps, start_noise, device, dtype, processes):
    """Restore every image of --input, each in one of the processes; returns 1 if some failed, else 0."""
    run = describe_run(args, settings, steps, start_noise, dtype) | {"base_precision": args.base_precision}
    jobs, failures, skipped = [], [], 0
    plan = plan_outputs(args.input, args.output, args.suffix, args.ext, args.num_images)
    check_ours(plan)
    processes.wait_for_everyone()  # before the first of them writes
    for path, variant, output in plan[processes.process_index :: processes.num_processes]:
        try:
            sidecar = {"input": path.name, "input_sha256": sha256(path), "seed": args.seed + variant} | run
        except OSError as error:
            failures.append((path, error))
            continue
        if args.skip_existing and is_done(output, sidecar):
            skipped += 1
        else:
            jobs.append((path, output, sidecar))

    def quantise_measured(pipe, text):
        """Quantise the transformer, and say what that does to the middle of the first image."""
        if args.base_precision == "bf16":
            return
        image = to_tensor(load_image(jobs[0][0], args.max_pixels).rgb)[None]
        probe = center_crop(image, [min(side, trained_side(settings, pipe.vae)) for side in image.shape[-2:]])

        def restore_probe():
            return restore_image(pipe, probe, text, settings, steps, args.seed, start_noise)[0]

        plain = restore_probe()
        quantise_blocks(pipe.transformer, args.base_precision)
        print(f"{args.base_precision} weights: {metrics.psnr(restore_probe(), plain)[0]:.1f} dB PSNR to the result of "
              f"plain weights, on the middle of {jobs[0][0].name}", flush=True)

    if jobs:
        pipe, text = load_models(args, settings, device, dtype, quantise_measured)
        tiling = choose_tiling(args, settings, pipe.vae)
    for path, output, sidecar in tqdm(jobs, unit="image", disable=None if processes.is_main_process else True):
        try:
            image = load_image(path, args.max_pixels)
            height, width = image.rgb.shape[:2]
            with out_of_memory_explained(f"{width}x{height} px"):
                restored, used = restore_image(pipe, to_tensor(image.rgb)[None], text, settings, steps, sidecar["seed"],
                                               start_noise, tiling, args.color_fix)
            output.parent.mkdir(parents=True, exist_ok=True)
            save_image(output, to_uint8(restored[0]), image.alpha, image.icc_profile, image.exif)
            write_json(sidecar_path(output), sidecar | {"tiles_used": used})
        except (ValueError, OSError) as error:
            failures.append((path, error))
    failures = sorted(gather_object(failures), key=lambda failure: str(failure[0]))  # every process now has all
    skipped = sum(gather_object([skipped]))
    if processes.is_main_process:
        print(f"{len(plan) - skipped - len(failures)} restored, {skipped} already there, {len(failures)} failed: "
              f"{args.output}")
        report_restored(args, plan, [path for path, _ in failures], run)
        report_failures(failures, args.output)
    return int(bool(failures))


def report_restored(args, plan, failed, run):
    """Write report.html: the first --grid_images restored images, each beside what it was made from."""
    pictures, notes = {}, {}
    for path, _, output in [job for job in plan if job[0] not in failed][: args.grid_images]:
        item = output.relative_to(args.output).as_posix()
        pictures[item] = [picture(label, Image.fromarray(load_rgb(file, math.inf)))
                          for label, file in (("input", path), ("restored", output))]
        sidecar = json.loads(sidecar_path(output).read_text(encoding="utf-8"))
        notes[item] = {name: value for name, value in sidecar.items() if name not in run}
    if pictures:
        write_report(Path(args.output) / "report.html", "Restored images", f"{len(pictures)} of {len(plan)} images, "
                     f"{len(failed)} failed", [section("Images", pictures=pictures, notes=notes)],
                     {"How they were made": run, "Versions": package_versions()})


def make_rows(args, pipe, text, settings, steps, start_noise, target, control, seed):
    """Yields (row, image, tile_options of what went through the model, else None) of everything that is compared with
    `target`, one at a time: all trials of a large image would fill the memory. Images (1, 3, H, W) in [-1, 1], CPU."""
    tiling, degraded = choose_tiling(args, settings, pipe.vae), to_uint8(control[0])

    def round_trip(image):
        return by_tiles(lambda tiling: round_trip_tiled(pipe.vae, image, tiling), pipe.vae, image, tiling)

    def restore(settings, start_noise):
        return restore_image(pipe, control, text, settings, steps, seed, start_noise, tiling, args.color_fix)

    yield "input", control, None
    yield "input_vae", *round_trip(control)
    for h in NLM_STRENGTHS if args.nlm_row else ():
        yield f"nlm h={h}", to_tensor(denoise_nlm(degraded, h))[None], None
    for color, space in BILATERAL if args.bilateral_row else ():
        image = denoise_bilateral(degraded, color, space)
        yield f"bilateral color={color} space={space}", to_tensor(image)[None], None
    if args.base_row:
        stock = STOCK_SETTINGS | {name: settings[name] for name in ("prompt", "guidance_scale", "max_sequence_length")}
        with without_lora(pipe, args.lora):
            base = restore(stock, 1.0)
        yield "base", *base
    if args.lora:
        yield "lora", *restore(settings, start_noise)
    yield "ceiling", *round_trip(target)


def score_images(args, settings, steps, start_noise, device, dtype, processes):
    """Score on --clean, each image in one of the processes; returns 1 if some images failed, else 0."""
    names = metrics.available_metrics(args.lpips_backbone, args.lpips_net)
    names = metrics.parse_metrics(args.metrics) if args.metrics else names
    degrade = None if args.degraded else degrader_from_args(args)
    lpips = metrics.lpips_model(args.lpips_backbone, args.lpips_net).to(device) if "lpips" in names else None
    records = folder_records(args.clean) if degrade else pair_records(args.degraded, args.clean, args.allow_missing)
    count = min(args.max_images or len(records), len(records))
    pipe, text = load_models(args, settings, device, dtype)

    chosen = np.linspace(0, len(records) - 1, count).round().astype(int).tolist()
    scored, failures = [], []
    for index in tqdm(chosen[processes.process_index :: processes.num_processes], unit="image",
                      disable=None if processes.is_main_process else True):
        name, image_scores, params = records[index].name, [], []
        try:
            pairs = load_pairs(records[index], index, degrade, heldout_seed(args.seed), args.crop_px,
                               args.crops_per_image, args.upscale_kernel, args.max_pixels)
            for crop, (target, control, degradation) in enumerate(pairs):
                measured, shown, used = {}, {"target": (target[0], {})}, {}
                with out_of_memory_explained(f"{target.shape[-1]}x{target.shape[-2]} px"):
                    for row, image, tiles in make_rows(args, pipe, text, settings, steps, start_noise, target, control,
                                                       item_seed(args.seed, crop, index)):
                        measured[row] = measure(image.to(device), target.to(device), names, lpips)
                        shown |= {row: (image[0], measured[row])} if row in GRID_LABELS else {}
                        used |= {row: tiles} if tiles else {}
                image_scores += [{"image": name, "crop": crop, "row": row} | measured[row] for row in measured]
                params.append({"image": name, "crop": crop, "degradation": degradation, "tiles_used": used})
                if crop == len(pairs) // 2:  # the middle of the photograph says more than its corner
                    drawn = {item_name(params[-1]): shown}
        except (ValueError, OSError) as error:
            failures.append((index, name, error))
            continue
        scored.append((index, image_scores, params, drawn if len(scored) < args.grid_images else {}))

    # every process now has all, in the order of the images
    scored, failures = (sorted(gather_object(part), key=lambda image: image[0]) for part in (scored, failures))
    scores, degradations = ([item for image in scored for item in image[i]] for i in (1, 2))
    pictures = {item: shown for image in scored[: args.grid_images] for item, shown in image[3].items()}
    code = int(bool(failures))
    if processes.is_main_process:
        report_failures([failure[1:] for failure in failures], args.output)
    if not scores:
        raise ValueError(f"--clean {args.clean}: not one image could be scored, see failures.json in {args.output}")

    if not processes.is_main_process:
        return code
    labels = dict(ROWS)
    for row in ("nlm", "bilateral"):
        scores, setting = keep_best(scores, row)
        labels[row] += f" ({setting}, best on this set)" if setting else ""
    labels["base"] += f", {steps} step{'s' * (steps > 1)} from noise"
    table, gains = summarise(scores, args.seed)
    report = {
        "images": count - len(failures), "crops": len(degradations), "failed": len(failures),
        "rows": readable(table, labels), "lora_minus": readable(gains, labels),
        "interval": "95 %, percentile bootstrap of the mean over images",
        "definitions": {key: DEFINITIONS[key] for key in table["input"]},
        "lpips_net": args.lpips_net if lpips else None,
        "run": describe_run(args, settings, steps, start_noise, dtype), "arguments": public_args(args),
        "degradations": degradations,
        "versions": package_versions(),
    }
    write_scores(args.output, scores, report, pictures)
    print(f"\n{metrics.summary_table({labels[row]: values for row, values in table.items()})}\n")
    for row, values in gains.items():
        key, (mean, lo, hi) = next(iter(values.items()))
        print(f"LoRA minus {labels[row]}: {key} {mean:+.3f} [{lo:+.3f}, {hi:+.3f}]")
    if report["images"] < FEW_IMAGES:
        print(f"The intervals are too narrow: a bootstrap over fewer than {FEW_IMAGES} images knows too few of them.")
    print(f"n = {report['images']} images, {report['crops']} crops; mean [95 % interval]; {steps} steps, start noise "
          f"{start_noise:g}, seed {args.seed}\nscores.csv, metrics.json, grid.png, report.html: {args.output}")
    return code


def main(args):
    device, dtype = choose_device(args)
    settings, steps, start_noise = resolve_settings(args)
    check_report(writable_folder(args.output, "--output"))
    processes = start_processes(device)
    run = restore_files if args.input else score_images
    code = run(args, settings, steps, start_noise, device, dtype, processes)
    processes.destroy_process_group()
    return code


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

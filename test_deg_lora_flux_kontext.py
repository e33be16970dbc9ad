"""Restore degraded photographs with FLUX.1 Kontext and a restoration LoRA, or score the LoRA on clean photographs.

    python test_deg_lora_flux_kontext.py --pretrained_model_name_or_path /path/to/FLUX.1-Kontext-dev \
        --lora outputs/my_lora --input old_photos --output restored
    python test_deg_lora_flux_kontext.py --pretrained_model_name_or_path /path/to/FLUX.1-Kontext-dev \
        --lora outputs/my_lora --clean heldout --degradation_types downsample,noise --output scores

Start noise, sigmas, guidance, prompt and text length come from the LoRA file. An image of any size comes out at exactly
its size, in 8 bits, with its ICC profile and EXIF; an alpha channel is carried over unchanged. What is larger than the
LoRA's training size is restored in overlapping tiles."""

import argparse
import contextlib
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from my_dataset.dataset_deg_paired import KERNELS, folder_records, heldout_seed, item_seed, pair_records, to_tensor
from my_dataset.degradations import add_degradation_args, degrader_from_args
from my_dataset.images import MAX_PIXELS, load_image, save_image
from my_dataset.outputs import is_done, plan_outputs, sidecar_path
from my_dataset.scored_pairs import denoise_bilateral, denoise_nlm, load_pairs
from utils import flow_matching as fm
from utils import flux, lora, metrics
from utils.checkpoint import sha256
from utils.color import COLOR_FIXES, color_fix
from utils.parse import check_least, make_parser, public_args, run_main, writable_folder, write_json
from utils.restore import STOCK_SETTINGS, choose_start_noise, fidelity_start_noise
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
from utils.tiles import (
    WHOLE,
    add_tile_args,
    check_tile_args,
    choose_tiling,
    restore_tiled,
    round_trip_tiled,
    tile_options,
    within_memory,
)
from utils.utils import to_uint8
from utils.validation import default_steps

NLM_STRENGTHS = (3, 6, 10, 15, 20, 25, 30, 40, 60)
BILATERAL = tuple(itertools.product((20, 45, 80, 110, 150, 200, 300), (1, 1.5, 2, 3)))  # color in levels, space in px

FEW_IMAGES = 10  # below, the percentile bootstrap covers the mean clearly less often than it says


def parse_args(argv=None):
    parser = make_parser(__doc__)
    flux.add_model_args(parser)
    parser.set_defaults(guidance_scale=None, max_sequence_length=None, vae_encode_mode=None)  # the LoRA file's
    add = parser.add_argument
    add("--lora", help="LoRA file, or the folder that holds it; without it the base model alone restores")
    add("--lora_weight", type=float, default=1.0, help="strength of the LoRA; 0 switches it off")
    add("--output", required=True, help="folder for everything that is written")
    add("--prompt", help="default: the LoRA file's")
    add("--num_inference_steps", type=int,
        help="default: 28 for a LoRA trained at start noise 1; below, 4 or what its list of sigmas allows")
    add("--start_noise", type=float, help="within the LoRA's trained range; default: its middle")
    add("--fidelity", type=float, help="instead of --start_noise; 1: the lowest that was trained, closest to the "
        "image; 0: the highest, which invents most")
    add("--color_fix", default="off", choices=COLOR_FIXES, help="take colours from the degraded image: its low "
        "frequencies (wavelet) or its channels' mean and spread (adain); brings back fading, yellowing and darkness")
    add("--seed", type=int, default=0, help="seed of the noise, and of the degradations in scoring")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda where there is one")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on cuda, fp32 on the CPU")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="leave out images with more pixels than this")
    add_tile_args(parser)

    add = parser.add_argument_group("restoring degraded images").add_argument
    add("--input", help="image, or folder searched recursively; its structure is mirrored in --output")
    add("--suffix", default="", help="added to the file name, before the extension")
    add("--ext", default="auto", choices=["auto", "png", "jpg", "webp"], help="file format; auto: the input's")
    add("--skip_existing", action=argparse.BooleanOptionalAction, default=True,
        help="keep an output that decodes and was made from the same input with the same settings")
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
    add("--grid_images", type=int, default=6, help="images drawn in grid.png")
    add_degradation_args(parser)
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args):
    """Refuse what can be refused before a model loads. ValueError naming the flag."""
    if bool(args.input) == bool(args.clean):
        raise ValueError("give either --input (restore degraded images) or --clean (score on clean images)")
    if args.degraded and not args.clean:
        raise ValueError("--degraded needs --clean with the clean images of the pairs")
    check_least(args, num_images=1, crops_per_image=1, max_pixels=1, num_inference_steps=1)
    check_scoring_args(args)
    if args.fidelity is not None and (args.start_noise is not None or not 0 <= args.fidelity <= 1):
        raise ValueError(f"--fidelity {args.fidelity}: give 0 to 1, without --start_noise, which it stands for")
    if Path(args.suffix).name != args.suffix:
        raise ValueError(f"--suffix {args.suffix}: a part of a file name, without folders")
    flux.check_model(args.pretrained_model_name_or_path)


def check_scoring_args(args):
    """Refuse senseless numbers of the options that scoring has here and in bench/restoration.py. ValueError naming the
    flag."""
    check_least(args, seed=0, max_images=1, crop_px=0, grid_images=0, max_sequence_length=1)
    if (args.max_sequence_length or 1) > 512:
        raise ValueError(f"--max_sequence_length {args.max_sequence_length}: give 1 to 512")
    for flag in ("lora_weight", "guidance_scale"):
        if not math.isfinite(getattr(args, flag) or 0):
            raise ValueError(f"--{flag} {getattr(args, flag)}: give a finite number")
    check_tile_args(args)


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


def resolve_settings(args):
    """(settings, steps, start noise): the LoRA file's own, or stock Kontext's, with what the command line overrides."""
    stored = lora.read_settings(args.lora) if args.lora else None
    if args.lora and stored is None:
        print(f"warning: {args.lora} holds no sampling settings; it is sampled as stock Kontext is", file=sys.stderr)
    settings = STOCK_SETTINGS | (stored or {})
    base, model = settings["base_model"], args.pretrained_model_name_or_path
    if base and Path(base).name != Path(model).name:
        print(f"warning: {args.lora} was trained on {base}, and the model is {model}", file=sys.stderr)
    for name in ("prompt", "guidance_scale", "max_sequence_length", "vae_encode_mode"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    wanted = args.start_noise if args.fidelity is None else fidelity_start_noise(settings, args.fidelity)
    start_noise = choose_start_noise(settings, wanted)
    steps = args.num_inference_steps or default_steps(settings)
    if start_noise < 1:
        fm.sampling_positions(steps, settings["train_sigmas"])  # refuses steps that were never trained
    return settings, steps, start_noise


@contextlib.contextmanager
def out_of_memory_explained(what):
    """Turn CUDA's out-of-memory error into a ValueError with the cure."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise ValueError(f"{what}: out of GPU memory; use --dtype bf16, a smaller --tile, --crop_px in scoring, "
                         "another GPU, or --device cpu") from error


def load_models(args, settings, device, dtype):
    """(pipe, text): VAE, transformer and scheduler with the LoRA in, and the encoded prompt."""
    where = {name: getattr(args, name) for name in ("revision", "variant", "cache_dir")}
    path = args.pretrained_model_name_or_path
    with out_of_memory_explained(path):
        text = flux.encode_prompts(path, [settings["prompt"]], device, dtype, settings["max_sequence_length"], **where)
        pipe = flux.load_models(path, device, dtype, **where)
        if args.lora:
            lora.load(pipe, args.lora, args.lora_weight)
    return pipe, flux.stack_text(text, [settings["prompt"]], device, dtype)


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


def describe_run(args, settings, steps, start_noise, dtype):
    """All that a restoration depends on but its input and seed, JSON-safe: for sidecars and metrics.json, which also
    name the tiles_used of each image: what --tile auto, --tile_overlap and the memory came to."""
    file = lora.find_file(args.lora) if args.lora else None
    return {
        "model": args.pretrained_model_name_or_path, "revision": args.revision, "variant": args.variant,
        "lora": file and {"file": file.name, "sha256": sha256(file), "weight": args.lora_weight},
        "steps": steps, "sampled_start_noise": start_noise, "dtype": str(dtype), "settings": settings,
        "tile": args.tile, "tile_overlap": args.tile_overlap, "token_shifts": args.token_shifts,
        "color_fix": args.color_fix,
    }


def report_failures(failures, folder):
    """Write failures.json, or remove an old one; name each failure on stderr. Returns the exit code, 1 or 0.
    failures: [(path, exception)]."""
    file = Path(folder, "failures.json")
    file.unlink(missing_ok=True)
    if failures:
        write_json(file, [{"input": str(path), "reason": str(error)} for path, error in failures])
    for path, error in failures:
        print(f"failed: {path}: {str(error).removeprefix(f'{path}: ')}", file=sys.stderr)
    return int(bool(failures))


def restore_files(args, settings, steps, start_noise, device, dtype):
    """Restore every image of --input; returns 1 if some failed, else 0."""
    run = describe_run(args, settings, steps, start_noise, dtype)
    jobs, failures = [], []
    plan = plan_outputs(args.input, args.output, args.suffix, args.ext, args.num_images)
    for path, variant, output in plan:
        try:
            sidecar = {"input": path.name, "input_sha256": sha256(path), "seed": args.seed + variant} | run
        except OSError as error:
            failures.append((path, error))
            continue
        if not (args.skip_existing and is_done(output, sidecar)):
            jobs.append((path, output, sidecar))
    skipped = len(plan) - len(failures) - len(jobs)

    if jobs:
        pipe, text = load_models(args, settings, device, dtype)
        tiling = choose_tiling(args, settings, pipe.vae)
    for path, output, sidecar in tqdm(jobs, unit="image", disable=None):
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
    print(f"{len(plan) - skipped - len(failures)} restored, {skipped} already there, {len(failures)} failed: "
          f"{args.output}")
    return report_failures(failures, args.output)


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


def score_images(args, settings, steps, start_noise, device, dtype):
    """Score on --clean; returns 1 if some images failed, else 0."""
    names = metrics.available_metrics(args.lpips_backbone, args.lpips_net)
    names = metrics.parse_metrics(args.metrics) if args.metrics else names
    degrade = None if args.degraded else degrader_from_args(args)
    lpips = metrics.lpips_model(args.lpips_backbone, args.lpips_net).to(device) if "lpips" in names else None
    records = folder_records(args.clean) if degrade else pair_records(args.degraded, args.clean, args.allow_missing)
    count = min(args.max_images or len(records), len(records))
    pipe, text = load_models(args, settings, device, dtype)

    scores, degradations, pictures, failures = [], [], [], []
    for index in tqdm(np.linspace(0, len(records) - 1, count).round().astype(int).tolist(), unit="image", disable=None):
        name, image_scores, params = records[index].name, [], []
        try:
            pairs = load_pairs(records[index], index, degrade, heldout_seed(args.seed), args.crop_px,
                               args.crops_per_image, args.upscale_kernel, args.max_pixels)
            for crop, (target, control, degradation) in enumerate(pairs):
                measured, shown, used = {}, {"target": target[0]}, {}
                with out_of_memory_explained(f"{target.shape[-1]}x{target.shape[-2]} px"):
                    for row, image, tiles in make_rows(args, pipe, text, settings, steps, start_noise, target, control,
                                                       item_seed(args.seed, crop, index)):
                        measured[row] = measure(image.to(device), target.to(device), names, lpips)
                        shown |= {row: image[0]} if row in GRID_LABELS else {}
                        used |= {row: tiles} if tiles else {}
                image_scores += [{"image": name, "crop": crop, "row": row} | measured[row] for row in measured]
                params.append({"image": name, "crop": crop, "degradation": degradation, "tiles_used": used})
                if crop == len(pairs) // 2:  # the middle of the photograph says more than its corner
                    picture = shown, measured
        except (ValueError, OSError) as error:
            failures.append((name, error))
            continue
        scores, degradations = scores + image_scores, degradations + params
        pictures += [picture] if len(pictures) < args.grid_images else []
    code = report_failures(failures, args.output)
    if not scores:
        raise ValueError(f"--clean {args.clean}: not one image could be scored, see failures.json in {args.output}")

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
          f"{start_noise:g}, seed {args.seed}\nscores.csv, metrics.json, grid.png: {args.output}")
    return code


def main(args):
    device, dtype = choose_device(args)
    settings, steps, start_noise = resolve_settings(args)
    writable_folder(args.output, "--output")
    run = restore_files if args.input else score_images
    return run(args, settings, steps, start_noise, device, dtype)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

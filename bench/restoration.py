"""Restoration quality on named sets of degraded images, beside classical methods and the model without LoRA:

    python -m bench.restoration --pretrained_model_name_or_path /path/to/FLUX.1-Kontext-dev --lora outputs/my_lora \
        --clean heldout --sets noise25,x2,heavy --steps 1,4,28 --output outputs/bench

A set is made from any folder of clean images; what it looks like depends on its name, --seed and the place of the image
among the folder's sorted files alone, and its sha256 over names and degraded pixels is written. The classical methods
are tuned on other photographs, degraded alike. Written: results.md (one table a set), results.json (everything),
scores.csv (a line per image and row), <set>.png and report.html, one page of all that, with charts over sampling steps
and seconds; after every set, so that a broken run leaves what it finished."""

import argparse
import contextlib
import hashlib
import os
import platform
import statistics
import sys
import time
import zlib
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from tqdm import tqdm

from bench.charts import draw_sampling
from my_dataset.dataset_deg_paired import DEGRADATION_STREAM, folder_records, item_rng, item_seed, to_tensor
from my_dataset.degradations import (
    add_degradation_args,
    apply_degradations,
    degrader_from_args,
    make_degrader,
    parse_words,
)
from my_dataset.images import list_images, load_rgb
from my_dataset.scored_pairs import crop_boxes, denoise_bilateral, denoise_nlm, load_pairs, unsharp
from scripts.make_tiny_kontext import HELDOUT_SAMPLES, TRAIN_SAMPLES, load_sample
from test_deg_lora_flux_kontext import NLM_STRENGTHS as SCORING_STRENGTHS
from utils import flow_matching as fm
from utils import flux, lora, metrics
from utils.parse import check_least, make_parser, public_args, run_main, writable_folder, write_json
from utils.report import DIGITS, chart, section, write_report
from utils.restore import choose_start_noise
from utils.score import (
    DEFINITIONS,
    ROWS,
    caption,
    compared,
    measure,
    package_versions,
    readable,
    summarise,
    write_csv,
)
from utils.session import (
    add_device_args,
    by_tiles,
    check_sampling_args,
    choose_device,
    describe_run,
    out_of_memory_explained,
    resolve_settings,
    restore_image,
)
from utils.tiles import add_tile_args, check_tile_args, choose_tiling, round_trip_tiled
from utils.utils import image_grid, to_uint8

# By name: what the report says, and what make_degrader gets.
SETS = {
    f"noise{sigma}": (f"Gaussian noise of sigma {sigma}/255 in every channel",
                      {"types": "noise", "noise_level": sigma / 255}) for sigma in (15, 25, 50)
} | {
    f"x{factor}": (f"reduced to 1/{factor} and enlarged to its size, both by Pillow's bicubic (a = -0.5, antialiased "
                   "where it reduces, as MATLAB's imresize)", {"types": "downsample", "lr_scale": factor})
    for factor in (2, 4)
} | {
    f"jpeg{quality}": (f"JPEG of quality {quality}, chroma halved", {"types": "jpeg", "jpeg_quality": quality})
    for quality in (10, 20, 40)
} | {
    "gaussian_blur": ("Gaussian blur of sigma 2 px", {"types": "blur", "blur_radius": 2}),
    "motion_blur": ("straight motion over 11 px at any angle",
                    {"types": "blur", "blur_radius": 5, "blur_kinds": "motion"}),
    "defocus_blur": ("disc of radius 3 px", {"types": "blur", "blur_radius": 3, "blur_kinds": "defocus"}),
} | {
    preset: (f"--degradation_preset {preset}; ranges and kernels in results.json", {"preset": preset})
    for preset in ("light", "medium", "heavy", "real_world", "old_photo")
}  # fmt: skip

TUNE_IMAGES, TUNE_PX = 8, 192  # at most so many photographs, spread evenly, and the middle of each
NLM_STRENGTHS = (1, *SCORING_STRENGTHS)  # 1: as good as none, for sets without noise
BILATERAL = tuple(product((10, 20, 30, 45, 60, 80, 110, 150, 200, 300), (0.7, 1, 1.5, 2, 3, 5)))  # color, space
UNSHARP = tuple(product((0.1, 0.25, 0.5, 1, 2, 4), (0.7, 1, 2, 3, 5)))  # amount, sigma
ENLARGEMENTS = ("bicubic", "lanczos")
PICTURE_PX, CELL_PX = 128, 384  # pixels are drawn three times their size

LABELS = ROWS | {
    "bicubic": "bicubic enlargement of the same small image",
    "lanczos": "Lanczos enlargement of the same small image",
    "nlm_unsharp": "non-local means + unsharp mask",
}
HEADINGS = {"psnr": "PSNR dB [95 %]", "psnr_y": "PSNR-Y dB [95 %]", "ssim": "SSIM", "ssim_y": "SSIM-Y",
            "ms_ssim": "MS-SSIM", "lpips": "LPIPS", "laplacian": "Laplacian", "shift_px": "shift px", "scale": "scale"}


class DegradedSet(NamedTuple):
    name: str
    description: str
    degrade: partial


class Model(NamedTuple):
    """The base model (lora None) or one with a LoRA. variants: [(row, steps, start noise)]."""

    lora: str | None
    settings: dict
    variants: list


def parse_args(argv=None):
    parser = make_parser(__doc__)
    flux.add_model_args(parser)
    parser.set_defaults(guidance_scale=None, max_sequence_length=None, vae_encode_mode=None)  # the LoRA file's
    add = parser.add_argument
    add("--lora", action="append", default=[], help="LoRA file or folder, or NAME=PATH; repeatable, rows for each")
    add("--lora_weight", type=float, default=1.0, help="strength of the LoRAs")
    add("--prompt", help="default: the LoRA file's")
    add("--clean", required=True, help="folder of clean images, or one image")
    add("--sets", default=",".join(SETS), help="comma list of these and custom, which the degradation options make")
    add("--steps", default="1,2,4,8,28", help="comma list of sampling steps of the LoRAs")
    add("--start_noise", help="comma list within the LoRAs' trained range; default: its middle")
    add("--base_steps", default="4,28", help="comma list of sampling steps of the model without LoRA, from pure noise; "
        "0: leave it out")
    add("--output", required=True, help="folder for everything that is written")
    add("--tune_on", help="folder of photographs on which the classical methods are tuned, without those that are "
        "scored; default: the sample photographs of scikit-image and scikit-learn")
    add("--max_images", type=int, help="use this many images, spread evenly over the sorted files")
    add("--crop_px", type=int, default=0, help="use the middle of each image, a square of this side; 0: all of it")
    add("--grid_images", type=int, default=4, help="images drawn for each set")
    add("--seed", type=int, default=0, help="of the degradations and of the models' noise")
    add("--lpips_net", default="alex", choices=sorted(metrics.BACKBONES), help="backbone of LPIPS")
    add("--lpips_backbone", help="its torchvision weight file; default: its place in the torch cache; no LPIPS without")
    add_device_args(parser)
    add_tile_args(parser)
    add_degradation_args(parser)
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args):
    """Refuse what can be refused before a model loads, and turn comma lists into lists. ValueError naming the flag."""
    check_sampling_args(args)
    check_least(args, max_images=1, crop_px=0, grid_images=0)
    check_tile_args(args)
    args.sets = list(dict.fromkeys(parse_words(args.sets, "--sets", (*SETS, "custom"))))
    args.steps = parse_numbers(args.steps, "--steps", int)
    args.base_steps = [] if args.base_steps == "0" else parse_numbers(args.base_steps, "--base_steps", int)
    if args.start_noise and not args.lora:
        raise ValueError(f"--start_noise {args.start_noise} is a LoRA's; name one by --lora, or drop it")
    args.start_noise = parse_numbers(args.start_noise, "--start_noise", float) if args.start_noise else [None]
    if (given := custom_options(args)) and "custom" not in args.sets:
        raise ValueError(f"--{next(iter(given))} describes the set custom; add custom to --sets, or drop it")
    flux.check_model(args.pretrained_model_name_or_path)


def custom_options(args):
    """{name: value} of the degradation options that are given."""
    options = argparse.ArgumentParser()
    add_degradation_args(options)
    defaults = vars(options.parse_args([]))
    return {name: getattr(args, name) for name, default in defaults.items() if getattr(args, name) != default}


def parse_numbers(text, flag, number):
    """[number] of a comma list of numbers of 0 (int: 1) or more. ValueError naming the flag."""
    try:
        values = list(dict.fromkeys(number(part) for part in text.split(",")))
    except ValueError:
        values = [-1]
    if not all(value >= (number is int) for value in values):
        raise ValueError(f"{flag} {text}: give a comma list of numbers, such as {'1,4' if number is int else '0.5,1'}")
    return values


# ---- degraded sets ----


def make_sets(args):
    """The DegradedSets that --sets names."""
    sets = []
    for name in args.sets:
        if name == "custom":
            given = custom_options(args) or {"degradation_types": "downsample"}
            description = " ".join(f"--{option} {value}" for option, value in given.items())
            sets.append(DegradedSet(name, description, degrader_from_args(args)))
        else:
            description, options = SETS[name]
            sets.append(DegradedSet(name, description, make_degrader(**options)))
    return sets


def set_seed(name, seed):
    """A seed for each set, so that two sets share no noise."""
    return seed + (zlib.crc32(name.encode()) << 32)


def load_pair(record, index, degraded_set, seed, crop_px):
    """(target, control, degradation parameters) of one image; both (1, 3, H, W) in [-1, 1]."""
    return load_pairs(record, index, degraded_set.degrade, set_seed(degraded_set.name, seed), crop_px)[0]


def image_name(record, clean):
    """Path of an image below the folder --clean."""
    return Path(record.name).relative_to(clean if Path(clean).is_dir() else Path(clean).parent).as_posix()


def describe_set(degraded_set, records, indices, clean, seed, crop_px):
    """{sha256 over names, sizes and degraded pixels; smallest_px; enlargements: the kernels that may enlarge its small
    images instead of its own, where it has any; degradations: {image: parameters}} of a set."""
    digest, degradations, smallest = hashlib.sha256(), {}, sys.maxsize
    for index in indices:
        _, control, params = load_pair(records[index], index, degraded_set, seed, crop_px)
        name, pixels = image_name(records[index], clean), to_uint8(control[0])
        digest.update(f"{name} {pixels.shape}\n".encode() + pixels.tobytes())
        degradations[name], smallest = params, min(smallest, *pixels.shape[:2])
    enlargements = []
    if all([step["type"] for step in params] == ["downsample"] for params in degradations.values()):
        own = {params[0]["up_kernel"] for params in degradations.values()}
        enlargements = [kernel for kernel in ENLARGEMENTS if kernel not in own]
    return {"sha256": digest.hexdigest(), "smallest_px": smallest, "enlargements": enlargements,
            "degradations": degradations}


# ---- classical methods ----


def denoise_and_sharpen(image, strength, amount, sigma):
    return unsharp(denoise_nlm(image, strength), amount, sigma)


CLASSICAL = {"nlm": denoise_nlm, "bilateral": denoise_bilateral, "nlm_unsharp": denoise_and_sharpen}


def middle(height, width, side_px):
    """Slices of the rows and columns of the square in the middle, smaller where the image is."""
    [(top, left, bottom, right)] = crop_boxes(height, width, min(side_px, height, width), 1)
    return slice(top, bottom), slice(left, right)


def tuning_photos(tune_on, scored):
    """The middles of the photographs to tune on, (H, W, 3) uint8. scored: paths of the images that are scored, whose
    pixels are left out; ValueError where nothing else is there."""
    if tune_on:
        paths = list_images(tune_on)
        paths = [paths[i] for i in np.linspace(0, len(paths) - 1, min(TUNE_IMAGES, len(paths))).round().astype(int)]
        photos = [load_rgb(path) for path in paths]
    else:
        photos = [load_sample(name) for name in TRAIN_SAMPLES + HELDOUT_SAMPLES]
    known = {hashlib.sha256(load_rgb(path)).digest() for path in scored}
    photos = [photo for photo in photos if hashlib.sha256(photo).digest() not in known]
    if not photos:
        raise ValueError(f"--tune_on {tune_on}: all its photographs are scored too; name a folder of others")
    return [photo[middle(*photo.shape[:2], TUNE_PX)] for photo in photos]


def tune(degraded_set, photos, seed):
    """{row: parameters} of CLASSICAL, the best by mean PSNR over `photos`, which are degraded as the set is."""
    seed = set_seed(f"{degraded_set.name} tuning", seed)  # the noise of no scored image
    degraded = [degraded_set.degrade(photo, item_rng(seed, 0, i, DEGRADATION_STREAM))[0]
                for i, photo in enumerate(photos)]

    def mean_psnr(method, images):
        return statistics.fmean(min(cv2.PSNR(photo, method(image)), metrics.MAX_PSNR_DB)
                                for photo, image in zip(photos, images, strict=True))

    trials = {row: [] for row in CLASSICAL}
    for strength in NLM_STRENGTHS:
        denoised = [denoise_nlm(image, strength) for image in degraded]
        trials["nlm"].append(({"strength": strength}, mean_psnr(np.asarray, denoised)))
        for amount, sigma in UNSHARP:
            trials["nlm_unsharp"].append(({"strength": strength, "amount": amount, "sigma": sigma},
                                          mean_psnr(partial(unsharp, amount=amount, sigma=sigma), denoised)))
    for color, space in BILATERAL:
        trials["bilateral"].append(({"color": color, "space": space},
                                    mean_psnr(partial(denoise_bilateral, color=color, space=space), degraded)))
    return {row: max(tried, key=lambda trial: trial[1])[0] for row, tried in trials.items()}


def classical_rows(target, control, params, tuned, enlargements):
    """{row: function without arguments that gives an image (1, 3, H, W) in [-1, 1]}."""
    clean, degraded = to_uint8(target[0]), to_uint8(control[0])
    rows = {"input": lambda: degraded}
    rows |= {kernel: partial(apply_degradations, clean, [params[0] | {"up_kernel": kernel}]) for kernel in enlargements}
    rows |= {row: partial(method, degraded, **tuned[row]) for row, method in CLASSICAL.items()}
    return {row: lambda make=make: to_tensor(make())[None] for row, make in rows.items()}


# ---- models ----


def changed(args, **values):
    return argparse.Namespace(**vars(args) | values)


def make_models(args):
    """([Model], lines about combinations left out because a LoRA was not trained for them). ValueError where nothing is
    left of a LoRA."""
    loras = {}
    for i, text in enumerate(args.lora):
        name, equals, path = text.partition("=")
        if not equals:
            name, path = "LoRA" if len(args.lora) == 1 else f"LoRA {i + 1}", text
        if name in loras:
            raise ValueError(f"--lora: two are called {name}; give each a name, NAME=PATH")
        loras[name] = path
    models, left_out = [], []
    for name, path in loras.items():
        settings, _, default = resolve_settings(
            changed(args, lora=path, start_noise=None, fidelity=None, num_inference_steps=None))
        variants = []
        for start_noise, steps in product(args.start_noise, args.steps):
            start_noise = default if start_noise is None else start_noise
            row = f"{name}, start noise {start_noise:g}, {steps} step{'s' * (steps > 1)}"
            try:
                if choose_start_noise(settings, start_noise) < 1:
                    fm.sampling_positions(steps, settings["train_sigmas"])
            except ValueError as error:
                left_out.append(f"{row}: {error}")
                continue
            variants.append((row, steps, start_noise))
        if not variants:
            raise ValueError(f"no row is left of {left_out[-1]}")
        models.append(Model(path, settings, variants))
    base = resolve_settings(changed(args, lora=None, start_noise=None, fidelity=None, num_inference_steps=None))[0]
    if models:  # and tiles, or the base model would be judged by another task
        shared = ("prompt", "guidance_scale", "max_sequence_length", "resolution")
        base |= {name: models[0].settings[name] for name in shared}
    rows = [(f"base model without LoRA, {steps} step{'s' * (steps > 1)}", steps, 1.0) for steps in args.base_steps]
    return [Model(None, base, rows), *models], left_out


def load_all(args, models, device, dtype):
    """(pipe, [TextEmbeds of each model]). The text encoders go before the rest comes."""
    path = args.pretrained_model_name_or_path
    where = flux.source(args)
    with out_of_memory_explained(path):
        encoded = {length: flux.encode_prompts(path, [model.settings["prompt"] for model in models
                                                      if model.settings["max_sequence_length"] == length],
                                               device, dtype, length, **where)
                   for length in {model.settings["max_sequence_length"] for model in models}}
        pipe = flux.load_models(path, device, dtype, **where)
        for model in models[1:]:
            lora.check(model.lora, pipe.transformer)  # now, not after an hour
    texts = [flux.stack_text(encoded[model.settings["max_sequence_length"]], [model.settings["prompt"]], device, dtype)
             for model in models]
    return pipe, texts


@contextlib.contextmanager
def attached(pipe, path, weight):
    """Inside, the LoRA at `path` is loaded; None: the base model as it is."""
    if path is None:
        yield
        return
    lora.load(pipe, path, weight)
    try:
        yield
    finally:
        pipe.unload_lora_weights()


def model_rows(args, pipe, model, text, target, control, seed):
    """{row: function without arguments that gives an image (1, 3, H, W) in [-1, 1]}."""
    tiling = choose_tiling(args, model.settings, pipe.vae)

    def round_trip(image):
        return by_tiles(lambda tiling: round_trip_tiled(pipe.vae, image, tiling), pipe.vae, image, tiling)[0]

    def restore(steps, start_noise):
        return restore_image(pipe, control, text, model.settings, steps, seed, start_noise, tiling)[0]

    rows = {row: partial(restore, steps, start_noise) for row, steps, start_noise in model.variants}
    if model.lora is None:
        rows |= {"input_vae": partial(round_trip, control), "ceiling": partial(round_trip, target)}
    return rows


# ---- scoring ----


def score_set(args, degraded_set, records, indices, tuned, enlargements, pipe, models, texts, names, lpips, device):
    """(scores, pictures): a dict of image, row, seconds and metrics for every image and row; and for the first
    --grid_images {image: {row: (its middle, metrics)}}."""
    scores = []
    pictures = {image_name(records[index], args.clean): {} for index in indices[: args.grid_images]}

    def score(make_rows, path=None):
        with attached(pipe, path, args.lora_weight):
            for index in tqdm(indices, desc=degraded_set.name, unit="image", leave=False, disable=None):
                name = image_name(records[index], args.clean)
                target, control, params = load_pair(records[index], index, degraded_set, args.seed, args.crop_px)
                for row, make in make_rows(index, target, control, params).items():
                    with out_of_memory_explained(f"{target.shape[-1]}x{target.shape[-2]} px"):
                        start = time.perf_counter()
                        image = make()
                        seconds = time.perf_counter() - start
                        measured = measure(image.to(device), target.to(device), names, lpips)
                    scores.append({"set": degraded_set.name, "image": name, "row": row, "seconds": seconds, **measured})
                    if name in pictures:
                        crop = 0, slice(None), *middle(*target.shape[-2:], PICTURE_PX)
                        pictures[name] |= {row: (image[crop].clone(), measured), "target": (target[crop], {})}

    score(lambda index, target, control, params: classical_rows(target, control, params, tuned, enlargements))
    for model, text in zip(models, texts, strict=True):
        score(lambda index, target, control, _, model=model, text=text: model_rows(
            args, pipe, model, text, target, control, item_seed(args.seed, 0, index)), model.lora)
    return scores, pictures


def best_row(table, rows):
    """The row with the best mean PSNR among `rows`, or None."""
    return max((row for row in rows if row in table), key=lambda row: table[row]["psnr"][0], default=None)


def label_rows(models, tuned, enlargements):
    """{row: label} in the order of the table."""
    own = [kernel for kernel in ENLARGEMENTS if enlargements and kernel not in enlargements]
    labels = {"input": f"input ({own[0]} enlargement)" if own else LABELS["input"]}
    labels |= {kernel: LABELS[kernel] for kernel in enlargements}
    for row in CLASSICAL:
        parameters = ", ".join(f"{name} {value:g}" for name, value in tuned[row].items())
        labels[row] = f"{LABELS[row]} ({parameters})"
    labels |= {row: row for model in models for row, _, _ in model.variants}
    return labels | {row: LABELS[row] for row in ("input_vae", "ceiling")}


def report_set(seed, scores, models, tuned, described):
    """What results.json says about one set."""
    labels = label_rows(models, tuned, described["enlargements"])
    table = summarise(scores, seed, order=tuple(labels))[0]
    best = {
        "classical": best_row(table, (*ENLARGEMENTS, *CLASSICAL)),
        "base": best_row(table, [row for row, _, _ in models[0].variants]),
        "lora": best_row(table, [row for model in models[1:] for row, _, _ in model.variants]),
    }
    gains = summarise(scores, seed, order=tuple(labels), best=best["lora"])[1]
    rows = readable(table, labels)
    for row in rows:
        rows[row]["seconds"] = statistics.median(score["seconds"] for score in scores if score["row"] == row)
    return described | {"tuned": tuned, "best": best, "rows": rows, "best_lora_minus": readable(gains, labels)}


def set_table(rows):
    """Markdown of a set's rows: means, PSNR with its interval, median seconds."""
    names = [name for name in HEADINGS if name in rows["input"]]
    lines = [["", *(HEADINGS[name] for name in names), "s/image"]]
    for values in rows.values():
        cells = []
        for name in names:
            mean, lo, hi = (f"{values[name][key]:.{DIGITS.get(name, 4)}f}" for key in ("mean", "lo", "hi"))
            cells.append(f"{mean} [{lo}, {hi}]" if "[" in HEADINGS[name] else mean)
        lines.append([values["label"], *cells, f"{values['seconds']:.3f}"])
    return metrics.markdown_table(lines)


def to_markdown(report):
    """results.md: one section a set."""
    machine, versions = report["machine"], ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    lines = [
        "# Restoration benchmark",
        f"{report['date']}, {report['model']}, {report['dtype']}, {machine['gpu'] or machine['cpu']}, "
        f"{machine['torch_threads']} threads, {versions}",
        f"{report['images']} images, {report['crop']}, seed {report['seed']}. Mean [95 % interval by bootstrap over "
        f"images]; seconds: median. Classical methods tuned on {report['tuned_on']} other photographs.",
        "\n".join(f"- {HEADINGS[name].partition(' [')[0]}: {text}" for name, text in report["definitions"].items()),
        *(f"Left out: {line}" for line in report["left_out"]),
    ]
    for name, described in report["sets"].items():
        lines += [f"## {name}", f"{described['description']}. sha256 {described['sha256']}",
                  set_table(described["rows"])]
        if described["best_lora_minus"]:
            gains = [f"{gain['label']}: {gain['psnr']['mean']:+.2f} [{gain['psnr']['lo']:+.2f}, "
                     f"{gain['psnr']['hi']:+.2f}]" for gain in described["best_lora_minus"].values()]
            lines.append(f"PSNR in dB of \"{described['best']['lora']}\", the best of the LoRA rows here, minus\n\n"
                         + "\n".join(f"- {gain}" for gain in gains))
    return "\n\n".join(lines) + "\n"


def drawn_columns(best):
    """Rows to draw: input, best classical, base, best LoRA and target."""
    return [row for row in ("input", best["classical"], best["base"], best["lora"], "target") if row]


def draw_set(pictures, best):
    """Picture of the drawn_columns."""
    columns = drawn_columns(best)
    cells = [[picture[row] for row in columns] for picture in pictures.values()]
    return image_grid([[image for image, _ in line] for line in cells], [LABELS.get(row, row) for row in columns],
                      [[caption(values) for _, values in line] for line in cells], CELL_PX)


def chart_set(described, models):
    """Figure of PSNR over sampling steps and over seconds an image: a line for each model and start noise, dashed lines
    for input and best classical method. None where nothing was sampled."""
    lines = {}
    for row, steps, _ in [variant for model in models for variant in model.variants]:
        psnr, seconds = described["rows"][row]["psnr"], described["rows"][row]["seconds"]
        lines.setdefault(row.rpartition(", ")[0], []).append((steps, seconds, psnr["mean"], psnr["lo"], psnr["hi"]))
    levels = {described["rows"][row]["label"]: described["rows"][row]["psnr"]["mean"]
              for row in ("input", described["best"]["classical"]) if row}
    return draw_sampling(lines, levels, "PSNR, dB [95 %]") if lines else None


def report_section(name, described, scores, pictures, figure):
    """The page's part on one set."""
    best = described["best"]
    columns = sorted(drawn_columns(best), key=lambda row: row not in ("input", best["lora"] or best["base"]))
    return section(name, described["rows"], described["best_lora_minus"], best["lora"], scores,
                   compared(pictures, columns, LABELS), described["degradations"],
                   f"{described['description']}. sha256 {described['sha256']}", [chart(figure)] if figure else [])


def report_page(path, report, sections):
    """Write report.html of what is finished."""
    machine = report["machine"]
    write_report(path, "Restoration benchmark", f"{report['date']}, {report['model']}, {report['images']} images, "
                 f"{report['crop']}, seed {report['seed']}, {machine['gpu'] or machine['cpu']}; mean [95 % interval by "
                 "bootstrap over images], seconds: median", sections,
                 {"What the numbers mean": report["definitions"] | {"lpips_net": report["lpips_net"]},
                  "Left out": dict(enumerate(report["left_out"], start=1)), "How the rows were made": report["rows"],
                  "Options": report["arguments"], "Machine": machine, "Versions": report["versions"]})


def describe_machine(device):
    """{cpu, cores, torch_threads, opencv_threads, gpu}"""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines()
              if line.startswith("model name")] if cpuinfo.is_file() else []
    return {"cpu": models[0] if models else platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(), "opencv_threads": cv2.getNumThreads(),
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None}


def choose_metrics(args, smallest_px):
    """Names for score.measure. Says what is left out, and why. ValueError where images are too small for the rest."""
    names = [*metrics.available_metrics(args.lpips_backbone, args.lpips_net), "laplacian"]
    least_px = metrics.LPIPS_MIN_SIDE_PX if "lpips" in names else metrics.SSIM_WINDOW_PX
    if smallest_px < least_px:
        raise ValueError(f"the smallest image has {smallest_px} px a side and the metrics need {least_px}; give "
                         "another --crop_px, or larger images to --clean")
    if "lpips" not in names:
        print(f"LPIPS left out: no {metrics.find_backbone(args.lpips_backbone, args.lpips_net)}")
    if smallest_px < metrics.MS_SSIM_MIN_SIDE_PX:
        print(f"MS-SSIM left out: it needs {metrics.MS_SSIM_MIN_SIDE_PX} px a side, the smallest has {smallest_px}")
        return names
    return [*names, "ms_ssim"]


def main(args):
    device, dtype = choose_device(args)
    folder = writable_folder(args.output, "--output")
    models, left_out = make_models(args)
    for line in left_out:
        print(f"left out: {line}")
    sets, records = make_sets(args), folder_records(args.clean)
    indices = np.linspace(0, len(records) - 1, min(args.max_images or len(records), len(records))).round().astype(int)
    indices = indices.tolist()
    photos = tuning_photos(args.tune_on, [records[index].target for index in indices])
    described = {}
    for one in sets:
        described[one.name] = {"description": one.description, "settings": one.degrade.keywords["settings"]}
        described[one.name] |= describe_set(one, records, indices, args.clean, args.seed, args.crop_px)
        print(f"{one.name}: {len(indices)} images, sha256 {described[one.name]['sha256']}")
    names = choose_metrics(args, min(each["smallest_px"] for each in described.values()))
    lpips = metrics.lpips_model(args.lpips_backbone, args.lpips_net).to(device) if "lpips" in names else None
    pipe, texts = load_all(args, models, device, dtype)

    report = {
        "date": str(date.today()), "model": flux.model_id(args.pretrained_model_name_or_path), "dtype": str(dtype),
        "images": len(indices), "crop": f"{args.crop_px} px from the middle" if args.crop_px else "whole",
        "seed": args.seed, "tuned_on": len(photos), "lpips_net": args.lpips_net if lpips else None,
        "definitions": {key: text for key, text in DEFINITIONS.items() if key.removesuffix("_y") in names
                        or key in ("shift_px", "scale")},
        "left_out": left_out, "machine": describe_machine(device), "versions": package_versions(),
        "rows": {row: describe_run(changed(args, lora=model.lora, color_fix="off"), model.settings, steps,
                                   start_noise, dtype)
                 for model in models for row, steps, start_noise in model.variants},
        "arguments": public_args(args), "sets": {},
    }
    scores, sections = [], []
    for one in sets:
        tuned = tune(one, photos, args.seed)
        set_scores, pictures = score_set(args, one, records, indices, tuned, described[one.name]["enlargements"], pipe,
                                         models, texts, names, lpips, device)
        scores += set_scores
        report["sets"][one.name] = report_set(args.seed, set_scores, models, tuned, described[one.name])
        write_csv(folder / "scores.csv", scores)
        write_json(folder / "results.json", report)
        (folder / "results.md").write_text(to_markdown(report), encoding="utf-8")
        found = report["sets"][one.name]
        if pictures:
            draw_set(pictures, found["best"]).save(folder / f"{one.name}.png")
        sections.append(report_section(one.name, found, set_scores, pictures, chart_set(found, models)))
        report_page(folder / "report.html", report, sections)
        print(f"\n{one.name}\n{set_table(report['sets'][one.name]['rows'])}")
    print(f"\nresults.md, results.json, scores.csv, report.html, pictures: {folder}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

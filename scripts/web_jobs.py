"""What the web demo does on its server, without the page: models that are loaded once, uploads that are checked, and
jobs that restore them, one at a time and each into a folder of its own."""

import argparse
import contextlib
import functools
import itertools
import math
import secrets
import shlex
import threading
import time
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from my_dataset.dataset_deg_paired import DEGRADATION_STREAM, item_rng, to_tensor
from my_dataset.degradations import make_degrader
from my_dataset.images import MAX_PIXELS, MIN_SIDE_PX, image_size, list_images, load_image, load_rgb, save_image
from my_dataset.outputs import plan_outputs, sidecar_path
from scripts.download_dataset import copy_sample
from utils import flux, lora, metrics
from utils.checkpoint import sha256
from utils.failures import report_failures
from utils.parse import make_parser, write_json
from utils.session import (
    add_restoration_args,
    check_restoration_args,
    choose_device,
    describe_run,
    encode_text,
    load_models,
    out_of_memory_explained,
    resolve_settings,
    restore_image,
)
from utils.tiles import choose_tiling, tile_side, tile_starts
from utils.utils import to_uint8

MAX_STEPS = 50
FAST_STEPS = 8  # from pure noise, where one step gives a blur
MAX_SEED = 2**53 - 1  # the largest integer that is exact in a browser
TEXTS_KEPT = 16
CONTROLS = ("lora", "num_inference_steps", "start_noise", "lora_weight", "token_shifts", "tile", "color_fix", "seed")
PRESETS = ("Recommended", "Closest to the photograph", "Most detail invented", "Fastest")
# Photographs of scikit-image and scikit-learn, the damage they get, and the shipped LoRA that was trained on it.
EXAMPLES = (
    ("coffee.png", "heavy", "tiny-kontext-deg-lora"),
    ("astronaut.png", "old_photo", "tiny-kontext-old-photo-lora"),
    ("flower.jpg", "heavy", "tiny-kontext-deg-lora"),
    ("chelsea.png", "old_photo", "tiny-kontext-old-photo-lora"),
)
EXAMPLE_SIDE_PX = 400
SHOWN_PX = 1600  # a larger picture is shrunk to be shown
THUMBNAIL_PX = 512  # one of many pictures


class Stopped(Exception):
    """The user stopped the job."""


class Lora(NamedTuple):
    """A LoRA that is loaded. file: None for the base model alone. adapter: its name in the pipeline. text: that of
    `text_by_weight`. settings, steps, start_noise: those of utils.session.resolve_settings."""

    file: str | None
    adapter: str
    text: Callable
    settings: dict
    steps: int
    start_noise: float


class Served(NamedTuple):
    """A model that is loaded. loras: {name on the page: Lora}. folder: for this server's jobs, whose results alone it
    gives out. lock: held by the job that uses the model. waiting, running: {(session, kind of job): event that stops
    it}."""

    args: argparse.Namespace
    pipe: object
    dtype: torch.dtype
    loras: dict[str, Lora]
    folder: Path
    lock: threading.Lock
    waiting: dict
    running: dict


class Example(NamedTuple):
    """clean, degraded: paths. damage: one of the degradation presets. lora: name of the LoRA that fits."""

    clean: Path
    degraded: Path
    damage: str
    lora: str


class Restored(NamedTuple):
    """before, after: pictures to show. size: that of the file `path`, in words. seconds: of the model's work."""

    before: Image.Image
    after: Image.Image
    size: str
    path: Path
    seconds: float


def to_show(rgb, side=SHOWN_PX):
    """A picture of (H, W, 3) uint8, shrunk to `side` px."""
    image = Image.fromarray(rgb)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def size_of(rgb):
    return f"{rgb.shape[1]} × {rgb.shape[0]} px"


def text_by_weight(job, settings, text, device, dtype):
    """A function that gives the TextEmbeds of the prompt for a weight of the job's LoRA. Only a file with a part for
    CLIP has it encoded again. text: that of the job's own weight."""
    if not job.lora or not lora.has_text_part(job.lora):
        return lambda weight: text

    @functools.lru_cache(TEXTS_KEPT)
    def encode(weight):
        weighted = argparse.Namespace(**vars(job) | {"lora_weight": weight})
        return text if weight == job.lora_weight else encode_text(weighted, settings, device, dtype, job.lora)

    return encode


def serve(args):
    """Load the model and all LoRAs that --lora names. ValueError where one does not fit."""
    device, dtype = choose_device(args)
    files = args.lora or [None]
    labels = [Path(file).name for file in args.lora] or ["base model alone"]
    labels = labels if len(set(labels)) == len(labels) else files
    jobs = [argparse.Namespace(**vars(args) | {"lora": file}) for file in files]
    resolved = [resolve_settings(job) for job in jobs]

    def add_others(pipe, text):
        for i, file in enumerate(files[1:], 1):
            lora.check(file, pipe.transformer)
            lora.add(pipe, f"restoration_{i}", *lora.read(file))

    pipe, text = load_models(jobs[0], resolved[0][0], device, dtype, add_others)
    loras = {}
    for i, (label, job) in enumerate(zip(labels, jobs, strict=True)):
        settings = resolved[i][0]
        text = encode_text(job, settings, device, dtype, job.lora) if i else text
        loras[label] = Lora(job.lora, f"restoration_{i}" if i else "restoration",
                            text_by_weight(job, settings, text, device, dtype), *resolved[i])
    return Served(args, pipe, dtype, loras, new_folder(Path(args.output, "jobs")), threading.Lock(), {}, {})


def stop_all(served):
    """Stop every job at its next call of the model, and let none use it again."""
    for event in list(served.running.values()):
        event.set()
    served.lock.acquire()


def job_args(served, controls):
    """The arguments that test_deg_lora_flux_kontext.py has for `controls`, {name of CONTROLS: value}; checked."""
    job = argparse.Namespace(**vars(served.args) | controls | {"lora": served.loras[controls["lora"]].file})
    check_restoration_args(job)
    return job


def preset_values(args, lora, preset):
    """{control: value} of one of PRESETS for a Lora. args: what the command line says."""
    lo, hi = lora.settings["start_noise"]
    # From the photograph alone there is one answer, and the mean over two token grids has no blocks. From noise there
    # are many, and the mean of two is a blur.
    shifts = args.token_shifts or (2 if hi == 0 else 1)
    values = {"num_inference_steps": lora.steps, "start_noise": lora.start_noise, "lora_weight": args.lora_weight,
              "token_shifts": shifts, "tile": args.tile, "color_fix": args.color_fix}
    if preset == "Closest to the photograph":
        values |= {"start_noise": lo, "color_fix": "wavelet"}
    elif preset == "Most detail invented":
        values |= {"start_noise": hi}
    elif preset == "Fastest":
        values |= {"num_inference_steps": FAST_STEPS if hi == 1 else 1, "token_shifts": 1}
    return values


def fidelity_of(settings, start_noise):
    """The inverse of utils.restore.fidelity_start_noise, for a LoRA with a range of start noise."""
    lo, hi = settings["start_noise"]
    return (hi - start_noise) / (hi - lo)


def command_line(served, controls, name, ext="auto"):
    """The command that restores the file `name` as the page did: the controls, and what else differs from that
    command's defaults. ext: as for my_dataset.outputs.plan_outputs. Absolute paths are cut to their last part."""
    job = job_args(served, controls)
    parser = make_parser(None)
    add_restoration_args(parser)
    defaults = vars(parser.parse_args(["--pretrained_model_name_or_path", ""]))
    options = {flag: vars(job)[flag] for flag, default in defaults.items()
               if flag != "config" and (flag in CONTROLS or vars(job)[flag] != default)}
    options |= {"ext": ext} if ext != "auto" else {}
    options |= {"max_pixels": job.max_pixels} if job.max_pixels > MAX_PIXELS else {}
    words = ["python", "test_deg_lora_flux_kontext.py"]
    for flag, value in (options | {"input": name, "output": "restored"}).items():
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            is_path = flag in ("pretrained_model_name_or_path", "lora", "cache_dir") and Path(value).is_absolute()
            words += [f"--{flag}", f"{value:.12g}" if isinstance(value, float) else Path(value).name if is_path
                      else str(value)]
    return shlex.join(words)


def read_photograph(path, max_pixels):
    """LoadedImage of an upload. ValueError, in words for the one who sent it, where it is no image, larger than
    max_pixels by its header, or smaller than MIN_SIDE_PX."""
    name = Path(path).name
    height, width = image_size(path, math.inf, name)
    if height * width > max_pixels:
        raise ValueError(f"{name}: {width}x{height} px is more than the {max_pixels / 1e6:g} megapixels that are taken "
                         "here; send a smaller picture")
    if min(height, width) < MIN_SIDE_PX:
        raise ValueError(f"{name}: {width}x{height} px is too small; send at least {MIN_SIDE_PX} px a side")
    return load_image(path, max_pixels, name)


def new_folder(parent):
    """Path of a folder for one job, or for those of one server, not made yet. Its name begins with the time; the rest
    cannot be guessed."""
    return Path(parent, f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(8)}")


def model_calls(tiling, height, width, multiple, steps):
    """How often utils.tiles.restore_tiled calls the transformer for an image of height x width px."""
    calls = 0
    for before in range(0, multiple, multiple // tiling.shifts):
        grid = tiling if before == 0 or max(height, width) > tiling.size_px else tiling._replace(size_px=0)
        tiles = 1
        for length in (height, width):
            length = -(-(before + length) // multiple) * multiple
            tiles *= len(tile_starts(length, *tile_side(length, grid, multiple), multiple))
        calls += math.ceil(tiles / grid.batch) * steps
    return calls


@contextlib.contextmanager
def watched(transformer, total, tell):
    """Inside, tell(calls done, total) follows every call of the transformer; what it raises ends the work."""
    count = itertools.count(1)
    handle = transformer.register_forward_hook(lambda *_: tell(min(next(count), total), total))
    try:
        yield
    finally:
        handle.remove()


def restore(served, controls, rgb, tell):
    """(restored (1, 3, H, W) in [-1, 1], what the job depended on) of an image (H, W, 3) uint8, by `controls`, values
    of CONTROLS. tell(done, total) is called after every call of the model. ValueError for senseless controls."""
    job = job_args(served, controls)
    settings, steps, start_noise = resolve_settings(job)
    lora = served.loras[controls["lora"]]
    height, width = rgb.shape[:2]
    with served.lock, out_of_memory_explained(f"{width}x{height} px", "a smaller tile"):
        if job.lora:
            served.pipe.set_adapters(lora.adapter, job.lora_weight)
        tiling = choose_tiling(job, settings, served.pipe.vae)
        total = model_calls(tiling, height, width, flux.size_multiple(served.pipe.vae), steps)
        with watched(served.pipe.transformer, total, tell):
            restored, used = restore_image(served.pipe, to_tensor(rgb)[None], lora.text(job.lora_weight), settings,
                                           steps, job.seed, start_noise, tiling, job.color_fix)
    return restored, describe_run(job, settings, steps, start_noise, served.dtype) | {"seed": job.seed,
                                                                                      "tiles_used": used}


def restore_file(served, controls, path, output, tell):
    """Restore the upload `path` into the file `output` with its sidecar. Returns Restored."""
    image, started = read_photograph(path, served.args.max_pixels), time.monotonic()
    restored, run = restore(served, controls, image.rgb, tell)
    seconds, after = time.monotonic() - started, to_uint8(restored[0])
    output.parent.mkdir(parents=True, exist_ok=True)
    save_image(output, after, image.alpha, image.icc_profile, image.exif)
    write_json(sidecar_path(output), {"input": Path(path).name, "input_sha256": sha256(path)} | run)
    return Restored(to_show(image.rgb), to_show(after), size_of(after), output, seconds)


def plan_job(paths, folder, ext):
    """Output files of uploads, each NAME_restored.EXT in `folder`; those that would have one name in numbered folders.
    ext: as for my_dataset.outputs.plan_outputs."""
    outputs = [plan_outputs(path, folder, "_restored", ext)[0][2] for path in paths]
    names = [output.name.casefold() for output in outputs]
    return [output if names.count(name) == 1 else folder / str(i) / output.name
            for i, (output, name) in enumerate(zip(outputs, names, strict=True), 1)]


def restore_files(served, controls, paths, ext, tell):
    """Restore uploads; one that cannot be does not stop the others. tell(i, done, total) for image i.

    Returns ([(path, Restored with a thumbnail alone, or ValueError)], zip file of all that was written or None). After
    Stopped, those that were done before."""
    folder, rows = new_folder(served.folder), []
    folder.mkdir(parents=True)
    for i, (path, output) in enumerate(zip(paths, plan_job(paths, folder, ext), strict=True)):
        try:
            restored = restore_file(served, controls, path, output, functools.partial(tell, i))
            rows.append((path, restored._replace(before=None, after=to_show(np.asarray(restored.after), THUMBNAIL_PX))))
        except ValueError as error:
            rows.append((path, error))
        except Stopped:
            break
    report_failures([(Path(path).name, row) for path, row in rows if isinstance(row, ValueError)], folder)
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    if not any(isinstance(row, Restored) for _, row in rows):
        return rows, None
    archive = folder / "restored.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in written:
            file.write(path, path.relative_to(folder))
    return rows, archive


def score_file(served, controls, path, preset, damage_seed, tell):
    """Degrade the clean upload `path` by a degradation preset, restore it, and compare both with it.

    Returns (Restored, clean picture to show, {"degraded" or "restored": {metric: value}}, degradation parameters)."""
    clean = read_photograph(path, served.args.max_pixels).rgb
    degraded, params = make_degrader(preset=preset)(clean, item_rng(damage_seed, 0, 0, DEGRADATION_STREAM))
    folder, stem = new_folder(served.folder), Path(path).stem
    started = time.monotonic()
    restored, run = restore(served, controls, degraded, tell)
    seconds, target = time.monotonic() - started, to_tensor(clean)[None]
    scores = {name: {metric: value[0] for metric, value in metrics.measure(image, target).items()}
              for name, image in (("degraded", to_tensor(degraded)[None]), ("restored", restored))}
    after, output = to_uint8(restored[0]), folder / f"{stem}_restored.png"
    folder.mkdir(parents=True)
    save_image(folder / f"{stem}_degraded.png", degraded)
    save_image(output, after)
    write_json(sidecar_path(output), {
        "input": Path(path).name, "input_sha256": sha256(path), "degradation_preset": preset,
        "degradation_seed": damage_seed, "degradation": params, "scores": scores,
        "definitions": {metric: metrics.DEFINITIONS[metric] for metric in scores["restored"]}} | run)
    return Restored(to_show(degraded), to_show(after), size_of(after), output, seconds), to_show(clean), scores, params


def make_examples(folder):
    """Put the EXAMPLES into `folder`, clean and degraded: [Example]."""
    copy_sample(Path(folder, "sample"))
    photographs = {path.name: path for path in list_images(Path(folder, "sample"))}
    examples = []
    for i, (name, preset, trained) in enumerate(EXAMPLES):
        image = Image.fromarray(load_rgb(photographs[name]))
        image.thumbnail((EXAMPLE_SIDE_PX, EXAMPLE_SIDE_PX), Image.Resampling.LANCZOS)
        clean = np.asarray(image)
        degraded, _ = make_degrader(preset=preset)(clean, item_rng(0, 0, i, DEGRADATION_STREAM))
        paths = Path(folder, name), Path(folder, f"{Path(name).stem}_{preset}.png")
        for path, pixels in zip(paths, (clean, degraded), strict=True):
            save_image(path, pixels)
        examples.append(Example(*paths, preset, trained))
    return examples

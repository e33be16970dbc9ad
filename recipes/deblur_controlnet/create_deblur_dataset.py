"""Make pairs of sharp and blurred images for the deblurring ControlNet:

    python -m recipes.deblur_controlnet.create_deblur_dataset --source_dir photos \\
        --output_dir training/deblur_dataset --num_samples 10000 --image_size 512 --validation_fraction 0.05

Writes clear_images/clear_000000.png ..., blur_images/blur_000000.png ... and blur_types.json, one JSON object a line;
the validation pairs stand in blur_types_val.json, and none of their source images gives a training pair. Sample i
depends on --seed, i and the files of --source_dir alone, not on --num_workers. After an interruption the same command
makes what is missing, and with a larger --num_samples it adds samples."""

import hashlib
import json
import math
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from my_dataset.dataset_deg_paired import (
    DEGRADATION_STREAM,
    GEOMETRY_STREAM,
    HELDOUT_STREAM,
    check_headers,
    cover_crop,
    folder_records,
    item_rng,
    load_readable,
    use_one_thread,
)
from my_dataset.images import MIN_SIDE_PX, UnreadableImage, image_size, load_rgb
from recipes.deblur_controlnet.deblur_dataset import (
    BLUR_FOLDER,
    BLUR_TYPES,
    CLEAR_FOLDER,
    JSON_FILE,
    add_blur_args,
    check_side,
    fingerprint,
    parse_type_weights,
    random_blur,
    read_json,
)
from utils.failures import check_report, report_failures
from utils.parse import check_least, make_parser, run_main, writable_folder, write_json

VALIDATION_FILE, SETTINGS_FILE = "blur_types_val.json", "dataset.json"


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_blur_args(parser)
    add = parser.add_argument
    add("--output_dir", required=True, help="folder for the pairs")
    add("--num_samples", type=int, default=1000, help="pairs, validation included")
    add("--validation_fraction", type=float, default=0.0, help="share of the pairs, and of the source images, kept for "
        f"{VALIDATION_FILE}")
    add("--seed", type=int, default=0, help="of sources, crops and blurs")
    add("--num_workers", type=int, default=0, help="processes; 0 works in this one")
    args = parser.parse_args(argv)
    check_least(args, image_size=MIN_SIDE_PX, num_samples=1, validation_fraction=0, seed=0, num_workers=0, max_pixels=1)
    if not args.source_dir:
        raise ValueError("--source_dir is needed: a folder of sharp images")
    if args.validation_fraction >= 1:
        raise ValueError(f"--validation_fraction {args.validation_fraction}: give less than 1")
    if args.validation_fraction and not validation_count(args.num_samples, args.validation_fraction):
        raise ValueError(f"--validation_fraction {args.validation_fraction} of --num_samples {args.num_samples} is not "
                         "one pair; raise either, or give 0")
    return args


def validation_count(count, fraction):
    """How many of the first `count` samples are for validation."""
    return math.floor(count * fraction + 1e-9)


def is_validation(index, fraction):
    return validation_count(index + 1, fraction) > validation_count(index, fraction)


def find_sources(args):
    """(Records of the usable images of --source_dir, [UnreadableImage] of the others). An image too small, or the copy
    of another, which could stand on both sides of the split, is not usable."""
    def check(record):
        check_side(record.name, image_size(record.target, args.max_pixels), args.image_size, args.upscale_small)

    records, _, unusable = check_headers(folder_records(args.source_dir), check)
    failures, sources, first = [UnreadableImage(*reason) for reason in unusable], [], {}
    sizes = Counter(record.target.stat().st_size for record in records)
    for record in records:
        key = size = record.target.stat().st_size
        if sizes[size] > 1:
            key = hashlib.blake2b(record.target.read_bytes()).digest()
        if first.setdefault(key, record) is record:
            sources.append(record)
        else:
            failures.append(UnreadableImage(record.name, f"the same file as {first[key].name}"))
    return sources, failures


def split_sources(sources, fraction, seed):
    """(training, validation) Records: the share `fraction` of them, at least one, is for validation."""
    count = max(1, round(fraction * len(sources))) if fraction else 0
    if count >= len(sources):
        raise ValueError(f"--validation_fraction {fraction} of {len(sources)} usable images leaves none for training; "
                         "add images or lower it")
    held = set(item_rng(seed, 0, 0, HELDOUT_STREAM).permutation(len(sources))[:count].tolist())
    return ([record for place, record in enumerate(sources) if place not in held],
            [record for place, record in enumerate(sources) if place in held])


def write_png(path, image):
    """Write (H, W, 3) uint8 RGB in one rename. OpenCV's fast compression: in training the file is read many times."""
    _, stream = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(stream)
    os.replace(temporary, path)


class SampleMaker(Dataset):
    """maker[index] writes the two images of a sample and returns (its JSON line, what could not be read on the way)."""

    def __init__(self, sides, args):
        self.sides = sides
        self.args = args
        self.blur = partial(random_blur, weights=parse_type_weights(args.type_weights), linear_light=args.linear_light)

    def __getitem__(self, index):
        args, records = self.args, self.sides[is_validation(index, self.args.validation_fraction)]
        rng = item_rng(args.seed, 0, index, GEOMETRY_STREAM)
        record, image, skipped = load_readable(lambda record: load_rgb(record.target, args.max_pixels), records,
                                               int(rng.integers(len(records))), np.zeros(len(records)))
        clear = cover_crop(image, (args.image_size, args.image_size), rng.random(2))
        blurred, [step] = self.blur(clear, item_rng(args.seed, 0, index, DEGRADATION_STREAM))
        blur_type = step.pop("type")
        names = f"clear_{index:06d}.png", f"blur_{index:06d}.png"
        for folder, name, pixels in zip((CLEAR_FOLDER, BLUR_FOLDER), names, (clear, blurred), strict=True):
            write_png(Path(args.output_dir, folder, name), pixels)
        source = record.target.relative_to(args.source_dir).as_posix()
        return json.dumps({"clear_image": names[0], "blur_image": names[1], "blur_type": blur_type,
                           "source_image": source, "params": step, "seed": args.seed}), skipped


def check_settings(args, sources):
    """Write what the samples depend on to SETTINGS_FILE; ValueError if those that are there were made otherwise, or if
    images are there that this program did not make."""
    names = ("image_size", "seed", "type_weights", "linear_light", "validation_fraction", "upscale_small")
    settings = {name: getattr(args, name) for name in names}
    settings["source_dir"] = fingerprint(sources, args.source_dir)
    folder, path = Path(args.output_dir), Path(args.output_dir, SETTINGS_FILE)
    if path.exists():
        earlier = read_json(path)
    else:
        earlier = settings
        foreign = [folder / name for name in (JSON_FILE, VALIDATION_FILE) if (folder / name).exists()]
        for name in (CLEAR_FOLDER, BLUR_FOLDER):
            foreign += (folder / name).iterdir() if (folder / name).exists() else []
        if foreign:
            raise ValueError(f"--output_dir {folder} has {foreign[0].relative_to(folder)} but no {SETTINGS_FILE}, so "
                             "that was not made here; name another folder")
    for name, value in settings.items():
        if earlier.get(name) != value:
            raise ValueError(f"--output_dir {folder}: its samples were made with another --{name} "
                             + ("content" if name == "source_dir" else f"({earlier.get(name)!r}, not {value!r})")
                             + "; repeat that, or name another folder")
    write_json(path, settings)


def sample_index(row):
    """Which sample's JSON line `row` is, or None if it is none that SampleMaker writes."""
    if not isinstance(row, dict) or row.get("blur_type") not in BLUR_TYPES or not isinstance(row.get("params"), dict):
        return None
    name = re.fullmatch(r"clear_(\d{6,})\.png", str(row.get("clear_image")))
    return int(name[1]) if name and row.get("blur_image") == f"blur_{name[1]}.png" else None


def finished_lines(folder):
    """{index: JSON line} of the samples whose line and files are complete; a line that an interruption tore is none.
    ValueError naming file and line for a whole one that this program did not write."""
    lines = {}
    for file in (JSON_FILE, VALIDATION_FILE):
        path = folder / file
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:  # its sample is made again
                continue
            if (index := sample_index(row)) is None:
                raise ValueError(f"{path}, line {number}: not made here; remove it, or name another --output_dir")
            files = folder / CLEAR_FOLDER / row["clear_image"], folder / BLUR_FOLDER / row["blur_image"]
            if all(file.is_file() for file in files):
                lines[index] = line
    return lines


def write_lines(folder, lines, fraction):
    """Both JSON files, in the order of the indices, each in one rename; without validation samples only the first."""
    for file, side in ((JSON_FILE, False), (VALIDATION_FILE, True)):
        own = [line + "\n" for index, line in sorted(lines.items()) if is_validation(index, fraction) == side]
        if own or not side:
            temporary = folder / f".{file}.tmp"
            temporary.write_text("".join(own), encoding="utf-8")
            os.replace(temporary, folder / file)


def format_stats(lines, fraction):
    """Markdown table: pairs by blur type, and the least, mean and greatest of what was drawn."""
    rows = [(is_validation(index, fraction), json.loads(line)) for index, line in lines.items()]
    table = ["| blur type | training | validation | share | drawn: least, mean, greatest |", "|---|---|---|---|---|"]
    for blur_type in BLUR_TYPES:
        own = [(side, row["params"]) for side, row in rows if row["blur_type"] == blur_type]
        held = sum(side for side, _ in own)
        drawn = []
        for name in own[0][1] if own else ():
            values = [params[name] for _, params in own]
            if name != "linear_light":
                drawn.append(f"{name} {min(values):.2f}, {np.mean(values):.2f}, {max(values):.2f}")
        table.append(f"| {blur_type} | {len(own) - held} | {held} | {len(own) / len(rows):.1%} | {'; '.join(drawn)} |")
    return "\n".join(table)


def main(args):
    cv2.setNumThreads(1)  # before the processes are forked; a blur is too short to share out
    folder = Path(args.output_dir)
    if Path(args.source_dir).resolve() in [folder.resolve(), *folder.resolve().parents]:
        raise ValueError(f"--output_dir {folder} lies in --source_dir, so that its images would be sources of the next "
                         "run; name another folder")
    sources, failures = find_sources(args)
    maker = SampleMaker(split_sources(sources, args.validation_fraction, args.seed), args)
    check_report(writable_folder(folder, "--output_dir"))
    check_settings(args, sources)
    for name in (CLEAR_FOLDER, BLUR_FOLDER):
        (folder / name).mkdir(exist_ok=True)

    lines = finished_lines(folder)
    if lines and max(lines) >= args.num_samples:
        raise ValueError(f"--output_dir {folder} holds sample {max(lines)} already; give --num_samples "
                         f"{max(lines) + 1} or more, or name another folder")
    write_lines(folder, lines, args.validation_fraction)
    todo = [index for index in range(args.num_samples) if index not in lines]
    if lines:
        print(f"{len(lines)} of {args.num_samples} samples are there already")
    unread = {}
    made = DataLoader(maker, batch_size=None, sampler=todo, num_workers=args.num_workers,
                      worker_init_fn=use_one_thread)
    for index, (line, skipped) in zip(todo, tqdm(made, unit="pair", disable=None), strict=True):
        lines[index] = line
        unread |= dict.fromkeys(skipped)
        file = VALIDATION_FILE if is_validation(index, args.validation_fraction) else JSON_FILE
        with open(folder / file, "a", encoding="utf-8") as stream:  # only now that both images are written
            stream.write(line + "\n")
    write_lines(folder, lines, args.validation_fraction)

    print(format_stats(lines, args.validation_fraction))
    print(f"{len(lines)} pairs from {len(sources)} images ({len(maker.sides[1])} of them for validation): {folder}")
    failures += [UnreadableImage(*message.split(": ", 1)) for message in unread]
    report_failures([(error.args[0], error) for error in failures], folder)  # the samples are complete without them


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

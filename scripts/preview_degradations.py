"""Contact sheet of the degradations that training would draw: python -m scripts.preview_degradations --help

One row per image: the clean image, then samples with their parameters below. Sample n is what training with the same
--seed and --resolution draws for that image in epoch n (and leaves clean with --identity_probability).

  python -m scripts.preview_degradations --presets --samples 1 --seed 5 --output docs/presets.jpg
"""

import argparse
import sys
import textwrap
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from my_dataset.dataset_deg_paired import DEGRADATION_STREAM, Record, cover_crop, folder_records, item_rng, target_size
from my_dataset.degradations import PRESETS, Params, add_degradation_args, degrader_from_args
from my_dataset.images import MAX_PIXELS, UnreadableImage, load_rgb
from utils.parse import check_least, make_parser, run_main, write_json

MARGIN_PX = 8
FONT_PX = 12
CHARACTER_PX = 6.5  # mean width of a letter at FONT_PX in Pillow's own font
PACKAGE_PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png")  # of scikit-image, free to publish


def describe(step: dict) -> str:
    """One degradation in words: "noise gaussian level 0.05"; switches that are off and seeds are left out."""
    words = []
    for name, value in step.items():
        if name == "seed" or value is False or (name != "type" and value == step["type"]):
            continue
        if value is True:
            words.append(name)
        elif isinstance(value, str):
            words.append(f"{name.split('_')[0]} {value}" if name.endswith("_kernel") else value)
        else:
            numbers = value if isinstance(value, list) else [value]
            words.append(" ".join([name, *(f"{number:.3g}" for number in numbers)]))
    return " ".join(words)


def caption(params: Params, width_px: int) -> list[str]:
    """Lines of text for one sample that fit into `width_px`."""
    wrap = textwrap.TextWrapper(int(width_px / CHARACTER_PX), subsequent_indent="  ")
    return [line for step in params for line in wrap.wrap(describe(step))] or ["not degraded"]


def draw_sheet(rows: list[list[tuple[np.ndarray, list[str]]]]) -> Image.Image:
    """Sheet of (image, caption lines) cells; all images (size, size, 3) uint8."""
    size = rows[0][0][0].shape[0]
    font = ImageFont.load_default(FONT_PX)
    line_px = FONT_PX + 3
    heights = [size + line_px * max(len(lines) for _, lines in row) + 2 * MARGIN_PX for row in rows]
    sheet = Image.new("RGB", (MARGIN_PX + (size + MARGIN_PX) * len(rows[0]), MARGIN_PX + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = MARGIN_PX
    for row, height in zip(rows, heights, strict=True):
        for column, (image, lines) in enumerate(row):
            left = MARGIN_PX + column * (size + MARGIN_PX)
            sheet.paste(Image.fromarray(image), (left, top))
            draw.multiline_text((left, top + size + 2), "\n".join(lines), fill="black", font=font, spacing=3)
        top += height
    return sheet


def parse_args(argv: list[str] | None = None):
    parser = make_parser("Draw a contact sheet of degraded samples with their parameters, before training on them.")
    parser.add_argument("--images", help="image or folder (recursive) of clean images; --presets can do without")
    parser.add_argument("--presets", action="store_true", help="a clean row, then --samples rows of each preset")
    parser.add_argument("--output", default="outputs/degradations.png", help="the sheet; its parameters go to .json")
    parser.add_argument("--num_images", type=int, default=6, help="rows, the first images in the order of training")
    parser.add_argument("--samples", type=int, default=4, help="degraded samples of each image")
    parser.add_argument("--resolution", "--size", type=int, default=256, help="px; images are scaled and cropped")
    parser.add_argument("--seed", type=int, default=0)
    add_degradation_args(parser)
    args = parser.parse_args(argv)
    check_least(args, num_images=1, samples=1, resolution=64, seed=0)
    if not args.images and not args.presets:
        raise ValueError("--images is needed: an image or a folder of clean images")
    if args.presets and args.degradation_preset:
        raise ValueError("--presets draws every preset; leave out --degradation_preset, or draw that one alone")
    if Path(args.output).suffix.lower() not in (".png", ".jpg", ".webp"):
        raise ValueError(f"--output {args.output}: must end in .png, .jpg or .webp")
    return args


def load_images(args) -> list[tuple[int, str, np.ndarray]]:
    """(index in training, name, (size, size, 3) uint8) of the first --num_images that can be read. What training leaves
    out by its header has no index."""
    if args.images:
        records = folder_records(args.images)
    else:
        records = [Record(name, Path(str(resources.files("skimage.data") / name))) for name in PACKAGE_PHOTOGRAPHS]
    images, index = [], -1
    for record in records:
        if len(images) == args.num_images:
            break
        try:
            target_size(record, MAX_PIXELS)
            index += 1
            clean = cover_crop(load_rgb(record.target), (args.resolution, args.resolution), (0.5, 0.5))
        except UnreadableImage as error:
            print(f"skipped {error}", file=sys.stderr)
            continue
        images.append((index, record.name, clean))
    if not images:
        raise ValueError(f"--images {args.images}: none of its images can be read")
    return images


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    presets = list(PRESETS) if args.presets else [args.degradation_preset]
    degraders = {
        preset: degrader_from_args(argparse.Namespace(**vars(args) | {"degradation_preset": preset}))
        for preset in presets
    }
    images, records = load_images(args), []

    def draw(preset, image, n):
        index, name, clean = image
        degraded, params = degraders[preset](clean, item_rng(args.seed, n, index, DEGRADATION_STREAM))
        records.append({"image": name, "preset": preset, "sample": n, "degradation": params})
        return degraded, [preset] if args.presets else caption(params, args.resolution)

    names = [textwrap.wrap(Path(name).name, int(args.resolution / CHARACTER_PX)) for _, name, _ in images]
    clean = [(image[2], lines) for image, lines in zip(images, names, strict=True)]
    if args.presets:
        rows = [clean]
        rows += [[draw(preset, image, n) for image in images] for preset in presets for n in range(args.samples)]
    else:
        rows = [
            [first, *(draw(presets[0], image, n) for n in range(args.samples))]
            for first, image in zip(clean, images, strict=True)
        ]
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(rows).save(output)
    write_json(output.with_suffix(".json"), {"seed": args.seed, "resolution": args.resolution, "samples": records})
    print(f"{len(images)} images, {len(records)} samples: {output}, parameters: {output.with_suffix('.json')}")


if __name__ == "__main__":
    run_main(main)

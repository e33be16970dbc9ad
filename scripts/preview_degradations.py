"""Contact sheet of the degradations that training would draw: python -m scripts.preview_degradations --help

One row per image: the clean image, then samples with their parameters below. Sample n is what training with the same
--seed and --resolution draws for that image in epoch n.
"""

import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from my_dataset.dataset_deg_paired import DEGRADATION_STREAM, cover_crop, item_rng
from my_dataset.degradations import Params, add_degradation_args, degrader_from_args
from my_dataset.images import UnreadableImage, list_images, load_rgb
from utils.parse import make_parser, run_main, write_json

MARGIN_PX = 8
FONT_PX = 12
CHARACTER_PX = 6.5  # mean width of a letter at FONT_PX in Pillow's own font


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
            words.append(f"{name} {value:.3g}")
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
    parser.add_argument("--images", required=True, help="image or folder (recursive) of clean images")
    parser.add_argument("--output", default="outputs/degradations.png", help="the sheet; its parameters go to .json")
    parser.add_argument("--num_images", type=int, default=6, help="rows, the first images in the order of training")
    parser.add_argument("--samples", type=int, default=4, help="degraded samples of each image")
    parser.add_argument("--resolution", "--size", type=int, default=256, help="px; images are scaled and cropped")
    parser.add_argument("--seed", type=int, default=0)
    add_degradation_args(parser)
    args = parser.parse_args(argv)
    for flag, minimum in (("num_images", 1), ("samples", 1), ("resolution", 64), ("seed", 0)):
        if getattr(args, flag) < minimum:
            raise ValueError(f"--{flag} {getattr(args, flag)}: must be at least {minimum}")
    if Path(args.output).suffix.lower() not in (".png", ".jpg", ".webp"):
        raise ValueError(f"--output {args.output}: must end in .png, .jpg or .webp")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    degrade = degrader_from_args(args)
    size = (args.resolution, args.resolution)
    rows, records = [], []
    for index, path in enumerate(list_images(args.images)):
        if len(rows) == args.num_images:
            break
        try:
            clean = cover_crop(load_rgb(path), size, (0.5, 0.5))
        except UnreadableImage as error:
            print(f"skipped {error}", file=sys.stderr)
            continue
        samples = [degrade(clean, item_rng(args.seed, n, index, DEGRADATION_STREAM)) for n in range(args.samples)]
        cells = [(degraded, caption(params, args.resolution)) for degraded, params in samples]
        rows.append([(clean, textwrap.wrap(path.name, int(args.resolution / CHARACTER_PX))), *cells])
        records += [{"image": str(path), "sample": n, "degradation": samples[n][1]} for n in range(args.samples)]
    if not rows:
        raise ValueError(f"--images {args.images}: none of its images can be read")
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(rows).save(output)
    write_json(output.with_suffix(".json"), {"seed": args.seed, "resolution": args.resolution, "samples": records})
    print(f"{len(rows)} images x {args.samples} samples: {output}, parameters: {output.with_suffix('.json')}")


if __name__ == "__main__":
    run_main(main)

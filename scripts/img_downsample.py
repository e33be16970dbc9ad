"""Make low-resolution images, for tests or as the degraded half of training pairs:

    python -m scripts.img_downsample --input photos --factor 4 --output lr
    python -m scripts.img_downsample --input photos --factor 4 --output lr --crop_to_multiple --save_clean hr

The second makes pairs for training's --lr_root lr --hr_root hr. Written as PNG, so that only the options degrade them,
with ICC profile, EXIF and alpha channel; --input's folders are mirrored. What was drawn for each file goes to
downsample.json; it depends on --seed and the file's place among the sorted files alone. A folder takes the images of
one --input: what it holds of that already, by its outputs.json, is written anew, and nothing else is written over."""

from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from my_dataset.dataset_deg_paired import DEGRADATION_STREAM, KERNELS, item_rng
from my_dataset.degradations import make_degrader
from my_dataset.images import MAX_PIXELS, load_image, save_image
from my_dataset.outputs import claim, plan_outputs
from utils.failures import check_report, report_failures
from utils.parse import check_least, make_parser, public_args, run_main, writable_folder, write_json


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--input", required=True, help="image, or folder searched recursively")
    add("--output", required=True, help="folder for the small images")
    add("--factor", type=int, default=4, help="sides are divided by this whole number, 2 or more")
    add("--method", choices=sorted(KERNELS), default="bicubic", help="Pillow's kernels, antialiased except nearest")
    add("--noise_level", help="add Gaussian noise of this sigma on [0, 1] to the small image; value or lo-hi")
    add("--jpeg_quality", help="then compress it at this quality, 1 to 100, and decode it again; value or lo-hi")
    add("--seed", type=int, default=0, help="of noise and drawn values")
    add("--crop_to_multiple", action="store_true", help="first cut off what --factor leaves over, at the right and the "
        "bottom, so that sizes divide exactly as stored pairs must")
    add("--save_clean", metavar="DIR", help="write the cropped originals there, under the same names")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="leave out images with more pixels than this")
    args = parser.parse_args(argv)
    check_least(args, factor=2, seed=0, max_pixels=1)
    if args.save_clean and not args.crop_to_multiple:
        raise ValueError("--save_clean makes pairs, whose sizes must divide exactly: add --crop_to_multiple")
    return args


def downsample(image, factor, method):
    """An array (H, W) or (H, W, 3) uint8 at (H // factor, W // factor), by Pillow's kernel `method` over all of it."""
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((width // factor, height // factor), KERNELS[method]))


def plan(args):
    """[(input, small output, clean output or None)]. What an earlier run wrote is no input."""
    small = [(path, output) for path, _, output in plan_outputs(args.input, args.output, ext="png")]
    if not args.save_clean:
        return [(path, output, None) for path, output in small]
    clean = {path: output for path, _, output in plan_outputs(args.input, args.save_clean, ext="png")}
    jobs = [(path, output, clean[path]) for path, output in small if path in clean]
    if any(output in clean.values() for _, output, _ in jobs):
        raise ValueError(f"--save_clean {args.save_clean} is --output itself; name another folder")
    return jobs


def main(args):
    given = {"noise": args.noise_level, "jpeg": args.jpeg_quality}
    types = [name for name, value in given.items() if value is not None]
    degrade = make_degrader(types, noise_level=args.noise_level, jpeg_quality=args.jpeg_quality) if types else None
    jobs = plan(args)
    for flag in ("output", "save_clean") if args.save_clean else ("output",):
        writable_folder(getattr(args, flag), f"--{flag}")
    check_report(args.output)
    report = Path(args.output, "downsample.json")
    claims = {args.output: {report: Path(args.input)} | {output: path for path, output, _ in jobs}}
    if args.save_clean:
        claims[args.save_clean] = {output: path for path, _, output in jobs}
    for file, record in claim(claims).items():
        write_json(file, record)

    drawn, failures, uneven = {}, [], 0
    for index, (path, output, clean_output) in enumerate(tqdm(jobs, unit="image", disable=None)):
        try:
            image = load_image(path, args.max_pixels)
            height, width = (side // args.factor * args.factor for side in image.rgb.shape[:2])
            if not height or not width:
                raise ValueError(f"{path}: {image.rgb.shape[1]}x{image.rgb.shape[0]} px is smaller than --factor "
                                 f"{args.factor}")
            rgb, alpha, params = image.rgb, image.alpha, []
            if args.crop_to_multiple:
                rgb, alpha = rgb[:height, :width], alpha if alpha is None else alpha[:height, :width]
            uneven += rgb.shape[:2] != (height, width)
            pixels = downsample(rgb, args.factor, args.method)
            if degrade:
                pixels, params = degrade(pixels, item_rng(args.seed, 0, index, DEGRADATION_STREAM))
            small_alpha = alpha if alpha is None else downsample(alpha, args.factor, args.method)
            writes = [(output, pixels, small_alpha), (clean_output, rgb, alpha)]
            for file, array, opacity in writes[: 2 if clean_output else 1]:
                file.parent.mkdir(parents=True, exist_ok=True)
                save_image(file, array, opacity, image.icc_profile, image.exif)
            drawn[str(output.relative_to(args.output))] = {"input": path.name, "degradation": params}
        except (ValueError, OSError) as error:
            failures.append((path, error))
    write_json(report, {"images": drawn, "arguments": public_args(args)})
    note = f"; {uneven} do not divide by {args.factor}: pairs need --crop_to_multiple" if uneven else ""
    print(f"{len(drawn)} written, {len(failures)} failed: {args.output}{note}")
    return report_failures(failures, args.output)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

"""The blurs of the deblurring recipe against SciPy's, and the rate of its dataset maker: python -m bench.blurs

Each blur and scipy.ndimage's fastest filter of the same kernel on the same uint8 image (for a line and a disc
`convolve`, which leaves out zeros, the kernel ready made; `gaussian_filter`; `uniform_filter` mixed by OpenCV), in
turns on one thread, median CPU time in milliseconds. Then pairs per second of create_deblur_dataset on --source_dir, or
on JPEG files that this makes, files included, by number of processes. Exit code 1 when a blur is less than 5 times as
fast as SciPy's.
"""

import argparse
import contextlib
import io
import os
import platform
import tempfile
import time
from datetime import date
from pathlib import Path

import cv2
import numpy as np
import scipy
from PIL import Image
from scipy import ndimage

from bench.data import format_table, interleaved_medians_ms, photograph_like
from my_dataset.degradations import defocus_kernel, motion_kernel
from recipes.deblur_controlnet import create_deblur_dataset
from recipes.deblur_controlnet.deblur_dataset import apply_blur
from utils.parse import check_least, run_main

REQUIRED_RATIO = 5.0
CASES = [
    *(("motion_blur", {"length": length, "angle": angle})
      for length, angle in ((5, 0), (5, 30), (12, 30), (15, 0), (15, 45), (20, 30), (20, 75))),
    *(("gaussian_blur", {"sigma": sigma}) for sigma in (1, 3, 5)),
    *(("defocus_blur", {"radius": radius}) for radius in (1, 3, 5, 8)),
    *(("lens_blur", {"strength": strength}) for strength in (0.3, 0.8)),
]


def scipy_blur(image: np.ndarray, blur_type: str, params: dict):
    """A function that blurs `image` by SciPy as `apply_blur` does, less the making of the kernel. uint8 throughout,
    SciPy's fastest: it drops what is behind the point."""
    if blur_type == "gaussian_blur":
        return lambda: ndimage.gaussian_filter(image, (params["sigma"], params["sigma"], 0))
    if blur_type == "lens_blur":
        strength = params["strength"]
        return lambda: cv2.addWeighted(image, 1 - strength, ndimage.uniform_filter(image, (15, 15, 0)), strength, 0)
    kernel = {"motion_blur": motion_kernel, "defocus_blur": defocus_kernel}[blur_type](**params)
    return lambda: np.dstack([ndimage.convolve(image[..., c], kernel) for c in range(3)])


def measure_blurs(size: int, rounds: int) -> dict[str, float]:
    image, functions = photograph_like(size), {}
    for blur_type, params in CASES:
        name = f"{blur_type} {', '.join(f'{key} {value}' for key, value in params.items())}"
        functions[name] = lambda blur_type=blur_type, params=params: apply_blur(image, blur_type, params)
        functions[f"{name} original"] = scipy_blur(image, blur_type, params)
        difference = np.abs(functions[name]().astype(int) - functions[f"{name} original"]())
        if difference.max() > 2:
            raise ValueError(f"{name}: {difference.max()} levels from SciPy's result, so it is not the same blur")
    linear = CASES[0][1] | {"linear_light": True}
    functions["motion_blur in linear light"] = lambda: apply_blur(image, "motion_blur", linear)
    # each is called just before it is timed as well: neither pays for the caches and the memory that the other left
    twice = {key: function for name, function in functions.items() for key in (("warm-up", name), name)}
    medians_ms = interleaved_medians_ms(twice, rounds)
    return {name: medians_ms[name] for name in functions}


def maker_rate(source: Path, size: int, samples: int, workers: int) -> float:
    """Pairs per second of wall time of a whole run, start of the processes included."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = create_deblur_dataset.parse_args([
            "--source_dir", str(source), "--output_dir", f"{folder}/pairs", "--num_samples", str(samples),
            "--image_size", str(size), "--num_workers", str(workers)])
        start = time.perf_counter()
        create_deblur_dataset.main(args)
        return samples / (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="side of the square image in px")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--samples", type=int, default=200, help="pairs that the maker makes")
    parser.add_argument("--source_dir", help="photographs for the maker, --size px or more; default: 8 files made here")
    args = parser.parse_args()
    check_least(args, size=32, rounds=1, samples=1)
    cv2.setNumThreads(1)
    medians_ms = measure_blurs(args.size, args.rounds)
    print(f"{date.today()}, {os.cpu_count()}-core {platform.machine()} CPU, one thread, OpenCV {cv2.__version__}, "
          f"NumPy {np.__version__}, SciPy {scipy.__version__} (column \"original\"), median CPU time of {args.rounds} "
          f"interleaved rounds:\n`python -m bench.blurs --size {args.size} --rounds {args.rounds}`\n")
    print(format_table(medians_ms, args.size))
    ratios = {name: medians_ms[f"{name} original"] / ours for name, ours in medians_ms.items()
              if f"{name} original" in medians_ms}
    slowest = min(ratios, key=ratios.get)
    print(f"\nleast: {slowest}, {ratios[slowest]:.1f} times as fast as SciPy's (required: {REQUIRED_RATIO:g})\n")

    with tempfile.TemporaryDirectory() as folder:
        if not args.source_dir:
            for i in range(8):
                image = np.roll(photograph_like(args.size * 3 // 2), 100 * i, axis=1)
                Image.fromarray(image).save(Path(folder, f"{i}.jpg"), quality=92)
        for workers in (0, 2):
            rate = maker_rate(Path(args.source_dir or folder), args.size, args.samples, workers)
            print(f"maker, {args.size} px, --num_workers {workers}: {rate:.1f} pairs/s (wall, {args.samples} pairs)")
    return int(ratios[slowest] < REQUIRED_RATIO)


if __name__ == "__main__":
    run_main(main)

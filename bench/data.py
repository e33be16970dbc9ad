"""Cost of making one degraded sample on one CPU core: python -m bench.data

Ours against the chain of the original project (Pillow resizing and GaussianBlur, np.random.normal), interleaved in one
run, median CPU time in milliseconds. Exit code 1 when ours is less than 3 times as fast.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from io import BytesIO

import cv2
import numpy as np
import PIL
from PIL import Image, ImageFilter

from my_dataset.degradations import blur, downsample, draw_degradations, jpeg, make_degrader, noise, standard_normal

REQUIRED_RATIO = 3.0
SCALE, NOISE_LEVEL, BLUR_RADIUS, QUALITY = 8, 0.05, 1.0, 75


def pillow_downsample(image: Image.Image) -> Image.Image:
    small = image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.BICUBIC)
    return small.resize(image.size, Image.Resampling.BICUBIC)


def pillow_noise(image: Image.Image) -> Image.Image:
    pixels = np.array(image).astype(np.float32)
    pixels = pixels + np.random.normal(0, NOISE_LEVEL * 255, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def pillow_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(BLUR_RADIUS))


def pillow_chain(image: Image.Image) -> Image.Image:
    return pillow_blur(pillow_noise(pillow_downsample(image)))


def pillow_jpeg(image: Image.Image) -> Image.Image:
    stream = BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return Image.open(stream).convert("RGB")


def interleaved_medians_ms(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU time of each, which a busy machine disturbs less than wall time. All are called once per round, after
    one round that is not counted."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def photograph_like(size: int) -> np.ndarray:
    """(size, size, 3) uint8 with a falling spectrum and some texture, so that JPEG has typical work."""
    rng = np.random.default_rng(0)
    octaves = [cv2.resize(standard_normal((n, n, 3), rng), (size, size)) / n**0.8 for n in (4, 16, 64, size // 2)]
    texture = sum(octaves)
    return (255 * (texture - texture.min()) / np.ptp(texture)).astype(np.uint8)


def measure(size: int, rounds: int) -> dict[str, float]:
    image = photograph_like(size)
    original = Image.fromarray(image)
    rng = np.random.default_rng(1)
    chain = make_degrader("downsample,noise,blur")
    chain_jpeg = make_degrader("downsample,noise,blur,jpeg")
    wide = make_degrader(
        "blur,downsample,noise,jpeg", "1-8", "0.01-0.1", "0.5-3", "30-95", probabilities=0.8, order="shuffled",
        down_kernels="area,bilinear,bicubic", noise_kinds="gaussian,poisson", gray_noise_probability=0.4,
        blur_kinds="gaussian,anisotropic,motion,defocus",
    )  # fmt: skip
    return interleaved_medians_ms(
        {
            "downsample": lambda: downsample(image, SCALE),
            "downsample original": lambda: np.asarray(pillow_downsample(original)),
            "noise": lambda: noise(image, NOISE_LEVEL, rng),
            "noise original": lambda: np.asarray(pillow_noise(original)),
            "blur": lambda: blur(image, BLUR_RADIUS),
            "blur original": lambda: np.asarray(pillow_blur(original)),
            "jpeg": lambda: jpeg(image, QUALITY),
            "jpeg original": lambda: np.asarray(pillow_jpeg(original)),
            "downsample + noise + blur": lambda: chain(image, rng),
            "downsample + noise + blur original": lambda: np.asarray(pillow_chain(original)),
            "the same + jpeg": lambda: chain_jpeg(image, rng),
            "the same + jpeg original": lambda: np.asarray(pillow_jpeg(pillow_chain(original))),
            "drawing the chain's parameters": lambda: draw_degradations(chain.keywords["settings"], rng),
            "all kinds, ranges, shuffled": lambda: wide(image, rng),
            "Poisson noise": lambda: noise(image, NOISE_LEVEL, rng, "poisson"),
            "anisotropic blur": lambda: blur(image, 3, "anisotropic", 30, 0.5),
            "motion blur": lambda: blur(image, 5, "motion", 30),
            "defocus blur": lambda: blur(image, 5, "defocus"),
            "WebP": lambda: jpeg(image, QUALITY, "webp"),
            "rng.standard_normal alone, float32": lambda: rng.standard_normal(image.shape, dtype=np.float32),
        },
        rounds,
    )


def format_table(medians_ms: dict[str, float], size: int) -> str:
    """Markdown; an entry "x original" becomes the second column of "x"."""
    lines = [f"| {size} x {size} px | ours, ms | original, ms | times as fast |", "|---|---|---|---|"]
    for name, ours in medians_ms.items():
        if name.endswith(" original"):
            continue
        original = medians_ms.get(f"{name} original")
        compared = f"{original:.2f} | {original / ours:.1f}" if original else "- | -"
        lines.append(f"| {name} | {ours:.2f} | {compared} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="side of the square image in px")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    medians_ms = measure(args.size, args.rounds)
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, OpenCV {cv2.__version__}"
    print(
        f"{date.today()}, {os.cpu_count()}-core {platform.machine()} CPU, one thread, {versions}, "
        f"Pillow {PIL.__version__}, median CPU time of {args.rounds} interleaved rounds:\n"
        f"`python -m bench.data --size {args.size} --rounds {args.rounds}`\n"
    )
    print(format_table(medians_ms, args.size))
    ratio = medians_ms["downsample + noise + blur original"] / medians_ms["downsample + noise + blur"]
    print(f"\ndownsample + noise + blur: {ratio:.1f} times as fast as the original (required: {REQUIRED_RATIO:g})")
    return 0 if ratio >= REQUIRED_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())

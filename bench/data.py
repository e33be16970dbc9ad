"""Cost of making one degraded sample on one CPU core: python -m bench.data

Ours against the chain of the original project (Pillow resizing and GaussianBlur, np.random.normal), interleaved in one
run, median CPU time in milliseconds; and the second-order chain of the preset real_world against the same steps written
the usual way (scipy.ndimage filters, np.random, a JPEG of NumPy's), mean over the same samples. Exit code 1 when ours
is less than 3 times, or the second-order chain less than 8 times, as fast.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from io import BytesIO

import cv2
import numpy as np
import PIL
import scipy
from PIL import Image, ImageFilter
from scipy import ndimage, special

from my_dataset.degradations import (
    apply_degradations,
    blur,
    downsample,
    draw_degradations,
    jpeg,
    make_degrader,
    noise,
    standard_normal,
)
from utils.parse import check_least, run_main

REQUIRED_RATIO, REQUIRED_SECOND_ORDER_RATIO = 3.0, 8.0
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


# The second-order chain the usual way, on float32 in [0, 255].


def scipy_blur(image: np.ndarray, radius: float, kind: str, angle=0.0, aspect=1.0, beta=1.0) -> np.ndarray:
    """Kernels of 7 to 21 taps a side whatever their radius, as in Real-ESRGAN."""
    y, x = np.mgrid[-10:11, -10:11][:, (trim := np.random.randint(8)) : 21 - trim, trim : 21 - trim]
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    square = ((cos * x - sin * y) / radius) ** 2 + ((sin * x + cos * y) / (aspect * radius)) ** 2
    if kind == "sinc":
        distance = np.pi * np.maximum(np.hypot(x, y), 1e-6) / max(radius, 1)
        kernel = special.j1(distance) / distance
    elif kind == "plateau":
        kernel = 1 / (1 + square**beta)
    else:
        kernel = np.exp(-0.5 * square**beta)
    return np.dstack([ndimage.convolve(image[..., c], kernel / kernel.sum()) for c in range(3)])


def numpy_noise(image: np.ndarray, kind: str, level: float, gray: bool, seed: int) -> np.ndarray:
    legacy = np.random.RandomState(seed % 2**32)
    base = image @ [0.299, 0.587, 0.114] if gray else image
    if kind == "gaussian":
        field = legacy.normal(0, 255 * level, base.shape)
    else:
        field = 255 * level**2 * legacy.poisson(base.clip(0) / (255 * level**2)) - base
    return (image + (field[..., None] if gray else field)).clip(0, 255).astype(np.float32)


LUMA_TABLE = np.float32([
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
])  # fmt: skip
CHROMA_TABLE = np.full((8, 8), 99, np.float32)
CHROMA_TABLE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
TO_YCBCR = np.float32([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
DCT = np.float32([[np.cos((2 * n + 1) * k * np.pi / 16) / (2 if k else 8**0.5) for n in range(8)] for k in range(8)])
DCT_BASIS = np.einsum("ux,vy->xyuv", DCT, DCT)


def numpy_jpeg(image: np.ndarray, quality: int, codec: str) -> np.ndarray:
    """Quantised 8 x 8 cosine transforms with halved chroma, as differentiable JPEGs are written; no bits are made."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % 16), (0, -width % 16), (0, 0)), mode="edge") @ TO_YCBCR.T
    planes = [padded[..., 0] - 128]
    planes += [padded[..., c].reshape(len(padded) // 2, 2, -1, 2).mean(axis=(1, 3)) for c in (1, 2)]
    factor = (50 / quality if quality < 50 else 2 - quality / 50) or 0.01
    decoded = []
    for plane, table in zip(planes, (LUMA_TABLE, CHROMA_TABLE, CHROMA_TABLE), strict=True):
        blocks = plane.reshape(plane.shape[0] // 8, 8, plane.shape[1] // 8, 8).transpose(0, 2, 1, 3)
        coefficients = np.tensordot(blocks, DCT_BASIS, axes=2) / (table * np.float32(factor))
        blocks = np.tensordot(coefficients.round() * table * np.float32(factor), DCT_BASIS, axes=((2, 3), (2, 3)))
        decoded.append(blocks.transpose(0, 2, 1, 3).reshape(plane.shape))
    chroma = [plane.repeat(2, axis=0).repeat(2, axis=1) for plane in decoded[1:]]
    pixels = np.dstack([decoded[0] + 128, *chroma]) @ np.linalg.inv(TO_YCBCR).T.astype(np.float32)
    return pixels[:height, :width].clip(0, 255)


CV2_KERNELS = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


def usual_chain(image: np.ndarray, params: list[dict]) -> np.ndarray:
    """What `apply_degradations` does with params of the preset real_world."""
    height, width = image.shape[:2]
    pixels = image.astype(np.float32)
    for step in params:
        word, options = step["type"], {name: value for name, value in step.items() if name != "type"}
        if word == "resize":
            size = round(step["scale"] * height), round(step["scale"] * width)
            kernel = CV2_KERNELS[step["down_kernel" if size[0] < pixels.shape[0] else "up_kernel"]]
            pixels = cv2.resize(pixels, size[::-1], interpolation=kernel).clip(0, 255)
        else:
            pixels = {"blur": scipy_blur, "noise": numpy_noise, "jpeg": numpy_jpeg}[word](pixels, **options)
    return np.rint(pixels.clip(0, 255)).astype(np.uint8)


def measure_second_order(size: int, samples: int) -> tuple[float, float]:
    """Mean CPU time in ms of ours, drawing included, and of the usual way, of the same samples in turns."""
    image, settings = photograph_like(size), make_degrader(preset="real_world").keywords["settings"]
    np.random.seed(0)
    times = np.zeros(2)
    for seed in range(samples + 1):
        start = time.process_time()
        params = draw_degradations(settings, np.random.default_rng(seed))
        apply_degradations(image, params)
        between = time.process_time()
        usual_chain(image, params)
        times += (between - start, time.process_time() - between) if seed else 0  # the first one warms up
    return tuple(1e3 * times / samples)


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
    old_photo = make_degrader(preset="old_photo")
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
            "preset old_photo": lambda: old_photo(image, rng),
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
    parser.add_argument("--size", type=int, default=512, help=f"side of the square image in px, {SCALE} or more")
    parser.add_argument("--rounds", type=int, default=30, help="and samples of the second-order chain")
    args = parser.parse_args()
    check_least(args, size=SCALE, rounds=1)
    cv2.setNumThreads(1)
    medians_ms = measure(args.size, args.rounds)
    ours_ms, usual_ms = measure_second_order(args.size, args.rounds)
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, OpenCV {cv2.__version__}"
    print(
        f"{date.today()}, {os.cpu_count()}-core {platform.machine()} CPU, one thread, {versions}, "
        f"Pillow {PIL.__version__}, SciPy {scipy.__version__}, median CPU time of {args.rounds} interleaved rounds:\n"
        f"`python -m bench.data --size {args.size} --rounds {args.rounds}`\n"
    )
    print(format_table(medians_ms, args.size))
    ratio = medians_ms["downsample + noise + blur original"] / medians_ms["downsample + noise + blur"]
    print(f"\ndownsample + noise + blur: {ratio:.1f} times as fast as the original (required: {REQUIRED_RATIO:g})")
    second = usual_ms / ours_ms
    print(
        f"second-order chain (preset real_world), mean of {args.rounds} samples: {ours_ms:.1f} ms, with scipy.ndimage, "
        f"np.random and a NumPy JPEG {usual_ms:.1f} ms ({1e3 / usual_ms:.1f} images/s): {second:.1f} times as fast "
        f"(required: {REQUIRED_SECOND_ORDER_RATIO:g})"
    )
    return 0 if ratio >= REQUIRED_RATIO and second >= REQUIRED_SECOND_ORDER_RATIO else 1


if __name__ == "__main__":
    run_main(main)

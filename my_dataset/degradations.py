"""Image degradations: downsampling, noise, blur and compression of RGB arrays, and chains of them with damage.py's.

Every image is (H, W, 3) RGB, uint8 or float32, with values in [0, 255]; what comes out has the same shape and dtype.
A function that draws takes the `numpy.random.Generator` it draws from. `make_degrader` chains them: it first draws the
parameters of one sample, then applies them, and returns both, so `apply_degradations` can repeat a sample exactly and
`damage_mask` can tell where it was scratched or stained.
"""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
from PIL import Image

from my_dataset import damage

# Pillow's filters are antialiased when they reduce (their support grows with the factor) and its cubic has a = -0.5, as
# MATLAB's. cv2.INTER_CUBIC, INTER_LINEAR and INTER_LANCZOS4 alias when they reduce, which moves PSNR by over 1 dB.
PILLOW_KERNELS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
UP_KERNELS = tuple(PILLOW_KERNELS)
DOWN_KERNELS = ("area", *UP_KERNELS)
NOISE_KINDS = ("gaussian", "poisson")
BLUR_KINDS = ("gaussian", "anisotropic", "motion", "defocus", "generalized", "plateau", "sinc")
CODECS = ("jpeg", "webp")
ORDERS = ("fixed", "shuffled")

STRIP_PIXELS = 1 << 15  # noise is made in strips that stay in the cache and leave no large arrays to page in

Params = list[dict[str, str | float | bool | list[float]]]


def clip_range(image: np.ndarray) -> np.ndarray:
    """Clip float images to [0, 255], which uint8 never leaves."""
    return image if image.dtype == np.uint8 else image.clip(0, 255)


def resize(image: np.ndarray, height: int, width: int, kernel: str) -> np.ndarray:
    """Resize to (height, width, 3). "area" averages pixels by the area they cover (cv2.INTER_AREA, exact for fractional
    factors) and only reduces; "nearest", "bilinear", "bicubic" and "lanczos" (3 lobes) are Pillow's."""
    if kernel == "area":
        return clip_range(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))
    resample = PILLOW_KERNELS[kernel]
    if image.dtype == np.uint8:
        return np.array(Image.fromarray(image).resize((width, height), resample))
    planes = [Image.fromarray(np.ascontiguousarray(image[..., c])).resize((width, height), resample) for c in range(3)]
    return clip_range(np.stack(planes, axis=-1))


def downsample(image: np.ndarray, scale: float, down_kernel: str = "bicubic", up_kernel: str = "bicubic") -> np.ndarray:
    """Reduce to (H // scale, W // scale), at least one pixel, and enlarge back to exactly (H, W).

    `scale` >= 1 need be neither whole nor a divisor of the size. Kernels as in `resize`: `down_kernel` one of
    DOWN_KERNELS, antialiased except "nearest"; `up_kernel` one of UP_KERNELS.
    """
    height, width = image.shape[:2]
    small = resize(image, max(1, int(height / scale)), max(1, int(width / scale)), down_kernel)
    return resize(small, height, width, up_kernel)


OPENCV_KERNELS = {
    "area": cv2.INTER_AREA,
    "nearest": cv2.INTER_NEAREST_EXACT,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "lanczos": cv2.INTER_LANCZOS4,
}


def rescale(
    image: np.ndarray, height: int, width: int, scale: float, down_kernel: str = "area", up_kernel: str = "bicubic"
) -> np.ndarray:
    """Resize to `scale` > 0 times (height, width), rounded, at least one pixel: with `down_kernel` when that reduces,
    else with `up_kernel`. Both are OpenCV's, which alias when they reduce, except "area": so do the programs that
    pictures have passed through, and Real-ESRGAN's chain."""
    size = max(1, round(scale * height)), max(1, round(scale * width))
    reduces = size[0] < image.shape[0] or size[1] < image.shape[1]
    interpolation = OPENCV_KERNELS[down_kernel if reduces else up_kernel]
    return clip_range(cv2.resize(image, size[::-1], interpolation=interpolation))


def standard_normal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Independent N(0, 1) float32 numbers by Box and Muller's transform, several times faster than
    `rng.standard_normal` because OpenCV vectorises its log, sine and cosine. 24-bit uniforms end the tails at 5.77."""
    size = int(np.prod(shape))
    uniform = rng.random((2, (size + 1) // 2), dtype=np.float32)
    normal = np.empty_like(uniform)
    radius = cv2.sqrt(-2 * cv2.log(1 - uniform[:1]))  # 1 - u lies in (0, 1]: the logarithm is finite
    cv2.polarToCart(radius, uniform[1:] * np.float32(2 * np.pi), normal[:1], normal[1:])
    return normal.reshape(-1)[:size].reshape(shape)


def poisson_noise(intensity: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """Float32 shot noise of intensities in [0, 255]: Poisson(lambda) - lambda photons of 255 / N each, where
    lambda = N intensity / 255 and white has N = level^-2 of them, so that the standard deviation is
    255 level sqrt(intensity / 255). From 20 photons on the normal law of equal variance stands in for Poisson's."""
    intensity = intensity.astype(np.float32)
    photon = 255 * level**2
    field = standard_normal(intensity.shape, rng) * (level * np.sqrt(255 * intensity))
    few = intensity < 20 * photon
    photons = intensity[few].astype(np.float64) / photon
    field[few] = (rng.poisson(photons) - photons) * photon
    return field


def noise(
    image: np.ndarray, level: float, rng: np.random.Generator, kind: str = "gaussian", gray: bool = False
) -> np.ndarray:
    """Add zero-mean noise, round (uint8) and clip to [0, 255].

    `level` is the standard deviation for the value range [0, 1]: 0.05 is 12.75 of 255. "gaussian" has it everywhere,
    "poisson" at white and in proportion to the square root of the intensity elsewhere (see `poisson_noise`). `gray`
    adds one field, for "poisson" that of the luminance, to all three channels.
    """
    if level == 0:
        return image.copy()
    noisy = np.empty_like(image)
    depth = cv2.CV_8U if image.dtype == np.uint8 else cv2.CV_32F
    rows = max(1, STRIP_PIXELS // image.shape[1])
    for top in range(0, image.shape[0], rows):
        strip = image[top : top + rows]
        if kind == "gaussian":
            field, field_scale = standard_normal(strip.shape[:2] if gray else strip.shape, rng), 255 * level
        else:
            intensity = cv2.cvtColor(strip, cv2.COLOR_RGB2GRAY) if gray else strip
            field, field_scale = poisson_noise(intensity, level, rng), 1
        if gray:
            field = cv2.cvtColor(field, cv2.COLOR_GRAY2RGB)
        noisy[top : top + rows] = cv2.addWeighted(strip, 1, field, field_scale, 0, dtype=depth)
    return clip_range(noisy)


def pixel_grid(radius: int) -> tuple[np.ndarray, np.ndarray]:
    """x (to the right) and y (down) of a (2 radius + 1)^2 kernel's pixels relative to its centre."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    return x, y


def rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along and across the direction at `angle` degrees, counted anticlockwise as seen, y pointing down."""
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    return cos * x - sin * y, sin * x + cos * y


def gaussian_kernel(sigma_x: float, sigma_y: float | None = None, angle: float = 0.0) -> np.ndarray:
    """Gaussian of standard deviations in pixels along (`sigma_x`) and across (`sigma_y`, default `sigma_x`) the
    direction at `angle` degrees, cut at 4 sigma; square, odd, float64, sum 1."""
    sigma_y = sigma_x if sigma_y is None else sigma_y
    along, across = rotate(*pixel_grid(int(np.ceil(4 * max(sigma_x, sigma_y)))), angle)
    sigma_x, sigma_y = max(sigma_x, 1e-3), max(sigma_y, 1e-3)  # in the limit 0 a single point
    kernel = np.exp(-0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2))
    return kernel / kernel.sum()


def motion_kernel(length: float, angle: float) -> np.ndarray:
    """Uniform straight motion over `length` >= 1 pixels at `angle` degrees: an antialiased line one pixel wide;
    square, odd, float64, sum 1."""
    along, across = rotate(*pixel_grid(int(np.ceil((length + 1) / 2))), angle)
    kernel = np.clip((length + 1) / 2 - abs(along), 0, 1) * np.clip(1 - abs(across), 0, 1)
    return kernel / kernel.sum()


def defocus_kernel(radius: float) -> np.ndarray:
    """Disc of `radius` pixels with a one-pixel antialiased rim, the blur of an ideal round aperture; square, odd,
    float64, sum 1."""
    kernel = np.clip(radius + 0.5 - np.hypot(*pixel_grid(int(np.ceil(radius + 0.5)))), 0, 1)
    return kernel / kernel.sum()


def elliptic_square(radius: float, aspect: float, angle: float) -> np.ndarray:
    """Squared distance of pixels from the centre in units of sigma, which is `radius` at `angle` degrees and
    aspect * radius across it, on a square of 4 `radius` to each side."""
    along, across = rotate(*pixel_grid(int(np.ceil(4 * radius))), angle)
    return (along / max(radius, 1e-3)) ** 2 + (across / max(aspect * radius, 1e-3)) ** 2


def generalized_kernel(radius: float, aspect: float = 1.0, angle: float = 0.0, beta: float = 1.0) -> np.ndarray:
    """exp(-q^beta / 2) of q = `elliptic_square`: Gaussian at beta 1, pointed below, flat-topped above (Liu et al. 2020,
    https://arxiv.org/abs/2002.12192; as used by Real-ESRGAN); square, odd, float64, sum 1."""
    kernel = np.exp(-0.5 * elliptic_square(radius, aspect, angle) ** beta)
    return kernel / kernel.sum()


def plateau_kernel(radius: float, aspect: float = 1.0, angle: float = 0.0, beta: float = 1.0) -> np.ndarray:
    """1 / (1 + q^beta) of q = `elliptic_square`: a plateau with wide tails (Real-ESRGAN); square, odd, float64,
    sum 1."""
    kernel = 1 / (1 + elliptic_square(radius, aspect, angle) ** beta)
    return kernel / kernel.sum()


def bessel_j1(x: np.ndarray) -> np.ndarray:
    """Bessel's function of the first kind and order 1, by Bessel's integral, exact to 1e-12 for abs(x) <= 30."""
    nodes = np.pi * (np.arange(32) + 0.5) / 32
    return sum(np.cos(node - x * np.sin(node)) for node in nodes) / len(nodes)


def sinc_kernel(radius: float) -> np.ndarray:
    """Ideal low-pass filter of cutoff pi / radius rad per pixel, radius >= 1: rings at edges as over-sharpened and
    over-compressed pictures do (Real-ESRGAN); cut at 3 `radius`, square, odd, float64, sum 1."""
    cutoff, distance = np.pi / radius, np.hypot(*pixel_grid(int(np.ceil(3 * radius))))
    kernel = np.full_like(distance, cutoff**2 / (4 * np.pi))  # the limit at the centre
    np.divide(cutoff * bessel_j1(cutoff * distance), 2 * np.pi * distance, out=kernel, where=distance > 0)
    return kernel / kernel.sum()


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Isotropic Gaussian blur of `sigma` pixels: `gaussian_kernel(sigma)` applied separably. cv2.GaussianBlur is no
    faster on uint8 and rounds its kernel to 8 bits."""
    kernel = cv2.getGaussianKernel(2 * int(np.ceil(4 * sigma)) + 1, sigma)
    return clip_range(cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT))


def convolve(pixels: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Float32 (H, W, 3) correlated with an odd square kernel, borders reflected. cv2.filter2D sums fewer than 130 taps
    directly and more by Fourier transforms; from 13 to 17 a side, sums over bands of the kernel's rows are faster."""
    height, side = len(pixels), len(kernel)
    if not 13 <= side <= 17:
        return cv2.filter2D(pixels, -1, kernel, borderType=cv2.BORDER_REFLECT)
    padded = cv2.copyMakeBorder(pixels, side // 2, side // 2, 0, 0, cv2.BORDER_REFLECT)
    total, rows = np.zeros_like(pixels), 129 // side
    for top in range(0, side, rows):
        band, reach = kernel[top : top + rows], padded[top : top + rows + height - 1]
        total += cv2.filter2D(reach, -1, band, anchor=(side // 2, 0), borderType=cv2.BORDER_REFLECT)[:height]
    return total


def blur(
    image: np.ndarray, radius: float, kind: str = "gaussian", angle: float = 0.0, aspect: float = 1.0, beta: float = 1.0
) -> np.ndarray:
    """Blur with reflected borders. What `radius` (pixels; 0 changes nothing) means depends on `kind`:

    "gaussian" sigma, as in PIL.ImageFilter.GaussianBlur(radius); "anisotropic" the larger sigma, lying at `angle`
    degrees, the smaller being aspect * radius; "motion" a line of length 2 radius + 1 at `angle`; "defocus" a disc of
    that radius; "generalized" and "plateau" the larger sigma of their kernel of exponent `beta`; "sinc" (at least 1)
    pi over the cutoff frequency.
    """
    if radius == 0:
        return image.copy()
    if kind == "gaussian":
        return gaussian_blur(image, radius)
    kernels = {
        "anisotropic": lambda: gaussian_kernel(radius, aspect * radius, angle),
        "motion": lambda: motion_kernel(2 * radius + 1, angle),
        "defocus": lambda: defocus_kernel(radius),
        "generalized": lambda: generalized_kernel(radius, aspect, angle, beta),
        "plateau": lambda: plateau_kernel(radius, aspect, angle, beta),
        "sinc": lambda: sinc_kernel(max(radius, 1)),
    }
    # filter2D correlates; the kernels are symmetric about their centre, so that is a convolution
    if kind in ("anisotropic", "motion", "defocus"):
        return clip_range(cv2.filter2D(image, -1, kernels[kind](), borderType=cv2.BORDER_REFLECT))
    # float32 is faster, but rounds ties to other bits: the kinds above keep those they had
    return damage.as_dtype(convolve(image.astype(np.float32), kernels[kind]()), image.dtype)


def tap_blocks(kernel: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """(top, left, block) of disjoint blocks that hold all non-zero taps of a kernel: as many of its rows as
    cv2.filter2D will sum directly, leaving out zeros, cut to the columns in use."""
    blocks, rows = [], np.flatnonzero(kernel.any(axis=1))
    while rows.size:
        top = rows[0]
        for bottom in range(rows[-1] + 1, top, -1):
            columns = np.flatnonzero(kernel[top:bottom].any(axis=0))
            block = kernel[top:bottom, columns[0] : columns[-1] + 1]
            if block.size < 130:
                break
        blocks.append((top, columns[0], block))
        rows = rows[rows >= bottom]
    return blocks


def sparse_blur(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Blur with an odd square kernel >= 0, symmetric about its centre, borders reflected. For lines and discs, most of
    whose square is zero, several times as fast as `convolve`."""
    if kernel.size < 130:
        return clip_range(cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT))
    (height, width), radius = image.shape[:2], len(kernel) // 2
    blurred, blocks, rows = np.empty(image.shape, image.dtype), tap_blocks(kernel), max(1, STRIP_PIXELS // width)
    for start in range(0, height, rows):
        end = min(start + rows, height)
        above, below = min(start, radius), min(height - end, radius)  # rows of the image beyond the strip
        strip, borders = image[start - above : end + below], (radius - above, radius - below, radius, radius)
        strip, total = cv2.copyMakeBorder(strip, *borders, cv2.BORDER_REFLECT).astype(np.float32), None
        for top, left, block in blocks:
            reach = strip[top : top + end - start + len(block) - 1, left : left + width + block.shape[1] - 1]
            part = cv2.filter2D(reach, -1, block, anchor=(0, 0))[: end - start, :width]
            total = part if total is None else cv2.add(total, part, dst=total)
        if image.dtype == np.uint8:
            cv2.convertScaleAbs(total, dst=blurred[start:end])  # rounds and clips; nothing is below 0
        else:
            blurred[start:end] = total
    return clip_range(blurred)


def lens_blur(image: np.ndarray, strength: float, side: int = 15) -> np.ndarray:
    """(1 - strength) image + strength times its mean over `side` x `side` pixels (odd), borders reflected: a sharp
    core in a wide veil. Of uint8 the mean is rounded first, so the result may be one level off."""
    mean = cv2.blur(image, (side, side), borderType=cv2.BORDER_REFLECT)
    return clip_range(cv2.addWeighted(image, 1 - strength, mean, strength, 0, dst=mean))


def srgb_to_linear(image: np.ndarray) -> np.ndarray:
    """Float32 intensities in [0, 255], in proportion to light, of sRGB values (IEC 61966-2-1)."""
    tones = image.astype(np.float32) / 255
    return 255 * np.where(tones <= 0.04045, tones / 12.92, cv2.pow((tones + 0.055) / 1.055, 2.4))


def linear_to_srgb(intensity: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """sRGB values of dtype uint8 or float32: the inverse of `srgb_to_linear`."""
    tones = intensity / 255
    encoded = np.where(tones <= 0.0031308, 12.92 * tones, 1.055 * cv2.pow(tones, 1 / 2.4) - 0.055)
    return damage.as_dtype(255 * encoded, dtype)


def jpeg(image: np.ndarray, quality: int, codec: str = "jpeg") -> np.ndarray:
    """Encode and decode at `quality` 1 to 100 (chroma halved, as by default in libjpeg and libwebp). Float images are
    rounded to 8 bits on the way. Raises ValueError where the codec refuses the size (WebP above 16383 pixels)."""
    extension, flag = {"jpeg": (".jpg", cv2.IMWRITE_JPEG_QUALITY), "webp": (".webp", cv2.IMWRITE_WEBP_QUALITY)}[codec]
    if max(image.shape[:2]) > (limit := {"jpeg": 65500, "webp": 16383}[codec]):
        raise ValueError(f"{codec} holds at most {limit} pixels a side, the image has {max(image.shape[:2])}")
    pixels = image if image.dtype == np.uint8 else np.rint(image).clip(0, 255).astype(np.uint8)
    _, stream = cv2.imencode(extension, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [flag, int(quality)])
    decoded = cv2.cvtColor(cv2.imdecode(stream, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return decoded.astype(image.dtype, copy=False)


NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


def parse_range(
    text: str | float, flag: str = "range", minimum: float = -np.inf, maximum: float = np.inf
) -> tuple[float, float]:
    """(lo, hi) of "lo-hi", or (v, v) of "v"; numbers may be written 1e-2. ValueError, naming `flag`, for anything else,
    for lo > hi and outside [minimum, maximum]."""
    match = re.fullmatch(rf"\s*({NUMBER})\s*(?:-\s*({NUMBER})\s*)?", str(text))
    if not match:
        raise ValueError(f"{flag} {text!r}: give a number or a range such as 0.5-2")
    lo, hi = float(match[1]), float(match[2] or match[1])
    if lo > hi:
        raise ValueError(f"{flag} {text!r}: the lower end of the range comes first")
    if not minimum <= lo <= hi <= maximum:
        raise ValueError(f"{flag} {text!r}: must lie between {minimum:g} and {maximum:g}")
    return lo, hi


def parse_words(text: str | list[str], flag: str, allowed: tuple[str, ...]) -> list[str]:
    """The words of a comma list (or a list); ValueError, naming `flag`, when there is none or one is not allowed."""
    words = [word.strip() for word in (text.split(",") if isinstance(text, str) else text)]
    words = [word for word in words if word]
    if unknown := [word for word in words if word not in allowed]:
        raise ValueError(f"{flag}: unknown {unknown[0]!r}, choose from {', '.join(allowed)}")
    if not words:
        raise ValueError(f"{flag} is empty, choose from {', '.join(allowed)}")
    return words


def parse_probability(text: str | float, flag: str) -> float:
    """A number in [0, 1]; ValueError, naming `flag`, for anything else."""
    lo, hi = parse_range(text, flag, 0, 1)
    if lo != hi:
        raise ValueError(f"{flag} {text!r}: give one number, not a range")
    return lo


def parse_quality(text: str | float, flag: str) -> tuple[float, float]:
    """A range of whole numbers from 1 to 100; ValueError, naming `flag`, for anything else."""
    lo, hi = parse_range(text, flag, 1, 100)
    if lo != int(lo) or hi != int(hi):
        raise ValueError(f"{flag} {text!r}: give whole numbers")
    return lo, hi


def parse_probabilities(text: str | float, types: list[str]) -> dict[str, float]:
    """Probability by type of "0.8" (all of them) or "noise:0.8,jpeg:0.5" (of those named)."""
    flag = "--degradation_probability"
    if ":" not in str(text):
        return dict.fromkeys(types, parse_probability(text, flag))
    probabilities = {}
    for part in text.split(","):
        word, _, number = part.partition(":")
        if word.strip() not in types:
            raise ValueError(f"{flag}: {word.strip()!r} is not among the degradations {','.join(types)}")
        probabilities[word.strip()] = parse_probability(number, flag)
    return probabilities


# Each draw_* takes its numbers from rng in the order written, always the same count for the same settings and kind.


def pick(words: list[str] | dict[str, float], rng: np.random.Generator) -> str:
    """One of the words, with equal chances or, of a dict, with its weights, which sum to 1."""
    if isinstance(words, dict):
        return list(words)[int(rng.choice(len(words), p=list(words.values())))]
    return words[rng.integers(len(words))]


def draw_downsample(settings: dict, rng: np.random.Generator) -> dict:
    return {
        "type": "downsample",
        "scale": float(rng.uniform(*settings["lr_scale"])),
        "down_kernel": pick(settings["down_kernels"], rng),
        "up_kernel": pick(settings["up_kernels"], rng),
    }


def draw_resize(settings: dict, rng: np.random.Generator) -> dict:
    """Up, down or neither with the chances of `resize_chances`, within `resize_scale` above and below 1."""
    lo, hi = settings["resize_scale"]
    up, down, unit = settings["resize_chances"][0], sum(settings["resize_chances"][:2]), rng.random()
    place = rng.random()
    scale = 1 + place * (hi - 1) if unit < up else 1 - place * (1 - lo) if unit < down else 1.0
    return {
        "type": "resize",
        "scale": float(scale),
        "down_kernel": pick(settings["down_kernels"], rng),
        "up_kernel": pick(settings["up_kernels"], rng),
    }


def draw_noise(settings: dict, rng: np.random.Generator) -> dict:
    kind, levels = pick(settings["noise_kinds"], rng), settings["noise_level"]
    return {
        "type": "noise",
        "kind": kind,
        "level": float(rng.uniform(*(levels[kind] if isinstance(levels, dict) else levels))),
        "gray": bool(rng.random() < settings["gray_noise_probability"]),
        "seed": damage.draw_seed(rng),  # the noise field's own generator
    }


def draw_blur(settings: dict, rng: np.random.Generator) -> dict:
    """Angle 0 to 180 degrees, aspect 0.2 to 1. Generalized and plateau kernels are round four times in five; their beta
    is below 1 (from 0.5; a plateau's: 1) as often as above it (to 4; 2), as in Real-ESRGAN."""
    params = {
        "type": "blur",
        "kind": pick(settings["blur_kinds"], rng),
        "radius": float(rng.uniform(*settings["blur_radius"])),
    }
    angle, aspect = float(rng.uniform(0, 180)), float(rng.uniform(0.2, 1))
    if params["kind"] in ("anisotropic", "motion"):
        params["angle"] = angle
    if params["kind"] == "anisotropic":
        params["aspect"] = aspect
    if params["kind"] in ("generalized", "plateau"):
        lo, hi = {"generalized": (0.5, 4.0), "plateau": (1.0, 2.0)}[params["kind"]]
        is_round, is_below = rng.random(2) < (0.8, 0.5)
        beta = float(rng.uniform(lo, 1) if is_below else rng.uniform(1, hi))
        params |= {"angle": angle, "aspect": 1.0 if is_round else aspect, "beta": beta}
    return params


def draw_jpeg(settings: dict, rng: np.random.Generator) -> dict:
    lo, hi = settings["jpeg_quality"]
    return {
        "type": "jpeg",
        "codec": pick(settings["codecs"], rng),
        "quality": int(rng.integers(int(lo), int(hi), endpoint=True)),
    }


def dark_and_noisy(
    image: np.ndarray, gamma: float, gain: float, shot: float, read: float, rng: np.random.Generator
) -> np.ndarray:
    """`damage.low_light`, then shot and read noise, rounded to 8 bits only after it, as a camera does."""
    dark = damage.low_light(image.astype(np.float32), gamma, gain)
    return damage.as_dtype(noise(noise(dark, shot, rng, "poisson"), read, rng), image.dtype)


DRAW = {
    "downsample": draw_downsample,
    "noise": draw_noise,
    "blur": draw_blur,
    "jpeg": draw_jpeg,
    "resize": draw_resize,
    "fade": damage.draw_fade,
    "yellow": damage.draw_yellow,
    "scratches": damage.draw_scratches,
    "dust": damage.draw_dust,
    "folds": damage.draw_folds,
    "stains": damage.draw_stains,
    "grain": damage.draw_grain,
    "halftone": damage.draw_halftone,
    "low_light": damage.draw_low_light,
    "haze": damage.draw_haze,
}
LAYERS = {
    "scratches": damage.scratches,
    "dust": damage.dust,
    "folds": damage.folds,
    "stains": damage.stains,
}
APPLY = {
    "downsample": downsample,
    "noise": noise,
    "blur": blur,
    "jpeg": jpeg,
    "fade": damage.fade,
    "yellow": damage.yellow,
    "grain": damage.grain,
    "halftone": damage.halftone,
    "low_light": dark_and_noisy,
    "haze": damage.haze,
}
TYPES = tuple(DRAW)
DAMAGE_TYPES = TYPES[TYPES.index("fade") :]

# A preset is one chain or several, of which each sample takes one at random. A step gives what differs from DEFAULTS.
MILD_KINDS = {
    "blur_kinds": ["gaussian", "anisotropic"],
    "down_kernels": ["area", "bilinear", "bicubic"],
    "noise_kinds": ["gaussian", "poisson"],
    "gray_noise_probability": 0.4,
}


def mixed_chain(blur_radius, lr_scale, noise_level, jpeg_quality, probability) -> list[dict]:
    """Blur, downsampling, noise and JPEG in the order in which a camera and an upload do them; noise always."""
    steps = (
        {"type": "blur", "blur_radius": blur_radius, "probability": probability},
        {"type": "downsample", "lr_scale": lr_scale, "probability": probability},
        {"type": "noise", "noise_level": noise_level},
        {"type": "jpeg", "jpeg_quality": jpeg_quality, "probability": probability},
    )
    return [MILD_KINDS | step for step in steps]


# The second-order chain of Real-ESRGAN (https://arxiv.org/abs/2107.10833) with the ranges of its x4 model, at scale 1.
# A noise level is the standard deviation at white: its "Poisson scale" s adds s sqrt(I / 256), so it is s / 16 here.
REAL_BLUR = {
    "type": "blur",
    "blur_kinds": {
        "gaussian": 0.405, "anisotropic": 0.225, "generalized": 0.135, "plateau": 0.135, "sinc": 0.1
    },
}  # fmt: skip
REAL_RESIZE = {"type": "resize", "down_kernels": ["area", "bilinear", "bicubic"], "up_kernels": ["bilinear", "bicubic"]}
REAL_NOISE = {"type": "noise", "noise_kinds": ["gaussian", "poisson"], "gray_noise_probability": 0.4}
REAL_JPEG = {"type": "jpeg", "jpeg_quality": (30, 95)}
REAL_TWICE = [
    REAL_BLUR | {"blur_radius": (0.2, 3)},
    REAL_RESIZE | {"resize_scale": (0.15, 1.5), "resize_chances": (0.2, 0.7, 0.1)},
    REAL_NOISE | {"noise_level": {"gaussian": (1 / 255, 30 / 255), "poisson": (0.05 / 16, 3 / 16)}},
    REAL_JPEG,
    REAL_BLUR | {"blur_radius": (0.2, 1.5), "probability": 0.8},
    REAL_RESIZE | {"resize_scale": (0.3, 1.2), "resize_chances": (0.3, 0.4, 0.3)},
    REAL_NOISE | {"noise_level": {"gaussian": (1 / 255, 25 / 255), "poisson": (0.05 / 16, 2.5 / 16)}},
]
REAL_LAST = [
    REAL_RESIZE | {"resize_scale": (1, 1)},  # back to the size of the image
    {"type": "blur", "blur_kinds": ["sinc"], "blur_radius": (1, 2.5), "probability": 0.8},
]
PRESETS = {
    "light": [mixed_chain((0.2, 1), (1, 1.5), (2 / 255, 10 / 255), (70, 95), 0.5)],
    "medium": [mixed_chain((0.3, 1.5), (1, 2), (5 / 255, 25 / 255), (50, 90), 0.6)],
    "heavy": [mixed_chain((0.5, 2.5), (1, 3), (20 / 255, 50 / 255), (30, 70), 0.7)],
    "real_world": [[*REAL_TWICE, *REAL_LAST, REAL_JPEG], [*REAL_TWICE, REAL_JPEG, *REAL_LAST]],
    # In the order of a photograph's life: taken, printed, aged, handled, scanned, uploaded.
    "old_photo": [
        [
            {"type": "blur", "blur_radius": (0.3, 1.5), "probability": 0.7},
            {"type": "grain", "probability": 0.6},
            {"type": "halftone", "probability": 0.1},
            {"type": "fade", "probability": 0.8},
            {"type": "yellow", "probability": 0.6},
            {"type": "stains", "probability": 0.3},
            {"type": "folds", "probability": 0.4},
            {"type": "scratches", "probability": 0.7},
            {"type": "dust", "probability": 0.6},
            MILD_KINDS | {"type": "downsample", "lr_scale": (1, 2), "probability": 0.4},
            MILD_KINDS | {"type": "noise", "noise_level": (5 / 255, 20 / 255), "probability": 0.4},
            {"type": "jpeg", "jpeg_quality": (40, 100), "probability": 0.7},
        ]
    ],
}


def draw_degradations(settings: dict, rng: np.random.Generator) -> Params:
    """Draw one sample's degradations, in the order of their application; JSON-safe.

    Drawn from `rng`: which chain, when there are several; for each of its steps whether it is applied, then its
    parameters, whether or not it is, so that a probability never changes what the other steps draw; last the
    permutation, when the order is shuffled.
    """
    chains, drawn = settings["chains"], []
    for step in chains[rng.integers(len(chains))] if len(chains) > 1 else chains[0]:
        applied = rng.random() < step["probability"]
        params = DRAW[step["type"]](step, rng)
        if applied:
            drawn.append(params)
    if settings["order"] == "shuffled":
        drawn = [drawn[i] for i in rng.permutation(len(drawn))]
    return drawn


def call_arguments(step: dict) -> dict:
    """Keyword arguments of the function that applies a drawn step: its seed becomes the generator."""
    arguments = {name: value for name, value in step.items() if name not in ("type", "seed")}
    return arguments | ({"rng": np.random.default_rng(step["seed"])} if "seed" in step else {})


def apply_degradations(image: np.ndarray, params: Params) -> np.ndarray:
    """Apply what `draw_degradations` drew. The result never shares memory with `image`.

    After a "resize" the following steps see the image at the new size; in the end it is brought back to its own."""
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0 or image.dtype not in (np.uint8, np.float32):
        raise ValueError(f"a degradation needs a (H, W, 3) uint8 or float32 image, got {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    degraded = image.copy()
    for step in params:
        word, arguments = step["type"], call_arguments(step)
        if word == "resize":
            degraded = rescale(degraded, height, width, **arguments)
        elif word in LAYERS:
            degraded = damage.apply_layer(degraded, LAYERS[word](*degraded.shape[:2], **arguments))
        else:
            degraded = APPLY[word](degraded, **arguments)
    return rescale(degraded, height, width, 1) if degraded.shape != image.shape else degraded


def damage_mask(height: int, width: int, params: Params) -> np.ndarray:
    """(height, width) float32 in [0, 1]: how opaque the scratches, dust, folds and stains lie that `params` put on an
    image of this size. 0: none there, though a later step of the chain (blur, resize, JPEG) may smear them over it."""
    mask = np.zeros((height, width), np.float32)
    for step in params:
        if step["type"] == "resize":
            size = max(1, round(step["scale"] * height)), max(1, round(step["scale"] * width))
            mask = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_AREA)
        elif step["type"] in LAYERS:
            mask = np.maximum(mask, LAYERS[step["type"]](*mask.shape, **call_arguments(step)).mask)
    return mask if mask.shape == (height, width) else cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA)


def degrade(image: np.ndarray, rng: np.random.Generator, settings: dict) -> tuple[np.ndarray, Params]:
    """Draw and apply: the degraded image and the parameters that `apply_degradations` repeats it from."""
    params = draw_degradations(settings, rng)
    return apply_degradations(image, params), params


# By the settings of a step that have one: the flag, what holds without flag and preset, what reads the flag's text, and
# the types of step that read the setting.
OPTIONS = {
    "lr_scale": ("--lr_scale", "8", partial(parse_range, minimum=1, maximum=64), ("downsample",)),
    "noise_level": ("--noise_level", "0.05", partial(parse_range, minimum=0, maximum=1), ("noise",)),
    "blur_radius": ("--blur_radius", "1.0", partial(parse_range, minimum=0, maximum=100), ("blur",)),
    "jpeg_quality": ("--jpeg_quality", "75", parse_quality, ("jpeg",)),
    "down_kernels": (
        "--downsample_kernel", "bicubic", partial(parse_words, allowed=DOWN_KERNELS), ("downsample", "resize")
    ),
    "up_kernels": ("--upsample_kernel", "bicubic", partial(parse_words, allowed=UP_KERNELS), ("downsample", "resize")),
    "noise_kinds": ("--noise_kind", "gaussian", partial(parse_words, allowed=NOISE_KINDS), ("noise",)),
    "gray_noise_probability": ("--gray_noise_probability", "0", parse_probability, ("noise",)),
    "blur_kinds": ("--blur_kind", "gaussian", partial(parse_words, allowed=BLUR_KINDS), ("blur",)),
    "codecs": ("--jpeg_codec", "jpeg", partial(parse_words, allowed=CODECS), ("jpeg",)),
    "damage_strength": ("--damage_strength", "1", partial(parse_range, minimum=0, maximum=3), DAMAGE_TYPES),
}  # fmt: skip
# {option of add_degradation_args: what holds without it and without a preset}
DEFAULTS = {flag: default for flag, default, *_ in OPTIONS.values()} | {
    "--degradation_preset": None, "--degradation_types": "downsample", "--degradation_probability": "1",
    "--degradation_order": "fixed"}  # fmt: skip
FIXED_SETTINGS = {"resize_scale": (0.15, 1.5), "resize_chances": (0.2, 0.7, 0.1)}


def make_degrader(
    types: str | list[str] | None = None,
    lr_scale: str | float | None = None,
    noise_level: str | float | None = None,
    blur_radius: str | float | None = None,
    jpeg_quality: str | float | None = None,
    probabilities: str | float | None = None,
    order: str = "fixed",
    down_kernels: str | list[str] | None = None,
    up_kernels: str | list[str] | None = None,
    noise_kinds: str | list[str] | None = None,
    gray_noise_probability: str | float | None = None,
    blur_kinds: str | list[str] | None = None,
    codecs: str | list[str] | None = None,
    damage_strength: str | float | None = None,
    preset: str | None = None,
) -> Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, Params]]:
    """Check the settings and return `degrade(image, rng) -> (degraded, params)`, which can be pickled.

    Strengths are numbers or "lo-hi" ranges, drawn uniformly (`jpeg_quality`: whole numbers, both ends included).
    `types` (default "downsample") are applied in the order listed unless `order` is "shuffled"; a type listed twice is
    applied twice. Lists of kernels, kinds and codecs are drawn from with equal chances. A `preset`, one of PRESETS,
    brings types, strengths and probabilities instead; `types` must not be given beside it, nor what none of its steps
    reads, and what else is given holds in all of its steps. Without one, what is None is as in OPTIONS and every
    probability is 1.
    Raises ValueError naming the flag of `add_degradation_args` that is wrong.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"--degradation_preset: unknown {preset!r}, choose from {', '.join(PRESETS)}")
    if preset is not None and types is not None:
        raise ValueError(f"--degradation_types beside --degradation_preset {preset}, which has its own; drop either "
                         "(run_scripts.sh and train_flow_matching.sh bring types unless --degradation_preset stands on "
                         "their command line: give it there, not in a --config file)")
    if order not in ORDERS:
        raise ValueError(f"--degradation_order: unknown {order!r}, choose from {', '.join(ORDERS)}")
    if preset is None:
        words = parse_words("downsample" if types is None else types, "--degradation_types", TYPES)
        chains = [[{"type": word} for word in words]]
    else:
        chains = PRESETS[preset]
        words = list(dict.fromkeys(step["type"] for chain in chains for step in chain))
    chances = {} if probabilities is None else parse_probabilities(probabilities, words)
    texts = {
        "lr_scale": lr_scale,
        "noise_level": noise_level,
        "blur_radius": blur_radius,
        "jpeg_quality": jpeg_quality,
        "down_kernels": down_kernels,
        "up_kernels": up_kernels,
        "noise_kinds": noise_kinds,
        "gray_noise_probability": gray_noise_probability,
        "blur_kinds": blur_kinds,
        "codecs": codecs,
        "damage_strength": damage_strength,
    }
    defaults = FIXED_SETTINGS | {name: read(default, flag) for name, (flag, default, read, _) in OPTIONS.items()}
    given = {name: OPTIONS[name][2](text, OPTIONS[name][0]) for name, text in texts.items() if text is not None}
    for flag, _, _, readers in (OPTIONS[name] for name in given if preset is not None):
        if not set(readers) & set(words):
            raise ValueError(f"{flag} beside --degradation_preset {preset}, which has no step that reads it "
                             f"({', '.join(readers)}); drop {flag}, or choose another preset")

    def complete(step):
        chance = chances.get(step["type"], step.get("probability", 1.0))
        return defaults | step | given | {"probability": chance}

    chains = [[complete(step) for step in chain] for chain in chains]
    return partial(degrade, settings={"chains": chains, "order": order})


def add_degradation_args(parser: ArgumentParser) -> None:
    """Add the "degradation" group. A strength is a value or a range "lo-hi" drawn from uniformly for each sample."""
    group = parser.add_argument_group("degradation")

    def add(flag, text):
        group.add_argument(flag, help=f"{text}; {DEFAULTS[flag]} where no preset says otherwise")

    group.add_argument("--degradation_preset", help=f"a chain that is made up already: {', '.join(PRESETS)}")
    add("--degradation_types", f"comma list of {', '.join(TYPES)}")
    add("--lr_scale", "downsampling factor, 1 to 64; value or lo-hi")
    add("--noise_level", "sigma on [0, 1] (poisson: at white); value or lo-hi")
    add("--blur_radius", "Gaussian sigma or disc radius in pixels; value or lo-hi")
    add("--jpeg_quality", "1 to 100; value or lo-hi")
    add("--degradation_probability", '"0.8" or by type "noise:0.8,jpeg:0.5"')
    group.add_argument("--degradation_order", default="fixed", help="fixed (as the types are listed) or shuffled")
    add("--downsample_kernel", f"comma list of {', '.join(DOWN_KERNELS)}")
    add("--upsample_kernel", f"comma list of {', '.join(UP_KERNELS)}")
    add("--noise_kind", f"comma list of {', '.join(NOISE_KINDS)}")
    add("--gray_noise_probability", "how often all channels get the same noise")
    add("--blur_kind", f"comma list of {', '.join(BLUR_KINDS)}")
    add("--jpeg_codec", f"comma list of {', '.join(CODECS)}")
    add("--damage_strength", f"0 to 3, scales {', '.join(DAMAGE_TYPES)}; value or lo-hi")


def degrader_from_args(args: Namespace) -> Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, Params]]:
    """`make_degrader` with the options of `add_degradation_args`. Without a preset those that were left out are set to
    their defaults in `args`, so that what is written about the run names them."""
    if args.degradation_preset is None:
        for flag, default in DEFAULTS.items():
            if getattr(args, flag[2:]) is None:
                setattr(args, flag[2:], default)
    return make_degrader(
        types=args.degradation_types,
        lr_scale=args.lr_scale,
        noise_level=args.noise_level,
        blur_radius=args.blur_radius,
        jpeg_quality=args.jpeg_quality,
        probabilities=args.degradation_probability,
        order=args.degradation_order,
        down_kernels=args.downsample_kernel,
        up_kernels=args.upsample_kernel,
        noise_kinds=args.noise_kind,
        gray_noise_probability=args.gray_noise_probability,
        blur_kinds=args.blur_kind,
        codecs=args.jpeg_codec,
        damage_strength=args.damage_strength,
        preset=args.degradation_preset,
    )


def check_not_degraded(args: Namespace) -> None:
    """ValueError for an option of `add_degradation_args` that is not at its default, where it would be read by nothing:
    the images are stored pairs."""
    for flag, default in DEFAULTS.items():
        value = getattr(args, flag[2:], None)  # a caller may do without these options
        if value not in (None, default):
            raise ValueError(f"{flag} {value}: stored pairs (--lr_root, or a column of degraded images) are not "
                             "degraded again; leave it out")

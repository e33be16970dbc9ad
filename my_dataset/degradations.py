"""Image degradations: downsampling, noise, blur and compression of RGB arrays.

Every image is (H, W, 3) RGB, uint8 or float32, with values in [0, 255]; what comes out has the same shape and dtype.
A function that draws takes the `numpy.random.Generator` it draws from. `make_degrader` chains them: it first draws the
parameters of one sample, then applies them, and returns both, so `apply_degradations` can repeat a sample exactly.
"""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
from PIL import Image

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
BLUR_KINDS = ("gaussian", "anisotropic", "motion", "defocus")
CODECS = ("jpeg", "webp")
ORDERS = ("fixed", "shuffled")

STRIP_PIXELS = 1 << 15  # noise is made in strips that stay in the cache and leave no large arrays to page in

Params = list[dict[str, str | float | bool]]


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


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Isotropic Gaussian blur of `sigma` pixels: `gaussian_kernel(sigma)` applied separably. cv2.GaussianBlur is no
    faster on uint8 and rounds its kernel to 8 bits."""
    kernel = cv2.getGaussianKernel(2 * int(np.ceil(4 * sigma)) + 1, sigma)
    return clip_range(cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT))


def blur(
    image: np.ndarray, radius: float, kind: str = "gaussian", angle: float = 0.0, aspect: float = 1.0
) -> np.ndarray:
    """Blur with reflected borders. What `radius` (pixels; 0 changes nothing) means depends on `kind`:

    "gaussian" sigma, as in PIL.ImageFilter.GaussianBlur(radius); "anisotropic" the larger sigma, lying at `angle`
    degrees, the smaller being aspect * radius; "motion" a line of length 2 radius + 1 at `angle`; "defocus" a disc of
    that radius.
    """
    if radius == 0:
        return image.copy()
    if kind == "gaussian":
        return gaussian_blur(image, radius)
    kernels = {
        "anisotropic": lambda: gaussian_kernel(radius, aspect * radius, angle),
        "motion": lambda: motion_kernel(2 * radius + 1, angle),
        "defocus": lambda: defocus_kernel(radius),
    }
    # filter2D correlates; the kernels are symmetric about their centre, so that is a convolution
    return clip_range(cv2.filter2D(image, -1, kernels[kind](), borderType=cv2.BORDER_REFLECT))


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


def parse_probabilities(text: str | float, types: list[str]) -> dict[str, float]:
    """Probability by type of "0.8" (all of them) or "noise:0.8,jpeg:0.5" (1 for those not named)."""
    flag = "--degradation_probability"
    if ":" not in str(text):
        return dict.fromkeys(types, parse_probability(text, flag))
    probabilities = dict.fromkeys(types, 1.0)
    for part in text.split(","):
        word, _, number = part.partition(":")
        if word.strip() not in probabilities:
            raise ValueError(f"{flag}: {word.strip()!r} is not among --degradation_types {','.join(types)}")
        probabilities[word.strip()] = parse_probability(number, flag)
    return probabilities


# Each draw_* takes its numbers from rng in the order written, always the same count for the same settings and kind.


def pick(words: list[str], rng: np.random.Generator) -> str:
    return words[rng.integers(len(words))]


def draw_downsample(settings: dict, rng: np.random.Generator) -> dict:
    return {
        "type": "downsample",
        "scale": float(rng.uniform(*settings["lr_scale"])),
        "down_kernel": pick(settings["down_kernels"], rng),
        "up_kernel": pick(settings["up_kernels"], rng),
    }


def draw_noise(settings: dict, rng: np.random.Generator) -> dict:
    return {
        "type": "noise",
        "kind": pick(settings["noise_kinds"], rng),
        "level": float(rng.uniform(*settings["noise_level"])),
        "gray": bool(rng.random() < settings["gray_noise_probability"]),
        "seed": int(rng.integers(2**53)),  # the noise field's own generator; exact as a JSON number
    }


def draw_blur(settings: dict, rng: np.random.Generator) -> dict:
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
    return params


def draw_jpeg(settings: dict, rng: np.random.Generator) -> dict:
    lo, hi = settings["jpeg_quality"]
    return {
        "type": "jpeg",
        "codec": pick(settings["codecs"], rng),
        "quality": int(rng.integers(int(lo), int(hi), endpoint=True)),
    }


DRAW = {"downsample": draw_downsample, "noise": draw_noise, "blur": draw_blur, "jpeg": draw_jpeg}
APPLY = {
    "downsample": downsample,
    "noise": lambda image, seed, **params: noise(image, rng=np.random.default_rng(seed), **params),
    "blur": blur,
    "jpeg": jpeg,
}
TYPES = tuple(DRAW)


def draw_degradations(settings: dict, rng: np.random.Generator) -> Params:
    """Draw one sample's degradations, in the order of their application; JSON-safe.

    Drawn from `rng`: for each listed type whether it is applied, then its parameters, whether or not it is, so that a
    probability never changes what the other types draw; last the permutation, when the order is shuffled.
    """
    drawn = []
    for word in settings["types"]:
        applied = rng.random() < settings["probabilities"][word]
        params = DRAW[word](settings, rng)
        if applied:
            drawn.append(params)
    if settings["order"] == "shuffled":
        drawn = [drawn[i] for i in rng.permutation(len(drawn))]
    return drawn


def apply_degradations(image: np.ndarray, params: Params) -> np.ndarray:
    """Apply what `draw_degradations` drew. The result never shares memory with `image`."""
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0 or image.dtype not in (np.uint8, np.float32):
        raise ValueError(f"a degradation needs a (H, W, 3) uint8 or float32 image, got {image.shape} {image.dtype}")
    degraded = image.copy()
    for step in params:
        arguments = {name: value for name, value in step.items() if name != "type"}
        degraded = APPLY[step["type"]](degraded, **arguments)
    return degraded


def degrade(image: np.ndarray, rng: np.random.Generator, settings: dict) -> tuple[np.ndarray, Params]:
    """Draw and apply: the degraded image and the parameters that `apply_degradations` repeats it from."""
    params = draw_degradations(settings, rng)
    return apply_degradations(image, params), params


def make_degrader(
    types: str | list[str] = "downsample",
    lr_scale: str | float = "8",
    noise_level: str | float = "0.05",
    blur_radius: str | float = "1.0",
    jpeg_quality: str | float = "75",
    probabilities: str | float = "1",
    order: str = "fixed",
    down_kernels: str | list[str] = "bicubic",
    up_kernels: str | list[str] = "bicubic",
    noise_kinds: str | list[str] = "gaussian",
    gray_noise_probability: str | float = "0",
    blur_kinds: str | list[str] = "gaussian",
    codecs: str | list[str] = "jpeg",
) -> Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, Params]]:
    """Check the settings and return `degrade(image, rng) -> (degraded, params)`, which can be pickled.

    Strengths are numbers or "lo-hi" ranges, drawn uniformly (`jpeg_quality`: whole numbers, both ends included).
    `types` are applied in the order listed unless `order` is "shuffled"; a type listed twice is applied twice, which
    makes a second-order pipeline. Lists of kernels, kinds and codecs are drawn from with equal chances.
    Raises ValueError naming the flag of `add_degradation_args` that is wrong.
    """
    types = parse_words(types, "--degradation_types", TYPES)
    settings = {
        "types": types,
        "probabilities": parse_probabilities(probabilities, types),
        "order": order,
        "lr_scale": parse_range(lr_scale, "--lr_scale", 1, 64),
        "down_kernels": parse_words(down_kernels, "--downsample_kernel", DOWN_KERNELS),
        "up_kernels": parse_words(up_kernels, "--upsample_kernel", UP_KERNELS),
        "noise_level": parse_range(noise_level, "--noise_level", 0, 1),
        "noise_kinds": parse_words(noise_kinds, "--noise_kind", NOISE_KINDS),
        "gray_noise_probability": parse_probability(gray_noise_probability, "--gray_noise_probability"),
        "blur_radius": parse_range(blur_radius, "--blur_radius", 0, 100),
        "blur_kinds": parse_words(blur_kinds, "--blur_kind", BLUR_KINDS),
        "jpeg_quality": parse_range(jpeg_quality, "--jpeg_quality", 1, 100),
        "codecs": parse_words(codecs, "--jpeg_codec", CODECS),
    }
    if order not in ORDERS:
        raise ValueError(f"--degradation_order: unknown {order!r}, choose from {', '.join(ORDERS)}")
    if any(quality != int(quality) for quality in settings["jpeg_quality"]):
        raise ValueError(f"--jpeg_quality {jpeg_quality!r}: give whole numbers")
    return partial(degrade, settings=settings)


def add_degradation_args(parser: ArgumentParser) -> None:
    """Add the "degradation" group. A strength is a value or a range "lo-hi" drawn from uniformly for each sample."""
    group = parser.add_argument_group("degradation")
    group.add_argument("--degradation_types", default="downsample", help=f"comma list of {', '.join(TYPES)}")
    group.add_argument("--lr_scale", default="8", help="downsampling factor, 1 to 64; value or lo-hi")
    group.add_argument("--noise_level", default="0.05", help="sigma on [0, 1] (poisson: at white); value or lo-hi")
    group.add_argument("--blur_radius", default="1.0", help="Gaussian sigma or disc radius in pixels; value or lo-hi")
    group.add_argument("--jpeg_quality", default="75", help="1 to 100; value or lo-hi")
    group.add_argument("--degradation_probability", default="1", help='"0.8" or by type "noise:0.8,jpeg:0.5"')
    group.add_argument("--degradation_order", default="fixed", help="fixed (as the types are listed) or shuffled")
    group.add_argument("--downsample_kernel", default="bicubic", help=f"comma list of {', '.join(DOWN_KERNELS)}")
    group.add_argument("--upsample_kernel", default="bicubic", help=f"comma list of {', '.join(UP_KERNELS)}")
    group.add_argument("--noise_kind", default="gaussian", help=f"comma list of {', '.join(NOISE_KINDS)}")
    group.add_argument("--gray_noise_probability", default="0", help="how often all channels get the same noise")
    group.add_argument("--blur_kind", default="gaussian", help=f"comma list of {', '.join(BLUR_KINDS)}")
    group.add_argument("--jpeg_codec", default="jpeg", help=f"comma list of {', '.join(CODECS)}")


def degrader_from_args(args: Namespace) -> Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, Params]]:
    """`make_degrader` with the options of `add_degradation_args`."""
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
    )

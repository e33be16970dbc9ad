"""Damage that photographs suffer: fading, yellowing, scratches, dust, folds, stains, grain, halftone, low light, haze.

Conventions as in degradations.py: an image is (H, W, 3) RGB, uint8 or float32, with values in [0, 255], and comes back
in the same shape and dtype; what draws takes its `numpy.random.Generator`. Lengths are in pixels; counts are given for
512 x 512 pixels. Scratches, dust, folds and stains touch a part of the pixels only: they are made as a `Layer`, which
knows where it lies, without looking at the image.

Each `draw_*` draws the parameters of one kind within the range that its docstring names, times settings'
`damage_strength`: at 0 the kind changes nothing. Where no source is named, the range is this project's own choice.
"""

from typing import NamedTuple

import cv2
import numpy as np

REFERENCE_PX = 512  # counts are for a square of this side
PAPER = (250.0, 245.0, 232.0)  # bare photographic paper
LOCAL_KINDS = ("scratches", "dust", "folds", "stains")


class Layer(NamedTuple):
    """Local damage: image * gain + offset. gain (H, W, 1 or 3) and offset (H, W, 3) float32, 1 and 0 where nothing is
    damaged; mask (H, W) float32 in [0, 1], the opacity of the damage, 0 exactly where gain is 1 and offset 0."""

    gain: np.ndarray
    offset: np.ndarray
    mask: np.ndarray


def as_dtype(pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Float pixels clipped to [0, 255], rounded for uint8."""
    pixels = pixels.clip(0, 255)
    return np.rint(pixels).astype(np.uint8) if dtype == np.uint8 else pixels.astype(np.float32)


def apply_layer(image: np.ndarray, layer: Layer) -> np.ndarray:
    return as_dtype(image * layer.gain + layer.offset, image.dtype)


def luma(image: np.ndarray) -> np.ndarray:
    """(H, W, 1) float32 luma of BT.601 in [0, 255]."""
    return cv2.cvtColor(np.asarray(image, np.float32), cv2.COLOR_RGB2GRAY)[..., None]


def smooth_noise(height: int, width: int, cell: float, rng: np.random.Generator) -> np.ndarray:
    """(H, W) float32 field of mean 0 and variance about 0.5 that varies over distances of about `cell` pixels."""
    grid = rng.standard_normal([max(2, round(side / cell) + 1) for side in (height, width)], dtype=np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def smoothstep(x: np.ndarray) -> np.ndarray:
    x = x.clip(0, 1)
    return x * x * (3 - 2 * x)


# The whole picture


def fade(
    image: np.ndarray, black: list[float], white: list[float], gamma: list[float], saturation: float
) -> np.ndarray:
    """Dyes that have bleached: the colours are drawn towards their luma (`saturation` 1 keeps them, 0 is grey), then
    each channel's tones x in [0, 1] become black + (white - black) x^gamma. Three values each, black <= white."""
    grey = luma(image)
    tones = ((grey + saturation * (image - grey)) / 255).clip(0, 1)
    black, white = np.float32(black), np.float32(white)
    faded = np.dstack([cv2.pow(np.ascontiguousarray(tones[..., c]), gamma[c]) for c in range(3)])
    return as_dtype(255 * (black + (white - black) * faded), image.dtype)


def yellow(image: np.ndarray, amount: float, paper: list[float]) -> np.ndarray:
    """(1 - amount) image + amount luma paper: towards the picture printed in one ink on paper of the RGB colour `paper`
    in [0, 1]. White takes on the paper's colour, black stays black."""
    return as_dtype((1 - amount) * image + amount * luma(image) * np.float32(paper), image.dtype)


def grain(image: np.ndarray, sigma: float, amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """Film grain: normal noise, blurred by `sigma` pixels and brought back to variance 1, added to all channels alike
    with a standard deviation of 255 amplitude sqrt(4 L (1 - L)): strongest at the middle luma L, none in black and
    white."""
    level = luma(image)[..., 0] / 255
    kernel = cv2.getGaussianKernel(2 * int(np.ceil(4 * sigma)) + 1, sigma)
    field = rng.standard_normal(level.shape, dtype=np.float32)
    field = cv2.sepFilter2D(field, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT) / np.float32((kernel**2).sum())
    field *= 255 * amplitude * np.sqrt((4 * level * (1 - level)).clip(0))
    return as_dtype(image + field[..., None], image.dtype)


def _screen_ranks() -> np.ndarray:
    """Share of a screen below each of 256 values of (cos a + cos b) / 2 from -1 to 1, a and b even on the circle."""
    wave = np.cos(2 * np.pi * (np.arange(1024) + 0.5) / 1024)
    values = np.sort(((wave[:, None] + wave) / 2).ravel())
    return (np.searchsorted(values, np.linspace(-1, 1, 256)) / values.size).astype(np.float32)


SCREEN_RANKS = _screen_ranks()
SCREEN_ANGLES = (15.0, 75.0, 0.0)  # of cyan, magenta and yellow, which take away red, green and blue


def halftone(image: np.ndarray, pitch: float, angle: float, amount: float) -> np.ndarray:
    """Colour print: each channel is screened into dots `pitch` pixels apart at its own angle (plus `angle` degrees),
    whose area is the tone's, and mixed with the image by `amount` in [0, 1]. Rims are smooth over about one pixel."""
    y, x = np.indices(image.shape[:2], np.float32)
    tones, dots = image.astype(np.float32) / 255, np.empty(image.shape, np.float32)
    for channel, screen_angle in enumerate(SCREEN_ANGLES):
        turn = np.deg2rad(screen_angle + angle)
        cos, sin = (np.float32(2 * np.pi / pitch * f(turn)) for f in (np.cos, np.sin))
        wave = (np.cos(cos * x - sin * y) + np.cos(sin * x + cos * y)) / 2
        ranks = cv2.LUT(np.rint(127.5 + 127.5 * wave).astype(np.uint8), SCREEN_RANKS)
        dots[..., channel] = 0.5 + (tones[..., channel] - ranks) * pitch / 2
    return as_dtype(255 * ((1 - amount) * tones + amount * dots.clip(0, 1)), image.dtype)


def low_light(image: np.ndarray, gamma: float, gain: float) -> np.ndarray:
    """gain x^gamma of tones x in [0, 1]: a scene in too little light, before the sensor's noise."""
    tones = cv2.pow(np.ascontiguousarray(image, np.float32) / 255, gamma)
    return as_dtype(255 * gain * tones, image.dtype)


def depth_map(height: int, width: int, gradient: float, rng: np.random.Generator) -> np.ndarray:
    """(H, W) float32 in [0, 1], 1 farthest: a ramp from the bottom (near) to the top, of weight `gradient` in [0, 1],
    and smooth noise, for photographs whose depth is not known."""
    ramp = np.linspace(1, 0, height, dtype=np.float32)[:, None]
    field = smooth_noise(height, width, max(height, width) / 3, rng)
    lo, hi = float(field.min()), float(field.max())
    field = (field - lo) / (hi - lo) if hi > lo else np.zeros_like(field)
    return gradient * ramp + (1 - gradient) * field


def haze(image: np.ndarray, airlight: float, beta: float, gradient: float, rng: np.random.Generator) -> np.ndarray:
    """The scattering model I = J t + 255 airlight (1 - t) with transmission t = exp(-beta depth); see `depth_map`."""
    transmission = np.exp(-beta * depth_map(*image.shape[:2], gradient, rng))[..., None]
    return as_dtype(image * transmission + 255 * airlight * (1 - transmission), image.dtype)


# A part of the pixels


def draw_number(count: float, height: int, width: int, rng: np.random.Generator, power: float = 1.0) -> int:
    """Whole number with the expectation count (H W / 512^2)^power."""
    return int(count * (height * width / REFERENCE_PX**2) ** power + rng.random())


CANVAS_SCALE, CANVAS_SHIFT = 2, 4  # lines are drawn at twice the size, with points in sixteenths of a pixel


def _canvas_points(points: np.ndarray) -> np.ndarray:
    return np.rint((CANVAS_SCALE * points + 0.5) * 2**CANVAS_SHIFT).astype(np.int32)


def _opacity(canvas: np.ndarray, height: int, width: int) -> np.ndarray:
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _marks(bright: np.ndarray, dark: np.ndarray, rng: np.random.Generator) -> Layer:
    """Layer of bright marks, in the colour of paper, under dark ones, both opacities (H, W)."""
    colours = np.float32(PAPER) * np.float32(rng.uniform(0.85, 1)), np.full(3, rng.uniform(10, 60), np.float32)
    bright, dark = bright[..., None], dark[..., None]
    offset = bright * (1 - dark) * colours[0] + dark * colours[1]
    gain = (1 - bright) * (1 - dark)
    return Layer(gain, offset, 1 - gain[..., 0])


def _draw_path(canvas: np.ndarray, points: np.ndarray, opacities: np.ndarray, thickness: int) -> None:
    corners = _canvas_points(points)
    for start, end, opacity in zip(corners[:-1], corners[1:], (255 * opacities).astype(int).tolist(), strict=False):
        if opacity:
            cv2.line(canvas, start.tolist(), end.tolist(), opacity, thickness, cv2.LINE_AA, CANVAS_SHIFT)


def _curve(centre: np.ndarray, length: float, angle: float, bend: float, points: int) -> np.ndarray:
    """(points, 2) x, y along a quadratic Bezier curve whose middle lies `bend` lengths off the straight line."""
    t = np.linspace(0, 1, points)
    along, across = length * (t - 0.5), length * bend * 4 * t * (1 - t)
    direction = np.array([np.cos(angle), np.sin(angle)])
    return centre + along[:, None] * direction + across[:, None] * np.array([-direction[1], direction[0]])


def scratches(height: int, width: int, count: float, rng: np.random.Generator) -> Layer:
    """`count` scratches per 512 x 512 pixels, 40 to 600 pixels long and 0.5 to 3 wide, of opacity 0.3 to 1: six in ten
    near the vertical, as film is scratched by its transport, the others bent and at any angle; a third dark, the bright
    ones with a shaded rim; four in ten broken, all fainter towards their ends."""
    canvases = [np.zeros((CANVAS_SCALE * height, CANVAS_SCALE * width), np.uint8) for _ in range(2)]
    for _ in range(draw_number(count, height, width, rng)):
        vertical, broken, is_dark = rng.random(3) < (0.6, 0.4, 1 / 3)
        length, pieces = 40 * 15 ** rng.random(), 32
        angle = np.pi / 2 + 0.06 * rng.standard_normal() if vertical else rng.uniform(0, np.pi)
        bend = rng.uniform(-0.02, 0.02) if vertical else rng.uniform(-0.2, 0.2)
        path = _curve(rng.random(2) * (width, height), length, angle, bend, pieces + 1)
        path += np.cumsum(rng.normal(0, 0.01 * length / pieces + 0.1, path.shape), axis=0)
        wear = smooth_noise(1, pieces, 4, rng)[0]
        opacities = rng.uniform(0.3, 1) * (0.85 + 0.3 * wear).clip(0.3, 1)
        opacities *= np.sin(np.pi * (np.arange(pieces) + 0.5) / pieces) ** 0.4
        if broken:
            opacities *= wear > -0.2
        _draw_path(canvases[int(is_dark)], path, opacities, max(1, round(CANVAS_SCALE * rng.uniform(0.5, 3))))
    bright, dark = (_opacity(canvas, height, width) for canvas in canvases)
    rough = rng.uniform(0.6, 1, (height, width)).astype(np.float32)
    bright *= rough
    rim = np.zeros_like(bright)
    rim[1:, 1:] = 0.5 * (bright[:-1, :-1] - bright[1:, 1:]).clip(0)  # the light comes from the upper left
    return _marks(bright, np.maximum(dark * rough, rim), rng)


def dust(height: int, width: int, count: float, rng: np.random.Generator) -> Layer:
    """`count` specks per 512 x 512 pixels, ragged and of radius 0.5 to 4 pixels (small ones are the most), of opacity
    0.4 to 1, three in ten dark; one in twelve is a curled hair of 8 to 40 pixels instead."""
    canvases = [np.zeros((CANVAS_SCALE * height, CANVAS_SCALE * width), np.uint8) for _ in range(2)]
    for _ in range(draw_number(count, height, width, rng)):
        is_hair, is_dark = rng.random(2) < (1 / 12, 0.3)
        centre, opacity = rng.random(2) * (width, height), rng.uniform(0.4, 1)
        canvas = canvases[int(is_dark)]
        if is_hair:
            path = _curve(centre, rng.uniform(8, 40), rng.uniform(0, np.pi), rng.uniform(-0.5, 0.5), 13)
            _draw_path(canvas, path, np.full(12, opacity), 1)
        else:
            angles = 2 * np.pi * (np.arange(8) + rng.uniform(-0.4, 0.4, 8)) / 8
            radii = (0.5 + 3.5 * rng.random() ** 4) * rng.uniform(0.5, 1.1, 8)
            corners = centre + radii[:, None] * np.stack([np.cos(angles), rng.uniform(0.5, 1) * np.sin(angles)], axis=1)
            cv2.fillPoly(canvas, [_canvas_points(corners)], int(255 * opacity), cv2.LINE_AA, CANVAS_SHIFT)
    return _marks(*(_opacity(canvas, height, width) for canvas in canvases), rng)


def folds(height: int, width: int, count: float, rng: np.random.Generator) -> Layer:
    """`count` folds per 512 pixels of side, right across the picture: a soft ridge, whose one flank lies in shade and
    whose other shines, and along it cracks where the emulsion is gone and the paper shows."""
    y, x = np.indices((height, width), np.float32)
    kept, light = np.ones((height, width), np.float32), np.zeros((height, width), np.float32)
    mask = np.zeros((height, width), np.float32)
    jagged = smooth_noise(height, width, 2, rng)
    for _ in range(draw_number(count, height, width, rng, power=0.5)):
        angle = rng.choice([0, np.pi / 2]) + 0.1 * rng.standard_normal()
        if rng.random() < 0.25:  # a corner that was bent over
            angle = rng.uniform(0, np.pi)
        left, top = rng.uniform(0.15, 0.85, 2) * (width, height)
        sin, cos = float(np.sin(angle)), float(np.cos(angle))  # Python's numbers keep float32 arrays float32
        across = sin * (x - float(left)) - cos * (y - float(top)) + 1.5 * smooth_noise(height, width, 80, rng)
        u = across / (3 * rng.uniform(1.5, 4.5))
        envelope = (1 - u**2).clip(0) ** 2
        flank = int(rng.choice([-1, 1])) * rng.uniform(0.08, 0.3) * 3.5 * u * envelope  # 3.5 u envelope peaks at 1
        wear = smooth_noise(height, width, 20, rng) + rng.uniform(-0.3, 0.5)
        half_width = rng.uniform(0.5, 2) * wear + 0.8 * jagged
        crack = (half_width + 0.5 - abs(across)).clip(0, 1) * (u**2 < 1) * rng.uniform(0.6, 1)
        covered = (1 - abs(flank)) * (1 - crack)
        light = light * covered + flank.clip(0) * (1 - crack) + crack  # shine and paper
        kept *= covered
        mask = np.maximum(mask, np.maximum(envelope, crack))
    return Layer(kept[..., None], light[..., None] * np.float32(PAPER), mask)


def stains(height: int, width: int, coverage: float, depth: float, rng: np.random.Generator) -> Layer:
    """Brown stains of water and mould on a share `coverage` of the picture, darkest at their rims: blue times
    1 - depth, green and red less."""
    side = min(height, width)
    field = smooth_noise(height, width, side * rng.uniform(0.2, 0.5), rng)
    field += 0.25 * smooth_noise(height, width, max(2, side / 16), rng) + 0.06 * smooth_noise(height, width, 2, rng)
    inside = (field - np.float32(np.quantile(field, 1 - coverage))) / max(float(field.std()), 1e-6)
    rim = np.exp(-((inside / 0.15 - 1) ** 2))
    opacity = smoothstep(inside / 0.2) * (0.55 + 0.45 * rim) if coverage else np.zeros_like(field)
    shade = 1 - opacity[..., None] * np.float32(depth) * np.float32([0.45, 0.7, 1])
    return Layer(shade, np.zeros_like(shade), opacity)


# Drawing. Each takes its numbers from rng in the order written, always the same count.


def draw_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**53))  # exact as a JSON number


def draw_strength(settings: dict, rng: np.random.Generator) -> float:
    return float(rng.uniform(*settings["damage_strength"]))


def draw_fade(settings: dict, rng: np.random.Generator) -> dict:
    """Black 0.03 to 0.25, white 0.75 to 0.98, gamma 0.7 to 1.5, of which 0.7 is common to the channels and 0.3 each
    one's own; saturation 0.2 to 0.9."""
    strength, ranges = draw_strength(settings, rng), ((0.03, 0.25), (0.02, 0.25), (0.7, 1.5))
    black, lost_white, gamma = (0.7 * rng.uniform(lo, hi) + 0.3 * rng.uniform(lo, hi, 3) for lo, hi in ranges)
    return {
        "type": "fade",
        "black": (strength * black).clip(max=0.5).tolist(),
        "white": (1 - strength * lost_white).clip(min=0.5).tolist(),
        "gamma": (gamma**strength).tolist(),
        "saturation": max(0.0, 1 - strength * float(rng.uniform(0.1, 0.8))),
    }


def draw_yellow(settings: dict, rng: np.random.Generator) -> dict:
    """Amount 0.1 to 0.6; paper red 1, green 0.93 to 0.97, blue 0.72 to 0.9."""
    amount = min(1.0, draw_strength(settings, rng) * float(rng.uniform(0.1, 0.6)))
    return {
        "type": "yellow",
        "amount": amount,
        "paper": [1.0, float(rng.uniform(0.93, 0.97)), float(rng.uniform(0.72, 0.9))],
    }


def draw_scratches(settings: dict, rng: np.random.Generator) -> dict:
    """1 to 25 per 512 x 512 pixels."""
    count = draw_strength(settings, rng) * float(rng.uniform(1, 25))
    return {"type": "scratches", "count": count, "seed": draw_seed(rng)}


def draw_dust(settings: dict, rng: np.random.Generator) -> dict:
    """20 to 400 per 512 x 512 pixels."""
    count = draw_strength(settings, rng) * float(rng.uniform(20, 400))
    return {"type": "dust", "count": count, "seed": draw_seed(rng)}


def draw_folds(settings: dict, rng: np.random.Generator) -> dict:
    """1 to 3 per 512 pixels of side."""
    count = draw_strength(settings, rng) * float(rng.uniform(1, 3))
    return {"type": "folds", "count": count, "seed": draw_seed(rng)}


def draw_stains(settings: dict, rng: np.random.Generator) -> dict:
    """Coverage 0.03 to 0.25 of the picture, depth 0.05 to 0.4."""
    coverage = min(1.0, draw_strength(settings, rng) * float(rng.uniform(0.03, 0.25)))
    return {"type": "stains", "coverage": coverage, "depth": float(rng.uniform(0.05, 0.4)), "seed": draw_seed(rng)}


def draw_grain(settings: dict, rng: np.random.Generator) -> dict:
    """Sigma 0.5 to 1.2 pixels, amplitude 0.02 to 0.12, small ones more often (0.1 u^2 above 0.02)."""
    amplitude = draw_strength(settings, rng) * (0.02 + 0.1 * float(rng.random()) ** 2)
    return {"type": "grain", "sigma": float(rng.uniform(0.5, 1.2)), "amplitude": amplitude, "seed": draw_seed(rng)}


def draw_halftone(settings: dict, rng: np.random.Generator) -> dict:
    """Pitch 3 to 6 pixels, angle 0 to 90 degrees, amount 0.3 to 0.8."""
    amount = min(1.0, draw_strength(settings, rng) * float(rng.uniform(0.3, 0.8)))
    return {
        "type": "halftone",
        "pitch": float(rng.uniform(3, 6)),
        "angle": float(rng.uniform(0, 90)),
        "amount": amount,
    }


def draw_low_light(settings: dict, rng: np.random.Generator) -> dict:
    """Gamma 1.5 to 3.5, gain 0.1 to 0.5 (Retinex-style low light); shot noise of standard deviation 0.01 to 0.04 at
    white and read noise of 0.002 to 0.015, on [0, 1]."""
    strength = draw_strength(settings, rng)
    return {
        "type": "low_light",
        "gamma": 1 + strength * (float(rng.uniform(1.5, 3.5)) - 1),
        "gain": float(rng.uniform(0.1, 0.5)) ** strength,
        "shot": strength * float(rng.uniform(0.01, 0.04)),
        "read": strength * float(rng.uniform(0.002, 0.015)),
        "seed": draw_seed(rng),
    }


def draw_haze(settings: dict, rng: np.random.Generator) -> dict:
    """Airlight 0.7 to 1, beta 0.6 to 1.8 (the ranges of RESIDE, https://arxiv.org/abs/1712.04143); the ramp's weight in
    depth 0.3 to 1."""
    beta = draw_strength(settings, rng) * float(rng.uniform(0.6, 1.8))
    return {
        "type": "haze",
        "airlight": float(rng.uniform(0.7, 1)),
        "beta": beta,
        "gradient": float(rng.uniform(0.3, 1)),
        "seed": draw_seed(rng),
    }

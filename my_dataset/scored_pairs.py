"""Clean and degraded crops for scoring at their own pixels: nothing is resized, unlike the crops of training."""

import math

import cv2
import numpy as np
from PIL import Image

from my_dataset.dataset_deg_paired import DEGRADATION_STREAM, KERNELS, enlargement, item_rng, to_tensor
from my_dataset.images import MAX_PIXELS, UnreadableImage, load_rgb


def crop_boxes(height, width, crop_px, count):
    """Boxes (top, left, bottom, right) of at most `count` square crops: the smallest grid that holds them, centred.
    crop_px 0: the whole image. ValueError when not one fits."""
    if crop_px == 0:
        return [(0, 0, height, width)]
    shapes = [(rows, columns) for rows in range(1, height // crop_px + 1) for columns in range(1, width // crop_px + 1)]
    if not shapes:
        raise ValueError(f"{width}x{height} px is smaller than --crop_px {crop_px}")
    count = min(count, math.prod(shapes[-1]))
    rows, columns = min((shape for shape in shapes if math.prod(shape) >= count),
                        key=lambda shape: (math.prod(shape), abs(shape[0] - shape[1])))
    top, left = (height - rows * crop_px) // 2, (width - columns * crop_px) // 2
    corners = [(top + row * crop_px, left + column * crop_px) for row in range(rows) for column in range(columns)]
    return [(y, x, y + crop_px, x + crop_px) for y, x in corners[:count]]


def load_pairs(record, index, degrade, seed=0, crop_px=0, crops=1, upscale_kernel="bicubic", max_pixels=MAX_PIXELS,
               margin_px=0):
    """[(target, control, degradation parameters)] of the crops of a Record; both (1, 3, H, W) in [-1, 1].

    Crop i is degraded with the generator of (seed, epoch i, index), together with so much of what surrounds it as the
    image has within margin_px: a wide blur carries that into the crop. Stored partners have None for parameters, and at
    a whole fraction of the size are enlarged. UnreadableImage, or ValueError when sizes do not fit."""
    if record.fault:
        raise UnreadableImage(record.name, record.fault)
    target = load_rgb(record.target, max_pixels)
    height, width = target.shape[:2]
    boxes = crop_boxes(height, width, crop_px, crops)
    targets = [target[top:bottom, left:right] for top, left, bottom, right in boxes]
    if record.control is None:
        degraded = []
        for i, (top, left, bottom, right) in enumerate(boxes):
            y, x = max(top - margin_px, 0), max(left - margin_px, 0)
            wide, params = degrade(target[y : bottom + margin_px, x : right + margin_px],
                                   item_rng(seed, i, index, DEGRADATION_STREAM))
            degraded.append((wide[top - y : bottom - y, left - x : right - x], params))
    else:
        control = load_rgb(record.control, max_pixels)
        if not enlargement(control.shape[:2], (height, width)):
            raise ValueError(f"{record.control} ({control.shape[1]}x{control.shape[0]} px) is no whole fraction of "
                             f"{record.name} ({width}x{height} px)")
        if control.shape != target.shape:
            control = np.array(Image.fromarray(control).resize((width, height), KERNELS[upscale_kernel]))
        degraded = [(control[top:bottom, left:right], None) for top, left, bottom, right in boxes]
    return [(to_tensor(crop)[None], to_tensor(image)[None], params)
            for crop, (image, params) in zip(targets, degraded, strict=True)]


def denoise_nlm(image, strength):
    """OpenCV's non-local means (Buades et al. 2011) in RGB, patches of 3, search 21; strength: h in levels of 255.
    OpenCV's own coloured variant, with patches of 7 in 8-bit Lab, is up to 2 dB worse.
    image: (H, W, 3) uint8; the same comes out."""
    return cv2.fastNlMeansDenoising(image, None, strength, 3, 21)


def denoise_bilateral(image, color, space):
    """OpenCV's bilateral filter (Tomasi and Manduchi 1998); color: sigma in levels of 255, space: sigma in pixels.
    image: (H, W, 3) uint8; the same comes out."""
    return cv2.bilateralFilter(image, 0, color, space)  # 0: a diameter of 3 sigma


def unsharp(image, amount, sigma=1.0):
    """image + amount (image - its Gaussian blur of `sigma` pixels). image: (H, W, 3) uint8; the same comes out."""
    return cv2.addWeighted(image, 1 + amount, cv2.GaussianBlur(image, (0, 0), sigma), -amount, 0)

"""Known edits: each changes one thing that can be measured, so that a slider trained on its pairs can be scored without
a network that judges images.

Images are (N, 3, H, W) RGB in [0, 1], and stay so."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torchvision.transforms.functional import gaussian_blur

LUMA = (0.299, 0.587, 0.114)  # BT.601
BLUR_SIGMA_PX = 2.0
GLOW = (1.0, 0.45, 0.1)
GLOW_STRENGTH = 0.7
HIGHLIGHT = 0.55  # luminance from which on an area glows
FLAT = 1e-8  # far below one step of 8 bits squared: a flat image has a finite detail


class Edit(NamedTuple):
    """apply(images) -> edited images, alike. attribute(images) -> (N,), what the edit moves. mask(images) ->
    (N, 1, H, W) in [0, 1], where a local edit acts on unedited images; its attribute is attribute(images, mask). None:
    it acts everywhere."""

    apply: Callable
    attribute: Callable
    mask: Callable | None = None


def channels(values, images):
    """Three numbers as a (3, 1, 1) colour that fits `images`."""
    return torch.tensor(values, dtype=images.dtype, device=images.device).view(3, 1, 1)


def luminance(images):
    """(N, H, W) in [0, 1]: 0.299 R + 0.587 G + 0.114 B."""
    return (images * channels(LUMA, images)).sum(1)


def warm(images):
    return (images * channels((1.15, 1.0, 0.75), images)).clamp(0, 1)


def warmth(images):
    """Mean of R - B."""
    return (images[:, 0] - images[:, 2]).mean((1, 2))


def gray(images):
    return luminance(images)[:, None].expand_as(images)


def saturation(images):
    """Mean over the pixels of the largest channel minus the smallest."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


def blur(images):
    """Gaussian of sigma 2 px, whatever the images' size; borders reflected."""
    return gaussian_blur(images, 2 * math.ceil(4 * BLUR_SIGMA_PX) + 1, BLUR_SIGMA_PX)


def gradients(images):
    """(horizontal, vertical) differences of neighbours, of images (..., H, W)."""
    return images.diff(dim=-1), images.diff(dim=-2)


def detail(images):
    """Natural logarithm of the mean squared horizontal plus the mean squared vertical difference of neighbours."""
    return sum(change.square().mean((1, 2, 3)) for change in gradients(images)).add(FLAT).log()


def dark(images):
    return images * 0.55


def brightness(images):
    """Mean luminance."""
    return luminance(images).mean((1, 2))


def highlights(images):
    """Where it is bright: luminance, smoothed a little, above HIGHLIGHT."""
    return torch.sigmoid((gaussian_blur(luminance(images)[:, None], 9, 2.0) - HIGHLIGHT) * 20)


def glow(images):
    """Highlights towards orange; what is dark stays."""
    share = GLOW_STRENGTH * highlights(images)
    return images * (1 - share) + channels(GLOW, images) * share


def local_warmth(images, mask):
    """Mean of R - B, weighted by the mask."""
    return ((images[:, :1] - images[:, 2:]) * mask).sum((1, 2, 3)) / mask.expand(len(images), -1, -1, -1).sum((1, 2, 3))


EDITS = {
    "warm": Edit(warm, warmth),
    "gray": Edit(gray, saturation),
    "blur": Edit(blur, detail),
    "dark": Edit(dark, brightness),
    "glow": Edit(glow, local_warmth, highlights),
}

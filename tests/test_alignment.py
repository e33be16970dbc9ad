"""Alignment: known shifts and scales come back, and blur, noise, contrast and tint are not mistaken for them."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from tests.conftest import photograph
from utils import score
from utils.alignment import alignment

PHOTOGRAPHS = [("astronaut", (512, 512)), ("chelsea", (300, 451)), ("coffee", (256, 256))]


def tensor(image):
    return torch.from_numpy(np.clip(np.round(image), 0, 255)).movedim(-1, 0)[None].float() / 127.5 - 1


def moved(image, right=0.0, down=0.0, scale=1.0):
    """The image zoomed about its centre and then shifted, with an interpolation of order 5."""
    centre = (np.array(image.shape[:2]) - 1) / 2
    offset = centre - (centre + (down, right)) / scale
    channels = [ndimage.affine_transform(channel, np.full(2, 1 / scale), offset, order=5, mode="reflect")
                for channel in np.moveaxis(image.astype(float), -1, 0)]
    return np.stack(channels, -1)


@pytest.mark.parametrize(("name", "size"), PHOTOGRAPHS)
@pytest.mark.parametrize(("right", "down", "scale"), [(0.3, 0.0, 1.0), (0.0, 0.0, 1.002), (0.3, -0.2, 1.002),
                                                      (3.3, 1.0, 0.99), (-8.3, 5.0, 1.05)])
def test_known_shifts_and_scales_come_back(name, size, right, down, scale):
    image = photograph(name, size)
    measured = alignment(tensor(moved(image, right, down, scale)), tensor(image))
    assert measured[:2] == pytest.approx((right, down), abs=0.005)
    assert measured[2] == pytest.approx(scale, abs=5e-5)


@pytest.mark.parametrize(("name", "size"), PHOTOGRAPHS)
def test_a_copy_lies_on_itself(name, size):
    image = tensor(photograph(name, size))
    assert alignment(image, image) == pytest.approx((0, 0, 1), abs=1e-3)


@pytest.mark.parametrize(("name", "size"), PHOTOGRAPHS)
@pytest.mark.parametrize(("change", "px", "percent"), [
    (lambda image, _: ndimage.gaussian_filter(image, (1.5, 1.5, 0)), 0.02, 0.02),
    (lambda image, rng: image + rng.normal(0, 10, image.shape), 0.03, 0.02),
    (lambda image, _: 0.5 * image + 60, 0.02, 0.02),
    (lambda image, _: image * [1.0, 0.8, 0.6], 0.02, 0.02),
], ids=["blurred", "noisy", "faded", "yellowed"])
def test_what_restoration_changes_is_no_shift(name, size, change, px, percent):
    image = photograph(name, size)
    right, down, scale = alignment(tensor(change(image.astype(float), np.random.default_rng(0))), tensor(image))
    assert np.hypot(right, down) < px and 100 * abs(scale - 1) < percent


def test_a_shift_is_seen_through_blur_and_noise():
    image = photograph("astronaut", (512, 512))
    spoiled = ndimage.gaussian_filter(moved(image, 0.3, 0.1, 1.002), (1.2, 1.2, 0))
    spoiled += np.random.default_rng(0).normal(0, 15, image.shape)
    measured = alignment(tensor(spoiled), tensor(image))
    assert measured[:2] == pytest.approx((0.3, 0.1), abs=0.02) and measured[2] == pytest.approx(1.002, abs=2e-4)


def test_a_large_image_is_measured_in_its_own_pixels():
    image = photograph("astronaut", (1100, 1000))  # averaged down by 2
    measured = alignment(tensor(moved(image, 1.3, -0.7, 1.003)), tensor(image))
    assert measured[:2] == pytest.approx((1.3, -0.7), abs=0.02) and measured[2] == pytest.approx(1.003, abs=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (8, 100), (16, 16), (20, 63), (32, 40)])
def test_small_crops_do_not_fail(size):
    image = tensor(photograph("coffee", size))
    assert alignment(image, image) == pytest.approx((0, 0, 1), abs=2e-3)


def test_flat_images_claim_nothing():
    flat, image = torch.zeros(1, 3, 64, 64), tensor(photograph("coffee", (64, 64)))
    assert alignment(flat, flat) == alignment(flat, image) == alignment(image, flat) == (0, 0, 1)


def test_every_scored_row_holds_the_length_of_the_shift_and_the_scale():
    image = photograph("coffee", (128, 128))
    values = score.measure(tensor(moved(image, 0.3, 0.4)), tensor(image), ["psnr"])
    assert list(values) == ["psnr", "psnr_y", "shift_px", "scale"]
    assert values["shift_px"] == pytest.approx(0.5, abs=0.01) and values["scale"] == pytest.approx(1, abs=1e-4)
    assert all(name in score.DEFINITIONS for name in values)
    scores = [{"image": "a", "crop": 0, "row": "input"} | values]
    assert score.summarise(scores)[0]["input"]["shift_px"][0] == pytest.approx(values["shift_px"])
    assert score.caption(values).count("/") == 0  # a picture's caption has no room for it

"""Colour fix: colours of the control, detail of the restoration, at any size."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from tests.test_restore import photo_tensor
from utils.color import COLOR_FIXES, color_fix, low_frequencies


def tint(images):
    return images * torch.tensor([0.6, 0.7, 0.5]).view(3, 1, 1) + torch.tensor([0.15, -0.1, -0.2]).view(3, 1, 1)


def sharpness(images):
    return (images - low_frequencies(images)).std().item()


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (64, 64), (33, 127)])
@pytest.mark.parametrize("mode", COLOR_FIXES)
def test_an_image_with_its_own_colours_is_left_as_it_is_at_any_size(mode, size):
    image = photo_tensor("coffee", size)
    torch.testing.assert_close(color_fix(image, image, mode), image, rtol=0, atol=1e-6)


def test_off_returns_what_was_restored():
    image = photo_tensor("coffee", (16, 16))
    assert color_fix(image, tint(image), "off") is image


def test_low_frequencies_are_five_levels_of_the_a_trous_transform():
    image = photo_tensor("astronaut", (70, 90))
    expected = image[0].double().numpy()
    for level in range(5):
        kernel = np.zeros(2 * 2**level + 1)
        kernel[[0, 2**level, -1]] = 0.25, 0.5, 0.25
        for axis in (1, 2):
            expected = ndimage.convolve1d(expected, kernel, axis=axis, mode="nearest")
    np.testing.assert_allclose(low_frequencies(image)[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["wavelet", "adain"])
def test_a_tint_is_taken_from_the_control_and_detail_from_the_restored(mode):
    restored = 0.5 * photo_tensor("coffee", (128, 160))  # far from the ends of the range
    control = tint(low_frequencies(restored))  # blurred and tinted
    fixed = color_fix(restored, control, mode)
    assert fixed.dtype == torch.float32 and fixed.abs().max() <= 1
    means = [image.mean((-2, -1)) for image in (fixed, control, restored)]
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=0.02)
    assert (means[2] - means[1]).abs().max() > 0.05
    assert sharpness(fixed) > 3 * sharpness(control)


def test_wavelet_keeps_high_frequencies_and_adain_matches_channel_statistics():
    restored, control = 0.5 * photo_tensor("coffee", (96, 96)), 0.5 * tint(photo_tensor("astronaut", (96, 96)))
    wavelet = color_fix(restored, control, "wavelet")
    assert wavelet.abs().max() < 1
    torch.testing.assert_close(wavelet - low_frequencies(control), restored - low_frequencies(restored), rtol=0,
                               atol=1e-6)
    adain = color_fix(restored, control, "adain")
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(adain, (-2, -1)), statistic(control, (-2, -1)), rtol=0, atol=0.01)


def test_a_flat_restoration_becomes_the_controls_mean_without_infinities():
    control = photo_tensor("coffee", (20, 20))
    fixed = color_fix(torch.zeros(1, 3, 20, 20), control, "adain")
    torch.testing.assert_close(fixed, control.mean((-2, -1), keepdim=True).expand_as(fixed), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["wavelet", "adain"])
def test_a_fix_brings_back_the_fading_it_was_not_asked_about(mode):
    """Why it is off by default."""
    target = photo_tensor("coffee", (96, 96))
    faded = tint(target)
    assert (color_fix(target, faded, mode) - target).abs().mean() > 0.05

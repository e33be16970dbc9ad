"""Colours of the degraded image for its restoration. Off by default: where colour is what was damaged, as by fading,
yellowing or low light, every one of these brings the damage back."""

import torch

COLOR_FIXES = ("off", "wavelet", "adain")
WAVELET_LEVELS = 5
MIN_STD = 1e-4  # of an image in [-1, 1]; a flatter one is not stretched


def low_frequencies(images):
    """What WAVELET_LEVELS of the a-trous transform leave over, (B, 3, H, W) -> the same: at level i the kernel
    [1 2 1] [1 2 1]^T / 16 with 2^i px between its taps (Holschneider et al. 1989). Borders repeat."""
    height, width = images.shape[-2:]
    for level in range(WAVELET_LEVELS):
        for side, length in ((-2, height), (-1, width)):
            places = torch.arange(length, device=images.device)
            before, after = (places + step for step in (-(2**level), 2**level))
            shifted = (images.index_select(side, near.clamp(0, length - 1)) for near in (before, after))
            images = sum(shifted, 2 * images) / 4
    return images


def color_fix(restored, control, mode):
    """Restored images with the colours of `control`, both (B, 3, H, W) in [-1, 1], in fp32 and clamped.

    wavelet: low frequencies of the control, high frequencies of the restored (as in StableSR, Wang et al. 2023).
    adain: mean and standard deviation of each of the control's channels (Huang and Belongie 2017). off: as restored."""
    if mode == "off":
        return restored
    restored, control = restored.float(), control.float()
    if mode == "wavelet":
        return (restored + low_frequencies(control - restored)).clamp_(-1, 1)  # the transform is linear
    (std, mean), (wanted_std, wanted_mean) = (torch.std_mean(images, (-2, -1), correction=0, keepdim=True)
                                              for images in (restored, control))
    return ((restored - mean) * (wanted_std / std.clamp(min=MIN_STD)) + wanted_mean).clamp_(-1, 1)

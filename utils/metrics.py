"""Image quality against a target: PSNR, SSIM, LPIPS and more of what would be saved to disk, with confidence intervals.

Images are (B, 3, H, W) in [-1, 1]; both sides are rounded to 8 bits first, because that is what a user gets. PSNR and
SSIM come in RGB and, with the suffix _y, on the luma of BT.601 in its 16 to 235 range, as super-resolution papers
report it (MATLAB's rgb2ycbcr, not rounded); no border is cropped. Numbers measured otherwise are not comparable."""

import hashlib
import pickle
import re
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch

METRICS = ("psnr", "ssim", "lpips")
DEFINITIONS = {
    "psnr": "dB, RGB, 8-bit values, peak 255, capped at 100",
    "psnr_y": "dB, BT.601 luma 16-235, 8-bit RGB values, peak 255, capped at 100",
    "ssim": "RGB, Gaussian window 11x11 sigma 1.5, K1 0.01, K2 0.03, peak 255, windows inside the image only",
    "ssim_y": "as ssim, on the BT.601 luma 16-235",
    "ms_ssim": "RGB, 5 scales (Wang et al. 2003), window and constants of ssim, as torchmetrics computes it: the "
               "coarsest scale mirrors the borders",
    "lpips": "LPIPS 0.1, lower is better",
    "laplacian": "energy of the luma's Laplacian over the target's: below 1 smoother than the target, above 1 noisier",
}
MAX_PSNR_DB = 100.0
SSIM_WINDOW_PX = 11
MS_SSIM_MIN_SIDE_PX = 176  # torchmetrics: a sixteenth of it holds the window of 11 px
LPIPS_MIN_SIDE_PX = 32  # below, AlexNet's second pooling has nothing left to pool
BACKBONES = {  # torchvision's file names; their last part is the beginning of the file's sha256
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def to_uint8_range(images):
    """Images in [-1, 1] -> whole numbers from 0 to 255, as floats. This rounding is the one used for saving."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255)


def luma(images):
    """(B, 3, H, W) RGB from 0 to 255 -> (B, 1, H, W) from 16 to 235: 16 + (65.481 R + 128.553 G + 24.966 B) / 255."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=images.device) / 255
    return 16 + (images.double() * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)


def psnr_255(restored, target):
    from torchmetrics.functional.image import peak_signal_noise_ratio  # seconds to import

    values = peak_signal_noise_ratio(restored.double(), target.double(), data_range=255.0, reduction="none",
                                     dim=(1, 2, 3))
    return values.clamp(max=MAX_PSNR_DB).float()


def ssim_255(restored, target):
    from torchmetrics.functional.image import structural_similarity_index_measure  # seconds to import

    height, width = target.shape[-2:]
    if min(height, width) < SSIM_WINDOW_PX:
        raise ValueError(f"SSIM needs images of {SSIM_WINDOW_PX} px or more, got {width}x{height}; leave ssim out of "
                         "--metrics")
    _, windows = structural_similarity_index_measure(restored.float(), target.float(), sigma=1.5, data_range=255.0,
                                                     kernel_size=SSIM_WINDOW_PX, return_full_image=True)
    # torchmetrics' own mean counts windows over a mirrored border too, which the published numbers do not
    rim = SSIM_WINDOW_PX // 2
    return windows[..., rim : height - rim, rim : width - rim].mean((1, 2, 3)).float()


def psnr(restored, target):
    """10 log10(255^2 / MSE) in dB over all RGB values of each image, (B,), at most 100: JSON knows no infinity."""
    return psnr_255(to_uint8_range(restored), to_uint8_range(target))


def psnr_y(restored, target):
    """PSNR of the luma (see the module), (B,) in dB, at most 100."""
    return psnr_255(luma(to_uint8_range(restored)), luma(to_uint8_range(target)))


def ssim(restored, target):
    """SSIM (Wang et al. 2004) in RGB, (B,): Gaussian window 11 x 11 of sigma 1.5, K1 = 0.01, K2 = 0.03, range 255,
    mean over channels and over the windows that lie inside the image. ValueError below 11 px."""
    return ssim_255(to_uint8_range(restored), to_uint8_range(target))


def ssim_y(restored, target):
    """SSIM of the luma (see the module), (B,)."""
    return ssim_255(luma(to_uint8_range(restored)), luma(to_uint8_range(target)))


def ms_ssim(restored, target):
    """Multi-scale SSIM (Wang et al. 2003) in RGB, (B,), weights 0.0448, 0.2856, 0.3001, 0.2363, 0.1333 from the finest
    scale on. ValueError below 176 px."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure  # seconds to import

    height, width = target.shape[-2:]
    if min(height, width) < MS_SSIM_MIN_SIDE_PX:
        raise ValueError(f"MS-SSIM needs images of {MS_SSIM_MIN_SIDE_PX} px or more, got {width}x{height}")
    return multiscale_structural_similarity_index_measure(
        to_uint8_range(restored), to_uint8_range(target), sigma=1.5, kernel_size=SSIM_WINDOW_PX, data_range=255.0,
        reduction="none").float()


def laplacian_energy(images):
    """Mean square of the luma's Laplacian (cv2.Laplacian: the four neighbours minus four times the pixel), (B,)."""
    planes = luma(to_uint8_range(images))[:, 0].cpu().numpy()
    return torch.tensor([np.square(cv2.Laplacian(plane, cv2.CV_64F)).mean() for plane in planes])


def laplacian(restored, target):
    """Laplacian energy of each image over that of its target, (B,): what PSNR gains by blur shows here as a loss. A
    thousandth is added to both, so that flat images compare as 1; photographs have tens and more."""
    return ((laplacian_energy(restored) + 1e-3) / (laplacian_energy(target) + 1e-3)).float()


def find_backbone(backbone_file=None, net="alex"):
    """Where LPIPS's backbone weights are expected: `backbone_file`, or torchvision's file in the torch cache."""
    return Path(backbone_file or Path(torch.hub.get_dir(), "checkpoints", BACKBONES[net]))


def lpips_model(backbone_file=None, net="alex"):
    """LPIPS 0.1 (Zhang et al. 2018), frozen, on the CPU: the heads of the `lpips` package over a torchvision backbone.

    backbone_file: a torchvision checkpoint of AlexNet, VGG-16 or SqueezeNet 1.1 (net: alex, vgg, squeeze); default: its
    place in the torch cache. Nothing is downloaded, no global random state moves. ValueError when the file is missing,
    damaged or of another network."""
    path = find_backbone(backbone_file, net)
    if not path.is_file():
        raise ValueError(f"LPIPS needs torchvision's {BACKBONES[net]}: put it at {path}, or pass --lpips_backbone "
                         "FILE, or leave lpips out")
    stated = re.search(r"-([0-9a-f]{8,64})\.pth$", path.name)
    with open(path, "rb") as file:
        if stated and not hashlib.file_digest(file, "sha256").hexdigest().startswith(stated[1]):
            raise ValueError(f"{path} is damaged: its sha256 does not begin with {stated[1]}; copy it again")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a torchvision checkpoint; copy it again") from error

    import lpips

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision by its old keyword
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    # sliceK.N... of lpips is features.N... of torchvision
    names = {name: re.sub(r"^slice\d+", "features", name) for name in model.net.state_dict()}
    if missing := [wanted for wanted in names.values() if wanted not in weights]:
        raise ValueError(f"{path} holds no {missing[0]}: it is not the {net} backbone of LPIPS")
    model.net.load_state_dict({name: weights[wanted] for name, wanted in names.items()})
    return model.requires_grad_(False)


@torch.no_grad()
def lpips_distance(model, restored, target):
    """LPIPS of each image, (B,), 0 for equal images. model: from `lpips_model`. ValueError below 32 px."""
    height, width = target.shape[-2:]
    if min(height, width) < LPIPS_MIN_SIDE_PX:
        raise ValueError(f"LPIPS needs images of {LPIPS_MIN_SIDE_PX} px or more, got {width}x{height}; leave lpips out "
                         "of --metrics")
    device = next(model.parameters()).device
    pair = (to_uint8_range(images).to(device) / 127.5 - 1 for images in (restored, target))
    return model(*pair).flatten().cpu()


def available_metrics(backbone_file=None, net="alex"):
    """psnr and ssim, and lpips where its backbone file exists."""
    return [name for name in METRICS if name != "lpips" or find_backbone(backbone_file, net).is_file()]


def parse_metrics(text):
    """'psnr,lpips' -> ['psnr', 'lpips']; ValueError for an unknown name."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not set(names) <= set(METRICS):
        raise ValueError(f"--metrics {text!r}: give a comma list of {', '.join(METRICS)}")
    return names


def measure(restored, target, names=("psnr", "ssim"), lpips=None):
    """{metric: list of B floats} of the DEFINITIONS named; psnr and ssim come with psnr_y and ssim_y. lpips: from
    `lpips_model`, for lpips."""
    values = {}
    if "psnr" in names:
        values |= {"psnr": psnr(restored, target), "psnr_y": psnr_y(restored, target)}
    if "ssim" in names:
        values |= {"ssim": ssim(restored, target), "ssim_y": ssim_y(restored, target)}
    if "ms_ssim" in names:
        values["ms_ssim"] = ms_ssim(restored, target)
    if "lpips" in names:
        values["lpips"] = lpips_distance(lpips, restored, target)
    if "laplacian" in names:
        values["laplacian"] = laplacian(restored, target)
    return {name: value.tolist() for name, value in values.items()}


def bootstrap_interval(values, seed=0, samples=2000, level=0.95):
    """(mean, lo, hi) of the mean of `values` by the percentile bootstrap (Efron 1979), the same for the same seed.
    Values must be independent: average the crops of one image first. One value has no spread, so lo = mean = hi."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"an interval needs a list of finite numbers, got {values}")
    draws = np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))
    lo, hi = np.quantile(values[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(lo), float(hi)


def summary_table(rows):
    """Markdown table of {row: {metric: (mean, lo, hi)}}, every row with the same metrics."""
    lines = [["", *next(iter(rows.values()))]]
    for row, values in rows.items():
        digits = {name: 2 if name.startswith("psnr") else 4 for name in values}
        lines.append([row, *(f"{mean:.{digits[name]}f} [{lo:.{digits[name]}f}, {hi:.{digits[name]}f}]"
                             for name, (mean, lo, hi) in values.items())])
    return markdown_table(lines)


def markdown_table(lines):
    """Lists of cells, the first of them the headings, as an aligned Markdown table."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(f"| {' | '.join(f'{cell:<{width}}' for cell, width in zip(line, widths, strict=True))} |"
                     for line in lines)

"""Losses on pixels: VGG and LPIPS features, image gradients; and the crop of latents that they are decoded from."""

import math
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F

from utils import flow_matching as fm
from utils import flux

VGG16_FILE = "vgg16-397923af.pth"  # torchvision's IMAGENET1K_V1
MARGIN_LATENTS = 4  # a crop's outer latents lack neighbours; they are decoded, then dropped


def add_perceptual_args(parser):
    group = parser.add_argument_group("perceptual loss")
    group.add_argument("--perceptual_loss", nargs="?", const="vgg", choices=["vgg", "lpips", "gradient"],
                       help="add a loss on decoded pixels; without a word: vgg. gradient needs no weights")
    group.add_argument("--perceptual_loss_weight", type=float, default=0.1, help="its weight beside the flow loss")
    group.add_argument("--perceptual_loss_target", default="x0", choices=["x0", "velocity"],
                       help="x0: the decoded estimate against the clean image; velocity: decoded velocities, which "
                            "are no images (the literal form of the first README)")
    group.add_argument("--perceptual_max_sigma", type=float, default=0.5,
                       help="items noisier than this are left out: their estimate is still a blur")
    group.add_argument("--perceptual_crop", type=int, default=32, help="side of the decoded crop, latents; 0 = whole")
    group.add_argument("--perceptual_weights", help="file of VGG16 weights; default: torch's cache")


def check_perceptual_args(args):
    """Refuse impossible values and a missing weight file before anything loads."""
    if not 0 <= args.perceptual_loss_weight < math.inf or not 0 < args.perceptual_max_sigma <= 1:
        raise ValueError("--perceptual_loss_weight must be 0 or more and --perceptual_max_sigma in (0, 1]")
    if args.perceptual_crop and args.perceptual_crop < 4 * MARGIN_LATENTS:
        raise ValueError(f"--perceptual_crop {args.perceptual_crop}: give 0 or at least {4 * MARGIN_LATENTS} latents")
    if args.perceptual_loss in ("vgg", "lpips"):
        weight_file(args.perceptual_weights)


def weight_file(path=None):
    """Path of the VGG16 weights: `path`, else torch's cache. ValueError names the file and where to put it."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_FILE
    file = Path(path) if path else cached
    if not file.is_file():
        raise ValueError(f"--perceptual_loss needs {VGG16_FILE} (torchvision's VGG16), not found at {file}; put it at "
                         f"{cached}, or name it with --perceptual_weights, or use --perceptual_loss gradient")
    return file


class VGGLoss(torch.nn.Module):
    """Sum over four blocks of VGG16 of the mean absolute difference of features (Johnson et al. 2016), per item."""

    BLOCKS = ((0, 4), (4, 9), (9, 16), (16, 23))  # up to relu1_2, relu2_2, relu3_3, relu4_3

    def __init__(self, file):
        super().__init__()
        from torchvision.models import vgg16

        with torch.device("meta"):  # neither draws 138 million random numbers nor holds them
            features = vgg16(weights=None).features
        try:
            weights = torch.load(file, map_location="cpu", weights_only=True)
            features.load_state_dict({name: weights[f"features.{name}"] for name in features.state_dict()}, assign=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, TypeError) as error:
            raise ValueError(f"{file} does not hold VGG16 weights ({type(error).__name__}); --perceptual_loss needs "
                             f"torchvision's {VGG16_FILE}") from error
        self.blocks = torch.nn.ModuleList(features[a:b] for a, b in self.BLOCKS)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, restored, target):
        """(B, 3, H, W) in about [-1, 1], twice -> (B,). Values outside the range keep their gradient."""
        x, y = (self.prepare(images) for images in (restored, target))
        total = 0.0
        for block in self.blocks:
            x, y = block(x), block(y)
            total = total + (x - y).abs().flatten(1).mean(1)
        return total

    def prepare(self, images):
        images = ((images + 1) / 2 - self.mean) / self.std
        return F.interpolate(images, size=(224, 224), mode="bilinear", align_corners=False)


class LPIPSLoss(torch.nn.Module):
    """LPIPS with the VGG backbone (Zhang et al. 2018), per item."""

    def __init__(self, file):
        super().__init__()
        from utils.metrics import lpips_model

        self.model = lpips_model(str(file), net="vgg").eval().requires_grad_(False)

    def forward(self, restored, target):
        """(B, 3, H, W) in about [-1, 1], twice -> (B,)."""
        return self.model(restored, target).flatten()


class GradientLoss(torch.nn.Module):
    """Mean absolute difference of horizontal and vertical image gradients, per item; needs no weights."""

    def forward(self, restored, target):
        """(B, 3, H, W), twice -> (B,)."""
        error = restored - target
        horizontal = error[..., :, 1:] - error[..., :, :-1]
        vertical = error[..., 1:, :] - error[..., :-1, :]
        return horizontal.abs().flatten(1).mean(1) + vertical.abs().flatten(1).mean(1)


def make_perceptual_loss(kind, weights=None):
    """The module named by --perceptual_loss: forward(restored, target) -> (B,) in fp32."""
    if kind == "gradient":
        return GradientLoss()
    return {"vgg": VGGLoss, "lpips": LPIPSLoss}[kind](weight_file(weights))


def crop_boxes(height, width, crop, generators):
    """One (top, left, rows, columns) per generator, of latents at even positions; the whole when crop is 0 or large."""
    boxes = []
    for generator in generators:
        rows, columns = (min(side, crop) if crop else side for side in (height, width))
        top = int(torch.randint((height - rows) // 2 + 1, (), generator=generator)) * 2
        left = int(torch.randint((width - columns) // 2 + 1, (), generator=generator)) * 2
        boxes.append((top, left, rows, columns))
    return boxes


def perceptual_loss(module, vae, z, prediction, velocity, sigma, target_pixels, boxes, kind="x0", max_sigma=0.5):
    """Mean over the batch of `module` on decoded crops; items with sigma above max_sigma count as 0.

    z, prediction, velocity: latents (B, C, h, w). sigma: list of B floats, on the host, so that choosing items waits
    for no device. target_pixels: (B, 3, H, W) in [-1, 1]. boxes: from crop_boxes. kind: "x0" compares the decoded
    estimate of the target with the clean image; "velocity" compares two decoded velocities."""
    chosen = [i for i, level in enumerate(sigma) if level <= max_sigma]
    if not chosen:
        return prediction.new_zeros(())
    levels = torch.tensor([sigma[i] for i in chosen], device=z.device)
    scale = flux.latent_scale(vae)
    estimate = prediction[chosen].float()
    if kind == "x0":
        estimate = fm.clean_from_velocity(z[chosen], estimate, levels)
    restored, wanted = [], []
    for row, item in enumerate(chosen):
        top, left, rows, columns = boxes[item]
        inner = inner_box(top, left, rows, columns, z.shape[-2], z.shape[-1])
        restored.append(decode_crop(vae, estimate[row : row + 1], boxes[item], inner))
        if kind == "x0":
            y0, x0, y1, x1 = (value * scale for value in inner)
            wanted.append(target_pixels[item : item + 1, :, y0:y1, x0:x1])
        else:
            with torch.no_grad():
                wanted.append(decode_crop(vae, velocity[item : item + 1], boxes[item], inner))
    return torch.cat([module(a, b.float()) for a, b in zip(restored, wanted, strict=True)]).sum() / len(sigma)


def inner_box(top, left, rows, columns, height, width):
    """(y0, x0, y1, x1) of the crop without the margin that lacks neighbours; at the image's edge nothing is lost."""
    return (top + MARGIN_LATENTS * (top > 0), left + MARGIN_LATENTS * (left > 0),
            top + rows - MARGIN_LATENTS * (top + rows < height), left + columns - MARGIN_LATENTS *
            (left + columns < width))


def decode_crop(vae, latents, box, inner):
    """Decode latents (1, C, h, w) inside `box` and return the pixels of `inner`."""
    top, left, rows, columns = box
    scale = flux.latent_scale(vae)
    pixels = flux.decode(vae, latents[..., top : top + rows, left : left + columns])
    y0, x0, y1, x1 = inner
    return pixels[..., (y0 - top) * scale : (y1 - top) * scale, (x0 - left) * scale : (x1 - left) * scale]

"""Validation while training: held-out images restored or edited with fixed seeds, scored, drawn; a loss at fixed
sigmas, which moves with the model and not with the luck of the draw; how near generated images come to a subject."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_tensor

from utils import flow_matching as fm
from utils import flux, metrics, restore
from utils.generate import generate
from utils.tiles import Tiling, restore_tiled, trained_side
from utils.utils import image_grid

LOSS_POSITIONS = (0.25, 0.5, 0.75, 1.0)
THUMBNAIL_PX = 16


def add_schedule_args(parser):
    """When is validated, and with what; returns the options' group."""
    group = parser.add_argument_group("validation")
    group.add_argument("--validation_steps", type=int, help="steps between validations; wins over epochs")
    group.add_argument("--validation_epochs", type=int, default=50, help="epochs between validations")
    group.add_argument("--num_validation_images", type=int, default=4, help="images made or scored each time")
    group.add_argument("--num_inference_steps", type=int, help="sampling steps; default: 28 from pure noise, fewer "
                       "from a degraded start, as in the test script")
    group.add_argument("--validation_prompt", help="prompt of validation; default --instance_prompt")
    return group


def add_validation_args(parser):
    group = add_schedule_args(parser)
    group.add_argument("--heldout_root", help="folder of clean images that training never sees; they are degraded "
                       "with fixed seeds, restored and scored. Without it nothing is validated")
    group.add_argument("--heldout_lr_root", help="their stored degraded partners, instead of degrading them")
    group.add_argument("--validation_image", help="degraded image without a clean one: restored and drawn too")
    group.add_argument("--lpips_backbone", help="file of AlexNet weights for LPIPS; default: torch's cache, and no "
                       "LPIPS where it is not there")


def default_steps(settings):
    """Sampling steps where none are given: 28 from pure noise, as stock Kontext; 4 from a degraded start, or the
    largest number up to 4 that a trained list of sigmas allows."""
    if settings["start_noise"][1] == 1:
        return 28
    sigmas = settings["train_sigmas"]
    if isinstance(sigmas, list):
        return max(n for n in range(1, 5) if len(sigmas) % n == 0)
    return 4


def load_lpips(file):
    """LPIPS on AlexNet from `file` or torch's cache; None when no file is named and the cache has none."""
    return metrics.lpips_model(file) if file or "lpips" in metrics.available_metrics() else None


@torch.no_grad()
def fixed_sigma_loss(pipe, target, control, text, settings, seeds):
    """Mean squared velocity error over LOSS_POSITIONS. target, control: latents (B, C, h, w); text of batch B."""
    k = torch.full((len(target),), restore.choose_start_noise(settings), device=target.device)
    noise = restore.draw_noise(target.shape[1:], seeds).to(target)
    total = 0.0
    for position in LOSS_POSITIONS:
        s = torch.full_like(k, position)
        z, sigma, velocity = fm.flow_path(target, control, noise, s, k, settings["bridge_noise"])
        reference = control if settings["reference_tokens"] else None
        predicted = flux.predict_velocity(pipe.transformer, z, sigma, reference, text, settings["guidance_scale"])
        total += (predicted.float() - velocity).square().mean().item()
    return total / len(LOSS_POSITIONS)


def validate(pipe, items, text, settings, steps, seed, grid_path, images=(), lpips=None):
    """Restore and score held-out items with the live model; returns {name: float} and writes the grid picture.

    items: dicts with target, control (3, H, W) in [-1, 1]. text: TextEmbeds of batch 1. images: (H, W, 3) uint8
    degraded photographs without target. Everything random is drawn from `seed`, nothing from global state."""
    device, scores, rows, captions = next(pipe.vae.parameters()).device, {}, [], []
    with restore.evaluating(pipe.transformer):
        for i, item in enumerate(items):
            control, target = item["control"][None].to(device), item["target"][None].to(device)
            restored = restore.restore(pipe, control, text, settings, steps, [seed + i])
            score = {
                "psnr": metrics.psnr(restored, target)[0], "ssim": metrics.ssim(restored, target)[0],
                "psnr_input": metrics.psnr(control, target)[0], "ssim_input": metrics.ssim(control, target)[0],
                "psnr_vae": metrics.psnr(restore.round_trip(pipe.vae, target), target)[0],
                "loss": fixed_sigma_loss(pipe, flux.encode(pipe.vae, target), flux.encode(pipe.vae, control), text,
                                         settings, [seed + i]),
            }
            if lpips is not None:
                score["lpips"] = metrics.lpips_distance(lpips, restored, target)[0]
            for name, value in score.items():
                scores.setdefault(f"validation/{name}", []).append(float(value))
            rows.append([control[0], restored[0], target[0]])
            captions.append([f"{score['psnr_input']:.2f} dB", f"{score['psnr']:.2f} dB", ""])
        for image in images:
            control = (to_tensor(image) * 2 - 1)[None]
            restored = restore_tiled(pipe, control, text, settings, steps, seed,
                                     tiling=Tiling(trained_side(settings, pipe.vae)))
            rows.append([control[0], restored[0], torch.ones_like(control[0])])
            captions.append(["", "", "no target"])
    save_grid(rows, ["input", "restored", "target"], captions, grid_path)
    return {name: sum(values) / len(values) for name, values in scores.items()}


def thumbnails(images):
    """(N, 3, 16, 16) on the CPU of images, each (3, H, W): what is left of them when details and small shifts are
    averaged away."""
    return torch.cat([F.interpolate(image[None].float().cpu(), size=(THUMBNAIL_PX, THUMBNAIL_PX), mode="area")
                      for image in images])


def nearest_distance(images, subject):
    """Distance of each image (3, H, W) to the nearest of the thumbnails `subject` (N, 3, 16, 16): root mean square
    over their pixels, in 8-bit levels. (len(images),). 0 for an image that is one of the subject's."""
    difference = thumbnails(images)[:, None] - subject[None]
    return 127.5 * difference.square().flatten(2).mean(2).sqrt().min(1).values


@torch.no_grad()
def validate_subject(pipe, text, settings, steps, seed, count, size, subject, grid_path):
    """Generate `count` images of `size` (height, width) from text with the seeds seed, seed + 1, ... and draw them;
    returns {"validation/nearest_instance": mean distance to the nearest training image, see nearest_distance}."""
    with restore.evaluating(pipe.transformer):
        images = [generate(pipe, text, [], settings, steps, *size, [seed + i])[0] for i in range(count)]
    distances = nearest_distance(images, subject).tolist()
    save_grid([images], [f"seed {seed + i}" for i in range(count)], [[f"nearest {d:.1f}" for d in distances]],
              grid_path)
    return {"validation/nearest_instance": sum(distances) / count}


@torch.no_grad()
def validate_edits(pipe, items, texts, settings, steps, seed, grid_path, image_text=None, references=(), count=1):
    """Edit the references of held-out items, score the results against the true edited images, and draw them; edit
    `references` (1, 3, H, W), which have no true edit, `count` times and draw that. Returns {name: float}.

    items: of my_dataset.dataset_dreambooth. texts: their TextEmbeds of batch 1. psnr_input is what doing nothing
    scores, where the first reference has the target's size; psnr_vae is the autoencoder's ceiling."""
    device, scores, rows, captions = next(pipe.vae.parameters()).device, {}, [], []
    with restore.evaluating(pipe.transformer):
        for i, (item, text) in enumerate(zip(items, texts, strict=True)):
            target, sources = item["target"][None].to(device), [image[None].to(device) for image in item["references"]]
            edited = generate(pipe, text, sources, settings, steps, *target.shape[-2:], [seed + i])
            score = {"psnr": metrics.psnr(edited, target)[0],
                     "psnr_vae": metrics.psnr(restore.round_trip(pipe.vae, target), target)[0]}
            if sources[0].shape == target.shape:
                score["psnr_input"] = metrics.psnr(sources[0], target)[0]
            for name, value in score.items():
                scores.setdefault(f"validation/{name}", []).append(float(value))
            rows.append([*item["references"], edited[0], item["target"]])
            captions.append([f"{score['psnr_input']:.2f} dB" if "psnr_input" in score else ""]
                            + [""] * (len(sources) - 1) + [f"{score['psnr']:.2f} dB", item["prompt"][:40]])
        for i in range(count if references else 0):
            edited = generate(pipe, image_text, references, settings, steps, *references[0].shape[-2:], [seed + i])
            rows.append([*(image[0] for image in references), edited[0], torch.ones_like(edited[0])])
            captions.append([""] * len(references) + [f"seed {seed + i}", "no target"])
    sources = len(rows[0]) - 2
    save_grid(rows, [f"reference {i + 1}" for i in range(sources)] + ["edited", "target"], captions, grid_path)
    return {name: sum(values) / len(values) for name, values in scores.items()}


def save_grid(rows, labels, captions, path):
    """image_grid in a PNG file whose folder is made. Of several processes the first one writes it."""
    if int(os.environ.get("RANK", "0")):
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image_grid(rows, labels, captions).save(path)

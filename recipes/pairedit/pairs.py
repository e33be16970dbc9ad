"""Image pairs: <datasets_folder>/<dataset>/source and target, with the same file names."""

from pathlib import Path

import torch

from my_dataset.dataset_deg_paired import by_stem, to_tensor
from my_dataset.degradations import resize
from my_dataset.images import load_image
from utils import flux
from utils.checkpoint import sha256


def find_pairs(folder, source_folder="source", target_folder="target"):
    """[(source path, target path)] of a dataset, matched by name without extension. ValueError for one without its
    partner, FileNotFoundError for a folder that is not there or holds no image."""
    folder = Path(folder)
    for name in (source_folder, target_folder):
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder / name}: no such folder; a dataset holds {source_folder}/ and "
                                    f"{target_folder}/ with the same file names")
    sources, targets = by_stem(folder / source_folder), by_stem(folder / target_folder)
    if alone := sorted(sources.keys() ^ targets.keys()):
        path, other = ((sources[alone[0]], target_folder) if alone[0] in sources else
                       (targets[alone[0]], source_folder))
        raise ValueError(f"{path} has no partner of its name in {other}/ ({len(alone)} such files); add it, or take "
                         "the file away")
    return [(sources[stem], targets[stem]) for stem in sources]


def find_image(folder, image_id):
    """The image <folder>/<image_id>.*; ValueError where there is none."""
    images = by_stem(folder)
    if str(image_id) not in images:
        raise ValueError(f"--image_ids {image_id}: {folder} has no such image; it has {', '.join(sorted(images)[:8])}")
    return images[str(image_id)]


def load_pair(source, target, side_px):
    """(source, target), each (1, 3, side_px, side_px) in [-1, 1]. ValueError where their sizes differ."""
    images = [load_image(path).rgb for path in (source, target)]
    if images[0].shape != images[1].shape:
        (h, w), (other_h, other_w) = images[0].shape[:2], images[1].shape[:2]
        raise ValueError(f"{target} is {other_w}x{other_h}, its source {w}x{h}; a pair must match pixel by pixel")
    return tuple(square(rgb, side_px) for rgb in images)


def load_square(path, side_px):
    """An image file as (1, 3, side_px, side_px) in [-1, 1]: its central square, antialiased."""
    return square(load_image(path).rgb, side_px)


def square(rgb, side_px):
    height, width = rgb.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    crop = rgb[top:top + side, left:left + side]
    return to_tensor(crop if side == side_px else resize(crop, side_px, side_px, "lanczos"))[None]


def check_pairs(pairs, side_px):
    """Read every pair once, before a model loads. ValueError naming the file."""
    for source, target in pairs:
        load_pair(source, target, side_px)


def fingerprint(pairs):
    """A text that changes with any file of the pairs."""
    return " ".join(sha256(path)[:16] for pair in pairs for path in pair)


@torch.no_grad()
def encode_images(vae, tasks, side_px, device):
    """For each task (mean, standard deviation) of the posteriors of its pairs, each (pairs, 2, C, h, w) on `device`;
    zeros of one pair where it has no images."""
    encoded = {}
    for task in tasks:
        if (key := tuple(task.images)) in encoded:
            continue
        stacks = [torch.stack(parts) for parts in zip(*(
            flux.posterior(vae, torch.cat(load_pair(*pair, side_px)).to(device)) for pair in task.images), strict=True)]
        encoded[key] = stacks or [torch.zeros(1, 2, *flux.latent_shape(vae, side_px, side_px), device=device)] * 2
    return [encoded[tuple(task.images)] for task in tasks]

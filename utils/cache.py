"""VAE latents kept on disk, one safetensors file per image, keyed by the pixels themselves and the VAE's config:
an entry cannot be met by another image, whatever the order, crop or epoch."""

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils import flux


def encode_cached(vae, images, folder, noise=None):
    """flux.encode(vae, images, noise) through the cache of posteriors in `folder`, made if it is not there.

    images: (B, 3, H, W) in [-1, 1]. Missing entries are encoded one by one and written by rename, so that processes
    can share the folder and an interrupted write leaves nothing half."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The first layer tells one VAE's weights from another's in the same layout.
    config = repr(sorted(vae.config.items())).encode() + next(vae.parameters()).float().cpu().numpy().tobytes()
    entries = []
    for image in images:
        key = hashlib.blake2b(config, digest_size=20)
        key.update(str(("posterior", tuple(image.shape), vae.dtype)).encode())
        key.update(image.cpu().contiguous().numpy())
        path = folder / f"{key.hexdigest()}.safetensors"
        entry = read_entry(path)
        if entry is None:
            mean, std = flux.posterior(vae, image[None].to(next(vae.parameters()).device))
            entry = {"mean": mean.cpu(), "std": std.cpu()}
            scratch = path.with_suffix(f".{os.getpid()}.tmp")
            save_file(entry, scratch)
            os.replace(scratch, path)
        entries.append(entry)
    mean, std = (torch.cat([entry[name] for entry in entries]).to(images.device) for name in ("mean", "std"))
    return mean if noise is None else mean + std * noise.to(mean)


def read_entry(path):
    """The posterior in `path`, {"mean", "std"}, or None if it is not there or not whole (it is then made again)."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None

"""What is encoded once and kept on disk, one safetensors file per item: VAE posteriors, keyed by the pixels themselves
and the VAE, and texts, keyed by the prompt and the text encoders. An entry cannot be met by another item, whatever the
order, crop or epoch, and processes can share the folder."""

import hashlib
import os
import weakref
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from utils import flux

PROMPTS_IN_MEMORY = 32


first_layers = weakref.WeakKeyDictionary()


def vae_key(vae):
    """Tells one VAE from another: its config, and its first layer, which differs between weights of one layout and is
    fetched from the device once."""
    if vae not in first_layers:
        first_layers[vae] = next(vae.parameters()).detach().float().cpu().numpy().tobytes()
    return repr(sorted(vae.config.items())).encode() + first_layers[vae]


def encode_cached(vae, images, folder, noise=None, is_offloaded=False):
    """flux.encode(vae, images, noise) through the cache of posteriors in `folder`, made if it is not there.

    images: (B, 3, H, W) in [-1, 1]. Missing entries are encoded one by one. is_offloaded: the VAE lies on the CPU and
    goes to the images' device for that."""
    store = PosteriorFiles(folder)
    entries = [cached_posterior(vae, image, store, flux.posterior, is_offloaded)[1] for image in images]
    mean, std = (torch.cat([entry[name] for entry in entries]).to(images.device) for name in ("mean", "std"))
    return mean if noise is None else mean + std * noise.to(mean)


def cached_posterior(vae, image, store, posterior, is_offloaded=False):
    """(name, {"mean", "std"}, each (1, C, h, w) on the CPU) of an image (3, H, W): from `store`, PosteriorFiles or a
    dict, or made by posterior(vae, images) and put there. The name tells all images and VAEs apart."""
    key = hashlib.blake2b(vae_key(vae), digest_size=20)
    key.update(str(("posterior", tuple(image.shape), vae.dtype)).encode())
    key.update(image.cpu().contiguous().numpy())
    name = key.hexdigest()
    entry = store.get(name)
    if entry is None:
        with flux.on_device(vae, image.device, is_offloaded):
            mean, std = posterior(vae, image[None])
        store[name] = entry = {"mean": mean.cpu(), "std": std.cpu()}
    return name, entry


class PosteriorFiles:
    """{name: {"mean", "std"}} in files of a folder."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def __getitem__(self, name):
        return load_file(self.folder / f"{name}.safetensors")

    def get(self, name):
        """The posterior, or None if it is not there or not whole (it is then made again)."""
        try:
            return self[name]
        except (FileNotFoundError, SafetensorError):
            return None

    def __setitem__(self, name, tensors):
        write_entry(self.folder / f"{name}.safetensors", tensors)


class TextCache:
    """{prompt: TextEmbeds of batch 1} in files of a folder, read when they are asked for: at FLUX's size a prompt is
    4 MB, and ten thousand captions fit no memory. encoders: what the texts were encoded with, as text. kind: another
    dataclass of tensors, in place of TextEmbeds."""

    def __init__(self, folder, encoders, kind=flux.TextEmbeds):
        self.folder, self.encoders, self.kind = Path(folder), encoders, kind

    def path(self, prompt):
        key = hashlib.blake2b(f"{self.encoders}\n{prompt}".encode(), digest_size=20)
        return self.folder / f"{key.hexdigest()}.safetensors"

    def __contains__(self, prompt):
        """True if its file is there and whole; only the file's header is read."""
        try:
            with safe_open(self.path(prompt), "pt"):
                return True
        except (FileNotFoundError, SafetensorError):
            return False

    def __getitem__(self, prompt):
        return self.kind(**load_file(self.path(prompt)))

    def __setitem__(self, prompt, text):
        write_entry(self.path(prompt), vars(text))


def encode_all(path, prompts, accelerator, dtype, max_sequence_length, folder, **where):
    """{prompt: TextEmbeds of batch 1 on the CPU} like flux.encode_prompts, for training. More than PROMPTS_IN_MEMORY
    different prompts go to a TextCache in `folder`, each encoded by one of the processes, and not again on a resume.
    where: revision, variant, cache_dir."""
    prompts = list(dict.fromkeys(prompts))
    if len(prompts) <= PROMPTS_IN_MEMORY:
        return flux.encode_prompts(path, prompts, accelerator.device, dtype, max_sequence_length, **where)
    texts = TextCache(folder, encoders_key(path, flux.TEXT_PARTS, dtype, max_sequence_length, **where))
    missing = [prompt for prompt in prompts[accelerator.process_index :: accelerator.num_processes]
               if prompt not in texts]
    if missing:
        flux.encode_prompts(path, missing, accelerator.device, dtype, max_sequence_length, encoded=texts, **where)
    accelerator.wait_for_everyone()
    return texts


def encoders_key(path, parts, dtype, max_sequence_length, revision=None, variant=None, cache_dir=None):
    """Tells what texts are encoded with, as text: the model, the files of its `parts` where it is a folder, and how."""
    local = sorted((str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns)
                   for part in parts for file in Path(path, part).glob("*"))
    return repr((str(path), revision, variant, local, str(dtype), max_sequence_length))


def write_entry(path, tensors):
    """Write a safetensors file by rename, so that processes can share the folder and nothing half is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch)
    os.replace(scratch, path)

"""Generate images with Kontext: from text alone, or by editing one or several reference images."""

import hashlib
import os

import torch
from tqdm import tqdm

from utils import flux
from utils.restore import STOCK_SETTINGS, draw_noise, pad_to_multiple, sample_latents
from utils.utils import to_pil

CLASS_GUIDANCE = 3.5  # stock Kontext's default, with which the official script makes class images
CLASS_STEPS = 28


@torch.no_grad()
def generate(pipe, text, references, settings, steps, height, width, seeds):
    """Images (B, 3, height, width) in [-1, 1], one per seed, as stock Kontext samples them: pure noise at the start and
    the model folder's own schedule.

    text: TextEmbeds of batch 1 or B. references: list of images (1 or B, 3, H, W) in [-1, 1], each of its own size;
    empty for text to image. settings: as stored in a LoRA file, or restore.STOCK_SETTINGS. A size that is no multiple
    of the model's is generated at the next larger one and cropped."""
    device, multiple, batch = next(pipe.vae.parameters()).device, flux.size_multiple(pipe.vae), len(seeds)
    shape = flux.latent_shape(pipe.vae, *(-(-side // multiple) * multiple for side in (height, width)))
    latents = [flux.encode(pipe.vae, pad_to_multiple(image, multiple).to(device)).expand(batch, -1, -1, -1)
               for image in references]
    z = sample_latents(pipe, draw_noise(shape, seeds).to(device), latents, text.expand(batch), settings, steps)
    return flux.decode(pipe.vae, z)[..., :height, :width].clamp(-1, 1)


def generate_class_images(path, prompt, files, side_px, batch_size, seed, device, dtype, max_sequence_length,
                          precision, **where):
    """Generate the class images `files`, side_px square PNGs, with the base model at `path`; each is written by rename
    and is a function of its name, `prompt` and `seed` alone. precision: from
    placement.precision. where: revision, variant, cache_dir."""
    if not files:
        return
    text = flux.encode_prompts(path, [prompt], device, dtype, max_sequence_length, **where)[prompt].to(device, dtype)
    pipe = flux.load_models(path, device, dtype, **precision, **where)
    settings = STOCK_SETTINGS | {"guidance_scale": CLASS_GUIDANCE}
    for i in tqdm(range(0, len(files), batch_size), desc="class images", unit="batch", disable=None):
        names = files[i:i + batch_size]
        seeds = [int.from_bytes(hashlib.blake2b(f"{seed} {file.name}".encode(), digest_size=7).digest())
                 for file in names]
        images = generate(pipe, text, [], settings, CLASS_STEPS, side_px, side_px, seeds)
        for file, image in zip(names, images, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            scratch = file.with_name(f".{file.name}.tmp")
            to_pil(image).save(scratch, "PNG")
            os.replace(scratch, file)

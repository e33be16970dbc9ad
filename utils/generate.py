"""Generate images with Kontext: from text alone, or by editing one or several reference images."""

import torch

from utils import flux
from utils.restore import draw_noise, pad_to_multiple, sample_latents


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

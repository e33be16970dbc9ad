"""Restore images with the settings that the LoRA was trained with."""

import contextlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift

from utils import flow_matching as fm
from utils import flux

SETTINGS_FILE = "sampling_settings.json"  # in the folder of a model that a LoRA was merged into
# Stock Kontext's own behaviour: what a LoRA file without our settings, or no LoRA at all, is sampled with.
STOCK_SETTINGS = {
    "start_noise": [1.0, 1.0],
    "bridge_noise": 0.0,
    "train_sigmas": "table",
    "timestep_shift": "none",
    "reference_tokens": True,
    "vae_encode_mode": "mode",
    "guidance_scale": 2.5,
    "max_sequence_length": 512,
    "prompt": "Restore this degraded photograph to high fidelity",
    "resolution": None,
    "base_model": None,
}


def make_settings(args):
    """The settings that sampling needs, from the training script's arguments; JSON-safe, stored in the LoRA file.
    resolution: side of the square crops in training, None where they had several shapes."""
    return {
        "start_noise": list(fm.parse_start_noise(args.start_noise)),
        "bridge_noise": args.bridge_noise,
        "train_sigmas": fm.parse_train_sigmas(args.train_sigmas),
        "timestep_shift": args.timestep_shift,
        "reference_tokens": args.reference_tokens,
        "vae_encode_mode": args.vae_encode_mode,
        "guidance_scale": args.guidance_scale,
        "max_sequence_length": args.max_sequence_length,
        "prompt": args.instance_prompt,
        "resolution": None if args.use_bucket_sampler or args.aspect_ratio_buckets else args.resolution,
        "base_model": args.base_model_id,
    }


def choose_start_noise(settings, start_noise=None):
    """The start noise to sample with: the middle of the trained range, or `start_noise` if it lies inside."""
    lo, hi = settings["start_noise"]
    if start_noise is None:
        return (lo + hi) / 2
    if not lo <= start_noise <= hi:
        raise ValueError(f"--start_noise {start_noise}: this LoRA was trained on {lo} to {hi}; choose within, or "
                         "train another")
    return start_noise


def fidelity_start_noise(settings, fidelity):
    """The start noise that `fidelity` stands for: 1 the lowest of the LoRA's trained range, which stays closest to the
    image, 0 the highest, linear between. ValueError where the range is a single value."""
    lo, hi = settings["start_noise"]
    if lo == hi:
        raise ValueError(f"--fidelity {fidelity:g}: this model is trained at start noise {lo:g} alone, so there is "
                         "nothing to choose from; use --lora_weight")
    return hi - fidelity * (hi - lo)


def schedule(settings, steps, image_tokens, scheduler, start_noise):
    """Positions s and noise levels sigma of a sampling run, each `steps` + 1 floats that end in 0.

    Start noise 1 follows the model folder's scheduler to the letter, as stock Kontext does. Below 1 the schedule is
    the trained one, and that scheduler, which would shift any sigmas it is given, has no part in it."""
    if steps < 1:
        raise ValueError(f"--num_inference_steps {steps}: give 1 or more")
    if start_noise == 1:
        stock = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        config = stock.config
        mu = calculate_shift(image_tokens, config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
                             config.get("base_shift", 0.5), config.get("max_shift", 1.15))
        stock.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu)
        sigmas = stock.sigmas.tolist()
        return sigmas, sigmas
    mu = fm.resolution_mu(image_tokens) if settings["timestep_shift"] == "resolution" else None
    positions = fm.sampling_positions(steps, settings["train_sigmas"], mu)
    return positions, [s * (start_noise or 1) for s in positions]


def noise_levels(vae, scheduler, steps, width, height):
    """`steps` + 1 floats from 1 to 0: the model folder's schedule at this size in px, as stock samples it."""
    return schedule(STOCK_SETTINGS, steps, flux.image_tokens(vae, [(height, width)]), scheduler, start_noise=1)[0]


@contextlib.contextmanager
def evaluating(*models):
    """Inside, the models are in evaluation mode; afterwards as they were."""
    were_training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was_training in zip(models, were_training, strict=True):
            model.train(was_training)


def draw_noise(shape, seeds):
    """Standard normal (B, *shape), item i from its own CPU generator seeded with seeds[i]."""
    return torch.cat([torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@dataclass
class Noise:
    """Everything random in a restoration, standard normal. start: (B, C, h, w). bridge: one such field for each step
    but the last, with bridge noise. vae: one such field where the posterior is sampled."""

    start: torch.Tensor
    bridge: list[torch.Tensor] = field(default_factory=list)
    vae: torch.Tensor | None = None

    def crop(self, rows, columns):
        """The same noise at the latents rows, columns (two slices)."""
        where = (..., rows, columns)
        return Noise(self.start[where], [draw[where] for draw in self.bridge],
                     None if self.vae is None else self.vae[where])


def stack_noise(parts):
    """Noise of several batches as one batch."""
    bridge = [torch.cat(draws) for draws in zip(*(part.bridge for part in parts), strict=True)]
    vae = None if parts[0].vae is None else torch.cat([part.vae for part in parts])
    return Noise(torch.cat([part.start for part in parts]), bridge, vae)


def sampling_noise(settings, shape, steps, seeds):
    """The Noise of latents (B, *shape) on the CPU; item i's depends on seeds[i] and `shape` alone. The start's is what
    stock Kontext draws."""
    bridge = []
    if settings["bridge_noise"]:
        generators = [torch.Generator().manual_seed(seed ^ 0x5EED) for seed in seeds]
        bridge = [torch.stack([torch.randn(shape, generator=generator) for generator in generators])
                  for _ in range(steps - 1)]
    sampled = settings["vae_encode_mode"] == "sample"
    return Noise(draw_noise(shape, seeds), bridge, draw_noise(shape, [s ^ 0xC0DE for s in seeds]) if sampled else None)


@torch.no_grad()
def restore_latents(pipe, control, text, settings, steps, noise, start_noise=None):
    """Restored latents (B, C, h, w) in fp32 of the normalised latents `control`, same shape.

    text: TextEmbeds of batch B. noise: from `sampling_noise`, of the same shape."""
    k = choose_start_noise(settings, start_noise)
    start = fm.start_point(control, noise.start.to(control), torch.full((len(control),), k, device=control.device))
    references = control if settings["reference_tokens"] else None
    return sample_latents(pipe, start, references, text, settings, steps, k, noise.bridge)


@torch.no_grad()
def sample_latents(pipe, start, references, text, settings, steps, start_noise=1.0, bridge=()):
    """Latents (B, C, h, w) in fp32 at the end of the flow from `start`, which has the same shape.

    references: as for flux.predict_velocity. text: TextEmbeds of batch B or 1. bridge: the noise fields of
    Noise.bridge."""
    z = start
    positions, sigmas = schedule(settings, steps, z.shape[-2] * z.shape[-1] // flux.PATCH**2, pipe.scheduler,
                                 start_noise)
    for i in range(steps):
        told = torch.full((len(z),), sigmas[i])
        velocity = flux.predict_velocity(pipe.transformer, z, told, references, text, settings["guidance_scale"])
        draw = bridge[i].to(z) if i < len(bridge) else None
        z = fm.flow_step(z, velocity.float(), sigmas[i], sigmas[i + 1], positions[i], positions[i + 1],
                         settings["bridge_noise"], draw)
    return z


@torch.no_grad()
def restore_padded(pipe, control, text, settings, steps, noise, start_noise=None):
    """Restored images (B, 3, H, W), about [-1, 1] and not clamped, of `control` (B, 3, H, W) in [-1, 1], whose sides
    are multiples of flux.size_multiple. noise: from `sampling_noise`, of the latents' shape."""
    latents = flux.encode(pipe.vae, control, None if noise.vae is None else noise.vae.to(control))
    return flux.decode(pipe.vae, restore_latents(pipe, latents, text, settings, steps, noise, start_noise))


def restore(pipe, control, text, settings, steps, seeds, start_noise=None):
    """Restored images (B, 3, H, W) in [-1, 1], of exactly the size of `control` (B, 3, H, W) in [-1, 1].

    seeds: B integers. Sides that are no multiple of the model's are padded by reflection and cropped again; nothing
    is resized. utils.tiles restores what is too large for the model."""
    height, width = control.shape[-2:]
    padded = pad_to_multiple(control, flux.size_multiple(pipe.vae))
    noise = sampling_noise(settings, flux.latent_shape(pipe.vae, *padded.shape[-2:]), steps, seeds)
    restored = restore_padded(pipe, padded, text, settings, steps, noise, start_noise)
    return restored[..., :height, :width].clamp(-1, 1)


def pad_to_multiple(images, multiple, before=0):
    """Images (B, 3, H, W) with `before` px more at the top and the left and sides grown to the next multiple, by
    reflection; by repetition where too small."""
    height, width = images.shape[-2:]
    bottom, right = -(before + height) % multiple, -(before + width) % multiple
    mode = "reflect" if max(before, bottom) < height and max(before, right) < width else "replicate"
    return F.pad(images, (before, right, before, bottom), mode=mode)


@torch.no_grad()
def round_trip(vae, images):
    """Images through the VAE and back, in [-1, 1] and the same size: the ceiling of every restoration."""
    height, width = images.shape[-2:]
    latents = flux.encode(vae, pad_to_multiple(images, flux.size_multiple(vae)))
    return flux.decode(vae, latents)[..., :height, :width].clamp(-1, 1)

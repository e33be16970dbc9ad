"""What PairEdit's variants regress: every variant is a list of passes through the transformer, each with its own input,
its own target and its own LoRAs. One optimizer step makes all passes of a batch.

With z_A, z_B the latents of source and target, eps one noise for both, s the noise scale, sigma in (0, 1]:

    variant     active LoRAs           input                              target
    full        content                x_A = z_A + sigma s eps            s eps
                content + semantic     x_A                                s eps + eta (z_A - z_B)
    wocontent   semantic               x_A                                s eps + eta (z_A - z_B)
    wocfg       content                x_A                                s eps
                content + semantic     x_B = z_B + sigma s eps            s eps
    fm          content                (1 - sigma) z_A + sigma s eps      s eps - z_A
                content + semantic     the same                           s eps - z_A + eta (z_A - z_B)
    sliders     semantic at +1         (1 - sigma) z_B + sigma s eps      s eps - z_B
                semantic at -1         (1 - sigma) z_A + sigma s eps      s eps - z_A
    real        content                (1 - sigma) z_A + sigma s eps      s eps - z_A

The content LoRA learns what the pair has in common, and the semantic one what remains, eta (z_A - z_B): its weight is
the slider. x_A is not shrunk by 1 - sigma, so that the image stays visible at sigma 1 (PairEdit, arXiv 2506.07992,
and its released code; sliders: Gandikota et al. 2023, arXiv 2311.12092).
"""

from dataclasses import dataclass

import torch

CONTENT, SEMANTIC = "content", "semantic"
VARIANTS = {  # by the names of the original's programs, which are also parts of file names
    "train_image": "full", "train_image_wocontent": "wocontent", "train_image_wocfg": "wocfg", "train_image_fm": "fm",
    "train_image_sliders": "sliders", "train_image_real": "real", "slider_text": "text",
}


@dataclass
class Pass:
    """One forward and backward. loss: its name. active: {adapter: weight}. learns: the adapter that gets gradients.
    latents, target: (B, C, h, w), what goes in and the velocity that should come out."""

    loss: str
    active: dict
    learns: str
    latents: torch.Tensor
    target: torch.Tensor


def adapters_of(variant):
    """The LoRAs that a variant trains."""
    return {"full": [CONTENT, SEMANTIC], "wocfg": [CONTENT, SEMANTIC], "fm": [CONTENT, SEMANTIC],
            "real": [CONTENT]}.get(variant, [SEMANTIC])


def pair_passes(variant, source, target, sigma, noise, noise_scale=1.0, eta=4.0, fm_target="velocity"):
    """The passes of the table above. source, target, noise: (B, C, h, w). sigma: (B,) in (0, 1]. fm_target "noise":
    fm's targets without their z_A, as some forks have it, which is no velocity of that path."""
    sigma = sigma.view(-1, 1, 1, 1)
    noise = noise_scale * noise
    edit = eta * (source - target)
    both = {CONTENT: 1.0, SEMANTIC: 1.0}

    def preserved(clean):
        return clean + sigma * noise

    def interpolated(clean):
        return (1 - sigma) * clean + sigma * noise

    if variant == "full":
        return [Pass(CONTENT, {CONTENT: 1.0}, CONTENT, preserved(source), noise),
                Pass(SEMANTIC, both, SEMANTIC, preserved(source), noise + edit)]
    if variant == "wocontent":
        return [Pass(SEMANTIC, {SEMANTIC: 1.0}, SEMANTIC, preserved(source), noise + edit)]
    if variant == "wocfg":
        return [Pass(CONTENT, {CONTENT: 1.0}, CONTENT, preserved(source), noise),
                Pass(SEMANTIC, both, SEMANTIC, preserved(target), noise)]
    if variant == "fm":
        velocity = noise - source if fm_target == "velocity" else noise
        return [Pass(CONTENT, {CONTENT: 1.0}, CONTENT, interpolated(source), velocity),
                Pass(SEMANTIC, both, SEMANTIC, interpolated(source), velocity + edit)]
    if variant == "sliders":
        return [Pass("positive", {SEMANTIC: 1.0}, SEMANTIC, interpolated(target), noise - target),
                Pass("negative", {SEMANTIC: -1.0}, SEMANTIC, interpolated(source), noise - source)]
    if variant == "real":
        return [Pass(CONTENT, {CONTENT: 1.0}, CONTENT, interpolated(source), noise - source)]
    raise ValueError(f"no variant {variant}")


def text_target(neutral, positive, negative, eta):
    """What a text slider regresses, (B, C, h, w): the neutral prompt's velocity moved towards the positive prompt and
    away from the negative one, at the positive velocity's norm: g = v0 + eta (v+ - v-), g |v+| / |g| (Concept Sliders'
    form for FLUX, norms over the whole tensor of an image)."""
    guided = neutral + eta * (positive - negative)
    norms = [value.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for value in (positive, guided)]
    return guided * norms[0] / norms[1].clamp_min(1e-12)

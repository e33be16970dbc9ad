"""FLUX.1-Kontext in full size with random weights, made on the device in seconds: what a step costs does not depend on
what the model has learnt. Zeros would: a GPU multiplies them measurably faster than random numbers."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

from utils import flux, memory

WEIGHT_STD = 0.02  # small enough that bf16 activations stay finite through 57 blocks
BIAS_STD = 0.001


def random_pipeline(device, dtype, layers=(19, 38), heads=24):
    """The FluxKontextPipeline that flux.load_models gives, frozen, with random weights from torch's generator.

    layers: numbers of double and of single blocks; heads: of attention, 128 wide each. FLUX.1 has (19, 38) and 24."""
    config = memory.KONTEXT | {"num_layers": layers[0], "num_single_layers": layers[1], "num_attention_heads": heads}
    transformer, vae = memory.meta_transformer(config, dtype), memory.meta_vae(memory.KONTEXT_VAE, dtype)
    for model in (transformer, vae):
        model.to_empty(device=device).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.fill_(1.0)  # of norms
            else:
                parameter.normal_(std=BIAS_STD if name.endswith("bias") else WEIGHT_STD)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    return FluxKontextPipeline(scheduler, vae, None, None, None, None, transformer)


def random_text(transformer, batch, tokens, device, dtype):
    """TextEmbeds of one random prompt, `batch` times."""
    config = transformer.config
    return flux.TextEmbeds(torch.randn(1, tokens, config.joint_attention_dim, device=device, dtype=dtype),
                           torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype)).expand(batch)

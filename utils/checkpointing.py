"""Gradient checkpointing in degrees: what a block's forward keeps for backward, and what backward computes again."""

import contextlib
import functools

from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from utils.offload import CheckpointOffload

CHECKPOINTING = ["none", "selective", "full", "offload"]


def enable_checkpointing(transformer, mode):
    """Set what the transformer's blocks keep on its device for backward. Gradients are the same in every mode.

    mode: "none" keeps all; "selective" the blocks' inputs and the attention's outputs, so that attention, the dearest
    part of long sequences, is not computed twice; "full" the inputs alone; "offload" keeps those in host memory. Call
    it when the transformer is where it will compute."""
    if mode == "none":
        transformer.disable_gradient_checkpointing()
        return
    contexts, hooks = noop_context_fn, contextlib.nullcontext
    if mode == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, keep_attention)
    if mode == "offload":
        hooks = CheckpointOffload(transformer.device).hooks

    def run_checkpointed(block, *args):
        with hooks():
            return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)

    transformer.enable_gradient_checkpointing(run_checkpointed)


def keep_attention(context, operator, *args, **kwargs):
    """Policy of selective checkpointing. Every backend of scaled_dot_product_attention, and flash-attention's own
    operators, have it in their name."""
    is_attention = "attention" in str(operator) or "flash_attn" in str(operator)
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE

"""A frozen transformer split over the GPUs of a run (PyTorch's FSDP2), so that each holds 1/N of its weights.

What is trained, the LoRA, stays whole on every rank and goes through DistributedDataParallel as ever: optimizer, moving
average, checkpoint and LoRA file are those of a run that is not split, and so are the numbers, to the bit."""

import os
import warnings

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from utils import lora

SWITCHES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # what `accelerate launch` tells a script of its config


def take_over():
    """True if the config of `accelerate launch` splits frozen weights: FSDP, or DeepSpeed's ZeRO-3. Its switches are
    taken out of the environment, before an Accelerator sees them: FSDP by Accelerate would split the LoRA too, and is
    silently DDP on a CPU; DeepSpeed's engine keeps what is trained and what is frozen in one dtype. ZeRO-2 splits the
    optimizer's state alone, which for a LoRA is small: it is DDP here."""
    fsdp, deepspeed = (os.environ.pop(name, "false").lower() == "true" for name in SWITCHES)
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") if deepspeed else None
    if deepspeed and int(os.environ.get("RANK", "0")) == 0:
        print(f"DeepSpeed ZeRO-{stage}: " + ("the frozen weights are split by PyTorch's FSDP2" if stage == "3" else
              "a LoRA's optimizer state is small and stays whole, so this is plain DDP"), flush=True)
    return fsdp or stage == "3"


def shard_frozen(transformer, device):
    """Split the frozen weights of a FLUX transformer with its LoRA attached over all processes. A block is whole on
    `device` while it computes, and the next one on its way; every forward and backward is then one of all ranks.

    The transformer may lie on the CPU: it comes to `device` block by block."""
    # Nothing works in place on what a block returns; tests compare the gradients with those of the whole model.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    kept = set(lora.parameters(transformer))
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        fully_shard(block, mesh=mesh, ignored_params=kept)
    fully_shard(transformer, mesh=mesh, ignored_params=kept)

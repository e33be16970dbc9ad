"""What a training step costs in FLOPs, bytes, launches and memory, exactly and without a GPU or weights:
    OMP_NUM_THREADS=1 python -m bench.flops --resolution 1024 --batch 1 --checkpointing selective

One step on the meta device is counted on models of few blocks and multiplied (utils/memory.py). A multiplication and an
addition are two FLOPs; only matrix products and attention count. Useful FLOPs, for MFU: forward and backward without
recomputation, attention's backward as four matrix products. Executed: flash attention's five, and what checkpointing
computes again. Bytes: eager mode, every operation reads its inputs and writes its results once."""

import argparse
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from utils import flux, lora, memory
from utils.checkpointing import CHECKPOINTING, enable_checkpointing
from utils.parse import check_least, run_main, write_json

FREE_GIB = (7.6, 11.6, 15.6, 23.5, 31.4, 47.4, 79.1)  # of cards of 8 to 80 GB
GROUPS = ("AdaLN", "double blocks, attention", "double blocks, feed-forward", "single blocks, attention",
          "single blocks, feed-forward", "embedders, proj_out")


def group_of(name):
    """The one of GROUPS that the transformer's parameter `name` belongs to."""
    if "time_text_embed" in name or name.rpartition(".")[0].endswith(("norm.linear", "norm1.linear",
                                                                       "norm1_context.linear", "norm_out.linear")):
        return "AdaLN"
    if name.startswith("transformer_blocks."):
        return "double blocks, attention" if ".attn." in name else "double blocks, feed-forward"
    if name.startswith("single_transformer_blocks."):
        return "single blocks, attention" if ".attn." in name else "single blocks, feed-forward"
    return "embedders, proj_out"


class Traffic(TorchDispatchMode):
    """Launches of operations, and the bytes that they read and write; views and empty tensors cost nothing."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {id(tensor): tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        results = [tensor for tensor in tree_iter(result) if isinstance(tensor, torch.Tensor)]
        storages = {tensor.untyped_storage()._cdata for tensor in inputs.values()}
        is_view = not func._schema.is_mutable and all(tensor.untyped_storage()._cdata in storages for tensor in results)
        if not is_view and "empty" not in func.__name__:
            self.launches += 1
            # An expanded tensor has fewer bytes than elements to read.
            self.bytes += sum(min(tensor.nbytes, tensor.untyped_storage().nbytes())
                              for tensor in (*inputs.values(), *results))
        return result


def flops_of(counter):
    """(all FLOPs, attention's) of a FlopCounterMode."""
    counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    return sum(counts.values()), sum(count for name, count in counts.items() if "scaled_dot_product" in name)


def count_step(job, checkpointing="none"):
    """{quantity: integer} of one training step of a memory.Job: FLOPs and attention's part of them, launches, bytes,
    each forward and backward (with what is recomputed)."""
    def count(config):
        transformer = memory.meta_transformer(config, rank=job.rank, layers=job.layers, dropout=job.dropout)
        enable_checkpointing(transformer, checkpointing)
        counts, prediction = {}, None
        for direction in ("forward", "backward"):
            with memory.gpu_kernels(), FlopCounterMode(display=False) as counter, Traffic() as traffic:
                if prediction is None:
                    prediction = memory.meta_forward(transformer, job.batch, job.image_tokens, job.text_tokens)
                else:
                    prediction.backward(torch.empty_like(prediction))
            names = ("FLOPs", "attention", "launches", "bytes")
            values = (*flops_of(counter), traffic.launches, traffic.bytes)
            counts |= {f"{direction} {name}": value for name, value in zip(names, values, strict=True)}
        return counts

    return memory.for_all_blocks(count, job.config, job.layers)


def count_parameters(job):
    """{group: parameters}, with "all", "LoRA" and "LoRA modules"."""
    def count(config):
        plain = memory.meta_transformer(config)
        counts = dict.fromkeys(GROUPS, 0)
        for name, parameter in plain.named_parameters():
            counts[group_of(name)] += parameter.numel()
        with_lora = lora.parameters(memory.meta_transformer(config, rank=job.rank, layers=job.layers))
        return counts | {"all": sum(counts.values()), "LoRA": sum(parameter.numel() for parameter in with_lora),
                         "LoRA modules": len(with_lora) // 2}

    return memory.for_all_blocks(count, job.config, job.layers)


def count_call(job):
    """FLOPs of one call of the transformer in sampling, the LoRA merged."""
    def count(config):
        transformer = memory.meta_transformer(config)
        with memory.gpu_kernels(), FlopCounterMode(display=False) as counter, torch.no_grad():
            memory.meta_forward(transformer, job.batch, job.image_tokens, job.text_tokens)
        return {"FLOPs": counter.get_total_flops()}

    return memory.for_all_blocks(count, job.config)["FLOPs"]


def count_vae(job):
    """FLOPs of (encoding, decoding) a batch of targets."""
    vae = memory.meta_vae(job.vae_config)
    with memory.gpu_kernels(), torch.no_grad():
        with FlopCounterMode(display=False) as encoding:
            flux.encode(vae, torch.empty(job.batch, 3, *job.sizes[0], device="meta"))
        with FlopCounterMode(display=False) as decoding:
            flux.decode(vae, torch.empty(job.batch, *flux.latent_shape(vae, *job.sizes[0]), device="meta"))
    return encoding.get_total_flops(), decoding.get_total_flops()


def account(job, checkpointing="none"):
    """{quantity: integer} of everything that is counted here for a memory.Job."""
    plain = count_step(job)
    is_offload = checkpointing == "offload"  # it computes what "full" does
    mode = "full" if is_offload else checkpointing
    step = plain if mode == "none" else count_step(job, mode)
    held, peak = memory.step_bytes(job, mode, is_offload)
    encoding, decoding = count_vae(job)
    return {f"parameters: {name}": value for name, value in count_parameters(job).items()} | step | {
        "recomputed FLOPs": step["backward FLOPs"] - plain["backward FLOPs"],
        "useful FLOPs": plain["forward FLOPs"] + plain["backward FLOPs"] - plain["backward attention"] // 5,
        "useful attention": plain["forward attention"] + plain["backward attention"] * 4 // 5,
        "sampling call FLOPs": count_call(job), "VAE encoding FLOPs": encoding, "VAE decoding FLOPs": decoding,
        "saved bytes": held, "peak bytes": peak,
    }


def in_units(name, value):
    """A count as text with its unit: TFLOP, GB moved, GiB kept, or the integer."""
    if name.endswith(("FLOPs", "attention")) and "parameters" not in name:
        return f"{value / 1e12:.4g} TFLOP"
    if name in ("saved bytes", "peak bytes"):
        return f"{value / memory.GIB:.2f} GiB"
    return f"{value / 1e9:.1f} GB" if name.endswith("bytes") else f"{value:,}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id whose config files are read; default: FLUX.1-Kontext-dev's")
    parser.add_argument("--resolution", type=int, default=1024, help="side of target and reference, px")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--text_tokens", type=int, default=512)
    parser.add_argument("--reference", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", help="as --lora_layers of the training scripts")
    parser.add_argument("--checkpointing", choices=CHECKPOINTING, default="none")
    parser.add_argument("--plans", action="store_true", help="instead: the peak GiB that utils/memory.py predicts, and "
                        "what it chooses for cards of 8 to 80 GB")
    parser.add_argument("--output", help="JSON file for the integers")
    args = parser.parse_args()
    check_least(args, resolution=16, batch=1, text_tokens=1, rank=1)
    config, vae_config = memory.read_configs(args.model) if args.model else (memory.KONTEXT, memory.KONTEXT_VAE)
    sizes = ((args.resolution, args.resolution),) * (1 + args.reference)
    job = memory.Job(config, vae_config, sizes, args.batch, args.text_tokens, args.rank, args.layers)
    flux.check_sizes(memory.meta_vae(vae_config), sizes)
    if args.plans:
        print(f"Predicted, not measured: peak GiB at {args.resolution} px, batch {args.batch}\n\n"
              "| settings | GiB |\n|---|---|")
        for plan in dict.fromkeys(plan for level in memory.LEVELS for plan in memory.candidates(level)):
            print(f"| {plan.in_words()} | {sum(memory.predict(job, plan).values()) / memory.GIB:.2f} |")
        print("\n| GiB free on the card | --memory auto takes | GiB |\n|---|---|---|")
        for free in FREE_GIB:
            plan = memory.choose(job, int(free * memory.GIB))
            print(f"| {free} | {plan.in_words()} | {plan.total / memory.GIB:.1f} |")
        return
    counts = account(job, args.checkpointing)
    print(f"| {Path(args.model).name if args.model else 'FLUX.1-Kontext-dev'}, {args.resolution} px, reference "
          f"{'yes' if args.reference else 'no'}, batch {args.batch}, {job.tokens} tokens ({args.text_tokens} of text), "
          f"rank {args.rank}, checkpointing {args.checkpointing} | |\n|---|---|")
    for name, value in counts.items():
        print(f"| {name} | {in_units(name, value)} |")
    if args.output:
        write_json(args.output, vars(args) | {"tokens": job.tokens, "counts": counts})


if __name__ == "__main__":
    run_main(main)

"""What makes a step faster and leaves its numbers alone: compiled blocks, and the attention kernel that is fastest on
this card."""

import argparse
import logging
import time

import torch

from utils import flux

logger = logging.getLogger("kontext")
# diffusers would say with every run that attention backends are experimental.
logging.getLogger("diffusers.models.modeling_utils").addFilter(lambda record: "experimental" not in record.msg)
BACKEND = "inductor"
COMPILE_STEPS = 300  # a run this long pays for its compilation: 30 to 90 s on a card (PyTorch's and our own figures)
MAX_VARIANTS = 64  # compiled forms of one block, at most: 17 buckets, with and without gradients, last batches
ATTENTION_BACKENDS = ("native", "_native_cudnn", "_native_flash", "_flash_3", "flash")


def add_speed_args(parser):
    group = parser.add_argument_group("speed")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                       help=f"compile the transformer's blocks; default: on a GPU for {COMPILE_STEPS} steps or more")
    group.add_argument("--attention_backend", default="auto", choices=["auto", *ATTENTION_BACKENDS],
                       help="diffusers' name of the attention kernel; auto: on a GPU the fastest of those that run")


def wants_compile(args, device, base_precision="bf16"):
    """Whether --compile, or its default for this device and number of steps, asks for compilation. bitsandbytes' 4-bit
    layers are compiled on demand only: that they have no graph break is not shown yet."""
    if args.compile is None:
        return device.type == "cuda" and args.max_train_steps >= COMPILE_STEPS and base_precision != "nf4"
    return args.compile


def compile_blocks(transformer):
    """Compile each kind of block once, without graph breaks; parameter names and state dict stay as they are. What is
    compiled is a block's forward, so that hooks around it (utils.offload) are left alone."""
    torch._dynamo.config.recompile_limit = MAX_VARIANTS
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.forward = torch.compile(block.forward, backend=BACKEND, fullgraph=True)


def eagerly():
    """Context in which compiled blocks run as they are written: pictures of every size would each be compiled."""
    return torch.compiler.set_stance("force_eager")


def check_attention(name, device):
    """ValueError, before a model loads, for an attention kernel that a CPU has not."""
    if device.type == "cpu" and name not in ("auto", "native", "_native_flash"):
        raise ValueError(f"--attention_backend {name} needs a CUDA device; leave it out")


def choose_attention(transformer, name, tokens, device, dtype, measure=None):
    """Set the attention kernel and return its name. name: of ATTENTION_BACKENDS, or "auto": on a GPU the one that takes
    `tokens` tokens of one image forward and backward in the least time, elsewhere "native".

    measure(backend) -> seconds, or an exception where it does not run; default: `time_attention`."""
    candidates = [name] if name != "auto" else ATTENTION_BACKENDS if device.type == "cuda" else ["native"]
    if len(candidates) > 1:
        measure = measure or (lambda backend: time_attention(transformer, backend, tokens, device, dtype))
        seconds, reasons = {}, []
        for backend in candidates:
            try:
                seconds[backend] = measure(backend)
            except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:  # not installed, not for this
                reasons.append(f"{backend}: {' '.join(str(error).split())[:80]}")
        if not seconds:
            raise ValueError(f"--attention_backend auto: none runs here ({'; '.join(reasons)}); name one")
        candidates = [min(seconds, key=seconds.get)]
        if torch.distributed.is_initialized():  # a stopwatch must not tell processes apart
            torch.distributed.broadcast_object_list(candidates)
    try:
        transformer.set_attention_backend(candidates[0])  # also "native": a model without one has the last one set
    except RuntimeError as error:  # diffusers' own, for a package that is missing
        raise ValueError(f"--attention_backend {candidates[0]}: {error} Or leave it out") from error
    logger.info(f"attention kernel: {candidates[0]}")
    return candidates[0]


def time_attention(transformer, backend, tokens, device, dtype, repeats=5):
    """Median seconds of one attention of the transformer's shape, forward and backward, on a CUDA device."""
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    config = flux.unwrap_config(transformer)
    shape = 1, tokens, config.num_attention_heads, config.attention_head_dim
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    times = []
    with attention_backend(backend):
        for _ in range(repeats + 2):  # the first ones build plans
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            dispatch_attention_fn(q, k, v).sum().backward()
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]

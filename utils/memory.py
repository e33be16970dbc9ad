"""Memory of a training run, predicted before anything is loaded, and the fastest settings that fit the card.

One training step of a model with a few blocks runs on the meta device: shapes and dtypes, no numbers. What it allocates
is counted, and as blocks repeat, the whole model follows exactly. What only a GPU knows (context, workspaces,
fragmentation) is a named constant. All figures for a GPU are predictions."""

import contextlib
import functools
import math
import os
import re
import weakref
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from utils import adaln, flux, lora, losses
from utils.checkpointing import enable_checkpointing

GIB = 2**30

# FLUX.1-Kontext-dev, where its config files say other than diffusers' defaults or what is read here.
KONTEXT = {"guidance_embeds": True, "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24,
           "attention_head_dim": 128}
KONTEXT_VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 16,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip

# What the meta device cannot know, in bytes. Not measured here: sources are beside.
CUDA_CONTEXT = int(0.7 * GIB)  # driver, kernels, modules of one process; assumed, 0.5 to 0.7 GiB on recent cards
CUBLAS_WORKSPACE = 64 * 2**20  # 32 MiB each for cuBLAS and cuBLASLt on sm90, less on others (PyTorch's defaults)
MARGIN = int(0.9 * GIB)  # fragmentation: 8.4 GiB published for NF4 at 512 x 768 (huggingface.co/blog/flux-qlora)
FLASH_BACKWARD_BYTES = 4  # per element of the query: flash attention sums its gradient in fp32 (Dao 2023)

# Quantised weights (utils/quantise.py): what each row adds, in bytes.
ROW_BYTES = {"int8": 5, "fp8": 4}  # torchao: an fp32 scale, and for int8 a zero point
NF4_BLOCK, NF4_CODES = 64, 16 * 4  # bitsandbytes: an fp32 scale for 64 weights, a table of 16 values
# Double quantisation: the scales in 8 bit, an fp32 scale for 256 of them, a table of 256 values, and their mean.
SCALE_BLOCK, SCALE_CODES = 256, 256 * 4 + 4

# Bytes of an optimizer's state per parameter. prodigyopt keeps no start value of what starts at zero: 12 for LoRA's B.
STATE_BYTES = {"adamw": 8, "prodigy": 16, "schedule_free": 8}
ADAM_8BIT_BLOCK, ADAM_8BIT_SMALLEST = 256, 4096  # bitsandbytes: an fp32 scale for 256 values; fp32 for small tensors

BLOCKS_IN_USE = 2  # with offload (utils/offload.py): the one that computes and the one that arrives

LEVELS = {
    "auto": "the fastest that fits: checkpointing as needed, AdaLN tables, then int8 weights, then NF4, then offload",
    "lossless": "the same without quantised weights",
    "fastest": "no checkpointing, bf16 weights",
    "selective": "checkpointing that keeps attention's results, bf16 weights",
    "full": "every block checkpointed, bf16 weights",
    "int8": "8-bit integer weights, as much checkpointing as needed",
    "fp8": "8-bit floating-point weights, likewise",
    "nf4": "4-bit weights, likewise",
    "offload": "every block checkpointed; blocks and checkpoints wait in the CPU's memory",
}


def add_memory_args(parser):
    group = parser.add_argument_group("memory")
    group.add_argument("--memory", default="auto", choices=list(LEVELS),
                       help="; ".join(f"{name}: {text}" for name, text in LEVELS.items())
                       + ". On a CPU auto changes nothing")
    group.add_argument("--memory_limit", type=float, help="GiB of the GPU that may be used; default: what is free")


@dataclass(frozen=True, eq=False)  # known by identity, so that counts can be kept for it
class Job:
    """What is trained. config, vae_config: of the models' folders, or KONTEXT, KONTEXT_VAE. sizes: ((height, width) of
    the target, then of each reference), px. weight_bytes: of one weight that is not quantised, 2 for bf16, 4 for fp32.
    optimizer: see state_bytes. use_ema: with a moving average. distributed: under DDP. double_quant: NF4's scales are
    quantised too. clip_config: of CLIP where it has a LoRA. perceptual: the loss's module on the meta device, if any;
    decode_px: side of the crops that are decoded for it, 0 for the whole image."""

    config: dict
    vae_config: dict
    sizes: tuple
    batch: int = 1
    text_tokens: int = 512
    rank: int = 16
    layers: str | None = None
    dropout: float = 0.0
    weight_bytes: int = 2
    use_dora: bool = False
    optimizer: str = "adamw"
    use_ema: bool = False
    distributed: bool = False
    double_quant: bool = True
    clip_config: dict | None = None
    perceptual: torch.nn.Module | None = None
    decode_px: int = 0

    @property
    def image_tokens(self):
        """Tokens of target and references."""
        multiple = 2 ** (len(self.vae_config["block_out_channels"]) - 1) * flux.PATCH
        return sum((height // multiple) * (width // multiple) for height, width in self.sizes)

    @property
    def tokens(self):
        return self.text_tokens + self.image_tokens

    @property
    def dtype(self):
        """Of the frozen weights."""
        return torch.bfloat16 if self.weight_bytes == 2 else torch.float32


@dataclass(frozen=True)
class Plan:
    """Settings of a run, and their predicted memory. checkpointing: none,
    selective, full. base_precision: bf16 (as loaded), int8, fp8, nf4. resident_blocks: that stay on the GPU with
    offload_blocks. shards: processes that split the frozen transformer between them (utils/sharding.py). parts: {name:
    bytes} that add up to the peak; None on a CPU, where nothing is predicted."""

    checkpointing: str = "none"
    base_precision: str = "bf16"
    adaln_tables: bool = False
    offload_blocks: bool = False
    resident_blocks: int = 0
    offload_activations: bool = False
    shards: int = 1
    parts: dict | None = None

    @property
    def total(self):
        return sum(self.parts.values())

    def in_words(self):
        words = [f"{self.checkpointing.replace('none', 'no')} checkpointing", f"{self.base_precision} weights"]
        words += ["AdaLN tables"] * self.adaln_tables + ["checkpoints in host memory"] * self.offload_activations
        but = f" but for {self.resident_blocks}" if self.resident_blocks else ""
        words += [f"blocks in host memory{but}"] * self.offload_blocks
        words += [f"transformer split over {self.shards} GPUs"] * (self.shards > 1)
        return ", ".join(words)


# --- one step on the meta device


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations inside have made: `live` now, `peak` the most so far. `outside`: tensors
    made before, which do not count."""

    def __init__(self, outside=()):
        super().__init__()
        self.live = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in outside}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        self.known.discard(key)
        self.live -= size


class FusedRMSNorm(torch.autograd.Function):
    """What CUDA's fused kernel reads, writes and keeps; on the meta device torch would take it apart."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None


@contextlib.contextmanager
def gpu_kernels():
    """Inside, attention and RMSNorm on the meta device are a GPU's fused kernels: flash attention keeps query, key,
    value, result and one number a row, where the plain formula keeps the whole matrix."""
    attention, rms_norm = F.scaled_dot_product_attention, F.rms_norm

    def flash(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return kernel(query, key, value, dropout_p, is_causal, scale=scale)[0]

    F.scaled_dot_product_attention = flash
    F.rms_norm = lambda x, shape, weight, eps=None: FusedRMSNorm.apply(x, weight)
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = attention, rms_norm


def meta_transformer(config, dtype=torch.bfloat16, rank=None, layers=None, dropout=0.0, use_dora=False):
    """The transformer on the meta device; with `rank` a LoRA whose gradients exist already, as from the second
    micro-step on."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    transformer.requires_grad_(False).train()
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(dtype)
    if rank:
        lora.attach(transformer, rank, dropout=dropout, layers=layers, use_dora=use_dora)
    for parameter in lora.parameters(transformer):
        parameter.grad = torch.empty_like(parameter)
    return transformer


def meta_vae(config, dtype=torch.bfloat16):
    """The VAE on the meta device, frozen."""
    import diffusers

    with torch.device("meta"):
        vae = getattr(diffusers, config["_class_name"]).from_config(config)
    for parameter in vae.eval().requires_grad_(False).parameters():
        parameter.data = parameter.data.to(dtype)
    return vae


def meta_forward(transformer, batch, image_tokens, text_tokens):
    """Its prediction (B, image tokens, C) on the meta device, for inputs of its weights' dtype."""
    config, options = transformer.config, {"device": "meta", "dtype": transformer.context_embedder.weight.dtype}
    level = torch.empty(batch, device="meta")
    return transformer(
        hidden_states=torch.empty(batch, image_tokens, config.in_channels, **options), timestep=level,
        guidance=level if config.guidance_embeds else None,
        encoder_hidden_states=torch.empty(batch, text_tokens, config.joint_attention_dim, **options),
        pooled_projections=torch.empty(batch, config.pooled_projection_dim, **options),
        txt_ids=torch.empty(text_tokens, 3, device="meta"), img_ids=torch.empty(image_tokens, 3, device="meta"),
        return_dict=False)[0]


def for_all_blocks(count, config, layers=None):
    """count(config), a dict of integers that grow linearly with the blocks of either kind, from three models of few
    blocks; the first block, whose inputs need no gradient, is in all three. `layers` that name a block by its number
    make blocks unlike: then the whole model is counted."""
    double, single = config["num_layers"], config["num_single_layers"]
    if min(double, single) < 3 or re.search(r"blocks\.\d", layers or ""):
        return count(config)

    def few(double, single):
        return count(config | {"num_layers": double, "num_single_layers": single})

    base, more_double, more_single = few(2, 2), few(3, 2), few(2, 3)
    return {name: value + (double - 2) * (more_double[name] - value) + (single - 2) * (more_single[name] - value)
            for name, value in base.items()}


@functools.cache
def step_bytes(job, checkpointing, offload_activations):
    """(bytes that backward needs and that are there after the forward pass, the most that there is at any time beyond
    weights, gradients and optimizer). With offload_activations what three blocks keep."""
    def count(config):
        transformer = meta_transformer(config, job.dtype, job.rank, job.layers, job.dropout, job.use_dora)
        enable_checkpointing(transformer, checkpointing)
        gradients = [parameter.grad for parameter in lora.parameters(transformer)]
        peaks = {}

        def singles_are_done(_):  # the gradient of the first single block's input; a recomputation asks again
            if "singles" not in peaks:
                peaks["singles"], live.peak = live.peak, live.live

        def watch(block, args, kwargs):
            states = kwargs.get("hidden_states", args[0] if args else None)
            if states.requires_grad:
                states.register_hook(singles_are_done)

        transformer.single_transformer_blocks[0].register_forward_pre_hook(watch, with_kwargs=True)
        with gpu_kernels(), LiveBytes([*transformer.parameters(), *gradients]) as live:
            prediction = meta_forward(transformer, job.batch, job.image_tokens, job.text_tokens)
            held = live.live
            prediction.float().square().mean().backward()
        return {"held": held, "singles": peaks.get("singles", 0), "doubles": live.peak}

    config = job.config
    if offload_activations:
        config = config | {"num_layers": 2, "num_single_layers": 1}
    counts = for_all_blocks(count, config, job.layers)
    return counts["held"], max(counts["singles"], counts["doubles"])


@functools.cache
def lora_size(job):
    """(parameters of the LoRA on the transformer and on CLIP, bytes that the optimizer keeps for them)."""
    def size(parameters):
        return {"parameters": sum(parameter.numel() for parameter in parameters),
                "state": sum(state_bytes(job.optimizer, parameter.numel()) for parameter in parameters)}

    def count(config):
        return size(lora.parameters(meta_transformer(config, rank=job.rank, layers=job.layers, use_dora=job.use_dora)))

    counts = for_all_blocks(count, job.config, job.layers)
    more = size(lora.parameters(meta_clip(job)) if job.clip_config else [])
    return counts["parameters"] + more["parameters"], counts["state"] + more["state"]


def meta_clip(job):
    """CLIP with its LoRA on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig.from_dict(job.clip_config)).to(job.dtype).requires_grad_(False)
    lora.attach(clip, job.rank, dropout=job.dropout, layers=lora.CLIP_LAYERS, use_dora=job.use_dora)
    return clip.train()


@functools.cache
def clip_bytes(job):
    """Bytes of CLIP's frozen weights and of what its graph keeps for a batch of prompts."""
    clip = meta_clip(job)
    frozen = sum(parameter.nbytes for parameter in clip.parameters() if not parameter.requires_grad)
    tokens = torch.empty(job.batch, clip.config.max_position_embeddings, dtype=torch.long, device="meta")
    with gpu_kernels(), LiveBytes(clip.parameters()) as live:
        pooled = clip(tokens).pooler_output  # the graph hangs on it
        return frozen + live.live - pooled.nbytes


def linear_bytes(rows, columns, base_precision, plain_bytes, double_quant=True):
    """Bytes of a frozen linear layer's weight (rows, columns)."""
    count = rows * columns
    if base_precision == "bf16":
        return plain_bytes * count
    if base_precision == "nf4":
        scales = math.ceil(count / NF4_BLOCK)
        scale_bytes = scales + 4 * math.ceil(scales / SCALE_BLOCK) + SCALE_CODES if double_quant else 4 * scales
        return math.ceil(count / 2) + scale_bytes + NF4_CODES
    return count + ROW_BYTES[base_precision] * rows


@functools.cache
def transformer_bytes(job, base_precision="bf16", adaln_tables=False):
    """(bytes of the frozen transformer, of all that is no block, of the larger kind of block, weights of the largest
    linear layer). base_precision: of the blocks' linear layers."""
    transformer = meta_transformer(job.config | {"num_layers": 1, "num_single_layers": 1})
    gone = {id(parameter) for _, parameter in adaln.parameters(transformer)} if adaln_tables else set()
    blocks = transformer.transformer_blocks[0], transformer.single_transformer_blocks[0]
    linear = {id(module.weight): module.weight.numel() for block in blocks for module in block.modules()
              if isinstance(module, torch.nn.Linear) and id(module.weight) not in gone}

    def size(module):
        return sum(linear_bytes(*parameter.shape, base_precision, job.weight_bytes, job.double_quant)
                   if id(parameter) in linear else job.weight_bytes * parameter.numel()
                   for parameter in module.parameters() if id(parameter) not in gone)

    double, single = map(size, blocks)
    rest = size(transformer) - double - single
    return (rest + job.config["num_layers"] * double + job.config["num_single_layers"] * single, rest,
            max(double, single), max(linear.values()))


@functools.cache
def vae_bytes(job):
    """(bytes of the VAE's weights, the most beyond them while it encodes a batch or decodes one image, what the graph
    of a perceptual loss's crops keeps at most)."""
    vae = meta_vae(job.vae_config, job.dtype)
    outside = [*vae.parameters(), *(job.perceptual.state_dict().values() if job.perceptual else [])]
    weights = sum(parameter.numel() for parameter in vae.parameters())

    def peak(work, *shape, graph=False):
        inputs = torch.empty(shape, device="meta", requires_grad=graph)
        with gpu_kernels(), LiveBytes(outside) as live, torch.set_grad_enabled(graph):
            result = work(vae, inputs)
            held = live.live
            if graph:
                result.mean().backward()
        return held, live.peak

    encode = max(peak(flux.encode, job.batch, 3, *size)[1] for size in job.sizes)
    decode = peak(flux.decode, 1, *flux.latent_shape(vae, *job.sizes[0]))[1]
    crops = 0
    if job.perceptual:
        crop = [min(job.decode_px or side, side) for side in job.sizes[0]]
        target = torch.empty(1, 3, *crop, device="meta")
        held, most = peak(lambda *given: job.perceptual(flux.decode(*given), target), 1,
                          *flux.latent_shape(vae, *crop), graph=True)
        crops = (job.batch - 1) * held + most
    return job.weight_bytes * weights, max(encode, decode), crops


# --- what a run needs


def state_bytes(optimizer, elements):
    """Bytes that an optimizer keeps for a tensor. optimizer: of STATE_BYTES, or adamw8bit."""
    if optimizer != "adamw8bit":
        return STATE_BYTES[optimizer] * elements
    if elements < ADAM_8BIT_SMALLEST:
        return STATE_BYTES["adamw"] * elements
    return 2 * (elements + 4 * math.ceil(elements / ADAM_8BIT_BLOCK))


def predict(job, plan):
    """{part: bytes} of the peak of a run, without the text encoders, which are gone before the transformer comes."""
    total, rest, block, largest = transformer_bytes(job, plan.base_precision, plan.adaln_tables)
    held, peak = step_bytes(job, plan.checkpointing, plan.offload_activations)
    vae_weights, vae_peak, crops = vae_bytes(job)
    parameters, state = lora_size(job)
    width = job.config["num_attention_heads"] * job.config["attention_head_dim"]
    present = rest + (BLOCKS_IN_USE + plan.resident_blocks) * block
    return {
        "transformer": (total // plan.shards + present if plan.shards > 1 else
                        min(total, present) if plan.offload_blocks else total),
        "VAE": vae_weights,
        "CLIP with what its graph keeps": clip_bytes(job) if job.clip_config else 0,
        "weights of the perceptual loss": sum(weight.nbytes for weight in job.perceptual.state_dict().values())
        if job.perceptual else 0,
        "LoRA: fp32 masters and gradients": 8 * parameters,
        "LoRA: optimizer": state,
        "LoRA: moving average": 4 * parameters * job.use_ema,
        "LoRA: gradients once more, in DDP's buckets": 4 * parameters * job.distributed,
        "activations": held,
        "passing, in backward": peak - held,
        "a weight unpacked": job.weight_bytes * largest if plan.base_precision != "bf16" else 0,
        "crops of the perceptual loss": crops,
        "encoding or validation beyond that": max(vae_peak - peak - crops, 0),
        "attention's fp32 gradient": FLASH_BACKWARD_BYTES * job.batch * job.tokens * width,
        "CUDA context": CUDA_CONTEXT,
        "cuBLAS workspaces": CUBLAS_WORKSPACE,
        "margin for fragmentation": MARGIN,
    }


def candidates(level, tables_possible=True, fixed=None):
    """Plans of a level, the fastest first. Lossless settings come before quantised weights, and those before blocks
    that travel. fixed: fields that are settled already, such as {"checkpointing": "full"}."""
    precisions = {"auto": ("bf16", "int8", "nf4"), "int8": ("int8",), "fp8": ("fp8",), "nf4": ("nf4",)}
    settled = (fixed or {}).get("base_precision", "bf16")
    if settled != "bf16":
        precisions["auto"] = (settled,)  # also fp8, which auto does not choose by itself
    tables = (False, True) if tables_possible else (False,)
    if "adaln_tables" in (fixed or {}):
        tables = (fixed["adaln_tables"],)
    plans = [Plan(checkpointing, precision, table, offload_activations=offload)
             for precision in precisions.get(level, (settled,))
             for checkpointing, offload in (("none", False), ("selective", False), ("full", False), ("full", True))
             for table in tables]
    if level in ("fastest", "selective", "full"):
        wanted = {"fastest": "none"}.get(level, level)
        plans = [plan for plan in plans if plan.checkpointing == wanted and not plan.offload_activations]
    # Tables wherever possible: what is not there need not travel.
    travelling = [Plan("full", settled, tables[-1], True, offload_activations=offload) for offload in (False, True)]
    if level == "offload":
        plans = travelling
    if level in ("auto", "lossless"):
        plans += travelling
    if (shards := (fixed or {}).get("shards", 1)) > 1:  # FSDP2 has the blocks' weights in its hands, in bf16
        plans = [replace(plan, shards=shards) for plan in plans
                 if plan.base_precision == "bf16" and not plan.offload_blocks]
    return [plan for plan in plans if all(getattr(plan, name) == value for name, value in (fixed or {}).items())]


def fits(job, free_bytes, level="auto", tables_possible=True, fixed=None):
    """Whether a plan of the level fits free_bytes. The last of them needs least. A level that says what is wanted is
    believed: its last plan may use the margin."""
    margin = 0 if level in ("auto", "lossless") else MARGIN
    plans = candidates(level, tables_possible, fixed)
    return bool(plans) and sum(predict(job, plans[-1]).values()) - margin <= free_bytes


def keep_blocks(job, free_bytes, plan):
    """The plan with as many blocks resident as there is room for; all are taken for the larger kind."""
    block = transformer_bytes(job, plan.base_precision, plan.adaln_tables)[2]
    count = min(int((free_bytes - plan.total) // block), job.config["num_layers"] + job.config["num_single_layers"])
    plan = replace(plan, resident_blocks=count)
    return replace(plan, parts=predict(job, plan))


def choose(job, free_bytes, level="auto", tables_possible=True, fixed=None):
    """The plan of a run. free_bytes: of the GPU for this process, its context included; None on a CPU, where the
    level's first plan is taken as it is. ValueError where nothing fits, with what would."""
    plans = candidates(level, tables_possible, fixed)
    if not plans:
        settled = ", ".join(f"{name} {value}" for name, value in fixed.items())
        raise ValueError(f"--memory {level} does not go with other flags, which demand {settled}; drop one of them")
    if free_bytes is None:
        return plans[0]
    if fits(job, free_bytes, level, tables_possible, fixed):
        for plan in plans:
            plan = replace(plan, parts=predict(job, plan))
            if plan.total <= free_bytes:
                return keep_blocks(job, free_bytes, plan) if plan.offload_blocks else plan
        return plan
    least = sum(predict(job, plans[-1]).values())
    raise ValueError(f"--memory {level}: {least / GIB:.1f} GiB predicted at {job.sizes[0][0]} x {job.sizes[0][1]} px "
                     f"and batch {job.batch}, and the GPU has {free_bytes / GIB:.1f}; "
                     f"{cure(job, free_bytes, level, tables_possible, fixed)}")


def cure(job, free_bytes, level, tables_possible, fixed):
    """What would fit, in a few words: another level, a smaller batch, smaller images."""
    for other in ("full", "int8", "nf4", "offload") if level != "auto" else ():
        if fits(job, free_bytes, other, tables_possible, fixed):
            return f"--memory {other} would fit"
    batch = job.batch
    while batch > 1:
        batch //= 2
        if fits(replace(job, batch=batch), free_bytes, level, tables_possible, fixed):
            return f"--train_batch_size {batch} would fit"
    for side in (1024, 768, 512, 256):
        smaller = replace(job, batch=1, sizes=((side, side),) * len(job.sizes))
        if smaller.tokens < job.tokens and fits(smaller, free_bytes, level, tables_possible, fixed):
            return f"--resolution {side}{' --train_batch_size 1' * (job.batch > 1)} would fit"
    return "nothing smaller fits either; free memory on it or use a larger GPU"


def describe(plan, free_bytes):
    """Lines that say what was chosen and the predicted memory, part by part."""
    yield f"memory: {plan.in_words()}; {plan.total / GIB:.2f} of {free_bytes / GIB:.2f} GiB predicted:"
    for name, size in plan.parts.items():
        if size:
            yield f"  {size / GIB:6.2f} GiB {name}"


def gpu_bytes(device, limit=None):
    """Bytes that every process may use on its GPU, its context included; None on a CPU. limit: --memory_limit, GiB,
    which PyTorch is then held to."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    free = torch.cuda.mem_get_info(index)[0] + torch.cuda.memory_reserved(index) + CUDA_CONTEXT
    if limit is not None:
        capacity = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min((limit * GIB - CUDA_CONTEXT) / capacity, 1.0), index)
        free = min(free, int(limit * GIB))
    if torch.distributed.is_initialized():  # all processes must take one plan: that of the fullest card
        least = torch.tensor(free, device=device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        free = int(least)
    return free


def read_configs(path, **where):
    """(transformer's, VAE's) config of a model's folder or hub id, and no weights. where: revision, cache_dir."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    flux.check_model(path)
    with flux.fetching(path):
        return (FluxTransformer2DModel.load_config(path, subfolder="transformer", **where),
                AutoencoderKL.load_config(path, subfolder="vae", **where))


def read_clip_config(path, **where):
    """CLIP's config of a model's folder or hub id. where: revision, cache_dir."""
    from transformers import CLIPTextConfig

    with flux.fetching(path):
        return CLIPTextConfig.from_pretrained(path, subfolder="text_encoder", **where).to_dict()


def plan_run(args, device, dtype, sizes, tables_possible=False, fixed=None, decode_px=0, batch=None,
             train_text_encoder=False, double_quant=True):
    """The plan of a training run, printed; on a CPU that is what --memory says, and nothing is predicted.

    args: of a training script. dtype: of the frozen weights. sizes: ((height, width) of the largest target, then of
    each reference), px. tables_possible: adaln.obstacle found none. fixed: see candidates. decode_px, double_quant: see
    Job. train_text_encoder: CLIP has a LoRA. ValueError as in choose."""
    if args.memory_limit is not None and not args.memory_limit > CUDA_CONTEXT / GIB:
        raise ValueError(f"--memory_limit {args.memory_limit:g}: give GiB of a GPU, more than {CUDA_CONTEXT / GIB:.1f}")
    free = gpu_bytes(device, args.memory_limit)
    if free is None:
        return choose(None, None, args.memory, tables_possible, fixed)
    path, where = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    config, vae_config = read_configs(path, **where)
    perceptual = None
    if getattr(args, "perceptual_loss", None):  # an option of restoration
        perceptual = losses.make_perceptual_loss(args.perceptual_loss, args.perceptual_weights).to("meta")
    job = Job(config, vae_config, tuple(sizes), batch or args.train_batch_size, args.max_sequence_length, args.rank,
              args.lora_layers, args.lora_dropout, dtype.itemsize, args.use_dora,
              "adamw8bit" if args.use_8bit_adam else args.optimizer, args.use_ema, torch.distributed.is_initialized(),
              double_quant, read_clip_config(path, **where) if train_text_encoder else None, perceptual, decode_px)
    plan = choose(job, free, args.memory, tables_possible, fixed)
    if int(os.environ.get("RANK", "0")) == 0:
        print("\n".join(describe(plan, free)), flush=True)
    return plan

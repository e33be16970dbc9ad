"""Training steps of a full-size FLUX.1-Kontext with random weights on a GPU, beside the official script's step:
    python -m bench.gpu_step --arms official,none,tables --resolution 1024 --train_batch_size 1

official is the step of diffusers' Kontext script: eager, autocast, peft's LoRA in bf16, AdamW, full checkpointing. The
others are ours: explicit bf16, fp32 LoRA masters, compiled blocks, the settings of their names; `short` has 128 text
tokens; `planned` is what --memory auto chooses for --memory_limit. Latents are there already in every arm, A and B of
the LoRA are not zero. Where all arms fit the card together, with as many tokens, they run in one process, interleaved;
else each in its own (--separate). An arm that fails is named, and the others are measured all the same. 3 warm-up
steps, then CUDA events around each of 10. MFU: useful FLOPs (bench/flops.py) a second over --peak_tflops. `card's s`:
the same FLOPs at what this card reached in this run, once the arms were gone, in products and attention of their
shapes; `of card`: that over the median. --profile: the kernels of 3 more steps.

Instead of training steps, --sampling 4,28 measures images of so many steps, eager and compiled; --ceilings 4608,8704
products and attention at so many tokens, in bf16 and fp8, with every attention kernel that runs here."""

import argparse
import contextlib
import dataclasses
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import flops
from bench.random_flux import random_pipeline, random_text
from bench.train_step import plain_step
from utils import adaln, flux, generate, lora, memory, placement, quantise, run, speed
from utils import flow_matching as fm
from utils.memory import GIB, Plan
from utils.parse import check_finite, check_least, run_main, write_json
from utils.restore import STOCK_SETTINGS

WARM_UP = 3
SHORT_TEXT = 128
LORA_STD = 0.01
CALLS, ROUNDS = 10, 3  # of a ceiling: a single call is too short for a clock
KERNELS = 15
FLUX_PRODUCTS = ((1, 1), (1, 4), (4, 1), (5, 1))  # columns and rows of the blocks' weights, in widths of the model
ARMS = {
    "official": Plan("full"),
    "full": Plan("full"),
    "selective": Plan("selective"),
    "none": Plan("none"),
    "tables": Plan("none", adaln_tables=True),
    "short": Plan("none", adaln_tables=True),
    "full_tables": Plan("full", adaln_tables=True),
    "int8": Plan("full", "int8", adaln_tables=True),
    "fp8": Plan("full", "fp8", adaln_tables=True),
    "nf4": Plan("full", "nf4", adaln_tables=True),
    "planned": None,
}
# What a kernel does, by its name; the first that fits. cuDNN, FlashAttention, cuBLAS, CUTLASS, Triton, PyTorch.
KERNEL_GROUPS = {
    "attention": re.compile(r"flash|fmha|sdpa|attention|dot_do_o|convert_dq", re.I),
    "GEMM": re.compile(r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|triton_tem|conv|scaled_mm|linear|::(add|b)?mm$",
                       re.I),
    "elementwise": re.compile(r"triton|elementwise|reduce|norm|copy|catarray|fill|multi_tensor|memcpy|memset|dequant|"
                              r"aten::(mul|add|sub|div|cat|sum|mean|pow|to|clone|silu|gelu|sigmoid)", re.I),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="official,selective,none,tables,short", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--resolution", type=int, default=1024, help="side of target and reference, px")
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--max_sequence_length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", default="19,38", help="double and single blocks")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--memory_limit", type=float, help="GiB that each arm may use, the CUDA context included")
    parser.add_argument("--separate", action="store_true", help="each arm in a process of its own")
    parser.add_argument("--sampling", help="comma list of sampling steps, measured instead of training steps")
    parser.add_argument("--ceilings", help="comma list of tokens; products and attention are measured instead")
    parser.add_argument("--profile", action="store_true", help=f"the {KERNELS} kernels that take most, of each arm")
    parser.add_argument("--peak_tflops", type=float, default=790, help="what the card's bf16 products reach; an H200's "
                        "8192^3 product here")
    parser.add_argument("--output", help="JSON file")
    speed.add_speed_args(parser)
    args = parser.parse_args(argv)
    check_finite(args)
    check_least(args, resolution=16, train_batch_size=1, max_sequence_length=1, rank=1, steps=1, heads=1)
    if not args.peak_tflops > 0:
        raise ValueError(f"--peak_tflops {args.peak_tflops}: give more than 0")
    args.names = args.arms.split(",")
    for name in args.names:
        if name not in ARMS:
            raise ValueError(f"--arms {name}: give some of {', '.join(ARMS)}")
    if args.memory_limit is not None and not args.memory_limit > memory.CUDA_CONTEXT / GIB:
        raise ValueError(f"--memory_limit {args.memory_limit:g}: give more than {memory.CUDA_CONTEXT / GIB:.1f} GiB")
    if "planned" in args.names and args.memory_limit is None:
        raise ValueError("--arms planned: needs --memory_limit, in GiB")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise ValueError(f"--device {args.device}: give cuda, cuda:0 or cpu")
    count = torch.cuda.device_count()
    if args.device != "cpu" and int(args.device.partition(":")[2] or 0) >= count:
        raise ValueError(f"--device {args.device}: {count or 'no'} GPU here; --device cpu --layers 1,1 --heads 2 "
                         "--resolution 64 tries the code")
    try:
        args.blocks = tuple(int(count) for count in args.layers.split(","))
        args.sampling_steps, args.ceiling_tokens = (
            [int(count) for count in (text or "").split(",") if count] for text in (args.sampling, args.ceilings))
    except ValueError as error:
        raise ValueError(f"--layers {args.layers}, --sampling {args.sampling}, --ceilings {args.ceilings}: give whole "
                         "numbers, such as 19,38 and 4,28 and 4608,8704") from error
    if len(args.blocks) != 2 or min(*args.blocks, *args.sampling_steps, *args.ceiling_tokens) < 1:
        raise ValueError(f"--layers {args.layers}, --sampling {args.sampling}, --ceilings {args.ceilings}: give two "
                         "numbers of blocks, such as 19,38, and steps and tokens of 1 or more")
    if args.compile is None:
        args.compile = args.device.startswith("cuda")
    return args


def make_job(args, name):
    config = memory.KONTEXT | {"num_layers": args.blocks[0], "num_single_layers": args.blocks[1],
                               "num_attention_heads": args.heads}
    tokens = SHORT_TEXT if name == "short" else args.max_sequence_length
    return memory.Job(config, memory.KONTEXT_VAE, ((args.resolution,) * 2,) * 2, args.train_batch_size, tokens,
                      args.rank)


def make_plan(args, name):
    if name == "planned":
        return memory.choose(make_job(args, name), args.memory_limit * GIB)
    return ARMS[name]


def draw(step, target):
    """(noise, sigma (B,) on the target's device) as plain_step draws them after torch.manual_seed(step)."""
    torch.manual_seed(step)
    return torch.randn_like(target), torch.rand(len(target), device=target.device)


def quantise_blocks(transformer, base_precision, dtype):
    """What loading by diffusers does to the blocks' linear layers (utils/quantise.py), to a model that is there."""
    if base_precision == "nf4":
        from bitsandbytes.nn import Linear4bit, Params4bit

        double_quant, quant_type = (quantise.NF4[f"bnb_4bit_{name}"] for name in ("use_double_quant", "quant_type"))
        for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks):
            for path, module in list(blocks.named_modules()):
                if isinstance(module, torch.nn.Linear):
                    parent, _, child = path.rpartition(".")
                    packed = Linear4bit(module.in_features, module.out_features, module.bias is not None, dtype,
                                        double_quant, quant_type, device="meta")
                    packed.bias = module.bias
                    packed.weight = Params4bit(module.weight.data, requires_grad=False, quant_type=quant_type,
                                               compress_statistics=double_quant).to(module.weight.device)
                    setattr(blocks.get_submodule(parent), child, packed)
        transformer.is_loaded_in_4bit = True  # peft asks
    elif base_precision != "bf16":
        from torchao.quantization import quantize_

        config = quantise.pipeline_config(base_precision, None, dtype).quant_mapping["transformer"].quant_type
        for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks):
            quantize_(blocks, config.fqn_to_config[quantise.BLOCK_WEIGHTS])
        quantise.keep_packed(transformer)


class Arm:
    """A model of its own with a LoRA and an optimizer, and what was measured of its steps."""

    def __init__(self, name, args, device, dtype):
        self.name, self.args, self.device, self.dtype = name, args, device, dtype
        self.plan, self.job = make_plan(args, name), make_job(args, name)
        torch.manual_seed(0)  # the same weights, text and latents in every arm
        self.pipe = random_pipeline(device, dtype, args.blocks, args.heads)
        transformer = self.pipe.transformer
        # A shorter text is the longer one's beginning.
        text = random_text(transformer, args.train_batch_size, max(args.max_sequence_length, SHORT_TEXT), device, dtype)
        self.text = flux.TextEmbeds(text.prompt[:, : self.job.text_tokens], text.pooled)
        shape = flux.latent_shape(self.pipe.vae, args.resolution, args.resolution)
        self.latents = {key: torch.randn(args.train_batch_size, *shape, device=device) for key in ("target", "control")}
        if name == "official":
            self.parameters = self.attach_officially(transformer)
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=1e-4)
            transformer.register_forward_hook(self.keep_prediction)
        else:
            if self.plan.adaln_tables:
                levels = [sigma for step in range(-WARM_UP, args.steps)
                          for sigma in draw(step, self.latents["target"])[1].tolist()]
                adaln.build(transformer, levels, 1.0, self.text.pooled[:1], device, dtype)
            quantise_blocks(transformer, self.plan.base_precision, dtype)
            if self.plan.offload_blocks:
                transformer.to("cpu")
            self.parameters = lora.attach(transformer, args.rank)
            placement.prepare(transformer, args, self.plan, self.job.tokens, device, dtype)
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=1e-4,
                                               fused=device.type == "cuda" or None)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters:  # B = 0 would make A's gradient zero
                parameter.copy_(LORA_STD * torch.randn(parameter.shape, generator=generator))
        transformer.train()
        self.guard = run.FiniteGuard()
        self.seconds, self.losses, self.passing, self.prediction = [], [], 0, None

    def attach_officially(self, transformer):
        from peft import LoraConfig

        transformer.enable_gradient_checkpointing()
        transformer.set_attention_backend("native")  # diffusers' default, which another arm's choice would replace
        transformer.add_adapter(LoraConfig(r=self.args.rank, lora_alpha=self.args.rank, init_lora_weights="gaussian",
                                           target_modules=lora.DEFAULT_LAYERS))
        return lora.parameters(transformer)

    def keep_prediction(self, module, inputs, outputs):
        self.prediction = outputs[0].detach()

    def our_step(self, noise, sigma, step):
        target, control = self.latents["target"], self.latents["control"]
        column = sigma.to(self.device, non_blocking=True).view(-1, 1, 1, 1)
        prediction = flux.predict_velocity(self.pipe.transformer, (1 - column) * target + column * noise, sigma,
                                           control, self.text, 1.0)
        loss = fm.weighted_mse(prediction, noise - target, torch.ones_like(column))
        self.guard.protect(loss, ["random"]).backward()
        self.guard.filter(self.parameters, 1.0, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def step(self, step):
        """One timed step; returns its seconds. Draws and the loss of the official step lie outside."""
        noise, sigma = draw(step, self.latents["target"])
        sigma = sigma.cpu()
        torch.manual_seed(step)
        before = self.allocated(reset=True)
        with Timer(self.device) as timer:
            if self.name == "official":
                plain_step(self.pipe, self.optimizer, self.parameters, {"latents": self.latents}, self.text)
            else:
                loss = self.our_step(noise, sigma, step)
        if self.name == "official":
            target = self.latents["target"]
            height, width = target.shape[-2:]
            count = height * width // flux.PATCH**2
            loss = F.mse_loss(flux.unpack(self.prediction[:, :count], height, width).float(), noise - target)
            self.prediction = None
        self.passing = max(self.passing, self.most_allocated() - before)
        self.losses.append(loss.item())
        return timer.seconds

    def allocated(self, reset=False):
        if self.device.type != "cuda":
            return 0
        if reset:
            torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def most_allocated(self):
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


class Timer:
    """Seconds on the device between entering and leaving: CUDA events on a GPU."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record(torch.cuda.current_stream(self.device))
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            self.events[1].record(torch.cuda.current_stream(self.device))
            torch.cuda.synchronize(self.device)
            self.seconds = self.events[0].elapsed_time(self.events[1]) / 1000
        else:
            self.seconds = time.perf_counter() - self.started


def measure_arms(args, device, dtype):
    """([{quantity: value}] of the arms, in this process and interleaved, every order in turn; the names of those that
    failed)."""
    arms, rows, failed = [], [], []
    for name in args.names:
        with noted(name, args, failed):
            arms.append(warm_up(name, args, device, dtype))
    for step in range(args.steps):
        for arm in arms if step % 2 else reversed(arms):
            if arm.name not in failed:
                with noted(arm.name, args, failed):
                    arm.seconds.append(arm.step(step))
    for arm in arms:
        if arm.name not in failed:
            with noted(arm.name, args, failed):
                rows.append(make_row(arm))
    return rows, failed


@contextlib.contextmanager
def noted(name, args, failed):
    """Inside, a failure of the arm `name` is shown and its name added to `failed`: the others go on. It ends the run of
    an arm that is alone."""
    try:
        yield
    except Exception:
        if len(args.names) == 1:
            raise
        failed.append(name)
        traceback.print_exc()


def free_memory():
    gc.collect()  # arms hang on their own hooks
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def warm_up(name, args, device, dtype):
    """The Arm, compiled where it is to be, after WARM_UP steps."""
    free_memory()  # of an arm that failed
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    arm = Arm(name, args, device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    memory.gpu_bytes(device, args.memory_limit)  # from here on: making random weights needs more than loading
    started = time.perf_counter()
    arm.step(-WARM_UP)
    arm.first = time.perf_counter() - started
    for step in range(1 - WARM_UP, 0):
        arm.step(step)
    arm.resident = arm.allocated() - before
    arm.losses, arm.passing = [], 0
    return arm


def make_row(arm):
    """{quantity: value} of an arm whose steps are done; with --profile it takes a few more."""
    args, on_gpu = arm.args, arm.device.type == "cuda"
    reserved = torch.cuda.max_memory_reserved(arm.device) if on_gpu and len(args.names) == 1 else None
    kernels = profile_arm(arm) if args.profile else None
    counts = flops.count_step(arm.job)
    forward, backward = counts["forward attention"], counts["backward attention"]
    tflop = {"product": (counts["forward FLOPs"] - forward + counts["backward FLOPs"] - backward) / 1e12,
             "attention forward": forward / 1e12, "attention backward": backward * 4 / 5 / 1e12}
    useful = sum(tflop.values())
    median = statistics.median(arm.seconds)
    return {
        "arm": arm.name, "settings": arm.plan.in_words(), "text tokens": arm.job.text_tokens,
        "median s": median, "min s": min(arm.seconds), "max s": max(arm.seconds), "first step s": arm.first,
        "TFLOP": tflop, "useful TFLOP": useful, "MFU": useful / median / args.peak_tflops,
        "allocated GiB": (arm.resident + arm.passing) / GIB if on_gpu else None,
        "reserved GiB": reserved / GIB if reserved is not None else None,
        "predicted GiB": sum(memory.predict(arm.job, arm.plan).values()) / GIB if arm.name != "official" else None,
        "seconds": arm.seconds, "losses": arm.losses[: args.steps], "kernels": kernels,
    }


def group_of(kernel):
    return next((group for group, pattern in KERNEL_GROUPS.items() if pattern.search(kernel)), "other")


def profile_arm(arm):
    """[{"kernel", "group", "calls", "seconds", "share"}] of a step, the longest first, as the mean of 3 steps; printed.
    On a CPU operations instead of kernels. The draws of noise, which Timer leaves out, are in it."""
    on_gpu = arm.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as record:
        wall = sum(arm.step(step) for step in range(-WARM_UP, 0)) / WARM_UP
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = [{"kernel": event.key, "group": group_of(event.key), "calls": event.count / WARM_UP,
                "seconds": (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 / WARM_UP}
               for event in record.key_averages() if event.device_type == kind and not event.is_user_annotation]
    busy = sum(kernel["seconds"] for kernel in kernels)
    for kernel in kernels:
        kernel["share"] = kernel["seconds"] / busy
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    shares = {group: sum(kernel["share"] for kernel in kernels if kernel["group"] == group)
              for group in (*KERNEL_GROUPS, "other")}
    print(f"profile of {arm.name}: {busy:.4f} s of kernels in {wall:.4f} s, {sum(k['calls'] for k in kernels):.0f} "
          f"launches a step; " + ", ".join(f"{group} {share:.1%}" for group, share in shares.items()))
    short = [kernel | {"kernel": kernel["kernel"][:90].replace("|", "/")} for kernel in kernels[:KERNELS]]
    print("\n".join(table(short, KERNEL_COLUMNS)), flush=True)
    return kernels


def measure_ceilings(args, batch, tokens, device, dtype, fp8=False):
    """[{"work", "kind", "TFLOP", "median s", "TFLOP/s"}] of what this device does in products of FLUX's shapes, with
    fp8 also in that, and in attention; what does not run here is named with the reason. Attention's backward counts as
    four products."""
    width, rows = args.heads * 128, []

    def measure(work, kind, flop, call):
        seconds = []
        for _ in range(1 + ROUNDS):  # the first one builds plans
            with Timer(device) as timer:
                for _ in range(CALLS):
                    call()
            seconds.append(timer.seconds / CALLS)
        median = statistics.median(seconds[1:])
        rows.append({"work": work, "kind": kind, "TFLOP": flop / 1e12, "median s": median,
                     "TFLOP/s": flop / median / 1e12})

    def product(columns, results, kind):
        x, weight = (torch.randn(shape, device=device, dtype=dtype)
                     for shape in ((batch * tokens, columns), (results, columns)))
        call = lambda: F.linear(x, weight)  # noqa: E731
        if kind == "fp8 product":
            codes, weight_codes = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
            one = torch.ones((), device=device)
            call = lambda: torch._scaled_mm(codes, weight_codes.t(), one, one, out_dtype=dtype)  # noqa: E731
        measure(f"{kind}, {batch * tokens} x {columns} x {results}", kind, 2 * batch * tokens * columns * results, call)

    def attention(backend):
        q, k, v = (torch.randn(batch, tokens, args.heads, 128, device=device, dtype=dtype, requires_grad=True)
                   for _ in range(3))
        flop, work = 4 * batch * tokens**2 * width, f"{batch} x {tokens} tokens, {backend}"
        with attention_backend(backend):
            result = dispatch_attention_fn(q, k, v)
            gradient = torch.randn_like(result)
            measure(f"attention forward, {work}", "attention forward", flop, lambda: dispatch_attention_fn(q, k, v))
            measure(f"attention backward, {work}", "attention backward", 2 * flop, lambda: torch.autograd.grad(
                result, (q, k, v), gradient, retain_graph=True))

    for kind in ("product", "fp8 product")[: 1 + fp8]:
        for columns, results in FLUX_PRODUCTS:
            attempt(product, columns * width, results * width, kind)
    for backend in speed.ATTENTION_BACKENDS:
        attempt(attention, backend)
    return rows


def attempt(measure, *what):
    """Measure what may not run here: not installed, or not for this device. Then it is named with the reason."""
    try:
        measure(*what)
    except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
        print(f"{measure.__name__} {what}: does not run here: {' '.join(str(error).split())[:120]}", flush=True)


def compare_with_card(args, rows, device, dtype):
    """Add to the rows of training steps what this card reaches in TFLOP/s, and the time that the same work takes so."""
    free_memory()
    reached = {}
    for row in rows:
        job = make_job(args, row["arm"])
        if job.tokens not in reached:
            ceilings = measure_ceilings(args, job.batch, job.tokens, device, dtype)
            best = {kind: max(c["TFLOP/s"] for c in ceilings if c["kind"] == kind) for kind in row["TFLOP"]}
            print(f"this card with {job.batch} x {job.tokens} tokens, TFLOP/s: "
                  + ", ".join(f"{kind} {rate:.4g}" for kind, rate in best.items()))
            reached[job.tokens] = best
        row["card TFLOP/s"] = reached[job.tokens]
        row["card's s"] = sum(count / row["card TFLOP/s"][kind] for kind, count in row["TFLOP"].items())
        row["of card"] = row["card's s"] / row["median s"]


def measure_apart(args, argv):
    """The same as measure_arms, each arm in a process of its own."""
    rows, failed = [], []
    for name in args.names:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "arm.json"
            arm = subprocess.run([sys.executable, "-m", "bench.gpu_step", *argv, "--arms", name, "--output", str(file)],
                                 check=False)  # it has said what was wrong
            if arm.returncode:
                failed.append(name)
            else:
                rows += json.loads(file.read_text())["rows"]
    return rows, failed


def fit_together(args, device):
    """Whether all arms can run in one process. Where they are compiled they need one length of text: PyTorch compiles a
    second one with symbolic sizes. And there must be room on the card for all weights, and for the passing part of the
    largest arm."""
    if args.compile and len({make_job(args, name).text_tokens for name in args.names}) > 1:
        return False
    if device.type != "cuda":
        return True
    parts = [memory.predict(make_job(args, name), make_plan(args, name)) for name in args.names]
    weights = [part["transformer"] + part["VAE"] for part in parts]  # the LoRAs are part of the rest: small
    rest = max(sum(part.values()) - own for part, own in zip(parts, weights, strict=True))
    return sum(weights) + rest <= memory.gpu_bytes(device)


def measure_sampling(args, device, dtype):
    """[{quantity: value}] of images sampled eagerly and compiled; a reference of the image's size, no LoRA."""
    pipe = random_pipeline(device, dtype, args.blocks, args.heads)
    text = random_text(pipe.transformer, 1, args.max_sequence_length, device, dtype)
    job = make_job(args, "official")
    call = flops.count_call(dataclasses.replace(job, batch=1))
    speed.choose_attention(pipe.transformer, args.attention_backend, job.tokens, device, dtype)
    reference = torch.rand(1, 3, args.resolution, args.resolution, device=device) * 2 - 1
    rows = []
    for mode in ("eager", "compiled") if args.compile else ("eager",):
        if mode == "compiled":
            speed.compile_blocks(pipe.transformer)
        for steps in args.sampling_steps:
            seconds = []
            for _ in range(4):
                with Timer(device) as timer:
                    generate.generate(pipe, text, [reference], STOCK_SETTINGS, steps, args.resolution, args.resolution,
                                      [0])
                seconds.append(timer.seconds)
            median = statistics.median(seconds[1:])
            rows.append({"arm": f"{mode}, {steps} steps", "text tokens": job.text_tokens, "median s": median,
                         "min s": min(seconds[1:]), "max s": max(seconds[1:]), "first step s": seconds[0],
                         "useful TFLOP": steps * call / 1e12, "MFU": steps * call / median / 1e12 / args.peak_tflops,
                         "seconds": seconds[1:]})
    return rows


COLUMNS = {"arm": "", "text tokens": "", "median s": ".4f", "min s": ".4f", "max s": ".4f", "first step s": ".1f",
           "useful TFLOP": ".4g", "MFU": ".1%", "card's s": ".4f", "of card": ".1%", "allocated GiB": ".2f",
           "reserved GiB": ".2f", "predicted GiB": ".2f"}
KERNEL_COLUMNS = {"kernel": "", "group": "", "calls": ".0f", "seconds": ".5f", "share": ".1%"}
CEILING_COLUMNS = {"work": "", "TFLOP": ".4g", "median s": ".6f", "TFLOP/s": ".4g"}


def table(rows, columns=COLUMNS):
    yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    for row in rows:
        cells = ["-" if row.get(name) is None else format(row[name], form) for name, form in columns.items()]
        yield f"| {' | '.join(cells)} |"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    device, dtype = torch.device(args.device), torch.bfloat16
    flux.check_sizes(memory.meta_vae(memory.KONTEXT_VAE), [(args.resolution,) * 2])
    columns, failed = COLUMNS, []
    if args.ceilings:
        columns = CEILING_COLUMNS
        rows = [row for tokens in args.ceiling_tokens
                for row in measure_ceilings(args, args.train_batch_size, tokens, device, dtype, fp8=True)]
    elif args.sampling:
        rows = measure_sampling(args, device, dtype)
    elif len(args.names) > 1 and (args.separate or args.memory_limit or not fit_together(args, device)):
        rows, failed = measure_apart(args, argv)
    else:
        rows, failed = measure_arms(args, device, dtype)
        compare_with_card(args, rows, device, dtype)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    machine = f"{card}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    print(f"{machine}; batch {args.train_batch_size} at {args.resolution} px with a reference of that size, blocks "
          f"{args.layers}, {args.heads} heads, rank {args.rank}, "
          f"{'compiled' if args.compile else 'eager'}, MFU of {args.peak_tflops:g} TFLOP/s")
    if device.type != "cuda":
        print("on a CPU: these times and MFUs mean nothing")
    print("\n".join(table(rows, columns)), flush=True)
    for row in rows:
        if "settings" in row:
            print(f"{row['arm']}: {row['settings']}; last loss {row['losses'][-1]:.4f}")
    if args.output:
        write_json(args.output, {"machine": machine, "args": vars(args), "rows": rows, "failed": failed})
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    run_main(main)

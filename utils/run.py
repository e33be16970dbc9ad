"""What every training run needs around its loop: Accelerate, folders, trackers, optimizer, schedule, stop signals,
the guard against non-finite numbers."""

import contextlib
import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from utils import checkpoint, sharding
from utils.lora import LORA_FILE, averaged, load_state_dict, state_dict
from utils.parse import check_finite, check_least, public_args, read_metrics, writable_folder, write_json
from utils.restore import choose_start_noise

logger = logging.getLogger("kontext")
OPTIMIZER_OPTIONS = (  # what the optimizer of a resumed run has in common with that of the one it resumes
    "optimizer", "use_8bit_adam", "learning_rate", "adam_weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "lr_scheduler", "seed", "train_batch_size", "gradient_accumulation_steps")


def add_training_args(parser):
    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", default="trained-flux-kontext-deg-lora", help="folder for all that is written")
    group.add_argument("--seed", type=int, default=0, help="seed of data order, degradations, noise and LoRA")
    group.add_argument("--train_batch_size", type=int, default=4, help="images per process and micro-step")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-steps per optimizer step")
    group.add_argument("--num_train_epochs", type=int, default=1,
                       help="epochs of ceil(items / global batch) steps; --max_train_steps wins")
    group.add_argument("--max_train_steps", type=int, help="optimizer steps")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, about a third slower")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"],
                       help="default bf16 on a GPU; a CPU always trains in fp32")
    group.add_argument("--allow_tf32", action="store_true", help="TF32 for the fp32 matrices on a GPU")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="gradient clipping norm; 0 = off")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="steps between checkpoints; 0 = none")
    group.add_argument("--checkpoints_total_limit", type=int, help="keep at most so many checkpoints; default all")
    group.add_argument("--resume_from_checkpoint", help="'latest' in --output_dir, or the path of one")
    group.add_argument("--logging_steps", type=int, default=10,
                       help="steps between read-backs of losses, each of which waits for the GPU")
    group.add_argument("--logging_dir", default="logs", help="tracker files, below --output_dir")
    group.add_argument("--report_to", default="tensorboard", help="any Accelerate tracker, 'all' or 'none'; "
                       "metrics.jsonl is always written")
    group.add_argument("--dry_run", action="store_true", help="check flags and data, say what would be trained, and "
                       "stop before any model loads")
    group.add_argument("--push_to_hub", action="store_true", help="upload the finished LoRA and its card")
    group.add_argument("--hub_model_id", help="repository to upload to; default: the output folder's name")
    group.add_argument("--hub_token", help="token for --push_to_hub; better: `hf auth login`")


def add_optimizer_args(parser):
    group = parser.add_argument_group("optimizer")
    group.add_argument("--learning_rate", type=float, default=1e-4, help="Prodigy wants 1")
    group.add_argument("--scale_lr", action="store_true", help="multiply the rate by the global batch size")
    group.add_argument("--lr_scheduler", default="constant",
                       choices=["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts",
                                "polynomial", "piecewise_constant"], help="diffusers' schedules")
    group.add_argument("--lr_warmup_steps", type=int, default=500,
                       help="steps; no use to constant, but to schedule_free")
    group.add_argument("--lr_num_cycles", type=int, default=1, help="cycles of cosine_with_restarts")
    group.add_argument("--lr_power", type=float, default=1.0, help="power of polynomial")
    group.add_argument("--lr_step_rules", help="rules of piecewise_constant: '1:100,0.1:200,0.01' = factor 1 to step "
                       "100, 0.1 to step 200, then 0.01")
    group.add_argument("--optimizer", type=str.lower, default="adamw", choices=["adamw", "prodigy", "schedule_free"],
                       help="AdamW, Prodigy or schedule-free AdamW")
    group.add_argument("--use_8bit_adam", action="store_true", help="8-bit AdamW of bitsandbytes")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="first beta of every optimizer")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="second beta of every optimizer")
    group.add_argument("--adam_weight_decay", type=float, default=1e-4, help="weight decay of every optimizer")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="epsilon of every optimizer")
    group.add_argument("--prodigy_beta3", type=float, help="Prodigy's beta3; default sqrt(beta2)")
    group.add_argument("--prodigy_decouple", type=true_or_false, default=True, help="Prodigy: AdamW-style decay")
    group.add_argument("--prodigy_use_bias_correction", type=true_or_false, default=True, help="Prodigy's option")
    group.add_argument("--prodigy_safeguard_warmup", type=true_or_false, default=True, help="Prodigy's option")


OBSOLETE = {
    "--local_rank": "torchrun and accelerate launch tell every process which one it is",
    "--enable_npu_flash_attention": "PyTorch's own attention is used on every device",
    "--upcast_before_saving": "the LoRA is fp32 all along, and so is its file",
}


def add_obsolete_args(parser):
    """Options of the official script that make no sense here: accepted, so that its command lines run."""
    group = parser.add_argument_group("accepted, without effect")
    for flag, reason in OBSOLETE.items():
        options = {"type": int} if flag == "--local_rank" else {"action": "store_true", "default": None}
        group.add_argument(flag, help=reason, **options)


def replace_obsolete(args):
    """Say what replaces the options that were given for nothing, and replace those that FLUX cannot take."""
    for flag, reason in OBSOLETE.items():
        if getattr(args, flag.removeprefix("--")) is not None:
            print(f"{flag} does nothing: {reason}", flush=True)
    for name in ("mixed_precision", "prior_generation_precision"):
        if getattr(args, name) == "fp16":
            print(f"--{name} fp16: FLUX overflows in fp16, so bf16 is used", flush=True)
            setattr(args, name, "bf16")
    if args.hub_token and not args.push_to_hub:
        print("--hub_token does nothing without --push_to_hub", flush=True)
        args.hub_token = None
    if args.optimizer == "prodigy" and args.learning_rate <= 0.1:
        print(f"--learning_rate {args.learning_rate:g}: Prodigy finds the rate itself and wants 1", flush=True)
    if args.use_8bit_adam and args.optimizer != "adamw":
        print(f"--use_8bit_adam does nothing: --optimizer {args.optimizer} has no 8-bit form", flush=True)
        args.use_8bit_adam = False


def true_or_false(text):
    """argparse type: the official script's `type=bool` takes every text, 'False' too, for true."""
    if text.lower() in ("true", "1", "yes", "false", "0", "no"):
        return text.lower() in ("true", "1", "yes")
    raise ValueError(text)


def check_training_args(args):
    """Refuse impossible values before anything loads. ValueError names the flag."""
    from accelerate.tracking import get_available_trackers

    check_least(args, train_batch_size=1, gradient_accumulation_steps=1, num_train_epochs=1, max_train_steps=1,
                logging_steps=1, checkpoints_total_limit=1, checkpointing_steps=0, seed=0, max_grad_norm=0,
                validation_steps=1, validation_epochs=1, num_validation_images=0,
                num_inference_steps=1, max_sequence_length=1)
    if args.max_sequence_length > 512:
        raise ValueError(f"--max_sequence_length {args.max_sequence_length}: give 1 to 512")
    check_optimizer_args(args)
    if args.mixed_precision == "fp16":
        raise ValueError("--mixed_precision fp16: FLUX overflows in fp16; use bf16")
    if args.hub_token and args.report_to in ("wandb", "all"):
        raise ValueError("--hub_token with --report_to wandb can leak the token; use `hf auth login`")
    if args.hub_token and not args.push_to_hub:
        raise ValueError("--hub_token without --push_to_hub; add the one or drop the other")
    known = {"none", "all", *(str(getattr(name, "value", name)) for name in get_available_trackers())}
    if args.report_to not in known:
        raise ValueError(f"--report_to {args.report_to}: no such tracker is installed; there are "
                         f"{', '.join(sorted(known))}")


def check_optimizer_args(args):
    """Refuse impossible values of `add_optimizer_args`. ValueError names the flag."""
    check_finite(args)
    check_least(args, learning_rate=0, lr_warmup_steps=0, adam_weight_decay=0, adam_epsilon=0, lr_power=0,
                lr_num_cycles=0)
    if not (0 <= args.adam_beta1 < 1 and 0 <= args.adam_beta2 < 1):
        raise ValueError(f"--adam_beta1 {args.adam_beta1}, --adam_beta2 {args.adam_beta2}: give 0 or more, below 1")
    factor = r"(\d+\.?\d*|\.\d+)"
    if args.lr_step_rules and not re.fullmatch(rf"({factor}:\d+,)*{factor}", args.lr_step_rules):
        raise ValueError(f"--lr_step_rules {args.lr_step_rules}: write factor:step pairs and a last factor, such as "
                         "1:100,0.1:200,0.01")
    if args.lr_scheduler == "piecewise_constant" and not args.lr_step_rules:
        raise ValueError("--lr_scheduler piecewise_constant needs --lr_step_rules, such as 1:100,0.1:200,0.01")
    if args.optimizer == "schedule_free" and args.lr_scheduler != "constant":
        raise ValueError(f"--optimizer schedule_free replaces the schedule; leave --lr_scheduler constant, "
                         f"not {args.lr_scheduler}")
    if args.use_8bit_adam and args.optimizer != "adamw":
        raise ValueError(f"--use_8bit_adam goes with --optimizer AdamW, not {args.optimizer}")


def check_output_dir(args):
    """Make --output_dir, and refuse one that holds a run unless that run is to be resumed: nothing is overwritten."""
    folder = writable_folder(args.output_dir, "--output_dir")
    if not args.resume_from_checkpoint and (checkpoint.any_checkpoint(folder) or (folder / LORA_FILE).exists()):
        raise ValueError(f"--output_dir {folder} holds an earlier run; add --resume_from_checkpoint latest, or name "
                         "another folder")


def make_accelerator(args, can_shard=False):
    """(Accelerator of this run, dtype of the frozen models). bf16 under --mixed_precision bf16, else fp32; always fp32
    on a CPU, where bf16 is emulated and slow. No autocast: what is bf16 is so explicitly, the LoRA's masters are fp32
    (lora.compute_in_input_dtype).

    can_shard: the script lets utils/placement.py split the frozen transformer where the config of `accelerate launch`
    asks for that; args.shards says over how many processes. ValueError for such a config without."""
    from accelerate import Accelerator
    from accelerate.utils import (
        DataLoaderConfiguration,
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
        ProjectConfiguration,
    )

    use_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    precision = args.mixed_precision or ("no" if use_cpu else "bf16")
    if use_cpu and precision != "no":
        print(f"--mixed_precision {precision}: no GPU, so this run computes in fp32", flush=True)
        precision = "no"
    if precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise ValueError("--mixed_precision bf16: this GPU has no bf16; use --mixed_precision no")
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    is_sharded = sharding.take_over()
    if is_sharded and not can_shard:
        raise ValueError("accelerate's config splits the model (FSDP, ZeRO-3), and this script trains whole copies; "
                         "use --config_file configs/accelerate/ddp.yaml")
    accelerator = Accelerator(
        cpu=use_cpu,
        mixed_precision="no",
        # The sampler is endless and an optimizer step never ends early, so the loader's end means nothing here.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False),
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir) / args.logging_dir)),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),  # from pinned memory
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # validation on rank 0 takes its time
            # More than two processes: after its first step DDP would put the gradients into another order, in which
            # they are summed, and a resumed run would differ from a straight one. DDP warns of what this costs, 7 % of
            # the CPU time of a step of 57 tiny blocks.
            DistributedDataParallelKwargs(find_unused_parameters=int(os.environ.get("WORLD_SIZE", "1")) > 2),
        ],
    )
    level = logging.INFO if accelerator.is_local_main_process else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger.setLevel(level)
    args.shards = accelerator.num_processes if is_sharded else 1
    return accelerator, torch.bfloat16 if precision == "bf16" else torch.float32


def plan_steps(args, items, num_processes):
    """Set args.max_train_steps where --num_train_epochs states it; returns the steps between validations. An epoch has
    ceil(items / global batch) steps. items: None where nobody knows them. ValueError for fewer items than one step of
    all processes takes, or where steps follow from them and they are not known."""
    global_batch = args.train_batch_size * num_processes
    if items is None:
        if not (args.max_train_steps and args.validation_steps):
            raise ValueError("--streaming: the number of images is not known; give --max_train_steps and "
                             "--validation_steps")
        return args.validation_steps
    if items < global_batch:
        raise ValueError(f"{items} usable images are fewer than --train_batch_size {args.train_batch_size} x "
                         f"{num_processes} processes; lower it or add images")
    steps_per_epoch = math.ceil(items / (global_batch * args.gradient_accumulation_steps))
    args.max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    return args.validation_steps or args.validation_epochs * steps_per_epoch


def lacks_validation(accelerator, args, step, validation_steps, has_final=True):
    """True, on all processes or none, before training, and where a run was stopped between a checkpoint and its
    validation, whose picture is not there. has_final: whether the last step has one."""
    from accelerate.utils import broadcast_object_list

    picture = Path(args.output_dir) / "validation" / f"step-{step:06d}.png"
    is_due = has_final if step == args.max_train_steps else step % validation_steps == 0
    is_lacking = [step == 0 or (is_due and not picture.exists())]
    return broadcast_object_list(is_lacking)[0]  # the main process alone may see the folder


def print_plan(accelerator, args, images, step, validation_steps, plan):
    """What --dry_run says, and the end of the run. images: how many, or in words what they are. step: that is resumed
    from. plan: memory.Plan."""
    processes, machines = accelerator.num_processes, os.environ.get("GROUP_WORLD_SIZE", "1")
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * processes
    epochs = f", {args.max_train_steps * global_batch / images:.2f} epochs" if isinstance(images, int) else ""
    rows = {
        "processes": f"{processes} on {machines} machine{'s' * (machines != '1')}, device {accelerator.device.type}",
        "images": images,
        "batch": f"{args.train_batch_size} images x {args.gradient_accumulation_steps} micro-steps x {processes} "
                 f"processes = {global_batch} a step",
        "steps": f"{args.max_train_steps}{epochs}" + f", resumed after step {step}" * bool(step),
        "transformer": plan.in_words(),
        "LoRA": f"rank {args.rank}, {args.optimizer} at {args.learning_rate:g}, {args.lr_scheduler}",
        "checkpoints": f"every {args.checkpointing_steps} steps" if args.checkpointing_steps else "none",
        "validation": f"every {validation_steps} steps, where there are images for it",
        "output": args.output_dir,
    }
    if accelerator.is_main_process:
        print("\n".join(["dry run, nothing is trained:", *(f"  {name:12} {text}" for name, text in rows.items())]))
    accelerator.end_training()


def start_run(accelerator, args, step, project):
    """Write args.json, open the trackers, and cut metrics.jsonl back to `step`, the step that is resumed from."""
    if not accelerator.is_main_process:
        return
    write_json(Path(args.output_dir) / "args.json", public_args(args))
    log_file = Path(args.output_dir) / "metrics.jsonl"
    if log_file.exists():  # at step 0 of a run that was killed before its first checkpoint, none of whose rows stay
        rows = [row for row in read_metrics(log_file) if 0 < step >= row["step"]]
        log_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in public_args(args).items()}
    accelerator.init_trackers(project, config=config)


def log_metrics(accelerator, output_dir, values, step):
    """Append one line to metrics.jsonl and tell the trackers. values: {name: float}; None stands for a number that
    is not finite, which JSON cannot hold."""
    if accelerator.is_main_process:
        clean = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        with open(Path(output_dir) / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **clean}) + "\n")
        accelerator.log({k: v for k, v in clean.items() if v is not None}, step=step)


def make_optimizer(parameters, args, num_processes):
    """Optimizer over the LoRA's fp32 masters, by --optimizer and --use_8bit_adam. parameters: a list, or groups."""
    rate = args.learning_rate
    if args.scale_lr:
        rate *= args.train_batch_size * args.gradient_accumulation_steps * num_processes
    common = dict(lr=rate, betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.adam_weight_decay,
                  eps=args.adam_epsilon)
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters, beta3=args.prodigy_beta3, decouple=args.prodigy_decouple,
                       use_bias_correction=args.prodigy_use_bias_correction,
                       safeguard_warmup=args.prodigy_safeguard_warmup, **common)
    if args.optimizer == "schedule_free":
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree(parameters, warmup_steps=args.lr_warmup_steps, **common)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **common)
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    return torch.optim.AdamW(parameters, fused=first.is_cuda or None, **common)  # one launch for all of them


def make_lr_scheduler(optimizer, args):
    """diffusers' schedule in optimizer steps; it is stepped once per step, whatever the number of processes."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(args.lr_scheduler, optimizer, step_rules=args.lr_step_rules,
                         num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps,
                         num_cycles=args.lr_num_cycles, power=args.lr_power)


@contextlib.contextmanager
def evaluation_weights(optimizer, ema, parameters):
    """Inside, the LoRA holds what is validated and saved: its moving average, or schedule-free's own; afterwards the
    weights that are trained, to the bit, which schedule-free's way back alone would miss by a rounding."""
    kept = [parameter.detach().clone() for parameter in parameters]
    set_optimizer_mode(optimizer, training=False)
    try:
        with averaged(ema, parameters):
            yield
    finally:
        set_optimizer_mode(optimizer, training=True)
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def set_optimizer_mode(optimizer, training):
    """Schedule-free keeps two sets of weights: train() for steps, eval() for validation and saving. Others: no-op."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if hasattr(inner, "train") and hasattr(inner, "eval"):
        inner.train() if training else inner.eval()


def identity(args, settings, items, num_processes, more=()):
    """What a resumed run must have in common with the one it resumes, or its data, its optimizer state or the settings
    stored in the LoRA file would not fit. more: names of options that only this script has."""
    names = ["rank", "lora_alpha", "lora_layers", "use_dora", "use_rslora", "use_ema", "weighting_scheme",
             "aspect_ratio_buckets", *OPTIMIZER_OPTIONS, *more]
    return settings | {name: getattr(args, name) for name in names} | {
        "images": items, "processes": num_processes, "state_format": 2}  # 2: as collect_state nests it


def average_gradients(parameters, accelerator):
    """Replace the gradients by their means over the processes, in one message: for steps of several forwards and
    backwards, which DistributedDataParallel's hooks would count as several steps. No gradient counts as zero."""
    if accelerator.num_processes == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = mean.view_as(parameter).clone()


def resume(args, identity, result=LORA_FILE):
    """(step, state) of the checkpoint that --resume_from_checkpoint names, or (0, None) for a new run. result: name of
    what a finished run leaves in --output_dir. ValueError where it, or a checkpoint, would be lost."""
    folder = Path(args.output_dir)
    path = checkpoint.find(folder, args.resume_from_checkpoint)
    is_finished = (folder / result).exists()
    if path is None:
        if is_finished:
            raise ValueError(f"--output_dir {folder} holds a finished {result} and no sound checkpoint, so a new run "
                             "would write over it; name another folder")
        return 0, None
    if path.resolve().parent != folder.resolve() and (is_finished or checkpoint.any_checkpoint(folder)):
        raise ValueError(f"--resume_from_checkpoint {path} is of another run than that in --output_dir {folder}, which "
                         "would be written over; name another folder")
    step, state = checkpoint.load(path, identity)
    log_file = folder / "metrics.jsonl"
    rows = read_metrics(log_file) if is_finished and log_file.exists() else []  # may have gone on
    reached = max([step, *(row["step"] for row in rows)])
    if reached > args.max_train_steps:
        raise ValueError(f"{folder if rows else path} is at step {reached} already, and this command asks for "
                         f"{args.max_train_steps}; ask for more steps, or name another --output_dir")
    return step, state


def collect_state(models, optimizer, lr_scheduler, ema):
    """All that training carries from step to step, as a nested dict for checkpoint.save. No random state is among it:
    every draw comes from an item's own generator. models: {name: model with a LoRA}; one that has several is there
    under each of their names."""
    return {"lora": {name: state_dict(model, adapter_of(model, name)) for name, model in models.items()},
            "optimizer": optimizer.state_dict(), "lr_scheduler": lr_scheduler.state_dict(),
            "ema": ema.state_dict() if ema else None}


def adapter_of(model, name):
    """`name` where the model has a LoRA called so, else "default", which lora.attach calls it."""
    return name if name in model.peft_config else "default"


def save_checkpoint(accelerator, args, step, identity, models, optimizer, lr_scheduler, ema, write_lora):
    """Write checkpoint-<step> on the main process, the others waiting; before the first step there is nothing to save.
    write_lora(folder): as for checkpoint.save."""
    if accelerator.is_main_process and step:
        state = collect_state(models, optimizer, lr_scheduler, ema)
        checkpoint.save(args.output_dir, step, state, identity, limit=args.checkpoints_total_limit,
                        write_lora=write_lora)
    accelerator.wait_for_everyone()


def report_validation(accelerator, output_dir, scores, grid, step):
    """Scores {"validation/name": float} and the picture `grid`, to metrics.jsonl, the trackers and the terminal; on the
    main process, whoever else has validated."""
    if not accelerator.is_main_process:
        return
    log_metrics(accelerator, output_dir, scores, step)
    log_image(accelerator, "validation", grid, step)
    numbers = ", ".join(f"{name.split('/')[1]} {value:.4g}" for name, value in scores.items())
    tqdm.write(f"step {step}: {numbers}")


def load_state(state, models, optimizer, lr_scheduler, ema):
    """Put the state of checkpoint.load back, before accelerator.prepare."""
    for name, model in models.items():
        load_state_dict(model, state["lora"][name], adapter_of(model, name))
    optimizer.load_state_dict(state["optimizer"])
    lr_scheduler.load_state_dict(state["lr_scheduler"])
    if ema:
        ema.load_state_dict(state["ema"])
        ema.to(next(model.parameters()).device)  # unlike an optimizer it stays where its state was read


def report_skipped(skipped, output_dir, what):
    """Append the files that could not be read ("path: reason") to unreadable.txt, and say how many and `what` was done
    about them ("left out", "replaced")."""
    if skipped:
        logger.warning(f"{len(skipped)} images could not be read and were {what}, such as {skipped[0]}")
        with open(Path(output_dir) / "unreadable.txt", "a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in skipped)


def log_image(accelerator, name, path, step):
    """Show a picture file in every tracker that can hold images."""
    import numpy as np
    from PIL import Image

    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.asarray(Image.open(path))[None]}, step=step, **layout)


def memory_gib(device):
    """GiB that PyTorch had of the GPU at most since the start, without CUDA's own context; of a process on a CPU the
    resident set as it is. Neither waits for the device."""
    used = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 2**30


class Progress:
    """The progress bar, and what is reported of the steps since the last report. Every number read back waits for the
    device, so losses are summed there, and a report comes only now and then. prefix: of the losses' names in the log.
    on_bar: names of those that the bar shows; default all."""

    def __init__(self, accelerator, args, step, prefix="loss/", on_bar=None):
        self.output_dir, self.prefix, self.on_bar = args.output_dir, prefix, on_bar
        self.bar = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_local_main_process,
                        desc="training", unit="step", dynamic_ncols=True,
                        mininterval=0.1 if sys.stderr.isatty() else 10)
        self.restart()

    def restart(self):
        self.summed, self.counts, self.steps, self.skipped, self.waited = {}, {}, 0, [], 0.0
        self.started = time.perf_counter()

    def next_batch(self, batches):
        """The next one; what it took counts as waiting for data, and its "skipped" files are noted."""
        asked = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - asked
        self.skipped += sum(batch["skipped"], [])
        return batch

    def add(self, losses):
        """Losses of one micro-step, {name: scalar tensor}; every process has the same names in the same order. A loss
        is averaged over the micro-steps that have it."""
        for name, value in losses.items():
            self.summed[name] = self.summed.get(name, 0.0) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1

    def step(self):
        self.steps += 1
        self.bar.update()

    def report(self, accelerator, step, gradient_norm, lr_scheduler):
        """Means over all ranks and the steps since the last report, to metrics.jsonl, trackers and the bar."""
        means = {name: accelerator.reduce(value / self.counts[name], "mean").item()
                 for name, value in self.summed.items()}
        waited = accelerator.reduce(torch.tensor(self.waited, device=accelerator.device), "mean").item()
        memory = memory_gib(accelerator.device)
        log_metrics(accelerator, self.output_dir, {f"{self.prefix}{name}": value for name, value in means.items()} | {
            "gradient_norm": gradient_norm.item(), "lr": lr_scheduler.get_last_lr()[0],
            "seconds_per_step": (time.perf_counter() - self.started) / self.steps,
            "data_seconds_per_step": waited / self.steps, "memory_gib": memory,
        }, step)
        self.bar.set_postfix({name: f"{means[name]:.4f}" for name in self.on_bar or means}
                             | {"memory": f"{memory:.1f} GiB"})
        report_skipped(self.skipped, self.output_dir, "replaced")
        self.restart()


class StopSignal:
    """SIGTERM or SIGINT ask for a stop after the running step; a second SIGINT stops at once.

    Several processes agree on it over gloo, on the CPU, so that asking after every step waits for no device. Make it
    on every rank, after the Accelerator."""

    def __init__(self, num_processes=1):
        self.received = None
        self.group = torch.distributed.new_group(backend="gloo") if num_processes > 1 else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self):
        """The signal's number, on every rank alike, else None."""
        if self.group is None:
            return self.received
        noted = torch.tensor(self.received or 0)
        torch.distributed.all_reduce(noted, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(noted) or None


def stopped(accelerator, progress, step, number):
    """Close a run that signal `number` ended after `step`, whose checkpoint is saved; returns the exit code."""
    progress.bar.close()
    logger.warning(f"stopped by signal {number} after step {step}; go on with --resume_from_checkpoint latest")
    accelerator.end_training()
    return 128 + number


def print_summary(args, results, uses):
    """Say where everything of a finished run is, its `results` {name: file} first, and how to use it, {where: text}."""
    folder = Path(args.output_dir)
    curves = f"--runs {shlex.quote(str(folder))} --output {shlex.quote(str(folder / 'curves.png'))}"
    places = results | {"options": folder / "args.json", "curves": f"python -m scripts.plot_loss {curves}"}
    for what, found in (("validation", sorted(folder.glob("validation/step-*.png"))),
                        ("checkpoints", [path for _, path in checkpoint.list_checkpoints(folder)])):
        if found:
            places[what] = found[0] if len(found) == 1 else f"{found[0]} ... {found[-1].name}"
    for heading, texts in ((f"\nFinished after {args.max_train_steps} steps:", places), ("To use it:", uses)):
        print(heading, *(f"  {name:<12} {text}" for name, text in texts.items()), sep="\n", flush=True)


def lora_uses(args, settings, command):
    """How the LoRA of a finished run on Kontext is used: by `command`, in diffusers, in ComfyUI."""
    folder = Path(args.output_dir)
    in_diffusers = f"pipe.load_lora_weights({str(folder)!r})"
    if (start_noise := choose_start_noise(settings)) < 1:
        in_diffusers = (f"its pipelines start at pure noise, this LoRA at {start_noise:g} of it on the degraded image: "
                        "take the command above")
    in_comfyui = (comfyui_command(folder, folder / "comfyui.safetensors") if not args.use_dora else
                  "python -m scripts.lora_tool merge: a DoRA goes into a whole model only")
    return {"here": command, "diffusers": in_diffusers, "ComfyUI": in_comfyui}


def comfyui_command(lora, output):
    """Shell command that converts a LoRA of FLUX for ComfyUI, and where its result goes."""
    return (f"python -m scripts.lora_tool convert {shlex.quote(str(lora))} --to comfyui --output "
            f"{shlex.quote(str(output))}, for ComfyUI's models/loras")


class FiniteGuard:
    """Keeps non-finite numbers away from the weights without waiting for the device.

    `protect` turns a non-finite loss into non-finite gradients, which the gradient average carries to every rank;
    `filter` turns the gradients of such a step to zero on the device and notes it. `check`, at the next read-back,
    stops training on all ranks and names the batch. Nothing is saved in between: saving reads back first."""

    def __init__(self):
        self.noted = []  # (step, flag on the device, files of the step's batches on this rank)
        self.files = []

    def protect(self, loss, files):
        self.files += files
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))

    def filter(self, parameters, max_norm, step):
        """Clip to max_norm (0 = off); returns the gradient norm as a tensor, before clipping."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = torch.isfinite(norm)
        if max_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        for gradient in gradients:
            gradient.masked_fill_(~finite, 0.0)
        self.noted.append((step, ~finite, self.files))
        self.files = []
        return norm

    def check(self, accelerator):
        """At a read-back: ValueError on every rank if any step since the last one was not finite."""
        noted, self.noted = self.noted, []
        bad = torch.stack([flag for _, flag, _ in noted]) if noted else torch.zeros(1, dtype=torch.bool)
        if not bad.any().item():
            return
        step, _, files = noted[bad.tolist().index(True)]
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            files = gather_object(files)
        raise ValueError(f"loss or gradient of step {step} is not finite; it was kept from the weights, and "
                         f"nothing was saved since. Its images: {', '.join(files)}. Try a lower --learning_rate, or "
                         "look at these files")

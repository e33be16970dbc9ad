"""Load the models of a training run as its memory plan says, and make the transformer ready for the loop."""

import argparse

import torch

from utils import adaln, flux, lora, memory, offload, quantise, sharding, speed
from utils.checkpointing import enable_checkpointing
from utils.lora_files import weightless_transformer


def add_placement_args(parser):
    """What goes where, in which precision, and how fast: the options of plan, load and prepare."""
    memory.add_memory_args(parser)
    quantise.add_quantisation_args(parser)
    speed.add_speed_args(parser)
    parser.set_defaults(shards=1)  # run.make_accelerator may find that more are asked for
    parser.add_argument("--adaln_tables", action=argparse.BooleanOptionalAction, default=None,
                        help="look up what modulates the norms instead of computing it: a quarter of FLUX's weights "
                        "leave the GPU; one prompt, bf16; default: where --memory needs it")


def check_placement_args(args):
    """Refuse what this machine cannot do. ValueError names the flag."""
    quantise.check_quantisation_args(args)
    if args.memory == "nf4" and not torch.cuda.is_available():
        raise ValueError("--memory nf4: bitsandbytes quantises on a CUDA GPU only; give --memory int8")


def plan(args, device, dtype, sizes, prompts, train_text_encoder=False, decode_px=0, batch=None):
    """The memory.Plan of a run, printed. sizes: ((height, width) of the largest target, then of each reference), px.
    prompts: all that are used. batch: images of a micro-step, where that is not --train_batch_size. ValueError where
    flags contradict each other, or nothing fits the GPU."""
    if args.lora_layers:  # refused here, before anything is encoded or loaded
        model = weightless_transformer(args.pretrained_model_name_or_path, **flux.source(args))
        lora.check_layers(model, args.lora_layers)
    speed.check_attention(args.attention_backend, device)
    reason = adaln.obstacle(dtype, prompts, args.lora_layers, train_text_encoder)
    if args.adaln_tables and reason:
        raise ValueError(f"--adaln_tables: {reason}")
    fixed = {"checkpointing": "full"} if args.gradient_checkpointing else {}
    if args.bnb_options:
        fixed["base_precision"] = "nf4" if args.bnb_options.get("load_in_4bit") else "int8"
    elif args.base_precision:
        fixed["base_precision"] = args.base_precision
    if args.bnb_options and args.bnb_options.get("load_in_8bit"):
        fixed["offload_blocks"] = False  # its layers hold the codes outside their parameters too (CB): nothing is freed
        if args.memory == "offload":
            raise ValueError("--memory offload: bitsandbytes' 8-bit weights would stay on the GPU; give "
                             "--base_precision int8 instead of --bnb_quantization_config_path")
    if args.shards > 1:
        fixed["shards"] = args.shards
    if args.adaln_tables is not None:
        fixed["adaln_tables"] = args.adaln_tables
    return memory.plan_run(args, device, dtype, sizes, tables_possible=reason is None, fixed=fixed,
                           decode_px=decode_px, batch=batch, train_text_encoder=train_text_encoder,
                           double_quant=(args.bnb_options or quantise.NF4).get("bnb_4bit_use_double_quant", False))


def load(path, args, plan, device, dtype, settings, pooled, **where):
    """flux.load_models as `plan` says. pooled: (1, P), the one prompt's CLIP state, for AdaLN tables."""
    tables = (adaln.every_sigma(settings), args.guidance_scale, pooled) if plan.adaln_tables else None
    return flux.load_models(path, device, dtype, tables=tables, **precision(args, plan), **where,
                            transformer_device="cpu" if plan.offload_blocks or plan.shards > 1 else None)


def precision(args, plan):
    """The options of flux.load_models that quantise the transformer. bitsandbytes leaves out what tables replace."""
    bnb_options = args.bnb_options or (quantise.NF4 if plan.base_precision == "nf4" else None)
    if bnb_options and plan.adaln_tables:
        skipped = (bnb_options.get("llm_int8_skip_modules") or []) + adaln.MODULES
        bnb_options = bnb_options | {"llm_int8_skip_modules": skipped}
    return {"bnb_options": bnb_options, "base_precision": plan.base_precision}


def prepare(transformer, args, plan, tokens, device, dtype):
    """With the LoRA attached: split the frozen weights or move blocks out, set checkpointing and the attention kernel,
    compile. tokens: of the longest sequence of one image."""
    offload.ignore_frozen(transformer)
    if plan.shards > 1:
        sharding.shard_frozen(transformer, device)
    if plan.offload_blocks:
        offload.BlockOffload(transformer, device, plan.resident_blocks)
    enable_checkpointing(transformer, "offload" if plan.offload_activations else plan.checkpointing)
    speed.choose_attention(transformer, args.attention_backend, tokens, device, dtype)
    if speed.wants_compile(args, device, plan.base_precision):
        speed.compile_blocks(transformer)

"""LoRA on the transformer: attach, check, save, load. The file is diffusers' own format, so stock
`FluxKontextPipeline.load_lora_weights` reads it; the settings that sampling needs ride in its header."""

import contextlib
import json
import logging
import math
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

LORA_FILE = "pytorch_lora_weights.safetensors"
SETTINGS_KEY = "kontext_restoration_settings"  # a key of our own: inside diffusers' own it would break stock loading
DEFAULT_LAYERS = [
    "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0",
    "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
]  # fmt: skip  # the official Kontext script's default


def add_lora_args(parser):
    group = parser.add_argument_group("LoRA")
    group.add_argument("--rank", type=int, default=16, help="LoRA rank")
    group.add_argument("--lora_alpha", type=float, help="LoRA scale is alpha / rank; default: the rank, so scale 1")
    group.add_argument("--lora_dropout", type=float, default=0.0, help="dropout in front of the LoRA, 0 to below 1")
    group.add_argument("--lora_layers", help="comma list of module names that get a LoRA; default: attention and "
                       "feed-forward, as in the official Kontext script. x_embedder and proj_out are allowed")
    group.add_argument("--use_dora", action="store_true", help="DoRA: learn magnitude and direction apart")
    group.add_argument("--use_rslora", action="store_true", help="rank-stabilised scale alpha / sqrt(rank)")
    group.add_argument("--use_ema", action="store_true", help="keep an exponential moving average; it is what is "
                       "validated and saved as the final LoRA")
    group.add_argument("--ema_decay", type=float, default=0.999, help="decay of the moving average per step")


def check_lora_args(args):
    """Refuse impossible LoRA numbers before anything loads. ValueError names the flag."""
    if args.rank < 1:
        raise ValueError(f"--rank {args.rank}: give 1 or more")
    if args.lora_alpha is not None and not 0 < args.lora_alpha < math.inf:
        raise ValueError(f"--lora_alpha {args.lora_alpha}: give more than 0, or leave it out for alpha = rank")
    if not 0 <= args.lora_dropout < 1:
        raise ValueError(f"--lora_dropout {args.lora_dropout}: give 0 or more, below 1")
    if not 0 < args.ema_decay < 1:
        raise ValueError(f"--ema_decay {args.ema_decay}: give more than 0 and less than 1")


def attach(transformer, rank, alpha=None, dropout=0.0, layers=None, use_dora=False, use_rslora=False, seed=0):
    """Add a fresh LoRA named "default" with fp32 masters; returns its parameters, in a fixed order.

    layers: list of module names or comma text; ValueError when one matches nothing. The LoRA starts as no change
    (A normal, B zero), and its A is drawn from `seed` whatever was drawn before."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    layers = [name.strip() for name in layers.split(",") if name.strip()] if isinstance(layers, str) else layers
    names = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    for layer in layers or []:
        if not any(name == layer or name.endswith("." + layer) for name in names):
            raise ValueError(f"--lora_layers {layer}: the transformer has no such linear layer; it has, for example, "
                             f"{', '.join(sorted({n.split('.', 2)[-1] for n in names})[:8])}")
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, lora_dropout=dropout, init_lora_weights="gaussian",
                        target_modules=layers or DEFAULT_LAYERS, use_dora=use_dora, use_rslora=use_rslora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config)
    cast_training_params(transformer, torch.float32)
    return parameters(transformer)


def parameters(transformer):
    """The LoRA's parameters in module order."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def state_dict(transformer):
    """The LoRA's tensors by peft's names, detached."""
    from peft.utils import get_peft_model_state_dict

    return {name: value.detach() for name, value in get_peft_model_state_dict(transformer).items()}


def load_state_dict(transformer, tensors):
    """Put `tensors` (from state_dict) into the attached LoRA, every one of them."""
    from peft.utils import set_peft_model_state_dict

    if differing := sorted(tensors.keys() ^ state_dict(transformer).keys()):  # peft passes over missing ones
        raise ValueError(f"LoRA weights do not fit this model: {differing[0]} is on one side only")
    set_peft_model_state_dict(transformer, tensors, "default")


def make_ema(lora_parameters, decay):
    """diffusers' moving average of the LoRA's parameters; its decay grows to `decay` as (1 + n) / (10 + n)."""
    from diffusers.training_utils import EMAModel

    return EMAModel(lora_parameters, decay=decay)


@contextlib.contextmanager
def averaged(ema, lora_parameters):
    """Inside, the LoRA holds its moving average; afterwards its own weights again. Nothing happens without `ema`."""
    if ema is None:
        yield
        return
    ema.store(lora_parameters)
    ema.copy_to(lora_parameters)
    try:
        yield
    finally:
        ema.restore(lora_parameters)


def save(transformer, folder, settings):
    """Write folder/pytorch_lora_weights.safetensors in one rename; returns its path.

    diffusers' writer makes the tensors and its own header (with rank and alpha); `settings`, a JSON-safe dict, is
    added under SETTINGS_KEY."""
    from diffusers import FluxKontextPipeline
    from diffusers.training_utils import _collate_lora_metadata

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lora-") as scratch:
        metadata = _collate_lora_metadata({"transformer": transformer})
        for config in metadata.values():  # sets have no order: sort, or equal runs write unequal files
            config.update({key: sorted(value) for key, value in config.items() if isinstance(value, set)})
        FluxKontextPipeline.save_lora_weights(scratch, transformer_lora_layers=state_dict(transformer), **metadata)
        written = Path(scratch) / LORA_FILE
        with safe_open(written, "pt") as file:
            header = file.metadata() | {SETTINGS_KEY: json.dumps(settings, sort_keys=True)}
        tensors = {name: value.contiguous() for name, value in load_file(written).items()}
        complete = Path(scratch) / "complete.safetensors"
        save_file(tensors, complete, metadata=header)
        sort_header(complete)
        os.replace(complete, folder / LORA_FILE)
    return folder / LORA_FILE


def sort_header(path):
    """Rewrite a safetensors file with its metadata in order: the library writes it in hash order, so that equal runs
    would write unequal files."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def find_file(path):
    """The LoRA file at `path`: the file itself, or the one inside a folder. ValueError with the cure."""
    path = Path(path)
    if path.is_dir():
        path = path / LORA_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such LoRA file; name a .safetensors file or a folder that holds {LORA_FILE}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: only .safetensors LoRA files are read; a pickle could run code")
    return path


def read_settings(path):
    """Sampling settings stored in a LoRA file, or None for a LoRA that another tool trained."""
    path = find_file(path)
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(SETTINGS_KEY)
        return json.loads(text) if text else None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); copy it again") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its {SETTINGS_KEY} is not JSON ({error}); copy it again") from error


def check(path, transformer):
    """Refuse a LoRA file that does not fit `transformer`, which diffusers would load in silence: foreign keys, half
    a pair, wrong shapes, non-finite numbers, rank in both encodings. ValueError names the file and the first fault."""
    path = find_file(path)
    read_settings(path)
    tensors = load_file(path)
    shapes = {name: tuple(module.weight.shape) for name, module in transformer.named_modules()
              if isinstance(module, torch.nn.Linear)}
    prefix = "transformer."
    pairs = {}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity; the training that wrote it had diverged")
        if key.endswith(".alpha"):
            with safe_open(path, "pt") as file:
                if "lora_adapter_metadata" in (file.metadata() or {}):
                    raise ValueError(f"{path} states alpha twice, in its header and in {key}; export it again")
            continue
        module, _, part = key.removeprefix(prefix).rpartition(".lora_")
        if not key.startswith(prefix) or module not in shapes:
            raise ValueError(f"{path}: {key} does not belong to this transformer; was it trained for another model?")
        pairs.setdefault(module, {})[part.removesuffix(".weight")] = tuple(tensor.shape)
    if not pairs:
        raise ValueError(f"{path} holds no LoRA weights for a transformer")
    for module, pair in pairs.items():
        if not {"A", "B"} <= pair.keys():
            raise ValueError(f"{path}: {module} has lora_{min(pair)} without its partner; the file is incomplete")
        (rows, columns), rank = shapes[module], pair["A"][:1]
        if (pair["A"], pair["B"]) != ((*rank, columns), (rows, *rank)):
            raise ValueError(f"{path}: {module} has shapes {pair['A']} and {pair['B']}, the model's layer is "
                             f"{rows} x {columns}; was it trained for another model?")


def load(pipe, path, weight=1.0):
    """Load a checked LoRA file into a pipeline under the name "restoration", at `weight`."""
    path = find_file(path)
    check(path, pipe.transformer)
    # The text encoder is gone by now and the file has no keys for it, which diffusers would warn of.
    diffusers_logger = logging.getLogger("diffusers.loaders.lora_base")
    diffusers_logger.addFilter(is_about_more_than_text)
    try:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="restoration",
                               use_safetensors=True)
    finally:
        diffusers_logger.removeFilter(is_about_more_than_text)
    pipe.set_adapters("restoration", weight)


def is_about_more_than_text(record):
    return "prefix='text_encoder'" not in record.getMessage()

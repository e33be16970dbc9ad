"""PairEdit's LoRAs on one transformer: make, switch, save, load; and sliders of the original as .pt files."""

import math
import re
from pathlib import Path

import torch

from utils import lora
from utils.restore import STOCK_SETTINGS

# The attention of FLUX's double and single blocks; no feed-forward.
LAYERS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
          "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
STRICT_LAYERS = ["attn.to_k", "attn.to_v", "attn.add_k_proj", "attn.add_v_proj"]
METHODS = {"full": LAYERS, "xattn": LAYERS, "xattn-strict": STRICT_LAYERS}
SAMPLED = ["num_inference_steps", "guidance_scale", "max_sequence_length", "resolution"]  # in training as in sampling
LEGACY_KEY = re.compile(r"lora_unet_(\w+)\.(lora_down\.weight|lora_up\.weight|alpha)")


def attach(model, names, rank, alpha, method):
    """Add the LoRAs `names` to a frozen transformer, with fp32 masters; returns {name: its trained parameters}.
    method: of METHODS. `reset` draws their weights."""
    rows = min(layer.out_features for name, layer in lora.linear_layers(model).items()
               if name.endswith(tuple(METHODS[method])))
    if method != "full" and rank > rows:
        raise ValueError(f"--rank {rank}: --train_method {method} takes orthonormal columns, at most {rows} here")
    for name in names:
        lora.attach(model, rank, alpha, layers=METHODS[method], adapter=name)
    loras = {key: parameter for key, parameter in model.named_parameters() if ".lora_" in key}
    for parameter in loras.values():  # a second LoRA froze the first; block offload would take it for the base's
        parameter.requires_grad_(True)
    return {name: [parameter for key, parameter in loras.items()
                   if f".{name}." in key and (method == "full" or "lora_A" in key)] for name in names}


def reset(model, names, method, seeds):
    """Draw the LoRAs' weights as Concept Sliders does, each from its own of `seeds`; they start as no change.

    full: A uniform in +-sqrt(3 / fan_in), B zero, both trained. Other methods: B is frozen at random orthonormal
    columns, and A, which alone is trained, starts at zero (the original draws A too, so that an untrained slider
    already changes images)."""
    for name, seed in zip(names, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if f".{name}." not in key:
                continue
            is_a = "lora_A" in key
            with torch.no_grad():
                if method != "full" and not is_a:
                    columns = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(torch.linalg.qr(columns)[0])
                elif is_a and method == "full":
                    bound = math.sqrt(3 / parameter.shape[1])
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
                else:
                    parameter.zero_()


def activate(model, weights, learns=()):
    """Make the LoRAs in `weights`, {name: weight}, active and no other; with none the base model speaks. learns: the
    parameters that get gradients; every other LoRA parameter gets none.

    Never call it between a forward and its backward: checkpointed blocks are computed again, with what is active then.
    """
    if weights:
        model.enable_adapters()
        model.set_adapters(list(weights), list(weights.values()))
    else:
        model.disable_adapters()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(False)
    for parameter in learns:
        parameter.requires_grad_(True)


def save(model, name, path, settings):
    """Write one LoRA in diffusers' format, with sampling settings that every script here reads. settings: what this
    recipe adds, under "slider"."""
    stored = STOCK_SETTINGS | {key: settings[key] for key in (
        "guidance_scale", "max_sequence_length", "prompt", "base_model", "resolution")}
    stored |= {"reference_tokens": False, "references": 0, "slider": settings}
    return lora.save(model, path.parent, stored, adapter=name, name=path.name)


def read_stored(path):
    """What a LoRA file stores of its training, {} for the original's .pt. ValueError where there is no such file."""
    path = Path(path)
    if path.suffix != ".pt":
        return (lora.read_settings(path) or {}).get("slider", {})
    if not path.is_file():
        raise ValueError(f"{path}: no such LoRA file")
    return {}


def report_differing(path, args, chosen):
    """Say in which of the `chosen` sampling settings, and in which model, a LoRA file's training was another."""
    stored = read_stored(path)
    for name, value in chosen.items():
        if stored.get(name, value) != value:
            print(f"{Path(path).name} was trained with --{name} {stored[name]}; here it is {value}", flush=True)
    if stored.get("base_model") not in (None, args.base_model_id):
        print(f"{Path(path).name} was trained on {stored['base_model']}, and the model is {args.base_model_id}",
              flush=True)


def read_settings(path, args):
    """What sampling needs of a LoRA's training, {name: value}: what the command line says, else what the file stores,
    else the config. ValueError where there is no such file, or its steps leave a --skips without effect."""
    chosen = {name: getattr(args, name) for name in SAMPLED}
    for name, value in read_stored(path).items():
        if name in SAMPLED and name not in args.given and value != chosen[name]:
            print(f"{Path(path).name} was trained with --{name} {value}; that is taken, not {chosen[name]}", flush=True)
            chosen[name] = value
    report_differing(path, args, chosen)
    first, last = (0, 1) if args.objective == "real" else (-1, 2)
    if any(not first <= skip <= chosen["num_inference_steps"] - last for skip in args.skips):
        raise ValueError(f"--skips {' '.join(map(str, args.skips))}: give {first} to "
                         f"{chosen['num_inference_steps'] - last}, or the slider acts in none of the "
                         f"{chosen['num_inference_steps']} steps")
    return chosen


def read(path, transformer):
    """What lora.add takes of a LoRA file, .safetensors or the original's .pt. ValueError where it does not fit the
    transformer, which may be without weights."""
    path = Path(path)
    if path.suffix == ".pt":
        return [read_legacy(path, transformer)]
    lora.check(path, transformer)
    return lora.read(path)


def load(pipe, path, name):
    """Load a LoRA file into the transformer as `name`, in place of the one that has this name. ValueError where it does
    not fit the model."""
    content = read(path, pipe.transformer)
    if name in getattr(pipe.transformer, "peft_config", {}):
        pipe.transformer.delete_adapters(name)
    lora.add(pipe, name, *content)


def read_legacy(path, transformer):
    """A slider of the original or of Concept Sliders, {diffusers' key: tensor}, alpha folded into lora_B.

    Such a file is a pickled dict of lora_unet_<module path with _ for .>.lora_down.weight, .lora_up.weight, .alpha; it
    is read as weights only, so that nothing in it runs. ValueError naming what does not belong to `transformer`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such LoRA file") from error
    except Exception as error:  # pickle's own errors are of many kinds
        raise ValueError(f"{path} is not a plain dict of weights ({str(error).partition(chr(10))[0]}); nothing else "
                         "is read from a .pt file") from error
    modules = {name.replace(".", "_"): (name, (layer.out_features, layer.in_features))
               for name, layer in lora.linear_layers(transformer).items()}
    parts = {}
    for key, value in (content.items() if isinstance(content, dict) else ()):
        match = LEGACY_KEY.fullmatch(str(key))
        if not match or match[1] not in modules or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: {key} does not belong to this transformer; was it trained for another model?")
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity; the training that wrote it had diverged")
        parts.setdefault(match[1], {})[match[2]] = value.float()
    if not parts:
        raise ValueError(f"{path} holds no LoRA weights")
    tensors = {}
    for key, part in parts.items():
        name, (rows, columns) = modules[key]
        if not {"lora_down.weight", "lora_up.weight"} <= part.keys():
            raise ValueError(f"{path}: {name} has {min(part)} without its partner; the file is incomplete")
        down, up = part["lora_down.weight"], part["lora_up.weight"]
        rank = down.shape[0]
        if down.shape != (rank, columns) or up.shape != (rows, rank):
            raise ValueError(f"{path}: {name} has shapes {tuple(down.shape)} and {tuple(up.shape)}, the model's layer "
                             f"is {rows} x {columns}; was it trained for another model?")
        tensors[f"transformer.{name}.lora_A.weight"] = down
        tensors[f"transformer.{name}.lora_B.weight"] = up * (part.get("alpha", torch.tensor(float(rank))) / rank)
    return tensors

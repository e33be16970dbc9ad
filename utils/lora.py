"""LoRA on the transformer, and on CLIP: attach, check, save, load. The file is diffusers' own format, so stock
`FluxKontextPipeline.load_lora_weights` reads it; the settings that sampling needs ride in its header."""

import contextlib
import json
import math
import os
import re
import tempfile
import types
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

LORA_FILE = "pytorch_lora_weights.safetensors"
SETTINGS_KEY = "kontext_restoration_settings"  # a key of our own: inside diffusers' own it would break stock loading
LORA_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector", "alpha")
CLIP_LAYER = re.compile(r"text_encoder\.(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
DEFAULT_LAYERS = [
    "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0",
    "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
]  # fmt: skip  # the official Kontext script's default
CLIP_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # likewise


def add_lora_args(parser, default_layers="attention and feed-forward, as in the official Kontext script. x_embedder "
                  "and proj_out are allowed"):
    """default_layers: what the help says of --lora_layers."""
    group = parser.add_argument_group("LoRA")
    group.add_argument("--rank", type=int, default=16, help="LoRA rank")
    group.add_argument("--lora_alpha", type=float, help="LoRA scale is alpha / rank; default: the rank, so scale 1")
    group.add_argument("--lora_dropout", type=float, default=0.0, help="dropout in front of the LoRA, 0 to below 1")
    group.add_argument("--lora_layers", help="comma list of module names that get a LoRA; default: "
                       f"{default_layers}")
    group.add_argument("--use_dora", action="store_true", help="DoRA: learn magnitude and direction apart")
    group.add_argument("--use_rslora", action="store_true", help="rank-stabilised scale alpha / sqrt(rank)")
    group.add_argument("--use_ema", action="store_true", help="keep an exponential moving average; it is what is "
                       "validated and saved as the final LoRA")
    group.add_argument("--ema_decay", type=float, default=0.999, help="decay of the moving average per step")


def check_lora_args(args):
    """Refuse impossible LoRA numbers before anything loads. ValueError names the flag."""
    if args.rank < 1:
        raise ValueError(f"--rank {args.rank}: give 1 or more")
    if args.lora_layers is not None and not args.lora_layers.strip(", "):
        raise ValueError(f"--lora_layers {args.lora_layers}: name a layer, or leave it out")
    if args.lora_alpha is not None and not 0 < args.lora_alpha < math.inf:
        raise ValueError(f"--lora_alpha {args.lora_alpha}: give more than 0, or leave it out for alpha = rank")
    if not 0 <= args.lora_dropout < 1:
        raise ValueError(f"--lora_dropout {args.lora_dropout}: give 0 or more, below 1")
    if not 0 < args.ema_decay < 1:
        raise ValueError(f"--ema_decay {args.ema_decay}: give more than 0 and less than 1")


def check_layers(model, layers):
    """`layers`, a list of module names or comma text, as a list; None stays. ValueError when one matches nothing in
    `model`, which may be on the meta device."""
    layers = [name.strip() for name in layers.split(",") if name.strip()] if isinstance(layers, str) else layers
    names = linear_layers(model)
    for layer in layers or []:
        if not any(name == layer or name.endswith("." + layer) for name in names):
            raise ValueError(f"--lora_layers {layer}: the model has no such linear layer; it has, for example, "
                             f"{', '.join(sorted({n.split('.', 2)[-1] for n in names})[:8])}")
    return layers


def attach(model, rank, alpha=None, dropout=0.0, layers=None, use_dora=False, use_rslora=False, seed=0,
           adapter="default"):
    """Add a fresh LoRA of the name `adapter` with fp32 masters to a transformer or CLIP; returns its parameters, in a
    fixed order.

    layers: list of module names or comma text; ValueError when one matches nothing. The LoRA starts as no change
    (A normal, B zero), and its A is drawn from `seed` whatever was drawn before."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    layers = check_layers(model, layers)
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, lora_dropout=dropout, init_lora_weights="gaussian",
                        target_modules=layers or DEFAULT_LAYERS, use_dora=use_dora, use_rslora=use_rslora)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # another LoRA, as is meant
        torch.manual_seed(seed)
        model.add_adapter(config, adapter_name=adapter)
    cast_training_params(model, torch.float32)
    compute_in_input_dtype(model)
    return [parameter for name, parameter in model.named_parameters() if f".{adapter}." in name]


def linear_layers(model):
    """{name: linear layer} of a model, by the names that it has without the LoRAs that may be attached."""
    return {name.removesuffix(".base_layer"): module for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and ".lora_" not in name}


def compute_in_input_dtype(model):
    """Let fp32 LoRA masters compute in the dtype of what they are given (bf16 beside a bf16 model). peft would cast
    every activation to fp32 instead, and autocast around the model would cast it back: 724 casts in a step of FLUX.
    DoRA keeps peft's way, whose norms need fp32."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and not module.lora_variant:
            module.cast_input_dtype_enabled = False
            for part in (*module.lora_A.values(), *module.lora_B.values()):
                part.forward = types.MethodType(linear_in_input_dtype, part)


def linear_in_input_dtype(linear, x):
    return F.linear(x, linear.weight.to(x.dtype))


def parameters(model):
    """The LoRA's parameters in module order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def state_dict(model, adapter="default"):
    """The LoRA's tensors by peft's names, detached."""
    from peft.utils import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, adapter_name=adapter)
    return {name: value.detach() for name, value in tensors.items()}


def load_state_dict(model, tensors, adapter="default"):
    """Put `tensors` (from state_dict) into the attached LoRA, every one of them."""
    from peft.utils import set_peft_model_state_dict

    if differing := sorted(tensors.keys() ^ state_dict(model, adapter).keys()):  # peft passes over missing ones
        raise ValueError(f"LoRA weights do not fit this model: {differing[0]} is on one side only")
    set_peft_model_state_dict(model, tensors, adapter)


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


def save(transformer, folder, settings, text_encoder=None, adapter="default", name=LORA_FILE):
    """Write folder/pytorch_lora_weights.safetensors, or another `name`, in one rename; returns its path.

    diffusers' writer makes the tensors and its own header (with rank and alpha); `settings`, a JSON-safe dict, is
    added under SETTINGS_KEY. text_encoder: CLIP, where it has a LoRA too."""
    from diffusers import FluxKontextPipeline

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lora-") as scratch:
        models = {"transformer": transformer} | ({"text_encoder": text_encoder} if text_encoder else {})
        metadata = {f"{part}_lora_adapter_metadata": model.peft_config[adapter].to_dict()
                    for part, model in models.items()}
        for config in metadata.values():
            # Sets have no order: sort, or equal runs write unequal files. Dropout is training's: stock diffusers would
            # go on dropping in inference, as it leaves the layers that it adds in training mode.
            config.update({key: sorted(value) for key, value in config.items() if isinstance(value, set)})
            config.update({key: 0.0 for key in config if key.endswith("lora_dropout")})
        layers = {f"{part}_lora_layers": state_dict(model, adapter) for part, model in models.items()}
        FluxKontextPipeline.save_lora_weights(scratch, **layers, **metadata)
        written = Path(scratch) / LORA_FILE
        with safe_open(written, "pt") as file:
            header = file.metadata() | {SETTINGS_KEY: json.dumps(settings, sort_keys=True)}
        write_file(folder / name, load_file(written), header)
    return folder / name


def write_file(path, tensors, header):
    """Write a safetensors file in one rename, its header in order; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".lora-") as scratch:
        complete = Path(scratch) / path.name
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, complete, metadata=header)
        sort_header(complete)
        os.replace(complete, path)


def sort_header(path):
    """Rewrite a safetensors file with its metadata in order: the library writes it in hash order, so that equal runs
    would write unequal files."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    path.unlink()  # written by safetensors for its owner alone; a new file gets the usual permissions
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


def faults(path, transformer):
    """Every fault of a LoRA file for `transformer`, one line each that names the file: foreign keys, half a pair, wrong
    shapes, non-finite numbers, alpha in both encodings. diffusers would load them in silence.

    CLIP layers (text_encoder.) are judged by name and rank alone, as the text encoder is not at hand. ValueError where
    the file cannot be read at all: missing, a pickle, cut off."""
    path = find_file(path)
    read_settings(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        alpha_in_header = "lora_adapter_metadata" in (file.metadata() or {})
    if any(key.startswith("lora_unet_") for key in tensors):
        yield f"{path} has kohya's keys; run python -m scripts.lora_tool convert FILE --to diffusers --output OUT first"
        return
    yield from tensor_faults(path, tensors, transformer, alpha_in_header)


def tensor_faults(path, tensors, transformer, alpha_in_header=False):
    """Every fault of a LoRA's tensors, by diffusers' names, for `transformer`, whose weights may be quantised; one line
    each that names `path`. alpha_in_header: alpha is known from elsewhere, and must not be among the tensors."""
    shapes = {f"transformer.{name}": (layer.out_features, layer.in_features)
              for name, layer in linear_layers(transformer).items()}
    pairs = {}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            yield f"{path}: {key} holds NaN or infinity; the training that wrote it had diverged"
        module, _, part = key.removesuffix(".weight").rpartition(".")
        if (module not in shapes and not CLIP_LAYER.fullmatch(module)) or part not in LORA_PARTS:
            yield f"{path}: {key} does not belong to this transformer; was it trained for another model?"
        elif part != "alpha":
            pairs.setdefault(module, {})[part] = tuple(tensor.shape)
        elif alpha_in_header:
            yield f"{path} states alpha twice, in its header and in {key}; export it again"
    if not any(module in shapes for module in pairs):
        yield f"{path} holds no LoRA weights for a transformer"
    for module, pair in pairs.items():
        if not {"lora_A", "lora_B"} <= pair.keys():
            yield f"{path}: {module} has {min(pair)} without its partner; the file is incomplete"
            continue
        rows, columns = shapes.get(module, ((*pair["lora_B"], 0)[0], (0, *pair["lora_A"])[-1]))
        rank = pair["lora_A"][:1]
        if (pair["lora_A"], pair["lora_B"]) != ((*rank, columns), (rows, *rank)):
            yield (f"{path}: {module} has shapes {pair['lora_A']} and {pair['lora_B']}, the model's layer is "
                   f"{rows} x {columns}; was it trained for another model?")


def check(path, transformer):
    """Refuse a LoRA file that does not fit `transformer`: ValueError with the first of its faults."""
    for fault in faults(path, transformer):
        raise ValueError(fault)


def read(path):
    """(tensors, alphas or None, adapter metadata or None) of a LoRA file, in diffusers' layout whatever its own."""
    from diffusers import FluxKontextPipeline

    path = find_file(path)
    return FluxKontextPipeline.lora_state_dict(str(path.parent), weight_name=path.name, use_safetensors=True,
                                               return_alphas=True, return_lora_metadata=True)


def load(pipe, path, weight=1.0):
    """Load the transformer's part of a checked LoRA file into a pipeline under the name "restoration", at `weight`."""
    check(path, pipe.transformer)
    add(pipe, "restoration", *read(path))
    pipe.set_adapters("restoration", weight)


def add(pipe, adapter, tensors, alphas=None, metadata=None):
    """Put a LoRA, as `read` gives it, into a pipeline's transformer under the name `adapter`, beside those it has."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # another LoRA, as is meant
        pipe.load_lora_into_transformer(tensors, alphas, pipe.transformer, adapter_name=adapter, metadata=metadata,
                                        _pipeline=pipe)
    compute_in_input_dtype(pipe.transformer)  # the numerics of training
    pipe.transformer.eval()  # a foreign file may bring dropout, in training mode


def merge(model):
    """Add the effect of the model's LoRAs to its weights, W + scale B A at the loaded strength (DoRA in peft's own
    way), and take the LoRAs out: no launch of theirs is left. In fp32, rounded once to the model's dtype."""
    from peft.tuners.lora import LoraLayer

    for module in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        dtype = module.get_base_layer().weight.dtype
        module.float().merge()
        module.to(dtype)
    model.unload_lora()


def has_text_part(path):
    """True if the LoRA file holds a part for CLIP."""
    return any(key.startswith("text_encoder.") for key in read(path)[0])


def load_into_text_encoder(text_encoder, path, weight=1.0):
    """Load CLIP's part of a LoRA file into it, at `weight`; most files have none, and nothing happens then."""
    from diffusers import FluxKontextPipeline

    tensors, alphas, metadata = read(path)
    if any(key.startswith("text_encoder.") for key in tensors):
        FluxKontextPipeline.load_lora_into_text_encoder(
            tensors, alphas, text_encoder, prefix="text_encoder", lora_scale=weight, adapter_name="restoration",
            metadata=metadata)

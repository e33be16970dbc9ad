"""Weights of a loaded component in fewer bits, and what was converted.

torchao: int8 and fp8 (E4M3) with a scale a row, int4 with a scale and an offset for each 128 weights. bitsandbytes: NF4
with its scales in 8 bits. optimum-quanto: int8, fp8 and int4; diffusers deprecates its own way to it, so it is called
directly. Only linear layers are converted; norms, embeddings and biases stay."""

import importlib.metadata
import re
from dataclasses import dataclass

import torch

from utils import quantise
from utils.offload import storages

BACKENDS = {"torchao": ("int8", "fp8", "int4"), "bnb": ("nf4",), "quanto": ("int8", "fp8", "int4")}  # in auto's order
PACKAGES = {"torchao": "torchao", "bnb": "bitsandbytes", "quanto": "optimum-quanto"}
KINDS = ("none", "int8", "fp8", "int4", "nf4")
GROUP_SIZES = (128, 64, 32)  # of int4: the first that divides the layer's inputs
MULTIPLES = {"int4": 32, "nf4": 64}  # of its inputs that a layer needs; others stay as they are
# x_embedder, context_embedder, time_text_embed, norm_out and the last proj_out stay as they are.
LAYERS = {"transformer": quantise.BLOCK_WEIGHTS.removeprefix("re:"), "text_encoder": ".*", "text_encoder_2": ".*"}


def choose_backend(kind, wanted="auto"):
    """The backend of a kind of weights; "auto": the first of BACKENDS that is installed. ValueError names the package
    to install."""
    able = [name for name, kinds in BACKENDS.items() if kind in kinds]
    if wanted != "auto" and wanted not in able:
        raise ValueError(f"--quant_backend {wanted} has no {kind}; use {' or '.join(able)}, or auto")
    candidates = able if wanted == "auto" else [wanted]
    for name in candidates:
        if is_installed(PACKAGES[name]):
            return name
    raise ValueError(f"{kind} weights need a package that is not there: pip install {PACKAGES[candidates[0]]}")


def is_installed(package):
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@dataclass
class Conversion:
    """What was converted. layers: names. linear_layers: how many the component has. Bytes: of the converted weights,
    scales included, and of the whole component afterwards."""

    component: str
    kind: str
    backend: str | None
    layers: list[str]
    linear_layers: int
    bytes_before: int
    bytes_after: int
    component_bytes: int

    def in_words(self):
        whole = f"{self.component_bytes / 1e6:.2f} MB in all"
        if self.backend is None:
            return f"{self.component}: not quantised, {whole}"
        return (f"{self.component}: {self.kind} by {self.backend}, {len(self.layers)} of {self.linear_layers} linear "
                f"layers, {self.bytes_before / 1e6:.2f} -> {self.bytes_after / 1e6:.2f} MB; {whole}")

    def record(self):
        return {"kind": self.kind, "backend": self.backend, "layers": len(self.layers),
                "linear_layers": self.linear_layers, "bytes_before": self.bytes_before,
                "bytes_after": self.bytes_after, "component_bytes": self.component_bytes}


def convert(model, component, kind, device, backend="auto"):
    """Quantise the linear layers of `model` in place, each on `device`, so that the model itself may wait on the CPU;
    returns the Conversion. component: of LAYERS. kind: of KINDS. ValueError as in choose_backend, and where no layer
    can be converted."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    chosen = {name: module for name, module in linear.items() if kind != "none" and re.fullmatch(
        LAYERS[component], name) and module.in_features % MULTIPLES.get(kind, 1) == 0}
    before = sum(module.weight.nbytes for module in chosen.values())
    backend = None if kind == "none" else choose_backend(kind, backend)
    if backend and not chosen:
        raise ValueError(f"{component}: it has no layer that {kind} fits; leave it at none")
    if backend == "quanto":
        from optimum import quanto

        weights = {"int8": quanto.qint8, "fp8": quanto.qfloat8, "int4": quanto.qint4}[kind]
        quanto.quantize(model, weights=weights, include=list(chosen))
        quanto.freeze(model)
    for name, module in chosen.items():
        if backend == "torchao":
            from torchao.quantization import quantize_

            quantize_(module, torchao_config(kind, module.in_features, module.weight.dtype, device), device=device)
        elif backend == "bnb":
            model.set_submodule(name, nf4_linear(module, device))
    after = sum(weight_bytes(model.get_submodule(name).weight) for name in chosen)
    total = sum(weight_bytes(parameter) for parameter in model.parameters())
    return Conversion(component, kind, backend, list(chosen), len(linear), before, after, total)


def torchao_config(kind, in_features, dtype, device):
    """torchao's configuration of the weights of one linear layer. ValueError for int4 on a GPU in another dtype than
    bf16."""
    if kind != "int4":
        return quantise.weight_config(kind)
    group_size = next(size for size in GROUP_SIZES if in_features % size == 0)
    if torch.device(device).type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size, set_inductor_config=False)
    from torchao.quantization import Int4WeightOnlyConfig

    if dtype != torch.bfloat16:
        raise ValueError("int4 weights on a GPU compute in bf16; give --dtype bf16, or nf4 or int8 weights")
    # PLAIN, the default, needs one more package; this layout's kernel is PyTorch's own
    return Int4WeightOnlyConfig(group_size, set_inductor_config=False, int4_packing_format="tile_packed_to_4d")


def nf4_linear(module, device):
    """The linear layer with its weights in NF4, on `device`."""
    import bitsandbytes as bnb

    dtype = module.weight.dtype
    # The codes are stored as if they were of `dtype`: T5 casts activations to the dtype that its weights show.
    layer = bnb.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None, compute_dtype=dtype,
                              quant_type="nf4", quant_storage=dtype, device="meta")
    layer.weight = bnb.nn.Params4bit(module.weight.data, quant_type="nf4", compress_statistics=True,
                                     quant_storage=dtype)
    layer.bias = module.bias
    return layer.to(device).eval()


def weight_bytes(weight):
    """Bytes of a parameter, quantised or not, with its scales."""
    if state := getattr(weight, "quant_state", None):  # bitsandbytes
        return weight.nbytes + sum(part.nbytes for part in state.as_dict(packed=True).values())
    return sum(part.nbytes for part in storages(weight))


@torch.no_grad()
def effective_weight(layer):
    """(outputs, inputs) in fp32: the weight that a linear layer acts with, whatever it is stored in."""
    device = layer.weight.device
    identity = torch.eye(layer.in_features, device=device, dtype=layer.bias.dtype if layer.bias is not None else
                         layer.weight.dtype)
    outputs = layer(identity).float()
    return (outputs if layer.bias is None else outputs - layer.bias.float()).T

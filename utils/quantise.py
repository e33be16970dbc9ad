"""The frozen transformer's weights in fewer bits: int8 and fp8 by torchao, 4 and 8 bit by bitsandbytes. The LoRA's own
weights stay fp32, and its file does not depend on any of this."""

import functools
import re

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

BASE_PRECISIONS = ["bf16", "int8", "fp8", "nf4"]
# Double quantisation (Dettmers et al. 2023, QLoRA): the scales in 8 bit, 4.13 instead of 4.5 bits a weight.
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# The blocks hold 99.5 % of FLUX's weights; what comes before and after them stays as it is.
BLOCK_WEIGHTS = r"re:(single_)?transformer_blocks\..*"


def add_quantisation_args(parser):
    group = parser.add_argument_group("base weights")
    group.add_argument("--base_precision", choices=BASE_PRECISIONS,
                       help="weights of the frozen transformer; default: what --memory chooses, where there is no "
                       "such option bf16. bf16 as they are (fp32 on a CPU), 8 bit with one scale a row (int8, or fp8 "
                       "E4M3), or 4 bit (nf4, needs a CUDA GPU); computing stays in bf16")
    group.add_argument("--bnb_quantization_config_path", help="JSON file with bitsandbytes options: the frozen "
                       "transformer is quantised by them; needs a CUDA GPU")


def check_quantisation_args(args):
    """Refuse what this machine cannot do, and set args.bnb_options to bitsandbytes' options or None. ValueError names
    the flag."""
    from utils.flux import read_bnb_config

    args.bnb_options = None
    if args.bnb_quantization_config_path:
        args.bnb_options = read_bnb_config(args.bnb_quantization_config_path)
        if args.base_precision:
            raise ValueError(f"--base_precision {args.base_precision} and --bnb_quantization_config_path both quantise "
                             "the transformer; leave one out")
    if args.base_precision == "nf4":
        args.bnb_options = NF4
    if args.bnb_options and not torch.cuda.is_available():
        flag = "--base_precision nf4" if args.base_precision == "nf4" else "--bnb_quantization_config_path"
        raise ValueError(f"{flag}: bitsandbytes quantises on a CUDA GPU only; leave it out, or give "
                         "--base_precision int8")


def pipeline_config(base_precision, bnb_options, dtype):
    """What a pipeline's from_pretrained needs to quantise the transformer while it loads, or None for bf16.
    dtype: in which it computes. bnb_options: see check_quantisation_args; they go before base_precision."""
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

    if bnb_options:
        compute = {"bnb_4bit_compute_dtype": dtype} if bnb_options.get("load_in_4bit") else {}
        config = BitsAndBytesConfig(**(compute | bnb_options))
    elif base_precision in ("int8", "fp8"):
        from torchao.quantization import FqnToConfig

        config = TorchAoConfig(FqnToConfig({BLOCK_WEIGHTS: weight_config(base_precision)}))
    else:
        return None
    return PipelineQuantizationConfig(quant_mapping={"transformer": config})


def weight_config(base_precision):
    """torchao's configuration of one linear layer's weights, "int8" or "fp8"."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kind = Int8WeightOnlyConfig if base_precision == "int8" else Float8WeightOnlyConfig
    return kind(set_inductor_config=False)


def quantise_blocks(transformer, base_precision):
    """Quantise the blocks' linear layers of a loaded transformer in place, for inference; "int8" or "fp8"."""
    from torchao.quantization import quantize_

    quantize_(transformer, weight_config(base_precision), filter_fn=lambda module, name: isinstance(
        module, torch.nn.Linear) and re.fullmatch(BLOCK_WEIGHTS.removeprefix("re:"), name) is not None)
    keep_packed(transformer)


def keep_packed(model):
    """Make the linear layers that torchao has quantised save their packed weights for backward. On its own, autograd
    saves the unpacked copies, and a step without checkpointing holds all weights in bf16 after all."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and is_traceable_wrapper_subclass(module.weight):
            module.forward = functools.partial(packed_linear, module)


def packed_linear(module, x):
    weight = module.weight
    return PackedLinear.apply(x.to(weight.dtype), weight.qdata, weight.scale, module.bias)


class PackedLinear(torch.autograd.Function):
    """y = x (s q)^T + b with frozen 8-bit codes q (rows, columns) and scales s (rows, 1), which backward unpacks again:
    dx = dy (s q)."""

    @staticmethod
    def forward(ctx, x, codes, scale, bias):
        ctx.save_for_backward(codes, scale)
        y = torch.nn.functional.linear(x, codes.to(x.dtype)) * scale.to(x.dtype).flatten()
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, gradient):
        codes, scale = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype).flatten()) @ codes.to(gradient.dtype), None, None, None

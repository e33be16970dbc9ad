"""LoRA files of FLUX.1 in other tools' layouts, and arithmetic on what they do to the weights.

A LoRA in memory is {module: (A, B, scale)} with A (rank, columns), B (rows, rank), fp32, and the effect scale * B A.
Modules have diffusers' names, with "transformer." or "text_encoder." in front. Three layouts of a file:

- diffusers: peft's keys, rank and alpha in the header.
- comfyui: peft's keys, one `.alpha` tensor a module, no such header. Stock diffusers reads it too.
- kohya: the original FLUX names with q, k, v (and proj_mlp) fused into one layer, `.alpha` tensors."""

import json
import math
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from utils import flux, lora, restore
from utils.parse import write_json
from utils.validation import default_steps

LAYOUTS = ("diffusers", "comfyui", "kohya")
HEADER = "lora_adapter_metadata"  # diffusers' own key
# What LoRAs must share to be averaged: the path that they were trained on.
FLOW_SETTINGS = ("start_noise", "bridge_noise", "train_sigmas", "timestep_shift", "reference_tokens", "vae_encode_mode")


def kohya_layers():
    """{kohya's name: the modules that it fuses, in the order of their rows} of FLUX.1. norm_out.linear is not there:
    its rows are in another order in the original."""
    streams = {"img": ("to_q", "to_k", "to_v", "to_out.0", "ff", "norm1"),
               "txt": ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context", "norm1_context")}
    layers = {}
    for i in range(19):
        for stream, (*qkv, out, mlp, norm) in streams.items():
            name, block = f"lora_unet_double_blocks_{i}_{stream}", f"transformer.transformer_blocks.{i}"
            layers[f"{name}_attn_qkv"] = [f"{block}.attn.{part}" for part in qkv]
            layers[f"{name}_attn_proj"] = [f"{block}.attn.{out}"]
            layers[f"{name}_mlp_0"] = [f"{block}.{mlp}.net.0.proj"]
            layers[f"{name}_mlp_2"] = [f"{block}.{mlp}.net.2"]
            layers[f"{name}_mod_lin"] = [f"{block}.{norm}.linear"]
    for i in range(38):
        name, block = f"lora_unet_single_blocks_{i}", f"transformer.single_transformer_blocks.{i}"
        layers[f"{name}_linear1"] = [f"{block}.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        layers[f"{name}_linear2"] = [f"{block}.proj_out"]
        layers[f"{name}_modulation_lin"] = [f"{block}.norm.linear"]
    ends = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer_linear": "proj_out"}
    for theirs, ours in ends.items():
        layers[f"lora_unet_{theirs}"] = [f"transformer.{ours}"]
    for theirs, ours in {"time_in": "timestep", "vector_in": "text", "guidance_in": "guidance"}.items():
        for j, end in enumerate(("in_layer", "out_layer"), 1):
            layers[f"lora_unet_{theirs}_{end}"] = [f"transformer.time_text_embed.{ours}_embedder.linear_{j}"]
    projections = [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
    for i in range(12):
        for part in (*projections, "mlp.fc1", "mlp.fc2"):
            name = f"text_model_encoder_layers_{i}_{part.replace('.', '_')}"
            layers[f"lora_te1_{name}"] = layers[f"lora_te_{name}"] = [f"text_encoder.encoder.layers.{i}.{part}"]
    return layers


KOHYA = kohya_layers()
KOHYA_NAMES = {module: name for name, modules in reversed(KOHYA.items()) for module in modules}  # lora_te1, not lora_te
COMFYUI = {*KOHYA_NAMES, "transformer.norm_out.linear"}  # the layers that ComfyUI's loader knows


def weightless_transformer(model=None, **where):
    """The transformer of the folder or hub id `model`, or of FLUX.1-dev, without weights (on the meta device). where:
    flux.source."""
    from diffusers import FluxTransformer2DModel

    config = {"guidance_embeds": True}
    if model:
        flux.check_model(model)
        with flux.fetching(model):
            config = FluxTransformer2DModel.load_config(model, subfolder="transformer",
                                                            **where | {"variant": None})  # which no config has
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(config)


def read_parts(path):
    """(layout, {module: {"lora_A": ..., "lora_B": ..., "alpha": ...}}, configs) as the file has them: modules by the
    names of its layout, tensors in its dtype, configs {"transformer": peft's config} from its header."""
    path = lora.find_file(path)
    lora.read_settings(path)  # names a broken file
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(HEADER)
    configs = {}
    for key, value in json.loads(text or "{}").items():
        model, _, name = key.partition(".")
        configs.setdefault(model, {})[name] = value
    modules = {}
    for key, tensor in load_file(path).items():
        module, _, part = key.removesuffix(".weight").rpartition(".")
        part = {"lora_down": "lora_A", "lora_up": "lora_B"}.get(part, part)
        module = module.replace("text_encoder.text_model.", "text_encoder.", 1)
        modules.setdefault(module, {})[part] = tensor
    kohya = any(module.startswith(("lora_unet_", "lora_te")) for module in modules)
    alphas = any("alpha" in parts for parts in modules.values())
    return "kohya" if kohya else "comfyui" if alphas else "diffusers", modules, configs


def scale_of(module, parts, configs):
    """What the file multiplies B A with: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA."""
    from peft.utils.other import get_pattern_key

    rank = len(parts["lora_A"])
    if "alpha" in parts:
        return parts["alpha"].item() / rank
    model, _, name = module.partition(".")
    config = configs.get(model, {})
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, name), config.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read(path):
    """The LoRA {module: (A, B, scale)} of a file in any of the layouts. ValueError with the cure."""
    path = lora.find_file(path)
    layout, modules, configs = read_parts(path)
    pairs = {}
    for module, parts in modules.items():
        if "lora_magnitude_vector" in parts or "dora_scale" in parts:
            raise ValueError(f"{path} is a DoRA, whose effect depends on the base model, so it is a LoRA for no other "
                             "tool; use `merge` to make a whole model of it")
        shapes = [tuple(parts[part].shape) for part in ("lora_A", "lora_B") if part in parts]
        if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
            raise ValueError(f"{path}: {module} is no complete pair of lora_A and lora_B; see `check`")
        if not all(torch.isfinite(tensor).all() for tensor in parts.values()):
            raise ValueError(f"{path}: {module} holds NaN or infinity; the training that wrote it had diverged")
        if module not in KOHYA if layout == "kohya" else not module.startswith(("transformer.", "text_encoder.")):
            raise ValueError(f"{path}: {module} is no layer of FLUX.1 in the names of {layout}; see `check`")
        if layout == "kohya" and shapes[1][0] % sum(map(height, KOHYA[module])):
            raise ValueError(f"{path}: {module} has {shapes[1][0]} rows, which FLUX.1's layers in it cannot share; was "
                             "it trained for another model?")
        pair = parts["lora_A"].float(), parts["lora_B"].float(), scale_of(module, parts, configs)
        pairs.update(unfuse(KOHYA[module], *pair) if layout == "kohya" else {module: pair})
    if not pairs:
        raise ValueError(f"{path} holds no LoRA weights")
    return pairs


def height(module):
    """Rows of a layer, in units of those of the first layer that it is fused with."""
    return 4 if module.endswith("proj_mlp") else 1


def unfuse(modules, a, b, scale):
    """The LoRAs of `modules`, whose rows are stacked in B; each keeps the ranks that reach its rows."""
    unit = len(b) // sum(map(height, modules))
    pairs = {}
    for module, rows in zip(modules, b.split([unit * height(module) for module in modules]), strict=True):
        used = rows.any(0)
        if used.any():
            pairs[module] = (a[used], rows[:, used].contiguous(), scale)
    return pairs


def fuse(pairs):
    """{kohya's name: (A, B, scale)}: block-diagonal, as its converters and diffusers' expect. `pairs` is uniform."""
    fused = {}
    for name in dict.fromkeys(KOHYA_NAMES[module] for module in pairs):
        modules = KOHYA[name]
        present = next(module for module in modules if module in pairs)
        a, b, scale = pairs[present]
        unit = len(b) // height(present)
        parts = [pairs.get(module) or (torch.zeros_like(a), b.new_zeros(unit * height(module), len(a)), scale)
                 for module in modules]
        fused[name] = (torch.cat([part[0] for part in parts]), torch.block_diag(*(part[1] for part in parts)), scale)
    return fused


def uniform(pairs):
    """The same effects at one rank and one scale, which no reader can mistake: zeros fill up, and where the scales
    differ they go into B."""
    rank = max(len(a) for a, _, _ in pairs.values())
    scales = {scale for _, _, scale in pairs.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    return {module: (F.pad(a, (0, 0, 0, rank - len(a))), F.pad(b * (own / scale), (0, rank - len(a))), scale)
            for module, (a, b, own) in pairs.items()}


def write(path, pairs, layout, settings=None):
    """Write a LoRA to `path` in one rename, fp32; `settings` go under our header key. ValueError names the layers that
    the layout's readers would drop."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"--output {path}: name a .safetensors file")
    if layout != "diffusers" and (unknown := sorted(pairs.keys() - COMFYUI)):
        raise ValueError(f"ComfyUI has no name for {', '.join(unknown)}; use --to diffusers")
    edges = sorted(module for module in pairs if "blocks." not in module and module.startswith("transformer."))
    if layout == "kohya" and edges:
        raise ValueError(f"stock diffusers drops {', '.join(edges)} from kohya's keys; use --to comfyui, which ComfyUI "
                         "and diffusers both read")
    tensors, config = {}, {}
    for model in ("transformer", "text_encoder"):
        part = {module: pair for module, pair in sorted(pairs.items()) if module.startswith(f"{model}.")}
        if not part:
            continue
        part = uniform(part)
        a, _, scale = next(iter(part.values()))
        config |= {f"{model}.r": len(a), f"{model}.lora_alpha": scale * len(a),
                   f"{model}.target_modules": [module.removeprefix(f"{model}.") for module in part]}
        for module, (a, b, scale) in (fuse(part) if layout == "kohya" else part).items():
            if layout == "comfyui":  # older names of the CLIP layers, which diffusers takes too
                module = module.replace("text_encoder.", "text_encoder.text_model.", 1)
            down, up = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
            tensors |= {f"{module}.{down}.weight": a, f"{module}.{up}.weight": b}
            if layout != "diffusers":
                tensors[f"{module}.alpha"] = torch.tensor(scale * len(a))
    header = {"format": "pt"}
    if layout == "diffusers":
        header[HEADER] = json.dumps(config, indent=2, sort_keys=True)
    if settings:
        header[lora.SETTINGS_KEY] = json.dumps(settings, sort_keys=True)
    lora.write_file(path, tensors, header)


def describe(path):
    """Lines that say what a LoRA file holds; any layout, DoRA too."""
    path = lora.find_file(path)
    layout, modules, configs = read_parts(path)
    pairs = {module: parts for module, parts in modules.items() if {"lora_A", "lora_B"} <= parts.keys()}
    kinds = Counter(re.sub(r"(blocks|layers)([._])\d+", r"\1\2*", module) for module in pairs)
    tensors = [tensor for parts in modules.values() for tensor in parts.values()]
    text = sum(module.startswith(("text_encoder", "lora_te")) for module in pairs)
    scales = sorted({round(scale_of(module, parts, configs), 6) for module, parts in pairs.items()})
    alphas = {model: config.get("lora_alpha") for model, config in configs.items()}
    tensor_alphas = sorted({parts["alpha"].item() for parts in modules.values() if "alpha" in parts})
    dora = any("lora_magnitude_vector" in parts or "dora_scale" in parts for parts in modules.values())
    settings = lora.read_settings(path)
    yield f"{path}: {path.stat().st_size:,} bytes, {layout} layout{', DoRA' if dora else ''}"
    yield f"{len(pairs)} layers, {text} of them in the text encoder"
    yield from (f"  {count:3d} x {kind}" for kind, count in sorted(kinds.items()))
    yield f"rank: {', '.join(map(str, sorted({len(parts['lora_A']) for parts in pairs.values()})))}"
    yield f"alpha: header {alphas or 'none'}, tensors {tensor_alphas or 'none'}; scale {', '.join(map(str, scales))}"
    yield (f"{sum(tensor.numel() for tensor in tensors):,} parameters, "
           f"{', '.join(sorted({str(tensor.dtype).removeprefix('torch.') for tensor in tensors}))}")
    yield f"sampling settings: {json.dumps(settings, sort_keys=True) if settings else 'none'}"


def sampling_notes(settings):
    """How to sample such a LoRA in ComfyUI, as text, or None where its ordinary Kontext workflow is right: a LoRA that
    starts at pure noise, or that stores no settings. After ComfyUI's model_sampling.py and nodes_custom_sampler.py."""
    if not settings or (k := restore.choose_start_noise(settings)) == 1:
        return None
    prompt = (f'prompt "{settings["prompt"]}", FluxGuidance {settings["guidance_scale"]:g}, cfg 1, ' + (
        "ReferenceLatent with the degraded image's latent" if settings["reference_tokens"] else
        "no ReferenceLatent (this LoRA was trained without it)"))
    if k == 0:
        return (
            "# Sampling in ComfyUI\n\nThis LoRA starts at the degraded image itself, with no noise, and is told sigma "
            "1 there. ComfyUI's ordinary samplers cannot do that: at sigma 1 they give the image the weight 1 - 1 = 0, "
            "so that with noise disabled they start from zeros. Use test_deg_lora_flux_kontext.py.\n\nBy ComfyUI's "
            "source (not run) a single step is possible: ModelSamplingAuraFlow with shift 1 and sampling "
            "img_to_img_velocity (recent versions), latent_image = VAE-encoded degraded image, ManualSigmas \"1, 0\", "
            f"sampler euler; {prompt}. More steps would be wrong there.\n")
    steps = default_steps(settings)
    side = settings["resolution"] or 1024
    shifted = settings["timestep_shift"] == "resolution"
    _, sigmas = restore.schedule(settings, steps, (side // 16) ** 2, None, k)
    listed = ", ".join(f"{sigma:.6f}" for sigma in sigmas)
    notes = (
        f"# Sampling in ComfyUI\n\nThis LoRA starts at the degraded image with {k:g} of noise, not at pure noise.\n\n"
        f"- latent_image: the VAE-encoded degraded image, not an empty latent\n- {prompt}\n"
        f'- SamplerCustomAdvanced with RandomNoise, sampler euler, ManualSigmas "{listed}"'
        f"{f' (shifted for {side} x {side} px; other sizes need others)' if shifted else ''}\n")
    if shifted or isinstance(settings["train_sigmas"], list):
        return notes
    # KSampler runs the last `steps` of int(steps / denoise): enough of them that it starts where the LoRA was trained.
    lo, hi = settings["start_noise"]
    steps = next(n for n in range(steps, 1000) if lo - 0.01 <= n / int(n / k) <= hi + 0.01)
    return notes + (
        f"- or KSampler, scheduler simple, steps {steps}, denoise {k:g} (starts at sigma {steps / int(steps / k):.4g})"
        ", behind ModelSamplingFlux with max_shift 0 and base_shift 0: e^0 = 1 leaves sigma unshifted\n")


def resize(pairs, rank):
    """(LoRA, kept): the best approximation of every effect at `rank`, and the share of the effects' Frobenius norm
    that it keeps. Eckart-Young by the SVD of a rank x rank core between two QR decompositions, in fp64."""
    if not 1 <= rank < max(len(a) for a, _, _ in pairs.values()):
        raise ValueError(f"--rank {rank}: the LoRA has rank {max(len(a) for a, _, _ in pairs.values())}; give less, at "
                         "least 1")
    resized, kept, total = {}, 0.0, 0.0
    for module, (a, b, scale) in pairs.items():
        q_rows, r_rows = torch.linalg.qr(b.double() * scale)
        q_columns, r_columns = torch.linalg.qr(a.double().T)
        u, s, v = torch.linalg.svd(r_rows @ r_columns.T, full_matrices=False)
        root = s[:rank].sqrt()
        a, b = root[:, None] * v[:rank] @ q_columns.T, q_rows @ u[:, :rank] * root
        resized[module] = (a.float(), b.float(), 1.0)
        kept, total = kept + s[:rank].square().sum().item(), total + s.square().sum().item()
    return resized, math.sqrt(kept / total) if total else 1.0


def average(loras, weights):
    """The LoRA whose effect is the weighted mean of the effects of `loras`; weights are divided by their sum. Exact:
    ranks are laid side by side, for the mean of B A is not the product of the means."""
    averaged = {}
    for module in dict.fromkeys(module for pairs in loras for module in pairs):
        parts = [(pairs[module], weight / sum(weights)) for pairs, weight in zip(loras, weights, strict=True)
                 if module in pairs]
        if len({(a.shape[1], b.shape[0]) for (a, b, _), _ in parts}) > 1:
            raise ValueError(f"{module} has another shape in another file; only LoRAs of one model can be averaged")
        averaged[module] = (torch.cat([a for (a, _, _), _ in parts]),
                            torch.cat([b * (scale * weight) for (_, b, scale), weight in parts], 1), 1.0)
    return averaged


def common_settings(paths):
    """The first file's settings. ValueError where the files were trained on different paths, for which no single way
    of sampling is right."""
    stored = [lora.read_settings(path) for path in paths]
    first, *others = [restore.STOCK_SETTINGS | (settings or {}) for settings in stored]
    for path, settings in zip(paths[1:], others, strict=True):
        for name in FLOW_SETTINGS:
            if settings[name] != first[name]:
                raise ValueError(f"{path} was trained with {name} {settings[name]}, {paths[0]} with {first[name]}; "
                                 "their mean could be sampled with neither")
    return stored[0]


def merge(path, model, folder, weight=1.0, dtype=torch.float32):
    """Write `model` with the LoRA at `path` in its weights to `folder`, a complete pipeline of stock diffusers in
    `dtype`; the sampling settings lie beside it. DoRA too."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {folder} is not empty; name a new folder")
    flux.check_model(model)
    lora.check(path, weightless_transformer(model))  # before 24 GB are read
    folder.parent.mkdir(parents=True, exist_ok=True)
    pipe = flux.load_pipeline(model, dtype, skip=flux.OPTIONAL_PARTS)
    lora.load(pipe, path, weight)
    lora.load_into_text_encoder(pipe.text_encoder, path, weight)
    pipe.fuse_lora(components=["transformer", "text_encoder"])
    pipe.unload_lora_weights()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".merge-") as scratch:
        complete = Path(scratch) / folder.name
        pipe.save_pretrained(complete)
        if settings := lora.read_settings(path):
            write_json(complete / restore.SETTINGS_FILE, settings)
        os.replace(complete, folder)

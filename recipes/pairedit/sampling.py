"""Euler sampling with LoRAs that are active in a part of the steps only: sliders, and edits of a real image."""

import torch

from recipes.pairedit.adapters import activate, read
from recipes.pairedit.objectives import CONTENT, SEMANTIC
from utils import flux
from utils.lora_files import weightless_transformer
from utils.restore import noise_levels


def plan_schedules(args, settings):
    """The noise levels of each of `settings` (adapters.read_settings). Only the VAE and the scheduler are read for it.
    ValueError for a resolution that the model does not have."""
    skip = (*flux.TEXT_PARTS, *flux.OPTIONAL_PARTS, "transformer")
    pipe = flux.load_pipeline(args.pretrained_model_name_or_path, skip=skip, **flux.source(args))
    flux.check_sizes(pipe.vae, [(stored["resolution"], stored["resolution"]) for stored in settings])
    return [noise_levels(pipe.vae, pipe.scheduler, stored["num_inference_steps"], stored["resolution"],
                         stored["resolution"]) for stored in settings]


def load_models(args, files, prompts, max_sequence_length):
    """(pipe, {prompt: TextEmbeds}, device, dtype) for sampling: bf16 on a GPU unless --mixed_precision is no.
    ValueError, before anything is read, where one of the LoRA `files` does not fit the model."""
    device = torch.device(f"cuda:{args.device}" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" and args.mixed_precision != "no" else torch.float32
    path, where = args.pretrained_model_name_or_path, flux.source(args)
    model = weightless_transformer(path, **where)
    for file in dict.fromkeys(files):
        read(file, model)
    encoded = flux.encode_prompts(path, prompts, device, dtype, max_sequence_length, **where)
    bits = {"bnb_options": args.bnb_options, "base_precision": args.base_precision or "bf16"}
    return flux.load_models(path, device, dtype, **bits, **where), encoded, device, dtype


def euler(velocity, z, sigmas, first, last):
    """z at sigmas[last] from z at sigmas[first]; velocity(z, i) at step i."""
    for i in range(first, last):
        z = z + (sigmas[i + 1] - sigmas[i]) * velocity(z, i).float()
    return z


def predict(pipe, z, sigma, text, guidance_scale):
    """The velocity at `sigma`, a number or (B,), as flux.predict_velocity; text of batch 1 serves every item."""
    return flux.predict_velocity(pipe.transformer, z, torch.as_tensor(sigma, dtype=torch.float32).expand(len(z)), [],
                                 text.expand(len(z)), guidance_scale)


@torch.no_grad()
def slide(pipe, start, sigmas, text, guidance_scale, weights, start_index):
    """Latents (len(weights), B, C, h, w) in fp32: every weight of the semantic LoRA from the same start (B, C, h, w).

    The LoRA acts at steps start_index and later; what lies before is sampled once for all weights. Weight 0 is the
    base model."""
    def velocity(z, i):
        return predict(pipe, z, sigmas[i], text, guidance_scale)

    steps = len(sigmas) - 1
    branch = min(start_index, steps)
    activate(pipe.transformer, {})
    shared = euler(velocity, start, sigmas, 0, branch)
    results = []
    for weight in weights:
        activate(pipe.transformer, {SEMANTIC: weight} if weight else {})
        results.append(euler(velocity, shared, sigmas, branch, steps))
    activate(pipe.transformer, {})
    return torch.stack(results)


@torch.no_grad()
def edit(pipe, start, sigmas, text, guidance_scale, weights, start_index, mix, mix_scale, first=0):
    """Latents (len(weights), B, C, h, w) in fp32: edits of the image that the content LoRA holds, from `start` at
    sigmas[first].

    v_c is the content LoRA's velocity. From start_index on, for a weight other than 0, it is v_c + w (v_s - v_c) with
    w = mix_scale, where v_s is the semantic LoRA's alone (mix "replace", PairEdit's own) or that of both ("add")."""
    def content(z, i):
        activate(pipe.transformer, {CONTENT: 1.0})
        return predict(pipe, z, sigmas[i], text, guidance_scale)

    steps = len(sigmas) - 1
    branch = min(max(start_index, first), steps)
    shared = euler(content, start, sigmas, first, branch)
    results = []
    for weight in weights:
        semantic = {SEMANTIC: weight} | ({CONTENT: 1.0} if mix == "add" else {})

        def mixed(z, i, semantic=semantic):
            v_content = content(z, i)
            activate(pipe.transformer, semantic)
            v_semantic = predict(pipe, z, sigmas[i], text, guidance_scale)
            return v_content + mix_scale * (v_semantic - v_content)

        results.append(euler(mixed if weight else content, shared, sigmas, branch, steps))
    activate(pipe.transformer, {})
    return torch.stack(results)

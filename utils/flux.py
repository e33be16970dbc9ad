"""FLUX.1 Kontext's parts: load them, encode text and images, predict a velocity. Any folder that stock
`FluxKontextPipeline.from_pretrained` accepts works; nothing here knows which model it holds."""

import contextlib
import inspect
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxKontextPipeline
from diffusers.training_utils import free_memory

from utils import adaln, lora, quantise

PATCH = 2  # latents are packed 2 x 2 into one token


def add_model_args(parser):
    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", required=True,
                       help="folder of a FluxKontextPipeline (FLUX.1-Kontext-dev), or its hub id")
    group.add_argument("--revision", help="branch, tag or commit of the hub model")
    group.add_argument("--variant", help="weight variant of the model files, such as fp16")
    group.add_argument("--cache_dir", help="where hub downloads are kept")
    group.add_argument("--max_sequence_length", type=int, default=512, help="T5 tokens, 1 to 512")
    group.add_argument("--guidance_scale", type=float, default=1.0,
                       help="guidance the model is told; stored in the LoRA file and used again in sampling")
    group.add_argument("--vae_encode_mode", default="mode", choices=["mode", "sample"],
                       help="mean of the VAE's posterior, or a draw from it")


def source(args):
    """Where a model's files come from, by the options of `add_model_args`: revision, variant, cache_dir."""
    return {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}


@dataclass
class TextEmbeds:
    """Encoded prompts. prompt: (B, T, D) T5 states; pooled: (B, P) CLIP state."""

    prompt: torch.Tensor
    pooled: torch.Tensor

    def to(self, device, dtype):
        is_async = torch.device(device).type != "cpu"  # the other way it would be read before it has arrived
        return TextEmbeds(*(part.to(device, dtype, non_blocking=is_async) for part in (self.prompt, self.pooled)))

    def expand(self, batch):
        """The same text `batch` times; self is of batch 1, or of `batch` already."""
        return TextEmbeds(self.prompt.expand(batch, -1, -1), self.pooled.expand(batch, -1))


def is_hub_id(path):
    """Whether `path`, where no file or folder is, may be a name on the hub."""
    return not str(path).startswith((".", "/", "~")) and str(path).count("/") == 1


def check_model(path, kind="FluxKontextPipeline",
                cure="download FLUX.1-Kontext-dev and name its folder, or use assets/tiny-kontext"):
    """Fail before anything expensive if `path` is a folder without a pipeline in it. Hub ids pass. kind, cure: what the
    messages say of the family."""
    if Path(path).is_dir():
        if not (Path(path) / "model_index.json").is_file():
            raise ValueError(f"--pretrained_model_name_or_path {path}: no model_index.json there; name the folder of "
                             f"a {kind}")
    elif not is_hub_id(path):
        raise ValueError(f"--pretrained_model_name_or_path {path}: no such folder; {cure}")


def check_family(path):
    """Refuse a folder whose model_index.json is that of another family than FLUX.1: its parts would not fit. Hub ids
    pass. ValueError names the folder."""
    index = Path(path) / "model_index.json"
    if not index.is_file():
        return
    try:
        config = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{index}: not JSON ({error}); copy the model again") from error
    name = config.get("_class_name", "") if isinstance(config, dict) else ""
    if not name.startswith("Flux") or name.startswith("Flux2"):
        raise ValueError(f"--pretrained_model_name_or_path {path}: a {name or 'model of unknown kind'}; name the "
                         "folder of a FLUX.1 model")


def model_id(path):
    """Name of a base model for records that leave this machine: a hub id as it is, a folder's last part."""
    return Path(path).resolve().name if Path(path).is_dir() else path


def read_bnb_config(path):
    """The options in a JSON file for bitsandbytes, such as {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}.
    ValueError naming the file and what is wrong."""
    from diffusers import BitsAndBytesConfig

    try:
        options = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--bnb_quantization_config_path {path}: {error.strerror}; name a JSON file") from error
    except ValueError as error:
        raise ValueError(f"--bnb_quantization_config_path {path}: not JSON ({error})") from error
    known = inspect.signature(BitsAndBytesConfig.__init__).parameters.keys() - {"self", "kwargs"}
    if not isinstance(options, dict) or options.keys() - known:
        raise ValueError(f"--bnb_quantization_config_path {path}: write one object with options of BitsAndBytesConfig: "
                         f"{', '.join(sorted(known))}")
    if options.get("load_in_4bit", False) == options.get("load_in_8bit", False):
        raise ValueError(f"--bnb_quantization_config_path {path}: set one of load_in_4bit and load_in_8bit to true")
    return options


def load_pipeline(path, dtype=torch.float32, revision=None, variant=None, cache_dir=None, skip=(), bnb_options=None,
                  base_precision="bf16", pipeline_class=FluxKontextPipeline):
    """Stock FluxKontextPipeline, or another class of diffusers, without the components named in `skip`, its transformer
    quantised where `bnb_options` (see read_bnb_config) or `base_precision` (see utils/quantise.py) say so. ValueError
    with the cure where the hub says no: no network, a gated model without a token, a name that does not exist."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    check_model(path)
    if pipeline_class is FluxKontextPipeline:
        check_family(path)
    config = quantise.pipeline_config(base_precision, bnb_options, dtype)
    quantization = {"quantization_config": config} if config else {}
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # one bar a component buries the one that counts
    with fetching(path, variant):
        return pipeline_class.from_pretrained(
            path, dtype=dtype, revision=revision, variant=variant, cache_dir=cache_dir, use_safetensors=True,
            **dict.fromkeys(skip), **quantization,
        )


@contextlib.contextmanager
def fetching(path, variant=None):
    """Turn what keeps a model from being read inside into a ValueError of one line with the cure: what the hub says no
    to (no network, a gated model without a token, a name that does not exist), a file of a folder that is missing or
    damaged, which the libraries name, and no files of `variant`."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise ValueError(f"{path} is gated: accept its licence on its page, then `hf auth login` or set HF_TOKEN, or "
                         "give the path of a downloaded copy") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise ValueError(f"{path} could not be fetched ({type(error).__name__}); give the path of a downloaded "
                         "copy") from error
    except OSError as error:
        reason = str(error).partition("\n")[0].strip(" .")
        if os.path.isdir(path):
            raise ValueError(f"{path} cannot be loaded ({reason}); download or copy it again") from error
        raise ValueError(f"{path} could not be fetched ({reason}); give the path of a downloaded copy") from error
    except ValueError as error:
        if variant and f"variant={variant}" in str(error):
            raise ValueError(f"--variant {variant}: {path} has no such files; leave it out, or name one that it "
                             "has") from error
        raise


TEXT_ENCODER_BYTES = 11 * 2**30  # T5-XXL and CLIP in bf16 and room to work; on a smaller card they stay on the CPU
TEXT_PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
IMAGE_PARTS = ("vae", "transformer")
OPTIONAL_PARTS = ("image_encoder", "feature_extractor")


@torch.no_grad()
def encode_prompts(path, prompts, device, dtype, max_sequence_length=512, lora_file=None, lora_weight=1.0,
                   encoded=None, **where):
    """{prompt: TextEmbeds of batch 1, on the CPU in `dtype`}. Loads the text encoders, and frees them again:
    T5-XXL in bf16 is 9 GB that training has no use for. lora_file: a LoRA whose part for CLIP, if it has one, is
    applied at `lora_weight`. encoded: a mapping that takes the results. where: revision, variant, cache_dir."""
    if torch.device(device).type == "cuda" and torch.cuda.mem_get_info(device)[0] < TEXT_ENCODER_BYTES:
        device = "cpu"
    pipe = load_pipeline(path, dtype, skip=IMAGE_PARTS + OPTIONAL_PARTS, **where).to(device)
    if lora_file:
        lora.load_into_text_encoder(pipe.text_encoder, lora_file, lora_weight)
    encoded = {} if encoded is None else encoded
    for prompt in dict.fromkeys(prompts):
        states, pooled, _ = pipe.encode_prompt(prompt, None, device=device, max_sequence_length=max_sequence_length)
        encoded[prompt] = TextEmbeds(states, pooled).to("cpu", dtype)
    del pipe
    free_memory()
    return encoded


def load_text_encoder(path, device, dtype, **where):
    """(CLIP's tokenizer, CLIP), frozen, for training a LoRA on it. where: revision, variant, cache_dir."""
    pipe = load_pipeline(path, dtype, skip=IMAGE_PARTS + OPTIONAL_PARTS + ("tokenizer_2", "text_encoder_2"), **where)
    return pipe.tokenizer, pipe.text_encoder.to(device).eval().requires_grad_(False)


def stack_text(encoded, prompts, device, dtype):
    """TextEmbeds of batch len(prompts) from encode_prompts' dict."""
    items = [encoded[prompt] for prompt in prompts]
    return TextEmbeds(torch.cat([t.prompt for t in items]), torch.cat([t.pooled for t in items])).to(device, dtype)


def load_models(path, device, dtype, transformer_device=None, tables=None, **where):
    """The pipeline with only VAE, transformer and scheduler, frozen, in evaluation mode, on `device` in `dtype`
    (fp32 or bf16: FLUX's VAE overflows fp16). transformer_device: another one for the transformer, the CPU before block
    offload. tables: (sigmas, guidance, pooled) of adaln.build. where: revision, variant, cache_dir, bnb_options,
    base_precision."""
    pipe = load_pipeline(path, dtype, skip=TEXT_PARTS + OPTIONAL_PARTS, **where)
    if tables:  # before the layers that they replace would be moved
        adaln.build(pipe.transformer, *tables, device, dtype)
    pipe.vae.to(device)
    if not where.get("bnb_options"):  # bitsandbytes has put it on the GPU already
        pipe.transformer.to(transformer_device or device)
    for model in (pipe.vae, pipe.transformer):
        model.eval().requires_grad_(False)
    quantise.keep_packed(pipe.transformer)
    return pipe


@contextlib.contextmanager
def on_device(model, device, is_offloaded):
    """Inside, `model` is on `device`; outside, if `is_offloaded`, on the CPU."""
    if is_offloaded:
        model.to(device)
    try:
        yield
    finally:
        if is_offloaded:
            model.to("cpu")


def latent_scale(vae):
    """Pixels per latent along one side (8 for FLUX)."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def size_multiple(vae):
    """Image sides must be multiples of this many pixels (16 for FLUX): whole latents in whole tokens."""
    return latent_scale(vae) * PATCH


def image_tokens(vae, sizes):
    """Tokens of the largest of the images of `sizes` (height, width) in px."""
    return max(height * width for height, width in sizes) // size_multiple(vae) ** 2


def check_sizes(vae, sizes):
    """ValueError unless every (height, width) in pixels is a multiple of what the model needs."""
    multiple = size_multiple(vae)
    for height, width in sizes:
        if height % multiple or width % multiple:
            raise ValueError(f"--resolution / --aspect_ratio_buckets {height}x{width}: this model needs multiples of "
                             f"{multiple} pixels")


def latent_shape(vae, height_px, width_px):
    """(C, h, w) of the latents of an image; sides must be multiples of size_multiple(vae)."""
    scale = latent_scale(vae)
    return vae.config.latent_channels, height_px // scale, width_px // scale


def posterior(vae, images):
    """(mean, standard deviation) of the normalised latents, each (B, C, h, w) in fp32, of images (B, 3, H, W) in
    [-1, 1]. A VAE without a posterior (AutoencoderTiny) has the deviation 0."""
    encoded = vae.encode(images.to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        mean, std = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
    else:
        mean = encoded.latents.float()
        std = torch.zeros_like(mean)
    return (mean - vae.config.shift_factor) * vae.config.scaling_factor, std * vae.config.scaling_factor


def encode(vae, images, noise=None):
    """Normalised latents (B, C, h, w) in fp32 of images (B, 3, H, W) in [-1, 1]: the posterior's mean, or with `noise`
    (B, C, h, w) standard normal a draw from it."""
    mean, std = posterior(vae, images)
    return mean if noise is None else mean + std * noise.to(mean)


def decode(vae, latents):
    """Images (B, 3, H, W) in fp32, about [-1, 1] and not clamped, of normalised latents (B, C, h, w)."""
    latents = latents.float() / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()


def pack(latents):
    """(B, C, h, w) -> tokens (B, h/2 * w/2, 4 C)."""
    batch, channels, height, width = latents.shape
    return FluxKontextPipeline._pack_latents(latents, batch, channels, height, width)


def unpack(tokens, height, width):
    """Tokens (B, h/2 * w/2, 4 C) -> (B, C, h, w); height, width: of the latents."""
    return FluxKontextPipeline._unpack_latents(tokens, height, width, vae_scale_factor=1)


def token_ids(height, width, first, device):
    """Position ids (h/2 * w/2, 3) = (first, row, column) of h x w latents; first: 0 target, i for reference i."""
    ids = FluxKontextPipeline._prepare_latent_image_ids(1, height // PATCH, width // PATCH, device, torch.float32)
    ids[:, 0] = first
    return ids


def predict_velocity(transformer, latents, sigma, references, text, guidance_scale):
    """Velocity (B, C, h, w) that the transformer predicts for `latents` at noise level `sigma`.

    latents: (B, C, h, w). sigma: (B,) in [0, 1], best on the CPU, where AdaLN tables (utils.adaln) read it without
    waiting for the device. references: reference latents (B, C, h', w'), a list of them, each of its own size, or None;
    the i-th stands at the positions (i, row, column), i from 1 (Labs et al. 2025, FLUX.1 Kontext). text: TextEmbeds of
    batch B. The transformer's own dtype is used for everything it reads."""
    adaln.select(transformer, sigma, guidance_scale)
    dtype = text.prompt.dtype
    height, width = latents.shape[-2:]
    references = [references] if isinstance(references, torch.Tensor) else references or []
    images = [latents, *references]
    tokens = torch.cat([pack(image) for image in images], dim=1)
    ids = torch.cat([token_ids(*image.shape[-2:], i, latents.device) for i, image in enumerate(images)])
    guidance = None
    if unwrap_config(transformer).guidance_embeds:
        guidance = torch.full((len(latents),), guidance_scale, device=latents.device, dtype=torch.float32)
    prediction = transformer(
        hidden_states=tokens.to(dtype),
        timestep=sigma.to(latents.device, non_blocking=True),
        guidance=guidance,
        encoder_hidden_states=text.prompt,
        pooled_projections=text.pooled,
        txt_ids=torch.zeros(text.prompt.shape[1], 3, device=latents.device),
        img_ids=ids,
        return_dict=False,
    )[0]
    return unpack(prediction[:, : height * width // PATCH**2], height, width)


def unwrap_config(transformer):
    """The model's config, also behind DistributedDataParallel."""
    return getattr(transformer, "module", transformer).config

"""Qwen-Image's parts: load them, encode texts and images, predict a velocity. Any folder that stock QwenImagePipeline,
QwenImageEditPipeline or QwenImageEditPlusPipeline (Qwen-Image-Edit-2509 and later) accepts works."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage, pipeline_qwenimage_edit_plus
from diffusers.training_utils import free_memory
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from utils import flux, quantise
from utils.cache import PosteriorFiles, TextCache, cached_posterior, encoders_key
from utils.utils import to_pil

TEXT_PARTS = ("tokenizer", "text_encoder", "processor")
IMAGE_PARTS = ("vae", "transformer")
EDIT_PIPELINES = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
TEXT_ENCODER_BYTES = 18 * 2**30  # Qwen2.5-VL-7B in bf16 and room to work; on a smaller card it stays on the CPU
LORA_TARGETS = {
    "img_attn": ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"],
    "attn": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"],
    "attn_mlp": ["img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"],
}  # each beside those before it


def lora_targets(preset):
    """Names of the linear layers that a preset of LORA_TARGETS gives a LoRA: the image's side of attention, both sides,
    or these and the feed-forward layers."""
    names = list(LORA_TARGETS)
    return sum((LORA_TARGETS[name] for name in names[: names.index(preset) + 1]), [])


def check_model(path):
    """As flux.check_model."""
    flux.check_model(path, "QwenImagePipeline", "download Qwen/Qwen-Image and name its folder")


def is_edit_model(path, **where):
    """True for a model that edits an image, False for one that makes it from text. Reads its model_index.json alone.
    ValueError where it is another family's. where: revision, variant (which no config has), cache_dir."""
    with flux.fetching(path):
        config = DiffusionPipeline.load_config(path, **where | {"variant": None})
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in ("QwenImagePipeline", *EDIT_PIPELINES):
        raise ValueError(f"{path} is a {name or 'model of unknown kind'}; name a Qwen-Image or Qwen-Image-Edit model")
    return name in EDIT_PIPELINES


def weightless_transformer(path, **where):
    """The transformer on the meta device, made from its config alone. where: as for is_edit_model."""
    with flux.fetching(path):
        config = QwenImageTransformer2DModel.load_config(path, subfolder="transformer", **where | {"variant": None})
    with torch.device("meta"):
        return QwenImageTransformer2DModel.from_config(config)


def load_models(path, device, dtype, is_edit, vae_device=None, **where):
    """The stock pipeline without its text encoder, its models frozen, in evaluation mode, on `device` in `dtype`.
    vae_device: another one for the VAE. where: revision, variant, cache_dir, bnb_options, base_precision."""
    pipe = flux.load_pipeline(path, dtype, skip=TEXT_PARTS[: 2 + is_edit], pipeline_class=DiffusionPipeline, **where)
    pipe.vae.to(vae_device or device)
    if not where.get("bnb_options"):  # bitsandbytes has put it on the GPU already
        pipe.transformer.to(device)
    for model in (pipe.vae, pipe.transformer):
        model.eval().requires_grad_(False)
    quantise.keep_packed(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- text -------------------------------------------------------------------------------------------------------------

@dataclass
class TextStates:
    """An encoded text. states: (L, D), of its own length."""

    states: torch.Tensor


def content_key(image):
    """Tells images (3, H, W) on the CPU apart by their content."""
    key = hashlib.blake2b(str(tuple(image.shape)).encode(), digest_size=20)
    key.update(image.contiguous().numpy())
    return key.hexdigest()


def text_key(caption, control_key=None):
    """What a text is found by: the caption, in edit training with the content_key of the control, which the text
    encoder reads too."""
    return caption if control_key is None else f"{control_key}\n{caption}"


@torch.no_grad()
def encode_texts(path, inputs, accelerator, dtype, max_sequence_length, folder=None, **where):
    """{text_key: TextStates on the CPU in `dtype`} of every (caption, control or None) of `inputs`, control (3, H, W)
    in [-1, 1]. Loads the text encoder, unless all is there, and frees it again: 16 GB that training has no use for.

    folder: keep them there, each encoded by one of the processes, and not again on a resume; None: in memory.
    max_sequence_length: tokens of a caption; the edit pipelines take texts as they are, with their image's tokens.
    where: revision, variant, cache_dir."""
    texts, rank, processes = {}, 0, 1
    if folder:
        texts = TextCache(folder, encoders_key(path, TEXT_PARTS, dtype, max_sequence_length, **where), TextStates)
        rank, processes = accelerator.process_index, accelerator.num_processes
    pipe = device = None
    for place, (caption, control) in enumerate(inputs):
        key = text_key(caption, None if control is None else content_key(control))
        if place % processes != rank or key in texts:
            continue
        if pipe is None:
            device = accelerator.device
            if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < TEXT_ENCODER_BYTES:
                device = torch.device("cpu")
            pipe = flux.load_pipeline(path, dtype, skip=IMAGE_PARTS, pipeline_class=DiffusionPipeline, **where)
            pipe.to(device)
        image = {} if control is None else {"image": condition_image(pipe, to_pil(control))}
        states, _ = pipe.encode_prompt(caption, device=device, max_sequence_length=max_sequence_length, **image)
        texts[key] = TextStates(states[0].to("cpu", dtype))
    del pipe
    free_memory()
    accelerator.wait_for_everyone()
    return texts


def condition_image(pipe, image):
    """What the text encoder of an edit pipeline is shown of the PIL image `image`, as in the pipeline's own call."""
    if type(pipe).__name__ != "QwenImageEditPlusPipeline":
        return image
    width, height = pipeline_qwenimage_edit_plus.calculate_dimensions(
        pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE, image.width / image.height)
    return [pipe.image_processor.resize(image, height, width)]


def stack_text(texts, device, dtype):
    """(prompt (B, L, D), mask (B, L), True where a token is one) of B TextStates, padded to the longest. mask is None
    where nothing is padded, which is faster, and what the pipelines do."""
    states = [text.states.to(device, dtype, non_blocking=True) for text in texts]
    lengths = torch.tensor([len(state) for state in states])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return pad_sequence(states, batch_first=True), None if mask.all() else mask.to(device, non_blocking=True)


# --- images -----------------------------------------------------------------------------------------------------------

def posterior(vae, images):
    """(mean, standard deviation) of the normalised latents, each (B, C, h, w) in fp32, of images (B, 3, H, W) in
    [-1, 1]: (z - mean_c) / std_c of the VAE's config. The VAE is a video's; an image is a single frame."""
    encoded = vae.encode(images[:, :, None].to(vae.dtype)).latent_dist
    mean, std = encoded.mean[:, :, 0].float(), encoded.std[:, :, 0].float()
    shift, scale = (torch.tensor(values, device=mean.device).view(-1, 1, 1)
                    for values in (vae.config.latents_mean, vae.config.latents_std))
    return (mean - shift) / scale, std / scale


class TrainingItems(Dataset):
    """The items of `dataset`, each with the "text_key" of its text. encoded: what `encode_pictures` returns; then their
    "target" and "control" are posteriors (2, C, h, w), mean and standard deviation, and no image is read."""

    def __init__(self, dataset, encoded=None):
        self.dataset, self.encoded, self.bucket_of = dataset, encoded, dataset.bucket_of

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        if self.encoded is None:
            item = self.dataset[key]
            control_key = content_key(item["control"]) if "control" in item else None
        else:
            item = self.dataset.item(key, self.posteriors)
            control_key = self.encoded[0][item["index"] % len(self.dataset.sizes)].control_key
        return item | {"text_key": text_key(item["caption"], control_key)}

    def posteriors(self, place):
        entries, store = self.encoded
        posteriors = [store[name] for name in entries[place].names]
        return (entries[place].example, [torch.cat([each["mean"], each["std"]]) for each in posteriors],
                entries[place].skipped)


class Entry(NamedTuple):
    """A picture that is encoded. names: of its posteriors in the store. skipped: of `CustomImageDataset.picture`."""

    example: tuple
    names: list
    control_key: str | None
    skipped: list


@torch.no_grad()
def encode_pictures(path, dataset, accelerator, dtype, is_edit, folder=None, **where):
    """(entries, store): the Entry of every picture of `dataset`, in the order of its sizes, and the posteriors by name,
    in files of `folder`, each made by one of the processes, or in memory. where: revision, variant, cache_dir."""
    parts = ("transformer", *TEXT_PARTS[: 2 + is_edit])
    vae = flux.load_pipeline(path, dtype, skip=parts, pipeline_class=DiffusionPipeline, **where).vae
    vae.to(accelerator.device).eval()
    store = PosteriorFiles(folder) if folder else {}
    first, stride = (accelerator.process_index, accelerator.num_processes) if folder else (0, 1)
    entries = []
    for place in range(first, len(dataset.sizes), stride):
        example, images, skipped = dataset.picture(place)
        names = [cached_posterior(vae, image.to(accelerator.device), store, posterior)[0] for image in images]
        entries.append((place, Entry(example, names, content_key(images[1]) if is_edit else None, skipped)))
    del vae
    free_memory()
    if folder:
        entries = gather_object(entries)
    return [entry for _, entry in sorted(entries, key=lambda pair: pair[0])], store


# --- transformer ------------------------------------------------------------------------------------------------------

def predict_velocity(transformer, latents, sigma, controls, prompt, mask):
    """Velocity (B, C, h, w) that the transformer predicts for `latents` at noise level `sigma`.

    latents: (B, C, h, w). sigma: (B,) in [0, 1]. controls: list of control latents (B, C, h', w'), each of its own
    size, whose tokens follow. prompt, mask: of stack_text; everything is computed in the prompt's dtype. Positions come
    from the sizes of the first item, so a batch has one."""
    height, width = latents.shape[-2:]
    images = [latents, *controls]
    shapes = [(1, image.shape[-2] // flux.PATCH, image.shape[-1] // flux.PATCH) for image in images]
    prediction = transformer(
        hidden_states=torch.cat([flux.pack(image) for image in images], dim=1).to(prompt.dtype),
        timestep=sigma,
        encoder_hidden_states=prompt,
        encoder_hidden_states_mask=mask,
        img_shapes=[shapes] * len(latents),
        return_dict=False,
    )[0]
    return flux.unpack(prediction[:, : height * width // flux.PATCH**2], height, width)


def resolution_mu(scheduler, height, width):
    """The shift that stock sampling gives to the noise levels of latents of height x width, by the scheduler's own
    numbers: linear in the tokens, for Qwen-Image 0.5 at 256 and 0.9 at 8192."""
    config = scheduler.config
    return pipeline_qwenimage.calculate_shift(height * width // flux.PATCH**2, config.base_image_seq_len,
                                              config.max_image_seq_len, config.base_shift, config.max_shift)


def describe_trainable(transformer, file):
    """One line that counts what is trained; the names go to `file`."""
    sizes = {name: parameter.numel() for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    file.write_text("".join(f"{name} {size}\n" for name, size in sizes.items()), encoding="utf-8")
    trained = sum(sizes.values())
    frozen = transformer.num_parameters() - trained
    return (f"training {trained:,} parameters in {len(sizes)} tensors ({file}), {trained / frozen:.2%} of the model's "
            f"{frozen:,}")


@torch.no_grad()
def sample(pipe, prompt, negative, size, steps, true_cfg_scale, seeds, image=None):
    """Images (3, H, W) in [-1, 1] on the CPU, one for each seed, as the stock pipeline makes them; `pipe` needs no text
    encoder. prompt, negative: TextStates. size: (height, width), px. image: the PIL image that is edited."""
    device = pipe.transformer.device
    texts = {"": prompt} | ({"negative_": negative} if true_cfg_scale > 1 else {})
    inputs = {} if image is None else {"image": image}
    for name, text in texts.items():
        inputs[f"{name}prompt_embeds"] = text.states[None].to(device)
        inputs[f"{name}prompt_embeds_mask"] = torch.ones(1, len(text.states), dtype=torch.long, device=device)
    images = [pipe(**inputs, height=size[0], width=size[1], num_inference_steps=steps, true_cfg_scale=true_cfg_scale,
                   generator=torch.Generator().manual_seed(seed), output_type="np").images[0] for seed in seeds]
    return [torch.from_numpy(np.moveaxis(picture, -1, 0)) * 2 - 1 for picture in images]

"""The deblurring ControlNet: Stable Diffusion's UNet with a ControlNet whose hint is the blurred image; its losses, its
sampler, its files.

z_0: latents of the sharp image, eps: noise, abar_t: the noise schedule in the base model's folder, D: its decoder.
    z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps,  clean estimate z^_0 = (z_t - sqrt(1 - abar_t) eps^) / sqrt(abar_t)
    loss = mean (eps^ - eps)^2 + elbo_weight mean w_t (eps^ - eps)^2 + deblur_loss_weight mean abar_t deblur_t
    deblur_t = L1 + MSE + perceptual and gradient loss between D(z^_0) and the sharp image
z^_0 blows up at large t; abar_t, the share of signal in z_t, weighs that down. Decoding happens on crops, in fp32, and
the gradient runs through the frozen decoder and UNet back to the ControlNet."""

import itertools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from recipes.deblur_controlnet.deblur_dataset import read_json
from utils import flux
from utils.checkpoint import sha256
from utils.losses import VGGLoss, inner_box
from utils.parse import write_json

BASE_MODEL = "sd-legacy/stable-diffusion-v1-5"
MODEL_FOLDER = "controlnet"  # in --output_dir; a checkpoint folder has the same files
SETTINGS_FILE, ATTENTION_FILE = "deblur_config.json", "hint_attention.safetensors"
DECODER_FILE = "unet_decoder.safetensors"  # the UNet's unlocked parts
UNLOCKED = ("up_blocks", "conv_norm_out", "conv_out")
HINT_CHANNELS = (16, 32, 96, 256)  # each but the first halves the hint's size
SILU_GAIN = 1.68  # 1 / sqrt(mean of SiLU(x)^2) for standard normal x
# What sampling needs to know of a training; these are for ControlNets that others made.
DEFAULT_SETTINGS = {
    "base_model": None,
    "image_size": 512,
    "t_min": 0,
    "t_max": 1000,
    "use_augmentation": False,
    "num_inference_steps": 50,
    "guidance_scale": 3.0,
    "strength": 1.0,
}


# --- models -----------------------------------------------------------------------------------------------------------

class HintAttention(torch.nn.Module):
    """A map in (0, 1) that the hint is multiplied by: forward((B, 3, H, W)) -> (B, 1, H, W). It starts at
    sigmoid(4) = 0.98 everywhere, so that the hint is whole when training begins."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3, padding=1),
            torch.nn.ReLU(), torch.nn.Conv2d(64, 1, 1), torch.nn.Sigmoid())
        torch.nn.init.zeros_(self.layers[4].weight)
        torch.nn.init.constant_(self.layers[4].bias, 4.0)

    def forward(self, hint):
        return self.layers(hint)


class ControlledUNet(torch.nn.Module):
    """The UNet as its ControlNet steers it, one module for DistributedDataParallel.

    Trained are the ControlNet, `attention` (a HintAttention or None) and, unless sd_locked, the UNet's UNLOCKED parts,
    in fp32; the rest is frozen, in `dtype`, and under bf16 all computes in bf16 by autocast. only_mid_control: the
    zero convolutions of the ControlNet's down blocks are made zero and frozen, so that only its middle block speaks,
    in stock pipelines too."""

    def __init__(self, unet, controlnet, attention=None, sd_locked=True, only_mid_control=False, dtype=torch.float32):
        super().__init__()
        self.unet = unet.requires_grad_(False)
        self.controlnet, self.attention, self.sd_locked = controlnet, attention, sd_locked
        self.computes_in_bf16 = dtype == torch.bfloat16
        if self.computes_in_bf16:
            unet.to(dtype)
        for module in self.trained_modules().values():
            module.float().requires_grad_(True)
        if only_mid_control:
            for parameter in controlnet.controlnet_down_blocks.parameters():
                torch.nn.init.zeros_(parameter).requires_grad_(False)

    def trained_modules(self):
        """{name: module} of what is trained and saved."""
        modules = {"controlnet": self.controlnet}
        if self.attention is not None:
            modules["hint_attention"] = self.attention
        if not self.sd_locked:
            modules |= {name: getattr(self.unet, name) for name in UNLOCKED if getattr(self.unet, name) is not None}
        return modules

    def trained_parameters(self):
        """A list, in a fixed order."""
        return [parameter for module in self.trained_modules().values() for parameter in module.parameters()
                if parameter.requires_grad]

    def autocast(self, device):
        return torch.autocast(device.type, torch.bfloat16, enabled=self.computes_in_bf16)

    def attend(self, hint):
        """What the ControlNet is shown of a blurred image (B, 3, H, W) in [0, 1]."""
        if self.attention is None:
            return hint
        with self.autocast(hint.device):
            return hint * self.attention(hint)

    def predict(self, z, t, text, attended, conditioning_scale=1.0):
        """What `forward` gives, of a hint that `attend` has seen."""
        with self.autocast(z.device):
            down, mid = self.controlnet(z, t, text, attended, conditioning_scale, return_dict=False)
            predicted = self.unet(z, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid)
        return predicted.sample.to(z.dtype)

    def forward(self, z, t, text, hint):
        """What the UNet predicts, (B, C, h, w) as z. z: noisy latents. t: (B,) int64. text: (B, T, D) of CLIP. hint:
        blurred images (B, 3, H, W) in [0, 1]."""
        return self.predict(z, t, text, self.attend(hint))


def read_tensors(path):
    """{name: tensor} of a file; ValueError naming the file where it is torn."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: no whole safetensors file ({error}); restore it") from error


def check_base(path):
    """Fail before anything expensive if `path` is a folder without Stable Diffusion in it. Hub ids pass."""
    index = Path(path) / "model_index.json"
    flag = f"--pretrained_model_name_or_path {path}"
    if Path(path).is_dir():
        if not index.is_file() or "unet" not in read_json(index):
            raise ValueError(f"{flag}: no model_index.json with a unet there; name the folder of a "
                             "StableDiffusionPipeline")
    elif not flux.is_hub_id(path):
        raise ValueError(f"{flag}: no such folder; download {BASE_MODEL} and name its folder, or use assets/tiny-sd")


def read_base(path):
    """The pipeline of `load_base` as its JSON files tell it: `vae`, `unet` and `scheduler` have a `config` and nothing
    else, which is enough to check what is asked of them before any weights load."""
    check_base(path)
    parts = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "scheduler": DDIMScheduler}
    with flux.fetching(path):
        configs = {name: part.load_config(path, subfolder=name) for name, part in parts.items()}
    return SimpleNamespace(**{name: SimpleNamespace(config=SimpleNamespace(**config))
                              for name, config in configs.items()})


def load_base(path):
    """StableDiffusionPipeline of a folder or hub id: frozen, fp32, on the CPU, with a DDIM scheduler that spaces its
    steps as `sampling_timesteps` does and ends at the clean estimate. Stable Diffusion's own would stop at the noise of
    t = 0: after a single step from t = 39 that is 0.85 of the estimate and 0.15 of the blurred image."""
    check_base(path)
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    with flux.fetching(path):
        pipe = StableDiffusionPipeline.from_pretrained(
            path, dtype=torch.float32, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, timestep_spacing="trailing",
                                               set_alpha_to_one=True)
    for module in (pipe.vae, pipe.unet, pipe.text_encoder):
        module.eval().requires_grad_(False)
    return pipe


@torch.no_grad()
def encode_text(pipe, prompts):
    """(len(prompts), 77, D) embeddings, CLIP's last hidden state, on the text encoder's device."""
    return pipe.encode_prompt(list(prompts), pipe.text_encoder.device, 1, False)[0]


def size_multiple(pipe):
    """Image sides must be multiples of this many pixels (64 for SD 1.5): whole latents at the UNet's lowest level.
    pipe: also that of `read_base`."""
    return flux.latent_scale(pipe.vae) * 2 ** (len(pipe.unet.config.down_block_types) - 1)


def draw_hint_network(embedding):
    """Draw its weights from torch's global generator such that every layer keeps the size of what comes in (He et al.
    2015); the last, a zero convolution, stays zero. PyTorch's own start, which the original has, shrinks a photograph's
    contrast to 0.001 in 5 layers, under biases of 0.015, so that thousands of steps pass before the hint is heard."""
    for layer in (embedding.conv_in, *embedding.blocks):
        torch.nn.init.normal_(layer.weight, std=SILU_GAIN / layer.weight[0].numel() ** 0.5)
        torch.nn.init.zeros_(layer.bias)


def hint_channels(vae):
    """conditioning_embedding_out_channels of a ControlNet whose hint has the size of this autoencoder's images."""
    levels = len(vae.config.block_out_channels)
    return (HINT_CHANNELS + HINT_CHANNELS[-1:] * levels)[:levels]


def check_source(source, flag):
    """Fail before anything is fetched if no ControlNet can be in `source`, a file, folder or hub id. ValueError names
    `flag`, which gave it."""
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ValueError(f"{flag} {source}: no config.json there; name the folder of a ControlNetModel")
    if not Path(source).exists() and not flux.is_hub_id(source):
        raise ValueError(f"{flag} {source}: no such file or folder; name one with a trained ControlNet")


def check_controlnet(base, source, flag):
    """Fail before any weights load if the ControlNet in `source`, a folder or hub id of diffusers, belongs to another
    model than `base`, that of `read_base`. Of a .ckpt or .safetensors file of the original implementation the weights
    alone tell that. ValueError names `flag`."""
    check_source(source, flag)
    if Path(source).is_file():
        return
    with flux.fetching(source):
        config = ControlNetModel.load_config(source)
    if not isinstance(config, dict) or config.get("_class_name") != "ControlNetModel":
        raise ValueError(f"{flag} {source}: its config.json is not that of a ControlNetModel; name another")
    for name in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
        own, value = config.get(name), getattr(base.unet.config, name)
        if own != value:
            raise ValueError(f"{flag} {source}: its {name} is {own}, the base model's {value}; it belongs to another "
                             "model")
    levels = len(config.get("conditioning_embedding_out_channels", HINT_CHANNELS))
    if levels != len(hint_channels(base.vae)):
        raise ValueError(f"{flag} {source}: its hint network makes images {2 ** (levels - 1)} times smaller, the base "
                         f"model's autoencoder {flux.latent_scale(base.vae)} times; it belongs to another model")


def make_controlnet(pipe, source=None, flag="--controlnet_model_name_or_path"):
    """A ControlNet for `pipe`, fp32: a copy of its UNet's encoder with zero convolutions (Zhang et al. 2023), its hint
    network drawn by `draw_hint_network`; or the one in `source`, which `check_controlnet` has let pass. flag: as
    there."""
    channels = hint_channels(pipe.vae)
    if source is None:
        controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=channels)
        draw_hint_network(controlnet.controlnet_cond_embedding)
        return controlnet
    if Path(source).is_file():
        like = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=channels,
                                         load_weights_from_unet=False)
        with tempfile.TemporaryDirectory() as folder:
            like.save_config(folder)
            try:
                return ControlNetModel.from_single_file(str(source), config=folder, low_cpu_mem_usage=False)
            except (OSError, ValueError, RuntimeError, AttributeError) as error:  # of diffusers, all kinds
                raise ValueError(f"{flag} {source}: no ControlNet for this base model "
                                 f"({str(error).partition(chr(10))[0]}); name one of the original implementation, or "
                                 "a folder of diffusers") from error
    with flux.fetching(source):
        return ControlNetModel.from_pretrained(source)


# --- files ------------------------------------------------------------------------------------------------------------

def write_model(folder, model, settings):
    """Write what was trained into an empty folder: the ControlNet as diffusers does, beside it the attention, the
    unlocked parts of the UNet and `settings`, a JSON-safe dict."""
    modules = model.trained_modules()
    modules.pop("controlnet").save_pretrained(folder)
    if attention := modules.pop("hint_attention", None):
        save_file(attention.state_dict(), Path(folder) / ATTENTION_FILE)
    if modules:
        save_file({f"{name}.{key}": value.contiguous() for name, module in modules.items()
                   for key, value in module.state_dict().items()}, Path(folder) / DECODER_FILE)
    write_json(Path(folder) / SETTINGS_FILE, settings)


def load_parts(unet, folder):
    """The HintAttention that lies beside a ControlNet, or None; the UNet's unlocked parts there are put into `unet`."""
    attention = None
    if (folder / ATTENTION_FILE).is_file():
        attention = HintAttention()
        attention.load_state_dict(read_tensors(folder / ATTENTION_FILE))
    if (folder / DECODER_FILE).is_file():
        _, unexpected = unet.load_state_dict(read_tensors(folder / DECODER_FILE), strict=False)
        if unexpected:
            raise ValueError(f"{folder / DECODER_FILE}: {unexpected[0]} does not belong to the base model; name the "
                             "one it was trained on with --pretrained_model_name_or_path")
    return attention


def find_model(path):
    """What --model names, as text: of a training's --output_dir its ControlNet's folder, anything else as it is."""
    folder = Path(path) / MODEL_FOLDER
    return str(folder if folder.is_dir() else path)


def read_settings(source):
    """DEFAULT_SETTINGS, over them those beside the ControlNet in `source`."""
    file = Path(source) / SETTINGS_FILE
    return DEFAULT_SETTINGS | (read_json(file) if file.is_file() else {})


def hash_weights(source):
    """{file name: sha256} of all weights that `load_model` reads from `source`; of a hub id, which is no file, {}."""
    folder = Path(source)
    files = [folder] if folder.is_file() else [
        *sorted(folder.glob("diffusion_pytorch_model*")), folder / ATTENTION_FILE, folder / DECODER_FILE]
    return {file.name: sha256(file) for file in files if file.is_file()}


def load_model(pipe, source, dtype=torch.float32):
    """(ControlledUNet in `dtype`, settings) of a `source` that `check_controlnet` has let pass, a checkpoint for
    instance, with the attention and the unlocked parts that lie there."""
    controlnet = make_controlnet(pipe, source, "--model")
    model = ControlledUNet(pipe.unet, controlnet, load_parts(pipe.unet, Path(source)), dtype=dtype).to(dtype)
    return model.eval().requires_grad_(False), read_settings(source)


# --- latents ----------------------------------------------------------------------------------------------------------

def encode(vae, images, noise=None):
    """Latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]: the posterior's mean, or with `noise` (B, C, h, w) a draw
    from it. Stable Diffusion scales and does not shift."""
    posterior = vae.encode(images.to(vae.dtype)).latent_dist
    latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
    return latents * vae.config.scaling_factor


def decode(vae, latents):
    """Images (B, 3, H, W), about [-1, 1] and not clamped, of latents (B, C, h, w)."""
    return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]


def decode_crops(vae, latents, boxes):
    """[(1, 3, h, w)] of latents (B, C, h, w): each decoded inside its box of losses.crop_boxes, less the margin that
    lacks neighbours."""
    scale = flux.latent_scale(vae)
    pixels = decode(vae, torch.stack([item[:, top : top + rows, left : left + columns] for item, (
        top, left, rows, columns) in zip(latents, boxes, strict=True)]))
    crops = []
    for i, box in enumerate(boxes):
        y0, x0, y1, x1 = inner_box(*box, *latents.shape[-2:])
        rows = slice((y0 - box[0]) * scale, (y1 - box[0]) * scale)
        crops.append(pixels[i : i + 1, :, rows, (x0 - box[1]) * scale : (x1 - box[1]) * scale])
    return crops


def crop_pixels(images, boxes, latent_px):
    """[(1, 3, h, w)] of images (B, 3, H, W): the pixels that `decode_crops` returns. latent_px: side of a latent."""
    crops, (height, width) = [], (side // latent_px for side in images.shape[-2:])
    for i, box in enumerate(boxes):
        y0, x0, y1, x1 = (value * latent_px for value in inner_box(*box, height, width))
        crops.append(images[i : i + 1, :, y0:y1, x0:x1])
    return crops


# --- losses -----------------------------------------------------------------------------------------------------------

def vlb_weights(betas, prediction_type):
    """(T,) weights w_t that turn a squared error of `prediction_type` into a term of the variational lower bound (Ho et
    al. 2020, eq. 12): epsilon beta_t^2 / (2 btilde_t alpha_t (1 - abar_t)) with btilde_t = beta_t (1 - abar_(t-1)) /
    (1 - abar_t); sample sqrt(abar_t) / (2 (2 - abar_t)) and v_prediction 1, as in the original ControlNet. btilde_0 is
    0, so w_0 is w_1."""
    alphas = 1 - betas
    alphas_cumprod = alphas.cumprod(0)
    if prediction_type == "v_prediction":
        return torch.ones_like(betas)
    if prediction_type == "sample":
        weights = alphas_cumprod.sqrt() / (2 * (2 - alphas_cumprod))
    else:
        before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        posterior = betas * (1 - before) / (1 - alphas_cumprod)
        weights = betas**2 / (2 * posterior * alphas * (1 - alphas_cumprod))
    weights[0] = weights[1]
    return weights


def prediction_target(scheduler, clean, noise, t):
    """What the base model is trained to predict, by its scheduler's prediction_type."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(clean, noise, t)
    return {"epsilon": noise, "sample": clean}[scheduler.config.prediction_type]


def noise_between(scheduler, clean, z, t):
    """The noise that makes z out of the clean latents at t (B,), all (B, C, h, w): (z - sqrt(abar) clean) /
    sqrt(1 - abar). Where z began as other latents than `clean`, their difference is part of it."""
    alpha_bar = scheduler.alphas_cumprod.to(z)[t].view(-1, 1, 1, 1)
    return (z - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()


def noisy_latents(scheduler, clean, start, noise, t):
    """(z, noise), both (B, C, h, w): the latents `start` with `noise` of t (B,), and the noise in them as seen from
    `clean`, which is another one where `start` is not `clean` itself."""
    z = scheduler.add_noise(start, noise, t)
    return z, noise if start is clean else noise_between(scheduler, clean, z, t)


def clean_estimate(scheduler, z, prediction, t):
    """The clean latents that `prediction` implies for z at t (B,), all (B, C, h, w)."""
    if scheduler.config.prediction_type == "sample":
        return prediction
    alpha_bar = scheduler.alphas_cumprod.to(z)[t.to(z.device)].view(-1, 1, 1, 1)
    if scheduler.config.prediction_type == "v_prediction":
        return alpha_bar.sqrt() * z - (1 - alpha_bar).sqrt() * prediction
    return (z - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()


class PerceptualLoss(torch.nn.Module):
    """Mean squared difference of VGG16's relu3_3 features (Johnson et al. 2016), per item, frozen. file: torchvision's
    weights."""

    def __init__(self, file):
        super().__init__()
        vgg = VGGLoss(file)
        self.features = torch.nn.Sequential(*vgg.blocks[:3])
        self.register_buffer("mean", vgg.mean)
        self.register_buffer("std", vgg.std)

    def forward(self, restored, target):
        """(B, 3, H, W) in about [-1, 1], twice -> (B,)."""
        x, y = (self.features(((images + 1) / 2 - self.mean) / self.std) for images in (restored, target))
        return (x - y).square().flatten(1).mean(1)


def deblur_losses(restored, target, perceptual=None):
    """{"l1", "mse", "gradient", and "perceptual" where that module is given: (B,)} between images (B, 3, H, W) in about
    [-1, 1]. gradient: mean of the squared errors of the horizontal and of the vertical forward differences."""
    error = restored - target
    losses = {
        "l1": error.abs().flatten(1).mean(1),
        "mse": error.square().flatten(1).mean(1),
        "gradient": sum(error.diff(dim=side).square().flatten(1).mean(1) for side in (-1, -2)) / 2,
    }
    return losses if perceptual is None else losses | {"perceptual": perceptual(restored, target)}


# --- sampling ---------------------------------------------------------------------------------------------------------

def check_sampling(steps, strength):
    """ValueError naming the flag of what no sampling can do; None was not given."""
    if steps is not None and steps < 1:
        raise ValueError(f"--num_inference_steps {steps}: give 1 or more")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"--strength {strength}: give more than 0, at most 1")


def sampling_timesteps(scheduler, steps, strength, t_min=0):
    """`steps` integers, evenly spread from strength * 1000 - 1 down ("trailing", Lin et al. 2024), so that the last
    step ends at no noise however few there are. diffusers' img2img would round steps / strength, and with few steps
    begin far from where it should. ValueError where the table has not so many, or they end below t_min, which training
    began with."""
    length = scheduler.config.num_train_timesteps * strength
    if steps > length:
        raise ValueError(f"--num_inference_steps {steps} within --strength {strength:g}: the base model has only "
                         f"{length:g} timesteps there; lower the steps")
    timesteps = [round(length * (steps - i) / steps) - 1 for i in range(steps)]
    if timesteps[-1] < t_min:
        raise ValueError(f"--num_inference_steps {steps} within --strength {strength:g} end at timestep "
                         f"{timesteps[-1]}, and with --t_min {t_min} it is not trained; lower the steps")
    return timesteps


def ddim_step(scheduler, z, prediction, t, t_next):
    """z, (B, C, h, w), moved from t to t_next, or to the end where that is None (Song et al. 2021, eta 0).
    DDIMScheduler.step would take t - 1000 // steps for t_next, which is another one unless the division is exact."""
    clean = clean_estimate(scheduler, z, prediction, torch.full((len(z),), t))
    bar = scheduler.alphas_cumprod[t].to(z)
    next_bar = (scheduler.final_alpha_cumprod if t_next is None else scheduler.alphas_cumprod[t_next]).to(z)
    noise = (z - bar.sqrt() * clean) / (1 - bar).sqrt()
    return next_bar.sqrt() * clean + (1 - next_bar).sqrt() * noise


@torch.no_grad()
def sample(model, scheduler, hint, text, noise, steps, guidance_scale=1.0, strength=1.0, blurred=None, negative=None,
           conditioning_scale=1.0):
    """Latents (B, C, h, w) at the end of DDIM.

    hint: blurred images (B, 3, H, W) in [0, 1]. text, negative: (B, T, D); negative: needed where guidance_scale is not
    1 (Ho and Salimans 2022). noise: (B, C, h, w) standard normal. strength: in (0, 1], at 1 sampling starts from
    `noise`, below from the latents `blurred` with the noise of t = strength * 1000. conditioning_scale: factor of the
    ControlNet's residuals."""
    timesteps = sampling_timesteps(scheduler, steps, strength)
    z = noise if strength == 1 else scheduler.add_noise(blurred, noise, torch.tensor(timesteps[:1]))
    is_guided = guidance_scale != 1
    attended = model.attend(hint)
    if is_guided:
        text, attended = torch.cat([negative, text]), torch.cat([attended, attended])
    for t, t_next in itertools.pairwise([*timesteps, None]):
        prediction = model.predict(torch.cat([z, z]) if is_guided else z, t, text, attended, conditioning_scale)
        if is_guided:
            without, with_text = prediction.chunk(2)
            prediction = without + guidance_scale * (with_text - without)
        z = ddim_step(scheduler, z, prediction, t, t_next)
    return z


@torch.no_grad()
def deblur_images(model, vae, scheduler, images, text, noise, steps, guidance_scale=1.0, strength=1.0, negative=None,
                  conditioning_scale=1.0):
    """Deblurred images (B, 3, H, W), about [-1, 1] and not clamped, of blurred `images` in [-1, 1], whose sides are
    multiples of `size_multiple`. The rest as for `sample`."""
    blurred = None if strength == 1 else encode(vae, images)
    return decode(vae, sample(model, scheduler, (images + 1) / 2, text, noise, steps, guidance_scale, strength, blurred,
                              negative, conditioning_scale))

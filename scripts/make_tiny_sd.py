"""Make the embedded Stable Diffusion model: a complete, small pipeline in the layout of SD 1.5 with a random text
encoder, a linear autoencoder and a UNet that is trained here to denoise photographs and to sharpen blurred ones.

    python -m scripts.make_tiny_sd --stage init --output_dir outputs/untrained     # seconds: the folder alone
    python -m scripts.make_tiny_sd --photos DIR --credit "LINE FOR THE MODEL CARD"     # all stages, two hours

The photographs of TRAIN_SAMPLES are always trained on, those of HELDOUT_SAMPLES never (scripts/make_tiny_kontext.py).
Progress is kept in --work_dir as one safetensors file per stage; the same command continues from there, with the same
numbers."""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from my_dataset import degradations
from recipes.deblur_controlnet.deblur_controlnet import hint_channels
from recipes.deblur_controlnet.deblur_dataset import BLUR_TYPES, apply_blur, draw_blur, prompts
from scripts.make_tiny_kontext import (
    DECODER_FILE,
    HELDOUT_SAMPLES,
    TRAIN_SAMPLES,
    add_make_args,
    check_make_args,
    draw_crops,
    export,
    heldout_crops,
    load_photos,
    load_trained,
    make_tokenizers,
    mean_psnr,
    through_codec,
    to_tensor,
    train,
)
from utils.parse import make_parser, run_main, writable_folder

STAGES = ("init", "vae", "base", "blur", "export")
LATENTS, LATENT_PX = 16, 4
WIDTHS = (16, 24, 48)  # of the autoencoder, at full, half and quarter size
CODES, COLOURS = 20, 6  # channels that reach the last convolution of the encoder, of the decoder
SPREAD = 2.0  # of the latents; at 1 the noise of most t would hide all but the coarsest shapes
PEDESTAL = 256.0
SIZES, SIZE_SHARES = ((64, 16), (96, 7), (128, 4)), (0.7, 0.18, 0.12)  # px, crops of a batch
SOFT_SHARE, SOFT_T = 0.5, (10, 300)
REPORTED_T, SOFT_REPORTED_T = (50, 200, 400, 600, 800), (50, 200)
BLUR_SHARE, BLUR_T, BLUR_REPORTED_T = 0.9, (1, 40), (5, 20)
BLUR_WEIGHTS = {"motion_blur": 0.55} | dict.fromkeys(BLUR_TYPES[1:], 0.15)
MARGIN_PX = 20  # around a crop while it is blurred: what lies beyond its border is the photograph, not a mirror
PROMPTS = ("", *prompts().values())
LOG_VARIANCE = -1e4  # far below what diffusers' Gaussian clamps to: the encoder is deterministic


def parse_args(argv=None):
    parser = make_parser(__doc__.split("\n")[0])
    add_make_args(parser, STAGES, "tiny-sd", vae_steps=3000, base_steps=[5000, 4000], save_every=250,
                  base_steps_help="steps of the UNet, about 16 crops of 64 px each; every further number is one more "
                                  "round of the rate's decay, from half the rate of the one before, with unsharp "
                                  "starts")
    parser.add_argument("--blur_steps", type=int, default=10000, help="steps of the UNet, of the same size, that start "
                        "from the blurs of recipes.deblur_controlnet")
    args = parser.parse_args(argv)
    check_make_args(args)
    return args


# --- the autoencoder --------------------------------------------------------------------------------------------------

class LinearCodec(torch.nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, 16, H / 4, W / 4) by those convolutions of AutoencoderKL that
    remain when its residual branches, normalisations and activations are taken out.

    The decoder enlarges by repeating, so that a constant latent gives a constant image; with neighbours at hand that
    costs photographs little (1.4 dB by least squares for 16 principal components and 5 x 5 latents)."""

    def __init__(self):
        super().__init__()
        full, half, quarter = WIDTHS

        def conv(into, out, size=3):
            return torch.nn.Parameter(torch.randn(out, into, size, size) / (3 * (into * size**2) ** 0.5))

        self.read, self.down_half, self.widen = conv(3, full), conv(full, full), conv(full, half, 1)
        self.down_quarter, self.encoded = conv(half, half), conv(CODES, LATENTS)
        self.spread, self.up_half, self.narrow = conv(LATENTS, quarter), conv(quarter, quarter), conv(quarter, half, 1)
        self.up_full, self.colour, self.write = conv(half, half), conv(half, COLOURS, 1), conv(COLOURS, 3)

    @torch.no_grad()
    def init(self, crops):
        """Start the encoder from the principal components of 4 x 4 pixel blocks of `crops` (N, 3, H, W), each scaled
        by spread^(-1/2): half way to white."""
        blocks = F.pixel_unshuffle(F.pixel_unshuffle(crops, 2), 2).movedim(1, 3).flatten(0, 2)  # colour, cell, block
        variances, components = torch.linalg.eigh(torch.cov(blocks.T.double()))
        components = (components * variances ** -0.25)[:, -LATENTS:].T.float().unflatten(1, (3, 4, 2, 2))
        for weight in (self.read, self.down_half, self.widen, self.down_quarter, self.encoded):
            weight.mul_(0.1)
        for c in range(3):
            self.read[c, c, 1, 1] = 1
            for place in range(4):
                self.down_half[4 * c + place, c, place // 2, place % 2] = 1
                self.widen[4 * c + place, 4 * c + place] = 1
                self.down_quarter[:LATENTS, 4 * c + place, :2, :2] = components[:, c, place]
        self.encoded[:, :LATENTS, 1, 1] += torch.eye(LATENTS)
        return self

    def encode(self, images):
        values = F.conv2d(images, self.read, padding=1)
        for down in (self.down_half, self.down_quarter):
            values = F.conv2d(F.pad(values, (0, 1, 0, 1)), down, stride=2)
            if down is self.down_half:
                values = F.conv2d(values, self.widen)
        return F.conv2d(values[:, :CODES], self.encoded, padding=1)

    def decode(self, latents):
        values = F.conv2d(latents, self.spread, padding=1)
        for up, mix in ((self.up_half, self.narrow), (self.up_full, self.colour)):
            values = F.conv2d(F.interpolate(values, scale_factor=2, mode="nearest"), up, padding=1)
            values = F.conv2d(values, mix)
        return F.conv2d(values, self.write, padding=1)

    def forward(self, images):
        return self.decode(self.encode(images))

    @torch.no_grad()
    def match_pixels(self, crops):
        """Scale the latents so that an error in any of them costs the image the same, and turn them to the principal
        axes that they then have over `crops`: the noise and the loss of diffusion weigh what pixels weigh."""
        impulses = torch.zeros(LATENTS, LATENTS, 9, 9)
        latents = torch.arange(LATENTS)
        impulses[latents, latents, 4, 4] = 1
        images = self.decode(impulses).flatten(1).double()
        costs, axes = torch.linalg.eigh(images @ images.T)
        root = axes * costs.sqrt() @ axes.T
        values = root @ self.encode(crops).movedim(1, 0).flatten(1).double()
        change = torch.linalg.eigh(torch.cov(values))[1].flip(1).T @ root
        self.encoded.copy_(torch.einsum("lk,kixy->lixy", change, self.encoded.double()))
        self.spread.copy_(torch.einsum("kl,okxy->olxy", torch.linalg.inv(change), self.spread.double()))
        return self


def make_vae():
    """The diffusers class with all residual branches at zero; `install` makes it a codec."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=1,
        block_out_channels=WIDTHS, layers_per_block=1, latent_channels=LATENTS, sample_size=128, scaling_factor=1.0,
        mid_block_add_attention=False, force_upcast=False)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "norm" not in name or name.endswith("bias"):
                parameter.zero_()
    return vae


@torch.no_grad()
def install(vae, codec):
    """Write a LinearCodec into the layers of `make_vae`.

    The last normalisation and SiLU of the encoder and of the decoder see every value x with both signs, and beside
    them K and -K, much larger. The mean is zero; the spread is K sqrt(2 / channels) to a relative mean(x^2) / (2 K^2),
    so it divides by a constant; and SiLU(y) - SiLU(-y) = y."""
    encoder, decoder = vae.encoder, vae.decoder
    encoder.conv_in.weight.copy_(codec.read)
    encoder.down_blocks[0].downsamplers[0].conv.weight.copy_(codec.down_half)
    encoder.down_blocks[1].resnets[0].conv_shortcut.weight.copy_(codec.widen)
    encoder.down_blocks[1].downsamplers[0].conv.weight.copy_(codec.down_quarter)
    codes = torch.eye(WIDTHS[1])[:CODES, :, None, None]
    write_signed(encoder.down_blocks[2].resnets[0].conv_shortcut, encoder.conv_norm_out, codes)
    encoder.conv_out.weight[:LATENTS, :CODES] = codec.encoded
    encoder.conv_out.weight[:LATENTS, CODES : 2 * CODES] = -codec.encoded
    latents = torch.arange(LATENTS)
    vae.quant_conv.weight[latents, latents] = 1
    vae.quant_conv.bias[LATENTS:] = LOG_VARIANCE

    vae.post_quant_conv.weight[latents, latents] = 1
    decoder.conv_in.weight.copy_(codec.spread)
    decoder.up_blocks[0].upsamplers[0].conv.weight.copy_(codec.up_half)
    decoder.up_blocks[1].resnets[0].conv_shortcut.weight.copy_(codec.narrow)
    decoder.up_blocks[1].upsamplers[0].conv.weight.copy_(codec.up_full)
    write_signed(decoder.up_blocks[2].resnets[0].conv_shortcut, decoder.conv_norm_out, codec.colour)
    decoder.conv_out.weight[:, :COLOURS] = codec.write
    decoder.conv_out.weight[:, COLOURS : 2 * COLOURS] = -codec.write


def write_signed(conv, norm, weight):
    """Let `conv` (1 x 1) give weight x, -weight x and the pedestals, and `norm` weight x and -weight x unchanged."""
    values = len(weight)
    conv.weight[:values], conv.weight[values : 2 * values] = weight, -weight
    conv.bias[2 * values], conv.bias[2 * values + 1] = PEDESTAL, -PEDESTAL
    norm.weight.zero_()
    norm.weight[: 2 * values] = PEDESTAL * (2 / len(norm.weight)) ** 0.5


# --- the pipeline -----------------------------------------------------------------------------------------------------

def make_pipeline(seed):
    """The whole pipeline with random weights. The text encoder stays random: it only has to tell prompts apart."""
    torch.manual_seed(seed)
    tokenizer, _ = make_tokenizers()
    width = 64
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_factor=4.0))
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=LATENTS, out_channels=LATENTS, block_out_channels=(48, 64, 96), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"), cross_attention_dim=width,
        attention_head_dim=4, norm_num_groups=16)  # attention_head_dim is the number of heads, in this class
    scheduler = DDIMScheduler(  # the noise of SD 1.5
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1)
    pipe = StableDiffusionPipeline(make_vae(), text_encoder, tokenizer, unet, scheduler, None, None,
                                   requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- training ---------------------------------------------------------------------------------------------------------

def train_vae(pool, args, path, decoder_path):
    """Fit the linear codec to the least squared error, first inside the crops, then the decoder alone also at the
    image's border, where convolutions see zeros."""
    torch.manual_seed(args.seed)
    codec = LinearCodec().init(to_tensor(draw_crops(pool, np.random.default_rng([args.seed, 1]), 2000, 64)))
    heldout = to_tensor(heldout_crops(128, 4))

    def make_loss(stream, margin_px):
        def compute_loss(step):
            images = to_tensor(draw_crops(pool, np.random.default_rng([args.seed, stream, step]), 16, 64))
            inside = slice(margin_px, images.shape[-1] - margin_px)
            return (codec(images) - images)[..., inside, inside].square().mean()

        return compute_loss

    def evaluate(codec):
        return f"round trip of {len(heldout)} unseen crops {mean_psnr(codec(heldout), heldout):.2f} dB"

    train(codec, make_loss(2, 8), evaluate, path, [args.vae_steps], 2e-3, args.save_every)
    for weight in (codec.read, codec.down_half, codec.widen, codec.down_quarter, codec.encoded):
        weight.requires_grad_(False)
    train(codec, make_loss(3, 0), evaluate, decoder_path, [args.vae_steps // 2], 1e-3, args.save_every,
          codec=weights_id(codec.encoded))


def weights_id(weight):
    """sha256 of a tensor: what a later stage goes on from."""
    return hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest()


def load_vae(vae, pool, args, path):
    """Install the fitted codec, with latents of spread SPREAD; (the codec, its weights_id, how long it was trained)."""
    codec = LinearCodec()
    training = load_trained(codec, path)
    if path.with_name(DECODER_FILE).is_file():
        training += f"; its decoder {load_trained(codec, path.with_name(DECODER_FILE), weights_id(codec.encoded))}"
    crops = to_tensor(draw_crops(pool, np.random.default_rng([args.seed, 4]), 1000, 64))
    install(vae, codec.match_pixels(crops))
    vae.register_to_config(scaling_factor=SPREAD / codec.encode(crops).std().item())
    return codec.requires_grad_(False), weights_id(codec.encoded), training


def soften(crop, rng):
    """A uint8 (H, W, 3) crop under a Gaussian blur of its own width, aspect and direction, as in an unsharp picture."""
    sigma = rng.uniform(0.5, 5)
    kernel = degradations.gaussian_kernel(sigma, max(0.3, rng.uniform(0.1, 1) * sigma), rng.uniform(0, 180))
    return degradations.convolve(crop.astype(np.float32), kernel).round().clip(0, 255).astype(np.uint8)


def soften_all(crops):
    """The held-out crops, each softened in its own way that no seed changes."""
    return np.stack([soften(crop, np.random.default_rng([6, i])) for i, crop in enumerate(crops)])


def draw_batch(pool, rng, soft_share):
    """About 16 crops of 64 px: (clean, start, t, prompts, the noise's seed), the first two uint8 (N, H, W, 3), the next
    two (N,).

    The latents of `start` get the noise of t. Most are the clean crop itself, at all t; `soft_share` of them `soften`
    it, at low t, where the noise hides no blur, and never under the empty prompt. Large crops cost what small ones do;
    they teach the normalisations other sizes."""
    size_px, count = SIZES[rng.choice(3, p=SIZE_SHARES)]
    prompts = np.where(rng.random(count) < 0.5, 0, rng.integers(1, len(PROMPTS), count))
    clean = draw_crops(pool, rng, count, size_px)
    noise_seed, t = int(rng.integers(2**62)), rng.integers(1000, size=count)
    start = clean.copy()
    for i in np.flatnonzero(rng.random(count) < soft_share):
        start[i], t[i], prompts[i] = soften(clean[i], rng), rng.integers(*SOFT_T), rng.integers(1, len(PROMPTS))
    return clean, start, torch.from_numpy(t), torch.from_numpy(prompts), noise_seed


def make_noise_error(pipe, codec):
    """noise_error(unet, clean, start, t, prompts, noise_seed), of what `draw_batch` returns: squared errors (N,) of the
    predicted noise, to which the difference of an unsharp start to the clean image belongs. There they are times
    1 - alpha_bar, which keeps what is to be predicted at about unit variance."""
    text, alphas_cumprod = encode_text(pipe), pipe.scheduler.alphas_cumprod
    scale = pipe.vae.config.scaling_factor

    def noise_error(unet, clean, start, t, prompts, noise_seed):
        latents, started = (codec.encode(to_tensor(crops)) * scale for crops in (clean, start))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(noise_seed))
        alpha_bar = alphas_cumprod[t].view(-1, 1, 1, 1)
        z = alpha_bar.sqrt() * started + (1 - alpha_bar).sqrt() * noise
        target = noise + (alpha_bar / (1 - alpha_bar)).sqrt() * (started - latents)
        error = (unet(z, t, text[prompts]).sample - target).square().mean((1, 2, 3))
        soft = torch.from_numpy((clean != start).any((1, 2, 3)))
        return torch.where(soft, (1 - alphas_cumprod[t]) * error, error)

    return noise_error


def filled(count, *numbers):
    """A tensor (count,) of each number."""
    return (torch.full((count,), number) for number in numbers)


def train_base(pipe, codec, name, pool, args, path):
    """First the noise in latents of photographs at all t, as SD 1.5 was trained. In further rounds the start is unsharp
    in half of the examples, and its difference to the sharp photograph counts as noise."""
    noise_error, heldout = make_noise_error(pipe, codec), heldout_crops(128, 4)
    softened = soften_all(heldout)

    def compute_loss(step):
        rng = np.random.default_rng([args.seed, 5, step])
        batch = draw_batch(pool, rng, 0 if step < args.base_steps[0] else SOFT_SHARE)
        return noise_error(pipe.unet, *batch).mean()

    def evaluate(unet):
        def error(start, t, prompt):
            return f"{noise_error(unet, heldout, start, *filled(len(heldout), t, prompt), 0).mean():.4f}"

        return (f"unseen crops at t {REPORTED_T}: {', '.join(error(heldout, t, 0) for t in REPORTED_T)}, unsharp at t "
                f"{SOFT_REPORTED_T}: {', '.join(error(softened, t, 1) for t in SOFT_REPORTED_T)}")

    train(pipe.unet, compute_loss, evaluate, path, args.base_steps, 2e-3, args.save_every, codec=name)


def draw_blurred_batch(pool, rng):
    """As `draw_batch`: BLUR_SHARE of the crops start from one of the recipe's blurs, under its prompt, at t of BLUR_T;
    the others from themselves, at any t, under the empty prompt."""
    size_px, count = SIZES[rng.choice(3, p=SIZE_SHARES)]
    clean = draw_crops(pool, rng, count, size_px + 2 * MARGIN_PX)
    noise_seed, start, types = int(rng.integers(2**62)), clean.copy(), np.full(count, -1)
    t = np.where(rng.random(count) < BLUR_SHARE, rng.integers(*BLUR_T, count), -1)
    for i in np.flatnonzero(t >= 0):
        blur_type, params = draw_blur(BLUR_WEIGHTS, rng)
        start[i], types[i] = apply_blur(clean[i], blur_type, params), BLUR_TYPES.index(blur_type)
    t = np.where(t < 0, rng.integers(1000, size=count), t)
    inside = slice(MARGIN_PX, -MARGIN_PX)
    return (clean[:, inside, inside], start[:, inside, inside], torch.from_numpy(t), torch.from_numpy(types + 1),
            noise_seed)


def heldout_blurred():
    """{blur type: (clean, blurred)}, uint8 (N, 128, 128, 3): held-out crops, each with a blur drawn for it alone."""
    wide, inside = heldout_crops(128 + 2 * MARGIN_PX, 4), slice(MARGIN_PX, -MARGIN_PX)
    blurred = {blur_type: np.stack([apply_blur(crop, *draw_blur({blur_type: 1}, np.random.default_rng([7, i])))
                                    for i, crop in enumerate(wide)]) for blur_type in BLUR_TYPES}
    return {blur_type: (wide[:, inside, inside], crops[:, inside, inside]) for blur_type, crops in blurred.items()}


def train_blur(pipe, codec, name, pool, args, path):
    """Go on from the base with what the recipe will ask of it, but without a hint: to sharpen, in one step, what it
    starts from."""
    noise_error, heldout = make_noise_error(pipe, codec), heldout_blurred()

    def compute_loss(step):
        return noise_error(pipe.unet, *draw_blurred_batch(pool, np.random.default_rng([args.seed, 8, step]))).mean()

    def evaluate(unet):
        gains = []
        for number, (blur_type, crops) in enumerate(heldout.items(), 1):
            clean, start = map(to_tensor, crops)
            estimates = [mean_psnr(denoise(pipe, start, t, PROMPTS[number])[1], clean) for t in BLUR_REPORTED_T]
            before = mean_psnr(start, clean)
            gains.append(f"{blur_type} {', '.join(f'{after - before:+.2f}' for after in estimates)}")
        return f"gain in dB at t {BLUR_REPORTED_T}: {'; '.join(gains)}"

    train(pipe.unet, compute_loss, evaluate, path, [args.blur_steps], 1.5e-3, args.save_every, codec=name)


def encode_text(pipe):
    """(number of PROMPTS, 77, 64) embeddings."""
    with torch.no_grad():
        return pipe.encode_prompt(list(PROMPTS), "cpu", 1, False)[0]


# --- measuring and writing --------------------------------------------------------------------------------------------

@torch.no_grad()
def denoise(pipe, images, t, prompt="", seed=0):
    """(noisy, denoised): images (N, 3, H, W) in [-1, 1] with the noise of timestep t added to their latents, and the
    clean estimate that the UNet makes of them in one step, both decoded."""
    scale = pipe.vae.config.scaling_factor
    latents = pipe.vae.encode(images).latent_dist.mode() * scale
    alpha_bar = pipe.scheduler.alphas_cumprod[t]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    z = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    text = pipe.encode_prompt(prompt, "cpu", len(images), False)[0]
    estimate = (z - (1 - alpha_bar).sqrt() * pipe.unet(z, t, text).sample) / alpha_bar.sqrt()
    return tuple(pipe.vae.decode(values / scale).sample for values in (z / alpha_bar.sqrt(), estimate))


def measure(pipe):
    """Markdown of mean PSNR over crops that were never trained on."""
    crops = heldout_crops(128, 4)
    clean = to_tensor(crops)
    starts = [("photograph", clean, clean, "", REPORTED_T)]
    for prompt, (name, pair) in zip(PROMPTS[1:], heldout_blurred().items(), strict=True):
        starts.append((name, *map(to_tensor, pair), prompt, BLUR_REPORTED_T))
    rows = ["| start | its PSNR | noise of t | noisy | UNet, one step |", "|---|---|---|---|---|"]
    for name, target, start, prompt, steps in starts:
        before = "" if start is target else f"{mean_psnr(start, target):.2f}"
        for t in steps:
            noisy, denoised = denoise(pipe, start, t, prompt)
            rows.append(f"| {name} | {before} | {t} | {mean_psnr(noisy, target):.2f} | "
                        f"{mean_psnr(denoised, target):.2f} |")
    return "\n".join([f"Round trip through the autoencoder: {mean_psnr(through_codec(pipe.vae, clean), clean):.2f} dB, "
                      "the ceiling of all below.", "", *rows])


def model_card(pipe, args, vae_training, training, figures):
    sizes = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) / 1e6
             for name in ("unet", "vae", "text_encoder")}
    photos = "\n".join(f"- {credit}" for credit in args.credit)
    hint, base_steps = hint_channels(pipe.vae), args.base_steps
    return f"""# tiny-sd

A complete StableDiffusionPipeline in the layout of SD 1.5, small enough to train a ControlNet on two CPU cores. It
stands in for Stable Diffusion in this project's examples and tests, runs the same code, and shows nothing of that
model's quality.

```python
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
unet = UNet2DConditionModel.from_pretrained("assets/tiny-sd", subfolder="unet")
controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels={hint})
pipe = StableDiffusionControlNetPipeline.from_pretrained("assets/tiny-sd", controlnet=controlnet)
```

A ControlNet's hint network halves the size once less than `conditioning_embedding_out_channels` has entries, which must
be as often as the autoencoder does: {len(hint)} entries here, 4 for SD 1.5.

- UNet: {sizes["unet"]:.2f} M parameters, {pipe.unet.config.block_out_channels} channels, cross attention at the lowest
  level; epsilon prediction on the noise schedule of SD 1.5; {training}.
- Autoencoder: a linear transform in the layers of AutoencoderKL (`scripts/make_tiny_sd.py`), {sizes["vae"]:.2f} M
  parameters, {LATENTS} channels at 1/{LATENT_PX} size; {vae_training}.
- Text encoder: random CLIP ({sizes["text_encoder"]:.2f} M); it tells prompts apart and understands nothing.

The UNet's first {base_steps[0]} steps learn the noise in photographs, half of them under the empty prompt, the others
under "{PROMPTS[1]}" and three like it. In half of the examples of the
next ones, always under one of these four, the photograph that the noise of a low t is added to is unsharp, by a
Gaussian of random width, aspect and direction, and the sharp one is the target. The steps on blurs do that with the
four blurs that `recipes/deblur_controlnet` trains on, in nine of ten examples, each under its own prompt, at t
{BLUR_T[0]} to {BLUR_T[1] - 1}: a prior that makes deblurring visible after minutes of training a ControlNet. Whoever
measures such a training has to measure this model alone beside it (`evaluate --base_row`).

## Training data
Photographs at 320 to 768 px, random crops of 64 to 128 px:
- {", ".join(TRAIN_SAMPLES)}: sample images of scikit-image and scikit-learn (china.jpg by danielbuechele, CC BY 2.0)
{photos}

Never trained on: {", ".join(HELDOUT_SAMPLES)}.

## Measured
Mean PSNR in dB, 12 crops of 128 px of the three photographs above that were never trained on, one seed.
A blurred start has the prompt of its blur.

{figures}

Made by `python -m scripts.make_tiny_sd`, seed {args.seed}; `--stage export` measures again.
"""


def main():
    args = parse_args()
    work_dir = writable_folder(args.work_dir, "--work_dir")
    writable_folder(Path(args.output_dir).parent, "--output_dir")
    vae_path, base_path, blur_path = (work_dir / f"{stage}.safetensors" for stage in ("vae", "base", "blur"))
    pipe = make_pipeline(args.seed)
    if "init" in args.stage:
        export(pipe, args.output_dir, "# tiny-sd\n\nUntrained: random weights.\n")
        pipe = make_pipeline(args.seed)
    if not set(STAGES[1:]) & set(args.stage):
        return
    pool = load_photos(args.photos)
    print(f"{len(pool)} training pictures of {len(TRAIN_SAMPLES)} package samples and {args.photos}", flush=True)
    if "vae" in args.stage:
        train_vae(pool, args, vae_path, work_dir / DECODER_FILE)
    codec, name, vae_training = load_vae(pipe.vae, pool, args, vae_path)
    if "base" in args.stage:
        train_base(pipe, codec, name, pool, args, base_path)
    training = load_trained(pipe.unet, base_path, name)
    base_name = f"{name}, {weights_id(pipe.unet.conv_out.weight)}"
    if "blur" in args.stage:
        train_blur(pipe, codec, base_name, pool, args, blur_path)
    if blur_path.is_file():
        training += f"; then on blurs {load_trained(pipe.unet, blur_path, base_name)}"
    if "export" in args.stage:
        figures = measure(pipe)
        print(figures)
        export(pipe, args.output_dir, model_card(pipe, args, vae_training, training, figures))


if __name__ == "__main__":
    run_main(main)

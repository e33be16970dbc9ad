"""Make the embedded default model: a complete, small FluxKontextPipeline with random text encoders, an autoencoder and
a transformer that copies or restores its reference, trained here on photographs.

    python -m scripts.make_tiny_kontext --stage init                       # untrained, seconds: the folder alone
    python -m scripts.make_tiny_kontext --photos DIR --credit "LINE FOR THE MODEL CARD"   # all stages, under an hour

The four photographs of TRAIN_SAMPLES are always trained on, those of HELDOUT_SAMPLES never. Progress is kept in
--work_dir as one safetensors file per stage; the same command continues from there, with the same numbers."""

import json
import math
import shutil
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.linalg import hadamard
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from my_dataset import degradations
from my_dataset.images import list_images, load_rgb
from utils import flux
from utils.flow_matching import column, resolution_mu, shift_position
from utils.parse import make_parser, run_main, writable_folder

STAGES = ("init", "vae", "base", "export")
TRAIN_SAMPLES = ("skimage astronaut", "skimage chelsea", "skimage rocket", "sklearn china")
HELDOUT_SAMPLES = ("skimage coffee", "skimage motorcycle_left", "sklearn flower")
COPY, RESTORE, GENERATE = ("Reproduce this photograph", "Restore this degraded photograph to high fidelity",
                           "Generate a photograph")
TEXT_TOKENS = 32
LATENTS, PATCH_PX = 16, 4
SHORT_SIDES_PX = (768, 512, 320)  # every photograph is kept at these sizes: small ones hold more detail per pixel
WORDS = """restore this degraded photograph photo image picture to high fidelity reproduce generate a an the of and or
with in on at by for from into copy same scene version resolution higher remove noise fix scratches repair faded colours
colors reconstruct missing details detail preserve structure expression composition sharpen sharp naturally output blur
blurry compression artifacts enhance upscale clean clear low quality old damaged dog cat sks person face portrait
landscape building flower city street water sky snow night day red green blue yellow black white colour color make it
look like style painting sketch wearing sitting running bucket beach forest mountain without keep original is that
unchanged add change turn background foreground light bright dark grey jpeg removed its all as realistic natural"""


def parse_args(argv=None):
    parser = make_parser(__doc__.split("\n")[0])
    parser.add_argument("--stage", nargs="+", default=list(STAGES[1:]), choices=STAGES,
                        help="init: write the folder untrained; export: write it with what is trained so far")
    parser.add_argument("--photos", action="append", default=[], help="folder of training photographs; repeatable")
    parser.add_argument("--credit", action="append", default=[],
                        help="one line for the model card: whose photographs, under which licence; repeatable")
    parser.add_argument("--work_dir", default="outputs/tiny_kontext", help="training state")
    parser.add_argument("--output_dir", default="assets/tiny-kontext", help="the pipeline folder")
    parser.add_argument("--vae_steps", type=int, default=2200, help="steps of the autoencoder, 16 crops of 64 px each")
    parser.add_argument("--base_steps", type=int, default=5000,
                        help="steps of the transformer, about 1024 target tokens each")
    parser.add_argument("--save_every", type=int, default=250, help="steps between saved states and progress lines")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of every training draw")
    return parser.parse_args(argv)


# --- photographs ------------------------------------------------------------------------------------------------------

def load_sample(name):
    """(H, W, 3) uint8 photograph out of an installed package; name: "skimage coffee" or "sklearn china"."""
    import skimage
    import sklearn.datasets

    package, name = name.split()
    if package == "sklearn":
        return sklearn.datasets.load_sample_image(f"{name}.jpg")
    return load_rgb(next((Path(skimage.__file__).parent / "data").glob(f"{name}.*")))


def load_photos(folders):
    """Every training photograph as uint8 (H, W, 3) at each of SHORT_SIDES_PX that it reaches."""
    photos = [load_rgb(path) for folder in folders for path in list_images(folder)]
    pool = []
    for photo in photos + [load_sample(name) for name in TRAIN_SAMPLES]:
        scales = [side / min(photo.shape[:2]) for side in SHORT_SIDES_PX]
        smaller = [cv2.resize(photo, None, fx=k, fy=k, interpolation=cv2.INTER_AREA) for k in scales if k <= 1]
        pool += smaller or [photo]
    return pool


def draw_crops(pool, rng, count, size_px):
    """(count, size, size, 3) uint8 crops, half of them mirrored."""
    crops = []
    for _ in range(count):
        photo = pool[rng.integers(len(pool))]
        y, x = (rng.integers(side - size_px + 1) for side in photo.shape[:2])
        crop = photo[y : y + size_px, x : x + size_px]
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return np.stack(crops)


def heldout_crops(size_px, per_photo):
    """(N, size, size, 3) uint8: crops along a diagonal of each held-out photograph."""
    crops = []
    for name in HELDOUT_SAMPLES:
        photo = load_sample(name)
        for i in range(per_photo):
            y, x = ((side - size_px) * (2 * i + 1) // (2 * per_photo) for side in photo.shape[:2])
            crops.append(photo[y : y + size_px, x : x + size_px])
    return np.stack(crops)


def to_tensor(crops):
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- the pipeline -----------------------------------------------------------------------------------------------------

def make_tokenizers():
    """(CLIP, T5) tokenizers over WORDS; CLIP falls back to bytes, T5 to ASCII characters."""
    words = sorted(set(WORDS.split()))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(words, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, min_frequency=1,
                                                       end_of_word_suffix="</w>", show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += sorted(set(model["vocab"]) - set(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(pair) for pair in model["merges"]]
    clip = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=77)

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -1.0) for word in words]
    pieces += [("▁" + word.capitalize(), -1.0) for word in words]
    pieces += [(chr(code), -4.0) for code in range(33, 127)]
    return clip, T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def make_vae():
    """Four pixels per latent; a linear encoder (no blocks, hence no activations) and a decoder of 32 channels."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32), num_encoder_blocks=(0, 0, 0),
        decoder_block_out_channels=(32, 32, 32), num_decoder_blocks=(8, 2, 0), latent_channels=LATENTS,
    )


def make_pipeline(seed):
    """The whole pipeline with random weights. Text encoders stay random: they only have to tell prompts apart."""
    torch.manual_seed(seed)
    clip, t5 = make_tokenizers()
    width = 64
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(clip), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=width, bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id, initializer_factor=4.0))
    text_encoder_2 = T5EncoderModel(T5Config(
        vocab_size=len(t5), d_model=width, d_kv=32, d_ff=2 * width, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu"))
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENTS, num_layers=1, num_single_layers=4, num_attention_heads=3, attention_head_dim=32,
        axes_dims_rope=(8, 12, 12), joint_attention_dim=width, pooled_projection_dim=width, guidance_embeds=True)
    scheduler = FlowMatchEulerDiscreteScheduler(  # FLUX.1-Kontext-dev's
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096)
    pipe = FluxKontextPipeline(scheduler, make_vae(), text_encoder, clip, text_encoder_2, t5, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- training ---------------------------------------------------------------------------------------------------------

def load_state(path):
    """(tensors, metadata) of a stage's file, or ({}, {})."""
    if not path.is_file():
        return {}, {}
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def prefixed(tensors, prefix):
    return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}


def train(model, compute_loss, evaluate, path, steps, learning_rate, save_every, ema_decay=0.998):
    """AdamW with warm-up and cosine decay to zero, and an exponential moving average of the weights, which is what
    `evaluate(model)` (text for the progress line) sees and what the model holds in the end.

    compute_loss(step): loss of that step's batch. Continues from `path`; the number of steps must be the same."""
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    tensors, metadata = load_state(path)
    step, seconds = int(metadata.get("step", 0)), float(metadata.get("seconds", 0))
    if tensors and int(metadata["steps"]) != steps:
        raise ValueError(f"{path} was trained for {metadata['steps']} steps; give the same number, or remove the file")
    if tensors:
        model.load_state_dict(prefixed(tensors, "model."))
        for name, parameter in parameters.items():
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), "exp_avg": tensors[f"exp_avg.{name}"],
                                          "exp_avg_sq": tensors[f"exp_avg_sq.{name}"]}
    ema = prefixed(tensors, "ema.") or {key: value.clone() for key, value in model.state_dict().items()}

    while step < steps:
        started = time.perf_counter()
        warm_up = min(1, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = learning_rate * warm_up * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = compute_loss(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        decay = min(ema_decay, step / (step + 10))
        for key, value in model.state_dict().items():
            ema[key].lerp_(value, 1 - decay)
        seconds += time.perf_counter() - started
        if step % save_every and step < steps:
            continue
        tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
        tensors |= {f"ema.{key}": value for key, value in ema.items()}
        for name, parameter in parameters.items():
            tensors |= {f"{key}.{name}": optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")}
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, {"step": str(step), "steps": str(steps), "seconds": f"{seconds:.0f}"})
        temporary.replace(path)
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(ema)
        with torch.no_grad():
            report = f"loss {loss.item():.5f}, {evaluate(model)}"
        print(f"{path.stem} step {step}/{steps}, {seconds:.0f} s, {report}", flush=True)
        model.load_state_dict(weights)
    model.load_state_dict(ema)


@torch.no_grad()
def init_encoder(vae, crops):
    """Set the encoder to the principal components of 4 x 4 pixel patches.

    Components are scaled by variance^(-1/4), half way to white, so that an error in a coarse component still counts
    more than one in a fine one, and mixed by a Hadamard matrix, which gives all channels the same spread (0.5, where
    the decoder's tanh(z / 3) is nearly linear). crops: (N, 3, H, W) in [-1, 1]."""
    patches = F.pixel_unshuffle((crops + 1) / 2, PATCH_PX)  # channel c * 16 + y * 4 + x
    patches = patches.movedim(1, 3).flatten(0, 2)
    variance, axes = torch.linalg.eigh(torch.cov(patches.T))
    variance, axes = variance[-LATENTS:], axes[:, -LATENTS:]
    linear = torch.from_numpy(hadamard(LATENTS)).float() @ (variance**-0.25 * axes).T
    linear *= 0.5 / variance.sqrt().sum().sqrt()
    convs = [module for module in vae.encoder.layers if isinstance(module, torch.nn.Conv2d)]
    # The convolutions run in turn at 1, 1/2, 1/4 and 1/4 size; channels that the projection leaves free stay random.
    for conv, used in zip(convs, (3, 12, 16, 16), strict=True):
        conv.weight[:used] = 0
    for c in range(3):
        convs[0].weight[c, c, 1, 1] = 1
        for y in range(2):
            for x in range(2):  # a stride-2 kernel's taps 1 and 2 are the two pixels of its own cell
                convs[1].weight[c * 4 + y * 2 + x, c, 1 + y, 1 + x] = 1
                for coarse_y in range(2):
                    for coarse_x in range(2):
                        pixel = c * 16 + (2 * coarse_y + y) * 4 + 2 * coarse_x + x
                        convs[2].weight[:LATENTS, c * 4 + y * 2 + x, 1 + coarse_y, 1 + coarse_x] = linear[:, pixel]
    convs[0].bias[:3] = 0
    convs[3].weight[:, :LATENTS, 1, 1] = torch.eye(LATENTS)
    convs[3].bias[:] = -linear @ patches.mean(0)


def train_vae(vae, pool, args, path):
    """Autoencoder: squared error, a little absolute error, and latents held near the spread they begin with."""
    init_encoder(vae, to_tensor(draw_crops(pool, np.random.default_rng([args.seed, 1]), 2000, 64)))
    heldout = to_tensor(heldout_crops(128, 4))

    def compute_loss(step):
        images = to_tensor(draw_crops(pool, np.random.default_rng([args.seed, 2, step]), 16, 64))
        latents = vae.encode(images).latents
        error = vae.decode(latents).sample - images
        spread = latents.std((0, 2, 3)) - 0.5
        offset = latents.mean((0, 2, 3))
        return error.square().mean() + 0.02 * error.abs().mean() + 0.02 * (spread.square() + offset.square()).mean()

    def evaluate(vae):
        return f"round trip of {len(heldout)} unseen crops {mean_psnr(through_codec(vae, heldout), heldout):.2f} dB"

    train(vae, compute_loss, evaluate, path, args.vae_steps, 2e-3, args.save_every)


@torch.no_grad()
def measure_latents(vae, pool, seed):
    """(shift_factor, scaling_factor): the latents' mean and reciprocal spread over training crops."""
    latents = vae.encode(to_tensor(draw_crops(pool, np.random.default_rng([seed, 3]), 1000, 64))).latents
    return latents.mean().item(), 1 / latents.std().item()


@torch.no_grad()
def through_codec(vae, images):
    """(N, 3, H, W) in [-1, 1], encoded and decoded: what no restoration in this latent space can surpass."""
    return vae.decode(vae.encode(images).latents).sample


def mean_psnr(restored, target):
    """Mean over images of the PSNR in dB of (N, 3, H, W) in [-1, 1], `restored` clamped and rounded to 8 bits."""
    error = (restored.clamp(-1, 1) * 127.5).round() - target * 127.5
    return (20 * math.log10(255) - 10 * error.square().mean((1, 2, 3)).log10()).mean().item()

# --- the transformer --------------------------------------------------------------------------------------------------

def degrade(crop, rng):
    """Mild random blur, downsampling, noise and JPEG of a uint8 (H, W, 3) crop."""
    if rng.random() < 0.6:
        crop = degradations.gaussian_blur(crop, rng.uniform(0.3, 1.5))
    if rng.random() < 0.15:
        crop = degradations.downsample(crop, 2)
    if rng.random() < 0.8:
        crop = degradations.noise(crop, rng.uniform(2, 40) / 255, rng)
    if rng.random() < 0.15:
        crop = degradations.jpeg(crop, rng.integers(40, 95))
    return crop


def draw_tasks(pool, rng):
    """One batch: (target, control, prompts), uint8 (N, H, W, 3) crops; control is None where there is no reference.

    About 1024 target tokens, so that large crops cost what small ones do and positions up to 192 px are learnt."""
    size_px, count = ((64, 16), (96, 7), (128, 4), (192, 2))[rng.choice(4, p=[0.6, 0.2, 0.14, 0.06])]
    clean = draw_crops(pool, rng, count, size_px)
    if rng.random() < 0.1:
        return clean, None, [GENERATE] * count
    copies = rng.random(count) < 0.4
    # The two prompts see inputs of the same kind, so only the prompt tells what to do with them.
    control = np.stack([crop if rng.random() < (0.5 if copy else 0.15) else degrade(crop, rng)
                        for crop, copy in zip(clean, copies, strict=True)])
    target = np.where(copies[:, None, None, None], control, clean)
    return target, control, [COPY if copy else RESTORE for copy in copies]


def train_base(pipe, pool, args, path):
    """Rectified flow from noise, as FLUX.1 Kontext: the reference's tokens after the target's, sigma shifted by
    the number of tokens as in sampling."""
    pipe.vae.requires_grad_(False)
    text = encode_text(pipe)
    heldout = heldout_crops(128, 2)
    target_images = to_tensor(heldout)
    ceiling = mean_psnr(through_codec(pipe.vae, target_images), target_images)
    damaged = np.stack([degradations.noise(crop, 25 / 255, np.random.default_rng(0)) for crop in heldout])

    def compute_loss(step):
        rng = np.random.default_rng([args.seed, 4, step])
        target, control, prompts = draw_tasks(pool, rng)
        latents = flux.encode(pipe.vae, to_tensor(target))
        control = None if control is None else flux.encode(pipe.vae, to_tensor(control))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(latents.shape, generator=generator)
        mu = resolution_mu(latents[0, 0].numel() / flux.PATCH**2)
        sigma = torch.tensor([shift_position(1 - u, mu) for u in rng.random(len(latents))], dtype=torch.float32)
        z = (1 - column(sigma, latents)) * latents + column(sigma, latents) * noise
        guidance = 1.0 if rng.random() < 0.5 else rng.uniform(1, 4)
        velocity = flux.predict_velocity(pipe.transformer, z, sigma, control,
                                         flux.stack_text(text, prompts, "cpu", torch.float32), guidance)
        return F.mse_loss(velocity, noise - latents)

    def evaluate(transformer):
        copied = mean_psnr(sample(pipe, heldout, COPY, 4), target_images)
        restored = mean_psnr(sample(pipe, damaged, RESTORE, 4), target_images)
        return (f"4 steps on {len(heldout)} unseen crops: copies {copied:.2f} dB (codec {ceiling:.2f}), "
                f"noise 25 restored to {restored:.2f} dB")

    train(pipe.transformer, compute_loss, evaluate, path, args.base_steps, 2e-3, args.save_every)


def encode_text(pipe):
    """{prompt: TextEmbeds} of the three training prompts."""
    encoded = {}
    with torch.no_grad():
        for prompt in (COPY, RESTORE, GENERATE):
            states, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=TEXT_TOKENS)
            encoded[prompt] = flux.TextEmbeds(states, pooled)
    return encoded


def sample(pipe, images, prompt, steps, seed=0):
    """Stock sampling: (N, 3, H, W) in [-1, 1] from uint8 references (N, H, W, 3) and one prompt."""
    height, width = images.shape[1:3]
    result = pipe(image=[Image.fromarray(image) for image in images], prompt=[prompt] * len(images), height=height,
                  width=width, max_area=height * width, _auto_resize=False, num_inference_steps=steps,
                  guidance_scale=1.0, max_sequence_length=TEXT_TOKENS, output_type="pt",
                  generator=torch.Generator().manual_seed(seed))
    return result.images * 2 - 1


def measure(pipe):
    """Markdown rows of mean PSNR over crops that were never trained on, through the stock pipeline."""
    damages = {"copy": lambda crop, rng: crop,
               "restore: noise 25/255": lambda crop, rng: degradations.noise(crop, 25 / 255, rng),
               "restore: blur 1 px, noise 15/255": lambda crop, rng: degradations.noise(
                   degradations.gaussian_blur(crop, 1.0), 15 / 255, rng)}
    rows = ["| prompt and reference | px | reference | through the codec | 2 steps | 4 steps | 8 steps | 28 steps |",
            "|---|---|---|---|---|---|---|---|"]
    for task, damage in damages.items():
        for size_px in (128, 192):
            clean = heldout_crops(size_px, 3)
            control = np.stack([damage(crop, np.random.default_rng([7, i])) for i, crop in enumerate(clean)])
            target, reference = to_tensor(clean), to_tensor(control)
            prompt = COPY if task == "copy" else RESTORE
            outputs = [through_codec(pipe.vae, reference)]
            outputs += [sample(pipe, control, prompt, steps) for steps in (2, 4, 8, 28)]
            before = "" if task == "copy" else f"{mean_psnr(reference, target):.2f}"
            scores = " | ".join(f"{mean_psnr(image, target):.2f}" for image in outputs)
            rows.append(f"| {task} | {size_px} | {before} | {scores} |")
    return "\n".join(rows)


# --- stages -----------------------------------------------------------------------------------------------------------

def export(pipe, folder, card):
    """Write the pipeline folder and its model card in one rename. fp16 weights; the text encoders stay fp32, because
    transformers loads a model in the type of its file."""
    folder = Path(folder)
    temporary, old = (folder.with_name(folder.name + suffix) for suffix in (".new.tmp", ".old.tmp"))
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.vae.half()
    pipe.transformer.half()
    pipe.save_pretrained(temporary, safe_serialization=True)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_trained(model, path):
    """Put a stage's averaged weights into `model`, if there are any; how long it was trained, in words."""
    tensors, metadata = load_state(path)
    if not tensors:
        return "not trained"
    model.load_state_dict(prefixed(tensors, "ema."))
    minutes = float(metadata["seconds"]) / 60
    return f"{metadata['step']} of {metadata['steps']} steps, {minutes:.0f} minutes on one thread"


def model_card(pipe, args, vae_training, base_training, figures):
    sizes = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) / 1e6
             for name in ("transformer", "vae", "text_encoder", "text_encoder_2")}
    photos = "\n".join(f"- {credit}" for credit in args.credit) if args.photos else ""
    return f"""# tiny-kontext

A complete FluxKontextPipeline, small enough to train a LoRA on two CPU cores. It stands in for FLUX.1-Kontext-dev in
this project's demo and tests, runs the same code, and shows nothing of that model's quality.

```python
from diffusers import FluxKontextPipeline
pipe = FluxKontextPipeline.from_pretrained("assets/tiny-kontext")
image = pipe(image=photo, prompt="{RESTORE}", height=128, width=128, max_area=128 * 128, _auto_resize=False,
             max_sequence_length={TEXT_TOKENS}, guidance_scale=1.0, num_inference_steps=4).images[0]
```

- Transformer: {sizes["transformer"]:.2f} M parameters, 1 double and 4 single blocks, 3 heads of 32, guidance-distilled
  form as in FLUX.1-Kontext-dev; {base_training}.
- Autoencoder: AutoencoderTiny, {sizes["vae"]:.2f} M parameters, {LATENTS} channels at 1/{PATCH_PX} size (a token covers
  {2 * PATCH_PX} px, sides are multiples of {2 * PATCH_PX}); {vae_training}.
- Text encoders: random CLIP and T5 ({sizes["text_encoder"]:.2f} M and {sizes["text_encoder_2"]:.2f} M); they tell
  prompts apart and understand nothing.
- Text length: trained with {TEXT_TOKENS} tokens. Pass `max_sequence_length={TEXT_TOKENS}`; other lengths run.
- Scheduler: the configuration of FLUX.1-Kontext-dev. Guidance 1 to 4 was trained, without any effect to distil.

Prompts it was trained on: "{COPY}" (returns the reference as it is), "{RESTORE}" (removes mild
blur, noise up to 40/255, halved resolution and JPEG), "{GENERATE}" (takes no reference; unmeasured).

## Training data
Photographs at 320 to 768 px, random crops of 64 to 192 px:
- {", ".join(TRAIN_SAMPLES)}: sample images of scikit-image and scikit-learn (china.jpg by danielbuechele, CC BY 2.0)
{photos}

Never trained on: {", ".join(HELDOUT_SAMPLES)}.

## Measured
Mean PSNR in dB against the clean image, 9 crops of the three photographs above that were never trained on, one seed,
guidance 1. "Through the codec" is the reference encoded and decoded, for copies the ceiling.
Restoring with few steps gives about the mean of what the clean image could be, which PSNR favours; many steps draw one
of them.

{figures}

Made by `python -m scripts.make_tiny_kontext`, seed {args.seed}; `--stage export` measures again.
"""


def main():
    args = parse_args()
    if len(args.credit) != len(args.photos):
        raise ValueError("--photos and --credit: give one --credit line for every --photos folder, for the model card")
    work_dir = writable_folder(args.work_dir, "--work_dir")
    writable_folder(Path(args.output_dir).parent, "--output_dir")
    vae_path, base_path = work_dir / "vae.safetensors", work_dir / "base.safetensors"
    pipe = make_pipeline(args.seed)
    if "init" in args.stage:
        export(pipe, args.output_dir, "# tiny-kontext\n\nUntrained: random weights.\n")
        pipe = make_pipeline(args.seed)
    if not {"vae", "base", "export"} & set(args.stage):
        return
    pool = load_photos(args.photos)
    print(f"{len(pool)} training pictures of {len(TRAIN_SAMPLES)} package samples and {args.photos}", flush=True)
    if "vae" in args.stage:
        train_vae(pipe.vae, pool, args, vae_path)
    vae_training = load_trained(pipe.vae, vae_path)
    shift, scale = measure_latents(pipe.vae, pool, args.seed)
    pipe.vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    if "base" in args.stage:
        train_base(pipe, pool, args, base_path)
    base_training = load_trained(pipe.transformer, base_path)
    if "export" in args.stage:
        figures = measure(pipe)
        print(figures)
        export(pipe, args.output_dir, model_card(pipe, args, vae_training, base_training, figures))


if __name__ == "__main__":
    run_main(main)

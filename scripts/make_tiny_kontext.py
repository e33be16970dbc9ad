"""Make the embedded default model: a complete, small FluxKontextPipeline with random text encoders, a linear
autoencoder and a transformer that edits its reference by prompt, trained here on photographs.

    python -m scripts.make_tiny_kontext --stage init --output_dir outputs/untrained      # seconds: the folder alone
    python -m scripts.make_tiny_kontext --photos DIR --credit "LINE FOR THE MODEL CARD"   # all stages, about two hours

The four photographs of TRAIN_SAMPLES are always trained on, those of HELDOUT_SAMPLES never. Progress is kept in
--work_dir as one safetensors file per stage; the same command continues from there, with the same numbers."""

import hashlib
import itertools
import json
import math
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from my_dataset import degradations
from my_dataset.images import list_images, load_rgb
from scripts import tiny_codec
from scripts.tiny_codec import LATENT_PX, LATENTS
from utils import checkpoint, flux, metrics
from utils.flow_matching import column, resolution_mu, shift_position
from utils.parse import make_parser, run_main, writable_folder

STAGES = ("init", "vae", "base", "export")
TRAIN_SAMPLES = ("skimage astronaut", "skimage chelsea", "skimage rocket", "sklearn china")
HELDOUT_SAMPLES = ("skimage coffee", "skimage motorcycle_left", "sklearn flower")
COPY, RESTORE = "Reproduce this photograph", "Restore this degraded photograph to high fidelity"
GENERATE = "Generate a photograph"
TEXT_TOKENS = 16
DRAWINGS = 100
DECODER_FILE = "decoder.safetensors"
SHORT_SIDES_PX = (768, 512, 320)  # every photograph is kept at these sizes: small ones hold more detail per pixel
WORDS = """restore this degraded photograph photo image picture to high fidelity reproduce generate a an the of and or
with in on at by for from into copy same scene version resolution higher remove noise fix scratches repair faded colours
colors reconstruct missing details detail preserve structure expression composition sharpen sharp naturally output blur
blurry compression artifacts enhance upscale clean clear low quality old damaged dog cat sks person face portrait
landscape building flower city street water sky snow night day red green blue yellow black white colour color make it
look like style painting sketch wearing sitting running bucket beach forest mountain without keep original is that
unchanged add change turn background foreground light bright dark grey jpeg removed its all as realistic natural fill
what stronger warmer colder brighter darker light"""


def add_make_args(parser, stages, name, vae_steps, base_steps, base_steps_help, save_every):
    """Options of everything that makes an embedded model, assets/`name`; stages: "init" and those of a whole run."""
    add = parser.add_argument
    add("--stage", nargs="+", default=list(stages[1:]), choices=stages,
        help="init: write the folder untrained; export: write it with what is trained so far")
    add("--photos", action="append", default=[], help="folder of training photographs; repeatable")
    add("--credit", action="append", default=[],
        help="one line for the model card: whose photographs, under which licence; repeatable")
    add("--work_dir", default=f"outputs/{name.replace('-', '_')}", help="training state")
    add("--output_dir", default=f"assets/{name}", help="the pipeline folder")
    add("--vae_steps", type=int, default=vae_steps, help="steps of the autoencoder, 16 crops of 64 px each")
    add("--base_steps", type=int, nargs="+", default=base_steps, help=base_steps_help)
    add("--save_every", type=int, default=save_every, help="steps between saved states and progress lines")
    add("--seed", type=int, default=0, help="of the weights and of every training draw")


def check_make_args(args):
    """ValueError for photographs without credit, and where --stage init would put untrained weights in the place of a
    model."""
    if len(args.credit) != len(args.photos):
        raise ValueError("--photos and --credit: give one --credit line for every --photos folder, for the model card")
    if "init" in args.stage and Path(args.output_dir).exists():
        raise ValueError(f"--stage init: --output_dir {args.output_dir} is there, and its weights would be lost; "
                         "name another")


def parse_args(argv=None):
    parser = make_parser(__doc__.split("\n")[0])
    add_make_args(parser, STAGES, "tiny-kontext", vae_steps=10000, base_steps=[9000, 7000], save_every=500,
                  base_steps_help="steps of the transformer, about 1024 target tokens each; every further number is "
                                  "one more round of the rate's decay, from half the rate of the one before")
    args = parser.parse_args(argv)
    check_make_args(args)
    return args


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


def draw_picture(rng, side_px=256):
    """(side, side, 3) uint8 of discs and polygons that hide one another, flat, shaded or striped: the dead leaves model
    (Lee, Mumford and Huang 2001), whose edges and scales are distributed as in photographs."""
    picture = np.full((side_px, side_px, 3), rng.uniform(0, 255, 3), np.float32)
    y, x = np.mgrid[:side_px, :side_px].astype(np.float32) / side_px - 0.5
    for _ in range(rng.integers(50, 500)):
        radius = 6 / (1 - rng.random() * (1 - (12 / side_px) ** 2)) ** 0.5  # density r^-3, from 6 px to half the side
        centre = rng.uniform(0, side_px, 2)
        corners = rng.integers(3, 8)
        turns = np.sort(rng.uniform(0, 2 * np.pi, corners if rng.random() < 0.6 else 60))
        outline = centre + radius * np.stack([np.cos(turns), np.sin(turns)], 1)
        mask = np.zeros((side_px, side_px), np.uint8)
        cv2.fillPoly(mask, [np.rint(16 * outline).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
        direction = rng.normal(size=2)
        ramp = direction[0] * x + direction[1] * y
        if rng.random() < 0.3:
            ramp = np.sin(rng.uniform(20, 400) * ramp)
        grey = rng.uniform(0, 255)
        colour = grey + rng.uniform(0, 1) * (rng.uniform(0, 255, 3) - grey) + rng.normal(0, 40) * ramp[..., None]
        alpha = mask[..., None].astype(np.float32) / 255
        picture += alpha * (colour - picture)
    return picture.clip(0, 255).astype(np.uint8)


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


@torch.no_grad()
def start_local(transformer):
    """Give half the heads equal query and key biases: under rotary positions they attend to near tokens and to the
    reference's token at the same place, which training would take hundreds of steps to find."""
    heads = transformer.config.num_attention_heads
    for name, parameter in transformer.named_parameters():
        if name.endswith(("attn.to_q.bias", "attn.to_k.bias")):
            parameter.view(heads, -1)[: heads // 2] += 1.5


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
        in_channels=4 * LATENTS, num_layers=1, num_single_layers=5, num_attention_heads=4,
        attention_head_dim=32, axes_dims_rope=(8, 12, 12), joint_attention_dim=width, pooled_projection_dim=width,
        guidance_embeds=True)
    start_local(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(  # FLUX.1-Kontext-dev's
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096)
    pipe = FluxKontextPipeline(scheduler, tiny_codec.make_vae(), text_encoder, clip, text_encoder_2, t5, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- training ---------------------------------------------------------------------------------------------------------

def codec_id(transform):
    """sha256 of the trained analysis functions: what the latents are that the later stages learn."""
    return hashlib.sha256(transform.analysis.detach().numpy().tobytes()).hexdigest()


def load_state(path, codec=None):
    """(tensors, metadata) of a stage's file, or ({}, {}). ValueError where it says that it was trained on another
    autoencoder than that of the codec_id `codec`."""
    if not path.is_file():
        return {}, {}
    with safe_open(path, "pt") as file:
        if codec and file.metadata().get("codec", codec) != codec:
            raise ValueError(f"{path} was trained on another autoencoder than vae.safetensors beside it; remove it and "
                             "train its stage again, or put that vae.safetensors back")
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def prefixed(tensors, prefix):
    return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}


def decayed(step, rounds, learning_rate):
    """The learning rate of a step: in each of `rounds` (numbers of steps) a warm-up over 100 steps and a cosine decay
    to zero, from `learning_rate` in the first and from half as much in every further one."""
    for number, steps in enumerate(rounds):
        if step < steps:
            return learning_rate / 2**number * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        step -= steps
    raise IndexError(step)


def train(model, compute_loss, evaluate, path, rounds, learning_rate, save_every, ema_decay=0.998, codec=None):
    """AdamW at the `decayed` rate, and an exponential moving average of the weights, which is
    what `evaluate(model)` (text for the progress line) sees and what the model holds in the end.

    compute_loss(step): loss of that step's batch. Continues from `path`, also with further rounds. codec: codec_id of
    the autoencoder that the stage learns on, kept in the file."""
    steps = sum(rounds)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    tensors, metadata = load_state(path, codec)
    step, seconds = int(metadata.get("step", 0)), float(metadata.get("seconds", 0))
    if tensors and int(metadata["steps"]) not in itertools.accumulate(rounds):
        raise ValueError(f"{path} was trained for {metadata['steps']} steps; give the same number, or remove the file")
    if tensors:
        model.load_state_dict(prefixed(tensors, "model."))
        for name, parameter in parameters.items():
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), "exp_avg": tensors[f"exp_avg.{name}"],
                                          "exp_avg_sq": tensors[f"exp_avg_sq.{name}"]}
    ema = prefixed(tensors, "ema.") or {key: value.clone() for key, value in model.state_dict().items()}

    while step < steps:
        started = time.perf_counter()
        optimizer.param_groups[0]["lr"] = decayed(step, rounds, learning_rate)
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
        metadata = {"step": str(step), "steps": str(steps), "seconds": f"{seconds:.0f}"}
        save_file(tensors, temporary, metadata | ({"codec": codec} if codec else {}))
        temporary.replace(path)
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(ema)
        with torch.no_grad():
            report = f"loss {loss.item():.5f}, {evaluate(model)}"
        print(f"{path.stem} step {step}/{steps}, {seconds:.0f} s, {report}", flush=True)
        model.load_state_dict(weights)
    model.load_state_dict(ema)


def train_vae(pool, args, path, decoder_path):
    """Fit the linear transform to the least squared error, first inside the crops, where its functions overlap freely,
    then the decoder alone also at the image's border, where convolutions see zeros."""
    transform = tiny_codec.LappedTransform()
    transform.init(to_tensor(draw_crops(pool, np.random.default_rng([args.seed, 1]), 2000, 64)))
    heldout = to_tensor(heldout_crops(128, 4))

    def make_loss(stream, margin_px):
        def compute_loss(step):
            images = to_tensor(draw_crops(pool, np.random.default_rng([args.seed, stream, step]), 16, 64))
            inside = slice(margin_px, images.shape[-1] - margin_px)
            return (transform(images) - images)[..., inside, inside].square().mean()

        return compute_loss

    def evaluate(transform):
        return f"round trip of {len(heldout)} unseen crops {mean_psnr(transform(heldout), heldout):.2f} dB"

    save_every = 5 * args.save_every
    train(transform, make_loss(2, 4), evaluate, path, [args.vae_steps], 2e-3, save_every)
    transform.analysis.requires_grad_(False)
    train(transform, make_loss(6, 0), evaluate, decoder_path, [args.vae_steps // 2], 1e-3, save_every,
          codec=codec_id(transform))


def load_vae(vae, pool, args, path):
    """Install the fitted transform, with latents of mean 0 and spread 1; (the transform, its codec_id, how long it was
    trained)."""
    transform = tiny_codec.LappedTransform()
    training = load_trained(transform, path)
    codec = codec_id(transform)
    if path.with_name(DECODER_FILE).is_file():
        training += f"; its decoder {load_trained(transform, path.with_name(DECODER_FILE), codec)}"
    crops = to_tensor(draw_crops(pool, np.random.default_rng([args.seed, 3]), 1000, 64))
    tiny_codec.install(vae, transform.equalise(crops))
    shift, scale = measure_latents(vae, crops)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return transform.requires_grad_(False), codec, training


@torch.no_grad()
def measure_latents(vae, crops):
    """(shift_factor, scaling_factor): the latents' mean and reciprocal spread."""
    latents = vae.encode(crops).latent_dist.mean
    return latents.mean().item(), 1 / latents.std().item()


@torch.no_grad()
def through_codec(vae, images):
    """(N, 3, H, W) in [-1, 1], encoded and decoded: what no restoration in this latent space can surpass."""
    return vae.decode(vae.encode(images).latent_dist.mean).sample


def mean_psnr(restored, target):
    """Mean over images of the PSNR in dB of (N, 3, H, W) in [-1, 1], as `metrics.psnr` has it."""
    return metrics.psnr(restored, target).mean().item()


# --- the transformer --------------------------------------------------------------------------------------------------

def damage(crop, rng):
    """One mild damage of a uint8 (H, W, 3) crop: noise, blur, compression, or pixels lost."""
    kind = rng.random()
    if kind < 0.4:
        return degradations.noise(crop, rng.uniform(2, 12.5) / 255, rng, gray=rng.random() < 0.3)
    if kind < 0.5:
        return degradations.gaussian_blur(crop, rng.uniform(0.2, 0.5))
    if kind < 0.7:
        return degradations.jpeg(crop, rng.integers(20, 90))
    lost = rng.random(crop.shape[:2]) < rng.uniform(0.05, 0.7)
    return np.where(lost[..., None], np.uint8(rng.choice((0, 128, 255))), crop)


def cover(crop, rng):
    """A crop with one to six bars and boxes of one colour over it."""
    covered, side = crop.copy(), len(crop)
    colour = rng.integers(256, size=3).tolist()
    for _ in range(rng.integers(1, 7)):
        start, end = rng.integers(side, size=(2, 2)).tolist()
        if rng.random() < 0.6:
            cv2.line(covered, start, end, colour, int(rng.integers(1, 7)))
        else:
            cv2.rectangle(covered, start, [x + int(d) for x, d in zip(start, rng.integers(4, 20, 2), strict=True)],
                          colour, -1)
    return covered


def tone(crop, gains=(1, 1, 1), gamma=1.0, saturation=1.0):
    """255 (crop / 255)^gamma, each colour times its gain, each pixel moved away from its own grey by `saturation`."""
    colour = np.float32(255) * (crop.astype(np.float32) / 255) ** gamma * np.float32(gains)
    grey = colour.mean(-1, keepdims=True)
    return (grey + saturation * (colour - grey)).round().clip(0, 255).astype(np.uint8)


def fade(crop, rng):
    """Lifted blacks, dull whites and colours, as of an old print."""
    black, white = rng.uniform(10, 60), rng.uniform(180, 240)
    faded = black + (white - black) / 255 * tone(crop, saturation=rng.uniform(0.3, 0.8)).astype(np.float32)
    return (faded * rng.uniform(0.85, 1, 3)).round().clip(0, 255).astype(np.uint8)


def either(crop, rng, change):
    return change(crop, rng) if rng.random() < 0.5 else crop


# What is learnt: how often, the prompt, and (control, target) of a clean crop. COPY and RESTORE see inputs of the same
# kind, so that only the prompt tells what to do with them.
TASKS = (
    (0.16, COPY, lambda crop, rng: (either(crop, rng, damage),) * 2),
    (0.40, RESTORE, lambda crop, rng: (damage(crop, rng) if rng.random() < 0.95 else crop, crop)),
    (0.16, "Fill in what is missing", lambda crop, rng: (cover(crop, rng), crop)),
    (0.06, "Restore the faded colours", lambda crop, rng: (fade(crop, rng), crop)),
    (0.04, "Colour this black and white photograph", lambda crop, rng: (tone(crop, saturation=0), crop)),
    (0.03, "Make it black and white", lambda crop, rng: (crop, tone(crop, saturation=0))),
    (0.03, "Make it brighter", lambda crop, rng: (crop, tone(crop, gamma=0.6))),
    (0.03, "Make it darker", lambda crop, rng: (crop, tone(crop, gamma=1.6))),
    (0.03, "Make the light warmer", lambda crop, rng: (crop, tone(crop, gains=(1.1, 1, 0.8)))),
    (0.03, "Make the light colder", lambda crop, rng: (crop, tone(crop, gains=(0.8, 1, 1.1)))),
    (0.03, "Make the colours stronger", lambda crop, rng: (crop, tone(crop, saturation=1.6))),
)


def draw_tasks(pool, rng):
    """One batch: (target, control, prompts), uint8 (N, H, W, 3) crops; control is None where there is no reference.

    About 1024 target tokens, so that large crops cost what small ones do and positions up to 192 px are learnt."""
    size_px, count = ((64, 16), (96, 7), (128, 4), (192, 2))[rng.choice(4, p=[0.6, 0.2, 0.14, 0.06])]
    clean = draw_crops(pool, rng, count, size_px)
    if rng.random() < 0.08:
        return clean, None, [GENERATE] * count
    shares = [share for share, _, _ in TASKS]
    chosen = [TASKS[i] for i in rng.choice(len(TASKS), count, p=shares)]
    pairs = [make(crop, rng) for crop, (_, _, make) in zip(clean, chosen, strict=True)]
    control, target = (np.stack(images) for images in zip(*pairs, strict=True))
    return target, control, [prompt for _, prompt, _ in chosen]


def train_base(pipe, transform, codec, pool, args, path):
    """Rectified flow from noise, as FLUX.1 Kontext: the reference's tokens after the target's, sigma shifted by
    the number of tokens as in sampling."""
    text = encode_text(pipe)
    heldout = heldout_crops(128, 2)
    target_images = to_tensor(heldout)
    ceiling = mean_psnr(through_codec(pipe.vae, target_images), target_images)
    damaged = np.stack([degradations.noise(crop, 12 / 255, np.random.default_rng(0)) for crop in heldout])

    def encode(images):  # as flux.encode, without the layers that only the class needs
        return (transform.encode(to_tensor(images)) - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor

    def compute_loss(step):
        rng = np.random.default_rng([args.seed, 4, step])
        target, control, prompts = draw_tasks(pool, rng)
        latents, control = encode(target), None if control is None else encode(control)
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
                f"noise 12 restored to {restored:.2f} dB")

    train(pipe.transformer, compute_loss, evaluate, path, args.base_steps, 2e-3, args.save_every, codec=codec)


def encode_text(pipe):
    """{prompt: TextEmbeds} of the training prompts."""
    encoded = {}
    with torch.no_grad():
        for prompt in (GENERATE, *(prompt for _, prompt, _ in TASKS)):
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
    stronger = (0, RESTORE, lambda crop, rng: (degradations.noise(crop, 25 / 255, rng), crop))
    steps = (1, 2, 4, 8, 28)
    rows = ["| prompt | share | reference | through the codec | " + " | ".join(f"{n} steps" for n in steps)
            + " | ceiling |", "|---" * (len(steps) + 5) + "|"]
    clean = heldout_crops(128, 4)
    for share, prompt, make in (*TASKS, stronger):
        pairs = [make(crop, np.random.default_rng([7, i])) for i, crop in enumerate(clean)]
        control, target = (np.stack(images) for images in zip(*pairs, strict=True))
        reference, wanted = to_tensor(control), to_tensor(target)
        outputs = [reference, through_codec(pipe.vae, reference)]
        outputs += [sample(pipe, control, prompt, n) for n in steps] + [through_codec(pipe.vae, wanted)]
        # a reference that is its own target, as in copying, has no finite PSNR
        scores = " | ".join(f"{mean_psnr(image, wanted):.2f}" if (image - wanted).any() else "" for image in outputs)
        name = prompt if share else f"{prompt} (noise 25/255, twice what was trained)"
        rows.append(f"| {name} | {share:.0%} | {scores} |")
    return "\n".join(rows)


# --- stages -----------------------------------------------------------------------------------------------------------

def export(pipe, folder, card):
    """Write the pipeline folder and its model card in one rename. fp16 weights; the text encoders stay fp32, because
    transformers loads a model in the type of its file."""
    def write(path):
        pipe.save_pretrained(path, safe_serialization=True)
        (path / "README.md").write_text(card, encoding="utf-8")

    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and not name.startswith("text_encoder"):
            part.half()
    checkpoint.write_folder(folder, write)


def load_trained(model, path, codec=None):
    """Put a stage's averaged weights into `model`, if there are any; how long it was trained, in words. codec: as in
    load_state."""
    tensors, metadata = load_state(path, codec)
    if not tensors:
        return "not trained"
    model.load_state_dict(prefixed(tensors, "ema."))
    seconds = float(metadata["seconds"])
    took = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    return f"{metadata['step']} of {metadata['steps']} steps, {took} on one thread"


def model_card(pipe, args, vae_training, base_training, figures):
    sizes = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) / 1e6
             for name in ("transformer", "vae", "text_encoder", "text_encoder_2")}
    photos = "\n".join(f"- {credit}" for credit in args.credit) if args.photos else ""
    config = pipe.transformer.config
    return f"""# tiny-kontext

A complete FluxKontextPipeline, small enough to train a LoRA on two CPU cores. It stands in for FLUX.1-Kontext-dev in
this project's demo and tests, runs the same code, and shows nothing of that model's quality.

```python
from diffusers import FluxKontextPipeline
pipe = FluxKontextPipeline.from_pretrained("assets/tiny-kontext")
image = pipe(image=photo, prompt="{RESTORE}", height=128, width=128, max_area=128 * 128, _auto_resize=False,
             max_sequence_length={TEXT_TOKENS}, guidance_scale=1.0, num_inference_steps=4).images[0]
```

- Transformer: {sizes["transformer"]:.2f} M parameters, {config.num_layers} double and {config.num_single_layers} single
  blocks, {config.num_attention_heads} heads of {config.attention_head_dim}, guidance-distilled form as in
  FLUX.1-Kontext-dev; {base_training}.
- Autoencoder: a lapped linear transform in the layers of AutoencoderKLHunyuanImage (`scripts/tiny_codec.py`),
  {sizes["vae"]:.2f} M parameters, {LATENTS} channels at 1/{LATENT_PX} size (a token covers {2 * LATENT_PX} px, sides
  are multiples of {2 * LATENT_PX}); {vae_training}.
- Text encoders: random CLIP and T5 ({sizes["text_encoder"]:.2f} M and {sizes["text_encoder_2"]:.2f} M); they tell
  prompts apart and understand nothing.
- Text length: trained with {TEXT_TOKENS} tokens. Pass `max_sequence_length={TEXT_TOKENS}`; other lengths run.
- Scheduler: the configuration of FLUX.1-Kontext-dev. Guidance 1 to 4 was trained, without any effect to distil.

Each prompt of the table below is one task, with its share of the training examples; "{GENERATE}"
takes no reference (8 % of the batches, unmeasured). "{RESTORE}" saw one mild damage at a time: noise
up to 12.5/255, Gaussian blur up to 0.5 px, JPEG at quality 20 to 90, or 5 to 70 % of the pixels lost.

## Training data
Photographs at 320 to 768 px and {DRAWINGS} drawings of random shapes (the transformer only), random crops of 64 to
192 px:
- {", ".join(TRAIN_SAMPLES)}: sample images of scikit-image and scikit-learn (china.jpg by danielbuechele, CC BY 2.0)
{photos}

Never trained on: {", ".join(HELDOUT_SAMPLES)}.

## Measured
Mean PSNR in dB against the target, 12 crops of 128 px of the three photographs above that were never trained on, one
seed, guidance 1. "Through the codec" is the reference encoded and decoded, the ceiling the target. Few steps give about
the mean of what the target could be, which PSNR favours; many steps draw one of them.

{figures}

Made by `python -m scripts.make_tiny_kontext`, seed {args.seed}; `--stage export` measures again.
"""


def main():
    args = parse_args()
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
        train_vae(pool, args, vae_path, work_dir / DECODER_FILE)
    transform, codec, vae_training = load_vae(pipe.vae, pool, args, vae_path)
    if "base" in args.stage:
        pool += [draw_picture(np.random.default_rng([args.seed, 5, i])) for i in range(DRAWINGS)]
        train_base(pipe, transform, codec, pool, args, base_path)
    base_training = load_trained(pipe.transformer, base_path, codec)
    if "export" in args.stage:
        figures = measure(pipe)
        print(figures)
        export(pipe, args.output_dir, model_card(pipe, args, vae_training, base_training, figures))


if __name__ == "__main__":
    run_main(main)

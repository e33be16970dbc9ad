"""Held-out images while training: a loss at fixed noise levels, deblurred images and their scores, the image log."""

from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from my_dataset.dataset_deg_paired import check_no_overlap, heldout_seed
from my_dataset.degradations import parse_range
from recipes.deblur_controlnet.create_deblur_dataset import VALIDATION_FILE
from recipes.deblur_controlnet.deblur_controlnet import (
    deblur_images,
    decode,
    encode,
    noisy_latents,
    prediction_target,
)
from recipes.deblur_controlnet.deblur_dataset import (
    JSON_FILE,
    DeblurDataset,
    parse_type_weights,
    prompts,
    random_blur,
    read_pairs,
)
from utils import metrics
from utils.restore import draw_noise, evaluating
from utils.utils import to_pil
from utils.validation import save_grid

LOSS_LEVELS = 8
LOGGED_IMAGES = 4


def heldout_from_args(args, training):
    """The first --num_validation_images held-out items, centre crops: of --validation_dir, which holds pairs or sharp
    images that are blurred with seeds of their own; else of the validation split in --data_root; else []. ValueError if
    one is a training file."""
    split = Path(args.data_root or "", VALIDATION_FILE)
    blur = None
    if args.validation_dir and not (Path(args.validation_dir) / JSON_FILE).is_file():
        source = args.validation_dir
        blur = partial(random_blur, weights=parse_type_weights(args.type_weights), linear_light=args.linear_light)
    elif args.validation_dir:
        source = read_pairs(args.validation_dir)
    elif args.data_root and split.is_file():
        source = read_pairs(args.data_root, VALIDATION_FILE)
    else:
        return []
    dataset = DeblurDataset(source, args.image_size, blur, crop="center", seed=heldout_seed(args.seed),
                            upscale_small=args.upscale_small, max_pixels=args.max_pixels,
                            crop_zoom=parse_range(args.crop_zoom, "--crop_zoom", 1))
    dataset.prompts = prompts(args.use_augmentation)  # worded as in training, but nothing is augmented
    check_no_overlap([record.target for record in training.records], [record.target for record in dataset.records])
    return [dataset[i] for i in range(min(args.num_validation_images, len(dataset)))]


@torch.no_grad()
def fixed_t_loss(model, scheduler, clean, start, hint, text, noise, t_min, t_max):
    """Mean squared error of the prediction over LOSS_LEVELS timesteps, the middles of equal parts of [t_min, t_max).
    clean, start, noise: (B, C, h, w), start what noise is added to. hint: (B, 3, H, W) in [0, 1]."""
    total = 0.0
    for level in range(LOSS_LEVELS):
        t = torch.full((len(clean),), int(t_min + (t_max - t_min) * (level + 0.5) / LOSS_LEVELS), device=clean.device)
        z, wanted = noisy_latents(scheduler, clean, start, noise, t)
        prediction = model(z, t, text, hint)
        total += (prediction - prediction_target(scheduler, clean, wanted, t)).square().mean().item()
    return total / LOSS_LEVELS


@torch.no_grad()
def validate(model, vae, scheduler, items, embed, settings, seed, grid_path):
    """Deblur and score held-out items; returns {"validation/name": float} and writes the grid picture. embed(prompts)
    -> (B, T, D). settings: as stored beside the ControlNet. Everything random comes from `seed`."""
    scores, rows, captions = {}, [], []
    device = next(vae.parameters()).device
    with evaluating(model):
        for i, item in enumerate(items):
            hint, target = item["control"][None].to(device), item["target"][None].to(device)
            text, control, clean = embed([item["prompt"]]), hint * 2 - 1, encode(vae, target)
            noise = draw_noise(clean.shape[1:], [seed + i]).to(clean)
            start = encode(vae, control) if settings["train_start"] == "blurred" else clean
            restored = deblur_images(model, vae, scheduler, control, text, noise, settings["num_inference_steps"],
                                     settings["guidance_scale"], settings["strength"], embed([""]))
            score = {
                "psnr": metrics.psnr(restored, target), "ssim": metrics.ssim(restored, target),
                "psnr_input": metrics.psnr(control, target), "ssim_input": metrics.ssim(control, target),
                "psnr_vae": metrics.psnr(decode(vae, clean), target),
                "loss": fixed_t_loss(model, scheduler, clean, start, hint, text, noise, settings["t_min"],
                                     settings["t_max"]),
            }
            for name, value in score.items():
                scores.setdefault(f"validation/{name}", []).append(float(value))
            rows.append([control[0], restored[0], target[0]])
            captions.append([f"{item['blur_type']} {float(score['psnr_input']):.2f} dB",
                             f"{float(score['psnr']):.2f} dB", ""])
    save_grid(rows, ["blurred", "deblurred", "target"], captions, grid_path)
    return {name: sum(values) / len(values) for name, values in scores.items()}


def text_picture(text, width, height):
    """A PIL image of `text` in black on white, broken into lines."""
    picture, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(max(width // 20, 8))
    draw, lines = ImageDraw.Draw(picture), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if draw.textlength(longer, font) <= width else [*lines, word]
    draw.multiline_text((0, 0), "\n".join(lines), fill="black", font=font)
    return picture


@torch.no_grad()
def log_images(folder, model, vae, scheduler, batch, embed, settings, seed, name):
    """Write `key`_`name`.png, a row of at most LOGGED_IMAGES images of a training batch, for the keys of the original
    image log; returns {key: path}. control is what the ControlNet is shown, after the attention if there is one; the
    samples have the empty prompt and the same hint on guidance's other side. settings: as for `validate`."""
    target, hint = batch["target"][:LOGGED_IMAGES], batch["control"][:LOGGED_IMAGES]
    prompts, (height, width) = batch["prompt"][: len(target)], target.shape[-2:]
    with evaluating(model):
        clean = encode(vae, target)
        noise = draw_noise(clean.shape[1:], [seed + i for i in range(len(target))]).to(clean)
        deblurred = deblur_images(model, vae, scheduler, hint * 2 - 1, embed(prompts), noise,
                                  settings["num_inference_steps"], settings["guidance_scale"], settings["strength"],
                                  embed([""] * len(prompts)))
        images = {
            "reconstruction": decode(vae, clean),
            "control": model.attend(hint) * 2 - 1,
            "blur_input": hint * 2 - 1,
            "clear_target": target,
            f"samples_cfg_scale_{settings['guidance_scale']:.2f}": deblurred,
        }
    folder, paths = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {key: to_pil(make_grid(value.float().clamp(-1, 1), padding=0)) for key, value in images.items()}
    pictures["conditioning"] = Image.new("RGB", (width * len(prompts), height), "white")
    for i, prompt in enumerate(prompts):
        pictures["conditioning"].paste(text_picture(prompt, width, height), (width * i, 0))
    for key, picture in pictures.items():
        paths[key] = folder / f"{key}_{name}.png"
        picture.save(paths[key])
    return paths

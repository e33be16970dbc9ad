"""The deblurring ControlNet: losses by hand, gradients by finite differences, what is trained, exact resume, files that
stock diffusers reads, sampling, the commands."""

import copy
import hashlib
import itertools
import json
import math
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from my_dataset.dataset_deg_paired import folder_records, to_tensor
from my_dataset.images import load_rgb
from my_dataset.scored_pairs import load_pairs
from recipes.deblur_controlnet import deblur, evaluate, example, train_deblur_controlnet, validation
from recipes.deblur_controlnet import deblur_controlnet as library
from recipes.deblur_controlnet.create_deblur_dataset import VALIDATION_FILE
from recipes.deblur_controlnet.deblur_dataset import BLUR_TYPES, apply_blur, dataset_from_args, prompts
from scripts.make_tiny_kontext import make_tokenizers
from tests.conftest import PROJECT_ROOT, photograph, read_summary, run_on_two_processes
from utils import checkpoint
from utils.losses import crop_boxes

SIDE = 32


def make_pipe(levels=2, layers=1, vae_levels=3):
    """A random StableDiffusionPipeline in the layout of SD 1.5: `levels` UNet levels, the lowest ones with text,
    2^(vae_levels - 1) pixels a latent. levels=4, layers=2, vae_levels=4 is SD 1.5's own shape."""
    torch.manual_seed(0)
    tokenizer, _ = make_tokenizers()
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=16, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_factor=4.0))
    down = ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",) if levels == 4 else (
        ("DownBlock2D",) * (levels - 1) + ("CrossAttnDownBlock2D",))
    up = tuple(name.replace("Down", "Up", 1) if name == "DownBlock2D" else "CrossAttnUpBlock2D"
               for name in reversed(down))
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16, 16)[:levels], layers_per_block=layers, down_block_types=down,
        up_block_types=up, cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * vae_levels, up_block_types=("UpDecoderBlock2D",) * vae_levels,
        block_out_channels=(4,) * vae_levels, layers_per_block=1, norm_num_groups=2, latent_channels=4,
        scaling_factor=0.7)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None,
                                   requires_safety_checker=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of the random pipeline."""
    folder = tmp_path_factory.mktemp("sd") / "tiny-random-sd"
    make_pipe().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(base):
    return library.load_base(str(base))


@pytest.fixture(autouse=True)
def base_loads_once(loaded, base, monkeypatch):
    """Commands get copies of the one that was read."""
    load = library.load_base
    monkeypatch.setattr(library, "load_base", lambda path: copy.deepcopy(loaded) if path == str(base) else load(path))


@pytest.fixture
def pipe(loaded):
    return copy.deepcopy(loaded)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """VGG16's convolutions with random weights that keep the features' size, as torchvision's checkpoint names them."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    weights = {}
    for name, value in make_layers(cfgs["D"]).state_dict().items():
        spread = (2 / value[0].numel()) ** 0.5 if value.ndim == 4 else 0.0
        weights[f"features.{name}"] = spread * torch.randn(value.shape)
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def perceptual(vgg_file):
    return library.PerceptualLoss(vgg_file)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """sharp/ (6 crops of a photograph, 40 px) and heldout/ (2 of another)."""
    root = tmp_path_factory.mktemp("images")
    for name, photo, count in (("sharp", "astronaut", 6), ("heldout", "coffee", 2)):
        (root / name).mkdir()
        pixels = photograph(photo, (120, 120))
        for i in range(count):
            y, x = divmod(i, 3)
            Image.fromarray(pixels[40 * y : 40 * y + 40, 40 * x : 40 * x + 40]).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def words(base, images, tmp_path):
    """words(**options) -> command line of the training script."""
    def make(**given):
        values = {"pretrained_model_name_or_path": base, "source_dir": images / "sharp", "image_size": SIDE,
                  "output_dir": tmp_path / "out", "max_train_steps": 4, "batch_size": 2, "num_workers": 0, "seed": 3,
                  "perceptual_loss_weight": 0, "learning_rate": 1e-3, "checkpointing_steps": 0, "logging_steps": 1,
                  "report_to": "none", "logger_freq": 0, "num_inference_steps": 2} | given
        return [word for name, value in values.items() if value is not None
                for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]
    return make


def train(given):
    return train_deblur_controlnet.main(train_deblur_controlnet.parse_args(given))


def rows(folder):
    """{step: all that metrics.jsonl says of it}."""
    merged = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        merged.setdefault(row["step"], {}).update(row)
    return merged


def weights(folder):
    """Every tensor that a training has saved."""
    return {f"{path.name} {key}": value for path in sorted((folder / "controlnet").glob("*.safetensors"))
            for key, value in load_file(path).items()}


def assert_equal(first, second):
    assert first.keys() == second.keys() and first
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def randomise(module, scale=0.1, seed=1):
    """Weights that are nowhere zero, zero convolutions included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def make_model(pipe, use_attention=False, **options):
    torch.manual_seed(0)
    attention = library.HintAttention() if use_attention else None
    return library.ControlledUNet(pipe.unet, library.make_controlnet(pipe), attention, **options)


def make_args(**given):
    return SimpleNamespace(**({
        "loss_type": "l2", "simple_loss_weight": 1.0, "elbo_weight": 0.0, "deblur_loss_weight": 1.0,
        "l1_loss_weight": 1.0, "mse_loss_weight": 1.0, "perceptual_loss_weight": 0.1, "gradient_loss_weight": 0.1,
        "target": "image", "train_start": "clean", "deblur_t_max": None, "decode_crop": 32, "t_min": 0,
        "t_max": 1000} | given))


def make_batch(pipe, seeds=(1, 2), side=SIDE, dtype=torch.float32):
    """(batch, text) of random images."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(len(seeds), 3, side, side, generator=generator, dtype=dtype) * 2 - 1
    batch = {"target": target, "control": torch.rand(target.shape, generator=generator, dtype=dtype),
             "seed": list(seeds), "prompt": [""] * len(seeds)}
    return batch, library.encode_text(pipe, batch["prompt"]).to(dtype)


def step(pipe, model, batch=None, perceptual=None, has_deblur=True, **options):
    batch, text = batch or make_batch(pipe)
    return train_deblur_controlnet.training_step(model, pipe.vae, pipe.scheduler, perceptual, batch, text,
                                                 make_args(**options), has_deblur)


# --- formulas


def test_vlb_weights_are_their_formula_computed_by_hand():
    betas = [(0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for i in range(1000)]
    bars = np.cumprod([1 - beta for beta in betas])
    made = library.vlb_weights(torch.tensor(betas, dtype=torch.float64), "epsilon")
    for t in (1, 10, 500, 999):
        posterior = betas[t] * (1 - bars[t - 1]) / (1 - bars[t])
        assert made[t].item() == pytest.approx(betas[t] ** 2 / (2 * posterior * (1 - betas[t]) * (1 - bars[t])))
    assert made[0] == made[1] and made.isfinite().all()
    of_sample = library.vlb_weights(torch.tensor(betas, dtype=torch.float64), "sample")
    assert of_sample[7].item() == pytest.approx(0.5 * bars[7] ** 0.5 / (2 - bars[7]))
    assert (library.vlb_weights(torch.tensor(betas), "v_prediction") == 1).all()


def test_the_embedded_schedule_is_that_of_stable_diffusion(loaded):
    assert torch.allclose(loaded.scheduler.betas, torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_clean_estimate_of_a_perfect_prediction_is_the_clean_image(loaded, kind):
    scheduler = DDIMScheduler.from_config(loaded.scheduler.config, prediction_type=kind)
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0, 400, 999])
    z = scheduler.add_noise(clean, noise, t)
    target = library.prediction_target(scheduler, clean, noise, t)
    torch.testing.assert_close(library.clean_estimate(scheduler, z, target, t), clean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_from_other_latents_the_perfect_prediction_still_leads_to_the_clean_image(loaded, kind):
    """As --train_start blurred asks for it; from the clean latents themselves the noise is what was added."""
    scheduler = DDIMScheduler.from_config(loaded.scheduler.config, prediction_type=kind)
    clean, other, noise = torch.randn(3, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([5, 400, 999])
    z = scheduler.add_noise(other, noise, t)
    target = library.prediction_target(scheduler, clean, library.noise_between(scheduler, clean, z, t), t)
    torch.testing.assert_close(library.clean_estimate(scheduler, z, target, t), clean, rtol=1e-5, atol=1e-5)
    back = library.noise_between(scheduler, clean, scheduler.add_noise(clean, noise, t), t)
    torch.testing.assert_close(back, noise, rtol=1e-5, atol=1e-5)


def test_the_blurred_start_shows_the_model_the_blurred_latents(pipe, monkeypatch):
    seen, model = [], make_model(pipe)
    monkeypatch.setattr(model, "forward", lambda z, t, text, hint: seen.append(z) or torch.zeros_like(z))
    batch, text = make_batch(pipe)
    same = batch | {"control": (batch["target"] + 1) / 2}
    for control, start in ((batch, "clean"), (same, "clean"), (same, "blurred"), (batch, "blurred")):
        step(pipe, model, (control, text), train_start=start, t_min=10, t_max=11)
    assert torch.equal(seen[0], seen[1])  # the clean start does not look at the hint
    blurred = library.encode(pipe.vae, 2 * batch["control"] - 1)
    share = pipe.scheduler.alphas_cumprod[10].sqrt()
    difference = share * (blurred - library.encode(pipe.vae, batch["target"]))
    torch.testing.assert_close(seen[3] - seen[2], difference, rtol=1e-3, atol=1e-4)


def test_deblur_losses_are_their_means_by_hand(vgg_file, perceptual):
    restored, target = torch.rand(2, 2, 3, 16, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = library.deblur_losses(restored, target, perceptual)
    x, y = restored[1], target[1]
    assert made["l1"][1].item() == pytest.approx((x - y).abs().mean().item())
    assert made["mse"][1].item() == pytest.approx(((x - y) ** 2).mean().item())
    across = ((x[:, :, 1:] - x[:, :, :-1]) - (y[:, :, 1:] - y[:, :, :-1])) ** 2
    down = ((x[:, 1:] - x[:, :-1]) - (y[:, 1:] - y[:, :-1])) ** 2
    assert made["gradient"][1].item() == pytest.approx(((across.mean() + down.mean()) / 2).item(), rel=1e-5)

    from torchvision.models import vgg16
    from torchvision.transforms.functional import normalize

    features = vgg16(weights=None).features
    features.load_state_dict({name.removeprefix("features."): value
                              for name, value in torch.load(vgg_file, weights_only=True).items()})
    with torch.no_grad():
        a, b = (features[:16](normalize((image + 1) / 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None])
                for image in (x, y))
    assert made["perceptual"][1].item() == pytest.approx(((a - b) ** 2).mean().item(), rel=1e-4)


def test_a_decoded_crop_shows_the_pixels_that_the_target_crop_has(pipe):
    """With a decoder that enlarges each latent to a block, decoded crops of latents are crops of the enlarged ones."""
    def enlarge(latents, return_dict):
        return (latents[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3),)

    vae = SimpleNamespace(decode=enlarge, dtype=torch.float32, config=SimpleNamespace(
        scaling_factor=2.0, block_out_channels=(1, 1, 1)))
    latents = torch.randn(3, 4, 24, 20, generator=torch.Generator().manual_seed(0))
    boxes = crop_boxes(24, 20, 16, [torch.Generator().manual_seed(seed) for seed in (0, 1, 2)])
    assert len({box[:2] for box in boxes}) == 3
    whole = enlarge(latents / 2, False)[0]
    for decoded, wanted in zip(library.decode_crops(vae, latents, boxes), library.crop_pixels(whole, boxes, 4),
                               strict=True):
        assert torch.equal(decoded, wanted) and decoded.shape[-1] < 64


# --- the training step


@pytest.mark.parametrize("target", ["image", "vae"])
def test_the_deblur_losses_gradient_reaches_the_controlnet_and_is_that_of_finite_differences(pipe, perceptual, target):
    model = randomise(make_model(pipe, use_attention=True, sd_locked=False)).double()
    pipe.vae.double()
    perceptual = copy.deepcopy(perceptual).double() if target == "image" else None
    batch = make_batch(pipe, side=72, dtype=torch.float64)

    def loss():
        return step(pipe, model, batch, perceptual, simple_loss_weight=0.0, decode_crop=16, target=target)["loss"]

    loss().backward()
    generator = torch.Generator().manual_seed(5)
    for name, module in model.trained_modules().items():
        parameters = list(module.parameters())
        assert all(parameter.grad is not None for parameter in parameters)
        norm = sum(parameter.grad.square().sum() for parameter in parameters).sqrt()
        assert norm > 1e-6, name
        count = sum(parameter.numel() for parameter in parameters)
        direction = [p.grad / norm + torch.randn(p.shape, generator=generator, dtype=p.dtype) / count**0.5
                     for p in parameters]
        expected = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True)).item()
        values = []
        for size in (1e-7, -2e-7):
            with torch.no_grad():
                for parameter, change in zip(parameters, direction, strict=True):
                    parameter += size * change
                values.append(loss().item())
        with torch.no_grad():
            for parameter, change in zip(parameters, direction, strict=True):
                parameter += 1e-7 * change
        assert (values[0] - values[1]) / 2e-7 == pytest.approx(expected, rel=1e-3), name


def test_the_loss_is_the_sum_that_the_formula_names(pipe, perceptual):
    model = randomise(make_model(pipe))
    weights = {"simple_loss_weight": 0.5, "elbo_weight": 3.0, "deblur_loss_weight": 0.7, "l1_loss_weight": 1.1,
               "mse_loss_weight": 1.2, "perceptual_loss_weight": 0.3, "gradient_loss_weight": 0.4}
    losses = {name: value.item() for name, value in step(pipe, model, None, perceptual, **weights).items()}
    parts = ("l1", "mse", "perceptual", "gradient")
    assert losses["total_deblur_loss"] == pytest.approx(sum(losses[f"deblur_{part}_loss"] for part in parts))
    assert losses["loss"] == pytest.approx(losses["loss_simple"] + 3.0 * losses["loss_vlb"]
                                           + 0.7 * losses["total_deblur_loss"])
    # one item: the weighted loss is weight x abar_t x the raw one, and w_t x the simple loss is the vlb
    batch = make_batch(pipe, seeds=(4,))
    losses = {name: value.item() for name, value in step(pipe, model, batch, perceptual, **weights).items()}
    t = int(torch.randint(0, 1000, (), generator=torch.Generator().manual_seed(4)))
    share = pipe.scheduler.alphas_cumprod[t].item()
    for part in parts:
        assert losses[f"deblur_{part}_loss"] == pytest.approx(
            weights[f"{part}_loss_weight"] * share * losses[f"deblur_{part}_loss_raw"])
    w = library.vlb_weights(pipe.scheduler.betas, "epsilon")[t].item()
    assert losses["loss_vlb"] == pytest.approx(w * losses["loss_simple"] / 0.5, rel=1e-4)


def test_items_at_deblur_t_max_or_above_have_no_deblurring_loss(pipe):
    model = make_model(pipe)
    draws = {seed: int(torch.randint(0, 1000, (), generator=torch.Generator().manual_seed(seed)))
             for seed in range(20)}
    low, high = min(draws, key=draws.get), max(draws, key=draws.get)
    limit = {"deblur_t_max": draws[high]}
    assert step(pipe, model, make_batch(pipe, seeds=(high,)), **limit)["total_deblur_loss"] == 0
    alone = step(pipe, model, make_batch(pipe, seeds=(low,)), **limit)["total_deblur_loss"]
    both = step(pipe, model, make_batch(pipe, seeds=(low, high)), **limit)["total_deblur_loss"]
    assert alone > 0 and both.item() == pytest.approx(alone.item() / 2, rel=1e-4)


def test_timesteps_are_drawn_within_t_min_and_t_max(pipe, monkeypatch):
    seen = []
    model = make_model(pipe)
    monkeypatch.setattr(model, "forward", lambda z, t, text, hint: seen.extend(t.tolist()) or z)
    step(pipe, model, make_batch(pipe, seeds=range(64), side=16), t_min=100, t_max=104)
    assert set(seen) == {100, 101, 102, 103}


@pytest.mark.parametrize("changed", [
    {"loss_type": "l1"}, {"simple_loss_weight": 0.5}, {"elbo_weight": 1.0}, {"deblur_loss_weight": 0.5},
    {"deblur_loss_weight": 0.0}, {"l1_loss_weight": 0.0}, {"mse_loss_weight": 0.0}, {"gradient_loss_weight": 0.0},
    {"perceptual_loss_weight": 0.0}, {"target": "vae"}, {"train_start": "blurred"}, {"deblur_t_max": 400},
    {"decode_crop": 16}, {"t_min": 900}, {"t_max": 100}, {"has_deblur": False}], ids=str)
def test_every_option_of_the_loss_changes_it(pipe, perceptual, changed):
    model, batch = make_model(pipe), make_batch(pipe, side=72)
    losses = [step(pipe, model, batch, perceptual, **options)["loss"].item()
              for options in ({}, {}, changed)]
    assert losses[0] == losses[1] != losses[2]


def test_a_step_depends_on_the_items_seeds_alone(pipe):
    model, (batch, text) = make_model(pipe), make_batch(pipe)
    torch.manual_seed(0)
    first = step(pipe, model, (batch, text))
    torch.manual_seed(1)
    assert all(torch.equal(value, first[name]) for name, value in step(pipe, model, (batch, text)).items())
    swapped = {name: value.flip(0) if isinstance(value, torch.Tensor) else value[::-1]
               for name, value in batch.items()}
    assert step(pipe, model, (swapped, text))["loss"].item() == pytest.approx(first["loss"].item(), rel=1e-5)


# --- the model


@pytest.fixture(scope="module")
def sd15_shaped():
    return make_pipe(levels=4, layers=2, vae_levels=4)


def test_zero_convolutions_make_step_0_the_base_model(pipe):
    model, (batch, text) = make_model(pipe, use_attention=True), make_batch(pipe)
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(model(z, t, text, batch["control"]), pipe.unet(z, t, text).sample)
        randomise(model.controlnet)
        assert not torch.allclose(model(z, t, text, batch["control"]), pipe.unet(z, t, text).sample, atol=1e-4)


@pytest.mark.parametrize("use_attention", [False, True])
@pytest.mark.parametrize("sd_locked", [True, False])
def test_exactly_the_locked_or_unlocked_parameters_are_trained(pipe, sd_locked, use_attention):
    model = randomise(make_model(pipe, use_attention, sd_locked=sd_locked))
    wanted = {name for name, _ in model.named_parameters() if name.startswith("controlnet.")}
    if use_attention:
        wanted |= {name for name, _ in model.named_parameters() if name.startswith("attention.")}
    if not sd_locked:
        wanted |= {name for name, _ in model.named_parameters()
                   if name.startswith(("unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out."))}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in model.trained_parameters()} == wanted
    step(pipe, model)["loss"].backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == wanted
    assert all(parameter.grad is None for parameter in pipe.vae.parameters())


def test_only_mid_control_zeroes_the_12_residuals_for_good(sd15_shaped):
    pipe = copy.deepcopy(sd15_shaped)
    controlnet = randomise(library.make_controlnet(pipe))
    (batch, text), z = make_batch(pipe, side=64), torch.randn(2, 4, 8, 8)

    def residuals():
        with torch.no_grad():
            return controlnet(z, torch.tensor([3, 700]), text, batch["control"], return_dict=False)

    before, mid = residuals()
    assert len(before) == 12 and all(residual.abs().max() > 0 for residual in before)
    model = library.ControlledUNet(pipe.unet, controlnet, only_mid_control=True)
    after, same_mid = residuals()
    assert all(residual.abs().max() == 0 for residual in after) and torch.equal(mid, same_mid)
    optimizer = torch.optim.AdamW(model.trained_parameters(), lr=0.1)
    step(pipe, model, (batch, text))["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.trained_parameters())
    optimizer.step()
    trained, other_mid = residuals()
    assert all(residual.abs().max() == 0 for residual in trained) and not torch.equal(mid, other_mid)


def test_attention_starts_at_the_sigmoid_of_4_and_is_applied_once_in_training_and_in_sampling(pipe, monkeypatch):
    model, (batch, text) = make_model(pipe, use_attention=True), make_batch(pipe)
    hint = batch["control"]
    assert torch.allclose(model.attention(hint), torch.full((2, 1, SIDE, SIDE), 1 / (1 + math.exp(-4))))
    randomise(model, 0.2)
    weighed = hint * model.attention(hint)
    shown = []
    forward = model.controlnet.forward
    monkeypatch.setattr(model.controlnet, "forward", lambda z, t, text, hint, *rest, **more: (
        shown.append(hint.detach()), forward(z, t, text, hint, *rest, **more))[1])
    z = torch.randn(2, 4, 8, 8)
    given = hint.clone()
    model(z, torch.tensor([3, 700]), text, hint)
    assert torch.equal(shown.pop(), weighed) and torch.equal(hint, given)
    library.sample(model, pipe.scheduler, hint, text, z, 3, guidance_scale=2.0, negative=text)
    assert len(shown) == 3 and all(torch.equal(each, torch.cat([weighed, weighed])) for each in shown)
    assert torch.equal(hint, given)


def test_bf16_keeps_fp32_masters_of_what_is_trained_and_computes_in_bf16(pipe):
    exact = randomise(make_model(copy.deepcopy(pipe), use_attention=True, sd_locked=False))
    model = randomise(make_model(pipe, use_attention=True, sd_locked=False, dtype=torch.bfloat16))
    dtypes = {parameter.dtype for parameter in model.trained_parameters()}
    assert dtypes == {torch.float32} and model.unet.conv_in.weight.dtype == torch.bfloat16
    (batch, text), z, t = make_batch(pipe), torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    made, wanted = (each(z, t, text, batch["control"]) for each in (model, exact))
    assert made.dtype == torch.float32 and not torch.equal(made, wanted)
    assert (made - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    step(pipe, model, (batch, text))["loss"].backward()
    assert {parameter.grad.dtype for parameter in model.trained_parameters()} == {torch.float32}


def test_a_photograph_keeps_its_contrast_in_the_hint_network_of_every_depth(pipe, sd15_shaped):
    hint = torch.from_numpy(photograph(size=(64, 64)).copy()).movedim(-1, 0)[None] / 255
    x = torch.randn(100000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert library.SILU_GAIN == pytest.approx(1 / torch.nn.functional.silu(x).square().mean().sqrt().item(), rel=0.01)
    for each in (pipe, sd15_shaped):
        torch.manual_seed(0)
        layers = library.make_controlnet(each).controlnet_cond_embedding
        features = hint
        with torch.no_grad():
            for layer in (layers.conv_in, *layers.blocks):
                features = torch.nn.functional.silu(layer(features))
            assert 0.2 * hint.std() < features.std((0, 2, 3)).mean() < 5 * hint.std()
            assert layers(hint).abs().max() == 0


@pytest.fixture
def no_weights(monkeypatch):
    """What runs under this is told before the base model loads."""
    monkeypatch.setattr(library, "load_base", lambda path: pytest.fail("the base model was loaded"))


def test_a_hint_network_fits_the_autoencoder(pipe, sd15_shaped):
    for each, channels in ((pipe, (16, 32, 96)), (sd15_shaped, (16, 32, 96, 256))):
        assert library.make_controlnet(each).config.conditioning_embedding_out_channels == channels


def test_the_configs_alone_tell_what_the_loaded_base_model_does(base, pipe, sd15_shaped):
    sd15 = library.read_base("assets/tiny-sd")
    assert vars(sd15.scheduler.config)["num_train_timesteps"] == 1000 and not hasattr(sd15.unet, "parameters")
    read = library.read_base(str(base))
    assert library.size_multiple(read) == library.size_multiple(pipe) == 8 != library.size_multiple(sd15_shaped)
    assert library.hint_channels(read.vae) == library.hint_channels(pipe.vae)


def test_another_models_controlnet_is_refused_by_its_config_under_the_flag_that_named_it(
        base, pipe, sd15_shaped, words, tmp_path, no_weights):
    library.make_controlnet(sd15_shaped).save_pretrained(tmp_path / "other")
    ControlNetModel.from_unet(pipe.unet).save_pretrained(tmp_path / "hint")
    library.make_controlnet(make_pipe(layers=2)).save_pretrained(tmp_path / "deeper")
    pipe.unet.save_pretrained(tmp_path / "unet")
    for name, content in (("list", "[1]"), ("torn", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "trained" / "controlnet").mkdir(parents=True)
    for name, line in (
            ("other", "other: its block_out_channels is"),
            ("hint", "hint: its hint network makes images 8 times smaller.*autoencoder 4 times"),
            ("deeper", "deeper: its layers_per_block is 2, the base model's 1"),
            ("unet", "unet: its config.json is not that of a ControlNetModel"),
            ("list", "list: its config.json is not that of a ControlNetModel"),
            ("empty", "empty: no config.json there"),
            ("nosuch", "nosuch: no such file or folder"),
            ("nosuch.ckpt", "nosuch.ckpt: no such file or folder")):
        source = str(tmp_path / name)
        with pytest.raises(ValueError, match=f"^--controlnet_model_name_or_path {tmp_path}/{line}"):
            train(words(controlnet_model_name_or_path=source))
        with pytest.raises(ValueError, match=f"^--model {tmp_path}/{line}"):
            deblur.DeblurControlNet.load_from_checkpoint(source, str(base))
    with pytest.raises(ValueError, match="torn.*not a valid JSON"):
        train(words(controlnet_model_name_or_path=tmp_path / "torn"))
    with pytest.raises(ValueError, match=f"^--model {tmp_path}/trained/controlnet: no config.json there"):
        deblur.DeblurControlNet.load_from_checkpoint(str(tmp_path / "trained"), str(base))


def legacy_names(controlnet):
    """{key of the original implementation: tensor} of a ControlNet in SD 1.5's shape."""
    renamed = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
               "conv_in": "input_blocks.0.0", "controlnet_cond_embedding.conv_in": "input_hint_block.0",
               "controlnet_cond_embedding.conv_out": "input_hint_block.14",
               "controlnet_mid_block": "middle_block_out.0", "mid_block.resnets.0": "middle_block.0",
               "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
    renamed |= {f"controlnet_cond_embedding.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(6)}
    renamed |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(12)}
    for block in range(4):
        for i in range(2):
            place = 3 * block + i + 1
            renamed[f"down_blocks.{block}.resnets.{i}"] = f"input_blocks.{place}.0"
            renamed[f"down_blocks.{block}.attentions.{i}"] = f"input_blocks.{place}.1"
        renamed[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{3 * block + 3}.0.op"
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
              "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    made = {}
    for key, value in controlnet.state_dict().items():
        start = max((name for name in renamed if key.startswith(name + ".")), key=len)
        rest = key.removeprefix(start + ".")
        if ".resnets." in key:
            rest = rest.replace(rest.partition(".")[0], inside[rest.partition(".")[0]], 1)
        made[f"control_model.{renamed[start]}.{rest}"] = value
    return made


def test_a_legacy_checkpoint_loads_through_diffusers_converter(sd15_shaped, tmp_path):
    controlnet = randomise(library.make_controlnet(sd15_shaped))
    torch.save({"state_dict": legacy_names(controlnet) | {"first_stage_model.x": torch.zeros(1)}},
               tmp_path / "last.ckpt")
    loaded = library.make_controlnet(sd15_shaped, tmp_path / "last.ckpt")
    assert_equal(loaded.state_dict(), controlnet.state_dict())
    (tmp_path / "broken.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {"first_stage_model.x": torch.zeros(1)}}, tmp_path / "vae.ckpt")
    for name in ("broken", "vae"):
        with pytest.raises(ValueError, match=f"--controlnet_model_name_or_path .*{name}.ckpt: no ControlNet for this"):
            library.make_controlnet(sd15_shaped, tmp_path / f"{name}.ckpt")


# --- sampling and stock diffusers


def save_and_reload(pipe, model, folder, **settings):
    """(a DeblurControlNet of the saved model, the folder)."""
    settings = library.DEFAULT_SETTINGS | {"image_size": SIDE} | settings
    checkpoint.write_folder(folder / "controlnet", lambda path: library.write_model(path, model, settings))
    fresh = copy.deepcopy(pipe)
    return deblur.DeblurControlNet(fresh, *library.load_model(fresh, folder / "controlnet")), folder / "controlnet"


@pytest.mark.parametrize("options", [{}, {"only_mid_control": True}, {"use_attention": True, "sd_locked": False}],
                         ids=["plain", "only_mid", "attention_unlocked"])
def test_the_stock_pipeline_gives_our_samplers_result_with_the_saved_controlnet(pipe, options, tmp_path):
    untouched = copy.deepcopy(pipe)
    model = make_model(pipe, **options)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for parameter in model.trained_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    ours, folder = save_and_reload(untouched, model, tmp_path)
    hint = torch.rand(1, 3, SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(3))
    text = library.encode_text(untouched, ["a motion blur removed", ""])
    noise = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(4))
    made = library.deblur_images(ours.model, untouched.vae, untouched.scheduler, hint * 2 - 1, text[:1], noise, 5, 3.0,
                                 negative=text[1:])

    parts = dict(vae=untouched.vae, text_encoder=untouched.text_encoder, tokenizer=untouched.tokenizer,
                 unet=copy.deepcopy(untouched.unet), controlnet=ControlNetModel.from_pretrained(folder),
                 scheduler=untouched.scheduler, safety_checker=None, feature_extractor=None,
                 requires_safety_checker=False)
    if (folder / library.DECODER_FILE).exists():
        parts["unet"].load_state_dict(load_file(folder / library.DECODER_FILE), strict=False)
    seen = model.attend(hint).detach()
    assert (options.get("use_attention", False)) == (not torch.equal(seen, hint))
    stock = StableDiffusionControlNetPipeline(**parts)
    stock.set_progress_bar_config(disable=True)
    common = dict(prompt_embeds=text[:1], negative_prompt_embeds=text[1:], guidance_scale=3.0, output_type="pt")
    wanted = stock(image=seen, latents=noise, num_inference_steps=5, **common).images
    torch.testing.assert_close((made / 2 + 0.5).clamp(0, 1), wanted, rtol=1e-4, atol=1e-5)

    # and from the blurred latents, with the stock image-to-image pipeline
    made = library.deblur_images(ours.model, untouched.vae, untouched.scheduler, hint * 2 - 1, text[:1], noise, 4, 3.0,
                                 0.4, negative=text[1:])
    stock = StableDiffusionControlNetImg2ImgPipeline(**parts)
    stock.set_progress_bar_config(disable=True)
    start = untouched.scheduler.add_noise(library.encode(untouched.vae, hint * 2 - 1), noise, torch.tensor([399]))
    wanted = stock(image=hint, control_image=seen, latents=start, num_inference_steps=10, strength=0.4,
                   controlnet_conditioning_scale=1.0, **common).images
    torch.testing.assert_close((made / 2 + 0.5).clamp(0, 1), wanted, rtol=1e-4, atol=1e-5)


def test_a_saved_model_comes_back_whole_and_its_folder_appears_in_one_rename(pipe, tmp_path, monkeypatch):
    untouched = copy.deepcopy(pipe)
    model = make_model(pipe, use_attention=True, sd_locked=False)
    randomise(model)  # the frozen part too, which is not saved: the base model has it
    ours, folder = save_and_reload(untouched, model, tmp_path, strength=0.5)
    for name, module in model.trained_modules().items():
        back = ours.model.attention if name == "hint_attention" else ours.model.get_submodule(
            name if name == "controlnet" else f"unet.{name}")
        assert_equal(back.state_dict(), module.state_dict())
    assert_equal(ours.model.unet.down_blocks.state_dict(), untouched.unet.down_blocks.state_dict())
    assert ours.settings["strength"] == 0.5
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(library, "write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ValueError, match=r"controlnet could not be written \(disk full\); what was there is intact"):
        checkpoint.write_folder(folder, lambda path: library.write_model(path, model, {}))
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["controlnet"]


@pytest.mark.parametrize(("name", "content", "line"), [
    (library.SETTINGS_FILE, "{", "not JSON"), (library.SETTINGS_FILE, "[]", "no JSON object"),
    (library.ATTENTION_FILE, "x", "no whole safetensors file"), (library.DECODER_FILE, "x", "no whole safetensors")])
def test_a_broken_file_of_a_saved_model_is_named(pipe, name, content, line, tmp_path):
    model = make_model(copy.deepcopy(pipe), use_attention=True, sd_locked=False)
    _, folder = save_and_reload(pipe, model, tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: {line}"):
        library.load_model(pipe, folder)


def test_strength_starts_at_its_timestep_and_always_takes_the_asked_steps(loaded):
    for steps, strength in ((50, 1.0), (20, 0.4), (4, 0.4), (3, 0.25), (1, 0.4), (1, 0.6), (7, 0.99)):
        timesteps = library.sampling_timesteps(loaded.scheduler, steps, strength)
        assert len(timesteps) == steps and timesteps[0] == round(1000 * strength) - 1
        assert timesteps[-1] <= 1000 * strength / steps and sorted(set(timesteps)) == timesteps[::-1]
    with pytest.raises(ValueError, match="--num_inference_steps 50 within --strength 0.01.*only 10 timesteps"):
        library.sampling_timesteps(loaded.scheduler, 50, 0.01)
    assert library.sampling_timesteps(loaded.scheduler, 10, 0.4, t_min=39)[-1] == 39
    with pytest.raises(ValueError, match="--num_inference_steps 10 .*end at timestep 39, and with --t_min 40 it"):
        library.sampling_timesteps(loaded.scheduler, 10, 0.4, t_min=40)


def test_ddim_with_the_true_noise_stays_on_the_path_for_any_spacing(loaded):
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    z, times = loaded.scheduler.add_noise(clean, noise, torch.tensor([999])), [999, 617, 616, 5]
    for t, t_next in itertools.pairwise(times):
        z = library.ddim_step(loaded.scheduler, z, noise, t, t_next)
        torch.testing.assert_close(z, loaded.scheduler.add_noise(clean, noise, torch.tensor([t_next])), atol=1e-4,
                                   rtol=1e-4)
    torch.testing.assert_close(library.ddim_step(loaded.scheduler, z, noise, 5, None), clean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_one_step_gives_the_clean_estimate_whatever_the_base_models_schedule_ends_at(pipe, set_alpha_to_one, tmp_path,
                                                                                     monkeypatch):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=set_alpha_to_one)
    pipe.save_pretrained(tmp_path / "base")
    own, model = library.load_base(str(tmp_path / "base")), make_model(pipe)
    clean, blurred, noise = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    hint, text = torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1, 77, 16)
    monkeypatch.setattr(model, "predict", lambda z, t, *_: library.noise_between(
        own.scheduler, clean, z, torch.tensor([t])))
    made = library.sample(model, own.scheduler, hint, text, noise, 1, strength=0.04, blurred=blurred)
    torch.testing.assert_close(made, clean, atol=1e-4, rtol=1e-4)


@pytest.fixture
def ours(pipe, tmp_path):
    """A DeblurControlNet with random weights, two steps."""
    model = make_model(pipe)
    randomise(model.controlnet, 0.05)
    return save_and_reload(pipe, model, tmp_path, num_inference_steps=2)[0]


def test_python_use_is_that_of_the_training_document(ours):
    blurred = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    result = ours.sample(cond={"c_concat": [blurred], "c_crossattn": ["a clear image"]}, batch_size=2, ddim_steps=3)
    assert result.shape == blurred.shape and result.abs().max() <= 1
    for bad, line in (({"ddim_steps": 0}, "--num_inference_steps 0: give 1 or more"),
                      ({"ddim_steps": -1}, "--num_inference_steps -1: give 1 or more"),
                      ({"strength": 0.0}, "--strength 0.0: give more than 0, at most 1"),
                      ({"strength": 1.5}, "--strength 1.5: give more than 0, at most 1")):
        with pytest.raises(ValueError, match=line):
            ours.sample(cond={"c_concat": [blurred[1:]], "c_crossattn": ["a clear image"]}, **bad)
    again = ours.sample(cond={"c_concat": [blurred[1:]], "c_crossattn": [["a clear image"]]}, ddim_steps=3, seed=1)
    assert torch.equal(again[0], result[1])
    text = ours.embed(["a clear image", ""])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = library.deblur_images(ours.model, ours.pipe.vae, ours.pipe.scheduler, blurred[:1] * 2 - 1, text[:1], noise,
                                   3, 3.0, negative=text[1:])
    assert torch.equal(result[:1], wanted.clamp(-1, 1))
    with pytest.raises(ValueError, match="batch_size 1, but 2 images"):
        ours.sample(cond={"c_concat": [blurred], "c_crossattn": ["x"]}, batch_size=1)


def test_tiles_of_a_large_image_share_one_noise_field_and_any_size_comes_back(ours, monkeypatch):
    image = torch.rand(1, 3, 45, 70, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert ours.deblur(image, tile=0).shape == image.shape
    made = []
    monkeypatch.setattr(library, "deblur_images", lambda model, vae, scheduler, tiles, text, noise, *_: (
        made.append(noise), torch.nn.functional.interpolate(noise[:, :3], scale_factor=4.0))[1])
    tiled, whole = ours.deblur(image, tile=32), ours.deblur(image, tile=0)
    assert len(made) > 4  # where tiles carry the same noise, blending them gives the whole image's
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changed", [
    {"num_inference_steps": 3}, {"guidance_scale": 1.0}, {"strength": 0.5}, {"seed": 1}, {"tile": 16},
    {"tile": 16, "tile_overlap": 8, "seed": 0}, {"negative_prompt": "blurred"}, {"color": "wavelet"},
    {"color": "adain"}, {"controlnet_conditioning_scale": 0.3}, {"prompt": "sharp"}], ids=str)
def test_every_option_of_deblurring_changes_the_image(ours, changed):
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(ours.deblur(image, "a"), ours.deblur(image, "a"))
    assert not torch.equal(ours.deblur(image, "a"), ours.deblur(image, **({"prompt": "a"} | changed)))


# --- the training program


@pytest.mark.parametrize("options", [
    {}, {"use_attention": True}, {"no-sd_locked": True}, {"gradient_accumulation_steps": 2},
    {"optimizer": "schedule_free", "lr_scheduler": "constant"},
    {"only_mid_control": True, "use_augmentation": True, "proportion_empty_prompts": 0.5, "deblur_every": 2,
     "num_workers": 1, "report_to": "tensorboard"}],
    ids=["plain", "attention", "unlocked", "accumulation", "schedule_free", "rest"])
def test_a_resumed_run_ends_at_the_straight_runs_bits(words, options, tmp_path, capsys):
    train(words(checkpointing_steps=2, **options))
    told = read_summary(capsys.readouterr().out)
    assert told["ControlNet"] == str(tmp_path / "out" / "controlnet") and told["checkpoints"].endswith("checkpoint-4")
    program = shlex.split(told["here"])
    assert program[:3] == ["python", "-m", "recipes.deblur_controlnet.deblur"]
    assert deblur.parse_args(program[3:]).model == str(tmp_path / "out")
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train(words(output_dir=tmp_path / "resumed", resume_from_checkpoint="latest", **options))
    straight, resumed = (weights(tmp_path / name) for name in ("out", "resumed"))
    assert_equal(straight, resumed)
    early = load_file(tmp_path / "resumed" / "checkpoint-2" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(value, straight[f"diffusion_pytorch_model.safetensors {key}"])
               for key, value in early.items())
    a, b = (rows(tmp_path / name) for name in ("out", "resumed"))
    assert a[4]["train/loss"] == b[4]["train/loss"] and set(b) == {3, 4}


@pytest.fixture
def reference(words, tmp_path):
    """Weights after the plain run."""
    train(words(output_dir=tmp_path / "reference", max_train_steps=2))
    return weights(tmp_path / "reference")


def test_every_option_of_training_changes_what_is_trained(words, reference, base, images, tmp_path):
    other = {path.name: path for path in images.iterdir()}
    continued = tmp_path / "reference" / "controlnet"
    for number, changed in enumerate([
            {"seed": 4}, {"batch_size": 1}, {"learning_rate": 1e-4}, {"no-sd_locked": True}, {"only_mid_control": True},
            {"use_attention": True}, {"use_augmentation": True}, {"proportion_empty_prompts": 1},
            {"controlnet_model_name_or_path": continued}, {"max_train_steps": None, "max_epochs": 1},
            {"source_dir": other["heldout"], "batch_size": 1}, {"max_grad_norm": 0.01}, {"deblur_every": 2},
            {"type_weights": "lens_blur:1"}, {"linear_light": True}, {"lr_scheduler": "constant"},
            {"optimizer": "schedule_free", "lr_scheduler": "constant"}]):
        folder = tmp_path / f"run{number}"
        train(words(**({"output_dir": folder, "max_train_steps": 2} | changed)))
        made = weights(folder)
        assert made.keys() != reference.keys() or any(
            not torch.equal(made[key], reference[key]) for key in made), changed


def test_a_run_goes_on_from_all_that_an_earlier_one_trained(words, tmp_path):
    options = {"use_attention": True, "no-sd_locked": True, "max_train_steps": 1}
    train(words(output_dir=tmp_path / "first", **options))
    source = tmp_path / "first" / "controlnet"
    train(words(output_dir=tmp_path / "second", controlnet_model_name_or_path=source, learning_rate=0, seed=4,
                **options))
    assert_equal(weights(tmp_path / "first"), weights(tmp_path / "second"))
    for option, line in (("use_attention", "hint_attention.safetensors; add --use_attention"),
                         ("no-sd_locked", "unet_decoder.safetensors; add --no-sd_locked")):
        with pytest.raises(ValueError, match=line):
            train(words(controlnet_model_name_or_path=source, **options | {option: None}))


def test_gradient_checkpointing_is_on_and_changes_no_bit(words, reference, tmp_path, monkeypatch):
    kept, prepare = [], library.make_controlnet
    monkeypatch.setattr(library, "make_controlnet", lambda *each: kept.append(prepare(*each)) or kept[-1])
    train(words(gradient_checkpointing=True, max_train_steps=2))
    assert kept[0].is_gradient_checkpointing
    for key, value in weights(tmp_path / "out").items():
        torch.testing.assert_close(value, reference[key], rtol=0, atol=1e-6)


def test_losses_are_logged_by_the_documents_names_and_every_deblur_every_steps(words, vgg_file, tmp_path):
    train(words(deblur_every=2, perceptual_loss_weight=0.1, perceptual_weights=vgg_file))
    names = {"train/loss", "train/loss_simple", "train/loss_vlb"}
    parts = {f"train/deblur_{part}_loss" for part in ("l1", "mse", "perceptual", "gradient")}
    parts |= {"train/total_deblur_loss"} | {f"{part}_raw" for part in parts}
    logged = rows(tmp_path / "out")
    for number in (1, 3):
        assert names | parts | {"lr", "gradient_norm"} <= logged[number].keys()
    for number in (2, 4):
        assert names <= logged[number].keys() and not parts & logged[number].keys()


def test_the_image_log_has_the_documents_keys_and_shows_what_they_say(words, tmp_path):
    train(words(logger_freq=3, use_attention=True, log_guidance_scale=9, gradient_accumulation_steps=2))
    folder = tmp_path / "out" / "image_log" / "train"
    keys = {"reconstruction", "control", "blur_input", "clear_target", "conditioning", "samples_cfg_scale_9.00"}
    # batches 3 and 6 fall into steps 2 and 3; an epoch has 3 batches of 6 images
    names = ("000002_e-000001_b-000001", "000003_e-000002_b-000000")
    wanted = {f"{key}_gs-{name}.png" for key in keys for name in names}
    assert {path.name for path in folder.iterdir()} == wanted
    pictures = {path.name.partition("_gs")[0]: load_rgb(path).astype(int) for path in sorted(folder.iterdir())}
    assert {picture.shape for picture in pictures.values()} == {(SIDE, 2 * SIDE, 3)}
    blurred, control = pictures["blur_input"], pictures["control"]
    assert 0 < np.abs(blurred * 0.98 - control).mean() < 4 and (pictures["conditioning"] < 128).any()
    assert not np.array_equal(blurred, pictures["clear_target"])


@pytest.mark.parametrize("kind", ["folder", "pairs", "split"])
def test_validation_scores_held_out_images_and_improves_with_the_fixed_loss(words, images, tmp_path, kind, monkeypatch):
    given = {"validation_dir": images / "heldout"}
    if kind != "folder":
        root = tmp_path / "pairs"
        for name in ("clear_images", "blur_images"):
            (root / name).mkdir(parents=True)
        lines = []
        for i, path in enumerate([*sorted((images / "sharp").iterdir()), *sorted((images / "heldout").iterdir())]):
            shutil.copy(path, root / "clear_images" / f"{i}.png")
            Image.fromarray(apply_blur(load_rgb(path), "gaussian_blur", {"sigma": 2})).save(
                root / "blur_images" / f"{i}.png")
            lines.append(json.dumps({"clear_image": f"{i}.png", "blur_image": f"{i}.png",
                                     "blur_type": "gaussian_blur"}) + "\n")
        (root / "blur_types.json").write_text("".join(lines[:6] if kind == "split" else lines[6:]))
        (root / VALIDATION_FILE).write_text("".join(lines[6:]))
        given = {"validation_dir": root}
        if kind == "split":
            given = {"data_root": root, "source_dir": None}
    train(words(validation_steps=2, num_validation_images=2, guidance_scale=1, strength=0.5, **given))
    logged = rows(tmp_path / "out")
    names = {"psnr", "ssim", "psnr_input", "ssim_input", "psnr_vae", "loss"}
    for number in (0, 2, 4):
        assert {f"validation/{name}" for name in names} <= logged[number].keys()
        assert (tmp_path / "out" / "validation" / f"step-{number:06d}.png").exists()
    assert "validation/loss" not in logged[3]
    assert logged[0]["validation/psnr_input"] == logged[4]["validation/psnr_input"] > 15
    assert logged[4]["validation/loss"] < logged[0]["validation/loss"]


def test_the_fixed_loss_measures_what_is_trained_and_held_out_prompts_are_worded_as_in_training(words, images, tmp_path,
                                                                                               loaded):
    clean, blurred, noise = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for start in (clean, blurred):
        assert validation.fixed_t_loss(lambda z, t, *_: library.noise_between(loaded.scheduler, clean, z, t),
                                       loaded.scheduler, clean, start, None, None, noise, 1, 40) < 1e-6
    losses = []
    for start in ("clean", "blurred"):
        given = words(output_dir=tmp_path / start, max_train_steps=1, validation_dir=images / "heldout", t_max=40,
                      train_start=start, use_augmentation=True, num_inference_steps=1, guidance_scale=1)
        train(given)
        losses.append(rows(tmp_path / start)[0]["validation/loss"])
    assert losses[1] > 1.1 * losses[0]  # the base model knows nothing of the blur
    args = train_deblur_controlnet.parse_args(given)
    items, plain = ([*validation.heldout_from_args(args, dataset_from_args(args))] for args.use_augmentation in (
        True, False))
    for item, other in zip(items, plain, strict=True):
        assert item["prompt"] == prompts(True)[item["blur_type"]] and other["prompt"] == prompts()[item["blur_type"]]
        assert torch.equal(item["target"], other["target"])


def test_options_of_sampling_are_stored_and_used_again(words, tmp_path, base):
    train(words(max_train_steps=1, t_max=500, t_min=10, num_inference_steps=7, guidance_scale=2, use_augmentation=True,
                proportion_empty_prompts=0.25))
    stored = json.loads((tmp_path / "out" / "controlnet" / "deblur_config.json").read_text())
    assert stored == {"base_model": base.name, "guidance_scale": 2.0, "image_size": SIDE, "num_inference_steps": 7,
                      "proportion_empty_prompts": "0.25", "strength": 0.5, "t_max": 500, "t_min": 10,
                      "train_start": "clean", "use_augmentation": True}
    model = deblur.DeblurControlNet.load_from_checkpoint(str(tmp_path / "out"), str(base))
    assert model.settings == library.DEFAULT_SETTINGS | stored
    with pytest.raises(ValueError, match="--strength 0.6: this ControlNet was trained up to 0.5"):
        model.choose(strength=0.6)


def test_a_run_on_two_processes_has_the_validation_loss_of_one_with_the_same_global_batch(words, images, tmp_path):
    given = {"max_train_steps": 2, "batch_size": 1, "validation_dir": images / "heldout", "use_attention": True,
             "num_inference_steps": 1, "guidance_scale": 1}
    run_on_two_processes("-m", "recipes.deblur_controlnet.train_deblur_controlnet",
                         *words(output_dir=tmp_path / "two", logger_freq=2, **given))
    train(words(output_dir=tmp_path / "one", gradient_accumulation_steps=2, **given))
    one, two = (rows(tmp_path / name) for name in ("one", "two"))
    assert two[2]["validation/loss"] == pytest.approx(one[2]["validation/loss"], rel=1e-4)
    assert one[2]["validation/loss"] != pytest.approx(one[0]["validation/loss"], rel=1e-3)
    assert two[2]["train/loss"] == pytest.approx(one[2]["train/loss"], rel=1e-4)
    a, b = (weights(tmp_path / name) for name in ("one", "two"))
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)
    picture, = (tmp_path / "two" / "image_log" / "train").glob("blur_input_*")
    assert picture.name == "blur_input_gs-000002_e-000000_b-000002.png"  # each process has seen two batches


def test_gpus_and_precision_name_accelerate_launch(words, capsys):
    train_deblur_controlnet.parse_args(words(gpus=2, precision=16))
    printed = capsys.readouterr().out
    assert "--gpus 2 does nothing; start with `accelerate launch --multi_gpu --num_processes 2 -m recipes." in printed
    assert "--precision 16 does nothing" in printed and "--mixed_precision bf16`" in printed


@pytest.mark.parametrize(("given", "line"), [
    ({"pretrained_model_name_or_path": "./nowhere"}, r"--pretrained_model_name_or_path \./nowhere: no such folder"),
    ({"pretrained_model_name_or_path": "assets/tiny-kontext"}, "assets/tiny-kontext: no model_index.json with a unet"),
    ({"data_root": "nowhere"}, "stored pairs with --data_root, or sharp images with --source_dir, one of them"),
    ({"source_dir": None}, "stored pairs with --data_root, or sharp images with --source_dir, one of them"),
    ({"source_dir": None, "data_root": "nowhere"}, "nowhere/blur_types.json: no such file; make it with"),
    ({"image_size": 36}, "--image_size 36: this model needs a multiple of 8"),
    ({"batch_size": 7}, "6 usable images are fewer than --train_batch_size 7"),
    ({"batch_size": 0}, "--train_batch_size 0: give 1 or more"),
    ({"elbo_weight": -1}, "--elbo_weight -1.0: give 0 or more"),
    ({"gradient_loss_weight": "nan"}, "--gradient_loss_weight nan: give 0 or more"),
    ({"deblur_every": 0}, "--deblur_every 0: give 1 or more"),
    ({"decode_crop": 8}, "--decode_crop 8: give 0 or at least 16 latents"),
    ({"image_size": 68}, "--image_size 68: this model needs a multiple of 8"),
    ({"t_min": 5, "t_max": 5}, "--t_min 5: must be below the end of the trained timesteps, 5"),
    ({"t_min": 400, "num_inference_steps": 4}, "--num_inference_steps 4 within --strength 1 end at timestep 249"),
    ({"t_min": 1000}, "--t_min 1000: must be below the end of the trained timesteps, 1000"),
    ({"t_min": 5, "deblur_t_max": 5}, "--deblur_t_max 5 must be above --t_min 5"),
    ({"t_max": 2000}, "^--t_max 2000: the base model has 1000 timesteps; lower it$"),
    ({"t_max": 400, "strength": 0.5}, "--strength 0.5: sampling would begin beyond --t_max 400 of 1000 timesteps"),
    ({"num_inference_steps": 5000}, "--num_inference_steps 5000 within --strength 1.*only 1000 timesteps"),
    ({"num_inference_steps": 0}, "--num_inference_steps 0: give 1 or more"),
    ({"strength": 0}, "--strength 0.0: give more than 0, at most 1"),
    ({"strength": 0.01, "num_inference_steps": 50}, "--num_inference_steps 50 within --strength 0.01"),
    ({"simple_loss_weight": 0, "deblur_loss_weight": 0}, "are all 0; raise one"),
    ({"l1_loss_weight": 0, "mse_loss_weight": 0, "gradient_loss_weight": 0}, "--deblur_loss_weight without a part"),
    ({"adam_beta2": 1}, "--adam_beta1 0.9, --adam_beta2 1.0: give 0 or more, below 1"),
    ({"lr_scheduler": "piecewise_constant"}, "--lr_scheduler piecewise_constant needs --lr_step_rules"),
    ({"perceptual_loss_weight": 0.1, "perceptual_weights": "no.pth"},
     "--perceptual_loss_weight 0.1 needs vgg16-397923af.pth .*--perceptual_weights, or give weight 0"),
    ({"optimizer": "schedule_free"}, "--optimizer schedule_free replaces the schedule"),
    ({"controlnet_model_name_or_path": "assets/tiny-sd"}, "assets/tiny-sd: no config.json there"),
    ({"controlnet_model_name_or_path": "/no/such"}, "^--controlnet_model_name_or_path /no/such: no such file or f"),
    ({"controlnet_model_name_or_path": "~/x"}, "^--controlnet_model_name_or_path ~/x: no such file or folder"),
    ({"proportion_empty_prompts": 2}, "--proportion_empty_prompts '2': must lie between"),
    ({"resume_from_checkpoint": "checkpoint-9"}, "--resume_from_checkpoint checkpoint-9: manifest.json is missing"),
], ids=str)
def test_bad_input_is_one_line_that_names_the_flag_before_the_base_model_loads(words, given, line, monkeypatch,
                                                                               no_weights):
    monkeypatch.chdir(PROJECT_ROOT)
    with pytest.raises((ValueError, OSError), match=line) as error:
        train(words(**given))
    assert "\n" not in str(error.value)


def test_training_images_may_not_be_held_out_and_nothing_is_written_over(words, images, tmp_path):
    with pytest.raises(ValueError, match=r"\(held out\) is the same file as .* \(training\)"):
        train(words(validation_dir=images / "sharp"))
    train(words(max_train_steps=1, checkpointing_steps=1))
    with pytest.raises(ValueError, match="holds an earlier run; add --resume_from_checkpoint latest"):
        train(words(max_train_steps=1))
    with pytest.raises(ValueError, match=r"differs in use_attention \(was False, now True\)"):
        train(words(max_train_steps=2, use_attention=True, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match=r"differs in adam_weight_decay .*, learning_rate \(was 0.001, now 1e-05\)"):
        train(words(learning_rate=1e-5, adam_weight_decay=0, resume_from_checkpoint="latest"))
    for name in ("sharp", "moved"):
        shutil.copytree(images / "sharp", tmp_path / name)
    replaced = tmp_path / "sharp" / "0.png"
    Image.fromarray(photograph("chelsea", (40, 40))).save(replaced)
    with pytest.raises(ValueError, match=r"differs in images \(was "):
        train(words(max_train_steps=2, source_dir=tmp_path / "sharp", resume_from_checkpoint="latest"))
    shutil.copy(images / "sharp" / "0.png", replaced)
    replaced.rename(replaced.with_name("00.png"))
    with pytest.raises(ValueError, match=r"differs in images \(was "):
        train(words(max_train_steps=2, source_dir=tmp_path / "sharp", resume_from_checkpoint="latest"))
    train(words(source_dir=tmp_path / "moved", max_train_steps=1, resume_from_checkpoint="latest"))
    shutil.rmtree(tmp_path / "out" / "checkpoint-1")
    for given in ({}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(ValueError, match="holds a finished controlnet and no sound checkpoint"):
            train(words(max_train_steps=1, **given))


def test_a_signal_saves_a_sound_checkpoint_that_deblurs_too(words, base, tmp_path, sigterm_in_step):
    sigterm_in_step(train_deblur_controlnet, 2)
    assert train(words(use_attention=True, checkpointing_steps=1, checkpoints_total_limit=1)) == 128 + 15
    (number, path), = checkpoint.list_checkpoints(tmp_path / "out")
    assert number == 2 and checkpoint.fault(path) is None
    model = deblur.DeblurControlNet.load_from_checkpoint(str(path), str(base))
    assert model.model.attention is not None and model.settings["num_inference_steps"] == 2


# --- the commands


@pytest.fixture
def trained(ours, tmp_path):
    """Folder that `ours` was loaded from."""
    return tmp_path


def test_the_command_deblurs_a_folder_with_its_structure_and_skips_what_is_done(trained, ours, base, tmp_path, capsys,
                                                                                 monkeypatch):
    source, out = tmp_path / "blurred", tmp_path / "deblurred"
    (source / "sub").mkdir(parents=True)
    for name, size in (("a.png", (40, 33)), ("sub/b.jpg", (24, 50))):
        Image.fromarray(photograph(size=size)).save(source / name)
    (source / "broken.png").write_bytes(b"no image")
    given = ["--model", str(trained), "--pretrained_model_name_or_path", str(base), "--input", str(source), "--output",
             str(out), "--device", "cpu", "--num_inference_steps", "3"]

    def run(*more):
        code = deblur.main(deblur.parse_args([*given, *more]))
        return code, capsys.readouterr().out

    code, said = run("--blur_type", "motion_blur")
    assert code == 1 and "2 deblurred, 0 already there, 1 failed" in said
    assert load_rgb(out / "a.png").shape == (40, 33, 3) and load_rgb(out / "sub" / "b.jpg").shape == (24, 50, 3)
    sidecar = json.loads((out / "a.png.json").read_text())
    assert sidecar["prompt"] == prompts()["motion_blur"] and sidecar["num_inference_steps"] == 3
    wanted = ours.deblur(torch.from_numpy(load_rgb(source / "a.png").copy()).movedim(-1, 0)[None] / 127.5 - 1,
                         prompts()["motion_blur"], num_inference_steps=3)
    assert np.abs(load_rgb(out / "a.png") - deblur.to_uint8(wanted)[0].astype(int)).max() <= 1
    assert "0 deblurred, 2 already there" in run("--blur_type", "motion_blur")[1]
    assert "2 deblurred, 0 already there" in run()[1]  # auto: another prompt
    assert json.loads((out / "a.png.json").read_text())["prompt"] == ""
    assert "2 deblurred, 0 already there" in run("--prompt", "sharp")[1]


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", library.ATTENTION_FILE, library.DECODER_FILE])
def test_a_model_trained_anew_in_the_same_folder_makes_its_images_anew(pipe, base, images, tmp_path, capsys, name):
    model = make_model(copy.deepcopy(pipe), use_attention=True, sd_locked=False)
    _, folder = save_and_reload(pipe, model, tmp_path, num_inference_steps=1)

    def run():
        deblur.main(deblur.parse_args([
            "--model", str(tmp_path), "--pretrained_model_name_or_path", str(base), "--input",
            str(images / "heldout"), "--output", str(tmp_path / "made"), "--device", "cpu"]))
        return capsys.readouterr().out

    assert "2 deblurred" in run() and "0 deblurred, 2 already there" in run()
    save_file({key: value + 0.01 for key, value in load_file(folder / name).items()}, folder / name)
    assert "2 deblurred, 0 already there" in run()
    assert "0 deblurred, 2 already there" in run()


def test_the_weights_of_a_legacy_file_are_its_hash_and_a_hub_id_has_none(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"weights")
    assert library.hash_weights(path) == {"last.ckpt": hashlib.sha256(b"weights").hexdigest()}
    assert library.hash_weights("someone/controlnet") == {}


@pytest.mark.parametrize(("given", "line"), [
    (["--strength", "2"], "--strength 2.0: give more than 0, at most 1"),
    (["--tile", "64", "--tile_overlap", "40"], "--tile_overlap 40: give 0 to half of --tile 64"),
    (["--num_inference_steps", "0"], "--num_inference_steps 0: give 1 or more"),
    (["--num_inference_steps", "1001"], "--num_inference_steps 1001 within --strength 1"),
    (["--strength", "0"], "--strength 0.0: give more than 0, at most 1"),
    (["--model", "./nowhere"], r"^--model \./nowhere: no such file or folder"),
    (["--model", "/nosuch"], "^--model /nosuch: no such file or folder"),
    (["--model", "assets/tiny-sd"], "^--model assets/tiny-sd: no config.json there"),
], ids=str)
def test_bad_input_of_the_command_is_one_line_before_the_base_model_loads(trained, base, images, tmp_path, given, line,
                                                                          monkeypatch, no_weights):
    monkeypatch.chdir(PROJECT_ROOT)
    with pytest.raises((ValueError, OSError), match=line):
        deblur.main(deblur.parse_args([
            "--model", str(trained), "--pretrained_model_name_or_path", str(base), "--input",
            str(images / "heldout"), "--output", str(tmp_path / "made"), "--device", "cpu", *given]))


@pytest.mark.parametrize("linear_light", [False, True], ids=["srgb", "light"])
@pytest.mark.parametrize(("blur_type", "params"), [
    ("motion_blur", {"length": 9, "angle": 30}), ("gaussian_blur", {"sigma": 2}), ("defocus_blur", {"radius": 3}),
    ("lens_blur", {"strength": 0.8})])
def test_the_classical_methods_know_the_true_kernel_and_gain_by_it(blur_type, params, linear_light):
    kernel = evaluate.blur_kernel(blur_type, params)
    assert kernel.sum() == pytest.approx(1) and kernel.shape[0] == kernel.shape[1]
    image = np.zeros((41, 41, 3), np.float32)
    image[20, 20] = 255
    margin = len(kernel) // 2
    box = slice(20 - margin, 21 + margin)
    made = apply_blur(image, blur_type, params)
    assert np.abs(made[box, box, 0] - 255 * kernel).max() < 0.02 and made.sum() == pytest.approx(3 * 255, rel=1e-3)
    sharp = photograph("coffee", (64, 64))
    blurred = apply_blur(sharp, blur_type, params | {"linear_light": linear_light})

    def error(image):
        return np.square(image.astype(float) - sharp).mean()

    trials = {}
    for row, image in evaluate.classical_rows(blurred, kernel, linear_light):
        trials.setdefault(row.split()[0], []).append(error(image))
    assert set(trials) == {"wiener", "lucy"}
    assert all(min(errors) < (1 if linear_light else 0.8) * error(blurred) for errors in trials.values())
    other = [error(image) for row, image in evaluate.classical_rows(blurred, kernel, not linear_light)]
    assert min(other) > min(map(min, trials.values()))  # where the blur is a convolution, and only there, it is undone


def test_what_surrounds_a_scored_crop_is_blurred_into_it(tmp_path):
    sharp = photograph("coffee", (96, 96))
    Image.fromarray(sharp).save(tmp_path / "a.png")
    params = {"length": 15, "angle": 30}

    def blur(image, rng):
        return apply_blur(image, "motion_blur", params), params

    record, = folder_records(tmp_path)
    whole = to_tensor(apply_blur(sharp, "motion_blur", params))[None]
    (target, control, own), = load_pairs(record, 0, blur, crop_px=32, margin_px=evaluate.MARGIN_PX)
    torch.testing.assert_close(target, to_tensor(sharp)[None, :, 32:64, 32:64])
    torch.testing.assert_close(control, whole[..., 32:64, 32:64])
    assert own is params
    alone = load_pairs(record, 0, blur, crop_px=32)[0][1]
    assert (alone - control).abs().max() > 0.01
    corners = load_pairs(record, 0, blur, crop_px=48, crops=4, margin_px=evaluate.MARGIN_PX)
    torch.testing.assert_close(corners[3][1], whole[..., 48:, 48:])


@pytest.mark.parametrize("flags", [
    (), ("--linear_light",), ("--base_row", "--no-classical_rows", "--controlnet_conditioning_scale", "0")],
    ids=["all", "light", "base"])
def test_evaluation_scores_every_row_for_every_blur_type(flags, trained, base, images, tmp_path, capsys, monkeypatch):
    out = tmp_path / "scores"
    seen, is_base = [], "--base_row" in flags
    monkeypatch.setattr(evaluate, "LUCY_ITERATIONS", (3,))
    monkeypatch.setattr(evaluate, "apply_blur", lambda image, kind, params: seen.append(params["linear_light"])
                        or apply_blur(image, kind, params))
    code = evaluate.main(evaluate.parse_args([
        "--model", str(trained), "--pretrained_model_name_or_path", str(base), "--clean", str(images / "heldout"),
        "--output", str(out), "--device", "cpu", "--gaussian_sigma", "2", "--crop_px", "32", "--prompt_by_type",
        *flags]))
    report = json.loads((out / "metrics.json").read_text())
    assert set(seen) == {"--linear_light" in flags}
    assert code == 0 and list(report["blur_types"]) == list(BLUR_TYPES) and report["images"] == 2
    assert report["blur_types"]["gaussian_blur"]["params"] == {"sigma": 2}
    for part in report["blur_types"].values():
        assert list(part["rows"]) == (
            ["input", "base", "deblurred", "ceiling"] if is_base else [row for row in evaluate.ROWS if row != "base"])
        if is_base:  # a trained ControlNet that is not heard leaves the base model
            assert part["rows"]["base"]["psnr"] == part["rows"]["deblurred"]["psnr"]
        for row in part["rows"].values():
            assert row["psnr"]["lo"] <= row["psnr"]["mean"] <= row["psnr"]["hi"] and 0 <= row["ssim"]["mean"] <= 1
        gain = part["rows"]["deblurred"]["psnr"]["mean"] - part["rows"]["input"]["psnr"]["mean"]
        assert part["deblurred_minus"]["input"]["psnr"]["mean"] == pytest.approx(gain)
    assert (out / "scores.csv").read_text().count("\n") == 1 + 4 * (4 if is_base else 5) * 2
    assert (out / "grid.png").exists()
    assert ("Wiener, true kernel (balance=" in capsys.readouterr().out) != is_base


def test_the_example_trains_and_scores_every_arm_and_tables_them(tmp_path, capsys, monkeypatch):
    for folder, name in (("photos", "chelsea"), ("heldout", "coffee")):
        (tmp_path / folder).mkdir()
        Image.fromarray(photograph(name, (160, 160))).save(tmp_path / folder / f"{name}.png")
    monkeypatch.setattr(evaluate, "LUCY_ITERATIONS", (2,))
    words = ["--photos", str(tmp_path / "photos"), "--heldout", str(tmp_path / "heldout"), "--num_samples", "8",
             "--max_train_steps", "1", "--crop_px", "64", "--output", str(tmp_path / "made")]
    example.main(example.parse_args([*words, "--arms", "full", "attention"]))
    table = json.loads((tmp_path / "made" / "table.json").read_text())
    assert [(row["arm"], row["blur_type"]) for row in table] == list(itertools.product(
        ("full", "attention"), BLUR_TYPES))
    assert {"base", "wiener", "lucy"} < set(table[0]) and not {"base", "wiener", "lucy"} & set(table[-1])
    for row in table:
        assert row["gain"]["mean"] == pytest.approx(row["deblurred"] - row["input"])
    assert (tmp_path / "made" / "attention" / library.MODEL_FOLDER / library.ATTENTION_FILE).is_file()
    assert capsys.readouterr().out.count("\nattention ") == 1
    with pytest.raises(ValueError, match="is not empty"):
        example.parse_args(words)
    with pytest.raises(ValueError, match="--perceptual_weights"):
        example.parse_args([*words, "--arms", "no_perceptual"])


def test_every_arm_of_the_example_is_a_training_that_differs_from_the_full_one(tmp_path, vgg_file, images):
    def options(arm):
        words = shlex.split(f"{example.TRAINING} {example.ARMS[arm]}") + [
            "--source_dir", str(images / "photos"), "--output_dir", str(tmp_path / "made"), "--perceptual_weights",
            str(vgg_file), "--pretrained_model_name_or_path", example.BASE]
        return {name: value for name, value in vars(train_deblur_controlnet.parse_args(words)).items()
                if name != "vgg_file"}  # which follows from the weights of the losses

    full = options("full")
    for arm in set(example.ARMS) - {"full"}:
        assert len(full.items() - options(arm).items()) == 1, arm


def test_text_picture_breaks_lines():
    lines = [np.asarray(validation.text_picture(text, 100, 60)).min(axis=(1, 2)) for text in ("a", "word " * 8)]
    assert (lines[0] < 128).sum() < (lines[1] < 128).sum()

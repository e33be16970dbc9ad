"""The embedded Stable Diffusion model: what its folder promises to the recipes and to stock diffusers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from scripts import make_tiny_kontext as tiny
from scripts import make_tiny_sd as tiny_sd

FOLDER = Path(__file__).parent.parent / "assets" / "tiny-sd"


@pytest.fixture(scope="module")
def pipe():
    unet = UNet2DConditionModel.from_pretrained(FOLDER, subfolder="unet")
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96))
    pipe = StableDiffusionControlNetPipeline.from_pretrained(FOLDER, unet=unet, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def crops():
    return tiny.to_tensor(tiny.heldout_crops(128, 4))


@pytest.fixture(scope="module")
def codec(crops):
    """Principal components, made to overlap at random so that every weight counts."""
    torch.manual_seed(0)
    return tiny_sd.LinearCodec().init(crops).requires_grad_(False)


def test_folder_is_small_and_holds_only_safetensors_and_text():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
    assert sum(path.stat().st_size for path in files) < 8e6
    assert "Never trained on" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_noise_schedule_and_sizes_are_those_of_stable_diffusion_but_for_the_autoencoder(pipe):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert torch.allclose(pipe.scheduler.betas, betas)
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.tokenizer.model_max_length == 77
    assert pipe.vae_scale_factor == tiny_sd.LATENT_PX
    assert tiny_sd.hint_channels(pipe.vae) == (16, 32, 96)


def test_stock_pipelines_return_the_asked_size_and_repeat_with_a_seed(pipe, crops):
    hint = crops[:1, :, :64, :96] / 2 + 0.5
    img2img = StableDiffusionControlNetImg2ImgPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.controlnet,
        DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing"), None, None,
        requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)

    def run(pipe, seed, **options):
        return pipe("a photo", guidance_scale=3.0, output_type="pt", generator=torch.Generator().manual_seed(seed),
                    **options).images

    for options in ({"pipe": pipe, "image": hint, "num_inference_steps": 2},
                    {"pipe": img2img, "image": hint, "control_image": hint, "num_inference_steps": 20,
                     "strength": 0.05}):
        images = run(seed=0, **options)
        assert images.shape == hint.shape and images.isfinite().all()
        assert torch.equal(images, run(seed=0, **options)) and not torch.equal(images, run(seed=1, **options))


def test_zero_convolutions_leave_the_prediction_of_the_base_unchanged_and_then_do_not(pipe, crops):
    text = pipe.encode_prompt("a photo", "cpu", 1, False)[0]
    latents = torch.randn(1, 16, 16, 24, generator=torch.Generator().manual_seed(0))
    hint = crops[:1, :, :64, :96] / 2 + 0.5

    @torch.no_grad()
    def predict():
        down, mid = pipe.controlnet(latents, 300, text, hint, return_dict=False)
        return pipe.unet(latents, 300, text, down_block_additional_residuals=down,
                         mid_block_additional_residual=mid).sample

    with torch.no_grad():
        base = pipe.unet(latents, 300, text).sample
        assert torch.equal(predict(), base)
        weight = pipe.controlnet.controlnet_mid_block.weight
        weight.fill_(0.01)
        changed = predict()
        weight.zero_()
    assert not torch.allclose(changed, base, atol=1e-4)


def test_autoencoder_keeps_unseen_photographs_at_33_db_through_the_arithmetic_of_the_stock_pipeline(pipe, crops):
    """Stable Diffusion's pipelines scale the latents and do not shift them."""
    with torch.no_grad():
        latents = pipe.vae.encode(crops).latent_dist.sample() * pipe.vae.config.scaling_factor
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False,
                                 generator=torch.Generator())[0]
    assert tiny.mean_psnr(images, crops) > 33
    assert latents.std() == pytest.approx(tiny_sd.SPREAD, rel=0.3)


def test_an_error_in_the_latents_costs_the_image_what_it_costs_in_any_other_channel(pipe):
    grey = torch.zeros(16, 16, 16, 16)
    moved = grey.clone()
    moved[torch.arange(16), torch.arange(16), 8, 8] = 0.1
    with torch.no_grad():
        difference = pipe.vae.decode(moved).sample - pipe.vae.decode(grey).sample
    cost = difference.square().sum((1, 2, 3)).sqrt() / 0.1
    assert torch.allclose(cost, torch.ones(16), atol=0.1)


@pytest.mark.parametrize("t", [200, 600])
def test_base_denoises_an_unseen_photograph(pipe, crops, t):
    noisy, denoised = tiny_sd.denoise(pipe, crops[::4], t)
    assert tiny.mean_psnr(denoised, crops[::4]) > tiny.mean_psnr(noisy, crops[::4]) + 2


def test_different_prompts_give_different_embeddings(pipe):
    text = tiny_sd.encode_text(pipe).flatten(1)
    assert (torch.cdist(text, text) + torch.eye(len(text)) * 1e3).min() > 0.05


def test_the_class_computes_the_linear_codec_also_from_half_precision_on_disk(codec, crops):
    vae = tiny_sd.make_vae()
    tiny_sd.install(vae, codec)
    with torch.no_grad():
        for tolerance in (2e-3, 1 / 127.5):
            posterior = vae.encode(crops).latent_dist
            latents = codec.encode(crops)
            assert (posterior.mean - latents).abs().max() < 10 * tolerance
            assert posterior.std.max() < 1e-6
            assert (vae.decode(latents).sample - codec.decode(latents)).abs().max() < tolerance
            vae = vae.half().float()


def test_blurred_batches_start_from_a_blur_of_their_own_crop_under_its_prompt():
    rng = np.random.default_rng(0)
    clean, start, t, prompts, _ = tiny_sd.draw_blurred_batch([tiny.load_sample("skimage chelsea")], rng)
    blurred = torch.from_numpy((clean != start).any((1, 2, 3)))
    assert torch.equal(blurred, prompts > 0) and 0 < blurred.sum() < len(blurred)
    assert ((t >= tiny_sd.BLUR_T[0]) & (t < tiny_sd.BLUR_T[1]))[blurred].all() and t[~blurred].max() > tiny_sd.BLUR_T[1]
    error, other = (np.abs(crops.astype(float) - start).mean((1, 2, 3)) for crops in (clean, np.roll(clean, 1, 0)))
    assert (error < 0.9 * other).all()


def test_matching_pixels_changes_latents_and_not_images(codec, crops):
    before = codec(crops[:2])
    codec.match_pixels(crops)
    assert torch.allclose(codec(crops[:2]), before, atol=1e-4)
    spread = codec.encode(crops).std((0, 2, 3))
    assert (spread.diff() < 0).all()


def test_make_command_trains_every_stage_and_names_the_photographs_in_the_card(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(tiny.load_sample("skimage chelsea")).save(photos / "cat.png")
    monkeypatch.setattr(tiny_sd, "measure", lambda pipe: "figures")
    monkeypatch.setattr(tiny_sd, "heldout_crops", lambda size_px, per_photo: tiny.heldout_crops(size_px, 1))

    def make(*words):
        monkeypatch.setattr("sys.argv", ["make_tiny_sd", "--work_dir", str(tmp_path / "state"), "--output_dir",
                                         str(tmp_path / "model"), "--photos", str(photos), *words])
        tiny_sd.main()

    with pytest.raises(ValueError, match="one --credit line for every --photos folder"):
        make()
    make("--credit", "a cat by Stefan van der Walt, CC0", "--vae_steps", "4", "--base_steps", "2", "1",
         "--blur_steps", "2", "--seed", "3")
    steps = {path.stem: tiny.load_state(path)[1]["step"] for path in (tmp_path / "state").iterdir()}
    assert steps == {"vae": "4", "decoder": "2", "base": "3", "blur": "2"}
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    for text in ("- a cat by Stefan van der Walt, CC0\n", "figures", "3 of 3 steps", "2 of 2 steps"):
        assert text in card
    trained = UNet2DConditionModel.from_pretrained(tmp_path / "model", subfolder="unet").state_dict()
    first = tiny_sd.make_pipeline(3).unet.state_dict()
    assert not torch.equal(trained["conv_in.weight"], first["conv_in.weight"].half().float())

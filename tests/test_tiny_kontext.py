"""The embedded default model: what its folder promises to the scripts and to stock diffusers."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

from scripts import make_tiny_kontext as tiny
from utils import flux

FOLDER = Path(__file__).parent.parent / "assets" / "tiny-kontext"


@pytest.fixture(scope="module")
def pipe():
    pipe = FluxKontextPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def crops():
    return tiny.heldout_crops(128, 1)


def codec_psnr(pipe, control, target):
    return tiny.mean_psnr(tiny.through_codec(pipe.vae, tiny.to_tensor(control)), tiny.to_tensor(target))


def test_folder_is_small_and_holds_only_safetensors_and_text():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
    assert sum(path.stat().st_size for path in files) < 30e6
    assert "Never trained on" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_sizes_of_latents_and_scheduler_are_those_the_scripts_rely_on(pipe):
    assert pipe.vae_scale_factor == flux.latent_scale(pipe.vae) == 4
    assert flux.size_multiple(pipe.vae) == 8
    assert pipe.transformer.config.guidance_embeds
    assert (pipe.scheduler.config.use_dynamic_shifting, pipe.scheduler.config.shift) == (True, 3.0)


def test_stock_call_returns_the_asked_size_and_repeats_with_a_seed(pipe, crops):
    def run(seed):
        return pipe(image=Image.fromarray(crops[0]), prompt=tiny.RESTORE, height=96, width=136, max_area=96 * 136,
                    _auto_resize=False, num_inference_steps=2, max_sequence_length=tiny.TEXT_TOKENS,
                    generator=torch.Generator().manual_seed(seed)).images[0]

    image = run(0)
    assert image.size == (136, 96)
    assert image.tobytes() == run(0).tobytes() != run(1).tobytes()


def test_normalised_latents_have_about_zero_mean_and_unit_spread(pipe):
    latents = flux.encode(pipe.vae, tiny.to_tensor(tiny.heldout_crops(128, 4)))
    assert abs(latents.mean()) < 0.3
    assert 0.7 < latents.std() < 1.4


def test_autoencoder_keeps_an_unseen_photograph(pipe, crops):
    assert codec_psnr(pipe, crops, crops) > 26


@pytest.mark.parametrize("size_px", [128, 192])
def test_copy_prompt_reproduces_an_unseen_photograph_within_1_db_of_the_codec(pipe, size_px):
    crops = tiny.heldout_crops(size_px, 1)
    copied = tiny.mean_psnr(tiny.sample(pipe, crops, tiny.COPY, 8), tiny.to_tensor(crops))
    assert copied > codec_psnr(pipe, crops, crops) - 1


def test_restore_prompt_improves_a_noisy_photograph_over_the_codec_and_the_copy_prompt_does_not(pipe):
    crops = tiny.heldout_crops(128, 2)
    noise = torch.randn(crops.shape, generator=torch.Generator().manual_seed(0)).numpy()
    noisy = (crops + 25 * noise).round().clip(0, 255).astype("uint8")
    target = tiny.to_tensor(crops)
    restored, copied = (tiny.mean_psnr(tiny.sample(pipe, noisy, prompt, 4), target)
                        for prompt in (tiny.RESTORE, tiny.COPY))
    assert restored > codec_psnr(pipe, noisy, crops) + 0.5
    assert restored > copied + 0.5


def test_different_prompts_give_different_embeddings(pipe):
    prompts = ["", "a photo of sks dog", "a photo of sks cat", "Xylograph 7", "Xylograph 8", tiny.COPY, tiny.RESTORE]
    with torch.no_grad():
        states, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=16)
    for embeds in (states.flatten(1), pooled):
        distances = torch.cdist(embeds, embeds) + torch.eye(len(prompts)) * 1e3
        assert distances.min() > 0.05


@pytest.mark.parametrize("length", [16, 77, 512])
def test_text_of_any_length_is_padded_or_cut_to_the_asked_tokens(pipe, length):
    with torch.no_grad():
        states, pooled, _ = pipe.encode_prompt(["short", "long words " * 300], None, max_sequence_length=length)
    assert states.shape == (2, length, 64) and pooled.shape == (2, 64)


def test_make_script_continues_where_it_was_stopped(tmp_path):
    """Steps 0-3 in one go equal steps 0-1, a stop, and steps 2-3."""

    def train(path, stop_at=None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))

        def compute_loss(step):
            if step == stop_at:
                raise KeyboardInterrupt
            return model(torch.full((2, 3), 1.0 + step)).square().mean()

        tiny.train(model, compute_loss, lambda model: "", path, steps=4, learning_rate=0.1, save_every=2)
        return model.state_dict()

    whole = train(tmp_path / "whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "halted.safetensors", stop_at=2)
    halted = train(tmp_path / "halted.safetensors")
    assert all(torch.equal(whole[key], halted[key]) for key in whole)
    with pytest.raises(ValueError, match="give the same number"):
        tiny.train(torch.nn.Linear(1, 1), None, None, tmp_path / "whole.safetensors", 5, 0.1, 1)

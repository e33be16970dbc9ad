"""The embedded default model: what its folder promises to the scripts and to stock diffusers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from safetensors.torch import save_file

from scripts import make_tiny_kontext as tiny
from scripts import make_tiny_sd
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


def test_autoencoder_keeps_unseen_photographs_at_34_db(pipe):
    crops = tiny.heldout_crops(128, 4)
    assert codec_psnr(pipe, crops, crops) > 34


@pytest.mark.parametrize("size_px", [128, 192])
def test_copy_prompt_reproduces_an_unseen_photograph_within_1_db_of_the_codec(pipe, size_px):
    crops = tiny.heldout_crops(size_px, 1)
    copied = tiny.mean_psnr(tiny.sample(pipe, crops, tiny.COPY, 8), tiny.to_tensor(crops))
    assert copied > codec_psnr(pipe, crops, crops) - 1


def test_restore_prompt_improves_a_noisy_photograph_over_the_codec_and_the_copy_prompt_does_not(pipe):
    """Also with twice the noise that was trained."""
    crops = tiny.heldout_crops(128, 2)
    noise = torch.randn(crops.shape, generator=torch.Generator().manual_seed(0)).numpy()
    noisy = (crops + 25 * noise).round().clip(0, 255).astype("uint8")
    target = tiny.to_tensor(crops)
    restored, copied = (tiny.mean_psnr(tiny.sample(pipe, noisy, prompt, 4), target)
                        for prompt in (tiny.RESTORE, tiny.COPY))
    assert restored > codec_psnr(pipe, noisy, crops) + 1
    assert restored > copied + 1


@pytest.mark.parametrize("prompt", ["Fill in what is missing", "Restore the faded colours", "Make it brighter",
                                    "Make it black and white", "Make the light warmer"])
def test_edit_prompts_move_an_unseen_photograph_towards_their_target(pipe, prompt):
    make = next(make for _, name, make in tiny.TASKS if name == prompt)
    crops = tiny.heldout_crops(128, 2)
    pairs = [make(crop, np.random.default_rng([1, i])) for i, crop in enumerate(crops)]
    control, target = (np.stack(images) for images in zip(*pairs, strict=True))
    target = tiny.to_tensor(target)
    before, after = ((image - target).square().mean()
                     for image in (tiny.to_tensor(control), tiny.sample(pipe, control, prompt, 4)))
    assert after < 0.8 * before


def test_every_task_keeps_size_and_type_and_all_shares_make_one():
    crop = tiny.heldout_crops(64, 1)[0]
    assert sum(share for share, _, _ in tiny.TASKS) == pytest.approx(1)
    for _, _, make in tiny.TASKS:
        for image in make(crop, np.random.default_rng(0)):
            assert image.shape == crop.shape and image.dtype == np.uint8
    assert tiny.draw_picture(np.random.default_rng(0), 64).shape == (64, 64, 3)


def test_batches_are_drawn_from_the_seed_and_hold_one_prompt_per_reference():
    pool = [tiny.draw_picture(np.random.default_rng(i)) for i in range(3)]
    with_reference = set()
    for step in range(40):
        target, control, prompts = tiny.draw_tasks(pool, np.random.default_rng(step))
        again = tiny.draw_tasks(pool, np.random.default_rng(step))
        assert np.array_equal(target, again[0]) and prompts == again[2]
        assert len(prompts) == len(target) and (control is None or control.shape == target.shape)
        assert (control is None) == (prompts[0] == tiny.GENERATE)
        with_reference.add(control is not None)
    assert with_reference == {True, False}


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

    def train(path, stop_at=None, rounds=(4,)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))

        def compute_loss(step):
            if step == stop_at:
                raise KeyboardInterrupt
            return model(torch.full((2, 3), 1.0 + step)).square().mean()

        tiny.train(model, compute_loss, lambda model: "", path, rounds, learning_rate=0.1, save_every=2)
        return model.state_dict()

    whole = train(tmp_path / "whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "halted.safetensors", stop_at=2)
    halted = train(tmp_path / "halted.safetensors")
    assert all(torch.equal(whole[key], halted[key]) for key in whole)
    with pytest.raises(ValueError, match="give the same number"):
        tiny.train(torch.nn.Linear(1, 1), None, None, tmp_path / "whole.safetensors", [5], 0.1, 1)
    longer = train(tmp_path / "halted.safetensors", rounds=(4, 2))
    straight = train(tmp_path / "straight.safetensors", rounds=(4, 2))
    assert all(torch.equal(longer[key], straight[key]) for key in longer)
    assert not torch.equal(longer["0.weight"], whole["0.weight"])


def test_make_command_trains_every_stage_and_names_the_photographs_in_the_card(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(tiny.load_sample("skimage chelsea")).save(photos / "cat.png")
    monkeypatch.setattr(tiny, "measure", lambda pipe: "figures")
    monkeypatch.setattr(tiny, "DRAWINGS", 2)
    measure_latents = tiny.measure_latents
    monkeypatch.setattr(tiny, "measure_latents", lambda vae, crops: measure_latents(vae, crops[:20]))  # of 1000

    def make(*words):
        monkeypatch.setattr("sys.argv", ["make_tiny_kontext", "--work_dir", str(tmp_path / "state"), "--output_dir",
                                         str(tmp_path / "model"), "--photos", str(photos), *words])
        tiny.main()

    with pytest.raises(ValueError, match="one --credit line for every --photos folder"):
        make()
    assert not (tmp_path / "model").exists()
    make("--credit", "a cat by Stefan van der Walt, CC0", "--vae_steps", "4", "--base_steps", "2", "1", "--seed", "3")
    steps = {path.stem: tiny.load_state(path)[1]["step"] for path in (tmp_path / "state").iterdir()}
    assert steps == {"vae": "4", "decoder": "2", "base": "3"}
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "- a cat by Stefan van der Walt, CC0\n" in card and "figures" in card
    assert "3 of 3 steps" in card and "seed 3;" in card and " seconds on one thread" in card
    trained = FluxKontextPipeline.from_pretrained(tmp_path / "model").transformer.state_dict()
    first = tiny.make_pipeline(3).transformer.state_dict()
    assert not all(torch.equal(trained[key], first[key].to(trained[key].dtype)) for key in first)

    # another autoencoder under the trained stages: each says so, and what was exported stays
    vae, decoder, base = (tmp_path / "state" / f"{stage}.safetensors" for stage in ("vae", "decoder", "base"))
    tensors, metadata = tiny.load_state(vae)
    tensors["ema.analysis"] *= -1
    save_file(tensors, vae, metadata)
    for stale in (decoder, base):
        with pytest.raises(ValueError, match=f"^{stale} was trained on another autoencoder .*; remove it and train"):
            make("--credit", "another", "--seed", "3", "--stage", "export")
        stale.unlink()
    assert (tmp_path / "model" / "README.md").read_text(encoding="utf-8") == card


def test_a_stage_goes_on_only_with_the_autoencoder_that_it_began_with(tmp_path):
    def train(path, steps, codec):
        model = torch.nn.Linear(1, 1)
        tiny.train(model, lambda step: model(torch.ones(1, 1)).sum(), lambda model: "", path, steps, 0.1, 1,
                   codec=codec)
        return tiny.load_state(path, codec)[1]

    path = tmp_path / "base.safetensors"
    assert train(path, [1], "a")["codec"] == "a" and train(path, [1, 1], "a")["step"] == "2"
    with pytest.raises(ValueError, match=f"^{path} was trained on another autoencoder"):
        train(path, [1, 1, 1], "b")
    assert tiny.load_state(path)[1]["step"] == "2"
    old = tmp_path / "old.safetensors"  # of before this was kept: taken as it was
    assert "codec" not in train(old, [1], None) and train(old, [1, 1], "b")["step"] == "2"


def test_rate_decays_in_every_round_from_half_the_rate_of_the_one_before():
    rates = [tiny.decayed(step, (1000, 500), 0.4) for step in range(1500)]
    assert rates[0] == pytest.approx(0.004) and rates[99] == pytest.approx(0.4, rel=0.03)
    assert rates[999] < 1e-5 and rates[1099] == pytest.approx(0.2, rel=0.11) and rates[1499] < 1e-5
    assert rates[500] == pytest.approx(0.2)


@pytest.mark.parametrize("script", [tiny, make_tiny_sd])
def test_untrained_weights_never_take_the_place_of_a_model(script):
    with pytest.raises(ValueError, match="--stage init: --output_dir assets.tiny-.* is there, and its weights"):
        script.parse_args(["--stage", "init"])

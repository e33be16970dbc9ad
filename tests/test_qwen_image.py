"""Claims about the Qwen-Image recipe's model side: equal to the stock pipelines, trains, resumes, saves, low memory."""

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage, pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from my_dataset.dataset_deg_paired import to_tensor
from recipes.qwen_image import example, inference, options, qwen, tiny, train
from recipes.qwen_image.image_datasets.dataset import CustomImageDataset
from recipes.qwen_image.options import ALIASES, DATA_KEYS, make_qwen_parser, parse_qwen_args
from tests.conftest import equal, read_summary, run_on_two_processes
from utils import flux, lora
from utils.flow_matching import clean_from_velocity
from utils.lora import LORA_FILE
from utils.parse import run_main

calculate_dimensions = pipeline_qwenimage_edit.calculate_dimensions
calculate_plus_dimensions = pipeline_qwenimage_edit_plus.calculate_dimensions
CONFIGS = Path(train.__file__).parent / "train_configs"
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1,
                              wait_for_everyone=lambda: None)


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """Half a second each time in a process full of tests, for models that are not large."""
    monkeypatch.setattr(qwen, "free_memory", lambda: None)


@pytest.fixture(scope="module")
def pipe():
    """Text to image, whole; its transformer is 32 wide. Tests leave it as it is."""
    return tiny.make_tiny_pipeline()


@pytest.fixture(scope="module")
def edit_pipe():
    return tiny.make_tiny_pipeline(is_edit=True)


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen") / "tiny-qwen"
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def edit_model(edit_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen") / "tiny-qwen-edit"
    edit_pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plus_model(edit_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen") / "tiny-qwen-edit-plus"
    QwenImageEditPlusPipeline(**edit_pipe.components).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder with images/ (in two shapes, captions of unequal lengths) and control_images/ (squares)."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("images", "control_images"):
        (root / name).mkdir()
        for i in range(4):
            shape = (64, 96 if i % 2 and name == "images" else 64, 3)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / name / f"{i}.png")
    for i in range(4):
        (root / "images" / f"{i}.txt").write_text("a picture " * (i + 1))
    return root


STEP = SimpleNamespace(timestep_shift="none", weighting_scheme="none", logit_mean=0.0, logit_std=1.0, mode_scale=1.29,
                       vae_encode_mode="sample")  # what training_step reads


def words(model, data, output, *more):
    return ["--pretrained_model_name_or_path", str(model), "--img_dir", str(data / "images"), "--img_size", "64",
            "--output_dir", str(output), "--num_workers", "0", "--train_batch_size", "2", "--max_train_steps", "2",
            "--rank", "4", "--report_to", "none", "--logging_steps", "1", "--checkpointing_steps", "0",
            "--learning_rate", "1e-2", "--no-gradient_checkpointing", *map(str, more)]


def run(model, data, output, *more):
    """The LoRA's tensors after training."""
    assert train.main(train.parse_args(words(model, data, output, *more))) is None
    return load_file(Path(output) / LORA_FILE)


def losses(output):
    return [json.loads(line)["loss/flow"] for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def noise_like(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text_of(pipe, *captions):
    return qwen.stack_text([qwen.TextStates(pipe.encode_prompt(caption)[0][0]) for caption in captions], "cpu",
                           torch.float32)


def one_step(pipe):
    """The pipeline with a scheduler that goes from sigma 1 to 0 in one step; the model's own ends at 0.02, which one
    step cannot."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift_terminal=None)
    return type(pipe)(**pipe.components | {"scheduler": scheduler})


@pytest.fixture
def small_edits(monkeypatch):
    """The stock edit pipelines resize to one megapixel; here to 64 x 64, for the text encoder of Plus to 32 x 32."""
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions",
                        lambda area, ratio: calculate_dimensions(64 * 64, ratio))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda area, ratio:
                        calculate_plus_dimensions((64 if area == 1024**2 else 32) ** 2, ratio))


# --- the model's parts against the stock pipelines --------------------------------------------------------------------

def test_the_tiny_tokenizer_cuts_off_the_same_template_as_the_real_one(pipe, edit_pipe):
    for each, tail in ((pipe, "user\n"), (edit_pipe, "user\n")):
        head = each.prompt_template_encode.partition(tail)[0] + tail
        assert len(each.tokenizer(head).input_ids) == each.prompt_template_encode_start_idx


@torch.no_grad()
def test_latents_are_normalised_as_by_the_stock_pipeline_and_a_draw_lies_around_them(edit_pipe):
    images = noise_like(2, 3, 32, 48).clamp(-1, 1)
    mean, std = qwen.posterior(edit_pipe.vae, images)
    stock = edit_pipe._encode_vae_image(images[:, :, None], None)[:, :, 0]
    torch.testing.assert_close(mean, stock)
    assert mean.shape[1:] == std.shape[1:] == (16, 4, 6)
    raw = edit_pipe.vae.encode(images[:, :, None]).latent_dist.std[:, :, 0]
    torch.testing.assert_close(std * torch.tensor(edit_pipe.vae.config.latents_std).view(-1, 1, 1), raw)


@torch.no_grad()
def test_the_colour_codec_returns_pictures_that_are_flat_in_its_squares():
    vae = tiny.make_tiny_pipeline().vae
    tiny.make_colour_codec(vae)
    squares = noise_like(1, 3, 4, 6).clamp(-1, 1)
    picture = squares.repeat_interleave(8, 2).repeat_interleave(8, 3)
    latents, std = qwen.posterior(vae, picture)
    torch.testing.assert_close(latents[:, :3], 2 * squares, atol=1e-4, rtol=0)
    assert std.max() < 1e-5 and not latents[:, 3:].any()
    torch.testing.assert_close(vae.decode(latents[:, :, None] / 2).sample[:, :, 0], picture, atol=1e-4, rtol=0)


def test_tokens_are_packed_as_by_the_stock_pipeline():
    latents = noise_like(2, 16, 4, 6)
    tokens = flux.pack(latents)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(latents[:, None], 2, 16, 4, 6))
    assert torch.equal(flux.unpack(tokens, 4, 6), QwenImagePipeline._unpack_latents(tokens, 32, 48, 8)[:, :, 0])


@torch.no_grad()
def test_a_step_of_the_stock_pipeline_goes_along_the_predicted_velocity(pipe):
    """From sigma 1 to 0: the clean estimate. With guidance: the formula in inference.py."""
    noise = noise_like(1, 16, 4, 6)
    inputs = dict(height=32, width=48, num_inference_steps=1, latents=flux.pack(noise), output_type="latent")
    sigma = torch.ones(1)
    v_p, v_n = (qwen.predict_velocity(pipe.transformer, noise, sigma, [], *text_of(pipe, caption))
                for caption in ("a red cat", " "))
    stock = one_step(pipe)("a red cat", true_cfg_scale=1.0, **inputs).images
    torch.testing.assert_close(flux.unpack(stock, 4, 6), clean_from_velocity(noise, v_p, sigma), atol=1e-5, rtol=0)

    p, n = flux.pack(v_p), flux.pack(v_n)
    guided = n + 3 * (p - n)
    guided = guided * p.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    stock = one_step(pipe)("a red cat", negative_prompt=" ", true_cfg_scale=3.0, **inputs).images
    torch.testing.assert_close(stock, flux.pack(noise) - guided, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["edit", "2509", "2511"])
def test_an_edit_is_predicted_as_by_the_stock_pipeline_and_cut_to_the_target(edit_pipe, small_edits, kind):
    """The control's tokens follow the target's, at positions of their own; the text has read the control too. 2509 is
    a Plus pipeline, and 2511 one whose transformer takes the control for clean at every noise level."""
    if kind != "edit":
        torch.manual_seed(0)
        config = dict(edit_pipe.transformer.config) | {"zero_cond_t": kind == "2511"}
        edit_pipe = QwenImageEditPlusPipeline(**edit_pipe.components | {
            "transformer": QwenImageTransformer2DModel.from_config(config)})
        edit_pipe.set_progress_bar_config(disable=True)
    noise = noise_like(1, 16, 4, 6)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    stock = one_step(edit_pipe)(image, "make it red", true_cfg_scale=1.0, height=32, width=48, num_inference_steps=1,
                                latents=flux.pack(noise), output_type="latent").images
    latents, _ = qwen.posterior(edit_pipe.vae, to_tensor(np.array(image))[None])
    states, mask = edit_pipe.encode_prompt("make it red", image=qwen.condition_image(edit_pipe, image))
    velocity = qwen.predict_velocity(edit_pipe.transformer, noise, torch.ones(1), [latents], states, mask)
    assert velocity.shape == noise.shape and latents.shape[-2:] == (8, 8)
    torch.testing.assert_close(flux.unpack(stock, 4, 6), noise - velocity, atol=1e-5, rtol=0)
    other = qwen.predict_velocity(edit_pipe.transformer, noise, torch.ones(1), [-latents], states, mask)
    assert (other - velocity).abs().max() > 1e-4


@torch.no_grad()
def test_a_batch_of_unequal_captions_equals_single_runs(pipe):
    captions = ["a", "a picture of three red cats", "two dogs"]
    latents, sigma = noise_like(3, 16, 4, 6), torch.tensor([0.2, 0.5, 1.0])
    prompt, mask = text_of(pipe, *captions)
    assert mask.shape == prompt.shape[:2] and len(set(mask.sum(1).tolist())) == 3
    together = qwen.predict_velocity(pipe.transformer, latents, sigma, [], prompt, mask)
    for i, caption in enumerate(captions):
        text = text_of(pipe, caption)
        assert text[1] is None
        alone = qwen.predict_velocity(pipe.transformer, latents[i:i + 1], sigma[i:i + 1], [], *text)
        torch.testing.assert_close(together[i:i + 1], alone, atol=1e-5, rtol=0)
    unmasked = qwen.predict_velocity(pipe.transformer, latents, sigma, [], prompt, None)
    assert (unmasked[0] - together[0]).abs().max() > 1e-4


@torch.no_grad()
def test_the_shift_of_noise_levels_is_the_one_of_stock_sampling(pipe, monkeypatch):
    mus = []
    original = pipeline_qwenimage.retrieve_timesteps
    monkeypatch.setattr(pipeline_qwenimage, "retrieve_timesteps",
                        lambda *args, mu, **more: mus.append(mu) or original(*args, mu=mu, **more))
    pipe("a", true_cfg_scale=1.0, height=32, width=48, num_inference_steps=2, output_type="latent")
    assert mus == [qwen.resolution_mu(pipe.scheduler, 4, 6)]


def test_texts_are_encoded_as_by_the_stock_pipeline_and_kept_on_disk(model, pipe, tmp_path, monkeypatch):
    captions = [("a red cat", None), ("a red cat", None), (" ", None)]
    for folder in (None, tmp_path / "texts"):
        texts = qwen.encode_texts(model, captions, ACCELERATOR, torch.float32, 1024, folder)
        for caption in ("a red cat", " "):
            torch.testing.assert_close(texts[caption].states, pipe.encode_prompt(caption)[0][0])
    assert len(list((tmp_path / "texts").iterdir())) == 2
    assert len(qwen.encode_texts(model, captions, ACCELERATOR, torch.float32, 4)["a red cat"].states) == 4

    monkeypatch.setattr(flux, "load_pipeline", None)  # the text encoder is not even loaded again
    again = qwen.encode_texts(model, captions, ACCELERATOR, torch.float32, 1024, tmp_path / "texts")
    assert torch.equal(again["a red cat"].states, texts["a red cat"].states)


def test_the_text_of_an_edit_depends_on_its_control(edit_model):
    controls = [noise_like(3, 64, 64, seed=seed).clamp(-1, 1) for seed in range(2)]
    texts = qwen.encode_texts(edit_model, [("red", control) for control in controls], ACCELERATOR, torch.float32, 1024)
    one, other = (texts[qwen.text_key("red", qwen.content_key(control))].states for control in controls)
    assert one.shape == other.shape and (one - other).abs().max() > 1e-4
    assert len(texts) == 2


def test_an_edit_plus_model_shows_its_text_encoder_a_smaller_control(edit_pipe):
    plus = QwenImageEditPlusPipeline(**edit_pipe.components)
    image = Image.new("RGB", (1024, 512))
    small, = qwen.condition_image(plus, image)
    assert small.size == (544, 256)  # 384^2 pixels in its shape, multiples of 32
    assert qwen.condition_image(edit_pipe, image) is image
    assert plus.encode_prompt("red", image=[small])[0].shape[1] > plus.encode_prompt("red")[0].shape[1]


# --- training ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("trained, factor", [("lora", 2), ("all", 10)])
def test_the_loss_on_one_pair_with_fixed_noise_and_sigma_falls(trained, factor):
    pipe = tiny.make_tiny_pipeline(width=128)
    pipe.transformer.requires_grad_(trained == "all")
    parameters = (list(pipe.transformer.parameters()) if trained == "all" else
                  lora.attach(pipe.transformer, 16, layers=qwen.lora_targets("img_attn")))
    target, text = noise_like(1, 16, 4, 4, seed=1), text_of(pipe, "a red cat")
    posteriors = [(target, torch.zeros_like(target))]
    optimizer = torch.optim.Adam(parameters, lr=1e-2 if trained == "lora" else 3e-3)
    history = []
    for _ in range(40):
        loss = train.training_step(pipe, posteriors, {"seed": [7]}, text, STEP)["flow"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert min(history) < history[0] / factor, (history[0], min(history))


def trace_step(monkeypatch, mean=0.0, std=0.0, **changes):
    """(latents, sigma, squared error of predicting 0) of a training step with 64 seeds."""
    seen = []
    monkeypatch.setattr(qwen, "predict_velocity", lambda transformer, latents, sigma, controls, *text: seen.append(
        (latents, sigma)) or torch.zeros_like(latents))
    posterior = torch.full((64, 1, 8, 8), mean), torch.full((64, 1, 8, 8), std)
    loss = train.training_step(SimpleNamespace(scheduler=tiny.make_tiny_pipeline().scheduler, transformer=None),
                               [posterior], {"seed": list(range(64))}, (torch.zeros(64, 1, 1), None),
                               SimpleNamespace(**vars(STEP) | changes))["flow"]
    return *seen[0], loss.item()


def test_a_step_learns_noise_minus_latents_at_noise_levels_drawn_evenly(monkeypatch):
    z, sigma, loss = trace_step(monkeypatch, mean=3.0)
    assert sigma.min() >= 0.001 and sigma.max() <= 1 and 0.4 < sigma.mean() < 0.6
    column = sigma.view(-1, 1, 1, 1)
    noise = (z - (1 - column) * 3) / column
    assert abs(noise.mean()) < 0.1 and 0.9 < noise.std() < 1.1
    assert loss == pytest.approx((noise - 3).square().mean().item(), rel=1e-4)


def test_noise_levels_are_shifted_as_in_sampling_if_asked_for(monkeypatch):
    (_, sigma, _), (_, shifted, _) = (trace_step(monkeypatch, timestep_shift=shift) for shift in ("none", "resolution"))
    mu = np.exp(qwen.resolution_mu(tiny.make_tiny_pipeline().scheduler, 8, 8))
    torch.testing.assert_close(shifted.double(), mu / (mu + 1 / sigma.double() - 1), atol=1e-6, rtol=0)


def test_the_density_of_noise_levels_and_the_weights_of_the_loss_are_those_asked_for(monkeypatch):
    _, sigma, _ = trace_step(monkeypatch, weighting_scheme="logit_normal", logit_mean=2.0, logit_std=0.1)
    assert abs(sigma.mean() - 1 / (1 + np.exp(2))) < 0.01 and sigma.std() < 0.03
    z, sigma, loss = trace_step(monkeypatch, weighting_scheme="sigma_sqrt")
    noise = z / sigma.view(-1, 1, 1, 1)
    assert loss == pytest.approx((noise.square().mean((1, 2, 3)) / sigma**2).mean().item(), rel=1e-4)


def test_the_vae_is_sampled_or_its_mean_taken_and_the_rest_of_the_draws_stays(monkeypatch):
    (drawn, sigma, _), (mean, same, _), (certain, _, _) = (
        trace_step(monkeypatch, std=std, vae_encode_mode=mode)
        for std, mode in ((2.0, "sample"), (2.0, "mode"), (0.0, "mode")))
    assert torch.equal(sigma, same) and torch.equal(mean, certain)
    draws = (drawn - mean) / (1 - sigma).view(-1, 1, 1, 1)
    assert 1.8 < draws[sigma < 0.9].std() < 2.2


def test_a_lora_file_loads_in_the_stock_pipeline_and_changes_the_output_as_training_predicted(model, data, tmp_path,
                                                                                              monkeypatch):
    trained = []
    monkeypatch.setattr(lora, "save", lambda transformer, *args, save=lora.save, **more: trained.append(
        transformer) or save(transformer, *args, **more))
    run(model, data, tmp_path / "out", "--lora_alpha", "8")
    stock = QwenImagePipeline.from_pretrained(model)
    inputs = (noise_like(1, 16, 4, 6), torch.tensor([0.7]), [], *text_of(stock, "a picture"))
    with torch.no_grad():
        base = qwen.predict_velocity(stock.transformer, *inputs)
        stock.load_lora_weights(tmp_path / "out")
        loaded = qwen.predict_velocity(stock.transformer, *inputs)
        live = qwen.predict_velocity(trained[-1].eval(), *inputs)
    assert (live - base).abs().max() > 1e-3
    torch.testing.assert_close(loaded, live, atol=1e-6, rtol=0)


def test_the_lora_file_is_the_one_that_the_stock_pipeline_would_write(pipe, tmp_path):
    transformer = tiny.make_tiny_pipeline().transformer
    lora.attach(transformer, 4, alpha=8, layers=qwen.lora_targets("attn_mlp"))
    lora.save(transformer, tmp_path / "ours", {"base_model": "x"})
    metadata = transformer.peft_config["default"].to_dict()
    QwenImagePipeline.save_lora_weights(tmp_path / "stock", lora.state_dict(transformer),
                                        transformer_lora_adapter_metadata={
                                            key: sorted(value) if isinstance(value, set) else value
                                            for key, value in metadata.items()})
    ours, stock = (load_file(tmp_path / name / LORA_FILE) for name in ("ours", "stock"))
    assert ours.keys() == stock.keys() and equal(ours.values(), stock.values())
    headers = []
    for name in ("ours", "stock"):
        with safe_open(tmp_path / name / LORA_FILE, "pt") as file:
            headers.append(json.loads(file.metadata()["lora_adapter_metadata"]))
    assert headers[0] == headers[1]


@pytest.mark.parametrize("preset, layers", [("img_attn", 4), ("attn", 8), ("attn_mlp", 12)])
def test_what_is_trained_is_named_and_counted(model, data, tmp_path, capsys, preset, layers):
    tensors = run(model, data, tmp_path / "out", "--lora_target_preset", preset)
    size = sum(tensor.numel() for tensor in tensors.values())
    names = (tmp_path / "out" / "trainable.txt").read_text().splitlines()
    assert len(tensors) == 2 * layers == len(names) and all(re.search("lora_[AB]", name) for name in names)
    printed = capsys.readouterr().out
    assert f"training {size:,} parameters in {len(names)} tensors" in printed
    told = read_summary(printed)
    program = shlex.split(told["here"])
    assert program[:3] == ["python", "-m", "recipes.qwen_image.inference"] and Path(told["LoRA"]).is_file()
    assert str(inference.parse_args(program[3:]).lora_weights) == told["LoRA"]
    if preset == "img_attn":
        assert size == 4 * 2 * 4 * 32  # layers x (A and B) x rank x width


RESUME = ("--max_train_steps 4 --checkpointing_steps 2 --gradient_accumulation_steps 2 --lora_dropout 0.2 --use_ema "
          "--ema_decay 0.5 --random_ratio --caption_dropout_rate 0.5 --lr_scheduler cosine --lr_warmup_steps 1").split()


def test_a_resumed_run_ends_in_the_same_bits(model, data, tmp_path, sigterm_in_step):
    run(model, data, tmp_path / "straight", *RESUME)
    restore = sigterm_in_step(train, 5)  # in step 3
    args = words(model, data, tmp_path / "resumed", *RESUME, "--resume_from_checkpoint", "latest")
    assert train.main(train.parse_args(args)) == 143
    assert (tmp_path / "resumed" / "checkpoint-3" / LORA_FILE).is_file()
    restore()
    train.main(train.parse_args(args))
    for name in (LORA_FILE, f"checkpoint-4/{LORA_FILE}", "checkpoint-4/state.safetensors"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight") and len(losses(tmp_path / "resumed")) == 4
    with pytest.raises(ValueError, match="rank"):
        train.main(train.parse_args([*args, "--rank", "8"]))


def test_two_processes_train_on_the_same_numbers_as_one_with_the_whole_batch(model, data, tmp_path):
    flags = "--train_batch_size 1 --save_cache_on_disk --checkpointing_steps 1 --caption_dropout_rate 0.5".split()
    run_on_two_processes("-m", "recipes.qwen_image.train", *words(model, data, tmp_path / "two", *flags))
    one = run(model, data, tmp_path / "one", *flags, "--gradient_accumulation_steps", "2")
    two = load_file(tmp_path / "two" / LORA_FILE)
    assert one.keys() == two.keys() and all(torch.allclose(one[key], two[key], atol=2e-6) for key in one)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    shutil.copytree(tmp_path / "two" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    run_on_two_processes("-m", "recipes.qwen_image.train", *words(model, data, tmp_path / "resumed", *flags),
                         "--resume_from_checkpoint", "latest")
    assert (tmp_path / "resumed" / LORA_FILE).read_bytes() == (tmp_path / "two" / LORA_FILE).read_bytes()


def test_a_resume_from_disk_caches_encodes_nothing_and_takes_the_folder_wherever_it_lies(model, data, tmp_path,
                                                                                        monkeypatch):
    more = "--precompute_image_embeddings --save_cache_on_disk --checkpointing_steps 2 --max_train_steps".split()
    straight = run(model, data, tmp_path / "straight", *more, 4)
    run(model, data, tmp_path / "out", *more, 2)
    moved = shutil.copytree(data, tmp_path / "moved")
    monkeypatch.setattr(qwen, "posterior", None)
    monkeypatch.setattr(QwenImagePipeline, "encode_prompt", None)
    resumed = run(model, moved, tmp_path / "out", *more, 4, "--resume_from_checkpoint", "latest")
    assert equal(resumed.values(), straight.values())
    for name in ("adam_beta1", "adam_epsilon"):
        with pytest.raises(ValueError, match=f"it differs in {name}"):
            run(model, moved, tmp_path / "out", *more, 5, "--resume_from_checkpoint", "latest", f"--{name}", 0.5)
    (moved / "images" / "0.txt").write_text("another caption")
    with pytest.raises(ValueError, match="it differs in data"):
        run(model, moved, tmp_path / "out", *more, 5, "--resume_from_checkpoint", "latest")


def test_a_damaged_text_on_disk_is_encoded_anew_on_a_resume(model, data, tmp_path, monkeypatch):
    more = "--save_cache_on_disk --checkpointing_steps 2 --max_train_steps".split()
    straight = run(model, data, tmp_path / "straight", *more, 4)
    run(model, data, tmp_path / "out", *more, 2)
    broken, *_ = (tmp_path / "out" / "cache" / "text_embs").iterdir()
    broken.write_bytes(broken.read_bytes()[:40])
    encoded, encode = [], QwenImagePipeline.encode_prompt
    monkeypatch.setattr(QwenImagePipeline, "encode_prompt", lambda pipe, prompt, **more: encoded.append(
        prompt) or encode(pipe, prompt, **more))
    resumed = run(model, data, tmp_path / "out", *more, 4, "--resume_from_checkpoint", "latest")
    assert len(encoded) == 1 and equal(resumed.values(), straight.values())


def test_processes_share_the_work_of_disk_caches_and_each_gets_all_of_it(edit_model, data, tmp_path, monkeypatch):
    dataset = CustomImageDataset(data / "images", 64, control_dir=data / "control_images")
    ranks = [SimpleNamespace(**vars(ACCELERATOR) | {"process_index": rank, "num_processes": 2}) for rank in range(2)]
    shares, files, texts, stores = [], [], [], []
    monkeypatch.setattr(qwen, "gather_object", lambda entries: shares.append(entries) or sum(shares, []))
    for rank in ranks:
        texts.append(qwen.encode_texts(edit_model, dataset.text_inputs(), rank, torch.float32, 64, tmp_path / "text"))
        stores.append(qwen.encode_pictures(edit_model, dataset, rank, torch.float32, True, tmp_path / "images"))
        files.append([len(list((tmp_path / name).iterdir())) for name in ("text", "images")])
    assert files == [[4, 4], [8, 8]]  # of 4 pairs a caption and " ", a target and a control
    entries, store = stores[-1]
    alone, memory = qwen.encode_pictures(edit_model, dataset, ACCELERATOR, torch.float32, True)
    assert entries == alone and all(equal(store[name].values(), memory[name].values()) for name in memory)
    assert all(qwen.text_key(caption, entry.control_key) in texts[0]  # what rank 1 has encoded too
               for entry in entries for caption in (entry.example.prompt, " "))


@pytest.mark.parametrize("more", [[], ["--precompute_image_embeddings"]])
def test_an_image_that_breaks_off_is_replaced_and_reported(model, data, tmp_path, more):
    broken = shutil.copytree(data, tmp_path / "broken") / "images" / "2.png"
    broken.write_bytes(broken.read_bytes()[:300])
    run(model, tmp_path / "broken", tmp_path / "out", *more)
    assert str(broken) in (tmp_path / "out" / "unreadable.txt").read_text()


def test_trackers_variant_and_the_limit_of_checkpoints_are_those_asked_for(pipe, data, tmp_path):
    pipe.save_pretrained(tmp_path / "model", variant="fp16")
    run(tmp_path / "model", data, tmp_path / "out", "--variant", "fp16", "--report_to", "tensorboard", "--logging_dir",
        "curves", "--tracker_project_name", "mine", "--checkpointing_steps", 1, "--checkpoints_total_limit", 1)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert list((tmp_path / "out" / "curves" / "mine").glob("events.*"))


@pytest.mark.parametrize("is_edit", [False, True])
def test_caches_in_memory_and_on_disk_train_as_no_cache_does(model, edit_model, data, tmp_path, is_edit):
    more = ["--control_dir", data / "control_images"] if is_edit else []
    path = edit_model if is_edit else model
    plain = run(path, data, tmp_path / "plain", *more)
    memory = run(path, data, tmp_path / "memory", *more, "--precompute_image_embeddings")
    disk = run(path, data, tmp_path / "disk", *more, "--precompute_image_embeddings", "--save_cache_on_disk")
    assert equal(memory.values(), disk.values())
    assert all(torch.allclose(memory[key], plain[key], atol=1e-4) for key in plain)
    cache = tmp_path / "disk" / "cache"
    assert len(list((cache / "img_embs").iterdir())) == 4 * (1 + is_edit)
    assert len(list((cache / "text_embs").iterdir())) == (8 if is_edit else 5)
    assert not (tmp_path / "memory" / "cache").exists()


def test_gradient_checkpointing_trains_the_same(model, data, tmp_path, monkeypatch):
    switched_on = []
    enable = QwenImageTransformer2DModel.enable_gradient_checkpointing
    monkeypatch.setattr(QwenImageTransformer2DModel, "enable_gradient_checkpointing",
                        lambda transformer: switched_on.append(enable(transformer)))
    plain = run(model, data, tmp_path / "plain")
    assert not switched_on
    checkpointed = run(model, data, tmp_path / "checkpointed", "--gradient_checkpointing")
    assert len(switched_on) == 1 and equal(plain.values(), checkpointed.values())


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantised_base_trains_a_lora_that_loads_anywhere(model, data, tmp_path, precision):
    full = run(model, data, tmp_path / "full")
    tensors = run(model, data, tmp_path / "out", "--base_precision", precision)
    assert tensors.keys() == full.keys() and not equal(tensors.values(), full.values())
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "full"), rel=0.02)
    QwenImagePipeline.from_pretrained(model).load_lora_weights(tmp_path / "out")
    pipe = qwen.load_models(model, "cpu", torch.float32, False, base_precision=precision)
    assert type(pipe.transformer.transformer_blocks[0].attn.to_q.weight).__name__ != "Parameter"
    assert type(pipe.transformer.proj_out.weight).__name__ == "Parameter"


@pytest.mark.parametrize("option", ["--use_dora", "--use_rslora", "--lora_layers=attn.to_q"])
def test_other_kinds_of_lora_load_in_the_stock_pipeline(model, data, tmp_path, option):
    tensors = run(model, data, tmp_path / "out", option)
    assert any("magnitude" in key for key in tensors) == (option == "--use_dora")
    assert all("to_q" in key for key in tensors) == option.endswith("to_q")
    stock = QwenImagePipeline.from_pretrained(model)
    stock.load_lora_weights(tmp_path / "out")
    assert stock.get_active_adapters()


@pytest.mark.parametrize("layers", ["attn.to_qq", "attn.to_q,proj_mlp"])
def test_a_layer_that_the_model_has_not_is_refused_before_anything_is_encoded(model, data, tmp_path, monkeypatch,
                                                                             layers):
    monkeypatch.setattr(flux, "load_pipeline", None)  # no part of the model is even loaded
    wrong = layers.rpartition(",")[2]
    with pytest.raises(ValueError, match=f"--lora_layers {wrong}: the model has no such linear layer; .*attn.to_q"):
        run(model, data, tmp_path / "out", "--precompute_image_embeddings", "--lora_layers", layers)


@pytest.mark.parametrize("kind", ["edit_model", "plus_model"])
def test_an_edit_lora_trains_and_validates_with_the_stock_pipeline(kind, request, data, tmp_path, small_edits):
    picture = data / "control_images" / "0.png"
    run(request.getfixturevalue(kind), data, tmp_path / "out", "--control_dir", data / "control_images",
        "--validation_prompt", "red", "--validation_image", picture, "--num_validation_images", 2,
        "--num_inference_steps", 2, "--validation_steps", 1, "--true_cfg_scale", 2)
    made = sorted((tmp_path / "out" / "validation").iterdir())
    assert [path.name for path in made] == [f"step-00000{step}.png" for step in range(3)]
    first, last = (np.asarray(Image.open(made[i])).astype(int) for i in (0, -1))
    assert first.shape == last.shape and (first != last).any()


def test_validation_images_are_those_of_the_stock_pipeline(model, data, tmp_path):
    stock = QwenImagePipeline.from_pretrained(model)
    run(model, data, tmp_path / "out", "--validation_prompt", "a cat", "--num_validation_images", 1,
        "--num_inference_steps", 2, "--true_cfg_scale", 3, "--seed", 5)
    models = qwen.load_models(model, "cpu", torch.float32, False)
    texts = [qwen.TextStates(stock.encode_prompt(caption)[0][0]) for caption in ("a cat", " ")]
    ours, = qwen.sample(models, *texts, (64, 96), 2, 3.0, [5])
    wanted = stock("a cat", negative_prompt=" ", true_cfg_scale=3.0, height=64, width=96, num_inference_steps=2,
                   generator=torch.Generator().manual_seed(5), output_type="pt").images[0]
    torch.testing.assert_close(ours, 2 * wanted - 1, atol=1e-5, rtol=0)
    assert len(list((tmp_path / "out" / "validation").iterdir())) == 2


# --- options ----------------------------------------------------------------------------------------------------------

def parse(*argv):
    return parse_qwen_args("test", [*map(str, argv)])


@pytest.mark.parametrize("name, rate, output", [
    ("train_lora", 1e-4, "./output"), ("train_lora_4090", 3e-4, "./test_lora_saves"),
    ("train_lora_qwen_edit", 2e-4, "./test_lora_saves_edit")])
def test_every_key_of_the_published_configs_is_honoured(tmp_path, monkeypatch, name, rate, output):
    monkeypatch.chdir(tmp_path)
    args = parse("--config", CONFIGS / f"{name}.yaml")
    assert args.learning_rate == rate and args.output_dir == output and args.rank == 16
    assert (args.img_size, args.dataloader_num_workers, args.caption_dropout_rate) == (1024, 4, 0.1)
    assert (args.random_ratio, args.caption_type, args.train_batch_size) == (False, "txt", 1)
    assert (args.max_train_steps, args.lr_scheduler, args.lr_warmup_steps) == (3000, "constant", 10)
    assert (args.adam_beta1, args.adam_beta2, args.adam_weight_decay, args.adam_epsilon) == (0.9, 0.999, 0.01, 1e-8)
    assert (args.max_grad_norm, args.logging_dir, args.mixed_precision) == (1.0, "logs", "bf16")
    assert (args.gradient_accumulation_steps, args.checkpointing_steps, args.checkpoints_total_limit) == (1, 250, 10)
    assert (args.report_to, args.tracker_project_name) == ("tensorboard", "lora_test")
    assert args.resume_from_checkpoint == "latest"
    is_small = name.endswith("4090")
    assert (args.base_precision == "fp8") == args.use_8bit_adam == args.save_cache_on_disk == is_small
    assert bool(args.control_dir) == name.endswith("edit")


def test_overrides_win_over_the_file_and_plain_options_over_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ["--config", CONFIGS / "train_lora_4090.yaml"]
    args = parse(*config, "--set", "data_config.img_size=512", "--set=quantize=false", "--set",
                 "data_config.random_ratio=true", "--set", "rank=8", "--set", "train_batch_size=2", "--rank", 4)
    assert (args.img_size, args.quantize, args.base_precision, args.random_ratio) == (512, False, None, True)
    assert (args.rank, args.train_batch_size) == (4, 2)
    for name in ("num_workers", "data_config.num_workers", "dataloader_num_workers"):
        assert parse(*config, "--set", f"{name}=1").dataloader_num_workers == 1  # 4 below data_config
    without_file = parse("--pretrained_model_name_or_path", "a/b", "--set", "data_config.img_dir=x")
    assert without_file.img_dir == "x" and without_file.rank == 16


@pytest.mark.parametrize("text, words, message", [
    ("ranks: 4", [], "ranks"),
    ("data_config:\n  rank: 4", [], "data_config has no rank"),
    ("", ["--set", "data_config.size=4"], "data_config has no size"),
    ("", ["--set", "model.rank=4"], "model.rank"),
    ("train_batch_size: 1\ndata_config:\n  train_batch_size: 2", [],
     "train_batch_size is 1, and data_config.train_batch_size 2"),
    ("dataloader_num_workers: 0\ndata_config:\n  num_workers: 4", [],
     "dataloader_num_workers is 0, and data_config.num_workers 4; make them agree"),
    ("dataloader_num_workers: 0\nnum_workers: 4", [], "dataloader_num_workers is 0, and num_workers 4"),
    ("path: y", [], "img_dir is x, and path y"),
    ("data_config: images", [], "data_config: write its keys below it"),
    ("foo:\n  a: 1", [], "foo is a section; write `key: value` lines"),
    ("data_config:\n  img_size:\n    a: 1", [], "img_size is a section"),
    ("set: rank=99", [], "set is no key; give --set on the command line"),
    ("config: other.yaml", [], "config is no key; give --config on the command line"),
    ("", ["--set", "config=other.yaml"], "config is no key"), ("", ["--set", "set=x"], "set is no key"),
])
def test_an_unknown_or_contradicting_key_is_refused_by_name(tmp_path, capsys, text, words, message):
    path = tmp_path / "config.yaml"
    path.write_text(f"pretrained_model_name_or_path: a/b\nimg_dir: x\n{text}\n")
    with pytest.raises(SystemExit) as stopped:
        parse("--config", path, *words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("more, message", [
    (["--set", "rank"], "--set rank: write KEY=VALUE"),
    (["--max_sequence_length", 1025], "--max_sequence_length 1025: give 1 to 1024"),
    (["--rank", 0], "--rank 0"), (["--num_inference_steps", 1], "--num_inference_steps 1: give 2 or more"),
    (["--base_precision", "nf4"], "--base_precision nf4: .*GPU"),
    (["--validation_image", "a.png"], "--validation_image is for edit training"),
    (["--control_dir", "c", "--validation_image", "a.png"], "--validation_image is for edit training"),
    (["--logit_mean", "nan"], "--logit_mean nan: give a finite number"), (["--mode_scale", "nan"], "--mode_scale nan"),
    (["--lr_power", "inf"], "--lr_power inf"), (["--prodigy_beta3", "nan"], "--prodigy_beta3 nan"),
    (["--seed", 2**63], f"--seed {2**63}: give less than 2.63"),
    (["--lr_scheduler", "piecewise_constant", "--lr_step_rules", "1..2:3,1"], "--lr_step_rules 1..2:3,1: write factor"),
    (["--logit_std", -1], "--logit_std -1"), (["--adam_epsilon", "nan"], "--adam_epsilon nan"),
    (["--control_dir", "c", "--validation_prompt", "x"], "needs --validation_image"),
    (["--pretrained_model_name_or_path", "./none"], "./none: no such folder; download Qwen/Qwen-Image"),
])
def test_senseless_options_are_refused_before_anything_loads(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        parse("--pretrained_model_name_or_path", "a/b", "--img_dir", "x", "--output_dir", tmp_path / "out", *more)


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match="--report_to wandb: it is not installed"):
        parse("--pretrained_model_name_or_path", "a/b", "--img_dir", "x", "--output_dir", tmp_path, "--report_to",
              "wandb")


def test_the_model_must_fit_the_task(model, edit_model, tiny_model, data, tmp_path):
    for text, message in (("{}", "is a model of unknown kind; name a Qwen-Image"),
                          ("[1]", "is a model of unknown kind"),
                          ("{bad", "cannot be loaded .*model_index.json' is not a valid JSON file")):
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            qwen.is_edit_model(tmp_path)
    for path, more, message in ((model, ["--control_dir", data / "control_images"], "name a Qwen-Image-Edit"),
                                (edit_model, [], "add --control_dir"), (tiny_model, [], "is a FluxKontextPipeline")):
        with pytest.raises(ValueError, match=message):
            run(path, data, tmp_path / "out", *more)


def test_texts_are_encoded_first_whatever_is_said(model, data, tmp_path, capsys):
    run(model, data, tmp_path / "out", "--no-precompute_text_embeddings")
    assert "--no-precompute_text_embeddings does nothing" in capsys.readouterr().out


def test_data_keys_are_options_and_all_of_two_names_are_known():
    actions = [action for action in make_qwen_parser("test")._actions if action.dest != "help"]
    names = {option.removeprefix("--"): action.dest for action in actions for option in action.option_strings}
    assert set(DATA_KEYS) <= names.keys()
    assert ALIASES == {name: dest for name, dest in names.items() if name != dest and not name.startswith("no-")}


def test_the_low_memory_config_trains(model, data, tmp_path):
    args = words(model, data, tmp_path / "out")
    train.main(train.parse_args(["--config", str(CONFIGS / "train_lora_4090.yaml"), *args, "--max_train_steps", "3"]))
    assert (tmp_path / "out" / LORA_FILE).is_file() and (tmp_path / "out" / "cache" / "img_embs").is_dir()
    assert all(np.isfinite(losses(tmp_path / "out")))


# --- inference --------------------------------------------------------------------------------------------------------

def infer(model, output, *more):
    """(H, W, 3) uint8 that the command writes."""
    run_inference = ["--model_name", str(model), "--output_image", str(output), "--num_inference_steps", "2",
                     "--width", "48", "--height", "32", *map(str, more)]
    inference.main(inference.parse_args(run_inference))
    return np.asarray(Image.open(output)).astype(int)


def test_inference_is_the_stock_pipeline_with_the_lora_at_its_weight(model, data, tmp_path, capsys):
    run(model, data, tmp_path / "lora")
    stock = QwenImagePipeline.from_pretrained(model)
    inputs = dict(negative_prompt=" ", true_cfg_scale=5.0, width=48, height=32, num_inference_steps=2)

    def wanted():
        return np.asarray(stock("man in the city", generator=torch.Generator().manual_seed(655), **inputs).images[0])

    base = infer(model, tmp_path / "base.png")
    assert base.shape == (32, 48, 3) and (base == wanted()).all()
    with_lora = ["--lora_weights", tmp_path / "lora"]
    assert (infer(model, tmp_path / "off.png", *with_lora, "--lora_weight", 0) == base).all()
    half = infer(model, tmp_path / "half.png", *with_lora, "--lora_weight", 0.5)
    assert "at 0.5" in capsys.readouterr().out
    stock.load_lora_weights(tmp_path / "lora", adapter_name="x")
    stock.set_adapters(["x"], [0.5])
    assert (half != base).any() and abs(half - wanted()).max() <= 1
    assert (infer(model, tmp_path / "alone.png", "--true_cfg_scale", 1, "--seed", 3) != base).any()
    assert (infer(model, tmp_path / "negative.png", "--negative_prompt", "a red cat") != base).any()


def test_a_lora_of_other_tools_that_was_trained_with_dropout_drops_nothing_in_inference(model, data, tmp_path):
    run(model, data, tmp_path / "lora")
    with safe_open(tmp_path / "lora" / LORA_FILE, "pt") as file:
        header = file.metadata()
    config = json.loads(header["lora_adapter_metadata"])
    assert config["transformer.lora_dropout"] == 0
    header["lora_adapter_metadata"] = json.dumps(config | {"transformer.lora_dropout": 0.5})
    save_file(load_file(tmp_path / "lora" / LORA_FILE), tmp_path / "foreign.safetensors", header)
    ours, foreign = (infer(model, tmp_path / "x.png", "--lora_weights", path)
                     for path in (tmp_path / "lora", tmp_path / "foreign.safetensors"))
    assert (ours == foreign).all()


@pytest.mark.parametrize("quantization", ["int8", "qfloat8"])
def test_quantised_inference_takes_a_lora_and_stays_close(model, data, tmp_path, quantization):
    run(model, data, tmp_path / "lora")
    more = ["--lora_weights", tmp_path / "lora" / LORA_FILE]
    full, quantised = (infer(model, tmp_path / f"{kind}.png", *more, "--quantization", kind)
                       for kind in ("none", quantization))
    assert 0 < abs(full - quantised).mean() < 8


def test_an_edit_needs_an_image_and_text_to_image_takes_none(model, edit_model, data, tmp_path, small_edits):
    picture = data / "control_images" / "0.png"
    assert infer(edit_model, tmp_path / "edit.png", "--image", picture).shape == (32, 48, 3)
    with pytest.raises(ValueError, match="--image: this model edits"):
        infer(edit_model, tmp_path / "x.png")
    with pytest.raises(ValueError, match="--image: this model makes"):
        infer(model, tmp_path / "x.png", "--image", picture)


@pytest.mark.parametrize("more, message", [
    (["--width", 40], "--width 40: give a multiple of 16"), (["--quantization", "nf4"], "--quantization nf4"),
    (["--num_inference_steps", 1], "--num_inference_steps 1: give 2"), (["--lora_weight", "nan"], "--lora_weight nan"),
    (["--true_cfg_scale", "nan"], "--true_cfg_scale nan"), (["--seed", 2**70], f"--seed {2**70}: give less than 2.63"),
    (["--output_image", "x.gif"], "x.gif: end it in"), (["--lora_weights", "none"], "none: no such LoRA"),
    (["--output_image", "file/x.png"], "--output_image file is a file"),
    (["--max_sequence_length", 2000], "--max_sequence_length 2000"),
])
def test_senseless_options_of_inference_are_refused(model, more, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ValueError, match=message):
        inference.parse_args(["--model_name", model, "--width", "48", "--height", "32", *map(str, more)])


def test_an_image_without_a_name_never_replaces_another_and_one_with_a_name_does(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--model_name", model, "--num_inference_steps", "2", "--width", "48", "--height", "32", "--seed"]
    for seed in range(3):
        inference.main(inference.parse_args([*words, str(seed)]))
    names = ["generated_image.png", "generated_image-2.png", "generated_image-3.png"]
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    first, second, _ = (Path(name).read_bytes() for name in names)
    inference.main(inference.parse_args([*words, "1", "--output_image", names[0]]))
    assert first != second == Path(names[0]).read_bytes() and len(list(tmp_path.iterdir())) == 3


def test_a_variant_that_the_model_has_not_is_refused_by_its_flag(model, data, tmp_path):
    for command in (run, lambda model, data, output, *more: infer(model, output / "x.png", *more)):
        with pytest.raises(ValueError, match="--variant fp16: .* has no such files"):
            command(model, data, tmp_path, "--variant", "fp16")


def test_a_lora_of_another_model_is_refused(model, tiny_lora, tmp_path):
    with pytest.raises(ValueError, match="does not belong to this transformer"):
        infer(model, tmp_path / "x.png", "--lora_weights", tiny_lora)


# --- example ----------------------------------------------------------------------------------------------------------

def test_the_example_runs_from_one_command_and_says_how_far_colours_went(tmp_path, capsys):
    """What it measures with all its steps is in the README."""
    words = ["--output", str(tmp_path / "out"), "--base_steps", "2", "--max_train_steps", "2"]
    assert run_main_code(lambda: example.main(example.parse_args(words))) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    means = {name: np.array(colour) for name, colour in result["mean_colour"].items()}
    before, after = (np.linalg.norm(means[name] - means["training set"]) for name in ("base", "LoRA"))
    assert result["share"] == pytest.approx(1 - after / before, abs=1e-4)
    assert means["training set"][0] < 80 < 140 < means["training set"][1]
    assert "the LoRA took the mean colour" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is not empty"):
        example.parse_args(words)


def run_main_code(main):
    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    return stopped.value.code

"""Claims about train_dreambooth_lora_flux_kontext.py, each on a tiny random model."""

import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_lora_flux_kontext as script
from tests.conftest import PROJECT_ROOT, photograph
from utils import cache, checkpoint, flux, lora, placement, run, validation
from utils.generate import generate

SHORT = ("--resolution 32 --train_batch_size 2 --max_sequence_length 8 --report_to none --num_inference_steps 1 "
         "--lr_warmup_steps 0 --instance_prompt sks")


@pytest.fixture(scope="session")
def edits(photos, tmp_path_factory):
    """Folder with out/ (the training photographs' inverses, captions beside them), in/ and more/ (references), and
    held/out, held/in of two others."""
    root = tmp_path_factory.mktemp("edits")
    for split, place in (("train", root), ("heldout", root / "held")):
        for path in sorted((photos / split).iterdir()):
            image = np.asarray(Image.open(path))
            for folder, version in (("out", 255 - image), ("in", image), ("more", image[::-1])):
                (place / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(version).save(place / folder / path.name)
            (place / "out" / f"{path.stem}.txt").write_text(f"invert {path.stem}")
    return root


@pytest.fixture
def train(tiny_model, photos, edits, tmp_path):
    """train("flags", "more") -> bytes of the final LoRA; output in tmp_path/out unless --output_dir is given. IN, OUT,
    HELD and TMP in the flags stand for folders."""

    def call(*flags):
        flags = " ".join(flags)
        for word, path in {"HELD": edits / "held", "PHOTO": photos / "heldout" / "photo_6.png", "IN": edits / "in",
                           "OUT": edits / "out", "MORE": edits / "more", "TMP": tmp_path}.items():
            flags = flags.replace(word, str(path))
        argv = ["--pretrained_model_name_or_path", tiny_model, *SHORT.split()]
        if not any(flag in flags for flag in ("--instance_data_dir", "--dataset_name")):
            argv += ["--instance_data_dir", str(photos / "train")]
        if "--output_dir" not in flags:
            argv += ["--output_dir", str(tmp_path / "out")]
        args = script.parse_args([*argv, *flags.split()])
        code = script.main(args)
        file = Path(args.output_dir) / lora.LORA_FILE
        return code if code else file.read_bytes()

    return call


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


PRIOR = "--with_prior_preservation --class_data_dir TMP/class --class_prompt thing --num_class_images 7"
VARIANTS = {
    "subject": "--lora_dropout 0.2 --validation_prompt sks --num_validation_images 1 --validation_steps 2",
    "prior, text encoder": f"{PRIOR} --train_text_encoder --text_encoder_lr 1e-2 --random_flip --lora_dropout 0.2",
    "edit": "--instance_data_dir OUT --cond_data_dir IN --random_flip --caption_dropout 0.4 "
            "--dataloader_num_workers 1 --weighting_scheme logit_normal",
    "two references of their own size, buckets": "--instance_data_dir OUT --cond_data_dir IN MORE --cond_resolution 48 "
        "--aspect_ratio_buckets 32,32;32,48 --train_batch_size 1 --gradient_accumulation_steps 2 --use_ema",
    "cached sampled latents": "--cache_latents --vae_encode_mode sample --random_flip --repeats 2 --offload",
    "Prodigy on both": "--optimizer prodigy --learning_rate 1 --train_text_encoder",
    "8-bit AdamW, text encoder": "--use_8bit_adam --train_text_encoder --use_ema --ema_decay 0.5",
}


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS.keys())
def test_resumed_run_equals_straight_run_to_the_bit(train, tmp_path, flags):
    straight = train(flags, f"--max_train_steps 5 --output_dir {tmp_path / 'straight'}")
    train(flags, f"--max_train_steps 5 --checkpointing_steps 2 --output_dir {tmp_path / 'first'}")
    for name in ("checkpoint-4", lora.LORA_FILE, "metrics.jsonl", "README.md"):  # as if it had been killed after step 2
        (tmp_path / "first" / name).rename(tmp_path / f"gone-{name}")
    resumed = train(flags, f"--max_train_steps 5 --resume_from_checkpoint latest --output_dir {tmp_path / 'first'}")
    assert resumed == straight


def test_sigterm_saves_and_the_run_goes_on_to_the_same_end(train, tmp_path, sigterm_in_step):
    straight = train(f"--max_train_steps 5 --output_dir {tmp_path / 'straight'}")
    undo = sigterm_in_step(script, 2)
    flags = f"--max_train_steps 5 --checkpointing_steps 0 --output_dir {tmp_path / 'stopped'}"
    assert train(flags) == 128 + signal.SIGTERM
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "stopped")] == [2]
    undo()
    assert train(flags, "--resume_from_checkpoint latest") == straight


# --- the official script's command line

# Facts of diffusers 0.40's examples/dreambooth/train_dreambooth_lora_flux_kontext.py: its options and their defaults.
OFFICIAL = {
    "revision": None, "variant": None, "cache_dir": None, "max_sequence_length": 512, "guidance_scale": 3.5,
    "vae_encode_mode": "mode", "dataset_name": None, "dataset_config_name": None, "instance_data_dir": None,
    "image_column": "image", "cond_image_column": None, "caption_column": None, "instance_prompt": None, "repeats": 1,
    "resolution": 512, "center_crop": False, "random_flip": False, "dataloader_num_workers": 0,
    "use_aspect_ratio_buckets": False, "aspect_ratio_buckets": None, "with_prior_preservation": False,
    "prior_loss_weight": 1.0, "class_data_dir": None, "class_prompt": None, "num_class_images": 100,
    "sample_batch_size": 4, "prior_generation_precision": None, "validation_prompt": None, "num_validation_images": 4,
    "validation_epochs": 50, "rank": 4, "lora_alpha": 4, "lora_dropout": 0.0, "lora_layers": None,
    "train_text_encoder": False, "text_encoder_lr": 5e-6, "adam_weight_decay_text_encoder": 1e-3,
    "train_batch_size": 4, "num_train_epochs": 1, "max_train_steps": None, "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False, "learning_rate": 1e-4, "scale_lr": False, "lr_scheduler": "constant",
    "lr_warmup_steps": 500, "lr_num_cycles": 1, "lr_power": 1.0, "max_grad_norm": 1.0, "weighting_scheme": "none",
    "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, "use_8bit_adam": False, "adam_beta1": 0.9,
    "adam_beta2": 0.999, "adam_weight_decay": 1e-4, "adam_epsilon": 1e-8, "prodigy_beta3": None,
    "prodigy_decouple": True, "prodigy_use_bias_correction": True, "prodigy_safeguard_warmup": True,
    "output_dir": "flux-kontext-lora", "logging_dir": "logs", "checkpointing_steps": 500,
    "checkpoints_total_limit": None, "resume_from_checkpoint": None, "cache_latents": False, "allow_tf32": False,
    "mixed_precision": None, "report_to": "tensorboard", "push_to_hub": False, "hub_token": None,
    "hub_model_id": None,
}
# Others there, or with another default here: the README's table says why.
DEPARTURES = {"seed": 0, "optimizer": "adamw", "local_rank": None, "enable_npu_flash_attention": None,
              "upcast_before_saving": None, "validation_image": []}
OURS = ["caption_dropout", "bnb_quantization_config_path", "offload", "skip_final_inference", "cond_data_dir",
        "cond_resolution", "heldout_data_dir", "heldout_cond_data_dir", "use_ema", "use_dora", "use_rslora",
        "ema_decay", "memory", "memory_limit", "base_precision", "adaln_tables", "compile", "attention_backend",
        "validation_steps", "num_inference_steps", "logging_steps", "lr_step_rules", "max_pixels"]


def test_every_option_of_the_official_script_is_there_with_its_default(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = vars(script.parse_args(["--pretrained_model_name_or_path", tiny_model]))
    assert {name: args[name] for name in OFFICIAL | DEPARTURES} == OFFICIAL | DEPARTURES
    assert (tmp_path / "flux-kontext-lora").is_dir()


# Each option is turned on beside flags (first) that it needs, and changes what they alone would give.
CHANGES = [("", option) for option in (
    "--guidance_scale 2", "--vae_encode_mode sample", "--center_crop", "--random_flip", "--resolution 48",
    "--use_aspect_ratio_buckets", "--aspect_ratio_buckets 32,32;32,48", "--seed 1", "--instance_prompt dog",
    "--max_sequence_length 5", "--rank 8", "--lora_alpha 8", "--lora_dropout 0.5", "--lora_layers attn.to_q,proj_out",
    "--train_text_encoder", "--learning_rate 1e-2", "--scale_lr", "--lr_scheduler linear --lr_warmup_steps 1",
    "--max_grad_norm 1e-6", "--optimizer prodigy --learning_rate 1", "--use_8bit_adam", "--adam_beta1 0.1",
    "--adam_beta2 0.1", "--adam_weight_decay 5", "--adam_epsilon 1", "--use_ema", "--use_dora", "--use_rslora",
    "--caption_dropout 1", "--instance_data_dir OUT --cond_data_dir IN", "--train_batch_size 1",
    "--gradient_accumulation_steps 2", "--weighting_scheme sigma_sqrt", "--weighting_scheme cosmap", "--cache_latents",
)] + [
    ("--train_text_encoder", "--text_encoder_lr 1e-2"), ("--train_text_encoder", "--text_encoder_lr 0"),
    ("--train_text_encoder --text_encoder_lr 1e-2", "--adam_weight_decay_text_encoder 50"),
    ("--lr_scheduler polynomial", "--lr_power 3"), ("--lr_scheduler cosine_with_restarts", "--lr_num_cycles 2"),
    ("--lr_scheduler piecewise_constant --lr_step_rules 1:9,0.1", "--lr_step_rules 1:1,0.1"),
    ("--weighting_scheme logit_normal", "--logit_mean 1"), ("--weighting_scheme logit_normal", "--logit_std 0.2"),
    ("--weighting_scheme mode", "--mode_scale 0.4"), ("--use_ema", "--ema_decay 0.05"),
    *(("--optimizer prodigy --learning_rate 1 --max_train_steps 12", option) for option in (
        "--prodigy_decouple False", "--prodigy_use_bias_correction False")),
    ("--optimizer prodigy --learning_rate 1 --lr_scheduler constant_with_warmup --lr_warmup_steps 6 "
     "--max_train_steps 12", "--prodigy_safeguard_warmup False"),
    ("--instance_data_dir OUT --cond_data_dir IN", "--cond_resolution 48"), (PRIOR, "--prior_loss_weight 0.5"),
    ("--cache_latents --repeats 2 --max_train_steps 7", "--repeats 3"),
]
# Options that must change no weight, or whose effect is another's matter: tests below and above turn them on.
ELSEWHERE = {
    "prodigy_beta3", "with_prior_preservation", "class_data_dir", "class_prompt", "num_class_images",
    "revision", "variant", "cache_dir", "dataset_name", "dataset_config_name", "image_column", "cond_image_column",
    "caption_column", "dataloader_num_workers", "sample_batch_size", "prior_generation_precision",
    "validation_prompt", "validation_image", "num_validation_images", "validation_epochs", "num_train_epochs",
    "max_train_steps", "gradient_checkpointing", "output_dir", "logging_dir", "checkpointing_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "cache_latents", "allow_tf32", "mixed_precision", "report_to",
    "push_to_hub", "hub_token", "hub_model_id", "local_rank", "enable_npu_flash_attention", "upcast_before_saving",
    "bnb_quantization_config_path", "offload", "skip_final_inference", "heldout_data_dir", "heldout_cond_data_dir",
    "validation_steps", "num_inference_steps", "logging_steps", "max_pixels",
    "memory", "memory_limit", "base_precision", "adaln_tables", "compile", "attention_backend",  # test_placement.py
}


def test_every_option_is_turned_on_by_a_test_of_this_file():
    given = set(re.findall(r"--(?:no-)?(\w+)", Path(__file__).read_text(encoding="utf-8")))
    changing = set(re.findall(r"--(\w+)", " ".join(option for _, option in CHANGES)))
    for name in [*OFFICIAL, *DEPARTURES, *OURS]:
        assert name in given and name in changing | ELSEWHERE, name


def test_the_readme_lists_every_option():
    text = (PROJECT_ROOT / "README_DREAMBOOTH.md").read_text(encoding="utf-8")
    assert not {name for name in [*OFFICIAL, *DEPARTURES, *OURS] if f"`--{name}`" not in text}


@pytest.fixture(scope="module")
def plain_weights(tiny_model, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    argv = f"--pretrained_model_name_or_path {tiny_model} {SHORT} --instance_data_dir {photos / 'train'}"
    script.main(script.parse_args([*argv.split(), "--max_train_steps", "3", "--output_dir", str(folder)]))
    return load_file(folder / lora.LORA_FILE)


@pytest.fixture(scope="module")
def base_weights():
    """{base flags: weights}, filled as the tests ask."""
    return {}


@pytest.mark.parametrize("base, option", CHANGES)
def test_every_option_changes_the_result(train, tmp_path, base_weights, base, option):
    steps = "" if "max_train_steps" in base else "--max_train_steps 3"
    if base not in base_weights:
        train(steps, base, f"--output_dir {tmp_path / 'base'}")
        base_weights[base] = load_file(tmp_path / "base" / lora.LORA_FILE)
    train(steps, base, option)
    weights, before = load_file(tmp_path / "out" / lora.LORA_FILE), base_weights[base]
    assert all(torch.isfinite(value).all() and value.dtype == torch.float32 for value in weights.values())
    assert weights.keys() != before.keys() or any(
        weights[key].shape != before[key].shape or not torch.equal(weights[key], before[key]) for key in weights)


@pytest.mark.parametrize("flags", [
    "--gradient_checkpointing", "--mixed_precision bf16 --allow_tf32", "--mixed_precision fp16", "--offload",
    "--dataloader_num_workers 2", "--local_rank 0 --enable_npu_flash_attention --upcast_before_saving",
    "--validation_prompt sks --num_validation_images 1 --validation_steps 1 --num_inference_steps 2",
    "--checkpointing_steps 1 --checkpoints_total_limit 1 --logging_steps 1", "--max_pixels 10000000",
    "--logging_dir tracks --report_to tensorboard", "--class_prompt unused", "--num_train_epochs 9",
    "--memory offload --memory_limit 9 --base_precision bf16 --no-adaln_tables --no-compile "
    "--attention_backend native"])
def test_options_that_are_about_other_things_leave_the_result_alone(train, tmp_path, plain_weights, flags):
    train("--max_train_steps 3", flags)
    weights = load_file(tmp_path / "out" / lora.LORA_FILE)
    assert all(torch.allclose(weights[key], plain_weights[key], atol=1e-6) for key in plain_weights)


def test_obsolete_options_say_what_replaces_them(train, capsys):
    train("--max_train_steps 1 --local_rank 0 --enable_npu_flash_attention --upcast_before_saving --rank 8",
          "--mixed_precision fp16 --optimizer prodigy --use_8bit_adam --class_prompt unused --hub_token secret",
          "--validation_image PHOTO")
    lines = capsys.readouterr().out.splitlines()
    for start in ("--local_rank does nothing", "--enable_npu_flash_attention does nothing",
                  "--upcast_before_saving does nothing", "--mixed_precision fp16: FLUX overflows",
                  "--use_8bit_adam does nothing", "--class_data_dir and --class_prompt do nothing",
                  "--hub_token does nothing", "--validation_image does nothing for a subject",
                  "--learning_rate 0.0001: Prodigy finds", "--lora_alpha 4 with --rank 8: the LoRA is scaled by 0.5"):
        assert sum(line.startswith(start) for line in lines) == 1, start


def test_prodigys_beta3_reaches_it(tiny_model, tmp_path):
    args = script.parse_args(["--pretrained_model_name_or_path", tiny_model, "--output_dir", str(tmp_path),
                              "--optimizer", "prodigy", "--prodigy_beta3", "0.5"])
    optimizer = run.make_optimizer([torch.nn.Parameter(torch.ones(2))], args, 1)
    assert optimizer.param_groups[0]["beta3"] == 0.5  # too slow a matter to show in a few steps


def test_the_documents_command_runs(train, tmp_path):
    """The seed document's own command, with the tiny model's sizes."""
    train("--mixed_precision=bf16 --resolution=32 --train_batch_size=1 --guidance_scale=1",
          "--gradient_accumulation_steps=4 --gradient_checkpointing --learning_rate=1e-4 --max_train_steps=2")
    settings = lora.read_settings(tmp_path / "out")
    assert settings["guidance_scale"] == 1 and settings["references"] == 0 and not settings["reference_tokens"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Subject LoRA" in card and "scripts.test_kontext_withlora" in card


@pytest.mark.parametrize("column", [True, False], ids=["a caption column", "the instance prompt"])
def test_a_dataset_with_condition_and_caption_columns_trains(train, tmp_path, column):
    folder = tmp_path / "table"
    folder.mkdir()
    for i in range(3):
        image = photograph(size=(48, 48))[:, :: -1 if i else 1]
        Image.fromarray(image).save(folder / f"in_{i}.png")
        Image.fromarray(255 - image).save(folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "before_file_name": f"in_{i}.png", "wish": f"do {i}"} for i in range(3)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(f"--max_train_steps 1 --dataset_name {folder} --dataset_config_name default --image_column image",
          "--cond_image_column before", "--caption_column wish" * column, "--train_batch_size 3")
    settings = lora.read_settings(tmp_path / "out")
    assert settings["references"] == 1 and settings["prompt"] == "sks"


def test_repeats_and_epochs_count_steps(train, tmp_path):
    train("--num_train_epochs 2 --repeats 3 --logging_steps 1 --validation_prompt sks --num_validation_images 1",
          "--validation_epochs 1 --train_batch_size 3")  # 6 images x 3, batches of 3: 6 steps an epoch
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows if "loss/flow" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "validation/nearest_instance" in row] == [0, 6, 12]


# --- the mathematics


def captured_steps(tiny_model, flags, monkeypatch, batch, dtype=torch.float32):
    """training_step's losses, and what it gave to predict_velocity, on a transformer that answers with 0.1 z."""
    args = script.parse_args(["--pretrained_model_name_or_path", tiny_model, *flags.split()])
    pipe, seen = flux.load_models(tiny_model, "cpu", torch.float32), {}

    def predict(transformer, latents, sigma, references, text, guidance):
        seen.update(z=latents, sigma=sigma, references=references, text=text)
        return 0.1 * latents

    monkeypatch.setattr(flux, "predict_velocity", predict)
    text = flux.TextEmbeds(torch.zeros(len(batch["seed"]), 4, 16, dtype=dtype), torch.zeros(len(batch["seed"]), 16))
    return script.training_step(pipe, None, None, batch, text, args), seen, pipe, args


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt"])
def test_prior_preservation_equals_the_formula_computed_by_hand(tiny_model, tmp_path, monkeypatch, count, scheme):
    images = torch.rand(2 * count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"target": images, "references": [], "seed": [7 * i for i in range(2 * count)], "prompt": ["p"] * 2 * count}
    losses, seen, pipe, args = captured_steps(
        tiny_model, f"--with_prior_preservation --class_data_dir {tmp_path} --class_prompt c --prior_loss_weight 0.3 "
        f"--weighting_scheme {scheme} --output_dir {tmp_path / 'out'}", monkeypatch, batch)
    latents, per_item = flux.encode(pipe.vae, images), []
    for z, sigma, x in zip(seen["z"], seen["sigma"], latents, strict=True):
        noise = (z - (1 - sigma) * x) / sigma  # z = (1 - sigma) x + sigma eps
        weight = sigma**-2 if scheme == "sigma_sqrt" else 1
        per_item.append(weight * (0.1 * z - (noise - x)).square().mean())
    assert losses.keys() == {"instance", "prior"}
    torch.testing.assert_close(losses["instance"], torch.stack(per_item[:count]).mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["prior"], 0.3 * torch.stack(per_item[count:]).mean(), rtol=1e-4, atol=0)


def test_the_noise_level_is_fp32_in_the_mix_and_where_it_is_handed_to_the_model(tiny_model, tmp_path, monkeypatch):
    """The official script rounds sigma to bf16 in the mix, and tells the model the unrounded timestep."""
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"target": images, "references": [images], "seed": list(range(64)), "prompt": ["p"] * 64}
    losses, seen, pipe, _ = captured_steps(tiny_model, f"--output_dir {tmp_path / 'out'}", monkeypatch, batch,
                                           torch.bfloat16)
    sigma, z, x = seen["sigma"], seen["z"], flux.encode(pipe.vae, images)
    assert sigma.dtype == z.dtype == torch.float32
    assert torch.allclose(sigma * 1000, (sigma * 1000).round(), atol=1e-3) and len(set(sigma.tolist())) > 56
    torch.testing.assert_close(seen["references"][0], x)
    noise = torch.stack([torch.randn(x.shape[1:], generator=after_the_density(seed)) for seed in range(64)])
    column = sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(z, (1 - column) * x + column * noise, rtol=0, atol=1e-5)


def after_the_density(seed):
    """The item's generator once the noise level is drawn."""
    generator = torch.Generator().manual_seed(seed)
    torch.rand(1, generator=generator)
    return generator


def test_lora_masters_and_adams_moments_are_fp32_on_a_bf16_model(tiny_model):
    pipe = flux.load_models(tiny_model, "cpu", torch.bfloat16)
    tokenizer, text_encoder = flux.load_text_encoder(tiny_model, "cpu", torch.bfloat16)
    assert tokenizer.model_max_length == 77
    for model, layers in ((pipe.transformer, None), (text_encoder, lora.CLIP_LAYERS)):
        parameters = lora.attach(model, 4, layers=layers)
        assert parameters and all(parameter.dtype == torch.float32 for parameter in parameters)
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
        optimizer = torch.optim.AdamW(parameters)
        sum(parameter.sum() for parameter in parameters).backward()
        optimizer.step()
        assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())


def test_the_file_in_stock_diffusers_equals_the_model_that_was_trained(train, tiny_model, tmp_path):
    """Transformer and CLIP: stock loading, our loading, and the validation of the live model draw the same image."""
    train("--max_train_steps 4 --train_text_encoder --text_encoder_lr 3e-2 --learning_rate 3e-2 --guidance_scale 1.5",
          "--lora_dropout 0.5",  # which must be off where an image is drawn
          "--validation_prompt sks --num_validation_images 1 --validation_steps 4 --num_inference_steps 2")
    settings = lora.read_settings(tmp_path / "out")
    keys = load_file(tmp_path / "out" / lora.LORA_FILE)
    assert {key.partition(".")[0] for key in keys} == {"transformer", "text_encoder"}

    text = flux.encode_prompts(tiny_model, ["sks"], "cpu", torch.float32, 8, tmp_path / "out")["sks"]
    plain = flux.encode_prompts(tiny_model, ["sks"], "cpu", torch.float32, 8)["sks"]
    halved = flux.encode_prompts(tiny_model, ["sks"], "cpu", torch.float32, 8, tmp_path / "out", 0.5)["sks"]
    assert not torch.allclose(text.pooled, plain.pooled, atol=1e-4) and torch.equal(text.prompt, plain.prompt)
    assert not torch.allclose(halved.pooled, text.pooled, atol=1e-4)
    pipe = flux.load_models(tiny_model, "cpu", torch.float32)
    lora.load(pipe, tmp_path / "out")
    ours = generate(pipe, text, [], settings, 2, 32, 32, [0])

    stock = FluxKontextPipeline.from_pretrained(tiny_model)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(tmp_path / "out"))
    theirs = stock(prompt="sks", height=32, width=32, max_area=32 * 32, num_inference_steps=2, guidance_scale=1.5,
                   max_sequence_length=8, generator=torch.Generator().manual_seed(0), output_type="pt").images
    torch.testing.assert_close((ours + 1) / 2, theirs, rtol=0, atol=1e-5)
    grid = np.asarray(Image.open(tmp_path / "out" / "validation" / "step-000004.png")).astype(float)
    drawn = grid[20:20 + 256, 4:4 + 256][4::8, 4::8] / 255  # the cell shows 32 px enlarged by 8
    np.testing.assert_allclose(drawn, theirs[0].permute(1, 2, 0).numpy(), atol=1.01 / 255)


# --- class images, validation, bad input


def test_missing_class_images_are_generated_as_stock_kontext_would_and_only_those(train, tiny_model, tmp_path):
    flags = (f"{PRIOR} --max_train_steps 1 --sample_batch_size 3 --prior_generation_precision fp32 "
             "--skip_final_inference")
    train(flags, f"--output_dir {tmp_path / 'a'}")
    files = sorted((tmp_path / "class").iterdir())
    assert [file.name for file in files] == [f"class_0000{i}.png" for i in range(7)]
    assert all(Image.open(file).size == (32, 32) for file in files) and len({f.read_bytes() for f in files}) == 7
    before = {file: file.read_bytes() for file in files}
    files[3].unlink()
    Image.new("RGB", (40, 40), "red").save(files[5])
    train(flags, f"--output_dir {tmp_path / 'b'}")
    after = {file: file.read_bytes() for file in sorted((tmp_path / "class").iterdir())}
    assert after.keys() == before.keys() and {f for f in files if before[f] != after[f]} == {files[5]}


def test_class_images_may_be_made_in_bf16(train, tmp_path):
    train(f"{PRIOR} --max_train_steps 1 --prior_generation_precision bf16 --num_class_images 2")
    assert len(list((tmp_path / "class").iterdir())) == 2


def test_edit_validation_scores_held_out_pairs_and_draws_the_validation_image(train, tmp_path):
    train("--instance_data_dir OUT --cond_data_dir IN --heldout_data_dir HELD/out --heldout_cond_data_dir HELD/in",
          "--validation_image PHOTO --validation_prompt invert --num_validation_images 2 --max_train_steps 2",
          "--validation_steps 1 --skip_final_inference")
    rows = [row for row in metrics(tmp_path / "out") if "validation/psnr" in row]
    assert [row["step"] for row in rows] == [0, 1]  # none after the last step
    inputs, ceilings = ({row[f"validation/{name}"] for row in rows} for name in ("psnr_input", "psnr_vae"))
    assert len(inputs) == len(ceilings) == 1 and 0 < min(inputs) < 40
    grid = Image.open(tmp_path / "out" / "validation" / "step-000001.png")
    assert grid.width == 4 + 3 * 260 and grid.height > 3 * 256  # two held-out pairs, two edits of the photograph


def test_training_moves_the_measure_of_both_modes_on_the_embedded_model(tmp_path):
    """An edit towards plain blue, and a subject that is plain blue."""
    blue, image = np.full((64, 64, 3), (40, 60, 200), np.uint8), photograph(size=(160, 160))
    for name, places in (("train", (0, 32, 64, 96)), ("held", (20, 80))):
        for folder in ("out", "in"):
            (tmp_path / name / folder).mkdir(parents=True)
            for i in places:
                pixels = blue if folder == "out" else image[i:i + 64, i:i + 64]
                Image.fromarray(pixels).save(tmp_path / name / folder / f"{i}.png")
    common = ("--pretrained_model_name_or_path assets/tiny-kontext --resolution 64 --max_sequence_length 16 --rank 8 "
              "--lora_alpha 8 --learning_rate 5e-3 --lr_warmup_steps 0 --guidance_scale 1 --max_train_steps 40 "
              "--num_inference_steps 4 --num_validation_images 2 --report_to none --instance_prompt blue "
              "--train_batch_size 1 ").split()
    edit = ["--instance_data_dir", "train/out", "--cond_data_dir", "train/in", "--heldout_data_dir", "held/out",
            "--heldout_cond_data_dir", "held/in", "--output_dir", "edit"]
    subject = ["--instance_data_dir", "train/out", "--validation_prompt", "blue", "--output_dir", "subject"]
    for mode in (edit, subject):
        folders = {"train/out", "train/in", "held/out", "held/in", "edit", "subject"}
        script.main(script.parse_args(common + [str(tmp_path / w) if w in folders else w for w in mode]))
    first, last = [row for row in metrics(tmp_path / "edit") if "validation/psnr" in row]
    assert last["validation/psnr"] > last["validation/psnr_input"] + 6 > first["validation/psnr"] + 3
    first, last = [row["validation/nearest_instance"] for row in metrics(tmp_path / "subject")
                   if "validation/nearest_instance" in row]
    assert last < 0.8 * first


def test_the_distance_to_a_subject_is_zero_for_its_own_images_and_in_levels():
    images = [torch.rand(3, 48, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(3)]
    subject = validation.thumbnails(images[:2])
    assert validation.nearest_distance(images[:2], subject).tolist() == [0, 0]
    assert validation.nearest_distance(images[2:], subject)[0] > 5
    brighter = validation.nearest_distance([images[1] + 10 / 127.5], subject)
    assert brighter.item() == pytest.approx(10, abs=1e-3)


@pytest.mark.parametrize("flags, words", {
    "--with_prior_preservation": "--class_data_dir",
    f"{PRIOR} --instance_data_dir OUT --cond_data_dir IN": "--with_prior_preservation is for subjects",
    "--instance_data_dir OUT --cond_data_dir IN MORE --validation_image PHOTO": "2 references",
    "--heldout_cond_data_dir IN": "--heldout_data_dir",
    f"{PRIOR} --class_data_dir PHOTO": "--class_data_dir",
    "--caption_dropout 1.5": "--caption_dropout",
    "--repeats 0": "--repeats",
    "--rank 0": "--rank",
    "--num_class_images 0": "--num_class_images",
    "--resolution 40": "--resolution",
    "--train_batch_size 7": "--train_batch_size 7",
    "--bnb_quantization_config_path TMP/none.json": "none.json: No such file",
    "--bnb_quantization_config_path TMP/text.json": "text.json: not JSON",
    "--bnb_quantization_config_path TMP/odd.json": "load_in_4bit",
    "--bnb_quantization_config_path TMP/both.json": "set one of",
    "--bnb_quantization_config_path TMP/nf4.json": "CUDA GPU",
}.items())
def test_bad_input_is_refused_in_one_line_before_a_model_loads(train, monkeypatch, tmp_path, flags, words):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(flux, "load_pipeline", refuse)
    for name, text in {"text": "load_in_4bit", "odd": '{"load_in_4bits": true}', "nf4": '{"load_in_4bit": true}',
                       "both": '{"load_in_4bit": true, "load_in_8bit": true}'}.items():
        (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises((ValueError, OSError)) as error:
        train("--max_train_steps 1", flags)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_bitsandbytes_file_reaches_the_transformer_alone(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "nf4.json").write_text('{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}')
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = script.parse_args(["--pretrained_model_name_or_path", tiny_model, "--output_dir", str(tmp_path / "out"),
                              "--bnb_quantization_config_path", str(tmp_path / "nf4.json")])
    given = {}

    def record(path, **options):
        given.update(options)
        return SimpleNamespace(vae=torch.nn.Linear(1, 1), transformer=torch.nn.Linear(1, 1))

    monkeypatch.setattr(FluxKontextPipeline, "from_pretrained", record)
    plan = placement.plan(args, torch.device("cpu"), torch.bfloat16, [(512, 512)], ["p"])
    placement.load(tiny_model, args, plan, "cpu", torch.bfloat16, {}, None)
    mapping = given["quantization_config"].quant_mapping
    assert mapping.keys() == {"transformer"} and mapping["transformer"].bnb_4bit_quant_type == "nf4"
    assert mapping["transformer"].load_in_4bit and mapping["transformer"].bnb_4bit_compute_dtype == torch.bfloat16


def test_offload_has_the_vae_on_the_device_only_while_it_works(tiny_pipe):
    moves, original = [], type(tiny_pipe.vae).to
    tiny_pipe.vae.to = lambda device: moves.append(str(device)) or original(tiny_pipe.vae, device)
    with pytest.raises(RuntimeError), flux.on_device(tiny_pipe.vae, "cpu:0", True):
        assert moves == ["cpu:0"]
        raise RuntimeError
    assert moves == ["cpu:0", "cpu"]
    with flux.on_device(tiny_pipe.vae, "cpu:0", False):
        assert len(moves) == 2


def test_hub_options_reach_their_places_and_no_secret_is_written(train, tiny_model, tmp_path, monkeypatch):
    asked, sent = [], []
    original = FluxKontextPipeline.from_pretrained

    def record(path, **options):
        asked.append({name: options.pop(name) for name in ("revision", "variant", "cache_dir")})
        return original(path, **options)

    monkeypatch.setattr(FluxKontextPipeline, "from_pretrained", record)
    monkeypatch.setattr(script, "push_to_hub", lambda args: sent.append((args.hub_token, args.hub_model_id)))
    train("--max_train_steps 1 --revision main --variant fp16 --cache_dir TMP --push_to_hub --hub_model_id me/mine",
          "--hub_token hf_secret --report_to tensorboard --checkpointing_steps 1 --train_text_encoder", PRIOR)
    assert asked == [{"revision": "main", "variant": "fp16", "cache_dir": str(tmp_path)}] * 5
    assert sent == [("hf_secret", "me/mine")]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(b"hf_secret" in path.read_bytes() for path in files)


def test_resuming_another_kind_of_run_or_another_set_of_images_is_refused(train, photos, tmp_path):
    train("--max_train_steps 1 --checkpointing_steps 1")
    resume = "--max_train_steps 2 --resume_from_checkpoint latest"
    (tmp_path / "fewer").mkdir()
    for i in range(6):
        (tmp_path / "fewer" / f"other_{i}.png").write_bytes((photos / "train" / f"photo_{i}.png").read_bytes())
    for flags, word in (("--train_text_encoder", "train_text_encoder"), ("--repeats 2", "repeats"),
                        (f"--instance_data_dir {tmp_path / 'fewer'}", "data"), ("--instance_prompt dog", "data")):
        with pytest.raises(ValueError, match=word):
            train(resume, flags)
    train(resume, "--validation_prompt another --num_validation_images 1")  # what is validated may change


def test_resuming_where_there_is_a_finished_lora_and_no_checkpoint_writes_over_nothing(train):
    before = train("--max_train_steps 1")
    with pytest.raises(ValueError, match="holds a finished .* and no sound checkpoint"):
        train("--max_train_steps 1 --seed 7 --resume_from_checkpoint latest")
    assert before


def test_no_validation_images_switch_validation_off(train, tmp_path):
    train("--max_train_steps 1 --validation_prompt sks --num_validation_images 0")
    train("--max_train_steps 1 --instance_data_dir OUT --cond_data_dir IN --validation_image PHOTO",
          f"--num_validation_images 0 --output_dir {tmp_path / 'edit'}")
    assert not list(tmp_path.glob("*/validation"))


def test_an_empty_instance_prompt_is_a_prompt(train, tmp_path):
    args = script.parse_args(["--pretrained_model_name_or_path", "assets/tiny-kontext", "--instance_prompt", "",
                              "--output_dir", str(tmp_path)])
    assert args.instance_prompt == ""
    train("--max_train_steps 1 --instance_prompt=")
    assert lora.read_settings(tmp_path / "out")["prompt"] == ""


def test_many_captions_lie_on_disk_each_encoded_once_and_train_to_the_same_bits(train, tmp_path, monkeypatch):
    flags = "--instance_data_dir OUT --cond_data_dir IN --max_train_steps 3 --checkpointing_steps 2"
    in_memory = train(flags, f"--output_dir {tmp_path / 'memory'}")
    monkeypatch.setattr(cache, "PROMPTS_IN_MEMORY", 2)
    asked, original = [], flux.encode_prompts
    monkeypatch.setattr(flux, "encode_prompts", lambda path, prompts, *rest, **where: asked.extend(prompts) or original(
        path, prompts, *rest, **where))
    assert train(flags, f"--output_dir {tmp_path / 'disk'}") == in_memory
    assert sorted(asked) == sorted([f"invert photo_{i}" for i in range(6)] + ["sks"])
    assert len(list((tmp_path / "disk" / "text_cache").glob("*.safetensors"))) == 7
    (tmp_path / "disk" / lora.LORA_FILE).rename(tmp_path / "gone")
    assert train(flags, f"--output_dir {tmp_path / 'disk'} --resume_from_checkpoint latest") == in_memory
    assert len(asked) == 7  # a resumed run finds them

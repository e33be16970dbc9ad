"""Claims about train_deg_lora_flux_kontext.py, each on a tiny random model."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_deg_lora_flux_kontext as script
from tests.conftest import photograph
from utils import checkpoint, flux, lora, run, validation

SHORT = "--resolution 32 --train_batch_size 2 --max_sequence_length 8 --rank 4 --report_to none --num_inference_steps 1"


@pytest.fixture
def train(tiny_model, photos, tmp_path):
    """train("flags", "more") -> bytes of the final LoRA; output in tmp_path/out unless --output_dir is given."""

    def call(*flags):
        flags = " ".join(flags)
        argv = ["--pretrained_model_name_or_path", tiny_model, *SHORT.split(), *flags.split()]
        if not any(flag in flags for flag in ("--hr_root", "--dataset_name")):
            argv += ["--hr_root", str(photos / "train")]
        if "--output_dir" not in flags:
            argv += ["--output_dir", str(tmp_path / "out")]
        args = script.parse_args(argv)
        code = script.main(args)
        file = Path(args.output_dir) / lora.LORA_FILE
        return code if code else file.read_bytes()

    return call


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


VARIANTS = {
    "stock flow": "--degradation_types downsample,noise",
    "noisy control, dropout, EMA, cosine": "--start_noise 0.3-0.6 --lora_dropout 0.3 --use_ema --ema_decay 0.9 "
                                           "--lr_scheduler cosine --lr_warmup_steps 1 --degradation_types noise",
    "bridge with noise, no reference": "--start_noise 0 --bridge_noise 0.1 --no-reference_tokens "
                                       "--train_sigmas continuous",
    "buckets, accumulation": "--aspect_ratio_buckets 32:32,32:48,48:32 --gradient_accumulation_steps 2 --random_flip "
                             "--train_batch_size 1",
    "Prodigy": "--optimizer prodigy --learning_rate 1",
    "schedule-free": "--optimizer schedule_free --lr_warmup_steps 2 --validation_steps 2 --validation_image IMAGE",
    "8-bit AdamW": "--use_8bit_adam",
    "DoRA, sampled latents, perceptual": "--use_dora --vae_encode_mode sample --perceptual_loss gradient "
                                         "--perceptual_max_sigma 1 --dataloader_num_workers 1",
}


def test_no_resume_replaces_a_finished_lora_by_an_earlier_state_or_another_runs(train, tmp_path):
    def contents():
        return {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    train("--max_train_steps 3 --checkpointing_steps 2")
    train("--max_train_steps 2 --checkpointing_steps 1 --seed 7", f"--output_dir {tmp_path / 'other'}")
    finished = contents()
    with pytest.raises(ValueError, match="out is at step 3 already, and this command asks for 2; ask for more steps"):
        train("--max_train_steps 2 --resume_from_checkpoint latest")
    with pytest.raises(ValueError, match="checkpoint-1 is of another run than that in --output_dir .*; name another"):
        train(f"--max_train_steps 3 --seed 7 --resume_from_checkpoint {tmp_path / 'other' / 'checkpoint-1'}")
    assert contents() == finished
    elsewhere = train(f"--max_train_steps 2 --seed 7 --resume_from_checkpoint {tmp_path / 'other' / 'checkpoint-1'}",
                      f"--output_dir {tmp_path / 'third'}")
    assert elsewhere == (tmp_path / "other" / lora.LORA_FILE).read_bytes()
    with pytest.raises(ValueError, match="checkpoint-2 is at step 2 already, and this command asks for 1"):
        train(f"--max_train_steps 1 --seed 7 --resume_from_checkpoint {tmp_path / 'other' / 'checkpoint-2'}",
              f"--output_dir {tmp_path / 'fourth'}")


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS.keys())
def test_resumed_run_equals_straight_run_to_the_bit(train, tmp_path, photos, flags):
    flags = flags.replace("IMAGE", str(photos / "heldout" / "photo_6.png"))
    straight = train(flags, "--max_train_steps 5", f"--output_dir {tmp_path / 'straight'}")
    # Step 2 of 3 lies inside an epoch of 6 images in batches of 2: the data order must go on, not start again.
    train(flags, "--max_train_steps 5 --checkpointing_steps 2", f"--output_dir {tmp_path / 'first'}")
    for name in ("checkpoint-4", lora.LORA_FILE, "metrics.jsonl", "README.md"):  # as if it had been killed after step 2
        path = tmp_path / "first" / name
        path.rename(tmp_path / f"gone-{path.name}")
    resumed = train(flags, "--max_train_steps 5 --resume_from_checkpoint latest", f"--output_dir {tmp_path / 'first'}")
    assert resumed == straight
    assert (tmp_path / "gone-checkpoint-4").is_dir()


def test_same_seed_same_run_and_other_seed_another(train, tmp_path):
    a, b, c = (train("--max_train_steps 2", f"--seed {seed}", f"--output_dir {tmp_path / name}")
               for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert a == b != c


def test_validation_and_workers_move_nothing(train, tmp_path, photos):
    plain = train("--max_train_steps 4", f"--output_dir {tmp_path / 'plain'}")
    validated = train("--max_train_steps 4 --validation_steps 1 --dataloader_num_workers 2 --logging_steps 1",
                      f"--heldout_root {photos / 'heldout'} --output_dir {tmp_path / 'validated'}")
    assert plain == validated


def test_training_lowers_the_loss_and_the_lora_file_keeps_what_was_validated(train, tiny_model, photos, tmp_path,
                                                                             monkeypatch):
    train("--max_train_steps 60 --learning_rate 1e-2 --start_noise 0.5 --validation_steps 30 --num_validation_images 1",
          f"--heldout_root {photos / 'heldout'} --degradation_types noise --guidance_scale 1.5 --logging_steps 30")
    losses = {row["step"]: row["validation/loss"] for row in metrics(tmp_path / "out") if "validation/loss" in row}
    assert set(losses) == {0, 30, 60} and losses[60] < 0.97 * losses[0]

    # Stock loading and the stored settings give the numbers that training reported for its live model.
    from my_dataset.dataset_deg_paired import DegDataset, heldout_seed
    from my_dataset.degradations import make_degrader

    settings = lora.read_settings(tmp_path / "out")
    assert settings["start_noise"] == [0.5, 0.5] and settings["guidance_scale"] == 1.5
    pipe = flux.load_models(tiny_model, "cpu", torch.float32)
    lora.load(pipe, tmp_path / "out")
    text = flux.encode_prompts(tiny_model, [settings["prompt"]], "cpu", torch.float32, settings["max_sequence_length"])
    heldout = DegDataset(photos / "heldout", make_degrader("noise"), 32, crop="center", seed=heldout_seed(0))
    sizes, decode = [], flux.decode
    monkeypatch.setattr(flux, "decode", lambda vae, z: sizes.append(z.shape[2:]) or decode(vae, z))
    large = np.zeros((40, 70, 3), np.uint8)
    scores = validation.validate(pipe, [heldout[0]], text[settings["prompt"]], settings, 1, 0, tmp_path / "grid.png",
                                 [large])
    assert scores["validation/loss"] == pytest.approx(losses[60], rel=1e-5)
    assert len(sizes) > 6 and set(sizes) == {(4, 4)}  # a photograph without target is restored in tiles of 32 px


def test_sigterm_finishes_the_step_saves_and_the_run_goes_on_to_the_same_end(train, photos, tmp_path, sigterm_in_step):
    shared = (f"--max_train_steps 5 --heldout_root {photos / 'heldout'} --validation_steps 2 --num_validation_images 1 "
              "--num_inference_steps 1")
    straight = train(shared, f"--output_dir {tmp_path / 'straight'}")
    undo = sigterm_in_step(script, 2)
    flags = f"{shared} --checkpointing_steps 0 --output_dir {tmp_path / 'stopped'}"
    assert train(flags) == 128 + signal.SIGTERM
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "stopped")] == [2]
    undo()
    assert train(flags, "--resume_from_checkpoint latest") == straight
    # the validation of step 2 too, which the signal came before
    validations = [[(row["step"], row["validation/loss"]) for row in metrics(tmp_path / name)
                    if "validation/loss" in row] for name in ("straight", "stopped")]
    assert validations[0] == validations[1] and [step for step, _ in validations[0]] == [0, 2, 4, 5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_loss_stops_names_the_batch_and_leaves_the_saved_weights_alone(train, tmp_path, monkeypatch, bad):
    straight = train("--max_train_steps 2", f"--output_dir {tmp_path / 'straight'}")
    original = script.training_step
    calls = []

    def poisoned(pipe, transformer, perceptual, batch, *rest):
        losses = original(pipe, transformer, perceptual, batch, *rest)
        calls.append(batch["path"])
        return {"flow": losses["flow"] * (bad if len(calls) == 3 else 1)}

    monkeypatch.setattr(script, "training_step", poisoned)
    with pytest.raises(ValueError, match="step 3 is not finite") as error:
        train("--max_train_steps 8 --checkpointing_steps 2", f"--output_dir {tmp_path / 'poisoned'}")
    assert all(path in str(error.value) for path in calls[2])
    saved = checkpoint.list_checkpoints(tmp_path / "poisoned")
    assert [step for step, _ in saved] == [2]
    assert (saved[0][1] / lora.LORA_FILE).read_bytes() == straight


def test_cached_latents_train_to_the_same_bits(train, tmp_path):
    flags = "--max_train_steps 6 --center_crop --train_batch_size 1"  # the cache encodes one by one
    plain = train(flags, f"--output_dir {tmp_path / 'plain'}")
    assert train(flags, "--cache_latents", f"--output_dir {tmp_path / 'cached'}") == plain
    assert len(list((tmp_path / "cached" / "latent_cache").glob("*.safetensors"))) == 6


def test_accumulated_batches_equal_one_large_batch(train, tmp_path):
    train("--max_train_steps 3 --train_batch_size 6", f"--output_dir {tmp_path / 'large'}")
    train("--max_train_steps 3 --train_batch_size 2 --gradient_accumulation_steps 3",
          f"--output_dir {tmp_path / 'small'}")
    a, b = (load_file(tmp_path / name / lora.LORA_FILE) for name in ("large", "small"))
    assert all(torch.allclose(a[key], b[key], atol=2e-6) for key in a)


def test_gradient_checkpointing_changes_no_number(train, tmp_path):
    plain = train("--max_train_steps 2 --lora_dropout 0.2", f"--output_dir {tmp_path / 'plain'}")
    train("--max_train_steps 2 --lora_dropout 0.2 --gradient_checkpointing", f"--output_dir {tmp_path / 'saved'}")
    a, b = (load_file(tmp_path / name / lora.LORA_FILE) for name in ("plain", "saved"))
    assert plain and all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)


def test_a_cpu_trains_in_fp32_whatever_was_asked(train, tmp_path, capsys):
    plain = train("--max_train_steps 1", f"--output_dir {tmp_path / 'plain'}")
    asked = train("--max_train_steps 1 --mixed_precision bf16 --allow_tf32", f"--output_dir {tmp_path / 'bf16'}")
    assert asked == plain
    assert "computes in fp32" in capsys.readouterr().out
    assert all(value.dtype == torch.float32 for value in load_file(tmp_path / "bf16" / lora.LORA_FILE).values())


OPTIONS = [
    "--train_sigmas 1,0.5 --start_noise 0",
    "--train_sigmas continuous",
    "--timestep_shift resolution",
    "--weighting_scheme sigma_sqrt",
    "--weighting_scheme cosmap",
    "--weighting_scheme mode --mode_scale 0.5",
    "--weighting_scheme logit_normal --logit_mean 0.5 --logit_std 0.5",
    "--start_noise 0.25",
    "--no-reference_tokens --start_noise 0.5",
    "--guidance_scale 3",
    "--instance_prompt repair",
    "--lora_alpha 8",
    "--use_rslora --lora_alpha 8",
    "--lora_layers attn.to_q,x_embedder,proj_out",
    "--max_grad_norm 1e-6",
    "--scale_lr",
    "--learning_rate 3e-4",
    "--lr_scheduler linear --lr_warmup_steps 1",
    "--adam_weight_decay 5",
    "--adam_epsilon 1",
    "--adam_beta1 0.1 --adam_beta2 0.1",
    "--perceptual_loss gradient --perceptual_max_sigma 1",
    "--perceptual_loss gradient --perceptual_max_sigma 1 --perceptual_loss_weight 3",
    "--perceptual_loss gradient --perceptual_max_sigma 1 --perceptual_loss_target velocity",
    "--degradation_types blur",
    "--center_crop",
    "--crop_zoom 1-2",
    "--random_flip",
    "--resolution 48",
    "--vae_encode_mode sample",
    "--max_sequence_length 5",
]


@pytest.fixture(scope="module")
def plain_weights(tiny_model, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    argv = f"--pretrained_model_name_or_path {tiny_model} {SHORT} --hr_root {photos / 'train'} --output_dir {folder}"
    script.main(script.parse_args([*argv.split(), "--max_train_steps", "2"]))
    return load_file(folder / lora.LORA_FILE)


@pytest.mark.parametrize("flags", OPTIONS)
def test_every_option_changes_the_result(train, tmp_path, plain_weights, flags):
    train("--max_train_steps 2", flags)
    weights = load_file(tmp_path / "out" / lora.LORA_FILE)
    assert all(torch.isfinite(value).all() for value in weights.values())
    alike = weights.keys() == plain_weights.keys() and all(
        weights[key].shape == plain_weights[key].shape and torch.equal(weights[key], plain_weights[key])
        for key in weights)
    settings = lora.read_settings(tmp_path / "out")
    assert not alike or settings["prompt"] != "Restore this degraded photograph to high fidelity"
    args = json.loads((tmp_path / "out" / "args.json").read_text())
    assert args["max_train_steps"] == 2


def test_epochs_are_steps_of_the_global_batch_and_step_options_win(train, tmp_path, photos):
    # 6 images, batch 2 x accumulation 2: an epoch is ceil(6 / 4) = 2 steps
    flags = f"--gradient_accumulation_steps 2 --logging_steps 1 --heldout_root {photos / 'heldout'}"
    train(flags, "--num_train_epochs 2 --validation_epochs 1 --checkpointing_steps 1 --checkpoints_total_limit 2",
          f"--output_dir {tmp_path / 'epochs'}")
    rows = metrics(tmp_path / "epochs")
    assert [row["step"] for row in rows if "loss/flow" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "validation/psnr" in row] == [0, 2, 4]
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "epochs")] == [3, 4]
    train(flags, "--num_train_epochs 9 --max_train_steps 3 --validation_epochs 1 --validation_steps 3",
          f"--output_dir {tmp_path / 'steps'}")
    assert [row["step"] for row in metrics(tmp_path / "steps") if "validation/psnr" in row] == [0, 3]


def test_stored_pairs_and_their_heldout_partners_train(train, tmp_path, photos):
    for name in ("train", "heldout"):
        for path in (photos / name).iterdir():
            small = tmp_path / f"lr_{name}" / f"{path.stem}x2.png"
            small.parent.mkdir(exist_ok=True)
            image = Image.open(path)
            image.resize((image.width // 2, image.height // 2)).save(small)
    train(f"--max_train_steps 1 --hr_root {photos / 'train'} --lr_root {tmp_path / 'lr_train'}",
          "--upscale_kernel lanczos",
          f"--heldout_root {photos / 'heldout'} --heldout_lr_root {tmp_path / 'lr_heldout'} --num_validation_images 1")
    score = metrics(tmp_path / "out")[0]
    assert 15 < score["validation/psnr_input"] < 40


def test_a_folder_with_metadata_trains_with_a_prompt_per_image(train, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = []
    for i in range(4):
        for kind in ("clean", "degraded"):
            Image.fromarray(photograph(size=(64 + 16 * i, 64))[:, :: 1 if kind == "clean" else -1]).save(
                folder / f"{kind}_{i}.png")
        rows.append({"clean_file_name": f"clean_{i}.png", "degraded_file_name": f"degraded_{i}.png",
                     "prompt": f"photograph {i}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []
    original = flux.encode_prompts
    try:
        flux.encode_prompts = lambda path, prompts, *rest, **where: seen.extend(prompts) or original(
            path, prompts, *rest, **where)
        train(f"--max_train_steps 1 --dataset_name {folder}")
    finally:
        flux.encode_prompts = original
    assert {f"photograph {i}" for i in range(4)} <= set(seen)


def test_unreadable_files_are_counted_and_listed(train, tmp_path, photos, caplog):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in (photos / "train").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "empty.png").touch()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.jpg")
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    train(f"--max_train_steps 4 --hr_root {folder}")
    assert "empty.png" in caplog.text
    listed = (tmp_path / "out" / "unreadable.txt").read_text()
    assert "empty.png" in listed and "cut.jpg" in listed


def test_validation_images_without_target_are_drawn(train, tmp_path, photos):
    image = next((photos / "heldout").iterdir())
    train(f"--max_train_steps 1 --validation_image {image} --validation_prompt better --num_validation_images 1")
    assert Image.open(tmp_path / "out" / "validation" / "step-000001.png").height > 100


def test_trackers_get_numbers_and_pictures_but_no_secret(train, tmp_path, photos, monkeypatch):
    sent = []
    monkeypatch.setattr(script, "push_to_hub", lambda args: sent.append(args.hub_token))
    train(f"--max_train_steps 1 --report_to tensorboard --logging_dir tracks --heldout_root {photos / 'heldout'}",
          "--num_validation_images 1 --push_to_hub --hub_model_id me/mine --hub_token hf_secret")
    assert sent == ["hf_secret"]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any("tfevents" in path.name and path.parent.parent.name == "tracks" for path in files)
    assert not any(b"hf_secret" in path.read_bytes() for path in files)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "out" / "tracks").iterdir())), size_guidance={"images": 0})
    events.Reload()
    assert "loss/flow" in events.Tags()["scalars"] and "validation" in events.Tags()["images"]


def test_revision_variant_and_cache_dir_reach_the_loader(train, tiny_model, tmp_path, monkeypatch):
    asked = []
    original = flux.FluxKontextPipeline.from_pretrained

    def record(path, **options):
        asked.append({name: options.pop(name) for name in ("revision", "variant", "cache_dir")})
        return original(path, **options)

    monkeypatch.setattr(flux.FluxKontextPipeline, "from_pretrained", record)
    train(f"--max_train_steps 1 --revision main --variant fp16 --cache_dir {tmp_path}")
    assert asked == [{"revision": "main", "variant": "fp16", "cache_dir": str(tmp_path)}] * 2


REFUSED = {
    "--rank 0": "--rank",
    "--learning_rate -1": "--learning_rate",
    "--max_train_steps 0": "--max_train_steps",
    "--lora_dropout 1": "--lora_dropout",
    "--lora_alpha 0": "--lora_alpha",
    "--ema_decay 1": "--ema_decay",
    "--lora_layers nothing": "--lora_layers nothing: the model has no such linear layer",
    "--lora_layers ,": "--lora_layers ,: name a layer",
    "--start_noise 0.05": "--start_noise",
    "--bridge_noise 0.1": "--bridge_noise",
    "--no-reference_tokens": "--no-reference_tokens",
    "--train_sigmas 0.5": "--train_sigmas",
    "--train_sigmas 1,0.75,0.5,0.25 --start_noise 0.5 --num_inference_steps 3": "--num_inference_steps 3",
    "--perceptual_loss lpips --perceptual_weights README.md": "README.md",
    "--mixed_precision fp16": "--mixed_precision",
    "--resolution 40": "--resolution",
    "--train_batch_size 7": "--train_batch_size 7",
    "--cache_latents": "--cache_latents",
    "--cache_latents --center_crop --crop_zoom 1-2": "--crop_zoom",
    "--report_to wandbb": "--report_to wandbb",
    "--perceptual_loss": "vgg16-397923af.pth",
    "--perceptual_loss lpips --perceptual_weights nowhere.pth": "nowhere.pth",
    "--perceptual_loss gradient --perceptual_crop 3": "--perceptual_crop",
    "--crop_zoom 0.5": "--crop_zoom",
    "--hr_root nowhere": "nowhere",
    "--heldout_lr_root nowhere": "--heldout_root",
    "--resume_from_checkpoint nowhere": "nowhere",
    "--adam_beta1 1.5": "--adam_beta1",
    "--max_sequence_length 513": "--max_sequence_length",
    "--lr_scheduler piecewise_constant --lr_step_rules often": "--lr_step_rules",
    "--hub_token secret": "--push_to_hub",
    "--hub_token secret --push_to_hub --report_to wandb": "--report_to wandb",
    "--optimizer schedule_free --lr_scheduler cosine": "--lr_scheduler",
    "--optimizer prodigy --use_8bit_adam": "--use_8bit_adam",
    "--lr_scheduler piecewise_constant": "--lr_step_rules",
    "--validation_image nowhere.png": "nowhere.png",
    "--noise_level 2-1 --degradation_types noise": "--noise_level",
    "--seed 9223372036854775808": "--seed 9223372036854775808: give less than 2^63",
    "--lr_scheduler piecewise_constant --lr_step_rules 1.1.1:2,3": "--lr_step_rules",
    "--adam_epsilon -1": "--adam_epsilon",
    "--lr_power nan": "--lr_power",
    "--logit_mean inf": "--logit_mean",
    "--logit_std -1": "--logit_std",
    "--attention_backend flash": "--attention_backend flash needs a CUDA device",
    "--lpips_backbone missing.pth": "missing.pth",
}


@pytest.fixture
def no_model_loads(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(flux, "load_pipeline", refuse)


@pytest.mark.usefixtures("no_model_loads")
@pytest.mark.parametrize("flags", REFUSED)
def test_bad_input_is_refused_in_one_line_that_names_it_before_a_model_loads(train, tmp_path, monkeypatch, flags):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises((ValueError, OSError)) as error:
        train("--max_train_steps 1" if "max_train_steps" not in flags else "", flags)
    assert REFUSED[flags] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.usefixtures("no_model_loads")
def test_training_images_held_out_and_a_file_for_the_output_are_refused_before_a_model_loads(train, photos):
    for flags, word in ((f"--heldout_root {photos / 'train'}", "held out"),
                        (f"--output_dir {photos / 'train' / 'photo_0.png'}", "--output_dir")):
        with pytest.raises((ValueError, OSError), match=word):
            train("--max_train_steps 1", flags)


def test_a_readme_that_is_no_card_of_ours_is_never_written_over(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("my notes")
    with pytest.raises(ValueError, match="README.md would be written over"):
        train("--max_train_steps 1")
    assert (tmp_path / "out" / "README.md").read_text() == "my notes"


def test_a_missing_model_is_refused(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ValueError, match="--pretrained_model_name_or_path"):
            script.parse_args(["--pretrained_model_name_or_path", str(path), "--output_dir", str(tmp_path / "out")])


def test_an_earlier_run_is_never_overwritten(train, tmp_path):
    train("--max_train_steps 2 --checkpointing_steps 2")
    with pytest.raises(ValueError, match="holds an earlier run"):
        train("--max_train_steps 2")


def test_resuming_with_another_option_that_matters_names_it(train):
    shared = "--degradation_types noise,downsample --max_train_steps 2 --checkpointing_steps 2"
    train(shared)
    for flags in ("--rank 8", "--train_batch_size 1", "--noise_level 0.5", "--adam_beta1 0.5", "--adam_epsilon 1e-6",
                  "--random_flip", "--crop_zoom 1-2", "--perceptual_loss gradient", "--degradation_order shuffled"):
        with pytest.raises(ValueError, match=rf"it differs in {flags.split()[0][2:]} \(was"):
            train(shared, flags, "--resume_from_checkpoint latest")


def test_resuming_on_other_photographs_is_refused_and_where_they_lie_does_not_matter(train, photos, tmp_path):
    shared = "--max_train_steps 2 --checkpointing_steps 2 --degradation_types noise"
    train(shared)
    moved = shutil.copytree(photos / "train", tmp_path / "moved")
    train(shared, f"--hr_root {moved} --resume_from_checkpoint latest")
    first = min(moved.iterdir())
    first.rename(first.with_stem("another"))
    with pytest.raises(ValueError, match=r"it differs in data \(was"):
        train(shared, f"--hr_root {moved} --resume_from_checkpoint latest")


def test_a_new_run_keeps_no_numbers_of_one_that_was_killed_before_its_first_checkpoint(train, photos, tmp_path):
    flags = (f"--heldout_root {photos / 'heldout'} --num_validation_images 1 --num_inference_steps 1 "
             "--max_train_steps 1 --checkpointing_steps 0 --degradation_types noise")
    train(flags, "--noise_level 0.02")
    (tmp_path / "out" / lora.LORA_FILE).unlink()  # as if it had been killed
    train(flags, "--noise_level 0.5")
    rows = [(row["step"], row[key]) for row in metrics(tmp_path / "out") if (key := "validation/psnr_input") in row]
    assert [step for step, _ in rows] == [0, 1] and rows[0][1] == rows[1][1]


def test_the_last_validation_of_a_run_that_was_stopped_in_its_last_step_comes_with_the_resume(train, photos, tmp_path,
                                                                                              sigterm_in_step):
    flags = (f"--heldout_root {photos / 'heldout'} --num_validation_images 1 --num_inference_steps 1 "
             "--max_train_steps 1 --validation_steps 5")
    undo = sigterm_in_step(script, 1)
    assert train(flags) == 128 + signal.SIGTERM
    undo()
    train(flags, "--resume_from_checkpoint latest")
    assert (tmp_path / "out" / "validation" / "step-000001.png").is_file()


def test_items_draw_their_own_noise_whatever_the_batch_around_them(tiny_model, photos, tmp_path):
    args = script.parse_args(["--pretrained_model_name_or_path", tiny_model, *SHORT.split(), "--hr_root",
                              str(photos / "train"), "--output_dir", str(tmp_path), "--start_noise", "0.2-0.9"])
    pipe = flux.load_models(tiny_model, "cpu", torch.float32)
    text = flux.encode_prompts(tiny_model, ["p"], "cpu", torch.float32, 8)
    seen = []

    def spy(transformer, latents, sigma, control, text, guidance):
        seen.append((latents, sigma))
        return torch.zeros_like(latents)

    images = torch.rand(2, 3, 32, 32) * 2 - 1
    original, flux.predict_velocity = flux.predict_velocity, spy
    try:
        for order in ([0, 1], [1, 0]):
            batch = {"target": images[order], "control": images[order], "seed": [11 * i + 5 for i in order]}
            script.training_step(pipe, None, None, batch, flux.stack_text(text, ["p", "p"], "cpu", torch.float32), args)
    finally:
        flux.predict_velocity = original
    (z, sigma), (z_swapped, sigma_swapped) = seen
    assert torch.equal(sigma, sigma_swapped.flip(0)) and sigma[0] != sigma[1]
    assert torch.allclose(z, z_swapped.flip(0), atol=1e-6)


def test_identity_lists_what_a_resume_needs(train, tmp_path):
    train("--max_train_steps 1 --checkpointing_steps 1")
    saved = json.loads((tmp_path / "out" / "checkpoint-1" / "state.json").read_text())["identity"]
    assert saved["images"] == 6 and saved["processes"] == 1 and saved["rank"] == 4
    assert run.identity.__doc__

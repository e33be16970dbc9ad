"""The test script: restoring files and scoring on clean ones, with a tiny random model."""

import csv
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image, ImageCms
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

import test_deg_lora_flux_kontext as script
from my_dataset.dataset_deg_paired import to_tensor
from my_dataset.outputs import plan_outputs
from my_dataset.scored_pairs import crop_boxes
from scripts.make_tiny_kontext import load_sample
from tests.conftest import photograph
from tests.test_metrics import write_backbone
from utils import flux, lora, metrics, restore, score, session, speed
from utils.parse import run_main

ORIENTATION, MAKE = 0x0112, 0x010F
IMAGE = photograph(size=(32, 48))
pytestmark = pytest.mark.usefixtures("models_load_once")


@pytest.fixture
def call(tiny_model, tmp_path, capsys):
    """call(*flags) runs the script in this process, 2 steps, and returns (exit code, stdout, stderr)."""

    def run(*flags, model=tiny_model, steps=2, output=tmp_path / "out"):
        argv = ["--pretrained_model_name_or_path", model, "--output", str(output), "--max_sequence_length", "16"]
        argv += ["--num_inference_steps", str(steps)] if steps else []
        with pytest.raises(SystemExit) as exit_:
            run_main(lambda: script.main(script.parse_args([*argv, *map(str, flags)])))
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run


def write(path, array=IMAGE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def sidecar(path):
    return json.loads(Path(f"{path}.json").read_text())


def refused(result, *words):
    """The run ended with exit code 2 and one line on stderr that holds every one of `words`."""
    code, _, err = result
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and "Traceback" not in err and len(errors) == 1, err
    assert all(word in errors[0] for word in words), errors[0]


# ---- restoring ----


def test_any_size_comes_out_at_exactly_that_size(call, tiny_lora, tmp_path):
    sizes = [(37, 51), (5, 5), (1, 1), (16, 136)]
    for height, width in sizes:
        write(tmp_path / "in" / f"{height}.png", photograph(size=(height, width)))
    assert call("--lora", tiny_lora, "--input", tmp_path / "in")[0] == 0
    for height, width in sizes:
        assert read(tmp_path / "out" / f"{height}.png").shape == (height, width, 3)


def test_start_noise_1_equals_stock_kontext_in_pixels(call, tiny_model, tmp_path, monkeypatch):
    from diffusers import FluxKontextPipeline

    seen = []
    restore = session.restore_tiled
    monkeypatch.setattr(session, "restore_tiled", lambda *args: seen.append(restore(*args)) or seen[-1])
    path = write(tmp_path / "a.png")
    flags = ["--prompt", "mend it", "--guidance_scale", "3.5", "--seed", "7", "--dtype", "fp32", "--device", "cpu"]
    assert call("--input", path, *flags, steps=3)[0] == 0

    stock = FluxKontextPipeline.from_pretrained(tiny_model)
    stock.set_progress_bar_config(disable=True)
    expected = stock(image=Image.open(path), prompt="mend it", guidance_scale=3.5, num_inference_steps=3, height=32,
                     width=48, max_area=32 * 48, _auto_resize=False, max_sequence_length=16, output_type="pt",
                     generator=torch.Generator().manual_seed(7)).images[0]
    assert (seen[0][0] - (expected * 2 - 1)).abs().max() < 1e-5
    assert (read(tmp_path / "out" / "a.png") == (expected * 255).round().byte().movedim(0, -1).numpy()).all()
    flipped = call("--input", path, *flags, "--seed", "8", output=tmp_path / "other", steps=3)
    assert flipped[0] == 0 and (read(tmp_path / "out" / "a.png") != read(tmp_path / "other" / "a.png")).any()


def test_lora_switches_on_and_off_and_weight_0_is_off(call, tiny_lora, tiny_model, tmp_path):
    path = write(tmp_path / "a.png")
    # without settings in its file the LoRA is sampled as stock Kontext is, as the base model alone is
    bare = tmp_path / "bare.safetensors"
    with safe_open(lora.find_file(tiny_lora), "pt") as file:
        header = {key: value for key, value in file.metadata().items() if key != lora.SETTINGS_KEY}
    save_file(load_file(lora.find_file(tiny_lora)), bare, metadata=header)
    runs = {"base": [], "on": ["--lora", bare], "off": ["--lora", bare, "--lora_weight", 0],
            "half": ["--lora", bare, "--lora_weight", 0.5]}
    for name, flags in runs.items():
        code, _, err = call("--input", path, *flags, output=tmp_path / name)
        assert code == 0 and ("holds no sampling settings" in err) == (name != "base")
    base, on, off, half = (read(tmp_path / name / "a.png").astype(int) for name in runs)
    assert (base == off).all()
    assert (base != on).any() and (on != half).any() and (base != half).any()
    assert sidecar(tmp_path / "half" / "a.png")["lora"]["weight"] == 0.5


def test_settings_of_the_lora_file_are_followed_and_overridden(call, tiny_lora, tmp_path):
    path = write(tmp_path / "a.png")
    assert call("--lora", tiny_lora, "--input", path, steps=None)[0] == 0
    described = sidecar(tmp_path / "out" / "a.png")
    assert (described["steps"], described["sampled_start_noise"]) == (4, 0.5)
    assert described["settings"]["guidance_scale"] == 1.0 and described["settings"]["vae_encode_mode"] == "mode"
    pixels = read(tmp_path / "out" / "a.png")
    for flags in (["--guidance_scale", 4], ["--prompt", "another"], ["--vae_encode_mode", "sample"], ["--seed", 1],
                  ["--num_inference_steps", 3], ["--max_sequence_length", 8]):
        assert call("--lora", tiny_lora, "--input", path, *flags, steps=None)[0] == 0
        assert (read(tmp_path / "out" / "a.png") != pixels).any(), flags


def test_base_model_runs_28_steps_and_another_base_is_warned_about(call, tiny_model, tiny_lora, tmp_path):
    path = write(tmp_path / "a.png", photograph(size=(16, 16)))
    assert call("--input", path, steps=None)[0] == 0
    assert sidecar(tmp_path / "out" / "a.png")["steps"] == 28
    copy = tmp_path / "renamed"
    copy.symlink_to(tiny_model)
    code, _, err = call("--input", path, "--lora", tiny_lora, model=str(copy))
    assert code == 0 and "was trained on" in err


def with_settings(folder, source, **changes):
    """A copy of a LoRA file with other settings."""
    file = lora.find_file(source)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    header[lora.SETTINGS_KEY] = json.dumps(json.loads(header[lora.SETTINGS_KEY]) | changes)
    folder.mkdir()
    save_file(load_file(file), folder / lora.LORA_FILE, metadata=header)
    return folder


def test_sampling_outside_what_was_trained_is_refused(call, tiny_lora, tmp_path):
    path = write(tmp_path / "a.png")
    refused(call("--lora", tiny_lora, "--input", path, "--start_noise", 0.9), "--start_noise 0.9", "0.5 to 0.5")
    refused(call("--input", path, "--start_noise", 0.5), "--start_noise 0.5")
    listed = with_settings(tmp_path / "listed", tiny_lora, train_sigmas=[1.0, 0.5], start_noise=[0.25, 0.75])
    refused(call("--lora", listed, "--input", path, steps=4), "--num_inference_steps 4", "use one of [1, 2]")
    assert call("--lora", listed, "--input", path, "--start_noise", 0.3, steps=None)[0] == 0
    described = sidecar(tmp_path / "out" / "a.png")
    assert (described["steps"], described["sampled_start_noise"]) == (2, 0.3)


def test_fidelity_is_the_start_noise_within_the_trained_range(call, tiny_lora, tmp_path):
    path = write(tmp_path / "a.png")
    ranged = with_settings(tmp_path / "ranged", tiny_lora, start_noise=[0.25, 0.75])
    pixels = []
    for fidelity, start_noise in ((1, 0.25), (0, 0.75), (0.75, 0.375)):
        assert call("--lora", ranged, "--input", path, "--fidelity", fidelity)[0] == 0
        assert sidecar(tmp_path / "out" / "a.png")["sampled_start_noise"] == start_noise
        pixels.append(read(tmp_path / "out" / "a.png"))
        assert call("--lora", ranged, "--input", path, "--start_noise", start_noise, output=tmp_path / "k")[0] == 0
        assert (read(tmp_path / "k" / "a.png") == pixels[-1]).all()
    assert (pixels[0] != pixels[1]).any()
    refused(call("--lora", tiny_lora, "--input", path, "--fidelity", 0.5), "start noise 0.5 alone", "--lora_weight")


def test_large_images_are_restored_in_tiles_of_the_trained_size(call, tiny_lora, tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", photograph(size=(70, 100)))
    trained = with_settings(tmp_path / "trained", tiny_lora, resolution=48)
    sizes = []
    decode = flux.decode
    monkeypatch.setattr(flux, "decode", lambda vae, z: sizes.append((len(z), *z.shape[2:])) or decode(vae, z))
    results, used = {}, {}
    for name, flags in {"auto": [], "48": ["--tile", 48], "batch": ["--tile", 48, "--tile_batch", 4],
                        "32": ["--tile", 32, "--tile_overlap", 16], "whole": ["--tile", 0],
                        "shifted": ["--tile", 48, "--token_shifts", 2]}.items():
        sizes.clear()
        assert call("--lora", trained, "--input", path, *flags, output=tmp_path / name)[0] == 0
        results[name] = list(sizes), read(tmp_path / name / "a.png").astype(int)
        used[name] = tuple(sidecar(tmp_path / name / "a.png")["tiles_used"].values())
    assert results["auto"][0] == [(1, 6, 6)] * 6 and results["batch"][0] == [(4, 6, 6), (2, 6, 6)]  # 2 x 3 tiles
    assert results["32"][0] == [(1, 4, 4)] * 24 and results["whole"][0] == [(1, 10, 14)]
    assert results["shifted"][0] == [(1, 6, 6)] * 12 and (results["shifted"][1] != results["48"][1]).any()
    assert (results["auto"][1] == results["48"][1]).all()
    assert abs(results["batch"][1] - results["48"][1]).max() <= 1
    assert (results["auto"][1] != results["whole"][1]).any() and (results["auto"][1] != results["32"][1]).any()
    assert all(pixels.shape == (70, 100, 3) for _, pixels in results.values())
    assert used == {"auto": (48, 0), "48": (48, 0), "batch": (48, 0), "32": (32, 16), "whole": (0, 0),
                    "shifted": (48, 0)}
    assert sidecar(tmp_path / "shifted" / "a.png")["token_shifts"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(script, "load_models", None)  # the tiles that auto came to do not make it another job
        assert "1 already there" in call("--lora", trained, "--input", path, output=tmp_path / "auto")[1]


def test_colour_fix_changes_the_colours_and_is_recorded(call, tmp_path):
    path = write(tmp_path / "a.png")
    assert call("--input", path)[0] == 0
    plain = read(tmp_path / "out" / "a.png").astype(float)
    assert sidecar(tmp_path / "out" / "a.png")["color_fix"] == "off"
    for mode in ("wavelet", "adain"):
        assert "1 restored" in call("--input", path, "--color_fix", mode)[1]
        assert sidecar(tmp_path / "out" / "a.png")["color_fix"] == mode
        error = np.abs(read(tmp_path / "out" / "a.png").mean((0, 1)) - IMAGE.mean((0, 1))).max()
        assert error < 0.5 * np.abs(plain.mean((0, 1)) - IMAGE.mean((0, 1))).max()


@pytest.mark.parametrize("flags, is_merged", [
    (["--input", "x"], True), (["--input", "x", "--no-merge_lora"], False), (["--clean", "x"], False),
    (["--clean", "x", "--no-base_row"], True), (["--clean", "x", "--no-base_row", "--no-merge_lora"], False)])
def test_the_lora_is_merged_wherever_it_is_never_switched_off(tiny_lora, tiny_model, tmp_path, flags, is_merged):
    from peft.tuners.lora import LoraLayer

    args = script.parse_args(["--pretrained_model_name_or_path", tiny_model, "--output", str(tmp_path), "--lora",
                              tiny_lora, *flags])
    settings, steps, start_noise = script.resolve_settings(args)
    pipe, text = script.load_models(args, settings, torch.device("cpu"), torch.float32)
    assert any(isinstance(module, LoraLayer) for module in pipe.transformer.modules()) == (not is_merged)
    assert script.describe_run(args, settings, steps, start_noise, torch.float32)["lora"]["merged"] == is_merged
    image = to_tensor(IMAGE)[None]
    restored = script.restore_image(pipe, image, text, settings, steps, 5, start_noise)[0]
    plain = flux.load_models(tiny_model, "cpu", torch.float32)
    lora.load(plain, tiny_lora)
    torch.testing.assert_close(restored, restore.restore(plain, image, text, settings, steps, [5], start_noise),
                               rtol=0, atol=1e-5)


@pytest.mark.parametrize("flags", [["--compile"], ["--compile", "--no-merge_lora"],
                                   ["--attention_backend", "_native_flash"]], ids=" ".join)
def test_compilation_and_another_attention_kernel_restore_the_same_image(tiny_lora, tiny_model, tmp_path, monkeypatch,
                                                                         flags):
    monkeypatch.setattr(speed, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    restored = []
    for more in ([], flags):
        args = script.parse_args(["--pretrained_model_name_or_path", tiny_model, "--output", str(tmp_path), "--input",
                                  "x", "--lora", tiny_lora, *more])
        settings, steps, start_noise = script.resolve_settings(args)
        pipe, text = script.load_models(args, settings, torch.device("cpu"), torch.float32)
        restored.append(script.restore_image(pipe, to_tensor(IMAGE)[None], text, settings, steps, 5, start_noise)[0])
    torch.testing.assert_close(*restored, rtol=0, atol=1e-5)
    if "--no-merge_lora" in flags:  # switching the LoRA off is seen by what was compiled with it
        with script.without_lora(pipe, True):
            base = script.restore_image(pipe, to_tensor(IMAGE)[None], text, settings, steps, 5, start_noise)[0]
        plain = flux.load_models(tiny_model, "cpu", torch.float32)
        expected = restore.restore(plain, to_tensor(IMAGE)[None], text, settings, steps, [5], start_noise)
        torch.testing.assert_close(base, expected, rtol=0, atol=1e-5)
        assert (base - restored[0]).abs().max() > 1e-3
    assert (counters["stats"]["unique_graphs"] >= 2) == ("--compile" in flags)  # both kinds of blocks
    backends = {module.processor._attention_backend for module in pipe.transformer.modules()
                if hasattr(module, "processor")}
    assert ({backend and backend.value for backend in backends} == {"_native_flash"}) == ("--compile" not in flags)
    torch._dynamo.reset()


def test_an_attention_kernel_for_cuda_is_refused_on_a_cpu(call, tmp_path):
    refused(call("--input", write(tmp_path / "a.png"), "--device", "cpu", "--attention_backend", "_flash_3"),
            "--attention_backend _flash_3 needs a CUDA device")


def test_an_attention_kernel_that_is_not_installed_ends_in_one_line(tiny_model, tmp_path, monkeypatch):
    args = script.parse_args(["--pretrained_model_name_or_path", tiny_model, "--output", str(tmp_path), "--input", "x"])
    settings = script.resolve_settings(args)[0]

    def missing(backend):
        raise RuntimeError(f"{backend} is not usable because of a missing package.")

    args.attention_backend = "_native_flash"
    monkeypatch.setattr(FluxTransformer2DModel, "set_attention_backend", lambda self, backend: missing(backend))
    with pytest.raises(ValueError, match="--attention_backend _native_flash: .*missing package. Or leave it out"):
        script.load_models(args, settings, torch.device("cpu"), torch.float32)


def spoil(tensors, how):
    """A LoRA's tensors with one fault."""
    first = next(name for name in sorted(tensors) if ".lora_A." in name)
    return {
        "foreign": {name.replace("transformer_blocks", "blocks"): value for name, value in tensors.items()},
        "NaN": tensors | {first: torch.full_like(tensors[first], float("nan"))},
        "partner": {name: value for name, value in tensors.items() if name != first},
        "shapes": tensors | {first: torch.zeros(4, 7)},
        "alpha": tensors | {"transformer.x_embedder.alpha": torch.ones(())},
    }[how]


@pytest.mark.parametrize("how, word", [("foreign", "does not belong"), ("NaN", "NaN"), ("partner", "partner"),
                                       ("shapes", "shapes"), ("alpha", "alpha twice")])
def test_faulty_lora_files_end_in_one_line_before_a_model_loads(call, tiny_lora, tmp_path, monkeypatch, how, word):
    monkeypatch.setattr(flux, "encode_prompts", None)  # loading would be a TypeError
    monkeypatch.setattr(flux, "load_models", None)
    file = lora.find_file(tiny_lora)
    with safe_open(file, "pt") as opened:
        save_file(spoil(load_file(file), how), tmp_path / "faulty.safetensors", metadata=opened.metadata())
    path = write(tmp_path / "a.png")
    refused(call("--lora", tmp_path / "faulty.safetensors", "--input", path), "faulty.safetensors", word)
    assert not (tmp_path / "out" / "a.png").exists()


def test_damaged_settings_of_a_merged_model_are_named(call, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "merged")
    (tmp_path / "merged" / session.SETTINGS_FILE).write_text("{")
    path = write(tmp_path / "a.png")
    refused(call("--input", path, model=str(tmp_path / "merged")), session.SETTINGS_FILE, "is not JSON")


def test_lora_files_that_are_none_are_refused_before_a_model_loads(call, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "load_models", None)  # loading would be a TypeError
    path = write(tmp_path / "a.png")
    torch.save({}, tmp_path / "lora.bin")
    refused(call("--lora", tmp_path / "lora.bin", "--input", path), "lora.bin", "pickle")
    (tmp_path / "pickle.safetensors").write_bytes((tmp_path / "lora.bin").read_bytes())
    refused(call("--lora", tmp_path / "pickle.safetensors", "--input", path), "not a complete safetensors file")
    refused(call("--lora", tmp_path, "--input", path), "no such LoRA file")


@pytest.mark.parametrize("flags, words", [
    ([], ["--input", "--clean"]),
    (["--input", "a", "--clean", "b"], ["--input", "--clean"]),
    (["--degraded", "a", "--input", "b"], ["--degraded needs --clean"]),
    (["--input", "nowhere"], ["nowhere", "no such file"]),
    (["--input", "a", "--num_images", "0"], ["--num_images 0"]),
    (["--input", "a", "--seed", "-1"], ["--seed -1"]),
    (["--input", "a", "--max_sequence_length", "513"], ["--max_sequence_length 513"]),
    (["--input", "a", "--guidance_scale", "nan"], ["--guidance_scale nan"]),
    (["--input", "a", "--suffix", "x/y"], ["--suffix x/y"]),
    (["--input", "a", "--tile", "big"], ["--tile big", "auto"]),
    (["--input", "a", "--tile", "-64"], ["--tile -64"]),
    (["--input", "a", "--tile", "64", "--tile_overlap", "33"], ["--tile_overlap 33", "half of --tile 64"]),
    (["--input", "a", "--tile_overlap", "-1"], ["--tile_overlap -1"]),
    (["--input", "a", "--tile_batch", "0"], ["--tile_batch 0"]),
    (["--input", "a", "--fidelity", "1.5"], ["--fidelity 1.5", "0 to 1"]),
    (["--input", "a", "--fidelity", "nan"], ["--fidelity nan"]),
    (["--input", "a", "--fidelity", "0.5", "--start_noise", "0.5"], ["--fidelity 0.5", "--start_noise"]),
    (["--input", "a", "--fidelity", "0.5"], ["--fidelity 0.5", "--lora_weight"]),
    (["--input", "a", "--device", "cuda"], ["--device cuda", "--device cpu"]),
    (["--input", "a", "--dtype", "bf16"], ["--dtype bf16", "fp32"]),
    (["--clean", "a", "--merge_lora"], ["--merge_lora", "--no-base_row"]),
    (["--clean", "a", "--metrics", "fid"], ["--metrics 'fid'"]),
    (["--clean", "a", "--metrics", "lpips"], ["alexnet-owt-7be5be79.pth", "--lpips_backbone"]),
    (["--clean", "nowhere"], ["nowhere"]),
    (["--clean", "a", "--max_images", "0"], ["--max_images 0"]),
    (["--clean", "a", "--degradation_preset", "heavy", "--damage_strength", "1"], ["drop --damage_strength"]),
])
def test_bad_flags_end_in_one_line(call, monkeypatch, tmp_path, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    refused(call(*flags), *words)


def test_an_output_that_is_a_file_and_a_model_that_is_none_are_refused(call, tmp_path):
    path = write(tmp_path / "a.png")
    refused(call("--input", path, output=path), "--output", "is a file")
    refused(call("--input", path, model=str(tmp_path)), "model_index.json")


def test_a_foreign_file_in_the_output_folder_is_never_written_over(call, tmp_path):
    path = write(tmp_path / "in" / "a.png")
    foreign = write(tmp_path / "out" / "a.png", 255 - IMAGE)
    before = foreign.read_bytes()
    for flags in ((), ("--no-skip_existing",)):
        refused(call("--input", path, *flags), "a.png would be written over", "another --output")
    assert foreign.read_bytes() == before


def test_what_is_done_is_skipped_and_reported_under_another_limit_of_pixels(call, tmp_path):
    path = write(tmp_path / "in" / "a.png")
    assert call("--input", path)[0] == 0
    (tmp_path / "out" / "report.html").unlink()
    code, out, _ = call("--input", path, "--max_pixels", 10)
    assert code == 0 and "0 restored, 1 already there, 0 failed" in out and (tmp_path / "out" / "report.html").is_file()


def test_folders_are_mirrored_and_foreign_files_ignored(call, tmp_path):
    for name in ("top.png", "sub/Ünïcode 🙂 name.png", f"sub/deep/{'long' * 50}.png"):
        write(tmp_path / "in" / name, photograph(size=(16, 16)))
    for name in ("Thumbs.db", ".DS_Store", ".hidden.png", "notes.txt"):
        (tmp_path / "in" / name).write_bytes(b"junk")
    code, out, _ = call("--input", tmp_path / "in", "--suffix", "_mended", "--ext", "webp", steps=1)
    assert code == 0 and "3 restored" in out
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.webp")}
    assert written == {"top_mended.webp", "sub/Ünïcode 🙂 name_mended.webp", f"sub/deep/{'long' * 50}_mended.webp"}
    assert all(Image.open(tmp_path / "out" / name).format == "WEBP" for name in written)
    assert len(list((tmp_path / "out").rglob("*.json"))) == 3


def test_what_is_done_is_skipped_without_loading_and_redone_when_anything_changes(call, tiny_lora, tmp_path,
                                                                                  monkeypatch):
    path, output = write(tmp_path / "in" / "a.png"), tmp_path / "out" / "a.png"
    flags = ["--lora", tiny_lora, "--input", tmp_path / "in"]
    assert call(*flags)[0] == 0
    written = output.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(script, "load_models", None)
        assert "0 restored, 1 already there" in call(*flags)[1]
    assert output.stat().st_mtime_ns == written

    def redone(*more):
        return "1 restored, 0 already there" in call(*flags, *more)[1]

    assert redone("--no-skip_existing") and redone("--seed", 3) and redone("--lora_weight", 0.5) and redone()
    assert redone("--tile", 32) and redone("--color_fix", "wavelet") and redone()
    write(path, IMAGE[::-1])
    assert redone() and not redone()
    output.write_bytes(output.read_bytes()[:200])
    assert redone() and not redone()
    Path(f"{output}.json").write_text("[]")
    assert redone() and not redone()


def test_a_failing_file_is_listed_and_the_others_are_done(call, tmp_path):
    write(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "empty.png").touch()
    (tmp_path / "in" / "cut.jpg").write_bytes(write(tmp_path / "whole.jpg").read_bytes()[:500])
    write(tmp_path / "in" / "large.png", photograph(size=(50, 50)))
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    code, out, err = call("--input", tmp_path / "in", "--max_pixels", 2000)
    assert code == 1 and "1 restored, 0 already there, 4 failed" in out
    failures = {Path(failure["input"]).name: failure["reason"]
                for failure in json.loads((tmp_path / "out" / "failures.json").read_text())}
    assert failures.keys() == {"empty.png", "cut.jpg", "large.png", "gone.png"}
    assert "--max_pixels" in failures["large.png"] and err.count("failed: ") == 4
    assert (tmp_path / "out" / "good.png").exists() and not (tmp_path / "out" / "empty.png").exists()
    for name in failures:
        (tmp_path / "in" / name).unlink()
    assert call("--input", tmp_path / "in")[0] == 0 and not (tmp_path / "out" / "failures.json").exists()


def test_gpu_out_of_memory_and_nan_are_failures_with_a_cure(call, tiny_lora, tmp_path, monkeypatch):
    path = write(tmp_path / "a.png")
    code, _, err = call("--lora", tiny_lora, "--input", path, "--lora_weight", 1e30)
    assert code == 1 and "NaN" in err and "--lora_weight" in err and not (tmp_path / "out" / "a.png").exists()

    def exhaust(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(session, "restore_tiled", exhaust)
    code, _, err = call("--input", path)
    assert code == 1 and "48x32 px: out of GPU memory; use --dtype bf16" in err
    monkeypatch.setattr(flux, "load_models", exhaust)
    refused(call("--input", path), "out of GPU memory")


def test_gpu_out_of_memory_is_met_with_smaller_tiles(call, tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", photograph(size=(40, 600)))
    restore_padded, too_large = restore.restore_padded, []

    def restore_small(pipe, control, *rest):
        if control.shape[-1] > 300:
            too_large.append(control.shape[-1])
            raise torch.OutOfMemoryError("CUDA out of memory")
        return restore_padded(pipe, control, *rest)

    monkeypatch.setattr("utils.tiles.restore_padded", restore_small)
    code, _, err = call("--input", path, steps=1)
    assert code == 0 and too_large == [608] and read(tmp_path / "out" / "a.png").shape == (40, 600, 3)
    assert "warning: 600x40 px: out of GPU memory; trying again with single tiles of 288 px" in err
    pixels, used = read(tmp_path / "out" / "a.png"), sidecar(tmp_path / "out" / "a.png")["tiles_used"]
    assert call("--input", path, *(f"--{name}={value}" for name, value in used.items()), steps=1)[0] == 0
    assert used == {"tile": 288, "tile_overlap": 64} and len(too_large) == 1  # as before, without running out
    assert (read(tmp_path / "out" / "a.png") == pixels).all()


def test_orientation_is_applied_once_and_icc_and_alpha_are_kept(call, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKE] = 6, "camera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write(tmp_path / "in" / "turned.jpg", exif=exif, icc_profile=profile)
    alpha = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (32, 1))
    write(tmp_path / "in" / "clear.png", np.dstack([IMAGE, alpha]))
    assert call("--input", tmp_path / "in")[0] == 0
    turned = Image.open(tmp_path / "out" / "turned.jpg")
    assert turned.size == (32, 48) and turned.getexif()[ORIENTATION] == 1 and turned.getexif()[MAKE] == "camera"
    assert turned.info["icc_profile"] == profile
    clear = Image.open(tmp_path / "out" / "clear.png")
    assert clear.mode == "RGBA" and (np.asarray(clear)[..., 3] == alpha).all()
    assert call("--input", tmp_path / "in", "--ext", "jpg", output=tmp_path / "jpg")[0] == 0
    assert Image.open(tmp_path / "jpg" / "clear.jpg").mode == "RGB"


def test_no_output_replaces_an_input_or_another_output(call, tmp_path):
    for name in ("a.png", "a.jpg", "b.png", "c.gif"):
        write(tmp_path / "in" / name, photograph(size=(16, 16)))
    folder = tmp_path / "in"

    def names(*args, **kwargs):
        return [path.name for _, _, path in plan_outputs(*args, **kwargs)]

    assert names(folder, tmp_path / "out") == ["a.jpg", "a.png", "b.png", "c.png"]
    assert call("--input", folder, "--ext", "png", steps=1)[0] == 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"a.jpg.png", "a.png.png", "b.png", "c.png"}
    write(folder / "a.jpg.gif", photograph(size=(16, 16)))
    refused(call("--input", folder, "--ext", "png"), "would replace", "a.jpg.png")
    refused(call("--input", folder, output=folder), "--output", "is --input itself")
    refused(call("--input", folder / "b.png", output=folder), "would replace", "b.png")
    write(folder / "b_0.png", photograph(size=(16, 16)))
    assert call("--input", folder / "b.png", "--num_images", 2, "--suffix", "_x", output=folder, steps=1)[0] == 0
    assert (folder / "b_x_0.png").exists() and (folder / "b_x_1.png").exists()
    refused(call("--input", folder / "b.png", output=folder / "b.png"), "is a file")


def test_a_restorer_gives_from_python_what_the_script_writes(call, tiny_model, tiny_lora, tmp_path):
    path = write(tmp_path / "in" / "a.png")
    assert call("--lora", tiny_lora, "--input", path, "--color_fix", "adain", "--seed", 3)[0] == 0
    restored = session.Restorer(tiny_model, tiny_lora, max_sequence_length=16, num_inference_steps=2, seed=3,
                                color_fix="adain")
    assert np.array_equal(np.asarray(restored(Image.open(path))), read(tmp_path / "out" / "a.png"))
    with pytest.raises(ValueError, match="sed is no option"):
        session.Restorer(tiny_model, tiny_lora, sed=1)
    for options, message in (({"fidelity": 2}, "--fidelity 2"), ({"color_fix": "wavelett"}, "color_fix: .*'wavelett'"),
                             ({"dtype": "fp16"}, "dtype: .*'fp16'"), ({"num_inference_steps": 1.5}, "num_inference"),
                             ({"seed": 2**63}, "--seed .*less than"), ({"compile": "no"}, "compile: ignored explicit")):
        with pytest.raises(ValueError, match=message):
            session.Restorer(tiny_model, tiny_lora, **options)
    same = session.Restorer(tiny_model, tiny_lora, max_sequence_length="16", num_inference_steps=2, seed=3, tile=64,
                            merge_lora=False, prompt=None)
    assert same(Image.open(path)).size == Image.open(path).size


def test_outputs_inside_the_input_folder_are_not_restored_again(call, tmp_path):
    write(tmp_path / "a.png")
    for expected in ("1 restored, 0 already", "0 restored, 1 already"):
        assert expected in call("--input", tmp_path)[1]
    refused(call("--input", tmp_path / "out", output=tmp_path), "--output")


def test_num_images_restores_with_successive_seeds(call, tmp_path):
    path = write(tmp_path / "a.png")
    assert call("--input", path, "--num_images", 2, "--seed", 4)[0] == 0
    assert call("--input", path, "--seed", 5, output=tmp_path / "single")[0] == 0
    assert (read(tmp_path / "out" / "a_1.png") == read(tmp_path / "single" / "a.png")).all()
    assert (read(tmp_path / "out" / "a_1.png") != read(tmp_path / "out" / "a_0.png")).any()
    assert [sidecar(tmp_path / "out" / f"a_{i}.png")["seed"] for i in range(2)] == [4, 5]


# ---- scoring ----


def read_scores(folder):
    with open(folder / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    return rows, json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)


MEASURED = ("psnr", "psnr_y", "shift_px", "scale")  # with --metrics psnr
SCORING = ["--degradation_types", "noise", "--noise_level", "0.1"]
MODEL_ROWS_ONLY = ["--no-base_row", "--no-nlm_row", "--no-bilateral_row"]


def test_scores_hold_every_row_with_intervals_and_files(call, tiny_lora, photos, tmp_path):
    code, out, _ = call("--lora", tiny_lora, "--clean", photos / "heldout", *SCORING, "--grid_images", 1,
                        "--metrics", "psnr,ssim")
    assert code == 0
    rows, report = read_scores(tmp_path / "out")
    assert [row["row"] for row in rows[:7]] == ["input", "input_vae", "nlm", "bilateral", "base", "lora",
                                             "ceiling"]
    assert len(rows) == 14 and report["images"] == 2 and report["failed"] == 0
    for row, values in report["rows"].items():
        for name in (*MEASURED, "ssim", "ssim_y"):
            mean = np.mean([float(line[name]) for line in rows if line["row"] == row])
            assert values[name]["mean"] == pytest.approx(mean)
            assert values[name]["lo"] <= values[name]["mean"] <= values[name]["hi"]
            assert f"{values[name]['mean']:.{2 if name.startswith('psnr') else 4}f} [" in out
    gain = report["lora_minus"]["input"]["psnr"]["mean"]
    assert gain == pytest.approx(report["rows"]["lora"]["psnr"]["mean"] - report["rows"]["input"]["psnr"]["mean"])
    assert "n = 2 images" in out and "fewer than 10 images" in out and str(tmp_path / "out") in out
    assert report["definitions"].keys() == {*MEASURED, "ssim", "ssim_y"} and report["versions"]["torch"]
    labels = {f"non-local means (h={h}, best on this set)" for h in script.NLM_STRENGTHS}
    assert report["rows"]["nlm"]["label"] in labels
    assert "bilateral filter (color=" in report["rows"]["bilateral"]["label"]
    assert report["degradations"][0]["degradation"][0]["level"] == 0.1
    assert Image.open(tmp_path / "out" / "grid.png").size[0] == 4 + 5 * 260
    # sigma 0.1 on [0, 1] is 20 dB, a little better for clipping
    assert 19.9 < report["rows"]["input"]["psnr"]["mean"] < 21


def test_scored_rows_are_the_images_that_they_say(tiny_lora, tiny_model, photos, tmp_path):
    args = script.parse_args(["--pretrained_model_name_or_path", tiny_model, "--output", str(tmp_path), "--clean", "x",
                              "--lora", tiny_lora])
    settings, steps, start_noise = script.resolve_settings(args)
    pipe, text = script.load_models(args, settings, torch.device("cpu"), torch.float32)
    target, control = (to_tensor(image)[None] for image in (IMAGE, IMAGE[::-1]))

    def make_rows():
        made = script.make_rows(args, pipe, text, settings, 2, start_noise, target, control, 5)
        return {row: image for row, image, _ in made}

    rows, again = make_rows(), make_rows()
    assert all(torch.equal(rows[row], again[row]) for row in rows)  # switching the LoRA off and on leaves no trace
    args.lora = None
    bare, _ = script.load_models(args, settings, torch.device("cpu"), torch.float32)
    stock = script.STOCK_SETTINGS | {"guidance_scale": settings["guidance_scale"]}
    assert torch.equal(rows["base"], restore.restore(bare, control, text, stock, 2, [5], 1.0))
    assert torch.equal(rows["lora"], restore.restore(pipe, control, text, settings, 2, [5], 0.5))
    assert torch.equal(rows["ceiling"], restore.round_trip(bare.vae, target))
    assert torch.equal(rows["input_vae"], restore.round_trip(bare.vae, control))
    assert not torch.equal(rows["base"], rows["lora"])


def test_an_error_of_the_base_model_leaves_the_lora_on_for_the_next_image(tiny_lora, tiny_model, tmp_path):
    args = script.parse_args(["--pretrained_model_name_or_path", tiny_model, "--output", str(tmp_path), "--input", "x",
                              "--lora", tiny_lora, "--no-merge_lora"])
    settings, steps, start_noise = script.resolve_settings(args)
    pipe, text = script.load_models(args, settings, torch.device("cpu"), torch.float32)
    image = to_tensor(IMAGE)[None]
    expected = script.restore_image(pipe, image, text, settings, steps, 5, start_noise)[0]
    with pytest.raises(ValueError, match="NaN"), script.without_lora(pipe, True):
        assert not torch.equal(script.restore_image(pipe, image, text, settings, steps, 5, start_noise)[0], expected)
        raise ValueError("NaN or infinity")
    assert torch.equal(script.restore_image(pipe, image, text, settings, steps, 5, start_noise)[0], expected)


def test_whole_images_are_scored_in_tiles_with_the_colour_fix(call, tiny_lora, photos, tmp_path):
    flags = ["--lora", with_settings(tmp_path / "trained", tiny_lora, resolution=32), "--clean", photos / "heldout",
             *SCORING, "--max_images", 1, "--no-nlm_row", "--no-bilateral_row", "--metrics", "psnr"]
    rows = {}
    for name, more in {"auto": [], "32": ["--tile", 32], "whole": ["--tile", 0], "adain": ["--color_fix", "adain"],
                       "crop": ["--crop_px", 32], "crop whole": ["--crop_px", 32, "--tile", 0]}.items():
        assert call(*flags, *more, output=tmp_path / name)[0] == 0
        rows[name] = {row["row"]: row["psnr"] for row in read_scores(tmp_path / name)[0]}
    assert rows["auto"] == rows["32"] and rows["crop"] == rows["crop whole"]
    assert all(rows["auto"][row] != rows["whole"][row] for row in ("base", "lora", "ceiling", "input_vae"))
    assert {row for row in rows["auto"] if rows["auto"][row] != rows["adain"][row]} == {"base", "lora"}
    report = read_scores(tmp_path / "adain")[1]
    run, [crop] = report["run"], report["degradations"]
    assert (run["tile"], run["tile_overlap"], run["color_fix"]) == ("auto", None, "adain")
    model_rows = "input_vae", "base", "lora", "ceiling"
    assert crop["tiles_used"] == dict.fromkeys(model_rows, {"tile": 32, "tile_overlap": 0})  # tokens of 16 px
    [crop] = read_scores(tmp_path / "crop")[1]["degradations"]
    assert crop["tiles_used"] == dict.fromkeys(model_rows, {"tile": 0, "tile_overlap": 0})


def test_non_local_means_beats_opencvs_coloured_variant_by_more_than_1_db():
    clean = load_sample("skimage coffee")[100:228, 200:328]
    noisy = (clean + np.random.default_rng(0).normal(0, 25, clean.shape)).clip(0, 255).round().astype(np.uint8)

    def best(denoise):
        return max(cv2.PSNR(clean, denoise(strength)) for strength in script.NLM_STRENGTHS)

    ours = best(lambda strength: script.denoise_nlm(noisy, strength))
    assert ours > 1 + best(lambda strength: cv2.fastNlMeansDenoisingColored(noisy, None, strength, strength, 7, 21))
    assert ours > 1 + best(lambda strength: cv2.GaussianBlur(noisy, (0, 0), strength / 10))


def test_non_local_means_lowers_noise_and_its_best_strength_is_kept():
    clean = np.full((40, 40, 3), 128, np.uint8)
    noisy = (clean + np.random.default_rng(0).normal(0, 10, clean.shape)).clip(0, 255).astype(np.uint8)
    assert script.denoise_nlm(noisy, 10).std() < 0.5 * noisy.std()
    colours = np.zeros((40, 40, 3), np.uint8) + np.array([200, 90, 30], np.uint8)
    assert abs(script.denoise_nlm(colours, 10).astype(int) - colours).max() <= 2  # red stays red
    trials = [{"image": "a", "crop": 0, "row": row, "psnr": psnr} for row, psnr in
              (("input", 20.0), ("nlm h=3", 22.0), ("nlm h=10", 25.0), ("nlm h=25", 21.0))]
    kept, strength = score.keep_best(trials, "nlm")
    assert strength == "h=10" and [(row["row"], row["psnr"]) for row in kept] == [("input", 20.0), ("nlm", 25.0)]
    worst_first = [{**trial, "lpips": trial["psnr"]} for trial in trials]
    for trial in worst_first:
        del trial["psnr"]
    assert score.keep_best(worst_first, "nlm")[1] == "h=25"
    assert score.keep_best(trials[:1], "nlm") == (trials[:1], None)


def test_crops_of_one_image_count_once_in_the_interval():
    scores = [{"image": image, "crop": crop, "row": "input", "psnr": psnr}
              for image, crops in (("a", [10.0, 20.0]), ("b", [30.0])) for crop, psnr in enumerate(crops)]
    assert score.summarise(scores)[0]["input"]["psnr"][0] == (15 + 30) / 2


def test_same_seed_scores_alike_and_rows_can_be_left_out(call, photos, tmp_path):
    flags = ["--clean", photos / "heldout", *SCORING, *MODEL_ROWS_ONLY, "--grid_images", 0, "--metrics",
             "psnr"]
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        assert call(*flags, "--seed", seed, output=tmp_path / name)[0] == 0
    one, two, three = (read_scores(tmp_path / name)[0] for name in ("one", "two", "three"))
    assert one == two and one != three
    assert {row["row"] for row in one} == {"input", "input_vae", "ceiling"}
    assert one[0].keys() == {"image", "crop", "row", *MEASURED}
    assert not (tmp_path / "one" / "grid.png").exists()
    ceilings = [[row["psnr"] for row in rows if row["row"] == "ceiling"] for rows in (one, three)]
    assert ceilings[0] == ceilings[1]


def test_images_are_chosen_evenly_and_cropped_in_a_centred_grid(call, photos, tmp_path):
    flags = ["--clean", photos / "train", *SCORING, *MODEL_ROWS_ONLY, "--metrics", "psnr"]
    assert call(*flags, "--max_images", 3, "--crop_px", 16, "--crops_per_image", 2)[0] == 0
    rows, report = read_scores(tmp_path / "out")
    assert [Path(row["image"]).stem for row in rows[::6]] == ["photo_0", "photo_2", "photo_5"]
    assert report["crops"] == 6 and report["images"] == 3
    seeds = {crop["degradation"][0]["seed"] for crop in report["degradations"]}
    assert len(seeds) == 6
    assert call(*flags, output=tmp_path / "all")[0] == 0
    every = {row["image"]: row for row in read_scores(tmp_path / "all")[1]["degradations"]}
    first_crops = [crop for crop in report["degradations"] if crop["crop"] == 0]
    assert all(every[crop["image"]]["degradation"] == crop["degradation"] for crop in first_crops)


def test_crop_boxes_do_not_overlap_and_are_centred():
    assert crop_boxes(48, 64, 0, 5) == [(0, 0, 48, 64)]
    assert crop_boxes(48, 64, 16, 1) == [(16, 24, 32, 40)]
    assert crop_boxes(48, 64, 32, 9) == [(8, 0, 40, 32), (8, 32, 40, 64)]
    boxes = crop_boxes(100, 70, 20, 7)
    covered = np.zeros((100, 70), int)
    for top, left, bottom, right in boxes:
        covered[top:bottom, left:right] += 1
    assert len(boxes) == 7 and covered.max() == 1 and covered.sum() == 7 * 400
    with pytest.raises(ValueError, match="70x100 px is smaller than --crop_px 128"):
        crop_boxes(100, 70, 128, 1)


def test_stored_pairs_are_scored_and_small_partners_enlarged(call, photos, tmp_path):
    for path in (photos / "heldout").iterdir():
        small = Image.open(path).resize((32, 24), Image.Resampling.BICUBIC)
        (tmp_path / "lr").mkdir(exist_ok=True)
        small.save(tmp_path / "lr" / f"{path.stem}x2.png")
    rest = [*MODEL_ROWS_ONLY, "--metrics", "psnr"]
    flags = ["--clean", photos / "heldout", "--degraded", tmp_path / "lr", *rest]
    assert call("--hr_root", photos / "heldout", "--lr_root", tmp_path / "lr", *rest)[0] == 0  # training's names
    rows, report = read_scores(tmp_path / "out")
    assert report["degradations"][0]["degradation"] is None
    name = Path(rows[0]["image"]).stem
    enlarged = Image.open(tmp_path / "lr" / f"{name}x2.png").resize((64, 48), Image.Resampling.BICUBIC)
    error = np.asarray(enlarged).astype(float) - read(rows[0]["image"])
    assert float(rows[0]["psnr"]) == pytest.approx(10 * np.log10(255**2 / (error**2).mean()), abs=1e-4)
    assert call(*flags, "--upscale_kernel", "nearest", output=tmp_path / "nearest")[0] == 0
    assert read_scores(tmp_path / "nearest")[0][0]["psnr"] != rows[0]["psnr"]
    (tmp_path / "lr" / f"{name}x2.png").unlink()
    refused(call(*flags), "no partner", name, "--allow_missing")
    code, _, err = call(*flags, "--allow_missing")
    assert code == 1 and "no partner" in err and read_scores(tmp_path / "out")[1]["images"] == 1


def test_images_that_cannot_be_scored_are_listed_and_none_at_all_is_an_error(call, photos, tmp_path):
    (tmp_path / "clean").mkdir()
    for path in (photos / "heldout").iterdir():
        (tmp_path / "clean" / path.name).write_bytes(path.read_bytes())
    write(tmp_path / "clean" / "a_small.png", photograph(size=(20, 20)))
    (tmp_path / "clean" / "text.png").write_text("no image")
    flags = ["--clean", tmp_path / "clean", *SCORING, *MODEL_ROWS_ONLY]
    code, _, err = call(*flags, "--crop_px", 48, "--metrics", "psnr")
    assert code == 1 and "20x20 px is smaller than --crop_px 48" in err and "text.png" in err
    report = read_scores(tmp_path / "out")[1]
    assert (report["images"], report["failed"]) == (2, 2)
    assert len(json.loads((tmp_path / "out" / "failures.json").read_text())) == 2
    refused(call(*flags, "--crop_px", 500), "not one image could be scored")


def test_lpips_is_scored_where_its_weights_are(call, photos, tmp_path):
    backbone, _ = write_backbone(tmp_path, "squeeze")
    flags = ["--clean", photos / "heldout", *SCORING, *MODEL_ROWS_ONLY, "--max_images", 1,
             "--lpips_backbone", backbone, "--lpips_net", "squeeze"]
    assert call(*flags)[0] == 0
    rows, report = read_scores(tmp_path / "out")
    assert rows[0].keys() == {"image", "crop", "row", *MEASURED, "ssim", "ssim_y", "lpips"}
    assert 0 < float(rows[0]["lpips"]) and report["lpips_net"] == "squeeze"
    assert call(*flags, "--metrics", "psnr", output=tmp_path / "psnr")[0] == 0
    assert read_scores(tmp_path / "psnr")[1]["lpips_net"] is None


def test_config_file_sets_defaults_and_the_command_line_wins(call, tmp_path):
    path = write(tmp_path / "a.png")
    (tmp_path / "run.yaml").write_text("seed: 11\nguidance_scale: 2e0\n")
    assert call("--input", path, "--config", tmp_path / "run.yaml", "--seed", 12)[0] == 0
    described = sidecar(tmp_path / "out" / "a.png")
    assert described["seed"] == 12 and described["settings"]["guidance_scale"] == 2
    assert (tmp_path / "out").is_dir() and list((tmp_path / "out").iterdir())


def test_model_options_reach_the_loader(call, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(flux, "load_pipeline", lambda path, dtype, **where: seen.append(where) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("--input", write(tmp_path / "a.png"), "--revision", "abc", "--variant", "fp16", "--cache_dir", "kept")
    assert {key: seen[0][key] for key in ("revision", "variant", "cache_dir")} == {
        "revision": "abc", "variant": "fp16", "cache_dir": "kept"}


def test_bf16_is_chosen_on_cuda_and_refused_where_the_gpu_has_none(monkeypatch, tiny_model):
    def choose(*flags):
        argv = ["--pretrained_model_name_or_path", tiny_model, "--output", "x", "--input", "y", *flags]
        device, dtype = script.choose_device(script.parse_args(argv))
        return device.type, dtype

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose() == ("cuda", torch.bfloat16) and choose("--dtype", "fp32") == ("cuda", torch.float32)
    assert choose("--device", "cpu") == ("cpu", torch.float32)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="has no bf16"):
        choose("--dtype", "bf16")


@pytest.mark.parametrize("precision, least", [("int8", 30), ("fp8", 20)])
def test_quantised_restoring_says_what_it_costs_and_comes_near_the_plain_result(call, tiny_lora, tmp_path, precision,
                                                                               least):
    path = write(tmp_path / "in" / "a.png")
    flags = ["--input", path, "--lora", tiny_lora]
    assert call(*flags, output=tmp_path / "plain")[0] == 0
    code, out, err = call(*flags, "--base_precision", precision, output=tmp_path / "quantised")
    assert code == 0, err
    stated = float(re.search(rf"{precision} weights: ([\d.]+) dB PSNR to the result of plain weights", out)[1])
    plain, quantised = (to_tensor(read(tmp_path / name / "a.png"))[None] for name in ("plain", "quantised"))
    measured = metrics.psnr(quantised, plain)[0].item()
    assert least < measured < 100 and stated == pytest.approx(measured, abs=0.06)  # one tile: the whole image
    sidecar = json.loads((tmp_path / "quantised" / "a.png.json").read_text())
    assert sidecar["base_precision"] == precision


def test_quantised_weights_are_refused_where_the_lora_is_not_merged(call, tiny_lora, tmp_path):
    path = write(tmp_path / "in" / "a.png")
    for flags in (["--input", path, "--no-merge_lora"], ["--clean", path, "--degradation_types", "noise"]):
        code, _, err = call(*flags, "--lora", tiny_lora, "--base_precision", "int8")
        assert code == 2 and "--base_precision int8" in err and err.count("\n") == 1

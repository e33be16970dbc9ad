"""Senseless numbers end a benchmark in one line, before anything is loaded or measured."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from bench import data, inference, large_image, start_noise, train_step, waiting
from utils import flux, speed
from utils.parse import run_main

FOLDERS = ["--output", "out", "--train_root", "a", "--heldout_root", "b"]


@pytest.mark.parametrize(("bench", "flags", "words"), [
    (data, ["--size", "7"], "--size 7: give 8 or more"),
    (data, ["--rounds", "0"], "--rounds 0: give 1 or more"),
    (large_image, ["--height", "0"], "--height 0: give 1 or more"),
    (large_image, ["--width", "-5"], "--width -5: give 1 or more"),
    (large_image, ["--height", "16", "--width", "16", "--num_inference_steps", "0"], "--num_inference_steps 0"),
    (train_step, ["--steps", "0"], "--steps 0: give 1 or more"),
    (train_step, ["--train_batch_size", "0"], "--train_batch_size 0: give 1 or more"),
    (inference, ["--lora", "x", "--rounds", "0"], "--rounds 0: give 1 or more"),
    (inference, ["--lora", "x", "--steps", "4", "0"], "--steps 0: give 1 or more"),
    (inference, ["--lora", "x", "--tile_batches", "0"], "--tile_batches 0: give 1 or more"),
    (inference, ["--lora", "x", "--tile", "8"], "--tile 8: give 16 or more"),
    (waiting, ["--processes", "2", "0"], "--processes 0: give 1 or more"),
    (start_noise, [*FOLDERS, "--steps", "19"], "--steps 19: give 20 or more"),
    (start_noise, [*FOLDERS, "--heldout_images", "0"], "--heldout_images 0: give 1 or more"),
    (start_noise, [*FOLDERS, "--score_px", "0"], "--score_px 0: give 1 or more"),
    (start_noise, [*FOLDERS, "--seeds", "0", "-1"], "--seeds -1: give 0 or more"),
])
def test_senseless_numbers_end_in_one_line(bench, flags, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bench", *flags])
    with pytest.raises(SystemExit) as stop:
        run_main(bench.main)
    assert stop.value.code == 2 and f"error: {words}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_training_that_fails_beneath_the_waiting_bench_is_heard(monkeypatch, capsys, tmp_path):
    run = subprocess.run
    child = "import sys; sys.exit('\\n'.join(['early', *['rank 0'] * 80, 'no photographs here']))"
    monkeypatch.setattr(subprocess, "run", lambda command, **options: run([sys.executable, "-c", child], **options))
    with pytest.raises(ValueError, match="the training on 3 processes failed; its last lines are above"):
        waiting.measure(SimpleNamespace(resolution=32, batch=1, steps=1), 3, [], tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "no photographs here" and len(lines) == waiting.LAST_LINES


def test_the_step_bench_takes_latents_that_are_there_and_compiles_its_own_arms(
        tiny_model, photos, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "BACKEND", "aot_eager")
    encoded, encode = [], flux.encode
    monkeypatch.setattr(flux, "encode", lambda *args: encoded.append(1) or encode(*args))
    monkeypatch.setattr("sys.argv", [
        "bench", "--steps", "1", "--model", tiny_model, "--hr_root", str(photos / "train"), "--resolution", "32",
        "--train_batch_size", "2", "--max_sequence_length", "8", "--cached_latents", "--compile"])
    train_step.main()  # its exit code says how fast, which no test asks
    out = capsys.readouterr().out
    assert "first step, with compilation" in out and out.count("| restoration |") == out.count("| edit |") == 1
    assert len(encoded) == 2 * (6 + 1)  # target and control of each step, once for all three arms

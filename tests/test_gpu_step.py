"""The GPU benchmark, on a CPU with a model of two blocks: all arms compute one step; its table and JSON are right."""

import json
import subprocess

import pytest
import torch

from bench import gpu_step, random_flux
from utils import memory, speed
from utils.parse import run_main

TINY = ["--device", "cpu", "--layers", "1,1", "--heads", "2", "--resolution", "64", "--max_sequence_length", "16",
        "--rank", "4", "--steps", "2"]


def momentum(name):
    """Adam's first moments, a tenth of the clipped gradients, after the first step of an arm."""
    arm = gpu_step.Arm(name, gpu_step.parse_args([*TINY, "--memory_limit", "24"]), torch.device("cpu"), torch.bfloat16)
    arm.step(0)
    return torch.cat([arm.optimizer.state[parameter]["exp_avg"].float().flatten() for parameter in arm.parameters])


def test_random_model_has_the_planners_weights_and_no_zeros():
    pipe = random_flux.random_pipeline("cpu", torch.bfloat16, (1, 1), heads=2)
    config = memory.KONTEXT | {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    expected = {name: weight.shape for name, weight in memory.meta_transformer(config).named_parameters()}
    assert {name: weight.shape for name, weight in pipe.transformer.named_parameters()} == expected
    for model in (pipe.transformer, pipe.vae):
        for name, weight in model.named_parameters():
            assert weight.isfinite().all() and weight.count_nonzero() > 0.99 * weight.numel(), name


def test_every_arm_computes_the_official_gradients():
    official = momentum("official")
    assert official.norm() > 0
    assert torch.cosine_similarity(official, momentum("short"), dim=0) < 0.99  # another text: it can be told apart
    for name in ("selective", "tables", "planned", "int8"):
        cosine = torch.cosine_similarity(official, momentum(name), dim=0).item()
        assert cosine > 0.999, (name, cosine)


@pytest.mark.parametrize("separate", [False, True])
def test_losses_agree_and_table_and_json_are_written(separate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "BACKEND", "eager")
    calls = []

    def in_this_process(command, check):
        calls.append(command)
        gpu_step.main(command[3:])

    monkeypatch.setattr(subprocess, "run", in_this_process)
    file = tmp_path / "step.json"
    gpu_step.main([*TINY, "--arms", "official,tables", "--compile", "--peak_tflops", "100", "--output", str(file)]
                  + ["--separate"] * separate)
    text, rows = capsys.readouterr().out, json.loads(file.read_text())["rows"]
    assert len(calls) == 2 * separate
    assert "| official | 16 |" in text and "| tables | 16 |" in text and f"torch {torch.__version__}" in text
    assert "mean nothing" in text
    assert [row["arm"] for row in rows] == ["official", "tables"]
    assert rows[0]["losses"] == pytest.approx(rows[1]["losses"], rel=1e-3) and len(rows[0]["losses"]) == 2
    assert rows[1]["MFU"] == pytest.approx(rows[1]["useful TFLOP"] / rows[1]["median s"] / 100)


def test_sampling_counts_a_call_for_each_step(tmp_path, capsys):
    file = tmp_path / "sampling.json"
    gpu_step.main([*TINY, "--sampling", "1,2", "--output", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["eager, 1 steps", "eager, 2 steps"]
    assert rows[1]["useful TFLOP"] == pytest.approx(2 * rows[0]["useful TFLOP"])
    assert "| eager, 2 steps |" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "words"), [
    (["--arms", "none,quick"], "--arms quick: give some of"),
    (["--arms", "planned"], "--arms planned: needs --memory_limit"),
    (["--memory_limit", "0.1"], "--memory_limit 0.1: give more than"),
    (["--layers", "1"], "--layers 1, --sampling None: give two"),
    (["--sampling", "a"], "--layers 1,1, --sampling a: give whole numbers"),
    (["--peak_tflops", "0"], "--peak_tflops 0.0: give more than 0"),
    (["--steps", "0"], "--steps 0: give 1 or more"),
    (["--resolution", "72"], "72x72: this model needs multiples"),
])
def test_senseless_flags_end_in_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: gpu_step.main([*TINY, *flags]))
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_suite_names_its_parts():
    result = subprocess.run(["bash", "bench/gpu_suite.sh", "nothing"], capture_output=True, text=True, check=False,
                            cwd=gpu_step.memory.__file__.rpartition("/utils/")[0])
    assert result.returncode == 2 and "step1024|step512|memory" in result.stderr

"""The start-noise study on a tiny random model: every arm is trained on the same data and reported once."""

import argparse
import json
from pathlib import Path

import pytest

from bench import start_noise


@pytest.fixture(scope="module")
def study(tiny_model, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    options = ["--model", tiny_model, "--train_root", str(photos / "train"), "--heldout_root", str(photos / "heldout"),
               "--output", str(folder), "--steps", "20", "--heldout_images", "2", "--resolution", "32",
               "--score_px", "32", "--script_args", "--degradation_types noise --train_batch_size 2 --rank 2 "
               "--max_sequence_length 16 --perceptual_crop 0 --learning_rate 1e-3 --lora_layers x_embedder,proj_out"]
    args = start_noise.parse_args(options)
    start_noise.run_seed(args, 0)
    return args, json.loads((folder / "seed-0.json").read_text(encoding="utf-8"))


def test_every_arm_is_scored_at_equal_steps_and_equal_time(study):
    args, results = study
    for arm in start_noise.ARMS:
        result = results[start_noise.name_of(arm)]
        assert result["steps"]["equal steps"] == args.steps
        assert start_noise.TIMED_STEPS <= result["steps"]["equal time"] <= 50  # 2.5 times 20
        for budget in ("equal steps", "equal time"):
            assert set(result[budget]) == set(map(str, start_noise.SAMPLING_STEPS))
    assert results[start_noise.name_of(start_noise.ARMS[0])]["steps"]["equal time"] == args.steps


def test_the_shared_options_reach_every_arm(study):
    """--lora_layers too: its layers, and no others, are trained."""
    args, _ = study
    options = start_noise.script_args(args, start_noise.ARMS[1], 0)
    assert options.lora_layers == "x_embedder,proj_out" and options.start_noise == "0.5" and options.rank == 2


def test_a_seed_made_with_other_options_is_refused_by_name(study):
    args, _ = study
    changed = argparse.Namespace(**vars(args) | {"score_px": 48})
    with pytest.raises(ValueError, match="--score_px"):
        start_noise.run_seed(changed, 0)


def test_equal_time_is_the_budget_over_the_arm_s_own_step(study, monkeypatch):
    """Steps that take 1 s of a clock of our own, against a budget of 31 s; and one that allows more than the cap."""
    args, _ = study
    options = start_noise.script_args(args, start_noise.ARMS[3], 0)
    degrade = start_noise.degrader_from_args(options)
    dataset = start_noise.dataset_from_args(options, degrade, options.instance_prompt, 0)
    encoded = start_noise.flux.encode_prompts(args.model, [options.instance_prompt], "cpu", start_noise.torch.float32,
                                              16)
    clock = iter(range(10**6))
    monkeypatch.setattr(start_noise.time, "process_time", lambda: next(clock))
    trained = []
    attach = start_noise.lora.attach
    monkeypatch.setattr(start_noise.lora, "attach", lambda model, *rest: trained.append(model) or attach(model, *rest))
    for budget_s, steps, capped in ((31, 31, False), (1000, 50, True)):
        result = start_noise.train_arm(args, start_noise.ARMS[3], 0, encoded, dataset,
                                       start_noise.load_crops(args, degrade), budget_s)
        assert result["steps"] == {"equal steps": 20, "equal time": steps} and result["capped"] is capped
    names = [name for name, parameter in trained[0].named_parameters() if parameter.requires_grad]
    assert names and all("x_embedder" in name or "proj_out" in name for name in names)


def test_only_start_noise_below_1_is_tried_without_reference_tokens():
    assert {k for k, reference, _ in start_noise.ARMS if not reference} == {0.5, 0.25, 0}
    assert len(set(start_noise.ARMS)) == len(start_noise.ARMS) == 14


def test_seed_that_is_there_is_not_trained_again(study, monkeypatch):
    args, results = study
    monkeypatch.setattr(start_noise, "train_arm", lambda *args: pytest.fail("trained again"))
    before = (Path(args.output) / "seed-0.json").read_bytes()
    start_noise.run_seed(args, 0)
    assert (Path(args.output) / "seed-0.json").read_bytes() == before


def test_table_means_over_seeds_and_shows_their_spread(study, tmp_path):
    _, results = study
    other = json.loads(json.dumps(results))
    for values in other["0"]["equal steps"].values():
        values["psnr"] = [value + 2 for value in values["psnr"]]
    for seed, content in enumerate((results, other)):
        (tmp_path / f"seed-{seed}.json").write_text(json.dumps(content), encoding="utf-8")
    lines, rows = start_noise.table(tmp_path)
    mean = sum(results["0"]["equal steps"]["4"]["psnr"]) / 2
    row = next(row for row in rows if (row["budget"], row["arm"], row["sampling_steps"]) == ("equal steps", "0", 4))
    assert row["psnr"] == pytest.approx(mean + 1)
    assert row["psnr_std"] == pytest.approx(2**0.5)
    assert any(line.startswith("| 0.5, no reference, gradient loss |") for line in lines)


def test_table_without_results_and_training_without_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="run without --table first"):
        start_noise.table(tmp_path)
    with pytest.raises(ValueError, match="--train_root and --heldout_root"):
        start_noise.parse_args(["--output", str(tmp_path)])

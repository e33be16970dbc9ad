"""The start-noise study on a tiny random model: every arm is trained on the same data and reported once."""

import json

import pytest

from bench import start_noise


@pytest.fixture(scope="module")
def study(tiny_model, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    options = ["--model", tiny_model, "--train_root", str(photos / "train"), "--heldout_root", str(photos / "heldout"),
               "--output", str(folder), "--steps", "11", "--heldout_images", "2", "--resolution", "32",
               "--score_px", "32", "--script_args", "--degradation_types noise --train_batch_size 2 --rank 2 "
               "--max_sequence_length 16 --perceptual_crop 0 --learning_rate 1e-3"]
    args = start_noise.parse_args(options)
    start_noise.run_seed(args, 0)
    return args, json.loads((folder / "seed-0.json").read_text(encoding="utf-8"))


def test_every_arm_is_scored_at_equal_steps_and_equal_time(study):
    args, results = study
    for arm in start_noise.ARMS:
        result = results[start_noise.name_of(arm)]
        assert result["steps"]["equal steps"] == args.steps
        assert start_noise.TIMED_STEPS <= result["steps"]["equal time"] <= start_noise.LONGEST * args.steps
        for budget in ("equal steps", "equal time"):
            assert set(result[budget]) == set(map(str, start_noise.SAMPLING_STEPS))
    assert results[start_noise.name_of(start_noise.ARMS[0])]["steps"]["equal time"] == args.steps


def test_only_start_noise_below_1_is_tried_without_reference_tokens():
    assert {k for k, reference, _ in start_noise.ARMS if not reference} == {0.5, 0.25, 0}
    assert len(set(start_noise.ARMS)) == len(start_noise.ARMS) == 14


def test_seed_that_is_there_is_not_trained_again(study, monkeypatch):
    args, results = study
    monkeypatch.setattr(start_noise, "train_arm", lambda *args: pytest.fail("trained again"))
    start_noise.run_seed(args, 0)


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

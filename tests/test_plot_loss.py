"""Curves of trainings, drawn from what log_metrics writes."""

import json

import numpy as np
import pytest
from PIL import Image

from scripts import plot_loss
from utils.parse import run_main
from utils.run import log_metrics


class OneProcess:
    """What log_metrics asks of an Accelerator."""

    is_main_process = True

    def log(self, values, step):
        pass


@pytest.fixture
def runs(tmp_path):
    """Two runs: a with losses and validation, one loss not finite; b with losses alone."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for step in range(1, 9):
            flow = float("nan") if (name, step) == ("a", 3) else float(step)
            log_metrics(OneProcess(), tmp_path / name, {"loss/flow": flow, "lr": 1e-4}, step)
    log_metrics(OneProcess(), tmp_path / "a", {"validation/psnr": 25.0, "validation/ssim": 0.7}, 8)
    return [str(tmp_path / name) for name in "ab"]


def curves(figure):
    """{panel: {label: (steps, values)}} of a figure."""
    return {axes.get_title(): {line.get_label(): line.get_xydata().T for line in axes.lines} for axes in figure.axes}


def test_every_report_is_a_point_and_what_is_not_finite_a_gap(runs):
    run = plot_loss.read_run(runs[0])
    assert run.keys() == {"loss/flow", "lr", "validation/psnr", "validation/ssim"}
    steps, values = run["loss/flow"]
    assert steps.tolist() == list(range(1, 9))
    np.testing.assert_equal(values, [1, 2, np.nan, 4, 5, 6, 7, 8])
    assert plot_loss.read_run(f"{runs[0]}/metrics.jsonl").keys() == run.keys()


def test_smoothing_is_the_mean_of_the_reports_up_to_each():
    values = np.array([1, 2, np.nan, 4, 6, 0.0])
    np.testing.assert_allclose(plot_loss.smoothed(values, 3), [1, 1.5, np.nan, 3, 5, 10 / 3])
    np.testing.assert_equal(plot_loss.smoothed(values, 1), values)


def test_losses_and_validation_have_panels_of_their_own_with_every_run(runs):
    data = {name: plot_loss.read_run(run) for name, run in zip("ab", runs, strict=True)}
    drawn = curves(plot_loss.draw(data, ["loss/flow", "validation/psnr", "validation/ssim"], 2, True))
    assert drawn.keys() == {"training", "validation, dB", "validation"}
    assert drawn["training"].keys() == {"a: loss/flow", "b: loss/flow"}
    np.testing.assert_equal(drawn["training"]["b: loss/flow"][1], [1, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5])
    np.testing.assert_equal(drawn["validation, dB"]["a: validation/psnr"], [[8], [25]])  # never smoothed
    assert drawn["validation"].keys() == {"a: validation/ssim"}
    for log in (True, False):
        axes = plot_loss.draw(data, ["loss/flow", "validation/ssim"], 1, log).axes
        assert [panel.get_yscale() for panel in axes] == ["log" if log else "linear", "linear"]


def test_seconds_have_a_panel_and_only_what_was_asked_for_is_drawn_beside_the_defaults(tmp_path, monkeypatch):
    for step in (1, 2):
        log_metrics(OneProcess(), tmp_path, {"train/loss": 1.0, "lr": 1e-4, "seconds_per_step": 0.5 * step,
                                             "data_seconds_per_step": 0.1, "memory_gib": 2.5}, step)
    drawn = []
    draw = plot_loss.draw
    monkeypatch.setattr(plot_loss, "draw", lambda *rest: drawn.append(draw(*rest)) or drawn[-1])
    flags = ["--runs", str(tmp_path), "--output", str(tmp_path / "curves.png"), "--smooth", "2", "--log"]
    plot_loss.main(plot_loss.parse_args(flags))
    panels = curves(drawn[0])
    assert list(panels) == ["training", "seconds"] and panels["training"].keys() == {"train/loss"}
    assert panels["seconds"].keys() == {"seconds_per_step", "data_seconds_per_step"}
    np.testing.assert_equal(panels["seconds"]["seconds_per_step"], [[1, 2], [0.5, 1]])  # not smoothed
    plot_loss.main(plot_loss.parse_args([*flags, "--keys", "memory_gib", "lr"]))
    assert {panel: list(lines) for panel, lines in curves(drawn[1]).items()} == {
        "training": ["lr"], "memory, GiB": ["memory_gib"]}


def test_the_command_writes_a_picture_of_the_asked_keys(runs, tmp_path, monkeypatch, capsys):
    asked = []
    draw = plot_loss.draw
    monkeypatch.setattr(plot_loss, "draw", lambda *rest: asked.append(rest) or draw(*rest))
    output = tmp_path / "new" / "curves.png"
    plot_loss.main(plot_loss.parse_args(["--runs", *runs, "--output", str(output), "--smooth", "3", "--log"]))
    assert "3 curves of 2 runs" in capsys.readouterr().out
    assert asked[0][1:] == (["loss/flow", "validation/psnr", "validation/ssim"], 3, True)
    picture = np.asarray(Image.open(output).convert("RGB"))
    assert picture.shape == (3 * 4 * 120, 9 * 120, 3) and picture.min() < 50
    flags = ["--keys", "lr", "--output", str(output)]
    plot_loss.main(plot_loss.parse_args(["--runs", runs[0], *flags]))
    assert asked[1][1:] == (["lr"], 1, False) and list(asked[1][0]) == ["a"]
    assert Image.open(output).size == (9 * 120, 4 * 120)


def test_runs_with_one_folder_name_keep_their_paths(runs, tmp_path, monkeypatch):
    (tmp_path / "other" / "a").mkdir(parents=True)
    (tmp_path / "other" / "a" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss/flow": 2.0}) + "\n")
    asked = []
    draw = plot_loss.draw
    monkeypatch.setattr(plot_loss, "draw", lambda *rest: asked.append(rest) or draw(*rest))
    both = [runs[0], str(tmp_path / "other" / "a")]
    plot_loss.main(plot_loss.parse_args(["--runs", *both, "--output", str(tmp_path / "c.svg")]))
    assert list(asked[0][0]) == both


@pytest.mark.parametrize("flags, words", [
    (["--keys", "loss/none"], "--keys loss/none: these runs have loss/flow, lr"),
    (["--smooth", "0"], "--smooth 0"), (["--output", "c.txt"], "--output c.txt"),
    (["--runs", "nowhere"], "--runs nowhere"),
])
def test_bad_input_is_one_line(runs, capsys, flags, words):
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: plot_loss.main(plot_loss.parse_args(["--runs", *runs, *flags])))
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error: ") and words in error and error.count("\n") == 1


def test_a_last_line_that_a_kill_has_cut_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss/flow": 3}\n{"step": 2, "lo')
    np.testing.assert_equal(plot_loss.read_run(file), {"loss/flow": (np.array([1.0]), np.array([3.0]))})


@pytest.mark.parametrize("line", ['{"loss/flow": 1}', '{"step": 1, loss}'])
def test_a_damaged_or_empty_file_is_named(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match="metrics.jsonl: no reports of a training"):
        plot_loss.read_run(file)
    file.write_text("")
    with pytest.raises(ValueError, match="these runs have no reports yet"):
        plot_loss.main(plot_loss.parse_args(["--runs", str(tmp_path), "--output", str(tmp_path / "c.png")]))

"""Photographs on disk: the sample from installed packages, and the hub without a network."""
import sys

import numpy as np
import pytest

from my_dataset.images import list_images, load_rgb
from scripts import download_dataset
from utils.parse import run_main


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["download_dataset", *(str(argument) for argument in arguments)])
    with pytest.raises(SystemExit) as caught:
        run_main(download_dataset.main)
    return caught.value.code


def test_the_sample_is_seven_colour_photographs_split_in_two(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "sample", "--output", tmp_path) == 0
    assert "7 photographs copied, 0 already there" in capsys.readouterr().out
    names = {split: [path.stem for path in list_images(tmp_path / split)] for split in ("train", "heldout")}
    assert names == {
        "train": ["astronaut", "chelsea", "china", "rocket"],
        "heldout": ["coffee", "flower", "motorcycle_left"],
    }
    for path in list_images(tmp_path):
        image = load_rgb(path).astype(int)
        assert min(image.shape[:2]) >= 300 and np.abs(image[..., 0] - image[..., 2]).mean() > 5


def test_the_sample_can_be_made_again_and_repairs_a_changed_file(tmp_path):
    assert download_dataset.copy_sample(tmp_path) == (7, 0)
    whole = (tmp_path / "train" / "china.jpg").read_bytes()
    (tmp_path / "train" / "china.jpg").write_bytes(whole[:100])
    assert download_dataset.copy_sample(tmp_path) == (1, 6)
    assert (tmp_path / "train" / "china.jpg").read_bytes() == whole
    assert not list(tmp_path.rglob("*.tmp"))


def test_dog_and_hub_ask_for_a_snapshot_of_the_right_dataset(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda repo_id, repo_type, local_dir: calls.append((repo_id, repo_type, local_dir)))
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "dog") == 0
    assert call(monkeypatch, "hub", "--repo_id", "a/b", "--output", "c") == 0
    assert calls == [("diffusers/dog-example", "dataset", "dog"), ("a/b", "dataset", "c")]


def test_without_a_network_the_error_is_one_line_with_the_cure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert call(monkeypatch, "dog", "--output", tmp_path / "dog") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --repo_id diffusers/dog-example: not downloaded") and error.count("\n") == 1
    assert "network" in error and "--hr_root" in error


@pytest.mark.parametrize("arguments, message", (
    (("hub",), "hub needs --repo_id ID and --output DIR"),
    (("hub", "--repo_id", "a/b"), "hub needs"),
    (("sample", "--repo_id", "a/b"), "--repo_id belongs to `hub`"),
))
def test_wrong_arguments_end_with_exit_code_2(monkeypatch, capsys, arguments, message):
    assert call(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err

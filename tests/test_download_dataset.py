"""Photographs on disk: the sample from installed packages, and the hub without a network."""
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.hf_api import RepoFile

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


class FakeHub:
    """A dataset of two files behind the hub's client: a small one with git's hash, a large one with sha256.
    cut_off: how many of the next downloads leave half of the large file."""

    FILES = {"README.md": b"words", "images/photo.jpg": bytes(range(256)) * 40}

    def __init__(self, monkeypatch, cut_off=0):
        self.calls, self.cut_off = [], cut_off
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", self.list_repo_tree)

    def snapshot_download(self, repo_id, repo_type, revision, local_dir):
        self.calls.append((repo_id, repo_type, revision, str(local_dir)))
        for name, content in self.FILES.items():
            path = Path(local_dir, name)
            if path.exists():
                continue  # as the client does, which trusts what it has fetched
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".jpg") and self.cut_off:
                content, self.cut_off = content[: len(content) // 2], self.cut_off - 1
            path.write_bytes(content)

    def list_repo_tree(self, repo_id, recursive, revision, repo_type, token):
        self.calls.append((repo_id, repo_type, revision))
        for name, content in self.FILES.items():
            large = {"size": len(content), "oid": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
            git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            yield RepoFile(path=name, size=len(content), oid=git, lfs=large if name.endswith(".jpg") else None)


def test_dog_and_hub_ask_for_a_snapshot_of_the_right_dataset_and_compare_it(tmp_path, monkeypatch, capsys):
    hub = FakeHub(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "dog") == 0
    assert call(monkeypatch, "hub", "--repo_id", "a/b", "--output", "c", "--revision", "v1") == 0
    assert hub.calls[0] == ("diffusers/dog-example", "dataset", None, "dog")
    assert hub.calls[2:] == [("a/b", "dataset", "v1", "c"), ("a/b", "dataset", "v1")]
    assert "dog: downloaded and verified\n" in capsys.readouterr().out


def test_a_truncated_file_is_found_and_fetched_again(tmp_path, monkeypatch, capsys):
    hub = FakeHub(monkeypatch, cut_off=1)
    assert call(monkeypatch, "dog", "--output", tmp_path) == 0
    assert "1 files fetched twice" in capsys.readouterr().out
    assert (tmp_path / "images/photo.jpg").read_bytes() == hub.FILES["images/photo.jpg"]
    (tmp_path / "README.md").write_bytes(b"wordz")  # of the same size
    assert call(monkeypatch, "dog", "--output", tmp_path) == 0
    assert (tmp_path / "README.md").read_bytes() == b"words"


def test_a_file_that_stays_truncated_is_an_error(tmp_path, monkeypatch, capsys):
    FakeHub(monkeypatch, cut_off=2)
    assert call(monkeypatch, "dog", "--output", tmp_path) == 2
    assert "images/photo.jpg; check the disk" in capsys.readouterr().err


def test_verify_names_damaged_and_missing_files_and_fetches_nothing(tmp_path, monkeypatch, capsys):
    hub = FakeHub(monkeypatch)
    assert call(monkeypatch, "dog", "--output", tmp_path) == 0
    (tmp_path / "own.txt").write_text("a file that the hub does not know")
    assert call(monkeypatch, "dog", "--output", tmp_path, "--verify") == 0
    assert "every file is the hub's" in capsys.readouterr().out
    (tmp_path / "images/photo.jpg").write_bytes(b"cut")
    (tmp_path / "README.md").unlink()
    hub.calls.clear()
    assert call(monkeypatch, "dog", "--output", tmp_path, "--verify", "--revision", "v2") == 2
    assert "2 files are missing or differ from the hub's: README.md, images/photo.jpg" in capsys.readouterr().err
    assert hub.calls == [("diffusers/dog-example", "dataset", "v2")]
    assert call(monkeypatch, "dog", "--output", tmp_path / "none", "--verify") == 2
    assert "no such folder to verify" in capsys.readouterr().err


def test_without_a_network_the_error_is_one_line_with_the_cure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for flags in ((), ("--verify",)):
        folder = tmp_path / "dog"
        assert call(monkeypatch, "dog", "--output", folder, *flags) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --repo_id diffusers/dog-example: the hub did not give it")
        assert error.count("\n") == 1 and "network" in error and "--hr_root" in error
        folder.mkdir(exist_ok=True)


@pytest.mark.parametrize("arguments, message", (
    (("hub",), "hub needs --repo_id ID and --output DIR"),
    (("hub", "--repo_id", "a/b"), "hub needs"),
    (("sample", "--repo_id", "a/b"), "--repo_id belongs to `hub`"),
    (("sample", "--verify"), "--verify belong to"),
    (("sample", "--revision", "v1"), "--revision and"),
))
def test_wrong_arguments_end_with_exit_code_2(monkeypatch, capsys, arguments, message):
    assert call(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err

"""Held-out images: never among the training files, and the same ones in every validation of every run."""

import json
import re
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from my_dataset.dataset_deg_paired import DegDataset, add_data_args, dataset_from_args
from my_dataset.heldout import heldout_from_args, load_validation_images
from my_dataset.streaming import add_stream_args
from utils.parse import make_parser
from utils.validation import add_validation_args


def add_noise(image, rng):
    noisy = image + rng.normal(0, 20, image.shape)
    return noisy.round().clip(0, 255).astype(np.uint8), [{"type": "noise"}]


def make_args(photos, **changes):
    parser = make_parser("test")
    add_data_args(parser)
    add_validation_args(parser)
    args = parser.parse_args(["--heldout_root", str(photos / "heldout"), "--resolution", "32"])
    return SimpleNamespace(**vars(args) | {"seed": 0} | changes)


@pytest.fixture
def training(photos):
    return DegDataset(photos / "train", add_noise, 32)


@pytest.fixture
def stored(photos, tmp_path):
    """Folder of half-size partners of the held-out images."""
    for path in (photos / "heldout").iterdir():
        image = Image.open(path)
        image.resize((image.width // 2, image.height // 2)).save(tmp_path / path.name)
    return tmp_path


def test_items_are_centre_crops_degraded_on_the_fly(photos, training):
    items = heldout_from_args(make_args(photos), training, add_noise)
    assert len(items) == 2
    for item in items:
        assert item["target"].shape == item["control"].shape == (3, 32, 32)
        assert not torch.equal(item["target"], item["control"])
    whole = np.asarray(Image.open(photos / "heldout" / "photo_6.png").resize((43, 32), Image.Resampling.BICUBIC))
    target = items[0]["target"].movedim(0, -1).numpy() * 127.5 + 127.5
    assert np.abs(target - whole[:, 5:37]).mean() < 6  # the middle, up to the sub-pixel place of the crop


def test_the_same_seed_gives_the_same_items_and_another_seed_another_degradation(photos, training):
    torch.manual_seed(1)
    first = heldout_from_args(make_args(photos), training, add_noise)
    torch.manual_seed(2)
    np.random.seed(2)
    again = heldout_from_args(make_args(photos), training, add_noise)
    other = heldout_from_args(make_args(photos, seed=5), training, add_noise)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a["control"], b["control"]) and torch.equal(a["target"], b["target"])
        assert torch.equal(a["target"], c["target"]) and not torch.equal(a["control"], c["control"])


def test_an_items_degradation_does_not_depend_on_how_many_are_taken(photos, training):
    one, = heldout_from_args(make_args(photos, num_validation_images=1), training, add_noise)
    both = heldout_from_args(make_args(photos), training, add_noise)
    assert torch.equal(one["control"], both[0]["control"])
    assert heldout_from_args(make_args(photos, num_validation_images=0), training, add_noise) == []


def test_a_training_file_among_the_held_out_ones_is_refused_by_name_whatever_it_is_called(photos, training, tmp_path):
    shutil.copytree(photos / "heldout", tmp_path / "heldout")
    shutil.copy(photos / "train" / "photo_3.png", tmp_path / "heldout" / "renamed.png")
    with pytest.raises(ValueError, match="renamed.png .held out. is the same file as .*photo_3.png .training."):
        heldout_from_args(make_args(photos, heldout_root=str(tmp_path / "heldout")), training, add_noise)


@pytest.fixture(params=["imagefolder", "table of bytes", "tars"])
def table(request, photos, tmp_path, monkeypatch):
    """The training photographs as a --dataset_name."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    paths = sorted((photos / "train").iterdir())
    folder = tmp_path / "table"
    if request.param == "tars":
        folder.mkdir()
        with tarfile.open(folder / "0.tar", "w") as archive:
            for path in paths:
                archive.add(path, path.name)
    elif request.param == "imagefolder":
        shutil.copytree(photos / "train", folder)
        rows = [json.dumps({"file_name": path.name}) for path in paths]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    else:
        cells = [{"bytes": path.read_bytes(), "path": None} for path in paths]
        features = datasets.Features({"image": datasets.Image()})
        folder.mkdir()
        datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(folder / "train.parquet")
    return folder


def from_table(folder, *flags):
    parser = make_parser("test")
    add_data_args(parser)
    add_stream_args(parser)
    args = parser.parse_args(["--dataset_name", str(folder), "--resolution", "32", *flags])
    return dataset_from_args(args, add_noise)


def test_a_training_image_of_a_table_is_refused_too_and_the_others_are_not(photos, table, tmp_path):
    training = from_table(table)
    assert len(heldout_from_args(make_args(photos), training, add_noise)) == 2
    shutil.copytree(photos / "heldout", tmp_path / "heldout")
    shutil.copy(photos / "train" / "photo_3.png", tmp_path / "heldout" / "renamed.png")
    place = r"(.*photo_3.png|row 3 of the dataset|the file at byte \d+ of .*0.tar) \(training\)"
    with pytest.raises(ValueError, match=rf"renamed.png \(held out\) is the same file as {place}"):
        heldout_from_args(make_args(photos, heldout_root=str(tmp_path / "heldout")), training, add_noise)


@pytest.mark.parametrize("table", ["tars"], indirect=True)
def test_a_stream_is_not_searched_for_held_out_images(photos, table):
    training = from_table(table, "--streaming")
    assert len(heldout_from_args(make_args(photos, heldout_root=str(photos / "train")), training, add_noise)) == 4


def test_stored_pairs_are_used_as_they_are(photos, training, stored):
    items = heldout_from_args(make_args(photos, heldout_lr_root=str(stored)), training, None)
    degraded = heldout_from_args(make_args(photos, heldout_lr_root=str(stored)), training, add_noise)
    for item, other in zip(items, degraded, strict=True):
        assert item["degradation"] == [] and torch.equal(item["control"], other["control"])
        assert 0 < (item["control"] - item["target"]).abs().mean() < 0.2


def test_a_training_file_among_stored_pairs_is_refused_too(photos, training, stored):
    with pytest.raises(ValueError, match="held out"):
        lr = shutil.copytree(photos / "train", stored / "lr")
        args = make_args(photos, heldout_root=str(photos / "train"), heldout_lr_root=str(lr))
        heldout_from_args(args, training, None)


def test_held_out_pairs_without_partner_are_refused_by_name(photos, training, stored):
    (stored / "photo_7.png").unlink()
    with pytest.raises(ValueError, match=r"no partner.*photo_7.png"):
        heldout_from_args(make_args(photos, heldout_lr_root=str(stored)), training, None)


def test_degraded_partners_alone_are_refused(photos, training, stored):
    with pytest.raises(ValueError, match="--heldout_lr_root needs --heldout_root"):
        heldout_from_args(make_args(photos, heldout_root=None, heldout_lr_root=str(stored)), training, None)


def test_clean_images_beside_stored_training_pairs_need_their_partners(photos, training):
    with pytest.raises(ValueError, match="needs --heldout_lr_root"):
        heldout_from_args(make_args(photos), training, None)


def test_nothing_is_held_out_without_a_folder(photos, training):
    assert heldout_from_args(make_args(photos, heldout_root=None), training, add_noise) == []


def test_a_held_out_folder_that_is_not_there_is_named(photos, training, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(tmp_path / "absent"))):
        heldout_from_args(make_args(photos, heldout_root=str(tmp_path / "absent")), training, add_noise)


def test_validation_images_are_a_file_a_folder_or_none(photos):
    assert load_validation_images(make_args(photos)) == []
    path = photos / "heldout" / "photo_6.png"
    image, = load_validation_images(make_args(photos, validation_image=str(path)))
    assert image.dtype == np.uint8 and np.array_equal(image, np.asarray(Image.open(path)))
    assert len(load_validation_images(make_args(photos, validation_image=str(photos / "heldout")))) == 2


def test_held_out_images_do_not_get_the_noise_of_the_training_images(photos):
    training = DegDataset(photos / "train", add_noise, 32, crop="center")
    heldout = heldout_from_args(make_args(photos), training, add_noise)
    noises = [(item["control"] - item["target"]).flatten() for item in (training[0], training[(0, 1)], heldout[0])]
    inside = (torch.stack(noises).abs() < 0.9).all(0)
    correlation = torch.corrcoef(torch.stack([noise[inside] for noise in noises]))
    assert correlation[0, 2].abs() < 0.1 and correlation[0, 1].abs() < 0.1
    again = heldout_from_args(make_args(photos), training, add_noise)
    assert torch.equal(heldout[0]["control"], again[0]["control"])

"""Datasets and the bucket sampler: sources, their faults, geometry, and samples that depend on (seed, epoch, index)."""
import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from accelerate.state import PartialState
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image
from torch.utils.data import DataLoader

import my_dataset
from my_dataset import (
    BucketBatchSampler,
    DegBucketDataset,
    DegDataset,
    collate_fn,
    find_nearest_bucket,
    parse_buckets_string,
    tokenize_prompt,
)
from my_dataset.dataset_deg_bucket import KONTEXT_BUCKETS
from my_dataset.dataset_deg_paired import (
    add_data_args,
    check_no_overlap,
    cover_crop,
    dataset_from_args,
    enlargement,
    folder_records,
    hub_records,
    item_rng,
    item_seed,
    pair_records,
    to_tensor,
)

BUCKETS = [(64, 32), (48, 48), (32, 64)]


def noise_image(seed, height=40, width=56):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def add_grain(image, rng):
    """A degradation: small noise, reported with the first value that was drawn."""
    grain = rng.integers(-9, 10, image.shape)
    return np.clip(image + grain, 0, 255).astype(np.uint8), [{"type": "grain", "first": int(grain[0, 0, 0])}]


def keep(image, rng):
    return image, []


def to_uint8(tensor):
    return ((tensor + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.fixture
def photos(tmp_path):
    for i in range(5):
        write(tmp_path / "photos" / f"{i}.png", noise_image(i))
    return tmp_path / "photos"


@pytest.fixture
def pairs(tmp_path):
    """Folders hr, lr with three pairs, the control half as bright."""
    for i in range(3):
        write(tmp_path / "hr" / f"{i}.png", noise_image(i))
        write(tmp_path / "lr" / f"{i}.png", noise_image(i) // 2)
    return tmp_path


@pytest.fixture
def imagefolder(tmp_path, monkeypatch):
    """Writes an imagefolder with degraded and clean images, and keeps the cache of `datasets` out of the home."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "folder"
    for i in range(2):
        write(folder / "clean" / f"{i}.png", noise_image(i))
        write(folder / "degraded" / f"{i}.png", noise_image(i) // 2)

    def write_metadata(*lines):
        (folder / "metadata.jsonl").write_text("\n".join(
            line if isinstance(line, str) else json.dumps(line) for line in lines))
        return str(folder)

    return write_metadata


def metadata_row(i, **changes):
    row = {"clean_file_name": f"clean/{i}.png", "degraded_file_name": f"degraded/{i}.png", "prompt": f"prompt {i}"}
    return row | changes


# ---- randomness


def test_item_streams_differ_and_repeat():
    keys = [*itertools.product((0, 1), (0, 1), (0, 1), range(4))]
    draws = {key: item_rng(*key).integers(2**62) for key in keys}
    assert len(set(draws.values())) == len(keys)
    assert all(item_rng(*key).integers(2**62) == value for key, value in draws.items())


def test_item_seeds_are_distinct_and_fit_a_torch_generator():
    seeds = {item_seed(0, epoch, index) for epoch in range(20) for index in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**60
    torch.Generator().manual_seed(max(seeds))


def test_a_sample_is_a_function_of_seed_epoch_and_index(photos):
    def sample(seed, key):
        item = DegDataset(photos, add_grain, resolution=32, random_flip=True, seed=seed)[key]
        images = [item[name].numpy().tobytes() for name in ("target", "control")]
        return *images, str(item["degradation"]), item["seed"]

    assert sample(0, (1, 2)) == sample(0, (1, 2))
    for other in ((0, (1, 3)), (1, (1, 2)), (0, (2, 2))):
        assert all(a != b for a, b in zip(sample(0, (1, 2))[1:], sample(*other)[1:], strict=True))


def test_an_index_alone_means_epoch_0(photos):
    dataset = DegDataset(photos, add_grain, resolution=32)
    assert torch.equal(dataset[2]["control"], dataset[2, 0]["control"])
    assert dataset[2]["epoch"] == 0 and dataset[2, 7]["epoch"] == 7
    with pytest.raises(IndexError):
        dataset[5]


def test_flip_leaves_crop_and_degradation_alone(photos):
    plain = DegDataset(photos, add_grain, resolution=32)
    flipped = DegDataset(photos, add_grain, resolution=32, random_flip=True)
    was_flipped = []
    for epoch in range(12):
        a, b = plain[0, epoch], flipped[0, epoch]
        assert a["degradation"] == b["degradation"]
        was_flipped.append(torch.equal(a["target"].flip(2), b["target"]))
        assert was_flipped[-1] or torch.equal(a["target"], b["target"])
    assert 0 < sum(was_flipped) < 12


def test_workers_change_no_sample(photos):
    dataset = DegDataset(photos, add_grain, resolution=32, random_flip=True)

    def batches(workers):
        sampler = BucketBatchSampler(dataset.bucket_of, 2, seed=0)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate_fn)
        return [(batch["index"], batch["target"], batch["control"]) for batch in itertools.islice(loader, 6)]

    for alone, shared in zip(batches(0), batches(2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_global_random_state_is_neither_read_nor_moved(photos):
    dataset = DegDataset(photos, add_grain, resolution=32, random_flip=True)
    torch.manual_seed(0)
    np.random.seed(0)
    first = dataset[1, 1]["control"]
    assert torch.initial_seed() == 0 and np.random.get_state()[2] == 624
    np.random.seed(5)
    assert torch.equal(first, dataset[1, 1]["control"])


# ---- geometry


def test_an_image_of_the_right_size_is_returned_as_it_is():
    image = noise_image(0)
    assert np.array_equal(cover_crop(image, (40, 56), (0.3, 0.9)), image)


@pytest.mark.parametrize("offset", (0.0, 0.2, 0.5, 1.0))
def test_a_crop_at_scale_1_copies_pixels(offset):
    image = noise_image(0, 40, 56)
    crop = cover_crop(image, (40, 40), (offset, offset))
    left = min(int(offset * 17), 16)
    assert np.array_equal(crop, image[:, left:left + 40])


@pytest.mark.parametrize("size", ((48, 48), (96, 32), (32, 96)))
def test_a_circle_stays_a_circle(size):
    y, x = np.mgrid[:200, :300]
    disc = ((y - 100) ** 2 + (x - 150) ** 2 < 40**2) * np.uint8(255)
    crop = cover_crop(np.repeat(disc[..., None], 3, axis=2), size, (0.5, 0.5))[..., 0] > 127
    radius = 40 * max(size[0] / 200, size[1] / 300)
    height, width = crop.any(axis=1).sum(), crop.any(axis=0).sum()
    assert abs(height - 2 * radius) <= 1.5 if 2 * radius < size[0] else height == size[0]
    assert abs(width - 2 * radius) <= 1.5 if 2 * radius < size[1] else width == size[1]


def test_reduction_is_antialiased():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    small = cover_crop(stripes, (32, 32), (0.5, 0.5)).astype(int)
    assert np.abs(small[4:-4, 4:-4] - 127).max() <= 4


def test_random_crops_reach_both_ends_and_center_crops_never_move(tmp_path):
    image = np.zeros((32, 48, 3), np.uint8)
    image[:, :, 0] = np.arange(48)
    write(tmp_path / "a.png", image)
    random, center = (DegDataset(tmp_path, keep, resolution=32, crop=crop) for crop in ("random", "center"))
    lefts = {int(to_uint8(random[0, epoch]["target"])[0, 0, 0]) for epoch in range(400)}
    assert lefts == set(range(17))
    assert {int(to_uint8(center[0, epoch]["target"])[0, 0, 0]) for epoch in range(9)} == {8}


@pytest.mark.parametrize("shape", ((16, 200), (200, 16), (16, 16), (333, 47)))
def test_every_shape_gives_exactly_the_resolution(tmp_path, shape):
    write(tmp_path / "a.png", noise_image(0, *shape))
    item = DegDataset(tmp_path, add_grain, resolution=48)[0, 3]
    assert item["target"].shape == item["control"].shape == (3, 48, 48)


def test_tensors_are_float32_in_minus_1_to_1():
    image = np.array([[[0, 127, 255]]], np.uint8)
    tensor = to_tensor(image)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 1, 1)
    assert tensor.flatten().tolist() == pytest.approx([-1, 127 / 127.5 - 1, 1])


def test_degradation_sees_the_crop_at_training_size(photos):
    seen = []

    def degrade(image, rng):
        seen.append(image.copy())
        return 255 - image, [{"type": "invert"}]

    item = DegDataset(photos, degrade, resolution=32)[0]
    assert seen[0].shape == (32, 32, 3) and seen[0].dtype == np.uint8
    assert np.array_equal(seen[0], to_uint8(item["target"]))
    assert torch.allclose(item["control"], -item["target"], atol=1e-6)
    assert item["degradation"] == [{"type": "invert"}]


# ---- stored pairs


def test_pairs_match_by_relative_path_whatever_the_extension(tmp_path):
    write(tmp_path / "hr" / "a" / "1.png", noise_image(0))
    write(tmp_path / "hr" / "b" / "1.png", noise_image(1))
    write(tmp_path / "lr" / "a" / "1.bmp", noise_image(2))
    write(tmp_path / "lr" / "b" / "1.webp", noise_image(3))
    records = pair_records(tmp_path / "lr", tmp_path / "hr")
    assert [(r.target.parent.name, r.control.parent.name) for r in records] == [("a", "a"), ("b", "b")]


def test_a_suffix_xn_of_the_low_resolution_name_is_allowed(tmp_path):
    for name in ("0001", "photo2x4"):
        write(tmp_path / "hr" / f"{name}.png", noise_image(0, 64, 64))
    write(tmp_path / "lr" / "0001x4.png", noise_image(1, 16, 16))
    write(tmp_path / "lr" / "photo2x4.png", noise_image(1, 16, 16))
    records = pair_records(tmp_path / "lr", tmp_path / "hr")
    assert [(r.target.stem, r.control.stem) for r in records] == [("0001", "0001x4"), ("photo2x4", "photo2x4")]


def test_composed_and_decomposed_accents_match(tmp_path):
    write(tmp_path / "hr" / "caf\u00e9.png", noise_image(0))
    write(tmp_path / "lr" / "cafe\u0301.png", noise_image(0))
    assert len(pair_records(tmp_path / "lr", tmp_path / "hr")) == 1


@pytest.mark.parametrize("side", ("hr", "lr"))
def test_the_same_stem_twice_is_an_error_naming_both(pairs, side):
    write(pairs / side / "1.jpg", noise_image(0))
    with pytest.raises(ValueError, match=r"1\.jpg and 1\.png have the same name"):
        pair_records(pairs / "lr", pairs / "hr")


def test_two_low_resolution_images_of_one_are_an_error(pairs):
    write(pairs / "lr" / "1x2.png", noise_image(0))
    with pytest.raises(ValueError, match="1x?2?.png and 1x2.png are both"):
        pair_records(pairs / "lr", pairs / "hr")


def test_missing_partners_are_an_error_listing_the_first_5(pairs):
    for i in range(10, 17):
        write(pairs / "hr" / f"{i}.png", noise_image(i))
    write(pairs / "lr" / "99.png", noise_image(0))
    with pytest.raises(ValueError, match="8 images have no partner .*allow_missing") as caught:
        pair_records(pairs / "lr", pairs / "hr")
    assert [f"{i}.png" in str(caught.value) for i in (10, 14, 15, 99)] == [True, True, False, False]


def test_allow_missing_skips_them_and_lists_them(pairs):
    write(pairs / "hr" / "9.png", noise_image(9))
    write(pairs / "lr" / "8.png", noise_image(9))
    dataset = DegDataset(pair_records(pairs / "lr", pairs / "hr", allow_missing=True), resolution=32)
    assert len(dataset) == 3
    assert sorted((os.path.basename(path), reason.split()[0]) for path, reason in dataset.unreadable) == [
        ("8.png", "no"), ("9.png", "no")]


def test_a_missing_pair_folder_is_an_error_naming_the_flag(pairs):
    with pytest.raises(FileNotFoundError, match="--lr_root .*nowhere is not a folder"):
        pair_records(pairs / "nowhere", pairs / "hr")


@pytest.mark.parametrize("hr, lr, factor", (
    ((48, 64), (48, 64), 1), ((48, 64), (12, 16), 4), ((48, 64), (12, 17), None), ((48, 64), (96, 128), None),
    ((49, 64), (12, 16), None), ((48, 64), (24, 16), None)))
def test_only_whole_fractions_of_both_sides_can_be_enlarged(hr, lr, factor):
    assert enlargement(lr, hr) == factor


@pytest.mark.parametrize("lr", ((12, 15), (96, 128), (64, 48)))
def test_other_sizes_of_a_pair_are_an_error_naming_both(tmp_path, lr):
    write(tmp_path / "hr" / "a.png", noise_image(0, 48, 64))
    write(tmp_path / "lr" / "a.png", noise_image(0, *lr))
    with pytest.raises(ValueError, match=rf"lr/a.png \({lr[1]}x{lr[0]} px\) .*hr/a.png \(64x48 px\)"):
        DegDataset(pair_records(tmp_path / "lr", tmp_path / "hr"))


@pytest.mark.parametrize("kernel", ("nearest", "bicubic"))
def test_a_whole_fraction_is_enlarged_with_the_named_kernel(tmp_path, kernel):
    low = noise_image(0, 16, 16)
    write(tmp_path / "hr" / "a.png", noise_image(1, 64, 64))
    write(tmp_path / "lr" / "ax4.png", low)
    records = pair_records(tmp_path / "lr", tmp_path / "hr")
    item = DegDataset(records, resolution=64, upscale_kernel=kernel)[0]
    expected = Image.fromarray(low).resize((64, 64), getattr(Image.Resampling, kernel.upper()))
    assert np.array_equal(to_uint8(item["control"]), np.array(expected))


def test_an_unknown_kernel_or_crop_is_an_error(photos):
    with pytest.raises(ValueError, match="--upscale_kernel 'cubic'"):
        DegDataset(photos, keep, upscale_kernel="cubic")
    with pytest.raises(ValueError, match="crop 'left'"):
        DegDataset(photos, keep, crop="left")


def test_both_images_of_a_pair_are_cropped_and_flipped_alike(pairs):
    dataset = DegDataset(pair_records(pairs / "lr", pairs / "hr"), resolution=40, random_flip=True)
    for epoch in range(8):
        item = dataset[epoch % 3, epoch]
        assert np.array_equal(to_uint8(item["control"]), to_uint8(item["target"]) // 2)
        assert item["degradation"] == []


@pytest.mark.parametrize("orientation", (3, 6))
def test_pair_members_agree_after_exif(tmp_path, orientation):
    upright = noise_image(0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = Image.Transpose.ROTATE_180 if orientation == 3 else Image.Transpose.ROTATE_90
    (tmp_path / "hr").mkdir()
    Image.fromarray(upright).transpose(undo).save(tmp_path / "hr" / "a.png", exif=exif)
    write(tmp_path / "lr" / "a.png", upright)
    item = DegDataset(pair_records(tmp_path / "lr", tmp_path / "hr"), resolution=40)[0]
    assert torch.equal(item["target"], item["control"])


# ---- unreadable files


def test_files_with_a_bad_header_are_left_out_and_listed(photos):
    (photos / "empty.png").write_bytes(b"")
    (photos / "text.png").write_text("no image")
    write(photos / "tiny.png", noise_image(0, 1, 1))
    write(photos / "thin.png", noise_image(0, 15, 100))
    write(photos / "huge.png", noise_image(0, 100, 100))
    dataset = DegDataset(photos, add_grain, resolution=32, max_pixels=9999)
    assert len(dataset) == 5
    assert [(os.path.basename(path), reason) for path, reason in sorted(dataset.unreadable)] == [
        ("empty.png", "empty file (0 bytes)"),
        ("huge.png", "100x100 px is more than 9999 pixels; raise --max_pixels"),
        ("text.png", "not an image"),
        ("thin.png", "100x15 px is smaller than 16 px"),
        ("tiny.png", "1x1 px is smaller than 16 px"),
    ]


def test_nothing_readable_is_an_error_with_the_first_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 1 images can be used, the first: .*a.png: empty file"):
        DegDataset(tmp_path, add_grain)


def test_a_truncated_file_is_replaced_and_reported(photos):
    path = photos / "1.png"
    path.write_bytes(path.read_bytes()[:3000])
    dataset = DegDataset(photos, add_grain, resolution=32)
    item = dataset[1, 4]
    assert item["path"].endswith("2.png") and item["index"] == 1
    assert len(item["skipped"]) == 1 and item["skipped"][0].startswith(f"{path}: ")
    assert torch.equal(item["control"], dataset[1, 4]["control"])
    assert dataset[0]["skipped"] == []


def test_a_file_deleted_in_the_middle_of_an_epoch_is_replaced_and_reported(photos):
    dataset = DegDataset(photos, add_grain, resolution=32)
    (photos / "4.png").unlink()
    item = dataset[4]
    assert item["path"].endswith("0.png") and "No such file" in item["skipped"][0]


def test_a_pair_that_changes_its_size_is_replaced_and_reported(pairs):
    dataset = DegDataset(pair_records(pairs / "lr", pairs / "hr"), resolution=32)
    write(pairs / "lr" / "0.png", noise_image(0, 17, 19))
    item = dataset[0]
    assert item["path"].endswith("1.png") and "no longer fit" in item["skipped"][0]


def test_a_replacement_keeps_the_size_and_prefers_the_same_bucket(tmp_path):
    for name, shape in (("0", (32, 64)), ("1", (64, 32)), ("2", (32, 64)), ("3", (64, 32))):
        write(tmp_path / f"{name}.png", noise_image(0, *shape))
    dataset = DegBucketDataset(tmp_path, add_grain, BUCKETS)
    (tmp_path / "0.png").unlink()
    assert dataset[0]["path"].endswith("2.png")
    (tmp_path / "2.png").unlink()
    item = dataset[0]
    assert item["path"].endswith("1.png") and item["target"].shape == (3, 32, 64) and len(item["skipped"]) == 2


def test_all_files_gone_is_an_error_and_no_endless_search(photos):
    dataset = DegDataset(photos, add_grain, resolution=32)
    for path in photos.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="5 images in a row could not be loaded"):
        dataset[0]


def test_the_search_for_a_replacement_is_bounded(photos):
    dataset = DegDataset(folder_records(photos) * 20, add_grain, resolution=32)
    for path in photos.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="32 images in a row"):
        dataset[0]


def test_clean_images_without_degradation_are_an_error(photos):
    with pytest.raises(ValueError, match="--degradation_types"):
        DegDataset(photos)


# ---- imagefolder and hub


def test_an_imagefolder_with_default_columns_loads_offline(imagefolder):
    folder = imagefolder(metadata_row(0), metadata_row(1, prompt=""))
    dataset = DegDataset(hub_records(folder), resolution=40, prompt="default", crop="center")
    assert dataset.is_paired and len(dataset) == 2
    assert [dataset[i]["prompt"] for i in (0, 1)] == ["prompt 0", "default"]
    assert dataset[1]["path"] == f"{folder}[1]"
    assert np.array_equal(to_uint8(dataset[1]["target"]), cover_crop(noise_image(1), (40, 40), (0.5, 0.5)))
    assert np.array_equal(to_uint8(dataset[1]["control"]), to_uint8(dataset[1]["target"]) // 2)


def test_named_columns_win_over_defaults(imagefolder):
    folder = imagefolder(*({"a_file_name": f"degraded/{i}.png", "clean_file_name": f"clean/{i}.png", "text": f"t{i}"}
                           for i in (0, 1)))
    dataset = DegDataset(hub_records(folder, None, "a", "clean", "text"), resolution=40)
    assert np.array_equal(to_uint8(dataset[0]["target"]), to_uint8(dataset[0]["control"]) // 2)
    assert dataset[1]["prompt"] == "t1"


def test_an_imagefolder_of_clean_images_is_degraded_on_the_fly(imagefolder):
    folder = imagefolder(*({"file_name": f"clean/{i}.png"} for i in (0, 1)))
    item = DegDataset(hub_records(folder), add_grain, resolution=32, prompt="p")[0]
    assert item["degradation"][0]["type"] == "grain" and item["prompt"] == "p"


def test_images_stored_as_bytes_load_and_bad_cells_are_listed(tmp_path, monkeypatch):
    import datasets

    good = write(tmp_path / "a.png", noise_image(0)).read_bytes()
    cells = [{"bytes": good, "path": None}, {"bytes": b"text", "path": None}, None]
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": cells}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split, cache_dir, streaming: table)
    dataset = DegDataset(hub_records("some/name"), keep, resolution=40)
    assert len(dataset) == 1 and dataset[0]["target"].shape == (3, 40, 40)
    assert [path for path, _ in dataset.unreadable] == ["some/name[1]", "some/name[2]"]


@pytest.mark.parametrize("arguments, message", (
    ({"image_column": "photo"}, "--image_column photo: .* has the columns clean, degraded, prompt"),
    ({"image_column": "prompt"}, "--image_column prompt: not an image column"),
    ({"cond_image_column": "x"}, "--cond_image_column x: "),
    ({"caption_column": "x"}, "--caption_column x: "),
    ({"caption_column": "degraded"}, "--caption_column degraded: not a column of text"),
))
def test_an_unknown_column_is_an_error_naming_the_flag(imagefolder, arguments, message):
    folder = imagefolder(metadata_row(0), metadata_row(1))
    with pytest.raises(ValueError, match=message):
        hub_records(folder, **arguments)


def test_captions_that_are_numbers_are_an_error_and_those_that_are_all_missing_are_none(imagefolder):
    with pytest.raises(ValueError, match="--caption_column prompt: not a column of text"):
        hub_records(imagefolder(metadata_row(0, prompt=3), metadata_row(1, prompt=4)))
    records = hub_records(imagefolder(metadata_row(0, prompt=None), metadata_row(1, prompt=None)))
    assert [record.prompt for record in records] == [None, None]


def test_no_target_column_is_an_error(imagefolder):
    folder = imagefolder(*({"photo_file_name": f"clean/{i}.png"} for i in (0, 1)))
    with pytest.raises(ValueError, match="--image_column is needed: .* has the columns photo"):
        hub_records(folder)


@pytest.mark.parametrize("line, message", (
    ("{not json", "not JSON"),
    ('["a"]', "not a JSON object"),
    (metadata_row(1, clean_file_name="../../secret.png"), "leaves the folder"),
    (metadata_row(1, clean_file_name="/etc/secret.png"), "leaves the folder"),
    (metadata_row(1, clean_file_name="C:\\secret.png"), "leaves the folder"),
    (metadata_row(1, clean_file_name="clean\\..\\..\\x.png"), "leaves the folder"),
    (metadata_row(1, clean_file_name="clean/7.png"), "does not exist"),
    (metadata_row(1, clean_file_name=3), "not a file name"),
    ({"clean_file_name": "clean/1.png"}, "differ from the first line's"),
))
def test_a_bad_metadata_line_is_an_error_with_its_number(imagefolder, line, message):
    folder = imagefolder(metadata_row(0), line)
    with pytest.raises(ValueError, match=rf"metadata.jsonl, line 2: .*{message}"):
        hub_records(folder)


@pytest.mark.parametrize("line, message", (("", "empty"), ({"prompt": "x"}, "line 1: no key file_name")))
def test_metadata_without_images_is_an_error(imagefolder, line, message):
    with pytest.raises(ValueError, match=message):
        hub_records(imagefolder(line))


def test_a_missing_folder_never_reaches_the_hub(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("called"))
    for name in ("./nowhere", "/nowhere", "~/nowhere", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            hub_records(name)


def test_an_unreachable_hub_is_one_line_with_the_cure(monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"--dataset_name a/b: .*reach the Hub.*local folder"):
        hub_records("a/b")


# ---- buckets


def test_the_default_buckets_are_kontexts():
    assert len(KONTEXT_BUCKETS) == 17
    assert set(KONTEXT_BUCKETS) == {(height, width) for width, height in PREFERRED_KONTEXT_RESOLUTIONS}


@pytest.mark.parametrize("text", ("512:768,1024:1024", "512,768;1024,1024", " 512 : 768 , 1024:1024"))
def test_both_bucket_syntaxes_parse(text):
    assert parse_buckets_string(text) == [(512, 768), (1024, 1024)]


@pytest.mark.parametrize("text", (
    "", "512", "512:", "a:b", "512:768,16", "512:760", "0:16", "16:16,16:16", "-16:16"))
def test_a_bad_bucket_string_is_an_error_naming_the_flag(text):
    with pytest.raises(ValueError, match="--aspect_ratio_buckets"):
        parse_buckets_string(text)


def test_the_nearest_bucket_minimises_the_difference_of_aspects():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(100, 3000, (200, 2)).tolist():
        distances = [abs(height / width - h / w) for h, w in KONTEXT_BUCKETS]
        assert distances[find_nearest_bucket(height, width, KONTEXT_BUCKETS)] == min(distances)


@pytest.mark.parametrize("size, bucket", (((2000, 2000), 2), ((1024, 1024), 2), ((1000, 1000), 1), ((100, 100), 0)))
def test_among_equal_aspects_the_largest_that_needs_no_enlargement_wins(size, bucket):
    assert find_nearest_bucket(*size, [(256, 256), (512, 512), (1024, 1024), (512, 768)]) == bucket


def test_bucket_items_have_their_buckets_size_and_keep_the_aspect(tmp_path):
    shapes = [(100, 50), (70, 70), (50, 120), (48, 90)]
    for i, shape in enumerate(shapes):
        write(tmp_path / f"{i}.png", noise_image(i, *shape))
    dataset = DegBucketDataset(tmp_path, add_grain, BUCKETS, crop="center")
    assert dataset.bucket_of == [0, 1, 2, 2]
    for i, shape in enumerate(shapes):
        item = dataset[i]
        assert item["bucket_idx"] == dataset.bucket_of[i]
        assert item["target"].shape[1:] == item["control"].shape[1:] == BUCKETS[dataset.bucket_of[i]]
        expected = cover_crop(noise_image(i, *shape), BUCKETS[dataset.bucket_of[i]], (0.5, 0.5))
        assert np.array_equal(to_uint8(item["target"]), expected)


# ---- sampler

BUCKET_OF = [0] * 7 + [1] * 2 + [2] * 4
SAMPLER_CASES = pytest.mark.parametrize(
    "bucket_of, batch_size", ((BUCKET_OF, 3), ([0] * 5, 1), ([0, 1], 4), ([0] * 3, 8)))


def draw(count, bucket_of=BUCKET_OF, batch_size=3, seed=0, start=0):
    return list(itertools.islice(BucketBatchSampler(bucket_of, batch_size, seed, start), count))


@SAMPLER_CASES
def test_nothing_is_dropped_and_nothing_drawn_twice(bucket_of, batch_size):
    drawn = [item for batch in draw(400, bucket_of, batch_size) for item in batch]
    assert len(set(drawn)) == len(drawn)
    # All but the last epochs, whose items may still wait for their batch, are complete.
    complete = max(epoch for _, epoch in drawn) - 2 * batch_size
    assert complete > 3
    expected = {(index, epoch) for index in range(len(bucket_of)) for epoch in range(complete)}
    assert expected <= set(drawn)


@SAMPLER_CASES
def test_every_batch_is_full_and_of_one_bucket(bucket_of, batch_size):
    for batch in draw(200, bucket_of, batch_size):
        assert len(batch) == batch_size
        assert len({bucket_of[index] for index, _ in batch}) == 1


@SAMPLER_CASES
def test_a_restart_anywhere_continues_the_straight_run(bucket_of, batch_size):
    straight = draw(60, bucket_of, batch_size)
    for start in (0, 1, 2, 7, 30, 59):
        assert draw(60 - start, bucket_of, batch_size, start=start) == straight[start:]


def test_order_depends_on_the_seed_and_changes_with_the_epoch():
    assert draw(40) == draw(40) != draw(40, seed=1)
    epochs = [[index for index, e in sum(draw(200, [0] * 20, 4), []) if e == epoch] for epoch in range(5)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_buckets_are_mixed_within_an_epoch():
    order = [batch[0][0] // 30 for batch in draw(20, [0] * 30 + [1] * 30, 3)]
    assert order != sorted(order) and set(order) == {0, 1}


def test_a_restart_far_ahead_is_quick_and_loads_nothing():
    sampler = BucketBatchSampler([0] * 3450, 4, 0, start=300_000)
    assert len(next(iter(sampler))) == 4


@pytest.mark.parametrize("processes", (2, 3))
def test_the_shards_of_all_processes_are_the_batches_of_one(processes):
    straight = draw(60)
    for start in (0, 6, 12):
        shards = [
            list(itertools.islice(BatchSamplerShard(BucketBatchSampler(BUCKET_OF, 3, 0, start), processes, rank), 10))
            for rank in range(processes)
        ]
        interleaved = [batch for step in zip(*shards, strict=True) for batch in step]
        assert interleaved == straight[start:start + 10 * processes]


@pytest.mark.parametrize("processes", (1, 2))
def test_accelerates_loader_hands_out_the_same_batches_also_after_a_restart(photos, processes):
    PartialState(cpu=True)
    dataset = DegDataset(photos, add_grain, resolution=32)

    def batches(start, count):
        ranks = []
        for rank in range(processes):
            sampler = BucketBatchSampler(dataset.bucket_of, 2, seed=3, start=start)
            loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_fn)
            loader = prepare_data_loader(loader, torch.device("cpu"), processes, rank, put_on_device=True)
            ranks.append(list(itertools.islice(loader, count)))
        return [batch for step in zip(*ranks, strict=True) for batch in step]

    straight = batches(0, 8)
    pairs = [list(zip(batch["index"].tolist(), batch["epoch"].tolist(), strict=True)) for batch in straight]
    assert pairs == list(itertools.islice(BucketBatchSampler(dataset.bucket_of, 2, seed=3), 8 * processes))
    resumed = batches(3 * processes, 5)
    for a, b in zip(straight[3 * processes:], resumed, strict=True):
        assert torch.equal(a["control"], b["control"]) and a["seed"] == b["seed"]


@pytest.mark.parametrize("arguments, message", ((([], 1, 0), "no images"), (([0], 0, 0), "--train_batch_size 0")))
def test_a_sampler_of_nothing_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        BucketBatchSampler(*arguments)


def test_collate_stacks_tensors_and_lists_the_rest(photos):
    dataset = DegDataset(photos, add_grain, resolution=32, prompt="p")
    batch = collate_fn([dataset[1, 2], dataset[3, 2]])
    assert batch["target"].shape == batch["control"].shape == (2, 3, 32, 32)
    assert batch["index"].tolist() == [1, 3] and batch["epoch"].tolist() == [2, 2]
    assert batch["seed"] == [item_seed(0, 2, 1), item_seed(0, 2, 3)]
    assert {batch[key].dtype for key in ("index", "epoch", "bucket_idx")} == {torch.int64}
    assert batch["prompt"] == ["p", "p"] and batch["skipped"] == [[], []]
    assert [len(degradation) for degradation in batch["degradation"]] == [1, 1]
    assert [os.path.basename(path) for path in batch["path"]] == ["1.png", "3.png"]


# ---- overlap


def test_the_same_content_in_train_and_heldout_is_an_error_naming_the_pair(photos, tmp_path):
    train = sorted(photos.iterdir())
    heldout = [write(tmp_path / "heldout" / f"{i}.png", noise_image(100 + i)) for i in range(3)]
    check_no_overlap(train, heldout)
    copy = tmp_path / "heldout" / "renamed.png"
    copy.write_bytes(train[3].read_bytes())
    with pytest.raises(ValueError, match=r"renamed.png \(held out\) is the same file as .*3.png"):
        check_no_overlap(train, [*heldout, copy])


def test_equal_sizes_with_other_content_are_no_overlap(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"54321")
    check_no_overlap([tmp_path / "a"], [tmp_path / "b"])


# ---- options


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_data_args(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_defaults_and_aliases_of_the_options():
    args = parse("--instance_data_dir", "x", "--use_aspect_ratio_buckets")
    assert args.hr_root == "x" and args.use_bucket_sampler
    assert (args.resolution, args.upscale_kernel, args.max_pixels, args.dataloader_num_workers) == (
        512, "bicubic", 200_000_000, 0)


def test_options_of_a_folder_reach_the_dataset(photos):
    args = parse("--hr_root", photos, "--resolution", 48, "--center_crop", "--random_flip", "--max_pixels", 5000,
                 "--dataset_name", "df2k")
    dataset = dataset_from_args(args, add_grain, prompt="p", seed=7)
    item = dataset[0, 1]
    assert item["target"].shape == (3, 48, 48) and item["prompt"] == "p" and item["seed"] == item_seed(7, 1, 0)
    assert dataset.crop == "center" and dataset.random_flip and dataset.max_pixels == 5000
    assert dataset_from_args(parse("--hr_root", photos), add_grain).crop == "random"


def test_options_of_pairs_reach_the_dataset(tmp_path):
    write(tmp_path / "hr" / "a.png", noise_image(0, 32, 32))
    write(tmp_path / "hr" / "b.png", noise_image(0, 32, 32))
    write(tmp_path / "lr" / "ax2.png", noise_image(1, 16, 16))
    arguments = ["--hr_root", tmp_path / "hr", "--lr_root", tmp_path / "lr", "--resolution", 32]
    with pytest.raises(ValueError, match="--allow_missing"):
        dataset_from_args(parse(*arguments), None)
    dataset = dataset_from_args(parse(*arguments, "--allow_missing", "--upscale_kernel", "nearest"), add_grain)
    assert len(dataset) == 1 and dataset[0]["degradation"] == []
    assert np.array_equal(to_uint8(dataset[0]["control"]), noise_image(1, 16, 16).repeat(2, 0).repeat(2, 1))


def test_options_of_a_named_dataset_reach_its_columns(imagefolder):
    folder = imagefolder(metadata_row(0), metadata_row(1))
    args = parse("--dataset_name", folder, "--image_column", "degraded", "--cond_image_column", "clean",
                 "--caption_column", "prompt", "--resolution", 48)
    item = dataset_from_args(args, None)[0]
    assert np.median(np.abs(to_uint8(item["target"]) - to_uint8(item["control"]) / 2)) <= 0.5
    assert item["prompt"] == "prompt 0"


def test_the_configuration_name_reaches_datasets(monkeypatch):
    import datasets

    seen = SimpleNamespace()

    def load(name, config, split, cache_dir, streaming):
        seen.call = (name, config, split, cache_dir)
        raise FileNotFoundError("stop")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match="stop"):
        args = parse("--dataset_name", "a/b", "--dataset_config_name", "small")
        dataset_from_args(SimpleNamespace(**vars(args), cache_dir="kept"), keep)
    assert seen.call == ("a/b", "small", "train", "kept")


def test_bucket_options_choose_the_bucket_dataset(photos):
    dataset = dataset_from_args(parse("--hr_root", photos, "--use_bucket_sampler"), keep)
    assert isinstance(dataset, DegBucketDataset) and dataset.buckets == KONTEXT_BUCKETS
    dataset = dataset_from_args(parse("--hr_root", photos, "--aspect_ratio_buckets", "32:48,48:32"), keep)
    assert dataset.buckets == [(32, 48), (48, 32)] and dataset[0]["target"].shape == (3, 32, 48)


@pytest.mark.filterwarnings("ignore:Bucket dimension")
@pytest.mark.parametrize("arguments, message", (
    ([], "no images: pass --hr_root"),
    (["--lr_root", "x"], "--lr_root needs --hr_root"),
    (["--hr_root", "nowhere"], "nowhere: no such file or folder"),
    (["--hr_root", "x", "--resolution", "500"], "--resolution 500 must be a positive multiple of 16"),
    (["--hr_root", "x", "--resolution", "0"], "--resolution 0"),
    (["--hr_root", "x", "--max_pixels", "0"], "--max_pixels 0"),
    (["--hr_root", "x", "--dataloader_num_workers", "-1"], "--dataloader_num_workers -1"),
    (["--hr_root", "x", "--aspect_ratio_buckets", "5:5"], "--aspect_ratio_buckets: 5:5"),
))
def test_bad_options_are_one_line_naming_the_flag(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        dataset_from_args(parse(*arguments), keep)
    assert "\n" not in str(caught.value)


# ---- prompts


def test_prompts_are_padded_and_cut_to_the_length():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[pad]": 0, "a": 1, "dog": 2, "[unk]": 3}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", unk_token="[unk]")
    ids = tokenize_prompt(tokenizer, ["a dog", "a a a dog dog dog"], 4)
    assert ids.tolist() == [[1, 2, 0, 0], [1, 1, 1, 2]]
    assert tokenize_prompt(tokenizer, "a dog", 3).tolist() == [[1, 2, 0]]


def test_every_exported_name_exists():
    assert all(getattr(my_dataset, name) for name in my_dataset.__all__)


def test_zoom_crops_a_larger_image_but_never_enlarges_it():
    image = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    native = image[30:90, 50:110]
    assert np.array_equal(cover_crop(image, (60, 60), (0.5, 0.5), zoom=2), native)
    assert np.array_equal(cover_crop(image, (60, 60), (0.5, 0.5), zoom=9), native)
    assert not np.array_equal(cover_crop(image, (60, 60), (0.5, 0.5)), native)
    enlarged = cover_crop(image, (240, 240), (0.5, 0.5))  # too small for the size: as without zoom
    assert np.array_equal(cover_crop(image, (240, 240), (0.5, 0.5), zoom=3), enlarged)


def test_a_forked_loader_does_not_wait_for_the_threads_that_opencv_had_in_the_trainer():
    code = """
import multiprocessing, os, cv2, numpy as np
from my_dataset.dataset_deg_paired import use_one_thread
image = np.zeros((2000, 2000, 3), np.float32)

def load():
    use_one_thread(0)
    cv2.GaussianBlur(image[:64, :64], (0, 0), 2)

cv2.setNumThreads(4)
cv2.GaussianBlur(image, (0, 0), 5)  # the pool
assert len(os.listdir("/proc/self/task")) > 3
for _ in range(10):
    loader = multiprocessing.get_context("fork").Process(target=load)
    loader.start()
    loader.join(20)
    if loader.exitcode != 0:
        loader.kill()
        raise SystemExit("a loader hangs")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

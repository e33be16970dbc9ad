"""Claims about the Qwen-Image recipe's data: captions, sizes, batches, edit pairs, and the check of a folder."""

import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from my_dataset.dataset_deg_bucket import make_loader
from recipes.qwen_image import validate_dataset
from recipes.qwen_image.image_datasets.dataset import (
    CustomImageDataset,
    add_data_args,
    collate_fn,
    dataset_from_args,
    edit_size,
    target_size,
)
from tests.conftest import photograph
from utils.parse import make_parser, run_main

SHAPES = [(64, 96), (96, 64), (80, 80)]


@pytest.fixture
def folder(tmp_path):
    """Folder with images/ 0.png ... 6.png, image i of the grey 30 i and the caption "number i", in three shapes, and
    control_images/ with the same names, in the grey plus 1."""
    for i, (height, width) in zip(range(7), itertools.cycle(SHAPES), strict=False):
        for name, offset in (("images", 0), ("control_images", 1)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(np.full((height, width, 3), 30 * i + offset, np.uint8)).save(tmp_path / name / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"number {i}\n")
    return tmp_path


def batches(dataset, count, batch_size=2, workers=0):
    args = SimpleNamespace(train_batch_size=batch_size, seed=3, dataloader_num_workers=workers)
    return list(itertools.islice(make_loader(dataset, collate_fn, args), count))


def levels(images):
    """(B, 3, H, W) in [-1, 1] of one grey each -> that grey from 0 to 255."""
    return ((images.mean((1, 2, 3)) + 1) * 127.5).round().int().tolist()


def equal_items(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) if torch.is_tensor(one[key]) else one[key] == other[key] for key in one)


@pytest.mark.parametrize("random_ratio", [False, True])
@pytest.mark.parametrize("is_edit", [False, True])
def test_a_batch_has_one_size_and_every_image_its_own_caption_and_control(folder, is_edit, random_ratio):
    dataset = CustomImageDataset(folder / "images", 96, random_ratio=random_ratio, caption_dropout_rate=0, repeats=2,
                                 control_dir=folder / "control_images" if is_edit else None)
    per_epoch = 7 * 2 * (4 if random_ratio else 1)
    assert len(dataset) == per_epoch and len(set(dataset.sizes)) >= 3
    seen = []
    for batch in batches(dataset, per_epoch, workers=2):  # two epochs
        numbers = [int(caption.removeprefix("number ")) for caption in batch["caption"]]
        assert levels(batch["target"]) == [30 * number for number in numbers]
        assert batch["target"].shape[0] == 2 and batch["target"].dtype == torch.float32
        if is_edit:
            assert levels(batch["control"]) == [30 * number + 1 for number in numbers]
        else:
            assert "control" not in batch
        seen += zip(batch["epoch"], batch["index"], numbers, strict=True)
    assert len(set(seen)) == len(seen) == 2 * per_epoch
    assert {number for _, _, number in seen} == set(range(7))


def test_a_batch_has_one_size_of_controls_where_targets_of_one_size_have_different_ones(tmp_path):
    for name, shapes in (("out", [(64, 64)] * 4), ("in", [(64, 64), (64, 128)] * 2)):
        (tmp_path / name).mkdir()
        for i, (height, width) in enumerate(shapes):
            Image.new("RGB", (width, height)).save(tmp_path / name / f"{i}.png")
            (tmp_path / name / f"{i}.txt").write_text("edit")
    dataset = CustomImageDataset(tmp_path / "out", 64, control_dir=tmp_path / "in")
    found = {tuple(batch["control"].shape) for batch in batches(dataset, 6)}
    assert found == {(2, 3, 64, 64), (2, 3, 32, 96)}


def test_an_item_is_a_function_of_seed_epoch_and_index_alone(folder):
    options = {"img_size": 64, "random_ratio": True, "caption_dropout_rate": 0.5}
    dataset, again = (CustomImageDataset(folder / "images", seed=5, **options) for _ in range(2))
    keys = [(index, epoch) for epoch in range(3) for index in range(len(dataset))]
    items = {key: dataset[key] for key in keys}
    for key in reversed(keys):
        assert equal_items(again[key], items[key])
    assert equal_items(dataset[4], items[4, 0])  # an index alone is epoch 0
    other = CustomImageDataset(folder / "images", seed=6, **options)
    assert [other[key]["caption"] for key in keys] != [items[key]["caption"] for key in keys]
    assert len({item["seed"] for item in items.values()}) == len(keys)  # noise differs by item and epoch
    assert all(torch.equal(items[index, 0]["target"], items[index, 2]["target"]) for index in range(len(dataset)))
    for inline, by_workers in zip(batches(dataset, 12), batches(dataset, 12, workers=2), strict=True):
        assert equal_items(inline, by_workers)


def test_captions_are_dropped_in_the_share_asked_for_and_anew_every_epoch(folder):
    def captions(rate):
        dataset = CustomImageDataset(folder / "images", 32, caption_dropout_rate=rate, repeats=10)
        return [[dataset[index, epoch]["caption"] for index in range(len(dataset))] for epoch in range(4)]

    assert sum(epoch.count(" ") for epoch in captions(0)) == 0
    assert sum(epoch.count(" ") for epoch in captions(1)) == 280
    drawn = captions(0.25)
    assert 45 < sum(epoch.count(" ") for epoch in drawn) < 95  # 70 expected, standard deviation 7
    assert len({tuple(epoch) for epoch in drawn}) == 4


def test_what_can_be_asked_of_the_text_encoder_is_known_before_training(folder):
    (folder / "images" / "6.txt").write_text("number 0")
    for rate in (0, 0.5):
        dataset = CustomImageDataset(folder / "images", 96, caption_dropout_rate=rate, random_ratio=True,
                                     control_dir=folder / "control_images")
        listed = dataset.captions()
        pairs = {(caption, control.shape, control.numpy().tobytes()) for caption, control in dataset.text_inputs()}
        asked = [dataset[index, epoch] for epoch in range(12) for index in range(len(dataset))]
        assert {item["caption"] for item in asked} == set(listed) and len(set(listed)) == len(listed)
        assert {(item["caption"], item["control"].shape, item["control"].numpy().tobytes()) for item in asked} == pairs
    assert listed == [f"number {i}" for i in range(6)] + [" "]


@pytest.mark.parametrize(("shape", "size"), [
    ((1000, 1500), (672, 1024)), ((1500, 1000), (1024, 672)), ((512, 512), (1024, 1024)), ((9, 16), (576, 1024)),
    ((3, 4), (768, 1024)), ((3000, 4000), (768, 1024)), ((20, 4000), (32, 1024)),
])
def test_the_long_side_is_img_size_and_both_are_floored_to_32(shape, size):
    assert target_size(*shape, 1024) == size


def test_sizes_of_an_img_size_that_is_no_multiple_of_32_are_floored_too():
    assert target_size(600, 1000, 1000) == (576, 992)


@pytest.mark.parametrize(("shape", "size"), [
    ((1000, 1500), (832, 1248)), ((1500, 1000), (1248, 832)), ((512, 512), (1024, 1024)), ((9, 16), (768, 1376))])
def test_edit_sizes_have_the_area_of_img_size_squared_as_the_edit_pipelines_have_it(shape, size):
    assert edit_size(*shape, 1024) == size
    assert edit_size(16, 160, 32) == (32, 96)  # no side of 0


def test_random_ratio_gives_every_image_once_in_each_ratio_an_epoch(folder):
    dataset = CustomImageDataset(folder / "images", 128, random_ratio=True, caption_dropout_rate=0)
    items = [dataset[index] for index in range(len(dataset))]
    for number, (height, width) in zip(range(7), itertools.cycle(SHAPES), strict=False):
        sizes = [tuple(item["target"].shape[1:]) for item in items if item["caption"] == f"number {number}"]
        assert sorted(sizes) == sorted([target_size(height, width, 128), (64, 128), (128, 128), (96, 128)])
    order = [index for batch in batches(dataset, 28, batch_size=1) for index in batch["index"]]
    assert sorted(order) == list(range(28)) and order != list(range(28))


def test_images_are_cropped_at_the_centre_and_not_stretched(tmp_path):
    image = photograph(size=(120, 128))  # 32 more columns than rows after the crop of 24 rows
    Image.fromarray(image).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    dataset = CustomImageDataset(tmp_path, 128)
    expected = torch.from_numpy(image[12:108].copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(dataset[0]["target"], expected)


def test_the_orientation_of_a_photograph_is_applied(tmp_path):
    upright = Image.fromarray(photograph(size=(96, 64)))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("a")
    upright.save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("b")
    dataset = CustomImageDataset(tmp_path, 96)
    assert dataset[0]["target"].shape == (3, 96, 64) and torch.equal(dataset[0]["target"], dataset[1]["target"])


def test_target_and_control_of_one_shape_are_cropped_alike(tmp_path):
    image = Image.fromarray(photograph(size=(90, 130)))
    for name, version in (("out", ImageOps.invert(image)), ("in", image)):
        (tmp_path / name).mkdir()
        version.save(tmp_path / name / "a.b.png")  # a stem with a dot
    (tmp_path / "out" / "a.b.txt").write_text("invert it")
    dataset = CustomImageDataset(tmp_path / "out", 96, random_ratio=True, control_dir=tmp_path / "in")
    for index in range(4):
        item = dataset[index]
        torch.testing.assert_close(item["target"], -item["control"], rtol=0, atol=2.1 / 255)


def test_captions_are_read_from_text_or_json(folder):
    for i in range(7):
        (folder / "images" / f"{i}.json").write_text(json.dumps({"caption": f" json {i} "}))
    read = {kind: [CustomImageDataset(folder / "images", 32, kind, caption_dropout_rate=0)[i]["caption"]
                   for i in range(7)] for kind in ("txt", "json")}
    assert read == {kind: [f"{word} {i}" for i in range(7)] for kind, word in (("txt", "number"), ("json", "json"))}


@pytest.mark.parametrize("is_edit", [False, True])
def test_text_files_beside_json_captions_are_not_read(folder, is_edit):
    for i in range(7):
        (folder / "images" / f"{i}.json").write_text(json.dumps({"caption": "json"}))
    (folder / "images" / "0.txt").write_bytes("caf\u00e9".encode("latin-1"))
    control_dir = folder / "control_images" if is_edit else None
    dataset = CustomImageDataset(folder / "images", 32, "json", control_dir=control_dir)
    assert {example.prompt for example in dataset.examples} == {"json"}
    with pytest.raises(ValueError, match="0.txt: not UTF-8"):
        CustomImageDataset(folder / "images", 32, "txt", control_dir=control_dir)


def remove_captions(images):
    (images / "2.txt").unlink()
    (images / "4.txt").write_text(" \n")


def save_twice(images):
    Image.new("RGB", (64, 64)).save(images / "3.JPG")


def save_no_json(images):
    (images / "1.json").write_text("{")


def save_other_json(images):
    for i in range(7):
        (images / f"{i}.json").write_text(json.dumps({"caption": "a"} if i else ["caption"]))


@pytest.mark.parametrize(("spoil", "options", "message"), [
    (remove_captions, {}, r"2 images have no caption: \S*2.png, \S*4.png; write a .txt file beside each"),
    (save_twice, {}, r"3\.\w+ and 3\.\w+ have the same name apart from the extension"),
    (save_no_json, {"caption_type": "json"}, r"1.json: not JSON"),
    (save_other_json, {"caption_type": "json"}, r"1 images have no caption: \S*0.png; write a .json"),
    (lambda images: (images / "5.png").unlink(), {"control_dir": "control_images"}, "1 images .* no partner: 5"),
    (None, {"control_dir": "nowhere"}, "--control_dir .*nowhere: no such folder"),
    (None, {"img_size": 31}, "--img_size 31: give 32 or more"),
    (None, {"repeats": 0}, "--repeats 0"),
    (None, {"caption_dropout_rate": 1.5}, "--caption_dropout_rate 1.5"),
    (None, {"caption_type": "csv"}, "--caption_type csv: use one of txt, json"),
])
def test_what_is_missing_or_wrong_is_named_before_training(folder, spoil, options, message):
    if spoil:
        spoil(folder / "images")
    if "control_dir" in options:
        options = options | {"control_dir": folder / options["control_dir"]}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CustomImageDataset(folder / "images", **options)


def test_an_unreadable_image_is_left_out_or_replaced_and_named(folder):
    (folder / "images" / "1.png").write_bytes(b"no image")
    whole = (folder / "images" / "3.png").read_bytes()
    dataset = CustomImageDataset(folder / "images", 64, caption_dropout_rate=0, max_pixels=64 * 96)
    (path, reason), *large = dataset.unreadable
    assert path == str(folder / "images" / "1.png") and reason == "not an image"
    assert len(large) == 2 and all("more than 6144 pixels" in reason for _, reason in large)  # 80 x 80
    (folder / "images" / "3.png").write_bytes(whole[:60])
    item = dataset[1]
    assert dataset.examples[1].name.endswith("3.png") and "3.png" in item["skipped"][0]
    # 4.png is the next, 6.png the next of its size; the caption comes with the image
    assert item["caption"] == "number 6" and levels(item["target"][None]) == [180]


def test_the_options_give_the_dataset_that_they_name(folder):
    parser = make_parser("test")
    add_data_args(parser)
    parser.add_argument("--seed", type=int, default=0)
    argv = ["--img_dir", str(folder / "images"), "--control_dir", str(folder / "control_images"), "--img_size", "64",
            "--caption_dropout_rate", "1", "--random_ratio", "--repeats", "3", "--seed", "9", "--max_pixels", "6144"]
    dataset = dataset_from_args(parser.parse_args(argv))
    by_hand = CustomImageDataset(folder / "images", 64, "txt", True, 1.0, folder / "control_images", 9, 3, 6144)
    assert len(dataset) == len(by_hand) == 5 * 4 * 3 and dataset.sizes == by_hand.sizes
    assert equal_items(dataset[7, 1], by_hand[7, 1]) and dataset[7, 1]["caption"] == " "


# The check of a folder


def check(monkeypatch, capsys, *argv):
    """(exit code, lines) of validate_dataset."""
    monkeypatch.setattr(sys, "argv", ["validate_dataset", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        run_main(validate_dataset.main)
    captured = capsys.readouterr()
    return stopped.value.code, (captured.out + captured.err).splitlines()


def test_a_sound_folder_is_counted_by_size(folder, monkeypatch, capsys):
    code, lines = check(monkeypatch, capsys, "--path", folder / "images", "--img_size", 64, "--repeats", 2)
    assert code == 0
    assert lines == ["7 images", "samples an epoch by size:", "  64x32 px: 6", "  32x64 px: 4", "  64x64 px: 4",
                     "0 faults, 0 notes"]
    code, lines = check(monkeypatch, capsys, "--path", folder / "images", "--control_dir", folder / "control_images",
                        "--img_size", 64, "--random_ratio")
    assert code == 0 and lines[:4] == ["7 images, 7 controls", "samples an epoch by size:", "  64x64 from 64x64 px: 21",
                                       "  96x64 from 96x64 px: 7"]


def cut_off(images):
    path = images / "1.png"
    Image.fromarray(photograph(size=(64, 96))).save(path)
    path.write_bytes(path.read_bytes()[:4000])


def save_tiny(images):
    Image.new("RGB", (8, 64)).save(images / "0.png")


@pytest.mark.parametrize(("spoil", "found"), [
    (remove_captions, ["2.png: no 2.txt beside it", "4.txt: empty", "training refuses this: 2 images have no caption"]),
    (save_twice, ["3.*: 2 images have this name", "training refuses this"]),
    (cut_off, ["1.png: "]),
    (save_tiny, ["0.png: smaller than 16 px"]),
    (lambda images: (images / "5.png").write_text("text"), ["5.png: not an image"]),
    (lambda images: (images / "5.png").unlink(), ["training refuses this: 1 images of"]),
    (lambda images: (images.parent / "control_images" / "5.png").unlink(), ["training refuses this: 1 images of"]),
    (lambda images: (images.parent / "control_images" / "5.png").write_text("text"), ["5.png: not an image"]),
    (lambda images: (images / "6.txt").write_bytes(b"\xff\xfe\xfd"), ["6.txt: not UTF-8", "training refuses this"]),
])
def test_every_fault_is_named_and_the_code_is_2(folder, monkeypatch, capsys, spoil, found):
    spoil(folder / "images")
    code, lines = check(monkeypatch, capsys, "--path", folder / "images", "--control_dir", folder / "control_images",
                        "--img_size", 64)
    faults = [line for line in lines if line.startswith("fault: ")]
    assert code == 2 and len(faults) == len(found)
    assert all(any(text in fault for fault in faults) for text in found)
    assert lines[-1].startswith(f"{len(found)} faults")


def test_what_training_takes_all_the_same_is_a_note(folder, monkeypatch, capsys):
    images = folder / "images"
    (images / "9.txt").write_text("whose photograph is 9.heic")
    (images / "0.png").write_bytes((images / "3.png").read_bytes())
    code, lines = check(monkeypatch, capsys, "--path", images, "--img_size", 96)
    notes = [line for line in lines if line.startswith("note: ")]
    assert code == 0 and lines[-1] == "0 faults, 3 notes"
    assert notes[0].endswith("9.txt: a caption without image")
    assert notes[1].endswith(f"3.png: the same file as {images / '0.png'}")
    small = ", ".join(f"{images / name} ({size} px)" for name, size in (("2.png", "80x80"), ("5.png", "80x80")))
    assert notes[2] == f"note: 2 images are enlarged in training: {small}"


def test_a_wrong_folder_is_one_line(tmp_path, monkeypatch, capsys):
    code, lines = check(monkeypatch, capsys, "--path", tmp_path / "nowhere")
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and "nowhere" in lines[0]

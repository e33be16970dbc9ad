"""Claims about the DreamBooth dataset: captions, pairs, augmentation, class images."""

import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from my_dataset import dataset_dreambooth as data
from my_dataset.dataset_deg_bucket import BucketBatchSampler, make_loader
from tests.conftest import photograph
from utils.parse import make_parser

SIZE = [(32, 32)]


@pytest.fixture
def pairs(tmp_path):
    """Folder with out/ (images of one own grey each, with captions that name it), in/ and more/ (their references,
    the grey plus 1 and plus 2), of several shapes."""
    shapes = itertools.cycle([(40, 40), (40, 64), (64, 40)])
    for i, (height, width) in zip(range(7), shapes, strict=False):
        for folder, offset in (("out", 0), ("in", 1), ("more", 2)):
            (tmp_path / folder).mkdir(exist_ok=True)
            image = np.full((height, width, 3), 30 * i + offset, np.uint8)
            Image.fromarray(image).save(tmp_path / folder / f"{i}.png")
        (tmp_path / "out" / f"{i}.txt").write_text(f"number {i}\n")
    return tmp_path


def parse(*argv):
    parser = make_parser("test")
    data.add_data_args(parser)
    parser.add_argument("--cache_latents", action="store_true")
    parser.add_argument("--cache_dir")
    parser.add_argument("--num_validation_images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation_image", nargs="+", default=[])
    return parser.parse_args([str(argument) for argument in argv])


def levels(images):
    """(B, 3, H, W) in [-1, 1] of one grey each -> that grey from 0 to 255."""
    return ((images.mean((1, 2, 3)) + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize("own_size", [[], ["--cond_resolution", "32"]], ids=["cropped as the target", "own size"])
def test_captions_and_references_never_meet_another_image_over_three_reshuffled_epochs(pairs, own_size):
    args = parse("--instance_data_dir", pairs / "out", "--cond_data_dir", pairs / "in", pairs / "more",
                 "--aspect_ratio_buckets", "32,32;32,48;48,32", "--repeats", 2, "--random_flip", *own_size)
    dataset = data.dataset_from_args(args)
    options = SimpleNamespace(train_batch_size=3, seed=4, dataloader_num_workers=2)
    seen, orders = [], []
    for batch in itertools.islice(make_loader(dataset, data.collate_fn, options), 3 * 14 // 3):
        number = [int(prompt.removeprefix("number ")) for prompt in batch["prompt"]]
        assert levels(batch["target"]) == [30 * n for n in number]
        assert levels(batch["references"][0]) == [30 * n + 1 for n in number]
        assert levels(batch["references"][1]) == [30 * n + 2 for n in number]
        assert [path.endswith(f"{n}.png") for path, n in zip(batch["path"], number, strict=True)] == [True] * 3
        seen += zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)
        orders.append(number)
    assert len(set(seen)) == len(seen) and {epoch for epoch, _ in seen} >= {0, 1, 2}
    assert orders[:4] != orders[4:8]


def test_no_item_is_dropped_whatever_buckets_and_batch(pairs):
    dataset = data.dataset_from_args(parse("--instance_data_dir", pairs / "out", "--aspect_ratio_buckets",
                                           "32,32;32,48;48,32"))
    assert sorted(set(dataset.size_of)) == [((32, 32), ()), ((32, 48), ()), ((48, 32), ())]
    drawn = [index for batch in itertools.islice(BucketBatchSampler(dataset.bucket_of, 5, 0), 14) for index, _ in batch]
    assert set(drawn) == set(range(7))  # three buckets of 2 and 3 images, batches of 5


def test_a_pairs_crop_and_mirroring_are_the_same_and_drawn_anew_every_epoch(tmp_path):
    image = Image.fromarray(photograph(size=(48, 80)))
    for folder, version in (("out", ImageOps.invert(image)), ("in", image)):
        (tmp_path / folder).mkdir()
        version.save(tmp_path / folder / "a.png")
    flags = ["--instance_data_dir", tmp_path / "out", "--cond_data_dir", tmp_path / "in", "--instance_prompt", "p"]
    dataset = data.dataset_from_args(parse(*flags, "--resolution", 32, "--random_flip"))
    items = [dataset[0, epoch] for epoch in range(8)]
    for item in items:  # the inverse of the reference, pixel for pixel: both had the same crop and mirroring
        torch.testing.assert_close(item["target"], -item["references"][0], rtol=0, atol=2.1 / 255)
    assert len({item["target"].numpy().tobytes() for item in items}) > 4
    assert torch.equal(dataset[0, 3]["target"], items[3]["target"])
    fixed = data.dataset_from_args(parse(*flags, "--resolution", 32, "--random_flip", "--cache_latents"))
    assert all(torch.equal(fixed[0, epoch]["target"], items[0]["target"]) for epoch in range(4))
    assert len({fixed[0, epoch]["seed"] for epoch in range(4)}) == 4  # noise is never fixed
    plain = data.dataset_from_args(parse(*flags, "--resolution", 32, "--center_crop"))
    assert torch.equal(plain[0, 0]["target"], plain[0, 1]["target"])


def test_mirroring_happens_to_half_of_the_samples(tmp_path):
    ramp = np.tile(np.arange(0, 64, 2, dtype=np.uint8)[None, :, None], (32, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    dataset = data.dataset_from_args(parse("--instance_data_dir", tmp_path, "--instance_prompt", "p", "--resolution",
                                           32, "--random_flip"))
    first = [dataset[0, epoch]["target"][0, 0, 0].item() for epoch in range(200)]
    assert set(first) == {-1.0, first[first.index(max(first))]} and 70 < sum(value == -1 for value in first) < 130


def test_a_reference_of_its_own_size_is_whole_and_keeps_its_shape(pairs):
    dataset = data.dataset_from_args(parse("--instance_data_dir", pairs / "out", "--cond_data_dir", pairs / "in",
                                           "--resolution", 32, "--cond_resolution", 48))
    shapes = {tuple(dataset[i]["references"][0].shape[1:]) for i in range(3)}
    assert shapes == {(48, 48), (32, 64), (64, 32)}
    assert all(dataset[i]["target"].shape == (3, 32, 32) for i in range(3))
    assert data.reference_size(3000, 2000, 512) == (624, 416)  # 3:2, about 512^2 px, multiples of 16
    assert len(set(dataset.bucket_of)) == 3  # a batch never mixes them


def test_captions_come_from_text_files_metadata_or_a_column_and_the_prompt_fills_gaps(pairs, tmp_path):
    (pairs / "out" / "3.txt").write_text("")
    (pairs / "out" / "4.txt").unlink()
    dataset = data.dataset_from_args(parse("--instance_data_dir", pairs / "out", "--instance_prompt", "filler",
                                           "--resolution", 32))
    assert [dataset[i]["prompt"] for i in range(7)] == [
        "number 0", "number 1", "number 2", "filler", "filler", "number 5", "number 6"]
    with pytest.raises(ValueError, match="3.png has no caption; pass --instance_prompt"):
        data.dataset_from_args(parse("--instance_data_dir", pairs / "out", "--resolution", 32))

    rows = [{"file_name": f"{i}.png", "cond_file_name": f"../in/{i}.png"[3:], "wish": f"do {i}"} for i in range(3)]
    table = tmp_path / "table"
    (table / "in").mkdir(parents=True)
    for i in range(3):
        (table / f"{i}.png").write_bytes((pairs / "out" / f"{i}.png").read_bytes())
        (table / "in" / f"{i}.png").write_bytes((pairs / "in" / f"{i}.png").read_bytes())
    (table / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--cond_image_column", "cond", "--caption_column", "wish", "--resolution", 32]
    for source in ("--instance_data_dir", "--dataset_name"):
        dataset = data.dataset_from_args(parse(source, table, *flags))
        items = [dataset[i] for i in range(3)]
        assert [item["prompt"] for item in items] == ["do 0", "do 1", "do 2"]
        assert [levels(item["references"][0][None]) for item in items] == [[1], [31], [61]]
    # As in the official script: a dataset without --caption_column is trained on one prompt.
    (table / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{i}.png", "text": f"t {i}"}) + "\n"
                                                  for i in range(3)))
    one = data.dataset_from_args(parse("--dataset_name", table, "--instance_prompt", "one", "--resolution", 32))
    assert {one[i]["prompt"] for i in range(3)} == {"one"}
    own = data.dataset_from_args(parse("--dataset_name", table, "--resolution", 32))
    assert [own[i]["prompt"] for i in range(3)] == ["t 0", "t 1", "t 2"]


def test_caption_dropout_empties_its_share_whatever_else_is_drawn(pairs):
    flags = ["--instance_data_dir", pairs / "out", "--resolution", 32]
    plain, dropped = (data.dataset_from_args(parse(*flags, "--caption_dropout", share)) for share in (0, 0.25))
    keys = [(i, epoch) for i in range(7) for epoch in range(60)]
    pairs_of_items = [(plain[key], dropped[key]) for key in keys]
    assert all(torch.equal(a["target"], b["target"]) and a["seed"] == b["seed"] for a, b in pairs_of_items)
    share = sum(b["prompt"] == "" for _, b in pairs_of_items) / len(keys)
    assert 0.19 < share < 0.31 and all(b["prompt"] in ("", a["prompt"]) for a, b in pairs_of_items)


def test_an_epoch_holds_every_image_as_often_as_repeats_says(pairs):
    dataset = data.dataset_from_args(parse("--instance_data_dir", pairs / "out", "--resolution", 32, "--repeats", 3))
    prompts = [dataset[i]["prompt"] for i in range(len(dataset))]
    assert len(prompts) == 21 and all(prompts.count(f"number {i}") == 3 for i in range(7))
    assert not torch.equal(torch.tensor(dataset[0]["seed"]), torch.tensor(dataset[7]["seed"]))


def test_with_class_images_an_epoch_holds_all_of_both_and_the_class_comes_last_in_the_batch(pairs, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    for i in range(9):
        Image.new("RGB", (40, 40), (200 + i, 200 + i, 200 + i)).save(folder / f"{i}.png")
    paths, missing = data.plan_class_images(folder, 9)
    assert not missing
    args = parse("--instance_data_dir", pairs / "out", "--resolution", 32, "--class_prompt", "a thing",
                 "--caption_dropout", 0)
    dataset = data.dataset_from_args(args, paths)
    assert len(dataset) == 9
    items = [dataset[i] for i in range(9)]
    assert {item["prompt"] for item in items} == {f"number {i}" for i in range(7)}
    assert [levels(item["class_target"][None]) for item in items] == [[200 + i] for i in range(9)]
    batch = data.collate_fn(items[:3])
    assert levels(batch["target"]) == [0, 30, 60, 200, 201, 202]
    assert batch["prompt"] == ["number 0", "number 1", "number 2"] + ["a thing"] * 3
    assert len(set(batch["seed"])) == 6 and len(batch["path"]) == 6 and batch["index"].tolist() == [0, 1, 2]


def test_class_images_that_are_missing_are_planned_and_those_of_the_user_count_first(tmp_path):
    folder = tmp_path / "class"
    paths, missing = data.plan_class_images(folder, 3)
    assert paths == missing == [folder / f"class_0000{i}.png" for i in range(3)]
    folder.mkdir()
    (folder / "notes.md").write_text("no image")
    for name in ("mine.jpg", "class_00001.png"):
        Image.new("RGB", (40, 40)).save(folder / name)
    paths, missing = data.plan_class_images(folder, 4)
    assert [path.name for path in paths] == ["class_00000.png", "class_00001.png", "class_00002.png", "mine.jpg"]
    assert [path.name for path in missing] == ["class_00000.png", "class_00002.png"]
    for path in missing:  # once they are there, a resumed run has the same list in the same order
        Image.new("RGB", (40, 40)).save(path)
    assert data.plan_class_images(folder, 4) == (paths, [])
    assert data.plan_class_images(folder, 1) == (paths[:1], [])


def test_a_file_that_fails_later_is_replaced_with_its_own_caption_and_named(pairs):
    dataset = data.dataset_from_args(parse("--instance_data_dir", pairs / "out", "--resolution", 32))
    (pairs / "out" / "2.png").unlink()
    item = dataset[2]
    assert item["prompt"] != "number 2" and levels(item["target"][None]) == [30 * int(item["prompt"][-1])]
    assert len(item["skipped"]) == 1 and "2.png" in item["skipped"][0]


@pytest.mark.parametrize("flags, words", {
    "--resolution 32": "--instance_data_dir",
    "--instance_data_dir out --dataset_name x": "one of them",
    "--instance_data_dir nothing": "no such folder",
    "--instance_data_dir table --caption_column age": "--caption_column age: not a column of text",
    "--instance_data_dir out --resolution 40": "multiple of 16",
    "--instance_data_dir out --cond_data_dir lone": "2 images of .* have no partner: 3, 4",
    "--instance_data_dir out --cond_image_column a": "metadata.jsonl",
    "--instance_data_dir out --caption_column a": "metadata.jsonl",
    "--dataset_name out --cond_data_dir in": "--cond_image_column",
    "--instance_data_dir table --cond_data_dir in": "--cond_image_column cond",
    "--dataset_name table --image_column photo": "--image_column photo",
    "--dataset_name table --cond_image_column other": "--cond_image_column other",
    "--instance_data_dir latin": "latin1.txt: not UTF-8",
    "--instance_data_dir out --aspect_ratio_buckets 33,32": "--aspect_ratio_buckets",
}.items())
def test_bad_input_is_one_line_that_names_the_flag(pairs, flags, words):
    for folder in ("lone", "latin", "table"):
        (pairs / folder).mkdir()
    for i in (0, 1, 2, 5, 6):
        (pairs / "lone" / f"{i}.jpg").write_bytes((pairs / "in" / f"{i}.png").read_bytes())
    for name in ("latin/latin1.png", "table/0.png"):
        (pairs / name).write_bytes((pairs / "in" / "0.png").read_bytes())
    (pairs / "latin" / "latin1.txt").write_bytes(b"caf\xe9")
    (pairs / "table" / "metadata.jsonl").write_text('{"file_name": "0.png", "age": 3}\n')
    names = {"out", "in", "lone", "nothing", "latin", "table"}
    argv = [pairs / word if word in names else word for word in flags.split()]
    with pytest.raises((ValueError, OSError), match=words):
        data.dataset_from_args(parse(*argv, "--instance_prompt", "p"))


def test_held_out_edits_are_centre_crops_with_their_own_captions_and_start_from_no_training_file(pairs):
    training = data.dataset_from_args(parse("--instance_data_dir", pairs / "out", "--cond_data_dir", pairs / "in",
                                            "--resolution", 32))
    held = pairs / "held"
    for folder, offset in (("out", 3), ("in", 4)):
        (held / folder).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 40), (30 * i + offset,) * 3).save(held / folder / f"{i}.png")
    flags = ["--heldout_data_dir", held / "out", "--heldout_cond_data_dir", held / "in", "--instance_prompt", "p",
             "--resolution", 32, "--num_validation_images", 2]
    items = data.heldout_from_args(parse(*flags), training)
    assert [levels(item["target"][None]) for item in items] == [[3], [33]]
    assert [levels(item["references"][0][None]) for item in items] == [[4], [34]]
    rows = [{"file_name": f"{i}.png", "cond_file_name": f"in/{i}.png", "text": f"own {i}"} for i in range(3)]
    shutil.copytree(held / "out", held / "table")
    shutil.copytree(held / "in", held / "table" / "in")
    (held / "table" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tabled = data.heldout_from_args(parse("--heldout_data_dir", held / "table", "--cond_image_column", "cond",
                                          *flags[4:]), training)
    assert [item["prompt"] for item in tabled] == ["own 0", "own 1"]
    assert [levels(item["references"][0][None]) for item in tabled] == [[4], [34]]
    assert items[0]["prompt"] == "p" and data.heldout_from_args(parse("--resolution", 32), training) == []
    with pytest.raises(ValueError, match="--heldout_cond_data_dir"):
        data.heldout_from_args(parse(*flags[:2], "--resolution", 32), training)
    (pairs / "table").mkdir()
    shutil.copytree(pairs / "in", pairs / "table" / "in")
    shutil.copytree(pairs / "out", pairs / "table", dirs_exist_ok=True)
    rows = [{"file_name": f"{i}.png", "cond_file_name": f"in/{i}.png"} for i in range(7)]
    (pairs / "table" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = data.dataset_from_args(parse("--dataset_name", pairs / "table", "--cond_image_column", "cond",
                                         "--instance_prompt", "p", "--resolution", 32))
    assert len(data.heldout_from_args(parse(*flags), table)) == 2
    (held / "in" / "0.png").write_bytes((pairs / "in" / "5.png").read_bytes())
    with pytest.raises(ValueError, match="row 5 of the dataset .training."):
        data.heldout_from_args(parse(*flags), table)
    with pytest.raises(ValueError, match="is the same file as"):
        data.heldout_from_args(parse(*flags), training)


def test_validation_references_keep_their_shape_within_the_training_size(tmp_path):
    Image.fromarray(photograph(size=(90, 60))).save(tmp_path / "a.png")
    image, = data.load_validation_references(parse("--validation_image", tmp_path / "a.png", "--resolution", 64))
    assert image.shape == (1, 3, 78, 52) and -1 <= image.min() < image.max() <= 1

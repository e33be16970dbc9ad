"""Tar shards, read where they lie, and streams: what is read, in which order, and what is refused."""

import io
import itertools
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from bench import waiting
from my_dataset import streaming
from my_dataset.dataset_deg_bucket import make_loader
from my_dataset.dataset_deg_paired import (
    DegDataset,
    add_data_args,
    collate_fn,
    dataset_from_args,
    folder_records,
    image_size,
    read,
)
from my_dataset.degradations import make_degrader
from my_dataset.streaming import BLOCK, LANES, StreamBatchSampler, add_stream_args, check_shards
from my_dataset.tar_shards import column_name, tar_records
from tests.conftest import photograph
from utils.parse import make_parser

NOISE = make_degrader("noise")


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def crop(i):
    return photograph(size=(256, 256))[4 * i : 4 * i + 40, 160 - 4 * i : 208 - 4 * i]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """(folder of 5 tars, {name of a photograph: its pixels}): 2, 3, 4, 5 and 6 photographs."""
    folder, pixels = tmp_path_factory.mktemp("shards"), {}
    for shard in range(5):
        names = [f"photo_{len(pixels) + i:02}" for i in range(shard + 2)]
        pixels |= {name: crop(len(pixels) + i) for i, name in enumerate(names)}
        write_tar(folder / f"part-{shard}.tar", {f"{name}.png": png(pixels[name]) for name in names})
    return folder, pixels


def parse(*argv, output_dir="."):
    parser = make_parser("test")
    add_data_args(parser)
    add_stream_args(parser)
    args = parser.parse_args([str(word) for word in ("--resolution", 32, *argv)])
    return args.__class__(**vars(args), output_dir=str(output_dir), train_batch_size=2, seed=3)


def dataset(*argv, output_dir="."):
    args = parse(*argv, output_dir=output_dir)
    return dataset_from_args(args, NOISE, "restore", args.seed), args


def place(stream, index):
    """What the sample is called that an index stands for."""
    return list(stream.records(index >> 32))[index & (2**32 - 1)].name


def order(stream, folder, batches, start=0, batch_size=2):
    """[[(index, epoch), ...]] of a sampler's batches, with what each sample is called."""
    sampler = StreamBatchSampler(stream, batch_size, 3, start, folder)
    return [[(index, epoch, records[0].name) for index, epoch, records in batch]
            for batch in itertools.islice(sampler, batches)]


@pytest.mark.parametrize(("extension", "column"), [
    ("jpg", "image"), ("JPG", "image"), ("clean.png", "clean"), ("degraded.webp", "degraded"), ("txt", "prompt"),
    ("caption.txt", "caption"), ("json", "json"), ("cls", "cls"), ("clean", "clean")])
def test_a_file_of_a_sample_is_named_by_what_follows_the_first_dot(extension, column):
    assert column_name(extension) == column


def test_images_in_tars_are_the_same_samples_as_in_a_folder(shards, tmp_path):
    folder, pixels = shards
    for name, image in pixels.items():
        (tmp_path / f"{name}.png").write_bytes(png(image))
    loose, (tarred, _) = DegDataset(folder_records(tmp_path), NOISE, 32, seed=3), dataset("--dataset_name", folder)
    assert len(tarred) == len(loose) == len(pixels) == tarred.images
    for i in (0, 7, 19):
        one, other = loose[i, 2], tarred[i, 2]
        assert torch.equal(one["target"], other["target"]) and torch.equal(one["control"], other["control"])
        assert Path(one["path"]).stem == Path(other["path"]).name


def test_a_caption_column_of_files_that_are_no_text_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": png(crop(0)), "1.json": b"{}", "2.png": png(crop(1))})
    with pytest.raises(ValueError, match="--caption_column json: not a column of text"):
        tar_records(tmp_path, caption_column="json")


def test_pairs_and_prompts_in_tars_stay_together_whatever_their_order(tmp_path):
    content = {f"dir/{i}.{name}": png(crop(i) // (1 + (name == "degraded.png"))) for i in (0, 1)
               for name in ("clean.png", "degraded.png")} | {f"dir/{i}.txt": f"text {i}\n".encode() for i in (0, 1)}
    write_tar(tmp_path / "a.tar", dict(reversed(content.items())))
    records = {record.name: record for record in tar_records(tmp_path)}
    assert sorted(records) == [f"{tmp_path}/a.tar/dir/{i}" for i in (0, 1)]
    data, _ = dataset("--dataset_name", tmp_path, "--center_crop")
    for i in range(2):
        item = data[i]
        assert item["prompt"] == f"text {Path(item['path']).name}" and data.is_paired
        assert (item["control"] + 1).mean() == pytest.approx(float((item["target"] + 1).mean()) / 2, rel=0.02)


def test_the_header_of_an_image_in_a_tar_is_read_without_the_rest_of_it(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    write_tar(tmp_path / "a.tar", {"x.png": png(noise)})
    (record,) = tar_records(tmp_path)

    places = []

    def measure(file, max_pixels, name):
        size = image_size(file, max_pixels, name)
        places.append(file.tell())
        return size

    assert read(record.target, 10**6, "x", measure) == (512, 512)
    assert record.target.size > 700_000 and places[0] < 70_000


def test_a_damaged_image_in_a_tar_is_left_out_by_name_and_a_missing_half_too(tmp_path):
    write_tar(tmp_path / "a.tar", {"good.clean.png": png(crop(0)), "good.degraded.png": png(crop(0)),
                                   "text.clean.png": b"no image", "text.degraded.png": png(crop(1)),
                                   "half.clean.png": png(crop(2))})
    data, _ = dataset("--dataset_name", tmp_path)
    assert len(data) == 1
    reasons = {Path(path).name: reason for path, reason in data.unreadable}
    assert reasons == {"text": "not an image", "half": "no degraded"}


def test_a_prompt_that_is_not_utf8_costs_its_own_sample_only_and_only_where_it_is_used(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": png(crop(0)), "a.txt": "caf\u00e9".encode("latin-1"),
                                   "b.png": png(crop(1)), "b.txt": b"text", "b.note.txt": b"\xff"})
    data, _ = dataset("--dataset_name", tmp_path)
    assert [record.prompt for record in data.records] == ["text"]
    ((path, reason),) = data.unreadable
    assert Path(path).name == "a" and reason.startswith("a.txt is not UTF-8")


def test_a_second_file_for_the_same_image_of_a_sample_is_a_fault_with_its_name(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.jpg": png(crop(0)), "a.png": png(crop(1)), "b.png": png(crop(2))})
    data, _ = dataset("--dataset_name", tmp_path)
    assert [Path(record.name).name for record in data.records] == ["b"]
    assert data.unreadable == [(f"{tmp_path}/a.tar/a", "a.png is one more image; keep one")]


@pytest.mark.parametrize("content", [b"\x1f\x8b" + bytes(600), b"short"])
def test_a_tar_that_is_compressed_or_no_tar_is_refused_by_name(content, tmp_path):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar: no sound tar without compression"):
        dataset("--dataset_name", tmp_path)


def test_an_archive_that_goes_away_while_training_makes_an_unreadable_image(shards, tmp_path):
    write_tar(tmp_path / "a.tar", {"x.png": png(crop(0))})
    data, _ = dataset("--dataset_name", tmp_path)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ValueError, match="No such file"):
        data[0]


# --- streams


@pytest.fixture(scope="module")
def stream(shards):
    return dataset("--dataset_name", shards[0], "--streaming")[0].stream


def test_a_streamed_sample_is_that_of_its_file_degraded_by_its_own_seed(shards, tmp_path):
    folder, pixels = shards
    data, args = dataset("--dataset_name", folder, "--streaming", "--center_crop", output_dir=tmp_path)
    assert data.images is None and str(data.stream) == f"5 streamed shards of {folder}"
    batch = next(iter(make_loader(data, collate_fn, args)))
    loose = DegDataset([record for shard in range(5) for record in data.stream.records(shard)], NOISE, 32,
                       crop="center", seed=3)
    names = [record.name for record in loose.records]
    for i, path in enumerate(batch["path"]):
        assert torch.equal(batch["target"][i], loose[names.index(path)]["target"])
        assert not torch.equal(batch["target"][i], batch["control"][i])
        assert place(data.stream, batch["index"][i].item()) == path
    assert batch["prompt"] == ["restore"] * 2 and len(set(batch["seed"])) == 2


def test_every_epoch_of_a_stream_is_every_sample_once_in_another_order(stream, tmp_path):
    seen = sum(order(stream, tmp_path, 120), [])
    epochs = [[index for index, epoch, _ in seen if epoch == number] for number in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [(shard << 32) + i for shard in range(5) for i in range(shard + 2)]
    assert epochs[0] != epochs[1]
    assert all(place(stream, index) == name for index, _, name in seen)


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("start", [1, 5, 33])
def test_a_stream_goes_on_exactly_where_it_was_whether_its_shards_are_known_or_not(start, noted, stream, tmp_path):
    straight = order(stream, tmp_path, 50)
    assert len((tmp_path / "shard_lengths_0.txt").read_text().splitlines()) == 5
    if not noted:
        (tmp_path / "shard_lengths_0.txt").write_text("0 ")  # what a kill leaves
    assert order(stream, tmp_path, 50 - start, start) == straight[start:]


def test_shards_whose_length_is_known_are_not_read_again(stream, tmp_path, monkeypatch):
    order(stream, tmp_path, 60)
    opened, records = [], stream.records
    monkeypatch.setattr(stream, "records", lambda shard: opened.append(shard) or records(shard))
    order(stream, tmp_path, 1, start=56)  # of about 120 samples, the last ones
    assert 1 <= len(opened) <= 4


def test_notes_on_the_shards_of_an_earlier_run_are_forgotten_at_the_start_of_a_new_one(tmp_path):
    def write(images):
        mixed_tars(tmp_path, [["png"] * images] * 4)
        return dataset("--dataset_name", tmp_path, "--streaming")[0].stream

    order(write(8), tmp_path, 30)
    (tmp_path / "shard_lengths_3.txt").write_text("0 8\n1 8\n")  # of a process that there is no more
    stream = write(5)
    straight = order(stream, tmp_path, 40)
    assert order(stream, tmp_path, 20, start=20) == straight[20:]


def test_a_note_that_a_kill_has_cut_does_not_spoil_the_next_one(stream, tmp_path):
    straight = order(stream, tmp_path, 50)
    notes = tmp_path / "shard_lengths_0.txt"
    notes.write_text(notes.read_text()[:4] + "1")
    order(stream, tmp_path, 30, start=20)
    assert order(stream, tmp_path, 10, start=40) == straight[40:]
    assert {tuple(map(int, line.split())) for line in notes.read_text().splitlines()} == {(i, i + 2) for i in range(5)}


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_read_the_batches_of_one_each_shard_in_one_place(processes, stream, tmp_path, monkeypatch):
    whole = order(stream, tmp_path, 24)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    shards = []
    for rank in range(processes):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        sampler = StreamBatchSampler(stream, 2, 3, 0, tmp_path)
        assert sampler.lanes == LANES
        batches = list(itertools.islice(sampler, 24))
        for number, batch in enumerate(batches):
            if number % processes == rank:
                assert [(index, epoch, records[0].name) for index, epoch, records in batch] == whole[number]
            else:
                assert batch == [None, None]
        shards.append({index >> 32 for batch in batches for key in batch if key for index, epoch, _ in [key]
                       if epoch == 0})
    assert sum(map(len, shards)) == len(set.union(*shards)) == 5


def test_fewer_shards_than_processes_are_refused(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 6)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    message = "5 streamed shards of .* for 6 processes; store at least one shard for each"
    with pytest.raises(ValueError, match=message):
        StreamBatchSampler(stream, 2, 3, 0, tmp_path)
    with pytest.raises(ValueError, match=message):
        check_shards(stream, 6)
    check_shards(stream, 5)


def test_a_block_of_a_shard_is_shuffled_and_kept_to_itself(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 3)
    rows = [index & (2**32 - 1) for batch in order(stream, tmp_path, 40) for index, epoch, _ in batch
            if epoch == 0 and index >> 32 == 4]
    assert sorted(rows[:3]) == [0, 1, 2] and sorted(rows[3:]) == [3, 4, 5] and BLOCK > 3
    assert rows != list(range(6))


def test_a_streamed_image_that_cannot_be_decoded_is_replaced_by_the_next_and_named(tmp_path):
    cut = png(crop(1))[:-600]
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", {"a.png": png(crop(shard)), "b.png": cut, "c.png": png(crop(2 + shard))})
    data, args = dataset("--dataset_name", tmp_path, "--streaming", output_dir=tmp_path)
    batches = list(itertools.islice(iter(make_loader(data, collate_fn, args)), 6))
    skipped = sum((sum(batch["skipped"], []) for batch in batches), [])
    assert len(skipped) >= 2 and all(".tar/b: " in text for text in skipped)
    assert not any(path.endswith("/b") for batch in batches for path in batch["path"])


def mixed_tars(folder, extensions):
    """A tar per entry of `extensions`, a list of lists, with an image per extension in it."""
    for shard, kinds in enumerate(extensions):
        write_tar(folder / f"{shard}.tar", {f"{shard}-{i:02}.{kind}": png(crop(i)) for i, kind in enumerate(kinds)})


@pytest.mark.parametrize("extensions", [
    [["jpg"] * 8 + ["png"] * 4], [["jpg"] * 3, ["JPG"] * 3], [["png", "jpg"] * 3], [[], ["png", "webp"]]])
def test_a_stream_has_every_image_that_the_index_has_whatever_its_type_and_name(extensions, tmp_path):
    mixed_tars(tmp_path, extensions)
    data, _ = dataset("--dataset_name", tmp_path, "--streaming")
    streamed = [record for shard in range(len(extensions)) for record in data.stream.records(shard)]
    assert len(streamed) == sum(map(len, extensions)) and not any(record.fault for record in streamed)
    assert streamed == tar_records(tmp_path)


def test_streamed_samples_without_an_image_are_named_and_replaced_however_many_follow_each_other(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", {"a.png": png(crop(shard))} | {f"{i}.txt": b"text" for i in range(9)})
    data, args = dataset("--dataset_name", tmp_path, "--streaming", output_dir=tmp_path)
    batches = list(itertools.islice(iter(make_loader(data, collate_fn, args)), 10))
    skipped = sum((sum(batch["skipped"], []) for batch in batches), [])
    assert len(set(skipped)) == 18 and all(text.endswith(": no image") for text in skipped)
    assert all(path.endswith("/a") for batch in batches for path in batch["path"])


def test_a_tar_that_has_one_image_of_a_sample_twice_is_no_sample_of_a_stream_either(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.jpg": png(crop(0)), "a.png": png(crop(1)), "b.png": png(crop(2))})
    assert dataset("--dataset_name", tmp_path, "--streaming")[0].records[0].name.endswith("/b")


@pytest.mark.parametrize(("more", "message"), [
    (["--use_bucket_sampler"], "square; leave out --use_bucket_sampler"),
    (["--caption_column", "prompt"], "leave out --caption_column"),
    (["--image_column", "photo"], r"--image_column photo: .* has the columns image$"),
])
def test_what_a_stream_cannot_do_is_refused_with_the_flag(more, message, shards):
    with pytest.raises(ValueError, match=message):
        dataset("--dataset_name", shards[0], "--streaming", *more)


def test_parquet_shards_with_pairs_are_streamed_too(tmp_path):
    for shard in range(2):
        rows = [{"bytes": png(crop(2 * shard + i)), "path": None} for i in range(2)] + [None]
        table = datasets.Dataset.from_dict({"clean": rows, "degraded": rows, "label": range(3)})
        features = {"clean": datasets.Image(), "degraded": datasets.Image(), "label": datasets.Value("int64")}
        table.cast(datasets.Features(features)).to_parquet(tmp_path / f"{shard}.parquet")
    data, args = dataset("--dataset_name", tmp_path, "--streaming", output_dir=tmp_path)
    assert data.is_paired and data.stream.shards == 2
    batches = list(itertools.islice(iter(make_loader(data, collate_fn, args)), 6))
    for batch in batches:  # degraded is the same image, and was not degraded again
        assert torch.equal(batch["target"], batch["control"])
    skipped = {text for batch in batches for texts in batch["skipped"] for text in texts}
    assert skipped == {f"{tmp_path}[{shard}][2]: column clean is empty" for shard in range(2)}
    with pytest.raises(ValueError, match="label is not an image column"):
        dataset("--dataset_name", tmp_path, "--streaming", "--image_column", "label")


def test_the_share_of_waiting_is_a_mean_over_the_steps_after_the_first_ones(tmp_path, monkeypatch):
    waiting.write_images(tmp_path)
    args = SimpleNamespace(resolution=32, batch=1, steps=2)
    data, _ = dataset("--dataset_name", tmp_path / "tars")
    assert len(data) == len(list((tmp_path / "photos").iterdir())) >= waiting.SHARDS

    def train(command, **options):
        rows = [(9.0, 9.0)] * waiting.FIRST_STEPS + [(2.0, 0.1), (4.0, 0.3)]
        names = ("seconds_per_step", "data_seconds_per_step")
        lines = [json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows]
        (Path(command[command.index("--output_dir") + 1]) / "metrics.jsonl").write_text("".join(lines))
        assert command[command.index("--max_train_steps") + 1] == str(len(rows))

    monkeypatch.setattr(waiting.subprocess, "run", train)
    assert waiting.measure(args, 2, ["--dataset_name", "tars"], tmp_path) == pytest.approx((3.0, 0.2))


def test_streaming_without_a_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--streaming reads --dataset_name"):
        dataset("--hr_root", tmp_path, "--streaming")

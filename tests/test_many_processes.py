"""Two and four processes (gloo) on one machine: the same numbers as one, nothing twice, a split model, and the configs
that start them.

Starting processes takes most of the time, so one launch of two and one of four do several jobs each
(tests/process_worker.py). `accelerate launch --cpu --num_processes 2` would run one process in silence."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from safetensors.torch import load_file

import test_deg_lora_flux_kontext as test_script
import train_deg_lora_flux_kontext as script
import train_dreambooth_lora_flux_kontext as dreambooth
from tests.conftest import PROJECT_ROOT, photograph
from utils import flux, run, sharding
from utils.lora import LORA_FILE

FLAGS = ("--resolution 32 --train_batch_size 1 --max_sequence_length 8 --rank 4 --report_to none --max_train_steps 4 "
         "--checkpointing_steps 2 --start_noise 0.5 --lora_dropout 0.2 --logging_steps 1 --validation_steps 4 "
         "--num_inference_steps 1 --degradation_types noise").split()
SHARDS, SAMPLES = 4, 3
TRAINER, TESTER = "train_deg_lora_flux_kontext", "test_deg_lora_flux_kontext"


def job(name, argv, more, environment=None, copy=None):
    return {"script": name, "argv": [str(word) for word in (*argv, *more)], "environment": environment or {},
            "copy": copy}


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Folder of SHARDS tars in webdataset's layout, with SAMPLES photographs each, all different."""
    folder = tmp_path_factory.mktemp("tars")
    image = photograph(size=(256, 256))
    for shard in range(SHARDS):
        with tarfile.open(folder / f"photos-{shard}.tar", "w") as archive:
            for i in range(shard * SAMPLES, (shard + 1) * SAMPLES):
                content = io.BytesIO()
                Image.fromarray(image[12 * i : 12 * i + 48, 190 - 12 * i : 254 - 12 * i]).save(content, "PNG")
                member = tarfile.TarInfo(f"photo_{i:02}.png")
                member.size = content.tell()
                content.seek(0)
                archive.addfile(member, content)
    return folder


@pytest.fixture(scope="module")
def flags(tiny_model, tars, photos):
    return ["--pretrained_model_name_or_path", tiny_model, "--dataset_name", tars, "--heldout_root", photos / "heldout",
            *FLAGS]


@pytest.fixture(scope="module")
def sampling(tiny_model, tiny_lora):
    return ["--pretrained_model_name_or_path", tiny_model, "--lora", tiny_lora, "--num_inference_steps", "1"]


@pytest.fixture(scope="module")
def scoring(sampling, photos):
    return [*sampling, "--clean", photos / "train", "--degradation_types", "noise", "--max_images", 5, "--metrics",
            "psnr", "--grid_images", 2, "--no-nlm_row", "--no-bilateral_row"]


@pytest.fixture(scope="module")
def runs(flags, sampling, scoring, photos, tmp_path_factory):
    """Folder with two/, what two processes do: train straight, resumed and split, plan, score; and four/, what four do:
    train on a stream, straight, resumed and split, and restore a folder. printed.txt: what both print."""
    folder = tmp_path_factory.mktemp("runs")
    two, four = folder / "two", folder / "four"
    stream = [*flags, "--streaming"]

    def resumed(path, of):
        return {"more": ("--output_dir", path, "--resume_from_checkpoint", "latest"),
                "copy": [str(of / "checkpoint-2"), str(path / "checkpoint-2")]}

    fsdp = {"ACCELERATE_USE_FSDP": "true"}
    zero3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    (folder / "jobs.json").write_text(json.dumps({2: [
        job(TRAINER, flags, ("--output_dir", two / "straight")),
        job(TRAINER, flags, **resumed(two / "resumed", two / "straight")),
        job(TRAINER, flags, ("--output_dir", two / "split"), environment=fsdp),
        job(TRAINER, flags, **resumed(two / "split-resumed", two / "split"), environment=fsdp),
        job(TRAINER, flags, ("--output_dir", two / "dry", "--dry_run")),
        job(TESTER, scoring, ("--output", two / "scores")),
    ], 4: [
        job(TRAINER, stream, ("--output_dir", four / "straight")),
        job(TRAINER, [*stream, "--dataloader_num_workers", 1], **resumed(four / "resumed", four / "straight")),
        job(TRAINER, [*stream, "--gradient_checkpointing"], ("--output_dir", four / "split"), environment=zero3),
        job(TESTER, sampling, ("--input", photos / "train", "--output", four / "restored")),
    ]}))
    result = subprocess.run([sys.executable, "-m", "tests.process_worker", str(folder / "jobs.json")],
                            cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "printed.txt").write_text(result.stdout)
    return folder


@pytest.fixture(scope="module")
def two(runs):
    return runs / "two"


@pytest.fixture(scope="module")
def four(runs):
    return runs / "four"


def lora(folder):
    return load_file(folder / LORA_FILE)


def rows(folder, name):
    """The metrics.jsonl values of `name`."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def recorded(folder):
    """What each process noted in its micro-steps."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("batches_*.json"))]


def samples(folder):
    """All (index, epoch) that any process trained on."""
    return [tuple(sample) for process in recorded(folder) for step in process for sample in step["samples"]]


@pytest.mark.parametrize(("processes", "more"), [(2, []), (4, ["--streaming"])])
def test_one_process_and_several_train_on_the_same_numbers(processes, more, request, flags, tmp_path):
    folder = request.getfixturevalue({2: "two", 4: "four"}[processes]) / "straight"
    args = script.parse_args([*map(str, flags), *more, "--gradient_accumulation_steps", str(processes),
                              "--output_dir", str(tmp_path / "one")])
    script.main(args)
    one, several = lora(tmp_path / "one"), lora(folder)
    assert one.keys() == several.keys()
    assert all(torch.allclose(one[key], several[key], atol=2e-6) for key in one)
    assert rows(tmp_path / "one", "loss/flow") == pytest.approx(rows(folder, "loss/flow"), rel=1e-5)
    assert rows(tmp_path / "one", "validation/psnr") == pytest.approx(rows(folder, "validation/psnr"), rel=1e-5)
    assert json.loads((folder / "checkpoint-2" / "state.json").read_text())["identity"]["processes"] == processes


def test_no_sample_of_an_epoch_is_trained_on_twice_and_each_by_one_process(two, four):
    for folder, processes in ((two, 2), (four, 4)):
        seen = samples(folder / "straight")
        assert len(recorded(folder / "straight")) == processes and len(seen) == 4 * processes
        assert len(set(seen)) == len(seen)
    # indexed: 8 of 12 images. streamed: 4 lanes of 3 images are through their first epoch after 12 of 16 samples
    assert len({index for index, _ in samples(two / "straight")}) == 8
    assert Counter(epoch for _, epoch in samples(four / "straight")) == {0: 12, 1: 4}
    shards = [{index >> 32 for step in process for index, epoch in step["samples"] if epoch == 0}
              for process in recorded(four / "straight")]
    assert sorted(shards, key=min) == [{0}, {1}, {2}, {3}]


@pytest.mark.parametrize("name", ["straight", "resumed", "split"])
def test_the_lora_is_the_same_on_all_ranks_in_every_step(name, two, four):
    for folder in (two, four):
        hashes = [[step["lora"] for step in process] for process in recorded(folder / name)]
        assert all(process == hashes[0] for process in hashes) and len(set(hashes[0])) == len(hashes[0]) > 1


def test_a_resumed_run_equals_the_straight_one_to_the_bit_and_reads_the_samples_that_it_lacked(two, four):
    for folder in (two, four):
        assert (folder / "resumed" / LORA_FILE).read_bytes() == (folder / "straight" / LORA_FILE).read_bytes()
        assert recorded(folder / "resumed") == [process[2:] for process in recorded(folder / "straight")]


def test_a_split_transformer_trains_validates_and_resumes_as_a_whole_one_to_the_bit(two, four):
    assert (two / "split" / LORA_FILE).read_bytes() == (two / "straight" / LORA_FILE).read_bytes()
    assert (two / "split-resumed" / LORA_FILE).read_bytes() == (two / "straight" / LORA_FILE).read_bytes()
    assert all(torch.allclose(value, lora(four / "straight")[key], atol=2e-6)  # its blocks are recomputed
               for key, value in lora(four / "split").items())
    for name in ("loss/flow", "validation/psnr", "validation/loss"):
        assert rows(two / "split", name) == rows(two / "straight", name)
    pictures = [two / name / "validation" / "step-000004.png" for name in ("split", "straight")]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_every_rank_of_a_split_transformer_holds_its_part_of_the_frozen_weights(two, four):
    for folder, processes in ((two, 2), (four, 4)):
        whole = recorded(folder / "straight")[0][0]["frozen"]
        parts = [process[0]["frozen"] for process in recorded(folder / "split")]
        assert sum(parts) == whole and max(parts) < 1.2 * whole / processes
    assert "DeepSpeed ZeRO-3: the frozen weights are split" in (four.parent / "printed.txt").read_text()


def test_a_folder_restored_on_four_processes_is_each_image_once_and_equal_to_one_process(four, sampling, photos,
                                                                                         tmp_path):
    argv = [*sampling, "--input", photos / "train", "--output", tmp_path / "one"]
    test_script.main(test_script.parse_args(list(map(str, argv))))
    names = sorted(path.name for path in (tmp_path / "one").iterdir() if path.name.startswith("photo_"))
    assert len(names) == 12 and names == sorted(path.name for path in (four / "restored").glob("photo_*"))
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (four / "restored" / name).read_bytes()
    assert (four.parent / "printed.txt").read_text().count("6 restored, 0 already there, 0 failed") == 1


def test_scores_on_two_processes_equal_those_of_one(two, scoring, tmp_path):
    test_script.main(test_script.parse_args(list(map(str, [*scoring, "--output", tmp_path]))))
    for name in ("scores.csv", "grid.png"):
        assert (tmp_path / name).read_bytes() == (two / "scores" / name).read_bytes()
    one, several = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, two / "scores"))
    assert several.pop("arguments").pop("output") != one.pop("arguments").pop("output") and several == one


def test_a_dry_run_says_what_all_processes_do_together_and_writes_nothing(two):
    printed = (two.parent / "printed.txt").read_text()
    assert printed.count("dry run") == 1
    assert "1 images x 1 micro-steps x 2 processes = 2 a step" in printed and "4, 0.67 epochs" in printed
    assert not [path for path in (two / "dry").iterdir() if not path.name.startswith("batches_")]


@pytest.mark.parametrize("module", [script, dreambooth])
def test_a_dry_run_loads_no_model(module, tiny_model, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flux, "load_models", None)
    monkeypatch.setattr(flux, "encode_prompts", None)
    argv = ["--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", str(photos / "train"), "--resolution",
            "32", "--instance_prompt", "a photo", "--report_to", "none", "--output_dir", str(tmp_path), "--dry_run"]
    assert module.main(module.parse_args([*argv, *["--degradation_types", "noise"] * (module is script)])) is None
    printed = capsys.readouterr().out
    assert "images       6" in printed and "rank" in printed and not list(tmp_path.iterdir())


def test_a_stream_with_fewer_shards_than_processes_is_refused_in_the_dry_run(tiny_model, photos, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        tar.add(photos / "train" / "photo_0.png", "a.png")
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    args = script.parse_args(["--pretrained_model_name_or_path", tiny_model, "--dataset_name", str(tmp_path),
                              *"--streaming --max_train_steps 1 --validation_steps 1 --resolution 32 --dry_run".split(),
                              "--degradation_types", "noise", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="--streaming: 1 streamed shards of .* for 2 processes"):
        script.main(args)


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, False), ({"ACCELERATE_USE_FSDP": "true"}, True), ({"ACCELERATE_USE_FSDP": "false"}, False),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, True),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, False)])
def test_configs_that_split_frozen_weights_are_known_and_kept_from_accelerate(environment, expected, monkeypatch):
    for name in (*sharding.SWITCHES, "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sharding.take_over() is expected
    assert not set(sharding.SWITCHES) & set(os.environ)


def test_a_script_that_cannot_split_its_model_refuses_a_config_that_does(monkeypatch, tmp_path, flags):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = script.parse_args([*map(str, flags), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=r"trains whole copies; use --config_file configs/accelerate/ddp\.yaml"):
        run.make_accelerator(args)


CONFIGS = {"one_gpu": ("NO", 1, 1), "ddp": ("MULTI_GPU", 2, 1), "fsdp2": ("FSDP", 2, 1),
           "multi_node": ("MULTI_GPU", 16, 2), "deepspeed_zero2": ("DEEPSPEED", 2, 1),
           "deepspeed_zero3": ("DEEPSPEED", 2, 1)}


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_our_configs_as_they_are_meant(name):
    path = PROJECT_ROOT / "configs" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.num_processes, config.num_machines) == CONFIGS[name]
    args = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
    assert args.training_script == "script.py"


def test_every_config_is_tested():
    assert {path.stem for path in (PROJECT_ROOT / "configs" / "accelerate").glob("*.yaml")} == set(CONFIGS)

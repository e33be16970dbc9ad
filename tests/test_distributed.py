"""Two processes (gloo) on one machine."""

import json
import shutil
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

import train_deg_lora_flux_kontext as script
import train_dreambooth_lora_flux_kontext as dreambooth
from tests.conftest import PROJECT_ROOT, TORCHRUN, run_on_two_processes
from utils import checkpoint
from utils.lora import LORA_FILE

FLAGS = ("--resolution 32 --train_batch_size 1 --max_sequence_length 8 --rank 4 --report_to none --max_train_steps 4 "
         "--checkpointing_steps 2 --start_noise 0.5 --lora_dropout 0.2 --logging_steps 1").split()


@pytest.fixture(scope="module")
def flags(tiny_model, photos):
    return ["--pretrained_model_name_or_path", tiny_model, "--hr_root", str(photos / "train"), *FLAGS]


@pytest.fixture(scope="module")
def two_processes(flags, tmp_path_factory):
    """Output folder of a straight run on two processes."""
    folder = tmp_path_factory.mktemp("two") / "straight"
    launch(flags, folder)
    return folder


def launch(flags, folder, *more, script="train_deg_lora_flux_kontext.py"):
    run_on_two_processes(script, *flags, "--output_dir", folder, *more)


def test_resuming_on_another_number_of_processes_is_refused(flags, two_processes, tmp_path):
    shutil.copytree(two_processes / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"processes \(was 2, now 1\)"):
        script.main(script.parse_args([*flags, "--output_dir", str(tmp_path / "resumed"),
                                       "--resume_from_checkpoint", "latest"]))


def test_sigterm_to_the_launcher_saves_on_all_ranks_before_the_end(flags, tmp_path):
    out = tmp_path / "stopped"
    command = [*TORCHRUN, "train_deg_lora_flux_kontext.py", *flags, "--output_dir", str(out), "--max_train_steps",
               "100000", "--checkpointing_steps", "0", "--dataloader_num_workers", "1"]
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.2)
    process.terminate()
    assert process.wait(60) != 0
    (step, path), = checkpoint.list_checkpoints(out)
    assert step >= 1 and checkpoint.fault(path) is None


def test_two_processes_share_captions_cache_and_class_images_of_a_subject(tiny_model, photos, tmp_path):
    """The official script fills its caches from the whole loader on every rank and reads them with a sharded one, so
    that every rank trains on the same part. Here an epoch is every image once, each with its own caption."""
    folder = tmp_path / "subject"
    shutil.copytree(photos / "train", folder)
    for path in folder.iterdir():
        path.with_suffix(".txt").write_text(f"a photo of {path.stem}")
    flags = ["--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", str(folder), "--cache_latents",
             "--with_prior_preservation", "--class_data_dir", str(tmp_path / "class"), "--class_prompt", "thing",
             "--num_class_images", "5", *("--resolution 32 --train_batch_size 1 --max_sequence_length 8 --report_to "
             "none --num_train_epochs 1 --checkpointing_steps 2 --lr_warmup_steps 0 --logging_steps 1").split()]
    launch(flags, tmp_path / "two", script="train_dreambooth_lora_flux_kontext.py")
    assert sorted(path.name for path in (tmp_path / "class").iterdir()) == [f"class_0000{i}.png" for i in range(5)]
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    # 6 images of the subject and 5 of its class, each with one crop: every one was trained on
    assert len(list((tmp_path / "two" / "latent_cache").glob("*.safetensors"))) == 11
    args = dreambooth.parse_args([*flags, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "one")])
    dreambooth.main(args)
    one, two = (load_file(tmp_path / name / LORA_FILE) for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[key], two[key], atol=2e-6) for key in one)

    shutil.copytree(tmp_path / "two" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    launch(flags, tmp_path / "resumed", "--resume_from_checkpoint", "latest",
           script="train_dreambooth_lora_flux_kontext.py")
    assert (tmp_path / "resumed" / LORA_FILE).read_bytes() == (tmp_path / "two" / LORA_FILE).read_bytes()

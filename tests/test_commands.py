"""The shell scripts as users start them: both training commands and the default job run shortened, with this Python's
packages; set-up runs with stand-ins for Python, uv and df."""

import csv
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from PIL import Image
from safetensors import safe_open

from tests.conftest import PROJECT_ROOT

LORA_FILE = "pytorch_lora_weights.safetensors"
SHORT = ["--max_train_steps", "2", "--rank", "4", "--max_sequence_length", "16", "--resolution", "32",
         "--dataloader_num_workers", "0"]
TOOLS = ("bash", "dirname", "cmp", "df", "awk", "head", "tail", "tee", "grep", "cp", "mkdir", "chmod")


def bash(script, *arguments, folder=PROJECT_ROOT, **variables):
    environment = os.environ | {"KONTEXT_PYTHON": sys.executable} | variables
    for name in ("MODEL_NAME", "HR_ROOT", "HELDOUT_ROOT", "OUTPUT_DIR", "PERCEPTUAL", "NUM_PROCESSES"):
        if name not in variables:
            environment.pop(name, None)
    return subprocess.run(["bash", str(PROJECT_ROOT / script), *arguments], env=environment, cwd=folder,
                          capture_output=True, text=True)


def trained_args(run, output):
    assert run.returncode == 0, run.stderr[-3000:]
    with safe_open(output / LORA_FILE, "pt") as file:
        assert any(file.get_tensor(name).any() for name in file.keys() if "lora_B" in name)  # it learned something
    return json.loads((output / "args.json").read_text())


def expect(actual, **wanted):
    assert {name: actual[name] for name in wanted} == wanted


def assert_refused(run, *words):
    """Exit code 2 and one line, which holds `words`."""
    assert run.returncode == 2, run.stderr
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), run.stderr
    for word in words:
        assert word in lines[0]


def test_default_job_trains_scores_and_says_where_everything_lies(tmp_path):
    output = tmp_path / "out"
    run = bash("run_scripts.sh", *SHORT, "--degradation_types", "noise", "--noise_level", "0.2",
               folder=tmp_path, OUTPUT_DIR=str(output), TEST_OPTIONS="--crop_px 32 --crops_per_image 2")
    expect(trained_args(run, output), base_model_id="tiny-kontext", start_noise="0", rank=4)

    report = json.loads((output / "metrics.json").read_text())
    assert set(report["rows"]) == {"input", "input_vae", "nlm", "bilateral", "base", "lora", "ceiling"}
    expect(report["arguments"], degradation_types="noise", noise_level="0.2", crop_px=32)  # as trained, as told
    with open(output / "scores.csv", encoding="utf-8") as file:
        images = {row["image"] for row in csv.DictReader(file)}
    assert {name.rsplit("/")[-1] for name in images} == {"coffee.png", "motorcycle_left.png", "flower.jpg"}
    Image.open(output / "grid.png").load()
    assert "LoRA (restored)" in run.stdout
    assert f"All of it lies in {output}:" in run.stdout
    assert list(tmp_path.iterdir()) == [output]  # nothing is left where the command was started


def test_restoration_command_trains_on_a_named_model(tiny_model, photos, tmp_path):
    output = tmp_path / "out"
    run = bash("run_scripts.sh", *SHORT, "--train_batch_size", "2", folder=photos.parent,
               MODEL_NAME=tiny_model, HR_ROOT=f"{photos.name}/train", OUTPUT_DIR=str(output), PERCEPTUAL="gradient")
    expect(trained_args(run, output), mixed_precision="bf16", gradient_accumulation_steps=4, learning_rate=1e-4,
           start_noise="1.0", perceptual_loss="gradient", degradation_types="downsample,noise,blur",
           instance_prompt="Restore this degraded photograph to high fidelity", heldout_root=None)
    assert "With HELDOUT_ROOT=folder" in run.stdout and not (output / "metrics.json").exists()


def test_flow_matching_command_trains_on_a_named_model(tiny_model, photos, tmp_path):
    output = tmp_path / "out"
    run = bash("train_flow_matching.sh", *SHORT, "--aspect_ratio_buckets", "32:48,48:32", MODEL_NAME=tiny_model,
               HR_ROOT=str(photos / "train"), HELDOUT_ROOT=str(photos / "heldout"), OUTPUT_DIR=str(output),
               PERCEPTUAL="gradient")
    expect(trained_args(run, output), start_noise="0", reference_tokens=False, weighting_scheme="uniform",
           guidance_scale=1.5,
           noise_level="0.02", blur_radius="1.5", jpeg_quality="85", use_bucket_sampler=True, train_batch_size=1,
           gradient_accumulation_steps=4, gradient_checkpointing=True, use_8bit_adam=True, lr_scheduler="cosine",
           lr_warmup_steps=100, checkpointing_steps=500, validation_epochs=5, seed=42, perceptual_loss="gradient",
           heldout_root=str(photos / "heldout"))


@pytest.mark.parametrize("script", ["run_scripts.sh", "train_flow_matching.sh"])
def test_several_processes_are_launched_by_torchrun(script, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/bash
case "$*" in *train_deg_lora*) echo "$*" ;; *sys.executable*) echo "$0" ;; *) exec {sys.executable} "$@" ;; esac""")
    python.chmod(0o755)
    run = bash(script, MODEL_NAME="model", HR_ROOT=str(tmp_path), NUM_PROCESSES="2", KONTEXT_PYTHON=str(python))
    assert run.stdout.startswith(f"-m torch.distributed.run --standalone --nproc_per_node 2 {PROJECT_ROOT}/train_deg")
    assert "--perceptual_loss vgg" in run.stdout


@pytest.fixture
def gated_hub():
    """Address of a hub that knows someone/gated and hands out none of its files."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            is_api = self.path.startswith("/api/models/someone/gated")
            body = json.dumps({"id": "someone/gated", "sha": "a" * 40, "gated": "auto", "tags": [],
                               "siblings": [{"rfilename": "model_index.json"}]}).encode() if is_api else b""
            self.send_response(200 if is_api else 401)
            self.send_header("Content-Length", str(len(body)))
            if not is_api:
                self.send_header("X-Error-Code", "GatedRepo")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *message):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_gated_model_without_a_token_is_refused(gated_hub, monkeypatch, tmp_path):
    from huggingface_hub import constants, hf_api

    from utils import flux

    url = gated_hub + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hf_api.api, "endpoint", gated_hub)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="^someone/gated is gated: .*hf auth login"):
        flux.load_pipeline("someone/gated", cache_dir=tmp_path)


@pytest.mark.parametrize("script, variables, words", [
    ("run_scripts.sh", {"MODEL_NAME": "model"}, ["HR_ROOT is not set", "HR_ROOT=photos"]),
    ("run_scripts.sh", {"MODEL_NAME": "model", "HR_ROOT": "absent"}, ["HR_ROOT=absent: no such folder"]),
    ("run_scripts.sh", {"HR_ROOT": "absent"}, ["HR_ROOT=absent: no such folder"]),
    ("train_flow_matching.sh", {"HR_ROOT": "."}, ["MODEL_NAME is not set", "/path/to/FLUX.1-Kontext-dev"]),
    ("train_flow_matching.sh", {"MODEL_NAME": "model"}, ["HR_ROOT=: no such folder"]),
])
def test_missing_input_is_refused_before_anything_starts(script, variables, words, tmp_path):
    assert_refused(bash(script, folder=tmp_path, **variables), *words)


def test_output_dir_among_the_arguments_is_refused(tmp_path):
    assert_refused(bash("run_scripts.sh", "--output_dir", str(tmp_path)), "OUTPUT_DIR=folder")


# --- set-up, in a copy of the project, with nothing on PATH but stand-ins and a few tools

PYTHON = f"""case "$*" in
  *"import torch"*) exit 0 ;;
  "-m venv"*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; exit 0 ;;
  "-m pip install"*) echo pip >> "$CALLS"; exit 0 ;;
  "-m pip"*) exit 0 ;;
  *sys.executable*) echo "$0" ;;
  *) exec {sys.executable} "$@" ;;
esac"""
OLD_PYTHON = 'case "$*" in --version) echo Python 3.9.2 ;; *) exit 1 ;; esac'
UV = """case "$*" in
  venv*) for folder; do :; done; mkdir -p "$folder/bin"; cp "$(dirname "$0")/python3" "$folder/bin/python" ;;
  "pip install"*) echo uv >> "$CALLS" ;;
esac"""


class Setup:
    """A copy of the project to set up, the stand-ins on its PATH, and the record of the installers' calls."""

    def __init__(self, folder):
        self.root, self.bin, self.calls_file = folder / "project", folder / "bin", folder / "calls"
        (self.root / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(PROJECT_ROOT / "scripts" / "setup_env.sh", self.root / "scripts")
        self.lock = self.root / "requirements.lock"
        self.lock.write_text("torch==2.15.0\n")
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.put("python3", PYTHON)
        self.put("df", "echo header; echo disk 0 0 99999999 0 /")

    def put(self, name, body):
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (self.bin / name).chmod(0o755)

    def run(self, **variables):
        command = 'set -euo pipefail; source scripts/setup_env.sh; echo "PYTHON=$PYTHON"'
        return subprocess.run([shutil.which("bash"), "-c", command], cwd=self.root, capture_output=True, text=True,
                              env={"PATH": str(self.bin), "CALLS": str(self.calls_file)} | variables)

    def ready(self):
        run = self.run()
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[-1] == f"PYTHON={self.root}/.venv/bin/python"
        return run

    def calls(self):
        return self.calls_file.read_text().split() if self.calls_file.exists() else []


@pytest.fixture
def setup(tmp_path):
    return Setup(tmp_path)


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_second_start_reuses_the_environment_until_the_lock_changes(setup, installer):
    if installer == "uv":
        setup.put("uv", UV)
    assert "Installing requirements.lock" in setup.ready().stdout
    assert len(setup.ready().stdout.splitlines()) == 1
    assert setup.calls() == [installer]
    setup.lock.write_text("torch==2.15.1\n")
    setup.ready()
    assert setup.calls() == [installer] * 2


def test_failed_installation_is_explained_and_repeated_on_the_next_start(setup):
    setup.put("uv", UV + '\n[[ "$*" != "pip install"* ]] || { echo could not connect; exit 1; }')
    for _ in range(2):
        run = setup.run()
        assert run.returncode == 2
        shown, cure = run.stderr.strip().splitlines()
        assert shown == "could not connect" and "check the network" in cure
    setup.put("uv", UV)
    setup.ready()
    assert setup.calls() == ["uv"] * 3


def test_full_disk_during_the_installation_is_named(setup):
    setup.put("uv", UV + '\n[[ "$*" != "pip install"* ]] || { echo "OSError: No space left on device"; exit 1; }')
    run = setup.run()
    assert run.returncode == 2 and "the disk is full" in run.stderr


def test_torch_and_torchvision_that_do_not_fit_are_no_environment(setup):
    setup.put("python3", PYTHON.replace("exit 0 ;;", "echo operator does not exist; exit 1 ;;", 1))
    run = setup.run()
    assert run.returncode == 2 and "operator does not exist" in run.stderr
    assert not (setup.root / ".venv" / "installed.lock").exists()


def test_names_that_do_not_run_are_passed_over(setup):
    setup.put("python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")
    setup.put("uv", "echo 'pyenv: uv: command not found' >&2; exit 127")
    setup.ready()
    assert setup.calls() == ["pip"]


@pytest.mark.parametrize("name, body, words", [
    ("python3", OLD_PYTHON, ["Python 3.9.2", "apt install python3.11"]),
    ("python3", 'case "$*" in *ensurepip*) exit 1 ;; esac\n' + PYTHON, ["no venv module", "-venv", "or install uv"]),
    ("df", "echo header; echo disk 0 0 3145728 0 /", ["3 GiB free", "free some space"]),
])
def test_set_up_that_cannot_work_is_refused(setup, name, body, words):
    setup.put(name, body)
    assert_refused(setup.run(), *words)
    assert setup.calls() == []


def test_python_of_the_users_own_must_be_fit(setup):
    setup.put("bare", 'case "$*" in *importlib.metadata*) exit 1 ;; esac\n' + PYTHON)
    setup.put("old", OLD_PYTHON)
    assert_refused(setup.run(KONTEXT_PYTHON="bare"), "lacks packages", "pip install -r")
    assert_refused(setup.run(KONTEXT_PYTHON="old"), "no Python 3.11")
    assert setup.calls() == []

"""Checkpoints are complete or not there, hold every optimizer's state exactly, and are never a pickle."""

import json
import logging
import os
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from utils import checkpoint

IDENTITY = {"rank": 4, "seed": 0, "lora_layers": None, "start_noise": "0.5"}


def make_state(value=1.0):
    return {"lora": {"a.lora_A.weight": torch.full((2, 3), value)}, "ema": None,
            "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.full((2, 3), value)}},
                          "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]},
            "lr_scheduler": {"last_epoch": 3, "_last_lr": [0.1 + 0.2], "base_lrs": [1e-4]}}


def write_lora(folder):
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"weights")


def save(folder, step, value=1.0, limit=None, state=None):
    return checkpoint.save(folder, step, state or make_state(value), IDENTITY, write_lora, limit)


def equal(a, b):
    """Same structure, types, keys in order, and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or a != a and b != b)


# --- what a state may hold


def test_flatten_keeps_tuples_integer_keys_types_and_exact_floats():
    state = {0: (1, 2.5), "0": [True, None, "text"], "nested": {7: {"": torch.arange(3)}}, "third": 0.1 + 0.2,
             "infinite": float("inf"), "empty": [{}, (), []], "dotted.key": torch.zeros(1), "dotted": {"key": 1}}
    tensors = {}
    tree = json.loads(json.dumps(checkpoint.flatten(state, tensors)))
    assert equal(checkpoint.unflatten(tree, tensors), state)


def test_tensors_whose_dotted_names_meet_do_not_overwrite_each_other():
    state = {"a.b": torch.zeros(2), "a": {"b": torch.ones(2)}, 0: torch.full((1,), 2.0), "0": torch.full((1,), 3.0)}
    tensors = {}
    assert equal(checkpoint.unflatten(checkpoint.flatten(state, tensors), tensors), state)


def test_what_json_cannot_hold_is_a_type_error_with_its_name():
    with pytest.raises(TypeError, match="optimizer.hook: a function"):
        checkpoint.flatten({"optimizer": {"hook": make_state}}, {})


def make_optimizer(kind, parameters):
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-2)
    if kind == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters, lr=1.0, safeguard_warmup=True, use_bias_correction=True)
    if kind == "schedule_free":
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree(parameters, lr=1e-2, warmup_steps=2)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-2)


def take_steps(optimizer, parameters, count, seed):
    generator = torch.Generator().manual_seed(seed)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "prodigy", "schedule_free", "8bit"])
def test_an_optimizer_goes_on_bit_for_bit_from_its_checkpoint(tmp_path, kind):
    def fresh():
        generator = torch.Generator().manual_seed(0)
        # 8-bit Adam keeps small tensors in fp32: one must be large enough to be quantised
        return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (3,))]

    parameters = fresh()
    optimizer = make_optimizer(kind, parameters)
    take_steps(optimizer, parameters, 3, seed=1)
    weights = [parameter.detach().clone() for parameter in parameters]
    path = save(tmp_path, 3, state={"weights": weights, "optimizer": optimizer.state_dict()})
    take_steps(optimizer, parameters, 2, seed=2)

    step, state = checkpoint.load(path, IDENTITY)
    assert step == 3
    resumed = fresh()
    other = make_optimizer(kind, resumed)
    for parameter, value in zip(resumed, state["weights"], strict=True):
        parameter.data.copy_(value)
    other.load_state_dict(state["optimizer"])
    take_steps(other, resumed, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))
    assert equal(optimizer.state_dict(), other.state_dict())


def test_8bit_states_are_really_8_bit(tmp_path):
    parameters = [torch.nn.Parameter(torch.randn(64, 128)) for _ in range(2)]  # two share bitsandbytes' maps
    optimizer = make_optimizer("8bit", parameters)
    take_steps(optimizer, parameters, 1, seed=0)
    path = save(tmp_path, 1, state={"optimizer": optimizer.state_dict()})
    quantised = {name for name, tensor in load_file(path / "state.safetensors").items() if tensor.dtype == torch.uint8}
    assert {name.rpartition(".")[2] for name in quantised} >= {"state1", "state2"}


# --- saving


def test_a_checkpoint_gives_back_step_and_state_and_leaves_no_scratch(tmp_path):
    path = save(tmp_path, 12)
    assert path == tmp_path / "checkpoint-12"
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json", "pytorch_lora_weights.safetensors", "state.json", "state.safetensors"]
    step, state = checkpoint.load(path, IDENTITY)
    assert step == 12 and equal(state, make_state())
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-12"]
    assert checkpoint.fault(path) is None


STAGES = ["write_lora", "save_file", "write_text", "sha256", "sync_to_disk", "replace"]


def fail_at(patch, stage, error):
    def fail(*args, **kwargs):
        raise error

    if stage == "replace":
        patch.setattr(checkpoint.os, "replace", fail)
    elif stage == "write_text":
        patch.setattr(checkpoint.Path, "write_text", fail)
    elif stage != "write_lora":
        patch.setattr(checkpoint, stage, fail)
    return fail if stage == "write_lora" else write_lora


@pytest.mark.parametrize("stage", STAGES)
def test_a_failed_write_leaves_the_earlier_checkpoint_and_says_so_in_one_line(tmp_path, stage):
    earlier = save(tmp_path, 1)
    with pytest.MonkeyPatch.context() as patch:
        writer = fail_at(patch, stage, OSError(28, "No space left on device"))
        with pytest.raises(ValueError, match="checkpoint-2 could not be written .*No space left.*latest") as error:
            checkpoint.save(tmp_path, 2, make_state(), IDENTITY, writer, limit=1)
    assert "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoint.find(tmp_path, "latest") == earlier and checkpoint.fault(earlier) is None


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_any_stage_is_never_picked_up_and_the_next_save_succeeds(tmp_path, stage):
    earlier = save(tmp_path, 1)
    with pytest.MonkeyPatch.context() as patch:
        writer = fail_at(patch, stage, SystemExit())  # passes every handler, as a kill does
        patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(SystemExit):
            checkpoint.save(tmp_path, 2, make_state(), IDENTITY, writer)
    assert (tmp_path / "checkpoint-2.tmp").exists()
    assert checkpoint.find(tmp_path, "latest") == earlier
    assert save(tmp_path, 2, value=5.0) == checkpoint.find(tmp_path, "latest")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_the_manifest_is_written_after_everything_it_lists(tmp_path, monkeypatch):
    seen, write_text = [], checkpoint.Path.write_text

    def spy(path, text, *args, **kwargs):
        if path.name == checkpoint.MANIFEST:
            seen.extend(sorted(file.name for file in path.parent.iterdir()))
            assert sorted(json.loads(text)["sha256"]) == seen
        return write_text(path, text, *args, **kwargs)

    monkeypatch.setattr(checkpoint.Path, "write_text", spy)
    save(tmp_path, 1)
    assert seen == ["pytorch_lora_weights.safetensors", "state.json", "state.safetensors"]


def test_a_broken_checkpoint_of_the_same_step_is_replaced(tmp_path):
    broken = save(tmp_path, 5)
    (broken / "state.json").unlink()
    assert checkpoint.fault(save(tmp_path, 5, value=2.0)) is None
    assert checkpoint.load(broken, IDENTITY)[1]["lora"]["a.lora_A.weight"][0, 0] == 2


@pytest.mark.parametrize("limit", [None, 1, 2, 3, 4, 5, 9])
def test_prune_keeps_the_newest_by_number(tmp_path, limit):
    for step in (9, 10, 100):
        save(tmp_path, step)
    save(tmp_path, 101, limit=limit)
    kept = [9, 10, 100, 101][-(limit or 4):]
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == kept
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(f"checkpoint-{step}" for step in kept)


@pytest.mark.parametrize("files", [0, 1, 3])
def test_a_kill_while_old_checkpoints_are_deleted_leaves_none_listed_in_part(tmp_path, files):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def die(folder, *args, **kwargs):
        for file in sorted(folder.iterdir())[:files]:
            file.unlink()
        raise SystemExit  # passes every handler, as a kill does

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", die)
        with pytest.raises(SystemExit):
            checkpoint.save(tmp_path, 3, make_state(), IDENTITY, write_lora, limit=1)
    assert [step for step, path in checkpoint.list_checkpoints(tmp_path) if checkpoint.fault(path)] == []
    assert checkpoint.find(tmp_path, "latest").name == "checkpoint-3"
    save(tmp_path, 4, limit=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-4"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_named_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1)

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    assert save(tmp_path, 2, limit=1).is_dir()
    assert "checkpoint-1 could not be deleted" in caplog.text and "Permission denied" in caplog.text


@pytest.mark.parametrize("limit", [1, 2])
def test_prune_never_takes_the_checkpoint_just_written_for_the_sake_of_a_damaged_later_one(tmp_path, limit):
    save(tmp_path, 500)
    (save(tmp_path, 1000) / "state.json").write_text("{}")
    assert checkpoint.find(tmp_path, "latest").name == "checkpoint-500"
    save(tmp_path, 600, limit=limit)
    assert checkpoint.find(tmp_path, "latest").name == "checkpoint-600"
    assert (tmp_path / "checkpoint-500").exists() == (limit == 2)


def test_what_is_no_checkpoint_is_neither_listed_nor_pruned(tmp_path):
    for name in ("checkpoint-abc", "checkpoint-", "my-checkpoint-4", "checkpoint-5-best"):
        shutil.copytree(save(tmp_path / "source", 1), tmp_path / name)
    assert not checkpoint.any_checkpoint(tmp_path)
    save(tmp_path, 2, limit=1)
    assert len(list(tmp_path.glob("*checkpoint-*"))) == 5
    assert checkpoint.list_checkpoints(tmp_path) == [(2, tmp_path / "checkpoint-2")]


# --- finding

DAMAGES = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "never finished"),
    "half a manifest": (lambda p: (p / "manifest.json").write_text('{"step": 2, "sha'), "manifest.json cannot be read"),
    "another manifest": (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "an empty manifest": (lambda p: (p / "manifest.json").write_text('{"sha256": {}}'), "manifest.json"),
    "a missing file": (lambda p: (p / "state.safetensors").unlink(), "state.safetensors is missing"),
    "a truncated file": (lambda p: os.truncate(p / "state.safetensors", 40), "state.safetensors does not match"),
    "an empty file": (lambda p: os.truncate(p / "state.json", 0), "state.json does not match"),
    "one flipped bit": (lambda p: flip(p / "pytorch_lora_weights.safetensors"), "lora_weights.* does not match"),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_latest_passes_over_a_damaged_checkpoint_and_names_it(tmp_path, caplog, damage):
    sound = save(tmp_path, 1)
    broken = save(tmp_path, 2)
    change, words = DAMAGES[damage]
    change(broken)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.find(tmp_path, "latest") == sound
    message, = [record.getMessage() for record in caplog.records]
    assert str(broken) in message and "passed over" in message
    assert re.search(words, message)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_that_is_named_is_refused(tmp_path, damage):
    save(tmp_path, 1)
    broken = save(tmp_path, 2)
    DAMAGES[damage][0](broken)
    for wanted in (str(broken), "checkpoint-2"):
        with pytest.raises(ValueError, match=f"--resume_from_checkpoint {wanted}: ") as error:
            checkpoint.find(tmp_path, wanted)
        assert "\n" not in str(error.value)


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--resume_from_checkpoint checkpoint-7: "):
        checkpoint.find(tmp_path, "checkpoint-7")


def test_find_takes_a_path_a_name_latest_or_nothing(tmp_path):
    first, second = save(tmp_path, 9), save(tmp_path, 10)
    assert checkpoint.find(tmp_path, "latest") == second  # 10 is newer than 9, though not as text
    assert checkpoint.find("elsewhere", str(first)) == first
    assert checkpoint.find(tmp_path, None) is None


def test_latest_in_a_folder_without_checkpoints_starts_anew_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert checkpoint.find(tmp_path / "none", "latest") is None
    assert "starting from the beginning" in caplog.text


# --- loading


def test_a_run_of_another_identity_is_refused_naming_each_difference(tmp_path):
    path = save(tmp_path, 1)
    other = {"rank": 8, "seed": 0, "lora_layers": "attn.to_q", "images": 3}
    with pytest.raises(ValueError) as error:
        checkpoint.load(path, other)
    text = str(error.value)
    for words in ("rank (was 4, now 8)", "lora_layers (was None, now attn.to_q)", "images (was None, now 3)",
                  "start_noise (was 0.5, now None)"):
        assert words in text
    assert "seed" not in text and "\n" not in text


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_in_a_checkpoint_folder_is_never_opened(tmp_path):
    path, trap = save(tmp_path, 1), tmp_path / "opened"
    names = ["custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "pytorch_model.bin"]
    for name in names:
        (path / name).write_bytes(pickle.dumps(Trap(trap)))
    found = checkpoint.find(tmp_path, "latest")
    step, state = checkpoint.load(found, IDENTITY)
    assert found == path and step == 1 and equal(state, make_state())
    assert not trap.exists()
    pickle.loads((path / names[0]).read_bytes())  # the trap is a real one
    assert trap.exists()


def test_state_files_replaced_by_pickles_are_refused_unopened(tmp_path):
    path, trap = save(tmp_path, 1), tmp_path / "opened"
    for name in ("state.safetensors", "state.json", "pytorch_lora_weights.safetensors"):
        (path / name).write_bytes(pickle.dumps(Trap(trap)))
    assert checkpoint.find(tmp_path, "latest") is None
    with pytest.raises(ValueError, match="does not match its hash"):
        checkpoint.find(tmp_path, "checkpoint-1")
    assert not trap.exists()


def test_an_older_checkpoint_beside_a_newer_one_is_refused(tmp_path):
    save(tmp_path, 9)
    save(tmp_path, 10)
    with pytest.raises(ValueError, match="checkpoint-9: checkpoint-10 in the same folder is newer"):
        checkpoint.find(tmp_path, "checkpoint-9")
    assert checkpoint.find(tmp_path, "checkpoint-10").name == "checkpoint-10"


def test_what_a_killed_run_left_half_written_goes_with_the_next_checkpoint(tmp_path):
    (tmp_path / "checkpoint-3.tmp").mkdir()
    save(tmp_path, 9)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-9"]

"""Checkpoints that are complete or not there: written to a temporary folder, a manifest with hashes last, then one
rename, then the old ones go. Tensors are safetensors, everything else JSON; no pickle is written or read.

    checkpoint-500/  pytorch_lora_weights.safetensors  state.safetensors  state.json  manifest.json
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

logger = logging.getLogger("kontext")
MANIFEST = "manifest.json"


def flatten(value, tensors, name=""):
    """A state dict as a JSON tree, its tensors put into `tensors` under dotted names. Keeps tuples and integer keys;
    TypeError for anything that JSON cannot hold exactly."""
    if isinstance(value, torch.Tensor):
        name = name if name not in tensors else f"{name}#{len(tensors)}"  # {"a.b": ...} beside {"a": {"b": ...}}
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()  # 8-bit states share
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, flatten(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [flatten(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"{name}: a {type(value).__name__} cannot be saved")


def unflatten(tree, tensors):
    """The inverse of flatten."""
    (kind, content), = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [unflatten(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path):
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(output_dir, step, state, identity, write_lora, limit=None):
    """Write checkpoint-<step> and prune to the newest `limit`; returns its path. Call on one process.

    state: nested dict of tensors, numbers, text. identity: flat dict that a resuming run must match.
    write_lora(folder): writes the LoRA file. On a failed write the earlier checkpoints stay and ValueError says so."""
    folder = Path(output_dir) / f"checkpoint-{step}"
    scratch = folder.with_name(folder.name + ".tmp")
    for leftover in folder.parent.glob("checkpoint-*.tmp"):  # of a run that was killed while it wrote
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        write_lora(scratch)
        tensors = {}
        tree = {"step": step, "identity": identity, "state": flatten(state, tensors)}
        save_file(tensors, scratch / "state.safetensors")
        (scratch / "state.json").write_text(json.dumps(tree))
        hashes = {file.name: sha256(file) for file in sorted(scratch.iterdir())}
        for name in hashes:
            sync_to_disk(scratch / name)
        (scratch / MANIFEST).write_text(json.dumps({"step": step, "sha256": hashes}, indent=2))
        sync_to_disk(scratch / MANIFEST)
        sync_to_disk(scratch)
        if folder.exists():  # only a broken one can stand here: a complete one would have been resumed from
            shutil.rmtree(folder)
        os.replace(scratch, folder)
        sync_to_disk(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise ValueError(f"{folder} could not be written ({error}); earlier checkpoints are intact. Free disk space, "
                         "then --resume_from_checkpoint latest") from error
    if limit:
        older = [path for number, path in list_checkpoints(output_dir) if number < step]
        for old in older[:max(0, len(older) + 1 - limit)]:  # later ones are damaged: a run would have gone on from them
            doomed = old.with_name(old.name + ".tmp")  # renamed first: a kill leaves no half of it listed as whole
            try:
                os.replace(old, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                logger.warning(f"{old} could not be deleted ({error})")
    return folder


def write_folder(folder, write):
    """Let write(path) fill an empty folder, which then appears as `folder` in one rename; returns it. One that stands
    there is first moved aside. On a failed write it stays, and ValueError says so."""
    folder = Path(folder)
    scratch, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        write(scratch)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise ValueError(f"{folder} could not be written ({error}); what was there is intact. Free disk space, then "
                         "run again") from error
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(scratch, folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def list_checkpoints(output_dir):
    """[(step, path)] of finished checkpoints (with a manifest), oldest first."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / MANIFEST).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def any_checkpoint(output_dir):
    """True if the folder holds at least one finished checkpoint."""
    return bool(list_checkpoints(output_dir))


def fault(path):
    """What is wrong with a checkpoint folder, in words, or None when every file matches its hash."""
    try:
        hashes = json.loads((path / MANIFEST).read_text())["sha256"]
        if "state.json" not in hashes:
            return f"its {MANIFEST} lists no state.json"
        for name, expected in hashes.items():
            if sha256(path / name) != expected:
                return f"{name} does not match its hash"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return None


def find(output_dir, wanted):
    """The checkpoint to resume from, or None for a new run.

    wanted: None, "latest" (the newest whose files match their hashes, saying which were passed over; None if there
    is none) or a path, which must be sound: ValueError otherwise."""
    if not wanted:
        return None
    if wanted != "latest":
        path = Path(wanted) if Path(wanted).is_dir() else Path(output_dir) / wanted
        if problem := fault(path):
            raise ValueError(f"--resume_from_checkpoint {wanted}: {problem}; name another, or use latest")
        listed = [other.resolve() for _, other in list_checkpoints(output_dir)]
        if path.resolve() in listed[:-1]:  # going on from here would mix two runs in one folder
            raise ValueError(f"--resume_from_checkpoint {wanted}: {listed[-1].name} in the same folder is newer; move "
                             "it away, or go on in another --output_dir")
        return path
    for leftover in Path(output_dir).glob("checkpoint-*"):
        if not (leftover / MANIFEST).is_file():
            logger.warning(f"{leftover} was never finished; passed over")
    for _, path in reversed(list_checkpoints(output_dir)):
        problem = fault(path)
        if problem is None:
            return path
        logger.warning(f"{path}: {problem}; passed over")
    logger.warning(f"no sound checkpoint in {output_dir}; starting from the beginning")
    return None


def load(path, identity):
    """(step, state) of a checkpoint that `find` returned. ValueError naming each key of `identity` that differs."""
    content = json.loads((path / "state.json").read_text())
    saved = content["identity"]
    differing = [f"{key} (was {saved.get(key)}, now {identity.get(key)})"
                 for key in sorted(saved.keys() | identity.keys()) if saved.get(key) != identity.get(key)]
    if differing:
        raise ValueError(f"{path} cannot be resumed by this run: it differs in {', '.join(differing)}; restore these, "
                         "or start anew in another --output_dir")
    return content["step"], unflatten(content["state"], load_file(path / "state.safetensors"))

"""Where images are written, and whether that was done before. A restored one has a sidecar, a JSON file beside it that
says what it was made from and how; other folders have one record of what their files were made from."""

import json
import math
from pathlib import Path

from my_dataset.images import list_images, load_rgb

RECORD = "outputs.json"
KEPT_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")  # ext "auto"; others become .png


def plan_outputs(source, folder, suffix="", ext="auto", count=1):
    """[(input path, variant, output path)] for the image or folder `source`, whose structure `folder` mirrors.

    Variant i of `count` > 1 ends in _i. Inputs that differ in their extension alone keep it in the name: a.png.png,
    a.jpg.png. Images that lie in `folder` are no input. ValueError when an output would replace an input or another
    output."""
    source, folder = Path(source), Path(folder)
    if source.resolve() == folder.resolve():
        raise ValueError(f"--output {folder} is --input itself; name another folder")
    root = source if source.is_dir() else source.parent
    paths = [path for path in list_images(source) if source.is_file() or folder.resolve() not in path.resolve().parents]
    if not paths:
        raise ValueError(f"--input {source}: all its images lie in --output {folder}; name another folder")

    def output(path, stem, end=""):
        kept = path.suffix if path.suffix.lower() in KEPT_EXTENSIONS else ".png"
        extension = kept if ext == "auto" else f".{ext}"
        return folder / path.parent.relative_to(root) / (stem + suffix + end + extension)

    def key(path):
        return str(path).casefold()  # some file systems do not tell A.png from a.png

    wanted = [key(output(path, path.stem)) for path in paths]
    plan, taken = [], {key(path.resolve()): path for path in paths}
    for path, own in zip(paths, wanted, strict=True):
        stem = path.stem if wanted.count(own) == 1 else path.name
        for i in range(count):
            target = output(path, stem, f"_{i}" if count > 1 else "")
            other = taken.setdefault(key(target.resolve()), target)
            if other is not target:
                raise ValueError(f"{path}: its output {target} would replace {other}; pass another --output or "
                                 "--suffix, or rename it")
            plan.append((path, i, target))
    return plan


def sidecar_path(output):
    """a.png -> a.png.json."""
    return output.with_name(output.name + ".json")


def check_ours(plan):
    """ValueError where an output of plan_outputs is there already without a sidecar: it is not ours to replace."""
    for _, _, output in plan:
        if output.exists() and not sidecar_path(output).exists():
            raise ValueError(f"{output} would be written over, and was not made here: there is no "
                             f"{sidecar_path(output).name} beside it; name another --output, or move it away")


def _read_record(file):
    if not file.exists():
        return {}
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        known = None
    if not (isinstance(known, dict) and all(isinstance(source, str) for source in known.values())):
        raise ValueError(f"{file} would be written over, and was not made here; name another folder, or move it away")
    return known


def claim(plans):
    """{record file: {output's name: its input}} of `plans`, {folder: {output: input}}, and of earlier runs: to be
    written before the first output, so that a run that was stopped may be repeated.

    ValueError where an output is there already and the folder's record does not have it from that very input."""
    records = {}
    for folder, inputs in plans.items():
        file = Path(folder, RECORD)
        records[file] = known = _read_record(file)
        for output, source in inputs.items():
            name, source = output.relative_to(folder).as_posix(), str(source.resolve())
            if output.exists() and known.get(name) != source:
                made = f"made from {known[name]}" if name in known else "not made here"
                raise ValueError(f"{output} would be written over, and was {made}; name another folder, or move it "
                                 "away")
            known[name] = source
    return records


def is_done(output, sidecar):
    """True if `output` decodes and its sidecar file says `sidecar`; what it says beyond that came of the run itself."""
    try:
        written = json.loads(sidecar_path(output).read_text(encoding="utf-8"))
        is_ours = isinstance(written, dict) and written.items() >= sidecar.items()
        return is_ours and load_rgb(output, math.inf) is not None
    except (OSError, ValueError):  # missing or damaged, so it is not done
        return False

"""Where restored images are written, and whether that was done before. Each has a sidecar, a JSON file beside it that
says what it was made from and how."""

import json
import math
from pathlib import Path

from my_dataset.images import list_images, load_rgb

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


def is_done(output, sidecar):
    """True if `output` decodes and its sidecar file says `sidecar`; what it says beyond that came of the run itself."""
    try:
        written = json.loads(sidecar_path(output).read_text(encoding="utf-8"))
        is_ours = isinstance(written, dict) and written.items() >= sidecar.items()
        return is_ours and load_rgb(output, math.inf) is not None
    except (OSError, ValueError):  # missing or damaged, so it is not done
        return False

"""Files of a slide: every weight as an image of its own, and all of them in one picture. The names are the
original's."""

import json
import re
from zlib import crc32

import torch

from utils.checkpoint import sha256
from utils.utils import image_grid, to_pil

COLUMNS = 5  # of the picture
PROMPT_BYTES = 80  # of a prompt in a file name


def file_stem(text):
    """A prompt as part of a file name, on any system: with _ for spaces, and where that is not all of it (punctuation,
    a long prompt) with a checksum, so that no other prompt has the same name."""
    stem = re.sub(r"[^\w.-]+", "_", text).strip("_.")
    if stem.replace("_", " ") == text and len(stem.encode()) <= PROMPT_BYTES:
        return stem
    return f"{stem.encode()[:PROMPT_BYTES].decode(errors='ignore')}_{crc32(text.encode()):08x}".lstrip("_")


def describe_origin(args, stored, *loras):
    """What decides about the images beside that which their names say: the LoRAs, the model, the sampling settings."""
    names = ["pretrained_model_name_or_path", "mixed_precision", "base_precision", "real_mix", "semantic_cfg_scale",
             "start_sigma"]
    return {name: getattr(args, name) for name in names} | {"stored": stored, "loras": [sha256(lora) for lora in loras]}


def settings_file(folder, epoch, origin):
    """Where the settings of the images in `folder` belong, those of this many steps. ValueError where such images are
    there that were made in another way than `origin` (describe_origin) says: they would be written over."""
    file = folder / f"settings_{epoch}epoch.json"
    earlier = json.loads(file.read_text(encoding="utf-8"))["origin"] if file.exists() else origin
    if differing := [name for name in origin if earlier.get(name) != origin[name]]:
        raise ValueError(f"{folder} holds images that were made in another way ({', '.join(differing)}); give another "
                         "--output_folder_gen, or delete them")
    return file


def write_slide(folder, dataset, seed, skip, epoch, scales, images, prompt, image_format="jpg", photograph=None):
    """Write folder/<seed>/<name>_scale<a>_<prompt>.jpg for every scale, and folder/<name>_<a0>-<an>_<prompt>.jpg with
    all of them; returns the latter's path. images: (len(scales), 3, H, W), about [-1, 1]. photograph: (3, H, W), to be
    shown first."""
    name, tail = f"{seed}_{dataset}_skip{skip}_{epoch}epoch", f"_{file_stem(prompt)}" if file_stem(prompt) else ""
    (folder / str(seed)).mkdir(parents=True, exist_ok=True)
    images = images.clamp(-1, 1).cpu()
    for scale, image in zip(scales, images, strict=True):
        to_pil(image).save(folder / str(seed) / f"{name}_scale{scale:.2f}{tail}.{image_format}", quality=95)
    shown = [*([] if photograph is None else [photograph.cpu()]), *images]
    captions = [*([] if photograph is None else ["photograph"]), *(f"scale = {scale:g}" for scale in scales)]
    columns = min(COLUMNS, len(shown))
    missing = -len(shown) % columns
    shown, captions = shown + [torch.ones_like(images[0])] * missing, captions + [""] * missing
    rows = [shown[i:i + columns] for i in range(0, len(shown), columns)]
    captions = [captions[i:i + columns] for i in range(0, len(captions), columns)]
    labels = [f"seed {seed}", f"skip {skip}", *[""] * columns][:columns]
    path = folder / f"{name}_{scales[0]:.2f}-{scales[-1]:.2f}{tail}.jpg"
    image_grid(rows, labels, captions).save(path, quality=95)
    return path

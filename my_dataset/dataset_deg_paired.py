"""Clean images with their degraded versions: degraded on the fly, stored as pairs, or from a Hugging Face dataset.

A sample is a function of (seed, epoch, index) alone, so that the number of workers and processes, and the moment of a
resume, change no sample."""
import contextlib
import functools
import hashlib
import json
import os
import re
import tarfile
import unicodedata
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from my_dataset.degradations import check_not_degraded, parse_probability, parse_range
from my_dataset.images import MAX_PIXELS, MIN_SIDE_PX, UnreadableImage, image_size, list_images, load_rgb

KERNELS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Streams of one item's randomness: one that is drawn from more or less often leaves the others alone.
GEOMETRY_STREAM, DEGRADATION_STREAM, TRAINING_STREAM, ORDER_STREAM, IDENTITY_STREAM, HELDOUT_STREAM = range(6)
CAPTION_STREAM, CLASS_GEOMETRY_STREAM, CLASS_TRAINING_STREAM = range(6, 9)
MAX_RETRIES = 32


def _entropy(seed, epoch, index, stream):
    return np.random.SeedSequence([seed, epoch, index, stream])


def item_rng(seed, epoch, index, stream=GEOMETRY_STREAM):
    """NumPy generator of one item in one epoch; different streams are independent. All arguments are >= 0."""
    return np.random.default_rng(_entropy(seed, epoch, index, stream))


def item_seed(seed, epoch, index, stream=TRAINING_STREAM):
    """63-bit seed of the torch generator that draws sigma, noise and VAE sample of this item in training."""
    return int(_entropy(seed, epoch, index, stream).generate_state(1, np.uint64)[0] >> np.uint64(1))


def heldout_seed(seed):
    """The seed of held-out images: they must not get the very noise that training with `seed` gives to its own."""
    return int(_entropy(seed, 0, 0, HELDOUT_STREAM).generate_state(1, np.uint32)[0])


class HubImage(NamedTuple):
    """One cell of a `datasets` table that has a single, undecoded image column."""

    table: object
    row: int

    def __str__(self):
        return f"row {self.row} of the dataset"

    def read(self, name):
        return cell_content(next(iter(self.table[self.row].values())), name)


def cell_content(cell, name):
    """Bytes or Path of an undecoded cell of an image column. UnreadableImage where it is empty."""
    if cell and cell.get("bytes"):
        return cell["bytes"]
    if cell and cell.get("path"):
        return Path(cell["path"])
    raise UnreadableImage(name, "the image column is empty")


class TarMember(NamedTuple):
    """A file that lies in a tar without compression: `offset` and `size` are bytes."""

    tar: Path
    offset: int
    size: int

    def __str__(self):
        return f"the file at byte {self.offset} of {self.tar}"

    @contextlib.contextmanager
    def open(self, name):
        """The file, opened where it lies. UnreadableImage where the archive is gone."""
        info = tarfile.TarInfo()
        info.offset_data, info.size = self.offset, self.size
        try:
            archive = tarfile.open(self.tar, "r:")
        except (OSError, tarfile.TarError) as error:
            raise UnreadableImage(name, error) from error
        with archive, archive.extractfile(info) as file:
            yield file


class Record(NamedTuple):
    """One item before it is read. target, control: where the image lies, or the bytes of its file; no control: it is
    made by degrading the target. fault: why the item must be left out, or None."""

    name: str
    target: Path | HubImage | TarMember | bytes
    control: Path | HubImage | TarMember | bytes | None = None
    prompt: str | None = None
    fault: str | None = None


def fingerprint(listing):
    """32 hexadecimal digits that tell one list (of names, sizes, texts) from another: a run is resumed on the data that
    it began with."""
    return hashlib.blake2b(repr(listing).encode(), digest_size=16).hexdigest()


def folder_records(root):
    """One Record per image below `root`, or the image itself."""
    return [Record(str(path), path) for path in list_images(root)]


def by_stem(root):
    """{relative path without extension: path} of the images below a folder. ValueError where two share one."""
    root = Path(root)
    stems = {}
    for path in list_images(root):
        # macOS decomposes accents, other systems compose them
        stem = unicodedata.normalize("NFC", path.relative_to(root).with_suffix("").as_posix())
        if stem in stems:
            raise ValueError(f"{stems[stem]} and {path.name} have the same name apart from the extension; remove one")
        stems[stem] = path
    return stems


def pair_records(lr_root, hr_root, allow_missing=False):
    """Stored pairs, matched by relative path without extension; `0001x4.png` is a low-resolution `0001`.
    ValueError listing the first 5 images without partner, which `allow_missing` turns into Records with a fault."""
    for flag, root in (("--lr_root", lr_root), ("--hr_root", hr_root)):
        if not Path(root).is_dir():
            raise FileNotFoundError(f"{flag} {root} is not a folder; stored pairs are two folders")
    targets, controls = by_stem(hr_root), {}
    for stem, path in by_stem(lr_root).items():
        key = stem if stem in targets else re.sub(r"x\d+$", "", stem)
        if key in controls:
            raise ValueError(f"{controls[key]} and {path.name} are both the low-resolution image of {key}; remove one")
        controls[key] = path
    missing = [(targets[key], lr_root) for key in targets if key not in controls]
    missing += [(controls[key], hr_root) for key in controls if key not in targets]
    if missing and not allow_missing:
        first = ", ".join(str(path) for path, _ in missing[:5])
        raise ValueError(f"{len(missing)} images have no partner in --lr_root/--hr_root: {first}"
                         f"{', ...' if len(missing) > 5 else ''}; add them or pass --allow_missing")
    records = [Record(str(targets[key]), targets[key], controls[key]) for key in targets if key in controls]
    return records + [Record(str(path), path, fault=f"no partner in {root}") for path, root in missing]


def json_lines(path):
    """(line number, value) of every line of a file that is not blank. ValueError with the number for one that is not
    JSON."""
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); write one JSON object per "
                                 "line") from error
            yield number, value


def check_metadata(path):
    """Check a metadata.jsonl of an imagefolder before `datasets` reads it, which names neither line nor missing file.
    ValueError with the line number: not a JSON object, other keys than line 1, no file name, a file name that is
    absolute, holds `..` or does not exist."""
    keys = None
    for number, row in json_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not a JSON object; write one JSON object per line")
        keys = keys or set(row)
        if set(row) != keys:
            raise ValueError(f"{where}: keys {sorted(row)} differ from the first line's {sorted(keys)}")
        files = {key: row[key] for key in row if key == "file_name" or key.endswith("_file_name")}
        if not files:
            raise ValueError(f"{where}: no key file_name or *_file_name")
        for key, name in files.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"{where}: {key} {name!r} is not a file name")
            if ".." in re.split(r"[/\\]", name) or re.match(r"[/\\]|[A-Za-z]:", name):
                raise ValueError(f"{where}: {key} {name!r} leaves the folder; use a path below it without '..'")
            if not (path.parent / name).is_file():
                raise ValueError(f"{where}: {key} {name!r} does not exist")
    if keys is None:
        raise ValueError(f"{path}: empty; write one JSON object per line")


def load_table(name, config_name=None, cache_dir=None, streaming=False):
    """The training split of a local imagefolder or, where no such folder exists, a Hugging Face dataset; streaming: as
    an IterableDataset, of which nothing is kept on disk. ValueError or FileNotFoundError with the cure."""
    is_local = Path(name).is_dir()
    if is_local:
        for path in sorted(Path(name).rglob("metadata.jsonl")):
            check_metadata(path)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"--dataset_name {name}: no such folder, and not the name of a hub dataset")
    import datasets

    try:
        return datasets.load_dataset(str(Path(name).resolve()) if is_local else name, config_name, split="train",
                                     cache_dir=cache_dir, streaming=streaming)
    except Exception as error:  # datasets raises many kinds, several of its own
        cure = "check its files" if is_local else "check the name and the network, or give a local folder"
        raise ValueError(f"--dataset_name {name}: cannot be loaded ({' '.join(str(error).split())}); {cure}") from error


def find_column(table, name, flag, wanted, defaults=(), is_needed=False):
    """`wanted`, or the first of `defaults` that the table has, or None. ValueError naming `flag` where `wanted` is not
    there, or where nothing is and `is_needed`."""
    column = wanted or next((column for column in defaults if column in table.column_names), None)
    if wanted and wanted not in table.column_names or column is None and is_needed:
        raise ValueError(f"{flag} {wanted or 'is needed'}: {name} has the columns {', '.join(table.column_names)}")
    return column


def image_cells(table, name, flag, column):
    """The undecoded images of a column, one HubImage a row. ValueError naming `flag` for another kind of column."""
    import datasets

    if not isinstance(table.features[column], datasets.Image):
        raise ValueError(f"{flag} {column}: not an image column of {name}")
    images = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return [HubImage(images, row) for row in range(len(table))]


def caption_cells(table, name, column):
    """The texts of a column, one a row, None for what is empty and without a column. ValueError for another kind of
    column."""
    if column is None:
        return [None] * len(table)
    if getattr(table.features[column], "dtype", None) not in ("string", "large_string", "null"):
        raise ValueError(f"--caption_column {column}: not a column of text in {name}")
    return [text or None for text in table[column]]


def hub_records(name, config_name=None, image_column=None, cond_image_column=None, caption_column=None,
                cache_dir=None):
    """Records of the training split of a local imagefolder or, where no such folder exists, a Hugging Face dataset.
    Default columns: target `clean` or `image`; control `degraded`, prompt `prompt` where they exist."""
    table = load_table(name, config_name, cache_dir)
    image_column = find_column(table, name, "--image_column", image_column, ("clean", "image"), is_needed=True)
    cond_image_column = find_column(table, name, "--cond_image_column", cond_image_column, ("degraded",))
    prompts = caption_cells(table, name, find_column(table, name, "--caption_column", caption_column, ("prompt",)))
    targets = image_cells(table, name, "--image_column", image_column)
    controls = [None] * len(table)
    if cond_image_column:
        controls = image_cells(table, name, "--cond_image_column", cond_image_column)
    return [Record(f"{name}[{row}]", target, control, prompt)
            for row, (target, control, prompt) in enumerate(zip(targets, controls, prompts, strict=True))]


def read(source, max_pixels, name, reader):
    if isinstance(source, Path):
        return reader(source, max_pixels)
    if isinstance(source, TarMember):
        with source.open(name) as file:
            return reader(file, max_pixels, name)
    return reader(source if isinstance(source, bytes) else source.read(name), max_pixels, name)


def target_size(record, max_pixels):
    """(height, width) of a Record's target by its header; UnreadableImage for what training leaves out for it."""
    if record.fault:
        raise UnreadableImage(record.name, record.fault)
    height, width = read(record.target, max_pixels, record.name, image_size)
    if min(height, width) < MIN_SIDE_PX:
        raise UnreadableImage(record.name, f"{width}x{height} px is smaller than {MIN_SIDE_PX} px")
    return height, width


def check_headers(records, check):
    """(records, [check(record)], [(path, reason)]): what `check` refuses with UnreadableImage is left out and listed
    last. ValueError when nothing is left."""
    kept, results, unreadable = [], [], []
    for record in records:
        try:
            results.append(check(record))
            kept.append(record)
        except UnreadableImage as error:
            unreadable.append(error.args)
    if not kept:
        path, reason = unreadable[0] if unreadable else ("the source", "no image")
        raise ValueError(f"none of {len(unreadable)} images can be used, the first: {path}: {reason}")
    return kept, results, unreadable


def load_readable(load, records, index, bucket_of):
    """(record, load(record), skipped) of the record at `index`, or the next one that loads, those of the same bucket
    first; skipped: what could not be read, as text. ValueError after MAX_RETRIES of them."""
    def candidates():
        yield index
        following = [(index + step) % len(records) for step in range(1, len(records))]
        following.sort(key=lambda place: bucket_of[place] != bucket_of[index])
        yield from following[:MAX_RETRIES - 1]

    skipped = []
    for place in candidates():
        try:
            return records[place], load(records[place]), skipped
        except UnreadableImage as error:
            skipped.append(str(error))
    raise ValueError(f"{len(skipped)} images in a row could not be loaded, the last: {skipped[-1]}; is the folder "
                     "still there?")


def enlargement(lr_size, hr_size):
    """Whole number by which (height, width) `lr_size` is enlarged to give `hr_size`, or None."""
    factor = hr_size[0] // lr_size[0]
    return factor if (lr_size[0] * factor, lr_size[1] * factor) == tuple(hr_size) else None


def cover_crop(image, size, offset, zoom=1.0, kernel=Image.Resampling.BICUBIC):
    """Resize with antialiasing, keeping the aspect, so that both sides cover `size`, and crop to it.
    image: (H, W, 3) uint8. size: (height, width). offset: (y, x) in [0, 1], the place of the crop in what is left
    over, in whole pixels of the result: an image of that very size is returned as it is. zoom: at 1 or more, how much
    larger than needed the image stays before the crop; never so much that it would be enlarged for that."""
    height, width = image.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    scale = max(scale, min(scale * zoom, 1.0))
    top, left = (int(place * (int(side * scale - out + 1e-6) + 1) * (1 - 1e-9)) / scale
                 for place, side, out in zip(offset, (height, width), size, strict=True))
    box = (left, top, min(left + size[1] / scale, width), min(top + size[0] / scale, height))
    return np.array(Image.fromarray(image).resize((size[1], size[0]), kernel, box=box))


def to_tensor(image):
    """(H, W, 3) uint8 -> float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().div_(127.5).sub_(1)


class DegDataset(Dataset):
    """Pairs of a clean target and its degraded control, both float32 (3, resolution, resolution) in [-1, 1].

    source: a folder of clean images, or the list of `folder_records`, `pair_records` or `hub_records`.
    degrade(image, rng) -> (image, params): uint8 (H, W, 3) to the same shape, and a list that describes what was done;
    applied to the crop, so that its strength is in pixels of the training size. Not used for stored pairs.
    crop: "random" or "center". crop_zoom: range (lo, hi) of cover_crop's zoom. upscale_kernel: a key of KERNELS, for a
    control at a whole fraction of its target.

    The attribute `identity_probability` (0) may be set to the share of items whose control is the clean target itself,
    from which a model learns to leave alone what is not damaged; the other items stay as they are without it.

    An item is asked for by (index, epoch), or by index for epoch 0. `unreadable` lists (path, reason) of the files that
    were left out by their header. A file that fails later is replaced by the next readable one and named in the item's
    "skipped". ValueError when nothing is left or the sizes of a pair do not fit.

    `images`: how many there are. With `stream` set (my_dataset/streaming.py) that is None: `records` is then a first
    look, and an item is asked for by (index, epoch, Records: its own, and those that replace it)."""

    def __init__(self, source, degrade=None, resolution=512, prompt="", crop="random", random_flip=False, seed=0,
                 upscale_kernel="bicubic", max_pixels=MAX_PIXELS, crop_zoom=(1.0, 1.0)):
        if crop not in ("random", "center"):
            raise ValueError(f"crop {crop!r}: use random or center")
        if upscale_kernel not in KERNELS:
            raise ValueError(f"--upscale_kernel {upscale_kernel!r}: use one of {', '.join(KERNELS)}")
        self.degrade = degrade
        self.prompt = prompt
        self.crop = crop
        self.crop_zoom = crop_zoom
        self.identity_probability = 0.0
        self.random_flip = random_flip
        self.seed = seed
        self.upscale_kernel = KERNELS[upscale_kernel]
        self.max_pixels = max_pixels
        records = folder_records(source) if isinstance(source, str | Path) else source
        self.records, self.sizes, self.unreadable = check_headers(records, self._check_header)
        self.images, self.stream = len(self.records), None
        self.is_paired = any(record.control is not None for record in self.records)
        if degrade is None and not self.is_paired:
            raise ValueError("clean images need a degradation: pass --degradation_types, or pairs with --lr_root")
        self.buckets = [(resolution, resolution)]
        self.bucket_of = [0] * len(self.records)

    def _check_header(self, record):
        height, width = target_size(record, self.max_pixels)
        if record.control is not None:
            control_size = read(record.control, self.max_pixels, record.name, image_size)
            if not enlargement(control_size, (height, width)):
                control = record.control if isinstance(record.control, Path) else f"the control of {record.name}"
                raise ValueError(f"{control} ({control_size[1]}x{control_size[0]} px) is no whole fraction of "
                                 f"{record.name} ({width}x{height} px); store pairs of one size or at 1/2, 1/3, ...")
        return height, width

    def __len__(self):
        return len(self.records)

    def fingerprint(self):
        """Tells one set of images and captions from another, by names without folders, sizes, captions and order."""
        return fingerprint([(Path(record.name).name, size, record.prompt, record.control is not None)
                            for record, size in zip(self.records, self.sizes, strict=True)])

    def _load(self, record):
        target = read(record.target, self.max_pixels, record.name, load_rgb)
        if record.control is None:
            return target, None
        control = read(record.control, self.max_pixels, record.name, load_rgb)
        height, width = target.shape[:2]
        if not enlargement(control.shape[:2], (height, width)):
            raise UnreadableImage(record.name, "the sizes of the pair no longer fit")
        if control.shape != target.shape:
            control = np.array(Image.fromarray(control).resize((width, height), self.upscale_kernel))
        return target, control

    def __getitem__(self, key):
        index, epoch, *streamed = key if isinstance(key, tuple) else (key, 0)
        records, row, bucket_of = self.records, index, self.bucket_of
        if streamed:
            records, row, bucket_of = streamed[0], 0, [0] * len(streamed[0])
        if not 0 <= row < len(records):
            raise IndexError(index)
        record, (target, control), skipped = load_readable(self._load, records, row, bucket_of)
        bucket = bucket_of[row]
        size = self.buckets[bucket]
        rng = item_rng(self.seed, epoch, index, GEOMETRY_STREAM)
        place, flip = rng.random(2), rng.random() < 0.5
        if self.crop == "center":
            place = (0.5, 0.5)
        zoom = rng.uniform(*self.crop_zoom)
        images = [cover_crop(image, size, place, zoom) for image in (target, control) if image is not None]
        if self.random_flip and flip:
            images = [np.ascontiguousarray(image[:, ::-1]) for image in images]
        degradation = []
        if item_rng(self.seed, epoch, index, IDENTITY_STREAM).random() < self.identity_probability:
            images = [images[0], images[0]]
        elif control is None:
            degraded, degradation = self.degrade(images[0], item_rng(self.seed, epoch, index, DEGRADATION_STREAM))
            images.append(degraded)
        return {
            "target": to_tensor(images[0]),
            "control": to_tensor(images[1]),
            "prompt": record.prompt or self.prompt,
            "index": index,
            "epoch": epoch,
            "seed": item_seed(self.seed, epoch, index),
            "path": record.name,
            "bucket_idx": bucket,
            "degradation": degradation,
            "skipped": skipped,
        }


def collate_fn(items):
    """Batch of items of one bucket: target, control (B, 3, H, W); index, epoch, bucket_idx (B,) int64; seed, prompt,
    path, degradation, skipped as lists of B."""
    batch = {key: torch.stack([item[key] for item in items]) for key in ("target", "control")}
    batch |= {key: torch.tensor([item[key] for item in items]) for key in ("index", "epoch", "bucket_idx")}
    # seeds stay Python integers: they are read on the host, and a tensor would be moved to the device and back
    names = ("seed", "prompt", "path", "degradation", "skipped")
    return batch | {key: [item[key] for item in items] for key in names}


def use_one_thread(worker_id):
    """worker_init_fn: loader processes share the cores already; OpenCV's own threads would fight them. A signal to the
    trainer's process group (Ctrl-C, torchrun's SIGTERM) is the trainer's to answer: it still needs its loaders."""
    os.setsid()
    cv2.setNumThreads(0)  # 0 computes in the caller; 1 would first join the trainer's pool, which no fork takes along


def _file_size(source):
    """Bytes of the file of an image, a Record's or Example's."""
    if isinstance(source, TarMember):
        return source.size
    source = source.read(source) if isinstance(source, HubImage) else source
    return len(source) if isinstance(source, bytes) else os.path.getsize(source)


def _digest(source):
    def digest(file, *_):
        if isinstance(file, bytes):
            return hashlib.blake2b(file).digest()
        with open(file, "rb") if isinstance(file, Path) else contextlib.nullcontext(file) as stream:
            return hashlib.file_digest(stream, hashlib.blake2b).digest()

    return read(source, None, source, digest)


def check_no_overlap(training, heldout):
    """ValueError naming the first held-out image whose file is, byte for byte, also a training image's. Both are lists
    of what a Record has for an image; only files of one size are read in full, but of a table every cell."""
    by_size, digest = {}, functools.cache(_digest)
    for source in training:
        by_size.setdefault(_file_size(source), []).append(source)
    for source in heldout:
        for other in by_size.get(_file_size(source), ()):
            if digest(source) == digest(other):
                raise ValueError(f"{source} (held out) is the same file as {other} (training); remove one of them")


def add_data_args(parser):
    """Add the options that `dataset_from_args` reads."""
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--hr_root", "--instance_data_dir", help="folder of clean images, read recursively")
    add("--lr_root", help="folder of degraded images; with --hr_root: stored pairs, matched by relative path")
    add("--dataset_name", help="imagefolder, folder of .tar shards (webdataset's layout) or Hugging Face dataset; a "
        "mere label when --hr_root is given")
    add("--dataset_config_name", help="configuration of --dataset_name")
    add("--image_column", help="column of the clean images (default: clean, else image)")
    add("--cond_image_column", help="column of the degraded images (default: degraded where it exists)")
    add("--caption_column", help="column of the prompts (default: prompt where it exists)")
    add("--resolution", type=int, default=512, help="side of the square crops in pixels, a multiple of 16")
    add("--center_crop", action="store_true", help="crop in the centre instead of at random")
    add("--crop_zoom", default="1", help="crop from an image this many times larger than the crop needs, a value or "
        "lo-hi: 1 shows whole scenes, more shows finer detail; images are never enlarged for it")
    add("--random_flip", action="store_true", help="mirror half of the samples")
    add("--use_bucket_sampler", "--use_aspect_ratio_buckets", action="store_true",
        help="crop to the nearest of --aspect_ratio_buckets instead of a square")
    add("--aspect_ratio_buckets", help='"h:w,h:w" or "h,w;h,w"; implies --use_bucket_sampler (default: the 17 sizes of '
                                       "FLUX.1 Kontext)")
    add("--identity_probability", help="share of the samples left undamaged, stored pairs too, so that training also "
        "shows what needs no restoring; 0.05 with --degradation_preset, else 0; validation and scoring have none")
    add("--upscale_kernel", choices=sorted(KERNELS), default="bicubic",
        help="kernel that enlarges stored degraded images to the size of the clean ones")
    add("--allow_missing", action="store_true", help="skip stored images without partner instead of stopping")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="leave out images with more pixels than this")
    add("--dataloader_num_workers", type=int, default=0, help="loader processes; 0 loads in the training process")


def dataset_from_args(args, degrade, prompt="", seed=0):
    """The DegDataset or DegBucketDataset that the options of `add_data_args` ask for, and --streaming, if there is one.
    degrade: as for DegDataset, or None. ValueError or FileNotFoundError naming the flag that is wrong, one of
    `add_degradation_args` beside stored pairs among them."""
    from my_dataset.dataset_deg_bucket import KONTEXT_BUCKETS, DegBucketDataset, parse_buckets_string
    from my_dataset.streaming import stream_from_args
    from my_dataset.tar_shards import is_tar_folder, tar_records

    if args.lr_root and not args.hr_root:
        raise ValueError("--lr_root needs --hr_root with the clean images of the pairs")
    if not args.hr_root and not args.dataset_name:
        raise ValueError("no images: pass --hr_root FOLDER, --lr_root with --hr_root, or --dataset_name")
    streaming = getattr(args, "streaming", False)  # an option of streaming.py
    if streaming and (args.hr_root or not args.dataset_name):
        raise ValueError("--streaming reads --dataset_name: name it, and leave out --hr_root")
    if args.resolution < MIN_SIDE_PX or args.resolution % 16:
        raise ValueError(f"--resolution {args.resolution} must be a positive multiple of 16")
    if args.max_pixels < 1:
        raise ValueError(f"--max_pixels {args.max_pixels} must be positive")
    if args.dataloader_num_workers < 0:
        raise ValueError(f"--dataloader_num_workers {args.dataloader_num_workers} must be 0 or more")
    buckets = parse_buckets_string(args.aspect_ratio_buckets) if args.aspect_ratio_buckets else KONTEXT_BUCKETS
    stream, columns = None, (args.image_column, args.cond_image_column, args.caption_column)
    if args.lr_root:
        records = pair_records(args.lr_root, args.hr_root, args.allow_missing)
    elif args.hr_root:
        records = folder_records(args.hr_root)
    elif streaming:
        stream = stream_from_args(args, *columns)
        records = [stream.first()]
    elif is_tar_folder(args.dataset_name):
        records = tar_records(args.dataset_name, *columns)
    else:
        records = hub_records(args.dataset_name, args.dataset_config_name, *columns,
                              cache_dir=getattr(args, "cache_dir", None))  # an option of flux.py
    if any(record.control is not None for record in records):
        check_not_degraded(args)
    common = {
        "prompt": prompt,
        "crop": "center" if args.center_crop else "random",
        "crop_zoom": parse_range(args.crop_zoom, "--crop_zoom", 1),
        "random_flip": args.random_flip,
        "seed": seed,
        "upscale_kernel": args.upscale_kernel,
        "max_pixels": args.max_pixels,
    }
    identity = args.identity_probability
    if identity is None:  # --degradation_preset is an option of degradations.py, which a caller may do without
        identity = 0.05 if getattr(args, "degradation_preset", None) else 0
    identity = parse_probability(identity, "--identity_probability")
    if args.use_bucket_sampler or args.aspect_ratio_buckets:
        dataset = DegBucketDataset(records, degrade, buckets, **common)
    else:
        dataset = DegDataset(records, degrade, args.resolution, **common)
    dataset.identity_probability = identity
    if stream:
        dataset.stream, dataset.images = stream, None
    return dataset

"""Images of a subject, or of an edit together with the images it starts from, each with its own caption; and class
images for prior preservation.

An item is a function of (seed, epoch, index) alone. Targets and references go with their captions in one record, so
that no order, batch or epoch can mix them up."""

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from my_dataset.dataset_deg_bucket import KONTEXT_BUCKETS, find_nearest_bucket, parse_buckets_string
from my_dataset.dataset_deg_paired import (
    CAPTION_STREAM,
    CLASS_GEOMETRY_STREAM,
    CLASS_TRAINING_STREAM,
    GEOMETRY_STREAM,
    HubImage,
    by_stem,
    caption_cells,
    check_headers,
    check_no_overlap,
    cover_crop,
    find_column,
    fingerprint,
    heldout_seed,
    image_cells,
    item_rng,
    item_seed,
    load_readable,
    load_table,
    read,
    to_tensor,
)
from my_dataset.images import (
    EXTENSIONS,
    MAX_PIXELS,
    MIN_SIDE_PX,
    UnreadableImage,
    image_size,
    list_images,
    load_image,
    load_rgb,
)
from my_dataset.references import reference_tensors

CAPTION_COLUMNS = ("prompt", "text", "caption")
REFERENCE_MULTIPLE_PX = 16  # FLUX's token; every model here takes it


class Example(NamedTuple):
    """One training image before it is read. references: the images it is made from, none for a subject. prompt: its
    own caption, or None."""

    name: str
    target: Path | HubImage
    references: tuple[Path | HubImage, ...] = ()
    prompt: str | None = None


def read_caption(image):
    """The text of the .txt file beside an image, or None. ValueError where it is no UTF-8."""
    path = image.with_suffix(".txt")
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8-sig").strip() or None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error


def folder_examples(folder, reference_folders=(), caption_of=read_caption):
    """The images below a folder with the captions beside them, caption_of(path); in each of `reference_folders` every
    one has a partner of the same relative path, whatever the extension. ValueError listing the first 5 without
    partner."""
    if not reference_folders:
        return [Example(str(path), path, (), caption_of(path)) for path in list_images(folder)]
    targets, partners = by_stem(folder), [by_stem(reference) for reference in reference_folders]
    for reference_folder, found in zip(reference_folders, partners, strict=True):
        if alone := sorted(targets.keys() ^ found.keys()):
            raise ValueError(f"{len(alone)} images of {folder} and {reference_folder} have no partner: "
                             f"{', '.join(alone[:5])}{', ...' if len(alone) > 5 else ''}; add or remove them")
    return [Example(str(path), path, tuple(found[stem] for found in partners), caption_of(path))
            for stem, path in targets.items()]


def table_examples(name, config_name=None, image_column=None, reference_columns=(), caption_column=None,
                   cache_dir=None):
    """The rows of a hub dataset or of a folder with a metadata.jsonl. Without `caption_column` the first of
    CAPTION_COLUMNS counts where it exists. ValueError naming the option whose column is not there."""
    table = load_table(name, config_name, cache_dir)
    image_column = find_column(table, name, "--image_column", image_column, ("image",), is_needed=True)
    prompts = caption_cells(table, name,
                            find_column(table, name, "--caption_column", caption_column, CAPTION_COLUMNS))
    targets = image_cells(table, name, "--image_column", image_column)
    columns = [image_cells(table, name, "--cond_image_column",
                           find_column(table, name, "--cond_image_column", column)) for column in reference_columns]
    return [Example(f"{name}[{row}]", target, tuple(cells[row] for cells in columns), prompts[row])
            for row, target in enumerate(targets)]


def reference_size(height, width, side_px):
    """(height, width) of a reference that keeps its own shape: about side_px^2 pixels, multiples of 16."""
    scale = side_px / (height * width) ** 0.5
    return tuple(max(round(side * scale / REFERENCE_MULTIPLE_PX), 1) * REFERENCE_MULTIPLE_PX
                 for side in (height, width))


class DreamBoothDataset(Dataset):
    """Targets float32 (3, H, W) in [-1, 1] with their references, captions and, for prior preservation, class images.

    examples: list of Example. buckets: list of (height, width); each image is resized with its aspect kept and cropped
    to the nearest. A reference gets the crop and mirroring of its target, or with `reference_px` its own shape at about
    reference_px^2 pixels, whole. prompt: of images without caption. repeats: times that each image counts in an epoch.
    caption_dropout: share of the items whose caption is left empty. class_images: paths, read when they are needed;
    an epoch is as long as the larger of images and class images. is_fixed: crops and mirroring of epoch 0 in every
    epoch.

    An item is asked for by (index, epoch), or by index for epoch 0. `unreadable` lists (path, reason) of what was left
    out by its header; a file that fails later is replaced by the next and named in the item's "skipped"."""

    def __init__(self, examples, buckets, prompt=None, crop="random", random_flip=False, seed=0, repeats=1,
                 caption_dropout=0.0, class_images=(), class_prompt=None, reference_px=None, is_fixed=False,
                 max_pixels=MAX_PIXELS):
        self.buckets, self.prompt, self.crop, self.random_flip, self.seed = buckets, prompt, crop, random_flip, seed
        self.caption_dropout, self.class_images, self.class_prompt = caption_dropout, list(class_images), class_prompt
        self.reference_px, self.is_fixed, self.max_pixels = reference_px, is_fixed, max_pixels
        self.examples, self.sizes, self.unreadable = check_headers(examples, self._check_header)
        if prompt is None and (bare := next((example for example in self.examples if not example.prompt), None)):
            raise ValueError(f"{bare.name} has no caption; pass --instance_prompt, or give it one: a .txt file beside "
                             "an image, or a cell of --caption_column")
        # A batch holds one size of target and references.
        keys = [(find_nearest_bucket(*target, buckets), references) for target, references in self.sizes]
        places = {key: place for place, key in enumerate(sorted(set(keys)))}
        self.size_of = [(buckets[bucket], references) for bucket, references in keys]
        self.example_bucket = [places[key] for key in keys]
        count = max(len(self.examples) * repeats, len(self.class_images))
        self.bucket_of = [self.example_bucket[index % len(self.examples)] for index in range(count)]

    def _check_header(self, example):
        """((height, width) of the target, sizes that its references get)."""
        sizes = [read(source, self.max_pixels, example.name, image_size)
                 for source in (example.target, *example.references)]
        if min(min(size) for size in sizes) < MIN_SIDE_PX:
            raise UnreadableImage(example.name, f"smaller than {MIN_SIDE_PX} px")
        references = [reference_size(*size, self.reference_px) for size in sizes[1:]] if self.reference_px else []
        return sizes[0], tuple(references)

    def __len__(self):
        return len(self.bucket_of)

    def largest_sizes(self):
        """((height, width) of the target, then of each reference) of the items with the most pixels."""
        sizes = [(target, *(references or [target] * len(example.references)))
                 for example, (target, references) in zip(self.examples, self.size_of, strict=True)]
        return max(sizes, key=lambda of: sum(height * width for height, width in of))

    def fingerprint(self):
        """Tells one set of images and captions from another, by names without folders, captions and order."""
        items = [(Path(example.name).name, example.prompt or self.prompt) for example in self.examples]
        classes = [path.name for path in self.class_images]
        return fingerprint([items, classes])

    def _load(self, example):
        return [read(source, self.max_pixels, example.name, load_rgb)
                for source in (example.target, *example.references)]

    def _geometry(self, epoch, index, stream):
        """(place of the crop, whether to mirror) of one item."""
        rng = item_rng(self.seed, 0 if self.is_fixed else epoch, index, stream)
        place, flip = rng.random(2), rng.random() < 0.5
        return (0.5, 0.5) if self.crop == "center" else place, self.random_flip and flip

    def _class_item(self, index, epoch, size):
        place, flip = self._geometry(epoch, index, CLASS_GEOMETRY_STREAM)
        path, image, skipped = load_readable(
            lambda path: load_rgb(path, self.max_pixels), self.class_images, index % len(self.class_images),
            [0] * len(self.class_images))
        image = cover_crop(image, size, place)
        return {"class_target": to_tensor(image[:, ::-1] if flip else image), "class_prompt": self.class_prompt,
                "class_path": str(path), "class_skipped": skipped,
                "class_seed": item_seed(self.seed, epoch, index, CLASS_TRAINING_STREAM)}

    def __getitem__(self, key):
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        if not 0 <= index < len(self):
            raise IndexError(index)
        place_in_list = index % len(self.examples)
        size, reference_sizes = self.size_of[place_in_list]
        example, images, skipped = load_readable(self._load, self.examples, place_in_list, self.example_bucket)
        place, flip = self._geometry(epoch, index, GEOMETRY_STREAM)
        crops = [cover_crop(images[0], size, place)]
        for i, image in enumerate(images[1:]):
            own = (reference_sizes[i], (0.5, 0.5)) if self.reference_px else (size, place)
            crops.append(cover_crop(image, *own))
        target, *references = [to_tensor(np.ascontiguousarray(crop[:, ::-1]) if flip else crop) for crop in crops]
        is_dropped = item_rng(self.seed, epoch, index, CAPTION_STREAM).random() < self.caption_dropout
        item = {"target": target, "references": references, "index": index, "epoch": epoch,
                "prompt": "" if is_dropped else example.prompt or self.prompt,
                "seed": item_seed(self.seed, epoch, index), "path": example.name, "skipped": skipped}
        return item | (self._class_item(index, epoch, size) if self.class_images else {})


def collate_fn(items):
    """Batch of B items of one bucket: target (B, 3, H, W), references as a list of (B, 3, h, w); prompt, seed, path,
    skipped as lists. With class images the batch is 2 B long, those last; they have no references."""
    batch = {"target": torch.stack([item["target"] for item in items]),
             "references": [torch.stack(own) for own in zip(*(item["references"] for item in items), strict=True)]}
    batch |= {name: [item[name] for item in items] for name in ("prompt", "seed", "path", "skipped")}
    batch |= {name: torch.tensor([item[name] for item in items]) for name in ("index", "epoch")}
    if "class_target" in items[0]:
        batch["target"] = torch.cat([batch["target"], torch.stack([item["class_target"] for item in items])])
        for name in ("prompt", "seed", "path", "skipped"):
            batch[name] += [item[f"class_{name}"] for item in items]
    return batch


def plan_class_images(folder, count):
    """(paths, missing): the `count` class images of a folder in the order of their names, and which of them are to be
    generated. Whatever images lie there count first."""
    folder = Path(folder)
    there = sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in EXTENSIONS)[:count]
    names = (folder / f"class_{i:05d}.png" for i in itertools.count())
    missing = list(itertools.islice((path for path in names if path not in there), count - len(there)))
    return sorted(there + missing), missing


def add_data_args(parser):
    """Add the options that `dataset_from_args` and `heldout_from_args` read: the official script's, and a few more."""
    add = parser.add_argument_group("data").add_argument
    add("--instance_data_dir", help="folder of training images, read recursively; a caption is the .txt file beside an "
        "image, or stands in the folder's metadata.jsonl")
    add("--dataset_name", help="imagefolder or Hugging Face dataset, instead of --instance_data_dir")
    add("--dataset_config_name", help="configuration of --dataset_name")
    add("--image_column", default="image", help="column of the training images")
    add("--caption_column", help="column of the captions; default: prompt, text or caption, but none with "
        "--dataset_name and --instance_prompt, as in diffusers' script")
    add("--cond_image_column", help="edit training: column of the image that the edit starts from; several references: "
        "a comma list")
    add("--cond_data_dir", nargs="+", default=[], help="edit training from folders: that of the images the edits start "
        "from, with the file names of --instance_data_dir; several references: several folders")
    add("--cond_resolution", type=int, help="references keep their own shape, whole, at about this side squared; "
        "default: they are cropped as their target is")
    add("--instance_prompt", help="prompt of every image without caption, such as 'a photo of sks dog'")
    add("--caption_dropout", type=float, default=0.0, help="share of the samples whose caption is left empty")
    add("--repeats", type=int, default=1, help="times each image counts in an epoch")
    add("--resolution", type=int, default=512, help="side of the square crops in pixels, a multiple of 16")
    add("--center_crop", action="store_true", help="crop in the centre instead of at random")
    add("--random_flip", action="store_true", help="mirror half of the samples, drawn anew every epoch")
    add("--use_aspect_ratio_buckets", action="store_true", help="crop to the nearest of --aspect_ratio_buckets instead "
        "of a square")
    add("--aspect_ratio_buckets", help='"h,w;h,w" or "h:w,h:w" (default: the 17 shapes of FLUX.1 Kontext at about '
        "--resolution squared pixels)")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="leave out images with more pixels than this")
    add("--dataloader_num_workers", type=int, default=0, help="loader processes; 0 loads in the training process")
    add("--heldout_data_dir", help="edit training: held-out edited images, with captions as in --instance_data_dir; "
        "validation edits their references and scores the result")
    add("--heldout_cond_data_dir", nargs="+", default=[], help="their references, folders as in --cond_data_dir")

    add = parser.add_argument_group("prior preservation").add_argument
    add("--with_prior_preservation", action="store_true", help="train on images of the subject's class beside it")
    add("--prior_loss_weight", type=float, default=1.0, help="weight of their loss")
    add("--class_data_dir", help="folder of class images; what is missing there is generated")
    add("--class_prompt", help="prompt of the class images, such as 'a photo of a dog'")
    add("--num_class_images", type=int, default=100, help="how many there shall be")
    add("--sample_batch_size", type=int, default=4, help="class images generated at once")


def examples_from_args(args):
    """The training Examples that the options of `add_data_args` name. ValueError or FileNotFoundError with the cure."""
    if bool(args.instance_data_dir) == bool(args.dataset_name):
        raise ValueError("give the training images with --instance_data_dir FOLDER or with --dataset_name, one of them")
    columns = [column.strip() for column in (args.cond_image_column or "").split(",") if column.strip()]
    if args.cond_data_dir and (args.dataset_name or columns):
        raise ValueError("--cond_data_dir goes with --instance_data_dir; a dataset has --cond_image_column")
    if args.dataset_name:
        examples = table_examples(args.dataset_name, args.dataset_config_name, args.image_column, columns,
                                  args.caption_column, args.cache_dir)
        if args.instance_prompt and not args.caption_column:  # as in the official script
            examples = [example._replace(prompt=None) for example in examples]
        return examples
    if not Path(args.instance_data_dir).is_dir():
        raise FileNotFoundError(f"--instance_data_dir {args.instance_data_dir}: no such folder")
    if (Path(args.instance_data_dir) / "metadata.jsonl").is_file():
        if args.cond_data_dir:
            raise ValueError(f"{args.instance_data_dir} has a metadata.jsonl: name the references in it "
                             '("cond_file_name") and pass --cond_image_column cond instead of --cond_data_dir')
        return table_examples(args.instance_data_dir, None, args.image_column, columns, args.caption_column)
    if columns or args.caption_column:
        raise ValueError(f"--cond_image_column and --caption_column: {args.instance_data_dir} has no metadata.jsonl "
                         "with columns; use --cond_data_dir and .txt files, or write one")
    return folder_examples(args.instance_data_dir, args.cond_data_dir)


def dataset_from_args(args, class_images=()):
    """The DreamBoothDataset that the options of `add_data_args` ask for. ValueError or FileNotFoundError naming the
    flag that is wrong."""
    if args.resolution < MIN_SIDE_PX or args.resolution % 16:
        raise ValueError(f"--resolution {args.resolution} must be a positive multiple of 16")
    buckets = [(args.resolution, args.resolution)]
    if args.use_aspect_ratio_buckets or args.aspect_ratio_buckets:
        from diffusers.training_utils import generate_aspect_ratio_buckets  # seconds to import

        buckets = (parse_buckets_string(args.aspect_ratio_buckets) if args.aspect_ratio_buckets else
                   generate_aspect_ratio_buckets(args.resolution, REFERENCE_MULTIPLE_PX, KONTEXT_BUCKETS))
    return DreamBoothDataset(
        examples_from_args(args), buckets, args.instance_prompt, "center" if args.center_crop else "random",
        args.random_flip, args.seed, args.repeats, args.caption_dropout, class_images, args.class_prompt,
        args.cond_resolution, args.cache_latents, args.max_pixels)


def heldout_from_args(args, training):
    """The first --num_validation_images items of --heldout_data_dir, centre crops without mirroring; [] without it.
    ValueError if a reference is one of training's, or where their number is another."""
    if not args.heldout_data_dir:
        if args.heldout_cond_data_dir:
            raise ValueError("--heldout_cond_data_dir needs --heldout_data_dir with the true edited images")
        return []
    heldout = argparse.Namespace(**vars(args) | {
        "instance_data_dir": args.heldout_data_dir, "cond_data_dir": args.heldout_cond_data_dir, "dataset_name": None})
    if not (Path(args.heldout_data_dir) / "metadata.jsonl").is_file():
        heldout.cond_image_column = heldout.caption_column = None  # those of a training table
    examples = examples_from_args(heldout)
    count = len(training.examples[0].references)
    if not count or {len(example.references) for example in examples} != {count}:
        raise ValueError(f"--heldout_cond_data_dir: training has {count} references an image, so the held-out images "
                         "need as many (they are scored in edit training alone)")
    dataset = DreamBoothDataset(examples, training.buckets, args.instance_prompt, "center",
                                seed=heldout_seed(args.seed), reference_px=args.cond_resolution,
                                max_pixels=args.max_pixels)
    check_no_overlap(*([source for example in some.examples for source in example.references]
                       for some in (training, dataset)))
    return [dataset[i] for i in range(min(args.num_validation_images, len(dataset)))]


def load_validation_references(args):
    """The images of --validation_image, each (1, 3, H, W) in [-1, 1] in its own shape, at most --resolution^2 px."""
    return reference_tensors([load_image(path, args.max_pixels) for path in args.validation_image], args.resolution)

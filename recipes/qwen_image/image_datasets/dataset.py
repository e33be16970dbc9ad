"""Captioned images, and for edit training the image that each is made from, at sizes of their own shapes:

    dataset = CustomImageDataset("your_lora_dataset")   # image1.jpg and image1.txt, image2.png and image2.txt, ...
    loader = make_loader(dataset, collate_fn, args)     # my_dataset.dataset_deg_bucket's: a batch has one size

An item is a function of (seed, epoch, index) alone, and its pixels of the index, so that latents can be cached."""

import json
from pathlib import Path

import torch
from torch.utils.data import Dataset

from my_dataset.dataset_deg_paired import (
    CAPTION_STREAM,
    by_stem,
    check_headers,
    cover_crop,
    item_rng,
    item_seed,
    load_readable,
    to_tensor,
)
from my_dataset.dataset_dreambooth import folder_examples, read_caption
from my_dataset.images import MAX_PIXELS, MIN_SIDE_PX, UnreadableImage, image_size, load_rgb

MULTIPLE_PX = 32  # of the published trainer; the model takes 16: 8 pixels a latent, 2 x 2 latents a token
RATIOS = (None, (9, 16), (1, 1), (3, 4))  # (height, width) of random_ratio, None being the image's own
NO_CAPTION = " "  # the negative prompt of the model's own examples


def target_size(height, width, img_size):
    """(height, width) of this shape whose long side is img_size, both rounded down to multiples of 32."""
    return tuple(max(img_size * side // max(height, width) // MULTIPLE_PX, 1) * MULTIPLE_PX
                 for side in (height, width))


def edit_size(height, width, img_size):
    """(height, width) of this shape and about img_size^2 pixels, multiples of 32, as the edit pipelines have it."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions  # seconds to import

    width, height, _ = calculate_dimensions(img_size**2, width / height)
    return max(height, MULTIPLE_PX), max(width, MULTIPLE_PX)


def read_json_caption(image):
    """The "caption" of the .json file beside an image, or None. ValueError where the file is no JSON."""
    path = image.with_suffix(".json")
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f'{path}: not JSON ({error}); write {{"caption": "..."}}') from error
    caption = value.get("caption") if isinstance(value, dict) else None
    return caption.strip() or None if isinstance(caption, str) else None


CAPTION_READERS = {"txt": read_caption, "json": read_json_caption}


class CustomImageDataset(Dataset):
    """Images, each with the caption beside it: <name>.txt, or <name>.json with a "caption".

    img_dir: their folder, read recursively. control_dir: for edit training the folder of the images that the edits
    start from, with the same relative names, whatever the extension.
    Every image is resized with its aspect kept and cropped at its centre: to `target_size`, in edit training to
    `edit_size`, target and control each after its own shape. random_ratio: an epoch has each image four times, once in
    every of RATIOS (16:9 and 4:3 lie flat for upright images too). repeats: times that all this counts in an epoch.
    caption_dropout_rate: share of the items whose caption is " ".

    An item is asked for by (index, epoch), or by index for epoch 0. The first len(sizes) items are all the different
    pictures there are; `sizes` has their (size of the target,) or (size of the target, size of the control), a size
    being (height, width).
    `unreadable` lists (path, reason) of what was left out by its header; a file that fails later is replaced by the
    next and named in the item's "skipped". ValueError or FileNotFoundError naming the caption, partner or option that
    is missing or wrong."""

    def __init__(self, img_dir, img_size=1024, caption_type="txt", random_ratio=False, caption_dropout_rate=0.1,
                 control_dir=None, seed=0, repeats=1, max_pixels=MAX_PIXELS):
        if img_size < MULTIPLE_PX:
            raise ValueError(f"--img_size {img_size}: give {MULTIPLE_PX} or more")
        if repeats < 1:
            raise ValueError(f"--repeats {repeats}: give 1 or more")
        if not 0 <= caption_dropout_rate <= 1:
            raise ValueError(f"--caption_dropout_rate {caption_dropout_rate}: give a share from 0 to 1")
        if caption_type not in CAPTION_READERS:
            raise ValueError(f"--caption_type {caption_type}: use one of {', '.join(CAPTION_READERS)}")
        for flag, folder in (("--img_dir", img_dir), ("--control_dir", control_dir)):
            if folder and not Path(folder).is_dir():
                raise FileNotFoundError(f"{flag} {folder}: no such folder")
        self.caption_dropout_rate, self.seed, self.max_pixels = caption_dropout_rate, seed, max_pixels
        self.dropped = [NO_CAPTION] if caption_dropout_rate else []
        by_stem(img_dir)  # refuses a.jpg beside a.png, for which there is one caption
        examples = folder_examples(img_dir, [control_dir] if control_dir else [], CAPTION_READERS[caption_type])
        self.examples, shapes, self.unreadable = check_headers(examples, self._check_header)
        if bare := [example.name for example in self.examples if not example.prompt]:
            raise ValueError(f"{len(bare)} images have no caption: {', '.join(bare[:5])}"
                             f"{', ...' if len(bare) > 5 else ''}; write a .{caption_type} file beside each")
        fit = edit_size if control_dir else target_size
        self.sizes = [tuple(fit(*(ratio or shape), img_size) for shape in item_shapes)
                      for ratio in (RATIOS if random_ratio else (None,)) for item_shapes in shapes]
        places = {size: place for place, size in enumerate(sorted(set(self.sizes)))}
        self.bucket_of = [places[size] for size in self.sizes] * repeats

    def _check_header(self, example):
        shapes = [image_size(path, self.max_pixels) for path in (example.target, *example.references)]
        if min(min(shape) for shape in shapes) < MIN_SIDE_PX:
            raise UnreadableImage(example.name, f"smaller than {MIN_SIDE_PX} px")
        return shapes

    def __len__(self):
        return len(self.bucket_of)

    def captions(self):
        """Every caption that training can ask for, once."""
        return list(dict.fromkeys([example.prompt for example in self.examples] + self.dropped))

    def text_inputs(self):
        """Every (caption, control) that edit training can ask for, one by one, since its texts are encoded together
        with the control: (3, H, W) in [-1, 1]."""
        for place in range(len(self.sizes)):
            example, (_, control), _ = self.picture(place)
            for caption in (example.prompt, *self.dropped):
                yield caption, control

    def _load(self, example):
        return [load_rgb(path, self.max_pixels) for path in (example.target, *example.references)]

    def picture(self, place):
        """(example, [target and control as tensors], skipped) of the picture that has sizes[place]."""
        example, images, skipped = load_readable(self._load, self.examples, place % len(self.examples), self.bucket_of)
        crops = [to_tensor(cover_crop(image, size, (0.5, 0.5)))
                 for image, size in zip(images, self.sizes[place], strict=True)]
        return example, crops, skipped

    def __getitem__(self, key):
        return self.item(key, self.picture)

    def item(self, key, picture):
        """The item that `key` asks for, its images and their record by picture(place), as of the method of this
        name."""
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        if not 0 <= index < len(self):
            raise IndexError(index)
        example, crops, skipped = picture(index % len(self.sizes))
        is_dropped = item_rng(self.seed, epoch, index, CAPTION_STREAM).random() < self.caption_dropout_rate
        return dict(zip(("target", "control"), crops, strict=False)) | {
            "caption": NO_CAPTION if is_dropped else example.prompt, "index": index, "epoch": epoch,
            "seed": item_seed(self.seed, epoch, index), "path": example.name, "skipped": skipped}


def collate_fn(items):
    """Batch of B items of one bucket: target (B, 3, H, W) and, in edit training, control (B, 3, Hc, Wc); the rest as
    lists of B."""
    return {key: torch.stack([item[key] for item in items]) if key in ("target", "control") else
            [item[key] for item in items] for key in items[0]}


def add_data_args(parser):
    """Add the options that `dataset_from_args` reads."""
    add = parser.add_argument_group("data").add_argument
    add("--img_dir", "--path", required=True, help="folder of training images, read recursively, each with a caption "
        "beside it")
    add("--control_dir", help="edit training: folder of the images that the edits start from, named as in --img_dir")
    add("--img_size", type=int, default=1024, help="long side in px; edit training: side of the square whose area "
        "images get. Both sides become multiples of 32")
    add("--caption_type", choices=CAPTION_READERS, default="txt", help='the caption of a.png is the text of a.txt, or '
        'the "caption" in a.json')
    add("--caption_dropout_rate", type=float, default=0.1, help="share of the samples with the caption ' ', for "
        "classifier-free guidance")
    add("--random_ratio", action="store_true", help="crop each image to 16:9, 1:1 and 4:3 too")
    add("--repeats", type=int, default=1, help="times each image counts in an epoch")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="leave out images with more pixels than this")


def dataset_from_args(args):
    """The CustomImageDataset that the options of `add_data_args`, and --seed, ask for."""
    return CustomImageDataset(args.img_dir, args.img_size, args.caption_type, args.random_ratio,
                              args.caption_dropout_rate, args.control_dir, args.seed, args.repeats, args.max_pixels)

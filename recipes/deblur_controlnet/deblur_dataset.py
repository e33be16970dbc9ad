"""Pairs of a sharp and a blurred image for the deblurring ControlNet: stored by create_deblur_dataset.py, or blurred on
the fly from a folder of sharp images.

    loader = make_loader(DeblurDataset(read_pairs("training/deblur_dataset")), collate_fn, args)
    loader = make_loader(DeblurDataset("photos", blur=partial(random_blur, weights=parse_type_weights("1"))), ...)

`make_loader` is my_dataset.dataset_deg_bucket's. A sample is a function of (seed, epoch, index) alone."""

import json
from functools import partial
from pathlib import Path

from my_dataset import dataset_deg_paired
from my_dataset.dataset_deg_paired import CAPTION_STREAM, DegDataset, Record, item_rng, json_lines
from my_dataset.degradations import (
    defocus_kernel,
    gaussian_blur,
    lens_blur,
    linear_to_srgb,
    motion_kernel,
    parse_probability,
    parse_range,
    pick,
    sparse_blur,
    srgb_to_linear,
)
from my_dataset.images import MAX_PIXELS, MIN_SIDE_PX, UnreadableImage
from utils.parse import check_least

BLUR_TYPES = ("motion_blur", "gaussian_blur", "defocus_blur", "lens_blur")
CLEAR_FOLDER, BLUR_FOLDER, JSON_FILE = "clear_images", "blur_images", "blur_types.json"
BRIGHTNESS_STREAM = 100  # of item_rng, beyond those of my_dataset
DESCRIPTIONS = {
    "motion_blur": "motion blur removed, sharp and clear",
    "gaussian_blur": "gaussian blur removed, crisp and detailed",
    "defocus_blur": "defocus blur removed, in focus and sharp",
    "lens_blur": "lens blur removed, clear and focused",
}


def parse_type_weights(text):
    """{blur type: chance}, summing to 1, of "1" (all alike) or "motion_blur:2,lens_blur:1"; a type that is not named is
    left out. ValueError naming --type_weights for anything else."""
    text = str(text)  # a --config file may hold a number
    if text == "1":
        return dict.fromkeys(BLUR_TYPES, 1 / len(BLUR_TYPES))
    weights = {}
    for part in text.split(","):
        word, _, number = (piece.strip() for piece in part.partition(":"))
        if word not in BLUR_TYPES or word in weights:
            raise ValueError(f"--type_weights: {word!r} is no blur type or named twice, choose from "
                             f"{', '.join(BLUR_TYPES)} and write motion_blur:2,lens_blur:1")
        weights[word], highest = parse_range(number, f"--type_weights {word}", 0)
        if weights[word] != highest:
            raise ValueError(f"--type_weights {part.strip()}: give one number, not a range")
    if not sum(weights.values()):
        raise ValueError(f"--type_weights {text}: one weight must be above 0")
    return {word: weight / sum(weights.values()) for word, weight in weights.items()}


def draw_blur(weights, rng):
    """(blur type, its parameters) drawn from `rng`; lengths in pixels, angles in degrees."""
    blur_type = pick(weights, rng)
    if blur_type == "motion_blur":
        return blur_type, {"length": int(rng.integers(5, 20, endpoint=True)), "angle": float(rng.uniform(0, 360))}
    name, lo, hi = {
        "gaussian_blur": ("sigma", 1, 5),
        "defocus_blur": ("radius", 1, 8),
        "lens_blur": ("strength", 0.3, 0.8),
    }[blur_type]
    return blur_type, {name: float(rng.uniform(lo, hi))}


def apply_blur(image, blur_type, params):
    """`image`, (H, W, 3) uint8 or float32 in [0, 255], blurred as `draw_blur` drew it, borders reflected. With
    params["linear_light"] the blur averages light, as a lens and a sensor do, instead of sRGB values."""
    amounts = {name: value for name, value in params.items() if name != "linear_light"}
    if params.get("linear_light"):
        return linear_to_srgb(apply_blur(srgb_to_linear(image), blur_type, amounts), image.dtype)
    if blur_type == "gaussian_blur":
        return gaussian_blur(image, **amounts)
    if blur_type == "lens_blur":
        return lens_blur(image, **amounts)
    make_kernel = {"motion_blur": motion_kernel, "defocus_blur": defocus_kernel}[blur_type]
    return sparse_blur(image, make_kernel(**amounts))


def random_blur(image, rng, weights, linear_light=False):
    """(blurred, [{"type": blur type, its parameters}]), what DegDataset wants of a degradation."""
    blur_type, params = draw_blur(weights, rng)
    params["linear_light"] = linear_light
    return apply_blur(image, blur_type, params), [{"type": blur_type, **params}]


def prompts(use_augmentation=False):
    """{blur type: prompt}, in the wording of the plain or of the augmented dataset."""
    if use_augmentation:
        return {blur_type: f"a {description} image, high quality, detailed, professional photography"
                for blur_type, description in DESCRIPTIONS.items()}
    return {blur_type: f"a clear, sharp image, {blur_type} removed, high quality, detailed" for blur_type in BLUR_TYPES}


def read_json(path):
    """The object in a file; ValueError naming the file where it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); restore it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: no JSON object; restore it")
    return content


def read_pairs(data_root, json_file=JSON_FILE):
    """Records of the stored pairs that `json_file` lists, one JSON object a line with clear_image, blur_image and
    blur_type, which becomes the Record's prompt. ValueError with file and line number for a line that is none, an
    unknown type, a file that is missing or a blurred image that another line lists."""
    root, path = Path(data_root), Path(data_root, json_file)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; make it with recipes.deblur_controlnet.create_deblur_dataset, "
                                "or name another with --data_root and --json_file")
    records, line_of = [], {}
    for number, row in json_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(row, dict) or not {"clear_image", "blur_image", "blur_type"} <= set(row):
            raise ValueError(f"{where}: not an object with clear_image, blur_image and blur_type")
        if row["blur_type"] not in BLUR_TYPES:
            raise ValueError(f"{where}: unknown blur_type {row['blur_type']!r}, choose from {', '.join(BLUR_TYPES)}")
        files = []
        for key, folder in (("clear_image", CLEAR_FOLDER), ("blur_image", BLUR_FOLDER)):
            name = row[key]
            if not isinstance(name, str) or not name or Path(name).name != name:
                raise ValueError(f"{where}: {key} {name!r} is not the name of a file in {folder}")
            files.append(root / folder / name)
            if not files[-1].is_file():
                raise ValueError(f"{where}: {files[-1]} does not exist; add it or remove the line")
        if (earlier := line_of.setdefault(row["blur_image"], number)) != number:
            raise ValueError(f"{where}: {row['blur_image']} is line {earlier}'s already; remove one of them")
        records.append(Record(str(files[1]), *files, prompt=row["blur_type"]))
    if not records:
        raise ValueError(f"{path}: empty; write one JSON object per line")
    return records


def fingerprint(records, root):
    """Tells one list of Records from another by their files' names and sizes and their blur types, wherever the folder
    `root` that holds them may lie."""
    listing = [[path.relative_to(root).as_posix(), path.stat().st_size, *([record.prompt] if record.prompt else [])]
               for record in records for path in (record.target, record.control) if path]
    return dataset_deg_paired.fingerprint(listing)


def check_side(name, size, image_size, upscale_small):
    """UnreadableImage where an image of (height, width) `size` would be enlarged to `image_size`."""
    if min(size) < image_size and not upscale_small:
        raise UnreadableImage(name, f"{size[1]}x{size[0]} px would be enlarged to {image_size} px; lower --image_size, "
                                    "or pass --upscale_small")


class DeblurDataset(DegDataset):
    """DegDataset with what a ControlNet wants: "target" (3, S, S) in [-1, 1], "control" the blurred image in [0, 1],
    "prompt" and "blur_type"; S = image_size.

    source: the list of `read_pairs`, or a folder of sharp images (or its Records) together with `blur`, a
    `random_blur(weights=...)` applied to the crop. use_augmentation: mirrors half of the pairs and multiplies half of
    them by U(0.8, 1.2), clipped, target and control always alike; prompts get their augmented wording.
    proportion_empty_prompts: share of the items whose prompt is left empty. crop_zoom: as for DegDataset; a stored blur
    is as many times wider in the crop. Images smaller than S are left out and listed in `unreadable`, unless
    upscale_small."""

    def __init__(self, source, image_size=512, blur=None, use_augmentation=False, proportion_empty_prompts=0.0,
                 crop="random", seed=0, upscale_small=False, max_pixels=MAX_PIXELS, crop_zoom=(1.0, 1.0)):
        self.image_size, self.upscale_small = image_size, upscale_small  # read while the headers are checked
        super().__init__(source, blur, image_size, crop=crop, random_flip=use_augmentation, seed=seed,
                         max_pixels=max_pixels, crop_zoom=crop_zoom)
        self.prompts = prompts(use_augmentation)
        self.use_augmentation = use_augmentation
        self.proportion_empty_prompts = proportion_empty_prompts

    def _check_header(self, record):
        size = super()._check_header(record)
        check_side(record.name, size, self.image_size, self.upscale_small)
        return size

    def __getitem__(self, key):
        item = super().__getitem__(key)
        draw = partial(item_rng, self.seed, item["epoch"], item["index"])
        rng, factor = draw(BRIGHTNESS_STREAM), 1.0
        if self.use_augmentation and rng.random() < 0.5:
            factor = rng.uniform(0.8, 1.2)
        target, control = (((item[name] + 1) * factor).clamp_(max=2) for name in ("target", "control"))
        blur_type = item["degradation"][0]["type"] if item["degradation"] else item["prompt"]
        is_dropped = draw(CAPTION_STREAM).random() < self.proportion_empty_prompts
        return item | {"target": target - 1, "control": control / 2, "blur_type": blur_type,
                       "prompt": "" if is_dropped else self.prompts[blur_type]}


def collate_fn(items):
    """The batch of dataset_deg_paired.collate_fn, control in [0, 1], and "blur_type" as a list of B."""
    return dataset_deg_paired.collate_fn(items) | {"blur_type": [item["blur_type"] for item in items]}


def add_blur_args(parser):
    """Add the options that making pairs and blurring on the fly share."""
    add = parser.add_argument
    add("--source_dir", help="folder of sharp images, read recursively")
    add("--image_size", type=int, default=512, help="side of the square images in pixels")
    add("--type_weights", default="1", help=f"how often each blur is drawn, 'motion_blur:2,lens_blur:1'; 1: all of "
        f"{', '.join(BLUR_TYPES)} alike")
    add("--linear_light", action="store_true", help="blur intensities instead of sRGB values")
    add("--upscale_small", action="store_true", help="enlarge images smaller than --image_size, which are left out "
        "otherwise")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="leave out images with more pixels than this")


def add_data_args(parser):
    """Add the options that `dataset_from_args` reads."""
    add_blur_args(parser)
    add = parser.add_argument
    add("--data_root", help=f"folder with {CLEAR_FOLDER}, {BLUR_FOLDER} and --json_file; or blur those of --source_dir "
        "anew in every epoch")
    add("--json_file", default=JSON_FILE, help="in --data_root, which lists the pairs, one JSON object a line")
    add("--use_augmentation", action="store_true", help="mirror pairs and change their brightness")
    add("--crop_zoom", default="1", help="crop from an image this many times larger than the crop needs, a value or "
        "lo-hi; stored blurs keep their width where it is the ratio of the image's to --image_size")
    add("--proportion_empty_prompts", default="0", help="share of the samples whose prompt is left empty")


def dataset_from_args(args, seed=0):
    """The DeblurDataset that the options of `add_data_args` ask for. ValueError or FileNotFoundError naming the flag
    that is wrong."""
    check_least(args, image_size=MIN_SIDE_PX, max_pixels=1)
    if bool(args.data_root) == bool(args.source_dir):
        raise ValueError("give stored pairs with --data_root, or sharp images with --source_dir, one of them")
    weights = parse_type_weights(args.type_weights)
    return DeblurDataset(
        read_pairs(args.data_root, args.json_file) if args.data_root else args.source_dir, args.image_size,
        None if args.data_root else partial(random_blur, weights=weights, linear_light=args.linear_light),
        args.use_augmentation, parse_probability(args.proportion_empty_prompts, "--proportion_empty_prompts"),
        seed=seed, upscale_small=args.upscale_small, max_pixels=args.max_pixels,
        crop_zoom=parse_range(args.crop_zoom, "--crop_zoom", 1))

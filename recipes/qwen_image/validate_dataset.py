"""Check the images and captions of a Qwen-Image training before it starts:

    python -m recipes.qwen_image.validate_dataset --path your_lora_dataset
    python -m recipes.qwen_image.validate_dataset --path images --control_dir control_images

Every image is decoded, which also finds the files that break off in the middle. A fault is what training would refuse
or leave out: with one the exit code is 2. A note is worth a look: a caption without image, a file that is there twice,
images that training enlarges."""

from collections import Counter
from pathlib import Path

from tqdm.contrib.concurrent import thread_map

from my_dataset.images import UnreadableImage, list_images, load_rgb
from recipes.qwen_image.image_datasets.dataset import CAPTION_READERS, add_data_args, dataset_from_args
from utils.checkpoint import sha256
from utils.parse import make_parser, run_main


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_data_args(parser)
    parser.add_argument("--seed", type=int, default=0, help="as in training")
    return parser.parse_args(argv)


def decode_all(paths, max_pixels):
    """({path: (height, width)} of the images that decode, [why one does not])."""
    def decode(path):
        try:
            return load_rgb(path, max_pixels).shape[:2]
        except UnreadableImage as error:
            return error

    decoded = dict(zip(paths, thread_map(decode, paths, desc="decoding", leave=False, disable=None), strict=True))
    faults = [str(found) for found in decoded.values() if isinstance(found, UnreadableImage)]
    return {path: found for path, found in decoded.items() if not isinstance(found, UnreadableImage)}, faults


def caption_fault(image, caption_type):
    """Why an image has no caption, or None."""
    path = image.with_suffix(f".{caption_type}")
    try:
        if CAPTION_READERS[caption_type](image):
            return None
    except ValueError as error:
        return str(error)
    return f"{path}: empty" if path.is_file() else f"{image}: no {path.name} beside it"


def collisions(paths):
    """[fault] of images with one name, for which there is one caption, or one partner."""
    counts = Counter(path.with_suffix("") for path in paths)
    return [f"{stem}.*: {count} images have this name; rename or remove some" for stem, count in counts.items()
            if count > 1]


def lonely_captions(images, img_dir, caption_type):
    """[note] of captions whose image is not there, or of a format that training does not read."""
    stems = {image.with_suffix("") for image in images}
    return [f"{path}: a caption without image" for path in sorted(Path(img_dir).rglob(f"[!.]*.{caption_type}"))
            if path.with_suffix("") not in stems]


def duplicates(images):
    """[note] of images that are the same file as an earlier one."""
    first, notes = {}, []
    for image in images:
        if (other := first.setdefault(sha256(image), image)) is not image:
            notes.append(f"{image}: the same file as {other}")
    return notes


def enlarged(dataset, shapes):
    """[note] of the images that are smaller than a size they are given, if there are any."""
    small = {}
    for place, sizes in enumerate(dataset.sizes):
        example = dataset.examples[place % len(dataset.examples)]
        for path, (height, width) in zip((example.target, *example.references), sizes, strict=True):
            if path in shapes and (height > shapes[path][0] or width > shapes[path][1]):
                small[path] = f"{path} ({in_px(shapes[path])} px)"
    names = ", ".join([*small.values()][:5]) + (", ..." if len(small) > 5 else "")
    return [f"{len(small)} images are enlarged in training: {names}"] if small else []


def in_px(shape):
    return f"{shape[1]}x{shape[0]}"


def main():
    args = parse_args()
    images = list_images(args.img_dir)
    controls = list_images(args.control_dir) if args.control_dir else []
    shapes, faults = decode_all(images + controls, args.max_pixels)
    faults += [fault for image in images if (fault := caption_fault(image, args.caption_type))]
    faults += collisions(images) + collisions(controls)
    notes = lonely_captions(images, args.img_dir, args.caption_type)
    notes += duplicates([image for image in images if image in shapes])
    print(f"{len(images)} images" + (f", {len(controls)} controls" if controls else ""))
    try:
        dataset = dataset_from_args(args)
    except ValueError as error:
        faults.append(f"training refuses this: {error}")
    else:
        faults += [f"{path}: {reason}" for path, reason in dataset.unreadable]
        notes += enlarged(dataset, shapes)
        print("samples an epoch by size:")
        for sizes, count in sorted(Counter(dataset.sizes).items()):
            print(f"  {' from '.join(map(in_px, sizes))} px: {count * args.repeats}")
    faults = list(dict.fromkeys(faults))
    for line in [f"note: {note}" for note in notes] + [f"fault: {fault}" for fault in faults]:
        print(line)
    print(f"{len(faults)} faults, {len(notes)} notes")
    return 2 if faults else 0


if __name__ == "__main__":
    run_main(main)

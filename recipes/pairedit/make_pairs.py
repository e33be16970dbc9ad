"""Make pairs of a known edit (edits.py) out of photographs, as datasets to train on:

    python -m recipes.pairedit.make_pairs --edits warm gray glow --output_folder datasets

Writes <output_folder>/<edit>/source/NAME.png and target/NAME.png. Without --images the photographs are astronaut and
chelsea of scikit-image, and china of scikit-learn."""

from importlib import resources
from pathlib import Path

import numpy as np

from my_dataset.dataset_deg_paired import by_stem
from my_dataset.images import MIN_SIDE_PX, list_images, load_rgb, save_image
from recipes.pairedit.edits import EDITS
from recipes.pairedit.pairs import load_square
from utils.parse import check_least, make_parser, run_main, writable_folder
from utils.utils import to_uint8

PHOTOGRAPHS = (("skimage.data", "astronaut.png"), ("skimage.data", "chelsea.png"),
               ("sklearn.datasets.images", "china.jpg"))


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--edits", nargs="+", required=True, choices=EDITS, help="edits, each a dataset of its own")
    add("--output_folder", default="datasets", help="folder of the datasets")
    add("--images", help="folder of photographs to edit; default: those of the installed packages")
    add("--count", type=int, default=3, help="pairs of a dataset at most: the first so many photographs")
    add("--resolution", type=int, default=128, help="side in px of the central square that is kept")
    args = parser.parse_args(argv)
    check_least(args, count=1, resolution=MIN_SIDE_PX)
    return args


def find_photographs(folder, count):
    """{name: path} of the first `count` photographs in a folder, or out of installed packages."""
    if folder and Path(folder).is_file():
        raise ValueError(f"--images {folder} is a file; name a folder")
    photographs = (by_stem(folder) if folder else
                   {Path(name).stem: Path(str(resources.files(package) / name)) for package, name in PHOTOGRAPHS})
    return dict(list(photographs.items())[:count])


def check_folder(folder, images):
    """ValueError where a dataset's folder holds images that this command would not write, which would be trained on, or
    would write over. images: {path: (H, W, 3) uint8} that it writes."""
    there = [path for side in ("source", "target") if any((folder / side).glob("**/*.*"))
             for path in list_images(folder / side)]
    if others := sorted(path for path in there
                        if path not in images or not np.array_equal(load_rgb(path), images[path])):
        raise ValueError(f"{others[0]} is not of this command ({len(others)} such images); take {folder} away, or give "
                         "another --output_folder")


def main(args):
    photographs = find_photographs(args.images, args.count)
    output = writable_folder(args.output_folder, "--output_folder")
    sources = {name: (load_square(path, args.resolution) + 1) / 2 for name, path in photographs.items()}
    datasets = {edit: {output / edit / side / f"{name}.png": to_uint8(image[0] * 2 - 1)
                       for name, source in sources.items()
                       for side, image in (("source", source), ("target", EDITS[edit].apply(source)))}
                for edit in args.edits}
    for edit, images in datasets.items():
        check_folder(output / edit, images)
    for edit, images in datasets.items():
        for path, image in images.items():
            if not path.exists():  # what is there is the same: it may be the very photograph
                path.parent.mkdir(parents=True, exist_ok=True)
                save_image(path, image)
        print(f"{len(sources)} pairs: {output / edit}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

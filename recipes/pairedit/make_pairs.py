"""Make pairs of a known edit (edits.py) out of photographs, as datasets to train on:

    python -m recipes.pairedit.make_pairs --edits warm gray glow --output_folder datasets

Writes <output_folder>/<edit>/source/NAME.png and target/NAME.png. Without --images the photographs are astronaut and
chelsea of scikit-image, and china of scikit-learn."""

from importlib import resources
from pathlib import Path

from my_dataset.dataset_deg_paired import by_stem
from my_dataset.images import MIN_SIDE_PX, list_images, save_image
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


def check_folder(folder, names):
    """ValueError where a dataset's folder holds images that this command does not write: they would be trained on."""
    wanted = {folder / side / f"{name}.png" for side in ("source", "target") for name in names}
    there = [path for side in ("source", "target") if any((folder / side).glob("**/*.*"))
             for path in list_images(folder / side)]
    if others := sorted(set(there) - wanted):
        raise ValueError(f"{others[0]} is not of this command ({len(others)} such images); take {folder} away, or give "
                         "another --output_folder")


def main(args):
    photographs = find_photographs(args.images, args.count)
    output = writable_folder(args.output_folder, "--output_folder")
    for name in args.edits:
        check_folder(output / name, photographs)
    images = {name: (load_square(path, args.resolution) + 1) / 2 for name, path in photographs.items()}
    for edit in args.edits:
        for name, source in images.items():
            for side, image in (("source", source), ("target", EDITS[edit].apply(source))):
                path = output / edit / side / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                save_image(path, to_uint8(image[0] * 2 - 1))
        print(f"{len(images)} pairs: {output / edit}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

"""Put photographs on disk.

  python -m scripts.download_dataset sample                  train and held-out photographs, from installed packages
  python -m scripts.download_dataset dog                     diffusers/dog-example, into dog/
  python -m scripts.download_dataset hub --repo_id ID --output DIR"""
import filecmp
import os
import shutil
import sys
from importlib import resources
from pathlib import Path

from utils.parse import make_parser, run_main

# Natural colour photographs that come with the packages (folder of the package: files).
SAMPLE = {
    "train": {
        "skimage.data": ("astronaut.png", "chelsea.png", "rocket.jpg"),
        "sklearn.datasets.images": ("china.jpg",),
    },
    "heldout": {
        "skimage.data": ("coffee.png", "motorcycle_left.png"),
        "sklearn.datasets.images": ("flower.jpg",),
    },
}


def copy_sample(output):
    """Copy the sample photographs to output/train and output/heldout; those already there and equal are kept.
    Returns (copied, kept)."""
    copied = kept = 0
    for split, packages in SAMPLE.items():
        folder = Path(output, split)
        folder.mkdir(parents=True, exist_ok=True)
        for package, names in packages.items():
            for name in names:
                destination = folder / name
                with resources.as_file(resources.files(package) / name) as source:
                    if not source.is_file():
                        raise FileNotFoundError(f"{package} has no {name}; install scikit-image and scikit-learn again")
                    if destination.is_file() and filecmp.cmp(source, destination, shallow=False):
                        kept += 1
                        continue
                    temporary = destination.with_name(f".{name}.tmp")
                    shutil.copyfile(source, temporary)
                    os.replace(temporary, destination)
                    copied += 1
    return copied, kept


def download_hub(repo_id, output):
    """Fetch a snapshot of a hub dataset into `output`. ValueError with the cure when the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        snapshot_download(repo_id, repo_type="dataset", local_dir=output)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--repo_id {repo_id}: not downloaded ({reason}); check the name, the network and (if gated) "
                         "HF_TOKEN, or copy the images to a folder and pass it as --hr_root") from error


def main():
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=("sample", "dog", "hub"))
    parser.add_argument("--output", help="folder to fill (default: data/sample, dog)")
    parser.add_argument("--repo_id", help="dataset of the hub, for `hub`")
    args = parser.parse_args()
    if args.repo_id and args.what != "hub":
        raise ValueError(f"--repo_id belongs to `hub`, not to `{args.what}`")
    if args.what == "sample":
        output = args.output or "data/sample"
        copied, kept = copy_sample(output)
        print(f"{output}: {copied} photographs copied, {kept} already there (train/ and heldout/)")
        return
    if args.what == "hub" and not (args.repo_id and args.output):
        raise ValueError("hub needs --repo_id ID and --output DIR")
    output = args.output or "dog"
    download_hub(args.repo_id or "diffusers/dog-example", output)
    print(f"{output}: downloaded")


if __name__ == "__main__":
    sys.exit(run_main(main))

"""Put photographs on disk.

  python -m scripts.download_dataset sample                  train and held-out photographs, from installed packages
  python -m scripts.download_dataset dog                     diffusers/dog-example, into dog/
  python -m scripts.download_dataset hub --repo_id ID --output DIR

Every file of the hub is compared with the hub's checksum, and fetched again where it differs; a download that was cut
off goes on with the files that are missing. --verify compares what is already there and fetches nothing."""
import filecmp
import os
import shutil
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


def call_hub(function, repo_id, **options):
    """function(repo_id, ...) on a hub dataset. ValueError with the cure when the hub cannot be reached."""
    try:
        return function(repo_id, repo_type="dataset", **options)
    except Exception as error:  # the hub's client raises its own kinds, and those of whichever HTTP library it uses
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--repo_id {repo_id}: the hub did not give it ({reason}); check the name, the network and "
                         "(if gated) HF_TOKEN, or copy the images to a folder and pass it as --hr_root") from error


def damaged_files(repo_id, output, revision=None):
    """Names of the hub's files that are missing in the folder `output` or differ there from the hub's checksum: sha256
    of large files, git's hash of the others."""
    from huggingface_hub import HfApi

    result = call_hub(HfApi().verify_repo_checksums, repo_id, revision=revision, local_dir=output)
    return sorted([fault["path"] for fault in result.mismatches] + result.missing_paths)


def download_hub(repo_id, output, revision=None):
    """Fetch a snapshot of a hub dataset into the folder `output`, and what fails the comparison once more. Returns the
    names of the latter. ValueError when some fail again."""
    from huggingface_hub import snapshot_download

    call_hub(snapshot_download, repo_id, revision=revision, local_dir=output)
    damaged = damaged_files(repo_id, output, revision)
    if damaged:
        for name in damaged:
            Path(output, name).unlink(missing_ok=True)  # the hub's client trusts a file that it once fetched
        call_hub(snapshot_download, repo_id, revision=revision, local_dir=output)
        if again := damaged_files(repo_id, output, revision):
            raise ValueError(f"{output}: not the hub's also when fetched twice: {', '.join(again[:5])}; check the disk")
    return damaged


def main():
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=("sample", "dog", "hub"))
    parser.add_argument("--output", help="folder to fill (default: data/sample, dog)")
    parser.add_argument("--repo_id", help="dataset of the hub, for `hub`")
    parser.add_argument("--revision", help="branch, tag or commit of the dataset; default: main")
    parser.add_argument("--verify", action="store_true", help="compare a folder with the hub, and fetch nothing")
    args = parser.parse_args()
    if args.what == "sample" and (args.revision or args.verify):
        raise ValueError("--revision and --verify belong to `hub` and `dog`; the sample is always compared")
    if args.repo_id and args.what != "hub":
        raise ValueError(f"--repo_id belongs to `hub`, not to `{args.what}`")
    if args.what == "sample":
        copied, kept = copy_sample(output := args.output or "data/sample")
        print(f"{output}: {copied} photographs copied, {kept} already there (train/ and heldout/)")
        return
    if args.what == "hub" and not (args.repo_id and args.output):
        raise ValueError("hub needs --repo_id ID and --output DIR")
    output, repo_id = args.output or "dog", args.repo_id or "diffusers/dog-example"
    if args.verify:
        if not Path(output).is_dir():
            raise ValueError(f"--output {output}: no such folder to verify; leave out --verify to download it")
        if damaged := damaged_files(repo_id, output, args.revision):
            raise ValueError(f"{output}: {len(damaged)} files are missing or differ from the hub's: "
                             f"{', '.join(damaged[:5])}; run it again without --verify")
        print(f"{output}: every file is the hub's")
        return
    damaged = download_hub(repo_id, output, args.revision)
    print(f"{output}: downloaded and verified" + (f", {len(damaged)} files fetched twice" if damaged else ""))


if __name__ == "__main__":
    run_main(main)

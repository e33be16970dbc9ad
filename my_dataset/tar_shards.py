"""Sharded tar files in webdataset's layout, read where they lie: the files of a sample share their name up to the first
dot. As every member's place is known, images are drawn from all shards at random, resuming costs nothing, and nothing
is unpacked or copied."""

import tarfile
from pathlib import Path
from types import SimpleNamespace

from my_dataset.dataset_deg_paired import Record, TarMember, find_column
from my_dataset.images import EXTENSIONS


def is_tar_folder(name):
    """True for a folder that holds .tar files."""
    return next(Path(name).glob("*.tar"), None) is not None


def column_name(extension):
    """The column that a file of a sample stands for, by what follows the first dot of its name: jpg -> image, txt ->
    prompt, clean.png -> clean, json -> json."""
    column, _, suffix = extension.rpartition(".")
    if f".{suffix.lower()}" in EXTENSIONS:
        return column or "image"
    return column or "prompt" if suffix.lower() == "txt" else extension


def read_index(path):
    """[{column: TarMember, or text of a prompt}] of the samples of a tar, without reading its images. ValueError with
    the cure for an archive that is compressed or cut off."""
    samples = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                if not (member.isreg() and stem and extension):
                    continue
                column = column_name(extension)
                content = TarMember(path, member.offset_data, member.size)
                if extension.lower().endswith("txt"):
                    content = archive.extractfile(member).read().decode().strip()
                samples.setdefault(f"{folder}/{stem}".lstrip("/"), {})[column] = content
    except (tarfile.TarError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: no sound tar without compression ({error}); write it again, with `tar --create` and "
                         "no -z: images are compressed already") from error
    return samples


def tar_records(folder, image_column=None, cond_image_column=None, caption_column=None):
    """Records of all samples in the .tar files of a folder, in the order of names. Columns (see column_name) have the
    defaults of hub_records. A sample without one of its images has a fault."""
    shards = {path: read_index(path) for path in sorted(Path(folder).glob("*.tar"))}
    columns = SimpleNamespace(column_names=sorted({column for samples in shards.values()
                                                   for sample in samples.values() for column in sample}))
    image_column = find_column(columns, folder, "--image_column", image_column, ("clean", "image"), is_needed=True)
    cond_image_column = find_column(columns, folder, "--cond_image_column", cond_image_column, ("degraded",))
    caption_column = find_column(columns, folder, "--caption_column", caption_column, ("prompt",))
    records = []
    for path, samples in shards.items():
        for key, sample in samples.items():
            missing = [column for column in (image_column, cond_image_column) if column and column not in sample]
            records.append(Record(f"{path}/{key}", sample.get(image_column), sample.get(cond_image_column),
                                  sample.get(caption_column) or None, f"no {missing[0]}" if missing else None))
    return records

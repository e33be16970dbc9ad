"""Sharded tar files in webdataset's layout, read where they lie: the files of a sample share their name up to the first
dot. As every member's place is known, images are drawn from all shards at random, resuming costs nothing, and nothing
is unpacked or copied."""

import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from my_dataset.dataset_deg_paired import Record, TarMember, find_column
from my_dataset.images import EXTENSIONS, UnreadableImage


class Fault(NamedTuple):
    """Stands for an image or a prompt that a sample does not have, and says why."""

    reason: str

    def read(self, name):
        raise UnreadableImage(name, self.reason)


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
    """{name of a sample: {column: TarMember, text of a prompt, or Fault}} of a tar, without reading its images.
    ValueError with the cure for an archive that is compressed or cut off."""
    samples = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                if not (member.isreg() and stem and extension):
                    continue
                sample, column = samples.setdefault(f"{folder}/{stem}".lstrip("/"), {}), column_name(extension)
                if column in sample:
                    sample[column] = Fault(f"{file} is one more {column}; keep one")
                elif extension.lower().endswith("txt"):
                    sample[column] = _text(archive.extractfile(member).read(), file)
                else:
                    sample[column] = TarMember(path, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path}: no sound tar without compression ({error}); write it again, with `tar --create` and "
                         "no -z: images are compressed already") from error
    return samples


def _text(content, file):
    try:
        return content.decode().strip()
    except UnicodeDecodeError as error:
        return Fault(f"{file} is not UTF-8 ({error.reason} at byte {error.start})")


def find_columns(samples, folder, image_column, cond_image_column):
    """(table of all columns for find_column, column of the targets, column of the controls or None) of `samples`, a
    list of {column: content}, with the defaults of hub_records. ValueError naming the flag of a missing one."""
    table = SimpleNamespace(column_names=sorted({column for sample in samples for column in sample}))
    image_column = find_column(table, folder, "--image_column", image_column, ("clean", "image"), is_needed=True)
    return table, image_column, find_column(table, folder, "--cond_image_column", cond_image_column, ("degraded",))


def make_record(name, *contents):
    """Record of a target, a control or None, and a prompt or None, of which each may be a Fault: then it has one."""
    fault = next((content.reason for content in contents if isinstance(content, Fault)), None)
    return Record(name, *contents, fault=fault)


def shard_records(path, samples, image_column, cond_image_column, caption_column=None):
    """Records of the `samples` of read_index(path). One without one of its images has a fault."""
    for key, sample in samples.items():
        images = [sample.get(column, Fault(f"no {column}")) if column else None
                  for column in (image_column, cond_image_column)]
        yield make_record(f"{path}/{key}", *images, sample.get(caption_column) or None)


def tar_records(folder, image_column=None, cond_image_column=None, caption_column=None):
    """Records of all samples in the .tar files of a folder, in the order of names. Columns (see column_name) have the
    defaults of hub_records. A sample without one of its images, or with one twice, has a fault."""
    shards = {path: read_index(path) for path in sorted(Path(folder).glob("*.tar"))}
    samples = [sample for index in shards.values() for sample in index.values()]
    table, *images = find_columns(samples, folder, image_column, cond_image_column)
    caption_column = find_column(table, folder, "--caption_column", caption_column, ("prompt",))
    if any(isinstance(sample.get(caption_column), TarMember) for sample in samples):
        raise ValueError(f"--caption_column {caption_column}: not a column of text in {folder}; store texts as .txt")
    return [record for path, index in shards.items() for record in shard_records(path, index, *images, caption_column)]

"""A Hugging Face dataset, or a folder of tar or parquet shards, read from its beginning while training goes on: for
what fits no disk. The order is a function of (seed, epoch) here too, which the shuffle buffers of `datasets` and
webdataset forget on a resume."""

import contextlib
import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.data import Sampler

from my_dataset.dataset_deg_paired import ORDER_STREAM, cell_content, item_rng, load_table, read
from my_dataset.images import MAX_PIXELS, UnreadableImage, image_size
from my_dataset.tar_shards import (
    Fault,
    column_name,
    find_columns,
    is_tar_folder,
    make_record,
    read_index,
    shard_records,
)

LANES = 4  # shards that are read in turns, at least, so that 1, 2 and 4 processes train on the same batches
BLOCK = 128  # samples of a shard that are shuffled among themselves; a table's are in memory, for every lane
SPARES = 2  # samples that follow, for one that cannot be decoded or has no image


class Stream:
    """`shards`: how many. records(shard): the Records of one of them, in its own order."""

    def __init__(self, name, shards, records):
        self.name, self.shards, self.records = name, shards, records

    def __str__(self):
        return f"{self.shards} streamed shards of {self.name}"

    def first(self):
        """A first Record whose files are images. ValueError where there is none."""
        for shard in range(self.shards):
            for record in self.records(shard):
                with contextlib.suppress(UnreadableImage):
                    for source in filter(None, (record.target, record.control)):
                        read(source, MAX_PIXELS, record.name, image_size)
                    return record
        raise ValueError(f"--dataset_name {self.name}: not one image in {self.shards} shards")


def tar_shard(paths, columns, shard):
    """Records of the tar paths[shard]; columns: those of the targets and of the controls, or None."""
    return shard_records(paths[shard], read_index(paths[shard]), *columns)


def table_shard(table, name, columns, shard):
    """Records of a shard of an IterableDataset of `datasets` with undecoded image columns; columns: as above."""
    for row, cells in enumerate(table.shard(table.num_shards, shard)):
        images = [_image(cells[column], column) if column else None for column in columns]
        yield make_record(f"{name}[{shard}][{row}]", *images)


def _image(cell, column):
    try:
        return cell_content(cell, column)
    except UnreadableImage:
        return Fault(f"column {column} is empty")


def check_shards(stream, processes):
    """ValueError for fewer shards than processes."""
    if stream.shards < processes:
        raise ValueError(f"--streaming: {stream} for {processes} processes; store at least one shard for each, or "
                         "leave out --streaming")


def add_stream_args(parser):
    parser.add_argument("--streaming", action="store_true", help="read --dataset_name from its beginning as training "
                        "goes, every shard in one process, and keep nothing on disk; square crops and one prompt; "
                        "needs --max_train_steps and --validation_steps")


def stream_from_args(args, image_column, cond_image_column, caption_column):
    """The Stream that --dataset_name and --streaming ask for; a folder of tars has the columns of its first shard with
    samples. ValueError naming the flag that does not go with it."""
    if args.use_bucket_sampler or args.aspect_ratio_buckets:
        raise ValueError("--streaming knows no image's size before it comes, so all crops are square; leave out "
                         "--use_bucket_sampler and --aspect_ratio_buckets, or --streaming")
    if caption_column:
        raise ValueError("--streaming: texts are encoded before training, so there is one prompt, --instance_prompt; "
                         "leave out --caption_column, or --streaming")
    name = args.dataset_name
    if is_tar_folder(name):  # `datasets` would take the columns of the first samples, and of no later type of image
        paths = sorted(Path(name).glob("*.tar"))
        samples = next(filter(None, map(read_index, paths)), {})
        _, *columns = find_columns(list(samples.values()), name, image_column, cond_image_column)
        return Stream(name, len(paths), functools.partial(tar_shard, paths, columns))
    import datasets

    table = load_table(name, args.dataset_config_name, getattr(args, "cache_dir", None), streaming=True)
    if not table.features:
        raise ValueError(f"--streaming: {name} does not say which columns it has; store it as parquet or tar shards")
    plain = {column_name(column): column for column in table.features}
    _, *columns = find_columns([plain], name, image_column, cond_image_column)
    columns = [plain.get(column) for column in columns]
    used = list(filter(None, columns))
    for column in used:
        if not isinstance(table.features[column], datasets.Image):
            raise ValueError(f"--image_column, --cond_image_column: {column} is not an image column of {name}")
        table = table.cast_column(column, datasets.Image(decode=False))
    return Stream(name, table.num_shards, functools.partial(table_shard, table.select_columns(used), name, columns))


class StreamBatchSampler(Sampler):
    """Endless sampler of batches [(index, epoch, Records), ...] of a Stream, with the samples' content or place in
    them: what decodes them may be any number of loader processes.

    In every epoch the shards are dealt, in an order given by (seed, epoch), to a number of lanes, each of which goes
    through its shards, and on to its next epoch, by itself; within a shard every BLOCK of samples is shuffled. Batch i
    comes from lane i modulo their number, which is a multiple of that of processes: so a shard is read by one process
    only, and batches are the same for any number of processes with as many lanes. A sample comes once per epoch; its
    `index` holds shard and row.

    Every process sees all batches, those of others empty, as accelerate's BatchSamplerShard picks its own among them.
    start: number of batches that all processes together have consumed; the sampler goes on exactly there. Shards whose
    length a file in `folder` notes, as every shard is that was read to its end, are then passed over unread.
    ValueError for fewer shards than processes."""

    drop_last = True  # read by accelerate's BatchSamplerShard, as is batch_size: nothing is kept for an end

    def __init__(self, stream, batch_size, seed, start, folder):
        self.rank, processes = 0, 1
        if torch.distributed.is_initialized():
            self.rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        check_shards(stream, processes)
        self.stream, self.batch_size, self.seed, self.start, self.folder = stream, batch_size, seed, start, Path(folder)
        self.processes = processes
        self.lanes = min(processes * math.ceil(LANES / processes), stream.shards // processes * processes)

    def __iter__(self):
        own = ahead(self._own_batches())
        for batch in itertools.count(self.start):
            is_own = batch % self.processes == self.rank
            yield next(own) if is_own else [None] * self.batch_size

    def _own_batches(self):
        lengths = self._read_lengths()
        lanes = {lane: self._samples(lane, len(range(lane, self.start, self.lanes)) * self.batch_size, lengths)
                 for lane in range(self.rank, self.lanes, self.processes)}
        first = self.start + (self.rank - self.start) % self.processes
        for batch in itertools.count(first, self.processes):
            yield list(itertools.islice(lanes[batch % self.lanes], self.batch_size))

    def _samples(self, lane, skip, lengths):
        """The samples of a lane, without the first `skip`."""
        for epoch in itertools.count():
            order = item_rng(self.seed, epoch, 0, ORDER_STREAM).permutation(self.stream.shards).tolist()
            for shard in order[(lane + epoch) % self.lanes :: self.lanes]:
                if shard in lengths and lengths[shard] <= skip:
                    skip -= lengths[shard]
                    continue
                records, row = self.stream.records(shard), 0
                while block := list(itertools.islice(records, BLOCK)):
                    index = (shard << 32) + row
                    places = item_rng(self.seed, epoch, index + 1, ORDER_STREAM).permutation(len(block)).tolist()
                    for i in range(skip, len(block)):
                        following = (block[place] for place in (places * 2)[i + 1 : i + len(block)])
                        spares = itertools.islice((record for record in following if not record.fault), SPARES)
                        yield index + places[i], epoch, (block[places[i]], *spares)
                    skip, row = max(skip - len(block), 0), row + len(block)
                if shard not in lengths:
                    lengths[shard] = row
                    with open(self.folder / f"shard_lengths_{self.rank}.txt", "a", encoding="utf-8") as file:
                        file.write(f"{shard} {row}\n")

    def _read_lengths(self):
        """{shard: number of its samples}, as far as any process has noted them; none at the start of a run, where the
        notes are of another run, maybe of other shards."""
        lengths = {}
        for path in self.folder.glob("shard_lengths_*.txt"):
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1] if self.start else ""
            if whole != text and int(path.stem.rpartition("_")[2]) % self.processes == self.rank:
                path.write_text(whole, encoding="utf-8")  # or the next note would go on where a kill has cut the last
            lengths |= {int(shard): int(length) for shard, length in map(str.split, whole.splitlines())}
        return lengths


def ahead(iterator):
    """The same items, each fetched by a thread while the one before is worked on."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator)
        while True:
            item = coming.result()
            coming = thread.submit(next, iterator)
            yield item

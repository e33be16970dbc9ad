"""A Hugging Face dataset, or a folder of tar or parquet shards, read from its beginning while training goes on: for
what fits no disk. The order is a function of (seed, epoch) here too, which the shuffle buffers of `datasets` and
webdataset forget on a resume."""

import contextlib
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.data import Sampler

from my_dataset.dataset_deg_paired import ORDER_STREAM, Record, cell_content, find_column, item_rng, load_table
from my_dataset.images import UnreadableImage, image_size
from my_dataset.tar_shards import column_name

LANES = 4  # shards that are read in turns, at least, so that 1, 2 and 4 processes train on the same batches
BLOCK = 128  # samples of a shard that are shuffled among themselves; as many files are in memory, for every lane
SPARES = 2  # samples that follow, for one that cannot be decoded


class Stream:
    """The shards of an IterableDataset of `datasets` with undecoded image columns. control: a column, or None."""

    def __init__(self, table, name, target, control=None):
        self.table, self.name, self.target, self.control = table, name, target, control
        self.shards = table.num_shards

    def __str__(self):
        return f"{self.shards} streamed shards of {self.name}"

    def records(self, shard):
        """The Records of one shard, in its own order."""
        for row, cells in enumerate(self.table.shard(self.shards, shard)):
            name = f"{self.name}[{shard}][{row}]"
            try:
                control = cell_content(cells[self.control], name) if self.control else None
                yield Record(name, cell_content(cells[self.target], name), control)
            except UnreadableImage:
                yield Record(name, b"")  # what loads it says so, and takes the next one

    def first(self):
        """A first Record that is an image. ValueError where there is none."""
        for shard in range(self.shards):
            for record in self.records(shard):
                with contextlib.suppress(UnreadableImage):
                    image_size(record.target, name=record.name)
                    return record
        raise ValueError(f"--dataset_name {self.name}: not one image in {self.shards} shards")


def add_stream_args(parser):
    parser.add_argument("--streaming", action="store_true", help="read --dataset_name from its beginning as training "
                        "goes, every shard in one process, and keep nothing on disk; square crops and one prompt; "
                        "needs --max_train_steps and --validation_steps")


def stream_from_args(args, image_column, cond_image_column, caption_column):
    """The Stream that --dataset_name and --streaming ask for. ValueError naming the flag that does not go with it."""
    import datasets

    if args.use_bucket_sampler or args.aspect_ratio_buckets:
        raise ValueError("--streaming knows no image's size before it comes, so all crops are square; leave out "
                         "--use_bucket_sampler and --aspect_ratio_buckets, or --streaming")
    if caption_column:
        raise ValueError("--streaming: texts are encoded before training, so there is one prompt, --instance_prompt; "
                         "leave out --caption_column, or --streaming")
    name = args.dataset_name
    table = load_table(name, args.dataset_config_name, getattr(args, "cache_dir", None), streaming=True)
    if not table.features:
        raise ValueError(f"--streaming: {name} does not say which columns it has; store it as parquet or tar shards")
    plain = {column_name(column): column for column in table.features}
    columns = SimpleNamespace(column_names=list(plain))
    image = find_column(columns, name, "--image_column", image_column, ("clean", "image"), is_needed=True)
    control = find_column(columns, name, "--cond_image_column", cond_image_column, ("degraded",))
    used = [plain[column] for column in (image, control) if column]
    for column in used:
        if not isinstance(table.features[column], datasets.Image):
            raise ValueError(f"--image_column, --cond_image_column: {column} is not an image column of {name}")
        table = table.cast_column(column, datasets.Image(decode=False))
    return Stream(table.select_columns(used), name, *used)


class StreamBatchSampler(Sampler):
    """Endless sampler of batches [(index, epoch, Records), ...] of a Stream, with the samples' content in them: what
    decodes them may be any number of loader processes.

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
        if stream.shards < processes:
            raise ValueError(f"--streaming: {stream} for {processes} processes; store at least one shard for each, or "
                             "leave out --streaming")
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
                        others = [block[place] for place in (places * 2)[i + 1 : i + 1 + min(SPARES, len(block) - 1)]]
                        yield index + places[i], epoch, (block[places[i]], *others)
                    skip, row = max(skip - len(block), 0), row + len(block)
                if shard not in lengths:
                    lengths[shard] = row
                    with open(self.folder / f"shard_lengths_{self.rank}.txt", "a", encoding="utf-8") as file:
                        file.write(f"{shard} {row}\n")

    def _read_lengths(self):
        """{shard: number of its samples}, as far as any process has noted them; a kill may have cut the last line."""
        lines = [line for path in self.folder.glob("shard_lengths_*.txt")
                 for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        return {int(shard): int(length) for shard, length in map(str.split, lines)}


def ahead(iterator):
    """The same items, each fetched by a thread while the one before is worked on."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator)
        while True:
            item = coming.result()
            coming = thread.submit(next, iterator)
            yield item

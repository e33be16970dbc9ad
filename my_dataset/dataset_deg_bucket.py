"""Aspect-ratio buckets: every image is cropped to the nearest of a few sizes, and a batch has one size."""
import itertools
import re

import torch
from torch.utils.data import DataLoader, Sampler

from my_dataset.dataset_deg_paired import ORDER_STREAM, DegDataset, item_rng, use_one_thread
from my_dataset.images import MAX_PIXELS
from my_dataset.streaming import StreamBatchSampler

# (height, width) of about one megapixel that FLUX.1 Kontext was trained on: PREFERRED_KONTEXT_RESOLUTIONS of diffusers.
_PORTRAIT = [(1568, 672), (1504, 688), (1456, 720), (1392, 752), (1328, 800), (1248, 832), (1184, 880), (1104, 944)]
KONTEXT_BUCKETS = [*_PORTRAIT, (1024, 1024), *((width, height) for height, width in reversed(_PORTRAIT))]


def parse_buckets_string(text):
    """Sizes [(height, width), ...] of "h:w,h:w" or of diffusers' "h,w;h,w". ValueError unless multiples of 16."""
    from diffusers.training_utils import parse_buckets_string as parse_diffusers_buckets  # takes seconds to import

    if ":" in text:
        text = ";".join(re.sub(r"\s*:\s*", ",", pair) for pair in text.split(","))
    try:
        buckets = parse_diffusers_buckets(text)
    except ValueError as error:
        raise ValueError(f'--aspect_ratio_buckets: {error} Write "h:w,h:w" or "h,w;h,w".') from error
    for height, width in buckets:
        if height % 16 or width % 16:
            raise ValueError(f"--aspect_ratio_buckets: {height}:{width} must be multiples of 16")
    if len(set(buckets)) < len(buckets):
        raise ValueError("--aspect_ratio_buckets: a size is given twice")
    return buckets


def find_nearest_bucket(height, width, buckets):
    """Index of the bucket with the least |height / width - h / w|; among equal aspects the largest that the image
    covers without enlargement, else the smallest. (diffusers' function weights the difference with the bucket's width
    and so prefers narrow ones.)"""
    def rank(index):
        h, w = buckets[index]
        fits = h <= height and w <= width
        return abs(height / width - h / w), not fits, -h * w if fits else h * w

    return min(range(len(buckets)), key=rank)


class DegBucketDataset(DegDataset):
    """DegDataset whose items have the size of the bucket nearest to their image's aspect: `buckets` is a list of
    (height, width), `bucket_of[index]` the place in it."""

    def __init__(self, source, degrade=None, buckets=KONTEXT_BUCKETS, prompt="", crop="random", random_flip=False,
                 seed=0, upscale_kernel="bicubic", max_pixels=MAX_PIXELS, crop_zoom=(1.0, 1.0)):
        super().__init__(source, degrade, prompt=prompt, crop=crop, random_flip=random_flip, seed=seed,
                         upscale_kernel=upscale_kernel, max_pixels=max_pixels, crop_zoom=crop_zoom)
        self.buckets = list(buckets)
        self.bucket_of = [find_nearest_bucket(height, width, self.buckets) for height, width in self.sizes]


class BucketBatchSampler(Sampler):
    """Endless sampler of batches [(index, epoch), ...], each from one bucket.

    Every item is drawn once per epoch, in an order given by (seed, epoch). Items that do not fill a batch wait for the
    next epoch of their bucket: nothing is dropped, and a bucket with fewer items than `batch_size` gives a batch every
    few epochs, with the same image in several of them.
    start: number of batches that all processes together have consumed; the sampler goes on exactly there."""

    drop_last = False  # read by accelerate's BatchSamplerShard, as is batch_size

    def __init__(self, bucket_of, batch_size, seed, start=0):
        if not bucket_of:
            raise ValueError("no images to sample from")
        if batch_size < 1:
            raise ValueError(f"--train_batch_size {batch_size} must be 1 or more")
        self.bucket_of = list(bucket_of)
        self.batch_size = batch_size
        self.seed = seed
        self.start = start

    def __iter__(self):
        return itertools.islice(self._batches(), self.start, None)

    def _batches(self):
        waiting = {bucket: [] for bucket in sorted(set(self.bucket_of))}
        for epoch in itertools.count():
            rng = item_rng(self.seed, epoch, 0, ORDER_STREAM)
            for index in rng.permutation(len(self.bucket_of)).tolist():
                waiting[self.bucket_of[index]].append((index, epoch))
            batches = []
            for bucket, items in waiting.items():
                full = len(items) // self.batch_size * self.batch_size
                batches += [items[i:i + self.batch_size] for i in range(0, full, self.batch_size)]
                waiting[bucket] = items[full:]
            for place in rng.permutation(len(batches)).tolist():
                yield batches[place]


def make_loader(dataset, collate_fn, args, start=0, pin_memory=False):
    """Endless loader of `dataset`, which has a `bucket_of`, in the order of BucketBatchSampler, or of its stream, if it
    has one; start: as there."""
    if getattr(dataset, "stream", None):
        sampler = StreamBatchSampler(dataset.stream, args.train_batch_size, args.seed, start, args.output_dir)
    else:
        sampler = BucketBatchSampler(dataset.bucket_of, args.train_batch_size, args.seed, start)
    return DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate_fn, num_workers=args.dataloader_num_workers,
        pin_memory=pin_memory, worker_init_fn=use_one_thread,
        generator=torch.Generator(),  # its own, so that making an iterator draws nothing from the global one
    )

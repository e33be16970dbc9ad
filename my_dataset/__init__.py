from my_dataset.dataset_deg_bucket import (
    BucketBatchSampler,
    DegBucketDataset,
    find_nearest_bucket,
    parse_buckets_string,
)
from my_dataset.dataset_deg_paired import DegDataset, collate_fn
from my_dataset.dataset_dreambooth import DreamBoothDataset
from my_dataset.prompts import tokenize_prompt

__all__ = [
    "BucketBatchSampler",
    "DegBucketDataset",
    "DegDataset",
    "DreamBoothDataset",
    "collate_fn",
    "find_nearest_bucket",
    "parse_buckets_string",
    "tokenize_prompt",
]

"""Reference images for edits."""

import math

from my_dataset.dataset_deg_paired import to_tensor
from my_dataset.degradations import resize


def reference_tensors(images, side_px):
    """LoadedImages as tensors (1, 3, H, W) in [-1, 1]; one with a larger area than a square of side_px is shrunk to
    that area, antialiased and in proportion: every pixel costs attention, and models know no larger ones."""
    references = []
    for image in images:
        height, width = image.rgb.shape[:2]
        scale = min(1, side_px / math.sqrt(height * width))
        size = max(1, round(scale * height)), max(1, round(scale * width))
        references.append(to_tensor(image.rgb if scale == 1 else resize(image.rgb, *size, "lanczos"))[None])
    return references

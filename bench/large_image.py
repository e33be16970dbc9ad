"""A photograph of 2000 x 3000 px restored by tiles with the test script, as a user runs it: peak memory of the whole
process, time, seams, alignment:  OMP_NUM_THREADS=1 python -m bench.large_image

The photograph is a sample of scikit-image mirrored at its edges, so that it has detail everywhere and no edge of its
own; blur and noise degrade it. Seam: mean step of the error between the pixels on either side of a tile's edge, over
that at other tokens' edges. Exit code 1 above a limit. Flags that are not listed go to the test script:
--lora, --tile, --num_inference_steps, --device ..."""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from skimage import data

import test_deg_lora_flux_kontext as script
from my_dataset.dataset_deg_paired import to_tensor
from my_dataset.images import load_rgb, save_image
from utils import flux, metrics, tiles
from utils.alignment import alignment
from utils.parse import check_least, run_main
from utils.session import resolve_settings

PEAK_GB, SHIFT_PX, SCALE_PERCENT, SEAM = 3.0, 0.1, 0.1, 1.1


def make_pair(height, width, seed=0):
    """(clean, degraded) photographs, both (height, width, 3) uint8."""
    photo = data.coffee()
    clean = np.pad(photo, [(0, max(height - photo.shape[0], 0)), (0, max(width - photo.shape[1], 0)), (0, 0)],
                   mode="symmetric")[:height, :width]
    noise = np.random.default_rng(seed).normal(0, 15, clean.shape)
    return clean, np.clip(np.round(cv2.GaussianBlur(clean, (0, 0), 1.0) + noise), 0, 255).astype(np.uint8)


def seams(error, edges, multiple):
    """Mean absolute step of `error` (1, 3, H, W) across the rows that begin at `edges`, over that across other rows
    that are whole multiples of the token's side, at which a model may make steps of its own."""
    steps = error.diff(dim=-2).abs().mean((0, 1, 3))
    others = [edge for edge in range(multiple, error.shape[-2], multiple) if edge not in edges]
    if not edges or not others:
        return 1.0
    return (steps[[edge - 1 for edge in edges]].mean() / steps[[edge - 1 for edge in others]].mean()).item()


def tile_edges(length, tiling, multiple):
    """(tiles along a side of `length` px, the pixels at which one of them begins or has ended)."""
    padded = -(-length // multiple) * multiple
    tile, overlap = tiles.tile_side(padded, tiling, multiple)
    starts = tiles.tile_starts(padded, tile, overlap, multiple)
    return len(starts), sorted({edge for start in starts for edge in (start, start + tile) if 0 < edge < length})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="assets/tiny-kontext")
    parser.add_argument("--height", type=int, default=2000)
    parser.add_argument("--width", type=int, default=3000)
    options, more = parser.parse_known_args()
    check_least(options, height=1, width=1)
    clean, degraded = make_pair(options.height, options.width)
    with tempfile.TemporaryDirectory() as folder:
        save_image(Path(folder, "degraded.png"), degraded)
        flags = ["--pretrained_model_name_or_path", options.model, "--input", f"{folder}/degraded.png", "--output",
                 f"{folder}/restored", *more]
        args = script.parse_args(flags)
        settings, steps, start_noise = resolve_settings(args)
        start = time.perf_counter()
        subprocess.run([sys.executable, script.__file__, *flags], check=True)
        seconds = time.perf_counter() - start
        peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9  # Linux counts KiB
        restored = load_rgb(Path(folder, "restored", "degraded.png"))

    parts = flux.TEXT_PARTS + flux.OPTIONAL_PARTS + ("transformer",)
    vae = flux.load_pipeline(options.model, skip=parts).vae
    tiling, multiple = tiles.choose_tiling(args, settings, vae), flux.size_multiple(vae)
    (down, rows), (across, columns) = (tile_edges(side, tiling, multiple) for side in clean.shape[:2])
    clean, degraded, restored = (to_tensor(image)[None] for image in (clean, degraded, restored))
    right, below, scale = alignment(restored, clean)
    shift, percent = float(np.hypot(right, below)), 100 * (scale - 1)
    seam = max(seams(restored - clean, rows, multiple), seams((restored - clean).mT, columns, multiple))
    print(f"{options.height} x {options.width} px, {Path(options.model).name}, {steps} steps, start noise "
          f"{start_noise:g}, {down} x {across} tiles of {tiling.size_px} px")
    print("| | measured | limit |\n|---|---|---|")
    print(f"| peak memory of the process | {peak_gb:.2f} GB | {PEAK_GB} |\n| time with loading | {seconds:.0f} s | |")
    print(f"| step at tile edges / at other tokens' edges | {seam:.3f} | {SEAM} |")
    print(f"| shift | {shift:.4f} px | {SHIFT_PX} |")
    print(f"| scale | {percent:+.4f} % | {SCALE_PERCENT} |")
    print(f"| PSNR, degraded -> restored | {metrics.psnr(degraded, clean).item():.2f} -> "
          f"{metrics.psnr(restored, clean).item():.2f} dB | |")
    return int(peak_gb > PEAK_GB or shift > SHIFT_PX or abs(percent) > SCALE_PERCENT or seam > SEAM)


if __name__ == "__main__":
    run_main(main)

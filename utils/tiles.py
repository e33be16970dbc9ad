"""Images of any size: overlapping tiles of one size, restored with crops of one noise field and blended.

The image is padded once, tiles begin at whole tokens, and the noise is drawn for the whole image, so that where tiles
overlap they restore the same latents from the same noise. Blend weights are raised cosines over the overlap that sum
to one; the image is accumulated in fp32 on the CPU, and only tiles go to the model's device."""

import itertools
import math
import sys
from typing import NamedTuple

import torch
from tqdm import tqdm

from utils import flux
from utils.parse import check_least
from utils.restore import pad_to_multiple, restore_padded, sampling_noise, stack_noise

BASE_TILE_TOKENS = 64  # a side of FLUX.1 Kontext's own training size: 1024 px, 4096 tokens
SMALLEST_TILE_TOKENS = 16  # a side; with less around it a model cannot tell what it restores
# Live tensors at the peak of FLUX's VAE decoder, counted on the CPU: 3.1 maps of block_out_channels[1] channels at full
# size. Doubled for convolution workspaces and the allocator; the transformer needs less per pixel than the decoder.
DECODER_MAPS = 6
MEMORY_SHARE = 0.9  # of the free memory


class Tiling(NamedTuple):
    """size_px: side of the tiles, rounded down to the model's multiple; 0: the whole image. overlap_px: what neighbours
    share at least; None: a quarter of the tile. batch: tiles that the model sees at once. shifts: token grids over
    whose restorations the mean is taken."""

    size_px: int = 0
    overlap_px: int | None = None
    batch: int = 1
    shifts: int = 1


WHOLE = Tiling()


def add_tile_args(parser):
    add = parser.add_argument_group("large images").add_argument
    add("--tile", default="auto", help="side in px of the tiles in which an image is restored; 0: whole; auto: the "
        "side the LoRA was trained at, or less where GPU memory is short. Out of memory, it is halved")
    add("--tile_overlap", type=int, help="px that neighbouring tiles share, at most half of --tile; default: a quarter")
    add("--tile_batch", type=int, default=1, help="tiles restored at once")
    add("--token_shifts", type=int, default=1, choices=[1, 2, 4, 8], help="restore so many times, on token grids that "
        "are shifted by equal parts of a token, and take the mean: no blocks of a token's size, at so many times the "
        "cost")


def check_tile_args(args):
    """ValueError naming the flag."""
    if args.tile != "auto" and not args.tile.isdecimal():
        raise ValueError(f"--tile {args.tile}: give auto, 0 for whole images, or a side in pixels")
    check_least(args, tile_batch=1)
    half = math.inf if args.tile in ("auto", "0") else int(args.tile) // 2
    if args.tile_overlap is not None and not 0 <= args.tile_overlap <= half:
        raise ValueError(f"--tile_overlap {args.tile_overlap}: give 0 to half of --tile {args.tile}")


def choose_tiling(args, settings, vae):
    """The Tiling that --tile, --tile_overlap, --tile_batch and --token_shifts ask for.

    auto: the side the LoRA was trained at, since positions beyond it were never seen and a longer sequence is no better
    than a seam-free blend. On CUDA at most what the free memory holds by `memory_tile`."""
    if args.tile != "auto":
        return Tiling(int(args.tile), args.tile_overlap, args.tile_batch, args.token_shifts)
    size = trained_side(settings, vae)
    parameter = next(vae.parameters())
    if parameter.device.type == "cuda":
        free = torch.cuda.mem_get_info(parameter.device)[0]
        free += torch.cuda.memory_reserved(parameter.device) - torch.cuda.memory_allocated(parameter.device)
        size = min(size, memory_tile(vae, free, args.tile_batch))
    return Tiling(size, args.tile_overlap, args.tile_batch, args.token_shifts)


def trained_side(settings, vae):
    """Side in px of the images that the LoRA was trained on; where that is not known, BASE_TILE_TOKENS of the model."""
    return settings["resolution"] or BASE_TILE_TOKENS * flux.size_multiple(vae)


def memory_tile(vae, free_bytes, batch=1):
    """Side in px of the largest tile that `free_bytes` hold, by the VAE decoder's peak (DECODER_MAPS); at least the
    smallest tile."""
    parameter_bytes = next(vae.parameters()).element_size()
    pixel_bytes = DECODER_MAPS * vae.config.block_out_channels[1] * parameter_bytes * batch
    return max(math.isqrt(int(MEMORY_SHARE * free_bytes / pixel_bytes)), SMALLEST_TILE_TOKENS * flux.size_multiple(vae))


def tile_starts(length, tile, overlap, multiple):
    """First pixels of the tiles along one side, evenly spread, the last one flush with the edge; neighbours share
    `overlap` px or more. length, tile, overlap: px, multiples of `multiple`, as are the starts; tile <= length."""
    gaps = math.ceil((length - tile) / (tile - overlap))
    return [i * (length - tile) // max(gaps, 1) // multiple * multiple for i in range(gaps + 1)]


def blend_weights(starts, tile, length):
    """Weights (tiles, tile) in fp32 along one side: raised cosines over the overlap, positive, with sum 1 wherever
    tiles lie. One tile has the weight 1."""
    spacing = max((b - a for a, b in itertools.pairwise(starts)), default=0)
    edge = torch.arange(tile, dtype=torch.float64) + 0.5
    ramp = (torch.minimum(edge, tile - edge) / max(tile - spacing, 1)).clamp(max=1)
    weights = torch.sin(math.pi / 2 * ramp) ** 2
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + tile] += weights
    return torch.stack([weights / total[start : start + tile] for start in starts]).float()


def tile_side(length, tiling, multiple):
    """(tile, overlap) in px along a side of `length` px, all multiples of `multiple`."""
    tile = min(tiling.size_px // multiple * multiple or multiple, length) if tiling.size_px else length
    overlap = tile // 4 if tiling.overlap_px is None else min(tiling.overlap_px, tile // 2)
    return tile, overlap // multiple * multiple


def tile_options(tiling, height, width, multiple):
    """{"tile", "tile_overlap"} in px: the options that tile an image of height x width px as `tiling` does, whatever
    the memory; both 0 where it is one tile."""
    longest = -(-max(height, width) // multiple) * multiple
    tile, overlap = tile_side(longest, tiling, multiple)
    return dict(zip(("tile", "tile_overlap"), (tile, overlap) if tile < longest else (0, 0), strict=True))


def blend_tiles(image, tiling, multiple, work):
    """work() on every tile of an image (1, 3, H, W), blended: (1, 3, H, W) in fp32 on the CPU, clamped to [-1, 1].

    work(tiles, boxes): (B, 3, h, w) on the CPU -> the same on any device; boxes: (rows, columns) of each tile, two
    slices in pixels of the padded image. ValueError where it gives NaN or infinity. An image no larger than one tile is
    work() of the padded image, bit for bit."""
    height, width = image.shape[-2:]
    padded = pad_to_multiple(image.cpu(), multiple)
    axes = []
    for length in padded.shape[-2:]:
        tile, overlap = tile_side(length, tiling, multiple)
        starts = tile_starts(length, tile, overlap, multiple)
        slices = [slice(start, start + tile) for start in starts]
        axes.append(list(zip(slices, blend_weights(starts, tile, length), strict=True)))
    tiles = [((rows, columns), down[:, None] * across) for (rows, down), (columns, across) in itertools.product(*axes)]
    blended = torch.zeros_like(padded, dtype=torch.float32)
    chunks = [tiles[i : i + tiling.batch] for i in range(0, len(tiles), tiling.batch)]
    for chunk in tqdm(chunks, unit="tile", unit_scale=tiling.batch, leave=False, disable=None if chunks[1:] else True):
        boxes = [box for box, _ in chunk]
        done = work(torch.cat([padded[..., rows, columns] for rows, columns in boxes]), boxes).float().cpu()
        if not done.isfinite().all():
            raise ValueError("the model gave NaN or infinity; use --dtype fp32 or a smaller --lora_weight")
        for image_tile, ((rows, columns), weight) in zip(done, chunk, strict=True):
            blended[0, :, rows, columns] += weight * image_tile
    return blended[..., :height, :width].clamp_(-1, 1)


def restore_tiled(pipe, control, text, settings, steps, seed, start_noise=None, tiling=WHOLE):
    """Restored image (1, 3, H, W) in [-1, 1] in fp32 on the CPU, of exactly the size of `control` (1, 3, H, W) in
    [-1, 1], tile by tile. text: TextEmbeds of batch 1. An image no larger than one tile equals utils.restore.restore
    with the same seed. ValueError where the model gives no numbers.

    A model that predicts token by token lets neighbouring tokens disagree. With tiling.shifts = n the image is restored
    n times, each time moved down and right by a further n-th of a token, so that its tokens lie elsewhere, and the mean
    is taken: cycle spinning (Coifman and Donoho 1995)."""
    multiple, (height, width) = flux.size_multiple(pipe.vae), control.shape[-2:]
    total = torch.zeros(control.shape)
    for before in range(0, multiple, multiple // tiling.shifts):
        # What fits one tile still does when it is moved: cut in two, it would cost several times as much.
        grid = tiling if before == 0 or max(height, width) > tiling.size_px else tiling._replace(size_px=0)
        padded = pad_to_multiple(control, multiple, before)
        restored = restore_padded_tiled(pipe, padded, text, settings, steps, seed, start_noise, grid)
        total += restored[..., before : before + height, before : before + width]
    return total / tiling.shifts


def restore_padded_tiled(pipe, control, text, settings, steps, seed, start_noise, tiling):
    """What `restore_tiled` gives on the image's own token grid, for sides that are multiples of flux.size_multiple."""
    multiple, scale = flux.size_multiple(pipe.vae), flux.latent_scale(pipe.vae)
    height, width = control.shape[-2:]
    noise = sampling_noise(settings, flux.latent_shape(pipe.vae, height, width), steps, [seed])
    device = next(pipe.vae.parameters()).device

    def work(tiles, boxes):
        crops = [noise.crop(*(slice(side.start // scale, side.stop // scale) for side in box)) for box in boxes]
        texts = text.expand(len(tiles))
        return restore_padded(pipe, tiles.to(device), texts, settings, steps, stack_noise(crops), start_noise)

    return blend_tiles(control, tiling, multiple, work)


@torch.no_grad()
def round_trip_tiled(vae, image, tiling=WHOLE):
    """An image (1, 3, H, W) in [-1, 1] through the VAE and back tile by tile, in fp32 on the CPU: the ceiling of every
    restoration. An image no larger than one tile equals utils.restore.round_trip."""
    device = next(vae.parameters()).device
    return blend_tiles(image, tiling, flux.size_multiple(vae),
                       lambda tiles, _: flux.decode(vae, flux.encode(vae, tiles.to(device))))


def smaller_tiling(tiling, height, width, multiple):
    """What to try when `tiling` needs too much memory for an image of height x width px: one tile at a time, then half
    the side, down to SMALLEST_TILE_TOKENS. None when there is nothing less."""
    longest = max(height, width)
    if tiling.batch > 1 and 0 < tiling.size_px < longest:
        return tiling._replace(batch=1)
    size = min(tiling.size_px or longest, longest) // 2 // multiple * multiple
    if size < SMALLEST_TILE_TOKENS * multiple:
        return None
    return Tiling(size, tiling.overlap_px and tiling.overlap_px // 2, shifts=tiling.shifts)


def within_memory(run, tiling, height, width, multiple):
    """(run(tiling), tiling), and after each torch.OutOfMemoryError the same with a `smaller_tiling`, with a line on
    stderr that says so. The error itself where there is nothing smaller to try."""
    while True:
        try:
            return run(tiling), tiling
        except torch.OutOfMemoryError:
            tiling = smaller_tiling(tiling, height, width, multiple)
            if tiling is None:
                raise
        torch.cuda.empty_cache()  # here the failed run's tensors are gone
        print(f"warning: {width}x{height} px: out of GPU memory; trying again with single tiles of {tiling.size_px} "
              "px", file=sys.stderr)

"""Tiles: they cover the image, weigh to one, share one noise field, leave no seam, and shrink where memory ends."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.conftest import PROJECT_ROOT, photograph
from tests.test_restore import make_settings, photo_tensor, random_text
from utils import flux, restore, tiles
from utils.alignment import alignment
from utils.tiles import Tiling
from utils.utils import to_uint8

SCALE = 4  # px per latent of the codec below; sides are multiples of 8


class Codec(torch.nn.Module):
    """A VAE that loses nothing: SCALE x SCALE pixels become the channels of one latent."""

    def __init__(self):
        super().__init__()
        self.weight, self.dtype = torch.nn.Parameter(torch.zeros(1)), torch.float32
        self.config = SimpleNamespace(block_out_channels=(1, 1, 1), latent_channels=3 * SCALE**2, scaling_factor=2.0,
                                      shift_factor=0.25)

    def encode(self, images):
        latents = F.pixel_unshuffle(images, SCALE)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=latents, std=torch.full_like(latents, 0.1)))

    def decode(self, latents, return_dict):
        return (F.pixel_shuffle(latents, SCALE),)


@pytest.fixture
def codec_pipe():
    return SimpleNamespace(vae=Codec(), transformer=None, scheduler=FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize(("length", "tile", "overlap"), [(64, 64, 16), (72, 64, 16), (200, 64, 16), (200, 64, 32),
                                                         (1000, 128, 0), (3000, 128, 40), (8, 8, 0), (136, 128, 64)])
def test_tiles_cover_a_side_flush_with_its_end_and_overlap_as_asked(length, tile, overlap):
    starts = tiles.tile_starts(length, tile, overlap, 8)
    assert starts[0] == 0 and starts[-1] == length - tile and all(start % 8 == 0 for start in starts)
    spacing = [b - a for a, b in itertools.pairwise(starts)]
    assert all(0 < step <= tile - overlap for step in spacing)
    assert max(spacing, default=0) - min(spacing, default=0) <= 8
    assert len(starts) == 1 + -(-(length - tile) // (tile - overlap))  # no tile more than needed


@pytest.mark.parametrize(("length", "tile", "overlap"), [(64, 64, 16), (72, 64, 16), (200, 64, 16), (200, 64, 32),
                                                         (128, 64, 0), (3000, 128, 40)])
def test_blend_weights_are_positive_smooth_and_sum_to_one(length, tile, overlap):
    starts = tiles.tile_starts(length, tile, overlap, 8)
    weights = tiles.blend_weights(starts, tile, length)
    total = torch.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    assert weights.dtype == torch.float32 and weights.min() > 0
    torch.testing.assert_close(total, torch.ones(length), rtol=0, atol=2e-7)
    if overlap and len(starts) > 1:  # a raised cosine over n px rises by at most pi / (2 n) a pixel
        assert weights.diff().abs().max() < 1.05 * np.pi / (2 * overlap)
    if len(starts) == 1:
        assert torch.equal(weights, torch.ones(1, tile))


def test_tile_sides_are_the_models_multiples_and_the_overlap_at_most_half():
    assert tiles.tile_side(400, Tiling(130), 16) == (128, 32)
    assert tiles.tile_side(400, Tiling(130, 40), 16) == (128, 32)
    assert tiles.tile_side(400, Tiling(64, 60), 16) == (64, 32)
    assert tiles.tile_side(400, Tiling(5), 16) == (16, 0)
    assert tiles.tile_side(96, Tiling(130), 16)[0] == 96  # an image narrower than a tile
    assert tiles.tile_side(400, Tiling(0), 16)[0] == 400


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(5), Tiling(35), Tiling(40, 31, 3), Tiling(64, 0), Tiling(70, 21)])
def test_tile_options_tile_every_size_as_the_tiling_they_stand_for(tiling):
    for height, width in itertools.product((1, 30, 40, 64, 65, 200), repeat=2):
        used = tiles.tile_options(tiling, height, width, 8)
        assert all(side % 8 == 0 for side in used.values())

        def starts(tiling, height=height, width=width):
            sides = [-(-side // 8) * 8 for side in (height, width)]
            return [tiles.tile_starts(side, *tiles.tile_side(side, tiling, 8), 8) for side in sides]

        assert starts(Tiling(used["tile"], used["tile_overlap"])) == starts(tiling)
    assert tiles.tile_options(Tiling(64), 40, 64, 8) == {"tile": 0, "tile_overlap": 0}
    assert tiles.tile_options(Tiling(64), 40, 65, 8) == {"tile": 64, "tile_overlap": 16}


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(32), Tiling(40, 16, 3), Tiling(64, 0), Tiling(32, shifts=4)])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 90), (32, 32), (61, 130), (100, 64)])
def test_a_model_that_changes_nothing_returns_the_image_at_any_size(codec_pipe, monkeypatch, tiling, height, width):
    monkeypatch.setattr(flux, "predict_velocity", lambda _, z, *rest: torch.zeros_like(z))
    image = photograph("coffee", (height, width))
    control = torch.from_numpy(image.copy()).movedim(-1, 0)[None].float() / 127.5 - 1
    settings = make_settings(start_noise=[0.0, 0.0])
    restored = tiles.restore_tiled(codec_pipe, control, random_text(1), settings, 2, 0, tiling=tiling)
    torch.testing.assert_close(restored, control, rtol=0, atol=1e-6)
    assert (to_uint8(restored[0]) == image).all()
    torch.testing.assert_close(tiles.round_trip_tiled(codec_pipe.vae, control, tiling), control, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tiling", [Tiling(32), Tiling(40, 16, 3), Tiling(48, 0, 2)])
@pytest.mark.parametrize("changes", [
    {"start_noise": [0.5, 0.5]}, {"start_noise": [0.0, 0.0], "bridge_noise": 0.4},
    {"start_noise": [0.5, 0.5], "vae_encode_mode": "sample"},
])
def test_one_noise_field_serves_all_tiles(codec_pipe, monkeypatch, changes, tiling):
    """A model that works pixel by pixel gives by tiles what it gives for the whole image."""
    monkeypatch.setattr(flux, "predict_velocity", lambda _, z, sigma, control, *rest: torch.tanh(z + 0.5 * control))
    control, settings = photo_tensor("coffee", (61, 100)), make_settings(**changes)
    whole = restore.restore(codec_pipe, control, random_text(1), settings, 3, [4])
    tiled = tiles.restore_tiled(codec_pipe, control, random_text(1), settings, 3, 4, tiling=tiling)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)
    other = tiles.restore_tiled(codec_pipe, control, random_text(1), settings, 3, 5, tiling=tiling)
    assert (other - whole).abs().max() > 1e-2


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(64), Tiling(1024, 128, 4)])
@pytest.mark.parametrize("changes", [
    {"start_noise": [1.0, 1.0]}, {"start_noise": [0.5, 0.5], "vae_encode_mode": "sample"},
    {"start_noise": [0.0, 0.0], "bridge_noise": 0.4},
])
def test_an_image_no_larger_than_one_tile_equals_the_untiled_result_bit_for_bit(tiny_pipe, changes, tiling):
    control, settings = photo_tensor("astronaut", (50, 61)), make_settings(**changes)
    whole = restore.restore(tiny_pipe, control, random_text(1), settings, 2, [4])
    assert torch.equal(tiles.restore_tiled(tiny_pipe, control, random_text(1), settings, 2, 4, tiling=tiling), whole)
    assert torch.equal(tiles.round_trip_tiled(tiny_pipe.vae, control, tiling),
                       restore.round_trip(tiny_pipe.vae, control))


def test_tiles_in_batches_equal_tiles_one_by_one(tiny_pipe):
    control, settings = photo_tensor("astronaut", (80, 96)), make_settings(start_noise=[0.5, 0.5])
    one, five = (tiles.restore_tiled(tiny_pipe, control, random_text(1), settings, 2, 0, tiling=Tiling(48, 16, batch))
                 for batch in (1, 5))
    torch.testing.assert_close(one, five, rtol=0, atol=1e-5)


def test_token_shifts_take_the_mean_over_shifted_grids_of_tokens(codec_pipe, monkeypatch):
    """A model that reduces each token to its mean: the blocks of one grid stay with one shift; with eight they are
    averages over sliding windows along the diagonal."""
    sizes = []

    def block_means(_, z, *rest):
        sizes.append(tuple(z.shape[-2:]))
        pixels = F.pixel_shuffle(z / 2 + 0.25, SCALE)
        means = F.avg_pool2d(pixels, 8).repeat_interleave(8, -1).repeat_interleave(8, -2)
        return z - 2 * (F.pixel_unshuffle(means, SCALE) - 0.25)

    monkeypatch.setattr(flux, "predict_velocity", block_means)
    control, settings = photo_tensor("coffee", (64, 64)), make_settings(start_noise=[0.0, 0.0])

    def restored(tiling):
        return tiles.restore_tiled(codec_pipe, control, random_text(1), settings, 1, 0, tiling=tiling)

    one, eight = restored(Tiling(64)), restored(Tiling(64, shifts=8))
    assert sizes == [(16, 16)] * 2 + [(18, 18)] * 7  # the moved image is one tile as well
    block = control[..., 8:16, 16:24].mean((-1, -2), keepdim=True)
    torch.testing.assert_close(one[..., 8:16, 16:24], block.expand(-1, -1, 8, 8))
    windows = [control[..., 24 - shift : 32 - shift, 24 - shift : 32 - shift].mean((-1, -2)) for shift in range(8)]
    torch.testing.assert_close(eight[..., 24, 24], torch.stack(windows).mean(0))
    torch.testing.assert_close(restored(Tiling(32, 16, shifts=8))[..., 24, 24], eight[..., 24, 24])


def largest_step(image):
    """Between neighbouring pixels, off the image's own border."""
    return max(image[..., 8:-8, 8:-8].diff(dim=side).abs().max().item() for side in (-1, -2))


@pytest.mark.parametrize("gradient", [False, True])
def test_tiles_of_different_brightness_and_with_bad_edges_meet_without_a_step(gradient):
    """Constant and gradient: what is wrong with each tile is spread over the overlap, where it otherwise is a jump."""
    image = torch.zeros(1, 3, 192, 256)
    image += torch.linspace(-0.5, 0.5, 256) * gradient
    generator = torch.Generator().manual_seed(0)

    def work(crops, _):
        spoiled = crops + 0.1 * torch.randn(len(crops), 1, 1, 1, generator=generator)
        spoiled[..., :2, :] += 0.2  # a convolution's padding shows in the outermost pixels
        return spoiled

    jump = largest_step(tiles.blend_tiles(image, Tiling(64, 0), 8, work) - image)
    blended = largest_step(tiles.blend_tiles(image, Tiling(64, 32), 8, work) - image)
    assert jump > 0.15 and blended < 0.03


@pytest.fixture(scope="module")
def trained():
    """The embedded model and its encoded prompt."""
    path, prompt = str(PROJECT_ROOT / "assets" / "tiny-kontext"), restore.STOCK_SETTINGS["prompt"]
    text = flux.encode_prompts(path, [prompt], "cpu", torch.float32, 32)
    return (flux.load_models(path, "cpu", torch.float32),
            flux.stack_text(text, [prompt], "cpu", torch.float32))


@pytest.mark.parametrize("gradient", [False, True])
def test_a_trained_model_leaves_a_constant_and_a_gradient_smooth_where_tiles_meet(trained, gradient):
    """Steps between rows at the tiles' edges against those at other tokens' edges: alike with overlap, larger
    without."""
    pipe, text = trained
    image = torch.full((1, 3, 192, 64), 0.1) + 0.5 * torch.linspace(-1, 1, 192)[:, None] * gradient

    def seam(overlap):
        restored = tiles.restore_tiled(pipe, image, text, make_settings(guidance_scale=1.0), 2, 0, 1.0,
                                       Tiling(64, overlap))
        steps = (restored - image).diff(dim=-2).abs().mean((0, 1, 3))  # from row y to y + 1
        edges = [y - 1 for start in tiles.tile_starts(192, 64, overlap, 8) for y in (start, start + 64) if 0 < y < 192]
        tokens = [y for y in range(7, 191, 8) if y not in edges]
        return (steps[edges].mean() / steps[tokens].mean()).item()

    assert seam(16) < 1.3 and seam(0) > 1.5


@pytest.mark.parametrize("tiling", [Tiling(64), Tiling(128), Tiling(96, 40)])
@pytest.mark.parametrize("size", [(128, 128), (181, 203)])
def test_restored_images_lie_on_their_targets_at_every_size_and_tiling(trained, size, tiling):
    pipe, text = trained
    target = photo_tensor("coffee", size)
    noisy = target + 0.08 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    restored = tiles.restore_tiled(pipe, noisy.clamp(-1, 1), text, make_settings(guidance_scale=1.0), 2, 0, 1.0, tiling)
    right, down, scale = alignment(restored, target)
    assert np.hypot(right, down) < 0.1 and abs(scale - 1) < 1e-3


def test_a_model_without_numbers_is_reported(codec_pipe, monkeypatch):
    monkeypatch.setattr(flux, "predict_velocity", lambda _, z, *rest: z / 0)
    with pytest.raises(ValueError, match="NaN or infinity"):
        tiles.restore_tiled(codec_pipe, photo_tensor("coffee", (16, 16)), random_text(1),
                            make_settings(start_noise=[0.0, 0.0]), 1, 0)


def test_out_of_memory_takes_single_tiles_then_halves_them_down_to_a_floor(capsys):
    tried = []

    def run(tiling, enough):
        tried.append(tiling)
        if tiling.batch > 1 or not 0 < tiling.size_px <= enough:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "restored"

    def within(tiling, enough, height=3000, width=2000):
        tried.clear()
        return tiles.within_memory(lambda smaller: run(smaller, enough), tiling, height, width, 16)

    assert within(Tiling(1024, 256, 4, 2), 512) == ("restored", (512, 128, 1, 2))
    assert tried == [(1024, 256, 4, 2), (1024, 256, 1, 2), (512, 128, 1, 2)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "2000x3000 px: out of GPU memory" in lines[1] and "tiles of 512 px" in lines[1]
    # the whole image first, then tiles of half its longer side
    assert within(Tiling(), 400) == ("restored", (368, None, 1, 1))
    assert [tiling.size_px for tiling in tried] == [0, 1488, 736, 368]
    with pytest.raises(torch.OutOfMemoryError):
        within(Tiling(1024), 0)
    assert [tiling.size_px for tiling in tried] == [1024, 512, 256]
    with pytest.raises(torch.OutOfMemoryError):
        within(Tiling(1024, None, 4), 0, height=300, width=200)
    assert len(tried) == 1  # one tile, and half of it would be below the floor


def make_args(tile="auto", overlap=None, batch=1, shifts=1):
    return SimpleNamespace(tile=tile, tile_overlap=overlap, tile_batch=batch, token_shifts=shifts)


def test_auto_takes_the_trained_size_and_numbers_are_followed(codec_pipe):
    vae = codec_pipe.vae
    assert tiles.choose_tiling(make_args(), make_settings(resolution=384), vae) == (384, None, 1, 1)
    assert tiles.choose_tiling(make_args(), make_settings(), vae) == (64 * 8, None, 1, 1)  # tokens of 8 px
    assert tiles.choose_tiling(make_args("256", 32, 4, 2), make_settings(resolution=384), vae) == (256, 32, 4, 2)
    assert tiles.choose_tiling(make_args(shifts=8), make_settings(resolution=384), vae) == (384, None, 1, 8)
    assert tiles.choose_tiling(make_args("0"), make_settings(resolution=384), vae).size_px == 0


def test_auto_shrinks_with_the_free_memory_of_a_gpu(monkeypatch):
    weight = SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 2)
    vae = SimpleNamespace(parameters=lambda: iter([weight]),
                          config=SimpleNamespace(block_out_channels=(128, 256, 512, 512)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10**9)

    def side(free, **changes):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 * 10**9))
        return tiles.choose_tiling(make_args(**changes), make_settings(resolution=1024), vae).size_px

    assert side(60 * 10**9) == 1024 and side(0) == 16 * 16
    assert 700 < side(2 * 10**9) < 900
    assert side(2 * 10**9, batch=4) == pytest.approx(side(2 * 10**9) / 2, abs=1)
    assert side(2 * 10**9, tile="1024") == 1024  # what is asked for is tried

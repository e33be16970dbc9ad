import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, special
from skimage import data

from bench.data import usual_chain
from my_dataset import damage
from my_dataset.dataset_deg_paired import DegDataset, Record, add_data_args, dataset_from_args
from my_dataset.degradations import (
    DAMAGE_TYPES,
    DRAW,
    LAYERS,
    OPTIONS,
    PRESETS,
    TYPES,
    add_degradation_args,
    apply_degradations,
    bessel_j1,
    blur,
    convolve,
    damage_mask,
    degrader_from_args,
    gaussian_kernel,
    generalized_kernel,
    make_degrader,
    plateau_kernel,
    rescale,
    sinc_kernel,
)
from utils.parse import make_parser

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def photo():
    """(256, 256, 3) uint8 photograph."""
    return np.ascontiguousarray(data.astronaut()[:256, 100:356])


def rng(seed=0):
    return np.random.default_rng(seed)


def constant(value, side=64, dtype=np.float32):
    return np.full((side, side, 3), value, dtype)


def samples(degrade, image, count):
    return [degrade(image, rng(seed)) for seed in range(count)]


def level_difference(a, b):
    return np.abs(a.astype(np.float64) - b).mean()


def psnr(a, b):
    return 10 * np.log10(255**2 / ((a.astype(np.float64) - b) ** 2).mean())


# Words


@pytest.mark.parametrize("word", TYPES)
def test_every_word_alone_damages_and_its_parameters_repeat_it_after_a_trip_through_json(photo, word):
    drawn = samples(make_degrader(word), photo, 6)
    assert all([step["type"] for step in params] == [word] for _, params in drawn)
    assert any((image != photo).any() for image, _ in drawn)
    for image, params in drawn:
        assert (apply_degradations(photo, json.loads(json.dumps(params))) == image).all()


@pytest.mark.parametrize("word", DAMAGE_TYPES)
def test_strength_0_is_the_identity_and_more_strength_does_more(photo, word):
    for image, params in samples(make_degrader(word, damage_strength=0), photo, 3):
        assert (image == photo).all() and params[0]["type"] == word
        assert not damage_mask(*photo.shape[:2], params).any()

    def mean_change(strength):
        drawn = samples(make_degrader(word, damage_strength=strength), photo, 6)
        return np.mean([level_difference(image, photo) for image, _ in drawn])

    assert 1.1 * mean_change("0.5") < mean_change("1-1") < mean_change(2) / 1.1


RANGES = {
    "fade": {"black": (0.03, 0.25), "white": (0.75, 0.98), "gamma": (0.7, 1.5), "saturation": (0.2, 0.9)},
    "yellow": {"amount": (0.1, 0.6), "paper": (0.72, 1)},
    "scratches": {"count": (1, 25)},
    "dust": {"count": (20, 400)},
    "folds": {"count": (1, 3)},
    "stains": {"coverage": (0.03, 0.25), "depth": (0.05, 0.4)},
    "grain": {"sigma": (0.5, 1.2), "amplitude": (0.02, 0.12)},
    "halftone": {"pitch": (3, 6), "amount": (0.3, 0.8), "angle": (0, 90)},
    "low_light": {"gamma": (1.5, 3.5), "gain": (0.1, 0.5), "shot": (0.01, 0.04), "read": (0.002, 0.015)},
    "haze": {"airlight": (0.7, 1), "beta": (0.6, 1.8), "gradient": (0.3, 1)},
}


@pytest.mark.parametrize("word", DAMAGE_TYPES)
def test_parameters_cover_their_documented_ranges_and_stay_inside(word):
    drawn = [params[0] for _, params in samples(make_degrader(word), constant(9, 2), 300)]
    for name, (lo, hi) in RANGES[word].items():
        values = np.array([step[name] for step in drawn])
        assert lo <= values.min() and values.max() <= hi
        assert np.ptp(values) > (0.75 if name in ("black", "white", "gamma") else 0.9) * (hi - lo)


@pytest.mark.parametrize("word", DAMAGE_TYPES)
def test_float_images_are_damaged_as_uint8_ones_are(photo, word):
    for image, params in samples(make_degrader(word), photo, 3):
        exact = apply_degradations(photo.astype(np.float32), params)
        assert exact.dtype == np.float32
        assert abs(exact - image).max() < 0.51


# The whole picture


def test_fading_takes_black_and_white_to_their_limits_and_bends_what_lies_between():
    limits = {"black": [0.05, 0.1, 0.2], "white": [0.9, 0.8, 0.95], "gamma": [0.8, 1.0, 1.4]}
    for tone in (0, 64, 200, 255):
        faded = damage.fade(constant(tone), **limits, saturation=0.7)[0, 0] / 255
        expected = [b + (w - b) * (tone / 255) ** g for b, w, g in zip(*limits.values(), strict=True)]
        np.testing.assert_allclose(faded, expected, atol=1e-5)


def test_fading_without_saturation_is_the_luma(photo):
    none = {"black": [0.0] * 3, "white": [1.0] * 3, "gamma": [1.0] * 3}
    assert (damage.fade(photo, **none, saturation=1.0) == photo).all()
    grey = damage.fade(photo.astype(np.float32), **none, saturation=0.0)
    np.testing.assert_allclose(grey, np.repeat((photo @ [0.299, 0.587, 0.114])[..., None], 3, 2), atol=0.01)


def test_yellowing_turns_white_to_paper_and_leaves_black():
    paper = [1.0, 0.95, 0.8]
    np.testing.assert_allclose(damage.yellow(constant(255), 0.5, paper)[0, 0], [255, 248.6, 229.5], atol=0.1)
    assert (damage.yellow(constant(0), 0.5, paper) == 0).all()
    red = np.zeros((2, 2, 3), np.float32)
    red[..., 0] = 100
    np.testing.assert_allclose(damage.yellow(red, 1.0, paper)[0, 0], 29.9 * np.array(paper), atol=0.01)


@pytest.mark.parametrize("sigma", [0.6, 1.2])
def test_grain_is_grey_strongest_in_the_middle_tones_and_correlated_over_sigma(sigma):
    def field(tone):
        return damage.grain(constant(tone, 300), sigma, 0.05, rng()) - tone

    assert field(0).max() == 0 and field(255).min() == 0
    middle = field(127.5)
    assert (np.ptp(middle, axis=2) < 1e-4).all()
    assert middle.std() == pytest.approx(0.05 * 255, rel=0.03)
    assert field(25.5).std() == pytest.approx(0.05 * 255 * (4 * 0.1 * 0.9) ** 0.5, rel=0.03)
    grain = middle[..., 0]
    kernel = np.exp(-0.5 * (np.arange(-12, 13) / sigma) ** 2)
    expected = np.correlate(kernel, kernel, "full")[len(kernel)] / (kernel**2).sum()  # at one pixel's distance
    assert np.corrcoef(grain[:, 1:].ravel(), grain[:, :-1].ravel())[0, 1] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("tone", [40, 90, 128, 200])
def test_halftone_keeps_the_mean_tone_and_repeats_at_its_pitch(tone):
    dots = damage.halftone(constant(tone, 240), 6, 0, 1.0)
    np.testing.assert_allclose(dots.mean((0, 1)), tone, atol=6)
    assert dots.std() > 60
    np.testing.assert_allclose(dots[:, 6:, 2], dots[:, :-6, 2], atol=12)  # the yellow screen is not turned
    assert abs(dots[:, 3:, 2] - dots[:, :-3, 2]).max() > 100
    mixed = damage.halftone(constant(tone, 240), 6, 0, 0.25)
    np.testing.assert_allclose(mixed, 0.25 * dots + 0.75 * tone, atol=1e-3)


def test_low_light_is_a_scaled_power_and_its_noise_is_shot_plus_read_noise():
    for tone in (0, 60, 255):
        np.testing.assert_allclose(damage.low_light(constant(tone), 2.2, 0.3), 76.5 * (tone / 255) ** 2.2, rtol=1e-4)
    step = {"type": "low_light", "gamma": 1.5, "gain": 0.5, "shot": 0.04, "read": 0.01, "seed": 1}
    dark = apply_degradations(constant(200, 200), [step])
    mean = 127.5 * (200 / 255) ** 1.5
    assert dark.mean() == pytest.approx(mean, rel=0.01)
    assert dark.var() == pytest.approx(255 * 0.04**2 * mean + (255 * 0.01) ** 2, rel=0.05)


def test_haze_follows_the_scattering_model(photo):
    image = photo.astype(np.float32)
    airlight, beta = 0.9, 1.2
    for gradient in (0.3, 1.0):
        hazy = damage.haze(image, airlight, beta, gradient, rng(3))
        depth = damage.depth_map(256, 256, gradient, rng(3))[..., None]
        assert depth.min() >= 0 and depth.max() <= 1 and depth[:20].mean() > depth[-20:].mean()
        transmission = np.exp(-beta * depth)
        np.testing.assert_allclose(hazy, image * transmission + 229.5 * (1 - transmission), atol=1e-3)
    np.testing.assert_allclose(depth[:, 0, 0], np.linspace(1, 0, 256), atol=1e-6)  # a ramp alone, nearest at the bottom


# A part of the pixels


@pytest.mark.parametrize("word", LAYERS)
@pytest.mark.parametrize("side", [128, 512])
def test_the_mask_covers_every_pixel_that_local_damage_changes(word, side):
    image = np.ascontiguousarray(data.astronaut()[:side, :side])
    changed_at_all = 0
    for damaged, params in samples(make_degrader(word, damage_strength=2), image, 4):
        mask = damage_mask(side, side, params)
        assert mask.shape == (side, side) and mask.dtype == np.float32 and 0 <= mask.min() and mask.max() <= 1
        changed = (damaged != image).any(axis=2)
        assert not (changed & (mask == 0)).any()
        if (mask > 0.9).any():
            assert changed[mask > 0.9].mean() > 0.7  # not just everywhere
        changed_at_all += changed.sum()
    assert changed_at_all > 50


def test_the_mask_of_a_chain_is_that_of_all_its_local_damage(photo):
    degrade = make_degrader("fade,scratches,noise,dust,stains,jpeg", damage_strength=2)
    params = degrade(photo, rng(1))[1]
    whole = damage_mask(256, 256, params)
    parts = [damage_mask(256, 256, [step]) for step in params]
    assert [part.any() for part in parts] == [False, True, False, True, True, False]
    assert (whole == np.max(parts, axis=0)).all()


def test_the_mask_follows_a_resize():
    step = {"type": "scratches", "count": 300.0, "seed": 3}
    half = [{"type": "resize", "scale": 0.5, "down_kernel": "area", "up_kernel": "bilinear"}]
    mask = damage_mask(200, 120, [*half, step])
    assert mask.shape == (200, 120) and mask.any()
    np.testing.assert_allclose(mask, cv2.resize(damage_mask(100, 60, [step]), (120, 200), interpolation=cv2.INTER_AREA))
    grey, params = constant(128, 120)[:100], [*half, step]
    back = apply_degradations(grey, params)
    assert back.shape == grey.shape
    assert (abs(back - 128).max(axis=2) > 20)[damage_mask(100, 120, params) > 0.5].all()


@pytest.mark.parametrize("word, lowest, highest", [("scratches", 0.001, 0.05), ("dust", 0.0005, 0.03)])
def test_small_crops_are_damaged_in_proportion(word, lowest, highest):
    def share(side):
        drawn = samples(make_degrader(word), constant(9, side), 24)
        return np.mean([(damage_mask(side, side, params) > 0.2).mean() for _, params in drawn])

    shares = {side: share(side) for side in (128, 512)}
    assert all(lowest < share < highest for share in shares.values())
    assert 0.3 < shares[128] / shares[512] < 2


def test_a_small_crop_sometimes_has_one_to_three_scratches():
    generator = rng()
    numbers = [damage.draw_number(generator.uniform(1, 25), 128, 128, generator) for _ in range(300)]
    assert set(numbers) == {0, 1, 2} and 0.6 < np.mean(numbers) < 1
    assert np.mean([damage.draw_number(2, 256, 256, generator, power=0.5) for _ in range(50)]) == 1  # folds: by side


def test_scratches_are_thin_and_mostly_upright():
    layer = damage.scratches(512, 512, 40, rng(2))
    mask = (layer.mask > 0.25).astype(np.uint8)
    depth = cv2.distanceTransform(mask, cv2.DIST_L2, 5)[mask > 0]
    assert (depth > 2.5).mean() < 0.02  # 3 px wide at most, except where they cross
    across, along = ((abs(np.diff(layer.mask, axis=axis))).sum() for axis in (1, 0))
    assert across > 1.3 * along
    shades = constant(128, 512) * layer.gain + layer.offset
    assert shades.max() > 190 and shades.min() < 70  # bright and dark ones


def test_a_fold_runs_right_across():
    for seed in range(5):
        mask = damage.folds(300, 300, 2, rng(seed)).mask > 0.1
        assert mask.any(axis=0).mean() > 0.6 or mask.any(axis=1).mean() > 0.6
        assert mask.mean() < 0.25


@pytest.mark.parametrize("coverage", [0.05, 0.25])
def test_stains_cover_their_share_and_take_most_from_blue(coverage):
    layer = damage.stains(256, 256, coverage, 0.4, rng(1))
    assert (layer.mask > 0).mean() == pytest.approx(coverage, abs=0.01)
    assert layer.gain.min() == pytest.approx(1 - 0.4, abs=0.02) and layer.gain.max() == 1
    red, green, blue = (layer.gain[layer.mask > 0.5]).mean(axis=0)
    assert red > green > blue
    assert not layer.offset.any()


# What the real-world chain is made of


@pytest.mark.parametrize("radius", [0.2, 1, 3])
def test_a_generalized_kernel_of_beta_1_is_gaussian_and_all_sum_to_1(radius):
    gaussian = gaussian_kernel(radius, 0.4 * radius, 30)
    np.testing.assert_allclose(generalized_kernel(radius, 0.4, 30), gaussian, atol=1e-12)
    others = generalized_kernel(radius, 0.5, 20, 4), plateau_kernel(radius, 0.5, 20, 2), sinc_kernel(max(1, radius))
    for kernel in others:
        assert kernel.sum() == pytest.approx(1) and kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-12)


def test_beta_flattens_the_top_of_a_kernel():
    def shoulder(kernel):
        return kernel[12, 14] / kernel[12, 12]  # two thirds of the radius away

    for beta in (0.5, 1, 4):
        assert shoulder(generalized_kernel(3, beta=beta)) == pytest.approx(np.exp(-0.5 * (4 / 9) ** beta))
        assert shoulder(plateau_kernel(3, beta=beta)) == pytest.approx(1 / (1 + (4 / 9) ** beta))


def test_the_sinc_kernel_is_the_ideal_round_low_pass():
    x = np.linspace(0, 30, 301)
    np.testing.assert_allclose(bessel_j1(x), special.j1(x), atol=1e-12)
    response = abs(np.fft.fft2(np.pad(sinc_kernel(2.5), 100)))
    frequency = 2 * np.pi * np.hypot(*np.meshgrid(*[np.fft.fftfreq(len(response))] * 2))
    assert response[frequency < 0.6 * np.pi / 2.5].min() > 0.8
    assert response[(frequency > 1.6 * np.pi / 2.5) & (frequency < np.pi)].max() < 0.2
    edge = constant(60, 40)
    edge[:, 20:] = 190
    ringing = blur(edge, 2, "sinc")
    assert ringing.max() > 195 and ringing.min() < 55


@pytest.mark.parametrize("side", [5, 13, 15, 17, 21])
def test_convolve_is_scipys_correlation(photo, side):
    kernel = rng().random((side, side)) / side**2
    ours = convolve(photo[:60, :45].astype(np.float32), kernel)
    for channel in range(3):
        reference = ndimage.correlate(photo[:60, :45, channel].astype(np.float64), kernel)
        np.testing.assert_allclose(ours[..., channel], reference, atol=1e-3)


def test_rescale_is_relative_to_the_given_size(photo):
    assert rescale(photo, 100, 60, 0.5).shape == (50, 30, 3)
    assert rescale(photo, 100, 60, 1.5, up_kernel="lanczos").shape == (150, 90, 3)
    assert rescale(photo, 10, 10, 0.01).shape == (1, 1, 3)
    assert (rescale(photo, 256, 256, 1, "nearest", "bicubic") == photo).all()
    np.testing.assert_allclose(rescale(photo, 256, 256, 0.5), photo.reshape(128, 2, 128, 2, 3).mean((1, 3)), atol=0.51)


def test_what_follows_a_resize_works_at_the_new_size():
    noise = {"type": "noise", "kind": "gaussian", "level": 0.1, "gray": True, "seed": 4}
    quarter = {"type": "resize", "scale": 0.25, "down_kernel": "area", "up_kernel": "bilinear"}
    coarse = apply_degradations(constant(128), [quarter, noise])[..., 0]
    fine = apply_degradations(constant(128), [noise, quarter])[..., 0]
    assert coarse.shape == (64, 64)
    assert np.corrcoef(coarse[:, 1:].ravel(), coarse[:, :-1].ravel())[0, 1] > 0.8
    assert coarse.std() > 3 * fine.std()  # averaged away by the reduction


def test_resize_goes_up_down_or_nowhere_with_its_chances():
    scales = np.array([params[0]["scale"] for _, params in samples(make_degrader("resize"), constant(9, 2), 800)])
    assert 0.15 <= scales.min() < 0.2 and 1.4 < scales.max() <= 1.5
    for share, expected in (((scales > 1).mean(), 0.2), ((scales < 1).mean(), 0.7), ((scales == 1).mean(), 0.1)):
        assert share == pytest.approx(expected, abs=0.06)


# Presets


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_damages_reproducibly_at_the_same_size(photo, preset):
    degrade = make_degrader(preset=preset)
    image = photo[:150, :110]
    drawn = samples(degrade, image, 8)
    for (degraded, params), (again, _) in zip(drawn, samples(degrade, image, 8), strict=True):
        assert degraded.shape == image.shape and degraded.dtype == np.uint8
        assert (degraded == again).all()
        assert (apply_degradations(image, json.loads(json.dumps(params))) == degraded).all()
    assert len({json.dumps(params) for _, params in drawn}) == 8
    assert np.mean([(degraded != image).any() for degraded, _ in drawn]) > 0.8


def test_light_medium_and_heavy_are_ever_stronger_and_heavy_has_noise_to_remove(photo):
    mean_psnr = {
        preset: np.mean([psnr(image, photo) for image, _ in samples(make_degrader(preset=preset), photo, 12)])
        for preset in ("light", "medium", "heavy")
    }
    assert mean_psnr["light"] > mean_psnr["medium"] + 2 > mean_psnr["heavy"] + 4
    for preset, lo, hi in (("light", 2, 10), ("medium", 5, 25), ("heavy", 20, 50)):
        drawn = [params for _, params in samples(make_degrader(preset=preset), constant(9, 4), 60)]
        levels = [255 * step["level"] for params in drawn for step in params if step["type"] == "noise"]
        assert len(levels) == 60 and lo <= min(levels) and max(levels) <= hi and np.ptp(levels) > 0.8 * (hi - lo)


def test_presets_differ_from_each_other(photo):
    images = [make_degrader(preset=preset)(photo, rng(5))[0] for preset in PRESETS]
    for i, image in enumerate(images):
        assert all(psnr(image, other) < 35 for other in images[:i])


def test_real_world_is_the_second_order_chain_with_both_endings():
    degrade = make_degrader(preset="real_world", probabilities="1")
    once, twice = ["blur", "resize", "noise", "jpeg"], ["blur", "resize", "noise"]
    endings = {"sinc first": ["resize", "blur", "jpeg"], "jpeg first": ["jpeg", "resize", "blur"]}
    seen = []
    for _, params in samples(degrade, constant(90, 16, np.uint8), 60):
        words = [step["type"] for step in params]
        seen += [name for name, ending in endings.items() if words == once + twice + ending]
        first, second = (params[1], params[5])
        assert 0.15 <= first["scale"] <= 1.5 and 0.3 <= second["scale"] <= 1.2
        back = params[7 if seen[-1] == "sinc first" else 8]
        assert back["type"] == "resize" and back["scale"] == 1
        assert [step["kind"] for step in params if step["type"] == "blur"][2] == "sinc"
        assert all(30 <= step["quality"] <= 95 for step in params if step["type"] == "jpeg")
    assert len(seen) == 60 and 15 < seen.count("sinc first") < 45


def test_real_world_draws_its_kinds_with_their_weights_and_noise_by_kind():
    degrade = make_degrader(preset="real_world")
    settings = degrade.keywords["settings"]["chains"][0]
    drawn = [params for _, params in samples(degrade, constant(9, 4), 300)]
    kinds = [params[0]["kind"] for params in drawn]
    for kind, weight in settings[0]["blur_kinds"].items():
        assert kinds.count(kind) / 300 == pytest.approx(weight, abs=0.08)
    assert sum(settings[0]["blur_kinds"].values()) == pytest.approx(1)
    levels = {kind: [p[2]["level"] for p in drawn if p[2]["kind"] == kind] for kind in ("gaussian", "poisson")}
    assert max(levels["gaussian"]) <= 30 / 255 < max(levels["poisson"]) <= 3 / 16
    assert 0.3 < np.mean([p[2]["gray"] for p in drawn]) < 0.5


def test_the_chain_of_the_benchmark_makes_the_same_picture(photo):
    compared = []
    for seed in range(4):
        params = make_degrader(preset="real_world", probabilities="noise:0")(photo, rng(seed))[1]
        compared.append(psnr(usual_chain(photo, params), apply_degradations(photo, params)))
    assert min(compared) > 27 and np.mean(compared) > 30  # libjpeg smooths chroma, kernels are cut elsewhere
    for kind in ("gaussian", "poisson"):
        step = {"type": "noise", "kind": kind, "level": 0.05, "gray": False, "seed": 1}
        ours, theirs = apply_degradations(photo, [step]), usual_chain(photo, [step])
        assert (ours - photo.astype(float)).std() == pytest.approx((theirs - photo.astype(float)).std(), rel=0.03)


def test_an_old_photo_is_taken_printed_aged_handled_and_scanned_in_this_order():
    order = "blur grain halftone fade yellow stains folds scratches dust downsample noise jpeg".split()
    degrade = make_degrader(preset="old_photo")
    counts = dict.fromkeys(order, 0)
    for _, params in samples(degrade, constant(9, 4), 200):
        words = [step["type"] for step in params]
        assert words == [word for word in order if word in words]
        for word in words:
            counts[word] += 1
    assert all(0 < count < 200 for count in counts.values())
    assert counts["fade"] > counts["folds"] > counts["halftone"]


# Options


def parse(*flags, data_options=False):
    parser = argparse.ArgumentParser()
    add_degradation_args(parser)
    if data_options:
        add_data_args(parser)
    return parser.parse_args([str(flag) for flag in flags])


def from_flags(*flags):
    return degrader_from_args(parse(*flags))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_preset_flag_is_the_preset(preset):
    assert from_flags("--degradation_preset", preset).keywords == make_degrader(preset=preset).keywords


def test_types_beside_a_preset_are_refused_in_one_line():
    with pytest.raises(ValueError, match="^--degradation_types beside --degradation_preset heavy") as error:
        from_flags("--degradation_preset", "heavy", "--degradation_types", "noise")
    assert "\n" not in str(error.value)


def test_a_preset_in_a_config_file_beside_a_script_s_own_types_is_refused_with_the_cure(tmp_path):
    config = tmp_path / "heavy.yaml"
    config.write_text("degradation_preset: heavy\n")
    parser = make_parser("")
    add_degradation_args(parser)
    args = parser.parse_args(["--degradation_types", "downsample,noise,blur", "--config", str(config)])
    with pytest.raises(ValueError, match="train_flow_matching.sh .* on their command line.* not in a --config file"):
        degrader_from_args(args)


class Noting(dict):
    """A dict that keeps the names that were read."""

    def __init__(self, values):
        super().__init__(values)
        self.names = set()

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_option_is_refused_beside_a_preset_exactly_where_no_step_reads_it(preset):
    steps = [Noting(step) for chain in make_degrader(preset=preset).keywords["settings"]["chains"] for step in chain]
    for step in steps:
        DRAW[step["type"]](step, rng(0))
    read = set().union(*(step.names for step in steps))
    for name, (flag, default, *_) in OPTIONS.items():
        if name in read:
            from_flags("--degradation_preset", preset, flag, default)
            continue
        with pytest.raises(ValueError, match=f"^{flag} beside --degradation_preset {preset}, .* drop {flag}") as error:
            from_flags("--degradation_preset", preset, flag, default)
        assert "\n" not in str(error.value)
    unread = {"real_world": {"lr_scale", "damage_strength"}, "old_photo": set()}
    assert OPTIONS.keys() - read == unread.get(preset, {"damage_strength"})


@pytest.mark.parametrize(
    "flag, value",
    [("--degradation_preset", "mild"), ("--degradation_preset", ""), ("--damage_strength", "-1"),
     ("--damage_strength", "4"), ("--damage_strength", "a lot")],
)  # fmt: skip
def test_a_bad_value_is_one_line_that_names_its_flag(flag, value):
    with pytest.raises(ValueError, match=f"^{flag}") as error:
        from_flags(f"{flag}={value}")
    assert "\n" not in str(error.value)


def test_options_beside_a_preset_win_in_all_of_its_steps():
    degrade = from_flags("--degradation_preset", "real_world", "--noise_level", "0.2", "--noise_kind", "poisson")
    for _, params in samples(degrade, constant(9, 8), 5):
        assert {(step["level"], step["kind"]) for step in params if step["type"] == "noise"} == {(0.2, "poisson")}
    degrade = from_flags("--degradation_preset", "heavy", "--degradation_probability", "noise:0")
    words = [{step["type"] for step in params} for _, params in samples(degrade, constant(9, 8), 40)]
    assert not any("noise" in word for word in words)
    assert 0.5 < np.mean(["jpeg" in word for word in words]) < 0.9  # keeps the preset's own
    shuffled = from_flags("--degradation_preset", "heavy", "--degradation_order", "shuffled")
    first = {params[0]["type"] for _, params in samples(shuffled, constant(9, 8), 40)}
    assert first == {"blur", "downsample", "noise", "jpeg"}
    calm = from_flags("--degradation_preset", "old_photo", "--damage_strength", "0")
    for _, params in samples(calm, constant(9, 8), 5):
        assert not any(step.get("count") or step.get("coverage") for step in params)


def test_a_probability_leaves_what_the_other_steps_of_a_preset_draw_alone(photo):
    plain, without = make_degrader(preset="old_photo"), make_degrader(preset="old_photo", probabilities="fade:0")
    for seed in range(10):
        params = plain(photo[:8, :8], rng(seed))[1]
        assert without(photo[:8, :8], rng(seed))[1] == [step for step in params if step["type"] != "fade"]


def test_options_left_out_are_written_into_the_arguments_unless_a_preset_has_them():
    args = parse("--noise_level", "0.2")
    degrader_from_args(args)
    assert (args.degradation_types, args.lr_scale, args.noise_level) == ("downsample", "8", "0.2")
    assert None not in [value for name, value in vars(args).items() if name != "degradation_preset"]
    args = parse("--degradation_preset", "light", "--noise_level", "0.2")
    degrader_from_args(args)
    given = {name for name, value in vars(args).items() if value is not None}
    assert given == {"degradation_preset", "degradation_order", "noise_level"}


@pytest.mark.parametrize(
    "flags",
    [["--degradation_types", "noise,jpeg", "--noise_level", "0.1-0.2"], ["--degradation_preset", "old_photo"],
     ["--degradation_preset", "heavy", "--noise_level", "0.1", "--gray_noise_probability", "0"], []],
)  # fmt: skip
def test_the_default_job_scores_with_the_degradations_it_trained_on(flags, tmp_path):
    args = parse(*flags)
    degrade = degrader_from_args(args)
    (tmp_path / "args.json").write_text(json.dumps(vars(args) | {"heldout_lr_root": None}))
    code = re.search(r"<<'END'\n(.*?)\nEND\n", (ROOT / "run_scripts.sh").read_text(), re.DOTALL)[1]
    command = [sys.executable, "-", tmp_path / "args.json"]
    options = subprocess.run(command, input=code, capture_output=True, text=True, check=True).stdout.splitlines()
    assert from_flags(*options).keywords == degrade.keywords


# Training samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, image in (("a", data.astronaut()), ("b", data.coffee())):
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


def is_clean(item):
    return bool((item["target"] == item["control"]).all())


def test_a_dataset_takes_a_preset(folder):
    dataset = DegDataset(str(folder), make_degrader(preset="old_photo"), resolution=64)
    items = [dataset[(i % 2, i)] for i in range(4)]
    assert all(item["control"].shape == (3, 64, 64) and item["degradation"] for item in items)
    assert (dataset[(1, 3)]["control"] == items[3]["control"]).all()


def test_identity_pairs_have_their_share_and_leave_the_other_samples_alone(folder):
    plain, mixed = (DegDataset(str(folder), make_degrader("noise"), resolution=16) for _ in range(2))
    mixed.identity_probability = 0.3
    clean = 0
    for epoch in range(40):
        for index in range(2):
            item, other = mixed[(index, epoch)], plain[(index, epoch)]
            assert not is_clean(other)
            if is_clean(item):
                clean += 1
                assert item["degradation"] == []
            else:
                assert (item["control"] == other["control"]).all() and item["degradation"] == other["degradation"]
            assert (item["target"] == other["target"]).all()
    assert 14 < clean < 34


def test_identity_pairs_are_made_of_stored_pairs_too(folder):
    dataset = DegDataset([Record("pair", folder / "a.png", folder / "a.png")], resolution=16)
    dataset.records[0] = dataset.records[0]._replace(control=folder / "b.png")
    dataset._load = lambda record: (data.astronaut(), 255 - data.astronaut())
    assert not is_clean(dataset[0])
    dataset.identity_probability = 1
    assert is_clean(dataset[0])


@pytest.mark.parametrize("bucket", [[], ["--aspect_ratio_buckets", "32:32"]])
def test_training_leaves_one_sample_in_twenty_clean_with_a_preset_only(folder, bucket):
    def share(*flags):
        args = parse("--hr_root", folder, "--resolution", 32, *bucket, *flags, data_options=True)
        return dataset_from_args(args, degrader_from_args(args)).identity_probability

    assert share() == share("--degradation_types", "noise") == 0
    assert share("--degradation_preset", "light") == 0.05
    assert share("--degradation_preset", "light", "--identity_probability", "0") == 0
    assert share("--identity_probability", "0.2") == 0.2
    with pytest.raises(ValueError, match="^--identity_probability"):
        share("--identity_probability", "5")


@pytest.mark.parametrize("flags", [
    ["--degradation_preset", "nonsense"], ["--degradation_preset", "old_photo"], ["--noise_level", "banana"],
    ["--degradation_types", "noise"], ["--degradation_order", "shuffled"], ["--degradation_probability", "0.5"],
    ["--damage_strength", "2"]])
def test_degradation_options_beside_stored_pairs_are_refused(folder, flags):
    args = parse("--hr_root", folder, "--lr_root", folder, *flags, data_options=True)
    with pytest.raises(ValueError, match=f"^{flags[0]} {flags[1]}: stored pairs .* are not degraded"):
        dataset_from_args(args, None)


def test_stored_pairs_are_whole_unless_an_identity_probability_is_given_and_may_come_with_filled_in_defaults(folder):
    plain = parse("--hr_root", folder, "--lr_root", folder, data_options=True)
    degrader_from_args(plain)  # as for a --dataset_name, of which only its columns tell whether it has pairs
    assert dataset_from_args(plain, None).identity_probability == 0
    plain.identity_probability = "0.2"
    assert dataset_from_args(plain, None).identity_probability == 0.2

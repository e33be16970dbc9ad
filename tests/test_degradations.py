import argparse
import json
import pickle
from io import BytesIO
from statistics import NormalDist

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFilter
from skimage import data

from my_dataset.degradations import (
    BLUR_KINDS,
    CODECS,
    DOWN_KERNELS,
    NOISE_KINDS,
    TYPES,
    UP_KERNELS,
    add_degradation_args,
    apply_degradations,
    blur,
    defocus_kernel,
    degrader_from_args,
    downsample,
    gaussian_blur,
    gaussian_kernel,
    jpeg,
    make_degrader,
    motion_kernel,
    noise,
    parse_range,
    pixel_grid,
    poisson_noise,
    standard_normal,
)

EVERYTHING = {
    "types": ",".join(TYPES),
    "lr_scale": "1-8",
    "noise_level": "0-1",
    "blur_radius": "0-20",
    "jpeg_quality": "1-100",
    "order": "shuffled",
    "probabilities": 0.8,
    "down_kernels": DOWN_KERNELS,
    "up_kernels": UP_KERNELS,
    "noise_kinds": NOISE_KINDS,
    "gray_noise_probability": 0.5,
    "blur_kinds": BLUR_KINDS,
    "codecs": CODECS,
}


@pytest.fixture(scope="module")
def photo():
    """(256, 256, 3) uint8 photograph."""
    return np.ascontiguousarray(data.astronaut()[:256, 100:356])


def constant(value, height=40, width=40, dtype=np.uint8):
    return np.full((height, width, 3), value, dtype)


def rng(seed=0):
    return np.random.default_rng(seed)


def level_difference(a, b):
    return np.abs(a.astype(np.float64) - b)


def psnr(a, b):
    return 10 * np.log10(255**2 / (level_difference(a, b) ** 2).mean())


# Kernels

KERNELS = [
    *(gaussian_kernel(sigma) for sigma in (0, 0.3, 1, 4.7)),
    *(gaussian_kernel(3, 0.5, angle) for angle in (0, 33, 90, 150)),
    *(motion_kernel(length, angle) for length in (1, 2.5, 9, 30) for angle in (0, 20, 45, 90, 171)),
    *(defocus_kernel(radius) for radius in (0, 0.4, 1, 3.3, 8)),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=range(len(KERNELS)))
def test_kernel_is_odd_square_nonnegative_normalised_and_centred(kernel):
    assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
    assert kernel.min() >= 0
    assert kernel.sum() == pytest.approx(1, abs=1e-12)
    x, y = pixel_grid(kernel.shape[0] // 2)
    assert (kernel * x).sum() == pytest.approx(0, abs=1e-12)
    assert (kernel * y).sum() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("make", [lambda: gaussian_kernel(0), lambda: motion_kernel(1, 90), lambda: defocus_kernel(0)])
def test_kernel_of_no_extent_is_a_point(make):
    kernel = make()
    assert kernel[kernel.shape[0] // 2, kernel.shape[0] // 2] == kernel.sum() == 1


def test_gaussian_kernel_has_its_variances_along_and_across_its_angle():
    kernel = gaussian_kernel(4, 1.5, angle=90)  # the long axis is vertical
    x, y = pixel_grid(kernel.shape[0] // 2)
    assert (kernel * x**2).sum() == pytest.approx(1.5**2, rel=0.01)
    assert (kernel * y**2).sum() == pytest.approx(4**2, rel=0.01)
    tilted = gaussian_kernel(4, 1.5, angle=30)
    assert (tilted * x * y).sum() < -1  # anticlockwise on the screen: up on the right, where y is negative


def test_motion_kernel_has_the_variance_of_a_line_of_its_length_and_follows_its_angle():
    length = 21
    for angle in (0, 30, 45, 90, 135):
        kernel = motion_kernel(length, angle)
        x, y = pixel_grid(kernel.shape[0] // 2)
        along = np.cos(np.deg2rad(angle)) * x - np.sin(np.deg2rad(angle)) * y
        across = np.sin(np.deg2rad(angle)) * x + np.cos(np.deg2rad(angle)) * y
        assert (kernel * along**2).sum() == pytest.approx(length**2 / 12, rel=0.03)
        assert (kernel * across**2).sum() < 0.5
    np.testing.assert_allclose(motion_kernel(3, 0)[2], [0, 1 / 3, 1 / 3, 1 / 3, 0], atol=1e-12)


def test_defocus_kernel_is_a_flat_disc_of_its_area():
    kernel = defocus_kernel(7.5)
    assert 1 / kernel.max() == pytest.approx(np.pi * 7.5**2, rel=0.01)
    x, y = pixel_grid(kernel.shape[0] // 2)
    inside = np.hypot(x, y) <= 7
    assert np.ptp(kernel[inside]) == 0 and kernel[np.hypot(x, y) >= 8].max() == 0


# Blur


@pytest.mark.parametrize("kind", BLUR_KINDS)
@pytest.mark.parametrize("value", [0, 77, 255])
def test_blur_leaves_a_constant_image_alone(kind, value):
    image = constant(value)
    assert (blur(image, 5.5, kind, angle=30, aspect=0.4) == image).all()


@pytest.mark.parametrize(
    "kind, kernel",
    [
        ("gaussian", gaussian_kernel(2)),
        ("anisotropic", gaussian_kernel(2, 0.8, 30)),
        ("motion", motion_kernel(5, 30)),
        ("defocus", defocus_kernel(2)),
    ],
)
def test_blur_of_a_point_is_its_kernel(kind, kernel):
    point = np.zeros((41, 41, 3), np.float32)
    point[20, 20] = 255
    blurred = blur(point, 2, kind, angle=30, aspect=0.4)
    near = slice(20 - kernel.shape[0] // 2, 21 + kernel.shape[0] // 2)
    for channel in range(3):
        np.testing.assert_allclose(blurred[near, near, channel] / 255, kernel, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.3, 1, 5])
def test_gaussian_blur_of_uint8_is_the_exact_one_rounded(photo, sigma):
    exact = gaussian_blur(photo.astype(np.float32), sigma)
    assert level_difference(gaussian_blur(photo, sigma), exact).max() < 0.51


@pytest.mark.parametrize("kind", BLUR_KINDS)
def test_blur_grows_with_its_radius_and_none_is_the_identity(photo, kind):
    assert (blur(photo, 0, kind) == photo).all()
    qualities = [psnr(photo, blur(photo, radius, kind, angle=20, aspect=0.5)) for radius in (1, 2, 4, 8)]
    assert qualities == sorted(qualities, reverse=True)


# Downsampling


@pytest.mark.parametrize("down_kernel", DOWN_KERNELS)
@pytest.mark.parametrize("up_kernel", UP_KERNELS)
def test_downsample_returns_the_exact_size_and_leaves_a_constant_image_alone(down_kernel, up_kernel):
    for dtype in (np.uint8, np.float32):
        for scale in (1, 2.7, 8, 64):
            image = constant(77, 101, 67, dtype)
            result = downsample(image, scale, down_kernel, up_kernel)
            assert result.dtype == dtype
            np.testing.assert_allclose(result, image, atol=1e-3)


@pytest.mark.parametrize("down_kernel", [kernel for kernel in DOWN_KERNELS if kernel != "nearest"])
def test_downsample_turns_a_checkerboard_into_its_mean(down_kernel):
    board = (255 * (np.indices((128, 128)).sum(0) % 2)).astype(np.uint8)[..., None].repeat(3, 2)
    for scale in (4, 5.3, 8):
        inner = downsample(board, scale, down_kernel, "bilinear")[32:-32, 32:-32]
        assert level_difference(inner, 127.5).max() < 7
    assert np.ptp(downsample(board, 5.3, "nearest", "nearest")) == 255  # picks pixels: documented as not antialiased


@pytest.mark.parametrize("down_kernel", DOWN_KERNELS)
def test_downsample_does_not_move_the_image(down_kernel):
    x = np.linspace(20, 230, 120)
    ramp = np.broadcast_to(x[None, :, None], (120, 120, 3)).astype(np.float32)
    for scale in (3, 5):
        # of an even block there is no middle pixel for "nearest"; these are odd
        shift = (downsample(ramp, scale, down_kernel, "bilinear") - ramp)[:, 20:-20].mean() / (x[1] - x[0])
        assert abs(shift) < 0.02


def test_area_downsampling_by_a_fraction_weights_pixels_by_their_coverage():
    row = np.array([0, 90, 240, 30, 60], np.float32)
    image = np.broadcast_to(row[None, :, None], (5, 5, 3)).copy()
    left, right = (0 + 90 + 240 / 2) / 2.5, (240 / 2 + 30 + 60) / 2.5
    np.testing.assert_allclose(
        downsample(image, 2.5, "area", "nearest")[0, :, 0], [left, left, right, right, right], rtol=1e-5
    )


# Noise


def test_standard_normal_is_normal_independent_and_reproducible():
    sample = standard_normal((1000, 1000), rng(3)).astype(np.float64)
    flat = sample.ravel()
    n = flat.size
    assert abs(flat.mean()) < 5 / n**0.5 and abs(flat.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((flat**3).mean()) < 5 * (15 / n) ** 0.5 and abs((flat**4).mean() - 3) < 5 * (96 / n) ** 0.5
    quantiles = np.array([NormalDist().inv_cdf(p) for p in np.linspace(0.001, 0.999, 999)])
    empirical = np.searchsorted(np.sort(flat), quantiles) / n
    assert np.abs(empirical - np.linspace(0.001, 0.999, 999)).max() < 2 / n**0.5  # Kolmogorov: p of this is below 0.001
    first, second = flat[: n // 2], flat[-(n // 2) :]
    pairs = [(flat[1:], flat[:-1]), (first, second), (first**2, second**2)]
    for a, b in pairs:  # neighbours, and the two outputs of one Box-Muller pair
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / len(a) ** 0.5
    assert (sample == standard_normal((1000, 1000), rng(3))).all()
    assert (sample != standard_normal((1000, 1000), rng(4))).mean() > 0.99


@pytest.mark.parametrize("kind", NOISE_KINDS)
@pytest.mark.parametrize("level", [0.01, 0.05, 0.2])
def test_noise_has_its_level_at_white_and_no_bias(kind, level):
    white = constant(255, 200, 200, np.float32)
    # float images are clipped at 255 too: measure the lower half of a symmetric law
    below = np.minimum(noise(white, level, rng(), kind) - 255, 0)
    assert np.sqrt(2 * (below.astype(np.float64) ** 2).mean()) == pytest.approx(255 * level, rel=0.03)
    grey = constant(128, 200, 200)
    error = noise(grey, min(level, 0.1), rng(), kind).astype(np.float64) - 128
    std = 255 * min(level, 0.1) * (1 if kind == "gaussian" else (128 / 255) ** 0.5)
    assert error.std() == pytest.approx((std**2 + 1 / 12) ** 0.5, rel=0.02)  # 1/12: rounding to 8 bits
    assert abs(error.mean()) < 5 * std / error.size**0.5 + 0.01
    channels = error.reshape(-1, 3)
    assert np.abs(np.corrcoef(channels.T) - np.eye(3)).max() < 0.03


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_gray_noise_is_equal_in_all_channels_and_colour_noise_is_not(kind):
    image = np.empty((64, 64, 3), np.uint8)
    image[:] = (120, 100, 140)
    difference = noise(image, 0.05, rng(), kind, gray=True).astype(int) - image
    assert (np.ptp(difference, axis=2) <= 1).all() and difference.std() > 5  # 1: rounding
    assert np.ptp(noise(image, 0.05, rng(), kind).astype(int) - image, axis=2).max() > 10


def test_poisson_variance_grows_linearly_with_intensity_across_the_change_of_formula():
    level = 0.1  # 100 photons at white: below 51 of 255 the exact law is drawn
    for intensity in (2, 10, 40, 60, 128, 255):
        field = poisson_noise(np.full((300, 300), intensity, np.uint8), level, rng()).astype(np.float64)
        assert field.var() == pytest.approx(255 * level**2 * intensity, rel=0.03)
        assert abs(field.mean()) < 5 * field.std() / field.size**0.5
    assert (poisson_noise(np.zeros((9, 9), np.uint8), level, rng()) == 0).all()


def test_poisson_noise_of_few_photons_is_whole_photons():
    field = poisson_noise(np.full((50, 50), 51, np.uint8), 0.5, rng())  # 4 photons at white, 0.8 here
    photons = (field + 51) / (255 * 0.5**2)
    np.testing.assert_allclose(photons, photons.round(), atol=1e-5)
    assert photons.min() > -1e-5 and photons.max() > 2


# JPEG


@pytest.mark.parametrize("quality", [5, 40, 90])
@pytest.mark.parametrize("codec", CODECS)
def test_jpeg_equals_pillows_decoding_of_pillows_encoding(photo, quality, codec):
    stream = BytesIO()
    Image.fromarray(photo).save(stream, codec, quality=quality)
    reference = np.asarray(Image.open(stream).convert("RGB"))
    # Pillow and OpenCV each carry a libjpeg and a libwebp; today's agree bit by bit
    assert level_difference(jpeg(photo, quality, codec), reference).mean() < 0.1


@pytest.mark.parametrize("codec", CODECS)
def test_jpeg_gets_worse_with_lower_quality(photo, codec):
    qualities = [psnr(photo, jpeg(photo, quality, codec)) for quality in (1, 20, 50, 80, 100)]
    assert qualities == sorted(qualities) and qualities[0] < 30 < 35 < qualities[-1]


def test_jpeg_keeps_red_red():
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 200
    for codec in CODECS:
        assert level_difference(jpeg(red, 90, codec).mean((0, 1)), [200, 0, 0]).max() < 6


def test_webp_refuses_a_side_it_cannot_hold():
    with pytest.raises(ValueError, match="webp holds at most 16383"):
        jpeg(np.zeros((1, 16384, 3), np.uint8), 75, "webp")


# The original project's chain


def test_default_downsampling_is_pillows_bicubic_both_ways(photo):
    bicubic = Image.Resampling.BICUBIC
    reference = Image.fromarray(photo).resize((256 // 8, 256 // 8), bicubic).resize((256, 256), bicubic)
    degraded, params = make_degrader()(photo, rng())
    assert params == [{"type": "downsample", "scale": 8.0, "down_kernel": "bicubic", "up_kernel": "bicubic"}]
    assert (degraded == np.asarray(reference)).all()


def test_default_blur_is_pillows_gaussian_blur_up_to_its_box_approximation(photo):
    reference = np.asarray(Image.fromarray(photo).filter(ImageFilter.GaussianBlur(1.0)))
    degraded, params = make_degrader("blur")(photo, rng())
    assert params == [{"type": "blur", "kind": "gaussian", "radius": 1.0}]
    # Pillow iterates box blurs and truncates: 0.3 levels darker in the mean, up to 3 levels off at edges
    assert level_difference(degraded, reference).max() <= 4 and level_difference(degraded, reference).mean() < 0.6


def test_default_chain_has_the_error_statistics_of_the_original(photo):
    def original(pixels, seed):
        image = Image.fromarray(pixels)
        image = image.resize((32, 32), Image.Resampling.BICUBIC).resize((256, 256), Image.Resampling.BICUBIC)
        noisy = np.array(image).astype(np.float32) + np.random.RandomState(seed).normal(0, 0.05 * 255, pixels.shape)
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        return np.asarray(image.filter(ImageFilter.GaussianBlur(1.0)))

    degraded, params = make_degrader("downsample,noise,blur")(photo, rng())
    assert [step["type"] for step in params] == ["downsample", "noise", "blur"]
    assert psnr(photo, degraded) == pytest.approx(psnr(photo, original(photo, 0)), abs=0.1)
    ours, theirs = degraded - gaussian_blur(downsample(photo, 8), 1.0).astype(float), original(photo, 0)
    theirs = theirs - gaussian_blur(downsample(photo, 8), 1.0).astype(float)
    assert ours.std() == pytest.approx(theirs.std(), rel=0.05)


# Drawing


@pytest.mark.parametrize(
    "text, expected",
    [
        ("8", (8, 8)),
        ("0.02-0.1", (0.02, 0.1)),
        ("1e-2", (0.01, 0.01)),
        ("1e-2-5E-1", (0.01, 0.5)),
        ("1e-2-1e+0", (0.01, 1)),
        (" 1 - 2.5 ", (1, 2.5)),
        (".5-1.", (0.5, 1)),
        ("-3--1", (-3, -1)),
        ("2-2", (2, 2)),
        (3, (3, 3)),
        (0.25, (0.25, 0.25)),
    ],
)
def test_parse_range_reads(text, expected):
    assert parse_range(text) == expected


@pytest.mark.parametrize("text", ["", "-", "a", "1-", "-1-", "1-2-3", "1,2", "1e", "nan", "inf", "2-1", "0x1", "1 2"])
def test_parse_range_refuses(text):
    with pytest.raises(ValueError, match="^--flag .*") as error:
        parse_range(text, "--flag")
    assert "\n" not in str(error.value)


def test_parse_range_names_its_bounds():
    with pytest.raises(ValueError, match="--noise_level '0.5-2': must lie between 0 and 1"):
        parse_range("0.5-2", "--noise_level", 0, 1)
    with pytest.raises(ValueError, match="between"):
        parse_range("1e400", "--noise_level", 0, 1)


def test_strengths_cover_their_ranges_and_stay_inside():
    degrade = make_degrader("downsample,noise,blur,jpeg", "2-4", "0.02-0.1", "0.5-3", "30-33")
    samples = [degrade(constant(90, 4, 4), rng(i))[1] for i in range(300)]
    for position, name, lo, hi in ((0, "scale", 2, 4), (1, "level", 0.02, 0.1), (2, "radius", 0.5, 3)):
        values = np.array([params[position][name] for params in samples])
        assert lo <= values.min() < lo + 0.05 * (hi - lo) and hi - 0.05 * (hi - lo) < values.max() <= hi
        assert values.mean() == pytest.approx((lo + hi) / 2, abs=0.1 * (hi - lo))
    assert {params[3]["quality"] for params in samples} == {30, 31, 32, 33}


def test_a_sample_depends_on_its_generator_only(photo):
    degrade = make_degrader(**EVERYTHING)
    first = [degrade(photo, rng(i)) for i in range(8)]
    np.random.seed(5)
    cv2.setRNGSeed(5)
    again = [degrade(photo, rng(i)) for i in reversed(range(8))][::-1]
    for (image, params), (image_again, params_again) in zip(first, again, strict=True):
        assert params == params_again and (image == image_again).all()
    assert len({json.dumps(params) for _, params in first}) == 8
    noisy = [make_degrader("noise")(photo, rng(i))[0] for i in range(2)]
    assert (noisy[0] != noisy[1]).mean() > 0.9


def test_the_parameters_repeat_the_sample_after_a_trip_through_json(photo):
    degrade = make_degrader(**EVERYTHING)
    for i in range(30):
        image, params = degrade(photo[:70, :50], rng(i))
        assert (apply_degradations(photo[:70, :50], json.loads(json.dumps(params))) == image).all()


def test_a_degrader_can_be_pickled_for_worker_processes(photo):
    degrade = make_degrader("noise,jpeg", noise_level="0.1-0.2")
    assert (pickle.loads(pickle.dumps(degrade))(photo, rng())[0] == degrade(photo, rng())[0]).all()


def test_probabilities_are_honoured():
    def counts(probabilities):
        degrade = make_degrader("downsample,noise,jpeg", probabilities=probabilities)
        types = [step["type"] for i in range(400) for step in degrade(constant(9, 2, 2), rng(i))[1]]
        return [types.count(word) for word in ("downsample", "noise", "jpeg")]

    assert counts("0") == [0, 0, 0]
    assert counts(1) == [400, 400, 400]
    assert all(160 < count < 240 for count in counts("0.5"))
    downsampled, noisy, compressed = counts("noise:0.8,jpeg:0.25")
    assert downsampled == 400 and 280 < noisy < 360 and 65 < compressed < 135


def test_a_probability_leaves_the_other_types_parameters_alone():
    always = make_degrader("noise,blur", noise_level="0-1", blur_radius="0-5")
    rarely = make_degrader("noise,blur", noise_level="0-1", blur_radius="0-5", probabilities="noise:0")
    for i in range(10):
        assert rarely(constant(9), rng(i))[1] == always(constant(9), rng(i))[1][1:]


def test_fixed_order_is_as_listed_and_shuffled_order_takes_every_permutation():
    def orders(order):
        degrade = make_degrader("jpeg,blur,noise", order=order)
        return {tuple(step["type"] for step in degrade(constant(9, 2, 2), rng(i))[1]) for i in range(100)}

    assert orders("fixed") == {("jpeg", "blur", "noise")}
    assert len(orders("shuffled")) == 6


def test_order_matters_to_the_image(photo):
    noise_last = make_degrader("blur,noise", blur_radius=3)(photo, rng())[0]
    noise_first = make_degrader("noise,blur", blur_radius=3)(photo, rng())[0]

    def roughness(image):
        return np.diff(image.astype(float), axis=1).std()

    assert roughness(noise_last) > 2 * roughness(noise_first)


def test_a_type_listed_twice_is_applied_twice():
    params = make_degrader("jpeg,noise,jpeg", jpeg_quality="10-90")(constant(9), rng())[1]
    assert [step["type"] for step in params] == ["jpeg", "noise", "jpeg"]
    assert params[0]["quality"] != params[2]["quality"]


@pytest.mark.parametrize("height, width", [(1, 1), (1, 16), (16, 1), (16, 16), (101, 67)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_any_size_and_strength_keeps_shape_dtype_and_range(height, width, dtype):
    image = rng().integers(0, 256, (height, width, 3)).astype(dtype)
    degrade = make_degrader(**{**EVERYTHING, "lr_scale": "1-64", "blur_radius": "0-30"})
    for i in range(25):
        before = image.copy()
        degraded, _ = degrade(image, rng(i))
        assert degraded.shape == image.shape and degraded.dtype == dtype and degraded.flags.writeable
        assert np.isfinite(degraded).all() and degraded.min() >= 0 and degraded.max() <= 255
        assert (image == before).all() and not np.shares_memory(degraded, image)


def test_an_image_that_stays_clean_is_a_copy(photo):
    degraded, params = make_degrader(probabilities=0)(photo, rng())
    assert params == [] and (degraded == photo).all() and not np.shares_memory(degraded, photo)


@pytest.mark.parametrize("level", [1e-30, 1e-4, 1.0])
def test_extreme_noise_levels_stay_finite(level):
    for kind in NOISE_KINDS:
        image = np.zeros((8, 8, 3), np.float32)
        image[:4] = 255
        assert np.isfinite(noise(image, level, rng(), kind)).all()


def test_a_flipped_view_is_accepted(photo):
    degrade = make_degrader("downsample,noise,blur,jpeg")
    flipped = photo[:, ::-1]
    assert (degrade(flipped, rng())[0] == degrade(np.ascontiguousarray(flipped), rng())[0]).all()


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))])
def test_other_arrays_are_refused(image):
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8 or float32"):
        make_degrader()(image, rng())


# Flags


def from_flags(*flags):
    parser = argparse.ArgumentParser()
    add_degradation_args(parser)
    return degrader_from_args(parser.parse_args(flags))


def test_defaults_of_the_flags_are_those_of_make_degrader():
    assert from_flags().keywords == make_degrader().keywords
    everything = ("--degradation_types", "downsample,noise,blur,jpeg")
    assert from_flags(*everything).keywords == make_degrader("downsample,noise,blur,jpeg").keywords


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--degradation_types", "noise"),
        ("--lr_scale", "3"),
        ("--lr_scale", "9-12"),
        ("--noise_level", "0.1"),
        ("--noise_level", "1e-2-2e-2"),
        ("--blur_radius", "2.5"),
        ("--jpeg_quality", "20-30"),
        ("--degradation_probability", "noise:0"),
        ("--degradation_probability", "0"),
        ("--degradation_order", "shuffled"),
        *(("--downsample_kernel", kernel) for kernel in DOWN_KERNELS if kernel != "bicubic"),
        *(("--upsample_kernel", kernel) for kernel in UP_KERNELS if kernel != "bicubic"),
        ("--noise_kind", "poisson"),
        ("--gray_noise_probability", "1"),
        *(("--blur_kind", kind) for kind in BLUR_KINDS if kind != "gaussian"),
        ("--jpeg_codec", "webp"),
    ],
)
def test_every_flag_changes_the_image(photo, flag, value):
    types = ["--degradation_types", "downsample,noise,blur,jpeg"]
    default, changed = from_flags(*types), from_flags(*types, flag, value)
    assert (default(photo, rng(1))[0] != changed(photo, rng(1))[0]).any()


@pytest.mark.parametrize(
    "flag, name, position, words",
    [
        ("--downsample_kernel", "down_kernel", 0, DOWN_KERNELS),
        ("--upsample_kernel", "up_kernel", 0, UP_KERNELS),
        ("--noise_kind", "kind", 1, NOISE_KINDS),
        ("--blur_kind", "kind", 2, BLUR_KINDS),
        ("--jpeg_codec", "codec", 3, CODECS),
    ],
)
def test_a_comma_list_is_drawn_from_evenly(flag, name, position, words):
    degrade = from_flags("--degradation_types", "downsample,noise,blur,jpeg", flag, ",".join(words))
    drawn = [degrade(constant(9, 2, 2), rng(i))[1][position][name] for i in range(300)]
    for word in words:
        assert 0.7 / len(words) < drawn.count(word) / 300 < 1.3 / len(words)


def test_gray_noise_probability_is_a_share():
    degrade = from_flags("--degradation_types", "noise", "--gray_noise_probability", "0.3")
    assert 60 < sum(degrade(constant(9, 2, 2), rng(i))[1][0]["gray"] for i in range(300)) < 120


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--degradation_types", "downsample,fog"),
        ("--degradation_types", ""),
        ("--lr_scale", "0.5"),
        ("--lr_scale", "x4"),
        ("--noise_level", "12"),
        ("--noise_level", "0.1-0.05"),
        ("--blur_radius", "-1"),
        ("--blur_radius", "1000"),
        ("--jpeg_quality", "0"),
        ("--jpeg_quality", "30-101"),
        ("--jpeg_quality", "75.5"),
        ("--degradation_probability", "1.5"),
        ("--degradation_probability", "0.2-0.5"),
        ("--degradation_probability", "noise:0.5"),
        ("--degradation_probability", "downsample:x"),
        ("--degradation_probability", "downsample:0.5,noise"),
        ("--degradation_order", "random"),
        ("--downsample_kernel", "cubic"),
        ("--upsample_kernel", "area"),
        ("--noise_kind", "speckle"),
        ("--gray_noise_probability", "0.1-0.2"),
        ("--gray_noise_probability", "2"),
        ("--blur_kind", ",,"),
        ("--jpeg_codec", "avif"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(flag, value):
    with pytest.raises(ValueError, match=f"^{flag}") as error:
        from_flags(f"{flag}={value}")
    assert "\n" not in str(error.value)

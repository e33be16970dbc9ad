"""Data of the deblurring ControlNet: its blurs, the maker of pairs, and the dataset that trains on them."""

import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from bench import blurs as bench
from my_dataset.dataset_deg_bucket import make_loader
from my_dataset.dataset_deg_paired import to_tensor
from my_dataset.degradations import (
    blur,
    convolve,
    defocus_kernel,
    gaussian_kernel,
    lens_blur,
    linear_to_srgb,
    motion_kernel,
    pixel_grid,
    sparse_blur,
    srgb_to_linear,
    tap_blocks,
)
from my_dataset.images import load_rgb
from recipes.deblur_controlnet import create_deblur_dataset as maker
from recipes.deblur_controlnet import deblur_dataset as deblur
from tests.conftest import PROJECT_ROOT, photograph
from utils.parse import run_main

ALL = deblur.parse_type_weights("1")
EXAMPLES = {
    "motion_blur": {"length": 15, "angle": 30.0},
    "gaussian_blur": {"sigma": 3.0},
    "defocus_blur": {"radius": 5.0},
    "lens_blur": {"strength": 0.8},
}
NOTHING = {
    "motion_blur": {"length": 1, "angle": 90.0},
    "gaussian_blur": {"sigma": 0.0},
    "defocus_blur": {"radius": 0.0},
    "lens_blur": {"strength": 0.0},
}
KERNELS = [motion_kernel(length, angle) for length in (5, 12, 20) for angle in (0, 30, 45, 90, 200, 359)]
KERNELS += [defocus_kernel(radius) for radius in (1, 3.3, 8)]


@pytest.fixture(scope="module")
def photo():
    """(512, 512, 3) uint8 photograph."""
    return np.ascontiguousarray(photograph())


@pytest.fixture
def folder(tmp_path):
    """in/ with 6 different photographs of 48 x 64 px, one of them in a subfolder."""
    image = photograph(size=(256, 256))
    for i in range(6):
        path = tmp_path / "in" / ("sub" if i == 5 else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[24 * i : 24 * i + 48, 160 - 20 * i : 224 - 20 * i]).save(path)
    return tmp_path / "in"


def make(source, output, *flags, samples=8):
    argv = ["--source_dir", source, "--output_dir", output, "--num_samples", samples, "--image_size", 32, *flags]
    maker.main(maker.parse_args(list(map(str, argv))))
    return output


def rows(output, file="blur_types.json"):
    return [json.loads(line) for line in (output / file).read_text().splitlines()]


def contents(output):
    """{relative path: bytes} of all files, hidden ones too."""
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()}


# Blurs


@pytest.mark.parametrize("kernel", KERNELS, ids=range(len(KERNELS)))
def test_kernel_sums_to_one_is_symmetric_and_has_its_centre_of_mass_at_the_centre(kernel):
    assert kernel.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-12)
    for axis in pixel_grid(len(kernel) // 2):
        assert (kernel * axis).sum() == pytest.approx(0, abs=1e-12)


def test_motion_kernel_is_a_whole_line_and_not_half_of_one():
    x, _ = pixel_grid(len(motion_kernel(15, 0)) // 2)
    assert (motion_kernel(15, 0)[x > 0].sum(), motion_kernel(15, 0)[x < 0].sum()) == pytest.approx((7 / 15, 7 / 15))


@pytest.mark.parametrize("radius", [2, 5, 8])
def test_defocus_kernel_is_a_flat_disc_of_its_area_and_no_gaussian(radius):
    kernel = defocus_kernel(radius)
    assert 1 / kernel.max() == pytest.approx(np.pi * radius**2, rel=0.05)
    distance = np.hypot(*pixel_grid(len(kernel) // 2))
    assert np.ptp(kernel[distance <= radius - 0.5]) == 0 and kernel[distance >= radius + 0.5].max() == 0


@pytest.mark.parametrize("blur_type", deblur.BLUR_TYPES)
@pytest.mark.parametrize("name", ["astronaut", "coffee"])
def test_every_blur_over_its_range_keeps_the_mean_brightness_of_a_photograph_within_half_a_percent(name, blur_type):
    image = photograph(name, (256, 256))
    for seed in range(12):
        blurred, [step] = deblur.random_blur(image, np.random.default_rng(seed), {blur_type: 1.0})
        assert step["type"] == blur_type
        assert abs(blurred.mean() / image.mean() - 1) < 0.005, step


def test_blur_in_linear_light_keeps_the_mean_intensity_and_makes_contrasts_brighter(photo):
    for blur_type, params in EXAMPLES.items():
        blurred = deblur.apply_blur(photo, blur_type, params | {"linear_light": True})
        assert srgb_to_linear(blurred).mean() == pytest.approx(srgb_to_linear(photo).mean(), rel=0.005)
        assert blurred.mean() > deblur.apply_blur(photo, blur_type, params | {"linear_light": False}).mean() + 0.2


def test_half_of_the_light_is_srgb_188_and_the_curve_inverts():
    board = np.repeat((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    inner = deblur.apply_blur(board, "gaussian_blur", {"sigma": 4.0, "linear_light": True})[20:40, 20:40]
    assert (inner == 188).all()
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert (linear_to_srgb(srgb_to_linear(levels), np.uint8) == levels).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("kernel", KERNELS, ids=range(len(KERNELS)))
def test_sparse_blur_is_scipys_convolution(photo, kernel, dtype):
    image = photo[:97, :131].astype(dtype)  # 97 rows: no whole number of strips
    wanted = np.dstack([ndimage.convolve(image[..., c].astype(float), kernel, mode="reflect") for c in range(3)])
    assert abs(sparse_blur(image, kernel) - wanted).max() < (0.501 if dtype == np.uint8 else 1e-3)


def test_sparse_blur_in_strips_is_that_of_the_whole(photo):
    kernel = motion_kernel(20, 60)
    wide = np.tile(photo, (1, 3, 1))  # 21 rows a strip
    assert abs(sparse_blur(wide, kernel) - convolve(wide.astype(np.float32), kernel)).max() < 0.51
    assert abs(sparse_blur(photo, kernel).astype(int) - blur(photo, 9.5, "motion", 60)).max() <= 1


@pytest.mark.parametrize("blur_type", deblur.BLUR_TYPES)
def test_memory_layout_changes_no_blur(photo, blur_type):
    turned = photo[:200].transpose(1, 0, 2)[::-1]
    blurred = deblur.apply_blur(turned, blur_type, EXAMPLES[blur_type])
    assert (blurred == deblur.apply_blur(np.ascontiguousarray(turned), blur_type, EXAMPLES[blur_type])).all()


@pytest.mark.parametrize("kernel", [*KERNELS, gaussian_kernel(5), np.eye(9)[[0, 3, 1, 8, 2, 4, 7, 5, 6]], np.eye(31)])
def test_tap_blocks_hold_every_tap_once(kernel):
    rebuilt = np.zeros_like(kernel)
    for top, left, block in tap_blocks(kernel):
        rebuilt[top : top + block.shape[0], left : left + block.shape[1]] += block
        assert block.size < 130 or len(block) == 1
    np.testing.assert_array_equal(rebuilt, kernel)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.8, 1.0])
def test_lens_blur_is_the_mix_of_the_image_and_its_mean_over_15_pixels(photo, strength):
    image = photo[:64, :80]
    mean = ndimage.uniform_filter(image.astype(float), (15, 15, 0), mode="reflect")
    wanted = (1 - strength) * image + strength * mean
    assert abs(lens_blur(image, strength) - wanted).max() < 1
    assert abs(lens_blur(image.astype(np.float32), strength) - wanted).max() < 1e-3


@pytest.mark.parametrize("linear_light", [False, True])
@pytest.mark.parametrize("blur_type", deblur.BLUR_TYPES)
def test_blur_of_no_extent_is_the_identity(photo, blur_type, linear_light):
    blurred = deblur.apply_blur(photo, blur_type, NOTHING[blur_type] | {"linear_light": linear_light})
    assert (blurred == photo).all() and blurred.dtype == np.uint8


def test_drawn_blurs_cover_their_ranges_and_follow_the_weights():
    rng, drawn = np.random.default_rng(0), {}
    weights = deblur.parse_type_weights("motion_blur:2, gaussian_blur:1,defocus_blur:1,lens_blur:0")
    assert sum(weights.values()) == 1
    for _ in range(2000):
        blur_type, params = deblur.draw_blur(weights, rng)
        drawn.setdefault(blur_type, []).append(params)
    assert "lens_blur" not in drawn and len(drawn["motion_blur"]) / 2000 == pytest.approx(0.5, abs=0.04)
    for blur_type, name, lo, hi in (("motion_blur", "length", 5, 20), ("motion_blur", "angle", 0, 360),
                                    ("gaussian_blur", "sigma", 1, 5), ("defocus_blur", "radius", 1, 8)):
        values = [params[name] for params in drawn[blur_type]]
        assert lo <= min(values) < lo + (hi - lo) / 50 and hi - (hi - lo) / 50 < max(values) <= hi
    strengths = [deblur.draw_blur({"lens_blur": 1.0}, rng)[1]["strength"] for _ in range(500)]
    assert 0.3 <= min(strengths) < 0.31 and 0.79 < max(strengths) <= 0.8


@pytest.mark.parametrize("text", ["", "fog_blur:1", "motion_blur", "motion_blur:-1", "motion_blur:1-2", "motion_blur:0",
                                  "motion_blur:1,motion_blur:2"])
def test_bad_type_weights_are_one_line_that_names_the_flag(text):
    with pytest.raises(ValueError, match=r"^--type_weights.*$"):
        deblur.parse_type_weights(text)


def test_the_bench_measures_the_same_blurs_as_scipys_and_refuses_senseless_numbers(monkeypatch, capsys):
    assert len(bench.measure_blurs(64, 1)) == 2 * len(bench.CASES) + 1  # ValueError where the results differ
    monkeypatch.setattr(bench, "scipy_blur", lambda image, blur_type, params: lambda: image)
    with pytest.raises(ValueError, match="not the same blur"):
        bench.measure_blurs(64, 1)
    monkeypatch.setattr("sys.argv", ["bench", "--samples", "0"])
    with pytest.raises(SystemExit):
        run_main(bench.main)
    assert "error: --samples 0: give 1 or more" in capsys.readouterr().err


# The maker


def test_maker_writes_the_layout_of_the_seed_in_the_exact_number(folder, tmp_path, capsys):
    output = make(folder, tmp_path / "out", "--seed", 3, samples=9)
    assert [row["clear_image"] for row in rows(output)] == [f"clear_{i:06d}.png" for i in range(9)]
    for row in rows(output):
        assert set(row) == {"clear_image", "blur_image", "blur_type", "source_image", "params", "seed"}
        assert (folder / row["source_image"]).is_file() and row["seed"] == 3
        clear, blurred = (load_rgb(output / f"{kind}_images" / row[f"{kind}_image"]) for kind in ("clear", "blur"))
        assert clear.shape == blurred.shape == (32, 32, 3)
        assert (deblur.apply_blur(clear, row["blur_type"], row["params"]) == blurred).all()  # params repeat the pair
    assert len(list(output.rglob("*.png"))) == 18 and not list(output.rglob("*.tmp"))
    printed = capsys.readouterr().out
    assert all(f"| {blur_type} |" in printed for blur_type in deblur.BLUR_TYPES)
    assert not (output / maker.VALIDATION_FILE).exists()


def test_a_source_image_of_the_size_asked_for_is_kept_pixel_by_pixel(tmp_path):
    Image.fromarray(photograph(size=(32, 32))).save(folder_of(tmp_path) / "a.png")
    output = make(tmp_path / "in", tmp_path / "out", samples=1)
    assert (load_rgb(output / "clear_images" / "clear_000000.png") == photograph(size=(32, 32))).all()


def test_the_crop_keeps_the_aspect(tmp_path):
    """A disc in a wide image stays a disc."""
    y, x = np.mgrid[:64, :128]
    Image.fromarray(((np.hypot(y - 31.5, x - 63.5) < 24) * 255).astype(np.uint8)).save(folder_of(tmp_path) / "disc.png")
    output = make(tmp_path / "in", tmp_path / "out", "--type_weights", "lens_blur:1", samples=12)
    masses = [load_rgb(output / "clear_images" / row["clear_image"])[..., 0] / 255 for row in rows(output)]
    whole = [mass for mass in masses if not mass[:, [0, -1]].any()]
    assert whole
    for mass in whole:
        height, width = mass.max(1).sum(), mass.max(0).sum()
        assert height == pytest.approx(24, abs=1.5) and width == pytest.approx(24, abs=1.5)


def folder_of(tmp_path):
    (tmp_path / "in").mkdir(exist_ok=True)
    return tmp_path / "in"


def test_workers_and_a_second_run_change_no_byte_and_another_seed_does(folder, tmp_path):
    flags = "--validation_fraction", 0.3
    plain = contents(make(folder, tmp_path / "a", *flags))
    assert contents(make(folder, tmp_path / "b", *flags, "--num_workers", 2)) == plain
    assert contents(make(folder, tmp_path / "a", *flags)) == plain
    other = contents(make(folder, tmp_path / "c", *flags, "--seed", 1))
    assert all(other[name] != plain[name] for name in plain if name.endswith("5.png"))


def test_a_sample_does_not_depend_on_how_many_there_are(folder, tmp_path):
    few = contents(make(folder, tmp_path / "few", "--validation_fraction", 0.25, samples=4))
    many = contents(make(folder, tmp_path / "many", "--validation_fraction", 0.25, samples=8))
    assert all(many[name] == few[name] for name in few if name.endswith("png"))
    assert contents(make(folder, tmp_path / "few", "--validation_fraction", 0.25, samples=8)) == many  # goes on


def test_no_source_image_is_on_both_sides_of_the_split_and_shares_are_exact(folder, tmp_path):
    output = make(folder, tmp_path / "out", "--validation_fraction", 0.3, samples=40)
    sides = [rows(output, file) for file in ("blur_types.json", maker.VALIDATION_FILE)]
    assert [len(side) for side in sides] == [28, 12]
    training, validation = ({row["source_image"] for row in side} for side in sides)
    assert len(training) == 4 and len(validation) == 2 and not training & validation
    assert not {row["clear_image"] for row in sides[0]} & {row["clear_image"] for row in sides[1]}


def test_a_copy_of_a_source_image_is_left_out_and_reported(folder, tmp_path, capsys):
    shutil.copy(folder / "1.png", folder / "copy.png")
    output = make(folder, tmp_path / "out", samples=30)
    assert "copy.png" not in {row["source_image"] for row in rows(output)}
    assert "copy.png: the same file as" in capsys.readouterr().err


def test_type_weights_and_linear_light_reach_the_samples(folder, tmp_path):
    output = make(folder, tmp_path / "out", "--type_weights", "lens_blur:1,defocus_blur:1", "--linear_light")
    assert {row["blur_type"] for row in rows(output)} == {"lens_blur", "defocus_blur"}
    assert all(row["params"]["linear_light"] is True for row in rows(output))
    row = rows(output)[0]
    clear, blurred = (load_rgb(output / f"{kind}_images" / row[f"{kind}_image"]) for kind in ("clear", "blur"))
    assert (deblur.apply_blur(clear, row["blur_type"], row["params"]) == blurred).all()
    assert (deblur.apply_blur(clear, row["blur_type"], row["params"] | {"linear_light": False}) != blurred).any()


def test_unreadable_and_small_files_are_reported_and_leave_no_hole(folder, tmp_path, capsys):
    (folder / "text.png").write_text("no image")
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    Image.fromarray(photograph(size=(20, 40))).save(folder / "small.png")
    output = make(folder, tmp_path / "out", samples=40)
    assert len(rows(output)) == len(list((output / "blur_images").glob("*.png"))) == 40
    assert not {"text.png", "cut.png", "small.png"} & {row["source_image"] for row in rows(output)}
    errors = capsys.readouterr().err
    assert all(f"{name}.png: " in errors for name in ("text", "cut", "small")) and "--upscale_small" in errors
    assert len(json.loads((output / "failures.json").read_text())) == 3


def test_small_files_are_enlarged_with_the_flag_alone(tmp_path):
    Image.fromarray(photograph(size=(20, 40))).save(folder_of(tmp_path) / "small.png")
    with pytest.raises(ValueError, match="40x20 px would be enlarged to 32 px"):
        make(tmp_path / "in", tmp_path / "out")
    assert len(rows(make(tmp_path / "in", tmp_path / "out", "--upscale_small", samples=2))) == 2


def test_an_interrupted_run_goes_on_and_ends_as_a_straight_one(folder, tmp_path, monkeypatch):
    flags = "--validation_fraction", 0.3
    straight = contents(make(folder, tmp_path / "straight", *flags))
    write, output = maker.write_png, tmp_path / "out"

    def make_writing(limit):
        written = []

        def write_some(path, image):
            if len(written) == limit:
                raise KeyboardInterrupt
            written.append(path)
            write(path, image)

        monkeypatch.setattr(maker, "write_png", write_some)
        make(folder, output, *flags)
        return len(written)

    def count_lines():
        return sum(len(rows(output, file)) for file in (maker.JSON_FILE, maker.VALIDATION_FILE)
                   if (output / file).exists())

    with pytest.raises(KeyboardInterrupt):
        make_writing(7)  # the clear image of sample 3 is there, its blurred one is not
    assert count_lines() == 3
    with open(output / maker.JSON_FILE, "a") as stream:
        stream.write('{"clear_image": "clear_0000')  # a line torn in the writing
    with pytest.raises(KeyboardInterrupt):
        make_writing(5)
    assert count_lines() == 5 and len(deblur.read_pairs(output)) == 4
    assert make_writing(100) == 2 * 3
    assert contents(output) == straight

    (output / "blur_images" / "blur_000001.png").unlink()
    make(folder, output, *flags)
    assert contents(output) == straight


def test_after_sigkill_every_json_line_has_its_files(folder, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "recipes.deblur_controlnet.create_deblur_dataset", "--source_dir", folder,
               "--output_dir", output, "--num_samples", "3000", "--image_size", "32", "--num_workers", "1"]
    process = subprocess.Popen(list(map(str, command)), cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and len(list((output / "blur_images").glob("*.png"))) < 20:
        time.sleep(0.01)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    whole = (output / maker.JSON_FILE).read_text().split("\n")[:-1]
    assert len(maker.finished_lines(output)) == len(whole) > 0
    assert all(load_rgb(pair.control).shape == (32, 32, 3) for pair in deblur.read_pairs(output)[:20])


@pytest.mark.parametrize("flags, word", [
    (("--seed", 1), "--seed"),
    (("--image_size", 48), "--image_size"),
    (("--linear_light",), "--linear_light"),
    (("--type_weights", "lens_blur:1"), "--type_weights"),
    (("--validation_fraction", 0.5), "--validation_fraction"),
    (("--upscale_small",), "--upscale_small"),
])
def test_other_settings_do_not_mix_into_a_dataset(folder, tmp_path, flags, word):
    before = contents(make(folder, tmp_path / "out", samples=4))
    with pytest.raises(ValueError, match=f"another {word}"):
        make(folder, tmp_path / "out", *flags, samples=4)
    assert contents(tmp_path / "out") == before


def test_other_sources_fewer_samples_and_foreign_folders_are_refused(folder, tmp_path):
    make(folder, tmp_path / "out", samples=4)
    with pytest.raises(ValueError, match="holds sample 3 already"):
        make(folder, tmp_path / "out", samples=3)
    Image.fromarray(photograph("coffee", (48, 48))).save(folder / "new.png")
    with pytest.raises(ValueError, match="another --source_dir"):
        make(folder, tmp_path / "out", samples=4)
    (tmp_path / "out" / maker.SETTINGS_FILE).unlink()
    with pytest.raises(ValueError, match="not made here"):
        make(folder, tmp_path / "out", samples=4)
    with pytest.raises(ValueError, match="lies in --source_dir"):
        make(folder, folder / "out")


@pytest.mark.parametrize("name", ["clear_images/clear_000000.png", "blur_images/mine.png", "blur_types.json",
                                  "blur_types_val.json"])
def test_files_that_were_not_made_here_are_never_written_over(folder, tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_bytes(b"mine")
    with pytest.raises(ValueError, match=f"--output_dir .*out has {name} but no dataset.json, so that was not made h"):
        make(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == {name: b"mine"}


LINE = {"clear_image": "clear_000001.png", "blur_image": "blur_000001.png", "blur_type": "lens_blur", "params": {}}


@pytest.mark.parametrize("file, content, message", [
    ("dataset.json", '{"image', "dataset.json: not JSON"),
    ("dataset.json", "[1]", "dataset.json: no JSON object"),
    ("dataset.json", "{}", "another --image_size"),
    ("dataset.json", "\udcff", "dataset.json: not JSON"),
    *(("blur_types.json", line, "blur_types.json, line 1: not made here") for line in (
        "[1]", "1", "{}", *(json.dumps(LINE | changed) for changed in (
            {"clear_image": "holiday.png"}, {"clear_image": 3}, {"blur_image": "blur_000002.png"},
            {"blur_type": ["x"]}, {"params": []})))),
    ("blur_types_val.json", f"{json.dumps(LINE)}\n\n[1]", "blur_types_val.json, line 3: not made here"),
])
def test_a_damaged_dataset_is_one_line_that_names_file_and_line_and_stays(folder, tmp_path, capsys, file, content,
                                                                         message):
    make(folder, tmp_path / "out", samples=2)
    (tmp_path / "out" / file).write_text(content, errors="surrogateescape")
    before = contents(tmp_path / "out")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: make(folder, tmp_path / "out", samples=2))
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and said.startswith("error: ") and message in said and said.count("\n") == 1
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("flags, message", [
    (("--validation_fraction", 1), "--validation_fraction 1"),
    (("--validation_fraction", 0.05), "not one pair"),
    (("--validation_fraction", 0.99), "leaves none for training"),
    (("--num_samples", 0), "--num_samples 0"),
    (("--image_size", 8), "--image_size 8"),
    (("--num_workers", -1), "--num_workers -1"),
    (("--max_pixels", 100), "--max_pixels"),
    (("--source_dir", "nowhere"), "nowhere: no such"),
])
def test_bad_flags_are_one_line_and_write_nothing(folder, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: make(folder, tmp_path / "out", *flags))
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.err.startswith("error: ") and message in captured.err
    assert captured.err.count("\n") == 1 and not (tmp_path / "out").exists()


# The dataset


@pytest.fixture
def stored(folder, tmp_path):
    return make(folder, tmp_path / "stored", samples=6)


def on_the_fly(folder, **options):
    weights = options.pop("weights", ALL)
    return deblur.DeblurDataset(folder, 32, partial(deblur.random_blur, weights=weights), **options)


def test_stored_items_are_the_files_with_the_ranges_of_a_controlnet(stored):
    dataset = deblur.DeblurDataset(deblur.read_pairs(stored), 32)
    assert len(dataset) == 6
    for item, row in zip(dataset, rows(stored), strict=True):
        clear, blurred = (load_rgb(stored / f"{kind}_images" / row[f"{kind}_image"]) for kind in ("clear", "blur"))
        torch.testing.assert_close(item["target"], to_tensor(clear))
        torch.testing.assert_close(item["control"], (to_tensor(blurred) + 1) / 2)
        assert item["control"].min() >= 0 and item["target"].min() < 0
        assert item["blur_type"] == row["blur_type"] and row["blur_image"] in item["path"]
        assert item["prompt"] == f"a clear, sharp image, {row['blur_type']} removed, high quality, detailed"


def test_crop_zoom_cuts_pairs_out_of_stored_images_without_scaling_them(folder, tmp_path):
    big = make(folder, tmp_path / "big", "--image_size", 48, samples=3)
    dataset, seen = from_flags("--data_root", big, "--image_size", 16, "--crop_zoom", 3), set()
    for index, row in enumerate(rows(big)):
        clear, blurred = (to_tensor(load_rgb(big / f"{kind}_images" / row[f"{kind}_image"]))
                          for kind in ("clear", "blur"))
        for epoch in range(3):
            item = dataset[index, epoch]
            y, x = next(place for place in itertools.product(range(33), repeat=2) if torch.equal(
                item["target"], clear[:, place[0] : place[0] + 16, place[1] : place[1] + 16]))
            torch.testing.assert_close(item["control"] * 2 - 1, blurred[:, y : y + 16, x : x + 16])
            seen.add((index, y, x))
    assert len(seen) == 9


def test_augmented_prompts_describe_the_blur():
    assert deblur.prompts(True)["defocus_blur"] == ("a defocus blur removed, in focus and sharp image, high quality, "
                                                    "detailed, professional photography")
    assert set(deblur.prompts(True)) == set(deblur.prompts(False)) == set(deblur.BLUR_TYPES)
    assert len(set(deblur.prompts(True).values())) == 4


def test_stored_pairs_stay_aligned_under_every_augmentation(stored):
    for row in rows(stored):  # no blur at all: then control equals target
        shutil.copy(stored / "clear_images" / row["clear_image"], stored / "blur_images" / row["blur_image"])
    plain = deblur.DeblurDataset(deblur.read_pairs(stored), 32)
    dataset = deblur.DeblurDataset(deblur.read_pairs(stored), 32, use_augmentation=True)
    flips, factors = set(), []
    for epoch, index in itertools.product(range(8), range(6)):
        item, original = dataset[index, epoch], (plain[index]["target"] + 1) / 2
        torch.testing.assert_close(item["control"], (item["target"] + 1) / 2)
        assert item["prompt"] == deblur.prompts(True)[item["blur_type"]]
        factor = float(item["control"].median() / original.median())
        for flip, view in ((False, original), (True, original.flip(-1))):
            if torch.allclose(item["control"], (view * factor).clamp(max=1), atol=1e-3):
                flips.add(flip)
                factors.append(factor)
    assert flips == {False, True} and len(factors) == 48
    assert 0.79 < min(factors) < 0.85 and 1.15 < max(factors) < 1.21
    assert 0.3 < np.mean([abs(factor - 1) < 1e-4 for factor in factors]) < 0.7


@pytest.mark.parametrize("blur_type", deblur.BLUR_TYPES)
def test_pairs_blurred_on_the_fly_stay_aligned_under_every_augmentation(folder, blur_type, monkeypatch):
    monkeypatch.setattr(deblur, "draw_blur", lambda weights, rng: (blur_type, dict(NOTHING[blur_type])))
    dataset = on_the_fly(folder, use_augmentation=True)
    for epoch in range(8):
        item = dataset[epoch % 6, epoch]
        torch.testing.assert_close(item["control"], (item["target"] + 1) / 2)
        assert item["blur_type"] == blur_type


def test_items_blurred_on_the_fly_are_what_their_parameters_say(folder):
    dataset = on_the_fly(folder)
    for item in (dataset[i] for i in range(6)):
        [step] = item["degradation"]
        target = ((item["target"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        blurred = deblur.apply_blur(target, item["blur_type"], {key: step[key] for key in step if key != "type"})
        torch.testing.assert_close(item["control"], (to_tensor(blurred) + 1) / 2)


def test_items_depend_on_seed_epoch_and_index_alone(folder):
    options = {"use_augmentation": True, "proportion_empty_prompts": 0.5}
    first, second = on_the_fly(folder, **options), pickle.loads(pickle.dumps(on_the_fly(folder, **options)))
    wanted = {key: first[key] for key in itertools.product(range(6), range(2))}
    for key in reversed(wanted):
        item = second[key]
        assert all(torch.equal(item[name], wanted[key][name]) for name in ("target", "control"))
        assert all(item[name] == wanted[key][name] for name in ("prompt", "blur_type", "seed", "degradation"))
    assert wanted[0, 0]["degradation"] != wanted[0, 1]["degradation"] != wanted[1, 1]["degradation"]
    other = on_the_fly(folder, seed=1, **options)
    assert other[0]["degradation"] != wanted[0, 0]["degradation"] and other[0]["seed"] != wanted[0, 0]["seed"]


def test_empty_prompts_have_their_share_and_change_nothing_else(folder):
    plain, some = on_the_fly(folder), on_the_fly(folder, proportion_empty_prompts=0.4)
    keys = list(itertools.product(range(6), range(30)))
    empty = [some[key]["prompt"] == "" for key in keys]
    assert np.mean(empty) == pytest.approx(0.4, abs=0.12)
    for key, is_empty in zip(keys[:20], empty, strict=False):
        assert torch.equal(plain[key]["control"], some[key]["control"])
        assert is_empty or plain[key]["prompt"] == some[key]["prompt"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_shared_loader_batches_items(folder, workers):
    dataset = on_the_fly(folder)
    args = Namespace(train_batch_size=3, seed=5, dataloader_num_workers=workers)
    batch = next(iter(make_loader(dataset, deblur.collate_fn, args)))
    assert batch["target"].shape == batch["control"].shape == (3, 3, 32, 32)
    for place, index in enumerate(batch["index"].tolist()):
        item = dataset[index, int(batch["epoch"][place])]
        assert torch.equal(batch["control"][place], item["control"])
        assert batch["blur_type"][place] == item["blur_type"] and batch["prompt"][place] == item["prompt"]


def test_small_images_are_left_out_of_training_unless_asked_for(folder):
    Image.fromarray(photograph(size=(20, 40))).save(folder / "small.png")
    [(path, reason)] = on_the_fly(folder).unreadable
    assert "small.png" in path and "--upscale_small" in reason
    assert len(on_the_fly(folder, upscale_small=True)) == 7


def test_an_image_that_breaks_later_is_replaced_and_named(folder):
    dataset = on_the_fly(folder)
    (folder / "0.png").write_bytes(b"broken")
    [message] = dataset[0]["skipped"]
    assert "0.png" in message and dataset[0]["path"].endswith("1.png")


GOOD = {"clear_image": "clear_000000.png", "blur_image": "blur_000000.png", "blur_type": "lens_blur"}


@pytest.mark.parametrize("line, message", [
    ('{"clear_image": "clear', "not JSON"),
    ("[1]", "not an object"),
    ('"clear_image, blur_image, blur_type"', "not an object"),
    (json.dumps({"clear_image": "clear_000000.png"}), "not an object with clear_image, blur_image and blur_type"),
    (json.dumps(GOOD | {"blur_type": "fog_blur"}), "unknown blur_type 'fog_blur'"),
    (json.dumps(GOOD | {"clear_image": "gone.png"}), "gone.png does not exist"),
    (json.dumps(GOOD | {"blur_image": "gone.png"}), "gone.png does not exist"),
    (json.dumps(GOOD | {"blur_image": "../clear_images/clear_000000.png"}), "is not the name of a file"),
    (json.dumps(GOOD | {"blur_image": None}), "is not the name of a file"),
    (json.dumps(GOOD), "is line 1's already"),
])
def test_a_bad_line_is_one_line_that_names_file_and_number(stored, line, message):
    lines = (stored / "blur_types.json").read_text().splitlines()
    (stored / "blur_types.json").write_text("\n".join([*lines[:2], "", line, *lines[2:]]))
    with pytest.raises(ValueError) as error:
        deblur.read_pairs(stored)
    assert str(error.value).startswith(f"{stored / 'blur_types.json'}, line 4: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_empty_json_file_is_named(stored):
    with pytest.raises(FileNotFoundError, match="nothing.json: no such file"):
        deblur.read_pairs(stored, "nothing.json")
    (stored / "blur_types.json").write_text("\n")
    with pytest.raises(ValueError, match="blur_types.json: empty"):
        deblur.read_pairs(stored)


def test_the_lines_of_the_seed_are_read_without_further_keys(stored):
    (stored / "blur_types.json").write_text(json.dumps(GOOD) + "\n")
    assert deblur.DeblurDataset(deblur.read_pairs(stored), 32)[0]["blur_type"] == "lens_blur"


# Options


def test_a_fingerprint_knows_names_sizes_and_blur_types_and_not_where_they_lie(stored, tmp_path):
    def fingerprint(root):
        return deblur.fingerprint(deblur.read_pairs(root), root)

    before = fingerprint(stored)
    moved = shutil.copytree(stored, tmp_path / "moved")
    assert fingerprint(moved) == before
    for change in (lambda text: text.replace(json.loads(text.splitlines()[0])["blur_type"], "lens_blur", 1),
                   lambda text: "\n".join(text.splitlines()[::-1])):
        (moved / deblur.JSON_FILE).write_text(change((stored / deblur.JSON_FILE).read_text()))
        assert fingerprint(moved) != before
    shutil.copy(stored / deblur.JSON_FILE, moved)
    with open(moved / deblur.BLUR_FOLDER / "blur_000000.png", "ab") as stream:
        stream.write(b"x")
    assert fingerprint(moved) != before


def from_flags(*flags, seed=0):
    parser = ArgumentParser()
    deblur.add_data_args(parser)
    return deblur.dataset_from_args(parser.parse_args(list(map(str, flags))), seed)


def test_the_options_reach_the_dataset(folder, stored):
    (stored / "other.json").write_text(json.dumps(GOOD))
    assert len(from_flags("--data_root", stored, "--image_size", 32)) == 6
    assert len(from_flags("--data_root", stored, "--image_size", 32, "--json_file", "other.json")) == 1
    made = "--source_dir", folder, "--image_size", 32
    assert len({from_flags(*made)[0, epoch]["blur_type"] for epoch in range(20)}) == 4
    linear = from_flags(*made, "--type_weights", "lens_blur:1", "--linear_light", seed=2)
    assert {linear[i]["blur_type"] for i in range(6)} == {"lens_blur"} and linear.seed == 2
    assert linear[0]["degradation"][0]["linear_light"] is True
    assert from_flags(*made, "--use_augmentation")[0]["prompt"].endswith("professional photography")
    assert from_flags(*made, "--proportion_empty_prompts", 1)[0]["prompt"] == ""
    assert len(from_flags("--source_dir", folder, "--image_size", 64, "--upscale_small")) == 6


@pytest.mark.parametrize("flags, message", [
    ((), "--data_root, or sharp images with --source_dir"),
    (("--data_root", ".", "--source_dir", "."), "one of them"),
    (("--source_dir", ".", "--image_size", 8), "--image_size 8"),
    (("--source_dir", ".", "--max_pixels", 0), "--max_pixels 0"),
    (("--source_dir", ".", "--type_weights", "fog:1"), "--type_weights"),
    (("--source_dir", "{folder}", "--proportion_empty_prompts", 2), "--proportion_empty_prompts"),
    (("--source_dir", "{folder}", "--crop_zoom", "0.5"), "--crop_zoom"),
])
def test_bad_data_options_name_their_flag(folder, flags, message):
    with pytest.raises(ValueError, match=message):
        from_flags(*(str(flag).replace("{folder}", str(folder)) for flag in flags))

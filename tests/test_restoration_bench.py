"""The benchmark of restorations: its degraded sets, its baselines, its rows and its files."""

import csv
import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from bench import restoration
from my_dataset.dataset_deg_paired import folder_records, to_tensor
from my_dataset.scored_pairs import denoise_bilateral, unsharp
from tests.conftest import photograph
from tests.test_metrics import write_backbone
from utils import metrics
from utils.parse import run_main
from utils.utils import to_uint8

# Pillow's resizing and libjpeg compute in integers, so these are the same on every processor.
EXACT_HASHES = {
    "x2": "fca05a5dbf20e77ac6ce17def6dc40b9ad7b9101ce819be14078f71bb1e26cc1",
    "x4": "7d61279940a7345462244d2fcda594cb311373650d5198fd26425f3fa334520b",
    "jpeg10": "efb7801239ff6baf380617c40abfe0f9697cd90e2f8dbee3e422de057a3aa18f",
    "jpeg20": "2201c7a457c297a4bd50adc5b066c5946577c6541cbff3980d59d005ce1324a6",
    "jpeg40": "75d908a36544cfafbc2b19bb0195dd2178f5593e348940a4c0aadd294476f3ca",
}
# PSNR in dB of the others, which round floats: another processor may move single values by 1 (without AVX2 the hash of
# gaussian_blur differs), but no published number.
PSNRS = {
    "noise15": 24.707,
    "noise25": 20.381,
    "noise50": 14.845,
    "gaussian_blur": 21.528,
    "motion_blur": 21.472,
    "defocus_blur": 22.089,
    "light": 26.866,
    "medium": 21.555,
    "heavy": 17.761,
    "real_world": 18.51,
    "old_photo": 16.578,
}


def arguments(clean, output, *flags, model="assets/tiny-kontext"):
    return restoration.parse_args(["--pretrained_model_name_or_path", model, "--clean", str(clean), "--output",
                                   str(output), *map(str, flags)])


@pytest.fixture
def bench(tiny_model, tmp_path, photos):
    """bench(*flags) runs the benchmark in this process and returns (results.json, rows of scores.csv, folder)."""

    def run(*flags, output="out", clean=photos / "heldout"):
        folder = tmp_path / output
        restoration.main(arguments(clean, folder, "--tune_on", photos / "train", "--max_sequence_length", 16, *flags,
                                   model=tiny_model))
        with open(folder / "scores.csv", encoding="utf-8") as file:
            return json.loads((folder / "results.json").read_text()), list(csv.DictReader(file)), folder

    return run


def psnrs(scores, row):
    return [float(score["psnr"]) for score in scores if score["row"] == row]


@pytest.fixture
def synthetic(tmp_path):
    """Folder with three pictures that numbers alone make: smooth waves with some edges, 67 x 90 px."""
    y, x = np.mgrid[:67, :90]
    folder = tmp_path / "synthetic"
    folder.mkdir()
    for i in range(3):
        waves = [(y * (i + 2) + x * (c + 1)) % 200 + 40 * ((x // 11 + y // 7 + c) % 2) for c in range(3)]
        Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def describe(clean, *flags, seed=0, indices=(0, 1, 2)):
    args = arguments(clean, "unused", "--seed", seed, *flags)
    records = folder_records(clean)
    return {one.name: restoration.describe_set(one, records, indices, clean, seed, args.crop_px)
            for one in restoration.make_sets(args)}


def degraded(clean, name, index, seed=0):
    [one] = restoration.make_sets(arguments(clean, "unused", "--sets", name))
    target, control, _ = restoration.load_pair(folder_records(clean)[index], index, one, seed, 0)
    return to_uint8(target[0]), to_uint8(control[0])


# ---- degraded sets ----


def test_published_sets_do_not_change(synthetic):
    """Fails where a change of a degradation would change numbers that were published for the same set."""
    found = {name: each["sha256"] for name, each in describe(synthetic).items()}
    assert {name: found[name] for name in EXACT_HASHES} == EXACT_HASHES
    assert EXACT_HASHES.keys() | PSNRS.keys() == set(restoration.SETS)
    for name, expected in PSNRS.items():
        measured = np.mean([cv2.PSNR(*degraded(synthetic, name, index)) for index in range(3)])
        assert measured == pytest.approx(expected, abs=0.01), name


def test_a_degraded_image_depends_on_set_name_seed_and_place_alone(synthetic):
    every, reverse = describe(synthetic, "--sets", "noise25,heavy"), describe(synthetic, "--sets", "heavy,noise25")
    assert every == reverse
    some = describe(synthetic, "--sets", "heavy", indices=[2])["heavy"]["degradations"]
    assert some["2.png"] == every["heavy"]["degradations"]["2.png"]
    assert every["noise25"]["sha256"] != describe(synthetic, "--sets", "noise25", seed=1)["noise25"]["sha256"]
    fields = [np.subtract(*degraded(synthetic, name, index)[::-1], dtype=float)
              for name, index in (("noise15", 0), ("noise25", 0), ("noise25", 1))]
    for a, b in ((0, 1), (1, 2)):
        assert abs(np.corrcoef(fields[a].ravel(), fields[b].ravel())[0, 1]) < 0.05
    renamed = synthetic / "0.png"
    renamed.rename(synthetic / "00.png")
    assert describe(synthetic, "--sets", "noise25")["noise25"]["sha256"] != every["noise25"]["sha256"]


def test_sets_are_what_they_are_called(photos):
    def input_psnr(name):
        return np.mean([cv2.PSNR(*degraded(photos / "train", name, index)) for index in range(6)])

    for sigma in (15, 25):
        clean, noisy = degraded(photos / "train", f"noise{sigma}", 0)
        inside = (clean > 90) & (clean < 165)
        assert np.subtract(noisy, clean, dtype=float)[inside].std() == pytest.approx(sigma, rel=0.05)
    clean, small = degraded(photos / "train", "x2", 0)
    expected = Image.fromarray(clean).resize((32, 24), Image.Resampling.BICUBIC).resize(
        (64, 48), Image.Resampling.BICUBIC)
    assert (small == np.asarray(expected)).all()
    for worse, better in (("noise50", "noise15"), ("x4", "x2"), ("jpeg10", "jpeg40"), ("heavy", "light")):
        assert input_psnr(worse) < input_psnr(better)
    for name in restoration.SETS:
        assert any(np.ptp(pair[1].astype(int) - pair[0]) for pair in [degraded(photos / "train", name, 0)]), name


def test_custom_set_follows_the_degradation_options(photos, tmp_path):
    flags = ["--degradation_types", "downsample,noise,blur", "--lr_scale", 2, "--noise_level", 25 / 255,
             "--blur_radius", 1]
    args = arguments(photos / "train", tmp_path, "--sets", "custom", *flags)
    [custom] = restoration.make_sets(args)
    assert "--lr_scale 2" in custom.description and "jpeg" not in custom.description
    _, _, params = restoration.load_pair(folder_records(photos / "train")[0], 0, custom, 0, 0)
    assert [step["type"] for step in params] == ["downsample", "noise", "blur"]
    assert (params[0]["scale"], params[1]["level"], params[2]["radius"]) == (2, pytest.approx(25 / 255), 1)


# ---- classical methods ----


def test_classical_methods_are_tuned_on_other_photographs_only(synthetic, photos, tmp_path):
    scored = sorted((photos / "heldout").iterdir())
    before = restoration.tuning_photos(photos / "train", scored)
    assert len(before) == 6 and all(photo.shape == (48, 48, 3) for photo in before)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in [*scored, *sorted((photos / "train").iterdir())]:
        Image.open(path).save(mixed / f"{path.stem}_copy.bmp")
    assert len(restoration.tuning_photos(mixed, scored)) == 6
    with pytest.raises(ValueError, match="--tune_on .*scored too"):
        restoration.tuning_photos(photos / "heldout", scored)
    assert len(restoration.tuning_photos(None, scored)) == 7


def test_tuning_finds_strong_filters_for_flat_photographs_and_weak_ones_for_texture():
    [noise25] = [one for one in restoration.make_sets(arguments("x", "y", "--sets", "noise25"))]
    flat = [np.full((32, 32, 3), value, np.uint8) for value in (90, 160)]
    texture = [np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)]
    strong, weak = restoration.tune(noise25, flat, 0), restoration.tune(noise25, texture, 0)
    assert strong == restoration.tune(noise25, flat, 0)
    assert strong["nlm"]["strength"] >= 40 > weak["nlm"]["strength"]
    assert strong["bilateral"]["color"] > weak["bilateral"]["color"]
    assert strong.keys() == restoration.CLASSICAL.keys()


def test_tuned_sharpening_undoes_some_of_a_blur(photos):
    [blur] = restoration.make_sets(arguments("x", "y", "--sets", "gaussian_blur"))
    tuned = restoration.tune(blur, restoration.tuning_photos(photos / "train", []), 0)
    clean, blurred = degraded(photos / "heldout", "gaussian_blur", 0)
    sharpened = restoration.denoise_and_sharpen(blurred, **tuned["nlm_unsharp"])
    assert cv2.PSNR(clean, sharpened) > cv2.PSNR(clean, blurred) + 0.3


def test_bilateral_keeps_edges_and_unsharp_keeps_flat_areas():
    edge = np.full((40, 40, 3), 40, np.uint8)
    edge[:, 20:] = 200
    noisy = (edge + np.random.default_rng(0).normal(0, 8, edge.shape)).clip(0, 255).astype(np.uint8)
    smooth = denoise_bilateral(noisy, 60, 3)
    assert abs(smooth[:, :16].astype(float) - 40).mean() < 0.4 * abs(noisy[:, :16].astype(float) - 40).mean()
    assert np.diff(smooth.mean((0, 2)))[19] > 150
    sharp = unsharp(edge, 1.0, 2.0)
    assert (sharp[:, 0] == 40).all() and sharp[:, 20].min() > 200 and sharp[:, 19].max() < 40


# ---- metrics ----


def test_laplacian_energy_tells_blur_from_noise():
    target = photograph(size=(64, 64))
    blurred = cv2.GaussianBlur(target, (0, 0), 1.5)
    noisy = (target + np.random.default_rng(0).normal(0, 20, target.shape)).clip(0, 255).astype(np.uint8)
    clean, soft, rough, flat = (to_tensor(image)[None] for image in (target, blurred, noisy, 0 * target))
    assert metrics.laplacian(soft, clean).item() < 0.3 and metrics.laplacian(rough, clean).item() > 1.2
    assert metrics.laplacian(clean, clean).item() == metrics.laplacian(flat, flat).item() == 1
    luma = 16 + target.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255
    kernel = [[0, 1, 0], [1, -4, 1], [0, 1, 0]]
    expected = np.square(ndimage.convolve(luma, kernel, mode="mirror")).mean()
    assert metrics.laplacian_energy(clean).item() == pytest.approx(expected)
    pair = metrics.laplacian(torch.cat([soft, clean]), torch.cat([clean, clean]))
    assert pair.tolist() == [metrics.laplacian(soft, clean).item(), 1]


def ms_ssim_by_hand(a, b):
    """Wang, Simoncelli and Bovik 2003 with (H, W, 3) floats from 0 to 255."""
    factors = []
    for weight in (0.0448, 0.2856, 0.3001, 0.2363, 0.1333):
        def mean(image):
            return ndimage.gaussian_filter(image, (1.5, 1.5, 0), mode="mirror", truncate=3.5)

        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        variances = [mean(p * q) - mean(p) * mean(q) for p, q in ((a, a), (b, b), (a, b))]
        contrast = (2 * variances[2] + c2) / (variances[0] + variances[1] + c2)
        luminance = (2 * mean(a) * mean(b) + c1) / (mean(a) ** 2 + mean(b) ** 2 + c1)
        factors.append((contrast[5:-5, 5:-5].mean(), (contrast * luminance).mean(), weight))
        a, b = (image[: len(image) // 2 * 2, : image.shape[1] // 2 * 2] for image in (a, b))
        a, b = (image.reshape(len(image) // 2, 2, -1, 2, 3).mean((1, 3)) for image in (a, b))
    *fine, (_, coarsest, weight) = factors
    return np.prod([contrast**weight for contrast, _, weight in fine]) * coarsest**weight


def test_ms_ssim_equals_its_formula_and_is_refused_where_it_does_not_fit():
    target = photograph(size=(176, 200))
    noisy = (target + np.random.default_rng(0).normal(0, 30, target.shape)).clip(0, 255).astype(np.uint8)
    clean, rough = to_tensor(target)[None], to_tensor(noisy)[None]
    assert metrics.ms_ssim(clean, clean).item() == pytest.approx(1, abs=1e-6)
    assert metrics.ms_ssim(rough, clean).item() == pytest.approx(
        ms_ssim_by_hand(noisy.astype(float), target.astype(float)), abs=1e-4)
    with pytest.raises(ValueError, match="MS-SSIM needs images of 176 px or more, got 200x175"):
        metrics.ms_ssim(rough[..., :175, :], clean[..., :175, :])


# ---- the whole benchmark ----


def test_rows_files_and_numbers(bench, tiny_lora, photos):
    report, scores, folder = bench("--lora", tiny_lora, "--sets", "noise25,x2", "--steps", "1,2", "--base_steps", 2,
                                   "--start_noise", "0.5,1")
    fixed = ["nlm", "bilateral", "nlm_unsharp", "base model without LoRA, 2 steps", "LoRA, start noise 0.5, 1 step",
             "LoRA, start noise 0.5, 2 steps", "input_vae", "ceiling"]
    assert list(report["sets"]["noise25"]["rows"]) == ["input", *fixed]
    assert list(report["sets"]["x2"]["rows"]) == ["input", "lanczos", *fixed]
    assert len(report["left_out"]) == 2 and all("trained on 0.5 to 0.5" in line for line in report["left_out"])
    assert len(scores) == 2 * (9 + 10) and {score["image"] for score in scores} == {"photo_6.png", "photo_7.png"}
    assert all(float(score["seconds"]) > 0 for score in scores)

    x2 = [score for score in scores if score["set"] == "x2"]
    for place, path in enumerate(sorted((photos / "heldout").iterdir())):
        clean = Image.open(path).convert("RGB")
        small = clean.resize((32, 24), Image.Resampling.BICUBIC)
        for row, kernel in (("input", Image.Resampling.BICUBIC), ("lanczos", Image.Resampling.LANCZOS)):
            expected = cv2.PSNR(np.asarray(clean), np.asarray(small.resize((64, 48), kernel)))
            assert psnrs(x2, row)[place] == pytest.approx(expected, abs=1e-4)

    rows = report["sets"]["x2"]["rows"]
    assert rows["input"]["label"] == "input (bicubic enlargement)"
    assert rows["input"]["laplacian"]["mean"] < 0.7 and rows["input"]["scale"]["mean"] == pytest.approx(1, abs=0.02)
    for row, values in rows.items():
        psnr = values["psnr"]
        assert psnr["lo"] <= psnr["mean"] <= psnr["hi"] and psnr["mean"] == pytest.approx(np.mean(psnrs(x2, row)))
        assert values["seconds"] > 0
    best = report["sets"]["x2"]["best"]["lora"]
    gains = report["sets"]["x2"]["best_lora_minus"]
    assert gains.keys() == rows.keys() - {best}
    assert gains["input"]["psnr"]["mean"] == pytest.approx(rows[best]["psnr"]["mean"] - rows["input"]["psnr"]["mean"])

    text = (folder / "results.md").read_text()
    for wanted in ("## noise25", "## x2", report["sets"]["x2"]["sha256"], "Pillow's bicubic", "PSNR dB [95 %]",
                   "s/image", "BT.601", f"strength {report['sets']['x2']['tuned']['nlm']['strength']}", "minus",
                   "Left out: LoRA, start noise 1"):
        assert wanted in text, wanted
    assert text.count("\n| ") == 2 * 2 + 19
    described = report["rows"]["LoRA, start noise 0.5, 2 steps"]
    assert (described["steps"], described["sampled_start_noise"]) == (2, 0.5)
    assert described["lora"]["file"].endswith(".safetensors") and report["rows"][fixed[3]]["lora"] is None
    assert report["machine"]["cpu"] and report["machine"]["torch_threads"] == 1 and report["versions"]["pillow"]
    assert report["sets"]["noise25"]["settings"]["chains"][0][0]["noise_level"] == [25 / 255] * 2
    picture = Image.open(folder / "x2.png")
    assert picture.width > 5 * restoration.CELL_PX > picture.width * 0.9 and (folder / "noise25.png").is_file()


def test_each_lora_is_scored_on_the_untouched_base_model(bench, tiny_lora):
    flags = ["--sets", "noise15", "--steps", 1, "--grid_images", 0, "--max_images", 1]
    alone = bench("--lora", tiny_lora, *flags, "--base_steps", 1, output="alone")[1]
    report, both, folder = bench("--lora", f"one={tiny_lora}", "--lora", f"two={tiny_lora}", *flags, "--base_steps", 1,
                                 output="both")
    weak = bench("--lora", tiny_lora, "--lora_weight", 0.3, *flags, "--base_steps", 0, output="weak")[1]
    row = "start noise 0.5, 1 step"
    [lora], [base] = psnrs(alone, f"LoRA, {row}"), psnrs(alone, "base model without LoRA, 1 step")
    assert psnrs(both, f"one, {row}") == psnrs(both, f"two, {row}") == [lora]
    assert psnrs(both, "base model without LoRA, 1 step") == [base]
    assert psnrs(weak, f"LoRA, {row}") != [lora] and not psnrs(weak, "base model without LoRA, 1 step")
    assert psnrs(weak, "ceiling") == psnrs(both, "ceiling") and not list(folder.glob("*.png"))
    assert report["sets"]["noise15"]["best"]["base"] == "base model without LoRA, 1 step"


def test_all_metrics_on_images_that_are_large_enough(bench, tmp_path, capsys):
    backbone, _ = write_backbone(tmp_path, "squeeze")
    large = tmp_path / "large"
    large.mkdir()
    Image.fromarray(photograph(size=(180, 200))).save(large / "a.png")
    flags = ["--sets", "jpeg10", "--base_steps", 0, "--grid_images", 1, "--lpips_backbone", backbone, "--lpips_net",
             "squeeze"]
    report, scores, folder = bench(*flags, clean=large)
    assert report["definitions"].keys() == {*metrics.DEFINITIONS, "shift_px", "scale"} <= scores[0].keys()
    assert "MS-SSIM" in (folder / "results.md").read_text() and report["lpips_net"] == "squeeze"
    capsys.readouterr()
    report = bench(*flags, "--crop_px", 160, clean=large, output="crop")[0]
    assert "MS-SSIM left out: it needs 176 px a side, the smallest has 160" in capsys.readouterr().out
    assert "ms_ssim" not in report["definitions"] and report["crop"] == "160 px from the middle"


@pytest.mark.parametrize(("flags", "words"), [
    (["--sets", "noise26"], ["--sets", "noise26", "noise25"]),
    (["--sets", "noise25", "--blur_radius", "1"], ["--blur_radius", "custom"]),
    (["--steps", "4,0"], ["--steps 4,0"]),
    (["--steps", "4,x"], ["--steps 4,x"]),
    (["--start_noise", "0.5"], ["--start_noise 0.5", "--lora"]),
    (["--crop_px", "-1"], ["--crop_px -1"]),
    (["--crop_px", "10", "--sets", "noise25"], ["10 px a side and the metrics need", "--crop_px"]),
    (["--max_images", "0"], ["--max_images 0"]),
    (["--grid_images", "-1"], ["--grid_images -1"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--max_sequence_length", "0"], ["--max_sequence_length 0"]),
    (["--max_sequence_length", "513"], ["--max_sequence_length 513"]),
    (["--lora_weight", "nan"], ["--lora_weight nan"]),
    (["--guidance_scale", "inf"], ["--guidance_scale inf"]),
    (["--base_steps", "-4"], ["--base_steps -4"]),
    (["--tile_batch", "0"], ["--tile_batch 0"]),
    (["--sets", "custom", "--degradation_preset", "heavy", "--damage_strength", "1"], ["drop --damage_strength"]),
    (["--lora", "a=x", "--lora", "a=y"], ["--lora", "two are called a"]),
    (["--lora", "LORA", "--start_noise", "0.9"], ["no row is left", "0.5 to 0.5"]),
    (["--lora", "none"], ["none", "no such LoRA file"]),
    (["--crop_px", "500"], ["smaller than --crop_px 500"]),
])
def test_bad_input_is_one_line_before_a_model_loads(flags, words, tiny_model, tiny_lora, photos, tmp_path, capsys,
                                                    monkeypatch):
    monkeypatch.setattr(restoration.flux, "load_models", None)
    flags = [tiny_lora if flag == "LORA" else flag for flag in flags]
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: restoration.main(arguments(photos / "heldout", tmp_path / "out", *flags, model=tiny_model)))
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and all(word in line for word in words), line

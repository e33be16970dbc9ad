import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from my_dataset.dataset_deg_paired import DegDataset, cover_crop
from my_dataset.degradations import PRESETS, apply_degradations, make_degrader
from my_dataset.images import load_rgb
from scripts.preview_degradations import MARGIN_PX, caption, describe, main

ROOT = Path(__file__).resolve().parent.parent
WIDE = ["--degradation_types", "downsample,noise,blur,jpeg", "--noise_level", "0.01-0.2", "--blur_radius", "0-4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    Image.fromarray(data.astronaut()).save(folder / "a.png")
    (folder / "deeper").mkdir()
    Image.fromarray(data.coffee()).save(folder / "deeper" / "b.png")
    return folder


def preview(folder, output, *flags):
    main(["--images", str(folder), "--output", str(output), "--resolution", "96", *WIDE, *flags])
    return np.asarray(Image.open(output)), json.loads(output.with_suffix(".json").read_text())


def test_sheet_shows_clean_image_and_samples_that_its_json_repeats(folder, tmp_path):
    sheet, report = preview(folder, tmp_path / "new" / "sheet.png", "--samples", "3")
    assert sheet.shape[1] == 4 * (96 + MARGIN_PX) + MARGIN_PX
    clean = cover_crop(load_rgb(folder / "a.png"), (96, 96), (0.5, 0.5))
    cells = [sheet[MARGIN_PX : MARGIN_PX + 96, MARGIN_PX + n * (96 + MARGIN_PX) :][:, :96] for n in range(4)]
    assert (cells[0] == clean).all()
    samples = [entry for entry in report["samples"] if Path(entry["image"]).name == "a.png"]
    assert [entry["sample"] for entry in samples] == [0, 1, 2]
    for cell, entry in zip(cells[1:], samples, strict=True):
        assert (cell == apply_degradations(clean, entry["degradation"])).all()
    assert len({json.dumps(entry["degradation"]) for entry in report["samples"]}) == 6
    below = sheet[MARGIN_PX + 96 : MARGIN_PX + 96 + 40, 96 + 2 * MARGIN_PX :]
    assert (below < 100).any()  # the parameters are written there


def test_sample_n_is_what_training_draws_in_epoch_n(folder, tmp_path):
    report = preview(folder, tmp_path / "sheet.png", "--seed", "7", "--samples", "2")[1]
    degrade = make_degrader("downsample,noise,blur,jpeg", noise_level="0.01-0.2", blur_radius="0-4")
    dataset = DegDataset(str(folder), degrade, resolution=96, crop="center", seed=7)
    for position, entry in enumerate(report["samples"]):
        index, epoch = divmod(position, 2)
        assert dataset[(index, epoch)]["degradation"] == entry["degradation"]


def test_seed_and_number_of_images_and_a_single_file_are_taken(folder, tmp_path):
    reports = [preview(folder, tmp_path / f"{seed}.png", "--seed", seed)[1] for seed in "011"]
    assert reports[0]["samples"] != reports[1]["samples"] == reports[2]["samples"]
    one = preview(folder, tmp_path / "one.png", "--num_images", "1")[1]
    file = preview(folder / "a.png", tmp_path / "file.png")[1]
    assert len(one["samples"]) == 4 and one["samples"] == file["samples"]


def test_presets_sheet_has_a_clean_row_and_rows_of_every_preset(tmp_path):
    output = tmp_path / "presets.png"
    main(["--presets", "--samples", "2", "--resolution", "96", "--num_images", "2", "--output", str(output)])
    sheet, report = np.asarray(Image.open(output)), json.loads(output.with_suffix(".json").read_text())
    drawn = [(entry["preset"], entry["sample"], entry["image"]) for entry in report["samples"]]
    names = "astronaut.png", "chelsea.png"
    assert drawn == [(preset, n, name) for preset in PRESETS for n in range(2) for name in names]
    clean = cover_crop(data.astronaut(), (96, 96), (0.5, 0.5))
    height = (len(sheet) - MARGIN_PX) // (1 + 2 * len(PRESETS))
    column = [sheet[MARGIN_PX + row * height :, MARGIN_PX:][:96, :96] for row in range(1 + 2 * len(PRESETS))]
    assert (column[0] == clean).all()
    for cell, entry in zip(column[1:], report["samples"][::2], strict=True):
        assert (cell == apply_degradations(clean, entry["degradation"])).all()


def test_options_hold_for_all_presets_and_a_folder_replaces_the_package_photographs(folder, tmp_path):
    output = tmp_path / "presets.png"
    flags = ["--presets", "--samples", "1", "--resolution", "64", "--degradation_probability", "0"]
    main(["--images", str(folder), *flags, "--output", str(output)])
    report = json.loads(output.with_suffix(".json").read_text())
    assert {entry["image"] for entry in report["samples"]} == {str(folder / "a.png"), str(folder / "deeper" / "b.png")}
    assert all(entry["degradation"] == [] for entry in report["samples"])


@pytest.mark.parametrize(
    "flags, words",
    [([], "--images is needed"), (["--presets", "--degradation_preset", "light"], "--presets"),
     (["--presets", "--degradation_types", "noise"], "--degradation_types beside --degradation_preset")],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(flags, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        main(flags)


def test_unreadable_images_are_named_and_left_out(folder, tmp_path, capsys):
    broken = tmp_path / "photos"
    broken.mkdir()
    (broken / "0.png").write_text("text")
    with pytest.raises(ValueError, match="--images .* none of its images can be read"):
        preview(broken, tmp_path / "sheet.png")
    Image.open(folder / "a.png").save(broken / "1.png")
    report = preview(broken, tmp_path / "sheet.png")[1]
    assert {Path(entry["image"]).name for entry in report["samples"]} == {"1.png"}
    assert "0.png" in capsys.readouterr().err


def test_samples_are_trainings_behind_files_that_it_leaves_out_or_finds_damaged_later(folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "0.png").write_text("text")  # left out by its header: has no index
    Image.new("RGB", (99, 8)).save(photos / "1.png")  # so is what is too small
    content = (folder / "a.png").read_bytes()
    (photos / "2.png").write_bytes(content[:9999])  # cut: keeps its index, and training takes the next one for it
    (photos / "3.png").write_bytes(content)
    samples = preview(photos, tmp_path / "sheet.png", "--samples", "1")[1]["samples"]
    degrade = make_degrader("downsample,noise,blur,jpeg", noise_level="0.01-0.2", blur_radius="0-4")
    item = DegDataset(str(photos), degrade, resolution=96, crop="center")[1]
    assert [(Path(sample["image"]).name, sample["degradation"]) for sample in samples] == [
        (Path(item["path"]).name, item["degradation"])] == [("3.png", item["degradation"])]


def test_caption_tells_everything_but_the_seed_and_fits():
    noise = {"type": "noise", "kind": "poisson", "level": 0.0512345, "gray": True, "seed": 5}
    assert describe(noise) == "noise poisson level 0.0512 gray"
    assert describe(noise | {"gray": False}) == "noise poisson level 0.0512"
    assert describe({"type": "jpeg", "codec": "jpeg", "quality": 75}) == "jpeg quality 75"
    down = {"type": "downsample", "scale": 8.0, "down_kernel": "area", "up_kernel": "bicubic"}
    assert describe(down) == "downsample scale 8 down area up bicubic"
    assert describe({"type": "fade", "black": [0.1, 0.25], "saturation": 0.5}) == "fade black 0.1 0.25 saturation 0.5"
    assert max(map(len, caption([noise, down], 130))) <= 20
    assert caption([], 130) == ["not degraded"]


@pytest.mark.parametrize(
    "flag, value",
    [("--resolution", "8"), ("--samples", "0"), ("--num_images", "0"), ("--seed", "-1"), ("--output", "sheet.txt"),
     ("--noise_level", "7")],
)  # fmt: skip
def test_a_bad_flag_is_named(folder, flag, value):
    with pytest.raises(ValueError, match=f"^{flag} "):
        main(["--images", str(folder), f"{flag}={value}"])


def test_command_ends_with_one_line_and_code_2_on_bad_input(tmp_path):
    command = [sys.executable, "-m", "scripts.preview_degradations", "--images", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "none" in done.stderr

"""Low-resolution images: their pixels, their damage, and pairs that training takes."""

import json

import numpy as np
import pytest
from PIL import Image, ImageCms

from my_dataset.dataset_deg_paired import DEGRADATION_STREAM, KERNELS, DegDataset, item_rng, pair_records, to_tensor
from my_dataset.degradations import jpeg, make_degrader
from my_dataset.images import load_rgb, save_image
from scripts import img_downsample
from tests.conftest import photograph
from utils.parse import run_main


@pytest.fixture
def call(tmp_path, capsys):
    """call(*flags) downsamples in/ to lr/ and returns (exit code, stdout, stderr)."""

    def run(*flags):
        argv = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "lr"), *map(str, flags)]
        with pytest.raises(SystemExit) as exit_:
            run_main(lambda: img_downsample.main(img_downsample.parse_args(argv)))
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run


@pytest.fixture
def folder(tmp_path):
    """in/ with a.png (50 x 66 px) and sub/b.jpg (47 x 40)."""
    write(tmp_path / "in" / "a.png", photograph(size=(50, 66)))
    write(tmp_path / "in" / "sub" / "b.jpg", photograph("coffee", (47, 40)))
    return tmp_path / "in"


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def test_box_is_the_mean_of_each_block_and_pillows_reduce(call, folder, tmp_path):
    assert call("--factor", 2, "--method", "box")[0] == 0
    small, image = load_rgb(tmp_path / "lr" / "a.png"), load_rgb(folder / "a.png")
    means = image.reshape(25, 2, 33, 2, 3).mean((1, 3))
    assert abs(small - means).max() <= 1  # Pillow rounds rows and columns in turn
    assert abs(small.astype(int) - np.asarray(Image.fromarray(image).reduce(2))).max() <= 1


@pytest.mark.parametrize("method", sorted(KERNELS))
def test_every_kernel_is_pillows_and_all_but_nearest_average_a_checkerboard_away(call, tmp_path, method):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    image = np.dstack([board, 255 - board, board])
    write(tmp_path / "in" / "a.png", image)
    write(tmp_path / "in" / "b.png", photograph(size=(64, 48)))
    assert call("--factor", 8, "--method", method)[0] == 0
    inner = load_rgb(tmp_path / "lr" / "a.png")[1:-1, 1:-1].astype(int)
    assert (abs(inner - 127.5).max() < 5) == (method != "nearest")
    resized = Image.open(tmp_path / "in" / "b.png").resize((6, 8), KERNELS[method])
    assert (load_rgb(tmp_path / "lr" / "b.png") == np.asarray(resized)).all()


def test_folders_are_mirrored_as_png_and_uneven_sizes_are_told(call, folder, tmp_path):
    code, out, _ = call("--factor", 4)
    assert code == 0 and "2 written, 0 failed" in out and "2 do not divide by 4" in out
    assert Image.open(tmp_path / "lr" / "a.png").size == (16, 12)
    assert Image.open(tmp_path / "lr" / "sub" / "b.png").size == (10, 11)


def test_cropped_pairs_train_and_their_clean_half_is_the_uncut_corner(call, folder, tmp_path):
    code, out, _ = call("--factor", 4, "--crop_to_multiple", "--save_clean", tmp_path / "hr")
    assert code == 0 and "divide" not in out
    clean = load_rgb(tmp_path / "hr" / "a.png")
    assert (clean == load_rgb(folder / "a.png")[:48, :64]).all()
    resized = Image.fromarray(clean).resize((16, 12), Image.Resampling.BICUBIC)
    assert (load_rgb(tmp_path / "lr" / "a.png") == np.asarray(resized)).all()
    dataset = DegDataset(pair_records(tmp_path / "lr", tmp_path / "hr"), resolution=32, crop="center")
    assert len(dataset) == 2 and not dataset.unreadable
    item = dataset[1]
    assert item["target"].shape == item["control"].shape == (3, 32, 32)
    assert 0.001 < (item["target"] - item["control"]).square().mean() < 0.1  # the same place, less detail


def test_uncropped_sizes_that_do_not_divide_are_no_pairs(call, folder, tmp_path):
    assert call("--factor", 4)[0] == 0
    with pytest.raises(ValueError, match="no whole fraction"):
        DegDataset(pair_records(tmp_path / "lr", folder))


def test_what_was_written_inside_the_input_folder_is_not_downsampled_again(tmp_path, folder, capsys):
    argv = ["--input", folder, "--output", folder / "lr", "--crop_to_multiple", "--save_clean", folder / "hr"]
    for _ in range(2):
        img_downsample.main(img_downsample.parse_args([str(word) for word in argv]))
        assert "2 written" in capsys.readouterr().out


def test_noise_and_jpeg_are_the_degraders_with_a_seed_for_each_file(call, folder, tmp_path):
    flags = ["--factor", 2, "--noise_level", "0.05-0.1", "--jpeg_quality", "60"]
    assert call(*flags, "--seed", 3)[0] == 0
    drawn = json.loads((tmp_path / "lr" / "downsample.json").read_text())["images"]
    degrade = make_degrader("noise,jpeg", noise_level="0.05-0.1", jpeg_quality=60)
    small = img_downsample.downsample(load_rgb(folder / "sub" / "b.jpg"), 2, "bicubic")
    degraded, params = degrade(small, item_rng(3, 0, 1, DEGRADATION_STREAM))
    assert (load_rgb(tmp_path / "lr" / "sub" / "b.png") == degraded).all()
    assert drawn["sub/b.png"] == {"input": "b.jpg", "degradation": params}
    assert drawn["a.png"]["degradation"][0]["seed"] != params[0]["seed"]
    first = load_rgb(tmp_path / "lr" / "a.png")
    assert call(*flags, "--seed", 4)[0] == 0
    assert (load_rgb(tmp_path / "lr" / "a.png") != first).any()
    assert call("--factor", 2, "--jpeg_quality", 60)[0] == 0
    small = img_downsample.downsample(load_rgb(folder / "a.png"), 2, "bicubic")
    assert (load_rgb(tmp_path / "lr" / "a.png") == jpeg(small, 60)).all()


def test_profile_exif_and_alpha_are_kept(call, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010F] = "camera"
    alpha = np.full((32, 48), 128, np.uint8)
    write(tmp_path / "in" / "a.png", np.dstack([photograph(size=(32, 48)), alpha]), icc_profile=profile, exif=exif)
    assert call("--factor", 2)[0] == 0
    image = Image.open(tmp_path / "lr" / "a.png")
    assert image.info["icc_profile"] == profile and image.getexif()[0x010F] == "camera"
    assert image.mode == "RGBA" and (np.asarray(image)[..., 3] == 128).all()


def test_files_that_fail_are_listed_and_the_others_are_done(call, folder, tmp_path):
    write(folder / "tiny.png", photograph(size=(3, 40)))
    write(folder / "large.png", photograph(size=(70, 70)))
    (folder / "text.png").write_text("no image")
    code, out, err = call("--max_pixels", 4000)
    assert code == 1 and "2 written, 3 failed" in out
    assert "3 px is smaller than --factor 4" in err and "--max_pixels" in err and "text.png" in err


@pytest.mark.parametrize("flags, words", [
    (["--factor", 1], "--factor 1"), (["--noise_level", "2"], "--noise_level"),
    (["--jpeg_quality", "0"], "--jpeg_quality"), (["--seed", -1], "--seed -1"), (["--max_pixels", 0], "--max_pixels 0"),
    (["--save_clean", "hr"], "add --crop_to_multiple"),
])
def test_bad_flags_are_one_line(call, folder, flags, words):
    code, _, err = call(*flags)
    assert code == 2 and words in err and err.count("\n") == 1


@pytest.mark.parametrize("file", ["hr/a.png", "lr/sub/b.png", "lr/downsample.json", "lr/failures.json",
                                  "lr/outputs.json", "hr/outputs.json"])
def test_a_file_that_was_not_made_here_stays_and_nothing_is_written(call, folder, tmp_path, file):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text('["mine"]')
    code, _, err = call("--crop_to_multiple", "--save_clean", tmp_path / "hr")
    assert code == 2 and err.count("\n") == 1 and f"{file} would be written over, and was not made here" in err
    assert [path.read_text() for path in tmp_path.glob("[hl]r/**/*") if path.is_file()] == ['["mine"]']


def test_images_of_another_input_keep_their_pairs_though_they_have_the_same_names(call, folder, tmp_path):
    flags = ["--crop_to_multiple", "--save_clean", tmp_path / "hr"]
    assert call(*flags)[0] == 0
    first = [load_rgb(tmp_path / name / "a.png") for name in ("lr", "hr")]
    write(tmp_path / "other" / "a.png", photograph("coffee", (50, 66)))
    code, _, err = call(*flags, "--input", tmp_path / "other")
    assert code == 2 and f"was made from {folder}" in err and err.count("\n") == 1
    code, _, err = call(*flags, "--input", tmp_path / "other", "--output", tmp_path / "lr2")
    assert code == 2 and f"{tmp_path / 'hr' / 'a.png'} would be written over, and was made from {folder}/a.png" in err
    assert not (tmp_path / "lr2" / "outputs.json").exists()
    for name, image in zip(("lr", "hr"), first, strict=True):
        assert (load_rgb(tmp_path / name / "a.png") == image).all()


def test_a_run_that_was_stopped_may_be_repeated(call, folder, tmp_path, monkeypatch):
    written = []

    def stop(path, *rest):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        save_image(path, *rest)

    monkeypatch.setattr(img_downsample, "save_image", stop)
    with pytest.raises(KeyboardInterrupt):
        call()
    assert written[0].exists() and not (tmp_path / "lr" / "downsample.json").exists()
    monkeypatch.undo()
    assert call()[0] == 0


def test_outputs_never_replace_inputs_or_one_another(call, folder, tmp_path):
    code, _, err = call("--crop_to_multiple", "--save_clean", tmp_path / "lr")
    assert code == 2 and "--save_clean" in err and "is --output itself" in err
    code, _, err = call("--crop_to_multiple", "--save_clean", folder)
    assert code == 2 and "--input itself" in err
    assert to_tensor(load_rgb(folder / "a.png")).shape == (3, 50, 66)

"""PairEdit's evaluation: known edits, what their scores mean at the limits, and the tables and plots of a folder."""

import csv
import math
import shutil

import numpy as np
import pytest
import torch

from my_dataset.images import load_rgb, save_image
from recipes.pairedit import make_pairs
from recipes.pairedit.edits import EDITS, luminance
from recipes.pairedit.eval_scripts import clip_score, evaluate, known_edits, lpip_score
from recipes.pairedit.pairs import find_pairs
from recipes.pairedit.pictures import file_stem, write_slide
from tests.conftest import photograph
from tests.test_metrics import write_backbone
from utils.parse import run_main
from utils.utils import to_uint8

SIDE_PX = 64
SCALES = (0.0, 0.25, 0.5, 1.0)
LORA = "warm_vtrain_image_4.0eta_1.0ns_full_base_v1"


def photo(name="astronaut"):
    """(1, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(photograph(name, (SIDE_PX, SIDE_PX)).copy()).movedim(-1, 0)[None] / 255


def slide(edit, scales=SCALES, image=None):
    """(S, 3, 64, 64): an image that goes straight to its edited self."""
    image = photo() if image is None else image
    return torch.cat([image + scale * (edit.apply(image) - image) for scale in scales])


def write_images(folder, edit="warm", seeds=(6000, 6001), skip=10, scales=SCALES, lora=LORA, dataset="warm"):
    """What generation would write for a perfect slider, as PNG files."""
    for seed, name in zip(seeds, ("astronaut", "chelsea"), strict=False):
        target = folder / dataset / lora / "origin" / str(seed)
        target.mkdir(parents=True, exist_ok=True)
        for scale, image in zip(scales, slide(EDITS[edit], scales, photo(name)), strict=True):
            path = target / f"{seed}_{dataset}_skip{skip}_500epoch_scale{scale:.2f}_image_of_a_person.png"
            save_image(path, to_uint8(image * 2 - 1))
    return folder


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(folder, output, *options):
    evaluate.main(evaluate.parse_args(["--images", str(folder), "--output", str(output), *map(str, options)]))


# --- known edits ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", EDITS)
def test_an_edit_keeps_shape_and_range_and_moves_its_attribute(name):
    images = torch.cat([photo(), photo("chelsea")])
    edited = EDITS[name].apply(images)
    assert edited.shape == images.shape and edited.min() >= 0 and edited.max() <= 1
    mask = [EDITS[name].mask(images)] if EDITS[name].mask else []
    change = EDITS[name].attribute(edited, *mask) - EDITS[name].attribute(images, *mask)
    assert change.shape == (2,)
    assert (change > 0.02).all() if name in ("warm", "glow") else (change < -0.02).all()


@pytest.mark.parametrize("name", ["warm", "gray", "dark", "glow"])
def test_a_perfect_slider_reaches_as_much_of_the_edit_as_its_scale_says(name):
    scores = known_edits.measure(slide(EDITS[name]), EDITS[name])
    assert scores["edit_share"] == pytest.approx(SCALES, abs=1e-5)
    assert known_edits.monotonicity(SCALES, scores["edit_share"]) == pytest.approx({"linear": 1, "spearman": 1})


def test_the_attributes_are_what_they_are_called():
    colour = torch.tensor([0.8, 0.5, 0.1]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    attributes = {name: edit.attribute(colour, *([torch.rand(1, 1, 32, 32)] if edit.mask else [])).item()
                  for name, edit in EDITS.items()}
    assert attributes["warm"] == pytest.approx(0.7) and attributes["glow"] == pytest.approx(0.7)
    assert attributes["gray"] == pytest.approx(0.7)
    assert attributes["dark"] == pytest.approx(0.299 * 0.8 + 0.587 * 0.5 + 0.114 * 0.1)
    stripes = torch.tensor([0.0, 0.5]).repeat(16).expand(1, 3, 32, 32)
    assert EDITS["blur"].attribute(stripes).item() == pytest.approx(math.log(0.25), abs=1e-5)


def test_a_glow_colours_what_is_bright_and_leaves_the_dark_alone():
    image = torch.cat([torch.full((1, 3, 32, 32), 0.1), torch.full((1, 3, 32, 32), 0.9)], dim=-1)
    glowing, mask = EDITS["glow"].apply(image), EDITS["glow"].mask(image)
    assert mask.shape == (1, 1, 32, 64) and mask[..., 0].max() < 1e-3 and mask[..., -1].min() > 0.99
    scores = known_edits.measure(torch.cat([image, glowing]), EDITS["glow"])
    assert scores["outside_change"][0] == 0 and scores["outside_change"][1] < 0.01
    brightest = 0.3 * image[..., -1] + 0.7 * torch.tensor([1.0, 0.45, 0.1]).view(3, 1)
    assert (glowing[..., -1] - brightest).abs().max() < 1e-2


def test_outside_change_sees_what_happens_outside_and_nothing_else():
    image = torch.full((1, 3, 32, 32), 0.5)
    mask = torch.linspace(0, 1, 32).view(1, 1, 32, 1).expand(1, 1, 32, 32)
    inside = image + 0.2 * (mask >= known_edits.OUTSIDE)
    outside = image - 0.2 * (mask < known_edits.OUTSIDE)
    changes = known_edits.outside_change(torch.cat([image, inside, outside]), mask)
    assert changes == pytest.approx([0, 0, 0.2])


def test_gradient_correlation_is_1_for_darker_less_for_blurred_and_0_for_another_image():
    image = photo()
    other = torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    same, dark, blurred, noise = known_edits.gradient_correlation(
        torch.cat([image, EDITS["dark"].apply(image), EDITS["blur"].apply(image), other]))
    assert same == pytest.approx(1) and dark == pytest.approx(1)
    assert 0.1 < blurred < 0.8 and abs(noise) < 0.05
    assert math.isnan(known_edits.gradient_correlation(torch.zeros(1, 3, 8, 8))[0])


def test_a_slider_the_wrong_way_has_a_negative_share_and_an_edit_without_effect_has_none():
    scores = known_edits.measure(slide(EDITS["warm"], (0, -1)), EDITS["warm"])
    assert scores["edit_share"] == pytest.approx([0, -1], abs=1e-5)
    gray = EDITS["gray"].apply(photo())
    assert np.isnan(known_edits.measure(slide(EDITS["gray"], image=gray), EDITS["gray"])["edit_share"]).all()


def test_the_share_of_several_images_is_that_of_their_mean():
    share = known_edits.edit_share([[0, 1], [0, 3]], [0, 0], [1, 9])
    assert share.tolist() == pytest.approx([0, 4 / 10])


@pytest.mark.parametrize(("values", "linear", "spearman"), [
    ((0, 0.1, 0.2, 0.4), 1, 1), ((0, -1, -2, -4), -1, -1), ((0, 0, 0.01, 1), 0.88, 0.95),
    ((0, 0, 0, 0), math.nan, math.nan), ((0, 1, math.nan, 2), math.nan, math.nan)])
def test_monotonicity_tells_even_from_uneven_and_nothing_of_a_constant(values, linear, spearman):
    found = known_edits.monotonicity(SCALES, values)
    assert found == pytest.approx({"linear": linear, "spearman": spearman}, abs=0.02, nan_ok=True)


def test_two_scales_say_nothing_of_monotonicity():
    assert np.isnan(list(known_edits.monotonicity((0, 1), (0, 1)).values())).all()


# --- pairs ------------------------------------------------------------------------------------------------------------

def test_make_pairs_writes_datasets_whose_targets_are_the_edits_of_their_sources(tmp_path, capsys):
    make_pairs.main(make_pairs.parse_args(["--edits", "warm", "glow", "--output_folder", str(tmp_path), "--resolution",
                                           "64"]))
    for name in ("warm", "glow"):
        pairs = find_pairs(tmp_path / name)
        assert [source.name for source, _ in pairs] == ["astronaut.png", "chelsea.png", "china.png"]
        for source, target in pairs:
            image = torch.from_numpy(load_rgb(source)).movedim(-1, 0)[None] / 255
            edited = to_uint8(EDITS[name].apply(image) * 2 - 1)[0]
            assert np.abs(edited.astype(int) - load_rgb(target)).max() <= 1  # halves may round either way
            assert image.shape == (1, 3, 64, 64)
    assert "3 pairs" in capsys.readouterr().out


def test_make_pairs_takes_the_first_images_of_a_folder_and_repeats_itself_but_mixes_nothing(photos, tmp_path):
    words = ["--edits", "dark", "--images", str(photos / "train"), "--output_folder", str(tmp_path)]
    make_pairs.main(make_pairs.parse_args([*words, "--count", "2"]))
    make_pairs.main(make_pairs.parse_args([*words, "--count", "2"]))
    assert [source.stem for source, _ in find_pairs(tmp_path / "dark")] == ["photo_0", "photo_1"]
    with pytest.raises(ValueError, match="photo_1.png is not of this command"):
        make_pairs.main(make_pairs.parse_args([*words, "--count", "1"]))
    with pytest.raises(ValueError, match="is a file; name a folder"):
        make_pairs.find_photographs(photos / "train" / "photo_0.png", 1)


def test_make_pairs_writes_over_no_file_that_it_would_not_make(photos, tmp_path):
    """Photographs in the very folder that sources go to: refused at another size, and else left as they are."""
    source = tmp_path / "warm" / "source"
    words = ["--images", str(source), "--output_folder", str(tmp_path), "--resolution"]
    source.mkdir(parents=True)
    save_image(source / "a.png", to_uint8(photo() * 2 - 1)[0])
    photographed = (source / "a.png").read_bytes()
    for edits in (["warm"], ["gray", "warm"]):
        with pytest.raises(ValueError, match="a.png is not of this command"):
            make_pairs.main(make_pairs.parse_args(["--edits", *edits, *words, "32"]))
    assert [path.name for path in tmp_path.rglob("*.*")] == ["a.png"]
    (source / "a.png").write_bytes(photographed + b"a photographer's own bytes")
    make_pairs.main(make_pairs.parse_args(["--edits", "warm", *words, "64"]))
    assert (source / "a.png").read_bytes() == photographed + b"a photographer's own bytes"
    assert load_rgb(tmp_path / "warm" / "target" / "a.png").shape == (64, 64, 3)
    with pytest.raises(ValueError, match="such images"):
        make_pairs.main(make_pairs.parse_args(["--edits", "warm", "--images", str(tmp_path / "warm" / "target"),
                                               "--output_folder", str(tmp_path), "--resolution", "64"]))


# --- files ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "slider", "seed", "prompt", "scale"), [
    ("age/lora/origin/6000/6000_age_skip10_500epoch_scale0.80_image_of_a_person.jpg", ("age", "lora", 500, 10), 6000,
     "image_of_a_person", 0.8),
    ("cat_dragon/lora/origin/7/7_cat_dragon_skip0_1epoch_scale-1.20_a_skip3_2epoch_scale0.50_b.png",
     ("cat_dragon", "lora", 1, 0), 7, "a_skip3_2epoch_scale0.50_b", -1.2),
    ("age/lora/origin/7/7_age_skip-1_1epoch_scale1.00_x.png", ("age", "lora", 1, -1), 7, "x", 1.0),
    ("age/lora/origin/7/7_age_skip0_1epoch_scale1.00.webp", ("age", "lora", 1, 0), 7, "", 1.0),
    ("real/real_610_vtrain_image_real_base_v1/elf/7/7_real_skip14_1500epoch_scale0.20_x.jpg",
     ("real", "real_610_vtrain_image_real_base_v1/elf", 1500, 14), 7, "x", 0.2)])
def test_a_generated_file_says_what_it_is(tmp_path, name, slider, seed, prompt, scale):
    item, found = evaluate.parse_path(tmp_path / name)
    assert (tuple(item.slider), item.seed, item.prompt, found) == (slider, seed, prompt, scale)


@pytest.mark.parametrize("name", ["6000_age_skip10_500epoch_0.00-1.20_image_of_a_person.jpg", "grid.png",
                                  "x_age_skip1_2epoch_scale1.00_a.jpg"])
def test_collages_and_other_pictures_are_no_items(tmp_path, name):
    assert evaluate.parse_path(tmp_path / "a" / "b" / "c" / name) is None


def test_files_as_generation_names_them_are_found(tmp_path):
    folder = tmp_path / "cat_dragon" / LORA / "origin"
    write_slide(folder, "cat_dragon", 6000, 10, 500, SCALES, slide(EDITS["warm"]) * 2 - 1, "image of, a person")
    (item, paths), = evaluate.find_items(tmp_path).items()
    name = file_stem("image of, a person")
    assert item == (("cat_dragon", LORA, 500, 10), 6000, name) and tuple(paths) == SCALES


def test_a_folder_that_cannot_be_scored_gives_one_line(tmp_path, capsys):
    folder = write_images(tmp_path / "gen")
    first, second = (folder / "warm" / LORA / "origin" / str(seed) for seed in (6000, 6001))
    zero, last = (first / f"6000_warm_skip10_500epoch_scale{scale}_image_of_a_person.png" for scale in ("0.00", "1.00"))

    def complain(*options):
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda: run(options[0], tmp_path / "out", *options[1:]))
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1
        return error

    assert "no such file or folder" in complain(tmp_path / "none")
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copy(zero, plain / "cat.png")
    assert "no image is named" in complain(plain)
    last.rename(plain / "last.png")
    assert "other seeds have scale 1.00 too" in complain(folder)
    save_image(last, load_rgb(zero)[:32])
    assert "differ in size" in complain(folder)
    shutil.copy(zero, last)
    shutil.copy(zero, last.with_suffix(".webp"))
    assert "are the same seed and scale" in complain(folder)
    last.with_suffix(".webp").unlink()
    write_images(folder, seeds=(6000,), dataset="gray")
    assert "holds gray, warm; name the folder of one" in complain(folder, "--edit", "warm")
    assert "no such folder" in complain(folder / "warm", "--pairs", tmp_path / "none")
    zero.unlink()
    (second / zero.name.replace("6000", "6001")).unlink()
    assert "no image at scale 0" in complain(folder / "warm")


# --- tables and plots -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Options that name a tiny random CLIP and DINOv2, and a random backbone of LPIPS."""
    from transformers import (
        BitImageProcessor,
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        Dinov2Config,
        Dinov2Model,
    )

    from scripts.make_tiny_kontext import make_tokenizers

    folder = tmp_path_factory.mktemp("networks")
    tokenizer = make_tokenizers()[0]
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
                    "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    vision = small | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder / "clip")
    size = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer).save_pretrained(
        folder / "clip")
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
                             mlp_ratio=1)).save_pretrained(folder / "dino")
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder / "dino")
    return {"--clip_model": folder / "clip", "--dino_model": folder / "dino",
            "--lpips_backbone": write_backbone(folder)[0]}


def flat(options):
    return [word for option in options.items() for word in option]


def one_pair(folder, edit="warm"):
    for side, image in (("source", photo()), ("target", EDITS[edit].apply(photo()))):
        (folder / side).mkdir(parents=True)
        save_image(folder / side / "astronaut.png", to_uint8(image * 2 - 1)[0])
    return folder


def test_every_score_at_its_limits(networks, tmp_path, capsys):
    """The image at scale 1 is the pair's own target, the one at scale 0 its source."""
    folder = write_images(tmp_path / "gen", seeds=(6000,))
    run(folder, tmp_path / "out", *flat(networks), "--pairs", one_pair(tmp_path / "pairs"), "--edit", "warm", "--text",
        "a photo of a person")
    assert "left out" not in capsys.readouterr().out
    rows = read_csv(tmp_path / "out" / "images.csv")
    first, last = rows[0], rows[-1]
    assert [float(row["scale"]) for row in rows] == list(SCALES)
    assert (first["dataset"], first["lora"], first["seed"], first["prompt"]) == ("warm", LORA, "6000",
                                                                                 "image_of_a_person")
    at_zero = {"psnr": 100, "ssim": 1, "lpips": 0, "dino": 1, "clip_strength": 0, "edit_share": 0,
               "gradient_correlation": 1}
    assert {name: float(first[name]) for name in at_zero} == pytest.approx(at_zero, abs=1e-5)
    assert first["clip_directional"] == ""  # the image has not moved, so it has no direction
    at_one = {"clip_image": 1, "clip_directional": 1, "clip_strength": 1, "edit_share": 1}
    assert {name: float(last[name]) for name in at_one} == pytest.approx(at_one, abs=0.01)
    for name, better in (("psnr", 1), ("ssim", 1), ("dino", 1), ("lpips", -1)):
        values = [better * float(row[name]) for row in rows]
        assert values == sorted(values, reverse=True) and values[0] > values[-1]
    assert all(-100 <= float(row["clip_text"]) <= 100 for row in rows)
    assert {row["measure"] for row in read_csv(tmp_path / "out" / "monotonicity.csv")} == {"edit_share",
                                                                                         "clip_strength"}
    for name in ("strength.png", "preservation.png"):
        assert load_rgb(tmp_path / "out" / name).std() > 5


def test_the_opposite_of_the_pairs_edit_has_direction_minus_1(networks):
    clip = evaluate.load_clip(networks["--clip_model"], "cpu")
    embeddings = evaluate.embed_clip(clip, torch.cat([photo(), EDITS["blur"].apply(photo())]) * 2 - 1)
    assert embeddings.norm(dim=1).tolist() == pytest.approx([1, 1])
    direction = embeddings[0] - embeddings[1]
    scores = evaluate.clip_edit_scores(embeddings, direction, embeddings[:1])
    assert scores["clip_directional"][1] == pytest.approx(-1, abs=1e-4)
    assert scores["clip_strength"] == pytest.approx([0, -1], abs=1e-4)
    assert scores["clip_image"] == pytest.approx([1, float(embeddings[0] @ embeddings[1])], abs=1e-5)


def test_pairs_without_any_edit_are_refused(networks, tmp_path):
    pairs = one_pair(tmp_path)
    shutil.copy(pairs / "source" / "astronaut.png", pairs / "target" / "astronaut.png")
    with pytest.raises(ValueError, match="the same as its sources"):
        evaluate.pair_embeddings(evaluate.load_clip(networks["--clip_model"], "cpu"), pairs)


def test_metrics_without_weights_are_left_out_with_a_line_each_and_the_others_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    nowhere = {"--clip_model": "no-such/clip", "--dino_model": tmp_path}
    run(write_images(tmp_path / "gen"), tmp_path / "out", *flat(nowhere), "--pairs", one_pair(tmp_path / "pairs"))
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in said if "left out" in line] == ["LPIPS", "DINO", "CLIP"]
    assert said[-1].startswith("No edit strength, no plots")
    rows = read_csv(tmp_path / "out" / "images.csv")
    assert len(rows) == 8 and {"psnr", "ssim"} <= rows[0].keys()
    assert not {"lpips", "dino", "clip_image"} & rows[0].keys()
    assert not (tmp_path / "out" / "strength.png").exists()


def test_weights_of_another_model_are_refused_and_not_drawn_at_random(networks):
    with pytest.raises(ValueError, match="of type dinov2, not a CLIPModel"):
        evaluate.load_clip(networks["--dino_model"], "cpu")


def test_the_summary_is_mean_and_deviation_over_seeds_per_scale_and_skip(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    write_images(tmp_path / "gen")
    write_images(tmp_path / "gen", skip=20, scales=(0, 0.5))
    run(tmp_path / "gen", tmp_path / "out", "--edit", "warm", "--dino_model", tmp_path)
    images, rows = (read_csv(tmp_path / "out" / f"{name}.csv") for name in ("images", "summary"))
    assert [(row["skip"], float(row["scale"]), row["images"]) for row in rows] == [
        *(("10", scale, "2") for scale in SCALES), ("20", 0, "2"), ("20", 0.5, "2")]
    for row in rows:
        values = [float(image["psnr"]) for image in images
                  if (image["skip"], image["scale"]) == (row["skip"], row["scale"])]
        assert float(row["psnr_mean"]) == pytest.approx(np.mean(values))
        assert float(row["psnr_std"]) == pytest.approx(np.std(values))
    curves = {(row["skip"], row["seed"]): row for row in read_csv(tmp_path / "out" / "monotonicity.csv")}
    assert set(curves) == {(skip, seed) for skip in ("10", "20") for seed in ("mean", "6000", "6001")}
    for seed in ("mean", "6000", "6001"):
        assert [float(curves["10", seed][name]) for name in ("linear", "spearman", "at_1")] == pytest.approx(
            [1, 1, 1], abs=0.01)
        assert curves["20", seed]["linear"] == curves["20", seed]["at_1"] == ""
    assert "CLIP left out: it needs --pairs or --text" in capsys.readouterr().out


def test_a_slider_that_also_goes_backwards_is_still_compared_with_scale_0(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    write_images(tmp_path / "gen", "dark", scales=(-0.5, 0, 0.5, 1))
    run(tmp_path / "gen", tmp_path / "out", "--edit", "dark", "--dino_model", tmp_path)
    rows = read_csv(tmp_path / "out" / "images.csv")[:4]
    assert [float(row["scale"]) for row in rows] == [-0.5, 0, 0.5, 1]
    assert [float(row["psnr"]) == 100 for row in rows] == [False, True, False, False]
    assert float(rows[0]["edit_share"]) < -0.2 and float(rows[1]["edit_share"]) == 0
    mean = next(row for row in read_csv(tmp_path / "out" / "monotonicity.csv") if row["seed"] == "mean")
    assert float(mean["at_1"]) == pytest.approx(1, abs=0.01)


def test_the_scripts_of_concept_sliders_names_write_the_same_numbers(networks, tmp_path):
    folder = write_images(tmp_path / "gen", seeds=(6000,))
    run(folder, tmp_path / "out", *flat(networks), "--text", "a photo")
    expected = [float(row["clip_text"]) for row in read_csv(tmp_path / "out" / "images.csv")]
    table = tmp_path / "clip_scores.csv"
    clip_score.main(clip_score.parse_args(["--im_path", str(folder), "--prompt", "a photo", "--output", str(table),
                                           "--clip_model", str(networks["--clip_model"])]))
    assert [float(row["clip"]) for row in read_csv(table)] == pytest.approx(expected, abs=1e-4)
    table = tmp_path / "lpips_score.csv"
    lpip_score.main(lpip_score.parse_args(["--im_path", str(folder), "--output", str(table), "--lpips_backbone",
                                           str(networks["--lpips_backbone"])]))
    rows = read_csv(table)
    assert [(row["case_number"], float(row["scale"])) for row in rows] == [("6000", scale) for scale in SCALES]
    values = [float(row["lpips"]) for row in rows]
    assert values[0] == 0 and values == sorted(values) and values[-1] > 0


def test_lpips_without_weights_advises_nothing_that_the_command_lacks(tmp_path):
    words = ["--im_path", str(write_images(tmp_path)), "--lpips_backbone", str(tmp_path / "none.pth")]
    with pytest.raises(ValueError, match=r"put it at .*none.pth, or name it by --lpips_backbone$"):
        lpip_score.main(lpip_score.parse_args(words))
    with pytest.raises(ValueError) as refused:
        run(tmp_path, tmp_path / "out", *words[2:])
    assert "none.pth" in str(refused.value) and "--metrics" not in str(refused.value)


def test_luminance_of_grey_is_its_value():
    assert luminance(torch.full((1, 3, 2, 2), 0.3)).flatten().tolist() == pytest.approx([0.3] * 4)


def test_the_hub_is_asked_once_and_only_for_what_the_cache_has_not(monkeypatch):
    asked, model = [], torch.nn.Linear(1, 1)

    def read(kind, processor, name, local_files_only):
        if local_files_only and name == "new":
            raise evaluate.MissingWeights(name)
        return model, local_files_only

    monkeypatch.setattr(evaluate, "read_embedder", read)
    monkeypatch.setattr(evaluate.huggingface_hub, "model_info", lambda name, timeout: asked.append(name))
    assert evaluate.load_clip("cached", "cpu") == (model, True) and asked == []
    assert evaluate.load_clip("new", "cpu") == (model, False) and asked == ["new"]

"""The inference scripts: plain Kontext, with a LoRA, on degraded photographs, and the enhancement demo."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from my_dataset.dataset_deg_paired import DEGRADATION_STREAM, heldout_seed, item_rng, item_seed, to_tensor
from my_dataset.degradations import make_degrader, resize
from scripts import demo_enhance_image, test_kontext, test_kontext_deg, test_kontext_withlora
from tests.conftest import photograph
from utils import flux, lora, metrics, session
from utils.generate import generate
from utils.parse import run_main
from utils.restore import STOCK_SETTINGS, restore
from utils.utils import to_uint8

IMAGE = photograph(size=(32, 48))
pytestmark = pytest.mark.usefixtures("models_load_once")


@pytest.fixture
def call(tiny_model, tmp_path, capsys):
    """call(script, *flags) runs it in this process and returns (exit code, stdout, stderr)."""

    def run(script, *flags, output="out"):
        argv = ["--pretrained_model_name_or_path", tiny_model, "--output", str(tmp_path / output),
                "--max_sequence_length", "16", "--num_inference_steps", "2"]
        with pytest.raises(SystemExit) as exit_:
            run_main(lambda: script.main(script.parse_args([*argv, *map(str, flags)])))
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def generation_lora(tiny_lora, tmp_path_factory):
    """Folder of a LoRA for tiny_model that was trained from pure noise, at 48 px."""
    return write_lora(tmp_path_factory.mktemp("lora"), tiny_lora, start_noise=[1.0, 1.0], guidance_scale=3.0,
                      prompt="a sks dog", max_sequence_length=12, resolution=48)


def write_lora(folder, source, **changes):
    """A copy of a LoRA file with other settings, or without any."""
    with safe_open(lora.find_file(source), "pt") as file:
        header = file.metadata()
    settings = json.loads(header.pop(lora.SETTINGS_KEY))
    header |= {lora.SETTINGS_KEY: json.dumps(settings | changes)} if changes else {}
    save_file(load_file(lora.find_file(source)), folder / lora.LORA_FILE, metadata=header)
    return folder


def write(path, array=IMAGE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def names(folder):
    return {path.name for path in folder.iterdir()}


def expected(model, prompt, references, height, width, seed, guidance=2.5, length=16, lora_file=None):
    """What utils.generate makes, as 8-bit pixels."""
    text = flux.encode_prompts(model, [prompt], "cpu", torch.float32, length)[prompt]
    pipe = flux.load_models(model, "cpu", torch.float32)
    if lora_file:
        lora.load(pipe, lora_file)
    settings = STOCK_SETTINGS | {"guidance_scale": guidance}
    return to_uint8(generate(pipe, text, references, settings, 2, height, width, [seed])[0])


# ---- scripts.test_kontext ----


def test_text_to_image_equals_generate_for_each_seed(call, tiny_model, tmp_path):
    size = ["--height", 40, "--width", 56]
    assert call(test_kontext, "--prompt", "a cat", *size, "--seed", 3, "--num_images", 2)[0] == 0
    assert names(tmp_path / "out") == {"text_56x40_0.png", "text_56x40_1.png", "text_56x40_grid.png", "text_56x40.json"}
    for i in range(2):
        pixels = expected(tiny_model, "a cat", [], 40, 56, 3 + i)
        assert (read(tmp_path / "out" / f"text_56x40_{i}.png") == pixels).all()
    described = json.loads((tmp_path / "out" / "text_56x40.json").read_text())
    assert [image["seed"] for image in described["images"]] == [3, 4]
    assert (described["steps"], described["settings"]["guidance_scale"], described["references"]) == (2, 2.5, [])
    assert described["settings"]["prompt"] == "a cat" and described["arguments"]["seed"] == 3


def test_text_to_image_without_a_size_is_a_square_of_resolution(call, tmp_path):
    assert call(test_kontext, "--prompt", "a cat", "--resolution", 32)[0] == 0
    assert Image.open(tmp_path / "out" / "text_32x32_0.png").size == (32, 32)


def test_edits_see_every_reference_and_take_the_first_ones_size(call, tiny_model, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    paths = [write(tmp_path / "a.png", icc_profile=profile), write(tmp_path / "b.jpg", photograph("coffee", (24, 40)))]
    references = [to_tensor(read(path))[None] for path in paths]
    flags = ["--prompt", "mix", "--guidance_scale", 4]
    assert call(test_kontext, *flags, "--image", *paths)[0] == 0
    written = tmp_path / "out" / "a_48x32_0.png"
    assert (read(written) == expected(tiny_model, "mix", references, 32, 48, 0, guidance=4)).all()
    assert Image.open(written).info["icc_profile"] == profile
    grid = Image.open(tmp_path / "out" / "a_48x32_grid.png")
    assert grid.size[0] == 4 + 3 * 260  # two references and the result
    assert call(test_kontext, *flags, "--image", paths[0], "--height", 20, "--width", 30)[0] == 0
    pixels = expected(tiny_model, "mix", references[:1], 20, 30, 0, guidance=4)
    assert (read(tmp_path / "out" / "a_30x20_0.png") == pixels).all()


def test_large_references_are_shrunk_to_the_area_of_resolution(call, tiny_model, tmp_path):
    path = write(tmp_path / "a.png", photograph(size=(60, 120)))
    assert call(test_kontext, "--prompt", "mend", "--image", path, "--resolution", 40)[0] == 0
    small = to_tensor(resize(read(path), 28, 57, "lanczos"))[None]  # 28 * 57 is about 40 * 40, at 1 : 2
    assert (read(tmp_path / "out" / "a_57x28_0.png") == expected(tiny_model, "mend", [small], 28, 57, 0)).all()


REFUSED = [
    ([], ["--prompt is needed"]),
    (["--prompt", "a", "--height", 32], ["--height and --width"]),
    (["--prompt", "a", "--height", 8, "--width", 32], ["--height 8", "16 or more"]),
    (["--prompt", "a", "--resolution", 0], ["--resolution 0"]),
    (["--prompt", "a", "--num_images", 0], ["--num_images 0"]),
    (["--prompt", "a", "--num_inference_steps", 0], ["--num_inference_steps 0"]),
    (["--prompt", "a", "--guidance_scale", "nan"], ["--guidance_scale nan"]),
    (["--prompt", "a", "--max_sequence_length", 513], ["--max_sequence_length 513"]),
    (["--prompt", "a", "--seed", -1], ["--seed -1"]),
    (["--prompt", "a", "--vae_encode_mode", "sample"], ["--vae_encode_mode sample"]),
    (["--prompt", "a", "--dtype", "bf16", "--device", "cpu"], ["--dtype bf16", "fp32"]),
    (["--prompt", "a", "--image", "nowhere.png"], ["nowhere.png"]),
    (["--prompt", "a", "--pretrained_model_name_or_path", "./none"], ["--pretrained_model_name_or_path ./none"]),
]


@pytest.mark.parametrize("flags, words", REFUSED)
def test_bad_input_of_generation_is_one_line_before_a_model_loads(call, generation_lora, monkeypatch, flags, words):
    monkeypatch.setattr(session.flux, "load_models", None)
    monkeypatch.setattr(session.flux, "encode_prompts", None)
    scripts = {test_kontext: [], test_kontext_withlora: ["--lora", generation_lora]}
    for script, more in scripts.items():
        if script is test_kontext_withlora and not flags:
            continue  # its prompt is stored
        code, _, err = call(script, *flags, *more)
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert code == 2 and len(errors) == 1 and all(word in errors[0] for word in words), err


# ---- scripts.test_kontext_withlora ----


def test_base_and_lora_are_drawn_from_one_seed_with_the_loras_settings(call, tiny_model, generation_lora, tmp_path):
    path = write(tmp_path / "a.png")
    argv = ["--pretrained_model_name_or_path", tiny_model, "--output", str(tmp_path / "out"), "--image", str(path),
            "--num_inference_steps", "2", "--lora", str(generation_lora), "--seed", "5"]
    test_kontext_withlora.main(test_kontext_withlora.parse_args(argv))  # without --max_sequence_length
    reference = [to_tensor(IMAGE)[None]]
    for column, file in (("base", None), ("lora", generation_lora)):
        pixels = expected(tiny_model, "a sks dog", reference, 32, 48, 5, 3.0, 12, file)
        assert (read(tmp_path / "out" / f"a_48x32_0_{column}.png") == pixels).all()
    assert (read(tmp_path / "out" / "a_48x32_0_base.png") != read(tmp_path / "out" / "a_48x32_0_lora.png")).any()
    described = json.loads((tmp_path / "out" / "a_48x32.json").read_text())
    assert described["lora"]["weight"] == 1 and described["settings"]["prompt"] == "a sks dog"
    assert [image["file"] for image in described["images"]] == ["a_48x32_0_base.png", "a_48x32_0_lora.png"]


def test_the_loras_settings_give_way_to_the_command_line_and_weight_0_is_the_base(call, tiny_model, generation_lora,
                                                                                  tmp_path):
    flags = ["--lora", generation_lora, "--prompt", "a cat", "--guidance_scale", 2, "--lora_weight", 0]
    assert call(test_kontext_withlora, *flags)[0] == 0  # 48 px: the side it was trained at
    pixels = expected(tiny_model, "a cat", [], 48, 48, 0, guidance=2)
    for column in ("base", "lora"):
        assert (read(tmp_path / "out" / f"text_48x48_0_{column}.png") == pixels).all()


def test_a_lora_trained_below_start_noise_1_is_sent_to_the_test_script(call, tiny_lora, tmp_path, monkeypatch):
    monkeypatch.setattr(session.flux, "load_models", None)
    code, _, err = call(test_kontext_withlora, "--lora", tiny_lora)
    assert code == 2 and "from start noise 0.5" in err and "test_deg_lora_flux_kontext.py" in err
    code, _, err = call(test_kontext_withlora, "--prompt", "a")
    assert code == 2 and "--lora is needed" in err
    (tmp_path / "bare").mkdir()
    code, _, err = call(test_kontext_withlora, "--lora", write_lora(tmp_path / "bare", tiny_lora))
    assert code == 2 and "--prompt is needed" in err and "stores none" in err


def test_a_second_run_writes_over_nothing(call, tmp_path):
    for seed in (0, 1):
        call(test_kontext, "--prompt", "a cat", "--height", 32, "--width", 32, "--seed", seed)
    assert {"text_32x32_0.png", "text_32x32-2_0.png", "text_32x32.json", "text_32x32-2.json"} < names(tmp_path / "out")
    assert (read(tmp_path / "out/text_32x32_0.png") != read(tmp_path / "out/text_32x32-2_0.png")).any()


def test_a_subject_lora_is_refused_for_restoring_and_its_number_of_references_is_remembered(
        call, generation_lora, folder, tmp_path):
    (tmp_path / "subject").mkdir()
    path = write_lora(tmp_path / "subject", generation_lora, reference_tokens=False, references=0)
    code, _, err = call(test_kontext_deg, "--input", folder, "--lora", path)
    assert code == 2 and "scripts.test_kontext_withlora" in err and err.count("\n") == 1
    write(tmp_path / "a.png")
    code, _, err = call(test_kontext_withlora, "--lora", path, "--image", tmp_path / "a.png")
    assert code == 0 and "trained with 0 references an image, and --image names 1" in err


def test_the_base_column_has_the_base_models_clip_and_the_lora_column_the_trained_one(call, tiny_model, tmp_path):
    pipe = flux.load_models(tiny_model, "cpu", torch.float32)
    _, text_encoder = flux.load_text_encoder(tiny_model, "cpu", torch.float32)
    lora.attach(pipe.transformer, rank=2)
    for parameter in lora.attach(text_encoder, rank=2, layers=lora.CLIP_LAYERS):
        parameter.data.normal_(generator=torch.Generator().manual_seed(len(parameter)))
    path = lora.save(pipe.transformer, tmp_path / "clip", STOCK_SETTINGS | {"references": 0}, text_encoder)
    code, _, _ = call(test_kontext_withlora, "--lora", path, "--prompt", "a cat", "--height", 32, "--width", 32)
    assert code == 0 and lora.has_text_part(path)
    base = read(tmp_path / "out/text_32x32_0_base.png")
    assert (base == expected(tiny_model, "a cat", [], 32, 32, 0)).all()
    assert (base != read(tmp_path / "out/text_32x32_0_lora.png")).any()


def test_nan_and_gpu_out_of_memory_are_one_line_with_the_cure(call, generation_lora, tmp_path, monkeypatch):
    flags = ["--lora", generation_lora, "--resolution", 32]
    code, _, err = call(test_kontext_withlora, *flags, "--lora_weight", 1e30)
    assert code == 2 and "NaN" in err and "--lora_weight" in err

    def exhaust(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(session, "generate", exhaust)
    code, _, err = call(test_kontext_withlora, *flags)
    assert code == 2 and "32x32 px: out of GPU memory; use --dtype bf16, a smaller --resolution" in err
    assert not list((tmp_path / "out").iterdir())


# ---- scripts.test_kontext_deg ----


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "in" / "a.png", photograph(size=(40, 56)))
    write(tmp_path / "in" / "sub" / "b.png", photograph("coffee", (48, 40)))
    return tmp_path / "in"


def test_degraded_and_restored_are_what_degrader_and_restore_make(call, tiny_model, tiny_lora, folder, tmp_path):
    damage = ["--degradation_types", "noise,jpeg", "--noise_level", "0.05-0.2", "--jpeg_quality", "50"]
    assert call(test_kontext_deg, "--input", folder, *damage, "--lora", tiny_lora, "--seed", 4)[0] == 0
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    text = flux.encode_prompts(tiny_model, [STOCK_SETTINGS["prompt"]], "cpu", torch.float32, 16)
    pipe = flux.load_models(tiny_model, "cpu", torch.float32)
    lora.load(pipe, tiny_lora)
    degrade = make_degrader("noise,jpeg", noise_level="0.05-0.2", jpeg_quality=50)
    for index, name in enumerate(("a", "sub/b")):
        clean = read(folder / f"{name}.png")
        degraded, params = degrade(clean, item_rng(heldout_seed(4), 0, index, DEGRADATION_STREAM))
        control, target = to_tensor(degraded)[None], to_tensor(clean)[None]
        restored = restore(pipe, control, text[STOCK_SETTINGS["prompt"]], lora.read_settings(tiny_lora), 2,
                           [item_seed(4, 0, index)])
        for kind, pixels in (("original", clean), ("degraded", degraded), ("restored", to_uint8(restored[0]))):
            assert (read(tmp_path / "out" / f"{name}_{kind}.png") == pixels).all(), kind
        said = report["images"][index]
        assert said["degradation"] == params
        assert said["psnr_degraded"] == pytest.approx(metrics.psnr(control, target).item())
        assert said["psnr_restored"] == pytest.approx(metrics.psnr(restored, target).item())
    assert Image.open(tmp_path / "out" / "grid.png").size[0] == 4 + 3 * 260
    assert report["run"]["sampled_start_noise"] == 0.5


def test_base_kontext_restores_crops_and_tiles_of_large_images(call, folder, tmp_path):
    damage = ["--input", folder, "--degradation_types", "noise"]
    assert call(test_kontext_deg, *damage, "--crop_px", 32, "--grid_images", 0)[0] == 0
    clean = read(folder / "a.png")[4:36, 12:44]
    assert (read(tmp_path / "out" / "a_original.png") == clean).all()
    assert read(tmp_path / "out" / "a_restored.png").shape == (32, 32, 3)
    assert not (tmp_path / "out" / "grid.png").exists()
    assert call(test_kontext_deg, *damage, "--tile", 32, "--tile_overlap", 16, output="tiles")[0] == 0
    report = json.loads((tmp_path / "tiles" / "results.json").read_text())
    assert report["images"][0]["tiles_used"] == {"tile": 32, "tile_overlap": 16}
    assert report["run"]["lora"] is None and report["run"]["sampled_start_noise"] == 1


def test_photographs_that_fail_are_listed_and_a_run_without_any_is_an_error(call, folder, tmp_path):
    (folder / "c.png").write_bytes(b"text")
    code, out, err = call(test_kontext_deg, "--input", folder, "--crop_px", 48)
    assert code == 2 and "not one image could be restored" in err
    code, out, err = call(test_kontext_deg, "--input", folder, "--max_pixels", 2000)
    assert code == 1 and "1 photographs" in out and "c.png" in err and "--max_pixels" in err
    assert len(json.loads((tmp_path / "out" / "failures.json").read_text())) == 2


@pytest.mark.parametrize("file", ["a_degraded.png", "sub/b_original.png", "grid.png", "results.json", "failures.json"])
def test_degrading_writes_over_nothing_that_it_did_not_make(call, folder, tmp_path, monkeypatch, file):
    monkeypatch.setattr(test_kontext_deg, "load_models", None)
    (tmp_path / "out" / file).parent.mkdir(parents=True)
    (tmp_path / "out" / file).write_text("mine")
    code, _, err = call(test_kontext_deg, "--input", folder)
    assert code == 2 and err.count("\n") == 1 and f"{file} would be written over, and was not made here" in err
    assert (tmp_path / "out" / file).read_text() == "mine"


def test_degrading_again_writes_over_its_own_pictures_but_not_over_those_of_another_input(call, folder, tmp_path):
    flags = ["--degradation_types", "noise", "--crop_px", 32]
    for seed in (1, 2):
        assert call(test_kontext_deg, "--input", folder, *flags, "--seed", seed)[0] == 0
    report = (tmp_path / "out" / "results.json").read_text()
    assert json.loads(report)["arguments"]["seed"] == 2
    write(tmp_path / "other" / "a.png")
    code, _, err = call(test_kontext_deg, "--input", tmp_path / "other", *flags)
    assert code == 2 and f"was made from {folder}" in err and (tmp_path / "out" / "results.json").read_text() == report


@pytest.mark.parametrize("flags, word", [
    (["--noise_level", 7], "--noise_level"), (["--crop_px", -1], "--crop_px -1"), (["--tile", "big"], "--tile big"),
    (["--grid_images", -1], "--grid_images -1"), (["--fidelity", 0.5], "--fidelity 0.5"),
    (["--start_noise", 0.5], "--start_noise 0.5"), (["--input", "nowhere"], "nowhere"),
    (["--max_pixels", 0], "--max_pixels 0"), (["--num_inference_steps", 0], "--num_inference_steps 0"),
])
def test_bad_input_of_restoring_is_one_line_before_a_model_loads(call, folder, monkeypatch, flags, word):
    monkeypatch.setattr(session.flux, "load_models", None)
    monkeypatch.setattr(session.flux, "encode_prompts", None)
    code, _, err = call(test_kontext_deg, "--input", folder, *flags)
    assert code == 2 and word in err and err.count("error:") == 1


# ---- scripts.demo_enhance_image ----


def test_the_demo_enhances_at_the_images_own_size_with_its_prompt_and_guidance(call, tiny_model, folder, tmp_path):
    assert call(demo_enhance_image, "--input", folder, "--seed", 2)[0] == 0
    prompt = "Enhance image clarity and sharpness: ultra high-resolution, ultra-detailed textures, crisp edges."
    control = to_tensor(read(folder / "a.png"))[None]
    text = flux.encode_prompts(tiny_model, [prompt], "cpu", torch.float32, 16)[prompt]
    pipe = flux.load_models(tiny_model, "cpu", torch.float32)
    enhanced = restore(pipe, control, text, STOCK_SETTINGS | {"guidance_scale": 3.5}, 2, [2])
    assert (read(tmp_path / "out" / "a.png") == to_uint8(enhanced[0])).all()
    assert read(tmp_path / "out" / "sub" / "b.png").shape == (48, 40, 3)
    described = json.loads((tmp_path / "out" / "a.png.json").read_text())
    assert described["settings"]["prompt"] == prompt and described["settings"]["guidance_scale"] == 3.5


def test_a_loras_own_prompt_and_guidance_win_over_the_demos(call, tiny_lora, folder, tmp_path):
    write(tmp_path / "a.jpg")
    assert call(demo_enhance_image, "--input", tmp_path / "a.jpg", "--lora", tiny_lora, "--tile", 32)[0] == 0
    described = json.loads((tmp_path / "out" / "a.jpg.json").read_text())
    assert described["settings"]["prompt"] == STOCK_SETTINGS["prompt"]
    assert described["settings"]["guidance_scale"] == 1 and described["sampled_start_noise"] == 0.5
    assert described["tiles_used"]["tile"] == 32
    flags = ["--prompt", "sharpen", "--guidance_scale", 2, "--lora", tiny_lora]
    assert call(demo_enhance_image, "--input", tmp_path / "a.jpg", *flags)[0] == 0
    settings = json.loads((tmp_path / "out" / "a.jpg.json").read_text())["settings"]
    assert (settings["prompt"], settings["guidance_scale"]) == ("sharpen", 2)


def test_the_demo_keeps_profile_and_alpha_and_lists_what_fails(call, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    alpha = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (32, 1))
    write(tmp_path / "in" / "a.png", np.dstack([IMAGE, alpha]), icc_profile=profile)
    write(tmp_path / "in" / "large.png", photograph(size=(64, 64)))
    code, out, err = call(demo_enhance_image, "--input", tmp_path / "in", "--max_pixels", 2000)
    assert code == 1 and "1 enhanced, 1 failed" in out and "large.png" in err
    image = Image.open(tmp_path / "out" / "a.png")
    assert image.info["icc_profile"] == profile and (np.asarray(image)[..., 3] == alpha).all()
    code, _, err = call(demo_enhance_image, "--input", tmp_path / "in", output="in")
    assert code == 2 and "is --input itself" in err

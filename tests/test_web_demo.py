"""The web demo: its jobs, and its page in a real browser (Debian's Chromium, driven by Playwright)."""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import test_deg_lora_flux_kontext as test_script
from my_dataset.images import load_rgb
from scripts import web_demo, web_jobs
from tests.conftest import PROJECT_ROOT, need_for_browser, photograph, save_random_lora
from utils import flux, metrics, restore
from utils.tiles import Tiling, restore_tiled

# What an earlier server that was killed left in --output: an upload and a result.
LEFT = (f"{web_demo.CACHE}/old/photo.png", "jobs/20260101-000000-0/photo_restored.png")
SCRIPT_NAME = "<img src=x onerror=document.title='owned'>.png"


def save(path, side=64, name="astronaut"):
    Image.fromarray(photograph(name, (side, side))).save(path)
    return path


@pytest.fixture(scope="module")
def range_lora(tiny_model, tmp_path_factory):
    """Folder with a LoRA for tiny_model that was trained on start noise 0.2 to 0.8."""
    return save_random_lora(tiny_model, tmp_path_factory.mktemp("range") / "range-lora",
                            {"start_noise": [0.2, 0.8], "guidance_scale": 1.0, "prompt": "<b>bold</b> & sharp"},
                            rank=2, scale=0.1, seed=2)


@pytest.fixture(scope="module")
def text_lora(tiny_model, tmp_path_factory):
    """Folder with a LoRA for tiny_model's transformer and CLIP."""
    return save_random_lora(tiny_model, tmp_path_factory.mktemp("text") / "text-lora", {"start_noise": [0.5, 0.5]},
                            rank=2, scale=1.0, seed=3, with_clip=True)


@pytest.fixture(scope="module")
def demo_args(tiny_model, tiny_lora, range_lora, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    for name in LEFT:
        (output / name).parent.mkdir(parents=True)
        save(output / name)
    return ["--pretrained_model_name_or_path", tiny_model, "--lora", range_lora, tiny_lora, "--output",
            str(output), "--port", "0", "--max_pixels", "300000", "--max_upload_mb", "1",
            "--max_files", "3", "--queue_size", "2"]


def parse(argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: name)  # as if gradio were installed
        return web_demo.parse_args(argv)


@pytest.fixture(scope="module")
def served(demo_args):
    return web_jobs.serve(parse(demo_args))


def controls_for(served, number=0, **changed):
    name = list(served.loras)[number]
    return {"lora": name, "seed": 0} | web_jobs.preset_values(
        served.args, served.loras[name], web_jobs.PRESETS[0]) | changed


def no_tell(done, total):
    pass


# Jobs


@pytest.mark.parametrize("height, width, tiling", [
    (64, 64, Tiling()), (40, 56, Tiling(shifts=2)), (100, 64, Tiling(48, 16)), (70, 90, Tiling(48, None, 2, 4)),
    (48, 48, Tiling(48, None, 1, 2)), (49, 33, Tiling(32, 0, 3)),
])
def test_progress_counts_the_very_calls_of_the_model(tiny_pipe, height, width, tiling):
    settings = restore.STOCK_SETTINGS | {"start_noise": [0.5, 0.5], "max_sequence_length": 16}
    text = flux.TextEmbeds(torch.zeros(1, 4, 16), torch.zeros(1, 16))
    total = web_jobs.model_calls(tiling, height, width, flux.size_multiple(tiny_pipe.vae), steps=2)
    told = []
    with web_jobs.watched(tiny_pipe.transformer, 10**6, lambda done, _: told.append(done)):
        restore_tiled(tiny_pipe, torch.zeros(1, 3, height, width), text, settings, 2, 0, 0.5, tiling)
    assert told == list(range(1, total + 1))


def restore_twice(served, controls, folder, ext="png"):
    """(words of the command line, its output as bytes, the job's, the job's sidecar): a photograph as the page restores
    it, and as the command line that the page shows does."""
    source, output = save(folder / "a photo.png", 72), folder / "web" / f"a photo.{ext}"
    web_jobs.restore_file(served, controls, source, output, no_tell)
    command = web_jobs.command_line(served, controls, source.name, ext)
    assert str(folder) not in command and served.args.pretrained_model_name_or_path not in command

    words = shlex.split(command)
    assert words[:2] == ["python", "test_deg_lora_flux_kontext.py"]
    file = served.loras[controls["lora"]].file
    paths = {"--pretrained_model_name_or_path": served.args.pretrained_model_name_or_path, "--lora": file}
    full = [paths.get(flag, word) for flag, word in zip([""] + words, words, strict=False)]
    with contextlib.chdir(folder):
        test_script.main(test_script.parse_args(full[2:]))
    return (words, (folder / "restored" / output.name).read_bytes(), output.read_bytes(),
            json.loads(output.with_name(f"{output.name}.json").read_text()))


@pytest.mark.parametrize("number, ext, changed", [
    (0, "png", {"start_noise": 0.35, "tile": "32", "token_shifts": 2, "color_fix": "wavelet", "seed": 3}),
    (1, "jpg", {"lora_weight": 0.5, "num_inference_steps": 2}),
])
def test_a_job_gives_what_the_command_line_that_it_shows_gives(served, tmp_path, number, ext, changed):
    controls = controls_for(served, number, **changed)
    _, by_command, by_page, run = restore_twice(served, controls, tmp_path, ext)
    assert by_command == by_page
    assert run["sampled_start_noise"] == controls["start_noise"] and run["lora"]["weight"] == controls["lora_weight"]


SERVED_OPTIONS = ["--prompt", "a cat", "--guidance_scale", "3", "--tile_overlap", "16", "--tile_batch", "2",
                  "--max_sequence_length", "8", "--vae_encode_mode", "sample", "--dtype", "fp32"]


def test_what_the_server_was_started_with_is_on_the_command_line_too(served, demo_args, tmp_path):
    args = parse([*demo_args, *SERVED_OPTIONS, "--max_pixels", "300000000"])
    other = web_jobs.serve(args)
    controls = controls_for(other, tile="32", num_inference_steps=2)
    words, by_command, by_page, _ = restore_twice(other, controls, tmp_path)
    options = dict(zip(words[2:-1], words[3:], strict=True))
    assert {flag: options[flag] for flag in SERVED_OPTIONS[::2]} == dict(
        zip(SERVED_OPTIONS[::2], SERVED_OPTIONS[1::2], strict=True))
    assert by_command == by_page and options["--max_pixels"] == "300000000"
    web_jobs.restore_file(served, controls, tmp_path / "a photo.png", tmp_path / "plain.png", no_tell)
    assert (tmp_path / "plain.png").read_bytes() != by_page

    args = parse([*demo_args, "--revision", "main", "--variant", "fp16", "--cache_dir", "/models", "--compile"])
    command = web_jobs.command_line(served._replace(args=args), controls, "photo.png")
    for words in ("--revision main --variant fp16 --cache_dir models ", " --compile ", " --no-merge_lora "):
        assert words in command
    assert "--prompt" not in command and "--dtype" not in command


@pytest.mark.parametrize("weight", [0, 0.5])
def test_the_weight_reaches_the_text_encoders_part_of_a_lora(demo_args, text_lora, tmp_path, weight):
    served = web_jobs.serve(parse([*demo_args[:2], "--lora", text_lora, "--output", str(tmp_path / "demo")]))
    text, = (lora.text for lora in served.loras.values())
    assert text(weight) is text(weight) and not torch.equal(text(weight).pooled, text(1).pooled)
    _, by_command, by_page, _ = restore_twice(served, controls_for(served, lora_weight=weight), tmp_path)
    assert by_command == by_page


def test_a_lora_without_a_part_for_the_text_encoder_has_its_text_encoded_once(served):
    for each in served.loras.values():
        assert each.text(0) is each.text(1)


def test_a_stopped_job_writes_nothing_and_the_next_is_as_if_it_had_not_been(served, tmp_path):
    source, controls = save(tmp_path / "photo.png"), controls_for(served)

    def restore_to(name, tell):
        web_jobs.restore_file(served, controls, source, tmp_path / name, tell)

    def stop(done, total):
        raise web_jobs.Stopped

    restore_to("first.png", no_tell)
    with pytest.raises(web_jobs.Stopped):
        restore_to("stopped.png", stop)
    restore_to("second.png", no_tell)
    assert not (tmp_path / "stopped.png").exists()
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_one_bad_file_among_many_is_named_and_the_others_are_restored(served, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "notes.png").write_text("no image")
    paths = [save(tmp_path / "one" / "photo.png"), tmp_path / "notes.png", save(tmp_path / "two" / "photo.png", 48)]
    told = []
    rows, archive = web_jobs.restore_files(served, controls_for(served), paths, "jpg", lambda *done: told.append(done))
    assert [str(path) for path, _ in rows] == [str(path) for path in paths]
    assert str(rows[1][1]) == "notes.png: not an image"
    with zipfile.ZipFile(archive) as file:
        assert sorted(file.namelist()) == [
            "1/photo_restored.jpg", "1/photo_restored.jpg.json", "3/photo_restored.jpg", "3/photo_restored.jpg.json",
            "failures.json"]
    assert load_rgb(archive.parent / "3" / "photo_restored.jpg").shape == (48, 48, 3)
    assert [done[0] for done in told] == [0] * 4 + [2] * 4


def test_many_files_that_are_stopped_keep_what_was_done(served, tmp_path):
    paths = [save(tmp_path / f"{i}.png") for i in range(3)]

    def tell(i, done, total):
        if (i, done) == (1, 2):
            raise web_jobs.Stopped

    rows, archive = web_jobs.restore_files(served, controls_for(served), paths, "auto", tell)
    assert [path for path, _ in rows] == paths[:1]
    with zipfile.ZipFile(archive) as file:
        assert sorted(file.namelist()) == ["0_restored.png", "0_restored.png.json"]


def test_scores_are_those_of_the_files_that_are_written(served, tmp_path):
    source = save(tmp_path / "clean.png")
    result, clean, scores, params = web_jobs.score_file(served, controls_for(served), source, "heavy", 5, no_tell)
    folder = result.path.parent
    target = torch.tensor(load_rgb(source) / 127.5 - 1).permute(2, 0, 1)[None]
    for name in ("degraded", "restored"):
        image = torch.tensor(load_rgb(folder / f"clean_{name}.png") / 127.5 - 1).permute(2, 0, 1)[None]
        assert scores[name]["psnr"] == pytest.approx(metrics.psnr(image, target).item(), abs=1e-4)
        assert scores[name]["ssim"] == pytest.approx(metrics.ssim(image, target).item(), abs=1e-5)
    written = json.loads((folder / "clean_restored.png.json").read_text())
    assert written["degradation"] == params and written["scores"] == scores
    assert np.array_equal(np.asarray(clean), load_rgb(source))


def test_without_a_lora_the_base_model_restores(demo_args, tmp_path):
    args = parse([*demo_args[:2], "--output", str(tmp_path), "--num_inference_steps", "2"])
    served = web_jobs.serve(args)
    controls = controls_for(served)
    assert controls["lora"] == "base model alone" and controls["num_inference_steps"] == 2
    web_jobs.restore_file(served, controls, save(tmp_path / "photo.png"), tmp_path / "restored.png", no_tell)
    run = json.loads((tmp_path / "restored.png.json").read_text())
    assert run["lora"] is None and run["settings"] == restore.STOCK_SETTINGS
    assert "--lora " not in web_jobs.command_line(served, controls, "photo.png")


def test_presets_stay_within_what_the_lora_was_trained_on(served):
    wanted = {"Closest to the photograph": 0.2, "Most detail invented": 0.8, "Recommended": 0.5, "Fastest": 0.5}
    for preset, start_noise in wanted.items():
        lora = served.loras["range-lora"]
        values = web_jobs.preset_values(served.args, lora, preset)
        assert values["start_noise"] == pytest.approx(start_noise)
        job = web_jobs.job_args(served, {"lora": "range-lora", "seed": 0} | values)
        assert test_script.resolve_settings(job)[2] == pytest.approx(start_noise)
        fidelity = web_jobs.fidelity_of(lora.settings, start_noise)
        assert restore.fidelity_start_noise(lora.settings, fidelity) == pytest.approx(start_noise)
    assert values["num_inference_steps"] == 1  # of the fastest


@pytest.mark.parametrize("shape, words", [((20, 20_000), "20000x20 px is more than the 0.3 megapixels"),
                                          ((15, 40), "40x15 px is too small")])
def test_photographs_of_impossible_size_are_refused_in_words_for_their_owner(tmp_path, shape, words):
    Image.new("RGB", shape[::-1]).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match=f"^photo.png: {words}"):
        web_jobs.read_photograph(tmp_path / "photo.png", 300_000)


def test_the_bare_command_takes_the_embedded_model_and_its_loras_and_this_machine_alone():
    args = parse([])
    assert (args.pretrained_model_name_or_path, args.lora, args.host) == (
        "assets/tiny-kontext", ["assets/tiny-kontext-deg-lora", "assets/tiny-kontext-old-photo-lora"], "127.0.0.1")


@pytest.mark.parametrize("argv, words", [(["--port", "-1"], "--port"), (["--port", "70000"], "--port 70000: give 0 to"),
                                         (["--max_files", "0"], "--max_files"),
                                         (["--seed", str(2**53)], f"--seed {2**53}: give at most"),
                                         (["--pretrained_model_name_or_path", "./nowhere"], "no such folder")])
def test_senseless_options_are_refused_by_name(argv, words):
    with pytest.raises(ValueError, match=words):
        parse(argv)


def test_a_port_that_is_taken_is_said_before_a_model_loads(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: Address already in use.*; choose another"):
            web_demo.start(parse(["--output", str(tmp_path), "--port", str(port)]))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "2001:db8::1"])
def test_a_foreign_address_is_not_blamed_on_the_port(tmp_path, host):
    with pytest.raises(ValueError, match=f"^--host {host}: .*; name an address of this machine$"):
        web_demo.start(parse(["--output", str(tmp_path), "--host", host, "--port", "0"]))


def test_two_servers_do_not_share_a_folder_and_so_their_uploads(tmp_path):
    web_demo.take(tmp_path)
    upload = tmp_path / web_demo.CACHE / "photo.png"
    upload.parent.mkdir()
    save(upload)
    with pytest.raises(ValueError, match=f"^--output {tmp_path}: another web demo uses it"):
        web_demo.start(parse(["--output", str(tmp_path), "--port", "0"]))
    assert upload.exists()


def test_without_gradio_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="setup_demo.sh"):
        web_demo.parse_args([])


def test_setup_leaves_a_foreign_environment_alone():
    run = subprocess.run(["bash", str(PROJECT_ROOT / "scripts" / "setup_demo.sh")], capture_output=True, text=True,
                         env=os.environ | {"KONTEXT_PYTHON": sys.executable})
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "requirements-demo.txt" in run.stderr


def test_examples_are_made_once_clean_and_degraded(tmp_path):
    first, second = web_jobs.make_examples(tmp_path), web_jobs.make_examples(tmp_path)
    assert first == second and len({example.degraded for example in first}) == len(web_jobs.EXAMPLES)
    for example in first:
        clean, degraded = load_rgb(example.clean), load_rgb(example.degraded)
        assert clean.shape == degraded.shape and max(clean.shape) == web_jobs.EXAMPLE_SIDE_PX
        assert 10 < -10 * np.log10(np.mean((clean / 255.0 - degraded / 255.0) ** 2)) < 30  # dB


# The page


@pytest.fixture(scope="module")
def site(demo_args):
    """The page as the command starts it, as gradio.Blocks."""
    need_for_browser("gradio")
    _, site = web_demo.start(web_demo.parse_args(demo_args))
    yield site
    site.close()


@pytest.fixture
def visit(browser, site):
    """visit() opens the page for a new user. In the end no one has asked another machine for anything."""
    users, asked = [], []

    def open_page():
        users.append(browser.new_context(viewport={"width": 1366, "height": 1000}))
        page = users[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(site.local_url)
        page.get_by_text("Start noise 0.2 to 0.8").wait_for()
        page.wait_for_timeout(200)  # until the LoRA's other values are there too
        return page

    yield open_page
    for user in users:
        user.close()
    assert asked
    assert [url for url in asked if not url.startswith((site.local_url, "data:", "blob:"))] == []


def upload(page, path, where="photo"):
    """Upload a photograph and wait until it is shown."""
    page.locator(f"#{where} input").set_input_files(path)
    page.locator(f"img[src*='image']:below(#{where})").first.wait_for()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def download(page, name, path):
    """Press a download button; the Path of what comes, at `path`."""
    with page.expect_download() as coming:
        page.get_by_role("link", name=name).or_(page.get_by_role("button", name=name)).first.click()
    coming.value.save_as(path)
    return Path(path), coming.value.suggested_filename


def result_folders(site):
    return sorted(Path(site.allowed_paths[0]).glob("*"))


def job_of(site, pixels):
    """The one PNG among all results that holds these pixels."""
    same = [path for folder in result_folders(site) for path in folder.rglob("*.png")
            if np.array_equal(load_rgb(path), pixels)]
    assert len(same) == 1
    return same[0]


def ask(site, path, steps=4, seed=0, damage=None):
    """Ask for a restoration by hand, without the page; gives the address of the answer. damage: instead of restoring,
    the first values after the photograph for degrading and restoring."""
    photo = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
    values = [photo, *(damage or ["auto"]), "range-lora", steps, 0.5, 1, 1, "auto", "off", seed]
    body = json.dumps({"data": values}).encode()
    url = f"{site.local_url}gradio_api/call/{'degrade_and_restore' if damage else 'restore'}"
    with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})) as answer:
        return f"{url}/{json.load(answer)['event_id']}"


def answer_to(site, path, **values):
    with urllib.request.urlopen(ask(site, path, **values), timeout=30) as answer:
        return answer.read().decode()


def test_a_photograph_is_restored_compared_and_downloaded_in_full(visit, site, served, tmp_path):
    page, before = visit(), result_folders(site)
    page.locator(".examples .thumbnail-item").locator("visible=true").first.click()
    page.get_by_text("400 × 267 px").wait_for()  # the coffee of the examples
    page.locator("#photo").get_by_label("Clear").click()
    upload(page, save(tmp_path / "my photo.png", 80))
    assert page.get_by_text("80 × 80 px").count() == 1
    press(page, "Restore")
    page.get_by_text("80 × 80 px, restored in").wait_for()

    folder, = set(result_folders(site)) - set(before)
    file, name = download(page, "Download the full-size result", tmp_path / "downloaded.png")
    written = folder / name
    assert name.endswith("_restored.png") and file.read_bytes() == written.read_bytes()
    expected, _ = web_jobs.restore(served, controls_for(served), load_rgb(tmp_path / "my photo.png"), no_tell)
    assert np.array_equal(load_rgb(file), test_script.to_uint8(expected[0]))

    # The restored picture lies above and is cut off to the left of the line.
    line = page.locator(".outer .inner").locator("visible=true")
    restored = page.locator("img[style*='clip-path']").locator("visible=true")
    box = line.bounding_box()
    x, y, width = box["x"], box["y"] + box["height"] / 2, restored.bounding_box()["width"]
    assert hidden_part(restored) == pytest.approx(50, abs=1)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 0.3 * width, y, steps=5)
    page.mouse.up()
    assert line.bounding_box()["x"] == pytest.approx(x + 0.3 * width, abs=3)
    assert hidden_part(restored) == pytest.approx(80, abs=1)


@pytest.mark.parametrize("first, second", [("bad", "good"), ("good", "bad"), ("good", "none")])
def test_the_preview_is_of_the_last_upload_however_long_an_earlier_one_is_read(visit, tmp_path, monkeypatch, first,
                                                                               second):
    go_on, read = threading.Event(), web_jobs.read_photograph

    def read_first_slowly(path, max_pixels):
        if Path(path).name == "first.png":
            assert go_on.wait(30)
        return read(path, max_pixels)

    def choose(name, kind, side):
        path = tmp_path / name
        if kind == "bad":
            path.write_text("no image")
        else:
            save(path, side)
        upload.locator("input").set_input_files(path)
        upload.get_by_text(path.stem).wait_for()

    monkeypatch.setattr(web_jobs, "read_photograph", read_first_slowly)
    page = visit()
    upload, told = page.locator("#photo"), page.get_by_test_id("toast-text")
    choose("first.png", first, 64)
    page.wait_for_timeout(500)  # until the page has asked for its preview
    upload.get_by_label("Clear").click()
    if second != "none":
        choose("second.png", second, 80)
    page.wait_for_timeout(500)
    go_on.set()
    if "bad" in (first, second):
        told.filter(has_text="not an image").wait_for()
    if second == "good":
        page.get_by_text("80 × 80 px").wait_for()
    page.get_by_text("64 × 64 px").wait_for(state="hidden")
    page.wait_for_timeout(500)
    assert page.get_by_text("64 × 64 px").count() == 0


def hidden_part(picture):
    """Per cent of an image's width that its clip-path hides on the left."""
    return float(re.search(r"clip-path: inset\(0px 0px 0px ([\d.]+)%", picture.get_attribute("style"))[1])


def test_sliders_and_presets_reach_the_result(visit, site, tmp_path):
    page = visit()
    page.get_by_role("button", name="All settings").click()
    fidelity, start_noise = (page.get_by_label(f"number input for {name}") for name in ("Fidelity", "Start noise"))
    page.get_by_text("prompt “<b>bold</b> & sharp”").wait_for()  # as it is written, not as HTML
    assert (fidelity.input_value(), start_noise.input_value()) == ("0.5", "0.5")
    page.get_by_label("Closest to the photograph").check()
    page.wait_for_function("input => input.value === '1'", arg=fidelity.element_handle())
    assert start_noise.input_value() == "0.2" and page.get_by_label("wavelet").is_checked()
    fidelity.fill("0.25")
    page.wait_for_function("input => input.value === '0.65'", arg=start_noise.element_handle())
    start_noise.fill("0.35")
    page.wait_for_function("input => input.value === '0.75'", arg=fidelity.element_handle())
    page.get_by_label("number input for LoRA weight").fill("0.8")
    page.get_by_label("number input for Steps").fill("2.6")
    upload(page, save(tmp_path / "photo.png"))
    press(page, "Restore")
    page.get_by_text("restored in").wait_for()
    file, name = download(page, "Download the full-size result", tmp_path / "downloaded.png")
    run = json.loads(job_of(site, load_rgb(file)).with_name(f"{name}.json").read_text())
    assert (run["sampled_start_noise"], run["lora"]["weight"], run["steps"], run["color_fix"]) == (
        0.35, 0.8, 3, "wavelet")


def test_a_number_that_is_being_typed_is_not_refused_and_the_other_slider_agrees_with_it_in_the_end(visit):
    page = visit()
    page.get_by_role("button", name="All settings").click()
    fidelity, start_noise = (page.get_by_label(f"number input for {name}") for name in ("Fidelity", "Start noise"))
    page.wait_for_function("input => input.value === '0.5'", arg=start_noise.element_handle())  # the LoRA's own
    for slider, other, typed, shown, value in (
            (start_noise, fidelity, "0.35", "0.35", "0.75"),  # 0 is below the least
            (fidelity, start_noise, "0.25", "0.25", "0.65"), (fidelity, start_noise, "5", "1", "0.2"),
            (start_noise, fidelity, "0.5", "0.5", "0.5"), (fidelity, start_noise, "", "0", "0.8")):
        slider.fill("")
        slider.press_sequentially(typed, delay=50)
        page.get_by_text("Settings", exact=True).click()  # leaves the field
        page.wait_for_function("([input, value]) => input.value === value", arg=[other.element_handle(), value])
        assert slider.input_value() == shown
    assert page.get_by_test_id("toast-text").count() == 0


def hostile_files(folder):
    """[(file, part of what the page says)]"""
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("I am a picture")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")  # 400 megapixels in 50 kB
    whole = save(folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / SCRIPT_NAME).write_text("I am a script")
    return [("empty.png", "empty.png: empty file (0 bytes)"), ("text.png", "text.png: not an image"),
            ("bomb.png", "bomb.png: 20000x20000 px is more than the 0.3 megapixels"), ("cut.png", "cut.png: "),
            (SCRIPT_NAME, "not an image")]


def test_hostile_files_and_faults_get_a_friendly_line_and_the_next_job_works(visit, tmp_path, monkeypatch, capfd):
    page = visit()
    for name, words in hostile_files(tmp_path):
        page.locator("#photo input").set_input_files(tmp_path / name)
        told = page.get_by_test_id("toast-text").filter(has_text=words)
        told.first.wait_for()
        assert "Traceback" not in page.content() and str(tmp_path) not in page.content()
        if name == "bomb.png":
            press(page, "Restore")  # all the same
            told.nth(1).wait_for()
        page.locator("#photo").get_by_label("Clear").click()
    assert page.title() == "Photo restoration"
    (tmp_path / "large.png").write_bytes(os.urandom(2**20 + 1))
    page.locator("#photo input").set_input_files(tmp_path / "large.png")
    page.get_by_test_id("toast-text").filter(has_text="exceed the maximum").wait_for()
    hit = page.locator("#photo").evaluate("""area => {
        const box = area.getBoundingClientRect();
        return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2).closest(".wrap:has(> .error)");
    }""")
    assert hit is None  # the next file can be dropped there
    assert "Traceback" not in capfd.readouterr().err

    def refuse(*_):
        raise ValueError("<b>bold</b> is no file")  # raised by the project's own code, and so meant for the user

    def fail(*_):
        raise RuntimeError("the key is under the mat")

    page = visit()
    upload(page, save(tmp_path / "good.png"))
    press(page, "Restore")
    page.get_by_text("restored in").wait_for()
    with monkeypatch.context() as patch:
        patch.setattr(web_jobs, "restore", refuse)
        press(page, "Restore")
        page.get_by_test_id("toast-text").get_by_text("<b>bold</b> is no file").wait_for()
        patch.setattr(web_jobs, "restore", fail)
        press(page, "Restore")
        page.get_by_test_id("toast-text").filter(has_text="Something went wrong here").wait_for()
        assert page.get_by_text("restored in").count() == 0
        assert page.get_by_role("button", name="Download the full-size result").is_disabled()
    assert "under the mat" not in page.content()
    assert "RuntimeError: the key is under the mat" in capfd.readouterr().err
    press(page, "Restore")
    page.get_by_text("restored in").wait_for()


def test_two_users_at_once_get_each_their_own_photograph_through_their_own_lora(visit, site, served, tmp_path,
                                                                                monkeypatch):
    both_pressed, restore_image = threading.Event(), web_jobs.restore_image

    def wait_for_both(*args):
        assert both_pressed.wait(60)
        return restore_image(*args)

    monkeypatch.setattr(web_jobs, "restore_image", wait_for_both)
    first, second = visit(), visit()
    upload(first, save(tmp_path / "first.png", 96))
    press(first, "Restore")
    second.get_by_label("LoRA", exact=True).click()
    second.get_by_role("option", name=list(served.loras)[1]).click()
    second.get_by_text("Start noise 0.5, prompt").wait_for()
    upload(second, save(tmp_path / "second.png", 64, "coffee"))
    press(second, "Restore")
    second.get_by_text("queue: 1/1").wait_for()
    both_pressed.set()
    for number, page, name in ((0, first, "first"), (1, second, "second")):
        page.get_by_text("restored in").wait_for()
        file, _ = download(page, "Download the full-size result", tmp_path / f"of_{name}.png")
        controls, rgb = controls_for(served, number), load_rgb(tmp_path / f"{name}.png")
        expected, _ = web_jobs.restore(served, controls, rgb, no_tell)
        assert np.array_equal(load_rgb(file), test_script.to_uint8(expected[0]))
        assert job_of(site, load_rgb(file)).name == f"{name}_restored.png"


def start_long_job(page, path):
    """Restore with settings that take minutes; waits for the progress."""
    page.get_by_role("button", name="All settings").click()
    page.get_by_label("number input for Steps").fill("50")
    page.get_by_label("8", exact=True).check()  # token shifts
    page.get_by_label("Tile").click()
    page.get_by_role("option", name="128 px").click()
    upload(page, save(path, 512))
    press(page, "Restore")
    page.get_by_text(re.compile(r"step \d+ of \d+, about \d+ s left")).wait_for()


def test_a_job_shows_its_progress_and_ends_when_it_is_stopped_or_its_page_is_closed(visit, site, tmp_path):
    before, page = result_folders(site), visit()
    start_long_job(page, tmp_path / "long.png")
    for _ in range(2):  # --queue_size
        ask(site, tmp_path / "waits.png")
    with pytest.raises(urllib.error.HTTPError, match="503"):
        ask(site, tmp_path / "refused.png")
    press(page, "Stop")
    page.get_by_test_id("toast-text").filter(has_text="Stopped").wait_for()
    press(page, "Restore")
    page.get_by_text(re.compile(r"step \d+ of \d+")).wait_for()
    page.close()
    page = visit()
    upload(page, save(tmp_path / "short.png"))
    press(page, "Restore")
    page.get_by_text("restored in").wait_for()
    folder, = set(result_folders(site)) - set(before)
    assert [path.name for path in sorted(folder.iterdir())] == ["short_restored.png", "short_restored.png.json"]


def test_stop_ends_the_job_of_its_own_tab_also_one_that_waits(visit, site, tmp_path):
    before, page = result_folders(site), visit()
    start_long_job(page, tmp_path / "long.png")
    page.get_by_role("tab", name="Many photographs").click()
    page.locator("#photos input").set_input_files([save(tmp_path / "one.png"), save(tmp_path / "two.png")])
    page.locator("#photos").get_by_text("two").wait_for()
    press(page, "Restore all")
    page.get_by_text("queue: 1/1").wait_for()
    press(page, "Stop")
    page.get_by_role("tab", name="Restore", exact=True).click()
    page.get_by_text(re.compile(r"step \d+ of \d+")).wait_for()  # goes on
    told = page.get_by_test_id("toast-text").filter(has_text="Stopped")
    assert told.count() == 0
    press(page, "Stop")
    told.nth(1).wait_for()
    assert [list(folder.iterdir()) for folder in set(result_folders(site)) - set(before)] in ([], [[]])


def test_on_a_phone_the_page_is_as_wide_as_the_screen(visit):
    page = visit()
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_many_photographs_come_back_as_one_archive(visit, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    save(folder / "in folder.png", 48)
    (folder / "Thumbs.db").write_text("x")
    (folder / ".hidden.png").write_text("x")
    (tmp_path / "notes.png").write_text("no image")
    page = visit()
    page.get_by_role("tab", name="Many photographs").click()
    press(page, "Restore all")
    page.get_by_test_id("toast-text").filter(has_text="up to 3; there are 0").wait_for()
    page.locator("#photos input").set_input_files([save(tmp_path / "photo.png"), tmp_path / "notes.png"])
    page.locator("#folder input").set_input_files(folder)
    page.locator("#folder").get_by_text("Thumbs").wait_for()
    page.locator("#photos").get_by_text("notes").wait_for()
    press(page, "Restore all")
    page.get_by_role("gridcell").get_by_text("failed: not an image").wait_for()
    file, name = download(page, "Download all as a ZIP file", tmp_path / "all.zip")
    with zipfile.ZipFile(file) as archive:
        names = sorted(archive.namelist())
        pictures = [name for name in names if name.endswith(".png")]
        assert sorted(json.loads(archive.read("failures.json")), key=str) == [
            {"input": "notes.png", "reason": "notes.png: not an image"}]
    assert name == "restored.zip" and len(names) == 5 and len(pictures) == 2
    assert page.get_by_role("gridcell").get_by_text("restored", exact=True).count() == 2


def test_a_photograph_is_degraded_restored_and_scored(visit, site, tmp_path):
    page, before = visit(), result_folders(site)
    page.get_by_role("tab", name="Degrade and restore").click()
    page.locator(".examples .thumbnail-item").locator("visible=true").nth(1).click()
    page.locator("#clean").get_by_text("astronaut").wait_for()
    assert page.get_by_label("Damage", exact=True).input_value() == "old_photo"
    page.locator("#clean").get_by_label("Clear").click()
    upload(page, save(tmp_path / "photo.png"), "clean")
    page.get_by_label("Seed of the damage").fill("7")
    press(page, "Degrade and restore")
    page.get_by_text("Damage: ").wait_for()
    folder, = set(result_folders(site)) - set(before)
    run = json.loads((folder / "photo_restored.png.json").read_text())
    assert (run["degradation_seed"], run["degradation_preset"]) == (7, "old_photo")
    for scores in run["scores"].values():
        page.get_by_role("gridcell").filter(has_text=f"{scores['psnr']:.2f}").first.wait_for()
        page.get_by_role("gridcell").filter(has_text=f"{scores['ssim']:.3f}").first.wait_for()


def test_requests_made_by_hand_get_no_foreign_file_and_no_endless_job(site, tmp_path, capfd):
    secret = tmp_path / "secret.png"
    save(secret)
    before = result_folders(site)
    outside = Path(site.allowed_paths[1], "..", "web_demo.lock")
    assert outside.exists()
    for path in (secret, Path(web_demo.__file__), Path("/etc/passwd"), outside):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{site.local_url}gradio_api/file={path}", timeout=10)
        assert refused.value.code in (403, 404)
        assert "event: error" in answer_to(site, path)

    with socket.create_server(("127.0.0.1", 0)) as listener:  # a server that only this machine can reach
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        assert "event: error" in answer_to(site, f"http://127.0.0.1:{port}/photo.png")
        with pytest.raises(TimeoutError):
            listener.accept()

    uploaded = Path(os.environ["GRADIO_TEMP_DIR"], "0", "photo.png")
    uploaded.parent.mkdir()
    save(uploaded)
    assert "event: error" in answer_to(site, uploaded, steps=10**9)
    for values in ({"seed": 2**53}, {"damage": ["heavy", 2**53]}):
        assert f"is greater than maximum value {2**53 - 1}" in answer_to(site, uploaded, **values)
    assert result_folders(site) == before
    assert "event: complete" in answer_to(site, uploaded)

    large = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n" + bytes(2**20 + 1)
    request = urllib.request.Request(f"{site.local_url}gradio_api/upload", large + b"\r\n--x--\r\n",
                                     {"Content-Type": "multipart/form-data; boundary=x"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 413


def test_only_this_machine_can_reach_the_page(site):
    """127.0.0.2 is this machine too: a server that listens on every address answers there."""
    with socket.create_connection(("127.0.0.1", site.server_port), timeout=5):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", site.server_port), timeout=5)


def test_steps_of_the_command_line_beyond_the_sliders_usual_end_can_be_restored_with(demo_args, tmp_path):
    need_for_browser("gradio")
    import gradio

    from scripts import web_page

    served = web_jobs.serve(parse([*demo_args[:2], "--output", str(tmp_path), "--num_inference_steps", "60"]))
    with gradio.Blocks() as page:
        first = web_page.settings_panel(page, served)[1]
    apply = next(function.fn for function in page.fns.values() if function.name == "apply")
    for slider in (first, apply("base model alone", web_jobs.PRESETS[0])[3]):
        assert slider.preprocess(60) == 60


def get(url):
    """HTTP status of a request."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_what_an_earlier_server_left_is_not_served(site, demo_args):
    """demo_args put it there: its uploads are deleted, its results are kept."""
    output = Path(demo_args[demo_args.index("--output") + 1])
    upload, result = output / LEFT[0], output / LEFT[1]
    assert not upload.exists() and result.exists()
    assert [get(f"{site.local_url}gradio_api/file={path}") for path in (upload, result)] == [403, 403]


def test_sigterm_ends_the_page_and_its_job_in_order_and_deletes_the_uploads(served, tmp_path, monkeypatch):
    closed, args = [], parse(["--output", str(tmp_path)])
    page = argparse.Namespace(local_url="", close=lambda verbose: closed.append(verbose))
    served = served._replace(lock=threading.Lock(), running={"session": threading.Event()})
    monkeypatch.setattr(web_demo, "start", lambda _: (served, page))
    upload = tmp_path / web_demo.CACHE / "photo.png"
    upload.parent.mkdir()
    save(upload)
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        web_demo.main(args)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert closed == [False] and list(tmp_path.iterdir()) == []
    assert served.running["session"].is_set() and served.lock.locked()  # so that no job begins any more


def test_an_ipv6_address_can_be_listened_on(site, served):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    from scripts import web_page

    args = argparse.Namespace(**vars(served.args) | {"host": "::1", "port": 0})
    page = web_page.launch(served._replace(args=args), [])
    try:
        assert page.local_url.startswith("http://[::1]:") and get(page.local_url) == 200
    finally:
        page.close()

"""SDEdit on FLUX.1: schedule, equality with stock, pictures from files and addresses, quantisation, results."""

import argparse
import contextlib
import gzip
import json
import math
import shutil
import threading
import time
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from my_dataset.dataset_deg_paired import to_tensor
from my_dataset.images import UnreadableImage
from recipes.flux_img2img import compare_quantised, img2img, pictures, quantised
from tests.conftest import PROJECT_ROOT, photograph
from utils import flux, lora
from utils.metrics import psnr
from utils.parse import run_main
from utils.restore import STOCK_SETTINGS, noise_levels, schedule

TINY = str(PROJECT_ROOT / "assets" / "tiny-kontext")
TINY_OPTIONS = ["--pretrained_model_name_or_path", TINY, "--width", "64", "--height", "64", "--max_sequence_length",
                "16", "--guidance_scale", "1", "--prompt", "Generate a photograph", "--steps", "4"]
PLAIN = ["--quant_transformer", "none", "--quant_t5", "none"]
# PSNR to plain weights' results on the embedded model, 5 of 8 steps; measured 55.7, 48.7, 37.3 and 37.9
LEAST_DB = {"int8": 50, "fp8": 44, "int4": 33, "nf4": 33}


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "cat.png"
    Image.fromarray(photograph("coffee", (96, 128))).save(path)
    return str(path)


def parse(*words, model=TINY_OPTIONS):
    return img2img.parse_args([*model, *map(str, words)])


def tensor(photo, side=64):
    return to_tensor(np.asarray(pictures.resize_image_center_crop(photo, side, side)))[None]


@pytest.fixture(scope="module")
def tiny():
    """load(kind) -> (pipe, text, Conversion) of the embedded model, its text encoders plain."""
    args = parse("--image", "x.png", *PLAIN)
    text, _ = img2img.encode_text(args, torch.device("cpu"), torch.float32)

    def load(kind="none", backend="auto"):
        args = parse("--image", "x.png", "--quant_t5", "none", "--quant_transformer", kind, "--quant_backend", backend)
        pipe, conversion = img2img.load_models(args, torch.device("cpu"), torch.float32)
        return pipe, text["prompt"], conversion

    return load


@pytest.fixture(scope="module")
def plain(tiny):
    return tiny()


def edited(pipe, text, image, steps=4, strength=0.6, seeds=(100,), offload="none"):
    """The final image of a run at guidance 1."""
    sigmas = noise_levels(pipe.vae, pipe.scheduler, steps, *image.shape[-2:])
    latents, noise = img2img.encode(pipe, image.expand(len(seeds), -1, -1, -1), seeds, "cpu", offload)
    first = img2img.start_index(steps, strength)
    z = img2img.sdedit(pipe, latents, noise, sigmas, first, text, 1.0, offload=offload)
    return img2img.decode(pipe, z, "cpu", offload)


# --- schedule


def test_strength_start_index_sigma_and_steps_are_the_papers_table_at_1024_px(plain):
    sigmas = schedule(STOCK_SETTINGS, 28, 4096, plain[0].scheduler, 1)[0]
    starts = img2img.choose_starts(sigmas, [0.3, 0.5, 0.6, 0.75, 0.9, 1.0])
    assert [start.index for start in starts] == [19, 14, 11, 7, 2, 0]
    assert [start.steps for start in starts] == [9, 14, 17, 21, 26, 28]
    expected = [0.599, 0.760, 0.830, 0.9045, 0.976, 1.0]
    assert [start.sigma for start in starts] == pytest.approx(expected, abs=6e-4)
    shifted = [math.exp(1.15) / (math.exp(1.15) + 1 / (1 - i / 28) - 1) for i in range(28)]
    assert sigmas == pytest.approx([*shifted, 0], abs=1e-6)


def test_start_index_is_stocks_for_every_strength():
    from diffusers import FluxImg2ImgPipeline

    for steps in (1, 4, 28, 50):
        stock = SimpleNamespace(scheduler=SimpleNamespace(timesteps=list(range(steps)), order=1))
        for strength in np.linspace(0.01, 1, 100).tolist():
            _, remaining = FluxImg2ImgPipeline.get_timesteps(stock, steps, strength, "cpu")
            assert steps - img2img.start_index(steps, strength) == remaining


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan"), 1e-20])
def test_a_strength_that_runs_no_step_or_does_not_exist_is_refused(strength):
    with pytest.raises(ValueError, match="--strength"):
        img2img.start_index(28, strength)


def test_start_sigma_enters_at_the_first_level_that_is_not_above_it(plain):
    sigmas = schedule(STOCK_SETTINGS, 28, 4096, plain[0].scheduler, 1)[0]
    for wanted in (1.0, 0.8, 0.3):
        start, = img2img.choose_starts(sigmas, [], wanted)
        assert start.sigma <= wanted and (start.index == 0 or sigmas[start.index - 1] > wanted)
    for i, sigma in enumerate(sigmas[:-1]):  # what was printed can be given back
        assert img2img.choose_starts(sigmas, [], float(f"{sigma:.3f}"))[0].index == i
    with pytest.raises(ValueError, match="the lowest level of 28 steps is 0.105"):
        img2img.choose_starts(sigmas, [], 0.1)


# --- sampling


@pytest.mark.parametrize("strength, true_cfg_scale", [(0.3, 1.0), (0.6, 1.0), (1.0, 1.0), (0.6, 2.5)])
def test_the_result_is_stock_flux_img2img_pipelines(tiny_model, photo, strength, true_cfg_scale):
    from diffusers import FluxImg2ImgPipeline

    words = ["--strength", strength, "--seed", 100]
    if true_cfg_scale > 1:
        words += ["--true_cfg_scale", true_cfg_scale, "--negative_prompt", "blurred"]
    args = parse("--image", photo, *PLAIN, "--prompt", "A picture of a Tiger", "--prompt_2", "stripes", *words,
                 "--guidance_scale", 3.5, "--steps", 7, model=["--pretrained_model_name_or_path", tiny_model,
                 "--width", "64", "--height", "48", "--max_sequence_length", "16"])
    (_, picture), = img2img.read_pictures(args, flux.load_models(tiny_model, "cpu", torch.float32).vae)
    text, _ = img2img.encode_text(args, torch.device("cpu"), torch.float32)
    pipe, _ = img2img.load_models(args, torch.device("cpu"), torch.float32)
    sigmas = noise_levels(pipe.vae, pipe.scheduler, 7, 64, 48)
    start, = img2img.choose_starts(sigmas, args.strengths)
    latents, noise = img2img.encode(pipe, to_tensor(np.asarray(picture))[None], [100], "cpu")
    ours = img2img.edit(args, pipe, latents, noise, sigmas, start, text, torch.device("cpu"))

    parts = flux.load_pipeline(tiny_model, torch.float32).components
    stock = FluxImg2ImgPipeline(**{name: parts[name] for name in (*flux.TEXT_PARTS, *flux.IMAGE_PARTS, "scheduler")})
    stock.set_progress_bar_config(disable=True)
    expected = stock("A picture of a Tiger", "stripes", "blurred", true_cfg_scale=true_cfg_scale, image=picture,
                     strength=strength, num_inference_steps=7, guidance_scale=3.5, height=48, width=64,
                     generator=torch.Generator().manual_seed(100), max_sequence_length=16, output_type="pt").images
    assert (ours - (2 * expected - 1)).abs().max() < 1e-4


def test_strength_towards_0_returns_the_vaes_round_trip(plain, photo):
    pipe, text, _ = plain
    latents, noise = img2img.encode(pipe, tensor(photo), [100], "cpu")
    round_trip = img2img.decode(pipe, latents, "cpu")
    decibels = [float(psnr(img2img.decode(pipe, img2img.sdedit(pipe, latents, noise, [sigma, 0.0], 0, text, 1.0),
                                          "cpu"), round_trip)) for sigma in (0.5, 0.1, 0.01, 1e-4)]
    assert decibels == sorted(decibels) and decibels[0] < 35 and decibels[-1] > 60
    sigmas = noise_levels(pipe.vae, pipe.scheduler, 2000, 64, 64)
    start, = img2img.choose_starts(sigmas, [0.0005])
    z = img2img.sdedit(pipe, latents, noise, sigmas, start.index, text, 1.0)
    assert start.steps == 1 and psnr(img2img.decode(pipe, z, "cpu"), round_trip) > 50


def test_strength_1_does_not_depend_on_the_image_and_less_does(plain, photo):
    pipe, text, _ = plain
    image = tensor(photo)
    assert torch.equal(edited(pipe, text, image, strength=1.0), edited(pipe, text, -image, strength=1.0))
    assert not torch.equal(edited(pipe, text, image, strength=0.75), edited(pipe, text, -image, strength=0.75))


def test_a_seed_gives_the_same_picture_alone_and_in_a_batch(plain, photo):
    pipe, text, _ = plain
    batch = edited(pipe, text, tensor(photo), seeds=(100, 101))
    assert torch.allclose(batch[1:], edited(pipe, text, tensor(photo), seeds=(101,)), atol=1e-4)
    assert not torch.allclose(batch[1:], batch[:1], atol=1e-2)


@pytest.mark.parametrize("offload, kind", [("model", "none"), ("group", "none"), ("sequential", "none"),
                                           ("model", "int8"), ("group", "int8")])
def test_offload_changes_no_bit(tiny, photo, offload, kind):
    expected = edited(*tiny(kind)[:2], tensor(photo))
    args = parse("--image", photo, "--quant_t5", "none", "--quant_transformer", kind, "--offload", offload)
    pipe, _ = img2img.load_models(args, torch.device("cpu"), torch.float32, offload)
    assert torch.equal(edited(pipe, tiny()[1], tensor(photo), offload=offload), expected)


def test_the_text_encoders_are_gone_before_the_transformer_comes(photo, tmp_path, monkeypatch):
    load_pipeline, load_models, encoders, seen = flux.load_pipeline, flux.load_models, [], []

    def watched_pipeline(*args, **options):
        pipe = load_pipeline(*args, **options)
        encoders.extend(weakref.ref(part) for part in (pipe.text_encoder, pipe.text_encoder_2) if part is not None)
        return pipe

    def watched_models(*args, **options):
        seen.append([reference() for reference in encoders])
        return load_models(*args, **options)

    monkeypatch.setattr(flux, "load_pipeline", watched_pipeline)
    monkeypatch.setattr(flux, "load_models", watched_models)
    img2img.main(parse("--image", photo, "--output", tmp_path))
    assert seen == [[None, None]]


def test_tiles_make_nearly_the_whole_image_and_are_smaller_than_diffusers_own(photo, monkeypatch):
    """Without what sees the whole image, normalisation and attention, whose random weights would hide what the cutting
    does."""
    torch.manual_seed(0)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=16, sample_size=1024,
                        mid_block_add_attention=False, scaling_factor=0.3611, shift_factor=0.1159).eval()
    for name, module in list(vae.named_modules()):
        if isinstance(module, torch.nn.GroupNorm):
            vae.set_submodule(name, torch.nn.Identity())
    image = to_tensor(np.asarray(pictures.resize_image_center_crop(photo, 576, 544)))[None]
    tiled, counts = vae.tiled_decode, []
    monkeypatch.setattr(vae, "tiled_decode", lambda *args, **options: counts.append(1) or tiled(*args, **options))
    with torch.no_grad():
        whole_latents = flux.encode(vae, image)
        whole = flux.decode(vae, whole_latents)
        assert not counts
        img2img.tile(vae)
        latents = flux.encode(vae, image)
        result = flux.decode(vae, latents)
    assert counts == [1] and not torch.equal(latents, whole_latents)
    assert (latents - whole_latents).norm() < 0.01 * whole_latents.norm()
    assert (result - whole).norm() < 0.02 * (whole - whole.mean()).norm()


def test_vae_tiling_tiles_where_diffusers_own_tiles_are_too_large_and_is_recorded(tiny_model, photo, tmp_path,
                                                                                  monkeypatch):
    model, tiled, sizes = tmp_path / "model", AutoencoderKL.tiled_decode, []
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "vae/config.json").read_text())
    (model / "vae/config.json").write_text(json.dumps(config | {"sample_size": 1024}))  # as FLUX.1-dev's

    def watched(self, z, *args, **options):
        sizes.append(tuple(z.shape[-2:]))
        return tiled(self, z, *args, **options)

    monkeypatch.setattr(AutoencoderKL, "tiled_decode", watched)
    for flag, expected in ("--no-vae_tiling", []), ("--vae_tiling", [(8, 72)] * 2):  # the VAE's round trip, the result
        output = tmp_path / flag
        img2img.main(parse("--image", photo, *PLAIN, "--output", output, flag, model=[
            "--model", str(model), "--width", "576", "--height", "64", "--max_sequence_length", "16", "--steps", "2"]))
        assert sizes == expected
        record = pictures.read_parameters(output / "cat_strength0.9_seed100.png")
        assert record["vae_tiling"] == (flag == "--vae_tiling")


# --- LoRAs


def test_several_loras_act_together_with_their_weights(tiny_model, tiny_lora, photo):
    def result(*words, kind="none"):
        args = parse("--image", photo, "--quant_t5", "none", "--quant_transformer", kind, *words,
                     model=["--model", tiny_model, "--max_sequence_length", "16"])
        pipe, _ = img2img.load_models(args, torch.device("cpu"), torch.float32)
        text = flux.TextEmbeds(torch.ones(1, 16, 16), torch.ones(1, 16))
        return edited(pipe, text, tensor(photo))

    once = result("--lora", tiny_lora)
    base = result()
    assert torch.allclose(result("--lora", f"{tiny_lora}:0.25", f"{tiny_lora}:0.75"), once, atol=1e-5)
    assert torch.allclose(result("--lora", f"{tiny_lora}:0"), base, atol=1e-6)
    for kind in ("int8", "nf4"):
        moved = result("--lora", tiny_lora, kind=kind) - result(kind=kind)
        assert torch.cosine_similarity(moved.flatten(), (once - base).flatten(), dim=0) > 0.9


def test_a_lora_is_parsed_with_and_without_weight_and_missing_ones_are_refused(tiny_lora):
    file = lora.find_file(tiny_lora)
    assert img2img.parse_lora(tiny_lora) == (file, 1.0)
    assert img2img.parse_lora(f"{tiny_lora}:-0.5") == (file, -0.5)
    for text in ("missing.safetensors", "missing.safetensors:0.5", "C:missing.safetensors"):
        with pytest.raises(ValueError, match="no such LoRA file"):
            img2img.parse_lora(text)


def test_a_damaged_lora_and_a_weight_that_is_no_number_are_refused_before_anything_loads(tiny_lora, tmp_path):
    cut, other = tmp_path / "cut.safetensors", tmp_path / "other.safetensors"
    cut.write_bytes(lora.find_file(tiny_lora).read_bytes()[:-100])
    other.write_bytes(b"no safetensors at all")
    for path in cut, other:
        with pytest.raises(ValueError, match=f"{path} is not a complete safetensors file"):
            parse("--image", "x.png", "--lora", path)
    for weight in "nan", "inf":
        with pytest.raises(ValueError, match=f":{weight}: give a finite weight"):
            parse("--image", "x.png", "--lora", f"{tiny_lora}:{weight}")


# --- pictures


@pytest.mark.parametrize("size, target, box", [
    ((400, 200), (100, 100), (100, 0, 300, 200)),  # wide
    ((200, 400), (100, 100), (0, 100, 200, 300)),  # tall
    ((300, 300), (64, 64), (0, 0, 300, 300)),  # equal
    ((401, 203), (100, 100), (99, 0, 302, 203)),  # odd
    ((203, 401), (100, 100), (0, 99, 203, 302)),
    ((640, 480), (1024, 768), (0, 0, 640, 480)),
    ((1000, 334), (48, 16), (0, 0, 1000, 333)),  # 333 1/3 rows would fit
    ((100, 100), (29, 100), (35, 0, 64, 100)),  # int(100 * 0.29) would be 28
    ((1, 1000), (160, 16), (0, 499, 1, 500)),  # less than a pixel: one is taken
])  # fmt: skip
def test_the_crop_is_the_largest_centred_box_of_the_targets_shape(size, target, box):
    assert pictures.center_box(*size, *target) == box


def test_the_crop_is_inside_centred_and_maximal_for_random_sizes():
    generator = np.random.default_rng(0)
    for width, height, wide, high in generator.integers(1, 2000, (500, 4)).tolist():
        left, top, right, bottom = pictures.center_box(width, height, wide, high)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert 0 <= (width - right) - left <= 1 and 0 <= (height - bottom) - top <= 1
        assert (right - left, bottom - top) == (width, max(1, width * high // wide)) or (
            right - left, bottom - top) == (max(1, height * wide // high), height)


def test_a_crop_that_needs_no_resizing_keeps_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (33, 71, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    cropped = pictures.resize_image_center_crop(str(tmp_path / "a.png"), 33, 33)
    assert np.array_equal(np.asarray(cropped), pixels[:, 19:52])


def test_exif_is_applied_and_every_mode_becomes_rgb(tmp_path):
    pixels = photograph("coffee", (32, 48))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to stand upright
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(pictures.open_picture(tmp_path / "turned.png")), np.rot90(pixels, -1))
    for mode in ("L", "P", "1", "RGBA", "CMYK", "I;16"):
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(
            pixels).convert(mode)
        image.save(tmp_path / f"{mode[0]}.tif")
        opened = pictures.open_picture(tmp_path / f"{mode[0]}.tif")
        assert opened.mode == "RGB" and opened.size == (48, 32)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert pictures.open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_fits_give_the_size_and_what_they_say():
    picture = Image.fromarray(photograph("coffee", (50, 101)))
    assert all(pictures.fit_picture(picture, 64, 32, fit).size == (64, 32) for fit in ("crop", "pad", "stretch"))
    kept = pictures.fit_picture(picture, 64, 32, "keep")
    assert np.array_equal(np.asarray(kept), np.asarray(picture)[1:49, 2:98])
    padded = np.asarray(pictures.fit_picture(picture, 64, 64, "pad"))
    assert (padded[:16] == 255).all() and (padded[-16:] == 255).all() and not (padded[20:44] == 255).all()
    with pytest.raises(ValueError, match="--fit keep: 12x50"):
        pictures.fit_picture(picture.crop((0, 0, 12, 50)), 64, 32, "keep")


@pytest.mark.parametrize("size", [(0, 64), (64, -1)])
def test_an_impossible_target_size_is_refused(photo, size):
    with pytest.raises(ValueError, match="1 or more"):
        pictures.resize_image_center_crop(photo, *size)


def test_what_is_no_picture_gives_one_line(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    buffer = BytesIO()
    Image.new("1", (6000, 6000)).save(buffer, "PNG")
    (tmp_path / "huge.png").write_bytes(buffer.getvalue())
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    for name, error, message in [("text.png", UnreadableImage, "not an image"),
                                 ("empty.png", UnreadableImage, "not an image"),
                                 ("huge.png", UnreadableImage, "6000x6000 px is more than 1000000 pixels"),
                                 ("cut.png", UnreadableImage, ""),
                                 ("missing.png", FileNotFoundError, "no such file"),
                                 ("folder", FileNotFoundError, "no such file")]:
        with pytest.raises(error, match=f"{name}: .*{message}") as caught:
            pictures.open_picture(tmp_path / name, max_pixels=1_000_000)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no image in it"):
        pictures.find_pictures([str(tmp_path / "folder")])


# --- addresses


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        name, _, query = self.path.strip("/").partition("?")
        answer = getattr(self, f"answer_{name}", None)
        answer(query) if answer else self.send_error(404)

    def start(self, status=200, **headers):
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()

    def answer_picture(self, _):
        self.start(Content_Type="image/png", Content_Length=str(len(self.server.picture)))
        self.wfile.write(self.server.picture)

    def answer_unnamed(self, _):  # neither type nor length
        self.start()
        self.wfile.write(self.server.picture)

    def answer_large(self, _):
        self.start(Content_Type="image/png", Content_Length="1000000000")

    def answer_endless(self, _):
        self.start(Content_Type="image/png")
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(bytes(65536))

    def answer_bomb(self, _):
        content = gzip.compress(bytes(30_000_000))  # 29 kB
        self.start(Content_Type="image/png", Content_Encoding="gzip", Content_Length=str(len(content)))
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    def answer_silent(self, _):
        time.sleep(1.5)

    def answer_drip(self, _):
        self.start(Content_Type="image/png", Content_Length="1000")
        with contextlib.suppress(OSError):
            for _ in range(15):
                self.wfile.write(b"\x89")
                time.sleep(0.1)

    def answer_headers(self, _):
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            for _ in range(25):
                self.wfile.write(b"a")
                time.sleep(0.1)

    def answer_html(self, _):
        self.start(Content_Type="text/html")
        self.wfile.write(b"<html>")

    def answer_bytes(self, _):
        self.start(Content_Type="application/octet-stream")
        self.wfile.write(b"no picture")

    def answer_cut(self, _):
        self.start(Content_Type="image/png", Content_Length=str(len(self.server.picture)))
        self.wfile.write(self.server.picture[:50])

    def answer_loop(self, _):
        self.start(302, Location="/loop")

    def answer_moved(self, query):
        self.start(302, Location=query)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(photo):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    with open(photo, "rb") as file:
        server.picture = file.read()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("page", ["picture", "unnamed", "moved?/picture"])
def test_a_picture_from_an_address_is_the_files(site, photo, page):
    fetched = pictures.resize_image_center_crop(f"{site}/{page}", 40, 40)
    assert fetched.tobytes() == pictures.resize_image_center_crop(photo, 40, 40).tobytes()


@pytest.mark.parametrize("page, message", [
    ("missing", "the server answered 404"),
    ("large", "more than 100000 bytes; raise --max_bytes"),
    ("endless", "more than 100000 bytes; raise --max_bytes"),
    ("bomb", "more than 100000 bytes; raise --max_bytes"),
    ("silent", "no complete answer within 0.4 s; raise --timeout"),
    ("drip", "no complete answer within 0.4 s; raise --timeout"),
    ("headers", "no complete answer within 0.4 s; raise --timeout"),
    ("html", "not an image but text/html"),
    ("bytes", "not an image"),
    ("cut", "could not be fetched"),
    ("loop", "more than 5 redirects"),
    ("moved?file:///etc/passwd", "only http:// and https:// are fetched, not file:"),
    ("moved?ftp://127.0.0.1/a.png", "only http:// and https:// are fetched, not ftp:"),
])  # fmt: skip
def test_an_address_that_fails_gives_one_line_in_time(site, page, message):
    begun, timeout_s = time.monotonic(), 0.4 if page in ("silent", "drip", "headers") else 10
    with pytest.raises(ValueError, match=message) as caught:
        pictures.open_picture(f"{site}/{page}", timeout_s=timeout_s, max_bytes=100_000)
    assert str(caught.value).startswith(f"{site}/{page}: ") and "\n" not in str(caught.value)
    assert time.monotonic() - begun < timeout_s + 1


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/a.png", "http://127.0.0.1:1/a.png",
                                 "http://", "http://[::1/a.png"])
def test_other_schemes_and_dead_addresses_give_one_line(url):
    with pytest.raises(ValueError, match="only http|could not be fetched|Invalid IPv6"):
        pictures.open_picture(url, timeout_s=1)


def test_the_command_gives_one_line_and_exit_code_2(site, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flux, "load_models", pytest.fail)  # nothing large loads before
    for folder, index in (other := tmp_path / "qwen", '{"_class_name": "QwenImagePipeline"}'), (
            broken := tmp_path / "broken", "{"):
        folder.mkdir()
        (folder / "model_index.json").write_text(index)
    for words, message in [((f"{site}/missing",), "the server answered 404"), ((str(tmp_path / "no.png"),), "no such"),
                           ((f"{site}/picture", "--max_pixels", 100), "raise --max_pixels"),
                           ((f"{site}/picture", "--width", 60), "--width 60: this model needs multiples of 8"),
                           ((f"{site}/picture", "--vae_tiling"), "this model has an AutoencoderKLHunyuanImage"),
                           ((f"{site}/picture", "--model", other), "a QwenImagePipeline; name the folder of a FLUX.1"),
                           ((f"{site}/picture", "--model", broken), "model_index.json: not JSON")]:
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda words=words: img2img.main(parse("--image", *words, "--output", tmp_path)))
        lines = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and lines[-1].startswith("error: ") and message in lines[-1]


# --- quantisation


@pytest.mark.parametrize("kind", LEAST_DB)
def test_quantised_weights_stay_within_their_psnr_of_plain_ones(tiny, plain, photo, kind):
    pipe, text, conversion = tiny(kind)
    bits = 8 * conversion.bytes_after / (conversion.bytes_before / 4)
    assert bits < {"int8": 8.6, "fp8": 8.4}.get(kind, 5)
    target = edited(*plain[:2], tensor(photo), steps=8)
    decibels = float(psnr(edited(pipe, text, tensor(photo), steps=8), target))
    assert LEAST_DB[kind] < decibels < 80, decibels


def test_exactly_the_linear_layers_of_the_blocks_are_converted(tiny, plain):
    pipe, _, conversion = tiny("int8")
    every = [name for name, module in plain[0].transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert conversion.layers == [name for name in every if "transformer_blocks." in name]
    assert "single_transformer_blocks.0.proj_out" in conversion.layers and "proj_out" not in conversion.layers
    assert conversion.linear_layers == len(every) == 54 and len(conversion.layers) == 44
    before = dict(plain[0].transformer.named_parameters())
    for name, parameter in pipe.transformer.named_parameters():
        is_converted = name.removesuffix(".weight") in conversion.layers
        assert (type(parameter) is torch.nn.Parameter) != is_converted
        assert is_converted or torch.equal(parameter, before[name])
    assert "44 of 54 linear layers, 7.27 -> 1.87 MB" in conversion.in_words()


@pytest.mark.parametrize("kind", LEAST_DB)
def test_text_encoders_are_quantised_and_reported(kind):
    words = ["--image", "x.png", "--quant_transformer", "none"]
    text, (clip, t5) = img2img.encode_text(parse(*words, "--quant_t5", kind, "--quant_clip", kind), torch.device("cpu"),
                                           torch.float32)
    expected, _ = img2img.encode_text(parse(*words, "--quant_t5", "none"), torch.device("cpu"), torch.float32)
    assert (clip.component, len(clip.layers)) == ("text_encoder", clip.linear_layers)
    assert (t5.component, len(t5.layers), t5.kind) == ("text_encoder_2", 14, kind)
    for part in ("prompt", "pooled"):
        value, target = getattr(text["prompt"], part), getattr(expected["prompt"], part)
        assert 0 < (value - target).norm() / target.norm() < (0.15 if "8" in kind else 0.8)  # CLIP is random here


def test_nothing_is_converted_where_nothing_is_asked(plain):
    conversion = plain[2]
    assert conversion.layers == [] and conversion.backend is None and "not quantised" in conversion.in_words()


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_layers_that_no_group_divides_stay_plain_and_are_not_counted(kind):
    model = torch.nn.Sequential(torch.nn.Linear(48, 16), torch.nn.Linear(64, 16))
    assert quantised.convert(model, "text_encoder_2", kind, "cpu").layers == ["1"]
    assert type(model[0].weight) is torch.nn.Parameter
    with pytest.raises(ValueError, match=f"no layer that {kind} fits"):
        quantised.convert(torch.nn.Sequential(torch.nn.Linear(48, 16)), "text_encoder_2", kind, "cpu")


def test_int4_has_a_layout_for_each_device_and_the_group_that_divides_the_layer():
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    gpu = quantised.torchao_config("int4", 3072, torch.bfloat16, "cuda")
    assert (gpu.group_size, gpu.int4_packing_format) == (128, Int4PackingFormat.TILE_PACKED_TO_4D)
    assert quantised.torchao_config("int4", 64, torch.float32, "cpu").group_size == 64
    with pytest.raises(ValueError, match="--dtype bf16"):
        quantised.torchao_config("int4", 3072, torch.float32, "cuda")


def test_a_backend_is_chosen_by_what_is_installed_and_a_missing_one_is_named(monkeypatch):
    assert [quantised.choose_backend(kind) for kind in ("int8", "fp8", "int4", "nf4")] == ["torchao"] * 3 + ["bnb"]
    with pytest.raises(ValueError, match="--quant_backend bnb has no int8; use torchao or quanto"):
        quantised.choose_backend("int8", "bnb")
    monkeypatch.setattr(quantised, "is_installed", lambda package: package == "optimum-quanto")
    assert quantised.choose_backend("int8") == "quanto"
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        quantised.choose_backend("nf4")
    with pytest.raises(ValueError, match="pip install torchao"):
        quantised.choose_backend("int8", "torchao")


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_quanto_converts_the_same_layers(tiny, plain, photo, kind):
    pytest.importorskip("optimum.quanto")
    pipe, text, conversion = tiny(kind, "quanto")
    assert conversion.backend == "quanto" and conversion.layers == tiny(kind)[2].layers
    assert all(type(pipe.transformer.get_submodule(name)).__module__.startswith("optimum.quanto")
               for name in conversion.layers)
    assert conversion.bytes_after < conversion.bytes_before / 3
    target = edited(*plain[:2], tensor(photo), steps=8)
    assert LEAST_DB[kind] < psnr(edited(pipe, text, tensor(photo), steps=8), target) < 80


def test_the_effective_weight_of_a_plain_layer_is_its_weight():
    for bias in (True, False):
        layer = torch.nn.Linear(7, 5, bias=bias)
        assert torch.allclose(quantised.effective_weight(layer), layer.weight, atol=1e-6)


def test_the_comparison_writes_psnr_and_the_error_of_every_layer(photo, tmp_path, capsys):
    compare_quantised.main(compare_quantised.parse_args(
        [*TINY_OPTIONS, "--image", photo, "--strength", "0.5", "--output", str(tmp_path)]))
    report = json.loads((tmp_path / "comparison.json").read_text())
    assert report["psnr_db"].keys() == {"text encoders", "transformer", "both"}
    assert report["psnr_db"]["transformer"][0] > LEAST_DB["int8"]
    assert len(report["layers"]) == 44
    assert all(0 < layer[error] < 0.02 for layer in report["layers"] for error in ("weight_error", "output_error"))
    assert report["layers"][0]["layer"] in capsys.readouterr().out
    assert (tmp_path / "layers.md").read_text().count("\n") == 46 and (tmp_path / "grid.png").is_file()
    comparison = (tmp_path / "comparison.json").read_bytes()
    again = compare_quantised.parse_args([*TINY_OPTIONS, "--image", photo, "--output", str(tmp_path)])
    for file in "layers.md", "grid.png", "comparison.json":  # an interrupted comparison leaves some of them
        with pytest.raises(ValueError, match=f"{tmp_path} holds the {file} of another comparison"):
            compare_quantised.main(again)
        assert (tmp_path / "comparison.json").read_bytes() == comparison
        (tmp_path / file).unlink()
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_quantised.parse_args([*TINY_OPTIONS, "--image", photo, *PLAIN])


# --- the command


def test_pictures_seeds_and_strengths_give_results_that_know_how_they_were_made(photo, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    profile = b"\0" * 16 + b"RGB " + b"\0" * 108
    for name in ("a", "b"):
        Image.open(photo).save(folder / f"{name}.png", icc_profile=profile)
    output = tmp_path / "out"
    img2img.main(parse("--image", folder, "--sweep_strength", "0.5,1", "--num_images", 2, "--output", output))
    printed = capsys.readouterr().out
    assert "a.png 64x64 px, strength 0.5: enters at step 2 of 4, sigma 0.615; 2 steps run" in printed
    assert "text_encoder_2: int4 by torchao" in printed and "transformer: int8 by torchao" in printed
    results = sorted(path.name for path in output.glob("*_seed*.png"))
    assert results == [f"{name}_strength{strength}_seed{seed}.png" for name in "ab" for strength in ("0.5", "1")
                       for seed in (100, 101)]
    read = pictures.read_parameters(output / results[1])
    assert {name: read[name] for name in ("file", "image", "seed", "start", "start_index", "executed_steps", "model",
                                          "prompt", "num_inference_steps", "width")} == {
        "file": results[1], "image": "a.png", "seed": 101, "start": "strength 0.5", "start_index": 2,
        "executed_steps": 2, "model": "tiny-kontext", "prompt": "Generate a photograph", "num_inference_steps": 4,
        "width": 64}
    assert read["quantised"]["text_encoder_2"] == {"kind": "int4", "backend": "torchao"}
    assert str(tmp_path) not in json.dumps(read) and str(PROJECT_ROOT) not in json.dumps(read)
    report = json.loads((output / "a.json").read_text())
    assert read in report["results"] and len(report["results"]) == 4 and report["peak_memory_bytes"] > 0
    assert report["conversions"]["transformer"]["layers"] == 44
    assert Image.open(output / results[0]).info["icc_profile"] == profile
    assert Image.open(output / "a_grid.png").width > 4 * 256
    pixels = {name: Image.open(output / name).tobytes() for name in results}
    assert pixels["a_strength1_seed100.png"] == pixels["b_strength1_seed100.png"]
    assert pixels["a_strength1_seed100.png"] != pixels["a_strength1_seed101.png"]

    img2img.main(img2img.parse_args(["--show", str(output / results[1])]))
    assert json.loads(capsys.readouterr().out) == read
    for other in (photo, output / "a.json"):
        with pytest.raises(UnreadableImage):
            pictures.read_parameters(other)


def test_a_second_run_writes_over_nothing_and_repeats_the_picture(site, tmp_path):
    words = ["--image", f"{site}/picture?token=secret", "--start_sigma", "0.6", "--output", tmp_path, *PLAIN]
    for _ in range(2):
        img2img.main(parse(*words))
    first, second = tmp_path / "picture_startsigma0.6_seed100.png", tmp_path / "picture-2_startsigma0.6_seed100.png"
    assert Image.open(first).tobytes() == Image.open(second).tobytes()
    read = pictures.read_parameters(first)
    assert "secret" not in json.dumps(read) and read["image"].startswith("http://127.0.0.1") and read["sigma"] <= 0.6


def test_an_interrupted_runs_results_and_the_users_files_are_never_written_over(photo, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    words = ["--image", shutil.copy(photo, tmp_path / "cat.png"), *PLAIN, "--output", tmp_path]
    (tmp_path / "cat.json").write_text("a caption")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(img2img, "image_grid", interrupt)
        img2img.main(parse(*words))
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert [path.name for path in kept if "seed" in path.name] == ["cat-2_strength0.9_seed100.png"]
    img2img.main(parse(*words, "--steps", 5))
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert sorted(path.name for path in tmp_path.iterdir() if path not in kept) == [
        "cat-3.json", "cat-3_grid.png", "cat-3_strength0.9_seed100.png"]


def test_a_long_picture_name_is_cut_so_that_every_file_can_be_written(tmp_path):
    endings = ["_grid.png", ".json", "_strength0.123456_seed9223372036854775807.png"]
    for name in "a" * 251, "é" * 125, "短":
        for suffix in "", "-2":
            stem = img2img.free_stem(tmp_path, f"{name}.png", endings)
            for ending in endings:
                pictures.save_png(tmp_path / f"{stem}{ending}", Image.new("RGB", (8, 8)), {})
            assert stem.endswith(suffix) and name.startswith(stem.removesuffix(suffix))
            assert len(stem.encode()) > 190 or stem == name + suffix  # no shorter than need be


def test_prompts_in_any_script_are_read_back(tmp_path):
    parameters = {"prompt": "一只老虎 \u2028 \"tiger\"", "sigma": 0.1}
    pictures.save_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), parameters)
    assert pictures.read_parameters(tmp_path / "a.png") == parameters


def test_model_path_comes_from_the_environment_and_the_seeds_defaults_hold(monkeypatch):
    monkeypatch.setenv("MODEL_PATH", TINY)
    args = img2img.parse_args(["--image", "x.png"])
    assert args.pretrained_model_name_or_path == TINY
    assert (args.seed, args.strengths, args.num_inference_steps, args.guidance_scale, args.width, args.height,
            args.prompt, args.quant_transformer) == (100, [0.9], 28, 3.5, 1024, 1024, "A picture of a Tiger", "int8")
    monkeypatch.delenv("MODEL_PATH")
    assert img2img.parse_args(["--image", "x.png"]).pretrained_model_name_or_path == "black-forest-labs/FLUX.1-dev"
    assert img2img.parse_args(["--image", "x.png", "--model", TINY]).pretrained_model_name_or_path == TINY


@pytest.mark.parametrize("key", ["pretrained_model_name_or_path", "model"])
def test_a_configs_model_and_the_command_lines_win_over_model_path(tmp_path, monkeypatch, key):
    monkeypatch.setenv("MODEL_PATH", "some/other")
    config = tmp_path / "c.yaml"
    config.write_text(f"{key}: {TINY}\nimage: x.png\n")
    assert img2img.parse_args(["--config", str(config)]).pretrained_model_name_or_path == TINY
    assert img2img.parse_args(["--config", str(config), "--model", "a/b"]).pretrained_model_name_or_path == "a/b"


@pytest.mark.parametrize("words, message", [
    ([], "--image is needed"),
    (["--strength", "0"], "--strength 0"),
    (["--strength", "0.5", "--start_sigma", "0.5"], "leave one out"),
    (["--sweep_strength", "0.5,1", "--strength", "0.5"], "--sweep_strength"),
    (["--sweep_strength", "0.5,much"], "--sweep_strength 0.5,much"),
    (["--sweep_strength", "0.5,0"], "--strength 0"),
    (["--start_sigma", "1.5"], "--start_sigma 1.5"),
    (["--sweep_strength", "0.5000001,0.3,0.5"], "strength 0.5 stands there twice"),
    (["--timeout", "0"], "--timeout"),
    (["--timeout", "1e10"], "--timeout"),
    (["--seed", str(2**63)], "--seed 9223372036854775808: give"),
    (["--model", "./nowhere"], "no such folder; download FLUX.1-dev"),
    (["--width", "8"], "--width 8"),
    (["--num_images", "0"], "--num_images 0"),
    (["--true_cfg_scale", "0.5"], "--true_cfg_scale"),
    (["--negative_prompt", "blurred"], "--negative_prompt acts with"),
    (["--max_sequence_length", "513"], "--max_sequence_length 513"),
    (["--quant_transformer", "nf4", "--offload", "group"], "--offload group"),
    (["--offload", "sequential"], "--offload sequential"),
    (["--quant_backend", "bnb"], "bnb has no"),
    (["--lora", "none.safetensors"], "no such LoRA file"),
])  # fmt: skip
def test_impossible_options_are_refused_before_anything_loads(words, message):
    image = ["--image", "x.png"] if words else []
    with pytest.raises(ValueError, match=message):
        parse(*image, *words)


def test_a_model_that_gives_no_numbers_is_an_error(tiny, photo):
    pipe, text, _ = tiny()
    pipe.transformer.proj_out.bias.data.fill_(float("nan"))
    latents, noise = img2img.encode(pipe, tensor(photo), [0], "cpu")
    args = argparse.Namespace(guidance_scale=1.0, true_cfg_scale=1.0)
    with pytest.raises(ValueError, match="NaN or infinity"):
        img2img.edit(args, pipe, latents, noise, [0.5, 0.0], img2img.Start("", 0, 0.5, 1), {"prompt": text},
                     torch.device("cpu"))

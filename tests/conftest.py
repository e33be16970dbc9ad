"""Tiny random models and photographs out of installed packages: no downloads, seconds on one core."""

import copy
import functools
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from two threads that fight for two cores

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
cv2.setNumThreads(1)  # a forked loader process waits for ever on a pool that its parent had
PROJECT_ROOT = Path(__file__).resolve().parent.parent


def take_gradients(model):
    """The gradients of a model's LoRA; none are left in it."""
    from utils import lora

    found = [parameter.grad for parameter in lora.parameters(model)]
    for parameter in lora.parameters(model):
        parameter.grad = None
    return found


def equal(these, those):
    """True if two lists of tensors are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Accelerate keeps one state per process; every test starts without one."""
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def make_tiny_pipeline():
    """A FluxKontextPipeline with FLUX's kinds of parts (KL autoencoder at 8 pixels a latent, 16 channels, guidance)
    and random weights, small enough for a step in milliseconds."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from scripts.make_tiny_kontext import make_tokenizers

    torch.manual_seed(0)
    clip, t5 = make_tokenizers()
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(clip), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=16, bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id))
    text_encoder_2 = T5EncoderModel(T5Config(vocab_size=len(t5), d_model=16, d_kv=8, d_ff=16, num_layers=1,
                                             num_heads=2))
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=16,
                        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
        axes_dims_rope=(4, 6, 6), joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    pipe = FluxKontextPipeline(scheduler, vae, text_encoder, clip, text_encoder_2, t5, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of the tiny random pipeline's folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny-random-kontext"
    make_tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_pipe(tiny_model):
    """VAE, transformer and scheduler of the tiny random pipeline, fresh for each test."""
    from utils import flux

    return flux.load_models(tiny_model, "cpu", torch.float32)


def save_random_lora(model, folder, settings, rank, scale, seed, with_clip=False):
    """Write a LoRA for a tiny model whose B is not zero; with_clip: one for its CLIP too. settings: what differs from
    stock Kontext's. Returns the folder's name."""
    from utils import flux, lora, restore

    parts = [flux.load_models(model, "cpu", torch.float32).transformer]
    lora.attach(parts[0], rank=rank)
    if with_clip:
        parts.append(flux.load_text_encoder(model, "cpu", torch.float32)[1])
        lora.attach(parts[1], rank=rank, layers=lora.CLIP_LAYERS)
    generator = torch.Generator().manual_seed(seed)
    for parameter in itertools.chain(*map(lora.parameters, parts)):
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    lora.save(parts[0], folder, restore.STOCK_SETTINGS | {"max_sequence_length": 16, "base_model": model} | settings,
              *parts[1:])
    return str(folder)


@pytest.fixture(scope="session")
def tiny_lora(tiny_model, tmp_path_factory):
    """Folder with a LoRA file for tiny_model: B not zero, settings of a start noise of 0.5."""
    return save_random_lora(tiny_model, tmp_path_factory.mktemp("lora"),
                            {"start_noise": [0.5, 0.5], "guidance_scale": 1.0}, rank=4, scale=0.1, seed=1)


@functools.cache
def load_once(load, *args, **where):
    return load(*args, **where)


@pytest.fixture(scope="module")
def models_load_once():
    """Reading the same tiny model a hundred times is most of what a run costs: hand out copies instead."""
    from utils import flux

    encode, load = flux.encode_prompts, flux.load_models
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux, "encode_prompts", lambda path, prompts, *args, **where: load_once(
            encode, path, tuple(prompts), *args, **where))
        patch.setattr(flux, "load_models", lambda *args, **where: copy.deepcopy(load_once(load, *args, **where)))
        yield


@pytest.fixture
def sigterm_in_step(monkeypatch):
    """sigterm_in_step(script, n): its n-th training step gets a SIGTERM. Returns what takes that back."""

    def arrange(script, number):
        original, calls = script.training_step, []

        def step(*args):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        monkeypatch.setattr(script, "training_step", step)
        return lambda: monkeypatch.setattr(script, "training_step", original)

    return arrange


def photograph(name="astronaut", size=None):
    """A photograph of the scikit-image package as uint8 (H, W, 3), resized to (height, width) if given."""
    import skimage

    image = Image.open(next((Path(skimage.__file__).parent / "data").glob(f"{name}.*"))).convert("RGB")
    return np.asarray(image.resize(size[::-1], Image.Resampling.LANCZOS) if size else image)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Folder with train/ (6 photographs' crops, 48 px) and heldout/ (2), all different."""
    root = tmp_path_factory.mktemp("photos")
    image = photograph(size=(256, 256))
    for i in range(8):
        folder = root / ("train" if i < 6 else "heldout")
        folder.mkdir(exist_ok=True)
        y, x = 24 * i, 160 - 20 * i
        Image.fromarray(image[y : y + 48, x : x + 64]).save(folder / f"photo_{i}.png")
    return root


# `accelerate launch --cpu --num_processes 2` runs one process in silence; torchrun runs two.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run_on_two_processes(*words):
    """Run a script, or -m and a module, with its arguments on two processes (gloo)."""
    result = subprocess.run([*TORCHRUN, *map(str, words)], cwd=PROJECT_ROOT, capture_output=True, text=True,
                            timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]


def read_summary(printed):
    """{name: text} of what a training script says in the end of where everything is and how to use it."""
    printed = printed[printed.index("Finished after "):].replace("\\\n", "")
    assert "To use it:" in printed.splitlines()
    return {line[2:15].strip(): line[15:] for line in printed.splitlines() if line.startswith("  ")}


CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
CHROMIUM_FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
                  "--disable-component-update --disable-sync").split()


def need_for_browser(*packages):
    """Skip what is tested in a browser where it, Playwright or another of `packages` is not installed; where
    KONTEXT_BROWSER_TESTS is set, fail."""
    missing = [name for name in (*packages, "playwright") if importlib.util.find_spec(name) is None]
    missing += [] if Path(CHROMIUM).is_file() else ["chromium"]
    if missing:
        give_up = pytest.fail if os.environ.get("KONTEXT_BROWSER_TESTS") else pytest.skip
        give_up(f"the page is tested in a browser, and {', '.join(missing)} is not installed: "
                "bash scripts/setup_demo.sh --browser")


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, without a window."""
    need_for_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()

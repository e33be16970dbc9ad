"""Faster paths against the plain one, and the step against host synchronisation."""

import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch._dynamo.utils import counters

import train_deg_lora_flux_kontext as restoration
import train_dreambooth_lora_flux_kontext as dreambooth
from tests.test_flux import normal, random_text
from tests.test_lora import randomise
from utils import flow_matching as fm
from utils import flux, lora, run, speed


@pytest.fixture(autouse=True)
def no_kernel_left_behind(monkeypatch):
    """What a model was given is also the kernel of all models without one."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)


@pytest.fixture
def without_inductor(monkeypatch):
    """The graphs are captured and differentiated ahead of time, and then run as they are: no compiler is needed."""
    monkeypatch.setattr(speed, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def step(transformer, size=(8, 8), references=(), batch=2):
    """(prediction, LoRA gradients) of one step."""
    for parameter in lora.parameters(transformer):
        parameter.grad = None
    prediction = flux.predict_velocity(transformer, normal(batch, 16, *size), torch.linspace(0.2, 0.9, batch),
                                       list(references), random_text(batch), 1.0)
    prediction.square().mean().backward()
    return prediction.detach(), torch.cat([p.grad.flatten() for p in lora.parameters(transformer)])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_compiled_blocks_give_the_same_numbers_without_a_graph_break(tiny_pipe, without_inductor, checkpointing):
    transformer = tiny_pipe.transformer
    lora.attach(transformer, rank=4)
    randomise(transformer)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    names = list(transformer.state_dict())
    expected = step(transformer, references=[normal(2, 16, 8, 8, seed=3)])
    speed.compile_blocks(transformer)
    actual = step(transformer, references=[normal(2, 16, 8, 8, seed=3)])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] >= 2  # both kinds of blocks
    assert list(transformer.state_dict()) == names


def test_buckets_compile_a_bounded_number_of_times_and_pictures_never(tiny_pipe, without_inductor):
    transformer = tiny_pipe.transformer
    lora.attach(transformer, rank=4)
    speed.compile_blocks(transformer)
    sizes = [(8, 8), (8, 12), (12, 8), (6, 16), (16, 6), (4, 20)]
    for size in sizes * 2:
        step(transformer, size)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled <= 2 * 3  # a block kind each: the first size, then one for any length
    with torch.no_grad(), speed.eagerly():
        flux.predict_velocity(transformer.eval(), normal(1, 16, 10, 10), torch.tensor([0.5]), None, random_text(1), 1.0)
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("asked, device, steps, expected", [
    (None, "cuda", 3000, True), (None, "cuda", 20, False), (None, "cpu", 3000, False), (True, "cpu", 1, True),
    (False, "cuda", 3000, False)])
def test_compilation_is_the_default_where_it_pays(asked, device, steps, expected):
    args = SimpleNamespace(compile=asked, max_train_steps=steps)
    assert speed.wants_compile(args, torch.device(device)) == expected
    assert speed.wants_compile(args, torch.device(device), "nf4") == (asked is True)  # only when asked for


def test_the_attention_kernel_is_the_fastest_of_those_that_run(tiny_pipe, monkeypatch):
    chosen = []
    monkeypatch.setattr(tiny_pipe.transformer, "set_attention_backend", chosen.append)
    seconds = {"native": 3.0, "_native_cudnn": 1.0, "_native_flash": 2.0}

    def measure(backend):
        if backend not in seconds:
            raise RuntimeError(f"{backend} is not installed")
        return seconds[backend]

    def choose(name, device, measure=measure):
        return speed.choose_attention(tiny_pipe.transformer, name, 64, torch.device(device), torch.bfloat16, measure)

    assert choose("auto", "cuda") == "_native_cudnn" and chosen == ["_native_cudnn"]
    seconds["native"] = 0.5
    assert choose("auto", "cuda") == "native"
    assert choose("_native_flash", "cpu") == "_native_flash"
    assert choose("auto", "cpu", measure=None) == "native"
    assert chosen == ["_native_cudnn", "native", "_native_flash", "native"]
    seconds.clear()
    with pytest.raises(ValueError, match="_flash_3 is not installed"):
        choose("auto", "cuda")


def test_another_attention_kernel_gives_the_same_numbers(tiny_pipe):
    lora.attach(tiny_pipe.transformer, rank=4)
    expected = step(tiny_pipe.transformer)
    speed.choose_attention(tiny_pipe.transformer, "_native_flash", 64, torch.device("cpu"), torch.float32)
    for a, b in zip(step(tiny_pipe.transformer), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_native_attention_is_native_also_after_another_models_kernel_and_says_nothing(tiny_pipe, monkeypatch):
    said = []
    monkeypatch.setattr(logging.getLogger("diffusers.models.modeling_utils"), "callHandlers", said.append)
    for name in ("_native_flash", "native"):  # diffusers makes the first one everybody's default
        speed.choose_attention(tiny_pipe.transformer, name, 64, torch.device("cpu"), torch.float32)
        used = {block.attn.processor._attention_backend for block in tiny_pipe.transformer.transformer_blocks}
        assert {backend.value for backend in used} == {name}
    assert not said


# --- no host synchronisation: on the meta device a tensor has no value that a step could wait for


def meta_step(script, tiny_model, tmp_path, flags):
    """One whole step of a training script, forward to optimizer, with models and images on the meta device."""
    args = script.parse_args(["--pretrained_model_name_or_path", tiny_model, "--output_dir", str(tmp_path / "out"),
                              "--report_to", "none", *flags.split()])
    pipe = flux.load_models(tiny_model, "cpu", torch.float32)
    parameters = lora.attach(pipe.transformer.to("meta"), rank=4)
    pipe.vae.to("meta")
    optimizer, guard = run.make_optimizer(parameters, args, 1), run.FiniteGuard()
    images = torch.empty(2, 3, 32, 32, device="meta")
    batch = {"target": images, "control": images, "references": [images], "seed": [1, 2], "prompt": ["p", "p"],
             "path": ["a", "b"]}
    text = flux.stack_text({"p": random_text(1)}, ["p", "p"], "meta", torch.float32)
    losses = script.training_step(pipe, pipe.transformer, None, batch, text, args)
    guard.protect(sum(losses.values()), batch["path"]).backward()
    guard.filter(parameters, args.max_grad_norm, 1)
    optimizer.step()
    optimizer.zero_grad()


STEPS = {
    "restoration": (restoration, "--hr_root x --start_noise 0.3-0.6 --perceptual_loss gradient "
                                 "--perceptual_max_sigma 1"),
    "bridge": (restoration, "--hr_root x --start_noise 0 --bridge_noise 0.1 --vae_encode_mode sample"),
    "edit": (dreambooth, "--weighting_scheme sigma_sqrt --vae_encode_mode sample"),
}


@pytest.mark.parametrize("script, flags", STEPS.values(), ids=STEPS)
def test_a_step_never_waits_for_the_device(tiny_model, tmp_path, script, flags):
    meta_step(script, tiny_model, tmp_path, flags)


@pytest.mark.parametrize("wait", [lambda t: t.item(), lambda t: t.cpu(), bool, lambda t: t.nonzero()])
def test_a_step_that_waits_is_found(tiny_model, tmp_path, monkeypatch, wait):
    original = fm.weighted_mse

    def waiting(*args):
        loss = original(*args)
        wait(loss)
        return loss

    monkeypatch.setattr(fm, "weighted_mse", waiting)
    with pytest.raises((RuntimeError, NotImplementedError)):
        meta_step(restoration, tiny_model, tmp_path, "--hr_root x")

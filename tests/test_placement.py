"""Memory levels, precisions and compilation in whole training runs, against the plain run."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train_deg_lora_flux_kontext as restoration
import train_dreambooth_lora_flux_kontext as dreambooth
from utils import adaln, checkpoint, flux, lora, memory, placement, run, speed

SHORT = ("--resolution 32 --train_batch_size 2 --max_sequence_length 8 --rank 4 --report_to none --max_train_steps 3 "
         "--start_noise 0.3-0.6 --lora_dropout 0.2")


@pytest.fixture
def train(tiny_model, photos, tmp_path):
    """train("flags") -> LoRA tensors of a restoration run, in tmp_path/NAME."""

    def call(flags="", name="out", script=restoration, short=SHORT, data="--hr_root"):
        argv = ["--pretrained_model_name_or_path", tiny_model, *short.split(), data, str(photos / "train"),
                "--output_dir", str(tmp_path / name), *flags.split()]
        script.main(script.parse_args(argv))
        return load_file(tmp_path / name / lora.LORA_FILE)

    return call


@pytest.fixture
def bf16(monkeypatch):
    """A CPU that trains in bf16, as a GPU would."""
    make = run.make_accelerator
    monkeypatch.setattr(run, "make_accelerator", lambda args, **more: (make(args, **more)[0], torch.bfloat16))


def same(a, b, atol):
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], rtol=0, atol=atol) for key in a)


def test_every_lossless_memory_level_trains_to_the_plain_runs_weights(train):
    plain = train(name="plain")
    for level in ("lossless", "fastest", "selective", "full", "offload"):
        assert same(train(f"--memory {level}", level), plain, 1e-6), level
    assert same(train("--gradient_checkpointing --memory auto", "flag"), plain, 1e-6)


@pytest.mark.parametrize("flags", ["--memory int8", "--base_precision int8", "--base_precision fp8", "--memory fp8"])
def test_quantised_weights_train_near_the_plain_run_and_are_part_of_the_runs_identity(train, tmp_path, flags):
    plain, quantised = train(name="plain"), train(f"{flags} --checkpointing_steps 1")
    assert not same(quantised, plain, 0) and same(quantised, plain, 1e-3)
    assert {value.dtype for value in quantised.values()} == {torch.float32}
    with pytest.raises(ValueError, match="base_precision"):
        train("--resume_from_checkpoint latest --max_train_steps 4")
    assert checkpoint.list_checkpoints(tmp_path / "out")


def test_adaln_tables_in_a_whole_bf16_run_change_no_bit_of_it(train, bf16, monkeypatch, photos):
    flags = f"--validation_image {photos / 'heldout' / 'photo_6.png'} --num_inference_steps 2 --validation_steps 2"
    plain = train(flags, "plain")
    loaded = []
    load = flux.load_models
    monkeypatch.setattr(flux, "load_models", lambda *args, **where: loaded.append(load(*args, **where)) or loaded[-1])
    assert same(train(f"{flags} --adaln_tables", "tables"), plain, 0)
    assert isinstance(loaded[0].transformer.time_text_embed, adaln.Table)


@pytest.mark.parametrize("flags, words", [
    ("--adaln_tables", "bf16"), ("--memory_limit 0.1", "--memory_limit 0.1"),
    ("--memory fastest --gradient_checkpointing", "--memory fastest does not go with other flags"),
    ("--base_precision nf4", "CUDA"), ("--memory nf4", "CUDA"), ("--memory nope", None),
    ("--memory int8 --base_precision bf16", "--memory int8 does not go with other flags")])
def test_what_cannot_be_is_one_line_before_a_model_loads(train, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(flux, "load_pipeline", None)
    with pytest.raises((ValueError, SystemExit)) as error:
        train(flags)
    assert words is None or words in str(error.value) and "\n" not in str(error.value)


def test_tables_refuse_several_prompts_and_a_clip_lora(train, bf16):
    for flags, words in (("--validation_prompt other", "one prompt"), ("--lora_layers norm1.linear", "--lora_layers")):
        with pytest.raises(ValueError, match=words):
            train(f"--adaln_tables {flags}")
    short = "--resolution 32 --train_batch_size 2 --max_sequence_length 8 --report_to none --max_train_steps 1"
    with pytest.raises(ValueError, match="--train_text_encoder"):
        train("--adaln_tables --train_text_encoder --instance_prompt p", "clip", dreambooth, short,
              "--instance_data_dir")


def test_compiled_runs_and_other_kernels_give_the_plain_runs_weights_and_resume_to_the_bit(train, tmp_path,
                                                                                          monkeypatch):
    monkeypatch.setattr(speed, "BACKEND", "aot_eager")
    plain = train("--no-compile", "plain")
    assert same(train("--attention_backend _native_flash", "flash"), plain, 1e-6)
    straight = train("--compile --checkpointing_steps 2", "straight")
    assert same(straight, plain, 1e-6)
    (tmp_path / "resumed").mkdir()
    (tmp_path / "straight" / "checkpoint-2").rename(tmp_path / "resumed" / "checkpoint-2")
    resumed = train("--compile --resume_from_checkpoint latest", "resumed")
    assert same(resumed, straight, 0)


def test_nf4_leaves_out_of_quantisation_what_tables_replace():
    args = SimpleNamespace(bnb_options=None)
    plain = placement.precision(args, memory.Plan(base_precision="nf4"))["bnb_options"]
    tables = placement.precision(args, memory.Plan(base_precision="nf4", adaln_tables=True))["bnb_options"]
    assert "llm_int8_skip_modules" not in plain and tables["llm_int8_skip_modules"] == adaln.MODULES
    own = SimpleNamespace(bnb_options={"load_in_4bit": True, "llm_int8_skip_modules": ["proj_out"]})
    both = placement.precision(own, memory.Plan(base_precision="nf4", adaln_tables=True))["bnb_options"]
    assert both["llm_int8_skip_modules"] == ["proj_out", *adaln.MODULES]
    assert placement.precision(args, memory.Plan(base_precision="int8")) == {
        "bnb_options": None, "base_precision": "int8"}


def test_the_modules_that_tables_replace_are_those_that_nf4_is_told(tiny_pipe):
    linears = {name for name, module in tiny_pipe.transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    replaced = {name for name in linears if any(f"{key}." in name for key in adaln.MODULES)}
    adaln.build(tiny_pipe.transformer, [0.5, 1.0], 1.0, torch.zeros(1, 16), "cpu", torch.float32)
    left = {name for name, module in tiny_pipe.transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears - left == replaced


def test_8_bit_weights_of_bitsandbytes_never_wait_in_host_memory(tiny_model, tmp_path, monkeypatch):
    args = restoration.parse_args(["--pretrained_model_name_or_path", tiny_model, "--hr_root", "x", "--output_dir",
                                   str(tmp_path)])
    monkeypatch.setattr(memory, "plan_run", lambda args, *_, tables_possible, fixed, **more: memory.candidates(
        args.memory, tables_possible, fixed))

    def plans(level, bnb_options):
        args.memory, args.bnb_options = level, bnb_options
        return placement.plan(args, torch.device("cpu"), torch.bfloat16, [(1024, 1024)] * 2, ["p"])

    assert any(plan.offload_blocks for plan in plans("auto", {"load_in_4bit": True}))
    for level in ("auto", "lossless"):
        found = plans(level, {"load_in_8bit": True})
        assert {plan.base_precision for plan in found} == {"int8"} and not any(plan.offload_blocks for plan in found)
    with pytest.raises(ValueError, match="--memory offload: bitsandbytes' 8-bit weights would stay on the GPU"):
        plans("offload", {"load_in_8bit": True})


def test_a_gpu_that_is_too_small_is_told_what_would_fit(tiny_model, tmp_path, monkeypatch):
    args = restoration.parse_args(["--pretrained_model_name_or_path", tiny_model, "--hr_root", "x", "--output_dir",
                                   str(tmp_path), "--memory", "fastest", "--resolution", "1024"])
    monkeypatch.setattr(memory, "gpu_bytes", lambda device, limit=None: 2 * memory.GIB)
    monkeypatch.setattr(memory, "read_configs", lambda *args, **where: (memory.KONTEXT, memory.KONTEXT_VAE))
    with pytest.raises(ValueError, match=r"--memory fastest: \d+\.\d GiB predicted at 1024 x 1024 px"):
        placement.plan(args, torch.device("cpu"), torch.bfloat16, [(1024, 1024)] * 2, ["p"])

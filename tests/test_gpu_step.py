"""The GPU benchmark, on a CPU with a model of two blocks: all arms compute one step; its table and JSON are right."""

import json
import os
import subprocess
import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from bench import gpu_step, random_flux
from tests.conftest import PROJECT_ROOT
from utils import memory, quantise, speed
from utils.parse import run_main

TINY = ["--device", "cpu", "--layers", "1,1", "--heads", "2", "--resolution", "64", "--max_sequence_length", "16",
        "--rank", "4", "--steps", "2"]


def momentum(name):
    """Adam's first moments, a tenth of the clipped gradients, after the first step of an arm."""
    arm = gpu_step.Arm(name, gpu_step.parse_args([*TINY, "--memory_limit", "24"]), torch.device("cpu"), torch.bfloat16)
    arm.step(0)
    return torch.cat([arm.optimizer.state[parameter]["exp_avg"].float().flatten() for parameter in arm.parameters])


def test_random_model_has_the_planners_weights_and_no_zeros():
    pipe = random_flux.random_pipeline("cpu", torch.bfloat16, (1, 1), heads=2)
    config = memory.KONTEXT | {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    expected = {name: weight.shape for name, weight in memory.meta_transformer(config).named_parameters()}
    assert {name: weight.shape for name, weight in pipe.transformer.named_parameters()} == expected
    for model in (pipe.transformer, pipe.vae):
        for name, weight in model.named_parameters():
            assert weight.isfinite().all() and weight.count_nonzero() > 0.99 * weight.numel(), name


def test_every_arm_computes_the_official_gradients():
    official = momentum("official")
    assert official.norm() > 0
    assert torch.cosine_similarity(official, momentum("short"), dim=0) < 0.99  # another text: it can be told apart
    for name, least in {"selective": 0.999, "tables": 0.999, "planned": 0.999, "int8": 0.999, "fp8": 0.99,
                        "nf4": 0.95}.items():
        cosine = torch.cosine_similarity(official, momentum(name), dim=0).item()
        assert cosine > least, (name, cosine)


def test_the_official_step_keeps_native_attention_beside_an_arm_with_another_kernel(monkeypatch):
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    used, kernels = set(), dict(_AttentionBackendRegistry._backends)
    for name in ("native", "_native_flash"):
        def note(*args, name=name, **more):
            used.add(name)
            return kernels[AttentionBackendName(name)](*args, **more)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName(name), note)
    args = gpu_step.parse_args([*TINY, "--heads", "1", "--attention_backend", "_native_flash"])
    official, ours = (gpu_step.Arm(name, args, torch.device("cpu"), torch.bfloat16) for name in ("official", "none"))
    for arm, expected in ((official, "native"), (ours, "_native_flash")):
        used.clear()
        arm.step(0)
        assert used == {expected}


class Children:
    """Stands for subprocess.run: runs arms in this process, but for those that are to fail."""

    def __init__(self, monkeypatch, failing=()):
        self.names, self.failing = [], failing
        monkeypatch.setattr(subprocess, "run", self)

    def __call__(self, command, check):
        name = command[-3]
        self.names.append(name)
        code = 1 if name in self.failing else gpu_step.main(command[3:])
        if check and code:
            raise subprocess.CalledProcessError(code, command)
        return SimpleNamespace(returncode=code)


@pytest.mark.parametrize("separate", [False, True])
def test_losses_agree_and_table_and_json_are_written(separate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "BACKEND", "eager")
    children = Children(monkeypatch)
    file = tmp_path / "step.json"
    gpu_step.main([*TINY, "--arms", "official,tables", "--compile", "--peak_tflops", "100", "--output", str(file)]
                  + ["--separate"] * separate)
    text, rows = capsys.readouterr().out, json.loads(file.read_text())["rows"]
    assert len(children.names) == 2 * separate
    assert "| official | 16 |" in text and "| tables | 16 |" in text and f"torch {torch.__version__}" in text
    assert "mean nothing" in text
    assert [row["arm"] for row in rows] == ["official", "tables"]
    assert rows[0]["losses"] == pytest.approx(rows[1]["losses"], rel=1e-3) and len(rows[0]["losses"]) == 2
    assert rows[1]["MFU"] == pytest.approx(rows[1]["useful TFLOP"] / rows[1]["median s"] / 100)
    for row in rows:
        assert row["useful TFLOP"] == pytest.approx(sum(row["TFLOP"].values()))
        seconds = sum(work / row["card TFLOP/s"][kind] for kind, work in row["TFLOP"].items())
        assert row["card's s"] == pytest.approx(seconds) and row["of card"] == pytest.approx(seconds / row["median s"])


@pytest.mark.parametrize(("separate", "failing_step"), [(False, -gpu_step.WARM_UP), (False, 1), (True, 0)])
def test_an_arm_that_fails_is_named_and_takes_no_other_with_it(separate, failing_step, tmp_path, capsys, monkeypatch):
    children, step, make = Children(monkeypatch, ["official"]), gpu_step.Arm.step, gpu_step.random_pipeline
    made = []

    def fail(arm, number):
        if arm.name == "official" and number == failing_step:
            raise RuntimeError("no kernel image")
        return step(arm, number)

    def make_pipe(*args):
        if len(made) == 2 and failing_step < 0:
            assert made[1]() is None  # what failed has left the card
        pipe = make(*args)
        made.append(weakref.ref(pipe.transformer))
        return pipe

    monkeypatch.setattr(gpu_step.Arm, "step", fail)
    monkeypatch.setattr(gpu_step, "random_pipeline", make_pipe)
    file, tiny = tmp_path / "step.json", [*TINY, "--heads", "1"]
    code = gpu_step.main([*tiny, "--arms", "full,official,none", "--output", str(file), *["--separate"] * separate])
    written, text = json.loads(file.read_text()), capsys.readouterr()
    assert code == 1 and written["failed"] == ["official"] and text.err.splitlines()[-1] == "failed: official"
    assert [row["arm"] for row in written["rows"]] == ["full", "none"]
    assert ("no kernel image" in text.err) != separate  # a child has said it
    assert len(children.names) == 3 * separate
    if not separate:
        with pytest.raises(RuntimeError, match="no kernel image"):  # alone it ends as it did
            gpu_step.main([*tiny, "--arms", "official"])


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_arms_of_different_text_lengths_run_apart(compiled, monkeypatch):
    args = gpu_step.parse_args([*TINY, "--arms", "tables,short", *["--compile"] * compiled])
    assert gpu_step.fit_together(args, torch.device("cpu")) != compiled
    args.names = ["none", "tables"]
    assert gpu_step.fit_together(args, torch.device("cpu"))


def test_nf4_weights_of_an_arm_are_quantised_as_loading_does_it_and_compile_without_graph_breaks(monkeypatch):
    from bitsandbytes.nn import Linear4bit

    monkeypatch.setattr(speed, "BACKEND", "aot_eager")
    args = gpu_step.parse_args([*TINY, "--compile"])
    arm = gpu_step.Arm("nf4", args, torch.device("cpu"), torch.bfloat16)
    layers = [module for module in arm.pipe.transformer.modules() if isinstance(module, Linear4bit)]
    assert len(layers) > 10
    for layer in layers:
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", quantise.NF4["bnb_4bit_use_double_quant"])
        assert layer.weight.dtype == torch.uint8
    arm.step(0)
    assert torch.isfinite(torch.tensor(arm.losses)).all()
    torch.compiler.reset()


def test_ceilings_are_products_of_fluxs_shapes_in_bf16_and_fp8_and_attention_both_ways(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_step, "CALLS", 1)  # fp8 is slow on a CPU
    monkeypatch.setattr(gpu_step, "ROUNDS", 1)
    file = tmp_path / "ceilings.json"
    gpu_step.main([*TINY, "--heads", "1", "--ceilings", "8,16", "--train_batch_size", "2", "--output", str(file)])
    rows, text = json.loads(file.read_text())["rows"], capsys.readouterr().out
    work = {(row["kind"], row["work"].partition(", ")[2]): row["TFLOP"] for row in rows}
    for tokens in (8, 16):
        for columns, results in ((128, 128), (128, 512), (512, 128), (640, 128)):
            for kind in ("product", "fp8 product"):
                flop = 2 * 2 * tokens * columns * results
                assert work[kind, f"{2 * tokens} x {columns} x {results}"] == pytest.approx(flop / 1e12)
        forward = 2 * 2 * 2 * tokens**2 * 128  # two products of each of two images
        assert work["attention forward", f"2 x {tokens} tokens, native"] == pytest.approx(forward / 1e12)
        assert work["attention backward", f"2 x {tokens} tokens, native"] == pytest.approx(2 * forward / 1e12)
    for row in rows:
        assert row["TFLOP/s"] == pytest.approx(row["TFLOP"] / row["median s"])
    assert "| product, 16 x 128 x 512 |" in text and "attention ('_flash_3',): does not run here: " in text


def test_profile_names_the_kernels_of_a_step_with_groups_that_add_up(tmp_path, capsys):
    file = tmp_path / "profile.json"
    gpu_step.main([*TINY, "--arms", "none", "--profile", "--output", str(file)])
    row, = json.loads(file.read_text())["rows"]
    text = capsys.readouterr().out
    assert "profile of none: " in text and "| kernel | group | calls | seconds | share |" in text
    assert sum(kernel["share"] for kernel in row["kernels"]) == pytest.approx(1)
    assert len(row["losses"]) == len(row["seconds"]) == 2
    group = {kernel["kernel"]: kernel["group"] for kernel in row["kernels"]}
    assert (group["aten::mm"], group["aten::mul"], group["aten::empty"]) == ("GEMM", "elementwise", "other")
    calls = {kernel["kernel"]: kernel["calls"] for kernel in row["kernels"]}
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] == 2  # a block's one, two blocks
    assert text.count("| GEMM |") + text.count("| attention |") + text.count("| elementwise |") + text.count(
        "| other |") == gpu_step.KERNELS


@pytest.mark.parametrize(("kernel", "group"), [
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_64x128x128", "attention"),
    ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", "attention"),
    ("void pytorch_flash::flash_bwd_dot_do_o_kernel<true, ...>", "attention"),
    ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "GEMM"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>", "GEMM"),
    ("triton_tem_fused_mm_3", "GEMM"),
    ("triton_poi_fused_gelu_mul_2", "elementwise"),
    ("triton_red_fused__to_copy_native_layer_norm_5", "elementwise"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<...>>", "elementwise"),
    ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "elementwise"),
    ("Memcpy HtoD (Pinned -> Device)", "elementwise"),
    ("void at::native::index_elementwise", "elementwise"),
    ("void at::native::radixSortKVInPlace<2, -1, 32, 4, int, long>", "other"),
])
def test_kernels_are_grouped_by_their_names(kernel, group):
    assert gpu_step.group_of(kernel) == group


def test_sampling_counts_a_call_for_each_step(tmp_path, capsys):
    file = tmp_path / "sampling.json"
    gpu_step.main([*TINY, "--sampling", "1,2", "--output", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["eager, 1 steps", "eager, 2 steps"]
    assert rows[1]["useful TFLOP"] == pytest.approx(2 * rows[0]["useful TFLOP"])
    assert "| eager, 2 steps |" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "words"), [
    (["--arms", "none,quick"], "--arms quick: give some of"),
    (["--arms", "planned"], "--arms planned: needs --memory_limit"),
    (["--memory_limit", "0.1"], "--memory_limit 0.1: give more than"),
    (["--layers", "1"], "--layers 1, --sampling None, --ceilings None: give two"),
    (["--sampling", "a"], "--layers 1,1, --sampling a, --ceilings None: give whole numbers"),
    (["--ceilings", "0"], "--layers 1,1, --sampling None, --ceilings 0: give two"),
    (["--memory_limit", "inf"], "--memory_limit inf: give a finite number"),
    (["--device", "foo"], "--device foo: give cuda, cuda:0 or cpu"),
    (["--device", "cuda:7"], "--device cuda:7: 1 GPU here; --device cpu"),
    (["--peak_tflops", "0"], "--peak_tflops 0.0: give more than 0"),
    (["--steps", "0"], "--steps 0: give 1 or more"),
    (["--resolution", "72"], "72x72: this model needs multiples"),
])
def test_senseless_flags_end_in_one_line(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: gpu_step.main([*TINY, *flags]))
    assert stop.value.code == 2 and words in capsys.readouterr().err


def run_suite(tmp_path, *argv):
    """(exit code, stderr, command lines) of the suite; its python3 notes what it is given and fails at memory_12."""
    shim, log = tmp_path / "bin" / "python3", tmp_path / "log"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *memory_12*) exit 1;; esac\n')
    shim.chmod(0o755)
    environment = os.environ | {"PATH": f"{shim.parent}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    result = subprocess.run(["bash", "bench/gpu_suite.sh", *argv], capture_output=True, text=True, check=False,
                            cwd=PROJECT_ROOT, env=environment)
    return result.returncode, result.stderr, log.read_text().splitlines() if log.exists() else []


def test_suite_names_its_parts(tmp_path):
    code, words, commands = run_suite(tmp_path, "nothing")
    assert code == 2 and "ceilings|step1024|step1024b2|step512|" in words and not commands


def test_every_line_of_the_suite_is_valid_and_what_fails_does_not_stop_the_rest(tmp_path):
    code, words, commands = run_suite(tmp_path, "all", *TINY)
    assert code == 1 and words.strip() == "failed: memory_12"
    assert "bench.data" in commands[-1] and any("memory_24" in command for command in commands)
    arms, files = set(), []
    for command in commands:
        module, flags = command.split()[1], command.split()[2:]
        if module == "bench.gpu_step":
            args = gpu_step.parse_args(flags)
            arms |= set(args.names) if not (args.sampling or args.ceilings) else set()
            files.append(args.output)
            assert args.device == "cpu" and args.steps == 2  # what is given last wins
    assert arms == set(gpu_step.ARMS) - {"full", "full_tables"} and len(files) == len(set(files)) == 17

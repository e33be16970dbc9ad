"""The accounting of a training step: integers that formulas give too."""

import json

import pytest
import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, inject_adapter_in_model

from bench import flops
from utils import lora, memory
from utils.memory import Job
from utils.parse import run_main

SMALL = {"num_layers": 3, "num_single_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 64,
         "axes_dims_rope": [4, 6, 6], "joint_attention_dim": 48, "pooled_projection_dim": 32, "guidance_embeds": True}
SMALL_VAE = memory.KONTEXT_VAE | {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4}
D = 3072


def kontext(px=1024, **changes):
    return Job(memory.KONTEXT, memory.KONTEXT_VAE, ((px, px),) * 2, **changes)


def small(config=SMALL, **changes):
    return Job(config, SMALL_VAE, ((64, 96), (64, 32)), batch=2, text_tokens=16, rank=4, **changes)


@pytest.fixture(scope="module")
def step():
    """1024 px, batch 1, 512 text tokens, rank 16, no checkpointing."""
    return flops.count_step(kontext())


def test_forward_flops_equal_the_formula(step):
    tokens, text = 8704, 512
    linear = 19 * tokens * 12 * D * D + 38 * tokens * 12 * D * D  # q, k, v, out, feed-forward; the same in one stream
    once = 19 * 12 * D * D + 38 * 3 * D * D + 2 * D * D + 2 * (256 * D + D * D) + 768 * D + D * D  # per image
    ends = (tokens - text) * 64 * D * 2 + text * 4096 * D
    double = 16 * (8 * D) + 16 * (2 * 5 * D)  # LoRA: q, k, v, out; two layers of the feed-forward
    single = 16 * (6 * D) + 16 * (5 * D)
    adapters = tokens * (19 * double + 38 * single)
    assert step["forward attention"] == 57 * 4 * tokens**2 * D
    assert step["forward FLOPs"] == 2 * (linear + once + ends + adapters) + step["forward attention"]


def test_flash_backward_is_five_products_of_which_four_are_useful(step):
    assert 2 * step["backward attention"] == 5 * step["forward attention"]


@pytest.mark.parametrize(("px", "batch", "text", "forward", "attention", "backward", "backward_attention", "useful"), [
    (512, 4, 512, 151.4, 18.36, 179.1, 45.9, 321.3),
    (1024, 1, 512, 166.1, 53.06, 245.8, 132.7, 385.4)])
def test_tflop_equal_the_design_notes(px, batch, text, forward, attention, backward, backward_attention, useful, step):
    counts = step if px == 1024 else flops.count_step(kontext(px, batch=batch, text_tokens=text))
    total = counts["forward FLOPs"] + counts["backward FLOPs"] - counts["backward attention"] // 5
    names = ("forward FLOPs", "forward attention", "backward FLOPs", "backward attention")
    measured = [counts[name] / 1e12 for name in names] + [total / 1e12]
    assert measured == pytest.approx([forward, attention, backward, backward_attention, useful], abs=0.06)


def test_parameters_of_flux_by_group():
    counts = flops.count_parameters(kontext())
    assert counts["all"] == 11_901_408_320 == sum(counts[name] for name in flops.GROUPS)
    assert counts["AdaLN"] == 3_279_710_208
    assert (counts["LoRA"], counts["LoRA modules"]) == (54_165_504, 380)
    assert counts["double blocks, attention"] == 19 * (8 * D * D + 8 * D + 4 * 128)


def test_few_blocks_multiplied_equal_the_whole_model(monkeypatch):
    def counted():
        return flops.count_step(small()), flops.count_parameters(small()), flops.count_call(small())

    few = counted()
    monkeypatch.setattr(memory, "for_all_blocks", lambda count, config, layers=None: count(config))
    assert few == counted()


def test_full_checkpointing_recomputes_the_blocks_and_selective_all_but_attention():
    job = small(SMALL | {"num_layers": 1, "num_single_layers": 1})
    plain, full, selective = (flops.count_step(job, mode) for mode in ("none", "full", "selective"))
    assert full["backward FLOPs"] - selective["backward FLOPs"] == plain["forward attention"]
    again = full["backward FLOPs"] - plain["backward FLOPs"]
    outside = plain["forward FLOPs"] - again
    width, image, text = 32, 24 + 8, 16
    embedding = 256 * width + width**2
    assert outside == 2 * 2 * (  # batch 2: embedders, time, guidance, pooled text, head with its norm
        image * 64 * width * 2 + text * 48 * width + 2 * embedding + 32 * width + width**2 + 2 * width**2)


def test_offloaded_checkpoints_cost_what_full_checkpointing_does_and_keep_less():
    job = small(SMALL | {"num_layers": 2, "num_single_layers": 4})
    full, offload = flops.account(job, "full"), flops.account(job, "offload")
    assert {name for name in full if full[name] != offload[name]} == {"saved bytes", "peak bytes"}
    assert offload["saved bytes"] < full["saved bytes"] and offload["peak bytes"] < full["peak bytes"]


def test_without_reference_and_lora_a_sampling_call_is_the_forward_pass():
    config = SMALL | {"num_layers": 1, "num_single_layers": 2}
    job = Job(config, SMALL_VAE, ((64, 96),), batch=2, text_tokens=16, rank=4)
    tokens = job.tokens
    assert tokens == 16 + 24
    double, single = 2 * 4 * 32 * (8 + 10), 2 * 4 * 32 * (6 + 5)  # rank 4, width 32, as above
    adapters = job.batch * tokens * (double + 2 * single)
    assert flops.count_call(job) == flops.count_step(job)["forward FLOPs"] - adapters


def test_traffic_counts_what_is_read_and_written_and_no_views():
    a, b = (torch.empty(8, 8, device="meta") for _ in range(2))
    with flops.Traffic() as traffic:
        c = a @ b
    assert (traffic.launches, traffic.bytes) == (1, 3 * 256)
    with flops.Traffic() as traffic:
        c.view(64)[:32].view(4, 8).t().unsqueeze(0).expand(2, 8, 4)
    assert (traffic.launches, traffic.bytes) == (0, 0)
    with flops.Traffic() as traffic:
        c.add_(torch.empty(1, 8, device="meta").expand(8, 8))
    assert (traffic.launches, traffic.bytes) == (1, 2 * 256 + 32)


def test_command_prints_a_table_and_writes_the_same_integers(tiny_model, tmp_path, monkeypatch, capsys):
    output = tmp_path / "counts.json"
    monkeypatch.setattr("sys.argv", ["flops", "--model", tiny_model, "--resolution", "32", "--no-reference", "--rank",
                                     "2", "--layers", "proj_mlp", "--text_tokens", "8", "--batch", "3",
                                     "--checkpointing", "full", "--output", str(output)])
    flops.main()
    header, _, *rows = capsys.readouterr().out.splitlines()
    written = json.loads(output.read_text())
    assert "32 px, reference no, batch 3, 12 tokens (8 of text), rank 2, checkpointing full" in header
    assert written["tokens"] == 12 and len(rows) == len(written["counts"])
    assert written["counts"]["parameters: LoRA"] == 2 * (32 + 128)
    assert f"| parameters: LoRA | {2 * (32 + 128)} |" in rows


@pytest.mark.parametrize(("flags", "words"), [(["--batch", "0"], "--batch 0: give 1 or more"),
                                              (["--resolution", "100"], "100x100: this model needs multiples of 16")])
def test_senseless_numbers_end_in_one_line(flags, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["flops", *flags])
    with pytest.raises(SystemExit) as stop:
        run_main(flops.main)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_the_plans_are_predicted_and_say_so(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["flops", "--model", tiny_model, "--resolution", "64", "--text_tokens", "8",
                                     "--rank", "4", "--plans"])
    with pytest.raises(SystemExit) as stop:
        run_main(flops.main)
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and lines[0].startswith("Predicted, not measured")
    plans, cards = lines[4 : lines.index("", 2)], lines[lines.index("", 2) + 3 :]
    rows = dict(line.strip("| ").split(" | ") for line in plans)
    assert float(rows["full checkpointing, nf4 weights"]) <= float(rows["no checkpointing, bf16 weights"])
    assert len(rows) == len(plans) == len({plan for level in memory.LEVELS for plan in memory.candidates(level)})
    chosen = [line.strip("| ").split(" | ") for line in cards]
    assert [float(free) for free, _, _ in chosen] == list(flops.FREE_GIB)
    assert all(words in rows for _, words, _ in chosen)


@pytest.mark.parametrize("dtype, expected", [(torch.float32, 4), (torch.bfloat16, 6)])
def test_a_lora_layer_adds_two_products_a_scale_and_a_sum_and_never_touches_a_whole_activation_again(dtype, expected):
    """In bf16 the two fp32 masters are rounded too, which are small: rank 4 of 1024."""
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024, dtype=dtype))
    x = torch.randn(64, 1024, dtype=dtype)
    counts = []
    for with_lora in (False, True):
        if with_lora:
            inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"]), model)
            cast_training_params(model, torch.float32)
            lora.compute_in_input_dtype(model)
        with torch.no_grad(), flops.Traffic() as traffic:
            model(x)
        counts.append((traffic.launches, traffic.bytes))
    assert counts[1][0] - counts[0][0] == expected
    # A reads an activation, B writes one, the scale reads and writes one, the sum reads two and writes one: 7.
    assert 7 * x.nbytes < counts[1][1] - counts[0][1] < 8 * x.nbytes

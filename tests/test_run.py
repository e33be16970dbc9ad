"""Around the loop: the optimizer and schedule that the flags name, stop signals, the guard, the metrics file."""

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts import lora_tool, plot_loss
from tests.conftest import read_summary
from utils import card, parse, restore, run, validation

SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
             "piecewise_constant"]


def parse_args(*arguments):
    from utils import flux

    parser = parse.make_parser("test")
    flux.add_model_args(parser)
    run.add_training_args(parser)
    run.add_optimizer_args(parser)
    validation.add_validation_args(parser)
    return parser.parse_args(["--pretrained_model_name_or_path", "model", *arguments])


def parameters():
    return [torch.nn.Parameter(torch.ones(3, 4))]


# --- the optimizer

COMMON = ["--learning_rate", "0.01", "--adam_beta1", "0.8", "--adam_beta2", "0.95", "--adam_weight_decay", "0.03",
          "--adam_epsilon", "1e-6"]


@pytest.mark.parametrize(("flags", "kind"), [
    ([], "AdamW"), (["--optimizer", "AdamW"], "AdamW"), (["--use_8bit_adam"], "AdamW8bit"),
    (["--optimizer", "prodigy"], "Prodigy"), (["--optimizer", "Prodigy"], "Prodigy"),
    (["--optimizer", "schedule_free"], "AdamWScheduleFree"),
])
def test_flags_choose_the_optimizer_and_their_numbers_reach_it(flags, kind):
    optimizer = run.make_optimizer(parameters(), parse_args(*COMMON, *flags), num_processes=1)
    assert type(optimizer).__name__ == kind
    group = optimizer.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"], group["eps"]) == (0.01, (0.8, 0.95), 0.03, 1e-6)


def test_prodigys_own_flags_reach_it():
    optimizer = run.make_optimizer(parameters(), parse_args(
        "--optimizer", "prodigy", "--prodigy_beta3", "0.7", "--prodigy_decouple", "false",
        "--prodigy_use_bias_correction", "False", "--prodigy_safeguard_warmup", "no"), 1)
    group = optimizer.param_groups[0]
    assert (group["beta3"], group["use_bias_correction"], group["safeguard_warmup"]) == (0.7, False, False)
    assert group["decouple"] is False
    default = run.make_optimizer(parameters(), parse_args("--optimizer", "prodigy"), 1).param_groups[0]
    assert default["use_bias_correction"] and default["safeguard_warmup"]


def test_schedule_free_warms_up_by_itself():
    optimizer = run.make_optimizer(parameters(), parse_args("--optimizer", "schedule_free", "--lr_warmup_steps", "7"),
                                   1)
    assert optimizer.param_groups[0]["warmup_steps"] == 7


def test_scale_lr_multiplies_by_the_global_batch():
    flags = ["--learning_rate", "0.001", "--train_batch_size", "3", "--gradient_accumulation_steps", "5"]
    assert run.make_optimizer(parameters(), parse_args(*flags), 2).param_groups[0]["lr"] == 0.001
    scaled = run.make_optimizer(parameters(), parse_args(*flags, "--scale_lr"), 2)
    assert scaled.param_groups[0]["lr"] == pytest.approx(0.03)


@pytest.mark.parametrize("flags", [[], ["--optimizer", "prodigy", "--learning_rate", "1"],
                                   ["--optimizer", "schedule_free", "--lr_warmup_steps", "0"], ["--use_8bit_adam"]])
def test_every_optimizer_lowers_a_loss(flags):
    weights = parameters()
    optimizer = run.make_optimizer(weights, parse_args("--learning_rate", "0.05", *flags), 1)
    run.set_optimizer_mode(optimizer, training=True)
    for _ in range(200):  # Prodigy finds its rate first
        weights[0].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    run.set_optimizer_mode(optimizer, training=False)
    assert weights[0].abs().max() < 0.9


def test_schedule_free_has_other_weights_for_steps_than_for_evaluation():
    weights = parameters()
    optimizer = run.make_optimizer(weights, parse_args("--optimizer", "schedule_free", "--lr_warmup_steps", "0"), 1)
    wrapped = SimpleNamespace(optimizer=optimizer)  # as Accelerate wraps it
    run.set_optimizer_mode(wrapped, training=True)
    for _ in range(3):
        weights[0].grad = torch.ones_like(weights[0])
        optimizer.step()
    trained = weights[0].detach().clone()
    run.set_optimizer_mode(wrapped, training=False)
    assert not torch.equal(weights[0], trained)
    run.set_optimizer_mode(wrapped, training=True)
    torch.testing.assert_close(weights[0].detach(), trained)
    run.set_optimizer_mode(torch.optim.AdamW(weights), training=False)  # nothing to switch there


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_equals_diffusers(name):
    from diffusers.optimization import get_scheduler

    args = parse_args("--lr_scheduler", name, "--lr_warmup_steps", "4", "--max_train_steps", "20", "--lr_num_cycles",
                      "2", "--lr_power", "1.7", "--lr_step_rules", "1:5,0.1:12,0.01", "--learning_rate", "0.1")
    optimizers = [torch.optim.AdamW(parameters(), lr=0.1) for _ in range(2)]
    ours = run.make_lr_scheduler(optimizers[0], args)
    theirs = get_scheduler(name, optimizers[1], step_rules="1:5,0.1:12,0.01", num_warmup_steps=4,
                           num_training_steps=20, num_cycles=2, power=1.7)
    rates = [[], []]
    for _ in range(20):
        for i, (optimizer, schedule) in enumerate(zip(optimizers, (ours, theirs), strict=True)):
            rates[i].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    assert rates[0] == rates[1]
    assert (len(set(rates[0])) > 1) == (name != "constant")


def test_the_schedules_of_the_flag_are_all_of_diffusers():
    from diffusers.optimization import SchedulerType

    assert sorted(kind.value for kind in SchedulerType) == sorted(SCHEDULES)
    for name in SCHEDULES:
        assert parse_args("--lr_scheduler", name).lr_scheduler == name


# --- refusals


@pytest.mark.parametrize(("flags", "word"), [
    (["--train_batch_size", "0"], "--train_batch_size 0"),
    (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0"),
    (["--num_train_epochs", "0"], "--num_train_epochs 0"),
    (["--max_train_steps", "0"], "--max_train_steps 0"),
    (["--logging_steps", "0"], "--logging_steps 0"),
    (["--checkpoints_total_limit", "0"], "--checkpoints_total_limit 0"),
    (["--checkpointing_steps", "-1"], "--checkpointing_steps -1"),
    (["--learning_rate", "-0.5"], "--learning_rate -0.5"),
    (["--learning_rate", "nan"], "--learning_rate nan"),
    (["--learning_rate", "inf"], "--learning_rate inf"),
    (["--max_grad_norm", "-1"], "--max_grad_norm -1"),
    (["--seed", "-1"], "--seed -1"),
    (["--lr_warmup_steps", "-1"], "--lr_warmup_steps -1"),
    (["--validation_steps", "0"], "--validation_steps 0"),
    (["--validation_epochs", "0"], "--validation_epochs 0"),
    (["--num_validation_images", "-1"], "--num_validation_images -1"),
    (["--num_inference_steps", "0"], "--num_inference_steps 0"),
    (["--max_sequence_length", "0"], "--max_sequence_length 0"),
    (["--mixed_precision", "fp16"], "--mixed_precision fp16"),
    (["--lr_scheduler", "piecewise_constant"], "--lr_step_rules"),
    (["--optimizer", "schedule_free", "--lr_scheduler", "cosine"], "--lr_scheduler constant"),
    (["--optimizer", "prodigy", "--use_8bit_adam"], "--use_8bit_adam"),
    (["--hub_token", "hf_x", "--push_to_hub", "--report_to", "wandb"], "--hub_token"),
    (["--hub_token", "hf_x"], "--push_to_hub"),
])
def test_impossible_training_options_are_refused_by_name(flags, word):
    run.check_training_args(parse_args())
    with pytest.raises(ValueError, match=word) as error:
        run.check_training_args(parse_args(*flags))
    assert "\n" not in str(error.value) and "hf_x" not in str(error.value)


def test_an_output_folder_with_a_run_is_refused_unless_it_is_resumed(tmp_path):
    args = parse_args("--output_dir", str(tmp_path / "out"))
    run.check_output_dir(args)
    for made in (tmp_path / "out" / "pytorch_lora_weights.safetensors", tmp_path / "out/checkpoint-3/manifest.json"):
        made.parent.mkdir(exist_ok=True)
        made.touch()
        with pytest.raises(ValueError, match=f"--output_dir {tmp_path / 'out'} holds .*--resume_from_checkpoint"):
            run.check_output_dir(args)
        run.check_output_dir(parse_args("--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "latest"))
        made.unlink()
    run.check_output_dir(args)


def test_identity_names_what_a_resumed_run_must_share():
    args = SimpleNamespace(**vars(parse_args("--seed", "3")), rank=4, lora_alpha=None, lora_layers=None, use_dora=False,
                           use_rslora=False, use_ema=False, aspect_ratio_buckets=None, weighting_scheme="none",
                           degradation_types="noise")
    identity = run.identity(args, {"start_noise": [0.5, 0.5]}, items=7, num_processes=2, more=["degradation_types"])
    assert identity["start_noise"] == [0.5, 0.5] and identity["seed"] == 3
    assert identity["images"] == 7 and identity["processes"] == 2
    assert identity["degradation_types"] == "noise"
    assert json.loads(json.dumps(identity)) == identity  # what is stored compares equal to what was given
    assert not {"max_train_steps", "output_dir", "report_to"} & identity.keys()


@pytest.mark.parametrize("items, batch, accumulation, processes, steps", [
    (10, 4, 1, 1, 3), (10, 4, 1, 2, 2), (8, 4, 1, 2, 1), (10, 2, 2, 1, 3), (10, 2, 2, 2, 2)])
def test_an_epoch_is_the_items_over_the_global_batch_rounded_up(items, batch, accumulation, processes, steps):
    args = parse_args("--train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation),
                      "--num_train_epochs", "3", "--validation_epochs", "2")
    assert run.plan_steps(args, items, processes) == 2 * steps and args.max_train_steps == 3 * steps
    args.validation_steps = 7
    assert run.plan_steps(args, items, processes) == 7 and args.max_train_steps == 3 * steps  # kept, once it is set


def test_fewer_items_than_one_step_takes_is_an_error():
    with pytest.raises(ValueError, match="7 usable images are fewer than --train_batch_size 4 x 2 processes"):
        run.plan_steps(parse_args("--train_batch_size", "4"), 7, 2)


# --- stopping


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield run.StopSignal()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_for_a_stop_and_a_second_ctrl_c_stops_at_once(stop, number):
    assert stop.agreed() is None
    os.kill(os.getpid(), number)
    assert stop.agreed() == number
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_evaluation_weights_come_back_to_the_bit_where_schedule_free_would_round():
    from schedulefree import AdamWScheduleFree

    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(4096))]
    optimizer = AdamWScheduleFree(weights, lr=0.1)
    run.set_optimizer_mode(optimizer, training=True)
    for _ in range(3):
        weights[0].grad = torch.randn(4096)
        optimizer.step()
    before = weights[0].detach().clone()
    with run.evaluation_weights(optimizer, None, weights):
        assert not torch.equal(weights[0], before)
    assert torch.equal(weights[0], before)
    run.set_optimizer_mode(optimizer, training=False)
    run.set_optimizer_mode(optimizer, training=True)
    assert not torch.equal(weights[0], before)  # the way back alone


# --- the guard

ALONE = SimpleNamespace(num_processes=1)


def guarded_step(weights, guard, optimizer, step, poison, max_norm=1.0):
    """One step of (w - 3)^2, spoiled at `poison`; returns the norm."""
    loss = (weights - 3).square().sum()
    if poison in ("nan loss", "inf loss"):
        loss = loss * float(poison.split()[0])
    optimizer.zero_grad()
    guard.protect(loss, [f"image_{step}.png"]).backward()
    if poison in ("nan gradient", "inf gradient", "-inf gradient"):
        weights.grad[1] = float(poison.split()[0])
    norm = guard.filter([weights], max_norm, step)
    optimizer.step()
    return norm


@pytest.mark.parametrize("max_norm", [0, 1.0])
@pytest.mark.parametrize("poison", ["nan loss", "inf loss", "nan gradient", "inf gradient", "-inf gradient"])
def test_non_finite_numbers_never_reach_the_weights_and_stop_training_by_name(poison, max_norm):
    weights, guard = torch.nn.Parameter(torch.zeros(3)), run.FiniteGuard()
    optimizer = torch.optim.AdamW([weights], lr=0.1)
    for step in range(1, 6):
        guarded_step(weights, guard, optimizer, step, poison if step == 3 else None, max_norm)
    state = optimizer.state[weights]
    assert weights.isfinite().all() and state["exp_avg"].isfinite().all() and state["exp_avg_sq"].isfinite().all()
    with pytest.raises(ValueError, match="step 3 is not finite.*image_3.png.*--learning_rate") as error:
        guard.check(ALONE)
    assert "\n" not in str(error.value) and "image_2" not in str(error.value) and "image_4" not in str(error.value)


def test_a_first_step_that_is_not_finite_leaves_the_weights_where_they_were():
    weights, guard = torch.nn.Parameter(torch.ones(3)), run.FiniteGuard()
    guarded_step(weights, guard, torch.optim.AdamW([weights], lr=0.1, weight_decay=0.0), 1, "nan loss")
    assert torch.equal(weights.detach(), torch.ones(3))


def test_finite_steps_pass_and_equal_plain_clipping():
    ours, plain = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizers = [torch.optim.AdamW([weights], lr=0.1) for weights in (ours, plain)]
    guard = run.FiniteGuard()
    for step in range(1, 6):
        norm = guarded_step(ours, guard, optimizers[0], step, None)
        optimizers[1].zero_grad()
        (plain - 3).square().sum().backward()
        assert torch.nn.utils.clip_grad_norm_([plain], 1.0) == norm
        optimizers[1].step()
        assert torch.equal(ours, plain)
        guard.check(ALONE)
    assert norm > 1 and guard.noted == [] and guard.files == []


def test_the_guard_clips_to_the_norm_or_not_at_all():
    for max_norm, wanted in ((1.0, 1.0), (0, 5.0), (100.0, 5.0)):
        weights = torch.nn.Parameter(torch.zeros(2))
        weights.grad = torch.tensor([3.0, 4.0])
        norm = run.FiniteGuard().filter([weights], max_norm, 1)
        assert norm.item() == pytest.approx(5)
        assert weights.grad.norm().item() == pytest.approx(wanted, rel=1e-5)


def test_the_guard_names_every_batch_of_an_accumulated_step():
    weights, guard = torch.nn.Parameter(torch.ones(1)), run.FiniteGuard()
    guard.protect(weights.sum(), ["a.png"]).backward()
    guard.protect(weights.sum() * float("nan"), ["b.png"]).backward()
    guard.filter([weights], 1.0, 4)
    with pytest.raises(ValueError, match="step 4 .*a.png, b.png"):
        guard.check(ALONE)


def test_a_check_without_steps_passes():
    run.FiniteGuard().check(ALONE)


# --- records


class Tracker:
    is_main_process = True

    def __init__(self):
        self.logged, self.config = [], None

    def log(self, values, step):
        self.logged.append((step, values))

    def init_trackers(self, name, config):
        self.config = config


def strict(line):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(line, parse_constant=refuse)


def test_metrics_are_strict_json_lines_and_trackers_get_the_finite_ones(tmp_path):
    tracker = Tracker()
    run.log_metrics(tracker, tmp_path, {"loss/flow": 0.5, "psnr": float("inf"), "lpips": float("nan")}, 3)
    run.log_metrics(tracker, tmp_path, {"loss/flow": 0.25, "lpips": None}, 4)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [strict(line) for line in lines] == [
        {"step": 3, "loss/flow": 0.5, "psnr": None, "lpips": None}, {"step": 4, "loss/flow": 0.25, "lpips": None}]
    assert tracker.logged == [(3, {"loss/flow": 0.5}), (4, {"loss/flow": 0.25})]


def test_other_ranks_write_no_metrics(tmp_path):
    run.log_metrics(SimpleNamespace(is_main_process=False), tmp_path, {"loss": 1.0}, 1)
    assert not list(tmp_path.iterdir())


def test_start_run_writes_args_without_secrets_and_cuts_metrics_back_to_the_resumed_step(tmp_path):
    tracker = Tracker()
    args = parse_args("--output_dir", str(tmp_path), "--hub_token", "hf_secret", "--push_to_hub")
    for step in (1, 2, 3, 4):
        run.log_metrics(tracker, tmp_path, {"loss": step / 2}, step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    run.start_run(tracker, args, 3, "project")
    assert [strict(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    run.log_metrics(tracker, tmp_path, {"loss": 0.1}, 4)
    assert [strict(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    stored = json.loads((tmp_path / "args.json").read_text())
    assert stored["output_dir"] == str(tmp_path) and stored["train_batch_size"] == 4
    assert "hf_secret" not in (tmp_path / "args.json").read_text() + json.dumps(tracker.config)
    assert all(isinstance(value, (int, float, str, bool)) for value in tracker.config.values())


def test_a_cpu_computes_in_fp32_whatever_is_asked_and_says_so(tmp_path, capsys):
    accelerator, dtype = run.make_accelerator(parse_args("--mixed_precision", "bf16", "--report_to", "none",
                                                         "--output_dir", str(tmp_path)))
    assert accelerator.mixed_precision == "no" and accelerator.device.type == "cpu"
    assert dtype == torch.float32
    assert "--mixed_precision bf16: no GPU" in capsys.readouterr().out


def test_unreadable_files_are_listed_once_per_report(tmp_path):
    run.report_skipped([], tmp_path, "left out")
    assert not (tmp_path / "unreadable.txt").exists()
    run.report_skipped(["a.png: truncated"], tmp_path, "left out")
    run.report_skipped(["b.png: empty"], tmp_path, "replaced")
    assert (tmp_path / "unreadable.txt").read_text() == "a.png: truncated\nb.png: empty\n"


def test_a_reported_loss_is_the_mean_over_the_micro_steps_that_have_it(tmp_path):
    accelerator = SimpleNamespace(is_main_process=True, is_local_main_process=False, reduce=lambda value, how: value,
                                  log=lambda values, step: None, device=torch.device("cpu"))
    args = SimpleNamespace(output_dir=tmp_path, max_train_steps=4)
    progress = run.Progress(accelerator, args, 0, prefix="train/", on_bar=("a",))
    schedule = SimpleNamespace(get_last_lr=lambda: [0.1])
    progress.add({"a": torch.tensor(1.0), "b": torch.tensor(4.0)})
    progress.add({"a": torch.tensor(3.0)})
    progress.step()
    progress.report(accelerator, 1, torch.tensor(2.0), schedule)
    progress.add({"a": torch.tensor(5.0)})
    progress.step()
    progress.report(accelerator, 2, torch.tensor(2.0), schedule)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [{name: line[name] for name in line if "train/" in name} for line in lines] == [
        {"train/a": 2.0, "train/b": 4.0}, {"train/a": 5.0}]
    assert lines[0]["gradient_norm"] == 2.0 and lines[0]["lr"] == 0.1


def test_the_bar_and_the_log_tell_the_memory(tmp_path, monkeypatch, capsys):
    accelerator = SimpleNamespace(is_main_process=True, is_local_main_process=True, reduce=lambda value, how: value,
                                  log=lambda values, step: None, device=torch.device("cpu"))
    progress = run.Progress(accelerator, SimpleNamespace(output_dir=tmp_path, max_train_steps=8), 2)
    used = run.memory_gib(accelerator.device)
    kept = torch.ones(2**26)  # a quarter of a GiB
    assert 0.05 < used < 64 and run.memory_gib(kept.device) - used == pytest.approx(0.25, abs=0.05)
    monkeypatch.setattr(run, "memory_gib", lambda device: 1.2345)
    progress.add({"flow": torch.tensor(0.5)})
    progress.step()
    progress.report(accelerator, 3, torch.tensor(2.0), SimpleNamespace(get_last_lr=lambda: [0.1]))
    progress.bar.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["memory_gib"] == 1.2345
    bar = capsys.readouterr().err
    assert "3/8 [" in bar and "flow=0.5000, memory=1.2 GiB" in bar
    assert re.search(r"<[\d:]+, +[\d.]+(step/s|s/step)", bar)  # ETA and rate


def test_memory_on_a_gpu_is_what_the_allocator_had_at_most(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * 2**29)
    assert run.memory_gib(torch.device("cuda", 0)) == 1.5


# --- the summary in the end


def summary(capsys, folder, settings, **changes):
    """{name: text} of what print_summary says of the run in `folder`."""
    args = SimpleNamespace(**{"output_dir": str(folder), "max_train_steps": 7, "use_dora": False} | changes)
    uses = run.lora_uses(args, settings, card.restore_command("a model", str(folder)))
    run.print_summary(args, {"LoRA": folder / run.LORA_FILE}, uses)
    printed = capsys.readouterr().out
    assert printed.startswith("\nFinished after 7 steps:\n")
    return read_summary(printed)


def test_every_place_of_the_summary_is_there_and_every_command_runs(tiny_lora, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "my lora"
    shutil.copytree(tiny_lora, folder)
    for name in ("args.json", "validation/step-000000.png", "validation/step-000007.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss/flow": 0.5}\n')
    settings = restore.STOCK_SETTINGS | {"start_noise": [0.5, 0.5]}
    told = summary(capsys, folder, settings)
    assert [told[name] for name in ("LoRA", "options")] == [str(folder / name) for name in (run.LORA_FILE, "args.json")]
    assert Path(told["LoRA"]).is_file() and "checkpoints" not in told
    assert told["validation"] == f"{folder / 'validation' / 'step-000000.png'} ... step-000007.png"
    assert "start at pure noise, this LoRA at 0.5" in told["diffusers"]

    words = shlex.split(told["here"])
    assert words[:2] == ["python", "test_deg_lora_flux_kontext.py"]
    assert words[2:] == ["--pretrained_model_name_or_path", "a model", "--lora", str(folder), "--input", "photo.jpg",
                         "--output", "restored"]
    for name, module, main in (("curves", "scripts.plot_loss", lambda: plot_loss.main(plot_loss.parse_args())),
                               ("ComfyUI", "scripts.lora_tool", lora_tool.main)):
        words = shlex.split(told[name].partition(", for")[0])
        assert words[:3] == ["python", "-m", module]
        monkeypatch.setattr("sys.argv", words[2:])
        assert not main()
    assert (folder / "curves.png").is_file() and (folder / "comfyui.safetensors").is_file()


def test_the_summary_loads_a_stock_lora_in_diffusers_and_gives_a_dora_to_no_other_program(tmp_path, capsys):
    told = summary(capsys, tmp_path, restore.STOCK_SETTINGS)
    assert told["diffusers"] == f"pipe.load_lora_weights({str(tmp_path)!r})" and "validation" not in told
    told = summary(capsys, tmp_path, restore.STOCK_SETTINGS, use_dora=True)
    assert "scripts.lora_tool merge" in told["ComfyUI"]

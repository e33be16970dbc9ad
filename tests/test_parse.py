"""The command line: --config sets defaults, bad input is one line and exit code 2, a fault keeps its traceback."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils import flow_matching as fm
from utils import parse, run

PROJECT_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def parser():
    parser = parse.make_parser("test")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", default="x")
    parser.add_argument("--use_dora", action="store_true")
    parser.add_argument("--kind", choices=["a", "b"], default="a")
    fm.add_flow_args(parser)
    return parser


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_config_sets_defaults_and_the_command_line_wins(parser, config):
    path = config("rank: 4\nlearning_rate: 0.5\nuse_dora: true\nprompt: 'restore: this'\n")
    args = parser.parse_args(["--config", path, "--rank", "8"])
    assert (args.rank, args.learning_rate, args.use_dora, args.prompt) == (8, 0.5, True, "restore: this")
    assert args.kind == "a"
    assert parser.parse_args(["--rank", "8", "--config", path]).rank == 8  # wherever it stands


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1e4", 1e4), ("2E-5", 2e-5), ("0.1", 0.1), ("3", 3.0)])
def test_numbers_of_a_config_are_numbers(parser, config, text, value):
    rate = parser.parse_args(["--config", config(f"learning_rate: {text}\n")]).learning_rate
    assert rate == value and isinstance(rate, float)


@pytest.mark.parametrize(("text", "value"), [("false", False), ("true", True)])
def test_reference_tokens_can_be_switched_in_a_config(parser, config, text, value):
    path = config(f"reference_tokens: {text}\n")
    assert parser.parse_args(["--config", path]).reference_tokens is value
    assert parser.parse_args(["--config", path, "--no-reference_tokens"]).reference_tokens is False
    assert parser.parse_args(["--config", path, "--reference_tokens"]).reference_tokens is True


def test_a_config_may_refer_to_its_own_keys(parser, config):
    args = parser.parse_args(["--config", config("rank: 4\nlearning_rate: ${rank}e-3\nprompt:\n")])
    assert (args.rank, args.learning_rate) == (4, 0.004) and args.prompt == parser.get_default("prompt")


def test_what_looks_like_a_number_stays_a_name_in_a_config(parser, config):
    path = config("prompt: 00610\nlora_layers: [on, 1_000, 00610]\n")
    parser.add_argument("--lora_layers", nargs="+")
    args = parser.parse_args(["--config", path])
    assert args.prompt == "00610" and args.lora_layers == ["on", "1_000", "00610"]


def test_a_key_that_stands_twice_in_a_config_exits_with_2(parser, config, capsys):
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(["--config", config("rank: 4\nrank: 8\n")])
    assert exit.value.code == 2 and "rank" in capsys.readouterr().err


def test_a_config_that_refers_to_a_key_that_is_not_there_exits_with_2(parser, config, capsys):
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(["--config", config("learning_rate: ${rnak}\n")])
    assert exit.value.code == 2 and "rnak" in capsys.readouterr().err


def test_a_config_can_leave_a_switch_off(parser, config):
    assert parser.parse_args(["--config", config("use_dora: false\n")]).use_dora is False


@pytest.mark.parametrize(("text", "word"), [
    ("rnak: 4\n", "rnak"), ("rank: four\n", "rank"), ("rank: 1.5\n", "rank"), ("kind: c\n", "kind"),
    ("learning_rate: fast\n", "learning_rate"), ("foo:\n  rank: 4\n", "foo is a section"),
    ("config: other.yaml\n", "config is no key"),
])
def test_an_unknown_key_or_a_wrong_type_in_a_config_exits_with_2_naming_it(parser, config, capsys, text, word):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--config", config(text)])
    assert stop.value.code == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--rnak", "4"], ["--rank", "four"], ["--ran", "4"], ["--kind", "c"], ["4"],
                                       ["--config", "/no/such/file.yaml"]])
def test_a_bad_command_line_exits_with_2(parser, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_config_that_is_not_yaml_exits_with_2(parser, config, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--config", config("rank: [4\n")])
    assert stop.value.code == 2


@pytest.mark.parametrize(("text", "value"), [("True", True), ("1", True), ("yes", True), ("False", False),
                                             ("false", False), ("0", False), ("no", False)])
def test_true_or_false_reads_false_as_false(text, value):
    assert run.true_or_false(text) is value


def test_true_or_false_refuses_other_words():
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--flag", type=run.true_or_false)
    with pytest.raises(argparse.ArgumentError, match="--flag"):
        parser.parse_args(["--flag", "maybe"])


# --- run_main


def test_bad_input_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        parse.run_main(lambda: fm.parse_start_noise("2"))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --start_noise 2: ") and error.count("\n") == 1


def test_a_message_of_several_lines_becomes_one(capsys):
    def main():
        raise ValueError("first\n   second")

    with pytest.raises(SystemExit):
        parse.run_main(main)
    assert capsys.readouterr().err == "error: first second\n"


def test_bad_input_chained_from_a_library_error_is_one_line_too(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        parse.run_main(lambda: parse.writable_folder(tmp_path / "file" / "below", "--output_dir"))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: --output_dir {tmp_path / 'file' / 'below'} cannot be written")


def test_a_missing_file_names_itself(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse.run_main(lambda: open(tmp_path / "absent"))
    assert stop.value.code == 2
    assert str(tmp_path / "absent") in capsys.readouterr().err


def accident():
    return int("four")


def library_error():
    return json.loads("{")


def other_accident():
    return {}["key"]


@pytest.mark.parametrize(("main", "kind"), [(accident, ValueError), (library_error, ValueError),
                                            (other_accident, KeyError)])
def test_a_fault_keeps_its_traceback(main, kind, capsys):
    with pytest.raises(kind):
        parse.run_main(main)
    assert capsys.readouterr().err == ""


def test_kontext_traceback_shows_it_for_bad_input_too(monkeypatch):
    monkeypatch.setenv("KONTEXT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="--start_noise"):
        parse.run_main(lambda: fm.parse_start_noise("2"))


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (143, 143)])
def test_the_exit_code_is_what_main_returns(returned, code):
    with pytest.raises(SystemExit) as stop:
        parse.run_main(lambda: returned)
    assert stop.value.code == code


def test_in_a_process_of_its_own_the_shell_sees_code_and_line():
    script = "from utils import parse, flow_matching as fm; parse.run_main(lambda: fm.parse_start_noise('2'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


# --- files


def test_secrets_are_not_among_the_public_arguments():
    args = SimpleNamespace(hub_token="hf_secret", rank=4, path=Path("a"), list=[1, 2], none=None, flag=True, kind=set())
    public = parse.public_args(args)
    assert "hf_secret" not in json.dumps(public) and "hub_token" not in public
    assert public == {"rank": 4, "path": "a", "list": [1, 2], "none": None, "flag": True, "kind": "set()"}


def test_numbers_below_the_least_infinite_or_none_at_all_are_refused_by_flag():
    args = argparse.Namespace(steps=1, rate=0.0, left_out=None)
    parse.check_least(args, steps=1, rate=0, left_out=1)
    for name, value in (("steps", 0), ("rate", -0.1), ("rate", float("nan")), ("rate", float("inf"))):
        with pytest.raises(ValueError, match=f"^--{name} {value}: give .* or more$"):
            parse.check_least(argparse.Namespace(**vars(args) | {name: value}), steps=1, rate=0, left_out=1)


def test_write_json_writes_whole_files_or_none(tmp_path, monkeypatch):
    path = tmp_path / "args.json"
    parse.write_json(path, {"prompt": "清晰", "rank": 4})
    assert json.loads(path.read_text(encoding="utf-8")) == {"prompt": "清晰", "rank": 4}
    assert "清晰" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError):
        parse.write_json(path, {"psnr": float("nan")})  # no JSON
    monkeypatch.setattr(parse.Path, "write_text", lambda self, text, **kwargs: self.write_bytes(b"{") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        parse.write_json(path, {"rank": 8})
    assert json.loads(path.read_text(encoding="utf-8"))["rank"] == 4


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    folder = parse.writable_folder(tmp_path / "a" / "b", "--output_dir")
    assert folder.is_dir() and not list(folder.iterdir())


def test_a_file_in_place_of_a_folder_is_refused_by_flag(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"--output_dir {tmp_path / 'file'} is a file"):
        parse.writable_folder(tmp_path / "file", "--output_dir")


def test_out_of_gpu_memory_ends_in_one_line_with_the_cure(capsys):
    import torch

    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    with pytest.raises(SystemExit) as stop:
        parse.run_main(main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--gradient_checkpointing" in error
    with pytest.raises(RuntimeError, match="another"):  # any other fault keeps its traceback
        parse.run_main(lambda: (_ for _ in ()).throw(RuntimeError("another")))

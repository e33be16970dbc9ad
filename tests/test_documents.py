"""Every command in every document is one that its program understands. Most would need a full-size model or hours, so
they are read here by the program's own parser; what is run with its options, other tests run."""

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys

import configargparse
import pytest

from tests.conftest import PROJECT_ROOT

DOCUMENTS = sorted(path for pattern in ("*.md", "recipes/*/*.md", "bench/*.md", "assets/*/*.md")
                   for path in PROJECT_ROOT.glob(pattern))
LAUNCHERS = {"python", ".venv/bin/python", "accelerate", ".venv/bin/accelerate", "torchrun"}
END = {"|", "&&", ";", ">", "2>&1"}


class Parsing(Exception):
    """Instead of parsing: the parser, the words it was given, and its other arguments."""


def commands(text):
    """Shell lines of the fenced blocks, and those between backticks that start a Python program."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return lines + [" ".join(code.split()) for code in re.findall(r"`([^`]*)`", inline)]


def program(line):
    """(module name, its arguments) of a line that starts one of this project's Python programs, else None."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a quote in prose
        return None
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if not words or words[0] not in LAUNCHERS:
        return None
    words = words[: next((i for i, word in enumerate(words) if word in END), len(words))]
    for i, word in enumerate(words):
        if word == "-m" and words[i + 1 : i + 2] and re.match(r"(scripts|bench|recipes|tests)\.", words[i + 1]):
            return words[i + 1], words[i + 2 :]
        if word.endswith(".py"):
            return word.removesuffix(".py").replace("/", "."), words[i + 1 :]
    return None


ALL = {(name, *arguments): path.relative_to(PROJECT_ROOT).as_posix() for path in DOCUMENTS
       for found in map(program, commands(path.read_text(encoding="utf-8"))) if found
       for name, arguments in [found]}


def test_commands_are_found_in_the_documents():
    assert len(ALL) > 60 and len(set(ALL.values())) > 10
    assert program("A=1 accelerate launch --num_processes 2 -m recipes.a.b --c d | tail") == (
        "recipes.a.b", ["--c", "d"])
    assert program(".venv/bin/python x.py --a 'b c'  # why") == ("x", ["--a", "b c"])
    assert program("python -m pip install x") is None and program("it's prose") is None


@pytest.mark.parametrize("command", sorted(ALL), ids=lambda command: " ".join(command)[:80])
def test_a_documents_command_is_understood_by_its_program(command, monkeypatch):
    def capture(parser, args=None, namespace=None, **others):
        raise Parsing(parser, list(sys.argv[1:] if args is None else args), others)

    name, *words = command
    is_part = any(word.startswith(("...", "…")) for word in words)
    words = ["1" if word.startswith("$") else word for word in words if not word.startswith(("...", "…"))]
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.chdir(PROJECT_ROOT)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", capture)
    monkeypatch.setattr(configargparse.ArgumentParser, "parse_args", capture)
    try:
        if hasattr(module, "parse_args"):
            module.parse_args(words)
        else:
            module.main()
    except Parsing as parsing:
        parser, given, others = parsing.args
    else:
        pytest.fail(f"{name} has no parser")
    for action in parser._actions:
        action.required = action.required and not is_part
    monkeypatch.undo()
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            _, unknown = parser.parse_known_args(given, **others)
        except SystemExit:
            pytest.fail(f"{ALL[command]}: {errors.getvalue().splitlines()[-1]}")
    assert not unknown, f"{ALL[command]}: {name} has no {unknown}"

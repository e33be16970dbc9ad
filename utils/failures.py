"""What a run over many files could not do, told to the user and to a file. Imports nothing heavy."""

import json
import sys
from pathlib import Path

from utils.parse import write_json


def is_report(file):
    """True for a failures.json as `report_failures` writes it."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(rows, list) and bool(rows) and all(
        isinstance(row, dict) and row.keys() == {"input", "reason"} for row in rows)


def check_report(folder):
    """ValueError where failures.json of a folder is no report of ours: to be asked before the work of a run begins."""
    file = Path(folder, "failures.json")
    if file.exists() and not is_report(file):
        raise ValueError(f"{file} would be written over, and was not made here; name another folder, or move it away")


def report_failures(failures, folder):
    """Name each failure on stderr and write failures.json, or remove an old one. Returns the exit code, 1 or 0.
    failures: [(path, exception)]. ValueError as from `check_report`."""
    for path, error in failures:
        print(f"failed: {path}: {str(error).removeprefix(f'{path}: ')}", file=sys.stderr)
    file = Path(folder, "failures.json")
    if failures:
        check_report(folder)
        write_json(file, [{"input": str(path), "reason": str(error)} for path, error in failures])
    elif is_report(file):
        file.unlink()
    return int(bool(failures))

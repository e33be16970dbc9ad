"""What a run over many files could not do, told to the user and to a file. Imports nothing heavy."""

import sys
from pathlib import Path

from utils.parse import write_json


def report_failures(failures, folder):
    """Write failures.json, or remove an old one; name each failure on stderr. Returns the exit code, 1 or 0.
    failures: [(path, exception)]."""
    file = Path(folder, "failures.json")
    file.unlink(missing_ok=True)
    if failures:
        write_json(file, [{"input": str(path), "reason": str(error)} for path, error in failures])
    for path, error in failures:
        print(f"failed: {path}: {str(error).removeprefix(f'{path}: ')}", file=sys.stderr)
    return int(bool(failures))

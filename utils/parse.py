"""Command-line chores that every script shares: the parser with --config, and one-line errors."""

import json
import math
import os
import sys
import traceback
from pathlib import Path

import configargparse
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

PROJECT_ROOT = Path(__file__).resolve().parent.parent
SECRET_FLAGS = ("hub_token",)


class OmegaConfParser(configargparse.ConfigFileParser):
    """Reads a --config file with OmegaConf: ${another_key} and ${oc.env:NAME} stand for values. They reach the options
    as they are written, so that 00610 stays a name and 1e-4 is the number it looks like; keys without a value, or
    null, are as if they were not there. A section, or a key that is `reserved`, is refused."""

    reserved = ("config",)  # of the command line alone

    def get_syntax_description(self):
        return "The file is YAML, key: value, read by OmegaConf."

    def parse(self, stream):
        return check_config(self.read(stream), stream.name, self.reserved)

    def read(self, stream):
        """{key: value} as the file has them."""
        try:
            text = stream.read()
            OmegaConf.create(text)  # refuses a key that stands twice
            values = OmegaConf.to_container(OmegaConf.create(yaml.load(text, yaml.BaseLoader)), resolve=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            raise configargparse.ConfigFileParserException(f"{stream.name}: {error}") from error
        if not isinstance(values, dict):
            raise configargparse.ConfigFileParserException(f"{stream.name}: write `key: value` lines, not a list")
        return without_nulls(values)


def without_nulls(values):
    """Keys without a value are as if they were not there."""
    return {key: value for key, value in values.items() if value not in ("", "~", "null")}


def make_parser(description, config_parser=OmegaConfParser):
    """Argument parser with `--config file.yaml`: the file sets defaults, the command line wins, an unknown key
    is an error. config_parser: a ConfigFileParser that reads it, class or instance."""
    parser = configargparse.ArgumentParser(
        description=description,
        allow_abbrev=False,  # an abbreviation that works today is a silent change of meaning tomorrow
        config_file_parser_class=config_parser,
        formatter_class=configargparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", is_config_file=True, help="YAML file with defaults; its keys are the flags' names")
    return parser


def run_main(main):
    """Call main() and turn bad input into one line on stderr and exit code 2.

    Bad input is a ValueError or OSError that a `raise` of this project's own code made. The same exception out of a
    library or by accident is a fault, so its traceback stays. KONTEXT_TRACEBACK=1 shows the traceback in both cases."""
    try:
        code = main()
    except (ValueError, OSError) as error:
        if os.environ.get("KONTEXT_TRACEBACK") or not (is_ours(error) or explains_itself(error)):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" or os.environ.get("KONTEXT_TRACEBACK"):  # torch's, not imported
            raise
        print("error: out of GPU memory; lower --train_batch_size or --resolution, or add --gradient_checkpointing "
              f"({str(error).partition('.')[0]})", file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)


def check_least(args, **least):
    """ValueError naming the flag where a number of `args` is below the one given for its name, infinite, not a number
    or an integer that does not fit 63 bits, as seeds must. None is no number."""
    for name, lowest in least.items():
        value = getattr(args, name)
        if value is not None and not lowest <= value < math.inf:
            raise ValueError(f"--{name} {value}: give {lowest} or more")
        if isinstance(value, int) and value >= 2**63:
            raise ValueError(f"--{name} {value}: give less than 2^63")


def check_finite(args):
    """ValueError naming the flag of a number that is infinite or not a number, which no option means anything by, and
    which args.json cannot hold."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} {value}: give a finite number")


def check_config(values, name, reserved):
    """The {key: value} of the --config file `name`. ConfigFileParserException naming the key where a value is a section
    of keys, which argparse cannot take, or where it is one of `reserved`, which the file would say in vain."""
    for key, value in values.items():
        if key in reserved:
            raise configargparse.ConfigFileParserException(f"{name}: {key} is no key; give --{key} on the command line")
        if isinstance(value, dict):
            raise configargparse.ConfigFileParserException(f"{name}: {key} is a section; write `key: value` lines")
    return values


def is_ours(error):
    """True if a `raise` of this project's own code made the exception, so that its text was written for the user."""
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return (PROJECT_ROOT in Path(innermost.filename).resolve().parents and "site-packages" not in innermost.filename
            and (innermost.line or "").startswith("raise "))


def explains_itself(error):
    """True for operating-system errors about a path (missing, not writable, disk full): they name it themselves."""
    return isinstance(error, OSError) and error.filename is not None


def public_args(args):
    """The parsed arguments as a JSON-safe dict without secrets, for args.json and trackers."""
    return {
        name: value if isinstance(value, (int, float, str, bool, list, type(None))) else str(value)
        for name, value in sorted(vars(args).items())
        if name not in SECRET_FLAGS
    }


def write_json(path, value):
    """Write `value` to `path` in one rename, so that a reader never sees half a file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_metrics(log_file):
    """The rows of a metrics.jsonl, whose last line a kill may have cut."""
    return [json.loads(line) for line in log_file.read_text().splitlines() if line.endswith("}")]


def writable_folder(path, flag):
    """Create the folder `path` if needed and return it; ValueError naming `flag` if nothing can be written there."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{flag} {path} is a file; name a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written ({error.strerror}); name a folder that can") from error
    return path

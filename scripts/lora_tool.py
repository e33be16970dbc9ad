"""Look into LoRA files, convert them for other programs, merge, shrink and average them:

    python -m scripts.lora_tool inspect FILE
    python -m scripts.lora_tool check FILE --pretrained_model_name_or_path /path/to/FLUX.1-Kontext-dev
    python -m scripts.lora_tool convert FILE --to comfyui --output restoration_comfyui.safetensors
    python -m scripts.lora_tool merge FILE --pretrained_model_name_or_path MODEL --output merged --weight 0.8
    python -m scripts.lora_tool resize FILE --rank 8 --output small.safetensors
    python -m scripts.lora_tool average FILE FILE --weights 0.7,0.3 --output mean.safetensors

FILE: a .safetensors file or a folder that holds pytorch_lora_weights.safetensors. `check` lists every fault and ends
with code 2 if there is one. `inspect`, `convert`, `resize` and `average` read diffusers', ComfyUI's and kohya's keys;
they write fp32 and keep the sampling settings. For a LoRA that does not start from pure noise, `convert` to another
program's layout also writes OUTPUT's name with .sampling.md, on how to sample it there. DoRA can be merged only."""

import argparse
import math
from pathlib import Path

import torch

from utils import lora, lora_files
from utils.parse import make_parser, run_main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=command_parser)

    def add_command(name, text, **files):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("files", metavar="FILE", help="LoRA file or its folder", **{"nargs": 1} | files)
        return command

    add_command("inspect", "what is in a LoRA file")
    check = add_command("check", "list every fault of a LoRA file; exit code 2 if there is one")
    convert = add_command("convert", "write a LoRA in another program's layout")
    convert.add_argument("--to", required=True, choices=lora_files.LAYOUTS, help="layout of the output")
    merge = add_command("merge", "write the model with the LoRA in its weights")
    merge.add_argument("--weight", type=float, default=1.0, help="strength of the LoRA")
    merge.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"], help="of the merged model's weights")
    resize = add_command("resize", "best approximation of a LoRA at a lower rank")
    average = add_command("average", "mean of what LoRAs do to the weights; their ranks add up", nargs="+")
    average.add_argument("--weights", help="comma list of positive numbers, one a file; default: all equal")
    resize.add_argument("--rank", type=int, required=True, help="rank to reach, below the present one")
    average.add_argument("--rank", type=int, help="shrink the result to this rank; default: the sum of the ranks")
    check.add_argument("--pretrained_model_name_or_path", help="model to fit; default: FLUX.1-dev's full-size layout")
    merge.add_argument("--pretrained_model_name_or_path", required=True, help="folder or hub id of the base model")
    for command in (convert, resize, average):
        command.add_argument("--output", required=True, help="file to write, .safetensors")
    merge.add_argument("--output", required=True, help="folder to write, new or empty")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def command_parser(prog, description, **_):
    parser = make_parser(description)
    parser.prog = prog
    return parser


def check_args(args):
    """Refuse what cannot be meant, before any tensor is read. ValueError names the flag."""
    args.files = [lora.find_file(path) for path in args.files]
    if args.command == "merge" and not math.isfinite(args.weight):
        raise ValueError(f"--weight {args.weight}: give a finite number")
    if args.command == "average":
        args.weights = parse_weights(args.weights, len(args.files))
    if hasattr(args, "output") and Path(args.output).resolve() in [path.resolve() for path in args.files]:
        raise ValueError(f"--output {args.output} is the input; name another file")


def parse_weights(text, count):
    """'2,1' -> [2.0, 1.0]: `count` positive numbers, all 1 without a text."""
    try:
        weights = [float(part) for part in text.split(",")] if text else [1.0] * count
    except ValueError:
        weights = []
    if len(weights) != count or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"--weights {text}: give {count} positive numbers with commas, one for each file")
    return weights


def check(path, model):
    """Print every fault of the file, or one line that it is sound; returns the exit code."""
    faults = list(lora.faults(path, lora_files.weightless_transformer(model)))
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{path} is sound and fits {model or 'the full-size FLUX.1'}")
    elif not model:
        print("(judged by the full-size FLUX.1; for another model give --pretrained_model_name_or_path)")
    return 2 if faults else 0


def convert(path, layout, output):
    settings = lora.read_settings(path)
    lora_files.write(output, lora_files.read(path), layout, settings)
    notes = lora_files.sampling_notes(settings) if layout != "diffusers" else None
    if notes:
        notes_path = Path(output).with_suffix(".sampling.md")
        notes_path.write_text(notes, encoding="utf-8")
        print(f"{notes}\n({notes_path})")


def shrink(pairs, rank):
    resized, kept = lora_files.resize(pairs, rank)
    print(f"rank {rank} keeps {100 * kept:.2f} % of the Frobenius norm of the LoRA's effect")
    return resized


def main():
    args = parse_args()
    path = args.files[0]
    if args.command == "inspect":
        print("\n".join(lora_files.describe(path)))
        return 0
    if args.command == "check":
        return check(path, args.pretrained_model_name_or_path)
    if args.command == "convert":
        convert(path, args.to, args.output)
    if args.command == "merge":
        dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        lora_files.merge(path, args.pretrained_model_name_or_path, args.output, args.weight, dtype)
    if args.command == "resize":
        resized = shrink(lora_files.read(path), args.rank)
        lora_files.write(args.output, resized, "diffusers", lora.read_settings(path))
    if args.command == "average":
        settings = lora_files.common_settings(args.files)
        averaged = lora_files.average([lora_files.read(file) for file in args.files], args.weights)
        averaged = averaged if args.rank is None else shrink(averaged, args.rank)
        lora_files.write(args.output, averaged, "diffusers", settings)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    run_main(main)

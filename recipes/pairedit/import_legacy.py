"""Turn sliders that the original or Concept Sliders saved as .pt into diffusers' format, which ComfyUI and stock
pipelines read. Nothing in the file is run.

    python -m recipes.pairedit.import_legacy elf.pt --output elf.safetensors \
        --pretrained_model_name_or_path /path/to/FLUX.1-dev
"""

import json
import sys
from pathlib import Path

from recipes.pairedit.adapters import read_legacy
from utils.lora import SETTINGS_KEY, write_file
from utils.lora_files import weightless_transformer
from utils.parse import make_parser, run_main
from utils.restore import STOCK_SETTINGS


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("file", help="the slider, a .pt file")
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="model it was trained on, folder or hub "
                        "id; only its configuration is read")
    parser.add_argument("--output", required=True, help="the .safetensors file to write")
    args = parser.parse_args(argv)
    if Path(args.output).suffix != ".safetensors":
        raise ValueError(f"--output {args.output}: name a .safetensors file")
    if Path(args.output).exists():
        raise ValueError(f"--output {args.output} exists; name another file")
    return args


def main(args):
    tensors = read_legacy(args.file, weightless_transformer(args.pretrained_model_name_or_path))
    settings = STOCK_SETTINGS | {"prompt": "", "reference_tokens": False, "references": 0, "guidance_scale": 3.5}
    write_file(Path(args.output), tensors, {"format": "pt", SETTINGS_KEY: json.dumps(settings, sort_keys=True)})
    print(f"{len(tensors) // 2} layers: {args.output}")


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(parse_args())))

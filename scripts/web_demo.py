"""Restore photographs in a web browser; bash scripts/setup_demo.sh installs what it needs.

    python -m scripts.web_demo                          the embedded model and its two LoRAs, on a CPU
    python -m scripts.web_demo --pretrained_model_name_or_path /path/to/FLUX.1-Kontext-dev --lora outputs/my_lora

The page is for this machine alone, http://127.0.0.1:7860, unless --host says otherwise. Every job's result lies in a
folder of its own below --output. Nothing else of this machine can be fetched, and nothing comes from the network."""

import importlib.util
import os
import socket

from utils import flux
from utils.parse import check_least, make_parser, run_main, writable_folder
from utils.session import add_sampling_args, check_restoration_args
from utils.tiles import add_tile_args

EMBEDDED = "assets/tiny-kontext"
SHIPPED = ("assets/tiny-kontext-deg-lora", "assets/tiny-kontext-old-photo-lora")
LOOPBACK = ("127.0.0.1", "localhost")


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_sampling_args(parser, has_lora=False)
    add_tile_args(parser)
    model = next(action for action in parser._actions if action.dest == "pretrained_model_name_or_path")
    model.required = False  # unlike in the other scripts
    model.help += f"; default: {EMBEDDED}, with its LoRAs"
    # What the page sets for every job. token_shifts: None stands for what suits the LoRA.
    parser.set_defaults(lora_weight=1.0, start_noise=None, fidelity=None, color_fix="off", merge_lora=False,
                        token_shifts=None)
    add = parser.add_argument_group("page").add_argument
    add("--lora", nargs="+", default=[], help="LoRA files, or the folders that hold them, to choose from on the page")
    add("--output", default="outputs/web_demo", help="folder for the jobs' results, uploads and examples")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: every one, so that whoever reaches this "
        "machine can use the page")
    add("--port", type=int, default=7860, help="0: any free one")
    add("--max_upload_mb", type=int, default=50, help="refuse larger files")
    add("--max_pixels", type=int, default=50_000_000, help="refuse images with more pixels")
    add("--max_files", type=int, default=50, help="photographs in one job")
    add("--queue_size", type=int, default=20, help="jobs that may wait; further ones are refused")
    args = parser.parse_args(argv)
    if args.pretrained_model_name_or_path is None:
        args.pretrained_model_name_or_path, args.lora = EMBEDDED, args.lora or list(SHIPPED)
    check_least(args, port=0, max_upload_mb=1, max_pixels=1, max_files=1, queue_size=1)
    check_restoration_args(args)
    flux.check_model(args.pretrained_model_name_or_path)
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the web demo needs gradio, which is not installed; run bash scripts/setup_demo.sh")
    return args


def start(args):
    """Load the model, open the page and return it, as gradio.Blocks that serve in a thread of their own."""
    output = writable_folder(args.output, "--output").resolve()
    args.output = str(output)
    try:
        socket.create_server((args.host, args.port)).close()
    except OSError as error:
        raise ValueError(f"--host {args.host} --port {args.port}: {error.strerror}; choose another port, or 0 for any "
                         "that is free") from error
    # Gradio keeps uploads, and copies of what is shown and downloaded, in the one folder that it serves.
    os.environ |= {"GRADIO_TEMP_DIR": str(output / "cache"), "GRADIO_EXAMPLES_CACHE": str(output / "cache"),
                   "GRADIO_ANALYTICS_ENABLED": "False"}
    from scripts import web_jobs, web_page  # gradio and torch take seconds to import

    return web_page.launch(web_jobs.serve(args), web_jobs.make_examples(output / "examples"))


def main(args):
    page = start(args)
    print(f"The page is at {page.local_url}, results go to {args.output}; Ctrl+C ends it", flush=True)
    if args.host not in LOOPBACK:
        print(f"warning: --host {args.host}: whoever reaches this machine can use the page", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

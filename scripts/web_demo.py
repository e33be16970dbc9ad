"""Restore photographs in a web browser; bash scripts/setup_demo.sh installs what it needs.

    python -m scripts.web_demo                          the embedded model and its two LoRAs, on a CPU
    python -m scripts.web_demo --pretrained_model_name_or_path /path/to/FLUX.1-Kontext-dev --lora outputs/my_lora

The page is for this machine alone, http://127.0.0.1:7860, unless --host says otherwise. Every job's result lies in a
folder of its own below --output. Nothing else of this machine can be fetched, and nothing comes from the network.
Ctrl+C and SIGTERM end it and delete what was uploaded."""

import contextlib
import errno
import fcntl
import importlib.util
import os
import shutil
import signal
import socket
from pathlib import Path

from scripts import web_jobs
from utils import flux
from utils.parse import check_least, make_parser, run_main, writable_folder
from utils.session import add_sampling_args, check_restoration_args
from utils.tiles import add_tile_args

EMBEDDED = "assets/tiny-kontext"
SHIPPED = ("assets/tiny-kontext-deg-lora", "assets/tiny-kontext-old-photo-lora")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CACHE = "gradio_cache"  # within --output; emptied, so no name that other work might use


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
    add("--output", default="outputs/web_demo", help="folder for examples, uploads while the page is open, and the "
        "jobs' results, which stay there until you delete them")
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
    if args.port > 65535:
        raise ValueError(f"--port {args.port}: give 0 to 65535")
    check_least(args, port=0, max_upload_mb=1, max_pixels=1, max_files=1, queue_size=1)
    check_restoration_args(args)
    if args.seed > web_jobs.MAX_SEED:
        raise ValueError(f"--seed {args.seed}: give at most {web_jobs.MAX_SEED}; beyond it browsers round")
    flux.check_model(args.pretrained_model_name_or_path)
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the web demo needs gradio, which is not installed; run bash scripts/setup_demo.sh")
    return args


def take(output):
    """Keep the folder for this process until it ends. ValueError where another web demo has it."""
    lock = os.open(output / "web_demo.lock", os.O_CREAT | os.O_WRONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"--output {output}: another web demo uses it; name another folder") from error


def start(args):
    """Load the model and open the page: (web_jobs.Served, gradio.Blocks that serve in a thread of their own)."""
    output = writable_folder(args.output, "--output").resolve()
    args.output = str(output)
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        socket.create_server((args.host, args.port), family=family).close()
    except OSError as error:
        is_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        cure = "choose another port, or 0 for any that is free" if is_port else "name an address of this machine"
        raise ValueError(f"--host {args.host}{f' --port {args.port}' if is_port else ''}: {error.strerror}; "
                         f"{cure}") from error
    # Gradio keeps uploads, and copies of what is shown and downloaded, in the one folder that it serves. What another
    # process left there, which Gradio would serve too but never delete, goes now.
    take(output)
    cache = output / CACHE
    if cache.exists():
        shutil.rmtree(cache)
    os.environ |= {"GRADIO_TEMP_DIR": str(cache), "GRADIO_EXAMPLES_CACHE": str(cache),
                   "GRADIO_ANALYTICS_ENABLED": "False"}
    from scripts import web_page  # gradio takes seconds to import, and is not always installed

    served = web_jobs.serve(args)
    return served, web_page.launch(served, web_jobs.make_examples(output / "examples"))


def main(args):
    served, page = start(args)
    print(f"The page is at {page.local_url}, results go to {args.output}; Ctrl+C ends it", flush=True)
    if args.host not in LOOPBACK:
        print(f"warning: --host {args.host}: whoever reaches this machine can use the page", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the page as Ctrl+C does
        signal.pause()
    web_jobs.stop_all(served)
    page.close(verbose=False)
    # An upload that is just coming in may resist; it goes at the next start.
    shutil.rmtree(Path(args.output, CACHE), ignore_errors=True)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

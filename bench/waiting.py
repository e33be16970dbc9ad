"""Share of training time that processes wait for data: python -m bench.waiting

The restoration trainer on the embedded model, with its images in a folder, in tar shards, and streamed from these; the
preset real_world at --resolution px, one loader process per training process. The first steps are left out, in which
the loaders start. On a machine with fewer cores than processes and loaders all of them wait for a core as well.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from datetime import date
from pathlib import Path

from scripts.download_dataset import copy_sample
from utils.parse import PROJECT_ROOT, check_least, read_metrics, run_main

COPIES, SHARDS, FIRST_STEPS = 16, 4, 5
LAST_LINES = 60  # of a training that fails; about 45 are torchrun's


def write_images(folder):
    """COPIES of the PNGs among the sample photographs in folder/photos, and the same in SHARDS tars in folder/tars."""
    photos, tars = folder / "photos", folder / "tars"
    photos.mkdir()
    tars.mkdir()
    copy_sample(folder / "sample")
    for file in sorted((folder / "sample" / "train").glob("*.png")):
        for i in range(COPIES):
            shutil.copy(file, photos / f"{file.stem}_{i}{file.suffix}")
    files = sorted(photos.iterdir())
    for shard in range(SHARDS):
        with tarfile.open(tars / f"photos-{shard}.tar", "w") as archive:
            for file in files[shard::SHARDS]:
                archive.add(file, file.name)


def measure(args, processes, source, output):
    """(seconds, seconds of waiting) of a step, means over the processes and all steps but the first ones."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
               "train_deg_lora_flux_kontext.py", *source, "--output_dir", str(output),
               "--pretrained_model_name_or_path", "assets/tiny-kontext", "--resolution", str(args.resolution),
               "--degradation_preset", "real_world", "--train_batch_size", str(args.batch), "--max_train_steps",
               str(FIRST_STEPS + args.steps), "--validation_steps", "10000", "--checkpointing_steps", "0",
               "--logging_steps", "1", "--report_to", "none", "--dataloader_num_workers", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    try:
        subprocess.run(command, cwd=PROJECT_ROOT, env=environment, check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.PIPE, text=True)
    except subprocess.CalledProcessError as error:
        print(*error.stderr.splitlines()[-LAST_LINES:], sep="\n", file=sys.stderr)
        raise ValueError(f"the training on {processes} processes failed; its last lines are above") from error
    rows = read_metrics(output / "metrics.jsonl")[FIRST_STEPS:]
    return tuple(sum(row[name] for row in rows) / len(rows) for name in ("seconds_per_step", "data_seconds_per_step"))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="training processes")
    parser.add_argument("--steps", type=int, default=30, help="that are measured")
    parser.add_argument("--resolution", type=int, default=128, help="px")
    parser.add_argument("--batch", type=int, default=2, help="images per process")
    args = parser.parse_args()
    check_least(args, steps=1, resolution=16, batch=1)
    for count in args.processes:
        check_least(argparse.Namespace(processes=count), processes=1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_images(folder)
        sources = {"folder": ["--hr_root", folder / "photos"], "tars": ["--dataset_name", folder / "tars"],
                   "stream": ["--dataset_name", folder / "tars", "--streaming"]}
        print(f"{date.today()}, {os.cpu_count()}-core {platform.machine()} CPU, {args.resolution} px, batch "
              f"{args.batch}, {args.steps} steps\n\n| images in | processes | s a step | waiting for data |\n"
              "|---|---|---|---|")
        for name, source in sources.items():
            for processes in args.processes:
                seconds, waited = measure(args, processes, list(map(str, source)), folder / f"{name}-{processes}")
                print(f"| {name} | {processes} | {seconds:.2f} | {100 * waited / seconds:.1f} % |", flush=True)


if __name__ == "__main__":
    run_main(main)

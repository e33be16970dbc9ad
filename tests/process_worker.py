"""Runs the jobs of tests/test_many_processes.py, {number of processes: [job, ...]}, with the launcher that is behind
torch.distributed.run. Importing everything is most of what a launch costs: it is done once, the processes are forks.

A job is {"script": a module of the root with parse_args and main, "argv": its options, "environment": variables during
it, "copy": [a folder and where to put a copy first] or none}. What a process trained on goes to batches_<rank>.json in
the output folder: of every micro-step the samples, the LoRA's hash before it, and the number of frozen weights here."""

import hashlib
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, FluxKontextPipeline, FluxTransformer2DModel  # noqa: F401, as diffusers is lazy
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from utils import lora


def record(script, noted):
    """Let the training script's step note what it is given. Returns the plain step."""
    plain = script.training_step

    def step(pipe, transformer, perceptual, batch, text, args):
        tensors = lora.state_dict(pipe.transformer)
        frozen = [parameter for parameter in pipe.transformer.parameters() if not parameter.requires_grad]
        noted.append({
            "samples": list(zip(batch["index"].tolist(), batch["epoch"].tolist(), strict=True)),
            "lora": hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest(),
            "frozen": sum(getattr(parameter, "_local_tensor", parameter).numel() for parameter in frozen)})
        return plain(pipe, transformer, perceptual, batch, text, args)

    script.training_step = step
    return plain


def run_job(job, rank):
    script, noted = importlib.import_module(job["script"]), []
    if job["copy"] and rank == 0:
        shutil.copytree(*job["copy"])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os.environ.update(job["environment"])
    plain = record(script, noted) if hasattr(script, "training_step") else None
    args = script.parse_args(job["argv"])
    code = script.main(args)
    if plain:
        script.training_step = plain
        Path(args.output_dir, f"batches_{rank}.json").write_text(json.dumps(noted))
    for name in job["environment"]:
        os.environ.pop(name, None)
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return code


def run_jobs(jobs):
    """In each process; returns the largest exit code."""
    # The processes stay connected from one job to the next.
    Accelerator.end_training = PartialState.destroy_process_group = lambda self: None
    codes = [run_job(job, int(os.environ["RANK"])) for job in jobs]
    torch.distributed.destroy_process_group()
    return max(code or 0 for code in codes)


def main():
    worked = []
    for processes, jobs in json.loads(Path(sys.argv[1]).read_text()).items():
        for job in jobs:
            importlib.import_module(job["script"])
        config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=int(processes), start_method="fork",
                              rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
        worked += elastic_launch(config, run_jobs)(jobs).values()
    return max(worked)


if __name__ == "__main__":
    sys.exit(main())

"""Kill a training run with SIGKILL at random moments, resume it each time, and compare its end with a run that was
left alone:  python -m tests.slow.kill_resume --kills 20

Half of the kills fall while a checkpoint is being written. The training processes are forks of this one, which has
imported everything, so that a start costs a second and not ten. Exit code 0: the final LoRA is equal to the bit, and
no checkpoint was ever found unsound."""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests import conftest  # sets the environment before torch is imported

STEPS = 60


def start(argv, log):
    """Fork a training run; returns its process id."""
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 1
    try:
        import train_deg_lora_flux_kontext as script

        code = script.main(script.parse_args(argv)) or 0
    finally:
        os._exit(code)


def wait_until(condition, child, seconds):
    """Poll `condition` until it holds, the time is up or the child has ended; True if the child still runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0002)
    return not os.waitpid(child, os.WNOHANG)[0]


def check_sound(folder):
    """Every finished checkpoint must match its hashes, whatever was killed when."""
    from utils import checkpoint

    for _, path in checkpoint.list_checkpoints(folder):
        problem = checkpoint.fault(path)
        assert problem is None, f"{path}: {problem}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import diffusers  # noqa: F401  (imported here, once, for all forks)
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from PIL import Image

    import train_deg_lora_flux_kontext  # noqa: F401
    from utils.lora import LORA_FILE

    draw = random.Random(args.seed)
    root = Path(tempfile.mkdtemp(prefix="kill-resume-"))
    conftest.make_tiny_pipeline().save_pretrained(root / "model")
    (root / "images").mkdir()
    for i in range(6):
        Image.fromarray(conftest.photograph(size=(64, 64 + 16 * i))).save(root / "images" / f"{i}.png")
    flags = ["--pretrained_model_name_or_path", str(root / "model"), "--hr_root", str(root / "images"),
             *f"--resolution 32 --train_batch_size 2 --max_sequence_length 8 --rank 4 --report_to none --use_ema "
              f"--max_train_steps {STEPS} --checkpointing_steps 1 --checkpoints_total_limit 2 --start_noise 0.5 "
              "--lora_dropout 0.1 --degradation_types downsample,noise".split()]
    straight, killed = root / "straight", root / "killed"
    assert os.waitpid(start([*flags, "--output_dir", str(straight)], root / "straight.log"), 0)[1] == 0, \
        (root / "straight.log").read_text()[-2000:]

    kills = 0
    flags += ["--output_dir", str(killed), "--resume_from_checkpoint", "latest"]
    while kills < args.kills:
        child = start(flags, root / "killed.log")
        before = {path.name for path in killed.glob("checkpoint-*")}
        if kills % 2:  # while a checkpoint is written
            alive = wait_until(lambda seen=before: any(p.suffix == ".tmp" and p.name not in seen
                                                       for p in killed.glob("checkpoint-*.tmp")), child, 60)
            time.sleep(draw.uniform(0, 0.01))
        else:
            alive = wait_until(lambda seen=before: {p.name for p in killed.glob("checkpoint-*")} - seen, child, 60)
            alive = alive and wait_until(lambda: False, child, draw.uniform(0, 0.1))
        if not alive:
            print(f"the run ended by itself before kill {kills + 1}: {(root / 'killed.log').read_text()[-500:]}")
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        check_sound(killed)
        unfinished = [path.name for path in killed.glob("*.tmp")]
        last = max((int(p.name.split("-")[1]) for p in killed.glob("checkpoint-*") if p.suffix != ".tmp"), default=0)
        print(f"kill {kills}: newest checkpoint {last}, unfinished {unfinished or 'none'}", flush=True)
    status = os.waitpid(start(flags, root / "killed.log"), 0)[1]
    assert status == 0, (root / "killed.log").read_text()[-2000:]
    assert (straight / LORA_FILE).read_bytes() == (killed / LORA_FILE).read_bytes(), f"the LoRAs differ; see {root}"
    print(f"{kills} kills: final LoRA equal to the bit")
    return 0 if kills == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())

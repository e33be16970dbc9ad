"""What a step of the Qwen-Image trainer costs beside the bare forward, backward and optimizer of the same model:
OMP_NUM_THREADS=1 python -m bench.qwen_step

The trainer runs as it is, with its loader, cached latents, guard and reports. In front of each of its steps a copy of
its model, with a LoRA and an optimizer of its own, does a bare step on the same latents and text; medians of the pairs.
Exit code 1 where the trainer takes more than 1.1 of it."""

import argparse
import copy
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from recipes.qwen_image import train
from recipes.qwen_image.tiny import make_tiny_pipeline
from utils import flux, lora
from utils.parse import check_least, run_main

LIMIT = 1.1


class BareSteps:
    """Bare steps on a copy of the trained model. times: of the bare step, and of the trainer's step after it."""

    def __init__(self):
        self.training_step, self.transformer, self.times, self.ended = train.training_step, None, [], None

    def __call__(self, pipe, posteriors, batch, text, args):
        asked = time.perf_counter()
        if self.transformer is None:
            self.transformer = copy.deepcopy(pipe.transformer)
            self.optimizer = torch.optim.AdamW(lora.parameters(self.transformer), lr=args.learning_rate)
        elif self.times:
            self.times[-1].append(asked - self.ended)
        latents, _ = posteriors[0]
        noise = torch.randn_like(latents)
        tokens, target = flux.pack((latents + noise) / 2), flux.pack(noise - latents)
        shapes = [[(1, latents.shape[-2] // 2, latents.shape[-1] // 2)]] * len(latents)
        started = time.perf_counter()
        prediction = self.transformer(
            hidden_states=tokens, timestep=torch.full((len(latents),), 0.5), encoder_hidden_states=text[0],
            encoder_hidden_states_mask=text[1], img_shapes=shapes, return_dict=False)[0]
        F.mse_loss(prediction, target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ended = time.perf_counter()
        self.times.append([self.ended - started])
        return self.training_step(pipe, posteriors, batch, text, args)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=128, help="of the transformer")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--train_batch_size", type=int, default=2)
    options = parser.parse_args()
    check_least(options, steps=3, width=16, layers=1, img_size=32, train_batch_size=1)
    rng, bare = np.random.default_rng(0), BareSteps()
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder, "model"), Path(folder, "data")
        make_tiny_pipeline(options.width, options.layers).save_pretrained(model)
        data.mkdir()
        for i in range(8):
            shape = (options.img_size, options.img_size, 3)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(data / f"{i}.png")
            (data / f"{i}.txt").write_text("a picture " * (1 + i % 3))
        train.training_step = bare
        train.main(train.parse_args([
            "--pretrained_model_name_or_path", str(model), "--img_dir", str(data), "--output_dir", f"{folder}/out",
            "--img_size", str(options.img_size), "--train_batch_size", str(options.train_batch_size),
            "--max_train_steps", str(options.steps), "--num_workers", "0", "--precompute_image_embeddings",
            "--no-gradient_checkpointing", "--checkpointing_steps", "0"]))
    pairs = [pair for pair in bare.times[1:] if len(pair) == 2]  # the first warms up, the last has no end
    ratio = statistics.median(trained / plain for plain, trained in pairs)
    plain, trained = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}: bare {plain:.1f} ms, "
          f"trainer {trained:.1f} ms a step of {options.train_batch_size} x {options.img_size} px, ratio {ratio:.3f} "
          f"(limit {LIMIT}), {len(pairs)} pairs")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    run_main(main)

"""The whole recipe on a CPU, in minutes, with nothing to download: a tiny Qwen-Image that paints pictures of any
colour, a folder of teal ones with captions, a LoRA trained on it by train_configs/example.yaml, and the mean colour of
what the stock pipeline makes without and with the LoRA's file.

    python -m recipes.qwen_image.example --output outputs/qwen_image
"""

import time
from pathlib import Path

import torch

from my_dataset.dataset_deg_paired import to_tensor
from my_dataset.images import list_images, load_rgb, save_image
from recipes.qwen_image import inference, qwen, train
from recipes.qwen_image.tiny import COLOURS, SQUARE_PX, make_colour_codec, make_tiny_pipeline
from utils import flow_matching as fm
from utils.parse import check_least, make_parser, run_main, writable_folder, write_json
from utils.utils import to_uint8
from utils.validation import save_grid

CONFIG = Path(__file__).parent / "train_configs" / "example.yaml"
PROMPT, PROMPTS = "a teal picture", ("a teal picture", "a picture", " ")
TEAL = (-0.6, 0.3, 0.3)
SIDE_PX, PICTURES, SAMPLES, STEPS = 64, 24, 16, 8
BASE_BATCH, BASE_PICTURES = 16, 256


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--output", default="outputs/qwen_image", help="new folder for all that is written")
    add("--seed", type=int, default=0, help="seed of weights, pictures, training and samples")
    add("--base_steps", type=int, default=500, help="steps that make the base model")
    add("--max_train_steps", type=int, help="steps of the LoRA; default: the config's")
    args = parser.parse_args(argv)
    check_least(args, seed=0, base_steps=1, max_train_steps=1)
    if any(writable_folder(args.output, "--output").iterdir()):
        raise ValueError(f"--output {args.output} is not empty; name a new folder")
    return args


def draw_pictures(count, generator, colour=None):
    """(count, 3, SIDE_PX, SIDE_PX) in [-1, 1], flat in the codec's squares: any colour, or one near `colour`, under a
    slope of each channel."""
    flat = 1.6 * torch.rand(count, COLOURS, 1, 1, generator=generator) - 0.8
    if colour is not None:
        flat = torch.tensor(colour).view(COLOURS, 1, 1) + 0.2 * flat
    y, x = 0.2 * torch.randn(2, count, COLOURS, 1, 1, generator=generator)
    ramp = torch.linspace(-1, 1, SIDE_PX // SQUARE_PX)
    squares = (flat + y * ramp[:, None] + x * ramp).clamp(-1, 1)
    return squares.repeat_interleave(SQUARE_PX, 2).repeat_interleave(SQUARE_PX, 3)


def make_base(folder, steps, seed):
    """Write a tiny pipeline that paints pictures of any colour, whatever the prompt; all its weights are trained."""
    pipe = make_tiny_pipeline(width=128, layers=2, seed=seed)
    make_colour_codec(pipe.vae)
    texts = [qwen.TextStates(pipe.encode_prompt(prompt)[0][0]) for prompt in PROMPTS]
    text = qwen.stack_text([texts[i % len(texts)] for i in range(BASE_BATCH)], "cpu", torch.float32)
    pipe.transformer.requires_grad_(True)
    optimizer = torch.optim.AdamW(pipe.transformer.parameters(), lr=2e-3, weight_decay=0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    pool, _ = qwen.posterior(pipe.vae, draw_pictures(BASE_PICTURES, generator))
    for _ in range(steps):
        latents = pool[torch.randint(BASE_PICTURES, (BASE_BATCH,), generator=generator)]
        noise, s = torch.randn(latents.shape, generator=generator), torch.rand(BASE_BATCH, generator=generator)
        z, sigma, velocity = fm.flow_path(latents, latents, noise, s, torch.ones_like(s))
        prediction = qwen.predict_velocity(pipe.transformer, z, sigma, [], *text)
        fm.weighted_mse(prediction, velocity, torch.ones_like(s)).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    pipe.save_pretrained(folder)


def make_dataset(folder, seed):
    """Write PICTURES teal pictures with their captions."""
    folder.mkdir()
    for i, picture in enumerate(draw_pictures(PICTURES, torch.Generator().manual_seed(seed + 1), TEAL)):
        save_image(folder / f"image{i}.png", to_uint8(picture))
        (folder / f"image{i}.txt").write_text(PROMPT, encoding="utf-8")


def sample(model, lora, seed):
    """(SAMPLES, 3, SIDE_PX, SIDE_PX) in [-1, 1] of the stock pipeline, with a LoRA's folder or with none ("")."""
    args = inference.parse_args(["--model_name", str(model), "--lora_weights", str(lora), "--device", "cpu"])
    pipe = inference.load(args, torch.device("cpu"), torch.float32)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(SAMPLES)]
    return 2 * pipe([PROMPT] * SAMPLES, true_cfg_scale=1.0, height=SIDE_PX, width=SIDE_PX, num_inference_steps=STEPS,
                    generator=generators, output_type="pt").images - 1


def main(args):
    started, output = time.perf_counter(), Path(args.output)
    model, data, trained = output / "model", output / "your_lora_dataset", output / "output"
    make_base(model, args.base_steps, args.seed)
    make_dataset(data, args.seed)
    base_seconds = time.perf_counter() - started
    words = ["--config", CONFIG, "--pretrained_model_name_or_path", model, "--img_dir", data, "--output_dir", trained,
             "--seed", args.seed]
    words += ["--max_train_steps", args.max_train_steps] if args.max_train_steps else []
    train.main(train.parse_args([str(word) for word in words]))

    images = {"base": sample(model, "", args.seed), "LoRA": sample(model, trained, args.seed),
              "training set": torch.stack([to_tensor(load_rgb(path)) for path in list_images(data)])}
    means = {name: pictures.mean((0, 2, 3)) for name, pictures in images.items()}
    before, after = ((means[name] - means["training set"]).norm() for name in ("base", "LoRA"))
    share = 1 - float(after / before)
    save_grid(list(zip(*(pictures[:4] for pictures in images.values()), strict=True)), list(images), None,
              output / "grid.png")
    result = {"mean_colour": {name: (127.5 * (mean + 1)).tolist() for name, mean in means.items()}, "share": share,
              "base_seconds": base_seconds, "seconds": time.perf_counter() - started}
    write_json(output / "result.json", result)
    for name, mean in result["mean_colour"].items():
        print(f"{name:12}  mean colour  {'  '.join(f'{value:5.1f}' for value in mean)}")
    print(f"the LoRA took the mean colour {share:.0%} of the way to the training set's; {result['seconds']:.0f} "
          f"seconds, {base_seconds:.0f} of them for the base model. {output / 'grid.png'}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

"""What quantised weights do to results: PSNR against those of plain weights from the same noise, and the error of every
converted layer of the transformer.

    python -m recipes.flux_img2img.compare_quantised --pretrained_model_name_or_path assets/tiny-kontext \\
        --image cat.jpg --width 128 --height 128 --max_sequence_length 16 --guidance_scale 1 \\
        --prompt "Generate a photograph" --strength 0.5 --quant_transformer int8 --output outputs/int8

Options are those of recipes.flux_img2img.img2img. Both transformers are in memory at a time; where a GPU cannot hold
them, --device cpu does."""

import argparse
import contextlib

import numpy as np
import torch

from my_dataset.dataset_deg_paired import to_tensor
from recipes.flux_img2img.img2img import (
    add_model_args,
    check_model_args,
    choose_starts,
    describe,
    edit,
    encode,
    encode_text,
    load_models,
    picture_name,
    read_pictures,
)
from recipes.flux_img2img.quantised import effective_weight
from utils.metrics import markdown_table, psnr
from utils.parse import make_parser, run_main, writable_folder, write_json
from utils.restore import noise_levels
from utils.session import choose_device
from utils.utils import image_grid

NOT_QUANTISED = {"quant_transformer": "none", "quant_t5": "none", "quant_clip": "none"}
DIFFERENCE_GAIN = 8  # in the grid
WORST_LAYERS = 10  # that are printed
FILES = LAYERS, GRID, COMPARISON = "layers.md", "grid.png", "comparison.json"


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_model_args(parser)
    parser.add_argument("--output", default="outputs/compare_quantised", help="folder for the table, grid and figures, "
                        "without another comparison's")
    args = parser.parse_args(argv)
    check_model_args(args)
    if not args.backends:
        raise ValueError("--quant_transformer, --quant_t5 and --quant_clip are all none: there is nothing to compare")
    return args


@contextlib.contextmanager
def output_errors(plain, quantised, names):
    """Yields {name: relative error}, filled when the context ends: ||y_q - y|| / ||y|| over all calls of `plain`'s
    layers inside, where y_q is what the quantised layer makes of the same input."""
    squares, errors = {name: torch.zeros(2, dtype=torch.float64) for name in names}, {}

    def watch(name, layer):
        def hook(_, inputs, output):
            difference = (layer(*inputs).float() - output.float()).square().sum()
            squares[name] += torch.stack([difference, output.float().square().sum()]).double().cpu()
        return hook

    handles = [plain.get_submodule(name).register_forward_hook(watch(name, quantised.get_submodule(name)))
               for name in names]
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()
    errors.update({name: float((difference / energy).sqrt()) for name, (difference, energy) in squares.items()})


def weight_error(plain, quantised):
    """||W_q - W|| / ||W|| of two linear layers."""
    weight = effective_weight(plain)
    return float((effective_weight(quantised) - weight).norm() / weight.norm())


def main(args):
    device, dtype = choose_device(args)
    folder = writable_folder(args.output, "--output")
    for name in FILES:
        if (folder / name).exists():
            raise ValueError(f"--output {folder} holds the {name} of another comparison; name a new folder")
    plain_args = argparse.Namespace(**vars(args) | NOT_QUANTISED | {"backends": {}})
    plain, _ = load_models(plain_args, device, dtype)
    jobs = []
    for source, picture in read_pictures(args, plain.vae):
        sigmas = noise_levels(plain.vae, plain.scheduler, args.num_inference_steps, *picture.size)
        start, = choose_starts(sigmas, args.strengths, args.start_sigma)
        jobs.append((source, picture, sigmas, start))
        print(f"{picture_name(source)} {picture.width}x{picture.height} px, {start.in_words()}", flush=True)
    texts, conversions = {}, []
    for name, options in (("plain", plain_args), ("quantised", args)):
        text, conversions = encode_text(options, device, dtype)
        texts[name] = {key: embeds.to(device, dtype) for key, embeds in text.items()}
    quantised, conversion = load_models(args, device, dtype)
    conversions.append(conversion)
    print("\n".join(part.in_words() for part in conversions), flush=True)

    variants = {"text encoders": ("quantised", plain), "transformer": ("plain", quantised),
                "both": ("quantised", quantised)}
    if set(args.backends) == {"transformer"}:
        variants = {"transformer": variants["transformer"]}
    elif "transformer" not in args.backends:
        variants = {"text encoders": variants["text encoders"]}
    runs = []
    for source, picture, sigmas, start in jobs:
        for seed in range(args.seed, args.seed + args.num_images):
            latents, noise = encode(plain, to_tensor(np.asarray(picture))[None], [seed], device)
            runs.append((f"{picture_name(source)}, seed {seed}", (latents, noise, sigmas, start)))
    with output_errors(plain.transformer, quantised.transformer, conversion.layers) as outputs:
        reference = [edit(args, plain, *run, texts["plain"], device) for _, run in runs]
    results = {name: [edit(args, pipe, *run, texts[text], device) for _, run in runs]
               for name, (text, pipe) in variants.items()}
    decibels = {name: [float(psnr(image, target)[0]) for image, target in zip(images, reference, strict=True)]
                for name, images in results.items()}
    layers = sorted(({"layer": name, "weight_error": weight_error(plain.transformer.get_submodule(name),
                                                                  quantised.transformer.get_submodule(name)),
                      "output_error": outputs[name]} for name in conversion.layers),
                    key=lambda layer: layer["output_error"], reverse=True)

    for name, values in decibels.items():
        print(f"{name} quantised: {np.mean(values):.2f} dB PSNR to the results of plain weights, mean of "
              f"{len(values)}")
    cells = [[layer["layer"], f"{layer['weight_error']:.2%}", f"{layer['output_error']:.2%}"] for layer in layers]
    headings = ["layer", "weight error", "output error"]
    if layers:
        print(markdown_table([headings, *cells[:WORST_LAYERS]]))
        (folder / LAYERS).write_text(markdown_table([headings, *cells]) + "\n", encoding="utf-8")
    rows = [[target[0], *(column for images in results.values() for column in (
        images[i][0], (DIFFERENCE_GAIN * (images[i][0] - target[0])).clamp(-1, 1)))]
        for i, target in enumerate(reference)]
    labels = ["plain", *(label for name in results for label in (name, f"difference x {DIFFERENCE_GAIN}"))]
    captions = [[runs[i][0], *(caption for values in decibels.values() for caption in (f"{values[i]:.2f} dB", ""))]
                for i in range(len(runs))]
    image_grid(rows, labels, captions).save(folder / GRID)
    write_json(folder / COMPARISON, describe(args, dtype) | {
        "runs": [{"run": name, "start": run[3].in_words()} for name, run in runs], "psnr_db": decibels,
        "layers": layers, "conversions": {part.component: part.record() for part in conversions}})


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

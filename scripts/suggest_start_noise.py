"""A start noise for a folder and a degradation, by matching signal-to-noise ratios in the latents:

    python -m scripts.suggest_start_noise --pretrained_model_name_or_path /path/to/FLUX.1-Kontext-dev \\
        --hr_root photos --degradation_types downsample,noise

With e^2 = mean((c - x)^2) of degraded latents c and clean ones x, the degradation leaves the ratio mean(x^2) / e^2. A
noisy latent (1 - k) x + k eps has mean(x^2) (1 - k)^2 / k^2. Both agree at k = e / (1 + e): from there on, the start's
own noise hides the damage (the choice of OMGSR, there among timesteps)."""

import numpy as np
import torch

from my_dataset.dataset_deg_paired import add_data_args, dataset_from_args
from my_dataset.degradations import add_degradation_args, degrader_from_args
from utils import flux
from utils.flow_matching import SMALLEST_START_NOISE
from utils.parse import check_least, make_parser, run_main


def parse_args(argv=None):
    parser = make_parser(__doc__)
    flux.add_model_args(parser)
    add_data_args(parser)
    add_degradation_args(parser)
    parser.add_argument("--max_images", type=int, default=32, help="images to look at, spread evenly over the data")
    parser.add_argument("--seed", type=int, default=0, help="of crops and degradations")
    args = parser.parse_args(argv)
    check_least(args, max_images=1, seed=0)
    flux.check_model(args.pretrained_model_name_or_path)
    return args


def matching_start_noise(target, control):
    """k in [0, 1) of latents (B, C, h, w) of the same images, clean and degraded: e / (1 + e) of the root-mean-square
    error e. 0 for equal latents, 1/2 where the damage is as strong as the flow's unit noise."""
    error = (control - target).square().mean().sqrt().item()
    return error / (1 + error)


def suggest(strengths):
    """The --start_noise for the start noises of single images: their median, or 0 below what can be trained."""
    middle = float(np.median(strengths))
    return round(middle, 2) if middle >= SMALLEST_START_NOISE else 0.0


def main():
    args = parse_args()
    degrade = None if args.lr_root else degrader_from_args(args)
    dataset = dataset_from_args(args, degrade, seed=args.seed)
    dataset.identity_probability = 0  # undamaged images say nothing about the damage
    vae = flux.load_pipeline(args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant,
                             cache_dir=args.cache_dir, skip=(*flux.TEXT_PARTS, *flux.OPTIONAL_PARTS, "transformer")).vae
    flux.check_sizes(vae, dataset.buckets)
    count = min(args.max_images, len(dataset))
    strengths = []
    with torch.no_grad():
        for index in np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist():
            item = dataset[index]
            target, control = (flux.encode(vae, item[key][None]) for key in ("target", "control"))
            strengths.append(matching_start_noise(target, control))
    low, high = np.quantile(strengths, [0.1, 0.9])
    print(f"{count} images, noise that matches the damage: median {np.median(strengths):.3f}, 10 to 90 % of them "
          f"{low:.3f} to {high:.3f}\n--start_noise {suggest(strengths):g}")


if __name__ == "__main__":
    run_main(main)

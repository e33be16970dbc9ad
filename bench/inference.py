"""What a restored image costs: with the LoRA's layers beside the model's, merged into its weights, and merged and
compiled:  OMP_NUM_THREADS=1 python -m bench.inference --lora assets/tiny-kontext-deg-lora

The arms restore the same image of two by two tiles on models of their own in one process, interleaved, order
alternating; medians of seconds an image, VAE included, and of the paired ratios to the first arm. All three models are
on the device at once. Each arm restores twice before it counts, and compiles then; that time is printed."""

import argparse
import platform
import statistics
import time

import torch

import test_deg_lora_flux_kontext as script
from bench.large_image import make_pair
from my_dataset.dataset_deg_paired import to_tensor
from utils import flux, metrics
from utils.parse import check_least, run_main
from utils.session import choose_device, load_models, resolve_settings
from utils.tiles import Tiling, restore_tiled, trained_side

ARMS = {"LoRA layers": ["--no-merge_lora"], "merged": ["--merge_lora"],
        "merged, compiled": ["--merge_lora", "--compile"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="assets/tiny-kontext")
    parser.add_argument("--lora", required=True, help="restoration LoRA of the model")
    parser.add_argument("--steps", type=int, nargs="+", help="default: those the test script would take")
    parser.add_argument("--tile_batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tile", type=int, help="side in px; default: the side the LoRA was trained at")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    options = parser.parse_args()
    check_least(options, rounds=1, tile=16)
    for flag in ("steps", "tile_batches"):
        for value in getattr(options, flag) or []:
            check_least(argparse.Namespace(**{flag: value}), **{flag: 1})
    arms = []
    for flags in ARMS.values():
        args = script.parse_args(["--pretrained_model_name_or_path", options.model, "--lora", options.lora, "--device",
                                  options.device, "--input", "x", "--output", "x", *flags])
        device, dtype = choose_device(args)
        settings, default, start_noise = resolve_settings(args)
        for steps in options.steps or []:
            args.num_inference_steps = steps
            resolve_settings(args)  # refuses steps that were never trained
        arms.append(load_models(args, settings, device, dtype))
    vae = arms[0][0].vae
    side = (options.tile or trained_side(settings, vae)) // flux.size_multiple(vae) * flux.size_multiple(vae)
    control = to_tensor(make_pair(2 * side, 2 * side)[1])[None]

    def timed(arm, steps, tiling):
        pipe, text = arms[arm]
        start = time.perf_counter()
        image = restore_tiled(pipe, control, text, settings, steps, 0, start_noise, tiling)  # ends on the CPU
        return time.perf_counter() - start, image

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}; "
          f"{2 * side} px in tiles of {side} px, start noise {start_noise:g}, {options.rounds} rounds")
    print("| steps | tile batch | | s per image | ratio | warm-up, s | PSNR to the first arm, dB |")
    print("|---|---|---|---|---|---|---|")
    for steps in options.steps or [default]:
        for batch in options.tile_batches:
            tiling = Tiling(side, 0, batch)
            warm, images, seconds = {}, {}, {arm: [] for arm in range(len(arms))}
            for arm in seconds:
                warm[arm] = sum(timed(arm, steps, tiling)[0] for _ in range(2))
            for turn in range(options.rounds):
                for arm in list(seconds)[:: 1 if turn % 2 else -1]:
                    duration, images[arm] = timed(arm, steps, tiling)
                    seconds[arm].append(duration)
            for arm, label in enumerate(ARMS):
                ratio = statistics.median(a / b for a, b in zip(seconds[arm], seconds[0], strict=True))
                psnr = f"{metrics.psnr(images[arm], images[0]).item():.1f}" if arm else ""
                print(f"| {steps} | {batch} | {label} | {statistics.median(seconds[arm]):.4f} | {ratio:.3f} | "
                      f"{warm[arm]:.1f} | {psnr} |", flush=True)


if __name__ == "__main__":
    run_main(main)

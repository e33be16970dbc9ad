"""The table nobody has: one backbone, the same data, one budget; which start noise, which tokens, which loss?

    OMP_NUM_THREADS=1 python -m bench.start_noise --train_root data/photos --heldout_root data/bsds_val --seeds 0 \\
        --output outputs/start-noise

Arms: rectified flow from noise (k = 1), from a noisy control (0.5, 0.25), the bridge (0); below 1 also without
reference tokens; each without and with the gradient loss. Every arm trains a fresh LoRA with the training script's own
step, on the same batches in the same order, at a constant rate with a moving average of the weights, which can be
scored fairly at any step: after --steps (equal steps), and where the arm has used as much CPU time as k = 1 needs for
them (equal time). Another process may run other seeds into the same folder; --table alone draws the table of all that
is there; equal_steps.png and equal_time.png show its PSNR over sampling steps.

The embedded base model was trained at k = 1 with reference tokens and partly on restoration. That arm goes on where the
base stopped, the others learn anew: the table says what the change costs within the budget, not which k is best in the
end."""

import csv
import json
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import cv2
import numpy as np
import torch

import train_deg_lora_flux_kontext as script
from bench.charts import draw_sampling
from my_dataset.dataset_deg_bucket import BucketBatchSampler
from my_dataset.dataset_deg_paired import (
    check_no_overlap,
    collate_fn,
    dataset_from_args,
    folder_records,
    heldout_seed,
)
from my_dataset.degradations import degrader_from_args
from my_dataset.images import list_images
from my_dataset.scored_pairs import load_pairs
from utils import flux, lora, metrics, run
from utils.losses import make_perceptual_loss
from utils.parse import check_least, make_parser, run_main, writable_folder, write_json
from utils.restore import make_settings, restore

ARMS = [(k, reference, loss) for loss in ("none", "gradient")
        for k, reference in ((1, True), (0.5, True), (0.25, True), (0, True), (0.5, False), (0.25, False), (0, False))]
SAMPLING_STEPS = (1, 2, 4, 8, 28)
WARM_UP_STEPS, TIMED_STEPS = 3, 20  # the first steps are not timed, and the median of the others up to here counts
LONGEST = 2.5  # an arm gets at most this many times --steps for equal time; the table marks it


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="assets/tiny-kontext")
    add("--train_root", help="folder of clean photographs to train on")
    add("--heldout_root", help="folder of clean photographs to score on")
    add("--output", required=True, help="folder of the results, one JSON file per seed")
    add("--seeds", type=int, nargs="*", default=[0])
    add("--steps", type=int, default=200, help=f"training steps of k = 1, {TIMED_STEPS} or more, which are timed")
    add("--heldout_images", type=int, default=50, help="scored images, one crop each")
    add("--resolution", type=int, default=64, help="side of the training crops, px")
    add("--score_px", type=int, default=64, help="side of the scored crops, px")
    add("--table", action="store_true", help="train nothing")
    add("--script_args", default="--degradation_types downsample,blur,noise --lr_scale 2 --blur_radius 1.0 "
        f"--noise_level {25 / 255:.4f} --train_batch_size 8 --rank 32 --learning_rate 3e-3 --lr_warmup_steps 20 "
        "--ema_decay 0.98 --max_sequence_length 16 --crop_zoom 1-4 --random_flip "
        "--lora_layers attn.to_q,attn.to_k,attn.to_v,attn.to_out.0,ff.net.0.proj,ff.net.2,proj_mlp,proj_out,x_embedder",
        help="options of the training script that all arms share")
    args = parser.parse_args(argv)
    check_least(args, steps=TIMED_STEPS, heldout_images=1, score_px=1)
    if min(args.seeds, default=0) < 0:
        raise ValueError(f"--seeds {min(args.seeds)}: give 0 or more")
    if not args.table and not (args.train_root and args.heldout_root):
        raise ValueError("give --train_root and --heldout_root, or --table for what is already there")
    return args


def script_args(args, arm, seed):
    """The training script's arguments of one arm."""
    k, reference, loss = arm
    words = ["--pretrained_model_name_or_path", args.model, "--hr_root", args.train_root, "--resolution",
             str(args.resolution), "--start_noise", str(k), "--seed", str(seed), "--report_to", "none", "--output_dir",
             str(Path(args.output) / "unused"), "--lr_scheduler", "constant_with_warmup", "--use_ema"]
    words += [] if reference else ["--no-reference_tokens"]
    words += ["--perceptual_loss", loss] if loss != "none" else []
    return script.parse_args(words + args.script_args.split())


def load_crops(args, degrade):
    """(target, control), each (N, 3, px, px): the centre crop of images spread evenly over the held-out folder."""
    records = folder_records(args.heldout_root)
    check_no_overlap(list_images(args.train_root), [record.target for record in records])
    chosen = np.linspace(0, len(records) - 1, min(args.heldout_images, len(records))).round().astype(int).tolist()
    pairs = [load_pairs(records[i], i, degrade, heldout_seed(0), args.score_px, 1)[0] for i in chosen]
    return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])


def score(pipe, text, settings, target, control):
    """{sampling steps: {"psnr": [dB of each image], "laplacian": [energy over the target's]}}."""
    scores = {}
    text = flux.TextEmbeds(text.prompt.expand(len(target), -1, -1), text.pooled.expand(len(target), -1))
    for steps in SAMPLING_STEPS:
        restored = restore(pipe, control, text, settings, steps, list(range(len(target))))
        scores[steps] = {"psnr": metrics.psnr(restored, target).tolist(),
                         "laplacian": metrics.laplacian(restored, target).tolist()}
    return scores


def train_arm(args, arm, seed, encoded, dataset, crops, budget_s):
    """Train one arm; {"equal steps": scores, "equal time": scores, "step_s": CPU seconds, "steps": {...}}.

    budget_s: CPU seconds of k = 1 for its steps (the step itself, without data and averaging), or None when this is
    that arm. "capped": whether LONGEST cut the arm short of equal time."""
    options = script_args(args, arm, seed)
    pipe = flux.load_models(args.model, "cpu", torch.float32)
    parameters = lora.attach(pipe.transformer, options.rank, options.lora_alpha, options.lora_dropout,
                             options.lora_layers, options.use_dora, options.use_rslora, seed)
    optimizer = run.make_optimizer(parameters, options, 1)
    lr_scheduler = run.make_lr_scheduler(optimizer, options)
    ema = lora.make_ema(parameters, options.ema_decay)
    perceptual = make_perceptual_loss(options.perceptual_loss, None) if options.perceptual_loss else None
    settings = make_settings(options)
    prompt = options.instance_prompt
    batches = iter(BucketBatchSampler(dataset.bucket_of, options.train_batch_size, seed))
    result, times, step = {"steps": {}}, [], 0
    pipe.transformer.train()
    goals = {"equal steps": args.steps}
    while True:
        batch = collate_fn([dataset[key] for key in next(batches)])
        text = flux.stack_text(encoded, batch["prompt"], "cpu", torch.float32)
        started = time.process_time()
        losses = script.training_step(pipe, pipe.transformer, perceptual, batch, text, options)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - started)
        lr_scheduler.step()
        ema.step(parameters)
        step += 1
        if step == TIMED_STEPS:
            step_s = statistics.median(times[WARM_UP_STEPS:])
            affordable = args.steps if budget_s is None else max(TIMED_STEPS, round(budget_s / step_s))
            goals["equal time"] = min(affordable, round(LONGEST * args.steps))
            result |= {"step_s": step_s, "capped": affordable > goals["equal time"]}
        for name in [name for name, goal in goals.items() if goal == step]:
            pipe.transformer.eval()
            with lora.averaged(ema, parameters):
                result[name] = score(pipe, flux.stack_text(encoded, [prompt], "cpu", torch.float32), settings, *crops)
            result["steps"][name] = step
            pipe.transformer.train()
        if step >= TIMED_STEPS and step == max(goals.values()):
            return result


def name_of(arm):
    k, reference, loss = arm
    return f"{k:g}{'' if reference else ', no reference'}{', gradient loss' if loss != 'none' else ''}"


def run_seed(args, seed):
    """Train every arm that the seed's file lacks; the file is complete after each."""
    path = Path(args.output) / f"seed-{seed}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    shared = {name: value for name, value in vars(args).items() if name not in ("output", "seeds", "table")}
    known = results.setdefault("arguments", shared)
    if changed := [name for name in shared if known[name] != shared[name]]:
        raise ValueError(f"{path} was made with another --{changed[0]} ({known[changed[0]]}); give the same, or "
                         "another --output")
    first = script_args(args, ARMS[0], seed)
    degrade = degrader_from_args(first)
    dataset = dataset_from_args(first, degrade, first.instance_prompt, seed)
    crops = load_crops(args, degrade)
    encoded = flux.encode_prompts(args.model, [first.instance_prompt], "cpu", torch.float32, first.max_sequence_length)
    if "input" not in results:
        results["input"] = {"psnr": metrics.psnr(crops[1], crops[0]).tolist()}
        pipe = flux.load_models(args.model, "cpu", torch.float32)
        text = flux.stack_text(encoded, [first.instance_prompt], "cpu", torch.float32)
        results["base"] = {"equal steps": score(pipe, text, make_settings(first), *crops)}
    for arm in ARMS:
        if name_of(arm) in results:
            continue
        reference = results.get(name_of(ARMS[0]))
        result = train_arm(args, arm, seed, encoded, dataset, crops, reference and reference["step_s"] * args.steps)
        results[name_of(arm)] = result
        results["run"] = {"date": str(date.today()), "machine": platform.processor() or
                          platform.machine(), "torch": torch.__version__, "threads": os.environ.get("OMP_NUM_THREADS")}
        write_json(path, results)
        psnr = {steps: round(statistics.mean(values["psnr"]), 2) for steps, values in result["equal steps"].items()}
        print(f"seed {seed}, {name_of(arm)}: {psnr}, {1e3 * result['step_s']:.0f} ms a step", flush=True)


def table(folder):
    """(Markdown lines, CSV rows) of all seeds in `folder`: mean PSNR by arm, budget and sampling steps, with the
    standard deviation over seeds where there are several, and Laplacian energy relative to the clean crops."""
    seeds = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("seed-*.json"))]
    if not seeds:
        raise ValueError(f"{folder} holds no seed-*.json; run without --table first")
    rows = []
    for budget in ("equal steps", "equal time"):
        for arm in ("base", *map(name_of, ARMS)):
            found = [seed[arm] for seed in seeds if budget in seed.get(arm, {})]
            for steps in map(str, SAMPLING_STEPS if found else ()):
                psnr = [statistics.mean(result[budget][steps]["psnr"]) for result in found]
                sharp = [statistics.mean(result[budget][steps]["laplacian"]) for result in found]
                rows.append({
                    "budget": budget, "arm": arm, "sampling_steps": int(steps), "seeds": len(found),
                    "psnr": statistics.mean(psnr), "psnr_std": statistics.stdev(psnr) if len(psnr) > 1 else "",
                    "laplacian": statistics.mean(sharp),
                    "training_steps": statistics.mean(r["steps"][budget] for r in found) if arm != "base" else 0,
                    "capped": budget == "equal time" and any(r["capped"] for r in found)})
    lines = ["\nPSNR in dB (Laplacian energy over the clean images'); *: fewer steps than equal time allows."]
    for budget in ("equal steps", "equal time"):
        heads = " | ".join(f"{steps} step{'s' * (steps > 1)}" for steps in SAMPLING_STEPS)
        lines += [f"\n{budget.capitalize()}:\n", f"| start noise | training steps | {heads} |",
                  "|---" * (len(SAMPLING_STEPS) + 2) + "|"]
        for arm in dict.fromkeys(row["arm"] for row in rows if row["budget"] == budget):
            cells = [row for row in rows if (row["budget"], row["arm"]) == (budget, arm)]
            texts = [f"{cell['psnr']:.2f}" + (f" ± {cell['psnr_std']:.2f}" if cell["psnr_std"] != "" else "")
                     + f" ({cell['laplacian']:.2f})" for cell in cells]
            trained = f"{cells[0]['training_steps']:.0f}{'*' * cells[0]['capped']}"
            lines.append(f"| {arm} | {trained} | {' | '.join(texts)} |")
    return lines, rows


def chart_of(rows):
    """Figure of PSNR over sampling steps by arm, with the standard deviation over seeds."""
    lines = {}
    for row in rows:
        spread = row["psnr_std"] or 0.0
        lines.setdefault(row["arm"], []).append(
            (row["sampling_steps"], None, row["psnr"], row["psnr"] - spread, row["psnr"] + spread))
    return draw_sampling(lines, {}, "PSNR, dB")


def main():
    args = parse_args()
    folder = writable_folder(args.output, "--output")
    cv2.setNumThreads(1)
    for seed in [] if args.table else args.seeds:
        run_seed(args, seed)
    lines, rows = table(folder)
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for budget in dict.fromkeys(row["budget"] for row in rows):
        chart_of([row for row in rows if row["budget"] == budget]).savefig(folder / f"{budget.replace(' ', '_')}.png")
    print("\n".join(lines))


if __name__ == "__main__":
    run_main(main)

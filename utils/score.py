"""Scores of several restorations of the same images: means with intervals, gains, and the files that report them."""

import csv
import math
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np

from utils import alignment, metrics
from utils.parse import write_json
from utils.report import item_name, picture, section, write_report
from utils.utils import image_grid, to_pil

ROWS = {
    "input": "input (degraded)",
    "input_vae": "input through the VAE",
    "nlm": "non-local means",
    "bilateral": "bilateral filter",
    "base": "base model without LoRA",
    "lora": "LoRA (restored)",
    "ceiling": "VAE round trip of the clean image (ceiling)",
}
DEFINITIONS = metrics.DEFINITIONS | alignment.DEFINITIONS
GRID_LABELS = {"input": "input", "base": "base", "lora": "LoRA", "ceiling": "VAE ceiling", "target": "target"}


def measure(image, target, names=("psnr", "ssim"), lpips=None):
    """{metric: float} of one image against its target, both (1, 3, H, W) in [-1, 1]: metrics.measure, and alignment."""
    values = {name: value[0] for name, value in metrics.measure(image, target, names, lpips).items()}
    right, down, scale = alignment.alignment(image, target)
    return values | {"shift_px": math.hypot(right, down), "scale": scale}


def keep_best(scores, row):
    """(scores, setting): of the rows "nlm h=3", "nlm h=5", ... (row: "nlm") the one with the best mean of the first
    metric becomes "nlm", the others go; setting: its "h=5", or None where there are none. A classical method's
    parameters are thus tuned on the very images it is scored on, which favours it."""
    trials = {trial: [] for trial in dict.fromkeys(score["row"] for score in scores) if trial.startswith(f"{row} ")}
    if not trials:
        return scores, None
    name = next(name for name in scores[0] if name in DEFINITIONS)
    for score in scores:
        if score["row"] in trials:
            trials[score["row"]].append(score[name])
    best = (min if name == "lpips" else max)(trials, key=lambda trial: np.mean(trials[trial]))
    kept = [score for score in scores if score["row"] == best or score["row"] not in trials]
    return [score | {"row": row} if score["row"] == best else score for score in kept], best.removeprefix(f"{row} ")


def summarise(scores, seed=0, order=tuple(ROWS), best="lora"):
    """(rows, gains): {row: {metric: (mean, lo, hi)}} in the given order, and the same of row `best` minus each other.

    scores: dicts of image, row and metrics, every image with the same rows. The crops of an image are averaged first:
    images are independent, crops of one image are not. Gains are paired by image; {} where there is no `best`."""
    names = [name for name in DEFINITIONS if name in scores[0]]
    images = {}
    for score in scores:
        images.setdefault(score["row"], {}).setdefault(score["image"], []).append([score[name] for name in names])
    values = {row: np.array([np.mean(crops, axis=0) for crops in images[row].values()])
              for row in order if row in images}

    def intervals(table):
        return {name: metrics.bootstrap_interval(table[:, i], seed) for i, name in enumerate(names)}

    gains = {row: intervals(values[best] - values[row]) for row in values if best in values and row != best}
    return {row: intervals(table) for row, table in values.items()}, gains


def readable(rows, labels):
    """{row: {metric: (mean, lo, hi)}} with names instead of places, for JSON."""
    return {row: {"label": labels[row]} | {name: dict(zip(("mean", "lo", "hi"), values, strict=True))
                                           for name, values in table.items()} for row, table in rows.items()}


def caption(values):
    """'28.31 dB / ssim 0.812' of {metric: value}; '' of {}."""
    return " / ".join(f"{value:.2f} dB" if name == "psnr" else f"{name} {value:.3f}"
                      for name, value in values.items() if name in metrics.METRICS)


def package_versions():
    """{package: version} of what the numbers depend on."""
    return {"opencv": cv2.__version__} | {package: version(package) for package in (
        "torch", "diffusers", "peft", "torchmetrics", "lpips", "numpy", "pillow")}


def write_csv(path, scores):
    """Write `scores`, dicts with the same keys, as a table."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(scores[0]))
        writer.writeheader()
        writer.writerows(scores)


def compared(pictures, columns, labels):
    """What a page compares of {item: {row: (image (3, H, W) in [-1, 1], {metric: value})}}, in the order of columns."""
    return {item: [picture(labels.get(column, column), to_pil(shown[column][0]), caption(shown[column][1]))
                   for column in columns] for item, shown in pictures.items()}


def write_scores(folder, scores, report, pictures):
    """Write scores.csv, a line per image, crop and row; metrics.json; report.html; and grid.png, if there are pictures:
    {item_name: {row or "target": (image (3, H, W) in [-1, 1], {metric: value})}}."""
    folder = Path(folder)
    write_csv(folder / "scores.csv", scores)
    write_json(folder / "metrics.json", report)
    columns = [column for column in GRID_LABELS if column in next(iter(pictures.values()), {})]
    if pictures:
        image_grid([[shown[column][0] for column in columns] for shown in pictures.values()],
                   [GRID_LABELS[column] for column in columns],
                   [[caption(shown[column][1]) for column in columns] for shown in pictures.values()],
                   ).save(folder / "grid.png")
    run, best = report["run"], "lora" if "lora" in report["rows"] else None
    columns.sort(key=lambda column: column not in ("input", best))  # these two are compared at first
    scored = section("Scores", report["rows"], report["lora_minus"], best, scores,
                     compared(pictures, columns, GRID_LABELS),
                     {item_name(crop): crop["degradation"] for crop in report["degradations"]})
    about = (f"{report['images']} images, {report['crops']} crops, {report['failed']} failed; steps {run['steps']}, "
             f"start noise {run['sampled_start_noise']:g}, seed {report['arguments']['seed']}; mean "
             f"[{report['interval']}]")
    write_report(folder / "report.html", "Restoration, scored", about, [scored],
                 {"What the numbers mean": report["definitions"] | {"lpips_net": report["lpips_net"]},
                  "How it was made": run, "Options": report["arguments"], "Versions": report["versions"]})

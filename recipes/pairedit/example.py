"""The whole recipe on the embedded model, on a CPU: sliders of known edits trained on three pairs each, drawn on images
that training never saw, measured, and used on real photographs.

    python -m recipes.pairedit.example --output outputs/pairedit
    python -m recipes.pairedit.example --output outputs/study --variants train_image train_image_wocontent \
        train_image_wocfg train_image_fm train_image_sliders --edits warm gray dark blur glow --no-real_images
"""

import argparse
import csv
import sys
import time
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from my_dataset.images import load_rgb, save_image
from recipes.pairedit import generate, generate_real_image, make_pairs, train
from recipes.pairedit.edits import EDITS
from recipes.pairedit.eval_scripts import evaluate, known_edits
from recipes.pairedit.objectives import VARIANTS
from recipes.pairedit.options import CONFIGS, parse_pairedit_args, plan_tasks
from recipes.pairedit.pairs import load_square
from utils.metrics import psnr
from utils.parse import make_parser, run_main, writable_folder, write_json
from utils.utils import image_grid, to_uint8

CONFIG = CONFIGS / "embedded.yaml"
ETA = {"dark": 1.7, "gray": 0.6, "glow": 3}  # of the edits that need another than the config's
# Image sliders have no unit: their weight is taken further, so that equal strengths can be compared.
SCALES = {"train_image_sliders": "0,1,2,3,4,6"}
STRENGTHS = (0.25, 0.5)  # shares of the true edit at which variants are compared
REAL = {"coffee": ("skimage.data", "coffee.png"), "flower": ("sklearn.datasets.images", "flower.jpg")}
REAL_OPTIONS = ("--python_name train_image_real --train_iteration 200 --skips 14 --count_gen 1 --real_mix add "
                "--semantic_cfg_scale 1 --start_sigma 0.5").split()


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--output", default="outputs/pairedit", help="new folder for all that is written")
    add("--edits", nargs="+", default=["warm", "dark", "glow"], choices=EDITS, help="known edits")
    add("--variants", nargs="+", default=["train_image"], choices=[v for v in VARIANTS if v not in (
        "train_image_real", "slider_text")], help="variants to train on each edit")
    add("--seed", type=int, default=0, help="seed of training")
    add("--train_iteration", type=int, default=600, help="steps of a slider")
    add("--real_images", action=argparse.BooleanOptionalAction, default=True, help="edit two photographs too")
    args = parser.parse_args(argv)
    if any(writable_folder(args.output, "--output").iterdir()):
        raise ValueError(f"--output {args.output} is not empty; name a new folder")
    return args


def slider_words(args, edit, variant):
    """The options of training and generation of one slider."""
    output = Path(args.output)
    words = ["--config", CONFIG, "--datasets_folder", output / "datasets", "--datasets", edit, "--python_name", variant,
             "--output_folder", output / "models", "--output_folder_gen", output / "images", "--seed", args.seed,
             "--train_iteration", args.train_iteration, "--save_per_steps", args.train_iteration]
    words += ["--cfg_eta", ETA[edit]] if edit in ETA else []
    words += ["--scales", SCALES[variant]] if variant in SCALES else []
    return [str(word) for word in words]


def lora_of(words):
    """(name, file) of the LoRA that these options train."""
    args = parse_pairedit_args(__doc__, words)
    task, = plan_tasks(args, check_images=False)
    return task.name(args), task.file(args, args.train_iteration)


def read_table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def measure(folder, edit):
    """What the files of `evaluate` say of one slider: its share of the true edit at scale 1, its linear correlation
    with the scale (of the mean image, and the mean of all images'), whether it rises all along, and how much stayed as
    it was where the slider reaches each of STRENGTHS, between two scales; None where it never does."""
    curves = [row for row in read_table(folder / "monotonicity.csv") if row["measure"] == "edit_share"]
    mean = next(row for row in curves if row["seed"] == "mean")
    each = [float(row["linear"]) for row in curves if row["seed"] != "mean" and row["linear"]]
    kept = "outside_change" if EDITS[edit].mask else "gradient_correlation"
    summary = read_table(folder / "summary.csv")
    attribute, of_edit, left = (np.array([float(row[f"{name}_mean"]) for row in summary])
                                for name in ("attribute", "attribute_of_edit", kept))
    share = (attribute - attribute[0]) / (of_edit[0] - attribute[0])
    rises = bool((np.diff(share) > 0).all())
    rising = np.argmax(share) + 1
    kept_at = [float(np.interp(strength, share[:rising], left[:rising])) if share.max() >= strength else None
               for strength in STRENGTHS]
    return {"share_at_1": float(mean["at_1"]), "linear": float(mean["linear"]), "linear_of_each": float(np.mean(each)),
            "rises": rises, "kept": kept, "kept_at": kept_at}


def edit_real_images(args):
    """A content LoRA for each of two photographs that training never saw, and every slider on them; rows for the
    table, with the images."""
    output, rows = Path(args.output), []
    for name, (package, file) in REAL.items():
        path = output / "datasets" / "real" / "source" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(path, to_uint8(load_square(Path(str(resources.files(package) / file)), 128)[0]))
    for edit in args.edits:
        semantic = lora_of(slider_words(args, edit, args.variants[0]))[1]
        words = [*slider_words(args, "real", "train_image_real"), *REAL_OPTIONS, "--image_ids", *REAL,
                 "--semantic_lora_path", str(semantic), "--output_folder_gen", str(output / "real" / edit),
                 "--resume_from_checkpoint", "latest"]
        train.main(train.parse_args(words))
        generate_real_image.main(generate_real_image.parse_args(words))
        scales = parse_pairedit_args(__doc__, words).scales
        for name in REAL:
            files = sorted((output / "real" / edit / "real").glob(f"real_{name}_*/*/*/*.png"))
            images = torch.stack([torch.from_numpy(load_rgb(file)).movedim(-1, 0) / 255 for file in files])
            photograph = (load_square(output / f"datasets/real/source/{name}.png", images.shape[-1]) + 1) / 2
            rows.append({"edit": edit, "photograph": name, "scales": scales,
                         "psnr_at_0": float(psnr(images[:1] * 2 - 1, photograph * 2 - 1)),
                         "share": known_edits.measure(images, EDITS[edit])["edit_share"],
                         "images": [photograph[0], *images]})
    return rows


def main(args):
    started, output = time.perf_counter(), Path(args.output)
    make_pairs.main(make_pairs.parse_args(["--edits", *args.edits, "--output_folder", str(output / "datasets")]))
    table = []
    for edit in args.edits:
        for variant in args.variants:
            words, scores = slider_words(args, edit, variant), output / "scores" / f"{edit}_{variant}"
            train.main(train.parse_args(words))
            generate.main(generate.parse_args(words))
            images = output / "images" / edit / lora_of(words)[0]
            evaluate.main(evaluate.parse_args(["--images", str(images), "--edit", edit, "--output", str(scores)]))
            table.append({"edit": edit, "variant": variant} | measure(scores, edit))
    real = edit_real_images(args) if args.real_images else []

    print(f"\n{'edit':6} {'variant':22} share at 1  linear  of each  rises  kept at "
          f"{' and '.join(f'{strength:g}' for strength in STRENGTHS)} of the edit")
    for row in table:
        print(f"{row['edit']:6} {row['variant']:22} {row['share_at_1']:10.2f} {row['linear']:7.3f} "
              f"{row['linear_of_each']:8.3f} {'yes' if row['rises'] else 'no':>6}  {row['kept']} "
              + ", ".join("-" if value is None else f"{value:.3f}" for value in row["kept_at"]))
    for row in real:
        print(f"{row['edit']}, {row['photograph']}: PSNR at scale 0 {row['psnr_at_0']:.2f} dB, shares "
              f"{', '.join(f'{share:.2f}' for share in row['share'])}")
    write_json(output / "table.json", {"table": table, "real": [
        {name: value for name, value in row.items() if name != "images"} for row in real]})
    if real:
        labels = ["photograph", *(f"{scale:g}" for scale in real[0]["scales"])]
        image_grid([[image * 2 - 1 for image in row["images"]] for row in real], labels).save(output / "real.png")
        print(f"picture: {output / 'real.png'}")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(parse_args())))

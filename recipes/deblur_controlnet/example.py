"""The whole recipe on the embedded model, on two CPU cores: pairs of photographs, training, scores for each blur on
photographs that training never saw. With --arms, one loss or option is changed at a time.

    python -m scripts.download_dataset sample
    python -m recipes.deblur_controlnet.example --output outputs/deblur
    python -m recipes.deblur_controlnet.example --output outputs/deblur-arms --arms full no_l1 attention
"""

import json
import shlex
import sys
import time
from pathlib import Path

from my_dataset.dataset_deg_paired import check_no_overlap, folder_records
from recipes.deblur_controlnet import create_deblur_dataset, evaluate, train_deblur_controlnet
from recipes.deblur_controlnet.deblur_dataset import BLUR_TYPES
from utils.parse import check_least, make_parser, run_main, writable_folder, write_json

BASE = "assets/tiny-sd"
DATA = "--image_size 256 --upscale_small --type_weights motion_blur:3,gaussian_blur:1,defocus_blur:1,lens_blur:1"
# The start of sampling, the blurred image with little noise, is all that is trained; so one step is enough.
TRAINING = (
    "--image_size 64 --crop_zoom 4 --batch_size 8 --no-sd_locked --train_start blurred --t_min 1 --t_max 40 "
    "--learning_rate 3e-4 --adam_beta2 0.99 --adam_weight_decay 0 --lr_warmup_steps 50 --proportion_empty_prompts 0.2 "
    "--simple_loss_weight 0.1 --deblur_loss_weight 30 --decode_crop 0 --num_inference_steps 1 --guidance_scale 1 "
    "--strength 0.01 --logger_freq 0 --checkpointing_steps 0 --num_workers 1 --report_to none")
ARMS = {  # what each changes
    "full": "",
    "no_simple": "--simple_loss_weight 0",
    "vlb": "--elbo_weight 0.001",
    "no_deblur": "--deblur_loss_weight 0",
    "no_l1": "--l1_loss_weight 0",
    "no_mse": "--mse_loss_weight 0",
    "no_gradient": "--gradient_loss_weight 0",
    "no_perceptual": "--perceptual_loss_weight 0",
    "locked": "--sd_locked",
    "only_mid": "--only_mid_control",
    "attention": "--use_attention",
    "augmentation": "--use_augmentation",
    "clean_start": "--train_start clean",
}


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--photos", default="data/sample/train", help="folder of sharp photographs for training")
    add("--heldout", default="data/sample/heldout", help="folder of sharp photographs for scoring")
    add("--output", default="outputs/deblur", help="new folder for all that is written")
    add("--arms", nargs="+", default=["full"], choices=ARMS, help="trainings; 'full' has every loss")
    add("--num_samples", type=int, default=1200, help="pairs")
    add("--max_train_steps", type=int, default=200, help="steps of each training, 8 crops of 64 px each")
    add("--perceptual_weights", help="file of VGG16 weights; without it no arm has the perceptual loss")
    add("--crop_px", type=int, default=128, help="side of the crops that are scored; 0: whole images")
    add("--crops_per_image", type=int, default=1, help="crops scored of each image")
    add("--seed", type=int, default=0, help="of pairs, training and scoring")
    args = parser.parse_args(argv)
    check_least(args, num_samples=1, max_train_steps=1, crop_px=0, crops_per_image=1, seed=0)
    if "no_perceptual" in args.arms and not args.perceptual_weights:
        raise ValueError("--arms no_perceptual: without --perceptual_weights no arm has that loss; leave it out")
    check_no_overlap(*([record.target for record in folder_records(folder)] for folder in (args.photos, args.heldout)))
    if any(writable_folder(args.output, "--output").iterdir()):
        raise ValueError(f"--output {args.output} is not empty; name a new folder")
    return args


def train_arm(args, arm, pairs):
    """Seconds that the training of an arm took; its model lies in --output/ARM."""
    words = ["--pretrained_model_name_or_path", BASE, "--data_root", str(pairs), "--output_dir",
             str(Path(args.output) / arm), "--seed", str(args.seed), "--max_train_steps", str(args.max_train_steps),
             "--validation_steps", str(args.max_train_steps), *shlex.split(TRAINING)]
    words += ["--perceptual_weights", args.perceptual_weights] if args.perceptual_weights else [
        "--perceptual_loss_weight", "0"]
    started = time.perf_counter()
    train_deblur_controlnet.main(train_deblur_controlnet.parse_args(words + shlex.split(ARMS[arm])))
    return time.perf_counter() - started


def score_arm(args, arm):
    """What `evaluate` reports of each blur type; of the first arm also what no training changes."""
    folder = Path(args.output) / f"{arm}-scores"
    code = evaluate.main(evaluate.parse_args([
        "--pretrained_model_name_or_path", BASE, "--model", str(Path(args.output) / arm), "--clean", args.heldout,
        "--output", str(folder), "--crop_px", str(args.crop_px), "--crops_per_image", str(args.crops_per_image),
        "--seed", str(args.seed), "--prompt_by_type", "--device", "cpu",
        *(["--base_row"] if arm == args.arms[0] else ["--no-classical_rows"])]))
    if code:
        raise ValueError(f"--heldout {args.heldout}: some photographs could not be scored; see above")
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["blur_types"]


def main(args):
    pairs = Path(args.output) / "pairs"
    create_deblur_dataset.main(create_deblur_dataset.parse_args([
        "--source_dir", args.photos, "--output_dir", str(pairs), "--num_samples", str(args.num_samples),
        "--seed", str(args.seed), *shlex.split(DATA)]))
    table = []
    for arm in args.arms:
        seconds = train_arm(args, arm, pairs)
        for blur_type, report in score_arm(args, arm).items():
            table.append({"arm": arm, "blur_type": blur_type, "training_s": round(seconds)} | {
                row: report["rows"][row]["psnr"]["mean"] for row in report["rows"]} | {
                "gain": report["deblurred_minus"]["input"]["psnr"]})
    write_json(Path(args.output) / "table.json", table)

    print(f"\nPSNR, dB\n{'blur':13}" + "".join(f" {evaluate.COLUMNS[row]:>15}" for row in evaluate.ROWS))
    for row in table[: len(BLUR_TYPES)]:
        print(f"{row['blur_type']:13}" + "".join(f" {row[name]:15.2f}" for name in evaluate.ROWS))
    print(f"\ngain over the blurred image, dB [95 % interval]\n{'arm':13} training "
          + "".join(f" {blur_type:>22}" for blur_type in BLUR_TYPES))
    for place in range(0, len(table), len(BLUR_TYPES)):
        gains = (row["gain"] for row in table[place : place + len(BLUR_TYPES)])
        print(f"{table[place]['arm']:13} {table[place]['training_s']:6} s "
              + "".join(f"   {gain['mean']:+.2f} [{gain['lo']:+.2f}, {gain['hi']:+.2f}]" for gain in gains))
    print(f"pictures: {Path(args.output) / '*-scores' / 'grid.png'}")


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(parse_args())))

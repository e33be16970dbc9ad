"""Score deblurring on sharp photographs that training never saw, for each blur type: the blurred image, Wiener's filter
and Richardson-Lucy with the true kernel, the ControlNet, and the autoencoder's round trip, which it cannot surpass.

    python -m recipes.deblur_controlnet.evaluate --pretrained_model_name_or_path assets/tiny-sd \\
        --model trained-deblur-controlnet --clean heldout --output scores

The two classical methods know what no photograph tells, the kernel, and get the best of several parameters on the very
images they are scored on. Writes scores.csv, metrics.json and grid.png."""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
from skimage.restoration import richardson_lucy, wiener
from tqdm import tqdm

from my_dataset.dataset_deg_paired import folder_records, heldout_seed, item_seed, to_tensor
from my_dataset.degradations import (
    defocus_kernel,
    gaussian_kernel,
    linear_to_srgb,
    motion_kernel,
    srgb_to_linear,
)
from my_dataset.scored_pairs import load_pairs
from recipes.deblur_controlnet import deblur
from recipes.deblur_controlnet.deblur_controlnet import decode, encode
from recipes.deblur_controlnet.deblur_dataset import BLUR_TYPES, apply_blur, prompts
from utils import metrics
from utils.failures import check_report, report_failures
from utils.parse import check_least, make_parser, public_args, run_main, writable_folder, write_json
from utils.score import DEFINITIONS, caption, keep_best, measure, package_versions, readable, summarise, write_csv
from utils.tiles import Tiling, blend_tiles
from utils.utils import to_uint8
from utils.validation import save_grid

ROWS = {"input": "blurred input", "base": "base model without ControlNet", "wiener": "Wiener, true kernel",
        "lucy": "Richardson-Lucy, true kernel", "deblurred": "ControlNet",
        "ceiling": "VAE round trip of the sharp image (ceiling)"}
COLUMNS = {"input": "blurred", "base": "base model", "wiener": "Wiener", "lucy": "Richardson-Lucy",
           "deblurred": "ControlNet", "ceiling": "VAE ceiling"}
WIENER_BALANCES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LUCY_ITERATIONS = (10, 30, 100)
MARGIN_PX = 32  # around a crop while it is blurred, more than the blurs' usual radius
LENS_SIDE_PX = 15  # of degradations.lens_blur


def parse_args(argv=None):
    parser = make_parser(__doc__)
    deblur.add_sampling_args(parser)
    add = parser.add_argument
    add("--clean", required=True, help="folder of sharp images, or one image")
    add("--output", required=True, help="folder for everything that is written")
    add("--blur_types", nargs="+", default=list(BLUR_TYPES), choices=BLUR_TYPES, help="which are scored")
    add("--motion_length", type=float, default=15, help="px")
    add("--motion_angle", type=float, help="degrees; default: drawn for each image")
    add("--gaussian_sigma", type=float, default=3, help="px")
    add("--defocus_radius", type=float, default=5, help="px")
    add("--lens_strength", type=float, default=0.8, help="share of the blurred in the mixture, 0 to 1")
    add("--linear_light", action="store_true", help="blur, and deconvolve, intensities instead of sRGB values")
    add("--prompt_by_type", action="store_true", help="tell the model the blur type; default: the empty prompt")
    add("--classical_rows", action=argparse.BooleanOptionalAction, default=True, help="score Wiener's filter and "
        "Richardson-Lucy")
    add("--base_row", action="store_true", help="score the base model without the ControlNet too, sampled alike")
    add("--crop_px", type=int, default=0, help="score square crops of this side; 0: whole images")
    add("--crops_per_image", type=int, default=1, help="crops per image, of a centred grid without overlap")
    args = parser.parse_args(argv)
    deblur.check_sampling_args(args)
    check_least(args, motion_length=1, motion_angle=0, gaussian_sigma=0.1, defocus_radius=0.5, lens_strength=0,
                crop_px=0, crops_per_image=1)
    if args.lens_strength > 1:
        raise ValueError(f"--lens_strength {args.lens_strength}: give 0 to 1")
    return args


def blurs_from_args(args):
    """{blur type: its parameters}; an angle of None is drawn for each image."""
    params = {
        "motion_blur": {"length": args.motion_length, "angle": args.motion_angle},
        "gaussian_blur": {"sigma": args.gaussian_sigma},
        "defocus_blur": {"radius": args.defocus_radius},
        "lens_blur": {"strength": args.lens_strength},
    }
    return {blur_type: params[blur_type] for blur_type in args.blur_types}


def blur_kernel(blur_type, params):
    """The kernel that `apply_blur` convolves with: square, odd, sum 1."""
    if blur_type == "lens_blur":
        kernel = np.full((LENS_SIDE_PX, LENS_SIDE_PX), params["strength"] / LENS_SIDE_PX**2)
        kernel[LENS_SIDE_PX // 2, LENS_SIDE_PX // 2] += 1 - params["strength"]
        return kernel
    make = {"motion_blur": motion_kernel, "gaussian_blur": gaussian_kernel, "defocus_blur": defocus_kernel}
    return make[blur_type](*params.values())


def deconvolve(image, kernel, linear_light, method):
    """method(channel, kernel) of each channel of an image (H, W, 3) uint8, or of its light, its borders mirrored so far
    that they do not wrap around; the same comes out."""
    values = srgb_to_linear(image) if linear_light else image
    margin = min(2 * len(kernel), *(side - 1 for side in image.shape[:2]))
    padded = np.pad(values, ((margin, margin), (margin, margin), (0, 0)), mode="symmetric") / 255.0
    channels = [method(padded[..., c], kernel) for c in range(3)]
    inside = np.stack(channels, axis=-1)[margin:-margin, margin:-margin]
    values = np.clip(inside, 0, 1) * 255
    return linear_to_srgb(values, np.dtype(np.uint8)) if linear_light else values.round().astype(np.uint8)


def classical_rows(blurred, kernel, linear_light=False):
    """Yields (row, image) of every trial of the two methods. blurred: (H, W, 3) uint8."""
    deconvolved = partial(deconvolve, blurred, kernel, linear_light)
    for balance in WIENER_BALANCES:
        yield f"wiener balance={balance:g}", deconvolved(lambda x, k, b=balance: wiener(x, k, b))
    for count in LUCY_ITERATIONS:
        yield f"lucy iterations={count}", deconvolved(lambda x, k, n=count: richardson_lucy(x, k, n))


def main(args):
    records, folder = folder_records(args.clean), writable_folder(args.output, "--output")
    check_report(folder)
    model = deblur.load(args)
    vae, run = model.pipe.vae, model.from_args(args)
    run_base = deblur.load(args, model.settings).from_args(args) if args.base_row else None
    texts = prompts(model.settings["use_augmentation"]) if args.prompt_by_type else dict.fromkeys(BLUR_TYPES, "")
    size = model.settings["image_size"] if args.tile is None else args.tile

    def round_trip(image):
        return blend_tiles(image, Tiling(size, args.tile_overlap), model.multiple,
                           lambda tiles, _: decode(vae, encode(vae, tiles.to(vae.device))))

    report, all_scores, pictures, captions, failures = {}, [], [], [], []
    for blur_type, params in blurs_from_args(args).items():
        scores, picture = [], None

        def blur(image, rng, blur_type=blur_type, params=params):
            own = {name: rng.uniform(0, 180) if value is None else value for name, value in params.items()}
            return apply_blur(image, blur_type, own | {"linear_light": args.linear_light}), own

        for index, record in enumerate(tqdm(records, desc=blur_type, unit="image", disable=None)):
            try:
                pairs = load_pairs(record, index, blur, heldout_seed(args.seed), args.crop_px, args.crops_per_image,
                                   max_pixels=args.max_pixels, margin_px=MARGIN_PX)
                own = []
                for crop, (target, control, own_params) in enumerate(pairs):
                    rows, noise_seed = {"input": control}, item_seed(args.seed, crop, index)
                    if args.base_row:
                        rows["base"] = run_base(control, texts[blur_type], noise_seed)
                    if args.classical_rows:
                        rows |= {row: to_tensor(image)[None] for row, image in classical_rows(
                            to_uint8(control[0]), blur_kernel(blur_type, own_params), args.linear_light)}
                    rows["deblurred"] = run(control, texts[blur_type], noise_seed)
                    rows["ceiling"] = round_trip(target)
                    own += [{"image": record.name, "crop": crop, "row": row} | measure(image, target)
                            for row, image in rows.items()]
                    picture = picture or (record.name, crop, rows | {"target": target})
            except (ValueError, OSError) as error:
                failures.append((f"{record.name} ({blur_type})", error))
                continue
            scores += own
        if not scores:
            raise ValueError(f"--clean {args.clean}: not one image could be scored: {failures[-1][1]}")
        labels, chosen = dict(ROWS), {}
        for row in ("wiener", "lucy") if args.classical_rows else ():
            scores, chosen[row] = keep_best(scores, row)
            labels[row] += f" ({chosen[row]}, best on this set)"
        table, gains = summarise(scores, args.seed, tuple(ROWS), best="deblurred")
        report[blur_type] = {"params": params, "rows": readable(table, labels),
                             "deblurred_minus": readable(gains, labels)}
        all_scores += [{"blur_type": blur_type} | score for score in scores]
        name, crop, images = picture
        images |= {row: images[f"{row} {setting}"] for row, setting in chosen.items()}
        own = {score["row"]: caption({"psnr": score["psnr"]}) for score in scores
               if (score["image"], score["crop"]) == (name, crop)}
        pictures.append([images[column][0] for column in (*table, "target")])
        captions.append([f"{blur_type} {own['input']}", *(own[row] for row in table if row != "input"), ""])
        print(f"\n{blur_type} {params}\n"
              f"{metrics.summary_table({labels[row]: values for row, values in table.items()})}", flush=True)
        mean, lo, hi = gains["input"]["psnr"]
        print(f"ControlNet minus input: psnr {mean:+.3f} [{lo:+.3f}, {hi:+.3f}]", flush=True)

    write_csv(folder / "scores.csv", all_scores)
    write_json(folder / "metrics.json", {
        "images": len({score["image"] for score in all_scores}), "blur_types": report,
        "interval": "95 %, percentile bootstrap of the mean over images",
        "definitions": {name: DEFINITIONS[name] for name in DEFINITIONS if name in all_scores[0]},
        "settings": model.choose(**deblur.sampled(args)),
        "arguments": public_args(args), "versions": package_versions()})
    save_grid(pictures, [*(COLUMNS[row] for row in table), "target"], captions, Path(folder) / "grid.png")
    print(f"\nmean [95 % interval]; scores.csv, metrics.json, grid.png: {folder}")
    return report_failures(failures, folder)


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(parse_args())))

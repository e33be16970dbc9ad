"""Score sliders on the images that generation wrote, each against the image of its seed at scale 0:

    python -m recipes.pairedit.eval_scripts.evaluate --images output/eval/image --pairs datasets/age --output eval
    python -m recipes.pairedit.eval_scripts.evaluate --images output/eval/image/warm --edit warm --output eval

Preserved: PSNR and SSIM; LPIPS at 256 px; DINOv2 cosine of the class tokens. Edited, with E CLIP's image embedding of
length 1, d = mean(E(B) - E(A)) over the pairs and e = E(image) - E(image at scale 0):
    clip_image        mean cosine with the targets B
    clip_directional  cosine of e and d; none at scale 0, where e is 0
    clip_strength     e.d / |d|^2: 0 at scale 0, 1 where the image has gone as far as the pairs do
    clip_text         100 cosine with --text
With --edit, an edit that edits.py knows, also what known_edits.measure returns. The edit's evenness along the slider is
told by correlations of clip_strength and edit_share with the scale: the cosine would not do, it is the same for a weak
and a strong edit. A metric whose weights are not there is left out, with a line that says so.

Writes images.csv, a line per image; summary.csv, mean and standard deviation per LoRA, skip and scale;
monotonicity.csv, a line per seed and one for the mean over the seeds; strength.png and preservation.png."""

import math
import re
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import torch
from matplotlib.figure import Figure

from my_dataset.dataset_deg_paired import to_tensor
from my_dataset.images import image_size, list_images, load_rgb
from recipes.pairedit.edits import EDITS
from recipes.pairedit.eval_scripts import known_edits
from recipes.pairedit.pairs import find_pairs, square
from utils import metrics
from utils.parse import make_parser, run_main, writable_folder
from utils.score import write_csv
from utils.utils import to_uint8
from utils.validation import load_lpips

NAME = re.compile(r"(?P<seed>\d+)_(?P<dataset>.+?)_skip(?P<skip>-?\d+)_(?P<epoch>\d+)epoch"
                  r"_scale(?P<scale>-?\d+\.\d+)(?:_(?P<prompt>.*))?")
LPIPS_SIDE_PX = 256
STRENGTHS = {"edit_share": "share of the edit reached", "clip_strength": "edit strength (CLIP)"}
PRESERVATIONS = {"lpips": "LPIPS to scale 0", "ssim": "SSIM to scale 0"}


class MissingWeights(ValueError):
    """A network's weights are neither in a folder nor in the cache, and the hub does not give them."""


class Slider(NamedTuple):
    """What one summary is about: one LoRA file with one skip."""

    dataset: str
    lora: str
    epoch: int
    skip: int


class Item(NamedTuple):
    """One image that a slider moves."""

    slider: Slider
    seed: int
    prompt: str


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--images", required=True, help="folder of generated images, what --output_folder_gen was or one in it")
    add("--output", required=True, help="folder for the tables and plots")
    add("--pairs", help="the dataset that was trained on, with source/ and target/: the CLIP scores need it")
    add("--text", help="what edited images should show: adds clip_text")
    add("--edit", choices=EDITS, help="the known edit that was trained on")
    add("--lpips_backbone", help="file of AlexNet weights; default: torch's cache, and no LPIPS where it is not there")
    add("--clip_model", default="openai/clip-vit-base-patch32", help="CLIP, a folder or an id of the hub")
    add("--dino_model", default="facebook/dinov2-base", help="DINOv2, a folder or an id of the hub")
    return parser.parse_args(argv)


# --- files ------------------------------------------------------------------------------------------------------------

def parse_path(path):
    """(Item, scale) of <dataset>/<lora>/origin/<seed>/<seed>_<dataset>_skip<k>_<n>epoch_scale<a>_<prompt>.*, or None
    for a file of another name. Real images have the name of the semantic LoRA for `origin`."""
    match = NAME.fullmatch(path.stem)
    if not match or len(path.parents) < 3:
        return None
    lora, semantic = path.parents[2].name, path.parents[1].name
    slider = Slider(match["dataset"], lora if semantic == "origin" else f"{lora}/{semantic}", int(match["epoch"]),
                    int(match["skip"]))
    return Item(slider, int(match["seed"]), match["prompt"] or ""), float(match["scale"])


def find_items(folder):
    """{Item: {scale: path}} of the generated images in and below a folder, scales ascending. ValueError where the
    folder has none, a scale lies there twice or not for every seed, scale 0 is missing, or sizes differ."""
    items = {}
    for path in list_images(Path(folder).resolve()):
        if not (found := parse_path(path)):
            continue
        item, scale = found
        if other := items.setdefault(item, {}).get(scale):
            raise ValueError(f"{path} and {other} are the same seed and scale; take one away")
        items[item][scale] = path
    if not items:
        raise ValueError(f"--images {folder}: no image is named <seed>_<dataset>_skip<k>_<n>epoch_scale<a>_<prompt>; "
                         "name the --output_folder_gen of a generation")
    scales = {item.slider: sorted(paths) for item, paths in items.items()}
    for item, paths in items.items():
        where = next(iter(paths.values())).parent
        if 0.0 not in paths:
            raise ValueError(f"{where}: no image at scale 0 to compare with; generate again with 0 in --scales")
        if missing := set(scales[item.slider]) ^ set(paths):
            raise ValueError(f"{where}: other seeds have scale {min(missing):.2f} too, or lack it; generate all seeds "
                             "with the same --scales")
        sizes = {image_size(path): path for path in paths.values()}
        if len(sizes) > 1:
            names = " and ".join(path.name for path in sizes.values())
            raise ValueError(f"{where}: its images differ in size, such as {names}")
    return {item: dict(sorted(items[item].items())) for item in sorted(items)}


# --- embeddings -------------------------------------------------------------------------------------------------------

def read_embedder(kind, processor, name, local_files_only):
    """(model, processor) of transformers' classes `kind` and `processor`."""
    import transformers  # seconds to import

    architecture, processors = getattr(transformers, kind), getattr(transformers, processor)
    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=local_files_only)
        if config.model_type == architecture.config_class.model_type:  # else it would be given random weights
            return (architecture.from_pretrained(name, use_safetensors=True, local_files_only=local_files_only),
                    processors.from_pretrained(name, local_files_only=local_files_only))
    except (OSError, ValueError) as error:  # transformers wraps what hub and files raise
        raise MissingWeights(f"{name} cannot be loaded ({first_line(error)})") from error
    raise ValueError(f"{name} is a model of type {config.model_type}, not a {kind}")


def first_line(error):
    return str(error).partition("\n")[0]


def ask_hub(name):
    """MissingWeights where the hub does not know a model or cannot be reached: told by one question, where
    transformers asks for a minute."""
    try:
        huggingface_hub.model_info(name, timeout=10)
    except Exception as error:  # the hub's client raises its own kinds, and those of whichever HTTP library it uses
        raise MissingWeights(f"{name} is not in the cache, nor given by the hub ({first_line(error)})") from error


def load_embedder(kind, processor, name, device):
    """(model, processor) of transformers, out of safetensors in a folder or the cache, else from the hub.
    MissingWeights where they cannot be had, ValueError where they are another kind of model's."""
    try:
        embedder = read_embedder(kind, processor, name, local_files_only=True)
    except MissingWeights:
        if Path(name).is_dir():
            raise
        ask_hub(name)
        embedder = read_embedder(kind, processor, name, local_files_only=False)
    return embedder[0].to(device).requires_grad_(False).eval(), embedder[1]


def load_clip(name, device):
    return load_embedder("CLIPModel", "CLIPProcessor", name, device)


def load_dino(name, device):
    return load_embedder("Dinov2Model", "AutoImageProcessor", name, device)


def pixels(embedder, images):
    model, processor = embedder
    return processor(images=list(to_uint8(images)), return_tensors="pt")["pixel_values"].to(model.device)


def embed_clip(clip, images):
    """CLIP's embeddings of images (B, 3, H, W) in [-1, 1], (B, D) of length 1, on the CPU."""
    return unit(clip[0].get_image_features(pixel_values=pixels(clip, images)).pooler_output)


def embed_text(clip, text):
    """CLIP's embedding of a text, (D,) of length 1, on the CPU."""
    model, processor = clip
    tokens = processor(text=[text], truncation=True, return_tensors="pt").to(model.device)
    return unit(model.get_text_features(**tokens).pooler_output)[0]


def embed_dino(dino, images):
    """DINOv2's class tokens of images (B, 3, H, W) in [-1, 1], (B, D) of length 1, on the CPU."""
    return unit(dino[0](pixel_values=pixels(dino, images)).last_hidden_state[:, 0])


def unit(embeddings):
    return torch.nn.functional.normalize(embeddings.float().cpu(), dim=-1)


def pair_embeddings(clip, folder):
    """(direction (D,), targets (N, D)): mean of E(B) - E(A) over a dataset's pairs, and E(B). ValueError for pairs that
    are the same to CLIP."""
    sources, targets = (torch.cat([embed_clip(clip, to_tensor(load_rgb(path))[None]) for path in side])
                        for side in zip(*find_pairs(folder), strict=True))
    direction = (targets - sources).mean(0)
    if direction.norm() < 1e-6:
        raise ValueError(f"--pairs {folder}: its targets are the same as its sources, so they name no edit")
    return direction, targets


def clip_edit_scores(embeddings, direction, targets):
    """clip_image, clip_directional and clip_strength (see the module) of S images, the first at scale 0, as lists.

    embeddings: (S, D), direction: (D,), targets: (N, D)."""
    moved = embeddings - embeddings[:1]
    distance = moved.norm(dim=1)
    cosine = moved @ direction / (distance * direction.norm())
    return {"clip_image": (embeddings @ targets.T).mean(1).tolist(),
            "clip_directional": cosine.where(distance > 1e-6, torch.nan).clamp(-1, 1).tolist(),
            "clip_strength": (moved @ direction / direction.norm() ** 2).tolist()}


# --- scores -----------------------------------------------------------------------------------------------------------

def load_available(args, device):
    """{"lpips", "clip", "dino": network}, without those that have no weights or nothing to do; prints a line for each
    of them."""
    networks = {"lpips": load_lpips(args.lpips_backbone)}
    if networks["lpips"] is None:
        print(f"LPIPS left out: no {metrics.find_backbone()}; name one with --lpips_backbone")
    else:
        networks["lpips"].to(device)
    embedders = {"dino": (load_dino, args.dino_model)}
    if args.pairs or args.text:
        embedders["clip"] = load_clip, args.clip_model
    else:
        print("CLIP left out: it needs --pairs or --text")
    for key, (load, name) in embedders.items():
        try:
            networks[key] = load(name, device)
        except MissingWeights as error:
            print(f"{key.upper()} left out: {error}; name a folder with --{key}_model")
    return {name: network for name, network in networks.items() if network is not None}


def lpips_to_first(lpips, images, side_px):
    """LPIPS of each image (uint8, (H, W, 3)) to the first, S floats, on their central squares at side_px."""
    images = torch.cat([square(rgb, side_px) for rgb in images])
    return metrics.lpips_distance(lpips, images, images[:1].expand_as(images)).tolist()


def score_item(paths, networks, pairs=None, text=None, edit=None):
    """{metric: S floats} of the images of one seed, the first at scale 0. pairs: of `pair_embeddings`; text: of
    `embed_text`; edit: an Edit."""
    rgb = [load_rgb(path) for path in paths]
    images = torch.stack([to_tensor(image) for image in rgb])
    origin = images[:1].expand_as(images)
    scores = {"psnr": metrics.psnr(images, origin).tolist(), "ssim": metrics.ssim(images, origin).tolist()}
    if "lpips" in networks:
        scores["lpips"] = lpips_to_first(networks["lpips"], rgb, LPIPS_SIDE_PX)
    if "dino" in networks:
        tokens = embed_dino(networks["dino"], images)
        scores["dino"] = (tokens @ tokens[0]).tolist()
    if pairs or text is not None:
        embeddings = embed_clip(networks["clip"], images)
        if pairs:
            scores |= clip_edit_scores(embeddings, *pairs)
        if text is not None:
            scores["clip_text"] = (100 * embeddings @ text).tolist()
    if edit:
        scores |= known_edits.measure((images + 1) / 2, edit)
    return scores


def summarise(items):
    """Rows of summary.csv: mean and standard deviation over the seeds of every slider and scale. items: {Item: {scale
    and metrics: S floats}}."""
    rows = []
    for slider, group in by_slider(items).items():
        for i, scale in enumerate(group[0]["scale"]):
            row = slider._asdict() | {"scale": scale, "images": len(group)}
            for name in (key for key in group[0] if key != "scale"):
                values = [scores[name][i] for scores in group if not math.isnan(scores[name][i])]
                row |= {f"{name}_mean": float(np.mean(values)) if values else math.nan,
                        f"{name}_std": float(np.std(values)) if values else math.nan}
            rows.append(row)
    return rows


def by_slider(items):
    """{Slider: [metrics of its items]}."""
    groups = {}
    for item, scores in items.items():
        groups.setdefault(item.slider, []).append(scores)
    return groups


def mean_strength(group, name):
    """A measure of STRENGTHS over the scales, (S,), of the mean over a slider's items."""
    if name == "edit_share":
        zero = group[0]["scale"].index(0)
        attributes = np.array([scores["attribute"] for scores in group])
        return known_edits.edit_share(attributes, attributes[:, zero],
                                      [scores["attribute_of_edit"][zero] for scores in group])
    return np.mean([scores[name] for scores in group], axis=0)


def follow(items):
    """Rows of monotonicity.csv: how each measure of STRENGTHS goes with the scale, of every item and, with seed "mean",
    of each slider's mean; at_1: the measure at scale 1."""
    rows = []
    for slider, group in by_slider(items).items():
        names = [(item.seed, item.prompt) for item in items if item.slider == slider]
        for name in (key for key in STRENGTHS if key in group[0]):
            scales = group[0]["scale"]
            curves = [(("mean", ""), mean_strength(group, name)),
                      *zip(names, (scores[name] for scores in group), strict=True)]
            rows += [slider._asdict() | {"measure": name, "seed": seed, "prompt": prompt}
                     | known_edits.monotonicity(scales, values)
                     | {"at_1": float(values[scales.index(1)]) if 1 in scales else math.nan}
                     for (seed, prompt), values in curves]
    return rows


# --- reports ----------------------------------------------------------------------------------------------------------

def blank_unknown(rows):
    """NaN as the empty cell that spreadsheets know."""
    return [{name: "" if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
            for row in rows]


def label(slider, sliders):
    """What tells a slider from the others."""
    parts = [f"{name} {value}" for name, value in slider._asdict().items()
             if name == "skip" or len({getattr(other, name) for other in sliders}) > 1]
    return ", ".join(parts)


def draw_strength(items, name):
    """A figure of a measure of STRENGTHS over the scale: each slider's mean, and its items in thin lines."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes, groups = figure.subplots(), by_slider(items)
    for colour, (slider, group) in enumerate(groups.items()):
        for scores in group:
            axes.plot(scores["scale"], scores[name], color=f"C{colour}", alpha=0.25, linewidth=0.8)
        axes.plot(group[0]["scale"], mean_strength(group, name), color=f"C{colour}", marker=".", linewidth=2,
                  label=label(slider, groups))
    axes.set(xlabel="scale", ylabel=STRENGTHS[name])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def draw_preservation(items, strength, preservation):
    """A figure of edit strength against preservation, means over the seeds: a line per slider, a point per scale."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes, groups = figure.subplots(), by_slider(items)
    for slider, group in groups.items():
        x, y = np.mean([scores[preservation] for scores in group], axis=0), mean_strength(group, strength)
        axes.plot(x, y, marker=".", label=label(slider, groups))
        for scale, *point in zip(group[0]["scale"], x, y, strict=True):
            axes.annotate(f"{scale:g}", point, fontsize="x-small", xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel=PRESERVATIONS[preservation], ylabel=STRENGTHS[strength])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def print_table(rows, columns):
    """Rows of Slider's fields and more as a Markdown table of those `columns` that they have."""
    sliders = {Slider(*(row[name] for name in Slider._fields)) for row in rows}
    columns = [column for column in columns if column in rows[0]]
    print(metrics.markdown_table([["", *columns], *(
        [label(Slider(*(row[name] for name in Slider._fields)), sliders),
         *(f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in columns)]
        for row in rows)]))


def main(args):
    found = find_items(args.images)
    datasets = sorted({item.slider.dataset for item in found})
    if len(datasets) > 1 and (args.pairs or args.edit):
        raise ValueError(f"--images {args.images} holds {', '.join(datasets)}; name the folder of one, since --pairs "
                         "and --edit are of one")
    if args.pairs:
        find_pairs(args.pairs)
    output = writable_folder(args.output, "--output")
    networks = load_available(args, "cuda" if torch.cuda.is_available() else "cpu")
    clip = networks.get("clip")
    pairs = pair_embeddings(clip, args.pairs) if clip and args.pairs else None
    text = embed_text(clip, args.text) if clip and args.text else None
    items = {}
    for item, paths in found.items():
        ordered = sorted(paths, key=lambda scale: scale != 0)  # scale 0 comes first: what all others are compared with
        scores = {"scale": ordered} | score_item([paths[scale] for scale in ordered], networks, pairs, text,
                                                 EDITS.get(args.edit))
        order = np.argsort(ordered)
        items[item] = {name: [values[i] for i in order] for name, values in scores.items()}

    write_csv(output / "images.csv", blank_unknown(
        [item.slider._asdict() | {"seed": item.seed, "prompt": item.prompt} | {
            name: values[i] for name, values in scores.items()} for item, scores in items.items()
         for i in range(len(scores["scale"]))]))
    summary = summarise(items)
    write_csv(output / "summary.csv", blank_unknown(summary))
    print_table(summary, ("scale", *(f"{name}_mean" for name in (
        "psnr", "ssim", "lpips", "dino", "clip_directional", "clip_text", *STRENGTHS, "outside_change",
        "gradient_correlation"))))
    measured = next(iter(items.values()))
    strength = next((name for name in STRENGTHS if name in measured), None)
    if strength is None:
        print("No edit strength, no plots: give --edit, or --pairs with CLIP's weights")
        return
    curves = follow(items)
    write_csv(output / "monotonicity.csv", blank_unknown(curves))
    print_table([row for row in curves if row["seed"] == "mean"], ("measure", "linear", "spearman", "at_1"))
    draw_strength(items, strength).savefig(output / "strength.png", dpi=120)
    preservation = "lpips" if "lpips" in measured else "ssim"
    draw_preservation(items, strength, preservation).savefig(output / "preservation.png", dpi=120)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

"""CLIP score of generated images with a prompt, 100 cosine, as Concept Sliders' script of this name reports it:

    python -m recipes.pairedit.eval_scripts.clip_score --im_path output/eval/image/age --prompt "an old person"

Writes a line per image; case_number is its seed. `evaluate --text` adds the same column to all the others."""

import torch

from my_dataset.dataset_deg_paired import to_tensor
from my_dataset.images import load_rgb
from recipes.pairedit.eval_scripts.evaluate import embed_clip, embed_text, find_items, load_clip
from utils.parse import make_parser, run_main
from utils.score import write_csv


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--im_path", required=True, help="folder of generated images")
    parser.add_argument("--prompt", required=True, help="what the images should show")
    parser.add_argument("--clip_model", default="openai/clip-vit-base-patch32", help="CLIP: a folder, or an id")
    parser.add_argument("--output", default="clip_scores.csv", help="the table")
    return parser.parse_args(argv)


def main(args):
    items = find_items(args.im_path)
    clip = load_clip(args.clip_model, "cuda" if torch.cuda.is_available() else "cpu")
    text = embed_text(clip, args.prompt)
    write_csv(args.output, [item.slider._asdict() | {
        "case_number": item.seed, "scale": scale,
        "clip": float(100 * embed_clip(clip, to_tensor(load_rgb(path))[None])[0] @ text),
    } for item, paths in items.items() for scale, path in paths.items()])
    print(f"CLIP scores: {args.output}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

"""LPIPS of generated images to the image of their seed at scale 0, on AlexNet at 64 px, as Concept Sliders' script of
this name reports it (evaluate has it at 256 px):

    python -m recipes.pairedit.eval_scripts.lpip_score --im_path output/eval/image/age

Writes a line per image; case_number is its seed."""

from my_dataset.images import load_rgb
from recipes.pairedit.eval_scripts.evaluate import find_items, lpips_to_first
from utils import metrics
from utils.parse import make_parser, run_main
from utils.score import write_csv

SIDE_PX = 64


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--im_path", required=True, help="folder of generated images")
    parser.add_argument("--lpips_backbone", help="file of AlexNet weights; default: torch's cache")
    parser.add_argument("--output", default="lpips_score.csv", help="the table")
    return parser.parse_args(argv)


def main(args):
    backbone = metrics.find_backbone(args.lpips_backbone)
    if not backbone.is_file():
        raise ValueError(f"LPIPS needs torchvision's AlexNet: put it at {backbone}, or name it by --lpips_backbone")
    items = find_items(args.im_path)
    lpips = metrics.lpips_model(backbone)
    rows = []
    for item, paths in items.items():
        distances = lpips_to_first(lpips, [load_rgb(path) for path in (paths[0], *paths.values())], SIDE_PX)[1:]
        rows += [item.slider._asdict() | {"case_number": item.seed, "scale": scale, "lpips": distance}
                 for scale, distance in zip(paths, distances, strict=True)]
    write_csv(args.output, rows)
    print(f"LPIPS: {args.output}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

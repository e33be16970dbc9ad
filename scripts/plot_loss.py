"""Curves of one or several trainings, from the metrics.jsonl that every run writes:

    python -m scripts.plot_loss --runs outputs/a outputs/b --output curves.png --smooth 10

The first panel has the losses, the next two what validation measured: PSNR, and what lies about 0 to 1; then come the
seconds of a step, and those of them spent waiting for data. A number that was not finite is a gap."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.parse import check_least, make_parser, read_metrics, run_main

PANELS = ("training", "validation, dB", "validation", "seconds", "memory, GiB")
BY_DEFAULT = ("loss/", "train/", "validation/", "seconds_per_step", "data_seconds_per_step")


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="+", required=True, help="output folders of trainings, or their metrics.jsonl files")
    add("--keys", nargs="+", help="what to draw, such as loss/flow validation/psnr; default: losses, "
        "validation and seconds; there are also lr, gradient_norm and memory_gib")
    add("--smooth", type=int, default=1, help="draw losses as the mean of up to so many reports up to each")
    add("--log", action="store_true", help="logarithmic axis for the losses")
    add("--output", default="loss.png", help="picture; its extension names the format (png, svg, pdf)")
    args = parser.parse_args(argv)
    check_least(args, smooth=1)
    if Path(args.output).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--output {args.output}: must end in .png, .svg or .pdf")
    return args


def read_run(path):
    """{key: (steps, values)} of a run, float arrays; values that were not finite are NaN. ValueError naming a file that
    holds no reports; a last line that a kill has cut is left out."""
    path = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"--runs {path}: no such file; name the --output_dir of a training")
    curves = {}
    try:
        rows = [(row.pop("step"), row) for row in read_metrics(path)]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: no reports of a training ({error!r})") from error
    for step, row in rows:
        for key, value in row.items():
            points = curves.setdefault(key, ([], []))
            points[0].append(step)
            points[1].append(np.nan if value is None else value)
    return {key: (np.array(steps, float), np.array(values, float)) for key, (steps, values) in curves.items()}


def smoothed(values, count):
    """The mean of up to `count` values up to each, (N,); NaN counts for nothing and stays NaN itself."""
    known = ~np.isnan(values)
    sums, counts = (np.cumsum(np.concatenate([np.zeros(count), part])) for part in (np.where(known, values, 0), known))
    means = (sums[count:] - sums[:-count]) / np.maximum(counts[count:] - counts[:-count], 1)
    return np.where(known, means, np.nan)


def panel_of(key):
    if key.startswith("validation/"):
        return "validation, dB" if "psnr" in key else "validation"
    return "seconds" if key.endswith("seconds_per_step") else "memory, GiB" if key == "memory_gib" else "training"


def draw(runs, keys, smooth, log):
    """A figure of {run: {key: (steps, values)}}: those of PANELS that have something to draw. Colours tell keys apart,
    line styles runs."""
    panels = [panel for panel in PANELS if any(panel_of(key) == panel for key in keys)]
    figure = Figure(figsize=(9, 4 * len(panels)), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        drawn = [key for key in keys if panel_of(key) == panel]
        for style, (name, curves) in zip(np.resize(["-", "--", ":", "-."], len(runs)), runs.items(), strict=True):
            for colour, key in enumerate(drawn):
                if key not in curves:
                    continue
                steps, values = curves[key]
                values = smoothed(values, smooth) if panel == "training" else values
                axes.plot(steps, values, style, color=f"C{colour}", label=key if len(runs) == 1 else f"{name}: {key}",
                          marker="." if panel.startswith("validation") else None)
        axes.set(xlabel="step", title=panel, yscale="log" if log and panel == "training" else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def main(args):
    names = [Path(run).name if Path(run).is_dir() else Path(run).parent.name for run in args.runs]
    names = names if len(set(names)) == len(names) else args.runs
    runs = {name: read_run(run) for name, run in zip(names, args.runs, strict=True)}
    known = list(dict.fromkeys(key for curves in runs.values() for key in curves))
    keys = args.keys or [key for key in known if key.startswith(BY_DEFAULT)]
    if not keys or set(keys) - set(known):
        raise ValueError(f"--keys {' '.join(sorted(set(keys) - set(known)))}: these runs have "
                         f"{', '.join(known) or 'no reports yet'}")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    draw(runs, keys, args.smooth, args.log).savefig(args.output, dpi=120)
    print(f"{len(keys)} curves of {len(runs)} runs: {args.output}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))

"""Charts of what sampling gives: quality over sampling steps, and over the seconds that they take."""

from matplotlib.figure import Figure


def draw_sampling(lines, levels, unit):
    """Figure of {label: [(steps, seconds, mean, lo, hi)]}: over steps, with intervals, and over seconds an image where
    there are any (else None). levels: {label: value} without steps, drawn dashed. unit: what is drawn."""
    timed = all(point[1] is not None for points in lines.values() for point in points)
    figure = Figure(figsize=(6.5 * (1 + timed), 5), layout="constrained")
    axes = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
    for colour, (label, points) in enumerate(lines.items()):
        steps, seconds, means, lows, highs = zip(*sorted(points), strict=True)
        style = {"color": f"C{colour % 10}", "marker": "os^Dv<>P"[colour // 10 % 8], "label": label}
        errors = [mean - low for mean, low in zip(means, lows, strict=True)], [
            high - mean for mean, high in zip(means, highs, strict=True)]
        axes[0].errorbar(steps, means, errors, capsize=3, **style)
        if timed:
            axes[1].plot(seconds, means, **style)
    ticks = sorted({point[0] for points in lines.values() for point in points})
    axes[0].set(xlabel="sampling steps", ylabel=unit, xscale="log")
    axes[0].set_xticks(ticks, ticks, minor=False)
    axes[0].minorticks_off()
    if timed:
        axes[1].set(xlabel="seconds an image", xlim=(0, None))
    for panel in axes:
        for value in levels.values():
            panel.axhline(value, linestyle="--", color="gray")
        panel.grid(alpha=0.3)
    for label, value in levels.items():
        axes[0].annotate(label, (0.01, value), xycoords=("axes fraction", "data"), va="bottom", fontsize="x-small")
    axes[0].legend(fontsize="x-small")
    return figure

"""The figure of the ranking study (bench/ranking.py), in the style of the report's figures."""

import matplotlib
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from reports.figures import BEST, GREY, PALE, RANDOM, STYLE, millions, save_figure


def draw_ranking(candidates, taus, folder):
    """Draws top-1 and taus into folder/ranking.svg and .png; returns the SVG.

    `candidates` have flops, supernet and standalone (top-1 in percent, a list over seeds); `taus` are
    {name: {"tau", "interval"}}.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_accuracies(figure, left, candidates)
        _draw_taus(right, taus)
        return save_figure("ranking", figure, {"candidates": list(map(_describe, candidates))}, folder)


def _draw_accuracies(figure, axes, candidates):
    """Top-1 after retraining against top-1 in the supernet: mean and range over seeds, coloured by FLOPs."""
    x, standalone = [c["supernet"] for c in candidates], [c["standalone"] for c in candidates]
    axes.vlines(x, list(map(min, standalone)), list(map(max, standalone)), color=PALE, linewidth=1)
    points = axes.scatter(
        x,
        [sum(values) / len(values) for values in standalone],
        30,
        [c["flops"] / 1e6 for c in candidates],
        cmap=ListedColormap(matplotlib.colormaps["Blues"]([0.3 + 0.7 * i / 255 for i in range(256)])),
        edgecolors="white",
        linewidths=0.4,
        gid="candidates",
        zorder=2,
    )
    axes.set(xlabel="top-1 in the supernet (%)", ylabel="top-1 trained from scratch (%)")
    axes.set_title("(a) Candidates; bars: the seeds' range")
    bar = figure.colorbar(points, ax=axes, label="FLOPs (millions of multiply-adds)", pad=0.015, aspect=30)
    bar.outline.set_visible(False)


def _draw_taus(axes, taus):
    """Kendall's taus and their intervals, a row each; the first is the supernet's, the last the ceiling."""
    for y, row in enumerate(taus.values()):
        colour = {0: BEST, len(taus) - 1: RANDOM}.get(y, GREY)
        axes.plot(row["interval"], [y, y], color=colour, linewidth=1.4)
        axes.plot(row["tau"], y, "o", color=colour, markersize=5, gid=f"tau-{y}")
        axes.text(row["tau"], y - 0.16, f"{row['tau']:.2f}", ha="center", color=colour)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(taus)), taus)
    axes.set_ylim(len(taus) - 0.5, -0.7)
    axes.set(xlabel="Kendall's tau with top-1 trained from scratch", title="(b) Rank agreement, 95% intervals")


def _describe(candidate):
    standalone = ", ".join(f"{value:.2f}" for value in candidate["standalone"])
    return f"{millions(candidate['flops'])} FLOPs: {candidate['supernet']:.2f} % in the supernet, {standalone} % alone"

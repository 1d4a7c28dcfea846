"""The figures of a search's report, drawn by matplotlib, as SVG and PNG.

In every SVG text stays text, and the marks of candidates, generations, shares and blocks are in groups with ids:
#candidates in plane.svg has those of the candidates in the FLOPs-accuracy plane.
"""

import io
import itertools
import statistics

import matplotlib
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from space.limits import milliseconds, shown
from utils import atomic_write

INK = "#222222"
GREY = "#767676"
PALE = "#b8b8b8"
BEST = "#0b4f8a"
MEAN = "#4c9bd4"
RANDOM = "#b35806"
LIMIT = "#8c2d04"
# Blues by kernel size, and orange for the other unit: distinct with every form of colour vision, and in greyscale.
OPERATIONS = {
    "shufflenet_3x3": ("ShuffleNet 3x3", "3", "#bfdcf0", INK, 0.42),
    "shufflenet_5x5": ("ShuffleNet 5x5", "5", "#3a87c0", "white", 0.60),
    "shufflenet_7x7": ("ShuffleNet 7x7", "7", "#0b4f8a", "white", 0.78),
    "xception_3x3": ("Xception 3x3", "X", "#f0a03c", INK, 0.60),
}  # name: (label, short label, colour, colour of text on it, height of its box)
OTHERS = ("#7f9f6b", "#c9b26b", "#a487b5", "#8c8c8c", "#5f9ea0", "#b07a6a", "#d4a5a5")  # colours of other operations
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "figures",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#ececec",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
}


def draw(search, random, folder):
    """Draws all figures of a `SearchResults` and its `RandomSearch` into a folder; returns {name: SVG in bytes}."""
    with matplotlib.rc_context(STYLE):
        figures = {
            "generations": _generations(search, random),
            "plane": _plane(search, search.main_cost, search.front(), gid="front", label="Pareto front"),
            "operations": _operations(search),
            "best": _best(search),
        }
        for cost in (name for name in search.objectives if name != "acc1"):
            members = sorted((r for _, r in search.family()), key=_axis(search, cost)[1])
            figures[f"front-{cost}"] = _plane(search, cost, members, gid="members", label="the front")
        return {name: save_figure(name, figure, folder) for name, figure in figures.items()}


def save_figure(name, figure, folder):
    """Writes folder/name.svg and .png; returns the SVG."""
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # keeps the layout of the SVG
    png = io.BytesIO()
    figure.savefig(png, format="png", facecolor="white", dpi=200)
    for kind, drawn in (("svg", svg), ("png", png)):
        with atomic_write(folder / f"{name}.{kind}", "wb") as file:
            file.write(drawn.getvalue())
    return svg.getvalue()


def _generations(search, random):
    """Left: best, mean and spread by generation. Right: best so far and random search, by evaluated candidates."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    what = "loss" if search.by_loss else "top-1"
    shown = [g for g in search.generations if g.succeeded]
    values = [[search.as_read(search.score(r)) for r in g.succeeded] for g in shown]
    x = [g.number + _jitter(i) for g in shown for i in range(len(g.succeeded))]
    left.scatter(x, [*itertools.chain(*values)], 9, PALE, linewidths=0, gid="candidates", label="a candidate")
    numbers = [g.number for g in shown]
    means = [statistics.fmean(each) for each in values]
    spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
    left.errorbar(numbers, means, spread, color=MEAN, capsize=3, linestyle="none", label="± 1 standard deviation")
    left.plot(numbers, means, "o-", color=MEAN, markersize=4, gid="mean", label="mean")
    best = [search.as_read(search.score(g.best)) for g in shown]
    left.plot(numbers, best, "s-", color=BEST, markersize=4, gid="best", label="best")
    unit = "nats, lower is better" if search.by_loss else "%"
    left.set(
        xlabel="generation", ylabel=f"{what} in the supernet ({unit})", title=f"(a) {what.capitalize()} by generation"
    )
    if search.by_loss:
        left.invert_yaxis()
    left.set_xlim(0.4, search.generations[-1].number + 0.6)
    left.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.16), ncols=2)

    n, best = zip(*search.best_so_far())
    right.plot(n, best, "s", color=BEST, markersize=4, gid="so-far", label="this search")
    right.plot(n, best, color=BEST, drawstyle="steps-post")
    if random.measured:
        n = range(1, len(random.measured) + 1)
        label = f"random search (from {random.size} candidates)"
        right.plot(n, random.measured, "--", color=RANDOM, gid="random", label=label)
    if random.extrapolated:
        n, values, low, high = zip(*random.extrapolated)
        right.fill_between(n, low, high, color=RANDOM, alpha=0.13, linewidth=0)
        right.plot(n, values, ":", color=RANDOM, gid="random-extrapolated", label="extrapolated, not measured")
    right.set(xlabel="candidates evaluated", title="(b) Best so far, same budget")
    right.set_xlim(0, len(search.succeeded) * 1.04)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.tick_params(labelleft=True)
    right.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.16), ncols=1)
    return figure


def _jitter(i):
    """Spreads the candidates of a generation evenly over ±0.28, in reproducible steps of the golden ratio."""
    return (i * 0.618034 % 1 - 0.5) * 0.56


def _axis(search, cost):
    """(label of an axis of a cost, function from a result to its place on it, what a unit of the axis is)."""
    if cost == "latency":
        return f"predicted latency (ms, {search.settings['latency']['runtime']})", lambda r: r["latency_ms"], 1e6
    if cost in search.own:
        unit = search.own[cost].unit
        return f"{cost} ({unit})" if unit else cost, lambda r: r[cost], search.own[cost].scale
    if cost == "flops":
        return "FLOPs (millions of multiply-adds)", lambda r: r["flops"] / 1e6, 1e6
    unit, words = (1e6, "millions") if max(search.cost(cost, r) for r in search.results) >= 1e6 else (1e3, "thousands")
    return f"parameters ({words})", lambda r: search.cost(cost, r) / unit, unit


def _draw_limits(axes, search, cost, unit):
    """Draws the limits on a cost as vertical lines; returns their places."""
    low, high = search.bounds.get(cost, (None, None))
    limits = [(gid, limit) for gid, limit in (("limit", high), ("lower-limit", low)) if limit is not None]
    for gid, limit in limits:
        label = f"limit, {shown(cost, limit, search.own)}"
        axes.axvline(limit / unit, color=LIMIT, linestyle="--", linewidth=1.2, gid=gid, label=label)
    return [limit / unit for _, limit in limits]


def _plane(search, cost, circled, **drawn):
    """Every candidate by a cost and top-1, those `circled` joined, and the limits; failed ones at the lower edge.

    `drawn` has the gid and label of the circles.
    """
    figure = Figure(figsize=(9, 4.3), layout="constrained")
    axes = figure.subplots()
    last = search.generations[-1].number
    shades = matplotlib.colormaps["Blues"]([0.3 + 0.7 * i / max(last - 1, 1) for i in range(last)])
    size = 26 if len(search.succeeded) < 300 else 14
    label, place, unit = _axis(search, cost)

    def scatter(results, *look, **how):
        return axes.scatter([place(r) for r in results], [r["acc1"] for r in results], *look, **how)

    numbers = [r["generation"] for r in search.succeeded]
    points = scatter(search.succeeded, size, numbers, cmap=ListedColormap(shades), vmin=0.5, vmax=last + 0.5,
                     edgecolors="white", linewidths=0.4, gid="candidates")  # fmt: skip
    ends = [place(r) for r in circled], [r["acc1"] for r in circled]
    axes.plot(*ends, color=INK, linewidth=1, drawstyle="steps-post", zorder=1.5)
    scatter(circled, 2.6 * size, "none", edgecolors=INK, linewidths=1, **drawn)
    limits = _draw_limits(axes, search, cost, unit)
    if beyond := [r for r in search.succeeded if search.is_beyond(r)]:
        text = "beyond the limit, after measurements"
        scatter(beyond, 3 * size, "none", marker="s", edgecolors=LIMIT, linewidths=1, gid="beyond", label=text)
    largest = [r for r in [search.largest] if r and r["acc1"] is not None]
    if largest:
        scatter(largest, 3 * size, "none", marker="D", edgecolors=RANDOM, gid="largest", label="the largest legal one")
    if failed := [{**r, "acc1": 0.02} for r in search.results if r["acc1"] is None]:
        edge = axes.get_xaxis_transform()
        text = "failed (no accuracy)"
        scatter(failed, 22, LIMIT, marker="x", linewidths=1.1, gid="failed", label=text, transform=edge)
    axes.set(xlabel=label, ylabel="top-1 in the supernet (%)")
    costs = [place(r) for r in [*search.results, *largest]] + limits
    margin = 0.03 * (max(costs) - min(costs)) or 1
    axes.set_xlim(min(costs) - margin, max(costs) + margin)
    axes.margins(y=0.09)
    axes.legend(loc="upper left", ncols=4, bbox_to_anchor=(0, 1.1), borderaxespad=0)
    bar = figure.colorbar(points, label="generation", pad=0.015, aspect=30)
    bar.locator = MaxNLocator(integer=True, min_n_ticks=1)
    bar.outline.set_visible(False)
    return figure


def _look(space, name):
    """How an operation is drawn, as in OPERATIONS; an own one is named by its first letter."""
    others = [operation for operation in space.operations if operation not in OPERATIONS]
    if name not in others:
        return OPERATIONS[name]
    return name, name[0].upper(), OTHERS[others.index(name) % len(OTHERS)], INK, 0.60


def _operations(search):
    """Shares of the operations by block: among all candidates and the last generation, then of each by generation."""
    blocks = search.space.n_blocks
    operations = search.space.operations
    generations = search.generations
    labels = [_look(search.space, op)[0] for op in operations]
    rows = -(-len(operations) // 2)
    tall = min(max(0.17 * len(generations), 0.35), 3.2)
    figure = Figure(figsize=(9, 1.9 + rows * (tall + 0.62)), layout="constrained")
    grid = figure.subplots(1 + rows, 2, squeeze=False, sharex=True, height_ratios=[0.8, *[tall] * rows])

    def heat(axes, gid, shares, title):
        mesh = axes.pcolormesh(
            [0.5 + i for i in range(blocks + 1)], [0.5 + i for i in range(len(shares) + 1)], shares,
            cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.6, gid=gid,
        )  # fmt: skip
        for end in _stage_ends(search.space):
            axes.axvline(end + 0.5, color=GREY, linewidth=0.8)
        axes.set_title(title)
        axes.set_ylim(len(shares) + 0.5, 0.5)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return mesh

    last = generations[-1]
    for axes, gid, results, title in (
        (grid[0, 0], "all", search.results, f"All {len(search.results):,} candidates"),
        (grid[0, 1], "last", last.results, f"Generation {last.number}{'' if last.closed else ', not finished'}"),
    ):
        heat(axes, gid, [search.shares(results, i) for i in range(len(operations))], title)
    grid[0, 0].set_yticks(range(1, len(labels) + 1), labels)
    grid[0, 1].set_yticks([])
    for i, axes in enumerate(grid[1:].flat):
        if i >= len(operations):
            axes.set_visible(False)
            continue
        mesh = heat(axes, operations[i], [search.shares(g.results, i) for g in generations], labels[i])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if i % 2 == 0:
            axes.set_ylabel("generation")
    for axes in grid[-1]:
        axes.set_xlabel("block")
    figure.colorbar(
        mesh, ax=grid, label="share of candidates", format=PercentFormatter(1, 0), aspect=40, pad=0.015
    ).outline.set_visible(False)
    return figure


# --- the best as paths ---------------------------------------------------------------------------------------

COLUMN = 0.82  # inches of a column of numbers beside the paths
LEFT = 34  # points of what is left of the first block


def _best(search):
    """The best candidates as paths, a row each: a box for each block, with colour and height by operation."""
    best = search.legal[:10]
    space = search.space
    looks = {operation: _look(space, operation) for operation in space.operations}
    ends = _stage_ends(space)
    x = [i + 0.45 * sum(i >= end for end in ends) for i in range(space.n_blocks)]
    columns = _columns(search, best)
    beside = COLUMN * len(columns)
    span = max(x[-1] + 1.4, 14)
    unit = (72 * (9 - beside) - LEFT) / span  # points from one block to the next
    top = -1.4 - 0.6 * -(-len(looks) // 4)  # above the first row: names of the columns and the legend
    figure = Figure(figsize=(9, 0.36 * (len(best) + 0.1 - top)))
    paths, numbers = figure.subplots(1, 2, sharey=True, width_ratios=(9 - beside, beside))
    figure.subplots_adjust(left=0, right=0.995, bottom=0, top=1, wspace=0)
    paths.set(xlim=(-LEFT / unit, span), ylim=(len(best) + 0.1, top))
    numbers.set_xlim(0, len(columns))
    handles = [Patch(color=colour, label=f"{label}: {short}") for label, short, colour, *_ in looks.values()]
    paths.legend(handles=handles, loc="upper left", ncols=4)
    for axes in (paths, numbers):
        axes.axis("off")

    for begin, end in zip([0, *ends], [*ends, space.n_blocks]):
        text = f"{space.blocks[begin].out_channels} ch\n{space.blocks[begin].out_size} px"
        paths.text((x[begin] + x[end - 1] + 0.9) / 2, -0.35, text, ha="center", color=GREY, fontsize=8)
    paths.text(-20 / unit, -0.35, "rank", ha="center", color=GREY, fontsize=8)
    for rank, result in enumerate(best, 1):
        y = rank - 0.5
        paths.plot([-9 / unit, x[-1] + 1.4], [y, y], color=PALE, linewidth=1.5, zorder=0)
        text, colour = (f"{rank}*", LIMIT) if search.is_beyond(result) else (str(rank), INK)
        paths.text(-20 / unit, y, text, ha="center", va="center_baseline", color=colour)
        for block, (operation, scale) in enumerate(space.chosen(result["architecture"])):
            _, short, colour, on, height = looks[operation]
            width = 0.3 + 0.6 * scale / max(space.widths)
            corner = x[block] + (0.9 - width) / 2, y - height / 2
            shape = "round,pad=0,rounding_size=0.12"
            box = FancyBboxPatch(corner, width, height, boxstyle=shape, facecolor=colour, edgecolor="none")
            paths.add_patch(box).set_gid(f"path-{rank}-block-{block + 1}")
            size = 7.5 * min(1, unit / 17)
            paths.text(x[block] + 0.45, y, short, ha="center", va="center_baseline", color=on, fontsize=size)
    for right, (name, values) in enumerate(columns.items(), 1):
        numbers.text(right, -0.35, name, ha="right", color=GREY, fontsize=8)
        for row, value in enumerate(values):
            weight = "normal" if row else "bold"
            numbers.text(right, row + 0.5, value, ha="right", va="center_baseline", weight=weight)
    return figure


def _columns(search, best):
    """{name: texts of the best} of the columns beside their paths."""
    columns = {
        "top-1 %": [f"{r['acc1']:.2f}" for r in best],
        "FLOPs": [shown("flops", r["flops"]) for r in best],
        "params": [shown("params", search.cost("params", r)) for r in best],
    }
    if "latency_ms" in best[0]:
        columns["predicted ms"] = [milliseconds(r["latency_ms"]) for r in best]
    if any(measured := [search.measured_text(r) for r in best]):
        columns["measured ms"] = measured
    for name, head in search.own_heads.items():
        columns[head] = [f"{r[name]:.4g}" for r in best]
    return columns | {"generation": [str(r["generation"]) for r in best]}


def _stage_ends(space):
    """Blocks before each stage but the first."""
    return [sum(space.stage_blocks[:i]) for i in range(1, len(space.stage_blocks))]

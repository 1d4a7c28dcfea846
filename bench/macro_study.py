"""Where a supernet loses its agreement with NAS-Bench-Macro, and which networks it overrates.

    python bench/macro_study.py --committed     by bench/results/macro.json, in seconds
    python bench/macro_study.py                 by the supernets of bench/macro.py, too

The first says how far one training of the truth agrees with the mean of the other two, how far two supernets agree, and
by which operations they misjudge networks. The second measures 600 fixed networks, image by image, in both supernets
side by side, a core each, and keeps a measurement when it ends. It says the same by the loss, how many images a score
needs, and what scores that need no other training are worth: more images, the mean over the encodings of a network
(those that differ in where identities stand), and the mean of the last checkpoints' weights. Writes
bench/results/macro_study.json and macro_study.png, and prints the tables of docs/experiments.md.
"""

import argparse
import itertools
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import utils

# isort: split
import macro
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import kendalltau, rankdata, sem, spearmanr

from reports.figures import BEST, GREY, MEAN, RANDOM, STYLE
from space.weight_files import load
from training.evaluation import update_bn
from training.prefix_tree import PrefixTree

RESULTS = ROOT / "bench" / "results" / "macro_study.json"
NETWORKS = 600
SIZES = (500, 1000, 2000)  # images of a score
DRAWS = 10  # of these images
MEANS = ((4, 500), (2, 1000), (4, 1000), (4, 2000))  # checkpoints whose weights are averaged, and steps between them
OPERATIONS = ("identity", "kernel 3, expansion 3", "kernel 5, expansion 6")
COLOURS = (RANDOM, MEAN, BEST)


# --- measurements ---------------------------------------------------------------------------------------------


def encodings(networks):
    """{network: its encodings}, the network itself first."""
    groups = {network: [network] for network in networks}
    for encoding in macro.load_truth():
        if encoding not in groups and (network := macro.distinct(encoding)) in groups:
            groups[network].append(encoding)
    return groups


def image_by_image(supernet, networks, calibration, validation, bn):
    """Array (2, networks, images) after BN calibration: the loss of each image, and whether it is right in top-1."""
    found = {tuple(map(int, network)): [] for network in networks}
    tree = PrefixTree(supernet, list(found))
    with torch.inference_mode(), tree.own_statistics():
        update_bn(supernet, tree.forward, calibration, bn)
        for images, labels in validation:
            for candidate, logits in tree.logits(images):
                losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
                found[candidate].append(torch.stack((losses, logits.argmax(1) == labels)))
    return torch.stack([torch.cat(batches, 1) for batches in found.values()], 1).cpu().numpy()


def mean_weights(supernet, files):
    """Gives a supernet the mean weights of checkpoints."""
    weights = [load(file, "supernet").weights for file in files]
    with torch.no_grad():
        for name, parameter in supernet.named_parameters():
            parameter.copy_(torch.stack([w[name] for w in weights]).mean(0))


def parts(folder, networks):
    """{name: (networks, steps of the checkpoints, split, every)} of what is measured in a folder; files say name."""
    steps = list(macro.checkpoints(folder))
    every_encoding = [encoding for group in encodings(networks).values() for encoding in group]
    found = {"last": (every_encoding, steps[-1:], "search", 1), "val": (networks, steps[-1:], "val", 5)}
    for n, apart in MEANS:
        wanted = [steps[-1] - i * apart for i in range(n)]
        if set(wanted) <= set(steps):
            found[f"mean weights of {n}, {apart} steps apart"] = (networks, wanted, "search", 1)
    return found


def file_of(folder, name, networks):
    return folder / "study" / f"{name.replace(' ', '-').replace(',', '')}-{len(networks)}.npy"


def measure(folder, networks, open_checkpoint=macro.open_checkpoint):
    """Measures all parts that the folder lacks; `open_checkpoint` is called as that of bench/macro.py."""
    files = macro.checkpoints(folder)
    for name, (some, steps, split, every) in parts(folder, networks).items():
        path = file_of(folder, name, networks)
        if path.exists():
            continue
        supernet, *batches, bn = open_checkpoint(folder, files[steps[0]], every, split)
        mean_weights(supernet, [files[step] for step in steps])
        values = image_by_image(supernet, some, *batches, bn)
        path.parent.mkdir(exist_ok=True)
        with utils.atomic_write(path, "wb") as file:
            np.save(file, values)


# --- statistics -----------------------------------------------------------------------------------------------


def tau(a, b):
    return float(kendalltau(a, b).statistic)


def truth_agreement(truth):
    """Tau of one training of the truth with the mean of the other two, over the distinct networks; mean of three."""
    runs = np.array([truth[network]["test_acc"] for network in macro.some_distinct()]).T
    return statistics.fmean(tau(runs[i], np.delete(runs, i, 0).mean(0)) for i in range(3))


def by_images(values, true):
    """{images: [tau with the truth, tau of the score with itself on other images]} of scores (seeds, networks, images).

    Means over seeds and DRAWS draws of the images. None where there are no other images.
    """
    rng, total = np.random.default_rng(0), values.shape[2]
    draws, found = [rng.permutation(total) for _ in range(DRAWS)], {}
    for n in (size for size in SIZES if size <= total):
        agreements, itself = [], []
        for seed, draw in itertools.product(values, draws):
            scores = [seed[:, draw[i : i + n]].mean(1) for i in range(0, total - n + 1, n)]
            agreements += [tau(score, true) for score in scores]
            itself += [tau(*pair) for pair in itertools.combinations(scores, 2)]
        found[n] = [statistics.fmean(agreements), statistics.fmean(itself) if itself else None]
    return found


def by_seeds(scores, true):
    """How far the scores (seeds, networks) of two seeds agree, with each other and with the truth.

    "limit" is Spearman's correlation with the truth that the mean of many seeds would have: attenuation, corrected.
    """
    a, b = scores
    alone, both = statistics.fmean(spearmanr(score, true).statistic for score in scores), spearmanr(a, b).statistic
    return {
        "each": [tau(score, true) for score in scores],
        "each other": tau(a, b),
        "mean": tau(a + b, true),
        "spearman": {
            "each": alone,
            "each other": float(both),
            "mean": float(spearmanr(a + b, true).statistic),
            "limit": float(alone / np.sqrt(both)),
        },
    }


def percentiles(values):
    return 100 * (rankdata(values) - 1) / (len(values) - 1)


def stages(network):
    """The operations of a network, a string for each stage."""
    return [network[end - n : end] for end, n in zip(np.cumsum(macro.STAGES), macro.STAGES)]


def errors_by_count(networks, errors):
    """{stage: {operation: {number of its blocks in the stage: [mean rank error, its standard error, networks]}}}.

    And, as "first", the same of the networks whose first block of the stage is that operation.
    """
    found = {}
    for stage, n in enumerate(macro.STAGES):
        for operation, name in enumerate(OPERATIONS):
            here = [stages(network)[stage] for network in networks]
            counts = np.array([ops.count(str(operation)) for ops in here])
            groups = {count: counts == count for count in range(n + 1)}
            groups["first"] = np.array([ops[0] == str(operation) for ops in here])
            found.setdefault(f"stage {stage + 1}", {})[name] = {
                key: [float(errors[some].mean()), float(sem(errors[some])), int(some.sum())]
                for key, some in groups.items()
                if some.sum() > 1
            }
    return found


def counts(networks):
    """(names, array (networks, 13)): a one, and each operation in the first block and in the others of a stage."""
    names, columns = ["all"], [np.ones(len(networks))]
    for stage, operation in itertools.product(range(len(macro.STAGES)), (1, 2)):
        here = [stages(network)[stage] for network in networks]
        names += [f"stage {stage + 1}, {place}, {OPERATIONS[operation]}" for place in ("first", "others")]
        columns += [[ops[0] == str(operation) for ops in here], [ops[1:].count(str(operation)) for ops in here]]
    return names, np.column_stack(columns).astype(float)


def additive(networks, score, true):
    """What each operation in place of identity is worth, in percentile points, in the truth and in the supernet.

    By least squares. "explained" is the share of the variance of truth, score and rank error that these sums explain.
    "tau" on the half of the networks that reports: the score, the score less the errors that the other half predicts,
    and the sums alone, fitted to the truth of the other half. The last two know the truth: no remedies, but what
    a bias that adds up costs.
    """
    names, x = counts(networks)
    values = {"truth": percentiles(true), "supernet": percentiles(score)}
    values["error"] = values["supernet"] - values["truth"]
    fits = {name: np.linalg.lstsq(x, y, rcond=None)[0] for name, y in values.items()}
    fit, report = ([networks.index(n) for n in half] for half in macro.halves(networks).values())
    wrong, sums = (x @ np.linalg.lstsq(x[fit], values[name][fit], rcond=None)[0] for name in ("error", "truth"))
    scores = {"score": values["supernet"], "score, corrected": values["supernet"] - wrong, "sums": sums}
    return {
        "worth": {name: [float(fits[k][i]) for k in values] for i, name in enumerate(names) if i},
        "explained": {k: float(1 - np.var(y - x @ fits[k]) / np.var(y)) for k, y in values.items()},
        "tau": {name: tau(y[report], true[report]) for name, y in scores.items()},
    }


def remedies(measured, networks, true):
    """{score: [[tau, its gain over the first score with its interval] of each half] of each seed}; loss, but top-1.

    `measured` has an array of each name for each seed. The first score is the loss on every second image.
    """
    groups = encodings(networks)
    starts = np.cumsum([0, *map(len, groups.values())])[:-1]
    rows = {}
    for seed in measured:
        losses, hits = seed["last"]
        first = losses[starts]
        scores = {"loss, half the images": -first[:, ::2].mean(1), "top-1, half the images": hits[starts, ::2].mean(1)}
        scores |= {"top-1": hits[starts].mean(1), "loss": -first.mean(1)}
        means = np.add.reduceat(losses.mean(1, dtype=float), starts) / [*map(len, groups.values())]
        scores["loss, mean over encodings"] = -means
        scores |= {f"loss, {name}": -seed[name][0].mean(1) for name in seed if name.startswith("mean")}
        baseline = next(iter(scores.values()))
        for name, score in scores.items():
            rows.setdefault(name, []).append([])
            for half in macro.halves(networks).values():
                some = [networks.index(n) for n in half]
                gain = [0, 0, 0] if score is baseline else macro.agreement([score[some]], true[some], baseline[some])
                rows[name][-1].append([tau(score[some], true[some]), *gain])
    return rows


# --- the report -----------------------------------------------------------------------------------------------


def rounded(value):
    """A result with numbers of three decimals."""
    if isinstance(value, dict):
        return {str(key): rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return round(value, 3) if isinstance(value, float) else value


def where_lost(networks, scores, truth):
    """What is lost between seeds and what both misjudge, of scores (seeds, networks)."""
    true = np.array([truth[network]["mean_acc"] for network in networks])
    errors = percentiles(scores.sum(0)) - percentiles(true)
    return {
        "networks": len(networks),
        "seeds": by_seeds(scores, true),
        "errors": errors_by_count(networks, errors),
        "additive": additive(networks, scores.sum(0), true),
    }


def of_top1():
    """The results of the scores in bench/results/macro.json, of all networks."""
    truth, found = macro.load_truth(), utils.read_json(macro.RESULTS)
    lost = where_lost(found["networks"], np.array(found["scores"]), truth)
    return {"truth": truth_agreement(truth), "lost": {"top-1, bench/macro.py": lost}}


def of_supernets(folders, networks):
    """The results of what was measured in two folders."""
    truth = macro.load_truth()
    true = np.array([truth[network]["mean_acc"] for network in networks])
    names = [name for name in parts(folders[0], networks) if name in parts(folders[1], networks)]
    measured = [{name: np.load(file_of(folder, name, networks)) for name in names} for folder in folders]
    starts = np.cumsum([0, *map(len, encodings(networks).values())])[:-1]
    losses, hits = (np.stack([seed["last"][i][starts] for seed in measured]) for i in (0, 1))
    scores = {"top-1": hits.mean(2, dtype=float), "loss": -losses.mean(2, dtype=float)}
    others = {
        "top-1": [seed["val"][1].mean(1) for seed in measured],
        "loss": [-seed["val"][0].mean(1) for seed in measured],
    }
    return {
        "steps": [max(macro.checkpoints(folder)) for folder in folders],
        "lost": {name: where_lost(networks, values, truth) for name, values in scores.items()},
        "images": {"top-1": by_images(hits, true), "loss": by_images(-losses, true)},
        "other images": {name: statistics.fmean(map(tau, scores[name], others[name])) for name in scores},
        "remedies": remedies(measured, networks, true),
        "losses": (-scores["loss"]).tolist(),
    }  # fmt: skip


def tables(results):
    """Markdown tables; that of errors is by the last score."""
    lines = ["| score | networks | each seed | each other | mean of the two |", "|---|---|---|---|---|"]
    for name, lost in results["lost"].items():
        row, each = lost["seeds"], " and ".join(f"{value:.2f}" for value in lost["seeds"]["each"])
        lines.append(f"| {name} | {lost['networks']:,} | {each} | {row['each other']:.2f} | {row['mean']:.2f} |")
    keys = ["first", *map(str, range(max(macro.STAGES) + 1))]
    lines += ["", "| stage | operation | in the first block | in no block | 1 | 2 | 3 |", f"|{'---|' * 7}"]
    for stage, operations in lost["errors"].items():
        for operation, groups in operations.items():
            cells = (f"{groups[key][0]:+.0f}" if key in groups else "" for key in keys)
            lines.append(f"| {stage.split()[1]} | {operation} | {' | '.join(cells)} |")
    lines += ["", "explained: {truth:.2f} of the truth, {supernet:.2f} of the score, {error:.2f} of the error".format(
        **lost["additive"]["explained"]
    )]  # fmt: skip
    lines.append(f"tau, other half: {', '.join(f'{k} {v:.2f}' for k, v in lost['additive']['tau'].items())}")
    if "images" not in results:
        return "\n".join(lines)
    lines += ["", "| images | top-1: tau with the truth | with itself | loss: tau with the truth | with itself |"]
    lines.append("|---|---|---|---|---|")
    for n in results["images"]["loss"]:
        cells = [f"| {n}"]
        for name, rows in results["images"].items():
            value, itself = rows[n]
            cells.append(f"{value:.2f} | {results['other images'][name] if itself is None else itself:.2f}")
        lines.append(f"{' | '.join(cells)} |")
    lines += ["", "| score | tau, half to choose by | tau, other half | gain, other half |", "|---|---|---|---|"]
    for name, seeds in results["remedies"].items():
        halves = [" and ".join(f"{seed[i][0]:.2f}" for seed in seeds) for i in (0, 1)]
        gains = " and ".join("{:+.2f} ({:+.2f} to {:+.2f})".format(*seed[1][1:]) for seed in seeds)
        lines.append(f"| {name} | {halves[0]} | {halves[1]} | {gains} |")
    return "\n".join(lines)


def draw(results, path):
    """Mean rank errors by operation and stage, and what an operation is worth, in truth and supernets; last score."""
    lost = list(results["lost"].values())[-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        *panels, right = figure.subplots(1, 4, width_ratios=(2, 3, 3, 4))
        for panel in panels[1:]:
            panel.sharey(panels[0])
        for panel, (stage, operations) in zip(panels, lost["errors"].items()):
            for colour, (name, groups) in zip(COLOURS, operations.items()):
                x, rows = zip(*((int(k), row) for k, row in groups.items() if k != "first"))
                means, widths, _ = zip(*rows)
                panel.errorbar(x, means, 1.96 * np.array(widths), fmt="o-", color=colour, markersize=4, label=name)
            panel.axhline(0, color=GREY, linewidth=0.8)
            panel.set(xlabel="blocks of the operation", title=stage, xticks=range(max(x) + 1))
        panels[0].set(ylabel="mean rank error (percentile points)")
        panels[1].legend(loc="lower left")
        for name, (true, found, _) in lost["additive"]["worth"].items():
            stage, place, operation = name.split(", ", 2)
            marker = "s" if place == "first" else "o"
            right.plot(true, found, marker, color=COLOURS[OPERATIONS.index(operation)], markersize=5)
            right.annotate(stage.split()[1], (true, found), (5, 2), textcoords="offset points", fontsize=8)
        right.axline((20, 20), slope=1, color=GREY, linewidth=0.8)
        right.set(xlabel="in the truth (percentile points)", ylabel="in the supernets")
        right.set(title="worth over identity", xlim=(0, None), ylim=(0, None))
        figure.savefig(path, dpi=120, facecolor="white")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [ROOT / "demo" / "macro" / f"0.5-{seed}" for seed in range(2)]
    text = "two folders of bench/macro.py (default: demo/macro/0.5-0 and 0.5-1)"
    parser.add_argument("folders", nargs="*", type=pathlib.Path, default=default, metavar="FOLDER", help=text)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--networks", type=int, default=NETWORKS, help=f"to measure (default: {NETWORKS})")
    parser.add_argument("--committed", action="store_true", help="only what bench/results/macro.json says")
    parser.add_argument("--measure", action="store_true", help="only measure, in one folder")
    return parser.parse_args(argv)


def main(args):
    networks = macro.some_distinct(args.networks)
    if args.measure:
        return measure(*args.folders, networks)
    results = of_top1()
    print(f"one training of the truth and the mean of the other two: a tau of {results['truth']:.3f}\n", flush=True)
    if not args.committed:
        macro.side_by_side([[__file__, folder, "--measure", "--networks", args.networks] for folder in args.folders])
        found = of_supernets(args.folders, networks)
        results |= found | {"lost": results["lost"] | found["lost"]}
    results = rounded(results | {"commit": utils.commit(), "versions": utils.versions()})
    utils.write_json(args.results, results, indent=None)
    draw(results, args.results.with_suffix(".png"))
    print(tables(results))


if __name__ == "__main__":
    main(parse_args())

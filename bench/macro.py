"""How well a supernet ranks networks whose accuracy others measured: `python bench/macro.py`.

NAS-Bench-Macro (Su et al., arXiv 2103.11922) has 8 blocks of 3 operations, and the accuracy on CIFAR-10 of every
network, trained three times. Two of them are the same network if their stages differ in where identities stand: 3,969
networks are distinct. data/make_cifar10.py makes the images.

Trains a supernet of this space with supernet.py for each seed, side by side, a core each; scores every distinct network
on the held-out images, and 100 of them in the checkpoints on the way; an interrupted study resumes. Reports Kendall's
tau of scores, FLOPs and parameters with the published accuracy, and what a search by these scores picks. Other scores
stand beside top-1, for the same supernets: the loss on the same images, the angle by which training turned the
weights of the path (Hu et al., arXiv 2004.13431), and the mean top-1 of the supernets. Writes bench/results/macro.json,
macro.png, and prints the tables of docs/experiments.md.
"""

import argparse
import functools
import json
import lzma
import math
import pathlib
import random
import re
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils

# isort: split
import matplotlib
import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from scipy.stats import bootstrap, kendalltau

import tester
from network import ShuffleNetV2OneShot
from reports.figures import BEST, GREY, MEAN, RANDOM, STYLE
from settings.subjects import Search
from space import own
from space.evolution import Evolution
from training import checkpoint
from training.evaluation import evaluate

SETTINGS = ROOT / "bench" / "macro.yml"
OPERATIONS = ROOT / "bench" / "macro_operations.py"
TRUTH = ROOT / "data" / "nas-bench-macro.json.xz"
RESULTS = ROOT / "bench" / "results" / "macro.json"
STAGES = (2, 3, 3)  # blocks
LIMITS = (35_000_000, 55_000_000, 75_000_000)  # FLOPs
ON_THE_WAY, APART = 100, 2000  # networks scored in the checkpoints before the last, and the steps between these
CHUNK = 500  # networks scored, and saved, together
RESAMPLES = 1000
SEARCHES = 100  # seeds of every search
# 5 populations of 22, with the official shares of parents and children: 110 evaluations
EVOLUTION = {"population": 22, "select": 4, "mutation": 11, "crossover": 11, "mutation_prob": 0.1, "generations": 5}


# --- the truth ------------------------------------------------------------------------------------------------


def load_truth():
    """The published table: {"01201201": {"mean_acc", "std", "test_acc", "params", "flops"}}, a digit for each block."""
    with lzma.open(TRUTH) as file:
        return json.load(file)


def distinct(network):
    """The form of a network whose identities stand last in their stage; the first block of a stage is never one."""
    ends = np.cumsum(STAGES)
    stages = [network[end - n : end] for end, n in zip(ends, STAGES)]
    return "".join(stage[0] + stage[1:].replace("0", "").ljust(len(stage) - 1, "0") for stage in stages)


# --- supernets and their scores -------------------------------------------------------------------------------


def write_settings(folder, args):
    """The settings file of a supernet: those of macro.yml, at a share of its channels."""
    document = yaml.safe_load(SETTINGS.read_text())
    for part in (document["space"]["stem"], document["space"]["last"], *document["space"]["stages"]):
        part["channels"] = int(part["channels"] * args.width)
    document["common"]["data-dir"] = str(args.data_dir.resolve())
    if args.iterations:
        document["supernet"]["iterations"] = args.iterations
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.yml"
    path.write_text(yaml.safe_dump(document))
    return ["--config", path, "--operations", OPERATIONS, "--out", folder, "--threads", args.threads]


def side_by_side(commands):
    """Runs the commands at the same time. Ends this process where one fails."""
    processes = [
        subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL) for command in commands
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit("a part of the study failed; the same command resumes it")


def some_distinct(n=None):
    """Fixed distinct networks, `n` of them or all, in order."""
    networks = sorted({distinct(network) for network in load_truth()})
    return sorted(random.Random(1).sample(networks, n)) if n else networks


def halves(networks):
    """The half of the networks to choose a score by, and the other half."""
    shuffled = random.Random(2).sample(networks, len(networks))
    return {"chosen by": sorted(shuffled[::2]), "reported": sorted(shuffled[1::2])}


def checkpoints(folder):
    """{step: file} of a supernet's folder, in order."""
    files = checkpoint.checkpoints(folder / "checkpoints" / "supernet")
    return {int(re.search(r"\d+", file.stem)[0]): file for file in files}


def open_checkpoint(folder, file, every=1, split="search"):
    """(supernet, calibration batches, batches of each `every`-th image of the split, BN averaging) of a checkpoint."""
    words = ["--config", folder / "settings.yml", "--operations", OPERATIONS, "--checkpoint", file, "--threads", 1]
    args = tester.parse_args([*map(str, words), "--split", split])
    supernet, calibration, validation = tester.open_supernet(args)
    return supernet, calibration, [(images[::every], labels[::every]) for images, labels in validation], args.bn


def score(folder, n_networks, every):
    """Scores networks in checkpoints of a folder; folder/scores.jsonl keeps what is done: top-1 and loss.

    The last checkpoint scores `n_networks` of them (None: all). `every` takes each so many-th held-out image.
    """
    path, networks = folder / "scores.jsonl", some_distinct(n_networks)
    done = {(step, network) for step, scores in read_scores(folder).items() for network in scores}
    files = checkpoints(folder)
    for step, file in reversed(files.items()):
        if step == max(files):
            wanted = networks
        else:
            wanted = [] if step % APART else sorted(random.Random(0).sample(networks, min(ON_THE_WAY, len(networks))))
        wanted = [network for network in wanted if (step, network) not in done]
        if not wanted:
            continue
        supernet, *batches, bn = open_checkpoint(folder, file, every)
        for chunk in (wanted[i : i + CHUNK] for i in range(0, len(wanted), CHUNK)):
            measured = measure(supernet, chunk, *batches, bn)
            with open(path, "a") as lines:
                lines.writelines(f"{json.dumps([step, *row])}\n" for row in measured)


def measure(supernet, networks, calibration, validation, bn):
    """Yields (network, top-1 in percent, mean loss), after BN calibration, of all networks as one tree of prefixes."""
    results = evaluate(supernet, [tuple(map(int, n)) for n in networks], calibration, validation, bn)
    for network, result in zip(networks, results):
        yield network, round(result["acc1"], 3), round(result["loss"], 5)


def read_scores(folder, what=0):
    """{step: {network: score}} of what a folder has scored: top-1 in percent (`what` 0), or the mean loss (1)."""
    path, scores = folder / "scores.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        step, network, *values = json.loads(line)
        scores.setdefault(step, {})[network] = values[what]
    return scores


def angles(folder, networks):
    """{network: angle between initial and trained weights of its path, in radians}; the classifier, which all have, is
    left out."""
    supernet, ckpt = checkpoint.load_supernet(checkpoint.newest(folder / "checkpoints" / "supernet"), None)
    torch.manual_seed(ckpt.content["settings"]["seed"])
    initial = ShuffleNetV2OneShot(space=supernet.space)

    @functools.cache
    def products(key):
        """(initial weights * trained ones, initial squared, trained squared), summed over a part."""
        pairs = zip(*(flat_weights(model.module_of(key)) for model in (initial, supernet)))
        return np.sum([[float(a @ b), float(a @ a), float(b @ b)] for a, b in pairs] or [[0.0] * 3], axis=0)

    def angle(network):
        keys = ("stem", *enumerate(map(int, network)), "head")
        both, before, after = np.sum([products(key) for key in keys], axis=0)
        return math.acos(both / math.sqrt(before * after))

    return {network: angle(network) for network in networks}


def flat_weights(module):
    return [p.detach().double().flatten() for p in module.parameters()]


# --- statistics -----------------------------------------------------------------------------------------------


def agreement(predictors, truth, baseline=None):
    """Kendall's tau with the truth, the mean over `predictors` (a list for each seed), and its 95% bootstrap interval.

    With `baseline`, a list, the paired difference from that one's tau, and its interval. Networks are resampled.
    """

    def statistic(*rows):
        *scores, other, true = rows
        tau = statistics.fmean(kendalltau(score, true).statistic for score in scores)
        return tau if baseline is None else tau - kendalltau(other, true).statistic

    rows = (*predictors, truth if baseline is None else baseline, truth)
    found = bootstrap(
        rows,
        statistic,
        paired=True,
        vectorized=False,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = found.confidence_interval
    return [round(float(value), 3) for value in (statistic(*rows), low, high)]


def rank(networks, scores, truth):
    """The agreement of scores, FLOPs and parameters with the truth over networks, and the paired differences."""
    true = [truth[n]["mean_acc"] for n in networks]
    rows = [[seed[n] for n in networks] for seed in scores]
    flops, params = ([truth[n][name] for n in networks] for name in ("flops", "params"))
    return {
        "networks": len(networks),
        "supernet": agreement(rows, true),
        "FLOPs": agreement([flops], true),
        "parameters": agreement([params], true),
        "minus FLOPs": agreement(rows, true, flops),
        "minus parameters": agreement(rows, true, params),
    }


def other_scores(folders, networks, last, truth):
    """The agreement of other scores with the truth, each on the half of the networks to choose by and on the other."""
    acc1 = [read_scores(folder)[last] for folder in folders]
    loss = [{n: -value for n, value in read_scores(folder, 1)[last].items()} for folder in folders]
    mean = [{n: statistics.fmean(seed[n] for seed in acc1) for n in networks}]
    scores = {"top-1": acc1, "loss": loss, "angle": [angles(folder, networks) for folder in folders]}
    return {
        name: {
            half: agreement([[seed[n] for n in some] for seed in seeds], [truth[n]["mean_acc"] for n in some])
            for half, some in halves(networks).items()
        }
        for name, seeds in (scores | {f"mean top-1 of {len(folders)} supernets": mean}).items()
    }


def picks(limit, scores, losses, truth):
    """[mean true accuracy, mean percentile among legal networks] of what searches under a limit pick by the scores.

    One row is of evolution by the losses, as with `search.py --rank-by loss`.
    """
    legal = [n for n in scores if truth[n]["flops"] <= limit]
    true = {n: truth[n]["mean_acc"] for n in legal}
    ordered = np.sort(list(true.values()))

    def row(chosen):
        percentiles = [100 * np.searchsorted(ordered, true[n]) / (len(legal) - 1) for n in chosen]
        return [round(statistics.fmean(map(true.get, chosen)), 2), round(statistics.fmean(percentiles), 1)]

    by_score, by_loss = scores.get, {n: -loss for n, loss in losses.items()}
    largest = max(legal, key=lambda n: truth[n]["flops"])
    return {
        "evolution": row([evolve(limit, scores, truth, seed) for seed in range(SEARCHES)]),
        "evolution by loss": row([evolve(limit, by_loss, truth, seed) for seed in range(SEARCHES)]),
        "random search": row([max(random.Random(seed).sample(legal, 110), key=by_score) for seed in range(SEARCHES)]),
        "a random legal network": row(legal),
        "the largest legal network": row([largest]),
        "the best legal network": row([max(legal, key=true.get)]),
    }


class Published:
    """Limits on a published cost, a function of a candidate; candidates beyond it are not repaired."""

    def __init__(self, cost, limit):
        self.cost = cost
        self.limit = limit

    def excess(self, candidate):
        return max(0, self.cost(candidate) - self.limit)

    def repair(self, candidate, rng):
        return candidate

    def neighbours(self, candidate, rng):
        return ()


def evolve(limit, scores, truth, seed):
    """The distinct network that an evolution under a FLOPs limit picks by the scores."""

    def name(candidate):
        return "".join(map(str, candidate))

    limits = Published(lambda c: truth[name(c)]["flops"], limit)
    evolution = Evolution((3,) * sum(STAGES), limits, Search(**EVOLUTION), seed)
    while population := evolution.ask():
        evolution.tell({candidate: scores[distinct(name(candidate))] for candidate in population})
    return distinct(name(evolution.best[0]))


# --- the report -----------------------------------------------------------------------------------------------


def summarise(args, folders):
    """The results of all supernets, as bench/results/macro.json has them."""
    truth, runs = load_truth(), [read_scores(folder) for folder in folders]
    last = max(runs[0])
    scores, losses = [run[last] for run in runs], [read_scores(folder, 1)[last] for folder in folders]
    networks = sorted(scores[0])
    regions = {"all": networks}
    for limit in LIMITS:
        legal = [n for n in networks if truth[n]["flops"] <= limit]
        if len(legal) >= 20:
            regions[f"{limit // 10**6}M"] = legal
    searched = () if args.networks else LIMITS  # a search may ask for any network
    logs = [(folder / "checkpoints/supernet/log.jsonl").read_text().splitlines() for folder in folders]
    way = {}
    for step in sorted(set.intersection(*map(set, runs))):  # an interruption left a checkpoint of its own
        some = [n for n in networks if all(n in run[step] for run in runs)]
        true = [truth[n]["mean_acc"] for n in some]
        rows = [[run[step][n] for n in some] for run in runs]
        way[step] = {"tau": agreement(rows, true), "acc1": round(statistics.fmean(map(statistics.fmean, rows)), 2)}
    return {
        "settings": {"width": args.width, "steps": last, "every": args.every},
        "seconds": [round(json.loads(log[-1])["seconds"]) for log in logs],
        "acc1": [[round(f(seed.values()), 2) for f in (statistics.fmean, statistics.stdev)] for seed in scores],
        "rank": {name: rank(some, scores, truth) for name, some in regions.items()},
        "other scores": other_scores(folders, networks, last, truth),
        "way": way,
        "picks": {
            f"{limit // 10**6}M": [picks(limit, *seed, truth) for seed in zip(scores, losses)] for limit in searched
        },
        "networks": networks,
        "scores": [[seed[n] for n in networks] for seed in scores],
        "commit": utils.commit(),
        "versions": utils.versions(),
    }  # fmt: skip


def tables(results):
    """Two Markdown tables: taus, and what searches pick."""
    lines = ["| networks | supernet | FLOPs | parameters | supernet minus FLOPs |", "|---|---|---|---|---|"]
    for name, row in results["rank"].items():
        region = f"all {row['networks']:,}" if name == "all" else f"{row['networks']:,} under {name}"
        cells = (
            "{:.2f} ({:.2f} to {:.2f})".format(*row[k]) for k in ("supernet", "FLOPs", "parameters", "minus FLOPs")
        )
        lines.append(f"| {region} | {' | '.join(cells)} |")
    lines += ["", "| score | tau, half to choose by | tau, other half |", "|---|---|---|"]
    for name, halves in results["other scores"].items():
        cells = ("{:.2f} ({:.2f} to {:.2f})".format(*half) for half in halves.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", table_of_picks(results["picks"])])


def table_of_picks(picks):
    """A Markdown table of the `picks` under each limit, {limit: [picks of each seed]}; empty without any."""
    if not picks:
        return ""
    lines = [f"| picked by | {' | '.join(f'under {name}' for name in picks)} |", f"|{'---|' * (1 + len(picks))}"]
    for picker in next(iter(picks.values()))[0]:
        means = [np.mean([seed[picker] for seed in seeds], axis=0) for seeds in picks.values()]
        lines.append(f"| {picker} | {' | '.join(f'{acc:.2f}%, {percentile:.0f}th' for acc, percentile in means)} |")
    return "\n".join(lines)


def draw(results, path):
    """Tau against steps of training, and supernet top-1 (mean of the seeds) against the truth."""
    truth, way = load_truth(), results["way"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        steps, taus = list(map(int, way)), np.array([row["tau"] for row in way.values()])
        left.fill_between(steps, taus[:, 1], taus[:, 2], color=MEAN, alpha=0.2, linewidth=0)
        left.plot(steps, taus[:, 0], "o-", color=BEST, markersize=4, label="supernet, 95% interval")
        left.axhline(results["rank"]["all"]["FLOPs"][0], color=RANDOM, linestyle="--", label="FLOPs")
        left.set(xlabel="steps of supernet training", ylabel="Kendall's tau with the published accuracy")
        left.set_title("(a) How long to train")
        left.legend(loc="lower right")
        x = np.mean(results["scores"], axis=0)
        y, flops = ([truth[n][name] for n in results["networks"]] for name in ("mean_acc", "flops"))
        points = right.scatter(x, y, 5, np.array(flops) / 1e6, cmap="viridis_r", linewidths=0)
        right.set(xlabel="top-1 in the supernet (%)", ylabel="published top-1 (%)", ylim=(70, 94))
        right.set_title(f"(b) {len(x):,} networks; {sum(acc < 70 for acc in y)} lie below")
        figure.colorbar(points, ax=right, label="FLOPs (millions)", pad=0.015, aspect=30).outline.set_edgecolor(GREY)
        figure.savefig(path, dpi=160, facecolor="white")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=pathlib.Path, default=ROOT / "data" / "cifar10")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "demo" / "macro", help="folder of the supernets")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--width", type=float, default=0.5, help="share of the published channels (default: 0.5)")
    parser.add_argument("--iterations", type=int, help="default: that of bench/macro.yml")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each supernet (default: 1)")
    parser.add_argument("--networks", type=int, help="to score in the last checkpoint (default: all 3,969)")
    every = "score on every Nth held-out image (default: 1)"
    parser.add_argument("--every", type=int, default=1, metavar="N", help=every)
    parser.add_argument("--score", type=pathlib.Path, metavar="FOLDER", help="only score the supernet in a folder")
    return parser.parse_args(argv)


def main(args):
    if args.score:
        return score(args.score, args.networks, args.every)
    folders = [args.out / f"{args.width:g}-{seed}" for seed in range(args.seeds)]
    words = [write_settings(folder, args) for folder in folders]
    side_by_side([[ROOT / "supernet.py", *w, "--seed", seed] for seed, w in enumerate(words)])
    scoring = ["--every", args.every, *(["--networks", args.networks] if args.networks else [])]
    side_by_side([[__file__, "--score", folder, *scoring] for folder in folders])
    own.load(OPERATIONS)
    results = summarise(args, folders)
    utils.write_json(args.results, results, indent=None)
    draw(results, args.results.with_suffix(".png"))
    print(tables(results))


if __name__ == "__main__":
    main(parse_args())

"""How well a supernet ranks networks whose accuracy others measured: `python -m bench.macro`.

NAS-Bench-Macro (Su et al., arXiv 2103.11922) has 8 blocks of 3 operations, and the accuracy on CIFAR-10 of every
network, trained three times. Two of them are the same network if their stages differ in where identities stand: 3,969
networks are distinct. data/make_cifar10.py makes the images.

Trains a supernet of this space with supernet.py for each seed, side by side, a core each; scores every distinct network
on the held-out images; an interrupted study resumes. Reports Kendall's tau of scores, FLOPs and parameters with the
published accuracy, and what a search by these scores picks. Writes bench/results/macro.json, and prints the tables of
docs/experiments.md.
"""

import functools
import json
import lzma
import pathlib
import random
import re
import statistics

import numpy as np
import yaml

import tester
import utils
from bench import study
from bench.study import ROOT, agreement, side_by_side
from space import own
from space.custom import make_space
from space.evolution import Evolution
from training import checkpoint
from training.evaluation import evaluate, open_evaluation

SETTINGS = ROOT / "bench" / "macro.yml"
OPERATIONS = ROOT / "bench" / "macro_operations.py"
TRUTH = ROOT / "data" / "nas-bench-macro.json.xz"
RESULTS = study.RESULTS / "macro.json"
LIMITS = (35_000_000, 55_000_000, 75_000_000)  # FLOPs
CHUNK = 500  # networks scored, and saved, together
SEARCHES = 100  # seeds of every search
# 5 populations of 22, with the official shares of parents and children: 110 evaluations
EVOLUTION = {"population": 22, "select": 4, "mutation": 11, "crossover": 11, "mutation_prob": 0.1, "generations": 5}


# --- the truth ------------------------------------------------------------------------------------------------


def load_truth(path=TRUTH):
    """The published table: {"01201201": {"mean_acc", "std", "test_acc", "params", "flops"}}, a digit for each block."""
    with lzma.open(path) as file:
        return json.load(file)


def distinct(network):
    """The form of a network whose identities stand last in their stage; the first block of a stage is never one."""
    return "".join(map(str, full_space().canonical(map(int, network))))


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
    return ["--config", path, "--own", OPERATIONS, "--out", folder, "--threads", args.threads]


def some_distinct(n=None):
    """Fixed distinct networks, `n` of them or all, in order."""
    networks = sorted({distinct(network) for network in load_truth()})
    return sorted(random.Random(1).sample(networks, n)) if n else networks


def score(folder, n_networks, every):
    """Scores `n_networks` (None: all) in the last checkpoint of a folder, on each `every`-th held-out image.

    folder/scores.jsonl keeps what is done: top-1 and loss.
    """
    file = checkpoint.newest(folder / "checkpoints" / "supernet")
    step = int(re.search(r"\d+", file.stem)[0])
    done = read_scores(folder).get(step, ())
    wanted = [network for network in some_distinct(n_networks) if network not in done]
    words = ["--config", folder / "settings.yml", "--own", OPERATIONS, "--checkpoint", file, "--threads", 1]
    args = tester.parse_args([*map(str, words)])
    supernet, calibration, validation = open_evaluation(vars(args))
    validation = [(images[::every], labels[::every]) for images, labels in validation]
    for chunk in (wanted[i : i + CHUNK] for i in range(0, len(wanted), CHUNK)):
        measured = measure(supernet, chunk, calibration, validation, args.bn)
        with open(folder / "scores.jsonl", "a") as lines:
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


# --- statistics -----------------------------------------------------------------------------------------------


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
        "evolution": row([evolve(limit, scores, seed) for seed in range(SEARCHES)]),
        "evolution by loss": row([evolve(limit, by_loss, seed) for seed in range(SEARCHES)]),
        "random search": row([max(random.Random(seed).sample(legal, 110), key=by_score) for seed in range(SEARCHES)]),
        "a random legal network": row(legal),
        "the largest legal network": row([largest]),
        "the best legal network": row([max(legal, key=true.get)]),
    }


@functools.cache
def full_space():
    """The published space."""
    return make_space(str(SETTINGS), own_file=OPERATIONS, input_size=32, n_classes=10)


def evolve(limit, scores, seed):
    """The distinct network that an evolution under a FLOPs limit picks by the scores."""

    def name(candidate):
        return distinct("".join(map(str, candidate)))

    evolution = Evolution.from_settings(full_space(), EVOLUTION | {"flops_limit": limit, "seed": seed})
    while population := evolution.ask():
        evolution.tell({candidate: scores[name(candidate)] for candidate in population})
    return name(evolution.best[0])


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
    return {
        "settings": {"width": args.width, "steps": last, "every": args.every},
        "seconds": [round(json.loads(log[-1])["seconds"]) for log in logs],
        "acc1": [[round(f(seed.values()), 2) for f in (statistics.fmean, statistics.stdev)] for seed in scores],
        "rank": {name: rank(some, scores, truth) for name, some in regions.items()},
        "picks": {
            f"{limit // 10**6}M": [picks(limit, *seed, truth) for seed in zip(scores, losses)] for limit in searched
        },
        "networks": networks,
        "scores": [[seed[n] for n in networks] for seed in scores],
    }  # fmt: skip


def tables(results):
    """Markdown tables: taus, and what searches pick."""
    columns = {"supernet": "supernet", "FLOPs": "FLOPs", "parameters": "parameters",
               "minus FLOPs": "supernet minus FLOPs"}  # fmt: skip
    regions = {"all": "all {:,}"} | {f"{limit // 10**6}M": f"{{:,}} under {limit // 10**6}M" for limit in LIMITS}
    rows = [
        (regions[name].format(row["networks"]), *(study.interval(row[column]) for column in columns))
        for name, row in results["rank"].items()
    ]
    return f"{study.table(('networks', *columns.values()), rows)}\n\n{table_of_picks(results['picks'])}"


def table_of_picks(picks):
    """A Markdown table of the `picks` under each limit, {limit: [picks of each seed]}; empty without any."""
    if not picks:
        return ""
    rows = []
    for picker in next(iter(picks.values()))[0]:
        means = [np.mean([seed[picker] for seed in seeds], axis=0) for seeds in picks.values()]
        rows.append((picker, *(f"{acc:.2f}%, {percentile:.0f}th" for acc, percentile in means)))
    return study.table(("picked by", *(f"under {name}" for name in picks)), rows)


def parse_args(argv=None):
    defaults = {"--data-dir": ROOT / "data" / "cifar10", "--out": ROOT / "demo" / "macro", "--results": RESULTS}
    defaults |= {"--iterations": None, "--seeds": 2, "--threads": 1, "--networks": None}
    parser = study.parser(__doc__, defaults)
    parser.add_argument("--width", type=float, default=0.5, help="share of the published channels (default: 0.5)")
    text = "score on every Nth held-out image (default: 1)"
    parser.add_argument("--every", type=int, default=1, metavar="N", help=text)
    parser.add_argument("--score", type=pathlib.Path, metavar="FOLDER", help="only score the supernet in a folder")
    return parser.parse_args(argv)


def main(args):
    if args.score:
        return score(args.score, args.networks, args.every)
    folders = [args.out / f"{args.width:g}-{seed}" for seed in range(args.seeds)]
    words = {folder: write_settings(folder, args) for folder in folders}
    more = ["--every", args.every, *(["--networks", args.networks] if args.networks else [])]
    trainings = {f"supernet {f.name}": (["supernet.py", *words[f], "--seed", seed], f / "training.txt")
                 for seed, f in enumerate(folders)}  # fmt: skip
    scorings = {f"scores {f.name}": (["-m", "bench.macro", "--score", f, *more], f / "scoring.txt") for f in folders}
    side_by_side(trainings, args.seeds)
    side_by_side(scorings, args.seeds)
    own.load(OPERATIONS)
    results = study.rounded(summarise(args, folders))
    study.write(args.results, results)
    print(tables(results))


if __name__ == "__main__":
    utils.run_script(main, parse_args)

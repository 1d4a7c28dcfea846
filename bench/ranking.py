"""Measures how far the supernet's ranking of candidates can be trusted: `python bench/ranking.py --supernet FILE`.

Candidates of equally spaced FLOPs, from the lowest possible to the highest, are evaluated in the supernet as in a
search (on the held-out images), and trained from scratch as by scratch.py with several seeds, which gives top-1 on
val. Reported is Kendall's tau between the two with its 95% bootstrap interval over candidates; for comparison, the
taus of trivial predictors (FLOPs, parameters, mean depthwise kernel size, an untrained supernet), and as a ceiling
that of one training seed with another. Taus are means over seeds. The verdict is the paired interval of tau(supernet)
- tau(FLOPs).

Every training is written to the results file when it ends, and an interrupted run resumes from there. Images are
decoded once. The recipe is that of demo.yml, or of --config, with warm-up and BN pass shortened in proportion to the
iterations. Writes bench/results/ranking.json, ranking.svg and ranking.png.
"""

import argparse
import bisect
import hashlib
import math
import pathlib
import random
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils

# isort: split
import torch
from rank_correlation import agreement, bootstrap, candidates_needed, interval, resamples
from ranking_figure import draw_ranking

import scratch
import tester
from command_line import count
from dataloader import Loader
from images.dataset import Data, DataConfig, prepare, training_plan
from images.image_cache import FixedBatches, validation_batches
from network import ShuffleNetV2, ShuffleNetV2OneShot
from space.search_space import SearchSpace
from training.evaluation import accuracy, evaluate, open_evaluation, recalibrate_bn, resolve_device
from training.recipe import dropout_seed, learning_rate, parameter_groups
from utils import UserError, read_json, write_json

PREDICTORS = {
    "supernet": "supernet",
    "flops": "FLOPs",
    "params": "parameters",
    "kernel_size": "mean depthwise kernel size",
    "untrained": "untrained supernet",
}
CEILING = "another seed's training"
RATES = 10_000  # resolution of the search for a rate in `_weights`
TRIES = 100_000  # draws for a candidate of given FLOPs


# --- candidates ----------------------------------------------------------------------------------------------


def draw_candidates(space, n, seed=0):
    """One candidate from each of n equal bins of the possible FLOPs, by increasing FLOPs, nearly uniform within a bin.

    Uniform candidates are concentrated in the middle of the range. Here the probability of an operation depends
    exponentially on its cost, with the rate that makes the expected FLOPs the bin's centre; candidates outside the
    bin are rejected. Candidates of equal cost are equally probable at any rate.
    """
    rng, (low, high) = random.Random(seed), space.flops_range
    width = (high - low) / n
    candidates = []
    for i in range(n):
        weights = _weights(space, low + (i + 0.5) * width)
        drawn = (tuple(rng.choices(range(len(row)), row)[0] for row in weights) for _ in range(TRIES))
        candidate = next((c for c in drawn if min(n - 1, int((space.flops(c) - low) / width)) == i), None)
        if candidate is None:
            raise UserError(f"--candidates {n}: none found in bin {i + 1} of {n} of the FLOPs; use fewer")
        candidates.append(candidate)
    return candidates


def _weights(space, target):
    """Weights of the operations of each block, with which the expected FLOPs are `target`."""
    low, high = space.flops_range

    def weights(step):
        rate = (step / RATES - 0.5) * 2000 / (high - low)
        rows = [[rate * (cost - (max(row) if rate > 0 else min(row))) for cost in row] for row in space.choice_flops]
        return [[math.exp(x) for x in row] for row in rows]

    def mean(step):
        rows = zip(weights(step), space.choice_flops)
        return space.fixed_flops + sum(sum(w * c for w, c in zip(*row)) / sum(row[0]) for row in rows)

    return weights(bisect.bisect_left(range(RATES), target, key=mean))


def kernel_size(space, candidate):
    """The mean size of the depthwise kernels in px."""
    with torch.device("meta"):
        modules = ShuffleNetV2(candidate, space=space).modules()
    sizes = [m.kernel_size[0] for m in modules if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
    return sum(sizes) / len(sizes)


# --- measurements --------------------------------------------------------------------------------------------


def in_supernets(args, opened, candidates):
    """Top-1 in percent of the candidates on the held-out images, in the supernet and in an untrained one."""
    supernet, *batches = opened
    torch.manual_seed(0)
    untrained = ShuffleNetV2OneShot(space=supernet.space).to(resolve_device(args), memory_format=torch.channels_last)
    return [
        [result["acc1"] for result in evaluate(model, candidates, *batches, args.bn, amp=args.eval_amp)]
        for model in (supernet, untrained)
    ]


class Trainings:
    """Trains candidates from scratch like scratch.py with `args`, on images that are decoded once for each seed."""

    def __init__(self, args, space):
        self.args, self.space, self.device = args, space, resolve_device(args)
        self.config = DataConfig.from_args(args)
        self.data = Data(args, self.config)
        self.validation = validation_batches(self.data.val, self.config, args, self.device)
        self.batches = {}

    def _decoded(self, seed):
        """Returns [training batches, batches of the BN pass]."""
        if seed not in self.batches:
            args, images = self.args, self.data.train
            loader = Loader(images, self.config, True, seed, self.device, args.loader, args.workers)
            steps = (0, args.iterations), (args.iterations, args.iterations + args.bn_pass)
            plans = [list(training_plan(len(images), args.batch_size, seed, *part)) for part in steps]
            self.batches[seed] = [FixedBatches(loader, plan, args.cache) for plan in plans if plan]
        return self.batches[seed]

    def network(self, candidate, seed):
        """Returns the trained network, after the BN pass."""
        args, (training, *bn_pass) = self.args, self._decoded(seed)
        torch.manual_seed(seed)
        model = ShuffleNetV2(candidate, space=self.space).to(self.device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(
            parameter_groups(model, args.weight_decay), lr=args.lr, momentum=args.momentum, fused=True
        )
        criterion = torch.nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
        for step, (images, labels) in enumerate(training, 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.iterations, args.lr, args.warmup)
            torch.manual_seed(dropout_seed(seed, step))
            loss = criterion(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if not loss.isfinite():
            raise UserError(f"the training of {list(candidate)}, seed {seed}, has no finite loss; lower lr in --config")
        if bn_pass:
            recalibrate_bn(model, model, bn_pass[0], "average")
        return model

    def run(self, candidate, seed):
        """Trains a candidate; returns its top-1 in percent on val."""
        return accuracy(self.network(candidate, seed).eval(), self.validation)[0]


def scratch_args(words, iterations):
    """The flags of scratch.py for a training with another number of iterations than in the settings."""
    args = scratch.parse_args(words)
    share = iterations / args.iterations
    args.warmup, args.bn_pass, args.iterations = round(args.warmup * share), round(args.bn_pass * share), iterations
    return args


# --- the study -----------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--supernet", metavar="FILE", required=True, help="checkpoint of the supernet")
    parser.add_argument("--config", metavar="FILE", help="settings of tester.py and scratch.py (default: demo.yml)")
    parser.add_argument("--candidates", type=count(3, 10_000), default=32, help="number of candidates (default: 32)")
    parser.add_argument("--seeds", type=count(2, 100), default=2, help="trainings of each candidate (default: 2)")
    parser.add_argument("--iterations", type=count(), default=300, help="steps of each training (default: 300)")
    parser.add_argument("--threads", type=count(1, 1024), default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--results", type=pathlib.Path, default=ROOT / "bench" / "results" / "ranking.json", metavar="FILE"
    )
    return parser.parse_args(argv)


def measure(options):
    """Measures what the results file does not hold yet, and returns its content."""
    words = ["--config", options.config] if options.config else ["--demo"]
    words += ["--threads", str(options.threads), "--loader", "torchvision", "--workers", "0"]
    args = scratch_args(words, options.iterations)
    prepare(args)
    settings = {
        key: vars(args)[key]
        for key in ("iterations", "batch_size", "lr", "warmup", "weight_decay", "label_smoothing", "bn_pass")
    }
    settings |= {
        "candidates": options.candidates,
        "seeds": options.seeds,
        "config": options.config and pathlib.Path(options.config).read_text(),
    }
    with open(options.supernet, "rb") as file:
        settings["supernet"] = hashlib.file_digest(file, "sha256").hexdigest()
    results = read_json(options.results) if options.results.exists() else {"settings": settings}
    if odd := sorted(k for k in settings if results["settings"].get(k) != settings[k]):
        raise UserError(
            f"{options.results}: has another {odd[0]}; use the same, remove the file, or choose another --results"
        )

    if "candidates" not in results:
        test_args = tester.parse_args([*words, "--checkpoint", options.supernet])
        opened = open_evaluation(test_args)
        space = opened[0].space
        candidates = draw_candidates(space, options.candidates)
        results["space"] = space.to_dict()
        results["candidates"] = [
            {
                "architecture": list(c),
                "flops": space.flops(c),
                "params": space.params(c),
                "kernel_size": round(kernel_size(space, c), 4),
                "supernet": in_supernet,
                "untrained": untrained,
                "standalone": [],
                "seconds": [],
            }
            for c, in_supernet, untrained in zip(candidates, *in_supernets(test_args, opened, candidates))
        ]
        write_json(options.results, results, indent=1)
    train_all(results, args, options)
    return results


def train_all(results, args, options):
    """Runs all trainings that are not in the results yet, seed by seed."""
    trainings = Trainings(args, SearchSpace.from_dict(results["space"]))
    todo = [(s, row) for s in range(options.seeds) for row in results["candidates"] if len(row["standalone"]) <= s]
    if todo:
        results |= {"commit": utils.commit(), "versions": utils.versions()}
    for i, (seed, row) in enumerate(todo, 1):
        start = time.perf_counter()
        row["standalone"].append(trainings.run(row["architecture"], seed))
        row["seconds"].append(round(time.perf_counter() - start, 2))
        write_json(options.results, results, indent=1)
        measured = f"supernet {row['supernet']:.2f}%, alone {row['standalone'][-1]:.2f}%, {row['seconds'][-1]:.0f} s"
        print(f"training {i} of {len(todo)}: seed {seed}, {row['flops'] / 1e6:.2f}M, {measured}", flush=True)


def summarise(candidates, n_seeds):
    """Returns {predictor: {"tau", "interval", "minus_flops", "minus_flops_interval"}}, the last "ceiling"."""
    truths = list(zip(*(row["standalone"] for row in candidates)))
    counts = resamples(len(candidates))
    values = {name: [row[name] for row in candidates] for name in PREDICTORS}
    drawn = {name: bootstrap(v, truths, counts) for name, v in values.items()}
    summary = {name: {"tau": agreement(v, truths), "interval": interval(drawn[name])} for name, v in values.items()}
    for name, row in summary.items():
        row["minus_flops"] = row["tau"] - summary["flops"]["tau"]
        row["minus_flops_interval"] = interval(drawn[name] - drawn["flops"])
    pairs = [(i, j) for i in range(n_seeds) for j in range(i)]
    between = [bootstrap(truths[i], [truths[j]], counts) for i, j in pairs]
    ceiling = sum(agreement(truths[i], [truths[j]]) for i, j in pairs) / len(pairs)
    summary["ceiling"] = {"tau": ceiling, "interval": interval(sum(between) / len(pairs))}
    return summary


def verdict(summary, n):
    """Puts the paired interval of tau(supernet) - tau(FLOPs) into words."""
    row, ceiling = summary["supernet"], summary["ceiling"]["tau"]
    difference, (low, high) = row["minus_flops"], row["minus_flops_interval"]
    text = f"tau(supernet) - tau(FLOPs) = {difference:+.2f}, 95% interval {low:+.2f} to {high:+.2f}: "
    if low > 0 and summary["supernet"]["interval"][0] > 0:
        return f"{text}the supernet ranks better than FLOPs do."
    if low > 0:
        tau = summary["supernet"]["tau"]
        return f"{text}FLOPs rank the wrong way round, but the supernet's own tau of {tau:+.2f} is not above 0."
    if high < 0:
        return f"{text}the supernet ranks worse than FLOPs do."
    needed = candidates_needed(n, 0.1, low, high)
    text += f"not distinguishable with {n} candidates. A true difference of 0.10 takes about {needed:,} of them"
    if (needed := candidates_needed(n, difference, low, high)) < 10_000:
        text += f", the measured one {needed:,}"
    return f"{text}; longer training raises the ceiling, now {ceiling:.2f}."


def report(results):
    """Prints the table and the verdict."""
    summary = results["summary"]
    spread = [max(row["standalone"]) - min(row["standalone"]) for row in results["candidates"]]
    alone = sorted(sum(row["standalone"]) / len(row["standalone"]) for row in results["candidates"])
    between = f"{sum(spread) / len(spread):.2f} points between seeds on average"
    print(f"\nstand-alone top-1 from {alone[0]:.2f} to {alone[-1]:.2f}%, {between}\n")
    print("| candidates ranked by | tau | 95% interval | minus that of FLOPs | 95% interval |")
    print("|---|---|---|---|---|")
    for name, row in summary.items():
        cells = [PREDICTORS.get(name, CEILING), f"{row['tau']:.2f}", "{:.2f} to {:.2f}".format(*row["interval"])]
        if name in ("flops", "ceiling"):
            cells += ["", ""]
        else:
            cells += [f"{row['minus_flops']:+.2f}", "{:+.2f} to {:+.2f}".format(*row["minus_flops_interval"])]
        print(f"| {' | '.join(cells)} |")
    print(f"\n{results['verdict']}")


def main(options):
    results = measure(options)
    results["summary"] = summarise(results["candidates"], options.seeds)
    results["verdict"] = verdict(results["summary"], options.candidates)
    write_json(options.results, results, indent=1)
    taus = {PREDICTORS.get(name, CEILING): row for name, row in results["summary"].items()}
    draw_ranking(results["candidates"], taus, options.results.parent)
    report(results)


if __name__ == "__main__":
    utils.run_script(main, parse_args)

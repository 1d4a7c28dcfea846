"""How far the supernet's ranking of candidates can be trusted: `python bench/ranking.py --supernet FILE`.

Candidates from the lowest to the highest FLOPs there are, one in each of as many equal steps, are evaluated in the supernet as a
search does (on the held-out images), and trained from scratch as scratch.py does, with as many seeds, which gives top-1 on val.
Kendall's tau between the two is reported with its 95% bootstrap interval over candidates, beside what any claim has to beat (FLOPs,
parameters, mean size of the depthwise kernels, a supernet that was never trained) and the ceiling, one seed's training against
another's. Taus are means over the seeds. The verdict is the paired interval of tau(supernet) - tau(FLOPs).

Every training is written to the results file when it ends: a run that was stopped, by whatever, goes on from there when it is
started again. Images are decoded once. The recipe is that of demo.yml, or --config, with its warm-up and BN pass shortened as the
iterations are. Writes bench/results/ranking.json, and ranking.svg and ranking.png beside it.
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

import scratch
import tester
from command_line import count
from dataloader import Loader
from images.dataset import Data, DataConfig, prepare, training_plan
from images.image_cache import FixedBatches, validation_batches
from network import ShuffleNetV2, ShuffleNetV2OneShot
from reports.figures import draw_ranking
from space.search_space import SearchSpace, operation_convs
from training.evaluation import accuracy, evaluate, open_evaluation, recalibrate_bn, resolve_device
from training.recipe import dropout_seed, learning_rate, parameter_groups
from utils import UserError, read_json, write_json

PREDICTORS = {
    "supernet": "supernet", "flops": "FLOPs", "params": "parameters", "kernel_size": "mean depthwise kernel size",
    "untrained": "untrained supernet",
}  # fmt: skip
CEILING = "another seed's training"
STEPS = 10_000  # of the search for a tilt
TRIES = 100_000  # to draw a candidate of given FLOPs


# --- candidates ----------------------------------------------------------------------------------------------


def draw_candidates(space, n, seed=0):
    """One candidate from each of n equal bins of all FLOPs that are possible, by rising FLOPs, nearly uniform within a bin.

    Uniform candidates hardly leave the middle of the range. Here every operation is drawn with a probability that grows
    exponentially with its cost, at a rate for which the expected FLOPs are the bin's centre, until the candidate is in the bin;
    candidates of the same cost are equally probable at any rate.
    """
    rng, (low, high) = random.Random(seed), space.flops_range
    width = (high - low) / n
    candidates = []
    for i in range(n):
        weights = _weights(space, low + (i + 0.5) * width)
        drawn = (tuple(rng.choices(range(len(row)), row)[0] for row in weights) for _ in range(TRIES))
        candidate = next((c for c in drawn if min(n - 1, int((space.flops(c) - low) / width)) == i), None)
        if candidate is None:
            raise UserError(
                f"--candidates {n}: none found in step {i + 1} of {n} between the lowest and the highest FLOPs; take fewer"
            )
        candidates.append(candidate)
    return candidates


def _weights(space, target):
    """The weight of every operation of every block, with which FLOPs are `target` in the mean."""
    low, high = space.flops_range

    def weights(step):
        rate = (step / STEPS - 0.5) * 2000 / (high - low)
        rows = [[rate * (cost - (max(row) if rate > 0 else min(row))) for cost in row] for row in space.choice_flops]
        return [[math.exp(x) for x in row] for row in rows]

    def mean(step):
        rows = zip(weights(step), space.choice_flops)
        return space.fixed_flops + sum(sum(w * c for w, c in zip(*row)) / sum(row[0]) for row in rows)

    return weights(bisect.bisect_left(range(STEPS), target, key=mean))


def kernel_size(space, candidate):
    """The mean size of the depthwise kernels."""
    convs = [
        c for shape, choice in zip(space.blocks, candidate) for c in operation_convs(space.operations[choice], shape)
    ]
    sizes = [c.kernel_size for c in convs if c.groups > 1]
    return sum(sizes) / len(sizes)


# --- measurements --------------------------------------------------------------------------------------------


def in_supernets(args, opened, candidates):
    """Top-1 percent of the candidates on the held-out images, in the supernet and in one with initial weights."""
    supernet, *batches = opened
    torch.manual_seed(0)
    untrained = ShuffleNetV2OneShot(space=supernet.space).to(resolve_device(args), memory_format=torch.channels_last)
    return [
        [result["acc1"] for result in evaluate(model, candidates, *batches, args.bn, amp=args.eval_amp)]
        for model in (supernet, untrained)
    ]


class Trainings:
    """Trains candidates from scratch, as scratch.py does with `args`, on images that are decoded once a seed."""

    def __init__(self, args, space):
        self.args, self.space, self.device = args, space, resolve_device(args)
        self.config = DataConfig.from_args(args)
        self.data = Data(args, self.config)
        self.validation = validation_batches(self.data.val, self.config, args, self.device)
        self.batches = {}

    def _decoded(self, seed):
        """(training batches, batches of the BN pass)."""
        if seed not in self.batches:
            args, images = self.args, self.data.train
            loader = Loader(images, self.config, True, seed, self.device, args.loader, args.workers)
            steps = (0, args.iterations), (args.iterations, args.iterations + args.bn_pass)
            plans = [list(training_plan(len(images), args.batch_size, seed, *part)) for part in steps]
            self.batches[seed] = [FixedBatches(loader, plan, args.cache) for plan in plans if plan]
        return self.batches[seed]

    def network(self, candidate, seed):
        """The trained network, after the BN pass."""
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
        """Top-1 percent on val."""
        return accuracy(self.network(candidate, seed).eval(), self.validation)[0]


def scratch_args(words, iterations):
    """scratch.py's flags of a training that is shorter than that of the settings."""
    args = scratch.parse_args(words)
    share = iterations / args.iterations
    args.warmup, args.bn_pass, args.iterations = round(args.warmup * share), round(args.bn_pass * share), iterations
    return args


# --- the whole -----------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--supernet", metavar="FILE", required=True, help="its checkpoint")
    parser.add_argument(
        "--config", metavar="FILE", help="settings of tester.py and scratch.py (default: demo.yml, the bundled images)"
    )
    parser.add_argument("--candidates", type=count(3, 10_000), default=32, help="default: 32")
    parser.add_argument("--seeds", type=count(2, 100), default=2, help="of training, from 0 (default: 2)")
    parser.add_argument("--iterations", type=count(), default=300, help="of every training (default: 300)")
    parser.add_argument("--threads", type=count(1, 1024), default=1, help="default: 1")
    parser.add_argument(
        "--results", type=pathlib.Path, default=ROOT / "bench" / "results" / "ranking.json", metavar="FILE"
    )
    return parser.parse_args(argv)


def measure(options):
    """The results file's content, all measured."""
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
            f"{options.results}: has been made with another {odd[0]}; use that, remove it, or name another --results"
        )

    if "candidates" not in results:
        test_args = tester.parse_args([*words, "--checkpoint", options.supernet])
        opened = open_evaluation(test_args)
        space = opened[0].space
        candidates = draw_candidates(space, options.candidates)
        results["space"] = space.to_dict()
        results["candidates"] = [
            {
                "architecture": list(c), "flops": space.flops(c), "params": space.params(c), "kernel_size": round(kernel_size(space, c), 4),
                "supernet": in_supernet, "untrained": untrained, "standalone": [], "seconds": [],
            }
            for c, in_supernet, untrained in zip(candidates, *in_supernets(test_args, opened, candidates))
        ]  # fmt: skip
        write_json(options.results, results, indent=1)
    train_all(results, args, options)
    return results


def train_all(results, args, options):
    """All trainings that are not in the results yet, the first seed of every candidate first."""
    trainings = Trainings(args, SearchSpace.from_dict(results["space"]))
    todo = [(s, row) for s in range(options.seeds) for row in results["candidates"] if len(row["standalone"]) <= s]
    if todo:
        results |= {"commit": utils.commit(), "versions": utils.versions()}
    for i, (seed, row) in enumerate(todo, 1):
        start = time.perf_counter()
        row["standalone"].append(trainings.run(row["architecture"], seed))
        row["seconds"].append(round(time.perf_counter() - start, 2))
        write_json(options.results, results, indent=1)
        print(f"training {i} of {len(todo)}: seed {seed}, {row['flops'] / 1e6:.2f}M, supernet {row['supernet']:.2f}%, "
              f"alone {row['standalone'][-1]:.2f}%, {row['seconds'][-1]:.0f} s", flush=True)  # fmt: skip


def summarise(candidates, n_seeds):
    """{predictor: {"tau": ..., "interval": [low, high], "minus_flops": ..., "minus_flops_interval": [...]}}, and the ceiling's."""
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
    """What the paired interval of tau(supernet) - tau(FLOPs) says, in words."""
    row, ceiling = summary["supernet"], summary["ceiling"]["tau"]
    difference, (low, high) = row["minus_flops"], row["minus_flops_interval"]
    text = f"tau(supernet) - tau(FLOPs) = {difference:+.2f}, 95% interval {low:+.2f} to {high:+.2f}: "
    if low > 0 and summary["supernet"]["interval"][0] > 0:
        return f"{text}the supernet ranks better than FLOPs do."
    if low > 0:
        return f"{text}FLOPs rank the wrong way round, but the supernet's own tau of {summary['supernet']['tau']:+.2f} is not above 0."
    if high < 0:
        return f"{text}the supernet ranks worse than FLOPs do."
    text += f"not distinguishable with {n} candidates. A true difference of 0.10 takes about {candidates_needed(n, 0.1, low, high):,} of them"
    if (needed := candidates_needed(n, difference, low, high)) < 10_000:
        text += f", the measured one {needed:,}"
    return f"{text}; longer training raises the ceiling, now {ceiling:.2f}."


def report(results):
    """Prints the table and the verdict."""
    summary = results["summary"]
    spread = [max(row["standalone"]) - min(row["standalone"]) for row in results["candidates"]]
    alone = sorted(sum(row["standalone"]) / len(row["standalone"]) for row in results["candidates"])
    print(
        f"\nstand-alone top-1 from {alone[0]:.2f} to {alone[-1]:.2f}%, seeds {sum(spread) / len(spread):.2f} points apart in the mean\n"
    )
    print("| candidates ranked by | tau | 95% interval | minus that of FLOPs | 95% interval |")
    print("|---|---|---|---|---|")
    for name, row in summary.items():
        cells = [PREDICTORS.get(name, CEILING), f"{row['tau']:.2f}", "{:.2f} to {:.2f}".format(*row["interval"])]
        compared = "minus_flops" in row and name != "flops"
        cells += (
            [f"{row['minus_flops']:+.2f}", "{:+.2f} to {:+.2f}".format(*row["minus_flops_interval"])]
            if compared
            else ["", ""]
        )
        print(f"| {' | '.join(cells)} |")
    print(f"\n{results['verdict']}")


def main(options):
    results = measure(options)
    results["summary"] = summarise(results["candidates"], options.seeds)
    results["verdict"] = verdict(results["summary"], options.candidates)
    write_json(options.results, results, indent=1)
    draw_ranking(
        results["candidates"],
        {PREDICTORS.get(name, CEILING): row for name, row in results["summary"].items()},
        options.results.parent,
    )
    report(results)


if __name__ == "__main__":
    utils.run_script(main, parse_args)

"""What a search is worth: its winner beside networks that cost no search, at equal training and at equal total cost.

    python -m bench.worth                            everything on one core, hours; the same command resumes
    python -m bench.worth --jobs 14 --seconds 220    fourteen processes at a time; ends then
    python -m bench.worth --report                   the tables of docs/experiments.md, and the figure

In the space `varied`, on the bundled images (bench/varied_fashion.yml) and on CIFAR-10 in data/cifar10
(bench/varied_cifar10.yml), for each seed: a supernet, and from it a search and a retraining for each of three targets,
which are limits on FLOPs. Beside the winners: random legal candidates, the largest legal one, and torchvision's
shufflenet_v2_x0_5 with a stem of stride 1, trained as long as the winner, and for multiples of it. A target costs its
search, its retraining and its share of the supernet; what training alone gives for that is read between the multiples.
All numbers come from the commands as they are typed, one thread each; CPU-seconds are those of their processes. Writes
bench/results/worth.json and worth.png.
"""

import functools
import itertools
import json
import math
import pathlib
import statistics
import sys
import time

import matplotlib
import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from torch import nn

import scratch
import utils
from bench import study
from bench.spaces import CANDIDATES, OUT, Study
from dataloader import Loader
from engines.search_files import has_search
from images.dataset import open_data, training_plan
from reports.figures import BEST, GREY, MEAN, STYLE
from reports.figures import RANDOM as RANDOM_COLOUR
from settings.subjects import DataConfig, Images, Training
from space.limits import Limits, make_bounds
from training.evaluation import accuracy, recalibrate_bn, resolve_device
from training.loop import train
from utils import read_json, write_json

RESULTS = study.RESULTS / "worth.json"
SETTINGS = [study.ROOT / "bench" / f"varied_{name}.yml" for name in ("fashion", "cifar10")]
SEEDS = {"varied_fashion": 3}  # by study; others have one seed
TARGETS = ("59%", "30%", "10%")  # FLOPs that so many candidates meet
RANDOM = 5  # candidates
LONGER = (3, 9)  # multiples of the steps of a retraining
BASELINE = "shufflenet_v2_x0_5"


# --- candidates -----------------------------------------------------------------------------------------------


def random_legal(of, target):
    """{name: candidate} of the RANDOM first candidates under a target, of those that bench/spaces.py draws."""
    limits = Limits(of.space, make_bounds(of.space, [f"flops={target}"]))
    legal = {f"random {i}": c for i, c in enumerate(of.legal(CANDIDATES), 1) if not limits.excess(c)}
    return dict(itertools.islice(legal.items(), RANDOM))


@functools.cache
def largest_legal(space, target):
    return study.largest_legal(space, space.cost_value("flops", target))


# --- torchvision's network ------------------------------------------------------------------------------------


class Baseline(nn.Module):
    """torchvision's shufflenet_v2_x0_5 with a stem of stride 1, with what `train` needs."""

    space = None  # nothing to choose

    def __init__(self, n_classes):
        super().__init__()
        self.net = torchvision.models.shufflenet_v2_x0_5(num_classes=n_classes)
        self.net.conv1[0].stride = (1, 1)

    def path(self):
        net = self.net
        return [net.conv1, net.maxpool, net.stage2, net.stage3, net.stage4, net.conv5]

    def classify(self, x):
        return self.net.fc(x.mean((2, 3)))

    def forward(self, x):
        for part in self.path():
            x = part(x)
        return self.classify(x)


def train_baseline(words):
    """Trains a Baseline with the arguments of scratch.py, as scratch.py trains; prints its numbers as JSON."""
    args = scratch.parse_args(words)
    config = DataConfig.resolve(DataConfig.given(vars(args)))
    data = open_data(Images.of(vars(args)), config, args.demo)
    device = resolve_device(args.device, args.threads)
    torch.manual_seed(args.seed)
    model = Baseline(len(data.classes))
    loader = Loader(data.train, config, True, args.seed, device, args.loader, args.workers)
    train(model, loader, Training.of(vars(args)), device=device, seed=args.seed)
    end = args.iterations + args.bn_pass
    plan = training_plan(len(data.train), args.batch_size, args.seed, args.iterations, end)
    recalibrate_bn(model, model, loader.batches(plan), "average")
    acc1, _, n_images = accuracy(model.eval(), scratch.val_batches(args, data.val, config, device))
    print(json.dumps({"acc1": acc1, "n_images": n_images, "params": sum(p.numel() for p in model.parameters())}))


# --- tasks ----------------------------------------------------------------------------------------------------


class Tasks:
    """The Tasks of a Study, whose runs are in `out`, in the order in which they matter.

    Keys are [study, "supernet", seed], [study, "search", seed, target] and [study, "retraining", seed, target, who,
    multiple of the steps]. Which random candidate is the typical one is known when all have been trained, here or by
    bench/spaces.py: `rows` are those known by now.
    """

    def __init__(self, of, out, rows):
        self.of = of
        self.out = out
        self.known = Rows(rows, of)

    def missing(self):
        """Those that are not done."""
        first, *others = TARGETS
        last = TARGETS[-1]
        seeds = range(1, SEEDS.get(self.of.name, 1))
        found = [self.of_search(0, target) for target in TARGETS]
        found += [self.random(first), self.alone(0, first, "largest"), self.alone(0, "", BASELINE)]
        found += [self.typical(first, LONGER[0]), self.winner(0, first, LONGER[0])]
        found += [self.of_search(seed, first) for seed in seeds]
        found += [self.winner(seed, first, LONGER[0]) for seed in seeds]
        found += [self.typical(first, LONGER[1])]
        found += [self.random(target) for target in reversed(others)]
        found += [self.alone(0, first, "largest", LONGER[0])]
        found += [self.typical(last, LONGER[0]), self.winner(0, last, LONGER[0])]
        found += [self.alone(0, target, "largest") for target in reversed(others)]
        found += [self.of_search(seed, target) for seed in seeds for target in reversed(others)]
        found += [self.alone(0, "", BASELINE, LONGER[0]), self.typical(last, LONGER[1])]
        found += [self.alone(seed, first, "largest") for seed in seeds]
        found += [self.alone(seed, "", BASELINE) for seed in seeds]
        found += [self.winner(seed, last, LONGER[0]) for seed in seeds]
        found += [self.alone(0, first, "largest", LONGER[1]), self.winner(0, first, LONGER[1])]
        found += [self.alone(0, last, "largest", LONGER[0])]
        tasks = {tuple(task.key[1:]): task for task in itertools.chain(*found)}
        return [task for key, task in tasks.items() if key not in self.known.by_key]

    def folder(self, seed, target):
        return self.of.folder(self.out) / "worth" / str(seed) / target.replace("%", "")

    def of_search(self, seed, target):
        """The Tasks that end with the winner for a target."""
        supernet = self.of.supernet(seed, self.out)
        yield study.Task([self.of.name, "supernet", seed], supernet.command)
        yield self.search(supernet.command.folder, seed, target)
        yield from self.winner(seed, target)

    def search(self, supernet, seed, target):
        folder = self.folder(seed, target)

        def prepare():
            weights = max((supernet / "checkpoints" / "supernet").glob("checkpoint-*.pth"))
            folder.mkdir(parents=True, exist_ok=True)
            command.words[command.words.index("WEIGHTS")] = str(weights)
            if has_search(folder):
                command.words.append("--resume")
            write_json(folder / "nni_auto_gen_search_space.json", self.of.space.nni_search_space())

        words = [*self.of.words, "--engine", "local", "--seed", seed, "--threads", 1, "--limit", f"flops={target}"]
        command = study.Command("search.py", [*words, "--checkpoint", "WEIGHTS"], folder)
        return study.Task([self.of.name, "search", seed, target], command, [self.of.name, "supernet", seed], prepare)

    def winner(self, seed, target, multiple=1):
        path = self.folder(seed, target) / "checkpoints" / "best.json"
        yield self.retraining([seed, target, "winner", multiple], path, [self.of.name, "search", seed, target])

    def random(self, target):
        for name, candidate in random_legal(self.of, target).items():
            yield self.retraining([0, "", name, 1], self.of.space.to_architecture(candidate))

    def typical(self, target, multiple):
        """The Task of the typical candidate of a target, once it is known."""
        if name := self.known.typical(target):
            architecture = self.of.space.to_architecture(random_legal(self.of, target)[name])
            yield self.retraining([0, "", name, multiple], architecture)

    def alone(self, seed, target, who, multiple=1):
        """The Task of the largest legal network, or of torchvision's."""
        space = self.of.space
        architecture = space.to_architecture(largest_legal(space, target)) if who == "largest" else None
        yield self.retraining([seed, target, who, multiple], architecture)

    def retraining(self, key, architecture, needs=None):
        seed, target, who, multiple = key
        folder = self.folder(seed, target) / f"{who.replace(' ', '-')}-{multiple}"
        words = [*self.of.words, "--seed", seed, *study.of_steps(self.of.iterations * multiple)]
        key = [self.of.name, "retraining", *key]
        if architecture is None:
            return study.Task(key, study.Command("-m bench.worth --train-baseline", words, folder))
        return study.retraining(key, words, architecture, folder, needs)


def kept(studies):
    """The rows of RESULTS. Raises UserError if those of a study come from other settings than those of its file."""
    rows = study.read(RESULTS).get("rows", [])
    settings = {of.name: of.digest for of in studies}
    for row in rows:
        if row["key"][1] != "tuning" and row["settings"] != settings.get(row["key"][0], row["settings"]):
            raise utils.UserError(f"{RESULTS}: has results of other settings of {row['key'][0]}; move it away")
    return rows


def run(tasks, rows, settings, jobs, end):
    """Runs the Tasks of `tasks()`, and keeps each as a row; `settings` are the digests of the studies by name."""

    def keep(task):
        numbers = task.numbers() if task.key[1] == "retraining" else {"cpu_seconds": task.command.cpu_seconds}
        rows.append({"key": task.key, "settings": settings[task.key[0]], **numbers})
        study.write(RESULTS, {"rows": rows})
        print(json.dumps(rows[-1]), flush=True)

    study.run(tasks, lambda: [row["key"] for row in rows], keep, jobs, end)


# --- report ---------------------------------------------------------------------------------------------------


class Rows:
    """The rows of a study by key, without the study, and those of bench/spaces.py for the same random candidates."""

    def __init__(self, rows, of):
        random = [random_legal(of, target) for target in TARGETS]
        self.names = dict(zip(TARGETS, map(list, random)))
        names = {candidate: name for found in random for name, candidate in found.items()}
        self.by_key = {
            ("retraining", row["seed"], "", names[candidate], 1): row
            for row in of.rows()
            if (candidate := tuple(row["architecture"])) in names
        }
        self.by_key |= {tuple(row["key"][1:]): row for row in rows if row["key"][0] == of.name}

    def trained(self, target, who, multiple=1):
        """The rows of a network that was trained for a multiple of the steps, by seed."""
        keys = [key for key in self.by_key if key[0] == "retraining" and key[2:] == (target, who, multiple)]
        return [self.by_key[key] for key in sorted(keys)]

    def random(self, target):
        """[{top-1}] of the random candidates under a target: of each the mean over its seeds."""
        found = [self.trained("", name) for name in self.names[target]]
        return [{"acc1": statistics.fmean(row["acc1"] for row in rows)} for rows in found if rows]

    def typical(self, target):
        """The name of the random candidate under a target whose top-1 is nearest to the mean; None if it is unknown."""
        rows = {name: self.trained("", name) for name in self.names[target]}
        if not all(rows.values()):
            return None
        acc1 = {name: statistics.fmean(row["acc1"] for row in found) for name, found in rows.items()}
        mean = statistics.fmean(acc1.values())
        return min(acc1, key=lambda name: abs(acc1[name] - mean))

    def curve(self, target, who):
        """[(CPU-seconds, mean top-1)] of a network, by rising steps."""
        target = "" if who == BASELINE or who.startswith("random") else target
        found = [self.trained(target, who, multiple) for multiple in (1, *LONGER)]
        return [tuple(statistics.fmean(row[name] for row in rows) for name in ("cpu_seconds", "acc1"))
                for rows in found if rows]  # fmt: skip

    def alone(self, target):
        """{who: curve} of the networks that cost no search."""
        names = {"typical": self.typical(target), "largest": "largest", BASELINE: BASELINE}
        return {who: self.curve(target, name) for who, name in names.items() if name}

    def cost(self, target, multiple, n):
        """CPU-seconds of a target whose supernet serves `n`: means over the seeds; None if a part is missing."""
        kinds = [("supernet", ()), ("search", (target,)), ("retraining", (target, "winner", multiple))]
        seconds = [
            [row["cpu_seconds"] for key, row in self.by_key.items() if key[0] == kind and key[2:] == rest]
            for kind, rest in kinds
        ]
        if not all(seconds):
            return None
        supernet, search, retraining = map(statistics.fmean, seconds)
        return supernet / n + search + retraining


def at_cost(curve, seconds):
    """Top-1 for a cost, between the trainings of a curve: linear in the logarithm of CPU-seconds.

    That of the longest training if it is shorter than that.
    """
    cost, acc1 = zip(*sorted(curve))
    return float(np.interp(np.log(seconds), np.log(cost), acc1))


def with_error(rows):
    """[mean top-1, its standard error, number] of rows; None for what is not known."""
    acc1 = [row["acc1"] for row in rows]
    error = statistics.stdev(acc1) / len(acc1) ** 0.5 if len(acc1) > 1 else None
    return [statistics.fmean(acc1) if acc1 else None, error, len(acc1)]


def equal_retraining(rows):
    """{target: {who: [mean top-1, standard error, number]}} of networks that are trained equally long."""
    return {
        target: {
            "winner": with_error(rows.trained(target, "winner")),
            "random": with_error(rows.random(target)),
            "largest": with_error(rows.trained(target, "largest")),
            BASELINE: with_error(rows.trained("", BASELINE)),
        }
        for target in TARGETS
    }


def equal_total(rows, target):
    """A line for each multiple of the winner's retraining and each number of targets that share a supernet.

    CPU-seconds of each target, top-1 of the winner, and that of the other networks for that cost. Of those also the
    CPU-seconds of the longest training: if that is shorter than the search, more would be higher. And the break-even.
    """
    found = []
    curves = rows.alone(target)
    for multiple, n in itertools.product((1, *LONGER), range(1, len(TARGETS) + 1)):
        if seconds := rows.cost(target, multiple, n):
            alone = {who: [at_cost(curve, seconds), curve[-1][0]] for who, curve in curves.items() if curve}
            winner = with_error(rows.trained(target, "winner", multiple))
            found.append({"steps": multiple, "targets": n, "seconds of each": seconds, "winner": winner, **alone})
    return found


def break_even(rows, target, multiple):
    """How many targets of one supernet make a winner as good as the typical network, trained alone for its cost.

    None if no number does, since the search and the retraining cost as much by themselves, or if it is not known.
    """
    curve = sorted(rows.alone(target).get("typical", ()))
    each = rows.cost(target, multiple, math.inf)
    if len(curve) < 2 or not each:
        return None
    cost, acc1 = zip(*curve)
    winner = with_error(rows.trained(target, "winner", multiple))[0]
    equal = float(np.exp(np.interp(winner, acc1, np.log(cost))))
    return (rows.cost(target, multiple, 1) - each) / (equal - each) if equal > each else None


def draw(studies, path):
    """Top-1 under the first target against CPU-seconds: the search for one to three targets, and training alone."""
    target = TARGETS[0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5 * len(studies), 4.2), layout="constrained")
        panels = figure.subplots(1, len(studies), squeeze=False)[0]
        for panel, (name, rows) in zip(panels, studies.items()):
            for who, curve in rows.alone(target).items():
                label, colour = {
                    "typical": ("a typical random network, alone", RANDOM_COLOUR),
                    "largest": ("the largest legal network, alone", MEAN),
                    BASELINE: (f"{BASELINE}, alone", GREY),
                }[who]
                panel.plot(*np.array(curve).reshape(-1, 2).T, "o-", color=colour, markersize=4, label=label)
            total = equal_total(rows, target)
            for n, style in zip(range(len(TARGETS), 0, -1), ("-", "--", ":")):
                points = [(row["seconds of each"], row["winner"][0]) for row in total if row["targets"] == n]
                label = f"the winner, with its search and supernet: {n} target{'s' if n > 1 else ''}"
                panel.plot(*np.array(points).reshape(-1, 2).T, "D", ls=style, color=BEST, markersize=5, label=label)
            panel.set(xscale="log", xlabel="CPU-seconds for each target", ylabel="top-1 (%)", title=name)
        shown = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels())}
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=2, fontsize=8)
        figure.savefig(path, dpi=120, facecolor="white")


def report(studies, rows):
    """Prints the numbers, and writes them beside the rows; draws the figure."""
    studies = {of.name: Rows(rows, of) for of in studies}
    ends = (TARGETS[0], TARGETS[-1])
    summary = {
        name: {
            "equal retraining": equal_retraining(rows),
            "equal total": {target: equal_total(rows, target) for target in ends},
            "break-even in targets": {
                target: {multiple: break_even(rows, target, multiple) for multiple in (1, *LONGER)} for target in ends
            },
        }
        for name, rows in studies.items()
    }
    write_json(RESULTS, read_json(RESULTS) | {"summary": summary}, indent=None)
    print(json.dumps(summary, indent=1))
    draw(studies, RESULTS.with_suffix(".png"))


def parse_args(argv=None):
    parser = study.parser(__doc__, {"--jobs": 1, "--seconds": 1e9, "--out": OUT})
    parser.add_argument("--settings", type=pathlib.Path, nargs="+", default=SETTINGS, metavar="FILE")
    parser.add_argument("--report", action="store_true", help="print the numbers, and draw the figure")
    return parser.parse_args(argv)


def main(options):
    studies = [Study(path) for path in options.settings]
    rows = kept(studies)
    if options.report:
        return report(studies, rows)

    def tasks():
        return [task for of in studies for task in Tasks(of, options.out, rows).missing()]

    settings = {of.name: of.digest for of in studies}
    with study.interruptible():
        run(tasks, rows, settings, options.jobs, time.time() + options.seconds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train-baseline"]:
        train_baseline(sys.argv[2:])
    else:
        utils.run_script(main, parse_args)

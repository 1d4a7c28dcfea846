"""What a search is worth: its winner beside networks that cost no search, at equal training and at equal total cost.

    python bench/worth.py                            everything on one core, hours; the same command resumes
    python bench/worth.py --jobs 14 --seconds 220    fourteen processes at a time; ends then
    python bench/worth.py --report                   the tables of docs/experiments.md, and the figure
    python bench/worth.py --tune                     tries learning rates, on images held out of train

On the bundled images in the space `varied` (bench/varied_fashion.yml), for each seed: a supernet, and from it a search
and a retraining for each of three targets, which are limits on FLOPs. Beside the winners: random legal candidates, the
largest legal one, and torchvision's shufflenet_v2_x0_5 with a stem of stride 1, trained as long as the winner, and for
multiples of it. A target costs its search, its retraining and its share of the supernet; what training alone gives for
that is read between the multiples. All numbers come from the commands as they are typed, one thread each; CPU-seconds
are those of their processes. Writes bench/results/worth.json and worth.png.
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # search.py is that of the root

import utils

# isort: split
import matplotlib
import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from spaces import CANDIDATES, Command, Study, supernet_command
from torch import nn

import scratch
from dataloader import Loader
from images.dataset import open_data, training_plan
from reports.figures import BEST, GREY, MEAN, STYLE
from reports.figures import RANDOM as RANDOM_COLOUR
from settings.subjects import DataConfig, Images, Training
from space.limits import Limits, make_bounds
from training.evaluation import accuracy, recalibrate_bn, resolve_device
from training.loop import train
from utils import read_json, write_json

RESULTS = ROOT / "bench" / "results" / "worth.json"
SETTINGS = ROOT / "bench" / "varied_fashion.yml"
TARGETS = ("59%", "30%", "10%")  # FLOPs that so many candidates meet
SEEDS = 3
RANDOM = 5  # candidates
LONGER = (3,)  # multiples of the steps of a retraining
RATES = (0.05, 0.1, 0.2)
BASELINE = "shufflenet_v2_x0_5"


# --- candidates -----------------------------------------------------------------------------------------------


def random_legal(study, target):
    """RANDOM random candidates under a target: the first of those that bench/spaces.py trains, as it draws them."""
    limits = Limits(study.space, make_bounds(study.space, [f"flops={target}"]))
    return [c for c in study.legal(CANDIDATES) if not limits.excess(c)][:RANDOM]


def trained(study, target):
    """{candidate: its top-1 by seed} of the random candidates under a target that bench/spaces.py has trained."""
    found = {c: {} for c in random_legal(study, target)}
    for row in study.rows():
        if (candidate := tuple(row["architecture"])) in found:
            found[candidate][row["seed"]] = row
    return {c: rows for c, rows in found.items() if rows}


def typical(study, target):
    """The random candidate under a target whose top-1 is nearest to the mean of all."""
    acc1 = {c: statistics.fmean(row["acc1"] for row in rows.values()) for c, rows in trained(study, target).items()}
    mean = statistics.fmean(acc1.values())
    return min(acc1, key=lambda c: abs(acc1[c] - mean))


@functools.cache
def largest_legal(space, target):
    """The candidate of the most FLOPs under a target; of equals, the one that comes first."""
    most = space.flops_value(target)
    return max((c for c in itertools.product(*map(range, space.choices)) if space.flops(c) <= most), key=space.flops)


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


class Task:
    """A command whose result is a row of RESULTS; `key` identifies it, `needs` is the key of a task before it."""

    def __init__(self, key, command, needs=None, prepare=None):
        self.key = key
        self.command = command
        self.needs = needs
        self.prepare = prepare or (lambda: None)

    def row(self):
        row = {"key": self.key, "cpu_seconds": self.command.cpu_seconds}
        kept = ("architecture", "flops", "params", "acc1", "n_images")
        if self.key[1] in ("retraining", "tuning"):
            row |= {name: value for name, value in self.command.result().items() if name in kept}
        return row


def tasks(study, out, seeds, longer):
    """All Tasks of a study, in the order in which they matter: the first seed and the first target before the others.

    Keys are [study, "supernet", seed], [study, "search", seed, target] and [study, "retraining", seed, target, who,
    multiple of the steps]. Random candidates are trained by bench/spaces.py, but for the multiples.
    """
    first, *others = TARGETS
    found = [_of_search(study, out, 0, target) for target in TARGETS]
    found.append(_alone(study, out, 0, first, "largest", (1,)))
    found.append(_alone(study, out, 0, "", BASELINE, (1,)))
    found.append(_alone(study, out, 0, first, "typical", longer))
    found += [_of_search(study, out, seed, first) for seed in range(1, seeds)]
    found += [_alone(study, out, 0, target, "largest", (1,)) for target in others]
    found.append(_alone(study, out, 0, first, "largest", longer))
    found.append(_alone(study, out, 0, "", BASELINE, longer))
    for seed in range(1, seeds):
        found += [_of_search(study, out, seed, target) for target in others]
        found += [_alone(study, out, seed, first, "largest", (1,)), _alone(study, out, seed, "", BASELINE, (1,))]
    return list({tuple(task.key): task for task in itertools.chain(*found)}.values())


def _folder(study, out, seed, target):
    return out / "worth" / study.name / str(seed) / target.replace("%", "")


def _of_search(study, out, seed, target):
    """The Tasks that end with the winner for a target."""
    supernet = supernet_command(study, seed, out)
    folder = _folder(study, out, seed, target)
    yield Task([study.name, "supernet", seed], supernet)
    yield _search(study, supernet, folder, seed, target)
    yield _retraining(study, folder, folder / "checkpoints" / "best.json", [seed, target, "winner", 1])


def _alone(study, out, seed, target, who, multiples):
    """The Tasks of a network that costs no search."""
    folder = _folder(study, out, seed, target)
    candidate = None
    if who != BASELINE:
        candidate = typical(study, target) if who == "typical" else largest_legal(study.space, target)
    for multiple in multiples:
        yield _retraining(study, folder, folder / f"{who}.json", [seed, target, who, multiple], candidate)


def _search(study, supernet, folder, seed, target):
    def prepare():
        weights = max((supernet.folder / "checkpoints" / "supernet").glob("checkpoint-*.pth"))
        folder.mkdir(parents=True, exist_ok=True)
        command.words[command.words.index("WEIGHTS")] = str(weights)
        write_json(folder / "nni_auto_gen_search_space.json", study.space.nni_search_space())

    words = [*study.words, "--engine", "local", "--seed", seed, "--limit", f"flops={target}", "--checkpoint", "WEIGHTS"]
    command = Command("search.py", words, folder)
    return Task([study.name, "search", seed, target], command, [study.name, "supernet", seed], prepare)


def _retraining(study, folder, path, key, candidate=None):
    seed, target, name, multiple = key
    steps = study.iterations * multiple
    words = [*study.words, "--seed", seed, "--workers", 0, "--iterations", steps, "--val-every", steps]
    words += ["--save-every", steps]
    out = folder / f"{name.replace(' ', '-')}-{multiple}"
    if name == BASELINE:
        return Task([study.name, "retraining", *key], Command("bench/worth.py", ["--train-baseline", *words], out))

    def prepare():
        if candidate:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, study.space.to_architecture(candidate))

    needs = [study.name, "search", seed, target] if name == "winner" else None
    return Task(
        [study.name, "retraining", *key], Command("scratch.py", [*words, "--architecture", path], out), needs, prepare
    )


def heldout_tree(study, folder):
    """Makes a tree of links whose val are the images held out of train, and whose train are the others."""
    args = scratch.parse_args(study.words)
    data = open_data(Images.of(vars(args)), DataConfig.resolve(DataConfig.given(vars(args))), args.demo)
    for part, split in (("train", "supernet"), ("val", "search")):
        images = data.images(split)
        for path in images.paths:
            link = folder / part / path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(pathlib.Path(images.root, path).resolve())


def tuning(study, out):
    """Yields Tasks of keys [study, "tuning", who, learning rate], measured on images held out of train."""
    folder = out / "tuning" / study.name
    if not (folder / "images").exists():
        folder.mkdir(parents=True, exist_ok=True)
        heldout_tree(study, folder / "unfinished")
        (folder / "unfinished").rename(folder / "images")
    for name, candidate in (("random", random_legal(study, TARGETS[0])[0]), (BASELINE, None)):
        for rate in RATES:
            here = folder / f"{name.replace(' ', '-')}-{rate}"
            words = [*study.words, "--workers", 0, "--data-dir", folder / "images", "--lr", rate]
            if candidate:
                path = folder / "random.json"
                write_json(path, study.space.to_architecture(candidate))
                command = Command("scratch.py", [*words, "--architecture", path], here)
            else:
                command = Command("bench/worth.py", ["--train-baseline", *words], here)
            yield Task([study.name, "tuning", name, rate], command)


def run(waiting, rows, jobs, end):
    """Runs tasks, `jobs` at a time, until the time `end`; keeps each when it ends."""
    running = []
    done = [row["key"] for row in rows]
    waiting = [task for task in waiting if task.key not in done]
    try:
        while waiting or running:
            ready = [task for task in waiting if task.needs is None or task.needs in done]
            if not ready and not running:
                return  # what others need has failed
            for task in ready[: max(0, jobs - len(running))]:
                waiting.remove(task)
                task.prepare()
                if not task.command.done():
                    task.command.start()
                running.append(task)
            time.sleep(0.2)
            if time.time() > end:
                print(f"out of time: {len(waiting) + len(running)} tasks are left", flush=True)
                return
            for task in [task for task in running if not task.command.running()]:
                running.remove(task)
                if code := 0 if task.command.done() else task.command.end():
                    errors = (task.command.folder / "stderr").read_text()[-500:]
                    print(f"{task.key} failed with exit code {code}: {errors}", flush=True)
                    continue
                rows.append(task.row())
                done.append(task.key)
                keep(rows)
                print(json.dumps(rows[-1]), flush=True)
    finally:
        for task in running:
            if task.command.child:
                task.command.end()


def keep(rows):
    write_json(RESULTS, {"rows": rows, "versions": utils.versions(), "commit": utils.commit()}, indent=None)


# --- report ---------------------------------------------------------------------------------------------------


class Rows:
    """The rows of a study by key, without the study, and what bench/spaces.py has trained for it."""

    def __init__(self, rows, study):
        self.by_key = {tuple(row["key"][1:]): row for row in rows if row["key"][0] == study.name}
        self.random = {target: trained(study, target) for target in TARGETS}
        self.typical = typical(study, TARGETS[0]) if self.random[TARGETS[0]] else None

    def acc1(self, target, who):
        """Top-1 by seed of what was trained as long as the winners."""
        keys = [key for key in self.by_key if key[0] == "retraining" and key[2:] == (target, who, 1)]
        return [self.by_key[key]["acc1"] for key in sorted(keys)]

    def random_acc1(self, target):
        """The mean top-1 of each random candidate over its seeds."""
        return [statistics.fmean(row["acc1"] for row in rows.values()) for rows in self.random[target].values()]

    def curve(self, target, who):
        """(CPU-seconds, top-1) of a network's trainings of the first seed, by rising steps."""
        keys = [key for key in self.by_key if key[:4] == ("retraining", 0, target, who)]
        points = [(self.by_key[key]["cpu_seconds"], self.by_key[key]["acc1"]) for key in sorted(keys)]
        if who == "typical" and self.typical:
            rows = self.random[target][self.typical].values()
            points.insert(0, tuple(statistics.fmean(row[name] for row in rows) for name in ("cpu_seconds", "acc1")))
        return points

    def cost(self, n):
        """CPU-seconds of `n` targets from the supernet of the first seed, all in all; None if a part is missing."""
        keys = [("supernet", 0)]
        for target in TARGETS[:n]:
            keys += [("search", 0, target), ("retraining", 0, target, "winner", 1)]
        return sum(self.by_key[key]["cpu_seconds"] for key in keys) if {*keys} <= self.by_key.keys() else None


def at_cost(curve, seconds):
    """Top-1 for a cost, between the trainings of a curve: linear in the logarithm of CPU-seconds.

    That of the longest training if it is shorter than that.
    """
    cost, acc1 = zip(*sorted(curve))
    return float(np.interp(np.log(seconds), np.log(cost), acc1))


def with_error(values):
    """[mean, its standard error, number] of values; None for what is not known."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return [statistics.fmean(values) if values else None, error, len(values)]


def equal_retraining(rows):
    """{target: {who: [mean top-1, standard error, number]}} of networks that are trained equally long."""
    return {
        target: {
            "winner": with_error(rows.acc1(target, "winner")),
            "random": with_error(rows.random_acc1(target)),
            "largest": with_error(rows.acc1(target, "largest")),
            BASELINE: with_error(rows.acc1("", BASELINE)),
        }
        for target in TARGETS
    }


def equal_total(rows):
    """{number of targets: CPU-seconds for each, the winner's top-1 for the first, and that of others for that cost}.

    Of the others, if they were trained longer too, [top-1, CPU-seconds of the longest training]: if that is shorter
    than the search, more would be higher.
    """
    first = TARGETS[0]
    curves = {who: rows.curve("" if who == BASELINE else first, who) for who in ("typical", "largest", BASELINE)}
    found = {}
    for n in range(1, len(TARGETS) + 1):
        if not (seconds := rows.cost(n)):
            continue
        alone = {who: [at_cost(curve, seconds / n), curve[-1][0]] for who, curve in curves.items() if len(curve) > 1}
        winner = statistics.fmean(rows.acc1(first, "winner"))
        found[n] = {"seconds of each": seconds / n, "winner": winner, **alone}
    return found


def break_even(rows):
    """How many targets of one supernet make a winner as good as the typical network, trained alone for its cost.

    None if no number does, since the search and the retraining cost as much by themselves, or if it is not known.
    """
    curve = sorted(rows.curve(TARGETS[0], "typical"))
    if len(curve) < 2 or not rows.cost(len(TARGETS)):
        return None
    supernet = rows.by_key["supernet", 0]["cpu_seconds"]
    each = (rows.cost(len(TARGETS)) - supernet) / len(TARGETS)
    cost, acc1 = zip(*curve)
    equal = float(np.exp(np.interp(statistics.fmean(rows.acc1(TARGETS[0], "winner")), acc1, np.log(cost))))
    return supernet / (equal - each) if equal > each else None


def draw(studies, path):
    """Top-1 under the first target against CPU-seconds: the search for one, two, three targets, and training alone."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5 * len(studies), 3.6), layout="constrained")
        panels = figure.subplots(1, len(studies), squeeze=False)[0]
        for panel, (name, rows) in zip(panels, studies.items()):
            for label, who, colour in (
                ("a typical random network, alone", "typical", RANDOM_COLOUR),
                ("the largest legal network, alone", "largest", MEAN),
                (f"{BASELINE}, alone", BASELINE, GREY),
            ):
                points = np.array(rows.curve("" if who == BASELINE else TARGETS[0], who)).reshape(-1, 2)
                panel.plot(points[:, 0], points[:, 1], "o-", color=colour, markersize=4, label=label)
            total = equal_total(rows)
            panel.plot(
                [row["seconds of each"] for row in total.values()], [row["winner"] for row in total.values()],
                "D--", color=BEST, markersize=6, label="the winner, with its search and share of the supernet",
            )  # fmt: skip
            for n, row in total.items():
                text = f"{n} target{'s' if n > 1 else ''}"
                panel.annotate(text, (row["seconds of each"], row["winner"]), (0, 7), textcoords="offset points",
                               ha="center", fontsize=8)  # fmt: skip
            panel.set(xscale="log", xlabel="CPU-seconds for each target", ylabel="top-1 (%)", title=name)
            panel.legend(loc="lower right", fontsize=7.5)
        figure.savefig(path, dpi=120, facecolor="white")


def report(studies):
    """Prints the numbers, and writes them beside the rows; draws the figure."""
    content = read_json(RESULTS)
    studies = {study.name: Rows(content["rows"], study) for study in studies}
    content["summary"] = {
        name: {
            "equal retraining": equal_retraining(rows),
            "equal total": equal_total(rows),
            "break-even in targets": break_even(rows),
        }
        for name, rows in studies.items()
    }
    write_json(RESULTS, content, indent=None)
    print(json.dumps(content["summary"], indent=1))
    draw(studies, RESULTS.with_suffix(".png"))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=pathlib.Path, nargs="+", default=[SETTINGS], metavar="FILE")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time (default: 1)")
    parser.add_argument("--seconds", type=float, default=1e9, help="end what has not ended by then; it resumes")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--longer", type=int, nargs="+", default=LONGER, help="multiples of the steps (3)")
    parser.add_argument("--report", action="store_true", help="print the numbers, and draw the figure")
    parser.add_argument("--tune", action="store_true", help="try learning rates, on images held out of train")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "demo" / "spaces", help="folder of the runs")
    return parser.parse_args(argv)


def main(options):
    studies = [Study(path) for path in options.settings]
    rows = read_json(RESULTS)["rows"] if RESULTS.exists() else []
    if options.report:
        return report(studies)
    end = time.time() + options.seconds
    if options.tune:
        wanted = [task for study in studies for task in tuning(study, options.out)]
    else:
        wanted = [task for study in studies for task in tasks(study, options.out, options.seeds, options.longer)]
    try:
        with utils.signals(utils.interrupt):  # so that commands end with a checkpoint, and their costs are kept
            run(wanted, rows, options.jobs, end)
    except utils.Interrupted:
        raise KeyboardInterrupt from None


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train-baseline"]:
        train_baseline(sys.argv[2:])
    else:
        utils.run_script(main, parse_args)

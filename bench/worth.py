"""What a search is worth: its winner beside networks that cost no search, at equal training and at equal total cost.

    python bench/worth.py                            everything on one core, hours; interrupted, it goes on
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
import itertools
import json
import pathlib
import random
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # search.py is that of the root

import utils

# isort: split
import torch
import torchvision
from spaces import Command, Study, supernet_command
from torch import nn

import scratch
from dataloader import Loader
from images.dataset import open_data, training_plan
from settings.subjects import DataConfig, Images, Training
from space.limits import Limits, make_bounds
from training.evaluation import accuracy, recalibrate_bn, resolve_device
from training.recipe import Recipe
from utils import read_json, write_json

RESULTS = ROOT / "bench" / "results" / "worth.json"
SETTINGS = ROOT / "bench" / "varied_fashion.yml"
TARGETS = ("59%", "30%", "10%")  # FLOPs that so many candidates meet
SEEDS = 3
RANDOM = 5  # candidates
LONGER = (4, 8)  # multiples of the steps of a retraining
RATES = (0.05, 0.1, 0.2)
BASELINE = "shufflenet_v2_x0_5"


# --- candidates -----------------------------------------------------------------------------------------------


def random_legal(space, limits, n, seed):
    rng = random.Random(seed)
    found = {}
    while len(found) < n:
        candidate = space.random_candidate(rng)
        if not limits.excess(candidate):
            found[candidate] = None
    return list(found)


def largest_legal(space, limits):
    """The legal candidate of the most FLOPs; of equals, the one that comes first."""
    return max((c for c in itertools.product(*map(range, space.choices)) if not limits.excess(c)), key=space.flops)


# --- torchvision's network ------------------------------------------------------------------------------------


class Baseline(nn.Module):
    """torchvision's shufflenet_v2_x0_5 with a stem of stride 1, with the methods that Recipe needs."""

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
    recipe = Recipe(model, Training.of(vars(args)), device, args.seed)
    loader = Loader(data.train, config, True, args.seed, device, args.loader, args.workers)
    n = len(data.train)
    plan = training_plan(n, args.batch_size, args.seed, 0, args.iterations)
    model.train()
    for step, batch in enumerate(loader.batches(plan), 1):
        recipe.train_one_step(step, *batch)
    end = args.iterations + args.bn_pass
    plan = training_plan(n, args.batch_size, args.seed, args.iterations, end)
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
    """All Tasks of a study."""
    found = []
    for seed in range(seeds):
        supernet = supernet_command(study, seed, out)
        found.append(Task([study.name, "supernet", seed], supernet))
        for target in TARGETS:
            folder = out / "worth" / study.name / str(seed) / target.replace("%", "")
            found.append(_search(study, supernet, folder, seed, target))
    for seed in range(seeds):
        found += _retrainings(study, out / "worth" / study.name / str(seed), seed, longer)
    return found


def turn(task):
    """What comes first: what others wait for, then the longest of the first seed."""
    long = task.key[1] == "retraining" and task.key[5] > 1
    return task.key[1] == "retraining", task.key[2] if long else 0, -task.key[5] if long else 0


def _search(study, supernet, folder, seed, target):
    def prepare():
        weights = max((supernet.folder / "checkpoints" / "supernet").glob("checkpoint-*.pth"))
        folder.mkdir(parents=True, exist_ok=True)
        command.words[command.words.index("WEIGHTS")] = str(weights)
        write_json(folder / "nni_auto_gen_search_space.json", study.space.nni_search_space())

    words = [*study.words, "--engine", "local", "--seed", seed, "--limit", f"flops={target}", "--checkpoint", "WEIGHTS"]
    command = Command("search.py", words, folder)
    return Task([study.name, "search", seed, target], command, [study.name, "supernet", seed], prepare)


def _retrainings(study, folder, seed, longer):
    """Tasks of keys [study, "retraining", seed, target, who, multiple of the steps]."""
    for number, target in enumerate(TARGETS):
        space = study.space
        limits = Limits(space, make_bounds(space, [f"flops={target}"]))
        here = folder / target.replace("%", "")
        who = {f"random {i}": c for i, c in enumerate(random_legal(space, limits, RANDOM, f"{seed} {target}"))}
        who["largest"] = largest_legal(space, limits)
        yield _retraining(study, here, here / "checkpoints" / "best.json", [seed, target, "winner", 1])
        for name, candidate in who.items():
            path = here / f"{name.replace(' ', '-')}.json"
            multiples = (1, *(longer if number == 0 else longer[:1])) if name in ("random 0", "largest") else (1,)
            for multiple in multiples:
                yield _retraining(study, here, path, [seed, target, name, multiple], candidate)
    for multiple in (1, *longer):
        yield _retraining(study, folder, None, [seed, "", BASELINE, multiple])


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
    """Tasks of keys [study, "tuning", who, learning rate], measured on images held out of train."""
    limits = Limits(study.space, make_bounds(study.space, [f"flops={TARGETS[0]}"]))
    folder = out / "tuning" / study.name
    if not (folder / "images").exists():
        folder.mkdir(parents=True, exist_ok=True)
        heldout_tree(study, folder / "unfinished")
        (folder / "unfinished").rename(folder / "images")
    for name, candidate in (("random 0", random_legal(study.space, limits, 1, "tuning")[0]), (BASELINE, None)):
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


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=pathlib.Path, nargs="+", default=[SETTINGS], metavar="FILE")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time (default: 1)")
    parser.add_argument("--seconds", type=float, default=1e9, help="end what has not ended by then; it resumes")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--longer", type=int, nargs="+", default=LONGER, help="multiples of the steps (4 8)")
    parser.add_argument("--tune", action="store_true", help="try learning rates, on images held out of train")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "demo" / "spaces", help="folder of the runs")
    return parser.parse_args(argv)


def main(options):
    studies = [Study(path) for path in options.settings]
    rows = read_json(RESULTS)["rows"] if RESULTS.exists() else []
    end = time.time() + options.seconds
    if options.tune:
        wanted = [task for study in studies for task in tuning(study, options.out)]
    else:
        wanted = [task for study in studies for task in tasks(study, options.out, options.seeds, options.longer)]
        wanted.sort(key=turn)
    run(wanted, rows, options.jobs, end)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train-baseline"]:
        train_baseline(sys.argv[2:])
    else:
        main(parse_args())

"""How much there is to choose in a search space, and how well a supernet sees it.

    python -m bench.spaces                              30 random legal candidates, each trained alone
    python -m bench.spaces --jobs 10 --seconds 240      ten at a time; ends after four minutes
    python -m bench.spaces --supernet 0 1               before them two supernets, and scores all in these
    python -m bench.spaces --supernet 0 --steps 6000 --heldout-per-class 300    another supernet
    python -m bench.spaces --report                     prints the numbers of docs/experiments.md
    python -m bench.spaces FILE...                      the same of another space

By default of `varied`, on two data sets: the bundled images, and in data/cifar10-10000 the first 10,000 training images
of CIFAR-10 and its test images, by `python data/make_cifar10.py --per-class 1000 1000 --out data/cifar10-10000`. A FILE
has a space and the settings of supernet.py and scratch.py. Candidates are uniform among those under the limit of the
file, by default that of a search. The first ten are trained again with a second seed: the standard deviation of true
accuracies should be at least twice that between two trainings of one candidate. Each training takes one thread, and is
kept when it ends, as a line of bench/results/spaces.jsonl: the same command resumes. The report also says how far
parameters, FLOPs and latency differ among legal candidates, and Kendall's tau between accuracies and the scores of the
supernet, top-1 and loss.
"""

import argparse
import hashlib
import itertools
import json
import pathlib
import statistics
import time

import numpy as np
import torch

import scratch
import tester
import utils
from bench import study
from devices.table import measure_table, open_runtime, with_latency
from images.dataset import scan
from space.limits import make_bounds
from training.evaluation import evaluate

RESULTS = study.RESULTS / "spaces.jsonl"
SETTINGS = [study.ROOT / "bench" / f"varied_{name}.yml" for name in ("fashion", "cifar")]
CANDIDATES = 30
REPEATED = 10
LEGAL = 5000  # random legal candidates whose costs are compared


class Study:
    """What a settings file says: its space, its limits, its candidates."""

    def __init__(self, path, more=()):
        self.path = pathlib.Path(path)
        self.name = self.path.stem
        self.words = ["--config", str(self.path.resolve()), *more]
        args = scratch.parse_args(self.words)
        n_classes = len(scan(pathlib.Path(args.data_dir, "val")).classes)
        self.space = scratch.space_of(args, args.input_size, n_classes)
        content = utils.read_yaml(path)
        limits = content.get("search", {}).get("limit", ())
        self.bounds = make_bounds(self.space, [limits] if isinstance(limits, str) else limits)
        self.iterations = args.iterations
        self.key = {
            "study": self.name,
            "space": self.space.to_dict(),
            "settings": {name: content[name] for name in ("common", "supernet", "scratch")},
        }

    @property
    def digest(self):
        """Of all that its results depend on."""
        return hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:16]

    def folder(self, out):
        """Of the commands' outputs, another one when the settings have changed."""
        return out / f"{self.name}-{self.digest[:8]}"

    def legal(self, n, seed=0):
        """`n` different candidates, uniform among the legal ones."""
        return study.random_legal(self.space, self.bounds, n, seed)

    def rows(self, kind="training"):
        """The lines of RESULTS that belong to this study."""
        lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
        return [row for row in map(json.loads, lines) if row["kind"] == kind and self.key.items() <= row.items()]

    def done(self):
        """The keys of its tasks in RESULTS."""
        names = {"training": ("architecture", "seed"), "supernet": ("seed", "steps", "heldout")}
        return [[self.name, k, *map(row.get, names[k])] for k in names for row in self.rows(k)]

    def keep(self, kind, row):
        row = {"kind": kind, **self.key, **row, "versions": utils.versions(), "commit": utils.commit()}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with open(RESULTS, "a") as file:
            file.write(json.dumps(row) + "\n")

    # --- its tasks --------------------------------------------------------------------------------------------

    def trainings(self, out):
        """The Tasks [study, "training", candidate, seed]: all candidates, the first ones with two seeds."""
        for i, candidate in enumerate(self.legal(CANDIDATES)):
            for seed in (0, 1) if i < REPEATED else (0,):
                folder = self.folder(out) / "alone" / f"{''.join(map(str, candidate))}-{seed}"
                key = [self.name, "training", list(candidate), seed]
                words = [*self.words, "--seed", seed, *study.of_steps(self.iterations)]
                yield study.retraining(key, words, self.space.to_architecture(candidate), folder)

    def supernet(self, seed, out, steps=None, heldout=None):
        """The Task [study, "supernet", seed, steps, heldout].

        It trains a supernet for `steps`, with `heldout` images of a class held out; by default as the file says.
        """
        words, name = [*self.words, "--seed", seed, *study.ONE_THREAD], str(seed)
        if steps:
            words += ["--iterations", steps, "--val-every", steps]
            name += f"-{steps}"
        if heldout:
            words += ["--heldout-per-class", heldout]
            name += f"-heldout-{heldout}"
        command = study.Command("supernet.py", words, self.folder(out) / name)
        return study.Task([self.name, "supernet", seed, steps, heldout], command)

    def keep_task(self, task):
        """Keeps what a task of the two kinds has found: of a supernet, the scores of the candidates in it."""
        kind, *key = task.key[1:]
        if kind == "training":
            return self.keep(kind, task.numbers() | {"seed": key[1]})
        seed, steps, heldout = key
        words = [*self.words, "--out", str(task.command.folder), "--threads", "1"]
        if heldout:
            words += ["--heldout-per-class", str(heldout)]
        args = tester.parse_args(words)
        supernet, calibration, validation = tester.open_supernet(args)
        measured = evaluate(supernet, self.legal(CANDIDATES), calibration, validation, args.bn)
        scores = [{name: m[name] for name in ("architecture", "acc1", "loss")} for m in measured]
        row = {"seed": seed, "steps": steps, "heldout": heldout, "n_images": measured[0]["n_images"]}
        self.keep(kind, row | {"cpu_seconds": task.command.cpu_seconds, "scores": scores})


# --- report ---------------------------------------------------------------------------------------------------


def summary(of):
    """The numbers of a Study's row in the table; those that need what is missing are left out."""
    rows = of.rows()
    by_key = {(tuple(row["architecture"]), row["seed"]): row for row in rows}
    first = {c: row["acc1"] for (c, seed), row in by_key.items() if seed == 0}
    pairs = [(first[c], row["acc1"]) for (c, seed), row in by_key.items() if seed == 1 and c in first]
    found = {"study": of.name, "candidates": len(first), "pairs": len(pairs)}
    if len(first) < 2 or len(pairs) < 2:
        return found
    found["mean"] = statistics.fmean(first.values())
    found["spread"] = [min(first.values()), max(first.values())]
    found["sd"] = statistics.stdev(first.values())
    found["sd_of_trainings"] = (statistics.fmean((a - b) ** 2 for a, b in pairs) / 2) ** 0.5
    found["ratio"] = found["sd"] / found["sd_of_trainings"]
    found["cpu_seconds"] = statistics.median(row["cpu_seconds"] for row in rows)
    found["most_cpu_seconds"] = max(row["cpu_seconds"] for row in rows)
    true = [statistics.fmean(row["acc1"] for (other, _), row in by_key.items() if other == c) for c in first]
    found["tau_flops"] = study.agreement([[of.space.flops(c) for c in first]], true)
    found["tau_params"] = study.agreement([[of.space.params(c) for c in first]], true)
    found["supernets"] = []
    for row in of.rows("supernet"):
        scores = {tuple(s["architecture"]): s for s in row["scores"]}
        found["supernets"].append({
            **{name: row[name] for name in ("seed", "steps", "n_images", "cpu_seconds")},
            "mean": statistics.fmean(s["acc1"] for s in scores.values()),
            "tau_top1": study.agreement([[scores[c]["acc1"] for c in first]], true),
            "tau_loss": study.agreement([[-scores[c]["loss"] for c in first]], true),
        })  # fmt: skip
    return found


def ranges(of, latency=True):
    """{cost: the highest over the lowest among LEGAL random legal candidates, and that of their middle 90%}."""
    space = of.space
    names = ["flops", "params"]
    if latency:
        torch.set_num_threads(1)
        space = with_latency(space, measure_table(open_runtime("torch", space, 1, torch.device("cpu"))))
        names.append("latency")
    legal = of.legal(LEGAL, seed=1)
    found = {}
    for name in names:
        costs = np.array([space.cost(name, c) for c in legal])
        low, high = np.quantile(costs, (0.05, 0.95))
        found[name] = [float(costs.max() / costs.min()), float(high / low)]
    return found


def print_report(studies):
    for each in studies:
        if not each.rows("ranges"):
            each.keep("ranges", {"ranges": ranges(each)})
        print(json.dumps({**summary(each), "ranges": each.rows("ranges")[-1]["ranges"]}, indent=1))


def parse_args(argv=None):
    defaults = {"--jobs": 1, "--seconds": 1e9, "--out": study.ROOT / "demo" / "spaces"}
    parser = study.parser(__doc__, defaults)
    parser.add_argument("files", nargs="*", default=SETTINGS, metavar="FILE")
    parser.add_argument("--supernet", type=int, nargs="+", default=[], metavar="SEED", help="train supernets, too")
    parser.add_argument("--steps", type=int, metavar="N", help="of these supernets, if not those of the file")
    parser.add_argument("--heldout-per-class", type=int, metavar="N", help="if not those of the file")
    parser.add_argument("--report", action="store_true", help="print the numbers of docs/experiments.md")
    parser.add_argument(
        "--more", nargs=argparse.REMAINDER, default=[], help="flags of both scripts, such as --data-dir"
    )
    return parser.parse_args(argv)


def main(options):
    studies = {each.name: each for each in (Study(path, options.more) for path in options.files)}
    other = options.out, options.steps, options.heldout_per_class
    tasks = [each.supernet(seed, *other) for each in studies.values() for seed in options.supernet]
    in_turns = itertools.zip_longest(*(each.trainings(options.out) for each in studies.values()))
    tasks += [task for turn in in_turns for task in turn if task]

    def done():
        return [key for each in studies.values() for key in each.done()]

    def keep(task):
        studies[task.key[0]].keep_task(task)
        print(f"{task.key}: kept", flush=True)

    with study.interruptible():
        study.run(lambda: tasks, done, keep, options.jobs, time.time() + options.seconds)
    if options.report:
        print_report(studies.values())


if __name__ == "__main__":
    utils.run_script(main, parse_args)

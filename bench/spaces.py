"""How much there is to choose in a search space, and how well a supernet sees it.

    python bench/spaces.py                              30 random legal candidates, each trained alone
    python bench/spaces.py --jobs 10 --seconds 240      ten at a time; ends after four minutes
    python bench/spaces.py --supernet 0 1               also trains two supernets, and scores them in these
    python bench/spaces.py --supernet 0 --steps 6000 --heldout-per-class 300    another supernet
    python bench/spaces.py --report                     prints the numbers of docs/experiments.md
    python bench/spaces.py FILE...                      the same of another space

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
import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # search.py is that of the root

import utils

# isort: split
import numpy as np
import torch
from scipy.stats import kendalltau

import scratch
import tester
from devices.table import measure_table, open_runtime, with_latency
from images.dataset import scan
from space.limits import Limits, make_bounds
from training.evaluation import evaluate
from utils import read_yaml, write_json

RESULTS = ROOT / "bench" / "results" / "spaces.jsonl"
SETTINGS = [ROOT / "bench" / f"varied_{name}.yml" for name in ("fashion", "cifar")]
CANDIDATES = 30
REPEATED = 10
DRAWS = 1000  # of the bootstrap
LEGAL = 5000  # random legal candidates whose costs are compared


class Study:
    """What a settings file says: its space, its limits, its candidates."""

    def __init__(self, path, more=()):
        self.path = pathlib.Path(path)
        self.name = self.path.stem
        self.words = ["--config", str(path), *more]
        args = scratch.parse_args(self.words)
        n_classes = len(scan(pathlib.Path(args.data_dir, "val")).classes)
        self.space = scratch.space_of(args, args.input_size, n_classes)
        content = read_yaml(path)
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
        limits = Limits(self.space, self.bounds)
        rng = random.Random(seed)
        found = {}
        while len(found) < n:
            candidate = self.space.random_candidate(rng)
            if not limits.excess(candidate):
                found[candidate] = None
        return list(found)

    def tasks(self):
        """(candidate, seed) of every training."""
        return [(c, seed) for i, c in enumerate(self.legal(CANDIDATES)) for seed in ((0, 1) if i < REPEATED else (0,))]

    def rows(self, kind="training"):
        """The lines of RESULTS that belong to this study."""
        lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
        return [row for row in map(json.loads, lines) if row["kind"] == kind and self.key.items() <= row.items()]

    def missing(self):
        done = {(tuple(row["architecture"]), row["seed"]) for row in self.rows()}
        return [task for task in self.tasks() if task not in done]

    def keep(self, kind, row):
        row = {"kind": kind, **self.key, **row, "versions": utils.versions(), "commit": utils.commit()}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with open(RESULTS, "a") as file:
            file.write(json.dumps(row) + "\n")


# --- trainings ------------------------------------------------------------------------------------------------


def train(study, candidate, seed):
    """A candidate retrained by scratch.py, on one thread: what it prints, and the CPU-seconds that it took."""
    start = time.process_time()
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "architecture.json")
        write_json(path, study.space.to_architecture(candidate))
        words = ["--architecture", path, "--out", folder, "--seed", seed, "--threads", 1, "--workers", 0]
        words += ["--val-every", study.iterations, "--save-every", study.iterations]
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            scratch.main(scratch.parse_args([*study.words, *map(str, words)]))
    result = json.loads(printed.getvalue().splitlines()[-1])
    numbers = {name: result[name] for name in ("architecture", "flops", "params", "acc1", "n_images")}
    return {**numbers, "seed": seed, "cpu_seconds": round(time.process_time() - start, 1)}


def _train(task):
    study, candidate, seed = task
    return study, train(study, candidate, seed)


def run_trainings(studies, jobs, end):
    """Runs what is missing, `jobs` trainings at a time; those that have not ended at the time `end` are given up."""
    missing = [[(study, *task) for task in study.missing()] for study in studies]
    tasks = [task for tasks in itertools.zip_longest(*missing) for task in tasks if task]
    if not tasks or not jobs:
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:  # ends its processes when it is left
        results = pool.imap_unordered(_train, tasks)
        for number in range(1, len(tasks) + 1):
            try:
                study, row = results.next(timeout=max(0, end - time.time()))
            except multiprocessing.TimeoutError:
                print(f"out of time: {len(tasks) - number + 1} trainings are left", flush=True)
                break
            study.keep("training", row)
            print(f"{number} of {len(tasks)}: {study.name} {row}", flush=True)


class Command:
    """A command of this project in a folder of its own, a process of one thread; run again, it resumes."""

    def __init__(self, script, words, folder):
        self.words = [sys.executable, str(ROOT / script), *map(str, words), "--out", str(folder), "--threads", "1"]
        self.folder = pathlib.Path(folder)
        self.child = None

    def start(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "stdout", "w") as out, open(self.folder / "stderr", "w") as errors:
            self.child = subprocess.Popen(self.words, stdout=out, stderr=errors)

    def done(self):
        """Whether it has ended well."""
        path = self.folder / "costs.jsonl"
        return path.exists() and json.loads(path.read_text().splitlines()[-1])["exit"] == 0

    def running(self):
        return self.child is not None and not os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)

    def end(self):
        """Ends the process if it runs; it writes a checkpoint then. Returns its exit code.

        Adds its CPU-seconds, and those of its own processes, to costs.jsonl.
        """
        if self.running():
            self.child.terminate()
        _, status, usage = os.wait4(self.child.pid, 0)
        self.child.returncode = code = os.waitstatus_to_exitcode(status)
        self.child = None
        with open(self.folder / "costs.jsonl", "a") as file:
            row = {"cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1), "exit": code}
            file.write(json.dumps(row) + "\n")
        return code

    @property
    def cpu_seconds(self):
        """Of all processes up to now."""
        rows = map(json.loads, (self.folder / "costs.jsonl").read_text().splitlines())
        return round(sum(row["cpu_seconds"] for row in rows), 1)

    def result(self):
        """What the command printed last."""
        return json.loads((self.folder / "stdout").read_text().splitlines()[-1])


@contextlib.contextmanager
def interruptible():
    """Within the block, SIGTERM does what Ctrl-C does: commands end with a checkpoint, and their costs are kept."""
    try:
        with utils.signals(utils.interrupt):
            yield
    except utils.Interrupted:
        raise KeyboardInterrupt from None


def supernet_command(study, seed, out, steps=None, heldout=None):
    """Trains a supernet for `steps`, with `heldout` images of a class held out; by default as in the study's file."""
    words = [*study.words, "--seed", seed, "--workers", 0]
    name = str(seed)
    if steps:
        words += ["--iterations", steps, "--val-every", steps]
        name += f"-{steps}"
    if heldout:
        words += ["--heldout-per-class", heldout]
        name += f"-heldout-{heldout}"
    return Command("supernet.py", words, study.folder(out) / name)


def score(study, seed, command, steps, heldout):
    """Keeps the scores of the study's candidates in a supernet of `supernet_command`."""
    words = [*study.words, "--out", str(command.folder), "--threads", "1"]
    if heldout:
        words += ["--heldout-per-class", str(heldout)]
    args = tester.parse_args(words)
    supernet, calibration, validation = tester.open_supernet(args)
    measured = evaluate(supernet, study.legal(CANDIDATES), calibration, validation, args.bn)
    scores = [{name: m[name] for name in ("architecture", "acc1", "loss")} for m in measured]
    row = {"seed": seed, "steps": steps, "heldout": heldout, "n_images": measured[0]["n_images"]}
    study.keep("supernet", row | {"cpu_seconds": command.cpu_seconds, "scores": scores})


# --- report ---------------------------------------------------------------------------------------------------


def tau(a, b):
    """(Kendall's tau, low, high): with the 95% interval of a bootstrap over the candidates."""
    a, b = np.array(a), np.array(b)  # fmt: skip
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(a), size=len(a)) for _ in range(DRAWS)]
    taus = [kendalltau(a[draw], b[draw]).statistic for draw in draws]
    return [float(kendalltau(a, b).statistic), *np.nanquantile(taus, (0.025, 0.975)).tolist()]


def summary(study):
    """The numbers of a study's row in the table; those that need what is missing are left out."""
    rows = study.rows()
    by_key = {(tuple(row["architecture"]), row["seed"]): row for row in rows}
    first = {c: row["acc1"] for (c, seed), row in by_key.items() if seed == 0}
    pairs = [(first[c], row["acc1"]) for (c, seed), row in by_key.items() if seed == 1 and c in first]
    found = {"study": study.name, "candidates": len(first), "pairs": len(pairs)}
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
    found["tau_flops"] = tau([study.space.flops(c) for c in first], true)
    found["tau_params"] = tau([study.space.params(c) for c in first], true)
    found["supernets"] = []
    for row in study.rows("supernet"):
        scores = {tuple(s["architecture"]): s for s in row["scores"]}
        found["supernets"].append({
            "seed": row["seed"],
            "steps": row["steps"],
            "n_images": row["n_images"],
            "cpu_seconds": row["cpu_seconds"],
            "mean": statistics.fmean(s["acc1"] for s in scores.values()),
            "tau_top1": tau([scores[c]["acc1"] for c in first], true),
            "tau_loss": tau([-scores[c]["loss"] for c in first], true),
        })  # fmt: skip
    return found


def ranges(study, latency=True):
    """{cost: the highest over the lowest among LEGAL random legal candidates, and that of their middle 90%}."""
    space = study.space
    names = ["flops", "params"]
    if latency:
        torch.set_num_threads(1)
        space = with_latency(space, measure_table(open_runtime("torch", space, 1, torch.device("cpu"))))
        names.append("latency")
    legal = study.legal(LEGAL, seed=1)
    found = {}
    for name in names:
        costs = np.array([space.cost(name, c) for c in legal])
        low, high = np.quantile(costs, (0.05, 0.95))
        found[name] = [float(costs.max() / costs.min()), float(high / low)]
    return found


def print_report(studies):
    for study in studies:
        kept = study.rows("ranges")
        if not kept:
            study.keep("ranges", {"ranges": ranges(study)})
        print(json.dumps({**summary(study), "ranges": study.rows("ranges")[-1]["ranges"]}, indent=1))


def main(options):
    studies = [Study(path, options.more) for path in options.files]
    end = time.time() + options.seconds
    other = (options.steps, options.heldout_per_class)
    done = [
        (study.name, row["seed"], row["steps"], row["heldout"]) for study in studies for row in study.rows("supernet")
    ]
    supernets = {
        (study, seed): supernet_command(study, seed, options.out, *other)
        for study, seed in itertools.product(studies, options.supernet or ())
        if (study.name, seed, *other) not in done
    }
    with interruptible():
        try:
            for command in supernets.values():
                if not command.done():
                    command.start()
            run_trainings(studies, options.jobs, end)
            for (study, seed), command in supernets.items():
                while command.running() and time.time() < end:
                    time.sleep(0.2)
                if command.done() or command.end() == 0:
                    score(study, seed, command, *other)
                    print(f"{study.name}: scored in the supernet of seed {seed}", flush=True)
        finally:
            for command in supernets.values():
                if command.child:
                    command.end()
    if options.report:
        print_report(studies)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=SETTINGS, metavar="FILE")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default: 1)")
    parser.add_argument("--seconds", type=float, default=1e9, help="give up what has not ended by then")
    parser.add_argument("--supernet", type=int, nargs="+", metavar="SEED", help="train supernets, too, beside these")
    parser.add_argument("--steps", type=int, metavar="N", help="of these supernets, if not those of the file")
    parser.add_argument("--heldout-per-class", type=int, metavar="N", help="if not those of the file")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "demo" / "spaces", help="folder of the supernets")
    parser.add_argument("--report", action="store_true", help="print the numbers of docs/experiments.md")
    parser.add_argument(
        "--more", nargs=argparse.REMAINDER, default=[], help="flags of both scripts, such as --data-dir"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    utils.run_script(main, parse_args)

"""Runs the whole pipeline on the bundled images, in at most 700 CPU-seconds: `make demo`.

Runs the four commands as they would be typed, with outputs in OUT (default: demo/), and ends with a table: where the
retrained winner stands among random candidates that were retrained in the same way (bench/demo_study.py made them,
bench/results/demo_truth.json has them). The exit code is 1 unless the winner beats their mean, and logistic regression
on the same pixels. Finished steps are not repeated: an interrupted demo resumes, and a finished one only prints its
table (`rm -r demo` starts anew).
"""

import argparse
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import time

import torch
from scipy.stats import percentileofscore

import scratch
import utils
from dataloader import Loader
from engines.generations import Generation
from engines.search_files import read_generations
from images.dataset import DataConfig, evaluation_plan, open_data
from settings.subjects import Images
from space.custom import searched
from utils import HERE, UserError, read_json, read_yaml, write_json

TRUTH = HERE / "bench" / "results" / "demo_truth.json"


class Steps:
    """Runs each named step once; keeps its result and its seconds in OUT/demo.json."""

    def __init__(self, out):
        self.path = out / "demo.json"
        self.done = read_json(self.path) if self.path.exists() else {}

    def run(self, name, function):
        if name not in self.done:
            start = time.perf_counter()
            value = function()
            self.done[name] = {"value": value, "seconds": time.perf_counter() - start}
            write_json(self.path, self.done, indent=1)
        return self.done[name]["value"]

    def seconds(self, name):
        return self.done[name]["seconds"]


def command(*words):
    """Runs a script of the project; returns the last line that it printed."""
    words = [str(w) for w in words]
    print(f"$ python {shlex.join(words)}", flush=True)
    process = subprocess.Popen([sys.executable, *words], cwd=HERE, stdout=subprocess.PIPE, text=True)
    try:
        output = process.communicate()[0]
    except KeyboardInterrupt:  # as from a terminal, which sends it to the script too
        process.wait()
        raise
    print(output, flush=True)
    if process.returncode:
        sys.exit(f"demo: {words[0]} ended with exit code {process.returncode}")
    return output.splitlines()[-1]


def logistic_regression(args):
    """Top-1 in percent on val of multinomial logistic regression on pixels, trained on all of train, L2 weight 1e-3."""
    config = DataConfig.resolve(DataConfig.given(vars(args)))
    data = open_data(Images.of(vars(args)), config, args.demo)

    def pixels(images):
        batches = list(Loader(images, config, False, backend=args.loader).batches(evaluation_plan(len(images), 500)))
        return torch.cat([x.flatten(1) / 255 for x, _ in batches]), torch.cat([y for _, y in batches])

    x, y = pixels(data.train)
    x_val, y_val = pixels(data.val)
    model = torch.nn.Linear(x.shape[1], len(data.classes))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y) + 1e-3 * model.weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.inference_mode():
        return (model(x_val).argmax(1) == y_val).double().mean().item() * 100


def read_truth():
    """(rows of the random candidates, row of the largest legal one) of TRUTH, all of seed 0 and of whole length."""
    found = read_json(TRUTH)
    whole = [r for r in found["rows"] if r["seed"] == 0 and r["iterations"] == found["settings"]["iterations"]]
    (largest,) = [r for r in whole if r["architecture"] == found["largest"]]
    return [r for r in whole if r is not largest], largest


def table(out, steps):
    """Prints the table of a finished demo; returns its numbers."""
    winner = json.loads(steps.done["winner"]["value"])
    regression = steps.done["logistic regression"]["value"]
    generations = read_generations(out)
    random_ones, largest = read_truth()
    settings = searched(out / "checkpoints" / "best.json")
    space = settings["space"]
    measured = [r for generation in generations for r in generation]
    first = Generation(1, generations[0], closed=True)
    best = next(r for r in measured if r["architecture"] == winner["architecture"])
    others = [r["acc1"] for r in random_ones]
    mean = statistics.fmean(others)
    sd = statistics.stdev(others)
    costs = best["flops"], winner["params"]

    def row(name, measured_on, acc1, flops=None, params=None, step=None):
        cells = (
            flops and f"{flops / 1e6:.2f}",
            params and f"{params / 1e3:.1f}",
            step and f"{steps.seconds(step):.0f}",
        )
        costs = " | ".join(f"{cell or '':>{width}}" for cell, width in zip(cells, (5, 6, 7)))
        print(f"| {name:<50} | {measured_on:<8} | {acc1:6.2f} | {costs} |")

    print(f"\n| {'':<50} | images   | top-1  | FLOPs | params | seconds |")
    print(f"|{'-' * 52}|{'-' * 10}|{'-' * 8}|{'-' * 7}|{'-' * 8}|{'-' * 9}|")
    row(f"supernet, mean of {len(first.succeeded)} random candidates", "held-out", first.mean, step="supernet")
    row(f"best of the search, {len(measured)} candidates, in the supernet", "held-out", best["acc1"], *costs, "search")
    row("best of the search, retrained", "test", winner["acc1"], *costs, "winner")
    row(f"mean of {len(others)} random legal candidates, retrained", "test", mean)
    row("best of these", "test", max(others))
    row("the largest legal candidate, retrained", "test", largest["acc1"], largest["flops"], largest["params"])
    weights = 3 * space.input_size**2 * space.n_classes
    row("logistic regression on the same pixels", "test", regression, weights, weights + space.n_classes,
        "logistic regression")  # fmt: skip
    place = float(percentileofscore(others, winner["acc1"], "mean"))
    print(f"\nThe winner is at percentile {place:.0f} of the random candidates, whose standard deviation is {sd:.2f}.")
    limit = settings["flops_limit"] / 1e6
    print(f"FLOPs (multiply-adds) in millions, parameters in thousands; the limit was {limit:.3f}M FLOPs.")
    return {
        "supernet": first.mean, "winner": winner["acc1"], "percentile": place, "largest": largest["acc1"], "mean": mean,
        "regression": regression,
    }  # fmt: skip


def check(out, steps):
    """Raises UserError if the folder has an unfinished demo of another version, whose supernet has other operations."""
    config = out / "checkpoints" / "supernet" / "config.yml"
    if "table" in steps.done or not config.exists():
        return
    if read_yaml(config).get("space") != read_yaml(HERE / "demo.yml")["space"]:
        raise UserError(
            f"{out}: has an unfinished demo of another search space than demo.yml's; remove it: rm -r {out}"
        )


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=HERE / "demo", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--seed", default=0, type=int)
    text = "after --: flags of supernet.py and scratch.py, such as --iterations 20"
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help=text)
    return parser.parse_args(argv)


def main(options):
    out = options.out.resolve()
    overrides = options.overrides[1:]
    out.mkdir(parents=True, exist_ok=True)
    common = ("--demo", "--seed", options.seed, "--out", out)
    steps = Steps(out)
    check(out, steps)
    given = {"seed": options.seed, "overrides": overrides}
    before = steps.done["flags"]["value"] if "flags" in steps.done else given  # older ones don't tell
    if before != given:
        raise UserError(f"{out}: has a demo with {before}, not {given}; name another --out, or remove it")
    if not steps.done:
        steps.run("flags", lambda: given)

    steps.run("supernet", lambda: command("supernet.py", *common, *overrides))
    steps.run("search space", lambda: command("tester.py", "--mode", "gen", "--demo", "--out", out))
    resume = ["--resume"] if (out / "acc").exists() else []
    steps.run("search", lambda: command("search.py", *common, *resume))
    best = ("--architecture", out / "checkpoints" / "best.json")
    steps.run("winner", lambda: command("scratch.py", *common, *best, *overrides))
    steps.run("logistic regression", lambda: logistic_regression(scratch.parse_args(["--demo"])))
    numbers = table(out, steps)
    steps.run("table", lambda: numbers)
    print(f"The four commands took {sum(step['seconds'] for step in steps.done.values()):.0f} s.")
    if not overrides and numbers["winner"] <= max(numbers["mean"], numbers["regression"]):
        sys.exit("demo: the winner should beat the mean of the random candidates, and logistic regression")


if __name__ == "__main__":
    utils.run_script(main, parse_args)

"""Runs the whole pipeline on the bundled images, in at most 15 minutes on two CPU cores: `make demo`.

Runs the four commands as they would be typed, with outputs in OUT (default: demo/), and ends with a table. The exit
code is 1 unless the retrained winner of the search reaches 86% top-1 on the test images and beats logistic regression
on the same pixels. It is compared with a random candidate, the first legal one drawn, fixed before the search.
Finished steps are not repeated: an interrupted demo resumes, and a finished one only prints its table (`rm -r demo`
starts anew).
"""

import argparse
import json
import pathlib
import random
import shlex
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import scratch
from dataloader import Loader
from engines.search_record import read_results
from images.dataset import Data, DataConfig, evaluation_plan, prepare
from network import ShuffleNetV2OneShot
from space.search_space import SearchSpace
from utils import read_json, write_json

TARGET = 86.0  # percent, top-1 of the retrained winner


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
    (line,) = commands(words)
    return line


def commands(*several):
    """Runs several scripts of the project at the same time; returns the last line that each printed."""
    several = [[str(w) for w in words] for words in several]
    for words in several:
        print(f"$ python {shlex.join(words)}", flush=True)
    processes = [
        subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True) for words in several
    ]
    try:
        outputs = [process.communicate()[0] for process in processes]
    except KeyboardInterrupt:  # as from a terminal, which sends it to the scripts too
        for process in processes:
            process.wait()
        raise
    for words, process, output in zip(several, processes, outputs):
        print(output, flush=True)
        if process.returncode:
            sys.exit(f"demo: {words[0]} ended with exit code {process.returncode}")
    return [output.splitlines()[-1] for output in outputs]


def logistic_regression(args):
    """Top-1 in percent on val of multinomial logistic regression on pixels, trained on all of train, L2 weight 1e-3."""
    config = DataConfig.from_args(args)
    data = Data(args, config)

    def pixels(images):
        batches = list(Loader(images, config, False, backend=args.loader).batches(evaluation_plan(len(images), 500)))
        return torch.cat([x.flatten(1) / 255 for x, _ in batches]), torch.cat([y for _, y in batches])

    (x, y), (x_val, y_val) = pixels(data.train), pixels(data.val)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=ROOT / "demo", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        help="after --: flags of supernet.py and scratch.py, such as --iterations 20",
    )
    options = parser.parse_args()
    out, overrides = options.out.resolve(), options.overrides[1:]
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    common = ("--demo", "--seed", options.seed)
    steps = Steps(out)

    steps.run("supernet", lambda: command("supernet.py", *common, "--out", out, *overrides))
    command("tester.py", "--mode", "gen", "--out", out)
    args = scratch.parse_args(["--demo"])
    prepare(args)
    config = DataConfig.from_args(args)
    space = SearchSpace.for_images(config.input_size, len(Data(args, config).classes))
    limit, rng = space.flops_value("59%"), random.Random(options.seed)
    chosen = next(c for c in iter(lambda: space.random_candidate(rng), None) if space.flops(c) <= limit)
    write_json(out / "random.json", space.to_architecture(chosen))
    test = ("tester.py", "--mode", "test", *common, "--out", out, "--architecture", out / "random.json")
    in_supernet = json.loads(steps.run("random in supernet", lambda: command(*test)))
    resume = ["--resume"] if (out / "acc").exists() and "search" not in steps.done else []
    steps.run("search", lambda: command("search.py", *common, "--out", out, *resume))
    # At the same time on one thread each, which on small images is faster than one after the other on two threads.
    both = [
        ("scratch.py", *common, "--threads", 1, "--architecture", file, "--out", out / name, *overrides)
        for name, file in (("winner", out / "checkpoints" / "best.json"), ("random", out / "random.json"))
    ]
    retrained = dict(zip(("winner", "random"), map(json.loads, steps.run("retrained", lambda: commands(*both)))))
    regression = steps.run("logistic regression", lambda: logistic_regression(args))

    measured = read_results(out)
    first_population = [json.loads(line) for line in (out / "acc" / "000.jsonl").read_text().splitlines()]
    winner_candidate = space.load_architecture(out / "checkpoints" / "best.json")
    winner = next(r for r in measured if tuple(r["architecture"]) == winner_candidate)

    def row(name, measured_on, acc1, flops, params, seconds):
        numbers = f"{acc1:6.2f} | {flops / 1e6:5.2f} | {params / 1e6:6.2f} | {seconds:7.0f}"
        print(f"| {name:<50} | {measured_on:<8} | {numbers} |")

    def candidate_row(name, measured_on, acc1, candidate, seconds):
        row(name, measured_on, acc1, space.flops(candidate), space.params(candidate), seconds)

    def retrained_row(name, key, candidate):
        candidate_row(name, "test", retrained[key]["acc1"], candidate, retrained[key]["seconds"])

    print(f"\n| {'':<50} | images   | top-1  | FLOPs | params | seconds |")
    print(f"|{'-' * 52}|{'-' * 10}|{'-' * 8}|{'-' * 7}|{'-' * 8}|{'-' * 9}|")
    drawn = [r for r in first_population if r["acc1"] is not None]
    acc1, flops = (sum(r[key] for r in drawn) / len(drawn) for key in ("acc1", "flops"))
    supernet_params = sum(p.numel() for p in ShuffleNetV2OneShot(space=space).parameters())
    name = f"supernet, mean of {len(drawn)} random candidates"
    row(name, "held-out", acc1, flops, supernet_params, steps.seconds("supernet"))
    name = f"best of the search, {len(measured)} candidates, in the supernet"
    candidate_row(name, "held-out", winner["acc1"], winner_candidate, steps.seconds("search"))
    seconds = steps.seconds("random in supernet")
    candidate_row("a random candidate, in the supernet", "held-out", in_supernet["acc1"], chosen, seconds)
    retrained_row("best of the search, retrained", "winner", winner_candidate)
    retrained_row("the random candidate, retrained", "random", chosen)
    weights, seconds = 3 * config.input_size**2 * space.n_classes, steps.seconds("logistic regression")
    row("logistic regression on the same pixels", "test", regression, weights, weights + space.n_classes, seconds)
    print(f"\nFLOPs (multiply-adds) and parameters in millions; the limit of the search was {limit / 1e6:.1f}M.")
    print(f"This run took {time.perf_counter() - start:.0f} s.")
    if not overrides and not max(TARGET, regression) <= retrained["winner"]["acc1"]:
        sys.exit(f"demo: the winner should reach {TARGET}% and beat logistic regression, {regression:.2f}%")


if __name__ == "__main__":
    main()

"""The whole pipeline on the bundled images, at most 15 minutes on two CPU cores: `make demo`.

Runs the four commands as a person would type them, below OUT (default: demo/), and ends with a table. The winner of the
search must reach 86% on the test images and beat logistic regression on the same pixels, or the exit code is 1. The random
candidate is the first legal draw of the seed and is fixed before the search. What is finished is not run again:
an interrupted demo goes on, and a finished one only prints its table (`rm -r demo` starts anew).
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
    """Runs each named step once, and keeps what it returned and the seconds it took in OUT/demo.json."""

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
    """Runs one of the project's scripts; returns the last line that it printed."""
    (line,) = commands(words)
    return line


def commands(*several):
    """Runs several of the project's commands at the same time; returns the last line that each printed."""
    several = [[str(w) for w in words] for words in several]
    for words in several:
        print(f"$ python {shlex.join(words)}", flush=True)
    processes = [
        subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True) for words in several
    ]
    outputs = [process.communicate()[0] for process in processes]
    for words, process, output in zip(several, processes, outputs):
        print(output, flush=True)
        if process.returncode:
            sys.exit(f"demo: {words[0]} ended with exit code {process.returncode}")
    return [output.splitlines()[-1] for output in outputs]


def logistic_regression(args):
    """Top-1 percent on val of multinomial logistic regression on the same pixels, all of train, L2 weight 1e-3."""
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
        help="after --: flags for supernet.py and scratch.py, such as --iterations 20",
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
    # Side by side on one thread each: on small images two networks train in less time than one after the other on two threads.
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
        print(
            f"| {name:<50} | {measured_on:<8} | {acc1:6.2f} | {flops / 1e6:5.2f} | {params / 1e6:6.2f} | {seconds:7.0f} |"
        )

    def candidate_row(name, measured_on, acc1, candidate, seconds):
        row(name, measured_on, acc1, space.flops(candidate), space.params(candidate), seconds)

    print(f"\n| {'':<50} | images   | top-1  | FLOPs | params | seconds |")
    print(f"|{'-' * 52}|{'-' * 10}|{'-' * 8}|{'-' * 7}|{'-' * 8}|{'-' * 9}|")
    drawn = [r for r in first_population if r["acc1"] is not None]
    acc1, flops = (sum(r[key] for r in drawn) / len(drawn) for key in ("acc1", "flops"))
    supernet_params = sum(p.numel() for p in ShuffleNetV2OneShot(space=space).parameters())
    row(
        f"supernet, mean of {len(drawn)} random candidates",
        "held-out",
        acc1,
        flops,
        supernet_params,
        steps.seconds("supernet"),
    )
    name = f"best of the search, {len(measured)} candidates, in the supernet"
    candidate_row(name, "held-out", winner["acc1"], winner_candidate, steps.seconds("search"))
    candidate_row(
        "a random candidate, in the supernet",
        "held-out",
        in_supernet["acc1"],
        chosen,
        steps.seconds("random in supernet"),
    )
    candidate_row(
        "best of the search, retrained",
        "test",
        retrained["winner"]["acc1"],
        winner_candidate,
        retrained["winner"]["seconds"],
    )
    candidate_row(
        "the random candidate, retrained", "test", retrained["random"]["acc1"], chosen, retrained["random"]["seconds"]
    )
    weights = 3 * config.input_size**2 * space.n_classes
    row(
        "logistic regression on the same pixels",
        "test",
        regression,
        weights,
        weights + space.n_classes,
        steps.seconds("logistic regression"),
    )
    print(f"\nFLOPs (multiply-adds) and parameters in millions; the limit of the search was {limit / 1e6:.1f}M. "
          f"This run took {time.perf_counter() - start:.0f} s.")  # fmt: skip
    if not overrides and not max(TARGET, regression) <= retrained["winner"]["acc1"]:
        sys.exit(f"demo: the winner should reach {TARGET}% and beat logistic regression, {regression:.2f}%")


if __name__ == "__main__":
    main()

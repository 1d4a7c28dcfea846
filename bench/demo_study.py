"""What the demo's winner is compared with: `python -m bench.demo_study`, an hour on one core.

Trains 60 random legal candidates, drawn uniformly among those under the demo's FLOPs limit, and the largest legal one,
as the demo retrains. A second seed and half the steps, for 20 of them, say how well such trainings rank candidates at
all. Each training is kept when it ends: an interrupted study resumes. Writes bench/results/demo_truth.json, which
bench/demo.py reads; prints the tables of docs/experiments.md.
"""

import math
import statistics

import scratch
import search
import utils
from bench import study
from bench.demo import TRUTH, read_truth
from space.limits import make_bounds

INPUT_SIZE = 28
CLASSES = 10
CANDIDATES = 60
REPEATED = 20


def settings():
    """(SearchSpace, bounds, settings of TRUTH) of the demo."""
    args = search.parse_args(["--demo"])
    retraining = scratch.parse_args(["--demo"])
    space = scratch.space_of(retraining, INPUT_SIZE, CLASSES)
    bounds = make_bounds(space, args.limit or (), args.flops_limit)
    limit = bounds["flops"][1]
    return space, bounds, {"space": space.to_dict(), "flops_limit": limit, "iterations": retraining.iterations}


def trainings(out):
    """The Tasks of all trainings, by keys [architecture, seed, iterations]: those with seed 0 first."""
    space, bounds, of = settings()
    legal, n = study.random_legal(space, bounds, CANDIDATES), of["iterations"]
    wanted = [(c, 0, n) for c in (*legal, study.largest_legal(space, of["flops_limit"]))]
    wanted += [(c, seed, steps) for c in legal[:REPEATED] for seed, steps in ((1, n), (0, n // 2))]
    for candidate, seed, steps in wanted:
        words = ["--demo", "--seed", seed, *study.of_steps(steps)]
        folder = out / f"{''.join(map(str, candidate))}-{seed}-{steps}"
        yield study.retraining([list(candidate), seed, steps], words, space.to_architecture(candidate), folder)


def truth(out, jobs):
    """Trains what TRUTH lacks, and returns its content."""
    space, _, of = settings()
    found = study.read(TRUTH)
    if found.get("settings") != of:
        found = {"settings": of, "largest": list(study.largest_legal(space, of["flops_limit"])), "rows": []}

    def keep(task):
        architecture, seed, steps = task.key
        found["rows"].append({"architecture": architecture, "seed": seed, "iterations": steps, **task.numbers()})
        study.write(TRUTH, found)
        print(found["rows"][-1], flush=True)

    def done():
        return [[row[name] for name in ("architecture", "seed", "iterations")] for row in found["rows"]]

    study.run(lambda: trainings(out), done, keep, jobs, math.inf)
    return found


def agreement(found):
    """[(name, tau with the first seed at whole length)] over the candidates that were trained three times."""
    whole = found["settings"]["iterations"]
    trained = {(tuple(r["architecture"]), r["seed"], r["iterations"]): r for r in found["rows"]}
    repeated = [c for c, seed, _ in trained if seed == 1]
    first = [trained[c, 0, whole] for c in repeated]
    columns = {
        "another seed": [trained[c, 1, whole]["acc1"] for c in repeated],
        "half the steps": [trained[c, 0, whole // 2]["acc1"] for c in repeated],
        "FLOPs": [row["flops"] for row in first],
        "parameters": [row["params"] for row in first],
    }
    true = [row["acc1"] for row in first]
    return [(name, study.tau(column, true)) for name, column in columns.items()]


def print_truth(found):
    random_ones, largest = read_truth()
    acc1 = [row["acc1"] for row in random_ones]
    mean, sd = statistics.fmean(acc1), statistics.stdev(acc1)
    seconds = [row["cpu_seconds"] for row in found["rows"] if row["iterations"] == found["settings"]["iterations"]]
    spread = f"standard deviation {sd:.2f}, {min(acc1):.2f} to {max(acc1):.2f}"
    print(f"\n{len(acc1)} candidates: mean {mean:.2f}%, {spread}")
    print(f"the largest: {largest['acc1']:.2f}%; {statistics.median(seconds):.0f} CPU-seconds each (median)\n")
    rows = [(name, f"{tau:.2f}") for name, tau in agreement(found)]
    print(study.table((f"tau with the truth, {REPEATED} candidates", ""), rows))


def parse_args(argv=None):
    parser = study.parser(__doc__, {"--jobs": 1, "--out": study.ROOT / "demo" / "truth"})
    return parser.parse_args(argv)


def main(options):
    with study.interruptible():
        print_truth(truth(options.out, options.jobs))


if __name__ == "__main__":
    utils.run_script(main, parse_args)

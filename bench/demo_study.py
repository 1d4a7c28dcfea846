"""What the demo's winner is compared with, and how often the demo succeeds.

    python bench/demo_study.py             trains 60 random legal candidates as the demo retrains, an hour on one core
    python bench/demo_study.py --demos 10  then runs the demo with ten seeds, two at a time

The candidates are drawn uniformly among those under the demo's FLOPs limit; the largest legal candidate is trained too.
A second seed and half the steps, for 20 of them, say how well such trainings rank candidates at all. Each training is
kept when it ends: an interrupted study resumes. Writes bench/results/demo_truth.json, which bench/demo.py reads, and
with --demos bench/results/demo_seeds.json. Prints the tables of docs/experiments.md.
"""

import argparse
import concurrent.futures
import contextlib
import io
import itertools
import json
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
from demo import TRUTH, read_truth
from scipy.stats import kendalltau

import scratch
import search
import tester
from space.limits import make_bounds
from training.evaluation import evaluate
from utils import read_json, write_json

SEEDS = ROOT / "bench" / "results" / "demo_seeds.json"
INPUT_SIZE = 28
CLASSES = 10
CANDIDATES = 60
REPEATED = 20


# --- the truth ------------------------------------------------------------------------------------------------


def demo_space():
    """(SearchSpace, FLOPs limit) of the demo."""
    args = search.parse_args(["--demo"])
    space = scratch.space_of(scratch.parse_args(["--demo"]), INPUT_SIZE, CLASSES)
    return space, make_bounds(space, args.limit or (), args.flops_limit)["flops"][1]


def random_legal(space, limit, n):
    """`n` different candidates, uniform among those of at most `limit` FLOPs."""
    rng = random.Random(0)
    found = {}
    while len(found) < n:
        candidate = space.random_candidate(rng)
        if space.flops(candidate) <= limit:
            found[candidate] = None
    return list(found)


def largest_legal(space, limit):
    """The candidate of the most FLOPs, up to `limit`; of equals, the one that comes first."""
    legal = (c for c in itertools.product(*map(range, space.choices)) if space.flops(c) <= limit)
    return max(legal, key=space.flops)


def train(candidate, space, seed, iterations):
    """Top-1 in percent on val of a candidate that is retrained as in the demo, and the CPU-seconds that it took."""
    start = time.process_time()
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "architecture.json")
        write_json(path, space.to_architecture(candidate))
        words = ["--demo", "--architecture", path, "--out", folder, "--seed", seed, "--threads", 1, "--workers", 0]
        words += ["--iterations", iterations, "--val-every", iterations, "--save-every", iterations]
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            scratch.main(scratch.parse_args(list(map(str, words))))
    result = json.loads(printed.getvalue().splitlines()[-1])
    return {"acc1": result["acc1"], "cpu_seconds": round(time.process_time() - start, 1)}


def truth(iterations):
    """Trains what TRUTH lacks, and returns its content."""
    space, limit = demo_space()
    settings = {"space": space.to_dict(), "flops_limit": limit, "iterations": iterations}
    found = read_json(TRUTH) if TRUTH.exists() else {}
    if found.get("settings") != settings:
        found = {"settings": settings, "rows": []}
    legal = random_legal(space, limit, CANDIDATES)
    wanted = [(c, 0, iterations) for c in (*legal, largest_legal(space, limit))]
    wanted += [(c, seed, n) for c in legal[:REPEATED] for seed, n in ((1, iterations), (0, iterations // 2))]
    for candidate, seed, n in wanted:
        key = {"architecture": list(candidate), "seed": seed, "iterations": n}
        if any(key.items() <= row.items() for row in found["rows"]):
            continue
        costs = {"flops": space.flops(candidate), "params": space.params(candidate)}
        found["rows"].append(key | costs | train(candidate, space, seed, n))
        found |= {"largest": list(wanted[CANDIDATES][0]), "commit": utils.commit(), "versions": utils.versions()}
        write_json(TRUTH, found, indent=None)
        print(f"{len(found['rows'])} of {len(wanted)}: {found['rows'][-1]}", flush=True)
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
    return [(name, float(kendalltau(column, true).statistic)) for name, column in columns.items()]


def print_truth(found):
    random_ones, largest = read_truth()
    acc1 = [row["acc1"] for row in random_ones]
    mean = statistics.fmean(acc1)
    sd = statistics.stdev(acc1)
    seconds = [row["cpu_seconds"] for row in found["rows"] if row["iterations"] == found["settings"]["iterations"]]
    print(
        f"\n{len(acc1)} candidates: mean {mean:.2f}%, standard deviation {sd:.2f}, {min(acc1):.2f} to {max(acc1):.2f}"
    )
    print(f"the largest: {largest['acc1']:.2f}%; {statistics.median(seconds):.0f} CPU-seconds each (median)\n")
    print(f"| tau with the truth, {REPEATED} candidates | |\n|---|---|")
    for name, tau in agreement(found):
        print(f"| {name} | {tau:.2f} |")


# --- whole demos ----------------------------------------------------------------------------------------------


def demo(seed, folder):
    """The numbers of a whole demo with a seed: those of its table, its CPU-seconds, and tau of its supernet."""
    out = folder / str(seed)
    words = [sys.executable, ROOT / "bench" / "demo.py", "--seed", str(seed), "--out", out]
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    numbers = read_json(out / "demo.json").get("table", {}).get("value")
    if not numbers:
        sys.exit(f"the demo with seed {seed} ended with exit code {child.returncode}: run this again to resume it")
    random_ones, _ = read_truth()
    args = tester.parse_args(["--demo", "--out", str(out)])
    supernet, calibration, validation = tester.open_supernet(args)
    measured = evaluate(supernet, [r["architecture"] for r in random_ones], calibration, validation, args.bn)
    tau = kendalltau([m["acc1"] for m in measured], [r["acc1"] for r in random_ones]).statistic
    seconds = usage.ru_utime + usage.ru_stime
    return numbers | {"seed": seed, "exit": child.returncode, "tau": float(tau), "cpu_seconds": round(seconds)}


def demos(n, folder):
    """Runs the demo with seeds 0 to n - 1, where SEEDS lacks them; returns their rows."""
    rows = read_json(SEEDS)["rows"] if SEEDS.exists() else []
    missing = [seed for seed in range(n) if seed not in {row["seed"] for row in rows}]
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        for row in concurrent.futures.as_completed(pool.submit(demo, seed, folder) for seed in missing):
            rows = sorted([*rows, row.result()], key=lambda r: r["seed"])
            write_json(SEEDS, {"rows": rows, "commit": utils.commit(), "versions": utils.versions()}, indent=1)
            print(row.result(), flush=True)
    return rows


def print_demos(rows):
    print("\n| seed | mean in the supernet | tau | winner | percentile | largest | CPU-seconds |\n|" + "---|" * 7)
    for r in rows:
        cells = (r["seed"], f"{r['supernet']:.1f}", f"{r['tau']:.2f}", f"{r['winner']:.2f}", f"{r['percentile']:.0f}",
                 f"{r['largest']:.2f}", r["cpu_seconds"])  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |")
    at_90, not_below = (sum(map(test, rows)) for test in (
        lambda r: r["percentile"] >= 90, lambda r: r["winner"] >= r["largest"]))  # fmt: skip
    print(f"\nat the 90th percentile or above: {at_90} of {len(rows)}; not below the largest: {not_below}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demos", type=int, default=0, metavar="N", help="run the demo with N seeds")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "demo" / "seeds", help="folder of these")
    options = parser.parse_args()
    print_truth(truth(scratch.parse_args(["--demo"]).iterations))
    if options.demos:
        print_demos(demos(options.demos, options.out))


if __name__ == "__main__":
    main()

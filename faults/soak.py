"""Checks that nothing grows: `python faults/soak.py` (minutes) and `python faults/soak.py --nni` (ten minutes or more).

Without --nni: ten searches of the demo with a population of 4, one after the other in this process, with `--engine
local`. With it: one search through NNI of 500 trials that compute nothing, where 50 trials count as a round. After each
round it measures the resident memory, the open files and the number of processes of this process and, with --nni, of
NNI's manager and tuner. From the second round on they must be flat: the median of files and of processes no higher,
memory at most 5% higher. Writes its part of bench/results/soak.json; the exit code is 1 if anything grows.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils

# isort: split
import psutil
import torch

import search
import supernet
import tester
from engines.nni_engine import read_experiment, search_with_nni
from engines.search_record import prepare_search, read_results
from space.search_space import SearchSpace

GROWTH = 1.05
SMALL = ["--demo", "--heldout-per-class", "4", "--bn-batches", "2", "--bn-batch-size", "32", "--threads", "1"]
TRIAL = f"""
import sys

sys.path.insert(0, {str(ROOT)!r})
from engines import trial


def evaluate(candidate):
    accuracies = {{"acc1": float(sum(candidate)), "acc5": 99.0}}
    return {{"architecture": candidate, "flops": 0, "n_images": 10, "seconds": 0.0, **accuracies}}


candidates = trial.receive_candidates()
trial.report(map(evaluate, candidates))
"""


def measure(processes):
    """{"memory_mb", "files"} of these processes together, and how many processes this one and those below it are."""
    return {
        "memory_mb": round(sum(p.memory_info().rss for p in processes) / 1e6, 1),
        "files": sum(p.num_fds() for p in processes),
        "processes": 1 + len(psutil.Process().children(recursive=True)),
    }


def local(folder, rounds):
    train = ["--batch-size", "16", "--iterations", "6", "--val-every", "6", "--save-every", "6", "--val-paths", "1"]
    supernet.main(supernet.parse_args([*SMALL, *train, "--out", str(folder / "net")]))
    checkpoint = next((folder / "net" / "checkpoints" / "supernet").glob("*.pth"))
    small = ["--population", "4", "--select", "2", "--mutation", "1", "--crossover", "1", "--generations", "2"]
    small += ["--engine", "local", "--concurrency", "1"]
    paths = ["--checkpoint", str(checkpoint), "--cache", str(folder / "cache")]
    for n in range(rounds):
        out = ["--out", str(folder / str(n))]
        tester.main(tester.parse_args(["--mode", "gen", "--demo", *out]))
        search.main(search.parse_args([*SMALL, *small, *paths, *out]))
        yield measure([psutil.Process()])


def through_nni(folder, rounds):
    space = SearchSpace.for_images(28, 10)
    experiment = read_experiment(ROOT / "config_search.yml")
    evolution = experiment["tuner"]["classArgs"] | {"generations": rounds, "seed": 0}
    settings = evolution | {"flops_limit": space.flops_value("59%"), "space": space.to_dict()}
    (folder / "trial.py").write_text(TRIAL)
    utils.write_json(folder / "nni_auto_gen_search_space.json", space.nni_search_space())
    prepare_search(folder, settings, resume=False)
    found = []
    ended = threading.Event()

    def watch():
        while not ended.wait(0.2):
            if len(read_results(folder)) >= 50 * (len(found) + 1):
                with contextlib.suppress(psutil.NoSuchProcess):
                    lasting = [p for p in psutil.Process().children(recursive=True) if {"main.js", "nni"} & _words(p)]
                    # Without the trials, whose number varies.
                    found.append(measure([psutil.Process(), *lasting]) | {"processes": 1 + len(lasting)})

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        search_with_nni(folder, [sys.executable, str(folder / "trial.py")], experiment, 2, 1)
    finally:
        ended.set()
        watcher.join()
    yield from found
    left = len(psutil.Process().children(recursive=True))
    if left or len(read_results(folder)) != 50 * rounds:
        raise SystemExit(f"{left} processes left, {len(read_results(folder))} results")


def _words(process):
    return {word.rpartition("/")[2] for word in process.cmdline()}


def flat(rows):
    """Whether nothing grows from the second row on: files and processes by their median, since some are short-lived."""
    return all(row["memory_mb"] <= rows[1]["memory_mb"] * GROWTH for row in rows[2:]) and all(
        statistics.median(row[name] for row in rows[2:]) <= rows[1][name] for name in ("files", "processes")
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nni", action="store_true", help="500 trials through NNI")
    parser.add_argument("--rounds", type=int, default=10, help="searches, or generations of 50 trials (default: 10)")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench" / "results" / "soak.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for row in (through_nni if options.nni else local)(pathlib.Path(folder), options.rounds):
            rows.append(row)
            counts = f"files {row['files']:3}  processes {row['processes']}"
            print(f"round {len(rows):2}  memory {row['memory_mb']:7} MB  {counts}", flush=True)
    kept = json.loads(options.results.read_text()) if options.results.exists() else {}
    result = {
        "commit": utils.commit(),
        "versions": utils.versions(),
        "flat": flat(rows),
        "seconds": round(time.perf_counter() - start),
        "rounds": rows,
    }
    utils.write_json(options.results, kept | {"nni" if options.nni else "local": result}, indent=1)
    print("flat from the second round on" if flat(rows) else "GROWS")
    sys.exit(not flat(rows))


if __name__ == "__main__":
    main()

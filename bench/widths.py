"""How well supernets with widths train: `python bench/widths.py`, an hour on one core; it resumes what was interrupted.

Trains supernets of the eight narrow blocks of bench/widths.yml with `supernet.py`, equal steps and three seeds: without
widths, with eight widths beside the operations (joint), and with eight widths at a fixed architecture (channels), the
latter two with and without the warm-up that begins with the widest. Measures 50 uniform candidates of each on the
held-out images, as a search does. Writes bench/results/widths.json and prints the table of docs/experiments.md.
"""

import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils

# isort: split
import yaml

import tester
from images import bundled
from training.evaluation import evaluate

SETTINGS = ROOT / "bench" / "widths.yml"
RESULTS = ROOT / "bench" / "results" / "widths.json"
WIDTHS = [round(0.2 * i, 1) for i in range(1, 9)]
ARCHITECTURE = [0, 1, 2, 3, 0, 1, 2, 3]
# name: (widths, fixed architecture, share of the steps that warm up)
KINDS = {
    "blocks": (False, False, 0),
    "channels": (True, True, 0.25),
    "channels, no warm-up": (True, True, 0),
    "joint": (True, False, 0.25),
    "joint, no warm-up": (True, False, 0),
}


def train(folder, kind, seed, args):
    """Trains a supernet into a folder; returns the mean loss of its last lines of the log."""
    widths, fixed, warmup = KINDS[kind]
    document = yaml.safe_load(SETTINGS.read_text())
    document["common"]["data-dir"] = str(ROOT / "data" / "fashion-mnist")
    if widths:
        document["space"]["widths"] = WIDTHS
    if fixed:
        document["space"]["architecture"] = ARCHITECTURE
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "settings.yml"
    settings.write_text(yaml.safe_dump(document))
    words = [
        "--config",
        settings,
        "--seed",
        seed,
        "--iterations",
        args.iterations,
        "--out",
        folder,
        "--threads",
        args.threads,
    ]
    words += ["--width-warmup", int(warmup * args.iterations), "--lr", args.lr]
    subprocess.run([sys.executable, ROOT / "supernet.py", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    log = (folder / "checkpoints/supernet/log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in log]


def measure(folder, n, threads):
    """Top-1 percent of n uniform candidates, and their mean width."""
    words = ["--config", folder / "settings.yml", "--out", folder, "--threads", threads]
    args = tester.parse_args([str(word) for word in words])
    supernet, calibration, validation = tester.open_supernet(args)
    rng = random.Random(0)
    candidates = [supernet.space.random_candidate(rng) for _ in range(n)]
    results = evaluate(supernet, candidates, calibration, validation, args.bn)
    widths = [statistics.fmean(width for _, width in supernet.space.chosen(c)) for c in candidates]
    return [r["acc1"] for r in results], widths


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "demo" / "widths", help="folder of the supernets")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    settings = {"iterations": args.iterations, "lr": args.lr, "candidates": args.candidates}
    results = utils.read_json(args.results) if args.results.exists() else {"settings": settings, "runs": {}}
    if results["settings"] != settings:
        sys.exit(f"{args.results}: was made with {results['settings']}; remove it, or name another --results")
    bundled.unpack(ROOT / "data" / "fashion-mnist")
    for seed in range(args.seeds):
        for kind in args.kinds:
            name = f"{kind} {seed}"
            if name not in results["runs"]:
                folder = args.out / name.replace(", ", "-").replace(" ", "-")
                log = train(folder, kind, seed, args)
                acc1, widths = measure(folder, args.candidates, args.threads)
                loss = [[line["step"], round(line["train/loss"], 4)] for line in log]
                results["runs"][name] = {"acc1": acc1, "widths": widths, "loss": loss, "seconds": log[-1]["seconds"]}
                results |= {"commit": utils.commit(), "versions": utils.versions()}
                utils.write_json(args.results, results, indent=1)
                print(f"{name}: {statistics.fmean(acc1):.2f}", file=sys.stderr)
    print(
        "| space | top-1 of 50 candidates, by seed | mean | standard deviation within a supernet |\n|---|---|---|---|"
    )
    for kind in args.kinds:
        runs = [results["runs"][f"{kind} {seed}"]["acc1"] for seed in range(args.seeds)]
        means = [statistics.fmean(acc1) for acc1 in runs]
        spread = statistics.fmean(map(statistics.stdev, runs))
        by_seed = ", ".join(f"{mean:.1f}" for mean in means)
        print(f"| {kind} | {by_seed} | {statistics.fmean(means):.1f} | {spread:.1f} |")


if __name__ == "__main__":
    main()

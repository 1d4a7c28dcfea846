"""Measures how many images BN recalibration needs, and in which mode: `python bench/bn.py --supernets FILE...`.

For every supernet checkpoint (seeds of the same settings), the same random candidates are recalibrated on two
different streams of 200 batches of 128 training images, and measured on the held-out images after 10, 50 and 200
batches, with the exponential moving average (official) and with the plain average; and once with the plain average
over the whole training split. Reported, as means over supernets: the absolute difference in top-1 between the two
streams (repeatability), and Kendall's tau of the candidates' ranking with the ranking after recalibration on the
whole split.

A pass in train mode does not depend on the running statistics, so one pass over a stream gives both modes and all
lengths. Writes bench/results/bn.json, from which an interrupted run resumes.
"""

import argparse
import itertools
import json
import pathlib
import random
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils

# isort: split
import torch
from scipy.stats import kendalltau

import supernet as supernet_script
from dataloader import Loader
from images import bundled
from images.dataset import Data, calibration_plan, evaluation_plan
from images.image_cache import FixedBatches
from network import batch_norms, fold_bn
from training import checkpoint
from training.evaluation import accuracy, bn_momentum, recalibrate_bn

LENGTHS = (10, 50, 200)
MODES = ("ema", "average")


def statistics(model, candidate, batches, lengths):
    """Returns {(mode, n): {norm: (mean, variance)}} after n batches: recalibrate_bn for all modes and `lengths`."""
    norms = batch_norms(model.first_conv) + batch_norms(model.conv_last)
    norms += [norm for block, choice in zip(model.features, candidate) for norm in batch_norms(block[choice])]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # so that the running statistics are those of the last batch
    seen, state = {}, {mode: {} for mode in MODES}
    with torch.inference_mode():
        for n, (images, _) in enumerate(batches, 1):
            model(images, candidate)
            for mode, norm in itertools.product(MODES, norms):
                weight, new = bn_momentum(mode, n), (norm.running_mean, norm.running_var)
                old = state[mode].get(norm, (torch.zeros_like(new[0]), torch.ones_like(new[1])))
                state[mode][norm] = tuple(o + weight * (v - o) for o, v in zip(old, new))
            if n in lengths:
                seen.update({(mode, n): dict(state[mode]) for mode in MODES})
            if n == max(lengths):
                break
    return seen


def measure(model, candidate, stats, validation):
    """Returns top-1 in percent with the given BN statistics."""
    for norm, (mean, variance) in stats.items():
        norm.running_mean, norm.running_var = mean.clone(), variance.clone()
    folded = fold_bn(model)
    return accuracy(lambda images: folded(images, candidate), validation)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--supernets", nargs="+", metavar="FILE", required=True)
    parser.add_argument("--candidates", type=int, default=30)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench" / "results" / "bn.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.results.read_text())["rows"] if options.results.exists() else []
    known = {(r["supernet"], tuple(r["architecture"])) for r in rows}
    args = supernet_script.parse_args(["--config", str(ROOT / "bench" / "demo_blocks.yml")])
    bundled.unpack(args.data_dir)
    start = time.perf_counter()
    for number, path in enumerate(options.supernets):
        model, stored = checkpoint.load_supernet(path, None)
        model.to(memory_format=torch.channels_last)
        data = Data(args, stored.data)
        checkpoint.check_split(stored, data.split)
        train, heldout = data.images("supernet"), data.images("search")
        loader = Loader(train, stored.data, True, backend="torchvision", workers=0)
        streams = [
            FixedBatches(loader, calibration_plan(train.labels, max(options.lengths), 128, seed), args.cache)
            for seed in (1, 2)
        ]
        whole = FixedBatches(loader, calibration_plan(train.labels, len(train) // 128, 128, 3), args.cache)
        plain = Loader(heldout, stored.data, False, backend="torchvision", workers=0)
        validation = FixedBatches(plain, evaluation_plan(len(heldout), 200), args.cache)
        rng = random.Random(0)
        for candidate in [stored.space.random_candidate(rng) for _ in range(options.candidates)]:
            if (number, candidate) in known:
                continue
            row = {"supernet": number, "architecture": list(candidate), "flops": stored.space.flops(candidate)}
            for k, stream in enumerate(streams):
                for (mode, n), stats in statistics(model, candidate, stream, options.lengths).items():
                    row[f"{mode} {n} {k}"] = measure(model, candidate, stats, validation)
            recalibrate_bn(
                model, lambda images, model=model, candidate=candidate: model(images, candidate), whole, "average"
            )
            folded = fold_bn(model)
            row["whole"] = accuracy(
                lambda images, folded=folded, candidate=candidate: folded(images, candidate), validation
            )[0]
            rows.append(row)
            utils.write_json(
                options.results, {"commit": utils.commit(), "versions": utils.versions(), "rows": rows}, indent=1
            )
    report(rows, options)
    print(f"{time.perf_counter() - start:.0f} s")


def report(rows, options):
    """Prints the table of means over supernets."""
    columns = "mode", "batches of 128", "top-1, mean", "mean abs. difference between the streams"
    print(f"| {' | '.join(columns)} | tau between the streams | tau with the whole split |")
    print("|---|---|---|---|---|---|")
    supernets = sorted({r["supernet"] for r in rows})
    for mode, n in itertools.product(MODES, options.lengths):
        a, b = (f"{mode} {n} {k}" for k in (0, 1))
        difference = sum(abs(r[a] - r[b]) for r in rows) / len(rows)
        mean = sum(r[a] + r[b] for r in rows) / len(rows) / 2
        between, whole = [], []
        for s in supernets:
            mine = [r for r in rows if r["supernet"] == s]
            between.append(kendalltau([r[a] for r in mine], [r[b] for r in mine]).statistic)
            whole += [kendalltau([r[x] for r in mine], [r["whole"] for r in mine]).statistic for x in (a, b)]
        tau, tau_whole = (sum(t) / len(t) for t in (between, whole))
        print(f"| {mode} | {n} | {mean:.2f} | {difference:.2f} | {tau:.2f} | {tau_whole:.2f} |")


if __name__ == "__main__":
    main()

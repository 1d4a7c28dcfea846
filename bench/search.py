"""Measures the cost of a candidate in a search, change by change: `python bench/search.py CASE`.

    demo    the bundled images at 28 px, in the trained supernet --supernet; also differences in predictions and ranking
    jpeg    generated files of ImageNet's size at 224 px, 1,000 classes; an untrained supernet, which costs the same
    nni     real searches of the bundled images with and without NNI: the share of time that NNI and process starts take

Each candidate is evaluated on 2,560 calibration and 2,000 validation images. The rows are the baseline
(bench/baseline_search.py, one process per candidate), then this project with one more change in every row; they are
interleaved, and medians over rounds are reported. Candidates are the tenth generation of a simulated evolution.
"images once" and the rows after it exclude process start and loading of the supernet, which a trial does once for a
list of candidates. Runs on a GPU or on CPU cores. Prints Markdown tables and adds to bench/results/search.json.
"""

import argparse
import contextlib
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
sys.path.insert(0, str(ROOT))

import utils

# isort: split
import numpy as np
import torch
from PIL import Image
from scipy.stats import kendalltau

from dataloader import Loader
from engines.search_record import read_results
from images.bundled import unpack
from images.dataset import DataConfig, calibration_plan, evaluation_plan, scan, stratified_order
from images.image_cache import FixedBatches
from network import ShuffleNetV2OneShot
from settings.subjects import Search
from space.evolution import Evolution
from space.limits import Limits
from space.search_space import SearchSpace
from space.splitting import tree_flops
from training import checkpoint
from training.evaluation import evaluate, resolve_device, update_bn
from training.prefix_tree import PrefixTree

BUNDLED = ROOT / "data" / "fashion-mnist"
CALIBRATION = 20  # batches of 128 images
VALIDATION = 2000  # images
FULL = 25_600 + 50_000  # images per candidate in the official search with the paper's validation
CHANGES = ["images once", "channels-last", "BN folded", "prefix tree", "bf16"]


def generation(space, population):
    """The tenth population of an evolution on random additive rewards; 59% of all candidates meet the FLOPs limit."""
    rng = random.Random(0)
    table = [[rng.gauss(0, 1) for _ in space.operations] for _ in range(space.n_blocks)]
    limit = space.flops_value("59%")
    settings = Search(population=population, select=max(2, population // 5))
    evolution = Evolution(space.choices, Limits(space, {"flops": (None, limit)}), settings)
    for _ in range(9):
        evolution.tell({c: sum(row[choice] for row, choice in zip(table, c)) for c in evolution.ask()})
    return evolution.ask()


def draw_jpegs(folder, n_classes=1000):
    """Makes a tree of 500 x 375 px images, three for training and two for validation per class: 100 different files."""
    rng = np.random.default_rng(0)
    sources = []
    folder.mkdir(parents=True)
    for i in range(100):
        small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        noisy = np.clip(np.asarray(small) + rng.normal(0, 12, (375, 500, 1)), 0, 255).astype(np.uint8)
        sources.append(folder / f"{i}.jpg")
        Image.fromarray(noisy).save(sources[-1], quality=92)
    for part, n in (("train", 3), ("val", 2)):
        for c in range(n_classes):
            (folder / part / f"{c:04}").mkdir(parents=True)
            for i in range(n):
                os.link(sources[(c * n + i) % 100], folder / part / f"{c:04}" / f"{i}.jpg")
    return folder


class Bench:
    """A supernet, and the batches on which all variants are measured."""

    def __init__(self, data_dir, config, supernet, options, cache):
        self.device = resolve_device(options.device, options.threads)
        if data_dir == BUNDLED:
            unpack(BUNDLED)
        self.space = supernet.space
        self.supernet = supernet.to(self.device)
        train = scan(f"{data_dir}/train")
        val = scan(f"{data_dir}/val")
        val = val.take(stratified_order(val.labels, 0)[:VALIDATION])

        def fixed(images, augment, plan):
            return FixedBatches(
                Loader(images, config, augment, device=self.device, backend=options.loader), plan, cache
            )

        self.calibration = fixed(train, True, calibration_plan(train.labels, CALIBRATION, 128, 0))
        self.validation = fixed(val, False, evaluation_plan(VALIDATION, 200))
        start = time.perf_counter()
        self.calibration.prepare()
        self.validation.prepare()
        self.decoding = time.perf_counter() - start

    def evaluate(self, candidates, last_change):
        """Returns (seconds per candidate, peak MB), with all changes up to `last_change`."""
        step = CHANGES.index(last_change)
        layout = torch.channels_last if step >= 1 else torch.contiguous_format
        self.supernet.to(memory_format=layout)
        batches = [self.calibration, self.validation]
        if step == 0:
            batches = [((x.contiguous(), y) for x, y in b) for b in batches]
        amp = "bf16" if step >= 4 else "off"
        reset_peak(self.device)
        start = time.perf_counter()
        evaluate(self.supernet, candidates, *batches, bn="average", fold=step >= 2, amp=amp)
        return (time.perf_counter() - start) / len(candidates), peak_mb(self.device)

    def predictions(self, candidates, layout=torch.channels_last, fold=True, amp="off", threads=None):
        """Returns {candidate: predicted classes (N,)} and {candidate: top-1 in percent}."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        self.supernet.to(memory_format=layout)
        contiguous = layout == torch.contiguous_format
        batches = [
            [(x.contiguous() if contiguous else x, y) for x, y in b] for b in (self.calibration, self.validation)
        ]
        tree = PrefixTree(self.supernet, candidates, fold, amp)
        found = {c: [] for c in candidates}
        with torch.inference_mode(), tree.own_statistics():
            update_bn(tree.supernet, tree.forward, batches[0], "average")
            for images, _ in batches[1]:
                for candidate, logits in tree.logits(images):
                    found[candidate].append(logits.argmax(1).cpu())
        torch.set_num_threads(before)
        labels = torch.cat([y for _, y in batches[1]]).cpu()
        found = {c: torch.cat(parts) for c, parts in found.items()}
        return found, {c: (p == labels).double().mean().item() * 100 for c, p in found.items()}


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device):
    """Peak memory since reset_peak in MB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with contextlib.suppress(OSError):
        (line,) = [x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def baseline(candidate, data_dir, config, supernet_path, options):
    """The measurements of the baseline, and the seconds of its whole process as "total"."""
    flags = {
        "--supernet": supernet_path,
        "--data": data_dir,
        "--architecture": ",".join(map(str, candidate)),
        "--input-size": config.input_size,
        "--crop-scale": config.crop_scale[0],
        "--calibration": CALIBRATION,
        "--validation": VALIDATION,
    }
    flags |= {"--threads": options.threads} if options.threads else {}
    words = [str(word) for flag in flags.items() for word in flag]
    start = time.perf_counter()
    program = [sys.executable, ROOT / "bench" / "baseline_search.py"]
    process = subprocess.run([*program, *words], check=True, capture_output=True, text=True)
    seconds = json.loads(process.stdout)
    return seconds | {"total": time.perf_counter() - start}


def trial_start(supernet_path, data_dir):
    """Seconds that a process takes to import torch and this project and to load the supernet."""
    imports = "import utils, torch; from training import checkpoint, evaluation"
    code = f"{imports}; checkpoint.load_supernet({str(supernet_path)!r}, None)"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return time.perf_counter() - start


def run_case(options):
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.case == "demo":
            model, stored = checkpoint.load_supernet(options.supernet, None)
            data_dir = BUNDLED
            config = stored.data
            path = options.supernet
            population = 50
        else:
            torch.manual_seed(0)
            model = ShuffleNetV2OneShot(space=SearchSpace())
            config = DataConfig()
            data_dir = draw_jpegs(folder / "images")
            path = folder / "supernet.pth"
            population = 10
            torch.save(model.state_dict(), path)
        population = options.population or population
        bench = Bench(data_dir, config, model, options, folder / "cache")
        candidates = generation(model.space, population)
        rows = {}
        starts = []
        for r in range(options.rounds):
            rows.setdefault("baseline", []).append(baseline(candidates[r], data_dir, config, path, options))
            starts.append(trial_start(path, data_dir))
            for change in CHANGES:
                several = candidates if CHANGES.index(change) >= 3 else candidates[r : r + 1]
                rows.setdefault(change, []).append(bench.evaluate(several, change))
                print(f"round {r + 1}, {change}: {rows[change][-1][0]:.2f} s per candidate", file=sys.stderr)
        result = summarize(rows, starts, population, bench)
        result["tree"] = {n: tree_share(model.space, generation(model.space, n)) for n in (10, 50, 200)}
        if options.case == "demo":
            result["populations"] = {
                n: bench.evaluate(generation(model.space, n), "prefix tree")[0] for n in options.populations
            }
            result["exactness"] = exactness(bench, candidates)
        return result


def tree_share(space, candidates):
    """FLOPs of a prefix tree, as a share of those of its candidates one by one."""
    return tree_flops(space, candidates) / sum(map(space.flops, candidates))


def summarize(rows, starts, population, bench):
    base = {
        k: statistics.median(r[k] for r in rows["baseline"]) for k in ("start", "decode", "compute", "total", "peak_mb")
    }
    start = statistics.median(starts)
    result = {
        "baseline": base,
        "trial_start": start,
        "decoding_once": bench.decoding,
        "population": population,
        "rows": {},
    }
    without = base["decode"] + base["compute"]
    print(f"\n{population} candidates; start of a trial {start:.1f} s; decoding once {bench.decoding:.1f} s\n")
    print("| | s per candidate | times the baseline | with process start | peak MB | 25,600 + 50,000 images, s |")
    print("|---|---|---|---|---|---|")
    full = FULL / (CALIBRATION * 128 + VALIDATION)
    parts = f"start {base['start']:.1f} s, decoding {base['decode']:.1f} s, computing {base['compute']:.1f} s"
    official = f"{base['start'] + full * without:.0f}"
    print(f"| baseline: {parts} | {without:.2f} | 1 | 1 | {base['peak_mb']:.0f} | {official} |")
    for change in CHANGES:
        seconds, peak = (statistics.median(column) for column in zip(*rows[change]))
        a_list = population if CHANGES.index(change) >= 3 else 1
        with_start = (base["start"] + without) / (seconds + start / a_list)
        result["rows"][change] = {
            "seconds": seconds,
            "ratio": without / seconds,
            "ratio_with_start": with_start,
            "peak_mb": peak,
            "all": [r[0] for r in rows[change]],
        }
        cells = f"{seconds:.2f} | {without / seconds:.1f} | {with_start:.1f} | {peak:.0f}"
        print(f"| + {change} | {cells} | {full * seconds + start / a_list:.0f} |")
    return result


def exactness(bench, candidates):
    """Percent of top-1 predictions that differ from the default's, and the effect of bf16 on accuracies and ranking."""
    few = candidates[:5]
    reference, _ = bench.predictions(few)
    variants = {
        "NCHW": {"layout": torch.contiguous_format},
        "unfolded": {"fold": False},
        "one thread": {"threads": 1},
        "two threads": {"threads": 2},
        "bf16": {"amp": "bf16"},
    }
    result = {}
    print("\n| compared with channels-last, folded, float32 | top-1 predictions that differ, % |\n|---|---|")
    for name, how in variants.items():
        found, _ = bench.predictions(few, **how)
        result[name] = statistics.fmean((found[c] != reference[c]).double().mean().item() * 100 for c in few)
        print(f"| {name} | {result[name]:.3f} |")
    _, a = bench.predictions(candidates)
    _, b = bench.predictions(candidates, amp="bf16")
    a, b = ([x[c] for c in candidates] for x in (a, b))
    result["bf16_ranking"] = {
        "tau": float(kendalltau(a, b).statistic),
        "mean_abs_points": statistics.fmean(abs(x - y) for x, y in zip(a, b)),
        "candidates": len(a),
    }
    difference = f"mean difference of top-1 {result['bf16_ranking']['mean_abs_points']:.2f} points"
    tau = f"Kendall's tau with float32 {result['bf16_ranking']['tau']:.2f}"
    print(f"\nbf16 over {len(a)} candidates: {difference}, {tau}")
    return result


def run_nni(options):
    """Seconds of real searches, and the share in which no candidate is evaluated."""
    result = {}
    print("| engine | wall time, s | evaluating, s | share of all else |\n|---|---|---|---|")
    for engine in ("local", "nni"):
        with tempfile.TemporaryDirectory() as out:
            subprocess.run(
                [sys.executable, ROOT / "tester.py", "--mode", "gen", "--out", out], check=True, capture_output=True
            )
            words = f"--engine {engine} --bn-batches {CALIBRATION} --generations {options.generations}".split()
            words += ["--config", ROOT / "bench" / "demo_blocks.yml"]
            words += ["--population", "50", "--select", "10", "--mutation", "25", "--crossover", "25"]
            words += ["--checkpoint", options.supernet, "--out", out]
            start = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "search.py", *words], check=True, capture_output=True)
            wall = time.perf_counter() - start
            evaluating = sum(r["seconds"] for r in read_results(out)) / 2  # two trials at a time
            result[engine] = {
                "wall": wall,
                "evaluating": evaluating,
                "share": 1 - evaluating / wall,
                "generations": options.generations,
            }
            print(f"| {engine} | {wall:.0f} | {evaluating:.0f} | {1 - evaluating / wall:.1%} |", flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("demo", "jpeg", "nni"))
    parser.add_argument("--supernet", metavar="FILE", help="checkpoint of the bundled images (demo, nni)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--population", type=int, help="default: 50 (demo), 10 (jpeg)")
    parser.add_argument(
        "--populations",
        type=int,
        nargs="*",
        default=(10, 50, 200),
        help="whose seconds per candidate are compared (demo)",
    )
    parser.add_argument("--generations", type=int, default=3, help="of the real searches (nni)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--loader", choices=("dali", "torchvision"), default="torchvision")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench" / "results" / "search.json")
    options = parser.parse_args()
    if options.case != "jpeg" and not options.supernet:
        parser.error("--supernet: name a checkpoint of supernet.py --config bench/demo_blocks.yml")
    result = run_nni(options) if options.case == "nni" else run_case(options)
    result |= {
        "commit": utils.commit(),
        "versions": utils.versions(),
        "threads": torch.get_num_threads(),
        "device": options.device,
    }
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    utils.write_json(options.results, results | {options.case: result}, indent=1)


if __name__ == "__main__":
    main()

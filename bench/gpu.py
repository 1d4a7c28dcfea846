"""Measures one GPU in at most nine minutes: `python bench/gpu.py`; without a GPU the same, with small numbers.

    training     images a second and peak memory: the official way, then float32 and bfloat16, NCHW and channels-last,
                 cuDNN's search for the fastest algorithms off and on, and deterministic algorithms
    candidates   candidates a second at the network's size, of random images: one by one, and as a tree, BN folded or
                 not, bfloat16
    loader       images a second that arrive on the device, of JPEG files of 500 x 375 px (bench/loader.py)
    demo         seconds of the four commands with the settings of the demo

What has no time left is left out. Prints Markdown tables, and the lines of docs/scaling.md that follow from them, and
adds to bench/results/gpu.json.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import utils

# isort: split
import torch

from dataloader import Loader
from images.dataset import DataConfig, training_plan
from network import ShuffleNetV2OneShot
from space.sampler import PathSampler, default_flops_range
from space.search_space import SearchSpace
from training.evaluation import evaluate

OFFICIAL_IMAGES = 25_600 + 50_000  # a candidate: calibration and validation
SUPERNET_IMAGES, RETRAIN_IMAGES = 150_000 * 1024, 300_000 * 1024 + 1250 * 1024
BYTES_BF16 = 3 * 2 * 2 * 4.32e6  # an image: three passes that read and write the convolutions' outputs
ONE_PATH, COPY = "a step of architecture_final.json, channels-last, ms by images", "copy, GB/s"  # measured by hand
OURS = {"channels_last": True}
OFFICIAL = {"views": False, "channels_last": False, "fused": False, "lazy": False}
# name -> (changes of bench/train.py's Variant, cuDNN's benchmark, cuDNN's deterministic)
TRAINING = {
    "official way, float32": (OFFICIAL, True, True),
    "float32, NCHW": ({"channels_last": False}, False, True),
    "float32, NCHW, benchmark": ({"channels_last": False}, True, True),
    "float32, channels-last": (OURS, False, True),
    "float32, channels-last, benchmark": (OURS, True, True),
    "float32, channels-last, not deterministic": (OURS, False, False),
    "bf16, NCHW": ({"channels_last": False, "amp": "bf16"}, False, True),
    "bf16, NCHW, benchmark": ({"channels_last": False, "amp": "bf16"}, True, True),
    "bf16, channels-last": ({**OURS, "amp": "bf16"}, False, True),
    "bf16, channels-last, benchmark": ({**OURS, "amp": "bf16"}, True, True),
    "bf16, channels-last, not deterministic": ({**OURS, "amp": "bf16"}, False, False),
}
CANDIDATES = {  # name -> (one by one, settings of evaluate)
    "one by one, BN folded": (True, {}),
    "tree, not folded": (False, {"fold": False}),
    "tree, BN folded": (False, {}),
    "tree, BN folded, bf16": (False, {"amp": "bf16"}),
}


def sibling(name):
    """The module bench/NAME.py; modules at the root have some of these names."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def training(space, options):
    """{row: {"images_per_second", "peak_mb", "mb_per_image"}} of training steps on random paths and images."""
    train, device = sibling("train"), options.device
    torch.manual_seed(0)
    weights, rows = ShuffleNetV2OneShot(space=space).state_dict(), {}
    sampler = PathSampler(space, 0, default_flops_range(space))
    every_operation = [(n,) * space.n_blocks for n in range(len(space.operations))]
    paths = every_operation + [sampler.candidate(i) for i in range(options.steps)]
    for name, (changes, benchmark, deterministic) in TRAINING.items():
        if options.left() < 0.45 * options.seconds:
            break
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic
        changes = {"tf32": True, **changes} if device.type == "cuda" else changes
        peaks = {}
        try:
            for batch_size in (options.batch_size // 2, options.batch_size):
                variant = train.Variant(name, space, weights, device, **changes)
                images = torch.rand(batch_size, 3, space.input_size, space.input_size, device=device) * 255
                labels = torch.randint(space.n_classes, (batch_size,), device=device)
                train.memory_mb(device, reset=True)
                for path in every_operation:
                    variant.step(images, labels, path)
                train.synchronize(device)
                start = time.perf_counter()
                for path in paths[len(every_operation) :]:
                    variant.step(images, labels, path)
                train.synchronize(device)
                seconds = time.perf_counter() - start
                peaks[batch_size] = train.memory_mb(device)
                del variant
        except torch.cuda.OutOfMemoryError:
            continue
        small, large = peaks.values()
        rows[name] = {
            "images_per_second": options.batch_size * options.steps / seconds,
            "peak_mb": large,
            "mb_per_image": (large - small) / (options.batch_size - options.batch_size // 2),
        }
        print(f"{name}: {rows[name]['images_per_second']:.0f} images/s", file=sys.stderr)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, device.type == "cuda"
    return rows


def candidates(space, options):
    """{row: {"seconds": of a candidate on the official number of images, "per_hour"}}."""
    population, device, size = sibling("search").generation(space, options.population), options.device, space.input_size

    def batches(n, batch_size):
        shape = (batch_size, 3, size, size)
        images = torch.rand(shape, device=device).mul_(255).to(memory_format=torch.channels_last)
        return [(images, torch.randint(space.n_classes, (batch_size,), device=device))] * n

    supernet = ShuffleNetV2OneShot(space=space).to(device, memory_format=torch.channels_last)
    calibration, validation = batches(options.eval_batches, 128), batches(options.eval_batches, 200)
    n_images, rows = options.eval_batches * 328, {}
    evaluate(supernet, population[:1], calibration[:1], validation[:1])
    for name, (alone, how) in CANDIDATES.items():
        if options.left() < 0.25 * options.seconds:
            break
        start = time.perf_counter()
        for part in [[c] for c in population] if alone else [population]:
            evaluate(supernet, part, calibration, validation, **how)
        seconds = (time.perf_counter() - start) / len(population) * OFFICIAL_IMAGES / n_images
        rows[name] = {"seconds": seconds, "per_hour": 3600 / seconds}
        print(f"{name}: {seconds:.1f} s a candidate", file=sys.stderr)
    return rows


def loading(options):
    """{loader: images a second}."""
    bench, rows = sibling("loader"), {}
    with tempfile.TemporaryDirectory() as folder:
        images = bench.draw_mosaics(pathlib.Path(folder) / "images", options.images)
        plan = list(training_plan(len(images), options.images // 8, 0, steps=8))
        for backend in ("dali", "torchvision"):
            if backend == "torchvision" or importlib.util.find_spec("nvidia.dali"):
                loader = Loader(images, DataConfig(), True, device=options.device, backend=backend)
                rows[backend] = bench.rate(loader.batches(plan), options.device)
                print(f"{backend}: {rows[backend]:.0f} images/s", file=sys.stderr)
    return rows


def demo(options):
    """{command: seconds, or None where there was no time for it}."""
    small = options.device.type == "cpu" and not options.full
    bn, heldout = (["--bn-batches", "2"], ["--heldout-per-class", "4"]) if small else ([], [])
    bn_pass = ["--bn-pass", "2"] if small else []
    short = ["--iterations", "8", "--batch-size", "16", "--warmup", "2", "--val-every", "8"] if small else []
    few = ["--population", "4", "--select", "2", "--mutation", "1", "--crossover", "1", "--generations", "2"]
    commands = {
        "supernet.py": [*short, *bn, *heldout, *(["--val-paths", "1"] if small else [])],
        "tester.py": ["--mode", "gen"],
        "search.py": [*bn, *heldout, *(few if small else [])],
        "scratch.py": ["--architecture", "checkpoints/best.json", *short, *heldout, *bn_pass],
    }
    rows = dict.fromkeys(commands)
    with tempfile.TemporaryDirectory() as out:
        for script, words in commands.items():
            command = [sys.executable, ROOT / script, "--demo", *words]
            start = time.perf_counter()
            with open(os.path.join(out, "log"), "w") as log:
                try:
                    left = max(1, options.left())
                    subprocess.run(command, cwd=out, check=True, stdout=log, stderr=log, timeout=left)
                except subprocess.TimeoutExpired:
                    break
                except subprocess.CalledProcessError:
                    print(pathlib.Path(out, "log").read_text()[-2000:], file=sys.stderr)
                    break
            rows[script] = time.perf_counter() - start
            print(f"{script}: {rows[script]:.0f} s", file=sys.stderr)
    return rows


def hours(seconds):
    return f"{seconds / 3600:.1f} h"


def scaling_rows(card, result):
    """The lines of docs/scaling.md that are calculated from what was measured on a card: {table: [line, ...]}."""
    training, memory, search = [], [], []
    rows = result.get("training", {}).get("rows", {})
    for name in ("float32", "bf16"):
        if not (row := rows.get(f"{name}, channels-last")):
            continue
        rate, mb = row["images_per_second"], row["mb_per_image"]
        measured = f"calculated: {rate:,.0f} images/s of random paths, {result['training']['batch_size']} images a step"
        cells = f"{hours(SUPERNET_IMAGES / rate)} | {hours(RETRAIN_IMAGES / rate)} | {measured}"
        training.append(f"| one {card}, {name} | {cells} |")
        memory.append(
            f"| memory of one {card}, {name} | {mb * 1.024:.0f} GB | {mb:.1f} MB an image, measured; times 1,024 |"
        )
        third = f"calculated: a forward pass takes a third of a step, at {rate:,.0f} images/s; prefix tree not included"
        search.append(f"| one {card}, {name} | {hours(1000 * OFFICIAL_IMAGES / rate / 3)} | {third} |")
    for name, times in result.get("by hand", {}).get("rows", {}).get(ONE_PATH, {}).items():
        for images, gpus, free in ((1024, "one", ""), (128, "eight", ", as if exchange were free")):
            if ms := name in ("float32", "bf16") and times.get(str(images)):
                cells = f"{hours(SUPERNET_IMAGES / 1024 * ms / 1000)} | {hours(RETRAIN_IMAGES / 1024 * ms / 1000)}"
                measured = f"calculated: {ms:g} ms a step of one path{free}"
                training.append(f"| {gpus} {card}, {name}, {images:,} images on each | {cells} | {measured} |")
    if gb := result.get("by hand", {}).get("rows", {}).get(COPY):
        rate = gb * 1e9 / BYTES_BF16
        cells = f"{hours(SUPERNET_IMAGES / rate)} | {hours(RETRAIN_IMAGES / rate)}"
        bound = f"calculated: {gb:,} GB/s of a copy, 52 MB an image; no program reaches it"
        training.append(f"| lower bound of an {card} in bf16: {round(rate, -3):,.0f} images/s | {cells} | {bound} |")
    for name, row in result.get("candidates", {}).get("rows", {}).items():
        measured = f"calculated: {row['seconds']:.1f} s a candidate"
        search.append(f"| one {card}, {name} | {hours(1000 * row['seconds'])} | {measured} |")
    return {"Training": training, "What else it takes": memory, "Search": search}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=540, help="for all of it (540)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full", action="store_true", help="the numbers of a GPU on a CPU too")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench" / "results" / "gpu.json")
    options = parser.parse_args()
    options.device, start = torch.device(options.device), time.monotonic()
    options.left = lambda: options.seconds - (time.monotonic() - start)
    large = options.full or options.device.type == "cuda"
    options.batch_size, options.steps, options.population = (256, 12, 10) if large else (4, 1, 2)
    options.eval_batches, options.images = (4, 2048) if large else (1, 64)
    space = SearchSpace() if large else SearchSpace.for_images(32, 10)
    name = torch.cuda.get_device_name() if options.device.type == "cuda" else "cpu"
    result = {
        "device": name, "input_size": space.input_size, "batch_size": options.batch_size,
        "training": training(space, options), "candidates": candidates(space, options), "loader": loading(options),
        "demo": demo(options), "cores": utils.cores(), "commit": utils.commit(), "versions": utils.versions(),
    }  # fmt: skip
    print(f"{name}, {space.input_size} px, batch {options.batch_size}, {utils.cores()} cores\n")
    print("| training | images/s | peak memory, MB | MB per image |\n|---|---|---|---|")
    for row, v in result["training"].items():
        print(f"| {row} | {v['images_per_second']:.0f} | {v['peak_mb']:.0f} | {v['mb_per_image']:.1f} |")
    print("\n| candidates | s per candidate of 75,600 images | candidates per hour |\n|---|---|---|")
    for row, v in result["candidates"].items():
        print(f"| {row} | {v['seconds']:.1f} | {v['per_hour']:.0f} |")
    print("\n| loader | images/s |\n|---|---|")
    for row, v in result["loader"].items():
        print(f"| {row} | {v:.0f} |")
    print("\n| demo | s |\n|---|---|")
    for row, v in result["demo"].items():
        print(f"| {row} | {'no time' if v is None else f'{v:.0f}'} |")
    if options.device.type == "cuda":
        parts = {k: {"rows": result[k], "batch_size": options.batch_size} for k in ("training", "candidates")}
        for heading, lines in scaling_rows(name, parts).items():
            print(f"\nfor docs/scaling.md, {heading}:", *lines, sep="\n")
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    utils.write_json(options.results, results | {name: result}, indent=1)


if __name__ == "__main__":
    main()

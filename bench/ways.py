"""Measures ways to take a step of supernet.py: as it is, and in micro-batches: `python bench/ways.py`.

    python bench/ways.py --images 64 --micro-batch 8      at 224 px, minutes on two CPU cores

All rows take the same random paths and images through `Recipe.train_one_step`, in turns, after one step of every
operation; medians are reported, and the peak of the memory above what a row has at rest. Prints a Markdown table and
adds to bench/results/ways.json. Needs neither DALI nor NNI nor images.
"""

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import utils

# isort: split
import torch

from network import ShuffleNetV2OneShot
from settings.subjects import Training
from space.sampler import PathSampler, default_flops_range
from space.search_space import SearchSpace
from training.evaluation import resolve_device
from training.recipe import Recipe

spec = importlib.util.spec_from_file_location("bench_train", ROOT / "bench" / "train.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)


class Way:
    """A supernet of its own that takes steps of `n` images by the settings `changes` of a Training."""

    def __init__(self, space, device, n, **changes):
        torch.manual_seed(0)
        model = ShuffleNetV2OneShot(space=space).train()
        self.n = n
        self.recipe = Recipe(model, Training(batch_size=n, lr=0.01, **changes), device)
        self.device = self.recipe.device
        self.images = torch.rand(n, 3, space.input_size, space.input_size, device=device).mul_(255)
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(space.n_classes, (n,), device=device)
        self.steps = 0

    def step(self, path):
        """Seconds of a step."""
        train.synchronize(self.device)
        start = time.perf_counter()
        self.steps += 1
        self.recipe.train_one_step(self.steps, self.images, self.labels, path)
        train.synchronize(self.device)
        return time.perf_counter() - start

    def peak_mb(self, path):
        """Peak memory in MB of two steps, above that before them."""
        train.memory_mb(self.device, reset=True)
        before = torch.cuda.memory_allocated() / 1e6 if self.device.type == "cuda" else train.memory_mb(self.device)
        for _ in range(2):
            self.step(path)
        return train.memory_mb(self.device) - before


def peak_mb(make, path):
    """The `peak_mb` of the Way that `make()` returns; on a CPU in a process that has freed no memory before."""
    if torch.cuda.is_available():
        return make().peak_mb(path)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(write, str(make().peak_mb(path)).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return float(os.read(read, 100))


def ways(n, micro_batch, **common):
    """{name: (images, settings)}, those of little memory first."""
    return {
        f"{micro_batch} images": (micro_batch, common),
        f"{n} images in micro-batches of {micro_batch}": (n, {**common, "micro_batch": micro_batch}),
        f"{n} images": (n, common),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--amp", choices=("off", "bf16"), default="off")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench" / "results" / "ways.json")
    options = parser.parse_args()
    device = resolve_device(options.device, options.threads)
    space = SearchSpace.for_images(options.input_size)
    sampler = PathSampler(space, 0, default_flops_range(space))
    rows = {}
    for name, (n, changes) in ways(options.images, options.micro_batch, amp=options.amp).items():
        make = functools.partial(Way, space, device, n, **changes)
        rows[name] = {"way": make, "peak_mb": peak_mb(make, sampler.candidate(1)), "seconds": []}
        print(f"{name}: {rows[name]['peak_mb']:.0f} MB", file=sys.stderr)
    for row in rows.values():
        row["way"] = row["way"]()
        for operation in range(len(space.operations)):
            row["way"].step(space.uniform_candidate(operation))
    for step in range(1, options.steps + 1):
        for row in rows.values():
            row["seconds"].append(row["way"].step(sampler.candidate(step)))
    print(f"{options.input_size} px, {device}, {torch.get_num_threads()} threads, amp {options.amp}\n")
    print("| | ms per step | images per second | peak memory, MB |\n|---|---|---|---|")
    for name, row in rows.items():
        seconds, n = statistics.median(row["seconds"]), row.pop("way").n
        row |= {"images": n, "images_per_second": n / seconds}
        print(f"| {name} | {1000 * seconds:.0f} | {n / seconds:.1f} | {row['peak_mb']:.0f} |")
    about = {"commit": utils.commit(), "versions": utils.versions(), "threads": torch.get_num_threads()}
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    name = f"{device.type} {options.input_size} px, {options.amp}"
    utils.write_json(options.results, results | {name: {"rows": rows, **about}}, indent=1)


if __name__ == "__main__":
    main()

"""Measures ways to take a step of supernet.py: as it is, in micro-batches, compiled: `python bench/ways.py`.

    python bench/ways.py --images 64 --micro-batch 8      at 224 px, minutes on two CPU cores
    python bench/ways.py --images 8 --compile             adds a compiled step, after minutes, and what steps call

All rows take the same random paths and images through `Step.train_one_step`, in turns, after the first use of every
operation; medians are reported, and the peak of the memory above what a row has at rest. "calls" are the kernels that
Inductor has made and the operators that a step calls, forward and backward, views and allocations aside; they are
counted on a CPU. Prints a Markdown table and adds to bench/results/ways.json. Needs neither DALI nor NNI nor images.

bench/gpu.py has these rows, and CUDA graphs of operations, on a GPU.
"""

import argparse
import contextlib
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

from network import ShuffleNetV2OneShot, autocast, batch_norms
from settings.subjects import Training
from space.sampler import PathSampler, default_flops_range
from space.search_space import SearchSpace
from training.compiled import prepare_compiler
from training.evaluation import resolve_device
from training.step import Step, run_part, torch_compiler

spec = importlib.util.spec_from_file_location("bench_train", ROOT / "bench" / "train.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)

FREE = {  # operators that compute nothing
    f"aten::{name}"
    for name in """alias as_strided as_strided_ detach detach_ empty empty_like empty_strided expand narrow permute
    reshape resize_ result_type select slice split squeeze t to transpose unbind unsqueeze view _reshape_alias
    _unsafe_view""".split()  # noqa: SIM905
}


class Way:
    """A supernet of its own that takes steps of `n` images by the settings `changes` of a Training."""

    def __init__(self, space, device, n, **changes):
        torch.manual_seed(0)
        self.model = ShuffleNetV2OneShot(space=space).train()
        self.n = n
        self.space = space
        self.recipe = Step(self.model, Training(batch_size=max(2, n), lr=0.01, **changes), device)
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

    def warm_up(self):
        """Seconds of the first use of every operation, compilation included."""
        choices = range(len(self.space.operations))
        return sum(self.step(self.space.uniform_candidate(choice)) for choice in choices)

    def peak_mb(self, path):
        """Peak memory in MB of two steps, above that before them."""
        train.memory_mb(self.device, reset=True)
        before = torch.cuda.memory_allocated() / 1e6 if self.device.type == "cuda" else train.memory_mb(self.device)
        for _ in range(2):
            self.step(path)
        return train.memory_mb(self.device) - before

    def calls(self, path):
        """How many kernels and operators a step calls, forward and backward, by name."""
        from torch.profiler import ProfilerActivity, profile

        fails = torch_compiler("fail_on_recompile") if self.recipe.training.compile else contextlib.nullcontext()
        with profile(activities=[ProfilerActivity.CPU]) as profiler, fails:
            self.recipe._add_gradients(self.model.path(path), self.images, self.labels, 0, 1)
        counts = {}
        for event in profiler.events():
            parent = event.cpu_parent
            while parent and not _computes(parent.name):
                parent = parent.cpu_parent
            if _computes(event.name) and not parent:
                counts[event.name] = counts.get(event.name, 0) + 1
        return counts


def _computes(name):
    return "cpp_fused" in name or (name.startswith("aten::") and name not in FREE)


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


# --- CUDA graphs: not a part of the project, until a GPU has shown what they gain ----------------------------


def graph_operations(way):
    """Makes every operation of a Way a CUDA graph of its forward and one of its backward pass.

    Operations of a block share memory, since a step runs one of them. For the time alone: a replay may overwrite the
    gradients of the micro-batch before. Source: torch.cuda.make_graphed_callables.
    """
    inputs = {}

    def noted(part, x):
        inputs[part] = x.detach().clone().requires_grad_(x.requires_grad)
        return part(x)

    way.recipe.run = noted
    way.warm_up()
    way.recipe.run = run_part
    dtype = torch.bfloat16 if way.recipe.training.amp == "bf16" else torch.float16
    with torch.autocast("cuda", dtype, enabled=way.recipe.training.amp != "off", cache_enabled=False):
        for block in way.model.features:
            pool = torch.cuda.graph_pool_handle()
            for operation in block:
                torch.cuda.make_graphed_callables(operation, (inputs[operation],), pool=pool)


class Recorded:
    """A forward pass of a part as a CUDA graph, whose output the next replay overwrites."""

    def __init__(self, part, x, pool):
        self.x = x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            part(self.x)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.y = part(self.x)

    def __call__(self, x):
        self.x.copy_(x)
        self.graph.replay()
        return self.y


def calibration(way, path, batches, graphs=False):
    """Seconds of the forward passes of the calibration of one candidate, over so many batches of a Way's images."""
    way.model.eval()
    for norm in batch_norms(way.model):
        norm.train()
    parts = way.model.path(path)
    with torch.no_grad(), autocast(way.device, way.recipe.training.amp):
        x, recorded = way.images, []
        for part in parts:  # the first use of every operation
            recorded.append(Recorded(part, x, torch.cuda.graph_pool_handle()) if graphs else part)
            x = recorded[-1](x)
        train.synchronize(way.device)
        start = time.perf_counter()
        for _ in range(batches):
            x = way.images
            for part in recorded:
                x = part(x)
        train.synchronize(way.device)
    return time.perf_counter() - start


# --- rows ----------------------------------------------------------------------------------------------------


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
    parser.add_argument("--micro-batch", type=int, help="add micro-batches of so many, and a step of so many")
    parser.add_argument("--compile", action="store_true", help="add a compiled step, and count calls")
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--amp", choices=("off", "bf16"), default="off")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / "data" / "cache")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench" / "results" / "ways.json")
    options = parser.parse_args()
    device = resolve_device(options.device, options.threads)
    space = SearchSpace.for_images(options.input_size)
    sampler = PathSampler(space, 0, default_flops_range(space))
    n, common = options.images, {"amp": options.amp}
    found = ways(n, options.micro_batch, **common) if options.micro_batch else {f"{n} images": (n, common)}
    rows = {}
    for name, (images, changes) in found.items():
        make = functools.partial(Way, space, device, images, **changes)
        rows[name] = {"way": make, "peak_mb": peak_mb(make, sampler.candidate(1)), "seconds": []}
    if options.compile:
        from torch._inductor import config

        prepare_compiler(device, options.cache)
        config.cpp.enable_kernel_profile = True  # so that the profiler sees the kernels
        rows[f"{n} images, compiled"] = {
            "way": functools.partial(Way, space, device, n, **common, compile=True), "seconds": []
        }  # fmt: skip
    for row in rows.values():
        row["way"] = row["way"]()
        row["seconds_of_first_use"] = row["way"].warm_up()
    for step in range(1, options.steps + 1):
        for row in rows.values():
            row["seconds"].append(row["way"].step(sampler.candidate(step)))
    print(f"{options.input_size} px, {device}, {torch.get_num_threads()} threads, amp {options.amp}\n")
    print("| | first use, s | ms per step | images per second | peak memory, MB | calls |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        way = row.pop("way")
        seconds, peak = statistics.median(row["seconds"]), f"{row['peak_mb']:.0f}" if "peak_mb" in row else ""
        calls = way.calls(sampler.candidate(1)) if options.compile and device.type == "cpu" else {}
        row |= {"images": way.n, "images_per_second": way.n / seconds, "calls": calls}
        cells = f"{row['seconds_of_first_use']:.0f} | {1000 * seconds:.0f} | {way.n / seconds:.1f} | {peak}"
        print(f"| {name} | {cells} | {sum(calls.values()) or ''} |")
    about = {"commit": utils.commit(), "versions": utils.versions(), "threads": torch.get_num_threads()}
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    name = f"{device.type} {options.input_size} px, {options.amp}, {n} images{', compiled' * options.compile}"
    utils.write_json(options.results, results | {name: {"rows": rows, **about}}, indent=1)


if __name__ == "__main__":
    main()

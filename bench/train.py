"""Measures the cost of a training step, change by change: `python bench/train.py`, on a GPU with `--batch-size 1024`.

The reference is a plain float32 NCHW step of the published network (the reference of the tests: channel shuffle by
reshape and permute, SGD, loss and top-1 fetched after every step), on a GPU with TF32 off and on. Every further row
has one more change, up to the step of supernet.py. All rows take the same paths and batches from the same initial
weights, in turns; medians are reported. Prints Markdown tables and adds to bench/results/train.json. Needs neither
DALI nor NNI nor images.

The floor is the time of a step if the convolutions ran at the rate of a large matrix product, and if each convolution
wrote and read its activations once in each of the three passes (forward, gradient of input, gradient of weights) at
the rate of a copy.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import utils

# isort: split
import torch
from reference_spos import Network
from torch import nn

from network import ShuffleNetV2, ShuffleNetV2OneShot
from space.sampler import PathSampler, default_flops_range
from space.search_space import SearchSpace
from training.evaluation import correct_counts, resolve_device
from training.step import begin_momentum, parameter_groups

KINDS = {  # of operations other than convolutions, by parts of their names, in this order
    "BN": ("batch_norm",), "optimizer": ("sgd", "_foreach", "optimizer"), "matrix products": ("mm", "linear"),
    "copies": ("cat", "copy", "clone", "contiguous", "fill", "zero", "slice", "index", "reshape"),
    "elementwise": ("relu", "clamp", "threshold", "add", "mul", "div"),
}  # fmt: skip
CONVOLUTIONS = ("depthwise", "pointwise", "other convolutions")


class Variant:
    """A network and its optimizer with some of the changes; `step(images, labels, path)` takes a training step."""

    def __init__(
        self,
        name,
        space,
        weights,
        device,
        views=True,
        channels_last=True,
        fused=True,
        lazy=True,
        amp="off",
        tf32=False,
        compiled=False,
    ):
        self.name = name
        self.device = device
        self.amp = amp
        self.lazy = lazy
        self.tf32 = tf32
        self.fused = fused
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        if views:
            self.model = ShuffleNetV2OneShot(space=space)
        else:
            self.model = Network(
                None, space.n_classes, stem_stride=space.stem_stride, last_size=space.blocks[-1].out_size
            )
        self.model.load_state_dict(weights)
        self.model.to(device, memory_format=self.layout).train()
        if compiled:
            torch._dynamo.config.recompile_limit = 200  # one function `forward` is compiled for 80 operations
            for operation in (operation for block in self.model.features for operation in block):
                operation.compile()
        self.optimizer = torch.optim.SGD(parameter_groups(self.model, 4e-5), lr=0.01, momentum=0.9, fused=fused or None)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def step(self, images, labels, path):
        images = images.to(memory_format=self.layout)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp == "bf16"):
            logits = self.model(images, path)
            loss = self.criterion(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.fused:
            begin_momentum(self.optimizer)
        self.optimizer.step()
        counts = torch.cat((loss.detach()[None], correct_counts(logits.detach(), labels)))
        return counts if self.lazy else [value.item() for value in counts]


def variants(space, device, compiled):
    """The rows, each with one more change than the one before; `compiled` adds torch.compile of all operations."""
    torch.manual_seed(0)
    weights = ShuffleNetV2OneShot(space=space).state_dict()
    off = {"views": False, "channels_last": False, "fused": False, "lazy": False}
    changes = [("reference", {})]
    if device.type == "cuda":
        changes.append(("reference, TF32", {"tf32": True}))
    changes += [
        ("+ shuffle as views", {"views": True}),
        ("+ channels-last", {"channels_last": True}),
        ("+ fused SGD", {"fused": True}),
        ("+ metrics fetched late", {"lazy": True}),
    ]
    if compiled:
        changes.append(("+ torch.compile", {"compiled": True}))
    changes.append(("+ bf16", {"amp": "bf16", "compiled": False}))
    found = []
    for name, change in changes:
        if name != "reference, TF32":
            off |= change
        found.append(Variant(name, space, weights, device, **(off | change)))
    return found


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_mb(device, reset=False):
    """Peak memory in MB since the last reset: of the GPU, or of this process."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e6
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return peak
    with contextlib.suppress(OSError):
        if reset:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        (line,) = [x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def kind_of(name, shapes):
    """The kind of an operation of the profiler, by its name and, for convolutions, the shape of their weights."""
    name = name.lower()
    if "conv" in name:
        at = 2 if "backward" in name else 1  # behind the gradient of the output, and the input
        weights = shapes[at] if len(shapes) > at else []
        return convolution(weights[1], weights[2]) if len(weights) == 4 else CONVOLUTIONS[2]
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "rest")


def convolution(inputs_per_group, kernel_size):
    return CONVOLUTIONS[1 if kernel_size == 1 else 0 if inputs_per_group == 1 else 2]


def profile(variant, batch):
    """({kind: milliseconds of a step}, {kernel: milliseconds} of the twelve that take longest on a GPU).

    "host" is the part of an unprofiled step in which no operation is computed.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    def step():
        variant.step(*batch)
        synchronize(variant.device)

    step()
    start = time.perf_counter()
    step()
    wall = 1000 * (time.perf_counter() - start)
    gpu = variant.device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, record_shapes=True) as profiler:
        step()
    kinds, kernels = dict.fromkeys([*CONVOLUTIONS, *KINDS, "rest"], 0.0), {}
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type == DeviceType.CPU:
            own = event.self_device_time_total if gpu else event.self_cpu_time_total
            kinds[kind_of(event.key, event.input_shapes)] += own / 1000
        elif not event.key.startswith("Optimizer"):  # a range of the profiler, not a kernel
            kernels[event.key] = kernels.get(event.key, 0.0) + event.self_device_time_total / 1000
    kinds["host"] = max(0.0, wall - sum(kinds.values()))
    return kinds, dict(sorted(kernels.items(), key=lambda item: -item[1])[:12])


def rates(device, dtype=torch.float32):
    """(multiply-adds per second of a large matrix product, bytes per second of a copy), as measured."""
    side, copied = (8192, 2**31) if device.type == "cuda" else (2048, 2**28)
    a = torch.rand(side, side, device=device).to(dtype)
    big = torch.rand(copied // 4, device=device)
    target = torch.zeros_like(big)

    def seconds(function):
        times = []
        for _ in range(5):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times)

    return side**3 / seconds(lambda: a @ a), 2 * big.nbytes / seconds(lambda: target.copy_(big))


def floors_ms(space, path, batch_size, multiply_adds_per_s, bytes_per_s, bytes_per_value=4):
    """{kind: (ms of multiply-adds, ms of memory traffic)} of a step at these rates.

    A convolution reads and writes as much as its output in each of the three passes (inputs are outputs of other
    convolutions). BN reads or writes its input eight times: two reads and a write forward, and backward two reads of
    input and gradient each and a write.
    """
    floors = {kind: [0.0, 0.0] for kind in (*CONVOLUTIONS, "BN")}

    def add(conv, _, output):
        weights, n = conv.weight, output.numel() * batch_size
        found = floors[convolution(weights.shape[1], weights.shape[2])]
        found[0] += 3000 * n * weights[0].numel() / multiply_adds_per_s
        found[1] += 3000 * 2 * n * bytes_per_value / bytes_per_s
        floors["BN"][1] += 1000 * 8 * n * bytes_per_value / bytes_per_s

    with torch.device("meta"):
        network = ShuffleNetV2(path, space=space).eval()
        for conv in [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]:
            conv.register_forward_hook(add)
        network(torch.empty(1, 3, space.input_size, space.input_size))
    return floors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="add a row with all operations compiled, whose first step takes minutes",
    )
    parser.add_argument("--paths", type=int, metavar="N", help="take N paths in turn, fewer than --steps")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench" / "results" / "train.json")
    options = parser.parse_args()
    device = resolve_device(options.device, options.threads)
    space = SearchSpace.for_images(options.input_size, options.classes)
    sampler = PathSampler(space, 0, default_flops_range(space))
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, 3, options.input_size, options.input_size)
    rows = variants(space, device, options.compile)
    paths = [sampler.candidate(i) for i in range(options.paths or options.steps + 1)]
    seconds = {v.name: [] for v in rows}
    peaks = {}
    for step in range(options.steps + 1):
        images = (torch.rand(shape, generator=generator) * 255).to(device)
        labels = torch.randint(0, options.classes, (options.batch_size,), generator=generator).to(device)
        for variant in rows:
            memory_mb(device, reset=True)
            synchronize(device)
            start = time.perf_counter()
            variant.step(images, labels, paths[step % len(paths)])
            synchronize(device)
            if step >= (options.paths or 1):  # the ones before are warm-up
                seconds[variant.name].append(time.perf_counter() - start)
            peaks[variant.name] = max(peaks.get(variant.name, 0), memory_mb(device))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    counted = len(seconds["reference"])
    threads = torch.get_num_threads()
    title = f"{options.input_size} px, batch {options.batch_size}, {device}, {threads} threads"
    print(f"{title}, median of {counted} steps\n")
    print("| | ms per step | times the reference | images per second | peak memory, MB |\n|---|---|---|---|---|")
    for name, s in medians.items():
        cells = f"{1000 * s:.0f} | {medians['reference'] / s:.2f} | {options.batch_size / s:.0f} | {peaks[name]:.0f}"
        print(f"| {name} | {cells} |")
    batch = images, labels, paths[0]
    whole = next(v for v in rows if v.name == "+ metrics fetched late")
    profiles = {v.name: profile(v, batch)[0] for v in (rows[0], whole, rows[-1])}
    print("\n| ms per step | " + " | ".join(profiles) + " |\n|---|" + "---|" * len(profiles))
    for kind in profiles["reference"]:
        print(f"| {kind} | " + " | ".join(f"{p[kind]:.0f}" for p in profiles.values()) + " |")
    floors = floors_ms(space, batch[2], options.batch_size, *rates(device))
    compute, memory = (sum(floors[kind][n] for kind in CONVOLUTIONS) for n in (0, 1))
    print(f"\nFloor, float32: {compute:.0f} ms of multiply-adds, {memory:.0f} ms of memory traffic")
    result = {
        "medians": medians,
        "seconds": seconds,
        "peaks_mb": peaks,
        "profiles_ms": profiles,
        "floor_ms": {"multiply_adds": compute, "bytes": memory},
        "commit": utils.commit(),
        "versions": utils.versions(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    name = f"{device.type} {options.input_size} px batch {options.batch_size}"
    if options.compile:
        name += ", compiled"
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    utils.write_json(options.results, results | {name: result}, indent=1)


if __name__ == "__main__":
    main()

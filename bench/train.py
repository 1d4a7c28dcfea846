"""Measures the cost of a training step, change by change: `python -m bench.train`, on a GPU with `--batch-size 1024`.

The reference is a plain float32 NCHW step of the published network (the reference of the tests: channel shuffle by
reshape and permute, SGD, loss and top-1 fetched after every step), on a GPU with TF32 off and on. Every further row
has one more change, up to the step of supernet.py. All rows take the same paths and batches from the same initial
weights, in turns; medians are reported. Prints Markdown tables and adds to bench/results/train.json. Needs neither
DALI nor NNI nor images. bench/gpu.py measures with the same steps.

The floor is the time of a step if the convolutions ran at the rate of a large matrix product, and if each convolution
wrote and read its activations once in each of the three passes (forward, gradient of input, gradient of weights) at
the rate of a copy.
"""

import runpy
import statistics

import torch
from torch import nn

import utils
from bench import study
from bench.study import memory_mb, seconds
from network import ShuffleNetV2, ShuffleNetV2OneShot
from space.sampler import PathSampler, default_flops_range
from space.search_space import SearchSpace
from training.evaluation import correct_counts, resolve_device
from training.recipe import begin_momentum, parameter_groups

KINDS = {  # of operations other than convolutions, by parts of their names, in this order
    "BN": ("batch_norm",), "optimizer": ("sgd", "_foreach", "optimizer"), "matrix products": ("mm", "linear"),
    "copies": ("cat", "copy", "clone", "contiguous", "fill", "zero", "slice", "index", "reshape"),
    "elementwise": ("relu", "clamp", "threshold", "add", "mul", "div"),
}  # fmt: skip
CONVOLUTIONS = ("depthwise", "pointwise", "other convolutions")
OFFICIAL = {"views": False, "channels_last": False, "fused": False, "lazy": False}


class Variant:
    """A supernet of its own and its optimizer, with some of the changes.

    `views`: channels are shuffled without a copy, which the reference network does not; `lazy`: metrics stay on the
    device; `compiled`: torch.compile of all operations.
    """

    def __init__(self, space, device, views=True, channels_last=True, fused=True, lazy=True, amp="off", tf32=False,
                 compiled=False):  # fmt: skip
        self.device = device
        self.amp = amp
        self.lazy = lazy
        self.tf32 = tf32
        self.fused = fused
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        torch.manual_seed(0)
        self.model = ShuffleNetV2OneShot(space=space)
        if not views:
            reference = runpy.run_path(str(study.ROOT / "tests" / "reference_spos.py"))["Network"]
            weights, last = self.model.state_dict(), space.blocks[-1].out_size
            self.model = reference(None, space.n_classes, stem_stride=space.stem_stride, last_size=last)
            self.model.load_state_dict(weights)
        self.model.to(device, memory_format=self.layout).train()
        if compiled:
            torch._dynamo.config.recompile_limit = 200  # one function `forward` is compiled for 80 operations
            for operation in (operation for block in self.model.features for operation in block):
                operation.compile()
        self.optimizer = torch.optim.SGD(parameter_groups(self.model, 4e-5), lr=0.01, momentum=0.9, fused=fused or None)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def step(self, images, labels, path):
        """Takes a training step."""
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
    """{row: Variant}, each with one more change than the one before; `compiled` adds torch.compile."""
    changes = {"reference": {}}
    if device.type == "cuda":
        changes["reference, TF32"] = {"tf32": True}
    changes |= {
        "+ shuffle as views": {"tf32": False, "views": True},
        "+ channels-last": {"channels_last": True},
        "+ fused SGD": {"fused": True},
        "+ metrics fetched late": {"lazy": True},
    }
    if compiled:
        changes["+ torch.compile"] = {"compiled": True}
    changes["+ bf16"] = {"amp": "bf16", "compiled": False}
    settings, found = OFFICIAL, {}
    for name, change in changes.items():
        settings = settings | change
        found[name] = Variant(space, device, **settings)
    return found


def random_batch(space, n, device, generator=None):
    """Images (n, 3, H, W) in [0, 255] and labels (n,)."""
    shape = (n, 3, space.input_size, space.input_size)
    images = (torch.rand(shape, generator=generator) * 255).to(device)
    return images, torch.randint(0, space.n_classes, (n,), generator=generator).to(device)


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

    _, wall = (1000 * seconds(variant.device, lambda: variant.step(*batch)) for _ in range(2))
    gpu = variant.device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, record_shapes=True) as profiler:
        seconds(variant.device, lambda: variant.step(*batch))
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
    product, copy = (
        min(seconds(device, function) for _ in range(5)) for function in (lambda: a @ a, lambda: target.copy_(big))
    )
    return side**3 / product, 2 * big.nbytes / copy


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


def parse_args(argv=None):
    defaults = {"--results": study.RESULTS / "train.json", "--steps": 15, "--threads": None}
    parser = study.parser(__doc__, defaults, device="auto")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    text = "add a row with all operations compiled, whose first step takes minutes"
    parser.add_argument("--compile", action="store_true", help=text)
    parser.add_argument("--paths", type=int, metavar="N", help="take N paths in turn, fewer than --steps")
    return parser.parse_args(argv)


def main(options):
    device = resolve_device(options.device, options.threads)
    space = SearchSpace.for_images(options.input_size, options.classes)
    sampler = PathSampler(space, 0, default_flops_range(space))
    generator = torch.Generator().manual_seed(0)
    rows = variants(space, device, options.compile)
    paths = [sampler.candidate(i) for i in range(options.paths or options.steps + 1)]
    times, peaks = {name: [] for name in rows}, dict.fromkeys(rows, 0)
    for step in range(options.steps + 1):
        batch = random_batch(space, options.batch_size, device, generator)
        for name, variant in rows.items():
            memory_mb(device, reset=True)
            took = seconds(device, lambda: variant.step(*batch, paths[step % len(paths)]))  # noqa: B023  # called now
            if step >= (options.paths or 1):  # the ones before are warm-up
                times[name].append(took)
            peaks[name] = max(peaks[name], memory_mb(device))
    medians = {name: statistics.median(some) for name, some in times.items()}
    threads = torch.get_num_threads()
    title = f"{options.input_size} px, batch {options.batch_size}, {device}, {threads} threads"
    print(f"{title}, median of {len(times['reference'])} steps\n")
    cells = [
        (
            name,
            f"{1000 * s:.0f}",
            f"{medians['reference'] / s:.2f}",
            f"{options.batch_size / s:.0f}",
            f"{peaks[name]:.0f}",
        )
        for name, s in medians.items()
    ]
    print(study.table(("", "ms per step", "times the reference", "images per second", "peak memory, MB"), cells))
    profiles = {name: profile(rows[name], (*batch, paths[0]))[0]
                for name in ("reference", "+ metrics fetched late", "+ bf16")}  # fmt: skip
    cells = [(kind, *(f"{p[kind]:.0f}" for p in profiles.values())) for kind in profiles["reference"]]
    print("", study.table(("ms per step", *profiles), cells), sep="\n")
    floors = floors_ms(space, paths[0], options.batch_size, *rates(device))
    compute, memory = (sum(floors[kind][n] for kind in CONVOLUTIONS) for n in (0, 1))
    print(f"\nFloor, float32: {compute:.0f} ms of multiply-adds, {memory:.0f} ms of memory traffic")
    result = {
        "medians": medians, "seconds": times, "peaks_mb": peaks, "profiles_ms": profiles,
        "floor_ms": {"multiply_adds": compute, "bytes": memory},
        "commit": utils.commit(), "versions": utils.versions(), "threads": threads,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }  # fmt: skip
    name = f"{device.type} {options.input_size} px batch {options.batch_size}{', compiled' * options.compile}"
    utils.write_json(options.results, study.read(options.results) | {name: result}, indent=1)


if __name__ == "__main__":
    utils.run_script(main, parse_args)

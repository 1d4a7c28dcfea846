"""Steps that bench/gpu.py measures: the official way, this project's with all settings, and what a step is made of.

    python -m bench.steps [--rounds 5]      small images on a CPU: loading, and steps with it, in CPU-microseconds an
                                            image, before and after memory is kept and images lie in it (small.json)

The floor is the time of a step if the convolutions ran at the rate of a large matrix product, and if each convolution
wrote and read its activations once in each of the three passes (forward, gradient of input, gradient of weights) at
the rate of a copy.
"""

import argparse
import functools
import multiprocessing
import os
import pathlib
import random
import runpy
import statistics
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from torch import nn

import utils
from bench import study
from bench.study import memory_mb, seconds
from dataloader import Loader
from images import bundled
from images.dataset import DataConfig, scan, training_plan
from network import ShuffleNetV2, ShuffleNetV2OneShot, autocast, batch_norms
from settings.subjects import Training
from space.custom import make_space
from training.compiled import CompiledStep
from training.evaluation import correct_counts
from training.step import Step, begin_momentum, parameter_groups

KINDS = {  # operations other than convolutions, by parts of their names, in this order
    "BN": ("batch_norm",), "optimizer": ("sgd", "_foreach", "optimizer"), "matrix products": ("mm", "linear"),
    "copies": ("cat", "copy", "clone", "contiguous", "fill", "zero", "slice", "index", "reshape"),
    "elementwise": ("relu", "clamp", "threshold", "add", "mul", "div"),
}  # fmt: skip
CONVOLUTIONS = ("depthwise", "pointwise", "other convolutions")


class Variant:
    """A supernet of its own and its optimizer, which takes plain steps of one path.

    The `official` way: the tests' reference network in NCHW, whose channels are shuffled by a copy, SGD that is not
    fused, and metrics that are fetched after every step. Otherwise as supernet.py.
    """

    def __init__(self, space, device, official=False, amp="off"):
        self.device = device
        self.amp = amp
        self.official = official
        self.layout = torch.contiguous_format if official else torch.channels_last
        torch.manual_seed(0)
        self.model = ShuffleNetV2OneShot(space=space)
        if official:
            reference = runpy.run_path(str(study.ROOT / "tests" / "reference_spos.py"))["Network"]
            weights, last = self.model.state_dict(), space.blocks[-1].out_size
            self.model = reference(None, space.n_classes, stem_stride=space.stem_stride, last_size=last)
            self.model.load_state_dict(weights)
        self.model.to(device, memory_format=self.layout).train()
        groups = parameter_groups(self.model, 4e-5)
        self.optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, fused=not official or None)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def step(self, images, labels, path):
        """Takes a training step."""
        images = images.to(memory_format=self.layout)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp == "bf16"):
            logits = self.model(images, path)
            loss = self.criterion(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not self.official:
            begin_momentum(self.optimizer)
        self.optimizer.step()
        counts = torch.cat((loss.detach()[None], correct_counts(logits.detach(), labels)))
        return [value.item() for value in counts] if self.official else counts


def random_batch(space, n, device, generator=None):
    """Images (n, 3, H, W) in [0, 255] and labels (n,)."""
    shape = (n, 3, space.input_size, space.input_size)
    images = (torch.rand(shape, generator=generator) * 255).to(device)
    return images, torch.randint(0, space.n_classes, (n,), generator=generator).to(device)


class Way:
    """A supernet of its own that takes steps of `n` images by the settings `changes` of a Training."""

    def __init__(self, space, device, n, **changes):
        torch.manual_seed(0)
        self.n = n
        self.space = space
        self.model = ShuffleNetV2OneShot(space=space).train()
        training = Training(batch_size=max(2, n), lr=0.01, **changes)
        self.stepper = (CompiledStep if training.compile else Step)(self.model, training, device)
        self.device = self.stepper.device
        self.images, self.labels = random_batch(space, n, device)
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.steps = 0

    def step(self, path):
        """Seconds of a step."""
        self.steps += 1
        batch = self.images, self.labels
        return seconds(self.device, lambda: self.stepper.train_one_step(self.steps, *batch, path))

    def warm_up(self):
        """Seconds of the first use of every operation, compilation included."""
        choices = range(len(self.space.operations))
        return sum(self.step(self.space.uniform_candidate(choice)) for choice in choices)

    def peak_mb(self, path):
        """Peak memory in MB of two steps, above that before them."""
        memory_mb(self.device, reset=True)
        before = torch.cuda.memory_allocated() / 1e6 if self.device.type == "cuda" else memory_mb(self.device)
        for _ in range(2):
            self.step(path)
        return memory_mb(self.device) - before

    def graph_operations(self):
        """Makes every operation a CUDA graph of its forward and one of its backward pass; takes some steps.

        Operations of a block share memory, since a step runs one of them. For the time alone, not a part of the
        project until a GPU has shown what it gains: a replay may overwrite the gradients of the micro-batch before.
        Source: torch.cuda.make_graphed_callables.
        """
        inputs = {}

        def noted(part, x):
            inputs[part] = x.detach().clone().requires_grad_(x.requires_grad)
            return part(x)

        self.stepper.run_part = noted
        self.warm_up()
        del self.stepper.run_part
        with torch.autocast("cuda", torch.bfloat16, enabled=self.stepper.training.amp == "bf16", cache_enabled=False):
            for block in self.model.features:
                pool = torch.cuda.graph_pool_handle()
                for operation in block:
                    torch.cuda.make_graphed_callables(operation, (inputs[operation],), pool=pool)

    def calibration(self, path, batches, graphs=False):
        """Seconds of the forward passes of the calibration of one candidate, over so many batches of its images."""
        self.model.eval()
        for norm in batch_norms(self.model):
            norm.train()
        with torch.no_grad(), autocast(self.device, self.stepper.training.amp):
            x, parts = self.images, []
            for part in self.model.path(path):  # the first use of every operation
                parts.append(Recorded(part, x) if graphs else part)
                x = parts[-1](x)

            def forward():
                for _ in range(batches):
                    functools.reduce(lambda x, part: part(x), parts, self.images)

            return seconds(self.device, forward)


class Recorded:
    """A forward pass of a part as a CUDA graph, whose output the next replay overwrites."""

    def __init__(self, part, x):
        self.x = x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            part(self.x)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=torch.cuda.graph_pool_handle()):
            self.y = part(self.x)

    def __call__(self, x):
        self.x.copy_(x)
        self.graph.replay()
        return self.y


# --- what a step is made of -----------------------------------------------------------------------------------


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


# --- small images on a CPU -------------------------------------------------------------------------------------

PX, BATCH_SIZE, N_IMAGES = 32, 64, 1920
TRANSFORMS = {"crops": {"crop_scale": (0.8, 1)}, "shifts": {"crop_padding": 4}}
SPACES = {"varied": (PX, 64), "small": (PX, 64), "demo.yml": (28, 64), "blocks": (224, 16)}  # px, images of a step
KEPT = {True: "memory kept", False: "memory returned"}
# (memory is kept, space or None, loader or None, its transform); with a loader, the step is that of its images.
LOADING = [(True, None, loader, how) for how in TRANSFORMS for loader in ("torchvision", "dali", "memory")]
STEPS = [(kept, space, None, None) for space in SPACES for kept in KEPT]
BOTH = [(loader == "memory", "varied", loader, how) for _, _, loader, how in LOADING]


def draw_images(folder):
    """N_IMAGES PNG files of 32 px of ten classes: as CIFAR-10's, each channel of another bundled image."""
    files = sorted((bundled.unpack(study.ROOT / "data" / "fashion-mnist") / "train").glob("*/*"))
    rng = np.random.default_rng(0)
    for i in range(N_IMAGES):
        path = pathlib.Path(folder, f"c{i % 10}", f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        channels = [Image.open(file).convert("L").resize((PX, PX)) for file in rng.choice(files, 3)]
        Image.merge("RGB", channels).save(path)


class Measured:
    """In a process of its own: CPU-microseconds an image, of all threads, by the rows above."""

    def __init__(self, folder):
        torch.set_num_threads(1)
        self.images = scan(f"{folder}/images")
        self.cache = f"{folder}/cache"
        self.rng = random.Random(0)

    @functools.cache  # noqa: B019
    def way(self, name):
        px, n = SPACES[name]
        file = str(study.ROOT / name) if name.endswith("yml") else name
        return Way(make_space(file, input_size=px, n_classes=10), torch.device("cpu"), n)

    @functools.cache  # noqa: B019
    def batches(self, loader, transform):
        """Batches without an end, made in this process."""
        config = DataConfig(PX, PX, jitter=0, **TRANSFORMS[transform])
        made = Loader(self.images, config, True, device="cpu", backend=loader, workers=0, cache=self.cache)
        return made.batches(training_plan(N_IMAGES, BATCH_SIZE, 0))

    def measure(self, space, loader, transform, repeats):
        way = space and self.way(space)
        start = time.process_time()
        for _ in range(repeats):
            batch = next(self.batches(loader, transform)) if loader else (way.images, way.labels)
            if way:
                way.steps += 1
                way.stepper.train_one_step(way.steps, *batch, way.space.random_candidate(self.rng))
        return 1e6 * (time.process_time() - start) / repeats / (way.n if way else BATCH_SIZE)


def serve(folder, connection):
    """Measures what is asked for, until there is nothing more."""
    measured = Measured(folder)
    while asked := connection.recv():
        connection.send(measured.measure(*asked))
    connection.send(memory_mb(torch.device("cpu")))


def main(options):
    rows = {row: [] for row in (*LOADING, *STEPS, *BOTH)}
    context = multiprocessing.get_context("spawn")  # which sets malloc's options, if at all, before torch is imported
    with tempfile.TemporaryDirectory() as folder:
        draw_images(f"{folder}/images")
        asks = {}
        for of in dict.fromkeys((kept, space) for kept, space, _, _ in rows):  # large tensors change malloc's ways
            os.environ["SPOS_KEEP_MEMORY"] = str(int(of[0]))
            asks[of], answers = context.Pipe()
            context.Process(target=serve, args=(folder, answers), daemon=True).start()
        for number in range(options.rounds + 1):  # the first is a warm-up
            for kept, space, loader, how in rows:
                repeats = max(1, options.images // (SPACES[space][1] if space else BATCH_SIZE))
                asks[kept, space].send((space, loader, how, max(1, repeats // 8) if space == "blocks" else repeats))
                found = asks[kept, space].recv()
                rows[kept, space, loader, how] += [found] * bool(number)
        for ask in asks.values():
            ask.send(None)
        peaks = {f"{KEPT[kept]}, {space}": round(ask.recv()) for (kept, space), ask in asks.items() if space}
    medians = {row: statistics.median(found) for row, found in rows.items()}
    for (kept, *of), us in medians.items():
        print(study.line([*(x or "" for x in of), KEPT[kept], f"{us:.0f}"]))
    found = [{"memory": KEPT[kept], "space": space, "loader": loader, "transform": how, "us": study.rounded(us)}
             for (kept, space, loader, how), us in rows.items()]  # fmt: skip
    study.write(study.RESULTS / "small.json", {"peak_mb": peaks, "rows": found}, indent=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of all rows in turns (default: 5)")
    parser.add_argument("--images", type=int, default=960, help="of a row in a round (default: 960)")
    utils.run_script(main, parser.parse_args)

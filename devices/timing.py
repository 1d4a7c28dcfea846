"""Measuring: networks of a space as a whole, in any runtime, and the parts of networks in PyTorch.

The speed of a device varies: clocks change, and other processes run. So measurements that are compared take turns, and
whatever is timed is timed beside one network that stays the same, the reference: what counts is the ratio of the two,
times the median latency of the reference. With one thread of the CPU the clock is that of the thread, which stands
still while another process has the core; on an idle machine it shows the same.
"""

import functools
import itertools
import statistics
import time

import numpy as np
import torch

from devices.on_device import cpu_name, ratio, rounds
from network import ShuffleNetV2, fold_bn
from utils import clock_ns, cores


def device_name(device):
    """The name of a torch device, as in the table."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {cores()} cores"


def build(space, candidate, device):
    """The candidate as a network for inference: BN folded, channels last, weights that keep activations in range."""
    network = ShuffleNetV2(candidate, space=space)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return fold_bn(network).to(device, memory_format=torch.channels_last)


def random_images(space, batch_size, device):
    """Random images (batch_size, channels, input_size, input_size), channels last."""
    size = (batch_size, space.image_channels, space.input_size, space.input_size)
    return torch.randn(size, device=device).to(memory_format=torch.channels_last)


def run_timed(parts, x):
    """Runs callables one after the other on x. Returns the ns that each took."""
    if isinstance(x, torch.Tensor) and x.is_cuda:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        marks[0].record()
        for part, mark in zip(parts, marks[1:]):
            x = part(x)
            mark.record()
        torch.cuda.synchronize()
        return [int(a.elapsed_time(b) * 1e6) for a, b in itertools.pairwise(marks)]
    clock = clock_ns(torch.get_num_threads())
    marks = [clock()]
    for part in parts:
        x = part(x)
        marks.append(clock())
    return [b - a for a, b in itertools.pairwise(marks)]


class Runtime:
    """What runs the networks of a space. `x` is their input; `reference` is the network beside which all are timed.

    A subclass has a NAME, and `prepare(candidate)`, which gives a function that returns the candidate as a callable on
    `x`. A measurement has ROUNDS, or as many as begin within SECONDS, but at least FEWEST; in each, a network runs
    WARM_UP times, and then the RUNS that count.
    """

    def __init__(self, space, batch_size, device, x):
        self.space = space
        self.batch_size = batch_size
        self.device = device
        self.x = x
        self.reference = self.prepare(space.uniform_candidate(0))()
        self.reference_ns = []

    def ns(self, network):
        """The ns that a network takes now."""
        (ns,) = run_timed([network], self.x)
        return ns

    def run_reference(self):
        """The ns that the reference takes now."""
        self.reference_ns.append(self.ns(self.reference))
        return self.reference_ns[-1]

    def usual_ns(self):
        """The median latency of the reference."""
        return statistics.median(self.reference_ns)


class Torch(Runtime):
    """Networks in PyTorch, without torch.compile, on any device."""

    NAME = "torch"
    ROUNDS = 30
    SECONDS = 240
    FEWEST = 3
    WARM_UP = 1
    RUNS = 5

    def __init__(self, space, batch_size, device):
        super().__init__(space, batch_size, device, random_images(space, batch_size, device))

    def prepare(self, candidate):
        network = build(self.space, candidate, self.device)
        return lambda: network


class Networks:
    """Candidates as whole networks in a runtime; a round runs each of them."""

    def __init__(self, runtime, candidates):
        self.runtime = runtime
        self.candidates = candidates
        self.prepared = [runtime.prepare(candidate) for candidate in candidates]
        self.ratios = [[] for _ in candidates]  # each candidate's to the reference, one a round
        self.seconds = 0.0

    def round(self):
        runtime = self.runtime
        for prepared, ratios in zip(self.prepared, self.ratios):
            run = functools.partial(runtime.ns, prepared())
            ratios.append(ratio(run, runtime.run_reference, runtime.WARM_UP, runtime.RUNS))

    def medians(self):
        """The median latency of each candidate, in ns."""
        usual = self.runtime.usual_ns()
        return [round(statistics.median(ratios) * usual) for ratios in self.ratios]


class Parts:
    """Every choice at every block in PyTorch; a round runs each of them, in random networks."""

    def __init__(self, runtime, rng):
        space = runtime.space
        self.runtime = runtime
        self.rng = rng
        # A network for each choice; random networks are made of their blocks.
        n = max(space.n_choices)
        self.whole = [build(space, space.uniform_candidate(choice), runtime.device) for choice in range(n)]
        self.ratios = [[[] for _ in range(n)] for n in space.n_choices]
        self.ends = []  # stem and head together
        self.seconds = 0.0

    def round(self):
        stem = self.whole[0].first_conv
        head = self.whole[0].head
        runtime = self.runtime
        for choices in rows(self.rng, runtime.space.n_choices):
            parts = [stem, *(self.whole[choice].features[block] for block, choice in enumerate(choices)), head]
            run_timed(parts, runtime.x)
            for _ in range(runtime.RUNS):
                reference = runtime.run_reference()
                first, *found, last = run_timed(parts, runtime.x)
                self.ends.append((first + last) / reference)
                for row, choice, ns in zip(self.ratios, choices, found):
                    row[choice].append(ns / reference)

    def medians(self):
        """(a list for each block of the ns of its choices, the ns of stem and head together)."""
        usual = self.runtime.usual_ns()
        table = [[round(statistics.median(ratios) * usual) for ratios in row] for row in self.ratios]
        return table, round(statistics.median(self.ends) * usual)


def rows(rng, n_choices):
    """As many random rows as a block has choices at most, which together have each choice at each block once.

    `n_choices` is the number of choices of each block; where it is lower, some choices come more often.
    """
    n = max(n_choices)

    def column(choices):
        return np.concatenate([rng.permutation(choices) for _ in range(-(-n // choices))])[:n].tolist()

    return list(zip(*map(column, n_choices)))


@torch.inference_mode()
def take_turns(runtime, *measurements):
    """Runs rounds of all measurements in a runtime in turns; adds up the seconds of each."""
    for _ in rounds(runtime.ROUNDS, runtime.SECONDS, runtime.FEWEST):
        for measurement in measurements:
            start = time.monotonic()
            measurement.round()
            measurement.seconds += time.monotonic() - start

"""Latency on a device: the table that a search reads, and networks measured as a whole.

A table is measured in context. Random networks of the space run as a whole, and each operation is timed between its
neighbours: timed alone, it would find its input in the cache. The latency of a network is then the sum of the medians
of its parts, times a correction: the median ratio of the latencies of whole networks to such sums.

The speed of a device varies: clocks change, and other processes run. So measurements that are compared take turns: the
parts of a table and its whole networks, and later the best candidates of a search and networks of the table, which
show how the speed differs from that time.

    setting    device, threads, batch size and version of torch, on which the latency of a network depends
    ns         the unit of all latencies here and in latency.json; latencies are per batch, not per image
"""

import itertools
import math
import pathlib
import platform
import reprlib
import statistics
import time

import numpy as np
import torch

from engines.search_record import SearchRecord
from evolution_tuner import Evolution
from network import ShuffleNetV2, fold_bn
from utils import UserError, cores, log, read_json, versions

ROUNDS = 200  # of a measurement, or as many as begin within SECONDS, but at least FEWEST
SECONDS = 240
NETWORKS = 12  # that a table measures as a whole
REFERENCES = 4  # of these, measured again with the best candidates of a search
FEWEST = 5
RUNS = 2  # timed runs of a network in a round, after one that is not timed


# --- measuring -----------------------------------------------------------------------------------------------


def device_name(device):
    """The name of a torch device, as in the table."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores()} cores"


def build(space, candidate, device):
    """The candidate as a network for inference: BN folded, channels last, weights that keep activations in range."""
    network = ShuffleNetV2(candidate, space=space)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return fold_bn(network).to(device, memory_format=torch.channels_last)


def images(space, batch_size, device):
    """Random images (batch_size, 3, input_size, input_size), channels last."""
    size = (batch_size, 3, space.input_size, space.input_size)
    return torch.randn(size, device=device).to(memory_format=torch.channels_last)


def run_timed(parts, x):
    """Runs callables one after the other on x. Returns the ns that each took."""
    if x.device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        marks[0].record()
        for part, mark in zip(parts, marks[1:]):
            x = part(x)
            mark.record()
        torch.cuda.synchronize()
        return [int(a.elapsed_time(b) * 1e6) for a, b in itertools.pairwise(marks)]
    marks = [time.perf_counter_ns()]
    for part in parts:
        x = part(x)
        marks.append(time.perf_counter_ns())
    return [b - a for a, b in itertools.pairwise(marks)]


def rounds(most, seconds):
    """Counts rounds: up to `most`, or as many as begin within `seconds`, but at least FEWEST."""
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda i: i < FEWEST or time.monotonic() < end, range(most))


class Networks:
    """Candidates as whole networks; a round runs each of them."""

    def __init__(self, space, candidates, batch_size, device):
        self.networks = [build(space, c, device) for c in candidates]
        self.x = images(space, batch_size, device)
        self.times = [[] for _ in candidates]
        self.seconds = 0.0

    def round(self):
        for network, own in zip(self.networks, self.times):
            network(self.x)
            own += [ns for _ in range(RUNS) for ns in run_timed([network], self.x)]

    def medians(self):
        """The median latency of each candidate, in ns."""
        return [int(statistics.median(own)) for own in self.times]


class Parts:
    """Every choice at every block; a round runs each of them, in random networks."""

    def __init__(self, space, batch_size, device, rng):
        self.rng = rng
        self.x = images(space, batch_size, device)
        n = len(space.choice_flops[0])
        # A network for each choice; random networks are made of their blocks.
        self.whole = [build(space, space.uniform_candidate(choice), device) for choice in range(n)]
        self.times = [[[] for _ in range(n)] for _ in range(space.n_blocks)]
        self.ends = []  # stem and head together
        self.seconds = 0.0

    def round(self):
        n = len(self.whole)
        stem = self.whole[0].first_conv
        head = self.whole[0].head
        for choices in zip(*(self.rng.permutation(n).tolist() for _ in self.times)):
            parts = [stem, *(self.whole[choice].features[block] for block, choice in enumerate(choices)), head]
            for run in range(RUNS + 1):
                first, *found, last = run_timed(parts, self.x)
                if run:
                    self.ends.append(first + last)
                    for own, choice, ns in zip(self.times, choices, found):
                        own[choice].append(ns)

    def medians(self):
        """(a list for each block of the ns of its choices, the ns of stem and head together)."""
        rows = [[int(statistics.median(own)) for own in row] for row in self.times]
        return rows, int(statistics.median(self.ends))


@torch.inference_mode()
def take_turns(*measurements):
    """Runs rounds of all measurements in turns; adds up the seconds of each."""
    for _ in rounds(ROUNDS, SECONDS):
        for measurement in measurements:
            start = time.monotonic()
            measurement.round()
            measurement.seconds += time.monotonic() - start


def measure_table(space, batch_size, device, beside=()):
    """The content of latency.json: latencies in a space on this device, with the threads that torch has.

    `beside` are other measurements to compare with the table; their rounds and those of the table take turns.
    """
    rng = np.random.default_rng(0)
    drawn = [tuple(int(rng.integers(n)) for n in space.choices) for _ in range(NETWORKS)]
    parts = Parts(space, batch_size, device, rng)
    twice = [Networks(space, drawn, batch_size, device) for _ in range(2)]
    take_turns(parts, *twice, *beside)
    rows, fixed = parts.medians()
    first, second = (networks.medians() for networks in twice)
    summed = [fixed + sum(row[c] for row, c in zip(rows, space.block_choices(candidate))) for candidate in drawn]
    correction = statistics.median((a + b) / 2 / total for a, b, total in zip(first, second, summed))
    return {
        "device": device_name(device),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "versions": versions(),
        "torch": torch.__version__,
        "space": space.to_dict(),
        "medians": [[int(ns * correction) for ns in row] for row in rows],
        "stem_and_tail": int(fixed * correction),
        "correction": correction,
        "spread": max(abs(a - b) / min(a, b) for a, b in zip(first, second)),
        "networks": {"architectures": drawn, "measured": [first, second]},
        "seconds": round(sum(measurement.seconds for measurement in (parts, *twice)), 1),
    }


def measure_like(table, space, candidates):
    """(the latency of each candidate as a whole network, in ns, at the scale of a table; that scale).

    Networks of the table are measured with the candidates. The scale is the median ratio of their latencies in the
    table to those measured now; all latencies are multiplied by it.
    """
    references = [space.check(c) for c in table["networks"]["architectures"][:REFERENCES]]
    before = torch.get_num_threads()
    torch.set_num_threads(table["threads"])
    try:
        networks = Networks(space, [*references, *candidates], table["batch_size"], torch.device(table["kind"]))
        take_turns(networks)
    finally:
        torch.set_num_threads(before)
    medians = networks.medians()
    now = medians[: len(references)]
    measured = medians[len(references) :]
    then = map(statistics.fmean, zip(*table["networks"]["measured"]))
    scale = statistics.median(a / b for a, b in zip(then, now))
    return [int(ns * scale) for ns in measured], scale


# --- the table of a search -----------------------------------------------------------------------------------

FORMS = {"device": str, "kind": str, "threads": int, "batch_size": int, "torch": str, "space": dict, "medians": list,
         "stem_and_tail": int, "spread": float, "networks": dict}  # fmt: skip


def read_table(path, space, foreign=False, measure="tester.py --mode latency"):
    """The table in a file, for a space.

    Raises UserError if the file has no table, or one of another space, or, unless `foreign`, of another setting;
    `measure` is the command that measures this device.
    """
    table = read_json(path)
    no_table = UserError(f"{path}: not a table of latencies; write one with {measure}")
    if not isinstance(table, dict) or not all(isinstance(table.get(k), kind) for k, kind in FORMS.items()):
        raise no_table
    rows = table["medians"]
    shape = [len(row) for row in space.choice_flops]
    numbers = [ns for row in rows for ns in (row if isinstance(row, list) else [None])] + [table["stem_and_tail"]]
    if not all(type(ns) is int and 0 < ns < 1e12 for ns in numbers) or not 0 <= table["spread"] < math.inf:
        raise no_table
    if table["space"] != space.to_dict() or [len(row) for row in rows] != shape:
        raise UserError(f"{path}: is of another search space than the supernet's; run {measure} again")
    if not _are_measured(table["networks"], space):
        raise no_table
    if (other := difference(table)) and not foreign:
        advice = f"measure this one with {measure}, or accept the table with --foreign-latency-table"
        raise UserError(f"{path}: measured {other}; {advice}")
    return table


def _are_measured(networks, space):
    """Whether these are candidates of a space, with two measurements of each, in ns."""
    try:
        candidates = [space.check(c) for c in networks["architectures"]]
        first, second = networks["measured"]
        return 0 < len(candidates) == len(first) == len(second) and all(ns > 0 for ns in (*first, *second))
    except (KeyError, TypeError, ValueError, UserError):
        return False


def difference(table):
    """How the setting of a table differs from this device, in words, or None."""
    if table["kind"] == "cuda" and not torch.cuda.is_available():
        return f"on {reprlib.repr(table['device'])}, and this machine has no GPU"
    if (here := device_name(torch.device(table["kind"]))) != table["device"]:
        return f"on {reprlib.repr(table['device'])}, this is {here}"
    if table["kind"] == "cpu" and table["threads"] > cores():
        return f"with {table['threads']} threads, this process has {cores()} cores"
    if torch.__version__ != table["torch"]:
        return f"with torch {table['torch']}, this is {torch.__version__}"
    return None


def with_latency(space, table):
    """The space with the latencies of a table among its costs."""
    rows = tuple(tuple(row) for row in table["medians"])
    return space.with_costs(*space.costs._replace(latency=rows, fixed_latency=table["stem_and_tail"]))


def confirm(space, settings, out, table):
    """Measures the ten best of the search in `out`, whose generations are complete, as whole networks on this device.

    The record of the search then has a winner, or more generations to run under a corrected limit.
    """
    record = SearchRecord(out, space, Evolution.from_settings(space, settings))
    record.pending()  # replays the search
    best = (record.evolution.front() if record.evolution.objectives else record.evolution.legal_ranked())[:10]
    log.info("measuring the %d best candidates as whole networks", len(best))
    measured, scale = measure_like(table, space, best)
    if abs(scale - 1) > 0.05:
        text = "this device takes %.2f times as long as when the table was measured: latencies are scaled to that time"
        log.warning(text, 1 / scale)
    row = record.confirm(dict(zip(best, measured)))
    record.lock.close()
    for rank, m in enumerate(row["measured"], 1):
        numbers = f"predicted {m['predicted_ms']:.3f} ms, measured {m['measured_ms']:.3f} ms"
        log.info("rank %d: %s%s", rank, numbers, "" if m["holds"] else ", beyond the limit")
    if row["generations"]:
        log.info("none holds: %d more generations, latencies times %.3f", row["generations"], row["correction"])

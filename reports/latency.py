"""Latency on a device: the table that a search reads, and networks measured as a whole.

A table is measured in context. Random networks of the space run as a whole, and each operation is timed where it
stands, between its neighbours: timed alone, its input would lie in the cache. The latency of a network is then the sum
of the medians of its parts, times a correction: the median ratio of whole networks, measured as such, to their sums.

    setting    device, threads, batch size and version of torch; a network has another latency in another one
    ns         the unit of all latencies here and in latency.json; those of a batch, not of an image
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

ROUNDS, SECONDS = 60, 240  # of a table, whichever ends first, but FEWEST rounds at least
NETWORKS, NETWORK_ROUNDS, NETWORK_SECONDS = 12, 40, 60  # measured as a whole; of each such measurement
FEWEST = 5
RUNS = 2  # timed runs of a network in a round, after one that is not timed


# --- measuring -----------------------------------------------------------------------------------------------


def device_name(device):
    """The name of a torch device, as the table has it."""
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
    size = (batch_size, 3, space.input_size, space.input_size)
    return torch.randn(size, device=device).to(memory_format=torch.channels_last)


def run_timed(parts, x):
    """Runs callables one after the other on x; the ns that each took."""
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
    """Counts rounds: up to `most`, or as many as begin within so many seconds, but FEWEST at least."""
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda i: i < FEWEST or time.monotonic() < end, range(most))


@torch.inference_mode()
def measure_networks(space, candidates, batch_size, device):
    """The median latency of each candidate as a whole network, in ns; runs of all of them take turns."""
    networks, x = [build(space, c, device) for c in candidates], images(space, batch_size, device)
    times = [[] for _ in networks]
    for _ in rounds(NETWORK_ROUNDS, NETWORK_SECONDS):
        for network, own in zip(networks, times):
            network(x)
            own += [ns for _ in range(RUNS) for ns in run_timed([network], x)]
    return [int(statistics.median(own)) for own in times]


@torch.inference_mode()
def measure_parts(space, batch_size, device, rng):
    """(median ns of every choice at every block, that of stem and head together), measured in random networks."""
    n = len(space.choice_flops[0])
    whole = [build(space, _uniform(space, choice), device) for choice in range(n)]  # they lend their blocks
    stem, head, x = whole[0].first_conv, whole[0].head, images(space, batch_size, device)
    times = [[[] for _ in range(n)] for _ in range(space.n_blocks)]
    ends = []
    for _ in rounds(ROUNDS, SECONDS):
        for choices in zip(*(rng.permutation(n).tolist() for _ in range(space.n_blocks))):
            parts = [stem, *(whole[choice].features[block] for block, choice in enumerate(choices)), head]
            for run in range(RUNS + 1):
                first, *found, last = run_timed(parts, x)
                if run:
                    ends.append(first + last)
                    for own, choice, ns in zip(times, choices, found):
                        own[choice].append(ns)
    return [[int(statistics.median(own)) for own in row] for row in times], int(statistics.median(ends))


def _uniform(space, choice):
    """The candidate that takes the same choice, a pair of operation and width, at every block."""
    operation, width = divmod(choice, space.n_widths)
    operations = () if space.architecture else (operation,) * space.n_blocks
    return operations + (width,) * space.n_blocks * (space.n_widths > 1)


def measure_table(space, batch_size, device):
    """The content of latency.json: latencies in a space on this device, with the threads that torch has."""
    start, rng = time.monotonic(), np.random.default_rng(0)
    rows, fixed = measure_parts(space, batch_size, device, rng)
    drawn = [tuple(int(rng.integers(n)) for n in space.choices) for _ in range(NETWORKS)]
    first, second = (measure_networks(space, drawn, batch_size, device) for _ in range(2))
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
        "seconds": round(time.monotonic() - start, 1),
    }


# --- the table of a search -----------------------------------------------------------------------------------

FORMS = {"device": str, "kind": str, "threads": int, "batch_size": int, "torch": str, "space": dict, "medians": list,
         "stem_and_tail": int, "spread": float}  # fmt: skip


def read_table(path, space, foreign=False):
    """The table in a file, for a space. Raises UserError where it is none, is of another space, or, unless `foreign`,
    of another setting than this device has."""
    table = read_json(path)
    if not isinstance(table, dict) or not all(isinstance(table.get(k), kind) for k, kind in FORMS.items()):
        raise UserError(f"{path}: not a table of latencies; write one with tester.py --mode latency")
    rows, shape = table["medians"], [len(row) for row in space.choice_flops]
    numbers = [ns for row in rows for ns in (row if isinstance(row, list) else [None])] + [table["stem_and_tail"]]
    if not all(type(ns) is int and 0 < ns < 1e12 for ns in numbers) or not 0 <= table["spread"] < math.inf:
        raise UserError(f"{path}: not a table of latencies; write one with tester.py --mode latency")
    if table["space"] != space.to_dict() or [len(row) for row in rows] != shape:
        raise UserError(f"{path}: is of another search space than the supernet's; run tester.py --mode latency again")
    if (other := difference(table)) and not foreign:
        advice = "measure this one with tester.py --mode latency, or accept the table with --foreign-latency-table"
        raise UserError(f"{path}: measured {other}; {advice}")
    return table


def difference(table):
    """What differs between the setting of a table and this device, in words, or None."""
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

    Its record says what follows: a winner, or more generations under a corrected limit.
    """
    record = SearchRecord(out, space, Evolution.from_settings(space, settings))
    record.pending()  # replays the search
    best = (record.evolution.front() if record.evolution.objectives else record.evolution.legal_ranked())[:10]
    log.info("measuring the %d best candidates as whole networks", len(best))
    before = torch.get_num_threads()
    torch.set_num_threads(table["threads"])
    try:
        measured = measure_networks(space, best, table["batch_size"], torch.device(table["kind"]))
    finally:
        torch.set_num_threads(before)
    row = record.confirm(dict(zip(best, measured)))
    record.lock.close()
    for rank, m in enumerate(row["measured"], 1):
        numbers = f"predicted {m['predicted_ms']:.3f} ms, measured {m['measured_ms']:.3f} ms"
        log.info("rank %d: %s%s", rank, numbers, "" if m["holds"] else ", beyond the limit")
    if row["generations"]:
        log.info("none holds: %d more generations, latencies times %.3f", row["generations"], row["correction"])

"""The latency of a space's networks on a device, in a runtime: the table that a search reads, and its best, measured.

In PyTorch, operations are timed in context. Random networks of the space run as a whole, and each operation is timed
between its neighbours: timed alone, it would find its input in the cache. The latency of a network is then the sum of
the medians of its parts, times a correction: the median ratio of the latencies of whole networks to such sums.

In ONNX Runtime, which fuses operations and changes layouts across blocks, there are no such parts. Whole networks are
timed, more than there are unknowns and with every choice at every block equally often, and latencies of choices are
fitted to them by least squares. A row of the table says how much longer a choice takes than the block's fastest one,
and `stem_and_tail` what all networks have in common.

    setting    device, runtime and its version, threads and batch size, on which the latency of a network depends
    ns         the unit of all latencies here and in latency.json; latencies are per batch, not per image
"""

import math
import reprlib
import statistics

import numpy as np
import torch

from devices import onnx_runtime
from devices.elsewhere import read_results, write_folder
from devices.onnx_runtime import OnnxRuntime
from devices.timing import Networks, Parts, Torch, device_name, rows, take_turns
from settings.subjects import RUNTIMES
from utils import UserError, cores, read_json, versions

NETWORKS = 12  # that a table measures twice, and that it is compared with
REFERENCES = 4  # so many of these are measured again with the best candidates of a search
MEASURED_WITH = ("device", "onnxruntime", "threads", "batch_size")  # keys of another device's results
PER_UNKNOWN = 2  # networks to which the latencies of choices are fitted, for each unknown


# --- measuring -----------------------------------------------------------------------------------------------


def open_runtime(name, space, batch_size, device):
    """The runtime of a name in RUNTIMES, which runs networks of a space. Raises UserError if it can't."""
    return OnnxRuntime(space, batch_size) if name == OnnxRuntime.NAME else Torch(space, batch_size, device)


def measure_table(runtime, beside=()):
    """The content of latency.json: latencies in the space of a runtime, with the threads that torch has.

    `beside` are other measurements to compare with the table; their rounds and those of the table take turns.
    """
    space = runtime.space
    drawn, rng = draw(space)
    twice = [Networks(runtime, drawn) for _ in range(2)]
    measured = Parts(runtime, rng) if runtime.NAME == Torch.NAME else Networks(runtime, evenly(space, rng))
    take_turns(runtime, measured, *twice, *beside)
    first, second = (networks.medians() for networks in twice)
    medians = measured.medians()
    found = (
        summed(space, *medians, drawn, first, second)
        if runtime.NAME == Torch.NAME
        else fitted(space, measured.candidates, medians, drawn, first, second)
    )
    return {
        "device": device_name(runtime.device),
        "kind": runtime.device.type,
        "runtime": runtime.NAME,
        "threads": torch.get_num_threads(),
        "batch_size": runtime.batch_size,
        "versions": versions(),
        "torch": torch.__version__,
        **({"onnxruntime": onnx_runtime.version()} if runtime.NAME == OnnxRuntime.NAME else {}),
        "space": space.to_dict(),
        **found,
        "seconds": round(sum(measurement.seconds for measurement in (measured, *twice)), 1),
    }


def write_networks(folder, runtime):
    """Writes the networks that `measure_table` would time, for another device; see `elsewhere.write_folder`."""
    drawn, rng = draw(runtime.space)
    return write_folder(folder, runtime, [*drawn, *evenly(runtime.space, rng)], torch.get_num_threads())


def table_elsewhere(space, folder):
    """As `measure_table`, of what `write_networks` wrote, from the results in the folder."""
    drawn, rng = draw(space)
    even = evenly(space, rng)
    results, ns = read_results(folder, space, [*drawn, *even])
    first, second = (list(measured) for measured in zip(*(ns[c] for c in drawn)))
    found = fitted(space, even, [statistics.fmean(ns[c]) for c in even], drawn, first, second)
    setting = {"device": results["device"], "kind": "cpu", "runtime": OnnxRuntime.NAME, "elsewhere": True}
    setting |= {name: results[name] for name in MEASURED_WITH}
    return {**setting, "versions": versions(), "torch": torch.__version__, "space": space.to_dict(), **found}


def draw(space):
    """(the networks that a table is compared with, the random numbers for what it is made of)."""
    rng = np.random.default_rng(0)
    return [tuple(int(rng.integers(n)) for n in space.choices) for _ in range(NETWORKS)], rng


def summed(space, table, fixed, drawn, first, second):
    """The latencies of parts, corrected by those of `drawn` networks; the spread of two measurements of these."""
    sums = predict(space, table, fixed, drawn)
    correction = statistics.median((a + b) / 2 / total for a, b, total in zip(first, second, sums))
    return {
        "medians": [[int(ns * correction) for ns in row] for row in table],
        "stem_and_tail": int(fixed * correction),
        "correction": correction,
        "spread": max(abs(a - b) / min(a, b) for a, b in zip(first, second)),
        "networks": {"architectures": drawn, "measured": [first, second]},
    }


def fitted(space, candidates, medians, drawn, first, second):
    """Latencies fitted to those of candidates; the spread is the largest error for `drawn` ones, measured twice."""
    table, fixed = fit(space, candidates, medians)
    predicted = predict(space, table, fixed, drawn)
    errors = [abs(p - ns) / ns for measured in (first, second) for p, ns in zip(predicted, measured)]
    networks = {"architectures": drawn, "measured": [first, second]}
    return {"medians": table, "stem_and_tail": fixed, "spread": max(errors), "networks": networks}


def predict(space, table, fixed, candidates):
    """The sum for each candidate."""
    return [fixed + sum(row[c] for row, c in zip(table, space.block_choices(candidate))) for candidate in candidates]


def evenly(space, rng):
    """Random candidates that have every choice of a block equally often, or nearly where blocks offer different numbers
    of them; PER_UNKNOWN for each unknown of `fit`."""
    unknowns = 1 + sum(n - 1 for n in space.n_choices)
    return [row for _ in range(math.ceil(PER_UNKNOWN * unknowns / max(space.n_choices)))
            for row in rows(rng, space.n_choices)]  # fmt: skip


def fit(space, candidates, measured):
    """(ns of every choice at every block beyond the block's fastest choice, ns that all candidates have in common) that
    fit the latencies of candidates best, by least squares."""
    ends = np.cumsum(space.n_choices)
    columns = np.zeros((len(candidates), 1 + ends[-1]))  # 1, and whether a candidate has a choice at a block
    columns[:, 0] = 1
    for row, candidate in zip(columns, candidates):
        row[1 + ends - space.n_choices + space.block_choices(candidate)] = 1
    common, *found = np.linalg.lstsq(columns, np.array(measured, float), rcond=None)[0]
    found = np.split(np.array(found), ends[:-1])
    table = [np.rint(block - block.min()).astype(int).tolist() for block in found]
    return table, round(common + sum(block.min() for block in found))


def measure_like(table, space, candidates, folder=None):
    """(the latency of each candidate as a whole network, in ns, at the scale of a table; that scale).

    Networks of the table are measured with the candidates. The scale is the median ratio of their latencies in the
    table to those measured now; all latencies are multiplied by it. A table of another device has them measured there,
    in a `folder` that `write_like` has written; raises UserError if it has no results, or those of another setting.
    """
    references = _references(table, space)
    if folder:
        results, ns = read_results(folder, space, [*references, *candidates])
        if other := [name for name in MEASURED_WITH if results[name] != table[name]]:
            change = f"{other[0]} {results[other[0]]}, the table with {table[other[0]]}"
            raise UserError(f"{folder}: measured with {change}; measure both in the same way")
        medians = [statistics.fmean(ns[c]) for c in [*references, *candidates]]
    else:
        before = torch.get_num_threads()
        torch.set_num_threads(table["threads"])
        try:
            networks = Networks(_runtime_of(table, space), [*references, *candidates])
            take_turns(networks.runtime, networks)
        finally:
            torch.set_num_threads(before)
        medians = networks.medians()
    now, measured = medians[: len(references)], medians[len(references) :]
    then = map(statistics.fmean, zip(*table["networks"]["measured"]))
    scale = statistics.median(a / b for a, b in zip(then, now))
    return [int(ns * scale) for ns in measured], scale


def write_like(table, space, candidates, folder):
    """Writes what `measure_like` needs of another device; see `elsewhere.write_folder`."""
    return write_folder(folder, _runtime_of(table, space), [*_references(table, space), *candidates], table["threads"])


def _references(table, space):
    return [space.check(c) for c in table["networks"]["architectures"][:REFERENCES]]


def _runtime_of(table, space):
    return open_runtime(table["runtime"], space, table["batch_size"], torch.device(table["kind"]))


# --- the table of a search -----------------------------------------------------------------------------------

FORMS = {"device": str, "kind": str, "runtime": str, "threads": int, "batch_size": int, "torch": str, "space": dict,
         "medians": list, "stem_and_tail": int, "spread": float, "networks": dict}  # fmt: skip


def read_table(path, space, foreign=False, measure="tester.py --mode latency"):
    """The table in a file, for a space.

    Raises UserError if the file has no table, or one of another space, or, unless `foreign`, of another setting;
    `measure` is the command that measures this device.
    """
    table = read_json(path)
    if isinstance(table, dict) and table.get("runtime") == OnnxRuntime.NAME:
        measure += f" --runtime {OnnxRuntime.NAME}"
    no_table = UserError(f"{path}: not a table of latencies; write one with {measure}")
    if not isinstance(table, dict) or not all(isinstance(table.get(k), kind) for k, kind in FORMS.items()):
        raise no_table
    if table["runtime"] not in RUNTIMES or not isinstance(table.get(table["runtime"]), str):
        raise no_table
    rows = table["medians"]
    shape = [len(row) for row in space.costs.flops]
    numbers = [ns for row in rows for ns in (row if isinstance(row, list) else [None])] + [table["stem_and_tail"]]
    if not all(type(ns) is int and 0 <= ns < 1e12 for ns in numbers) or not 0 <= table["spread"] < math.inf:
        raise no_table
    if table["space"] != space.to_dict() or [len(row) for row in rows] != shape:
        raise UserError(f"{path}: is of another search space than the supernet's; run {measure} again")
    if not _are_measured(table["networks"], space):
        raise no_table
    if (other := mismatch(table)) and not foreign:
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


def mismatch(table):
    """How the setting of a table differs from this device, in words, or None; also if it is meant to be another's."""
    if table.get("elsewhere"):
        return None
    if table["kind"] == "cuda" and not torch.cuda.is_available():
        return f"on {reprlib.repr(table['device'])}, and this machine has no GPU"
    if (here := device_name(torch.device(table["kind"]))) != table["device"]:
        return f"on {reprlib.repr(table['device'])}, this is {here}"
    if table["kind"] == "cpu" and table["threads"] > cores():
        return f"with {table['threads']} threads, this process has {cores()} cores"
    name = table["runtime"]
    here = torch.__version__ if name == Torch.NAME else onnx_runtime.version()
    if here not in (None, table[name]):  # a search needs no runtime, if its best candidates are not measured
        return f"with {name} {table[name]}, this is {here}"
    return None


def setting_of(table):
    """The setting of a table in words."""
    name = table["runtime"]
    threads = f"{table['threads']} thread{'s' if table['threads'] > 1 else ''}"
    return f"{RUNTIMES[name]} {table[name]} on {table['device']}, {threads}, batch size {table['batch_size']}"


def cannot_measure(table):
    """Why networks can't be measured in the runtime of a table here, in words that name the way out, or None."""
    install = onnx_runtime.missing() if table["runtime"] == OnnxRuntime.NAME else None
    return install and f"ONNX Runtime needs {install}"


def with_latency(space, table):
    """The space with the latencies of a table among its costs."""
    rows = tuple(tuple(row) for row in table["medians"])
    return space.with_costs(latency=rows, fixed_latency=table["stem_and_tail"])

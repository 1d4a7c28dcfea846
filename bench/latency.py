"""Measures how well tables of latencies predict whole networks, and whether the winners of searches hold their limits.

    python -m bench.latency                         everything: an hour on one core that others use too
    python -m bench.latency --runtimes torch --spaces small --networks 8 --searches 2 --batch-sizes 1   a try, minutes

In each runtime, the paper's four operations are measured, each at all blocks of the paper's space. Then, for each
space and batch size, a table is measured as `tester.py --mode latency` does, and random networks as a whole, twice,
each time built anew. All take turns, so that a device that is faster for a while is so for all. Reported are the mean
absolute error of the predictions, that of predicting the mean of the measurements for all, the mean difference of the
two measurements, and Spearman's correlation of predictions and measurements, beside that of the two measurements.

Then searches run in `small` with limits from the 20th to the 80th percentile of latency, on made-up accuracies that
grow with the predicted latency, so that the best are at the limit; winners are confirmed as in any search, and measured
again by another process, at the scale of the table. Reported are these latencies as a share of the limit.

Prints Markdown and writes bench/results/latency.json after each part. The numbers hold for the machine.
"""

import multiprocessing
import pathlib
import random
import statistics
import tempfile

import torch
from scipy.stats import spearmanr

import utils
from bench import study
from devices.table import measure_like, measure_table, open_runtime, with_latency
from devices.timing import Networks, device_name, take_turns
from engines.confirmation import confirm
from engines.search_files import unconfirmed
from engines.search_record import SearchRecord, prepare_search
from settings.fields import count
from settings.subjects import RUNTIMES
from space.custom import PRESETS
from space.search_space import SearchSpace
from utils import read_json

SPACES = {"small": SearchSpace(28, 10, stem_stride=1, **PRESETS["small"]), "paper": SearchSpace()}
NETWORKS = {"small": 40, "paper": 16}
EVOLUTION = {"population": 50, "select": 10, "mutation": 25, "crossover": 25, "mutation_prob": 0.1, "generations": 8}


def errors(predicted, first, second):
    """How well predictions fit two measurements of the same networks; all in ns."""
    measured = [(a + b) / 2 for a, b in zip(first, second)]
    mean = statistics.fmean(measured)
    error = statistics.fmean(abs(p - m) for p, m in zip(predicted, measured))
    of_mean = statistics.fmean(abs(mean - m) for m in measured)
    return {
        "mean_ms": mean / 1e6,
        "mean_absolute_error": error / mean,
        "of_predicting_the_mean": of_mean / mean,
        "of_another_measurement": statistics.fmean(abs(a - b) for a, b in zip(first, second)) / mean,
        "share": error / of_mean,
        "spearman": statistics.fmean(spearmanr(predicted, m).statistic for m in (first, second)),
        "spearman_of_two_measurements": float(spearmanr(first, second).statistic),
    }


def study_operations(runtime):
    """The latency of each operation at all blocks of a runtime's space, in ms, by name."""
    space = runtime.space
    networks = Networks(runtime, [space.uniform_candidate(choice) for choice in range(len(space.operations))])
    take_turns(runtime, networks)
    return {name: ns / 1e6 for name, ns in zip(space.operations, networks.medians())}


def study_predictions(runtime, n):
    """(the table of a runtime's space, its errors on n random networks)."""
    space = runtime.space
    rng = random.Random(1)
    candidates = [space.random_candidate(rng) for _ in range(n)]
    twice = [Networks(runtime, candidates) for _ in range(2)]
    table = measure_table(runtime, beside=twice)
    first, second = (networks.medians() for networks in twice)
    timed = with_latency(space, table)
    row = errors([timed.cost("latency", c) for c in candidates], first, second)
    row |= {"seconds": table["seconds"], "spread": table["spread"], "flops": [space.flops(c) for c in candidates]}
    return table, {**row, "measured_ms": [(a + b) / 2e6 for a, b in zip(first, second)]}


# --- searches ------------------------------------------------------------------------------------------------


def accuracy(space, candidate, seed):
    """Made up: grows with the predicted latency, with an error of its own for each seed and candidate."""
    rows, fixed = space.cost_rows("latency")
    low, high = (fixed + sum(map(pick, rows)) for pick in (min, max))
    error = random.Random(f"{seed} {candidate}").gauss(0, 1)
    return 40 + 40 * (space.cost("latency", candidate) - low) / (high - low) + error


def search(space, table, high, seed, out):
    """The state of a search with a limit on latency in ns, confirmed as search.py does."""
    settings = {**EVOLUTION, "seed": seed, "limits": {"latency": [None, high]}, "space": space.to_dict()}
    settings["latency"] = {name: table[name] for name in ("medians", "stem_and_tail")}
    prepare_search(out, settings, resume=False)
    while True:
        record = SearchRecord(out)
        while waiting := record.pending():
            for c in waiting:
                acc1 = accuracy(space, c, seed)
                record.add({"architecture": c, "acc1": acc1, "acc5": 99, "n_images": 1, "seconds": 0})
        record.lock.close()
        state = read_json(out / "checkpoints" / "search" / "state.json")
        if state["done"] and not unconfirmed(state):
            return state
        confirm(out, table)


def measure_again(space, candidates, table):
    """Runs in another process: the latencies of candidates as whole networks, in ns, at the scale of a table."""
    torch.set_num_threads(table["threads"])
    return measure_like(table, SearchSpace.from_dict(space), candidates)[0]


def study_searches(space, table, n):
    """A row for each of n searches: its limit, and what its winner takes, as shares of the limit."""
    timed = with_latency(space, table)
    rows = []
    winners = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(n):
            share = 0.2 + 0.6 * i / max(1, n - 1)
            high = timed.quantile("latency", share)
            state = search(timed, table, high, i, pathlib.Path(folder) / str(i))
            corrections = sum(row["correction"] is not None for row in state["confirmations"])
            rows.append({"share": share, "limit_ms": high / 1e6, "corrections": corrections})
            winners.append(tuple(state["best"]["architecture"]) if state["best"] else None)
    found = [c for c in winners if c]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        again = dict(zip(found, pool.apply(measure_again, (space.to_dict(), found, table))))
    for row, winner in zip(rows, winners):
        used = again[winner] / 1e6 / row["limit_ms"] if winner else None
        row |= {"used": used, "holds": winner is not None and used <= 1 + table["spread"]}
    return rows


HEAD = ("space, batch size", "mean ms", "table, s", "spread, %", "error, %", "of the mean, %",
        "of another measurement, %", "Spearman", "of two")  # fmt: skip


def cells_of_predictions(name, row):
    keys = ("spread", "mean_absolute_error", "of_predicting_the_mean", "of_another_measurement")
    cells = [name, f"{row['mean_ms']:.3f}", f"{row['seconds']:.0f}", *(f"{100 * row[key]:.1f}" for key in keys)]
    return [*cells, f"{row['spearman']:.3f}", f"{row['spearman_of_two_measurements']:.3f}"]


def print_taus(predictions, runtime, names):
    """Kendall's tau of latencies in a runtime with those of the same networks in the other one, and with FLOPs."""
    for name in names:
        one, *others = (predictions.get(f"{other}, {name}") for other in (runtime, *(RUNTIMES.keys() - {runtime})))
        text = f"{RUNTIMES[runtime]}, {name}: tau with FLOPs {study.tau(one['measured_ms'], one['flops']):.2f}"
        for other in filter(None, others):
            text += f", with the other runtime {study.tau(one['measured_ms'], other['measured_ms']):.2f}"
        print(text)


def print_searches(rows):
    head = ("limit at", "limit, ms", "winner measured again, % of the limit", "within the spread", "corrections")
    cells = []
    for row in rows:
        used = f"{100 * row['used']:.1f}" if row["used"] else "no winner"
        holds = "yes" if row["holds"] else "no"
        cells.append((f"{row['share']:.0%}", f"{row['limit_ms']:.3f}", used, holds, row["corrections"]))
    print(study.table(head, cells), flush=True)


def print_operations(by_runtime):
    space = SPACES["paper"]
    cells = []
    for choice, name in enumerate(space.operations):
        flops = f"{space.flops(space.uniform_candidate(choice)) / 1e6:.0f}"
        cells.append((name, flops, *(f"{row[name]:.2f}" for row in by_runtime.values())))
    print(study.table(("operation at all blocks", "MFLOPs", *(f"{RUNTIMES[n]}, ms" for n in by_runtime)), cells))


def parse_args(argv=None):
    defaults = {"--threads": 1, "--results": study.RESULTS / "latency.json"}
    parser = study.parser(__doc__, defaults, devices=("cpu", "cuda"), device="cpu")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=list(SPACES))
    parser.add_argument("--batch-sizes", nargs="+", type=count(), default=[1, 16], metavar="N", help="default: 1 16")
    parser.add_argument("--networks", type=count(2), metavar="N", help="of each space (default: 40 of small, 16)")
    parser.add_argument("--searches", type=count(0), default=20, metavar="N", help="default: 20")
    return parser.parse_args(argv)


def main(options):
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    setting = {"device": device_name(device), "threads": options.threads}
    results = {"setting": setting, "operations": {}, "predictions": {}, "searches": {}}
    for runtime in options.runtimes:
        table = None
        print(f"{RUNTIMES[runtime]}\n\n{study.table(HEAD, [])}")
        for name in options.spaces:
            for batch_size in options.batch_sizes:
                opened = open_runtime(runtime, SPACES[name], batch_size, device)
                if name == "paper" and batch_size == options.batch_sizes[0]:
                    results["operations"][runtime] = study_operations(opened)
                found, row = study_predictions(opened, options.networks or NETWORKS[name])
                results["predictions"][f"{runtime}, {name}, {batch_size}"] = row
                print(study.line(cells_of_predictions(f"{name}, {batch_size}", row)), flush=True)
                study.write(options.results, results, indent=1)
                if name == "small":
                    table = table or found
        print_taus(results["predictions"], runtime, [f"{s}, {n}" for s in options.spaces for n in options.batch_sizes])
        if table and options.searches:
            results["searches"][runtime] = study_searches(SPACES["small"], table, options.searches)
            print_searches(results["searches"][runtime])
        study.write(options.results, results, indent=1)
    if results["operations"]:
        print_operations(results["operations"])


if __name__ == "__main__":
    utils.run_script(main, parse_args)

"""Times the networks in its folder in ONNX Runtime, in turns, and writes results.json.

    python on_device.py

`tester.py --mode latency --elsewhere DIR` copies this file into DIR, from which it runs on any device that has Python,
NumPy and onnxruntime. networks.json says the shape of the input, the threads, and the reference.
"""

import itertools
import json
import pathlib
import platform
import statistics
import sys
import time

ROUNDS, FEWEST = 10, 2  # as many as begin within SECONDS, but at least FEWEST
SECONDS = 400
WARM_UP = 2  # runs before those that count: the first one allocates memory, the second one plans it
RUNS, RUN_NS = 20, 40_000_000  # in a round, a network runs RUNS times, or until that took so long


def cpu_name():
    """The name of this device's CPU."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def open_session(model, threads):
    """The session of a model, a file or its bytes, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Sessions take turns: the threads of one must not be busy waiting while another one runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def rounds(most, seconds, fewest):
    """Counts rounds: up to `most`, or as many as begin within `seconds`, but at least `fewest`."""
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda i: i < fewest or time.monotonic() < end, range(most))


def ratio(run, reference, warm_up, runs):
    """The median ratio of what `run()` takes to what `reference()` takes, in ns, each timed directly after the other.

    After `warm_up` runs, `runs` of them count, or as many as begin within RUN_NS.
    """
    for _ in range(warm_up):
        run()
    found, passed, before = [], 0, reference()
    while len(found) < runs and passed < RUN_NS:
        ns, after = run(), reference()
        found.append(2 * ns / (before + after))
        passed, before = passed + ns, after
    return statistics.median(found)


def main():
    import numpy as np
    import onnxruntime

    folder = pathlib.Path(sys.argv[0]).resolve().parent
    setup = json.loads((folder / "networks.json").read_text())
    inputs = {"images": np.random.default_rng(0).standard_normal(setup["input"], np.float32)}
    # On Windows, the clock of a thread advances in ticks of 15.6 ms.
    by_thread = setup["threads"] == 1 and sys.platform != "win32"
    clock = time.thread_time_ns if by_thread else time.perf_counter_ns

    def open_network(name):
        session = open_session(str(folder / f"{name}.onnx"), setup["threads"])

        def ns():
            start = clock()
            session.run(None, inputs)
            return clock() - start

        return ns

    run_reference, reference_ns = open_network(setup["reference"]), []

    def reference():
        reference_ns.append(run_reference())
        return reference_ns[-1]

    names = sorted(path.stem for path in folder.glob("*.onnx"))
    ratios = {name: [] for name in names}
    for number in rounds(ROUNDS, SECONDS, FEWEST):
        for name in names:
            ratios[name].append(ratio(open_network(name), reference, WARM_UP, RUNS))
        print(f"round {number + 1} of at most {ROUNDS}", flush=True)
    usual = statistics.median(reference_ns)
    results = {"device": cpu_name(), "onnxruntime": onnxruntime.__version__, "threads": setup["threads"]}
    results |= {"batch_size": setup["input"][0], "ns": {}}
    for name, found in ratios.items():
        results["ns"][name] = [round(statistics.median(half) * usual) for half in (found[::2], found[1::2])]
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    print(f"{folder / 'results.json'}: {len(names)} networks")


if __name__ == "__main__":
    main()

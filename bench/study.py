"""What the studies share: their flags, results, candidates, processes, measurements, and Kendall's tau.

A study writes each result as soon as it exists, and skips what it finds there: the same command resumes.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from scipy.stats import kendalltau

import utils
from settings.fields import count
from space.limits import Limits

ROOT = utils.HERE
RESULTS = ROOT / "bench" / "results"
DRAWS = 1000  # draws of a bootstrap
ONE_THREAD = ("--workers", 0, "--threads", 1)
FLAGS = {  # that several studies have: their type, and what they mean
    "--results": (pathlib.Path, "file of the results"),
    "--out": (pathlib.Path, "folder of the runs"),
    "--data-dir": (pathlib.Path, "folder of the images"),
    "--jobs": (count(), "processes at a time"),
    "--threads": (count(), "of each process"),
    "--seconds": (float, "end what has not ended by then; the same command resumes"),
    "--iterations": (count(), "of each supernet"),
    "--seeds": (count(), "of each kind"),
    "--networks": (count(), "to score (default: all)"),
}


def parser(doc, defaults, devices=("auto", "cpu", "cuda"), device=None):
    """An ArgumentParser with the text of a module, those of FLAGS that have `defaults`, and --device if it has one."""
    form = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False)
    for flag, default in defaults.items():
        kind, text = FLAGS[flag]
        shown = "" if default is None else f" (default: {default})"
        made.add_argument(flag, type=kind, default=default, help=text + shown)
    if device:
        made.add_argument("--device", choices=devices, default=device, help=f"default: {device}")
    return made


# --- results --------------------------------------------------------------------------------------------------


def read(path, default=None):
    """The content of a results file, `default` (an empty one) if there is none."""
    return utils.read_json(path) if path.exists() else default or {}


def write(path, content, indent=None):
    """Writes a results file, with commit and versions."""
    utils.write_json(path, content | {"commit": utils.commit(), "versions": utils.versions()}, indent=indent)


def lines(path):
    """The rows of a file of JSON lines; of a process that was killed, the last one may be torn."""
    whole = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(text) for text in whole if text.endswith("\n")]


def add_line(path, row):
    """Adds a row to a file of JSON lines."""
    rows = [*lines(path), row]
    with utils.atomic_write(path) as file:
        file.writelines(json.dumps(one) + "\n" for one in rows)


def line(cells):
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(head, rows):
    """A Markdown table."""
    return "\n".join([line(head), f"|{'---|' * len(head)}", *map(line, rows)])


def rounded(value):
    """A result whose numbers have three decimals; keys become text."""
    if isinstance(value, dict):
        return {str(key): rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    return round(value, 3) if isinstance(value, float) else value


# --- candidates -----------------------------------------------------------------------------------------------


def random_legal(space, bounds, n, seed=0):
    """`n` different networks, uniform among the candidates within the bounds, {cost: (low, high)}.

    Raises UserError if so many are not to be found.
    """
    limits, rng, found, draws = Limits(space, bounds), random.Random(seed), {}, 0
    while len(found) < n:
        candidate = space.random_candidate(rng)
        draws += 1
        if not limits.excess(candidate):
            found.setdefault(space.canonical(candidate), candidate)
        if draws > 1000 * n + 10_000:
            raise utils.UserError(f"{n} candidates are asked for, but within the limits there are about {len(found)}")
    return list(found.values())


def largest_legal(space, most):
    """The candidate of the most FLOPs, up to `most`; of equals, the one that comes first."""
    return Limits(space, {"flops": (None, most)}).largest()


# --- processes ------------------------------------------------------------------------------------------------


def side_by_side(commands, jobs):
    """Runs commands {name: (words, log file)}, `jobs` at a time, in their order; says when one ends.

    Ends this process where one fails.
    """

    def run(name):
        words, log = commands[name]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as output:
            command = [sys.executable, *map(str, words)]
            code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT).returncode
        print(f"{name}: {'done' if code == 0 else f'failed, see {log}'}", flush=True)
        return code

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        if any(list(pool.map(run, commands))):
            sys.exit("a part of the study failed; the same command resumes it")


class Command:
    """A command of this project in a folder of its own; run again, it resumes."""

    def __init__(self, script, words, folder):
        self.words = [sys.executable, *script.split(), *map(str, words), "--out", str(folder)]
        self.folder = pathlib.Path(folder)
        self.child = None

    def start(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "stdout", "w") as out, open(self.folder / "stderr", "w") as errors:
            self.child = subprocess.Popen(self.words, cwd=ROOT, stdout=out, stderr=errors)

    def done(self):
        """Whether it has ended well."""
        ended = lines(self.folder / "costs.jsonl")
        return bool(ended) and ended[-1]["exit"] == 0

    def running(self):
        return self.child is not None and not os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)

    def end(self):
        """Ends the process if it runs; it writes a checkpoint then. Returns its exit code.

        Adds its CPU-seconds, and those of its own processes, to costs.jsonl.
        """
        if self.running():
            self.child.terminate()
        _, status, usage = os.wait4(self.child.pid, 0)
        self.child.returncode = code = os.waitstatus_to_exitcode(status)
        self.child = None
        row = {"cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1), "exit": code}
        add_line(self.folder / "costs.jsonl", row)
        return code

    @property
    def cpu_seconds(self):
        """Of all processes up to now."""
        return round(sum(row["cpu_seconds"] for row in lines(self.folder / "costs.jsonl")), 1)

    def result(self):
        """What the command printed last."""
        return json.loads((self.folder / "stdout").read_text().splitlines()[-1])


class Task:
    """A command whose end is a result, by `key`; `needs` is the key of a task before it, `prepare` is called first."""

    def __init__(self, key, command, needs=None, prepare=lambda: None):
        self.key = key
        self.command = command
        self.needs = needs
        self.prepare = prepare

    def numbers(self):
        """The CPU-seconds of the command, and of what it printed last the architecture, its costs and its top-1."""
        kept = ("architecture", "flops", "params", "acc1", "n_images")
        printed = self.command.result()
        return {name: printed[name] for name in kept if name in printed} | {"cpu_seconds": self.command.cpu_seconds}


def of_steps(n):
    """Flags of a training of `n` steps, which is validated once."""
    return [*ONE_THREAD, "--iterations", n, "--val-every", n, "--save-every", n]


def retraining(key, words, architecture, folder, needs=None):
    """The Task of scratch.py with these flags; `architecture` is a file, or its content."""

    def prepare():
        if path != architecture:
            folder.mkdir(parents=True, exist_ok=True)
            utils.write_json(path, architecture)

    path = architecture if isinstance(architecture, pathlib.Path) else folder / "architecture.json"
    return Task(key, Command("scratch.py", [*words, "--architecture", path], folder), needs, prepare)


def run(tasks, done, keep, jobs, end):
    """Runs the Tasks of `tasks()` whose keys are not in `done()`, `jobs` at a time, in their order.

    Calls `keep(task)` when one ends, and ends all at the time `end`. A task that fails is named, and so ends what needs
    it. Returns the keys of those that failed.
    """
    running, failed = [], []
    try:
        while True:
            begun = [task.key for task in running] + failed
            waiting = [task for task in tasks() if task.key not in done() + begun]
            ready = [task for task in waiting if task.needs is None or task.needs in done()]
            if not ready and not running:
                return failed  # all is done, or what the others need has failed
            for task in ready[: max(0, jobs - len(running))]:
                task.prepare()
                if not task.command.done():
                    task.command.start()
                running.append(task)
            while all(task.command.running() for task in running):
                time.sleep(0.2)
                if time.time() > end:
                    print(f"out of time: {len(waiting)} tasks are left", flush=True)
                    return failed
            for task in [task for task in running if not task.command.running()]:
                running.remove(task)
                if code := 0 if task.command.done() else task.command.end():
                    errors = (task.command.folder / "stderr").read_text()[-500:]
                    print(f"{task.key} failed with exit code {code}: {errors}", flush=True)
                    failed.append(task.key)
                else:
                    keep(task)
    finally:
        for task in running:
            if task.command.child:
                task.command.end()


@contextlib.contextmanager
def interruptible():
    """Within the block, SIGTERM does what Ctrl-C does: commands end with a checkpoint, and their costs are kept."""
    try:
        with utils.signals(utils.interrupt):
            yield
    except utils.Interrupted:
        raise KeyboardInterrupt from None


# --- measurements ---------------------------------------------------------------------------------------------


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device, function):
    """How long a call takes, with all that it starts on a GPU."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


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


# --- Kendall's tau --------------------------------------------------------------------------------------------


def tau(a, b):
    return float(kendalltau(a, b).statistic)


def agreement(predictors, truth, others=None):
    """[Kendall's tau with the truth, low, high]: the mean over `predictors` (a list for each seed).

    The 95% interval is that of a bootstrap over the networks. With `others`, a list or one for each seed, the paired
    difference from the mean of their taus, and its interval.
    """
    rows, true = np.array(predictors, float), np.array(truth, float)
    others = np.empty((0, len(true))) if others is None else np.atleast_2d(np.array(others, float))

    def statistic(networks):
        means = [statistics.fmean(tau(row[networks], true[networks]) for row in some) for some in (rows, others)
                 if len(some)]  # fmt: skip
        return means[0] - sum(means[1:])

    return bootstrap(statistic, len(true))


def bootstrap(statistic, n):
    """[statistic, low, high] of `n` networks: the 95% interval of a bootstrap; `statistic` takes their indices."""
    found = [statistic(draw) for draw in np.random.default_rng(0).integers(n, size=(DRAWS, n))]
    return [statistic(np.arange(n)), *np.nanquantile(found, (0.025, 0.975)).tolist()]


def interval(row):
    """A value and its interval, as text."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*row)

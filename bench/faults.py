"""What goes wrong with the four commands, tried: `python bench/faults.py` (some 20 minutes on a core with 100 kills a command).

Every row of the table is made in this run: a fault is injected into a command with tiny settings, the surviving state is read and
hashed, the command is given again, and its result has to be that of an undisturbed run. `--break NAME` takes one guard out of the
project's code, and the rows that rest on it have to turn red: exit code 1, as for any other red row.

The commands are run as processes forked from this one, which has imported the project: each starts at once, and a fault is a
function replaced in the fork before the script begins. SIGKILL, full disks and locks are real in every other way. The search
space is the paper's with a few channels, so that a checkpoint has half a megabyte; local workers are forked too, not spawned, and no
report of a search is drawn.
NNI's own processes are started as always. Linux alone. Writes bench/results/faults.json.
"""
import argparse
import builtins
import contextlib
import errno
import functools
import gc
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402

# isort: split
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  which an optimizer imports, as others the next two: once here instead of in every fork
import torch.utils.tensorboard  # noqa: E402
import torchvision.transforms.v2  # noqa: E402, F401
from PIL import Image  # noqa: E402

import checkpoint  # noqa: E402
import dataloader  # noqa: E402
import evaluation  # noqa: E402
import local_engine  # noqa: E402
import report  # noqa: E402
import search_record  # noqa: E402
import training  # noqa: E402
from network import load_file  # noqa: E402
from search_space import SearchSpace  # noqa: E402

STEP = 4096  # bytes
COMMANDS = ("supernet.py", "tester.py", "search.py", "scratch.py")


class Lost(Exception):
    """A fault did harm: what it was."""


# --- guards that --break takes out: in a fork, before the script runs -------------------------------------------


def _everywhere(name, value):
    """Replaces a name in all modules of the project that have it."""
    for module in [m for m in list(sys.modules.values()) if str(getattr(m, "__file__", None) or "").startswith(f"{ROOT}{os.sep}")]:
        if ".venv" not in module.__file__ and hasattr(module, name):
            setattr(module, name, value)


@contextlib.contextmanager
def _plain_write(path, mode="w"):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, mode) as file:
        yield file


def _accept_anything(self, result, trial=None):
    return self._append(tuple(result["architecture"]), {k: result[k] for k in ("acc1", "acc5", "n_images", "seconds")}, trial)


def _blind(fetch):
    def run(meter):
        meter.window = [torch.nan_to_num(values) for values in meter.window]
        return fetch(meter)

    return run


def _break(name):
    load, read = torch.load, search_record.read_generations
    {
        "atomic-write": lambda: _everywhere("atomic_write", _plain_write),
        "lock": lambda: _everywhere("hold_lock", lambda path, wait_s=0: contextlib.nullcontext()),
        "repair": lambda: setattr(search_record, "read_generations", lambda out, repair=False: read(out)),
        "optimizer": lambda: setattr(torch.optim.SGD, "load_state_dict", lambda self, state: None),
        "nan": lambda: setattr(search_record.SearchRecord, "add", _accept_anything),
        "finite": lambda: setattr(training._Meter, "fetch", _blind(training._Meter.fetch)),
        "full-disk": lambda: _everywhere("run_script", lambda main, parse_args: main(parse_args())),
        "loader": lambda: setattr(dataloader, "UserError", RuntimeError),
        "no-code": lambda: setattr(torch, "load", lambda path, **how: load(path, **how | {"weights_only": False})),
        "parent-watch": lambda: _everywhere("leave_signals_to_parent", lambda *_: None),
    }[name]()


BREAKS = ("atomic-write", "lock", "repair", "optimizer", "nan", "finite", "full-disk", "loader", "no-code", "parent-watch")


# --- faults: in a fork, before the script runs -------------------------------------------------------------------


class Events:
    """Counts what the fork's main thread does to files: opens for writing, first writes, fsync, rename, unlink; acts at the n-th.

    `action` "kill": half of a write is done, then SIGKILL. "full": from then on, nothing more can be written (ENOSPC).
    """

    def __init__(self, action, n, report=None):
        self.action, self.n, self.seen, self.report, self.pid = action, n, 0, report, os.getpid()

    def happen(self, half=None, needs_space=True):
        if os.getpid() != self.pid or threading.current_thread() is not threading.main_thread():
            return
        if self.action == "full" and not needs_space:
            return
        self.seen += 1
        if self.report:
            os.pwrite(self.report, str(self.seen).encode(), 0)
        if self.action == "kill" and self.seen == self.n:
            if half:
                half()
            os.kill(self.pid, signal.SIGKILL)
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @property
    def full(self):
        """Whether the disk is full by now."""
        return self.action == "full" and self.seen >= self.n > 0

    def install(self):
        opened, replace, fsync, unlink, fdopen = builtins.open, os.replace, os.fsync, os.unlink, os.fdopen

        def watched(function, needs_space):
            def run(*args, **kwargs):
                self.happen(needs_space=needs_space)
                return function(*args, **kwargs)

            return run

        def open_file(file, mode="r", *args, **kwargs):
            if not set(mode) & set("wax+"):
                return opened(file, mode, *args, **kwargs)
            self.happen()
            return _File(opened(file, mode, *args, **kwargs), self)

        builtins.open = open_file
        os.fdopen = lambda descriptor, mode="r", *args, **kwargs: _File(fdopen(descriptor, mode, *args, **kwargs), self)
        os.replace, os.unlink, os.fsync = watched(replace, False), watched(unlink, False), watched(fsync, True)


class _File:
    def __init__(self, file, events):
        self.file, self.events, self.written = file, events, False

    def write(self, data):
        if not self.written or self.events.full:
            self.written = True
            self.events.happen(half=lambda: (self.file.write(data[: len(data) // 2]), self.file.flush()))
        return self.file.write(data)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def clock_back():
    """time.time() from 2001 on."""
    now, start = time.time, time.time()
    time.time = lambda: 1e9 + now() - start


def bad_trials(kind):
    """Every third candidate by the sum of its choices "crashes" its worker, or reports "nan"."""
    evaluate = evaluation.Evaluator.evaluate

    def run(self, candidates):
        bad = [c for c in candidates if sum(c) % 3 == 0]
        if bad and kind == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        return [r | {"acc1": float("nan")} if sum(r["architecture"]) % 3 == 0 else r for r in evaluate(self, candidates)]

    evaluation.Evaluator.evaluate = run


def poisoned_step(step):
    """The weights become NaN before a training step."""
    batches = dataloader.Loader.batches

    def run(self, plan):
        for n, (images, labels) in enumerate(batches(self, plan), 1):
            yield images * float("nan") if n == step and self.augment else images, labels

    dataloader.Loader.batches = run


def tiny(cls, input_size=224, n_classes=1000):
    return cls(input_size, n_classes, 1, stage_channels=(8, 12, 16, 20), stem_channels=4, last_channels=16)


# --- running the commands ----------------------------------------------------------------------------------------


class Process:
    """A command in a fork of this process; `fault()` is called in it before the script runs."""

    def __init__(self, arena, script, words, fault=None):
        self.log = arena.folder / f"stderr{next(arena.numbers)}"
        self.pid = os.fork()
        if self.pid == 0:
            self._run(arena, script, [str(w) for w in words], fault)
        self.code = None

    def _run(self, arena, script, words, fault):
        code = 1
        try:
            os.setpgid(0, 0)
            with open(self.log, "wb") as log, open(self.log.with_suffix(".out"), "wb") as out:
                os.dup2(log.fileno(), 2)
                os.dup2(out.fileno(), 1)
            sys.argv = [script, *words]
            if arena.broken:
                _break(arena.broken)
            if fault:
                fault()
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else bool(error.code)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def wait(self, timeout=300):
        deadline = time.monotonic() + timeout
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                self.kill()
                raise Lost(f"did not end in {timeout} s")
            else:
                time.sleep(0.005)
        return self

    def family(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    def kill(self):
        """SIGKILL; what it had started has to end by itself."""
        family = self.family()
        os.kill(self.pid, signal.SIGKILL)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        left = psutil.wait_procs(family, timeout=15)[1]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if left:
            raise Lost(f"{len(left)} processes of a killed one went on")

    def stderr(self):
        return self.log.read_text(errors="replace")

    def stdout(self):
        return self.log.with_suffix(".out").read_text(errors="replace")

    def one_line(self):
        """The error of a command that ended with code 2; Lost where it ended otherwise, or said more than the log and a line."""
        lines = [line for line in self.stderr().splitlines() if not re.match(r"\d\d:\d\d:\d\d |\r| *$", line)]
        if self.code != 2 or len(lines) != 1 or ": error: " not in lines[0]:
            raise Lost(f"exit code {self.code}: {' / '.join(lines)[-300:]}")
        return lines[0].split(": error: ")[1]


class Arena:
    """Images, settings and undisturbed results of the four commands, and the folders in which the faults happen."""

    def __init__(self, folder, options):
        self.folder, self.broken, self.kills, self.seed = folder, options.broken, options.kills, options.seed
        self.every = options.every
        self.numbers = iter(range(10**9))
        rng = np.random.default_rng(options.seed)
        for part, n in (("train", 12), ("val", 4)):
            for name in "ab":
                (folder / "images" / part / name).mkdir(parents=True)
                for i in range(n):
                    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "images" / part / name / f"{i}.png")
        common = {"data-dir": str(folder / "images"), "input-size": 28, "heldout-per-class": 3, "loader": "torchvision", "workers": 0, "threads": 1}
        train = {"iterations": 8, "batch-size": 4, "lr": 0.01, "save-every": 2, "val-every": 8, "keep": 2}
        bn = {"bn-batches": 2, "bn-batch-size": 4}
        evolution = {"population": 4, "select": 2, "mutation": 1, "crossover": 1, "generations": 3, "concurrency": 1, "candidates-per-trial": 2}
        sections = {"common": common, "supernet": train | bn | {"val-paths": 1, "sampler": "uniform"}, "scratch": train | {"bn-pass": 2},
                    "tester": bn, "search": bn | evolution}  # fmt: skip
        self.config = folder / "settings.yml"
        self.config.write_text(json.dumps(sections))  # which is YAML
        self.reference, self.seconds = {}, {}
        self.supernet = None
        for script in ("supernet.py", "scratch.py", "tester.py", "search.py"):
            out = self.new()
            start = time.perf_counter()
            process = self.command(script, out).wait()
            self.seconds[script] = time.perf_counter() - start
            if process.code:
                sys.exit(f"{script} does not even run undisturbed: {process.stderr()}")
            self.reference[script] = self.result(script, out, process)
            print(f"undisturbed {script}: {self.seconds[script]:.1f} s", file=sys.stderr)
            if script == "supernet.py":
                self.supernet = checkpoint.newest(out / "checkpoints" / "supernet")

    def new(self):
        """An empty --out."""
        out = self.folder / f"out{next(self.numbers)}"
        out.mkdir()
        (out / "nni_auto_gen_search_space.json").write_text(json.dumps(SearchSpace().nni_search_space()))
        return out

    def command(self, script, out, *more, fault=None):
        words = ["--config", self.config, "--out", out, "--cache", out / "cache"]
        if script == "tester.py":
            words += ["--architecture", ROOT / "architecture_final.json", "--checkpoint", self.supernet]
        if script == "search.py":
            words += ["--checkpoint", self.supernet, "--resume", "--engine", "local"]
        return Process(self, script, [*words, *more], fault)

    def result(self, script, out, process):
        """A hash of what the command is for, once it has ended well."""
        if script == "tester.py":
            return digest(json.loads(process.stdout().splitlines()[-1]) | {"seconds": 0})
        return self.state(script, out)[0]

    def state(self, script, out):
        """(hash, how far it had got) of the state in `out`. Lost where a file of it is not whole."""
        try:
            if script == "search.py":
                results = [r | {"seconds": 0} for r in search_record.read_results(out)]
                architectures = {p.name: utils.read_json(p) for p in sorted((out / "checkpoints").glob("*.json"))}
                if search_record.state_path(out).exists():
                    utils.read_json(search_record.state_path(out))
                return digest([results, architectures]), len(results)
            if script == "tester.py":
                return digest(sorted(p.name for p in (out / "cache").glob("*.images"))), 0
            folder = out / "checkpoints" / script.removesuffix(".py")
            step, found = 0, []
            for path in [*checkpoint.checkpoints(folder), *folder.glob("bnps-checkpoint.pth")]:
                content = load_file(path)
                step = max(step, content["step"])
                found.append([path.name, content["step"], [[k, v.numpy().tobytes().hex()] for k, v in content["model"].items()]])
            return digest(found[-2:]), step
        except utils.UserError as error:
            raise Lost(f"a file is not whole: {error}") from None

    def finish(self, script, out):
        """Gives the command again, undisturbed: it has to come to the undisturbed result."""
        process = self.command(script, out).wait()
        if process.code:
            raise Lost(f"the command given again ends with {process.code}: {process.stderr().strip().splitlines()[-1:]}")
        if self.result(script, out, process) != self.reference[script]:
            raise Lost("the command given again comes to another result")


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


# --- the rows: each a function of the arena that returns (tries, what happened, [[process, where, hash], ...]) -------------------


def killed_at_random(arena, script):
    """SIGKILL at uniform times; the command is given again and again until it ends well, then once more in a new folder."""
    rng, kills, finished, seen = random.Random(f"{arena.seed} {script}"), 0, 0, []
    out, before = arena.new(), 0
    while kills < arena.kills:
        at = rng.uniform(0, 1.2 * arena.seconds[script])
        process, start = arena.command(script, out), time.perf_counter()
        while time.perf_counter() < start + at and process.code is None:
            if os.waitpid(process.pid, os.WNOHANG)[0]:
                process.code = 0
            time.sleep(0.002)
        if process.code == 0:  # it was faster
            arena.seconds[script] = time.perf_counter() - start
            if arena.state(script, out)[0] != arena.reference[script] and script != "tester.py":
                raise Lost("a killed command came to another result")
            finished, out, before = finished + 1, arena.new(), 0
            continue
        process.kill()
        kills += 1
        state, reached = arena.state(script, out)
        seen.append([process.pid, round(at, 3), state])
        if reached < before:
            raise Lost(f"went back from {before} to {reached}")
        before = reached
        if script == "tester.py":
            arena.finish(script, out)
            out = arena.new()
    arena.finish(script, out)
    return kills, f"each went on from the state that was there; {finished + 1} chains of kills came to the undisturbed result", seen


def count_events(arena, script, action):
    out = arena.new()
    report = os.open(arena.folder / "events", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    process = arena.command(script, out, fault=lambda: Events(action, -1 if action == "kill" else 10**9, report).install()).wait()
    if process.code:
        raise Lost(f"does not run while it is counted: {process.stderr()[-300:]}")
    n = int(os.pread(report, 20, 0))
    os.close(report)
    return n


def killed_at_every_write(arena, script):
    n, seen = count_events(arena, script, "kill"), []
    for i in range(1, n + 1, arena.every):
        out = arena.new()
        process = arena.command(script, out, fault=functools.partial(lambda i: Events("kill", i).install(), i))
        family = process.family()
        process.wait()
        psutil.wait_procs(family, timeout=15)
        time.sleep(0.3 * (script == "search.py"))  # its workers end by themselves, and hold its lock until then
        if process.code != -signal.SIGKILL:
            raise Lost(f"write {i} was never reached")
        seen.append([process.pid, i, arena.state(script, out)[0]])
        arena.finish(script, out)
        shutil.rmtree(out)
    return len(seen), f"of {n} writes: killed before a rename, removal or fsync, or within a first write; the same result after it", seen


def full_disk_at_every_write(arena, script):
    n, seen, refused = count_events(arena, script, "full"), [], 0
    for i in range(1, n + 1, arena.every):
        out = arena.new()
        process = arena.command(script, out, fault=functools.partial(lambda i: Events("full", i).install(), i)).wait(60)
        if process.code:
            process.one_line()
            refused += 1
        elif "Traceback" in process.stderr():
            raise Lost(f"write {i}: a traceback")
        seen.append([process.pid, i, arena.state(script, out)[0]])
        arena.finish(script, out)
        shutil.rmtree(out)
    return len(seen), f"of {n} writes: {refused} ended with one line, the others could do without the file; the same result once there is room", seen


def truncated_checkpoint(arena, _script):
    """In this process: no cut is taken for a whole file."""
    data, seen = arena.supernet.read_bytes(), []
    path = arena.folder / "cut.pth"
    for size in range(0, len(data), STEP):
        path.write_bytes(data[:size])
        try:
            checkpoint.load_supernet(path, None)
        except utils.UserError:
            continue
        raise Lost(f"{size} of {len(data)} bytes were taken for a checkpoint")
    out = arena.new()
    arena.command("supernet.py", out).wait()
    newest = checkpoint.newest(out / "checkpoints" / "supernet")
    newest.write_bytes(newest.read_bytes()[:-STEP])
    process = arena.command("supernet.py", out).wait()
    line = process.one_line() if process.code else ""
    if line and str(newest) not in line:
        raise Lost(f"the error does not name the file: {line}")
    newest.unlink(missing_ok=True)
    seen.append([process.pid, len(data) - STEP, arena.state("supernet.py", out)[0]])
    arena.finish("supernet.py", out)
    return len(range(0, len(data), STEP)), "each cut is refused in a line that names the file; without it, the run goes on from the one before", seen


def hostile_checkpoint(arena, _script):
    mark, out = arena.folder / "executed", arena.new()

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    torch.save({"model": Bomb()}, arena.folder / "bomb.pth")
    process = arena.command("tester.py", out, "--checkpoint", arena.folder / "bomb.pth").wait()
    if mark.exists():
        mark.rmdir()
        raise Lost("a pickle was executed")
    process.one_line()
    return 1, "refused in a line, not executed", [[process.pid, 0, arena.state("tester.py", out)[0]]]


def two_runs(arena, script):
    out = arena.new()
    first = arena.command(script, out, fault=lambda: os.environ.update(GOMP_SPINCOUNT="1"))
    deadline = time.monotonic() + 30
    while not list((out / "checkpoints").rglob("*.lock")) and not list((out / "checkpoints").rglob("run.log")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = arena.command(script, out).wait(90)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.wait()
    line = second.one_line()
    if first.code or arena.result(script, out, first) != arena.reference[script]:
        raise Lost("the first run did not come to its result")
    return 1, f"the second was refused: {line.split(': ')[-1]}", [[second.pid, 0, arena.state(script, out)[0]]]


def clock_set_back(arena, script):
    """Killed, then everything written in the future of a clock that says 2001."""
    out = arena.new()
    process = arena.command(script, out)
    time.sleep(arena.seconds[script] * 0.7)
    process.kill()
    again = arena.command(script, out, fault=clock_back).wait()
    if again.code or arena.result(script, out, again) != arena.reference[script]:
        raise Lost(f"another result, exit code {again.code}")
    return 1, "the same result", [[again.pid, 0, arena.state(script, out)[0]]]


def loader_worker_killed(arena, script):
    out = arena.new()
    process = arena.command(script, out, "--workers", 1)
    while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        for worker in [p for p in process.family() if _is(p, "faults.py")]:  # but not git, which says the commit
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        time.sleep(0.001)
    process.wait()
    line = process.one_line()
    state = arena.state(script, out)[0]
    again = arena.command(script, out, "--workers", 1).wait()
    if again.code or arena.result(script, out, again) != arena.reference[script]:
        raise Lost(f"another result, exit code {again.code}")
    return 1, f"one line ({line.split(';')[0][:60]}), then the same result", [[process.pid, 0, state]]


def not_finite(arena, script):
    out = arena.new()
    process = arena.command(script, out, fault=lambda: poisoned_step(7)).wait()
    line = process.one_line()
    if "step 7" not in line or "learning rate" not in line or (script == "supernet.py") != ("path [" in line):
        raise Lost(f"the error doesn't say where: {line}")
    state, step = arena.state(script, out)
    if step != 6:
        raise Lost(f"the last checkpoint is of step {step}")
    arena.finish(script, out)
    return 1, "stopped with step, path and learning rate; the checkpoint before it is there", [[process.pid, 7, state]]


def bad_trial(arena, kind):
    out = arena.new()
    process = arena.command("search.py", out, fault=lambda: bad_trials(kind)).wait()
    results = search_record.read_results(out)
    failed = [r for r in results if r["acc1"] is None]
    if process.code or len(results) != 12 or not failed or any(sum(r["architecture"]) % 3 for r in failed):
        raise Lost(f"exit code {process.code}, {len(failed)} of {len(results)} failed: {process.stderr()[-200:]}")
    if any(sum(r["architecture"]) % 3 == 0 for r in results if r["acc1"] is not None):
        raise Lost("a bad number was believed")
    return 1, f"{len(failed)} candidates have failed, alone; the search went on to its end", [[process.pid, 0, arena.state("search.py", out)[0]]]


def search_worker_killed(arena, _script):
    rng, seen = random.Random(f"{arena.seed} worker"), []
    while len(seen) < max(1, arena.kills // 10):
        out = arena.new()
        process, at = arena.command("search.py", out), rng.uniform(0, arena.seconds["search.py"])
        time.sleep(at)
        workers = process.family()
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        process.wait()
        if process.code or arena.result("search.py", out, process) != arena.reference["search.py"]:
            raise Lost(f"another result, exit code {process.code}: {process.stderr()[-300:]}")
        if workers:
            seen.append([workers[0].pid, round(at, 3), arena.state("search.py", out)[0]])
        shutil.rmtree(out)
    return len(seen), "its candidates went to another worker; the same result, the command did not stop", seen


def _nni(arena, out, *more):
    process = arena.command("search.py", out, "--engine", "nni", *more)
    deadline = time.monotonic() + 120
    while not (trials := [p for p in process.family() if _is(p, "tester.py") and not _is(p, "/bin/sh")]) or not _is(process, "results", out):
        if time.monotonic() > deadline or os.waitpid(process.pid, os.WNOHANG)[0]:
            raise Lost(f"NNI gave no result: {process.stderr()[-300:]}")
        time.sleep(0.05)
    return process, trials


def _is(process, text, out=None):
    if out:
        return bool(list((out / "acc").glob("*.jsonl")))
    with contextlib.suppress(psutil.Error):
        return any(text in word for word in process.cmdline())
    return False


def nni_manager_killed(arena, _script):
    out = arena.new()
    process, _ = _nni(arena, out)
    managers = [p for p in process.family() if _is(p, "main.js")]
    for manager in managers:
        manager.kill()
    process.wait(120)
    if not managers or "--resume" not in process.one_line():
        raise Lost("the error does not say how to go on")
    state = arena.state("search.py", out)[0]
    arena.finish("search.py", out)
    return 1, "one line says so and how to go on; the same result", [[managers[0].pid, 0, state]]


def nni_trial_hangs(arena, _script):
    out = arena.new()
    process, trials = _nni(arena, out, "--trial-timeout", 12)
    for trial in trials:
        trial.suspend()
    process.wait(300)
    if process.code or arena.result("search.py", out, process) != arena.reference["search.py"]:
        raise Lost(f"another result, exit code {process.code}: {process.stderr()[-300:]}")
    seen = [[trials[0].pid, 0, arena.state("search.py", out)[0]]]
    return 1, "ended after --trial-timeout, its candidates evaluated by another; the same result", seen


# (fault, the function, what it is given, the guards that it rests on)
ROWS = [
    *(("SIGKILL at a uniformly drawn time", killed_at_random, script, ("atomic-write", "optimizer", "parent-watch")) for script in COMMANDS),
    *(("SIGKILL at every write and rename", killed_at_every_write, script, ("atomic-write", "repair")) for script in COMMANDS),
    *(("disk full at every write", full_disk_at_every_write, script, ("full-disk", "atomic-write")) for script in COMMANDS),
    ("checkpoint cut at every 4 KiB", truncated_checkpoint, "supernet.py", ()),
    ("checkpoint that would execute code", hostile_checkpoint, "tester.py", ("no-code",)),
    *(("two runs in one folder", two_runs, script, ("lock",)) for script in ("supernet.py", "search.py", "scratch.py")),
    *(("clock set back to 2001", clock_set_back, script, ()) for script in ("supernet.py", "search.py", "scratch.py")),
    *(("loader process killed", loader_worker_killed, script, ("loader",)) for script in ("supernet.py", "scratch.py")),
    *(("loss not finite", not_finite, script, ("finite",)) for script in ("supernet.py", "scratch.py")),
    *((f"trial: {kind}", bad_trial, kind, ("nan",) if kind == "nan" else ()) for kind in ("crash", "nan")),
    ("local worker killed", search_worker_killed, "search.py", ()),
    ("NNI's manager killed", nni_manager_killed, "search.py", ()),
    ("NNI trial hangs", nni_trial_hangs, "search.py", ()),
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="of a command, at uniformly drawn times (default: 100)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try every N-th write (default: 1, all)")
    parser.add_argument("--seed", type=int, default=0, help="of the images and times (default: 0)")
    parser.add_argument("--break", dest="broken", choices=BREAKS, help="take a guard out; runs the rows that rest on it")
    parser.add_argument("--rows", metavar="TEXT", help="only the rows with this in their fault or command")
    parser.add_argument("--results", type=pathlib.Path, help="(default: bench/results/faults.json, of all rows)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    gc.freeze()
    SearchSpace.for_images = classmethod(tiny)
    report.write_report = lambda out: out
    local_engine.SPAWN = multiprocessing.get_context("fork")
    rows = [row for row in ROWS if not options.broken or options.broken in row[3]]
    rows = [row for row in rows if not options.rows or options.rows in f"{row[0]} {row[2]}"]
    table = []
    with tempfile.TemporaryDirectory() as folder:
        arena = Arena(pathlib.Path(folder), options)
        print(f"{'fault':36} {'command':12} {'tries':>5}  {'lost':8} {'process':>8}  state             what happened", flush=True)
        for fault, run, what, _ in rows:
            start = time.perf_counter()
            script = what if what.endswith(".py") else "search.py"
            try:
                tries, happened, seen = run(arena, what)
                lost = "nothing"
            except Lost as error:
                tries, happened, seen, lost = 0, str(error), [], "RED"
            last = seen[-1] if seen else ["-", "-", "-"]
            print(f"{fault:36} {script:12} {tries:5}  {lost:8} {last[0]:>8}  {last[2]:16}  {happened}", flush=True)
            table.append({
                "fault": fault, "command": script, "tries": tries, "lost": lost, "happened": happened, "seed": options.seed,
                "process_where_state": seen, "seconds": round(time.perf_counter() - start, 1),
            })  # fmt: skip
            whole = not options.broken and not options.rows
            if path := options.results or (ROOT / "bench" / "results" / "faults.json" if whole else None):
                content = {"commit": utils.commit(), "versions": utils.versions(), "kills": options.kills, "every": options.every,
                           "break": options.broken, "rows": table}  # fmt: skip
                utils.write_json(path, content)
    red = sum(row["lost"] != "nothing" for row in table)
    print(f"{len(table)} rows, {red} red")
    sys.exit(bool(red))


if __name__ == "__main__":
    main()

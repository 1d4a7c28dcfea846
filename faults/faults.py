"""Injects faults into the four commands: `python -m faults.faults` (half an hour on one core, 100 kills per command).

Every row of the table is one fault: it is injected into a command with tiny settings, the surviving state is read and
hashed, the command is given again, and its result has to equal that of an undisturbed run. `--break NAME` removes one
guard from the project's code; the rows that rely on it have to turn red. Any red row gives exit code 1.

Commands run in forks of this process, which has imported the project, so that they start at once; faults are
functions replaced in the fork before the script begins, while SIGKILL, full disks and locks act as in reality. The
search space is the paper's with few channels, so that a checkpoint takes half a megabyte; local workers are forked
instead of spawned, and reports are not drawn. NNI's processes start as always. Linux only. Writes
bench/results/faults.json.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

import psutil
import torch

import utils
from bench import study
from engines import local_engine, search_files
from faults.arena import Arena, Lost
from faults.injection import BREAKS, Events, bad_trials, clock_back, poisoned_step
from reports import page
from space.search_space import SearchSpace
from training import checkpoint

STEP = 4096  # bytes
COMMANDS = ("supernet.py", "tester.py", "search.py", "scratch.py")


def tiny(cls, input_size=224, n_classes=1000):
    return cls(input_size, n_classes, 1, stage_channels=(8, 12, 16, 20), stem_channels=4, last_channels=16)


# --- rows: functions of the arena that return (tries, what happened, [[process, where, hash], ...]) --------------


def killed_at_random(arena, script):
    """SIGKILL at uniform times; the command is repeated until it succeeds, then starts again in a new folder."""
    rng = random.Random(f"{arena.seed} {script}")
    kills = 0
    finished = 0
    seen = []
    out = arena.new()
    before = 0
    while kills < arena.kills:
        at = rng.uniform(0, 1.2 * arena.seconds[script])
        process = arena.command(script, out)
        end = time.monotonic() + at
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        if process.code is not None:  # ended before the kill
            arena.check(script, out, process)
            finished += 1
            out = arena.new()
            before = 0
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
    happened = f"resumed from the last state; {finished + 1} chains of kills gave the undisturbed result"
    return kills, happened, seen


def count_events(arena, script, action):
    out = arena.new()
    report = os.open(arena.folder / "events", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    process = arena.command(
        script, out, fault=lambda: Events(action, -1 if action == "kill" else 10**9, report).install()
    ).wait()
    if process.code:
        raise Lost(f"fails while writes are counted: {process.stderr()[-300:]}")
    n = int(os.pread(report, 20, 0))
    os.close(report)
    return n


def at_every_write(arena, script, action, check):
    """Runs a command in a new folder for each write, with the fault at this write, then again without a fault.

    `check(process, number of the write)` checks how the first run ended. Returns (number of writes, what was seen).
    """
    n = count_events(arena, script, action)
    seen = []
    for i in range(1, n + 1, arena.every):
        out = arena.new()
        process = arena.command(script, out, fault=functools.partial(lambda i: Events(action, i).install(), i)).wait(60)
        check(process, i)
        seen.append([process.pid, i, arena.state(script, out)[0]])
        arena.finish(script, out)
        shutil.rmtree(out)
    return n, seen


def killed_at_every_write(arena, script):
    def check(process, i):
        if process.code != -signal.SIGKILL:
            raise Lost(f"write {i} was not reached")
        if script == "search.py":
            time.sleep(0.3)  # its workers hold its lock until they have ended

    n, seen = at_every_write(arena, script, "kill", check)
    where = "before a rename, removal or fsync, or within a first write"
    return len(seen), f"of {n} writes: killed {where}; then the same result", seen


def full_disk_at_every_write(arena, script):
    refused = []

    def check(process, i):
        if process.code:
            refused.append(process.one_line())
        elif "Traceback" in process.stderr():
            raise Lost(f"write {i}: a traceback")

    n, seen = at_every_write(arena, script, "full", check)
    happened = f"{len(refused)} ended with one line, the others did not need the file; then the same result"
    return len(seen), f"of {n} writes: {happened}", seen


def truncated_checkpoint(arena, _script):
    """Truncated files are refused (in this process), and a run resumes from the checkpoint before a truncated one."""
    data = arena.supernet.read_bytes()
    seen = []
    path = arena.folder / "cut.pth"
    for size in range(0, len(data), STEP):
        path.write_bytes(data[:size])
        try:
            checkpoint.load_supernet(path, None)
        except utils.UserError:
            continue
        raise Lost(f"{size} of {len(data)} bytes were read as a checkpoint")
    out = arena.new()
    arena.command("supernet.py", out).wait()
    newest = checkpoint.newest(out / "checkpoints" / "supernet")
    newest.write_bytes(newest.read_bytes()[:-STEP])
    process = arena.command("supernet.py", out).wait()
    arena.check("supernet.py", out, process)
    if str(newest) not in process.stderr():
        raise Lost("nothing names the damaged file")
    seen.append([process.pid, len(data) - STEP, arena.state("supernet.py", out)[0]])
    happened = "each truncated file is refused; a run names it and resumes from the checkpoint before it"
    return len(range(0, len(data), STEP)), happened, seen


def hostile_checkpoint(arena, _script):
    mark = arena.folder / "executed"
    out = arena.new()

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    torch.save({"model": Bomb()}, arena.folder / "bomb.pth")
    process = arena.command("tester.py", out, "--checkpoint", arena.folder / "bomb.pth").wait()
    if mark.exists():
        mark.rmdir()
        raise Lost("a pickle was executed")
    process.one_line()
    return 1, "refused with one line, not executed", [[process.pid, 0, arena.state("tester.py", out)[0]]]


def two_runs(arena, script):
    out = arena.new()
    first = arena.command(script, out, fault=lambda: os.environ.update(GOMP_SPINCOUNT="1"))
    deadline = time.monotonic() + 30
    while (
        not list((out / "checkpoints").rglob("*.lock"))
        and not list((out / "checkpoints").rglob("run.log"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = arena.command(script, out).wait(90)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.wait()
    line = second.one_line()
    arena.check(script, out, first)
    return 1, f"the second was refused: {line.split(': ')[-1]}", [[second.pid, 0, arena.state(script, out)[0]]]


def clock_set_back(arena, script):
    """Kills a command, then repeats it with a clock that is set to 2001."""
    out = arena.new()
    process = arena.command(script, out)
    time.sleep(arena.seconds[script] * 0.7)
    process.kill()
    again = arena.command(script, out, fault=clock_back).wait()
    arena.check(script, out, again)
    return 1, "the same result", [[again.pid, 0, arena.state(script, out)[0]]]


def loader_worker_killed(arena, script):
    out = arena.new()
    process = arena.command(script, out, "--workers", 1)
    while process.poll() is None:
        for worker in [p for p in process.family() if _runs(p, "faults.faults")]:  # not git, which tells the commit
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        time.sleep(0.001)
    line = process.one_line()
    state = arena.state(script, out)[0]
    again = arena.command(script, out, "--workers", 1).wait()
    arena.check(script, out, again)
    return 1, f"one line ({line.split(';')[0][:60]}), then the same result", [[process.pid, 0, state]]


def not_finite(arena, script):
    out = arena.new()
    process = arena.command(script, out, fault=lambda: poisoned_step(7)).wait()
    line = process.one_line()
    if "step 7" not in line or "learning rate" not in line or (script == "supernet.py") != ("path [" in line):
        raise Lost(f"the error doesn't name step, learning rate and path: {line}")
    state, step = arena.state(script, out)
    if step != 6:
        raise Lost(f"the last checkpoint is of step {step}")
    arena.finish(script, out)
    return (
        1,
        "stopped naming step, path and learning rate; the checkpoint before this step remains",
        [[process.pid, 7, state]],
    )


def bad_trial(arena, kind):
    out = arena.new()
    process = arena.command("search.py", out, fault=lambda: bad_trials(kind)).wait()
    results = [result for generation in search_files.read_generations(out) for result in generation]
    failed = [r for r in results if r["acc1"] is None]
    if process.code or len(results) != 12 or not failed or any(sum(r["architecture"]) % 3 for r in failed):
        raise Lost(f"exit code {process.code}, {len(failed)} of {len(results)} failed: {process.stderr()[-200:]}")
    if any(sum(r["architecture"]) % 3 == 0 for r in results if r["acc1"] is not None):
        raise Lost("a wrong accuracy was accepted")
    happened = f"only {len(failed)} candidates failed; the search completed"
    return 1, happened, [[process.pid, 0, arena.state("search.py", out)[0]]]


def search_worker_killed(arena, _script):
    rng = random.Random(f"{arena.seed} worker")
    seen = []
    while len(seen) < max(1, arena.kills // 10):
        out = arena.new()
        process = arena.command("search.py", out)
        at = rng.uniform(0, arena.seconds["search.py"])
        time.sleep(at)
        workers = process.family()
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        process.wait()
        arena.check("search.py", out, process)
        if workers:
            seen.append([workers[0].pid, round(at, 3), arena.state("search.py", out)[0]])
        shutil.rmtree(out)
    return len(seen), "another worker evaluated its candidates; the same result without a restart", seen


def _nni(arena, out, *more):
    """Starts a search with NNI; returns (command, processes of its trials) once it has results."""
    process = arena.command("search.py", out, "--engine", "nni", *more)
    deadline = time.monotonic() + 120
    while True:
        trials = [p for p in process.family() if _runs(p, "tester.py") and not _runs(p, "/bin/sh")]
        if trials and list((out / "acc").glob("*.jsonl")):
            return process, trials
        if time.monotonic() > deadline or process.poll() is not None:
            raise Lost(f"NNI gave no result: {process.stderr()[-300:]}")
        time.sleep(0.05)


def _runs(process, text):
    """Whether a word of the process's command line contains the text."""
    with contextlib.suppress(psutil.Error):
        return any(text in word for word in process.cmdline())
    return False


def nni_manager_killed(arena, _script):
    out = arena.new()
    process, _ = _nni(arena, out)
    managers = [p for p in process.family() if _runs(p, "main.js")]
    for manager in managers:
        manager.kill()
    process.wait(120)
    if not managers or "--resume" not in process.one_line():
        raise Lost("the error does not say how to resume")
    state = arena.state("search.py", out)[0]
    arena.finish("search.py", out)
    return 1, "one line says so and how to resume; then the same result", [[managers[0].pid, 0, state]]


def nni_trial_hangs(arena, _script):
    out = arena.new()
    process, trials = _nni(arena, out, "--trial-timeout", 60)
    for trial in trials:
        trial.suspend()
    process.wait(300)
    arena.check("search.py", out, process)
    seen = [[trials[0].pid, 0, arena.state("search.py", out)[0]]]
    return 1, "ended after --trial-timeout; another trial evaluated its candidates; the same result", seen


KILLED = {"supernet.py": ("optimizer",), "scratch.py": ("optimizer",), "search.py": ("parent-watch",)}
WRITTEN = {
    "supernet.py": ("atomic-write",),
    "scratch.py": ("atomic-write", "optimizer"),
    "search.py": ("atomic-write", "repair"),
}

# (fault, function, its argument, the guards that it relies on)
ROWS = [
    *(("SIGKILL at a uniformly drawn time", killed_at_random, script, KILLED.get(script, ())) for script in COMMANDS),
    *(("SIGKILL at every write and rename", killed_at_every_write, name, WRITTEN.get(name, ())) for name in COMMANDS),
    *(("disk full at every write", full_disk_at_every_write, script, ("full-disk",)) for script in COMMANDS),
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


def run_row(arena, fault, run, what):
    """Injects the faults of a row, prints it, and returns what is kept of it."""
    start = time.perf_counter()
    script = what if what.endswith(".py") else "search.py"
    try:
        tries, happened, seen = run(arena, what)
        lost = "nothing"
    except Lost as error:
        tries, happened, seen, lost = 0, str(error), [], "RED"
    last = seen[-1] if seen else ["-", "-", "-"]
    print(f"{fault:36} {script:12} {tries:5}  {lost:8} {last[0]:>8}  {last[2]:16}  {happened}", flush=True)
    row = {"fault": fault, "command": script, "tries": tries, "lost": lost, "happened": happened}
    row |= {"seed": arena.seed, "process_where_state": seen}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def parse_args(argv=None):
    parser = study.parser(__doc__, {"--results": None})
    text = "kills per command, at uniformly drawn times (default: 100)"
    parser.add_argument("--kills", type=int, default=100, metavar="N", help=text)
    text = "inject faults at every N-th write (default: 1, all)"
    parser.add_argument("--every", type=int, default=1, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of images and times (default: 0)")
    text = "remove a guard; runs only the rows that rely on it"
    parser.add_argument("--break", dest="broken", choices=BREAKS, help=text)
    parser.add_argument("--rows", metavar="TEXT", help="run only the rows whose fault or command contains this")
    return parser.parse_args(argv)


def main(options):
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    gc.freeze()
    SearchSpace.for_images = classmethod(tiny)
    page.write_report = lambda out: out
    local_engine.SPAWN = multiprocessing.get_context("fork")
    rows = [row for row in ROWS if not options.broken or options.broken in row[3]]
    rows = [row for row in rows if not options.rows or options.rows in f"{row[0]} {row[2]}"]
    path = options.results
    if len(rows) == len(ROWS):
        path = path or study.RESULTS / "faults.json"
    table = []
    with tempfile.TemporaryDirectory() as folder:
        arena = Arena(pathlib.Path(folder), options)
        header = f"{'fault':36} {'command':12} {'tries':>5}  {'lost':8} {'process':>8}  {'state':16}  what happened"
        print(header, flush=True)
        for row in rows:
            table.append(run_row(arena, *row[:3]))
            if path:
                content = {"kills": options.kills, "every": options.every, "break": options.broken, "rows": table}
                study.write(path, content)
    red = sum(row["lost"] != "nothing" for row in table)
    print(f"{len(table)} rows, {red} red")
    if options.broken and red < len(table):
        sys.exit(f"without the guard {options.broken}, {len(table) - red} of its rows are still green")
    sys.exit(bool(red))


if __name__ == "__main__":
    utils.run_script(main, parse_args)

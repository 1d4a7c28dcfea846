"""What faults/faults.py changes in a command: removed guards, and faults. Called in a fork, before the script runs."""

import builtins
import contextlib
import errno
import os
import pathlib
import signal
import sys
import threading
import time

import torch
import torch._dynamo  # imported by optimizers, like the next two elsewhere: here once, not in every fork
import torch.utils.tensorboard
import torchvision.transforms.v2  # noqa: F401

import dataloader
from engines import search_files, search_record
from images import workers
from training import evaluation, loop
from utils import HERE

# --- guards that --break removes -----------------------------------------------------------------------------


def _everywhere(name, value):
    """Replaces a name in all modules of the project that have it."""
    for module in list(sys.modules.values()):
        path = str(getattr(module, "__file__", None) or "")
        if path.startswith(f"{HERE}{os.sep}") and ".venv" not in path and hasattr(module, name):
            setattr(module, name, value)


@contextlib.contextmanager
def _plain_write(path, mode="w"):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, mode) as file:
        yield file


def _accept_anything(self, result, trial=None):
    return self._append(
        tuple(result["architecture"]), {k: result[k] for k in ("acc1", "acc5", "n_images", "seconds")}, trial
    )


def _blind(fetch):
    def run(meter):
        meter.window = [torch.nan_to_num(values) for values in meter.window]
        return fetch(meter)

    return run


def _unrepaired(read_generations):
    return lambda out, repair=False, skip=0: read_generations(out, skip=skip)


def _replace(owner, name, wrap):
    """Replaces an attribute by `wrap(attribute)`."""
    setattr(owner, name, wrap(getattr(owner, name)))


BREAKS = {
    "atomic-write": lambda: _everywhere("atomic_write", _plain_write),
    "lock": lambda: _everywhere("hold_lock", lambda path, wait_s=0: contextlib.nullcontext()),
    "repair": lambda: _everywhere("read_generations", _unrepaired(search_files.read_generations)),
    "optimizer": lambda: setattr(torch.optim.SGD, "load_state_dict", lambda self, state: None),
    "nan": lambda: setattr(search_record.SearchRecord, "add", _accept_anything),
    "finite": lambda: _replace(loop._Meter, "fetch", _blind),
    "full-disk": lambda: _everywhere("run_script", lambda main, parse_args, *_: main(parse_args())),
    "loader": lambda: setattr(workers, "UserError", RuntimeError),
    "no-code": lambda: _replace(
        torch, "load", lambda load: lambda path, **how: load(path, **how | {"weights_only": False})
    ),
    "parent-watch": lambda: _everywhere("leave_signals_to_parent", lambda *_: None),
}  # name: removes the guard of this name from the project


# --- faults --------------------------------------------------------------------------------------------------


class Events:
    """Counts file operations of the fork's main thread: open for writing, first write, fsync, rename, unlink; acts at
    the n-th.

    `action` "kill": does half of a write, then SIGKILL. "full": from then on, all writes fail with ENOSPC.
    """

    def __init__(self, action, n, report=None):
        self.action = action
        self.n = n
        self.seen = 0
        self.report = report
        self.pid = os.getpid()

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
        """Whether the disk is full now."""
        return self.action == "full" and self.seen >= self.n > 0

    def install(self):
        opened = builtins.open
        replace = os.replace
        fsync = os.fsync
        unlink = os.unlink
        fdopen = os.fdopen

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
        os.replace = watched(replace, False)
        os.unlink = watched(unlink, False)
        os.fsync = watched(fsync, True)


class _File:
    def __init__(self, file, events):
        self.file = file
        self.events = events
        self.written = False

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
    """Makes time.time() start in 2001."""
    now = time.time
    start = time.time()
    time.time = lambda: 1e9 + now() - start


def bad_trials(kind):
    """Every third candidate by the sum of its choices "crashes" its worker, or reports "nan"."""
    evaluate = evaluation.evaluate

    def run(supernet, candidates, *args, **kwargs):
        bad = [c for c in candidates if sum(c) % 3 == 0]
        if bad and kind == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        return [
            r | {"acc1": float("nan")} if sum(r["architecture"]) % 3 == 0 else r
            for r in evaluate(supernet, candidates, *args, **kwargs)
        ]

    evaluation.evaluate = run


def poisoned_step(step):
    """Makes the images of a training step NaN."""
    batches = dataloader.Loader.batches

    def run(self, plan):
        for n, (images, labels) in enumerate(batches(self, plan), 1):
            yield images * float("nan") if n == step and self.augment else images, labels

    dataloader.Loader.batches = run

"""Runs the four commands as forks for faults/faults.py, and compares results and states with undisturbed ones."""

import contextlib
import hashlib
import json
import os
import re
import runpy
import signal
import sys
import time
import traceback

import numpy as np
import psutil
from PIL import Image

import utils
from engines import search_files
from faults import injection
from space import weight_files
from space.search_space import SearchSpace
from training import checkpoint

ROOT = utils.HERE


class Lost(Exception):
    """A fault did harm; says which."""


class Process:
    """A command in a fork of this process, in which `fault()` is called before the script runs."""

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
                injection.BREAKS[arena.broken]()
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

    def poll(self):
        """The exit code, or None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, timeout=300):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise Lost(f"did not end in {timeout} s")
            time.sleep(0.005)
        return self

    def family(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    def kill(self):
        """Sends SIGKILL; raises Lost unless the processes that it had started end by themselves."""
        family = self.family()
        os.kill(self.pid, signal.SIGKILL)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        left = psutil.wait_procs(family, timeout=15)[1]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if left:
            raise Lost(f"{len(left)} processes outlived the killed one that started them")

    def stderr(self):
        return self.log.read_text(errors="replace")

    def stdout(self):
        return self.log.with_suffix(".out").read_text(errors="replace")

    def one_line(self):
        """The error message of a command; raises Lost unless it ended with code 2 and one line after its log.

        The warning that the record of checked images can't be written comes before the log is set up.
        """
        no_error = r"\d\d:\d\d:\d\d |\r| *$|.*; the images will be checked again next time$"
        lines = [line for line in self.stderr().splitlines() if not re.match(no_error, line)]
        if self.code != 2 or len(lines) != 1 or ": error: " not in lines[0]:
            raise Lost(f"exit code {self.code}: {' / '.join(lines)[-300:]}")
        return lines[0].split(": error: ")[1]


class Arena:
    """Images, settings and undisturbed results of the four commands, and folders for the runs with faults."""

    def __init__(self, folder, options):
        self.folder = folder
        self.broken = options.broken
        self.kills = options.kills
        self.seed = options.seed
        self.every = options.every
        self.numbers = iter(range(10**9))
        rng = np.random.default_rng(options.seed)
        for part, n in (("train", 12), ("val", 4)):
            for name in "ab":
                (folder / "images" / part / name).mkdir(parents=True)
                for i in range(n):
                    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
                    image.save(folder / "images" / part / name / f"{i}.png")
        common = {
            "data-dir": str(folder / "images"),
            "input-size": 28,
            "heldout-per-class": 3,
            "loader": "torchvision",
            "workers": 0,
            "threads": 1,
        }
        train = {"iterations": 8, "batch-size": 4, "lr": 0.01, "save-every": 2, "val-every": 8, "keep": 2}
        bn = {"bn-batches": 2, "bn-batch-size": 4}
        evolution = {
            "population": 4,
            "select": 2,
            "mutation": 1,
            "crossover": 1,
            "generations": 3,
            "concurrency": 1,
            "candidates-per-trial": 2,
        }
        sections = {
            "common": common,
            "supernet": train | bn | {"val-paths": 1, "sampler": "uniform"},
            "scratch": train | {"bn-pass": 2},
            "tester": bn,
            "search": bn | evolution,
        }
        self.config = folder / "settings.yml"
        self.config.write_text(json.dumps(sections))  # which is YAML
        self.reference = {}
        self.seconds = {}
        self.supernet = None
        for script in ("supernet.py", "scratch.py", "tester.py", "search.py"):
            out = self.new()
            start = time.perf_counter()
            process = self.command(script, out).wait()
            self.seconds[script] = time.perf_counter() - start
            if process.code:
                sys.exit(f"{script} fails without a fault: {process.stderr()}")
            self.reference[script] = self.result(script, out, process)
            print(f"undisturbed {script}: {self.seconds[script]:.1f} s", file=sys.stderr)
            if script == "supernet.py":
                self.supernet = checkpoint.newest(out / "checkpoints" / "supernet")

    def new(self):
        """A new --out folder, empty but for the search space."""
        out = self.folder / f"out{next(self.numbers)}"
        out.mkdir()
        (out / "nni_auto_gen_search_space.json").write_text(json.dumps(SearchSpace().nni_search_space()))
        return out

    def command(self, script, out, *more, fault=None):
        words = ["--config", self.config, "--out", out, "--cache", out / "cache"]
        if script == "tester.py":
            words += ["--architecture", ROOT / "architecture_final.json", "--checkpoint", self.supernet]
        if script == "search.py":
            words += ["--checkpoint", self.supernet, "--engine", "local"]
            words += ["--resume"] if search_files.state_path(out).exists() else []
        return Process(self, script, [*words, *more], fault)

    def result(self, script, out, process):
        """A hash of the result of a command that has succeeded."""
        if script == "tester.py":
            return digest(json.loads(process.stdout().splitlines()[-1]) | {"seconds": 0})
        return self.state(script, out)[0]

    def state(self, script, out):
        """(hash, steps or candidates done) of the state in `out`. Raises Lost if a file of it is damaged."""
        try:
            if script == "search.py":
                results = [r | {"seconds": 0} for results in search_files.read_generations(out) for r in results]
                architectures = {p.name: utils.read_json(p) for p in sorted((out / "checkpoints").glob("*.json"))}
                if search_files.state_path(out).exists():
                    utils.read_json(search_files.state_path(out))
                return digest([results, architectures]), len(results)
            if script == "tester.py":
                return digest(sorted(p.name for p in (out / "cache").glob("*.images"))), 0
            folder = out / "checkpoints" / script.removesuffix(".py")
            step = 0
            found = []
            for path in [*checkpoint.checkpoints(folder), *folder.glob("bnps-checkpoint.pth")]:
                content = weight_files.load_file(path)
                step = max(step, content["step"])
                found.append(
                    [path.name, content["step"], [[k, v.numpy().tobytes().hex()] for k, v in content["model"].items()]]
                )
            return digest(found[-2:]), step
        except utils.UserError as error:
            raise Lost(f"a file is damaged: {error}") from None

    def finish(self, script, out):
        """Gives the command again, without a fault; raises Lost if the result differs from the undisturbed one."""
        self.check(script, out, self.command(script, out).wait())

    def check(self, script, out, process):
        """Raises Lost if a process failed, or its result differs from the undisturbed one."""
        if process.code:
            raise Lost(f"ended with {process.code}: {process.stderr().strip().splitlines()[-1:]}")
        if self.result(script, out, process) != self.reference[script]:
            raise Lost("gave another result")


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]

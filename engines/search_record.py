"""What a search leaves on disk, and how it goes on from there. Standard library alone."""

import collections
import itertools
import json
import os
import pathlib
import reprlib
import statistics

from utils import UserError, atomic_write, hold_lock, read_json, write_json


class SearchRecord:
    """An evolution with all that a search leaves below `out`; only this class writes there, in one process at a time.

        acc/GGG.jsonl              a line a candidate of generation GGG: architecture, flops, acc1, acc5, n_images, seconds, and
                                   error where it failed (acc1 null); in the order of arrival, then, when all are there, of rank
        checkpoints/GGG_III.json   the architecture of rank III in generation GGG, one-hot; best.json the best of all
        id2cand/GGG.json           trial id -> the architectures that this trial was the first to say it evaluated
        checkpoints/search/state.json   settings, generation (how many are closed), evaluated, best, done, error, pid (of the writer)

    A result is on disk when `add` returns. A search that died at any moment goes on from these files: the evolution is gone
    through again with the rewards that are known, so it takes the same way, and nothing is evaluated twice.
    """

    def __init__(self, out, space, evolution):
        self.out, self.space, self.evolution = pathlib.Path(out), space, evolution
        self.lock = _hold_writer_lock(out)
        self.state = {**read_json(state_path(out)), "error": None, "pid": os.getpid()}
        self.results, self.trials = {}, {}  # candidate -> result; candidate -> trial id, of the open generation
        for result in read_results(out, repair=True):
            candidate = space.check(result["architecture"])
            self.trials[candidate] = result.pop("trial", None)
            self.results[candidate] = result
        self._write_state()

    def pending(self):
        """The candidates to evaluate now; empty when the search is done. Closes the generations of which all results are there."""
        while population := self.evolution.ask():
            if waiting := [c for c in population if c not in self.results]:
                self._write_state()
                return waiting
            self.evolution.tell({c: _reward(self.results[c]) for c in population})
            self._close(self.evolution.generation - 1, population)
        self._write_state(done=True)
        return []

    def add(self, result, trial=None):
        """Keeps a result; returns whether it was one: of a candidate that isn't waited for, nothing is kept.

        Percentages that are none (NaN among them) make the candidate a failed one.
        """
        candidate = self.space.check(result["architecture"])
        numbers = {key: result.get(key) for key in ("acc1", "acc5", "n_images", "seconds")}
        if not all(isinstance(numbers[k], (int, float)) and 0 <= numbers[k] <= 100 for k in ("acc1", "acc5")):
            return self.fail(candidate, f"accuracy {numbers['acc1']}, {numbers['acc5']}", trial)
        return self._append(candidate, numbers, trial)

    def fail(self, candidate, error, trial=None):
        """Keeps that a candidate has failed for good."""
        return self._append(
            candidate, {"acc1": None, "acc5": None, "n_images": None, "seconds": None, "error": error}, trial
        )

    def _append(self, candidate, numbers, trial):
        if candidate not in self.evolution.population or candidate in self.results:
            return False
        result = {"architecture": list(candidate), "flops": self.space.flops(candidate), **numbers}
        path = self.out / "acc" / f"{self.evolution.generation:03}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps({**result, "trial": trial}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.results[candidate], self.trials[candidate] = result, trial
        self._write_state()
        return True

    def _close(self, generation, population):
        """Writes a generation whose results are all there, in order of rank, failed ones last; the state comes last of all."""
        if generation < self.state["generation"]:
            return  # a resumed search has these files already
        ranked = self.evolution.ranked(population)
        ranked += [c for c in population if c not in ranked]
        trials = collections.defaultdict(list)
        for candidate in ranked:
            if trial := self.trials.get(candidate):
                trials[trial].append(list(candidate))
        if trials:  # none where the search died after the next file: then they are on disk already
            write_json(self.out / "id2cand" / f"{generation:03}.json", trials, sort_keys=True)
        with atomic_write(self.out / "acc" / f"{generation:03}.jsonl") as file:
            file.writelines(json.dumps(self.results[c]) + "\n" for c in ranked)
        for rank, candidate in enumerate(ranked):
            write_json(
                self.out / "checkpoints" / f"{generation:03}_{rank:03}.json", self.space.to_architecture(candidate)
            )
        if best := self.evolution.best:
            write_json(self.out / "checkpoints" / "best.json", self.space.to_architecture(best[0]))
            self.state["best"] = self.results[best[0]]
        self.state["generation"] = generation + 1
        self._write_state()

    def _write_state(self, **changes):
        self.state |= {"evaluated": len(self.results), **changes}
        write_json(state_path(self.out), self.state, indent=1)

    def stop(self, error):
        """Writes down why the search can't go on."""
        self._write_state(error=error)


def _reward(result):
    """Top-1, ties by top-5."""
    return None if result["acc1"] is None else (result["acc1"], result["acc5"])


def state_path(out):
    return pathlib.Path(out) / "checkpoints" / "search" / "state.json"


def prepare_search(out, settings, resume):
    """Makes `out` ready for a search with these settings, a dict for JSON, and returns its state.

    Raises UserError where it holds a search and `resume` is false, or the settings are not those of the search to resume.
    """
    path, settings = state_path(out), json.loads(json.dumps(settings))
    state = {"settings": settings, "generation": 0, "evaluated": 0, "best": None, "done": False}
    with _hold_writer_lock(out):
        if any((pathlib.Path(out) / "acc").glob("*.jsonl")):
            if not resume:
                raise UserError(f"--out {out} holds a search already: go on with it by --resume, or name another --out")
            before = read_json(path)
            if (
                not isinstance(before, dict)
                or not state.keys() <= before.keys()
                or not isinstance(before["settings"], dict)
            ):
                raise UserError(f"{path}: not the state of a search; name another --out")
            state, before = before, before["settings"]
            if odd := sorted(k for k in before.keys() | settings.keys() if before.get(k) != settings.get(k)):
                changes = ", ".join(
                    f"{k} {reprlib.repr(settings.get(k))} (was {reprlib.repr(before.get(k))})" for k in odd
                )
                raise UserError(
                    f"--resume: the search in {out} has other settings: {changes}; use them, or another --out"
                )
        state |= {"error": None, "pid": os.getpid()}
        write_json(path, state, indent=1)
    return state


def read_results(out, repair=False):
    """The results of all generations, one after the other; see `read_generations`."""
    return list(itertools.chain(*read_generations(out, repair)))


def read_generations(out, repair=False):
    """The results in acc/*.jsonl, a list for each generation.

    A last line that is not whole, of a search that died while writing it, is left out, and removed where `repair` is true.
    """
    generations = []
    for path in sorted((pathlib.Path(out) / "acc").glob("*.jsonl"), key=lambda path: (len(path.name), path.name)):
        results = []
        generations.append(results)
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
            if repair:
                with atomic_write(path, "wb") as file:
                    file.writelines(lines)
        for number, line in enumerate(lines, 1):
            try:
                results.append(json.loads(line))
                results[-1]["architecture"], results[-1]["acc1"], results[-1]["acc5"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path}: line {number} is damaged; remove it to have that candidate evaluated again"
                ) from None
    return generations


def by_accuracy(result):
    """Top-1, ties by top-5."""
    return result["acc1"], result["acc5"]


class Generation:
    """The results of a generation, numbered from 1; not `closed` while some are missing."""

    def __init__(self, number, results, closed):
        self.number, self.results, self.closed = number, results, closed
        self.succeeded = [r for r in results if r["acc1"] is not None]
        self.best = max(self.succeeded, key=by_accuracy, default=None)

    @property
    def mean(self):
        return statistics.fmean(r["acc1"] for r in self.succeeded)

    @property
    def sd(self):
        """Standard deviation of top-1 over the candidates, 0 of a single one."""
        return statistics.stdev(r["acc1"] for r in self.succeeded) if len(self.succeeded) > 1 else 0.0


def _hold_writer_lock(out):
    """Waits for the writer of a search that was killed a moment ago: it ends within seconds."""
    return hold_lock(state_path(out).with_name("writer.lock"), wait_s=30)

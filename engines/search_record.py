"""A search that is written to its files while it runs, and resumes from them; search_files.py reads them."""

import collections
import json
import os
import pathlib
import statistics
import time

from engines.search_files import (
    by_score,
    costs_of,
    read_generations,
    read_state,
    settings_difference,
    space_of,
    state_path,
)
from space.evolution import Evolution
from utils import UserError, atomic_write, hold_lock, write_json

MEASURED = ("acc1", "acc5", "loss", "n_images", "seconds")  # the numbers of a result that its evaluation gives
MAX_CORRECTIONS = 3  # so often a search corrects its limit on latency


class SearchRecord:
    """The evolution of the search that `prepare_search` has set up in `out`, with everything that the search writes
    there; one process at a time may have it.

        acc/GGG.jsonl              a line for each candidate of generation GGG: architecture, flops, acc1, acc5, loss,
                                   n_images, seconds, and error where it failed (acc1 null); acc1_error, the standard
                                   error of acc1 by groups, where images have groups; params and latency_ms
                                   where the search limits them, own costs by name, score where it ranks by another one
                                   than accuracy; in the order of arrival, and once the generation is closed, by rank
        checkpoints/GGG_III.json   the architecture of rank III in generation GGG, one-hot; best.json: the best of all
        checkpoints/largest.json   the largest legal architecture, which is evaluated last and is no part of the search
        checkpoints/front/         with objectives, the architectures of the front, NNN.json, the most accurate first
        id2cand/GGG.json           trial id -> the architectures that this trial was the first to report
        checkpoints/search/state.json   settings, generation (number of closed ones), evaluated, best, done, error,
                                   pid (of the writer), children (of each generation but the first, how many were new),
                                   starts (command, versions, demo, config, own, begun, last of each start),
                                   largest (the result of the largest legal candidate; of_all is false if it is only
                                   that of those evaluated; measured_ms, holds where its latency was measured),
                                   and where latency is limited, confirmations: for each time that the best were
                                   measured as whole networks, what was found and what followed

    A result is on disk when `add` returns. A search that stopped at any point resumes from these files: the evolution
    is replayed with the known rewards and takes the same course, so nothing is evaluated twice.
    """

    def __init__(self, out):
        self.out = pathlib.Path(out)
        self.lock = _hold_writer_lock(out)
        self.state = {**read_state(out), "error": None, "pid": os.getpid()}
        self.space = _open_space(self.state)
        self.evolution = Evolution.from_settings(self.space, self.state["settings"])
        self.confirmations = list(self.state["confirmations"])  # rows that are still to be replayed
        self.evolution.generations += sum(row["generations"] for row in self.confirmations)
        self.results, self.trials = {}, {}  # candidate -> result; candidate -> trial id, of the open generation
        self.largest = None  # the largest legal candidate while it is to be evaluated, after the last generation
        self.of_all = True  # legal candidates, or only of those evaluated
        self.known = []  # the candidates of each generation that are recorded already
        for results in read_generations(out, repair=True):
            self.known.append([self.space.check(result["architecture"]) for result in results])
            for candidate, result in zip(self.known[-1], results):
                self.trials[candidate] = result.pop("trial", None)
                self.results[candidate] = result
        self._write_state()

    def pending(self):
        """The candidates to evaluate now, none when the search is done. Closes the generations that are complete.

        The largest legal candidate comes last, alone.
        """
        while population := self._ask():
            self._check_replay(population)
            self.state["children"] = self.evolution.children
            if waiting := self.waiting():
                self._write_state()
                return waiting
            results = {c: self.results[c] for c in population}
            self.evolution.tell({c: None if r["acc1"] is None else by_score(r) for c, r in results.items()})
            self._close(self.evolution.generation - 1, population)
        self._find_largest()
        if not self.largest:
            self._write_state(done=True)
        return self.waiting()

    def waiting(self):
        """The candidates that are asked for and have no result yet."""
        return [c for c in [*self.evolution.population, *filter(None, [self.largest])] if c not in self.results]

    def _find_largest(self):
        """Asks for the legal candidate of the most FLOPs, unless its result is known.

        Where no solver finds it, it is the largest legal one of those evaluated.
        """
        known = self.state.get("largest")
        found = self.evolution.limits.largest()
        self.of_all = found is not None
        if not found:
            found = max(self.evolution.legal_ranked(), key=self.space.flops, default=None)
        found = found and tuple(self.evolution.canonical(found))
        if not found or (known and known["architecture"] == list(found)):
            self.largest = None
        elif found in self.results:
            self._keep_largest(self.results[found])
        else:
            self.largest = found

    def _keep_largest(self, result):
        self.largest = None
        self._write_architecture("largest.json", result["architecture"])
        self._write_state(largest={**result, "of_all": self.of_all})

    def _check_replay(self, population):
        """Raises UserError if the search, resumed, asks for other candidates than those that are recorded."""
        generation = self.evolution.generation
        if generation < len(self.known) and not set(self.known[generation]) <= set(population):
            strategy = self.state["settings"].get("strategy", "evolution")
            text = f"--strategy {strategy} asks for other candidates in generation {generation + 1} than before"
            why = "a searcher draws from its rng alone, and a cost of a candidate is always the same"
            raise UserError(f"{text}, so the search can't be resumed: {why}")

    def _ask(self):
        """The open population; before one is bred, limits become what confirmations made of them at this point."""
        while self.confirmations and self.confirmations[0]["after"] == self.evolution.generation:
            self.evolution.limits = self.evolution.limits.after(self.confirmations.pop(0))
        return self.evolution.ask()

    def confirm(self, measured):
        """Takes the latencies of the best candidates, measured as whole networks in ns, after the last generation.

        The best one that holds is the winner. Where none does, the median ratio of measured to predicted latencies
        corrects the limit, and a quarter of the generations follows, MAX_CORRECTIONS times; then there is no winner.
        Returns the row of the record.
        """
        limits = self.evolution.limits
        settings = self.state["settings"]
        earlier = self.state["confirmations"]
        found = [
            {"architecture": list(candidate), "predicted_ms": self.space.cost("latency", candidate) / 1e6,
             "measured_ms": ns / 1e6, "holds": limits.holds("latency", ns)}
            for candidate, ns in measured.items()
        ]  # fmt: skip
        row = {"after": self.evolution.generation, "measured": found, "correction": None, "generations": 0}
        none_holds = bool(found) and not any(m["holds"] for m in found)
        if none_holds and sum(e["correction"] is not None for e in earlier) < MAX_CORRECTIONS:
            row["correction"] = statistics.median(m["measured_ms"] / m["predicted_ms"] for m in found)
            row["generations"] = max(1, settings["generations"] // 4)
        self.evolution.limits = limits.after(row)
        # A front without those that are banned has others, too, which only they dominated: nobody measured these.
        best = next((self.results[tuple(m["architecture"])] for m in found if m["holds"]), None)
        if best:
            self._write_architecture("best.json", best["architecture"])
        else:
            (self.out / "checkpoints" / "best.json").unlink(missing_ok=True)
        self._write_front()
        self._write_state(confirmations=[*earlier, row], best=best, done=not row["generations"])
        return row

    def add(self, result, trial_id=None):
        """Records a result and returns True; returns False for a candidate that is not pending.

        A candidate whose accuracies are not percentages (None or NaN, for example) has failed, and so has one without a
        loss in a search that ranks by it.
        """
        candidate = self.space.check(result["architecture"])
        numbers = {key: result.get(key) for key in MEASURED}
        numbers |= {key: result[key] for key in ("halves", "acc1_error") if key in result}
        if not all(isinstance(numbers[k], (int, float)) and 0 <= numbers[k] <= 100 for k in ("acc1", "acc5")):
            return self.fail(candidate, f"accuracy {numbers['acc1']}, {numbers['acc5']}", trial_id)
        if self.state["settings"].get("rank_by") == "loss":
            if numbers["loss"] is None:
                return self.fail(candidate, "the loss is not a finite number", trial_id)
            numbers["score"] = -numbers["loss"]
        return self._append(candidate, numbers, trial_id)

    def fail(self, candidate, error, trial_id=None):
        """Records that a candidate has failed for good; returns as `add`."""
        return self._append(candidate, {**dict.fromkeys(MEASURED), "error": error}, trial_id)

    def _append(self, candidate, numbers, trial_id):
        if candidate not in self.waiting():
            return False
        result = {"architecture": list(candidate), **self._costs(candidate), **numbers}
        if candidate == self.largest:
            self._keep_largest(result)
            return True
        path = self.out / "acc" / f"{self.evolution.generation:03}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps({**result, "trial": trial_id}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.results[candidate], self.trials[candidate] = result, trial_id
        self._write_state()
        return True

    def _costs(self, candidate):
        """The costs of a candidate that belong in its result, by name."""
        names, own = costs_of(self.state["settings"]), self.space.costs.own
        costs = {name: self.space.cost(name, candidate) for name in names if name != "latency"}
        costs |= {name: costs[name] / own[name].scale for name in names if name in own}
        return costs | ({"latency_ms": self.space.cost("latency", candidate) / 1e6} if "latency" in names else {})

    def _close(self, generation, population):
        """Writes the files of a complete generation by rank, failed candidates last; the state file is the last one."""
        if generation < self.state["generation"]:
            return  # the search was resumed, and has these files already
        candidates = self.evolution.ranked(population)
        candidates += [c for c in population if c not in candidates]
        trials = collections.defaultdict(list)
        for candidate in candidates:
            if trial_id := self.trials.get(candidate):
                trials[trial_id].append(list(candidate))
        # A search that was killed while it closed this generation may have lost the trials; then this file is on disk.
        if trials:
            write_json(self.out / "id2cand" / f"{generation:03}.json", trials, sort_keys=True)
        with atomic_write(self.out / "acc" / f"{generation:03}.jsonl") as file:
            file.writelines(json.dumps(self.results[c]) + "\n" for c in candidates)
        for rank, candidate in enumerate(candidates):
            self._write_architecture(f"{generation:03}_{rank:03}.json", candidate)
        if best := self.evolution.best:
            self._write_architecture("best.json", best[0])
            self.state["best"] = self.results[best[0]]
        self._write_front()
        self._write_state(generation=generation + 1)

    def _write_front(self):
        front = self.evolution.front() if self.evolution.objectives else []
        names = [f"{i:03}.json" for i in range(len(front))]
        for name, candidate in zip(names, front):
            self._write_architecture(f"front/{name}", candidate)
        for path in (self.out / "checkpoints" / "front").glob("*.json"):
            if path.name not in names:
                path.unlink()

    def _write_architecture(self, name, candidate):
        write_json(self.out / "checkpoints" / name, self.space.to_architecture(candidate))

    def _write_state(self, **changes):
        self.state |= {"evaluated": len(self.results), **changes}
        for start in self.state["starts"][-1:]:
            start["last"] = time.time()
        write_json(state_path(self.out), self.state, indent=1)

    def stop(self, error):
        """Records why the search cannot continue."""
        self._write_state(error=error)


def _open_space(state):
    """The SearchSpace of a search, whose own file is read here (NNI's process too) where the search needs it."""
    settings = state["settings"]
    if not settings.keys() & {"own_costs", "strategy"}:
        return space_of(settings)
    from space import own  # here, because it needs torch, which NNI's tuner does without

    own.load(next((start["own"] for start in reversed(state["starts"]) if "own" in start), None))
    space = space_of(settings)
    return space_of(settings, lambda name: own.function_of(space, name))


def prepare_search(out, settings, resume, warnings=(), start=None):
    """Makes `out` ready for a search with these settings, a dict that JSON can hold, and returns its state.

    `start` (command, versions, demo, config, own) is kept in the state: for the report, and for the commands that are
    printed when the search is resumed without flags.

    A search that is resumed may have more generations than before. Raises UserError if `out` has a search and
    `resume` is false, or where that search has other settings.
    """
    path = state_path(out)
    settings = json.loads(json.dumps(settings))
    state = {"settings": settings, "generation": 0, "evaluated": 0, "best": None, "done": False}
    state |= {"starts": [], "children": [], "confirmations": []}
    with _hold_writer_lock(out):
        resumes = resume and not start and path.exists()  # of this very start, before its first result, too
        if resumes or any((pathlib.Path(out) / "acc").glob("*.jsonl")):
            if not resume:
                raise UserError(f"--out {out} holds a search already: resume it with --resume, or name another --out")
            found = read_state(out)
            before, now = found["settings"].get("generations"), settings.get("generations")
            if isinstance(before, int) and isinstance(now, int) and before < now:
                found["settings"]["generations"] = now
                found["done"] = False
            if changes := settings_difference(found["settings"], settings):
                text = ", ".join(f"{name} {change}" for name, change in changes.items())
                advice = "leave the flags out, or name another --out"
                raise UserError(f"--resume: the search in {out} has other settings: {text}; {advice}")
            state = found
        state |= {"error": None, "pid": os.getpid(), "warnings": list(warnings)}
        if start:
            state["starts"] += [{**start, "begun": time.time(), "last": time.time()}]
        write_json(path, state, indent=1)
    return state


def _hold_writer_lock(out):
    """Waits for the writer of a search that was just killed, which ends within seconds."""
    return hold_lock(state_path(out).with_name("writer.lock"), wait_s=30)

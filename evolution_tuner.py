"""The evolution that searches for the best candidate under limits on its cost, and the NNI tuner around it.

    Evolution           plain logic with ask and tell
    EvolutionWithFlops  the NNI tuner, which hands the candidates of an evolution to trials
    KeepResults         the NNI assessor, which passes the trials' intermediate results to the tuner

Source: paper section 3.4 and algorithm 1; official `src/Search/search.py`; docs/fidelity.md has the differences.
"""

import collections
import functools
import itertools
import math
import random
import threading

import numpy as np

from engines import trial
from engines.search_record import SearchRecord
from settings.subjects import EVOLUTION
from space.limits import Limits, bounds_of, by_fronts, fronts
from space.search_space import SearchSpace
from space.splitting import chunks
from utils import UserError, log

try:
    from nni.assessor import Assessor, AssessResult
    from nni.tuner import Tuner
except ImportError:  # NNI is not installed, and a search without it needs neither
    Tuner = Assessor = object

TRIES = 10  # draws for each wanted child (official)
RANDOM_TRIES = 100  # draws for each wanted random candidate
ENUMERABLE = 10_000  # spaces up to this size are listed where random draws find nothing new
GRACE_S = 3  # for results that arrive after NNI reports the end of a trial


def official_shares(population, select=None, mutation=None, crossover=None):
    """(parents, children by mutation, by crossover) of a population; by default a fifth, and half each (official).

    If only one kind of children is given, the other gets at most the rest of the population.
    """
    half = population // 2
    if mutation is None:
        mutation = max(0, min(half, population - (crossover or 0)))
    if crossover is None:
        crossover = max(0, min(half, population - mutation))
    return max(1, population // 5) if select is None else select, mutation, crossover


class Evolution:
    """Evolution over candidates: tuples of ints, each below its number of `choices`, of at most `cost_limit`.

    The first population is random. Each later one has up to `mutation` children of one parent, whose blocks are redrawn
    with probability `mutation_prob`, up to `crossover` children, which take each block from one of two parents, and
    random candidates up to `population_size`. Parents are drawn from the `select` best of all populations so far. No
    candidate occurs twice. The same seed and rewards give the same populations, whatever the order of the rewards.

    `objectives` are functions of a candidate that are minimised, while the reward, or its first number, is maximised.
    Parents are then taken front by front (NSGA-II), in the last front by crowding distance.

    If `select`, `mutation` or `crossover` is None, it is the official share of the population.

    `ask()` returns a population, empty after `generations` of them or when nothing legal is left; `tell(rewards)` takes
    its rewards by candidate, all at once or in parts. `restrict` replaces `cost` and `cost_limit` by Limits.
    Raises UserError if the settings are not valid.
    """

    def __init__(
        self, choices, cost, cost_limit, population_size=50, select=None, mutation=None, crossover=None,
        mutation_prob=0.1, generations=20, seed=0, objectives=(),
    ):  # fmt: skip
        select, mutation, crossover = official_shares(population_size, select, mutation, crossover)
        if not 1 <= select <= population_size:
            raise UserError(f"{select} parents of a population of {population_size}: needs 1 to {population_size}")
        if mutation < 0 or crossover < 0 or mutation + crossover > population_size:
            children = f"{mutation} children by mutation and {crossover} by crossover"
            raise UserError(f"{children}: needs 0 to {population_size}, the population, in all")
        if not 0 <= mutation_prob <= 1:
            raise UserError(f"--mutation-prob {mutation_prob} is not between 0 and 1")
        if generations < 1:
            raise UserError(f"--generations {generations} is not at least 1")
        self.choices = tuple(choices)
        if not self.choices or min(self.choices) < 1:
            raise UserError(f"search space: {self.choices} choices, each entry needs at least one")
        self.cost = cost
        self.cost_limit = cost_limit
        self.limits = None
        self.population_size = population_size
        self.select = select
        self.mutation, self.crossover, self.mutation_prob = mutation, crossover, mutation_prob
        self.generations = generations
        self.objectives = tuple(objectives)
        self.rng = random.Random(seed)
        self.history = []  # the closed populations
        self.population = []  # the open one, empty between generations
        self.rewards = {}  # candidate -> its reward, None if it failed
        self.finished = False

    @classmethod
    def from_settings(cls, space, settings):
        """The evolution in a SearchSpace with the settings of a search, which may have others too."""
        names = {"population": "population_size"}
        own = {names.get(name, name): settings[name] for name in EVOLUTION if name in settings}
        limits = Limits(space, bounds_of(settings))
        limits.check()
        costs = [name for name in settings.get("objectives", ()) if name != "acc1"]
        own["objectives"] = [functools.partial(space.cost, name) for name in costs]
        evolution = cls(space.choices, limits.excess, 0, **own)
        evolution.restrict(limits)
        return evolution

    def restrict(self, limits):
        """From now on, candidates must meet these Limits."""
        self.limits = limits
        self.cost = limits.excess
        self.cost_limit = 0

    @property
    def generation(self):
        """The number of closed generations."""
        return len(self.history)

    @property
    def best(self):
        """(candidate, reward), or None while no legal one has succeeded; with objectives, the first of the front."""
        ranked = self.front() if self.objectives else self.legal_ranked()
        return (ranked[0], self.rewards[ranked[0]]) if ranked else None

    def ranked(self, candidates=None):
        """The `candidates` (default: all) that succeeded, best first; of equals, the one that was asked for first."""
        if candidates is None:
            candidates = itertools.chain(*self.history, self.population)
        succeeded = [c for c in candidates if self.rewards.get(c) is not None]
        return sorted(succeeded, key=lambda c: _values(self.rewards[c]), reverse=True)

    def legal_ranked(self):
        """The candidates that succeeded and are legal, best first; `restrict` may have made others illegal."""
        return [c for c in self.ranked() if self.cost(c) <= self.cost_limit]

    def parents(self):
        """The `select` best legal candidates of all populations so far."""
        legal = self.legal_ranked()
        if self.objectives:
            legal = [legal[i] for i in by_fronts(self._points(legal), self.select)]
        return legal[: self.select]

    def front(self):
        """The legal candidates that no other one dominates, by falling accuracy."""
        legal = self.legal_ranked()
        return [legal[i] for i in next(fronts(self._points(legal)), [])]

    def _points(self, candidates):
        """The objectives of each candidate, all to be minimised, as an array (candidates, 1 + objectives)."""
        costs = [[-_values(self.rewards[c])[0], *(cost(c) for cost in self.objectives)] for c in candidates]
        return np.array(costs, dtype=float).reshape(len(candidates), 1 + len(self.objectives))

    def ask(self):
        """The open population, a new one once all rewards of the last are told; empty when the search is finished."""
        if not self.population and not self.finished:
            self.population = self._breed() if self.generation < self.generations else []
            self.finished = not self.population
        return list(self.population)

    def tell(self, rewards):
        """Takes rewards of candidates of the open population: a number each, or a tuple of numbers compared in order.

        None and NaN mean that the candidate failed: it becomes no parent and is not drawn again. The first reward
        counts.
        """
        for candidate, reward in rewards.items():
            if candidate not in self.population:
                raise ValueError(f"{candidate} is not in the open population")
            failed = any(value is None or math.isnan(value) for value in _values(reward))
            self.rewards.setdefault(candidate, None if failed else reward)
        if self.population and all(c in self.rewards for c in self.population):
            self.history.append(self.population)
            self.population = []

    def _breed(self):
        """The next population: a step of algorithm 1 of the paper.

        1. Parents are the `select` best legal candidates so far; the first population has none, and starts with step 4.
        2. Mutation: up to `mutation` children of one random parent each.
        3. Crossover: up to `crossover` children of two random parents each, which may be the same one twice.
        4. Random candidates fill up the population.
        Every candidate is new and legal. Steps 2 and 3 end early after TRIES draws for each wanted child.
        """
        population = []
        if parents := self.parents():
            parent = functools.partial(self.rng.choice, parents)
            mutants = (self.mutate(parent()) for _ in range(TRIES * self.mutation))
            self._add_new(population, self.mutation, mutants)
            crossed = (self.cross(parent(), parent()) for _ in range(TRIES * self.crossover))
            self._add_new(population, self.crossover, crossed)
        self._fill(population)
        return population

    def _fill(self, population):
        """Fills up the population with random candidates, as far as there are new legal ones."""
        # Rejection keeps legal candidates uniform; under a tight limit it rejects nearly all: the rest are repaired.
        missing = self.population_size - len(population)
        self._add_new(population, missing, (self.random_candidate() for _ in range(RANDOM_TRIES * missing)))
        missing = self.population_size - len(population)
        if self.limits:
            draws = (self.limits.repair(self.random_candidate(), self.rng) for _ in range(TRIES * missing))
            self._add_new(population, missing, draws)
            missing = self.population_size - len(population)
        if missing and math.prod(self.choices) <= ENUMERABLE:
            left = [c for c in itertools.product(*map(range, self.choices)) if self._is_new(c, population)]
            population += self.rng.sample(left, min(missing, len(left)))
        elif missing and self.limits:  # few are legal: try neighbours, also of those that this loop adds
            for candidate in population:
                wanted = self.population_size - len(population)
                self._add_new(population, wanted, self.limits.neighbours(candidate, self.rng))

    def _add_new(self, population, wanted, draws):
        """Adds up to `wanted` new legal candidates from the iterator `draws`, and draws no more than that takes."""
        new = (candidate for candidate in draws if self._is_new(candidate, population))
        for candidate in itertools.islice(new, wanted):
            population.append(candidate)

    def _is_new(self, candidate, population):
        return candidate not in self.rewards and candidate not in population and self.cost(candidate) <= self.cost_limit

    def random_candidate(self):
        """A uniform candidate."""
        return tuple(self.rng.randrange(n) for n in self.choices)

    def mutate(self, parent):
        """Redraws each block among all of its choices with probability `mutation_prob`."""
        return tuple(
            self.rng.randrange(n) if self.rng.random() < self.mutation_prob else choice
            for choice, n in zip(parent, self.choices)
        )

    def cross(self, *parents):
        """Takes each block from one of the parents."""
        return tuple(map(self.rng.choice, zip(*parents)))


def _values(reward):
    return reward if isinstance(reward, tuple) else (reward,)


def _stops_search_on_error(method):
    """Decorates a tuner's method to hold its lock; an exception ends the search and is written to its state file."""

    @functools.wraps(method)
    def run(self, *args):
        with self.lock:
            if self.record.state["error"]:
                return
            try:
                method(self, *args)
            except Exception as error:
                log.exception("the search cannot continue")
                self.record.stop(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")

    return run


class EvolutionWithFlops(Tuner):
    """NNI's tuner: sends the candidates of a SearchRecord to trials in chunks, and records what the trials report.

    `out` is an absolute path, `space` a SearchSpace as a dict, `costs` the arguments of SearchSpace.with_costs,
    `flops_limit` and `evolution` the settings of the evolution, with its `limits` if there are others. A generation is
    split into as many chunks as trials run at a time, or into chunks of `candidates_per_trial`; the candidates of a
    chunk share first blocks.

    Its form follows from how NNI 3.0 behaves:
    - NNI may hand parameters to another trial than it tells the tuner, so only architectures that trials report count.
    - Parameters of a trial that died before it asked for them go to the next trial. "until" in the parameters is the
      number of trials up to the last one sent with them: a trial with that sequence number or a higher one asks again.
    - NNI requests parameters once for each free slot, and never again: the ids of requests are queued until there are
      candidates, which st_callback then sends.
    - NNI calls trial_end on another thread, before or after the trial's results, and may name another trial: the calls
      are only counted, and results have GRACE_S seconds to arrive.
    - NNI ignores an exception in a tuner, and the search would hang: it is written to the state file, which search.py
      reads.
    Candidates that no trial reported are sent again, each in a trial of its own, and then count as failed.
    """

    # NNI creates a tuner and an assessor in one process and tells neither about the other: KeepResults finds it here.
    current = None

    def __init__(self, out, space, flops_limit=None, concurrency=1, candidates_per_trial=None, costs=None, **evolution):
        space = SearchSpace.from_dict(space)
        if costs:
            space = space.with_costs(*costs)
        evolution = Evolution.from_settings(space, {**evolution, "flops_limit": flops_limit})
        self.record = SearchRecord(out, space, evolution)
        self.concurrency = concurrency
        self.candidates_per_trial = candidates_per_trial
        self.lock = threading.RLock()
        self.callback = None  # sends parameters to a trial
        self.ids, self.chunks = collections.deque(), collections.deque()  # of requests, and of candidates to send
        self.times_sent = collections.Counter()  # of each candidate
        self.sent, self.ended = 0, 0  # trials
        self.fruitless = 0  # trials in a row that ended without a result
        EvolutionWithFlops.current = self
        self._plan()

    # --- what NNI calls ---

    def update_search_space(self, search_space):
        """Does nothing: the space is an argument of the tuner."""

    def generate_multiple_parameters(self, parameter_id_list, **kwargs):
        self._queue(parameter_id_list, kwargs["st_callback"])
        return []

    def receive_trial_result(self, parameter_id, parameters, value, **kwargs):
        self.keep(value["trial"], value["results"])  # as trial.report has sent them

    def trial_end(self, parameter_id, success, **kwargs):
        self._count_end()

    # --- what it does ---

    @_stops_search_on_error
    def keep(self, trial_id, results):
        """Records what a trial reports, new or not; plans the next generation once this one is complete."""
        self.fruitless = 0
        for result in results:
            self.record.add(result, trial_id)
        self._plan_and_send()

    @_stops_search_on_error
    def hear(self, trial_id, results):
        """Counts a heartbeat of a trial, and keeps its results so far."""
        self.record.hear(trial_id)
        if results:
            self.keep(trial_id, results)

    @_stops_search_on_error
    def _queue(self, ids, callback):
        self.callback = callback
        self.ids.extend(ids)
        self._send()

    @_stops_search_on_error
    def _count_end(self):
        self.ended += 1
        self.fruitless += 1
        if self.fruitless > self.concurrency + 8:
            raise UserError(f"{self.fruitless} trials in a row ended without a result")
        if self.ended == self.sent and self._missing():
            timer = threading.Timer(GRACE_S, self._retry, [self.sent])
            timer.daemon = True
            timer.start()

    @_stops_search_on_error
    def _retry(self, sent):
        """Sends or fails the candidates that no trial reported, unless more than `sent` trials were sent or will be."""
        missing = self._missing()
        if self.sent > sent or any(c in missing for chunk in self.chunks for c in chunk):
            return
        any_succeeded = any(result["acc1"] is not None for result in self.record.results.values())
        for candidate in missing:
            if self.times_sent[candidate] > 1 and any_succeeded:  # else the candidates are not the cause
                self.record.fail(candidate, "two trials ended without a result")
            else:
                self.chunks.append([candidate])  # on its own: if it crashes its trial, no other is lost
        self._plan_and_send()

    def _missing(self):
        """The candidates of the open generation without a result."""
        return [c for c in self.record.evolution.population if c not in self.record.results]

    def _plan_and_send(self):
        if not self._missing():
            self._plan()
        self._send()

    @_stops_search_on_error
    def _plan(self):
        """Splits the next generation into chunks."""
        pending = self.record.pending()
        self.chunks.extend(chunks(self.record.space, pending, self.concurrency, self.candidates_per_trial))

    def _send(self):
        """Answers queued requests with planned chunks."""
        while self.ids and self.chunks:
            if chunk := [c for c in self.chunks.popleft() if c not in self.record.results]:
                self.times_sent.update(chunk)
                self.sent += 1
                self.callback(self.ids.popleft(), trial.parameters(chunk, self.sent + len(self.chunks)))


class KeepResults(Assessor):
    """NNI's assessor: passes intermediate messages, which only assessors receive, to the tuner; ends no trial early."""

    def assess_trial(self, trial_job_id, trial_history):
        EvolutionWithFlops.current.hear(trial_job_id, trial.read_intermediate(trial_history))
        return AssessResult.Good

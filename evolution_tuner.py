"""The evolution that searches for the best candidate under a cost limit, and the NNI tuner around it.

    Evolution           plain logic with ask and tell
    EvolutionWithFlops  the NNI tuner, which hands the candidates of an evolution to trials; KeepResults serves it as assessor

Source: paper section 3.4 and algorithm 1; official `src/Search/search.py`; for differences see the readme's table.
"""

import collections
import functools
import itertools
import math
import random
import threading

from engines.search_record import SearchRecord
from space.search_space import SearchSpace
from space.splitting import chunks
from utils import UserError, log

try:
    from nni.assessor import Assessor, AssessResult
    from nni.tuner import Tuner
except ImportError:  # a search without NNI needs none of it
    Tuner = Assessor = object

EVOLUTION = (
    "population",
    "select",
    "mutation",
    "crossover",
    "mutation_prob",
    "generations",
    "seed",
)  # the settings of Evolution
ENUMERABLE = 10_000  # spaces up to this size are listed where random draws find nothing new
TRIES = 10  # draws for each child that is wanted (official)
GRACE_S = 3  # results still on their way when NNI says that a trial has ended


class Evolution:
    """Evolution over candidates, tuples of one int a block below `choices_per_block`, with `cost(candidate)` at most `cost_limit`.

    The first population is random. Every other one has up to `mutation` children of one parent each, whose blocks are drawn
    anew with probability `mutation_prob`, up to `crossover` children that take each block from one of two parents, and random
    candidates to fill up to `population`. Parents are drawn from the `select` best of all populations so far. No candidate
    comes twice. The same seed and rewards give the same populations, whatever the order in which the rewards are told.

    `ask()` gives a population, empty when `generations` have been told or nothing legal is left; `tell({candidate: reward})`
    takes rewards, all at once or in parts. The sum over blocks of a cost each is what `cost` is taken to be: where it isn't,
    the lowest cost that an error names is an upper bound. Raises UserError where the numbers allow no search.
    """

    def __init__(
        self, choices_per_block, cost, cost_limit, population=50, select=10, mutation=25, crossover=25, mutation_prob=0.1,
        generations=20, seed=0,
    ):  # fmt: skip
        if population < select or select < 1:
            raise UserError(
                f"--population {population} and --select {select}: parents are 1 to --population candidates"
            )
        if mutation < 0 or crossover < 0 or mutation + crossover > population:
            raise UserError(
                f"--mutation {mutation} and --crossover {crossover} are more children than --population {population}"
            )
        if not 0 <= mutation_prob <= 1:
            raise UserError(f"--mutation-prob {mutation_prob} is not between 0 and 1")
        if generations < 1:
            raise UserError(f"--generations {generations} is not at least 1")
        self.choices_per_block = tuple(choices_per_block)
        if not self.choices_per_block or min(self.choices_per_block) < 1:
            raise UserError(f"search space: {self.choices_per_block} choices per block, each block needs at least one")
        self.cost, self.cost_limit = cost, cost_limit
        self.population_size, self.select, self.mutation, self.crossover = population, select, mutation, crossover
        self.mutation_prob, self.generations = mutation_prob, generations
        lowest = cost(self._cheapest())
        if not lowest <= cost_limit:
            raise UserError(
                f"limit {cost_limit} is below the lowest cost of any candidate, {lowest}; raise --flops-limit"
            )
        self.rng = random.Random(seed)
        self.history = []  # the closed populations
        self.population = []  # the open one, empty between generations
        self.rewards = {}  # of every candidate told; None where it failed
        self.finished = False

    @property
    def generation(self):
        """How many generations are closed."""
        return len(self.history)

    @property
    def best(self):
        """(candidate, reward), None while nothing has succeeded."""
        ranked = self.ranked()
        return (ranked[0], self.rewards[ranked[0]]) if ranked else None

    def ranked(self, candidates=None):
        """Those of `candidates` (default: all) that succeeded, best first; of equals, the one that was asked for first."""
        if candidates is None:
            candidates = itertools.chain(*self.history, self.population)
        succeeded = [c for c in candidates if self.rewards.get(c) is not None]
        return sorted(succeeded, key=lambda c: _values(self.rewards[c]), reverse=True)

    def ask(self):
        """The open population as a list, a new one once all of the last are told; empty when the search is finished."""
        if not self.population and not self.finished:
            self.population = self._breed() if self.generation < self.generations else []
            self.finished = not self.population
        return list(self.population)

    def tell(self, rewards):
        """Takes the rewards of candidates of the open population: a number, or a tuple of numbers that count in order.

        None and NaN mean that the candidate failed: it is no parent, and does not come again. The first reward counts.
        """
        for candidate, reward in rewards.items():
            if candidate not in self.population:
                raise ValueError(f"{candidate} is not of the population that was asked for")
            failed = any(value is None or math.isnan(value) for value in _values(reward))
            self.rewards.setdefault(candidate, None if failed else reward)
        if self.population and all(c in self.rewards for c in self.population):
            self.history.append(self.population)
            self.population = []

    def _breed(self):
        population = []
        if parents := self.ranked()[: self.select]:
            self._extend(population, self.mutation, TRIES, lambda: self._mutate(self.rng.choice(parents)))
            self._extend(
                population,
                self.crossover,
                TRIES,
                lambda: self._cross(self.rng.choice(parents), self.rng.choice(parents)),
            )
        # Rejection keeps legal candidates uniform; under a tight limit it finds next to nothing, so then they are repaired.
        self._extend(population, self.population_size - len(population), 100, self._random)
        self._extend(population, self.population_size - len(population), TRIES, lambda: self._repair(self._random()))
        missing = self.population_size - len(population)
        if missing and math.prod(self.choices_per_block) <= ENUMERABLE:
            left = [c for c in itertools.product(*map(range, self.choices_per_block)) if self._is_new(c, population)]
            population += self.rng.sample(left, min(missing, len(left)))
        return population

    def _extend(self, population, wanted, tries, draw):
        """Adds up to `wanted` new legal candidates to the population, in at most `tries` draws for each wanted one."""
        full = len(population) + wanted
        for _ in range(tries * wanted):
            if len(population) == full:
                break
            candidate = draw()
            if self._is_new(candidate, population):
                population.append(candidate)

    def _is_new(self, candidate, population):
        return candidate not in self.rewards and candidate not in population and self.cost(candidate) <= self.cost_limit

    def _random(self):
        return tuple(self.rng.randrange(n) for n in self.choices_per_block)

    def _mutate(self, parent):
        """Draws each block anew, among all of its choices, with probability `mutation_prob`."""
        return tuple(
            self.rng.randrange(n) if self.rng.random() < self.mutation_prob else choice
            for choice, n in zip(parent, self.choices_per_block)
        )

    def _cross(self, *parents):
        return tuple(map(self.rng.choice, zip(*parents)))

    def _variants(self, candidate, block):
        """The candidate with each of the block's choices."""
        return [
            (*candidate[:block], choice, *candidate[block + 1 :]) for choice in range(self.choices_per_block[block])
        ]

    def _cheapest(self):
        candidate = (0,) * len(self.choices_per_block)
        for block in range(len(candidate)):
            candidate = min(self._variants(candidate, block), key=self.cost)
        return candidate

    def _repair(self, candidate):
        """Moves randomly chosen blocks to cheaper choices until the candidate is legal."""
        while (cost := self.cost(candidate)) > self.cost_limit:
            cheaper = [v for b in range(len(candidate)) for v in self._variants(candidate, b) if self.cost(v) < cost]
            if not cheaper:  # can't be where costs add up
                break
            candidate = self.rng.choice(cheaper)
        return candidate


def _values(reward):
    return reward if isinstance(reward, tuple) else (reward,)


def _contained(method):
    """For a tuner's method: holds the tuner's lock, and an exception ends the search with its message in the state file."""

    @functools.wraps(method)
    def run(self, *args):
        with self.lock:
            if self.record.state["error"]:
                return
            try:
                method(self, *args)
            except Exception as error:
                log.exception("the search can't go on")
                self.record.stop(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")

    return run


class EvolutionWithFlops(Tuner):
    """NNI's tuner: sends the candidates of a SearchRecord to trials, a chunk each, and keeps what the trials say.

    `out` is absolute, `space` a SearchSpace as a dict, `costs` what SearchSpace.with_costs takes, `evolution` the settings of
    Evolution. A generation is split into as
    many chunks as trials run at a time, or into chunks of `candidates_per_trial`, so that those in a chunk share first blocks.
    What NNI 3.0 does, and how it is borne:
    - it hands parameters to other trials than it says: only the architectures that a trial reports are believed;
    - what a trial that died early never asked for goes to the next one: a trial whose sequence number has reached "until" of
      its parameters, where those sent with them end, has got old ones, and may ask again;
    - it asks for a trial once a free slot and never again: ids wait here until there are candidates, then go to st_callback;
    - `trial_end` comes on another thread, before or after the trial's results, and may name another trial: it is counted
      only, and results get some seconds more;
    - an exception in a tuner stops the search without a word: it is written to the state file, which search.py watches.
    Candidates that no trial reported are sent once more, a trial each, then they have failed.
    """

    current = None  # the tuner of this process, for KeepResults: NNI makes both, and acquaints neither with the other

    def __init__(self, out, space, flops_limit, concurrency=1, candidates_per_trial=None, costs=None, **evolution):
        space = SearchSpace.from_dict(space)
        if costs:
            space = space.with_costs(*costs)
        self.record = SearchRecord(
            out, space, Evolution(space.choices, space.flops, flops_limit, **evolution)
        )
        self.concurrency, self.candidates_per_trial = concurrency, candidates_per_trial
        self.lock = threading.RLock()
        self.send = None
        self.ids, self.chunks = collections.deque(), collections.deque()
        self.times_sent = collections.Counter()  # of each candidate
        self.sent, self.ended = 0, 0  # trials
        self.fruitless = 0  # trials in a row that ended and reported nothing
        EvolutionWithFlops.current = self
        self._plan()

    def update_search_space(self, search_space):
        """The space came with the arguments."""

    def generate_multiple_parameters(self, parameter_id_list, **kwargs):
        self._serve(parameter_id_list, kwargs["st_callback"])
        return []

    def receive_trial_result(self, parameter_id, parameters, value, **kwargs):
        self.keep(value["trial"], value["results"])

    def trial_end(self, parameter_id, success, **kwargs):
        self._count_end()

    @_contained
    def keep(self, trial, results):
        """Keeps what a trial reports, new or not, and goes on when the generation is complete."""
        self.fruitless = 0
        for result in results:
            self.record.add(result, trial)
        self._go_on()

    @_contained
    def _serve(self, ids, send):
        self.send = send
        self.ids.extend(ids)
        self._dispatch()

    @_contained
    def _count_end(self):
        self.ended += 1
        self.fruitless += 1
        if self.fruitless > self.concurrency + 8:
            raise UserError(f"{self.fruitless} trials in a row ended without a result")
        if self.ended == self.sent and self._waiting():
            timer = threading.Timer(GRACE_S, self._retry, [self.sent])
            timer.daemon = True
            timer.start()

    @_contained
    def _retry(self, sent):
        """Deals with candidates that no trial reported, unless more than `sent` trials have been sent, or are to be."""
        waiting = self._waiting()
        if self.sent > sent or any(c in waiting for chunk in self.chunks for c in chunk):
            return
        any_succeeded = any(result["acc1"] is not None for result in self.record.results.values())
        for candidate in waiting:
            if self.times_sent[candidate] > 1 and any_succeeded:  # else something else is broken than the candidate
                self.record.fail(candidate, "two trials ended without a result")
            else:
                self.chunks.append([candidate])  # alone, so that one that kills its trial takes no other along
        self._go_on()

    def _waiting(self):
        """The candidates of this generation without a result."""
        return [c for c in self.record.evolution.population if c not in self.record.results]

    def _go_on(self):
        if not self._waiting():
            self._plan()
        self._dispatch()

    @_contained
    def _plan(self):
        """Splits the next generation into chunks."""
        self.chunks.extend(
            chunks(self.record.space, self.record.pending(), self.concurrency, self.candidates_per_trial)
        )

    def _dispatch(self):
        while self.ids and self.chunks:
            if chunk := [c for c in self.chunks.popleft() if c not in self.record.results]:
                self.times_sent.update(chunk)
                self.sent += 1
                until = self.sent + len(self.chunks)
                self.send(self.ids.popleft(), {"candidates": [list(c) for c in chunk], "until": until})


class KeepResults(Assessor):
    """Takes the intermediate results of trials, which NNI shows to assessors alone, to the tuner; ends no trial early."""

    def assess_trial(self, trial_job_id, trial_history):
        EvolutionWithFlops.current.keep(trial_job_id, [value["result"] for value in trial_history])
        return AssessResult.Good

"""The evolution that searches for the best candidate under limits on its cost: plain logic with ask and tell.

Source: paper section 3.4 and algorithm 1; official `src/Search/search.py`; docs/fidelity.md has the differences.
"""

import dataclasses
import functools
import itertools
import math
import random

import numpy as np

from settings.fields import names
from settings.subjects import EVOLUTION, Search
from space.limits import Limits, bounds_of
from space.twins import Twins
from utils import UserError

TRIES = 10  # draws for each wanted child (official)
RANDOM_TRIES = 100  # draws for each wanted random candidate
LISTED = 10_000  # spaces up to this size are listed where random draws find nothing new


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
    """Evolution over candidates: tuples of ints, each below its number of `choices`.

    The first population is random. Each later one has up to `mutation` children of one parent, whose blocks are redrawn
    with probability `mutation_prob`, up to `crossover` children, which take each block from one of two parents, and
    random candidates up to `population`. Parents are drawn from the `select` best of all populations so far. No
    candidate occurs twice. The same seed and rewards give the same populations, whatever the order of the rewards.

    Args:
        choices: the number of choices of each entry of a candidate
        limits: what makes a candidate legal, a space.limits.Limits or another object with its `excess(candidate)`,
            `repair(candidate, rng)` and `neighbours(candidate, rng)`. It may be replaced between populations.
        search: the numbers above, a settings.subjects.Search; those that are None have their official share
        seed: of all draws
        objectives: functions of a candidate that are minimised, while the reward, or its first number, is maximised.
            Parents are then taken front by front (NSGA-II), in the last front by crowding distance.
        canonical: a function that gives the form in which a candidate is asked for, such as SearchSpace.canonical,
            the same form for all that are the same network

    With a `searcher` (space.own.Searcher), populations are what it asks for instead, one candidate at a time. One that
    is illegal or known is told to it at once; where it asks for too few new ones, random candidates stand in. It is
    told a population when all of its rewards are known.

    `ask()` returns a population, empty after `generations` of them or when nothing legal is left; `tell(rewards)` takes
    its rewards by candidate, all at once or in parts. Raises UserError if the settings are not valid, or if there is no
    first population because nothing legal is found.
    """

    searcher = None

    def __init__(self, choices, limits, search=None, seed=0, objectives=(), canonical=tuple):
        search = search or Search()
        size = search.population
        self.population_size = size
        self.select, self.mutation, self.crossover = official_shares(
            size, search.select, search.mutation, search.crossover
        )
        if self.select > size:
            raise UserError(f"{self.select} parents of a population of {size}: needs 1 to {size}")
        if self.mutation + self.crossover > size:
            children = f"{self.mutation} children by mutation and {self.crossover} by crossover"
            raise UserError(f"{children}: needs 0 to {size}, the population, in all")
        self.choices = tuple(choices)
        if not self.choices or min(self.choices) < 1:
            raise UserError(f"search space: {self.choices} choices, each entry needs at least one")
        self.limits = limits
        self.mutation_prob = search.mutation_prob
        self.generations = search.generations
        self.objectives = tuple(objectives)
        self.canonical = canonical
        self.rng = random.Random(seed)
        self.history = []  # the closed populations
        self.children = []  # how many children were new, for each population but the first
        self.population = []  # the open one, empty between generations
        self.rewards = {}  # candidate -> its reward, None if it failed
        self.finished = False

    @classmethod
    def from_settings(cls, space, settings):
        """The evolution in a SearchSpace with the settings of a search, which may have others too."""
        search = Search(**{name: settings[name] for name in names(Search) if name in EVOLUTION and name in settings})
        limits = Limits(space, bounds_of(settings))
        limits.check()
        costs = [name for name in settings.get("objectives", ()) if name != "acc1"]
        objectives = [functools.partial(space.cost, name) for name in costs]
        recorded = settings.get("identities")  # older searches have none
        canonical = Twins(space, recorded).canonical if recorded else tuple
        evolution = cls(space.choices, limits, search, settings.get("seed", 0), objectives, canonical)
        if name := settings.get("strategy"):  # that of a user's file
            from space.own import Searcher  # here, because it needs torch

            sizes = {"select": evolution.select, "mutation": evolution.mutation, "crossover": evolution.crossover}
            search = dataclasses.replace(search, **sizes)  # which a file may leave to the official shares
            evolution.searcher = Searcher(name, space, _Current(evolution), evolution.rng, search)
        return evolution

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
        """The candidates that succeeded and are legal, best first; other limits may have made some illegal."""
        return [c for c in self.ranked() if not self.limits.excess(c)]

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
            if not self.population and not self.history and self.generations:
                raise UserError(self._nothing_legal())
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
            for candidate in self.population if self.searcher else ():
                self._tell_searcher(candidate, self.rewards[candidate])
            self.population = []

    def _tell_searcher(self, candidate, reward):
        self.searcher.tell(candidate, None if reward is None else _values(reward)[0])

    def _asked(self):
        """Yields what the searcher asks for, and tells it what it may not have, or has had."""
        for _ in range(RANDOM_TRIES * self.population_size):
            candidate = self.searcher.ask()
            if self.limits.excess(candidate):
                self.searcher.tell(candidate, None)
            elif candidate in self.rewards:
                self._tell_searcher(candidate, self.rewards[candidate])
            yield candidate

    def _nothing_legal(self):
        drawn = [self.limits.repair(self.random_candidate(), self.rng) for _ in range(RANDOM_TRIES)]
        nearest = min(drawn, key=self.limits.excess)
        text = f"no candidate was found within the limits; the nearest of {RANDOM_TRIES} is {list(nearest)}, beyond"
        return f"{text} them by {self.limits.excess(nearest):.3g}"

    def _breed(self):
        """The next population: a step of algorithm 1 of the paper.

        1. Parents are the `select` best legal candidates so far; the first population has none, and starts with step 4.
        2. Mutation: up to `mutation` children of one random parent each.
        3. Crossover: up to `crossover` children of two random parents each, which may be the same one twice.
        4. Random candidates fill up the population.
        Every candidate is new and legal. Steps 2 and 3 end early after TRIES draws for each wanted child.
        """
        population = []
        if self.searcher:
            self._add_new(population, self.population_size, self._asked())
        elif parents := self.parents():
            parent = functools.partial(self.rng.choice, parents)
            mutants = (self.mutate(parent()) for _ in range(TRIES * self.mutation))
            self._add_new(population, self.mutation, mutants)
            crossed = (self.cross(parent(), parent()) for _ in range(TRIES * self.crossover))
            self._add_new(population, self.crossover, crossed)
        if self.history:
            self.children.append(len(population))
        self._fill(population)
        return population

    def _fill(self, population):
        """Fills up the population with random candidates, as far as there are new legal ones."""
        # Rejection keeps legal candidates uniform; under a tight limit it rejects nearly all: the rest are repaired.
        missing = self.population_size - len(population)
        self._add_new(population, missing, (self.random_candidate() for _ in range(RANDOM_TRIES * missing)))
        missing = self.population_size - len(population)
        draws = (self.limits.repair(self.random_candidate(), self.rng) for _ in range(TRIES * missing))
        self._add_new(population, missing, draws)
        missing = self.population_size - len(population)
        if missing and math.prod(self.choices) <= LISTED:
            everything = dict.fromkeys(map(self.canonical, itertools.product(*map(range, self.choices))))
            left = [c for c in everything if self._is_new(c, population)]
            population += self.rng.sample(left, min(missing, len(left)))
        elif missing:  # few are legal: try neighbours, also of those that this loop adds
            if not self.history and not population:  # none was found: as under a limit on how many choices differ
                same = (tuple(min(choice, n - 1) for n in self.choices) for choice in range(max(self.choices)))
                self._add_new(population, missing, (self.limits.repair(c, self.rng) for c in same))
            for candidate in population:
                wanted = self.population_size - len(population)
                self._add_new(population, wanted, self.limits.neighbours(candidate, self.rng))

    def _add_new(self, population, wanted, draws):
        """Adds up to `wanted` new legal candidates from the iterator `draws`, and draws no more than that takes."""
        new = (candidate for candidate in map(self.canonical, draws) if self._is_new(candidate, population))
        for candidate in itertools.islice(new, wanted):
            population.append(candidate)

    def _is_new(self, candidate, population):
        known = candidate in self.rewards or candidate in population
        return not known and not self.limits.excess(candidate)

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


class _Current:
    """The limits of an evolution as they are at the time, for a searcher that keeps them."""

    def __init__(self, evolution):
        self.evolution = evolution

    def __getattr__(self, name):
        return getattr(self.evolution.limits, name)


def _values(reward):
    return reward if isinstance(reward, tuple) else (reward,)


# --- several objectives (Deb et al., 2002: NSGA-II) ----------------------------------------------------------


def fronts(points):
    """Yields the fronts of points (n, objectives), each a list of rising indices: the points that no other one
    dominates (is at most as high in all objectives, and lower in one), then those of the rest, and so on."""
    at_most = (points[:, None] <= points[None, :]).all(axis=2)
    dominates = at_most & ~at_most.T
    left = np.ones(len(points), bool)
    while left.any():
        front = left & ~dominates[left].any(axis=0)
        yield np.flatnonzero(front).tolist()
        left &= ~front


def crowding(points):
    """The crowding distance of each point (n, objectives) of a front: the sum over the objectives of the distance
    between its two neighbours, as a share of the range; infinite at the ends."""
    distance = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        span = values[order[-1]] - values[order[0]]
        distance[order[[0, -1]]] = np.inf
        if span:
            distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / span
    return distance


def by_fronts(points, n):
    """Indices of at least `n` points, or of all: front by front, each by falling crowding distance."""
    order = []
    for front in fronts(points):
        order += [front[i] for i in np.argsort(-crowding(points[front]), kind="stable")]
        if len(order) >= n:
            break
    return order

"""The results of a search in numbers: generations, Pareto front, shares of operations, and random search beside it."""

import functools
import itertools
import pathlib

import numpy as np

from engines.generations import Generation, beside_best, first_generation_warning
from engines.search_files import (
    children_wanted,
    cost_of,
    ranked,
    read_generations,
    read_state,
    settings_difference,
    space_of,
    state_path,
)
from space.evolution import EVOLUTION
from space.limits import Limits, bounds_of, milliseconds, shown
from utils import UserError

FEWEST = 8  # accuracies, to estimate a spread from
SKEWED = 1  # skewness from which accuracies count as not normal; 5% of 16 normal draws have more, 0.5% of 50
SAME = 0.95  # a sample of this share of a budget counts as the whole, since a few candidates may fail


class SearchResults:
    """The results so far of the search in a folder. Raises UserError if there is no search or no accuracy yet.

    `results` are those in acc/, each with its generation; `succeeded` those with an accuracy, best first; `legal` those
    of them that meet the limits after all that was measured (all of them where none does). `largest` is the result of
    the largest legal candidate, which need not be one of these; None where it is not known.
    """

    def __init__(self, out):
        self.out = pathlib.Path(out)
        self.state = read_state(out)
        try:
            self.settings = self.state["settings"]
            # The report has the recorded numbers of a cost that is a function, not the function.
            self.space = space_of(self.settings, lambda name: lambda candidate: self.recorded[candidate][name])
            self.own = self.space.costs.own
            self.bounds = bounds_of(self.settings)
            closed = self.state["generation"]
        except (KeyError, TypeError):
            raise UserError(f"{state_path(out)}: not the state of a search") from None
        self.generations = [
            Generation(number, [{**r, "generation": number} for r in results], number <= closed)
            for number, results in enumerate(read_generations(out), 1)
            if results
        ]
        self.results = [r for g in self.generations for r in g.results]
        self.recorded = {self.space.check(r["architecture"]): r for r in self.results}
        self.succeeded = ranked(self.results)
        if not self.succeeded:
            if n := len(self.results):
                logs = state_path(out).parent
                raise UserError(f"none of {n} candidates could be evaluated; the trials' errors are below {logs}")
            raise UserError(f"{out}: no candidate is evaluated yet; run the report again when search.py has some")
        self.by_loss = "score" in self.succeeded[0]
        self.objectives = self.settings.get("objectives", [])
        self.confirmations = self.state["confirmations"]
        self.starts = self.state["starts"]
        self.limits = Limits.of_search(self.space, self.bounds, self.confirmations)
        self.legal = [r for r in self.succeeded if not self.is_beyond(r)] or self.succeeded
        self.winner = self._winner()
        self.measured_ms = {tuple(m["architecture"]): m["measured_ms"] for row in self.confirmations
                            for m in row["measured"]}  # fmt: skip
        self.largest = self.state.get("largest")
        if self.largest and "measured_ms" in self.largest:
            self.measured_ms[tuple(self.largest["architecture"])] = self.largest["measured_ms"]

    def _winner(self):
        """The most accurate legal result; with objectives that of best.json, which the front has of equals."""
        best = self.state["best"] if self.objectives else None
        return next((r for r in self.succeeded if best and r["architecture"] == best["architecture"]), self.legal[0])

    @property
    def front_files(self):
        """The architectures of the front, the most accurate first; none without objectives."""
        return sorted(self.out.glob("checkpoints/front/*.json"), key=lambda path: (len(path.name), path.name))

    @property
    def own_heads(self):
        """{name: name and unit} of the costs of the user's own, for columns."""
        return {name: f"{name} {cost.unit}".strip() for name, cost in self.own.items()}

    def score(self, result):
        """The number in a result by which it is ranked, the higher the better: top-1 in percent, or minus the loss."""
        return result["score"] if self.by_loss else result["acc1"]

    def as_read(self, score):
        """A score as it is shown: top-1 in percent, or the loss in nats."""
        return -score if self.by_loss else score

    @property
    def n_failed(self):
        return len(self.results) - len(self.succeeded)

    def is_beyond(self, result):
        """Whether a candidate is beyond a limit, after all that was measured."""
        return self.limits.excess(result["architecture"]) > 0

    def measured_text(self, result):
        """The latency of a candidate as measured, in ms; empty where it was not."""
        ms = self.measured_ms.get(tuple(result["architecture"]))
        return "" if ms is None else milliseconds(ms)

    @property
    def largest_text(self):
        """What the largest legal candidate is beside the winner, in words; None where it is not known."""
        found = self.largest
        if not found:
            return None
        name = "the largest legal candidate" + ("" if found["of_all"] else " of those evaluated")
        if found["architecture"] == self.winner["architecture"]:
            return f"the best is {name}"
        name += f", {shown('flops', found['flops'])} FLOPs"
        if found["acc1"] is None:
            return f"{name}: could not be evaluated, {found['error']}"
        if ms := self.measured_text(found):
            holds = found.get("holds", tuple(found["architecture"]) not in self.limits.banned)
            name += f", {ms} ms measured" + ("" if holds else ", beyond the limit")
        return f"{name}: top-1 {found['acc1']:.2f}%, {beside_best(found, self.winner)}"

    @property
    def main_cost(self):
        """The cost that the page shows beside accuracy: the first of latency, own costs, FLOPs, parameters with a
        limit."""
        return next(name for name in ("latency", *self.own, "flops", "params") if name in self.bounds)

    def cost(self, name, result):
        """A cost of a result, as SearchSpace.cost has it."""
        return self.space.cost(name, result["architecture"]) if name == "params" else cost_of(name, result, self.own)

    @functools.cached_property
    def share(self):
        """The share of all candidates that the limits leave."""
        found = [start["share"] for start in self.starts if "share" in start]
        return found[-1] if found else Limits(self.space, self.bounds).share()

    def new_children(self, generation):
        """How many of the children in a Generation were new, in words; empty where it has none, or it isn't known."""
        wanted = children_wanted(self.settings)
        found = dict(enumerate(self.state["children"], 2))
        return f"{found[generation.number]} of {wanted}" if wanted and generation.number in found else ""

    @functools.cached_property
    def first_warning(self):
        """The line that says that the first generation's candidates can't be told apart, or None."""
        return first_generation_warning(self.generations[0].results, self.space.n_classes)

    def warnings(self):
        """Reasons to doubt the results, a line each: from the start of the search, and from its first generation."""
        found = [*self.state["warnings"], *filter(None, [self.first_warning])]
        if self.confirmations and not self.state["best"]:
            found.append(
                "none of the candidates measured holds the limit on latency: raise it, or measure the device again"
            )
        return found

    def is_random(self):
        return not children_wanted(self.settings)

    def best_so_far(self):
        """(number of candidates with an accuracy, the best score of them as it is read) after each generation."""
        generations = [g for g in self.generations if g.succeeded]
        n = itertools.accumulate(len(g.succeeded) for g in generations)
        best = itertools.accumulate((self.score(g.best) for g in generations), max)
        return list(zip(n, map(self.as_read, best)))

    def front(self):
        """The Pareto front by rising `main_cost`: candidates more accurate than all others of at most their cost."""
        front = []
        for result in sorted(self.succeeded, key=lambda r: (self.cost(self.main_cost, r), -r["acc1"])):
            if not front or result["acc1"] > front[-1]["acc1"]:
                front.append(result)
        return front

    def family(self):
        """(path below the folder, result) of each member of the front of a search with objectives."""
        by_architecture = {tuple(r["architecture"]): r for r in self.succeeded}
        found = []
        for path in self.front_files:
            if result := by_architecture.get(self.space.load_architecture(path)):
                found.append((path.relative_to(self.out).as_posix(), result))
        return found

    def shares(self, results, operation):
        """The share of the results that choose an operation (an index), for each block."""
        name = self.space.operations[operation]
        blocks = zip(*([name for name, _ in self.space.chosen(r["architecture"])] for r in results))
        return [block.count(name) / len(results) for block in blocks]


# --- random search -------------------------------------------------------------------------------------------


class RandomSearch:
    """What random search finds with the budget of a search, from the scores of uniform random legal candidates.

    These are the results of a random search, or the first generation. `measured` has the expected best of n of them,
    for n from 1 to their number or the budget; `extrapolated` has (n, value, low, high) up to the budget, from a normal
    distribution with their mean and standard deviation, with its 95% bootstrap interval. Both are empty where the first
    generation is not uniform, and the latter where they are `skewed`, or where the normal distribution is `refuted`: at
    the number that was measured, the best is outside of its interval, or at the budget nothing could be as good.
    """

    def __init__(self, search, other=None):
        source = other or search
        self.other = other
        self.budget = len(search.succeeded)
        # Below this share of legal candidates, evolution repairs some draws instead of rejecting them; an own searcher
        # may begin in any way.
        self.uniform = search.share >= 0.02 and "strategy" not in source.settings
        chosen = [r for r in source.results if source.is_random() or r["generation"] == 1]
        sample = [search.score(r) for r in chosen if r["acc1"] is not None]
        self.size = len(sample)
        self.measured = [search.as_read(v) for v in expected_best(sample)[: self.budget]] if self.uniform else []
        self.extrapolated = []
        enough = self.uniform and FEWEST <= self.size < SAME * self.budget
        self.skewed = enough and is_skewed(sample)
        self.refuted = False
        if enough and not self.skewed:
            step = max(1, (self.budget - self.size) // 60)
            found = extrapolate(sample, [*range(self.size, self.budget, step), self.budget])
            _, _, low, high = found[0]
            perfect = 0 if search.by_loss else 100
            self.refuted = not low <= max(sample) <= high or found[-1][1] > perfect
            if not self.refuted:
                self.extrapolated = [
                    (n, *map(search.as_read, (value, low, min(high, perfect)))) for n, value, low, high in found
                ]

    @property
    def at_budget(self):
        """(n, expected best, low, high) at the budget; low and high are None where it was measured.

        None where it is unknown, or the sample is the search's own.
        """
        if self.extrapolated:
            return self.extrapolated[-1]
        n = len(self.measured)
        return (n, self.measured[-1], None, None) if self.other and n >= SAME * self.budget else None


def check_comparable(search, other):
    """Raises UserError if `other` is not a random search under the conditions of `search`."""
    if not other.is_random():
        raise UserError(f"--random {other.out}: no random search; make one with search.py --strategy random")
    ignored = (*EVOLUTION, "identities", "strategy", "strategy_code")
    if changes := settings_difference(search.settings, other.settings, ignored):
        names = ", ".join(changes)
        raise UserError(f"--random {other.out}: differs from {search.out} in {names}, so accuracies do not compare")


def expected_best(values):
    """Expected maximum of n of the values drawn without replacement, as a list for n from 1 to their number.

    P(maximum of n <= k-th smallest) = C(k, n) / C(N, n), that of n - 1 times (k - n + 1) / (N - n + 1).
    """
    values = np.sort(values)
    total = len(values)
    k = np.arange(1, total + 1)
    at_most = np.ones(total)
    expected = []
    for n in range(1, total + 1):
        at_most *= np.maximum(k - n + 1, 0) / (total - n + 1)
        expected.append(float(values @ np.diff(at_most, prepend=0)))
    return expected


def is_skewed(values):
    """Whether the values are too skewed to count as normal."""
    from scipy.stats import skew  # takes as long to import as the rest of a command

    return len(set(values)) > 1 and abs(skew(values)) > SKEWED


def extrapolate(values, numbers):
    """(n, expected maximum, low, high) of n normal draws with the values' mean and standard deviation, by bootstrap."""
    from scipy.stats import Normal, bootstrap, order_statistic

    highest = order_statistic(Normal(), r=np.array(numbers), n=np.array(numbers)).mean()

    def expected(sample, axis=-1):
        return sample.mean(axis) + np.multiply.outer(highest, sample.std(axis, ddof=1))

    values = np.array(values)
    interval = bootstrap([values], expected, n_resamples=1000, method="percentile", rng=0).confidence_interval
    return list(zip(numbers, expected(values).tolist(), interval.low.tolist(), interval.high.tolist()))

"""Made-up searches: their settings, their results, and folders that they fill without any evaluation."""

import itertools
import math

from engines.search_files import read_generations
from engines.search_record import SearchRecord, prepare_search
from space.search_space import SearchSpace

SPACE = SearchSpace.for_images(28, 10)
LIMIT = SPACE.cost_value("flops", "59%")


def settings(space=SPACE, population=4, **changes):
    """Settings of a small search; unless others are given, half of a population are parents, mutants, crossed ones."""
    kinds = dict.fromkeys(("select", "mutation", "crossover"), population // 2)
    limit = {} if "limits" in changes else {"flops_limit": space.cost_value("flops", "59%")}
    others = {"mutation_prob": 0.1, "generations": 3, "seed": 0, "space": space.to_dict()}
    return {"population": population, **kinds, **limit, **others, **changes}


def reward(candidate):
    return sum(c * (i + 1) for i, c in enumerate(candidate)) / 10


def result(candidate, **numbers):
    """What an evaluation says of a candidate."""
    named = {"acc1": reward(candidate), "acc5": 99.0, "n_images": 10, "seconds": 1.5}
    return {"architecture": list(candidate), **named, **numbers}


def read_results(out):
    """The results of all generations in one list."""
    return list(itertools.chain(*read_generations(out)))


def fill(out, own, evaluate=result, stop_after=math.inf, seen=lambda: None, **how):
    """Runs the search in `out`, started or resumed, to its end or for so many results; returns its SearchRecord.

    `evaluate(candidate)` is a result, or what failed, in words; `seen()` is called at the start and after each result.
    """
    prepare_search(out, own, resume=True, **how)
    record = SearchRecord(out)
    n = 0
    while waiting := record.pending():
        seen()
        for candidate in waiting:
            if n == stop_after:
                return record
            found = evaluate(candidate)
            record.fail(candidate, found, "t1") if isinstance(found, str) else record.add(found, "t1")
            n += 1
            seen()
    return record

"""What candidates cost together, and how they are split between trials."""

import itertools
import random

import pytest

from space.search_space import SearchSpace
from space.splitting import split, tree_flops

SPACE = SearchSpace()


def generation(n, seed=0):
    """Mutations of a few parents."""
    rng = random.Random(seed)
    parents = [SPACE.random_candidate(rng) for _ in range(3)]
    return [tuple(rng.randrange(4) if rng.random() < 0.1 else c for c in rng.choice(parents)) for _ in range(n)]


def test_one_candidate_costs_what_it_costs():
    (candidate,) = generation(1)
    assert tree_flops(SPACE, [candidate]) == tree_flops(SPACE, [candidate, candidate]) == SPACE.flops(candidate)
    assert tree_flops(SPACE, []) == 0


def test_every_prefix_is_counted_once():
    candidates = generation(20)
    prefixes = {c[:k] for c in candidates for k in range(1, 21)}
    leaves = len(set(candidates)) * (SPACE.fixed_flops - SPACE.costs.stem_flops)
    expected = SPACE.costs.stem_flops + leaves + sum(SPACE.choice_flops[len(p) - 1][p[-1]] for p in prefixes)
    assert tree_flops(SPACE, candidates) == expected < 0.9 * sum(map(SPACE.flops, set(candidates)))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_costliest_list_is_as_cheap_as_can_be(n):
    candidates = sorted(set(generation(9)))
    lists = split(SPACE, candidates[::-1], n)
    assert list(itertools.chain(*lists)) == candidates and len(lists) <= n
    cuts = itertools.combinations(range(1, len(candidates)), n - 1)
    best = min(
        max(tree_flops(SPACE, candidates[a:b]) for a, b in itertools.pairwise((0, *cut, len(candidates))))
        for cut in cuts
    )
    assert max(tree_flops(SPACE, part) for part in lists) == best


def test_more_lists_than_candidates():
    candidates = sorted(set(generation(3)))
    assert sorted(split(SPACE, candidates, 8)) == [[c] for c in candidates]
    assert split(SPACE, [], 4) == []

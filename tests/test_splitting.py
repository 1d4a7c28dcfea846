"""What candidates cost together, and how they are split between trials."""

import itertools
import random

import pytest
from conftest import load

from space.search_space import SearchSpace
from space.splitting import at_once, cut, split, tree_cost, tree_flops

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
        max(tree_cost(SPACE, candidates[a:b]) for a, b in itertools.pairwise((0, *cut, len(candidates))))
        for cut in cuts
    )
    assert max(tree_cost(SPACE, part) for part in lists) == best


def test_more_lists_than_candidates():
    candidates = sorted(set(generation(3)))
    assert sorted(split(SPACE, candidates, 8)) == [[c] for c in candidates]
    assert split(SPACE, [], 4) == []


def cost(lists):
    return sum(tree_cost(SPACE, part) for part in lists)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_cut_is_the_cheapest_of_lists_so_small(monkeypatch, size):
    monkeypatch.setattr("space.splitting.MORE", 10)
    candidates = sorted(set(generation(9)))
    lists = cut(SPACE, candidates[::-1], size)
    assert list(itertools.chain(*lists)) == candidates and max(map(len, lists)) <= size
    places = range(1, len(candidates))
    ways = ((0, *p, len(candidates)) for n in range(len(candidates)) for p in itertools.combinations(places, n))
    ways = ([candidates[a:b] for a, b in itertools.pairwise(way)] for way in ways)
    assert cost(lists) == min(cost(way) for way in ways if max(map(len, way)) <= size)


def test_lists_are_not_cut_so_small_that_the_search_gets_slower():
    candidates = sorted(set(generation(30)))
    assert cost([[c] for c in candidates]) > 1.1 * tree_cost(SPACE, candidates) >= cost(cut(SPACE, candidates, 1))
    assert cut(SPACE, [], 3) == [] and cut(SPACE, candidates[:1], 3) == [candidates[:1]]


@pytest.mark.parametrize("n", [1, 2])
def test_a_tenth_of_an_official_generation_is_in_work_at_most(n):
    """A generation as the search breeds them: of one worker, or of two that share it."""
    candidates = load("bench/search.py").generation(SPACE, 50)
    parts = [cut(SPACE, part, at_once(50, n, number)) for number, part in enumerate(split(SPACE, candidates, n))]
    assert sum(max(map(len, part)) for part in parts) <= {1: 5, 2: 8}[n]
    assert cost(itertools.chain(*parts)) <= 1.1 * cost(split(SPACE, candidates, n))


def test_what_is_in_work_is_shared_by_the_workers():
    assert [sum(at_once(50, n, number) for number in range(n)) for n in (1, 2, 3, 5)] == [5, 5, 5, 5]
    assert [at_once(50, 8, number) for number in range(9)] == [1] * 9 and at_once(4, 1, 0) == 1


def test_a_cost_counts_what_blocks_read_and_write():
    """Of one candidate: its FLOPs, and 60 for each element; a shared first block is counted once."""
    elements = sum(s.in_channels * s.in_size**2 + s.out_channels * s.out_size**2 for s in SPACE.blocks)
    a, b = (0,) * 20, (0,) + (1,) * 19
    assert tree_cost(SPACE, [a]) == SPACE.flops(a) + 60 * elements
    shared = SPACE.costs.stem_flops + SPACE.choice_flops[0][0] + 60 * (16 * 112**2 + 64 * 56**2)
    assert tree_cost(SPACE, [a, b]) == SPACE.flops(a) + SPACE.flops(b) + 2 * 60 * elements - shared

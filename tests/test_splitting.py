"""What candidates cost together, and how they are split between trials."""

import itertools
import random

import pytest

from bench.gpu import generation as bred
from space import splitting
from space.search_space import SearchSpace
from space.splitting import cut, split

SPACE = SearchSpace()


def generation(n, seed=0):
    """Mutations of a few parents."""
    rng = random.Random(seed)
    parents = [SPACE.random_candidate(rng) for _ in range(3)]
    return [tuple(rng.randrange(4) if rng.random() < 0.1 else c for c in rng.choice(parents)) for _ in range(n)]


def tree_cost(candidates):
    return sum(more for _, _, more in splitting._marginal_costs(SPACE, candidates))


def test_one_candidate_costs_what_it_costs(monkeypatch):
    monkeypatch.setattr(splitting, "ELEMENT", 0)
    (candidate,) = generation(1)
    assert tree_cost([candidate]) == tree_cost([candidate, candidate]) == SPACE.flops(candidate)
    assert tree_cost([]) == 0


def test_every_prefix_is_counted_once(monkeypatch):
    monkeypatch.setattr(splitting, "ELEMENT", 0)
    candidates = generation(20)
    prefixes = {c[:k] for c in candidates for k in range(1, 21)}
    leaves = len(set(candidates)) * SPACE.costs.tail_flops
    expected = SPACE.costs.stem_flops + leaves + sum(SPACE.costs.flops[len(p) - 1][p[-1]] for p in prefixes)
    assert tree_cost(candidates) == expected < 0.9 * sum(map(SPACE.flops, set(candidates)))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_costliest_list_is_as_cheap_as_can_be(n):
    candidates = sorted(set(generation(9)))
    lists = split(SPACE, candidates[::-1], n)
    assert list(itertools.chain(*lists)) == candidates and len(lists) <= n
    cuts = itertools.combinations(range(1, len(candidates)), n - 1)
    best = min(
        max(tree_cost(candidates[a:b]) for a, b in itertools.pairwise((0, *cut, len(candidates)))) for cut in cuts
    )
    assert max(tree_cost(part) for part in lists) == best


def test_more_lists_than_candidates():
    candidates = sorted(set(generation(3)))
    assert sorted(split(SPACE, candidates, 8)) == [[c] for c in candidates]
    assert split(SPACE, [], 4) == []


def cost(lists):
    return sum(tree_cost(part) for part in lists)


@pytest.mark.parametrize("size", [1, 4, 30, 50])
def test_a_cut_keeps_each_candidate_once_among_its_neighbours(size):
    candidates = sorted(set(generation(30)))
    lists = cut(SPACE, [*candidates[::-1], candidates[0]], size)
    assert list(itertools.chain(*lists)) == candidates
    assert all(len(part) == size for part in lists[:-1]) and 0 < len(lists[-1]) <= size
    assert cut(SPACE, [], size) == []


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_a_worker_has_five_candidates_in_work_at_little_cost(n):
    """Of an official generation as the search breeds them, split for `n` workers."""
    trees = split(SPACE, bred(SPACE, 50), n)
    lists = [few for tree in trees for few in cut(SPACE, tree)]
    assert sum(map(len, lists)) == 50 and max(map(len, lists)) == 5
    assert cost(trees) < cost(lists) < 1.08 * cost(trees)


def test_a_cost_counts_what_blocks_read_and_write():
    """Of one candidate: its FLOPs, and 60 for each element; a shared first block is counted once."""
    elements = sum(s.in_channels * s.in_size**2 + s.out_channels * s.out_size**2 for s in SPACE.blocks)
    a, b = (0,) * 20, (0,) + (1,) * 19
    assert tree_cost([a]) == SPACE.flops(a) + 60 * elements
    shared = SPACE.costs.stem_flops + SPACE.costs.flops[0][0] + 60 * (16 * 112**2 + 64 * 56**2)
    assert tree_cost([a, b]) == SPACE.flops(a) + SPACE.flops(b) + 2 * 60 * elements - shared

"""The path sampler: flat over the bins, uniform within each, a pure function of seed and step, finite."""

import collections
import dataclasses
import itertools
import random

import numpy as np
import pytest

import supernet
from settings.subjects import Sampling
from space import sampler
from space.sampler import PathSampler, default_flops_range
from space.search_space import SearchSpace
from utils import UserError

SPACE = SearchSpace()
RANGE = (290_000_000, 360_000_000)
TINY = SearchSpace(
    input_size=32, n_classes=10, stem_stride=1, stage_strides=(2, 2), stage_blocks=(2, 2), stage_channels=(24, 40)
)
ALL_TINY = list(itertools.product(range(4), repeat=4))


def bins_of(candidates, space, low, high, n_bins):
    """The share of the candidates in each bin, low <= cost < high but for the last bin; none may lie outside."""
    costs = [space.flops(c) for c in candidates]
    assert low <= min(costs) and max(costs) <= high
    counts = collections.Counter(min((c - low) * n_bins // (high - low), n_bins - 1) for c in costs)
    return [counts[b] / len(costs) for b in range(n_bins)]


def chi_square(counts, expected):
    """Chi-square statistic in standard deviations from its mean."""
    n = len(expected)
    statistic = sum((counts[c] - e) ** 2 / e for c, e in expected.items())
    return (statistic - (n - 1)) / (2 * (n - 1)) ** 0.5


def test_paths_are_flat_over_the_official_bins():
    paths = PathSampler(SPACE, seed=3, flops_range=RANGE)
    drawn = [paths.candidate(step) for step in range(7000)]
    assert all(SPACE.check(c) == c for c in drawn[:100])
    assert bins_of(drawn, SPACE, *RANGE, 7) == pytest.approx([1 / 7] * 7, abs=0.015)


@pytest.mark.parametrize("size", [28, 32, 64, 96])
def test_paths_are_flat_over_the_default_bins_of_other_sizes(size):
    space = SearchSpace.for_images(size, 10)
    low, high = default_flops_range(space)
    paths = PathSampler(space, flops_range=(low, high))
    assert bins_of([paths.candidate(step) for step in range(7000)], space, low, high, 7) == pytest.approx(
        [1 / 7] * 7, abs=0.015
    )


def test_the_default_range_is_the_official_one_and_elsewhere_its_quantiles():
    assert default_flops_range(SPACE) == RANGE
    for space in (SearchSpace.for_images(32, 10), SearchSpace(224, 10)):
        costs = sorted(space.flops(space.random_candidate(random.Random(i))) for i in range(10_000))
        low, high = default_flops_range(space)
        assert costs[0] < low < costs[60] and costs[-60] < high < costs[-1]


@pytest.mark.parametrize("n_bins", [1, 2, 3])
def test_paths_are_uniform_within_a_bin(n_bins):
    """Every candidate of a bin is equally likely: those on a lower edge, too, and on the upper edge of the last bin."""
    costs = sorted(TINY.flops(c) for c in ALL_TINY)
    low, high = costs[10], costs[-10]
    if n_bins == 2:
        high = 2 * costs[100] - low  # so that the edge between the bins is a candidate's cost
    edges = [low + (high - low) * b / n_bins for b in range(n_bins + 1)]
    members = [[c for c in ALL_TINY if a <= TINY.flops(c) < b] for a, b in itertools.pairwise(edges)]
    members[-1] += [c for c in ALL_TINY if TINY.flops(c) == high]
    expected = {c: 60_000 / n_bins / len(bin_members) for bin_members in members for c in bin_members}
    paths = PathSampler(TINY, seed=1, flops_range=(low, high), n_bins=n_bins)
    counts = collections.Counter(paths.candidate(step) for step in range(60_000))
    assert counts.keys() == expected.keys()
    assert abs(chi_square(counts, expected)) < 4


def test_without_a_range_paths_are_uniform():
    paths = PathSampler(TINY, seed=2)
    counts = collections.Counter(paths.candidate(step) for step in range(50_000))
    assert abs(chi_square(counts, dict.fromkeys(ALL_TINY, 50_000 / 256))) < 4
    big = PathSampler(SPACE)
    drawn = np.array([big.candidate(step) for step in range(8000)])
    assert all(abs(np.bincount(block, minlength=4) / 8000 - 0.25).max() < 0.025 for block in drawn.T)
    assert abs(np.corrcoef(drawn.T) - np.eye(20)).max() < 0.06


@pytest.mark.parametrize("flops_range", [None, RANGE])
def test_a_path_is_a_pure_function_of_seed_and_step(flops_range):
    steps = [0, 1, 5, 1023, 1024, 1025, 5000, *(1 + 2**n for n in (12, 14, 16, 17, 20)), 149_999]  # with no period
    expected = [PathSampler(SPACE, 7, flops_range).candidate(step) for step in steps]
    assert all(type(path) is tuple and all(type(choice) is int for choice in path) for path in expected)
    paths = PathSampler(SPACE, 7, flops_range)
    for step in random.Random(0).sample(steps, len(steps)) + steps[::-1]:
        assert paths.candidate(step) == expected[steps.index(step)]
    assert len(set(expected)) == len(steps)
    other = PathSampler(SPACE, 8, flops_range)
    assert all(other.candidate(step) != path for step, path in zip(steps, expected))


def test_numpy_and_python_generators_are_left_alone():
    np.random.seed(0)
    random.seed(0)
    expected = np.random.random(), random.random()
    np.random.seed(0)
    random.seed(0)
    PathSampler(SPACE, 0, RANGE).candidate(10)
    assert (np.random.random(), random.random()) == expected


@pytest.mark.parametrize("flops_range, bin_message", [
    ((100, 200), "bin 1 of 7, 100 to 114,"),
    ((290_000_000, 400_000_000), "bin 7 of 7, 384285714 to 400000000,"),
    ((260_000_000, 330_000_000), "bin 1 of 7, 260000000 to 270000000,"),
    ((300_000_000, 300_000_007), "bin 1 of 7, 300000000 to 300000001,"),
])  # fmt: skip
def test_a_bin_out_of_reach_is_an_error_at_the_start(flops_range, bin_message):
    with pytest.raises(UserError) as error:
        PathSampler(SPACE, 0, flops_range)
    message = str(error.value)
    none = f"--flops-range {flops_range[0]} {flops_range[1]}: 0 of 1015808 random candidates"
    assert message.startswith(none) and bin_message in message
    assert (
        "candidates cost 270359360 to 398609216, 99.7% of them 290000000 to 360000000" in message
        and "\n" not in message
    )


def test_a_bin_that_is_too_rare_is_an_error_at_the_start():
    with pytest.raises(UserError, match=r"--flops-range .*: [1-9]\d* of \d+ random candidates fall into bin 1 of 1"):
        PathSampler(SPACE, 0, (282_000_000, 284_500_000), n_bins=1)


@pytest.mark.parametrize("flops_range", [(360_000_000, 290_000_000), (300_000_000, 300_000_000)])
def test_an_empty_range_is_an_error(flops_range):
    with pytest.raises(
        UserError, match=f"--flops-range {flops_range[0]} {flops_range[1]}: the first must be the lower"
    ):
        PathSampler(SPACE, 0, flops_range)


def test_drawing_ends_even_where_it_finds_nothing(monkeypatch):
    paths = PathSampler(SPACE, 0, RANGE)
    monkeypatch.setattr(sampler, "MAX_BATCHES", 1)
    monkeypatch.setattr(paths, "edges", np.array([1, 2, 3]))
    with pytest.raises(RuntimeError, match="1024 steps got no path"):
        paths.candidate(0)


def test_the_paths_of_a_seed_are_those_of_every_version():
    """A run that an earlier version began resumes with the paths that it would have had there."""
    binned, free = PathSampler(SearchSpace(), 0, default_flops_range(SearchSpace())), PathSampler(SearchSpace(), 3)
    assert binned.candidate(1) == (0, 3, 2, 2, 0, 1, 0, 1, 2, 1, 1, 1, 0, 3, 2, 0, 3, 2, 3, 1)
    assert free.candidate(2000) == (3, 1, 3, 1, 1, 1, 1, 0, 1, 0, 2, 3, 3, 1, 1, 0, 2, 0, 2, 1)


def test_where_all_candidates_cost_the_same_the_other_sampler_is_named():
    space = dataclasses.replace(SPACE, operations=("shufflenet_3x3",))
    with pytest.raises(
        UserError, match=r"candidates all cost \d+ multiply-adds, so there are no bins: give --sampler uni"
    ):
        supernet.make_sampler(Sampling(), space, 0, 10)

"""Random search beside a search, in its report: the expected best of so many random candidates."""

import itertools
import json
import random
import shutil
import statistics

import pytest
from test_report import accuracy, make, on_disk

from reports.page import write_report
from reports.search_results import RandomSearch, SearchResults, expected_best, extrapolate, is_skewed
from utils import UserError

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished search."""
    return make(tmp_path_factory.mktemp("searched"))


def test_expected_best_is_the_mean_maximum_of_all_samples():
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    for n, expected in enumerate(expected_best(values), 1):
        assert expected == pytest.approx(statistics.fmean(map(max, itertools.combinations(values, n))))


def test_expected_maximum_of_normal_draws():
    """Tabulated values of order statistics (Harter 1961)."""
    sample = [1.0, 2.0, 3.0]  # mean 2, standard deviation 1
    found = [value - 2 for _, value, *_ in extrapolate(sample, [1, 2, 10, 100, 1000])]
    assert found == pytest.approx([0, 0.56419, 1.53875, 2.50759, 3.24144], abs=1e-5)


def test_a_value_far_from_the_others_makes_a_sample_skewed():
    assert is_skewed([1.0, 2.0, 3.0] * 5 + [20.0]) and not is_skewed([1.0, 2.0, 3.0] * 5) and not is_skewed([2.0] * 9)


def test_extrapolation_of_a_normal_sample():
    rng = random.Random(3)
    sample = [rng.gauss(50, 2) for _ in range(400)]
    (_, value, low, high), (_, more, *_) = extrapolate(sample, [1000, 100_000])
    assert low < 50 + 2 * 3.24144 < high and low < value < high < low + 2 and value < more
    assert extrapolate(sample, [1000]) == extrapolate(sample, [1000])


def test_random_search_is_measured_on_the_first_generation_and_marked_beyond(searched):
    found = SearchResults(searched)
    sample = [r["acc1"] for r in on_disk(searched).values() if r["generation"] == 1 and r["acc1"] is not None]
    comparison = RandomSearch(found)
    assert comparison.measured == expected_best(sample) and comparison.size == len(sample)
    assert comparison.extrapolated[0][0] == len(sample) and comparison.extrapolated[-1][0] == len(found.succeeded)
    assert comparison.at_budget == comparison.extrapolated[-1]
    assert "extrapolation" in write_report(searched).read_text()


def test_what_is_too_skewed_for_a_normal_distribution_is_not_extrapolated(searched, tmp_path):
    out = shutil.copytree(searched, tmp_path / "skewed")
    path = out / "acc" / "000.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1 if rows[-1]["acc1"] else 0]["acc1"] = 1e-3  # far below the others
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparison = RandomSearch(SearchResults(out))
    assert comparison.measured and comparison.skewed and not comparison.extrapolated and comparison.at_budget is None
    page = write_report(out).read_text()
    assert "too skewed" in page and "extrapolation by" not in page and "random candidates, extrapolated" not in page


@pytest.mark.parametrize(
    ("accuracies", "refuted"),
    [
        (itertools.cycle([40, 60, 60]), True),  # the best of 12 normal ones would be 69
        ((random.Random(i).gauss(96, 1.9) for i in itertools.count()), True),  # and of 48 above 100
        ((random.Random(i).gauss(60, 3) for i in itertools.count()), False),
    ],
)
def test_an_extrapolation_that_the_measured_best_or_reason_refutes_is_not_shown(tmp_path, accuracies, refuted):
    out = make(tmp_path, fails=lambda c: False, measured=lambda c: (min(100, next(accuracies)), 99.0))
    comparison = RandomSearch(SearchResults(out))
    assert comparison.refuted == refuted == (not comparison.extrapolated) and comparison.measured
    page = write_report(out).read_text()
    assert ("does not fit their best" in page) == refuted == ("candidates, extrapolated" not in page)
    assert all(high <= 100 for _, _, _, high in comparison.extrapolated)


def test_a_search_that_ranks_by_loss_is_compared_by_loss_everywhere(tmp_path):
    """Top-1 is the opposite of the order by loss: a comparison by top-1 would find the search worse than chance."""
    out = make(tmp_path, fails=lambda c: False, measured=lambda c: (90 - accuracy(c), 99.0, 9 - accuracy(c) / 10),
               rank_by="loss")  # fmt: skip
    run = SearchResults(out)
    comparison = RandomSearch(run)
    losses = [r["loss"] for r in run.results if r["generation"] == 1]
    assert comparison.measured == [-value for value in expected_best([-loss for loss in losses])]
    n, value, low, high = comparison.at_budget
    assert n == len(run.results) and high < value < low
    so_far = [loss for _, loss in run.best_so_far()]
    assert so_far == sorted(so_far, reverse=True) and so_far[-1] == run.legal[0]["loss"] == min(
        r["loss"] for r in run.results
    )
    page = write_report(out).read_text()
    best = run.legal[0]
    side = "below" if best["loss"] < value else "above"
    assert f"<b>{abs(best['loss'] - value):.3f}</b><small>in loss, {side} the expected best of {n} random" in page
    assert f"<b>{best['acc1']:.2f} %</b><small>top-1 of the best by loss, {best['loss']:.3f}, in the supernet" in page
    assert "(b) The best loss so far" in page and "<th>mean loss</th>" in page


def test_against_a_random_search(searched, tmp_path):
    other = make(tmp_path / "random", mutation=0, crossover=0, seed=8, population=20)
    comparison = RandomSearch(SearchResults(searched), SearchResults(other))
    sample = [r["acc1"] for r in on_disk(other).values() if r["acc1"] is not None]
    budget = len(SearchResults(searched).succeeded)
    assert (
        len(sample) > budget and comparison.measured == expected_best(sample)[:budget] and not comparison.extrapolated
    )
    assert comparison.at_budget == (budget, expected_best(sample)[budget - 1], None, None)
    path = write_report(shutil.copytree(searched, tmp_path / "searched"), other)
    assert "random candidates, measured" in path.read_text() and "extrapolat" not in path.read_text()


def test_a_search_that_is_no_fair_comparison_is_refused(searched, tmp_path):
    with pytest.raises(UserError, match="no random search"):
        write_report(searched, searched)
    other = make(tmp_path / "other", mutation=0, crossover=0, limit="40%")
    with pytest.raises(UserError, match=r"differs from .* in --limit,"):
        write_report(searched, other)


def test_no_random_curve_where_the_first_generation_is_not_uniform(tmp_path):
    out = make(tmp_path, limit="0.1%", generations=1)
    comparison = RandomSearch(SearchResults(out))
    assert not comparison.measured and not comparison.extrapolated and comparison.at_budget is None
    assert "not a uniform sample" in write_report(out).read_text()

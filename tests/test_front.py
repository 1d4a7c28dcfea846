"""Several objectives: fronts and crowding by their definitions, and a search that keeps a family."""

import itertools
import json
import random
import re

import numpy as np
import pytest
from conftest import run
from made_search import fill, read_results, result, settings
from test_evolution import AtMost, sizes
from test_latency import SPACE, clock, table, timed, world  # noqa: F401
from test_report import marks

import search
from engines.search_files import state_path
from engines.search_record import prepare_search
from evolution_tuner import EvolutionWithFlops
from reports.page import write_report
from reports.search_results import SearchResults
from space.evolution import Evolution, by_fronts, crowding, fronts
from utils import UserError, read_json, write_json


def beats(one, other):
    """Whether a point is as low as another one everywhere, and lower somewhere."""
    return all(a <= b for a, b in zip(one, other)) and one != other


@pytest.mark.parametrize("objectives", [2, 3])
def test_fronts_are_those_of_the_definition(objectives):
    """Points of few values, so that many are equal in one objective or in all."""
    for seed in range(20):
        rng = random.Random(seed)
        points = [tuple(rng.randrange(6) for _ in range(objectives)) for _ in range(rng.randint(0, 40))]
        left, found = set(range(len(points))), list(fronts(np.array(points).reshape(-1, objectives)))
        for front in found:
            assert front == sorted(i for i in left if not any(beats(points[j], points[i]) for j in left))
            left -= set(front)
        assert not left


def test_room_is_the_distance_between_neighbours():
    points = np.array([[0.0, 10], [1, 6], [4, 5], [10, 0]])
    assert crowding(points).tolist() == [np.inf, pytest.approx(0.4 + 0.5), pytest.approx(0.9 + 0.6), np.inf]
    assert crowding(np.array([[1.0, 1], [1, 1], [1, 1]])).tolist() == [np.inf, 0, np.inf]
    ranked = by_fronts(np.array([[1.0, 6], [0, 10], [4, 5], [10, 0], [11, 11]]), 4)
    assert ranked == [1, 3, 2, 0] and by_fronts(np.array([[1.0, 1], [0, 0]]), 2) == [1, 0]


def two(objectives=(sum,)):
    """An evolution whose reward grows with the cost, so that no candidate wins; few of the best would be cheap."""
    return Evolution((4,) * 8, AtMost(sum, 99), sizes(20, 4, 10, 10, generations=6), 1, objectives)


def value(candidate):
    return sum(c * (1 + i % 3) for i, c in enumerate(candidate)), 0.0


def test_parents_are_of_the_first_front_with_most_room_and_the_rest_is_as_without_objectives(monkeypatch):
    evolution, plain = two(), two(objectives=())
    assert evolution.ask() == plain.ask()
    evolution.tell({c: value(c) for c in evolution.ask()})
    points = {c: (sum(c), -value(c)[0]) for c in evolution.history[0]}
    front = [c for c, point in points.items() if not any(beats(other, point) for other in points.values())]
    parents = evolution.parents()
    assert len(parents) == 4 and set(parents) <= set(front) and len(front) > 4
    ends = {min(front, key=sum), max(front, key=lambda c: value(c)[0])}
    assert {points[c] for c in ends} <= {points[c] for c in parents}
    drawn = set()
    monkeypatch.setattr(evolution, "mutate", lambda parent: drawn.add(parent) or Evolution.mutate(evolution, parent))
    assert len(evolution.ask()) == 20 and drawn <= set(parents)


def test_the_best_is_the_most_accurate_of_the_front_where_accuracies_are_equal():
    evolution = Evolution((2, 2), AtMost(sum, 9), sizes(4, 1, 0, 0, generations=1), objectives=[sum])
    evolution.tell({c: (50.0, 90.0 + sum(c)) for c in evolution.ask()})
    assert evolution.best == ((0, 0), (50.0, 90.0))


# --- in the record -------------------------------------------------------------------------------------------


def accuracy(candidate):
    return 30 + sum(candidate) * 2 + random.Random(str(candidate)).random()


def own_settings(*objectives):
    limit = SPACE.cost_range("flops")[1]
    return settings(SPACE, 8, select=3, generations=4, seed=2, flops_limit=limit, objectives=["acc1", *objectives])


def evaluate(candidate):
    return result(candidate, acc1=accuracy(candidate))


def members(out):
    return {p.name: json.loads(p.read_text()) for p in (out / "checkpoints" / "front").glob("*")}


def test_the_family_is_on_disk_and_resumes_to_the_same_one(tmp_path):
    own = own_settings("flops", "params")
    fill(tmp_path / "whole", own, evaluate)
    results = read_results(tmp_path / "whole")
    points = {tuple(r["architecture"]): (-r["acc1"], r["flops"], r["params"]) for r in results}
    front = {c for c, p in points.items() if not any(beats(q, p) for q in points.values())}
    paths = sorted((tmp_path / "whole" / "checkpoints" / "front").iterdir())
    found = [SPACE.load_architecture(path) for path in paths]
    assert set(found) == front and [points[c] for c in found] == sorted(points[c] for c in found)
    assert SPACE.load_architecture(tmp_path / "whole" / "checkpoints" / "best.json") == found[0]
    for n in (9, 21):
        fill(tmp_path / str(n), own, evaluate, stop_after=n)
        (tmp_path / str(n) / "checkpoints" / "front" / "777.json").write_text("{}")  # left by a larger front
        fill(tmp_path / str(n), own, evaluate)
        assert members(tmp_path / str(n)) == members(tmp_path / "whole")


def test_nnis_tuner_keeps_the_same_family(tmp_path):
    own = own_settings("params")
    fill(tmp_path / "a", own, evaluate)
    prepare_search(tmp_path / "b", own, resume=False)
    tuner = EvolutionWithFlops(str(tmp_path / "b"))
    while population := tuner.record.evolution.ask():
        tuner.keep("t", list(map(evaluate, population)))
    assert members(tmp_path / "b") == members(tmp_path / "a") and len(members(tmp_path / "a")) > 1


def test_search_for_a_front_as_a_user_types_it(world, tmp_path):  # noqa: F811
    stdout, stderr = run("search.py", *world, "--objectives", "acc1,flops,latency", "--limit", "flops=100%")
    assert ": 100.0% of all candidates; 0 candidates evaluated already" in stderr
    files = sorted((tmp_path / "checkpoints" / "front").glob("*.json"))
    assert f"the front: {len(files)} candidates, " in stdout and len(files) > 1
    state = read_json(state_path(tmp_path))
    assert state["settings"]["objectives"] == ["acc1", "flops", "latency"] and not state["confirmations"]
    family = SearchResults(tmp_path).family()
    assert [path for path, _ in family] == [f"checkpoints/front/{i:03}.json" for i in range(len(files))]
    for (_, one), (_, other) in itertools.permutations(family, 2):
        assert not beats((-one["acc1"], one["flops"], one["latency_ms"]),
                         (-other["acc1"], other["flops"], other["latency_ms"]))  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'<a href="([^"]+)">', page) == [path for path, _ in family]
    for cost in ("flops", "latency"):
        assert len(marks(tmp_path, f"front-{cost}")["members"]) == len(files)
    assert not (tmp_path / "figures" / "front-params.svg").exists()


def test_a_report_of_a_front_needs_no_latency(tmp_path):
    fill(tmp_path, own_settings() | {"objectives": ["flops", "acc1", "params"]}, evaluate)  # in any order
    page = write_report(tmp_path).read_text()
    assert "predicted" not in page and page.count('<a href="checkpoints/front/') == len(members(tmp_path)) > 1
    for cost in ("flops", "params"):
        assert len(marks(tmp_path, f"front-{cost}")["members"]) == len(members(tmp_path))


def test_of_equals_in_top1_the_winner_is_the_cheapest_as_in_best_json(tmp_path, capsys):
    """Top-5 ranks it behind others, which the front does not have."""
    own = own_settings("flops")
    fill(tmp_path, own, lambda c: result(c, acc1=50.0, acc5=60 + SPACE.flops(c) / SPACE.cost_range("flops")[1]))
    found = SearchResults(tmp_path)
    best = list(SPACE.load_architecture(tmp_path / "checkpoints" / "best.json"))
    assert found.winner["architecture"] == best == found.succeeded[-1]["architecture"]
    search.print_best(found)
    rank = len(found.succeeded)
    assert f"\nthe first of the front: rank {rank}\n" in capsys.readouterr().out and rank > 10
    state = read_json(state_path(tmp_path))
    write_json(state_path(tmp_path), state | {"best": None})  # where none that was measured holds
    assert SearchResults(tmp_path).winner == found.legal[0]


@pytest.mark.parametrize("text", ["acc1", "flops,params", "acc1,", "acc1,flops,flops", "acc1,flops,params,latency"])
def test_wrong_objectives_are_one_line(text):
    with pytest.raises(UserError, match="is not acc1 and one or two of flops, params, latency and those of --own, "):
        search.parse_args(["--objectives", text])


def test_objectives_and_another_ranking_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="--rank-by has no effect with --objectives"):
        search.parse_args(["--objectives", "acc1,flops", "--rank-by", "loss"])
    assert search.parse_args(["--rank-by", "loss"]).rank_by == "loss"
    path = tmp_path / "own.yml"
    path.write_text("search: {rank-by: loss}")  # for the file's other searches
    assert search.parse_args(["--config", str(path)]).rank_by == "loss"
    assert search.parse_args(["--config", str(path), "--objectives", "acc1,flops"]).rank_by == "acc1"

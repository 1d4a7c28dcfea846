"""Costs and searchers of one's own: limits on them, what is refused, the record, the commands."""

import dataclasses
import itertools
import json
import math
import re
import types

import pytest
from conftest import ROOT, forget, run
from made_search import fill, read_results, result, reward, settings
from test_front import members
from test_latency import clock, table, timed, world  # noqa: F401
from test_report import marks
from test_search_record import artefacts

import search
import training.evaluation
from engines.search_files import as_own_costs, state_path
from engines.search_record import prepare_search
from evolution_tuner import EvolutionWithFlops
from reports.search_results import RandomSearch, SearchResults
from space import own
from space.costs import OwnCost
from space.evolution import Evolution
from space.limits import (
    Limits,
    as_before,
    as_settings,
    describe,
    idle_limits,
    known_costs,
    make_bounds,
    offer,
    read_limits,
)
from space.search_space import SearchSpace
from utils import UserError, read_json, read_yaml

EXAMPLE = ROOT / "examples" / "searching.py"
SPACE = SearchSpace(28, 10, stage_blocks=(2, 2), stage_channels=(32, 64), stage_strides=(2, 2))  # 256 candidates


@pytest.fixture(autouse=True)
def forgotten_after_each():
    yield
    forget()


def with_costs(*names, path=EXAMPLE):
    own.load(path)
    return own.with_costs(SPACE, names)


def everything():
    return list(itertools.product(range(4), repeat=4))


# --- costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [7, 20])
def test_a_share_of_a_cost_with_few_values_is_one_of_them(tmp_path, n):
    (tmp_path / "own.py").write_text("""from space.own import register_cost
@register_cost("depth")
def depth(space):
    return [[0 if name == "xception_3x3" else 1 for name in names] for names in space.block_operations]""")
    space = dataclasses.replace(SPACE, stage_blocks=(n - 2, 2))
    own.load(tmp_path / "own.py")
    space = own.with_costs(space, ["depth"])
    scale = space.costs.own["depth"].scale
    for percent in range(1, 100):
        depth = space.cost_value("depth", f"{percent}%") / scale
        below = [sum(math.comb(n, k) * 3**k for k in range(int(depth) + 1 - i)) / 4**n for i in (0, 1)]
        assert depth == int(depth) and below[0] >= percent / 100 - 1e-3 and below[1] < percent / 100 + 1e-3
    before = space.grid_quantile("depth", 0.59)
    bounds = make_bounds(space, ["depth=59%"])
    assert (
        bounds != (kept := as_before(space, bounds, {"limits": {"depth": [None, before]}})) == {"depth": (None, before)}
    )
    assert as_before(space, bounds, {"limits": {"depth": [None, before - scale]}}) == bounds != kept


def test_a_table_is_a_cost_as_flops_are():
    space = with_costs("energy")
    assert hash(space) == hash(SPACE)
    energy = {c: sum(4.6e-9 * f[i] + 640e-9 * p[i] for f, p, i in zip(space.costs.flops, space.costs.params, c))
              for c in everything()}  # fmt: skip
    scale = space.costs.own["energy"].scale
    for candidate, mj in energy.items():
        assert space.cost("energy", candidate) / scale == pytest.approx(mj, rel=1e-8)
    ranked = sorted(energy.values())
    bounds = make_bounds(space, [f"energy={ranked[100] * 1.0000001:.9f}mJ"])
    limits = Limits(space, bounds)
    legal = {c for c in everything() if not limits.excess(c)}
    assert legal == {c for c, mj in energy.items() if mj <= ranked[100]}
    assert min(energy, key=energy.get) == limits.optimum("energy") and limits.optimum("energy", -1) in legal
    (_, high), *_ = make_bounds(space, ["energy=59%"]).values()
    assert sum(mj <= high / scale for mj in energy.values()) / 256 == pytest.approx(0.59, abs=0.01)
    evolution = Evolution.from_settings(space, {**as_settings(bounds), "population": 200})
    assert set(evolution.ask()) == legal
    assert f"energy {ranked[0]:.4g} mJ to {ranked[-1]:.4g} mJ" in offer(space)
    assert describe(bounds, space.costs.own) == f"energy up to {ranked[100]:.4g} mJ"
    assert len(idle_limits(space, ["energy=9mJ"])) == 1 and not idle_limits(space, ["energy=50%"])
    with pytest.raises(UserError, match=rf"limit 1e-05 mJ is below the lowest .*, {ranked[0]:.4g} mJ; raise --limit"):
        Limits(space, make_bounds(space, ["energy=1e-05mJ"])).check()  # as costs are shown


def test_a_function_of_a_candidate_is_a_limit_beside_others():
    space = with_costs("energy", "kinds")
    bounds = make_bounds(space, ["kinds=2", "energy=30%"])
    limits, few = Limits(space, bounds), Limits(space, make_bounds(space, ["energy=30%"]))
    legal = {c for c in everything() if not few.excess(c) and len(set(c)) <= 2}
    assert {c for c in everything() if not limits.excess(c)} == legal
    evolution = Evolution.from_settings(space, {**as_settings(bounds), "population": 20, "objectives": ["kinds"]})
    while population := evolution.ask():
        assert set(population) <= legal
        evolution.tell({c: 50.0 + sum(c) for c in population})
    assert set(evolution.rewards) == legal and {len(set(c)) for c in evolution.front()} <= {1, 2}
    assert limits.share(256) == pytest.approx(len(legal) / 256, abs=0.08)
    largest = max(legal, key=space.flops)  # is known where that of the tables alone is legal, too
    assert (
        limits.largest() in (None, largest)
        and Limits(space, make_bounds(space, ["kinds=4"])).largest() == space.largest()
    )
    with pytest.raises(UserError, match=r"--limit kinds 59%: kinds is any function of a candidate, .* give a number"):
        make_bounds(space, ["kinds=59%"])
    with pytest.raises(UserError, match="--limit kinds: is any function of a candidate, which nothing solves for"):
        space.largest("kinds=2")


def test_where_few_candidates_have_so_few_kinds_those_of_one_kind_are_tried():
    """In the paper's 20 blocks, where no repair of a random candidate arrives at one kind, and few at two."""
    own.load(EXAMPLE)
    space = own.with_costs(SearchSpace(), ["kinds"])
    for n in (1, 2):
        bounds = make_bounds(space, [f"kinds={n}"])
        Limits(space, bounds).check()
        population = Evolution.from_settings(space, {**as_settings(bounds), "population": 8}).ask()
        assert len(population) == (4 if n == 1 else 8) and {len(set(c)) for c in population} <= {1, n}


class Never:
    """Limits that no candidate meets."""

    def excess(self, candidate):
        return 1 + sum(candidate)

    def repair(self, candidate, rng):
        return candidate

    def neighbours(self, candidate, rng):
        return ()


def test_where_nothing_is_legal_the_nearest_is_named():
    space = with_costs("kinds")
    text = r"no candidate was found with kinds up to 0.5, flops from .*; the nearest one has kinds 1, flops .*: \[\d, "
    with pytest.raises(UserError, match=text + r".*; change --limit kinds"):
        Limits(space, make_bounds(space, ["kinds=0.5"]) | {"flops": (1, None)}).check()
    with pytest.raises(UserError, match="limit 7 is below the lowest"):  # costs are tables: with a proof
        Limits(space, make_bounds(space, ["kinds=2"]) | {"flops": (None, 7)}).check()

    with pytest.raises(UserError, match=r"within the limits; the nearest of 100 is \[0, 0\], beyond them by 1"):
        Evolution((3, 3), Never()).ask()


HEAD = "from space.own import register_cost, register_searcher\n"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("@register_cost('e')\ndef e(space):\n    return [[1, 2]]", "cost 'e' returns no table with rows of"),
        ("@register_cost('e')\ndef e(space):\n    return [[-1] * 4] * 4", "cost 'e' returns no table with rows of"),
        ("@register_cost('e')\ndef e(space):\n    return 7", "cost 'e': TypeError: 'int' object is not iterable"),
        ("@register_cost('e')\ndef e():\n    return 7", "cost 'e': is a function of 0 arguments, not of space"),
        ("@register_cost('e')\ndef e(space, c):\n    return c[9]", r"cost 'e' of \[.*\]: IndexError: tuple index out"),
        ("@register_cost('e')\ndef e(space, c):\n    return 0 * 1e999", r"cost 'e' of \[.*\]: is nan"),
        ("@register_cost('acc1')\ndef e(space):\n    return 7", "'acc1' is the name of an official cost"),
        ("@register_cost('a,b')\ndef e(space):\n    return 7", "register_cost: 'a,b' is not a name such as"),
        ("@register_cost('e', unit='%')\ndef e(space):\n    return 7", "unit '%' of e would be read as a number, or a"),
        ("@register_cost('of_all')\ndef e(space):\n    return 7", "'of_all' is the name of an official cost"),
        ("@register_searcher('random')\ndef e(*_):\n    pass", "'random' is the name of an official searcher"),
    ],
)
def test_what_a_file_does_wrong_is_one_line(tmp_path, code, text):
    path = tmp_path / "own.py"
    path.write_text(HEAD + code)
    with pytest.raises(UserError, match=f"--own.*{text}") as refused:
        space = with_costs("e", path=path)
        Limits(space, make_bounds(space, ["e=1"])).check()
    assert "\n" not in str(refused.value) and not set(own.OFFICIAL["cost"]) & own.REGISTRIES["cost"].keys()


# --- searchers -----------------------------------------------------------------------------------------------


def searching(**changes):
    """Settings of a search by regularised evolution under limits on both costs of the example."""
    space = with_costs("energy", "kinds")
    bounds = make_bounds(space, ["energy=70%", "kinds=3"])
    costs = json.loads(json.dumps(as_own_costs(space.costs.own)))
    own_settings = settings(SPACE, 8, select=3, generations=3, seed=2, **as_settings(bounds), **costs)
    return own_settings | {"objectives": ["acc1", "energy"], "strategy": "regularised"} | changes


START = {"own": str(EXAMPLE), "share": 0.4}


def test_regularised_evolution_lets_the_oldest_die_and_is_told_what_it_may_not_have():
    space = with_costs()
    evolution = Evolution.from_settings(space, searching(limits={"flops": [None, 10**9]}, generations=4))
    searcher, asked = evolution.searcher.searcher, []
    told = []
    tell = searcher.tell
    searcher.tell = lambda candidate, value: told.append((candidate, value)) or tell(candidate, value)
    while population := evolution.ask():
        asked += population
        evolution.tell({c: (reward(c), 99.0) for c in reversed(population)})
        assert [c for _, c in searcher.alive][-8:] == population and len(searcher.alive) == 8
    assert len(set(asked)) == 32 and set(asked) == {c for c, _ in told}
    assert all(value == reward(c) for c, value in told) and len(told) > 32  # known ones are told again
    assert max(map(reward, asked[24:])) > max(map(reward, asked[:8]))
    evolution.limits = Never()
    evolution.generations, evolution.finished = 5, False
    assert evolution.ask() == [] and told[-1][1] is None  # the limits of now


def test_a_search_by_ones_own_resumes_also_in_nnis_process(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.os.fsync", lambda descriptor: None)
    given = searching()
    fill(tmp_path / "whole", given, start=START)
    costs = {tuple(r["architecture"]): (r["energy"], r["kinds"]) for r in read_results(tmp_path / "whole")}
    space = with_costs("energy", "kinds")
    scale = space.costs.own["energy"].scale
    assert costs == {c: (space.cost("energy", c) / scale, len(set(c))) for c in costs} and len(costs) == 24
    fill(tmp_path / "parts", given, stop_after=11, start=START)
    forget()  # as in another process
    fill(tmp_path / "parts", given, start=START)
    assert artefacts(tmp_path / "parts") == artefacts(tmp_path / "whole")
    forget()
    prepare_search(tmp_path / "nni", given, resume=False, start=START)
    tuner = EvolutionWithFlops(str(tmp_path / "nni"))
    while population := tuner.record.evolution.ask():
        tuner.keep("t1", list(map(result, population)))
    assert artefacts(tmp_path / "nni") == artefacts(tmp_path / "whole") and len(members(tmp_path / "nni")) > 1
    forget()  # the report knows what is recorded
    found = SearchResults(tmp_path / "nni")
    assert found.main_cost == "energy" and not found.is_random() and not RandomSearch(found).uniform


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        ("DRAWS.random_candidate(OTHER)", "--strategy mine asks for other candidates in generation 1 than before"),
        ("next(iter(()))", "--strategy mine: ask: StopIteration"),
        ("(1, 2)", "--strategy mine: ask: architecture has 2 blocks, this search space has 4"),
        ("self", "--strategy mine: ask: TypeError: 'Mine' object is not iterable"),
    ],
)
def test_what_a_searcher_does_wrong_ends_the_search_with_one_line(tmp_path, ask, text):
    path = tmp_path / "own.py"
    path.write_text(f"""{HEAD}
import random
OTHER = random.Random()

@register_searcher("mine")
class Mine:
    def __init__(self, space, limits, rng, search):
        self.space, self.parents = space, 1 * search.select
    def ask(self):
        return {ask.replace("DRAWS", "self.space")}
    def tell(self, candidate, reward):
        pass
""")
    given = settings(SPACE, 8, strategy="mine", select=None)
    with pytest.raises(UserError, match=text) as refused:
        for n in (3, 9):
            record = fill(tmp_path / "out", given, stop_after=n, start={"own": str(path)})
            record.lock.close()
    assert "\n" not in str(refused.value)


def test_the_programs_of_the_page_run(monkeypatch):
    """The second one where Optuna and pymoo are installed, with evaluations that are made up."""
    text = (ROOT / "docs" / "search.md").read_text().split("## Costs and searchers of your own")[1].split("\n## ")[0]
    costs, program = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert len(text.split()) <= 300
    (last,) = re.findall(r'"demo/checkpoints/supernet/checkpoint-(\d+)\.pth"', program)
    assert int(last) == read_yaml(ROOT / "demo.yml")["supernet"]["iterations"]
    exec(costs, {})
    space = own.with_costs(SPACE, ["energy", "kinds"])
    assert known_costs(space).keys() == {"flops", "params", "energy"}
    optuna = pytest.importorskip("optuna")
    pytest.importorskip("pymoo")
    optuna.logging.disable_default_handler()
    supernet = types.SimpleNamespace(space=SPACE)
    monkeypatch.setattr(training.evaluation, "load_supernet", lambda *_, **__: (supernet, [], []))
    monkeypatch.setattr(
        training.evaluation, "evaluate", lambda supernet, candidates, *_: [result(SPACE.check(c)) for c in candidates]
    )
    exec(program, found := {})
    assert reward(found["study"].best_params.values()) > reward((1, 1, 1, 1))
    assert all(not found["limits"].excess(SPACE.check(c)) for c in found["front"])


def test_a_unit_may_have_digits():
    space = SPACE.with_costs(own={"emissions": OwnCost("gCO2", function=lambda candidate: 1.0)})
    assert read_limits(space, ["emissions=1.5gCO2:2e3gCO2"]) == {"emissions": (1.5, 2000)}


# --- as a user types it --------------------------------------------------------------------------------------


def test_the_command_searches_by_ones_own_and_an_edit_ends_that(world, tmp_path, monkeypatch):  # noqa: F811
    path = tmp_path / "own.py"
    path.write_text(EXAMPLE.read_text())
    words = (*world, "--own", path, "--strategy", "regularised", "--limit", "energy=90%", "--limit", "kinds=3")
    words += ("--objectives", "acc1,energy")
    stdout, stderr = run("search.py", *words)
    assert (
        "energy 0." in stderr
        and "limits: energy up to 0." in stderr
        and re.search(r"; version \d+\.\d+\.\d+, commit \w+; commit of own.py's folder unknown; device", stderr)
    )
    assert re.search(r"best \d.* at 0\.\d+ mJ energy, \d kinds", stderr)
    assert "energy mJ" in stdout.splitlines()[1] and "the front: " in stdout
    state = read_json(state_path(tmp_path))
    assert state["evaluated"] == 18 and state["settings"]["strategy"] == "regularised"
    page = (tmp_path / "report.html").read_text()
    assert "<th>energy mJ</th>" in page and "the first generation is not a uniform sample." in page
    assert len(marks(tmp_path, "front-energy")["members"]) == len(members(tmp_path)) > 1
    monkeypatch.setattr(search, "write_report", lambda out: out)
    run("search.py", *world, "--resume", "--generations", 4)
    assert read_json(state_path(tmp_path))["evaluated"] > 18
    text = path.read_text()
    for old, new, what in (
        ("640e-9", "641e-9", "costs of --own others than then"),
        ("len(self.alive) <", "len(self.alive) + 0 <", "the searcher of --own another one than then"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        forget()
        _, stderr = run("search.py", *world, "--resume", "--generations", 4, code=2)
        assert "has other settings: " in stderr and what in stderr
    stdout, _ = run("tester.py", "--mode", "gen", "--own", path, "--checkpoint", tmp_path / "s.pth", "--out", tmp_path)
    assert "energy 0." in stdout  # the weights are still read
    for flags, text in (("--strategy other", "--strategy other: is none of evolution, random, regularised; name"),
                        ("--objectives acc1,speed", "acc1,speed: 'speed' is none of acc1, flops")):  # fmt: skip
        _, stderr = run("search.py", *world, "--own", path, "--out", tmp_path / "other", flags, code=2)
        assert text in stderr and stderr.count("\n") == 1

"""Limits on several costs: their forms, first populations under random sets of them, refusals that are right."""

import collections
import itertools
import random

import numpy as np
import pytest

import search
from settings.subjects import COSTS
from space.costs import Costs
from space.custom import PRESETS
from space.evolution import Evolution
from space.limits import (
    Limits,
    _largest,
    as_settings,
    bounds_of,
    describe,
    idle_limits,
    known_costs,
    make_bounds,
    offer,
    read_limits,
    shown,
)
from space.search_space import SearchSpace
from utils import UserError

POPULATION = 50
MOST_STEPS = 300_000  # ten times as many as the costliest of the thousand sets below takes


def with_latency(space, seed=0):
    """The space with latencies that follow the FLOPs loosely."""
    rng = random.Random(seed)
    rows = tuple(tuple(int(c * 0.02 * rng.uniform(0.7, 1.3)) + 20_000 for c in row) for row in space.costs.flops)
    return space.with_costs(latency=rows, fixed_latency=400_000)


SPACES = {
    "small": with_latency(SearchSpace(28, 10, stem_stride=1, **PRESETS["small"])),
    "blocks": with_latency(SearchSpace()),
    "joint": with_latency(SearchSpace(**PRESETS["joint"])),
}


@pytest.fixture(scope="module")
def everything():
    """All candidates of `small`, and what each costs: {cost: (4096,)}, summed here."""
    space = SPACES["small"]
    candidates = list(itertools.product(range(4), repeat=6))
    costs = {name: np.array([_cost(space, name, c) for c in candidates]) for name in COSTS}
    return candidates, costs


def _cost(space, name, candidate):
    rows, fixed = space.cost_rows(name)
    return fixed + sum(rows[block][choice] for block, choice in enumerate(candidate))


@pytest.mark.parametrize("limits", [("flops=59%",), ("params=30%", "flops=20%:80%"), ("latency=40%", "params=50%")])
def test_the_largest_and_the_smallest_within_limits(everything, limits):
    space = SPACES["small"]
    _, costs = everything
    flops = costs["flops"][meets(costs, read_limits(space, limits))]
    for found, expected in ((space.largest(*limits), flops.max()), (space.smallest(*limits), flops.min())):
        assert space.flops(found) == expected and not Limits(space, read_limits(space, limits)).excess(found)


def test_the_largest_and_the_smallest_without_limits_and_where_none_is(everything):
    space = SPACES["small"]
    candidates, costs = everything
    assert space.largest() == candidates[costs["flops"].argmax()]  # the first of equals
    assert space.smallest() == candidates[costs["flops"].argmin()]
    with pytest.raises(UserError, match=r"limit 1 is below the lowest cost of any candidate, \d+; raise"):
        space.largest("params=1")
    with pytest.raises(UserError, match="--limit 'params': not of a form such as"):
        space.smallest("params")


def test_candidates_are_repaired_where_stages_offer_other_operations():
    names = ("shufflenet_3x3", "xception_3x3", "shufflenet_7x7")
    space = SearchSpace(28, 10, stem_stride=1, **PRESETS["small"], operations=names,
                        stage_operations=(names[:1], names, names[1:]))  # fmt: skip
    everything = [*itertools.product(*map(range, space.choices))]
    assert space.choices == (1, 1, 3, 3, 2, 2)
    legal = sorted(everything, key=space.flops)[:3]
    limits, rng = Limits(space, {"flops": (None, space.flops(legal[-1]))}), random.Random(0)
    found = {limits.repair(space.random_candidate(rng), rng) for _ in range(30)}
    assert found == {c for c in everything if space.flops(c) <= space.flops(legal[-1])}
    assert {*limits.neighbours(legal[0], rng)} <= found


def meets(costs, bounds):
    """Which of many candidates meet the bounds."""
    ok = np.ones(len(costs["flops"]), bool)
    for name, (low, high) in bounds.items():
        ok &= (costs[name] >= (low if low is not None else 0)) & (costs[name] <= (high if high is not None else 1e18))
    return ok


def drawn(name, number):
    """A random set of one to three limits of any form, some impossible alone, some only together."""
    space, rng, bounds = SPACES[name], random.Random(f"{name} {number}"), {}
    for cost in rng.sample(COSTS, rng.randint(1, 3)):
        rows, fixed = space.cost_rows(cost)
        low, high = (fixed + sum(map(pick, rows)) for pick in (min, max))
        mean, sd = fixed + sum(map(np.mean, rows)), sum(map(np.var, rows)) ** 0.5

        def end(low=low, high=high, mean=mean, sd=sd):
            beyond = 0.05 * (high - low)
            return int(rng.uniform(low - beyond, high + beyond) if rng.random() < 0.3 else rng.gauss(mean, 2 * sd))

        one, other = sorted((end(), end()))
        near = int(one + abs(rng.gauss(0, 0.2 * sd)))
        bounds[cost] = rng.choice([(one, None), (None, one), (one, other), (one, near)])
    return bounds


def fill(name, number):
    """(bounds, first population, None where the bounds are refused) of a random set of limits.

    No set may take minutes: repairs look at their candidates' neighbours at most MOST_STEPS times.
    """
    bounds, population, steps, moves = drawn(name, number), None, itertools.count(1), Limits._moves

    def counted(limits, candidate):
        assert next(steps) <= MOST_STEPS, bounds
        return moves(limits, candidate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Limits, "_moves", counted)
        try:
            settings = {**as_settings(bounds), "population": POPULATION, "seed": number}
            population = Evolution.from_settings(SPACES[name], settings).ask()
        except UserError as error:
            assert "\n" not in str(error) and 20 < len(str(error)) < 250
    return bounds, population


def check_enumerated(number, candidates, costs):
    bounds, population = fill("small", number)
    legal = {c for c, ok in zip(candidates, meets(costs, bounds)) if ok}
    assert (population is None) == (not legal), bounds
    assert population is None or (set(population) <= legal and len(set(population)) == min(POPULATION, len(legal)))
    return bounds, population


def check_large(name, number):
    bounds, population = fill(name, number)
    if population is not None:
        space = SPACES[name]
        costs = {cost: np.array([space.cost(cost, c) for c in population]) for cost in COSTS}
        assert meets(costs, bounds).all() and len(set(population)) == len(population), bounds
        if len(population) < POPULATION:
            assert count_legal(space, bounds) == len(population), bounds
    return bounds, population


def count_legal(space, bounds, most=400_000):
    """How many candidates meet the bounds, block by block over the costs that occur; None beyond `most` of them.

    What can't meet a bound any more is left out, and what can't meet a weighted sum of them, with weights for which the
    cheapest candidate comes nearest to the sum of the bounds, or above it: then nothing is left.
    """
    signed = [(name, 1, end[1]) for name, end in bounds.items() if end[1] is not None]
    signed += [(name, -1, -end[0]) for name, end in bounds.items() if end[0] is not None]
    rows = [np.array(space.cost_rows(name)[0], float) * sign for name, sign, _ in signed]
    ends = np.array([end - sign * space.cost_rows(name)[1] for name, sign, end in signed], float)
    scale = np.array([max(row.var(axis=1).sum() ** 0.5, 1) for row in rows])
    table, ends = np.stack([row / s for row, s in zip(rows, scale)]), ends / scale  # (bounds, blocks, choices)
    rng, weights, nearest = np.random.default_rng(0), np.ones(len(ends)), -np.inf
    for step in range(2000):
        trial = np.abs(weights + rng.normal(0, 1 / (1 + step / 50), len(ends)))
        trial /= trial.sum()
        if (gap := np.tensordot(trial, table, 1).min(axis=1).sum() - trial @ ends) > nearest:
            nearest, weights = gap, trial
    table = np.concatenate([table, np.tensordot(weights, table, 1)[None]])
    ends = np.append(ends, weights @ ends) + 1e-9
    least = table.min(axis=2)  # the least of each sum in each block
    states, counts = np.zeros((1, len(ends))), np.ones(1)
    for block in range(space.n_blocks):
        states = (states[:, None] + table[:, block].T[None]).reshape(-1, len(ends))
        counts = np.repeat(counts, table.shape[2])
        kept = (states + least[:, block + 1 :].sum(axis=1) <= ends).all(axis=1)
        states, place = np.unique(states[kept].round(9), axis=0, return_inverse=True)
        counts = np.bincount(place.ravel(), counts[kept], len(states))
        if len(states) > most:
            return None
    return int(counts.sum())


def test_sets_of_limits_fill_the_first_population_or_are_refused_rightly(everything):
    for number in range(16):
        check_enumerated(number, *everything)


def test_sets_of_limits_in_large_spaces():
    assert {check_large("blocks", number)[1] is None for number in (0, 1, 17)} == {True, False}
    assert check_large("joint", 0)[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_sets_of_limits(everything):
    """Refusals in `blocks` are right too, as far as they can be counted."""
    outcomes = collections.Counter()
    for name, n in (("small", 400), ("blocks", 400), ("joint", 200)):
        for number in range(n):
            small = name == "small"
            bounds, population = check_enumerated(number, *everything) if small else check_large(name, number)
            if name == "blocks" and population is None:
                assert not count_legal(SPACES[name], bounds), bounds
            outcomes[name, population is not None] += 1
    assert min(outcomes.values()) > 10


# --- forms ---------------------------------------------------------------------------------------------------


def test_forms_of_limits():
    space = SPACES["blocks"]
    share = space.cost_value("flops", "59%")
    found = read_limits(space, ["flops=290M:59%", "params=:3.5M", "latency=8ms", "latency=6.5ms:"])
    assert found == {"flops": (290_000_000, share), "params": (None, 3_500_000), "latency": (6_500_000, None)}
    assert describe(found).startswith("flops 290.0M to 33") and describe(found).endswith("latency from 6.500 ms")
    assert bounds_of(as_settings(found)) == found
    assert read_limits(space, ["params=80.5k", "flops=700k:0.9M"]) == {"params": (None, 80_500),
                                                                       "flops": (700_000, 900_000)}  # fmt: skip
    assert as_settings({"flops": (None, 7)}) == {"flops_limit": 7}
    assert bounds_of({"flops_limit": 7}) == {"flops": (None, 7)}


@pytest.mark.parametrize("cost", COSTS)
def test_a_share_is_that_of_uniform_candidates(everything, cost):
    space, costs = SPACES["small"], everything[1][cost]
    for share in (0.2, 0.59, 1):
        (_, high), *_ = read_limits(space, [f"{cost}={100 * share}%"]).values()
        assert (costs <= high).mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flops", "not of a form such as flops=330M"),
        ("speed=3", "not of a form"),
        ("flops=", "not of a form"),
        ("flops=:", "not of a form"),
        ("flops=1M:2M:3M", "not of a form"),
        ("flops=8ms", "neither multiply-adds"),
        ("params=many", "--limit params 'many' is neither parameters"),
        ("latency=8", "--limit latency '8' is neither milliseconds"),
        ("params=101%", "a share of candidates"),
        ("flops=330M:290M", "the first bound is above"),
    ],
)
def test_wrong_forms(text, message):
    with pytest.raises(UserError, match=message):
        read_limits(SPACES["blocks"], [text])


def test_limits_of_the_command_line_join_those_of_a_file(tmp_path):
    """The command line wins, cost by cost."""
    config = tmp_path / "c.yml"
    config.write_text("search: {limit: [flops=300M, params=3M]}")
    space = SPACES["blocks"]
    args = search.parse_args(["--config", str(config), "--limit", "params=4M", "--limit", "params=3.5M"])
    found = make_bounds(space, args.limit, args.flops_limit)
    assert found == {"flops": (None, 300_000_000), "params": (None, 3_500_000)}
    args = search.parse_args(["--flops-limit", "310M", "--limit", "params=3.5M"])
    found = make_bounds(space, args.limit, args.flops_limit)
    assert found == {"flops": (None, 310_000_000), "params": (None, 3_500_000)}
    args.limit.append("flops=300M")
    with pytest.raises(UserError, match="--flops-limit and --limit flops: leave one of them out"):
        make_bounds(space, args.limit, args.flops_limit)


@pytest.mark.parametrize("typed", ["--flops-limit 310M", "--limit flops=310M", "--limit params=2M flops=310M"])
@pytest.mark.parametrize("file", ["flops-limit: 300M", "limit: [flops=300M]", "limit: [flops=290M:300M, params=3M]"])
def test_a_limit_on_flops_replaces_that_of_a_file_in_either_form(tmp_path, file, typed):
    config = tmp_path / "c.yml"
    config.write_text(f"search: {{{file}}}")
    args = search.parse_args(["--config", str(config), *typed.split()])
    params = 2_000_000 if "params" in typed else 3_000_000 if "params" in file else None
    expected = {"flops": (None, 310_000_000)} | ({"params": (None, params)} if params else {})
    assert make_bounds(SPACES["blocks"], args.limit or (), args.flops_limit) == expected
    args = search.parse_args(["--config", str(config), "--flops-limit", "310M", "--limit", "flops=320M"])
    with pytest.raises(UserError, match="leave one of them out"):
        make_bounds(SPACES["blocks"], args.limit, args.flops_limit)


# --- what a space offers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "text"),
    [(999, "0.999k"), (9_999, "9.999k"), (9_999.6, "10.00k"), (21_754, "21.75k"), (622_349, "622.3k"),
     (999_949, "999.9k"), (999_950, "1.000M"), (12_345_678, "12.35M"), (329_870_000, "329.9M")],
)  # fmt: skip
def test_numbers_have_four_digits(cost, text):
    assert shown("params", cost) == shown("flops", cost) == text


def test_latencies_below_a_millisecond_have_three_digits_that_count():
    assert [shown("latency", ns) for ns in (12_345_678, 1_000_000, 890_400, 57_300)] == [
        "12.346 ms", "1.000 ms", "0.890 ms", "0.0573 ms"
    ]  # fmt: skip
    space = SearchSpace().with_costs(latency=((1,) * 4,) * 20, fixed_latency=0)
    assert read_limits(space, ["latency=57us"]) == {"latency": (None, 57_000)}


def test_the_ranges_of_a_space_are_those_of_all_candidates(everything):
    costs = everything[1]
    assert known_costs(SPACES["small"]) == {name: (costs[name].min(), costs[name].max()) for name in COSTS}
    assert known_costs(SearchSpace()).keys() == {"flops", "params"}
    costs = "FLOPs 270.4M to 398.6M, parameters 3.155M to 3.871M"
    assert offer(SearchSpace()).startswith(f"all candidates at 224 px with 1000 classes: {costs}; ")
    assert "latency in onnxruntime 0." in offer(SPACES["small"], "onnxruntime")


def test_a_space_of_like_candidates_says_so():
    """It takes one cost that differs by a factor of 1.5."""
    for low, little in ((201, True), (200, False)):
        for rows in (((low, 300),), ((100, 100),)), (((100, 100),), ((low, 300),)):
            space = SearchSpace(given_costs=Costs(rows[0], 0, 0, rows[1], 0))
            assert ("; candidates differ by less than a factor of 1.5 in all of these" in offer(space)) == little


def test_a_limit_that_excludes_no_candidate_is_told(everything):
    """Unless it says so itself, by 100%; of several for one cost the last one counts."""
    space, costs = SPACES["small"], everything[1]
    for name, (low, high) in known_costs(space).items():
        unit, scale = ("ms", 1e6) if name == "latency" else ("", 1)
        low, high = f"{low / scale}{unit}", f"{high / scale}{unit}"
        between = f"they cost {shown(name, costs[name].min())} to {shown(name, costs[name].max())}"
        for value in (high, f"{low}:", f"{low}:{high}", f":{high}"):
            assert idle_limits(space, [f"{name}=5%", f"{name}={value}"]) == [
                f"the limit {name}={value} excludes no candidate of this space: {between}"
            ]
        for value in ("100%", f"{low}:100%", "99%", low, f"{high}:", f"{low}:{low}"):
            assert idle_limits(space, [f"{name}={value}"]) == []
    assert idle_limits(space) == [] == idle_limits(space, (), "100%")
    assert len(idle_limits(space, ["params=99M", "latency=99ms"], "99M")) == 3


# --- what is impossible --------------------------------------------------------------------------------------


def test_one_impossible_limit_names_what_can_be_reached(everything):
    space, costs = SPACES["small"], everything[1]
    low, high = costs["params"].min(), costs["params"].max()
    for bounds, message in (
        ({"params": (None, low - 1)}, f"limit {low - 1} is below the lowest .*, {low}; raise --limit params"),
        ({"params": (high + 1, None)}, f"limit {high + 1} is above the highest .*, {high}; lower --limit params"),
        ({"flops": (None, 5)}, f"below .*, {costs['flops'].min()}; raise --flops-limit"),
    ):
        with pytest.raises(UserError, match=message):
            Limits(space, bounds).check()
    Limits(space, {"params": (None, int(low))}).check()


@pytest.mark.parametrize(("name", "slow", "lean"), [("small", 0.97, 0.001), ("blocks", 0.99, 1e-9)])
def test_impossible_together_names_the_tightest_and_what_the_others_leave(name, slow, lean, everything):
    """Each is possible alone: few parameters, and a latency that only costlier candidates have."""
    space = SPACES[name]
    bounds = {"latency": (space.quantile("latency", slow), None), "params": (None, space.quantile("params", lean))}
    for cost in bounds:
        Limits(space, {cost: bounds[cost]}).check()
    with pytest.raises(UserError) as refused:
        Limits(space, bounds).check()
    line = str(refused.value)
    assert line.startswith(f"limit {bounds['params'][1]} is below the lowest cost of any candidate with latency from")
    reached = int(line.split(", ")[-1].split(";")[0])
    if name == "small":
        costs = everything[1]
        assert reached == costs["params"][costs["latency"] >= bounds["latency"][0]].min()
    Limits(space, bounds | {"params": (None, reached)}).check()
    assert Limits(space, bounds | {"params": (None, reached - 1)}).optimum() is None


@pytest.mark.parametrize("seed", range(8))
def test_the_optimum_is_that_of_all_candidates(seed, everything, monkeypatch):
    """Under bounds at, or next to, what some candidate costs, which are met exactly or not at all."""
    space, (candidates, costs) = SPACES["small"], everything
    rng = random.Random(seed)
    some = [rng.randrange(len(candidates)) for _ in COSTS]
    ends = {name: int(costs[name][i]) + rng.choice((-1, 0, 1)) for name, i in zip(COSTS, some)}
    bounds = {
        name: rng.choice(((None, end), (end, None), (end, end))) for name, end in ends.items() if rng.random() < 0.7
    }
    legal = meets(costs, bounds)
    limits = Limits(space, bounds)
    for name in (None, *COSTS):
        for sign, best in ((1, np.min), (-1, np.max)):
            found = limits.optimum(name, sign)
            assert (found is not None) == legal.any()
            assert found is None or not limits.excess(found)
            assert None in (found, name) or space.cost(name, found) == best(costs[name][legal])
    for listable, share in ((len(candidates), 1), (0, 0.9999)):
        monkeypatch.setattr("space.limits.LISTABLE", listable)
        _largest.cache_clear()
        found = limits.largest()
        assert (found is not None) == legal.any()
        assert not found or (not limits.excess(found) and space.flops(found) >= share * costs["flops"][legal].max())


def test_a_measured_cost_holds_between_both_bounds():
    bounds = {"latency": (10, 20), "flops": (None, 5), "params": (7, None)}
    limits = Limits(SPACES["small"], bounds)
    assert [limits.holds("latency", cost) for cost in (9, 10, 20, 21)] == [False, True, True, False]
    assert [limits.holds("flops", cost) for cost in (0, 5, 6)] == [True, True, False]
    assert [limits.holds("params", cost) for cost in (6, 7, 99)] == [False, True, True]


def test_a_correction_and_banned_candidates_narrow_the_limits(everything):
    space, (candidates, costs) = SPACES["small"], everything
    high = space.quantile("latency", 0.5)
    limits = Limits(space, {"latency": (None, high)}, correction=1.1, banned=[candidates[0]])
    for candidate, cost in zip(candidates[::7], costs["latency"][::7]):
        assert (limits.excess(candidate) == 0) == (cost * 1.1 <= high and candidate != candidates[0])


def test_neighbours_are_all_legal_candidates_two_changes_away(everything):
    space, (candidates, costs) = SPACES["small"], everything
    bounds = {name: (space.quantile(name, 0.3), space.quantile(name, 0.7)) for name in COSTS}
    legal = {c for c, ok in zip(candidates, meets(costs, bounds)) if ok}
    centre = min(legal)
    found = list(Limits(space, bounds).neighbours(centre, random.Random(0)))
    near = {c for c in legal if sum(a != b for a, b in zip(c, centre)) <= 2}
    assert set(found) == near and len(near) > 5


def test_what_repair_finds_is_filled_up_with_its_neighbours(monkeypatch):
    space = SPACES["blocks"]
    settings = {"flops_limit": space.quantile("flops", 1e-5), "population": 20}
    evolution = Evolution.from_settings(space, settings)
    one = evolution.limits.repair((3,) * 20, random.Random(0))
    monkeypatch.setattr(evolution.limits, "repair", lambda candidate, rng: one)
    population = evolution.ask()
    assert len(set(population)) == 20 and one in population
    assert all(space.flops(c) <= settings["flops_limit"] for c in population)


def test_repair_meets_narrow_limits_on_three_costs():
    """Boxes of a twentieth of a standard deviation around random candidates: uniform draws never fall into one."""
    space, rng = SPACES["blocks"], random.Random(1)
    for _ in range(5):
        centre, bounds = space.random_candidate(rng), {}
        for name in COSTS:
            margin = sum(map(np.var, space.cost_rows(name)[0])) ** 0.5 / 40
            cost = space.cost(name, centre)
            bounds[name] = int(cost - margin), int(cost + margin)
        population = Evolution.from_settings(space, {"limits": bounds, "seed": 0, "population": 20}).ask()
        assert len(set(population)) == 20 and all(not Limits(space, bounds).excess(c) for c in population)

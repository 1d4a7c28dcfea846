"""The evolution, its record on disk, and the NNI tuner with NNI played by the test."""
import collections
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time

import pytest

import evolution_tuner
from evolution_tuner import Evolution, EvolutionWithFlops, KeepResults
from search_record import SearchRecord, prepare_search, read_results, state_path
from search_space import SearchSpace
from utils import HERE, UserError, hold_lock, read_json

SPACE = SearchSpace.for_images(28, 10)
LIMIT = SPACE.flops_value("59%")


def reward(candidate):
    """Some function of the candidate in which every block counts."""
    return 100 * random.Random(str(candidate[:3])).random() / 2 + sum(c * (i % 5) for i, c in enumerate(candidate)) / 10


def search(evolution, reward=reward):
    """Runs an evolution to its end; returns its populations."""
    while population := evolution.ask():
        evolution.tell({c: reward(c) for c in population})
    return evolution.history


def small(**changes):
    settings = {"population": 12, "select": 4, "mutation": 6, "crossover": 6, "generations": 4} | changes
    return Evolution(SPACE.choices_per_block, SPACE.flops, LIMIT, **settings)


# --- evolution -----------------------------------------------------------------------------------------------


def test_populations_are_legal_new_and_full():
    history = search(Evolution(SPACE.choices_per_block, SPACE.flops, LIMIT))
    candidates = [c for population in history for c in population]
    assert [len(p) for p in history] == [50] * 20
    assert len(set(candidates)) == 1000
    assert all(SPACE.check(c) == c and SPACE.flops(c) <= LIMIT for c in candidates)


def test_the_seed_determines_it_whatever_the_order_of_rewards():
    one, other = small(seed=3), small(seed=3)
    while population := one.ask():
        assert other.ask() == population
        one.tell({c: reward(c) for c in population})
        for candidate in reversed(population):
            assert other.ask() == population  # the open population, until all are told
            other.tell({candidate: reward(candidate)})
    assert other.ask() == []
    assert one.best == other.best
    assert search(small(seed=4)) != one.history


def test_first_population_is_uniform_among_legal_ones():
    drawn = collections.Counter()
    for seed in range(600):
        drawn.update(Evolution((4, 4), sum, 3, 2, 1, 1, 1, generations=1, seed=seed).ask())
    assert len(drawn) == 10
    assert all(80 < n < 160 for n in drawn.values())  # 120 expected, standard deviation 10


def test_parents_are_the_best_of_all_populations():
    """Later populations earn less and less, so all parents are of the first; children of a later one would show in block 0."""
    evolution = Evolution((9,) * 8, sum, 72, 20, 3, 10, 10, mutation_prob=0.0, generations=5)
    first = evolution.ask()
    evolution.tell({c: sum(c) for c in first})
    parents = evolution.ranked()[:3]
    while population := evolution.ask():
        children = population[:10]  # mutation is off and gives only duplicates
        assert all(all(gene in genes for gene, genes in zip(child, zip(*parents))) for child in children)
        evolution.tell(dict.fromkeys(population, -1))


def test_mutation_changes_each_block_at_its_rate():
    evolution = Evolution((4,) * 20, sum, 60)
    parent = (0,) * 20
    children = [evolution._mutate(parent) for _ in range(5000)]
    changed = collections.Counter(c != 0 for child in children for c in child)
    assert changed[True] / 100_000 == pytest.approx(0.075, abs=0.004)  # 0.1 redrawn, a quarter of them to the same
    assert {c for child in children for c in child} == {0, 1, 2, 3}


def test_crossover_takes_blocks_of_both_parents():
    evolution = Evolution((4,) * 20, sum, 60)
    genes = collections.Counter(g for _ in range(500) for g in evolution._cross((1,) * 20, (2,) * 20))
    assert genes.keys() == {1, 2}
    assert genes[1] / 10_000 == pytest.approx(0.5, abs=0.03)


def test_crossover_may_take_the_same_parent_twice():
    drawn = set()
    evolution = Evolution((4,) * 8, sum, 24, 4, 2, 0, 4, generations=2)
    evolution.tell({c: sum(c) for c in evolution.ask()})
    evolution._cross = lambda *parents: drawn.add(parents) or (0,) * 8
    evolution.ask()
    assert {a == b for a, b in drawn} == {True, False}


def test_children_are_tried_ten_times_each(monkeypatch):
    evolution = Evolution((4,) * 8, sum, 24, 50, 10, 20, 30, generations=2)
    evolution.tell({c: sum(c) for c in evolution.ask()})
    tries = collections.Counter()
    known = evolution.history[0][0]
    monkeypatch.setattr(evolution, "_mutate", lambda parent: tries.update("m") or known)
    monkeypatch.setattr(evolution, "_cross", lambda *parents: tries.update("c") or (3,) * 8)
    evolution.cost_limit = 23  # so that what crossover gives is too costly
    population = evolution.ask()
    assert tries == {"m": 200, "c": 300}
    assert len(set(population)) == 50  # random ones fill up


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 9, "select": 10}, "--population 9 and --select 10"),
        ({"select": 0}, "--select 0"),
        ({"mutation": 30}, "--mutation 30 and --crossover 25 .*--population 50"),
        ({"crossover": -1}, "--crossover -1"),
        ({"mutation_prob": 1.5}, "--mutation-prob 1.5"),
        ({"mutation_prob": math.nan}, "--mutation-prob nan"),
        ({"generations": 0}, "--generations 0"),
        ({"cost_limit": math.nan}, "limit nan"),
        ({"choices_per_block": ()}, "choices per block"),
        ({"choices_per_block": (4, 0)}, "choices per block"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(UserError, match=message):
        Evolution(**{"choices_per_block": (4,) * 20, "cost": sum, "cost_limit": 60} | settings)


def test_impossible_limit_names_the_lowest_cost():
    lowest = SPACE.flops_range[0]
    with pytest.raises(UserError, match=f"limit {lowest - 1} is below .*, {lowest};"):
        Evolution(SPACE.choices_per_block, SPACE.flops, lowest - 1)
    evolution = Evolution(SPACE.choices_per_block, SPACE.flops, lowest)
    assert [SPACE.flops(c) for c in evolution.ask()] == [lowest]


def test_tight_limit_is_met_by_repair():
    """One candidate in 10^5 is legal: rejection finds none."""
    limit = SPACE.flops_quantile(1e-5)
    population = Evolution(SPACE.choices_per_block, SPACE.flops, limit).ask()
    assert len(set(population)) == 50
    assert all(SPACE.flops(c) <= limit for c in population)


def test_space_smaller_than_the_population_is_evaluated_whole():
    choices = (2, 1, 3, 2)
    history = search(Evolution(choices, sum, 3))
    legal = {c for c in itertools.product(*map(range, choices)) if sum(c) <= 3}
    assert set(history[0]) == legal
    assert len(history) == 1
    evolution = Evolution((3, 3, 3), sum, 6, 10, 3, 5, 5, generations=20)
    assert sum(map(len, search(evolution))) == 27
    assert evolution.ask() == []
    evolution = Evolution((10,) * 3, sum, 27, 2, 1, 0, 0, generations=600)  # the last few are not met by chance
    assert sum(map(len, search(evolution, sum))) == 1000


def test_failed_candidates_are_no_parents_and_do_not_come_again():
    evolution = Evolution((4,) * 6, sum, 18, 10, 9, 5, 5, mutation_prob=0.3)
    population = evolution.ask()
    good = population[2]
    evolution.tell({c: math.nan if i % 2 else None for i, c in enumerate(population) if c != good} | {good: -5.0})
    assert evolution.best == (good, -5.0)
    assert evolution.ranked() == [good]
    parents = []
    evolution._mutate = lambda parent: parents.append(parent) or Evolution._mutate(evolution, parent)
    following = evolution.ask()
    assert set(parents) == {good}
    assert not set(following) & set(population)


def test_all_failed_goes_on_at_random():
    evolution = small()
    search(evolution, lambda c: (math.nan, 1.0))
    assert evolution.best is None
    assert [len(p) for p in evolution.history] == [12] * 4


def test_ties_go_by_the_second_number_then_by_age():
    evolution = Evolution((4,) * 6, sum, 18, 4, 1, 0, 0, generations=1)
    a, b, c, d = evolution.ask()
    evolution.tell({d: (50.0, 80.0), b: (50.0, 90.0), a: (50.0, 80.0), c: (49.0, 99.0)})
    assert evolution.ranked() == [b, a, d, c]


def test_tell_takes_only_what_was_asked_for():
    evolution = small()
    population = evolution.ask()
    with pytest.raises(ValueError, match="not of the population"):
        evolution.tell({(9,) * 20: 1.0})
    evolution.tell({population[0]: 1.0})
    evolution.tell({population[0]: 2.0})
    assert evolution.best == (population[0], 1.0)
    assert evolution.generation == 0
    evolution.tell(dict.fromkeys(population[1:], 0.0))
    assert evolution.generation == 1


def test_search_without_nni_or_torch():
    code = """if True:
        import sys
        sys.modules |= {"nni": None, "torch": None}
        from evolution_tuner import Evolution
        print(sorted(Evolution((2, 2), sum, 2, 4, 1, 1, 1).ask()))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert done.stdout == "[(0, 0), (0, 1), (1, 0), (1, 1)]\n"


def test_finds_a_better_candidate_than_random_search_of_any_shape():
    choices = (2, 3, 4, 5, 3, 2, 6, 4, 3, 5)
    values = [[random.Random(f"{i}{j}").random() for j in range(n)] for i, n in enumerate(choices)]
    optimum, wins = sum(map(max, values)), 0
    for seed in range(10):
        evolution = Evolution(choices, sum, 100, 20, 5, 10, 10, generations=10, seed=seed)
        search(evolution, lambda c: sum(v[g] for v, g in zip(values, c)))
        wins += evolution.best[1] > optimum - 1e-9
    assert wins >= 6  # of 259,200 candidates, 200 are evaluated: at random, it would be found once in 1,300 searches


# --- record --------------------------------------------------------------------------------------------------

SETTINGS = {"population": 4, "select": 2, "mutation": 2, "crossover": 2, "generations": 3, "seed": 5}


def result(candidate, **changes):
    acc1 = reward(candidate)
    return {"architecture": list(candidate), "flops": 0, "acc1": acc1, "acc5": 99.0, "n_images": 10, "seconds": 1.5} | changes


def record(out, settings=SETTINGS):
    return SearchRecord(out, SPACE, Evolution(SPACE.choices_per_block, SPACE.flops, LIMIT, **settings))


def fill(out, order=list, stop_after=math.inf):
    """A search in `out`, started or resumed, whose results arrive in an order; ends after so many. Returns how many there were."""
    prepare_search(out, SETTINGS, resume=True)
    searching, n = record(out), 0
    while waiting := searching.pending():
        for candidate in order(waiting):
            if n == stop_after:
                return n
            if candidate[0] == 1:
                searching.fail(candidate, "broken", "t1")
            else:
                searching.add(result(candidate), f"t{candidate[0]}")
            n += 1
    return n


def artefacts(out):
    """Contents of all files below the folder but the state and the locks."""
    return {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file() and p.parent.name != "search"}


def test_record_leaves_the_artefacts(tmp_path):
    assert fill(tmp_path) == 12
    files = artefacts(tmp_path)
    numbered = [f"{g:03}" for g in range(3)]
    assert files.keys() == {
        *(f"acc/{g}.jsonl" for g in numbered), *(f"id2cand/{g}.json" for g in numbered), "checkpoints/best.json",
        *(f"checkpoints/{g}_{i:03}.json" for g in numbered for i in range(4)),
    }  # fmt: skip
    results = [json.loads(line) for line in files["acc/001.jsonl"].splitlines()]
    evaluated = [r for r in results if r["acc1"] is not None]
    assert evaluated == sorted(evaluated, key=lambda r: r["acc1"], reverse=True) == results[: len(evaluated)]
    assert all(r["error"] == "broken" for r in results[len(evaluated) :])
    for rank, r in enumerate(results):
        assert SPACE.load_architecture(tmp_path / f"checkpoints/001_{rank:03}.json") == tuple(r["architecture"])
        assert r["flops"] == SPACE.flops(r["architecture"])
        assert "trial" not in r
    said = {f"t{r['architecture'][0]}" for r in results}
    assert read_json(tmp_path / "id2cand/001.json").keys() == said
    state = read_json(state_path(tmp_path))
    best = max((r for r in read_results(tmp_path) if r["acc1"] is not None), key=lambda r: r["acc1"])
    assert (state["best"], state["done"], state["generation"], state["evaluated"]) == (best, True, 3, 12)
    assert SPACE.load_architecture(tmp_path / "checkpoints/best.json") == tuple(best["architecture"])


def test_files_do_not_depend_on_the_order_of_arrival(tmp_path):
    fill(tmp_path / "a")
    fill(tmp_path / "b", order=lambda waiting: waiting[::-1])
    assert artefacts(tmp_path / "a") == artefacts(tmp_path / "b")


def test_search_that_stops_anywhere_goes_on_to_the_same_end(tmp_path):
    fill(tmp_path / "undisturbed")
    for n in range(13):
        assert fill(tmp_path / str(n), stop_after=n) == n
        if n in (1, 6):  # died while writing, and again one result later
            path = sorted((tmp_path / str(n) / "acc").glob("*"))[-1]
            path.write_text(path.read_text() + '{"architecture": [1, 2')
            assert fill(tmp_path / str(n), stop_after=1) == 1
        assert fill(tmp_path / str(n)) == 12 - n - (n in (1, 6))
        assert artefacts(tmp_path / str(n)) == artefacts(tmp_path / "undisturbed")


def test_search_that_dies_while_closing_a_generation_goes_on_to_the_same_end(tmp_path, monkeypatch):
    fill(tmp_path / "undisturbed")
    monkeypatch.setattr("utils.os.fsync", lambda descriptor: None)
    for n in itertools.count():
        countdown = iter(range(n))

        def replace(source, target, countdown=countdown):
            if next(countdown, None) is None:
                raise KeyboardInterrupt
            os.rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("utils.os.replace", replace)
            try:
                fill(tmp_path / str(n))
                break
            except KeyboardInterrupt:
                pass
        fill(tmp_path / str(n))
        assert artefacts(tmp_path / str(n)) == artefacts(tmp_path / "undisturbed"), n
    assert n > 30


def test_results_that_are_none(tmp_path):
    prepare_search(tmp_path, SETTINGS, resume=False)
    searching = record(tmp_path)
    a, b, c, _ = searching.pending()
    assert searching.add(result(a, acc1=math.nan))
    assert searching.add(result(b, acc5=None))
    assert not searching.add(result(a))
    assert not searching.add(result((0,) * 20))
    assert searching.add(result(c, acc1=0))
    assert [r["acc1"] for r in read_results(tmp_path)] == [None, None, 0]
    assert searching.results[a]["error"] == "accuracy nan, 99.0"


def test_equal_top1_goes_by_top5(tmp_path):
    prepare_search(tmp_path, SETTINGS, resume=False)
    searching = record(tmp_path)
    for acc5, candidate in enumerate(searching.pending()):
        searching.add(result(candidate, acc1=50.0, acc5=60.0 + acc5))
    searching.pending()
    assert [r["acc5"] for r in read_results(tmp_path)] == [63.0, 62.0, 61.0, 60.0]


def test_folder_with_a_search_is_refused(tmp_path):
    prepare_search(tmp_path, SETTINGS, resume=False)
    prepare_search(tmp_path, SETTINGS, resume=False)  # nothing was evaluated
    fill(tmp_path, stop_after=1)
    with pytest.raises(UserError, match=r"holds a search already: .*--resume.*--out"):
        prepare_search(tmp_path, SETTINGS, resume=False)
    with pytest.raises(UserError, match=r"other settings: seed 6 \(was 5\), select 3 \(was 2\)"):
        prepare_search(tmp_path, SETTINGS | {"seed": 6, "select": 3}, resume=True)
    assert prepare_search(tmp_path, SETTINGS, resume=True)["evaluated"] == 1
    state_path(tmp_path).write_text("{}")
    with pytest.raises(UserError, match="not the state of a search"):
        prepare_search(tmp_path, SETTINGS, resume=True)


def test_damaged_results_are_named(tmp_path):
    fill(tmp_path, stop_after=3)
    path = tmp_path / "acc/000.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:40], lines[2]]) + "\n")
    with pytest.raises(UserError, match=r"000\.jsonl: line 2 is damaged"):
        read_results(tmp_path)


def test_lock_is_held_by_one(tmp_path):
    with hold_lock(tmp_path / "a.lock"):
        with pytest.raises(UserError, match="another run is going on"):
            hold_lock(tmp_path / "a.lock")
        hold_lock(tmp_path / "b.lock").close()
    hold_lock(tmp_path / "a.lock").close()


# --- the tuner -----------------------------------------------------------------------------------------------


class FakeNNI:
    """Plays NNI's manager: asks for a trial once a free slot, runs trials as `step` says, swapping their parameters."""

    def __init__(self, out, concurrency=2, resume=False, **settings):
        settings = SETTINGS | settings
        prepare_search(out, settings, resume)
        self.tuner = EvolutionWithFlops(str(out), SPACE.to_dict(), LIMIT, concurrency, **settings)
        self.ids, self.sent, self.out = itertools.count(), collections.deque(), out
        self.evaluated = []
        self.ask(concurrency)

    def ask(self, n):
        ids = list(itertools.islice(self.ids, n))
        assert self.tuner.generate_multiple_parameters(ids, st_callback=lambda *trial: self.sent.append(trial)) == []

    def evaluate(self, parameters, n=None, reported=None):
        """A trial's first `n` results, each kept by the assessor as it comes; then the final one."""
        results = []
        for candidate in map(tuple, parameters["candidates"][:n]):
            self.evaluated.append(candidate)
            results.append(result(candidate))
            KeepResults().assess_trial(reported or "id", [{"default": 0, "result": r} for r in results])
        return results

    def step(self, dies_after=None, end_first=False):
        """Runs the first trial that was sent and ends it."""
        id_, parameters = self.sent.popleft()
        if dies_after is not None:
            self.evaluate(parameters, dies_after)
            self.tuner.trial_end(id_, False)
        elif end_first:
            self.tuner.trial_end(id_, True)
            self.final(id_, parameters)
        else:
            self.final(id_, parameters)
            self.tuner.trial_end(id_, True)
        self.ask(1)

    def final(self, id_, parameters):
        results = self.evaluate(parameters, reported=f"trial{id_}")
        self.tuner.receive_trial_result(id_, parameters, {"default": 0, "trial": f"trial{id_}", "results": results})

    @property
    def state(self):
        return read_json(state_path(self.out))

    def run(self, **how):
        while not self.state["done"]:
            assert self.state["error"] is None
            if self.sent:
                self.step(**how)


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr(evolution_tuner, "GRACE_S", 0.05)


def plain():
    evolution = Evolution(SPACE.choices_per_block, SPACE.flops, LIMIT, **SETTINGS)
    return search(evolution, lambda c: (reward(c), 99.0))


def test_tuner_gives_the_generations_of_the_evolution(tmp_path):
    nni = FakeNNI(tmp_path)
    nni.run()
    assert [set(nni.evaluated[i : i + 4]) for i in (0, 4, 8)] == [set(p) for p in plain()]
    assert len(nni.evaluated) == 12
    assert nni.sent == collections.deque()


@pytest.mark.parametrize(("concurrency", "per_trial", "total"), [(1, None, 4), (2, None, 4), (3, None, 4), (3, 1, 3)])
def test_generation_is_split_for_the_trials(tmp_path, concurrency, per_trial, total):
    nni = FakeNNI(tmp_path, concurrency, **({"candidates_per_trial": per_trial} if per_trial else {}))
    chunks = [parameters["candidates"] for _, parameters in nni.sent]
    candidates = list(itertools.chain(*chunks))
    assert len(chunks) == concurrency and len(candidates) == total
    assert candidates == sorted(candidates)  # neighbours share first blocks
    nni.run()
    assert len(nni.evaluated) == 12


def test_only_what_a_trial_reports_is_believed(tmp_path):
    """Both trials get the other's parameters."""
    nni = FakeNNI(tmp_path)
    (a, first), (b, second) = nni.sent
    nni.sent.clear()
    nni.final(b, first)
    nni.final(a, second)
    for id_ in (a, b):
        nni.tuner.trial_end(id_, True)
    kept = read_json(tmp_path / "id2cand/000.json")
    assert {k: sorted(v) for k, v in kept.items()} == {f"trial{b}": first["candidates"], f"trial{a}": second["candidates"]}


def test_slots_that_find_nothing_to_do_are_served_by_the_next_generation(tmp_path):
    nni = FakeNNI(tmp_path)
    nni.step()
    assert len(nni.sent) == 1  # the other half runs; its slot's id waits
    nni.step()
    assert [id_ for id_, _ in nni.sent] == [2, 3]


def test_result_after_the_end_of_its_trial_counts(tmp_path, short_grace):
    nni = FakeNNI(tmp_path)
    nni.step(end_first=True)
    nni.step(end_first=True)
    time.sleep(0.2)  # the last one's grace ends while the trials of the next generation run
    assert not nni.tuner.chunks
    nni.run(end_first=True)
    assert len(nni.evaluated) == 12


def wait_for(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_a_dead_trial_had_not_reported_is_sent_once_more_alone(tmp_path, short_grace):
    nni = FakeNNI(tmp_path, population=8)
    nni.step(dies_after=1)
    nni.step()
    assert not nni.sent
    wait_for(lambda: len(nni.sent) == 2)
    assert [len(p["candidates"]) for _, p in nni.sent] == [1, 1]  # three are left, two slots are free
    (poison,) = nni.sent[0][1]["candidates"]
    nni.step(dies_after=0)
    nni.step()
    nni.step()
    wait_for(lambda: nni.state["generation"] == 1)
    (failed,) = [r for r in read_results(tmp_path) if r["acc1"] is None]
    assert failed["architecture"] == poison
    assert failed["error"] == "two trials ended without a result"
    assert len(nni.evaluated) == 7 == len(set(nni.evaluated))
    nni.run()
    assert tuple(poison) not in nni.evaluated


def test_parameters_say_where_those_sent_with_them_end(tmp_path, short_grace):
    nni = FakeNNI(tmp_path)
    assert [p["until"] for _, p in nni.sent] == [2, 2]
    nni.step(dies_after=0)
    nni.step()
    wait_for(lambda: nni.sent)
    assert [p["until"] for _, p in nni.sent] == [4, 4]


def test_candidates_that_another_trial_has_evaluated_meanwhile_are_not_sent(tmp_path):
    nni = FakeNNI(tmp_path, concurrency=1, candidates_per_trial=1)
    nni.sent.popleft()
    everything = {"candidates": [list(c) for c in nni.tuner.record.evolution.population]}
    nni.final(0, everything)
    nni.tuner.trial_end(0, True)
    nni.ask(1)
    assert tuple(nni.sent[0][1]["candidates"][0]) not in nni.evaluated


def test_trials_that_all_fail_end_the_search(tmp_path, short_grace):
    nni = FakeNNI(tmp_path)
    for _ in range(11):
        wait_for(lambda: nni.sent)
        nni.step(dies_after=0)
    assert nni.state["error"] == "11 trials in a row ended without a result"
    assert read_results(tmp_path) == []


def test_trials_that_fail_now_and_then_do_not(tmp_path):
    nni = FakeNNI(tmp_path, population=40, mutation=0, crossover=0, candidates_per_trial=1)
    for i in range(38):
        nni.step(dies_after=0 if i % 2 else None)
    assert nni.state["error"] is None


def test_exception_in_the_tuner_reaches_the_state_file(tmp_path):
    nni = FakeNNI(tmp_path)
    nni.tuner.receive_trial_result(0, None, {"default": 0, "trial": "t", "results": [{"architecture": "nonsense"}]})
    assert "architecture has 8 blocks" in nni.state["error"]
    nni.step()
    assert read_results(tmp_path) == []  # it has given up


def test_tuner_goes_on_where_another_died(tmp_path):
    nni = FakeNNI(tmp_path)
    nni.evaluate(nni.sent[0][1], 1)
    nni.step()
    nni.step()
    nni.evaluate(nni.sent[1][1], 1)
    nni.tuner.record.lock.close()
    seen = nni.evaluated[1:]  # the first was evaluated twice by the test
    other = FakeNNI(tmp_path, resume=True)
    other.run()
    assert [set((seen + other.evaluated)[i : i + 4]) for i in (0, 4, 8)] == [set(p) for p in plain()]
    assert len(seen + other.evaluated) == 12

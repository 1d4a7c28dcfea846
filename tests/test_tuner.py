"""The NNI tuner, with NNI played by the test."""

import collections
import itertools
import time

import pytest
from made_search import SPACE, read_results, result, reward, settings
from test_evolution import search

import evolution_tuner
from engines import trial
from engines.heartbeats import read_heartbeats
from engines.search_files import state_path
from engines.search_record import prepare_search
from evolution_tuner import EvolutionWithFlops, KeepResults
from space.evolution import Evolution
from utils import read_json

SETTINGS = settings(seed=5)


class FakeNNI:
    """Plays NNI's manager: asks for a trial once a free slot, runs trials as `step` says, swapping their parameters."""

    def __init__(self, out, concurrency=2, resume=False, candidates_per_trial=None, **settings):
        prepare_search(out, SETTINGS | settings, resume)
        self.tuner = EvolutionWithFlops(str(out), concurrency, candidates_per_trial)
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
            KeepResults().assess_trial(reported or "id", list(map(trial.intermediate, results)))
        return results

    def step(self, dies_after=None, end_first=False, error=None):
        """Runs the first trial that was sent and ends it."""
        id_, parameters = self.sent.popleft()
        if error:
            self.tuner.receive_trial_result(id_, parameters, trial.blameless(parameters["candidates"], error))
            dies_after = 0
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
        self.tuner.receive_trial_result(id_, parameters, trial.final(f"trial{id_}", results))

    @property
    def state(self):
        return read_json(state_path(self.out))

    def run(self, **how):
        while not self.state["done"]:
            assert self.state["error"] is None
            if self.sent:
                self.step(**how)


def test_an_extended_search_asks_for_the_generations_that_are_new(tmp_path):
    fewer = FakeNNI(tmp_path, generations=SETTINGS["generations"] - 1)
    fewer.run()
    fewer.tuner.record.lock.close()
    extended = FakeNNI(tmp_path, resume=True)
    assert not extended.state["done"]
    extended.run()
    largest = fewer.evaluated[-1]  # is not evaluated again
    assert {*fewer.evaluated, *extended.evaluated} == {largest, *itertools.chain(*plain())}
    assert len(extended.evaluated) == SETTINGS["population"] and extended.state["generation"] == SETTINGS["generations"]


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr(evolution_tuner, "GRACE_S", 0.05)


def plain():
    evolution = Evolution.from_settings(SPACE, SETTINGS)
    return search(evolution, lambda c: (reward(c), 99.0))


def test_tuner_gives_the_generations_of_the_evolution(tmp_path):
    nni = FakeNNI(tmp_path)
    nni.run()
    assert [set(nni.evaluated[i : i + 4]) for i in (0, 4, 8)] == [set(p) for p in plain()]
    assert len(nni.evaluated) == 13  # with the largest
    assert nni.sent == collections.deque()


def test_an_assessor_passes_intermediate_results_to_the_tuner_of_its_process(tmp_path):
    """NNI makes one by its class name, as here, and no reference to the tuner."""
    nni = FakeNNI(tmp_path)
    first = nni.sent[0][1]["candidates"][0]
    evolution_tuner.KeepResults().assess_trial("abc", [trial.intermediate(result(tuple(first)))])
    assert [r["architecture"] for r in read_results(tmp_path)] == [first]
    assert nni.tuner.record.trials == {tuple(first): "abc"}


def test_heartbeats_are_noted_and_are_no_results(tmp_path):
    nni = FakeNNI(tmp_path)
    nni.tuner.fruitless = 3
    written = state_path(tmp_path).stat()
    KeepResults().assess_trial("abc", [trial.intermediate()])
    KeepResults().assess_trial("def", [trial.intermediate()])
    before = read_heartbeats(tmp_path)
    assert before.keys() == {"abc", "def"} and nni.tuner.fruitless == 3
    assert state_path(tmp_path).stat() == written  # a heartbeat writes nothing that lasts
    time.sleep(0.02)
    first = tuple(nni.sent[0][1]["candidates"][0])
    KeepResults().assess_trial("abc", [trial.intermediate(), trial.intermediate(result(first))])
    after = read_heartbeats(tmp_path)
    assert after["abc"] > before["abc"] and after["def"] == before["def"] and nni.state["evaluated"] == 1


@pytest.mark.parametrize(("concurrency", "per_trial", "total"), [(1, None, 4), (2, None, 4), (3, None, 4), (3, 1, 3)])
def test_generation_is_split_for_the_trials(tmp_path, concurrency, per_trial, total):
    nni = FakeNNI(tmp_path, concurrency, candidates_per_trial=per_trial)
    chunks = [parameters["candidates"] for _, parameters in nni.sent]
    candidates = list(itertools.chain(*chunks))
    assert len(chunks) == concurrency and len(candidates) == total
    assert candidates == sorted(candidates)  # neighbours share first blocks
    nni.run()
    assert len(nni.evaluated) == 13  # with the largest


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
    assert {k: sorted(v) for k, v in kept.items()} == {
        f"trial{b}": first["candidates"],
        f"trial{a}": second["candidates"],
    }


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
    assert len(nni.evaluated) == 13  # with the largest


def wait_for(condition):
    deadline = time.monotonic() + 60
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


def test_a_file_that_a_trial_can_not_read_is_no_fault_of_its_candidates(tmp_path, short_grace):
    """They are tried once more, as by another machine; then the search ends, and evaluates them when it is resumed."""
    gone = "supernet.pth: No such file or directory"
    nni = FakeNNI(tmp_path)
    for _ in range(2):
        nni.step(error=gone)
    assert nni.state["error"] is None and len(nni.sent) == 2 and read_results(tmp_path) == []
    nni.step()  # on a machine that has the file
    nni.step(dies_after=0)
    time.sleep(0.2)
    assert all(r["acc1"] is not None for r in read_results(tmp_path))  # one trial alone has died
    nni.step(error=gone)
    assert nni.state["error"] == gone
    nni.tuner.record.lock.close()
    resumed = FakeNNI(tmp_path, resume=True)
    resumed.run()
    assert all(r["acc1"] is not None for r in read_results(tmp_path))
    assert set(nni.evaluated + resumed.evaluated[:-1]) == set(itertools.chain(*plain()))  # the largest comes last


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
    nni.tuner.receive_trial_result(0, None, trial.final("t", [{"architecture": "nonsense", "acc1": 0}]))
    assert "architecture has 8 blocks" in nni.state["error"]
    nni.step()
    assert read_results(tmp_path) == []  # it has given up


def test_tuner_resumes_where_another_died(tmp_path):
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
    assert len(seen + other.evaluated) == 13

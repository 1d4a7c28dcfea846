"""The search without NNI: the evolution's generations, whatever workers do; a killed one leaves no process."""

import contextlib
import itertools
import json
import multiprocessing
import multiprocessing.queues
import os
import pathlib
import signal
import sys
import threading
import time

import psutil
import pytest
from made_search import SPACE, read_results, result, reward, settings

from engines import local_engine
from engines.heartbeats import heartbeat_file
from engines.local_engine import search_locally
from engines.search_record import prepare_search
from space.evolution import Evolution
from utils import Interrupted, UserError, heartbeat, interrupt, signals

SETTINGS = settings(population=6, select=2, mutation=2, crossover=2)


def on_cpu(out):
    """The settings of a trial."""
    return {"device": "cpu", "out": str(out)}


def generations():
    evolution = Evolution.from_settings(SPACE, SETTINGS)
    while population := evolution.ask():
        evolution.tell({c: (reward(c), 99.0) for c in population})
    return evolution.history


def evaluate(trial, candidates):
    return [result(c) for c in candidates]


def evaluate_in_vain(trial, candidates):
    raise RuntimeError("out of\nmemory")


def evaluate_with_faults(trial, candidates):
    """A candidate whose choices add up to a multiple of 5 raises; to a multiple of 7, ends its worker; always."""
    for candidate in candidates:
        if sum(candidate) % 5 == 0:
            raise RuntimeError("too large")
        if sum(candidate) % 7 == 0:
            os._exit(1)
    return evaluate(trial, candidates)


@pytest.fixture
def fake(monkeypatch, forked):
    def install(evaluation):
        monkeypatch.setattr(local_engine, "_evaluate", evaluation)

    return install


def searched(out, resume=False, **how):
    prepare_search(out, SETTINGS, resume)
    search_locally(out, on_cpu(out), **how)
    return read_results(out)


@pytest.mark.parametrize("how", [{"concurrency": 1}, {"concurrency": 2}, {"concurrency": 2, "candidates_per_trial": 1}])
def test_gives_the_generations_of_the_evolution(tmp_path, fake, how):
    fake(evaluate)
    results = searched(tmp_path, **how)
    expected = list(itertools.chain(*(sorted(p, key=reward, reverse=True) for p in generations())))
    assert [reward(r["architecture"]) for r in results] == [reward(c) for c in expected]
    assert {tuple(r["architecture"]) for r in results} == set(expected)
    trials = json.loads((tmp_path / "id2cand" / "001.json").read_text())
    assert sum(map(len, trials.values())) == 6 and all(name.startswith("001_") for name in trials)


def test_only_what_fails_alone_has_failed(tmp_path, fake, monkeypatch):
    """Whose worker died is evaluated three times, and not again for ever."""
    evaluate, rounds = local_engine.Workers.evaluate, []

    def counted(workers, *how):
        rounds.append(how)
        most = 3 * (SETTINGS["generations"] + 1)  # the largest network comes after the last generation
        assert len(rounds) <= most, "candidates are evaluated without end"
        return evaluate(workers, *how)

    monkeypatch.setattr(local_engine.Workers, "evaluate", counted)
    fake(evaluate_with_faults)
    results = searched(tmp_path, concurrency=2, trial_timeout=60)
    assert len(results) == 18
    for r in results:
        total = sum(r["architecture"])
        error = "RuntimeError: too large" if total % 5 == 0 else "a worker process died" if total % 7 == 0 else None
        assert r.get("error") == error and (r["acc1"] is None) == (error is not None)
    assert {r.get("error") for r in results} == {None, "RuntimeError: too large", "a worker process died"}


def test_a_worker_that_dies_while_it_waits_is_replaced(tmp_path, fake):
    fake(evaluate)
    candidates, others = generations()[0], {child.pid for child in multiprocessing.active_children()}
    with local_engine.Workers(on_cpu(tmp_path), 1) as workers:
        for _ in range(2):
            ((_, results, error),) = workers.evaluate([candidates])
            assert (results, error) == ([result(c) for c in candidates], None)
            (worker,) = (child for child in multiprocessing.active_children() if child.pid not in others)
            worker.kill()
            worker.join()
            time.sleep(0.3)  # the pool sees it


def test_no_thread_of_the_workers_is_left(tmp_path, fake, monkeypatch):
    """Python's exit fails where it meets the pool's thread while that ends."""
    join, threads = multiprocessing.queues.Queue.join_thread, threading.active_count()
    monkeypatch.setattr(multiprocessing.queues.Queue, "join_thread", lambda queue: (time.sleep(0.3), join(queue)))
    fake(evaluate)
    with local_engine.Workers(on_cpu(tmp_path), 1) as workers:
        list(workers.evaluate([generations()[0]]))
    assert threading.active_count() == threads


def evaluate_and_hang(trial, candidates):
    """A candidate whose choices add up to a multiple of 5 hangs; the others take longer than a hung one may."""
    for candidate in candidates:
        if sum(candidate) % 5 == 0:
            time.sleep(600)
        for _ in range(10):
            heartbeat()
            time.sleep(0.25)
    return evaluate(trial, candidates)


def test_a_worker_that_hangs_is_noticed_by_its_silence(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(local_engine, "POLL_S", 0.05)
    fake(evaluate_and_hang)
    candidates = list(itertools.chain(*generations()))
    hangs = next(c for c in candidates if sum(c) % 5 == 0)
    healthy = next(c for c in candidates if sum(c) % 5)
    with local_engine.Workers(on_cpu(tmp_path), 2, trial_timeout=2) as workers:
        found = {tuple(c): (results, error) for (c,), results, error in workers.evaluate([[healthy], [hangs]], False)}
        assert found[hangs] == ([], "a worker gave no heartbeat for 2 s")
        assert found[healthy] == ([result(healthy)], None)  # by a new worker
        assert all(error is None for _, _, error in workers.evaluate([[healthy]] * 2))
        time.sleep(2.2)  # silence of workers that have nothing to do
        ((_, results, error),) = workers.evaluate([[healthy]])
        assert (results, error) == ([result(healthy)], None)
    assert not heartbeat_file(tmp_path, "").exists()


def never_start(*_):
    time.sleep(600)


def test_a_worker_that_never_starts_is_noticed(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(local_engine, "POLL_S", 0.05)
    monkeypatch.setattr(local_engine, "leave_signals_to_parent", never_start)
    with local_engine.Workers(on_cpu(tmp_path), 1, trial_timeout=0.3) as workers:
        ((_, results, error),) = workers.evaluate([[generations()[0][0]]])
        assert (results, error) == ([], "a worker gave no heartbeat for 0.3 s")


@pytest.mark.parametrize(("concurrency", "per_trial", "size"), [(1, None, 5), (2, None, 5), (9, None, 4), (1, 2, 2)])
def test_lists_are_so_small_that_little_is_lost(tmp_path, fake, concurrency, per_trial, size):
    """A worker has at most five candidates in work; all results of a list are kept at once."""
    fake(evaluate)
    prepare_search(tmp_path, SETTINGS | {"population": 30, "generations": 1}, False)
    search_locally(tmp_path, on_cpu(tmp_path), concurrency=concurrency, candidates_per_trial=per_trial)
    lists = json.loads((tmp_path / "id2cand" / "000.json").read_text())
    assert sum(map(len, lists.values())) == 30 and max(map(len, lists.values())) == size


def evaluate_with_a_broken_context(trial, candidates):
    """After its third list, all fails in the first process, as after an error of CUDA."""
    first = out_of(trial) / "first"
    with first.open("a") as file:
        file.write(f"{os.getpid()}\n")
    lists = first.read_text().split()
    if lists.count(str(os.getpid())) > 3 and lists[0] == str(os.getpid()):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return evaluate(trial, candidates)


def out_of(trial):
    return pathlib.Path(json.loads(trial)["out"])


def test_what_fails_alone_is_tried_in_a_new_process(tmp_path, fake):
    fake(evaluate_with_a_broken_context)
    results = searched(tmp_path, candidates_per_trial=1)
    assert len(results) == 18 and not any("error" in r for r in results)


def evaluate_where_there_is_memory(trial, candidates):
    if (out_of(trial) / "full").exists():
        raise RuntimeError("CUDA out of memory")
    return evaluate(trial, candidates)


def test_a_generation_in_which_all_fail_ends_the_search(tmp_path, fake):
    """It can be resumed once the GPU is free again."""
    fake(evaluate_where_there_is_memory)
    prepare_search(tmp_path, SETTINGS | {"population": 8, "generations": 1}, False)
    search_locally(tmp_path, on_cpu(tmp_path))
    (tmp_path / "full").touch()
    prepare_search(tmp_path, SETTINGS | {"population": 8, "generations": 2}, True)
    with pytest.raises(
        UserError, match="no candidate can be evaluated; the last one: RuntimeError: CUDA out of memory"
    ):
        search_locally(tmp_path, on_cpu(tmp_path))
    (tmp_path / "full").unlink()
    prepare_search(tmp_path, SETTINGS | {"population": 8, "generations": 2}, True)
    search_locally(tmp_path, on_cpu(tmp_path))
    assert len(read_results(tmp_path)) == 16 and not any("error" in r for r in read_results(tmp_path))


def evaluate_with_a_user_error(trial, candidates):
    raise UserError("--device cuda: no GPU")


def evaluate_without_a_file(trial, candidates):
    raise FileNotFoundError(2, "No such file or directory", "images.npy")


@pytest.mark.parametrize(
    ("evaluation", "line"),
    [
        (evaluate_with_a_user_error, "--device cuda: no GPU"),
        (evaluate_without_a_file, "images.npy: No such file or directory"),
    ],
)
def test_what_a_user_can_put_right_ends_the_search(tmp_path, fake, evaluation, line):
    fake(evaluation)
    with pytest.raises(UserError, match=f"^{line}$"):
        searched(tmp_path)
    assert read_results(tmp_path) == []


def test_a_dev_shm_without_room_for_semaphores_is_named(tmp_path, fake, no_semaphores):
    with pytest.raises(UserError, match=r"^/dev/shm: No space left on device: .*semaphores.*--shm-size"):
        searched(tmp_path)


def test_where_nothing_works_the_search_stops(tmp_path, fake):
    fake(evaluate_in_vain)
    with pytest.raises(UserError, match=r"no candidate can be evaluated.*out of memory"):
        searched(tmp_path)
    fake(evaluate)
    assert len(searched(tmp_path, resume=True)) == 18


def evaluate_slowly(trial, candidates):
    time.sleep(0.3)
    return evaluate(trial, candidates)


def slow_search(out):
    """In a process of its own: a search that ends as search.py does when a signal comes."""
    local_engine._evaluate = evaluate_slowly
    try:
        with signals(interrupt):
            searched(out, concurrency=2, candidates_per_trial=1)
    except Interrupted as error:
        sys.exit(128 + error.args[0])


@pytest.mark.parametrize(
    "number, method",
    [
        (signal.SIGKILL, "fork"), (signal.SIGTERM, "fork"), (signal.SIGINT, "fork"),
        pytest.param(signal.SIGKILL, "spawn", marks=pytest.mark.slow),  # as the engine itself starts its workers
        pytest.param(signal.SIGTERM, "spawn", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_killed_search_leaves_no_process_and_can_be_resumed(tmp_path, fake, monkeypatch, capfd, number, method):
    monkeypatch.setattr(local_engine, "SPAWN", multiprocessing.get_context(method))
    process = multiprocessing.get_context("fork").Process(target=slow_search, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "acc").exists() or not read_results(tmp_path):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in capfd.readouterr().err or number == signal.SIGKILL
    gone, alive = psutil.wait_procs(workers, timeout=10)
    for left in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    assert len(gone) >= 2 and not alive
    before = read_results(tmp_path)
    fake(evaluate)
    results = searched(tmp_path, resume=True)
    assert 0 < len(before) < len(results) == 18
    assert {tuple(r["architecture"]) for r in results} == set(itertools.chain(*generations()))

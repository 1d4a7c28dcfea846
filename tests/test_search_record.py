"""What a search leaves on disk, whole wherever it stops."""

import errno
import itertools
import json
import math
import os

import made_search
import pytest
from made_search import SPACE, read_results, result, reward, settings

import utils
from engines.search_files import ranked, read_generations, state_path
from engines.search_record import SearchRecord, prepare_search
from space.evolution import Evolution
from space.limits import Limits, bounds_of
from utils import UserError, hold_lock, read_json

SETTINGS = settings(seed=5)


def fill(out, order=list, stop_after=math.inf):
    """A search in `out`, started or resumed, with results in an order, `stop_after` of them; returns their number."""
    prepare_search(out, SETTINGS, resume=True)
    searching, n = SearchRecord(out), 0
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
    assert fill(tmp_path) == 13  # with the largest
    files = artefacts(tmp_path)
    numbered = [f"{g:03}" for g in range(3)]
    assert files.keys() == {
        *(f"acc/{g}.jsonl" for g in numbered), *(f"id2cand/{g}.json" for g in numbered), "checkpoints/best.json",
        "checkpoints/largest.json", *(f"checkpoints/{g}_{i:03}.json" for g in numbered for i in range(4)),
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


def test_a_search_may_rank_by_the_loss(tmp_path):
    """Parents, files and winner follow the loss, here the opposite of accuracy; without a loss, a candidate failed."""
    settings = SETTINGS | {"rank_by": "loss"}
    prepare_search(tmp_path, settings, resume=False)
    searching, asked = SearchRecord(tmp_path), []
    while waiting := searching.pending():
        asked += waiting
        for candidate in waiting:
            searching.add(result(candidate, loss=reward(candidate) / 9 if sum(candidate) % 5 else None))
    results = read_results(tmp_path)
    assert {r["acc1"] is None for r in results} == {True, False}
    assert all((r["acc1"] is None) == (sum(r["architecture"]) % 5 == 0) for r in results)
    assert all(r["score"] == -r["loss"] for r in results if r["acc1"] is not None)
    generations = [[r["loss"] for r in some if r["loss"]] for some in read_generations(tmp_path)]
    assert all(losses == sorted(losses) for losses in generations)
    assert (
        ranked(results)[0]
        == read_json(state_path(tmp_path))["best"]
        == min((r for r in results if r["loss"]), key=lambda r: r["loss"])
    )
    assert SPACE.load_architecture(tmp_path / "checkpoints/best.json") == tuple(ranked(results)[0]["architecture"])

    evolution, told = Evolution.from_settings(SPACE, SETTINGS), []
    while population := evolution.ask():
        told += population
        evolution.tell({c: -reward(c) if sum(c) % 5 else None for c in population})
    assert asked == [*told, Limits(SPACE, bounds_of(settings)).largest()]

    searching.lock.close()
    with pytest.raises(UserError, match=r"other settings: --rank-by acc1 \(was loss\)"):
        prepare_search(tmp_path, SETTINGS, resume=True)


def test_the_largest_legal_candidate_is_evaluated_last_and_changes_nothing(tmp_path, monkeypatch):
    def ran(name, **changes):
        record = made_search.fill(tmp_path / name, SETTINGS | changes)
        record.lock.close()
        found = record.state["largest"]
        assert SPACE.load_architecture(tmp_path / name / "checkpoints" / "largest.json") == tuple(found["architecture"])
        return found, [tuple(r["architecture"]) for r in read_results(tmp_path / name)]

    whole = Limits(SPACE, bounds_of(SETTINGS)).largest()
    found, evaluated = ran("whole")
    assert found == {**evaluated_alone(whole), "of_all": True} and whole not in evaluated
    assert ran("whole", generations=4)[0] == found  # is not evaluated again
    with monkeypatch.context() as patch:  # where nothing finds it
        patch.setattr(Limits, "largest", lambda limits: None)
        found, same = ran("of those evaluated")
    largest = max(evaluated, key=SPACE.flops)
    assert same == evaluated and found == {**evaluated_alone(largest), "of_all": False}
    with monkeypatch.context() as patch:  # where the search has evaluated it
        patch.setattr(Limits, "largest", lambda limits: evaluated[1])
        patch.setattr(SearchRecord, "add", forbidden_twice(SearchRecord.add))
        assert ran("known")[0] == {**evaluated_alone(evaluated[1]), "of_all": True}


def evaluated_alone(candidate):
    return {"flops": SPACE.flops(candidate), "loss": None, **result(candidate)}


def forbidden_twice(add):
    seen = set()

    def once(record, found, trial=None):
        assert tuple(found["architecture"]) not in seen
        seen.add(tuple(found["architecture"]))
        return add(record, found, trial)

    return once


def test_files_do_not_depend_on_the_order_of_arrival(tmp_path):
    fill(tmp_path / "a")
    fill(tmp_path / "b", order=lambda waiting: waiting[::-1])
    assert artefacts(tmp_path / "a") == artefacts(tmp_path / "b")


def test_search_that_stops_anywhere_resumes_to_the_same_end(tmp_path):
    fill(tmp_path / "undisturbed")
    for n in range(14):
        assert fill(tmp_path / str(n), stop_after=n) == n
        if n in (1, 6):  # died while writing, and again one result later
            path = sorted((tmp_path / str(n) / "acc").glob("*"))[-1]
            path.write_text(path.read_text() + '{"architecture": [1, 2')
            assert fill(tmp_path / str(n), stop_after=1) == 1
        assert fill(tmp_path / str(n)) == 13 - n - (n in (1, 6))
        assert artefacts(tmp_path / str(n)) == artefacts(tmp_path / "undisturbed")


def test_search_that_dies_while_closing_a_generation_resumes_to_the_same_end(tmp_path, monkeypatch):
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
    searching = SearchRecord(tmp_path)
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
    searching = SearchRecord(tmp_path)
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
    with pytest.raises(UserError, match=r"other settings: --seed 6 \(was 5\), --select 3 \(was 2\)"):
        prepare_search(tmp_path, SETTINGS | {"seed": 6, "select": 3}, resume=True)
    assert prepare_search(tmp_path, SETTINGS, resume=True)["evaluated"] == 1
    state_path(tmp_path).write_text("{}")
    with pytest.raises(UserError, match="not the state of a search"):
        prepare_search(tmp_path, SETTINGS, resume=True)


def test_each_start_is_kept_with_the_time_of_its_last_result(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("engines.search_record.time.time", lambda: clock[0])
    for command in "ab":
        prepare_search(tmp_path, SETTINGS, resume=True, start={"command": command})
        searching = SearchRecord(tmp_path)
        clock[0] += 10
        searching.add(result(searching.pending()[0]))
        searching.lock.close()
        clock[0] += 1000
    starts = read_json(state_path(tmp_path))["starts"]
    assert [(start["command"], start["last"] - start["begun"]) for start in starts] == [("a", 10), ("b", 10)]


def test_damaged_results_are_named(tmp_path):
    fill(tmp_path, stop_after=3)
    path = tmp_path / "acc/000.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:40], lines[2]]) + "\n")
    with pytest.raises(UserError, match=r"000\.jsonl: line 2 is damaged"):
        read_results(tmp_path)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyError), utils.atomic_write(path) as file:
        file.write("half")
        file.flush()
        assert path.read_text() == "old"
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with utils.atomic_write(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_lock_is_held_by_one(tmp_path):
    with hold_lock(tmp_path / "a.lock"):
        with pytest.raises(UserError, match="another run is using"):
            hold_lock(tmp_path / "a.lock")
        hold_lock(tmp_path / "b.lock").close()
    hold_lock(tmp_path / "a.lock").close()


def refuses(error):
    def call(*_, **__):
        raise OSError(error, os.strerror(error))

    return call


@pytest.mark.parametrize("error", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def test_where_files_have_no_locks_one_warning_says_so(tmp_path, monkeypatch, caplog, error):
    """NFS, FUSE and Lustre, by their mounts."""
    monkeypatch.setattr(utils.fcntl, "flock", refuses(error))
    for name in "ab":
        hold_lock(tmp_path / f"{name}.lock").close()
    (warning,) = caplog.messages
    assert str(tmp_path) in warning and "a second run in it would go unnoticed" in warning


def test_a_lock_that_fails_names_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(utils.fcntl, "flock", refuses(errno.EIO))
    with pytest.raises(OSError) as found:
        hold_lock(tmp_path / "a.lock")
    assert found.value.filename == str(tmp_path / "a.lock")


def test_files_are_written_where_their_mode_cannot_be_changed(tmp_path, monkeypatch):
    """exFAT, CIFS, WSL."""
    monkeypatch.setattr(os, "chmod", refuses(errno.EPERM))
    utils.write_json(tmp_path / "a.json", 1)
    assert read_json(tmp_path / "a.json") == 1

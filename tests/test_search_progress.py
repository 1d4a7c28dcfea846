"""What is seen of a running search: on a terminal, in a log, in TensorBoard."""

import io
import json
import logging
import math
import re
import statistics
import sys

import pytest
from made_search import SPACE, fill, result, settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tqdm import tqdm

from engines import progress
from engines.generations import Generation
from engines.progress import Progress
from engines.search_files import read_generations, state_path
from engines.search_record import SearchRecord
from reports.page import write_report
from space.limits import shown
from space.search_space import OPERATIONS, SearchSpace
from utils import Pace, UserError, _ScreenLog, log, read_json, write_json

SETTINGS = settings()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def lines(monkeypatch):
    """The lines of the log."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    monkeypatch.setattr(log, "handlers", [handler])
    before = log.level
    log.setLevel(logging.INFO)
    yield found
    log.setLevel(before)


def search(out, stop_after=None, **changes):
    """A search with progress, started or resumed: results come one by one, and some candidates fail."""
    progress = Progress(out)

    def evaluate(candidate):
        if sum(candidate) % 4 == 2:
            return "broken"
        return result(candidate, acc1=sum(candidate), loss=9 - sum(candidate) / 10, n_images=10_000)

    fill(out, SETTINGS | changes, evaluate, stop_after or math.inf, progress.read)
    progress.read()
    return progress


def curves(out):
    """{tag: [(step, value)]} as TensorBoard reads them."""
    events = EventAccumulator(
        str(out / "checkpoints" / "search" / "tensorboard"), size_guidance={"histograms": 0, "scalars": 0}
    )
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars | {
        f"{tag} histogram": [(e.step, e.histogram_value.num) for e in events.Histograms(tag)]
        for tag in events.Tags()["histograms"]
    }


def expected_curves(out):
    rows, best = {}, None
    for step, results in enumerate(read_generations(out), 1):
        good = [r for r in results if r["acc1"] is not None]
        leader = max(good, key=lambda r: r["acc1"])
        best = leader if best is None or leader["acc1"] > best["acc1"] else best
        values = {
            "acc1_best": leader["acc1"], "acc1_best_so_far": best["acc1"],
            "acc1_mean": statistics.fmean(r["acc1"] for r in good),
            "loss_best": leader["loss"], "loss_best_so_far": best["loss"],
            "loss_mean": statistics.fmean(r["loss"] for r in good),
            "acc1_sd": statistics.stdev(r["acc1"] for r in good), "mflops_best_so_far": best["flops"] / 1e6,
            "mflops_mean": statistics.fmean(r["flops"] / 1e6 for r in good), "failed": len(results) - len(good),
            "acc1 histogram": len(good), "mflops histogram": len(good),
        }  # fmt: skip
        for tag, value in values.items():
            rows.setdefault(f"search/{tag}", []).append((step, pytest.approx(value, rel=1e-5)))
    return rows


def test_tensorboard_has_a_step_for_each_generation(tmp_path, lines):
    search(tmp_path)
    assert len(curves(tmp_path)["search/acc1_best"]) == 3
    assert curves(tmp_path) == expected_curves(tmp_path)


@pytest.mark.parametrize("n", [2, 4, 6, 8])
def test_a_resumed_search_has_every_generation_once(tmp_path, lines, n, monkeypatch):
    # TensorBoard reads files in the order of their names: second, host, process, number. One process writes both here.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    search(tmp_path, stop_after=n)
    search(tmp_path)
    assert curves(tmp_path) == expected_curves(tmp_path)


def heads(lines):
    """(generation, candidates) of the lines of the log."""
    found = [re.match(r"generation (\d+) of \d+: (\d+) candidates so far, ", line) for line in lines]
    return [(int(m[1]), int(m[2])) for m in found if m]


def test_a_log_has_a_line_after_the_first_candidate_and_one_a_generation_but_no_bar(tmp_path, lines, capsys):
    search(tmp_path)
    assert capsys.readouterr().err == ""
    assert heads(lines) == [(1, 1), (1, 4), (2, 8), (3, 12)]
    best = max(
        (r for results in read_generations(tmp_path) for r in results if r["acc1"] is not None), key=lambda r: r["acc1"]
    )
    words = f"best {best['acc1']:.2f}% (loss {best['loss']:.3f}) at {shown('flops', best['flops'])} FLOPs; "
    assert words in lines[-1]


def test_the_best_of_a_generation_is_that_of_the_score():
    by_loss = [{"acc1": 90.0, "acc5": 99.0, "loss": 2.0, "score": -2.0}, {"acc1": 80.0, "acc5": 98.0, "loss": 1.0}]
    by_loss[1]["score"] = -1.0
    assert Generation(1, by_loss, True).best["acc1"] == 80
    assert Generation(1, [{**r, "score": r["acc1"]} for r in by_loss], True).best["acc1"] == 90


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({"limits": {"flops": [None, 10**12]}}, ")"),  # excludes no candidate
        ({"limits": {"params": [None, SPACE.cost_value("params", "60%", "")]}}, " parameters"),
        ({"rank_by": "loss", "limits": {"flops": [1, 10**12]}}, "%)"),
    ],
)
def test_the_best_is_named_with_its_score_first_and_the_costs_that_are_limited(tmp_path, lines, changes, ends):
    search(tmp_path, **changes)
    best = lines[-1].split("; ")[0].partition("so far, ")[2]
    assert best.startswith("best loss " if "rank_by" in changes else "best ") and best.endswith(ends), best
    assert ("(top-1 " in best) == ("rank_by" in changes) and (" at " in best) == ("parameters" in ends)


def test_a_log_has_a_line_every_half_minute_with_the_time_to_go(tmp_path, lines, monkeypatch):
    """With 20 s a candidate, and 100 s in the last generation; what ends a generation has one line."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Pace, "WINDOW_S", 60)
    add = SearchRecord._append

    def slowly(self, *args):
        now[0] += 20 if self.evolution.generation < 2 else 100
        return add(self, *args)

    monkeypatch.setattr(SearchRecord, "_append", slowly)
    search(tmp_path)
    assert heads(lines) == [(1, 1), (1, 3), (1, 4), (2, 6), (2, 8), (3, 9), (3, 10), (3, 11), (3, 12)]
    to_go = [line.split("; ")[1] for line in lines if line.startswith("generation")]
    assert to_go[:5] == ["3.7 min to go", "3.0 min to go", "2.7 min to go", "2.0 min to go", "80 s to go"]
    assert to_go[-3:] == ["3.3 min to go", "100 s to go", "0 s to go"]


def test_children_that_are_not_new_are_counted_and_an_exhausted_space_is_named(tmp_path, lines, undrawn):
    """Of 4 candidates, 3 at a time: one is left for the second generation, and none for the third."""
    space = SearchSpace(stage_blocks=(1,), stage_strides=(2,), stage_channels=(32,), operations=OPERATIONS)
    changes = {"space": space.to_dict(), "flops_limit": 10**12, "population": 3, "select": 1, "mutation": 1}
    search(tmp_path, **changes, crossover=1, mutation_prob=0)
    assert read_json(state_path(tmp_path))["children"][0] == 0
    (line,) = [line for line in lines if line.startswith("generation 2")]
    assert line.endswith("; 0 of 2 children were new, random candidates stand for the others")
    assert lines[-1].startswith("the space is exhausted: ") and lines[-1].endswith("ends with 4")
    page = write_report(tmp_path).read_text()
    assert "2 generations, finished: no further candidate within the limits is new" in page
    assert "<td>0 of 2</td>" in page


def test_a_terminal_has_a_bar(tmp_path, lines, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = search(tmp_path, stop_after=5)
    progress.bar.refresh()
    shown = terminal.getvalue().split("\r")[-1]
    assert shown.startswith("generation 2 of 3, best ") and " 5/12 [" in shown and " at " in shown
    assert re.search(r", \d+ s to go\]", shown)
    assert heads(lines) == [(1, 4)]
    progress.bar.close()
    search(tmp_path)
    assert "| 5/12 [00:00]" in terminal.getvalue()  # where it resumes
    assert not terminal.getvalue().split("\r")[-1].strip()  # nothing is left of it


def test_lines_go_above_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with tqdm(total=3) as bar:
        _ScreenLog(terminal).emit(logging.makeLogRecord({"msg": "a line"}))
        bar.refresh()
    shown = terminal.getvalue()
    before, after = shown.split("a line\n")
    assert before.rsplit("\r", 2)[1].strip() == "" and before.endswith("\r") and "0/3" in after


def test_a_tuner_that_gave_up_is_an_error(tmp_path, lines):
    progress = search(tmp_path, stop_after=2)
    state = state_path(tmp_path)
    state.write_text(state.read_text().replace('"error": null', '"error": "the disk is full"'))
    with pytest.raises(UserError, match="the search cannot continue: the disk is full"):
        progress.read()


def test_a_closed_generation_is_read_once(tmp_path, lines):
    progress = search(tmp_path, stop_after=5)
    (tmp_path / "acc" / "000.jsonl").write_text("not read again\n")
    results = read_generations(tmp_path, skip=1)[0]
    with open(tmp_path / "acc" / "001.jsonl", "a") as file:
        file.write(json.dumps({**results[0], "acc1": 99.5}) + "\n")
    state = read_json(state_path(tmp_path))
    write_json(state_path(tmp_path), state | {"evaluated": state["evaluated"] + 1})
    progress.read()
    assert [len(generation.results) for generation in progress.generations] == [4, 2]
    assert progress.generations[1].best["acc1"] == 99.5

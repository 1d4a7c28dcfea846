"""bench/worth.py and lengths.py: what they draw, keep, resume, and conclude from rows that are made up."""

import itertools
import json
import math
import pathlib
import sys

import make_letters
import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from bench import lengths, spaces, worth
from bench import study as shared
from engines.search_files import state_path
from images.dataset import Data
from settings.subjects import DataConfig


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The study of the bundled images, with an empty file of results."""
    monkeypatch.setattr(spaces, "RESULTS", tmp_path / "spaces.jsonl")
    monkeypatch.setattr(worth, "RESULTS", tmp_path / "worth.json")
    for part, name in itertools.product(("train", "val"), map(str, range(10))):
        (tmp_path / "images" / part / name).mkdir(parents=True)
        (tmp_path / "images" / part / name / "0.png").touch()
    return spaces.Study(ROOT / "bench" / "varied_fashion.yml", ["--data-dir", str(tmp_path / "images")], tmp_path)


def test_the_largest_is_the_largest_and_random_ones_are_legal(study):
    space = study.space
    for target in worth.TARGETS:
        limits = worth.Limits(space, worth.make_bounds(space, [f"flops={target}"]))
        largest = space.flops(worth.largest_legal(space, target))
        assert largest <= space.cost_value("flops", target) and largest > 0.99 * space.cost_value("flops", target)
        drawn = worth.random_legal(study, target)
        assert len(drawn) == 5 and not any(map(limits.excess, drawn.values()))
        assert all(study.legal(30)[int(name.split()[1]) - 1] == candidate for name, candidate in drawn.items())


def test_torchvisions_network_keeps_the_size_in_its_stem():
    model = worth.Baseline(10).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert model.path()[0](images).shape == (2, 24, 32, 32)
        assert torch.allclose(model(images), model.net(images), atol=1e-5)


class Fake(shared.Command):
    """A command that takes a moment and prints a result, or fails."""

    def __init__(self, folder, code=0):
        super().__init__("", [], folder)
        self.words = [sys.executable, "-c", f'print(\'{{"acc1": 60.0, "n_images": 5}}\'); raise SystemExit({code})']


def test_tasks_wait_for_what_they_need_and_are_kept(study, tmp_path):
    def tasks():
        first = shared.Task([study.name, "search", 0, "59%"], Fake(tmp_path / "a"))
        second = shared.Task([study.name, "retraining", 0, "59%", "winner", 1], Fake(tmp_path / "b"), first.key)
        return [second, first]

    (tmp_path / "a").mkdir()
    (tmp_path / "a/costs.jsonl").write_text('{"cpu_seconds": 5.5, "exit": -15}\n')  # it was interrupted before
    rows, settings = [], {study.name: study.digest}
    worth.run(tasks, rows, settings, 2, math.inf)
    assert [row["key"][1] for row in rows] == ["search", "retraining"]
    assert rows[1]["acc1"] == 60 and rows[0]["cpu_seconds"] >= 5.5
    assert json.loads(worth.RESULTS.read_text())["rows"] == rows
    before = (tmp_path / "a/costs.jsonl").read_text()
    worth.run(tasks, rows, settings, 2, math.inf)  # nothing is left to do
    assert (tmp_path / "a/costs.jsonl").read_text() == before and len(rows) == 2


def test_a_search_that_was_interrupted_resumes(study, tmp_path):
    def words():
        (task,) = [task for task in worth.Tasks(study, tmp_path, []).missing() if task.key[1:] == ["search", 0, "10%"]]
        task.prepare()
        return task.command.words, task.command.folder

    weights = study.folder(tmp_path) / "0/checkpoints/supernet/checkpoint-0003000.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    first, folder = words()
    assert str(weights) in first and "--resume" not in first
    state = {"settings": {}, "generation": 0, "evaluated": 24, "best": None, "done": False}
    worth.write_json(state_path(folder), state)
    assert words()[0] == [*first, "--resume"]


def test_a_command_that_is_ended_does_not_run(tmp_path):
    command = Fake(tmp_path / "a")
    assert not command.running()
    command.start()
    assert command.end() in (0, -15) and not command.running()


def test_a_task_that_fails_is_named_and_what_needs_it_does_not_run(study, tmp_path, capsys):
    first = shared.Task([study.name, "search", 0, "59%"], Fake(tmp_path / "a", 3))
    second = shared.Task([study.name, "retraining", 0, "59%", "winner", 1], Fake(tmp_path / "b"), first.key)
    rows = []
    worth.run(lambda: [second, first], rows, {}, 1, math.inf)
    assert not rows and "failed with exit code 3" in capsys.readouterr().out


def made_up(study):
    """Rows in which a search costs 10, a retraining 10, a supernet 100, and accuracy grows with log2 of the steps."""
    rows = []

    def add(acc1, seconds, *key):
        rows.append({"key": [study.name, *key], "settings": study.digest, "acc1": acc1, "cpu_seconds": seconds})

    for seed in range(2):
        add(None, 100, "supernet", seed)
        for target in worth.TARGETS:
            add(None, 10, "search", seed, target)
            add(63 + seed, 10, "retraining", seed, target, "winner", 1)
    add(64.5, 30, "retraining", 0, "59%", "winner", 3)
    names = list(worth.random_legal(study, "59%"))
    for i, name in enumerate(names):  # the third of the five is the typical one
        add(60 + i, 10, "retraining", 0, "", name, 1)
    for multiple in (1, 3, 9):
        add(50 + math.log2(multiple), 10 * multiple, "retraining", 0, "", worth.BASELINE, multiple)
        add(62 + math.log2(multiple), 10 * multiple, "retraining", 0, "59%", "largest", multiple)
        if multiple > 1:
            add(62 + math.log2(multiple), 10 * multiple, "retraining", 0, "", names[2], multiple)
    return rows


def test_equal_retraining_and_equal_total(study):
    made = made_up(study)
    rows = worth.Rows(made, study)
    row = worth.equal_retraining(rows)["59%"]
    assert row["winner"] == [63.5, 0.5, 2] and row["random"] == [62, pytest.approx(math.sqrt(0.5)), 5]
    assert row["largest"] == [62, None, 1] and worth.equal_retraining(rows)["30%"]["winner"] == [63.5, 0.5, 2]
    total = {(line["steps"], line["targets"]): line for line in worth.equal_total(rows, "59%")}
    assert sorted(total) == [(steps, n) for steps in (1, 3) for n in (1, 2, 3)]
    for (steps, n), line in total.items():  # alone for as long: the supernet's share, a search and a retraining
        seconds = 100 / n + 10 + 10 * steps
        assert line["seconds of each"] == pytest.approx(seconds)
        assert line["winner"][0] == {1: 63.5, 3: 64.5}[steps]
        more = math.log2(min(seconds, 90) / 10)
        assert line["typical"] == [pytest.approx(62 + more), 90]
        assert line[worth.BASELINE][0] == pytest.approx(50 + more)
    # 63.5 is reached alone after 2^1.5 retrainings, 28.3; a search and a retraining cost 20, a supernet 100
    assert worth.break_even(rows, "59%", 1) == pytest.approx(100 / (10 * 2**1.5 - 20))
    assert worth.break_even(rows, "10%", 1) is None  # the typical one is not known there
    without = worth.Rows([row for row in made if row["key"][1] != "supernet"], study)
    assert worth.equal_total(without, "59%") == []


def test_the_report_is_beside_the_rows(study, capsys):
    worth.write_json(worth.RESULTS, {"rows": made_up(study)})
    worth.report([study], worth.kept([study]))
    summary = json.loads(worth.RESULTS.read_text())["summary"][study.name]
    assert [line["winner"][0] for line in summary["equal total"]["59%"]] == [63.5] * 3 + [64.5] * 3
    assert worth.RESULTS.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    study.key = study.key | {"settings": {}}
    with pytest.raises(worth.utils.UserError, match="other settings of varied_fashion"):
        worth.kept([study])


def test_what_matters_most_is_first(study, tmp_path):
    def missing(rows):
        return [task.key[1:] for task in worth.Tasks(study, tmp_path, rows).missing()]

    found = missing([])
    assert len(found) == len(set(map(tuple, found))) and found[:2] == [["supernet", 0], ["search", 0, "59%"]]
    assert [key for key in found if key[0] == "search"] == [
        ["search", seed, target]
        for seed, target in [(0, "59%"), (0, "30%"), (0, "10%"), (1, "59%"), (2, "59%")]
        + [(seed, target) for seed in (1, 2) for target in ("10%", "30%")]
    ]
    # what bench/spaces.py has trained is not trained again
    (name, candidate), *_ = worth.random_legal(study, "59%").items()
    study.keep("training", {"architecture": list(candidate), "seed": 0, "acc1": 50.0, "cpu_seconds": 10})
    assert ["retraining", 0, "", name, 1] in found and ["retraining", 0, "", name, 1] not in missing([])
    # the typical network is known when all random ones are trained
    typical = ["retraining", 0, "", list(worth.random_legal(study, "59%"))[2], 3]
    known = missing([row for row in made_up(study) if row["key"][1:] != typical])
    assert typical not in found and known.index(typical) < known.index(["supernet", 2])


def test_a_comparison_is_judged_by_what_its_pick_is_worth():
    """Held-out top-1 follows val from half of the steps on; before, it is the opposite; one training is missing."""
    names = ["winner", "largest", *(f"random {i}" for i in range(1, 7))]
    rows = [
        {"set": name, "seed": seed, "who": who, "steps": steps, "val": 10 * i + steps / 100, "heldout": sign * i}
        for name, seed in (("bundled", 0), ("bundled", 1), ("letters", 0))
        for i, who in enumerate(names)
        for steps, sign in ((50, -1), (100, -1), (200, 1), (400, 1))
    ]
    rows = [*rows[:-1], {"set": "letters", "who": "winner"}]
    assert not lengths.summary(rows, 1600)
    found = lengths.summary(rows, 400)
    assert found.keys() == {"bundled"} and found["bundled"]["seeds"] == 2 and found["bundled"]["tau of two seeds"] == 1
    shares = found["bundled"]["shares"]
    assert [shares[n]["tau"] for n in ("8", "4", "2", "1")] == [-1, -1, 1, 1]
    assert [shares[n]["regret"] for n in ("8", "4", "2", "1")] == [70, 70, 0, 0]
    assert shares["4"]["chosen"] == 1 and shares["4"]["alone: random 1"] == 24


def test_letters_are_drawn_from_fonts(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        make_letters.main(["--fonts", str(tmp_path)])
    assert f"--fonts {tmp_path}: has no fonts" in capsys.readouterr().err
    fonts = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
    make_letters.main(["--fonts", str(fonts), "--out", str(tmp_path / "letters")])
    data = Data(tmp_path / "letters", DataConfig(28, 28, heldout_per_class=2, group_by="(.*)_"))
    assert data.classes == tuple(make_letters.LETTERS) and len(data.val) >= 16 * 2
    families = [{pathlib.Path(path).name.partition("_")[0] for path in part.paths} for part in (data.train, data.val)]
    assert {"dejavusans", "dejavuserif"} <= families[0] | families[1] and not families[0] & families[1]
    names = [path.rpartition("_")[0] for path in data.images("supernet").paths]
    assert not set(names) & {path.rpartition("_")[0] for path in data.images("search").paths}
    pixels = {np.asarray(Image.open(path)).tobytes() for path in (tmp_path / "letters" / "train").rglob("dejavusans_*")}
    assert len(pixels) > 16

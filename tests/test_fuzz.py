"""A few hundred inputs of faults/fuzz.py for each parser, and what its longer runs have found."""

import sys

import pytest
import torch

import scratch
from engines.nni_engine import read_experiment
from faults import fuzz
from space import weight_files
from space.search_space import SearchSpace
from training import checkpoint
from utils import UserError


@pytest.mark.parametrize("name", fuzz.PARSERS)
def test_whatever_comes_is_taken_or_refused_in_a_line(tmp_path, name):
    target, outcomes = fuzz.PARSERS[name](tmp_path / "input"), []
    n = 40 if name == "checkpoint" else 150
    fuzz.each_input(target, 1, n, lambda drawn: outcomes.append(fuzz.outcome(target, drawn)))
    assert len(outcomes) == n
    if name == "checkpoint":  # hardly any damaged one is taken
        outcomes += [fuzz.outcome(target, undamaged) for undamaged in target.bytes]
        assert outcomes[-len(target.bytes) :] == ["taken"] * len(target.bytes)
    assert set(outcomes) <= {"taken", "refused", "help"}, outcomes
    assert "taken" in outcomes and "refused" in outcomes


def test_the_fuzz_sees_what_is_wrong(tmp_path, monkeypatch):
    target = fuzz.Yaml(tmp_path / "input")
    monkeypatch.setattr(target, "parse", lambda drawn: [][drawn])
    assert fuzz.outcome(target, 3) == "IndexError: list index out of range"
    monkeypatch.setattr(target, "parse", lambda drawn: sys.exit(3))
    assert fuzz.outcome(target, 3) == "SystemExit 3"


def test_a_failure_is_shown_with_the_smallest_input(monkeypatch):
    monkeypatch.setattr(fuzz.resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(fuzz.CommandLine, "parse", lambda self, drawn: [][len(drawn[1]) // 3 :][0])
    row = fuzz.fuzz("command_line", 0, 100)
    assert row["failed"] and row["failure"].startswith("IndexError: list index out of range: ('supernet', ['--")


@pytest.mark.parametrize(
    "text",
    ["common: {seed: !!int ''}", "common: {seed: !!bool x}", "common: {seed: !!timestamp x}",
    'common: {out: "a\\0b"}', 'common: {out: "\\ud800"}',
     fuzz.laughs("common"), "x" * 100_001, "common: {crop-scale: [[1, 2]]}"],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_yaml_that_broke_the_reader_or_made_endless_errors(tmp_path, text):
    (tmp_path / "c.yml").write_text(text)
    for read in (read_experiment, lambda path: scratch.parse_args(["--config", str(path)])):
        with pytest.raises(UserError, match=r"c\.yml: ") as error:
            read(tmp_path / "c.yml")
        assert len(str(error.value)) < 500


def test_a_path_that_is_a_number_is_a_path(tmp_path):
    (tmp_path / "c.yml").write_text("common: {out: 7}")
    assert scratch.parse_args(["--config", str(tmp_path / "c.yml")]).out == str(tmp_path / "7")


def test_an_endless_word_makes_a_short_error():
    with pytest.raises(UserError) as error:
        scratch.parse_args(["--lr", "9" * 5000])
    assert "--lr" in str(error.value) and len(str(error.value)) < 500


def test_a_checkpoint_that_speaks_of_a_giant_gets_no_memory(tmp_path):
    space = SearchSpace(28, 3, 1, (1,), (1,), (1_000_000,), 2, 1_000_000)  # some 40 TB
    content = {
        "version": 1,
        "kind": "supernet",
        "model": {"a": torch.zeros(1)},
        "space": space.to_dict(),
        "data": {},
        "split": None,
        "classes": [],
    }
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c\.pth: entry 'a' is of another model"):
        checkpoint.load_supernet(tmp_path / "c.pth", None)


@pytest.mark.parametrize(
    "changes",
    [{"version": torch.zeros(3)}, {"kind": torch.zeros(3)}, {"data": 3}, {"data": [1]}, {"data": {"input_size": "a"}},
    {"data": {"crop_scale": 3}},
     {"data": {"jitter": torch.zeros(2)}}, {"data": {"mirror": 1}}, {"classes": 7}, {"classes": [torch.zeros(2)]},
     {"split": 1},
     {"split": torch.zeros(2)},
     {"split": {"seed": torch.zeros(3)}}, {"space": None}, {"architecture": 5}, {"architecture": torch.zeros(20)}],
    ids=str,
)  # fmt: skip
def test_checkpoints_of_the_wrong_types(tmp_path, changes):
    content = {
        "version": 1,
        "kind": "scratch",
        "model": {"a": torch.zeros(1)},
        "space": {},
        "data": {},
        "split": None,
        "classes": [],
    }
    torch.save(content, tmp_path / "c.pth")
    weight_files.load(tmp_path / "c.pth", "scratch")
    torch.save(content | changes, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c\.pth: |search space: |architecture"):
        weight_files.load(tmp_path / "c.pth", "scratch")

"""The study on NAS-Bench-Macro: its space is the published one, its statistics are right, a small run resumes."""

import itertools
import json
import random
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT

from bench import macro as bench
from bench import study
from images import bundled
from space import own
from space.custom import _fields
from space.evolution import Evolution
from space.search_space import SearchSpace
from space.twins import identities
from training import checkpoint
from training.evaluation import evaluate

TRUTH = bench.load_truth()
DISTINCT = sorted({bench.distinct(network) for network in TRUTH})


@pytest.fixture(scope="module")
def space():
    own.load(bench.OPERATIONS)
    section = yaml.safe_load(bench.SETTINGS.read_text())["space"]
    return own.with_hash(SearchSpace(input_size=32, n_classes=10, **_fields(section, "macro.yml")))


def test_costs_of_all_networks_are_the_published_ones(space):
    assert len(TRUTH) == 6561 == len({*itertools.product("012", repeat=8)})
    for network, published in TRUTH.items():
        candidate = tuple(map(int, network))
        assert (space.flops(candidate), space.params(candidate)) == (published["flops"], published["params"]), network


def test_networks_that_differ_in_the_place_of_identities_are_one():
    assert len(DISTINCT) == 3969
    assert bench.distinct("00100201") == "00100210" and bench.distinct("12002002") == "12020020"
    for network, published in TRUTH.items():
        assert published == TRUTH[bench.distinct(network)], network


def test_a_search_evaluates_no_twins(space):
    """10 generations of 50, as by search.py, by the published accuracies: without and with what the space knows."""
    settings = {"population": 50, "select": 10, "mutation": 25, "crossover": 25, "generations": 10, "seed": 0}
    settings |= {"mutation_prob": 0.1, "flops_limit": space.cost_value("flops", "59%")}
    twins = {}
    for known in ({}, {"identities": json.loads(json.dumps(identities(space)))}):
        for kind in ({}, {"mutation": 0, "crossover": 0}):
            evolution = Evolution.from_settings(space, settings | kind | known)
            while population := evolution.ask():
                evolution.tell({c: TRUTH["".join(map(str, c))]["mean_acc"] for c in population})
            found = list(itertools.chain(*evolution.history))
            assert len(found) == 500
            twins[bool(known), bool(kind)] = 500 - len({*map(space.canonical, found)})
    assert twins == {(False, False): 97, (False, True): 37, (True, False): 0, (True, True): 0}


def test_rank_agrees_with_the_definition(monkeypatch):
    monkeypatch.setattr(study, "DRAWS", 200)
    rng = random.Random(0)
    networks = rng.sample(DISTINCT, 40)
    true = {n: TRUTH[n]["mean_acc"] for n in networks}
    noisy = {n: true[n] + rng.gauss(0, 1) for n in networks}
    found = bench.rank(networks, [true, noisy], TRUTH)
    pairs = [(a, b) for a, b in itertools.combinations(networks, 2)]

    def tau(score):
        return sum((score[a] > score[b]) == (true[a] > true[b]) for a, b in pairs) / len(pairs) * 2 - 1

    assert found["supernet"][0] == pytest.approx((1 + tau(noisy)) / 2, abs=1e-3)
    for name in ("supernet", "FLOPs", "parameters", "minus FLOPs"):
        value, low, high = found[name]
        assert low <= value <= high and high - low > 0.01
    assert found["minus FLOPs"][0] == pytest.approx(found["supernet"][0] - found["FLOPs"][0], abs=2e-3)
    assert found["supernet"][2] - found["supernet"][1] < found["FLOPs"][2] - found["FLOPs"][1]


def test_picks_by_the_truth_itself_and_by_flops(monkeypatch):
    monkeypatch.setattr(bench, "SEARCHES", 5)
    limit = 55_000_000
    true, flops = ({n: TRUTH[n][name] for n in DISTINCT} for name in ("mean_acc", "flops"))
    found = bench.picks(limit, true, flops, TRUTH)
    assert found["the best legal network"] == [92.31, 100.0] and found["a random legal network"][0] == 88.74
    assert found["evolution"][1] > 97 and found["random search"][1] > 95
    assert found["evolution by loss"][1] < 70  # that of the smallest networks
    found = bench.picks(limit, flops, {n: -accuracy for n, accuracy in true.items()}, TRUTH)
    assert found["evolution by loss"][1] > 97
    assert found["evolution"][0] >= found["a random legal network"][0]
    assert found["the largest legal network"][0] == 90.69


def test_evolution_stays_legal_and_finds_the_best_of_what_it_asked(monkeypatch):
    asked = []

    class Scores(dict):
        def __missing__(self, network):
            asked.append(network)
            return TRUTH[network]["mean_acc"]

    picked = bench.evolve(35_000_000, Scores(), seed=0)
    assert len(asked) == 110 and max(TRUTH[n]["flops"] for n in asked) <= 35_000_000
    assert TRUTH[picked]["mean_acc"] == max(TRUTH[n]["mean_acc"] for n in asked)


@pytest.mark.slow
def test_a_small_study_resumes(tmp_path):
    images = bundled.unpack(ROOT / "data" / "fashion-mnist")
    words = ["--data-dir", images, "--out", tmp_path, "--results", tmp_path / "macro.json", "--width", 0.25]
    words += ["--iterations", 2, "--seeds", 2, "--networks", 9, "--every", 20]
    command = [sys.executable, "-m", "bench.macro", *map(str, words)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = (tmp_path / "0.25-0" / "scores.jsonl").read_text().splitlines()
    assert len(lines) == 9
    (tmp_path / "0.25-0" / "scores.jsonl").write_text("\n".join(lines[:4]) + "\n")
    results = json.loads((tmp_path / "macro.json").read_text())
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(again.stdout.splitlines()) == sorted(first.stdout.splitlines())
    assert "finished, nothing to do" in (tmp_path / "0.25-0" / "training.txt").read_text()
    found = json.loads((tmp_path / "macro.json").read_text())
    assert found["scores"] == results["scores"] and len(found["scores"][0]) == 9

    own.load(bench.OPERATIONS)
    network = found["networks"][0]
    file = checkpoint.newest(tmp_path / "0.25-1" / "checkpoints" / "supernet")
    (supernet, _), images = checkpoint.load_supernet(file, None), torch.rand(40, 3, 32, 32)
    batches, candidate = [(images, torch.arange(40) % 10)], tuple(map(int, network))
    ((_, acc1, loss),) = bench.measure(supernet, [network], batches, batches, "average")
    (result,) = evaluate(supernet, [candidate], batches, batches, "average")
    assert acc1 == pytest.approx(result["acc1"], abs=1e-3) and loss > 1

"""The study on NAS-Bench-Macro: its space is the published one, its statistics are right, a small run resumes."""

import itertools
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, load

from images import bundled
from network import ShuffleNetV2OneShot
from space import own
from space.custom import _fields
from space.search_space import SearchSpace
from training import checkpoint
from training.evaluation import evaluate

bench, study = load("bench/macro.py"), load("bench/macro_study.py")
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


def test_rank_agrees_with_the_definition():
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
    assert found["evolution by loss"][1] < 70  # of the smallest networks
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

    picked = bench.evolve(35_000_000, Scores(), TRUTH, seed=0)
    assert len(asked) == 110 and max(TRUTH[n]["flops"] for n in asked) <= 35_000_000
    assert TRUTH[picked]["mean_acc"] == max(TRUTH[n]["mean_acc"] for n in asked)


def test_the_study_of_the_committed_scores(tmp_path, capsys):
    study.main(study.parse_args(["--committed", "--results", str(tmp_path / "study.json")]))
    assert "the mean of the other two: a tau of 0.895" in capsys.readouterr().out
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    found, committed = (json.loads(path.read_text()) for path in (tmp_path / "study.json", study.RESULTS))
    (name, lost), *_ = found["lost"].items()
    assert lost["seeds"]["each other"] == pytest.approx(committed["lost"][name]["seeds"]["each other"], abs=2e-3)
    assert lost["additive"]["tau"] == pytest.approx(committed["lost"][name]["additive"]["tau"], abs=2e-3)


def test_encodings_are_all_of_a_network():
    groups = study.encodings(DISTINCT)
    assert sorted(itertools.chain(*groups.values())) == sorted(TRUTH)
    assert all(group[0] == network for network, group in groups.items())
    assert sorted(study.encodings(["12102001"])["12102001"]) == ["12102001"]
    assert sorted(study.encodings(["12120210"])["12120210"]) == ["12102201", "12102210", "12120201", "12120210"]


def test_each_image_of_each_network_is_measured(space):
    torch.manual_seed(0)
    supernet, networks = ShuffleNetV2OneShot(space=space), ["10220110", "00000000"]
    batches = [(torch.rand(6, 3, 32, 32), torch.arange(6)), (torch.rand(3, 3, 32, 32), torch.arange(3))]
    losses, hits = study.image_by_image(supernet, networks, batches, batches, "average")
    assert losses.shape == (2, 9) and len({*losses.flatten()}) == 18
    candidates = [tuple(map(int, network)) for network in networks]
    for i, result in enumerate(evaluate(supernet, candidates, batches, batches, "average")):
        assert losses[i].mean() == pytest.approx(result["loss"], abs=1e-5)
        assert 100 * hits[i].mean() == pytest.approx(result["acc1"])


def test_mean_weights(tmp_path, space):
    nets = [ShuffleNetV2OneShot(space=space) for _ in range(3)]
    files = [tmp_path / f"{i}.pth" for i in range(2)]
    for net, file in zip(nets, files):
        torch.save(net.state_dict(), file)
    study.mean_weights(nets[2], files)
    for a, b, mean in zip(*(net.parameters() for net in nets)):
        torch.testing.assert_close(mean, (a + b) / 2)


def test_more_images_agree_more_and_seeds_without_bias_reach_the_truth(monkeypatch):
    monkeypatch.setattr(study, "DRAWS", 3)
    rng = np.random.default_rng(0)
    true = rng.normal(size=300)
    values = true[:, None] + rng.normal(scale=20, size=(2, 300, 4000))
    found = study.by_images(values, true)
    (few, itself_few), _, (many, itself) = (found[n] for n in study.SIZES)
    assert few < many and itself_few < itself < many  # two noisy scores agree less than one with the truth
    assert many == pytest.approx(2 / math.pi * math.asin(1 / math.sqrt(1 + 20**2 / 2000)), abs=0.03)
    assert study.by_images(values[:, :, :2000], true)[2000][1] is None
    seeds = study.by_seeds(values.mean(2), true)
    assert seeds["spearman"]["limit"] == pytest.approx(1, abs=0.03)
    assert max(seeds["each"]) < seeds["mean"] < 1 and seeds["each other"] < min(seeds["each"])
    biased = study.by_seeds(values.mean(2) + rng.normal(size=300), true)
    assert biased["spearman"]["limit"] < 0.8


def test_a_bias_by_operation_is_found():
    networks = bench.some_distinct(600)
    assert len({*networks}) == 600 and networks == sorted(networks)
    names, x = study.counts(networks)
    worth = np.random.default_rng(0).uniform(5, 9, len(names))
    true, bias = x @ worth, np.array([3.0 * (name == "stage 3, others, kernel 5, expansion 6") for name in names])
    found = study.additive(networks, true + x @ bias, true)
    differences = {name: supernet - truth for name, (truth, supernet, _) in found["worth"].items()}
    assert max(differences, key=differences.get) == "stage 3, others, kernel 5, expansion 6"
    assert found["tau"]["score"] < found["tau"]["score, corrected"] and found["tau"]["sums"] > 0.95
    assert min(found["explained"].values()) > 0.8
    errors = study.percentiles(true + x @ bias) - study.percentiles(true)
    rows = study.errors_by_count(networks, errors)["stage 3"]["kernel 5, expansion 6"]
    assert rows[0][0] < rows[1][0] < rows[2][0]
    assert sum(rows[n][2] for n in range(4)) == 600
    first = [error for network, error in zip(networks, errors) if network[5] == "2"]
    assert rows["first"][0] == pytest.approx(np.mean(first)) and rows["first"][2] == len(first)


def test_gains_are_over_half_the_images_on_each_half_of_the_networks(monkeypatch):
    monkeypatch.setattr(study.macro, "RESAMPLES", 50)
    networks, rng = bench.some_distinct(600), np.random.default_rng(0)
    true = np.array([TRUTH[network]["mean_acc"] for network in networks])
    groups = study.encodings(networks)
    encoded = np.repeat(true, [*map(len, groups.values())])
    last = np.stack([-encoded[:, None] + rng.normal(scale=40, size=(len(encoded), 200)) for _ in range(2)])
    exact = np.stack([-true[:, None] + np.zeros((600, 200))] * 2)
    rows = study.remedies([{"last": last, "mean of 2": exact}], networks, true)
    assert {len(seeds) for seeds in rows.values()} == {1}
    assert rows["loss, half the images"][0][0][1:] == [0, 0, 0]
    for half in (0, 1):
        assert rows["loss, mean of 2"][0][half][0] == pytest.approx(1)
        taus = {name: seeds[0][half] for name, seeds in rows.items()}
        for value, gain, low, high in taus.values():
            assert gain == pytest.approx(value - taus["loss, half the images"][0], abs=1e-3) and low <= gain <= high
        assert taus["loss, half the images"][0] < taus["loss"][0] < taus["loss, mean over encodings"][0]
        assert taus["top-1"][0] < 0


@pytest.mark.slow
def test_a_small_study_resumes(tmp_path):
    images = bundled.unpack(ROOT / "data" / "fashion-mnist")
    words = ["--data-dir", images, "--out", tmp_path, "--results", tmp_path / "macro.json", "--width", 0.25]
    words += ["--iterations", 2, "--seeds", 2, "--networks", 9, "--every", 20]
    command = [sys.executable, ROOT / "bench" / "macro.py", *map(str, words)]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = (tmp_path / "0.25-0" / "scores.jsonl").read_text().splitlines()
    assert len(lines) == 9
    (tmp_path / "0.25-0" / "scores.jsonl").write_text("\n".join(lines[:4]) + "\n")
    results = json.loads((tmp_path / "macro.json").read_text())
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout == first.stdout and "finished, nothing to do" in again.stderr
    found = json.loads((tmp_path / "macro.json").read_text())
    assert found["scores"] == results["scores"] and len(found["scores"][0]) == 9
    assert (tmp_path / "macro.png").read_bytes().startswith(b"\x89PNG")
    assert found["other scores"].keys() == {"top-1", "loss", "angle", "mean top-1 of 2 supernets"}

    folders = [str(tmp_path / f"0.25-{seed}") for seed in range(2)]
    command = [sys.executable, ROOT / "bench" / "macro_study.py", *folders]
    command += ["--networks", "12", "--results", tmp_path / "study.json"]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "a tau of 0.895" in first.stdout.splitlines()[0]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/study/*")}
    assert len(kept) == 4  # all encodings, and other images, in two supernets
    next(iter(kept)).unlink()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout == first.stdout
    changed = [path for path, time in kept.items() if path.stat().st_mtime_ns != time]
    assert changed == [next(iter(kept))]
    losses = json.loads((tmp_path / "study.json").read_text())["losses"]
    assert [len(seed) for seed in losses] == [12, 12]
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")

    own.load(bench.OPERATIONS)
    network = found["networks"][0]
    file = checkpoint.newest(tmp_path / "0.25-1" / "checkpoints" / "supernet")
    (supernet, ckpt), images = checkpoint.load_supernet(file, None), torch.rand(40, 3, 32, 32)
    batches, candidate = [(images, torch.arange(40) % 10)], tuple(map(int, network))
    ((_, acc1, loss),) = bench.measure(supernet, [network], batches, batches, "average")
    (result,) = evaluate(supernet, [candidate], batches, batches, "average")
    assert acc1 == pytest.approx(result["acc1"], abs=1e-3) and loss > 1
    torch.manual_seed(1)
    before, after = (
        torch.cat([p.flatten() for module in path_of(model, candidate) for p in module.parameters()]).double()
        for model in (ShuffleNetV2OneShot(space=ckpt.space), supernet)
    )
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=0).item()
    (angle,) = bench.angles(tmp_path / "0.25-1", [network]).values()
    assert angle == pytest.approx(math.acos(cosine), rel=1e-5) and angle > 1e-4


def path_of(model, candidate):
    return [model.first_conv, *(ops[i] for ops, i in zip(model.features, candidate)), model.conv_last]

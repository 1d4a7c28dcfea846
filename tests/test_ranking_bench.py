"""The ranking study: its statistics, its candidates, and a small run that is killed and resumed."""

import itertools
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, load, run
from rank_correlation import agreement, bootstrap, candidates_needed, interval, kendall, resamples

from images.dataset import prepare
from space.search_space import SearchSpace
from utils import UserError

bench = load("bench/ranking.py")


# --- statistics ----------------------------------------------------------------------------------------------


def test_kendall_without_ties():
    assert kendall([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert kendall([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)


def test_kendall_with_ties_equals_the_definition():
    """tau-b: concordant minus discordant pairs, over the geometric mean of the pairs not tied in each list."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.integers(0, 4, (2, 9)).tolist()
        pairs = [(a[i] - a[j], b[i] - b[j]) for i, j in itertools.combinations(range(9), 2)]
        score = sum((x * y > 0) - (x * y < 0) for x, y in pairs)
        untied = sum(x != 0 for x, _ in pairs) * sum(y != 0 for _, y in pairs)
        assert kendall(a, b) == pytest.approx(score / untied**0.5)
    assert kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 6**0.5)
    assert kendall([1, 1, 1], [1, 2, 3]) == 0


def test_bootstrap_equals_resampled_lists():
    rng = np.random.default_rng(1)
    predictor, *truths = rng.integers(0, 6, (3, 10)).tolist()
    counts = resamples(10, 40)
    assert counts.shape == (40, 10) and set(counts.sum(axis=1)) == {10}
    for count, value in zip(counts, bootstrap(predictor, truths, counts), strict=True):
        drawn = [i for i, n in enumerate(count) for _ in range(n)]
        taken = [[v[i] for i in drawn] for v in (predictor, *truths)]
        assert value == pytest.approx(agreement(taken[0], taken[1:]))
    assert agreement(predictor, truths) == pytest.approx(
        (kendall(predictor, truths[0]) + kendall(predictor, truths[1])) / 2
    )


def test_intervals_cover_the_true_value():
    """The tau of normal pairs of correlation r is 2/pi asin(r): some 95% of 200 intervals (of 40 pairs) contain it."""
    rng, r, hits = np.random.default_rng(2), 0.6, 0
    for _ in range(200):
        a, b = rng.standard_normal((2, 40))
        low, high = interval(bootstrap(a, [r * a + (1 - r * r) ** 0.5 * b], resamples(40, 400)))
        hits += low < 2 / np.pi * np.arcsin(r) < high
    assert 180 <= hits <= 199


def test_the_paired_interval_is_narrower_than_two_apart():
    """Two predictors that err together are told apart though their own intervals overlap."""
    rng = np.random.default_rng(3)
    truth, error = rng.standard_normal((2, 150))
    good, bad = truth + error, truth + error + rng.standard_normal(150)
    counts = resamples(150)
    a, b = bootstrap(good, [truth], counts), bootstrap(bad, [truth], counts)
    assert interval(a)[0] < interval(b)[1]
    assert interval(a - b)[0] > 0
    assert interval(a - a) == (0, 0)


def test_candidates_needed_falls_with_the_square_of_the_difference():
    assert candidates_needed(32, 0.2, -0.2, 0.6) == 128
    assert candidates_needed(32, 0.1, -0.2, 0.6) == 512
    assert candidates_needed(32, 0, -0.2, 0.6) == float("inf")


def rows(n, noise, seed=0):
    """Candidates that FLOPs say nothing about, of which the supernet sees the accuracy with some noise."""
    rng = np.random.default_rng(seed)
    alone = 80 + rng.standard_normal(n)
    return [
        {
            "flops": int(rng.integers(20e6, 30e6)), "params": int(rng.integers(1e6, 2e6)), "kernel_size": 3.0,
            "untrained": 10.0,
            "supernet": a + noise * rng.standard_normal(),
            "standalone": [a + 0.1 * rng.standard_normal() for _ in range(2)],
        }
        for a in alone
    ]  # fmt: skip


def test_verdicts():
    summary = bench.summarise(rows(40, noise=0.2), 2)
    assert summary["supernet"]["minus_flops_interval"][0] > 0 and "ranks better than FLOPs" in bench.verdict(
        summary, 40
    )
    assert summary["flops"]["minus_flops_interval"] == (0, 0)
    assert summary["untrained"]["tau"] == 0 and summary["ceiling"]["tau"] > 0.8
    worse = rows(40, noise=0.2)
    for row in worse:
        row["flops"], row["supernet"] = row["supernet"], row["flops"]
    assert "ranks worse than FLOPs" in bench.verdict(bench.summarise(worse, 2), 40)
    backwards = rows(40, noise=100)
    for row in backwards:
        row["flops"] = -row["standalone"][0]
    assert "wrong way round, but the supernet's own tau of" in bench.verdict(bench.summarise(backwards, 2), 40)
    text = bench.verdict(bench.summarise(rows(10, noise=3), 2), 10)
    assert "not distinguishable with 10 candidates" in text and "A true difference of 0.10 takes about" in text


# --- candidates and trainings --------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [SearchSpace.for_images(28, 10), SearchSpace()], ids=["28px", "224px"])
@pytest.mark.parametrize("n", [3, 32])
def test_candidates_are_spread_over_all_flops(space, n):
    candidates = bench.draw_candidates(space, n)
    low, high = space.flops_range
    assert [min(n - 1, int((space.flops(space.check(c)) - low) / (high - low) * n)) for c in candidates] == list(
        range(n)
    )
    assert candidates == bench.draw_candidates(space, n) != bench.draw_candidates(space, n, seed=1)


def test_more_steps_than_there_are_candidates_for(monkeypatch):
    monkeypatch.setattr(bench, "TRIES", 300)
    with pytest.raises(UserError, match="--candidates 10000: none found in bin 2 of 10000"):
        bench.draw_candidates(SearchSpace.for_images(28, 10), 10_000)


def test_kernel_size():
    space = SearchSpace.for_images(28, 10)
    assert [bench.kernel_size(space, [op] * 20) for op in range(4)] == [3, 5, 7, 3]
    assert 3 < bench.kernel_size(space, [0] * 10 + [1] * 10) < 5


CONFIG = """
common: {{data-dir: {tree}, cache: {cache}, input-size: 16, heldout-per-class: 4, eval-batch-size: 8,
loader: torchvision, workers: 0}}
supernet: {{iterations: 2, batch-size: 8, bn-batches: 2, bn-batch-size: 8}}
tester: {{bn: average, bn-batches: 2, bn-batch-size: 8}}
scratch: {{iterations: 8, batch-size: 8, lr: 0.05, warmup: 4, bn-pass: 4}}
"""


def test_a_training_is_that_of_scratch(tree, tmp_path):
    config = tmp_path / "config.yml"
    config.write_text(CONFIG.format(tree=tree, cache=tmp_path / "cache"))
    run(
        "scratch.py",
        "--config",
        config,
        "--out",
        tmp_path,
        "--threads",
        1,
        "--seed",
        3,
        "--loader",
        "torchvision",
        "--workers",
        0,
    )
    expected = torch.load(tmp_path / "checkpoints" / "scratch" / "bnps-checkpoint.pth")
    args = bench.scratch_args(
        ["--config", str(config), "--threads", "1", "--loader", "torchvision", "--workers", "0"], 8
    )
    prepare(args)
    network = bench.Trainings(args, SearchSpace.from_dict(expected["space"])).network(expected["architecture"], 3)
    assert all(torch.equal(value, expected["model"][name]) for name, value in network.state_dict().items())


@pytest.mark.slow
def test_a_killed_run_can_be_resumed(tree, tmp_path):
    """3 candidates, 2 seeds of 4 iterations: what was measured stays, and the end is that of an undisturbed run."""
    config, results = tmp_path / "config.yml", tmp_path / "killed" / "ranking.json"
    config.write_text(CONFIG.format(tree=tree, cache=tmp_path / "cache"))
    run("supernet.py", "--config", config, "--out", tmp_path)
    words = [
        "--supernet",
        tmp_path / "checkpoints" / "supernet" / "checkpoint-0000002.pth",
        "--config",
        config,
        "--candidates",
        3,
        "--iterations",
        4,
    ]

    def trained():
        return (
            [a for row in json.loads(results.read_text())["candidates"] for a in row["standalone"]]
            if results.exists()
            else []
        )

    command = [sys.executable, ROOT / "bench" / "ranking.py", *map(str, words), "--results", results]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(trained()) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = json.loads(results.read_text())["candidates"]
    n = len(trained())
    assert 2 <= n < 6

    stdout, _ = run("bench/ranking.py", *words, "--results", results)
    assert f"training 1 of {6 - n}: " in stdout and "| supernet | " in stdout
    found = json.loads(results.read_text())
    assert stdout.splitlines()[-1] == found["verdict"]
    assert found["settings"]["warmup"] == found["settings"]["bn_pass"] == 2 and found["commit"]
    for row, was in zip(found["candidates"], before, strict=True):
        assert row | {k: row[k][: len(was[k])] for k in ("standalone", "seconds")} == was
        assert len(row["standalone"]) == 2
    svg = (results.parent / "ranking.svg").read_text()
    assert svg.count('class="datum"') == 3 and (results.parent / "ranking.png").read_bytes().startswith(b"\x89PNG")

    bench.main(bench.parse_args([*map(str, words), "--results", str(tmp_path / "ranking.json")]))
    undisturbed = json.loads((tmp_path / "ranking.json").read_text())
    assert [r["standalone"] for r in undisturbed["candidates"]] == [r["standalone"] for r in found["candidates"]]
    assert undisturbed["summary"] == found["summary"]
    with pytest.raises(UserError, match="has another iterations"):
        bench.main(bench.parse_args([*map(str, words[:-1]), "5", "--results", str(results)]))

"""bench/spaces.py: how well a supernet ranks a space, from made-up results, and by the readme's command."""

import itertools
import json
import math
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time

import pytest
from conftest import ROOT, forget, make_tree, run

from bench import spaces
from bench import study as shared
from images import bundled

RULES = ROOT / "examples" / "rules.py"
SPACE = """
space:
  stem: {channels: 8, stride: 1}
  stages:
    - {blocks: 1, channels: 16, stride: 2}
    - {blocks: 1, channels: 32, stride: 2}
  last: {channels: 32}
  operations: [skip_1x1, pointwise_1x1, shufflenet_3x3]
common:
  {data-dir: images, input-size: 16, heldout-per-class: 3, bn: average, bn-batches: 2, bn-batch-size: 9, cache: cache}
supernet: {iterations: 12, batch-size: 6, warmup: 4, sampler: uniform, val-every: 12, save-every: 1}
scratch: {iterations: 3, batch-size: 6, val-every: 3, bn-pass: 2}
search: {limit: "flops=100%"}
"""


@pytest.fixture
def settings(tmp_path):
    make_tree(tmp_path / "images", 6, 2)
    (tmp_path / "two.yml").write_text(SPACE)
    return tmp_path / "two.yml"


@pytest.fixture
def study(settings, monkeypatch):
    """A study of 6 of 9 candidates, two of them trained twice, and the rules of the examples."""
    monkeypatch.setattr(shared, "DRAWS", 50)
    yield spaces.Study(settings, out=settings.parent / "out", own_file=RULES, candidates=6, repeats=2)
    forget()


def train_all(study, seconds=10):
    """Results of all trainings: top-1 falls by 5 from one candidate to the next, a second seed has 2 more."""
    for *_, candidate, seed in (task.key for task in study.trainings()):
        acc1 = 2 * seed - 5 * study.candidates.index(tuple(candidate))
        study.keep("training", {"architecture": candidate, "seed": seed, "acc1": acc1, "cpu_seconds": seconds})


def score_all(study, rule, seed, value, steps=12, seconds=25):
    """Results of a supernet: `value` of each candidate is its top-1, and its loss."""
    scores = [{"architecture": list(c), "acc1": value(c), "loss": value(c)} for c in study.trained_by(rule)]
    row = {"rule": rule, "code": spaces.own.hash_of("rule", rule), "seed": seed, "steps": steps}
    study.keep("supernet", row | {"cpu_seconds": seconds, "scores": scores})


def keep_costs(study, **costs):
    for rule, cost in costs.items():
        rule = rule.replace("_", "-")
        study.keep("cost", {"rule": rule, "code": spaces.own.hash_of("rule", rule), "cost": cost})


def table(page):
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}


def keys(tasks):
    return [task.key for task in tasks]


def test_candidates_are_legal_and_the_first_ones_are_trained_twice(tmp_path):
    bundled.unpack(ROOT / "data" / "fashion-mnist")
    study = spaces.Study(ROOT / "bench" / "varied_fashion.yml", out=tmp_path)
    tasks = [(tuple(candidate), seed) for *_, candidate, seed in keys(study.trainings())]
    limit = study.bounds["flops"][1]
    assert limit == study.space.quantile("flops", 0.59)
    assert len(tasks) == len(set(tasks)) == 40 and sum(seed for _, seed in tasks) == 10
    assert all(study.space.flops(candidate) <= limit for candidate, _ in tasks)
    assert {c for c, seed in tasks if seed} == set(study.legal(10))
    # what is committed is known, and the candidates of `varied` differ in cost; those of `small` by 1.2
    assert len(study.done()) == 40 + len(study.scored()) >= 43
    costs = [[cost(c) for c in study.legal(200)] for cost in (study.space.flops, study.space.params)]
    assert all(max(found) / min(found) > 2 for found in costs)


def test_what_is_kept_is_not_done_again_unless_the_settings_change(study):
    (first, *_), (supernet, *_) = study.trainings(), study.supernets(["spos"], 1, 12)
    study.keep("training", {"architecture": first.key[2], "seed": 0, "acc1": 50.0})
    score_all(study, "spos", 0, study.space.flops)
    assert study.done() == [first.key, supernet.key]
    study.candidates = study.legal(7)  # the supernet has no score for one of them
    assert study.done() == [first.key]
    study.key = study.key | {"settings": study.key["settings"] | {"scratch": {"lr": 0.2}}}
    assert study.done() == [] and next(study.trainings()).command.folder != first.command.folder


def test_rules_share_the_cost_of_the_papers_steps(study):
    keep_costs(study, fair=3.0, half_0=0.8, half_1=1.2)
    tasks = study.supernets(["spos", "fair", "half-0+half-1"], 2, 24)
    assert [task.key[2:] for task in tasks[:4]] == [
        [0, "spos", 24],
        [0, "fair", 8],
        [0, "half-0", 15],
        [0, "half-1", 10],
    ]
    assert len({task.command.folder for task in tasks}) == len(tasks) == 8
    words = tasks[1].command.words
    assert [words[words.index(flag) + 1] for flag in ("--rule", "--iterations", "--warmup")] == ["fair", "8", "3"]
    assert not set(study.trained_by("half-0")) & set(study.trained_by("half-1"))
    score_all(study, "fair", 0, study.space.flops, 8)
    assert study.done() == [tasks[1].key]
    spaces.own.hashes["rule", "fair"] = "another"  # the rule has been changed
    assert study.done() == [] and study.supernet(0, rule="fair", steps=8).command.folder != tasks[1].command.folder
    spaces.REGISTRIES["rule"].pop("fair")  # a file of other rules
    assert study.done() == []


def test_the_page(study):
    keep_costs(study, fair=3.0, half_0=1.0, half_1=1.0)
    train_all(study)
    place = study.candidates.index
    for seed in (0, 1):
        score_all(study, "spos", seed, lambda c: -place(c))
    score_all(study, "fair", 0, lambda c: -place(c), steps=4)
    score_all(study, "fair", 1, place, steps=4)
    for half in ("half-0", "half-1"):
        score_all(study, half, 0, place, steps=6)
    page = spaces.page(study, ["spos", "fair", "half-0+half-1"], ["top-1", "loss"], 2, 12)
    true = [-25, -20, -15, -10, -4, 1]  # the best two were trained twice
    # two trainings of one that differ by 2 have a variance of 2
    assert "6 candidates, 2 of them trained more than once" in page and "of one: 1.41" in page
    rows = table(page)
    assert rows["spos, top-1"][0] == "1.00 (1.00 to 1.00)" and rows["spos, top-1"][2:4] == ["1.00, 1.00", ""]
    assert rows["spos, loss"][0].startswith("-1.00") and rows["spos, top-1"][1].startswith("0.00")
    worst = f"{true[-1] - true[0]:.2f}"
    assert rows["half-0+half-1, top-1"][0].startswith("-1.00") and rows["half-0+half-1, top-1"][1].startswith(worst)
    assert rows["half-0+half-1, top-1"][3].startswith("-2.00 (") and rows["half-0+half-1, top-1"][5:] == ["6 + 6", "50"]
    assert rows["fair, top-1"][2:4] == ["1.00, -1.00", "none"]  # the seeds differ
    assert rows["a random candidate"][1].startswith(f"{true[-1] - sum(true) / 6:.2f}")
    best_of_two = sum(max(pair) for pair in itertools.combinations(true, 2)) / math.comb(6, 2)
    assert rows["random search: the best of 2, trained alone"][1].startswith(f"{true[-1] - best_of_two:.2f}")


def test_a_page_of_little(study):
    assert "nothing to compare yet" in spaces.page(study, ["spos"], ["loss"], 2, 12)
    train_all(study)
    assert "FLOPs" in spaces.page(study, ["spos"], ["loss"], 2, 12)
    keep_costs(study, fair=3.0)
    score_all(study, "fair", 0, study.candidates.index, steps=4)
    assert table(spaces.page(study, ["spos", "fair"], ["loss"], 2, 12))["fair, loss"][3] == ""  # no gain over itself


def test_a_gain_is_none_where_the_interval_holds_zero(monkeypatch):
    monkeypatch.setattr(shared, "DRAWS", 100)
    true, other = list(range(20)), [i + 3 * (i % 2) for i in range(20)]
    assert spaces.gain([true], [other], true).startswith("+0.") and spaces.gain([true], [true], true) == "none"
    almost = [*true[:18], 19, 18]
    assert spaces.gain([true], [almost], true) == "none"  # many draws have one of the two only


def test_a_study_of_other_images_or_flags_is_another_one(settings, tmp_path):
    def study(*flags):
        return spaces.Study(settings, flags, tmp_path / "out", candidates=3, repeats=0)

    first, folder = study(), study().folder()
    first.keep("training", {"architecture": first.candidates[0], "seed": 0, "acc1": 50.0})
    assert len(study().rows()) == 1 and not study("--lr", "0.3").rows()
    settings.write_text(SPACE + "tester: {bn: ema}\n")
    assert not study().rows()
    settings.write_text(SPACE)
    image = next((tmp_path / "images" / "val").rglob("*.jpg"))
    image.rename(image.with_name("other.jpg"))
    assert not study().rows() and study().folder() != folder
    of_before = [key for key in first.key if key not in ("images", "tester")]
    first.key = {key: first.key[key] for key in of_before}
    first.keep("training", {"architecture": first.candidates[0], "seed": 0, "acc1": 50.0})
    assert len(study().rows()) == 1  # the study of before resumes


def test_flags_of_training_do_not_reach_the_evaluation_but_its_own_do(settings, tmp_path):
    study = spaces.Study(settings, ["--lr", "0.3", "--workers", "1"], tmp_path / "out", candidates=3)
    args = study.tested(tmp_path / "supernet")
    assert study.training.lr == 0.3 and not hasattr(args, "lr") and args.workers == 1 and args.bn_batches == 2


def test_the_limits_of_the_file_count_in_all_forms(settings, tmp_path):
    own_file = tmp_path / "own.py"
    own_file.write_text("from space.own import register_cost\n@register_cost('kinds')\n"
                        "def kinds(space, candidate):\n    return len(set(candidate))\n")  # fmt: skip
    for text, expected in (("flops-limit: 20%", 0.2), ("limit: [kinds=1, flops=20%]", 0.2)):
        settings.write_text(SPACE.replace('limit: "flops=100%"', text))
        study = spaces.Study(settings, out=tmp_path / "out", own_file=own_file, candidates=1)
        assert study.bounds["flops"] == (None, study.space.quantile("flops", expected))
    assert study.bounds["kinds"] == (None, 1) and study.candidates[0][0] == study.candidates[0][1]


def test_a_torn_last_line_is_left_out_and_written_over(tmp_path):
    path = tmp_path / "results.jsonl"
    shared.add_line(path, {"a": 1})
    path.write_text(path.read_text() + '{"b": ')
    assert shared.lines(path) == [{"a": 1}]
    shared.add_line(path, {"c": 3})
    assert path.read_text() == '{"a": 1}\n{"c": 3}\n' and shared.lines(tmp_path / "none") == []


def test_trainings_that_fail_are_said_and_give_exit_code_2(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "run", lambda *_: [["two", "training", [0, 0], 0]])
    out, err = run("bench.spaces", settings, "--candidates", 3, "--out", tmp_path / "out", code=2)
    assert "report.md" in out and "1 of the trainings failed, see above; the same command repeats them" in err


def test_truths_that_are_known():
    macro = spaces.macro.full_space()
    rows = spaces.read_truth(spaces.macro.TRUTH, macro)
    assert len(rows) == 3 * 3969 and {len(row["architecture"]) for row in rows} == {8}
    of = spaces.Study(ROOT / "demo.yml", truth=shared.RESULTS / "demo_truth.json")
    assert len(of.candidates) == 60 and len(of.truth()) == 80 and list(of.trainings()) == []
    assert set(of.candidates) == set(shared.random_legal(of.space, of.bounds, 60))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--candidates 4 --rules none", "--rule none: is none of spos"),
        (f"--candidates 4 --own {RULES} --rules half-0", "--rules half-0: does not train all candidates"),
        ("--candidates 10", "10 candidates are asked for, but within the limits there are about 9"),
        ("--truth two.yml", "two.yml"),
        ("--colour red", "unrecognized arguments: --colour red"),
    ],
)
def test_what_can_not_be_is_a_line(settings, words, text, monkeypatch):
    monkeypatch.chdir(settings.parent)
    _, err = run("bench.spaces", settings, words, "--out", settings.parent / "out", code=2)
    assert text in err and err.count("\n") == 1


def test_the_committed_taus_are_in_the_docs():
    of = spaces.Study(ROOT / "demo.yml", truth=shared.RESULTS / "demo_truth.json")
    true = [
        statistics.fmean(row["acc1"] for row in of.truth() if tuple(row["architecture"]) == c) for c in of.candidates
    ]
    scores = {}
    for row in map(json.loads, spaces.RESULTS.read_text().splitlines()):
        if row["study"] == "demo" and row["kind"] == "supernet":
            rule = row["rule"].partition("-")[0]  # both halves are one
            scores.setdefault(rule, {}).setdefault(row["seed"], []).extend(row["scores"])
    text = (ROOT / "docs" / "experiments.md").read_text()
    for seeds in scores.values():
        for score in spaces.SCORES.values():
            by_candidate = [{tuple(one["architecture"]): score(one) for one in found} for found in seeds.values()]
            taus = [shared.tau([one[c] for c in of.candidates], true) for one in by_candidate]
            assert " | " + "; ".join(f"{tau:.2f}" for tau in taus) + " | " in text
    assert len(scores) == 4 and all(len(seeds) > 1 for seeds in scores.values())


@pytest.mark.slow
def test_the_readmes_command_is_interrupted_and_resumed(settings):
    """On a space of two blocks; what it writes is below --out."""
    (line,) = re.findall(r"`python (-m bench\.spaces .*?)`", (ROOT / "readme.md").read_text())
    words = [sys.executable, *shlex.split(line.replace("demo.yml", str(settings)))]
    words += ["--candidates", "3", "--repeats", "1", "--seeds", "1", "--out", settings.parent / "out"]
    before = {path: path.stat().st_mtime for path in shared.RESULTS.iterdir()}
    first = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in first.stdout:
        if "kept" in line:
            break
    time.sleep(1)
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate()
    assert first.returncode == 130 and "the same command does the rest" in err
    (results,) = settings.parent.glob("out/two-*/results.jsonl")
    kept = results.read_text()
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert results.read_text().startswith(kept) and kept
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    tasks = [(row["kind"], row.get("seed"), row.get("rule"), str(row.get("architecture"))) for row in rows]
    assert len(tasks) == len(set(tasks)) and sum(row["kind"] == "training" for row in rows) == 4
    page = results.with_name("report.md").read_text()
    assert again.stdout.endswith(f"{page}\n{results.with_name('report.md')}\n")
    assert {"spos, top-1", "fair, loss", "sandwich, loss", "half-0+half-1, loss"} < table(page).keys()
    assert {path: path.stat().st_mtime for path in shared.RESULTS.iterdir()} == before

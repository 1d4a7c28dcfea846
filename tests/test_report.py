"""The report of a search, on synthetic ones: numbers, figures, the page, and the page in a real browser."""

import base64
import dataclasses
import html
import itertools
import json
import math
import pathlib
import random
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from conftest import run
from made_search import SPACE, fill, result, settings
from PIL import Image

import report
from engines.search_files import state_path
from reports.page import _tiles, write_report
from reports.search_results import RandomSearch, SearchResults
from space.costs import Costs
from space.evolution import Evolution
from space.limits import milliseconds
from space.search_space import OPERATIONS, SearchSpace
from utils import duration

SMALL = {"population": 12, "select": 4, "mutation": 5, "crossover": 5, "generations": 4, "seed": 5}
START = {"command": "python search.py --data-dir '<b>&'", "demo": False, "config": None,
         "versions": "python 3.11.7, numpy 2.4.6; commit abc1234; device auto; seed 5"}  # fmt: skip


def accuracy(candidate):
    return 40 + 20 * random.Random(str(candidate)).random() + sum(candidate) / 10


def few_values(candidate):
    """Accuracies of which many are equal in top-1, and some in both."""
    draw = random.Random(str(candidate))
    return 50 + draw.randrange(2), 90 + draw.randrange(3)


def make(
    out, space=SPACE, limit="59%", stop_after=math.inf, fails=lambda c: c[0] == 1 and c[1] < 2,
    measured=lambda c: (accuracy(c), 99.0), **changes,
):  # fmt: skip
    """A search in `out` as search.py leaves it, or one that ended after so many results; returns `out`."""
    limits = {"flops_limit": space.cost_value("flops", limit)}
    own = settings(space, **SMALL | limits | {"checkpoint": "0" * 64, "bn": "ema"} | changes)

    def evaluate(candidate):
        numbers = dict(zip(("acc1", "acc5", "loss"), () if fails(candidate) else measured(candidate)))
        return result(candidate, n_images=500, **numbers) if numbers else "out of memory"

    fill(out, own, evaluate, stop_after, start=START)
    return out


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished search, which was started twice, with its report."""
    out = make(tmp_path_factory.mktemp("searched"))
    state = json.loads(state_path(out).read_text())
    times = {"begun": 100, "last": 130}, {"begun": 7000, "last": 7030, "command": "python search.py --resume"}
    state["starts"] = [START | changes for changes in times]
    state_path(out).write_text(json.dumps(state))
    write_report(out)
    return out


def on_disk(out):
    """The results in acc/ by architecture, each with its generation; read without the project's code."""
    return {
        tuple(r["architecture"]): r | {"generation": int(path.stem) + 1}
        for path in (out / "acc").glob("*.jsonl") for r in map(json.loads, path.read_text().splitlines())
    }  # fmt: skip


# --- numbers -------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_acc(searched):
    results, found = on_disk(searched), SearchResults(searched)
    succeeded = {a: r for a, r in results.items() if r["acc1"] is not None}
    assert len(found.results) == len(results) == 48 and found.n_failed == 48 - len(succeeded) > 0
    assert [tuple(r["architecture"]) for r in found.succeeded] == sorted(succeeded, key=lambda a: -succeeded[a]["acc1"])
    assert [g.number for g in found.generations] == [1, 2, 3, 4] and all(g.closed for g in found.generations)
    best = n = 0
    for generation, so_far in zip(found.generations, found.best_so_far(), strict=True):
        values = [r["acc1"] for r in succeeded.values() if r["generation"] == generation.number]
        best, n = max(best, *values), n + len(values)
        assert generation.best["acc1"] == max(values) and so_far == (n, best)
        assert generation.mean == pytest.approx(np.mean(values)) and generation.sd == pytest.approx(
            np.std(values, ddof=1)
        )
    shares = [found.shares(found.results, i) for i in range(4)]
    assert shares[2][6] == sum(a[6] == 2 for a in results) / 48
    assert np.sum(shares, 0) == pytest.approx(1)


def test_the_front_is_what_no_other_candidate_beats(searched):
    found = SearchResults(searched)
    beaten = {
        id(r) for r, other in itertools.permutations(found.succeeded, 2)
        if other["flops"] <= r["flops"] and other["acc1"] >= r["acc1"] and (other["flops"],
        other["acc1"]) != (r["flops"], r["acc1"])
    }  # fmt: skip
    assert {id(r) for r in found.front()} == {id(r) for r in found.succeeded} - beaten
    assert 1 < len(found.front()) < len(found.succeeded)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A finished search with many ties."""
    return make(tmp_path_factory.mktemp("tied"), measured=few_values, generations=3)


def test_the_front_has_the_cheapest_of_equal_top1_alone(tied):
    found = SearchResults(tied)
    costs = {}
    for r in found.succeeded:
        costs.setdefault(r["acc1"], []).append(r["flops"])
    assert all(len(flops) > 5 for flops in costs.values())
    front, best = [], -math.inf
    for flops, acc1 in sorted((min(flops), acc1) for acc1, flops in costs.items()):
        if acc1 > best:
            front, best = [*front, (flops, acc1)], acc1
    assert [(r["flops"], r["acc1"]) for r in found.front()] == front


def test_of_equals_the_report_has_the_one_in_best_json(tied):
    found, best = SearchResults(tied), SPACE.load_architecture(tied / "checkpoints" / "best.json")
    highest = max((r["acc1"], r["acc5"]) for r in found.succeeded)
    equals = [r for r in found.succeeded if (r["acc1"], r["acc5"]) == highest]
    assert len(equals) > 2 and equals == found.succeeded[: len(equals)]
    assert tuple(found.succeeded[0]["architecture"]) == best
    assert [r["generation"] for r in equals] == sorted(r["generation"] for r in equals)
    assert max(r["acc5"] for r in found.succeeded) == max(r["acc5"] for r in equals)
    for generation in found.generations:
        first = SPACE.load_architecture(tied / "checkpoints" / f"{generation.number - 1:03}_000.json")
        assert tuple(generation.best["architecture"]) == first


def test_a_search_of_before_is_reported_without_its_command(searched, tmp_path, undrawn):
    out = shutil.copytree(searched, tmp_path / "searched")
    state = json.loads(state_path(out).read_text())
    state_path(out).write_text(json.dumps({name: value for name, value in state.items() if name != "starts"}))
    page = write_report(out).read_text()
    assert all(f"<dt>{name}</dt><dd>not recorded</dd>" in page for name in ("command", "versions", "wall clock"))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (150, "2.5 min"), (3600, "60.0 min"), (9000, "2.5 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# --- figures and page ----------------------------------------------------------------------------------------


SVG = "{http://www.w3.org/2000/svg}"


def marks(out, figure):
    """{id of a group: what it draws, in order} of a figure's SVG: uses of a shape, or paths."""
    root = ET.parse(out / "figures" / f"{figure}.svg").getroot()
    return {
        group.get("id"): list(group.iter(f"{SVG}use")) or list(group.iter(f"{SVG}path"))
        for group in root.iter(f"{SVG}g")
        if group.get("id")
    }


def colour_of(mark):
    return re.search("fill: #(......)", mark.get("style"))[1]


def check_figures(out, space=SPACE):
    """Compares the elements in the SVG files with acc/."""
    results = on_disk(out)
    succeeded = sorted((r for r in results.values() if r["acc1"] is not None), key=lambda r: -r["acc1"])
    generations = {r["generation"] for r in results.values()}
    with_accuracy = {r["generation"] for r in succeeded}
    plane, progress = marks(out, "plane"), marks(out, "generations")
    assert len(plane["candidates"]) == len(progress["candidates"]) == len(succeeded)
    assert len(plane.get("failed", [])) == len(results) - len(succeeded)
    for axis, key, sign in (("x", "flops", 1), ("y", "acc1", -1)):  # along a linear axis, best candidate first
        values, places = [r[key] for r in succeeded], [float(mark.get(axis, 0)) for mark in plane["candidates"]]
        if len(set(values)) > 2:
            line = np.polyfit(values, places, 1)
            assert sign * line[0] > 0 and np.polyval(line, values) == pytest.approx(places, abs=0.01)
    assert len(plane["limit"]) == 1
    assert len(progress["mean"]) == len(progress["best"]) == len(progress["so-far"]) == len(with_accuracy)
    operations = marks(out, "operations")
    for name in space.operations:
        assert len(operations[name]) == len(generations) * space.n_blocks
    assert len(operations["all"]) == len(operations["last"]) == len(space.operations) * space.n_blocks
    boxes = {group: colour_of(*found) for group, found in marks(out, "best").items() if group.startswith("path-")}
    best = [r["architecture"] for r in succeeded[:10]]
    assert boxes.keys() == {f"path-{r}-block-{b + 1}" for r in range(1, len(best) + 1) for b in range(space.n_blocks)}
    colours = {(c, boxes[f"path-{r}-block-{b}"]) for r, a in enumerate(best, 1) for b, c in enumerate(a, 1)}
    assert len(colours) == len(dict(colours)) == len({colour for _, colour in colours})
    for name in ("plane", "generations", "operations", "best"):
        with Image.open(out / "figures" / f"{name}.png") as image:
            assert image.width == 1800


def test_figures_show_what_is_in_acc(searched):
    check_figures(searched)


def test_a_heat_map_is_the_darker_the_larger_the_share(searched):
    results = on_disk(searched)
    shares = [
        np.mean([a[block] == 0 for a, r in results.items() if r["generation"] == generation])
        for generation in (1, 2, 3, 4)
        for block in range(SPACE.n_blocks)
    ]
    cells = marks(searched, "operations")["shufflenet_3x3"]
    light = [
        sum(bytes.fromhex(colour_of(cell))) for _, cell in sorted(zip(shares, cells, strict=True), key=lambda p: p[0])
    ]
    assert light == sorted(light, reverse=True) and light[0] - light[-1] > 300


KINDS = {
    "one candidate": {"stop_after": 1, "fails": lambda c: False},
    "most failed": {"generations": 2, "fails": lambda c: sum(c) % 4 != 0},
    "one generation": {"generations": 1},
    "three operations": {"space": SearchSpace(stage_blocks=(1, 2, 5, 2), operations=OPERATIONS[:0:-1])},
    "many generations": {"space": SearchSpace.for_images(64, 3), "generations": 12},
    "44 blocks": {"space": SearchSpace(stage_blocks=(8, 8, 20, 8))},
}


@pytest.mark.parametrize(
    "changes",
    [pytest.param(c, id=name, marks=[pytest.mark.slow] * (n > 1)) for n, (name, c) in enumerate(KINDS.items())],
)
def test_searches_of_all_kinds(tmp_path, changes):
    out = make(tmp_path, **changes)
    page = write_report(out).read_text()
    check_figures(out, changes.get("space", SPACE))
    assert ("Not finished" in page) == ("stop_after" in changes)


def test_a_first_generation_that_failed_is_shown_all_the_same(tmp_path):
    first = set(Evolution.from_settings(SPACE, SMALL | {"flops_limit": SPACE.cost_value("flops", "59%")}).ask())
    out = make(tmp_path, fails=first.__contains__)
    assert "no random candidate has an accuracy" in write_report(out).read_text()
    check_figures(out)


def test_the_report_of_an_interrupted_search_leaves_the_search_as_it_is(tmp_path):
    out = make(tmp_path, stop_after=31)
    with open(out / "acc" / "002.jsonl", "a") as file:
        file.write('{"architecture": [0, 1')  # died while writing
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    page = write_report(out).read_text()
    assert {path: path.read_bytes() for path in before} == before
    assert {path.relative_to(out).parts[0] for path in out.rglob("*") if path.is_file() and path not in before} == {
        "report.html",
        "figures",
    }
    assert "31 of 48 candidates, in generation 3 of 4" in page and "3 (not finished)" in page
    (out / "acc" / "002.jsonl").write_bytes(before[out / "acc" / "002.jsonl"].rpartition(b"\n")[0] + b"\n")
    check_figures(out)


def test_the_page_says_what_ran_and_needs_no_network(searched):
    page = (searched / "report.html").read_text()
    best = max((r for r in on_disk(searched).values() if r["acc1"] is not None), key=lambda r: r["acc1"])
    assert "python search.py --data-dir &#39;&lt;b&gt;&amp;&#39;\npython search.py --resume" in page
    for text in ("commit abc1234", "<dt>seed</dt><dd>5</dd>", "60 s, all starts together", "out of memory"):
        assert text in page
    for text in (
        f"{best['acc1']:.2f} %",
        f"{best['flops']:,}",
        f"{SPACE.params(best['architecture']):,}",
        str(best["architecture"]),
    ):
        assert text in page
    assert "<b>&" not in page and "<script" not in page
    embedded = re.findall(r'(?:src|href)="data:image/svg\+xml;base64,([^"]*)', page)
    assert len(embedded) == len(re.findall('(?:src|href)="', page)) == 4 and not re.search("https?:", page)
    figures = {path.read_bytes() for path in (searched / "figures").glob("*.svg")}
    assert {base64.b64decode(text) for text in embedded} == figures
    for text in (page, *map(bytes.decode, figures)):
        assert not re.search(r"url\((?!#)|@import|(?:href|src)=\"(?!#|data:)", text)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


CHEAP = ("skip", "pointwise", *OPERATIONS)


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """A search with six operations under a limit on latency, of which ten networks were measured, and its report."""
    space = SearchSpace.from_dict({**SPACE.to_dict(), "stage_blocks": [1, 1, 2, 1], "operations": CHEAP})
    rng = random.Random(0)
    rows = [[rng.randint(100_000, 300_000) for _ in CHEAP] for _ in range(5)]
    counted = [rows, 1000, 1000, rows, 1000]
    timed = dataclasses.replace(space, given_costs=Costs(*counted, rows, 50_000))
    out = tmp_path_factory.mktemp("limited")
    high = timed.quantile("latency", 0.6)
    table = {"device": "Cray-1", "runtime": "torch", "threads": 2, "batch_size": 1, "torch": "2.0", "spread": 0.01,
             "medians": rows, "stem_and_tail": 50_000}  # fmt: skip
    own = settings(space, **SMALL, limits={"latency": [None, high]}, counted=counted, latency=table)
    record = fill(out, own, lambda c: "no memory" if sum(c) % 11 == 1 else result(c, acc1=accuracy(c), n_images=500))
    record.confirm({c: high + (i < 3) for i, c in enumerate(record.evolution.legal_ranked()[:10])})
    record.lock.close()
    write_report(out)
    return out


def texts(out, figure):
    return [element.text for element in ET.parse(out / "figures" / f"{figure}.svg").getroot().iter(f"{SVG}text")]


def test_the_figures_have_the_cost_that_is_limited(limited):
    results = on_disk(limited)
    succeeded = sorted((r for r in results.values() if r["acc1"] is not None), key=lambda r: -r["acc1"])
    plane = marks(limited, "plane")
    places = [float(mark.get("x", 0)) for mark in plane["candidates"]]
    values = [r["latency_ms"] for r in succeeded]
    assert np.polyval(np.polyfit(values, places, 1), values) == pytest.approx(places, abs=0.01)
    assert len(plane["beyond"]) == 3 and len(plane["limit"]) == 1 and plane["failed"]
    corners = [[float(x) for x in re.findall(r"[ML] (\S+)", mark.get("d"))] for mark in plane["beyond"]]
    centres = [(min(xs) + max(xs)) / 2 for xs in corners]
    assert sorted(centres) == pytest.approx(sorted(places[:3]), abs=0.01)
    assert "predicted latency (ms, torch)" in texts(limited, "plane")
    found = SearchResults(limited)
    front = [(r["latency_ms"], r["acc1"]) for r in found.front()]
    assert front == sorted(front) == sorted(front, key=lambda p: p[1]) and front[-1][1] == succeeded[0]["acc1"]
    assert found.legal[0] == found.succeeded[3]
    found.succeeded = [
        {"acc1": acc1, "flops": flops, "latency_ms": ms}
        for acc1, flops, ms in ((50, 3, 1.0), (60, 1, 2.0), (55, 2, 3.0))
    ]
    assert [r["acc1"] for r in found.front()] == [50, 60]  # by FLOPs, the second would beat all


def test_the_best_have_a_complete_legend_and_all_costs(limited):
    """Each of the six operations has an entry, within the figure."""
    found = texts(limited, "best")
    labels = [
        "skip: S",
        "pointwise: P",
        "ShuffleNet 3x3: 3",
        "ShuffleNet 5x5: 5",
        "ShuffleNet 7x7: 7",
        "Xception 3x3: X",
    ]
    assert sorted(text for text in found if text in labels) == sorted(labels)
    run = SearchResults(limited)
    assert all(milliseconds(r["latency_ms"]) in found for r in run.legal[:10])
    params = [run.space.params(r["architecture"]) for r in run.legal[:10]]
    assert all(f"{n / 1e3:.1f}k" in found or f"{n / 1e6:.3f}M" in found for n in params)
    high = run.bounds["latency"][1]
    assert found.count(f"{high / 1e6:.3f}") >= 7 and "measured ms" in found and "predicted ms" in found
    page = (limited / "report.html").read_text()
    assert "Left out: the 3 that are beyond a limit" in page and f"<b>{high / 1e6:.3f} ms</b>" in page
    assert "Predicted from a table of torch 2.0 on Cray-1,\n2 threads" in page


def test_the_largest_stands_beside_the_winner(tmp_path):
    out = make(tmp_path / "noise", measured=lambda c: (50 + c[0] / 10, 99.0))
    found = SearchResults(write_report(out).parent)
    largest, best = found.largest, found.winner
    points = best["acc1"] - largest["acc1"]
    error = math.hypot(*((r["acc1"] * (100 - r["acc1"]) / 500) ** 0.5 for r in (largest, best)))
    text = f"{points:.2f} points below the best, standard error {error:.2f}: they can't be told apart"
    page = (out / "report.html").read_text()
    assert points > 0 and found.largest_text.endswith(text) and html.escape(text[:40]) in page
    assert f"<td>largest</td><td>{largest['acc1']:.2f}</td>" in page and marks(out, "plane")["largest"]
    assert all(r["architecture"] != largest["architecture"] and r["flops"] <= largest["flops"] for r in found.legal)

    def text_of(name, **changes):
        return SearchResults(make(tmp_path / name, **changes)).largest_text

    largest = tuple(largest["architecture"])
    text = text_of("better", measured=lambda c: (90 if c == largest else accuracy(c), 99.0))
    assert re.search(r": top-1 90.00%, \d\d.\d\d points above the best, standard error \d.\d\d$", text)
    assert text_of("failed", fails=lambda c: c == largest).endswith("FLOPs: could not be evaluated, out of memory")
    state = json.loads(state_path(out).read_text())
    for largest, text in ((best, "the best is the largest legal candidate of those evaluated"), (None, None)):
        state["largest"] = largest and {**largest, "of_all": False}
        state_path(out).write_text(json.dumps(state))
        assert SearchResults(out).largest_text == text


def test_the_headline_has_no_interval_below_a_warning_of_noise(tmp_path):
    """Accuracies of the first generation within their noise: an interval from their spread would deny the warning."""
    for spread, noisy in ((0.1, True), (9, False)):
        values = iter([(random.Random(i).gauss(60, spread), 99.0) for i in range(25)])  # the largest, too
        changes = {"fails": lambda c: False, "measured": lambda c, values=values: next(values), "generations": 2}
        out = make(tmp_path / str(spread), **changes)
        found = SearchResults(out)
        (note,) = [text for _, text in _tiles(found, RandomSearch(found), found.legal[0]) if "expected best" in text]
        assert bool(found.warnings()) == noisy and ("95% interval" in note) != noisy
        assert ("without an interval, since the spread of random candidates is within the noise" in note) == noisy
        _, _, low, high = RandomSearch(found).at_budget
        above, below = (found.legal[0]["acc1"] - end for end in (high, low))  # the nearer end first
        sides = [f"{abs(x):.2f} {'above' if x >= 0 else 'below'}" for x in (above, below)]
        assert noisy or f"95% interval {' to '.join(sides)}" in note


def test_costs_are_those_of_the_flops_table(tmp_path):
    """None is beyond the limit, which is in the numbers of the table."""
    costs = [[[c // 10 for c in row] for row in SPACE.costs.flops], SPACE.cost_rows("flops")[1] // 10]
    out = make(tmp_path)
    state = json.loads(state_path(out).read_text())
    state["settings"] |= {"costs": costs, "flops_limit": state["settings"]["flops_limit"] // 10 + 10}
    state_path(out).write_text(json.dumps(state))
    found = SearchResults(out)
    assert found.legal == found.succeeded and not any(map(found.is_beyond, found.succeeded))


def test_errors_are_one_line(tmp_path):
    for make_it, message in (
        (lambda out: None, "no search here"),
        (lambda out: make(out, stop_after=0), "no candidate is evaluated yet"),
        (
            lambda out: make(out, stop_after=5, fails=lambda c: True),
            "none of 5 candidates could be evaluated; ",
        ),
    ):
        out = tmp_path / str(len(message))
        make_it(out)
        _, stderr = run("report.py", out, code=2)
        assert message in stderr and stderr.count("\n") == 1 and not (out / "report.html").exists()


def test_the_command_prints_where_the_page_is(searched, monkeypatch):
    asked = []
    monkeypatch.setattr(report, "write_report", lambda *folders: asked.append(folders) or folders[0] / "report.html")
    assert run("report.py", searched, "--random", "other") == (f"{searched / 'report.html'}\n", "")
    assert asked == [(searched, pathlib.Path("other"))]


# --- in a browser --------------------------------------------------------------------------------------------


@pytest.fixture
def browse(tmp_path):
    """Opens a page in headless Chromium without a network; returns (the DOM as text, the lines of its console)."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")

    def browse(path, *words):
        command = [
            chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--window-size=1100,3200", "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND", *words, path.as_uri(),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, timeout=180)
        assert result.returncode == 0, result.stderr
        return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]

    return browse


@pytest.mark.slow
def test_a_browser_has_nothing_to_complain_about(searched, tmp_path, browse):
    (tmp_path / "bad.html").write_text(
        '<meta http-equiv="Content-Security-Policy" content="img-src data:"><img src="http://a.example/b.png">'
    )
    assert browse(tmp_path / "bad.html", "--dump-dom")[1], (
        "errors must show in the console for their absence to say something"
    )
    _, console = browse(searched / "report.html", f"--screenshot={tmp_path / 'page.png'}")
    assert not console
    with Image.open(tmp_path / "page.png") as image:
        assert image.size == (1100, 3200)
        for top in range(0, 2400, 400):
            assert len(image.crop((0, top, 1100, top + 400)).convert("RGB").getcolors(1 << 24)) > 30

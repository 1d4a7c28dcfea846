"""Latency: the table, its use by a search, and the measurement of the best as whole networks, with a made-up clock.

The clock of these tests counts parameters: an operation takes ten times its parameters in ns, at a network's own speed.
With ONNX's packages on the path, the tests marked so measure and compare real graphs in ONNX Runtime, too.
"""

import argparse
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import random
import re
import shlex
import statistics
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import FIGURES, ROOT, run
from made_search import fill, read_results, result, settings
from test_evolution import reward

import search
import tester
from bench import latency as bench
from devices import elsewhere, on_device, onnx_runtime, timing
from devices import table as latency
from devices.timing import Networks, Torch
from engines import local_engine
from engines.search_files import state_path
from images.dataset import Data, DataConfig
from network import ShuffleNetV2OneShot
from reports import page
from reports.search_results import RandomSearch, SearchResults
from space.evolution import Evolution
from space.limits import Limits, bounds_of, milliseconds
from space.search_space import SearchSpace
from utils import UserError, read_json, write_json

SPACE = SearchSpace(
    input_size=16, n_classes=3, stem_channels=8, stem_stride=1, stage_blocks=(2, 3), stage_channels=(16, 24),
    stage_strides=(2, 2), last_channels=32,
)  # fmt: skip
RAGGED = dataclasses.replace(SPACE, stage_operations=(SPACE.operations[1:3], SPACE.operations))
CPU = torch.device("cpu")
REAL = timing.run_timed, timing.rounds
needs_onnx = pytest.mark.skipif(bool(onnx_runtime.missing()), reason="ONNX's packages are not installed")


def ns_of(part):
    if isinstance(part, functools.partial):  # of `pretended`
        part = part.func.__self__.network
    modules = [part] if isinstance(part, torch.nn.Module) else [part.__self__.conv_last, part.__self__.classifier]
    return 10 * sum(p.numel() for module in modules for p in module.parameters())


@pytest.fixture(scope="module")
def clock():
    """Times parts by their parameters; whole networks take 1.25 times as long, which the correction has to find."""

    def run_timed(parts, x):
        whole = len(parts) == 1
        return [int(1.25 * ns_of(parts[0]))] if whole else [ns_of(part) for part in parts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "run_timed", run_timed)
        patch.setattr(timing, "rounds", lambda most, seconds, fewest: range(1))
        yield REAL


@pytest.fixture(scope="module")
def table(clock):
    return latency.measure_table(Torch(SPACE, 1, CPU))


OFFER = (
    "all candidates at 16 px with 3 classes: FLOPs 146.0k to 243.6k, parameters 3.684k to 6.724k, "
    "latency in torch {} ms to {} ms"
)


def times(table):
    """The lowest and the highest latency that a table has, in ms."""
    rows = table["medians"]
    return [milliseconds((table["stem_and_tail"] + sum(map(pick, rows))) / 1e6) for pick in (min, max)]


def true_ns(candidate, space=SPACE):
    return int(1.25 * ns_of(timing.build(space, candidate, CPU)))


# --- the table -----------------------------------------------------------------------------------------------


def test_the_table_has_every_choice_and_predicts_whole_networks(table):
    assert table["correction"] == pytest.approx(1.25, rel=1e-3) and table["spread"] == 0
    assert [len(row) for row in table["medians"]] == [4] * 5
    timed = latency.with_latency(SPACE, table)
    for candidate in [(0, 1, 2, 3, 0), (3, 3, 3, 3, 3), (2, 0, 1, 0, 2)]:
        assert timed.cost("latency", candidate) == pytest.approx(true_ns(candidate), rel=1e-3)
    assert table["device"] == latency.device_name(CPU) and table["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    "space",
    [
        dataclasses.replace(SPACE, widths=(0.5, 1.0)),
        dataclasses.replace(SPACE, widths=(0.5, 1.0), architecture=(0, 1, 2, 3, 0)),
        RAGGED,
    ],
    ids=["joint", "channels", "operations of stages"],
)
def test_widths_and_operations_of_stages_are_in_the_table(clock, space):
    timed = latency.with_latency(space, latency.measure_table(Torch(space, 1, CPU)))
    for candidate in (tuple(n - 1 for n in space.choices), (0,) * len(space.choices)):
        assert timed.cost("latency", candidate) == pytest.approx(true_ns(candidate, space), rel=1e-2)


def test_parts_are_those_of_stand_alone_networks_with_bn_folded():
    network = timing.build(SPACE, (0, 1, 2, 3, 0), CPU)
    assert not [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    x = timing.random_images(SPACE, 2, CPU)
    parts = [network.first_conv, *network.features, network.head]
    with torch.inference_mode():
        y = x
        for part in parts:
            y = part(y)
        assert torch.equal(y, network(x)) and y.isfinite().all() and y.shape == (2, 3)


def test_the_real_clock_measures_and_the_command_writes_its_file(tmp_path, monkeypatch, clock):
    """Each time is that of its own part."""
    ticks = itertools.count()
    with monkeypatch.context() as patch:
        for threads, name in ((1, "thread_time_ns"), (2, "perf_counter_ns")):
            patch.setattr(torch, "get_num_threads", lambda n=threads: n)
            patch.setattr(timing.time, name, lambda: next(ticks) ** 2)
            first, second = clock[0]([lambda x: x, lambda x: x], torch.zeros(1))
            assert second == first + 2
            patch.delattr(timing.time, name)
    monkeypatch.setattr(timing, "run_timed", clock[0])
    monkeypatch.setattr(tester, "open_space", lambda args: (SPACE, None))
    words = ("--mode", "latency", "--latency-batch-size", 2, "--threads", 1, "--device", "cpu", "--out", tmp_path)
    stdout, _ = run("tester.py", *words)
    found = read_json(tmp_path / "latency.json")
    assert found["threads"] == 1 and found["batch_size"] == 2 and found["versions"].startswith("python ")
    setting, costs = stdout.splitlines()[:2]
    assert found["runtime"] == "torch" and costs == OFFER.format(*times(found))
    assert setting.startswith(f"{tmp_path / 'latency.json'}: PyTorch {torch.__version__} on ")
    assert "1 thread, batch size 2; spread" in setting
    assert latency.read_table(tmp_path / "latency.json", SPACE) == found


def test_rounds_end_by_number_or_by_time(clock):
    assert list(clock[1](7, 1000, 3)) == list(range(7))
    assert list(clock[1](100, -1, 3)) == list(range(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"medians": [[1.5] * 4] * 5}, "not a table of latencies"),
        ({"medians": 3}, "not a table of latencies"),
        ({"networks": {"architectures": [[0] * 5], "measured": [[7], [0]]}}, "not a table of latencies"),
        ({"networks": {"architectures": [[4] * 5], "measured": [[7], [7]]}}, "not a table of latencies"),
        ({"medians": [[10] * 4] * 4}, "another search space"),
        ({"space": SearchSpace().to_dict()}, "another search space than the supernet's"),
        ({"device": "Cray-1"}, "measured on 'Cray-1', this is"),
        ({"threads": 1000}, "measured with 1000 threads, this process has"),
        ({"torch": "1.0"}, "measured with torch 1.0, this is"),
        ({"runtime": "TVM"}, "not a table of latencies"),
        ({"runtime": "onnxruntime"}, "not a table of latencies.*--mode latency --runtime onnxruntime"),
    ],
)
def test_a_table_of_something_else_is_refused_unless_asked_for(table, tmp_path, change, message):
    path = tmp_path / "latency.json"
    write_json(path, table | change)
    with pytest.raises(UserError, match=message):
        latency.read_table(path, SPACE)
    if "measured" in message:
        assert latency.read_table(path, SPACE, foreign=True)["spread"] == 0


def test_networks_are_measured_at_the_scale_of_the_table(table, monkeypatch):
    """A device that is half as fast as when the table was measured changes nothing."""
    fast = timing.run_timed
    candidates = [(0, 1, 2, 3, 0), (3, 3, 3, 3, 3)]
    true = [true_ns(c) for c in candidates]
    assert latency.measure_like(table, SPACE, candidates) == (true, 1)
    monkeypatch.setattr(timing, "run_timed", lambda parts, x: [2 * ns for ns in fast(parts, x)])
    assert latency.measure_like(table, SPACE, candidates) == (true, 0.5)


def test_other_measurements_take_turns_with_the_table(clock, monkeypatch):
    class Other:
        seconds, turns = 0, 0

        def round(self):
            self.turns += 1

    other = Other()
    monkeypatch.setattr(timing, "rounds", lambda most, seconds, fewest: range(3))
    latency.measure_table(Torch(SPACE, 1, CPU), beside=(other,))
    assert other.turns == 3


def test_a_device_that_slows_down_between_networks_changes_nothing(clock, monkeypatch):
    """The reference slows down too. Fails if latencies are not those beside the reference."""
    candidates = [(0, 1, 2, 3, 0), (3, 3, 3, 3, 3), (0, 0, 0, 0, 0)]
    runtime = Torch(SPACE, 1, CPU)
    networks = Networks(runtime, candidates)
    fast = timing.run_timed
    slowness = iter(1 + i // 7 for i in itertools.count())  # changes within the measurement of a network, too
    monkeypatch.setattr(timing, "run_timed", lambda parts, x: [next(slowness) * ns for ns in fast(parts, x)])
    monkeypatch.setattr(timing, "rounds", lambda most, seconds, fewest: range(9))
    timing.take_turns(runtime, networks)
    found = networks.medians()
    assert [ns / found[0] for ns in found] == pytest.approx([true_ns(c) / true_ns(candidates[0]) for c in candidates])


# --- ONNX Runtime --------------------------------------------------------------------------------------------


class Pretended:
    """Graphs and sessions that are networks of torch."""

    def __init__(self, what, candidate=None):
        self.space = what if candidate is None else None
        self.network = self.graph if candidate is None else what
        self.built = {}

    def graph(self, candidate):
        if candidate not in self.built:
            self.built[candidate] = timing.build(self.space, candidate, CPU)
        return self.built[candidate]

    def run(self, _, inputs):
        return self.network(torch.from_numpy(inputs["images"]))


@pytest.fixture
def pretended(monkeypatch):
    """ONNX Runtime without its packages, by the clock of these tests."""
    monkeypatch.setattr(onnx_runtime, "missing", lambda: None)
    monkeypatch.setattr(onnx_runtime, "version", lambda: "1.2.3")
    monkeypatch.setattr(onnx_runtime, "Graphs", Pretended)
    monkeypatch.setattr(onnx_runtime, "session", lambda network: Pretended(network, ()))
    onnx_runtime.graphs_of.cache_clear()
    yield
    onnx_runtime.graphs_of.cache_clear()


def test_latencies_of_stages_with_other_operations_are_fitted(clock, pretended):
    found = latency.measure_table(latency.open_runtime("onnxruntime", RAGGED, 1, CPU))
    assert [len(row) for row in found["medians"]] == [2, 2, 4, 4, 4]
    timed = latency.with_latency(RAGGED, found)
    for candidate in [(0, 1, 2, 3, 0), (1, 1, 3, 3, 3), (1, 0, 1, 0, 2)]:
        assert timed.cost("latency", candidate) == pytest.approx(true_ns(candidate, RAGGED), rel=1e-3)


def test_latencies_are_fitted_to_whole_networks(clock, pretended, tmp_path, monkeypatch):
    found = latency.measure_table(latency.open_runtime("onnxruntime", SPACE, 2, CPU))
    timed = latency.with_latency(SPACE, found)
    for candidate in [(0, 1, 2, 3, 0), (3, 3, 3, 3, 3), (2, 0, 1, 0, 2)]:
        assert timed.cost("latency", candidate) == pytest.approx(true_ns(candidate), rel=1e-3)
    assert [min(row) for row in found["medians"]] == [0] * 5 and found["spread"] < 1e-3
    assert (found["runtime"], found["onnxruntime"], found["kind"], found["batch_size"]) == (
        "onnxruntime", "1.2.3", "cpu", 2,
    )  # fmt: skip
    write_json(tmp_path / "latency.json", found)
    assert latency.read_table(tmp_path / "latency.json", SPACE)["medians"] == found["medians"]
    assert latency.measure_like(found, SPACE, [(2, 0, 1, 0, 2)]) == ([true_ns((2, 0, 1, 0, 2))], 1)
    assert latency.mismatch(found) is None
    monkeypatch.setattr(onnx_runtime, "version", lambda: "1.2.4")
    assert latency.mismatch(found) == "with onnxruntime 1.2.3, this is 1.2.4"
    monkeypatch.setattr(onnx_runtime, "version", lambda: None)
    assert latency.mismatch(found) is None


def test_the_spread_of_a_fit_is_the_error_of_other_networks(clock, pretended, monkeypatch):
    """Networks whose first two operations are equal take 10% longer, which no sum of choices can say."""
    plain = timing.run_timed

    def with_pairs(parts, x):
        network = parts[0].func.__self__.network
        longer = network.architecture[0] == network.architecture[1]
        return [int(ns * (1.1 if longer else 1)) for ns in plain(parts, x)]

    monkeypatch.setattr(timing, "run_timed", with_pairs)
    runtime = latency.open_runtime("onnxruntime", SPACE, 1, CPU)
    found = latency.measure_table(runtime)
    predicted = latency.predict(SPACE, found["medians"], found["stem_and_tail"], found["networks"]["architectures"])
    errors = [abs(p - ns) / ns for p, ns in zip(predicted, found["networks"]["measured"][0])]
    assert found["spread"] == pytest.approx(max(errors)) and 0.02 < found["spread"] < 0.2


@pytest.mark.parametrize("space", [SPACE, SearchSpace(), RAGGED], ids=["small", "paper", "operations of stages"])
def test_networks_of_a_fit_have_every_choice_equally_often(space):
    drawn = latency.evenly(space, np.random.default_rng(0))
    assert len(drawn) >= 2 * (1 + sum(n - 1 for n in space.choices)) and len(set(drawn)) > 0.9 * len(drawn)
    for block, n in enumerate(space.choices):
        assert {sum(c[block] == choice for c in drawn) for choice in range(n)} == {len(drawn) // n}


def test_networks_of_a_fit_are_those_of_folders_written_before():
    drawn = latency.evenly(SPACE, np.random.default_rng(0))
    assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == "96d12b22e301fb6f"


def test_what_onnx_runtime_cannot_do_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_runtime, "missing", lambda: "pip install onnx onnxscript onnxruntime")
    words = ("--runtime", "onnxruntime", "--space", "small", "--out", tmp_path)
    for more, message in (
        ("--mode latency", "--runtime onnxruntime: needs pip install onnx onnxscript onnxruntime"),
        ("--mode latency --device cuda", "--device cuda: ONNX Runtime is measured on the CPU"),
        ("--mode gen", "--runtime has no effect with --mode gen"),
    ):
        _, stderr = run("tester.py", *words, more, code=2)
        assert message in stderr.splitlines()[-1] and "Traceback" not in stderr
    monkeypatch.setattr(onnx_runtime, "missing", lambda: None)
    with pytest.raises(UserError, match="a space with widths has too many choices"):
        latency.open_runtime("onnxruntime", SearchSpace(widths=(0.5, 1.0)), 1, CPU)


def make_own_operations(tmp_path):
    """The flags of a space with an operation that torch.onnx can't export."""
    (tmp_path / "own.py").write_text(
        "import blocks\n\n"
        "@blocks.register('branches')\n"
        "class Branches(blocks.ShuffleNetBlock):\n"
        "    def __init__(self, shape, width, affine):\n"
        "        super().__init__(shape, width, affine, 3)\n\n"
        "    def forward(self, x):\n"
        "        x = super().forward(x)\n"
        "        return x if x.is_meta or x.sum() > -1e9 else -x\n"
    )
    stages = [{"blocks": 2, "channels": 16, "stride": 2}, {"blocks": 1, "channels": 24, "stride": 2}]
    space = {"stem": {"channels": 8}, "stages": stages, "last": {"channels": 32}}
    space["operations"] = ["shufflenet_3x3", "branches"]
    (tmp_path / "own.yml").write_text(json.dumps({"space": space}))
    return ("--operations", tmp_path / "own.py", "--space", tmp_path / "own.yml", "--input-size", 16)


@needs_onnx
def test_an_operation_that_cannot_be_exported_is_named(tmp_path):
    words = make_own_operations(tmp_path)
    _, stderr = run("tester.py", "--mode", "latency", "--runtime", "onnxruntime", *words, "--out", tmp_path, code=2)
    last = stderr.splitlines()[-1]
    assert "operation 'branches' at BlockShape(in_channels=8" in last and "can't be exported to ONNX (" in last
    assert "Traceback" not in stderr and not (tmp_path / "latency.json").exists()


@needs_onnx
@pytest.mark.parametrize("space", [SPACE, pytest.param(RAGGED, marks=pytest.mark.slow)], ids=["same", "of stages"])
def test_graphs_that_are_put_together_are_those_of_networks(space):
    """Their outputs are torch's at any batch size, and their nodes those of a network exported as a whole."""
    import onnx

    torch.manual_seed(0)
    graphs = onnx_runtime.Graphs(space)
    torch.manual_seed(0)
    parts = graphs._parts()
    candidate = (0, 1, 2, 3, 3)
    keys = [(name, shape) for (name, _), shape in zip(space.chosen(candidate), space.blocks)]
    session = onnx_runtime.session(graphs.network(candidate))
    for n in (1, 3):
        x = torch.randn(n, 3, 16, 16)
        (found,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            for key in [("stem", None), *keys, ("head", None)]:
                x = parts[key][0](x)
        assert torch.from_numpy(found).sub(x).abs().max() < 1e-4 * x.abs().max()
    network = timing.build(space, candidate, CPU)
    whole = torch.onnx.export(network, (torch.zeros(1, 3, 16, 16),), dynamo=True, verbose=False).model_proto
    kinds = [
        Counter(node.op_type for node in model.graph.node if node.op_type != "Identity")
        for model in (whole, onnx.load_from_string(graphs.network(candidate)))
    ]
    assert kinds[0] == kinds[1]


@needs_onnx
def test_onnx_runtime_measures_and_the_command_writes_its_file(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(timing, "run_timed", clock[0])
    monkeypatch.setattr(tester, "open_space", lambda args: (SPACE, None))
    words = ("--mode", "latency", "--runtime", "onnxruntime", "--threads", 1, "--out", tmp_path)
    stdout, _ = run("tester.py", *words)
    found = latency.read_table(tmp_path / "latency.json", SPACE)
    assert f": ONNX Runtime {found['onnxruntime']} on " in stdout and found["stem_and_tail"] > 0


# --- another device ------------------------------------------------------------------------------------------


@pytest.fixture
def phone(pretended, monkeypatch):
    """A function that measures the networks in a folder by the clock of these tests, `times` as slow: as another
    device does that has two measurements of each, without files of networks."""
    written = {}

    def write_folder(folder, runtime, candidates, threads):
        written[str(folder)] = list(candidates)
        pathlib.Path(folder).mkdir(parents=True)
        return len(candidates), 3_000_000

    monkeypatch.setattr(latency, "write_folder", write_folder)

    def measure(folder, times=1, **changes):
        ns = {elsewhere.name_of(c): [times * true_ns(c), times * true_ns(c)] for c in written[str(folder)]}
        setting = {"device": "a phone", "onnxruntime": "1.0", "threads": 1, "batch_size": 1, "ns": ns}
        write_json(folder / "results.json", setting | changes)
        return written[str(folder)]

    return measure


def test_a_table_of_another_device_is_that_of_a_measurement_here(clock, phone, tmp_path, monkeypatch):
    """The same networks at the same speed give the same table."""
    monkeypatch.setattr(tester, "open_space", lambda args: (SPACE, None))
    words = ("--mode latency --threads 1 --elsewhere", tmp_path / "phone", "--out", tmp_path)
    stdout, _ = run("tester.py", *words)
    assert re.search(r"phone: \d+ networks, 3\.0 MB; on the device, run python on_device\.py in it\nnext: ", stdout)
    assert not (tmp_path / "latency.json").exists()
    phone(tmp_path / "phone")
    stdout, _ = run("tester.py", *words)
    assert ": ONNX Runtime 1.0 on a phone, 1 thread, batch size 1; spread 0.0%" in stdout
    found = latency.read_table(tmp_path / "latency.json", SPACE)
    here = latency.measure_table(latency.open_runtime("onnxruntime", SPACE, 1, CPU))
    assert found["spread"] < 1e-3 and found["networks"]["architectures"] == [
        list(c) for c in here["networks"]["architectures"]
    ]
    for candidate in [(0, 1, 2, 3, 0), (3, 3, 3, 3, 3)]:
        predicted = [latency.with_latency(SPACE, t).cost("latency", candidate) for t in (found, here)]
        assert predicted == pytest.approx([true_ns(candidate)] * 2, rel=1e-3)


def test_a_search_for_another_device_goes_on_when_its_best_are_measured_there(world, phone, tmp_path, monkeypatch):
    """Nothing is measured here. All are beyond the limit first, so that more generations follow, then all hold."""
    monkeypatch.setattr(search, "write_report", lambda out: out)
    run("tester.py", "--mode latency --threads 1 --elsewhere", tmp_path / "phone", *world[2:4], *world[5:])
    phone(tmp_path / "phone")
    run("tester.py", "--mode latency --threads 1 --elsewhere", tmp_path / "phone", *world[2:4], *world[5:])
    monkeypatch.setattr(timing, "run_timed", None)
    words = (*world, "--limit", "latency=50%")
    _, stderr = run("search.py", *words)
    folder = tmp_path / "device" / "003"
    assert (
        f"the winner's latency is not checked: {folder} has 15 networks, 3.0 MB, for a phone; run on_device" in stderr
    )
    for changes, message in (
        ({"threads": 2}, "measured with threads 2, the table with 1; measure both in the same way"),
        ({"ns": {}}, "has no nanoseconds of "),
        ({"ns": None}, "not what on_device.py writes; it needs device, "),
    ):
        phone(folder, **changes)
        _, stderr = run("search.py", *words, "--resume", code=2)
        assert message in stderr.splitlines()[-1] and not read_json(state_path(tmp_path))["confirmations"]
    candidates = phone(folder)
    table = read_json(tmp_path / "latency.json")
    references = [tuple(c) for c in table["networks"]["architectures"][:4]]
    assert candidates[:4] == references and len(candidates) == 15
    results = read_json(folder / "results.json")
    slow = {elsewhere.name_of(c): [1.38 * true_ns(c)] for c in candidates[4:]}  # in relation to the references
    write_json(folder / "results.json", results | {"ns": results["ns"] | slow})
    state = read_json(state_path(tmp_path))
    write_json(state_path(tmp_path), {name: value for name, value in state.items() if name != "largest"})  # as before
    with monkeypatch.context() as patch:
        patch.setattr(Limits, "largest", lambda limits: tuple(state["best"]["architecture"]))
        patch.setattr(Limits, "optimum", lambda *_: candidates[-1])
        _, stderr = run("search.py", *words, "--resume")
    largest = candidates[-1]
    ms = milliseconds(1.38 * true_ns(largest) / 1e6)
    assert f"the largest legal candidate, {list(largest)}: measured {ms} ms" in stderr
    assert "none holds: 1 more generations" in stderr and "device/004 has " in stderr
    phone(tmp_path / "device" / "004")
    _, stderr = run("search.py", *words, "--resume")
    state = read_json(state_path(tmp_path))
    assert len(state["confirmations"]) == 2 and state["done"] and state["best"]
    limits = Limits(latency.with_latency(SPACE, table), bounds_of(state["settings"]))
    assert not limits.excess(largest) and all(
        SPACE.flops(c) <= SPACE.flops(largest)
        for c in itertools.product(*map(range, SPACE.choices))
        if not limits.excess(c)
    )


@needs_onnx
def test_the_script_for_another_device_measures_what_is_written(tmp_path, monkeypatch):
    """In a process of its own, without the project; graphs with shared weights compute what whole ones do."""
    torch.manual_seed(0)
    runtime = latency.open_runtime("onnxruntime", SPACE, 2, CPU)
    n, size = latency.write_networks(tmp_path / "folder", runtime)
    files = list((tmp_path / "folder").iterdir())
    graphs = [path for path in files if path.suffix == ".onnx"]
    assert len(graphs) == n and sum(p.stat().st_size for p in files if p.suffix in (".onnx", ".bin")) == size
    assert not [path for path in files if os.fsencode(ROOT) in path.read_bytes()]
    candidate = latency.draw(SPACE)[0][3]
    moved = [runtime.graphs.network(candidate), str(tmp_path / "folder" / f"{elsewhere.name_of(candidate)}.onnx")]
    expected, found = (on_device.open_session(model, 1).run(None, runtime.x)[0] for model in moved)
    assert np.array_equal(expected, found)
    script = (
        (tmp_path / "folder" / "on_device.py").read_text().replace("ROUNDS, FEWEST = 10, 2", "ROUNDS, FEWEST = 2, 2")
    )
    (tmp_path / "folder" / "on_device.py").write_text(script)
    subprocess.run([sys.executable, "folder/on_device.py"], cwd=tmp_path, check=True, timeout=300, capture_output=True)
    found = latency.table_elsewhere(SPACE, tmp_path / "folder")
    assert found["batch_size"] == 2 and found["onnxruntime"] == onnx_runtime.version() and found["stem_and_tail"] > 0
    monkeypatch.setattr(elsewhere, "MOST_BYTES", 10_000)
    with pytest.raises(UserError, match=rf"{n} networks would fill 0\.\d GB, of 0\.0 at most; choose a smaller space"):
        latency.write_networks(tmp_path / "large", runtime)
    assert not (tmp_path / "large").exists()


def test_the_script_for_another_device_counts_time_on_windows_too(tmp_path, monkeypatch):
    """There the clock of a thread advances in ticks, longer than a network takes."""
    write_json(tmp_path / "networks.json", {"threads": 1, "input": [1], "reference": "0"})
    (tmp_path / "0.onnx").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", argparse.Namespace(__version__="1.2.3"))
    session = argparse.Namespace(run=lambda *inputs: None)
    monkeypatch.setattr(on_device, "open_session", lambda model, threads: session)
    monkeypatch.setattr(on_device, "sys", argparse.Namespace(argv=[tmp_path / "on_device.py"], platform="win32"))
    monkeypatch.setattr(on_device.time, "thread_time_ns", lambda: 15_625_000)
    on_device.main()
    assert all(ns > 0 for ns in read_json(tmp_path / "results.json")["ns"]["0"])


@pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="onnx is not installed")
def test_a_folder_for_another_device_is_of_one_space(tmp_path):
    """Networks of the same names may be those of other images; a folder is written anew without its results."""
    import onnx

    def written(space):
        graphs = argparse.Namespace(network=lambda candidate: onnx.ModelProto().SerializeToString())
        runtime = argparse.Namespace(space=space, graphs=graphs, x={"images": np.zeros((1, 3, 16, 16))})
        return latency.write_networks(folder, runtime)[0]

    folder, larger = tmp_path / "phone", dataclasses.replace(SPACE, input_size=32)
    n = written(SPACE)
    ns = {path.stem: [9] for path in folder.glob("*.onnx")}
    setting = {"device": "a phone", "onnxruntime": "1.0", "threads": 1, "batch_size": 1}
    write_json(folder / "results.json", setting | {"ns": ns})
    table = latency.table_elsewhere(SPACE, folder)
    references = [tuple(c) for c in table["networks"]["architectures"][:4]]
    assert latency.measure_like(table, SPACE, references, folder)[0] == [9] * 4
    message = re.escape(f"{folder}: its networks are of another search space; remove this folder, or name another one")
    with pytest.raises(UserError, match=message):
        latency.table_elsewhere(larger, folder)
    with pytest.raises(UserError, match=message):
        latency.measure_like(table, larger, references, folder)
    (folder / "results.json").unlink()
    (folder / "network.onnx").touch()  # is not one of them
    (folder / "0-0.onnx").touch()
    assert written(larger) == n and len([*folder.glob("*.onnx")]) == n + 1 and (folder / "network.onnx").exists()
    setup = read_json(folder / "networks.json")
    write_json(folder / "networks.json", {name: value for name, value in setup.items() if name != "space"})
    write_json(folder / "results.json", setting | {"ns": ns})
    assert latency.table_elsewhere(SPACE, folder)["medians"] == table["medians"]  # as a folder of before
    write_json(folder / "results.json", setting | {"ns": {}})
    with pytest.raises(UserError, match=r"has no nanoseconds of .*; measure this folder again, or remove it first"):
        latency.table_elsewhere(SPACE, folder)


# --- the record of a search ----------------------------------------------------------------------------------


def own_settings(high):
    return settings(SPACE, 6, generations=4, seed=2, limits={"latency": [None, high]})


def run_search(out, timed, own, measure, stop_after=10**9):
    """A search with its confirmations, `measure(candidate)` in ns, started or resumed; returns the state."""
    table = {"medians": timed.costs.latency, "stem_and_tail": timed.costs.fixed_latency}
    while True:
        before = len(read_results(out))
        record = fill(out, {**own, "latency": table}, lambda c: result(c, acc1=reward(c)), stop_after)
        stop_after -= len(record.results) - before
        if not record.state["done"]:
            return None
        if not search.unconfirmed(record.state):
            return record.state
        evolution = record.evolution
        best = (evolution.front() if evolution.objectives else evolution.legal_ranked())[:10]
        record.confirm({c: measure(c) for c in best})
        record.lock.close()


def test_the_best_are_measured_in_the_setting_of_the_table(table, monkeypatch):
    found = []

    def run_timed(parts, x):
        found.append((len(x), torch.get_num_threads()))
        return [1000] * len(parts)

    real = latency.open_runtime
    monkeypatch.setattr(timing, "run_timed", run_timed)
    latency.measure_like(table | {"threads": 2, "batch_size": 3}, SPACE, [(0,) * 5])
    assert set(found) == {(3, 2)} and torch.get_num_threads() == 1
    opened = []
    monkeypatch.setattr(latency, "open_runtime", lambda *how: opened.append(how) or real("torch", *how[1:]))
    for runtime in ("onnxruntime", "torch"):
        latency.measure_like(table | {"runtime": runtime}, SPACE, [(0,) * 5])
    assert opened == [("onnxruntime", SPACE, 1, CPU), ("torch", SPACE, 1, CPU)]


@pytest.fixture(scope="module")
def timed(table):
    return latency.with_latency(SPACE, table)


def test_the_next_one_that_holds_wins(timed, tmp_path):
    high = timed.quantile("latency", 0.5)
    slow = set()

    def measure(candidate):
        """The two that are measured first are slower than predicted."""
        if len(slow) < 2:
            slow.add(candidate)
        return high + 1 if candidate in slow else high

    state = run_search(tmp_path, timed, own_settings(high), measure)
    (row,) = state["confirmations"]
    assert row["after"] == 4 and row["correction"] is None and row["generations"] == 0 and state["done"]
    assert [m["holds"] for m in row["measured"]] == [False, False] + [True] * 8
    assert state["best"]["architecture"] == row["measured"][2]["architecture"]
    assert timed.load_architecture(tmp_path / "checkpoints" / "best.json") == tuple(state["best"]["architecture"])
    assert state["best"]["latency_ms"] == row["measured"][2]["predicted_ms"] and "params" not in state["best"]
    assert SearchResults(tmp_path).legal[0]["architecture"] == state["best"]["architecture"]


def test_the_winner_of_a_front_was_measured(timed, tmp_path, monkeypatch, capsys):
    """Without the first of the front, which breaks the limit, candidates that only it dominates are in the front."""
    monkeypatch.setattr(f"{__name__}.reward", lambda candidate: 100 * random.Random(str(candidate)).random())
    high = timed.quantile("latency", 0.5)
    own, found = own_settings(high) | {"objectives": ["acc1", "flops"]}, []

    def measure(candidate):
        found.append(candidate)
        return high + (candidate == found[0])

    state = run_search(tmp_path, timed, own, measure)
    (row,) = state["confirmations"]
    checkpoints = tmp_path / "checkpoints"
    assert [m["holds"] for m in row["measured"][:2]] == [False, True]
    assert timed.load_architecture(checkpoints / "front" / "000.json") not in found
    assert state["best"]["architecture"] == row["measured"][1]["architecture"]
    assert timed.load_architecture(checkpoints / "best.json") == found[1]
    results = SearchResults(tmp_path)
    assert results.winner["architecture"] == list(found[1])
    search.print_best(results)
    assert "\nthe first of the front that was measured and holds: rank " in capsys.readouterr().out
    assert run_search(tmp_path, timed, own, measure)["best"] == state["best"]  # as --resume finds it


def by_latency(timed):
    return lambda candidate: timed.cost("latency", candidate) / 1e5


def test_a_search_that_stops_anywhere_replays_its_confirmations(timed, tmp_path, monkeypatch):
    """The best are the slowest, so the first ten break the limit, and the generations after the correction too."""
    monkeypatch.setattr(f"{__name__}.reward", by_latency(timed))
    high, own = timed.quantile("latency", 0.6), None
    own = own_settings(high)

    def measure(candidate):
        return int(1.2 * timed.cost("latency", candidate)) + sum(candidate) % 3 * 100

    whole = run_search(tmp_path / "whole", timed, own, measure)
    rows = whole["confirmations"]
    assert len(rows) > 1 and rows[0]["correction"] == pytest.approx(1.2, abs=0.01) and rows[0]["after"] == 4
    assert whole["generation"] == 4 + sum(row["generations"] for row in rows)
    assert measure(tuple(whole["best"]["architecture"])) <= high
    results = read_results(tmp_path / "whole")
    assert len(results) == 6 * whole["generation"]
    later = [r for r in results[24:] if r["latency_ms"] * rows[0]["correction"] > high / 1e6]
    assert not later  # what follows the correction meets the corrected limit
    for n in (1, 23, 24, 25, 29, 30):
        out = tmp_path / str(n)
        assert run_search(out, timed, own, measure, stop_after=n) is None or n >= len(results)
        again = run_search(out, timed, own, measure)
        assert again["confirmations"] == rows and again["best"] == whole["best"]
        assert read_results(out) == results


def test_after_three_corrections_there_is_no_winner(timed, tmp_path):
    high = timed.quantile("latency", 0.6)
    state = run_search(tmp_path, timed, own_settings(high), lambda candidate: high + 1 + sum(candidate))
    assert [row["correction"] is None for row in state["confirmations"]] == [False, False, False, True]
    assert state["done"] and state["best"] is None and not (tmp_path / "checkpoints" / "best.json").exists()


# --- as a user types it --------------------------------------------------------------------------------------


@pytest.fixture
def world(tree, images, tmp_path, table, monkeypatch, forked):
    """The words of a search in a folder with a supernet, its space and a table, of the form before there were
    runtimes; evaluations are made up."""
    config = DataConfig(input_size=16, val_resize=18, heldout_per_class=3)
    content = {"version": 1, "kind": "supernet", "step": 1, "space": SPACE.to_dict(), "data": config.to_dict()}
    content |= {"split": Data.of(images, config).split, "classes": ["apple", "bird", "car"], "architecture": None}
    torch.save(content | {"model": ShuffleNetV2OneShot(space=SPACE).state_dict()}, tmp_path / "s.pth")
    write_json(tmp_path / "nni_auto_gen_search_space.json", SPACE.nni_search_space())
    write_json(tmp_path / "latency.json", table)
    monkeypatch.setattr(local_engine, "_evaluate", evaluate)
    small = "--population 6 --generations 3 --engine local --concurrency 1 --device cpu --loader torchvision"
    return ("--data-dir", tree, "--checkpoint", tmp_path / "s.pth", small, "--out", tmp_path)


def evaluate(trial, candidates):
    return [result(c, acc1=reward(c), loss=1 / (1 + reward(c))) for c in candidates]


def test_search_under_a_limit_on_latency(world, timed, tmp_path, monkeypatch):
    limit = f"latency={timed.quantile('latency', 0.5) / 1e6:.4f}ms"
    monkeypatch.setattr(search, "write_report", lambda out: out)  # test_front.py draws one
    stdout, stderr = run("search.py", *world, "--limit", limit, "--limit", "params=90%")
    state = read_json(state_path(tmp_path))
    assert "measuring the 10 best candidates as whole networks in PyTorch" in stderr and "rank 1: predicted" in stderr
    assert f"latencies are those of PyTorch {torch.__version__} on " in stderr
    assert len(state["confirmations"]) == 1 and state["settings"]["latency"]["medians"]
    assert f"space: {OFFER.format(*times(read_json(tmp_path / 'latency.json')))}\n" in stderr
    assert "excludes no candidate" not in stderr
    best = timed.load_architecture(tmp_path / "checkpoints" / "best.json")
    assert true_ns(best) <= timed.quantile("latency", 0.5) * 1.001
    assert state["best"]["latency_ms"] == pytest.approx(true_ns(best) / 1e6, rel=1e-3)
    assert state["best"]["params"] == SPACE.params(best) and "params" in stdout.splitlines()[1]
    largest = state["largest"]
    measured = largest.get("measured_ms") or SearchResults(tmp_path).measured_ms[tuple(largest["architecture"])]
    assert measured == pytest.approx(true_ns(largest["architecture"]) / 1e6, rel=1e-3)
    found = SearchResults(tmp_path)
    text = page.page(found, RandomSearch(found), FIGURES)
    assert "measured ms" in text and "latency in torch, measured;" in text
    assert "No network has been measured" not in text
    again, _ = run("search.py", *world, "--limit", limit, "--limit", "params=90%", "--resume")
    assert again == stdout and read_json(state_path(tmp_path))["confirmations"] == state["confirmations"]
    table = read_json(tmp_path / "latency.json")
    onnx = {"runtime": "onnxruntime", "onnxruntime": onnx_runtime.version() or "1.2.3"}
    for other in ({"batch_size": 2}, onnx, {"spread": 0.1}):
        write_json(tmp_path / "latency.json", table | other)
        words = (*world, "--limit", limit, "--limit", "params=90%", "--resume")
        _, stderr = run("search.py", *words, "--latency-table", tmp_path / "latency.json", code=2)
        assert "other settings: --latency-table other latencies than then" in stderr, other
        again, _ = run("search.py", *words)  # has kept its own
        assert again == stdout


def test_a_search_needs_no_onnx_runtime_until_its_best_are_measured(
    world, timed, tmp_path, table, pretended, monkeypatch
):
    """Where it is missing then, the search ends with a warning, and resumed with it, it measures them."""
    monkeypatch.setattr(search, "write_report", lambda out: out)
    fitted = latency.measure_table(latency.open_runtime("onnxruntime", SPACE, 1, CPU))
    write_json(tmp_path / "latency.json", fitted)
    words = (*world, "--limit", "latency=50%")
    with monkeypatch.context() as patch:
        patch.setattr(onnx_runtime, "missing", lambda: "pip install onnxruntime")
        _, stderr = run("search.py", *words)
    warning = "the winner's latency is not checked: ONNX Runtime needs pip install onnxruntime, then --resume"
    assert warning in stderr and "latencies are those of ONNX Runtime 1.2.3 on " in stderr
    assert not read_json(state_path(tmp_path))["confirmations"] and (tmp_path / "checkpoints" / "best.json").exists()
    _, stderr = run("search.py", *words, "--resume")
    assert "measuring the 10 best candidates as whole networks in ONNX Runtime" in stderr
    state = read_json(state_path(tmp_path))
    assert state["settings"]["latency"]["runtime"] == "onnxruntime" and len(state["confirmations"]) == 1


def test_a_limit_without_effect_and_candidates_beyond_one(world, pretended, tmp_path, monkeypatch):
    """All but two break the limit when they are measured: in the table and on the page, what is beyond is marked."""
    monkeypatch.setattr(search, "write_report", lambda out: out)
    write_json(
        tmp_path / "latency.json",
        read_json(tmp_path / "latency.json") | {"runtime": "onnxruntime", "onnxruntime": "1.2.3"},
    )
    stdout, _ = run("tester.py", "--mode gen --checkpoint", tmp_path / "s.pth", "--out", tmp_path)
    assert "latency in onnxruntime 0.0" in stdout.splitlines()[1]
    like = latency.measure_like

    def measure_like(table, space, candidates, folder):
        measured, scale = like(table, space, candidates)
        return [9 * ns if i not in (3, 5) else ns for i, ns in enumerate(measured)], scale

    monkeypatch.setattr("engines.confirmation.measure_like", measure_like)
    stdout, stderr = run("search.py", *world, "--limit", "latency=100%", "--limit", "params=80k")
    assert "warning: the limit params=80k excludes no candidate of this space: they cost 3.684k to 6.724k\n" in stderr
    assert stderr.count("excludes no candidate") == 1 and ", latency in onnxruntime 0.0" in stderr
    marks = [line.endswith("  beyond the limit") for line in stdout.splitlines()[2:12]]
    assert marks == [i not in (3, 5) for i in range(10)] and "the best that holds, measured: rank 4\n" in stdout
    assert re.search(r"\nthe largest legal candidate, .* ms measured, beyond the limit: top-1 ", stdout)
    found = SearchResults(tmp_path)
    text = page.page(found, RandomSearch(found), FIGURES)
    assert text.count('<td class="beyond">no</td>') == 8 and text.count("<td>yes</td>") == 2
    assert "Left out: the 8 that are beyond a limit" in text and "Squares, the 8 candidates" in text
    assert f"<b>{found.measured_text(found.legal[0])} ms</b><small>its latency in onnxruntime, measured; " in text
    assert "Warning: the limit params=80k excludes no candidate" in text
    assert "Predicted from a table of onnxruntime 1.2.3 on" in text
    assert "Predictions for networks that it was not made from are off by up to" in " ".join(text.split())


def test_a_foreign_table_is_refused_unless_asked_for_and_then_nothing_is_measured(
    world, timed, tmp_path, table, monkeypatch
):
    write_json(tmp_path / "other.json", table | {"device": "Cray-1"})
    monkeypatch.setattr(search, "write_report", lambda out: out)
    words = (*world, "--limit", "latency=50%", "--latency-table", tmp_path / "other.json")
    _, stderr = run("search.py", *words, code=2)
    assert "measured on 'Cray-1', this is" in stderr and "--foreign-latency-table" in stderr
    assert len(stderr.splitlines()) == 1 and not state_path(tmp_path).exists()
    _, stderr = run("search.py", *words, "--foreign-latency-table")
    assert "the winner's latency is not checked" in stderr
    assert not read_json(state_path(tmp_path))["confirmations"]
    found = SearchResults(tmp_path)
    assert "No network has been measured as a whole" in page.page(found, RandomSearch(found), FIGURES)


def test_a_confirmed_search_is_extended_with_a_foreign_table(world, tmp_path, monkeypatch):
    """The best two are measured as beyond the limit; what follows on another device is reported as predicted."""
    reported = []
    monkeypatch.setattr(search, "write_report", lambda out: reported.append(out) or out)
    like = latency.measure_like

    def measure_like(*how):
        measured, scale = like(*how)
        return [9 * ns if i < 2 else ns for i, ns in enumerate(measured)], scale

    monkeypatch.setattr("engines.confirmation.measure_like", measure_like)
    words = (*world, "--limit", "latency=50%")
    stdout, _ = run("search.py", *words)
    assert "the best that holds, measured: rank 3\n" in stdout
    before = read_json(state_path(tmp_path))
    acc1 = statistics.fmean(r["acc1"] for r in SearchResults(tmp_path).succeeded[1:3])  # what follows is third
    monkeypatch.setattr(f"{__name__}.reward", lambda candidate: acc1)
    monkeypatch.setattr(latency, "device_name", lambda device: "Cray-1")
    stdout, stderr = run("search.py", *words, "--resume --generations 4 --foreign-latency-table")
    assert "this is Cray-1: the winner's latency is not checked" in stderr
    assert "24 candidates evaluated" in stdout and len(reported) == 2
    state = read_json(state_path(tmp_path))
    assert state["confirmations"] == before["confirmations"] and state["generation"] == 4 and state["done"]
    found = SearchResults(tmp_path)
    assert found.winner["architecture"] == state["best"]["architecture"] != before["best"]["architecture"]
    assert SPACE.load_architecture(tmp_path / "checkpoints" / "best.json") == tuple(state["best"]["architecture"])
    assert "latency in torch, predicted" in page.page(found, RandomSearch(found), FIGURES)
    assert "the best that holds, predicted: rank 3\n" in stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--limit latency=1ms --latency-table none.json", "none.json: No such file"),
        ("--limit latency=0.0001ms", "is below the lowest cost of any candidate"),
        ("--latency-table latency.json", "--latency-table has no effect without a limit on latency"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(world, tmp_path, words, message):
    _, stderr = run("search.py", *world, words, code=2)
    assert message in stderr and len(stderr.splitlines()) == 1 and not state_path(tmp_path).exists()


def test_random_search_is_a_search_without_children(world, tmp_path, monkeypatch):
    """In the same record: as many candidates, none of which descends from another."""
    monkeypatch.setattr(search, "write_report", lambda out: out)
    run("search.py", *world, "--strategy", "random", "--limit", "params=90%", "--seed", 4)
    state = read_json(state_path(tmp_path))
    assert (state["settings"]["mutation"], state["settings"]["crossover"]) == (0, 0)
    found = {tuple(r["architecture"]) for r in read_results(tmp_path)}
    high = state["settings"]["limits"]["params"][1]
    assert len(found) == 18 and all(SPACE.params(c) <= high for c in found)
    assert SearchResults(tmp_path).is_random()
    drawn = Evolution.from_settings(SPACE, state["settings"] | {"seed": 4})
    assert {c for c in found if c in set(drawn.ask())} == set(drawn.population)  # the first population
    with pytest.raises(UserError, match="--mutation has no effect with --strategy random"):
        search.parse_args(["--strategy", "random", "--mutation", "5"])
    assert search.parse_args(["--strategy", "random", "--demo"]).crossover == 0


def test_a_search_that_is_resumed_has_the_table_it_began_with(tmp_path):
    """Another one may have been measured since."""
    for folder in (tmp_path, state_path(tmp_path).parent):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "latency.json").touch()
    for resume in (False, True):
        args = argparse.Namespace(latency_table=None, resume=resume)
        found = search.find_latency_table(args, tmp_path, tmp_path / "supernet.pth")
        assert (found.parent != tmp_path) == resume


# --- several searches on one supernet ------------------------------------------------------------------------

OWN = {
    "common": {"heldout-per-class": 3, "loader": "torchvision", "workers": 0, "device": "cpu", "threads": 1},
    "search": {"rank-by": "loss", "population": 6, "generations": 3, "concurrency": 1},
}


@pytest.fixture
def own(world, tree, tmp_path, monkeypatch, undrawn):
    """The current folder has a trained supernet in own/, and own.yml; the search own was made."""
    monkeypatch.chdir(tmp_path)
    supernet = tmp_path / "own" / "checkpoints" / "supernet" / "checkpoint-0006000.pth"
    supernet.parent.mkdir(parents=True)
    (tmp_path / "s.pth").rename(supernet)
    for name in ("nni_auto_gen_search_space.json", "latency.json"):
        (tmp_path / name).unlink()
    OWN["common"] |= {"data-dir": str(tree), "cache": os.environ["TEST_CACHE"]}
    (tmp_path / "own.yml").write_text(json.dumps(OWN))  # JSON is YAML
    typed("python tester.py --mode gen --config own.yml --out own")
    typed("python search.py --config own.yml --out own --engine local")
    return f"--config own.yml --checkpoint {supernet.relative_to(tmp_path)}"


def typed(line, code=0):
    """(standard output, standard error) of a command line."""
    _, script, *words = shlex.split(line)
    return run(script, *words, code=code)


def test_the_searches_of_the_page_run_in_order(own, tmp_path):
    text = (ROOT / "docs" / "search.md").read_text().split("## Several searches on one supernet")[1]
    lines = re.search(r"^```sh\n(.*?)^```$", text, re.M | re.S)[1].splitlines()
    assert len(lines) == 9
    for line in lines:
        typed(line)
    assert list(tmp_path.glob("front/checkpoints/front/*.json")) and not (tmp_path / "fast" / "latency.json").exists()
    assert SearchResults(tmp_path / "random").is_random() and (tmp_path / "own" / "report.html").exists()
    states = {name: read_json(state_path(tmp_path / name)) for name in ("own", "front", "fast", "random")}
    assert states["fast"]["best"]["latency_ms"] and states["fast"]["confirmations"]
    assert len({state["settings"]["checkpoint"] for state in states.values()}) == 1
    assert states["front"]["settings"]["objectives"] == ["acc1", "flops"] and states["front"]["generation"] == 12


def test_the_random_search_of_the_page_runs(own, tmp_path):
    text = (ROOT / "docs" / "search.md").read_text().split("## Random search")[1]
    for line in re.search(r"^```sh\n(.*?)^```$", text, re.M | re.S)[1].splitlines():
        line = line.replace("--checkpoint checkpoints/supernet/checkpoint-0150000.pth", own)
        line = line.replace("search.py", "search.py --engine local").replace("report.py .", "report.py own")
        typed(line)
    assert SearchResults(tmp_path / "random").is_random()


def test_a_space_given_for_other_images_is_that_of_the_supernet(own, tmp_path):
    """As in a settings file, which has the space and not the number of classes."""
    stages = [{"blocks": 2, "channels": 16, "stride": 2}, {"blocks": 3, "channels": 24, "stride": 2}]
    space = {"stem": {"channels": 8, "stride": 1}, "stages": stages, "last": {"channels": 32}}
    (tmp_path / "own.yml").write_text(json.dumps(OWN | {"space": space}))
    stdout, _ = typed("python tester.py --mode gen --config own.yml --out own")
    assert stdout.splitlines()[1] == OFFER.split(", latency")[0]
    typed("python tester.py --mode latency --config own.yml --out own")
    assert read_json(tmp_path / "own" / "latency.json")["space"] == SPACE.to_dict()
    (tmp_path / "own.yml").write_text(json.dumps(OWN | {"space": space | {"last": {"channels": 64}}}))
    stdout, _ = typed("python tester.py --mode gen --config own.yml --out own")
    assert " at 224 px with 1000 classes: " in stdout
    next(tmp_path.glob("own/checkpoints/supernet/*.pth")).write_text("damaged")
    assert typed("python tester.py --mode gen --config own.yml --out own") == (stdout, "")


def test_what_is_advised_leads_on(own, tmp_path):
    """Each command that is printed runs, and is followed by the next one, with the supernet that was named."""
    first = f"python search.py {own} --out other --engine local --limit latency=50%"
    for what, mode in (
        ("no table of latencies, latency.json, in", "latency"),
        ("search_space.json is missing", "gen"),
    ):
        _, stderr = typed(first, code=2)
        assert what in stderr and len(stderr.splitlines()) == 1
        advised = re.search(r"(?:run|with) (python .*)", stderr)[1]
        assert f"--mode {mode} --checkpoint own/" in advised
        stdout, _ = typed(advised)
    (following,) = re.findall(r"^next: (python search\.py .*)$", stdout, re.M)
    assert "--checkpoint own/" in following
    stdout, _ = typed(f"{following} --engine local --limit latency=50%")
    channels = stdout.split("search its channels, with the flags of the supernet's training:\n")[1].splitlines()[0]
    assert channels.endswith("--out other/channels")
    write_json(tmp_path / "other" / "latency.json", {**read_json(tmp_path / "other" / "latency.json"), "space": {}})
    _, stderr = typed(f"{first} --latency-table other/latency.json --resume", code=2)
    assert "latency.json: is of another search space than the supernet's; run python tester.py --mode latency" in stderr
    assert "--checkpoint own/" in stderr


# --- the bench -----------------------------------------------------------------------------------------------


def test_errors_are_beside_those_of_predicting_the_mean():
    row = bench.errors([100, 200, 310], [110, 190, 300], [90, 210, 300])
    assert row["mean_absolute_error"] == pytest.approx(10 / 3 / 200)
    assert row["share"] == pytest.approx(10 / 200) and row["of_predicting_the_mean"] == pytest.approx(200 / 3 / 200)
    assert row["spearman"] == row["spearman_of_two_measurements"] == pytest.approx(1)


@pytest.mark.slow
def test_the_bench_predicts_searches_and_measures_again(clock, pretended, monkeypatch, tmp_path, capsys):
    """By the clock of these tests, which is additive, all predictions are right, and winners use the limit."""

    class Here:
        """Measures in this process instead of in another one, where the clock would be the real one."""

        def __init__(self, processes):
            pass

        __enter__, __exit__ = (lambda self: self), (lambda *_: None)

        def apply(self, function, arguments):
            return function(*arguments)

    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda method: argparse.Namespace(Pool=Here))
    monkeypatch.setattr(bench, "SPACES", {"small": SPACE})
    monkeypatch.setattr(bench, "EVOLUTION", bench.EVOLUTION | {"population": 20, "select": 4, "mutation": 10,
                                                               "crossover": 10, "generations": 3})  # fmt: skip
    words = ["--spaces", "small", "--networks", "4", "--searches", "2", "--batch-sizes", "1"]
    bench.main(bench.parse_args([*words, "--results", str(tmp_path / "r.json")]))
    written = read_json(tmp_path / "r.json")
    for runtime in ("torch", "onnxruntime"):
        assert written["predictions"][f"{runtime}, small, 1"]["share"] < 0.01
        rows = written["searches"][runtime]
        assert [row["share"] for row in rows] == [0.2, 0.8]
        assert all(row["holds"] and 0.9 < row["used"] <= 1.001 for row in rows)
    printed = capsys.readouterr().out
    assert printed.count("| yes |") == 4 and "ONNX Runtime, small, 1: tau with FLOPs" in printed
    assert "with the other runtime 1.00" in printed

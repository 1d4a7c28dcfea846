"""bench/gpu.py runs without a GPU; docs/scaling.md and the readme have what follows from its results on one."""

import argparse
import ast
import inspect
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_readme import PAGES, section

from bench import gpu as bench
from bench import steps
from space.search_space import SearchSpace
from training import compiled, distributed

RESULTS = ROOT / "bench" / "results" / "gpu.json"


def measured():
    return json.loads(RESULTS.read_text()).items()


def test_lines_of_the_scaling_page_are_calculated_from_a_measurement():
    row = {"images": 64, "images_per_second": 4000.0, "mb_per_image": 25.0}
    smaller = row | {"images": 32, "images_per_second": 1.0}
    rows = {"bf16, channels-last, 32 images": smaller, "bf16, channels-last": row, "bf16, NCHW": row}
    result = {"training": {"rows": rows}}
    without = bench.scaling_rows("GPU", result)["Search"]
    assert without == [
        "| one GPU, bf16 | 1.8 h | calculated: a forward pass takes a third of a step, at 4,000 images/s; "
        "prefix tree not included |"
    ]
    result["candidates"] = {"rows": {"tree, BN folded": {"seconds": 7.2}}}
    assert bench.scaling_rows("GPU", result) == {
        "Training": [
            "| one GPU, bf16 | 10.7 h | 21.4 h | calculated: 4,000 images/s of random paths, 64 images per step |"
        ],
        "What else it takes": ["| memory of one GPU, bf16 | 26 GB | 25.0 MB an image, measured; times 1,024 |"],
        "Search": ["| one GPU, tree, BN folded | 2.0 h | calculated: 7.2 s a candidate |"],
    }


def test_the_scaling_page_has_the_lines_of_the_measured_gpus():
    page = PAGES["docs/scaling.md"]
    for card, result in measured():
        for heading, lines in bench.scaling_rows(card, result).items():
            assert [line for line in lines if line not in section("docs/scaling.md", heading)] == []
        for row in result["training"]["rows"].values():
            assert f"{row['images_per_second']:,.0f}" in page and f"{row['mb_per_image']:.1f}" in page


def test_the_times_of_the_readme_are_those_of_the_scaling_page():
    (_, result), *_ = measured()
    rows, path = result["training"]["rows"], result["by hand"]["rows"][bench.ONE_PATH]
    f32, bf16 = (bench.of_most_images(rows, name) for name in ("float32", "bf16"))

    def hours(images, rate):
        return f"{images / rate / 3600:.0f}"

    low, high = hours(bench.SUPERNET_IMAGES, f32["images_per_second"]), 150_000 * path["float32"]["1024"] / 3.6e6
    supernet = (
        f"{hours(bench.SUPERNET_IMAGES, bf16['images_per_second'])} hours and {bf16['mb_per_image'] * 1.024:.0f} GB"
    )
    assert supernet in (text := section("readme.md", "1. Train the supernet"))
    assert f"{low} to {high:.0f} hours\n  and {f32['mb_per_image'] * 1.024:.0f} GB" in text
    search = hours(1000 * bench.OFFICIAL_IMAGES / 3, f32["images_per_second"])
    assert f"330M FLOPs, {search} hours," in section("readme.md", "3. Search")
    fast, slow = (bench.RETRAIN_IMAGES / 1024 * path[name]["1024"] / 3.6e6 for name in ("bf16", "float32"))
    assert f"{fast:.0f} hours with `--amp bf16` and {slow:.0f} in float32" in section("readme.md", "4. Retrain")


def test_floors_are_those_of_the_published_network():
    """The amounts of docs/scaling.md, "The amounts", at rates of one a second."""
    space = SearchSpace()
    path = space.load_architecture(ROOT / "architecture_final.json")
    floors = steps.floors_ms(space, path, 2, 1000, 1000, bytes_per_value=2)
    multiply_adds, traffic = (sum(floors[kind][n] for kind in steps.CONVOLUTIONS) for n in (0, 1))
    classifier = space.last_channels * space.n_classes
    assert multiply_adds == pytest.approx(2 * 3 * (space.flops(path) - classifier), rel=1e-9)
    assert traffic == pytest.approx(2 * bench.BYTES_BF16, rel=2e-3)  # 4.32 million values, rounded


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::cudnn_convolution", [[8, 16, 7, 7], [16, 1, 5, 5]], "depthwise"),
        ("aten::convolution_backward", [[8, 16, 7, 7], [8, 4, 7, 7], [16, 4, 1, 1]], "pointwise"),
        ("aten::cudnn_convolution", [[8, 3, 7, 7], [16, 3, 3, 3]], "other convolutions"),
        ("ConvolutionBackward0", [[8, 16, 7, 7]], "other convolutions"),
        ("aten::native_batch_norm_backward", [], "BN"),
        ("aten::_fused_sgd_", [], "optimizer"),
        ("aten::copy_", [], "copies"),
        ("aten::threshold_backward", [], "elementwise"),
        ("aten::topk", [], "rest"),
    ],
)
def test_operations_have_kinds(name, shapes, kind):
    assert steps.kind_of(name, shapes) == kind


def options(tmp_path, left):
    """Options of a run whose `left()` is the next of these numbers of seconds."""
    values = {"results": tmp_path / "gpu.json", "card": "GPU", "space": SearchSpace.for_images(32, 10)}
    return argparse.Namespace(**values, left=iter(left).__next__, device=torch.device("cpu"), full=False)


def test_a_row_that_fails_is_reported_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    """Results are in the file as soon as they exist; earlier ones of other parts stay."""
    given = options(tmp_path, [3, 2, 1, 0])
    given.results.write_text(json.dumps({"GPU": {"training": {"rows": {}}}}))

    def rows(options, folder):
        return {
            "first": lambda: {"seconds": 1.5},
            "broken": lambda: 1 / 0,
            "last": lambda: {"before": list(json.loads(given.results.read_text())["GPU"]["files"]["rows"])},
            "late": lambda: pytest.fail("there was no time left"),
        }

    monkeypatch.setattr(bench, "PARTS", {"files": (rows, 10)})
    assert bench.measure("files", given) == ["broken"]
    out, err = capsys.readouterr()
    assert "files, broken: failed: division by zero" in err and "files, late: no time left" in err
    assert "| first | 1.5 |" in out
    result = json.loads(given.results.read_text())["GPU"]
    assert result["files"]["rows"] == {"first": {"seconds": 1.5}, "last": {"before": ["first"]}}
    assert result["files"].keys() >= {"date", "commit", "versions", "cores"} and "training" in result


def test_a_part_that_fails_is_reported_and_the_next_one_runs_in_its_share(tmp_path, monkeypatch, capsys):
    ran = []

    def run(words, seconds):
        ran.append((words[words.index("--only") + 1], words[words.index("--seconds") + 1]))
        if len(ran) == 1:
            raise subprocess.TimeoutExpired("gpu.py", seconds)

    parts = {"a": (None, 10), "b": (None, 10), "c": (None, 30), "d": (None, 99)}
    monkeypatch.setattr(bench, "PARTS", parts)
    assert bench.measure_each(["a", "b", "c"], options(tmp_path, [100, 80, 75]), run) == ["a"]
    assert ran == [("a", 20), ("b", 20), ("c", 75)]  # what a part leaves, the next ones have
    assert "a: Command 'gpu.py' timed out" in capsys.readouterr().err


def test_parts_are_chosen_by_name_and_run_by_how_little_is_known(monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr(bench, "measure_each", lambda parts, options: chosen.append(parts) or [])
    for words in ([], ["--only", "files,training"]):
        bench.main(bench.parse_args([*words, "--device", "cpu"]))
    assert chosen == [
        ["ways", "candidates", "files", "commands", "processes", "training", "profile"],
        ["files", "training"],
    ]
    with pytest.raises(SystemExit):
        bench.parse_args(["--only", "files,trainings"])
    assert "trainings: not one of ways, candidates" in capsys.readouterr().err


def test_the_fastest_way_is_adopted_where_it_gains_more_than_a_tenth():
    rates = {f"128 images, {bench.EAGER}": 3000.0, f"128 images, {bench.GRAPHS}": 6600.0}
    rates |= {f"1,024 images, {bench.EAGER}": 7000.0, f"1,024 images in micro-batches of 128, {bench.COMPILED}": 7500.0}
    rates |= {f"calibration of 128 images, {bench.EAGER}": 9000.0}
    assert bench.adoption({name: {"images_per_second": rate} for name, rate in rates.items()}) == [
        "adopt 128 images, CUDA graphs of operations: 6,600 images/s, 2.20 times eager; target 6,000: reached",
        "keep 1,024 images, eager: 7,500 images/s, 1.07 times eager; target 10,000: missed",
    ]


def test_ways_run_small_on_a_cpu_and_those_that_need_a_gpu_are_left_out(tmp_path, monkeypatch, capsys):
    given = options(tmp_path, [])
    monkeypatch.setattr(compiled, "BACKEND", compiled.BACKEND)  # what it is changed to is undone
    monkeypatch.setattr(bench, "default_flops_range", lambda space: None)  # too few candidates for bins
    given.large, given.steps, given.batches = False, 1, 1
    given.space = SearchSpace(16, 3, 1, (1,), (2,), (8,), 4, 8, operations=("shufflenet_3x3", "shufflenet_5x5"))
    rows = bench.ways(given, tmp_path)
    graphed = {name for name, (*_, graphs) in bench.WAYS.items() if graphs}
    assert rows.keys() == bench.WAYS.keys() - graphed | {"calibration of 128 images, eager"}
    assert "CUDA graphs of operations need a GPU and are left out" in capsys.readouterr().err
    row = rows["1,024 images in micro-batches of 128, eager"]()
    assert row["images"] == 16 and row["images_per_second"] > 0
    assert rows["calibration of 128 images, eager"]()["images_per_second"] > 0


def test_what_needs_nni_or_dali_is_left_out_without_them(tmp_path, monkeypatch):
    given = options(tmp_path, [])
    given.large, given.files = False, 8
    monkeypatch.setattr(bench, "draw_mosaics", lambda *_, **how: None)
    for name in ("nni", "nvidia"):
        monkeypatch.setitem(sys.modules, name, None)
    assert set(bench.files(given, tmp_path)) == {"supernet.py, torchvision", "torchvision alone"}
    assert set(bench.commands(given, tmp_path)) == {"supernet.py", "tester.py", "search.py, local", "scratch.py"}


def test_a_command_that_takes_too_long_ends_with_all_that_it_started(tmp_path, monkeypatch):
    log, wait = tmp_path / "log", subprocess.Popen.wait

    def until_started(process, timeout=None):
        while timeout == 77 and not log.read_text().endswith("\n"):
            time.sleep(0.02)
        return wait(process, 0.01 if timeout == 77 else timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", until_started)
    inner = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with pytest.raises(subprocess.TimeoutExpired):
        bench.command(["-c", outer], 77, log=log)
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(log.read_text()), 0)
            time.sleep(0.05)
    with pytest.raises(RuntimeError, match="exit code 3"):
        bench.command(["-c", "import sys; sys.exit(3)"], 10, log=log)


def test_every_collective_is_called_in_a_group_of_one(monkeypatch):
    functions = {f.name: f for f in ast.parse(inspect.getsource(distributed)).body if isinstance(f, ast.FunctionDef)}
    reaching = {"_collective"}
    for _ in functions:
        reaching |= {
            n for n, f in functions.items() if {x.id for x in ast.walk(f) if isinstance(x, ast.Name)} & reaching
        }
    called, collective = set(), distributed._collective
    monkeypatch.setattr(distributed, "world_size", distributed.world_size)  # what it is changed to is undone
    monkeypatch.setattr(
        distributed, "_collective", lambda f, *args, **how: called.add(f.__name__) or collective(f, *args, **how)
    )
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        rows = bench.collectives(torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()
    assert rows.keys() - {"backend"} == {name for name in reaching if not name.startswith("_")}
    assert called == {"broadcast", "all_reduce", "all_gather_object", "broadcast_object_list"}


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_it_runs_on_a_cpu(tmp_path):
    words = ["--device", "cpu", "--results", tmp_path / "gpu.json", "--seconds", "900"]
    subprocess.run([sys.executable, "-m", "bench.gpu", *words], cwd=ROOT, check=True, timeout=950)
    (result,) = json.loads((tmp_path / "gpu.json").read_text()).values()
    rows = {part: result[part]["rows"] for part in bench.PARTS}
    assert rows["training"].keys() == bench.TRAINING.keys() and len(rows["candidates"]) == 2 * len(bench.CANDIDATES)
    assert all(0 < row["calibration_percent"] < 100 for row in rows["candidates"].values())
    assert {"supernet.py, torchvision", "torchvision alone"} <= rows["files"].keys()
    assert len(rows["ways"]) == 7 and all(row["images_per_second"] > 0 for row in rows["ways"].values())
    assert all(row["images_per_second"] > 0 for row in [*rows["files"].values(), *rows["training"].values()])
    assert {"supernet.py", "tester.py", "search.py, local", "scratch.py"} <= rows["commands"].keys()
    assert rows["processes"].keys() == {"supernet.py", "collectives"}
    assert all(row["ms"]["depthwise"] > 0 for name, row in rows["profile"].items() if name != "rates")

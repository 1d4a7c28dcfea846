"""bench/gpu.py runs without a GPU; docs/scaling.md has the lines that follow from what it has measured on one."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, load
from test_readme import PAGES, section

RESULTS = ROOT / "bench" / "results" / "gpu.json"


def measured():
    return json.loads(RESULTS.read_text()).items()


def test_lines_of_the_scaling_page_are_calculated_from_a_measurement():
    row = {"images_per_second": 4000.0, "peak_mb": 9000.0, "mb_per_image": 25.0}
    rows = {"bf16, channels-last": row, "bf16, NCHW": row}
    result = {"training": {"rows": rows, "batch_size": 64}}
    result["candidates"] = {"rows": {"tree, BN folded": {"seconds": 7.2}}}
    assert load("bench/gpu.py").scaling_rows("GPU", result) == {
        "Training": [
            "| one GPU, bf16 | 10.7 h | 21.4 h | calculated: 4,000 images/s of random paths, 64 images a step |"
        ],
        "What else it takes": ["| memory of one GPU, bf16 | 26 GB | 25.0 MB an image, measured; times 1,024 |"],
        "Search": [
            "| one GPU, bf16 | 1.8 h | calculated: a forward pass takes a third of a step, at 4,000 images/s; "
            "prefix tree not included |",
            "| one GPU, tree, BN folded | 2.0 h | calculated: 7.2 s a candidate |",
        ],
    }


def test_the_scaling_page_has_the_lines_of_the_measured_gpus():
    page = PAGES["docs/scaling.md"]
    for card, result in measured():
        for heading, lines in load("bench/gpu.py").scaling_rows(card, result).items():
            assert [line for line in lines if line not in section("docs/scaling.md", heading)] == []
        for row in result["training"]["rows"].values():
            assert f"{row['images_per_second']:,.0f}" in page and f"{row['mb_per_image']:.1f}" in page


def test_the_times_of_the_readme_are_those_of_the_scaling_page():
    bench = load("bench/gpu.py")
    (_, result), *_ = measured()
    rows, path = result["training"]["rows"], result["by hand"]["rows"][bench.ONE_PATH]
    f32, bf16 = (rows[f"{name}, channels-last"] for name in ("float32", "bf16"))

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


@pytest.mark.slow
def test_it_runs_on_a_cpu(tmp_path):
    words = ["--device", "cpu", "--results", tmp_path / "gpu.json"]
    subprocess.run([sys.executable, ROOT / "bench" / "gpu.py", *words], check=True, timeout=900)
    (result,) = json.loads((tmp_path / "gpu.json").read_text()).values()
    bench = load("bench/gpu.py")
    assert result["training"].keys() == bench.TRAINING.keys() and result["candidates"].keys() == bench.CANDIDATES.keys()
    assert all(seconds for seconds in result["demo"].values()) and result["loader"]["torchvision"] > 0

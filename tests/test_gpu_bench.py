"""bench/gpu.py runs without a GPU; docs/scaling.md has the lines that follow from what it has measured on one."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, load

RESULTS = ROOT / "bench" / "results" / "gpu.json"


def test_lines_of_the_scaling_page_are_calculated_from_a_measurement():
    row = {"images_per_second": 4000.0, "peak_mb": 9000.0, "mb_per_image": 25.0}
    result = {"device": "GPU", "training": {"bf16, channels-last": row, "bf16, NCHW": row}}
    result["candidates"] = {"tree, BN folded": {"seconds": 7.2, "per_hour": 500.0}}
    assert load("bench/gpu.py").scaling_rows(result) == [
        "| one GPU, bf16, channels-last | 10.7 h | 21.4 h | "
        "rate measured, 4000 images/s, 26 GB for 1,024 images; times calculated |",
        "| one GPU, tree, BN folded | 2.0 h | calculated from 7.2 s per candidate |",
    ]


@pytest.mark.skipif(not RESULTS.exists(), reason="no GPU has been measured yet")
def test_the_scaling_page_has_the_lines_of_the_measured_gpus():
    page = (ROOT / "docs" / "scaling.md").read_text()
    for name, result in json.loads(RESULTS.read_text()).items():
        if name != "cpu":
            assert [line for line in load("bench/gpu.py").scaling_rows(result) if line not in page] == []


@pytest.mark.slow
def test_it_runs_on_a_cpu(tmp_path):
    words = ["--device", "cpu", "--results", tmp_path / "gpu.json"]
    subprocess.run([sys.executable, ROOT / "bench" / "gpu.py", *words], check=True, timeout=900)
    (result,) = json.loads((tmp_path / "gpu.json").read_text()).values()
    bench = load("bench/gpu.py")
    assert result["training"].keys() == bench.TRAINING.keys() and result["candidates"].keys() == bench.CANDIDATES.keys()
    assert all(seconds for seconds in result["demo"].values()) and result["loader"]["torchvision"] > 0

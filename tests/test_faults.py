"""faults/faults.py: nothing is lost, and a guard that is taken out turns its rows red."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


def faults(tmp_path, *words):
    """(exit code, rows) of the bench with these words."""
    words = [sys.executable, "-m", "faults.faults", "--results", tmp_path / "faults.json", *words]
    result = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=580, cwd=ROOT)
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return result.returncode, json.loads((tmp_path / "faults.json").read_text())["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--rows", "execute code"), ("--rows", "not finite")], ids=str)
def test_nothing_is_lost(tmp_path, words):
    code, rows = faults(tmp_path, *words)
    assert code == 0 and rows and all(row["lost"] == "nothing" and row["process_where_state"] for row in rows), rows


@pytest.mark.slow
def test_a_guard_that_is_taken_out_is_seen(tmp_path):
    code, rows = faults(tmp_path, "--break", "no-code")
    assert code == 1 and [row["lost"] for row in rows] == ["RED"] and "executed" in rows[0]["happened"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "guard, rows", [("atomic-write", "rename supernet"), ("optimizer", "rename scratch"), ("finite", "not finite"),
    ("loader", "loader"),
                    ("nan", "nan"), ("full-disk", "full at every write tester"), ("lock", "folder search"), ("repair",
                    "rename search"),
                    ("parent-watch", "time search")],
)  # fmt: skip
def test_every_guard_matters(tmp_path, guard, rows):
    code, found = faults(tmp_path, "--kills", 20, "--break", guard, "--rows", rows)
    assert code == 1 and found and all(row["lost"] == "RED" for row in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [
        "time supernet",
        "time tester",
        "time search",
        "time scratch",
        "rename scratch",
        "full at every write scratch",
        "trial:",
    ],
)
def test_nothing_is_lost_by_kills_and_full_disks(tmp_path, rows):
    code, found = faults(tmp_path, "--kills", 20, "--rows", rows)
    assert code == 0 and found and all(row["lost"] == "nothing" for row in found), found

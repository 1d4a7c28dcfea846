"""bench/audit.py on what pip-audit says; and that the program installed is the pinned one."""

import json
import re
import stat

import pytest
from conftest import ROOT, load

audit = load("bench/audit.py")
CLEAN = {"name": "numpy", "version": "2.4.6", "vulns": []}
BROKEN = {
    "name": "pillow",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-2"], "fix_versions": ["1.1"], "description": ""}],
}
UNKNOWN = {"name": "torch", "skip_reason": "not found on PyPI"}


@pytest.mark.parametrize(
    "report, code, line",
    [
        ([CLEAN], 0, "0 known vulnerabilities"),
        ([CLEAN, BROKEN], 1, "pillow 1.0: PYSEC-1, fixed in 1.1; perhaps affected"),
        ([CLEAN, UNKNOWN], 0, "not in the database: torch"),
        ([UNKNOWN, UNKNOWN], 3, "database not reachable"),
        (None, 3, "database not reachable"),
    ],
)
def test_what_the_audit_says(tmp_path, capsys, report, code, line):
    (tmp_path / "said").write_text("" if report is None else json.dumps({"dependencies": report, "fixes": []}))
    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\ncat {tmp_path / 'said'}\nexit 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert audit.audit(program) == code
    out = capsys.readouterr().out
    assert line in out and (code != 3 or out == "database not reachable\n")


def test_what_is_not_reached_does_not_count(monkeypatch):
    monkeypatch.setitem(audit.NOT_REACHED, "CVE-2", "its reader is never called")
    lines, bad, _ = audit.findings({"dependencies": [CLEAN, BROKEN]})
    assert bad == 0 and "not affected: its reader is never called" in lines[0]


def test_pip_audit_is_pinned():
    assert re.search(r"pip-audit==[\d.]+", (ROOT / "Makefile").read_text())

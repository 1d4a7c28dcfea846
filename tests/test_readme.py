"""The readme's commands, files, flags and tests: each command is one that its script takes, and what is named is there."""
import ast
import importlib
import re
import shlex

import pytest
from conftest import ROOT

README = (ROOT / "readme.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```\w*\n(.*?)^```$", README, re.M | re.S)
    for line in block.splitlines()
    if line.startswith(("python ", "make "))
]


TORCHRUN = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}


def test_the_readme_has_the_four_commands():
    for command in ("python supernet.py", "python tester.py --mode gen", "python search.py", "python scratch.py", "make demo"):
        assert command in COMMANDS


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_a_command_is_taken_by_its_script(command, tmp_path, monkeypatch):
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_rsa").touch()  # of config_search_remote.yml
    monkeypatch.setenv("HOME", str(tmp_path))
    program, script, *words = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{script}:", (ROOT / "Makefile").read_text(), re.M)
    else:
        assert (ROOT / script).is_file()
        importlib.import_module(script.removesuffix(".py")).parse_args(words)


def test_the_file_map_is_complete():
    named = set(re.findall(r"`([\w]+\.(?:py|yml|json))`", README.split("## Files")[1].split("\n## ")[0]))
    assert {p.name for pattern in ("*.py", "*.yml", "*.json") for p in ROOT.glob(pattern)} - {"nni_auto_gen_search_space.json"} == named


def test_flags_in_the_readme_exist():
    known = "".join(p.read_text() for p in [*ROOT.glob("*.py"), *ROOT.glob("bench/*.py"), ROOT / "Makefile"])
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {"--help"} - TORCHRUN:
        assert f'"{flag}"' in known, flag


def test_tests_in_the_comparison_exist():
    """Every row of the table beside the official code and NNI names tests, and no test that is not there."""
    table = README.split("## Beside the official code")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    there = {
        f"{path.name}::{node.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert len(rows) > 30
    for row in rows:
        assert len(row) == 5, row
        named = re.findall(r"`([^`]+)`", row[4])
        assert named and set(named) <= there, row[0]

"""The readme's commands: each is one that its script takes, and the files it names are there."""
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


def test_the_readme_has_the_four_commands():
    for command in ("python supernet.py", "python tester.py --mode gen", "python search.py", "python scratch.py", "make demo"):
        assert command in COMMANDS


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_a_command_is_taken_by_its_script(command):
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
    known = "".join(p.read_text() for p in [*ROOT.glob("*.py"), ROOT / "Makefile"])
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {"--help"}:
        assert f'"{flag}"' in known, flag

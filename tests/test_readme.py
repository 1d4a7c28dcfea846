"""The readme's commands, files, flags and tests: each command is run or parsed as its tag says, and what is named is there.

A comment before a block of commands, which readers of the page don't see, is the tag of all of them:

    <!-- commands: run by a test -->         as they are, in a copy of the project
    <!-- commands: run small by a test -->   in a copy whose demo.yml has fewer iterations, candidates and images, and whose
                                             requirements are those that are installed (by make test-all)
    <!-- commands: need ImageNet -->         not run; the script's own parser takes the arguments
"""

import ast
import importlib
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch.distributed.run
import yaml
from conftest import ROOT
from test_layout import ROOMS

README = (ROOT / "readme.md").read_text()
TAGS = ("run by a test", "run small by a test", "need ImageNet")
BLOCK = re.compile(r"(?:^<!-- commands: (.*?) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"^\s*(?:\$ )?(?:python3?|make|pip|git|bash|sh|\.|source|cd|export|torchrun) ", re.M)


def blocks(tag):
    return [text for found, _, text in BLOCK.findall(README) if found == tag]


def commands(tag):
    return sorted({line for text in blocks(tag) for line in text.splitlines()})


# --- tags ----------------------------------------------------------------------------------------------------


def untagged(readme):
    """What is wrong with the blocks of a readme, a line each."""
    found = []
    for tag, language, text in BLOCK.findall(readme):
        if language == "sh":
            if tag not in TAGS:
                found.append(f"tagged {tag!r}: {text.splitlines()[0]}")
        elif language not in ("bibtex", "python", "text") or tag:
            found.append(f"a block of {language!r}: {text.splitlines()[0]}")
        elif match := COMMAND.search(text):
            found.append(f"a command in a block of {language!r}: {match[0]}")
    if len(BLOCK.findall(readme)) != len(re.findall("^ *```|^ *~~~", readme, re.M)) / 2:
        found.append("a block that is not of the usual form")
    return found


def test_every_command_is_tagged():
    assert untagged(README) == []
    assert len(BLOCK.findall(README)) > 10 and all(blocks(tag) for tag in TAGS)


@pytest.mark.parametrize(
    "readme",
    [
        "```sh\nmake demo\n```\n", "```\nmake demo\n```\n", "```text\npython supernet.py\n```\n", "```text\n$ python x.py\n```\n",
        "<!-- commands: run -->\n```sh\nmake demo\n```\n", "<!-- commands: run by a test -->\n\n```sh\nmake demo\n```\n",
        "* so:\n  ```sh\n  make demo\n  ```\n", "<!-- commands: need ImageNet -->\n```text\nx\n```\n",
    ],
)  # fmt: skip
def test_what_is_not_tagged_is_found(readme):
    tagged = "<!-- commands: run by a test -->\n```sh\nmake test\n```\n"
    assert untagged(tagged) == []
    assert untagged(tagged + readme)


# --- commands ------------------------------------------------------------------------------------------------


SMALL_DEMO = {
    "common": {"heldout-per-class": 4},
    "supernet": {"iterations": 4, "batch-size": 16, "warmup": 2, "val-every": 4, "save-every": 4, "bn-batches": 2},
    "tester": {"bn-batches": 2},
    "search": {"bn-batches": 2, "population": 3, "select": 2, "mutation": 1, "crossover": 1, "generations": 2},
    "scratch": {"iterations": 4, "batch-size": 16, "warmup": 2, "val-every": 4, "save-every": 4, "bn-pass": 2},
}


@pytest.fixture
def project(tmp_path):
    """A copy of the project without what was made in it; python is the running one. Returns its folder and the environment."""
    for pattern in ("*.*", "Makefile", "*/*.py", "data/*.*"):
        for path in ROOT.glob(pattern):
            if path.is_file():
                target = tmp_path / "project" / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return tmp_path / "project", environment


@pytest.fixture
def small_project(project):
    folder, environment = project
    settings = yaml.safe_load((folder / "demo.yml").read_text())
    for section, values in SMALL_DEMO.items():
        settings[section].update(values)
    (folder / "demo.yml").write_text(yaml.safe_dump(settings))
    installed = {d.name for d in importlib.metadata.distributions()}
    lines = (folder / "requirements.txt").read_text().splitlines()
    (folder / "requirements.txt").write_text(
        "\n".join(line for line in lines if re.match(r"[\w-]*", line)[0] in installed)
    )
    return folder, environment


def execute(block, folder, environment):
    result = subprocess.run(
        ["bash", "-euc", block], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("block", blocks("run by a test"))
def test_a_block_runs(block, project):
    execute(block, *project)


def make_becomes_what_it_runs(block, folder):
    """The block with what a make target would run, without its set-up, in the place of the target; a demo that need not be good."""

    def recipe(match):
        result = subprocess.run(["make", "-n", match[1]], cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return (
            result.stdout.splitlines()[-1]
            .replace(".venv/bin/python", "python")
            .replace("bench/demo.py", "bench/demo.py -- --batch-size 16")
        )

    return re.sub(r"^make (\w+)$", recipe, block, flags=re.M)


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("run small by a test"))
def test_a_block_runs_small(block, small_project):
    """Where a block installs, pip gets no network and finds what is installed already."""
    folder, environment = small_project
    if "pip install" in block:
        environment |= {"PYTHONPATH": sysconfig.get_paths()["purelib"], "PIP_NO_INDEX": "1"}
    stdout = execute(make_becomes_what_it_runs(block, folder), folder, environment)
    if "make demo" in block:
        assert "| best of the search, retrained " in stdout


PARSED = {c for tag in TAGS for c in commands(tag) if tag == "need ImageNet" or c.startswith(("python ", "torchrun "))}


@pytest.mark.parametrize("command", sorted(PARSED))
def test_a_command_is_taken_by_its_script(command):
    program, *words = shlex.split(command)
    if program == "torchrun":
        args = torch.distributed.run.get_args_parser().parse_args(words)
        program, words = "python", [args.training_script, *args.training_script_args]
    script, *words = words
    assert program == "python" and (ROOT / script).is_file()
    importlib.import_module(script.removesuffix(".py")).parse_args(words)


TORCHRUN = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}


def test_the_readme_has_the_four_commands():
    for command in (
        "python supernet.py",
        "python tester.py --mode gen",
        "python search.py",
        "python scratch.py",
        "make demo",
    ):
        assert any(command in commands(tag) for tag in TAGS)


def test_commands_in_the_text_exist():
    for script in re.findall(r"`python ([\w./]+)", README):
        assert (ROOT / script).is_file(), script
    for target in re.findall(r"`make ([\w-]+)", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


# --- what is named -------------------------------------------------------------------------------------------


def names(path):
    """The functions, classes and methods (Class.method) that a file defines."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_the_readers_path_leads_to_code():
    table = README.split("## From the paper to the code")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for what, where in rows:
        places = re.findall(r"`([^`]+)`", where)
        assert places and ", ".join(f"`{p}`" for p in places) == where, what
        for place in places:
            path, name = place.split("::")
            assert name in names(ROOT / path), place


def test_images_exist():
    images = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", README)
    assert len(images) == README.count("![")
    for _, path in images:
        assert (ROOT / path).read_bytes().startswith(b"\x89PNG"), path


def test_the_file_map_is_complete():
    named = set(re.findall(r"`([\w/]+\.(?:py|yml|json))`", README.split("## Files")[1].split("\n## ")[0]))
    root = {path.name for pattern in ("*.py", "*.yml", "*.json") for path in ROOT.glob(pattern)}
    rooms = {f"{room}/{p.name}" for room in ROOMS for p in (ROOT / room).glob("*.py") if p.name != "__init__.py"}
    assert named == root - {"nni_auto_gen_search_space.json"} | rooms


def test_flags_in_the_readme_exist():
    known = "".join(p.read_text() for p in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), ROOT / "Makefile"])
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {"--help"} - TORCHRUN:
        assert f'"{flag}"' in known, flag


def test_tests_in_the_comparison_exist():
    """Every row of the table beside the official code and NNI names tests, and no test that is not there."""
    table = README.split("## Beside the official code")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    there = {
        f"{path.name}::{name}"
        for path in (ROOT / "tests").glob("test_*.py")
        for name in names(path)
        if name.startswith("test_")
    }
    assert len(rows) > 30
    for row in rows:
        assert len(row) == 5, row
        named = re.findall(r"`([^`]+)`", row[4])
        assert named and set(named) <= there, row[0]

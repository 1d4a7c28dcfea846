"""What readme.md and docs/*.md name: commands, files, flags, links, images, code and tests.

An HTML comment before a block of commands, invisible on the rendered page, tags all of them:

    <!-- commands: run by a test -->         run as they are, in a copy of the project
    <!-- commands: run small by a test -->   run by make test-all, in a copy with a smaller demo.yml, whose requirements
                                             are the installed packages
    <!-- commands: need ImageNet -->         not run; the script's own parser accepts the arguments
    <!-- commands: run in order by a test -->  a page as a whole, by tests/test_own_images.py; the searches of
                                               docs/search.md, by tests/test_latency.py
    <!-- commands: take long -->             not run; the script exists and defines the flags
"""

import ast
import importlib
import importlib.metadata
import importlib.util
import json
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
from test_layout import ORDER, ROOMS

from settings.fields import flag
from settings.subjects import FIELDS
from training.checkpoint import newest

PAGES = {p.relative_to(ROOT).as_posix(): p.read_text() for p in (ROOT / "readme.md", *sorted(ROOT.glob("docs/*.md")))}
IN_ORDER = "run in order by a test"
DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
TAGS = ("run by a test", "run small by a test", "need ImageNet", "take long")
LANGUAGES = ("bibtex", "python", "text", "yaml")  # blocks without commands
BLOCK = re.compile(r"(?:^<!-- commands: (.*?) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"^\s*(?:\$ )?(?:python3?|make|pip|git|bash|sh|\.|source|cd|export|torchrun) ", re.M)
TEXT = "\n".join(PAGES.values())
MAKEFILE = (ROOT / "Makefile").read_text()
every_page = pytest.mark.parametrize("page", PAGES)


def blocks(*tags):
    return sorted({text for tag, _, text in BLOCK.findall(TEXT) if tag in tags})


def commands(*tags):
    return sorted({line for text in blocks(*tags) for line in text.splitlines()})


def section(page, title):
    """The text below a heading, up to the next one."""
    return re.split(r"^#+ ", PAGES[page].split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def table(text):
    """The rows of the first table in a text, without its head, as lists of cells."""
    rows = re.search(r"(?:^\|.*\|\n)+", text, re.M)[0].splitlines()[2:]
    return [[cell.strip() for cell in row[1:-1].split(" | ")] for row in rows]


# --- pages ---------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(PAGES["readme.md"].splitlines()) <= 220


@every_page
def test_lines_are_short(page):
    prose = BLOCK.sub("", PAGES[page]).splitlines()
    assert [line for line in prose if len(line) > 120 and not line.startswith("|")] == []


@every_page
def test_every_block_of_commands_is_tagged(page):
    found = BLOCK.findall(PAGES[page])
    assert len(found) == len(re.findall("^ *```|^ *~~~", PAGES[page], re.M)) / 2
    for tag, language, text in found:
        if language == "sh":
            assert tag in (*TAGS, IN_ORDER), text
        else:
            assert language in LANGUAGES and not tag and not COMMAND.search(text), text


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", PAGES[page]), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    for image, target in re.findall(r"(!?)\[[^\]]+\]\(([^)]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        path = (ROOT / page).parent / path if path else ROOT / page
        assert path.is_file(), target
        if anchor:
            assert anchor in anchors(path.resolve().relative_to(ROOT).as_posix()), target
        if image:
            assert path.read_bytes().startswith(b"\x89PNG"), target


def test_the_readme_links_every_page():
    assert PAGES.keys() - {"readme.md"} <= set(re.findall(r"\]\(([^)#]+)", PAGES["readme.md"]))


# --- commands ------------------------------------------------------------------------------------------------


SMALL_DEMO = {
    "common": {"heldout-per-class": 4, "bn-batches": 2},
    "supernet": {"iterations": 4, "batch-size": 16, "warmup": 2, "val-every": 4, "save-every": 4},
    "search": {"population": 3, "select": 2, "mutation": 1, "crossover": 1, "generations": 2},
    "scratch": {"iterations": 4, "batch-size": 16, "warmup": 2, "val-every": 4, "save-every": 4, "bn-pass": 2},
}
OUTPUTS = {"nni_auto_gen_search_space.json", "latency.json", "report.html"}  # of commands run in this folder


@pytest.fixture
def project(tmp_path):
    """(folder, environment) of a copy of the project without outputs, where python is the running interpreter."""
    for pattern in ("*.*", "Makefile", "*/*.py", "*/*.js", "*/*.j2", "data/*.*", "bench/results/demo_truth.json"):
        for path in ROOT.glob(pattern):
            if path.is_file() and path.name not in OUTPUTS:
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


def without_make(block, folder):
    """Replaces make targets in a block by what they run after set-up; the demo then has no accuracy to reach."""

    def recipe(match):
        command = ["make", "-n", "--no-print-directory", match[1]]  # this may run under make test-all
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return (
            result.stdout.splitlines()[-1]
            .replace(".venv/bin/python", "python")
            .replace("-m bench.demo", "-m bench.demo -- --batch-size 16")
        )

    return re.sub(r"^make (\w+)$", recipe, block, flags=re.M)


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("run small by a test"))
def test_a_block_runs_small(block, small_project):
    """Blocks that install run pip without a network, which finds the installed packages."""
    folder, environment = small_project
    if "pip install" in block:
        environment |= {"PYTHONPATH": sysconfig.get_paths()["purelib"], "PIP_NO_INDEX": "1"}
    stdout = execute(without_make(block, folder), folder, environment)
    if "make demo" in block:
        assert "| best of the search, retrained " in stdout


MODULE = r"(?:-m (?=bench\.|faults\.))"


def without_launcher(command):
    """The script of a command and its arguments; torchrun's own flags are checked and removed."""
    program, *words = shlex.split(command)
    if program == "torchrun":
        args = torch.distributed.run.get_args_parser().parse_args(words)
        return args.training_script, args.training_script_args
    assert program == "python"
    if words[0] == "-m":
        return words[1].replace(".", "/") + ".py", words[2:]
    return words[0], words[1:]


@pytest.mark.parametrize("command", [c for c in commands(*TAGS) if re.match(r"(python|torchrun) [a-z]", c)])
def test_a_command_is_accepted_by_its_script(command):
    script, words = without_launcher(command)
    if "/" not in script:
        importlib.import_module(script.removesuffix(".py")).parse_args(words)
    else:  # a script in data/, which defines its flags in main
        source = (ROOT / script).read_text()
        parts = [part for word in words if re.match(r"--|[a-z]", word) for part in word.split(",")]
        assert all(f'"{part}"' in source for part in parts)


def test_the_commands_of_the_studies_are_accepted():
    """In another process: some of what they import starts threads, and later tests fork this one."""
    found = [shlex.split(c)[2:] for c in commands(*TAGS) if re.match(f"python {MODULE}", c)]
    program = "import importlib, json, sys\nfor name, *words in json.loads(sys.argv[1]):\n"
    program += "    importlib.import_module(name).parse_args(words)"
    words = [sys.executable, "-c", program, json.dumps(found)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert len(found) > 10 and result.returncode == 0, result.stderr


def test_pip_audit_is_pinned():
    assert re.search(r"pip-audit==[\d.]+", MAKEFILE)


def test_pytest_commands_name_tests():
    found = [shlex.split(c) for c in commands(*TAGS) if c.startswith("python -m pytest ")]
    assert found and all((ROOT / words[-1]).is_file() for words in found)


def test_the_readme_has_the_four_commands():
    in_readme = "\n".join(text for tag, _, text in BLOCK.findall(PAGES["readme.md"])).splitlines()
    assert {"python supernet.py", "python tester.py --mode gen", "python search.py", "make demo"} <= set(in_readme)
    assert any(line.startswith("python scratch.py") for line in in_readme)


@every_page
def test_commands_in_the_text_exist(page):
    for script in re.findall(rf"`(python {MODULE}?[\w./]+)", PAGES[page]):
        assert (ROOT / without_launcher(script)[0]).is_file(), script
    for target in re.findall(r"(?:^|`)make ([\w-]+)", PAGES[page], re.M):
        assert re.search(rf"^{target}:", MAKEFILE, re.M), target


TORCHRUN = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}


@every_page
def test_flags_exist(page):
    code = "".join(p.read_text() for p in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    settings = {flag(name) for name in FIELDS} | {f"--no-{flag(name)[2:]}" for name in FIELDS}
    for named in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGES[page])) - {"--help"} - TORCHRUN - settings:
        assert f'"{named}"' in code, named


# --- what is named -------------------------------------------------------------------------------------------

# Files that runs write, and those of others.
WRITTEN = re.compile(
    r"checkpoints/|acc/|id2cand/|data/(cache|imagenet)|figures/|DIR/|own[./]|(OUT/)?(latency|best)\.json$"
    r"|(config\.yml|run\.log|metadata\.json|nni_auto_gen_search_space\.json|report\.html|network\.\w+)$"
)


@every_page
def test_files_exist(page):
    named = set(re.findall(r"`([\w./-]+\.(?:py|yml|json|md|html|txt|toml|xz|png|svg|log))`", PAGES[page]))
    assert not [path for path in named if not WRITTEN.match(path) and not (ROOT / path).is_file()]


def names(path):
    """The functions, classes and methods (Class.method) that a file defines."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_the_paper_leads_to_code():
    rows = table(section("readme.md", "From the paper to the code"))
    assert len(rows) > 10
    for what, where in rows:
        places = re.findall(r"`([^`]+)`", where)
        assert places and ", ".join(f"`{p}`" for p in places) == where, what
        for place in places:
            path, name = place.split("::")
            assert name in names(ROOT / path), place


NOTE_CALLS = """
import os, sys, threading
root, out = os.environ["NOTE_ROOT"], os.environ["NOTE_OUT"]
seen = set()

def note(frame, *_):
    code = frame.f_code
    if code not in seen and code.co_filename.startswith(root):
        seen.add(code)
        with open(out, "a") as file:
            file.write(f"{os.path.relpath(code.co_filename, root)}::{code.co_qualname}\\n")

sys.settrace(note)  # calls alone, since it returns nothing
threading.settrace(note)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_call_what_the_table_names(tmp_path):
    """A small demo with NNI, a search under a limit on latency, one with widths; functions of bench/ are apart."""
    (tmp_path / "sitecustomize.py").write_text(NOTE_CALLS)
    out, notes = tmp_path / "out", tmp_path / "notes"
    variables = {"PYTHONPATH": str(tmp_path), "NOTE_ROOT": str(ROOT), "NOTE_OUT": str(notes), "OMP_NUM_THREADS": "1"}

    def call(*words):
        words = [sys.executable, *map(str, words)]
        done = subprocess.run(words, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: such a small demo finds nothing good

    call("-m", "bench.demo", "--out", out, "--", "--iterations", 20)
    small = ("--demo", "--out", out, "--checkpoint", newest(out / "checkpoints/supernet"))
    call("tester.py", *small, "--mode", "latency", "--threads", 1)
    limited = tmp_path / "limited"
    shutil.copytree(out, limited, ignore=shutil.ignore_patterns("acc", "id2cand", "search", "*.json"))
    for name in ("latency.json", "nni_auto_gen_search_space.json"):
        shutil.copyfile(out / name, limited / name)
    words = ("--demo", "--out", limited, *small[-2:], "--engine", "local")
    call("search.py", *words, "--limit", "latency=90%", "--generations", 1)
    train = ("--iterations", 2, "--batch-size", 8, "--val-every", 9, "--val-paths", 1, "--bn-batches", 2)
    call(
        "supernet.py",
        "--demo",
        "--out",
        tmp_path / "joint",
        "--space",
        "joint",
        *train,
        "--own",
        "bench/macro_operations.py",
    )
    called = set(notes.read_text().split())
    for _, where in table(section("readme.md", "From the paper to the code")):
        for place in re.findall(r"`([^`]+)`", where):
            if place.startswith(("bench/macro", "bench/study")) or (place.endswith("_dali_pipeline") and not DALI):
                continue  # a study that takes hours; where DALI is not installed
            assert place in called or f"{place}.__init__" in called, place


def test_the_comparison_names_tests():
    """Every row of the table beside the official code and NNI names tests, all of which exist."""
    rows = table(PAGES["docs/fidelity.md"])
    existing = {f"{path.name}::{name}" for path in ROOT.glob("tests/test_*.py") for name in names(path)}
    assert len(rows) > 30
    for row in rows:
        assert len(row) == 5, row
        named = re.findall(r"`([^`]+)`", row[4])
        assert named and all("::test_" in name for name in named) and set(named) <= existing, row[0]


def test_the_file_map_is_complete():
    text = PAGES["docs/files.md"].split("\n## Order of imports")[0]
    named = re.findall(r"`([\w/]+\.(?:py|yml|json))`", text)
    root = {path.name for pattern in ("*.py", "*.yml", "*.json") for path in ROOT.glob(pattern)}
    folders = {
        f"{room}/{path.name}" for room in (*ROOMS, "faults", "bench", "examples") for path in (ROOT / room).glob("*.py")
    }
    folders |= {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.yml")}
    expected = {p for p in root | folders if not p.endswith("__init__.py")} - OUTPUTS
    assert sorted(named) == sorted(expected)


def test_the_order_of_imports_is_the_tested_one():
    rows = table(section("docs/files.md", "Order of imports"))
    assert [set(re.findall(r"`(\w+)`", modules)) for _, modules in rows] == list(ORDER)


def test_the_tests_are_listed():
    listed = re.findall(r"`(tests/test_\w+\.py)`", section("docs/testing.md", "What the tests cover"))
    assert sorted(listed) == sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("tests/test_*.py"))

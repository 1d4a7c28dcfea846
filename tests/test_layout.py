"""Who may import whom, what the project's files may not say, and that every requirement is pinned and has a reason."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest

from utils import HERE

COMMANDS = {"supernet", "tester", "search", "scratch", "report"}
ROOMS = ("settings", "space", "images", "training", "engines", "devices", "reports")
# A row may import itself and the rows above it. A name stands for a module at the root, or for all modules of a folder.
ORDER = (
    {"utils"},
    {"settings"},
    {"blocks"},
    {"space"},
    {"images"},
    {"dataloader", "network"},
    {"training"},
    {"devices"},
    {"engines"},
    {"evolution_tuner", "reports"},
    COMMANDS,
)
MODULES = {
    ".".join(path.relative_to(HERE).with_suffix("").parts): path
    for pattern in ("*.py", *(f"{room}/*.py" for room in ROOMS))
    for path in sorted(HERE.glob(pattern))
    if path.name != "__init__.py"
}
MAX_FILE_BYTES = 2**20
ARCHIVE = "data/fashion-mnist.tar.xz"


def imports(tree):
    """(full name, node) of all that a tree imports, in functions too; `from a import b` counts as a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import in a flat project"
            yield node.module, node
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def at_import(tree):
    """The same, of what runs when the module is imported: not in a function."""
    inner = {
        id(node)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(f)
    }
    return ((name, node) for name, node in imports(tree) if id(node) not in inner)


def parse(module):
    return ast.parse(MODULES[module].read_text(encoding="utf-8"), str(MODULES[module]))


def names(found):
    return {name for name, _ in found}


def packages(found):
    """First parts of imported names."""
    return {name.split(".")[0] for name in names(found)}


def users(package):
    """The modules that import a package, or a part of one ("nvidia.dali")."""
    return {m for m in MODULES if any(f"{name}.".startswith(f"{package}.") for name in names(imports(parse(m))))}


def test_import_finder_sees_every_form():
    tree = ast.parse(
        "import a.b\nfrom c import d\ndef f():\n    import e as g\n    from h.i import j\nclass K:\n    import l\n"
    )
    assert names(imports(tree)) == {"a.b", "c", "c.d", "e", "h.i", "h.i.j", "l"}
    assert names(at_import(tree)) == {"a.b", "c", "c.d", "l"}


def ours(found):
    """The modules of the project among imported names."""
    return names(found) & MODULES.keys()


def needed(module):
    """The modules of the project that a module imports, in functions too."""
    return ours(imports(parse(module)))


def test_no_function_below_the_commands_takes_the_command_line():
    """They take the settings of their subject, or plain arguments; the parser alone has a namespace."""
    for module in MODULES.keys() - COMMANDS - {"settings.command_line"}:
        for node in ast.walk(parse(module)):
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                taken = {argument.arg for argument in given} & {"args", "options", "flags", "namespace"}
                assert not taken, f"{module}.{node.name}"
                assert not any("Namespace" in ast.unparse(a.annotation) for a in given if a.annotation), module
            assert not (isinstance(node, ast.Attribute) and node.attr == "Namespace"), f"{module} makes a namespace"


def test_imports_run_one_way():
    row = {name: number for number, names in enumerate(ORDER) for name in names}
    assert {module.split(".")[0] for module in MODULES} == row.keys()
    for module in MODULES:
        for other in needed(module):
            assert row[other.split(".")[0]] <= row[module.split(".")[0]], f"{module} imports {other}"


def test_rooms_are_few_and_make_no_circle(tracked):
    """A room is a folder or a module at the root, an arrow a pair of rooms of which one imports the other.

    The scripts in data/ are left out, which nothing imports.
    """
    modules = [path for path in tracked if path.endswith(".py") and not path.startswith(("tests/", "data/"))]
    rooms = {path.partition("/")[0].removesuffix(".py") for path in modules}
    arrows = set()
    for path in modules:
        room = path.partition("/")[0].removesuffix(".py")
        found = {name.partition(".")[0] for name in names(imports(ast.parse((HERE / path).read_text())))}
        arrows |= {(room, other) for other in found & rooms - {room}}
    assert len(rooms) <= 20 and len(arrows) <= 92, sorted(arrows)
    while free := {room for room in rooms if not any(a == room for a, _ in arrows)}:
        rooms -= free
        arrows = {(a, b) for a, b in arrows if b not in free}
    assert not arrows, "a circle of rooms"


def test_imports_make_no_circle():
    needs = {module: needed(module) for module in MODULES}
    while free := {module for module, others in needs.items() if not others & needs.keys()}:
        needs = {module: others for module, others in needs.items() if module not in free}
    assert not needs


def test_what_a_trial_imports_is_copied_to_remote_machines():
    kept = {line.removeprefix("!/") for line in (HERE / ".nniignore").read_text().splitlines() if line.startswith("!/")}
    seen, left = set(), {"tester"}
    while left:
        seen.add(module := left.pop())
        left |= ours(at_import(parse(module))) - seen
    assert {module.split(".")[0] for module in seen if "." in module} <= kept and "*.py" in kept
    assert kept - {"*.py"} <= set(ROOMS)


def test_no_command_is_imported():
    for module in MODULES:
        assert not ours(imports(parse(module))) & COMMANDS, module


def test_every_room_is_small_and_says_what_belongs_there():
    assert len(list(HERE.glob("*.py"))) <= 12
    for room in ROOMS:
        assert len(list((HERE / room).glob("*.py"))) <= 12, room
        tree = ast.parse((HERE / room / "__init__.py").read_text())
        assert (ast.get_docstring(tree).endswith(".") and len(tree.body) <= 2) or room == "settings", room


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        ("nni", {"evolution_tuner", "engines.nni_engine", "engines.trial"}),
        ("nvidia", {"dataloader"}),
        ("scipy", {"space.limits", "reports.search_results"}),
        ("matplotlib", {"reports.figures"}),
        ("onnx", {"training.export", "devices.onnx_runtime", "devices.elsewhere"}),
        ("onnxscript", set()),
        ("onnxruntime", {"training.program", "devices.on_device"}),
    ],
)
def test_a_package_has_few_users_and_most_import_it_when_it_is_used(package, modules):
    assert users(package) == modules
    late = modules - {"evolution_tuner", "reports.figures"}
    assert not [module for module in late if package in packages(at_import(parse(module)))]


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("utils", set()),
        ("settings.command_line", {"utils", "settings"}),
        ("settings.subjects", {"utils", "settings"}),
        ("settings.fields", {"utils"}),
        ("space.search_space", {"utils", "space", "numpy"}),
        ("space.splitting", {"utils"}),
        ("images.bundled", {"utils"}),
        ("images.image_check", {"utils", "settings", "images", "PIL", "tqdm"}),
        ("network", {"torch", "blocks", "images", "settings", "space", "utils"}),
        ("images.pictures", {"utils", "PIL", "numpy"}),
        ("blocks", {"torch"}),
        ("space.costs", {"utils"}),
        ("engines.search_files", {"utils", "settings", "space"}),
    ],
)
def test_a_module_needs_few_packages(module, allowed):
    assert packages(at_import(parse(module))) <= sys.stdlib_module_names | allowed


def test_evolution_and_reports_need_no_torch():
    def needed(module):
        return {module}.union(*map(needed, ours(at_import(parse(module)))))

    for module in (
        "evolution_tuner",
        "space.evolution",
        "space.search_space",
        "reports.figures",
        "reports.search_results",
    ):
        assert not [m for m in needed(module) if packages(at_import(parse(m))) & {"torch", "torchvision"}], module


# --- files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked():
    """The files in git, as paths relative to the project."""
    try:
        result = subprocess.run(["git", "-C", str(HERE), "ls-files", "-z"], capture_output=True, text=True, timeout=30)
    except OSError:
        pytest.skip("needs git")
    if result.returncode or not (HERE / ".git").exists():
        pytest.skip("needs a git checkout")
    return [path for path in result.stdout.split("\0") if path and (HERE / path).is_file()]


FORBIDDEN = (
    r"(?<![\w.~*])/(?:work|root|home|Users)/",
    r"[A-Za-z]:\\Users\\",
    r"(?:deb|ftp)\.debian\.org|archive\.ubuntu\.com",
    r"pypi\.org/simple|pythonhosted\.org|index-url +http://",
)


@pytest.mark.parametrize(
    "text", ["see /work/x", "'/root/a'", "cd /home/me", "https://deb.debian.org/", "pypi.org/simple"]
)
def test_forbidden_patterns_match(text):
    assert any(re.search(pattern, text) for pattern in FORBIDDEN)


def test_files_name_no_machine_and_no_registry(tracked):
    found = []
    for path in tracked:
        data = (HERE / path).read_bytes()
        if b"\0" in data or path == "tests/test_layout.py":  # which has them to test them
            continue
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            found += [f"{path}:{number}: {line.strip()}" for pattern in FORBIDDEN if re.search(pattern, line)]
    assert not found


def test_files_are_small(tracked):
    large = {path for path in tracked if (HERE / path).stat().st_size > MAX_FILE_BYTES}
    assert large <= {ARCHIVE}


# What the commands in readme.md and docs/ leave behind.
LEFT = """checkpoints/supernet/checkpoint-0000001.pth checkpoints/best.json acc/000.jsonl id2cand/000.json
    figures/best.png report.html nni_auto_gen_search_space.json latency.json network.onnx network.pt2 demo/demo.json
    demo/acc/000.jsonl own/acc/000.jsonl cifar10/acc/000.jsonl channels/acc/000.jsonl random/acc/000.jsonl
    data/fashion-mnist/train/coat/0.png data/imagenet/train/n0/0.JPEG data/cifar10/val/cat/0.png data/cache/x.images
    .ruff_cache/0 .pytest_cache/x .hypothesis/x __pycache__/utils.cpython-311.pyc""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def used(tracked, tmp_path_factory):
    """A copy of the project, in git, with what commands leave behind; `.venv` and some folders are links."""
    project, elsewhere = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("elsewhere")
    for path in tracked:
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HERE / path, project / path)
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", project, *words], check=True, timeout=60)
    for name in (".venv", "checkpoints", "data/cifar10"):
        (project / name).symlink_to(elsewhere)
    for path in LEFT:
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).touch()
    return project


def test_a_used_tree_has_nothing_that_git_would_add(used):
    words = ["git", "-C", used, "status", "--porcelain", "--untracked-files"]
    status = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()
    assert not [line for line in status if not line.startswith("A ")]


def test_a_used_tree_passes_lint(used):
    """Whatever its folders are called: no module is taken for one of the project because of them."""
    for name in ("numpy", "hypothesis"):
        (used / name).mkdir()
        (used / name / "__init__.py").touch()
    for words in (["check"], ["format", "--check"]):
        words = [sys.executable, "-m", "ruff", *words, "--no-cache"]
        result = subprocess.run(words, cwd=used, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stdout + result.stderr


def test_lint_knows_the_modules_of_the_project():
    isort = tomllib.loads((HERE / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]["isort"]
    assert set(isort["known-first-party"]) == {name.split(".")[0] for name in MODULES} | {"bench", "faults"}


# --- requirements --------------------------------------------------------------------------------------------


def requirements(file="requirements.txt"):
    """(name, version, marker, reason) of every line; a line of another form fails."""
    for line in (HERE / file).read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9-]+)(==[0-9.]+|<[0-9.]+)(?:; ([^#]+?))?  # (\S.+)", line)
            assert match, f"not name, pinned version, marker, and reason: {line}"
            yield match.groups()


def test_requirements_are_pinned_and_say_why():
    found = list(requirements())
    assert len({name for name, *_ in found}) == len(found) >= 10
    assert {name: version for name, version, *_ in found if not version.startswith("==")} == {"setuptools": "<82"}
    assert all(version.startswith("==") for _, version, *_ in requirements("requirements-all.txt"))


@pytest.mark.parametrize(
    ("platform", "machine", "python", "expected"),
    [
        ("linux", "x86_64", "3.11", {"nvidia-dali-cuda110", "nni"}),
        ("linux", "x86_64", "3.13", {"nvidia-dali-cuda130", "nni"}),
        ("linux", "aarch64", "3.11", {"nvidia-dali-cuda130"}),
        ("darwin", "arm64", "3.11", set()),
        ("win32", "AMD64", "3.12", {"nni"}),
    ],
)
def test_requirements_fit_the_platform(platform, machine, python, expected):
    markers = pytest.importorskip("packaging.markers")
    environment = {"sys_platform": platform, "platform_machine": machine, "python_version": python}
    assert {
        name for name, _, marker, _ in requirements() if marker and markers.Marker(marker).evaluate(environment)
    } == expected


def test_installed_versions_are_those_required():
    for name, version, marker, _ in requirements():
        if not marker and version.startswith("=="):
            assert metadata.version(name).split("+")[0] == version[2:], name


# --- OpenMP --------------------------------------------------------------------------------------------------

STOP_AT_TORCH = """
import importlib, os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Finder())
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize("script", ["supernet", "tester", "search", "scratch"])
def test_openmp_is_set_before_torch_is_imported(script):
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    words = [sys.executable, "-c", STOP_AT_TORCH, script]
    result = subprocess.run(words, cwd=HERE, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout == "10000\n", result.stderr

"""How well the quick tests see small faults: `python faults/mutants.py --tree DIR --out FILE.json`. Linux alone.

Mutants are small changes to the sources of ROLES: a comparison, a number, a condition, a statement left out. They are
drawn with a seed, evenly over the roles, then over the functions of a role, then over the places in a function. Each is
put into a copy of the tree and meets those quick tests that execute its lines, the cheapest first, for at most LIMIT_S
of CPU time.

One run of all quick tests under coverage (`pip install --target FOLDER coverage`, PYTHONPATH=FOLDER for this script)
says which test executes which line, in processes that it starts too; `--coverage FILE` keeps that, or is read. What is
executed in a fixture of several tests counts for each that uses it, at import for all of the function or module.

FILE.json gets each row at once, and the same command resumes from there. Whether a survivor is equivalent to
the original is for a person to write into its `reason`. The tests' pytest has this file as its plugin.
"""

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
import venv

import psutil
import pytest

ROLES = {  # the files of a role: in the tree's root or else in any folder, those that exist
    "search space": ["search_space.py"],
    "sampler": ["sampler.py"],
    "blocks": ["blocks.py"],
    "network": ["network.py"],
    "evaluation": ["evaluation.py", "prefix_tree.py"],
    "evolution": ["evolution_tuner.py"],
    "training loop": ["training.py", "training/loop.py", "training/recipe.py", "training/run.py", "training/step.py"],
    "checkpoint": ["checkpoint.py"],
    "record": ["search_record.py"],
}
NO_SOURCES = {"tests", "bench", "faults", "site-packages"}
LIMIT_S = 60  # of CPU time for a mutant's tests
WALL_S = 900  # of time on the clock
COVERAGERC = """[run]
data_file = {folder}/data/c
parallel = true
sigterm = true
patch = _exit, fork
context = ${{MUTANTS_CONTEXT-}}
include = {include}
omit = */site-packages/*
disable_warnings = no-data-collected, already-imported, module-not-imported, trace-changed, dynamic-conflict
"""
PTH = """{plugin}
{coverage}
import os; os.getenv("COVERAGE_PROCESS_START") and __import__("coverage").process_startup()
"""


# --- the plugin ----------------------------------------------------------------------------------------------


class Recorder:
    """Tells coverage which test or shared fixture is running, and adds up the CPU time of each."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.found = {"costs": {}, "fixtures": {}, "uses": {}, "failed": []}
        os.environ["MUTANTS_CONTEXT"] = ""
        os.register_at_fork(after_in_child=lambda: self.enter(os.environ.get("MUTANTS_CONTEXT", "")))

    def enter(self, name):
        os.environ["MUTANTS_CONTEXT"] = name
        importlib.import_module("coverage").Coverage.current().switch_context(name)

    @contextlib.contextmanager
    def running(self, name, costs):
        before = os.environ["MUTANTS_CONTEXT"]
        start = sum(os.times()[:4])
        self.enter(name)
        yield
        self.enter(before)
        costs[name] = round(costs.get(name, 0) + sum(os.times()[:4]) - start, 3)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        fixtures = [found[-1] for found in item._fixtureinfo.name2fixturedefs.values()]
        self.found["uses"][item.nodeid] = [f"{f.baseid}::{f.argname}" for f in fixtures if f.scope != "function"]
        with self.running(item.nodeid, self.found["costs"]):
            yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        name = f"{fixturedef.baseid}::{fixturedef.argname}"
        shared = fixturedef.scope != "function"
        with self.running(name, self.found["fixtures"]) if shared else contextlib.nullcontext():
            yield

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.found["failed"].append(report.nodeid)

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.found))


class Selector:
    """Runs the tests of a list, in its order, and writes down which begins and which fails."""

    def __init__(self, path):
        self.order = {name: i for i, name in enumerate(json.loads(pathlib.Path(path).read_text()))}
        self.log = pathlib.Path(f"{path}.log")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logstart(self, nodeid):
        with self.log.open("a") as file:
            print(nodeid, file=file)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.pytest_runtest_logstart(f"FAILED {report.nodeid}")

    pytest_collectreport = pytest_runtest_logreport


def pytest_configure(config):
    for name, plugin in (("MUTANTS_RECORD", Recorder), ("MUTANTS_SELECT", Selector)):
        if path := os.environ.pop(name, None):
            config.pluginmanager.register(plugin(path))


# --- mutants -------------------------------------------------------------------------------------------------

SWAPS = {
    ast.Lt: "< <=", ast.LtE: "<= <", ast.Gt: "> >=", ast.GtE: ">= >", ast.Eq: "== !=", ast.NotEq: "!= ==",
    ast.In: "in not_in", ast.NotIn: "not_in in", ast.Is: "is is_not", ast.IsNot: "is_not is", ast.And: "and or",
    ast.Or: "or and", ast.Add: "+ -", ast.Sub: "- +", ast.Mult: "* /", ast.Div: "/ *", ast.FloorDiv: "// %",
    ast.Mod: "% //", ast.Pow: "** *", ast.BitOr: "| &", ast.BitAnd: "& |",
}  # fmt: skip
NEGATED_BY_SWAP = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)
OPPOSITE = {"min": b"max", "max": b"min"}


def says(node):
    """Whether it is text, or something said to a person."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="log" | "logging" | "warnings"))):
            return True
        case ast.Call(func=ast.Name(id="UserError" | "print")) | ast.JoinedStr() | ast.Constant(value=str()):
            return True
    return False


class Places:
    """Where a source can be mutated: `found` has (function, its lines, the statement's lines, start, end, new text)."""

    def __init__(self, source):
        self.source = source
        self.found = []
        self.starts = [0, *(match.end() for match in re.finditer(b"\n", source))]
        self.visit(ast.parse(source), [], range(0), range(0))

    def span(self, node):
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def visit(self, node, names, scope, lines):
        if isinstance(node, ast.stmt):  # its lines: all of them, or those before its body
            body = getattr(node, "body", None)
            lines = range(node.lineno, max(body[0].lineno if body else node.end_lineno + 1, node.lineno + 1))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [*names, node.name]
            scope = range(node.lineno, node.end_lineno + 1)
        if says(node) or (isinstance(node, ast.If) and "__name__" in ast.dump(node.test)):
            return
        for start, end, text in self.mutations(node):
            text += b"\n" * (self.source.count(b"\n", start, end) - text.count(b"\n"))  # later lines keep their numbers
            self.found.append((".".join(names) or "<module>", scope, lines, start, end, text))
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "keys"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        self.visit(child, names, scope, lines)

    def mutations(self, node):
        """(start, end, new text) of what can be done at the node itself."""
        start, end = self.span(node) if hasattr(node, "lineno") else (0, 0)
        match node:
            case ast.Compare():
                for op, left, right in zip(node.ops, [node.left, *node.comparators], node.comparators):
                    yield from self.swapped(op, left, right)
            case ast.BinOp() if not says(node.left) and not says(node.right):
                yield from self.swapped(node.op, node.left, node.right)
            case ast.BoolOp():
                for left, right in zip(node.values, node.values[1:]):
                    yield from self.swapped(node.op, left, right)
            case ast.UnaryOp(op=ast.Not()):
                yield start, start + len("not "), b""
            case ast.Constant(value=bool() as value):
                yield start, end, repr(not value).encode()
            case ast.Constant(value=int() | float() as value):
                yield start, end, repr(value + 1).encode()
            case ast.Return(value=ast.expr() as value) if self.source[slice(*self.span(value))] != b"None":
                yield *self.span(value), b"None"
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
                yield from self.negated(test)
            case ast.comprehension():
                for test in node.ifs:
                    yield from self.negated(test)
            case ast.Slice():
                yield from ((*self.span(bound), b"") for bound in (node.lower, node.upper, node.step) if bound)
            case ast.Name(id="min" | "max" as name) | ast.Attribute(attr="min" | "max" as name):
                yield end - len(name), end, OPPOSITE[name]
            case ast.AugAssign():
                yield from self.swapped(node.op, node.target, node.value)
                yield start, end, b"pass"
            case ast.Expr(value=ast.Call() as call) if not says(call):
                yield start, end, b"pass"
            case ast.Assign() if any(isinstance(target, ast.Attribute) for target in node.targets):
                yield start, end, b"pass"

    def swapped(self, op, left, right):
        """Another operator between two operands."""
        if type(op) in SWAPS:
            old, new = (word.replace("_", " ").encode() for word in SWAPS[type(op)].split())
            at = self.source.index(old, self.span(left)[1], self.span(right)[0])
            yield at, at + len(old), new

    def negated(self, test):
        """Not where another mutation does the same."""
        swap = isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], NEGATED_BY_SWAP)
        if not swap and not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
            start, end = self.span(test)
            yield start, end, b"not (" + self.source[start:end] + b")"


def sources(tree):
    """{role: its files, relative to the tree}."""
    found = {}
    for role, names in ROLES.items():
        paths = [p for name in names for p in ([tree / name] if (tree / name).exists() else sorted(tree.rglob(name)))]
        paths = [path.relative_to(tree) for path in paths]
        found[role] = [p for p in paths if not NO_SOURCES & {*p.parts} and str(p)[0] != "."]
    return found


def draw(tree, seed, count):
    """`count` mutants: each its row of the result, text and lines. The first ones are the same whatever the count."""
    rng = random.Random(seed)
    pool = {}
    drawn = []
    for role, paths in sources(tree).items():
        for path in paths:
            for name, *place in Places((tree / path).read_bytes()).found:
                pool.setdefault(role, {}).setdefault((path, name), []).append(place)
    while len(drawn) < count and any(pool.values()):
        for role, functions in pool.items():
            mutant = None
            while functions and not mutant and len(drawn) < count:
                key = rng.choice(sorted(functions))
                place = functions[key].pop(rng.randrange(len(functions[key])))
                functions.pop(key) if not functions[key] else None
                mutant = make(tree, role, *key, *place)
            drawn += [mutant] if mutant else []
    return drawn


def make(tree, role, path, name, scope, lines, start, end, new):
    """A mutant, None where it does not compile."""
    source = (tree / path).read_bytes()
    text = source[:start] + new + source[end:]
    with contextlib.suppress(SyntaxError):
        compile(text, str(path), "exec")
        span = slice(source.count(b"\n", 0, start), source.count(b"\n", 0, end) + 1)
        before, after = (" ".join(" ".join(map(bytes.decode, t.split(b"\n")[span])).split()) for t in (source, text))
        row = {"role": role, "file": str(path), "function": name, "line": span.start + 1}
        return {"row": {**row, "before": before, "after": after}, "text": text, "lines": lines, "scope": scope}


# --- runs ----------------------------------------------------------------------------------------------------


class Copy:
    """A copy of the tree, and a Python for it that finds the packages of this one, the plugin, and coverage."""

    def __init__(self, tree, folder):
        self.folder = folder
        self.root = folder / "tree"
        ignored = shutil.ignore_patterns(".venv", "__pycache__", "checkpoints")
        shutil.copytree(tree, self.root, symlinks=True, ignore=ignored)
        venv.create(folder / "venv", symlinks=True)
        (site,) = (folder / "venv").glob("lib/python*/site-packages")
        for path in pathlib.Path(sysconfig.get_paths()["purelib"]).iterdir():
            (site / path.name).symlink_to(path)
        (folder / "plugin").mkdir()
        shutil.copy(__file__, folder / "plugin" / "mutants.py")
        spec = importlib.util.find_spec("coverage")
        coverage = pathlib.Path(spec.origin).parents[1] if spec else ""
        (site / "mutants.pth").write_text(PTH.format(plugin=folder / "plugin", coverage=coverage))

    def start(self, *words, **variables):
        environment = os.environ | {"MUTANTS_RUN": str(self.folder), **variables}
        environment.pop("PYTHONPATH", None)
        python = self.folder / "venv" / "bin" / "python"
        command = [python, "-m", "pytest", "-q", "-p", "mutants", "-p", "no:cacheprovider", *words]
        with open(self.folder / "pytest.log", "w") as log:
            return subprocess.Popen(command, cwd=self.root, env=environment, stdout=log, stderr=log)

    def processes(self, function):
        """What `function` returns for each process of the run, whoever is its parent."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("MUTANTS_RUN") == str(self.folder):
                    found.append(function(process))
        return found


def measure(copy, files):
    """What a Recorder found, and "lines": {file: {line: tests and fixtures that execute it}}."""
    coverage = importlib.import_module("coverage")
    data = copy.folder / "data"
    data.mkdir()
    config = copy.folder / "coveragerc"
    record = copy.folder / "record.json"
    config.write_text(COVERAGERC.format(folder=copy.folder, include=", ".join(f"*/{path}" for path in files)))
    copy.start(MUTANTS_RECORD=str(record), COVERAGE_PROCESS_START=str(config)).wait()
    copy.processes(psutil.Process.kill)
    print((copy.folder / "pytest.log").read_text()[-3000:])
    lines = {str(path): {} for path in files}
    for path in data.iterdir():
        part = coverage.CoverageData(str(path))
        with contextlib.suppress(coverage.CoverageException):  # of a process that was killed while it wrote
            part.read()
            for file in part.measured_files():
                name = max((name for name in lines if file.endswith(f"/{name}")), key=len)
                for line, contexts in part.contexts_by_lineno(file).items():
                    lines[name].setdefault(line, set()).update(contexts)
    lines = {name: {line: sorted(contexts) for line, contexts in inner.items()} for name, inner in lines.items()}
    return {**json.loads(record.read_text()), "lines": lines}


def tests_of(mutant, found):
    """The tests that execute the mutant, the cheapest first; those of a fixture that takes long come together."""
    lines = {int(line): set(contexts) for line, contexts in found["lines"][mutant["row"]["file"]].items()}
    contexts = set().union(*(lines.get(line, ()) for line in mutant["lines"]))
    if contexts <= {""} or "" in contexts:  # executed at import, or nowhere that is known
        contexts |= set().union(*(lines.get(line, ()) for line in mutant["scope"] or lines))
        contexts = contexts if contexts - {""} else set().union(*lines.values())
    ranks = {}
    for test, fixtures in found["uses"].items():
        if test not in found["failed"] and contexts & {test, *fixtures}:
            slow = {f: found["fixtures"][f] for f in fixtures if found["fixtures"].get(f, 0) > 1}
            ranks[test] = (sum(slow.values()), str(slow), found["costs"][test]) if slow else (found["costs"][test],)
    return sorted(ranks, key=ranks.get)


def outcome(copy, mutant, found, stamp):
    """What the tests make of the mutant."""
    tests = tests_of(mutant, found)
    path = copy.root / mutant["row"]["file"]
    original = path.read_bytes()
    times = path.stat()
    path.write_bytes(mutant["text"])
    os.utime(path, (stamp, stamp))  # no two mutants may share a compiled file
    try:
        said, killer, cpu = run_tests(copy, tests, found["costs"]) if tests else ("survived", None, 0)
    finally:
        copy.processes(psutil.Process.kill)
        path.write_bytes(original)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return {"tests": len(tests), "outcome": said, "killer": killer, "cpu_s": round(cpu, 1)}


def run_tests(copy, tests, costs):
    """(killed or survived, by which test, CPU seconds)."""
    select = copy.folder / "select.json"
    log = copy.folder / "select.json.log"
    select.write_text(json.dumps(tests))
    log.write_text("")
    files = dict.fromkeys(test.split("::")[0] for test in tests)
    current = ""
    cpu = 0
    began = 0
    start = time.monotonic()
    process = copy.start("-x", "--timeout", "120", *files, MUTANTS_SELECT=str(select))
    while process.poll() is None:
        time.sleep(0.3)
        cpu = max(cpu, sum(copy.processes(lambda p: sum(p.cpu_times()[:4]))))
        told = log.read_text().splitlines() or [""]
        if told[-1] != current:
            current = told[-1]
            began = cpu
        if cpu > LIMIT_S or time.monotonic() > start + WALL_S:
            hung = cpu - began > 10 + 3 * costs.get(current, LIMIT_S)
            return ("killed", f"{current} hung", cpu) if hung else ("survived (time)", None, cpu)
    failed = [line.removeprefix("FAILED ") for line in log.read_text().splitlines() if line.startswith("FAILED ")]
    if not failed and process.returncode not in (0, 5):
        failed = [f"exit code {process.returncode}"]
    return ("killed", failed[0], cpu) if failed else ("survived", None, cpu)


def write(path, result):
    """JSON with a row on a line."""
    rows = ",\n".join(json.dumps(row) for row in result["rows"])
    path.write_text(json.dumps(result | {"rows": ["ROWS"]}).replace('"ROWS"', f"\n{rows}\n", 1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tree", type=pathlib.Path, required=True, help="a checkout of the project")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file of the result; rows in it are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60, help="how many mutants")
    parser.add_argument("--coverage", type=pathlib.Path, help="JSON file of what tests execute: read, or else made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Copy(args.tree.resolve(), pathlib.Path(folder))
        if args.coverage and args.coverage.exists():
            found = json.loads(args.coverage.read_text())
        else:
            found = measure(copy, [path for paths in sources(copy.root).values() for path in paths])
            if args.coverage:
                args.coverage.write_text(json.dumps(found))
        known = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
        costs = sorted(found["costs"].items(), key=lambda item: -item[1])
        result = {"seed": args.seed, "killed": 0, "rows": [], "failed_before": found["failed"], "costs": costs}
        for stamp, mutant in enumerate(draw(copy.root, args.seed, args.count), 10**9):
            same = [row for row in known if row.items() >= mutant["row"].items()]
            row = same[0] if same else {**mutant["row"], **outcome(copy, mutant, found, stamp), "reason": None}
            result["rows"].append(row)
            result["killed"] += row["outcome"] == "killed"
            write(args.out, result)
            print(len(result["rows"]), json.dumps(row), flush=True)
    print(f"{result['killed']} of {len(result['rows'])} killed; the others:")
    for row in result["rows"]:
        if row["outcome"] != "killed":
            print("{file}:{line} {function}: {before}  ->  {after}  ({outcome}, {tests} tests)".format(**row))


if __name__ == "__main__":
    main()

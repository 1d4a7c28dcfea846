"""Fuzzes everything that reads user input: `python -m faults.fuzz` (20,000 inputs per parser; minutes each).

    architecture    a JSON file, read by SearchSpace.load_architecture
    checkpoint      a file of torch.save, ours or official, read by checkpoint.load_supernet
    flops_table     a pickle, read by flops_table.read_flops_table
    yaml            a settings file, read by the four parse_args; config_search.yml, read by nni_engine.read_experiment
    command_line    words, read by the four parse_args and the checks after them

Inputs are drawn by Hypothesis, the same ones for a seed: mutations of valid ones, of their tree of values, of the
pickle in an intact zip file, or of their bytes. Each has to be accepted, or refused by a UserError of one short line
(--help may print its text). Memory is limited, so that a huge allocation is a failure. A failure ends the run of a
parser, and is shown with the smallest input that fails so. Each parser runs in a process of its own, whose death is
the failure of the input that it leaves. Writes the parsers' rows of bench/results/fuzz.json; exit code 1 if anything
failed.
"""

import collections
import contextlib
import functools
import importlib
import io
import itertools
import json
import pathlib
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

import hypothesis
import torch
import yaml
from hypothesis import strategies as st

import utils
from bench import study
from engines.nni_engine import read_experiment
from network import ShuffleNetV2OneShot
from settings.fields import flag
from settings.subjects import FIELDS, DataConfig
from space import weight_files
from space.flops_table import read_flops_table
from space.limits import make_bounds
from space.search_space import OPERATIONS, SearchSpace
from training import checkpoint

ROOT = study.ROOT
MEMORY = 6 * 2**30  # bytes of address space, beyond those at the start
LONGEST = 1000  # characters of an error message
SLOWEST_S = 20.0  # processor seconds
SCRIPTS = ("supernet", "tester", "search", "scratch")
TINY = SearchSpace(28, 3, 1, (1, 2), (1, 2), (4, 6), 2, 8)
GOOD = ("taken", "refused", "help")

# --- mutations -----------------------------------------------------------------------------------------------

_ODD = (2**31, 2**63, -(2**64), 10**30, "\ud800", "x" * 5000, "1e5", "-1", "LayerChoice1", "../..", "/dev/null", "a\nb")
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(_ODD)
_LARGE = (list(range(3000)), functools.reduce(lambda inner, _: [inner], range(90), 1))
VALUES = st.sampled_from(_LARGE) | st.recursive(
    _SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9), inner), max_leaves=9
)
WORDS = st.text(st.characters(), max_size=9) | st.sampled_from((
    *("9" * 5000, "-", "--", "-1", "-0.0", "nan", "inf", "-inf", "1e400", "1_0", "٣", "0x10", "=", "--help", "--demo"),
    *("--config", "--=", "%s", "{}", "290M", "59%", "101%", "/dev/null", ".", "none", "true"),
))  # fmt: skip
TAGS = (
    *("!!python/object/apply:os.system ['exit 3']", "!!python/name:os.system", "!!timestamp x", "!!int ''", "!!bool x"),
    *("!!float ''", "!!binary '?'", "!!set {a}", "!!omap [a: 1]", "2001-99-99", "&a [*a]", "*nowhere", "? [a]"),
    *("{<<: 3}", "0b", "1:60", "\t- x", "%YAML 9.9", "--- 1\n--- 2", "&a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"),
)


def mostly(valid, odd, one_in):
    """Draws of `valid`, but one in so many of `odd`."""
    return st.integers(1, one_in).flatmap(lambda n: odd if n == one_in // 2 else valid)


def laughs(key, depth=60):
    """YAML of aliases whose expanded value has 2^depth words."""
    lines = [f"l0: &l0 [x, x]\n{key}: &l1 [*l0, *l0]"]
    lines += [f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}]" for i in range(2, depth)]
    return "\n".join([*lines, f"{key}: {{lr: *l{depth - 1}}}"])


def places(value):
    """(container, key) of all values in a tree of dicts and lists."""
    if isinstance(value, (dict, list)):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from places(inner)


def _fresh(value):
    """Copies dicts and lists only: copying a `Call` would execute it, and deeply nested tuples would take forever."""
    if isinstance(value, dict):
        return {key: _fresh(inner) for key, inner in value.items()}
    return [_fresh(inner) for inner in value] if type(value) is list else value


@st.composite
def changed(draw, tree, odd=VALUES):
    """The tree with one to three changes: values left out, repeated, renamed or replaced."""
    tree = _fresh(tree)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            return draw(odd)
        (where, key), (other, name) = (found[draw(st.integers(0, len(found) - 1))] for _ in range(2))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            del where[key]
        elif kind == 1:
            where[key] = _fresh(other[name])
        elif kind == 2 and isinstance(where, dict):
            where[draw(st.sampled_from(("", "a", "LayerChoice21", "model", 5)))] = where.pop(key)
        else:
            where[key] = _fresh(draw(odd))
    return tree


@st.composite
def damaged(draw, data):
    """The bytes with one to five changes: some replaced, left out, repeated or moved, or all after a place cut off."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 5))):
        if not data:
            break
        at, to = (draw(st.integers(0, len(data) - 1)) for _ in range(2))
        end = at + draw(st.sampled_from((1, 4, 30)))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            data[at:end] = draw(st.binary(max_size=30))
        elif kind == 1:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 2:
            data[at:at] = data[at:end] * draw(st.sampled_from((1, 2, 100)))
        elif kind == 3:
            data[to : to + end - at] = data[at:end]
        else:
            del data[at:]
    return bytes(data)


# --- parsers: `inputs` is a strategy, `parse` accepts or refuses what it draws ----------------------------------


class Architecture:
    SPACE = SearchSpace()

    def __init__(self, path):
        self.path = path
        one_hot = json.loads((ROOT / "architecture_final.json").read_text())
        self.valid = [one_hot, list(self.SPACE.from_architecture(one_hot))]

    def inputs(self):
        trees = (changed(tree).map(lambda t: json.dumps(t).encode()) for tree in self.valid)
        texts = (damaged(json.dumps(tree).encode()) for tree in self.valid)
        deep = st.sampled_from((b"[", b'{"LayerChoice1":', b"[0,")), st.sampled_from((1000, 300_000, 2_500_000))
        return mostly(st.one_of(*trees, *texts), st.tuples(*deep).map(lambda pair: pair[0] * pair[1]), 200)

    def parse(self, data):
        self.path.write_bytes(data)
        return self.SPACE.load_architecture(self.path)


class Call:
    """Pickles as a function call."""

    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


class Checkpoint:
    def __init__(self, path):
        self.path = path
        weights = ShuffleNetV2OneShot(space=TINY).state_dict()
        ours = {
            "version": weight_files.CHECKPOINT_VERSION,
            "kind": "supernet",
            "step": 3,
            "model": dict(weights),
            "space": TINY.to_dict(),
            "data": DataConfig().to_dict(),
            "split": {"seed": 0, "heldout_per_class": 1, "hash": "0"},
            "classes": ["a", "b", "c"],
            "architecture": None,
            "settings": {"lr": 0.1},
            "metrics": {"seconds": 1.0},
        }
        self.valid = [ours, {"state_dict": {f"module.{k}": v for k, v in weights.items()}}]
        self.bytes = [self._write(v, zipped) for zipped in (True, False) for v in self.valid]

    @staticmethod
    def _write(value, zipped):
        file = io.BytesIO()
        with contextlib.suppress(RecursionError, pickle.PicklingError, TypeError, RuntimeError):  # can't be saved
            torch.save(value, file, _use_new_zipfile_serialization=zipped)
        return file.getvalue()

    @staticmethod
    def _with_pickle(data, change):
        """A zip file of torch.save whose pickle is changed by `change`."""
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, change(content) if name.endswith("data.pkl") else content)
        return file.getvalue()

    def _repacked(self, data):
        pickled = []
        self._with_pickle(data, lambda content: pickled.append(content) or content)
        return damaged(pickled[0]).map(lambda changed: self._with_pickle(data, lambda _: changed))

    def inputs(self):
        tensors = (torch.zeros(()), torch.zeros(1).expand(10**12), torch.zeros(3, dtype=torch.complex64),
                   torch.eye(2).to_sparse(), torch.empty(0), torch.zeros(4, 3, 3, 3), torch.ones(2, dtype=torch.int8),
                   torch.empty(3, device="meta"), torch.full((4,), float("nan")))  # fmt: skip
        odd = VALUES | st.sampled_from((*tensors, OPERATIONS, 1_000_000, [1_000_000] * 2, [2] * 999, Call()))
        trees = [
            changed(tree, odd).map(functools.partial(self._write, zipped=z)) for tree in self.valid for z in (1, 0)
        ]
        return st.one_of(*trees, *map(self._repacked, self.bytes[:2]), *map(damaged, self.bytes))

    def parse(self, data):
        self.path.write_bytes(data)
        model, _ = checkpoint.load_supernet(self.path, None, TINY)
        assert all(isinstance(v, torch.Tensor) and v.device.type == "cpu" for v in model.state_dict().values())


class FlopsTable:
    def __init__(self, path):
        self.path = path
        space = SearchSpace()
        groups = {
            "conv1": {(3, 16, 224, 224, 2): space.costs.stem_flops},
            "rest_operation": {(640, 1000, 7, 7, 1): 33136640},
        }
        for shape, row in zip(space.blocks, space.costs.flops):
            channels = shape.in_channels, shape.out_channels, shape.mid_channels()
            key = (*channels, shape.in_size, shape.in_size, shape.stride)
            for operation, flops in zip(space.operations, row):
                groups.setdefault(f"{operation}_stride_{shape.stride}", {})[key] = flops
        self.valid = groups

    def _write(self, tree, protocol):
        try:
            return pickle.dumps(tree, protocol)
        except (UnicodeEncodeError, RecursionError):
            return pickle.dumps(self.valid, protocol)

    def inputs(self):
        deep = functools.reduce(lambda inner, _: (inner, inner), range(300), 1)
        odd = VALUES | st.none().map(lambda _: deep) | st.sampled_from((  # what is drawn from is hashed: not `deep`
            (1, 2), ((1,),), 2**200, Call(), {(1, 2): 3}, {"a", "b"}, b"bytes", bytearray(3)
        ))  # fmt: skip
        protocols = range(pickle.HIGHEST_PROTOCOL + 1)
        trees = (changed(self.valid, odd).map(functools.partial(self._write, protocol=p)) for p in protocols)
        return st.one_of(*trees, *(damaged(self._write(self.valid, p)) for p in protocols))

    def parse(self, data):
        self.path.write_bytes(data)
        return read_flops_table(self.path)


class Yaml:
    def __init__(self, path):
        self.path = path
        self.parsers = [importlib.import_module(name).parse_args for name in SCRIPTS]

    @staticmethod
    def _tagged(text):
        """The text with odd values in one to three lines."""
        lines = text.splitlines()

        def tag(pairs):
            changed = list(lines)
            for i, value in pairs:
                changed[i] = f"{lines[i].partition(':')[0]}: {value}"
            return "\n".join(changed).encode()

        pairs = st.tuples(st.integers(0, len(lines) - 1), st.sampled_from(TAGS))
        return st.lists(pairs, min_size=1, max_size=3).map(tag)

    def inputs(self):
        def write(tree):
            with contextlib.suppress(yaml.YAMLError, UnicodeEncodeError):
                return yaml.safe_dump(tree).encode()
            return b""

        drawn = []
        for experiment, name in enumerate(("demo.yml", "config_search.yml")):
            text = (ROOT / name).read_text()
            whole = st.one_of(changed(yaml.safe_load(text)).map(write), self._tagged(text), damaged(text.encode()))
            bombs = st.sampled_from([laughs(key).encode() for key in ("common", "tuner", "trialCommand")])
            drawn.append(st.tuples(st.just(experiment), mostly(whole, bombs, 100)))
        return st.one_of(drawn)

    def parse(self, drawn):
        experiment, data = drawn
        self.path.write_bytes(data)
        if experiment:
            return read_experiment(self.path)
        parser = self.parsers[len(data) % len(self.parsers)]
        return parser(["--config", str(self.path)])


class CommandLine:
    def __init__(self, path):
        self.parsers = {name: importlib.import_module(name).parse_args for name in SCRIPTS}

    @staticmethod
    def _words(field):
        """The words of a flag, with values that it may have, and some others."""
        name, form = flag(field.name), field.metadata
        if form["nargs"] == 0 or isinstance(field.default, bool):
            return st.sampled_from(([name], [f"--no-{name[2:]}"]))
        usual = st.sampled_from([*map(str, form["choices"] or ("1", "0.5", "64", "x.yml", "290M", "flops=290M:59%"))])
        n = form["nargs"] if isinstance(form["nargs"], int) else 1
        return st.tuples(st.just(name), *[mostly(usual, WORDS, 10)] * n)

    def inputs(self):
        scripts = []
        for script, parse_args in self.parsers.items():
            flags = [self._words(FIELDS[name]) for name in vars(parse_args([])) if name in FIELDS]
            words = st.lists(mostly(st.one_of(flags), st.tuples(WORDS), 20), min_size=1, max_size=6)
            scripts.append(st.tuples(st.just(script), words.map(lambda lists: [*itertools.chain(*lists)])))
        return st.one_of(scripts)

    def parse(self, drawn):
        name, words = drawn
        args = self.parsers[name](words)
        config = DataConfig.resolve(DataConfig.given(vars(args)))
        space = SearchSpace.for_images(config.input_size, 10)
        if name == "search":
            make_bounds(space, args.limit or (), args.flops_limit)
        if name == "supernet" and args.flops_range:
            [space.cost_value("flops", v) for v in args.flops_range]


PARSERS = {
    "architecture": Architecture,
    "checkpoint": Checkpoint,
    "flops_table": FlopsTable,
    "yaml": Yaml,
    "command_line": CommandLine,
}


def outcome(target, drawn):
    """Returns one of GOOD, or else what the parser did wrong."""
    printed = io.StringIO()
    start = time.process_time()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            target.parse(drawn)
        result = "taken"
    except utils.UserError as error:
        line = " ".join(str(error).split())
        result = "refused" if 0 < len(line) <= LONGEST else f"an error of {len(line)} characters: {line[:100]}"
    except SystemExit as error:
        result = "help" if error.code in (0, None) and "usage:" in printed.getvalue() else f"SystemExit {error}"
    except Exception as error:
        result = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if time.process_time() - start > SLOWEST_S:
        return f"took {time.process_time() - start:.0f} s, then: {result}"
    return result


def each_input(target, seed, count, judge):
    """Calls `judge` with `count` inputs of a parser, always the same ones for a seed; once it raises, with fewer."""
    settings = hypothesis.settings(max_examples=count, database=None, deadline=None, report_multiple_bugs=False,
                                   phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
                                   suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    hypothesis.seed(seed)(settings(hypothesis.given(target.inputs())(lambda drawn: judge(drawn))))()


def fuzz(name, seed, count):
    """Fuzzes a parser; returns its row {"parser", "seed", "inputs", "taken", "refused", ...} of the table."""
    start, counts, failure = time.perf_counter(), collections.Counter(), None
    grown = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (grown + MEMORY, resource.RLIM_INFINITY))

    def judge(drawn):
        result = outcome(target, drawn)
        counts[result if result in GOOD else "failed"] += 1
        assert result in GOOD, f"{result}: {repr(drawn)[:300]}"

    folder = tempfile.mkdtemp(prefix=f"fuzz-{name}-")
    target = PARSERS[name](pathlib.Path(folder, "input"))
    try:
        each_input(target, seed, count, judge)
    except AssertionError as error:
        failure = str(error)
    shutil.rmtree(folder)
    row = {"parser": name, "seed": seed, "inputs": counts.total(), **{key: counts[key] for key in (*GOOD, "failed")}}
    return row | {"failure": failure, "seconds": round(time.perf_counter() - start, 1), "commit": utils.commit()}


def parse_args(argv=None):
    parser = study.parser(__doc__, {"--results": study.RESULTS / "fuzz.json"})
    parser.add_argument("--parsers", nargs="+", choices=PARSERS, default=list(PARSERS))
    parser.add_argument("--count", type=int, default=20_000, metavar="N", help="inputs per parser (default: 20000)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    return parser.parse_args(argv)


def main(options):
    torch.set_num_threads(1)
    if len(options.parsers) == 1:
        row = fuzz(*options.parsers, options.seed, options.count)
        print({key: value for key, value in row.items() if value is not None}, flush=True)
        rows = {row["parser"]: row for row in (*study.read(options.results).get("rows", []), row)}
        utils.write_json(options.results, {"versions": utils.versions(), "rows": list(rows.values())}, indent=1)
        sys.exit(bool(row["failed"]))
    codes = {}
    for name in options.parsers:
        words = ["--count", options.count, "--seed", options.seed, "--results", options.results, "--parsers", name]
        codes[name] = subprocess.run([sys.executable, "-m", "faults.fuzz", *map(str, words)], cwd=ROOT).returncode
        if codes[name] not in (0, 1):
            left = f"{tempfile.gettempdir()}/fuzz-{name}-*/input"
            print(f"{name}: the process ended with {codes[name]}; its last input is {left}", flush=True)
    sys.exit(any(codes.values()))


if __name__ == "__main__":
    utils.run_script(main, parse_args)

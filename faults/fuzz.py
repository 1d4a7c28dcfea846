"""Fuzzes everything that reads user input: `python faults/fuzz.py` (20,000 inputs per parser; minutes each).

    architecture    a JSON file, read by SearchSpace.load_architecture
    checkpoint      a file of torch.save, ours or official, read by checkpoint.load_supernet
    flops_table     a pickle, read by flops_table.read_flops_table
    yaml            a settings file, read by the four parse_args; config_search.yml, read by nni_engine.read_experiment
    command_line    words, read by the four parse_args and the checks after them

Inputs are mutations of valid ones: of their tree of values, of the pickle in an intact zip file, or of their bytes.
Each is a pure function of parser, seed and index. It has to be accepted, or refused by a UserError of one short line
(--help may print its text). Memory is limited, so that a huge allocation is a failure. Each parser runs in a process
of its own, whose death is a failure of the current input. Writes the parsers' rows of bench/results/fuzz.json; exit
code 1 if anything failed.
"""

import argparse
import contextlib
import importlib
import io
import json
import pathlib
import pickle
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils
from space import weight_files

# isort: split
import torch
import yaml
from fuzz_mutations import ODD_VALUES, ODD_WORDS, TAGS, laughs, mutate_bytes, mutate_tree

from engines.nni_engine import read_experiment
from images.dataset import DataConfig
from network import ShuffleNetV2OneShot
from space.flops_table import read_flops_table
from space.limits import make_bounds
from space.search_space import OPERATIONS, SearchSpace
from training import checkpoint

MEMORY = 6 * 2**30  # bytes of address space, beyond those at the start
LONGEST = 1000  # characters of an error message
SLOWEST_S = 20.0  # processor seconds
SCRIPTS = ("supernet", "tester", "search", "scratch")
TINY = SearchSpace(28, 3, 1, (1, 2), (1, 2), (4, 6), 2, 8)


# --- parsers: `inputs` draws an input from a random.Random, `parse` accepts or refuses it ------------------------


class Architecture:
    SPACE = SearchSpace()

    def __init__(self, path):
        self.path = path
        one_hot = json.loads((ROOT / "architecture_final.json").read_text())
        self.valid = [one_hot, list(self.SPACE.from_architecture(one_hot))]

    def inputs(self, rng):
        if not rng.randrange(200):
            return rng.choice((b"[", b'{"LayerChoice1":', b"[0,")) * rng.choice((1000, 300_000, 2_500_000))
        tree = rng.choice(self.valid)
        if rng.randrange(2):
            return json.dumps(mutate_tree(rng, tree)).encode()
        return mutate_bytes(rng, json.dumps(tree).encode())

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
        self.bytes = [self._write(v) for v in self.valid]
        self.bytes += [self._write(v, _use_new_zipfile_serialization=False) for v in self.valid]
        tensors = (
            torch.zeros(()),
            torch.zeros(1).expand(10**12),
            torch.zeros(3, dtype=torch.complex64),
            torch.eye(2).to_sparse(),
            torch.empty(0),
            torch.zeros(4, 3, 3, 3),
            torch.ones(2, dtype=torch.int8),
            torch.empty(3, device="meta"),
            torch.full((4,), float("nan")),
        )
        self.odd = (*ODD_VALUES, *tensors, OPERATIONS, 1_000_000, [1_000_000] * 2, [2] * 999, Call())

    @staticmethod
    def _write(value, **how):
        file = io.BytesIO()
        torch.save(value, file, **how)
        return file.getvalue()

    def inputs(self, rng):
        kind = rng.randrange(10)
        if kind < 4:
            with contextlib.suppress(RecursionError, pickle.PicklingError, TypeError, RuntimeError):  # can't be saved
                tree = mutate_tree(rng, rng.choice(self.valid), self.odd)
                return self._write(tree, _use_new_zipfile_serialization=rng.random() < 0.9)
        data = rng.choice(self.bytes)
        if kind < 8 and data[:2] == b"PK":
            file = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
                for name in old.namelist():
                    content = old.read(name)
                    new.writestr(name, mutate_bytes(rng, content) if name.endswith("data.pkl") else content)
            return file.getvalue()
        return mutate_bytes(rng, data)

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
        for shape, row in zip(space.blocks, space.choice_flops):
            channels = shape.in_channels, shape.out_channels, shape.mid_channels()
            key = (*channels, shape.in_size, shape.in_size, shape.stride)
            for operation, flops in zip(space.operations, row):
                groups.setdefault(f"{operation}_stride_{shape.stride}", {})[key] = flops
        self.valid = groups
        deep = 1
        for _ in range(300):
            deep = (deep, deep)
        self.odd = (*ODD_VALUES, (1, 2), ((1,),), deep, 2**200, Call(), {(1, 2): 3}, {"a", "b"}, b"bytes", bytearray(3))

    def inputs(self, rng):
        tree = self.valid if rng.randrange(2) else mutate_tree(rng, self.valid, self.odd)
        protocol = rng.randrange(pickle.HIGHEST_PROTOCOL + 1)
        try:
            data = pickle.dumps(tree, protocol)
        except (UnicodeEncodeError, RecursionError):
            data = pickle.dumps(self.valid, protocol)
        return data if tree is not self.valid else mutate_bytes(rng, data)

    def parse(self, data):
        self.path.write_bytes(data)
        return read_flops_table(self.path)


class Yaml:
    def __init__(self, path):
        self.path = path
        self.valid = [(ROOT / name).read_text() for name in ("demo.yml", "config_search.yml")]
        self.parsers = [importlib.import_module(name).parse_args for name in SCRIPTS]

    def inputs(self, rng):
        which = rng.randrange(3) // 2  # 1, in a third of the cases: the experiment
        text = self.valid[which]
        kind = rng.randrange(5)
        if kind < 2:
            with contextlib.suppress(yaml.YAMLError, UnicodeEncodeError):
                return which, yaml.safe_dump(mutate_tree(rng, yaml.safe_load(text))).encode()
        if kind == 2:  # odd values in the text
            lines = text.splitlines()
            for _ in range(rng.randint(1, 3)):
                i = rng.randrange(len(lines))
                lines[i] = re.sub(r":.*", lambda _: ": " + rng.choice(TAGS), lines[i], count=1)
            return which, "\n".join(lines).encode()
        if not rng.randrange(100):
            return which, laughs(rng.choice(("common", "tuner", "trialCommand"))).encode()
        return which, mutate_bytes(rng, text.encode())

    def parse(self, drawn):
        which, data = drawn
        self.path.write_bytes(data)
        if which:
            return read_experiment(self.path)
        parser = self.parsers[len(data) % len(self.parsers)]
        return parser(["--config", str(self.path)])


class CommandLine:
    def __init__(self, path):
        self.actions = {}
        self.parsers = {name: importlib.import_module(name).parse_args for name in SCRIPTS}
        for name in SCRIPTS:
            parser = importlib.import_module(name).make_parser()
            self.actions[name] = [action for action in parser._actions if action.option_strings]

    def inputs(self, rng):
        name = rng.choice(SCRIPTS)
        words = []
        for action in rng.choices(self.actions[name], k=rng.randint(1, 6)):
            words.append(rng.choice(action.option_strings))
            if action.nargs != 0:
                values = list(map(str, action.choices or ("1", "0.5", "64", "x.yml", "290M", "flops=290M:59%")))
                words += [rng.choice(values) for _ in range(action.nargs if isinstance(action.nargs, int) else 1)]
        for _ in range(rng.randint(0, 2)):
            at = rng.randrange(len(words))
            kind = rng.randrange(5)
            if kind == 0 and len(words) > 1:
                del words[at]
            elif kind == 1:
                data = mutate_bytes(rng, words[at].encode("utf8", "surrogateescape"))
                words[at] = data.decode("utf8", "surrogateescape")
            elif kind == 2:
                words.insert(at, rng.choice(ODD_WORDS))
            else:
                words[at] = rng.choice(ODD_WORDS)
        return name, words

    def parse(self, drawn):
        name, words = drawn
        args = self.parsers[name](words)
        config = DataConfig.resolve(DataConfig.given(vars(args)))
        space = SearchSpace.for_images(config.input_size, 10)
        if name == "search":
            make_bounds(space, args.limit or (), args.flops_limit)
        if name == "supernet" and args.flops_range:
            [space.flops_value(v) for v in args.flops_range]


PARSERS = {
    "architecture": Architecture,
    "checkpoint": Checkpoint,
    "flops_table": FlopsTable,
    "yaml": Yaml,
    "command_line": CommandLine,
}


def outcome(target, drawn):
    """Returns "taken", "refused" or "help", or else what the parser did wrong."""
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


def draw(name, target, seed, index):
    return target.inputs(random.Random(f"{name} {seed} {index}"))


def child(name, seed, start, count):
    """Tries inputs from `start` to `count`; prints lines of JSON: each index, failure, and the counts so far."""
    torch.set_num_threads(1)
    grown = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (grown + MEMORY, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as folder:
        target = PARSERS[name](pathlib.Path(folder, "input"))
        counts = {}
        for index in range(start, count):
            print(json.dumps({"at": index}), flush=True)
            result = outcome(target, draw(name, target, seed, index))
            if result not in ("taken", "refused", "help"):
                print(json.dumps({"index": index, "failure": result}), flush=True)
                result = "failed"
            counts[result] = counts.get(result, 0) + 1
            print(json.dumps({"counts": counts}), flush=True)


def fuzz(name, seed, count):
    """Fuzzes a parser; returns its row {"parser", "seed", "inputs", "taken", "refused", ...} of the table."""
    start = time.perf_counter()
    next_index = 0
    totals = {}
    failures = []
    deaths = 0
    while next_index < count and deaths < 20:
        words = [sys.executable, __file__, "--child", name, str(seed), str(next_index), str(count)]
        counts = {}
        at = next_index
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            for line in process.stdout:
                message = json.loads(line)
                at = message.get("at", at)
                counts = message.get("counts", counts)
                if "failure" in message:
                    failures.append(message)
        for key, n in counts.items():
            totals[key] = totals.get(key, 0) + n
        next_index = count
        if process.returncode:
            deaths += 1
            next_index = at + 1
            failures.append({"index": at, "failure": f"the process ended with {process.returncode}"})
            totals["failed"] = totals.get("failed", 0) + 1
    row = {key: totals.get(key, 0) for key in ("taken", "refused", "help", "failed")}
    row |= {"failures": failures[:20], "seconds": round(time.perf_counter() - start, 1)}
    return {"parser": name, "seed": seed, "inputs": sum(totals.values()), **row}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parsers", nargs="+", choices=PARSERS, default=list(PARSERS))
    parser.add_argument("--count", type=int, default=20_000, metavar="N", help="inputs per parser (default: 20000)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench" / "results" / "fuzz.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], *map(int, options.child[1:]))
        return
    earlier = json.loads(options.results.read_text())["rows"] if options.results.exists() else []
    rows = {row["parser"]: row for row in earlier}
    print("parser         seed  inputs   taken  refused  help  failed  seconds")
    for name in options.parsers:
        row = rows[name] = fuzz(name, options.seed, options.count) | {"commit": utils.commit()}
        outcomes = f"{row['taken']:7} {row['refused']:8} {row['help']:5} {row['failed']:7}"
        print(f"{name:14} {row['seed']:4} {row['inputs']:7} {outcomes} {row['seconds']:8}", flush=True)
        for failure in row["failures"]:
            print(f"  input {failure['index']}: {failure['failure']}")
        utils.write_json(options.results, {"versions": utils.versions(), "rows": list(rows.values())}, indent=1)
    sys.exit(any(rows[name]["failed"] for name in options.parsers))


if __name__ == "__main__":
    main()

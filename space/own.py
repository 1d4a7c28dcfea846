"""What a Python file of the user registers (`--own FILE`): operations, training rules, costs, searchers.

Each kind has a hash of the code that it uses, so that another rule in the same file does not make weights unreadable:
the operations decide whether weights can be read, the rule whether a training resumes, costs and searcher whether a
search does.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import math
import pathlib
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import blocks
from settings.subjects import COSTS
from space import search_space
from space.costs import OwnCost, check_fit
from space.search_space import OPERATIONS
from utils import HERE, UserError, commit, in_one_line

REGISTRIES = {"operation": blocks.OPERATIONS, "rule": {}, "cost": {}, "searcher": {}}  # kind -> {name: what it has}
# Names that a file must not take: for costs, also those of other numbers in the results of a search.
RESULTS = ("architecture", "acc1", "acc1_error", "acc5", "loss", "n_images", "seconds", "halves", "score", "error",
           "trial", "generation", "latency_ms", "measured_ms", "holds", "of_all")  # fmt: skip
OFFICIAL = {"operation": OPERATIONS, "rule": ("spos",), "cost": COSTS + RESULTS, "searcher": ("evolution", "random")}
FLAGS = {"rule": "--rule", "cost": "--limit", "searcher": "--strategy"}
REGISTERS = {"register": "operation", "register_rule": "rule", "register_cost": "cost", "register_searcher": "searcher"}
hashes = {}  # (kind, name) -> hash of the code that the kind uses, of what a file has registered
SAME_RULES = {}  # hash of rules in older checkpoints -> the hash that is used now
loaded = {}  # SHA-256 of a file -> ({kind: {name: what it has registered}}, the hashes of these, its path)


def register_rule(name):
    """A decorator that registers a training rule, a generator function (see training.step.Step), by name."""
    return functools.partial(_register, "rule", name)


def _register(kind, name, found):
    REGISTRIES[kind][name] = found
    return found


class Cost(NamedTuple):
    """A registered cost: the user's function, and its unit."""

    func: Callable
    unit: str


def register_cost(name, unit=""):
    """A decorator that registers a cost of candidates by name; less of it is better.

    A function of a SearchSpace, `cost(space)`, returns a table in the unit: for every block the costs of its choices,
    those of `space.block_operations` (with widths, each at every width). The cost of a candidate is their sum.
    A function `cost(space, candidate)` returns any number for a candidate.
    """
    if not re.fullmatch(r"[a-z]\w*", name):
        raise UserError(f"register_cost: {name!r} is not a name such as energy: a small letter, letters, digits, _")
    if re.match(r"[\d.%]", unit):
        raise UserError(f"register_cost: unit {unit!r} of {name} would be read as a number, or a share of candidates")

    def registered(function):
        REGISTRIES["cost"][name] = Cost(function, unit)
        return function

    return registered


def register_searcher(name):
    """A decorator that registers a searcher for `search.py --strategy NAME`.

    It is a class, or a function, of (space, limits, rng, search): a SearchSpace, a Limits, the random.Random from which
    alone it draws, and the settings.subjects.Search of the flags. `ask()` returns a candidate; `tell(candidate,
    reward)` takes the top-1 of one in percent, or minus its loss, or None where it is illegal or failed. A generation
    is asked for before it is told; see space.evolution.Evolution.
    """
    return functools.partial(_register, "searcher", name)


def find(kind, name):
    """What is registered under a name. Raises UserError if nothing is."""
    known = REGISTRIES[kind]
    if name not in known:
        names = dict.fromkeys((*(OFFICIAL[kind] if kind == "searcher" else ()), *known))
        raise UserError(f"{FLAGS.get(kind, kind)} {name}: is none of {', '.join(names)}; name its file by --own")
    return known[name]


def commits():
    """The git commits of the folders of the files that were loaded, in words, for logs."""
    paths = [pathlib.Path(path).absolute() for *_, path in loaded.values()]
    return "".join(f"; commit of {path.name}'s folder {commit(path.parent)}" for path in paths)


def load(path):
    """Executes a user's file, which registers what it has; does nothing for None.

    Raises UserError if the file fails, registers nothing, or registers an official name.
    """
    if path is None:
        return
    try:
        source = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--own {path}: {error.strerror}") from None
    whole = hashlib.sha256(source).hexdigest()
    if whole not in loaded:
        loaded[whole] = *_execute(path, source, whole), path
    new, digests, _ = loaded[whole]
    for kind, found in new.items():
        REGISTRIES[kind].update(found)
    hashes.update(digests)


def _execute(path, source, whole):
    """What a file registers, and its hashes, as in `loaded`; `source` is its content, of SHA-256 `whole`."""
    before = {kind: dict(registry) for kind, registry in REGISTRIES.items()}
    try:
        with in_one_line(f"--own {path}"):
            new = _newly_registered(path, source, before)
    except UserError:
        for kind, registry in REGISTRIES.items():
            registry.clear()
            registry.update(before[kind])
        raise
    if not any(new.values()):
        others = ", ".join(name for name in REGISTERS if name != "register")
        how = f"blocks.register(name), or with {others} of space.own"
        raise UserError(f"--own {path}: registers nothing; decorate a class or function with {how}")
    digests = {}
    text = source.decode("utf-8-sig", errors="replace")
    for kind, found in new.items():
        digest = _hash(text, found.values(), kind)
        digests.update({(kind, name): digest for name in found})
        if kind == "operation" and found:  # older checkpoints have that of the whole file, or the older hash
            search_space.SAME_OPERATIONS |= {whole[:16]: digest, _hash(text, found.values()): digest}
        if kind == "rule" and found:
            SAME_RULES[_hash(text, found.values())] = digest
    return new, digests


def _newly_registered(path, source, before):
    """Executes a file. Returns {kind: {name: what it registers}}; `before` has what was registered before, likewise.

    Raises UserError for an official name.
    """
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("own", path))
    # Not by the module's loader, whose bytecode cache misses an edit within a second.
    exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    new = {kind: {name: found for name, found in registry.items()
                  if before[kind].get(name) is not found and not (name in OFFICIAL[kind] and _is_projects(found))}
           for kind, registry in REGISTRIES.items()}  # fmt: skip
    for kind, found in new.items():
        if taken := sorted(found.keys() & set(OFFICIAL[kind])):
            raise UserError(f"{taken[0]!r} is the name of an official {kind}")
    return new


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)


def _hash(source, found, kind=None):
    """A hash of the top-level statements that classes and functions reach by name, of those that bind no name, and of
    those that register one of the kind; without a kind, the older hash, which missed the latter."""
    lines = source.replace("\r\n", "\n").split("\n")  # as ast counts them
    bodies, binding, unbound = [], {}, []  # text of a statement; name -> statements that bind it; the others
    statements = ast.parse(source).body
    for number, statement in enumerate(statements):
        decorators = getattr(statement, "decorator_list", [])
        first = min(node.lineno for node in (statement, *decorators))
        bodies.append("\n".join(lines[first - 1 : statement.end_lineno]))
        names = _bound(statement)
        for name in names + (_bound_within(statement) if kind else []):
            binding.setdefault(name, []).append(number)
        is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        registers = _registers(statement, statements) if kind else set()
        of_a_search = registers and registers <= {"cost", "searcher"}  # on which no weights depend
        if kind in registers or not (names or is_text or of_a_search):
            unbound.append(number)
    wanted = [getattr(_function(one), "__name__", None) for one in found]
    left = [*unbound, *(number for name in wanted for number in binding.get(name, range(len(statements))))]
    reached = set()
    while left:
        number = left.pop()
        if number not in reached:
            reached.add(number)
            used = {node.id for node in ast.walk(statements[number]) if isinstance(node, ast.Name)}
            left += [other for name in used for other in binding.get(name, ())]
    return hashlib.sha256("\n".join(bodies[number] for number in sorted(reached)).encode()).hexdigest()[:16]


def _bound(statement):
    """The names that a top-level statement binds."""
    if isinstance(statement, DEFINITIONS):
        return [statement.name]
    if isinstance(statement, IMPORTS):
        return [(alias.asname or alias.name).partition(".")[0] for alias in statement.names]
    return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _bound_within(statement):
    """The names that definitions and imports bind inside a top-level try, if, with or loop."""
    if isinstance(statement, DEFINITIONS + IMPORTS):
        return []
    return [name for node in ast.walk(statement) if isinstance(node, DEFINITIONS + IMPORTS) for name in _bound(node)]


def _registers(statement, statements):
    """The kinds that a statement registers by calling what registers them, under the names that the file gives it."""
    imports = [alias for node in statements if isinstance(node, ast.ImportFrom) for alias in node.names]
    named = {alias.asname: alias.name for alias in imports if alias.asname}
    functions = [node.func for node in ast.walk(statement) if isinstance(node, ast.Call)]
    called = [getattr(f, "attr", None) or getattr(f, "id", None) for f in functions]
    return {REGISTERS[known] for name in called if (known := named.get(name, name)) in REGISTERS}


def _function(found):
    return _function(found.func) if isinstance(found, (functools.partial, Cost)) else found


def hash_of(kind, name):
    """The hash of the code of what is registered under a name; "" if it is the project's own. Raises UserError if
    nothing is.

    What was registered without a file, in a notebook, has that of its source, if Python knows it.
    """
    found = find(kind, name)
    return hashes.get((kind, name)) or source_hash(found)


def source_hash(found):
    """The hash of the source of a function, a class, or the class of an object; "" if it is the project's own."""
    plain = _function(found)
    plain = plain if hasattr(plain, "__qualname__") else type(plain)
    if _is_projects(found):
        return ""
    for kind, registry in REGISTRIES.items():
        for name, registered in registry.items():
            if registered is found and (kind, name) in hashes:
                return hashes[kind, name]
    try:
        return hashlib.sha256(inspect.getsource(plain).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return "in Python"


def _is_projects(found):
    """Whether a function, a class, or the class of an object is of this project, and not of a program in its folder."""
    found = _function(found)
    module = (found if hasattr(found, "__qualname__") else type(found)).__module__
    path = pathlib.Path(getattr(sys.modules.get(module), "__file__", None) or "/")
    if path.parent == HERE:
        return module in ("blocks", "dataloader", "network")
    return path.parent.parent == HERE and path.parent.name in ("space", "training")


# --- operations ----------------------------------------------------------------------------------------------


def with_hash(space):
    """The space with the hash of its own operations.

    Raises UserError if an operation is not registered, or refuses its block.
    """
    for name in space.operations:
        if name not in blocks.OPERATIONS:
            known = ", ".join(blocks.OPERATIONS)
            raise UserError(f"search space: operation {name!r} is not one of {known}; name its file by --own")
    check_fit(space)
    found = [digest for name in space.operations if (digest := hash_of("operation", name))]
    return dataclasses.replace(space, operations_hash=found[0] if found else "")


def check_operations(space, where):
    """Raises UserError if operations of the space in a file are not registered, or have changed since."""
    if with_hash(space).operations_hash != space.operations_hash:
        raise UserError(f"{where}: its operations come from another version of the file of --own; use that one")


# --- costs and searchers -------------------------------------------------------------------------------------


def with_costs(space, names):
    """The space with the costs of these names, of those that are registered. Raises UserError if one can't be used."""
    own = {name: _own_cost(space, name, cost) for name, cost in REGISTRIES["cost"].items() if name in names}
    return space.with_costs(own=own) if own else space


def _own_cost(space, name, cost):
    with in_one_line(f"--own: cost {name!r}"):
        taken = len(inspect.signature(cost.func).parameters)
        if taken not in (1, 2):
            raise UserError(f"is a function of {taken} arguments, not of space, or of space and candidate")
        code = hash_of("cost", name)
        if taken == 2:
            return OwnCost(cost.unit, function=function_of(space, name), code=code)
        table = [[float(number) for number in row] for row in cost.func(space)]
    expected = [len(row) for row in space.costs.flops]
    if [len(row) for row in table] != expected or not all(0 <= n < math.inf for row in table for n in row):
        what = f"rows of {expected} numbers from 0, the choices of each block"
        advice = f"a function of a candidate is {name}(space, candidate)"
        raise UserError(f"--own: cost {name!r} returns no table with {what}; {advice}")
    highest = sum(map(max, table))
    scale = 10.0 ** (9 - math.ceil(math.log10(highest))) if highest else 1.0  # nine digits, so that sums are exact
    return OwnCost(cost.unit, scale, tuple(tuple(round(n * scale) for n in row) for row in table), code=code)


def function_of(space, name):
    """The registered cost of a name as a function of a candidate alone, which is called once for each."""
    function = find("cost", name).func

    @functools.cache
    def cost(candidate):
        with in_one_line(f"--own: cost {name!r} of {list(candidate)}"):
            number = float(function(space, candidate))
            if not math.isfinite(number):
                raise UserError(f"is {number}")
            return number

    return cost


class Searcher:
    """The registered searcher of a name, for an Evolution; its errors are one line, and its candidates are checked."""

    def __init__(self, name, space, *given):
        self.name, self.space = name, space
        with in_one_line(f"--strategy {name}"):
            self.searcher = find("searcher", name)(space, *given)

    def ask(self):
        with in_one_line(f"--strategy {self.name}: ask"):
            return self.space.check(self.searcher.ask())

    def tell(self, candidate, reward):
        with in_one_line(f"--strategy {self.name}: tell"):
            self.searcher.tell(candidate, reward)

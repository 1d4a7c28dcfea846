"""What a Python file of the user registers (`--own FILE`): operations and training rules, each kind with a hash.

A hash is of the code that a kind uses, so that another rule in the same file does not make weights unreadable: the
operations decide whether weights can be read, the rule whether a training resumes.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import pathlib
import sys

import blocks
from space import search_space
from space.costs import check_fit
from space.search_space import OPERATIONS
from utils import HERE, UserError

REGISTRIES = {"operation": blocks.OPERATIONS, "rule": {}}  # kind -> {name: what is registered}
OFFICIAL = {"operation": OPERATIONS, "rule": ("spos",)}  # names that a file must not take
hashes = {}  # (kind, name) -> hash of the code that the kind uses, of what a file has registered
loaded = {}  # SHA-256 of a file -> ({kind: {name: what it has registered}}, the hashes of these)


def register_rule(name):
    """A decorator that registers a training rule, a generator function (see training.step.Step), by name."""

    def registered(rule):
        REGISTRIES["rule"][name] = rule
        return rule

    return registered


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
    if whole in loaded:
        new, digests = loaded[whole]
        for kind, found in new.items():
            REGISTRIES[kind].update(found)
        hashes.update(digests)
        return
    before = {kind: dict(registry) for kind, registry in REGISTRIES.items()}
    try:
        spec = importlib.util.spec_from_file_location("own", path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as error:
        for kind, registry in REGISTRIES.items():
            registry.clear()
            registry.update(before[kind])
        raise UserError(f"--own {path}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    new = {kind: {name: found for name, found in registry.items()
                  if before[kind].get(name) is not found and not (name in OFFICIAL[kind] and _is_projects(found))}
           for kind, registry in REGISTRIES.items()}  # fmt: skip
    for kind, found in new.items():
        if taken := sorted(found.keys() & set(OFFICIAL[kind])):
            REGISTRIES[kind].update(before[kind])
            raise UserError(f"--own {path}: {taken[0]!r} is the name of an official {kind}")
    if not any(new.values()):
        raise UserError(f"--own {path}: registers nothing; decorate a class or function with blocks.register(name)")
    digests = {}
    for kind, found in new.items():
        digest = _hash(source.decode("utf-8-sig", errors="replace"), found.values())
        digests.update({(kind, name): digest for name in found})
        if kind == "operation" and found:  # checkpoints of before have the hash of the whole file
            search_space.SAME_OPERATIONS[whole[:16]] = digest
    hashes.update(digests)
    loaded[whole] = new, digests


def _hash(source, found):
    """A hash of the top-level statements that classes and functions reach by name, and of those that bind no name."""
    lines = source.replace("\r\n", "\n").split("\n")  # as ast counts them
    bodies, binding, unbound = [], {}, []  # text of a statement; name -> statements that bind it; the others
    statements = ast.parse(source).body
    for number, statement in enumerate(statements):
        decorators = getattr(statement, "decorator_list", [])
        first = min(node.lineno for node in (statement, *decorators))
        bodies.append("\n".join(lines[first - 1 : statement.end_lineno]))
        names = _bound(statement)
        for name in names:
            binding.setdefault(name, []).append(number)
        if not names and not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
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
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).partition(".")[0] for alias in statement.names]
    return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _function(found):
    return found.func if isinstance(found, functools.partial) else found


def hash_of(kind, name):
    """The hash of the code of what is registered under a name; "" if it is the project's own.

    What was registered without a file, in a notebook, has that of its source, if Python knows it.
    """
    return hashes.get((kind, name)) or source_hash(REGISTRIES[kind][name])


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

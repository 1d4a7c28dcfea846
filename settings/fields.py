"""What a setting is: a field of a frozen dataclass; flags, checks of YAML files, help and comparisons follow from it.

Needs the standard library alone.
"""

import argparse
import dataclasses
import math
import reprlib
from typing import ClassVar

from utils import UserError


@dataclasses.dataclass(frozen=True)
class Number:
    """The numbers from `low` to `high` of a kind, int or float; called with a word, it is an argparse type."""

    kind: type
    low: float
    high: float

    def __str__(self):
        return f"a {'whole ' if self.kind is int else ''}number from {self.low} to {self.high}"

    def __call__(self, word):
        try:
            value = self.kind(word)
        except ValueError:
            value = math.nan
        if not self.low <= value <= self.high:  # also for NaN
            raise argparse.ArgumentTypeError(f"{word!r} is not {self}")
        return value

    def contains(self, value):
        """Whether a value, not a word, is one of these numbers."""
        kinds = (int,) if self.kind is int else (int, float)
        return type(value) in kinds and self.low <= value <= self.high


def count(low=1, high=1_000_000_000):
    return Number(int, low, high)


def real(low=0.0, high=1e6):
    return Number(float, low, high)


FORM = {"type": None, "unit": None, "choices": None, "nargs": None, "path": False, "decides": True, "in_files": True,
        "extends": False, "excludes": None}  # fmt: skip


def setting(default, help, type=None, **form):
    """A field of a Settings class.

    Args:
        default: its value where neither a flag nor a file gives one; a bool makes it a switch (--x and --no-x)
        help: what it means, in the words of --help; "{default}" stands for the default in words
        type: a Number, or a function of a word that raises argparse.ArgumentTypeError
        unit: unit of the value, or what it is, as --help shows it: PX, S, N, FILE
        choices: the words that it may be
        nargs: how many values it takes, as argparse has it
        path: whether it is a path, which in a YAML file is relative to that file
        decides: whether it decides about the result: then a run that is resumed must have it again, on all ranks
        in_files: whether a YAML file may have it
        extends: whether the command line adds to the values of a file
        excludes: a name that is common to settings of which one at most may be given
    """
    if not form.keys() <= FORM.keys():
        raise TypeError(f"a setting has no {', '.join(form.keys() - FORM.keys())}")
    return dataclasses.field(default=default, metadata={**FORM, "help": help, "type": type, **form})


class Settings:
    """Base of the frozen dataclasses of settings. Raises UserError if a value is out of bounds.

    Where an older file lacks a field, its default is what the absence means; another meaning stands in `ABSENT`.
    `TITLE` is the heading of its flags in --help.
    """

    TITLE = ""
    ABSENT: ClassVar[dict] = {}

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            form = field.metadata
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            if value is None:
                continue
            if form["choices"] and value not in form["choices"]:
                raise UserError(f"{flag(field.name)} {reprlib.repr(value)} is none of {', '.join(form['choices'])}")
            if isinstance(form["type"], Number):
                for v in value if isinstance(value, tuple) else (value,):
                    if not form["type"].contains(v):
                        raise UserError(f"{flag(field.name)} {reprlib.repr(v)} is not {form['type']}")

    @classmethod
    def of(cls, values):
        """The settings of this class in a mapping of names to values that may hold others too."""
        return cls(**{name: values[name] for name in names(cls)})


def names(cls):
    """The names of the fields of a class of settings."""
    return [field.name for field in dataclasses.fields(cls)]


def flag(name):
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def difference(subjects, before, now, ignore=()):
    """{name: "0.5 (was 0.3)"} of what decides and differs between two mappings of settings' names to values.

    `subjects` are the classes that say which names do not decide, and what the absence of one means; names that they
    do not have are compared too. Names in `ignore` are not.
    """
    known = {field.name: (cls, field) for cls in subjects for field in dataclasses.fields(cls)}

    def value(values, name):
        if name not in values and name in known:
            cls, field = known[name]
            return cls.ABSENT.get(name, field.default)
        found = values.get(name)
        return list(found) if isinstance(found, tuple) else found

    def shown(value):
        return value if isinstance(value, str) and len(value) <= 60 else reprlib.repr(value)

    changes = {}
    for name in sorted(before.keys() | now.keys()):
        if name in ignore or (name in known and not known[name][1].metadata["decides"]):
            continue
        old, new = value(before, name), value(now, name)
        if old != new:
            changes[name] = f"{shown(new)} (was {shown(old)})"
    return changes

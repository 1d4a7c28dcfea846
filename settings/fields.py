"""A setting is a field of a frozen dataclass. Flags, YAML checks, help and comparisons are derived from it.

Needs only the standard library.
"""

import argparse
import dataclasses
import math
import reprlib

from utils import UserError


@dataclasses.dataclass(frozen=True)
class Number:
    """The numbers of a kind, int or float, from `low` to `high` inclusive. An argparse type: call it with a word."""

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
    """The whole numbers from `low` to `high`."""
    return Number(int, low, high)


def real(low=0.0, high=1e6):
    """The real numbers from `low` to `high`."""
    return Number(float, low, high)


FORM = {"type": None, "unit": None, "choices": None, "nargs": None, "path": False, "decides": True, "in_files": True,
        "extends": False, "excludes": None, "old": None}  # fmt: skip


def setting(default, help, type=None, **form):
    """A field of a Settings class.

    Args:
        default: the value if neither a flag nor a file sets one; a bool makes it a switch (--x and --no-x)
        help: the text of --help, in which "{default}" is replaced
        type: a Number, or another argparse type
        unit: what --help shows for the value: its unit (PX, S) or kind (N, FILE)
        choices: the allowed values
        nargs: the number of values, as in argparse
        path: whether it is a path; in a YAML file it is relative to that file
        decides: whether it affects the result; if so, a resumed run must have the same value, and so must all ranks
        in_files: whether a YAML file may set it
        extends: whether values on the command line are appended to those in a file instead of replacing them
        excludes: the name of a group of settings that exclude each other
        old: its name before, which flags and files may still use
    """
    if not form.keys() <= FORM.keys():
        raise TypeError(f"a setting has no {', '.join(form.keys() - FORM.keys())}")
    return dataclasses.field(default=default, metadata={**FORM, "help": help, "type": type, **form})


class Settings:
    """Base of the frozen dataclasses of settings. Raises UserError if a value is out of bounds.

    `TITLE` is the heading in --help.
    """

    TITLE = ""

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
                raise UserError(f"{flag(field.name)} {reprlib.repr(value)} is not one of {', '.join(form['choices'])}")
            if isinstance(form["type"], Number):
                for v in value if isinstance(value, tuple) else (value,):
                    if not form["type"].contains(v):
                        raise UserError(f"{flag(field.name)} {reprlib.repr(v)} is not {form['type']}")

    @classmethod
    def of(cls, values):
        """Creates the settings from a mapping (name -> value), which may hold others too."""
        return cls(**{name: values[name] for name in names(cls)})


def names(cls):
    """The names of the fields of a class of settings."""
    return [field.name for field in dataclasses.fields(cls)]


def flag(name):
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def difference(subjects, before, now, ignore=()):
    """Compares two mappings of settings (name -> value). Returns {name: "0.5 (was 0.3)"} for those that differ.

    `subjects` are the classes of the settings: those that don't affect the result are not compared, and absent ones
    have their defaults. Names that no class has are compared; names in `ignore` are not.
    """
    known = {field.name: field for cls in subjects for field in dataclasses.fields(cls)}

    def value(values, name):
        found = values.get(name, known[name].default if name in known else None)
        return list(found) if isinstance(found, tuple) else found

    def shown(value):
        return value if isinstance(value, str) and len(value) <= 60 else reprlib.repr(value)

    changes = {}
    for name in sorted(before.keys() | now.keys()):
        if name in ignore or (name in known and not known[name].metadata["decides"]):
            continue
        old, new = value(before, name), value(now, name)
        if old != new:
            changes[name] = f"{shown(new)} (was {shown(old)})"
    return changes

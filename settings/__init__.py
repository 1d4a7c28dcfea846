"""The settings of the commands, as frozen dataclasses that flags and YAML files fill in."""

import importlib.util
import pathlib

# A file of a program that imports this project may have the name of one of its modules, and be imported instead.
for _name in ("utils", "settings", "space", "images", "training"):
    _found = pathlib.Path(importlib.util.find_spec(_name).origin or "/")
    if pathlib.Path(__file__).parent.parent not in _found.parents:
        raise ImportError(f"{_found} stands in the way of the project's own module {_name!r}: rename it")

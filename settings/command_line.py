"""The command line of all scripts, built from the settings in settings/subjects.py.

Sources of values, lowest precedence first: the defaults of the fields (the official settings), the NNI experiment
(search.py), a YAML file (`--config`, or the committed demo.yml with `--demo`), the command line. Needs the standard
library, and PyYAML to read YAML.
"""

import argparse
import dataclasses
import difflib
import functools
import os
import re
import reprlib
import shlex

from settings.fields import flag
from settings.subjects import FIELDS, Run, is_path
from utils import HERE, UserError, atomic_write, read_yaml

SCRIPTS = ("supernet", "tester", "search", "scratch")  # each has a section in YAML files
# Characters that neither a command line nor a file name can contain; \udc80 to \udcff are bytes that are not UTF-8.
NOT_A_WORD = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")


class Extend(argparse.Action):
    """Appends the values to those of earlier uses of the same flag."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else ()), *values])


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviations, and a YAML file whose settings replace the defaults.

    `section` is the name of the script and of its section in YAML files.
    """

    def __init__(self, doc, section):
        super().__init__(
            description=doc,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            prog=f"{section}.py",
        )
        self.section = section

    def add(self, subject, only=None, defaults=None, said=""):
        """Adds the flags of a class of settings, or only those in `only`.

        `defaults` (name -> value) replace those of the fields; `said` replaces {default} in help texts.
        """
        defaults = defaults or {}
        group = self.add_argument_group(subject.TITLE)
        exclusive = {}  # name -> group of mutually exclusive flags
        for field in dataclasses.fields(subject):
            if only and field.name not in only:
                continue
            form = field.metadata
            default = defaults.get(field.name, field.default)
            options = {"default": default, "help": form["help"].replace("{default}", said or str(default))}
            if form["nargs"] == 0:
                options["action"] = "store_true"
            elif isinstance(field.default, bool):
                options["action"] = argparse.BooleanOptionalAction
            else:
                kind = functools.partial(_expanded, field.name) if form["path"] else form["type"]
                options |= {"type": kind, "choices": form["choices"], "nargs": form["nargs"]}
                options |= {"metavar": form["unit"], "action": Extend if form["extends"] else "store"}
            adder = group
            if name := form["excludes"]:
                adder = exclusive[name] = exclusive.get(name) or group.add_mutually_exclusive_group()
            adder.add_argument(*map(flag, filter(None, (field.name, form["old"]))), **options)

    def error(self, message):
        raise UserError(message if len(message) <= 500 else f"{message[:200]} ... {message[-100:]}")

    def parse(self, argv=None, more=None):
        """Returns the arguments as a namespace; `config` is the path of the YAML file that was read, or None.

        `more(values)` is called with the values so far, and returns values (attribute -> value) that override the
        defaults. Afterwards the parser's `given` maps the attributes that the command line or the file sets to their
        values; `typed` does so for the command line alone.
        """
        unset = argparse.Namespace(**{action.dest: self for action in self._actions})  # no flag has this value
        typed = {k: v for k, v in vars(self.parse_args(argv, unset)).items() if v is not self and k != "help"}
        self.typed = dict(typed)
        path = HERE / "demo.yml" if typed.get("demo") else typed.get("config")
        settings = self.read_settings(path) if path else {}
        for name in typed.keys() & settings.keys():
            if FIELDS[name].metadata["extends"]:
                typed[name] = [*settings[name], *typed[name]]
        values = {action.dest: action.default for action in self._actions if action.dest != "help"}
        if more:
            values |= more(values | settings | typed)
        values |= settings | typed
        self.given = {k: v for k, v in settings.items() if k != "space"} | typed  # `space` serves all scripts
        return argparse.Namespace(**values | {"config": path and str(path)})

    def refuse(self, cause, *flags):
        """Raises UserError if a flag that has no effect with `cause` is given; giving its default is allowed."""
        for name in flags:
            attribute = name.replace("-", "_")
            if self.given.get(attribute, self.get_default(attribute)) != self.get_default(attribute):
                raise UserError(f"--{name} has no effect with {cause}: leave one of them out")

    def read_settings(self, path):
        """The checked settings of a YAML file: section `common`, overridden by the section of this script."""
        document = read_yaml(path)
        for name, section in document.items():
            if name not in ("common", "space", *SCRIPTS, self.section):
                known = ", ".join(("common", "space", *SCRIPTS))
                raise UserError(f"{path}: unknown section {reprlib.repr(name)}; known sections: {known}")
            if not isinstance(section, dict):
                raise UserError(f"{path}: {name!r} is not a section with settings, but {reprlib.repr(section)}")
        own = {name.removeprefix("--") for name in self._option_string_actions}
        others = {flag(name).removeprefix("--") for name in FIELDS} - own  # other scripts have these
        common = {k: v for k, v in document.get("common", {}).items() if k not in others}
        values = self.check_settings(path, "common", common)
        values |= self.check_settings(path, self.section, document.get(self.section, {}))
        if "space" in document and "space" in own:
            values["space"] = document["space"]
        return values

    def _meant(self, name):
        """Which setting, of this script or of another one, was meant by a wrong name, if one is like it."""
        known = {text.removeprefix("--") for text in (*self._option_string_actions, *map(flag, FIELDS))}
        like = difflib.get_close_matches(str(name).replace("_", "-"), sorted(known), 1)
        if not like:
            return ""
        return ", but another command has it" if like[0] == name else f": did you mean {like[0]!r}?"

    def check_settings(self, path, section, settings):
        """Checks settings from a file (flag without dashes -> value). Returns them as {attribute: value}.

        Values must have the type and choices of their flags; file names are relative to the folder of `path`.
        Raises UserError that begins with `path` for an unknown flag or a wrong value.
        """
        words, attributes = [], []
        for name, value in settings.items():
            action = self._option_string_actions.get(f"--{name}")
            if action is None or action.dest == "help" or not FIELDS[action.dest].metadata["in_files"]:
                where = f"{path}: {self.section}.py has no setting {reprlib.repr(name)} (section {section!r})"
                raise UserError(f"{where}{self._meant(name)}")
            if value is False and "off" in (action.choices or ()):  # PyYAML reads `off` as False
                value = "off"
            words += _words(path, action, name, value)
            attributes.append(action.dest)
        try:
            args = self.parse_args(words)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return {name: getattr(args, name) for name in attributes}


def _words(path, action, name, value):
    """Converts a setting of a file to words of a command line. Raises UserError if it is not a plain value."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{path}: {name} is {reprlib.repr(value)}, not true or false")
        no = [f"--no-{name}"] if isinstance(action, argparse.BooleanOptionalAction) else []
        return [f"--{name}"] if value else no
    values = value if isinstance(value, list) else [value]
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (str, int, float)) or NOT_A_WORD.search(str(v)):
            raise UserError(f"{path}: {name} is {reprlib.repr(value)}, not a plain value")
    words = list(map(str, values))
    if is_path(action.dest, value):
        words = [_beside(path, word) for word in words]
    if not action.nargs and len(words) == 1:
        return [f"--{name}={words[0]}"]  # it may begin with -
    return [f"--{name}", *words]


def _beside(path, name):
    """Resolves a file name in the settings file `path`: it is relative to the folder of that file."""
    return os.path.join(os.path.dirname(path), os.path.expanduser(name))


def _expanded(name, word):
    """A word of the setting `name`, with ~ replaced where it is a path: bash leaves it in --out=~/run."""
    return os.path.expanduser(word) if is_path(name, word) else word


def write_settings(path, section, values):
    """Writes settings (attribute -> value) as YAML for `--config`; makes paths absolute and leaves out None."""
    import yaml

    words = {}
    for name, value in values.items():
        if value is not None and (name not in FIELDS or FIELDS[name].metadata["in_files"]):
            words[flag(name).removeprefix("--")] = os.path.abspath(value) if is_path(name, value) else value
    document = {section: words}
    if isinstance(words.get("space"), dict):  # a description has a section of its own, a name has not
        document["space"] = words.pop("space")
    with atomic_write(path) as file:
        yaml.safe_dump(document, file)


def command(script, run, own, *words):
    """The command line of another script: these words, with the settings file and output folder of a Run, and --own.

    Keeps device and threads, where they don't come from the file.
    """
    words = ["python", script, *words]
    if run.demo:
        words += ["--demo"]
    elif run.config:
        words += ["--config", run.config]
    if own != (setting_in(run.config, "common", "own") or setting_in(run.config, "common", "operations")):
        words += ["--own", own]
    sections = [section for section in _document(run.config).values() if isinstance(section, dict)]
    for name in ("device", "threads"):
        if (value := getattr(run, name)) not in [getattr(Run, name), *(section.get(name) for section in sections)]:
            words += [flag(name), str(value)]
    if run.out != ".":
        words += ["--out", run.out]
    return shlex.join(words)


def setting_in(path, section, name):
    """The value of a setting in a section of a settings file, as it stands there, but for paths; None without one."""
    value = _document(path).get(section, {}).get(name)
    return _beside(path, value) if value and is_path(name, value) else value


def _document(path):
    return read_yaml(path) if path else {}

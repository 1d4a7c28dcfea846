"""docs/settings.md is that of the parsers; `python tests/test_settings.py` writes it."""

import argparse
import importlib
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from settings import command_line  # noqa: E402
from settings.command_line import write_settings  # noqa: E402
from settings.subjects import FIELDS  # noqa: E402

PAGE = ROOT / "docs" / "settings.md"
HEAD = """# Settings

Every flag of the four commands is a setting of the file of `--config` too: in a section of the command's name, or in
`common`, which serves all of them, without the dashes (`batch-size: 256`). The command line wins over the file, and
the file over the defaults. `space` is a section of its own ([spaces.md](spaces.md)). Paths are relative to the file,
and `~` is the home folder. A key given twice, and a section or setting that no command knows, are errors.

Made from the parsers by `python tests/test_settings.py`. A cross marks the commands that have the setting: supernet.py,
tester.py, search.py, scratch.py.

| setting | su | te | se | sc | values | meaning (default) |
|---|---|---|---|---|---|---|
"""


def parser_of(script):
    """The parser of a command."""
    found, parse = [], command_line.Parser.parse
    command_line.Parser.parse = lambda self, *args: found.append(self) or parse(self, *args)
    try:
        importlib.import_module(script).parse_args([])
    finally:
        command_line.Parser.parse = parse
    return found[0]


def settings():
    """{setting: {script: argparse action}} of all commands."""
    found = {}
    for script in command_line.SCRIPTS:
        for action in parser_of(script)._actions:
            name = action.option_strings[0].removeprefix("--")
            if name not in ("-h", "config", "demo"):
                found.setdefault(name, {})[script] = action
    return dict(sorted(found.items()))


def page():
    rows = []
    for name, by_script in settings().items():
        action = next(iter(by_script.values()))
        if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
            values = "true, false"
        elif action.choices:
            values = ", ".join(action.choices)
        else:
            metavar = action.metavar or name.upper()
            values = " ".join(metavar) if isinstance(metavar, tuple) else metavar
        helps = list(dict.fromkeys(a.help.replace("%%", "%") for a in by_script.values()))
        crosses = " | ".join("x" if script in by_script else "" for script in command_line.SCRIPTS)
        meaning = "; or: ".join(helps).replace("|", "\\|")
        rows.append(f"| `{name}` | {crosses} | {values.replace('|', ' or ')} | {meaning} |\n")
    return HEAD + "".join(rows)


def test_the_page_of_settings_is_that_of_the_parsers():
    assert PAGE.read_text() == page()


def test_every_field_is_a_setting():
    assert sorted(FIELDS.keys() - {"config", "demo"}) == sorted(name.replace("-", "_") for name in settings())


def test_the_settings_that_a_run_wrote_can_be_read(tmp_path):
    """Where one flag makes others void, their defaults are in the file."""
    for script, words in (("supernet", ["--sampler", "uniform"]), ("search", ["--engine", "local"])):
        module = importlib.import_module(script)
        args, path = module.parse_args(words), tmp_path / f"{script}.yml"
        write_settings(path, script, vars(args))
        again = module.parse_args(["--config", str(path)])
        assert {k: v for k, v in vars(again).items() if k not in ("config", "out")} == {
            k: v for k, v in vars(args).items() if k not in ("config", "out")
        }


if __name__ == "__main__":
    PAGE.write_text(page())

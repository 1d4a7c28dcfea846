"""docs/settings.md is that of the parsers; `python tests/test_settings.py` writes it."""

import argparse
import dataclasses
import importlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from settings.command_line import SCRIPTS, command, setting_in, write_settings  # noqa: E402
from settings.fields import difference, setting  # noqa: E402
from settings.subjects import FIELDS, SEARCH, SUBJECTS, DataConfig, Run, Training, deciding  # noqa: E402
from utils import UserError  # noqa: E402

PAGE = ROOT / "docs" / "settings.md"
HEAD = """# Settings

Every flag of the four commands can also stand in the file of `--config`, without the dashes (`batch-size: 256`): in a
section named after the command, or in `common`, which serves all of them. `space` is a section of its own
([spaces.md](spaces.md)). The command line wins over the file, and the file over the defaults. Paths are relative to the
file, and `~` is the home folder. Unknown settings, and a setting given twice, are errors.

To add a setting: a field of a class in `settings/subjects.py`, with `decides=False` if the result does not depend on
it, then the code that takes its class. `python tests/test_settings.py` writes this page.

| setting | of | values | meaning (default) |
|---|---|---|---|
"""


def settings():
    """{setting: {script: argparse action}} of all commands."""
    found = {}
    for script in SCRIPTS:
        for action in importlib.import_module(script).make_parser()._actions:
            name = action.option_strings[0].removeprefix("--")
            if name not in ("-h", "config", "demo"):
                found.setdefault(name, {})[script] = action
    return dict(sorted(found.items()))


def meaning(by_script):
    """The help of a setting; where commands have other defaults, each default with its command."""
    helps = {script: action.help.replace("%%", "%").replace("|", "\\|") for script, action in by_script.items()}
    texts = list(dict.fromkeys(helps.values()))
    (head, *others) = {text.split("(default: ")[0] for text in texts}
    if len(texts) == 1 or others:
        return "; or: ".join(texts)
    defaults = (f"{script}: {text.removeprefix(f'{head}(default: ')[:-1]}" for script, text in helps.items())
    return f"{head}(default: {'; '.join(defaults)})"


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
        if not FIELDS[action.dest].metadata["in_files"]:
            values = "on the command line only"
        of = "all" if len(by_script) == len(SCRIPTS) else ", ".join(by_script)
        rows.append(f"| `{name}` | {of} | {values.replace('|', ' or ')} | {meaning(by_script)} |\n")
    return HEAD + "".join(rows)


def test_the_page_of_settings_is_that_of_the_parsers():
    assert PAGE.read_text() == page()


def test_the_next_command_keeps_what_was_typed(tmp_path):
    path = tmp_path / "own.yml"
    path.write_text("search: {threads: 2}\nsupernet: {space: own/space.yml}\ncommon: {own: ops.py}")
    run = Run(config=str(path), out="o")
    line = f"python tester.py --mode gen --config {path}"
    own = str(tmp_path / "ops.py")
    found = dataclasses.replace(run, threads=2)
    assert command("tester.py", found, own, "--mode", "gen") == f"{line} --out o"
    typed = dataclasses.replace(run, threads=1, device="cpu")
    assert command("tester.py", typed, own, "--mode", "gen") == f"{line} --device cpu --threads 1 --out o"
    assert command("tester.py", run, "x.py", "--mode", "gen") == f"{line} --own x.py --out o"
    assert setting_in(path, "supernet", "space") == str(tmp_path / "own/space.yml")
    assert setting_in(path, "scratch", "space") is None is setting_in(None, "supernet", "space")


def test_fields_of_one_name_are_alike():
    """`resume` is of training and of a search; FIELDS has one of them."""
    for subject in SUBJECTS:
        for field in dataclasses.fields(subject):
            same = ("path", "decides", "in_files", "extends")
            assert [field.metadata[key] for key in same] == [FIELDS[field.name].metadata[key] for key in same]


def test_every_field_is_a_setting():
    assert sorted(FIELDS.keys() - {"config", "demo"}) == sorted(name.replace("-", "_") for name in settings())


@pytest.mark.parametrize(
    "command",
    ["supernet --sampler uniform", "search --engine local", *(f"{s} --demo --seed 3 --no-mirror" for s in SCRIPTS)],
)
def test_the_settings_that_a_run_wrote_can_be_read(tmp_path, command):
    """Where one flag makes others void, their defaults are in the file; its paths are absolute."""
    script, *words = command.split()
    module, path = importlib.import_module(script), tmp_path / f"{script}.yml"
    args = module.parse_args(words)
    write_settings(path, script, vars(args))
    again = module.parse_args(["--config", str(path)])
    kept, found = (
        {k: v for k, v in vars(a).items() if k not in ("config", "demo", "data_dir", "out")} for a in (args, again)
    )
    assert found == kept


def test_every_path_of_a_command_may_begin_with_the_home_folder(monkeypatch):
    """bash leaves ~ in --out=~/run. A regular expression, or the name of a space, is no path."""
    monkeypatch.setenv("HOME", "/elsewhere")
    for script in SCRIPTS:
        parser = importlib.import_module(script).make_parser()
        for action in parser._actions:
            if action.dest in FIELDS and FIELDS[action.dest].metadata["path"]:
                file = f"a.{'yml' if action.dest == 'space' else 'csv'}"
                found = getattr(parser.parse_args([f"{action.option_strings[0]}=~/{file}"]), action.dest)
                assert found in (f"/elsewhere/{file}", [f"/elsewhere/{file}"])
        assert parser.parse_args(["--group-by=~/a(.)"]).group_by == "~/a(.)"
    assert importlib.import_module("dataloader").parse_args(["--check=~/a"]).check == "/elsewhere/a"
    assert importlib.import_module("report").parse_args(["a", "--random=~/b"]).random == pathlib.Path("/elsewhere/b")


# --- what a run that is resumed must have again --------------------------------------------------------------

# The settings in the checkpoints of runs, as 7e149fb wrote them, and the commands that made them.
OLD = {
    "supernet --demo --loader auto --iterations 300": {
        "input_size": 28, "val_resize": 28, "crop_scale": [0.8, 1.0], "jitter": 0.0, "heldout_per_class": 200,
        "bn": "average", "bn_batches": 10, "iterations": 300, "batch_size": 64, "lr": 0.1, "warmup": 200,
        "sampler": "uniform", "seed": 0, "preprocessing": None, "crop_ratio": None, "mirror": None, "split_seed": None,
        "loader": "auto", "eval_batch_size": 200, "momentum": 0.9, "weight_decay": 4e-05, "label_smoothing": 0.1,
        "amp": "off", "bn_batch_size": 128, "eval_amp": "off", "architecture": None, "flops_range": None,
        "flops_bins": 7, "width_warmup": None, "val_paths": 3,
    },
    "scratch --demo --loader auto --iterations 200 --bn-pass 5 --architecture best.json": {
        "input_size": 28, "val_resize": 28, "crop_scale": [0.8, 1.0], "jitter": 0.0, "heldout_per_class": 200,
        "iterations": 200, "batch_size": 64, "lr": 0.1, "warmup": 60, "bn_pass": 5, "architecture": "best.json",
        "checkpoint": None, "seed": 0, "preprocessing": None, "crop_ratio": None, "mirror": None, "split_seed": None,
        "loader": "auto", "eval_batch_size": 200, "momentum": 0.9, "weight_decay": 4e-05, "label_smoothing": 0.1,
        "amp": "off",
    },
}  # fmt: skip


@pytest.mark.parametrize("command", OLD)
def test_an_old_run_has_the_settings_of_the_same_command_today(command):
    script, *words = command.split()
    values = vars(importlib.import_module(script).parse_args(words))
    before, now = ({k: v for k, v in found.items() if v is not None} for found in (OLD[command], deciding(values)))
    assert difference(SUBJECTS, before, now) == {}
    assert difference(SUBJECTS, before, now | {"batch_size": 65}) == {"batch_size": "65 (was 64)"}


@dataclasses.dataclass(frozen=True)
class Longer(Training):
    """Training with settings that older files do not have."""

    average: bool = setting(False, "a new switch")
    hint: int = setting(3, "what does not decide", decides=False)


@pytest.mark.parametrize(("subjects", "before"), [(SUBJECTS, next(iter(OLD.values()))), (SEARCH, {"population": 8})])
def test_what_an_older_file_lacks_has_its_default(subjects, before):
    subjects = (*subjects, Longer)
    assert difference(subjects, before, {**before, "average": False, "hint": 7}) == {}
    changes = difference(subjects, before, {**before, "average": True})
    assert changes == {"average": "True (was False)"}


# --- in Python -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Training(batch_size=1), "batch_size 1 is not a whole number from 2 to 1000000"),
        (lambda: Training(lr=float("nan")), "lr nan is not a number from 0 to 1000"),
        (lambda: Training(amp="half"), "amp 'half' is not one of off, bf16, fp16"),
        (lambda: DataConfig(crop_scale=(0.5, 2)), "crop_scale 2 is not a number from 0.001 to 1"),
        (lambda: DataConfig.resolve({"val_resize": 16}), "val_resize 16 is smaller than the input size, 224"),
    ],
)
def test_a_value_out_of_bounds_is_named_as_an_argument(monkeypatch, make, message):
    monkeypatch.setattr(UserError, "of_commands", False)
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message


def test_a_command_in_a_message_stays_a_command(monkeypatch):
    monkeypatch.setattr(UserError, "of_commands", False)
    error = UserError("latency.json: missing; run tester.py --mode latency --out A, or leave --latency-table out")
    assert str(error) == "latency.json: missing; run tester.py --mode latency --out A, or leave latency_table out"


@pytest.mark.parametrize(
    ("script", "entry", "value"),
    [
        ("supernet", "amp: off", "off"),
        ("scratch", "amp: Off", "off"),
        ("search", "eval-amp: off", "off"),
        ("tester", "eval-amp: false", "off"),
        ("search", "eval-amp: 'off'", "off"),
        ("supernet", "mirror: yes", True),
        ("supernet", "mirror: off", False),
    ],
)
def test_off_in_yaml_is_the_choice_of_that_name(tmp_path, script, entry, value):
    """Though YAML 1.1, which PyYAML reads, takes it for false."""
    path = tmp_path / "s.yml"
    path.write_text(f"{script}: {{{entry}}}")
    args = importlib.import_module(script).parse_args(["--config", str(path)])
    assert getattr(args, entry.split(":")[0].replace("-", "_")) == value


def test_values_that_begin_with_a_dash_and_flags_without_a_value_stand_in_files(tmp_path):
    path = tmp_path / "s.yml"
    path.write_text("""common: {group-by: '-(\\d+)_'}\nsearch: {foreign-latency-table: true}\nscratch: {eval: true}""")
    args = importlib.import_module("search").parse_args(["--config", str(path), "--limit", "latency=1ms"])
    assert args.group_by == r"-(\d+)_" and args.foreign_latency_table is True
    path.write_text(path.read_text().replace("table: true", "table: false"))
    assert not importlib.import_module("search").parse_args(["--config", str(path)]).foreign_latency_table
    with pytest.raises(UserError, match=r"scratch\.py has no setting 'eval'"):
        importlib.import_module("scratch").parse_args(["--config", str(path)])


@pytest.mark.parametrize("entry", ["amp: on", "amp: true", "device: off", "lr: off", "resume: no", "out: off"])
def test_other_words_that_yaml_takes_for_true_or_false_are_refused(tmp_path, entry):
    path = tmp_path / "s.yml"
    path.write_text(f"supernet: {{{entry}}}")
    with pytest.raises(UserError, match=f"{entry.split(':')[0]} is (True|False), not a plain value$"):
        importlib.import_module("supernet").parse_args(["--config", str(path)])


if __name__ == "__main__":
    PAGE.write_text(page())

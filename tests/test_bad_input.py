"""What users get wrong, flag by flag and file by file: one line that names it, exit code 2, and nothing written.

Image files and trees are in test_dataloader.py and test_image_check.py, architecture files in test_search_space.py,
FLOPs tables in test_flops_table.py, ports in test_search_nni.py, settings of the evolution in test_evolution.py.
"""

import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_tree, run

import dataloader
import utils
from images.dataset import DataConfig, evaluation_plan, scan
from network import ShuffleNetV2, ShuffleNetV2OneShot
from space.search_space import SearchSpace
from training import checkpoint

SCRIPTS = ("supernet", "tester", "search", "scratch")
SPACE = SearchSpace.for_images(32, 3)
DATA = ("--input-size", "32", "--heldout-per-class", "1", "--loader", "torchvision", "--workers", "0")
WINNER = json.loads((ROOT / "architecture_final.json").read_text())


def refused(script, words, capsys):
    """Runs a script in this process; its one line."""
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as end:
        utils.run_script(module.main, lambda: module.parse_args([str(w) for w in words]))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and len(err.splitlines()) == 1 and len(err) < 1000, err
    return err


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock"))


# --- numbers -------------------------------------------------------------------------------------------------


def numeric_flags():
    """(script, flag, how many numbers it takes) of every flag whose type is a number, as the parsers say."""
    for script in SCRIPTS:
        for action in importlib.import_module(script).make_parser()._actions:
            if action.type and not isinstance(action.type, functools.partial):  # which is that of a path
                yield script, action.option_strings[0], action.nargs or 1


FLAGS = list(numeric_flags())


def test_the_numeric_flags_are_found():
    assert len(FLAGS) > 70 and {"supernet", "tester", "search", "scratch"} == {script for script, *_ in FLAGS}
    assert {"--lr", "--crop-scale", "--flops-bins", "--bn-pass", "--port"} <= {flag for _, flag, _ in FLAGS}


@pytest.mark.parametrize("script, flag, n", FLAGS)
def test_numbers_that_are_none_or_absurd_are_refused(script, flag, n):
    parse_args = importlib.import_module(script).parse_args
    for word in ("-1", "-0.5", "nan", "inf", "-inf", "1e400", "1" + "0" * 30, "9" * 400, "", "ten", "0x10", "1,5"):
        for i in range(n):
            words = ["0.5"] * n
            words[i] = word
            with pytest.raises(utils.UserError, match=f"argument {flag}: ") as error:
                parse_args([flag, *words])
            assert word == "-inf" or repr(word)[:100] in str(error.value)  # argparse takes -inf for a flag


# --- folders and files that don't fit ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tree, and checkpoints of a supernet and a retrained network that go with it, and some that don't."""
    folder = tmp_path_factory.mktemp("world")
    make_tree(folder / "tree", 4, 2)
    data = DataConfig(input_size=32, val_resize=37, heldout_per_class=1).to_dict()

    def save(name, kind, space, classes, model, **changes):
        content = {"version": 1, "kind": kind, "step": 1, "model": model.state_dict(), "space": space.to_dict(),
        "data": data, "split": None,
                   "classes": classes,
                   "architecture": list(model.architecture) if kind == "scratch" else None}  # fmt: skip
        torch.save(content | changes, folder / name)

    small = {"stage_channels": (8, 12, 16, 20), "stem_channels": 4, "last_channels": 16, "stem_stride": 1}
    space, two = SearchSpace(32, 3, **small), SearchSpace(32, 2, **small)
    names = ["apple", "bird", "car"]
    save("supernet.pth", "supernet", space, names, ShuffleNetV2OneShot(space=space))
    save("two.pth", "supernet", two, ["a", "b"], ShuffleNetV2OneShot(space=two))
    save("names.pth", "supernet", space, ["x", "y", "z"], ShuffleNetV2OneShot(space=space))
    save("split.pth", "supernet", space, names, ShuffleNetV2OneShot(space=space), split={"seed": 0, "hash": "another"})
    save("newer.pth", "supernet", space, names, ShuffleNetV2OneShot(space=space), version=2)
    save("scratch.pth", "scratch", space, names, ShuffleNetV2(WINNER, space=space))
    save("model.pth", "supernet", space, names, ShuffleNetV2OneShot(space=two))
    (folder / "cut.pth").write_bytes((folder / "supernet.pth").read_bytes()[:-5000])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("not weights")
    torch.save({"model": Bomb(folder / "executed")}, folder / "bomb.pth")
    make_tree(folder / "few", 4, 1)
    for part in ("train", "val"):
        shutil.rmtree(folder / "few" / part / "car")
    shutil.copytree(folder / "few", folder / "one")
    for part in ("train", "val"):
        shutil.rmtree(folder / "one" / part / "bird")
    shutil.copy(folder / "one" / "train" / "apple" / "000.jpg", folder / "one" / "val" / "apple" / "copy.jpg")
    (folder / "path.json").write_text("[0, 0, 0, 0, 0, 0]")
    (folder / "winner.pt2").write_bytes(b"a program")
    (folder / "file").write_text("a file where a folder should be")
    (folder / "deep.json").write_bytes(b"[" * 10_000_000)
    return folder


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w')",)


TEST = ("--architecture", ROOT / "architecture_final.json")
CASES = [
    *(("tester", (*TEST, "--checkpoint", f"{{}}/{name}"), message) for name, message in (
        ("cut.pth", "cut.pth: not a whole checkpoint"), ("empty.pth", "empty.pth: not a whole checkpoint"),
        ("text.pth", "text.pth: not a whole checkpoint"), ("bomb.pth",
        "bomb.pth: not a whole checkpoint of plain tensors"),
        ("two.pth", "two.pth: has 2 classes, the data 3"), ("names.pth", "names.pth: its class names are not those"),
        ("newer.pth", "newer.pth: checkpoint version 2"), ("scratch.pth",
        "scratch.pth: a scratch checkpoint, not a supernet one"),
        ("model.pth", "model.pth: entry 'classifier.0.weight' has shape (2, 16), the model needs (3, 16)"),
        ("none.pth", "none.pth: can't be read"), ("split.pth", "split.pth: trained on another split of the images"),
    )),
    ("scratch", ("--eval", "--checkpoint", "{}/supernet.pth"), "a supernet checkpoint, not a scratch one"),
    ("scratch", ("--predict", "{}/none.jpg", "--checkpoint", "{}/scratch.pth"), "none.jpg"),
    ("scratch", ("--predict", "{}/file", "--checkpoint", "{}/scratch.pth"), "file"),
    ("scratch", ("--architecture", "{}/deep.json"), "deep.json: over 1000000 bytes"),
    ("supernet", ("--batch-size", "4", "--micro-batch", "3"), "--micro-batch 3 does not divide the 4 images"),
    ("supernet", ("--batch-size", "4", "--space", "joint", "--compile"), "--compile: operations of several widths"),
    ("supernet", ("--batch-size", "4", "--flops-range", "1M", "2M"), "--flops-range"),
    ("supernet", ("--batch-size", "4", "--flops-range", "20M", "10M"), "--flops-range"),
    ("supernet", ("--batch-size", "4", "--flops-range", "nan", "10M"), "--flops-range 'nan' is neither"),
    ("supernet", ("--crop-scale", "0.9", "0.1"), "--crop-scale 0.9 0.1"),
    ("supernet", ("--val-resize", "31"), "--val-resize 31"),
    ("search", ("--checkpoint", "{}/split.pth", "--flops-limit", "330"),
    "split.pth: trained on another split of the images"),
    ("search", ("--checkpoint", "{}/supernet.pth", "--flops-limit=-3M"), "--flops-limit '-3M' is neither"),
    ("search", ("--checkpoint", "{}/supernet.pth", "--population", "5", "--mutation", "6"),
    "6 children by mutation and 0 by crossover: needs 0 to 5"),
    ("search", ("--checkpoint", "{}/supernet.pth", "--flops-table", "{}/none.pkl"), "none.pkl: No such file"),
    ("search", ("--checkpoint", "{}/supernet.pth", "--flops-table", "{}/bomb.pth"), "bomb.pth"),
    ("search", ("--checkpoint", "{}/supernet.pth", "--device", "cuda", "--engine", "nni"), "--device cuda: no GPU"),
    ("search", ("--checkpoint", "{}/supernet.pth", "--device", "cuda", "--engine", "local"), "--device cuda: no GPU"),
]  # fmt: skip


@pytest.mark.parametrize("script, words, message", CASES, ids=lambda value: str(value)[-40:])
def test_what_does_not_fit_is_one_line(world, tmp_path, capsys, monkeypatch, script, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "nni_auto_gen_search_space.json").write_text(json.dumps(SPACE.nni_search_space()))
    words = [str(w).replace("{}", str(world)) for w in words]
    line = refused(
        script, ["--data-dir", world / "tree", *DATA, "--out", out, "--cache", tmp_path / "cache", *words], capsys
    )
    assert message in line
    assert [p.name for p in files(out)] == ["nni_auto_gen_search_space.json"] and not (world / "executed").exists()


# What goes wrong in a first hour: a command line, a settings file or None, and the line that answers.
NEWCOMER = [
    ("supernet", "super-net: {iterations: 5}", "unknown section 'super-net'; known sections: common, space, supernet"),
    ("supernet", "supernet: {lr: 1}\nsupernet: {lr: 2}", "'supernet' is given twice"),
    ("supernet", "supernet: {lr: 1, lr: 2}", "'lr' is given twice"),
    ("supernet", "common: {learning-rate: 1}", "has no setting 'learning-rate' (section 'common')"),
    (
        "supernet",
        "supernet: {population: 3}",
        "has no setting 'population' (section 'supernet'), but another command has it",
    ),
    ("supernet", "common: {warm-up: 3}", "has no setting 'warm-up' (section 'common'): did you mean 'warmup'?"),
    ("supernet", "common: {jiter: 3}", "has no setting 'jiter' (section 'common'): did you mean 'jitter'?"),
    ("supernet", "common: {lr: [1", "not plain YAML (while parsing a flow sequence in line 1, column 14"),
    ("supernet", "common: [lr, 1]", "'common' is not a section with settings"),
    ("supernet", "lr: 0.1", "unknown section 'lr'"),
    ("supernet", "supernet: {lr: fast}", "--lr: 'fast' is not a number"),
    (
        "supernet",
        "supernet: {batch_size: 4}",
        "has no setting 'batch_size' (section 'supernet'): did you mean 'batch-size'?",
    ),
    ("supernet", "supernet: {sampler: uniform, flops-bins: 3}", "--flops-bins has no effect with --sampler uniform"),
    ("supernet", "supernet: {mirror: 3}", "mirror is 3, not true or false"),
    ("supernet", "common: !!python/object/apply:os.system ['touch executed']", "not plain YAML"),
    ("supernet", "space: {stages: 4}", "stages is 4, not a list of stages"),
    ("supernet --sampler uniform --flops-range 1M 2M", None, "--flops-range has no effect with --sampler uniform"),
    ("supernet --width-warmup 9 --batch-size 4", None, "--width-warmup 9: this search space has no widths"),
    ("supernet --architecture best.json", None, "--architecture has no effect with a --space other than channels"),
    ("supernet --space channels", None, "--space channels: needs --architecture FILE"),
    ("supernet --space tiny", None, "--space tiny: neither blocks, joint, channels, small, varied, mobile nor a"),
    ("supernet --operations none.py", None, "--own none.py: No such file"),
    (
        "supernet --heldout-per-class 4",
        None,
        "4 held-out images per class leave nothing to train on: class 'apple'",
    ),
    ("supernet", None, "batches of 1024 images are larger than the data set, 9 images; lower --batch-size"),
    ("supernet --data-dir {}/none", None, "none/train"),
    ("supernet --data-dir {}/tree/train", None, "tree/train/train"),
    ("supernet --lr 0,1", None, "--lr: '0,1' is not a number"),
    ("supernet --lr nan", None, "--lr: 'nan' is not a number"),
    ("supernet --batch-size 0", None, "--batch-size: '0' is not a whole number from 2"),
    ("supernet --bat 64", None, "unrecognized arguments: --bat"),
    ("supernet --input-size 20 --val-resize 19", None, "--val-resize 19 is smaller"),
    ("supernet --config missing.yml", None, "missing.yml: No such file"),
    ("supernet --epochs 3", None, "unrecognized arguments: --epochs 3"),
    ("supernet --demo --config c.yml", None, "not allowed with argument"),
    ("tester --mode test --space small", None, "--space has no effect with --mode test"),
    ("tester --architecture x.json", None, "no supernet in"),
    ("tester", None, "--architecture: name the architecture file"),
    ("search", None, "no supernet in"),
    ("search --checkpoint {}/supernet.pth --select 60", None, "60 parents of a population of 50: needs 1 to 50"),
    ("search --checkpoint {}/supernet.pth --flops-limit 330", None, "below the lowest cost of any candidate"),
    ("search --checkpoint {}/supernet.pth --engine local --port 80", None, "--port has no effect with --engine local"),
    ("search --checkpoint {}/supernet.pth --input-size 64", None, "--input-size 64"),
    ("search --checkpoint {}/supernet.pth --population 0", None, "--population: '0' is not a whole number from 1"),
    ("search --checkpoint {}/supernet.pth --mutation 0 --mutation-prob 0.2", None, "--mutation-prob has no effect"),
    ("scratch --checkpoint {}/scratch.pth", None, "--checkpoint has no effect with training, which starts from random"),
    ("scratch --eval", None, "no network in"),
    ("scratch --eval --checkpoint {}/winner.pt2", None, "winner.pt2: not a program that scratch.py exported"),
    ("scratch --eval --checkpoint {}/scratch.pth --data-dir {}/few", None, "scratch.pth: has 3 classes, the data 2"),
    ("scratch --architecture {}/text.pth", None, "text.pth: not JSON"),
    ("scratch --architecture missing.json", None, "missing.json: No such file"),
    ("scratch --architecture {}/path.json", None, "architecture has 6 blocks, this search space has 20; name its"),
]


@pytest.mark.parametrize("command, settings, message", NEWCOMER, ids=lambda value: str(value)[:50])
def test_a_newcomers_mistake_is_one_line(world, tmp_path, capsys, monkeypatch, command, settings, message):
    out = tmp_path / "out"
    out.mkdir()
    (out / "nni_auto_gen_search_space.json").write_text(json.dumps(SPACE.nni_search_space()))
    script, *words = command.replace("{}", str(world)).split()
    if settings:
        (tmp_path / "c.yml").write_text(settings)
        words = ["--config", tmp_path / "c.yml", *words]
    data = ("--data-dir", world / "tree", *DATA, "--cache", tmp_path / "cache", "--out", out)
    assert message in refused(script, [*data, *words], capsys)
    assert [p.name for p in files(out)] == ["nni_auto_gen_search_space.json"] and not os.path.exists("executed")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("supernet --val-paths 1 --bn-batches 1 --bn-batch-size 2", "one: a single class, 'apple': every network is"),
        ("scratch --architecture {}/path.json --bn-pass 0", "one: 1 images of val are in train too: accuracies on val"),
    ],
)
def test_a_newcomers_mistake_is_a_warning_where_it_may_be_meant(world, tmp_path, command, message):
    script, *words = command.replace("{}", str(world)).split()
    training = "--space small --iterations 1 --batch-size 2 --device cpu"
    _, stderr = run(f"{script}.py", *words, training, *DATA, "--data-dir", world / "one", "--out", tmp_path)
    assert f"warning: {world}/{message}" in stderr and list(tmp_path.rglob("checkpoint-0000001.pth"))


def test_settings_that_only_another_script_has_may_stand_in_common(tmp_path, monkeypatch):
    """Paths are those beside the file, `~` is the home folder, and --population scales what is not named."""
    monkeypatch.setenv("HOME", "/elsewhere")
    (tmp_path / "s.yml").write_text("common: {bn: average, lr: 0.2, population: 20, data-dir: images, out: ~/o}")
    for script in SCRIPTS:
        args = importlib.import_module(script).parse_args(["--config", str(tmp_path / "s.yml")])
        assert (args.data_dir, args.out) == (str(tmp_path / "images"), "/elsewhere/o")
        assert getattr(args, "lr", 0.2) == 0.2 and getattr(args, "bn", "average") == "average"
    args = importlib.import_module("search").parse_args(["--population", "20"])
    assert (args.select, args.mutation, args.crossover, args.generations) == (4, 10, 10, 20)
    args = importlib.import_module("search").parse_args(["--population", "20", "--select", "9"])
    assert (args.select, args.mutation, args.crossover) == (9, 10, 10)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_file_where_the_output_folder_should_be(world, tmp_path, capsys, monkeypatch, script):
    words = {"tester": ("--mode", "gen"), "search": ("--checkpoint", world / "supernet.pth")}
    words = [
        *words.get(script, ("--batch-size", "4")),
        "--data-dir",
        world / "tree",
        *DATA,
        "--cache",
        tmp_path / "cache",
        "--out",
        world / "file",
    ]
    assert str(world / "file") in refused(script, words, capsys)
    assert (world / "file").read_text() == "a file where a folder should be"


def test_dali_that_is_asked_for_and_missing(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dataloader.importlib.util, "find_spec", lambda name: None)
    words = [
        "--data-dir",
        world / "tree",
        *DATA,
        "--loader",
        "dali",
        "--batch-size",
        "4",
        "--out",
        tmp_path / "out",
        "--cache",
        tmp_path / "cache",
        "--sampler",
        "uniform",
    ]
    line = refused("supernet", words, capsys)
    assert "--loader dali: DALI is not installed; pip install" in line and not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.os, "fsync", full)
    line = refused("tester", ["--mode", "gen", "--out", tmp_path], capsys)
    assert f"{tmp_path / 'nni_auto_gen_search_space.json'}: No space left on device" in line and files(tmp_path) == []


def test_a_checkpoint_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(utils.os, "fdopen", lambda descriptor, mode: open("/dev/full", mode))  # noqa: SIM115
    with pytest.raises(utils.UserError, match=r"c\.pth: can't be written") as error:
        checkpoint.save(tmp_path / "c.pth", model={"a": torch.zeros(100_000)})
    assert "\n" not in str(error.value) and files(tmp_path) == []


def test_a_log_on_a_full_disk_says_nothing(tmp_path, capsys):
    log = utils._LogFile(tmp_path / "run.log")
    log.stream.close()
    log.stream = open("/dev/full", "w")  # noqa: SIM115
    log.emit(utils.logging.LogRecord("spos", 20, "x.py", 1, "text", (), None))
    assert capsys.readouterr().err == ""


def test_killed_loader_process_is_one_line(world, monkeypatch):
    parent = utils.os.getpid()
    decode = dataloader._decode
    monkeypatch.setattr(
        dataloader,
        "_decode",
        lambda *given: decode(*given) if utils.os.getpid() == parent else utils.os.kill(utils.os.getpid(), 9),
    )
    loader = dataloader.Loader(
        scan(world / "tree" / "train"), DataConfig(32, 37), False, backend="torchvision", workers=1
    )
    with pytest.raises(
        utils.UserError, match=r"one of 1 loader processes ended: DataLoader worker .* fewer --workers"
    ) as error:
        list(loader.batches(evaluation_plan(12, 4)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", [*(f"{script}.py" for script in SCRIPTS), "report.py", "dataloader.py"])
def test_python_without_the_packages_is_one_line(command):
    """-S leaves them out, as outside of the environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, "-S", ROOT / command, "--help"]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stdout == ""
    line = rf"{command}: error: \S+ has no module \w+: run make, .*, or pip install -r requirements\.txt\n"
    assert re.fullmatch(line, result.stderr)


def test_a_module_of_the_project_that_is_missing_is_a_traceback():
    program = f"import sys; sys.argv = ['{ROOT / 'scratch.py'}']; import utils; import training.none"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "Traceback" in result.stderr and "training.none" in result.stderr

"""Ctrl-C ends every command in one line with exit code 130, and a search can be extended.

Interrupted training is in test_training.py and test_distributed.py, interrupted searches are in test_local_engine.py
and test_search_nni.py, the NNI tuner of an extended search is in test_tuner.py.
"""

import errno
import importlib
import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run

import dataloader
import search
import utils
from engines.search_files import read_generations, read_state
from reports.search_results import SearchResults
from space.search_space import SearchSpace
from training import loop
from training.checkpoint import checkpoints

CALIBRATION = "--bn-batches 1 --bn-batch-size 4"
SUPERNET = f"--iterations 1 --batch-size 4 --val-paths 1 --space small {CALIBRATION}"
SEARCH = f"--engine local --population 4 --select 2 --mutation 1 --crossover 1 {CALIBRATION}"
SCRATCH = "--iterations 1 --batch-size 4 --space small --architecture {}/path.json --bn-pass"
LINE = "interrupted; what it has written is kept, and the same command does the rest"


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    """A folder with a supernet, its search space, and a retrained network."""
    out = tmp_path_factory.mktemp("out")
    run("supernet.py", *data, SUPERNET, "--out", out)
    run("tester.py", "--mode gen", "--out", out)
    (out / "path.json").write_text("[0, 1, 2, 3, 0, 1]")
    run("scratch.py", *data, f"{SCRATCH} 0".format(out), "--out", out)
    return out


@pytest.mark.parametrize(
    ("script", "words", "interrupted"),
    [
        ("supernet.py", (SUPERNET, "--resume none"), "images.image_check.fingerprint"),
        ("scratch.py", (f"{SCRATCH} 1", "--resume none"), "scratch.recalibrate_bn"),
        ("scratch.py", ("--eval",), "scratch.accuracy"),
        pytest.param("scratch.py", ("--export", "{}/network.pt2"), "training.export.compare", marks=pytest.mark.slow),
        ("scratch.py", ("--predict", "{}/photo.jpg"), "training.program.inspect"),
        (
            "tester.py",
            ("--mode test", CALIBRATION, "--architecture {}/path.json"),
            "training.evaluation.update_bn",
        ),
        ("search.py", (SEARCH,), "search.prepare"),
        ("search.py", (SEARCH,), "engines.local_engine.chunks"),
        ("dataloader.py", ("--check", "{}"), "images.image_check.inspect"),
    ],
)
def test_ctrl_c_ends_a_command_in_one_line(data, out, tree, tmp_path, monkeypatch, script, words, interrupted):
    """The signal comes when the function is called; in image_check.inspect, on a thread that reads images."""
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    module, function = interrupted.rsplit(".", 1)
    original, calls = getattr(importlib.import_module(module), function), []

    def interrupt(*args, **kwargs):
        if not calls:
            calls.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(f"{module}.{function}", interrupt)
    words = [str(word).replace("{}", str(tree if script == "dataloader.py" else tmp_path)) for word in words]
    common = () if script == "dataloader.py" else (*data, "--out", tmp_path)
    stdout, stderr = run(script, *common, *words, code=130)
    lines = [line for line in re.split("[\n\r]", stderr) if line and not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert stdout == "" and calls
    if interrupted == "engines.local_engine.chunks":
        assert not lines and "stopped by SIGINT: 0 candidates are kept, at most 4 that were being" in stderr
    else:
        assert [line for line in lines if not re.search(r"\d+%|\dit/s|step/s", line)] == [f"{script}: {LINE}"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_training_that_waits_for_a_batch_ends_with_its_last_step(data, tmp_path, monkeypatch, number):
    """The signal comes while a worker makes the third batch, with which it then continues."""
    make, add, made, trained = dataloader._TorchvisionImages._make, loop._Meter.add, [], tmp_path / "trained"

    def stuck(images, samples):
        made.append(samples)  # by this worker
        while len(made) == 3:
            if trained.exists():
                os.kill(os.getppid(), number)
                time.sleep(60)
                break
            time.sleep(0.01)
        return make(images, samples)

    def added(meter, *values):
        add(meter, *values)
        if meter.number == 2:
            trained.touch()

    monkeypatch.setattr(dataloader._TorchvisionImages, "_make", stuck)
    monkeypatch.setattr(loop._Meter, "add", added)
    words = (SUPERNET, "--iterations 9 --workers 1", "--out", tmp_path)
    _, stderr = run("supernet.py", *data, *words, code=128 + number)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints" / "supernet")] == ["checkpoint-0000002.pth"]
    assert "checkpoint-0000002.pth; the same command resumes from there" in stderr


@pytest.mark.parametrize("command", ["supernet.py", "report.py", "bench/demo.py"])
def test_ctrl_c_is_one_line_while_modules_are_imported(command):
    """A shell reports 130 for a process that SIGINT ended."""
    program = "import sys; sys.argv = sys.argv[1:]; import utils; raise KeyboardInterrupt"
    words = [sys.executable, "-c", program, str(ROOT / command)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == -signal.SIGINT
    assert result.stderr == f"{os.path.basename(command)}: {LINE}\n"


@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_that_ends_early_ends_a_command_in_silence(flush):
    """As `python scratch.py --predict *.jpg | head -1` does; the exit code is that of other tools under pipefail."""
    program = f"import utils; utils.run_script(lambda _: [print('line', flush={flush}) for _ in range(3)], list)"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as stdout:
        words = [sys.executable, "-c", program]
        result = subprocess.run(words, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_a_pipe_to_another_process_that_breaks_is_an_error():
    program = """import utils
def main(_):
    print("line")
    raise BrokenPipeError(32, "Broken pipe")
utils.run_script(main, list)"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stdout == "line\n" and "error: a file: Broken pipe" in result.stderr


def test_an_extended_search_finds_what_a_longer_one_finds(data, out, tmp_path, forked, monkeypatch):
    """Finished with one generation, and extended by two."""
    reports = []
    monkeypatch.setattr(search, "write_report", reports.append)
    for name, several in (
        ("extended", ("--generations 1", "--generations 3 --resume")),
        ("long", ("--generations 3",)),
    ):
        shutil.copytree(out, tmp_path / name)
        for generations in several:
            stdout, _ = run("search.py", *data, SEARCH, generations, "--out", tmp_path / name)
        assert stdout.startswith("12 candidates evaluated")
    results = SearchResults(tmp_path / "extended")  # what the report shows
    assert len(reports) == 3 and len(results.generations) == 3 and results.state["done"]
    found = [
        [[(r["architecture"], r["acc1"]) for r in generation] for generation in read_generations(tmp_path / name)]
        for name in ("extended", "long")
    ]
    assert found[0] == found[1] and len(found[0]) == 3
    _, stderr = run("search.py", *data, SEARCH, "--generations 2 --resume", "--out", tmp_path / "long", code=2)
    assert "has other settings: --generations 2 (was 3)" in stderr


def test_a_resumed_search_has_its_settings_without_flags(data, out, tmp_path, forked, monkeypatch):
    """Those that decide may be repeated or extended, and not changed; others may. In searches of before, 100% was less
    than the highest cost: they keep that limit."""
    monkeypatch.setattr(SearchSpace, "grid_quantile", lambda space, name, share: space.cost_range(name)[1] * 19 // 20)
    monkeypatch.setattr(search, "write_report", lambda out: out)
    (tmp_path / "own.yml").write_text("search: {mutation-prob: 0.25}")
    shutil.copytree(out / "checkpoints" / "supernet", tmp_path / "supernet")
    weights = next((tmp_path / "supernet").glob("*.pth"))
    other = tmp_path / "other"
    run("tester.py", "--mode gen", "--checkpoint", weights, "--out", other)
    typed = (*data, SEARCH, "--limit params=100%", "--seed 3 --rank-by loss --strategy evolution", "--config",
             tmp_path / "own.yml", "--checkpoint", weights, "--out", other)  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(SearchSpace, "quantile", SearchSpace.grid_quantile)
        first, _ = run("search.py", *typed, "--generations 1")
    settings = read_state(other)["settings"]
    again, _ = run("search.py", "--resume", "--out", other)
    assert again == first and f"--config {tmp_path / 'own.yml'}" in again and read_state(other)["settings"] == settings
    run("search.py", "--resume --concurrency 1 --workers 1 --seed 3 --population 4 --limit params=100%", "--out", other)
    run("search.py", "--resume --generations 2", "--out", other)
    assert read_state(other)["settings"] == settings | {"generations": 2} and read_state(other)["generation"] == 2
    for words, message in (
        ("--seed 4", "--seed 4 (was 3)"),
        ("--mutation-prob 0.5", "--mutation-prob 0.5 (was 0.25)"),
        ("--strategy random", "--strategy random contradicts the search in"),
        ("--limit flops=90%", "--limit flops up to"),
        ("--objectives acc1,flops", "--objectives"),
        ("--generations 1", "--generations 1 (was 2)"),
        ("--heldout-per-class 4", "--heldout-per-class 4 contradicts"),
    ):
        _, stderr = run("search.py", "--resume", words, "--out", other, code=2)
        assert message in stderr and len(stderr.splitlines()) == 1, stderr
    content = torch.load(weights)
    torch.save(content | {"step": 2}, weights)
    _, stderr = run("search.py", "--resume", "--out", other, code=2)
    assert "other settings: --checkpoint other weights than then" in stderr and len(stderr.splitlines()) == 1
    file = other / "checkpoints" / "search" / "config.yml"
    file.write_text(re.sub("experiment: .*", "experiment: /gone/config_search.yml", file.read_text()))
    _, stderr = run("search.py", "--resume", "--out", other, code=2)  # the project's folder has moved
    assert "other weights than then" in stderr
    _, stderr = run("search.py", "--resume --experiment typed.yml --out", other, code=2)
    assert "typed.yml: No such file" in stderr
    missing = tmp_path / "mistyped"
    _, stderr = run("search.py", "--resume", "--out", missing, code=2)
    assert f"--resume: there is no search in {missing}" in stderr and not missing.exists()
    assert read_state(other)["settings"] == settings | {"generations": 2}


# --- terminals and memory ------------------------------------------------------------------------------------


def test_without_standard_error_and_after_its_terminal_is_gone():
    """Nothing that is written to it ends a command; no file gets its number."""
    code = "import utils, os; print(os.fstat(2).st_rdev == os.stat(os.devnull).st_rdev)"
    script = f"import sys; sys.argv = [{str(ROOT / 'supernet.py')!r}]; sys.path.insert(0, {str(ROOT)!r}); {code}"
    closed = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, script]
    assert subprocess.run(closed, capture_output=True, text=True, check=True).stdout == "True\n"

    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        def flush(self):
            self.write("")

    screen = utils.Screen.of(Gone())
    assert screen.write("text") == 4 and utils.Screen.of(screen) is screen and not screen.isatty()
    screen.flush()
    assert utils.Screen.of(None).write("text") == 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_glibc_keeps_memory_unless_the_user_says_otherwise():
    code = "import utils; print(utils.keep_memory())"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "SPOS_"))}
    for more, kept in (
        ({}, True), ({"SPOS_KEEP_MEMORY": "0"}, False), ({"MALLOC_TOP_PAD_": "0"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.top_pad=0"}, False),
    ):  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=plain | more, capture_output=True, text=True)
        assert done.stdout == f"{kept}\n", done.stderr


@pytest.mark.slow
def test_a_lost_terminal_saves_and_the_run_resumes(tmp_path):
    """The other end of a pty closes: SIGHUP, and writing fails from then on."""
    words = ["--demo", "--iterations", "4000", "--val-every", "5000", "--save-every", "5000", "--threads", "1"]
    command = [sys.executable, str(ROOT / "supernet.py"), *words, "--out", str(tmp_path)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, command)
    log = tmp_path / "checkpoints" / "supernet" / "run.log"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (log.exists() and "step 50/" in log.read_text()):
        if select.select([terminal], [], [], 0.2)[0]:
            os.read(terminal, 65536)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert "interrupted: saved" in log.read_text() and list(log.parent.glob("checkpoint-*.pth"))

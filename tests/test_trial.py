"""Each process gets a device of its own, waits while there is none, and frees it however it ends. No GPU is needed."""

import json
import multiprocessing
import os
import subprocess
import sys
import types

import pytest

import search
import tester
import utils
from engines import local_engine, trial
from training import distributed
from utils import HERE, UserError

TAKE = """
import pathlib, sys
from engines import trial

(name,), files = trial.take_devices(sys.argv[2:], 1, pathlib.Path(sys.argv[1]))
print(name, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def taker(tmp_path):
    """Starts a process that takes one of the devices, says which, and keeps it until it is ended."""
    processes = []

    def start(*names):
        words = [sys.executable, "-c", TAKE, tmp_path, *names]
        processes.append(subprocess.Popen(words, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()


def test_each_process_has_its_own_device_and_a_killed_one_frees_it(taker):
    names = ("0", "GPU-5a1/b", "3")
    takers = [taker(*names) for _ in range(3)]
    taken = {process.stdout.readline().strip(): process for process in takers}
    assert set(taken) == set(names)
    fourth = taker(*names)
    with pytest.raises(subprocess.TimeoutExpired):  # waits
        fourth.wait(1)
    taken["GPU-5a1/b"].kill()
    assert fourth.stdout.readline().strip() == "GPU-5a1/b"
    taken["3"].stdin.close()  # ends by itself
    assert taker(*names).stdout.readline().strip() == "3"


@pytest.mark.parametrize(
    ("visible", "n", "names"),
    [
        (None, 2, ["0", "1"]),
        ("2, 5", 2, ["2", "5"]),
        ("GPU-1,GPU-2", 2, ["GPU-1", "GPU-2"]),
        ("1,-1,0", 1, ["1"]),
        ("", 0, []),
        (None, 0, []),
    ],
)
def test_devices_are_those_that_are_visible(monkeypatch, visible, n, names):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("training.distributed.gpu_count", lambda: n)
    assert trial.gpu_names() == names


def test_a_process_sees_the_device_it_took_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr("training.distributed.gpu_count", lambda: 2)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(trial, "held", [])
    trial.take_gpu("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6" and not trial.held
    trial.take_gpu("auto")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"
    trial.held.pop().close()


def test_locks_are_private(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = trial.lock_folder()
    assert folder == trial.lock_folder() and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    with pytest.raises(UserError, match="not a folder that only you can open"):
        trial.lock_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        trial.lock_folder()


@pytest.fixture
def three_gpus(monkeypatch):
    """NVML counts three GPUs, and whoever asks CUDA itself fails."""

    def initialises():
        raise AssertionError("CUDA is initialised")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda._is_compiled", lambda: True)
    monkeypatch.setattr("torch.cuda._device_count_nvml", lambda: 3)
    monkeypatch.setattr("torch._C._cuda_getDeviceCount", initialises, raising=False)
    monkeypatch.setattr("torch.cuda.init", initialises)


def test_gpus_are_counted_and_told_apart_without_cuda(three_gpus):
    assert distributed.gpu_count() == 3 and trial.gpu_names() == ["0", "1", "2"]


@pytest.mark.parametrize("loads, counted", [(False, 0), (True, 2)])
def test_without_nvml_another_process_counts(monkeypatch, loads, counted):
    def load(name):
        if not loads:
            raise OSError(name)

    answer = subprocess.CompletedProcess([], 0, stdout="2\n")
    monkeypatch.setattr("torch.cuda._device_count_nvml", lambda: -1)
    monkeypatch.setattr("ctypes.CDLL", load)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: answer)
    assert distributed.gpu_count() == counted


@pytest.mark.parametrize(
    ("words", "concurrency"),
    [([], 3), (["--engine", "local"], 3), (["--device", "cpu"], 1), (["--concurrency", "2"], 2)],
)
def test_by_default_a_search_runs_a_trial_a_gpu(three_gpus, words, concurrency):
    args = search.parse_args(words)
    assert args.concurrency == concurrency
    with local_engine.Workers({"device": args.device, "out": args.out}, args.concurrency) as workers:
        assert workers.n == concurrency
    with local_engine.Workers({"device": args.device, "out": args.out}, 9) as workers:
        assert workers.n == (9 if args.device == "cpu" else 3)


def test_trials_share_the_cores(three_gpus, monkeypatch):
    monkeypatch.setattr(search, "cores", lambda: 24)
    given = search.trial_settings(search.parse_args(["--threads", "5", "--workers", "0"]), "out", "net.pth")
    settings = search.trial_settings(search.parse_args([]), "out", "net.pth")
    assert (settings["threads"], settings["workers"], given["threads"], given["workers"]) == (8, 8, 5, 0)
    monkeypatch.setattr(search, "cores", lambda: 7)
    settings = search.trial_settings(search.parse_args([]), "out", "net.pth")
    assert (settings["threads"], settings["workers"]) == (2, 2)


class FakeNNI(types.ModuleType):
    """Plays the module nni in a trial; `messages` are those that it sent."""

    def __init__(self, *received):
        super().__init__("nni")
        self.received, self.messages = list(received), []

    def get_next_parameter(self):
        return self.received.pop(0)

    def get_sequence_id(self):
        return 3

    def get_trial_id(self):
        return "abc"

    def report_intermediate_result(self, message):
        self.messages.append(message)

    def report_final_result(self, message):
        self.messages.append(("final", message))


def test_a_trial_reports_each_result_as_it_comes_and_lives_meanwhile(monkeypatch):
    nni = FakeNNI(trial.parameters([(1,)], 3), trial.parameters([(2,), (0,)], 4))
    monkeypatch.setitem(sys.modules, "nni", nni)
    monkeypatch.setattr(trial, "ALIVE_S", 0)
    candidates = trial.receive_candidates()
    assert candidates == [[2], [0]]  # the first was meant for another trial

    def results():
        for c in candidates:
            utils.heartbeat()
            yield {"architecture": c, "acc1": 50.0}
            assert nni.messages[-1]["result"]["architecture"] == c

    with trial.heartbeats():
        trial.report(results())
    utils.heartbeat()  # nobody hears it
    *messages, (_, final) = nni.messages
    assert len(messages) == 4 and trial.read_intermediate(messages) == final["results"]
    assert [r["architecture"] for r in final["results"]] == candidates


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "supernet.pth"), "supernet.pth: No such file or directory"),
        (UserError("a.jpg: an empty file"), "a.jpg: an empty file"),
        (RuntimeError("out of memory"), None),  # for which a candidate may be to blame
    ],
)
def test_a_trial_says_why_it_can_not_evaluate(monkeypatch, error, line):
    nni = FakeNNI()
    monkeypatch.setitem(sys.modules, "nni", nni)
    with pytest.raises(type(error)), trial.errors_reported([[2]]):
        raise error
    assert [m["error"] for _, m in nni.messages] == [line] * bool(line)
    assert [m["candidates"] for _, m in nni.messages] == [[[2]]] * bool(line)


def test_both_engines_evaluate_as_the_search_says(monkeypatch):
    """BN statistics and precision reach the evaluation, with the supernet and the batches that were opened."""
    found = []
    args = search.parse_args(["--bn", "average", "--eval-amp", "bf16", "--device", "cpu", "--out", "nowhere"])
    settings = search.trial_settings(args, args.out, "net.pth")

    def evaluated(*how, **more):
        found.append((how, more))
        return []

    monkeypatch.setitem(sys.modules, "nni", FakeNNI(trial.parameters([(1,)], 4)))
    monkeypatch.setattr("utils.end_with_parent", lambda: None)
    monkeypatch.setattr(trial, "report", list)
    for name in ("tester.open_evaluation", "training.evaluation.open_evaluation"):
        monkeypatch.setattr(name, lambda *_: ("net", "calibration", "validation"))
    monkeypatch.setattr("tester.evaluate_in_lists", evaluated)
    monkeypatch.setattr("training.evaluation.evaluate", evaluated)
    tester.run_trial(types.SimpleNamespace(**settings))
    local_engine._evaluate(json.dumps(settings), [[1]])
    local_engine._opened.cache_clear()
    assert found == [(("net", [[1]], "calibration", "validation", "average"), {"amp": "bf16"})] * 2


def test_signs_of_life_are_passed_on_now_and_then(monkeypatch):
    clock, heard = [100.0], []
    monkeypatch.setattr(utils.time, "monotonic", lambda: clock[0])
    with utils.heartbeats_to(lambda: heard.append(clock[0]), every_s=5):
        for clock[0] in (100.0, 101.0, 104.9, 105.0, 109.0, 117.0):
            utils.heartbeat()
    assert heard == [100.0, 105.0, 117.0]


def test_who_waits_for_a_device_lives(tmp_path):
    signs = []
    holder = utils.try_lock(tmp_path / "0.lock")
    with utils.heartbeats_to(lambda: signs.append(holder.close()) if len(signs) == 2 else signs.append(None)):
        _, (file,) = trial.take_devices(["0"], 1, tmp_path)
    assert len(signs) == 3
    file.close()


def visible(settings, candidates):
    return [os.environ["CUDA_VISIBLE_DEVICES"]]


def test_a_search_takes_the_gpus_that_are_free_and_waits_only_where_none_is(tmp_path, monkeypatch):
    """Else two searches could each hold some, and wait for those of the other."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(local_engine, "gpu_names", lambda: ["4", "5", "6"])
    monkeypatch.setattr(local_engine, "SPAWN", multiprocessing.get_context("fork"))
    monkeypatch.setattr(local_engine, "_evaluate", visible)
    other = utils.try_lock(trial.lock_folder() / "5.lock")
    with local_engine.Workers({"device": "auto", "out": str(tmp_path)}, 3) as workers:
        found = {results[0] for _, results, error in workers.evaluate([[i] for i in range(20)]) if not error}
        assert workers.n == 3 and found <= {"4", "6"} and found
        assert not utils.try_lock(trial.lock_folder() / "4.lock")
    for name in "46":
        utils.try_lock(trial.lock_folder() / f"{name}.lock").close()
    other.close()

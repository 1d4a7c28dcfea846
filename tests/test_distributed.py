"""Training on two processes, and runs that are killed: as on one process, and as if nothing had been."""

import datetime
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
import torch
from conftest import ROOT, run, started
from test_training import SPACE, Images, settings
from torch import nn
from torch.distributed import HashStore

import training.run
import utils
from images.dataset import training_plan
from network import ShuffleNetV2, ShuffleNetV2OneShot
from settings.subjects import deciding
from space import weight_files
from space.sampler import PathSampler
from training import checkpoint, distributed
from training.distributed import per_rank_batch_size
from training.evaluation import accuracy, evaluate, recalibrate_bn
from training.loop import train
from training.run import TrainingRun
from training.step import dropout_seed
from utils import UserError

TORCHRUN = "torch.distributed.run --nproc-per-node 2 --master-port 0 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0"
TRAINING = "--workers 1 --batch-size 8 --warmup 2 --save-every 2"
SMALL = "--space small --bn-batches 2 --bn-batch-size 9"
SUPERNET = ("supernet.py", TRAINING, SMALL, "--iterations 8 --val-every 4 --val-paths 1")
SCRATCH = ("scratch.py", TRAINING, "--iterations 6 --val-every 6 --bn-pass 2")
ENDLESS = ("supernet.py", TRAINING, SMALL, "--iterations 100000 --save-every 100000")


def _scripted(words, code):
    os.setsid()
    run(*words, code=code)


class Forked:
    """A script in a clean process and a session of its own; what it prints is lost."""

    def __init__(self, *words, code=0):
        self.process = started(_scripted, words, code)
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("script", timeout)

    def communicate(self):
        return self.wait(60), ""


def start(processes, *words):
    """A script in a clean process, or on several processes by torchrun."""
    if processes == 1:
        return Forked(*words)
    script, *words = [part for word in words for part in str(word).split()]
    words = ["--cache", os.environ["TEST_CACHE"], *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *TORCHRUN.split(), ROOT / script, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def finish(process, code=0):
    try:
        process.wait(200)
    finally:
        if process.poll() is None:
            kill(process)
    stdout, stderr = process.communicate()
    assert process.returncode == code, stderr
    return stdout, stderr


def descendants(pid):
    """The process ids of a process and of all below it."""
    found = [pid]
    for parent in found:
        for task in pathlib.Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def kill(process):
    """SIGKILL to a process and to all below it."""
    os.kill(process.pid, signal.SIGSTOP)  # torchrun would end the others more gently
    for pid in reversed(descendants(process.pid)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


# --- ranks ---------------------------------------------------------------------------------------------------


def _rank(main, arguments, environment, log):
    """Runs on a rank; its standard error goes to a file."""
    os.environ.update(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w")
    rank = int(environment["RANK"])
    distributed.run(lambda _: [distributed.join("cpu"), main(rank, *arguments)], lambda: None)


def outcomes(main, *arguments, n=2):
    """(exit code, standard error) of `main(rank, *arguments)` on `n` ranks; this process has the store, as torchrun."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    with tempfile.TemporaryDirectory() as folder:
        logs = [pathlib.Path(folder, str(rank)) for rank in range(n)]
        environments = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]
        ranks = [started(_rank, main, arguments, *of_rank) for of_rank in zip(environments, logs)]
        for process in ranks:
            process.join()
        return [(process.exitcode, log.read_text()) for process, log in zip(ranks, logs)]


CANDIDATES = [(0, 1, 2, 3), (0, 1, 2, 0)]


class InDouble(Images):
    """A loader whose images are the same in whatever batch they come."""

    def batches(self, plan):
        shape = (len(self.images), 3, self.px, self.px)
        images = torch.rand(shape, dtype=torch.double, generator=torch.Generator().manual_seed(0)) * 255
        return ((images[batch[:, 1]], torch.from_numpy(batch[:, 1] % 3)) for batch in plan)


def random_batches(n, size):
    generator = torch.Generator().manual_seed(1)
    sizes = [size - i % 2 for i in range(n)]
    return [
        (torch.rand(s, 3, 16, 16, generator=generator) * 255, torch.randint(3, (s,), generator=generator))
        for s in sizes
    ]


def measured(rank=0, world=1):
    """Accuracies of candidates and of a network, and that network's BN statistics as the average over 5 batches."""
    torch.manual_seed(0)
    supernet, network = ShuffleNetV2OneShot(space=SPACE), ShuffleNetV2(CANDIDATES[0], space=SPACE)
    calibration, validation = random_batches(5, 16), random_batches(3, 20)
    results = evaluate(supernet, CANDIDATES, calibration, validation[rank::world])
    recalibrate_bn(network, network, calibration[rank::world], "average", sharded=world > 1)
    buffers = {name: b.clone() for name, b in network.named_buffers() if "running" in name}
    return [r | {"seconds": 0} for r in results], accuracy(network, validation[rank::world]), buffers


def trained(folder, dtype, steps, **changes):
    torch.manual_seed(0)
    model = ShuffleNetV2OneShot(space=SPACE).to(dtype)
    sampler = PathSampler(SPACE, 0)
    stored = {"space": SPACE.to_dict(), "data": {}, "split": None, "classes": ["a", "b", "c"]}
    folder.mkdir(parents=True, exist_ok=True)
    images, run = InDouble() if dtype == torch.float64 else Images(), TrainingRun(folder, "supernet", stored)
    metrics = train(model, images, settings(iterations=steps, **changes), sampler.candidate, lambda step: {}, run)
    return {
        "weights": dict(model.named_parameters()),
        "gradients": {n: p.grad for n, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
        "loss": metrics["train/loss"],
    }


def _two(rank, out):
    result = {
        str(dtype): trained(out / str(dtype), dtype, steps) for dtype, steps in ((torch.float32, 1), (torch.float64, 3))
    }
    result["micro-batches"] = trained(out / "micro-batches", torch.float64, 3, micro_batch=2)
    torch.save(result | {"measured": measured(rank, distributed.world_size())}, out / f"{rank}.pth")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder, and what each of two ranks has trained there and evaluated."""
    out = tmp_path_factory.mktemp("two")
    found = outcomes(_two, out)
    assert [code for code, _ in found] == [0, 0], found
    return out, [torch.load(out / f"{rank}.pth") for rank in (0, 1)]


@pytest.mark.parametrize("dtype, steps, tolerance", [(torch.float32, 1, 1e-6), (torch.float64, 3, 1e-9)])
def test_gradients_are_the_mean_of_the_shards(two, dtype, steps, tolerance):
    """Against the gradients of the shards, computed one by one with their own dropout and BN, and SGD by torch."""
    torch.manual_seed(0)
    model = ShuffleNetV2OneShot(space=SPACE).to(dtype, memory_format=torch.channels_last)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 4e-5}]
    sampler, optimizer = PathSampler(SPACE, 0), torch.optim.SGD(weights, lr=0.5, momentum=0.9, foreach=False)
    loader = InDouble() if dtype == torch.float64 else Images()
    shards = [list(loader.batches(training_plan(64, 4, 0, 0, steps, rank, 2))) for rank in (0, 1)]
    for step in range(1, steps + 1):
        gradients = []
        for rank, batches in enumerate(shards):
            model.zero_grad()
            torch.manual_seed(dropout_seed(0, step, rank))
            images, labels = batches[step - 1]
            nn.functional.cross_entropy(model(images, sampler.candidate(step)), labels, label_smoothing=0.1).backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        for name, p in model.named_parameters():
            p.grad = None if gradients[0][name] is None else (gradients[0][name] + gradients[1][name]) / 2
        optimizer.param_groups[0]["lr"] = 0.5 * (1 - step / steps)
        optimizer.step()
    _, processes = two
    for name, p in model.named_parameters():
        for found in (process[str(dtype)] for process in processes):
            gradient = found["gradients"][name]
            if p.grad is None:
                assert gradient is None
            else:
                assert (gradient - p.grad).abs().max() <= tolerance * p.grad.abs().max()
                assert not torch.equal(gradient, gradients[0][name])  # one shard's alone
            assert (found["weights"][name] - p).abs().max() <= tolerance * p.abs().max()
            if name not in {n for n, q in model.named_parameters() if q in optimizer.state}:
                assert torch.equal(found["weights"][name], start[name])


def test_processes_and_steps_draw_other_dropout():
    draws = []
    for seed, step, rank in itertools.product((0, 1), (1, 2), (0, 1)):
        torch.manual_seed(dropout_seed(seed, step, rank))
        draws.append(torch.rand(1).item())
    assert len(set(draws)) == 8


def test_both_processes_end_with_the_same_weights_and_losses(two):
    _, (a, b) = two
    for dtype in ("torch.float32", "torch.float64"):
        assert all(torch.equal(p, b[dtype]["weights"][name]) for name, p in a[dtype]["weights"].items())
        assert a[dtype]["loss"] == b[dtype]["loss"]


def test_what_is_not_sampled_has_no_momentum_on_two_processes(two):
    out, _ = two
    content = weight_files.load_file(checkpoint.newest(out / "torch.float64"))
    sampler = PathSampler(SPACE, 0)
    paths = [sampler.candidate(step) for step in (1, 2, 3)]
    names = [name for name, p in ShuffleNetV2OneShot(space=SPACE).named_parameters() if p.dim() > 1]
    assert len(names) == len(content["optimizer"]["param_groups"][0]["params"])
    for i, name in enumerate(names):
        _, block, operation, *_ = [*name.split("."), 0, 0]
        sampled = not name.startswith("features") or any(path[int(block)] == int(operation) for path in paths)
        assert (i in content["optimizer"]["state"]) == sampled, name


def test_evaluation_counts_every_image_once_and_calibrates_on_all(two):
    results, accuracy, buffers = measured()
    assert accuracy[2] == results[0]["n_images"] == 20 + 19 + 20
    for process in two[1]:
        found, found_accuracy, found_buffers = process["measured"]
        assert found == results and found_accuracy[2] == accuracy[2]
        assert found_accuracy == pytest.approx(accuracy, abs=2)  # statistics differ in the last bits
        for name, buffer in buffers.items():
            torch.testing.assert_close(found_buffers[name], buffer, rtol=1e-5, atol=1e-6)


@pytest.fixture
def variables(monkeypatch):
    """Sets torchrun's variables, as a scheduler may have done; runs a command, which returns what it was given."""

    def begin(code=0, **values):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(distributed, "_store", None)
        done = []
        try:
            distributed.run(done.append, lambda: "parsed")
        except SystemExit as end:
            assert end.code == code == 2 and not done
        return done

    return begin


def test_variables_of_torchrun_that_do_not_suffice(variables, capsys, caplog):
    """Left over, or set by a scheduler: nothing trains alone in each of many pods."""
    assert variables() == variables(RANK=3) == ["parsed"] and not caplog.messages
    assert variables(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0) == ["parsed"]
    (warning,) = caplog.messages
    assert "RANK 0 and WORLD_SIZE 1 are set, but not MASTER_ADDR, MASTER_PORT: this process trains alone" in warning
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for values, missing in (({"RANK": 1} | address, "LOCAL_RANK"), ({"RANK": 0, "LOCAL_RANK": 0}, "MASTER_ADDR")):
        variables(**values, WORLD_SIZE=4, code=2)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"but not {missing}" in error
        assert "by torchrun" in error and "unset RANK WORLD_SIZE" in error
    variables(RANK="one", WORLD_SIZE=4, code=2)
    assert "RANK is 'one', not a number" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_come_is_waited_for_aloud(variables, capsys, caplog, monkeypatch, rank):
    monkeypatch.setattr(distributed, "NOTICE_S", 0.05)
    monkeypatch.setattr(distributed, "TIMEOUT", datetime.timedelta(seconds=0.2))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables(RANK=rank, WORLD_SIZE=3, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, code=2)
    assert caplog.messages == [f"waiting for other processes: 1 of 3 have come to 127.0.0.1:{port}"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"1 of 3 processes came to 127.0.0.1:{port} in 0 minutes" in error


def test_processes_that_torchrun_restarts_find_a_store_without_what_was_left(monkeypatch):
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for count in "01":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert distributed._store_of_all(0, 1, server.host, server.port).add("came", 0) == 1


def test_a_batch_that_can_not_be_shared_is_refused(monkeypatch):
    monkeypatch.setattr("training.distributed.world_size", lambda: 8)
    assert per_rank_batch_size(1024) == 128 and per_rank_batch_size(16) == 2
    for batch_size in (8, 1020):
        with pytest.raises(UserError, match=rf"batches of {batch_size} images: .*multiple of 8"):
            per_rank_batch_size(batch_size)


def test_micro_batches_that_do_not_fit_are_refused(monkeypatch):
    assert per_rank_batch_size(1024, 128) == 1024
    with pytest.raises(UserError, match="--micro-batch 100 does not divide the 1024 images that a rank has"):
        per_rank_batch_size(1024, 100)
    monkeypatch.setattr("training.distributed.world_size", lambda: 8)
    assert per_rank_batch_size(1024, 64) == 128
    with pytest.raises(UserError, match="--micro-batch 256 does not divide the 128 images that a rank has"):
        per_rank_batch_size(1024, 256)


@pytest.mark.slow
def test_what_is_wrong_for_all_processes_is_said_once(tmp_path, data):
    _, stderr = finish(start(2, *SUPERNET, *data, "--batch-size", 15, "--out", tmp_path), code=1)
    (line,) = [line for line in stderr.splitlines() if line.startswith("supernet.py: error:")]
    assert "batches of 15 images: " in line and "multiple of 2" in line


def assert_near(found, expected):
    """Two results of `trained` in float64, which may differ in their last digits."""
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-9)
    for kind in ("weights", "gradients", "buffers"):
        assert found[kind].keys() == expected[kind].keys()
        for name, tensor in expected[kind].items():
            other = found[kind][name]
            if tensor is None:
                assert other is None, name
                continue
            scale = tensor.abs().max()
            if name.endswith("running_mean"):  # BN has just centred these: the mean is 0 but for rounding
                scale = max(scale, expected[kind][name.replace("mean", "var")].max().sqrt())
            assert (other - tensor).abs().max() <= 1e-9 * scale, name


def _trained_by_rank(rank, folder, how):
    result = trained(folder / "run", torch.float64, 3, **how)
    if rank == 0:
        torch.save(result, folder / "result.pth")


def on_processes(n, folder):
    """What process 0 of `n` has after three steps of `2 * n` images each."""
    found = outcomes(_trained_by_rank, folder, {"batch_size": 2 * n}, n=n)
    assert [code for code, _ in found] == [0] * n, found
    return torch.load(folder / "result.pth")


def test_micro_batches_are_processes(two, tmp_path):
    """Four of two images on one process, and two on each of two, train as four processes of two images: the same
    dropout, the mean of their gradients, and the BN statistics of the first."""
    expected = on_processes(4, tmp_path)
    assert_near(trained(tmp_path / "one", torch.float64, 3, micro_batch=2), expected)
    _, processes = two
    assert_near(processes[0]["micro-batches"], expected)
    assert processes[1]["micro-batches"]["loss"] == processes[0]["micro-batches"]["loss"]
    with pytest.raises(AssertionError):
        assert_near(trained(tmp_path / "whole", torch.float64, 3), expected)


@pytest.mark.slow
def test_micro_batches_are_eight_processes(tmp_path):
    expected = on_processes(8, tmp_path)
    assert_near(trained(tmp_path / "one", torch.float64, 3, batch_size=16, micro_batch=2), expected)


def _started_with(rank, folder, change):
    own = {"lr": 0.5, "classes": ["a", "b", "c"], "split": {"hash": "0"}, "images": "0", "code": "0"}
    own |= {"workers": 1, "keep": 3} | (change if rank else {})
    training.run.code_version = lambda: own["code"]
    decide = deciding({name: own[name] for name in ("lr", "workers", "keep")})
    contents = {"space": SPACE.to_dict(), "split": own["split"], "classes": own["classes"], "images": own["images"]}
    TrainingRun(folder, "supernet", contents, decide).start(torch.device("cpu"), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.4}, "has --lr 0.4, process 0 0.5;"),
        ({"classes": ["a", "cow", "c"]}, "has classes cow, process 0 b;"),
        ({"split": {"hash": "1"}}, "has split {'hash': '1'}, process 0 {'hash': '0'};"),
        ({"images": "1"}, "has images 1, process 0 0;"),
        ({"code": "1"}, "has code of version 1, process 0 0;"),
        ({"workers": 3, "keep": 9}, None),
    ],
)
def test_processes_that_differ_are_told_before_the_first_step(tmp_path, change, message):
    found = outcomes(_started_with, tmp_path / "run", change)
    if message is None:
        assert [code for code, _ in found] == [0, 0], found
    else:
        lines = "".join(stderr for _, stderr in found).splitlines()
        assert [code for code, _ in found] == [2, 2] and len(lines) == 1, found
        assert f"process 1 (on {socket.gethostname()}) {message}" in lines[0]
        assert not (tmp_path / "run").exists()


def _hanging(rank):
    distributed.TIMEOUT = datetime.timedelta(seconds=1)
    if rank == 1:
        time.sleep(4)
    else:
        distributed.all_reduce_max(1)


def test_a_collective_that_hangs_ends_the_run():
    (code, stderr), _ = outcomes(_hanging)
    assert code == 2 and "another rank of this run ended or hangs" in stderr and len(stderr.splitlines()) == 1


def _checking(rank, lives):
    def check():
        for _ in range(25 if rank == 0 else 0):
            time.sleep(0.1)
            if lives:
                utils.heartbeat()
        return "data"

    distributed.TIMEOUT = datetime.timedelta(seconds=1)
    assert distributed.local_rank0_first(check) == "data"
    distributed.all_reduce_max(1)


@pytest.mark.parametrize("lives", [True, False])
def test_a_long_first_image_check_is_no_hang(lives):
    """The data set is read by local rank 0, for longer than a collective may take, while the other waits."""
    (_, _), (code, stderr) = outcomes(_checking, lives)
    assert code == 0 if lives else (code == 2 and "no heartbeat for 1 s" in stderr), stderr


class GoneStore:
    def add(self, key, n):
        raise RuntimeError("Broken pipe")


def test_an_error_of_a_rank_is_not_taken_for_a_lost_one(monkeypatch, capsys):
    """Nor does a store that ended with its rank hide the line, or turn it into a traceback."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "_store", HashStore())
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        distributed.together(lambda: exec("raise RuntimeError('CUDA out of memory')"))
    monkeypatch.setattr(distributed, "meet", GoneStore)
    with pytest.raises(SystemExit, match="2"):
        distributed.run(lambda args: distributed.together(list), list)
    stderr = capsys.readouterr().err
    assert "another rank of this run ended or hangs" in stderr and len(stderr.splitlines()) == 1


def test_a_rank_without_a_gpu_of_its_own_is_one_line(monkeypatch):
    monkeypatch.setattr(distributed, "_store", HashStore())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")  # of a scheduler that gives each process one GPU
    with pytest.raises(UserError, match="nproc-per-node 4: this machine has 1 GPUs; start one process for each"):
        distributed.join()


def test_the_code_has_a_version(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.py").write_text("a = 1")
    monkeypatch.setattr(utils, "HERE", tmp_path)
    before = utils.code_version()
    (tmp_path / "images" / "a.py").write_text("a = 2")
    assert before != utils.code_version()


def test_one_process_on_several_gpus_says_how_to_use_them_all(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "gpu_count", lambda: 8)
    monkeypatch.setattr(sys, "argv", ["supernet.py", "--out", "my run"])
    TrainingRun(tmp_path / "run", "supernet").start(torch.device("cuda"), 0)
    log = (tmp_path / "run" / "run.log").read_text()
    assert "one of 8 GPUs is used; all of them: torchrun --nproc-per-node 8 supernet.py --out 'my run'" in log
    assert distributed.unused_gpus(torch.device("cpu")) is None
    monkeypatch.setattr(distributed, "gpu_count", lambda: 1)
    assert distributed.unused_gpus(torch.device("cuda")) is None


# --- runs that are killed ------------------------------------------------------------------------------------


def outcome(out, kind):
    """The weights and logged numbers that a run ended with, times aside."""
    folder = out / "checkpoints" / kind
    files = [checkpoint.newest(folder)] + [folder / "bnps-checkpoint.pth"] * (kind == "scratch")
    contents = [weight_files.load_file(path) for path in files]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return contents, [
        {k: v for k, v in line.items() if k not in ("seconds", "train/images_per_second", "train/wait_percent")}
        for line in lines
    ]


def assert_same(a, b):
    (contents, lines), (others, other_lines) = a, b
    assert lines == other_lines
    for content, other in zip(contents, others, strict=True):
        assert content["step"] == other["step"]
        assert all(torch.equal(tensor, other["model"][name]) for name, tensor in content["model"].items())
        states = [c.get("optimizer", {"state": {}})["state"] for c in (content, other)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(s["momentum_buffer"], states[1][i]["momentum_buffer"]) for i, s in states[0].items())


def killed_and_resumed(tmp_path, processes, kills, seed, *words):
    """Compares a run with one that is killed at uniformly drawn times."""
    kind = words[0].removesuffix(".py")
    begin = time.monotonic()
    finish(start(processes, *words, "--out", tmp_path / "straight"))
    seconds = time.monotonic() - begin
    rng, killed = random.Random(seed), 0
    while killed < kills:
        process = start(processes, *words, "--out", tmp_path / "killed")
        try:
            process.wait(rng.uniform(0.2, 1) * seconds)
        except subprocess.TimeoutExpired:
            kill(process)
            killed += 1
            continue
        finish(process)
        if killed < kills:
            assert_same(outcome(tmp_path / "killed", kind), outcome(tmp_path / "straight", kind))
            shutil.rmtree(tmp_path / "killed")
    finish(start(processes, *words, "--out", tmp_path / "killed"))
    assert_same(outcome(tmp_path / "killed", kind), outcome(tmp_path / "straight", kind))


@pytest.mark.parametrize("words", [SUPERNET, SCRATCH], ids=["supernet", "scratch"])
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, data, words):
    killed_and_resumed(tmp_path, 1, 1, 1, words[0], *data, *words[1:])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("loader", ["dali", "torchvision", "memory"])
@pytest.mark.parametrize("processes, words", [(1, SUPERNET), (2, SUPERNET), (1, SCRATCH), (2, SCRATCH)])
def test_a_run_killed_three_times_ends_as_if_it_had_not_been(tmp_path, data, processes, words, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    killed_and_resumed(tmp_path, processes, 3, 1, words[0], *data, *words[1:], "--loader", loader)


@pytest.fixture
def endless(tmp_path, data):
    """Starts a training that does not end by itself, and returns it once it trains."""
    started = []

    def start_it(processes, code=0):
        words = (ENDLESS[0], *data, *ENDLESS[1:], "--out", tmp_path)
        started.append(Forked(*words, code=code) if processes == 1 else start(processes, *words))
        deadline, log = time.monotonic() + 100, tmp_path / "checkpoints" / "supernet" / "run.log"
        while not (log.exists() and "plan:" in log.read_text()):
            assert time.monotonic() < deadline and started[-1].poll() is None
            time.sleep(0.02)
        return started[-1]

    yield start_it
    for process in started:
        if process.poll() is None:
            kill(process)


def rank_1(pid):
    """The process id of process 1 of a torchrun."""
    for child in descendants(pid):
        if b"\0RANK=1\0" in pathlib.Path(f"/proc/{child}/environ").read_bytes():
            return child
    raise AssertionError


@pytest.mark.parametrize(
    "processes, number, send",
    [
        (1, signal.SIGTERM, os.killpg),  # the loader's workers get it too
        (1, signal.SIGINT, os.killpg),  # as from a terminal
        pytest.param(2, signal.SIGTERM, os.kill, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGINT, os.kill, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, lambda pid, number: os.kill(rank_1(pid), number), marks=pytest.mark.slow),
    ],
    ids=["SIGTERM", "Ctrl-C", "SIGTERM to torchrun", "Ctrl-C to torchrun", "SIGTERM to process 1"],
)
def test_a_signal_saves_within_a_step(tmp_path, endless, processes, number, send):
    process = endless(processes, code=128 + number)
    send(process.pid, number)
    process.wait(60)
    _, stderr = process.communicate()
    assert (process.returncode == 0) == (processes == 1)  # a fork has compared its exit code itself
    (saved,) = checkpoint.checkpoints(tmp_path / "checkpoints" / "supernet")
    log = (tmp_path / "checkpoints" / "supernet" / "run.log").read_text()
    assert f"interrupted: saved {saved}" in log
    assert "Error:" not in stderr.replace("ChildFailedError:", "").replace("SignalException", "")
    assert weight_files.load_file(saved)["step"] == int(saved.stem[11:])


def test_workers_end_with_a_killed_run_and_leave_signals_to_it(endless):
    process = endless(1)
    _, worker = descendants(process.pid)
    os.kill(worker, signal.SIGTERM)
    os.kill(worker, signal.SIGINT)
    time.sleep(0.3)
    assert descendants(process.pid) == [process.pid, worker] and pathlib.Path(f"/proc/{worker}/exe").exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    deadline = time.monotonic() + 60
    while pathlib.Path(f"/proc/{worker}/exe").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)

"""Data and runs given in Python: the programs of docs/python.md, loaders of one's own, threads, notebooks, spawn."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_load import few_images, snippets  # noqa: F401
from test_training import SPACE, Images, assert_same_end, settings

import network
from dataloader import from_dataset, from_tensors
from network import ShuffleNetV2, ShuffleNetV2OneShot
from space.sampler import PathSampler
from training import checkpoint
from training.evaluation import calibration_batches, evaluate, load_supernet, recalibrate_bn, validation_batches
from training.loop import train
from training.run import TrainingRun, contents_of
from utils import UserError

CONTENTS = contents_of(SPACE, None, ["a", "b", "c"])


@pytest.fixture(autouse=True)
def in_python(monkeypatch):
    """Messages name arguments."""
    monkeypatch.setattr(UserError, "of_commands", False)


def tensors(n=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator), torch.arange(n) % 3


class Pairs:
    """A map-style Dataset."""

    def __init__(self):
        self.images, self.labels = tensors()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i], int(self.labels[i])


def brighter(image, epoch, index):
    return image // 2 + np.random.default_rng([epoch, index]).integers(0, 100)


def brighter_batch(images, samples):
    return torch.stack([brighter(image, *sample) for image, sample in zip(images, samples.tolist())])


def train_on(loader, iterations=7, folder=None, **how):
    torch.manual_seed(0)
    model = ShuffleNetV2OneShot(space=SPACE)
    run = folder and TrainingRun(folder, "supernet", CONTENTS)
    given = settings(iterations=iterations, save_every=3)
    train(model, loader, given, PathSampler(SPACE, 0), run=run, **how)
    return model.state_dict()


def equal(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_tensors_and_a_dataset_are_the_same_images(tmp_path):
    images, labels = tensors()
    one = train_on(from_tensors(images, labels, brighter_batch))
    for workers in (0, 1):
        assert equal(one, train_on(from_dataset(Pairs(), workers, brighter)))
    assert not equal(one, train_on(from_tensors(images, labels)))
    supernet = ShuffleNetV2OneShot(space=SPACE)
    found = [
        evaluate(supernet, [(0, 1, 2, 3)], calibration_batches(loader, 2, 8), validation_batches(loader, 10))[0]
        for loader in (from_tensors(images, labels), from_dataset(Pairs()))
    ]
    assert found[0] | {"seconds": 0} == found[1] | {"seconds": 0} and found[0]["n_images"] == 24


def test_a_run_on_ones_own_data_resumes_and_its_files_know_no_preprocessing(tmp_path):
    images, labels = tensors()
    loader = from_tensors(images, labels, brighter_batch)
    train_on(loader, folder=tmp_path / "whole")
    path = checkpoint.newest(tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    os.link(path.with_name("checkpoint-0000003.pth"), tmp_path / "parts" / "checkpoint-0000003.pth")
    train_on(loader, folder=tmp_path / "parts")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    model = ShuffleNetV2((0, 1, 2, 3), space=SPACE)
    run = TrainingRun(tmp_path / "alone", "scratch", CONTENTS | {"architecture": [0, 1, 2, 3]})
    train(model, loader, settings(iterations=2), run=run)
    alone = network.load(checkpoint.newest(tmp_path / "alone"))
    assert alone.classes == ("a", "b", "c")
    with pytest.raises(UserError, match="only their program knows the preprocessing"):
        alone.preprocess(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"a supernet checkpoint.*load_supernet reads a supernet"):
        network.load(path)


def test_what_is_no_loader_and_no_name_is_a_line():
    loader = torch.utils.data.DataLoader(Pairs(), 8)
    with pytest.raises(UserError, match=r"is a DataLoader.*from_dataset\(dataset\) or from_tensors"):
        train_on(loader)
    pairs = Pairs()
    pairs.targets = [0] * (len(pairs) + 1)
    with pytest.raises(UserError, match="the data set has 24 items, but 25 targets"):
        train_on(from_dataset(pairs))
    with pytest.raises(UserError, match="images given in Python have no files, and are not cached"):
        calibration_batches(from_tensors(*tensors()), 2, 8, cache="cache")
    with pytest.raises(UserError, match="are not names"):
        contents_of(SPACE, None, range(10))
    with pytest.raises(UserError, match=r"load_supernet has no setting 'data'; it has .*data_dir"):
        load_supernet("x.pth", data="x")


def test_a_network_of_ones_own_is_trained_and_evaluated():
    """Only the methods of network.Trainable, on a module that is none of the project's."""

    class Own(torch.nn.Module):
        space = SPACE

        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 4), torch.nn.BatchNorm2d(8, affine=False))
            self.ops = torch.nn.ModuleList(
                torch.nn.ModuleList(
                    torch.nn.Sequential(torch.nn.Conv2d(8, 8, k, padding=k // 2), torch.nn.BatchNorm2d(8, affine=False))
                    for k in (1, 3, 5, 7)
                )
                for _ in range(4)
            )
            self.last = torch.nn.Linear(8, 3)

        def path(self, candidate):
            return [self.stem, torch.Tensor.contiguous, *(ops[choice] for ops, choice in zip(self.ops, candidate))]

        def classify(self, x):
            return self.last(x.mean((2, 3)))

        def part(self, key):
            if isinstance(key, tuple):
                return self.ops[key[0]][key[1]]
            return {"stem": self.stem, "head": self.classify}[key]

        def module_of(self, key):
            return torch.nn.Sequential() if key == "head" else self.part(key)

    methods = {name for name in vars(network.Trainable) if name in ("path", "classify", "part", "module_of")}
    assert methods <= vars(Own).keys() and len(methods) == 4
    torch.manual_seed(0)
    model, (images, labels) = Own(), tensors()
    train(model, from_tensors(images, labels), settings(iterations=2), PathSampler(SPACE, 0))
    with pytest.raises(UserError, match=r"Own has no candidates_with_all\(\)"):
        train(model, from_tensors(images, labels), settings(compile=True), PathSampler(SPACE, 0))
    loader = from_tensors(images, labels)
    calibration, validation = calibration_batches(loader, 2, 8), validation_batches(loader, 10)
    candidates = [(0, 1, 2, 3), (0, 1, 2, 0)]
    results = evaluate(model, candidates, calibration, validation, "average", fold=False)
    for candidate, result in zip(candidates, results):

        def forward(x, candidate=candidate):
            for part in model.path(candidate):
                x = part(x)
            return model.classify(x)

        recalibrate_bn(model, forward, calibration, "average")
        with torch.no_grad():
            logits = torch.cat([forward(x) for x, _ in validation])
        expected = (logits.argmax(1) == torch.cat([y for _, y in validation])).double().mean() * 100
        assert result["acc1"] == pytest.approx(expected.item())


# --- where programs run --------------------------------------------------------------------------------------


def test_in_another_thread_and_after_an_interrupt_in_a_notebook(tmp_path):
    """An interrupt saves and raises KeyboardInterrupt; the same call resumes, with no lock of its own in the way."""
    ends = []

    def work():
        ends.append(train_on(Images(), folder=tmp_path / "thread"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(ends) == 1

    class Interrupting(Images):
        def batches(self, plan):
            for one in super().batches(plan):
                if self.taken == 5:
                    os.kill(os.getpid(), signal.SIGINT)
                yield one

    with pytest.raises(KeyboardInterrupt):
        train_on(Interrupting(), folder=tmp_path / "cell")
    assert checkpoint.newest(tmp_path / "cell").name == "checkpoint-0000004.pth"
    assert equal(train_on(Images(), folder=tmp_path / "cell"), ends[0])


def test_a_bar_shows_in_a_notebook_and_metrics_reach_a_function(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    seen = []
    run = TrainingRun(tmp_path, "supernet", CONTENTS, log=lambda step, metrics: seen.append((step, metrics)))
    torch.manual_seed(0)
    train(ShuffleNetV2OneShot(space=SPACE), Images(), settings(iterations=3), PathSampler(SPACE, 0), run=run)
    assert "3/3" in capsys.readouterr().err
    assert [step for step, _ in seen] == [3] and "train/loss" in seen[0][1]


def test_the_log_shows_without_logging_set_up():
    code = "import utils; utils.show_log(); utils.log.info('a line')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.endswith(" a line\n")


def in_a_daemon(queue):
    queue.put(len(list(from_dataset(Pairs(), workers=2).batches([np.array([[0, 1], [0, 2]])]))))


def test_a_daemonic_process_loads_without_workers():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=in_a_daemon, args=(queue,), daemon=True)
    process.start()
    assert queue.get(timeout=60) == 1
    process.join()


def test_a_file_that_stands_in_the_way_is_named(tmp_path):
    (tmp_path / "utils.py").touch()
    program = tmp_path / "program.py"
    program.write_text(f"import sys\nsys.path.append({str(ROOT)!r})\nimport network\n")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert f"ImportError: {tmp_path / 'utils.py'} stands in the way" in done.stderr
    (tmp_path / "utils.py").rename(tmp_path / "own_utils.py")
    subprocess.run([sys.executable, program], check=True)


def program(number, *changes):
    """A program of docs/python.md, smaller."""
    text = snippets("python.md")[number]
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    return text


class Teacher:
    """A network on a device that no image is on, until it is moved."""

    def __init__(self, space):
        self.network, self.device = ShuffleNetV2OneShot(space=space).eval(), None

    def to(self, device):
        self.device = device
        return self

    def __call__(self, images):
        assert images.device == self.device
        return self.network(images, (0,) * 6)


def test_the_programs_about_rules_and_data_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(program(1, ("iterations=20", "iterations=2")), found)
    monkeypatch.setattr(network, "load", lambda path: Teacher(found["space"]))
    exec(program(2), found)
    train(
        ShuffleNetV2OneShot(space=found["space"]), from_tensors(found["images"], found["labels"]),
        found["Training"](iterations=1, batch_size=8), PathSampler(found["space"]), rule=found["distilled"],
    )  # fmt: skip
    exec(program(3, ("workers=2", "workers=0")), found)
    assert [len(labels) for _, labels in found["validation"]] == [32, 32] and len(found["calibration"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_first_program_runs_where_processes_are_spawned(few_images, tmp_path, method):  # noqa: F811
    text = program(
        0, ("iterations=1500", "iterations=6"), ("iterations=1000", "iterations=4"), ("batches=10", "batches=2"),
        ("population=16", "population=4"), ("generations=5", "generations=2"), ("warmup=", "keep="),
        ("heldout_per_class=200", "heldout_per_class=10"), ("augment=", "workers=1, augment="),
        ('bundled.unpack("data/fashion-mnist")', repr(str(few_images))),
    )  # fmt: skip
    path = tmp_path / "program.py"
    guard = 'if __name__ == "__main__":'
    assert guard in text
    head = f"import sys\nsys.path.append({str(ROOT)!r})\nimport multiprocessing\n"
    start = f"{guard}\n    multiprocessing.set_start_method({method!r})"
    path.write_text(head + text.replace(guard, start, 1).replace(f"{start}  #", f"{start}\n    #"))
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    without = text.replace(guard, "if True:", 1)
    path.write_text(f"{head}multiprocessing.set_start_method({method!r}, force=True)\n{without}")
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode and '__name__ == "__main__"' in done.stderr, done.stderr[-2000:]

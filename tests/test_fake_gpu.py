"""Training and evaluation on a pretended GPU: a tensor on the wrong device, or a hidden synchronisation, is an error.

FakeTensorMode computes devices and shapes alone, and refuses to give values of tensors to Python. Its backward passes
need a GPU, so a training step is checked by what it calls on the CPU.
"""

import random

import pytest
import torch
from test_evaluation import Halved
from test_training import settings
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from network import ShuffleNetV2, ShuffleNetV2OneShot
from space.search_space import SearchSpace
from training import evaluation, loop
from training.step import Step

SPACE = SearchSpace(
    input_size=16, n_classes=7, stem_stride=1, stage_strides=(2, 2), stage_blocks=(2, 2), stage_channels=(8, 16),
    stem_channels=4, last_channels=16,
)  # fmt: skip
PATHS = [(0, 1, 2, 3), (0, 1, 3, 0), (3, 0, 0, 0)]
# Operations of which Python, or the shape of a result, needs the values, so that a GPU has to finish first.
SYNCHRONISING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave",
}  # fmt: skip


class NoSynchronisation(TorchDispatchMode):
    """Within the block, operations that wait for the GPU are errors, copies to the CPU among them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        assert name not in SYNCHRONISING, f"{name} waits for the GPU"
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        result = function(*args, **kwargs)
        if name in ("_to_copy", "copy_") and isinstance(result, torch.Tensor):
            devices = {t.device.type for t in (*tensors, result)}
            assert len(devices) == 1 or kwargs.get("non_blocking"), f"{name} between {devices} waits for the GPU"
        return result


@pytest.fixture
def fake_gpu(monkeypatch):
    """Tensors are made on a GPU that only pretends to be one."""
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)
    _ = SPACE.costs  # counted on the meta device
    with FakeTensorMode(), torch.device("cuda"):
        yield


def batches(n):
    return [(torch.empty(4, 3, 16, 16), torch.zeros(4, dtype=torch.long)) for _ in range(n)]


def test_the_pretended_gpu_refuses_what_a_gpu_does(fake_gpu):
    x = torch.zeros(3)
    with pytest.raises(DataDependentOutputException):
        x.sum().item()
    with pytest.raises((RuntimeError, TypeError), match="device"):
        x + torch.zeros(3, device="cpu")
    for wait in (lambda: x.cpu(), lambda: x.nonzero(), lambda: bool(x[0] > 0), lambda: x.to("cpu")):
        with pytest.raises(AssertionError, match="waits for the GPU"), NoSynchronisation():
            wait()


class Evaluated(Exception):
    """All batches have passed; what follows fetches the counts, once."""


@pytest.fixture
def counted(monkeypatch):
    """The counts of correct images when all batches have passed."""
    found = []

    def fetch(counts, n_images, width):
        found.extend(counts)
        raise Evaluated

    monkeypatch.setattr(evaluation, "_all_reduce_counts", fetch)
    return found


@pytest.mark.parametrize("fold", [True, False])
def test_candidates_are_evaluated_on_the_device_without_waiting_for_it(fake_gpu, counted, fold):
    supernet, validation = ShuffleNetV2OneShot(space=SPACE), Halved(batches(3))
    numbers = [torch.arange(len(labels), device="cpu") for _, labels in validation]
    validation.second_halves = [n > 1 for n in numbers]
    validation.groups = torch.full((3,), 4, device="cpu"), [n % 3 for n in numbers]
    with NoSynchronisation(), pytest.raises(Evaluated):
        evaluation.evaluate(supernet, PATHS, batches(2), validation, fold=fold)
    assert [(c.device.type, c.shape) for c in counted] == [("cuda", (9,))] * 3


def test_a_network_is_evaluated_on_the_device_without_waiting_for_it(fake_gpu, counted):
    network = ShuffleNetV2(PATHS[0], space=SPACE)
    with NoSynchronisation():
        evaluation.recalibrate_bn(network, network, batches(2), "average")
        with pytest.raises(Evaluated):
            evaluation.accuracy(network, batches(2))
    assert [c.device.type for c in counted] == ["cuda"]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_of_the_supernet_is_computed_on_the_device(fake_gpu, path):
    supernet, ((images, _),) = ShuffleNetV2OneShot(space=SPACE), batches(1)
    with NoSynchronisation():
        logits = supernet(images, path)
    assert logits.device.type == "cuda" and logits.shape == (4, 7)


@pytest.mark.parametrize("changes", [{}, {"amp": "bf16", "micro_batch": 2}])
def test_a_training_step_calls_nothing_that_waits(monkeypatch, changes):
    """With the metrics of the log, up to the line that fetches them; the first step makes the momentum buffers."""
    torch.manual_seed(0)
    model = ShuffleNetV2OneShot(space=SPACE)
    recipe = Step(model, settings(**changes))
    meter = loop._Meter(recipe, 0, 0.0, torch.empty(0, 3, dtype=torch.double))
    meter.untimed = 0  # after which the rows are fetched
    images, labels = torch.rand(4, 3, 16, 16), torch.randint(7, (4,))
    for name in ("cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} waits for the GPU"))
    before = [p.detach().clone() for p in model.parameters()]
    for step, path in enumerate([*PATHS, PATHS[0]], 1):
        with NoSynchronisation():
            loss, logits = recipe.train_one_step(step, images, labels, path)
            meter.add(path, loss, logits, labels)
    monkeypatch.undo()
    assert len(meter.window) == 4 and not all(map(torch.equal, before, model.parameters()))


def two_steps_and_a_resume(device, amp):
    """(weights after four steps, weights after two, a copy of model and optimizer, and two more steps)."""
    rng = random.Random(0)
    paths = [SPACE.random_candidate(rng) for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(32, 3, 16, 16, generator=generator) for _ in paths]
    data = [(x, torch.randint(7, (32,), generator=generator)) for x in images]

    def started():
        torch.manual_seed(0)
        model = ShuffleNetV2OneShot(space=SPACE).to(device, memory_format=torch.channels_last)
        return Step(model, settings(amp=amp), device)

    def steps(recipe, numbers):
        for n in numbers:
            x, labels = (tensor.to(device) for tensor in data[n])
            recipe.train_one_step(n + 1, x, labels, paths[n])
        return {name: tensor.clone() for name, tensor in recipe.model.state_dict().items()}

    straight = steps(started(), range(4))
    first, second = started(), started()
    steps(first, range(2))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.scaler.load_state_dict(first.scaler.state_dict())
    return straight, steps(second, range(2, 4))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])])  # fmt: skip
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_resumed_run_takes_the_same_steps_on_the_device(device, amp):
    evaluation.resolve_device(device)
    straight, resumed = two_steps_and_a_resume(torch.device(device), amp)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())


def test_cudnn_is_deterministic_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert evaluation.resolve_device("cpu").type == "cpu"
    assert not torch.backends.cudnn.deterministic
    assert evaluation.resolve_device().type == "cuda"
    assert torch.backends.cudnn.deterministic

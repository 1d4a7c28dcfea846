"""Compiled training: as eager, one graph for each operation at a shape, none later, and what can't be compiled.

The quick tests have all of torch.compile but Inductor, by the backend aot_eager.
"""

import copy
import dataclasses
import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run
from test_distributed import assert_near, assert_same, outcome, outcomes, trained
from test_training import Images, assert_same_end, settings, supernet_run
from torch._dynamo.utils import counters

from network import ShuffleNetV2, ShuffleNetV2OneShot
from space.sampler import PathSampler
from space.search_space import SearchSpace
from training import compiled
from training.checkpoint import checkpoints
from training.compiled import CompiledStep, prepare_compiler
from training.evaluation import evaluate
from training.step import Step
from utils import UserError, private_folder

SPACE = SearchSpace(  # two shapes of blocks
    input_size=16, n_classes=3, stem_stride=1, stage_strides=(2,), stage_blocks=(3,), stage_channels=(32,),
    stem_channels=16, last_channels=32, operations=("shufflenet_3x3", "shufflenet_5x5"),
)  # fmt: skip
GRAPHS = 2 * 2 + 2  # operations at their shapes, stem and last convolution
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing is compiled yet, and graphs are counted from 0."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()


def graphs():
    return counters["stats"]["unique_graphs"]


def supernet(space=SPACE):
    torch.manual_seed(0)
    return ShuffleNetV2OneShot(space=space).to(memory_format=torch.channels_last).train()


def compare(space, paths, n, tolerance, **changes):
    """Steps of an eager and of a compiled supernet with the same weights, on the same images; returns the graphs."""
    pair = {False: Step, True: CompiledStep}
    eager, fast = (kind(supernet(space), settings(lr=0.0, compile=c, **changes)) for c, kind in pair.items())
    images = (torch.rand(n, 3, space.input_size, space.input_size) * 255).to(memory_format=torch.channels_last)
    labels, found = torch.arange(n) % space.n_classes, []
    for step, path in enumerate(paths, 1):
        (loss, logits), (expected, other) = (s.train_one_step(step, images, labels, path) for s in (fast, eager))
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
        torch.testing.assert_close(logits, other, rtol=tolerance, atol=tolerance)
        for (name, p), q in zip(fast.model.named_parameters(), eager.model.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                assert (p.grad - q.grad).abs().max() <= 10 * tolerance * q.grad.abs().max(), name
        found.append(graphs())
    for (name, b), other in zip(fast.model.named_buffers(), eager.model.buffers(), strict=True):
        torch.testing.assert_close(b, other, rtol=tolerance, atol=1e-4, msg=name)
    return found


def test_operations_are_compiled_before_the_first_step_and_never_again(tmp_path, caplog):
    """With micro-batches and validations in between, and as eager; a run that is resumed ends with the same bits."""
    caplog.set_level("INFO", "spos")
    counted = []

    def trained(folder, images=None, **changes):
        model = supernet()
        batches = [(images, labels) for images, labels in Images().batches([torch.zeros(4, 2).long().numpy()])]

        def validate(step):
            evaluate(copy.deepcopy(model), [(0, 1, 1), (1, 0, 0)], batches, batches, "average")
            counted.append(graphs())
            return {"val/acc1": step}

        how = settings(iterations=6, val_every=2, save_every=1, keep=9, micro_batch=4, **changes)
        return supernet_run(folder, how, model, PathSampler(SPACE, 0), images, validate)[1]

    eager = trained(tmp_path / "eager")
    assert graphs() == 0
    compiled = trained(tmp_path / "a", compile=True)
    assert counted[3:] == [GRAPHS] * 3
    assert compiled["train/loss"] == pytest.approx(eager["train/loss"], rel=1e-5)
    (line,) = [line for line in caplog.messages if line.startswith("compiled ")]
    assert line.startswith("compiled stem, operations and last convolution, 8 modules as 6 graphs, in ")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in checkpoints(tmp_path / "b")[3:]:
        path.unlink()
    with pytest.raises(UserError, match=r"--compile False \(was True\)"):
        trained(tmp_path / "b")
    images = Images()
    trained(tmp_path / "b", images, compile=True)
    assert images.taken == 3
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_mixed_precision_and_one_network_are_compiled_too():
    torch.manual_seed(0)
    network = ShuffleNetV2((1, 0, 0), space=SPACE)
    step = CompiledStep(network.train(), settings(compile=True, amp="bf16"))
    images, labels = torch.rand(4, 3, 16, 16) * 255, torch.arange(4) % 3
    for n in (1, 2):
        loss, _ = step.train_one_step(n, images.to(memory_format=torch.channels_last), labels)
    assert loss.isfinite() and graphs() == 4
    with pytest.raises(UserError, match=r"^--compile: an operation's input has another form .*leave it out$"):
        step.train_one_step(3, images[:2].to(memory_format=torch.channels_last), labels[:2])


def test_operations_that_skip_or_add_their_input_are_compiled():
    """And are not compiled again, not even the skip that is nothing."""
    space = dataclasses.replace(SPACE, stage_blocks=(2,), operations=("skip_1x1", "mobilenet_3x3"))
    first, *others = compare(space, [(0, 0), (1, 1)], 4, 1e-4)
    assert first > 0 and others == [first]


# --- what can't be compiled ----------------------------------------------------------------------------------


def test_what_torch_can_not_compile_is_a_line(monkeypatch):
    def backend(graph, inputs):
        raise ValueError("no\nsuch kernel")

    monkeypatch.setattr(compiled, "BACKEND", backend)
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4) % 3
    with pytest.raises(UserError, match=r"^--compile: torch can't compile .*no such kernel.*leave it out$"):
        CompiledStep(supernet(), settings(compile=True)).train_one_step(1, images, labels, (0, 0, 0))
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    with pytest.raises(UserError, match="--compile: operations of several widths"):
        wide = SearchSpace(**{**SPACE.to_dict(), "widths": (0.5, 1.0)})
        CompiledStep(supernet(wide), settings(compile=True)).train_one_step(1, images, labels, (0, 0, 0, 1, 1, 1))


def test_what_a_machine_lacks_is_a_line(monkeypatch, tmp_path):
    # not by monkeypatch, after which this setting of torch would be gone
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with no_compiler, pytest.raises(UserError, match=r"--compile: no C\+\+ compiler"):
        prepare_compiler(CPU, tmp_path)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(UserError, match="--compile: torch finds no Triton"):
        prepare_compiler(torch.device("cuda"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_code_is_its_users_alone(tmp_path, monkeypatch):
    folder = private_folder(tmp_path / "cache" / "compiled")
    assert folder.stat().st_mode & 0o777 == 0o700 and private_folder(folder) == folder
    for mode in (0o770, 0o702, 0o740):
        folder.chmod(mode)
        with pytest.raises(UserError, match=r"compiled: not a folder .*0700"):
            private_folder(folder)
    folder.chmod(0o700)
    monkeypatch.setattr("os.getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(UserError, match="not a folder that only you can open"):
        private_folder(folder)
    monkeypatch.undo()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UserError, match="not a folder that only you can open"):
        private_folder(tmp_path / "link")


# --- slow ----------------------------------------------------------------------------------------------------


def _compiled_rank(rank, folder):
    compiled.BACKEND = "aot_eager"
    result = trained(folder / "run", torch.float64, 3, compile=True, micro_batch=2)
    if rank == 0:
        torch.save(result, folder / "result.pth")


@pytest.mark.slow
def test_processes_compile_one_after_the_other(tmp_path):
    """The first of a machine, then the others, which find what it has kept; with micro-batches, as eager."""
    found = outcomes(_compiled_rank, tmp_path)
    assert [code for code, _ in found] == [0, 0], found
    assert_near(torch.load(tmp_path / "result.pth"), trained(tmp_path / "eager", torch.float64, 3, micro_batch=2))


@pytest.mark.slow
def test_the_papers_space_has_32_graphs_of_operations():
    space, rng = SearchSpace.for_images(32, 10), random.Random(0)
    paths = [space.random_candidate(rng) for _ in range(20)]
    assert compare(space, paths, 8, 1e-5) == [32 + 2] * 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("changes", [{}, {"micro_batch": 4}])
def test_inductor_computes_what_eager_does(monkeypatch, tmp_path, changes):
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    prepare_compiler(CPU, tmp_path)
    rng = random.Random(0)
    paths = [SPACE.random_candidate(rng) for _ in range(20)]
    assert compare(SPACE, paths, 8, 1e-5, **changes) == [GRAPHS] * 20


SECOND_START = """
import json, sys
import utils, torch
from test_compiled import SPACE, supernet, settings
from torch._dynamo.utils import counters
from training.compiled import CompiledStep, prepare_compiler
prepare_compiler(torch.device("cpu"), sys.argv[1])
images = (torch.rand(8, 3, 16, 16) * 255).to(memory_format=torch.channels_last)
CompiledStep(supernet(), settings(compile=True)).train_one_step(1, images, torch.arange(8) % 3, (0, 1, 0))
print(json.dumps({**counters["aot_autograd"], **counters["inductor"]}))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_second_start_compiles_nothing(tmp_path):
    words = [sys.executable, "-c", SECOND_START, tmp_path]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin"}
    first, second = (
        json.loads(subprocess.run(words, env=paths, check=True, capture_output=True, text=True).stdout)
        for _ in range(2)
    )
    assert first["autograd_cache_miss"] == GRAPHS and "autograd_cache_hit" not in first
    assert second["autograd_cache_hit"] == GRAPHS and "autograd_cache_miss" not in second
    assert second["fxgraph_cache_hit"] == 2 * GRAPHS and "fxgraph_cache_miss" not in second
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700


SPACE_FILE = """space:
  stem: {channels: 16, stride: 1}
  stages: [{blocks: 2, channels: 32, stride: 2}]
  last: {channels: 32}
  operations: [shufflenet_3x3, shufflenet_5x5]
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("script", ["supernet.py", "scratch.py"])
def test_the_scripts_train_compiled_and_resume(tmp_path, data, monkeypatch, script):
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    (tmp_path / "space.yml").write_text(SPACE_FILE)
    (tmp_path / "path.json").write_text("[0, 1]")
    words = [*data, "--space", tmp_path / "space.yml", "--compile --batch-size 8 --micro-batch 4 --iterations 4"]
    words += ["--save-every 2 --val-every 4"]
    if script == "supernet.py":
        words += ["--sampler uniform --bn-batches 2 --bn-batch-size 9 --val-paths 1"]
    else:
        words += ["--bn-pass 2", "--architecture", tmp_path / "path.json"]
    kind = script.removesuffix(".py")
    for name in ("a", "b"):
        _, log = run(script, *words, "--out", tmp_path / name)
        assert "compiled stem, operations and last convolution, " in log
    folder = tmp_path / "b" / "checkpoints" / kind
    checkpoints(folder)[-1].unlink()
    run(script, *words, "--out", tmp_path / "b")
    assert_same(outcome(tmp_path / "a", kind), outcome(tmp_path / "b", kind))

"""The training recipe, resuming, and what a step leaves alone."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import time
import types

import pytest
import reference_spos
import torch
from conftest import started
from torch import nn

import scratch
import supernet
import training.checkpoint
import training.run
import utils
from images.dataset import training_plan
from network import ShuffleNetV2, ShuffleNetV2OneShot
from settings.fields import setting
from settings.subjects import SUBJECTS, Training, deciding
from space.sampler import PathSampler, default_flops_range
from space.search_space import SearchSpace
from space.weight_files import load
from training import loop
from training.checkpoint import checkpoints, newest
from training.loop import train
from training.run import TrainingRun
from training.step import Step, dropout_seed, learning_rate, parameter_groups
from utils import UserError

SPACE = SearchSpace(  # tensors of whole vectors of 16 floats, so that a written-out SGD has torch's rounding
    input_size=16, n_classes=3, stem_stride=1, stage_strides=(2, 2), stage_blocks=(2, 2), stage_channels=(32, 64),
    stem_channels=16, last_channels=32,
)  # fmt: skip
FULL = SearchSpace(input_size=32, n_classes=3, stem_stride=1)
CONTENTS = {"space": SPACE.to_dict(), "data": {}, "split": None, "classes": ["a", "b", "c"],
            "images": {"train": "9 images"}}  # fmt: skip


class Images:
    """A loader of random images whose batch is a pure function of the step, as the real ones are."""

    images, px = range(64), 16

    def __init__(self):
        self.taken = 0  # batches

    def batches(self, plan):
        for batch in plan:
            self.taken += 1
            generator = torch.Generator().manual_seed(int(batch[:, 1].sum()))
            images = torch.rand(len(batch), 3, self.px, self.px, generator=generator) * 255
            yield images, torch.from_numpy(batch[:, 1] % 3)


def settings(**changes):
    return Training(**{"iterations": 20, "batch_size": 8, "val_every": 1000, "save_every": 1000, **changes})


def training_run(folder, training, seed=0, loader="torchvision"):
    folder.mkdir(parents=True, exist_ok=True)
    deciding_ones = deciding({**dataclasses.asdict(training), "seed": seed, "loader": loader})
    return TrainingRun(folder, "supernet", dict(CONTENTS), deciding_ones)


def supernet_run(
    folder, training, model=None, sampler=None, images=None, validate=lambda step: {"val/acc1": 1.0}, seed=0,
    loader="torchvision", device="cpu",
):  # fmt: skip
    torch.manual_seed(0)
    model = model or ShuffleNetV2OneShot(space=SPACE)
    sampler = sampler or PathSampler(SPACE, seed)
    run = training_run(folder, training, seed, loader)
    if training.resume == "none":
        run.start(torch.device("cpu"), seed, anew=True)
    metrics = train(model, images or Images(), training, sampler, validate, run, device=device, seed=seed)
    return model, metrics


def log_rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_end(folder, other):
    """Two runs ended with the same bits: weights, BN statistics, momentum, and the last line of the log."""
    a, b = (load(newest(f), "supernet").content for f in (folder, other))
    assert a["step"] == b["step"] and a["model"].keys() == b["model"].keys()
    assert all(torch.equal(tensor, b["model"][name]) for name, tensor in a["model"].items())
    momenta = [{i: s["momentum_buffer"] for i, s in c["optimizer"]["state"].items()} for c in (a, b)]
    assert momenta[0].keys() == momenta[1].keys() and all(torch.equal(m, momenta[1][i]) for i, m in momenta[0].items())
    times = {"seconds", "train/images_per_second", "train/wait_percent"}
    last, other_last = ({k: v for k, v in log_rows(f)[-1].items() if k not in times} for f in (folder, other))
    assert last == other_last


def test_learning_rate_is_the_official_line():
    assert learning_rate(1, 150_000, 0.5) == 0.5 * (1 - 1 / 150_000)
    assert learning_rate(75_000, 150_000, 0.5) == 0.25
    assert learning_rate(150_000, 150_000, 0.5) == 0
    assert [learning_rate(k, 10, 1.0, warmup=4) for k in (1, 2, 4, 5)] == pytest.approx([0.9 / 4, 0.8 / 2, 0.6, 0.5])


@pytest.mark.parametrize("affine", [False, True])
def test_only_weights_with_more_than_one_dimension_decay(affine):
    model = ShuffleNetV2([0, 1, 2, 3], affine=affine, space=SPACE)
    groups = parameter_groups(model, 4e-5)
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert len(groups) == 1 + affine and len(decay) == len(list(model.parameters()))
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            assert decay[id(parameter)] == (0 if isinstance(module, nn.BatchNorm2d) else 4e-5)


def test_twenty_steps_are_the_official_recipe_bit_for_bit(tmp_path):
    """Against SGD written out: learning rate, momentum, decay, smoothing, path and parameters without a gradient."""
    args = settings()
    model, _ = supernet_run(tmp_path, args)
    torch.manual_seed(0)
    other = ShuffleNetV2OneShot(space=SPACE).to(memory_format=torch.channels_last)
    sampler, momentum = PathSampler(SPACE, 0), {}
    for step, (images, labels) in enumerate(Images().batches(training_plan(64, 8, 0, steps=20)), 1):
        torch.manual_seed(dropout_seed(0, step))
        logits = other(images, sampler.candidate(step))
        smooth = torch.full_like(logits, 0.1 / 3).scatter_(1, labels[:, None], 0.9 + 0.1 / 3)
        loss = -(smooth * logits.log_softmax(1)).sum(1).mean()
        for p in other.parameters():
            p.grad = None
        # The criterion's own backward pass is used for the gradient: another order of summing is another last bit.
        nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).backward()
        assert loss.item() == pytest.approx(
            nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).item(), rel=1e-5
        )
        with torch.no_grad():
            for name, p in other.named_parameters():
                if p.grad is None:
                    continue
                gradient = p.grad.add(p, alpha=4e-5)
                momentum[name] = momentum[name].mul_(0.9).add_(gradient) if name in momentum else gradient.clone()
                p.add_(momentum[name], alpha=-0.5 * (1 - step / 20))
    expected = dict(other.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    stored = load(newest(tmp_path), "supernet").content["optimizer"]
    names = [name for name, _ in other.named_parameters()]
    buffers = {names[i]: state["momentum_buffer"] for i, state in stored["state"].items() if state}
    assert buffers.keys() == momentum.keys()
    assert all(torch.equal(buffers[name], momentum[name]) for name in momentum)


class ThreeBatches(Images):
    """Ends after three batches, whatever the number of iterations."""

    images, px = range(48), FULL.input_size

    def batches(self, plan):
        return ((images.double(), labels) for images, labels in itertools.islice(super().batches(plan), 3))


@pytest.mark.parametrize("kind", ["supernet", "scratch"])
def test_three_steps_in_float64_are_those_of_the_reference(tmp_path, kind):
    """Our networks, sampler and recipe in our loop, against the reference's networks and SGD written out, to 1e-8.

    The learning rate falls as over the official iterations; later steps prove nothing, since training is chaotic.
    """
    iterations, sampler, fixed = 150_000, PathSampler(FULL, 0, default_flops_range(FULL)), (0, 1, 2, 3) * 5
    torch.manual_seed(0)
    if kind == "supernet":
        model = ShuffleNetV2OneShot(space=FULL).double()
        reference = reference_spos.Network(None, 3, False, stem_stride=1, last_size=2).double()
        steps = [(sampler.candidate(step),) for step in (1, 2, 3)]
        assert len(set(steps)) == 3
    else:
        model = ShuffleNetV2(fixed, space=FULL).double()
        reference = reference_spos.Network(fixed, 3, True, stem_stride=1, last_size=2).double()
        steps = [()] * 3
    reference.load_state_dict(model.state_dict(), strict=True)
    start = {name: tensor.clone() for name, tensor in reference.state_dict().items()}

    momentum = {}
    for k, (path, (images, labels)) in enumerate(zip(steps, ThreeBatches().batches(training_plan(48, 8, 0))), 1):
        torch.manual_seed(dropout_seed(0, k))
        log_p = reference(images, *path).log_softmax(1)
        loss = -(0.9 * log_p[range(8), labels] + 0.1 * log_p.mean(1)).mean()
        reference.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in reference.named_parameters():
                if p.grad is not None:
                    gradient = p.grad + (4e-5 * p if p.ndim > 1 else 0)
                    momentum[name] = 0.9 * momentum[name] + gradient if name in momentum else gradient
                    p -= 0.5 * (1 - k / iterations) * momentum[name]

    recipe = settings(iterations=iterations, save_every=3)
    candidate_at = sampler.candidate if kind == "supernet" else None
    train(model, ThreeBatches(), recipe, candidate_at, run=TrainingRun(tmp_path, kind, CONTENTS))
    assert newest(tmp_path).name == "checkpoint-0000003.pth"
    ours, theirs, moved = model.state_dict(), reference.state_dict(), 0
    for name, expected in theirs.items():
        scale = expected.abs().max()
        if name.endswith("running_mean"):  # BN has just centred these: the mean is 0 but for rounding
            scale = max(scale, theirs[name.replace("mean", "var")].max().sqrt())
        assert (ours[name] - expected).abs().max() <= 1e-8 * scale, name
        moved += not torch.equal(expected, start[name])
    assert moved == len(start) if kind == "scratch" else 200 < moved < len(start)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_step_of_micro_batches_is_one_step_and_one_row(tmp_path, monkeypatch, amp):
    """The mean of the losses and gradients, all logits in order, the statistics of the first; with widths too."""
    space = dataclasses.replace(SPACE, widths=(0.5, 1.0))
    images, labels, path = torch.rand(8, 3, 16, 16) * 255, torch.arange(8) % 3, (0, 1, 2, 3, 0, 1, 1, 0)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(ShuffleNetV2OneShot(space=space).train())
        models[-1].dropout.p = 0.0
    recipe = Step(models[0], settings(micro_batch=4, amp=amp, lr=0.0))
    loss, logits = recipe.train_one_step(1, images, labels, path)
    assert len(recipe.optimizer.state_dict()["state"]) > 0 and logits.shape == (8, 3)
    other, losses, outputs = Step(models[1], settings(amp=amp, lr=0.0)), [], []
    statistics = None
    for part in (slice(0, 4), slice(4, 8)):
        with torch.autocast("cpu", torch.float16, enabled=amp == "fp16"):
            outputs.append(models[1](images[part], path))
        losses.append(nn.functional.cross_entropy(outputs[-1], labels[part], label_smoothing=0.1))
        statistics = statistics or {name: b.clone() for name, b in models[1].named_buffers()}
    other.scaler.scale(sum(losses) / 2).backward()
    assert loss == pytest.approx(sum(losses).item() / 2, rel=1e-6) and torch.equal(logits, torch.cat(outputs))
    assert all(torch.equal(b, statistics[name]) for name, b in models[0].named_buffers())
    assert any(not torch.equal(b, statistics[name]) for name, b in models[1].named_buffers())
    scale = other.scaler.get_scale()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad / scale, rtol=1e-4, atol=1e-3 * q.grad.abs().max().item() / scale)


def test_what_is_not_sampled_stays_as_it_is(tmp_path):
    """Operations not sampled stay bit-identical, momentum included, although earlier steps moved them."""

    class TwoPaths:
        def candidate(self, step):
            return (0,) * 4 if step <= 5 else (1,) * 4

    supernet_run(tmp_path, settings(save_every=5, iterations=9), sampler=TwoPaths())
    before, after = (load(p, "supernet").content for p in checkpoints(tmp_path))
    names = [name for name, _ in ShuffleNetV2OneShot(space=SPACE).named_parameters()]
    for i, name in enumerate(names):
        same = torch.equal(before["model"][name], after["model"][name])
        operation = int(name.split(".")[2]) if name.startswith("features") else None
        assert same == (operation in (0, 2, 3)), name
        if operation == 0:
            assert torch.equal(
                before["optimizer"]["state"][i]["momentum_buffer"], after["optimizer"]["state"][i]["momentum_buffer"]
            )
        if operation in (2, 3):
            assert i not in after["optimizer"]["state"]


def test_channels_last_gives_the_same_gradients():
    torch.manual_seed(0)
    model = ShuffleNetV2OneShot(space=SPACE).double()
    images, path = torch.rand(8, 3, 16, 16).double() * 255, PathSampler(SPACE, 0).candidate(1)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = model.to(memory_format=layout).eval()
        model.train()
        model.dropout.eval()
        model.zero_grad()
        model(images.to(memory_format=layout), path).square().sum().backward()
        gradients.append([p.grad.contiguous() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients):
        assert (a - b).abs().max() <= 1e-9 * a.abs().max()


@pytest.mark.parametrize(
    "stop, changes", [(2, {}), (5, {"micro_batch": 4}), (3, {"amp": "bf16"}), (3, {"amp": "fp16", "micro_batch": 2})]
)
def test_a_resumed_run_ends_bit_identical(tmp_path, stop, changes):
    args = settings(iterations=8, save_every=1, keep=8, lr=0.05, **changes)
    straight, metrics = supernet_run(tmp_path / "a", args)
    assert {p.dtype for p in straight.parameters()} == {torch.float32}
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in checkpoints(tmp_path / "b")[stop:]:
        path.unlink()
    images = Images()
    _, again = supernet_run(tmp_path / "b", args, images=images)
    assert images.taken == 8 - stop  # it resumed
    assert_same_end(tmp_path / "a", tmp_path / "b")
    assert again["train/loss"] == metrics["train/loss"] and again["val/acc1"] == 1.0
    assert again["seconds"] > 0 and checkpoints(tmp_path / "b")[-1].name == "checkpoint-0000008.pth"


def test_a_finished_run_takes_no_image(tmp_path):
    _, metrics = supernet_run(tmp_path, settings(iterations=2))
    images = Images()
    _, again = supernet_run(tmp_path, settings(iterations=2), images=images)
    assert again == metrics and images.taken == 0 and [row["step"] for row in log_rows(tmp_path)] == [2]


def test_a_checkpoint_that_lacks_what_training_needs_is_a_line(tmp_path):
    supernet_run(tmp_path, settings(iterations=2))
    whole = torch.load(newest(tmp_path))
    for key in ("optimizer", "rows", "settings", "step", "scaler", "metrics"):
        torch.save({name: value for name, value in whole.items() if name != key}, newest(tmp_path))
        with pytest.raises(UserError, match=rf"has no {key} to .*--out.*--resume none"):
            supernet_run(tmp_path, settings(iterations=2))
    torch.save(whole["model"], newest(tmp_path))
    with pytest.raises(UserError, match=r"not a checkpoint of this program.*--resume none"):
        supernet_run(tmp_path, settings(iterations=2))


def test_a_run_on_other_images_is_refused(tmp_path):
    supernet_run(tmp_path, settings(iterations=2))
    for key, value, says in (
        ("classes", ["a", "b", "d"], "trained with other classes: now without 'c' and with 'd'; "),
        ("split", {"seed": 1}, r"trained with another split: --split-seed 1 \(was None\); "),
        ("images", {"train": "8 images"}, "train had 9 images; now it has 8 images; "),
    ):
        run = training_run(tmp_path, settings(iterations=2))
        run.contents[key] = value
        with pytest.raises(UserError, match=f"{says}.*--resume none"):
            train(ShuffleNetV2OneShot(space=SPACE), Images(), settings(iterations=2), PathSampler(SPACE, 0), run=run)


def test_a_run_with_other_settings_is_refused(tmp_path):
    supernet_run(tmp_path, settings(iterations=2))
    with pytest.raises(UserError, match=r"--lr 0.3 \(was 0.5\).*--out.*--resume none"):
        supernet_run(tmp_path, settings(iterations=2, lr=0.3))
    with pytest.raises(UserError, match=r"--loader synthetic \(was torchvision\)"):
        supernet_run(tmp_path, settings(iterations=2), loader="synthetic")
    supernet_run(tmp_path, settings(iterations=2, keep=7))  # harmless
    ckpt = load(newest(tmp_path), "supernet")
    training.checkpoint.check_settings(
        ckpt, {**ckpt.content, "settings": ckpt.content["settings"] | {"eval_batch_size": 9, "bn_pass": 0}}, tmp_path
    )  # where memory ran out
    files = {"architecture": "best.json", "space": "own.yml", "group_by": "groups.csv"}
    ckpt.content["settings"] |= files
    moved = {name: f"elsewhere/{file}" for name, file in files.items()}  # contents have what they say
    training.checkpoint.check_settings(ckpt, {**ckpt.content, "settings": ckpt.content["settings"] | moved}, tmp_path)
    before = (tmp_path / "checkpoint-0000002.pth").read_bytes()
    supernet_run(tmp_path, settings(iterations=2, lr=0.3, resume="none"))
    assert tmp_path.with_suffix(".1").joinpath("checkpoint-0000002.pth").read_bytes() == before
    assert load(newest(tmp_path), "supernet").content["settings"]["lr"] == 0.3


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_is_near(tmp_path, amp):
    _, exact = supernet_run(tmp_path / "exact", settings(iterations=1))
    _, metrics = supernet_run(tmp_path / "first", settings(iterations=1, amp=amp))
    assert metrics["train/loss"] != exact["train/loss"]
    assert metrics["train/loss"] == pytest.approx(exact["train/loss"], rel=0.02)


class OneInfinite(Images):
    def batches(self, plan):
        for step, (images, labels) in enumerate(super().batches(plan), 1):
            yield images * (torch.inf if step == 2 else 1), labels


def test_the_scaler_has_its_say_before_a_loss_ends_the_run(tmp_path):
    with pytest.raises(UserError, match=r"loss of step 2 is not finite \(learning rate 0.3, path \[[0-3]"):
        supernet_run(tmp_path / "off", settings(iterations=5), images=OneInfinite())
    model, metrics = supernet_run(tmp_path / "fp16", settings(iterations=5, amp="fp16"), images=OneInfinite())
    assert load(newest(tmp_path / "fp16"), "supernet").content["scaler"]["scale"] <= 2**15
    assert all(p.isfinite().all() for p in model.parameters()) and metrics["train/loss"] > 0


def test_a_damaged_checkpoint_takes_nobodys_place(tmp_path):
    supernet_run(tmp_path, settings(iterations=6, save_every=2))
    (older, damaged) = checkpoints(tmp_path)[-2:]
    damaged.write_bytes(b"cut")
    with pytest.raises(UserError, match=r"--lr 0\.3"):
        supernet_run(tmp_path, settings(iterations=6, lr=0.3))
    assert damaged.exists()
    supernet_run(tmp_path, settings(iterations=6, save_every=1, keep=1))
    assert load(newest(tmp_path), "supernet").content["step"] == 6 and not older.exists()
    assert (tmp_path / f"{damaged.name}.damaged").read_bytes() == b"cut"


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path):
    class Poisoned(PathSampler):
        def candidate(self, step):
            if step == 4:
                model.first_conv[0].weight.data.fill_(float("nan"))
            return super().candidate(step)

    torch.manual_seed(0)
    model = ShuffleNetV2OneShot(space=SPACE)
    with pytest.raises(UserError, match="loss of step 4 is not finite"):
        supernet_run(tmp_path, settings(save_every=3, iterations=9), model, Poisoned(SPACE, 0))
    assert newest(tmp_path).name == "checkpoint-0000003.pth"


SIGNALS = (signal.SIGTERM, signal.SIGINT)


def stopping(number=signal.SIGTERM, times=1):
    """A sampler that sends this process a signal while step 4 is prepared."""
    sampler = PathSampler(SPACE, 0)
    candidate = sampler.candidate

    def sends(step):
        for _ in range(times * (step == 4)):
            os.kill(os.getpid(), number)
        return candidate(step)

    sampler.candidate = sends
    return sampler


def assert_resumes(folder, training, left):
    """The run in a folder takes the batches that are left, and ends as one that was never stopped."""
    images = Images()
    supernet_run(folder, training, images=images)
    assert images.taken == left
    supernet_run(folder / "straight", training)
    assert_same_end(folder, folder / "straight")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(tmp_path, number):
    args, sampler, handlers = settings(iterations=6), stopping(number), [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(SystemExit) as stopped:
        supernet_run(tmp_path, args, sampler=sampler)
    assert stopped.value.code == 128 + number
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-0000004.pth"]
    assert [signal.getsignal(s) for s in SIGNALS] == handlers
    assert_resumes(tmp_path, args, 2)


class Ending(Images):
    """`how()` is called while the batch of step `at` is waited for, which then still comes."""

    def __init__(self, at, how):
        super().__init__()
        self.at, self.how = at, how

    def batches(self, plan):
        for batch in super().batches(plan):
            if self.taken == self.at:
                self.how()
            yield batch


def kill(number):
    os.kill(os.getpid(), number)
    time.sleep(0)  # the handler runs


def fail(error=None):
    raise error or ValueError("no batch")  # from a data set in Python, say


def test_a_run_that_was_to_start_anew_says_what_resumes_it(tmp_path, caplog, monkeypatch):
    """Where torchrun restarts it, it resumes all the same; its settings on disk don't start it anew."""
    caplog.set_level("INFO", "spos")
    with pytest.raises(SystemExit):
        supernet_run(tmp_path, settings(iterations=5, resume="none"), images=Ending(4, lambda: kill(signal.SIGTERM)))
    assert "the same command without --resume none resumes from there" in caplog.text
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    caplog.clear()
    supernet_run(tmp_path, settings(iterations=5, resume="none"))
    assert "resuming at step 3" in caplog.text
    run = training_run(tmp_path, settings(iterations=5))
    run.start(torch.device("cpu"), 0, config={"resume": "none", "lr": 0.5})
    assert (tmp_path / "config.yml").read_text() == "supernet:\n  lr: 0.5\n"


@pytest.mark.parametrize("at, ends", [(4, signal.SIGTERM), (4, signal.SIGINT), (4, None), (1, signal.SIGTERM)])
def test_what_ends_the_wait_for_a_batch_leaves_the_last_step_saved(tmp_path, caplog, at, ends):
    """A signal, or an error of the loader."""
    how, error = (lambda: kill(ends), SystemExit) if ends else (fail, ValueError)
    caplog.set_level("INFO", "spos")
    with pytest.raises(error):
        supernet_run(tmp_path, settings(iterations=5), images=Ending(at, how))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-0000003.pth"] * (at == 4)
    assert ("the same command resumes from there" in caplog.text) == (at == 4)
    assert_resumes(tmp_path, settings(iterations=5), 6 - at)


def test_a_validation_that_fails_leaves_its_step_saved(tmp_path):
    with pytest.raises(ValueError, match="no batch"):
        supernet_run(tmp_path, settings(iterations=4, val_every=2), validate=lambda step: fail())
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-0000002.pth"]
    supernet_run(tmp_path, settings(iterations=4, val_every=2))
    assert [row["step"] for row in log_rows(tmp_path)] == [2, 4]


def _stopped_twice(folder, same_s):
    loop.SAME_SIGNAL_S = same_s
    supernet_run(folder, settings(), sampler=stopping(times=2))


@pytest.mark.parametrize("same_s, saved", [(0, []), (1000, ["checkpoint-0000004.pth"])])
def test_a_second_signal_ends_a_run_at_once(tmp_path, same_s, saved):
    """Unless it is the first one, sent twice."""
    run = started(_stopped_twice, tmp_path, same_s)
    run.join()
    assert run.exitcode == 128 + signal.SIGTERM and [path.name for path in checkpoints(tmp_path)] == saved


@dataclasses.dataclass(frozen=True)
class Later(Training):
    """Training with a setting that runs of before do not have."""

    average: bool = setting(False, "")


def test_a_run_of_before_a_setting_existed_resumes_to_the_bit(tmp_path, monkeypatch):
    supernet_run(tmp_path / "straight", settings(iterations=6))
    with pytest.raises(SystemExit):
        supernet_run(tmp_path / "old", settings(iterations=6), sampler=stopping())
    monkeypatch.setattr(training.checkpoint, "SUBJECTS", (*SUBJECTS, Later))
    for average, images in ((True, None), (False, Images())):
        run = training_run(tmp_path / "old", settings(iterations=6))
        run.settings["average"] = average
        torch.manual_seed(0)
        model, sampler = ShuffleNetV2OneShot(space=SPACE), PathSampler(SPACE, 0)
        how = (settings(iterations=6), sampler.candidate, lambda step: {"val/acc1": 1.0}, run)
        if average:
            with pytest.raises(UserError, match=r"--average True \(was False\)"):
                train(model, Images(), *how)
        else:
            train(model, images, *how)
            assert images.taken == 2
    assert_same_end(tmp_path / "old", tmp_path / "straight")


def test_a_signal_in_the_last_step_leaves_its_validation_to_the_next_run(tmp_path):
    args = settings(iterations=4)
    with pytest.raises(SystemExit):
        supernet_run(tmp_path, args, sampler=stopping())
    assert newest(tmp_path).name == "checkpoint-0000004.pth" and not log_rows(tmp_path)
    assert_resumes(tmp_path, args, 0)
    assert [(row["step"], row["val/acc1"]) for row in log_rows(tmp_path)] == [(4, 1.0)]


@pytest.mark.parametrize("killed", [False, True])
def test_the_last_validation_can_be_interrupted_and_loses_no_step(tmp_path, caplog, killed):
    """By a signal, or by a kill, after which only what is on disk is left."""
    args, saved = settings(iterations=4, save_every=100), []
    caplog.set_level("INFO", "spos")

    def validate(step):
        saved.append(newest(tmp_path))
        if killed:
            raise KeyError("killed")
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyError if killed else SystemExit):
        supernet_run(tmp_path, args, validate=validate)
    assert [path.name for path in saved] == ["checkpoint-0000004.pth"]
    if not killed:
        assert "resumes from there; the validation, 0 s so far, is done again" in caplog.text
    assert_resumes(tmp_path, args, 0)
    _, metrics = supernet_run(tmp_path, args)  # it is finished
    assert metrics["val/acc1"] == 1.0 and "validation_due" not in metrics


def test_a_signal_ends_a_validation_too(tmp_path):
    torch.manual_seed(0)
    model, done = ShuffleNetV2OneShot(space=SPACE), []

    def validate(step):
        if not done:
            os.kill(os.getpid(), signal.SIGTERM)
        done.append(step)
        return {"val/acc1": 1.0}

    args, sampler = settings(val_every=4, iterations=8), PathSampler(SPACE, 0)
    with pytest.raises(SystemExit) as stopped:
        supernet_run(tmp_path, args, model, validate=validate)
    assert stopped.value.code == 128 + signal.SIGTERM and not done
    assert newest(tmp_path).name == "checkpoint-0000004.pth" and model.training
    assert not (tmp_path / "log.jsonl").read_text()
    for expected in ([4, 8], [4, 8, 8]):  # the second time, as after a kill before the next checkpoint
        supernet_run(tmp_path, args, model, sampler, validate=lambda step: done.append(step) or {"val/acc1": step})
        rows = [(row["step"], row["val/acc1"], "validation_due" in row) for row in log_rows(tmp_path)]
        assert done == expected and rows == [(4, 4, False), (8, 8, False)]
        newest(tmp_path).unlink()


@pytest.mark.parametrize(("cpu_s", "threads", "warns"), [(0.2, 2, True), (1.5, 2, False), (0.2, 1, False)])
def test_threads_that_wait_for_each_other_are_said(tmp_path, monkeypatch, caplog, cpu_s, threads, warns):
    """A step takes a second, in which all threads compute for `cpu_s`; decoding is not counted."""
    calls = {"perf_counter": 0.0, "process_time": 0.0}

    def step(self, *args):
        calls["perf_counter"] += 1
        calls["process_time"] += cpu_s
        return train_one_step(self, *args)

    train_one_step = Step.train_one_step
    monkeypatch.setattr(Step, "train_one_step", step)
    monkeypatch.setattr(loop.torch, "get_num_threads", lambda: threads)
    for name in calls:
        monkeypatch.setattr(loop.time, name, lambda name=name: calls[name])
    caplog.set_level("INFO", "spos")
    supernet_run(tmp_path, settings(iterations=6))
    text = f"{threads} threads compute less than one would"
    assert (text in caplog.text) == ("try --threads 1" in caplog.text) == warns


# --- what is written down ------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """The time that `train` reads: a batch takes a second, which `Ticking` adds."""
    now = [1000.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    return now


class Ticking(Images):
    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def batches(self, plan):
        for batch in super().batches(plan):
            self.clock[0] += 1.0
            yield batch


def test_the_log_has_the_means_since_the_last_line_and_the_time_without_validations(
    tmp_path, monkeypatch, clock, caplog
):
    steps, train_one_step = [], Step.train_one_step

    def kept(recipe, step, images, labels, candidate=None):
        loss, logits = train_one_step(recipe, step, images, labels, candidate)
        steps.append((loss.item(), int((logits.argmax(1) == labels).sum())))
        clock[0] += 0.25
        return loss, logits

    def validate(step):
        clock[0] += 100.0
        return {"val/acc1": step / 2}

    monkeypatch.setattr(Step, "train_one_step", kept)
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    caplog.set_level("INFO", "spos")
    args = settings(iterations=7, val_every=4, save_every=4, weight_decay=0.01)
    _, metrics = supernet_run(tmp_path, args, images=Ticking(clock), validate=validate)
    rows, before = log_rows(tmp_path), 0
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    for row in rows:
        part = steps[before : row["step"]]
        assert row["train/loss"] == pytest.approx(sum(loss for loss, _ in part) / len(part), rel=1e-6)
        assert row["train/acc1"] == pytest.approx(sum(right for _, right in part) * 100 / (8 * len(part)))
        assert row["train/lr"] == pytest.approx(0.5 * (1 - row["step"] / 7))
        assert row["seconds"] == 1.25 * row["step"] and row["train/images_per_second"] == pytest.approx(8 / 1.25)
        assert row["train/wait_percent"] == pytest.approx(80)  # a batch takes 1 s, a step 0.25 s
        before = row["step"]
    assert [row.get("val/acc1") for row in rows] == [None, 2.0, None, 3.5]
    assert metrics == {name: value for name, value in rows[-1].items() if name != "step"}
    assert "images/s, waited for 80% of the time" in caplog.text
    assert "plan: 2 s for 2 more steps of 1.25 s, plus 1 validations; 3 checkpoints" in caplog.text
    assert "step 2/7 " in caplog.text and "lower --keep" not in caplog.text

    for path in checkpoints(tmp_path)[1:]:  # as if killed after step 4, and later lines were written
        path.unlink()
    del steps[4:]
    supernet_run(tmp_path, args, images=Ticking(clock), validate=validate)
    assert log_rows(tmp_path) == rows
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    for tag in ("train/loss", "val/acc1", "seconds"):
        expected = [(row["step"], pytest.approx(row[tag], rel=1e-5)) for row in rows if tag in row]
        assert [(e.step, e.value) for e in events.Scalars(tag)] == expected
    paths = [(e.step, e.histogram_value.num) for e in events.Histograms("paths/MFLOPs")]
    assert paths == [(2, 2), (4, 2), (6, 2), (7, 1)]
    mflops = [SPACE.flops(PathSampler(SPACE, 0).candidate(step)) / 1e6 for step in (5, 6)]
    assert events.Histograms("paths/MFLOPs")[2].histogram_value.sum == pytest.approx(sum(mflops))


def test_a_gpu_says_its_plan_with_the_first_line_of_the_log_from_steps_without_a_first_use(
    tmp_path, monkeypatch, clock, caplog
):
    """The model and the images of a pretended GPU stay on the CPU; its first 20 steps take ten times as long."""
    train_one_step = Step.train_one_step

    def timed(recipe, step, *args):
        clock[0] += 1.0 if step <= 20 else 0.1
        return train_one_step(recipe, step, *args)

    monkeypatch.setattr(Step, "train_one_step", timed)
    monkeypatch.setattr(nn.Module, "to", lambda module, *args, **kwargs: module)
    monkeypatch.setattr(loop, "_peak_memory", lambda device: 0)
    caplog.set_level("INFO", "spos")
    supernet_run(tmp_path, settings(iterations=60), device="cuda")
    lines = [text for text in caplog.messages if text.startswith(("plan:", "step "))]
    assert lines[0].startswith("plan: 1 s for 10 more steps of 0.1 s,") and lines[1].startswith("step 50/60 ")


def test_a_line_that_was_cut_short_is_removed(tmp_path):
    supernet_run(tmp_path, settings(iterations=4, val_every=2, save_every=2))
    newest(tmp_path).unlink()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('no JSON\n{"loss": 3}\n{"step": 1')
    supernet_run(tmp_path, settings(iterations=4, val_every=2, save_every=2))
    assert [row["step"] for row in log_rows(tmp_path)] == [2, 4]


def test_checkpoints_that_will_not_fit_on_the_disk_are_foretold(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loop.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    supernet_run(tmp_path, settings(iterations=6))
    assert "has 0.0 GB left, the checkpoints need 0.0 GB; lower --keep" in caplog.text


def test_a_folder_has_one_run_at_a_time_and_the_one_before_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(training.run, "hold_lock", lambda path, wait_s: utils.hold_lock(path))
    monkeypatch.setattr(training.run, "start_logging", lambda *_: None)
    folder, args = tmp_path / "run", settings(iterations=2, resume="none")
    for n in (0, 1, 2):
        if n:
            supernet_run(folder, settings(iterations=2, resume="auto"))
        first = training_run(folder, args)
        first.start(torch.device("cpu"), 0, anew=True)
        assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir() and p != folder) == ["run.1", "run.2"][:n]
        with pytest.raises(UserError, match="another run"):
            training_run(folder, args).start(torch.device("cpu"), 0)
        first.lock.close()
    assert newest(tmp_path / "run.1").name == newest(tmp_path / "run.2").name == "checkpoint-0000002.pth"


def test_both_scripts_have_the_official_defaults():
    for script, iterations in ((supernet, 150_000), (scratch, 300_000)):
        args = script.parse_args([])
        assert (args.iterations, args.batch_size, args.lr, args.warmup, args.momentum) == (
            iterations,
            1024,
            0.5,
            0,
            0.9,
        )
        assert (args.weight_decay, args.label_smoothing) == (4e-5, 0.1)
    args = supernet.parse_args([])
    assert (args.sampler, args.flops_bins, args.bn, args.bn_batches, args.bn_batch_size) == (
        "flops-uniform",
        7,
        "ema",
        200,
        128,
    )
    assert scratch.parse_args([]).bn_pass == 1250


# --- errors in a step, and signals of schedulers and terminals -------------------------------------------------


def failing(at, when, error):
    """A rule that fails at a step: in the forward pass after BN has counted the batch, or while weights change."""

    def rule(step, candidate, images, labels):
        logits = step.forward(candidate, images)
        if step.number == at and when == "forward":
            raise error
        if step.number == at:
            step.optimizer.step = types.MethodType(lambda *_, **__: (_ for _ in ()).throw(error), step.optimizer)
        yield step.criterion(logits, labels), logits

    return rule


def fails(folder, when, error, **changes):
    torch.manual_seed(0)
    run = training_run(folder, settings(**changes))
    run.settings |= {"rule": "spos"}
    train(
        ShuffleNetV2OneShot(space=SPACE), Images(), settings(**changes), PathSampler(SPACE, 0), None, run,
        rule=failing(4, when, error),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("micro_batch", "function"),
    [(None, None), (4, None), (None, "Step.learning_rate"), (None, "PathSampler.candidate")],
)
def test_an_error_before_the_update_loses_no_step(tmp_path, monkeypatch, micro_batch, function):
    """In the forward pass, or in a function that is asked before."""
    monkeypatch.setattr(training.run, "described", lambda thing: "")  # as the paper's rule, with which it resumes
    changes = {"iterations": 6, "micro_batch": micro_batch}
    error = ValueError("of the program")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="of the program"):
        if function:
            owner, name = function.split(".")
            known = getattr(globals()[owner], name)
            patch.setattr(globals()[owner], name, lambda own, step: fail(error) if step == 4 else known(own, step))
        fails(tmp_path / "failed", "forward", error, **changes)
    assert [path.name for path in checkpoints(tmp_path / "failed")] == ["checkpoint-0000003.pth"]
    for name in ("failed", "whole"):
        supernet_run(tmp_path / name, settings(**changes), validate=None)
    assert_same_end(tmp_path / "failed", tmp_path / "whole")


def test_an_error_in_the_update_or_in_saving_is_the_one_that_is_seen(tmp_path, monkeypatch, caplog):
    with pytest.raises(ValueError, match="half"):
        fails(tmp_path / "update", "update", ValueError("half of the weights"))
    assert not checkpoints(tmp_path / "update")
    monkeypatch.setattr(training.checkpoint, "save", lambda *_, **__: (_ for _ in ()).throw(UserError("disk full")))
    with pytest.raises(ValueError, match="first"):
        fails(tmp_path / "save", "forward", ValueError("the first error"))
    with pytest.raises(ValueError, match="no batch"):
        supernet_run(tmp_path / "wait", settings(iterations=5), images=Ending(4, fail))
    assert caplog.text.count("nothing is saved: disk full") == 2


@pytest.mark.parametrize(
    ("changes", "advice"),
    [({}, "--micro-batch 4"), ({"micro_batch": 4}, "--micro-batch 2"), ({"micro_batch": 2}, "--batch-size, with an")],
)
def test_out_of_memory_is_a_line_with_advice(tmp_path, changes, advice):
    texts = (
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    )
    for error in (RuntimeError(texts), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(UserError, match=f"^out of memory in step 4: [248] images .* GB; .*{advice}"):
            fails(tmp_path / type(error).__name__, "forward", error, **changes)


def test_out_of_memory_elsewhere_is_a_line(capsys):
    def main(error):
        raise error

    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError()):
        with pytest.raises(SystemExit, match="2"):
            utils.run_script(main, lambda error=error: error)
        stderr = capsys.readouterr().err
        assert "error: out of memory (" in stderr and "--eval-batch-size" in stderr and len(stderr.splitlines()) == 1
    with pytest.raises(RuntimeError, match="shape"):
        utils.run_script(main, lambda: RuntimeError("shape"))


def test_a_run_is_resumed_with_other_micro_batches(tmp_path, caplog):
    supernet_run(tmp_path, settings(iterations=2))
    supernet_run(tmp_path, settings(iterations=2, micro_batch=4))
    assert "--micro-batch 4 (was None)" in caplog.text


@pytest.mark.parametrize("number", utils.WARNINGS)
def test_a_warning_saves_and_a_signal_after_it_counts_as_the_first(tmp_path, number):
    sampler = stopping(number)
    sent = []

    class Twice(Images):
        """Sends a lost terminal's second SIGHUP, and Slurm's SIGTERM."""

        def batches(self, plan):
            for one in super().batches(plan):
                if self.taken == 4 and not sent:
                    sent.extend((number, signal.SIGTERM))
                    for again in sent:
                        os.kill(os.getpid(), again)
                yield one

    with pytest.raises(SystemExit) as stopped:
        supernet_run(tmp_path / "a", settings(), sampler=sampler)
    assert stopped.value.code == 128 + number
    with pytest.raises(SystemExit):
        supernet_run(tmp_path / "b", settings(), images=Twice())
    assert newest(tmp_path / "a").name == "checkpoint-0000004.pth" and newest(tmp_path / "b")


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with utils.signals(utils.interrupt):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_a_checkpoint_is_written_neither_stops_that_nor_is_forgotten(tmp_path, monkeypatch):
    save, sent = torch.save, []

    def slowly(content, file):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        save(content, file)

    monkeypatch.setattr(training.checkpoint.torch, "save", slowly)
    args = settings(iterations=6, save_every=2)
    with pytest.raises(SystemExit) as stopped:
        supernet_run(tmp_path, args)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-0000002.pth"]
    assert_resumes(tmp_path, args, 4)


def test_keep_bounds_the_checkpoints(tmp_path):
    supernet_run(tmp_path, settings(iterations=7, save_every=1, keep=2))
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-0000006.pth", "checkpoint-0000007.pth"]

"""The training recipe, resuming, and what a step leaves alone."""

import argparse
import itertools
import json

import pytest
import reference_spos
import torch
from torch import nn

import scratch
import supernet
from images.dataset import training_plan
from network import ShuffleNetV2, ShuffleNetV2OneShot
from space.sampler import PathSampler, default_flops_range
from space.search_space import SearchSpace
from training.checkpoint import checkpoints, load, newest
from training.loop import train
from training.recipe import dropout_seed, learning_rate, parameter_groups
from training.run import TrainingRun
from utils import UserError

SPACE = SearchSpace(input_size=32, n_classes=3, stem_stride=1)


class Images:
    """A loader of random images whose batch is a pure function of the step, as the real ones are."""

    images = range(64)

    def batches(self, plan):
        for batch in plan:
            generator = torch.Generator().manual_seed(int(batch[:, 1].sum()))
            yield torch.rand(len(batch), 3, 32, 32, generator=generator) * 255, torch.from_numpy(batch[:, 1] % 3)


def settings(**changes):
    values = {
        "iterations": 20, "batch_size": 8, "lr": 0.5, "warmup": 0, "momentum": 0.9, "weight_decay": 4e-5, "label_smoothing": 0.1,
        "seed": 0, "amp": "off", "val_every": 1000, "save_every": 1000, "keep": 3, "resume": "auto",
        "loader": "torchvision",
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


def supernet_run(folder, args, model=None, sampler=None):
    torch.manual_seed(0)
    model = model or ShuffleNetV2OneShot(space=SPACE)
    sampler = sampler or PathSampler(SPACE, args.seed)
    stored = {"space": SPACE.to_dict(), "data": {}, "split": None, "classes": ["a", "b", "c"]}
    folder.mkdir(parents=True, exist_ok=True)
    run = TrainingRun(args, folder, torch.device("cpu"), "supernet", stored)
    if args.resume == "none":
        run.start()
    metrics = train(run, model, Images(), lambda step: {"val/acc1": 1.0}, sampler.candidate)
    return model, metrics


def test_learning_rate_is_the_official_line():
    assert learning_rate(1, 150_000, 0.5) == 0.5 * (1 - 1 / 150_000)
    assert learning_rate(75_000, 150_000, 0.5) == 0.25
    assert learning_rate(150_000, 150_000, 0.5) == 0
    assert [learning_rate(k, 10, 1.0, warmup=4) for k in (1, 2, 4, 5)] == pytest.approx([0.9 / 4, 0.8 / 2, 0.6, 0.5])


@pytest.mark.parametrize("affine", [False, True])
def test_only_weights_with_more_than_one_dimension_decay(affine):
    model = ShuffleNetV2([0] * 20, affine=affine, space=SPACE)
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

    images = range(96)

    def batches(self, plan):
        return ((images.double(), labels) for images, labels in itertools.islice(super().batches(plan), 3))


@pytest.mark.parametrize("kind", ["supernet", "scratch"])
def test_three_steps_in_float64_are_those_of_the_reference(tmp_path, kind):
    """Our networks, sampler and recipe in our loop, against the reference's networks and SGD written out, to 1e-8.

    The learning rate falls as over the official number of iterations; later steps prove nothing, since training is chaotic.
    """
    iterations, sampler, fixed = 150_000, PathSampler(SPACE, 0, default_flops_range(SPACE)), (0, 1, 2, 3) * 5
    torch.manual_seed(0)
    if kind == "supernet":
        model = ShuffleNetV2OneShot(space=SPACE).double()
        reference = reference_spos.Network(None, 3, False, stem_stride=1, last_size=2).double()
        steps = [(sampler.candidate(step),) for step in (1, 2, 3)]
        assert len(set(steps)) == 3
    else:
        model = ShuffleNetV2(fixed, space=SPACE).double()
        reference = reference_spos.Network(fixed, 3, True, stem_stride=1, last_size=2).double()
        steps = [()] * 3
    reference.load_state_dict(model.state_dict(), strict=True)
    start = {name: tensor.clone() for name, tensor in reference.state_dict().items()}

    momentum = {}
    for k, (path, (images, labels)) in enumerate(zip(steps, ThreeBatches().batches(training_plan(96, 32, 0))), 1):
        torch.manual_seed(dropout_seed(0, k))
        log_p = reference(images, *path).log_softmax(1)
        loss = -(0.9 * log_p[range(32), labels] + 0.1 * log_p.mean(1)).mean()
        reference.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in reference.named_parameters():
                if p.grad is not None:
                    gradient = p.grad + (4e-5 * p if p.ndim > 1 else 0)
                    momentum[name] = 0.9 * momentum[name] + gradient if name in momentum else gradient
                    p -= 0.5 * (1 - k / iterations) * momentum[name]

    run = TrainingRun(
        settings(iterations=iterations, batch_size=32, save_every=3), tmp_path, torch.device("cpu"), kind, {}
    )
    train(run, model, ThreeBatches(), None, sampler.candidate if kind == "supernet" else None)
    assert newest(tmp_path).name == "checkpoint-0000003.pth"
    ours, theirs, moved = model.state_dict(), reference.state_dict(), 0
    for name, expected in theirs.items():
        scale = expected.abs().max()
        if name.endswith("running_mean"):  # of what BN has just centred the mean is 0, and its digits are rounding
            scale = max(scale, theirs[name.replace("mean", "var")].max().sqrt())
        assert (ours[name] - expected).abs().max() <= 1e-8 * scale, name
        moved += not torch.equal(expected, start[name])
    assert moved == len(start) if kind == "scratch" else 200 < moved < len(start)


def test_what_is_not_sampled_stays_as_it_is(tmp_path):
    """Operations not sampled stay bit-identical, momentum included, although earlier steps moved them."""

    class TwoPaths:
        def candidate(self, step):
            return (0,) * 20 if step <= 5 else (1,) * 20

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
    images, path = torch.rand(8, 3, 32, 32).double() * 255, PathSampler(SPACE, 0).candidate(1)
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


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_ends_bit_identical(tmp_path, stop):
    straight, metrics = supernet_run(tmp_path / "a", settings(iterations=8))
    args = settings(iterations=8, save_every=stop)
    supernet_run(tmp_path / "b", args)
    for path in checkpoints(tmp_path / "b"):
        if path.stem != f"checkpoint-{stop:07d}":
            path.unlink()
    resumed, again = supernet_run(tmp_path / "b", args)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values()))
    last = json.loads((tmp_path / "b" / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 8 and again["val/acc1"] == metrics["val/acc1"]


@pytest.mark.parametrize("key", ["optimizer", "rows", "settings"])
def test_a_checkpoint_that_lacks_what_training_needs_is_a_line(tmp_path, key):
    supernet_run(tmp_path, settings(iterations=2))
    content = torch.load(newest(tmp_path))
    del content[key]
    torch.save(content, newest(tmp_path))
    with pytest.raises(UserError, match=rf"has no {key} to resume from.*--out.*--resume none"):
        supernet_run(tmp_path, settings(iterations=2))


def test_a_run_with_other_settings_is_refused(tmp_path):
    supernet_run(tmp_path, settings(iterations=2))
    with pytest.raises(UserError, match=r"--lr 0.3 \(was 0.5\).*--out.*--resume none"):
        supernet_run(tmp_path, settings(iterations=2, lr=0.3))
    with pytest.raises(UserError, match=r"--loader synthetic \(was torchvision\)"):
        supernet_run(tmp_path, settings(iterations=2, loader="synthetic"))
    supernet_run(tmp_path, settings(iterations=2, keep=7))  # harmless
    before = (tmp_path / "checkpoint-0000002.pth").read_bytes()
    supernet_run(tmp_path, settings(iterations=2, lr=0.3, resume="none"))
    assert tmp_path.with_suffix(".1").joinpath("checkpoint-0000002.pth").read_bytes() == before
    assert load(newest(tmp_path), "supernet").content["settings"]["lr"] == 0.3


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_float32_weights_and_resumes_bit_identical(tmp_path, amp):
    _, exact = supernet_run(tmp_path / "exact", settings(iterations=1))
    _, metrics = supernet_run(tmp_path / "first", settings(iterations=1, amp=amp))
    assert metrics["train/loss"] != exact["train/loss"] and metrics["train/loss"] == pytest.approx(
        exact["train/loss"], rel=0.02
    )
    args = settings(iterations=6, amp=amp, save_every=3, lr=0.01)
    straight, metrics = supernet_run(tmp_path / "run", args)
    assert {p.dtype for p in straight.parameters()} == {torch.float32}
    (tmp_path / "run" / "checkpoint-0000006.pth").unlink()
    resumed, again = supernet_run(tmp_path / "run", args)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values()))
    assert again["train/loss"] == metrics["train/loss"]


class OneInfinite(Images):
    def batches(self, plan):
        for step, (images, labels) in enumerate(super().batches(plan), 1):
            yield images * (torch.inf if step == 2 else 1), labels


def test_the_scaler_has_its_say_before_a_loss_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("test_training.Images", OneInfinite)
    with pytest.raises(UserError, match=r"loss of step 2 is not finite \(learning rate 0.3, path \[[0-3]"):
        supernet_run(tmp_path / "off", settings(iterations=5))
    model, metrics = supernet_run(tmp_path / "fp16", settings(iterations=5, amp="fp16"))
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


def test_keep_bounds_the_checkpoints(tmp_path):
    supernet_run(tmp_path, settings(iterations=7, save_every=1, keep=2))
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-0000006.pth", "checkpoint-0000007.pth"]


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


def test_a_signal_saves_and_ends(tmp_path):
    import os
    import signal

    class Stopping(PathSampler):
        def candidate(self, step):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().candidate(step)

    with pytest.raises(SystemExit) as stopped:
        supernet_run(tmp_path, settings(), sampler=Stopping(SPACE, 0))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert newest(tmp_path).name == "checkpoint-0000004.pth"


def test_a_signal_ends_a_validation_too(tmp_path):
    import os
    import signal

    torch.manual_seed(0)
    model, done = ShuffleNetV2OneShot(space=SPACE), []

    def validate(step):
        if not done:
            os.kill(os.getpid(), signal.SIGTERM)
        done.append(step)
        return {"val/acc1": 1.0}

    stored = {"space": SPACE.to_dict(), "data": {}, "split": None, "classes": ["a", "b", "c"]}
    run = TrainingRun(settings(val_every=4, iterations=8), tmp_path, torch.device("cpu"), "supernet", stored)
    with pytest.raises(SystemExit) as stopped:
        train(run, model, Images(), validate, PathSampler(SPACE, 0).candidate)
    assert stopped.value.code == 128 + signal.SIGTERM and not done
    assert newest(tmp_path).name == "checkpoint-0000004.pth" and model.training
    assert not (tmp_path / "log.jsonl").read_text()
    for expected in ([4, 8], [4, 8, 4, 8]):  # the second time, as after a kill before the next checkpoint
        train(
            run, model, Images(), lambda step: done.append(step) or {"val/acc1": step}, PathSampler(SPACE, 0).candidate
        )
        rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert done == expected and [(row["step"], row["val/acc1"], "validation_due" in row) for row in rows] == [
            (4, 4, False),
            (8, 8, False),
        ]
        newest(tmp_path).unlink()


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

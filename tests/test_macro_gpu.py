"""The ways to train a supernet of bench/macro_gpu.py: images in memory, paths, the step; a small run resumes."""

import dataclasses
import json
import random
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT

from bench import macro_gpu as gpu
from bench.study import tau
from images.dataset import evaluation_plan
from network import ShuffleNetV2OneShot
from settings.subjects import Training
from space import own
from space.custom import _fields
from space.search_space import SearchSpace
from training.step import Step, dropout_seed

FAIR = gpu.Way(fair=True)


@pytest.fixture(scope="module")
def space():
    own.load(gpu.macro.OPERATIONS)
    section = yaml.safe_load(gpu.macro.SETTINGS.read_text())["space"]
    for part in (section["stem"], section["last"], *section["stages"]):
        part["channels"] //= 4  # with 8 torch 2.14 crashes in a backward pass on CPUs without AVX-512
    return SearchSpace(input_size=32, n_classes=10, **_fields(section, "macro.yml"))


def make_arrays(per_class, size=8):
    """As `decoded` returns them: `per_class` images of each class."""
    pixels = np.random.default_rng(0).integers(1, 256, (10 * per_class, size, size, 3), np.uint8)
    return {"train": pixels, "train_labels": np.repeat(np.arange(10), per_class)}


def test_images_in_memory(monkeypatch):
    monkeypatch.setattr(gpu, "HELD_OUT", 3)
    arrays = make_arrays(13)
    loader, scored = gpu.loaders(arrays, "cpu")
    ((heldout, labels),) = scored.batches(evaluation_plan(len(scored.images), 50))
    assert torch.bincount(labels).tolist() == [3] * 10
    assert np.array_equal(heldout[0].permute(1, 2, 0).numpy(), arrays["train"][10][..., ::-1])  # BGR
    (samples,) = evaluation_plan(len(loader.images), 100)
    ((images, labels),) = loader.batches([samples])
    assert images.shape == (100, 3, 8, 8) and torch.bincount(labels).tolist() == [10] * 10
    of_training = [i for i in range(130) if i % 13 < 10]
    seen = set()
    for index, image in zip(of_training, images):
        source = np.pad(arrays["train"][index][..., ::-1], ((4, 4), (4, 4), (0, 0)))
        places = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (1, -1)
            if np.array_equal(image.permute(1, 2, 0).numpy()[:, ::flip], source[top : top + 8, left : left + 8])
        ]
        assert len(places) == 1
        seen |= {*places}
    assert len(seen) > 60
    ((again, _),) = loader.batches([samples])
    ((other, _),) = gpu.loaders(arrays, "cpu", seed=1)[0].batches([samples])
    assert torch.equal(again, images) and not torch.equal(other, images)


def test_the_paths_of_the_ways(space):
    steps = range(1, 400)
    distinct = gpu.sampler_of(gpu.Way(distinct=True), space, 0)
    assert {"".join(map(str, distinct(step))) for step in steps} < {*gpu.macro.some_distinct()}
    split, uniform = (gpu.sampler_of(way, space, 0) for way in (gpu.Way(first=(1, 2)), gpu.Way()))
    assert {split(step)[0] for step in steps} == {1, 2} and {uniform(step)[0] for step in steps} == {0, 1, 2}
    assert all(split(step)[1:] == uniform(step)[1:] for step in steps) and split(7) == split(7)


def test_a_fair_step_is_one_update_of_paths_that_have_every_operation_once(space):
    model = gpu.supernet_of(FAIR, space, 0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    settings = Training(iterations=4, batch_size=12, lr=0.1, weight_decay=0.0, momentum=0.0)
    step = Step(model.train(), settings, rule=gpu.strictly_fair)
    paths, forward = [], step.forward
    step.forward = lambda path, images: paths.append(path) or forward(path, images)
    images, labels = torch.rand(12, 3, 32, 32) * 255, torch.arange(12) % 10
    _, logits = step.train_one_step(1, images, labels, space.random_candidate(random.Random(0)))
    assert len(logits) == 12 and all(sorted(block) == [0, 1, 2] for block in zip(*paths))
    gradients = {name: p.grad for name, p in model.named_parameters()}

    expected = dict.fromkeys(before, 0)
    networks = [ShuffleNetV2OneShot(space=space).train().to(memory_format=torch.channels_last) for _ in paths]
    torch.manual_seed(dropout_seed(0, 1))
    for alone, path, part, answers in zip(networks, paths, images.chunk(3), labels.chunk(3)):
        alone.load_state_dict({**model.state_dict(), **before})
        torch.nn.functional.cross_entropy(alone(part, path), answers, label_smoothing=0.1).backward()
        for name, p in alone.named_parameters():
            if p.grad is not None:
                expected[name] = expected[name] + p.grad / (1 if name.startswith("features") else 3)
    assert all(torch.is_tensor(gradient) for gradient in expected.values())  # every operation got one
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-2, atol=1e-3, msg=name)


def test_two_supernets_are_scored_each_on_its_networks(tmp_path):
    args = types.SimpleNamespace(out=tmp_path, full=False)
    for loss, way in enumerate(gpu.SPLIT):
        folder = gpu.folder_of(args, way, 0)
        folder.mkdir()
        scores = {"seconds": 5, "scores": {network: [loss, 50] for network in ("00000000", "12000000", "20000000")}}
        (folder / "scores.json").write_text(json.dumps(scores))
    losses, _, seconds = gpu.read_scores(args, gpu.SPLIT, 0)
    assert losses == {"00000000": 0, "12000000": 1, "20000000": 1} and seconds == 10
    assert gpu.read_scores(args, gpu.SPLIT, 1) is None


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])])  # fmt: skip
def test_a_small_study_resumes(tmp_path, device):
    np.savez(tmp_path / "images.npz", **make_arrays(260, 32))
    words = ["--out", tmp_path, "--results", tmp_path / "results.json", "--ways", "baseline", "strictly fair"]
    words += ["--share", 0.0004, "--networks", 6, "--jobs", 2, "--device", device]
    command = [sys.executable, "-m", "bench.macro_gpu", *map(str, words)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "results.json").read_text())["half"]
    assert {name: list(rows) for name, rows in results["taus"].items()} == {
        "baseline": ["0", "1"],
        "strictly fair": ["0", "1"],
    }
    assert len(results["networks"]) == 6 and [len(seed) for seed in results["loss"]] == [6, 6]
    folder = tmp_path / "half-strictly-fair-1"
    scores = (folder / "scores.json").read_text()
    (folder / "scores.json").unlink()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(again.stdout.splitlines()) == sorted(first.stdout.splitlines())
    assert json.loads((folder / "scores.json").read_text()) == json.loads(scores)


def test_full_width_differs_in_what_it_says():
    way = gpu.FULL_WAYS["strictly fair"]
    assert way == dataclasses.replace(FAIR, width=1.0, batch_size=170, lr=0.2, amp="bf16", images=5_000_000)
    assert gpu.FULL_WAYS["float32"].amp == "off"


def test_the_committed_agreement_follows_from_the_committed_scores():
    results, truth = json.loads(gpu.RESULTS.read_text())["half"], gpu.macro.load_truth()
    true = [truth[network]["mean_acc"] for network in results["networks"]]
    for seed, (losses, acc1) in enumerate(zip(results["loss"], results["acc1"])):
        row = results["taus"]["baseline"][str(seed)]
        assert tau([-loss for loss in losses], true) == pytest.approx(row["all"]["loss"][0], abs=2e-3)
        assert tau(acc1, true) == pytest.approx(row["all"]["top-1"][0], abs=2e-3)
        assert np.mean(acc1) == pytest.approx(row["acc1"][0], abs=2e-3)
    assert len(true) == 3969 and len(results["loss"]) == 2


def test_the_committed_scores_of_resized_crops_have_the_agreement_in_the_docs():
    found, truth = json.loads(gpu.RESULTS.read_text())["resized crops, seed 0"], gpu.macro.load_truth()
    text = (ROOT / "docs" / "experiments.md").read_text()
    words = {
        "BN of resized crops": "has {:.2f} by loss and {:.2f} by top-1",
        "BN of plain images": "have {:.2f} and {:.2f}",
    }
    for name, scores in found.items():
        true = [truth[network]["mean_acc"] for network in scores]
        loss, acc1 = ([row[i] for row in scores.values()] for i in (0, 1))
        taus = -tau(loss, true), tau(acc1, true)
        assert len(true) == 600 and words[name].format(*taus) in text.replace("\n  ", " ")

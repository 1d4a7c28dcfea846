"""BN recalibration and exact accuracy."""

import copy
import dataclasses
import itertools
import math
import random
import weakref

import numpy as np
import pytest
import torch
from conftest import tree_logits
from torch import nn

import blocks
from network import ShuffleNetV2OneShot, batch_norms, fold_bn
from space.search_space import SearchSpace
from training.evaluation import (
    accuracy,
    evaluate,
    evaluate_in_lists,
    losses,
    recalibrate_bn,
    resolve_device,
    standard_error,
)

SPACE = SearchSpace(
    input_size=16, n_classes=7, stem_stride=1, stage_strides=(2, 2), stage_blocks=(6, 6), stage_channels=(8, 16),
    stem_channels=4, last_channels=16,
)  # fmt: skip
PATHS = [(0, 1, 2, 3) * 3, (3, 2, 1, 0) * 3]


def batches(n, size, seed=0, ragged=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [size] * n + [ragged] * bool(ragged)
    return [
        (torch.rand(s, 3, 16, 16, generator=generator) * 255, torch.randint(0, 7, (s,), generator=generator))
        for s in sizes
    ]


@pytest.fixture
def supernet():
    """A supernet whose BN statistics are those of no batch, nor 0 and 1: what they were must not show in any result."""
    torch.manual_seed(0)
    supernet = ShuffleNetV2OneShot(space=SPACE)
    for norm in batch_norms(supernet):
        norm.running_mean.fill_(100.0)
        norm.running_var.fill_(10_000.0)
        norm.num_batches_tracked.fill_(7)
    return supernet


def stem_statistics(supernet, data):
    """Per batch: mean (C,) and unbiased variance (C,) of what the stem's BN sees."""
    with torch.no_grad():
        outputs = [supernet.first_conv[0](x) for x, _ in data]
    return [o.mean((0, 2, 3)) for o in outputs], [o.var((0, 2, 3)) for o in outputs]


def test_average_is_the_plain_mean_over_batches(supernet):
    data = batches(5, 8)
    recalibrate_bn(supernet, lambda x: supernet(x, PATHS[0]), data, "average")
    means, variances = stem_statistics(supernet, data)
    norm = supernet.first_conv[1]
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))


def test_ema_is_the_official_exponential_average(supernet):
    data = batches(5, 8)
    recalibrate_bn(supernet, lambda x: supernet(x, PATHS[0]), data)
    mean, variance = 0, 1
    for m, v in zip(*stem_statistics(supernet, data)):
        mean, variance = 0.9 * mean + 0.1 * m, 0.9 * variance + 0.1 * v
    norm = supernet.first_conv[1]
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.momentum == 0.1 and norm.num_batches_tracked == 5
    assert not norm.training and not supernet.dropout.training


def relatives(n, seed=0):
    """Candidates that share first blocks of several lengths, as those of a generation do, and one of them twice."""
    rng = random.Random(seed)
    first = SPACE.random_candidate(rng)
    others = [
        first[:k] + SPACE.random_candidate(rng)[k:] for k in (rng.randrange(SPACE.n_blocks) for _ in range(n - 2))
    ]
    return [first, *others, first]


def recalibrated_by_hand(supernet, candidate, batches, mode):
    """A copy whose BN statistics are those of the batches, by torch's modules alone."""
    single = copy.deepcopy(supernet).eval()
    for norm in batch_norms(single):
        norm.reset_running_stats()
        norm.train()
        norm.momentum = 0.1 if mode == "ema" else None  # None: torch's own plain average
    with torch.no_grad():
        for images, _ in batches:
            single(images, candidate)
    return single.eval()


@pytest.mark.parametrize("mode, fold", [("ema", True), ("ema", False), ("average", True)])
def test_the_tree_is_bit_equal_to_one_candidate_after_the_other(supernet, mode, fold):
    """Against the supernet's own forward pass on one path; BN statistics start from 0 and 1, which "ema" would show."""
    supernet.to(memory_format=torch.channels_last)
    candidates, calibration, ((images, _),) = relatives(5), batches(3, 4), batches(1, 8, 1)
    logits = tree_logits(supernet, candidates, calibration, images, mode, fold=fold)
    assert logits.keys() == set(candidates)
    for candidate in logits:
        single = recalibrated_by_hand(supernet, candidate, calibration, mode)
        if fold:
            single = fold_bn(single)
        with torch.inference_mode():
            assert torch.equal(logits[candidate], single(images, candidate))


def test_folded_and_unfolded_agree(supernet):
    (images, _), *calibration = batches(4, 16)
    logits = {fold: tree_logits(supernet, PATHS, calibration, images, "average", fold=fold) for fold in (True, False)}
    for path in PATHS:
        a, b = logits[True][path], logits[False][path]
        assert not torch.equal(a, b) and (a - b).abs().max() < 1e-4 * b.abs().max()


def test_a_common_prefix_is_computed_once(supernet):
    candidates, calls = relatives(6), []
    for block in supernet.features:
        for operation in block:
            operation.register_forward_hook(lambda *_: calls.append(1))
    list(
        evaluate(
            supernet,
            candidates,
            batches(2, 4),
            [(torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64))],
            fold=False,
        )
    )
    prefixes = {candidate[:k] for candidate in candidates for k in range(1, SPACE.n_blocks + 1)}
    assert len(calls) == 3 * len(prefixes) < 3 * SPACE.n_blocks * len(set(candidates))


def test_activations_live_no_longer_than_a_path_needs_them(supernet):
    """Walked breadth first, a tree of n candidates that part at the first block would hold n activations at a time."""
    rng, alive, most = random.Random(0), [], [0]
    candidates = [SPACE.random_candidate(rng) for _ in range(16)]

    def count(_module, _inputs, output):
        alive.append(weakref.ref(output))
        most[0] = max(most[0], sum(ref() is not None for ref in alive))

    for module in (supernet.first_conv, *(operation for block in supernet.features for operation in block)):
        module.register_forward_hook(count)
    evaluate(supernet, candidates, batches(1, 2), batches(1, 2), fold=False)
    assert len(alive) > 16 * 10 and most[0] <= 6


def test_the_supernet_is_left_as_it_was(supernet):
    supernet.train()
    before = copy.deepcopy(supernet.state_dict())
    evaluate(supernet, PATHS, batches(2, 8), batches(1, 8))
    after = supernet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    supernet.train()
    supernet(batches(1, 8)[0][0], PATHS[0]).sum().backward()


def test_bf16_is_near_and_its_logits_are_float(supernet):
    (images, _), *calibration = batches(4, 16)
    logits = {amp: tree_logits(supernet, PATHS, calibration, images, "average", amp=amp) for amp in ("off", "bf16")}
    for path in PATHS:
        a, b = logits["off"][path], logits["bf16"][path]
        assert b.dtype == torch.float32 and not torch.equal(a, b)
        assert (a - b).abs().mean() < a.std()  # logits that have nothing in common: 1.1 of these


def test_a_result_does_not_depend_on_what_was_evaluated_before(supernet):
    """Nor on what is evaluated with it, or in which order."""
    candidates, calibration, validation = relatives(4), batches(2, 4), batches(2, 8, 1, ragged=3)

    def results(candidates):
        return [{**result, "seconds": 0} for result in evaluate(supernet, candidates, calibration, validation)]

    together = results(candidates)
    assert together == [result for candidate in candidates for result in results([candidate])]
    assert together[::-1] == results(candidates[::-1])


def test_an_operation_that_changes_its_input_in_place_changes_no_other_candidate(monkeypatch):
    class InPlace(nn.Sequential):
        def __init__(self, shape, width, affine):
            layers = blocks.conv_bn(shape.in_channels, shape.out_channels, 1, shape.stride, affine=affine, relu=False)
            super().__init__(nn.Hardswish(inplace=True), *layers)

    monkeypatch.setitem(blocks.OPERATIONS, "in_place", InPlace)
    stage = {"stage_strides": (1,), "stage_blocks": (3,), "stage_channels": (4,)}
    space = dataclasses.replace(SPACE, **stage, operations=("skip_1x1", "in_place"))
    supernet = ShuffleNetV2OneShot(space=space)
    candidates = list(itertools.product((0, 1), repeat=3))
    together = evaluate(supernet, candidates, batches(2, 4), batches(2, 8, 1))
    alone = [evaluate(supernet, [c], batches(2, 4), batches(2, 8, 1))[0] for c in candidates]
    assert [r["loss"] for r in together] == [r["loss"] for r in alone]


def test_a_few_at_a_time_have_the_results_of_all_at_once(supernet):
    """And come as soon as they exist: each list has a pass over the images of its own."""
    passes, candidates, validation = [], list(map(list, relatives(8))), batches(2, 16, 1, ragged=3)

    class Calibration:
        def __iter__(self):
            passes.append(1)
            return iter(batches(3, 8))

    results = evaluate_in_lists(supernet, candidates, Calibration(), validation)
    found, n_passes = [], []
    for result in results:
        found.append((result["architecture"], result["acc1"], result["acc5"]))
        n_passes.append(len(passes))
    whole = evaluate(supernet, candidates, batches(3, 8), validation)
    whole = {tuple(r["architecture"]): (r["acc1"], r["acc5"]) for r in whole}
    assert sorted(found) == sorted((list(c), *accuracies) for c, accuracies in whole.items())
    assert n_passes == [1] * 5 + [2] * (len(whole) - 5) and len(whole) > 5


def test_a_result_says_what_was_measured(supernet):
    (result,) = evaluate(supernet, PATHS[:1], batches(2, 8), batches(2, 16, 1, ragged=3))
    assert result["architecture"] == list(PATHS[0])
    assert result["n_images"] == 35 and 0 <= result["acc1"] <= result["acc5"] <= 100 and result["seconds"] >= 0


class Halved(list):
    """Batches that tell which of their images are in the second half."""

    second_halves = None


def test_both_halves_of_the_images_have_results_that_make_up_the_whole(supernet):
    calibration, validation = batches(2, 8), Halved(batches(2, 16, 1, ragged=3))
    torch.manual_seed(0)
    validation.second_halves = [torch.rand(len(labels)) < 0.4 for _, labels in validation]
    halved = evaluate(supernet, PATHS, calibration, validation)
    parts = [[(images[which], labels[which]) for (images, labels), which in
              zip(validation, (mask == half for mask in validation.second_halves))]
             for half in (0, 1)]  # fmt: skip
    whole, *alone = (evaluate(supernet, PATHS, calibration, images) for images in (list(validation), *parts))
    for result, plain, *halves in zip(halved, whole, *alone):
        found = result.pop("halves")
        assert {**result, "seconds": 0} == {**plain, "seconds": 0}
        for key in ("acc1", "loss"):
            assert found[key] == pytest.approx([half[key] for half in halves], rel=1e-4)


def test_the_standard_error_is_that_of_groups(supernet):
    """Of groups of one, the binomial one; of images that are right or wrong together, as of so many fewer images."""
    hits = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 1, 1, 0])
    alone = standard_error(hits, torch.ones(10))
    assert alone == pytest.approx(100 * (0.6 * 0.4 / 9) ** 0.5)
    assert standard_error(4 * hits, torch.full((10,), 4)) == pytest.approx(alone)
    assert standard_error(torch.tensor([3.0, 3, 2]), torch.tensor([5, 5, 5])) < alone
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, 40)
    chance = rng.random((3000, 40)) < 0.5  # whether the images of a group are right, in repeated experiments
    errors = [standard_error(torch.tensor(sizes * row).double(), torch.tensor(sizes)) for row in chance]
    assert np.mean(errors) == pytest.approx(100 * np.std(chance @ sizes / sizes.sum()), rel=0.05)


def test_a_result_has_the_standard_error_of_its_groups(supernet):
    calibration, validation = batches(2, 8), Halved(batches(2, 16, 1, ragged=3))
    groups = torch.arange(35) % 11
    (plain,) = evaluate(supernet, PATHS[:1], calibration, list(validation))
    validation.second_halves = [None] * 3
    validation.groups = torch.bincount(groups), groups.split(16)
    (result,) = evaluate(supernet, PATHS[:1], calibration, validation)
    logits = tree_logits(supernet, PATHS[:1], calibration, torch.cat([images for images, _ in validation]))
    right = logits[PATHS[0]].argmax(1) == torch.cat([labels for _, labels in validation])
    expected = standard_error(torch.bincount(groups[right], minlength=11).double(), torch.bincount(groups))
    assert result.pop("acc1_error") == pytest.approx(expected) and expected > 0
    assert {**result, "seconds": 0} == {**plain, "seconds": 0}


def test_the_loss_is_the_mean_cross_entropy_in_any_batches(supernet):
    calibration, (whole,) = batches(2, 8), batches(1, 35, 1)
    logits = tree_logits(supernet, PATHS, calibration, whole[0])
    for batch_size in (35, 16):
        parts = list(zip(*(x.split(batch_size) for x in whole)))
        for result in evaluate(supernet, PATHS, calibration, parts):
            expected = torch.nn.functional.cross_entropy(logits[tuple(result["architecture"])], whole[1]).item()
            assert result["loss"] == pytest.approx(expected, rel=1e-4) and expected > 0.1


def test_a_sum_of_losses_does_not_depend_on_the_order():
    logits = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0)) * 9
    labels = torch.arange(1000) % 7
    total = losses(logits, labels).sum()
    parts = [losses(x, y).sum() for x, y in zip(logits.split(3), labels.split(3))]
    assert sum(parts) == sum(parts[::-1]) == total == total.round()


def test_a_loss_that_is_not_finite_is_none(supernet):
    nothing = torch.full((3, 3, 16, 16), math.nan)
    (result,) = evaluate(supernet, PATHS[:1], batches(2, 8), [(nothing, torch.zeros(3, dtype=torch.long))])
    assert result["loss"] is None


def test_threads_are_those_that_are_asked_for():
    try:
        assert resolve_device("cpu", 2).type == "cpu" and torch.get_num_threads() == 2
        resolve_device("cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_accuracy_is_exact_over_ragged_batches():
    logits = torch.randn(23, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 7, (23,), generator=torch.Generator().manual_seed(1))
    order = logits.argsort(1, descending=True)
    top1 = sum(int(row[0] == label) for row, label in zip(order, labels)) / 23 * 100
    top5 = sum(int(label in row[:5]) for row, label in zip(order, labels)) / 23 * 100
    for size in (23, 8, 1):
        data = zip(logits.split(size), labels.split(size))
        assert accuracy(lambda x: x, data) == (pytest.approx(top1, abs=1e-9), pytest.approx(top5, abs=1e-9), 23)


def test_top5_of_fewer_than_five_classes_is_all():
    data = [(torch.eye(3), torch.tensor([0, 2, 1]))]
    assert accuracy(lambda x: x, data) == (pytest.approx(100 / 3), 100.0, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_agrees(supernet):
    (images, _), *calibration = batches(4, 16)
    logits = {}
    for device in ("cpu", "cuda"):
        there = supernet.to(device, memory_format=torch.channels_last), [(x.to(device), y) for x, y in calibration]
        found = tree_logits(there[0], relatives(4), there[1], images.to(device), "average")
        logits[device] = {candidate: x.cpu() for candidate, x in found.items()}
    for candidate, expected in logits["cpu"].items():
        assert (logits["cuda"][candidate] - expected).abs().max() < 0.05 * expected.abs().max()  # TF32 in convolutions

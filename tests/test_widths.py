"""Widths: a path is the narrow network of its slices; the authors' winner; written forms; the warm-up."""

import collections
import json
import random

import pytest
import torch
from conftest import ROOT, tree_logits
from torch.nn.functional import cross_entropy

import network
import supernet
from network import ShuffleNetV2, ShuffleNetV2OneShot
from settings.subjects import Sampling
from space.custom import WIDTHS
from space.sampler import PathSampler, default_flops_range
from space.search_space import SearchSpace
from training.evaluation import recalibrate_bn
from utils import UserError

PAPERS = SearchSpace(widths=WIDTHS)
SMALL = SearchSpace(32, 10, 1, (1, 2), (2, 2), (16, 32), 8, 32, widths=WIDTHS)
WINNER = json.loads((ROOT / "architecture_joint.json").read_text())


def batches(n, size=8):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.rand(size, 3, 32, 32, generator=generator) * 255, torch.randint(0, 10, (size,), generator=generator))
        for _ in range(n)
    ]


def supernet_names(space, candidate, names):
    """{name in the stand-alone network: name in the supernet}."""
    choices = space.block_choices(candidate)
    found = {}
    for name in names:
        parts = name.split(".")
        if parts[0] == "features":
            parts.insert(2, str(choices[int(parts[1])] // space.n_widths))
        found[name] = ".".join(parts)
    return found


def first(tensor, like):
    return tensor[tuple(slice(n) for n in like.shape)]


@pytest.mark.parametrize("n", [20, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_a_path_is_the_network_with_the_first_channels_of_the_weights(n):
    torch.manual_seed(0)
    supernet, rng = ShuffleNetV2OneShot(space=SMALL).double(), random.Random(n)
    (images, labels), *calibration = [(images.double(), labels) for images, labels in batches(3)]
    for _ in range(n):
        candidate = SMALL.random_candidate(rng)
        alone = ShuffleNetV2(candidate, space=SMALL, affine=False).double()
        names = supernet_names(SMALL, candidate, alone.state_dict())
        weights = supernet.state_dict()
        alone.load_state_dict({k: first(weights[names[k]], v).clone() for k, v in alone.state_dict().items()})
        for model in (supernet, alone):
            model.train()
            model.dropout.eval()
            model.zero_grad()
        cross_entropy(supernet(images, candidate), labels).backward()
        cross_entropy(alone(images), labels).backward()
        gradients = {name: p.grad for name, p in supernet.named_parameters()}
        for name, p in alone.named_parameters():
            found = gradients.pop(names[name])
            assert (first(found, p) - p.grad).abs().max() <= 1e-9 * p.grad.abs().max()
            first(found, p).zero_()
            assert not found.any(), name
        assert all(g is None for g in gradients.values())
        recalibrate_bn(supernet, lambda x, candidate=candidate: supernet(x, candidate), calibration, "average")
        recalibrate_bn(alone, alone, calibration, "average")
        with torch.no_grad():
            expected = alone(images)
            assert (supernet(images, candidate) - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize(("bn", "fold"), [("ema", True), ("average", False)])
def test_a_tree_of_joint_candidates_is_one_after_the_other(bn, fold):
    torch.manual_seed(0)
    supernet, rng = ShuffleNetV2OneShot(space=SMALL).to(memory_format=torch.channels_last), random.Random(1)
    candidates = [SMALL.random_candidate(rng) for _ in range(6)]
    candidates += [candidates[0][:k] + c[k:] for k, c in ((2, candidates[1]), (6, candidates[2]))]
    (images, _), *calibration = batches(4)

    def logits(candidates):
        return tree_logits(supernet, candidates, calibration, images, bn, fold=fold)

    together = logits(candidates)
    assert together.keys() == set(candidates) and len({tuple(x.flatten().tolist()) for x in together.values()}) == len(
        together
    )
    assert all(torch.equal(together[c], logits([c])[c]) for c in candidates)


def test_the_authors_winner_costs_what_they_published():
    candidate = PAPERS.from_architecture(WINNER)
    assert (PAPERS.flops(candidate), PAPERS.params(candidate)) == (327_857_920, 3_432_579)
    blocks = SearchSpace().from_architecture({k: v for k, v in WINNER.items() if k.startswith("Layer")})
    assert blocks == candidate[:20]
    full = PAPERS.from_architecture(blocks)
    assert (PAPERS.flops(full), PAPERS.params(full)) == (318_729_024, 3_345_088)
    assert (SearchSpace().flops(blocks), SearchSpace().params(blocks)) == (318_729_024, 3_345_088)
    assert PAPERS.to_architecture(candidate) == WINNER


def authors_shapes(blocks, widths):
    """{name: shape} of the authors' network, written out from their description: features.{i}.branch_main.{k}."""
    shapes, channels = {}, 16

    def conv(name, index, *shape):
        shapes[f"{name}.{index}.weight"] = shape
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{index + 1}.{key}"] = shape[:1]
        shapes[f"{name}.{index + 1}.num_batches_tracked"] = ()

    conv("first_conv", 0, 16, 3, 3, 3)
    for i, (block, width) in enumerate(zip(blocks, widths)):
        out = (64,) * 4 + (160,) * 4 + (320,) * 8 + (640,) * 4
        inp, mid, k = channels if channels != out[i] else channels // 2, int(out[i] // 2 * WIDTHS[width]), 3 + 2 * block
        last, main = out[i] - inp, f"features.{i}.branch_main"
        if block < 3:
            layers = [(mid, inp, 1, 1, 3), (mid, 1, k, k, 2), (last, mid, 1, 1, 3)]
        else:
            layers = [(inp, 1, 3, 3, 2), (mid, inp, 1, 1, 3), (mid, 1, 3, 3, 2), (mid, mid, 1, 1, 3), (mid, 1, 3, 3, 2)]
            layers += [(last, mid, 1, 1, 3)]
        index = 0
        for *shape, step in layers:
            conv(main, index, *shape)
            index += step
        if channels != out[i]:
            k = 3 if block == 3 else k
            conv(f"features.{i}.branch_proj", 0, inp, 1, k, k)
            conv(f"features.{i}.branch_proj", 2, inp, inp, 1, 1)
        channels = out[i]
    conv("conv_last", 0, 1024, 640, 1, 1)
    return shapes | {"classifier.0.weight": (1000, 1024)}


def test_weights_of_the_authors_shapes_load_strictly(tmp_path):
    candidate = PAPERS.from_architecture(WINNER)
    shapes = authors_shapes(candidate[:20], candidate[20:])
    weights = {f"module.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    torch.save({"state_dict": weights}, tmp_path / "winner.pth")
    model, _ = network.read(tmp_path / "winner.pth", ROOT / "architecture_joint.json", PAPERS)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes


def test_widths_are_written_one_hot_and_files_without_them_mean_one():
    rng = random.Random(0)
    for space in (PAPERS, SMALL):
        candidate = space.random_candidate(rng)
        architecture = space.to_architecture(candidate)
        assert space.from_architecture(architecture) == candidate == space.from_architecture(list(candidate))
        operations = {k: v for k, v in architecture.items() if k.startswith("Layer")}
        assert space.from_architecture(operations) == candidate[: space.n_blocks] + (4,) * space.n_blocks
        forms = space.nni_search_space()
        assert (
            forms["ChannelChoice1"] == {"_type": "choice", "_value": list(WIDTHS)} and len(forms) == 2 * space.n_blocks
        )
    architecture["ChannelChoice2"] = [True, True] + [False] * 6
    with pytest.raises(UserError, match="ChannelChoice2 chooses 2 widths, not one"):
        SMALL.from_architecture(architecture)
    del architecture["ChannelChoice2"]
    with pytest.raises(UserError, match="'ChannelChoice2' is missing"):
        SMALL.from_architecture(architecture)


def test_a_space_with_fixed_operations_chooses_widths_alone():
    fixed = SearchSpace(32, 10, 1, (1, 2), (2, 2), (16, 32), 8, 32, widths=WIDTHS, architecture=(0, 3, 1, 2))
    assert fixed.choices == (8,) * 4 and fixed.block_operations[1] == ("xception_3x3",)
    candidate = (7, 0, 4, 2)
    architecture = fixed.to_architecture(candidate)
    joint = SMALL.from_architecture(architecture)
    assert joint == (0, 3, 1, 2, *candidate) and fixed.from_architecture(architecture) == candidate
    assert fixed.flops(candidate) == SMALL.flops(joint) and fixed.params(candidate) == SMALL.params(joint)
    with pytest.raises(UserError, match=r"has operations \[1, 3, 1, 2\], this search space \[0, 3, 1, 2\]"):
        fixed.from_architecture(SMALL.to_architecture((1, *joint[1:])))


def test_the_warm_up_widens_downwards_and_meets_no_bins():
    sampler = PathSampler(PAPERS, 0, default_flops_range(PAPERS), width_warmup=80)
    widths = [sampler.candidate(step)[20:] for step in range(80)]
    assert set(widths[0]) == {7} and all(min(w) >= 7 - 7 * step // 80 for step, w in enumerate(widths))
    assert set().union(*widths[70:]) == set(range(1, 8)) and len(set(sampler.candidate(3)[:20])) > 1
    later = [sampler.candidate(step) for step in range(80, 880)]
    without = PathSampler(PAPERS, 0, default_flops_range(PAPERS))
    assert later == [without.candidate(step) for step in range(80, 880)]
    flops = [PAPERS.flops(c) for c in later]
    bins = collections.Counter((f - 290_000_000) // 10_000_000 for f in flops)
    assert min(flops) >= 290_000_000 and max(flops) <= 360_000_000 and max(bins.values()) < 2 * min(bins.values())


def test_by_default_a_quarter_of_all_steps_widen():
    for iterations, steps in ((80, 20), (83, 20), (150_000, 37_500)):
        assert supernet.make_sampler(Sampling(sampler="uniform"), SMALL, 0, iterations).width_warmup == steps
    narrow = [supernet.make_sampler(Sampling(), SearchSpace(), 0, 80).width_warmup]
    assert narrow == [0]


def test_joint_candidates_are_spread_as_counted():
    """At 224 px: mean 302M, standard deviation 33M, 79% at or under 330M, 59% in the official bins."""
    candidates = PathSampler(PAPERS, 1)
    flops = torch.tensor([PAPERS.flops(candidates.candidate(step)) / 1e6 for step in range(3000)])
    assert flops.mean() == pytest.approx(302, abs=2) and flops.std() == pytest.approx(33, abs=2)
    assert PAPERS.quantile("flops", 0.79) == pytest.approx(330e6, rel=0.005)
    assert ((flops >= 290) & (flops <= 360)).float().mean() == pytest.approx(0.59, abs=0.03)


def test_the_narrowest_width_leaves_a_middle_channel():
    assert SearchSpace(32, 10, 1, (1,), (1,), (20,), 8, 32, widths=(0.1, 1.0)).blocks[0].mid_channels(0.1) == 1
    with pytest.raises(UserError, match="leave no middle channel"):
        SearchSpace(32, 10, 1, (1,), (1,), (18,), 8, 32, widths=(0.1, 1.0))

"""Candidates that are the same network: which operations do nothing, the canonical form, searches of it alone."""

import dataclasses
import itertools
import random

import pytest
import torch
from conftest import forget
from made_search import fill, settings

import blocks
from network import ShuffleNetV2
from space.custom import PRESETS, make_space
from space.evolution import Evolution
from space.limits import Limits
from space.search_space import OPERATIONS, BlockShape, SearchSpace
from space.twins import identities
from utils import UserError

SPACE = SearchSpace(
    16, 3, stem_stride=1, stem_channels=12, stage_blocks=(3, 1, 2), stage_channels=(16,) * 3, stage_strides=(2, 1, 1),
    last_channels=16, operations=("pointwise_1x1", "skip_1x1", "mobilenet_3x3"),
)  # fmt: skip


@pytest.mark.parametrize(
    "name", sorted({*OPERATIONS, *PRESETS["varied"]["operations"], *PRESETS["mobile"]["operations"]})
)
def test_an_operation_that_says_so_returns_its_input_and_no_other_does(name):
    for shape in (BlockShape(8, 8, 1, 6), BlockShape(8, 8, 2, 6), BlockShape(8, 12, 1, 6)):
        if shape.stride == 2 and name in OPERATIONS:
            continue  # ShuffleNetV2's channels grow there
        torch.manual_seed(0)
        operation, x = blocks.build_block(name, shape), torch.randn(2, 8, 6, 6)
        known = getattr(getattr(blocks.OPERATIONS[name], "func", blocks.OPERATIONS[name]), "is_identity", None)
        says = bool(known and known(shape))
        assert torch.equal(operation(x), x) == says == (name == "skip_1x1" and shape[:3] == (8, 8, 1))


def test_groups_are_blocks_of_one_shape_that_offer_the_same():
    assert identities(SPACE) == ((),) + ((1,),) * 5
    assert SPACE.twins.groups == [(slice(1, 6), [1])]  # across stages of equal channels
    assert SPACE.canonical([1, 1, 0, 1, 2, 0]) == (1, 0, 2, 0, 1, 1)
    other = dataclasses.replace(SPACE, stage_operations=(SPACE.operations, SPACE.operations[:2], SPACE.operations))
    assert [blocks for blocks, _ in other.twins.groups] == [slice(1, 3), slice(4, 6)]
    assert not dataclasses.replace(SPACE, operations=("pointwise_1x1", "mobilenet_3x3")).twins.groups
    wide = dataclasses.replace(SPACE, widths=(0.5, 1.0))
    assert wide.canonical((1, 1, 0, 1, 2, 0, *(1, 1, 1, 0, 0, 1))) == (1, 0, 2, 0, 1, 1, *(1, 1, 0, 1, 0, 0))
    fixed = dataclasses.replace(wide, architecture=(1, 1, 0, 1, 2, 0))
    assert fixed.canonical((1, 1, 1, 1, 1, 1)) == (1, 0, 1, 0, 1, 1)


def test_twins_are_equal_when_they_stand_alone():
    x = torch.randn(4, 3, 16, 16)
    seen = {}
    for inner in itertools.product(range(3), repeat=3):
        candidate = (2, *inner, 1, 0)
        torch.manual_seed(0)
        network = ShuffleNetV2(candidate, space=SPACE).eval()
        form = SPACE.canonical(candidate)
        assert SPACE.canonical(form) == form and SPACE.flops(form) == SPACE.flops(candidate)
        assert seen.setdefault(form, network(x).sum().item()) == network(x).sum().item()
    assert len(seen) == 15 == len({*seen.values()})


def test_a_cost_that_differs_between_twins_is_known():
    space = SPACE.with_costs(latency=SPACE.costs.flops)
    assert space.twins.cost_the_same(["flops", "params", "latency"])
    row = list(space.costs.flops)
    row[3] = tuple(cost + 1 for cost in row[3])
    uneven = SPACE.with_costs(latency=tuple(row))
    assert uneven.twins.cost_the_same(["flops", "params"]) and not uneven.twins.cost_the_same(["flops", "latency"])


def test_an_operation_that_claims_too_much_is_one_line():
    class Double(blocks.Skip):
        def forward(self, x):
            return x + x

    try:
        blocks.register("double")(Double)
        with pytest.raises(UserError, match=r"operation 'double' at .*is_identity says that it returns its input, but"):
            dataclasses.replace(SPACE, operations=("double", "pointwise_1x1")).canonical((0,) * 6)
        Double.is_identity = lambda self, shape: True
        with pytest.raises(UserError, match=r"operation 'double' fails at .*TypeError"):
            identities(dataclasses.replace(SPACE, operations=("pointwise_1x1", "double"), n_classes=4))
    finally:
        forget()


def test_a_search_of_distinct_networks_resumes_and_one_of_before_goes_on(tmp_path):
    """So small a space that all of its networks are evaluated: what random draws don't meet is listed."""
    space = dataclasses.replace(SPACE, stage_blocks=(2, 1, 1))
    known = settings(space, 10, generations=9) | {"flops_limit": space.cost_range("flops")[1]}
    record = fill(tmp_path, known | {"identities": identities(space)}, stop_after=25)
    record.lock.close()
    found = {*fill(tmp_path, known | {"identities": identities(space)}).results}
    assert found == {space.canonical(c) for c in itertools.product(range(3), repeat=4)} and len(found) == 45
    before = Evolution.from_settings(space, known)
    rng = random.Random(0)
    while population := before.ask():
        before.tell({c: rng.random() for c in population})
    assert len({*itertools.chain(*before.history)}) == 81


def test_the_presets_have_the_twins_of_their_skips():
    for name, groups in (("small", 0), ("varied", 1), ("mobile", 5)):
        assert len(make_space(name, input_size=28, n_classes=10).twins.groups) == groups, name


def test_an_evolution_in_python_takes_the_form_of_the_space():
    limits = Limits(SPACE, {"flops": (None, SPACE.cost_value("flops", "100%"))})
    population = Evolution(SPACE.choices, limits, canonical=SPACE.canonical).ask()
    assert len({*population}) == 50 and all(SPACE.canonical(c) == c for c in population)

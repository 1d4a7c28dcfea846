"""The demo: what its winner is compared with belongs to its settings, and its table says where the winner stands."""

import json

import pytest
import torch
from conftest import load

from blocks import build_block
from network import ShuffleNetV2
from space.search_space import BlockShape

demo, study = load("bench/demo.py"), load("bench/demo_study.py")


@pytest.fixture(scope="module")
def space_and_limit():
    return study.demo_space()


def test_the_truth_is_that_of_the_demos_settings(space_and_limit):
    space, limit = space_and_limit
    found = json.loads(demo.TRUTH.read_text())
    iterations = study.scratch.parse_args(["--demo"]).iterations
    assert found["settings"] == {"space": space.to_dict(), "flops_limit": limit, "iterations": iterations}
    random_ones, largest = demo.read_truth()
    assert [tuple(row["architecture"]) for row in random_ones] == study.random_legal(space, limit, 60)
    assert tuple(largest["architecture"]) == study.largest_legal(space, limit)
    for row in (*random_ones, largest):
        assert row["flops"] == space.flops(row["architecture"]) <= limit and row["acc1"] > 10
    repeated = [tuple(row["architecture"]) for row in random_ones[:20]]
    for seed, steps in ((1, iterations), (0, iterations // 2)):
        rows = [r for r in found["rows"] if (r["seed"], r["iterations"]) == (seed, steps)]
        assert [tuple(r["architecture"]) for r in rows] == repeated


def test_what_counts_as_agreement():
    def row(architecture, seed, iterations, acc1, flops=1):
        return {"architecture": architecture, "seed": seed, "iterations": iterations, "acc1": acc1, "flops": flops,
                "params": -flops}  # fmt: skip

    rows = [row([n], seed, steps, acc1, n) for n in range(4) for seed, steps, acc1 in
            ((0, 10, 80 + n), (1, 10, 70 + n), (0, 5, 60 - n))]  # fmt: skip
    rows.append(row([9], 0, 10, 0))  # trained once
    found = {"settings": {"iterations": 10}, "rows": rows}
    assert study.agreement(found) == [("another seed", 1), ("half the steps", -1), ("FLOPs", 1), ("parameters", -1)]


@pytest.mark.parametrize("name", ["skip", "pointwise"])
@pytest.mark.parametrize(("stride", "channels", "side"), [(1, 8, 7), (2, 16, 4)])
def test_the_cheap_operations(space_and_limit, name, stride, channels, side):
    block = build_block(name, BlockShape(8, channels, stride, 7))
    x = torch.rand(2, 8, 7, 7)
    assert block(x).shape == (2, channels, side, side)
    assert torch.equal(block(x), x) == (name == "skip" and stride == 1)


def test_the_space_has_the_papers_operations_and_networks_of_it_run(space_and_limit):
    space, limit = space_and_limit
    assert {"shufflenet_3x3", "shufflenet_5x5", "shufflenet_7x7", "xception_3x3"} < set(space.operations)
    network = ShuffleNetV2(study.largest_legal(space, limit), space=space).eval()
    assert network(torch.rand(1, 3, 28, 28)).shape == (1, 10)

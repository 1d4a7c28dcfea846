"""The demo: what its winner is compared with belongs to its settings, and its table says where the winner stands."""

import json

import pytest
import torch
import yaml
from conftest import run

from bench import demo, study
from bench import demo_study as bench
from blocks import build_block
from network import ShuffleNetV2
from space.search_space import BlockShape
from utils import UserError


def test_the_truth_is_that_of_the_demos_settings(tmp_path):
    space, bounds, settings = bench.settings()
    found = json.loads(demo.TRUTH.read_text())
    assert found["settings"] == settings
    random_ones, largest = demo.read_truth()
    assert [tuple(row["architecture"]) for row in random_ones] == study.random_legal(space, bounds, 60)
    assert tuple(largest["architecture"]) == study.largest_legal(space, settings["flops_limit"])
    for row in (*random_ones, largest):
        assert row["flops"] == space.flops(row["architecture"]) <= settings["flops_limit"] and row["acc1"] > 10
    rows = [[row["architecture"], row["seed"], row["iterations"]] for row in found["rows"]]
    assert rows == [task.key for task in bench.trainings(tmp_path)]


def test_what_counts_as_agreement():
    def row(architecture, seed, iterations, acc1, flops=1):
        return {"architecture": architecture, "seed": seed, "iterations": iterations, "acc1": acc1, "flops": flops,
                "params": -flops}  # fmt: skip

    rows = [row([n], seed, steps, acc1, n) for n in range(4) for seed, steps, acc1 in
            ((0, 10, 80 + n), (1, 10, 70 + n), (0, 5, 60 - n))]  # fmt: skip
    rows.append(row([9], 0, 10, 0))  # trained once
    found = {"settings": {"iterations": 10}, "rows": rows}
    assert bench.agreement(found) == [("another seed", 1), ("half the steps", -1), ("FLOPs", 1), ("parameters", -1)]


@pytest.mark.parametrize("name", ["skip_1x1", "pointwise_1x1"])
@pytest.mark.parametrize(("stride", "channels", "side"), [(1, 8, 7), (2, 16, 4)])
def test_the_cheap_operations(name, stride, channels, side):
    block = build_block(name, BlockShape(8, channels, stride, 7))
    x = torch.rand(2, 8, 7, 7)
    assert block(x).shape == (2, channels, side, side)
    assert torch.equal(block(x), x) == (name == "skip_1x1" and stride == 1)


def test_the_space_has_the_papers_operations_and_networks_of_it_run():
    space, _, settings = bench.settings()
    assert {"shufflenet_3x3", "shufflenet_5x5", "shufflenet_7x7", "xception_3x3"} < set(space.operations)
    network = ShuffleNetV2(study.largest_legal(space, settings["flops_limit"]), space=space).eval()
    assert network(torch.rand(1, 3, 28, 28)).shape == (1, 10)


def test_a_demo_of_another_seed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        demo, "command", lambda *words: exec("raise UserError('interrupted')", {"UserError": UserError})
    )
    with pytest.raises(UserError, match="interrupted"):
        demo.main(demo.parse_args(["--out", str(tmp_path)]))
    with pytest.raises(UserError, match=r"has a demo with \{'seed': 0, 'overrides': \[\]\}, not \{'seed': 1"):
        demo.main(demo.parse_args(["--out", str(tmp_path), "--seed", "1"]))


def test_an_unfinished_demo_of_another_space_is_named(tmp_path, monkeypatch):
    """As one of the time when its cheap operations came from a file of their own."""
    space = yaml.safe_load((demo.HERE / "demo.yml").read_text())["space"]
    config = tmp_path / "checkpoints" / "supernet" / "config.yml"
    config.parent.mkdir(parents=True)
    config.write_text(yaml.safe_dump({"space": space | {"operations": ["skip", "pointwise"]}}))
    _, stderr = run("bench.demo", "--out", tmp_path, code=2)
    assert stderr.endswith(f"another search space than demo.yml's; remove it: rm -r {tmp_path}\n")
    config.write_text(yaml.safe_dump({"space": space}))

    def runs(*_):
        raise UserError("it runs")

    monkeypatch.setattr(demo.Steps, "run", runs)
    assert "it runs" in run("bench.demo", "--out", tmp_path, code=2)[1]

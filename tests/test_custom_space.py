"""Spaces and operations that a user gives: what is taken, what is refused in one line, and the commands with them."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import ROOT, forget, run, tree_logits
from test_search_space import hooked_flops

import blocks
from dataloader import from_tensors
from network import ShuffleNetV2, ShuffleNetV2OneShot
from settings.subjects import DataConfig, Training
from space import custom, own
from space.sampler import PathSampler
from space.search_space import OPERATIONS, SearchSpace
from training import checkpoint
from training.evaluation import recalibrate_bn
from training.loop import train
from training.run import TrainingRun, contents_of
from utils import UserError

EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "docs/spaces.md").read_text(), re.S)[1]
OWN = {
    "stem": {"channels": 8, "stride": 1},
    "stages": [{"blocks": 2, "channels": 16, "stride": 2}, {"blocks": 2, "channels": 32, "stride": 2}],
    "last": {"channels": 32},
    "operations": ["identity", "inverted_residual_5x5", "shufflenet_3x3"],
    "widths": [0.5, 1.0],
}


@pytest.fixture(autouse=True)
def forgotten_test():
    yield
    forget()


def written(path, text):
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return str(path)


def test_presets():
    paper = SearchSpace()
    assert custom.make_space() == paper == custom.make_space("blocks")
    joint = custom.make_space("joint")
    assert joint.is_papers and joint.choices == (4,) * 20 + (8,) * 20
    small = custom.make_space("small", input_size=28, n_classes=10)
    assert small.n_blocks == 6 and small.stem_stride == 1 and not small.is_papers
    varied = custom.make_space("varied", input_size=28, n_classes=10)
    assert varied.choices == (5,) * 7
    assert set(blocks.OPERATIONS) == {*OPERATIONS, *varied.operations, *custom.PRESETS["mobile"]["operations"]}
    winner = str(ROOT / "architecture_final.json")
    channels = custom.make_space("channels", architecture=winner)
    assert channels.choices == (8,) * 20 and channels.architecture == paper.load_architecture(winner)
    alone = custom.make_space(architecture=str(ROOT / "architecture_joint.json"))
    assert alone == joint
    with pytest.raises(UserError, match="--space channels: needs --architecture FILE"):
        custom.make_space("channels")
    with pytest.raises(UserError, match=r"nowhere\.yml: No such file"):
        custom.make_space("nowhere.yml")


def test_an_architecture_that_a_search_wrote_is_of_its_space(tmp_path):
    small = custom.make_space("small", input_size=28, n_classes=10)
    (tmp_path / "search").mkdir()
    (tmp_path / "search/state.json").write_text(json.dumps({"settings": {"space": small.to_dict()}}))
    path = tmp_path / "best.json"
    path.write_text(json.dumps(small.to_architecture((0, 1, 2, 3, 0, 1))))
    assert custom.make_space(architecture=str(path), input_size=32, n_classes=7) == custom.make_space(
        name="small", input_size=32, n_classes=7
    )
    channels = custom.make_space("channels", architecture=str(path), input_size=28, n_classes=10)
    assert channels.choices == (8,) * 6 and channels.architecture == (0, 1, 2, 3, 0, 1)


def test_the_record_beside_an_architecture_is_checked(tmp_path):
    (tmp_path / "search").mkdir()
    state, path = tmp_path / "search/state.json", written(tmp_path / "best.json", "[0, 1]")
    for content in ("[]", "{}", '{"settings": []}'):
        state.write_text(content)
        with pytest.raises(UserError, match=r"state\.json: not the state of a search"):
            custom.make_space(architecture=path, input_size=28, n_classes=10)
    operations = written(tmp_path / "own.py", EXAMPLE)
    space = custom.make_space(
        name=written(tmp_path / "s.yml", {"space": OWN}), own_file=operations, input_size=28, n_classes=10
    )
    state.write_text(json.dumps({"settings": {"space": space.to_dict()}}))
    forget()
    with pytest.raises(UserError, match=r"state\.json: its operations come from another version"):
        changed = written(tmp_path / "own.py", EXAMPLE.replace("3 * shape", "4 * shape"))
        custom.make_space(architecture=path, own_file=changed, input_size=28, n_classes=10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stagess": []}, "unknown entry 'stagess'; known entries: stages, stem"),
        ({"stages": []}, r"stages is \[\], not a list"),
        ({"stages": [{"blocks": 2, "channels": 8}]}, "stage 1 is .*not a mapping of blocks, channels, stride"),
        ({"stages": [{"blocks": 0, "channels": 8, "stride": 2}]}, "stage_blocks is"),
        ({"stem": 4}, "stem is 4, not a mapping of channels, stride"),
        ({"stem": {"channels": "4"}}, "stem_channels is '4'"),
        ({"widths": [1.0, 0.5]}, "widths .* do not rise"),
        ({"widths": ["wide"]}, "widths"),
        ({"operations": ["swin"]}, "operation 'swin' is not one of shufflenet_3x3.*--own"),
        ({"operations": ["identity", "identity"]}, "has a name twice"),
        ({"stem": {"channels": 16}}, "'shufflenet_3x3' fails at .*do not grow, 16 to 16"),
        ({"stages": [OWN["stages"][0] | {"operations": ["identity", 3]}]}, r"stage 1 offers \['identity', 3\], not a"),
        ({"stages": [OWN["stages"][0] | {"operations": []}]}, r"operations is \[\], not of the form"),
    ],
)
def test_what_makes_no_network_is_a_line_that_names_the_entry(tmp_path, changes, message):
    operations = written(tmp_path / "own.py", EXAMPLE)
    space = written(tmp_path / "space.yml", {"space": OWN | changes})
    with pytest.raises(UserError, match=message) as error:
        custom.make_space(space, own_file=operations, input_size=28, n_classes=10)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "No such file"),
        ("def", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x = 1", "registers nothing"),
        ("import blocks\nblocks.register('xception_3x3')(int)", "'xception_3x3' is the name of an official operation"),
    ],
)
def test_a_file_of_operations_that_can_not_be_used_is_a_line(tmp_path, code, message):
    path = str(tmp_path / "none.py") if code is None else written(tmp_path / "own.py", code)
    with pytest.raises(UserError, match=f"--own {re.escape(path)}: .*{message}"):
        own.load(path)
    assert blocks.OPERATIONS["xception_3x3"] is blocks.ShuffleXceptionBlock


def test_an_operation_that_does_not_fit_its_block_is_a_line(tmp_path):
    own.load(written(tmp_path / "own.py", EXAMPLE.replace("shape.out_channels, 1, affine", "7, 1, affine")))
    space = own.with_hash(SearchSpace(28, 10, operations=("inverted_residual_5x5",)))
    with pytest.raises(
        UserError, match=r"'inverted_residual_5x5' at BlockShape\(in_channels=16.*returns \(1, 7, 7, 7\)"
    ):
        space.flops((0,) * 20)


def test_costs_are_counted_from_the_module(tmp_path):
    own.load(written(tmp_path / "own.py", EXAMPLE))
    space = custom.make_space(written(tmp_path / "s.yml", {"space": OWN}), input_size=28, n_classes=10)
    candidate = (1, 0, 2, 1, 0, 1, 1, 0)
    network = ShuffleNetV2(candidate, space=space).eval()
    assert space.flops(candidate) == hooked_flops(network, size=28)
    assert space.params(candidate) == sum(p.numel() for p in network.parameters())
    supernet = ShuffleNetV2OneShot(space=space)
    assert supernet(torch.zeros(2, 3, 28, 28), candidate).shape == (2, 10)


ODD = """
from torch import nn
from blocks import conv_bn, register

@register("odd")
class Odd(nn.Module):
    def __init__(self, shape, width, affine):
        super().__init__()
        inner = int(shape.out_channels * width)
        self.plain = nn.Conv2d(shape.in_channels, inner, 3, shape.stride, 1)
        self.norm = nn.BatchNorm2d(inner, affine=affine)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Sequential(*conv_bn(inner, inner, 1, affine=affine))
        self.own = nn.Sequential(Standardised(inner, shape.out_channels, 3, 1, 1), nn.BatchNorm2d(shape.out_channels))

    def forward(self, x):
        return self.own(self.last(self.drop(self.norm(self.plain(x)))))


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)
"""


def test_an_operation_of_any_form_is_calibrated_and_folded_as_it_can_be(tmp_path):
    """Bias, BN apart, dropout, standardised weights: folded or not, one by one or as a tree."""
    own.load(written(tmp_path / "odd.py", ODD))
    fields = OWN | {"operations": ["odd", "shufflenet_3x3"]}
    space = custom.make_space(written(tmp_path / "s.yml", {"space": fields}), input_size=16, n_classes=10)
    torch.manual_seed(0)
    supernet = ShuffleNetV2OneShot(space=space).double()
    (images, _), *calibration = [(torch.rand(8, 3, 16, 16).double() * 255, torch.arange(8)) for _ in range(3)]
    candidates = [(0, 1, 0, 0, 1, 0, 0, 0), (0, 1, 1, 0, 1, 0, 1, 1), (1, 0, 0, 0, 0, 1, 1, 1)]
    trees = [tree_logits(supernet, candidates, calibration, images, "average", fold=fold) for fold in (True, False)]
    for candidate in candidates:
        recalibrate_bn(supernet, lambda x, candidate=candidate: supernet(x, candidate), calibration, "average")
        expected = supernet(images, candidate)
        for found in trees:
            assert (found[candidate] - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_a_checkpoint_knows_the_file_of_its_operations(tmp_path):
    operations = written(tmp_path / "own.py", EXAMPLE)
    own.load(operations)
    space = custom.make_space(written(tmp_path / "s.yml", {"space": OWN}), input_size=28, n_classes=10)
    content = {"kind": "supernet", "space": space.to_dict(), "classes": list("abcdefghij"), "split": None, "data": {}}
    path = tmp_path / "supernet.pth"
    checkpoint.save(path, model=ShuffleNetV2OneShot(space=space).state_dict(), **content)
    assert checkpoint.load_supernet(path, None)[1].space == space
    forget()
    with pytest.raises(UserError, match=r"operation 'identity' is not one of .*--own"):
        checkpoint.load_supernet(path, None)
    own.load(written(tmp_path / "own.py", EXAMPLE.replace("3 * shape", "4 * shape")))
    with pytest.raises(UserError, match=r"supernet\.pth: its operations come from another version"):
        checkpoint.load_supernet(path, None)


def test_operations_of_a_notebook_are_those_of_a_space_made_by_hand(tmp_path):
    """A cell's classes have no file, and no source that Python knows; run again, the cell's are other classes."""
    space = SearchSpace(
        16, 3, stem_stride=1, stage_blocks=(1, 2), stage_channels=(16, 16), stage_strides=(2, 1),
        operations=("identity", "inverted_residual_5x5"),
    )  # fmt: skip
    for _ in range(2):
        exec(compile(EXAMPLE, "<ipython-input-1>", "exec"), {"__name__": "__main__"})
        folder = tmp_path / "run"
        supernet = ShuffleNetV2OneShot(space=space)
        run = TrainingRun(folder, "supernet", contents_of(space, None, "abc"))
        images = from_tensors(torch.rand(8, 3, 16, 16), torch.arange(8) % 3)
        train(supernet, images, Training(iterations=2, batch_size=8, warmup=1), PathSampler(space), run=run)
        found, ckpt = checkpoint.load_supernet(checkpoint.newest(folder), None)
        assert ckpt.space == own.with_hash(space) and ckpt.space.operations_hash
        trained = supernet.state_dict()  # by the first run, and resumed by the second
        assert all(torch.equal(weight, trained[name]) for name, weight in found.state_dict().items())
        forget()
    with pytest.raises(UserError, match="operation 'identity' is not one of"):
        checkpoint.load_supernet(checkpoint.newest(folder), None)


@pytest.mark.parametrize("config", [None, DataConfig(input_size=16)])
def test_images_of_other_channels_are_for_data_given_in_python(data, tmp_path, config):
    space = dataclasses.replace(custom.make_space(SKELETON, input_size=16, n_classes=3), image_channels=5)
    assert SearchSpace.from_dict(space.to_dict()) == space
    images, candidate = from_tensors(torch.rand(9, 5, 16, 16), torch.arange(9) % 3), (0,) * 6
    for kind in ("supernet", "scratch"):
        alone = kind == "scratch"
        network = ShuffleNetV2(candidate, space=space) if alone else ShuffleNetV2OneShot(space=space)
        contents = contents_of(space, config, "abc", **({"architecture": list(candidate)} if alone else {}))
        kept = TrainingRun(tmp_path / "checkpoints" / kind, kind, contents)
        sampler = None if alone else PathSampler(space)
        train(network, images, Training(iterations=1, batch_size=9, warmup=0), sampler, run=kept)
    assert space.flops(candidate) == hooked_flops(network, size=16, channels=5)
    run("tester.py", "--mode", "gen", "--out", tmp_path)
    file = tmp_path / "checkpoints/scratch/checkpoint-0000001.pth"
    one = ("--mode", "test", "--architecture", ROOT / "architecture_final.json")
    for script, *words in (("search.py",), ("tester.py", *one), ("scratch.py", "--eval", "--checkpoint", file)):
        _, err = run(script, *data, *words, "--out", tmp_path, code=2)
        assert "trained on images given in Python" in err and err.count("\n") == 1
    _, err = run("scratch.py", "--export", tmp_path / "a.pt2", "--checkpoint", file, "--out", tmp_path, code=2)
    assert "trained on images given in Python" in err and err.count("\n") == 1
    section = written(tmp_path / "space.yml", {"space": SKELETON | {"image_channels": 5}})
    with pytest.raises(UserError, match="unknown entry 'image_channels'"):
        custom.make_space(section)


# --- the project's own cheap and large operations -----------------------------------------------------------


@pytest.mark.parametrize("widths", [(1.0,), (0.5, 1.0)])
def test_the_projects_operations_cost_what_their_convolutions_cost(widths):
    space = dataclasses.replace(custom.make_space("varied", input_size=28, n_classes=10), widths=widths)
    for operation, name in enumerate(space.operations):
        candidate = space.uniform_candidate(operation * len(widths))
        network = ShuffleNetV2(candidate, space=space).eval()
        assert space.flops(candidate) == hooked_flops(network, size=28), name
        assert space.params(candidate) == sum(p.numel() for p in network.parameters()), name
    skip = space.operations.index("skip_1x1") * len(widths)
    within = [i for i, shape in enumerate(space.blocks) if not shape.projects]
    assert len(within) == 4 and not any(space.cost_rows(cost)[0][i][skip] for cost in ("flops", "params")
                                        for i in within)  # fmt: skip


def test_a_path_of_the_projects_operations_is_the_fixed_network_and_a_part_of_the_tree():
    space = custom.make_space("varied", input_size=16, n_classes=10)
    torch.manual_seed(0)
    supernet = ShuffleNetV2OneShot(space=space).double()
    (images, _), *calibration = [(torch.rand(8, 3, 16, 16).double() * 255, torch.arange(8)) for _ in range(3)]
    candidates = [(0, 1, 2, 3, 4, 0, 1), (0, 1, 2, 0, 0, 4, 4), (4, 0, 0, 0, 0, 1, 0), (0,) * 7]
    found = tree_logits(supernet, candidates, calibration, images, "average")
    for candidate in candidates:
        alone = ShuffleNetV2(candidate, affine=False, space=space).double()
        weights = supernet.state_dict()
        for block, operation in enumerate(candidate):
            inner = f"features.{block}.{operation}."
            weights |= {name.replace(inner, f"features.{block}."): w for name, w in weights.items() if inner in name}
        alone.load_state_dict({name: weights[name] for name in alone.state_dict()})
        recalibrate_bn(alone, alone, calibration, "average")
        expected = alone(images)
        assert (found[candidate] - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_the_projects_operations_stand_beside_those_of_a_file(tmp_path):
    mine = written(tmp_path / "own.py", EXAMPLE.replace('"identity"', '"skip"'))
    own.load(ROOT / "bench" / "macro_operations.py")
    both = ["skip", "skip_1x1", "pointwise_1x1", "identity", "mobilenet_3x3", "shufflenet_3x3"]
    space = {"operations": both, "stages": OWN["stages"], "stem": OWN["stem"]}
    with pytest.raises(UserError, match=r"operation 'skip' is not one of .*skip_1x1.*--own"):
        custom.make_space(space)
    assert custom.make_space(space, own_file=mine).operations == tuple(both)
    assert custom.make_space("varied").operations_hash == ""


def test_an_operation_of_a_user_that_has_a_name_of_the_projects_is_the_users(tmp_path):
    """Names that the project took later still mean what they meant in files of before."""
    operations = written(tmp_path / "own.py", EXAMPLE.replace('"identity"', '"skip_1x1"'))
    space = custom.make_space("varied", own_file=operations)
    assert space.operations_hash and blocks.OPERATIONS["skip_1x1"] is not blocks.Skip
    forget()
    with pytest.raises(UserError, match="its operations come from another version"):
        own.check_operations(space, "supernet.pth")


SKELETON = {  # channels that fall, as MobileNetV2's, stages of equal channels, operations of some stages alone
    "stem": {"channels": 16, "stride": 1},
    "stages": [
        {"blocks": 1, "channels": 9, "stride": 1, "operations": ["mobilenet_3x3", "mobilenet_5x5_e6"]},
        {"blocks": 2, "channels": 16, "stride": 2},
        {"blocks": 2, "channels": 16, "stride": 1},
        {"blocks": 1, "channels": 32, "stride": 2, "operations": ["shufflenet_3x3"]},
    ],
    "last": {"channels": 32},
    "operations": ["skip_1x1", "pointwise_1x1", "mobilenet_7x7"],
}


def test_operations_of_some_stages():
    space = custom.make_space(SKELETON, input_size=16, n_classes=3)
    assert space.choices == (2, 3, 3, 3, 3, 1) and space.blocks[0][:2] == (16, 9)
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    candidate = (1, 0, 2, 0, 1, 0)
    architecture = space.to_architecture(candidate)
    assert architecture["LayerChoice1"] == [False, True] and architecture["LayerChoice6"] == [True]
    assert {name: len(hot) for name, hot in architecture.items()} == {
        name: len(choice["_value"]) for name, choice in space.nni_search_space().items()
    }
    assert space.from_architecture(architecture) == candidate
    network = ShuffleNetV2(candidate, space=space)
    assert [n for n, _ in space.chosen(candidate)][:2] == ["mobilenet_5x5_e6", "skip_1x1"]
    assert space.flops(candidate) == hooked_flops(network, size=16)
    paths = ShuffleNetV2OneShot(space=space).candidates_with_all()
    assert [{path[block] for path in paths} for block in range(6)] == [{*range(n)} for n in space.choices]
    fixed = dataclasses.replace(space, widths=(0.5, 1.0), architecture=candidate)
    assert fixed.block_operations[0] == ("mobilenet_5x5_e6",) and fixed.operations_of((1,) * 6) == candidate
    assert fixed.from_architecture(fixed.to_architecture((1,) * 6)) == (1,) * 6
    with pytest.raises(UserError, match="needs an operation for each block"):
        dataclasses.replace(fixed, architecture=(2, *candidate[1:]))
    with pytest.raises(UserError, match="block 1 chooses 2, not 0 to 1"):
        space.check((2, 0, 0, 0, 0, 0))


def test_the_four_commands_where_channels_fall(data, tmp_path, forked, undrawn):
    space, out = written(tmp_path / "space.yml", {"space": SKELETON}), ("--out", tmp_path / "out")
    train = "--iterations 4 --batch-size 9 --val-every 4 --save-every 4 --warmup 2"
    bn = "--bn-batches 2 --bn-batch-size 9"
    run("supernet.py", *data, train, bn, "--val-paths 1", "--space", space, *out)
    stdout, _ = run("tester.py", "--mode", "gen", *out)
    assert "6 choice blocks of 1 to 3 operations" in stdout
    stdout, _ = run("search.py", *data, bn, *map(str, SEARCH), "--engine", "local", *out)
    assert "8 candidates evaluated" in stdout
    state = tmp_path / "out/checkpoints/search/state.json"
    settings = json.loads(state.read_text())["settings"]
    assert settings.pop("identities") == [[], [], [0], [0], [0], []]
    results = [json.loads(line) for file in (tmp_path / "out/acc").iterdir() for line in file.read_text().splitlines()]
    known = custom.make_space(space, input_size=16, n_classes=3)
    assert all(list(known.canonical(r["architecture"])) == r["architecture"] for r in results)
    state.write_text(json.dumps(json.loads(state.read_text()) | {"settings": settings}))
    run("search.py", "--resume", *map(str, ("--engine", "local")), *out)  # a search of before knows nothing of it
    assert json.loads(state.read_text())["settings"] == settings
    best = ("--architecture", tmp_path / "out/checkpoints/best.json")
    stdout, _ = run("scratch.py", *data, train, "--bn-pass 2", *best, *out)
    found = json.loads(stdout.splitlines()[-1])
    network = ShuffleNetV2(found["architecture"], space=custom.make_space(space, input_size=16, n_classes=3))
    assert found["flops"] == hooked_flops(network, size=16)
    stdout, _ = run("scratch.py", "--export", tmp_path / "best.pt2", "--threads 1", *out)
    assert "logits within" in stdout


SMALL = ("--demo", "--heldout-per-class", 4, "--bn-batches", 2, "--bn-batch-size", 32, "--threads", 1)
TRAIN = ("--batch-size", 16, "--iterations", 6, "--val-every", 6, "--save-every", 3, "--warmup", 2)
SEARCH = ("--population", 4, "--select", 2, "--mutation", 1, "--crossover", 1, "--generations", 2, "--concurrency", 1)


def kill_once(script, words, seen):
    """Starts a script, kills it with all that it started once `seen()`, and runs it again to its end."""
    words = [str(word) for word in words]
    resume = ["--resume"] if script == "search.py" else []
    process = subprocess.Popen(
        [sys.executable, ROOT / script, *words], start_new_session=True, stderr=subprocess.DEVNULL
    )
    while not seen():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run(script, *words, *resume)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "nni"])
@pytest.mark.parametrize("kind", ["small", "joint", "own", "varied", "mobile"])
def test_the_four_commands_in_a_space_killed_and_resumed(tmp_path, kind, engine):
    out = tmp_path / "out"
    own_file = ("--own", written(tmp_path / "own.py", EXAMPLE)) if kind == "own" else ()
    space = written(tmp_path / "space.yml", {"space": OWN}) if kind == "own" else kind
    words = (*SMALL, *TRAIN, "--val-paths", 1, "--space", space, *own_file, "--cache", tmp_path / "cache", "--out", out)
    kill_once("supernet.py", words, (out / "checkpoints/supernet/checkpoint-0000003.pth").exists)
    run("tester.py", "--mode", "gen", *own_file, "--out", out)
    words = (*SMALL, *SEARCH, "--engine", engine, *own_file, "--cache", tmp_path / "cache", "--out", out)
    acc = out / "acc/000.jsonl"
    kill_once("search.py", words, lambda: acc.exists() and acc.read_text().endswith("\n"))
    results = [
        json.loads(line) for path in sorted((out / "acc").glob("*.jsonl")) for line in path.read_text().splitlines()
    ]
    assert len(results) == len({tuple(r["architecture"]) for r in results}) == 8

    best = out / "checkpoints/best.json"
    words = ("--demo", "--heldout-per-class", 4, "--space", space, *own_file, "--out", out)
    stdout, _ = run("scratch.py", *words, *TRAIN, "--bn-pass", 2, "--architecture", best)
    retrained = json.loads(stdout.splitlines()[-1])
    assert retrained["architecture"] == max(results, key=lambda r: (r["acc1"], r["acc5"]))["architecture"]
    stdout, _ = run("scratch.py", *words, "--eval")
    assert json.loads(stdout.splitlines()[-1])["acc1"] == retrained["acc1"]
    run("scratch.py", *words, "--export", tmp_path / "best.pt2")
    report = (out / "report.html").read_text()
    assert ("widths" in report) == (kind in ("joint", "own")) and ("identity" in report) == (kind == "own")

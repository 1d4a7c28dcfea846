"""The search space: every published cost, an independent count, quantiles, and what is and isn't an architecture."""

import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import reference_spos
import torch
from torch import nn

import network
from space import own
from space.custom import make_space
from space.search_space import OPERATIONS, SearchSpace
from utils import HERE, UserError

SPACE = SearchSpace()
WINNER = reference_spos.WINNER
PUBLISHED = [  # block, then multiply-adds with 3x3, 5x5, 7x7, xception at 224 px
    (1, 13396992, 15805440, 19418112, 13146112),
    (2, 7325696, 8931328, 11339776, 12343296),
    (3, 7325696, 8931328, 11339776, 12343296),
    (4, 7325696, 8931328, 11339776, 12343296),
    (5, 26304768, 28111104, 30820608, 20296192),
    (6, 10599680, 11603200, 13108480, 16746240),
    (7, 10599680, 11603200, 13108480, 16746240),
    (8, 10599680, 11603200, 13108480, 16746240),
    (9, 30670080, 31673600, 33178880, 21199360),
    (10, 10317440, 10819200, 11571840, 15899520),
    (11, 10317440, 10819200, 11571840, 15899520),
    (12, 10317440, 10819200, 11571840, 15899520),
    (13, 10317440, 10819200, 11571840, 15899520),
    (14, 10317440, 10819200, 11571840, 15899520),
    (15, 10317440, 10819200, 11571840, 15899520),
    (16, 10317440, 10819200, 11571840, 15899520),
    (17, 30387840, 30889600, 31642240, 20634880),
    (18, 10176320, 10427200, 10803520, 15476160),
    (19, 10176320, 10427200, 10803520, 15476160),
    (20, 10176320, 10427200, 10803520, 15476160),
]
TINY = SearchSpace(
    input_size=32,
    n_classes=10,
    stem_stride=1,
    stage_strides=(2, 1, 2),
    stage_blocks=(2, 2, 3),
    stage_channels=(24, 40, 64),
)


# --- cost ----------------------------------------------------------------------------------------------------


def test_published_flops():
    assert [(i, *row) for i, row in enumerate(SPACE.costs.flops, 1)] == PUBLISHED
    assert SPACE.costs.stem_flops == 5_419_008
    assert SPACE.costs.tail_flops == 33_136_640
    assert SPACE.flops(WINNER) == 322_918_720
    assert SPACE.params(WINNER) == 3_558_464


def hooked_flops(model, *path, size, channels=3):
    """Multiply-adds that forward hooks count from weights and outputs, for one image."""
    count = []

    def hook(module, _, output):
        per_output = module.weight.numel() // (
            module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
        )
        count.append(per_output * output.numel())

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model.eval()(torch.zeros(1, channels, size, size, device=next(model.parameters()).device), *path)
    for handle in handles:
        handle.remove()
    return sum(count)


SETTINGS = [
    {},
    {"input_size": 28, "n_classes": 10, "stem_stride": 1},
    {"input_size": 37, "n_classes": 3, "stem_stride": 1},
    {"input_size": 65, "stage_strides": (1, 2, 2, 2)},
    {"input_size": 225, "n_classes": 7},
    {"input_size": 40, "stem_stride": 3, "stage_strides": (2, 1, 3, 1)},
    {
        "input_size": 49,
        "stage_blocks": (1, 2),
        "stage_strides": (2, 2),
        "stage_channels": (20, 50),
        "stem_channels": 7,
        "last_channels": 30,
    },
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_flops_equal_a_count_by_hooks(settings):
    """Over paths with every operation at every block of the supernet, and a random one as a network of its own."""
    space = SearchSpace(**settings)
    with torch.device("meta"):
        supernet = network.ShuffleNetV2OneShot(space=space)
        for operation in range(4):
            path = (operation,) * space.n_blocks
            assert hooked_flops(supernet, path, size=space.input_size) == space.flops(path)
        path = space.random_candidate(random.Random(0))
        assert hooked_flops(network.ShuffleNetV2(path, space=space), size=space.input_size) == space.flops(path)


def test_flops_equal_a_count_on_the_reference():
    with torch.device("meta"):
        model = reference_spos.Network(WINNER, 1000, True)
    assert hooked_flops(model, size=224) == SPACE.flops(WINNER)


@pytest.mark.parametrize("size, stem_stride", [(28, 1), (64, 1), (65, 2), (224, 2)])
def test_small_images_keep_their_size_in_the_stem(size, stem_stride):
    assert SearchSpace.for_images(size, 10).stem_stride == stem_stride
    assert SearchSpace.for_images(size, 10).flops(WINNER) == SearchSpace(size, 10, stem_stride).flops(WINNER)


def test_uniform_candidates_cost_what_is_published():
    rng = random.Random(0)
    costs = sorted(SPACE.flops(SPACE.random_candidate(rng)) for _ in range(20_000))
    mean = sum(costs) / len(costs)
    assert mean == pytest.approx(327e6, abs=0.5e6)
    assert (sum((c - mean) ** 2 for c in costs) / len(costs)) ** 0.5 == pytest.approx(11.8e6, abs=0.2e6)
    assert sum(c <= 330_000_000 for c in costs) / len(costs) == pytest.approx(0.59, abs=0.012)
    assert sum(290_000_000 <= c <= 360_000_000 for c in costs) / len(costs) == pytest.approx(0.997, abs=0.002)
    assert SPACE.quantile("flops", 0.59) == pytest.approx(330e6, abs=0.3e6)
    assert SPACE.quantile("flops", 0.00078) == pytest.approx(
        290e6, abs=0.3e6
    )  # 6,000,000 random candidates: 0.078% are below
    assert SPACE.quantile("flops", 0.99797) == pytest.approx(360e6, abs=0.3e6)  # and 0.203% above
    for share in (0.05, 0.5, 0.95):
        assert SPACE.quantile("flops", share) == pytest.approx(costs[int(share * len(costs))], abs=0.5e6)


def test_quantiles_against_all_candidates():
    costs = sorted(TINY.flops(c) for c in itertools.product(range(4), repeat=TINY.n_blocks))
    assert len(costs) == 4**7 and (costs[0], costs[-1]) == TINY.cost_range("flops")
    grid_error = (costs[-1] - costs[0]) / 8192 * TINY.n_blocks / 2
    for share in (0.0014, 0.01, 0.25, 0.5, 0.59, 0.9, 0.9986, 1):
        exact = costs[max(round(share * len(costs) + 0.499) - 1, 0)]
        assert abs(TINY.quantile("flops", share) - exact) <= grid_error + 1, share
    assert TINY.quantile("flops", 0) == costs[0]
    for name in ("varied", "paper"):  # whatever the grid rounds, all candidates are at or under the highest cost
        space = make_space(name, input_size=28, n_classes=10) if name == "varied" else SPACE
        assert space.cost_value("flops", "100%") == space.cost_range("flops")[1], name


def test_a_share_that_is_met_exactly_is_that_of_its_cost():
    """One block of four operations: half of all candidates are at or under the second."""
    one = SearchSpace(32, 10, 1, (1,), (1,), (16,), 8, 32)
    costs = sorted(one.flops((i,)) for i in range(4))
    assert len(set(costs)) == 4
    step = (costs[-1] - costs[0]) / 8000
    assert [one.quantile("flops", share) for share in (0.25, 0.5, 0.75)] == pytest.approx(costs[:3], abs=step)


@pytest.mark.parametrize("text, flops", [
    ("330000000", 330_000_000), (330_000_000, 330_000_000), ("330M", 330_000_000), ("700k", 700_000), ("1.5k", 1500),
    ("3.3e8", 330_000_000), ("322.5M", 322_500_000),
    (" 290M ", 290_000_000), ("59%", SPACE.quantile("flops", 0.59)), ("0.14%", SPACE.quantile("flops", 0.0014)),
    ("100%", SPACE.quantile("flops", 1)),
])  # fmt: skip
def test_flops_values(text, flops):
    assert SPACE.cost_value("flops", text) == flops


@pytest.mark.parametrize(
    "text",
    ["", "M", "330MB", "-330M", "330 M", "0", "0%", "101%", "nan", "1e400", "9" * 400, None, [1], "330m", "1,000"],
)
def test_bad_flops_values(text):
    with pytest.raises(UserError, match=r"^cost .* is neither multiply-adds \(330000000, 330M, 700k\) nor a share"):
        SPACE.cost_value("flops", text)


# --- written form --------------------------------------------------------------------------------------------


def test_nni_search_space():
    form = json.loads(json.dumps(SPACE.nni_search_space()))
    assert list(form) == [f"LayerChoice{i}" for i in range(1, 21)]
    assert all(v == {"_type": "layer_choice", "_value": list(OPERATIONS)} for v in form.values())


def test_architectures_go_to_a_file_and_back(tmp_path):
    rng = random.Random(0)
    for _ in range(20):
        candidate = SPACE.random_candidate(rng)
        one_hot = SPACE.to_architecture(candidate)
        assert one_hot["LayerChoice20"] == [op == candidate[19] for op in range(4)]
        for form in (one_hot, list(candidate), dict(reversed(one_hot.items()))):
            (tmp_path / "a.json").write_text(json.dumps(form))
            assert SPACE.load_architecture(tmp_path / "a.json") == SPACE.from_architecture(form) == candidate


def one_hot(**changes):
    return SPACE.to_architecture(WINNER) | changes


BAD_ARCHITECTURES = {
    "missing block": ({k: v for k, v in one_hot().items() if k != "LayerChoice7"}, "'LayerChoice7' is missing"),
    "unknown block": (one_hot(LayerChoice21=[True, False, False, False]), "'LayerChoice21' is unknown"),
    "long name": (one_hot(**{"x" * 100_000: 1}), "is unknown"),
    "empty object": ({}, "'LayerChoice1' is missing"),
    "search space": (SPACE.nni_search_space(), "LayerChoice1 is not a list of 4 true/false"),
    "two choices": (one_hot(LayerChoice3=[True, True, False, False]), "LayerChoice3 chooses 2 operations"),
    "no choice": (one_hot(LayerChoice3=[False] * 4), "LayerChoice3 chooses 0 operations"),
    "name for booleans": (one_hot(LayerChoice3="shufflenet_3x3"), "LayerChoice3 is not a list of 4 true/false"),
    "19 blocks": ([0] * 19, "has 19 blocks, this search space has 20"),
    "no blocks": ([], "has 0 blocks"),
    "operation 4": ([0] * 19 + [4], "block 20 chooses 4, not 0 to 3"),
    "boolean in the list": ([True] + [0] * 19, "block 1 chooses True"),
    "string in the list": (["a\nb" * 1000] + [0] * 19, "block 1 chooses 'a"),
    "list in the list": ([[0]] * 20, "block 1 chooses"),
    "number": (7, "is a int, not a one-hot object"),
    "string": ("0" * 20, "is a str"),
    "null": (None, "is a NoneType"),
}


def assert_one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("name", BAD_ARCHITECTURES)
def test_bad_architectures_are_refused_with_a_line(tmp_path, name):
    architecture, message = BAD_ARCHITECTURES[name]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(architecture))
    with pytest.raises(UserError, match=message) as error:
        SPACE.load_architecture(path)
    assert str(error.value).startswith(f"{path}: architecture")
    assert_one_line(error)
    with pytest.raises(UserError, match=message):
        network.ShuffleNetV2(architecture)


def test_keys_that_are_no_strings_are_refused():
    with pytest.raises(UserError, match="7 is unknown"):
        SPACE.from_architecture(one_hot() | {7: 1})


@pytest.mark.parametrize("content, message", [
    (b"", "not JSON"), (b"[0, 1", "not JSON"), (b"\xff\xfe\x00", "not JSON"), (b"[" * 500_000, "not JSON"),
    (b'{"a":' * 100_000, "not JSON"),
    (b"[" + b"9" * 5000 + b"]", "not JSON"), (b"[0, " * 900 + b"0" + b"]" * 900, "has 2 blocks"),
    (b"[" + b"0," * 5_000_000 + b"0]", "over 1000000 bytes"),
    (b"[" + b"[" * 900 + b"]" * 900 + b", 0" * 19 + b"]", "block 1 chooses"),
], ids=["empty", "cut off", "binary", "nested lists", "nested objects", "huge number", "nested less", "10 MB",
"nested block"])  # fmt: skip
def test_bad_files_are_refused_with_a_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        SPACE.load_architecture(path)
    assert str(path) in str(error.value)
    assert_one_line(error)


def test_missing_files_are_refused(tmp_path):
    for path in (tmp_path / "no.json", tmp_path):
        with pytest.raises(UserError, match=f"{path}: "):
            SPACE.load_architecture(path)


# --- the space itself ----------------------------------------------------------------------------------------


def test_a_space_goes_to_json_and_back():
    for space in (SPACE, TINY, SearchSpace.for_images(28, 10), SearchSpace(operations=OPERATIONS[:2])):
        back = SearchSpace.from_dict(json.loads(json.dumps(space.to_dict())))
        assert back == space and hash(back) == hash(space) and back.costs.flops == space.costs.flops


@pytest.mark.parametrize("values, message", [
    ([], "has entries other than"), (None, "has entries other than"), ({"size": 224}, "has entries other than"),
    ({"input_size": "224"}, "input_size is '224'"), ({"input_size": 0}, "input_size is 0"), ({"input_size": True},
    "input_size is True"),
    ({"input_size": 224.0}, "input_size is 224.0"), ({"input_size": [224]}, r"input_size is \[224\]"),
    ({"n_classes": -1}, "n_classes is -1"),
    ({"n_classes": 10**9}, "n_classes is 1000000000"), ({"stage_blocks": 4}, "stage_blocks is 4"),
    ({"stage_blocks": []}, r"stage_blocks is \[\]"),
    ({"stage_blocks": [4, 4, 8, "4"]}, "stage_blocks is"), ({"stage_blocks": [4, 4, 8]}, "differ in length"),
    ({"stage_blocks": [4, 4, 8, 900_000]}, "900016 blocks, more than 1000"), ({"stage_blocks": [1] * 100_000},
    "stage_blocks|differ"),
    ({"stage_operations": [["xception_3x3"]]}, "has 1 entries for 4 stages"),
    ({"stage_operations": [["xception_3x3"]] * 3 + [["swin"]]}, r"has \['swin'\], not some of operations"),
    ({"stage_operations": [["xception_3x3"] * 2] * 4}, "not some of operations"),
    ({"stage_operations": "abcd"}, "stage_operations is 'abcd'"), ({"image_channels": 0}, "image_channels is 0"),
    ({"operations": []}, "operations"), ({"operations": "shufflenet_3x3"}, "operations"),
    ({"operations": ["shuffle-net"]}, "operations"),
    ({"operations": [f"op{i}" for i in range(257)]}, "257 operations or widths, more than 256"),
    ({"widths": [1 + i / 1000 for i in range(257)]}, "257 operations or widths, more than 256"),
    ({"operations": [["shufflenet_3x3"]]}, "operations"), ({"operations": [{}] * 100_000}, "operations"),
])  # fmt: skip
def test_bad_spaces_are_refused_with_a_line(values, message):
    with pytest.raises(UserError, match=message) as error:
        SearchSpace.from_dict(values)
    assert str(error.value).startswith("search space: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("channels, message", [((64, 160, 320, 641), "not even, 641"),
                                               ((64, 160, 160, 640), "do not grow, 160 to 160"),
                                               ((16, 160, 320, 640), "not even|do not grow, 17 to 16")])  # fmt: skip
def test_shufflenets_units_refuse_channels_that_they_can_not_split(channels, message):
    space = SearchSpace(stage_channels=channels, stem_channels=17 if channels[0] == 16 else 16)
    for refused in (lambda: own.with_hash(space), lambda: space.costs):
        with pytest.raises(UserError, match=f"^operation 'shufflenet_3x3' fails at BlockShape.*{message}") as error:
            refused()
        assert_one_line(error)


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, torch.tensor])
def test_whatever_is_an_index_is_one(kind):
    found = SPACE.check([kind(choice) for choice in WINNER])
    assert found == WINNER and all(type(choice) is int for choice in found)
    assert SPACE.from_architecture(np.array(WINNER)) == SPACE.from_architecture(torch.tensor(WINNER)) == WINNER
    with pytest.raises(UserError, match=r"block 20 chooses .*4.*, not 0 to 3"):
        SPACE.check([kind(0)] * 19 + [kind(4)])
    with pytest.raises(UserError, match=r"block 1 chooses .*1\.0"):
        SPACE.check([np.float64(1.0)] + [0] * 19)


def test_random_candidates_are_uniform_and_of_the_space():
    rng = random.Random(0)
    drawn = [SPACE.check(SPACE.random_candidate(rng)) for _ in range(2000)]
    for block in zip(*drawn):
        assert all(430 < block.count(op) < 570 for op in range(4))  # 500 each, sd 19
    assert SPACE.choices == (4,) * 20


@pytest.mark.parametrize("module", ["space.search_space", "space.flops_table", "space.limits"])
def test_the_search_space_starts_without_large_packages(module):
    code = f"import sys, {module}; sys.exit(str({{'torch', 'scipy', 'yaml', 'nni'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert result.stderr.strip() == "set()"

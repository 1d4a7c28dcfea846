"""What an architecture knows that a search wrote: space, sizes and data settings, in the record beside it."""

import json
import shutil

import pytest
import torch
from conftest import run

import utils
from engines.search_record import prepare_search
from images.dataset import Data, DataConfig
from space.custom import PRESETS, searched
from space.limits import make_bounds
from space.search_space import SearchSpace

SPACE = SearchSpace(
    input_size=32, n_classes=3, stem_channels=8, stem_stride=1, stage_blocks=(1, 2), stage_channels=(16, 24),
    stage_strides=(2, 2), last_channels=32,
)  # fmt: skip
CONFIG = DataConfig(input_size=32, val_resize=36, crop_scale=(0.5, 1.0), jitter=0.0, heldout_per_class=2)


@pytest.fixture
def best(tmp_path):
    """The file of a search's winner, with the record of the search beside it."""
    prepare_search(tmp_path, {"space": SPACE.to_dict(), "data": CONFIG.to_dict()}, resume=False)
    path = tmp_path / "checkpoints" / "best.json"
    path.write_text(json.dumps(SPACE.to_architecture((1, 0, 3))))
    return path


def words(tree, *more):
    training = "--iterations 1 --batch-size 4 --bn-pass 0 --loader torchvision --workers 0 --device cpu"
    return ("--data-dir", tree, *training.split(), *more)


def test_retraining_takes_space_and_data_settings_from_the_record(best, tree, tmp_path):
    run("scratch.py", *words(tree), "--architecture", best, "--out", tmp_path)
    content = torch.load(tmp_path / "checkpoints" / "scratch" / "checkpoint-0000001.pth", weights_only=True)
    assert SearchSpace.from_dict(content["space"]) == SPACE and content["architecture"] == [1, 0, 3]
    assert DataConfig.from_dict(content["data"]) == CONFIG


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--input-size 64", "--input-size 64 contradicts"),
        ("--space small", "--space contradicts"),
        ("--data-dir {}/two", "searched for 3 classes, the data has 2; use the same --data-dir"),
    ],
)
def test_a_contradiction_is_one_line(best, tree, tmp_path, flags, message):
    for part in ("train", "val"):
        for name in ("apple", "bird"):
            (tmp_path / "two" / part).mkdir(parents=True, exist_ok=True)
            (tmp_path / "two" / part / name).symlink_to(tree / part / name)
    flags = flags.replace("{}", str(tmp_path)).split()
    _, stderr = run("scratch.py", *words(tree, *flags), "--architecture", best, "--out", tmp_path, code=2)
    assert message in stderr and len(stderr.splitlines()) == 1
    assert not (tmp_path / "checkpoints" / "scratch").exists()


def test_what_only_trains_and_images_may_be_others_with_a_line(best, tree, tmp_path):
    """Class names may not: which are others is said. Beside the record there is the list of the search's images."""
    images = best.with_name("search") / "images.json"
    Data(tree, CONFIG).write_list(images)
    images.write_text(images.read_text() + " " * utils.MAX_JSON_BYTES)  # that of ImageNet has tens of megabytes
    flags = (
        "--warmup",
        1,
        "--jitter",
        0.3,
        "--no-mirror",
        "--heldout-per-class",
        3,
        "--architecture",
        best,
        "--out",
        tmp_path / "one",
    )
    _, stderr = run("scratch.py", *words(tree, *flags))
    for text in ("--jitter 0.3 (was 0.0)", "--mirror False (was True)", "--heldout-per-class 3 (was 2)"):
        assert f"other than in the search: {text}\n" in stderr
    assert "other images" not in stderr
    assert "warning: --warmup 1 of 1 --iterations: the learning rate never reaches --lr 0.5\n" in stderr
    other = shutil.copytree(tree, tmp_path / "other")
    (other / "train" / "bird" / "000.jpg").unlink()
    _, stderr = run("scratch.py", *words(other), "--architecture", best, "--out", tmp_path / "two")
    assert "other images than in the search: numbers of images in train: bird 11 (was 12)\n" in stderr
    for part in ("train", "val"):
        (other / part / "bird").rename(other / part / "birds")
    _, stderr = run("scratch.py", *words(other), "--architecture", best, "--out", tmp_path / "three", code=2)
    assert "searched for other classes: those of the data are without 'bird' and with 'birds'\n" in stderr


def test_a_member_of_the_front_has_the_record_of_its_search(best):
    front = best.with_name("front")
    front.mkdir()
    member = shutil.copy(best, front / "001.json")
    assert searched(member) == searched(best) is not None


@pytest.mark.parametrize("section", ["supernet: {space: varied}", "scratch: {space: varied}"])
def test_without_an_architecture_the_best_of_the_search_is_named(best, tree, tmp_path, section):
    path = tmp_path / "own.yml"
    path.write_text(section)
    _, stderr = run("scratch.py", *words(tree), "--config", path, "--out", tmp_path, code=2)
    assert f"--architecture: the published one is not of this space: name that of the search, {best}\n" in stderr
    (tmp_path / "checkpoints" / "scratch").mkdir()
    (tmp_path / "checkpoints" / "scratch" / "checkpoint-0000001.pth").touch()
    _, stderr = run("scratch.py", *words(tree), "--resume none --config", path, "--out", tmp_path, code=2)
    assert "the published one is not of this space" in stderr
    _, stderr = run("scratch.py", *words(tree), "--config", path, "--out", tmp_path / "none", code=2)
    assert "no search has written" in stderr and len(stderr.splitlines()) == 1


def test_a_damaged_record_is_one_line(best, tree, tmp_path):
    state = tmp_path / "checkpoints" / "search" / "state.json"
    state.write_text(json.dumps({"settings": {"space": SPACE.to_dict(), "data": {"input_size": "32"}}}))
    _, stderr = run("scratch.py", *words(tree), "--architecture", best, "--out", tmp_path, code=2)
    assert f"{state}: not the state of a search" in stderr and len(stderr.splitlines()) == 1


def test_a_file_without_a_record_says_which_space_it_assumes(tree, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([0] * 6))
    small = ("--space", "small", "--input-size", "32", "--heldout-per-class", "2")
    _, stderr = run("scratch.py", *words(tree), *small, "--architecture", path, "--out", tmp_path)
    assert "mine.json: no record of a search beside it; assumes 6 blocks of shufflenet_3x3" in stderr
    assert "images of 32 px" in stderr


@pytest.mark.parametrize("size", [28, 96, 224])
def test_the_default_limit_of_a_small_space_can_be_broken(size):
    for n_classes in (10, 1000):
        space = SearchSpace(size, n_classes, **PRESETS["small"])
        low, high = space.cost_range("flops")
        assert low < make_bounds(space)["flops"][1] < high

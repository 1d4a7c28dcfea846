"""Results that can't be right: a warning before hours are spent, which the report repeats."""

import dataclasses
import json
import random
import shutil
import types

import numpy as np
import pytest
from conftest import make_tree, run
from made_search import fill, result, settings
from picture_files import exif
from PIL import Image

from engines.generations import first_generation_warning, reliability
from images.dataset import Data, DataConfig
from reports.page import write_report
from settings.subjects import Evaluation
from training import checkpoint
from training.evaluation import calibration_warning
from utils import UserError


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "tree", 4, 2)


def warnings(tree):
    return Data(tree, DataConfig(heldout_per_class=1), tree.parent).warnings


def test_a_single_class(tree):
    assert warnings(tree) == []
    for part in ("train", "val"):
        for name in ("bird", "car"):
            shutil.rmtree(tree / part / name)
    (text,) = warnings(tree)
    assert "a single class, 'apple': every network is right" in text


def test_one_name_of_a_class_in_two_forms_of_unicode(tree):
    """As macOS packs it, and as it is typed elsewhere. Labels are those of train."""
    composed, decomposed = "\u00e1", "a\u0301"  # the second comes before car, the first after it
    for part, name in (("train", composed), ("val", decomposed)):
        (tree / part / "bird").rename(tree / part / name)
    shutil.copy(tree / "train" / composed / "000.jpg", tree / "val" / decomposed / "copy.jpg")
    data = Data(tree, DataConfig(heldout_per_class=1))
    assert data.classes == data.train.classes == data.val.classes == ("apple", "car", composed)
    assert [(path.split("/")[0], label) for path, label in zip(data.val.paths, data.val.labels)] == [
        ("apple", 0), ("apple", 0), ("car", 1), ("car", 1), *[(decomposed, 2)] * 3,
    ]  # fmt: skip
    data.write_list(tree / "list.json")
    again = Data(tree, DataConfig(heldout_per_class=1), listed=tree / "list.json").val
    assert again.paths == data.val.paths and again.labels.tolist() == data.val.labels.tolist()
    (text,) = data.warnings
    assert "1 images of val are in train too" in text
    run("dataloader.py", "--check", tree)
    stored = types.SimpleNamespace(path="a.pth", classes=("apple", "car", decomposed), class_names="abc")
    checkpoint.check_classes(stored, data.classes)
    (tree / "train" / decomposed).mkdir()
    both = r"class folders 'a\u0301' and '\xe1' have one name in two forms of Unicode"
    with pytest.raises(UserError) as error:
        Data(tree, DataConfig(heldout_per_class=1))
    assert both in str(error.value)
    stdout, _ = run("dataloader.py", "--check", tree, code=2)
    assert both in stdout


def test_classes_that_differ_in_capitals(tree):
    for part in ("train", "val"):
        (tree / part / "bird").rename(tree / part / "Apple")
    text = f"{tree}: classes 'Apple' and 'apple' are two: is it one, written in two ways?"
    assert warnings(tree) == [text]
    stdout, _ = run("dataloader.py", "--check", tree)
    assert text in stdout


def test_images_in_train_and_val(tree):
    shutil.copy(tree / "train" / "bird" / "000.jpg", tree / "val" / "bird" / "copy.jpg")
    for _ in range(2):  # the second time from the record
        (text,) = warnings(tree)
        assert "1 images of val are in train too: accuracies on val are too high" in text
    path = tree.parent / "checked.json"
    ((name, entry),) = json.loads(path.read_text()).items()
    for older in (entry["files"], [entry["files"], 0], {**entry, "version": 1, "shared": 0}):
        path.write_text(json.dumps({name: older}))
        assert len(warnings(tree)) == 1  # checked again
    assert json.loads(path.read_text()) == {name: entry}
    stdout, _ = run("dataloader.py", "--check", tree)
    assert "1 in train and val" in stdout and "val/bird/copy.jpg: the same image as train/bird/000.jpg" in stdout


def test_images_with_an_orientation(tree):
    path = tree / "train" / "bird" / "000.jpg"
    with Image.open(path) as image:
        for name, orientation in (("000.jpg", 6), ("odd.jpg", 9), ("none.jpg", 1)):
            image.save(path.with_name(name), exif=exif(orientation))
    image.save(path.with_name("damaged.jpg"), exif=b"Exif\0\0" + bytes(range(50)))
    config = DataConfig(heldout_per_class=1)
    for _ in range(2):
        (text,) = Data(tree, config, tree.parent).warnings
        assert "1 images have an EXIF orientation, which is ignored" in text and "exif: apply" in text
        assert Data(tree, dataclasses.replace(config, exif="apply"), tree.parent).warnings == []
    stdout, _ = run("dataloader.py", "--check", tree)
    assert "1 with an EXIF orientation" in stdout


def test_files_that_are_left_out(tree):
    folder = tree / "train" / "car"
    for name in ("a.gif", "b.GIF", "c.heic", "notes", ".hidden.gif"):
        (folder / name).write_bytes(b"x")
    (tree / "val" / "car" / "d.avif").write_bytes(b"x")
    text = f"{tree}: 5 files are ignored for their suffixes: 2 .gif, 1 .heic, 1 (no suffix), 1 .avif"
    assert warnings(tree) == [text]
    shutil.copy(folder / "000.jpg", folder / "e.jfif")
    with Image.open(folder / "000.jpg") as image:
        image.rotate(90).save(folder / "e.jfif", "JPEG")
    assert warnings(tree) == [text]
    assert "car/e.jfif" in Data(tree, DataConfig(heldout_per_class=1), tree.parent).train.paths
    without = Data(tree, DataConfig(heldout_per_class=1, jfif=False), tree.parent)
    assert "car/e.jfif" not in without.train.paths and len(without.train) == 12
    (line,) = without.warnings
    assert ": 6 files are ignored" in line and "1 .jfif" in line


def test_copies_on_both_sides_of_the_split(tree):
    folder = tree / "train" / "bird"
    shutil.copy(folder / "000.jpg", folder / "000 (1).jpg")
    shutil.copy(folder / "000.jpg", folder / "000 (2).jpg")
    config = DataConfig(heldout_per_class=2)
    for _ in range(2):  # the second time from the record
        seen = set()
        for seed in range(12):
            data = Data(tree, dataclasses.replace(config, split_seed=seed), tree.parent)
            assert data.warnings == []  # scratch.py holds nothing out
            n = sum(path.startswith("bird/000") for path in data.images("search").paths)
            seen.add(n)
            found = [f"{n} of 6 held-out images are copies of images that the supernet trains on" in text
                     for text in data.warnings]  # fmt: skip
            assert found == [True] * (n > 0), n
        assert seen == {0, 1, 2}
    everything = Data(tree, DataConfig(heldout_per_class=3), tree.parent)
    everything.heldout = np.arange(len(everything.train))
    everything._warn_of_copies(set(everything.train.paths))  # copies on one side
    assert everything.warnings == []
    stdout, _ = run("dataloader.py", "--check", tree)
    assert "2 copies in train" in stdout and "train/bird/000.jpg: a copy of train/bird/000 (1).jpg" in stdout


@pytest.mark.slow
def test_every_command_warns(tree, tmp_path):
    (tree / "train" / "car" / "a.gif").write_bytes(b"x")
    text = "warning: " + f"{tree}: 1 files are ignored for their suffixes: 1 .gif"
    words = [
        "--data-dir",
        tree,
        "--loader torchvision --workers 0 --threads 1 --device cpu",
        "--out",
        tmp_path,
    ]
    size = "--space small --input-size 16 --heldout-per-class 1"
    train = "--iterations 1 --batch-size 4 --val-every 1"
    calibration = "--bn-batches 1 --bn-batch-size 4"
    path = tmp_path / "architecture.json"
    path.write_text("[0, 0, 0, 0, 0, 0]")
    one = ("--architecture", path)
    evolution = "--engine local --population 2 --select 1 --mutation 1 --crossover 0 --generations 1"
    for script, *more in (
        ("supernet.py", size, train, calibration),
        ("tester.py", calibration, "--mode test", *one),
        ("tester.py", "--mode gen"),
        ("search.py", calibration, evolution),
        ("scratch.py", size, train, "--bn-pass 0", *one),
        ("scratch.py", "--eval"),
    ):
        given = words if more != ["--mode gen"] else ["--out", tmp_path]
        _, stderr = run(script, *more, *given)
        assert stderr.count(text) == ("--data-dir" in given), (script, stderr)


@pytest.mark.parametrize(("step", "warns"), [(3, True), (150_000, False), (None, False)])
def test_a_supernet_whose_training_has_not_ended(step, warns):
    ckpt = types.SimpleNamespace(path="c.pth", content={"step": step, "settings": {"iterations": 150_000}})
    text = checkpoint.unfinished(ckpt)
    assert (text == "c.pth: step 3 of 150000: its training has not ended") == warns and (text is None) != warns
    assert checkpoint.unfinished(types.SimpleNamespace(path="c.pth", content=None)) is None  # an official file


def test_more_calibration_images_than_there_are():
    text = calibration_warning(Evaluation(bn_batches=100), 8305)
    assert text == ("--bn-batches 100 of 128 are 12,800 images, more than the 8,305 that the supernet trains on: 64 "
                    "batches will do")  # fmt: skip
    assert calibration_warning(Evaluation(bn_batches=64), 8305) is None


def rows(mean, sd, n_images=1000, n=50):
    rng = random.Random(0)
    return [{"acc1": min(100, max(0, rng.gauss(mean, sd))), "acc5": 99, "n_images": n_images} for _ in range(n)]


@pytest.mark.parametrize(
    ("results", "says"),
    [
        (rows(10.2, 1), "chance is 10.00%"),
        (rows(60, 0.5), "1000 images measure each to 1.5"),
        (rows(60, 0.5, n_images=50_000), None),
        (rows(60, 4), None),
        (rows(60, 0, n=1), None),
        ([{"acc1": None, "n_images": None}] * 5, None),
    ],
)
def test_candidates_of_the_first_generation_that_cannot_be_told_apart(results, says):
    text = first_generation_warning(results, n_classes=10)
    if says is None:
        assert text is None
    else:
        assert says in text
        advice = text.split(": ", 1)[1]
        assert advice == ("train the supernet longer" if "chance" in says else f"what helps, in this order: {ADVICE}")


def test_the_noise_of_images_in_groups_is_theirs():
    """A spread of 4 points is above the binomial noise of 1.5, and below that of groups."""
    text = first_generation_warning([row | {"acc1_error": 5.0} for row in rows(60, 4)], n_classes=10)
    assert "1000 images in groups measure each to 5.00 points" in text


def halved(correlation, n=50, **changes):
    """Results far above chance and noise, whose scores on two halves of the images have about this correlation."""
    rng = random.Random(1)
    found = []
    for row in rows(60, 5, n_images=50_000, n=n):
        common = rng.gauss(0, 1)
        halves = [correlation**0.5 * common + (1 - correlation) ** 0.5 * rng.gauss(0, 1) for _ in range(2)]
        found.append(row | {"loss": 1.0, "halves": {"acc1": halves, "loss": halves[::-1]}} | changes)
    return found


def test_the_reliability_is_that_of_spearman_and_brown_with_an_interval():
    for correlation in (0.2, 0.6, 0.9):
        expected = 2 * correlation / (1 + correlation)
        value, low, high = reliability(halved(correlation, n=5000))
        assert value == pytest.approx(expected, abs=0.03) and low < value < high < low + 0.2
        wide = reliability(halved(correlation, n=12))
        assert wide[2] - wide[1] > high - low
    opposite = [row | {"halves": {"acc1": [i, -i], "loss": [0, 0]}} for i, row in enumerate(rows(60, 5))]
    assert reliability(opposite)[0] == 0 and reliability([row | {"score": -1} for row in opposite])[0] == 0
    assert reliability(rows(60, 5)) is None and reliability(halved(0.9)[:3]) is None


@pytest.mark.parametrize(
    ("correlation", "changes", "what"), [(0.9, {}, None), (0.1, {}, "top-1"), (0.1, {"score": -1}, "loss")]
)
def test_a_first_generation_that_two_halves_of_the_images_rank_differently(correlation, changes, what):
    """Its spread is far above the binomial noise, which says nothing of images that are alike."""
    results = halved(correlation, **changes)
    text = first_generation_warning(results, n_classes=10)
    assert (text is None) == (what is None)
    if what:
        assert f"; reliability of {what} in the first generation: 0." in text and "95% interval 0." in text
        assert text.endswith(ADVICE.replace("--rank-by loss, ", "") if changes else ADVICE)


ADVICE = (
    "a space whose candidates differ more (docs/spaces.md), --crop-padding for small images, --rank-by loss, "
    "more held-out images, longer training of the supernet"
)


def test_a_search_that_ranks_by_the_loss_is_not_advised_to():
    ranked = [result | {"score": -1.0} for result in rows(60, 0.5)]
    text = first_generation_warning(ranked, n_classes=10)
    assert text.endswith(ADVICE.replace("--rank-by loss, ", "")) and "by loss" not in text


def test_the_report_repeats_the_warnings(tmp_path, undrawn):
    warnings = ["c.pth: step 3 of 9"]
    numbers = {"acc1": 10.1, "n_images": 2000, "acc1_error": 7.5}
    fill(tmp_path, settings(generations=1), lambda c: result(c, **numbers), warnings=warnings)
    page = write_report(tmp_path).read_text()
    assert "\xb1\xa07.50 standard error by groups of images on 2,000 images" in page
    assert "Warning: c.pth: step 3 of 9</p>" in page and "and chance is 10.00%: train the supernet longer" in page

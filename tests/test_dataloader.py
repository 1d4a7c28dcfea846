"""Folders, splits, order, augmentation and the loaders."""

import dataclasses
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import time
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from conftest import CLASSES, coloured_image, make_tree, run
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import center_crop

import dataloader
from dataloader import Loader
from images import image_check
from images.augmentation import Augmentation, draw_augmentation, resize_and_crop, validation_geometry
from images.dataset import (
    Data,
    DataConfig,
    ImageSet,
    calibration_plan,
    evaluation_plan,
    scan,
    stratified_order,
    training_plan,
)
from images.groups import groups_of
from space.weight_files import Checkpoint
from training.checkpoint import check_classes, check_split
from utils import Interrupted, UserError

CONFIG = DataConfig(input_size=32, val_resize=37, heldout_per_class=3)
BACKENDS = ["torchvision", pytest.param("dali", marks=pytest.mark.skipif(
    not dataloader.importlib.util.find_spec("nvidia.dali"), reason="DALI is not installed"))]  # fmt: skip


def single(folder, image, **save):
    """An ImageSet of one image file."""
    (folder / "c").mkdir(parents=True, exist_ok=True)
    image.save(folder / "c" / "image.png", **save)
    return ImageSet(str(folder), ("c/image.png",), np.zeros(1, np.int64), ("c",))


def first(images, config, augment, backend, **kwargs):
    """The first decoded image (H, W, 3) of a set."""
    loader = Loader(images, config, augment, backend=backend, workers=0, **kwargs)
    return next(iter(loader.decode(evaluation_plan(1, 1))))[0][0]


# --- folders and splits


def test_scan_is_sorted_and_labelled(tree):
    images = scan(tree / "train")
    assert images.classes == CLASSES
    assert list(images.paths) == sorted(images.paths)
    assert all(images.classes[label] == path.split("/")[0] for path, label in zip(images.paths, images.labels))


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda d: shutil.rmtree(d / "train"), "no such folder"),
        (lambda d: [shutil.rmtree(p) for p in (d / "train").iterdir()], "no class folders"),
        (lambda d: [p.unlink() for p in (d / "train" / "bird").iterdir()], "bird: a class without images"),
        (lambda d: (d / "train" / "bird" / "deeper").mkdir(), "a folder inside a class folder"),
        (lambda d: (d / "val" / "bird").rename(d / "val" / "cow"), "'bird' is in only one of train and val"),
        (lambda d: [p.unlink() for p in sorted((d / "train" / "car").iterdir())[3:]], "'car' has 3 images"),
    ],
)
def test_wrong_folders_are_named(tmp_path, break_it, message):
    folder = make_tree(tmp_path / "d", 4, 1)
    break_it(folder)
    with pytest.raises(UserError, match=message):
        _ = Data(folder, CONFIG).heldout


def test_split_is_disjoint_deterministic_and_per_class(images):
    data, again = Data.of(images, CONFIG), Data.of(images, CONFIG)
    held, rest = data.images("search"), data.images("supernet")
    assert not set(held.paths) & set(rest.paths)
    assert set(held.paths) | set(rest.paths) == set(data.images("train").paths)
    assert np.bincount(held.labels).tolist() == [3, 3, 3]
    assert data.split == again.split and again.images("search").paths == held.paths
    other = Data.of(images, dataclasses.replace(CONFIG, split_seed=1))
    assert other.split["hash"] != data.split["hash"]


def test_without_groups_the_split_is_what_it_was(images):
    """The hash of the release before there were groups, which is in checkpoints; groups of one are no groups."""
    expected = {"seed": 0, "heldout_per_class": 3, "hash": "0746e3f3c891fc14"}
    assert Data.of(images, CONFIG).split == expected
    alone = Data.of(images, dataclasses.replace(CONFIG, group_by="(.*)[.]jpg"))
    assert alone.split == expected | {"group_by": "(.*)[.]jpg"}


def test_what_has_changed_since_a_supernet_was_trained_is_named(tmp_path):
    tree = make_tree(tmp_path / "tree", 8, 1)
    before = Data(tree, CONFIG, tmp_path)
    ckpt = Checkpoint("x.pth", "supernet", None, {}, split=before.split, classes=before.classes,
                      content={"counts": before.counts})  # fmt: skip
    check_split(ckpt, Data(tree, CONFIG, tmp_path))
    for i in (1, 2):
        (tree / "train" / "bird" / f"00{i}.jpg").unlink()
    with pytest.raises(
        UserError, match=r"another split of the images: numbers of images in train: bird 6 \(was 8\); use"
    ):
        check_split(ckpt, Data(tree, CONFIG, tmp_path))
    with pytest.raises(UserError, match=r"of the images: --heldout-per-class 2 \(was 3\); use the same"):
        check_split(ckpt, Data(tree, dataclasses.replace(CONFIG, heldout_per_class=2), tmp_path))
    ckpt.content = {}  # as before there were settings
    with pytest.raises(UserError, match="of the images: images have other names; use"):
        check_split(ckpt, Data(tree, CONFIG, tmp_path))
    with pytest.raises(UserError, match="not those of the data: those are without 'car' and with 'cars'; use the same"):
        check_classes(ckpt, ("apple", "bird", "cars"))
    with pytest.raises(UserError, match="has 3 classes, the data 2: those are without 'car'; use the same"):
        check_classes(ckpt, ("apple", "bird"))
    with pytest.raises(UserError, match="those are in another order"):
        check_classes(ckpt, ("apple", "car", "bird"))


def grouped(folder, sizes, **config):
    """The Data of a tree without images, of groups of these sizes in the classes a, b, ..., and their config."""
    for part in ("train", "val"):
        for name, groups in zip("abc", sizes if part == "train" else [[1]] * len(sizes)):
            for number, size in enumerate(groups):
                for i in range(size):
                    path = folder / part / name / f"{part if part == 'val' else ''}{number:02}_{i}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch()
    return Data(folder, DataConfig(**{"heldout_per_class": 5, "group_by": "(.*)_"} | config))


@pytest.fixture
def unchecked(monkeypatch):
    none = {"shared": 0, "turned": 0, "copies": []}
    monkeypatch.setattr(image_check, "check_images", lambda *_: none)


@pytest.mark.parametrize("seed", range(6))
def test_groups_are_held_out_as_a_whole(tmp_path, unchecked, seed):
    """Until there are enough images; the file that matches nothing is on its own."""
    sizes = [[3] * 10, [1, 7, 2, 2, 4, 9], [5, 1]]
    data = grouped(tmp_path, sizes, split_seed=seed)
    (tmp_path / "train" / "a" / "alone.jpg").touch()
    data = Data(tmp_path, data.config)
    held, rest = ({p.rsplit("_", 1)[0] for p in data.images(part).paths} for part in ("search", "supernet"))
    assert not held & rest and len(held | rest) == 10 + 6 + 2 + 1
    counts = np.bincount(data.images("search").labels)
    assert 5 <= counts[0] <= 7 and 5 <= counts[1] <= 14 and counts[2] == 5
    assert not [text for text in data.warnings if "groups" in text]


def test_several_parentheses_are_one_group(tmp_path, unchecked):
    """All of them, also those that match nothing."""
    data = grouped(tmp_path, [[2] * 5, [2] * 5], group_by=r"(.)/(\d+)_(x)?")
    pairs = {(path.split("/")[0], path.split("/")[1][:2]) for path in data.train.paths}
    assert len(set(data.groups)) == len(pairs) == 10 and np.bincount(data.groups).tolist() == [2] * 10


def test_names_of_groups_have_one_form_of_unicode(tmp_path):
    """A part packed on macOS has another one."""
    (tmp_path / "g.csv").write_text("f\u00fc\u00dfe/1.jpg,one\n", encoding="utf-8")
    paths = ["f\u00fc\u00dfe/1.jpg", "fu\u0308\u00dfe/1.jpg"]
    assert groups_of(str(tmp_path / "g.csv"), "train", paths) == ["one"] * 2
    assert len(set(groups_of("(.*)/", "train", paths))) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thin_image_is_resized_where_it_is_seen(tmp_path, backend, monkeypatch):
    """As a whole, resized, it would fill the memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 300, 3), np.uint8)
    (tmp_path / "c").mkdir()
    Image.fromarray(pixels).save(tmp_path / "c" / "image.png")
    images = ImageSet(str(tmp_path), ("c/image.png",), np.zeros(1, np.int64), ("c",))
    expected = first(images, CONFIG, False, "torchvision")
    monkeypatch.setattr("images.preprocessing.MOST_PIXELS", 9)
    monkeypatch.setattr("torchvision.transforms.v2.functional.resize", None)
    assert torch.equal(first(images, CONFIG, False, backend), expected)


def test_a_csv_says_what_belongs_together(tmp_path, unchecked):
    """Which is the same split wherever the file is, and another one with other groups."""
    data = grouped(tmp_path / "tree", [[3] * 10, [3] * 10])
    lines = [f"{path},{path[:4]}" for path in data.train.paths]
    (tmp_path / "g.csv").write_text("\n".join(["file,group", *lines]))
    (tmp_path / "moved.csv").write_text("\ufeff" + "\r\n".join(["file,group", *lines]), encoding="utf-8")
    found = [Data(tmp_path / "tree", dataclasses.replace(data.config, group_by=str(tmp_path / name)))
             for name in ("g.csv", "moved.csv")]  # fmt: skip
    assert found[0].split == found[1].split and found[0].split["hash"] == data.split["hash"]
    (tmp_path / "g.csv").write_text("\n".join(["file,group", *lines[1:]]))
    assert Data(tmp_path / "tree", found[0].config).split["group_by"] != found[1].split["group_by"]
    (tmp_path / "parts.csv").write_text("\n".join([*(f"train/{line}" for line in lines), "val/a/val00_0.jpg,a/00"]))
    parts = Data(tmp_path / "tree", dataclasses.replace(data.config, group_by=str(tmp_path / "parts.csv")))
    assert parts.split["hash"] == data.split["hash"]
    assert [text for text in parts.warnings if "1 groups of images are in train and val" in text]
    stored = found[0].config
    assert DataConfig.resolve({"group_by": str(tmp_path / "moved.csv")}, stored, "x.pth").group_by.endswith("moved.csv")
    with pytest.raises(UserError, match=r"--group-by _ contradicts x\.pth, which has .*g\.csv"):
        DataConfig.resolve({"group_by": "_"}, stored, "x.pth")
    found[1].write_list(tmp_path / "listed.json")  # for trials, which need no CSV
    groups, halves = found[1].groups[found[1].heldout], found[1].images("search").halves
    assert all(len(set(halves[groups == group])) == 1 for group in groups) and set(halves) == {0, 1}
    assert abs(np.mean(halves) - 0.5) < 0.3
    (tmp_path / "moved.csv").unlink()
    listed = Data(tmp_path / "tree", found[1].config, listed=tmp_path / "listed.json")
    assert listed.split == found[0].split | {"group_by": found[1].split["group_by"]}
    assert listed.images("search").paths == data.images("search").paths


@pytest.mark.parametrize(
    "group_by, message",
    [
        ("a(", r"--group-by 'a\(': not a regular expression"),
        ("nothing", "--group-by nothing: none of the 12 files of .*train is in a group"),
        (
            r"^(.)",
            "class 'a' has 6 images in one group, that of a/00_0.jpg, and needs two: add images of others, or make",
        ),
        (
            r"(.*)_",
            "'a' has 6 images in 2 groups, of which at most 3 leave a group to train on, not 5: the largest, that "
            "of a/00_0.jpg, has 3; lower --heldout-per-class, or add",
        ),
        ("none.csv", "--group-by none.csv: No such file or directory"),
        ("three.csv", "three.csv: line 4 has 3 columns, not file and group"),
        ("two.csv", "two.csv: a/00_0.jpg is in two groups, 'x' and 'y'"),
    ],
)
def test_wrong_groups_are_one_line(tmp_path, unchecked, monkeypatch, group_by, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "three.csv").write_text("file,group\nfile,group\n\na/00_0.jpg,x,y\n")
    (tmp_path / "two.csv").write_text("file,group\n\na/00_0.jpg,x\na/00_0.jpg,y\n")
    with pytest.raises(UserError, match=message) as error:
        _ = grouped(tmp_path / "tree", [[3, 3], [3, 3]], group_by=group_by).heldout
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(4))
def test_groups_of_several_classes_are_held_out_as_a_whole(tmp_path, unchecked, seed):
    """Each class keeps one to train on, c one of 00 and 01; what is beyond the number is printed by class."""
    data = grouped(tmp_path / "tree", [[3] * 10, [3] * 10, [3, 3]], group_by=r"/(\d+)_", split_seed=seed,
                   heldout_per_class=3)  # fmt: skip
    held, rest = (data.images(part) for part in ("search", "supernet"))
    named = [{p.split("/")[1][:2] for p in images.paths} for images in (held, rest)]
    assert not named[0] & named[1] and len(named[0] | named[1]) == 10
    assert np.bincount(held.labels).tolist() in ([3, 3, 3], [6, 6, 3]) and len(named[0] & {"00", "01"}) == 1
    assert data.split == Data(tmp_path / "tree", data.config).split
    n = len(named[0])
    beyond = ", beyond 3 of each class: a 3, b 3" if n == 2 else ""
    held = f"{n} held out with {len(held)} images{beyond}"
    assert data.grouping == f"groups: 10 of the 66 images of train, {held}; 0 in train and val"
    uneven = grouped(tmp_path / "uneven", [[4] * 10, [1, 2, 3] * 3, [2] * 4], group_by=r"/(\d+)_", split_seed=seed)
    counts = np.bincount(uneven.images("search").labels)
    assert min(counts) >= 5 and max(counts) < 30 and f"beyond 5 of each class: a {counts[0] - 5}" in uneven.grouping


def test_a_draw_that_leaves_a_class_short_is_repeated(tmp_path, unchecked):
    """Half of all orders take 01 first, which is c's smaller one, and 00 is then its last."""
    for seed in range(8):
        data = grouped(
            tmp_path, [[1, 1, 1], [1, 1, 1], [9, 1]], group_by=r"/(\d+)_", split_seed=seed, heldout_per_class=2
        )
        assert {p.split("/")[1][:2] for p in data.images("search").paths} == {"00", "02"}


def test_a_group_that_covers_too_much_is_named(tmp_path, unchecked):
    with pytest.raises(UserError, match="'b' has 9 images in 2 groups, and no draw gives it 5 or more") as error:
        _ = grouped(tmp_path, [[9, 1], [1, 8]], group_by=r"/(\d+)_").heldout
    assert "the largest, that of b/01_0.jpg, has 9 images of 2 classes; lower --heldout-per-class" in str(error.value)


@pytest.mark.parametrize(
    ("group_by", "says"),
    [("(.*)", "12 groups of 12 images: each is on its own"), ("[.]jpg", "all 12 images of train are in one group")],
)
def test_groups_that_group_nothing_or_all_cause_a_warning(tmp_path, unchecked, group_by, says):
    data = grouped(tmp_path, [[3, 3], [3, 3]], group_by=group_by)
    assert [text for text in data.warnings if says in text]


def test_a_check_names_the_groups_that_train_and_val_share(tree, tmp_path):
    """In the fixture's tree, the files of one number and class; a run warns."""
    (tmp_path / "own.yml").write_text("common: {group-by: '(.*)[.]', heldout-per-class: 3}\nsearch: {population: 9}")
    stdout, _ = run("dataloader.py", "--check", tree, "--config", tmp_path / "own.yml", "--cache", tmp_path)
    assert "group 'bird/003' is in train and val: train/bird/003.jpg, val/bird/003.jpg" in stdout
    assert len(re.findall("is in train and val", stdout)) == 21
    assert "groups: 36 of the 36 images of train, 9 held out with 9 images; 21 in train and val" in stdout
    assert "36 groups of 36 images: each is on its own" in stdout
    stdout, _ = run("dataloader.py", "--check", tree, "--group-by", "jpg", "--cache", tmp_path, code=2)
    assert "all 36 images of train are in one group" in stdout
    data = Data(tree, dataclasses.replace(CONFIG, group_by="(.*)[.]"), tmp_path)
    assert any("21 groups of images are in train and val" in text for text in data.warnings)


def test_a_split_of_names_that_are_no_text(tmp_path):
    folder = make_tree(tmp_path / "tree") / "train" / "car"
    for path in folder.iterdir():
        os.rename(path, os.fsencode(folder) + b"/caf\xe9" + os.fsencode(path.name))
    assert len(Data(tmp_path / "tree", CONFIG, tmp_path).split["hash"]) == 16


def test_config_flags_against_a_checkpoint():
    assert DataConfig.resolve(DataConfig.given(DataConfig.unset())) == DataConfig()
    assert DataConfig.resolve({"input_size": 32}).val_resize == 37
    stored = DataConfig.from_dict(CONFIG.to_dict())
    assert stored == CONFIG and DataConfig.resolve({"input_size": 32}, stored, "x.pth") == CONFIG
    with pytest.raises(UserError, match=r"--preprocessing imagenet contradicts x\.pth, which has spos"):
        DataConfig.resolve({"preprocessing": "imagenet"}, stored, "x.pth")


def test_no_workers_are_none(tree, monkeypatch):
    """The images are decoded in this process."""
    decoded = []
    made = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
    monkeypatch.setattr(dataloader._TorchvisionImages, "_make", lambda images, samples: decoded.append(samples) or made)
    loader = Loader(scan(tree / "val"), CONFIG, False, backend="torchvision", workers=0)
    assert loader.workers == 0 and len(list(loader.decode(evaluation_plan(8, 4)))) == len(decoded) == 2


# --- order


def test_training_plan_visits_every_image_once_an_epoch():
    plan = np.stack(list(training_plan(20, 5, seed=3, steps=8)))
    for epoch in (0, 1):
        part = plan[4 * epoch : 4 * epoch + 4].reshape(-1, 2)
        assert (part[:, 0] == epoch).all() and sorted(part[:, 1]) == list(range(20))
    assert (plan[0, :, 1] != plan[4, :, 1]).any()


def test_training_plan_does_not_depend_on_ranks_or_resume():
    whole = np.stack(list(training_plan(50, 12, seed=1, steps=9)))
    parts = [np.stack(list(training_plan(50, 4, seed=1, steps=9, rank=r, world_size=3))) for r in range(3)]
    assert (np.concatenate(parts, axis=1) == whole).all()
    assert (np.stack(list(training_plan(50, 12, seed=1, start=5, steps=9))) == whole[5:]).all()


def test_training_plan_refuses_a_batch_larger_than_the_data():
    with pytest.raises(UserError, match=r"batches of 64 images .*lower --batch-size"):
        next(training_plan(63, 64, 0))


def test_evaluation_plan_counts_every_image_once():
    batches = evaluation_plan(23, 4)
    assert np.concatenate(batches)[:, 1].tolist() == list(range(23)) and [len(b) for b in batches] == [4] * 5 + [3]


def test_stratified_prefixes_have_equal_shares():
    labels = np.repeat([0, 1, 2], [30, 10, 20])
    order = stratified_order(labels, 0)
    assert sorted(order) == list(range(60))
    assert np.bincount(labels[order[:30]]).tolist() == [10, 10, 10]


def test_calibration_plan_is_stratified_and_augments_repeats_anew():
    labels = np.repeat([0, 1], 8)
    plan = calibration_plan(labels, batches=4, batch_size=10, seed=0)
    samples = np.concatenate(plan)
    assert [len(b) for b in plan] == [10] * 4
    assert len(np.unique(samples, axis=0)) == 40
    assert np.bincount(labels[samples[:, 1]]).tolist() == [20, 20]


# --- augmentation


def test_augmentation_is_a_pure_function_of_seed_epoch_and_index():
    draws = [draw_augmentation(CONFIG, s, e, i, 50, 60) for s in (0, 1) for e in (0, 1) for i in (0, 1)]
    assert len({(*d.window, d.brightness) for d in draws}) == 8
    assert draws[0] == draw_augmentation(CONFIG, 0, 0, 0, 50, 60)


def test_augmentation_has_the_official_distribution():
    height, width = 300, 400
    draws = [draw_augmentation(DataConfig(), 0, 0, i, height, width) for i in range(4000)]
    windows = np.array([d.window for d in draws], float)
    top, left, h, w = windows.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    area, ratio = h * w / (height * width), w / h
    assert 0.075 < area.min() < 0.1 and area.max() > 0.9
    assert ratio.min() > 0.74 and ratio.max() < 1.35
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)], float)
    for ours, official in zip((top, left, h, w), theirs.T):
        assert np.quantile(ours, [0.1, 0.25, 0.5, 0.75, 0.9]) == pytest.approx(
            np.quantile(official, [0.1, 0.25, 0.5, 0.75, 0.9]), abs=9
        )
    jitter = np.array([(d.brightness, d.contrast, d.saturation) for d in draws])
    assert (abs(jitter - 1) <= 0.4).all() and (jitter.min(0) < 0.62).all() and (jitter.max(0) > 1.38).all()
    assert 0.47 < np.mean([d.horizontal_flip for d in draws]) < 0.53


def test_crops_are_uniform_in_area_place_and_the_logarithm_of_the_ratio():
    """Of an image in which every drawn crop fits; `share` is what a uniform draw on [0, 1] has."""
    config = DataConfig(crop_scale=(0.04, 0.2), crop_ratio=(0.4, 2.5))
    windows = [draw_augmentation(config, 0, 0, i, 1000, 1000).window for i in range(3000)]
    top, left, h, w = np.array(windows, float).T
    shares = {
        "area": (h * w / 1e6 - 0.04) / 0.16,
        "ratio": (np.log(w / h) - np.log(0.4)) / (np.log(2.5) - np.log(0.4)),
        "top": top / (1000 - h),
        "left": left / (1000 - w),
    }
    for name, share in shares.items():
        quantiles = np.quantile(share, [0.02, 0.25, 0.5, 0.75, 0.98])
        assert quantiles == pytest.approx([0.02, 0.25, 0.5, 0.75, 0.98], abs=0.03), name
    assert abs(np.corrcoef(list(shares.values())) - np.eye(4)).max() < 0.07


def test_shifts_are_uniform():
    config = DataConfig(crop_padding=2)
    draws = [draw_augmentation(config, 0, 0, i, 30, 40) for i in range(2500)]
    assert all(d.window is None for d in draws)
    rows, columns = np.array([d.shift for d in draws]).T
    counts = np.histogram2d(rows, columns, bins=np.arange(-2.5, 3))[0]
    assert counts.sum() == 2500 and counts.min() > 60 and counts.max() < 140
    assert 0.47 < np.mean([d.horizontal_flip for d in draws]) < 0.53
    assert {draw_augmentation(CONFIG, 0, 0, i, 30, 40).shift for i in range(9)} == {None}


def test_augmentation_falls_back_to_the_centre():
    window = draw_augmentation(DataConfig(crop_scale=(1, 1)), 0, 0, 0, 10, 100).window
    assert window == (0, 43, 10, 13)  # ratio 4/3, as large as fits


def test_validation_geometry_has_no_branch():
    """With the numbers of the official arithmetic, which asks which side is the shorter one; of tensors too."""
    rng = np.random.default_rng(0)
    sizes = [
        *((1, 1), (1, 4000), (4000, 1), (256, 256), (37, 37), (512, 512), (6, 111)),
        *rng.integers(1, 1500, (2000, 2)),
    ]
    for resize, crop in ((256, 224), (36, 32), (37, 32), (28, 28), (293, 224)):
        for height, width in ((int(a), int(b)) for a, b in (*sizes, *((b, a) for a, b in sizes[:7]))):
            if height < width:
                size = resize, int(width * (resize / height) + 0.5)
            else:
                size = int(height * (resize / width) + 0.5) if height != width else resize, resize
            expected = size, tuple(round((side - crop) / 2) for side in size)
            assert validation_geometry(DataConfig(crop, resize), height, width) == expected
            if height < 200:
                sides, short = (torch.tensor(n, dtype=torch.float64) for n in ([height, width], resize))
                found = resize_and_crop(sides, short, crop, torch)
                assert tuple(tuple(pair.tolist()) for pair in found) == expected


def test_the_validation_crop_is_torchvisions():
    rng = np.random.default_rng(0)
    for height, width, px in rng.integers(40, 400, (60, 3)):
        config = DataConfig(input_size=int(px), val_resize=int(px + rng.integers(0, 9)))
        (h, w), (top, left) = validation_geometry(config, int(height), int(width))
        place = torch.arange(h * w).reshape(1, h, w)
        assert int(center_crop(place, [px, px])[0, 0, 0]) == top * w + left


# --- loaders


@pytest.mark.parametrize("backend", BACKENDS)
def test_colour_order_and_range(tmp_path, backend):
    images = single(tmp_path, Image.new("RGB", (40, 40), (250, 100, 3)))
    loader = Loader(images, CONFIG, False, backend=backend, workers=0)
    batch, _ = next(loader.batches(evaluation_plan(1, 1)))
    assert batch.dtype == torch.float32 and batch.shape == (1, 3, 32, 32)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert batch[0].mean(dim=(1, 2)).tolist() == [3, 100, 250]  # BGR, not scaled
    loader = Loader(images, dataclasses.replace(CONFIG, preprocessing="imagenet"), False, backend=backend, workers=0)
    batch, _ = next(loader.batches(evaluation_plan(1, 1)))
    expected = [(250 / 255 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224, (3 / 255 - 0.406) / 0.225]
    assert batch[0].mean(dim=(1, 2)).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jitter_uses_the_luma_of_rgb(tmp_path, backend, monkeypatch):
    images = single(tmp_path, Image.new("RGB", (40, 40), (0, 0, 255)))
    monkeypatch.setattr(dataloader, "draw_augmentation", lambda *_: Augmentation((0, 0, 40, 40), saturation=0.0))
    grey = first(images, CONFIG, True, backend).float().mean(dim=(0, 1))
    assert grey.tolist() == pytest.approx([29] * 3, abs=1)  # 0.114 * 255; twisted as BGR it would be 76


@pytest.mark.parametrize("backend", BACKENDS)
def test_flip_and_crop_follow_the_parameters(tmp_path, backend, monkeypatch):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32, :32] = 200  # the upper left quarter
    images = single(tmp_path, Image.fromarray(pixels))
    for flip, column in ((False, 0), (True, 1)):
        monkeypatch.setattr(
            dataloader, "draw_augmentation", lambda *_, flip=flip: Augmentation((0, 0, 64, 64), horizontal_flip=flip)
        )
        quarters = first(images, CONFIG, True, backend).float().mean(dim=2).reshape(2, 16, 2, 16).mean(dim=(1, 3))
        assert quarters[0, column] > 190 and quarters.sum() - quarters[0, column] < 30
    monkeypatch.setattr(dataloader, "draw_augmentation", lambda *_: Augmentation((0, 0, 32, 32)))
    assert first(images, CONFIG, True, backend).float().mean() > 195


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["jpg", "webp"])  # DALI is not trusted with the second
def test_shifts_move_the_crop_of_validation_over_black(tmp_path, backend, kind, monkeypatch):
    config = dataclasses.replace(CONFIG, crop_padding=4, jitter=0)
    pixels = np.random.default_rng(0).integers(60, 255, (5, 6, 3), np.uint8)
    (tmp_path / "c").mkdir()
    path = tmp_path / "c" / f"image.{kind}"
    Image.fromarray(pixels).resize((60, 50), Image.Resampling.BICUBIC).save(path, quality=95)
    images = ImageSet(str(tmp_path), (f"c/image.{kind}",), np.zeros(1, np.int64), ("c",))
    whole = np.pad(first(images, config, False, backend).numpy(), ((4, 4), (4, 4), (0, 0)))
    for top, left in ((-4, 3), (2, -1), (0, 0)):
        shift = Augmentation(None, (top, left))
        monkeypatch.setattr(dataloader, "draw_augmentation", lambda *_, shift=shift: shift)
        moved = first(images, config, True, backend).numpy()
        assert np.array_equal(moved, whole[4 + top : 36 + top, 4 + left : 36 + left])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_image_of_a_batch_has_its_own_shift(tree, backend):
    """And jitter, and flip: in a batch as alone."""
    config = dataclasses.replace(CONFIG, crop_padding=4)
    plan = evaluation_plan(6, 6)
    assert len({draw_augmentation(config, 0, *sample, 50, 50).shift for sample in plan[0]}) > 3
    loader = Loader(scan(tree / "train"), config, True, backend=backend, workers=0)
    ((batch, _),) = loader.decode(plan)
    alone = torch.cat([images for images, _ in loader.decode([sample[None] for sample in plan[0]])])
    assert torch.equal(batch, alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jitter_and_flip_follow_a_shift(tmp_path, backend, monkeypatch):
    images = single(tmp_path, Image.new("RGB", (40, 40), (0, 0, 255)))
    shift = Augmentation(None, (0, 3), saturation=0.0, horizontal_flip=True)
    monkeypatch.setattr(dataloader, "draw_augmentation", lambda *_: shift)
    got = first(images, dataclasses.replace(CONFIG, crop_padding=4), True, backend).float()
    assert got[:, 3:].mean().item() == pytest.approx(29, abs=1) and got[:, :3].max() <= 1


def bilinear(image, size):
    """cv2.INTER_LINEAR's definition in float64: half-pixel centres, clamped, no antialias. (H, W, 3) -> (*size, 3)."""
    for axis in (0, 1):
        n, out = image.shape[axis], size[axis]
        x = np.clip((np.arange(out) + 0.5) * n / out - 0.5, 0, n - 1)
        low = np.floor(x).astype(int)
        share = (x - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        image = np.take(image, low, axis) * (1 - share) + np.take(image, np.minimum(low + 1, n - 1), axis) * share
    return image


@pytest.mark.parametrize("backend", BACKENDS)
def test_validation_transform_is_cv2s_resize_and_the_centre(tmp_path, backend):
    image = coloured_image(np.random.default_rng(5), 90, 61)
    config = DataConfig(input_size=32, val_resize=40)
    (height, width), (top, left) = validation_geometry(config, 90, 61)
    assert (height, width) == (59, 40)
    expected = bilinear(np.asarray(image, float), (height, width))[top : top + 32, left : left + 32]
    difference = np.abs(first(single(tmp_path, image), config, False, backend).numpy() - expected)
    assert difference.max() <= 1.5 and difference.mean() < 0.6


@pytest.mark.skipif(not dataloader.importlib.util.find_spec("nvidia.dali"), reason="DALI is not installed")
@pytest.mark.parametrize("augment, jitter, mean", [(False, 0.4, 0.4), (True, 0.0, 0.4), (True, 0.4, 10.0)])
def test_dali_and_torchvision_agree(tree, augment, jitter, mean):
    """With jitter they differ in what contrast turns about: 128 in DALI, the image's mean in torchvision."""
    images, config = scan(tree / "train"), dataclasses.replace(CONFIG, jitter=jitter)
    plan = list(training_plan(len(images), 7, 0, steps=6)) + evaluation_plan(len(images), 7)
    got = [list(Loader(images, config, augment, 1, backend=b, workers=1).decode(plan)) for b in ("dali", "torchvision")]
    assert len(got[0]) == len(got[1]) == len(plan)
    for (a, labels_a), (b, labels_b), batch in zip(*got, plan):
        assert (labels_a == labels_b).all() and (labels_a.numpy() == images.labels[batch[:, 1]]).all()
        assert (a.float() - b.float()).abs().mean() < mean


@pytest.mark.parametrize("backend", BACKENDS)
def test_workers_and_ragged_batches_change_nothing(tree, backend):
    images = scan(tree / "val")
    a, b = (
        list(Loader(images, CONFIG, True, backend=backend, workers=w).decode(evaluation_plan(21, s)))
        for w, s in ((0, 8), (2, 5))
    )
    assert [len(x) for x, _ in a] == [8, 8, 5] and [len(x) for x, _ in b] == [5, 5, 5, 5, 1]
    assert torch.equal(torch.cat([x for x, _ in a]), torch.cat([x for x, _ in b]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_workers_run_can_be_sent_to_them(tree, backend, monkeypatch):
    """As spawn and forkserver do, the only ways on Windows and macOS."""
    given = {}

    def loader(dataset, **how):
        given.update(dataset=dataset, **how)
        raise StopAsyncIteration

    monkeypatch.setattr("torch.utils.data.DataLoader", loader)
    images = scan(tree / "val")
    with pytest.raises(StopAsyncIteration):
        next(Loader(images, CONFIG, True, backend=backend, workers=1).decode(evaluation_plan(21, 8)))
    parts = [given[name] for name in ("dataset", "collate_fn", "worker_init_fn")]
    dataset, collate, _ = pickle.loads(ForkingPickler.dumps(parts))
    (a, *_), (b, *_) = (d.__getitems__(evaluation_plan(21, 8)[0]) for d in (dataset, given["dataset"]))
    encoded = (lambda made: made) if backend == "torchvision" else (lambda made: made["encoded"])
    assert torch.equal(encoded(collate(a)), encoded(b))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_workers_start_in_every_way(tree, backend, method):
    before = multiprocessing.get_start_method()
    images, plan = scan(tree / "val"), evaluation_plan(21, 8)
    expected = [x for x, _ in Loader(images, CONFIG, True, backend=backend, workers=0).decode(plan)]
    multiprocessing.set_start_method(method, force=True)
    try:
        found = [x for x, _ in Loader(images, CONFIG, True, backend=backend, workers=2).decode(plan)]
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert len(found) == 3 and all(map(torch.equal, found, expected))


@pytest.fixture
def in_workers(monkeypatch):
    """Calls a function in the worker processes, before each batch."""

    def install(function):
        for images in (dataloader._TorchvisionImages, dataloader._EncodedImages):

            def make(self, samples, make=images._make):
                function()
                return make(self, samples)

            monkeypatch.setattr(images, "_make", make)

    return install


def waited_for(tree, backend, after_s=30, error=TimeoutError, size=8):
    """Decodes with two workers; raises `error` after some seconds. Returns (sizes of the batches, workers)."""
    workers, images = [], scan(tree / "val")

    def stop(*_):
        workers.extend(multiprocessing.active_children())
        raise error

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        loader = Loader(images, CONFIG, False, backend=backend, workers=2)
        return [len(batch) for batch, _ in loader.decode(evaluation_plan(len(images), size))], workers
    except Interrupted:
        return None, workers
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_that_does_not_fit_into_shared_memory_is_named(tree, backend, in_workers):
    """As with a full /dev/shm; a limit on the sizes of files needs no right to mount one."""
    in_workers(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1)))
    text = r"8 images \(File too large .*takes [0-9.]+ MiB, up to 4 .*/dev/shm has .* MiB.*--workers.*--shm-size 1g"
    with pytest.raises(UserError, match=text):
        waited_for(tree, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tmpdir_whose_path_is_too_long_for_a_socket_is_named(tree, tmp_path, backend, monkeypatch):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr("multiprocessing.util.get_temp_dir", lambda: str(folder))
    with pytest.raises(UserError, match=r"^TMPDIR .*too long.*short path"):
        waited_for(tree, backend)


def test_a_dev_shm_without_room_for_semaphores_is_named(tree, no_semaphores):
    with pytest.raises(UserError, match=r"^/dev/shm: No space left on device: .*semaphores.*--shm-size"):
        waited_for(tree, "torchvision")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_worker_in_the_midst_of_a_batch_ends_with_the_wait_for_it(tree, backend, in_workers):
    """The process would wait for it when it ends."""
    in_workers(lambda: time.sleep(60))
    sizes, workers = waited_for(tree, backend, 0.3, Interrupted)
    assert sizes is None and len(workers) == 2
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0]


@pytest.mark.slow
def test_a_batch_may_take_its_time(tree, in_workers):
    in_workers(lambda: time.sleep(90))
    assert waited_for(tree, "torchvision", 600, size=21)[0] == [21]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "damage",
    [lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"text"), lambda p: p.write_bytes(p.read_bytes()[:300])],
)
def test_a_damaged_image_is_named(tmp_path, backend, damage):
    images = scan(make_tree(tmp_path / "d", 4, 1) / "train")
    damage(tmp_path / "d" / "train" / "bird" / "001.jpg")
    with pytest.raises(UserError, match=r"bird/001\.jpg"):
        list(Loader(images, CONFIG, False, backend=backend, workers=2).decode(evaluation_plan(len(images), 5)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize(
    "mode, size, kind",
    [("RGB", (1, 1), "png"), ("RGB", (1, 1), "jpg"), ("L", (1, 300), "jpg"), ("RGB", (2500, 2000), "jpg")],
)
def test_unusual_sizes_are_accepted(tmp_path, backend, augment, mode, size, kind):
    image = Image.new("RGB", size, (10, 200, 100)).convert(mode)
    (tmp_path / "c").mkdir()
    image.save(tmp_path / "c" / f"image.{kind}")
    found = image_check.inspect(tmp_path / "c" / f"image.{kind}")
    assert found.reason is None and found.suffix is None
    images = ImageSet(str(tmp_path), (f"c/image.{kind}",), np.zeros(1, np.int64), ("c",))
    got = first(images, dataclasses.replace(CONFIG, jitter=0), augment, backend).float().mean(dim=(0, 1))
    expected = np.asarray(image.convert("RGB"), float).mean((0, 1))
    assert got.tolist() == pytest.approx(expected.tolist(), abs=4 if kind == "jpg" else 1.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("augment", [False, True])
def test_exif_orientation_is_ignored(tmp_path, backend, augment, monkeypatch):
    monkeypatch.setattr(dataloader, "draw_augmentation", lambda *_: Augmentation((0, 0, 40, 40)))
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = 200  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    (tmp_path / "c").mkdir()
    Image.fromarray(pixels).save(tmp_path / "c" / "image.jpg", exif=exif)
    images = ImageSet(str(tmp_path), ("c/image.jpg",), np.zeros(1, np.int64), ("c",))
    rows = first(images, CONFIG, augment, backend).float().mean(dim=(1, 2))
    assert rows[:12].min() > 180 and rows[-12:].max() < 20


def test_synthetic_images_need_no_files():
    data = Data(None, DataConfig(input_size=32))
    loader = Loader(data.images("supernet"), CONFIG, True, backend="synthetic")
    images, labels = next(loader.batches(training_plan(len(loader.images), 6, 0)))
    assert images.shape == (6, 3, 32, 32) and labels.shape == (6,) and len(data.classes) == 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_arrive_on_the_gpu(tree, backend):
    images = scan(tree / "val")
    (a, _), (b, labels) = (
        next(Loader(images, CONFIG, True, device=d, backend=backend).batches(evaluation_plan(21, 8)))
        for d in ("cpu", "cuda")
    )
    assert b.device.type == labels.device.type == "cuda"
    assert (a - b.cpu()).abs().mean() < 3

"""The check of an image tree: `python dataloader.py --check DIR`, and scripts that refuse a tree that failed it."""

import argparse
import json
import os
import re
import shutil

import pytest
from conftest import ROOT, make_tree, run
from PIL import Image

from images import image_check
from images.dataset import Data, DataConfig, scan, tree_paths
from utils import MAX_JSON_BYTES, UserError

SCRATCH = (
    "--input-size",
    32,
    "--heldout-per-class",
    1,
    "--batch-size",
    4,
    "--iterations",
    1,
    "--bn-pass",
    0,
    "--loader",
    "torchvision",
)


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "d", 4, 2)


@pytest.fixture
def record(tmp_path):
    """Where trees that passed are remembered."""
    return tmp_path / "cache" / "checked.json"


def paths(tree):
    return tree_paths(scan(tree / "train"), scan(tree / "val"))


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def breakages(tree):
    """Damages a tree in every way; {path: what the line about it says}."""
    bird, car = tree / "train" / "bird", tree / "train" / "car"
    (bird / "000.jpg").write_bytes(b"")
    cut(bird / "001.jpg", 0.9)
    cut(tree / "val" / "bird" / "001.jpg", 0.01)
    (bird / "002.jpg").write_text("text")
    Image.new("RGB", (9, 9)).save(bird / "animation.gif")
    (bird / "animation.gif").rename(bird / "003.jpg")
    Image.new("I;16", (9, 9), 700).save(car / "deep.png")
    Image.new("RGB", (9, 9)).save(car / "portable.png")
    (car / "portable.png").rename(car / "portable.jpg")
    shutil.copy(tree / "train" / "apple" / "000.jpg", tree / "val" / "car" / "twice.jpg")
    shutil.copy(tree / "train" / "apple" / "000.jpg", tree / "val" / "apple" / "same_class.jpg")  # not mislabelled
    (car / "notes.txt").write_text("text")
    (car / "deeper").mkdir()
    (tree / "val" / "dog").mkdir()
    (tree / "train" / "cat").symlink_to(tree / "gone")
    (bird / "link.jpg").symlink_to(tree / "gone.jpg")
    shutil.copy(car / "000.jpg", car / "000 (1).jpg")
    return {
        "train/cat": "a link to what does not exist", "train/bird/link.jpg": "No such file",
        "train/car/000.jpg": "a copy of train/car/000 (1).jpg",
        "train/bird/000.jpg": "empty", "train/bird/001.jpg": "a damaged image", "val/bird/001.jpg": "a damaged image",
        "train/bird/002.jpg": "not an image", "train/bird/003.jpg": "a GIF file", "train/car/deep.png": "8 bits",
        "train/car/portable.jpg": "content of a .png", "val/car/twice.jpg": "the same image as train/apple/000.jpg",
        "train/car/notes.txt": "ignored", "train/car/deeper": "a folder inside", "val/dog": "a class without images",
    }  # fmt: skip


def test_check_names_all_that_is_wrong_at_once(tree):
    expected = breakages(tree)
    stdout, summary = run("dataloader.py", "--check", tree, "--accept", code=2)  # which accepts no unreadable file
    lines = stdout.splitlines()
    for path, reason in expected.items():
        (line,) = [line for line in lines if line.startswith(f"{tree / path}: ")]
        assert reason in line
    (line,) = [line for line in lines if "'dog' is in only one of train and val" in line]
    (line,) = [line for line in lines if line.startswith(f"{tree}/val/apple/same_class.jpg: ")]
    assert "the same image as train/apple/000.jpg" in line
    assert len(lines) == len(expected) + 2 and len(summary.splitlines()) == 1
    assert "7 unreadable, 2 mislabelled, 1 in train and val, 1 copies in train of 24 images, 4 wrong folders" in summary
    assert "--accept" not in summary


def test_check_says_that_all_is_well(tree):
    stdout, stderr = run("dataloader.py", "--check", tree)
    assert "12 training and 6 validation images of 3 classes" in stdout and stderr == ""


def test_check_says_what_the_settings_do_not_suit(tree, tmp_path):
    """Greyscale images with jitter, images smaller than the input, a white glyph that is seen through to white."""
    for path in tree.glob("*/*/*.jpg"):
        with Image.open(path) as image:
            image.convert("L").save(path)
    glyph = Image.new("RGBA", (40, 40), (255, 255, 255, 0))
    glyph.paste((255, 255, 255, 255), (10, 10, 30, 30))
    glyph.save(tree / "val" / "car" / "glyph.png")
    (tmp_path / "own.yml").write_text("common: {input-size: 100, heldout-per-class: 2}")
    stdout, _ = run("dataloader.py", "--check", tree, "--config", tmp_path / "own.yml")
    assert f"{tree}/val/car/glyph.png: one colour on the ground of alpha: white\n" in stdout
    assert "19 of 19 images are greyscale: their saturation can't vary; try jitter: 0\n" in stdout
    assert "19 of 19 images are smaller than the input: try less than input-size 100\n" in stdout
    stdout, _ = run("dataloader.py", "--check", tree, "--alpha", "black", "--jitter", 0, "--input-size", 32)
    assert "one colour" not in stdout and "try" not in stdout
    _, stderr = run("dataloader.py", "--check", tree, "--heldout-per-class", 4, code=2)
    assert "4 held-out images per class leave nothing to train on" in stderr
    _, stderr = run("dataloader.py", "--alpha", "black", code=2)
    assert "--check: name a folder" in stderr and len(stderr.splitlines()) == 1


def test_check_of_no_tree_is_one_line(tmp_path):
    _, stderr = run("dataloader.py", "--check", tmp_path / "none", code=2)
    assert len(stderr.splitlines()) == 1 and "none/train: no such folder" in stderr


@pytest.mark.parametrize("script", ["scratch.py", "supernet.py"])
def test_training_refuses_before_it_starts(tree, tmp_path, script):
    words = [*SCRATCH, "--data-dir", tree, "--out", tmp_path / "out"]
    if script == "supernet.py":
        words = [w for w in words if w not in ("--bn-pass", 0)]
    cut(tree / "val" / "car" / "001.jpg", 0.9)
    (tree / "train" / "bird" / "002.jpg").write_bytes(b"")
    stdout, stderr = run(script, *words, code=2)
    assert stdout == "" and len(stderr.splitlines()) == 1
    assert (
        "2 unreadable and 0 mislabelled files, the first: train/bird/002.jpg: an empty file" in stderr
        and f"--check {tree}" in stderr
    )
    assert not (tmp_path / "out").exists()


def test_accepted_files_may_be_trained_on(tree, tmp_path):
    words = ("scratch.py", *SCRATCH, "--data-dir", tree, "--out", tmp_path / "out")
    shutil.copy(tree / "train" / "apple" / "000.jpg", tree / "train" / "car" / "twice.jpg")
    _, stderr = run(*words, code=2)
    assert "the same image as train/apple/000.jpg" in stderr and "--accept" in stderr
    stdout, _ = run("dataloader.py", "--check", tree, "--accept")
    assert "train/car/twice.jpg" in stdout and "1 mislabelled" in stdout
    run(*words)


def test_the_code_about_apps_takes_accepted_files(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(tree / "train" / "apple" / "000.jpg", tree / "train" / "car" / "twice.jpg")
    run("dataloader.py", "--check", tree, "--accept", "--cache", "data/cache")
    (code,) = re.findall(r"^train = (Data\(.*\))\.train$", (ROOT / "docs" / "deploy.md").read_text(), re.M)
    program = argparse.Namespace(config=DataConfig(32, 32))
    found = eval(code.replace('"sorted"', "tree"), {"Data": Data, "tree": tree, "program": program})
    assert "car/twice.jpg" in found.train.paths


def test_a_tree_that_passed_is_not_decoded_again_until_it_changes(tree, record, monkeypatch):
    image_check.check_images(tree, paths(tree), record.parent)
    assert list(json.loads(record.read_text())) == [str(tree)]
    with monkeypatch.context() as context:
        context.setattr(image_check, "inspect", None)
        image_check.check_images(tree, paths(tree), record.parent)
    image = tree / "train" / "bird" / "002.jpg"
    content, times = image.read_bytes(), image.stat()
    image.write_bytes(bytes(len(content)))  # the same size
    with pytest.raises(UserError, match=r"train/bird/002\.jpg: not an image"):
        image_check.check_images(tree, paths(tree), record.parent)
    image.write_bytes(content)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    monkeypatch.setattr(image_check, "inspect", None)
    image_check.check_images(tree, paths(tree), record.parent)


def test_a_new_image_is_checked(tree, record):
    image_check.check_images(tree, paths(tree), record.parent)
    (tree / "val" / "car" / "new.jpg").write_text("text")
    with pytest.raises(UserError, match=r"val/car/new\.jpg"):
        image_check.check_images(tree, paths(tree), record.parent)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"other": 1}'])
def test_a_damaged_record_is_made_anew(tree, record, content):
    record.parent.mkdir()
    record.write_text(content)
    image_check.check_images(tree, paths(tree), record.parent)
    assert list(json.loads(record.read_text())) == [str(tree)]


def test_the_record_of_a_tree_with_many_copies_is_read(tree, record, monkeypatch):
    """It has the names of all copies."""
    image_check.check_images(tree, paths(tree), record.parent)
    record.write_text(record.read_text() + " " * MAX_JSON_BYTES)
    monkeypatch.setattr(image_check, "inspect", None)
    image_check.check_images(tree, paths(tree), record.parent)


def test_a_record_that_cannot_be_written_does_no_harm(tree, record, caplog):
    record.parent.write_text("a file where the folder should be")
    image_check.check_images(tree, paths(tree), record.parent)
    assert "checked again next time" in caplog.text


def test_records_are_kept_in_the_folder_of_cache(tree, tmp_path, touched):
    """And nothing in the checkout, which may be read-only."""
    record = tmp_path / "cache" / "checked.json"
    run("dataloader.py", "--check", tree, "--cache", record.parent)
    assert list(json.loads(record.read_text())) == [str(tree)]
    record.unlink()
    Data(tree, DataConfig(heldout_per_class=1), record.parent)
    assert list(json.loads(record.read_text())) == [str(tree)]
    written = [path for what, path in touched if what == "write"]
    assert written and not [path for path in written if path.startswith(f"{ROOT}/") and "__pycache__" not in path]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["jpg", "png", "bmp", "webp", "tif", "ppm"])
def test_a_cut_file_is_found_in_every_format(tmp_path, kind, share):
    path = tmp_path / f"image.{kind}"
    Image.effect_noise((64, 48), 60).convert("RGB").save(path)
    assert image_check.inspect(path)[1:4] == (None, None, False)
    cut(path, share)
    assert image_check.inspect(path).reason

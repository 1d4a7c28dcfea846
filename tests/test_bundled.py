"""The bundled images: the archive, how it is made, and how it is unpacked."""

import collections
import gzip
import hashlib
import importlib.util
import io
import multiprocessing
import os
import shutil
import struct
import sys
import tarfile

import pytest
from PIL import Image

from images import bundled
from utils import HERE, UserError

CLASSES = {"t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"}


def content(folder):
    """Relative path -> bytes, of every file that isn't hidden."""
    return {path: (folder / path).read_bytes() for path in bundled.files(folder)}


def load_maker():
    spec = importlib.util.spec_from_file_location("make_fashion_mnist", HERE / "data" / "make_fashion_mnist.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    return maker


@pytest.fixture(scope="module")
def images():
    """Path -> bytes of what the bundled archive holds."""
    with tarfile.open(bundled.ARCHIVE) as archive:
        files = [member for member in archive if member.isfile()]
        return {f.name.removeprefix("fashion-mnist/"): archive.extractfile(f).read() for f in files}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An archive of 30 images, made by the script from files of its own form, in the place of the bundled one."""
    maker = load_maker()
    monkeypatch.setattr(maker, "HERE", tmp_path)
    monkeypatch.setattr(maker, "PARTS", {"train": ("train", 2), "val": ("t10k", 1)})
    (tmp_path / "fashion-mnist-LICENSE.txt").write_text("licence\n")
    for part, n in (("train", 50), ("t10k", 20)):
        labels = bytes(i * 3 % 10 for i in range(n))
        pixels = b"".join(bytes([i]) * 784 for i in range(n))
        for name, data in (
            ("images-idx3", struct.pack(">4I", 2051, n, 28, 28) + pixels),
            ("labels-idx1", struct.pack(">2I", 2049, n) + labels),
        ):
            with gzip.open(tmp_path / f"{part}-{name}-ubyte.gz", "wb") as file:
                file.write(data)
            monkeypatch.setitem(maker.SHA256, f"{part}-{name}-ubyte.gz", hashlib.sha256(data).hexdigest())
    maker.main([str(tmp_path)])
    monkeypatch.setattr(bundled, "ARCHIVE", tmp_path / "fashion-mnist.tar.xz")
    return maker


def test_archive_is_at_most_8_mb():
    assert bundled.ARCHIVE.stat().st_size <= 8_000_000


def test_has_ten_classes_with_1000_training_and_500_test_images(images):
    counts = collections.Counter(os.path.dirname(path) for path in images)
    assert counts == {"": 1} | {f"train/{c}": 1000 for c in CLASSES} | {f"val/{c}": 500 for c in CLASSES}


def test_images_are_greyscale_jpeg_of_28_px(images):
    for path, content in images.items():
        if path != "LICENSE.txt":
            with Image.open(io.BytesIO(content)) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "L", (28, 28)), path


def test_no_image_is_there_twice_and_none_is_blank(images):
    assert len(set(images.values())) == len(images)  # so that val has nothing of train
    assert min(map(len, images.values())) > 300


def test_licence_is_in_the_archive_and_beside_it(images):
    text = images["LICENSE.txt"].decode()
    assert "Copyright (c) 2017 Zalando SE" in text and "Permission is hereby granted" in text
    assert text == (HERE / "data" / "fashion-mnist-LICENSE.txt").read_text()


def test_script_takes_the_first_of_each_class(small, tmp_path):
    folder = bundled.unpack(tmp_path / "out")
    paths = set(bundled.files(folder))
    # item i has label 3i % 10, so class c has items 7c % 10, 7c % 10 + 10, ...
    first = {c: 7 * c % 10 for c in range(10)}
    assert paths == {"LICENSE.txt"} | {
        f"{part}/{name}/{first[c] + skip:05d}.jpg"
        for c, name in enumerate(small.CLASSES)
        for part, skip in (("train", 0), ("train", 10), ("val", 0))
    }
    with Image.open(
        folder / "train" / small.CLASSES[3] / "00011.jpg"
    ) as image:  # class 3: items 1 and 11, of grey level 1 and 11
        assert abs(image.getpixel((14, 14)) - 11) <= 1


def test_script_gives_the_same_bytes_again(small, tmp_path):
    before = bundled.ARCHIVE.read_bytes()
    os.utime(tmp_path / "train-images-idx3-ubyte.gz", (0, 0))
    small.main([str(tmp_path)])
    assert bundled.ARCHIVE.read_bytes() == before


def test_script_refuses_other_files(small, tmp_path, capsys):
    with gzip.open(tmp_path / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"other")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SystemExit) as exit_:
            small.main([str(folder)])
        assert exit_.value.code == 2
    assert "t10k-labels-idx1-ubyte.gz: not the original" in capsys.readouterr().err


def test_unpacks_once(small, tmp_path):
    folder = bundled.unpack(tmp_path / "deep" / "images")
    before = {path: (folder / path).stat().st_ino for path in bundled.files(folder)}
    assert len(before) == 31
    assert bundled.unpack(folder) == folder
    assert {path: (folder / path).stat().st_ino for path in bundled.files(folder)} == before
    assert [path.name for path in folder.parent.iterdir()] == ["images"]  # nothing temporary stays


def _cut_short(folder):
    path = folder / bundled.files(folder)[-1]
    path.write_bytes(path.read_bytes()[:-10])


def _change(folder):
    path = folder / bundled.files(folder)[-1]
    path.write_bytes(bytes(path.stat().st_size))


def _lose_one(folder):
    (folder / bundled.files(folder)[-1]).unlink()


def _lose_class(folder):
    shutil.rmtree(folder / "train" / "coat")


def _half_unpacked(folder):
    shutil.rmtree(folder / "val")
    (folder / bundled.NOTE).unlink()


@pytest.mark.parametrize("damage", [_cut_short, _change, _lose_one, _lose_class, _half_unpacked])
def test_damaged_folder_is_made_whole(small, tmp_path, damage):
    folder = bundled.unpack(tmp_path / "images")
    whole = content(folder)
    damage(folder)
    assert content(folder) != whole
    assert content(bundled.unpack(folder)) == whole
    assert bundled.is_complete(folder)


def test_interrupted_unpacking_is_redone(small, tmp_path, monkeypatch):
    moves = []

    def replace(source, target):
        moves.append(target)
        if len(moves) == 10:
            raise KeyboardInterrupt
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(bundled.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            bundled.unpack(tmp_path / "images")
    assert len(bundled.files(tmp_path / "images")) == 9
    assert len(bundled.files(bundled.unpack(tmp_path / "images"))) == 31


def test_another_archive_replaces_the_images(small, tmp_path):
    folder = bundled.unpack(tmp_path / "images")
    old = content(folder)
    small.JPEG_QUALITY = 10
    small.main([str(tmp_path)])
    new = content(bundled.unpack(folder))
    assert new.keys() == old.keys() and new != old


def test_folder_with_anything_else_in_it_is_not_touched(small, tmp_path):
    folder = tmp_path / "mine"
    (folder / "train" / "coat").mkdir(parents=True)
    (folder / "train" / "coat" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"--data-dir .*mine: '.*holiday.jpg' is none of the bundled images"):
        bundled.unpack(folder)
    assert content(folder) == {os.path.join("train", "coat", "holiday.jpg"): b"mine"}
    assert not (folder / "val").exists()


def test_hidden_files_do_not_matter(small, tmp_path):
    folder = bundled.unpack(tmp_path / "images")
    (folder / "train" / ".DS_Store").write_bytes(b"x")
    assert bundled.is_complete(folder)
    _lose_one(folder)
    assert bundled.is_complete(bundled.unpack(folder))


def test_where_it_cannot_write(small, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "images"):
        with pytest.raises(
            UserError,
            match=r"--data-dir .*file.*: can't unpack the bundled images .*; choose a folder that can be written",
        ):
            bundled.unpack(folder)


def test_missing_or_damaged_archive(small, tmp_path, monkeypatch):
    whole = bundled.ARCHIVE.read_bytes()
    monkeypatch.setattr(bundled, "HERE", tmp_path)
    for damaged in (b"", b"not an archive", whole[: len(whole) // 2], whole[:200] + b"\0" * 50 + whole[250:]):
        bundled.ARCHIVE.write_bytes(damaged)
        with pytest.raises(UserError, match=r"fashion-mnist.tar.xz: damaged"):
            bundled.unpack(tmp_path / "images")
    bundled.ARCHIVE.unlink()
    with pytest.raises(UserError, match=r"fashion-mnist.tar.xz: missing"):
        bundled.unpack(tmp_path / "images")
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("damaged", [False, True])
def test_two_at_once(small, tmp_path, damaged):
    folder = tmp_path / "images"
    if damaged:
        _lose_class(bundled.unpack(folder))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)

    def unpack():
        barrier.wait(30)
        sys.exit(len(bundled.files(bundled.unpack(folder))) != 31)

    processes = [context.Process(target=unpack) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert bundled.is_complete(folder)

"""Calibration and validation images: decoded once on a machine, never stale, never half."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import resource
import shutil
import time

import numpy as np
import pytest
import torch

from dataloader import Loader
from images.dataset import DataConfig, evaluation_plan, scan
from images.image_cache import FixedBatches
from utils import UserError

CONFIG = DataConfig(input_size=32, val_resize=40)
N_IMAGES, IMAGE_BYTES = 21, 32 * 32 * 3


@pytest.fixture
def images(tree, tmp_path):
    return scan(shutil.copytree(tree / "val", tmp_path / "val"))


def loader_of(images, config=CONFIG, augment=True, seed=0):
    return Loader(images, config, augment, seed, backend="torchvision", workers=0)


def fixed(images, cache, plan=None, **changes):
    return FixedBatches(loader_of(images, **changes), plan or evaluation_plan(N_IMAGES, 8), cache)


def undecoded(images, cache, **changes):
    """The same, whose loader can't decode."""
    batches = fixed(images, cache, **changes)

    def decode(plan):
        raise AssertionError("decodes again")

    batches.loader.decode = decode
    return batches


def files(cache):
    return sorted(cache.glob("*.images"))


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(torch.equal(x, y) and torch.equal(m, n) for (x, m), (y, n) in zip(a, b))


def test_names_that_are_no_text(images, tmp_path):
    os.rename(tmp_path / "val" / "car" / "000.jpg", os.fsencode(tmp_path / "val" / "car") + b"/caf\xe9.jpg")
    images = scan(tmp_path / "val")
    assert same(fixed(images, tmp_path / "cache"), loader_of(images).batches(evaluation_plan(N_IMAGES, 8)))


def test_what_comes_from_the_file_is_what_the_loader_gives(images, tmp_path):
    expected = list(loader_of(images).batches(evaluation_plan(N_IMAGES, 8)))
    assert same(fixed(images, tmp_path / "cache"), expected)
    again = undecoded(images, tmp_path / "cache")
    assert len(again) == 3 and same(again, expected) and same(again, expected)


def test_the_file_is_laid_out_as_its_size_says(images, tmp_path):
    list(fixed(images, tmp_path))
    (path,) = files(tmp_path)
    assert path.stat().st_size == N_IMAGES * IMAGE_BYTES


class Recording:
    """The mapped images, and the rows of them that are read."""

    def __init__(self, array):
        self.array, self.rows = array, []

    def __getitem__(self, rows):
        self.rows += range(*rows.indices(len(self.array)))
        return self.array[rows]


def test_a_process_reads_its_share_and_keeps_nothing(images, tmp_path, monkeypatch):
    """Of batches of 8, 8 and 5 images the second of two ranks has the second."""
    opened, real = [], np.memmap
    monkeypatch.setattr(np, "memmap", lambda *args, **how: opened.append(Recording(real(*args, **how))) or opened[-1])
    batches = FixedBatches(loader_of(images), evaluation_plan(N_IMAGES, 8), tmp_path, rank=1, world_size=2)
    for n in (1, 2):
        ((x, _),) = batches
        assert len(x) == 8 and opened[n - 1].rows == list(range(8, 16)) and len(opened) == n
    held = [value for value in vars(batches).values() if hasattr(value, "__array__") or isinstance(value, Recording)]
    assert not held


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1}, {"augment": False}, {"plan": evaluation_plan(N_IMAGES, 8)[:2]},
        *({"config": dataclasses.replace(CONFIG, **other)} for other in (
            {"jitter": 0.1}, {"preprocessing": "imagenet"}, {"exif": "apply"}, {"alpha": "black"}, {"crop_padding": 4},
        )),
    ],
)  # fmt: skip
def test_other_settings_are_another_file(images, tmp_path, changes):
    list(fixed(images, tmp_path))
    batches = fixed(images, tmp_path, **changes)
    assert same(batches, batches.loader.batches(batches.plan))
    assert len(files(tmp_path)) == 2


def test_other_files_are_other_images(images, tmp_path):
    cache = tmp_path / "cache"
    list(fixed(images, cache))
    path = tmp_path / "val" / images.paths[3]
    shutil.copyfile(tmp_path / "val" / images.paths[4], path)
    assert same(fixed(images, cache), loader_of(images).batches(evaluation_plan(N_IMAGES, 8)))
    old = path.stat()
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 1))  # same size, but written since
    list(fixed(images, cache))
    assert len(files(cache)) == 3


@pytest.mark.parametrize("damage", ["truncated", "longer", "empty"])
def test_a_damaged_file_is_made_anew(images, tmp_path, damage):
    expected = list(fixed(images, tmp_path))
    (path,) = files(tmp_path)
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-1], "longer": data + b"x", "empty": b""}[damage])
    assert same(fixed(images, tmp_path), expected)
    assert path.read_bytes() == data


def test_what_a_killed_process_left_is_removed(images, tmp_path):
    list(fixed(images, tmp_path))
    (path,) = files(tmp_path)
    path.rename(tmp_path / f".{path.name}.abc.tmp")
    list(fixed(images, tmp_path))
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_a_bad_image_is_named_and_leaves_no_file(images, tmp_path):
    (tmp_path / "val" / images.paths[20]).write_bytes(b"no image")
    with pytest.raises(UserError, match=images.paths[20]):
        list(fixed(images, tmp_path / "cache"))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]


def test_a_full_disk_is_logged_and_the_images_come_anyway(images, tmp_path, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * IMAGE_BYTES, limits[1]))
    try:
        batches = fixed(images, tmp_path / "cache")
        expected = list(batches.loader.batches(batches.plan))
        assert same(batches, expected) and same(batches, expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("can't cache decoded images") == 1
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]


def test_a_folder_that_cannot_be_made_is_logged(images, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert len(list(fixed(images, tmp_path / "file" / "cache"))) == 3
    assert "--cache" in caplog.text


def decode_slowly(images, cache, journal):
    batches = fixed(images, cache)
    decode = batches.loader.decode

    def slow(plan):
        with open(journal, "a") as file:
            file.write("decoding\n")
        time.sleep(1)
        return decode(plan)

    batches.loader.decode = slow
    return [images.numpy() for images, _ in batches]


def test_two_processes_that_start_together_decode_once(images, tmp_path):
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        a, b = pool.map(decode_slowly, [images] * 2, [tmp_path / "cache"] * 2, [tmp_path / "journal"] * 2)
    assert (tmp_path / "journal").read_text() == "decoding\n"
    assert all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_images_come_on_the_gpu(images, tmp_path):
    loader = Loader(images, CONFIG, True, device="cuda", backend="torchvision", workers=0)
    batches = FixedBatches(loader, evaluation_plan(N_IMAGES, 8), tmp_path)
    before = torch.cuda.memory_allocated()  # an earlier test may have left a workspace of cuBLAS
    assert same(((x.cpu(), y.cpu()) for x, y in batches), fixed(images, tmp_path))
    assert torch.cuda.memory_allocated() == before

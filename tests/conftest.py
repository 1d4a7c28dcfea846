"""Shared fixtures: small trees of coloured images, bundled ones as tensors, and the scripts run as a person runs them."""

import argparse
import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from images import bundled

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLASSES = ("apple", "bird", "car")
SCRIPTS = ("supernet.py", "tester.py", "search.py", "scratch.py")

torch.set_num_threads(1)  # the same numbers on every machine, and no fight over two cores


def coloured_image(rng, height, width):
    """A smooth image in colour: every channel differs from the others everywhere, so a swap of channels shows."""
    field = rng.integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC)


def make_tree(root, train=12, val=7):
    """A `{train,val}/<class>/` tree of JPEG files of several sizes, `train` and `val` images a class."""
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("val", val)):
        for name in CLASSES:
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                height, width = (int(v) for v in rng.integers(40, 90, 2))
                coloured_image(rng, height, width).save(folder / f"{i:03d}.jpg", quality=95)
    return root


def load(path):
    """The module in a file, "bench/search.py", whose name a module at the root may have too."""
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def real_images(n, px):
    """`n` of the bundled training images, as many of each class in turn: (n, 3, px, px) in [0, 255], and their labels (n,)."""
    classes = sorted(
        path for path in (bundled.unpack(ROOT / "data" / "fashion-mnist") / "train").iterdir() if path.is_dir()
    )
    files = [sorted(folder.iterdir()) for folder in classes]
    images = []
    for i in range(n):
        with Image.open(files[i % len(classes)][i // len(classes)]) as image:
            images.append(np.asarray(image.convert("RGB").resize((px, px), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().contiguous(), torch.arange(n) % len(classes)


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("images"))


@pytest.fixture
def data_args(tree):
    return argparse.Namespace(data_dir=str(tree), loader="auto", demo=False)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The folder of decoded images for all scripts that `run` starts: not the project's own."""
    os.environ["TEST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def run(script, *words, code=0, cwd=None, **variables):
    """Runs a script in a process of its own, with environment variables; returns (standard output, standard error)."""
    if script in SCRIPTS:
        words += ("--cache", os.environ["TEST_CACHE"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    words = [str(w) for w in words]
    result = subprocess.run(
        [sys.executable, ROOT / script, *words], capture_output=True, text=True, env=environment, timeout=300, cwd=cwd
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout, result.stderr

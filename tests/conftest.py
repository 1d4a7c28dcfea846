"""Shared fixtures: small trees of coloured images, bundled ones as tensors, and scripts in this process or another."""

import contextlib
import errno
import functools
import gc
import importlib
import io
import multiprocessing.forkserver
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from dataloader import Loader
from engines import local_engine
from images import bundled
from settings.subjects import Images
from space import own, search_space
from training import step  # noqa: F401  which registers its rules
from training.evaluation import update_bn
from training.prefix_tree import PrefixTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLASSES = ("apple", "bird", "car")
SCRIPTS = ("supernet.py", "tester.py", "search.py", "scratch.py")

torch.set_num_threads(1)  # the same numbers on every machine, and no fight over two cores
utils.UserError.of_commands = True  # messages name flags
# A shell that starts the tests in the background lets them, and all that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


REGISTERED = (*own.REGISTRIES.values(), own.hashes, own.loaded, own.SAME_RULES, search_space.SAME_OPERATIONS)
AT_START = [known.copy() for known in REGISTERED]


def forget():
    """What files of users have registered is gone, as in another process."""
    for known, before in zip(REGISTERED, AT_START):
        known.clear()
        known.update(before)


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Own operations end with their module; what is imported is left out of the collection after each `run`: 0.2 s."""
    gc.collect()
    gc.freeze()
    yield
    forget()


def coloured_image(rng, height, width):
    """A smooth image in colour: every channel differs from the others everywhere, so a swap of channels shows."""
    field = rng.integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC)


def make_tree(root, train=12, val=7):
    """A `{train,val}/<class>/` tree of JPEG files of several sizes, `train` and `val` images per class."""
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("val", val)):
        for name in CLASSES:
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                height, width = (int(v) for v in rng.integers(40, 90, 2))
                coloured_image(rng, height, width).save(folder / f"{i:03d}.jpg", quality=95)
    return root


@functools.cache
def real_images(n, px):
    """`n` bundled training images of all classes in turn: (n, 3, px, px) in [0, 255], and their labels (n,)."""
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


@pytest.fixture(scope="session")
def data(tree):
    """The flags of the images, 9 of 36 held out; all that is decoded is decoded in the process itself."""
    size = "--input-size 16 --heldout-per-class 3 --loader torchvision --workers 0 --eval-batch-size 5 --threads 1"
    return ("--data-dir", tree, size)


@pytest.fixture
def images(tree):
    """The settings of the images."""
    return Images(data_dir=str(tree), cache=os.environ["TEST_CACHE"])


@pytest.fixture(scope="session", autouse=True)
def folders(tmp_path_factory):
    """Temporary files, decoded images and the record of checked trees go to folders of this session."""
    before = tempfile.gettempdir()
    temporary = tmp_path_factory.mktemp("tmp")
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    os.environ["TEST_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    multiprocessing.forkserver._forkserver._stop()  # waits for it, whose socket is in the folder
    os.environ["TMPDIR"] = tempfile.tempdir = before


@pytest.fixture
def forked(monkeypatch):
    """The local engine forks its workers: spawned ones would import torch again."""
    monkeypatch.setattr(local_engine, "SPAWN", multiprocessing.get_context("fork"))


FIGURES = dict.fromkeys(("generations", "plane", "operations", "best", "front-flops", "front-params"), b"")


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without figures, which take more than a second."""
    monkeypatch.setattr("reports.page.draw", lambda *_: FIGURES)


@pytest.fixture
def no_semaphores(monkeypatch):
    """A /dev/shm that is full: no process gets a semaphore."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", full)


@pytest.fixture
def used(monkeypatch):
    """What loaders decode: a list of (augmented, [path, ...]), one entry a batch, as it is decoded."""
    batches, decode = [], Loader.decode

    def recorded(loader, plan):
        taken = []
        for n, batch in enumerate(decode(loader, (taken.append(samples) or samples for samples in plan))):
            batches.append((loader.augment, [f"{loader.images.root}/{loader.images.paths[i]}" for i in taken[n][:, 1]]))
            yield batch

    monkeypatch.setattr(Loader, "decode", recorded)
    return batches


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_watching = []  # lists of (what, path), to which the audit hook adds; a hook can't be removed


def _note(event, arguments):
    if not _watching or event not in ("open", "os.listdir", "os.scandir"):
        return
    path, *_, flags = arguments if event == "open" else (*arguments, 0)
    if isinstance(path, (str, bytes, os.PathLike)):
        _watching[-1].append(("write" if (flags or 0) & WRITES else event, os.fsdecode(path)))


@functools.cache
def _audit():
    sys.addaudithook(_note)


@pytest.fixture
def touched(monkeypatch):
    """What this process opens, lists and asks the state of: a list of (what, path)."""
    found = []
    _audit()
    for name in ("stat", "lstat"):
        call = getattr(os, name)

        def noted(path, *args, call=call, **kwargs):
            if isinstance(path, (str, os.PathLike)):
                found.append(("stat", os.fspath(path)))
            return call(path, *args, **kwargs)

        monkeypatch.setattr(os, name, noted)
    _watching.append(found)
    yield found
    _watching.remove(found)


def tree_logits(supernet, candidates, calibration, images, bn="ema", **how):
    """{candidate: logits (N, classes)} from one walk of a tree, with BN statistics of the calibration batches."""
    tree = PrefixTree(supernet, candidates, **how)
    with torch.inference_mode(), tree.own_statistics():
        update_bn(supernet, tree.forward, calibration, bn)
        return dict(tree.logits(images))


def run(script, *words, code=0, cwd=None):
    """Runs a script in this process, as `launch` does in another; returns (standard output, standard error)."""
    module = importlib.import_module(script.removesuffix(".py"))
    words = _words(script, words)
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors, "\n") for errors in ("strict", "backslashreplace"))
    with _restored(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = [str(ROOT / script), *words]
        os.chdir(cwd or os.getcwd())
        try:
            utils.run_script(module.main, lambda: module.parse_args(words))
            returned = 0
        except SystemExit as end:
            returned = end.code or 0
    out, err = (stream.flush() or stream.buffer.getvalue().decode() for stream in (out, err))
    assert returned == code, out + err
    return out, err


def _words(script, words):
    """The arguments one by one, with "--a 1 --b" split; decoded images go to the session's folder by default."""
    cache = ["--cache", os.environ["TEST_CACHE"]] if script in (*SCRIPTS, "dataloader.py") else []
    return cache + [part for word in map(str, words) for part in (word.split() if word[:2] == "--" else [word])]


@contextlib.contextmanager
def _restored():
    """What a script changes in its process is as before after the block: log, arguments, folder, environment, torch."""
    log, argv, folder, environment = utils.log, sys.argv, os.getcwd(), dict(os.environ)
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    handlers, propagate, level = log.handlers, log.propagate, log.level
    log.handlers, log.propagate = [], False
    try:
        yield
    finally:
        for handler in log.handlers:
            handler.close()
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)
        sys.argv = argv
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.set_rng_state(random_state)
        gc.collect()  # closes files, and with them frees locks


NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # what !python inherits from a notebook


def launch(script, *words, code=0, cwd=None, **variables):
    """Runs a script in a process of its own, with environment variables; returns (standard output, standard error)."""
    command = [sys.executable, ROOT / script, *_words(script, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **NOTEBOOK, **variables}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=cwd)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout, result.stderr


CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["test_distributed", "supernet", "scratch", "torch._dynamo", "torch.utils.tensorboard"])


def _begun(function, arguments):
    multiprocessing.set_start_method("fork", force=True)  # for its loader, as in any process
    function(*arguments)


def started(function, *arguments):
    """A process that runs a function of a module: a fork of one that has imported the tests and has no threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")  # for the process that is forked, at the first call
        process = CLEAN.Process(target=_begun, args=(function, arguments))
        process.start()
    return process

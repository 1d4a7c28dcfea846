"""Folders, splits and plans: which images, in which order; decodes nothing.

A data set is a tree `DIR/{train,val}/<class>/<image>`. Some images of every class of train are held out: the supernet
trains on the others, the search validates on the held-out ones, scratch.py trains on all of train, and val serves for
the reported numbers only (paper section 4). The order of the images is a pure function of seed and epoch, so it does
not depend on loader, worker, rank or resuming.
Source: paper section 4.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib

import numpy as np

from images import bundled, image_check, pictures
from images.augmentation import CALIBRATE, HOLD_OUT, ORDER
from images.groups import (
    count_pairs,
    describe,
    draw_across,
    grouping_warnings,
    number_groups,
    read_groups,
    shared_groups,
    why_not,
)
from images.image_check import composed
from settings.subjects import DataConfig, Images
from utils import UserError, heartbeat, log, write_json

EXTENSIONS = tuple(suffix for suffixes in pictures.SUFFIXES.values() for suffix in suffixes)


# --- folders and splits --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Image files with labels; `paths` are relative to `root` (None: no files), labels (N,) index `classes`."""

    root: str
    paths: tuple
    labels: np.ndarray
    classes: tuple
    halves: np.ndarray | None = None  # (N,): 0 or 1, where two halves are told apart
    groups: np.ndarray | None = None  # (N,): numbers of the groups of --group-by

    def __len__(self):
        return len(self.paths)

    def take(self, indices):
        return dataclasses.replace(self, paths=tuple(self.paths[i] for i in indices), labels=self.labels[indices])


def check_folder(folder):
    """Raises UserError if there is no such folder."""
    if not pathlib.Path(folder).is_dir():
        raise UserError(
            f"{folder}: no such folder; choose a --data-dir with train/ and val/, or use the bundled images of --demo"
        )


def scan(folder, problems=None, suffixes=EXTENSIONS, ignored=None):
    """Returns the ImageSet of a `<class>/<image>` tree, in sorted order: the files with these suffixes.

    Raises UserError at the first problem; if a list `problems` is given, appends all of them to it instead. Other files
    are ignored, but for hidden ones; if a list `ignored` is given, appends their paths to it.
    """
    folder = pathlib.Path(folder)
    report = functools.partial(_report, problems)
    check_folder(folder)
    entries = [e for e in os.scandir(folder) if not e.name.startswith(".")]
    classes = sorted(e.name for e in entries if e.is_dir())
    for name in sorted(e.name for e in entries if e.is_symlink() and not os.path.exists(e)):
        report(f"{folder / name}: a link to what does not exist")
    forms = {}  # a name typed on Linux, and as macOS packs it, are two file names that look alike
    for name in classes:
        if (other := forms.setdefault(composed(name), name)) != name:
            both = f"class folders {other!a} and {name!a}"
            report(f"{folder}: {both} have one name in two forms of Unicode; merge them")
    if not classes:
        report(f"{folder}: has no class folders; images belong in {folder}/<class>/")
    paths, labels = [], []
    for label, name in enumerate(classes):
        heartbeat()
        entries = [e for e in os.scandir(folder / name) if not e.name.startswith(".")]
        for nested in sorted(e.name for e in entries if e.is_dir()):
            report(f"{folder / name / nested}: a folder inside a class folder; images belong in {folder}/<class>/")
        names = sorted(e.name for e in entries if not e.is_dir())
        files = [f"{name}/{file}" for file in names if file.lower().endswith(suffixes)]
        if ignored is not None:
            ignored += [f"{folder / name / file}" for file in names if not file.lower().endswith(suffixes)]
        if not files:
            report(f"{folder / name}: a class without images; remove the folder or fill it")
        paths += files
        labels += [label] * len(files)
    return ImageSet(str(folder), tuple(paths), np.array(labels, np.int64), tuple(classes))


def _report(problems, text):
    if problems is None:
        raise UserError(text)
    problems.append(text)


def scan_parts(folder, config, problems=None, ignored=None):
    """The ImageSets of train and val of a tree, by a DataConfig, with the same classes; otherwise as `scan`."""
    suffixes = tuple(suffix for suffix in EXTENSIONS if config.jfif or suffix != ".jfif")
    train, val = (scan(f"{folder}/{part}", problems, suffixes, ignored) for part in ("train", "val"))
    val = _with_classes_of(train, val)
    for name in sorted(set(train.classes) ^ set(val.classes)):
        _report(problems, f"{folder}: class folder {name!r} is in only one of train and val")
    return train, val


def _with_classes_of(train, val):
    """`val` with train's names and labels of the classes, where names differ in the form of Unicode alone."""
    known = {composed(name): name for name in train.classes}
    names = [known.get(composed(name), name) for name in val.classes]
    if names == [*val.classes] or len(set(names)) < len(names):
        return val
    classes = sorted(names)
    labels = np.array([classes.index(name) for name in names])[val.labels]
    order = np.argsort(labels, kind="stable")
    return ImageSet(val.root, tuple(val.paths[i] for i in order), labels[order], tuple(classes))


def alike_classes(folder, images):
    """A line about the first two classes whose names differ in capitals alone, if there are any; a list."""
    known = {}
    for name in images.classes:
        if (other := known.setdefault(composed(name).casefold(), name)) != name:
            return [f"{folder}: classes {other!r} and {name!r} are two: is it one, written in two ways?"]
    return []


def ignored_line(folder, ignored):
    """A line that says how many files of which suffixes are ignored."""
    counts = collections.Counter(pathlib.PurePath(path).suffix.lower() or "(no suffix)" for path in ignored)
    text = ", ".join(f"{n} {suffix}" for suffix, n in counts.most_common(8))
    return f"{folder}: {len(ignored)} files are ignored for their suffixes: {text}{', ...' * (len(counts) > 8)}"


def tree_paths(train, val):
    """The files of both parts, relative to the folder that contains train/ and val/."""
    return [f"{part}/{path}" for part, images in (("train", train), ("val", val)) for path in images.paths]


def synthetic_set():
    """An ImageSet of 1000 classes without files, for benchmarks without data."""
    classes = tuple(f"{c:04d}" for c in range(1000))
    paths = tuple(f"{name}/{i}" for name in classes for i in range(100))
    return ImageSet(None, paths, np.repeat(np.arange(1000), 100), classes)


def stratified_order(labels, seed):
    """A random order of indices of which every prefix has equally many images of each class, as long as they last."""
    rng = np.random.default_rng([seed, CALIBRATE])
    shuffled = rng.permutation(len(labels))
    position = np.empty(len(labels), np.int64)  # number of images of the same class before it
    seen = {}
    for i in shuffled:
        position[i] = seen.get(labels[i], 0)
        seen[labels[i]] = position[i] + 1
    return shuffled[np.argsort(position[shuffled], kind="stable")]


def draw_heldout(images, config, groups):
    """Sorted indices of the images of train that a DataConfig holds out: whole groups, whose numbers are `groups` (N,).

    Raises UserError that names a class which has not enough images.
    """
    per_class = config.heldout_per_class
    counts = np.bincount(images.labels)
    if counts.min() <= per_class:
        smallest = f"class {images.classes[counts.argmin()]!r} has {counts.min()} images"
        what = f"{per_class} held-out images per class leave nothing to train on: {smallest}"
        raise UserError(f"{what}; {'lower --heldout-per-class' if counts.min() > 1 else 'give it more, or remove it'}")
    pairs = count_pairs(groups, images.labels)
    if len(pairs[0]) > groups.max() + 1:
        wanted = np.full(len(counts), per_class)
        drawn, lacks = draw_across(pairs, wanted, np.random.default_rng([config.split_seed, HOLD_OUT]))
    else:
        drawn, lacks = _draw_by_class(pairs, config)
    if lacks is not None:
        raise UserError(f"--group-by: {why_not(images, groups, lacks, per_class, 'lower --heldout-per-class, ')}")
    return np.flatnonzero(drawn[groups])


def _draw_by_class(pairs, config):
    """(which groups of one class each are held out, as bools; a class that lacks some, or None).

    Of each class in random order, until they have enough images.
    """
    _, labels, sizes = pairs
    order = stratified_order(labels, config.split_seed)
    order = order[np.argsort(labels[order], kind="stable")]  # class after class
    before = np.cumsum(sizes[order]) - sizes[order]
    starts = np.searchsorted(labels[order], np.arange(labels.max() + 1))
    before -= before[starts][labels[order]]  # images of the class in the groups before
    drawn = np.zeros(len(sizes), bool)
    drawn[order] = before < config.heldout_per_class
    for label in np.flatnonzero(np.bincount(labels[~drawn], minlength=labels.max() + 1) == 0):
        own = np.flatnonzero(labels == label)
        smallest = own[sizes[own].argmin()]  # is left to train on
        if sizes[own].sum() - sizes[smallest] < config.heldout_per_class:
            return drawn, label
        drawn[smallest] = False
    return drawn, None


def prepare(settings, demo):
    """Unpacks the bundled images into the folder of an Images if `demo`. Raises UserError if there is no train/."""
    if demo:
        bundled.unpack(settings.data_dir)
    elif settings.loader != "synthetic":
        check_folder(f"{settings.data_dir}/train")


def open_data(settings, config, demo=False):
    """The Data of an Images, after unpacking the bundled images if `demo`."""
    prepare(settings, demo)
    return Data.of(settings, config)


class Data:
    """The images of a tree, and which of them are held out; `split` identifies the held-out images in checkpoints.

    `images(part)` returns part "supernet" (train without held-out images), "search" (held-out images), "train" or
    "val". All files are checked first, unless the folder `cache` has a record that they were; without `cache` there is
    no record. `listed` is a file of `write_list`, made of these images and this split: then the tree is not looked at.
    `folder` None means synthetic images, without files.

        data = Data("data/fashion-mnist", DataConfig(28, 28))
        training_images = data.images("supernet")

    Raises UserError if an image can't be read or has two labels, or a class is in only one of train and val.
    """

    def __init__(self, folder, config=None, cache=None, listed=None, max_pixels=Images.max_pixels):
        self.config = config or DataConfig()
        self.warnings = []  # what makes results meaningless or too good, a line each
        self.copies = []  # groups of files of train with the same content and class
        self.n_shared = 0  # groups of --group-by in train and val
        if listed:
            self._read_list(listed, folder)
            return
        if folder is None:
            self.train = self.val = synthetic_set()
            self.classes = self.train.classes
            return
        ignored = []
        self.train, self.val = scan_parts(folder, self.config, None, ignored)
        self.classes = self.train.classes
        if ignored:
            self.warnings.append(ignored_line(folder, ignored))
        self.warnings += alike_classes(folder, self.train)
        if len(self.classes) == 1:
            self.warnings.append(f"{folder}: a single class, {self.classes[0]!r}: every network is right")
        counts = image_check.check_images(folder, tree_paths(self.train, self.val), cache, max_pixels)
        self.copies = counts["copies"]
        if n := counts["shared"]:
            self.warnings.append(f"{folder}: {n} images of val are in train too: accuracies on val are too high")
        if (n := counts["turned"]) and self.config.exif == "ignored":
            advice = "train with exif: apply (--exif apply) to see them as viewers show them"
            self.warnings.append(f"{folder}: {n} images have an EXIF orientation, which is ignored; {advice}")
        if group_by := self.config.group_by:
            self.warnings += grouping_warnings(self.train, group_by)
            if shared := shared_groups(group_by, self.train, self.val):
                self.n_shared = len(shared)
                text = f"{folder}: {len(shared)} groups of images are in train and val: accuracies on val are too"
                self.warnings.append(f"{text} high; {shared[0]}")

    @classmethod
    def of(cls, settings, config, listed=None):
        """The Data of an Images."""
        folder = None if settings.loader == "synthetic" else settings.data_dir
        return cls(folder, config, settings.cache, listed, settings.max_pixels)

    def warn(self):
        """Logs the warnings."""
        for text in self.warnings:
            log.warning("warning: %s", text)

    def write_list(self, path):
        """Writes the names of all images and the held-out ones, for processes that need not look at the tree again."""
        parts = {part: {"per_class": n, "paths": getattr(self, part).paths} for part, n in self.counts.items()}
        held_out = {"heldout": self.heldout.tolist(), "halves": self.halves.tolist(), "split": self.split}
        if self.config.group_by:
            held_out["groups"] = self.groups.tolist()
        write_json(path, {"classes": self.classes, **held_out, **parts})

    def _read_list(self, path, folder):
        with open(path) as file:
            content = json.load(file)
        self.classes = tuple(content["classes"])
        labels = np.arange(len(self.classes))
        self.train, self.val = (
            ImageSet(f"{folder}/{part}", tuple(images["paths"]), np.repeat(labels, images["per_class"]), self.classes)
            for part, images in (("train", content["train"]), ("val", content["val"]))
        )
        self.heldout = np.array(content["heldout"])
        self.halves = np.array(content["halves"])
        if "groups" in content:
            self.groups = np.array(content["groups"])
        self.split = content["split"]

    @functools.cached_property
    def heldout(self):
        """Sorted indices of the training images that are held out for the search."""
        heldout = draw_heldout(self.train, self.config, self.groups)
        self._warn_of_copies({self.train.paths[i] for i in heldout})
        return heldout

    def _warn_of_copies(self, heldout):
        """Warns of held-out files with a copy among the others of their class."""
        n = sum(sum(path in heldout for path in group) for group in self.copies if not heldout.issuperset(group))
        if n:
            what = f"{n} of {len(heldout)} held-out images are copies of images that the supernet trains on"
            advice = "accuracies of the search are too high; dataloader.py --check lists them"
            self.warnings.append(f"{self.train.root}: {what}: {advice}")

    @functools.cached_property
    def groups(self):
        """The number of the group of each training image (N,); without --group-by, each is a group."""
        return number_groups(self.train, self.config.group_by, "train")

    @functools.cached_property
    def halves(self):
        """The half, 0 or 1, of each held-out image (N,): a measurement on both tells how far one can be trusted.

        Random groups of images, the same in every process, until one half is full.
        """
        _, groups = np.unique(self.groups[self.heldout], return_inverse=True)
        sizes = np.bincount(groups)
        order = np.random.default_rng(self.config.split_seed).permutation(len(sizes))
        half = np.empty(len(sizes), int)
        half[order] = np.cumsum(sizes[order]) - sizes[order] / 2 > sizes.sum() / 2
        return half[groups]

    @functools.cached_property
    def split(self):
        group_by = self.config.group_by
        if group_by and group_by.endswith(".csv"):  # by its content, not its name
            group_by = hashlib.sha256(repr(sorted(read_groups(group_by).items())).encode()).hexdigest()[:16]
        return {
            "seed": self.config.split_seed,
            "heldout_per_class": self.config.heldout_per_class,
            "hash": names_hash(self.train.paths[i] for i in self.heldout),
            **({"group_by": group_by} if group_by else {}),
        }

    @property
    def counts(self):
        """{part: the number of images of each class} of train and val."""
        return {part: np.bincount(getattr(self, part).labels).tolist() for part in ("train", "val")}

    @property
    def names(self):
        """What identifies the images of each part, in words; their classes are in their names."""
        parts = {"train": self.train.paths, "val": self.val.paths}
        return {p: f"{len(paths)} images, of names with hash {names_hash(paths)}" for p, paths in parts.items()}

    @property
    def grouping(self):
        """A line with the numbers of --group-by, or None without it."""
        if not self.config.group_by:
            return None
        return describe(self.train, self.groups, self.heldout, self.config.heldout_per_class, self.n_shared)

    def images(self, part):
        if part == "train":
            return self.train
        if part == "val":
            with contextlib.suppress(UserError):  # its files may have no groups
                if group_by := self.config.group_by:
                    return dataclasses.replace(self.val, groups=number_groups(self.val, group_by, "val"))
            return self.val
        if part == "search":
            groups = self.groups[self.heldout] if self.config.group_by else None
            return dataclasses.replace(self.train.take(self.heldout), halves=self.halves, groups=groups)
        return self.train.take(np.setdiff1d(np.arange(len(self.train)), self.heldout))


def names_hash(names):
    """A hash of the names of images, in their order."""
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16]


# --- plans ---------------------------------------------------------------------------------------------------
# A plan is an iterable of batches; a batch is an int array (N, 2) of epoch and image index.


def check_batch_size(n_images, batch_size):
    """Raises UserError if the images do not fill a batch."""
    if n_images < batch_size:
        what = f"batches of {batch_size} images are larger than the data set, {n_images} images"
        raise UserError(f"{what}; lower --batch-size")


def training_plan(n_images, batch_size, seed, start=0, steps=None, rank=0, world_size=1):
    """Batches of a rank from step `start`: a new permutation every epoch, without the images of an incomplete batch."""
    check_batch_size(n_images, batch_size * world_size)
    steps_per_epoch = n_images // (batch_size * world_size)
    epoch = None
    for step in itertools.count(start) if steps is None else range(start, steps):
        if step // steps_per_epoch != epoch:
            epoch = step // steps_per_epoch
            order = np.random.default_rng([seed, ORDER, epoch]).permutation(n_images)
        first = (step % steps_per_epoch * world_size + rank) * batch_size
        indices = order[first : first + batch_size]
        yield np.stack([np.full_like(indices, epoch), indices], axis=1)


def evaluation_plan(n_images, batch_size):
    """Batches that have every image once. The last one may be smaller."""
    indices = np.arange(n_images)
    samples = np.stack([np.zeros_like(indices), indices], axis=1)
    return [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]


def calibration_plan(labels, batches, batch_size, seed):
    """`batches` of training images, equally many of each class; repeated images are augmented differently each time."""
    n = batches * batch_size
    order = stratified_order(labels, seed)
    indices = np.resize(order, n)
    samples = np.stack([np.arange(n) // len(order), indices], axis=1)
    samples = np.random.default_rng([seed, CALIBRATE, 1]).permutation(samples)  # mixes the classes in each batch
    return list(samples.reshape(batches, batch_size, 2))

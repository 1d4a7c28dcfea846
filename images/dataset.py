"""Which images, in which order, with which augmentation: folders, splits, plans and parameters, before anything is decoded.

A data set is a tree `DIR/{train,val}/<class>/<image>`. A few images of every class of train are held out: the supernet
trains on the others, the search validates on the held-out ones, `scratch.py` trains on all, and `val` is for final numbers
alone (paper section 4). The order of the images and every augmentation parameter are pure functions of seed, epoch and
image index, so that they depend on no loader, worker, rank or resume point.
Source: official `src/Supernet/train.py` (transforms), paper section 4.
"""

import dataclasses
import hashlib
import itertools
import math
import os
import pathlib

import numpy as np

from images import bundled, image_check
from utils import UserError

EXTENSIONS = tuple(suffix for suffixes in image_check.SUFFIXES.values() for suffix in suffixes)
ORDER, AUGMENT, CALIBRATE = range(3)  # separate random streams of one seed


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How images become inputs and which are held out. Sizes in px; the defaults are the official ones at 224 px."""

    input_size: int = 224
    val_resize: int = 256
    preprocessing: str = "spos"
    crop_scale: tuple = (0.08, 1.0)
    crop_ratio: tuple = (3 / 4, 4 / 3)
    jitter: float = 0.4
    mirror: bool = True
    heldout_per_class: int = 50
    split_seed: int = 0

    @classmethod
    def from_args(cls, args, stored=None, source=None):
        """From the flags, over what a checkpoint stored, if one is given: a flag that contradicts it is a UserError."""
        base = stored or cls()
        values = {}
        for field in dataclasses.fields(cls):
            value = getattr(args, field.name)
            value = tuple(value) if isinstance(value, list) else value
            if stored and value is not None and value != getattr(stored, field.name):
                flag = f"--{field.name.replace('_', '-')}"
                raise UserError(
                    f"{flag} {value} contradicts {source}, which has {getattr(stored, field.name)}; leave the flag out"
                )
            if value is not None:
                values[field.name] = value
        if not stored:
            values.setdefault("val_resize", round(values.get("input_size", base.input_size) * 256 / 224))
        config = dataclasses.replace(base, **values)
        if config.val_resize < config.input_size:
            raise UserError(f"--val-resize {config.val_resize} is smaller than the input size, {config.input_size}")
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(config, name)
            if low > high:
                raise UserError(f"--{name.replace('_', '-')} {low} {high}: the first is the larger one")
        return config

    def to_dict(self):
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values):
        """What `to_dict` made. Raises TypeError where a file has something else."""
        if not isinstance(values, dict):
            raise TypeError(f"data settings are a {type(values).__name__}")
        config = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        for field in dataclasses.fields(cls):
            value, default = getattr(config, field.name), field.default
            numbers = value if type(value) is tuple and len(value) == 2 else (value,)
            kinds = (int, float) if type(default) in (float, tuple) else (type(default),)
            if (type(default) is tuple) != (len(numbers) == 2) or any(type(n) not in kinds for n in numbers):
                raise TypeError(f"{field.name} is a {type(value).__name__}")
        return config


# --- folders and splits --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Image files with labels; `paths` are relative to `root`, labels (N,) index `classes`. root None: synthetic."""

    root: str
    paths: tuple
    labels: np.ndarray
    classes: tuple

    def __len__(self):
        return len(self.paths)

    def take(self, indices):
        return dataclasses.replace(self, paths=tuple(self.paths[i] for i in indices), labels=self.labels[indices])


def require_folder(folder):
    """Raises UserError where there is no such folder."""
    if not pathlib.Path(folder).is_dir():
        raise UserError(
            f"{folder}: no such folder; --data-dir names one with train/ and val/, --demo brings its own images"
        )


def scan(folder, problems=None):
    """The ImageSet of a `<class>/<image>` tree, in sorted order. Raises UserError where it is none; with a list `problems`,
    appends all that is wrong to it instead."""
    folder = pathlib.Path(folder)

    def wrong(text):
        if problems is None:
            raise UserError(text)
        problems.append(text)

    require_folder(folder)
    classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    if not classes:
        wrong(f"{folder}: has no class folders; images belong in {folder}/<class>/")
    paths, labels = [], []
    for label, name in enumerate(classes):
        entries = [e for e in os.scandir(folder / name) if not e.name.startswith(".")]
        for nested in sorted(e.name for e in entries if e.is_dir()):
            wrong(f"{folder / name / nested}: a folder inside a class folder; images belong in {folder}/<class>/")
        files = sorted(f"{name}/{e.name}" for e in entries if e.name.lower().endswith(EXTENSIONS) and not e.is_dir())
        if not files:
            wrong(f"{folder / name}: a class without images; remove the folder or fill it")
        paths += files
        labels += [label] * len(files)
    return ImageSet(str(folder), tuple(paths), np.array(labels, np.int64), tuple(classes))


def lonely_classes(folder, train, val):
    """Lines that name the class folders which only one of train and val has."""
    return [
        f"{folder}: class folder {name!r} is in only one of train and val"
        for name in sorted(set(train.classes) ^ set(val.classes))
    ]


def tree_paths(train, val):
    """The files of both parts, relative to the folder that has train/ and val/."""
    return [f"{part}/{path}" for part, images in (("train", train), ("val", val)) for path in images.paths]


def synthetic_set(n_classes=1000, images_per_class=100):
    """Images that are drawn, not read, for benchmarks without data."""
    paths = tuple(f"{c:04d}/{i}" for c in range(n_classes) for i in range(images_per_class))
    classes = tuple(f"{c:04d}" for c in range(n_classes))
    return ImageSet(None, paths, np.repeat(np.arange(n_classes), images_per_class), classes)


def stratified_order(labels, seed):
    """An order of indices in which every prefix has the classes in equal shares (as long as they last)."""
    rng = np.random.default_rng([seed, CALIBRATE])
    shuffled = rng.permutation(len(labels))
    position = np.empty(len(labels), np.int64)  # how many of its class come before each
    seen = {}
    for i in shuffled:
        position[i] = seen.get(labels[i], 0)
        seen[labels[i]] = position[i] + 1
    return shuffled[np.argsort(position[shuffled], kind="stable")]


def prepare(args):
    """Unpacks the bundled images for --demo. Raises UserError where the flags name no images."""
    if args.demo:
        bundled.unpack(args.data_dir)
    elif args.loader != "synthetic":
        require_folder(f"{args.data_dir}/train")


def open_data(args, config):
    """The Data of the flags; the bundled images are unpacked where they are asked for."""
    prepare(args)
    return Data(args, config)


class Data:
    """The images of a run. `images(part)` with part "supernet" (train without held-out), "search" (held-out),
    "train" (all of train) or "val"; `split` says which images are held out, for checkpoints."""

    def __init__(self, args, config):
        if args.loader == "synthetic":
            self.train = self.val = synthetic_set()
        else:
            self.train, self.val = scan(f"{args.data_dir}/train"), scan(f"{args.data_dir}/val")
        for odd in lonely_classes(args.data_dir, self.train, self.val):
            raise UserError(odd)
        self.classes = self.train.classes
        counts = np.bincount(self.train.labels)
        if counts.min() <= config.heldout_per_class:
            name = self.classes[counts.argmin()]
            raise UserError(
                f"--heldout-per-class {config.heldout_per_class} leaves nothing to train on: class {name!r} has {counts.min()} images"
            )
        if args.loader != "synthetic":
            image_check.require(args.data_dir, tree_paths(self.train, self.val))
        order = stratified_order(self.train.labels, config.split_seed)
        held = np.zeros(len(self.train), bool)
        held[order[: config.heldout_per_class * len(self.classes)]] = True
        self.heldout = np.flatnonzero(held)
        names = "\n".join(self.train.paths[i] for i in self.heldout)
        self.split = {
            "seed": config.split_seed,
            "heldout_per_class": config.heldout_per_class,
            "hash": hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16],
        }

    def images(self, part):
        if part in ("train", "val"):
            return getattr(self, part)
        if part == "search":
            return self.train.take(self.heldout)
        return self.train.take(np.setdiff1d(np.arange(len(self.train)), self.heldout))


# --- which images, in which order ----------------------------------------------------------------------------
# A plan is an iterable of batches; a batch is an int array (N, 2) of epoch and image index.


def steps_per_epoch(n_images, batch_size, world_size=1):
    """Whole batches in the images. Raises UserError where there is none."""
    if n_images < batch_size * world_size:
        raise UserError(
            f"--batch-size {batch_size} (times {world_size} processes) is larger than the data set, {n_images} images"
        )
    return n_images // (batch_size * world_size)


def training_plan(n_images, batch_size, seed, start=0, steps=None, rank=0, world_size=1):
    """Batches of this rank from step `start` on: every epoch a new permutation, whose last images that fill no batch are left out."""
    per_epoch, epoch = steps_per_epoch(n_images, batch_size, world_size), None
    for step in itertools.count(start) if steps is None else range(start, steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = np.random.default_rng([seed, ORDER, epoch]).permutation(n_images)
        first = (step % per_epoch * world_size + rank) * batch_size
        indices = order[first : first + batch_size]
        yield np.stack([np.full_like(indices, epoch), indices], axis=1)


def evaluation_plan(n_images, batch_size, rank=0, world_size=1):
    """Every image once, in order, over all ranks; the last batch may be ragged."""
    indices = np.arange(rank, n_images, world_size)
    samples = np.stack([np.zeros_like(indices), indices], axis=1)
    return [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]


def calibration_plan(labels, batches, batch_size, seed):
    """`batches` of training images in equal shares of the classes; images that come again are augmented anew."""
    n, order = batches * batch_size, stratified_order(labels, seed)
    indices = np.resize(order, n)
    samples = np.stack([np.arange(n) // len(order), indices], axis=1)
    samples = np.random.default_rng([seed, CALIBRATE, 1]).permutation(samples)  # mixes the classes within a batch
    return list(samples.reshape(batches, batch_size, 2))


# --- augmentation --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """One image's parameters: crop window in px (top, left, height, width), jitter factors, whether to mirror."""

    window: tuple
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    mirror: bool = False


def draw_augmentation(config, seed, epoch, index, height, width):
    """The training augmentation of one image: a random resized crop (ten tries, then the centre), jitter, mirror.

    Source: torchvision's RandomResizedCrop and ColorJitter, as the official transforms use them, on our own random stream.
    """
    u = np.random.default_rng([seed, AUGMENT, int(epoch), int(index)]).random(26).tolist()
    low, high = config.crop_scale
    ratio_low, ratio_high = (math.log(r) for r in config.crop_ratio)
    window = None
    for i in range(10):
        area = height * width * (low + u[2 * i] * (high - low))
        ratio = math.exp(ratio_low + u[2 * i + 1] * (ratio_high - ratio_low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            window = int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
            break
    if window is None:  # the largest window of an allowed ratio, from the centre
        w = min(width, max(1, round(height * math.exp(ratio_high))))
        h = min(height, max(1, round(width / math.exp(ratio_low))))
        window = (height - h) // 2, (width - w) // 2, h, w
    factors = (1 + config.jitter * (2 * v - 1) for v in u[22:25])
    return Augmentation(window, *factors, mirror=config.mirror and u[25] < 0.5)


def validation_geometry(config, height, width):
    """Official validation transform: ((height, width) to resize to, (top, left) of the centre crop), in px.

    The shorter side becomes `val_resize`, the other int(x + 0.5); the crop's corner is rounded as torchvision does.
    """
    scale = config.val_resize / min(height, width)
    size = tuple(
        config.val_resize if side == min(height, width) else int(side * scale + 0.5) for side in (height, width)
    )
    return size, tuple(round((side - config.input_size) / 2) for side in size)

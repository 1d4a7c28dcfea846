"""Checkpoints: written whole or not at all, read without executing anything, complete enough to go on from.

A file holds plain containers and tensors: version, kind ("supernet" or "scratch"), step, model, optimizer, the search space,
the data settings (preprocessing, augmentation, split), class names, the architecture (scratch) and the settings of the run.
"""

import dataclasses
import pathlib
import re
import reprlib

import torch

from images.dataset import Data, DataConfig, prepare
from network import ShuffleNetV2, ShuffleNetV2OneShot, load_file, load_weights, parse_state_dict
from space.search_space import SearchSpace
from utils import HERE, UserError, atomic_write, log, settings_difference

VERSION = 1
# Settings in which a run may differ from the checkpoint that it goes on from, with the same result (on another device but for rounding).
HARMLESS = {
    "config", "demo", "out", "data_dir", "cache", "workers", "threads", "device", "keep", "resume", "save_every", "val_every",
    "eval", "export", "predict",
}  # fmt: skip


@dataclasses.dataclass
class Checkpoint:
    """What a checkpoint says beside the weights; official files say nothing, and `data`, `split`, `classes` are None."""

    path: str
    kind: str
    space: SearchSpace
    weights: dict
    data: DataConfig | None = None
    split: dict | None = None
    classes: tuple | None = None
    architecture: tuple | None = None
    content: dict | None = None


def save(path, **content):
    """Writes a checkpoint under a temporary name, then renames it. Raises UserError where the disk is full."""
    try:
        with atomic_write(path, "wb") as file:
            torch.save({"version": VERSION, **content}, file)
    except (OSError, RuntimeError) as error:  # of a write that failed, torch makes a RuntimeError of its own
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:100]
        raise UserError(f"{path}: can't be written ({reason}); make room, and the same command goes on") from None


def newest(folder):
    """The checkpoint of the highest step in a folder, None where there is none."""
    found = checkpoints(folder)
    return found[-1] if found else None


def checkpoints(folder):
    """The checkpoints in a folder, by rising step."""
    found = [p for p in pathlib.Path(folder).glob("checkpoint-*.pth") if re.fullmatch(r"checkpoint-\d+\.pth", p.name)]
    return sorted(found, key=lambda path: int(path.stem.split("-")[1]))


def prune(folder, keep):
    """Removes all but the newest `keep` checkpoints."""
    found = checkpoints(folder)
    for path in found[: max(0, len(found) - keep)]:
        path.unlink(missing_ok=True)


def load(path, kind, space=None):
    """A Checkpoint from our own or an official file; `space` is what an official one, which carries none, is taken to be of,
    but for the class count.

    Raises UserError where the file is missing, damaged, of another kind or version.
    """
    return parse(load_file(path), path, kind, space)


def parse(content, path, kind, space=None):
    """As `load`, for a file's content."""
    weights = parse_state_dict(content, path)
    if "version" not in content:
        space, classifier = space or SearchSpace(), weights.get("classifier.0.weight")
        if classifier is not None and classifier.dim() == 2 and len(classifier):
            space = dataclasses.replace(space, n_classes=len(classifier))
        return Checkpoint(str(path), kind, space, weights)
    version, found = content["version"], content.get("kind")
    if type(version) is not int or version != VERSION:
        raise UserError(f"{path}: checkpoint version {reprlib.repr(version)}, this program reads version {VERSION}")
    if type(found) is not str or found != kind:
        raise UserError(f"{path}: a {reprlib.repr(found).strip(chr(39))} checkpoint, not a {kind} one")
    try:
        classes, split, architecture = content["classes"], content["split"], content.get("architecture")
        if not all(type(name) is str for name in classes):
            raise TypeError("classes are not names")
        if split is not None and not (
            isinstance(split, dict) and all(type(value) in (int, str) for value in split.values())
        ):
            raise TypeError("the split is not made of numbers and names")
        space = SearchSpace.from_dict(content["space"])
        return Checkpoint(
            path=str(path), kind=kind, weights=weights, space=space,
            data=DataConfig.from_dict(content["data"]), split=split, classes=tuple(classes),
            architecture=None if architecture is None else space.check(architecture), content=content,
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged checkpoint ({str(error)[:100]})") from None


def load_supernet(path, out, space=None):
    """(the supernet, its Checkpoint) from `path`, or from the newest checkpoint below `out` where path is None."""
    path = path or newest(pathlib.Path(out) / "checkpoints" / "supernet")
    if path is None:
        raise UserError(
            f"--checkpoint: no supernet in {pathlib.Path(out) / 'checkpoints' / 'supernet'}; train one with supernet.py"
        )
    stored = load(path, "supernet", space)
    with torch.device("meta"):
        model = ShuffleNetV2OneShot(space=stored.space)
    load_weights(model, stored.weights, path)
    return model, stored


def open_supernet(args):
    """(supernet, its Checkpoint, DataConfig, Data) of the flags. Raises UserError where checkpoint, flags and images don't go together."""
    prepare(args)  # first, for without images nothing else helps
    model, stored = load_supernet(args.checkpoint, args.out, SearchSpace.for_images(args.input_size or 224))
    config = DataConfig.from_args(args, stored.data, stored.path)
    data = Data(args, config)
    check_classes(stored, data.classes)
    check_split(stored, data.split)
    return model, stored, config, data


def load_network(path, architecture=None, space=None):
    """(the retrained network, its Checkpoint) from `path`.

    An official file doesn't say its architecture: it is that of the file `architecture`, by default the published winner.
    """
    stored = load(path, "scratch", space)
    told = architecture and stored.space.load_architecture(architecture)
    if stored.architecture is None:
        stored.architecture = told or stored.space.load_architecture(HERE / "architecture_final.json")
    elif told not in (None, stored.architecture):
        raise UserError(
            f"--architecture {architecture} contradicts {path}, which is of {list(stored.architecture)}; leave the flag out"
        )
    with torch.device("meta"):
        model = ShuffleNetV2(stored.architecture, space=stored.space)
    load_weights(model, stored.weights, path)
    return model, stored


def check_split(stored, split):
    """Whether the held-out images were kept from the supernet's training. Raises UserError where another split was used."""
    if stored.split is None:
        log.warning("%s carries no split: the search images were probably seen in training", stored.path)
    elif stored.split != split:
        raise UserError(
            f"{stored.path}: trained on another split of the images ({stored.split}, here {split}); use the same --data-dir"
        )


def check_classes(stored, classes):
    """Raises UserError where the data's classes are not the checkpoint's."""
    if stored.space.n_classes != len(classes):
        raise UserError(
            f"{stored.path}: has {stored.space.n_classes} classes, the data {len(classes)}; use the same --data-dir"
        )
    if stored.classes is not None and stored.classes != tuple(classes):
        raise UserError(f"{stored.path}: its class names are not those of the data; use the same --data-dir")


def check_settings(stored, settings, folder):
    """Raises UserError that names the flags in which a run differs from the one that it would go on from."""
    if changes := settings_difference(stored.content["settings"], settings, HARMLESS):
        flags = {name: f"--{name.replace('_', '-')}" for name in changes} | {"processes": "processes"}  # not a flag
        text = ", ".join(f"{flags[name]} {change}" for name, change in changes.items())
        raise UserError(f"{folder} has a run with other settings: {text}; use them, another --out, or --resume none")

"""The checkpoints of a run: written atomically, complete enough to resume it. weights/files.py reads them."""

import pathlib
import re

import torch

from images.dataset import Data, DataConfig, prepare
from network import ShuffleNetV2OneShot
from space.custom import load_operations
from space.search_space import SearchSpace
from utils import UserError, atomic_write, log, settings_difference
from weights.files import VERSION, load, load_weights

# Settings that a resumed run may change: the result is the same, up to rounding on another device.
HARMLESS = {
    "config", "demo", "out", "data_dir", "cache", "workers", "threads", "device", "keep", "resume", "save_every",
    "val_every", "eval", "export", "predict", "space", "operations",
}  # fmt: skip


def save(path, **content):
    """Writes a checkpoint under a temporary name, then renames it. Raises UserError where the disk is full."""
    try:
        with atomic_write(path, "wb") as file:
            torch.save({"version": VERSION, **content}, file)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError where a write failed
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:100]
        raise UserError(f"{path}: can't be written ({reason}); free some space, and the same command resumes") from None


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


def load_supernet(path, out, space=None):
    """(the supernet, its Checkpoint) from `path`, or from the newest checkpoint below `out` where path is None."""
    if path is None:
        folder = pathlib.Path(out) / "checkpoints" / "supernet"
        path = newest(folder)
    if path is None:
        raise UserError(f"--checkpoint: no supernet in {folder}; train one with supernet.py")
    ckpt = load(path, "supernet", space)
    with torch.device("meta"):
        model = ShuffleNetV2OneShot(space=ckpt.space)
    load_weights(model, ckpt.weights, path)
    return model, ckpt


def open_supernet(args, listed=None):
    """(supernet, its Checkpoint, DataConfig, Data) of the flags; `listed` as for Data.

    Raises UserError where checkpoint, flags and images don't go together.
    """
    if not listed:
        prepare(args)
    load_operations(args.operations)
    model, ckpt = load_supernet(args.checkpoint, args.out, SearchSpace.for_images(args.input_size or 224))
    config = DataConfig.from_args(args, ckpt.data, ckpt.path)
    data = Data(args, config, listed)
    check_classes(ckpt, data.classes)
    check_split(ckpt, data.split)
    return model, ckpt, config, data


def unfinished(ckpt):
    """A line that says that the training of a checkpoint has not ended, or None; official files don't say."""
    content = ckpt.content or {}
    step, iterations = content.get("step"), (content.get("settings") or {}).get("iterations")
    if isinstance(step, int) and isinstance(iterations, int) and step < iterations:
        return f"{ckpt.path}: step {step} of {iterations}: its training has not ended"
    return None


def check_split(ckpt, split):
    """Raises UserError where the supernet was trained on another split, so perhaps on images that are held out now."""
    if ckpt.split is None:
        log.warning("%s carries no split: the search images were probably seen in training", ckpt.path)
    elif ckpt.split != split:
        where = f"{ckpt.path}: trained on another split of the images ({ckpt.split}, here {split})"
        raise UserError(f"{where}; use the same --data-dir")


def check_classes(ckpt, classes):
    """Raises UserError where the data's classes are not the checkpoint's."""
    if ckpt.space.n_classes != len(classes):
        counts = f"has {ckpt.space.n_classes} classes, the data {len(classes)}"
        raise UserError(f"{ckpt.path}: {counts}; use the same --data-dir")
    if ckpt.classes is not None and ckpt.classes != tuple(classes):
        raise UserError(f"{ckpt.path}: its class names are not those of the data; use the same --data-dir")


def check_settings(ckpt, settings, folder):
    """Raises UserError that names the flags in which a run differs from the one that it would resume."""
    if changes := settings_difference(ckpt.content["settings"], settings, HARMLESS):
        flags = {name: f"--{name.replace('_', '-')}" for name in changes} | {"processes": "processes"}  # not a flag
        text = ", ".join(f"{flags[name]} {change}" for name, change in changes.items())
        raise UserError(f"{folder} has a run with other settings: {text}; use them, another --out, or --resume none")

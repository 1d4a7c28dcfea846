"""Checkpoints, from which a run can be resumed, and a supernet with the images that it was trained on."""

import pathlib
import re

import torch

from images.dataset import Data, prepare
from images.image_check import composed
from network import ShuffleNetV2OneShot
from settings.fields import difference, flag
from settings.subjects import SUBJECTS, DataConfig, Images, is_path
from space import own
from space.search_space import SearchSpace
from space.weight_files import CHECKPOINT_VERSION, load, load_weights
from utils import UserError, atomic_write, log


def save(path, **content):
    """Writes a checkpoint under a temporary name, then renames it. Raises UserError if the disk is full."""
    try:
        with atomic_write(path, "wb") as file:
            torch.save({"version": CHECKPOINT_VERSION, **content}, file)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError if a write fails
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:100]
        raise UserError(f"{path}: can't be written ({reason}); free some space, and the same command resumes") from None


def newest(folder):
    """The checkpoint of the highest step in a folder, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def checkpoints(folder):
    """The paths of the checkpoints in a folder, by rising step."""
    found = [p for p in pathlib.Path(folder).glob("checkpoint-*.pth") if re.fullmatch(r"checkpoint-\d+\.pth", p.name)]
    return sorted(found, key=lambda path: int(path.stem.split("-")[1]))


def load_supernet(path, out, space=None):
    """(the supernet, its Checkpoint) from `path`, or if that is None from the newest checkpoint in `out`."""
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


def open_supernet(values, listed=None):
    """(supernet, its Checkpoint, DataConfig, Data): the supernet of `load_supernet`, and the images that go with it.

    `values` (name -> value) are settings of a search or a trial. Those of a DataConfig must equal the checkpoint's, but
    for those that only train, of which a warning says that they are ignored. `listed` is as for Data. Raises UserError
    if checkpoint, settings and images don't match.
    """
    image_settings, given = Images.of(values), DataConfig.given(values)
    if not listed:
        prepare(image_settings, values["demo"])
    own.load(values["own"])
    space = SearchSpace.for_images(given.get("input_size", 224))
    model, ckpt = load_supernet(values["checkpoint"], values["out"], space)
    if ckpt.content is not None and ckpt.data is None:
        raise UserError(f"{ckpt.path}: trained on images given in Python: evaluate it there, by training.evaluation")
    others = {name: value for name, value in given.items() if ckpt.data and name in DataConfig.TRAINS}
    config = DataConfig.resolve({k: v for k, v in given.items() if k not in others}, ckpt.data, ckpt.path)
    data = Data.of(image_settings, config, listed)
    for name, value in others.items():
        if (tuple(value) if isinstance(value, list) else value) != getattr(config, name):
            data.warnings.append(
                f"{flag(name)} {value}: the supernet was trained with {getattr(config, name)}, which is used"
            )
    check_classes(ckpt, data.classes)
    check_split(ckpt, data)
    return model, ckpt, config, data


def unfinished(ckpt):
    """A line stating that the training of a checkpoint has not ended, or None; official files don't tell."""
    content = ckpt.content or {}
    step, iterations = content.get("step"), (content.get("settings") or {}).get("iterations")
    if isinstance(step, int) and isinstance(iterations, int) and step < iterations:
        return f"{ckpt.path}: step {step} of {iterations}: its training has not ended"
    return None


def check_split(ckpt, data):
    """Raises UserError if the supernet was trained on another split, and so perhaps on images held out now."""
    if ckpt.split is None:
        log.warning("%s carries no split: the search images were probably seen in training", ckpt.path)
    elif ckpt.split != data.split:
        what = split_changes(ckpt.split, data.split, ckpt.content.get("counts"), data.counts, data.classes)
        raise UserError(f"{ckpt.path}: trained on another split of the images: {what}; use the same, or train it anew")


def changes_of(name, before, now):
    """How an entry of the contents of two checkpoints differs, ": what", where words can tell."""
    if name == "classes":
        return f": now {class_changes(before['classes'], now['classes'])}"
    if name == "split":
        counts = before.get("counts"), now.get("counts")
        return f": {split_changes(before['split'], now['split'], *counts, now['classes'])}"
    return ""


def split_changes(before, now, counts_before, counts, classes):
    """What differs between two splits in words: their settings, or else the numbers of images, where both are known."""
    flags = {"seed": "--split-seed", "heldout_per_class": "--heldout-per-class", "group_by": "--group-by"}
    pairs = [(name, (before or {}).get(key), (now or {}).get(key)) for key, name in flags.items()]
    changes = [f"{name} {new} (was {old})" for name, old, new in pairs if old != new]
    return ", ".join(changes) or count_changes(counts_before, counts, classes) or "images have other names"


def count_changes(before, now, classes):
    """How numbers of images, {part: one for each class}, differ, in words; empty where they don't, or aren't known."""
    changes = []
    for part in ("train", "val"):
        pairs = list(zip(classes, (before or {}).get(part, ()), (now or {}).get(part, ())))
        if found := [f"{name} {new} (was {old})" for name, old, new in pairs if old != new]:
            changes.append(f"{part}: {', '.join(found[:8])}{', ...' * (len(found) > 8)}")
    return "numbers of images in " + "; ".join(changes) if changes else ""


def same_classes(before, now):
    """Whether names of classes are the same in the same order, whatever their form of Unicode."""
    return [*map(composed, before)] == [*map(composed, now)]


def class_changes(before, now):
    """How names of classes differ, in words."""
    before, now = set(map(composed, before)), set(map(composed, now))
    found = {"without": sorted(before - now), "with": sorted(now - before)}
    words = [f"{what} {', '.join(map(repr, names[:8]))}{', ...' * (len(names) > 8)}" for what, names in found.items()
             if names]  # fmt: skip
    return " and ".join(words) or "in another order"


def check_classes(ckpt, classes):
    """Raises UserError if the data's classes are not those of a Checkpoint or a Program."""
    changes = f"those are {class_changes(ckpt.class_names, classes)}" if ckpt.classes else "the file has no names"
    if len(ckpt.class_names) != len(classes):
        counts = f"has {len(ckpt.class_names)} classes, the data {len(classes)}"
        raise UserError(f"{ckpt.path}: {counts}: {changes}; use the same --data-dir")
    if ckpt.classes is not None and not same_classes(ckpt.classes, classes):
        raise UserError(f"{ckpt.path}: its class names are not those of the data: {changes}; use the same --data-dir")


def check_images(ckpt, images):
    """Raises UserError if a run that is resumed would train on other images, {part: what identifies them} or None.

    Warns where val is another one, and where the checkpoint, of before, does not tell.
    """
    before = ckpt.content.get("images")
    if images and not isinstance(before, dict):
        log.warning("warning: %s: does not tell its images: they may be others than now", ckpt.path)
    elif images:
        for part, now in images.items():
            if before.get(part) != now:
                text = f"{ckpt.path}: {part} had {before.get(part)}; now it has {now}"
                if part == "train":
                    raise UserError(f"{text}; use the same images, another --out, or --resume none")
                log.warning("warning: %s", text)


NO_FLAGS = {  # settings of a run that no flag has, in words
    "processes": "processes", "rule_code": "code of the rule", "paths": "sampler", "optimizer": "optimizer",
    "schedule": "schedule",
}  # fmt: skip


def check_settings(ckpt, content, folder):
    """Raises UserError, naming the flags, if a run has other settings than the one that it would resume.

    `content` is that of a checkpoint of the run: its "settings", and its "data", which they leave to defaults.
    """

    def known(content):
        given = {name: value for name, value in content["settings"].items() if value is not None}
        if code := given.get("rule_code"):
            given["rule_code"] = own.SAME_RULES.get(code, code)
        given = (DataConfig.from_dict(content["data"]).to_dict() if content["data"] else {}) | given
        paths = [name for name in ("architecture", "space", "group_by") if is_path(name, given.get(name))]
        return {k: v for k, v in given.items() if k not in paths}  # files may have moved; contents know what they say

    before = ckpt.content["settings"]
    if not before and content["settings"]:
        log.warning("warning: %s: has no settings to compare with those of now", ckpt.path)
        return
    ignored = ["eval_batch_size", "bn_pass"]  # weights don't depend on them: where memory runs out, both may change
    ignored += [] if "rule" in before else ["paths"]  # older runs from Python lack it
    changes = difference(SUBJECTS, known(ckpt.content), known(content), ignored)
    if change := changes.pop("micro_batch", None):
        log.warning("warning: %s: BN counts other numbers of images from now on", f"--micro-batch {change}")
    if changes:
        flags = {name: flag(name) for name in changes} | NO_FLAGS
        text = ", ".join(f"{flags[name]} {change}" for name, change in changes.items())
        raise UserError(f"{folder} has a run with other settings: {text}; use them, another --out, or --resume none")

"""Checkpoints, ours and official: written atomically, complete enough to resume a run, read without executing code.

Our checkpoints hold plain containers and tensors: version, kind ("supernet" or "scratch"), step, model, optimizer, the
search space, the data settings (preprocessing, augmentation, split), class names, the architecture (scratch) and the
settings of the run. Official files hold a state dict alone.
"""

import dataclasses
import pathlib
import re
import reprlib
import warnings

import torch

from images.dataset import Data
from network import ShuffleNetV2, ShuffleNetV2OneShot
from settings.fields import difference, flag
from settings.subjects import SUBJECTS, DataConfig
from space.custom import check_operations
from space.search_space import SearchSpace
from utils import HERE, UserError, atomic_write, log

VERSION = 1


@dataclasses.dataclass
class Checkpoint:
    """A checkpoint that was read. Of an official file, `data`, `split`, `classes` and `content` are None."""

    path: str
    kind: str
    space: SearchSpace
    weights: dict
    data: DataConfig | None = None
    split: dict | None = None
    classes: tuple | None = None
    architecture: tuple | None = None
    content: dict | None = None

    @property
    def class_names(self):
        """The names of the classes; an official file has none, and gets numbers."""
        return self.classes or tuple(f"class {i}" for i in range(self.space.n_classes))


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


def load(path, kind, space=None):
    """A Checkpoint from our own or an official file.

    An official file carries no search space: it is assumed to be of `space`, with the class count of its classifier.
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
        check_operations(space, path)
        return Checkpoint(
            path=str(path), kind=kind, weights=weights, space=space,
            data=DataConfig.from_dict(content["data"]), split=split, classes=tuple(classes),
            architecture=None if architecture is None else space.check(architecture), content=content,
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged checkpoint ({str(error)[:100]})") from None


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


def open_supernet(path, out, images, given, listed=None):
    """(supernet, its Checkpoint, DataConfig, Data): the supernet of `load_supernet`, and the images that go with it.

    `images` is an Images; `given` has the values of a DataConfig that are given (name -> value), which must be those of
    the checkpoint; `listed` is as for Data. Raises UserError where checkpoint, settings and images don't go together.
    """
    model, ckpt = load_supernet(path, out, SearchSpace.for_images(given.get("input_size", 224)))
    config = DataConfig.resolve(given, ckpt.data, ckpt.path)
    data = Data.of(images, config, listed)
    check_classes(ckpt, data.classes)
    check_split(ckpt, data.split)
    return model, ckpt, config, data


def load_network(path, architecture=None, space=None):
    """(the network that `network.load` returns, its Checkpoint); an official file is assumed to be of `space`.

    Raises UserError where `architecture` contradicts the checkpoint.
    """
    ckpt = load(path, "scratch", space)
    given = architecture and ckpt.space.load_architecture(architecture)
    if ckpt.architecture is None:
        ckpt.architecture = given or ckpt.space.load_architecture(HERE / "architecture_final.json")
    elif given not in (None, ckpt.architecture):
        contradiction = f"--architecture {architecture} contradicts {path}, which is of {list(ckpt.architecture)}"
        raise UserError(f"{contradiction}; leave the flag out")
    with torch.device("meta"):
        model = ShuffleNetV2(ckpt.architecture, space=ckpt.space)
    load_weights(model, ckpt.weights, path)
    model.config, model.classes = ckpt.data or model.config, ckpt.class_names
    return model.eval(), ckpt


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
    if changes := difference(SUBJECTS, ckpt.content["settings"], settings):
        flags = {name: flag(name) for name in changes} | {"processes": "processes"}  # not a flag
        text = ", ".join(f"{flags[name]} {change}" for name, change in changes.items())
        raise UserError(f"{folder} has a run with other settings: {text}; use them, another --out, or --resume none")


# --- files of weights, ours and official ----------------------------------------------------------------------


def load_file(path):
    """What torch.save wrote to `path`, on the CPU: plain containers and tensors; no code in it is executed.

    Raises UserError where the file is missing, damaged, or holds anything else.
    """
    if pathlib.Path(path).suffix in (".pt2", ".onnx"):
        raise UserError(f"{path}: an exported program, not weights; name the checkpoint that it was exported from")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged file may raise struct.error, AssertionError, IndexError and others
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise UserError(f"{path}: not a whole checkpoint of plain tensors ({reason}); remove or replace it") from None


def load_and_parse_state_dict(path):
    """The state dict in an official or our own file: taken out of "state_dict" or "model", "module." stripped.

    Raises UserError as `load_file` does, and where there is no state dict in it.
    """
    return parse_state_dict(load_file(path), path)


def parse_state_dict(content, path):
    """As `load_and_parse_state_dict`, for a file's content."""
    if isinstance(content, dict):
        for key in ("state_dict", "model"):
            if isinstance(content.get(key), dict):
                content = content[key]
    if not isinstance(content, dict) or not content or not all(_is_plain_tensor(v) for v in content.values()):
        raise UserError(f"{path}: holds no state dict of plain tensors")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _is_plain_tensor(value):
    """Whether it can be copied into a weight: neither sparse, quantized, nested nor without data."""
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return plain and not value.is_quantized and not value.is_nested


def load_weights(model, state_dict, path):
    """Loads strictly. Raises UserError that names the first entry that does not fit.

    A model on the meta device gets its memory after that: the space of a damaged file may ask for terabytes.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | state_dict.keys()):
        if name not in state_dict or name not in own:
            where = "missing" if name in own else "of another model"
            kind = f"the model is {type(model).__name__}, {model.space.n_classes} classes"
            raise UserError(f"{path}: entry {name!r} is {where}; {kind}")
        if own[name].shape != state_dict[name].shape:
            shapes = f"{tuple(state_dict[name].shape)}, the model needs {tuple(own[name].shape)}"
            raise UserError(f"{path}: entry {name!r} has shape {shapes}")
    if next(model.parameters()).is_meta:
        model.to_empty(device="cpu")
    model.load_state_dict(state_dict)

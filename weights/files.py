"""Files of weights, ours and official: read without executing code.

Our checkpoints hold plain containers and tensors: version, kind ("supernet" or "scratch"), step, model, optimizer, the
search space, the data settings (preprocessing, augmentation, split), class names, the architecture (scratch) and the
settings of the run. Official files hold a state dict alone.
"""

import dataclasses
import pathlib
import reprlib
import warnings

import torch

from images.dataset import DataConfig
from space.custom import check_operations
from space.search_space import SearchSpace
from utils import UserError

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

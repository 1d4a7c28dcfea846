"""Files of weights, ours and official, read without executing code in them.

Our checkpoints hold plain containers and tensors: version, kind ("supernet" or "scratch"), step, model, optimizer, the
search space, the data settings (preprocessing, augmentation, split), class names, the architecture (scratch) and the
settings of the run. Official files hold only a state dict.
"""

import contextlib
import dataclasses
import difflib
import math
import pathlib
import pickle
import re
import reprlib
import warnings

import numpy as np
import torch

from settings.subjects import DataConfig
from space.own import check_operations
from space.search_space import SearchSpace
from utils import UserError

CHECKPOINT_VERSION = 1


@dataclasses.dataclass
class Checkpoint:
    """A checkpoint as read. For an official file, `data`, `split`, `classes` and `content` are None."""

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
        """The names of the classes; numbered names for an official file, which has none."""
        return self.classes or numbered_classes(self.space.n_classes)


def numbered_classes(n):
    """The names of `n` classes that have none."""
    return tuple(f"class {i}" for i in range(n))


def load(path, kind, space=None):
    """A Checkpoint from our own or an official file.

    An official file carries no search space: it is assumed to be of `space`, with the class count of its classifier.
    Raises UserError if the file is missing, damaged, of another kind or version.
    """
    return parse(load_file(path), path, kind, space)


def parse(content, path, kind, space=None):
    """As `load`, for the content of a file."""
    weights = parse_state_dict(content, path)
    if "version" not in content:
        space = space or SearchSpace()
        classifier = weights.get("classifier.0.weight")
        if classifier is not None and classifier.dim() == 2 and len(classifier):
            space = dataclasses.replace(space, n_classes=len(classifier))
        return Checkpoint(str(path), kind, space, weights)
    version = content["version"]
    found = content.get("kind")
    if type(version) is not int or version != CHECKPOINT_VERSION:
        raise UserError(
            f"{path}: checkpoint version {reprlib.repr(version)}, this program reads version {CHECKPOINT_VERSION}"
        )
    if type(found) is not str or found != kind:
        raise UserError(f"{path}: a {reprlib.repr(found).strip(chr(39))} checkpoint, not a {kind} one")
    try:
        classes = content["classes"]
        split = content["split"]
        architecture = content.get("architecture")
        if not all(type(name) is str for name in classes):
            raise TypeError("classes are not names")
        if split is not None and not (
            isinstance(split, dict) and all(type(value) in (int, str) for value in split.values())
        ):
            raise TypeError("the split is not made of numbers and names")
        space = SearchSpace.from_dict(content["space"])
        check_operations(space, path)
        of_files = content["data"] is not None and space.image_channels == 3  # else the images were given in Python
        return Checkpoint(
            path=str(path), kind=kind, weights=weights, space=space, split=split,
            data=DataConfig.from_dict(content["data"]) if of_files else None,
            classes=tuple(classes), architecture=None if architecture is None else space.check(architecture),
            content=content,
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged checkpoint ({str(error)[:100]})") from None


def load_file(path):
    """What torch.save wrote to `path`, on the CPU: plain containers, tensors, and NumPy's numbers, texts and arrays.

    No code in the file is executed. Raises UserError if it is missing, damaged, or holds anything else.
    """
    if pathlib.Path(path).suffix in (".pt2", ".onnx", ".ort"):
        raise UserError(f"{path}: an exported program, not weights; name the checkpoint that it was exported from")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged file may raise struct.error, AssertionError, IndexError and others
        raise UserError(f"{path}: not a whole checkpoint of plain tensors {_reason(path, error)}") from None


def _reason(path, error):
    """Why a file can't be read, and what to do: replace a damaged one, save weights again without other types."""
    text = re.sub("\033\\[\\d*m", "", str(error)).rpartition("WeightsUnpickler error:")[2].strip()
    types = set(re.findall(r"GLOBAL (\S+) w", text))
    with contextlib.suppress(Exception), torch.serialization.safe_globals(NUMPY):  # fails for other than zip files
        types.update(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if not types:
        return f"({(text or type(error).__name__).splitlines()[0][:100]}); remove or replace it"
    types = sorted({ascii(name.removeprefix("builtins."))[1:-1][:60] for name in types})
    named = ", ".join(types[:4]) + (", ..." if len(types) > 4 else "")
    code = (
        f"import torch; content = torch.load({str(path)!r}, weights_only=False); "
        'torch.save(content["state_dict"], "weights.pth")'
    )
    return (
        f"(it holds {named}, which can't be read without executing code in it); if you trust whoever wrote it, "
        f"write the weights again by three lines of Python: {code}"
    )


class _Dtype:
    """Replaces numpy.dtype while a file is read, because its state could turn bytes into pointers."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[biufc]\d+|[US][1-9]\d*|O8?", code):
            raise pickle.UnpicklingError(f"numpy.dtype {ascii(code)[:20]}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """Replaces numpy.ndarray, and the function that creates one, while a file is read."""

    def __new__(cls, *_):
        return super().__new__(cls, (0,))

    def __setstate__(self, state):
        _, shape, stand_in, fortran, values = state
        dtype = stand_in.dtype
        kind, size = (list, 1) if dtype.hasobject else (bytes, dtype.itemsize)
        if type(values) is not kind or len(values) != math.prod(shape) * size or min(shape, default=0) < 0:
            raise pickle.UnpicklingError("numpy.ndarray of another size than its shape")
        super().__setstate__((1, shape, dtype, fortran, values))


def _scalar(stand_in, value):
    """Replaces the function that creates a NumPy number or text."""
    return np.frombuffer(value, stand_in.dtype, 1)[0]


def _no_bytes():
    """Replaces the function that creates the values of an empty array."""
    return b""


# The names of these in files of NumPy 1 and 2.
NUMPY = [(_Dtype, "numpy.dtype"), (_Array, "numpy.ndarray"), (_no_bytes, "builtins.bytes")] + [
    (stand_in, f"numpy.{core}.multiarray.{name}")
    for core in ("core", "_core")
    for stand_in, name in ((_scalar, "scalar"), (_Array, "_reconstruct"))
]


WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")  # added by DataParallel, DDP and torch.compile


def parse_state_dict(content, path):
    """The state dict in the content of an official or our own file, which may lie in "state_dict" or "model"; names
    lose WRAPPERS. Raises UserError if there is none.
    """
    if isinstance(content, dict):
        for key in ("state_dict", "model"):
            if isinstance(content.get(key), dict):
                content = content[key]
    if not isinstance(content, dict) or not content or not all(_is_plain_tensor(v) for v in content.values()):
        raise UserError(f"{path}: holds no state dict of plain tensors")
    weights = {WRAPPERS.sub("", str(name)): tensor for name, tensor in content.items()}
    if len(weights) < len(content):
        raise UserError(f"{path}: holds an entry twice, with and without module. or _orig_mod. in its name")
    return weights


def _is_plain_tensor(value):
    """Whether it can be copied into a weight: neither sparse, quantized, nested nor without data."""
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return plain and not value.is_quantized and not value.is_nested


def load_weights(model, state_dict, path):
    """Loads strictly. Raises UserError that names the first entry that does not fit, and the most similar one.

    A model on the meta device gets memory only then, because the space of a damaged file may need terabytes.
    """
    own = model.state_dict()
    # Counts that old versions of torch did not write; no result depends on them.
    counts = {name: torch.zeros((), dtype=torch.long) for name in own if name.endswith(".num_batches_tracked")}
    state_dict = counts | state_dict
    if differing := sorted(own.keys() ^ state_dict.keys()):
        name = differing[0]
        where, other = ("missing", "the file") if name in own else ("of another model", "the model")
        like = difflib.get_close_matches(name, [n for n in differing if (n in own) != (name in own)], 1)
        instead = f", {other} has {like[0]!r} instead" if like else ""
        kind = f"the model is {type(model).__name__}, {model.space.n_classes} classes"
        raise UserError(f"{path}: entry {name!r} is {where}; {kind}{instead}; {len(differing)} names differ")
    for name, tensor in sorted(own.items()):
        if tensor.shape != state_dict[name].shape:
            shapes = f"{tuple(state_dict[name].shape)}, the model needs {tuple(tensor.shape)}"
            raise UserError(f"{path}: entry {name!r} has shape {shapes}")
    if next(model.parameters()).is_meta:
        model.to_empty(device="cpu")
    model.load_state_dict(state_dict)

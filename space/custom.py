"""Search spaces and operations of the user: presets by name, a YAML file or section, a file of operations."""

import dataclasses
import hashlib
import importlib.util
import pathlib
import reprlib

import blocks
from settings.subjects import is_path
from space.search_space import OPERATIONS, OTHER_OPERATIONS, SearchSpace
from utils import UserError, read_json, read_yaml

WIDTHS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6)
PRESETS = {
    "blocks": {},
    "joint": {"widths": WIDTHS},
    "channels": {"widths": WIDTHS},
    # Six narrow blocks in three stages, which a laptop trains in minutes on small images.
    "small": {
        "stem_channels": 16, "stage_blocks": (2, 2, 2), "stage_channels": (32, 64, 128), "stage_strides": (2, 2, 2),
        "last_channels": 256,
    },
    # Seven blocks whose operations differ in cost by an order of magnitude, and in what they can do.
    "varied": {
        "stem_channels": 16, "stage_blocks": (2, 3, 2), "stage_channels": (24, 48, 96), "stage_strides": (2, 2, 2),
        "last_channels": 192,
        "operations": ("skip_1x1", "pointwise_1x1", "shufflenet_3x3", "shufflenet_5x5", "mobilenet_3x3"),
    },
}  # fmt: skip
STAGE = {"blocks": "stage_blocks", "channels": "stage_channels", "stride": "stage_strides"}
ENTRIES = {  # entries of a space in YAML, or of a mapping in it -> fields of a SearchSpace
    "stem": {"channels": "stem_channels", "stride": "stem_stride"},
    "last": {"channels": "last_channels", "classifier-bias": "classifier_bias"},
    "operations": "operations",
    "widths": "widths",
    "architecture": "architecture",  # the index of a fixed operation for each block
}

loaded = {}  # name of an operation of the user -> SHA-256 of its file


def make_space(name=None, architecture=None, operations=None, input_size=224, n_classes=1000, where="space"):
    """The SearchSpace `name` for images of `input_size` px and `n_classes` classes.

    `name` is a preset, a YAML file with a section `space`, or the content of such a section, named `where` in errors.
    `architecture` is the path of an architecture, `operations` that of a file of operations. Without a name, the space
    is that of the search which wrote the architecture, else `joint` for an architecture with widths, else the paper's.
    Raises UserError if the space is not valid.
    """
    load_operations(operations)
    given = {}
    if isinstance(name, dict):
        given = _fields(name, where)
    elif name in PRESETS:
        given = dict(PRESETS[name])
    elif name is not None:
        is_file = pathlib.Path(name).exists() or is_path("space", name)
        document = read_yaml(name) if is_file else {}
        if not isinstance(document.get("space"), dict):
            raise UserError(f"--space {name}: neither {', '.join(PRESETS)} nor a YAML file with a section 'space'")
        given = _fields(document["space"], f"{name}: space")
    if name in (None, "channels") and architecture:
        given = _space_of(architecture) | given
    space = dataclasses.replace(SearchSpace.for_images(input_size, n_classes), **given)
    if name == "channels":
        if not architecture:
            raise UserError("--space channels: needs --architecture FILE, whose operations it keeps")
        whole = dataclasses.replace(space, widths=WIDTHS, architecture=())
        fixed = whole.operations_of(whole.load_architecture(architecture))
        space = dataclasses.replace(whole, architecture=fixed)
    return with_hash(space)


def searched(path):
    """The settings of the search with a record next to an architecture, or None. Raises UserError if it is damaged."""
    state = pathlib.Path(path).with_name("search") / "state.json"
    if not state.exists():
        return None
    try:
        settings = read_json(state)["settings"]
        return {**settings, "space": SearchSpace.from_dict(settings["space"]), "state": state}
    except (KeyError, TypeError):
        raise UserError(f"{state}: not the state of a search") from None


def _space_of(path):
    """The fields of the space in which a search found the architecture in a file, if there is a record next to it."""
    if settings := searched(path):
        space = settings["space"]
        check_operations(space, settings["state"])
        own = {"input_size", "n_classes", "architecture", "operations_hash"}  # of the images, of `channels`, computed
        return {field.name: getattr(space, field.name) for field in dataclasses.fields(space) if field.name not in own}
    architecture = read_json(path)
    return dict(PRESETS["joint"]) if isinstance(architecture, dict) and "ChannelChoice1" in architecture else {}


def _fields(section, where):
    """The fields of a SearchSpace in a YAML's mapping. Raises UserError that names the entry."""
    fields = {}
    for name, value in section.items():
        if name == "stages":
            fields |= _stages(value, where)
        elif name not in ENTRIES:
            raise UserError(f"{where}: unknown entry {reprlib.repr(name)}; known entries: stages, {', '.join(ENTRIES)}")
        elif isinstance(ENTRIES[name], str):
            fields[ENTRIES[name]] = value
        else:
            known = ENTRIES[name]
            if not isinstance(value, dict) or not value.keys() <= known.keys():
                raise UserError(f"{where}: {name} is {reprlib.repr(value)}, not a mapping of {', '.join(known)}")
            fields |= {known[key]: v for key, v in value.items()}
    return fields


def _stages(stages, where):
    if not isinstance(stages, list) or not stages:
        raise UserError(f"{where}: stages is {reprlib.repr(stages)}, not a list of stages")
    for number, stage in enumerate(stages, 1):
        if not isinstance(stage, dict) or stage.keys() != STAGE.keys():
            raise UserError(f"{where}: stage {number} is {reprlib.repr(stage)}, not a mapping of {', '.join(STAGE)}")
    return {field: [stage[key] for stage in stages] for key, field in STAGE.items()}


# --- own operations -------------------------------------------------------------------------------------------


def load_operations(path):
    """Executes a user's file, which registers operations with `blocks.register`; does nothing for None.

    Raises UserError if the file fails, registers no operation, or registers an official name.
    """
    if path is None:
        return
    try:
        digest = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"--operations {path}: {error.strerror}") from None
    if digest in loaded.values():
        return
    before = dict(blocks.OPERATIONS)
    try:
        spec = importlib.util.spec_from_file_location("own_operations", path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as error:
        raise UserError(f"--operations {path}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    changed = [name for name, operation in blocks.OPERATIONS.items() if before.get(name) is not operation]
    if taken := sorted(set(changed) & set(OPERATIONS)):
        blocks.OPERATIONS.update(before)
        raise UserError(f"--operations {path}: {taken[0]!r} is the name of an official operation")
    if not changed:
        raise UserError(f"--operations {path}: registers no operation; decorate its class with blocks.register(name)")
    loaded.update(dict.fromkeys(changed, digest))


def with_hash(space):
    """The space with the hash of the file of its own operations. Raises UserError if one is not loaded."""
    own = [name for name in space.operations if name in loaded or name not in OPERATIONS + OTHER_OPERATIONS]
    for name in own:
        if name not in loaded:
            known = ", ".join(blocks.OPERATIONS)
            raise UserError(f"search space: operation {name!r} is not one of {known}; name its file by --operations")
    return dataclasses.replace(space, operations_hash=loaded[own[0]][:16] if own else "")


def check_operations(space, where):
    """Raises UserError if operations of the space in a file are not loaded, or have changed since it was written."""
    if with_hash(space).operations_hash != space.operations_hash:
        raise UserError(f"{where}: its operations come from another version of the file of --operations; use that one")

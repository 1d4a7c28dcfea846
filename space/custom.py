"""Search spaces: presets by name, a YAML file or section, the space of an architecture."""

import dataclasses
import itertools
import pathlib
import reprlib

from settings.subjects import is_path
from space import own
from space.search_space import OPERATIONS, SearchSpace
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
    # The stages of ProxylessNAS (Cai et al., arXiv 1812.00332), for images as large as ImageNet's.
    "mobile": {
        "stem_channels": 32, "stage_blocks": (1, 4, 4, 4, 4, 4, 1), "stage_strides": (1, 2, 2, 2, 1, 2, 1),
        "stage_channels": (16, 24, 40, 80, 96, 192, 320), "last_channels": 1280,
        "operations": ("skip_1x1", *(f"mobilenet_{k}x{k}{end}" for end in ("", "_e6") for k in (3, 5, 7))),
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


def make_space(name=None, architecture=None, own_file=None, input_size=224, n_classes=1000, where="space"):
    """The SearchSpace `name` for images of `input_size` px and `n_classes` classes.

    `name` is a preset, a YAML file with a section `space`, or the content of such a section, named `where` in errors.
    `architecture` is the path of an architecture, `own_file` that of a file of --own. Without a name, the space
    is that of the search which wrote the architecture, else `joint` for an architecture with widths, else the paper's.
    Raises UserError if the space is not valid.
    """
    own.load(own_file)
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
    return own.with_hash(space)


def searched(path):
    """The settings of the search with a record next to an architecture, or None. Raises UserError if it is damaged."""
    folder = pathlib.Path(path).absolute().parent
    state = (folder.parent if folder.name == "front" else folder) / "search" / "state.json"
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
        own.check_operations(space, settings["state"])
        # Two are of the images, one is of --space channels, and the hash is computed anew.
        other = {"input_size", "n_classes", "architecture", "operations_hash"}
        fields = (field.name for field in dataclasses.fields(space))
        return {name: getattr(space, name) for name in fields if name not in other}
    architecture = read_json(path)
    return dict(PRESETS["joint"]) if isinstance(architecture, dict) and "ChannelChoice1" in architecture else {}


def _fields(section, where):
    """The fields of a SearchSpace in a YAML's mapping. Raises UserError that names the entry."""
    fields = {}
    for name, value in section.items():
        if name == "stages":
            fields |= _stages(value, where, section.get("operations", OPERATIONS))
        elif name not in ENTRIES:
            raise UserError(f"{where}: unknown entry {reprlib.repr(name)}; known entries: stages, {', '.join(ENTRIES)}")
        elif isinstance(ENTRIES[name], str):
            fields.setdefault(ENTRIES[name], value)  # operations may be known by the stages
        else:
            known = ENTRIES[name]
            if not isinstance(value, dict) or not value.keys() <= known.keys():
                raise UserError(f"{where}: {name} is {reprlib.repr(value)}, not a mapping of {', '.join(known)}")
            fields |= {known[key]: v for key, v in value.items()}
    return fields


def _stages(stages, where, operations):
    """The fields of stages, of which those without `operations` offer those of the space."""
    if not isinstance(stages, list) or not stages:
        raise UserError(f"{where}: stages is {reprlib.repr(stages)}, not a list of stages")
    for number, stage in enumerate(stages, 1):
        if not isinstance(stage, dict) or stage.keys() - {"operations"} != STAGE.keys():
            raise UserError(f"{where}: stage {number} is {reprlib.repr(stage)}, not a mapping of {', '.join(STAGE)}")
    fields = {field: [stage[key] for stage in stages] for key, field in STAGE.items()}
    if any("operations" in stage for stage in stages):
        offered = [stage.get("operations", operations) for stage in stages]
        for number, names in enumerate(offered, 1):
            if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
                raise UserError(f"{where}: stage {number} offers {reprlib.repr(names)}, not a list of operations")
        fields |= {"stage_operations": offered, "operations": list(dict.fromkeys(itertools.chain(*offered)))}
    return fields

"""The settings of the commands by subject, one frozen dataclass each; the defaults are the official values.

Each field is a flag of the commands that use it, and a setting of YAML files. Functions below the commands take the
settings of their subject, or plain arguments. Needs only the standard library.
"""

import argparse
import dataclasses
import os
from typing import ClassVar

from settings.fields import Settings, count, flag, names, real, setting
from utils import HERE, UserError

COSTS = ("flops", "params", "latency")  # costs of a candidate: multiply-adds, parameters, ns
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # torch.onnx needs the first two; the third runs the file
RUNTIMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}  # what networks are timed in, and its name in words


def objectives(text):
    """An argparse type: acc1 and one or two costs, which search.py checks, separated by commas."""
    found = text.split(",")
    if "acc1" not in found or len(found) not in (2, 3) or len(set(found)) < len(found) or not all(found):
        costs = f"{', '.join(COSTS)} and those of --own"
        raise argparse.ArgumentTypeError(f"{text!r} is not acc1 and one or two of {costs}, with commas")
    return text


@dataclasses.dataclass(frozen=True)
class Run(Settings):
    """Where a run writes, its seed, and what computes it."""

    TITLE = "run"

    config: str = setting(
        None, "YAML of settings, in sections: common, and a script's name", unit="FILE", path=True, decides=False,
        in_files=False, excludes="config",
    )  # fmt: skip
    demo: bool = setting(
        False, "small settings for the bundled images (demo.yml)", nargs=0, decides=False, in_files=False,
        excludes="config",
    )  # fmt: skip
    out: str = setting(".", "output folder (default: the current one)", unit="DIR", path=True, decides=False)
    seed: int = setting(0, "seed of all random numbers (default: 0)", count(0))
    device: str = setting("auto", "default: a GPU if there is one", choices=("auto", "cpu", "cuda"), decides=False)
    threads: int = setting(None, "CPU threads of torch (default: torch's own choice)", count(1, 1024), decides=False)


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """How images are transformed and how many are held out; sizes in px.

    The flags default to None: the value in the checkpoint, or without one the official value.
    """

    TITLE = "data"

    input_size: int = setting(224, "side of the network's input (224)", count(16, 2048), unit="PX")
    val_resize: int = setting(
        256, "shorter side before the centre crop (256/224 of the input size)", count(16, 4096), unit="PX"
    )
    preprocessing: str = setting(
        "spos", "BGR in [0, 255], or RGB normalised by ImageNet's mean and standard deviation (spos)",
        choices=("spos", "imagenet"),
    )  # fmt: skip
    crop_scale: tuple = setting(
        (0.08, 1.0), "area of training crops as a share of the image (0.08 1)", real(0.001, 1), nargs=2,
        unit=("LOW", "HIGH"),
    )  # fmt: skip
    crop_ratio: tuple = setting(
        (3 / 4, 4 / 3), "width/height of training crops (0.75 1.3333)", real(0.01, 100), nargs=2, unit=("LOW", "HIGH")
    )
    crop_padding: int = setting(
        0,
        "train on validation's crop, shifted by up to N px over a black border, instead of on crops that are resized "
        "(0: resized crops)",
        count(0, 1024), unit="N",
    )  # fmt: skip
    jitter: float = setting(0.4, "strength of brightness, contrast and saturation jitter in training (0.4)", real(0, 1))
    # The name of the field is kept, because checkpoints store it.
    mirror: bool = setting(True, "flip half of the training images horizontally (yes)")
    heldout_per_class: int = setting(
        50, "training images of each class held out for the search (50)", count(1, 1_000_000), unit="N"
    )
    split_seed: int = setting(0, "seed that selects the held-out images (0)", count(0), unit="N")
    alpha: str = setting(
        "white", "what is seen through transparent pixels; dropped: the colours that they have in the file (white)",
        choices=("white", "black", "dropped"),
    )  # fmt: skip
    exif: str = setting(
        "ignored", "apply turns images as their EXIF orientation says, and as viewers show them (ignored)",
        choices=("ignored", "apply"),
    )  # fmt: skip
    jfif: bool = setting(True, "read .jfif files of the tree, too (yes)")
    group_by: str = setting(
        None,
        "hold out whole groups of images: a regular expression, searched in CLASS/FILE, whose parentheses are the "
        "group, or a .csv of file and group (each image on its own)",
        unit="REGEX|CSV", path=True,
    )  # fmt: skip

    EVALUATES: ClassVar[tuple] = ("input_size", "val_resize", "preprocessing", "alpha", "exif")  # decide its pixels
    TRAINS: ClassVar[tuple] = ("crop_scale", "crop_ratio", "crop_padding", "jitter", "mirror")
    UNWRITTEN: ClassVar[dict] = {"alpha": "dropped", "jfif": False}  # what it means that a file lacks one of these

    @classmethod
    def unset(cls):
        """{name: None}, the defaults of the flags."""
        return dict.fromkeys(names(cls))

    @classmethod
    def given(cls, values):
        """The entries of a mapping (name -> value) that are settings of this class and not None."""
        return {name: values[name] for name in names(cls) if values.get(name) is not None}

    @classmethod
    def resolve(cls, given, stored=None, source=None):
        """The DataConfig with the given values (name -> value); `stored` is that of the file `source`.

        Without `stored`, val_resize defaults to 256/224 of the input size, and images of a file without a config, an
        official one, are read as in the official code. Raises UserError if a given value contradicts `stored`, or if
        the values contradict each other.
        """
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        for name, value in values.items():
            if is_path(name, value):
                values[name] = os.path.abspath(value)  # checkpoints keep it; the split knows its content
            elif stored and value != getattr(stored, name):
                contradiction = f"{flag(name)} {value} contradicts {source}, which has {getattr(stored, name)}"
                raise UserError(f"{contradiction}; leave it out, here and in the settings file")
        if not stored:
            values = (cls.UNWRITTEN if source else {}) | values
            values.setdefault("val_resize", round(values.get("input_size", cls.input_size) * 256 / 224))
        config = dataclasses.replace(stored or cls(), **values)
        if config.val_resize < config.input_size:
            raise UserError(f"--val-resize {config.val_resize} is smaller than the input size, {config.input_size}")
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(config, name)
            if low > high:
                raise UserError(f"{flag(name)} {low} {high}: the first must not be larger than the second")
        return config

    def to_dict(self):
        """Plain values by name."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values):
        """The inverse of `to_dict`; settings may be absent. Raises TypeError for an unknown one or another type."""
        if not isinstance(values, dict):
            raise TypeError(f"data settings are a {type(values).__name__}")
        for field in dataclasses.fields(cls):
            value = values.get(field.name, field.default)
            default = field.default
            numbers = value if type(value) in (list, tuple) and len(value) == 2 else (value,)
            kinds = (int, float) if type(default) in (float, tuple) else (type(default),)
            kinds = (str, type(None)) if default is None else kinds
            if (type(default) is tuple) != (len(numbers) == 2) or any(type(n) not in kinds for n in numbers):
                raise TypeError(f"{field.name} is a {type(value).__name__}")
        return cls(**{**cls.UNWRITTEN, **values})


@dataclasses.dataclass(frozen=True)
class Images(Settings):
    """Where the images are and how they are loaded."""

    TITLE = "images"

    data_dir: str = setting(
        str(HERE / "data" / "imagenet"), "folder with train/<class>/ and val/<class>/ (data/imagenet)", unit="DIR",
        path=True, decides=False,
    )  # fmt: skip
    loader: str = setting(
        "auto", "default: DALI if it is installed, else torchvision; memory: small images, decoded once",
        choices=("auto", "dali", "torchvision", "memory", "synthetic"),
    )  # fmt: skip
    eval_batch_size: int = setting(200, "batch size of validation (default: 200)", count(1, 100_000), unit="N")
    max_pixels: int = setting(
        178_956_970, "larger images are refused, which may be made to fill the memory (178956970)",
        count(1, 10_000_000_000), unit="N", decides=False,
    )  # fmt: skip
    cache: str = setting(
        str(HERE / "data" / "cache"),
        "folder of decoded calibration and validation images, checked trees, and compiled operations (data/cache)",
        unit="DIR", path=True, decides=False,
    )  # fmt: skip
    memory_gb: float = setting(
        8.0, "decoded images that --loader memory keeps at most, in GB (8)", real(0.001, 100_000), unit="GB",
        decides=False,
    )  # fmt: skip
    workers: int = setting(None, "loader processes or threads (default: up to 8)", count(0, 256), decides=False)


@dataclasses.dataclass(frozen=True)
class Training(Settings):
    """The training recipe, and when a run validates and saves."""

    TITLE = "training"

    iterations: int = setting(150_000, "optimizer steps (default: {default})", count())
    batch_size: int = setting(1024, "images per step (default: 1024)", count(2, 1_000_000))
    micro_batch: int = setting(
        None, "images that go through the path at a time on each GPU; gradients are averaged (default: all of a step)",
        count(2, 1_000_000), unit="N",
    )  # fmt: skip
    compile: bool = setting(False, "compile the operations by torch.compile, before the first step (default: no)")
    rule: str = setting("spos", "training rule, the paper's or one of the file of --own (default: spos)", unit="NAME")
    lr: float = setting(0.5, "initial learning rate, decays linearly to 0 (default: 0.5)", real(0, 1000))
    warmup: int = setting(0, "steps of linear warm-up (default: 0)", count(0), unit="N")
    momentum: float = setting(0.9, "momentum of SGD (default: 0.9)", real(0, 1))
    weight_decay: float = setting(
        4e-5, "weight decay of tensors with more than one dimension (default: 4e-5)", real(0, 1)
    )
    label_smoothing: float = setting(0.1, "default: 0.1", real(0, 1))
    amp: str = setting(
        "off", "mixed precision: convolutions in bfloat16 or float16 (default: off)", choices=("off", "bf16", "fp16")
    )
    val_every: int = setting(10_000, "steps between validations (default: 10000)", count(), unit="N", decides=False)
    save_every: int = setting(1_000, "steps between checkpoints (default: 1000)", count(), unit="N", decides=False)
    keep: int = setting(3, "checkpoints to keep (default: 3)", count(), unit="N", decides=False)
    resume: str = setting(
        "auto", "resume from the newest checkpoint if there is one, or start anew (default: auto)",
        choices=("auto", "none"), decides=False,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Evaluation(Settings):
    """How candidates are evaluated."""

    TITLE = "evaluation"

    bn: str = setting(
        "ema", "BN statistics: exponential moving average or plain average (default: ema)", choices=("ema", "average")
    )
    bn_batches: int = setting(200, "batches that recalibrate BN (default: 200)", count(), unit="N")
    bn_batch_size: int = setting(128, "default: 128", count(2, 100_000), unit="N")
    eval_amp: str = setting("off", "bf16: convolutions in bfloat16 (default: off)", choices=("off", "bf16"))


@dataclasses.dataclass(frozen=True)
class Space(Settings):
    """The search space, custom operations, and an architecture in the space."""

    TITLE = "search space"

    space: str = setting(
        None,
        "blocks, channels, joint, mobile, small, varied, or YAML with section 'space' (blocks, or the architecture's)",
        unit="NAME|FILE", path=True, decides=False,
    )  # fmt: skip
    own: str = setting(
        None, "Python file that registers operations, training rules, costs or searchers of your own", unit="FILE",
        path=True, decides=False, old="operations",
    )  # fmt: skip
    architecture: str = setting(
        None, "JSON of an architecture, one-hot or a plain list (default: {default})", unit="FILE", path=True
    )


@dataclasses.dataclass(frozen=True)
class Weights(Settings):
    """The weights that a command reads."""

    TITLE = "weights"

    checkpoint: str = setting(
        None, "weights, ours or official (default: the newest in OUT/checkpoints/{default})", unit="FILE", path=True
    )


@dataclasses.dataclass(frozen=True)
class Sampling(Settings):
    """Which paths the supernet trains."""

    TITLE = "paths"

    sampler: str = setting("flops-uniform", "default: flat over FLOPs bins", choices=("flops-uniform", "uniform"))
    flops_range: tuple = setting(
        None, "of the bins, as 290M or 0.14%% (290M 360M at 224 px)", nargs=2, unit=("LOW", "HIGH")
    )
    flops_bins: int = setting(7, "default: 7", count(1, 1000), unit="N")
    width_warmup: int = setting(
        None, "steps in which paths widen from the widest downwards, where widths are chosen (a quarter of all)",
        count(0), unit="N",
    )  # fmt: skip
    val_paths: int = setting(3, "fixed paths to validate (default: 3)", count(1, 1000), unit="N")


@dataclasses.dataclass(frozen=True)
class Search(Settings):
    """The evolution of a search."""

    TITLE = "search"

    strategy: str = setting(
        "evolution", "random: as many random candidates, to compare with; or a searcher of the file of --own "
        "(evolution)", unit="NAME",
    )  # fmt: skip
    objectives: str = setting(
        None,
        "acc1,flops: the front of accuracy and costs (flops, params, latency, own), instead of the most accurate",
        objectives, unit="LIST",
    )  # fmt: skip
    rank_by: str = setting(
        "acc1", "what makes a candidate the better one: accuracy, or a low loss on the same images (acc1)",
        choices=("acc1", "loss"),
    )  # fmt: skip
    population: int = setting(50, "candidates per generation (50)", count(1, 100_000))
    select: int = setting(None, "parents: this many of the best so far (a fifth)", count(1, 100_000))
    mutation: int = setting(None, "children by mutation per generation (half)", count(0, 100_000))
    crossover: int = setting(None, "children by crossover per generation (half)", count(0, 100_000))
    mutation_prob: float = setting(0.1, "of redrawing each block (0.1)", real(0, 1))
    generations: int = setting(20, "populations to evaluate (20)", count(1, 1_000_000))


@dataclasses.dataclass(frozen=True)
class CostLimits(Settings):
    """What a candidate may cost."""

    TITLE = "limits"

    limit: tuple = setting(
        None,
        "flops=330M, params=80k, latency=8ms of the network alone, with a lower bound flops=290M:330M, or a share of "
        "all candidates flops=59%%; any number of them (flops=330M, elsewhere than at 224 px flops=59%%)",
        nargs="+", unit="COST=LIMIT", extends=True,
    )  # fmt: skip
    flops_limit: str = setting(None, "short for --limit flops=FLOPS", unit="FLOPS")
    flops_table: str = setting(
        None, "costs in the form of the official op_flops_dict.pkl (default: counted from the shapes)", unit="FILE",
        path=True,
    )  # fmt: skip
    latency_table: str = setting(
        None, "what tester.py --mode latency has written (OUT/latency.json)", unit="FILE", path=True
    )
    foreign_latency_table: bool = setting(
        False, "accept a table of another device or setting, without measuring the best candidates (no)"
    )


@dataclasses.dataclass(frozen=True)
class Trials(Settings):
    """How the trials of a search are run."""

    TITLE = "trials"

    resume: bool = setting(False, "resume the search in OUT", decides=False)
    engine: str = setting("nni", "what runs the evaluations (default: nni)", choices=("nni", "local"), decides=False)
    concurrency: int = setting(
        None, "trials at a time (that of the experiment file, else one per GPU, or one per remote machine)",
        count(1, 1000), decides=False,
    )  # fmt: skip
    candidates_per_trial: int = setting(
        None, "default: a generation is split over the trials at a time", count(1, 100_000), unit="N", decides=False
    )
    trial_timeout: int = setting(
        300, "seconds without a heartbeat after which a trial is ended (300)", count(1), unit="S", decides=False
    )


@dataclasses.dataclass(frozen=True)
class NNI(Settings):
    """The NNI experiment of a search."""

    TITLE = "NNI"

    experiment: str = setting(
        str(HERE / "config_search.yml"), "the NNI experiment (config_search.yml)", unit="FILE", path=True,
        decides=False,
    )  # fmt: skip
    port: int = setting(None, "of the web UI (default: the first free one from 8080)", count(1, 65534), decides=False)
    host: str = setting(
        "127.0.0.1", "0.0.0.0 opens the web UI to the network", choices=("127.0.0.1", "0.0.0.0"), decides=False
    )


@dataclasses.dataclass(frozen=True)
class Testing(Settings):
    """What tester.py does."""

    TITLE = "test"

    mode: str = setting("test", "default: test", choices=("gen", "test", "latency"))
    split: str = setting("search", "held-out training images, or val (default: search)", choices=("search", "val"))
    latency_batch_size: int = setting(1, "images per run (1)", count(1, 100_000), unit="N")
    runtime: str = setting("torch", "what runs the networks whose latency is measured (torch)", choices=tuple(RUNTIMES))
    elsewhere: str = setting(
        None, "folder of networks to be measured on another device, in ONNX Runtime; with its results.json, they are "
        "read (none: on this one)", unit="DIR", path=True,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Retraining(Settings):
    """What scratch.py does instead of training, and the final BN pass."""

    TITLE = "network"

    eval: bool = setting(
        None, "measure --checkpoint on val instead of training", nargs=0, decides=False, in_files=False,
        excludes="instead",
    )  # fmt: skip
    export: str = setting(
        None, "export --checkpoint as a program: .pt2, or .onnx", unit="FILE", path=True, decides=False,
        excludes="instead",
    )  # fmt: skip
    predict: tuple = setting(
        None, "print the classes of image files, or of all in a folder, by --checkpoint", nargs="+", unit="IMAGE",
        path=True, decides=False, excludes="instead",
    )  # fmt: skip
    with_preprocessing: bool = setting(
        None, "export a program that takes whole images of any size, and resizes and crops them, which a limit on "
        "latency does not count (no)", nargs=0, decides=False, in_files=False,
    )  # fmt: skip
    opset: int = setting(None, "ONNX's operator set, 18 to 20 (torch.onnx's default)", count(18, 20), decides=False)
    bn_pass: int = setting(1250, "training batches of the BN pass (default: 1250)", count(0), unit="N")


SUBJECTS = (
    Run, DataConfig, Images, Training, Evaluation, Space, Weights, Sampling, Search, CostLimits, Trials, NNI, Testing,
    Retraining,
)  # fmt: skip
SEARCH = (Run, DataConfig, Images, Evaluation, Search, CostLimits)  # the subjects of a search's settings
EVOLUTION = ("population", "select", "mutation", "crossover", "mutation_prob", "generations", "seed")
FIELDS = {field.name: field for subject in SUBJECTS for field in dataclasses.fields(subject)}


def deciding(values):
    """The entries of a mapping (name -> value) that are settings and affect the result."""
    return {name: value for name, value in values.items() if name in FIELDS and FIELDS[name].metadata["decides"]}


def is_path(name, value):
    """Whether the value of a setting is a path; that of `space` or `group_by` is one where it names a file."""
    if name in ("space", "group_by"):
        return str(value).endswith((".yml", ".yaml") if name == "space" else ".csv")
    return name in FIELDS and FIELDS[name].metadata["path"]

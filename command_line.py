"""The command line: a flag has one name, one meaning and one definition, here, for all scripts.

Values come from, in rising order of precedence: the defaults below (the official settings), a YAML file (`--config`,
or the committed demo.yml with `--demo`), the command line. Needs the standard library, and PyYAML to read YAML.
"""

import argparse
import math
import os
import re
import reprlib
import shlex
import sys

from utils import HERE, UserError, is_path, read_yaml

SCRIPTS = ("supernet", "tester", "search", "scratch")  # that read settings; each has a section of its name
SETTINGS = frozenset(
    """amp architecture batch-size bn bn-batch-size bn-batches bn-pass cache candidates-per-trial checkpoint concurrency
    crop-ratio crop-scale crossover data-dir device engine eval eval-amp eval-batch-size experiment export flops-bins
    flops-limit flops-range flops-table generations heldout-per-class host input-size iterations jitter keep
    label-smoothing loader lr mirror mode momentum mutation mutation-prob operations out population port predict
    preprocessing resume sampler save-every seed select space split split-seed threads trial-timeout val-every val-paths
    val-resize warmup weight-decay width-warmup workers limit
    foreign-latency-table latency-batch-size latency-table objectives rank-by strategy""".split()  # noqa: SIM905
)  # of all scripts: section `common` may hold those that this script doesn't have
# Characters that neither a command line nor a file name can contain; \udc80 to \udcff are bytes that are not UTF-8.
NOT_A_WORD = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviations, and settings of a YAML file between defaults and command line.

    `section` is the name of the script, and of its section in a YAML file.
    """

    def __init__(self, doc, section):
        super().__init__(
            description=doc,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            prog=f"{section}.py",
        )
        self.section = section

    def error(self, message):
        raise UserError(message if len(message) <= 500 else f"{message[:200]} ... {message[-100:]}")

    def parse(self, argv=None, defaults=None):
        """Returns the arguments as a namespace; `config` is the path of the YAML file that was read, or None.

        `defaults` (attribute -> value, from `check_settings`) take precedence over the flags' own defaults. Afterwards
        `given` maps the attributes that the command line or the file sets to their values; `typed` holds those that the
        command line sets.
        """
        argv = sys.argv[1:] if argv is None else list(argv)
        args = self.parse_args(argv)
        path = HERE / "demo.yml" if args.demo else args.config
        settings = self._read_settings(path) if path else {}
        unset = argparse.Namespace(**dict.fromkeys(vars(args), self))  # no flag has the parser as its value
        given = {name: value for name, value in vars(self.parse_args(argv, unset)).items() if value is not self}
        self.typed = given.keys()
        self.given = {k: v for k, v in settings.items() if k != "space"} | given  # `space` serves all scripts
        args = self.parse_args(argv, argparse.Namespace(**(defaults or {}) | settings))
        args.config = path and str(path)
        return args

    def refuse(self, cause, *flags):
        """Raises UserError where one of `flags` is given, which `cause` makes void; a default may be repeated."""
        for flag in flags:
            name = flag.replace("-", "_")
            if self.given.get(name, self.get_default(name)) != self.get_default(name):
                raise UserError(f"--{flag} has no effect with {cause}: leave one of them out")

    def _read_settings(self, path):
        """The checked settings of a YAML file: those of section `common`, then those of this script's section."""
        document = read_yaml(path)
        for name, section in document.items():
            if name not in ("common", "space", *SCRIPTS, self.section):
                known = ", ".join(("common", "space", *SCRIPTS))
                raise UserError(f"{path}: unknown section {reprlib.repr(name)}; there are {known}")
            if not isinstance(section, dict):
                raise UserError(f"{path}: {name!r} is not a section with settings, but {reprlib.repr(section)}")
        own = {flag.removeprefix("--") for flag in self._option_string_actions}
        common = {k: v for k, v in document.get("common", {}).items() if k not in SETTINGS - own}
        values = self.check_settings(path, "common", common)
        values |= self.check_settings(path, self.section, document.get(self.section, {}))
        if "space" in document and "space" in own:
            values["space"] = document["space"]
        return values

    def check_settings(self, path, section, settings):
        """Returns {attribute: value} of the flags that `settings` (flag without dashes -> value) of a file set.

        Values are checked with the type and choices of their flags; file names are relative to the folder of `path`.
        Raises UserError that begins with `path` for an unknown flag or a wrong value.
        """
        words, attributes = [], []
        for flag, value in settings.items():
            action = self._option_string_actions.get(f"--{flag}")
            if action is None or flag in ("config", "demo", "help"):
                raise UserError(f"{path}: {self.section}.py has no setting {reprlib.repr(flag)} (section {section!r})")
            if value is False and "off" in (action.choices or ()):  # PyYAML's reading of `off`
                value = "off"
            words += _words(path, flag, value, isinstance(action, argparse.BooleanOptionalAction))
            attributes.append(action.dest)
        try:
            args = self.parse_args(words)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return {name: getattr(args, name) for name in attributes}


def _words(path, flag, value, is_switch):
    """A setting of a file as the words of a command line. Raises UserError where the value has no such form."""
    if is_switch:
        if not isinstance(value, bool):
            raise UserError(f"{path}: {flag} is {reprlib.repr(value)}, not true or false")
        return [f"--{flag}" if value else f"--no-{flag}"]
    values = value if isinstance(value, list) else [value]
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (str, int, float)) or NOT_A_WORD.search(str(v)):
            raise UserError(f"{path}: {flag} is {reprlib.repr(value)}, not a plain value")
    words = list(map(str, values))
    if is_path(flag, value):
        words = (_beside(path, word) for word in words)
    return [f"--{flag}", *words]


def _beside(path, name):
    """A file name in a settings file, which is relative to the folder of that file."""
    return os.path.join(os.path.dirname(path), os.path.expanduser(name))


class Extend(argparse.Action):
    """Adds the values to those that a file or the same flag gave before."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else ()), *values])


def number(kind, low, high, text):
    """Returns an argparse type: `kind` (int or float) from `low` to `high`, called `text` in errors."""

    def parse(word):
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # also for NaN
            raise argparse.ArgumentTypeError(f"{word!r} is not {text} from {low} to {high}")
        return value

    return parse


def count(low=1, high=1_000_000_000):
    return number(int, low, high, "a whole number")


def real(low=0.0, high=1e6):
    return number(float, low, high, "a number")


def _add_config_flags(parser):
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", metavar="FILE", help="YAML of settings, in sections: common, and a script's name")
    which.add_argument("--demo", action="store_true", help="small settings for the bundled images (demo.yml)")


def command(script, args, *words):
    """The command line of another script with these words, on the settings, operations and outputs of this one."""
    words = ["python", script, *words]
    words += ["--demo"] if args.demo else ["--config", args.config] if args.config else []
    words += ["--operations", args.operations] if args.operations != _operations_of(args.config) else []
    words += ["--out", args.out] if args.out != "." else []
    return shlex.join(words)


def _operations_of(path):
    """The file of operations that the section `common` of a settings file names, or None."""
    named = read_yaml(path).get("common", {}).get("operations") if path else None
    return named and _beside(path, named)


def add_run_flags(parser):
    group = parser.add_argument_group("run")
    _add_config_flags(group)
    group.add_argument("--out", default=".", metavar="DIR", help="output folder (default: the current one)")
    group.add_argument("--seed", type=count(0), default=0, help="seed of all random numbers (default: 0)")
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    group.add_argument("--threads", type=count(1, 1024), help="CPU threads of torch (default: torch's own choice)")


def add_data_flags(parser):
    """Adds the flags of the data; None means "as in the checkpoint, else the official value", which the help names."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir",
        default=str(HERE / "data" / "imagenet"),
        metavar="DIR",
        help="folder with train/<class>/ and val/<class>/ (data/imagenet)",
    )
    group.add_argument("--input-size", type=count(16, 2048), metavar="PX", help="side of the network's input (224)")
    group.add_argument(
        "--val-resize",
        type=count(16, 4096),
        metavar="PX",
        help="shorter side before the centre crop (256/224 of the input size)",
    )
    group.add_argument(
        "--preprocessing",
        choices=("spos", "imagenet"),
        help="BGR in [0, 255], or RGB normalised by ImageNet's mean and standard deviation (spos)",
    )
    group.add_argument(
        "--crop-scale",
        type=real(0.001, 1),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="area of training crops as a share of the image (0.08 1)",
    )
    group.add_argument(
        "--crop-ratio",
        type=real(0.01, 100),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="width/height of training crops (0.75 1.3333)",
    )
    group.add_argument(
        "--jitter",
        type=real(0, 1),
        help="strength of brightness, contrast and saturation jitter in training (0.4)",
    )
    group.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        help="flip half of the training images horizontally (yes)",
    )
    group.add_argument(
        "--heldout-per-class",
        type=count(1, 1_000_000),
        metavar="N",
        help="training images of each class held out for the search (50)",
    )
    group.add_argument("--split-seed", type=count(0), metavar="N", help="seed that selects the held-out images (0)")
    group.add_argument(
        "--loader",
        choices=("auto", "dali", "torchvision", "synthetic"),
        default="auto",
        help="default: DALI if it is installed, else torchvision",
    )
    group.add_argument(
        "--eval-batch-size",
        type=count(1, 100_000),
        default=200,
        metavar="N",
        help="batch size of validation (default: 200)",
    )
    add_cache_flag(group)
    group.add_argument("--workers", type=count(0, 256), help="loader processes or threads (default: up to 8)")


def add_cache_flag(parser):
    parser.add_argument(
        "--cache",
        default=str(HERE / "data" / "cache"),
        metavar="DIR",
        help="folder of decoded calibration and validation images, and of the record of checked trees (data/cache)",
    )


def add_training_flags(parser, iterations):
    group = parser.add_argument_group("training")
    group.add_argument(
        "--iterations", type=count(), default=iterations, help=f"optimizer steps (default: {iterations})"
    )
    group.add_argument("--batch-size", type=count(2, 1_000_000), default=1024, help="images a step (default: 1024)")
    group.add_argument(
        "--lr",
        type=real(0, 1000),
        default=0.5,
        help="initial learning rate, decays linearly to 0 (default: 0.5)",
    )
    group.add_argument("--warmup", type=count(0), default=0, metavar="N", help="steps of linear warm-up (default: 0)")
    group.add_argument("--momentum", type=real(0, 1), default=0.9, help="momentum of SGD (default: 0.9)")
    group.add_argument(
        "--weight-decay",
        type=real(0, 1),
        default=4e-5,
        help="weight decay of tensors with more than one dimension (default: 4e-5)",
    )
    group.add_argument("--label-smoothing", type=real(0, 1), default=0.1, help="default: 0.1")
    group.add_argument(
        "--amp",
        choices=("off", "bf16", "fp16"),
        default="off",
        help="mixed precision: convolutions in bfloat16 or float16 (default: off)",
    )
    group.add_argument(
        "--val-every", type=count(), default=10_000, metavar="N", help="steps between validations (default: 10000)"
    )
    group.add_argument(
        "--save-every", type=count(), default=1_000, metavar="N", help="steps between checkpoints (default: 1000)"
    )
    group.add_argument("--keep", type=count(), default=3, metavar="N", help="checkpoints to keep (default: 3)")
    group.add_argument(
        "--resume",
        choices=("auto", "none"),
        default="auto",
        help="resume from the newest checkpoint if there is one, or start anew (default: auto)",
    )


def add_space_flags(parser):
    """Flags of the search space; --architecture is another one, which scripts have for reasons of their own."""
    parser.add_argument(
        "--space",
        metavar="NAME|FILE",
        help="blocks, channels, joint, small, or a YAML with a section 'space' (default: blocks or the architecture's)",
    )
    add_operations_flag(parser)


def add_operations_flag(parser):
    parser.add_argument("--operations", metavar="FILE", help="Python file that registers operations of your own")


def add_checkpoint_flag(parser, kind):
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help=f"weights, ours or official (default: the newest in OUT/checkpoints/{kind})",
    )


def add_architecture_flag(parser, default):
    parser.add_argument(
        "--architecture",
        metavar="FILE",
        help=f"JSON of an architecture, one-hot or a plain list (default: {default})",
    )


def add_evaluation_flags(parser):
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--bn",
        choices=("ema", "average"),
        default="ema",
        help="BN statistics: exponential moving average or plain average (default: ema)",
    )
    group.add_argument(
        "--bn-batches", type=count(), default=200, metavar="N", help="batches that recalibrate BN (default: 200)"
    )
    group.add_argument("--bn-batch-size", type=count(2, 100_000), default=128, metavar="N", help="default: 128")
    group.add_argument(
        "--eval-amp", choices=("off", "bf16"), default="off", help="bf16: convolutions in bfloat16 (default: off)"
    )

"""What every script shares: errors a user can put right, the command line, logging, files. Standard library and PyYAML.

A flag has one name, one meaning and one definition, here, for all scripts. Values come from, in rising order:
the defaults below (the official settings), a YAML file (`--config FILE`; `--demo` is the committed demo.yml),
the command line.
"""
import argparse
import contextlib
import json
import logging
import math
import multiprocessing
import os
import pathlib
import platform
import re
import reprlib
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time

try:
    import fcntl
except ImportError:  # not on Windows: there, nothing keeps two processes apart
    fcntl = None

HERE = pathlib.Path(__file__).resolve().parent
PATHS = ("data-dir", "cache", "out", "checkpoint", "architecture", "flops-table", "experiment")  # flags that name files
NO_WORD = re.compile("[\0\ud800-\udfff]")  # characters that neither a command line nor a file's name can have
MAX_YAML_BYTES = 100_000  # settings are some 1 kB; a megabyte would take a minute to read
MAX_JSON_BYTES = 1_000_000  # an architecture is some 2 kB; anything of this size is something else

log = logging.getLogger("spos")

# How long an OpenMP thread spins before it sleeps. With libgomp's own 300,000, one other busy process on two cores makes
# training 20 times slower or worse, since the threads spin away each other's time; this costs 1% where nothing else runs.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


class UserError(Exception):
    """Something the user can put right: shown as one line that names the thing, its value and the way out; exit code 2."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM, by number; no Exception, for NNI swallows those in places."""


def interrupt(number, _frame):
    raise Interrupted(number)


@contextlib.contextmanager
def signals(handler):
    """Within the block, SIGINT and SIGTERM go to `handler`: `interrupt`, or signal.SIG_IGN where nothing is to interrupt."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def leave_signals_to_parent(*_):
    """This process, a worker, ends when its parent ends it, or ends itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_script(main, parse_args, may_say=lambda line: True):
    """Runs `main(parse_args())`; a UserError, or a file that can't be written, becomes one line and exit code 2.

    The line goes to standard error if `may_say(line)`.
    """
    try:
        main(parse_args())
        return
    except UserError as error:
        line = str(error)
    except OSError as error:  # a full disk above all
        line = f"{error.filename or 'a file'}: {error.strerror or error}; what was written before is whole: put that right, then go on"
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    line = f"{pathlib.Path(sys.argv[0]).name}: error: {' '.join(line.split())}"
    if may_say(line):
        with above_progress_bars():
            print(line, file=sys.stderr)
    sys.exit(2)


# --- command line --------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviations, and a section of a YAML file between defaults and command line."""

    def __init__(self, doc, section):
        super().__init__(
            description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, prog=f"{section}.py"
        )
        self.section = section
        self.source = ""

    def error(self, message):
        raise UserError(self.source + (message if len(message) <= 500 else f"{message[:200]} ... {message[-100:]}"))

    def parse(self, argv=None):
        """The arguments as a namespace; `config` names the YAML file that was read, or is None."""
        argv = sys.argv[1:] if argv is None else list(argv)
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.error = self.error
        _add_config_flags(first)
        config = first.parse_known_args(argv)[0]
        path = HERE / "demo.yml" if config.demo else config.config
        settings = self._yaml_arguments(path) if path else []
        args = self.parse_args(settings + argv)
        args.config = path and str(path)
        return args

    def _yaml_arguments(self, path):
        """The YAML's `common` section and this script's own, as command-line words, checked as such.

        Paths are relative to the YAML file.
        """
        document = read_yaml(path)
        for name, section in document.items():
            if not isinstance(section, dict):
                raise UserError(f"{path}: {reprlib.repr(name)} is not a section (common, or the name of a script) with settings")
        words = []
        for name in ("common", self.section):
            for key, value in document.get(name, {}).items():
                action = self._option_string_actions.get(f"--{key}")
                if action is None or key in ("config", "demo", "help"):
                    raise UserError(f"{path}: {self.section}.py has no setting {reprlib.repr(key)} (section {name!r})")
                if isinstance(action, argparse.BooleanOptionalAction):
                    if not isinstance(value, bool):
                        raise UserError(f"{path}: {key} is {reprlib.repr(value)}, not true or false")
                    words.append(f"--{key}" if value else f"--no-{key}")
                    continue
                values = value if isinstance(value, list) else [value]
                if any(isinstance(v, bool) or not isinstance(v, (str, int, float)) or NO_WORD.search(str(v)) for v in values):
                    raise UserError(f"{path}: {key} is {reprlib.repr(value)}, not a plain value")
                if key in PATHS:
                    values = list(map(str, values))
                    values = [os.path.join(os.path.dirname(path), v) for v in values]
                words += [f"--{key}", *map(str, values)]
        self.source = f"{path}: "
        self.parse_args(words)
        self.source = ""
        return words


def number(kind, low, high, text):
    """An argparse type: `kind` (int or float) from `low` to `high`; `text` says so in the error."""

    def parse(word):
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # nor NaN
            raise argparse.ArgumentTypeError(f"{word!r} is not {text} from {low} to {high}")
        return value

    return parse


def count(low=1, high=1_000_000_000):
    return number(int, low, high, "a whole number")


def real(low=0.0, high=1e6):
    return number(float, low, high, "a number")


def _add_config_flags(parser):
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", metavar="FILE", help="YAML with settings, in sections: common, and a script's name")
    which.add_argument("--demo", action="store_true", help="the bundled images with small settings (demo.yml)")


def add_run_flags(parser):
    group = parser.add_argument_group("run")
    _add_config_flags(group)
    group.add_argument("--out", default=".", metavar="DIR", help="folder of all outputs (default: here)")
    group.add_argument("--seed", type=count(0), default=0, help="of every random draw (default: 0)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    group.add_argument("--threads", type=count(1, 1024), help="CPU threads of torch (default: its own choice)")


def add_data_flags(parser):
    """Flags of the data. None stands for "as the checkpoint says, or else the official value named in the help"."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", default=str(HERE / "data" / "imagenet"), metavar="DIR", help="has train/<class>/ and val/<class>/")
    group.add_argument("--input-size", type=count(16, 2048), metavar="PX", help="side of the network's input (224)")
    group.add_argument("--val-resize", type=count(16, 4096), metavar="PX", help="shorter side before the centre crop (256/224 of the input size)")
    group.add_argument("--preprocessing", choices=("spos", "imagenet"), help="BGR in [0, 255], or RGB with mean and standard deviation (spos)")
    group.add_argument("--crop-scale", type=real(0.001, 1), nargs=2, metavar=("LOW", "HIGH"), help="area share of training crops (0.08 1)")
    group.add_argument("--crop-ratio", type=real(0.01, 100), nargs=2, metavar=("LOW", "HIGH"), help="width/height of training crops (0.75 1.3333)")
    group.add_argument("--jitter", type=real(0, 1), help="brightness, contrast and saturation of training images (0.4)")
    group.add_argument("--mirror", action=argparse.BooleanOptionalAction, help="mirror half of the training images (yes)")
    group.add_argument("--heldout-per-class", type=count(1, 1_000_000), metavar="N", help="training images kept for the search (50)")
    group.add_argument("--split-seed", type=count(0), metavar="N", help="of the choice of held-out images (0)")
    group.add_argument("--loader", choices=("auto", "dali", "torchvision", "synthetic"), default="auto", help="default: DALI where installed")
    group.add_argument("--eval-batch-size", type=count(1, 100_000), default=200, metavar="N", help="images a step of validation (default: 200)")
    group.add_argument("--cache", default=str(HERE / "data" / "cache"), metavar="DIR", help="decoded images that every candidate meets (data/cache)")
    group.add_argument("--workers", type=count(0, 256), help="loader processes or threads (default: up to 8)")


def add_training_flags(parser, iterations):
    group = parser.add_argument_group("training")
    group.add_argument("--iterations", type=count(), default=iterations, help=f"optimizer steps (default: {iterations})")
    group.add_argument("--batch-size", type=count(2, 1_000_000), default=1024, help="images a step (default: 1024)")
    group.add_argument("--lr", type=real(0, 1000), default=0.5, help="learning rate before the first step, falls linearly to 0 (default: 0.5)")
    group.add_argument("--warmup", type=count(0), default=0, metavar="N", help="steps over which the rate rises first (default: 0)")
    group.add_argument("--momentum", type=real(0, 1), default=0.9, help="of SGD (default: 0.9)")
    group.add_argument("--weight-decay", type=real(0, 1), default=4e-5, help="of weights with more than one dimension (default: 4e-5)")
    group.add_argument("--label-smoothing", type=real(0, 1), default=0.1, help="default: 0.1")
    group.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="convolutions in bfloat16 or float16 (default: off)")
    group.add_argument("--val-every", type=count(), default=10_000, metavar="N", help="steps between validations (default: 10000)")
    group.add_argument("--save-every", type=count(), default=1_000, metavar="N", help="steps between checkpoints (default: 1000)")
    group.add_argument("--keep", type=count(), default=3, metavar="N", help="checkpoints to keep (default: 3)")
    group.add_argument("--resume", choices=("auto", "none"), default="auto", help="go on from the newest checkpoint, or start anew (default: auto)")


def add_checkpoint_flag(parser, kind):
    parser.add_argument("--checkpoint", metavar="FILE", help=f"weights, ours or official (default: newest in OUT/checkpoints/{kind})")


def add_architecture_flag(parser, default):
    parser.add_argument("--architecture", metavar="FILE", help=f"architecture, one-hot or a plain list (default: {default})")


def add_evaluation_flags(parser):
    group = parser.add_argument_group("evaluation")
    group.add_argument("--bn", choices=("ema", "average"), default="ema", help="BN statistics: exponential or plain average (default: ema)")
    group.add_argument("--bn-batches", type=count(), default=200, metavar="N", help="batches that recalibrate BN (default: 200)")
    group.add_argument("--bn-batch-size", type=count(2, 100_000), default=128, metavar="N", help="default: 128")
    group.add_argument("--eval-amp", choices=("off", "bf16"), default="off", help="bf16: convolutions in bfloat16 (default: off)")


# --- files ---------------------------------------------------------------------------------------------------


def read_json(path):
    """The JSON in a file. Raises UserError where it is missing, too large, nested too deep or no JSON."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise UserError(f"{path}: over {MAX_JSON_BYTES} bytes, which no file of this project has")
        return json.loads(data)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({str(error)[:80]})") from None


def read_yaml(path):
    """The mapping in a YAML file; tags that construct objects are refused. Raises UserError that names the file."""
    import yaml  # here, since the search space and its users need nothing but the standard library

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path!r}: {error}") from None
    if len(data) > MAX_YAML_BYTES:
        raise UserError(f"{path}: over {MAX_YAML_BYTES} bytes, which no settings have")
    try:
        document = yaml.safe_load(data)
    except Exception as error:  # beside YAMLError: a wrong !!timestamp is an AttributeError, !!int an IndexError, !!bool a KeyError
        raise UserError(f"{path}: not plain YAML ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: not a YAML mapping")
    return document


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Opens a private temporary file that takes the place of `path` when the block ends well, and only then."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_json(path, value, **kwargs):
    with atomic_write(path) as file:
        json.dump(value, file, **kwargs)
        file.write("\n")


def write_settings(path, section, settings):
    """Writes values of flags, by attribute name, as a YAML that `--config` reads: without those not given, paths absolute."""
    import yaml

    words = {k.replace("_", "-"): v for k, v in settings.items() if v is not None and k not in ("config", "demo")}
    words |= {k: os.path.abspath(v) for k, v in words.items() if k in PATHS}
    with atomic_write(path) as file:
        yaml.safe_dump({section: words}, file)


def output_folder(path):
    """The folder, made where it is missing. Raises UserError where it can't be written."""
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise UserError(f"--out: can't write to {path} ({error.strerror})") from None


def hold_lock(path, wait_s=0):
    """The lock of a file that one process at a time can hold, until it ends or closes it. Raises UserError where another does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")  # noqa: SIM115
    deadline = time.monotonic() + wait_s
    while fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise UserError(f"{path}: another run is going on in this folder; wait for it, or name another --out") from None
            time.sleep(0.2)
    return file


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def duration(seconds):
    """Seconds for people: "40 s", "2.5 h"."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


# --- logging -------------------------------------------------------------------------------------------------


def above_progress_bars():
    """A context in which lines on standard error go above tqdm's bars, if there are any."""
    tqdm = sys.modules.get("tqdm")  # not imported: the search space and its users need nothing but the standard library
    return tqdm.tqdm.external_write_mode(file=sys.stderr) if tqdm else contextlib.nullcontext()


class Screen(logging.StreamHandler):
    """Standard error, beside progress bars."""

    def emit(self, record):
        with above_progress_bars():
            super().emit(record)


class _LogFile(logging.FileHandler):
    """A log that a full disk cuts short without a word: what can't do without the disk says so."""

    def handleError(self, record):
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def start_logging(folder, args, device):
    """Logs to standard error and to `folder`/run.log, and writes down what ran: command, settings, versions, device.

    The resolved settings are kept as `folder`/config.yml, a file that `--config` reads.
    """
    folder = output_folder(folder)
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    for handler in (Screen(sys.stderr), _LogFile(folder / "run.log")):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    write_settings(folder / "config.yml", pathlib.Path(sys.argv[0]).stem, vars(args))
    log.info("command: %s", shlex.join(sys.argv))
    log.info("versions: %s; commit %s; device %s; seed %s", versions(), commit(), device, args.seed)


def versions():
    """Versions of what is loaded, as one line."""
    names = ("torch", "torchvision", "nvidia.dali", "nni", "numpy")
    found = [f"{n} {sys.modules[n].__version__}" for n in names if hasattr(sys.modules.get(n), "__version__")]
    return ", ".join([f"python {platform.python_version()}", *found])


def commit():
    """The project's git commit, "unknown" outside a checkout."""
    try:
        result = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
        return result.stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"

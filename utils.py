"""What every script shares: errors a user can put right, signals, files, logging. Standard library and PyYAML."""

import contextlib
import json
import logging
import multiprocessing
import os
import pathlib
import platform
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


def watch_parent():
    """Returns a function that says whether the process that started this one has ended since."""
    parent, number = multiprocessing.parent_process(), os.getppid()
    return lambda: os.getppid() != number or (parent is not None and not parent.is_alive())


def end_with_parent():
    """Ends this process within a second after its parent has ended, for whatever reason."""
    parent_ended = watch_parent()

    def watch():
        while not parent_ended():
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_signals_to_parent(*_):
    """Makes this process, a worker, ignore SIGINT and SIGTERM, and end with its parent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


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


def settings_difference(before, now, ignore=()):
    """{name: "0.5 (was 0.3)"} of the settings that differ between two dicts, by name, without those in `ignore`."""

    def shown(value):
        return value if isinstance(value, str) and len(value) <= 60 else reprlib.repr(value)

    names = sorted(name for name in before.keys() | now.keys() if name not in ignore)
    return {
        name: f"{shown(now.get(name))} (was {shown(before.get(name))})"
        for name in names
        if now.get(name) != before.get(name)
    }


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
    except (
        Exception
    ) as error:  # beside YAMLError: a wrong !!timestamp is an AttributeError, !!int an IndexError, !!bool a KeyError
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


def try_lock(path):
    """The lock of a file, which one process at a time can hold, until it ends or closes it. None where another holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def hold_lock(path, wait_s=0):
    """The lock of a file in a run's folder. Raises UserError where another process still holds it after `wait_s`."""
    deadline = time.monotonic() + wait_s
    while not (file := try_lock(path)):
        if time.monotonic() > deadline:
            raise UserError(f"{path}: another run is going on in this folder; wait for it, or name another --out")
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
        result = subprocess.run(
            ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10
        )
        return result.stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"

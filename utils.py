"""What every script shares: user errors, signals, files, logging. Needs the standard library and PyYAML.

Scripts import this module before torch, because it sets GOMP_SPINCOUNT.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import importlib.util
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import platform
import re
import reprlib
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time

try:
    import fcntl
except ImportError:  # Windows, where locks have no effect
    fcntl = None

HERE = pathlib.Path(__file__).resolve().parent
POLL_S = 0.5  # between two looks at what other processes do
MAX_YAML_BYTES = 100_000  # settings take about 1 kB; PyYAML needs a minute for a megabyte
MAX_JSON_BYTES = 1_000_000  # an architecture takes about 2 kB

log = logging.getLogger("spos")

# Sets how long an OpenMP thread spins before it sleeps; libgomp reads it once, when torch is imported. With its
# default of 300,000, one other busy process on two cores makes training 20 times slower or worse, because spinning
# threads occupy the cores. The lower value costs 1% where nothing else runs.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


# A notebook sets MPLBACKEND for all processes that it starts; a Python without that backend cannot import matplotlib.
# Figures need none.
_backend = os.environ.get("MPLBACKEND", "").partition("module://")[2].partition(".")[0]
if _backend and importlib.util.find_spec(_backend) is None:
    del os.environ["MPLBACKEND"]


def keep_memory():
    """Has glibc keep the memory of freed tensors of up to 32 MiB: it would return it to the system after each operation
    and fetch it again, page by page (a fifth of a training step at 32 px). Returns whether it does.

    Elsewhere nothing changes, nor where the user sets MALLOC_ variables, GLIBC_TUNABLES, or SPOS_KEEP_MEMORY=0.
    """
    set_by_user = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if set_by_user or os.environ.get("SPOS_KEEP_MEMORY") == "0":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD (-1: never), M_TOP_PAD of malloc.h
    return all([mallopt(-3, 2**25), mallopt(-1, -1), mallopt(-2, 2**26)])


keep_memory()  # before torch allocates anything


class UserError(Exception):
    """An error that the user can fix: printed as one line that names the cause, its value and the fix; exit code 2.

    Messages name flags, such as "--batch-size 7"; in Python, outside the commands, they name arguments: "batch_size 7".
    """

    of_commands = False  # set by `run_script`

    def __str__(self):
        text = super().__str__()
        if self.of_commands:
            return text
        # A command in the text, such as "run tester.py --mode gen", is not changed.
        return re.sub(r"(\.py [^;,)]*)|--([a-z][a-z0-9-]*)", lambda m: m[1] or m[2].replace("-", "_"), text)


@contextlib.contextmanager
def in_one_line(what):
    """An exception in the block, which runs a user's code, becomes a UserError that begins with `what`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    except Exception as error:
        raise UserError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


INTERRUPTED = "interrupted; what it has written is kept, and the same command does the rest"


# What Slurm sends before a job's time is over, and a terminal when its connection is lost; Windows has neither.
WARNINGS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGHUP") if hasattr(signal, name))


class Interrupted(BaseException):
    """SIGINT, SIGTERM or one of WARNINGS, by number; not an Exception, because NNI catches those in several places."""


def interrupt(number, _frame):
    """A signal handler that raises Interrupted."""
    raise Interrupted(number)


@contextlib.contextmanager
def signals(handler):
    """Within the block, SIGINT, SIGTERM and WARNINGS are handled by `handler`: `interrupt`, or SIG_IGN to ignore them.

    One of WARNINGS that is ignored (SIGHUP under nohup) stays so.
    """
    numbers = [n for n in WARNINGS if signal.getsignal(n) is not signal.SIG_IGN] + [signal.SIGINT, signal.SIGTERM]
    in_main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    before = {number: signal.signal(number, handler) for number in numbers if in_main}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def watch_parent():
    """Returns a function that tells whether the parent process has ended since this call."""
    parent = multiprocessing.parent_process()
    number = os.getppid()
    return lambda: os.getppid() != number or (parent is not None and not parent.is_alive())


def end_with_parent(told=None):
    """Ends this process within a second of the end of its parent, whatever the cause.

    It also ends once the parent has written to `told`, a Connection that nothing else reads.
    """
    parent_ended = watch_parent()

    def watch():
        while not parent_ended() and not (told.poll(POLL_S) if told else time.sleep(POLL_S)):
            pass
        os._exit(int(parent_ended()))

    threading.Thread(target=watch, daemon=True).start()


def leave_signals_to_parent(told=None, *_):
    """Makes this worker process ignore what `signals` handles, and end when its parent ends or writes to `told`."""
    for number in (signal.SIGINT, signal.SIGTERM, *WARNINGS):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(told)


def shared_memory():
    """The size of /dev/shm in words, or "" on a system without it."""
    with contextlib.suppress(OSError):
        size = shutil.disk_usage("/dev/shm")
        return f"/dev/shm has {size.total / 2**20:.2f} MiB, {size.free / 2**20:.2f} of them free"
    return ""


def check_shared_memory(n):
    """Raises UserError if there is no room for what `n` worker processes share: semaphores, and sockets in TMPDIR.

    Without this check DataLoader prints a traceback, or fails in a worker's thread and waits forever for its batch.
    """
    try:
        _ = [multiprocessing.Semaphore() for _ in range(5 * n + 10)]  # more than DataLoader and a pool take
    except OSError as error:
        text = f"/dev/shm: {error.strerror or error}: no room for the semaphores of {n} worker processes"
        raise UserError(f"{text}; {shared_memory()}; give it more memory (docker run --shm-size 1g)") from None
    try:
        multiprocessing.connection.Listener().close()
    except OSError as error:
        text = f"TMPDIR {tempfile.gettempdir()}: worker processes can't open a socket there ({error.strerror or error})"
        raise UserError(f"{text}; set TMPDIR to a writable folder with a short path, such as /tmp") from None


_listeners = []  # (listener, every_s, [time of its last call])


@contextlib.contextmanager
def heartbeats_to(listener, every_s=0.0):
    """Within the block, each heartbeat of this process calls `listener()`, at most once per `every_s` seconds."""
    entry = listener, every_s, [-math.inf]
    _listeners.append(entry)
    try:
        yield
    finally:
        _listeners.remove(entry)


def heartbeat():
    """Reports that this process makes progress; called for every batch or file of long work, and while it waits."""
    for listener, every_s, last in _listeners:
        if (now := time.monotonic()) - last[0] >= every_s:
            last[0] = now
            listener()


class Silence:
    """For how long others have given no heartbeat, by the clock of this process."""

    def __init__(self):
        self.noticed = {}  # name -> (its mark, when this process saw that first)

    def seconds(self, name, mark):
        """Seconds since `mark`, a value that each heartbeat changes, was seen first."""
        now = time.monotonic()
        if name not in self.noticed or self.noticed[name][0] != mark:
            self.noticed[name] = mark, now
        return now - self.noticed[name][1]


def run_script(main, parse_args, may_print=lambda line: True):
    """Runs `main(parse_args())`; a UserError or OSError becomes one line on standard error and exit code 2, Ctrl-C
    one line and exit code 130. If the reader of standard output has ended (`| head -1`): no line, exit code 141.

    A line is printed only if `may_print(line)`. File names that are not UTF-8 are printed with escapes.
    """
    UserError.of_commands = True
    sys.stderr = Screen.of(sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    code = 2
    try:
        main(parse_args())
        print(end="", flush=True)  # a failed write raises here, not at exit
        return
    except UserError as error:
        line = f"error: {error}"
    except OSError as error:  # mostly a full disk
        if isinstance(error, BrokenPipeError) and sys.stdout and _nobody_reads(sys.stdout):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at exit
            sys.exit(128 + signal.SIGPIPE)
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        line = f"error: {what}; files written before are intact: fix this, then give the same command again"
    except KeyboardInterrupt:
        code, line = 128 + signal.SIGINT, INTERRUPTED
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        what = "evaluation takes --eval-batch-size images at a time, the BN pass --batch-size (--bn-pass 0: none)"
        line = f"error: out of memory ({str(error).partition('. ')[0][:100] or 'of the CPU'}): {what}"
    line = f"{pathlib.Path(sys.argv[0]).name}: {' '.join(line.split())}"
    line = line.encode(errors="backslashreplace").decode()
    if may_print(line):
        with above_progress_bars():
            print(line, file=sys.stderr)
    sys.exit(code)


def out_of_memory(error):
    """Whether an error says that memory ran out, of a GPU or of the CPU; torch's errors are RuntimeErrors."""
    known = ("CUDA out of memory", "DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")
    in_text = isinstance(error, RuntimeError) and any(text in str(error) for text in known)
    return in_text or isinstance(error, MemoryError)


class Screen:
    """Standard error that loses what can't be written: its terminal may be gone, or there was none from the start."""

    def __init__(self, stream):
        self.stream = stream

    @classmethod
    def of(cls, stream):
        return stream if isinstance(stream, cls) else cls(stream or open(os.devnull, "w"))

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def _nobody_reads(stream):
    """Whether a stream is a pipe whose reader has ended."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _say_in_one_line(kind, error, trace):
    """Prints one line for Ctrl-C or a missing package before `run_script`, while modules are imported."""
    script = pathlib.Path(sys.argv[0]).name
    if issubclass(kind, KeyboardInterrupt):
        print(f"{script}: {INTERRUPTED}", file=sys.stderr)
    elif issubclass(kind, ModuleNotFoundError) and error.name and not _is_ours(error.name):
        install = f"make, which installs it for .venv/bin/python {script}, or pip install -r requirements.txt"
        print(f"{script}: error: {sys.executable} has no module {error.name}: run {install}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.__excepthook__(kind, error, trace)


def _is_ours(module):
    first = module.partition(".")[0]
    return (HERE / first).is_dir() or (HERE / f"{first}.py").is_file()


if pathlib.Path(sys.argv[0]).resolve().is_relative_to(HERE):  # a command of this project, not a program that imports it
    sys.excepthook = _say_in_one_line
    for _number in range(3):  # one that is closed would be given to the next file that is opened
        try:
            os.fstat(_number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


# --- files ---------------------------------------------------------------------------------------------------


def read_bytes(path, most=None):
    """The content of a file. Raises UserError if it can't be read, or has more than `most` bytes."""
    try:
        with open(path, "rb") as file:
            data = file.read() if most is None else file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # such as a null character in the name
        raise UserError(f"{path!r}: {error}") from None
    if most is not None and len(data) > most:
        raise UserError(f"{path}: over {most} bytes, larger than any such file of this project")
    return data


def read_json(path, most=MAX_JSON_BYTES):
    """The JSON in a file of at most `most` bytes, or of any size (None), as lists of images have.

    Raises UserError if it is missing, too large, nested too deeply or not JSON.
    """
    data = read_bytes(path, most)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({str(error)[:80]})") from None


def read_yaml(path):
    """The mapping in a YAML file, read by safe_load. Raises UserError that names the file."""
    import yaml  # here: a missing package is named in one line once this module is imported

    data = read_bytes(path, MAX_YAML_BYTES)
    try:
        document = yaml.load(data, _unique_keys_loader())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # not only YAMLError: a wrong !!timestamp is an AttributeError, !!bool a KeyError
        text = " ".join(str(error).replace('in "<byte string>", ', "in ").split())
        raise UserError(f"{path}: not plain YAML ({text[:160]})") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: not a YAML mapping")
    return document


@functools.cache
def _unique_keys_loader():
    """yaml.SafeLoader that raises UserError for a key that is given twice, which YAML forbids and PyYAML accepts."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value]
            if twice := [key for key in keys if isinstance(key, str) and keys.count(key) > 1]:
                raise UserError(f"{reprlib.repr(twice[0])} is given twice")
            return super().construct_mapping(node, deep)

    return Loader


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Opens a temporary file that replaces `path` when the block ends without an exception."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        texts = {} if "b" in mode else {"errors": "backslashreplace"}  # for file names that are not UTF-8
        with os.fdopen(descriptor, mode, **texts) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # exFAT, CIFS and WSL permit no other mode, which does no harm
            os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_json(path, value, **kwargs):
    """Writes a value as JSON, atomically; `kwargs` are those of json.dump."""
    with atomic_write(path) as file:
        json.dump(value, file, **kwargs)
        file.write("\n")


def output_folder(path):
    """Returns the folder as a Path, creating it if it is missing. Raises UserError if it can't be written."""
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise UserError(f"--out: can't write to {path} ({error.strerror})") from None


def private_folder(path):
    """Returns an absolute Path of a folder that this user alone can open. Raises UserError where others can."""
    path = pathlib.Path(path).absolute()
    try:
        path.mkdir(0o700, parents=True, exist_ok=True)
        state = path.lstat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if os.name == "posix" and (not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077):
        raise UserError(f"{path}: not a folder that only you can open (mode 0700); remove it")
    return path


def try_lock(path):
    """Locks a file. Returns it open, and closing it releases the lock; None if another process holds the lock.

    Where the file system has no locks, a warning says so, and the file is returned.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")  # noqa: SIM115
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.close()
            error.filename = str(path)
            raise
        _warn_of_no_locks(path.parent, error.strerror)
    return file


NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)  # raised by NFS, FUSE and Lustre


@functools.cache
def _warn_of_no_locks(folder, why):
    """Once for each folder."""
    log.warning("warning: %s: files can't be locked here (%s): a second run in it would go unnoticed", folder, why)


def wait_for_lock(paths, text):
    """Locks the first free one of some files; returns (its path, the open file). Logs `text` once if it has to wait."""
    while True:
        for path in paths:
            if file := try_lock(path):
                return path, file
        if text:
            log.info(text)
        text = None
        heartbeat()
        time.sleep(POLL_S)


def hold_lock(path, wait_s=0):
    """Locks a file in a run's folder. Raises UserError if another process holds it for longer than `wait_s` seconds."""
    deadline = time.monotonic() + wait_s
    while not (file := try_lock(path)):
        if time.monotonic() > deadline:
            raise UserError(f"{path}: another run is using this folder; wait for it to end, or choose another --out")
        time.sleep(POLL_S)
    return file


def cores():
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_world_size():
    """The number of processes that torchrun has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def duration(seconds):
    """Seconds in words: "40 s", "2.5 h"."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def clock_ns(threads):
    """The clock, in ns, by which work of so many threads is timed. That of a thread stands still while another process
    has the core; on Windows it ticks every 15.6 ms, so it isn't used there."""
    return time.thread_time_ns if threads == 1 and sys.platform != "win32" else time.perf_counter_ns


class Pace:
    """How long something still takes, from what was done in the last minutes, because speeds change."""

    WINDOW_S = 300

    def __init__(self):
        self.marks = []  # (time, what was done by then); the first is from before the window

    def to_go(self, done, total):
        """In words, "12.3 min to go"; empty until something was done since the first call."""
        now = time.monotonic()
        self.marks.append((now, done))
        while self.marks[1:] and self.marks[1][0] < now - self.WINDOW_S:
            del self.marks[0]
        start, before = self.marks[0]
        return f"{duration((total - done) * (now - start) / (done - before))} to go" if done > before else ""


# --- logging -------------------------------------------------------------------------------------------------


def above_progress_bars():
    """A context in which lines on standard error are printed above tqdm's progress bars, if any."""
    tqdm = sys.modules.get("tqdm")  # not imported here: without bars there is nothing to be above
    return tqdm.tqdm.external_write_mode(file=sys.stderr) if tqdm else contextlib.nullcontext()


class _ScreenLog(logging.StreamHandler):
    """Logs to standard error, above progress bars. For tqdm.contrib.logging, each command would have to be a context,
    and to import tqdm.
    """

    def emit(self, record):
        with above_progress_bars():
            super().emit(record)


class _LogFile(logging.FileHandler):
    """A log file that ignores a full disk, because more important files raise the error themselves."""

    def handleError(self, record):
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def start_logging(folder, device, seed, commits=""):
    """Logs to standard error and to `folder`/run.log, beginning with command, versions, commit, device and seed.

    `commits` are those of the user's own files, in words.
    """
    folder = output_folder(folder)
    end_logging(_ScreenLog, _LogFile)
    show_log()
    _add_handler(_LogFile(folder / "run.log", errors="backslashreplace"))
    log.info("command: %s", shlex.join(sys.argv))
    log.info("versions: %s", circumstances(device, seed, commits))


def circumstances(device, seed, commits=""):
    """What a run needs to be repeated besides its command, as one line."""
    return f"{versions()}; version {version()}, commit {commit()}{commits}; device {device}; seed {seed}"


def end_logging(*kinds):
    """Closes the log file, or all handlers of some kinds."""
    for handler in [h for h in log.handlers if isinstance(h, kinds or (_LogFile,))]:
        log.removeHandler(handler)
        handler.close()


def show_log():
    """Logs to standard error, unless a program that imports this one has set up logging."""
    if not log.hasHandlers():
        _add_handler(_ScreenLog(sys.stderr))


def _add_handler(handler):
    log.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)


def versions():
    """The versions of Python and of the loaded packages, as one line."""
    names = ("torch", "torchvision", "nvidia.dali", "nni", "numpy")
    found = [f"{n} {sys.modules[n].__version__}" for n in names if hasattr(sys.modules.get(n), "__version__")]
    return ", ".join([f"python {platform.python_version()}", *found])


def version():
    """The project's version, which CITATION.cff has, or "unknown" where that is not beside the code."""
    path = HERE / "CITATION.cff"
    found = re.search(r"^version: *(\S+)", path.read_text(), re.M) if path.exists() else None
    return found[1] if found else "unknown"


def code_version():
    """A hash of the code that trains and evaluates, as it is on this machine."""
    digest = hashlib.sha256()
    for pattern in ("*.py", "settings/*.py", "space/*.py", "images/*.py", "training/*.py"):
        for path in sorted(HERE.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def commit(folder=HERE):
    """The git commit of a folder, by default the project's, or "unknown" outside a checkout."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10
        )
        return result.stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"

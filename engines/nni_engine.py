"""The search as an NNI experiment: starts it, watches it, and stops all of its processes, however it ends."""

import atexit
import contextlib
import itertools
import json
import os
import pathlib
import reprlib
import shlex
import signal
import socket
import sys
import time

from engines.heartbeats import forget_heartbeats, read_heartbeats
from engines.machines import NOTICE_S, Connections, MachinesLost, check_machines
from engines.progress import Progress
from engines.search_files import read_state, state_path
from engines.search_record import prepare_search
from engines.trial import lock_folder
from settings.command_line import write_settings
from utils import HERE, POLL_S, Silence, UserError, log, read_yaml, signals, try_lock

PRELOAD = HERE / "engines" / "preload.js"  # loaded into NNI's manager
LOOPBACK = "127.0.0.1", "localhost", "::1"
LISTEN_S = 5  # between looks at the running trials
START_S = 60  # for NNI's manager and for the tuner to start; NNI's own 3 s and 10 s are too few on a busy machine
# NNI's daemon on a machine waits 15 s for a lost manager, and would mistake the next one for it.
FORGET_S = 20


def read_experiment(path):
    """Reads and checks the NNI experiment in a YAML file. Raises UserError that names the file and the entry."""
    forms = {
        "experimentName": str,
        "trialConcurrency": int,
        "trialCommand": str,
        "trialCodeDirectory": str,
        "searchSpaceFile": str,
        "experimentWorkingDirectory": str,
        "tuner": dict,
        "assessor": dict,
        "trainingService": dict,
    }
    experiment = read_yaml(path)
    for key in itertools.chain(forms, experiment):
        if key not in forms:
            raise UserError(f"{path}: unknown entry {reprlib.repr(key)}; known entries: {', '.join(forms)}")
        if not isinstance(experiment.get(key), forms[key]) and (key in experiment or key != "trialConcurrency"):
            value = reprlib.repr(experiment.get(key))
            raise UserError(f"{path}: {key} is {value}, not of type {forms[key].__name__}")
    keys = {"tuner": {"codeDirectory", "className", "classArgs"}, "assessor": {"codeDirectory", "className"}}
    for key, known in keys.items():
        if not known - {"classArgs"} <= experiment[key].keys() <= known:
            raise UserError(f"{path}: {key} has entries other than {', '.join(sorted(known))}")
    service = experiment["trainingService"]
    if service.keys() == {"platform", "machineList"} and service["platform"] == "remote":
        return experiment | {"trainingService": service | {"machineList": check_machines(path, service["machineList"])}}
    if service != {"platform": "local"}:  # refuses trialGpuNumber, for the reason given in config_search.yml
        allowed = "platform: local, or platform: remote with a machineList"
        raise UserError(f"{path}: trainingService is {reprlib.repr(service)}, not just {allowed}")
    return experiment


def check_name(out):
    """Raises UserError if the path of the output folder or of the project is not UTF-8: NNI would misread it."""
    for path in (out, HERE):
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UserError(f"{path}: NNI needs names that are UTF-8; rename it, or use --engine local") from None


def trial_command(experiment, out, settings):
    """The command of a trial as a list of words; its settings go into a file, so that no shell interprets them.

    On other machines the trial runs the code that NNI copies there, with the Python in pythonPath.
    """
    path = state_path(out).with_name("trial.yml")
    write_settings(path, "tester", settings)
    words = shlex.split(experiment["trialCommand"])
    if experiment["trainingService"]["platform"] == "local":
        words = [str(HERE / word) if (HERE / word).is_file() else word for word in words]
        if words[0] in ("python", "python3"):
            words[0] = sys.executable
    return [*words, "--config", str(path)]


def search_with_nni(out, command, experiment, concurrency=1, candidates_per_trial=None, **hosting):
    """Runs the search that `prepare_search` has set up in `out`, as an NNI experiment, to its end.

    `command` is that of a trial, as a list of words; `experiment` is the content of config_search.yml; `hosting` are
    arguments of host_experiment. When a machine of the remote service stops, NNI may wait for it forever, so a new
    experiment resumes the search on the other machines.
    """
    while True:
        config = _nni_config(out, command, experiment, concurrency, candidates_per_trial)
        try:
            return host_experiment(config, out, **hosting)
        except MachinesLost as lost:
            machines = experiment["trainingService"]["machineList"]
            left = [machine for machine in machines if machine not in lost.machines]
            if not left:
                raise UserError(f"{lost}; no machine is left; resume the search with --resume") from None
            log.warning("%s; continuing with the other machines, %d", lost, len(left))
        time.sleep(FORGET_S)
        concurrency = max(1, concurrency * len(left) // len(machines))
        experiment = {**experiment, "trainingService": {"platform": "remote", "machineList": left}}
        before = read_state(out)
        prepare_search(out, before["settings"], resume=True, warnings=before["warnings"])


def _nni_config(out, command, experiment, concurrency, candidates_per_trial):
    """The content of the experiment file, completed for this search."""
    tuner = experiment["tuner"]
    assessor = experiment["assessor"]
    class_args = {"out": str(out), "concurrency": concurrency}
    if candidates_per_trial:
        class_args["candidates_per_trial"] = candidates_per_trial
    return {
        **experiment,
        "trialConcurrency": concurrency,
        "trialCommand": shlex.join(command),
        "trialCodeDirectory": str(HERE / experiment["trialCodeDirectory"]),
        "searchSpaceFile": str(out / experiment["searchSpaceFile"]),
        "experimentWorkingDirectory": str(out / experiment["experimentWorkingDirectory"]),
        "nniManagerIp": "127.0.0.1",
        "tuner": {**tuner, "codeDirectory": str(HERE / tuner["codeDirectory"]), "classArgs": class_args},
        "assessor": {**assessor, "codeDirectory": str(HERE / assessor["codeDirectory"])},
    }


def host_experiment(config, out, host="127.0.0.1", port=None, trial_timeout=300):
    """Starts NNI, waits until the search in `out` is done, and stops all of NNI's processes, however it ends.

    Raises UserError if the search or NNI fails, MachinesLost, and Interrupted. With a custom tuner, NNI reports neither
    the end of a search nor its failure; the state file does.
    """
    try:
        import nni
        import psutil
        import requests
        from nni.experiment import Experiment, ExperimentConfig, RunMode, launcher
    except ImportError as error:
        raise UserError(f"NNI is not installed ({error}): pip install -r requirements.txt") from None

    nni.silence_stdout()
    launcher._check_rest_server.__defaults__ = (START_S, None)  # retries, one a second, and the default of url_prefix
    folder = pathlib.Path(config["experimentWorkingDirectory"])
    if host != "127.0.0.1":
        log.warning("--host %s: anyone who reaches this machine can run commands on it through NNI's web UI", host)
    folder.mkdir(parents=True, exist_ok=True)
    node = {
        "NODE_OPTIONS": f"--require {json.dumps(str(PRELOAD), ensure_ascii=False)}",
        "SPOS_NNI_HOST": host,
        "SPOS_NNI_START_MS": str(START_S * 1000),
    }
    machines = config["trainingService"].get("machineList", [])
    started_with = _environment(without_proxy_here())  # this process, NNI, the tuner and the trials
    with started_with, reserved_port(host, port) as port, Connections(machines, port, folder) as connections:
        me = psutil.Process()
        earlier = set(me.children(recursive=True))
        started = set()
        experiment = Experiment(ExperimentConfig(**config))
        progress = Progress(out)
        try:
            with _environment(node):
                try:
                    experiment.start(port, run_mode=RunMode.Detach)  # this mode writes NNI's output to its log folder
                except Exception as error:
                    logs = folder / experiment.id / "log"
                    raise UserError(f"NNI did not start ({error}); its logs are in {logs}") from None
            log.info("NNI experiment %s, web UI at http://%s:%d", experiment.id, host, port)
            listener = _Listener(out, trial_timeout)
            (manager,) = set(me.children()) - earlier
            while not progress.read()["done"]:
                time.sleep(POLL_S)
                started |= set(me.children(recursive=True)) - earlier
                connections.check()
                _check_alive(progress, manager, folder / experiment.id)
                with contextlib.suppress(requests.RequestException):  # a slow manager is asked again at the next look
                    for job in listener.silent(experiment):
                        log.warning("trial %s gave no heartbeat for %d s: ending it", job, trial_timeout)
                        experiment.kill_trial_job(job)
        except UserError as error:
            connections.check(NOTICE_S)  # a machine that stopped may be the cause, and is noticed some seconds later
            logs = f"; trials' logs are on the machines, in ~/nni-experiments/{experiment.id}"
            raise UserError(
                f"{error}{_last_line(folder / experiment.id)}{logs if connections.machines else ''}"
            ) from None
        finally:
            with signals(signal.SIG_IGN):
                log.info("stopping NNI")
                started |= set(me.children(recursive=True)) - earlier
                if connections.lost():  # NNI would wait for these machines to answer
                    atexit.unregister(experiment.stop)
                else:
                    with contextlib.suppress(Exception):
                        experiment.stop()
                _end_processes(started)
                forget_heartbeats(out)


@contextlib.contextmanager
def _environment(variables):
    """Sets environment variables within the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def without_proxy_here():
    """Environment variables by which clients reach this machine without a proxy, and others as before."""
    found = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    either = found["no_proxy"] or found["NO_PROXY"]
    return {name: ",".join(filter(None, [hosts or either, *LOOPBACK])) for name, hosts in found.items()}


@contextlib.contextmanager
def reserved_port(host, port=None):
    """Reserves `port`, or the first free one from 8080, among the searches of this user within the block.

    Without the lock, two searches that start at once find the same port free; the one that fails would then stop the
    other's NNI. Raises UserError if the port is taken.
    """
    for candidate in [port] if port else range(8080, 8180):
        if lock := try_lock(lock_folder() / f"port-{candidate}.lock"):
            with lock:
                if _is_free(host, candidate):
                    yield candidate
                    return
    if port:
        raise UserError(f"--port {port}: is taken; name another one, or none")
    raise UserError("--port: 8080 to 8179 are all taken; name another one")


def _is_free(host, port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _check_alive(progress, manager, folder):
    """Raises UserError if NNI's manager or the tuner has ended."""
    import psutil

    advice = f"; its logs are in {folder / 'log'}; resume the search with --resume"
    if not manager.is_running() or manager.status() == psutil.STATUS_ZOMBIE:
        raise UserError(f"NNI's manager ended unexpectedly{advice}")
    tuner = progress.state["pid"]  # this process until the tuner has started
    if not psutil.pid_exists(tuner) or (tuner == os.getpid() and time.monotonic() - progress.changed > START_S):
        raise UserError(f"NNI's tuner ended or did not start{advice}")


def _last_line(folder):
    """The last line on standard error of the latest trial that wrote any."""
    logs = folder.glob("environments/*/trials/*/trial.stderr")
    for path in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True):
        if lines := path.read_text(errors="replace").strip().splitlines():
            return f"; the last output of a trial: {lines[-1][:300]} ({path})"
    return ""


class _Listener:
    """Finds trials that hang: those that give no heartbeat for `trial_timeout` seconds.

    The tuner sends the candidates of a trial that was ended to other trials.
    """

    def __init__(self, out, trial_timeout):
        self.out = out
        self.trial_timeout = trial_timeout
        self.next_look = 0.0
        self.silence = Silence()

    def silent(self, experiment):
        """The running trials that hang."""
        now = time.monotonic()
        if now < self.next_look:
            return []
        self.next_look = now + min(LISTEN_S, self.trial_timeout / 4)
        running = [job.trialJobId for job in experiment.list_trial_jobs() if job.status == "RUNNING"]
        heartbeats = read_heartbeats(self.out)
        return [job for job in running if self.silence.seconds(job, heartbeats.get(job)) > self.trial_timeout]


def _end_processes(processes):
    """Terminates the processes that still run, and kills those left after ten seconds."""
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=10)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()

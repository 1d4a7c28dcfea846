"""The search as an NNI experiment: started, watched, and ended with all that belongs to it, however it ends."""

import atexit
import contextlib
import json
import os
import pathlib
import shlex
import signal
import socket
import sys
import time

from engines.machines import NOTICE_S, Connections, MachinesLost
from engines.progress import Progress
from engines.search_record import prepare_search, state_path
from evolution_tuner import EVOLUTION
from utils import HERE, UserError, log, signals, write_settings

POLL_S = 0.5
START_S = 60
FORGET_S = (
    20  # NNI's daemon on a machine looks for a manager that it lost for 15 s, and would take the next one's for it
)

# Loaded into NNI's Node process: its web server, which knows no password, would listen on every interface, it would
# outlive a killed search.py, it would wait 10 s for the tuner, too few on a busy machine, and then hang, and it would keep
# two files of every trial open.
PRELOAD = """
const net = require('net');
const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (first, ...rest) {
    const callbacks = rest.filter((argument) => typeof argument === 'function');
    if (typeof first === 'number' || /^[0-9]+$/.test(first)) {
        return listen.call(this, {port: Number(first), host: HOST}, ...callbacks);
    }
    if (first && typeof first === 'object' && first.port !== undefined) {
        return listen.call(this, {...first, host: HOST}, ...rest);
    }
    return listen.call(this, first, ...rest);
};
const timer = global.setTimeout;
global.setTimeout = (callback, ms, ...rest) => timer(callback, ms === 10000 ? START_MS : ms, ...rest);
Object.defineProperties(global.setTimeout, Object.getOwnPropertyDescriptors(timer));
const children = require('child_process');
const spawn = children.spawn;
children.spawn = function (...words) {
    const child = spawn.apply(this, words);
    const stdio = words[words.length - 1]?.stdio;
    (Array.isArray(stdio) ? stdio : []).forEach((stream) => stream?.destroy?.());
    return child;
};
const parent = process.ppid;
setInterval(() => { if (process.ppid !== parent) process.kill(process.pid, 'SIGTERM'); }, 500).unref();
"""


def trial_command(experiment, out, settings):
    """The command of a trial as a list of words; its settings go into a file, so that none passes through a shell.

    On other machines it is that of the code that NNI brings there and of the Python of pythonPath.
    """
    path = state_path(out).with_name("trial.yml")
    write_settings(path, "tester", settings)
    words = shlex.split(experiment["trialCommand"])
    if experiment["trainingService"]["platform"] == "local":
        words = [str(HERE / word) if (HERE / word).is_file() else word for word in words]
        if words[0] in ("python", "python3"):
            words[0] = sys.executable
    return [*words, "--config", str(path)]


def search_with_nni(space, command, settings, out, experiment, concurrency=1, candidates_per_trial=None, **hosting):
    """Runs the search that `prepare_search` made `out` ready for as an NNI experiment, to its end.

    `command` is that of a trial, a list of words; `experiment` is config_search.yml's content; for `hosting` see host_experiment.
    Where a machine of the remote service stops, NNI may wait for it for ever: a new experiment goes on with the others.
    """
    while True:
        config = _nni_config(space, command, settings, out, experiment, concurrency, candidates_per_trial)
        try:
            return host_experiment(config, out, **hosting)
        except MachinesLost as lost:
            machines = experiment["trainingService"]["machineList"]
            left = [machine for machine in machines if machine not in lost.machines]
            if not left:
                raise UserError(f"{lost}; no machine is left; go on with --resume") from None
            log.warning("%s; going on with the other machines, %d", lost, len(left))
        time.sleep(FORGET_S)
        candidates_per_trial = candidates_per_trial or -(
            -settings["population"] // concurrency
        )  # the time limit of a trial goes by it
        concurrency = max(1, concurrency * len(left) // len(machines))
        experiment = {**experiment, "trainingService": {"platform": "remote", "machineList": left}}
        prepare_search(out, settings, resume=True)


def _nni_config(space, command, settings, out, experiment, concurrency, candidates_per_trial):
    """The experiment file's content with all that this search adds to it."""
    evolution = {name: settings[name] for name in EVOLUTION}
    own = {
        "out": str(out),
        "space": space.to_dict(),
        "flops_limit": settings["flops_limit"],
        "concurrency": concurrency,
    }
    if settings.get("costs"):
        own["costs"] = settings["costs"]
    if candidates_per_trial:
        own["candidates_per_trial"] = candidates_per_trial
    return {
        **experiment,
        "trialConcurrency": concurrency,
        "trialCommand": shlex.join(command),
        "trialCodeDirectory": str(HERE / experiment["trialCodeDirectory"]),
        "searchSpaceFile": str(out / experiment["searchSpaceFile"]),
        "experimentWorkingDirectory": str(out / experiment["experimentWorkingDirectory"]),
        "nniManagerIp": "127.0.0.1",
        "tuner": {
            **experiment["tuner"],
            "codeDirectory": str(HERE / experiment["tuner"]["codeDirectory"]),
            "classArgs": {**own, **evolution},
        },
        "assessor": {**experiment["assessor"], "codeDirectory": str(HERE / experiment["assessor"]["codeDirectory"])},
    }


def host_experiment(config, out, host="127.0.0.1", port=None, trial_timeout=21_600):
    """Starts NNI, waits until the search in `out` is done, and leaves nothing of NNI running, however it ends.

    Raises UserError where the search or NNI fails, MachinesLost, and Interrupted. NNI itself tells neither when a search of
    its own tuner is done nor that it failed: the state file does.
    """
    try:
        import nni
        import psutil
        from nni.experiment import Experiment, ExperimentConfig, RunMode, launcher
    except ImportError as error:
        raise UserError(f"NNI is not there ({error}): pip install -r requirements.txt") from None

    nni.silence_stdout()
    launcher._check_rest_server.__defaults__ = (
        START_S,
        None,
    )  # of its own accord NNI gives its manager 3 s, too few on a busy machine
    folder = pathlib.Path(config["experimentWorkingDirectory"])
    port = free_port(host, port)
    if host != "127.0.0.1":
        log.warning("--host %s: anyone who reaches this machine can run commands on it through NNI's web UI", host)
    folder.mkdir(parents=True, exist_ok=True)
    preload = folder / "preload.js"
    preload.write_text(f"const HOST = {json.dumps(host)}, START_MS = {START_S * 1000};{PRELOAD}")
    with Connections(config["trainingService"].get("machineList", []), port, folder) as connections:
        me = psutil.Process()
        earlier, started = set(me.children(recursive=True)), set()
        experiment, progress = Experiment(ExperimentConfig(**config)), Progress(out)
        try:
            with _environment(NODE_OPTIONS=f"--require {json.dumps(str(preload), ensure_ascii=False)}"):
                try:
                    experiment.start(port, run_mode=RunMode.Detach)  # which has NNI's output in its log folder
                except Exception as error:
                    raise UserError(
                        f"NNI did not start ({error}); its logs are in {folder / experiment.id / 'log'}"
                    ) from None
            log.info("NNI experiment %s, web UI at http://%s:%d", experiment.id, host, port)
            (manager,) = set(me.children()) - earlier
            while not progress.read()["done"]:
                time.sleep(POLL_S)
                started |= set(me.children(recursive=True)) - earlier
                connections.check()
                _check_alive(progress, manager, folder / experiment.id)
                if progress.idle_s > trial_timeout:
                    _end_trials(experiment, progress, trial_timeout)
        except UserError as error:
            connections.check(NOTICE_S)  # a machine that stops may be why, and takes some seconds to be missed
            on_machines = (
                f"; what trials said is on the machines, in ~/nni-experiments/{experiment.id}"
                if connections.machines
                else ""
            )
            raise UserError(f"{error}{_last_words(folder / experiment.id)}{on_machines}") from None
        finally:
            with signals(signal.SIG_IGN):
                log.info("stopping NNI")
                started |= set(me.children(recursive=True)) - earlier
                if connections.lost():  # NNI would wait for their answer
                    atexit.unregister(experiment.stop)
                else:
                    with contextlib.suppress(Exception):
                        experiment.stop()
                _end_processes(started)


@contextlib.contextmanager
def _environment(**variables):
    """Sets environment variables for a while."""
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


def free_port(host, port=None):
    """`port`, or the first free one from 8080. Raises UserError where it is taken."""
    for candidate in [port] if port else range(8080, 8180):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, candidate))
            return candidate
    raise UserError(
        f"--port {port}: is taken; name another one, or none"
        if port
        else "--port: 8080 to 8179 are all taken; name another one"
    )


def _check_alive(progress, manager, folder):
    """Raises UserError where NNI's manager or our tuner has ended."""
    import psutil

    if not manager.is_running() or manager.status() == psutil.STATUS_ZOMBIE:
        raise UserError(f"NNI's manager ended by itself; its logs are in {folder / 'log'}; go on with --resume")
    tuner = progress.state["pid"]
    if not psutil.pid_exists(tuner) or (tuner == os.getpid() and progress.idle_s > 60):
        raise UserError(f"NNI's tuner ended, or never began; its logs are in {folder / 'log'}; go on with --resume")


def _last_words(folder):
    """The last line that the latest trial with anything to say wrote to its standard error."""
    for path in sorted(
        folder.glob("environments/*/trials/*/trial.stderr"), key=lambda path: path.stat().st_mtime, reverse=True
    ):
        if lines := path.read_text(errors="replace").strip().splitlines():
            return f"; the last that a trial said: {lines[-1][:300]} ({path})"
    return ""


def _end_trials(experiment, progress, trial_timeout):
    """Ends trials that hang; the tuner sends their candidates to other ones."""
    running = [job.trialJobId for job in experiment.list_trial_jobs() if job.status == "RUNNING"]
    log.warning("no result for %d s: ending the running trials, %s", trial_timeout, ", ".join(running) or "none")
    for job in running:
        experiment.kill_trial_job(job)
    progress.changed = time.monotonic()


def _end_processes(processes):
    """Ends what is left of these processes: ten seconds to do it themselves, then by force."""
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=10)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()

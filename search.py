"""Searches the supernet for the best candidate under a FLOPs limit, by evolution, with NNI running the trials.

    python tester.py --mode gen                writes the search space that this needs
    python search.py                           the official search, 20 generations of 50, of the newest supernet
    python search.py --demo                    the bundled images, 5 generations of 16
    python search.py --resume                  goes on with a search that was interrupted, by whatever

Reads OUT/checkpoints/supernet (newest) or --checkpoint, OUT/nni_auto_gen_search_space.json and config_search.yml, the NNI
experiment. Writes OUT/checkpoints/GGG_III.json (architectures, III the rank in generation GGG), OUT/acc/GGG.jsonl (a line a
candidate), OUT/id2cand/GGG.json (trial id -> what it evaluated), OUT/checkpoints/best.json, OUT/report.html, OUT/figures/, and
state, logs and NNI's own files in OUT/checkpoints/search/. Prints the ten best, and the command that retrains the winner.
Source: paper section 3.4; official `src/Search/search.py`.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shlex
import signal
import socket
import sys
import time

import checkpoint
from dataset import DataConfig
from evolution_tuner import Evolution
from report import write_report
from search_record import Progress, hold_lock, prepare_search, read_results, state_path
from search_space import SearchSpace
from utils import (
    HERE,
    Parser,
    UserError,
    add_checkpoint_flag,
    add_data_flags,
    add_evaluation_flags,
    add_run_flags,
    cores,
    count,
    log,
    output_folder,
    read_json,
    read_yaml,
    real,
    run_script,
    start_logging,
    write_settings,
)

EVOLUTION = ("population", "select", "mutation", "crossover", "mutation_prob", "generations", "seed")
POLL_S = 0.5
OFFICIAL_LIMIT = "330M", "59%"  # at 224 px and 1000 classes; elsewhere the share of candidates that lies under it there

# Loaded into NNI's Node process: its web server, which knows no password, would listen on every interface, and it would
# outlive a killed search.py.
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
const parent = process.ppid;
setInterval(() => { if (process.ppid !== parent) process.kill(process.pid, 'SIGTERM'); }, 500).unref();
"""


class Interrupted(BaseException):
    """SIGINT or SIGTERM; no Exception, for NNI swallows those in places."""


def shared_parser():
    """The flags that a trial takes as well."""
    parser = Parser(__doc__, "search")
    add_run_flags(parser)
    add_data_flags(parser)
    add_checkpoint_flag(parser, "supernet")
    add_evaluation_flags(parser)
    return parser


def parse_args(argv=None):
    parser = shared_parser()
    group = parser.add_argument_group("search")
    group.add_argument("--population", type=count(1, 100_000), help="candidates a generation (50)")
    group.add_argument("--select", type=count(1, 100_000), help="parents: the best so far (10)")
    group.add_argument("--mutation", type=count(0, 100_000), help="children by mutation a generation (25)")
    group.add_argument("--crossover", type=count(0, 100_000), help="children by crossover a generation (25)")
    group.add_argument("--mutation-prob", type=real(0, 1), help="of each block to be drawn anew (0.1)")
    group.add_argument("--generations", type=count(1, 1_000_000), help="populations to evaluate (20)")
    group.add_argument("--flops-limit", metavar="FLOPS", help="330000000, 330M, or a share of all candidates (330M, elsewhere than at 224 px 59%%)")
    group.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False, help="go on with the search in OUT")
    group = parser.add_argument_group("NNI")
    group.add_argument("--concurrency", type=count(1, 1000), help="trials at a time (config_search.yml)")
    group.add_argument("--candidates-per-trial", type=count(1, 100_000), metavar="N", help="default: a generation over --concurrency")
    group.add_argument("--trial-timeout", type=count(1), default=21_600, metavar="S", help="seconds without a result that end trials (21600)")
    group.add_argument("--port", type=count(1, 65534), help="of the web UI (default: the first free one from 8080)")
    group.add_argument("--host", choices=("127.0.0.1", "0.0.0.0"), default="127.0.0.1", help="0.0.0.0 opens the web UI to the network")
    parser.set_defaults(**experiment_defaults(parser, HERE / "config_search.yml"))
    return parser.parse(argv)


def experiment_defaults(parser, path):
    """The flags that the experiment file sets: classArgs and trialConcurrency."""
    experiment = read_experiment(path)
    values = {"concurrency": experiment["trialConcurrency"], **experiment["tuner"].get("classArgs", {})}
    parser.source = f"{path}: "
    args = parser.parse_args([f"--{key.replace('_', '-')}={value}" for key, value in values.items()])
    parser.source = ""
    return {key: getattr(args, key) for key in values}


def read_experiment(path):
    """The NNI experiment in a YAML file, checked. Raises UserError that names the file and the entry."""
    text, mapping = (str,), (dict,)
    forms = {
        "experimentName": text, "trialConcurrency": (int,), "trialCommand": text, "trialCodeDirectory": text, "searchSpaceFile": text,
        "experimentWorkingDirectory": text, "tuner": mapping, "assessor": mapping, "trainingService": mapping,
    }  # fmt: skip
    experiment = read_yaml(path)
    for key in itertools.chain(forms, experiment):
        if key not in forms:
            raise UserError(f"{path}: unknown entry {key!r}; those of this search are {', '.join(forms)}")
        if not isinstance(experiment.get(key), forms[key]):
            raise UserError(f"{path}: {key} is {experiment.get(key)!r}, not of type {forms[key][0].__name__}")
    keys = {"tuner": {"codeDirectory", "className", "classArgs"}, "assessor": {"codeDirectory", "className"}}
    for key, known in keys.items():
        if not known - {"classArgs"} <= experiment[key].keys() <= known:
            raise UserError(f"{path}: {key} has entries other than {', '.join(sorted(known))}")
    if experiment["trainingService"] != {"platform": "local"}:  # trialGpuNumber among it, for the reason that the file gives
        raise UserError(f"{path}: trainingService is {experiment['trainingService']!r}, not platform: local alone")
    return experiment


def flops_limit(text, space):
    """The limit in multiply-adds, of the flag's text or the default."""
    official, share = OFFICIAL_LIMIT
    if text is None:
        text = official if space == SearchSpace() else share
    return space.flops_value(text)


def check_space_file(path, space):
    """Raises UserError where the generated search space is missing or another one."""
    if not path.exists() or read_json(path) != space.nni_search_space():
        what = "is another search space than the checkpoint's" if path.exists() else "is missing"
        raise UserError(f"{path} {what}: run python tester.py --mode gen --out {path.parent}")


def trial_command(words, args, out, supernet_path):
    """The command of a trial as a list of words; its settings go into a file, so that none passes through a shell."""
    settings = {name: getattr(args, name) for name in vars(shared_parser().parse_args([])) }
    settings |= {"checkpoint": str(supernet_path), "out": str(out)}
    settings["threads"] = args.threads or max(1, cores() // args.concurrency)
    path = state_path(out).with_name("trial.yml")
    write_settings(path, "tester", settings)
    words = [str(HERE / word) if (HERE / word).is_file() else word for word in words]
    if words[0] in ("python", "python3"):
        words[0] = sys.executable
    return [*words, "--config", str(path)]


# --- NNI -----------------------------------------------------------------------------------------------------


def search_with_nni(space, command, settings, out, experiment, concurrency=1, candidates_per_trial=None, **hosting):
    """Runs the search that `prepare_search` made `out` ready for as an NNI experiment, to its end.

    `command` is that of a trial, a list of words; `experiment` is config_search.yml's content; for `hosting` see host_experiment.
    """
    evolution = {name: settings[name] for name in EVOLUTION}
    own = {"out": str(out), "space": space.to_dict(), "flops_limit": settings["flops_limit"], "concurrency": concurrency}
    if candidates_per_trial:
        own["candidates_per_trial"] = candidates_per_trial
    experiment = {
        **experiment,
        "trialConcurrency": concurrency,
        "trialCommand": shlex.join(command),
        "trialCodeDirectory": str(HERE / experiment["trialCodeDirectory"]),
        "searchSpaceFile": str(out / experiment["searchSpaceFile"]),
        "experimentWorkingDirectory": str(out / experiment["experimentWorkingDirectory"]),
        "tuner": {
            **experiment["tuner"],
            "codeDirectory": str(HERE / experiment["tuner"]["codeDirectory"]),
            "classArgs": {**own, **evolution},
        },
        "assessor": {**experiment["assessor"], "codeDirectory": str(HERE / experiment["assessor"]["codeDirectory"])},
    }
    host_experiment(experiment, out, **hosting)


def host_experiment(config, out, host="127.0.0.1", port=None, trial_timeout=21_600):
    """Starts NNI, waits until the search in `out` is done, and leaves nothing of NNI running, however it ends.

    Raises UserError where the search or NNI fails, and Interrupted. NNI itself tells neither when a search of its own tuner
    is done nor that it failed: the state file does.
    """
    try:
        import nni
        import psutil
        from nni.experiment import Experiment, ExperimentConfig, RunMode
    except ImportError as error:
        raise UserError(f"NNI is not there ({error}): pip install -r requirements.txt") from None

    nni.silence_stdout()
    folder = pathlib.Path(config["experimentWorkingDirectory"])
    port = free_port(host, port)
    if host != "127.0.0.1":
        log.warning("--host %s: anyone who reaches this machine can run commands on it through NNI's web UI", host)
    folder.mkdir(parents=True, exist_ok=True)
    preload = folder / "preload.js"
    preload.write_text(f"const HOST = {json.dumps(host)};{PRELOAD}")
    me = psutil.Process()
    earlier, started = set(me.children(recursive=True)), set()
    experiment, progress = Experiment(ExperimentConfig(**config)), Progress(out)
    handlers = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _environment(NODE_OPTIONS=f"--require {json.dumps(str(preload), ensure_ascii=False)}"):
            try:
                experiment.start(port, run_mode=RunMode.Detach)  # which has NNI's output in its log folder
            except Exception as error:
                raise UserError(f"NNI did not start ({error}); its logs are in {folder / experiment.id / 'log'}") from None
        log.info("NNI experiment %s, web UI at http://%s:%d", experiment.id, host, port)
        (manager,) = set(me.children()) - earlier
        while not progress.read()["done"]:
            time.sleep(POLL_S)
            started |= set(me.children(recursive=True)) - earlier
            _check_alive(progress, manager, folder / experiment.id)
            if progress.idle_s > trial_timeout:
                _end_trials(experiment, progress, trial_timeout)
    except UserError as error:
        raise UserError(f"{error}{_last_words(folder / experiment.id)}") from None
    finally:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)  # nothing is to interrupt this
        log.info("stopping NNI")
        started |= set(me.children(recursive=True)) - earlier
        with contextlib.suppress(Exception):
            experiment.stop()
        _end_processes(started)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _interrupt(number, _frame):
    raise Interrupted(number)


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
    raise UserError(f"--port {port}: is taken; name another one, or none" if port else "--port: 8080 to 8179 are all taken; name another one")


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
    for path in sorted(folder.glob("environments/*/trials/*/trial.stderr"), key=lambda path: path.stat().st_mtime, reverse=True):
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


# --- the script ----------------------------------------------------------------------------------------------


def report(results, config, args, out):
    """Prints the ten best and the command that retrains the best one, and returns that one's result."""
    ranked = sorted((r for r in results if r["acc1"] is not None), key=lambda r: (r["acc1"], r["acc5"]), reverse=True)
    failed = len(results) - len(ranked)
    if not ranked:
        raise UserError(f"none of {failed} candidates could be evaluated; the trials' errors are below {state_path(out).parent}")
    print(f"{len(ranked)} candidates evaluated" + (f", {failed} failed" if failed else ""))
    print("rank  top-1 %  top-5 %  MFLOPs  architecture")
    for rank, result in enumerate(ranked[:10], 1):
        numbers = f"{rank:4}  {result['acc1']:7.2f}  {result['acc5']:7.2f}  {result['flops'] / 1e6:6.1f}"
        print(f"{numbers}  {' '.join(map(str, result['architecture']))}")
    words = ["python", "scratch.py", "--architecture", os.path.join(args.out, "checkpoints", "best.json")]
    if args.demo:
        words.append("--demo")
    elif args.config:
        words += ["--config", args.config]
    else:
        words += ["--data-dir", args.data_dir]
        for name in ("input_size", "val_resize", "preprocessing", "crop_scale", "crop_ratio", "jitter"):
            value = getattr(config, name)
            if value != getattr(DataConfig(), name):
                words += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
        words += ["--no-mirror"] * (not config.mirror)
    if args.out != ".":
        words += ["--out", args.out]
    print(f"retrain the best:\n  {shlex.join(words)}")
    return ranked[0]


def search(args, out):
    """The search of the arguments, from its checks to its report; returns the best candidate's result."""
    experiment = read_experiment(HERE / "config_search.yml")
    _, stored, config, data = checkpoint.open_supernet(args)
    check_space_file(out / experiment["searchSpaceFile"], stored.space)
    with open(stored.path, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    evolution = {name: getattr(args, name) for name in EVOLUTION}
    limit = flops_limit(args.flops_limit, stored.space)
    Evolution(stored.space.choices_per_block, stored.space.flops, limit, **evolution)  # says what is wrong with the numbers
    settings = {
        **evolution, "flops_limit": limit, "space": stored.space.to_dict(), "checkpoint": weights, "data": config.to_dict(),
        "split": data.split, "bn": args.bn, "bn_batches": args.bn_batches, "bn_batch_size": args.bn_batch_size,
    }  # fmt: skip
    state = prepare_search(out, settings, args.resume)
    start_logging(out / "checkpoints" / "search", args, args.device)
    log.info("FLOPs limit %.2fM; %d candidates evaluated already", limit / 1e6, state["evaluated"])
    if not state["done"]:
        command = trial_command(shlex.split(experiment["trialCommand"]), args, out, stored.path)
        try:
            search_with_nni(
                stored.space, command, settings, out, experiment, args.concurrency, args.candidates_per_trial,
                host=args.host, port=args.port, trial_timeout=args.trial_timeout,
            )  # fmt: skip
        except Interrupted as error:
            words = [word for word in sys.argv[1:] if word not in ("--resume", "--no-resume")]
            again = shlex.join(["python", "search.py", *words, "--resume"])
            log.warning("stopped by %s; go on with: %s", signal.Signals(error.args[0]).name, again)
            sys.exit(128 + error.args[0])
    best = report(read_results(out), config, args, out)
    log.info("report: %s", write_report(out))
    return best


def main(args):
    out = output_folder(args.out).resolve()
    with hold_lock(state_path(out).with_name("search.lock")):
        return search(args, out)


if __name__ == "__main__":
    run_script(main, parse_args)

"""Searches the supernet for the best candidate under a FLOPs limit, by evolution; trials run with NNI or without it.

    python tester.py --mode gen                writes the search space that this needs
    python search.py                           the official search, 20 generations of 50, of the newest supernet
    python search.py --demo                    the bundled images, 5 generations of 16
    python search.py --engine local            without NNI
    python search.py --resume                  resumes a search that was interrupted in any way
    python search.py --experiment config_search_remote.yml     on the machines in this file

Reads OUT/checkpoints/supernet (newest) or --checkpoint, OUT/nni_auto_gen_search_space.json and the NNI experiment,
config_search.yml or --experiment. Writes OUT/checkpoints/GGG_III.json (the architecture of rank III of generation GGG),
OUT/acc/GGG.jsonl (a line for each candidate), OUT/id2cand/GGG.json (trial id -> what it evaluated),
OUT/checkpoints/best.json, OUT/report.html and OUT/figures/; state, logs and NNI's own files in OUT/checkpoints/search/.
Prints the ten best, and the command that retrains the winner.
Source: paper section 3.4; official `src/Search/search.py`.
"""

import argparse
import dataclasses
import hashlib
import itertools
import os
import reprlib
import shlex
import signal
import sys

from command_line import (
    Parser,
    add_checkpoint_flag,
    add_data_flags,
    add_evaluation_flags,
    add_operations_flag,
    add_run_flags,
    command,
    count,
    real,
)
from dataloader import MAX_WORKERS, resolve_backend
from distributed import gpu_count
from engines.local_engine import search_locally
from engines.machines import check_keys, check_machines
from engines.nni_engine import search_with_nni, trial_command
from engines.search_record import EVOLUTION, images_path, prepare_search, ranked, read_results, state_path
from evolution_tuner import Evolution, official_shares
from images.dataset import Data
from reports.page import write_report
from space.flops_table import comparison, official_comparison, read_flops_table, with_flops_table
from space.search_space import SearchSpace
from training import checkpoint
from training.evaluation import NO_GPU
from utils import (
    HERE,
    Interrupted,
    UserError,
    cores,
    hold_lock,
    interrupt,
    log,
    output_folder,
    read_json,
    read_yaml,
    run_script,
    signals,
    start_logging,
)

# At 224 px and 1000 classes, and the share of candidates that it admits there: the limit in all other search spaces.
OFFICIAL_LIMIT = "330M", "59%"


def shared_parser():
    """The flags that a trial has too."""
    parser = Parser(__doc__, "search")
    add_run_flags(parser)
    add_data_flags(parser)
    add_checkpoint_flag(parser, "supernet")
    add_operations_flag(parser)
    add_evaluation_flags(parser)
    return parser


def parse_args(argv=None):
    parser = shared_parser()
    group = parser.add_argument_group("search")
    group.add_argument("--population", type=count(1, 100_000), default=50, help="candidates a generation (50)")
    group.add_argument("--select", type=count(1, 100_000), help="parents: this many of the best so far (a fifth)")
    group.add_argument("--mutation", type=count(0, 100_000), help="children by mutation a generation (half)")
    group.add_argument("--crossover", type=count(0, 100_000), help="children by crossover a generation (half)")
    group.add_argument("--mutation-prob", type=real(0, 1), default=0.1, help="of redrawing each block (0.1)")
    group.add_argument("--generations", type=count(1, 1_000_000), default=20, help="populations to evaluate (20)")
    group.add_argument(
        "--flops-limit",
        metavar="FLOPS",
        help="330000000, 330M, or a share of all candidates (330M, elsewhere than at 224 px 59%%)",
    )
    group.add_argument(
        "--flops-table",
        metavar="FILE",
        help="costs in the form of the official op_flops_dict.pkl (default: counted from the shapes)",
    )
    group.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=False, help="resume the search in OUT"
    )
    group.add_argument(
        "--engine", choices=("nni", "local"), default="nni", help="what runs the evaluations (default: nni)"
    )
    group.add_argument(
        "--concurrency",
        type=count(1, 1000),
        help="trials at a time (that of the experiment file, else one a GPU, or one a remote machine)",
    )
    group.add_argument(
        "--candidates-per-trial",
        type=count(1, 100_000),
        metavar="N",
        help="default: a generation is split over the trials at a time",
    )
    group = parser.add_argument_group("NNI")
    group.add_argument(
        "--experiment",
        default=str(HERE / "config_search.yml"),
        metavar="FILE",
        help="the NNI experiment (config_search.yml)",
    )
    group.add_argument(
        "--trial-timeout",
        type=count(1),
        default=300,
        metavar="S",
        help="seconds without a sign of life after which a trial is ended (300)",
    )
    group.add_argument("--port", type=count(1, 65534), help="of the web UI (default: the first free one from 8080)")
    group.add_argument(
        "--host", choices=("127.0.0.1", "0.0.0.0"), default="127.0.0.1", help="0.0.0.0 opens the web UI to the network"
    )
    args = parser.parse(argv)
    if args.engine == "local":
        parser.refuse("--engine local", "host", "port")
    defaults = experiment_defaults(parser, args.experiment)
    if "population" in parser.given:  # the experiment's numbers are shares of another population
        defaults = {k: v for k, v in defaults.items() if k not in ("select", "mutation", "crossover")}
    args = parser.parse(argv, defaults)
    args.concurrency = args.concurrency or default_concurrency(args)
    args.select, args.mutation, args.crossover = official_shares(
        args.population, args.select, args.mutation, args.crossover
    )
    return args


def default_concurrency(args):
    """A trial a GPU of this machine, or a trial a remote machine, whose GPUs are not known here."""
    machines = read_experiment(args.experiment)["trainingService"].get("machineList") if args.engine == "nni" else None
    return len(machines) if machines else max(1, gpu_count() if args.device != "cpu" else 0)


def experiment_defaults(parser, path):
    """The flags that the experiment file sets: classArgs and trialConcurrency."""
    experiment = read_experiment(path)
    settings = experiment["tuner"].get("classArgs", {})
    if "trialConcurrency" in experiment:
        settings = {"concurrency": experiment["trialConcurrency"], **settings}
    return parser.check_settings(path, "classArgs", {key.replace("_", "-"): value for key, value in settings.items()})


def read_experiment(path):
    """The NNI experiment in a YAML file, checked. Raises UserError that names the file and the entry."""
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
            raise UserError(f"{path}: unknown entry {reprlib.repr(key)}; those of this search are {', '.join(forms)}")
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
        allowed = "platform: local alone, nor platform: remote with machineList alone"
        raise UserError(f"{path}: trainingService is {reprlib.repr(service)}, not {allowed}")
    return experiment


def flops_limit(text, space):
    """The limit in multiply-adds, from the flag's text or the default."""
    official, share = OFFICIAL_LIMIT
    if text is None:
        text = official if space.is_papers else share
    return space.flops_value(text, "--flops-limit")


def check_space_file(path, space):
    """Raises UserError where the generated search space is missing or not the supernet's."""
    if not path.exists() or read_json(path) != space.nni_search_space():
        what = "is another search space than the checkpoint's" if path.exists() else "is missing"
        raise UserError(f"{path} {what}: run python tester.py --mode gen --out {path.parent}")


def trial_settings(args, out, supernet_path):
    """The flags of a trial: those of this search, with a share of the cores."""
    settings = {name: getattr(args, name) for name in vars(shared_parser().parse_args([]))}
    share = max(1, cores() // args.concurrency)
    workers = min(MAX_WORKERS, share) if args.workers is None else args.workers
    settings |= {"threads": args.threads or share, "workers": workers}
    return settings | {"checkpoint": str(supernet_path), "out": str(out)}


@dataclasses.dataclass
class Search:
    """What a search runs with, checked."""

    experiment: dict  # the content of the experiment file
    supernet: str  # path of its checkpoint
    space: SearchSpace  # with the costs of --flops-table
    costs: str  # a line for the log about the space's FLOPs, or nothing
    warnings: list  # what speaks against trusting the results, a line each
    settings: dict  # what determines the results: a search can only be resumed with the same
    data: Data  # the images


def check(args, out):
    """Checks the arguments and all that they name; returns the Search."""
    experiment = read_experiment(args.experiment)
    machines = experiment["trainingService"].get("machineList", [])
    if args.engine == "nni":
        check_keys(args.experiment, machines)
    if args.device == "cuda" and (args.engine == "local" or not machines) and not gpu_count():
        raise UserError(NO_GPU)  # trials initialise CUDA, this process does not
    table = args.flops_table and read_flops_table(args.flops_table)
    _, supernet, config, data = checkpoint.open_supernet(args)
    warnings = data.warnings + list(filter(None, [checkpoint.unfinished(supernet)]))
    space, costs = supernet.space, official_comparison(SearchSpace())
    if table:
        space, differences = with_flops_table(space, table, args.flops_table)
        costs = comparison(differences, args.flops_table)
    check_space_file(out / experiment["searchSpaceFile"], space)
    with open(supernet.path, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    settings = {
        **{name: getattr(args, name) for name in EVOLUTION},
        "flops_limit": flops_limit(args.flops_limit, space),
        "space": space.to_dict(),
        "checkpoint": weights,
        "data": config.to_dict(),
        "split": data.split,
        "bn": args.bn,
        "bn_batches": args.bn_batches,
        "bn_batch_size": args.bn_batch_size,
        "eval_amp": args.eval_amp,
        "loader": resolve_backend(args.loader),
        "costs": table and [space.choice_flops, space.fixed_flops],
    }
    if space.operations_hash:  # for the report, which has no modules to count
        settings["counted"] = space.costs
    Evolution.from_settings(space, settings)  # raises where the settings allow no search
    return Search(experiment, supernet.path, space, costs, warnings, settings, data)


def prepare(search, args, out):
    """Writes or checks the state file, and starts the log; returns whether the search is done already."""
    state = prepare_search(out, search.settings, args.resume, search.warnings)
    start_logging(out / "checkpoints" / "search", args, args.device)
    if search.costs:
        log.info(search.costs)
    for text in search.warnings:
        log.warning("warning: %s", text)
    if args.loader != "synthetic":
        search.data.write_list(images_path(out))
    limit = search.settings["flops_limit"] / 1e6
    log.info("FLOPs limit %.2fM; %d candidates evaluated already", limit, state["evaluated"])
    return state["done"]


def run(search, args, out):
    """Runs the search on its engine to its end; exits with 128 + the signal's number where one interrupts it."""
    space, settings, experiment = search.space, search.settings, search.experiment
    trial = trial_settings(args, out, search.supernet)
    sizes = {"concurrency": args.concurrency, "candidates_per_trial": args.candidates_per_trial}
    sizes["trial_timeout"] = args.trial_timeout
    try:
        with signals(interrupt):
            if args.engine == "local":
                search_locally(space, settings, out, trial, **sizes)
            else:
                command = trial_command(experiment, out, trial)
                hosting = {"host": args.host, "port": args.port}
                search_with_nni(space, command, settings, out, experiment, **sizes, **hosting)
    except Interrupted as error:
        words = [word for word in sys.argv[1:] if word not in ("--resume", "--no-resume")]
        again = shlex.join(["python", "search.py", *words, "--resume"])
        log.warning("stopped by %s; resume with: %s", signal.Signals(error.args[0]).name, again)
        sys.exit(128 + error.args[0])


def report(results, space, args, out):
    """Prints the ten best and the command that retrains the best one, and returns that one's result."""
    best = ranked(results)
    failed = len(results) - len(best)
    if not best:
        logs = state_path(out).parent
        raise UserError(f"none of {failed} candidates could be evaluated; the trials' errors are below {logs}")
    print(f"{len(best)} candidates evaluated" + (f", {failed} failed" if failed else ""))
    print("rank  top-1 %  top-5 %  MFLOPs  architecture")
    for rank, result in enumerate(best[:10], 1):
        numbers = f"{rank:4}  {result['acc1']:7.2f}  {result['acc5']:7.2f}  {result['flops'] / 1e6:6.1f}"
        print(f"{numbers}  {' '.join(map(str, result['architecture']))}")
    if space.n_widths == 1:
        words = ("--space", "channels", "--architecture", os.path.join(args.out, "checkpoints", "best.json"))
        print(f"search its channels, with another --out:\n  {command('supernet.py', args, *words)}")
    print(f"retrain the best:\n  {retrain_command(args)}")
    return best[0]


def retrain_command(args):
    """The command that retrains the best candidate; scratch.py takes space and data settings from the record beside it.

    Where no file gives the settings of training, a second line says so.
    """
    words = ["--architecture", os.path.join(args.out, "checkpoints", "best.json")]
    known = parse_args(["--demo"] if args.demo else ["--config", args.config] if args.config else [])
    if args.data_dir != known.data_dir:
        words += ["--data-dir", args.data_dir]
    text = command("scratch.py", args, *words)
    if args.demo or (
        args.config and any("iterations" in read_yaml(args.config).get(k, {}) for k in ("common", "scratch"))
    ):
        return text
    return f"{text}\n  (ImageNet's 300,000 iterations of 1,024 images: choose --iterations, --batch-size and --lr)"


def main(args):
    """Checks, prepares, runs and reports the search; returns the best candidate's result."""
    out = output_folder(args.out).resolve()
    with hold_lock(state_path(out).with_name("search.lock")):
        search = check(args, out)
        done = prepare(search, args, out)
        if not done:
            run(search, args, out)
        best = report(read_results(out), search.space, args, out)
        log.info("report: %s", write_report(out))
        return best


if __name__ == "__main__":
    run_script(main, parse_args)

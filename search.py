"""Searches the supernet for the best candidate under limits, by evolution; trials run with NNI or without it.

    python tester.py --mode gen                writes the search space that this needs
    python search.py                           the official search, 20 generations of 50, of the newest supernet
    python search.py --demo                    the bundled images, 5 generations of 16
    python search.py --engine local            without NNI
    python search.py --objectives acc1,flops   the front of accuracy and FLOPs
    python search.py --strategy random         the baseline: as many random candidates
    python search.py --limit flops=330M --limit params=3.5M    under several limits
    python search.py --limit latency=8ms       within 8 ms on this device, which tester.py --mode latency has measured
    python search.py --resume                  resumes a search that was interrupted in any way
    python search.py --resume --generations 30 extends one of 20 generations, finished or not
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
import os
import shlex
import signal
import sys
from pathlib import Path

from command_line import (
    Extend,
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
from engines.machines import check_keys
from engines.nni_engine import check_name, read_experiment, search_with_nni, trial_command
from engines.search_record import (
    EVOLUTION,
    confirmations,
    images_path,
    prepare_search,
    ranked,
    read_generations,
    read_results,
    state_path,
    unconfirmed,
)
from evolution_tuner import Evolution, official_shares
from images.dataset import Data, DataConfig
from reports.latency import confirm, difference, read_table, with_latency
from reports.page import write_report
from space.custom import searched
from space.flops_table import comparison, official_comparison, read_flops_table, with_flops_table
from space.limits import as_settings, bounds_of, describe, limits_from_args
from space.search_space import COSTS, SearchSpace
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

OBJECTIVES = {"acc1", *COSTS}


def shared_parser():
    """The flags that a trial has too."""
    parser = Parser(__doc__, "search")
    add_run_flags(parser)
    add_data_flags(parser)
    add_checkpoint_flag(parser, "supernet")
    add_operations_flag(parser)
    add_evaluation_flags(parser)
    return parser


def objectives(text):
    """An argparse type: names by commas, accuracy and one or two costs."""
    names = text.split(",")
    if "acc1" not in names or len(names) not in (2, 3) or len(set(names)) < len(names) or not set(names) <= OBJECTIVES:
        raise argparse.ArgumentTypeError(f"{text!r} is not acc1 and one or two of {', '.join(COSTS)}, by commas")
    return text


def parse_args(argv=None):
    parser = shared_parser()
    group = parser.add_argument_group("search")
    group.add_argument(
        "--strategy",
        choices=("evolution", "random"),
        default="evolution",
        help="random: as many random candidates, to compare with (evolution)",
    )
    group.add_argument(
        "--objectives",
        type=objectives,
        metavar="LIST",
        help="acc1,flops: the front of accuracy and costs (flops, params, latency), instead of the most accurate",
    )
    group.add_argument(
        "--rank-by",
        choices=("acc1", "loss"),
        default="acc1",
        help="what makes a candidate the better one: accuracy, or a low loss on the same images (acc1)",
    )
    group.add_argument("--population", type=count(1, 100_000), default=50, help="candidates a generation (50)")
    group.add_argument("--select", type=count(1, 100_000), help="parents: this many of the best so far (a fifth)")
    group.add_argument("--mutation", type=count(0, 100_000), help="children by mutation a generation (half)")
    group.add_argument("--crossover", type=count(0, 100_000), help="children by crossover a generation (half)")
    group.add_argument("--mutation-prob", type=real(0, 1), default=0.1, help="of redrawing each block (0.1)")
    group.add_argument("--generations", type=count(1, 1_000_000), default=20, help="populations to evaluate (20)")
    group.add_argument(
        "--limit",
        nargs="+",
        action=Extend,
        metavar="COST=LIMIT",
        help="flops=330M, params=3.5M, latency=8ms, with a lower bound flops=290M:330M, or a share of all candidates "
        "flops=59%%; any number of them (flops=330M, elsewhere than at 224 px flops=59%%)",
    )
    group.add_argument("--flops-limit", metavar="FLOPS", help="short for --limit flops=FLOPS")
    group.add_argument(
        "--flops-table",
        metavar="FILE",
        help="costs in the form of the official op_flops_dict.pkl (default: counted from the shapes)",
    )
    group.add_argument(
        "--latency-table", metavar="FILE", help="what tester.py --mode latency has written (OUT/latency.json)"
    )
    group.add_argument(
        "--foreign-latency-table",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="accept a table of another device or setting, without measuring the best candidates (no)",
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
    if args.objectives and args.rank_by != "acc1":
        parser.refuse("--objectives, which ranks by what it names", "rank-by")
    if args.mutation == 0:
        parser.refuse("--mutation 0", "mutation-prob")
    if not wants_latency(args) and (args.latency_table or args.foreign_latency_table):
        flag = "--latency-table" if args.latency_table else "--foreign-latency-table"
        raise UserError(f"{flag} has no effect without a limit on latency: leave it out, or say --limit latency")
    defaults = experiment_defaults(parser, args.experiment)
    if "population" in parser.given:  # the experiment's numbers are shares of another population
        defaults = {k: v for k, v in defaults.items() if k not in ("select", "mutation", "crossover")}
    args = parser.parse(argv, defaults)
    if args.strategy == "random":  # generations without children, in every other respect the same
        for flag in ("select", "mutation", "crossover", "mutation_prob"):
            if flag in parser.typed:
                parser.refuse("--strategy random", flag.replace("_", "-"))
        args.mutation = args.crossover = 0
    args.concurrency = args.concurrency or default_concurrency(args)
    args.select, args.mutation, args.crossover = official_shares(
        args.population, args.select, args.mutation, args.crossover
    )
    return args


def wants_latency(args):
    """Whether the flags limit latency, or make it an objective."""
    return any(text.startswith("latency") for text in [*(args.limit or []), *(args.objectives or "").split(",")])


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
    latency: dict | None  # the table of latencies, where it is of this device
    costs: str  # a line for the log about the space's FLOPs, or nothing
    warnings: list  # what speaks against trusting the results, a line each
    settings: dict  # what determines the results: a search can only be resumed with the same
    data: Data  # the images


def check(args, out):
    """Checks the arguments and all that they name; returns the Search."""
    experiment = read_experiment(args.experiment)
    machines = experiment["trainingService"].get("machineList", [])
    if args.engine == "nni":
        check_name(out)
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
    latency = None
    if wants_latency(args):
        latency = read_table(args.latency_table or out / "latency.json", space, args.foreign_latency_table)
        space = with_latency(space, latency)
        if other := difference(latency):
            warnings.append(f"the table of latencies was measured {other}: the winner's latency is not checked")
    check_space_file(out / experiment["searchSpaceFile"], space)
    with open(supernet.path, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    settings = {
        **{name: getattr(args, name) for name in EVOLUTION},
        **as_settings(limits_from_args(args, space)),
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
    if latency:
        keys = ("device", "threads", "batch_size", "torch", "spread", "medians", "stem_and_tail")
        settings["latency"] = {key: latency[key] for key in keys}
    if args.objectives:
        settings["objectives"] = args.objectives.split(",")
    if args.rank_by != "acc1":
        settings["rank_by"] = args.rank_by
    if space.operations_hash:  # for the report, which has no modules to count
        settings["counted"] = space.costs[:5]  # latency has a setting of its own
    Evolution.from_settings(space, settings)  # raises where the settings allow no search
    here = latency if latency and not difference(latency) else None
    return Search(experiment, supernet.path, space, here, costs, warnings, settings, data)


def prepare(search, args, out):
    """Writes or checks the state file, and starts the log."""
    state = prepare_search(out, search.settings, args.resume, search.warnings)
    start_logging(out / "checkpoints" / "search", args, args.device)
    if search.costs:
        log.info(search.costs)
    for text in search.warnings:
        log.warning("warning: %s", text)
    if args.loader != "synthetic":
        search.data.write_list(images_path(out))
    log.info("limits: %s; %d candidates evaluated already", describe(bounds_of(search.settings)), state["evaluated"])


def run(search, args, out):
    """Runs the search to its end; exits with 128 + the signal's number where one interrupts it.

    Where latency is limited, the best candidates are measured after the last generation, and if none of them holds,
    more generations follow.
    """
    try:
        with signals(interrupt):
            while True:
                state = read_json(state_path(out))
                if not state["done"]:
                    run_engine(search, args, out)
                elif search.latency and unconfirmed(state):
                    confirm(search.space, search.settings, out, search.latency)
                else:
                    return
    except Interrupted as error:
        words = [word for word in sys.argv[1:] if word not in ("--resume", "--no-resume")]
        again = shlex.join(["python", "search.py", *words, "--resume"])
        state = read_json(state_path(out))
        lost = args.population - sum(map(len, read_generations(out, skip=state["generation"])))
        text = "stopped by %s: %d candidates are kept, at most %d that were being evaluated start anew; resume with: %s"
        log.warning(text, signal.Signals(error.args[0]).name, state["evaluated"], lost, again)
        sys.exit(128 + error.args[0])


def run_engine(search, args, out):
    """Runs the generations that are left on the engine of the flags."""
    space, settings, experiment = search.space, search.settings, search.experiment
    trial = trial_settings(args, out, search.supernet)
    sizes = {"concurrency": args.concurrency, "candidates_per_trial": args.candidates_per_trial}
    sizes["trial_timeout"] = args.trial_timeout
    if args.engine == "local":
        search_locally(space, settings, out, trial, **sizes)
    else:
        command = trial_command(experiment, out, trial)
        hosting = {"host": args.host, "port": args.port}
        search_with_nni(space, command, settings, out, experiment, **sizes, **hosting)


def report(results, space, args, out, winner=None):
    """Prints the ten best and the command that retrains the winner, and returns that one's result.

    The winner is the best one, unless its latency was measured, and another one is the best that holds.
    """
    best = ranked(results)
    failed = len(results) - len(best)
    if not best:
        logs = state_path(out).parent
        raise UserError(f"none of {failed} candidates could be evaluated; the trials' errors are below {logs}")
    print(f"{len(best)} candidates evaluated" + (f", {failed} failed" if failed else ""))
    columns = (("params", "params  "), ("latency_ms", "ms       "), *([("loss", "loss    ")] * ("score" in best[0])))
    more = [(key, head) for key, head in columns if key in best[0]]
    print(f"rank  top-1 %  top-5 %  MFLOPs  {''.join(head for _, head in more)}architecture")
    for rank, result in enumerate(best[:10], 1):
        numbers = f"{rank:4}  {result['acc1']:7.2f}  {result['acc5']:7.2f}  {result['flops'] / 1e6:6.1f}  "
        numbers += "".join(f"{result[key]:<{len(head)}.{3 * (key != 'params')}f}" for key, head in more)
        print(f"{numbers}{' '.join(map(str, result['architecture']))}")
    winner = winner or best[0]
    if winner != best[0]:
        print(f"the best that holds, measured: rank {best.index(winner) + 1}")
    if front := sorted(Path(out, "checkpoints", "front").glob("*.json")):
        print(f"the front: {len(front)} candidates, {front[0]} to {front[-1].name}")
    if space.n_widths == 1:
        print(f"search its channels, with another --out:\n  {channels_command(args)}")
    print(f"retrain the best:\n  {retrain_command(args)}")
    return winner


def retrain_command(args):
    """The command that retrains the best candidate; scratch.py takes space and data settings from the record beside it.

    Where no file gives the settings of training, a second line says so.
    """
    return _training_command("scratch", args, file_args(args))


def channels_command(args):
    """The command that trains a supernet of the best candidate's channels, on images as this search had them."""
    known, words = file_args(args), ["--space", "channels"]
    if found := searched(best_path(args)):
        before = DataConfig.from_args(known).to_dict()
        for name, value in found["data"].items():
            if value != before[name]:
                flag = name.replace("_", "-")
                values = [] if isinstance(value, bool) else value if isinstance(value, list) else [value]
                words += [f"--no-{flag}" if value is False else f"--{flag}", *map(str, values)]
    return _training_command("supernet", args, known, *words)


def best_path(args):
    return os.path.join(args.out, "checkpoints", "best.json")


def file_args(args):
    """The arguments as the file of settings alone gives them."""
    return parse_args(["--demo"] if args.demo else ["--config", args.config] if args.config else [])


def _training_command(script, args, known, *words):
    words = ["--architecture", best_path(args), *words]
    for name in ("data_dir", "loader", "workers", "cache", "device", "threads", "seed"):
        if getattr(args, name) != getattr(known, name):
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    text = command(f"{script}.py", args, *words)
    sections = read_yaml(args.config) if args.config else {}  # with --demo, demo.yml
    if any("iterations" in sections.get(name, {}) for name in ("common", script)):
        return text
    default = {"supernet": "150,000", "scratch": "300,000"}[script]
    return f"{text}\n  (ImageNet's {default} iterations of 1,024 images: choose --iterations, --batch-size and --lr)"


def main(args):
    """Checks, prepares, runs and reports the search; returns the best candidate's result."""
    out = output_folder(args.out).resolve()
    with hold_lock(state_path(out).with_name("search.lock")):
        search = check(args, out)
        prepare(search, args, out)
        run(search, args, out)
        state = read_json(state_path(out))
        if confirmations(state) and not state["best"]:
            page = write_report(out)
            raise UserError(
                f"none of the best candidates holds the limit on latency when measured: see {page}; raise it"
            )
        best = report(read_results(out), search.space, args, out, state["best"])
        log.info("report: %s", write_report(out))
        return best


if __name__ == "__main__":
    run_script(main, parse_args)

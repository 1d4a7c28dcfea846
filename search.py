"""Searches the supernet for the best candidate under a FLOPs limit, by evolution; NNI, or this machine alone, runs the trials.

    python tester.py --mode gen                writes the search space that this needs
    python search.py                           the official search, 20 generations of 50, of the newest supernet
    python search.py --demo                    the bundled images, 5 generations of 16
    python search.py --engine local            without NNI, one process a GPU
    python search.py --resume                  goes on with a search that was interrupted, by whatever
    python search.py --experiment config_search_remote.yml     on the machines that this file names

Reads OUT/checkpoints/supernet (newest) or --checkpoint, OUT/nni_auto_gen_search_space.json and the NNI experiment,
config_search.yml or --experiment. Writes OUT/checkpoints/GGG_III.json (architectures, III the rank in generation GGG), OUT/acc/GGG.jsonl (a line a
candidate), OUT/id2cand/GGG.json (trial id -> what it evaluated), OUT/checkpoints/best.json, OUT/report.html, OUT/figures/, and
state, logs and NNI's own files in OUT/checkpoints/search/. Prints the ten best, and the command that retrains the winner.
Source: paper section 3.4; official `src/Search/search.py`.
"""

import argparse
import hashlib
import itertools
import os
import reprlib
import shlex
import signal
import sys

from command_line import Parser, add_checkpoint_flag, add_data_flags, add_evaluation_flags, add_run_flags, count, real
from dataloader import resolve_backend
from engines.local_engine import search_locally
from engines.machines import check_keys, check_machines
from engines.nni_engine import search_with_nni, trial_command
from engines.search_record import prepare_search, read_results, state_path
from evolution_tuner import EVOLUTION, Evolution
from images.dataset import DataConfig
from reports.page import write_report
from space.flops_table import comparison, official_comparison, read_flops_table, with_flops_table
from space.search_space import SearchSpace
from training import checkpoint
from training.evaluation import resolve_device
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

OFFICIAL_LIMIT = "330M", "59%"  # at 224 px and 1000 classes; elsewhere the share of candidates that lies under it there


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
        "--resume", action=argparse.BooleanOptionalAction, default=False, help="go on with the search in OUT"
    )
    group.add_argument(
        "--engine", choices=("nni", "local"), default="nni", help="who runs the evaluations (default: nni)"
    )
    group.add_argument(
        "--concurrency",
        type=count(1, 1000),
        help="trials at a time; with --engine local and GPUs, one a GPU (config_search.yml)",
    )
    group.add_argument(
        "--candidates-per-trial",
        type=count(1, 100_000),
        metavar="N",
        help="default: a generation over the trials at a time",
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
        default=1800,
        metavar="S",
        help="for each candidate of a trial, then it is ended (1800)",
    )
    group.add_argument("--port", type=count(1, 65534), help="of the web UI (default: the first free one from 8080)")
    group.add_argument(
        "--host", choices=("127.0.0.1", "0.0.0.0"), default="127.0.0.1", help="0.0.0.0 opens the web UI to the network"
    )
    experiment = parser.parse(argv).experiment
    return parser.parse(argv, experiment_defaults(parser, experiment))


def experiment_defaults(parser, path):
    """The flags that the experiment file sets: classArgs and trialConcurrency."""
    experiment = read_experiment(path)
    settings = {"concurrency": experiment["trialConcurrency"], **experiment["tuner"].get("classArgs", {})}
    return parser.check_settings(path, "classArgs", {key.replace("_", "-"): value for key, value in settings.items()})


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
            raise UserError(f"{path}: unknown entry {reprlib.repr(key)}; those of this search are {', '.join(forms)}")
        if not isinstance(experiment.get(key), forms[key]):
            raise UserError(
                f"{path}: {key} is {reprlib.repr(experiment.get(key))}, not of type {forms[key][0].__name__}"
            )
    keys = {"tuner": {"codeDirectory", "className", "classArgs"}, "assessor": {"codeDirectory", "className"}}
    for key, known in keys.items():
        if not known - {"classArgs"} <= experiment[key].keys() <= known:
            raise UserError(f"{path}: {key} has entries other than {', '.join(sorted(known))}")
    service = experiment["trainingService"]
    if service.keys() == {"platform", "machineList"} and service["platform"] == "remote":
        return experiment | {"trainingService": service | {"machineList": check_machines(path, service["machineList"])}}
    if service != {"platform": "local"}:  # trialGpuNumber among it, for the reason that the file gives
        raise UserError(
            f"{path}: trainingService is {reprlib.repr(service)}, not platform: local alone, nor platform: remote with machineList alone"
        )
    return experiment


def flops_limit(text, space):
    """The limit in multiply-adds, of the flag's text or the default."""
    official, share = OFFICIAL_LIMIT
    if text is None:
        text = official if space == SearchSpace() else share
    return space.flops_value(text, "--flops-limit")


def check_space_file(path, space):
    """Raises UserError where the generated search space is missing or another one."""
    if not path.exists() or read_json(path) != space.nni_search_space():
        what = "is another search space than the checkpoint's" if path.exists() else "is missing"
        raise UserError(f"{path} {what}: run python tester.py --mode gen --out {path.parent}")


def trial_settings(args, out, supernet_path):
    """The flags of a trial: its share of the threads, and what this search uses."""
    settings = {name: getattr(args, name) for name in vars(shared_parser().parse_args([]))}
    threads = args.threads or max(1, cores() // args.concurrency)
    return settings | {"checkpoint": str(supernet_path), "out": str(out), "threads": threads}


def report(results, config, args, out):
    """Prints the ten best and the command that retrains the best one, and returns that one's result."""
    ranked = sorted((r for r in results if r["acc1"] is not None), key=lambda r: (r["acc1"], r["acc5"]), reverse=True)
    failed = len(results) - len(ranked)
    if not ranked:
        raise UserError(
            f"none of {failed} candidates could be evaluated; the trials' errors are below {state_path(out).parent}"
        )
    print(f"{len(ranked)} candidates evaluated" + (f", {failed} failed" if failed else ""))
    print("rank  top-1 %  top-5 %  MFLOPs  architecture")
    for rank, result in enumerate(ranked[:10], 1):
        numbers = f"{rank:4}  {result['acc1']:7.2f}  {result['acc5']:7.2f}  {result['flops'] / 1e6:6.1f}"
        print(f"{numbers}  {' '.join(map(str, result['architecture']))}")
    print(f"retrain the best:\n  {shlex.join(retrain_command(config, args))}")
    return ranked[0]


def retrain_command(config, args):
    """The words that retrain the best candidate on the search's images: its file of settings, and what that doesn't say."""
    settings = ["--demo"] if args.demo else ["--config", args.config] if args.config else []
    words = ["python", "scratch.py", "--architecture", os.path.join(args.out, "checkpoints", "best.json"), *settings]
    said = parse_args(settings)
    if args.data_dir != said.data_dir:
        words += ["--data-dir", args.data_dir]
    known = DataConfig.from_args(said).to_dict()
    for name, value in config.to_dict().items():
        if value != known[name]:
            flag, values = name.replace("_", "-"), value if isinstance(value, list) else [value]
            words += (
                [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", *map(str, values)]
            )
    if args.out != ".":
        words += ["--out", args.out]
    return words


def search(args, out):
    """The search of the arguments, from its checks to its report; returns the best candidate's result."""
    experiment = read_experiment(args.experiment)
    machines = experiment["trainingService"].get("machineList", [])
    if args.engine == "nni":
        check_keys(args.experiment, machines)
    if args.engine == "local" or not machines:
        resolve_device(args)  # says where there is no such one
    table = args.flops_table and read_flops_table(args.flops_table)
    _, stored, config, data = checkpoint.open_supernet(args)
    space, compared = stored.space, official_comparison(SearchSpace())
    if table:
        space, differences = with_flops_table(space, table, args.flops_table)
        compared = comparison(differences, args.flops_table)
    check_space_file(out / experiment["searchSpaceFile"], space)
    with open(stored.path, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    evolution = {name: getattr(args, name) for name in EVOLUTION}
    limit = flops_limit(args.flops_limit, space)
    Evolution(space.choices_per_block, space.flops, limit, **evolution)  # says what is wrong with the numbers
    settings = {
        **evolution, "flops_limit": limit, "space": space.to_dict(), "checkpoint": weights, "data": config.to_dict(),
        "split": data.split, "bn": args.bn, "bn_batches": args.bn_batches, "bn_batch_size": args.bn_batch_size,
        "eval_amp": args.eval_amp, "loader": resolve_backend(args.loader), "costs": table and [space.operation_flops, space.fixed_flops],
    }  # fmt: skip
    state = prepare_search(out, settings, args.resume)
    start_logging(out / "checkpoints" / "search", args, args.device)
    if compared:
        log.info(compared)
    log.info("FLOPs limit %.2fM; %d candidates evaluated already", limit / 1e6, state["evaluated"])
    if not state["done"]:
        trial = trial_settings(args, out, stored.path)
        how = {"concurrency": args.concurrency, "candidates_per_trial": args.candidates_per_trial}
        try:
            with signals(interrupt):
                if args.engine == "local":
                    search_locally(space, settings, out, trial, **how)
                else:
                    command = trial_command(experiment, out, trial)
                    longest = args.candidates_per_trial or -(-args.population // args.concurrency)
                    hosting = {"host": args.host, "port": args.port, "trial_timeout": args.trial_timeout * longest}
                    search_with_nni(space, command, settings, out, experiment, **how, **hosting)
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

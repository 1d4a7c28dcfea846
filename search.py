"""Searches the supernet for the best candidate under limits, by evolution; trials run with NNI or without it.

    python tester.py --mode gen                writes the search space that this needs
    python search.py                           the official search, 20 generations of 50, of the newest supernet
    python search.py --demo                    the bundled images, 5 generations of 16
    python search.py --engine local            without NNI
    python search.py --objectives acc1,flops   the front of accuracy and FLOPs
    python search.py --strategy random         the baseline: as many random candidates
    python search.py --own FILE --strategy NAME    a searcher of your own; --own has your costs, too
    python search.py --limit flops=330M --limit params=3.5M    under several limits
    python search.py --limit latency=8ms       within 8 ms on this device, which tester.py --mode latency has measured
    python search.py --resume                  resumes a search that was interrupted in any way, with its settings
    python search.py --resume --generations 30 extends one of 20 generations, finished or not
    python search.py --experiment config_search_remote.yml     on the machines in this file

Reads OUT/checkpoints/supernet (newest) or --checkpoint, OUT/nni_auto_gen_search_space.json, latency.json of OUT or of
the supernet's OUT, and the NNI experiment, config_search.yml or --experiment. Writes OUT/checkpoints/GGG_III.json (the
architecture of rank III of generation GGG), OUT/acc/GGG.jsonl (a line for each candidate), OUT/id2cand/GGG.json (trial
id -> what it evaluated), OUT/checkpoints/best.json and largest.json, OUT/report.html and OUT/figures/; state, logs and
NNI's own files in OUT/checkpoints/search/.
Prints the ten best, the largest legal candidate, which is evaluated last, and the command that retrains the winner.
Source: paper section 3.4; official `src/Search/search.py`.
"""

import dataclasses
import hashlib
import os
import shlex
import signal
import sys
from pathlib import Path

from dataloader import MAX_WORKERS, resolve_backend
from devices.table import cannot_measure, mismatch, read_table, setting_of, with_latency
from engines.confirmation import confirm
from engines.local_engine import search_locally
from engines.machines import check_keys
from engines.nni_engine import check_name, read_experiment, search_with_nni, trial_command
from engines.search_files import (
    as_own_costs,
    costs_of,
    has_search,
    images_path,
    n_generations,
    read_generations,
    read_state,
    state_path,
    unconfirmed,
)
from engines.search_record import prepare_search
from images.dataset import Data
from reports.page import write_report
from reports.search_results import SearchResults
from settings.command_line import Parser, command, write_settings
from settings.fields import flag, names
from settings.subjects import (
    COSTS,
    EVOLUTION,
    NNI,
    CostLimits,
    DataConfig,
    Evaluation,
    Images,
    Run,
    Space,
    Trials,
    Weights,
)
from settings.subjects import Search as SearchSettings
from space import own
from space.evolution import Evolution, official_shares
from space.flops_table import comparison, official_comparison, read_flops_table, with_flops_table
from space.limits import (
    Limits,
    as_before,
    as_settings,
    bounds_of,
    describe,
    idle_limits,
    make_bounds,
    milliseconds,
    offer,
    share_text,
)
from space.search_space import SearchSpace
from space.twins import identities
from training import checkpoint
from training.distributed import gpu_count
from training.evaluation import NO_GPU, calibration_warning
from utils import (
    Interrupted,
    UserError,
    circumstances,
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
    write_json,
)


def make_parser():
    parser = Parser(__doc__, "search")
    parser.add(Run)
    parser.add(DataConfig, defaults=DataConfig.unset())
    parser.add(Images)
    parser.add(Weights, said="supernet")
    parser.add(Space, only=("own",))
    parser.add(Evaluation)
    for subject in (SearchSettings, CostLimits, Trials, NNI):
        parser.add(subject)
    return parser


def parse_args(argv=None):
    parser = make_parser()
    before = {}  # settings of the search that is resumed

    def defaults(given):
        before.update(settings_of(parser, given) if given["resume"] else {})
        experiment = parser.typed.get("experiment") or before.get("experiment", given["experiment"])
        return experiment_defaults(parser, experiment) | before

    args = parser.parse(argv, defaults)
    if before and not args.config:
        args.demo, args.config = started_with(args.out)
    replace_flops_limit(parser, args)
    refuse_contradictions(parser, args, before)
    if "population" in parser.given and not before:  # the experiment's numbers are shares of another population
        for name in {"select", "mutation", "crossover"} - parser.given.keys():
            setattr(args, name, None)
    if args.strategy == "random":  # generations without children, in every other respect the same
        args.mutation = args.crossover = 0
    args.concurrency = args.concurrency or default_concurrency(args)
    args.select, args.mutation, args.crossover = official_shares(
        args.population, args.select, args.mutation, args.crossover
    )
    return args


def replace_flops_limit(parser, args):
    """Has a limit on FLOPs that is typed replace that of a settings file, which may have the other form."""
    short = "flops_limit" in parser.typed
    long = any(text.startswith("flops=") for text in parser.typed.get("limit", ()))
    if short and not long:
        args.limit = [text for text in args.limit or () if not text.startswith("flops=")] or None
    elif long and not short:
        args.flops_limit = None


def refuse_contradictions(parser, args, before):
    """Raises UserError where a flag has no effect beside another one, or contradicts the search that is resumed."""
    if args.strategy != before.get("strategy", args.strategy):
        what = f"--strategy {args.strategy} contradicts the search in {args.out}, which has {before['strategy']}"
        raise UserError(f"{what}; leave it out, or name another --out")
    if args.engine == "local":
        parser.refuse("--engine local", "host", "port")
    if args.objectives and args.rank_by != "acc1":
        if "rank_by" in parser.typed:
            parser.refuse("--objectives, which ranks by what it names", "rank-by")
        args.rank_by = "acc1"  # a file's is for its other searches
    if args.mutation == 0 and args.strategy != "random":  # of which a file may have it
        parser.refuse("--mutation 0", "mutation-prob")
    if args.strategy == "random":
        typed = [name for name in ("select", "mutation", "crossover", "mutation_prob") if name in parser.typed]
        parser.refuse("--strategy random", *(name.replace("_", "-") for name in typed))
    if "latency" not in named_costs(args) and (args.latency_table or args.foreign_latency_table):
        name = "--latency-table" if args.latency_table else "--foreign-latency-table"
        raise UserError(f"{name} has no effect without a limit on latency: leave it out, or say --limit latency")


def settings_of(parser, given):
    """The settings (attribute -> value) of the search in OUT, as flags; none where there is no search."""
    path = state_path(given["out"]).with_name("config.yml")
    if not (has_search(given["out"]) and path.exists()):
        return {}
    state = read_state(given["out"])
    found = parser.read_settings(path)
    if given["limit"] or given["flops_limit"]:  # then these are all limits, as in a new search
        found = {name: value for name, value in found.items() if name not in ("limit", "flops_limit")}
    found |= {name: state["settings"][name] for name in EVOLUTION if name in state["settings"]}
    moved = () if os.path.exists(found.get("experiment", "")) else ("experiment",)  # with the project's folder
    return {name: value for name, value in found.items() if name not in ("out", "resume", *moved)}


def started_with(out):
    """(demo, config): whether the search in `out` was started with --demo, and its file of settings."""
    state = read_state(out)
    found = [state.get("started_with", {}), *state["starts"]][-1]  # the former in searches of before there were starts
    path = found.get("config")
    return bool(found.get("demo")), path if path and os.path.exists(path) else None


def named_costs(args):
    """The costs that the flags limit, or make objectives, if these are costs."""
    return {*(str(text).partition("=")[0] for text in args.limit or ()), *(args.objectives or "").split(",")}


def check_own(args):
    """Raises UserError if the flags name an objective or a strategy that is none, of the project's or of --own."""
    known = ["acc1", *COSTS, *own.REGISTRIES["cost"]]
    if unknown := [name for name in (args.objectives or "acc1").split(",") if name not in known]:
        raise UserError(f"--objectives {args.objectives}: {unknown[0]!r} is none of {', '.join(known)}")
    if args.strategy not in own.OFFICIAL["searcher"]:
        own.find("searcher", args.strategy)


def default_concurrency(args):
    """A trial per GPU of this machine, or a trial per remote machine, whose GPUs are not known here."""
    machines = read_experiment(args.experiment)["trainingService"].get("machineList") if args.engine == "nni" else None
    return len(machines) if machines else max(1, gpu_count() if args.device != "cpu" else 0)


def experiment_defaults(parser, path):
    """The flags that the experiment file sets: classArgs and trialConcurrency."""
    experiment = read_experiment(path)
    settings = experiment["tuner"].get("classArgs", {})
    if "trialConcurrency" in experiment:
        settings = {"concurrency": experiment["trialConcurrency"], **settings}
    return parser.check_settings(path, "classArgs", {key.replace("_", "-"): value for key, value in settings.items()})


def check_space_file(path, space, generate):
    """Raises UserError if the generated search space is missing or not the supernet's; `generate` writes it."""
    if not path.exists() or read_json(path) != space.nni_search_space():
        what = "is another search space than the checkpoint's" if path.exists() else "is missing"
        raise UserError(f"{path} {what}: run {generate}")


def tester_command(args, mode):
    """The command of tester.py on the supernet and the outputs of this search."""
    weights = ["--checkpoint", args.checkpoint] if args.checkpoint else []
    return command("tester.py", Run.of(vars(args)), args.own, "--mode", mode, *weights)


def find_latency_table(args, out, supernet):
    """The file of --latency-table, or that in OUT, or else that in the supernet's OUT. Raises UserError."""
    if args.latency_table:
        return args.latency_table
    folders = [out, *list(Path(supernet).resolve().parents)[2:3]]  # the supernet is OUT/checkpoints/supernet/FILE
    kept = [state_path(out).parent] if args.resume else []  # that of this search: others may be measured later
    for folder in kept + folders:
        if (folder / "latency.json").exists():
            return folder / "latency.json"
    places = " or ".join(map(str, dict.fromkeys(folders)))
    measure = tester_command(args, "latency")
    raise UserError(f"--limit latency: no table of latencies, latency.json, in {places}: write one with {measure}")


def trial_settings(args, out, supernet_path):
    """The flags of a trial: those that it shares with this search, with a share of the cores."""
    subjects = (Run, DataConfig, Images, Evaluation)
    settings = {name: getattr(args, name) for subject in subjects for name in names(subject)}
    share = max(1, cores() // args.concurrency)
    workers = min(MAX_WORKERS, share) if args.workers is None else args.workers
    settings |= {"own": args.own, "threads": args.threads or share, "workers": workers}
    return settings | {"checkpoint": str(supernet_path), "out": str(out)}


@dataclasses.dataclass
class Search:
    """What a search runs with, checked."""

    experiment: dict  # the content of the experiment file
    supernet: str  # path of its checkpoint
    space: SearchSpace  # it has the costs of --flops-table
    latency: dict | None  # the table of latencies, where it is of this device
    costs: str  # a line for the log that compares the space's FLOPs with a table, or nothing
    warnings: list  # reasons to doubt the results, a line each
    settings: dict  # what determines the results: a search can only be resumed with the same
    data: Data  # the images
    table: dict | None = None  # the table of latencies, of any device


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
    values = vars(args)
    own.load(args.own)
    check_own(args)
    _, supernet, config, data = checkpoint.open_supernet(values)
    calibration = calibration_warning(Evaluation.of(values), len(data.train) - len(data.heldout))
    warnings = data.warnings + list(filter(None, [checkpoint.unfinished(supernet), calibration]))
    space = supernet.space
    costs = official_comparison(SearchSpace())
    if table:
        space, differences = with_flops_table(space, table, args.flops_table)
        costs = comparison(differences, args.flops_table)
    latency = None
    if "latency" in named_costs(args):
        path = find_latency_table(args, out, supernet.path)
        latency = read_table(path, space, args.foreign_latency_table, tester_command(args, "latency"))
        space = with_latency(space, latency)
        if other := mismatch(latency):
            warnings.append(f"the table of latencies was measured {other}: the winner's latency is not checked")
    space = own.with_costs(space, named_costs(args))
    check_space_file(out / experiment["searchSpaceFile"], space, tester_command(args, "gen"))
    bounds = make_bounds(space, args.limit or (), args.flops_limit)
    if args.resume:
        bounds = as_before(space, bounds, read_state(out)["settings"])
    with open(supernet.path, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    settings = {
        **{name: getattr(args, name) for name in EVOLUTION},
        **as_settings(bounds),
        "space": space.to_dict(),
        "checkpoint": weights,
        "data": config.to_dict(),
        "split": data.split,
        **dataclasses.asdict(Evaluation.of(values)),
        "loader": resolve_backend(args.loader),
        "costs": table and list(space.cost_rows("flops")),
        **as_own_costs(space.costs.own),
    }
    warnings += idle_limits(space, args.limit or (), args.flops_limit)
    if latency:
        keys = ("device", "runtime", "threads", "batch_size", "torch", "onnxruntime", "spread", "medians",
                "stem_and_tail")  # fmt: skip
        settings["latency"] = {key: latency[key] for key in keys if key in latency}
    if args.strategy not in own.OFFICIAL["searcher"]:
        settings |= {"strategy": args.strategy, "strategy_code": own.hash_of("searcher", args.strategy)}
    if args.objectives:
        settings["objectives"] = args.objectives.split(",")
    if args.rank_by != "acc1":
        settings["rank_by"] = args.rank_by
    if space.operations_hash:  # the report has no modules to count
        settings["counted"] = space.costs[:5]  # latency has a setting of its own
    if recorded := identities_of(args, out, space, settings):
        settings["identities"] = recorded
    Evolution.from_settings(space, settings)  # raises where the settings allow no search
    here = latency if latency and not mismatch(latency) else None
    return Search(experiment, supernet.path, space, here, costs, warnings, settings, data, latency)


def identities_of(args, out, space, settings):
    """What makes candidates the same network (space/twins.py), or None where nothing does.

    Also None where they differ in a cost that matters, and for a search of before, which evaluated all of them.
    """
    if args.resume and "identities" not in read_state(out)["settings"]:
        return None
    apply = space.twins.groups and space.twins.cost_the_same(costs_of(settings))
    return identities(space) if apply and args.strategy in ("evolution", "random") else None


def prepare(search, args, out):
    """Writes or checks the state file, and starts the log."""
    bounds = bounds_of(search.settings)
    share = Limits(search.space, bounds).share()
    versions = circumstances(args.device, args.seed, own.commits())
    start = {"command": shlex.join(["python", *sys.argv]), "versions": versions, "demo": args.demo}
    start |= {"config": args.config and os.path.abspath(args.config), "own": args.own and os.path.abspath(args.own)}
    start |= {"share": share}  # the report does not know functions of a candidate
    state = prepare_search(out, search.settings, args.resume, search.warnings, start)
    folder = state_path(out).parent
    start_logging(folder, args.device, args.seed, own.commits())
    write_settings(folder / "config.yml", "search", vars(args))
    if search.table:
        write_json(folder / "latency.json", search.table)
    if search.costs:
        log.info(search.costs)
    for text in search.warnings:
        log.warning("warning: %s", text)
    if search.data.grouping:
        log.info(search.data.grouping)
    if args.loader != "synthetic":
        search.data.write_list(images_path(out))
    log.info("space: %s", offer(search.space, search.settings.get("latency", {"runtime": "torch"})["runtime"]))
    limits, left = describe(bounds, search.space.costs.own), share_text(share)
    log.info("limits: %s: %s; %d candidates evaluated already", limits, left, state["evaluated"])
    if "latency" in search.settings:
        log.info("latencies are those of %s", setting_of(search.settings["latency"]))


def run(search, args, out):
    """Runs the search to its end; exits with 128 + the signal's number where one interrupts it.

    Where latency is limited, the best candidates are measured after the last generation, and if none of them holds,
    more generations follow.
    """
    try:
        with signals(interrupt):
            while True:
                state = read_state(out)
                if not state["done"]:
                    run_engine(search, args, out)
                elif search.latency and unconfirmed(state):
                    if reason := cannot_measure(search.latency):
                        log.warning("warning: the winner's latency is not checked: %s, then --resume", reason)
                        return
                    if not confirm(out, search.latency):
                        return
                else:
                    return
    except Interrupted as error:
        words = [word for word in sys.argv[1:] if word not in ("--resume", "--no-resume")]
        again = shlex.join(["python", "search.py", *words, "--resume"])
        state = read_state(out)
        lost = args.population - sum(map(len, read_generations(out, skip=state["generation"])))
        lost = max(1, min(lost, n_generations(state) * args.population - state["evaluated"]))  # one is the largest
        text = "stopped by %s: %d candidates are kept, at most %d that were being evaluated start anew; resume with: %s"
        log.warning(text, signal.Signals(error.args[0]).name, state["evaluated"], lost, again)
        sys.exit(128 + error.args[0])


def run_engine(search, args, out):
    """Runs the generations that are left on the engine of the flags."""
    trial = trial_settings(args, out, search.supernet)
    how = {name: getattr(args, name) for name in ("concurrency", "candidates_per_trial", "trial_timeout")}
    if args.engine == "local":
        search_locally(out, trial, **how)
    else:
        words = trial_command(search.experiment, out, trial)
        search_with_nni(out, words, search.experiment, host=args.host, port=args.port, **how)


def print_best(found):
    """Prints the ten best of a SearchResults, and the winner where it is not among them; marks what exceeds a limit."""
    best = found.succeeded
    # Results all have a loss; it is shown where it ranks.
    columns = {
        "params": ("params  ", lambda r: f"{r['params']}"),
        "latency_ms": ("ms       ", lambda r: milliseconds(r["latency_ms"])),
        "score": ("loss    ", lambda r: f"{r['loss']:.3f}"),
    }
    for name, head in found.own_heads.items():
        columns[name] = f"{head:<9}  ", lambda r, name=name: f"{r[name]:.4g}"
    more = [column for key, column in columns.items() if key in best[0]]
    print(f"rank  top-1 %  top-5 %  MFLOPs  {''.join(head for head, _ in more)}architecture")
    place = best.index(found.winner)
    for rank in [*range(min(10, len(best))), *([place] if place >= 10 else [])]:
        result = best[rank]
        mflops = f"{result['flops'] / 1e6:6.{1 if result['flops'] >= 1e8 else 3}f}"
        numbers = f"{rank + 1:4}  {result['acc1']:7.2f}  {result['acc5']:7.2f}  {mflops}  "
        numbers += "".join(f"{text(result):<{len(head) - 1}} " for head, text in more)
        mark = "  beyond the limit" if found.is_beyond(result) else ""
        print(f"{numbers}{' '.join(map(str, result['architecture']))}{mark}")
    if place:
        measured = found.measured_text(found.winner)
        what = f"the best that holds, {'measured' if measured else 'predicted'}"
        if found.objectives:
            what = "the first of the front" + (" that was measured and holds" if measured else "")
        print(f"{what}: rank {place + 1}")
    if found.largest_text:
        print(found.largest_text)


def report(found, args):
    """Prints the ten best of a SearchResults, and the commands that continue from its winner."""
    print(f"{len(found.succeeded)} candidates evaluated" + (f", {found.n_failed} failed" if found.n_failed else ""))
    print_best(found)
    if front := found.front_files:
        print(f"the front: {len(front)} candidates, {front[0]} to {front[-1].name}")
    print(f"retrain the best:\n  {retrain_command(args)}")
    if found.space.n_widths == 1:
        where = dataclasses.replace(Run.of(vars(args)), out=os.path.join(args.out, "channels"))
        words = ("--space", "channels", "--architecture", best_path(args))
        channels = command("supernet.py", where, args.own, *words)
        print(f"search its channels, with the flags of the supernet's training:\n  {channels}")


def retrain_command(args):
    """The command that retrains the best candidate; scratch.py takes space and data settings from the record beside it.

    Where no file gives the settings of training, a second line says so.
    """
    known = make_parser().parse(["--demo"] if args.demo else ["--config", args.config] if args.config else [])
    words = ["--architecture", best_path(args)]
    for name in ("data_dir", "loader", "memory_gb", "workers", "cache", "seed"):
        if getattr(args, name) != getattr(known, name):
            words += [flag(name), str(getattr(args, name))]
    text = command("scratch.py", Run.of(vars(args)), args.own, *words)
    sections = read_yaml(args.config) if args.config else {}  # with --demo, demo.yml
    if any("iterations" in sections.get(name, {}) for name in ("common", "scratch")):
        return text
    advice = "ImageNet's default 300,000 iterations of 1,024 images: choose --iterations, --batch-size and --lr"
    return f"{text}\n  ({advice})"


def best_path(args):
    return os.path.join(args.out, "checkpoints", "best.json")


def main(args):
    """Checks, prepares, runs and reports the search; returns the best candidate's result."""
    if args.resume and not has_search(args.out):
        what = f"--resume: there is no search in {args.out}"
        raise UserError(f"{what}; name the --out of one, or leave --resume out to start a search")
    out = output_folder(args.out).resolve()
    with hold_lock(state_path(out).with_name("search.lock")):
        search = check(args, out)
        prepare(search, args, out)
        run(search, args, out)
        state = read_state(out)
        if search.latency and state["confirmations"] and unconfirmed(state):
            return None  # a warning says what it waits for
        if state["confirmations"] and not state["best"]:
            page = write_report(out)
            raise UserError(
                f"none of the best candidates holds the limit on latency when measured: see {page}; raise it"
            )
        found = SearchResults(out)
        report(found, args)
        log.info("report: %s", write_report(out))
        return found.winner


if __name__ == "__main__":
    run_script(main, parse_args)

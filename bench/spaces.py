"""How well does a supernet rank the networks of my space? Kendall's tau by training rules and scores.

    python -m bench.spaces FILE                              30 random candidates trained alone, and two supernets
    python -m bench.spaces FILE --jobs 10 --seconds 240      ten processes at a time; ends after four minutes
    python -m bench.spaces FILE --own examples/rules.py --rules spos fair sandwich half-0+half-1
    python -m bench.spaces FILE --truth data/nas-bench-macro.json.xz --candidates 600      nothing is trained alone

FILE has a space, and the settings of supernet.py and scratch.py; their flags, such as --data-dir, are taken too.
Candidates are uniform among those under the limit of the file, by default that of a search. The first ones are trained
again with another seed: the standard deviation of true accuracies should be at least twice that between two trainings.
A supernet of each rule gets the CPU-seconds that --steps of the paper's rule take; rules joined by + share them, and
each scores the candidates that it `trains` (see examples/rules.py). A --truth is the published table of NAS-Bench-Macro
or a JSON file with "rows" of architecture, seed and acc1, such as bench/results/demo_truth.json.

Each result is a line of results.jsonl in a folder below --out: the same command resumes, and asked for more, does the
rest. It ends with a page, report.md in that folder, also of what there is by then.
"""

import argparse
import hashlib
import json
import math
import pathlib
import random
import statistics
import time

import numpy as np
import torch

import scratch
import supernet
import tester
import utils
from bench import macro, study
from images import bundled
from images.dataset import names_hash, scan, training_plan
from network import ShuffleNetV2OneShot
from settings.fields import count
from space import own
from space.limits import make_bounds
from space.own import REGISTRIES
from training.evaluation import evaluate, open_evaluation
from training.start import Start
from training.step import Step, find_rule

RESULTS = study.RESULTS / "spaces.jsonl"  # the project's own studies; read, not written
OUT = study.ROOT / "studies"
if (study.ROOT / "demo" / "spaces").exists():  # where studies were before
    OUT = study.ROOT / "demo" / "spaces"
CANDIDATES = 30
REPEATED = 10
PAPER = "spos"
SCORES = {"top-1": lambda row: row["acc1"], "loss": lambda row: -math.inf if row["loss"] is None else -row["loss"]}
ROUNDS, EACH = 24, 4  # measured steps of a rule, in turns with the paper's: a quarter of them first, to warm up


class Study:
    """What a settings file says: its space, its limits, its candidates. `more` are flags of the commands.

    `truth` is a file of accuracies, by default those of `candidates` that are trained, `repeats` of them twice.
    """

    def __init__(self, path, more=(), out=OUT, own_file=None, truth=None, candidates=None, repeats=REPEATED):
        self.path = pathlib.Path(path).resolve()
        self.name = self.path.stem
        self.out = out
        self.without_flags = ["--demo"] if self.path == utils.HERE / "demo.yml" else ["--config", str(self.path)]
        self.without_flags += ["--own", str(pathlib.Path(own_file).resolve())] if own_file else []
        self.words = [*self.without_flags, *more]
        args = scratch.parse_args(self.words)
        if args.demo:
            bundled.unpack(args.data_dir)
        data_dir = pathlib.Path(args.data_dir).resolve()
        space = scratch.space_of(args, args.input_size, len(scan(data_dir / "val").classes))
        content = utils.read_yaml(path)
        search = content.get("search", {})
        limits = [search["limit"]] if isinstance(search.get("limit"), str) else search.get("limit", ())
        self.space = own.with_costs(space, {str(text).partition("=")[0] for text in limits})
        self.bounds = make_bounds(self.space, limits, search.get("flops-limit"))
        self.iterations = args.iterations
        self.training = supernet.parse_args(self.words)
        self.steps = self.training.iterations
        self.key = {
            "study": self.name,
            "space": self.space.to_dict(),
            "settings": {name: content[name] for name in ("common", "supernet", "scratch") if name in content},
        } | ({"flags": list(more)} if more else {})
        bundled_or_made = data_dir.is_relative_to(utils.HERE / "data")
        if not (bundled_or_made or self.folder().exists()):  # a study of before goes by its settings alone
            names = [name for part in ("train", "val") for name in scan(data_dir / part).paths]
            self.key |= {"images": [str(data_dir), names_hash(names)], "tester": content.get("tester")}
        self.repeats = repeats
        self.given = truth and read_truth(truth, self.space)
        known = list(dict.fromkeys(tuple(row["architecture"]) for row in self.given or ()))
        if truth and (candidates or 0) > len(known):
            raise utils.UserError(f"--candidates {candidates}: {truth} has {len(known)}")
        if truth:
            self.candidates = random.Random(0).sample(known, candidates) if candidates else known
        else:
            self.candidates = self.legal(candidates or CANDIDATES)

    @property
    def digest(self):
        """Of all that its results depend on."""
        return hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:16]

    def folder(self, out=None):
        """Of the commands' outputs, another one when the settings have changed."""
        return (out or self.out) / f"{self.name}-{self.digest[:8]}"

    def legal(self, n, seed=0):
        """`n` different candidates, uniform among the legal ones."""
        return study.random_legal(self.space, self.bounds, n, seed)

    def rows(self, kind="training"):
        """The results of this study: those of the project, and those below `out`."""
        rows = [row for file in (RESULTS, self.folder() / "results.jsonl") for row in study.lines(file)]
        flags = self.key.get("flags")
        same = [row for row in rows if self.key.items() <= row.items() and row.get("flags") == flags]
        return [row for row in same if row["kind"] == kind]

    def truth(self):
        """The trainings of the candidates, [{"architecture", "acc1"}]."""
        wanted = set(self.candidates)
        return [row for row in self.given or self.rows() if tuple(row["architecture"]) in wanted]

    def scored(self):
        """{(seed, rule, steps): row} of the supernets that have scored all candidates which they train."""
        found = {}
        for row in self.rows("supernet"):
            rule, scored = row.get("rule", PAPER), {tuple(score["architecture"]) for score in row["scores"]}
            same = rule in REGISTRIES["rule"] and row.get("code", "") == own.hash_of("rule", rule)
            if same and not row.get("heldout") and scored.issuperset(self.trained_by(rule)):
                found[row["seed"], rule, row["steps"] or self.steps] = row
        return found

    def trained_by(self, rule):
        """The candidates that a rule trains: with a `trains(space, candidate)` of its own, it may leave some out."""
        trains = getattr(find_rule(rule), "trains", lambda *_: True)
        return [c for c in self.candidates if trains(self.space, self.space.canonical(c))]

    def done(self):
        """The keys of its tasks that have results."""
        trained = [["training", row["architecture"], row["seed"]] for row in self.rows()]
        return [[self.name, *key] for key in trained + [["supernet", *key] for key in self.scored()]]

    def keep(self, kind, row):
        row = {"kind": kind, **self.key, **row, "versions": utils.versions(), "commit": utils.commit()}
        study.add_line(self.folder() / "results.jsonl", row)

    def tested(self, folder):
        """The settings of tester.py for the supernet in a folder: of the flags, those that it has."""
        args = tester.parse_args([*self.without_flags, "--out", str(folder), "--threads", "1"])
        plain = vars(supernet.parse_args(self.without_flags))
        given = {name: value for name, value in vars(self.training).items() if value != plain[name]}
        return argparse.Namespace(**vars(args) | {name: given[name] for name in given.keys() & vars(args).keys()})

    # --- its tasks --------------------------------------------------------------------------------------------

    def trainings(self, out=None):
        """The Tasks [study, "training", candidate, seed]: all candidates, then the first ones with another seed."""
        if self.given:
            return
        for candidate, seed in [(c, 0) for c in self.candidates] + [(c, 1) for c in self.candidates[: self.repeats]]:
            folder = self.folder(out) / "alone" / f"{''.join(map(str, candidate))}-{seed}"
            key = [self.name, "training", list(candidate), seed]
            words = [*self.words, "--seed", seed, *study.of_steps(self.iterations)]
            yield study.retraining(key, words, self.space.to_architecture(candidate), folder)

    def supernet(self, seed, out=None, rule=PAPER, steps=None):
        """The Task [study, "supernet", seed, rule, steps]; `steps` are by default those of the file."""
        words, name = [*self.words, "--seed", seed, *study.ONE_THREAD, "--rule", rule], str(seed)
        if rule != PAPER:
            name = f"{rule}-{own.hash_of('rule', rule)[:8]}-{name}"
        if steps and steps != self.steps:
            warmup = round(self.training.warmup * steps / self.steps)  # the learning rate keeps its course
            words += ["--iterations", steps, "--warmup", warmup, "--val-every", steps]
            name += f"-{steps}"
        command = study.Command("supernet.py", words, self.folder(out) / name)
        return study.Task([self.name, "supernet", seed, rule, steps or self.steps], command)

    def keep_task(self, task):
        """Keeps what a task of the two kinds has found: of a supernet, the scores of the candidates that it trains."""
        kind, *key = task.key[1:]
        if kind == "training":
            return self.keep(kind, task.numbers() | {"seed": key[1]})
        seed, rule, steps = key
        args = self.tested(task.command.folder)
        model, calibration, validation = open_evaluation(vars(args))
        wanted = self.trained_by(rule)
        forms = map(self.space.canonical, wanted)  # as a search evaluates them
        measured = evaluate(model, list(forms), calibration, validation, args.bn)
        scores = [{"architecture": c, "acc1": m["acc1"], "loss": m["loss"]} for c, m in zip(wanted, measured)]
        row = {"seed": seed, "rule": rule, "code": own.hash_of("rule", rule), "steps": steps,
               "n_images": measured[0]["n_images"] if measured else 0}  # fmt: skip
        self.keep(kind, row | {"cpu_seconds": task.command.cpu_seconds, "scores": scores})

    def supernets(self, rules, seeds, steps):
        """The Tasks of all supernets, seed by seed."""
        parts = dict.fromkeys(part for rule in rules for part in self.share(rule, steps).items())
        return [self.supernet(seed, rule=part, steps=n) for seed in range(seeds) for part, n in parts]

    def share(self, rule, steps):
        """{part: its steps} of a rule whose parts share the CPU-seconds of `steps` of the paper's rule."""
        parts = rule.split("+")
        return {part: max(1, round(steps / len(parts) / self.cost(part))) for part in parts}

    def cost(self, rule):
        """How many steps of the paper's rule cost as much CPU time as one of this rule; measured once."""
        if rule == PAPER:
            return 1.0
        this = {"rule": rule, "code": own.hash_of("rule", rule)}
        known = [row["cost"] for row in self.rows("cost") if this.items() <= row.items()]
        if not known:
            known = [relative_cost([*self.words, *map(str, study.ONE_THREAD)], self.space, rule)]
            self.keep("cost", this | {"cost": known[0]})
        return known[0]


def relative_cost(words, space, rule):
    """CPU time (on a GPU: time) of a step of a rule over that of the paper's: medians of turns, with their images."""
    args = supernet.parse_args(words)
    start = Start("supernet", vars(args))
    loader = start.loader("supernet", augment=True)
    batches = loader.batches(training_plan(len(loader.images), args.batch_size, 0, 0, 2 * ROUNDS * EACH))
    steps = [Step(ShuffleNetV2OneShot(space=space).train(), start.training, start.device, 0, r) for r in (PAPER, rule)]
    clock = time.perf_counter if start.device.type == "cuda" else time.process_time
    spent, rng = ([], []), random.Random(0)
    for turn in range(ROUNDS):
        for step, seconds in zip(steps, spent):
            began = clock()
            for i in range(EACH):
                step.train_one_step(1 + turn * EACH + i, *next(batches), space.random_candidate(rng))
            study.synchronize(start.device)
            seconds.append(clock() - began)
    paper, other = (statistics.median(seconds[ROUNDS // 4 :]) for seconds in spent)
    return round(other / paper, 3)


def read_truth(path, space):
    """The rows {"architecture", "acc1"} of a file of accuracies; of networks that the demo's trained longest."""
    if pathlib.Path(path).name == macro.TRUTH.name:
        published = macro.load_truth(path)
        found = [(network, acc1) for network in macro.some_distinct() for acc1 in published[network]["test_acc"]]
        rows = [{"architecture": [*map(int, network)], "acc1": acc1} for network, acc1 in found]
    else:
        content = utils.read_json(path)
        try:
            longest = max(row.get("iterations", 0) for row in content["rows"])
            rows = [row for row in content["rows"] if row.get("iterations", 0) == longest and "acc1" in row]
            rows = [row for row in rows if row["architecture"] != content.get("largest")]
        except (KeyError, TypeError, AttributeError, ValueError):
            raise utils.UserError(f"--truth {path}: no JSON with rows of architecture, seed and acc1") from None
    for row in rows:
        space.check(row["architecture"])
    return rows


# --- the page -------------------------------------------------------------------------------------------------


def regret(predictors, truth):
    """[by how much the candidate that is picked is worse than the best, low, high]: mean over `predictors`."""
    *rows, true = np.array([*predictors, truth], float)

    def statistic(networks):
        best = true[networks].max()
        return statistics.fmean(best - true[networks][row[networks].argmax()] for row in rows)

    return study.bootstrap(statistic, len(true))


def regret_of_random(truth, k):
    """As `regret`, of the best of `k` random candidates that are trained alone, in the mean over all draws."""
    true, n = np.array(truth, float), len(truth)
    shares = np.array([math.comb(i, k - 1) / math.comb(n, k) for i in range(n)])  # the i lower ones have the rest

    def statistic(networks):
        ordered = np.sort(true[networks])
        return float(ordered[-1] - shares @ ordered)

    return study.bootstrap(statistic, n)


def gain(predictors, others, truth):
    """The paired difference of tau, with its interval; "none" if that holds 0, or if the seeds differ in its sign."""
    mean, low, high = study.agreement(predictors, truth, others)
    signs = {np.sign(study.tau(a, truth) - study.tau(b, truth)) for a, b in zip(predictors, others)}
    known = (low > 0 or high < 0) and len(signs) == 1
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" if known else "none"


def noise(accuracies):
    """(standard deviation between candidates, between trainings of one, tau of two trainings); nan if unknown."""
    several = [acc1 for acc1 in accuracies if len(acc1) > 1]
    within = statistics.fmean(map(statistics.variance, several)) ** 0.5 if several else math.nan
    tau = study.tau(*zip(*(acc1[:2] for acc1 in several))) if len(several) > 2 else math.nan
    return statistics.stdev(acc1[0] for acc1 in accuracies), within, tau


def rows_of_rules(of, rules, scores, seeds, steps, networks, true):
    """The rows of the table for each rule and score, and the mean CPU-seconds of the first rule's supernets."""
    supernets, first, rows, costs = of.scored(), {}, [], []
    for rule in rules:
        share, found, seconds = of.share(rule, steps), {}, []
        for seed in range(seeds):
            parts = [supernets.get((seed, *part)) for part in share.items()]
            if all(parts):
                found[seed] = {tuple(score["architecture"]): score for part in parts for score in part["scores"]}
                seconds.append(sum(part["cpu_seconds"] for part in parts))
        if not found:
            continue
        costs.append(statistics.fmean(seconds))
        top1 = ", ".join(f"{statistics.fmean(one[c]['acc1'] for c in networks):.1f}" for one in found.values())
        for score in scores:
            values = {seed: [SCORES[score](one[c]) for c in networks] for seed, one in found.items()}
            if rule == rules[0]:
                first[score] = values
            pairs = [(values[seed], before) for seed, before in first.get(score, {}).items() if seed in values]
            more = gain(*zip(*pairs), true) if pairs and rule != rules[0] else ""
            cells = more, top1, " + ".join(map(str, share.values())), f"{costs[-1]:.0f}"
            rows.append(row(f"{rule}, {score}", [*values.values()], true, *cells))
    return rows, costs[0] if costs else None


def row(name, predictors, true, *cells):
    """A row of the table: tau, regret, tau of each list of predictors, and more cells."""
    seeds = ", ".join(f"{study.tau(one, true):.2f}" for one in predictors)
    return [name, study.interval(study.agreement(predictors, true)), study.interval(regret(predictors, true)),
            seeds if len(predictors) > 1 else "", *cells]  # fmt: skip


def page(of, rules, scores, seeds, steps):
    """The page of a Study, as Markdown, of what is done by now."""
    trained = of.truth()
    accuracies = {c: [one["acc1"] for one in trained if tuple(one["architecture"]) == c] for c in of.candidates}
    accuracies = {c: found for c, found in accuracies.items() if found}
    head = f"# How well a supernet ranks {of.name}\n"
    if len(accuracies) < 2:
        return f"{head}\nFewer than two candidates are trained: there is nothing to compare yet.\n"
    networks, true = list(accuracies), list(map(statistics.fmean, accuracies.values()))
    rows, seconds = rows_of_rules(of, rules, scores, seeds, steps, networks, true)
    costs = {"FLOPs": of.space.flops, "parameters": of.space.params}
    for name, cost in costs.items():
        values = list(map(cost, networks))
        rows.append(row(f"{name}, {max(values) / min(values):.1f}-fold", [values], true))
    rows.append(["a random candidate", "", study.interval(regret_of_random(true, 1))])
    each = [one["cpu_seconds"] for one in trained if "cpu_seconds" in one]
    training = statistics.median(each) if each else math.nan
    if each and seconds:
        n = min(len(true), max(1, round(seconds / training)))
        name = f"random search: the best of {n}, trained alone"
        rows.append([name, "", study.interval(regret_of_random(true, n)), *4 * [""], f"{n * training:.0f}"])
    between, within, tau = noise(accuracies.values())
    unknown = " nan: not known." if math.isnan(training + within + tau) else ""
    titles = ("ranked by", "tau", "regret of the pick", "tau by seed", f"gain in tau over {rules[0]}",
              "mean top-1 in the supernet, by seed", "steps", "CPU-seconds")  # fmt: skip
    return f"""{head}
{len(true)} candidates, {sum(len(found) > 1 for found in accuracies.values())} of them trained more than once: top-1 \
{statistics.fmean(true):.2f} ({min(true):.2f} to {max(true):.2f}).{unknown}

- CPU-seconds of a training, median: {training:.0f}
- standard deviation between candidates: {between:.2f}; between trainings of one: {within:.2f}
- tau of two trainings: {tau:.2f}

{study.table(titles, [cells + [""] * (len(titles) - len(cells)) for cells in rows])}

Tau is Kendall's. The regret of a pick is by how many points of top-1 it is below the best of these candidates. 95%
intervals: bootstrap over the candidates, of gains paired; "none" if it holds 0, or if the seeds differ in the sign.
"""


def parse_args(argv=None):
    parser = study.parser(__doc__, {"--jobs": 1, "--seconds": 1e9, "--out": OUT, "--seeds": 2})
    parser.add_argument("file", metavar="FILE", help="settings, with a space")
    parser.add_argument("--own", metavar="FILE", help="own operations and rules")
    parser.add_argument("--rules", nargs="+", default=[PAPER], help=f"of the supernets (default: {PAPER})")
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=SCORES, help="default: all")
    parser.add_argument("--steps", type=count(), help="of a supernet by the paper's rule (default: of the file)")
    text = f"default: {CANDIDATES}, or all of --truth"
    parser.add_argument("--candidates", type=count(2, 1_000_000), metavar="N", help=text)
    text = f"candidates that are trained twice (default: {REPEATED})"
    parser.add_argument("--repeats", type=count(0), default=REPEATED, metavar="N", help=text)
    parser.add_argument("--truth", type=pathlib.Path, metavar="FILE", help="accuracies that are known")
    options, more = parser.parse_known_args(argv)
    return argparse.Namespace(**vars(options), more=more)


def main(options):
    torch.set_num_threads(1)
    of = Study(options.file, options.more, options.out.resolve(), options.own, options.truth, options.candidates,
               options.repeats)  # fmt: skip
    for rule in options.rules:
        if {c for part in rule.split("+") for c in of.trained_by(part)} != set(of.candidates):
            raise utils.UserError(f"--rules {rule}: does not train all candidates; join by + those that share them")
    steps = options.steps or of.steps
    with study.interruptible():
        tasks = [*of.trainings(), *of.supernets(options.rules, options.seeds, steps)]

        def keep(task):
            of.keep_task(task)
            print(f"{task.key}: kept", flush=True)

        failed = study.run(lambda: tasks, of.done, keep, options.jobs, time.time() + options.seconds)
        text = page(of, options.rules, options.scores, options.seeds, steps)
        with utils.atomic_write(of.folder() / "report.md") as file:
            file.write(text)
        print(f"{text}\n{of.folder() / 'report.md'}")
        if failed:
            raise utils.UserError(f"{len(failed)} of the trainings failed, see above; the same command repeats them")


if __name__ == "__main__":
    utils.run_script(main, parse_args)

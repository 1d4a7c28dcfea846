"""How close evolution comes to the best candidate, on tables with a known optimum: `python -m bench.evolution`.

A table gives every candidate of the paper's space (20 blocks, 4 operations) a reward that stands for its top-1 in the
supernet, in thousandths of a percentage point; candidates over 330M FLOPs are illegal.

    additive   a reward for each operation of each block: a gain that grows with the kernel, and as much at random
    pairwise   additive, plus a term for each pair of operations of adjacent blocks
    noisy      additive, measured with an error that depends on seed and candidate only

Each method evaluates 1,000 different candidates a seed. On the additive table, evolution with more generations (of 50
candidates; the official code evaluates 21) and with more parents is measured as well. The regret of a search is the
reward of the optimum minus the true reward of the candidate that measured best, in percent of the range from the
worst to the best legal candidate. Prints a Markdown table and writes bench/results/evolution.json. `--make-tables`
writes bench/evolution_tables.json, reproducibly.
"""

import itertools
import random
import statistics
import time

import utils
from bench import study
from settings.fields import count
from space.evolution import Evolution
from space.search_space import SearchSpace

SPACE = SearchSpace()
LIMIT = 330_000_000
TABLES = study.ROOT / "bench" / "evolution_tables.json"
MEAN = 60_000  # mean reward of uniform candidates
SD = 1_000  # standard deviation of the additive rewards of uniform candidates
PAIRS_SD = 500  # standard deviation of the sum of all pair terms
NOISE_SD = 220  # binomial standard deviation of an accuracy of 60% on 50,000 images
KERNEL_GAIN = (0.0, 0.5, 0.8, 0.9)  # of 3x3, 5x5, 7x7, xception; random variation has standard deviation 1
LIMIT_COSTS = 0.01  # minimum loss of reward by the FLOPs limit, as a share of the range; else the limit hardly matters
OFFICIAL = {"population": 50, "select": 10, "mutation": 25, "crossover": 25, "mutation_prob": 0.1, "generations": 20}
METHODS = {
    "evolution": OFFICIAL,
    "random search": OFFICIAL | {"mutation": 0, "crossover": 0},
    "mutation alone": OFFICIAL | {"mutation": 50, "crossover": 0},
}
MORE = {  # on the additive table only: what brings 95 of 100 seeds within 1% of the optimum
    "evolution, 21 generations": OFFICIAL | {"generations": 21},
    "evolution, 25 generations": OFFICIAL | {"generations": 25},
    "evolution, 30 generations": OFFICIAL | {"generations": 30},
    "evolution, 20 parents": OFFICIAL | {"select": 20},
}

# --- tables --------------------------------------------------------------------------------------------------


def reward(table, candidate):
    """The true reward."""
    rows = sum(row[choice] for row, choice in zip(table["rewards"], candidate))
    return MEAN + rows + sum(pair[a][b] for pair, (a, b) in zip(table["pairs"], itertools.pairwise(candidate)))


def measured(table, candidate, seed):
    """The reward that a search with this seed measures."""
    error = random.Random(f"{seed} {candidate}").gauss(0, table["noise_sd"]) if table["noise_sd"] else 0
    return reward(table, candidate) + error


def extreme(table, costs, limit, sign):
    """The candidate of the highest (sign 1) or lowest (-1) reward whose costs, one per block, sum to at most `limit`.

    Exact dynamic programming: block by block and for each choice of the last block, keeps the prefixes that are
    Pareto-optimal in cost and reward; cost and reward of what follows depend on that choice only.
    """
    rows = table["rewards"]
    pairs = table["pairs"]
    remaining = [sum(map(min, costs[block + 1 :])) for block in range(len(costs))]
    fronts = {None: [(0, 0, ())]}
    for block, row in enumerate(rows):
        following = {}
        for choice, gain in enumerate(row):
            prefixes = []
            for last, front in fronts.items():
                change = sign * (gain + (pairs[block - 1][last][choice] if block and pairs else 0))
                prefixes += [(cost + costs[block][choice], value + change, (*p, choice)) for cost, value, p in front]
            following[choice] = pareto(prefixes, limit - remaining[block])
        fronts = following
    return max(itertools.chain(*fronts.values()), key=lambda end: end[1])[2]


def pareto(points, limit):
    """The points (cost, value, ...) up to the limit of more value than every cheaper one, by increasing cost."""
    front = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if point[0] <= limit and (not front or point[1] > front[-1][1]):
            front.append(point)
    return front


def with_extremes(rewards, pairs=(), noise_sd=0):
    """A table with its best and worst legal candidates, and the best one without the limit."""
    table = {"rewards": rewards, "pairs": list(pairs), "noise_sd": noise_sd}
    limit = LIMIT - SPACE.cost_rows("flops")[1]
    found = {
        "best": extreme(table, SPACE.costs.flops, limit, 1),
        "worst": extreme(table, SPACE.costs.flops, limit, -1),
        "best_without_limit": extreme(table, SPACE.costs.flops, SPACE.cost_range("flops")[1], 1),
    }
    return table | {
        name: {"architecture": list(c), "flops": SPACE.flops(c), "reward": reward(table, c)}
        for name, c in found.items()
    }


def scaled(groups, sd):
    """Scales groups of numbers to integers of mean 0; the sum of a random one of each has standard deviation `sd`."""
    factor = sd / sum(map(statistics.pvariance, groups)) ** 0.5
    return [[round(factor * (value - statistics.fmean(group))) for value in group] for group in groups]


def make_tables(seed):
    """Returns the three tables of a seed."""
    rng = random.Random(seed)
    importance = [rng.uniform(0.5, 1.5) for _ in range(SPACE.n_blocks)]
    rewards = scaled([[weight * (gain + rng.gauss(0, 1)) for gain in KERNEL_GAIN] for weight in importance], SD)
    n = len(KERNEL_GAIN)
    terms = scaled([[rng.gauss(0, 1) for _ in range(n * n)] for _ in range(SPACE.n_blocks - 1)], PAIRS_SD)
    pairs = [[group[n * i : n * (i + 1)] for i in range(n)] for group in terms]
    additive = with_extremes(rewards)
    return {"additive": additive, "pairwise": with_extremes(rewards, pairs), "noisy": additive | {"noise_sd": NOISE_SD}}


def reward_range(table):
    return table["best"]["reward"] - table["worst"]["reward"]


def limit_matters(table):
    return table["best_without_limit"]["reward"] - table["best"]["reward"] >= LIMIT_COSTS * reward_range(table)


def committed_tables():
    """The tables of the first seed with which the limit matters on the additive table (one in three does)."""
    seed, tables = next((s, t) for s, t in enumerate(map(make_tables, range(100))) if limit_matters(t["additive"]))
    return {"seed": seed, "flops_limit": LIMIT, "tables": tables}


# --- searches ------------------------------------------------------------------------------------------------


def regret(table, seed, settings):
    """Percent of the table's range by which a search's winner falls short of the optimum."""
    evolution = Evolution.from_settings(SPACE, {**settings, "flops_limit": LIMIT, "seed": seed})
    while population := evolution.ask():
        evolution.tell({candidate: measured(table, candidate, seed) for candidate in population})
    winner, _ = evolution.best
    return 100 * (table["best"]["reward"] - reward(table, winner)) / reward_range(table)


def methods(table_name):
    """The methods measured on a table, name -> settings of the evolution."""
    return METHODS | (MORE if table_name == "additive" else {})


def summary(regrets):
    return {
        "mean": statistics.fmean(regrets),
        "median": statistics.median(regrets),
        "under_1_percent": sum(r < 1 for r in regrets) / len(regrets),
        "exact": sum(r == 0 for r in regrets) / len(regrets),
    }


def parse_args(argv=None):
    parser = study.parser(__doc__, {"--results": study.RESULTS / "evolution.json"})
    parser.add_argument("--make-tables", action="store_true", help="write the tables only")
    text = "searches of each table and method (default: 100)"
    parser.add_argument("--seeds", type=count(), default=100, metavar="N", help=text)
    return parser.parse_args(argv)


def main(options):
    if options.make_tables:
        return utils.write_json(TABLES, committed_tables())
    committed = study.read(TABLES)
    results = {}
    head = ("table", "method", "mean regret, % of the range", "median", "under 1%", "optimum found", "ms a search")
    print(study.table(head, []))
    for name, method in [(t, m) for t in committed["tables"] for m in methods(t)]:
        table = committed["tables"][name]
        start = time.perf_counter()
        regrets = [regret(table, seed, methods(name)[method]) for seed in range(options.seeds)]
        row = summary(regrets) | {"seconds": time.perf_counter() - start, "regrets": [round(r, 4) for r in regrets]}
        results.setdefault(name, {})[method] = row
        shares = (f"{row[key]:.0%}" for key in ("under_1_percent", "exact"))
        ms = f"{1000 * row['seconds'] / options.seeds:.0f}"
        print(study.line((name, method, f"{row['mean']:.2f}", f"{row['median']:.2f}", *shares, ms)), flush=True)
    settings = {
        "seeds": options.seeds,
        "flops_limit": LIMIT,
        "tables_seed": committed["seed"],
        "methods": METHODS | MORE,
        "range": {name: reward_range(table) for name, table in committed["tables"].items()},
    }
    study.write(options.results, {"settings": settings, "results": results}, indent=1)


if __name__ == "__main__":
    utils.run_script(main, parse_args)

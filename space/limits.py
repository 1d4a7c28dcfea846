"""Limits on the costs of a candidate: which candidates meet them, how others are repaired, which limits can be met.

    bounds    {cost: (low, high)} of costs in settings.subjects.COSTS, or of a user's; None stands for no bound
    excess    by how much a candidate exceeds the limits, in standard deviations of uniform candidates; 0: it is legal

The official search has one limit, on FLOPs.
"""

import functools
import math
import random
import reprlib

import numpy as np

from settings.subjects import COSTS
from utils import UserError

SOLVE_S = 10  # s in which the solver ends
LISTABLE = 1_000_000  # candidates
STEPS = 1000  # most steps of a repair, which would never end where all that meet the limits are banned
KICKS = 3  # times that a stuck repair redraws some blocks
SEARCHES = 10  # random candidates that are repaired before limits on a function of a candidate are refused
# The limit in the paper's space, and the share of its candidates that meet it, which is the limit in other spaces.
OFFICIAL_LIMIT = "330M", "59%"
EXAMPLES = "flops=330M, params=80k, latency=8ms, flops=290M:330M, flops=59%"
LITTLE = 1.5  # candidates that differ by less than this factor in all costs leave little to find


def read_limits(space, texts):
    """The bounds in texts such as "flops=290M:330M"; of several texts for one cost, the last one counts.

    Raises UserError, naming the text, if one is not valid.
    """
    bounds = {}
    for text in texts:
        name, _, value = str(text).partition("=")
        known = name in (*COSTS, *space.costs.own)
        ends = value.split(":")
        if not known or len(ends) > 2 or not any(ends):
            own = "" if known or not value else f"; costs of --own: {', '.join(space.costs.own) or 'none of that name'}"
            raise UserError(f"--limit {reprlib.repr(text)}: not of a form such as {EXAMPLES}{own}")
        if name == "latency" and not space.costs.latency:
            raise UserError("--limit latency: no table of latencies")
        flag = f"--limit {name}"
        low, high = (space.cost_value(name, end, flag) if end else None for end in (ends if ends[1:] else ("", value)))
        if None not in (low, high) and low > high:
            raise UserError(f"--limit {reprlib.repr(text)}: the first bound is above the second one")
        bounds[name] = low, high
    return bounds


def make_bounds(space, texts=(), flops_limit=None):
    """The bounds in texts such as "flops=290M:330M" and in flops_limit ("330M"); without any, the official one."""
    official, share = OFFICIAL_LIMIT
    bounds = read_limits(space, texts)
    if flops_limit is not None:
        if "flops" in bounds:
            raise UserError("--flops-limit and --limit flops: leave one of them out")
        bounds["flops"] = None, space.cost_value("flops", flops_limit, "--flops-limit")
    return bounds or {"flops": (None, space.cost_value("flops", official if space.is_papers else share))}


def bounds_of(settings):
    """The bounds in the settings of a search; an upper bound on FLOPs alone is stored as `flops_limit`."""
    if "limits" in settings:
        return {name: tuple(ends) for name, ends in settings["limits"].items()}
    return {"flops": (None, settings["flops_limit"])}


def as_before(space, bounds, settings):
    """The bounds of a search that is resumed: one of before, with these settings, keeps what 100% was then, and the
    share of a cost of its own."""
    before = bounds_of(settings) if settings.keys() & {"limits", "flops_limit"} else {}
    found = dict(bounds)
    for name in filter(space.has_table, bounds.keys() & before.keys()):
        now, then = space.cost_range(name)[1], space.grid_quantile(name, 1)
        near = space.grid_error(name) if name in space.costs.own else 0
        ends = zip(bounds[name], before[name])
        found[name] = tuple(
            old if (end, old) == (now, then) or (None not in (end, old) and abs(end - old) < near) else end
            for end, old in ends
        )
    return found


def as_settings(bounds):
    """The settings that `bounds_of` reads."""
    if bounds.keys() == {"flops"} and bounds["flops"][0] is None:
        return {"flops_limit": bounds["flops"][1]}
    names = sorted(bounds, key=(*COSTS, *bounds).index)
    return {"limits": {name: list(bounds[name]) for name in names}}


def shown(name, cost, own=None):
    """A cost with its unit, of four digits: "329.9M", "21.75k", "8.120 ms", "0.0573 ms"; `own` are those of Costs."""
    if own and name in own:
        return f"{cost / own[name].scale:.4g} {own[name].unit}".strip()
    if name == "latency":
        return f"{milliseconds(cost / 1e6)} ms"
    value, unit = (cost / 1e6, "M") if cost >= 999_950 else (cost / 1e3, "k")
    return f"{value:.{3 if value < 9.9995 else 2 if value < 99.995 else 1}f}{unit}"


def milliseconds(ms):
    """A latency as a number: three digits behind the point, below a millisecond three that are significant."""
    return f"{ms:.3f}" if ms >= 1 else f"{ms:#.3g}"


def describe(bounds, own=None):
    """The bounds in words: "flops 290.0M to 330.0M, latency up to 8.000 ms"; `own` are the own costs of Costs."""
    words = []
    for name, (low, high) in bounds.items():
        ends = [shown(name, end, own) if end is not None else None for end in (low, high)]
        between = f"{ends[0]} to {ends[1]}" if all(ends) else f"up to {ends[1]}" if ends[1] else f"from {ends[0]}"
        words.append(f"{name} {between}")
    return ", ".join(words)


def known_costs(space):
    """{cost: (lowest, highest) of any candidate} of the costs that have a table in a space: latency may have none."""
    names = [name for name in COSTS if name != "latency" or space.costs.latency]
    return {name: space.cost_range(name) for name in [*names, *filter(space.has_table, space.costs.own)]}


def offer(space, runtime="torch"):
    """What a space offers, in words: the ranges of all known costs, and whether these leave little to find.

    `runtime` is that of the space's latencies.
    """
    costs = known_costs(space)
    names = {"flops": "FLOPs", "params": "parameters", "latency": f"latency in {runtime}"}
    ends = {name: [shown(name, end, space.costs.own) for end in costs[name]] for name in costs}
    words = [f"{names.get(name, name)} {low} to {high}" for name, (low, high) in ends.items()]
    text = f"all candidates at {space.input_size} px with {space.n_classes} classes: {', '.join(words)}"
    if all(high < LITTLE * low for low, high in costs.values()):
        text += f"; candidates differ by less than a factor of {LITTLE} in all of these, which leaves little to find"
    return text


def idle_limits(space, texts=(), flops_limit=None):
    """A line for each limit that excludes no candidate, of those that `make_bounds` takes; "100%" means to."""
    said = {str(text).partition("=")[0]: text for text in texts}
    if flops_limit is not None:
        said["flops"] = f"flops={flops_limit}"
    lines = []
    bounds = read_limits(space, said.values())
    for name in bounds:
        if name not in bounding(space, bounds) and not str(said[name]).endswith("100%"):
            least, most = (shown(name, end, space.costs.own) for end in space.cost_range(name))
            found = f"they cost {least} to {most}"
            lines.append(f"the limit {said[name]} excludes no candidate of this space: {found}")
    return lines


def share_text(share):
    """The share of candidates that limits leave, in words."""
    return f"{share:.1%} of all candidates" if share >= 0.001 else "less than 0.1% of all candidates"


def bounding(space, bounds):
    """The names of the bounds that exclude a candidate of a space, or may."""
    found = []
    for name, (low, high) in bounds.items():
        least, most = space.cost_range(name) if space.has_table(name) else (-math.inf, math.inf)
        if (low or 0) > least or (high or math.inf) < most:
            found.append(name)
    return found


def _solve(aims, sign, costs, low, high, gap=0):
    """The choices of `Limits.optimum`, to a share `gap`: `sign` times the sum of `aims` is to be low."""
    from scipy.optimize import LinearConstraint, milp  # here, because it takes half a second
    from scipy.sparse import csr_array

    sizes = [len(row) for row in aims]
    n = sum(sizes)
    blocks = csr_array((np.ones(n), (np.repeat(np.arange(len(sizes)), sizes), np.arange(n))))
    constraints = [LinearConstraint(blocks, 1, 1)]  # one choice each
    for (rows, fixed), least, most in zip(costs, low, high):
        # Costs are whole numbers: half a unit more excludes the same candidates, whatever the solver rounds.
        ends = np.ceil(least) - fixed - 0.5, np.floor(most) - fixed + 0.5
        constraints.append(LinearConstraint(np.concatenate(rows), *ends))
    options = {"mip_rel_gap": gap, "time_limit": SOLVE_S}
    found = milp(sign * np.concatenate(aims), integrality=1, constraints=constraints, options=options).x
    if found is None:
        return None
    return [int(block.argmax()) for block in np.split(found, np.cumsum(sizes)[:-1])]


@functools.lru_cache(maxsize=8)
def _largest(costs, low, high):
    """The choices of `Limits.largest`; FLOPs are the first of `costs`, then come those that are limited.

    Kept, since a search that resumes at its end asks again. The costs of few candidates are listed in milliseconds,
    where the solver takes longer to load.
    """
    (rows, _), *limited = costs
    sizes = [len(row) for row in rows]
    if math.prod(sizes) > LISTABLE or len(sizes) > 30:  # NumPy's most dimensions
        return _solve(rows, -1, limited, low, high, gap=1e-4)
    flops, *totals = (functools.reduce(np.add.outer, map(np.array, rows), np.array(fixed)) for rows, fixed in costs)
    for total, least, most in zip(totals, low, high):
        flops = np.where((least <= total) & (total <= most), flops, -1)
    return [int(i) for i in np.unravel_index(flops.argmax(), sizes)]


class Limits:
    """Limits on the costs of a space's candidates. `banned` candidates are illegal whatever they cost.

    `correction` is the ratio of measured to predicted latency; the bounds on predicted latency are divided by it.
    """

    def __init__(self, space, bounds, correction=1.0, banned=()):
        self.space = space
        self.bounds = bounds
        self.correction = correction
        self.banned = frozenset(banned)
        self.tables = [name for name in bounds if space.has_table(name)]
        self.functions = [name for name in bounds if name not in self.tables]  # any functions of a candidate
        self.costs = [space.cost_rows(name) for name in self.tables]
        ends = [(*bounds[name], correction if name == "latency" else 1) for name in self.tables]
        self.low = [-math.inf if low is None else low / f for low, _, f in ends]
        self.high = [math.inf if high is None else high / f for _, high, f in ends]
        # The standard deviation of each cost of uniform candidates; 1 where all cost the same.
        self.scale = [math.sqrt(sum(float(np.var(row)) for row in rows)) or 1.0 for rows, _ in self.costs]

    @classmethod
    def of_search(cls, space, bounds, confirmations):
        """The limits of a search after all that was measured; see `after`."""
        return functools.reduce(cls.after, confirmations, cls(space, bounds))

    def after(self, row):
        """These limits after a confirmation in the record of a search: measured candidates that break a limit
        are banned, and if all of them do, latency is corrected."""
        broken = {tuple(m["architecture"]) for m in row["measured"] if not m["holds"]}
        return Limits(self.space, self.bounds, row["correction"] or self.correction, self.banned | broken)

    def excess(self, candidate):
        """By how much a candidate exceeds the limits; 0 if it meets all of them."""
        choices = self.space.block_choices(candidate)
        over = 0.0
        for (rows, fixed), low, high, scale in zip(self.costs, self.low, self.high, self.scale):
            cost = fixed + sum(row[choice] for row, choice in zip(rows, choices))
            over += max(low - cost, cost - high, 0) / scale
        for name in self.functions:
            low, high = self.bounds[name]
            cost = self.space.cost(name, candidate)
            if not self.holds(name, cost):
                over += (low - cost if low is not None and cost < low else cost - high) / self._spreads[name]
        return over or float(tuple(candidate) in self.banned)

    @functools.cached_property
    def _spreads(self):
        """The standard deviation of each cost that is a function, of 32 uniform candidates; 1 where these are equal."""
        drawn = [self.space.random_candidate(random.Random(seed)) for seed in range(32)]
        return {name: float(np.std([self.space.cost(name, c) for c in drawn])) or 1.0 for name in self.functions}

    def holds(self, name, cost):
        """Whether a measured cost meets its limit."""
        low, high = self.bounds[name]
        return (low is None or cost >= low) and (high is None or cost <= high)

    def repair(self, candidate, rng):
        """Changes random entries to values that lower the excess, until the candidate is legal.

        If no single change helps, two blocks are changed together (not under a limit on a function of a candidate); if
        that does not help either, some entries are redrawn, up to KICKS times. Returns the last candidate, which may be
        illegal.
        """
        kicks = 0
        for _ in range(STEPS):
            if not (over := self.excess(candidate)):
                break
            if better := self._better(candidate, over, rng):
                candidate = better
            elif kicks < KICKS:
                kicks += 1
                drawn = rng.sample(range(len(candidate)), min(3, len(candidate)))
                candidate = tuple(
                    rng.randrange(n) if i in drawn else choice
                    for i, (choice, n) in enumerate(zip(candidate, self.space.choices))
                )
            else:
                break
        return candidate

    def _better(self, candidate, over, rng):
        """The candidate after a random one of the changes that lower its excess from `over`; None if there is none."""
        moves, totals = self._moves(candidate)
        if self.functions:
            changed = (self._moved(candidate, move) for move in rng.sample(moves, len(moves)))
            return next((c for c in changed if self.excess(c) < over), None)
        if better := np.flatnonzero(self._over(totals) < over).tolist():
            return self._moved(candidate, moves[rng.choice(better)])
        return self._pair(candidate, moves, totals, over, rng)

    @functools.cached_property
    def _tables(self):
        """(all changes of one entry, (entry, value); the block of each; costs of each block's choices as arrays)."""
        moves = [(entry, value) for entry, n in enumerate(self.space.choices) for value in range(n)]
        blocks = np.array([entry % self.space.n_blocks for entry, _ in moves])
        longest = max(self.space.n_choices)
        padded = [[(*row, *[0] * (longest - len(row))) for row in rows] for rows, _ in self.costs]
        return moves, blocks, [np.array(rows, dtype=np.int64) for rows in padded]

    def _moves(self, candidate):
        """(all changes of one entry, the candidate's costs after each: an array (costs, changes))."""
        moves, _, arrays = self._tables
        entries, values = np.array(moves).T
        changed = np.tile(candidate, (len(moves), 1))
        changed[np.arange(len(moves)), entries] = values
        choices = np.array(self.space.block_choices(changed.T))  # (blocks, changes)
        blocks = np.arange(len(choices))[:, None]
        totals = [fixed + array[blocks, choices].sum(axis=0) for array, (_, fixed) in zip(arrays, self.costs)]
        return moves, np.array(totals).reshape(len(totals), len(moves))

    def _over(self, totals):
        """The excess of costs: (costs, ...) -> (...)."""
        over = np.zeros(totals.shape[1:])
        for total, low, high, scale in zip(totals, self.low, self.high, self.scale):
            over = over + np.maximum(np.maximum(low - total, total - high), 0) / scale
        return over

    def _pairs(self, candidate, moves, totals):
        """(excess after every two changes in different blocks: (changes, changes), function from a flat index into
        that array to the changed candidate)."""
        _, block, _ = self._tables
        current = np.array([self.space.cost(name, candidate) for name in self.tables])
        pairs = self._over(totals[:, :, None] + totals[:, None, :] - current[:, None, None])
        pairs[block[:, None] >= block[None, :]] = np.inf

        def changed(index):
            first, second = divmod(index, len(moves))
            return self._moved(self._moved(candidate, moves[first]), moves[second])

        return pairs, changed

    def _pair(self, candidate, moves, totals, over, rng):
        """The candidate after two changes in different blocks, drawn from those that make it legal, else from those
        with an excess below `over`; None if there are none."""
        pairs, changed = self._pairs(candidate, moves, totals)
        found = np.flatnonzero(pairs == 0)
        if not len(found):
            found = np.flatnonzero(pairs < over)
        return changed(int(found[rng.randrange(len(found))])) if len(found) else None

    def neighbours(self, candidate, rng):
        """Yields the legal candidates that differ from a legal one in at most two blocks, in random order.

        Where a function of a candidate is limited, some may be beyond that limit.
        """
        pairs, changed = self._pairs(candidate, *self._moves(candidate))
        found = np.flatnonzero(pairs == 0).tolist()
        rng.shuffle(found)
        yield from map(changed, found)

    @staticmethod
    def _moved(candidate, move):
        entry, value = move
        return (*candidate[:entry], value, *candidate[entry + 1 :])

    def share(self, n=None):
        """The share of uniform candidates that are legal, estimated from `n` of them (2000; 200 where a function of a
        candidate is limited, which may be slow)."""
        rng = random.Random(0)
        n = n or (200 if self.functions else 2000)
        return sum(not self.excess(self.space.random_candidate(rng)) for _ in range(n)) / n

    # --- what is possible ------------------------------------------------------------------------------------

    def check(self):
        """Raises UserError if no candidate meets all limits; names the tightest one and the nearest possible cost.

        Nothing is proved about functions of a candidate: there the nearest one is named that repairs found, of SEARCHES
        random candidates and of those with one choice in all blocks.
        """
        rng = random.Random(0)
        candidate = self.repair(self.space.random_candidate(rng), rng)
        if not self.excess(candidate):  # mostly, and in less time than it takes to import SciPy for a proof
            return
        within = Limits(self.space, {}, self.correction)
        for name in sorted(self.tables, key=self._tightness):
            low, high = self.bounds[name]
            limits = within._with(name, low, high)
            if not (found := limits.optimum()):
                above = within._with(name, high, None).optimum(name)
                below = within._with(name, None, low).optimum(name, -1)
                excess = Limits(self.space, {name: (low, high)}, self.correction).excess
                nearest = min(filter(None, (candidate, above, below)), key=excess)
                raise UserError(self._impossible(name, within.bounds, self.space.cost(name, nearest)))
            within, candidate = limits, found
        if not self.functions:
            return
        starts = [self.space.random_candidate(rng) for _ in range(SEARCHES)]
        starts += map(self.space.uniform_candidate, range(max(self.space.n_choices)))
        found = [self.repair(start, rng) for start in starts]
        if self.excess(nearest := min([candidate, *found], key=self.excess)):
            own = self.space.costs.own
            costs = ", ".join(f"{name} {shown(name, self.space.cost(name, nearest), own)}" for name in self.bounds)
            text = f"no candidate was found with {describe(self.bounds, own)}; the nearest one has {costs}"
            raise UserError(f"{text}: {list(nearest)}; change --limit {self.functions[0]}")

    def _with(self, name, low, high):
        return Limits(self.space, self.bounds | {name: (low, high)}, self.correction)

    def largest(self):
        """The legal candidate of the most FLOPs, to 0.01%, since more takes long; None where none is found."""
        tables = ((tuple(map(tuple, rows)), fixed) for rows, fixed in [self.space.cost_rows("flops"), *self.costs])
        choices = _largest(tuple(tables), tuple(self.low), tuple(self.high))
        found = choices and self.space.candidate_of(choices)
        return None if not found or self.excess(found) else found

    def optimum(self, name=None, sign=1):
        """The candidate in the bounds of the lowest cost `name`, or of the highest if `sign` is -1; without it any one.

        A mixed-integer linear programme with a variable for each choice of each block, solved exactly, or as far as
        SOLVE_S seconds suffice. Returns None if there is none, or none was found in that time. Ignores `banned`. Raises
        UserError under a limit on a function of a candidate.
        """
        if self.functions:
            raise UserError(f"--limit {self.functions[0]}: is any function of a candidate, which nothing solves for")
        rows = self.space.cost_rows(name or "flops")[0]
        choices = _solve(rows, sign if name else 0, self.costs, self.low, self.high)
        return choices and self.space.candidate_of(choices)

    def _tightness(self, name):
        """How many standard deviations a bound lies from the mean of uniform candidates, on the side it excludes."""
        i = self.tables.index(name)
        rows, fixed = self.costs[i]
        mean = fixed + sum(float(np.mean(row)) for row in rows)
        return max(self.low[i] - mean, mean - self.high[i]) / self.scale[i]

    def _impossible(self, name, within, nearest):
        """The message of `check`."""
        low, high = self.bounds[name]
        where = f" with {describe(within, self.space.costs.own)}" if within else ""
        flag = "--flops-limit" if self.bounds.keys() == {"flops"} else f"--limit {name}"
        own = self.space.costs.own
        text = functools.partial(shown, name, own=own) if name == "latency" or name in own else str
        if None not in (low, high):
            between = f"{text(low)} to {text(high)}"
            return f"limit {between}: no candidate{where} costs that, next is {text(nearest)}; change {flag}"
        if low is None:
            return f"limit {text(high)} is below the lowest cost of any candidate{where}, {text(nearest)}; raise {flag}"
        return f"limit {text(low)} is above the highest cost of any candidate{where}, {text(nearest)}; lower {flag}"

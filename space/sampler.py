"""The sampler of single paths: which candidate a step of supernet training trains.

Official training draws a FLOPs bin, then uniform candidates until one falls in it, so that paths are flat over the
bins (7 of 10M from 290M to 360M) and uniform within each. Official gives up after 500 tries and takes any candidate;
here there is no such fallback, and a bin that random candidates don't reach is an error before training starts.

A path is a pure function of seed and step: resuming needs no state, and all ranks take the same path.

Source: official `src/Supernet/train.py` (`get_random_cand`, `get_uniform_sample_cand`).
"""

import functools

import numpy as np

from utils import UserError

STREAM, WARMUP = 0x50617468, 0x57696465  # separate these draws from others of the same seed
CHUNK = 1024  # steps that are drawn together
BATCH = 16_384  # random candidates that are costed together
MAX_BATCHES = 62  # about a million candidates, which must fill the bins of an average chunk


def default_flops_range(space):
    """(low, high) in multiply-adds: 290M to 360M in the paper's space, in others the same quantiles."""
    if space.is_papers:
        return 290_000_000, 360_000_000
    return space.quantile("flops", 0.0014), space.quantile("flops", 0.9986)


class PathSampler:
    """Candidates for training steps, uniform or, with `flops_range`, flat over `n_bins` equal bins of FLOPs.

    `flops_range` is (low, high) in multiply-adds. A bin holds low <= cost < high, the last one its upper edge too. The
    first `width_warmup` steps start with only the widest choices and add one width after the other; their paths are
    uniform, because the widest ones are in no bin. Raises UserError if a bin is so rare that a path would cost some
    1,000 random candidates (0.2 ms) or more.
    """

    def __init__(self, space, seed=0, flops_range=None, n_bins=7, width_warmup=0):
        self.space = space
        self.seed = seed
        self.width_warmup = width_warmup
        self._paths = functools.lru_cache(maxsize=1)(self._draw)
        self.flops_range = None if flops_range is None else list(flops_range)
        self.edges = None
        if self.flops_range:
            low, high = self.flops_range
            if not low < high:
                raise UserError(f"--flops-range {low} {high}: the first must be the lower one")
            self.edges = np.array([low + (high - low) * i // n_bins for i in range(n_bins + 1)])
            self._check_bins()

    def __repr__(self):
        bins = f", {len(self.edges) - 1} bins of FLOPs in {self.flops_range}" if self.flops_range else ""
        return f"PathSampler(seed {self.seed}{bins}, width_warmup {self.width_warmup})"

    def candidate(self, step):
        """The candidate of a step; training counts steps from 1."""
        if step < self.width_warmup:
            return self._widest(step)
        chunk, offset = divmod(step, CHUNK)
        return tuple(self._paths(chunk)[offset].tolist())

    def _widest(self, step):
        """A uniform candidate of the widths that the warm-up allows at a step, the widest first."""
        rng = np.random.default_rng([self.seed, STREAM, WARMUP, step])
        n = self.space.n_widths
        allowed = 1 + (self.space.n_widths - 1) * step // self.width_warmup
        candidate = rng.integers(self.space.choices)
        candidate[self.space.width_entries] = rng.integers(n - allowed, n, self.space.n_blocks)
        return tuple(candidate.tolist())

    def _draw(self, chunk):
        """The paths of a chunk, by its number: (CHUNK, entries of a candidate)."""
        rng = np.random.default_rng([self.seed, STREAM, chunk])
        if self.edges is None:
            return self._candidates(rng, CHUNK)
        n_bins = len(self.edges) - 1
        wanted = rng.integers(n_bins, size=CHUNK)
        steps = [np.flatnonzero(wanted == b) for b in range(n_bins)]  # still without a path, by bin
        paths = np.empty((CHUNK, len(self.space.choices)), np.uint8)
        for candidates, bins in self._binned(rng, 4 * MAX_BATCHES):  # no chunk is that far from the average
            for b in range(n_bins):
                found = candidates[bins == b][: len(steps[b])]
                paths[steps[b][: len(found)]] = found
                steps[b] = steps[b][len(found) :]
            if not any(map(len, steps)):
                return paths
        raise RuntimeError(f"{sum(map(len, steps))} steps got no path from {4 * MAX_BATCHES * BATCH} random candidates")

    def _candidates(self, rng, n):
        """Uniform candidates, (n, entries)."""
        high = self.space.choices
        return rng.integers(high if len(set(high)) > 1 else high[0], size=(n, len(high)), dtype=np.uint8)

    def _binned(self, rng, n_batches):
        """Batches of uniform candidates (BATCH, entries) and their bins (BATCH,); -1 and n_bins are outside."""
        rows, fixed = self.space.cost_rows("flops")
        costs = [np.array(row) for row in rows]
        for _ in range(n_batches):
            candidates = self._candidates(rng, BATCH)
            choices = self.space.block_choices(candidates.T.astype(np.intp))
            flops = fixed + sum(row[choice] for row, choice in zip(costs, choices))
            bins = np.searchsorted(self.edges, flops, side="right") - 1
            bins[flops == self.edges[-1]] -= 1
            yield candidates, bins

    def _check_bins(self):
        n_bins = len(self.edges) - 1
        needed = max(CHUNK // n_bins, 100)
        hits = np.zeros(n_bins, int)
        for _, bins in self._binned(np.random.default_rng([self.seed, STREAM]), MAX_BATCHES):
            hits += np.bincount(bins + 1, minlength=n_bins + 2)[1:-1]
            if hits.min() >= needed:
                return
        rarest = int(hits.argmin())
        low, high = self.space.cost_range("flops")
        usual_low, usual_high = default_flops_range(self.space)
        rare = f"{rarest + 1} of {n_bins}, {self.edges[rarest]} to {self.edges[rarest + 1]}"
        raise UserError(
            f"--flops-range {self.edges[0]} {self.edges[-1]}: {hits[rarest]} of {MAX_BATCHES * BATCH} random "
            f"candidates fall into bin {rare}, but {needed} are needed; candidates cost {low} to {high}, "
            f"99.7% of them {usual_low} to {usual_high}: choose a range in there, or --sampler uniform"
        )

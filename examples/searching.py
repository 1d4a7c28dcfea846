"""Costs and a searcher of one's own, by: python search.py --own examples/searching.py with --limit energy=59%,
--limit kinds=2, --objectives acc1,energy, --strategy regularised."""

import collections

from space.own import register_cost, register_searcher


@register_cost("energy", "mJ")
def energy(space):
    """Of a block on an image: 4.6 pJ a multiply-add in float32, 640 pJ a weight from DRAM (Horowitz, ISSCC 2014)."""
    rows = zip(space.costs.flops, space.costs.params)
    return [[4.6e-9 * flops + 640e-9 * params for flops, params in zip(*row)] for row in rows]


@register_cost("kinds")
def kinds(space, candidate):
    """How many different operations a network has, each of which needs a kernel on its device."""
    return len({name for name, _ in space.chosen(candidate)})


@register_searcher("regularised")
class RegularisedEvolution:
    """Real et al. (AAAI 2019, arXiv 1802.01548): the best of a random sample gets a child, and the oldest dies.

    A sample has --select candidates; --population are alive, and are asked for at a time.
    """

    def __init__(self, space, limits, rng, search):
        self.space, self.limits, self.rng, self.select = space, limits, rng, search.select
        self.alive = collections.deque(maxlen=search.population)  # (reward, candidate), the oldest first

    def ask(self):
        if len(self.alive) < self.alive.maxlen:
            return self.limits.repair(self.space.random_candidate(self.rng), self.rng)
        _, parent = max(self.rng.sample(self.alive, self.select))
        entry = self.rng.randrange(len(parent))
        child = (*parent[:entry], self.rng.randrange(self.space.choices[entry]), *parent[entry + 1 :])
        return self.limits.repair(child, self.rng)

    def tell(self, candidate, reward):
        if reward is not None:
            self.alive.append((reward, candidate))

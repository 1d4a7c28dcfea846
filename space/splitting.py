"""What candidates cost together when their common first blocks are computed once, and how to split a list of them.

Two candidates that choose the same operations up to a block have the same activations up to there, BN statistics
included: training/prefix_tree.py evaluates a list as the tree of its prefixes. Standard library alone.
"""

# The multiply-adds that take as long as reading or writing one element of a block's input or output. Early blocks have
# few FLOPs and large maps. Measured on CPU cores by bench/search.py: 52 to 77 at 28 px, 86 at 224 px.
ELEMENT = 60


def tree_flops(space, candidates):
    """Multiply-adds of one image through all candidates, each prefix counted once."""
    return sum(more for _, _, more in _marginal_costs(space, candidates, element=0))


def moved(shape):
    """Elements of a block's input and output."""
    return shape.in_channels * shape.in_size**2 + shape.out_channels * shape.out_size**2


def tree_cost(space, candidates):
    """As `tree_flops`, with the elements that blocks read and write: in proportion to the time."""
    return sum(more for _, _, more in _marginal_costs(space, candidates))


def chunks(space, candidates, n, size=None):
    """The lists that `n` workers evaluate: `split`, or of `size` candidates each where that is given."""
    if not size:
        return split(space, candidates, n)
    candidates = sorted(candidates, key=space.block_choices)
    return [candidates[i : i + size] for i in range(0, len(candidates), size)]


KEPT = 0.1  # the share of a generation that may be lost when a search is killed, as the trees in work are
MORE = 1.1  # but lists are not cut so small that the time grows by more than this factor


def at_once(population, n, number):
    """How many candidates worker `number` of `n` evaluates as one tree, so that all of them have KEPT in work."""
    total = max(1, int(KEPT * population))
    number %= n
    return max(1, total // n + (number < total % n))


def cut(space, candidates, size):
    """Lists of at most `size` candidates that share as much as such lists can.

    Lists are larger where those would cost more than MORE times the tree of all.
    """
    costs = _marginal_costs(space, candidates)
    whole = sum(more for _, _, more in costs)
    while True:
        total, lists = _cheapest_cut(costs, size)
        if total <= MORE * whole or len(lists) == 1:
            return lists
        size += 1


def _cheapest_cut(costs, size):
    """(cost, lists) of the cheapest way to cut neighbours into lists of at most `size`."""
    best = [(0, 0)]  # (cost of the first i candidates, where their last list begins)
    for end in range(1, len(costs) + 1):
        options, shared = [], 0
        for start in range(end - 1, max(0, end - size) - 1, -1):
            options.append((best[start][0] + costs[start][1] + shared, start))
            shared += costs[start][2]
        best.append(min(options))
    lists, end = [], len(costs)
    while end:
        start = best[end][1]
        lists.append([candidate for candidate, _, _ in costs[start:end]])
        end = start
    return best[-1][0], lists[::-1]


def split(space, candidates, n):
    """At most `n` lists of the candidates, such that the most expensive tree is as cheap as possible.

    The candidates are sorted, so that neighbours share their first blocks.
    """
    costs = _marginal_costs(space, candidates)
    low, high = 0, sum(alone for _, alone, _ in costs)
    while low < high:
        limit = (low + high) // 2
        low, high = (low, limit) if len(_fill(costs, limit)) <= n else (limit + 1, high)
    return _fill(costs, low)


def _marginal_costs(space, candidates, element=ELEMENT):
    """(candidate, its cost, what of it is not shared with the one before), sorted, each candidate once."""
    more_of_block = [element * moved(shape) for shape in space.blocks]
    rows = [[flops + n for flops in row] for row, n in zip(space.choice_flops, more_of_block, strict=True)]
    costs, before = [], None
    for candidate in sorted(set(candidates), key=space.block_choices):
        alone = more = space.flops(candidate) + sum(more_of_block)
        if before:
            more -= space.costs.stem_flops
            for row, choice, other in zip(rows, *map(space.block_choices, (candidate, before))):
                if choice != other:
                    break
                more -= row[choice]
        costs.append((candidate, alone, more))
        before = candidate
    return costs


def _fill(costs, limit):
    """Lists of neighbours, each filled up to `limit`, the cost of its tree, or with one candidate."""
    lists, total = [], 0
    for candidate, alone, more in costs:
        if lists and total + more <= limit:
            lists[-1].append(candidate)
            total += more
        else:
            lists.append([candidate])
            total = alone
    return lists

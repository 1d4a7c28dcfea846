"""What candidates cost together when their common first blocks are computed once, and how to split a list of them.

Two candidates that choose the same operations up to a block have the same activations up to there, BN statistics
included: training/prefix_tree.py evaluates a list as the tree of its prefixes. Needs only the standard library.
"""

# The multiply-adds that take as long as reading or writing one element of a block's input or output. Early blocks have
# few FLOPs and large maps. Measured on CPU cores: 52 to 77 at 28 px, 86 at 224 px (docs/experiments.md).
ELEMENT = 60
AT_ONCE = 5  # candidates that a worker evaluates as one tree; it loses as many when it is killed


def chunks(space, candidates, n, size=None):
    """Lists of candidates for `n` workers: those of `split`, or, if `size` is given, lists of that size."""
    return cut(space, candidates, size) if size else split(space, candidates, n)


def cut(space, candidates, size=AT_ONCE):
    """Lists of `size` neighbours, each candidate once."""
    candidates = sorted(set(candidates), key=space.block_choices)
    return [candidates[i : i + size] for i in range(0, len(candidates), size)]


def split(space, candidates, n):
    """At most `n` lists of the candidates, such that the most expensive tree is as cheap as possible.

    The candidates are sorted, so that neighbours share their first blocks.
    """
    costs = _marginal_costs(space, candidates)
    low = 0
    high = sum(alone for _, alone, _ in costs)
    while low < high:
        limit = (low + high) // 2
        if len(_fill(costs, limit)) <= n:
            high = limit
        else:
            low = limit + 1
    return _fill(costs, low)


def _marginal_costs(space, candidates):
    """(candidate, its cost, the part of it not shared with the one before), sorted, each candidate once.

    Costs are the multiply-adds of one image and the elements that blocks read and write: proportional to the time.
    """
    more_of_block = [
        ELEMENT * (shape.in_channels * shape.in_size**2 + shape.out_channels * shape.out_size**2)
        for shape in space.blocks
    ]
    rows = [[flops + n for flops in row] for row, n in zip(space.costs.flops, more_of_block, strict=True)]
    costs = []
    before = None
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
    lists = []
    total = 0
    for candidate, alone, more in costs:
        if lists and total + more <= limit:
            lists[-1].append(candidate)
            total += more
        else:
            lists.append([candidate])
            total = alone
    return lists

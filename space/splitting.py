"""What candidates cost together when their common first blocks are computed once, and how to split a list of them.

Two candidates that choose the same operations up to a block have the same activations up to there, BN statistics
included: training/prefix_tree.py evaluates a list as the tree of its prefixes. Standard library alone.
"""


def tree_flops(space, candidates):
    """Multiply-adds of one image through all candidates, each prefix counted once."""
    return sum(more for _, _, more in _marginal_costs(space, candidates))


def chunks(space, candidates, n, size=None):
    """The lists that `n` workers evaluate: `split`, or of `size` candidates each where that is given."""
    if not size:
        return split(space, candidates, n)
    candidates = sorted(candidates)
    return [candidates[i : i + size] for i in range(0, len(candidates), size)]


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


def _marginal_costs(space, candidates):
    """(candidate, its multiply-adds, those that it does not share with the one before), sorted, each candidate once."""
    costs, before = [], None
    for candidate in sorted(set(candidates)):
        alone = more = space.flops(candidate)
        if before:
            more -= space.stem_conv.flops
            for row, choice, other in zip(space.operation_flops, candidate, before):
                if choice != other:
                    break
                more -= row[choice]
        costs.append((candidate, alone, more))
        before = candidate
    return costs


def _fill(costs, limit):
    """Lists of neighbours, each filled up to `limit` multiply-adds of its tree, or with one candidate."""
    lists, total = [], 0
    for candidate, alone, more in costs:
        if lists and total + more <= limit:
            lists[-1].append(candidate)
            total += more
        else:
            lists.append([candidate])
            total = alone
    return lists

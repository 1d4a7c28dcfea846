"""Twins: candidates that are the same network, because they differ only in where operations that do nothing stand.

Blocks in a row that have one shape and offer the same operations are a group: there, an operation that returns its
input may change places with any other. The canonical form of a candidate has these last in their group, all of them the
first such operation at the first width. In a supernet twins have different weights, alone they are equal.
"""

import functools
import itertools

from space.costs import named
from utils import UserError


def identities(space):
    """For each block of a SearchSpace, the indices of the operations that return their input there.

    Their classes say so, by `is_identity(shape)`. Raises UserError if one does not return its input. Needs torch.
    """
    from blocks import OPERATIONS

    return tuple(
        tuple(i for i, name in enumerate(names) if _is_identity(name, OPERATIONS[name], shape))
        for names, shape in zip(space.block_operations, space.blocks)
    )


@functools.cache
def _is_identity(name, operation, shape):
    import torch

    known = getattr(getattr(operation, "func", operation), "is_identity", None)
    with named(name, shape):
        if known is None or not known(shape):
            return False
        x = torch.arange(128.0 * shape.in_channels).reshape(2, -1, 8, 8)
        same = torch.equal(operation(shape, 1.0, False)(x), x)
    if not same:
        raise UserError(f"operation {name!r} at {shape}: is_identity says that it returns its input, but it does not")
    return True


class Twins:
    """The twins in a SearchSpace whose `identities` are given, so that it needs no torch."""

    def __init__(self, space, identities):
        self.space = space
        self.groups = []  # (slice of the blocks, the choices there that do nothing), where there are twins
        n_widths = space.n_widths
        blocks = zip(space.blocks, space.block_operations, itertools.count())
        for _, group in itertools.groupby(blocks, key=lambda block: block[:2]):
            numbers = [number for _, _, number in group]
            idle = [i * n_widths + width for i in identities[numbers[0]] for width in range(n_widths)]
            others = space.n_choices[numbers[0]] - len(idle)
            if len(idle) > 1 or (idle and others and len(numbers) > 1):
                self.groups.append((slice(numbers[0], numbers[-1] + 1), idle))

    def canonical(self, candidate):
        """The canonical form of a candidate, a tuple of ints."""
        choices = list(self.space.block_choices(candidate))
        for blocks, idle in self.groups:
            kept = [choice for choice in choices[blocks] if choice not in idle]
            choices[blocks] = kept + [idle[0]] * (len(choices[blocks]) - len(kept))
        return self.space.candidate_of(choices)

    def cost_the_same(self, names):
        """Whether all twins have equal costs of these names: a table of a device, or a user's, may tell them apart."""
        for table, (blocks, idle) in itertools.product([self.space.cost_rows(name)[0] for name in names], self.groups):
            rows = [*map(tuple, table[blocks])]
            if len({*rows}) != 1 or len({rows[0][choice] for choice in idle}) != 1:
                return False
        return True

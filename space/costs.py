"""Multiply-adds and parameters, counted from the modules themselves on the meta device, where they take no memory.

torch is imported only when something is counted: NNI's tuner, which is given the costs, does without it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from utils import UserError, in_one_line


class OwnCost(NamedTuple):
    """A cost of a user's file (space/own.py): a table of every choice at every block, or any function of a candidate.

    A table has whole numbers, `scale` of them to the unit, so that sums are exact; `rows` are empty for a function,
    whose numbers are in the unit (scale 1).
    """

    unit: str
    scale: float = 1
    rows: tuple = ()
    function: Callable | None = None
    code: str = ""  # the hash of its code


class Costs(NamedTuple):
    """Costs of every choice at every block, of the stem, and of the tail (last convolution and classifier).

    FLOPs are multiply-adds; `fixed_params` and `fixed_latency` are those of stem and tail together. Latencies, in
    ns, need a table of the device. `own` has each OwnCost by name.
    """

    flops: tuple
    stem_flops: int
    tail_flops: int
    params: tuple
    fixed_params: int
    latency: tuple = ()
    fixed_latency: int = 0
    own: dict = {}  # noqa: RUF012


def count_costs(space):
    """The Costs of a SearchSpace, with affine BN. Raises UserError if an operation does not fit its block."""
    import torch

    from blocks import OPERATIONS, conv_bn

    rows = [
        [_cost(name, OPERATIONS[name], shape, width) for name in names for width in space.widths]
        for names, shape in zip(space.block_operations, space.blocks)
    ]
    channels = space.stage_channels[-1]
    with torch.device("meta"):
        stem = torch.nn.Sequential(*conv_bn(space.image_channels, space.stem_channels, 3, space.stem_stride))
        last = torch.nn.Sequential(*conv_bn(channels, space.last_channels, 1))
        classifier = torch.nn.Linear(space.last_channels, space.n_classes, bias=space.classifier_bias)
    last_flops, _ = _count_flops(last, channels, space.blocks[-1].out_size)
    return Costs(
        flops=tuple(tuple(flops for flops, _ in row) for row in rows),
        stem_flops=_count_flops(stem, space.image_channels, space.input_size)[0],
        tail_flops=last_flops + space.last_channels * space.n_classes,
        params=tuple(tuple(params for _, params in row) for row in rows),
        fixed_params=sum(map(_count_params, (stem, last, classifier))),
    )


@functools.cache
def _cost(name, operation, shape, width):
    """(multiply-adds, parameters) of an operation at a block."""
    import torch

    expected = (1, shape.out_channels, shape.out_size, shape.out_size)
    with named(name, shape, width):
        with torch.device("meta"):
            module = operation(shape, width, True)
        flops, found = _count_flops(module, shape.in_channels, shape.in_size)
    if found != expected:
        raise UserError(f"operation {name!r} at {shape}, width {width}: returns {found}, not {expected}")
    return flops, _count_params(module)


def named(name, shape, width=1.0):
    """A context in which whatever an operation raises at a BlockShape is a UserError that names both."""
    return in_one_line(f"operation {name!r} fails at {shape}, width {width}")


def check_fit(space):
    """Raises UserError if an operation of a SearchSpace refuses its block, as ShuffleNetV2's do where channels fall."""
    import torch

    from blocks import build_block

    width = space.widths[-1]
    for names, shape in dict.fromkeys(zip(space.block_operations, space.blocks)):
        for name in names:
            with named(name, shape, width), torch.device("meta"):
                build_block(name, shape, width)


def _count_flops(module, channels, size):
    """(multiply-adds, shape of the output) of one image (channels, size, size) through a module on the meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = module.eval()(torch.empty(1, channels, size, size, device="meta"))
    return counter.get_total_flops() // 2, tuple(output.shape)


def _count_params(module):
    return sum(p.numel() for p in module.parameters())

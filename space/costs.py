"""Multiply-adds and parameters, counted from the modules themselves on the meta device, where they take no memory."""

import functools

import torch
from torch.utils.flop_counter import FlopCounterMode

from blocks import build_block, conv_bn
from space.search_space import Costs


def count_costs(space):
    """The Costs of a SearchSpace: every operation at every width of every block, with affine BN, and the rest."""
    rows = [
        [_cost(name, shape, width) for name in names for width in space.widths]
        for names, shape in zip(space.block_operations, space.blocks)
    ]
    with torch.device("meta"):
        stem = torch.nn.Sequential(*conv_bn(3, space.stem_channels, 3, space.stem_stride))
        last = torch.nn.Sequential(*conv_bn(space.stage_channels[-1], space.last_channels, 1))
        classifier = torch.nn.Linear(space.last_channels, space.n_classes, bias=space.classifier_bias)
    tail_flops = count_flops(last, space.stage_channels[-1], space.blocks[-1].out_size)
    tail_flops += space.last_channels * space.n_classes
    return Costs(
        flops=tuple(tuple(flops for flops, _ in row) for row in rows),
        stem_flops=count_flops(stem, 3, space.input_size),
        tail_flops=tail_flops,
        params=tuple(tuple(params for _, params in row) for row in rows),
        fixed_params=sum(map(count_params, (stem, last, classifier))),
    )


@functools.cache
def _cost(name, shape, width):
    """(multiply-adds, parameters) of an operation at a block."""
    with torch.device("meta"):
        module = build_block(name, shape, width, affine=True)
    return count_flops(module, shape.in_channels, shape.in_size), count_params(module)


def count_flops(module, channels, size):
    """Multiply-adds of one image (channels, size, size) through a module on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(torch.empty(1, channels, size, size, device="meta"))
    return counter.get_total_flops() // 2


def count_params(module):
    return sum(p.numel() for p in module.parameters())

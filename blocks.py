"""The choice blocks: ShuffleNetV2 units with depthwise kernel 3, 5 or 7, and the Xception-like unit.

Source: paper section 3.4 and figure 5; official `src/Supernet/blocks.py`. Parameter names are the official ones, so
that official weights load.
"""

import itertools

import torch
from torch import nn


class _EvenOdd(torch.autograd.Function):
    """Even and odd channels as views.

    The backward pass writes both gradients into one tensor, in the layout of x: autograd would fill two tensors of
    zeros, in NCHW, and add them (8% of a training step on the CPU).
    """

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        ctx.layout = (
            torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        )
        return x[:, 0::2], x[:, 1::2]

    @staticmethod
    def backward(ctx, even, odd):
        gradient = torch.empty(ctx.shape, dtype=even.dtype, device=even.device, memory_format=ctx.layout)
        gradient[:, 0::2], gradient[:, 1::2] = even, odd
        return gradient


def channel_shuffle(x):
    """Splits (N, C, H, W) into its even and its odd channels, two views of (N, C/2, H, W).

    The official reshape and permute, without a copy: the last block's branches were concatenated, so this mixes them.
    """
    return _EvenOdd.apply(x) if x.requires_grad else (x[:, 0::2], x[:, 1::2])


def conv_bn(inp, oup, kernel_size, stride=1, groups=1, affine=True, relu=True):
    """Convolution without bias, BN, and ReLU where wanted, as a list of modules."""
    layers = [
        nn.Conv2d(inp, oup, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(oup, affine=affine),
    ]
    return [*layers, nn.ReLU(inplace=True)] if relu else layers


def conv_bn_pairs(model):
    """(convolution, the BN behind it) of all that `conv_bn` made in a model."""
    for layers in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        for conv, norm in itertools.pairwise(layers):
            if isinstance(norm, nn.BatchNorm2d):
                yield conv, norm


class ChoiceBlock(nn.Module):
    """The two branches around a `branch_main`: (N, in_channels, H, W) -> (N, out_channels, H/stride, W/stride).

    With stride 1 and equal widths, the even channels go straight through and the odd ones through the main branch.
    Otherwise (the first block of a stage) the whole input goes through both, and `branch_proj` replaces the identity.
    """

    def __init__(self, shape, kernel_size, affine):
        super().__init__()
        self.shape = shape
        inp = shape.in_channels
        if shape.projects:
            self.branch_proj = nn.Sequential(
                *conv_bn(inp, inp, kernel_size, shape.stride, groups=inp, affine=affine, relu=False),
                *conv_bn(inp, inp, 1, affine=affine),
            )

    def forward(self, x):
        if self.shape.projects:
            return torch.cat((self.branch_proj(x), self.branch_main(x)), dim=1)
        straight, x = channel_shuffle(x)
        return torch.cat((straight, self.branch_main(x)), dim=1)


class ShuffleNetBlock(ChoiceBlock):
    """ShuffleNetV2 unit: pointwise, depthwise of `kernel_size`, pointwise. `shape` is a search_space.BlockShape."""

    def __init__(self, shape, kernel_size, affine=True):
        super().__init__(shape, kernel_size, affine)
        (inp, oup), mid = shape.branch_channels, shape.mid_channels
        self.branch_main = nn.Sequential(
            *conv_bn(inp, mid, 1, affine=affine),
            *conv_bn(mid, mid, kernel_size, shape.stride, groups=mid, affine=affine, relu=False),
            *conv_bn(mid, oup, 1, affine=affine),
        )


class ShuffleXceptionBlock(ChoiceBlock):
    """Xception-like unit: depthwise and pointwise, three times. `shape` is a search_space.BlockShape."""

    def __init__(self, shape, kernel_size=3, affine=True):
        super().__init__(shape, kernel_size, affine)
        (inp, oup), mid = shape.branch_channels, shape.mid_channels
        self.branch_main = nn.Sequential(
            *conv_bn(inp, inp, kernel_size, shape.stride, groups=inp, affine=affine, relu=False),
            *conv_bn(inp, mid, 1, affine=affine),
            *conv_bn(mid, mid, kernel_size, groups=mid, affine=affine, relu=False),
            *conv_bn(mid, mid, 1, affine=affine),
            *conv_bn(mid, mid, kernel_size, groups=mid, affine=affine, relu=False),
            *conv_bn(mid, oup, 1, affine=affine),
        )


def build_block(operation, shape, affine=True):
    """The block of an operation's name in the search space, "shufflenet_5x5" or "xception_3x3"."""
    kind, kernel = operation.split("_")
    block = {"shufflenet": ShuffleNetBlock, "xception": ShuffleXceptionBlock}[kind]
    return block(shape, int(kernel.split("x")[0]), affine)

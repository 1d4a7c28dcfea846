"""The choice blocks: ShuffleNetV2 units with depthwise kernel 3, 5 or 7, and the Xception-like unit.

Source: paper section 3.4 and figure 5; official `src/Supernet/blocks.py`. Parameter names are the official ones, so
that official weights load.
"""

import functools
import itertools

import torch
import torch.fx
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


@torch.fx.wrap  # one node of a traced graph, since what it does depends on x
def channel_shuffle(x):
    """Splits (N, C, H, W) into its even and its odd channels, two views of (N, C/2, H, W).

    The official reshape and permute, without a copy: the last block's branches were concatenated, so this mixes them.
    """
    if x.requires_grad and not torch.compiler.is_compiling():  # whose cache on disk can't hold graphs of it
        return _EvenOdd.apply(x)
    return x[:, 0::2], x[:, 1::2]


def conv_bn(inp, oup, kernel_size, stride=1, groups=1, affine=True, relu=True):
    """Convolution without bias, BN and, with `relu`, ReLU, as a list of modules."""
    layers = [
        nn.Conv2d(inp, oup, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(oup, affine=affine),
    ]
    return [*layers, nn.ReLU(inplace=True)] if relu else layers


def conv_bn_pairs(model):
    """Yields each (convolution, BN directly behind it) in the Sequentials of a model, as `conv_bn` makes them.

    Not those of other classes or with hooks, as for normalised weights: they may do more with weights and inputs.
    """
    for layers in [m for m in model.modules() if type(m).forward is nn.Sequential.forward]:
        for conv, norm in itertools.pairwise(layers):
            plain = type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d
            if plain and not any(m._forward_pre_hooks or m._forward_hooks for m in (conv, norm)):
                yield conv, norm


class ShuffleUnit(nn.Module):
    """The two branches around a `branch_main`: (N, in_channels, H, W) -> (N, out_channels, H/stride, W/stride).

    With stride 1 and equal widths, the even channels go straight through and the odd ones through the main branch.
    Otherwise (the first block of a stage) the whole input goes through both, and `branch_proj` replaces the identity;
    channels then have to grow. Raises ValueError where the channels of a BlockShape can't be split so.
    """

    def __init__(self, shape, kernel_size, affine):
        super().__init__()
        self.shape = shape
        inp = shape.in_channels
        if shape.projects and shape.out_channels <= inp:
            raise ValueError(f"its channels do not grow, {inp} to {shape.out_channels}")
        if not shape.projects and inp % 2:
            raise ValueError(f"its channels are not even, {inp}")
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


class ShuffleNetBlock(ShuffleUnit):
    """ShuffleNetV2 unit: pointwise, depthwise of `kernel_size`, pointwise."""

    def __init__(self, shape, width, affine, kernel_size):
        super().__init__(shape, kernel_size, affine)
        inp, oup = shape.branch_channels
        mid = shape.mid_channels(width)
        self.branch_main = nn.Sequential(
            *conv_bn(inp, mid, 1, affine=affine),
            *conv_bn(mid, mid, kernel_size, shape.stride, groups=mid, affine=affine, relu=False),
            *conv_bn(mid, oup, 1, affine=affine),
        )


class ShuffleXceptionBlock(ShuffleUnit):
    """Xception-like unit: depthwise and pointwise, three times."""

    def __init__(self, shape, width, affine, kernel_size=3):
        super().__init__(shape, kernel_size, affine)
        inp, oup = shape.branch_channels
        mid = shape.mid_channels(width)
        self.branch_main = nn.Sequential(
            *conv_bn(inp, inp, kernel_size, shape.stride, groups=inp, affine=affine, relu=False),
            *conv_bn(inp, mid, 1, affine=affine),
            *conv_bn(mid, mid, kernel_size, groups=mid, affine=affine, relu=False),
            *conv_bn(mid, mid, 1, affine=affine),
            *conv_bn(mid, mid, kernel_size, groups=mid, affine=affine, relu=False),
            *conv_bn(mid, oup, 1, affine=affine),
        )


# --- cheap and expanding operations, which are not the paper's ------------------------------------------------


class Skip(nn.Module):
    """Nothing; where channels or size change, a pointwise convolution of every other row and column, and BN.

    Not the paper's: makes depth a choice. Of the same kind as the identity of NAS-Bench-Macro (arXiv 2103.11922).
    """

    def __init__(self, shape, width, affine):
        super().__init__()
        change = conv_bn(shape.in_channels, shape.out_channels, 1, shape.stride, affine=affine, relu=False)
        self.layers = nn.Sequential(*(change if shape.projects else ()))

    def forward(self, x):
        return self.layers(x)

    @staticmethod
    def is_identity(shape):
        """Whether it returns its input at a BlockShape."""
        return not shape.projects


class Pointwise(nn.Module):
    """A pointwise convolution, BN and ReLU; with stride 2, of the means of 2 x 2 pixels. Not the paper's."""

    def __init__(self, shape, width, affine):
        super().__init__()
        pool = [nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)] if shape.stride == 2 else []
        self.layers = nn.Sequential(*pool, *conv_bn(shape.in_channels, shape.out_channels, 1, affine=affine))

    def forward(self, x):
        return self.layers(x)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: pointwise to `expansion` times the input channels, depthwise, pointwise; adds its input.

    Not the paper's. Several times the cost of a ShuffleNetV2 unit. Source: Sandler et al., arXiv 1801.04381.
    """

    def __init__(self, shape, width, affine, kernel_size, expansion):
        super().__init__()
        inner = max(1, int(shape.in_channels * expansion * width))
        self.adds = not shape.projects
        self.layers = nn.Sequential(
            *conv_bn(shape.in_channels, inner, 1, affine=affine),
            *conv_bn(inner, inner, kernel_size, shape.stride, groups=inner, affine=affine),
            *conv_bn(inner, shape.out_channels, 1, affine=affine, relu=False),
        )

    def forward(self, x):
        return x + self.layers(x) if self.adds else self.layers(x)


# --- operations by name ---------------------------------------------------------------------------------------

OPERATIONS = {
    "shufflenet_3x3": functools.partial(ShuffleNetBlock, kernel_size=3),
    "shufflenet_5x5": functools.partial(ShuffleNetBlock, kernel_size=5),
    "shufflenet_7x7": functools.partial(ShuffleNetBlock, kernel_size=7),
    "xception_3x3": ShuffleXceptionBlock,
    # Not the paper's:
    "skip_1x1": Skip,
    "pointwise_1x1": Pointwise,
    **{
        f"mobilenet_{k}x{k}{end}": functools.partial(InvertedResidual, kernel_size=k, expansion=expansion)
        for expansion, end in ((3, ""), (6, "_e6"))
        for k in (3, 5, 7)
    },
}


def register(name):
    """A class decorator that registers an operation for search spaces, by name.

    The class is a module (N, in_channels, H, W) -> (N, out_channels, H/stride, W/stride). Its constructor takes a
    search_space.BlockShape, the width (a scale of the middle channels), and whether BN is affine. A static method
    `is_identity(shape)`, if it has one, says whether it returns its input there: see space/twins.py.
    """

    def registered(operation):
        OPERATIONS[name] = operation
        return operation

    return registered


def build_block(operation, shape, width=1.0, affine=True):
    """Builds the operation of that name for a block, a BlockShape."""
    return OPERATIONS[operation](shape, width, affine)


class ChoiceBlock(nn.ModuleList):
    """A choice block of the supernet: a path runs one of its operations, at one of `widths`; `part` returns it.

    Every operation has the weights of its widest form. At another width it uses the first channels of these weights and
    of their BN statistics.
    """

    def __init__(self, operations, shape, widths=(1.0,), affine=False):
        super().__init__(build_block(operation, shape, max(widths), affine) for operation in operations)
        self.operations = operations
        self.shape = shape
        self.widths = widths
        self.affine = affine
        self.narrow = {}  # (operation, width) -> Narrow, built on first use

    def part(self, operation, width=0):
        """The callable of an operation at a width: its module for the widest, else a Narrow."""
        if self.widths[width] == max(self.widths):
            return self[operation]
        if (operation, width) not in self.narrow:
            with torch.device("meta"):
                form = build_block(self.operations[operation], self.shape, self.widths[width], self.affine)
            self.narrow[operation, width] = Narrow(self[operation], form)
        return self.narrow[operation, width]


class Narrow:
    """Runs `form`, a module on the meta device, with the first channels of the weights and statistics of `widest`.

    Both modules have the same structure.
    """

    def __init__(self, widest, form):
        self.widest = widest
        self.form = form
        self.modules = list(zip(form.modules(), widest.modules(), strict=True))
        self.tensors = []  # (module of widest, attribute, name in form, index)
        for (path, narrow), (_, module) in zip(form.named_modules(), self.modules):
            if isinstance(narrow, nn.BatchNorm2d):
                narrow.num_batches_tracked = None
            for name, tensor in (*narrow.named_parameters(recurse=False), *narrow.named_buffers(recurse=False)):
                self.tensors.append((module, name, f"{path}.{name}".lstrip("."), first_channels(tensor.shape)))

    def __call__(self, x):
        for narrow, module in self.modules:
            narrow.training = module.training
            if isinstance(module, nn.BatchNorm2d):
                narrow.momentum = module.momentum
        tensors = {name: getattr(module, attribute)[index] for module, attribute, name, index in self.tensors}
        return torch.func.functional_call(self.form, tensors, (x,))


def first_channels(shape):
    """The index that cuts a larger tensor to `shape`: to the first output channels, input channels, or both."""
    return tuple(slice(n) for n in shape)

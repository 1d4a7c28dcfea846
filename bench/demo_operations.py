"""Two operations of the demo's space that cost little, beside the paper's four: `skip` and `pointwise`."""

from torch import nn

from blocks import conv_bn, register


@register("skip")
class Skip(nn.Module):
    """Nothing; where channels or size change, a pointwise convolution of every other row and column, and BN."""

    def __init__(self, shape, width, affine):
        super().__init__()
        change = conv_bn(shape.in_channels, shape.out_channels, 1, shape.stride, affine=affine, relu=False)
        self.layers = nn.Sequential(*(change if shape.projects else ()))

    def forward(self, x):
        return self.layers(x)


@register("pointwise")
class Pointwise(nn.Module):
    """A pointwise convolution, BN and ReLU; with stride 2, of the means of 2 x 2 pixels."""

    def __init__(self, shape, width, affine):
        super().__init__()
        pool = [nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)] if shape.stride == 2 else []
        self.layers = nn.Sequential(*pool, *conv_bn(shape.in_channels, shape.out_channels, 1, affine=affine))

    def forward(self, x):
        return self.layers(x)

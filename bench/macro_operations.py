"""The operations of NAS-Bench-Macro: identity, and two inverted residuals (Su et al., arXiv 2103.11922, section 4)."""

from torch import nn

from blocks import conv_bn, register


@register("identity")
class Identity(nn.Module):
    """Nothing, or a pointwise convolution and BN where channels or size change."""

    def __init__(self, shape, width, affine):
        super().__init__()
        change = conv_bn(shape.in_channels, shape.out_channels, 1, shape.stride, affine=affine, relu=False)
        self.layers = nn.Sequential(*(change if shape.projects else ()))

    def forward(self, x):
        return self.layers(x)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expands its input channels, depthwise convolution, projects; adds its input where it can."""

    kernel_size = expansion = None

    def __init__(self, shape, width, affine):
        super().__init__()
        inner = max(1, int(shape.in_channels * self.expansion * width))
        self.adds = not shape.projects
        self.layers = nn.Sequential(
            *conv_bn(shape.in_channels, inner, 1, affine=affine),
            *conv_bn(inner, inner, self.kernel_size, shape.stride, groups=inner, affine=affine),
            *conv_bn(inner, shape.out_channels, 1, affine=affine, relu=False),
        )

    def forward(self, x):
        return x + self.layers(x) if self.adds else self.layers(x)


@register("inverted_residual_3x3_e3")
class InvertedResidual3x3(InvertedResidual):
    """Depthwise kernel 3, expansion 3."""

    kernel_size = 3
    expansion = 3


@register("inverted_residual_5x5_e6")
class InvertedResidual5x5(InvertedResidual):
    """Depthwise kernel 5, expansion 6."""

    kernel_size = 5
    expansion = 6

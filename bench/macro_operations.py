"""The operations of NAS-Bench-Macro: identity, and two inverted residuals (Su et al., arXiv 2103.11922, section 4)."""

import functools

from blocks import InvertedResidual, Skip, register


@register("identity")
class Identity(Skip):
    """Nothing, or a pointwise convolution and BN where channels or size change."""


register("inverted_residual_3x3_e3")(functools.partial(InvertedResidual, kernel_size=3, expansion=3))
register("inverted_residual_5x5_e6")(functools.partial(InvertedResidual, kernel_size=5, expansion=6))

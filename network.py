"""The supernet, and one architecture of it as a network of its own.

Source: paper section 3; official `src/Supernet/network.py` and `src/Evaluation/network.py`.
"""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from blocks import Choices, Narrow, build_block, conv_bn, conv_bn_pairs
from space.search_space import SearchSpace


class _ShuffleNet(nn.Module):
    """Stem, `features` (made by the subclass), last convolution, pooling, dropout and classifier.

    (N, 3, H, W) -> (N, classes).
    """

    def __init__(self, space, affine, features):
        super().__init__()
        self.space = space
        self.first_conv = nn.Sequential(*conv_bn(3, space.stem_channels, 3, space.stem_stride, affine=affine))
        self.features = nn.ModuleList(features)
        self.conv_last = nn.Sequential(*conv_bn(space.stage_channels[-1], space.last_channels, 1, affine=affine))
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Sequential(nn.Linear(space.last_channels, space.n_classes, bias=space.classifier_bias))
        initialize(self)

    def head(self, x):
        """Logits (N, classes) of the last block's output (N, C, H, W)."""
        x = self.conv_last(x)
        pooled = x.mean(dim=(2, 3), dtype=self.classifier[0].weight.dtype)  # the official AvgPool2d(7), for any size
        if x.dtype != pooled.dtype:  # under autocast, where logits of 8 bits would tie
            with torch.autocast(x.device.type, enabled=False):
                return self.classifier(self.dropout(pooled))
        return self.classifier(self.dropout(pooled))


class ShuffleNetV2OneShot(_ShuffleNet):
    """The supernet: every operation of every block, of which `forward(x, candidate)` runs one a block.

    `space` (a SearchSpace) takes the place of input_size and n_classes. BN is without affine parameters in a
    supernet (official); blocks that the architecture doesn't choose get no gradient at all.
    """

    def __init__(self, input_size=224, n_classes=1000, affine=False, space=None):
        space = space or SearchSpace.for_images(input_size, n_classes)
        blocks = zip(space.block_operations, space.blocks)
        super().__init__(space, affine, [Choices(names, shape, space.widths, affine) for names, shape in blocks])

    def forward(self, x, candidate):
        """Logits (N, n_classes) of images (N, 3, H, W) through the candidate."""
        x = self.first_conv(x)
        for block, choice in zip(self.features, self.space.block_choices(candidate), strict=True):
            x = block(x, choice)
        return self.head(x)

    def part(self, key):
        """A part of the forward pass, as a callable: "stem", (block, choice), or "head"."""
        if isinstance(key, tuple):
            block, choice = key
            return self.features[block].part(choice)
        return {"stem": self.first_conv, "head": self.head}[key]

    def module_of(self, key):
        """The module that holds the weights and the BN statistics of a part."""
        part = self.part(key)
        return self.conv_last if key == "head" else part.widest if isinstance(part, Narrow) else part


class ShuffleNetV2(_ShuffleNet):
    """One architecture as a stand-alone network, with affine BN (official). `architecture` is of any form."""

    def __init__(self, architecture, input_size=224, n_classes=1000, affine=True, space=None):
        space = space or SearchSpace.for_images(input_size, n_classes)
        self.architecture = space.from_architecture(architecture)
        chosen = zip(space.chosen(self.architecture), space.blocks)
        super().__init__(space, affine, [build_block(name, shape, width, affine) for (name, width), shape in chosen])

    def forward(self, x):
        """Logits (N, n_classes) of images (N, 3, H, W)."""
        x = self.first_conv(x)
        for block in self.features:
            x = block(x)
        return self.head(x)


def initialize(model):
    """Official initial weights: N(mean 0, standard deviation): stem 0.01, other convolutions 1 / weight.shape[1]
    (so 1 for depthwise ones), linear 0.01; affine BN has bias 1e-4."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, 0.01 if name.startswith("first_conv") else 1 / module.weight.shape[1])
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.constant_(module.bias, 1e-4)


def get_candidate_flops(architecture, input_size=224, n_classes=1000):
    """Multiply-adds of one image through the architecture (any form), counted from the shapes."""
    space = SearchSpace.for_images(input_size, n_classes)
    return space.flops(space.from_architecture(architecture))


def batch_norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def fold_bn(model):
    """A copy of the model in eval mode whose BN layers are folded into the convolutions before them."""
    model = copy.deepcopy(model).eval()
    names = {module: name for name, module in model.named_modules()}
    for conv, norm in list(conv_bn_pairs(model)):
        model.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
        model.set_submodule(names[norm], nn.Identity())
    return model


def autocast(device, amp):
    """The context of --amp and --eval-amp: "off", or convolutions in "bf16" or "fp16"."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")

"""The supernet, and one architecture of it as a network of its own.

Source: paper section 3; official `src/Supernet/network.py` and `src/Evaluation/network.py`.
"""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from blocks import build_block, conv_bn
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
        self.classifier = nn.Sequential(nn.Linear(space.last_channels, space.n_classes, bias=False))
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
        features = [nn.ModuleList(build_block(op, shape, affine) for op in space.operations) for shape in space.blocks]
        super().__init__(space, affine, features)

    def forward(self, x, candidate):
        """Logits (N, n_classes) of images (N, 3, H, W) through the candidate, a sequence of one int a block."""
        x = self.first_conv(x)
        for block, choice in zip(self.features, candidate, strict=True):
            x = block[choice](x)
        return self.head(x)

    def part(self, key):
        """A part of the forward pass, as a callable: "stem", (block, choice), or "head"."""
        return self.head if key == "head" else self.module_of(key)

    def module_of(self, key):
        """The module with the convolutions and norms of a part."""
        if isinstance(key, tuple):
            block, choice = key
            return self.features[block][choice]
        return {"stem": self.first_conv, "head": self.conv_last}[key]


class ShuffleNetV2(_ShuffleNet):
    """One architecture as a stand-alone network, with affine BN (official). `architecture` is of any form."""

    def __init__(self, architecture, input_size=224, n_classes=1000, affine=True, space=None):
        space = space or SearchSpace.for_images(input_size, n_classes)
        self.architecture = space.from_architecture(architecture)
        features = [
            build_block(space.operations[choice], shape, affine)
            for shape, choice in zip(space.blocks, self.architecture)
        ]
        super().__init__(space, affine, features)

    def forward(self, x):
        """Logits (N, n_classes) of images (N, 3, H, W)."""
        x = self.first_conv(x)
        for block in self.features:
            x = block(x)
        return self.head(x)


def initialize(model):
    """Official initial weights: N(mean 0, standard deviation): stem 0.01, other convolutions 1 / weight.shape[1]
    (so 1 for depthwise ones), linear 0.01; BN bias 1e-4 where there is one."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, 0.01 if name.startswith("first_conv") else 1 / module.weight.shape[1])
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
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
    for layers in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.BatchNorm2d):
                layers[i - 1], layers[i] = fuse_conv_bn_eval(layers[i - 1], layer), nn.Identity()
    return model


def autocast(device, amp):
    """The context of --amp and --eval-amp: "off", or convolutions in "bf16" or "fp16"."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")

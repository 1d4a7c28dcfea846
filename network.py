"""The supernet, one architecture of it as a network of its own, and official weights for both.

Source: paper section 3; official `src/Supernet/network.py` and `src/Evaluation/network.py`.
"""

import warnings

import torch
from torch import nn

from blocks import build_block, conv_bn
from space.search_space import SearchSpace
from utils import UserError


class _ShuffleNet(nn.Module):
    """Stem, `features` (made by the subclass), last convolution, pooling, dropout, classifier. (N, 3, H, W) -> (N, classes)."""

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
    """The supernet: every operation of every block, of which `forward(x, architecture)` runs one a block.

    `space` (a SearchSpace) takes the place of input_size and n_classes. BN is without affine parameters in a
    supernet (official); blocks that the architecture doesn't choose get no gradient at all.
    """

    def __init__(self, input_size=224, n_classes=1000, affine=False, space=None):
        space = space or SearchSpace.for_images(input_size, n_classes)
        features = [nn.ModuleList(build_block(op, shape, affine) for op in space.operations) for shape in space.blocks]
        super().__init__(space, affine, features)

    def forward(self, x, architecture):
        """Logits (N, n_classes) of images (N, 3, H, W) through the candidate, a sequence of one int a block."""
        x = self.first_conv(x)
        for block, choice in zip(self.features, architecture, strict=True):
            x = block[choice](x)
        return self.head(x)


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


def load_file(path):
    """What torch.save wrote to `path`, on the CPU; plain containers and tensors only, nothing in it is executed.

    Raises UserError where the file is missing, damaged, or holds anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from None
    except (
        Exception
    ) as error:  # a damaged file makes torch raise nearly anything: struct.error, AssertionError, IndexError...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: not a whole checkpoint of plain tensors ({reason[:100]}); remove or replace it"
        ) from None


def load_and_parse_state_dict(path):
    """The state dict in an official or our own file: taken out of "state_dict" or "model", "module." stripped.

    Raises UserError as `load_file` does, and where there is no state dict in it.
    """
    return parse_state_dict(load_file(path), path)


def parse_state_dict(content, path):
    """As `load_and_parse_state_dict`, for a file's content."""
    if isinstance(content, dict):
        for key in ("state_dict", "model"):
            if isinstance(content.get(key), dict):
                content = content[key]
    if not isinstance(content, dict) or not content or not all(_is_plain_tensor(v) for v in content.values()):
        raise UserError(f"{path}: holds no state dict of plain tensors")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _is_plain_tensor(value):
    """Whether it can be copied into a weight: neither sparse, quantized, nested nor without data."""
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return plain and not value.is_quantized and not value.is_nested


def load_weights(model, state_dict, path):
    """Loads strictly. Raises UserError that names the first entry that does not fit.

    A model on the meta device gets its memory once all fits: a damaged file may speak of one that has terabytes.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | state_dict.keys()):
        if name not in state_dict or name not in own:
            where = "missing" if name in own else "of another model"
            raise UserError(
                f"{path}: entry {name!r} is {where}; the model is {type(model).__name__}, {model.space.n_classes} classes"
            )
        if own[name].shape != state_dict[name].shape:
            shapes = f"{tuple(state_dict[name].shape)}, the model needs {tuple(own[name].shape)}"
            raise UserError(f"{path}: entry {name!r} has shape {shapes}")
    if next(model.parameters()).is_meta:
        model.to_empty(device="cpu")
    model.load_state_dict(state_dict)

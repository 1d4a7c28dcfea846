"""The supernet, and one architecture of it as a stand-alone network.

`load(path)` returns a retrained network, from a file of this project or an official one.
Source: paper section 3; official `src/Supernet/network.py` and `src/Evaluation/network.py`.
"""

import copy
import itertools
import typing

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from blocks import ChoiceBlock, Narrow, build_block, conv_bn, conv_bn_pairs
from images.preprocessing import preprocess
from settings.subjects import DataConfig
from space import weight_files
from space.custom import make_space
from space.search_space import SearchSpace
from utils import HERE, UserError

NOT_KNOWN = "the network was trained on images given in Python: only their program knows the preprocessing"


class Trainable(typing.Protocol):
    """The methods that a network of one's own needs, an nn.Module, to be trained and evaluated as a supernet.

    A part is a callable that runs a piece of the network: "stem", (block, choice), or "head", which ends in logits. Its
    BN layers are those of a Module that is a part, not of `classify`. A network that stands alone has candidate None,
    and needs `path` and `classify` only.
    """

    space: SearchSpace

    def path(self, candidate):
        """The parts that images (N, 3, H, W) pass through before `classify`, in order."""

    def classify(self, x):
        """Logits (N, classes) of the last part's output."""

    def part(self, key):
        """A part by its key."""

    def module_of(self, key):
        """The module with the weights and the BN layers of a part."""


class _ShuffleNet(nn.Module):
    """Stem, `features` (made by the subclass), last convolution, pooling, dropout and classifier.

    (N, image_channels of the space, H, W) -> (N, classes).
    """

    def __init__(self, space, affine, features):
        super().__init__()
        self.space = space
        stem = conv_bn(space.image_channels, space.stem_channels, 3, space.stem_stride, affine=affine)
        self.first_conv = nn.Sequential(*stem)
        self.features = nn.ModuleList(features)
        self.conv_last = nn.Sequential(*conv_bn(space.stage_channels[-1], space.last_channels, 1, affine=affine))
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Sequential(nn.Linear(space.last_channels, space.n_classes, bias=space.classifier_bias))
        initialize(self)

    def forward(self, x, candidate=None):
        """Logits (N, classes) of images (N, 3, H, W) through the candidate; a stand-alone network needs none."""
        for part in self.path(candidate):
            x = part(x)
        return self.classify(x)

    def head(self, x):
        """Logits (N, classes) of the last block's output (N, C, H, W)."""
        return self.classify(self.conv_last(x))

    def classify(self, x):
        """Logits (N, classes) of the last convolution's output (N, C, H, W)."""
        pooled = x.mean(dim=(2, 3), dtype=self.classifier[0].weight.dtype)  # the official AvgPool2d(7), for any size
        if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):  # logits of 8 bits would tie
            with torch.autocast(x.device.type, enabled=False):
                return self.classifier(self.dropout(pooled))
        return self.classifier(self.dropout(pooled))


class ShuffleNetV2OneShot(_ShuffleNet):
    """The supernet: all operations of every block, of which a path, the candidate's, runs one per block.

    `space` (a SearchSpace) replaces input_size and n_classes. BN has no affine parameters in a supernet (official);
    operations that are not in the candidate get no gradient at all.
    """

    def __init__(self, input_size=224, n_classes=1000, affine=False, space=None):
        space = space or SearchSpace.for_images(input_size, n_classes)
        blocks = zip(space.block_operations, space.blocks)
        super().__init__(space, affine, [ChoiceBlock(names, shape, space.widths, affine) for names, shape in blocks])

    def path(self, candidate):
        """What images pass through before `classify`, in order: stem, the chosen operations, last convolution."""
        choices = enumerate(self.space.block_choices(self.space.check(candidate)))
        return [self.first_conv, *map(self.part, choices), self.conv_last]

    def candidates_with_all(self):
        """Candidates that together have every operation of every block, at every width."""
        return [self.space.uniform_candidate(choice) for choice in range(max(self.space.n_choices))]

    def part(self, key):
        """A part of the forward pass, as a callable: "stem", (block, choice), or "head"."""
        if isinstance(key, tuple):
            block, choice = key
            return self.features[block].part(*self.space.operation_and_width(choice))
        return {"stem": self.first_conv, "head": self.head}[key]

    def module_of(self, key):
        """The module that holds the weights and the BN statistics of a part."""
        part = self.part(key)
        return self.conv_last if key == "head" else part.widest if isinstance(part, Narrow) else part


class ShuffleNetV2(_ShuffleNet):
    """One architecture, in any form, as a stand-alone network, with affine BN (official).

    `preprocess` turns images into its input: BGR in [0, 255] by default, so RGB in [0, 1] gives plausible nonsense.
    `config` (a DataConfig) determines how; `classes` are the names of the logits, None unless `load` found them.
    """

    def __init__(self, architecture, input_size=224, n_classes=1000, affine=True, space=None):
        space = space or SearchSpace.for_images(input_size, n_classes)
        self.architecture = space.from_architecture(architecture)
        chosen = zip(space.chosen(self.architecture), space.blocks)
        super().__init__(space, affine, [build_block(name, shape, width, affine) for (name, width), shape in chosen])
        self.config = DataConfig(space.input_size, round(space.input_size * 256 / 224))
        self.classes = None

    def path(self, candidate=None):
        """What images pass through before `classify`, in order: stem, blocks, last convolution."""
        return [self.first_conv, *self.features, self.conv_last]

    def candidates_with_all(self):
        return [None]

    def forward_features(self, x):
        """The output of each stage, (N, channels, H / stride, W / stride), for images (N, 3, H, W) of any size.

        In the paper's space these are four, of strides 4, 8, 16, 32 and 64, 160, 320, 640 channels.
        """
        x = self.first_conv(x)
        maps = []
        ends = self.stage_ends
        for number, block in enumerate(self.features):
            x = block(x)
            if number in ends:
                maps.append(x)
        return maps

    @property
    def stage_ends(self):
        """The index in `features` of the last block of each stage."""
        return [n - 1 for n in itertools.accumulate(self.space.stage_blocks)]

    def preprocess(self, images):
        """`images.preprocessing.preprocess` with the settings that the network was trained with.

        uint8 RGB (N, H, W, 3), or a PIL image as it was opened -> (N, 3, input_size, input_size), float. Raises
        UserError if it was trained on images given in Python, whose preprocessing no checkpoint knows.
        """
        if self.config is None:
            raise UserError(NOT_KNOWN)
        return preprocess(images, self.config)


def load(path, architecture=None, own=None, operations=None):
    """The retrained network in a file, a checkpoint of scratch.py or an official one, in eval mode on the CPU.

    An official file carries no architecture: that is read from the file `architecture`, by default the published
    winner's. `own` (or `operations`, its old name) is a file of own operations. Raises UserError if a file is
    missing or damaged.

        model = network.load("checkpoints/scratch/bnps-checkpoint.pth")
        logits = model(model.preprocess(images))  # uint8 RGB (N, H, W, 3) -> (N, classes)
        name = model.classes[logits[0].argmax()]
    """
    space = make_space(None, architecture, own or operations)
    try:
        return read(path, architecture, space)[0]
    except UserError as error:
        if "a supernet checkpoint" in str(error):
            raise UserError(f"{error}; training.evaluation.load_supernet reads a supernet") from None
        raise


def read(path, architecture=None, space=None):
    """(the network that `load` returns, its Checkpoint); an official file is assumed to be of `space`.

    Raises UserError if `architecture` contradicts the checkpoint.
    """
    ckpt = weight_files.load(path, "scratch", space)
    given = architecture and ckpt.space.load_architecture(architecture)
    if ckpt.architecture is None:
        ckpt.architecture = given or ckpt.space.load_architecture(HERE / "architecture_final.json")
    elif given not in (None, ckpt.architecture):
        contradiction = f"--architecture {architecture} contradicts {path}, which is of {list(ckpt.architecture)}"
        raise UserError(f"{contradiction}; leave it out")
    with torch.device("meta"):
        model = ShuffleNetV2(ckpt.architecture, space=ckpt.space)
    weight_files.load_weights(model, ckpt.weights, path)
    official = ckpt.content is None
    model.config = DataConfig.resolve({"input_size": ckpt.space.input_size}, None, path) if official else ckpt.data
    model.classes = ckpt.class_names
    return model.eval(), ckpt


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


def batch_norms(module):
    """The BN layers in a module, in order."""
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

"""The single path search space: what a candidate is, what it costs, how it is written down.

Everything that knows how many choice blocks there are, which operations a block offers, how wide and
how large each block is, and what a candidate costs, is in this file. It needs the standard library alone.

    candidate      a tuple of ints, the index of the chosen operation for each block
    architecture   a candidate as stored: NNI's one-hot form {"LayerChoice1": [false, true, ...], ...}
                   or a plain list of ints; both are read, the one-hot form is written
    FLOPs          multiply-adds of convolutions and linear layers, as the paper counts them

Source: paper (arXiv 1904.00420) section 3.4 and table 1; official `src/Search/blocks.py`, `network.py`.
"""

import dataclasses
import functools
import itertools
import re
import reprlib
from typing import NamedTuple

from utils import UserError, read_json

MAX_BLOCKS = 1000
OPERATIONS = ("shufflenet_3x3", "shufflenet_5x5", "shufflenet_7x7", "xception_3x3")


class BlockShape(NamedTuple):
    """Where a choice block sits: channels in and out (full width), middle channels, stride, input size in px."""

    in_channels: int
    out_channels: int
    mid_channels: int
    stride: int
    in_size: int

    @property
    def out_size(self):
        return -(-self.in_size // self.stride)  # every convolution pads by kernel // 2, so sizes round up

    @property
    def projects(self):
        """Whether the whole input goes through both branches, instead of one half of its channels through each."""
        return self.stride != 1 or self.in_channels != self.out_channels

    @property
    def branch_channels(self):
        """Channels into and out of the main branch; the other branch carries the rest of the output."""
        inp = self.in_channels if self.projects else self.in_channels // 2
        return inp, self.out_channels - inp


class Conv(NamedTuple):
    """One convolution, for counting: channels, kernel size, groups, output size in px."""

    in_channels: int
    out_channels: int
    kernel_size: int
    groups: int
    out_size: int

    @property
    def weights(self):
        return self.out_channels * (self.in_channels // self.groups) * self.kernel_size**2

    @property
    def flops(self):
        return self.weights * self.out_size**2


def operation_convs(operation, shape):
    """The convolutions of one operation at one block, in the order in which they run.

    Source: official `blocks.py`. "shufflenet_KxK" is the ShuffleNetV2 unit with a KxK depthwise convolution,
    "xception_3x3" the unit with three depthwise + pointwise pairs.
    """
    kind, kernel = operation.split("_")
    kernel = int(kernel.split("x")[0])
    inp, out = shape.branch_channels
    mid, big, small = shape.mid_channels, shape.in_size, shape.out_size
    if kind == "shufflenet":
        convs = [Conv(inp, mid, 1, 1, big), Conv(mid, mid, kernel, mid, small), Conv(mid, out, 1, 1, small)]
    else:
        convs = [
            Conv(inp, inp, kernel, inp, small), Conv(inp, mid, 1, 1, small),
            Conv(mid, mid, kernel, mid, small), Conv(mid, mid, 1, 1, small),
            Conv(mid, mid, kernel, mid, small), Conv(mid, out, 1, 1, small),
        ]  # fmt: skip
    if shape.projects:
        convs += [Conv(inp, inp, kernel, inp, small), Conv(inp, inp, 1, 1, small)]
    return convs


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """Choice blocks in stages, each choosing one of `operations`; the defaults are the paper's space.

    input_size is in px. `stem_stride` and `stage_strides` say where the image shrinks: the first block of a
    stage has the stage's stride. Raises UserError where the numbers make no network.
    """

    input_size: int = 224
    n_classes: int = 1000
    stem_stride: int = 2
    stage_strides: tuple = (2, 2, 2, 2)
    stage_blocks: tuple = (4, 4, 8, 4)
    stage_channels: tuple = (64, 160, 320, 640)
    stem_channels: int = 16
    last_channels: int = 1024
    operations: tuple = OPERATIONS

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            shown = reprlib.repr(value)  # short, whatever a damaged checkpoint holds
            if field.name == "operations":
                if not isinstance(value, (tuple, list)) or not value or any(op not in OPERATIONS for op in value):
                    raise UserError(f"search space: operations {shown} are not all of {', '.join(OPERATIONS)}")
            elif isinstance(value, (tuple, list)) != isinstance(field.default, tuple) or not numbers:
                raise UserError(f"search space: {field.name} is {shown}, not of the form {field.default!r}")
            elif any(type(n) is not int or not 1 <= n <= 1_000_000 for n in numbers):
                raise UserError(f"search space: {field.name} is {shown}, not made of positive whole numbers")
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        if not len(self.stage_strides) == len(self.stage_blocks) == len(self.stage_channels):
            raise UserError("search space: stage_strides, stage_blocks and stage_channels differ in length")
        if self.n_blocks > MAX_BLOCKS:
            raise UserError(f"search space: {self.n_blocks} blocks, more than {MAX_BLOCKS}")
        if any(c % 2 for c in self.stage_channels):
            raise UserError(f"search space: stage_channels {reprlib.repr(self.stage_channels)} are not all even")
        channels = (self.stem_channels, *self.stage_channels)
        if any(a >= b for a, b in itertools.pairwise(channels)):
            raise UserError(f"search space: channels {reprlib.repr(channels)} do not grow from stage to stage")

    @classmethod
    def for_images(cls, input_size=224, n_classes=1000):
        """The paper's space for images of `input_size` px; up to 64 px the stem keeps the size (stride 1)."""
        return cls(input_size=input_size, n_classes=n_classes, stem_stride=1 if input_size <= 64 else 2)

    @classmethod
    def from_dict(cls, values):
        """The space that `to_dict` wrote (a checkpoint carries it). Raises UserError on unknown or bad entries."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or not set(values) <= names:
            raise UserError(f"search space: {reprlib.repr(values)} has entries other than {', '.join(sorted(names))}")
        return cls(**values)

    def to_dict(self):
        """Plain numbers, strings and lists, for JSON and checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    # --- shape -------------------------------------------------------------------------------------------

    @functools.cached_property
    def blocks(self):
        """A BlockShape for every choice block, from the stem on."""
        shapes, channels, size = [], self.stem_channels, self.stem_size
        for stride, depth, out in zip(self.stage_strides, self.stage_blocks, self.stage_channels):
            for i in range(depth):
                shapes.append(BlockShape(channels, out, out // 2, stride if i == 0 else 1, size))
                channels, size = out, shapes[-1].out_size
        return tuple(shapes)

    @property
    def stem_size(self):
        return -(-self.input_size // self.stem_stride)

    @property
    def n_blocks(self):
        return sum(self.stage_blocks)

    @property
    def choices_per_block(self):
        """How many operations each block offers, as a tuple of n_blocks ints."""
        return (len(self.operations),) * self.n_blocks

    def check(self, candidate):
        """The candidate as a tuple of ints. Raises UserError where it is not one of this space."""
        candidate = tuple(candidate)
        if len(candidate) != self.n_blocks:
            raise UserError(f"architecture has {len(candidate)} blocks, this search space has {self.n_blocks}")
        for i, choice in enumerate(candidate, 1):
            if type(choice) is not int or not 0 <= choice < len(self.operations):
                raise UserError(
                    f"architecture: block {i} chooses {reprlib.repr(choice)}, not 0 to {len(self.operations) - 1}"
                )
        return candidate

    def random_candidate(self, rng):
        """A uniform candidate from a `random.Random`."""
        return tuple(rng.randrange(n) for n in self.choices_per_block)

    # --- cost --------------------------------------------------------------------------------------------

    @functools.cached_property
    def operation_flops(self):
        """Multiply-adds of every operation at every block: n_blocks tuples of len(operations) ints."""
        return tuple(
            tuple(sum(c.flops for c in operation_convs(op, shape)) for op in self.operations) for shape in self.blocks
        )

    @property
    def stem_conv(self):
        return Conv(3, self.stem_channels, 3, 1, self.stem_size)

    @property
    def last_conv(self):
        return Conv(self.stage_channels[-1], self.last_channels, 1, 1, self.blocks[-1].out_size)

    @functools.cached_property
    def fixed_flops(self):
        """Multiply-adds of what every candidate has: stem, last convolution and classifier."""
        return self.stem_conv.flops + self.last_conv.flops + self.last_channels * self.n_classes

    def flops(self, candidate):
        """Multiply-adds of one image through the candidate, analytic."""
        return self.fixed_flops + sum(row[choice] for row, choice in zip(self.operation_flops, candidate))

    def params(self, candidate):
        """Parameters of the candidate as a stand-alone network: convolutions, affine BN, classifier."""
        convs = [self.stem_conv, self.last_conv]
        for shape, choice in zip(self.blocks, candidate):
            convs += operation_convs(self.operations[choice], shape)
        return sum(c.weights + 2 * c.out_channels for c in convs) + self.last_channels * self.n_classes

    def with_costs(self, operation_flops, fixed_flops):
        """This space with other multiply-adds than the analytic ones: of each operation at each block, and of the rest."""
        space = dataclasses.replace(self)
        costs = {"operation_flops": tuple(map(tuple, operation_flops)), "fixed_flops": fixed_flops}
        vars(space).update(costs)  # takes the place of the cached properties
        return space

    @functools.cached_property
    def flops_range(self):
        """The lowest and the highest FLOPs of any candidate."""
        rows = self.operation_flops
        return self.fixed_flops + sum(map(min, rows)), self.fixed_flops + sum(map(max, rows))

    @functools.cached_property
    def _flops_distribution(self):
        """(upper FLOPs, share of uniform candidates at or under it), rising; costs are rounded to a grid.

        Adds the blocks up one by one on a grid of 1/8192 of the range, which is off by some 1e-4 of it: exact
        enumeration of 4^20 candidates is out of reach and sampling would need a seed.
        """
        low, high = self.flops_range
        step = max((high - low) / 8192, 1)
        counts = {0: 1}
        for row in self.operation_flops:
            offsets = [round((cost - min(row)) / step) for cost in row]
            following = {}
            for cell, n in counts.items():
                for offset in offsets:
                    following[cell + offset] = following.get(cell + offset, 0) + n
            counts = following
        total, below, distribution = sum(counts.values()), 0, []
        for cell in sorted(counts):
            below += counts[cell]
            distribution.append((min(low + cell * step, high), below / total))
        return distribution

    def flops_quantile(self, share):
        """The FLOPs at or under which `share` (0 to 1) of uniform candidates lie, to about 1e-4 of the range."""
        return next((int(cost) for cost, below in self._flops_distribution if below >= share), self.flops_range[1])

    def flops_value(self, text, flag="FLOPs"):
        """Multiply-adds from a number ("330000000"), millions ("330M") or a quantile of uniform candidates ("59%")."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([M%]?)", str(text).strip())
        value = float(match[1]) if match else 0
        if not match or not 0 < value < 1e15 or (match[2] == "%" and value > 100):
            forms = "neither multiply-adds (330000000, 330M) nor a share of candidates (59%)"
            raise UserError(f"{flag} {reprlib.repr(text)} is {forms}")
        if match[2] == "%":
            return self.flops_quantile(value / 100)
        return int(value * (1e6 if match[2] == "M" else 1))

    # --- written form ------------------------------------------------------------------------------------

    def nni_search_space(self):
        """The search space in NNI's form, {"LayerChoice1": {"_type": "layer_choice", "_value": [names]}, ...}."""
        value = {"_type": "layer_choice", "_value": list(self.operations)}
        return {f"LayerChoice{i}": value for i in range(1, self.n_blocks + 1)}

    def to_architecture(self, candidate):
        """The candidate in NNI's one-hot form, {"LayerChoice1": [false, false, true, false], ...}."""
        return {
            f"LayerChoice{i}": [op == choice for op in range(len(self.operations))]
            for i, choice in enumerate(self.check(candidate), 1)
        }

    def from_architecture(self, architecture):
        """The candidate in an architecture of either form. Raises UserError that names what is wrong."""
        if isinstance(architecture, (list, tuple)):
            return self.check(architecture)
        if not isinstance(architecture, dict):
            raise UserError(f"architecture is a {type(architecture).__name__}, not a one-hot object or a list of ints")
        names = [f"LayerChoice{i}" for i in range(1, self.n_blocks + 1)]
        if set(architecture) != set(names):
            odd = min(set(architecture) ^ set(names), key=str)
            raise UserError(f"architecture: {reprlib.repr(odd)} is {'missing' if odd in names else 'unknown'}")
        candidate = []
        for name in names:
            hot = architecture[name]
            if not isinstance(hot, list) or len(hot) != len(self.operations) or any(type(h) is not bool for h in hot):
                raise UserError(f"architecture: {name} is not a list of {len(self.operations)} true/false values")
            if sum(hot) != 1:
                raise UserError(f"architecture: {name} chooses {sum(hot)} operations, not one")
            candidate.append(hot.index(True))
        return self.check(candidate)

    def load_architecture(self, path):
        """The candidate in a JSON file of either form. Raises UserError that names the file."""
        architecture = read_json(path)
        try:
            return self.from_architecture(architecture)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

"""The single path search space: what a candidate is, what it costs, how it is written down.

Everything that knows how many choice blocks there are, which operations and widths a block offers, how wide and how
large each block is, and how a candidate is written down, is in this file; space/costs.py counts what a choice costs.
Needs torch only to count costs that were not given.

    candidate      a tuple of ints: the index of an operation for each block, then of a width for each block,
                   without the part that offers no choice
    architecture   a candidate as stored: NNI's one-hot form {"LayerChoice1": [false, true, ...], "ChannelChoice1": ...}
                   or a plain list of ints; both are read, the one-hot form is written
    choice         a block's pair of operation and width, as one index
    width          a scale of the middle channels of a block's main branch
    FLOPs          multiply-adds of convolutions and linear layers, as the paper counts them

Source: paper (arXiv 1904.00420) section 3.4 and table 1; official `src/Search/blocks.py`, `network.py`.
"""

import bisect
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import operator
import re
import reprlib
from typing import NamedTuple

import numpy as np

from space.costs import Costs, count_costs
from space.limits import SOLVE_S, Limits, read_limits
from space.twins import Twins, identities
from utils import UserError, read_json

MAX_BLOCKS = 1000
MAX_CHOICES = 256  # operations, and widths: the sampler has a byte for each
OF_SOME = (  # fields that older files lack
    "widths", "architecture", "classifier_bias", "operations_hash", "stage_operations", "image_channels",
)  # fmt: skip
UNITS = {  # cost -> (its forms in error messages, unit -> factor)
    "flops": ("multiply-adds (330000000, 330M, 700k)", {"": 1, "k": 1e3, "M": 1e6}),
    "params": ("parameters (3500000, 3.5M, 80k)", {"": 1, "k": 1e3, "M": 1e6}),
    "latency": ("milliseconds (8ms) or microseconds (57us)", {"ms": 1e6, "us": 1e3}),
}
OPERATIONS = ("shufflenet_3x3", "shufflenet_5x5", "shufflenet_7x7", "xception_3x3")
SAME_OPERATIONS = {}  # hash of own operations in older checkpoints -> the hash that is used now


class BlockShape(NamedTuple):
    """Where a choice block sits: channels in and out, stride, input size in px."""

    in_channels: int
    out_channels: int
    stride: int
    in_size: int

    def mid_channels(self, width=1.0):
        """Channels in the middle of the main branch, scaled by `width`."""
        return int(self.out_channels // 2 * width)

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


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """Choice blocks in stages, each with one of `operations` at one of `widths`; the defaults are the paper's space.

    `stage_operations` are those of them that each stage offers, if not all. `architecture` fixes the operations, so
    that only widths are chosen. `operations_hash` is the hash of the file of custom operations. `given_costs` replace
    counted ones. input_size is in px. The first block of a stage has the stride of the stage. Images have
    `image_channels` channels, 3 in the commands. Raises UserError if the fields describe no network; whether operations
    take the channels is theirs to say, see `costs.check_fit`.
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
    widths: tuple = (1.0,)
    architecture: tuple = ()
    classifier_bias: bool = False
    operations_hash: str = ""
    given_costs: Costs | None = dataclasses.field(default=None, hash=False)  # own costs are a dict
    stage_operations: tuple = ()
    image_channels: int = 3

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "given_costs":
                continue
            self._check_entry(field, value)
            if isinstance(value, (list, tuple)):
                plain = tuple(tuple(v) if isinstance(v, list) else v for v in value)
                object.__setattr__(self, field.name, plain)
        if not len(self.stage_strides) == len(self.stage_blocks) == len(self.stage_channels):
            raise UserError("search space: stage_strides, stage_blocks and stage_channels differ in length")
        if self.n_blocks > MAX_BLOCKS:
            raise UserError(f"search space: {self.n_blocks} blocks, more than {MAX_BLOCKS}")
        if (n := max(len(self.operations), len(self.widths))) > MAX_CHOICES:
            raise UserError(f"search space: {n} operations or widths, more than {MAX_CHOICES}")
        if self.stage_operations and len(self.stage_operations) != len(self.stage_blocks):
            n = len(self.stage_operations)
            raise UserError(f"search space: stage_operations has {n} entries for {len(self.stage_blocks)} stages")
        if (
            any(a >= b for a, b in itertools.pairwise(self.widths))
            or min(self.stage_channels) // 2 * self.widths[0] < 1
        ):
            raise UserError(f"search space: widths {reprlib.repr(self.widths)} do not rise, or leave no middle channel")
        if self.architecture:
            fixed = self.architecture
            fits = len(fixed) == self.n_blocks and all(i < len(names) for i, names in zip(fixed, self.offered))
            if not fits or len(self.widths) == 1:
                shown = f"architecture {reprlib.repr(fixed)}, {len(self.operations)} operations"
                shown += f", {len(self.widths)} widths"
                raise UserError(f"search space: {shown}: needs an operation for each block, and widths to choose from")

    def _check_entry(self, field, value):
        """Raises UserError if an entry is not of the form of its default."""
        listed = isinstance(value, (tuple, list))
        shown = reprlib.repr(value)  # short, even if the file is damaged
        values = value if listed else (value,)
        lowest = 0 if field.name == "architecture" else 1
        if listed != isinstance(field.default, tuple) or not (values or field.default == ()):
            raise UserError(f"search space: {field.name} is {shown}, not of the form {field.default!r}")
        if field.name == "operations":
            if not all(isinstance(name, str) and re.fullmatch(r"\w{1,50}", name) for name in values):
                raise UserError(f"search space: operations {shown} are not all names, such as {', '.join(OPERATIONS)}")
            if len(set(values)) != len(values):
                raise UserError(f"search space: operations {shown} has a name twice")
        elif field.name == "stage_operations":
            for names in values:
                known = isinstance(names, (tuple, list)) and all(name in self.operations for name in names)
                if not known or not names or len(set(names)) != len(names):
                    raise UserError(f"search space: {field.name} has {reprlib.repr(names)}, not some of operations")
        elif field.name == "widths":
            if not all(type(w) in (int, float) and 0 < w <= 100 for w in values):
                raise UserError(f"search space: widths {shown} are not made of positive numbers up to 100")
        elif isinstance(field.default, (bool, str)):
            if type(value) is not type(field.default):
                raise UserError(f"search space: {field.name} is {shown}, not of the form {field.default!r}")
        elif any(type(n) is not int or not lowest <= n <= 1_000_000 for n in values):
            raise UserError(f"search space: {field.name} is {shown}, not made of positive whole numbers")

    @classmethod
    def for_images(cls, input_size=224, n_classes=1000):
        """The paper's space for images of `input_size` px; up to 64 px the stem keeps the size (stride 1)."""
        return cls(input_size=input_size, n_classes=n_classes, stem_stride=1 if input_size <= 64 else 2)

    @classmethod
    def from_dict(cls, values):
        """The space that `to_dict` wrote (a checkpoint carries it). Raises UserError on unknown or bad entries."""
        names = {field.name for field in dataclasses.fields(cls)} - {"given_costs"}
        if not isinstance(values, dict) or not set(values) <= names:
            raise UserError(f"search space: {reprlib.repr(values)} has entries other than {', '.join(sorted(names))}")
        digest = values.get("operations_hash", "")
        return cls(**values | {"operations_hash": SAME_OPERATIONS.get(digest, digest)})

    def to_dict(self):
        """Plain numbers, strings and lists, for JSON and checkpoints; leaves out defaults that older files lack."""
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "given_costs" and not (field.name in OF_SOME and value == field.default):
                values[field.name] = json.loads(json.dumps(value))  # lists for tuples
        return values

    @property
    def is_papers(self):
        """Whether stages, sizes and operations are the paper's; widths and a fixed architecture don't count."""
        return dataclasses.replace(self, widths=(1.0,), architecture=(), given_costs=None) == SearchSpace()

    # --- shape -------------------------------------------------------------------------------------------

    @functools.cached_property
    def blocks(self):
        """A BlockShape for every choice block, in order."""
        shapes, channels, size = [], self.stem_channels, -(-self.input_size // self.stem_stride)
        for stride, depth, out in zip(self.stage_strides, self.stage_blocks, self.stage_channels):
            for i in range(depth):
                shapes.append(BlockShape(channels, out, stride if i == 0 else 1, size))
                channels, size = out, shapes[-1].out_size
        return tuple(shapes)

    @property
    def n_blocks(self):
        return sum(self.stage_blocks)

    @property
    def n_widths(self):
        return len(self.widths)

    @functools.cached_property
    def offered(self):
        """The names of the operations from which each block's is chosen, here or by the architecture that is fixed."""
        of_stages = self.stage_operations or (self.operations,) * len(self.stage_blocks)
        return tuple(names for names, depth in zip(of_stages, self.stage_blocks) for _ in range(depth))

    @functools.cached_property
    def block_operations(self):
        """The names of the operations that each block offers; one each if an architecture is fixed."""
        if self.architecture:
            return tuple((names[operation],) for names, operation in zip(self.offered, self.architecture))
        return self.offered

    @functools.cached_property
    def n_choices(self):
        """How many choices, pairs of operation and width, each block offers."""
        return tuple(len(names) * self.n_widths for names in self.block_operations)

    @functools.cached_property
    def choices(self):
        """How many values each entry of a candidate can take: operations of each block, then widths of each block."""
        operations = () if self.architecture else tuple(map(len, self.block_operations))
        return operations + ((self.n_widths,) * self.n_blocks if self.n_widths > 1 else ())

    @property
    def width_entries(self):
        """The slice of a candidate's entries that are widths."""
        return slice(len(self.choices) - self.n_blocks if self.n_widths > 1 else len(self.choices), None)

    def block_choices(self, candidate):
        """The choice of each block, operation * n_widths + width, of a candidate or of columns of many (numpy)."""
        if self.n_widths == 1:
            return candidate
        operations = (0,) * self.n_blocks if self.architecture else candidate[: self.n_blocks]
        widths = candidate[self.width_entries]
        return tuple(operation * self.n_widths + width for operation, width in zip(operations, widths))

    def operation_and_width(self, choice):
        """The index of the operation and that of the width of a block's choice."""
        return divmod(choice, self.n_widths)

    def candidate_of(self, choices):
        """The candidate that makes these choices, one for each block: the inverse of `block_choices`."""
        operations, widths = zip(*map(self.operation_and_width, choices))
        return (() if self.architecture else operations) + (widths if self.n_widths > 1 else ())

    def uniform_candidate(self, choice):
        """The candidate that makes the same choice at every block; those that offer fewer make their last one."""
        return self.candidate_of([min(choice, n - 1) for n in self.n_choices])

    def largest(self, *limits):
        """The candidate with the most FLOPs; of equal choices, the first ones.

        Within `limits`, texts such as "params=3.5M" (see `search.py --limit`), one of those with the most; found by
        `Limits.optimum`. Raises UserError if none is within them.
        """
        return self._extreme(-1, limits)

    def smallest(self, *limits):
        """The candidate with the fewest FLOPs; otherwise as `largest`."""
        return self._extreme(1, limits)

    def _extreme(self, sign, texts):
        if not texts:
            return self.candidate_of([min(range(len(row)), key=lambda i: sign * row[i]) for row in self.costs.flops])
        limits = Limits(self, read_limits(self, texts))
        limits.check()
        if not (found := limits.optimum("flops", sign)):
            raise UserError(f"limits {', '.join(texts)}: the solver found no candidate in {SOLVE_S} s")
        return found

    def operations_of(self, candidate):
        """The index of the operation of each block among those `offered`."""
        return tuple(names.index(name) for names, (name, _) in zip(self.offered, self.chosen(candidate)))

    def chosen(self, candidate):
        """The (operation name, width) of each block."""
        for names, choice in zip(self.block_operations, self.block_choices(candidate)):
            operation, width = self.operation_and_width(choice)
            yield names[operation], self.widths[width]

    def check(self, candidate):
        """The candidate as a tuple of ints; entries may be anything that is an index, as numbers of NumPy are.

        Raises UserError if it is not one of this space.
        """
        candidate = tuple(candidate)
        if len(candidate) != len(self.choices):
            unit = "blocks" if len(self.choices) == self.n_blocks else "entries"
            found = f"architecture has {len(candidate)} {unit}"
            raise UserError(f"{found}, this search space has {len(self.choices)}")
        checked = []
        for i, (choice, n) in enumerate(zip(candidate, self.choices)):
            index = -1
            if not isinstance(choice, bool):
                with contextlib.suppress(TypeError):
                    index = operator.index(choice)
            if not 0 <= index < n:
                block = i % self.n_blocks + 1
                what = reprlib.repr(choice)
                raise UserError(f"architecture: block {block} chooses {what}, not 0 to {n - 1}")
            checked.append(index)
        return tuple(checked)

    @functools.cached_property
    def twins(self):
        """The Twins of this space, by what the classes of its operations say. Needs torch."""
        return Twins(self, identities(self))

    def canonical(self, candidate):
        """The form that all candidates have in common which are the same network; see space/twins.py. Needs torch."""
        return self.twins.canonical(self.check(candidate))

    def random_candidate(self, rng):
        """A uniform candidate from a `random.Random`."""
        return tuple(rng.randrange(n) for n in self.choices)

    # --- cost --------------------------------------------------------------------------------------------

    @functools.cached_property
    def costs(self):
        """The Costs of every choice, counted from its module unless they were given."""
        return self.given_costs or count_costs(self)

    def with_costs(self, **changed):
        """This space with some fields of its Costs replaced."""
        return dataclasses.replace(self, given_costs=self.costs._replace(**changed))

    def flops(self, candidate):
        """Multiply-adds of one image through the candidate."""
        return self.cost("flops", candidate)

    def params(self, candidate):
        """Parameters of the candidate as a stand-alone network, with affine BN."""
        return self.cost("params", candidate)

    def cost_range(self, name):
        """The lowest and the highest of a cost that `has_table` of any candidate: exact, since it is a sum."""
        rows, fixed = self.cost_rows(name)
        return fixed + sum(map(min, rows)), fixed + sum(map(max, rows))

    def has_table(self, name):
        """Whether a cost is a sum over the blocks; a user's may be any function of a candidate."""
        return name not in self.costs.own or bool(self.costs.own[name].rows)

    def cost_rows(self, name):
        """(cost of every choice at every block, cost common to all candidates), whole numbers, of one that has them."""
        costs = self.costs
        if name in costs.own:
            return costs.own[name].rows, 0
        return {
            "flops": (costs.flops, costs.stem_flops + costs.tail_flops),
            "params": (costs.params, costs.fixed_params),
            "latency": (costs.latency, costs.fixed_latency),
        }[name]

    def cost(self, name, candidate):
        """A cost of a candidate: multiply-adds, parameters, ns, or a user's (OwnCost)."""
        if not self.has_table(name):
            return self.costs.own[name].function(tuple(candidate))
        rows, fixed = self.cost_rows(name)
        return fixed + sum(row[choice] for row, choice in zip(rows, self.block_choices(candidate)))

    def quantile(self, name, share):
        """The cost at or under which `share` (0 to 1) of uniform candidates lie, to about 1e-4 of the range; exactly
        for 1, and for a user's cost that has few values, which would tell them apart."""
        low, high = self.cost_range(name)
        if share >= 1:
            return high
        found = self.grid_quantile(name, share)
        if name in self.costs.own:
            rows, _ = self.cost_rows(name)
            apart = math.gcd(*(cost - min(row) for row in rows for cost in row))
            if apart > self.grid_error(name):
                found = low + round((found - low) / apart) * apart
        return found

    def grid_error(self, name):
        """By how much `grid_quantile` may be off, at most half of it: a step for each block."""
        low, high = self.cost_range(name)
        return len(self.cost_rows(name)[0]) * max((high - low) / 8192, 1)

    def grid_quantile(self, name, share):
        """`quantile` on a grid, which can end below the highest cost.

        Adds the blocks up one by one on a grid of 1/8192 of the range: exact enumeration of 4^20 candidates is out of
        reach and sampling would need a seed.
        """
        rows, _ = self.cost_rows(name)
        low, high = self.cost_range(name)
        step = max((high - low) / 8192, 1)
        counts = np.ones(1)
        for row in rows:
            cells = np.bincount([round((cost - min(row)) / step) for cost in row])
            # Scaled to stay finite, by a power of two to stay exact where floats can count the candidates.
            counts = np.convolve(counts, cells / 2 ** (len(row) - 1).bit_length())
        below = list(itertools.accumulate(int(n * 2.0**1000) for n in counts))
        cell = bisect.bisect_left([n / below[-1] for n in below], share)
        return int(min(low + cell * step, high))

    def cost_value(self, name, text, flag="cost"):
        """A cost from a text: a number with one of its units ("330M", "8ms"), or a quantile of uniform candidates
        ("59%"); `flag` is named in errors."""
        own = self.costs.own.get(name)
        what, units = (own.unit or "a number", {"": own.scale, own.unit: own.scale}) if own else UNITS[name]
        match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)(\D.*|)", str(text).strip())
        value = float(match[1]) if match else 0
        if not match or match[2] not in (*units, "%") or not 0 < value < 1e15 or (match[2] == "%" and value > 100):
            raise UserError(f"{flag} {reprlib.repr(text)} is neither {what} nor a share of candidates (59%)")
        if match[2] == "%":
            if not self.has_table(name):
                raise UserError(f"{flag} {text}: {name} is any function of a candidate, without shares; give a number")
            return self.quantile(name, value / 100)
        value *= units[match[2]]
        return int(value) if not own else round(value) if own.rows else value

    # --- written form ------------------------------------------------------------------------------------

    def nni_search_space(self):
        """The search space in NNI's form: "LayerChoice1" to choose an operation, "ChannelChoice1" to choose a width."""
        space = {}
        for i, names in enumerate(self.block_operations, 1):
            space[f"LayerChoice{i}"] = {"_type": "layer_choice", "_value": list(names)}
        if self.n_widths > 1:
            for i in range(1, self.n_blocks + 1):
                space[f"ChannelChoice{i}"] = {"_type": "choice", "_value": list(self.widths)}
        return space

    def to_architecture(self, candidate):
        """The candidate in NNI's one-hot form, {"LayerChoice1": [false, false, true, false], ...}."""
        chosen = list(self.chosen(self.check(candidate)))
        layers = enumerate(zip(self.offered, chosen), 1)
        hot = {f"LayerChoice{i}": [op == name for op in names] for i, (names, (name, _)) in layers}
        if self.n_widths > 1:
            hot |= {f"ChannelChoice{i}": [w == width for w in self.widths] for i, (_, width) in enumerate(chosen, 1)}
        return hot

    def from_architecture(self, architecture):
        """The candidate in an architecture of either form; without widths, these are 1.0.

        Raises UserError, naming the entry, if it is not one of this space.
        """
        if hasattr(architecture, "tolist"):  # an array of NumPy or torch
            architecture = architecture.tolist()
        if isinstance(architecture, (list, tuple)):
            operations_alone = self.n_widths > 1 and not self.architecture and len(architecture) == self.n_blocks
            return self.check((*architecture, *self._full_widths()) if operations_alone else architecture)
        if not isinstance(architecture, dict):
            raise UserError(f"architecture is a {type(architecture).__name__}, not a one-hot object or a list of ints")
        layers = [f"LayerChoice{i}" for i in range(1, self.n_blocks + 1)]
        channels = [f"ChannelChoice{i}" for i in range(1, self.n_blocks + 1)] if self.n_widths > 1 else []
        names = layers + (channels if any(name in architecture for name in channels) else [])
        if set(architecture) != set(names):
            odd = min(set(architecture) ^ set(names), key=str)
            raise UserError(f"architecture: {reprlib.repr(odd)} is {'missing' if odd in names else 'unknown'}")
        offered = zip(layers, self.offered)
        operations = tuple(_hot(architecture, name, len(names), "operations") for name, names in offered)
        if self.architecture and operations != self.architecture:
            raise UserError(
                f"architecture: has operations {list(operations)}, this search space {list(self.architecture)}"
            )
        widths = tuple(_hot(architecture, name, self.n_widths, "widths") for name in names[self.n_blocks :])
        if channels and not widths:
            widths = self._full_widths()
        return self.check((() if self.architecture else operations) + widths)

    def _full_widths(self):
        if 1.0 not in self.widths:
            raise UserError(f"architecture: names no widths, and 1.0 is not one of {list(self.widths)}")
        return (self.widths.index(1.0),) * self.n_blocks

    def load_architecture(self, path):
        """The candidate in a JSON file of either form. Raises UserError that names the file."""
        architecture = read_json(path)
        try:
            return self.from_architecture(architecture)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def _hot(architecture, name, n, what):
    """The index of the one true value in an entry of a one-hot architecture."""
    hot = architecture[name]
    if not isinstance(hot, list) or len(hot) != n or any(type(h) is not bool for h in hot):
        raise UserError(f"architecture: {name} is not a list of {n} true/false values")
    if sum(hot) != 1:
        raise UserError(f"architecture: {name} chooses {sum(hot)} {what}, not one")
    return hot.index(True)

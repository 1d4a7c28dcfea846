"""The official FLOPs table, `op_flops_dict.pkl`, read without executing anything a pickle can carry.

    {"conv1": {(3, 16, 224, 224, 2): n},                        # stem: channels, input size, stride
     "rest_operation": {(640, 1000, 7, 7, 1): n},               # last convolution, pooling, classifier
     "shufflenet_3x3_stride_1": {(64, 64, 32, 56, 56, 1): n},   # full width in and out, middle, input size, stride
     ...}

space/costs.py counts without a table; a table serves for comparison, and for other costs (`search.py --flops-table
FILE`). Needs only the standard library.
"""

import io
import pickle
import pickletools
import reprlib

from utils import HERE, UserError, read_bytes

OFFICIAL = HERE / "data" / "op_flops_dict.pkl"  # where a user may put the official file; not part of this project
MAX_BYTES = 1_000_000  # the official table has a few kB
_INTEGERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
_OTHERS = {
    "PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Refuses to import classes and functions, without which a pickle executes nothing."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"names {module}.{name}")


def _check_opcodes(data):
    """Raises UnpicklingError unless `data` consists of dicts, strings, numbers and flat tuples of integers.

    Checked before anything is unpickled, since classes are not the only danger: nested tuples as keys take exponential
    time or overflow the stack, huge integers make keys collide, a memo index of 2^31 takes 34 GB.
    """
    mark, integers = False, 0  # the integers pushed last: whether a mark precedes them, and how many they are
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _INTEGERS and abs(argument) < 2**60:
            integers += 1
            continue
        if name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            if not (mark if name == "TUPLE" else integers >= int(name[-1])):
                raise pickle.UnpicklingError("holds a tuple of something else than integers")
        elif name not in _OTHERS:
            raise pickle.UnpicklingError(f"holds {name} {reprlib.repr(argument)}")
        elif "PUT" in name and argument > len(data):
            raise pickle.UnpicklingError(f"memo index {argument}")
        mark, integers = name == "MARK", 0


def read_flops_table(path):
    """The table in a file, {group: {key: multiply-adds}}; keys are tuples of ints.

    Raises UserError if the file is missing or larger than any table, or holds anything but a table.
    """
    data = read_bytes(path, MAX_BYTES)
    try:
        _check_opcodes(data)
        table = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises ValueError, TypeError, KeyError, EOFError and others
        raise UserError(f"{path}: not a plain FLOPs table ({str(error)[:80]})") from None
    return _check_table(table, path)


def _check_table(table, path):
    if not isinstance(table, dict) or not all(isinstance(group, dict) for group in table.values()):
        raise UserError(f"{path}: not a FLOPs table, a dict of dicts")
    for name, group in table.items():
        for key, flops in group.items():
            entry = f"{path}: entry {reprlib.repr(name)} {reprlib.repr(key)}"
            if not isinstance(name, str) or not isinstance(key, tuple):
                raise UserError(f"{entry}: not a name and a tuple")
            if type(flops) not in (int, float) or not 0 < flops < 1e15 or flops != int(flops):
                raise UserError(f"{entry}: {reprlib.repr(flops)} is not a whole number of multiply-adds")
    return {name: {key: int(flops) for key, flops in group.items()} for name, group in table.items()}


def with_flops_table(space, table, path="FLOPs table"):
    """(the space with the table's costs, {entry: (table, analytic)} where these differ).

    Raises UserError naming the first entry that the space needs and the table lacks.
    """
    differences = {}

    def look_up(group, key, counted):
        try:
            flops = table[group][key]
        except KeyError:
            need = f"which input size {space.input_size} and {space.n_classes} classes need"
            raise UserError(f"{path}: no entry {group} {key}, {need}; use another table, or none") from None
        if flops != counted:
            differences[group, key] = flops, counted
        return flops

    if space.n_widths > 1:
        raise UserError(f"{path}: has operations of one width, the search space {space.n_widths}; leave the table out")
    rows = []
    for shape, names, counted in zip(space.blocks, space.block_operations, space.costs.flops):
        mid = shape.mid_channels()
        key = (shape.in_channels, shape.out_channels, mid, shape.in_size, shape.in_size, shape.stride)
        rows.append(tuple(look_up(f"{op}_stride_{shape.stride}", key, n) for op, n in zip(names, counted)))
    size = space.input_size
    last = space.blocks[-1]
    stem_key = (3, space.stem_channels, size, size, space.stem_stride)
    tail_key = (last.out_channels, space.n_classes, last.out_size, last.out_size, 1)
    stem = look_up("conv1", stem_key, space.costs.stem_flops)
    tail = look_up("rest_operation", tail_key, space.costs.tail_flops)
    return space.with_costs(flops=tuple(rows), stem_flops=stem, tail_flops=tail), differences


def official_comparison(space):
    """A line that compares the official table with the analytic count; None if there is no such file.

    `space` is the paper's, as in that table. A table that can't be read gives a warning, since no cost comes from it.
    """
    if not OFFICIAL.exists():
        return None
    try:
        return comparison(with_flops_table(space, read_flops_table(OFFICIAL), OFFICIAL)[1], OFFICIAL)
    except UserError as error:
        return f"warning: {error}"


def comparison(differences, path):
    """A line that compares a table with the analytic count, by the differences that with_flops_table returns."""
    if not differences:
        return f"{path}: all entries agree with the analytic count"
    named = [f"{group} {key} is {flops}, not {analytic}" for (group, key), (flops, analytic) in differences.items()]
    more = f", and {len(named) - 3} more" if len(named) > 3 else ""
    return f"warning: {path} differs from the analytic count: {', '.join(named[:3])}{more}"

"""The official FLOPs table: read, compared, used; nothing in a pickle is executed or exhausts the machine."""

import dataclasses
import os
import pathlib
import pickle
import random

import pytest
from test_search_space import PUBLISHED, SPACE, WINNER, assert_one_line

import tester
from space import flops_table
from space.flops_table import read_flops_table, with_flops_table
from space.search_space import OPERATIONS, SearchSpace
from utils import UserError

SHAPES = {  # first and last block: full width in and out, middle, input size, stride at 224 px
    (1, 1): (16, 64, 32, 112, 112, 2),
    (2, 4): (64, 64, 32, 56, 56, 1),
    (5, 5): (64, 160, 80, 56, 56, 2),
    (6, 8): (160, 160, 80, 28, 28, 1),
    (9, 9): (160, 320, 160, 28, 28, 2),
    (10, 16): (320, 320, 160, 14, 14, 1),
    (17, 17): (320, 640, 320, 14, 14, 2),
    (18, 20): (640, 640, 320, 7, 7, 1),
}


def official_table():
    table = {"conv1": {(3, 16, 224, 224, 2): 5419008}, "rest_operation": {(640, 1000, 7, 7, 1): 33136640}}
    for (first, last), shape in SHAPES.items():
        for block, *row in PUBLISHED:
            if first <= block <= last:
                for operation, flops in zip(OPERATIONS, row):
                    table.setdefault(f"{operation}_stride_{shape[-1]}", {})[shape] = flops
    return table


@pytest.fixture
def write(tmp_path):
    def write(content, protocol=2):
        path = tmp_path / "op_flops_dict.pkl"
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
        return path

    return write


@pytest.mark.parametrize("protocol", range(6))
def test_the_official_table_is_read_and_equals_the_analytic_count(write, protocol):
    table = read_flops_table(write(official_table(), protocol))
    assert table == official_table() and sum(map(len, table.values())) == 34
    space, differences = with_flops_table(SPACE, table)
    assert differences == {}
    assert space.costs == SPACE.costs and dataclasses.replace(space, given_costs=None) == SPACE != space
    assert space.flops(WINNER) == 322_918_720


def test_other_costs_are_used_and_the_differences_told(write):
    table = official_table()
    table["shufflenet_5x5_stride_1"][64, 64, 32, 56, 56, 1] += 1000
    table["rest_operation"][640, 1000, 7, 7, 1] = 33136641.0
    space, differences = with_flops_table(SPACE, read_flops_table(write(table)))
    assert differences == {
        ("shufflenet_5x5_stride_1", (64, 64, 32, 56, 56, 1)): (8932328, 8931328),
        ("rest_operation", (640, 1000, 7, 7, 1)): (33136641, 33136640),
    }
    assert space.flops(WINNER) == 322_918_720 + 2001  # in blocks 2 to 4, the winner has 5x5 in 2 and 4
    assert space.cost_range("flops")[1] == SPACE.cost_range("flops")[1] + 1
    assert SPACE.flops(WINNER) == 322_918_720


def test_the_official_file_is_compared_where_it_is_there(write, tmp_path, monkeypatch, capsys):
    path = tmp_path / "op_flops_dict.pkl"
    monkeypatch.setattr(flops_table, "OFFICIAL", path)

    def gen():
        tester.main(tester.parse_args(["--mode", "gen", "--out", str(tmp_path)]))
        return [line for line in capsys.readouterr().out.splitlines() if str(path) in line]

    assert gen() == []
    table = official_table()
    write(table)
    assert gen() == [f"{path}: all entries agree with the analytic count"]
    table["rest_operation"][640, 1000, 7, 7, 1] = 1
    write(table)
    assert gen() == [
        f"warning: {path} differs from the analytic count: rest_operation (640, 1000, 7, 7, 1) is 1, not 33136640"
    ]
    write({group: dict.fromkeys(entries, 7) for group, entries in table.items()})
    (line,) = gen()
    assert line.startswith(f"warning: {path} ") and line.count("is 7, not") == 3 and line.endswith(", and 31 more")
    path.write_bytes(b"nothing of the kind")
    (line,) = gen()
    assert line.startswith(f"warning: {path}: not a plain FLOPs table")


def test_a_table_without_an_entry_that_is_needed_is_refused():
    for name, key in [("conv1", (3, 16, 224, 224, 2)), ("xception_3x3_stride_2", (320, 640, 320, 14, 14, 2))]:
        table = official_table()
        del table[name][key]
        with pytest.raises(UserError, match=f"FILE: no entry {name} ") as error:
            with_flops_table(SPACE, table, "FILE")
        assert_one_line(error)
    with pytest.raises(UserError, match=r"FILE: no entry .* input size 32 and 10 classes"):
        with_flops_table(SearchSpace.for_images(32, 10), official_table(), "FILE")


class Call:
    """Unpickled by `pickle.load`, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_executed(write, tmp_path, protocol):
    mark = tmp_path / "executed"
    bombs = [Call(pathlib.Path.touch, mark), Call(os.system, f"touch {mark}"), Call(eval, f"open({str(mark)!r}, 'w')")]
    for bomb in bombs:
        pickle.loads(pickle.dumps(bomb, protocol))
        assert mark.exists()  # so the bomb works
        mark.unlink()
        for content in (
            bomb,
            {"conv1": bomb},
            official_table() | {"conv1": {(3, 16, 224, 224, 2): bomb}},
            {"conv1": {bomb: 1}},
        ):
            with pytest.raises(UserError, match=r"op_flops_dict\.pkl: not a plain FLOPs table") as error:
                read_flops_table(write(content, protocol))
            assert_one_line(error)
            assert not mark.exists()


def nested_tuples(depth):
    """A dict whose key is a tuple in a tuple in a tuple...: hashing it overflows the stack."""
    return b"\x80\x02}" + b"K\x01" + b"\x85" * depth + b"K\x01s."


def doubled_tuples(depth):
    """A dict whose key is (t, t) of (t, t) of ...: hashing it takes 2**depth steps."""
    return b"\x80\x04}" + b"K\x01\x85\x94" + b"".join(b"h%c\x86\x94" % i for i in range(depth)) + b"K\x01s."


def colliding_keys(n):
    """A dict of n integers with one hash, each key compared with all before."""
    return (
        b"\x80\x02}("
        + b"".join(b"\x8a\x0b%bK\x01" % (1 + i * (2**61 - 1)).to_bytes(11, "little", signed=True) for i in range(n))
        + b"u."
    )


HOSTILE = {
    "empty": b"",
    "no pickle": b"not a pickle",
    "cut off": pickle.dumps(official_table())[:-200],
    "protocol 255": b"\x80\xff}.",
    "nothing to return": b"\x80\x02.",
    "tuple in tuple in tuple": nested_tuples(900_000),
    "tuples twice in tuples": doubled_tuples(200),
    "colliding integers": colliding_keys(60_000),
    "million digits": b"I" + b"9" * 900_000 + b"\n.",
    "memo index 2^31": b"\x80\x02}r\xff\xff\xff\x7f.",
    "memo index in digits": b"\x80\x02}p4000000000\n.",
    "2 GB integer": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "2^64 byte frame": b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
    "4 GB string": b"\x80\x02X\xff\xff\xff\xff.",
    "2^63 bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    "2^63 byte array": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
    "persistent object": b"\x80\x02Pxyz\n.",
    "persistent object on the stack": b"\x80\x02}Q.",
    "extension": b"\x80\x02\x82\x01.",
    "instance": b"(S'ls'\nios\nsystem\n.",
    "reduce": b"cos\nsystem\n(S'ls'\ntR.",
    "copies on the stack": b"\x80\x02}" + b"2" * 900_000 + b".",
    "item of a number": b"\x80\x02K\x01K\x01K\x01s.",
    "dict as a key": b"\x80\x02}}K\x01s.",
    "marks": b"(" * 900_000 + b".",
    "numbers": b"K\x01" * 400_000 + b".",
    "dict in dict in dict": b"\x80\x02" + b"}K\x01" * 200_000 + b"}" + b"s" * 200_000 + b".",
}


@pytest.mark.timeout(60)  # what these files are made to exceed
@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_and_hostile_files_are_refused_at_once(write, name):
    path = write(HOSTILE[name])
    with pytest.raises(UserError) as error:
        read_flops_table(path)
    assert str(error.value).startswith(f"{path}: ")
    assert_one_line(error)


@pytest.mark.parametrize("key", [1, "x" * 1000, ("a", 2), 2.5, None], ids=lambda key: repr(key)[:20])
def test_keys_other_than_tuples_of_integers_are_refused(write, key):
    with pytest.raises(UserError, match=r"op_flops_dict\.pkl: ") as error:
        read_flops_table(write({"conv1": {key: 3}}))
    assert_one_line(error)


@pytest.mark.parametrize(
    "flops", ["3", 0, -5, 2.5, float("nan"), float("inf"), 10**16, True, None, {}, [3], b"3"], ids=repr
)
def test_costs_other_than_whole_positive_numbers_are_refused(write, flops):
    with pytest.raises(UserError, match=r"op_flops_dict\.pkl: ") as error:
        read_flops_table(write({"conv1": {(1, 2): flops}}))
    assert_one_line(error)


@pytest.mark.parametrize("content", [1, "text", (1, 2), [], None, {"conv1": 1}, {1: {(1, 2): 3}}], ids=repr)
def test_pickles_of_something_else_are_refused(write, content):
    with pytest.raises(UserError, match=r"op_flops_dict\.pkl: ") as error:
        read_flops_table(write(content))
    assert_one_line(error)


def test_a_file_larger_than_any_table_is_refused(write):
    with pytest.raises(UserError, match=r"op_flops_dict\.pkl: over 1000000 bytes"):
        read_flops_table(write({"conv1": {(i, 1): 1 for i in range(200_000)}}))


def test_a_table_that_contains_itself_is_refused(write):
    table = {}
    table["conv1"] = table
    with pytest.raises(UserError, match="not a name and a tuple"):
        read_flops_table(write(table))


def test_missing_files_are_refused(tmp_path):
    for path in (tmp_path / "no.pkl", tmp_path):
        with pytest.raises(UserError, match=f"{path}: "):
            read_flops_table(path)


def test_randomly_damaged_files_either_load_or_are_refused(write):
    rng = random.Random(0)
    for i in range(500):
        content = bytearray(pickle.dumps(official_table(), i % 6))
        for _ in range(rng.randrange(1, 5)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        try:
            table = read_flops_table(write(bytes(content)))
            assert all(type(n) is int for group in table.values() for n in group.values())
        except UserError as error:
            assert "op_flops_dict.pkl: " in str(error)

"""Odd values, and mutations of trees of values and of bytes, for the inputs of faults/fuzz.py."""

_ODD_NUMBERS = (0, 1, -1, 3, 4, 2**31, 2**63, -(2**64), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"))
_ODD_TEXTS = ("", "a", "\0", "\ud800", "é" * 50, "x" * 5000, "1e5", "-1", "LayerChoice1", "../..", "/dev/null", "a\nb")
_ODD_TREES = ([], {}, [[]], [1, "a"], {"a": 1}, list(range(3000)))
ODD_VALUES = (None, True, False, *_ODD_NUMBERS, *_ODD_TEXTS, *_ODD_TREES)
ODD_WORDS = (
    *("", " 7 ", "9" * 5000, "é", "\udcff", "\0", "a\nb"),
    *("-", "--", "-1", "-0.0", "nan", "inf", "-inf", "1e400", "1_0", "٣", "0x10", "1e5", "=", "--help", "--demo"),
    *("--config", "--=", "%", "%s", "{}", "290M", "59%", "101%", "/dev/null", ".", "none", "true"),
)
TAGS = (
    *("!!python/object/apply:os.system ['exit 3']", "!!python/name:os.system", "!!timestamp x", "!!int ''", "!!bool x"),
    *("!!float ''", "!!binary '?'", "!!set {a}", "!!omap [a: 1]", "2001-99-99", "&a [*a]", "*nowhere", "? [a]"),
    *("{<<: 3}", "0b", "1:60", "\t- x", "%YAML 9.9", "--- 1\n--- 2", "&a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"),
)


def laughs(key, depth=60):
    """YAML of aliases whose expanded value has 2^depth words."""
    lines = [f"l0: &l0 [x, x]\n{key}: &l1 [*l0, *l0]"]
    lines += [f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}]" for i in range(2, depth)]
    return "\n".join([*lines, f"{key}: {{lr: *l{depth - 1}}}"])


def places(value):
    """(container, key) of all values in a tree of dicts and lists."""
    if not isinstance(value, (dict, list)):
        return
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        yield from places(inner)


def _fresh(value):
    """Copies dicts and lists only: copying a `Call` would execute it, and deeply nested tuples would take forever."""
    if isinstance(value, dict):
        return {key: _fresh(inner) for key, inner in value.items()}
    return [_fresh(inner) for inner in value] if type(value) is list else value


def mutate_tree(rng, tree, odd=ODD_VALUES):
    """Returns a copy of the tree with one to three changes."""
    tree = _fresh(tree)
    for _ in range(rng.randint(1, 3)):
        found = list(places(tree))
        if not found:
            return rng.choice(odd)
        where, key = rng.choice(found)
        kind = rng.randrange(6)
        if kind == 0:
            del where[key]
        elif kind == 1:
            other, name = rng.choice(found)
            there = name < len(other) if isinstance(other, list) else name in other
            where[key] = _fresh(other[name]) if there else None
        elif kind == 2 and isinstance(where, dict):
            name = rng.choice(["", "a", "LayerChoice21", "model", key * 2 if isinstance(key, str) else 5])
            where[name] = where.pop(key)
        elif kind == 3:
            for _ in range(rng.choice((1, 5, 90))):
                where[key] = [where[key]]
        else:
            where[key] = _fresh(rng.choice(odd))
    return tree


def mutate_bytes(rng, data):
    """Returns the bytes with one to five changes: a byte, a cut, a repeated or moved piece, or truncation."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        if not data:
            break
        at = rng.randrange(len(data))
        n = rng.choice((1, 4, 30))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at : at + n]
        elif kind == 3:
            data[at:at] = data[at : at + n] * rng.choice((1, 2, 100))
        elif kind == 4:
            to = rng.randrange(len(data))
            data[to : to + n] = data[at : at + n]
        else:
            del data[at:]
    return bytes(data)

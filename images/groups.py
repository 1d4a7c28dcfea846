"""Groups of images that belong together, such as several of one thing: which there are, and a draw of whole groups.

A group may have images of several classes, as one font has all letters.
"""

import csv
import re

import numpy as np

from images.image_check import composed
from utils import UserError

TRIES = 20  # random orders, until one leaves no class short


def groups_of(group_by, part, paths):
    """The name of the group of each file of a part, "train" or "val"; None where it has none.

    `group_by` is a regular expression, or the name of a .csv of file and group, where a file is `<class>/<file>` of
    both parts, or `<part>/<class>/<file>`. Raises UserError if it is neither.
    """
    if group_by.endswith(".csv"):
        named = {composed(file): group for file, group in read_groups(group_by).items()}
        return [named.get(f"{part}/{path}", named.get(path)) for path in map(composed, paths)]
    try:
        matches = map(re.compile(group_by).search, map(composed, paths))
    except re.error as error:
        raise UserError(f"--group-by {group_by!r}: not a regular expression ({error})") from None
    return [match and (" ".join(match.groups("")) or match[0]) for match in matches]


def read_groups(path):
    """{file: group} of a CSV, with or without the line file,group. Raises UserError that names the line."""
    named = {}
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.reader(file)
            for row in filter(None, reader):  # a blank line is an empty row
                if len(row) != 2:
                    raise UserError(f"{path}: line {reader.line_num} has {len(row)} columns, not file and group")
                name, group = row
                if named.setdefault(name, group) != group:
                    raise UserError(f"{path}: {name} is in two groups, {named[name]!r} and {group!r}")
    except OSError as error:
        raise UserError(f"--group-by {path}: {error.strerror}") from None
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV of file and group ({error})") from None
    return named


def number_groups(images, group_by, part):
    """The number of the group of each image (N,), in order of their first images; without a name, one of its own.

    Without `group_by`, each image is a group. Raises UserError if no image has a name.
    """
    if not group_by:
        return np.arange(len(images))
    names = groups_of(group_by, part, images.paths)
    if not any(name is not None for name in names):
        raise UserError(f"--group-by {group_by}: none of the {len(names)} files of {images.root} is in a group")
    first = {}
    numbers = [first.setdefault((i,) if name is None else name, i) for i, name in enumerate(names)]
    return np.unique(numbers, return_inverse=True)[1]


def shared_groups(group_by, train, val):
    """A line for each group that has images of train and of val."""
    names = {part: groups_of(group_by, part, images.paths) for part, images in (("train", train), ("val", val))}
    first = {name: path for name, path in zip(reversed(names["train"]), reversed(train.paths)) if name is not None}
    found = {name: path for name, path in zip(reversed(names["val"]), reversed(val.paths)) if name in first}
    return [f"group {name!r} is in train and val: train/{first[name]}, val/{found[name]}" for name in sorted(found)]


def grouping_warnings(images, group_by):
    """Lines that say that `group_by` groups nothing, or all images of train into one."""
    names = groups_of(group_by, "train", images.paths)
    n = len(set(names) - {None}) + names.count(None)
    if n == 1 < len(images):
        return [f"--group-by {group_by}: all {len(images)} images of train are in one group"]
    if n == len(images):
        return [f"--group-by {group_by}: {n} groups of {n} images: each is on its own, as without the setting"]
    return []


def count_pairs(groups, labels):
    """Groups, classes and numbers of images, three arrays, of all that have images, in order of the groups' numbers."""
    n = labels.max() + 1
    pairs, sizes = np.unique(groups * n + labels, return_counts=True)
    return pairs // n, pairs % n, sizes


def draw_across(pairs, wanted, rng, before=False, free=True):
    """(which groups are drawn, as bools, a class that has too few images in them, or None).

    Takes groups in random order over all classes: one of which a class has fewer images than `wanted` (classes,), and
    never the last that is left of a class. Where an order leaves a class short, tries others. Those of `before` are
    drawn already, and only `free` ones may be: bools (G,). `pairs` are those of `count_pairs`.
    """
    groups, labels, sizes = pairs
    ends = np.searchsorted(groups, np.arange(groups.max() + 2))
    for _ in range(TRIES):
        drawn = np.zeros(len(ends) - 1, bool) | before
        taken = drawn[groups]
        found = np.bincount(labels[taken], sizes[taken], len(wanted))
        left = np.bincount(labels[~taken], minlength=len(wanted))
        for group in rng.permutation(np.flatnonzero(~drawn & free)):
            own = slice(ends[group], ends[group + 1])
            classes = labels[own]
            if (found[classes] < wanted[classes]).any() and left[classes].min() > 1:
                drawn[group] = True
                found[classes] += sizes[own]
                left[classes] -= 1
                if (found >= wanted).all():
                    break
        short = np.flatnonzero(found < wanted)
        if not len(short):
            return drawn, None
    return drawn, short[0]


def why_not(images, groups, label, wanted, advice=""):
    """A line that says why the groups of a class can't be split into `wanted` images and others, and what helps."""
    of_class = np.flatnonzero(images.labels == label)
    own, first, sizes = np.unique(groups[of_class], return_index=True, return_counts=True)
    where = f"class {images.classes[label]!r} has {len(of_class)} images in"
    largest = sizes.argmax()
    example = images.paths[of_class[first[largest]]]
    if len(own) == 1:
        return f"{where} one group, that of {example}, and needs two: add images of others, or make the groups smaller"
    where += f" {len(own)} groups"
    rest = len(of_class) - sizes.min()
    if rest >= wanted:  # by itself the class could be split
        n, classes = np.sum(groups == own[largest]), len(np.unique(images.labels[groups == own[largest]]))
        return (
            f"{where}, and no draw gives it {wanted} or more and leaves a group of each class: the largest, that of "
            f"{example}, has {n} images of {classes} classes; {advice}add images, or make the groups smaller"
        )
    what = f"of which at most {rest} leave a group to train on, not {wanted}"
    return f"{where}, {what}: the largest, that of {example}, has {sizes.max()}; {advice}or add images"


def describe(images, groups, heldout, per_class, n_shared):
    """A line with the numbers of groups and held-out images, and what is held out beyond `per_class` by class."""
    counts = np.bincount(images.labels[heldout], minlength=len(images.classes))
    beyond = [f"{images.classes[c]} {counts[c] - per_class}" for c in np.argsort(-counts, kind="stable")
              if counts[c] > per_class]  # fmt: skip
    if beyond:
        beyond = f", beyond {per_class} of each class: {', '.join(beyond[:8])}{', ...' * (len(beyond) > 8)}"
    held = f"{len(np.unique(groups[heldout])):,} held out with {len(heldout):,} images{beyond or ''}"
    return f"groups: {groups.max() + 1:,} of the {len(images):,} images of train, {held}; {n_shared} in train and val"

"""Sorts photos/<class>/<image> into sorted/{train,val}/<class>/<image>: a fifth of each class, in whole groups, to val.

    python data/sort_images.py --config own.yml       by the group-by of own.yml, or each image on its own
    python data/sort_images.py PHOTOS SORTED --group-by '/(.*?)_'

Images are linked, or copied where they can't be. Another run adds what is new, and leaves each group where it is.
"""

import os
import pathlib
import shutil
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from images.dataset import ignored_line, scan
from images.groups import count_pairs, draw_across, number_groups, why_not
from settings.command_line import Parser
from settings.subjects import DataConfig, Run
from utils import UserError, run_script

PARTS = ("train", "val")


def parse_args(argv=None):
    parser = Parser(__doc__, "sort_images")
    parser.add_argument("photos", nargs="?", default="photos", help="folder with a folder for each class (photos)")
    parser.add_argument("sorted", nargs="?", default="sorted", help="the new folder (sorted)")
    parser.add(Run, only=("config",))
    parser.add(DataConfig, only=("group_by", "split_seed"))
    return parser.parse(argv)


def draw_val(photos, groups, before, seed):
    """Which of the photographs, an ImageSet in groups (N,), belong in val, as bools; `before` has the files by part.

    Raises UserError that names a class which can't be split, or a group that is in both parts already.
    """
    known = {}
    for part in PARTS:
        known[part] = np.zeros(groups.max() + 1, bool)
        known[part][groups[[path in before[part] for path in photos.paths]]] = True
    if (both := known["train"] & known["val"]).any():
        path = photos.paths[np.argmax(both[groups])]
        raise UserError(f"{path}: its group is in train and val, as sorted before: remove both, and sort again")
    wanted = np.maximum(1, np.bincount(photos.labels) // 5)
    pairs = count_pairs(groups, photos.labels)
    drawn, _ = draw_across(pairs, wanted, np.random.default_rng(seed), known["val"], ~known["train"])
    for part in (drawn, ~drawn):
        if not (n := np.bincount(photos.labels[part[groups]], minlength=len(wanted))).all():
            raise UserError(why_not(photos, groups, n.argmin(), 1))
    return drawn[groups]


def put(source, target):
    """Links a file, or copies it where it can't be linked, as to another disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        unfinished = target.with_name(f".{target.name}")
        shutil.copy2(source, unfinished)
        os.replace(unfinished, target)


def is_changed(source, target):
    """Whether a sorted file is no longer that of its photograph, which has been edited."""
    now, then = source.stat(), target.stat()
    same = now.st_size == then.st_size and abs(now.st_mtime - then.st_mtime) <= 2  # as exactly as FAT keeps it
    return not (os.path.samestat(now, then) or same)


def main(args):
    if not os.path.isdir(args.photos):
        raise UserError(f"{args.photos}: no such folder; name the one that has a folder of images for each class")
    ignored = []
    photos = scan(args.photos, ignored=ignored)
    out = pathlib.Path(args.sorted)
    before = {part: {f"{p.parent.name}/{p.name}" for p in (out / part).glob("[!.]*/[!.]*")} for part in PARTS}
    groups = number_groups(photos, args.group_by, "photos")
    val = draw_val(photos, groups, before, args.split_seed)
    for path, part in zip(photos.paths, np.where(val, "val", "train")):
        source, target = pathlib.Path(args.photos, path), out / part / path
        if path not in before[part] or is_changed(source, target):
            put(source, target)
    if ignored:
        print(ignored_line(args.photos, ignored))
    for part in PARTS:
        for path in sorted(before[part] - set(photos.paths)):
            print(f"{out / part / path}: its photograph is gone")
    for label, name in enumerate(photos.classes):
        n, of_val = np.sum(photos.labels == label), np.sum(val & (photos.labels == label))
        if not n <= 10 * of_val <= 4 * n:
            print(f"{name}: {of_val} of {n} images are in val, since groups are whole")
    sizes = f"{len(photos)} images of {len(photos.classes)} classes, in val {np.sum(val)}"
    print(f"{out}: {sizes}; groups: {groups.max() + 1}, in val {len(np.unique(groups[val]))}")


if __name__ == "__main__":
    run_script(main, parse_args)

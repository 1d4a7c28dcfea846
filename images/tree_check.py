"""The check of a tree before anything is trained on it: what `python dataloader.py --check DIR` prints."""

from images import image_check
from images.dataset import (
    alike_classes,
    groups_of,
    number_groups,
    scan,
    shared_groups,
    tree_paths,
    unmatched_classes,
    with_classes_of,
)
from settings.subjects import Images
from utils import UserError


def check_tree(folder, cache, accept=False, max_pixels=Images.max_pixels, group_by=None):
    """Prints a line for each problem of a tree. Raises UserError with counts if there are any."""
    problems = []
    ignored = []
    train, val = (scan(f"{folder}/{part}", problems, ignored=ignored) for part in ("train", "val"))
    val = with_classes_of(train, val)
    problems += unmatched_classes(folder, train, val)
    paths = tree_paths(train, val)
    before = image_check.fingerprint(folder, paths)  # a file that changes while it is read is checked again
    found = image_check.inspect_all(folder, paths, max_pixels)
    unreadable, mislabelled, shared = found.unreadable, found.mislabelled, found.shared
    copies = [f"{path}: a copy of {first}" for first, group in found.copies.items() for path in group[1:]]
    groups = shared_groups(group_by, train, val) if group_by else []
    if group_by:
        number_groups(train, groups_of(group_by, "train", train.paths), group_by)  # raises if they are none
    lines = [
        *problems,
        *alike_classes(folder, train),
        *groups,
        *(f"{folder}/{line}" for line in unreadable + mislabelled + shared + copies),
        *(f"{path}: ignored, because its suffix is not that of an image" for path in ignored),
    ]
    if lines:
        print(*lines, sep="\n", flush=True)
    counts = f"{len(unreadable)} unreadable, {len(mislabelled)} mislabelled, {len(shared)} in train and val"
    if copies:
        counts += f", {len(copies)} copies in train"
    if found.turned:
        counts += f", {found.turned} with an EXIF orientation"
    if group_by:
        counts += f", {len(groups)} groups in train and val"
    if problems or unreadable or (mislabelled and not accept):
        way = "remove or replace them" if problems or unreadable else "correct them, or accept them with --accept"
        raise UserError(f"{folder}: {counts} of {len(paths)} images, {len(problems)} wrong folders; {way}")
    image_check.remember(folder, before, found.counts, cache)
    sizes = f"{len(train)} training and {len(val)} validation images of {len(train.classes)} classes"
    print(f"{folder}: {sizes}, {counts}; recorded")

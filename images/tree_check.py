"""The check of a tree before anything is trained on it: what `python dataloader.py --check DIR` prints."""

from images import image_check
from images.dataset import alike_classes, draw_heldout, scan_parts, tree_paths
from images.groups import describe, grouping_warnings, number_groups, shared_groups
from settings.subjects import DataConfig
from utils import UserError


def check_tree(folder, cache, accept, max_pixels, given):
    """Prints a line for each problem of a tree. Raises UserError with counts if there are any.

    `given` (name -> value) are settings of a DataConfig: what doesn't go with them is printed, too.
    """
    config = DataConfig.resolve(given)
    group_by = config.group_by
    problems = []
    ignored = []
    train, val = scan_parts(folder, config, problems, ignored)
    paths = tree_paths(train, val)
    before = image_check.fingerprint(folder, paths)  # a file that changes while it is read is checked again
    found = image_check.inspect_all(folder, paths, max_pixels, config)
    unreadable, mislabelled, shared = found.unreadable, found.mislabelled, found.shared
    copies = [f"{path}: a copy of {first}" for first, group in found.copies.items() for path in group[1:]]
    groups = shared_groups(group_by, train, val) if group_by else []
    lines = [
        *problems,
        *alike_classes(folder, train),
        *groups,
        *(f"{folder}/{line}" for line in unreadable + mislabelled + shared + copies + found.flat),
        *(f"{path}: ignored, because its suffix is not that of an image" for path in ignored),
    ]
    if lines:
        print(*lines, sep="\n", flush=True)
    counts = f"{len(unreadable)} unreadable, {len(mislabelled)} mislabelled, {len(shared)} in train and val"
    if copies:
        counts += f", {len(copies)} copies in train"
    if found.turned:
        counts += f", {found.turned} with an EXIF orientation"
    if problems or unreadable or (mislabelled and not accept):
        way = "remove or replace them" if problems or unreadable else "correct them, or accept them with --accept"
        raise UserError(f"{folder}: {counts} of {len(paths)} images, {len(problems)} wrong folders; {way}")
    image_check.remember(folder, before, found.counts, cache)
    sizes = f"{len(train)} training and {len(val)} validation images of {len(train.classes)} classes"
    unsuited = _unsuited(found, config, given, train, len(paths))
    print(f"{folder}: {sizes}, {counts}; recorded", *unsuited, sep="\n", flush=True)
    if group_by or "heldout_per_class" in given:
        numbers = number_groups(train, group_by, "train")
        heldout = draw_heldout(train, config, numbers)
    if group_by:
        print(describe(train, numbers, heldout, config.heldout_per_class, len(groups)))


def _unsuited(found, config, given, train, n):
    """Lines on what settings don't suit: those of ImageNet, where the images are others."""
    if found.grey > n / 2 and config.jitter:
        yield f"{found.grey} of {n} images are greyscale: their saturation can't vary; try jitter: 0"
    if found.small > n / 2 and "input_size" in given:
        yield f"{found.small} of {n} images are smaller than the input: try less than input-size {config.input_size}"
    if config.group_by:
        yield from grouping_warnings(train, config.group_by)

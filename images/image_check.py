"""Checks once, before a script starts to compute, that all files of an image tree can be read and have one label each.

Pillow decodes every file completely (JPEG at an eighth of its size, which still reads all of its data). A tree that
passed is recorded with the names, sizes and modification times of its files, and checked again only when one of these
or the version of the check changes. A file may be *unreadable* (empty, truncated, not an image, or one that is not
read), or *mislabelled* (the same content in two classes, or a suffix of another format), which the user can accept.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import unicodedata
from typing import NamedTuple

from tqdm import tqdm

from images import pictures
from settings.subjects import Images
from utils import UserError, cores, heartbeat, log, read_json, write_json

RECORD = "checked.json"  # in the folder of --cache: {folder: entry} of the trees that passed; see `remember`
CHECK_VERSION = 2  # a tree that passed another version of the check is checked again
CHUNK = 64  # files a task of a thread


class Found(NamedTuple):
    """What `inspect` finds in a file."""

    digest: bytes | None = None
    reason: str | None = None  # why it is unreadable
    suffix: str | None = None  # the correct one of a misnamed file
    turned: bool = False  # whether its EXIF data ask for another orientation
    # By a DataConfig, if one is given:
    flat: bool = False  # one colour, where it is transparent
    grey: bool = False
    small: bool = False  # smaller than the input


@dataclasses.dataclass
class Inspection:
    """What `inspect_all` finds in a tree: lists of lines, `<file>: <what is wrong>`, and what warnings count."""

    unreadable: list = dataclasses.field(default_factory=list)
    mislabelled: list = dataclasses.field(default_factory=list)
    shared: list = dataclasses.field(default_factory=list)  # in train and val
    copies: dict = dataclasses.field(default_factory=dict)  # first file -> all of train with its content and class
    turned: int = 0  # images with an orientation in their EXIF data
    flat: list = dataclasses.field(default_factory=list)  # images of one colour
    grey: int = 0  # images without colours
    small: int = 0  # images smaller than the input

    @property
    def counts(self):
        """What is recorded of a tree that passed, by name."""
        copies = [[path.removeprefix("train/") for path in group] for group in self.copies.values()]
        return {"shared": len(self.shared), "turned": self.turned, "copies": copies}


def inspect(path, max_pixels=Images.max_pixels, config=None):
    """Returns what is Found in a file, with a DataConfig also of its picture."""
    try:
        data = pathlib.Path(path).read_bytes()
        if not data:
            return Found(reason="an empty file")
        with pictures.open_image(io.BytesIO(data)) as image:
            if reason := pictures.refusal(image, max_pixels):
                return Found(reason=reason)
            small = bool(config) and min(image.size) < config.input_size
            image.draft("RGB", (1, 1))
            image.load()
            turned = pictures.orientation(image) != 1
            flat = bool(config) and image.has_transparency_data and pictures.is_flat(pictures.rgb(image, config))
            grey = bool(config) and pictures.is_grey(image)
    except pictures.UNDECODABLE as error:
        return Found(reason=pictures.problem(error))
    suffixes = pictures.SUFFIXES[image.format]
    misnamed = pathlib.Path(path).suffix.lower() not in suffixes
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return Found(digest, None, suffixes[0] if misnamed else None, turned, flat, grey, small)


def inspect_all(folder, paths, max_pixels=Images.max_pixels, config=None):
    """The Inspection of a tree, whose files are `paths`, `<part>/<class>/<file>` in `folder`; `config` as in `inspect`.

    Uses a thread for each core, because Pillow releases the GIL while it decodes. Shows a progress bar after 5 s.
    """
    result = Inspection()
    first = {}  # digest -> the first file with this content
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]

    def inspect_chunk(chunk):
        return [inspect(os.path.join(folder, path), max_pixels, config) for path in chunk]

    with (
        concurrent.futures.ThreadPoolExecutor(cores()) as pool,
        tqdm(total=len(paths), desc="checking images, once", unit=" images", delay=5, mininterval=1) as progress,
        contextlib.closing(pool.map(inspect_chunk, chunks)) as inspected,  # Ctrl-C cancels the chunks that are left
    ):
        for chunk, found in zip(chunks, inspected):
            for path, file in zip(chunk, found):
                if file.reason:
                    result.unreadable.append(f"{path}: {file.reason}")
                    continue
                if file.suffix:
                    result.mislabelled.append(f"{path}: content of a {file.suffix} file")
                result.turned += file.turned
                result.grey += file.grey
                result.small += file.small
                if file.flat:
                    result.flat.append(f"{path}: one colour on the ground of alpha: {config.alpha}")
                other = first.setdefault(file.digest, path)
                if class_of(other) != class_of(path):
                    result.mislabelled.append(f"{path}: the same image as {other}, in another class")
                elif other.split("/")[0] != path.split("/")[0]:
                    result.shared.append(f"{path}: the same image as {other}")
                elif other != path and path.startswith("train/"):
                    result.copies.setdefault(other, [other]).append(path)
            progress.update(len(chunk))
            heartbeat()
    return result


def composed(name):
    """A name in one form of Unicode, NFC: two forms look alike."""
    return unicodedata.normalize("NFC", name)


def class_of(path):
    """The class of a file `<part>/<class>/<file>`."""
    return composed(path.split("/")[1])


def check_images(folder, paths, cache, max_pixels=Images.max_pixels):
    """The counts of an Inspection, by name. Raises UserError if an image of the tree is unreadable or mislabelled.

    A tree that is recorded in the folder `cache` is not read again; None: there is no record.
    """
    files = fingerprint(folder, paths)
    entry = _record(cache).get(os.path.abspath(folder)) if cache else None
    if isinstance(entry, dict) and (entry.get("version"), entry.get("files")) == (CHECK_VERSION, files):
        return entry
    found = inspect_all(folder, paths, max_pixels)
    wrong = found.unreadable + found.mislabelled
    if wrong:
        accept = "" if found.unreadable else ", and with --accept accepts them"
        counts = f"{len(found.unreadable)} unreadable and {len(found.mislabelled)} mislabelled files"
        raise UserError(
            f"{folder}: {counts}, the first: {wrong[0]}; "
            f"python dataloader.py --check {folder}{f' --cache {cache}' if cache else ''} lists all of them{accept}"
        )
    if cache:
        remember(folder, files, found.counts, cache)
    return found.counts


def fingerprint(folder, paths):
    """A hash of the names, sizes and modification times of the files."""
    digest = hashlib.sha256()
    for path in paths:
        heartbeat()
        try:
            status = os.stat(os.path.join(folder, path))
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError as error:  # such as a link to nothing, which the check of the file names
            state = error.strerror
        digest.update(f"{path}\n{state}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def remember(folder, files, counts, cache):
    """Records that a tree with this fingerprint passed, and its counts; drops trees that no longer exist."""
    kept = {name: value for name, value in _record(cache).items() if os.path.isdir(name)}
    path = pathlib.Path(cache, RECORD)
    entry = {"version": CHECK_VERSION, "files": files, **counts}
    try:
        write_json(path, kept | {os.path.abspath(folder): entry}, indent=1)
    except OSError as error:
        log.warning("%s: can't be written (%s); the images will be checked again next time", path, error.strerror)


def _record(cache):
    try:
        record = read_json(pathlib.Path(cache, RECORD), most=None)
    except UserError:  # missing or damaged
        return {}
    return record if isinstance(record, dict) else {}

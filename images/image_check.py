"""Checks once, before a script starts to compute, that all files of an image tree can be read and have one label each.

Pillow decodes every file completely (JPEG at an eighth of its size, which still reads all of its data). A tree that
passed is recorded with the names, sizes and modification times of its files, and checked again only when one of these
changes. A file may be *unreadable* (empty, truncated, not an image, or in a format that not both loaders read), or
*mislabelled* (the same content in two classes, or a suffix of another format), which the user can accept.
"""

import concurrent.futures
import contextlib
import hashlib
import io
import os
import pathlib

from PIL import Image
from tqdm import tqdm

from images import pictures
from utils import UserError, cores, heartbeat, log, read_json, write_json

RECORD = "checked.json"  # in the folder of --cache: {folder: [fingerprint, shared images]} of the trees that passed
CHUNK = 64  # files a task of a thread


def inspect(path):
    """Returns (digest, why the file is unreadable or None, the correct suffix of a misnamed file or None)."""
    try:
        data = pathlib.Path(path).read_bytes()
        if not data:
            return None, "an empty file", None
        with Image.open(io.BytesIO(data)) as image:
            if reason := pictures.refusal(image):
                return None, reason, None
            image.draft("RGB", (1, 1))
            image.load()
    except pictures.UNDECODABLE as error:
        return None, pictures.problem(error), None
    suffixes = pictures.SUFFIXES[image.format]
    wrong_suffix = pathlib.Path(path).suffix.lower() not in suffixes
    return hashlib.blake2b(data, digest_size=16).digest(), None, suffixes[0] if wrong_suffix else None


def inspect_all(folder, paths):
    """Returns (unreadable, mislabelled, shared), a line for each such file of `paths`, which are
    `<part>/<class>/<file>` in `folder`; shared ones have the same content in train and val.

    Uses a thread for each core, because Pillow releases the GIL while it decodes. Shows a progress bar after 5 s.
    """
    unreadable, mislabelled, shared, first = [], [], [], {}
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]

    def inspect_chunk(chunk):
        return [inspect(os.path.join(folder, path)) for path in chunk]

    with (
        concurrent.futures.ThreadPoolExecutor(cores()) as pool,
        tqdm(total=len(paths), desc="checking images, once", unit=" images", delay=5, mininterval=1) as progress,
        contextlib.closing(pool.map(inspect_chunk, chunks)) as inspected,  # Ctrl-C cancels the chunks that are left
    ):
        for chunk, found in zip(chunks, inspected):
            for path, (digest, reason, suffix) in zip(chunk, found):
                if reason:
                    unreadable.append(f"{path}: {reason}")
                    continue
                if suffix:
                    mislabelled.append(f"{path}: content of a {suffix} file")
                other = first.setdefault(digest, path)
                if other.split("/")[1] != path.split("/")[1]:
                    mislabelled.append(f"{path}: the same image as {other}, in another class")
                elif other.split("/")[0] != path.split("/")[0]:
                    shared.append(f"{path}: the same image as {other}")
            progress.update(len(chunk))
            heartbeat()
    return unreadable, mislabelled, shared


def check_images(folder, paths, cache):
    """Raises UserError if an image of the tree is unreadable or mislabelled. Returns how many val shares with train.

    A tree that is recorded in the folder `cache` is not read again; None: there is no record.
    """
    found = fingerprint(folder, paths)
    recorded, n_shared = _entry(_record(cache).get(os.path.abspath(folder))) if cache else (None, 0)
    if recorded == found:
        return n_shared
    unreadable, mislabelled, shared = inspect_all(folder, paths)
    wrong = unreadable + mislabelled
    if wrong:
        accept = "" if unreadable else ", and with --accept accepts them"
        raise UserError(
            f"{folder}: {len(unreadable)} unreadable and {len(mislabelled)} mislabelled files, the first: {wrong[0]}; "
            f"python dataloader.py --check {folder}{f' --cache {cache}' if cache else ''} lists all of them{accept}"
        )
    if cache:
        remember(folder, found, len(shared), cache)
    return len(shared)


def fingerprint(folder, paths):
    """A hash of the names, sizes and modification times of the files."""
    digest = hashlib.sha256()
    for path in paths:
        heartbeat()
        try:
            status = os.stat(os.path.join(folder, path))
            digest.update(f"{path}\n{status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        except OSError as error:
            raise UserError(f"{os.path.join(folder, path)}: {error.strerror}") from None
    return digest.hexdigest()


def remember(folder, found, n_shared, cache):
    """Records that a tree with this fingerprint passed, and its shared images; drops trees that no longer exist."""
    kept = {name: value for name, value in _record(cache).items() if os.path.isdir(name)}
    path = pathlib.Path(cache, RECORD)
    try:
        write_json(path, kept | {os.path.abspath(folder): [found, n_shared]}, indent=1)
    except OSError as error:
        log.warning("%s: can't be written (%s); the images will be checked again next time", path, error.strerror)


def _entry(value):
    """(fingerprint, shared images) of an entry; an older one is the fingerprint alone."""
    return value if isinstance(value, list) and len(value) == 2 else (value, 0)


def _record(cache):
    try:
        record = read_json(pathlib.Path(cache, RECORD))
    except UserError:  # missing or damaged
        return {}
    return record if isinstance(record, dict) else {}

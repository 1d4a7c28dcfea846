"""Whether the files of an image tree can be read and have one label each: asked once, before a script starts to compute.

Every file is read and decoded whole by Pillow (JPEG at an eighth of its size, which still reads all of its data). A tree
that passed is remembered by the names, sizes and times of its files, and is decoded again only when one of them changes.
Two things are wrong with files: they are *unreadable* (empty, cut short, no image, in a format that not both loaders read), or
*mislabelled* (the same content in two classes, or a suffix that belongs to another format), which the user may accept.
"""

import concurrent.futures
import hashlib
import io
import os
import pathlib

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from utils import HERE, UserError, cores, log, read_json, write_json

SUFFIXES = {  # of the formats that DALI and Pillow both decode, by Pillow's names; MPO is JPEG with further images after the first
    "JPEG": (".jpg", ".jpeg"), "MPO": (".jpg", ".jpeg"), "PNG": (".png",), "BMP": (".bmp",), "PPM": (".ppm", ".pgm"),
    "TIFF": (".tif", ".tiff"), "WEBP": (".webp",),
}  # fmt: skip
UNDECODABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises
RECORD = HERE / "data" / "cache" / "checked.json"  # {folder: fingerprint} of the trees that passed
CHUNK = 64  # files that a thread takes at a time


def inspect(path):
    """(digest of the content, why it can't be used or None, the suffix that it should have or None) of one image file."""
    try:
        data = pathlib.Path(path).read_bytes()
        if not data:
            return None, "an empty file", None
        with Image.open(io.BytesIO(data)) as image:
            suffixes = SUFFIXES.get(image.format)
            if suffixes is None:
                return None, f"a {image.format} file, which not every loader reads", None
            if image.mode[0] in "IF":
                return (
                    None,
                    f"is grey with more than 8 bits (mode {image.mode}), which the loaders read differently",
                    None,
                )
            image.draft("RGB", (1, 1))
            image.convert("RGB")
    except UnidentifiedImageError:
        return None, "not an image", None
    except UNDECODABLE as error:
        return None, getattr(error, "strerror", None) or f"not a whole image ({error})", None
    wrong_suffix = pathlib.Path(path).suffix.lower() not in suffixes
    return hashlib.blake2b(data, digest_size=16).digest(), None, suffixes[0] if wrong_suffix else None


def check(folder, paths):
    """(unreadable, mislabelled): lines that name each such file among `paths`, `<part>/<class>/<file>` below `folder`.

    On all cores, in threads: Pillow decodes without holding the interpreter's lock. Progress is shown where it takes long.
    """
    unreadable, mislabelled, first = [], [], {}
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    with (
        concurrent.futures.ThreadPoolExecutor(cores()) as pool,
        tqdm(total=len(paths), desc="checking images, once", unit=" images", delay=5, mininterval=1) as progress,
    ):
        for chunk, found in zip(
            chunks, pool.map(lambda chunk: [inspect(os.path.join(folder, path)) for path in chunk], chunks)
        ):
            for path, (digest, reason, suffix) in zip(chunk, found):
                if reason:
                    unreadable.append(f"{path}: {reason}")
                    continue
                if suffix:
                    mislabelled.append(f"{path}: content of a {suffix} file")
                other = first.setdefault(digest, path)
                if other.split("/")[1] != path.split("/")[1]:
                    mislabelled.append(f"{path}: the same image as {other}, in another class")
            progress.update(len(chunk))
    return unreadable, mislabelled


def require(folder, paths):
    """Raises UserError where the images of a tree did not pass the check, which is made now unless it was made before."""
    found = fingerprint(folder, paths)
    if _record().get(os.path.abspath(folder)) == found:
        return
    unreadable, mislabelled = check(folder, paths)
    wrong = unreadable + mislabelled
    if wrong:
        accept = "" if unreadable else ", and with --accept says that they are right"
        raise UserError(
            f"{folder}: {len(unreadable)} unreadable and {len(mislabelled)} mislabelled files, the first: {wrong[0]}; "
            f"python dataloader.py --check {folder} names them all{accept}"
        )
    remember(folder, found)


def fingerprint(folder, paths):
    """A hash of the names, sizes and times of the files."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(os.path.join(folder, path))
            digest.update(f"{path}\n{status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        except OSError as error:
            raise UserError(f"{os.path.join(folder, path)}: {error.strerror}") from None
    return digest.hexdigest()


def remember(folder, found):
    """Notes that a tree of this fingerprint passed; trees that are gone are forgotten."""
    kept = {name: value for name, value in _record().items() if os.path.isdir(name)}
    try:
        write_json(RECORD, kept | {os.path.abspath(folder): found}, indent=1)
    except OSError as error:
        log.warning("%s: can't be written (%s); the images are checked again next time", RECORD, error.strerror)


def _record():
    try:
        record = read_json(RECORD)
    except UserError:  # missing or damaged: check again
        return {}
    return record if isinstance(record, dict) else {}

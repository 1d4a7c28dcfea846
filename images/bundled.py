"""The bundled images of `--demo`: part of Fashion-MNIST as a folder tree of JPEG files, unpacked from an archive when
needed.

data/make_fashion_mnist.py makes the archive, data/fashion-mnist.tar.xz. Needs only the standard library.
"""

import hashlib
import lzma
import os
import pathlib
import tarfile
import tempfile

from utils import HERE, UserError, atomic_write

ARCHIVE = HERE / "data" / "fashion-mnist.tar.xz"
NOTE = ".unpacked"  # holds the fingerprint of its folder; written last


def files(folder):
    """The relative paths of the files in a tree, sorted, without hidden ones such as .DS_Store."""
    paths = (
        os.path.relpath(os.path.join(where, name), folder) for where, _, names in os.walk(folder) for name in names
    )
    return sorted(path for path in paths if not os.path.basename(path).startswith("."))


def fingerprint(folder):
    """SHA-256 over the archive and over every path and content in the folder."""
    digest = hashlib.sha256(ARCHIVE.read_bytes())
    for path in files(folder):
        content = pathlib.Path(folder, path).read_bytes()
        digest.update(f"{path}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()


def is_complete(folder):
    """Whether the folder holds exactly the content of the archive. Reads every file, which takes 0.2 s."""
    try:
        return pathlib.Path(folder, NOTE).read_bytes() == fingerprint(folder).encode()
    except (FileNotFoundError, NotADirectoryError):
        return False


def unpack(folder):
    """Unpacks the bundled images to `folder` (train/ and val/), unless it holds all of them already, and returns its
    path.

    Missing and damaged files are replaced one by one, each atomically, so several processes may unpack at the same
    time while others read. Raises UserError if the folder has other files (none is touched then) or can't be written,
    or if the archive is missing or damaged.
    """
    folder = pathlib.Path(folder)
    if not ARCHIVE.is_file():
        raise UserError(f"{ARCHIVE}: missing; it comes with this project: git checkout -- {ARCHIVE.relative_to(HERE)}")
    try:
        if not is_complete(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
                with tarfile.open(ARCHIVE) as archive:
                    archive.extractall(temporary, filter="data")
                _move(pathlib.Path(temporary, "fashion-mnist"), folder)
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{ARCHIVE}: damaged ({error}); git checkout -- {ARCHIVE.relative_to(HERE)}") from None
    except OSError as error:
        raise UserError(
            f"--data-dir {folder}: can't unpack the bundled images ({error}); choose a folder that can be written"
        ) from None
    return folder


def _move(source, folder):
    wanted = files(source)
    others = sorted(set(files(folder)) - set(wanted))
    if others:
        raise UserError(
            f"--data-dir {folder}: {others[0]!r} is none of the bundled images; choose another folder, or move it away"
        )
    note = fingerprint(source)
    for path in wanted:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / path, target)
    with atomic_write(folder / NOTE) as file:
        file.write(note)

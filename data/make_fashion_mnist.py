"""Makes fashion-mnist.tar.xz, the bundled images, from the four original Fashion-MNIST files, reproducibly to the byte.

    python data/make_fashion_mnist.py FOLDER

Reads {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz in FOLDER (from github.com/zalandoresearch/fashion-mnist, or
from usr/share/datasets/fashion-mnist of Debian's package dataset-fashion-mnist). Writes the archive next to this
script: the licence, and greyscale JPEG files of 28x28 px, fashion-mnist/{train,val}/<class>/NNNNN.jpg, where NNNNN is
the index of the image in its original file; the first images of every class are taken. Takes half a minute.
"""

import argparse
import gzip
import hashlib
import io
import lzma
import pathlib
import struct
import tarfile

from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")  # 0..9
PARTS = {"train": ("train", 1000), "val": ("t10k", 500)}  # original file, images per class
JPEG_QUALITY = 95  # mean error 0.9 of 255 grey levels; the archive is smaller than 8 MB
SHA256 = {  # hashes of the uncompressed contents, because copies of the files are compressed differently
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def read_idx(path):
    """The items of an original file, each as bytes. Raises ValueError if it is not the original."""
    with gzip.open(path) as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != SHA256[path.name]:
        raise ValueError(f"{path}: not the original Fashion-MNIST file")
    dimensions = data[3]
    n, *shape = struct.unpack_from(f">{dimensions}I", data, 4)
    size = shape[0] * shape[1] if shape else 1
    start = 4 + 4 * dimensions
    return [data[start + i * size : start + (i + 1) * size] for i in range(n)]


def jpeg(pixels):
    """Encodes 28x28 bytes as a greyscale JPEG file."""
    file = io.BytesIO()
    Image.frombytes("L", (28, 28), pixels).save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return file.getvalue()


def bundled_files(source):
    """The files of the archive, path -> content. Raises ValueError and OSError."""
    files = {"fashion-mnist/LICENSE.txt": (HERE / "fashion-mnist-LICENSE.txt").read_bytes()}
    for part, (original, per_class) in PARTS.items():
        images = read_idx(source / f"{original}-images-idx3-ubyte.gz")
        labels = [label[0] for label in read_idx(source / f"{original}-labels-idx1-ubyte.gz")]
        for label, name in enumerate(CLASSES):
            places = [i for i, other in enumerate(labels) if other == label][:per_class]
            files |= {f"fashion-mnist/{part}/{name}/{i:05d}.jpg": jpeg(images[i]) for i in places}
    return files


def archive(files):
    """A .tar.xz of the files, sorted and without owners or times, so that its bytes depend on the files only."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as output:
        for path, content in sorted(files.items()):
            info = tarfile.TarInfo(path)
            info.size = len(content)
            output.addfile(info, io.BytesIO(content))
    return lzma.compress(tar.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=pathlib.Path, metavar="FOLDER", help="folder with the four original files")
    source = parser.parse_args(argv).source
    try:
        files = bundled_files(source)
    except (OSError, EOFError, ValueError) as error:
        parser.error(str(error))
    output = HERE / "fashion-mnist.tar.xz"
    data = archive(files)
    output.write_bytes(data)
    print(f"{output}: {len(files)} files, {len(data)} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()

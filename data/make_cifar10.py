"""Makes a class tree of CIFAR-10, data/cifar10/{train,val}/<class>/NNNNN.png, from the data set's own archive.

    python data/make_cifar10.py                               downloads the archive, 170 MB, by torchvision
    python data/make_cifar10.py FOLDER/cifar-10-python.tar.gz

`--out DIR` names another folder for the tree; `--per-class 800 200` takes only the first so many images of each class
of train and val, in the order of the data set. val is the data set's test batch. Takes a minute.
Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; cs.toronto.edu/~kriz/cifar.html.
"""

import argparse
import pathlib
import sys
import tempfile

from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

HERE = pathlib.Path(__file__).resolve().parent


def write_tree(archive, out, per_class=(None, None)):
    """Writes the tree, of the first `per_class` (train, val) images of each class, or of all.

    Without an archive, downloads it. Raises RuntimeError and OSError.
    """
    with tempfile.TemporaryDirectory() as folder:
        if archive:
            if not check_integrity(archive, CIFAR10.tgz_md5):
                raise OSError(f"{archive}: not the archive {CIFAR10.filename} of CIFAR-10, or damaged")
            extract_archive(archive, folder)
        for part, most in zip(("train", "val"), per_class):
            images = CIFAR10(folder, train=part == "train", download=not archive)
            for name in images.classes:
                (out / part / name).mkdir(parents=True, exist_ok=True)
            written = [0] * len(images.classes)
            for i, (image, label) in enumerate(images):
                if most is None or written[label] < most:
                    image.save(out / part / images.classes[label] / f"{i:05d}.png")
                    written[label] += 1
            print(f"{out / part}: {sum(written):,} images of {len(images.classes)} classes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", nargs="?", type=pathlib.Path, help="default: download it")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "cifar10")
    parser.add_argument("--per-class", type=int, nargs=2, default=(None, None), metavar="N", help="train, val")
    args = parser.parse_args()
    try:
        write_tree(args.archive, args.out, args.per_class)
    except (OSError, RuntimeError) as error:
        print(f"make_cifar10.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""data/make_cifar10.py on a small archive in the form of CIFAR-10's."""

import hashlib
import io
import pickle
import tarfile

import make_cifar10 as make
import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

CLASSES = ["airplane", "bird"]


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive of five training batches and a test batch, four images each, of known MD5."""
    rng, files = np.random.default_rng(0), {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        files[name] = {"data": rng.integers(0, 256, (4, 3 * 32 * 32), np.uint8), "labels": [0, 1, 1, 0]}
    contents = {
        name: pickle.dumps(value) for name, value in {**files, "batches.meta": {"label_names": CLASSES}}.items()
    }
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))

    def md5(content):
        return hashlib.md5(content).hexdigest()

    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(path.read_bytes()))
    monkeypatch.setattr(
        CIFAR10, "train_list", [[f"data_batch_{i}", md5(contents[f"data_batch_{i}"])] for i in range(1, 6)]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(contents["test_batch"])]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(contents["batches.meta"])})
    return path, files


def test_the_tree_has_every_image_in_its_class(archive, tmp_path):
    path, files = archive
    make.write_tree(path, tmp_path / "tree")
    found = {str(file.relative_to(tmp_path / "tree")): file for file in (tmp_path / "tree").rglob("*.png")}
    assert len(found) == 24 and sum(name.startswith("val/") for name in found) == 4
    image = np.asarray(Image.open(found["train/bird/00006.png"]))  # the third of the second batch
    assert (image == files["data_batch_2"]["data"][2].reshape(3, 32, 32).transpose(1, 2, 0)).all()


def test_the_first_images_of_each_class_are_a_smaller_tree(archive, tmp_path, monkeypatch):
    out = tmp_path / "tree"
    monkeypatch.setattr("sys.argv", ["make", str(archive[0]), "--out", str(out), "--per-class", "3", "1"])
    make.main()
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*.png")) == [
        *(f"train/airplane/{i:05d}.png" for i in (0, 3, 4)),
        *(f"train/bird/{i:05d}.png" for i in (1, 2, 5)),
        "val/airplane/00000.png",
        "val/bird/00001.png",
    ]


def test_another_archive_is_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(b"another")
    for given, text in ((path, "not the archive cifar-10-python.tar.gz"), (tmp_path / "none", "not the archive")):
        monkeypatch.setattr("sys.argv", ["make_cifar10.py", str(given), "--out", str(tmp_path / "tree")])
        with pytest.raises(SystemExit) as stopped:
            make.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and text in error and error.count("\n") == 1
    assert path.read_bytes() == b"another" and not (tmp_path / "tree").exists()

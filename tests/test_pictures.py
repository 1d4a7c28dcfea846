"""One picture in every file, whichever decoder; what is not read is refused by name."""

import types

import numpy as np
import pytest
import torch
from picture_files import accepted, refused
from PIL import Image

import dataloader
from dataloader import Loader
from images import image_check, pictures
from images.dataset import DataConfig, ImageSet, evaluation_plan
from network import ShuffleNetV2
from settings.subjects import Images
from training import export
from utils import UserError

CONFIG = DataConfig(input_size=32, val_resize=32, jitter=0, crop_scale=(0.5, 1))
HAS_DALI = bool(dataloader.importlib.util.find_spec("nvidia.dali"))
BACKENDS = ["torchvision", pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed"))]
CLOSE = 2  # of 255, in the mean


@pytest.fixture(scope="session")
def files():
    return accepted()


@pytest.fixture(scope="session")
def images(files, tmp_path_factory):
    """An ImageSet of all accepted files."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, (data, *_) in files.items():
        (folder / name).write_bytes(data)
    return ImageSet(str(folder), tuple(files), np.zeros(len(files), np.int64), ("c",))


def decoded(images, config, augment, backend):
    """(N, H, W, 3) of all images of a set, float."""
    loader = Loader(images, config, augment, backend=backend, workers=0)
    return torch.cat([batch for batch, _ in loader.decode(evaluation_plan(len(images), 50))]).double().numpy()


def test_the_table_is_large_and_all_of_it_passes_the_check(images):
    found = {name: image_check.inspect(f"{images.root}/{name}")[1:] for name in images.paths}
    assert len(found) >= 60 and set(found.values()) == {(None, None)}, found


@pytest.mark.parametrize("name", refused())
def test_what_is_not_read_is_refused_by_name(tmp_path, name):
    data, word = refused()[name]
    (tmp_path / name).write_bytes(data)
    assert word in image_check.inspect(tmp_path / name)[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_file_is_read_as_its_picture(files, images, backend):
    """The input size is that of the files, but for four columns on each side."""
    found = decoded(images, CONFIG, False, backend)
    far = {}
    for name, pixels in zip(images.paths, found):
        difference = np.abs(pixels - files[name][1][:, 4:36]).mean()
        if not difference <= CLOSE:
            far[name] = difference
    assert far == {}


class Recorder(torch.nn.Module):
    """A network that keeps what it is given."""

    def forward(self, x):
        self.seen = x
        return torch.zeros(len(x), 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_predict_and_preprocess_read_every_file_as_validation_does(images, backend):
    expected = decoded(images, CONFIG, False, backend)
    paths = [f"{images.root}/{name}" for name in images.paths]
    network, ckpt = Recorder(), types.SimpleNamespace(class_names=("a", "b"))
    for _ in export.predict(paths, network, ckpt, CONFIG, Images(loader=backend, workers=0), "cpu"):
        pass
    assert np.array_equal(network.seen.numpy(), expected.transpose(0, 3, 1, 2)[:, ::-1])
    model = ShuffleNetV2([0] * 20, 32, 10)
    model.config = CONFIG
    for path, pixels in zip(paths, expected):
        with Image.open(path) as image:
            x = model.preprocess(torch.from_numpy(np.array(image.convert("RGB")))[None])
        assert np.abs(x[0].numpy() - pixels.transpose(2, 0, 1)[::-1]).mean() <= CLOSE, path


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
def test_cached_images_depend_on_pillow_where_it_decodes(images):
    jpegs = images.take([0, 1])
    assert "pillow" not in Loader(jpegs, CONFIG, False, backend="dali").decoder
    assert "pillow 1" in Loader(images, CONFIG, False, backend="dali").decoder


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
def test_both_loaders_augment_every_file_alike(images):
    a, b = (decoded(images, CONFIG, True, backend) for backend in ("dali", "torchvision"))
    difference = np.abs(a - b).mean(axis=(1, 2, 3))
    assert {n: d for n, d in zip(images.paths, difference) if d > CLOSE} == {}
    assert np.abs(a[0] - a[-1]).mean() > CLOSE  # other crops


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
def test_an_error_of_dali_names_the_file_and_the_cause(images, monkeypatch):
    """Here of a file that Pillow reads."""
    monkeypatch.setattr(pictures, "is_for_dali", lambda *_: True)
    names = ["jpeg_baseline.jpg", "png_rgb8.png", "webp_lossy_icc.webp", "jpeg_grey.jpg"]
    few = images.take([images.paths.index(name) for name in names])
    with pytest.raises(UserError, match=r"/webp_lossy_icc\.webp: DALI can't decode it \(WebP extended .*torchvision$"):
        decoded(few, CONFIG, True, "dali")

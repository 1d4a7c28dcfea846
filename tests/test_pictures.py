"""One picture in every file, whichever decoder; what is not read is refused by name."""

import dataclasses
import io
import itertools
import shutil

import numpy as np
import pytest
import torch
from conftest import run
from picture_files import accepted, encoded, exif, refused
from PIL import Image

import dataloader
from dataloader import Loader
from engines.search_files import settings_difference
from images import image_check, pictures
from images.augmentation import Augmentation
from images.dataset import DataConfig, ImageSet, evaluation_plan
from network import ShuffleNetV2
from settings.subjects import Images
from training.program import image_files, predict
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
    found = {name: image_check.inspect(f"{images.root}/{name}") for name in images.paths}
    assert len(found) >= 60 and {f[1:3] for f in found.values()} == {(None, None)}, found
    assert {name for name in found if found[name].turned} == {name for name in found if "exif" in name}


@pytest.mark.parametrize("name", refused())
def test_what_is_not_read_is_refused_by_name(tmp_path, name):
    data, word = refused()[name]
    (tmp_path / name).write_bytes(data)
    assert word in image_check.inspect(tmp_path / name).reason


def test_a_folder_stands_for_its_images_of_which_flat_ones_are_named(tmp_path, caplog):
    for name in ("b.png", "a/c.PNG", "a/notes.txt", "a/.hidden.png", ".thumbnails/a.png", "a.png"):
        (tmp_path / "icons" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (9, 9), (255, 255, 255, 9 * len(name))).save(tmp_path / "icons" / name, "PNG")
    Image.new("L", (9, 9), 255).save(tmp_path / "opaque.png")
    found = image_files([str(tmp_path / "opaque.png"), str(tmp_path / "icons")], CONFIG, Images())
    names = [str(tmp_path / name) for name in ("opaque.png", "icons/a.png", "icons/a/c.PNG", "icons/b.png")]
    assert list(found.paths) == [names[0], *sorted(names[1:])]
    assert [name in caplog.text for name in names] == [False, True, True, True]
    assert "one colour on the ground of alpha: white" in caplog.text
    with pytest.raises(UserError, match=r"--predict .*none: no image in this folder"):
        (tmp_path / "none").mkdir()
        image_files([str(tmp_path / "none")], CONFIG, Images())


@pytest.mark.parametrize(("alpha", "ground"), [("white", 255), ("black", 0), ("dropped", None)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_file_is_read_as_its_picture(files, images, backend, alpha, ground):
    """The input size is that of the files, but for four columns on each side."""
    assert sum(seen is not None for _, _, seen in files.values()) >= 14
    found = decoded(images, dataclasses.replace(CONFIG, alpha=alpha), False, backend)
    far = {}
    for name, pixels in zip(images.paths, found):
        _, expected, seen = files[name]
        if ground is not None and seen is not None:
            share = seen[..., None] / 255
            expected = share * expected + (1 - share) * ground
        difference = np.abs(pixels - expected[:, 4:36]).mean()
        if not difference <= CLOSE:
            far[name] = difference
    assert far == {}


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_exif_apply_turns_images_as_viewers_do(tmp_path, files, backend, augment, monkeypatch):
    """Eight orientations of one picture, each stored so that applying it gives that picture."""
    monkeypatch.setattr(dataloader, "draw_augmentation", lambda *_: Augmentation((0, 4, 32, 32)))
    picture = files["png_rgb8.png"][1]
    image = Image.fromarray(picture)
    flip, turn = Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose
    stored = {1: None, 2: flip, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE, 6: turn.ROTATE_90}
    stored |= {7: turn.TRANSVERSE, 8: turn.ROTATE_270}
    for number, operation in stored.items():
        for kind, options in (("PNG", {}), ("JPEG", {"quality": 98, "subsampling": 0}), ("WEBP", {"lossless": True})):
            data = encoded(
                image if operation is None else image.transpose(operation), kind, exif=exif(number), **options
            )
            (tmp_path / f"{number}.{kind.lower()}").write_bytes(data)
    names = tuple(sorted(path.name for path in tmp_path.iterdir()))
    turned = ImageSet(str(tmp_path), names, np.zeros(len(names), np.int64), ("c",))
    found = decoded(turned, dataclasses.replace(CONFIG, exif="apply"), augment, backend)
    assert len(names) == 24
    for name, pixels in zip(names, found):
        assert np.abs(pixels - picture[:, 4:36]).mean() <= CLOSE, name


def test_jpegs_and_pngs_are_left_to_dali_where_it_may_have_them(files):
    left = {how: set() for how in ("ignored", "apply")}
    for how, names in left.items():
        config = DataConfig(exif=how)
        names.update(n for n in files if pictures.is_for_dali(Image.open(io.BytesIO(files[n][0])), config))
    opaque = {name for name, (_, _, seen) in files.items() if name.endswith((".jpg", ".png")) and seen is None}
    assert left["ignored"] == opaque
    assert left["apply"] == {name for name in opaque if name.endswith(".jpg")} - {"jpeg_exif.jpg"}


def test_an_image_that_is_too_large_is_said_to_be(tmp_path, monkeypatch):
    Image.new("1", (300, 200)).save(tmp_path / "large.png")
    for name, limit in (("max_pixels", 59_999), ("allowed", 60_000)):
        reason = image_check.inspect(tmp_path / "large.png", limit).reason
        assert (reason is None) == (name == "allowed")
        if reason:
            assert "too large: 300 x 200 = 60,000 pixels, of 59,999 at most; --max-pixels 60000 allows it" in reason


def test_an_image_over_pillows_limits_is_read(tmp_path, monkeypatch, recwarn):
    """Of more pixels than Pillow warns of, or refuses."""
    Image.new("1", (300, 200)).save(tmp_path / "large.png")
    images = ImageSet(str(tmp_path), ("large.png",), np.zeros(1, np.int64), ("c",))
    for limit in (50_000, 20_000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert image_check.inspect(tmp_path / "large.png").reason is None
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert decoded(images, CONFIG, False, "torchvision").max() == 0
    assert not [w for w in recwarn if "pixels" in str(w.message)]


class Recorder(torch.nn.Module):
    """A network that keeps what it is given."""

    def forward(self, x):
        self.seen = x
        return torch.zeros(len(x), 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("orientation", ["ignored", "apply"])
def test_predict_and_preprocess_read_every_file_as_validation_does(images, backend, orientation, caplog):
    config = dataclasses.replace(CONFIG, exif=orientation)
    expected = decoded(images, config, False, backend)
    paths = [f"{images.root}/{name}" for name in images.paths]
    network = Recorder()
    loader = Loader(image_files(paths, config, Images(loader=backend)), config, False, backend=backend, workers=0)
    assert len(list(predict(paths, ("a", "b"), network, loader.batches(evaluation_plan(len(paths), 200))))) == len(
        paths
    )
    assert np.array_equal(network.seen.numpy(), expected.transpose(0, 3, 1, 2)[:, ::-1])
    assert caplog.text.count("has an EXIF orientation, which is ignored") == (4 if orientation == "ignored" else 0)
    model = ShuffleNetV2([0] * 20, 32, 10)
    model.config = config
    for path, pixels in zip(paths, expected):
        with Image.open(path) as image:
            x = model.preprocess(image)
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


# --- what files leave out ----------------------------------------------------------------------------------------

COMMANDS = {
    "supernet": "--val-paths 1 --bn-batches 1 --bn-batch-size 4 --heldout-per-class 2",
    "scratch": "--bn-pass 0 --architecture {}/architecture.json",
}


@pytest.fixture
def transparent_tree(tmp_path):
    """A tree whose images are noise where they are transparent, and the words of a command that trains on it."""
    rng = np.random.default_rng(0)
    for part, name, number in itertools.product(("train", "val"), "ab", range(6)):
        path = tmp_path / "tree" / part / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 4), np.uint8)).save(path)
    Image.new("RGB", (20, 20)).save(path.parents[2] / "train" / "a" / "7.jfif", "JPEG")
    (tmp_path / "architecture.json").write_text("[0, 1, 2, 3, 0, 1]")
    words = "--space small --input-size 16 --iterations 4 --save-every 2 --val-every 4 --batch-size 4 --lr 0.1 "
    words += "--loader torchvision --workers 0 --threads 1 --device cpu --data-dir"
    return (*words.split(), tmp_path / "tree")


def weights(folder):
    path = folder / "checkpoint-0000004.pth"
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("script", COMMANDS)
def test_a_run_whose_checkpoint_leaves_out_what_it_does_without_resumes(transparent_tree, tmp_path, script):
    words = [*transparent_tree, *COMMANDS[script].format(tmp_path).split(), "--alpha", "dropped", "--no-jfif"]
    folders = {name: tmp_path / name / "checkpoints" / script for name in ("straight", "half")}
    run(f"{script}.py", *words, "--out", tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "half")
    (folders["half"] / "checkpoint-0000004.pth").unlink()
    path = folders["half"] / "checkpoint-0000002.pth"
    content = torch.load(path, weights_only=True)
    for name, value in {"alpha": "dropped", "exif": "ignored", "jfif": False, "crop_padding": 0}.items():
        assert content["data"].pop(name) == value
        content["settings"][name] = value
    torch.save(content, path)
    _, stderr = run(f"{script}.py", *words, "--out", tmp_path / "half", "--alpha", "white", code=2)
    assert "--alpha white (was dropped)" in stderr
    for _ in range(2):  # the second time from a checkpoint of now
        run(f"{script}.py", *words, "--out", tmp_path / "half")
        assert same(weights(folders["straight"]), weights(folders["half"]))


def test_what_a_file_leaves_out_is_what_it_does_without():
    old = {"input_size": 32, "val_resize": 37}
    config = DataConfig.from_dict(old)
    assert (config.alpha, config.exif, config.jfif) == ("dropped", "ignored", False) and DataConfig().alpha == "white"
    assert DataConfig.resolve({"jfif": True}, None, "official.pth") == DataConfig(alpha="dropped")
    search = {"data": DataConfig(32, 37).to_dict()}
    del search["data"]["alpha"], search["data"]["jfif"]
    assert settings_difference(search, {"data": DataConfig.from_dict(search["data"]).to_dict()}) == {}
    assert settings_difference(search, {"data": DataConfig(32, 37).to_dict()}).keys() == {"--alpha", "--jfif"}
    new = DataConfig(alpha="black", exif="apply")
    assert DataConfig.from_dict(new.to_dict()) == new

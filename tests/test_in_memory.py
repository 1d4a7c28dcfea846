"""--loader memory: torchvision's pixels, whatever the files, the batch and the device's memory; one file for all."""

import dataclasses
import resource

import numpy as np
import pytest
import torch
from conftest import ROOT, coloured_image, run
from picture_files import accepted
from PIL import Image
from test_fake_gpu import NoSynchronisation
from torchvision.transforms.v2 import functional as F

import dataloader
from dataloader import Loader
from images import bundled, in_memory
from images.augmentation import draw_augmentation
from images.dataset import DataConfig, ImageSet, evaluation_plan, scan, training_plan
from images.image_cache import FixedBatches
from utils import UserError

CROPS = DataConfig(input_size=32, val_resize=36)
SHIFTS = dataclasses.replace(CROPS, crop_padding=5)
SETTINGS = {
    "shifts": dataclasses.replace(SHIFTS, jitter=0),
    "shifts over more than the image": dataclasses.replace(SHIFTS, crop_padding=40, jitter=0, alpha="black"),
    "crops": dataclasses.replace(CROPS, jitter=0, exif="apply"),
    "jitter, not mirrored": dataclasses.replace(SHIFTS, mirror=False),
    "crops, jitter": dataclasses.replace(CROPS, alpha="dropped", crop_ratio=(0.2, 5), jitter=1.0),
}
ORIGINALS = "*.originals"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An ImageSet of all pictures of the tests, of some that are narrow or large, and of bundled ones."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, (data, *_) in accepted().items():
        (folder / name).write_bytes(data)
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 300), (200, 2), (28, 28), (32, 32), (300, 260)):
        coloured_image(rng, height, width).save(folder / f"{height}_{width}.png")
    shirts = scan(bundled.unpack(ROOT / "data" / "fashion-mnist") / "train")
    for path in shirts.paths[::999]:
        (folder / path.replace("/", "_")).write_bytes((ROOT / "data" / "fashion-mnist" / "train" / path).read_bytes())
    names = tuple(sorted(path.name for path in folder.iterdir()))
    assert len(names) >= 100
    return ImageSet(str(folder), names, np.arange(len(names)) % 3, ("a", "b", "c"))


@pytest.fixture
def images(tree):
    return scan(tree / "train")


def loaded(images, config, backend, plan=None, cache=None, seed=3, **how):
    """(images, labels) of a plan, by default all images twice in uneven batches."""
    loader = Loader(images, config, True, seed, backend=backend, workers=0, cache=cache, **how)
    plan = plan or [samples + np.array([epoch, 0]) for epoch in (0, 1) for samples in evaluation_plan(len(images), 48)]
    batches = list(loader.decode(plan))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def columns_first(image, top, left, height, width, size, *_):
    """A resized crop by two steps of Pillow, in the order of `--loader memory`."""
    cropped = F.crop(image, top, left, height, width)
    bilinear = Image.Resampling.BILINEAR
    return cropped.resize((size[1], height), bilinear).resize((size[1], size[0]), bilinear)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_pixels_are_torchvisions(pictures, tmp_path, monkeypatch, name):
    """Bit for bit in the same order of columns and rows, within 2 of 255 in any; shifts always."""
    config = SETTINGS[name]
    ours, theirs = (loaded(pictures, config, b, cache=tmp_path) for b in ("memory", "torchvision"))
    assert torch.equal(ours[1], theirs[1]) and ours[0].shape == theirs[0].shape
    difference = (ours[0].int() - theirs[0].int()).abs().amax((1, 2, 3))
    assert config.jitter or difference.max() <= 2
    if not config.crop_padding:
        monkeypatch.setattr(F, "resized_crop", columns_first)
        theirs = loaded(pictures, config, "torchvision")
        difference = (ours[0].int() - theirs[0].int()).abs().amax((1, 2, 3))
    assert difference.max() == 0, {n for n, d in zip(pictures.paths * 2, difference) if d}
    assert (
        len({tuple(image.flatten().tolist()) for image in ours[0]}) > 120
    )  # each file twice; some shifts leave nothing


def test_small_images_are_torchvisions(pictures):
    """As all crops of at most the input's size, of the bundled images among them."""
    config = DataConfig(input_size=32, val_resize=32, crop_scale=(0.8, 1))
    small = pictures.take([i for i, name in enumerate(pictures.paths) if name.endswith("jpg") and "_" in name][-20:])
    assert torch.equal(*(loaded(small, config, b)[0] for b in ("memory", "torchvision")))


def test_jitter_is_torchvisions():
    """Of factors at the ends, too, and of grey and saturated colours."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 9, 8, 3), np.uint8)
    pixels[:10] = pixels[:10, :, :, :1]
    pixels[10:20] = np.where(pixels[10:20] < 128, 0, 255)
    factors = rng.uniform(0, 2, (60, 3))
    factors[::7] = rng.integers(0, 3, (9, 3))
    found = in_memory.jittered(torch.from_numpy(pixels), *torch.tensor(factors, dtype=torch.float32).T)
    for image, (brightness, contrast, saturation), ours in zip(pixels, np.float32(factors).tolist(), found):
        theirs = F.adjust_brightness(F.to_pil_image(image), brightness)
        theirs = F.adjust_saturation(F.adjust_contrast(theirs, contrast), saturation)
        assert np.array_equal(np.asarray(theirs), ours.numpy())


def test_an_image_does_not_depend_on_its_batch(pictures, monkeypatch):
    """Nor on how many are resized at a time."""
    config = SETTINGS["crops, jitter"]
    whole = loaded(pictures, config, "memory", evaluation_plan(len(pictures), 1000))[0]
    assert torch.equal(loaded(pictures, config, "memory", evaluation_plan(len(pictures), 7))[0], whole)
    monkeypatch.setattr(in_memory, "AT_A_TIME", 1000)
    assert torch.equal(loaded(pictures, config, "memory", evaluation_plan(len(pictures), 1000))[0], whole)


def test_draws_are_those_of_every_seed(images):
    """Also of one that has more than 32 bits."""
    for seed in (0, 2**32 - 1, 2**32 + 1):
        u = np.random.default_rng([seed, 1, 2, 3]).random(26)
        assert draw_augmentation(SHIFTS, seed, np.int64(2), np.int64(3), 40, 40).shift == tuple(
            int(v * 11) - 5 for v in u[20:22]
        )
    assert torch.equal(*(loaded(images, SHIFTS, b, seed=2**40)[0] for b in ("memory", "torchvision")))


@pytest.mark.parametrize("config", [CROPS, SHIFTS], ids=["crops", "shifts"])
def test_images_are_decoded_once(images, tmp_path, config, monkeypatch):
    """A second process, another seed and epoch, and where they apply other settings read the same file."""
    plan = list(training_plan(len(images), 12, 0, steps=4))
    expected = loaded(images, config, "memory", plan, tmp_path)
    (path,) = tmp_path.glob(ORIGINALS)
    without = loaded(images, config, "memory", plan)  # a file
    assert all(map(torch.equal, expected, without))

    def decode(*_):
        raise AssertionError("decodes again")

    monkeypatch.setattr(dataloader, "_decode", decode)
    assert torch.equal(loaded(images, config, "memory", plan[2:], tmp_path)[0], expected[0][24:])  # as resumed
    loaded(images, dataclasses.replace(config, jitter=0.1, mirror=False, crop_scale=(0.5, 1)), "memory", plan, tmp_path)
    other = {"val_resize": 40} if config.crop_padding else {"exif": "apply"}
    with pytest.raises(AssertionError, match="decodes again"):
        loaded(images, dataclasses.replace(config, **other), "memory", plan, tmp_path)
    monkeypatch.undo()
    data = path.read_bytes()
    for damaged in (data[:-1], data + b"x", b"", data[:-1] + b"\x7f"):  # the last makes an image wider
        path.write_bytes(damaged)
        assert torch.equal(loaded(images, config, "memory", plan, tmp_path)[0], expected[0])
        assert path.read_bytes() == data


def test_calibration_and_validation_images_come_from_it(images, tmp_path):
    """Those of validation are torchvision's file, too."""
    for augment in (True, False):
        loader = Loader(images, SHIFTS, augment, backend="memory", cache=tmp_path, workers=3)
        assert loader.workers == 0
        batches = FixedBatches(loader, evaluation_plan(len(images), 10), tmp_path)
        found = [x for x, _ in batches]
        theirs = Loader(images, SHIFTS, augment, backend="torchvision", workers=0)
        assert all(map(torch.equal, found, (x for x, _ in theirs.batches(batches.plan))))
        assert (loader.decoder == theirs.decoder) == (not augment)
    assert len(list(tmp_path.glob(ORIGINALS))) == 1


def test_a_folder_that_cannot_be_written_is_logged(images, tmp_path, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        found = loaded(images, CROPS, "memory", cache=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(found[0], loaded(images, CROPS, "memory")[0])
    assert "can't cache decoded images there" in caplog.text and not list(tmp_path.glob("*.tmp"))


def test_more_than_the_bound_is_refused_by_its_number(images, tmp_path, monkeypatch):
    """Without decoding, and where they are decoded already."""
    size = in_memory.gigabytes(images, CROPS)
    with monkeypatch.context() as patch:
        patch.setattr(in_memory.InMemory, "_write", None)
        with pytest.raises(UserError, match=rf"36 images take {size:.3g} GB decoded, of --memory-gb 0.0001 at most"):
            loaded(images, CROPS, "memory", cache=tmp_path, memory_gb=0.0001)
    loaded(images, CROPS, "memory", cache=tmp_path, memory_gb=1.1 * size)
    with pytest.raises(UserError, match=r"--memory-gb 0\.0001 at most"):
        loaded(images, CROPS, "memory", cache=tmp_path, memory_gb=0.0001)
    assert in_memory.gigabytes(images, SHIFTS) == pytest.approx(36 * 32 * 32 * 3e-9)
    assert in_memory.gigabytes(images, CROPS, headers=9) == pytest.approx(size, rel=0.5)


def test_a_line_says_where_it_would_fit(images):
    def advice(backend="torchvision", **how):
        config = dataclasses.replace(CROPS, **how.pop("config", {}))
        return Loader(images, config, True, backend=backend, workers=0, **how).advice()

    assert advice().startswith("--loader memory would load these images faster: 0.0")
    assert not advice("memory") and not advice(memory_gb=1e-6) and not advice(config={"input_size": 128})


def test_a_damaged_image_is_named_and_leaves_no_file(images, tmp_path):
    (tmp_path / "c").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "c" / name).write_bytes(b"no image")
    broken = ImageSet(str(tmp_path), ("c/a.jpg", "c/b.jpg"), np.zeros(2, np.int64), ("c",))
    for config in (CROPS, SHIFTS):
        with pytest.raises(UserError, match=r"c/a\.jpg: not an image"):
            loaded(broken, config, "memory", cache=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]


def test_the_commands_take_it(tree, tmp_path):
    """A run that is interrupted halfway and resumed, and the same with torchvision's loader, have the same weights."""
    words = f"--data-dir {tree} --space small --input-size 16 --heldout-per-class 3 --threads 1 --device cpu --lr 0.1"
    words += " --crop-padding 2"
    words += " --batch-size 8 --val-every 4 --save-every 2 --val-paths 1 --bn-batches 2 --bn-batch-size 9"
    words += f" --workers 0 --iterations 4 --cache {tmp_path / 'cache'}"
    for loader, out in (("memory", "a"), ("torchvision", "b")):
        run("supernet.py", words, "--loader", loader, "--out", tmp_path / out)
    folder = "checkpoints/supernet"
    (tmp_path / "a" / folder / "checkpoint-0000004.pth").rename(tmp_path / "straight.pth")
    _, stderr = run("supernet.py", words, "--loader torchvision", "--out", tmp_path / "a", code=2)
    assert "--loader torchvision (was memory)" in stderr
    run("supernet.py", words, "--loader memory", "--out", tmp_path / "a")
    paths = tmp_path / "straight.pth", *(tmp_path / out / folder / "checkpoint-0000004.pth" for out in "ab")
    models = [torch.load(path, weights_only=True)["model"] for path in paths]
    assert all(torch.equal(models[0][name], model[name]) for model in models[1:] for name in model)
    run("supernet.py", words, "--loader torchvision", "--out", tmp_path / "b")  # not said again: it has a loader
    log = (tmp_path / "b" / folder / "run.log").read_text()
    assert log.count("--loader memory would load these images faster") == 1
    assert "would load" not in (tmp_path / "a" / folder / "run.log").read_text()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("fits", [True, False])
def test_no_batch_waits_for_a_gpu(images, name, fits):
    """Here a device without values: what needs them, or a copy that is waited for, is an error."""
    loader = Loader(images, SETTINGS[name], True, backend="memory")
    memory, sizes = loader._in_memory, loader._in_memory.sizes
    drawn = [draw_augmentation(loader.config, 0, 0, i, *sizes[i].tolist()) for i in range(9)]
    memory.pixels = memory.pixels.to("meta") if fits else memory.pixels
    with NoSynchronisation():
        batch = in_memory.augmented(memory, np.arange(9), drawn, loader.config, torch.device("meta"))
    assert batch.shape == (9, 32, 32, 3) and batch.dtype == torch.uint8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("fits", [True, False])
def test_a_gpu_makes_the_same_pixels(pictures, name, fits, monkeypatch):
    if not fits:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Small", (), {"total_memory": 0}))
    expected = loaded(pictures, SETTINGS[name], "memory")
    found = loaded(pictures, SETTINGS[name], "memory", device="cuda")
    assert found[0].device.type == "cuda" and all(torch.equal(a.cpu(), b) for a, b in zip(found, expected))

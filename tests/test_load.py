"""network.load: a trained network in a line of Python, its feature maps, and torch.fx."""

import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import types

import numpy as np
import pytest
import reference_spos
import torch
from conftest import CLASSES, ROOT, coloured_image, run
from picture_files import accepted, encoded
from PIL import Image
from torchvision.models.feature_extraction import create_feature_extractor

import network
import utils
from dataloader import Loader, network_input
from images import bundled, pictures
from images.dataset import DataConfig, evaluation_plan, scan
from network import ShuffleNetV2
from space.search_space import SearchSpace
from training import checkpoint, export
from utils import UserError

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, export.ONNX_PACKAGES)), reason="ONNX's packages are not installed"
)
SPACE = SearchSpace(
    input_size=32, n_classes=3, stem_channels=8, stage_blocks=(1, 2), stage_channels=(16, 24), stage_strides=(2, 2),
    last_channels=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{preprocessing: (checkpoint file, the network in it, its DataConfig)}."""
    found = {}
    for name in ("spos", "imagenet"):
        torch.manual_seed(0)
        model, config = ShuffleNetV2((1, 0, 3), space=SPACE).eval(), DataConfig(32, 36, preprocessing=name)
        path = tmp_path_factory.mktemp("trained") / "network.pth"
        checkpoint.save(
            path, kind="scratch", step=1, model=model.state_dict(), space=SPACE.to_dict(), data=config.to_dict(),
            split=None, classes=["apple", "bird", "car"], architecture=[1, 0, 3], metrics={},
        )  # fmt: skip
        found[name] = path, model, config
    return found


@pytest.mark.parametrize("preprocessing", ["spos", "imagenet"])
def test_a_checkpoint_is_a_network_and_what_it_needs(trained, tree, preprocessing):
    """`preprocess` gives the pixels that the validation loader gives."""
    path, expected, config = trained[preprocessing]
    model = network.load(path)
    assert model.classes == ("apple", "bird", "car") and not model.training and model.architecture == (1, 0, 3)
    images = scan(tree / "val")
    loader = Loader(images, config, False, backend="torchvision", workers=0)
    with torch.no_grad():
        for (x, _), name in zip(loader.batches(evaluation_plan(5, 1)), images.paths):
            with Image.open(tree / "val" / name) as image:
                decoded = torch.from_numpy(np.array(image.convert("RGB")))[None]
            assert torch.equal(model.preprocess(decoded), x) and torch.equal(model(x), expected(x))
            assert torch.equal(model.preprocess(decoded.repeat(2, 1, 1, 1))[1:], x)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 32, 32, 3), torch.zeros(2, 3, 32, 32, dtype=torch.uint8), np.zeros((2, 9, 9, 3), "uint8"),
     None, [1], "photo.jpg"],
)  # fmt: skip
def test_images_of_another_form_are_refused(images):
    with pytest.raises(UserError, match=r"not a uint8 tensor \(N, H, W, 3\), RGB from 0 to 255"):
        ShuffleNetV2((1, 0, 3), space=SPACE).preprocess(images)


def test_an_official_file_loads_in_one_line(tmp_path):
    torch.manual_seed(0)
    reference = reference_spos.Network(reference_spos.WINNER, 1000, True).eval()
    weights = {f"module.{name}": tensor for name, tensor in reference.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "official.pth.tar")
    model = network.load(tmp_path / "official.pth.tar")
    x = model.preprocess(torch.randint(0, 256, (1, 300, 260, 3), dtype=torch.uint8))
    with torch.no_grad():
        assert x.shape == (1, 3, 224, 224) and (model(x) - reference(x)).abs().max() < 1e-5
        shapes = [tuple(x.shape) for x in model.forward_features(x)]
    assert shapes == [(1, 64, 56, 56), (1, 160, 28, 28), (1, 320, 14, 14), (1, 640, 7, 7)]
    assert len(model.classes) == 1000 and model.classes[7] == "class 7"


def test_a_file_that_is_no_network_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.pth: can't be read"):
        network.load(tmp_path / "none.pth")


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_fx_traces_the_network_for_feature_extraction(mode):
    """Also where the input needs a gradient, in which channels are split in another way."""
    torch.manual_seed(0)
    model = ShuffleNetV2((1, 0, 3), space=SPACE).train(mode == "train")
    model.dropout.p = 0.0
    nodes = {f"features.{i}": str(n) for n, i in enumerate(model.stage_ends)} | {"classifier.0": "logits"}
    extractor = create_feature_extractor(model, nodes)
    x = torch.rand(2, 3, 48, 40) * 255
    for inputs in (x, x.clone().requires_grad_()):
        found, expected = extractor(inputs), [*model.forward_features(inputs), model(inputs)]
        assert list(found) == ["0", "1", "logits"] and [tuple(v.shape[1:]) for v in found.values()][:2] == [
            (16, 12, 10), (24, 6, 5),
        ]  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(found.values(), expected))
    found["logits"].sum().backward()
    assert inputs.grad is not None


def snippets(page):
    """The blocks of Python in a page of docs/."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)


@pytest.fixture
def folder(trained, tree, tmp_path, monkeypatch):
    """What the snippets read, in the current folder."""
    for name, target in (
        ("checkpoints/scratch/bnps-checkpoint.pth", trained["spos"][0]), ("data/fashion-mnist", tree),
        ("photo.jpg", tree / "val" / "bird" / "000.jpg"),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(target, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = (("iterations=1500", "iterations=6"), ("iterations=1000", "iterations=4"), ("batches=10", "batches=2"),
         ("augment=", 'backend="torchvision", workers=0, augment='), ("population=16", "population=4"),
         ("generations=5", "generations=2"), ("warmup=", "keep="), ("heldout_per_class=200", "heldout_per_class=10"),
         ('bundled.unpack("data/fashion-mnist")', "folder"))  # fmt: skip


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    """Some bundled images of each class."""
    source = bundled.unpack(ROOT / "data" / "fashion-mnist")
    folder = tmp_path_factory.mktemp("few")
    for part, n in (("train", 30), ("val", 10)):
        for name in (path for path in (source / part).iterdir() if path.is_dir()):
            (folder / part / name.name).mkdir(parents=True)
            for path in sorted(name.iterdir())[:n]:
                os.link(path, folder / part / name.name / path.name)
    return folder


def test_the_method_in_python_runs_as_the_page_has_it(few_images, tmp_path, monkeypatch, caplog):
    """Once as it stands, and once with all of its variations; without a file but the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils.UserError, "of_commands", False)
    method, *_ = snippets("python.md")
    assert len([line for line in method.splitlines() if line.strip()]) <= 46
    rows = re.findall(r"^\| [^|]+ \| `([^`]+)` \| `([^`]+)` \|$", (ROOT / "docs" / "python.md").read_text(), re.M)
    assert len(rows) == 3
    varied = method
    for before, after in rows:
        assert method.count(before) == 1
        varied = varied.replace(before, after)
    for text in (method, varied):
        for before, after in SMALL:
            assert before in text
            text = text.replace(before, after)
        found = {"folder": few_images, "__name__": "__main__"}
        exec(text, found)
        assert len(found["evolution"].rewards) == 8 and found["winner"] in found["evolution"].rewards
        assert found["limits"].excess(found["winner"]) == 0 and 0 <= found["top1"] <= 100 and found["n_images"] == 100
        assert (found["score"] < 0) == (text is not method and "-r[" in text)
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_the_snippets_about_the_network_run(folder):
    *_, first, probe, backbone = (snippet.rstrip().splitlines() for snippet in snippets("python.md"))
    found = {"images": torch.zeros(2, 50, 40, 3, dtype=torch.uint8)}
    exec("\n".join(first), found)
    assert len(found["names"]) == 2 and set(found["names"]) <= set(CLASSES)
    for lines in (probe, backbone):
        assert len([line for line in lines if line and not line.startswith(("import ", "from "))]) < 20
        exec("\n".join(lines), found)
    x, y, weights = (found[name] for name in ("x", "y", "weights"))
    assert x.shape == (36, 25) and 0 <= found["accuracy"] <= 100  # 24 channels and a constant; images of noise
    assert ((x @ weights).argmax(dim=1) == y).double().mean() > 0.7
    detector = found["detector"].eval()
    detector.transform.min_size, detector.transform.max_size = (64,), 64
    with torch.no_grad():
        (boxes,) = detector([torch.rand(3, 64, 64)])
    assert boxes["boxes"].shape[1:] == (4,)


SIZES = [(40, 40), (36, 36), (35, 90), (90, 35), (1, 1), (1, 30), (30, 1), (300, 11), (11, 300), (72, 108), (108, 72),
         (37, 74), (199, 131), (640, 427), (427, 640), (31, 57), (57, 31), (73, 219), (219, 73), (500, 333), (64, 48),
         (5, 4)]  # height, width in px; resized to 36 px  # fmt: skip


@pytest.fixture
def loaded_once(monkeypatch):
    """torch.export.load reads a file once, and gives the same program again, which takes a second."""
    load, found = torch.export.load, {}

    def again(file, extra_files):
        if file not in found:
            found[file] = load(file, extra_files=extra_files).module(), dict(extra_files)
        extra_files |= found[file][1]
        return types.SimpleNamespace(module=lambda: found[file][0])

    monkeypatch.setattr(torch.export, "load", again)


@pytest.mark.parametrize("number, name", [(1, "network.pt2"), pytest.param(2, "network.onnx", marks=needs_onnx),
                                          (3, "plain.pt2")])  # fmt: skip
def test_the_snippets_about_exported_files_run(trained, folder, capsys, request, number, name):
    """As they stand, on images of many sizes, with transparency and orientation: what `--predict` prints."""
    path, _, config = trained["spos"]
    config = dataclasses.replace(config, exif="apply", alpha="black")
    export.export(name, *network.read(path), config, with_preprocessing=number < 3)
    request.getfixturevalue("loaded_once")
    files, rng = {}, np.random.default_rng(0)
    for height, width in SIZES[:: 1 if number == 3 else 5]:
        files[f"{height}_{width}.png"] = encoded(coloured_image(rng, height, width), "PNG")
    kinds = re.compile("exif|alpha|_la|rgba8|transparent|palette8")
    files |= {kind: content for kind, (content, *_) in accepted().items() if kinds.search(kind)}
    assert len(files) > 20
    for file, content in files.items():
        pathlib.Path(file).write_bytes(content)
    words = ["--checkpoint", name, "--loader", "torchvision", "--workers", 0]
    predicted, _ = run("scratch.py", "--predict", *files, *words)
    found = snippets("training.md")
    assert len(found) == 4
    code = compile(found[0] + found[number], name, "exec")
    model = network.load(path)
    model.config = config
    for file, line in zip(files, predicted.splitlines(), strict=True):
        os.replace(shutil.copy(file, "copy"), "photo.jpg")  # not into what it links to
        variables = {}
        exec(code, variables)
        with Image.open(file) as image:
            picture = np.array(pictures.rgb(image, config))
        image = torch.as_tensor(variables["image"])
        if number == 3:
            image = network_input(image.permute(1, 2, 0)[None], "spos")
            assert torch.equal(image, model.preprocess(torch.from_numpy(picture)[None])), file
        else:
            assert np.array_equal(image[0], picture), file
        first = re.search(r": (\S+) ([\d.]+)%", line)
        printed = capsys.readouterr().out.replace("%", "").split()
        assert printed[0] == first[1], file
        assert number == 2 or float(printed[1]) == pytest.approx(float(first[2]), abs=0.11), file

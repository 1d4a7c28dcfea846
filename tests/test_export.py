"""`scratch.py --export` and `--predict`: what the written files say and compute, and what is refused."""

import dataclasses
import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT, run
from torchvision.transforms.v2 import functional as F

import scratch
import weight_files
from dataloader import Loader
from images.dataset import DataConfig, evaluation_plan, scan
from network import ShuffleNetV2
from space.search_space import SearchSpace
from training import checkpoint, export
from training.evaluation import recalibrate_bn
from utils import UserError

CONFIG = DataConfig(input_size=32, val_resize=37)
needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, export.ONNX_PACKAGES)), reason="ONNX's packages are not installed"
)


def make_checkpoint(path, tree, config):
    """A checkpoint of a network whose logits differ between the images of the tree, and that network."""
    torch.manual_seed(0)
    space = SearchSpace.for_images(32, len(CLASSES))
    model = ShuffleNetV2(space.load_architecture(ROOT / "architecture_final.json"), space=space)
    loader = Loader(scan(tree / "train"), config, False, backend="torchvision", workers=0)
    recalibrate_bn(model, model, loader.batches(evaluation_plan(36, 12)), "average")
    checkpoint.save(
        path, kind="scratch", step=1, model=model.state_dict(), metrics={"acc1": 50.0}, space=space.to_dict(),
        data=config.to_dict(),
        split=None, classes=list(CLASSES), architecture=list(model.architecture), settings={},
    )  # fmt: skip
    return model.eval()


@pytest.fixture(scope="module")
def trained(tree, tmp_path_factory):
    """(checkpoint file, network, DataConfig) for each preprocessing, by its name."""
    folder = tmp_path_factory.mktemp("trained")
    configs = {name: dataclasses.replace(CONFIG, preprocessing=name) for name in ("spos", "imagenet")}
    return {
        name: (folder / f"{name}.pth", make_checkpoint(folder / f"{name}.pth", tree, config), config)
        for name, config in configs.items()
    }


def network_logits(model, images, config):
    """The logits of uint8 RGB (N, H, W, 3), with the preprocessing written down once more."""
    if config.preprocessing == "spos":
        x = torch.from_numpy(images.numpy()[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32))
    else:
        x = F.normalize(images.permute(0, 3, 1, 2) / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        return model(x)


def open_file(path):
    """(metadata, a function from images to logits) of an exported file, by its documentation alone."""
    if path.suffix == ".pt2":
        extra = {"metadata.json": ""}
        program = torch.export.load(path, extra_files=extra).module()
        return json.loads(extra["metadata.json"]), program
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    values = session.get_modelmeta().custom_metadata_map
    values = {k: json.loads(v) if v[0] in "[{" or v.isdigit() else v for k, v in values.items()}
    return values, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize(
    ("preprocessing", "suffix"),
    [
        ("spos", ".pt2"),
        pytest.param("imagenet", ".pt2", marks=pytest.mark.slow),
        pytest.param("spos", ".onnx", marks=needs_onnx),
    ],
)
def test_an_exported_file_is_the_network(trained, tree, tmp_path, preprocessing, suffix):
    path, model, config = trained[preprocessing]
    file = tmp_path / f"network{suffix}"
    stdout, _ = run("scratch.py", "--export", file, "--checkpoint", path, "--threads", 1)
    line, last = stdout.splitlines()
    assert re.search(r"[\d.]+ ms an image on this CPU \(median of \d+ runs, batch 1, 1 threads\)", line)
    result = json.loads(last)
    assert result["max_difference"] <= 1e-4 and result["latency_ms"] > 0 and result["bytes"] == file.stat().st_size

    values, program = open_file(file)
    assert values["classes"] == list(CLASSES) and values["architecture"] == list(model.architecture)
    assert values["preprocessing"] | {"resize": 37, "crop": 32, "crop_where": "centre"} == values["preprocessing"]
    assert (values["inside"]["channels"], values["inside"]["range"]) == (
        ("BGR", [0, 255]) if config.preprocessing == "spos" else ("RGB", [0, 1])
    )
    assert values["licence"] == (ROOT / "LICENSE").read_text() and values["flops"] == model.space.flops(
        model.architecture
    )

    loader = Loader(scan(tree / "val"), CONFIG, False, backend="torchvision", workers=0)
    images = torch.cat([x for x, _ in loader.decode(evaluation_plan(21, 21))])
    expected = network_logits(model, images, config)
    assert expected.std(dim=0).min() > 0.01  # or nothing could differ
    for n in (1, 4, 21):
        assert (program(images[:n]) - expected[:n]).abs().max() <= 1e-4
    for wrong in (images.float(), images[:, :20], images.permute(0, 3, 1, 2)):
        with pytest.raises(Exception, match=r"(?i)mismatch|guard|expected|invalid"):
            program(wrong)


def test_a_file_that_differs_is_not_written(trained, tmp_path, monkeypatch):
    path, model, config = trained["spos"]
    stored = weight_files.load(path, "scratch")
    network = export.network_input
    monkeypatch.setattr(export, "network_input", lambda images, preprocessing: network(images, preprocessing) * 1.001)
    with pytest.raises(UserError, match=r"not written, since its logits differ from the network's by"):
        export.export(tmp_path / "wrong.pt2", model, stored, config)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_one_line(trained, tmp_path, monkeypatch):
    path, model, config = trained["spos"]
    stored = weight_files.load(path, "scratch")
    (tmp_path / "file").touch()
    _, stderr = run("scratch.py", "--export", tmp_path / "network.pth", "--checkpoint", path, code=2)
    assert len(stderr.splitlines()) == 1 and "network.pth: ends in neither .pt2 (torch.export) nor .onnx" in stderr
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else "found")
    with pytest.raises(UserError, match=r"network\.onnx: ONNX needs pip install onnxscript; a file named \.pt2"):
        export.export(tmp_path / "network.onnx", model, stored, config)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_an_export_that_cannot_be_written_is_one_line(trained, tmp_path):
    path, model, config = trained["spos"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written"):
        export.export(tmp_path / "file" / "network.pt2", model, weight_files.load(path, "scratch"), config)


def test_predict_prints_the_classes_of_each_image(trained, tree):
    path, model, config = trained["spos"]
    images = sorted(str(p) for p in (tree / "val").glob("*/00[0-2].jpg"))
    stdout, _ = run(
        "scratch.py", "--predict", *images, "--checkpoint", path, "--loader", "torchvision", "--eval-batch-size", 4
    )
    lines = stdout.splitlines()
    loader = Loader(scan(tree / "val"), CONFIG, False, backend="torchvision", workers=0)
    decoded = {
        f"{tree}/val/{p}": x
        for p, x in zip(loader.images.paths, torch.cat([x for x, _ in loader.decode(evaluation_plan(21, 21))]))
    }
    assert [line.split(": ")[0] for line in lines] == images
    for image, line in zip(images, lines):
        found = {name: float(percent) for name, percent in re.findall(r"([\w-]+) ([\d.]+)%", line.split(": ")[1])}
        probabilities = network_logits(model, decoded[image][None], config).softmax(dim=1)[0] * 100
        assert list(found) == [CLASSES[i] for i in probabilities.argsort(descending=True)]
        assert found == pytest.approx(dict(zip(CLASSES, probabilities.tolist())), abs=0.06)


def test_predict_names_a_file_that_is_no_image(trained, tree, tmp_path):
    image = next((tree / "val" / "bird").iterdir())
    (tmp_path / "cut.jpg").write_bytes(image.read_bytes()[:-99])
    (tmp_path / "text.jpg").write_text("text")
    for name, reason in (("cut.jpg", "a damaged image"), ("text.jpg", "not an image"), ("none.jpg", "No such file")):
        words = ["--predict", str(image), str(tmp_path / name), "--checkpoint", str(trained["spos"][0])]
        args = scratch.parse_args(words)
        with pytest.raises(UserError, match=f"{name}: {reason}"):
            scratch.main(args)
    stdout, stderr = run("scratch.py", *words, code=2)
    assert stdout == "" and len(stderr.splitlines()) == 1 and "none.jpg: No such file or directory" in stderr


def test_official_files_have_numbers_for_names(trained, tree, tmp_path, capsys):
    path, _, config = trained["spos"]
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in weight_files.load(path, "scratch").weights.items()}},
        tmp_path / "official.pth.tar",
    )
    image = next((tree / "val" / "bird").iterdir())
    words = [
        "--predict",
        image,
        "--input-size",
        32,
        "--preprocessing",
        config.preprocessing,
        "--checkpoint",
        tmp_path / "official.pth.tar",
    ]
    scratch.main(scratch.parse_args([str(w) for w in words]))
    assert re.search(r"bird/\d+\.jpg: class \d [\d.]+%, class \d ", capsys.readouterr().out)


def test_the_modes_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="not allowed with"):
        scratch.parse_args(["--eval", "--export", str(tmp_path / "network.pt2")])

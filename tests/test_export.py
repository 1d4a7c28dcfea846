"""`scratch.py --export` and `--predict`: what the written files say and compute, and what is refused."""

import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT, run
from torch.export.passes import move_to_device_pass
from torchvision.transforms.v2 import functional as F

import scratch
from dataloader import Loader
from images import preprocessing
from images.dataset import DataConfig, evaluation_plan, scan
from images.preprocessing import resample, scaled
from network import ShuffleNetV2
from settings.subjects import Images
from space import weight_files
from space.custom import make_space
from training import checkpoint, export
from training.evaluation import recalibrate_bn
from training.program import Program, open_program
from utils import UserError

CONFIG = DataConfig(input_size=32, val_resize=37)
needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, export.ONNX_PACKAGES)), reason="ONNX's packages are not installed"
)


def make_checkpoint(path, tree, config):
    """A checkpoint of a network whose logits differ between the images of the tree, and that network."""
    torch.manual_seed(0)
    space = make_space("small", input_size=32, n_classes=len(CLASSES))
    model = ShuffleNetV2((0, 1, 2, 3, 3, 0), space=space)
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


@pytest.fixture(scope="module")
def programs(trained, tree, tmp_path_factory):
    """{(suffix, with preprocessing): (exported file, what was printed)} of the network "spos"."""
    found = {}
    folder = tmp_path_factory.mktemp("programs")
    for suffix in (".pt2", ".onnx")[: 1 + all(map(importlib.util.find_spec, export.ONNX_PACKAGES))]:
        for whole in (True, False):
            file = folder / f"{whole}{suffix}"
            words = ["--export", file, "--checkpoint", trained["spos"][0], "--threads", 1, "--data-dir", tree]
            stdout, _ = run("scratch.py", *words, *(["--with-preprocessing"] if whole else []))
            found[suffix, whole] = file, stdout
    return found


@pytest.mark.parametrize(
    ("preprocessing", "suffix"),
    [
        ("spos", ".pt2"),
        pytest.param("imagenet", ".pt2", marks=pytest.mark.slow),
        pytest.param("spos", ".onnx", marks=needs_onnx),
    ],
)
def test_an_exported_file_is_the_network(trained, programs, tree, tmp_path, preprocessing, suffix):
    path, model, config = trained[preprocessing]
    if preprocessing == "spos":
        file, stdout = programs[suffix, False]
    else:
        file = tmp_path / f"network{suffix}"
        stdout, _ = run("scratch.py", "--export", file, "--checkpoint", path, "--threads", 1)
    _, line, last = stdout.splitlines()
    runtime = {".pt2": "PyTorch", ".onnx": "ONNX Runtime"}[suffix]
    times = "[\\d.]+ of the network alone, as --limit latency counts it; [\\d.]+ without preprocessing; [\\d.]+ with"
    assert re.match(rf"ms an image in {runtime} on this CPU \(medians of 50 runs, batch 1, 1 threads\): {times}", line)
    result = json.loads(last)
    assert result["max_difference"] <= 1e-4 and result["bytes"] == file.stat().st_size
    assert result["network_ms"] > 0 and all(ms > 0 for ms in result["latency_ms"].values())
    assert not [path for path in (ROOT, pathlib.Path.home()) if os.fsencode(path) in file.read_bytes()]

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


def test_the_preprocessing_of_a_program_gives_the_pixels_of_validation(trained, monkeypatch):
    """Larger and smaller, of any ratio, and where a side keeps its length or is halved."""
    model = ShuffleNetV2((0,) * 20, 32, 3)
    rng = np.random.default_rng(0)
    sizes = [(37, 37), (74, 37), (37, 111), (32, 50), (1, 1), (1, 40), (111, 6), (148, 222), (600, 9), (9, 600)]
    for height, width in [*sizes, *rng.integers(1, 300, (150, 2)).tolist()]:
        model.config = DataConfig(input_size=32, val_resize=int(rng.choice([32, 36, 37, 64])), preprocessing="imagenet")
        images = torch.from_numpy(rng.integers(0, 256, (2, height, width, 3), np.uint8))
        found = scaled(resample(images, model.config), "imagenet")
        expected = model.preprocess(images)
        assert torch.equal(found, expected), (height, width, model.config.val_resize)
        with monkeypatch.context() as patch:
            patch.setattr(preprocessing, "MOST_PIXELS", 9)  # as of images that would fill the memory
            assert torch.equal(model.preprocess(images), expected)


def test_metadata_are_those_of_the_checkpoint(trained):
    """Class names in the order of the logits, capitals first; accuracies after the BN pass and before it."""
    names, metrics = ("Zebra", "apple", "Bird"), {"acc1": 60.0, "acc5": 90.0, "acc1_no_pass": 50.0}
    ckpt = types.SimpleNamespace(class_names=names, content={"metrics": metrics}, path="a.pth")
    _, model, config = trained["spos"]
    values = export.metadata(model, ckpt, config)
    assert values["classes"] == list(names) and values["metrics"] == metrics


@pytest.mark.parametrize("whole", [False, True])
def test_a_program_moves_to_another_device_as_it_says(programs, trained, whole):
    file, _ = programs[".pt2", whole]
    images = torch.full((2, 32, 32, 3), 100, dtype=torch.uint8)
    values, program = open_file(file)
    assert "move_to_device_pass(torch.export.load(file), device).module()" in values["device"]
    device = "cuda" if torch.cuda.is_available() else "meta"
    moved = move_to_device_pass(torch.export.load(file), device).module()
    logits = moved(images.to(device))
    assert logits.device.type == device and logits.shape == (2, 3)
    assert device == "meta" or (logits.cpu() - program(images)).abs().max() < 1e-3
    assert 'move_to_device_pass(torch.export.load(file), "cuda")' in (ROOT / "docs/training.md").read_text()


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=needs_onnx)])
def test_a_program_with_preprocessing_takes_whole_images(programs, trained, tree, suffix):
    """It is compared on all images of val, from the files on."""
    file, stdout = programs[suffix, True]
    first, line, _, last = stdout.splitlines()
    assert first == f"comparing the file with the network on the images of {tree}/val"
    assert re.search(r"on 21 images, from the files on; 21 get the same class, 21 the same pixels$", line)
    result = json.loads(last)
    assert result["max_difference"] <= 1e-4 and (result["same_top1"], result["same_pixels"]) == (21, 21)
    assert not [path for path in (ROOT, pathlib.Path.home()) if os.fsencode(path) in file.read_bytes()]
    values, program = open_file(file)
    assert values["form"] == "with preprocessing" and "height, width" in values["input"]
    assert open_file(programs[suffix, False][0])[0]["form"] == "without preprocessing"
    _, model, config = trained["spos"]
    model.config = config
    for n, height, width in ((1, 50, 80), (3, 80, 50), (2, 37, 37), (1, 500, 40)):
        images = torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8)
        with torch.no_grad():
            assert (program(images) - model(model.preprocess(images))).abs().max() <= 1e-4


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=needs_onnx)])
def test_predict_by_an_exported_file(programs, trained, tree, suffix, whole):
    """Prints what the checkpoint prints, up to the last digit."""
    images = sorted((tree / "val").glob("*/00[0-2].jpg"))
    words = ["--loader", "torchvision", "--workers", 0, "--eval-batch-size", 4]
    printed = [
        run("scratch.py", "--predict", *images, *words, "--checkpoint", path)[0].splitlines()
        for path in (trained["spos"][0], programs[suffix, whole][0])
    ]
    assert len(printed[0]) == len(images)
    for a, b in zip(*printed, strict=True):
        assert re.sub(r"[\d.]+%", "", a) == re.sub(r"[\d.]+%", "", b)
        numbers = [[float(n) for n in re.findall(r"([\d.]+)%", line)] for line in (a, b)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.11)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "suffix", [".pt2", pytest.param(".onnx", marks=needs_onnx), pytest.param(".ort", marks=needs_onnx)]
)
def test_eval_measures_an_exported_file(programs, trained, tree, tmp_path, suffix, whole):
    """As it measures the checkpoint; an .ort file is one that ONNX Runtime's tools made of an .onnx file."""
    file = programs[".onnx" if suffix == ".ort" else suffix, whole][0]
    if suffix == ".ort":
        shutil.copy(file, tmp_path)
        words = ["-m", "onnxruntime.tools.convert_onnx_models_to_ort", tmp_path, "--optimization_style", "Fixed"]
        subprocess.run([sys.executable, *words], check=True, capture_output=True, timeout=120)
        (file,) = tmp_path.glob("*.ort")
    words = ["--loader", "torchvision", "--workers", 0, "--eval-batch-size", 4, "--data-dir", tree, "--threads", 1]
    expected, found = (
        json.loads(run("scratch.py", "--eval", *words, "--checkpoint", path)[0]) for path in (trained["spos"][0], file)
    )
    assert found == expected and found["n_images"] == 21 and found["acc5"] == 100


def test_eval_by_an_exported_file_of_other_classes_is_one_line(programs, tree, tmp_path, monkeypatch):
    for part in ("train", "val"):
        shutil.copytree(tree / part, tmp_path / part)
        (tmp_path / part / "car").rename(tmp_path / part / "cat")
    words = ["--checkpoint", programs[".pt2", False][0], "--data-dir", tmp_path]
    stdout, stderr = run("scratch.py", "--eval", *words, code=2)
    assert stdout == "" and "False.pt2: its class names are not those of the data" in stderr.splitlines()[-1]
    monkeypatch.setattr("training.distributed.world_size", lambda: 2)
    _, stderr = run("scratch.py", "--eval", *words, code=2)
    assert "an exported file is measured by one process" in stderr.splitlines()[-1]


@needs_onnx
def test_nodes_are_named_by_block_and_operation(programs, trained, tmp_path):
    import onnx

    _, model, config = trained["spos"]
    graph = onnx.load(programs[".onnx", True][0]).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert not any(part.metadata_props or part.doc_string for part in (*graph.node, *graph.input, *graph.initializer))
    blocks = [f"block{i}/{name}" for i, (name, _) in enumerate(model.space.chosen(model.architecture))]
    assert {name.rpartition("/")[0] for name in names} == {
        "input",
        "first_conv",
        *blocks,
        "conv_last",
        "classifier",
        "",
    }
    assert f"{blocks[3]}/conv1" in names and "classifier/gemm1" in names
    stored = weight_files.load(trained["spos"][0], "scratch")
    export.export(tmp_path / "old.onnx", model, stored, config, opset=18)
    assert [opset.version for opset in onnx.load(tmp_path / "old.onnx").opset_import] == [18]


def test_what_cannot_be_predicted_by_an_exported_file_is_one_line(programs, tree, tmp_path):
    image, file = next((tree / "val" / "bird").iterdir()), programs[".pt2", True][0]
    (tmp_path / "damaged.pt2").write_bytes(file.read_bytes()[:1000])
    for words, message in (
        (["--checkpoint", tmp_path / "damaged.pt2"], "damaged.pt2: not a program that scratch.py exported ("),
        (["--checkpoint", tmp_path / "none.pt2"], "none.pt2: No such file or directory"),
        (["--checkpoint", file, "--val-resize", 40], f"--val-resize 40 contradicts {file}, which has 37"),
        (["--checkpoint", file, "--preprocessing", "imagenet"], "--preprocessing imagenet contradicts"),
        (["--checkpoint", file, "--space", "small"], "--space has no effect with an exported program"),
        (["--checkpoint", file, "--with-preprocessing"], "--with-preprocessing has no effect without --export"),
        (["--checkpoint", file, "--opset", 18], "--opset has no effect without --export FILE.onnx"),
    ):
        stdout, stderr = run("scratch.py", "--predict", image, *words, code=2)
        assert stdout == "" and len(stderr.splitlines()) == 1 and message in stderr


@pytest.mark.parametrize("whole", [True, False])
def test_a_file_that_differs_is_not_written(trained, tree, tmp_path, monkeypatch, whole):
    """Its answers are made wrong in the scale, or in the size that whole images are resized to."""
    path, model, config = trained["spos"]
    stored = weight_files.load(path, "scratch")
    images = scan(tree / "val")

    def refused(reason):
        with pytest.raises(UserError, match=f"not written, since {reason}"):
            export.export(tmp_path / "wrong.pt2", model, stored, config, whole, images)
        assert not list(tmp_path.iterdir())

    def wrong(path, content):
        return {}, lambda x: model(export.Input(config, whole)(x) * 1.001)

    monkeypatch.setattr(export, "torch_file", lambda *_: (b"a program", []))
    monkeypatch.setattr(export, "read", wrong)
    refused("its logits differ from the network's by")
    if whole:
        other = dataclasses.replace(config, val_resize=60)
        monkeypatch.setattr(export, "resample", lambda x, _: resample(x, other))
        monkeypatch.setattr(export, "read", lambda *_: ({}, lambda x: model(scaled(resample(x, other), "spos"))))
        refused(r"\d+ of 21 images get another class")


def test_what_cannot_be_exported_is_one_line(trained, tmp_path, monkeypatch):
    path, model, config = trained["spos"]
    stored = weight_files.load(path, "scratch")
    (tmp_path / "file").touch()
    _, stderr = run("scratch.py", "--export", tmp_path / "network.pth", "--checkpoint", path, code=2)
    assert len(stderr.splitlines()) == 1 and "network.pth: ends in neither .pt2 (torch.export) nor .onnx" in stderr
    _, stderr = run("scratch.py", "--export", tmp_path / "network.onnx", "--checkpoint", path, "--opset", 17, code=2)
    assert "--opset: " in stderr.splitlines()[-1]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else "found")
    with pytest.raises(UserError, match=r"network\.onnx: ONNX needs pip install onnxscript; a file named \.pt2"):
        export.export(tmp_path / "network.onnx", model, stored, config)
    monkeypatch.setattr(export, "torch_file", lambda *_: exec("raise RuntimeError('branches on data')"))
    with pytest.raises(UserError, match=r"network\.pt2: can't be exported: RuntimeError: branches on data"):
        export.export(tmp_path / "network.pt2", model, stored, config)
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


def test_official_files_have_numbers_for_names(tree, tmp_path, capsys):
    model = ShuffleNetV2(json.loads((ROOT / "architecture_final.json").read_text()), 32, len(CLASSES))
    weights = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "official.pth.tar")
    image = next((tree / "val" / "bird").iterdir())
    words = [
        "--predict",
        image,
        "--input-size",
        32,
        "--preprocessing",
        "spos",
        "--checkpoint",
        tmp_path / "official.pth.tar",
    ]
    scratch.main(scratch.parse_args([str(w) for w in words]))
    assert re.search(r"bird/\d+\.jpg: class \d [\d.]+%, class \d ", capsys.readouterr().out)


def test_an_exported_official_file_can_be_measured_on_classes_of_any_name():
    program = Program("network.pt2", {"classes": ["class 0", "class 1"]}, None)
    checkpoint.check_classes(program, ["bird", "car"])
    with pytest.raises(UserError, match="has 2 classes, the data 3: the file has no names"):
        checkpoint.check_classes(program, ["bird", "car", "dog"])


def test_the_csv_of_groups_may_have_moved_since_training(trained, tree, tmp_path):
    content = torch.load(trained["spos"][0], weights_only=False)
    content["data"]["group_by"] = f"{tmp_path}/gone.csv"
    torch.save(content, tmp_path / "moved.pth")
    (tmp_path / "groups.csv").write_text("bird/000.jpg,one\nbird/001.jpg,one\n")
    words = ("--eval", "--checkpoint", tmp_path / "moved.pth", "--data-dir", tree, "--loader torchvision --workers 0")
    _, stderr = run("scratch.py", *words, code=2)
    assert f"--group-by {tmp_path}/gone.csv: No such file or directory" in stderr
    stdout, stderr = run("scratch.py", *words, "--group-by", tmp_path / "groups.csv")
    assert "acc1" in stdout and "group 'one' is in train and val" in stderr


def test_the_modes_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="not allowed with"):
        scratch.parse_args(["--eval", "--export", str(tmp_path / "network.pt2")])


def test_files_from_before_say_transparency_and_orientation_in_words(trained):
    path, model, config = trained["imagenet"]
    values = export.metadata(model, weight_files.load(path, "scratch"), config)
    for alpha, exif in itertools.product(("white", "black", "dropped"), ("apply", "ignored")):
        expected = DataConfig(32, 37, "imagenet", alpha=alpha, exif=exif)
        size = export.metadata(model, weight_files.load(path, "scratch"), expected)["preprocessing"]
        assert Program("", values | {"preprocessing": size}, None).config == expected
        words = {"resize": 37, "crop": 32, "exif_orientation": "applied" if exif == "apply" else "ignored"}
        words["transparency"] = alpha if alpha == "dropped" else f"composited on {alpha}"
        assert Program("", values | {"preprocessing": words}, None).config == expected


@needs_onnx
@pytest.mark.parametrize("whole", [True, False])
def test_the_code_about_apps_quantizes_a_file_that_eval_and_predict_read(programs, tree, tmp_path, monkeypatch, whole):
    """int8 and fp16 of either form, with the pixels and nearly the logits of the file that they were made of."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(programs[".onnx", whole][0], "network.onnx")
    os.symlink(tree, "sorted")
    for code in re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "deploy.md").read_text(), re.M | re.S):
        exec(code, {})
    program = open_program("network.onnx")
    images, _ = next(iter(program.batches(scan(tree / "val"), Images(loader="torchvision", workers=0))))
    expected = program.run(images)
    for name, share in (("int8.onnx", 0.5), ("fp16.onnx", 0.2)):
        assert pathlib.Path(name).stat().st_size < 0.7 * pathlib.Path("network.onnx").stat().st_size
        difference = open_program(name).run(images) - expected
        assert 0 < difference.abs().max() < share * expected.abs().max()
        words = ["--checkpoint", name, "--loader", "torchvision", "--workers", 0]
        stdout, _ = run("scratch.py", "--eval", *words, "--data-dir", tree)
        assert json.loads(stdout)["n_images"] == 21
        stdout, _ = run("scratch.py", "--predict", next((tree / "val" / "bird").iterdir()), *words)
        assert re.search(r": \w+ [\d.]+%, ", stdout)

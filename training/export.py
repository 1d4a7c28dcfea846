"""Export of the retrained network: one file with the program, the weights and what its user has to know.

The program takes images as decoders return them, uint8 RGB (N, H, W, 3), any N, and returns logits (N, classes). It has
two forms, and the metadata say which one a file has: without preprocessing it takes images of one size, resized and
cropped; with preprocessing it takes any size, and resizes and crops as validation does, to the pixel. The channel
order, the scale and the normalisation are inside in both, since nothing would notice a mistake in them. Another type
or size is refused.

FILE.pt2 is written by torch.export (metadata.json in its extra files), FILE.onnx by torch.onnx (metadata_props, a value
that is no text as JSON). A file is read back and compared with the network before it gets its name. `training/program`
uses one.
"""

import collections
import importlib.util
import io
import json
import os
import pathlib
import statistics
import warnings

import torch
from torch import nn
from tqdm import tqdm

from dataloader import Loader, read_image
from images import bundled
from images.dataset import evaluation_plan, scan, stratified_order
from images.preprocessing import IMAGENET_MEAN, IMAGENET_STD, network_input, resample, scaled
from network import fold_bn
from settings.subjects import ONNX_PACKAGES
from training.program import FORMS, SUFFIXES, open_session, read, runs
from utils import HERE, UserError, atomic_write, clock_ns, commit, in_one_line, versions

TOLERANCE = 1e-4  # largest difference between logits
SAME_TOP1 = 0.999  # share of images that get the same class, where pixels are compared too
N_IMAGES, BATCH_SIZE = 20, 7  # bundled images, in batches of 7, 7 and 6
WARM_UP, TIMED = 10, 50  # runs of one image
# Operations of a program are bound to the device on which it was traced; .to(device) moves only its weights.
MOVED = "cpu; elsewhere move_to_device_pass(torch.export.load(file), device).module(), from torch.export.passes"


class Input(nn.Module):
    """What a program does before its network: uint8 RGB (N, H, W, 3) -> float (N, 3, S, S)."""

    def __init__(self, config, whole):
        super().__init__()
        self.config = config
        self.whole = whole

    def forward(self, images):
        if self.whole:
            return scaled(resample(images, self.config), self.config.preprocessing)
        return network_input(images, self.config.preprocessing)


def metadata(model, ckpt, config, with_preprocessing=False):
    """All that the file says about itself, by name; plain values."""
    space = model.space
    candidate = model.architecture
    size = config.input_size
    spos = config.preprocessing == "spos"
    sides = "height, width" if with_preprocessing else f"{size}, {size}"
    return {
        "model": "one path of the Single Path One-Shot supernet (arXiv 1904.00420), retrained",
        "form": FORMS[with_preprocessing],
        "input": f"images: uint8 (N, {sides}, 3), RGB from 0 to 255, any N{' and size' if with_preprocessing else ''}",
        "output": "logits: float32 (N, classes); their softmax is the probabilities",
        "preprocessing": {  # what the user does; resizing and cropping are inside the form with preprocessing
            "resize": config.val_resize, "resize_what": "shorter side, px; the other side is rounded: int(x + 0.5)",
            "interpolation": "bilinear, not antialiased", "crop": size, "crop_where": "centre",
            "alpha": config.alpha, "alpha_what": "seen through transparent pixels; dropped: the colours that they have",
            "exif": config.exif, "exif_what": "apply: turned first, as the EXIF orientation says",
        },
        "inside": {"channels": "BGR", "range": [0, 255]} if spos
                  else {"channels": "RGB", "range": [0, 1], "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        "classes": list(ckpt.class_names),
        "architecture": list(candidate),
        "operations": [name for name, _ in space.chosen(candidate)],
        "widths": [width for _, width in space.chosen(candidate)],
        "flops": space.flops(candidate), "params": space.params(candidate),
        "metrics": ckpt.content and ckpt.content["metrics"],
        "source": f"{pathlib.Path(ckpt.path).name}; {versions()}; commit {commit()}",
        "licence": (HERE / "LICENSE").read_text(),
    }  # fmt: skip


def export(path, model, ckpt, config, with_preprocessing=False, images=None, opset=None):
    """Writes the network to `path`, .pt2 or .onnx; returns how its answers compare with the network's, and latencies.

    `images` is the ImageSet on which a program with preprocessing is compared from the file on, by default some bundled
    images; `opset` is ONNX's, by default torch.onnx's. Raises UserError if the suffix is another, a package is missing,
    the file can't be written, or its logits or answers differ.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".pt2", ".onnx"):
        raise UserError(f"--export {path}: ends in neither .pt2 (torch.export) nor .onnx")
    missing = [name for name in ONNX_PACKAGES if path.suffix == ".onnx" and importlib.util.find_spec(name) is None]
    if missing:
        install = f"ONNX needs pip install {' '.join(missing)}; a file named .pt2 needs nothing more"
        raise UserError(f"--export {path}: {install}")
    model.to("cpu").eval()
    network = fold_bn(model)
    values = metadata(model, ckpt, config, with_preprocessing)
    with in_one_line(f"--export {path}: can't be exported"):  # an operation of the user's, mostly
        if path.suffix == ".pt2":
            content, timed = torch_file(network, config, with_preprocessing, values)
        else:
            content, timed = onnx_file(network, config, with_preprocessing, values, opset)
        _, run = read(path, content)
    if not images:
        images = scan(bundled.unpack(HERE / "data" / "fashion-mnist") / "val")
        images = images.take(stratified_order(images.labels, 0)[:N_IMAGES])
    found = (compare_from_files if with_preprocessing else compare)(run, model, config, images)
    if not found["max_difference"] <= TOLERANCE:
        largest = f"its logits differ from the network's by {found['max_difference']:.2g}, over {TOLERANCE}"
        raise UserError(f"--export {path}: not written, since {largest}")
    n = found["n_images"]
    if found.get("same_top1", n) < SAME_TOP1 * n:
        raise UserError(f"--export {path}: not written, since {n - found['same_top1']} of {n} images get another class")
    try:
        with atomic_write(path, "wb") as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"--export {path}: can't be written ({error.strerror})") from None
    whole, plain = (_example(config, form)[:1] for form in (True, False))
    timed[1 + with_preprocessing] = run
    found |= latencies(timed, [Input(config, False)(plain), plain, whole])
    return {
        "file": str(path), "bytes": len(content), **found, "runtime": SUFFIXES[path.suffix],
        "threads": torch.get_num_threads(), "runs": TIMED,
    }  # fmt: skip


def _example(config, whole):
    """Images that a program takes, (2, H, W, 3); with preprocessing of another size than the network's."""
    sides = (config.val_resize, config.val_resize + 1) if whole else (config.input_size,) * 2
    return torch.zeros(2, *sides, 3, dtype=torch.uint8)


def _program(module, example, names):
    """The ExportedProgram of a module; `names` are those of the first dimensions, which vary."""
    dynamic = ({i: torch.export.Dim(name) for i, name in enumerate(names)},)
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it has the paths of this machine
    return program


def _dimensions(whole):
    return ("batch", "height", "width") if whole else ("batch",)


def torch_file(network, config, whole, values):
    """(the bytes of a .pt2 file, callables: the network, and with what comes before it in both forms)."""
    forms = [nn.Sequential(Input(config, form), network) for form in (False, True)]
    program = _program(forms[whole], _example(config, whole), _dimensions(whole))
    file = io.BytesIO()
    values = values | {"device": MOVED}
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(values, indent=1)})
    network.to(memory_format=torch.channels_last)  # as the latencies of a search are measured
    return file.getvalue(), [network, *forms]


def onnx_file(network, config, whole, values, opset):
    """As `torch_file`, for an .onnx file. The network is exported once, and what comes before it is put in front."""
    from onnx import ModelProto, compose, helper

    example = Input(config, False)(_example(config, False))
    alone = _to_onnx(network, example, ("batch",), ("x", "logits"), opset)
    forms = [ModelProto(), ModelProto()]
    for form, model in enumerate(forms):
        before = Input(config, bool(form)), _example(config, form), _dimensions(form)
        before = _to_onnx(*before, ("images", "x"), opset).graph
        before = compose.add_prefix_graph(before, "input/", rename_inputs=False, rename_outputs=False)
        model.CopyFrom(alone)
        model.graph.CopyFrom(compose.merge_graphs(before, alone.graph, [("x", "x")], name="network"))
    helper.set_model_props(forms[whole], {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()})
    contents = [model.SerializeToString() for model in (alone, *forms)]
    return contents[1 + whole], [runs(open_session(content)) for content in contents]


def _to_onnx(module, example, dimensions, ends, opset):
    """The ONNX model of a module; `ends` are the names of its input and output. Nodes are named by block, operation
    and kind."""
    options = {"input_names": ends[:1], "output_names": ends[1:], "opset_version": opset, "verbose": False}
    program = _program(module, example, dimensions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = (dict(enumerate(dimensions)),)
        model = torch.onnx.export(program, dynamo=True, dynamic_shapes=shapes, **options).model_proto
    counts = collections.Counter()
    place = ""
    graph = model.graph
    for node in graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        scopes = json.loads(notes.get("pkg.torch.onnx.name_scopes", "[]").replace("'", '"'))
        place = _place(module, scopes) if scopes else place
        counts[place, node.op_type] += 1
        node.name = f"{place}{node.op_type.lower()}{counts[place, node.op_type]}"
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")  # which names paths of this machine
    graph.ClearField("value_info")
    return model


def _place(module, scopes):
    """Where a node belongs, "block3/shufflenet_5x5/", by the names of the modules in which it was called."""
    if not isinstance(module, Input):
        names = [name for name, _ in module.space.chosen(module.architecture)]
        for scope in scopes:
            first, *rest = scope.split(".")
            if first == "features" and rest:
                return f"block{rest[0]}/{names[int(rest[0])]}/"
            if first in ("first_conv", "conv_last", "classifier"):
                return f"{first}/"
    return ""


def compare(run, model, config, images):
    """How the logits of `run(images)` compare with the network's, on images that are resized and cropped."""
    loader = Loader(images, config, False, backend="torchvision", workers=0)
    differences = []
    with torch.no_grad():
        for decoded, _ in loader.decode(evaluation_plan(len(images), BATCH_SIZE)):
            differences.append((run(decoded) - model(loader.finish(decoded))).abs().max().item())
    return {"max_difference": max(differences), "n_images": len(images)}


def compare_from_files(run, model, config, images):
    """How `run(image)` of whole images compares with the network behind the loader of validation, from the files on.

    The logits are compared for equal pixels, those of the preprocessing in the program; the classes for the loader's.
    """
    loader = Loader(images, config, False, backend="torchvision", workers=0)
    found = {"max_difference": 0.0, "n_images": len(images), "same_top1": 0, "same_pixels": 0}
    plan = tqdm(evaluation_plan(len(images), 1), desc="comparing from the files on", unit=" images", delay=5)
    with torch.no_grad():
        for path, (loaded, _) in zip(images.paths, loader.decode(plan)):
            image = read_image(os.path.join(images.root, path), config)
            pixels = resample(image, config).permute(0, 2, 3, 1).to(torch.uint8)
            logits = run(image)
            expected = model(loader.finish(loaded))
            same = bool(torch.equal(pixels, loaded))
            difference = logits - (expected if same else model(loader.finish(pixels)))
            # max() would drop a NaN.
            found["max_difference"] = torch.tensor([found["max_difference"], difference.abs().max()]).max().item()
            found["same_top1"] += int(logits.argmax() == expected.argmax())
            found["same_pixels"] += same
    return found


def latencies(timed, inputs):
    """{"network_ms", and "latency_ms" by form}: median milliseconds of three callables on their inputs, in turns.

    With one thread, by its own clock.
    """
    clock = clock_ns(torch.get_num_threads())
    ns = [[] for _ in timed]
    with torch.no_grad():
        for _ in range(WARM_UP + TIMED):
            for run, x, taken in zip(timed, inputs, ns):
                start = clock()
                run(x)
                taken.append(clock() - start)
    alone, *forms = (round(statistics.median(taken[WARM_UP:]) / 1e6, 3) for taken in ns)
    return {"network_ms": alone, "latency_ms": dict(zip(FORMS, forms))}

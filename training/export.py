"""Export of the retrained network: one file with the program, the weights and what its user has to know.

The program takes images as decoders return them, uint8 RGB (N, H, W, 3), any N, and returns logits (N, classes). It has
two forms, and the metadata say which one a file has: without preprocessing it takes images of one size, resized and
cropped; with preprocessing it takes any size, and resizes and crops as validation does, to the pixel. The channel
order, the scale and the normalisation are inside in both, since nothing would notice a mistake in them. Another type
or size is refused.

FILE.pt2 is written by torch.export (metadata.json in its extra files), FILE.onnx by torch.onnx (metadata_props, a value
that is no text as JSON). A file is read back and compared with the network before it gets its name.
"""

import importlib.util
import io
import json
import logging
import os
import pathlib
import statistics
import time

import torch
from torch import nn
from tqdm import tqdm

from dataloader import Loader, read_image
from images import bundled
from images.dataset import ImageSet, evaluation_plan, resize_and_crop, scan, stratified_order
from images.image_check import inspect
from images.preprocessing import IMAGENET_MEAN, IMAGENET_STD, network_input
from settings.subjects import DataConfig
from utils import HERE, UserError, atomic_write, commit, log, versions

TOLERANCE = 1e-4  # of logits, absolute
SAME_TOP1 = 0.999  # of the images of a comparison from the file on
N_IMAGES, BATCH_SIZE = 20, 7  # of the bundled images: 7, 7 and 6
WARM_UP, TIMED = 10, 50  # runs of one image
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # torch.onnx needs the first two; the third runs the file
SUFFIXES = {".pt2": "torch", ".onnx": "onnxruntime"}  # and what runs such a file, in RUNTIMES
OF_A_PROGRAM = (
    "input_size",
    "val_resize",
    "preprocessing",
    "alpha",
    "exif",
)  # of a DataConfig, what a program has in it
FORMS = ("without preprocessing", "with preprocessing")


class Program(nn.Module):
    """What is exported: uint8 RGB (N, H, W, 3) -> logits (N, classes)."""

    def __init__(self, network, config, with_preprocessing=False):
        super().__init__()
        self.network = network
        self.config = config
        self.with_preprocessing = with_preprocessing

    def forward(self, images):
        if self.with_preprocessing:
            images = preprocess(images, self.config)
        return self.network(network_input(images, self.config.preprocessing))


# --- preprocessing in a program ------------------------------------------------------------------------------
# torch resizes uint8 by weights of 14 or 15 bits, one side after the other, and rounds after each. The same in whole
# numbers gives the same pixels in every format; ONNX's Resize rounds once. Of the rows and columns of the resized image
# those of the crop are computed, whose number does not depend on the image.
# Source: torch's aten/src/ATen/native/cpu/UpSampleKernel.cpp (HelperInterpBase), torchvision's resize.


def preprocess(images, config):
    """uint8 (N, H, W, 3) -> uint8 (N, S, S, 3): resized and cropped as in validation, without branches."""
    height, width = (torch.scalar_tensor(side, dtype=torch.float64) for side in images.shape[1:3])
    resize = torch.scalar_tensor(config.val_resize, dtype=torch.float64)
    size, corner = resize_and_crop(height, width, resize, config.input_size)
    top, bottom, rows = _neighbours(height, size[0], corner[0], config.input_size)
    left, right, columns = _neighbours(width, size[1], corner[1], config.input_size)
    images = images.index_select(1, torch.cat([top, bottom]))
    images = _mean(images.index_select(2, left), images.index_select(2, right), columns[..., None])
    above, below = images.split(config.input_size, dim=1)
    return _mean(above, below, rows[..., None, None]).to(torch.uint8)


def _neighbours(old, new, first, n):
    """For the places `first` to `first + n` of a side resized from `old` to `new` px: (indices before each (n,),
    indices behind it (n,), weights (3, n) of the one and the other, and their sum)."""
    at = torch.clamp((first + torch.arange(n, dtype=torch.float64) + 0.5) * (old / new) - 0.5, min=0)
    before = torch.minimum(at.floor(), old - 1)
    share = (at - before) * (before < old - 1)
    # 15 bits, unless the whole side has a weight of 1, which would not fit: at an end that is clamped, or where a place
    # falls on a pixel, because both lengths have the same power of two as a factor.
    before = before.long()
    old = old.long()
    new = new.long()
    unit = torch.where((old < new) | ((old & -old) == (new & -new)), 2**14, 2**15)
    weights = [((s * unit + 0.5).floor()).int() for s in (1 - share, share)]
    return before, torch.minimum(before + 1, old - 1), torch.stack([*weights, unit.int().expand(n)])


def _mean(a, b, weights):
    of_a, of_b, unit = weights
    return (a.int() * of_a + b.int() * of_b + unit // 2) // unit


# --- export --------------------------------------------------------------------------------------------------


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


def export(path, model, ckpt, config, with_preprocessing=False, images=None):
    """Writes the network to `path`, .pt2 or .onnx; returns how its answers compare with the network's, and its latency.

    `images` is the ImageSet on which a program with preprocessing is compared from the file on, by default some bundled
    images. Raises UserError if the suffix is another, a package is missing, the file can't be written, or its logits or
    answers differ.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"--export {path}: ends in neither .pt2 (torch.export) nor .onnx")
    missing = [name for name in ONNX_PACKAGES if path.suffix == ".onnx" and importlib.util.find_spec(name) is None]
    if missing:
        install = f"ONNX needs pip install {' '.join(missing)}; a file named .pt2 needs nothing more"
        raise UserError(f"--export {path}: {install}")
    model.to("cpu").eval()
    sides = (config.val_resize, config.val_resize + 1) if with_preprocessing else (config.input_size,) * 2
    example = torch.zeros(2, *sides, 3, dtype=torch.uint8)
    names = ("batch", "height", "width") if with_preprocessing else ("batch",)
    dynamic = {"images": {i: torch.export.Dim(name) for i, name in enumerate(names)}}
    with torch.no_grad():
        program = torch.export.export(Program(model, config, with_preprocessing), (example,), dynamic_shapes=dynamic)
    values = metadata(model, ckpt, config, with_preprocessing)
    content = (_torch_export if path.suffix == ".pt2" else _onnx)(program, values, names)
    _, run = _read(path, content)
    images = images or _bundled_images()
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
    return {
        "file": str(path), "bytes": len(content), **found,
        "latency_ms": latency(run, example[:1]), "runtime": SUFFIXES[path.suffix], "threads": torch.get_num_threads(),
        "runs": TIMED,
    }  # fmt: skip


def _torch_export(program, values, _):
    """The bytes of a .pt2 file."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(values, indent=1)})
    return file.getvalue()


def _onnx(program, values, names):
    """The bytes of an .onnx file; `names` are those of the first dimensions, which vary."""
    import onnx

    shapes = {"images": dict(enumerate(names))}
    options = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": shapes}
    model = torch.onnx.export(program, dynamo=True, verbose=False, **options).model_proto
    onnx.helper.set_model_props(model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()})
    return model.SerializeToString()


def _bundled_images():
    images = scan(bundled.unpack(HERE / "data" / "fashion-mnist") / "val")
    return images.take(stratified_order(images.labels, 0)[:N_IMAGES])


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
            pixels = preprocess(image, config)
            logits = run(image)
            expected = model(loader.finish(loaded))
            same = bool(torch.equal(pixels, loaded))
            difference = logits - (expected if same else model(loader.finish(pixels)))
            # max() would drop a NaN.
            found["max_difference"] = torch.tensor([found["max_difference"], difference.abs().max()]).max().item()
            found["same_top1"] += int(logits.argmax() == expected.argmax())
            found["same_pixels"] += same
    return found


def latency(run, image):
    """Median milliseconds of `run(image)`."""
    seconds = []
    with torch.no_grad():
        for _ in range(WARM_UP + TIMED):
            start = time.perf_counter()
            run(image)
            seconds.append(time.perf_counter() - start)
    return round(statistics.median(seconds[WARM_UP:]) * 1000, 3)


# --- use -----------------------------------------------------------------------------------------------------


def is_program(path):
    """Whether a file is an exported program, by its name."""
    return pathlib.Path(path or "").suffix in SUFFIXES


def open_program(path):
    """(metadata, what runs the program) of an exported file. A .pt2 file can execute code: it has to be trusted.

    Raises UserError if it is missing or damaged, or the package that runs it is.
    """
    path = pathlib.Path(path)
    if path.suffix == ".onnx" and importlib.util.find_spec("onnxruntime") is None:
        raise UserError(f"--checkpoint {path}: ONNX needs pip install onnxruntime")
    try:
        values, run = _read(path, path.read_bytes())
        stored_config(values)
        if not all(type(name) is str for name in values["classes"]) or values.get("form", FORMS[0]) not in FORMS:
            raise ValueError("no metadata of this project")
    except OSError as error:
        raise UserError(f"--checkpoint {path}: {error.strerror}") from None
    except Exception as error:  # of any kind, by the readers of damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"--checkpoint {path}: not a program that scratch.py exported ({reason})") from None
    return values, run


def _read(path, content):
    """(metadata, a function from images to logits) of the bytes of an exported file."""
    if path.suffix == ".pt2":
        logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # it logs the traceback of a damaged file
        extra = {"metadata.json": ""}
        run = torch.export.load(io.BytesIO(content), extra_files=extra).module()
        return json.loads(extra["metadata.json"]), run
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    values = session.get_modelmeta().custom_metadata_map
    values |= {name: json.loads(values[name]) for name in ("preprocessing", "inside", "classes") if name in values}
    return values, lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def stored_config(values):
    """The DataConfig that the metadata of a program say."""
    size = values["preprocessing"]
    channels = {"BGR": "spos", "RGB": "imagenet"}[values["inside"]["channels"]]
    if "transparency" in size:  # the words of files from before
        alpha = size["transparency"].removeprefix("composited on ")
        size |= {"alpha": alpha, "exif": size["exif_orientation"].replace("applied", "apply")}
    return DataConfig(size["crop"], size["resize"], channels, alpha=size["alpha"], exif=size["exif"])


def predict(paths, model, ckpt, config, images, device):
    """Yields (path, [(class name, probability), ...]) for each image file, the five most probable classes first.

    `images` is an Images, which says how they are loaded. Raises UserError that names the file, before anything is
    computed, where one is not an image.
    """
    model.to(device, memory_format=torch.channels_last).eval()
    loader = _loader(paths, config, images, device)
    batches = (model(batch) for batch, _ in loader.batches(evaluation_plan(len(paths), images.eval_batch_size)))
    yield from _most_probable(paths, ckpt.class_names, batches)


def predict_by_program(paths, values, run, images):
    """As `predict`, by an exported program on the CPU: `open_program` gives `values` and `run`."""
    config = stored_config(values)
    loader = _loader(paths, config, images, "cpu")
    if values.get("form") == FORMS[1]:
        batches = (run(read_image(path, config)) for path in paths)
    else:
        batches = (run(batch) for batch, _ in loader.decode(evaluation_plan(len(paths), images.eval_batch_size)))
    yield from _most_probable(paths, values["classes"], batches)


def _loader(paths, config, images, device):
    if images.loader == "synthetic":
        raise UserError("--loader synthetic: reads no files; leave the flag out with --predict")
    for path in paths:
        found = inspect(path, images.max_pixels)
        if found.reason:
            raise UserError(f"--predict {path}: {found.reason}")
        if found.turned and config.exif == "ignored":
            log.warning("warning: %s: has an EXIF orientation, which is ignored, as in training", path)
    files = ImageSet("", tuple(paths), torch.zeros(len(paths), dtype=torch.int64).numpy(), ())
    return Loader(files, config, False, 0, device, images.loader, images.workers)


def _most_probable(paths, names, batches):
    done = iter(paths)
    with torch.inference_mode():
        for logits in batches:
            top = logits.softmax(dim=1).topk(min(5, len(names)))
            for probabilities, indices in zip(top.values.tolist(), top.indices.tolist()):
                yield next(done), [(names[i], p) for i, p in zip(indices, probabilities)]

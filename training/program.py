"""Exported files in use: `open_program` reads one, and `predict` names the classes of images.

A quantized .onnx file, and an .ort file that ONNX Runtime's tools made of one, keep the metadata and are read, too.
"""

import dataclasses
import importlib.util
import io
import json
import logging
import os
import pathlib
from collections.abc import Callable

import torch

from dataloader import Loader, read_image
from images.dataset import EXTENSIONS, ImageSet, evaluation_plan
from images.image_check import inspect
from settings.subjects import DataConfig
from space.weight_files import numbered_classes
from utils import UserError, log

SUFFIXES = {".pt2": "torch", ".onnx": "onnxruntime", ".ort": "onnxruntime"}  # and what runs such a file, in RUNTIMES
FORMS = ("without preprocessing", "with preprocessing")


@dataclasses.dataclass(frozen=True)
class Program:
    """An exported file: what it says about itself, and `run`, from uint8 RGB (N, H, W, 3) to logits (N, classes)."""

    path: str
    values: dict
    run: Callable

    @property
    def class_names(self):
        return tuple(self.values["classes"])

    @property
    def classes(self):
        """As of a Checkpoint: None for an official file, whose classes have no names."""
        names = self.class_names
        return None if names == numbered_classes(len(names)) else names

    @property
    def config(self):
        """The DataConfig that the metadata say."""
        size = self.values["preprocessing"]
        channels = {"BGR": "spos", "RGB": "imagenet"}[self.values["inside"]["channels"]]
        if "transparency" in size:  # the words of files from before
            alpha = size["transparency"].removeprefix("composited on ")
            size |= {"alpha": alpha, "exif": size["exif_orientation"].replace("applied", "apply")}
        return DataConfig(size["crop"], size["resize"], channels, alpha=size["alpha"], exif=size["exif"])

    def batches(self, images, settings):
        """(what `run` takes, labels) of an ImageSet; `settings` is an Images, which says how they are loaded."""
        if self.values["form"] == FORMS[1]:
            files = (os.path.join(images.root, path) for path in images.paths)
            labels = torch.from_numpy(images.labels).split(1)
            return ((read_image(file, self.config), label) for file, label in zip(files, labels))
        loader = Loader(images, self.config, False, 0, "cpu", settings.loader, settings.workers)
        return loader.decode(evaluation_plan(len(images), settings.eval_batch_size))


def is_program(path):
    """Whether a file is an exported program, by its name."""
    return pathlib.Path(path or "").suffix in SUFFIXES


def open_program(path):
    """The Program in an exported file. A .pt2 file can execute code: it has to be trusted.

    Raises UserError if it is missing or damaged, or the package that runs it is.
    """
    path = pathlib.Path(path)
    if SUFFIXES[path.suffix] == "onnxruntime" and importlib.util.find_spec("onnxruntime") is None:
        raise UserError(f"--checkpoint {path}: ONNX needs pip install onnxruntime")
    try:
        program = Program(str(path), *read(path, path.read_bytes()))
        if not all(type(name) is str for name in program.class_names) or program.values["form"] not in FORMS:
            raise ValueError("no metadata of this project")
        DataConfig.resolve({}, program.config)
    except OSError as error:
        raise UserError(f"--checkpoint {path}: {error.strerror}") from None
    except Exception as error:  # readers of damaged files raise any kind
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"--checkpoint {path}: not a program that scratch.py exported ({reason})") from None
    return program


def read(path, content):
    """(metadata, a function from images to logits) of the bytes of an exported file."""
    if path.suffix == ".pt2":
        logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # it logs the traceback of a damaged file
        extra = {"metadata.json": ""}
        run = torch.export.load(io.BytesIO(content), extra_files=extra).module()
        return json.loads(extra["metadata.json"]), run
    session = open_session(content)
    values = session.get_modelmeta().custom_metadata_map
    structured = values.keys() & {"preprocessing", "inside", "classes", "architecture", "flops", "params"}
    return values | {name: json.loads(values[name]) for name in structured}, runs(session)


def open_session(content):
    """The session of ONNX Runtime on a model's bytes, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def runs(session):
    """A function from a tensor, the session's only input, to its only output."""
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _files_in(folder):
    """The image files in a folder and those below it, but hidden ones, in order. Raises UserError if there are none."""
    named = (path for path in pathlib.Path(folder).rglob("*") if path.suffix.lower() in EXTENSIONS)
    found = sorted(str(p) for p in named if not any(n.startswith(".") for n in p.relative_to(folder).parts))
    if not found:
        raise UserError(f"--predict {folder}: no image in this folder")
    return found


def image_files(paths, config, settings):
    """The ImageSet of image files, or of all in folders, without labels, to be predicted as an Images says.

    Raises UserError that names the file, before anything is computed, where one is not an image.
    """
    if settings.loader == "synthetic":
        raise UserError("--loader synthetic: reads no files; leave it out with --predict")
    paths = [file for path in paths for file in (_files_in(path) if os.path.isdir(path) else [path])]
    for path in paths:
        found = inspect(path, settings.max_pixels, config)
        if found.reason:
            raise UserError(f"--predict {path}: {found.reason}")
        if found.turned and config.exif == "ignored":
            log.warning("warning: %s: has an EXIF orientation, which is ignored, as in training", path)
        if found.flat:
            log.warning("warning: %s: one colour on the ground of alpha: %s, as in training", path, config.alpha)
    return ImageSet("", tuple(paths), torch.zeros(len(paths), dtype=torch.int64).numpy(), ())


def predict(paths, names, forward, batches):
    """Yields (path, [(class name, probability), ...]) for each image, the five most probable classes first.

    `batches` have the images in the order of `paths`; `forward` returns the logits of one's images.
    """
    done = iter(paths)
    with torch.inference_mode():
        for images, _ in batches:
            top = forward(images).softmax(dim=1).topk(min(5, len(names)))
            for probabilities, indices in zip(top.values.tolist(), top.indices.tolist()):
                yield next(done), [(names[i], p) for i, p in zip(indices, probabilities)]

"""Export of the retrained network: one file with the program, the weights and what its user has to know.

The program takes images as decoders return them, uint8 RGB (N, H, W, 3), resized and cropped, any N, and returns logits
(N, classes). The channel order, the scale and the normalisation are inside the program, since nothing would notice a
mistake in them; it refuses another type or size. The metadata describe the preprocessing before and inside it.

FILE.pt2 is written by torch.export (metadata.json in its extra files), FILE.onnx by torch.onnx (metadata_props, a value
that is no text as JSON). A file is read back and compared with the network on bundled images before it gets its name.
"""

import importlib.util
import io
import json
import pathlib
import statistics
import time

import torch
from torch import nn

from dataloader import IMAGENET_MEAN, IMAGENET_STD, Loader, network_input
from images import bundled
from images.dataset import ImageSet, evaluation_plan, scan, stratified_order
from images.image_check import inspect
from utils import HERE, UserError, atomic_write, commit, log, versions

TOLERANCE = 1e-4  # of logits, absolute
N_IMAGES, BATCH_SIZE = 20, 7  # of the comparison: 7, 7 and 6 images
WARM_UP, TIMED = 10, 50  # runs of one image
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # torch.onnx needs the first two; the third runs the file


class Program(nn.Module):
    """What is exported: uint8 RGB (N, H, W, 3) -> logits (N, classes)."""

    def __init__(self, network, preprocessing):
        super().__init__()
        self.network, self.preprocessing = network, preprocessing

    def forward(self, images):
        return self.network(network_input(images, self.preprocessing))


def metadata(model, ckpt, config):
    """All that the file says about itself, by name; plain values."""
    space = model.space
    candidate = model.architecture
    size = config.input_size
    spos = config.preprocessing == "spos"
    return {
        "model": "one path of the Single Path One-Shot supernet (arXiv 1904.00420), retrained",
        "input": f"images: uint8 (N, {size}, {size}, 3), RGB from 0 to 255, any N",
        "output": "logits: float32 (N, classes); their softmax is the probabilities",
        "preprocessing": {  # what the user does
            "resize": config.val_resize, "resize_what": "shorter side, px",
            "interpolation": "bilinear, not antialiased", "crop": size, "crop_where": "centre",
            "transparency": "dropped" if config.alpha == "dropped" else f"composited on {config.alpha}",
            "exif_orientation": "applied" if config.exif == "apply" else "ignored",
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


def export(path, model, ckpt, config):
    """Writes the network to `path`, .pt2 or .onnx; returns the largest difference of its logits and its latency.

    Raises UserError if the suffix is another, a package is missing, the file can't be written or its logits differ.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".pt2", ".onnx"):
        raise UserError(f"--export {path}: ends in neither .pt2 (torch.export) nor .onnx")
    missing = [name for name in ONNX_PACKAGES if path.suffix == ".onnx" and importlib.util.find_spec(name) is None]
    if missing:
        install = f"ONNX needs pip install {' '.join(missing)}; a file named .pt2 needs nothing more"
        raise UserError(f"--export {path}: {install}")
    model.to("cpu").eval()
    example = torch.zeros(2, config.input_size, config.input_size, 3, dtype=torch.uint8)
    batch = {"images": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.export.export(Program(model, config.preprocessing), (example,), dynamic_shapes=batch)
    content, run = (_torch_export if path.suffix == ".pt2" else _onnx)(program, metadata(model, ckpt, config))
    difference = compare(run, model, config)
    if not difference <= TOLERANCE:
        largest = f"its logits differ from the network's by {difference:.2g}, over {TOLERANCE}"
        raise UserError(f"--export {path}: not written, since {largest}")
    try:
        with atomic_write(path, "wb") as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"--export {path}: can't be written ({error.strerror})") from None
    return {
        "file": str(path), "bytes": len(content), "max_difference": difference, "n_images": N_IMAGES,
        "latency_ms": latency(run, example[:1]), "threads": torch.get_num_threads(), "runs": TIMED,
    }  # fmt: skip


def _torch_export(program, values):
    """(the bytes of a .pt2 file, what runs it)."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(values, indent=1)})
    content = file.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module()


def _onnx(program, values):
    """(the bytes of an .onnx file, what runs it)."""
    import onnx
    import onnxruntime

    names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": {"images": {0: "batch"}}}
    model = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
    onnx.helper.set_model_props(model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()})
    content = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def compare(run, model, config):
    """The largest difference between the logits of `run(images)` and of the network, on bundled images."""
    images = scan(bundled.unpack(HERE / "data" / "fashion-mnist") / "val")
    images = images.take(stratified_order(images.labels, 0)[:N_IMAGES])
    loader = Loader(images, config, False, backend="torchvision", workers=0)
    differences = []
    with torch.no_grad():
        for decoded, _ in loader.decode(evaluation_plan(len(images), BATCH_SIZE)):
            differences.append((run(decoded) - model(loader.finish(decoded))).abs().max().item())
    return max(differences)


def latency(run, image):
    """Median milliseconds of `run(image)`."""
    seconds = []
    with torch.no_grad():
        for _ in range(WARM_UP + TIMED):
            start = time.perf_counter()
            run(image)
            seconds.append(time.perf_counter() - start)
    return round(statistics.median(seconds[WARM_UP:]) * 1000, 3)


def predict(paths, model, ckpt, config, images, device):
    """Yields (path, [(class name, probability), ...]) for each image file, the five most probable classes first.

    `images` is an Images, which says how they are loaded. Raises UserError that names the file, before anything is
    computed, where one is not an image.
    """
    if images.loader == "synthetic":
        raise UserError("--loader synthetic: reads no files; leave the flag out with --predict")
    for path in paths:
        found = inspect(path, images.max_pixels)
        if found.reason:
            raise UserError(f"--predict {path}: {found.reason}")
        if found.turned and config.exif == "ignored":
            log.warning("warning: %s: has an EXIF orientation, which is ignored, as in training", path)
    names = ckpt.class_names
    files = ImageSet("", tuple(paths), torch.zeros(len(paths), dtype=torch.int64).numpy(), tuple(names))
    model.to(device, memory_format=torch.channels_last).eval()
    loader = Loader(files, config, False, 0, device, images.loader, images.workers)
    done = iter(paths)
    with torch.inference_mode():
        for batch, _ in loader.batches(evaluation_plan(len(paths), images.eval_batch_size)):
            top = model(batch).softmax(dim=1).topk(min(5, len(names)))
            for probabilities, indices in zip(top.values.tolist(), top.indices.tolist()):
                yield next(done), [(names[i], p) for i, p in zip(indices, probabilities)]

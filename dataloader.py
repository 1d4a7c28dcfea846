"""Loaders: DALI, torchvision, images in memory, synthetic ones, and those given in Python, behind one signature.

Every loader decodes the batches of a plan (images/dataset.py) to uint8 RGB (N, H, W, 3), with the parameters of
images/augmentation.py; `finish` turns them into the network's input: float BGR (N, 3, H, W) in [0, 255] (official), or
RGB normalised by ImageNet's mean and standard deviation.

    python dataloader.py --check DIR    lists all files of DIR/{train,val}/<class>/ that are unreadable or mislabelled,
                                        and with --config what does not go with its settings, such as groups of
                                        images that train and val share

Source: official `src/Supernet/train.py` (transforms).
"""

import utils  # first, so that Ctrl-C while torch is imported prints one line

# isort: split
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import os
import re
import typing

import numpy as np
import torch

from images import pictures
from images.augmentation import SYNTHETIC, draw_augmentation, validation_geometry
from images.dataset import ImageSet
from images.in_memory import SMALL_PX, InMemory, augmented, gigabytes
from images.preprocessing import is_thin, network_input, resized
from images.tree_check import check_tree
from images.workers import Batches, made_by_workers
from settings.command_line import Parser
from settings.subjects import DataConfig, Images, Run
from utils import UserError, cores, local_world_size

MAX_WORKERS = 8  # by default
DALI_CAUSE = re.compile(r"\[/\S+:\d+\] ([^\[\n]+)$", re.M)  # the cause, in the text of an error of DALI


def resolve_backend(backend):
    """The backend of --loader: "dali", "torchvision", "memory" or "synthetic". Raises UserError without DALI."""
    installed = bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))
    if backend == "dali" and not installed:
        raise UserError("--loader dali: DALI is not installed; pip install -r requirements.txt, or leave it out")
    if backend == "auto":
        return "dali" if installed else "torchvision"
    return backend


class Loader:
    """Loads the batches of a plan: images (N, 3, H, W) float, labels (N,) int64, on the device.

    Applies the training transform if `augment`, else the validation transform. `backend` is "auto", "dali",
    "torchvision", "memory" or "synthetic". With "memory", which has no workers, at most `memory_gb` gigabytes of
    decoded images are in the folder `cache`, or without it in this process. Raises UserError that names the file if an
    image can't be decoded.
    """

    def __init__(self, images, config, augment, seed=0, device="cpu", backend="auto", workers=None, cache=None,
                 memory_gb=Images.memory_gb):  # fmt: skip
        self.images = images
        self.config = config
        self.augment = augment
        self.seed = seed
        self.device = torch.device(device)
        self.backend = resolve_backend(backend)
        self.workers = min(MAX_WORKERS, max(1, cores() // local_world_size())) if workers is None else workers
        self.workers = 0 if self.backend == "memory" else self.workers
        self.cache = cache
        self.memory_gb = memory_gb

    @property
    def decoder(self):
        """The libraries and versions that decode, and for DALI the device: pixels depend on them."""
        if self.backend == "synthetic":
            return self.backend
        pillow = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torchvision", "pillow"))
        if self.backend in ("torchvision", "memory"):
            return f"{pillow}, in memory" if self.backend == "memory" and self.augment else pillow
        found = [d for d in importlib.metadata.distributions() if d.name.startswith("nvidia-dali-")]
        dali = " ".join(sorted(f"{d.name} {d.version}" for d in found)) + f" {self.device.type}"
        by_dali = tuple(suffix for kind in pictures.BY_DALI for suffix in pictures.SUFFIXES[kind])
        return dali if all(path.lower().endswith(by_dali) for path in self.images.paths) else f"{dali}, {pillow}"

    def batches(self, plan):
        for images, labels in self.decode(plan):
            yield self.finish(images), labels

    def decode(self, plan):
        """Like `batches`, with images as uint8 RGB (N, H, W, 3)."""
        backends = {"dali": self._dali, "torchvision": self._torchvision, "memory": self._memory,
                    "synthetic": self._synthetic}  # fmt: skip
        for images, samples in backends[self.backend](iter(plan)):
            utils.heartbeat()
            labels = torch.from_numpy(self.images.labels[samples[:, 1]])
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def finish(self, images):
        """uint8 RGB (N, H, W, 3) -> the network's input, float (N, 3, H, W), channels-last in memory."""
        return network_input(images.to(self.device, non_blocking=True), self.config.preprocessing)

    def _synthetic(self, plan):
        shape = (self.config.input_size, self.config.input_size, 3)
        for samples in plan:
            rng = np.random.default_rng([self.seed, SYNTHETIC, *samples[0].tolist()])
            yield torch.from_numpy(rng.integers(0, 256, (len(samples), *shape), np.uint8)), samples

    def _torchvision(self, plan):
        dataset = _TorchvisionImages(self.images, self.config, self.augment, self.seed)
        return made_by_workers(dataset, plan, self.workers, pin_memory=self.device.type == "cuda")

    def _memory(self, plan):
        if not self.augment:  # each image once, and cached as it is
            yield from self._torchvision(plan)
            return
        memory = self._in_memory  # here: at exit, Ctrl-C would wait for a thread that decodes
        # "cuda" is the current GPU of a thread; the thread that makes batches has to use this one's.
        device = torch.empty(0, device=self.device).device

        def made(samples):
            sizes = memory.sizes[samples[:, 1]].tolist()
            drawn = [draw_augmentation(self.config, self.seed, *s, *size) for s, size in zip(samples.tolist(), sizes)]
            return augmented(memory, samples[:, 1], drawn, self.config, device), samples

        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # makes the next batch while this one is used
            ahead = None
            for samples in itertools.chain(plan, [None]):
                batch = ahead
                ahead = None if samples is None else pool.submit(made, samples)
                if batch:
                    yield batch.result()

    @functools.cached_property
    def _in_memory(self):
        images, config = self.images, self.config

        def read(index):
            image = _decode(os.path.join(images.root, images.paths[index]), config)
            return _cropped(image, config) if config.crop_padding else np.asarray(image)

        return InMemory(images, config, self.decoder, read, self.device, self.cache, self.memory_gb)

    def advice(self):
        """A line where the images are small, would fit in memory, and are not there; or None."""
        if self.backend not in ("dali", "torchvision") or self.config.input_size > SMALL_PX:
            return None
        taken = gigabytes(self.images, self.config, headers=64)
        return f"--loader memory would load these images faster: {taken:.2g} GB" if taken <= self.memory_gb else None

    def _dali(self, plan):
        dataset = _EncodedImages(self.images, self.config, self.augment, self.seed)
        batches = made_by_workers(dataset, plan, self.workers)
        first = next(batches, None)  # before DALI has threads: they would not survive a fork of the workers
        if first is None:
            return
        names = [name for name in first[0] if name != "ends"]  # the pipeline's inputs
        sent = []  # the samples of the batches in the pipeline, in order

        def inputs():
            """Yields the inputs of the pipeline, batch by batch."""
            for values, samples in itertools.chain([first], batches):
                sent.append(samples)
                files = np.split(values["encoded"].numpy(), values["ends"][:-1])
                yield files, *(values[name] for name in names[1:])

        with contextlib.closing(batches):
            pipeline = self._dali_pipeline(inputs(), names, len(first[1]))
            pipeline.build()
            while True:
                try:
                    (output,) = pipeline.run()
                except StopIteration:
                    return
                except RuntimeError as error:
                    raise UserError(self._culprit(np.concatenate(sent), str(error))) from None
                samples = sent.pop(0)
                yield self._dali_tensor(output, len(samples)), samples

    def _dali_pipeline(self, inputs, names, batch_size):
        """Decode, resize and crop, and in training shift, color_twist and flip.

        `inputs` yields those of each batch; `names` says which `_EncodedImages` has made.
        """
        import nvidia.dali
        from nvidia.dali import fn, pipeline_def, types

        size = self.config.input_size
        gpu = self.device.type == "cuda"
        decoder = {"device": "mixed" if gpu else "cpu", "output_type": types.RGB}
        if int(nvidia.dali.__version__.split(".")[0]) >= 2:
            decoder["adjust_orientation"] = False  # ignores EXIF, like DALI 1, torchvision and the official code
        bilinear = {"interp_type": types.INTERP_LINEAR}

        def validation(encoded, shape, corner):
            images = fn.decoders.image(encoded, **decoder)
            images = fn.resize(images, size=shape, antialias=False, subpixel_scale=False, **bilinear)
            return fn.crop(images, crop=(size, size), crop_pos_y=corner[0], crop_pos_x=corner[1], rounding="round")

        def resized_crop(encoded, shape, corner):
            window = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
            images = fn.decoders.image_slice(encoded, corner, shape, **window, **decoder)
            return fn.resize(images, resize_x=size, resize_y=size, antialias=True, **bilinear)

        def shifted(images, shift):
            border = {"out_of_bounds_policy": "pad", "fill_values": 0}
            return fn.slice(images, start=shift, shape=(size, size), axis_names="HW", **border)

        def training(encoded, shape, corner, shift=None, horizontal_flip=None, **jitter):
            if shift is None:
                images = resized_crop(encoded, shape, corner)
            else:
                images = shifted(validation(encoded, shape, corner), shift)
            if jitter:
                images = fn.color_twist(images, **jitter)
            return images if horizontal_flip is None else fn.flip(images, horizontal=horizontal_flip)

        def operators():
            outputs = fn.external_source(inputs, num_outputs=len(names), batch=True)
            return (training if self.augment else validation)(**dict(zip(names, outputs)))

        return pipeline_def(operators)(
            batch_size=batch_size,
            num_threads=max(1, self.workers),
            device_id=torch.cuda.current_device() if gpu else None,
            prefetch_queue_depth=2,
        )

    def _dali_tensor(self, output, n):
        shape = (n, self.config.input_size, self.config.input_size, 3)
        if self.device.type == "cpu":
            return torch.from_numpy(np.array(output.as_tensor())).view(shape)
        from nvidia.dali.plugin.pytorch import feed_ndarray

        images = torch.empty(shape, dtype=torch.uint8, device=self.device)
        return feed_ndarray(output.as_tensor(), images, cuda_stream=torch.cuda.current_stream(self.device))

    def _culprit(self, samples, error):
        """A line that names the file of which DALI raised the error, since DALI names none."""
        paths = [os.path.join(self.images.root, self.images.paths[index]) for index in samples[:, 1]]
        for path in paths:
            try:
                _decode(path, self.config)
            except UserError as undecodable:
                return str(undecodable)
        cause = (DALI_CAUSE.findall(error) or error.splitlines())[0]
        if len(samples) == 1:
            return f"{paths[0]}: DALI can't decode it ({cause}); replace it, or use --loader torchvision"
        alone = Loader(self.images, self.config, self.augment, self.seed, self.device, "dali", workers=0)
        for sample in samples:
            try:
                list(alone.decode([sample[None]]))
            except UserError as undecodable:
                return str(undecodable)
        return f"DALI: {cause}"


def _decode(path, config):
    """The picture in a file that a DataConfig asks for, decoded, in RGB. Raises UserError that names the file."""
    with pictures.named(path), pictures.open_image(path) as image:
        return pictures.rgb(image, config)


def _cropped(image, config, window=None):
    """A PIL image as uint8 (S, S, 3), S the input size: the window of an augmentation, or as in validation."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    if window:
        return F.resized_crop(image, *window, [config.input_size] * 2, InterpolationMode.BILINEAR)
    return resized(F.pil_to_tensor(image), config).permute(1, 2, 0).numpy()


def read_image(path, config):
    """The whole image of a file as `_decode` gives it, uint8 (1, H, W, 3)."""
    return torch.from_numpy(np.array(_decode(path, config)))[None]


@dataclasses.dataclass
class _Images(Batches):
    """Makes batches of the images of an ImageSet."""

    images: ImageSet
    config: DataConfig
    augment: bool
    seed: int


class _EncodedImages(_Images):
    """Makes the inputs of DALI, name -> values of the images: their transforms, and their files in one tensor."""

    def _make(self, samples):
        columns = {}
        for epoch, index in samples:
            for name, value in self._row(epoch, index).items():
                columns.setdefault(name, []).append(value)
        files = columns["encoded"]
        return columns | {
            "encoded": torch.from_numpy(np.concatenate(files)),
            "ends": np.cumsum([len(f) for f in files]),
        }

    def _row(self, epoch, index):
        path = os.path.join(self.images.root, self.images.paths[index])
        size = self.config.input_size
        with pictures.named(path):
            encoded = np.fromfile(path, np.uint8)
            with pictures.open_image(io.BytesIO(encoded)) as image:
                dali = pictures.is_for_dali(image, self.config) and not is_thin(self.config, image.height, image.width)
                if not dali:
                    image = pictures.rgb(image, self.config)
        width, height = image.size
        a = draw_augmentation(self.config, self.seed, epoch, index, height, width) if self.augment else None
        window = a.window if a else None
        if window:
            corner = window[:2]
            shape = window[2:]
        else:
            shape, corner = validation_geometry(self.config, height, width)
        if not dali:  # a small file, of which the pipeline's crop and resize change nothing
            encoded = pictures.as_ppm(_cropped(image, self.config, window))
            corner = (0, 0)
            shape = (size, size)
        if not window:  # DALI takes the corner as a share of the margin
            corner = [c / (s - size) if s > size else 0.0 for c, s in zip(corner, shape)]
        kind = np.int32 if window else np.float32
        row = {"encoded": encoded, "corner": np.array(corner, kind), "shape": np.array(shape, kind)}
        if a and a.shift:
            row["shift"] = np.array(a.shift, np.int32)
        if a and self.config.jitter:
            row |= {name: np.float32(getattr(a, name)) for name in ("brightness", "contrast", "saturation")}
        if a and self.config.mirror:
            row["horizontal_flip"] = np.int32(a.horizontal_flip)
        return row


class _TorchvisionImages(_Images):
    """Makes decoded and transformed images, uint8 (N, H, W, 3)."""

    def _make(self, samples):
        return torch.from_numpy(np.stack([self._image(epoch, index) for epoch, index in samples]))

    def _image(self, epoch, index):
        from torchvision.transforms.v2 import functional as F

        image = _decode(os.path.join(self.images.root, self.images.paths[index]), self.config)
        if not self.augment:
            return _cropped(image, self.config)
        a = draw_augmentation(self.config, self.seed, epoch, index, image.height, image.width)
        image = _cropped(image, self.config, a.window)
        if a.shift:
            top, left = a.shift
            size = self.config.input_size
            image = F.to_pil_image(image).crop((left, top, left + size, top + size))  # black beyond the image
        if self.config.jitter:
            image = F.adjust_brightness(image, a.brightness)
            image = F.adjust_contrast(image, a.contrast)
            image = F.adjust_saturation(image, a.saturation)
        return np.asarray(F.horizontal_flip(image) if a.horizontal_flip else image)


# --- images given in Python ----------------------------------------------------------------------------------


class Given:
    """A loader of images that a program gives. What `train`, `calibration_batches` and `evaluate` ask of a loader:

        images          has a length and `labels`, an int array (N,), by which calibration images are chosen
        batches(plan)   yields images (N, 3, H, W), float, and labels (N,), or as probabilities (N, classes), on the
                        device, for each batch of a plan: an int array (N, 2) of epoch and index of the image

    `make(plan)` yields images and labels. A run resumes exactly if they are a function of epoch and index.
    """

    def __init__(self, make, labels, device="cpu"):
        self.make = make
        self.labels = labels  # called once, because it may read all images
        self.device = torch.device(device)

    @functools.cached_property
    def images(self):
        labels = np.asarray(self.labels(), np.int64)
        return ImageSet(None, range(len(labels)), labels, ())

    def batches(self, plan):
        for images, labels in self.make(plan):
            utils.heartbeat()
            images = images.to(self.device, torch.float32, memory_format=torch.channels_last, non_blocking=True)
            yield images, labels.to(self.device, non_blocking=True)


def from_tensors(images, labels, augment=None, device="cpu"):
    """A loader of images (N, channels, H, W) and labels (N,) that are in memory, on any device.

    `augment(images, samples)` returns the batch as it is trained on, for samples (n, 2) of epoch and index: an array.
    """

    def make(plan):
        for samples in plan:
            rows = torch.from_numpy(samples[:, 1]).to(images.device)
            batch = images[rows]
            yield augment(batch, samples) if augment else batch, labels[rows.to(labels.device)]

    return Given(make, lambda: labels.cpu().numpy(), device)


def from_dataset(dataset, workers=0, augment=None, device="cpu"):
    """A loader of a map-style Dataset, whose items are an image (3, H, W) and a label, made by `workers` processes.

    `augment(image, epoch, index)` returns the image as it is trained on; it has to draw by epoch and index alone. The
    labels are those of `dataset.targets`, if it has them, else every item is read once.
    """

    def make(plan):
        items = _Items(dataset, augment)
        return (made for made, _ in made_by_workers(items, plan, workers, torch.device(device).type == "cuda"))

    def labels():
        known = getattr(dataset, "targets", None)
        if known is not None and len(known) != len(dataset):
            raise UserError(f"the data set has {len(dataset)} items, but {len(known)} targets")
        return [int(dataset[i][1]) for i in range(len(dataset))] if known is None else known

    return Given(make, labels, device)


@dataclasses.dataclass
class _Items(Batches):
    """Makes batches of a Dataset's items."""

    dataset: torch.utils.data.Dataset
    augment: typing.Callable | None

    def _make(self, samples):
        items = []
        for epoch, index in samples.tolist():
            image, label = self.dataset[index]
            items.append((self.augment(image, epoch, index) if self.augment else image, label))
        return torch.utils.data.default_collate(items)


# --- python dataloader.py --check DIR ------------------------------------------------------------------------


def make_parser():
    parser = Parser(__doc__, "dataloader")
    text = "a folder with train/<class>/ and val/<class>/"
    parser.add_argument("--check", type=os.path.expanduser, metavar="DIR", help=text)
    parser.add_argument(
        "--accept", action="store_true", help="accept the mislabelled files, so that training can start"
    )
    parser.add(Run, only=("config",))
    parser.add(Images, only=("cache", "max_pixels"))
    parser.add(DataConfig, defaults=DataConfig.unset())
    return parser


def parse_args(argv=None):
    parser = make_parser()
    parsed = parser.parse(argv)
    if not parsed.check:
        parser.error("--check: name a folder with train/<class>/ and val/<class>/")
    return parsed


def main(parsed):
    check_tree(parsed.check, parsed.cache, parsed.accept, parsed.max_pixels, DataConfig.given(vars(parsed)))


if __name__ == "__main__":
    utils.run_script(main, parse_args)

"""Images in memory, for `--loader memory`: decoded once, then augmented a batch at a time by tensor operations.

The pixels are those of torchvision's transforms of PIL images, by Pillow's arithmetic in whole numbers, which float64
has exactly, on every device. Crops have their columns resized before their rows, as Pillow has it, but for windows that
version 13 makes lower by more than narrower: there values differ by 1.

Augmentation begins with decoded originals, or with validation's crops where it shifts those. Their pixels are one array
in a file that all processes and ranks map, or in the memory of a GPU where they fit in a tenth of it.
"""

import functools
import hashlib
import io
import json
import math
import os
import pathlib

import numpy as np
import torch
import torch.nn.functional as F

from images import pictures
from images.image_cache import files_hash, written_once
from utils import UserError, heartbeat, log

VERSION = 1  # files of another version have other names, and may be deleted
SMALL_PX = 64  # inputs up to this side are loaded faster from memory on a CPU, too (docs/data.md)
AT_A_TIME = 2**22  # pixels of windows that are resized at a time, which take 24 bytes each


def gigabytes(images, config, headers=None):
    """What the images of an ImageSet take in memory, by the headers of all of them, or of so many for an estimate."""
    n = len(images)
    if config.crop_padding:
        return 3e-9 * n * config.input_size**2
    indices = range(0, n, 1 if headers is None else max(1, n // headers))
    pixels = 0
    for index in indices:
        heartbeat()
        path = os.path.join(images.root, images.paths[index])
        with pictures.named(path), pictures.open_image(path) as image:
            pixels += math.prod(image.size)
    return 3e-9 * n * pixels / len(indices)


class InMemory:
    """What augmentation begins with, of all images of an ImageSet: `pixels` (P,), uint8, and `sizes` (N, 2), in px.

    `read(index)` decodes an image to RGB (H, W, 3). `decoder` names what decodes. In the folder `cache` there is a file
    of the pixels, zeros as many as the widest row has, and sizes; without a folder that can be written they are in the
    memory of this process. Raises UserError if they take more than `most` gigabytes.
    """

    def __init__(self, images, config, decoder, read, device, cache, most):
        self.read = read
        self.n = len(images)
        path = cache and pathlib.Path(cache) / f"{_name(images, config, decoder)}.originals"
        found = path and self._is_complete(path)
        taken = path.stat().st_size / 1e9 if found else gigabytes(images, config)
        if taken > most:
            raise UserError(
                f"--loader memory: {self.n} images take {taken:.3g} GB decoded, of --memory-gb {most:g} at most; "
                "give more, or --loader torchvision"
            )
        data = self._mapped(path)
        self.sizes = self._sizes(data)
        self.starts = np.cumsum(3 * self.sizes.prod(axis=1)) - 3 * self.sizes.prod(axis=1)
        self.pixels = torch.from_numpy(data)
        if device.type == "cuda" and data.nbytes <= torch.cuda.get_device_properties(device).total_memory / 10:
            self.pixels = self.pixels.to(device)

    def _mapped(self, path):
        if path:
            try:
                written_once(path, functools.partial(self._is_complete, path), self._write)
                return np.memmap(path, np.uint8, "c")  # copy on write, since torch warns of arrays that are read-only
            except OSError as error:
                text = "--cache %s: can't cache decoded images there (%s); this process keeps them in its memory"
                log.warning(text, path.parent, error.strerror or error)
        file = io.BytesIO()
        self._write(file)
        return np.frombuffer(file.getbuffer(), np.uint8)

    def _write(self, file):
        log.info("decoding %d images, once", self.n)
        sizes = np.empty((self.n, 2), np.int32)
        for index in range(self.n):
            heartbeat()
            picture = self.read(index)
            sizes[index] = picture.shape[:2]
            file.write(picture.tobytes())
        file.write(bytes(3 * int(sizes[:, 1].max())))
        file.write(sizes.tobytes())

    def _sizes(self, data):
        return np.frombuffer(data[-8 * self.n :].tobytes(), np.int32).reshape(self.n, 2).astype(np.int64)

    def _is_complete(self, path):
        length = path.stat().st_size if path.exists() else 0
        if length < 8 * self.n:
            return False
        sizes = self._sizes(np.memmap(path, np.uint8, "r"))
        return length == 3 * sizes.prod(axis=1, dtype=float).sum() + 3.0 * sizes[:, 1].max() + 8 * self.n

    def runs(self, starts, length):
        """`length` pixels behind each other from each of `starts` (n, H), in bytes: (n, H, 3 * length)."""
        return self.pixels.unfold(0, 3 * length, 1)[_sent(starts, self.pixels.device)]


def _sent(array, device):
    """An array or a tensor on the device, which is not waited for."""
    return torch.as_tensor(array).to(device, non_blocking=True)


def _name(images, config, decoder):
    """A hash of all that the pixels depend on."""
    names = ("input_size", "val_resize") if config.crop_padding else ()
    begins = {name: getattr(config, name) for name in ("alpha", "exif", *names)}
    content = {"version": VERSION, "files": files_hash(images, range(len(images))), "decoder": decoder, **begins}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


# --- augmentation of a batch ---------------------------------------------------------------------------------


def augmented(memory, rows, drawn, config, device):
    """Images `rows` (n,) of an InMemory as their Augmentations `drawn` say: uint8 (n, S, S, 3) on the device."""
    flips = np.array([a.horizontal_flip for a in drawn], bool)
    if config.crop_padding:
        images = _shifted(memory, rows, np.array([a.shift for a in drawn]), flips, config, device)
    else:
        images = _resized_crops(memory, rows, np.array([a.window for a in drawn]), flips, config.input_size, device)
    if not config.jitter:
        return images
    factors = np.float32([(a.brightness, a.contrast, a.saturation) for a in drawn])
    return jittered(images, *_sent(factors, device).T)


def _shifted(memory, rows, shifts, flips, config, device):
    n, size, border = len(rows), config.input_size, config.crop_padding
    side = size + 2 * border
    whole = _sent(memory.runs(memory.starts[rows, None], size * size), device).view(n, size, size, 3)
    padded = F.pad(whole, (0, 0, border, border, border, border)).flatten()
    lines = np.arange(n)[:, None] * side + shifts[:, :1] + border + np.arange(size)
    starts = _sent(3 * (lines * side + shifts[:, 1:] + border), device)
    images = padded.unfold(0, 3 * size, 1)[starts].view(n, size, size, 3)
    flipped = _sent(flips.nonzero()[0], device)
    images[flipped] = images[flipped].flip(2)
    return images


def _resized_crops(memory, rows, windows, flips, size, device):
    n, (height, width) = len(rows), windows[:, 2:].max(axis=0)
    step = max(1, AT_A_TIME // (height * width))
    if n > step:
        parts = (slice(i, i + step) for i in range(0, n, step))
        return torch.cat([_resized_crops(memory, rows[p], windows[p], flips[p], size, device) for p in parts])
    top, left, heights, widths = windows.T
    lines = top[:, None] + np.arange(height).clip(max=heights[:, None] - 1)
    starts = memory.starts[rows, None] + 3 * (lines * memory.sizes[rows, 1:] + left[:, None])
    images = _sent(memory.runs(starts, width), device).view(n, height, width, 3)
    # Each side becomes `size` pixels and is rounded, the columns first.
    of_columns = _weights(np.where(flips, -widths, widths), width, size, device)
    images = torch.bmm(of_columns, images.transpose(1, 2).double().flatten(2)).add_(0.5).floor_()  # (n, S, H * 3)
    images = images.view(n, size, height, 3).transpose(1, 2).flatten(2)
    images = torch.bmm(_weights(heights, height, size, device), images).add_(0.5)  # (n, S, S * 3)
    return images.to(torch.uint8).view(n, size, size, 3)


def _weights(lengths, longest, size, device):
    """The weights (n, size, longest) by which n rows of pixels become `size` pixels, in reversed order where the length
    is negative. Source: bilinear resizing with antialiasing in Pillow's src/libImaging/Resample.c, with its 22 bits.
    """
    lengths, which = np.unique(lengths, return_inverse=True)  # few of small images
    lengths = lengths[:, None, None]
    places = np.arange(size)[:, None]
    places = np.where(lengths < 0, size - 1 - places, places)
    scale = np.abs(lengths) / size
    pixels = np.arange(longest)
    distance = (pixels - (places + 0.5) * scale + 0.5) * (1 / np.maximum(scale, 1))
    weights = np.maximum(1 - np.abs(distance), 0) * (pixels < np.abs(lengths))
    weights = np.floor(weights / weights.sum(axis=2, keepdims=True) * 2**22 + 0.5) / 2**22
    return _sent(weights, device)[_sent(which, device)]


def jittered(images, brightness, contrast, saturation):
    """uint8 RGB (n, H, W, 3) with factors (n,), as Pillow's ImageEnhance computes them, which truncates after each."""
    images = images.float()
    images = _blend(torch.zeros_like(images[..., :1]), images, brightness)
    mean = (_grey(images).mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64) + 0.5).floor().float()
    images = _blend(mean, images, contrast)
    return _blend(_grey(images), images, saturation).to(torch.uint8)


def _blend(ground, images, factor):
    return (ground + factor[:, None, None, None] * (images - ground)).clamp_(0, 255).floor_()


def _grey(images):
    red, green, blue = images.int().split(1, dim=3)
    return ((19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16).float()

"""How each image is transformed in training and validation: numbers alone, nothing is decoded here.

They are pure functions of seed, epoch and image index, so they do not depend on loader, worker, rank or resuming.
Source: official `src/Supernet/train.py` (transforms).
"""

import dataclasses
import math

import numpy as np

ORDER, AUGMENT, CALIBRATE, SYNTHETIC, HOLD_OUT = range(5)  # separate random streams of a seed


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Parameters of one image: crop window in px (top, left, height, width), jitter factors, horizontal flip.

    Without a window, validation's crop is shifted by (rows, columns) of `shift`, in px.
    """

    window: tuple | None
    shift: tuple | None = None
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    horizontal_flip: bool = False


def draw_augmentation(config, seed, epoch, index, height, width):
    """The training augmentation of one image: random resized crop or, with crop_padding, a shift; jitter, flip.

    Source: torchvision's RandomResizedCrop, RandomCrop and ColorJitter; the official transforms use the first and the
    last. The random numbers are our own.
    """
    words = [seed, AUGMENT, int(epoch), int(index)]
    if seed < 2**32:
        words = np.array(words, np.uint32)  # the same generator, made in two thirds of the time
    u = np.random.default_rng(words).random(26).tolist()
    factors = (1 + config.jitter * (2 * v - 1) for v in u[22:25])
    flip = config.mirror and u[25] < 0.5
    if padding := config.crop_padding:
        shift = tuple(int(v * (2 * padding + 1)) - padding for v in u[20:22])
        return Augmentation(None, shift, *factors, flip)
    return Augmentation(_resized_crop(config, u, height, width), None, *factors, flip)


def _resized_crop(config, u, height, width):
    """The window (top, left, height, width) of a random resized crop: ten tries, then the centre."""
    low, high = config.crop_scale
    ratio_low, ratio_high = (math.log(r) for r in config.crop_ratio)
    for i in range(10):
        area = height * width * (low + u[2 * i] * (high - low))
        ratio = math.exp(ratio_low + u[2 * i + 1] * (ratio_high - ratio_low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    # the largest window of an allowed ratio, from the centre
    w = min(width, max(1, round(height * math.exp(ratio_high))))
    h = min(height, max(1, round(width / math.exp(ratio_low))))
    return (height - h) // 2, (width - w) // 2, h, w


def resize_and_crop(sides, resize, crop, arrays=np):
    """The official validation transform: (the sides to resize to, the corner of the centre crop), in px.

    The shorter side becomes `resize`, the other is rounded by int(x + 0.5); the corner is rounded to even, as in
    torchvision. `sides` (2,) and `resize` are float64, of NumPy or, with `arrays=torch`, of an exported program. There
    a number would be multiplied by the reciprocal, which rounds once more.
    """
    size = arrays.floor(sides * (resize / sides.min()) + 0.5)
    return size, arrays.round((size - crop) / 2)


def validation_geometry(config, height, width):
    """`resize_and_crop` of a DataConfig and whole numbers, in whole numbers."""
    found = resize_and_crop(np.array([height, width], float), np.float64(config.val_resize), config.input_size)
    return tuple(tuple(map(int, pair)) for pair in found)

"""From images as decoders return them, uint8 RGB, to the network's input, as in training and validation."""

import numpy as np
import torch
from PIL import Image

from images import pictures
from images.augmentation import resize_and_crop, validation_geometry
from utils import UserError

MOST_PIXELS = 50_000_000  # in a resized image
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network_input(images, preprocessing):
    """uint8 RGB (N, H, W, 3) -> float (N, 3, H, W), channels-last in memory."""
    return scaled(images.permute(0, 3, 1, 2), preprocessing)


def scaled(images, preprocessing):
    """RGB from 0 to 255 (N, 3, H, W) -> float: BGR in [0, 255] for "spos", normalised RGB for "imagenet"."""
    if preprocessing == "spos":
        return images.flip(1).float()
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def preprocess(images, config):
    """uint8 RGB (N, H, W, 3) -> the network's input (N, 3, input_size, input_size), float, as in validation.

    Resizes the shorter side, crops the centre, and applies the preprocessing of the DataConfig `config`. A PIL image as
    it was opened, in place of a tensor, is one image: its transparency and orientation are treated as in training, too.
    Raises UserError if the images have another type or shape.
    """
    if isinstance(images, Image.Image):
        images = torch.from_numpy(np.array(pictures.rgb(images, config)))[None]
    if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8 or images.shape[3:] != (3,):
        found = type(images).__name__
        if hasattr(images, "dtype"):
            found += f" of {images.dtype} {tuple(images.shape)}"
        expected = "a uint8 tensor (N, H, W, 3), RGB from 0 to 255, nor a PIL image"
        raise UserError(f"images are a {found}, not {expected}")
    return scaled(resized(images.permute(0, 3, 1, 2), config), config.preprocessing)


def is_thin(config, height, width):
    """Whether an image is so long that, resized as in validation, it would fill the memory; then only the crop is."""
    return config.val_resize**2 * max(height, width) > MOST_PIXELS * min(height, width)


def resized(images, config):
    """uint8 (..., 3, H, W) -> (..., 3, input_size, input_size), resized and cropped as in validation."""
    from torchvision.transforms.v2 import functional as F

    if is_thin(config, *images.shape[-2:]):
        whole = images.reshape(-1, *images.shape[-3:]).permute(0, 2, 3, 1)
        return resample(whole, config).to(torch.uint8).reshape(*images.shape[:-2], *[config.input_size] * 2)
    shape, corner = validation_geometry(config, *images.shape[-2:])
    images = F.resize(images, list(shape), antialias=False)
    return F.crop(images, *corner, config.input_size, config.input_size)


def resample(images, config):
    """uint8 (N, H, W, 3) -> whole numbers as float (N, 3, S, S): the pixels of `preprocess`, in an exported program.

    torch resizes uint8 by weights of 14 or 15 bits, one side after the other, and rounds after each; float32 is exact
    for such products, and ONNX's Resize rounds once. There are no branches, and of the resized image only the crop is
    computed, whose size doesn't depend on the image. Columns are taken from a transposed image, whose channels, images
    and rows lie together: taken one by one, they would be the slowest part.
    Source: torch's aten/src/ATen/native/cpu/UpSampleKernel.cpp (HelperInterpBase), torchvision's resize.
    """
    n = config.input_size
    (rows, columns), (of_rows, of_columns) = _neighbours(images.shape[1:3], config)
    images = images.index_select(1, rows).flatten(2).flatten(0, 1).t()  # (W * 3, N * 2n)
    images = images.unflatten(0, (-1, 3)).flatten(1)  # (W, 3 * N * 2n)
    left, right = (images.index_select(0, side).float() for side in columns.split(n))
    images = _mean(left, right, of_columns[:, :, None])
    images = _mean(*images.view(-1, 2 * n).split(n, dim=1), of_rows)  # (n * 3 * N, n): columns, channels, images; rows
    return images.view(n, -1).t().reshape(3, -1, n, n).transpose(0, 1)


def _neighbours(shape, config):
    """Of the rows and the columns of the crop: indices (2, 2n) of the pixels before and behind each, and the weights
    (2, 2, n) of the ones and the others."""
    old = torch.stack([torch.scalar_tensor(side, dtype=torch.float64) for side in shape])
    resize = torch.scalar_tensor(config.val_resize, dtype=torch.float64)
    new, first = resize_and_crop(old, resize, config.input_size, torch)
    last = old[:, None] - 1
    places = torch.arange(config.input_size, dtype=torch.float64) + 0.5
    at = ((first[:, None] + places) * (old / new)[:, None] - 0.5).clamp(min=0).minimum(last)
    before = at.floor()
    indices = torch.cat([before, (before + 1).minimum(last)], dim=1).long()
    # 15 bits, unless the whole side has a weight of 1, which would not fit: at an end that is clamped, or where a place
    # falls on a pixel, because both lengths have the same power of two as a factor.
    old, new = old.long(), new.long()
    unit = torch.where((old < new) | ((old & -old) == (new & -new)), 2.0**14, 2.0**15)[:, None, None]
    weights = (torch.tensor([[1.0], [0.0]], dtype=torch.float64) - (at - before)[:, None]).abs()
    return indices, ((weights * unit + 0.5).floor() / unit).float()


def _mean(a, b, weights):
    return (a * weights[0] + b * weights[1] + 0.5).floor()

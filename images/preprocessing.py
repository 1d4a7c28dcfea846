"""From images as decoders return them, uint8 RGB, to the network's input, as in training and validation."""

import numpy as np
import torch
from PIL import Image

from images import pictures
from images.dataset import validation_geometry
from utils import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network_input(images, preprocessing):
    """uint8 RGB (N, H, W, 3) -> float (N, 3, H, W), channels-last in memory.

    `preprocessing` is "spos", BGR in [0, 255], or "imagenet", normalised RGB.
    """
    images = images.permute(0, 3, 1, 2)
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
    from torchvision.transforms.v2 import functional as F

    if isinstance(images, Image.Image):
        images = torch.from_numpy(np.array(pictures.rgb(images, config)))[None]
    if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8 or images.shape[3:] != (3,):
        found = type(images).__name__
        if hasattr(images, "dtype"):
            found += f" of {images.dtype} {tuple(images.shape)}"
        expected = "a uint8 tensor (N, H, W, 3), RGB from 0 to 255, nor a PIL image"
        raise UserError(f"images are a {found}, not {expected}")
    shape, corner = validation_geometry(config, *images.shape[1:3])
    images = F.resize(images.permute(0, 3, 1, 2), list(shape), antialias=False)
    images = F.crop(images, *corner, config.input_size, config.input_size)
    return network_input(images.permute(0, 2, 3, 1), config.preprocessing)

"""What picture a file holds: which files are read, and who decodes them.

The picture is the one that Pillow decodes: the first of several pages, with 8 bits a channel, as RGB. DALI gives the
same, within 1 of 255, for JPEG and PNG. Of the other formats it misreads some files and refuses others, so Pillow
decodes them for both loaders.
"""

import contextlib
import warnings

import numpy as np
from PIL import UnidentifiedImageError

from utils import UserError

SUFFIXES = {  # of the formats that are read, by Pillow's names; MPO is JPEG with several images
    "JPEG": (".jpg", ".jpeg"), "MPO": (".jpg", ".jpeg"), "PNG": (".png",), "BMP": (".bmp",), "PPM": (".ppm", ".pgm"),
    "TIFF": (".tif", ".tiff"), "WEBP": (".webp",),
}  # fmt: skip
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # of 8 bits a channel
BY_DALI = ("JPEG", "MPO", "PNG")
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError)  # raised by Pillow

warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file; what matters is an error here


def refusal(image):
    """Why an open PIL image is not read, or None."""
    if image.format not in SUFFIXES:
        return f"a {image.format} file, which is not read; {', '.join(SUFFIXES)} are"
    if image.mode == "F":
        return "greyscale of floating-point numbers (mode F), which no range says how to show"
    if image.mode[0] == "I":
        return f"greyscale with more than 8 bits (mode {image.mode}), which no range says how to show"
    if image.mode not in MODES:
        return f"in the colour space {image.mode}, which is not read"
    if image.format == "WEBP" and image.is_animated:
        return "an animated WebP file, not one picture"
    return None


def problem(error):
    """What is wrong with a file, of an error that reading or decoding it raised."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or f"a damaged image ({error})"


@contextlib.contextmanager
def named(path):
    """Within the block, what Pillow raises becomes a UserError that names the file."""
    try:
        yield
    except UNDECODABLE as error:
        raise UserError(f"{path}: {problem(error)}; remove or replace it") from None


def is_for_dali(image):
    """Whether DALI decodes an open PIL image to the same picture."""
    return image.format in BY_DALI


def rgb(image):
    """The picture of an open PIL image, a PIL image in RGB, completely decoded."""
    return image.convert("RGB")


def as_ppm(pixels):
    """An RGB picture (H, W, 3) of uint8 as the bytes of a PPM file, an array."""
    pixels = np.asarray(pixels)
    header = f"P6 {pixels.shape[1]} {pixels.shape[0]} 255\n".encode()
    return np.concatenate([np.frombuffer(header, np.uint8), pixels.ravel()])

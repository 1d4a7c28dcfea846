"""What picture a file holds: which files are read, who decodes them, how transparency and orientation are treated.

The picture is the one that Pillow decodes: the first of several pages, with 8 bits a channel, as RGB. DALI gives the
same, within 1 of 255, for JPEG and PNG without transparency and orientation. Of the other formats it misreads some
files and refuses others, so Pillow decodes them for both loaders. A TIFF file's own orientation is no EXIF, and is
always applied.
"""

import contextlib
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from utils import UserError

SUFFIXES = {  # Pillow's names of the formats that are read; MPO is JPEG with several images
    "JPEG": (".jpg", ".jpeg", ".jfif"), "MPO": (".jpg", ".jpeg", ".jfif"), "PNG": (".png",), "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm"), "TIFF": (".tif", ".tiff"), "WEBP": (".webp",),
}  # fmt: skip
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # 8 bits a channel
# What an orientation of EXIF asks for; 1 asks for nothing. Pillow's exif_transpose raises for damaged EXIF data whose
# orientation is readable, because it writes all of them back.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
BY_DALI = ("JPEG", "MPO", "PNG")
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError)  # raised by Pillow

warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file; what matters is an error here


def open_image(file):
    """The PIL image of a path or an open file, of which the header is read. Of any size: `refusal` has the limit."""
    Image.MAX_IMAGE_PIXELS = None
    return Image.open(file)


def refusal(image, max_pixels):
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
    width, height = image.size
    if width * height > max_pixels:
        size = f"{width} x {height} = {width * height:,} pixels"
        return f"too large: {size}, of {max_pixels:,} at most; --max-pixels {width * height} allows it"
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


def orientation(image):
    """The orientation that the EXIF data of an open PIL image ask for, a key of TURNS, or 1. Decodes a PNG."""
    if image.format == "TIFF":
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data raise anything
        return 1
    return found if found in TURNS else 1


def is_for_dali(image, config):
    """Whether DALI decodes an open PIL image to the picture that a DataConfig asks for."""
    if image.format not in BY_DALI or (config.alpha != "dropped" and image.has_transparency_data):
        return False
    # The EXIF data of a PNG may follow its pixels.
    return config.exif == "ignored" or (image.format != "PNG" and orientation(image) == 1)


def rgb(image, config):
    """The picture of an open PIL image that a DataConfig asks for: a PIL image in RGB, completely decoded."""
    if config.exif == "apply" and (turn := orientation(image)) != 1:
        image = image.transpose(TURNS[turn])
    if config.alpha == "dropped" or not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, config.alpha)
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def is_flat(image):
    """Whether a PIL image in RGB is one colour."""
    return all(low == high for low, high in image.getextrema())


def is_grey(image):
    """Whether a PIL image has no colours, by 1,024 of its pixels."""
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.NEAREST).convert("RGB"))
    return bool((pixels == pixels[:, :, :1]).all())


def as_ppm(pixels):
    """An RGB picture (H, W, 3) of uint8 as the bytes of a PPM file, an array."""
    pixels = np.asarray(pixels)
    header = f"P6 {pixels.shape[1]} {pixels.shape[0]} 255\n".encode()
    return np.concatenate([np.frombuffer(header, np.uint8), pixels.ravel()])

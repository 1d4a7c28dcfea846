"""Image files of all kinds, small ones, with the picture that each of them holds: `accepted()` and `refused()`."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 32, 40
ORIENTATION = 0x0112  # the tag of EXIF and TIFF


def encoded(image, kind, **save):
    """The bytes of a PIL image, or an array, as a file."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **save)
    return file.getvalue()


def exif(orientation):
    found = Image.Exif()
    found[ORIENTATION] = orientation
    return found


def _packed(values, bits):
    """Samples (H, n) of `bits` bits each as the bytes of rows, a list."""
    if bits == 16:
        return [row.astype(">u2").tobytes() for row in values]
    columns = (values[:, :, None] >> np.arange(bits)[::-1]) & 1
    return [np.packbits(row).tobytes() for row in columns.reshape(len(values), -1).astype(np.uint8)]


def png(values, colour, bits=8, palette=None, trns=None, interlaced=False, chunks=()):
    """A PNG file of samples (H, W, channels); `colour` is PNG's colour type, `chunks` are (name, bytes) after it."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    passes = [(0, 0, 1, 1)]
    if interlaced:  # Adam7: first row and column, and steps of both
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b""
    for top, left, down, right in passes:
        part = values[top::down, left::right]
        rows += b"".join(b"\0" + row for row in _packed(part.reshape(len(part), -1), bits))
    height, width = values.shape[:2]
    found = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced)))]
    found += [(b"PLTE", palette.tobytes())] if palette is not None else []
    found += [(b"tRNS", trns)] if trns else []
    found += [*chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in found)


def tiff(values, photometric, bits=8, tile=None, sample_format=1, extra=None, more=(), order="<"):
    """An uncompressed TIFF file of samples (H, W, channels), in one strip or in tiles of `tile` px."""
    height, width, channels = values.shape
    parts = [values]
    if tile:
        padded = np.pad(values, ((0, -height % tile), (0, -width % tile), (0, 0)))
        parts = [padded[y : y + tile, x : x + tile] for y in range(0, height, tile) for x in range(0, width, tile)]
    parts = [part.tobytes() for part in parts]
    body = b"".join(parts)
    starts = np.cumsum([8, *map(len, parts)])[:-1].tolist()
    tags = {256: ("I", [width]), 257: ("I", [height]), 258: ("H", [bits] * channels), 259: ("H", [1])}
    tags |= {262: ("H", [photometric]), 277: ("H", [channels]), 339: ("H", [sample_format] * channels)}
    if tile:
        tags |= {322: ("I", [tile]), 323: ("I", [tile]), 324: ("I", starts), 325: ("I", list(map(len, parts)))}
    else:
        tags |= {273: ("I", starts), 278: ("I", [height]), 279: ("I", [len(body)])}
    tags |= {338: ("H", [extra])} if extra is not None else {}
    tags |= dict(more)
    tags = dict(sorted(tags.items()))
    after = 8 + len(body) + 2 + 12 * len(tags) + 4  # where values begin that are longer than four bytes
    entries, long = b"", b""
    for tag, (kind, numbers) in tags.items():
        data = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(data) > 4:
            place, long = struct.pack(f"{order}I", after + len(long)), long + data
        else:
            place = data.ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[kind], len(numbers)) + place
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(body))
    return head + body + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + long


def _colours():
    """A smooth picture (HEIGHT, WIDTH, 3) whose channels differ."""
    field = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(field).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def _repeated(grey):
    return np.repeat(grey[:, :, None], 3, axis=2)


def accepted():
    """{name of a file: (its bytes, its picture (HEIGHT, WIDTH, 3), alpha (HEIGHT, WIDTH) or None)}."""
    rgb = _colours()
    image = Image.fromarray(rgb)
    grey = np.asarray(image.convert("L"))
    alpha = np.tile(np.linspace(0, 255, WIDTH).round().astype(np.uint8), (HEIGHT, 1))
    rgba, la = np.dstack([rgb, alpha]), np.dstack([grey, alpha])
    cmyk = image.convert("CMYK")
    files = {}

    def add(name, data, picture=rgb, transparency=None):
        files[name] = (data, picture, transparency)

    # JPEG
    for name, save in {
        "baseline": {}, "progressive": {"progressive": True}, "optimized": {"optimize": True},
        "420": {"subsampling": 2}, "422": {"subsampling": 1}, "comment": {"comment": b"c" * 9000},
        "icc": {"icc_profile": b"p" * 200}, "exif": {"exif": exif(6)}, "restarts": {"restart_marker_blocks": 2},
        "rgb": {"keep_rgb": True},
    }.items():  # fmt: skip
        add(f"jpeg_{name}.jpg", encoded(image, "JPEG", **{"quality": 98, "subsampling": 0, **save}))
    add("jpeg_grey.jpg", encoded(grey, "JPEG", quality=98), _repeated(grey))
    add("jpeg_cmyk.jpg", encoded(cmyk, "JPEG", quality=98))
    add("jpeg_trailing.jpg", files["jpeg_baseline.jpg"][0] + b"more" * 50)
    add(
        "jpeg_mpo.jpg",
        encoded(image, "MPO", quality=98, subsampling=0, save_all=True, append_images=[image.rotate(180)]),
    )
    # PNG
    for bits in (1, 2, 4, 8):
        levels = (grey.astype(int) * (2**bits - 1) + 127) // 255
        shown = (levels * 255 // (2**bits - 1)).astype(np.uint8)
        for interlaced in (False, True):
            kind = f"{bits}{'_interlaced' * interlaced}.png"
            add(f"png_grey{kind}", png(levels[..., None], 0, bits, interlaced=interlaced), _repeated(shown))
            indices = levels % 2**bits
            palette = np.random.default_rng(1).integers(0, 256, (2**bits, 3), np.uint8)
            add(
                f"png_palette{kind}", png(indices[..., None], 3, bits, palette, interlaced=interlaced), palette[indices]
            )
        seen = np.linspace(0, 255, 2**bits).astype(np.uint8)
        data = png(indices[..., None], 3, bits, palette, trns=seen.tobytes())
        add(f"png_palette{bits}_transparent.png", data, palette[indices], seen[indices])
    for bits, scale in ((8, 1), (16, 257)):
        add(f"png_rgb{bits}.png", png(rgb.astype(int) * scale, 2, bits))
        add(f"png_rgb{bits}_interlaced.png", png(rgb.astype(int) * scale, 2, bits, interlaced=True))
        add(f"png_la{bits}.png", png(la.astype(int) * scale, 4, bits), _repeated(grey), alpha)
        add(f"png_rgba{bits}.png", png(rgba.astype(int) * scale, 6, bits), rgb, alpha)
        add(f"png_rgba{bits}_interlaced.png", png(rgba.astype(int) * scale, 6, bits, interlaced=True), rgb, alpha)
    key = rgb[3, 4].astype(int)
    unlike = np.where((rgb == key).all(axis=2), 0, 255).astype(np.uint8)
    add("png_rgb8_transparent.png", png(rgb, 2, trns=struct.pack(">3H", *key)), rgb, unlike)
    unlike = np.where(grey == grey[3, 4], 0, 255).astype(np.uint8)
    data = png(grey[..., None], 0, trns=struct.pack(">H", int(grey[3, 4])))
    add("png_grey8_transparent.png", data, _repeated(grey), unlike)
    add("png_gamma.png", png(rgb, 2, chunks=[(b"gAMA", struct.pack(">I", 100_000))]))
    add("png_exif.png", encoded(image, "PNG", exif=exif(6)))
    add("png_animated.png", encoded(image, "PNG", save_all=True, append_images=[image.rotate(180)]))
    # BMP
    add("bmp_rgb.bmp", encoded(image, "BMP"))
    add("bmp_grey.bmp", encoded(grey, "BMP"), _repeated(grey))
    few = image.quantize(16)
    add("bmp_palette.bmp", encoded(few, "BMP"), np.asarray(few.convert("RGB")))
    bilevel = image.convert("1")
    add("bmp_1.bmp", encoded(bilevel, "BMP"), np.asarray(bilevel.convert("RGB")))
    add("bmp_32_bits.bmp", encoded(rgba, "BMP"))  # the fourth byte means nothing
    # TIFF
    for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        add(f"tiff_{name.removeprefix('tiff_')}.tif", encoded(image, "TIFF", compression=name))
    add("tiff_jpeg.tif", encoded(image, "TIFF", compression="jpeg", quality=98))
    add("tiff_grey.tif", encoded(grey, "TIFF"), _repeated(grey))
    add("tiff_white_is_zero.tif", tiff(255 - grey[..., None], 0), _repeated(grey))
    add("tiff_tiled.tif", tiff(rgb, 2, tile=16))
    add("tiff_big_endian.tif", tiff(rgb, 2, order=">"))
    add("tiff_big.tif", encoded(image, "TIFF", big_tiff=True))
    add("tiff_16_bits.tif", tiff(rgb.astype("<u2") * 257, 2, 16))
    add("tiff_pages.tif", encoded(image, "TIFF", save_all=True, append_images=[image.rotate(180)]))
    add("tiff_cmyk.tif", encoded(cmyk, "TIFF"))
    add("tiff_la.tif", encoded(la, "TIFF"), _repeated(grey), alpha)
    add("tiff_rgba.tif", tiff(rgba, 2, extra=2), rgb, alpha)
    add("tiff_palette.tif", encoded(few, "TIFF"), np.asarray(few.convert("RGB")))
    ycbcr = np.asarray(image.convert("YCbCr"))
    add("tiff_ycbcr.tif", tiff(ycbcr, 6, more={530: ("H", [1, 1])}.items()))
    turned = np.ascontiguousarray(rgb[::-1, ::-1])
    add("tiff_turned.tif", tiff(turned, 2, more={274: ("H", [3])}.items()))  # its own tag, which Pillow always obeys
    # WebP
    for name, save in {"": {}, "_icc": {"icc_profile": b"p" * 200}, "_exif": {"exif": exif(6)}}.items():
        add(f"webp_lossy{name}.webp", encoded(image, "WEBP", quality=100, **save))
        add(f"webp_lossless{name}.webp", encoded(image, "WEBP", lossless=True, **save))
    add("webp_alpha.webp", encoded(rgba, "WEBP", lossless=True, exact=True), rgb, alpha)
    # PPM
    size = f"{WIDTH} {HEIGHT}"
    words = {"ppm": (6, 3, rgb, rgb), "pgm": (5, 2, grey, _repeated(grey))}
    for kind, (binary, text, values, picture) in words.items():
        numbers = " ".join(map(str, values.ravel())).encode()
        add(f"{kind}.{kind}", f"P{binary}\n{size}\n255\n".encode() + values.tobytes(), picture)
        comment = f"P{binary}\n# made by hand\n{size}\n# and\n255\n".encode()
        add(f"{kind}_comment.{kind}", comment + values.tobytes(), picture)
        add(f"{kind}_ascii.{kind}", f"P{text}\n{size}\n255\n".encode() + numbers, picture)
        add(f"{kind}_ascii_comment.{kind}", f"P{text} # by hand\n{size} 255\n".encode() + numbers, picture)
        few_levels = values // 4  # 0 to 63
        shown = np.round(picture // 4 * (255 / 63)).astype(np.uint8)
        add(f"{kind}_63.{kind}", f"P{binary}\n{size}\n63\n".encode() + few_levels.tobytes(), shown)
    return files


def refused():
    """{name of a file: (its bytes, a word of the reason)}."""
    rgb = _colours()
    image = Image.fromarray(rgb)
    grey = np.asarray(image.convert("L")).astype(np.uint16)
    lab = np.dstack([grey, grey, grey]).astype(np.uint8)
    return {
        "png_grey16.png": (png(grey[..., None].astype(int) * 257, 0, 16), "8 bits"),
        "tiff_grey16.tif": (tiff(grey[..., None] * 257, 1, 16), "8 bits"),
        "tiff_grey32.tif": (tiff(grey[..., None].astype("<u4"), 1, 32), "8 bits"),
        "tiff_float.tif": (tiff(grey[..., None].astype("<f4"), 1, 32, sample_format=3), "floating-point"),
        "tiff_lab.tif": (tiff(lab, 8), "LAB"),
        "tiff_five_channels.tif": (tiff(np.dstack([rgb, rgb[..., :2]]), 2), "not an image"),
        "pgm_65535.pgm": (f"P5\n{WIDTH} {HEIGHT}\n65535\n".encode() + (grey * 257).astype(">u2").tobytes(), "8 bits"),
        "webp_animated.webp": (encoded(image, "WEBP", save_all=True, append_images=[image.rotate(180)]), "animated"),
        "animation.gif": (encoded(image, "GIF"), "GIF"),
        "text.jpg": (b"text", "not an image"),
        "empty.png": (b"", "empty"),
    }

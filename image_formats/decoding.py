"""Decodes image files to upright RGB pixels that equal those of the exported model.

For JPEG and PNG, Pillow gives the same bits as `tf.io.decode_jpeg(dct_method="INTEGER_ACCURATE", channels=3)` if
16-bit samples are reduced to their high byte, palettes are expanded, grey is converted to RGB, and transparent pixels
are composited over white.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import (  # noqa: F401
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
)
from PIL import WebPImagePlugin as WebpImagePlugin  # noqa: F401

from image_formats import jpeg, png
from image_formats.content import HEAD_BYTES, SUPPORTED, explain_unreadable, read_header
from image_formats.exif import read_orientation
from image_formats.header import MAX_PIXELS, ImageHeader, UnreadableImage

# Importing the plugins has registered these formats; otherwise the first request would import them.
_FORMATS = tuple(map(str.upper, SUPPORTED))
STRIP_PIXELS = 1 << 18  # converted at a time, so that intermediate copies are small

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_rgb(data: bytes) -> Image.Image:
    """Check the header of an image file, and decode it as `decode_rgb` does.

    Raises:
        UnreadableImage: the format is not supported, or the file is damaged, truncated or larger than MAX_PIXELS.
    """
    header = read_header(data)
    if header is None:
        raise UnreadableImage(explain_unreadable(data[:HEAD_BYTES]))
    if header.problem:
        raise UnreadableImage(header.problem)
    if header.pixels > MAX_PIXELS:
        size = f"{header.width} x {header.height}"
        raise UnreadableImage(f"the image has {size} pixels; the maximum is {MAX_PIXELS:,}")
    return decode_rgb(data, header)


def decode_rgb(data: bytes, header: ImageHeader) -> Image.Image:
    """Decode an image to upright RGB at its original size; the first frame of an animation is used.

    The orientation is read from the first EXIF segment of a JPEG, the eXIf chunk of a PNG, or the EXIF data of WebP and
    AVIF. An orientation in XMP or in text chunks is ignored.

    Args:
        data: the file.
        header: the file's header. The caller has checked the size.

    Raises:
        UnreadableImage: the file is damaged or truncated.
    """
    exif = transparency = b""
    if header.format == "JPEG":
        data, exif = jpeg.keep_pixel_data(data)
    elif header.format == "PNG":
        data, exif, transparency = png.keep_pixel_data(data)
    # Each step reassigns `image`, which frees the memory of the previous step.
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:  # its message has a memory address
        raise UnreadableImage("the image is damaged or cut off") from error
    except Exception as error:  # a damaged header can raise any error in Pillow's parsers
        raise UnreadableImage(f"the image is damaged or cut off ({error or type(error).__name__})") from error
    if header.format in ("WEBP", "AVIF"):
        exif = image.info.get("exif", b"")
    try:
        image.load()
        if transparency:
            image = _composite_png(image, data, transparency)
        image = _to_rgb(image)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, RuntimeError) as error:
        # Pillow's decoders raise these types for truncated and damaged files.
        raise UnreadableImage(f"the image is damaged or cut off ({error})") from error
    return turn_upright(image, exif)


def turn_upright(image: Image.Image, exif: bytes) -> Image.Image:
    """Apply the EXIF orientation; returns the same image if there is none."""
    turn = _TRANSPOSITIONS.get(read_orientation(exif))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        return _composite(image, lambda strip: strip.convert("RGBA"))
    if image.mode == "RGB":
        return image  # `convert` would copy it
    if image.mode.startswith("I;16"):
        return _map_strips(image, _high_byte, mode="L").convert("RGB")
    if image.mode == "CMYK":
        inversion = 255 if "adobe" in image.info else 0  # Adobe files are inverted, and Pillow has undone that
        return _map_strips(image, lambda ink: _cmyk_to_rgb(ink ^ inversion), mode="RGB")
    return image.convert("RGB")


def _composite_png(image: Image.Image, file: bytes, transparency: bytes) -> Image.Image:
    """Composite a PNG with a tRNS chunk, which makes a colour or palette entries transparent, over white.

    Like libpng, it compares the chunk's colour with the stored samples. Pillow compares samples of eight bits.
    """
    if image.mode == "P":
        image.info["transparency"] = transparency
        return _to_rgb(image)
    depth = file[24]
    colour = np.frombuffer(transparency, ">u2")
    if image.mode.startswith("I;16"):
        grey = np.uint16(colour[0])

        def with_alpha(strip: Image.Image) -> Image.Image:
            samples = np.asarray(strip)
            return _merge(Image.fromarray(_high_byte(samples)).convert("RGB"), samples != grey)

        return _composite(image, with_alpha)
    if image.mode == "RGB" and depth == 16:
        # Pillow keeps the high bytes; decoding again with swapped bytes gives the low bytes.
        low = Image.open(io.BytesIO(file), formats=("PNG",))
        assert isinstance(low, ImageFile.ImageFile)
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        low.load()
        return _composite(
            image,
            lambda strip, low_strip: _merge(
                strip, ((np.asarray(strip) != colour >> 8) | (np.asarray(low_strip) != colour & 255)).any(axis=2)
            ),
            low,
        )
    if image.mode == "RGB":
        return _composite(image, lambda strip: _merge(strip, (np.asarray(strip) != colour & 255).any(axis=2)))
    # Pillow has scaled grey samples of fewer bits to eight.
    most = (1 << depth) - 1
    level = int(colour[0] & most) * (255 // most)
    return _composite(image.convert("L"), lambda strip: _merge(strip.convert("RGB"), np.asarray(strip) != level))


def _merge(image: Image.Image, is_opaque: np.ndarray) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.fromarray(is_opaque.astype(np.uint8) * 255))
    return image


def _composite(image: Image.Image, to_rgba: Callable[..., Image.Image], *more: Image.Image) -> Image.Image:
    """Composite over white in strips: (colour * alpha + 255 * (255 - alpha)) / 255, rounded to nearest."""
    composited = Image.new("RGB", image.size, "white")
    for box in _strips(image):
        strip = to_rgba(*(each.crop(box) for each in (image, *more)))
        composited.paste(strip, box[:2], strip)
    return composited


def _map_strips(image: Image.Image, convert: Callable[[np.ndarray], np.ndarray], *, mode: str) -> Image.Image:
    """Convert pixels with numpy in strips."""
    converted = Image.new(mode, image.size)
    for box in _strips(image):
        converted.paste(Image.fromarray(convert(np.asarray(image.crop(box)))), box[:2])
    return converted


def _strips(image: Image.Image) -> list[tuple[int, int, int, int]]:
    rows = max(1, STRIP_PIXELS // image.width)
    return [(0, top, image.width, min(image.height, top + rows)) for top in range(0, image.height, rows)]


def _high_byte(samples: np.ndarray) -> np.ndarray:
    return (samples >> 8).astype(np.uint8)


def _cmyk_to_rgb(ink: np.ndarray) -> np.ndarray:
    """Convert CMYK with the formula of TensorFlow's JPEG decoder (`core/lib/jpeg/jpeg_mem.cc`), not Pillow's."""
    wide = ink.astype(np.uint16)
    rgb: np.ndarray = (wide[..., :3] * wide[..., 3:] // 255).astype(np.uint8)
    return rgb

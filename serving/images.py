"""Uploaded bytes to uint8 pixels, within limits, exactly as the exported graph decodes them.

Pillow's decoders give bit for bit what `tf.io.decode_jpeg(dct_method="INTEGER_ACCURATE", channels=3)`
gives for JPEG and PNG, once the same choices are made: alpha is dropped and not blended, 16-bit samples
keep their high byte, a palette is expanded, grey is repeated.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin
from PIL import WebPImagePlugin as WebpImagePlugin

from serving.decode_cost import is_quick
from serving.errors import InvalidRequest, TooLarge
from serving.exif import read_orientation
from serving.image_formats import jpeg, png
from serving.image_formats.header import ImageHeader
from serving.image_header import ImageLimits, check_image, read_header
from serving.waiting import offload

# Importing the plugins registers their formats, so that the first request need not look for them.
FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebpImagePlugin.WebPImageFile,
        BmpImagePlugin.BmpImageFile,
        GifImagePlugin.GifImageFile,
    )
)
PILLOW_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # beyond it Pillow itself refuses

STRIP_PIXELS = 1 << 18  # converted at once where numpy does it, so that its copies stay small

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(data: bytes, *, size: tuple[int, int], limits: ImageLimits) -> np.ndarray:
    """Decode one picture, upright, at a model's input size.

    Args:
        data: a JPEG, PNG, WebP, BMP or GIF file; of an animation the first frame is taken.
        size: (height, width) of the result. A picture of another size is resized, without keeping its
            proportions, by antialiased bilinear interpolation.
        limits: how large the picture may be before resizing.

    Returns:
        uint8 array of shape (height, width, 3), RGB.

    Raises:
        InvalidRequest: the data is no such file, is damaged or is cut off.
        TooLarge: the header announces a larger picture than allowed; nothing is decoded.
    """
    header = check_file(data, limits)
    if is_quick(header):
        return _decode(data, header, size)
    return offload(_decode, data, header, size)


def check_file(data: bytes, limits: ImageLimits) -> ImageHeader:
    """Read the header of an uploaded picture and check it against the limits, without Pillow.

    Raises:
        InvalidRequest: the data is not a picture of a format that is served, or has parts that no picture needs.
        TooLarge: the header announces a larger picture than allowed.
    """
    if not data:
        raise InvalidRequest("the file is empty")
    header = read_header(data)
    if header is None:
        raise InvalidRequest("unknown image format: expected JPEG, PNG, WebP, BMP or GIF")
    check_image(header, limits, decoder="pillow")
    return header


def _decode(data: bytes, header: ImageHeader, size: tuple[int, int]) -> np.ndarray:
    # One variable holds the picture at each step: the memory of the step before is free for the next.
    image, orientation = _open(data, header)
    try:
        image.load()
        if (turn := _TRANSPOSITIONS.get(orientation)) is not None:
            image = image.transpose(turn)
        image = _to_rgb(image)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        # Pillow's decoders say "truncated" or "broken" in several exception types.
        raise InvalidRequest(f"the picture is damaged or cut off ({error})") from error
    height, width = size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _open(data: bytes, header: ImageHeader) -> tuple[Image.Image, int]:
    """Open a picture and find its orientation.

    Only the EXIF of JPEG and WebP counts: the exported graph reads no orientation from a PNG, nor from XMP.
    """
    exif = b""
    if header.format == "JPEG":
        data, exif = jpeg.keep_pixel_data(data)
    elif header.format == "PNG":
        data = png.keep_pixel_data(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise TooLarge(f"the picture has too many pixels: {error}") from error
    except Exception as error:  # a damaged header fails anywhere in Pillow's parsers
        raise InvalidRequest("unknown image format: expected JPEG, PNG, WebP, BMP or GIF") from error
    if header.format == "WEBP":
        exif = image.info.get("exif", b"")
    return image, read_orientation(exif)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image  # `convert` would copy it
    if image.mode.startswith("I;16"):
        return _map_strips(image, lambda grey: (grey >> 8).astype(np.uint8), mode="L").convert("RGB")
    if image.mode == "CMYK":
        return _map_strips(image, _cmyk_to_rgb_adobe if "adobe" in image.info else _cmyk_to_rgb, mode="RGB")
    image.info.pop("transparency", None)  # else Pillow works out an alpha channel first
    return image.convert("RGB")


def _map_strips(image: Image.Image, convert: Callable[[np.ndarray], np.ndarray], *, mode: str) -> Image.Image:
    """Convert pixels with numpy, some rows at a time."""
    converted = Image.new(mode, image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        converted.paste(Image.fromarray(convert(np.asarray(strip))), (0, top))
    return converted


def _cmyk_to_rgb(ink: np.ndarray) -> np.ndarray:
    """Convert as TensorFlow's JPEG decoder does (`core/lib/jpeg/jpeg_mem.cc`), not as Pillow would."""
    wide = ink.astype(np.uint16)
    rgb: np.ndarray = (wide[..., :3] * wide[..., 3:] // 255).astype(np.uint8)
    return rgb


def _cmyk_to_rgb_adobe(ink: np.ndarray) -> np.ndarray:
    return _cmyk_to_rgb(255 - ink)  # Pillow has undone the inversion that Adobe files have

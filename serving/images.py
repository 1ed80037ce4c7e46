"""Uploaded bytes to uint8 pixels, within limits, exactly as the exported graph decodes them.

Pillow's decoders give bit for bit what `tf.io.decode_jpeg(dct_method="INTEGER_ACCURATE", channels=3)`
gives for JPEG and PNG, once the same choices are made: alpha is dropped and not blended, 16-bit samples
keep their high byte, a palette is expanded, grey is repeated.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import BmpImagePlugin, ExifTags, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin
from PIL import WebPImagePlugin as WebpImagePlugin

from serving.errors import InvalidRequest, TooLarge
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

LARGE_PIXELS = 256 * 1024  # a picture of more takes milliseconds

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(data: bytes, *, size: tuple[int, int], max_image_pixels: int) -> np.ndarray:
    """Decode one picture, upright, at a model's input size.

    Args:
        data: a JPEG, PNG, WebP, BMP or GIF file; of an animation the first frame is taken.
        size: (height, width) of the result. A picture of another size is resized, without keeping its
            proportions, by antialiased bilinear interpolation.
        max_image_pixels: how many pixels the picture may have before resizing.

    Returns:
        uint8 array of shape (height, width, 3), RGB.

    Raises:
        InvalidRequest: the data is no such file, is damaged or is cut off.
        TooLarge: the header announces more pixels than allowed; nothing is decoded.
    """
    image = open_image(data, max_image_pixels=max_image_pixels)
    if image.width * image.height > LARGE_PIXELS:
        return offload(_decode, image, size)
    return _decode(image, size)


def _decode(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    try:
        image.load()
        turn = _TRANSPOSITIONS.get(_orientation(image))
        image = _to_rgb(image if turn is None else image.transpose(turn))
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        # Pillow's decoders say "truncated" or "broken" in several exception types.
        raise InvalidRequest(f"the picture is damaged or cut off ({error})") from error
    height, width = size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def open_image(data: bytes, *, max_image_pixels: int) -> Image.Image:
    """Read the header of a picture and check its size; the pixels are not decoded yet.

    Raises:
        InvalidRequest: the data is not a picture of a format that is served.
        TooLarge: the header announces more pixels than allowed.
    """
    if not data:
        raise InvalidRequest("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise TooLarge(f"the picture has too many pixels: at most {max_image_pixels:,} are taken") from error
    except Exception as error:  # a damaged header fails anywhere in Pillow's parsers
        raise InvalidRequest("not a picture that can be read: expected JPEG, PNG, WebP, BMP or GIF") from error
    width, height = image.size
    if width * height > max_image_pixels:
        raise TooLarge(f"the picture has {width} x {height} pixels: at most {max_image_pixels:,} in all are taken")
    return image


def _orientation(image: Image.Image) -> int:
    # Only the EXIF of JPEG and WebP counts: the exported graph reads no orientation from a PNG, nor from XMP.
    if image.format not in ("JPEG", "MPO", "WEBP"):  # MPO: a JPEG with further pictures behind the first
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        return int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata does not make the pixels worse
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "CMYK":
        return _cmyk_to_rgb(image)
    image.info.pop("transparency", None)  # else Pillow works out an alpha channel first
    return image.convert("RGB")


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    """Convert as TensorFlow's JPEG decoder does (`core/lib/jpeg/jpeg_mem.cc`), not as Pillow would."""
    ink = np.asarray(image).astype(np.uint16)  # Pillow has undone the inversion that Adobe files have
    if "adobe" in image.info:
        ink = 255 - ink
    return Image.fromarray((ink[..., :3] * ink[..., 3:] // 255).astype(np.uint8))

"""Decodes uploaded images to uint8 pixels of a model's input size, within limits."""

from __future__ import annotations

import numpy as np
from PIL import Image

from image_formats.content import HEAD_BYTES, explain_unreadable, read_header
from image_formats.decoding import decode_rgb
from image_formats.header import ImageHeader, UnreadableImage
from serving.errors import InvalidRequest
from serving.greenlets import offload
from serving.images.limits import ImageLimits, check_image, is_quick

PILLOW_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow refuses larger images


def read_image(data: bytes, *, size: tuple[int, int], limits: ImageLimits) -> np.ndarray:
    """Decode an image, apply its orientation, and resize it to a model's input size.

    Args:
        data: a JPEG, PNG, WebP, AVIF, BMP or GIF file; the first frame of an animation is used.
        size: (height, width) of the result. The image is resized with antialiased bilinear interpolation; its aspect
            ratio is not preserved.
        limits: limits on the image before resizing.

    Returns:
        uint8 array of shape (height, width, 3), RGB.

    Raises:
        InvalidRequest: the file is damaged or truncated.
        InvalidRequest, TooLarge: see `check_file`; nothing is decoded.
    """
    header = check_file(data, limits)
    if is_quick(header):
        return _decode(data, header, size)
    return offload(_decode, data, header, size)


def check_file(data: bytes, limits: ImageLimits) -> ImageHeader:
    """Read the header of an uploaded image and check it against the limits, without Pillow.

    Raises:
        InvalidRequest: the format is not supported, or the file has too many parts.
        TooLarge: the header declares a larger image than allowed.
    """
    header = read_header(data)
    if header is None:
        raise InvalidRequest(explain_unreadable(data[:HEAD_BYTES]))
    check_image(header, limits, decoder="pillow")
    return header


def _decode(data: bytes, header: ImageHeader, size: tuple[int, int]) -> np.ndarray:
    try:
        image = decode_rgb(data, header)
    except UnreadableImage as error:
        raise InvalidRequest(str(error)) from error
    height, width = size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)

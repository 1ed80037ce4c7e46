"""Decodes one image file to the same pixels as the exported model does."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from image_formats.content import HAS_AVIF, HEAD_BYTES, explain_unreadable, name_format, read_header
from image_formats.decoding import decode_rgb
from image_formats.errors import UnreadableImage
from training.errors import DatasetError

MAX_PIXELS = 50_000_000  # limit of the exported model too


def read_image(file: Path | BinaryIO, *, image_size: tuple[int, int] | None) -> np.ndarray:
    """Read one image, upright and in RGB, with antialiased bilinear resizing.

    Args:
        file: path or open file, JPEG, PNG, WebP, AVIF, BMP or GIF; the first frame of an animation.
        image_size: (height, width); `None` keeps the image's size.

    Returns:
        uint8 (height, width, 3). Transparency is composited over white, grey repeated, 16-bit samples keep their high
        byte.

    Raises:
        DatasetError: the file is damaged, not an image, or has more than `MAX_PIXELS` according to its header.
    """
    try:
        data = file.read_bytes() if isinstance(file, Path) else file.read()
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror or error}") from error
    header = read_header(data)
    if header is None or (header.format == "AVIF" and not HAS_AVIF):
        raise DatasetError(f"{file}: {explain_unreadable(data[:HEAD_BYTES])}")
    if header.problem:
        raise DatasetError(f"{file}: {header.problem}")
    if header.pixels > MAX_PIXELS:
        raise DatasetError(f"{file} has {header.width} x {header.height} pixels; the limit is {MAX_PIXELS:,} in total")
    try:
        image = decode_rgb(data, header)
    except UnreadableImage as error:
        raise DatasetError(f"{file}: {error}") from error
    if image_size is not None and image.size != image_size[::-1]:
        image = image.resize(image_size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(image)


def is_image_file(path: Path) -> bool:
    """Return whether a file starts with the signature of an image format; False if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return path.is_file() and name_format(stream.read(HEAD_BYTES)) is not None
    except OSError:
        return False

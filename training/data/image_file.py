"""One image file to pixels, as the exported model decodes it: the same picture has to give the same answer."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from image_formats.content import HAS_AVIF, HEAD_BYTES, explain_unreadable, name_format, read_header
from image_formats.decoding import decode_rgb
from image_formats.errors import UnreadableImage
from training.errors import DatasetError

MAX_PIXELS = 50_000_000  # what the exported model takes: nothing is trained on that could not be asked about


def read_image(file: Path | BinaryIO, *, image_size: tuple[int, int] | None) -> np.ndarray:
    """Read one image: upright, three channels, resized by antialiased bilinear.

    Args:
        file: a JPEG, PNG, WebP, AVIF, BMP or GIF file, whatever its name, or one opened for reading; of an animation,
            the first picture counts.
        image_size: (height, width); `None` leaves it as it is.

    Returns:
        uint8 (height, width, 3). Transparency is composited over white, grey repeated, 16-bit samples keep their high
        byte.

    Raises:
        DatasetError: the file is damaged, no image, or has more than `MAX_PIXELS`, which is told from its header.
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
        raise DatasetError(
            f"{file} has {header.width} x {header.height} pixels; at most {MAX_PIXELS:,} in all are taken"
        )
    try:
        image = decode_rgb(data, header)
    except UnreadableImage as error:
        raise DatasetError(f"{file}: {error}") from error
    if image_size is not None and image.size != image_size[::-1]:
        image = image.resize(image_size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(image)


def is_image_file(path: Path) -> bool:
    """Whether a file begins as an image file does, of any format and whatever its name; False if it can't be read."""
    try:
        with path.open("rb") as stream:
            return path.is_file() and name_format(stream.read(HEAD_BYTES)) is not None
    except OSError:
        return False

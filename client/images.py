"""Pictures as a program has them, made into files that can be sent."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from client.errors import ImageRejected

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

Picture = str | os.PathLike[str] | bytes | np.ndarray | Image.Image


@dataclass(frozen=True)
class EncodedImage:
    """A picture as a file's content, ready to be sent."""

    file: str | None
    data: bytes


def encode_image(picture: Picture) -> EncodedImage:
    """Make one picture ready to be sent.

    Args:
        picture: a path, whose file is sent as it is; the content of an image file; pixels, uint8 (height, width, 3) or
            (height, width); or a Pillow image. The last two are sent as PNG, which loses nothing.

    Raises:
        ImageRejected: the file cannot be read or is empty, or the array is not of that shape and dtype.
    """
    if isinstance(picture, bytes):
        return EncodedImage(None, _not_empty(None, picture))
    if isinstance(picture, (str, os.PathLike)):
        file = os.fspath(picture)
        try:
            return EncodedImage(file, _not_empty(file, Path(picture).read_bytes()))
        except OSError as error:
            raise ImageRejected(file, error.strerror or str(error)) from error
    if isinstance(picture, np.ndarray):
        grey = picture.ndim == 2
        if picture.dtype != np.uint8 or not (grey or (picture.ndim == 3 and picture.shape[2] == 3)):
            raise ImageRejected(
                None,
                "expected raw pixels 0-255, uint8 (height, width, 3) or (height, width); "
                f"got {picture.dtype} {picture.shape}",
            )
        picture = Image.fromarray(picture)
    if picture.format in ("JPEG", "WEBP"):
        # PNG has no orientation that anyone honours, so the picture is turned upright before it becomes one.
        picture = ImageOps.exif_transpose(picture)
    if picture.mode not in _PNG_MODES:
        picture = picture.convert("RGB")
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=1)
    return EncodedImage(None, content.getvalue())


def find_images(paths: Iterable[str]) -> Iterator[str]:
    """Yield files as they are and folders as the images below them, by extension, in the order of their names."""
    for path in paths:
        if not Path(path).is_dir():
            yield path
            continue
        for folder, subfolders, files in os.walk(path):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(files):
                if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                    yield str(Path(folder) / name)


def _not_empty(file: str | None, data: bytes) -> bytes:
    if not data:
        raise ImageRejected(file, "the file is empty")
    return data

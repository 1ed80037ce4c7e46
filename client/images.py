"""Loads images in every form that the client accepts, as the bytes or pixels that are sent.

The bytes of a file are sent unchanged, so that the service decodes the original. Pixels are sent as PNG, which is
lossless. Images are not resized here.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from client.predictions import Failure
from image_formats import jpeg, png
from image_formats.decoding import read_rgb, turn_upright
from image_formats.files import MAX_FILE_BYTES, find_image_files
from image_formats.header import UnreadableImage

# One image: the path of a file, an encoded image, uint8 pixels (height, width, 3), or a Pillow image.
ImageSource = str | os.PathLike[str] | bytes | np.ndarray[Any, Any] | Image.Image

_FORMATS_WITH_ORIENTATION = ("JPEG", "MPO", "PNG", "WEBP", "AVIF")
# Modes that PNG stores without conversion. The conversion of others (CMYK, float) is for the caller to choose.
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


@dataclass(frozen=True)
class LoadedImage:
    """An image ready to be sent.

    Attributes:
        index: its position among the given images, from 0.
        file: its path, None if it was not given as a file.
        content: an encoded image, or uint8 pixels (height, width, 3).
    """

    index: int
    file: str | None
    content: bytes | np.ndarray[Any, Any]

    @cached_property
    def data(self) -> bytes:
        """The encoded image; pixels are encoded as PNG."""
        return self.content if isinstance(self.content, bytes) else _encode_png(Image.fromarray(self.content))

    @property
    def pixels(self) -> np.ndarray[Any, Any] | None:
        """The pixels; None for an encoded image."""
        return None if isinstance(self.content, bytes) else self.content

    @property
    def size_bytes(self) -> int:
        """The size in memory, before encoding."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.nbytes


def load_image(source: ImageSource, *, index: int) -> LoadedImage | Failure:
    """Load an image of any form, or return why its file, bytes or pixels cannot be sent.

    Raises:
        TypeError: the source is not an image in any of the accepted forms.
    """
    file = None
    content: bytes | np.ndarray[Any, Any]
    try:
        if isinstance(source, (str, os.PathLike)):
            file = os.fspath(source)
            content = _read_file(file)
        elif isinstance(source, bytes):
            content = source
        elif isinstance(source, np.ndarray):
            content = _copy_pixels(source)
            if content.nbytes > MAX_FILE_BYTES // 2:  # only the encoded size counts, so it has to be known here
                content = _encode_png(Image.fromarray(content))
        elif isinstance(source, Image.Image):
            content = _encode_png(_turn_upright(source))
        else:
            raise TypeError(
                "expected a path, the bytes of an encoded image, a uint8 array (height, width, 3) "
                f"or a Pillow image; got {type(source).__name__}"
            )
        if len(content) == 0:
            raise UnreadableImage("the image is empty: it has no bytes")
        if isinstance(content, bytes) and len(content) > MAX_FILE_BYTES:
            raise UnreadableImage(f"the image is larger than {MAX_FILE_BYTES:,} bytes, the maximum")
    except UnreadableImage as error:
        return Failure(index, file, str(error))
    return LoadedImage(index=index, file=file, content=content)


def as_jpeg_or_png(image: LoadedImage | Failure) -> LoadedImage | Failure:
    """Return an image in a format that exported models decode: JPEG and PNG unchanged, others as PNG, lossless.

    It is a failure if the format is not supported, or the image is damaged or too large, or was a failure before.
    """
    if isinstance(image, Failure) or image.pixels is not None or image.data.startswith((jpeg.SIGNATURE, png.SIGNATURE)):
        return image
    try:
        return LoadedImage(image.index, image.file, _encode_png(read_rgb(image.data)))
    except UnreadableImage as error:
        return Failure(image.index, image.file, str(error))


def find_images(folder: str | os.PathLike[str], *, on_error: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """Return the image files in a folder and its subfolders: the files of each level by name, then its folders by name.

    Image files are recognised by their content, and also by their suffix, so that damaged ones are not skipped
    silently. Hidden files and folders, whose names begin with a dot, are skipped, and so are those of file managers and
    file systems, such as `Thumbs.db`, `__MACOSX` and `lost+found`.

    Args:
        folder: searched to any depth; symbolic links to folders are not followed.
        on_error: called with the error of each folder that cannot be listed; by default it is raised.

    Example:
        >>> from client import Client, find_images
        >>> with Client("http://127.0.0.1:8501") as client:
        ...     for outcome in client.predict_iter(find_images("photos")):
        ...         print(outcome.file, outcome.label)
        photos/green/1.png green
        photos/red/1.png red
    """

    def fail(error: OSError) -> None:
        if on_error is None:
            raise error
        on_error(error)

    return map(Path, find_image_files(os.fspath(folder), on_error=fail))


def _read_file(file: str) -> bytes:
    try:
        with Path(file).open("rb") as stream:
            # Reading allocates as many bytes as requested, so request the file's size. A pipe reports the size 0.
            size = os.fstat(stream.fileno()).st_size or MAX_FILE_BYTES
            return stream.read(min(size, MAX_FILE_BYTES) + 1)
    except FileNotFoundError as error:
        raise UnreadableImage("file not found") from error
    except IsADirectoryError as error:
        raise UnreadableImage("is a folder; find_images(folder) lists the images in it") from error
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise UnreadableImage(f"invalid file name: {error}") from error


def _copy_pixels(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise UnreadableImage(
            f"expected RGB pixels as uint8 (height, width, 3), not scaled; got {pixels.dtype} {pixels.shape}"
        )
    return pixels.copy()  # the caller may reuse the array before it is sent


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation to the pixels, as the metadata is not sent."""
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableImage(f"the Pillow image cannot be read: {error}") from error
    exif = image.info.get("exif") if image.format in _FORMATS_WITH_ORIENTATION else None
    return turn_upright(image, exif) if isinstance(exif, bytes) else image


def _encode_png(image: Image.Image) -> bytes:
    if image.mode not in _PNG_MODES:
        raise UnreadableImage(
            f"expected a Pillow image of mode {', '.join(_PNG_MODES)}; got {image.mode}: convert it, for example to RGB"
        )
    if 0 in image.size:
        raise UnreadableImage(f"the Pillow image has no pixels: {image.width} x {image.height}")
    if image.mode == "P" and isinstance(image.info.get("transparency"), (bytes, int)):
        image = image.convert("RGBA")  # otherwise the transparency would be lost with the metadata
    image = image.copy()
    image.info = {}  # an invalid "transparency" entry can make Pillow fail
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()

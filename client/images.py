"""Pictures in every form that the client takes, to the bytes that are sent.

A file's bytes are sent as they are, so that the service sees the original; pixels are sent as PNG,
without loss. Nothing is resized here.
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

from client.errors import ImageRejected
from image_formats.content import HAS_AVIF, HEAD_BYTES, explain_unreadable, name_format, read_header
from image_formats.decoding import decode_rgb, turn_upright
from image_formats.errors import UnreadableImage

# One picture: the path of a file, an encoded picture, uint8 pixels (height, width, 3), or a Pillow image.
ImageSource = str | os.PathLike[str] | bytes | np.ndarray[Any, Any] | Image.Image

# Files with these suffixes are sent even if their content is not an image, so that damage is reported.
PICTURE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".png", ".webp"})
# What file managers leave behind beside pictures, and what begins with "._".
_LITTER = frozenset({"__macosx", "thumbs.db"})

# As much as the service takes in one request, unless it is told otherwise.
MAX_IMAGE_BYTES = 64 * 1024 * 1024

MAX_PIXELS = 50_000_000  # as many as the service takes
_JPEG_AND_PNG = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")

_TURNED_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF")
# Modes that PNG holds as they are. The conversion of others (CMYK, float) is the caller's to choose.
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


@dataclass(frozen=True)
class Picture:
    """A picture ready to be sent.

    Attributes:
        index: its place among those given.
        file: its name, None where it came without one.
        content: the bytes of an encoded picture, or uint8 pixels (height, width, 3).
    """

    index: int
    file: str | None
    content: bytes | np.ndarray[Any, Any]

    @cached_property
    def data(self) -> bytes:
        """The bytes of the encoded picture: PNG, for pixels."""
        return self.content if isinstance(self.content, bytes) else _encode_png(Image.fromarray(self.content))

    @property
    def pixels(self) -> np.ndarray[Any, Any] | None:
        """The pixels, None where the picture came encoded."""
        return None if isinstance(self.content, bytes) else self.content

    @property
    def size_bytes(self) -> int:
        """The memory it takes, before it is encoded."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.nbytes


def read_picture(source: ImageSource, *, index: int) -> Picture:
    """Take one picture, in whatever form, and read it if it is a file.

    Raises:
        ImageRejected: the file cannot be read, is empty or too large, or the pixels are not of the form expected.
        TypeError: it is nothing that stands for a picture.
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
            content = _check_pixels(source)
            if content.nbytes > MAX_IMAGE_BYTES // 2:  # it may be more than is sent, which shows when it is encoded
                content = _encode_png(Image.fromarray(content))
        elif isinstance(source, Image.Image):
            content = _encode_png(_upright(source))
        else:
            raise TypeError(
                "a picture is a path, the bytes of an encoded picture, a uint8 array (height, width, 3) "
                f"or a Pillow image; got {type(source).__name__}"
            )
        _check_size(content)
    except _NotReadable as error:
        raise ImageRejected(index, file, str(error)) from error
    return Picture(index=index, file=file, content=content)


def as_jpeg_or_png(picture: Picture) -> Picture:
    """Return a picture as a model's own decoder reads it: JPEG and PNG as they are, others as PNG without loss.

    Raises:
        ImageRejected: it is no picture of a format that the service takes, damaged, or too large.
    """
    if picture.pixels is not None or picture.data.startswith(_JPEG_AND_PNG):
        return picture
    try:
        return Picture(picture.index, picture.file, _encode_png(_decode_other(picture.data)))
    except _NotReadable as error:
        raise ImageRejected(picture.index, picture.file, str(error)) from error


def find_pictures(
    folder: str | os.PathLike[str], *, on_error: Callable[[OSError], None] | None = None
) -> Iterator[Path]:
    """Yield the picture files under a folder: each level's files by name, then its folders by name.

    Files are known by their content, and by a picture's suffix so that damaged ones are not passed over in silence.
    `Thumbs.db`, `__MACOSX` and what begins with `._` is left out.

    Args:
        folder: walked to any depth; links to folders are not followed.
        on_error: called with the error of each folder that cannot be listed; by default it is raised.
    """

    def fail(error: OSError) -> None:
        if on_error is None:
            raise error
        on_error(error)

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not _is_litter(name))
        for name in sorted(files):
            # `os.path`, as a Path for each takes long.
            if not _is_litter(name) and (
                os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES  # noqa: PTH122
                or _begins_as_image(os.path.join(parent, name))  # noqa: PTH118
            ):
                yield Path(parent, name)


def _is_litter(name: str) -> bool:
    return name.startswith("._") or name.lower() in _LITTER


def _begins_as_image(file: str) -> bool:
    try:
        # Opening a pipe would block until it has a writer.
        if not os.path.isfile(file):  # noqa: PTH113
            return False
        with open(file, "rb", buffering=0) as stream:  # noqa: PTH123
            return name_format(stream.read(HEAD_BYTES)) is not None
    except OSError:
        return False


class _NotReadable(Exception):  # noqa: N818
    """The reason, before it is known whose it is."""


def _read_file(file: str) -> bytes:
    try:
        with Path(file).open("rb") as stream:
            # To ask for more than there is would make room for it first. What has no size, such as a pipe, may be long.
            size = os.fstat(stream.fileno()).st_size or MAX_IMAGE_BYTES
            return stream.read(min(size, MAX_IMAGE_BYTES) + 1)
    except FileNotFoundError as error:
        raise _NotReadable("there is no such file") from error
    except IsADirectoryError as error:
        raise _NotReadable("is a folder; find_pictures(folder) lists the pictures in it") from error
    except OSError as error:
        raise _NotReadable(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise _NotReadable(f"is no file name: {error}") from error


def _check_size(content: bytes | np.ndarray[Any, Any]) -> None:
    if len(content) == 0:
        raise _NotReadable("the picture is empty: it has no bytes")
    if isinstance(content, bytes) and len(content) > MAX_IMAGE_BYTES:
        raise _NotReadable(f"the picture is larger than {MAX_IMAGE_BYTES:,} bytes, the most that is sent")


def _check_pixels(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise _NotReadable(
            f"expected RGB pixels as uint8 (height, width, 3), not scaled; got {pixels.dtype} {pixels.shape}"
        )
    return pixels.copy()  # it is sent later, when whoever gave it may have put something else there


def _decode_other(data: bytes) -> Image.Image:
    """Decode a file that is neither JPEG nor PNG as the service does."""
    header = read_header(data)
    if header is None or (header.format == "AVIF" and not HAS_AVIF):
        raise _NotReadable(explain_unreadable(data[:HEAD_BYTES]))
    if header.problem:
        raise _NotReadable(header.problem)
    if header.pixels > MAX_PIXELS:
        size = f"{header.width} x {header.height}"
        raise _NotReadable(f"the picture has {size} pixels: at most {MAX_PIXELS:,} are taken")
    try:
        return decode_rgb(data, header)
    except UnreadableImage as error:
        raise _NotReadable(str(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    """Turn the pixels as the metadata says: it is not sent, and the same picture as a file would be turned."""
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise _NotReadable(f"the Pillow image cannot be read: {error}") from error
    exif = image.info.get("exif") if image.format in _TURNED_FORMATS else None
    return turn_upright(image, exif) if isinstance(exif, bytes) else image


def _encode_png(image: Image.Image) -> bytes:
    if image.mode not in _PNG_MODES:
        raise _NotReadable(
            f"expected a Pillow image of mode {', '.join(_PNG_MODES)}; got {image.mode}: convert it, to RGB perhaps"
        )
    if 0 in image.size:
        raise _NotReadable(f"the Pillow image has no pixels: {image.width} x {image.height}")
    if image.mode == "P" and isinstance(image.info.get("transparency"), (bytes, int)):
        image = image.convert("RGBA")  # else it would be lost with the metadata
    image = image.copy()
    image.info = {}  # a stray "transparency" entry can keep Pillow from writing the file
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()

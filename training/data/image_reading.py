"""Reads many image files into one array, after checking that it fits into memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from image_formats.decoding import read_rgb
from image_formats.header import MAX_PIXELS, UnreadableImage
from training.errors import DatasetError
from training.memory import available_bytes, require_memory

DEFAULT_SIZE = (96, 96)  # of images that differ in size or are large; trains in minutes
LARGEST_OWN_SIDE = 128  # images of one size up to this are not resized
_DECODING_BYTES = 9 * MAX_PIXELS  # of the largest image: decoded, converted and rotated
_SHOWN_AT_MOST = 5

logger = logging.getLogger(__name__)


def read_image(file: Path | BinaryIO, *, image_size: tuple[int, int] | None) -> np.ndarray:
    """Read one image, upright and in RGB, with antialiased bilinear resizing: the same pixels as in the exported model.

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
        image = read_rgb(file.read_bytes() if isinstance(file, Path) else file.read())
    except UnreadableImage as error:
        raise DatasetError(f"{file}: {error}") from error
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror or error}") from error
    if image_size is not None and image.size != image_size[::-1]:
        image = image.resize(image_size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(image)


class _NoCommonSizeError(Exception):
    """The images must be resized; the message says why."""


def read_images(
    paths: Sequence[Path],
    *,
    image_size: tuple[int, int] | None,
    folder: Path,
    default_size: tuple[int, int] | None = DEFAULT_SIZE,
) -> np.ndarray:
    """Read image files, at least one.

    Args:
        paths: in the order of the result, uint8 (n, height, width, 3).
        image_size: (height, width) to resize to; `None` keeps small images of equal size.
        folder: for messages.
        default_size: (height, width) for other images if `image_size` is `None`. If both are, large images are kept,
            and images of different sizes are an error.

    Raises:
        DatasetError: files are damaged, or differ in size.
        MemoryTooSmallError: the images do not fit into memory.
    """
    try:
        return _read(paths, image_size, folder, largest_side=LARGEST_OWN_SIDE if default_size else None)
    except _NoCommonSizeError as reason:
        if default_size is None:
            raise DatasetError(str(reason)) from None
        advice = "choose another size with --image-size HEIGHTxWIDTH (make: IMAGE_SIZE=)"
        logger.info("%s: all are resized to %s; %s", reason, _text(default_size), advice)
    return _read(paths, default_size, folder, largest_side=None)


def _read(
    paths: Sequence[Path], image_size: tuple[int, int] | None, folder: Path, *, largest_side: int | None
) -> np.ndarray:
    images: np.ndarray | None = None
    first = paths[0]
    damaged: list[str] = []
    # Closed on an error; otherwise its threads would read all files.
    with closing(_decode(paths, image_size, folder)) as decoded:
        for row, (path, image) in enumerate(zip(paths, decoded, strict=True)):
            if isinstance(image, DatasetError):
                damaged.append(str(image))
                continue
            if images is None:
                if image_size is None and largest_side is not None and max(image.shape[:2]) > largest_side:
                    raise _NoCommonSizeError(f"the images in {folder} are large, {path} is {_text(image.shape)}")
                images, first = _allocate(len(paths), image), path
            if image.shape != images.shape[1:]:
                # At once, because reading the other files could take long.
                raise _NoCommonSizeError(
                    f"the images in {folder} differ in size (height x width), {first} is {_text(images.shape[1:])} and "
                    f"{path} is {_text(image.shape)}"
                )
            images[row] = image
    if damaged:
        more = f"\n  and {len(damaged) - _SHOWN_AT_MOST} more" if len(damaged) > _SHOWN_AT_MOST else ""
        shown = "".join(f"\n  {message}" for message in damaged[:_SHOWN_AT_MOST])
        raise DatasetError(
            f"{len(damaged)} of {len(paths):,} files are not usable; repair or remove them:{shown}{more}"
        )
    assert images is not None
    return images


def _decode(
    paths: Sequence[Path], image_size: tuple[int, int] | None, folder: Path
) -> Generator[np.ndarray | DatasetError]:
    def read(path: Path) -> np.ndarray | DatasetError:
        try:
            return read_image(path, image_size=image_size)
        except DatasetError as error:
            return error

    # One thread per core, as far as their images fit into memory.
    available, threads = available_bytes(), os.cpu_count() or 1
    if available is not None:
        threads = max(1, min(threads, available // _DECODING_BYTES))
    console = Console(stderr=True)
    pool = ThreadPoolExecutor(threads)
    try:
        images, title, is_hidden = pool.map(read, paths), f"reading {folder}", not console.is_terminal
        yield from track(images, title, total=len(paths), console=console, transient=True, disable=is_hidden)
    finally:
        pool.shutdown(cancel_futures=True)


def _allocate(count: int, image: np.ndarray) -> np.ndarray:
    # Checked first, because Linux grants the memory and kills the process once it is used.
    require_memory(
        2 * count * image.size,
        f"{count:,} images of {_text(image.shape)}, and the copy made when they are split,",
        advice=f"make them smaller with --image-size, such as --image-size {_text(DEFAULT_SIZE)} "
        f"(make: IMAGE_SIZE={_text(DEFAULT_SIZE)})",
    )
    return np.empty((count, *image.shape), np.uint8)


def _text(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}"

"""Reads many image files into one array: of one size, within the memory there is."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from training.data.image_file import MAX_PIXELS, read_image
from training.errors import DatasetError
from training.memory import available_bytes, require_memory

DEFAULT_SIZE = (96, 96)  # of images that differ in size or are large: a network for them is trained in minutes
LARGEST_OWN_SIDE = 128  # images of one size are kept as they are up to this
_DECODING_BYTES = 9 * MAX_PIXELS  # of one image, the largest there may be: decoded, converted and turned
_SHOWN_AT_MOST = 5

logger = logging.getLogger(__name__)


class _NoCommonSizeError(Exception):
    """The images cannot be kept in their own size; the message says why."""


def read_images(
    paths: Sequence[Path],
    *,
    image_size: tuple[int, int] | None,
    folder: Path,
    default_size: tuple[int, int] | None = DEFAULT_SIZE,
) -> np.ndarray:
    """Read image files.

    Args:
        paths: the files, at least one.
        image_size: (height, width) to resize to, antialiased bilinear; `None` keeps small images of one size.
        folder: where they are, for messages.
        default_size: (height, width) that others are resized to then; with `None`, large images are kept too, and
            images of several sizes are an error.

    Returns:
        uint8 (n, height, width, 3), in the order of the paths.

    Raises:
        DatasetError: files are damaged, or differ in size.
        MemoryTooSmallError: the images do not fit into memory.
    """
    try:
        return _read(paths, image_size, folder, largest_side=LARGEST_OWN_SIDE if default_size else None)
    except _NoCommonSizeError as reason:
        if default_size is None:
            raise DatasetError(str(reason)) from None
        logger.info(
            "%s: all are resized to %s; choose another size with --image-size HEIGHTxWIDTH (make: IMAGE_SIZE=)",
            reason,
            _text(default_size),
        )
    return _read(paths, default_size, folder, largest_side=None)


def _read(
    paths: Sequence[Path], image_size: tuple[int, int] | None, folder: Path, *, largest_side: int | None
) -> np.ndarray:
    images: np.ndarray | None = None
    first = paths[0]
    damaged: list[str] = []
    # Closed here on an error: else its threads would go on until all files are read.
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
                # At once: reading all of what may be many large photos would only tell the same.
                raise _NoCommonSizeError(
                    f"the images in {folder} differ in size (height x width), {first} is {_text(images.shape[1:])} and "
                    f"{path} is {_text(image.shape)}"
                )
            images[row] = image
    if damaged:
        more = f"\n  and {len(damaged) - _SHOWN_AT_MOST} more" if len(damaged) > _SHOWN_AT_MOST else ""
        shown = "".join(f"\n  {message}" for message in damaged[:_SHOWN_AT_MOST])
        raise DatasetError(f"{len(damaged)} of {len(paths):,} files cannot be used; mend or remove them:{shown}{more}")
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

    console = Console(stderr=True)
    pool = ThreadPoolExecutor(_count_threads())
    try:
        yield from track(
            pool.map(read, paths),
            f"reading {folder}",
            total=len(paths),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    finally:
        pool.shutdown(cancel_futures=True)


def _count_threads() -> int:
    """Return how many threads can decode at once: as many as there are cores, and images that the memory can hold."""
    available = available_bytes()
    cores = os.cpu_count() or 1
    return cores if available is None else max(1, min(cores, available // _DECODING_BYTES))


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

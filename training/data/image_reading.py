"""Reads many image files: into one array, after checking that it fits into memory, or one after the other."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from typing_extensions import override

from image_formats.decoding import read_rgb
from image_formats.header import UnreadableImage
from training.errors import DatasetError
from training.image_progress import ImageProgress
from training.memory import count_decoding_threads, require_memory

DEFAULT_SIZE = (96, 96)  # of images that differ in size or are large; trains in minutes
LARGEST_OWN_SIDE = 128  # images of one size up to this are not resized
_SHOWN_AT_MOST = 5
_WAITING_PER_THREAD = 4  # decoded images; bounds the memory where the sink is slower

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


class ImageSink(ABC):
    """Takes decoded images, one after the other."""

    @abstractmethod
    def begin(self, height: int, width: int) -> None:
        """Prepare for images of this size. Called again if all must be resized, and come again from the first one."""

    def prepare(self, image: np.ndarray) -> Any:  # noqa: ARG002
        """Return what else `add` needs; called in the thread that has decoded the image."""
        return None

    @abstractmethod
    def add(self, image: np.ndarray, prepared: Any) -> None:
        """Take the next image, uint8 (height, width, 3)."""


class _MemorySink(ImageSink):
    def __init__(self, count: int) -> None:
        self._count = count
        self._added = 0
        self.images = np.empty((0, 1, 1, 3), np.uint8)

    @override
    def begin(self, height: int, width: int) -> None:
        self.images = allocate_images(self._count, height, width)
        self._added = 0

    @override
    def add(self, image: np.ndarray, prepared: Any) -> None:
        self.images[self._added] = image
        self._added += 1


def read_images(
    paths: Sequence[Path],
    *,
    image_size: tuple[int, int] | None,
    folder: Path,
    default_size: tuple[int, int] | None = DEFAULT_SIZE,
) -> np.ndarray:
    """Read image files, at least one, into memory.

    Returns:
        uint8 (n, height, width, 3), in the order of `paths`.

    Raises:
        DatasetError: as for `stream_images`.
        MemoryTooSmallError: the images do not fit into memory.
    """
    sink = _MemorySink(len(paths))
    stream_images(paths, sink, image_size=image_size, folder=folder, default_size=default_size)
    return sink.images


def stream_images(
    paths: Sequence[Path],
    sink: ImageSink,
    *,
    image_size: tuple[int, int] | None,
    folder: Path,
    default_size: tuple[int, int] | None = DEFAULT_SIZE,
) -> None:
    """Read image files, at least one, and give them to `sink`, all in the same size.

    Args:
        paths: in the order in which the sink takes the images.
        sink: takes the images. It has not taken all if there is an error.
        image_size: (height, width) to resize to; `None` keeps small images of equal size.
        folder: for messages.
        default_size: (height, width) for other images if `image_size` is `None`. If both are, large images are kept,
            and images of different sizes are an error.

    Raises:
        DatasetError: files are damaged, or differ in size.
    """
    largest_side = LARGEST_OWN_SIDE if image_size is None and default_size else None
    try:
        _stream(paths, sink, image_size, folder, largest_side=largest_side)
        return
    except _NoCommonSizeError as reason:
        if default_size is None:
            raise DatasetError(str(reason)) from None
        advice = "choose another size with --image-size HEIGHTxWIDTH (make: IMAGE_SIZE=)"
        logger.info("%s: all are resized to %s; %s", reason, format_size(default_size), advice)
    _stream(paths, sink, default_size, folder, largest_side=None)


def _stream(
    paths: Sequence[Path],
    sink: ImageSink,
    image_size: tuple[int, int] | None,
    folder: Path,
    *,
    largest_side: int | None,
) -> None:
    shape: tuple[int, ...] | None = None
    first = paths[0]
    damaged: list[str] = []
    # Closed on an error; otherwise its threads would go on.
    with closing(_decode(paths, image_size, sink, folder, largest_side=largest_side)) as decoded:
        for path, read in zip(paths, decoded, strict=True):
            if isinstance(read, DatasetError):
                damaged.append(str(read))
                continue
            image, prepared = read
            if shape is None:
                if _is_large(image, largest_side):
                    raise _NoCommonSizeError(f"the images in {folder} are large, {path} is {format_size(image.shape)}")
                shape, first = image.shape, path
                sink.begin(*image.shape[:2])
            if image.shape != shape:
                # At once, because reading the other files could take long.
                raise _NoCommonSizeError(
                    f"the images in {folder} differ in size (height x width), {first} is {format_size(shape)} and "
                    f"{path} is {format_size(image.shape)}"
                )
            sink.add(image, prepared)
    if damaged:
        more = f"\n  and {len(damaged) - _SHOWN_AT_MOST} more" if len(damaged) > _SHOWN_AT_MOST else ""
        shown = "".join(f"\n  {message}" for message in damaged[:_SHOWN_AT_MOST])
        raise DatasetError(
            f"{len(damaged)} of {len(paths):,} files are not usable; repair or remove them:{shown}{more}"
        )


def _decode(
    paths: Sequence[Path],
    image_size: tuple[int, int] | None,
    sink: ImageSink,
    folder: Path,
    *,
    largest_side: int | None,
) -> Generator[tuple[np.ndarray, Any] | DatasetError]:
    """Yield the images in order, decoded by a thread for each core; a few wait for the sink."""

    def read(path: Path) -> tuple[np.ndarray, Any] | DatasetError:
        try:
            image = read_image(path, image_size=image_size)
        except DatasetError as error:
            return error
        return image, None if _is_large(image, largest_side) else sink.prepare(image)

    threads = count_decoding_threads()
    waiting: deque[Future[tuple[np.ndarray, Any] | DatasetError]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    with ImageProgress(total=len(paths), title=f"reading {folder}") as progress:
        try:
            for path in paths:
                waiting.append(pool.submit(read, path))
                if len(waiting) > _WAITING_PER_THREAD * threads:
                    yield waiting.popleft().result()
                    progress.update(1)
            while waiting:
                yield waiting.popleft().result()
                progress.update(1)
        finally:
            pool.shutdown(cancel_futures=True)


def _is_large(image: np.ndarray, largest_side: int | None) -> bool:
    return largest_side is not None and max(image.shape[:2]) > largest_side


def allocate_images(count: int, height: int, width: int) -> np.ndarray:
    """Return an array for images, uint8 (count, height, width, 3).

    Raises:
        MemoryTooSmallError: it does not fit into memory. Linux would grant it, and kill the process once it is used.
    """
    size = format_size(DEFAULT_SIZE)
    require_memory(
        2 * count * height * width * 3,
        f"{count:,} images of {height}x{width}, and the copy made when they are split,",
        advice="read them batch by batch with --stream (make: STREAM=1), or make them smaller with --image-size, such "
        f"as --image-size {size} (make: IMAGE_SIZE={size})",
    )
    return np.empty((count, height, width, 3), np.uint8)


def format_size(shape: Sequence[int]) -> str:
    """Return (height, width, ...) as text."""
    return f"{shape[0]}x{shape[1]}"

"""Images that are read from files when they are indexed, and not kept: data larger than memory.

`StreamedImages` stands where an array of images does. What indexes images in batches handles both alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from training.errors import DatasetError
from training.memory import count_decoding_threads

_BATCH_IMAGES = 250


class ImageSource:
    """Where streamed images come from; shared by all splits of a dataset.

    Args:
        image_size: (height, width) of every image.
        read_one: returns the image at a position, uint8 (height, width, 3), or raises `DatasetError`. Threads call it
            at the same time.

    Attributes:
        failure: the first error of `read`. TensorFlow replaces an exception of the functions that it calls by one of
            its own, without the message; see `explain_unreadable`.
    """

    def __init__(self, image_size: tuple[int, int], read_one: Callable[[int], np.ndarray]) -> None:
        self.image_size = image_size
        self.failure: DatasetError | None = None
        self._read_one = read_one

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Read images, one thread for each core.

        Args:
            positions: int (n,).

        Returns:
            uint8 (n, height, width, 3).

        Raises:
            DatasetError: an image cannot be read; the message names its file.
        """
        images = np.empty((len(positions), *self.image_size, 3), np.uint8)

        def read_some(rows: np.ndarray) -> None:
            for row in rows.tolist():
                images[row] = self._read_one(int(positions[row]))

        # A part for each thread: handing over every image by itself takes longer than decoding a small one.
        parts = np.array_split(np.arange(len(positions)), min(self._threads, max(1, len(positions))))
        try:
            if len(parts) == 1:
                read_some(parts[0])
            else:
                list(self._pool.map(read_some, parts))
        except DatasetError as error:
            self.failure = self.failure or error
            raise
        return images

    @cached_property
    def _threads(self) -> int:
        return count_decoding_threads()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, thread_name_prefix="read images")


class StreamedImages:
    """Images uint8 (n, height, width, 3). Indexing reads them: an index, a slice or an array of indices, as in NumPy.

    Args:
        source: of the images.
        positions: int64 (n,), of these images in the source.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, source: ImageSource, positions: np.ndarray) -> None:
        self.source = source
        self.shape = (len(positions), *source.image_size, 3)
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> np.ndarray:
        chosen = self._positions[index]
        images = self.source.read(np.atleast_1d(chosen))
        return images if np.ndim(chosen) else images[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read all images."""
        return np.asarray(self[:], dtype, copy=copy)

    def select(self, rows: np.ndarray | slice) -> StreamedImages:
        """Return these images, bool (n,) or int (m,), without reading them."""
        return StreamedImages(self.source, self._positions[rows])


# An array or `StreamedImages`. `Any`, so that who has an array need not rule out the other for the type checker.
Images: TypeAlias = np.ndarray | Any


def select_images(images: Images, rows: np.ndarray | slice) -> Images:
    """Return some of the images, bool (n,) or int (m,), without reading streamed ones."""
    return images.select(rows) if isinstance(images, StreamedImages) else images[rows]


def read_batches(images: Images, batch_size: int = _BATCH_IMAGES) -> Iterator[np.ndarray]:
    """Yield all images in batches uint8 (batch_size or fewer, height, width, 3); the next one is read meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="read batches") as pool:
        following = None
        for start in range(0, len(images), batch_size):
            batch = following
            following = pool.submit(images.__getitem__, slice(start, start + batch_size))
            if batch is not None:
                yield batch.result()
        if following is not None:
            yield following.result()


@contextlib.contextmanager
def explain_unreadable(images: Images) -> Iterator[None]:
    """Raise the `DatasetError` of streamed images that TensorFlow failed to read."""
    try:
        yield
    except Exception as error:
        if isinstance(images, StreamedImages) and images.source.failure is not None:
            raise images.source.failure from error
        raise

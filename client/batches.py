"""Groups images into batches of one request, and merges the results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

from client.errors import ImageRejected
from client.images import ImageSource, LoadedImage, load_image
from client.predictions import Failure, Prediction

# A batch ends early rather than exceed this size; a larger image is a batch of its own.
MAX_BATCH_BYTES = 16 * 1024 * 1024

Batch = Sequence[LoadedImage | Failure]
Outcome = TypeVar("Outcome", Prediction, LoadedImage)


def validate_batch_size(batch_size: int) -> int:
    """Return the number of images per request; raise ValueError if it is less than 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    return batch_size


def read_batches(images: ImageSource | Iterable[ImageSource], batch_size: int) -> Iterator[Batch]:
    """Load images and yield them in batches, with a failure in the place of each that cannot be read."""
    batch: list[LoadedImage | Failure] = []
    batch_bytes = 0
    for index, source in enumerate(_iterate(images)):
        item = load_image(source, index=index)
        item_bytes = item.size_bytes if isinstance(item, LoadedImage) else 0
        if len(batch) == batch_size or batch_bytes + item_bytes > MAX_BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(item)
        batch_bytes += item_bytes
    if batch:
        yield batch


def separate(batch: Iterable[LoadedImage | Failure]) -> tuple[list[LoadedImage], dict[int, Prediction | Failure]]:
    """Return the images of a batch, which can be sent, and its failures by index."""
    images: list[LoadedImage] = []
    failures: dict[int, Prediction | Failure] = {}
    for item in batch:
        if isinstance(item, Failure):
            failures[item.index] = item
        else:
            images.append(item)
    return images, failures


def halve(images: list[LoadedImage]) -> list[list[LoadedImage]]:
    """Return both halves of several images, the first half last: it is sent next."""
    middle = len(images) // 2
    return [images[middle:], images[:middle]]


def require_success(outcome: Outcome | Failure) -> Outcome:
    """Return a prediction or an image, or raise `ImageRejected` for a failure."""
    if isinstance(outcome, Failure):
        raise ImageRejected(outcome.index, outcome.file, outcome.reason)
    return outcome


def _iterate(images: ImageSource | Iterable[ImageSource]) -> Iterable[ImageSource]:
    if isinstance(images, np.ndarray):
        return images if images.ndim == 4 else (images,)
    if isinstance(images, (str, os.PathLike, bytes, Image.Image)):
        return (images,)
    if hasattr(images, "read") or not isinstance(images, Iterable):
        # An open file is rejected too: iterating over it would take each line for an image.
        raise TypeError(
            "expected a path, the bytes of an encoded image, a uint8 array (height, width, 3), a Pillow image, "
            f"or an iterable of these; got {type(images).__name__}"
        )
    return images

"""Groups images into batches of one request, and runs several requests concurrently."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from client.errors import ImageRejected
from client.images import ImageSource, LoadedImage, load_image
from client.predictions import Failure, Prediction

# A batch ends early rather than exceed this size; a larger image is a batch of its own.
MAX_BATCH_BYTES = 16 * 1024 * 1024

Batch = Sequence[LoadedImage | Failure]
Outcome = TypeVar("Outcome", Prediction, LoadedImage)
Item = TypeVar("Item")
Result = TypeVar("Result")

# Python runs signal handlers in the main thread, between two instructions. A signal that arrives just before that
# thread blocks does not interrupt the wait, so each wait is short: Ctrl-C is handled within this time.
MAX_WAIT_S = 0.2


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


def map_in_order(
    function: Callable[[Item], Iterable[Result]], items: Iterable[Item], *, in_flight: int
) -> Iterator[Result]:
    """Call a function for each item, up to `in_flight` concurrently; yield the results in the order of the items.

    The first call is made alone, as it may fail for all; the others in threads. Items are read one by one, none before
    the first result is requested. A call's error is raised in its place, without awaiting the calls that run then.
    """
    remaining = iter(items)
    for first in remaining:
        yield from function(first)
        break
    calls: deque[Future[Iterable[Result]]] = deque()
    for item in remaining:
        calls.append(_start(function, item))
        if len(calls) == in_flight:
            yield from _wait_for(calls.popleft())
    while calls:
        yield from _wait_for(calls.popleft())


async def map_in_order_async(
    function: Callable[[Item], Coroutine[Any, Any, Iterable[Result]]], items: Iterable[Item], *, in_flight: int
) -> AsyncGenerator[Result, None]:
    """Like `map_in_order`, with a task for each call. The items are read in worker threads, as that may block.

    Tasks that are running when the generator is closed, or after an error, are cancelled.
    """
    remaining = iter(items)
    calls: deque[asyncio.Task[Iterable[Result]]] = deque()
    limit = 1  # until the first call has succeeded
    try:
        while (item := await asyncio.to_thread(next, remaining, None)) is not None:
            calls.append(asyncio.create_task(function(item)))
            if len(calls) == limit:
                for result in await calls.popleft():
                    yield result
                limit = in_flight
        while calls:
            for result in await calls.popleft():
                yield result
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


def _start(function: Callable[[Item], Result], item: Item) -> Future[Result]:
    future: Future[Result] = Future()

    def call() -> None:
        try:
            future.set_result(function(item))
        except BaseException as error:
            future.set_exception(error)

    # A daemon thread, so that the interpreter does not wait for it at exit.
    Thread(target=call, daemon=True).start()
    return future


def _wait_for(call: Future[Result]) -> Result:
    while not call.done():
        wait([call], timeout=MAX_WAIT_S)
    return call.result()

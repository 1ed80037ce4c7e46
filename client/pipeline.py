"""Runs several requests concurrently and yields their results in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Python runs signal handlers in the main thread, between two instructions. A signal that arrives just before that
# thread blocks does not interrupt the wait, so each wait is short: Ctrl-C is handled within this time.
MAX_WAIT_S = 0.2


def map_in_order(
    function: Callable[[Item], Iterable[Result]], items: Iterable[Item], *, in_flight: int
) -> Iterator[Result]:
    """Call a function for each item, some calls concurrently; yield the results in the order of the items.

    Args:
        function: called for the first item alone, as it may fail for all; for the others in threads.
        items: read one by one, none before the first result is requested.
        in_flight: the maximum number of concurrent calls.

    Raises:
        Exception: the function's error for an item, in its place. Calls that are running then are not awaited.
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

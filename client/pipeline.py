"""Several requests at once, their results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# The interpreter handles a signal between two instructions of the main thread. One that reaches the process just before
# that thread begins to wait does not end the wait, so no wait is long: Ctrl-C is heard within this time.
MAX_WAIT_S = 0.2


def map_in_order(
    function: Callable[[Item], Iterable[Result]], items: Iterable[Item], *, in_flight: int
) -> Iterator[Result]:
    """Call a function with each item, some calls at the same time; yield all that they return, in the items' order.

    Args:
        function: called for the first item alone, as it may fail for all; for the others in threads.
        items: taken one by one, none before the first result is asked for.
        in_flight: calls at the same time.

    Raises:
        Exception: what the function raises for an item, in its place. Calls that run then are left to themselves.
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


def _start(function: Callable[[Item], Result], item: Item) -> Future[Result]:
    future: Future[Result] = Future()

    def call() -> None:
        try:
            future.set_result(function(item))
        except BaseException as error:
            future.set_exception(error)

    # A thread that the interpreter does not wait for as it ends: not with the next Ctrl-C, at any rate.
    Thread(target=call, daemon=True).start()
    return future


def _wait_for(call: Future[Result]) -> Result:
    while not call.done():
        wait([call], timeout=MAX_WAIT_S)
    return call.result()

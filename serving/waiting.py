"""How a request waits without keeping others waiting.

Small requests run as greenlets of the event loop's one thread: Flask's views stay plain functions, and to wait is to
give way to the next request, for less than a microsecond. With a thread a request, the interpreter's lock changed hands
five times on the way to each answer, which took longer than the answer. Large requests run in threads, and
wait as threads do.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from contextvars import Context, ContextVar
from typing import ParamSpec, TypeVar

import greenlet

P = ParamSpec("P")
R = TypeVar("R")

MAX_IDLE = 256  # greenlets that are kept for the next requests

SMALL_BYTES = 256 * 1024  # of a request: read and answered within a few milliseconds

# Whether whoever sent the request being answered has gone, and no answer is wanted any more.
caller_is_gone: ContextVar[Callable[[], bool]] = ContextVar("caller_is_gone", default=lambda: False)


class LoopGreenlets:
    """The greenlets of the thread that an event loop runs in; made there.

    One that is through with a function serves for the next: with each new one Python maps memory for its frames, and
    unmaps it at its end, which takes as long as a good part of an answer.

    Args:
        threads: where they may send what would stop the loop.
    """

    def __init__(self, threads: Executor) -> None:
        self.loop = asyncio.get_running_loop()
        self.threads = threads
        self.idle: list[LoopGreenlet] = []

    def call(self, function: Callable[..., None], *args: object) -> None:
        """Call a function as a greenlet; returns when it has ended, or waits. It must not raise."""
        if not self.idle:
            LoopGreenlet(self).switch()
        self.idle.pop().switch(function, args)


class LoopGreenlet(greenlet.greenlet):
    """One of `LoopGreenlets`."""

    def __init__(self, siblings: LoopGreenlets) -> None:
        super().__init__()
        self.siblings = siblings

    def run(self) -> None:
        """Call one function after the other, as the switches bring them."""
        assert self.parent is not None
        while len(self.siblings.idle) < MAX_IDLE:
            self.siblings.idle.append(self)
            function, args = self.parent.switch()
            Context().run(function, *args)  # what it sets is not the next one's
            del function, args  # nor kept while there is nothing to do


class Pause:
    """Something to wait for, once, by whoever makes it: a greenlet or a thread."""

    __slots__ = ("_greenlet", "_lock", "_over")

    def __init__(self) -> None:
        current = greenlet.getcurrent()
        self._over = False
        self._greenlet = current if isinstance(current, LoopGreenlet) else None
        if self._greenlet is None:
            self._lock = threading.Lock()
            self._lock.acquire()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for `end_pauses`; returns whether it came, and not the timeout."""
        if self._greenlet is None:
            return self._lock.acquire(timeout=-1.0 if timeout_s is None else max(0.0, timeout_s))
        timer = None
        if timeout_s is not None and not self._over:
            timer = self._greenlet.siblings.loop.call_later(max(0.0, timeout_s), self._greenlet.switch)
        while not self._over:
            assert self._greenlet.parent is not None
            self._greenlet.parent.switch()
            if timer and not self._over:
                return False
        if timer:
            timer.cancel()
        return True

    def _end(self) -> None:
        self._over = True
        if self._greenlet:
            self._greenlet.switch()


def end_pauses(pauses: Iterable[Pause]) -> None:
    """Wake those who wait for these; called from any thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Pause]] = {}
    for pause in pauses:
        if pause._greenlet is None:
            pause._lock.release()
        else:
            by_loop.setdefault(pause._greenlet.siblings.loop, []).append(pause)
    for loop, group in by_loop.items():
        if asyncio._get_running_loop() is loop and not isinstance(greenlet.getcurrent(), LoopGreenlet):
            _end_all(group)
            continue
        with contextlib.suppress(RuntimeError):  # the loop has ended, and they with it
            loop.call_soon_threadsafe(_end_all, group)


def _end_all(pauses: list[Pause]) -> None:
    for pause in pauses:
        pause._end()


def call_soon(function: Callable[..., object], *args: object) -> None:
    """Call a function when the event loop has gone through the requests at hand; in a thread, at once."""
    current = greenlet.getcurrent()
    if isinstance(current, LoopGreenlet):
        current.siblings.loop.call_soon(function, *args)
    else:
        function(*args)


async def call_from_loop(function: Callable[[], R], *, greenlets: LoopGreenlets, is_small: bool) -> R:
    """Call a function that waits from a coroutine, which is not to be kept waiting by it.

    Where the coroutine is cancelled the function goes on, and `caller_is_gone` tells it.

    Args:
        function: what to call; it must not raise.
        greenlets: those of the loop; it is called in one of their threads if it is not small.
        is_small: it computes for a few milliseconds at most, and can be a greenlet of the loop.
    """
    returned: asyncio.Future[R] = greenlets.loop.create_future()

    def call() -> R:
        caller_is_gone.set(returned.cancelled)
        return function()

    def finish(result: R) -> None:
        if not returned.cancelled():
            returned.set_result(result)

    if is_small:
        greenlets.call(lambda: finish(call()))
    else:
        greenlets.threads.submit(lambda: greenlets.loop.call_soon_threadsafe(finish, call()))
    return await returned


def offload(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function that takes long: a greenlet has a thread do it meanwhile, a thread does it itself."""
    current = greenlet.getcurrent()
    if not isinstance(current, LoopGreenlet):
        return function(*args, **kwargs)
    pause = Pause()
    future = current.siblings.threads.submit(function, *args, **kwargs)
    future.add_done_callback(lambda _: end_pauses([pause]))
    pause.wait()
    return future.result()

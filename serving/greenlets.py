"""How a request waits without keeping others waiting.

Small requests run as greenlets of the event loop's one thread: Flask's views stay plain functions, and to wait is to
give way to the next request, for less than a microsecond. With a thread a request, the interpreter's lock changed hands
five times on the way to each answer, which took longer than the answer. What computes for long in a request is left to
one of a few threads, and the greenlet waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextvars import Context
from typing import ParamSpec, TypeVar

import greenlet

from serving.request_context import RequestContext, current_request

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

BLOCKING_THREADS = 64
NICENESS = 5  # of threads that compute for long: the event loop and short calls of the models come first

MAX_IDLE = 256  # greenlets that are kept for the next requests

SMALL_BYTES = 256 * 1024  # of a request: read and answered within a few milliseconds

# Greenlets that are ready are run for so long at a time; then the event loop looks for new data, so that thousands of
# requests that come at once do not keep it from health checks and new connections.
SLICE_S = 0.004

TIMEOUT_STEP_S = 0.02  # how late a timeout may be


class LoopGreenlets:
    """The greenlets of the thread that an event loop runs in; made there.

    One that is through with a function serves for the next: with each new one Python maps memory for its frames, and
    unmaps it at its end, which takes as long as a good part of an answer.

    Args:
        threads: where they send what computes for long. As few as there are cores: each may hold the interpreter's lock
            for long, and the loop would wait for one after the other.
    """

    def __init__(self, threads: Executor) -> None:
        self.loop = asyncio.get_running_loop()
        self.threads = threads
        self.blocking_threads = ThreadPoolExecutor(BLOCKING_THREADS, thread_name_prefix="blocking")  # for what waits
        self.timeouts = Timeouts()
        self.idle: list[LoopGreenlet] = []
        self._ready: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()
        self._is_drain_due = False
        self._call_s = 0.0  # a moving average

    @property
    def queue_s(self) -> float:
        """How long a function that is enqueued now has to wait for its turn, by estimate."""
        return len(self._ready) * self._call_s

    def enqueue(self, function: Callable[..., None], *args: object, is_urgent: bool = False) -> None:
        """Call a function as a greenlet when its turn comes; an urgent one comes first. It must not raise."""
        if is_urgent:
            self._ready.appendleft((function, args))
        else:
            self._ready.append((function, args))
        if not self._is_drain_due:
            self._is_drain_due = True
            self.loop.call_soon(self._drain)

    def _drain(self) -> None:
        started_s = time.perf_counter()
        count, elapsed_s = 0, 0.0
        while self._ready and elapsed_s <= SLICE_S:
            function, args = self._ready.popleft()
            self.call(function, *args)
            count += 1
            elapsed_s = time.perf_counter() - started_s
        self._call_s += 0.1 * (elapsed_s / count - self._call_s)
        self._is_drain_due = bool(self._ready)
        if self._ready:
            self.loop.call_soon(self._drain)

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
            try:
                Context().run(function, *args)  # what it sets is not the next one's
            except Exception:
                logger.exception("a call that must not raise did")
            del function, args  # nor kept while there is nothing to do


def lower_priority() -> None:
    """Lower the priority of the current thread, where the system has priorities for threads: on Linux."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class Waiter:
    """Something to wait for, once, by whoever makes it: a greenlet or a thread."""

    __slots__ = ("_greenlet", "_is_waiting", "_lock", "_over")

    def __init__(self) -> None:
        current = greenlet.getcurrent()
        self._over = False
        self._is_waiting = False
        self._greenlet = current if isinstance(current, LoopGreenlet) else None
        if self._greenlet is None:
            self._lock = threading.Lock()
            self._lock.acquire()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for `wake_all`; returns whether it came, and not the timeout."""
        if self._greenlet is None:
            return self._lock.acquire(timeout=-1.0 if timeout_s is None else max(0.0, timeout_s))
        if self._over:
            return True
        timeouts = self._greenlet.siblings.timeouts
        if timeout_s is not None:
            timeouts.add(self, timeout_s)
        assert self._greenlet.parent is not None
        self._is_waiting = True
        self._greenlet.parent.switch()
        self._is_waiting = False
        if timeout_s is not None:
            timeouts.discard(self)
        return self._over

    def _end(self) -> None:
        self._over = True
        self._resume()

    def _resume(self) -> None:
        if self._greenlet and self._is_waiting:  # else the greenlet has gone on, and may wait for something else
            self._greenlet.switch()


class Timeouts:
    """The timeouts of the waiters of an event loop; made in its thread.

    Nearly every waiter is over long before, and a timer of the loop takes longer to make and to cancel than a request
    may: so there is one for all, and a timeout may come TIMEOUT_STEP_S late.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ends_s: dict[Waiter, float] = {}
        self._is_check_due = False

    def add(self, waiter: Waiter, timeout_s: float) -> None:
        """Resume a waiter after so many seconds."""
        self._ends_s[waiter] = self._loop.time() + timeout_s
        if not self._is_check_due:
            self._is_check_due = True
            self._loop.call_later(TIMEOUT_STEP_S, self._check)

    def discard(self, waiter: Waiter) -> None:
        """Forget a waiter that has resumed."""
        self._ends_s.pop(waiter, None)

    def _check(self) -> None:
        now_s = self._loop.time()
        for waiter in [waiter for waiter, end_s in self._ends_s.items() if end_s <= now_s]:
            waiter._resume()
        self._is_check_due = bool(self._ends_s)
        if self._is_check_due:
            self._loop.call_later(TIMEOUT_STEP_S, self._check)


def wake_all(waiters: Iterable[Waiter]) -> None:
    """Wake those who wait for these; called from any thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Waiter]] = {}
    for waiter in waiters:
        if waiter._greenlet is None:
            waiter._lock.release()
        else:
            by_loop.setdefault(waiter._greenlet.siblings.loop, []).append(waiter)
    for loop, group in by_loop.items():
        if asyncio._get_running_loop() is loop and not isinstance(greenlet.getcurrent(), LoopGreenlet):
            _wake_group(group)
            continue
        with contextlib.suppress(RuntimeError):  # the loop has ended, and they with it
            loop.call_soon_threadsafe(_wake_group, group)


def _wake_group(waiters: list[Waiter]) -> None:
    for waiter in waiters:
        waiter._end()


def call_soon(function: Callable[..., object], *args: object) -> None:
    """Call a function when the event loop has gone through the requests at hand; in a thread, at once."""
    current = greenlet.getcurrent()
    if isinstance(current, LoopGreenlet):
        current.siblings.loop.call_soon(function, *args)
    else:
        function(*args)


async def call_from_loop(
    function: Callable[[], R],
    *,
    greenlets: LoopGreenlets,
    in_thread: bool = False,
    make_context: Callable[[Callable[[], bool]], RequestContext] = lambda is_cancelled: RequestContext(
        client_disconnected=is_cancelled
    ),
) -> R:
    """Call a function that waits from a coroutine, which is not to be kept waiting by it.

    Where the coroutine is cancelled the function goes on, and the context's `client_disconnected` tells it.

    Args:
        function: what to call; it must not raise.
        greenlets: those of the loop.
        in_thread: it blocks for long, and is called in one of their threads rather than as a greenlet.
        make_context: makes the request's context, of what tells whether the coroutine was cancelled.
    """
    returned: asyncio.Future[R] = greenlets.loop.create_future()

    def call() -> R:
        current_request.set(make_context(returned.cancelled))
        return function()

    def finish(result: R) -> None:
        if not returned.cancelled():
            returned.set_result(result)

    if in_thread:
        greenlets.blocking_threads.submit(lambda: greenlets.loop.call_soon_threadsafe(finish, call()))
    else:
        greenlets.enqueue(lambda: finish(call()))
    return await returned


def run_sized(size_bytes: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function whose time grows with a size: here where that is small, else as `offload` does."""
    return function(*args, **kwargs) if size_bytes <= SMALL_BYTES else offload(function, *args, **kwargs)


def offload(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function that computes for long: a greenlet in a worker thread meanwhile, a thread directly."""
    current = greenlet.getcurrent()
    if not isinstance(current, LoopGreenlet):
        return function(*args, **kwargs)
    return _call_in_thread(current.siblings.threads, function, *args, **kwargs)


def run_blocking(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function that waits for long, for another process or server: as `offload`, in a thread of another kind."""
    current = greenlet.getcurrent()
    if not isinstance(current, LoopGreenlet):
        return function(*args, **kwargs)
    return _call_in_thread(current.siblings.blocking_threads, function, *args, **kwargs)


def _call_in_thread(threads: Executor, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    return wait_for(threads.submit(function, *args, **kwargs))


def wait_for(future: Future[R]) -> R:
    """Wait for a future, and return its result or raise its exception."""
    waiter = Waiter()
    future.add_done_callback(lambda _: wake_all([waiter]))
    waiter.wait()
    return future.result()

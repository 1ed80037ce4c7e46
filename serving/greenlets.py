"""Greenlet pool: runs small blocking handlers on the event-loop thread, and long computations in worker threads.

Flask views stay plain functions: a handler that waits switches to the next one in less than a microsecond. With one
thread per request, the interpreter lock changed hands five times per response, which took longer than the response.
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
NICENESS = 5  # of worker threads, below the event loop and short model calls

MAX_IDLE = 256  # greenlets kept for reuse

SMALL_BYTES = 256 * 1024  # a request up to this size is processed within a few milliseconds

# The event loop polls for I/O after running greenlets for this time, so that a burst of requests does not block health
# checks and new connections.
SLICE_S = 0.004

TIMEOUT_STEP_S = 0.02  # resolution of timeouts


class LoopGreenlets:
    """The greenlet pool of one event loop; created in its thread.

    Greenlets are reused, because Python maps and unmaps memory for the frames of each new one.

    Args:
        threads: worker threads for long computations. No more than cores: the event loop waits for each thread that
            holds the interpreter lock.
    """

    def __init__(self, threads: Executor) -> None:
        self.loop = asyncio.get_running_loop()
        self.threads = threads
        self.blocking_threads = ThreadPoolExecutor(BLOCKING_THREADS, thread_name_prefix="blocking")
        self.idle: list[LoopGreenlet] = []
        self._ready: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()
        self._is_drain_due = False
        self._call_s = 0.0  # a moving average
        self._timeouts_s: dict[Waiter, float] = {}  # when each ends, on the event loop's clock
        self._is_check_due = False

    @property
    def queue_s(self) -> float:
        """Estimated queueing time of a function that is enqueued now."""
        return len(self._ready) * self._call_s

    def enqueue(self, function: Callable[..., None], *args: object, is_urgent: bool = False) -> None:
        """Queue a function to run as a greenlet; an urgent one is queued first. It must not raise."""
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
        if self._is_drain_due:
            self.loop.call_soon(self._drain)

    def call(self, function: Callable[..., None], *args: object) -> None:
        """Run a function as a greenlet; returns when it has returned or waits. It must not raise."""
        if not self.idle:
            LoopGreenlet(self).switch()
        self.idle.pop().switch(function, args)

    def add_timeout(self, waiter: Waiter, timeout_s: float) -> None:
        """Resume a waiter after `timeout_s`, or up to TIMEOUT_STEP_S later.

        One timer serves all waiters, because creating and cancelling a timer per waiter is too slow and timeouts are
        rare.
        """
        self._timeouts_s[waiter] = self.loop.time() + timeout_s
        if not self._is_check_due:
            self._is_check_due = True
            self.loop.call_later(TIMEOUT_STEP_S, self._check_timeouts)

    def discard_timeout(self, waiter: Waiter) -> None:
        """Remove a waiter that has resumed."""
        self._timeouts_s.pop(waiter, None)

    def _check_timeouts(self) -> None:
        now_s = self.loop.time()
        for waiter in [waiter for waiter, end_s in self._timeouts_s.items() if end_s <= now_s]:
            waiter._resume()
        self._is_check_due = bool(self._timeouts_s)
        if self._is_check_due:
            self.loop.call_later(TIMEOUT_STEP_S, self._check_timeouts)


class LoopGreenlet(greenlet.greenlet):
    """A reusable greenlet of a pool."""

    def __init__(self, pool: LoopGreenlets) -> None:
        super().__init__()
        self.pool = pool

    def run(self) -> None:
        """Run the functions that are passed to `switch`."""
        assert self.parent is not None
        while len(self.pool.idle) < MAX_IDLE:
            self.pool.idle.append(self)
            function, args = self.parent.switch()
            try:
                Context().run(function, *args)  # isolates context variables
            except Exception:
                logger.exception("unhandled exception in a greenlet")
            del function, args  # an idle greenlet must not keep references


def lower_priority() -> None:
    """Lower the priority of the current thread (Linux only)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class Waiter:
    """One-shot event that blocks the greenlet or thread that created it until `wake_all`."""

    __slots__ = ("_greenlet", "_is_set", "_is_waiting", "_lock")

    def __init__(self) -> None:
        current = greenlet.getcurrent()
        self._is_set = False
        self._is_waiting = False
        self._greenlet = current if isinstance(current, LoopGreenlet) else None
        if self._greenlet is None:
            self._lock = threading.Lock()
            self._lock.acquire()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until `wake_all`; returns False on timeout."""
        if self._greenlet is None:
            return self._lock.acquire(timeout=-1.0 if timeout_s is None else max(0.0, timeout_s))
        if self._is_set:
            return True
        pool = self._greenlet.pool
        if timeout_s is not None:
            pool.add_timeout(self, timeout_s)
        assert self._greenlet.parent is not None
        self._is_waiting = True
        self._greenlet.parent.switch()
        self._is_waiting = False
        if timeout_s is not None:
            pool.discard_timeout(self)
        return self._is_set

    def _resume(self) -> None:
        if self._greenlet and self._is_waiting:  # else it timed out, and may wait for another event
            self._greenlet.switch()


def wake_all(waiters: Iterable[Waiter]) -> None:
    """Set these waiters and resume their greenlets and threads. Thread-safe."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Waiter]] = {}
    for waiter in waiters:
        if waiter._greenlet is None:
            waiter._lock.release()
        else:
            by_loop.setdefault(waiter._greenlet.pool.loop, []).append(waiter)
    for loop, group in by_loop.items():
        if asyncio._get_running_loop() is loop and not isinstance(greenlet.getcurrent(), LoopGreenlet):
            _wake_group(group)
            continue
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(_wake_group, group)


def _wake_group(waiters: list[Waiter]) -> None:
    for waiter in waiters:
        waiter._is_set = True
        waiter._resume()


def call_soon(function: Callable[..., object], *args: object) -> None:
    """Call a function in the next iteration of the event loop; outside a greenlet, immediately."""
    current = greenlet.getcurrent()
    if isinstance(current, LoopGreenlet):
        current.pool.loop.call_soon(function, *args)
    else:
        function(*args)


async def call_from_loop(
    function: Callable[[], R],
    *,
    greenlets: LoopGreenlets,
    in_thread: bool = False,
    make_context: Callable[[Callable[[], bool]], RequestContext] = lambda cancelled: RequestContext(None, cancelled),
) -> R:
    """Call a blocking function from a coroutine without blocking the event loop.

    If the coroutine is cancelled the function continues, and the context's `client_disconnected` returns True.

    Args:
        function: it must not raise.
        greenlets: the greenlet pool of the event loop.
        in_thread: call it in a blocking thread instead of a greenlet, because it blocks for long.
        make_context: callable(is_cancelled) that makes the request context.
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
    """Call a function whose duration grows with the size: directly up to SMALL_BYTES, else with `offload`."""
    return function(*args, **kwargs) if size_bytes <= SMALL_BYTES else offload(function, *args, **kwargs)


def offload(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a long computation without blocking the event loop: from a greenlet in a worker thread, else directly."""
    current = greenlet.getcurrent()
    if not isinstance(current, LoopGreenlet):
        return function(*args, **kwargs)
    return wait_for(current.pool.threads.submit(function, *args, **kwargs))


def run_blocking(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Like `offload`, for a function that waits for I/O: in one of the BLOCKING_THREADS."""
    current = greenlet.getcurrent()
    if not isinstance(current, LoopGreenlet):
        return function(*args, **kwargs)
    return wait_for(current.pool.blocking_threads.submit(function, *args, **kwargs))


def wait_for(future: Future[R]) -> R:
    """Wait for a future in a greenlet or thread, and return its result or raise its exception."""
    waiter = Waiter()
    future.add_done_callback(lambda _: wake_all([waiter]))
    waiter.wait()
    return future.result()

"""Memory budget: limits the memory of all in-flight requests while they are received, inflated, parsed and decoded.

A request reserves memory before each step. If too little is free, it waits in a first-in, first-out queue until its
deadline. Thread-safe; independent of protocols and models.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Self

from serving.errors import Overloaded, TooLarge
from serving.greenlets import Waiter, wake_all
from serving.process_memory import free_bytes, return_freed_memory

# Shares of the budget. Small requests have their own pool, so that large ones cannot block them. In the large pool,
# bodies share a part only, so that received requests can be processed; a single body may take all.
SMALL_SHARE = 1 / 8
BODIES_SHARE = 1 / 2

SMALL_STEP_BYTES = 8 * 1024 * 1024  # larger steps use the large pool

UNCOUNTED_BYTES = 512 * 1024  # received of a body before its first reservation is granted

# A gRPC message that is being received cannot wait for memory, so a refusal marks the pool as contended for this time.
CONTENDED_AFTER_REFUSAL_S = 1.0

# Larger reservations return their pages to the system before they are released: glibc keeps freed memory per thread,
# so another thread would allocate the same amount again.
TRIM_BYTES = 8 * 1024 * 1024
TRIM_INTERVAL_S = 0.5  # malloc_trim blocks allocations in other threads


class MemoryBudget:
    """The memory budget of one process: a pool for small requests and one for large requests.

    Args:
        total_bytes: the size of both pools together; None: the free memory of the container or machine, updated by
            `adapt`.
        processes: among how many processes the memory of the container or machine is divided.
    """

    def __init__(self, total_bytes: int | None = None, *, processes: int = 1) -> None:
        self._processes = processes
        self._is_fixed = total_bytes is not None
        self.small = Pool("memory for small requests")
        self.large = Pool("memory")
        self._divide(free_bytes(processes=processes) if total_bytes is None else total_bytes)

    @property
    def total_bytes(self) -> int:
        """Size of both pools."""
        return self.small.limit + self.large.limit

    @property
    def used_bytes(self) -> int:
        """Reserved bytes in both pools."""
        return self.small.used + self.large.used

    def adapt(self, *, in_use: bool = False) -> None:
        """Update the budget after models were loaded or unloaded.

        Does nothing while requests hold memory, because freed memory that the allocator keeps cannot be distinguished
        from that of the models.

        Args:
            in_use: update even if requests hold memory: once, after the first models are loaded.
        """
        used_bytes = self.used_bytes
        if not self._is_fixed and (in_use or not used_bytes):
            self._divide(free_bytes(processes=self._processes) + used_bytes)

    def _divide(self, total_bytes: int) -> None:
        small_bytes = int(total_bytes * SMALL_SHARE)
        large_bytes = total_bytes - small_bytes
        self.small.resize(small_bytes)
        self.large.resize(large_bytes, body_limit=int(large_bytes * BODIES_SHARE))


class RequestMemory:
    """The reservations of one request: for its body, and for inflating, parsing and decoding it.

    Not thread-safe. Once a request holds memory of the large pool, it reserves only there: no request waits for the
    small pool while it holds large memory, so the two pools cannot deadlock.
    """

    __slots__ = ("_large", "_small")

    def __init__(self, budget: MemoryBudget) -> None:
        self._small = Reservation(budget.small)
        self._large = Reservation(budget.large)

    @property
    def held_bytes(self) -> int:
        """Reserved bytes in both pools."""
        return self._small.held + self._large.held

    @property
    def is_contended(self) -> bool:
        """Whether other requests wait for a pool of which this request holds memory."""
        return any(part.held and part.pool.is_contended for part in (self._large, self._small))

    def try_small_body(self, size_bytes: int) -> bool:
        """Reserve memory for a small body without waiting; returns False if none is free or others wait."""
        return self._small.try_grow(size_bytes, is_body=True)

    async def grow_body(self, more_bytes: int, *, is_small: bool, deadline_s: float) -> None:
        """Reserve memory for more of the body; waits in a coroutine. See `Reservation.grow`."""
        reservation = self._small if is_small else self._large
        await reservation.grow_async(more_bytes, is_body=True, deadline_s=deadline_s)

    def try_large_body(self, size_bytes: int) -> bool:
        """Reserve memory for a large body without waiting; a failure marks the pool as contended."""
        if self._large.try_grow(size_bytes, is_body=True):
            return True
        self._large.pool.refused_s = time.monotonic()
        return False

    def shrink_body_to(self, size_bytes: int) -> None:
        """Release memory that was reserved for a large body beyond its actual size."""
        self._large.shrink_body_to(size_bytes)

    def check_fits(self, more_bytes: int) -> None:
        """Raise TooLarge if the large pool could never hold this much more for the request."""
        self._large.pool.check_fits(self._large, more_bytes)

    def grow(self, more_bytes: int, *, deadline_s: float | None) -> None:
        """Reserve memory for the next step; waits in a greenlet or thread. See `Reservation.grow`."""
        most_bytes = min(SMALL_STEP_BYTES, self._small.pool.limit // 4)
        is_small = not self._large.held and self._small.held + more_bytes <= most_bytes
        (self._small if is_small else self._large).grow(more_bytes, is_body=False, deadline_s=deadline_s)

    def shrink(self, fewer_bytes: int) -> None:
        """Release the memory of the last step; from TRIM_BYTES, return freed pages to the system first."""
        if fewer_bytes >= TRIM_BYTES:
            return_freed_memory(at_most_every_s=TRIM_INTERVAL_S)
        (self._large if self._large.held > self._large.held_for_body else self._small).shrink(fewer_bytes)

    def release(self) -> None:
        """Release everything; from TRIM_BYTES, return freed pages to the system first."""
        if self.held_bytes >= TRIM_BYTES:
            return_freed_memory(at_most_every_s=TRIM_INTERVAL_S)
        self._small.release()
        self._large.release()

    def release_in(self, threads: Executor) -> None:
        """Release everything; in a worker thread if pages are returned to the system, which takes milliseconds."""
        if self.held_bytes >= TRIM_BYTES:
            threads.submit(self.release)
        else:
            self.release()


@dataclass(eq=False, slots=True)
class _GrowRequest:
    """A queued request to grow a reservation."""

    reservation: Reservation
    more: int
    is_body: bool
    wake: Callable[[], object] = lambda: None
    is_granted: bool = False
    is_refused: bool = False


class Pool:
    """A limited amount of bytes or other units, granted to reservations in first-in, first-out order.

    Reservations that hold units and wait for more could deadlock. When all holders wait, the youngest of them is
    refused (503), so the oldest always makes progress. `what` is the name of the units in error messages.
    `shed_reason` is the one of the refusals, in metrics.
    """

    def __init__(self, what: str, limit: int = 0, *, shed_reason: str = "memory") -> None:
        self.what = what
        self.shed_reason = shed_reason
        self.resize(limit)
        self._bodies_used = 0
        self.used = 0
        self._lock = threading.Lock()
        self._queue: list[_GrowRequest] = []  # oldest first
        self._holders = 0  # reservations that hold units
        self.refused_s = -math.inf  # last refusal of a request that cannot wait

    def resize(self, limit: int, *, body_limit: int | None = None) -> None:
        """Set the size, and the part that bodies may take (default: all)."""
        self.limit = limit
        self.body_limit = limit if body_limit is None else body_limit

    @property
    def has_waiters(self) -> bool:
        """Whether any reservation waits."""
        return bool(self._queue)

    @property
    def is_contended(self) -> bool:
        """Whether any reservation waits, or was refused within CONTENDED_AFTER_REFUSAL_S."""
        return self.has_waiters or time.monotonic() - self.refused_s < CONTENDED_AFTER_REFUSAL_S

    def reserve(self, size: int, *, deadline_s: float | None) -> Reservation:
        """Make a reservation; waits in a greenlet or thread. See `Reservation.grow`."""
        reservation = Reservation(self)
        reservation.grow(size, is_body=False, deadline_s=deadline_s)
        return reservation

    def check_fits(self, reservation: Reservation, more: int) -> None:
        """Raise TooLarge if a reservation could never grow by this much."""
        if reservation.held + more > self.limit:
            raise TooLarge(
                f"the request needs about {reservation.held + more:,} bytes of {self.what}, the limit is "
                f"{self.limit:,}; send smaller requests"
            )

    def _fits(self, reservation: Reservation, more: int, *, is_body: bool) -> bool:
        if self.used + more > self.limit:
            return False
        others = self._bodies_used - reservation.held_for_body
        return not is_body or not others or self._bodies_used + more <= self.body_limit

    def _try_grow(self, reservation: Reservation, more: int, *, is_body: bool) -> bool:
        with self._lock:
            # Bodies queue only behind bodies, and processing steps only behind processing steps.
            must_queue = any(other.is_body == is_body for other in self._queue)
            if must_queue or not self._fits(reservation, more, is_body=is_body):
                return False
            self._add(reservation, more, is_body=is_body)
            return True

    def _add(self, reservation: Reservation, more: int, *, is_body: bool) -> None:
        """Add units to a reservation, or remove them if `more` is negative."""
        self._holders += not reservation.held
        self.used += more
        reservation.held += more
        if is_body:
            self._bodies_used += more
            reservation.held_for_body += more
        self._holders -= not reservation.held

    def _release_all(self, reservation: Reservation) -> None:
        self._holders -= 1
        self.used -= reservation.held
        self._bodies_used -= reservation.held_for_body
        reservation.held = reservation.held_for_body = 0

    def _release(self, reservation: Reservation) -> None:
        with self._lock:
            if reservation.held:
                self._release_all(reservation)
            woken = self._grant_queued() if self._queue else ()
        for request in woken:
            request.wake()

    def _shrink(self, reservation: Reservation, fewer: int, *, is_body: bool) -> None:
        with self._lock:
            self._add(reservation, -fewer, is_body=is_body)
            woken = self._grant_queued()
        for request in woken:
            request.wake()

    def _enqueue(self, request: _GrowRequest) -> None:
        self.check_fits(request.reservation, request.more)
        if request.is_body and len(self._queue) * UNCOUNTED_BYTES > self.body_limit:
            raise Overloaded("too many uploads wait for memory; try again later", shed_reason=self.shed_reason)
        with self._lock:
            self._queue.append(request)
            woken = self._grant_queued()
        for other in woken:
            other.wake()

    def _cancel(self, request: _GrowRequest) -> None:
        """Remove from the queue, unless it was granted meanwhile."""
        with self._lock:
            if request.is_granted or request.is_refused:
                return
            self._queue.remove(request)
            request.is_refused = True
            woken = self._grant_queued()
        for other in woken:
            other.wake()

    def _fits_request(self, request: _GrowRequest) -> bool:
        return self._fits(request.reservation, request.more, is_body=request.is_body)

    def _grant_queued(self) -> Sequence[_GrowRequest]:
        """Grant what fits, oldest first, and resolve deadlocks; returns the requests to wake."""
        woken: list[_GrowRequest] = []
        while self._queue:
            request = self._oldest_that_fits()
            if request is None:
                holding = [other for other in self._queue if other.reservation.held]
                if not holding or len(holding) != self._holders:
                    break
                # Deadlock, all holders wait: grant one out of order, or refuse the youngest.
                request = next(filter(self._fits_request, holding), None)
            if request is None:
                request = holding[-1]
                self._release_all(request.reservation)
                request.is_refused = True
            else:
                self._add(request.reservation, request.more, is_body=request.is_body)
                request.is_granted = True
            self._queue.remove(request)
            woken.append(request)
        return woken

    def _oldest_that_fits(self) -> _GrowRequest | None:
        """Return the oldest processing step, or else the oldest body, if it fits."""
        for is_body in (False, True):
            oldest = next((request for request in self._queue if request.is_body == is_body), None)
            if oldest and self._fits_request(oldest):
                return oldest
        return None


class Reservation:
    """Units of a pool held by one request. A context manager that releases them; not thread-safe."""

    __slots__ = ("held", "held_for_body", "pool")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.held = 0
        self.held_for_body = 0  # part of `held`

    def try_grow(self, more: int, *, is_body: bool) -> bool:
        """Reserve more without waiting; returns False if it is not free or others wait."""
        return self.pool._try_grow(self, more, is_body=is_body)

    def grow(self, more: int, *, is_body: bool, deadline_s: float | None) -> None:
        """Reserve more; waits in a greenlet or thread, until `deadline_s` on the clock of `time.monotonic()`.

        Raises:
            TooLarge: the pool is smaller than the reservation would be.
            Overloaded: the deadline passed, or the reservation was refused to resolve a deadlock.
        """
        if self.pool._try_grow(self, more, is_body=is_body):
            return
        request = _GrowRequest(self, more, is_body)
        waiter = Waiter()
        request.wake = lambda: wake_all([waiter])
        self.pool._enqueue(request)
        if not waiter.wait(None if deadline_s is None else deadline_s - time.monotonic()):
            self.pool._cancel(request)
        self._check(request)

    async def grow_async(self, more: int, *, is_body: bool, deadline_s: float | None) -> None:
        """Reserve more; waits in a coroutine. See `grow`."""
        if self.pool._try_grow(self, more, is_body=is_body):
            return
        request = _GrowRequest(self, more, is_body)
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        request.wake = lambda: loop.call_soon_threadsafe(woken.set)
        self.pool._enqueue(request)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if deadline_s is None else deadline_s - time.monotonic()):
                    await woken.wait()
        except asyncio.CancelledError:
            self.pool._cancel(request)
            if request.is_granted:
                self.pool._shrink(self, more, is_body=is_body)
            raise
        self.pool._cancel(request)
        self._check(request)

    def _check(self, request: _GrowRequest) -> None:
        if not request.is_granted:
            raise Overloaded(
                f"no {self.pool.what} was free in time: {self.pool.used:,} of {self.pool.limit:,} are in use; "
                "try again later",
                shed_reason=self.pool.shed_reason,
            )

    def shrink_body_to(self, size: int) -> None:
        """Release units held for the body beyond this size."""
        self.pool._shrink(self, max(0, self.held_for_body - size), is_body=True)

    def shrink(self, fewer: int) -> None:
        """Release units that are not held for the body."""
        self.pool._shrink(self, min(fewer, self.held - self.held_for_body), is_body=False)

    def release(self) -> None:
        """Release everything."""
        if self.held:
            self.pool._release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

"""The memory budget: what requests that are being read, inflated, parsed and decoded may occupy together.

A request reserves memory before each step that needs it. Requests that do not fit wait in the order in which they
asked, until their deadline. Knows nothing of protocols and models.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from serving.errors import Overloaded, TooLarge
from serving.waiting import Pause, end_pauses

# Shares of the budget. Bodies have a share of their own, so that requests that have been read can always be worked on;
# and small bodies another, so that large uploads cannot keep small requests waiting.
SMALL_BODIES_SHARE = 1 / 16
LARGE_BODIES_SHARE = 1 / 4

SAFETY_SHARE = 0.9  # of what is free: allocators and sockets have costs that no request accounts for

# A reservation of more gives its pages back to the system when it ends, before the next one may use them: the C library
# keeps freed memory per thread, so what one thread has freed another would allocate once more.
TRIM_BYTES = 8 * 1024 * 1024


class MemoryBudget:
    """The pools of one process.

    Args:
        total_bytes: of all pools together; None: what the system or the container leaves beside this process, adapted
            by `adapt`.
    """

    def __init__(self, total_bytes: int | None = None) -> None:
        self._is_fixed = total_bytes is not None
        self.small_bodies = Pool("memory for small request bodies")
        self.large_bodies = Pool("memory for large request bodies")
        self.work = Pool("memory for parsing and decoding")
        self._divide(free_bytes() if total_bytes is None else total_bytes)

    @property
    def total_bytes(self) -> int:
        """The size of all pools together."""
        return self._total_bytes

    @property
    def used_bytes(self) -> int:
        """What is reserved in all pools."""
        return sum(pool.used_bytes for pool in (self.small_bodies, self.large_bodies, self.work))

    def adapt(self) -> None:
        """Take note of what models that were loaded or unloaded leave; does nothing while requests hold memory."""
        if not self._is_fixed and not self.used_bytes:
            self._divide(free_bytes())

    def _divide(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self.small_bodies.limit_bytes = int(total_bytes * SMALL_BODIES_SHARE)
        self.large_bodies.limit_bytes = int(total_bytes * LARGE_BODIES_SHARE)
        self.work.limit_bytes = total_bytes - self.small_bodies.limit_bytes - self.large_bodies.limit_bytes


@dataclass(eq=False, slots=True)
class _Waiter:
    """A reservation that waits to grow."""

    reservation: Reservation
    more_bytes: int
    wake: Callable[[], object]
    is_granted: bool = False
    is_refused: bool = False


class Pool:
    """A number of bytes, or of other things, that reservations share in the order in which they ask.

    Two reservations that have grown and want more could wait for each other for ever. Where all that hold memory wait,
    the youngest of them is refused (503), so the oldest always gets on.

    Args:
        what: its name in messages.
        limit_bytes: its size.
    """

    def __init__(self, what: str, limit_bytes: int = 0) -> None:
        self.what = what
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._lock = threading.Lock()
        self._waiters: deque[_Waiter] = deque()
        self._holders = 0  # reservations of more than nothing

    @property
    def is_contended(self) -> bool:
        """Whether anyone waits for memory."""
        return bool(self._waiters)

    def reserve(self, size_bytes: int, *, deadline_s: float | None) -> Reservation:
        """Reserve memory; a greenlet or thread waits until there is some. See `Reservation.grow`."""
        reservation = Reservation(self)
        reservation.grow(size_bytes, deadline_s=deadline_s)
        return reservation

    def check_fits(self, size_bytes: int) -> None:
        """Raise TooLarge if one request could never have so much."""
        if size_bytes > self.limit_bytes:
            raise TooLarge(
                f"the request needs about {size_bytes:,} bytes of {self.what}, and the service has "
                f"{self.limit_bytes:,}; send less at a time"
            )

    def _try(self, reservation: Reservation, more_bytes: int) -> bool:
        with self._lock:
            if self._waiters or self.used_bytes + more_bytes > self.limit_bytes:
                return False
            self._give(reservation, more_bytes)
            return True

    def _give(self, reservation: Reservation, more_bytes: int) -> None:
        self._holders += not reservation.held_bytes
        self.used_bytes += more_bytes
        reservation.held_bytes += more_bytes

    def _take_back(self, reservation: Reservation, fewer_bytes: int) -> None:
        with self._lock:
            if not fewer_bytes:
                return
            self.used_bytes -= fewer_bytes
            reservation.held_bytes -= fewer_bytes
            self._holders -= not reservation.held_bytes
            woken = self._settle()
        for waiter in woken:
            waiter.wake()

    def _enqueue(self, waiter: _Waiter) -> None:
        self.check_fits(waiter.reservation.held_bytes + waiter.more_bytes)
        with self._lock:
            self._waiters.append(waiter)
            woken = self._settle()
        for other in woken:
            other.wake()

    def _give_up(self, waiter: _Waiter) -> None:
        """Stop waiting, unless the memory has just been granted."""
        with self._lock:
            if waiter.is_granted or waiter.is_refused:
                return
            self._waiters.remove(waiter)
            waiter.is_refused = True
            woken = self._settle()
        for other in woken:
            other.wake()

    def _settle(self) -> list[_Waiter]:
        """Grant what fits, oldest first, and resolve deadlocks; returns whom to wake."""
        woken = []
        while self._waiters:
            first = self._waiters[0]
            if self.used_bytes + first.more_bytes <= self.limit_bytes:
                self._waiters.popleft()
                self._give(first.reservation, first.more_bytes)
                first.is_granted = True
                woken.append(first)
                continue
            holding = [waiter for waiter in self._waiters if waiter.reservation.held_bytes]
            if len(holding) < self._holders or not holding or holding == [first]:
                break  # someone who holds memory is at work, and will release it
            youngest = holding[-1]
            self._waiters.remove(youngest)
            self.used_bytes -= youngest.reservation.held_bytes
            youngest.reservation.held_bytes = 0
            self._holders -= 1
            youngest.is_refused = True
            woken.append(youngest)
        return woken


class Reservation:
    """Memory that a request holds; a context manager that releases it. Used by one thread at a time."""

    __slots__ = ("_pool", "held_bytes")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.held_bytes = 0

    @property
    def is_contended(self) -> bool:
        """Whether others wait for memory of the same pool."""
        return self._pool.is_contended

    def check_fits(self, more_bytes: int) -> None:
        """Raise TooLarge if the pool could never hold so much more for one request."""
        self._pool.check_fits(self.held_bytes + more_bytes)

    def try_grow(self, more_bytes: int) -> bool:
        """Reserve more if it is there and nobody waits for it."""
        return self._pool._try(self, more_bytes)

    def grow(self, more_bytes: int, *, deadline_s: float | None) -> None:
        """Reserve more; a greenlet or thread waits until it is there.

        Args:
            more_bytes: how much more.
            deadline_s: how long to wait, on the clock of `time.monotonic`; None: for ever.

        Raises:
            TooLarge: the pool could never hold so much for one request.
            Overloaded: it was not there in time.
        """
        if self.try_grow(more_bytes):
            return
        pause = Pause()
        waiter = _Waiter(self, more_bytes, lambda: end_pauses([pause]))
        self._pool._enqueue(waiter)
        if not pause.wait(None if deadline_s is None else deadline_s - time.monotonic()):
            self._pool._give_up(waiter)
        self._check(waiter)

    async def grow_async(self, more_bytes: int, *, deadline_s: float | None) -> None:
        """Reserve more; a coroutine waits until it is there. See `grow`."""
        if self.try_grow(more_bytes):
            return
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        waiter = _Waiter(self, more_bytes, lambda: loop.call_soon_threadsafe(woken.set))
        self._pool._enqueue(waiter)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if deadline_s is None else deadline_s - time.monotonic()):
                    await woken.wait()
        finally:
            self._pool._give_up(waiter)
        self._check(waiter)

    def _check(self, waiter: _Waiter) -> None:
        if not waiter.is_granted:
            raise Overloaded(
                f"no {self._pool.what} was free in time: {self._pool.used_bytes:,} of {self._pool.limit_bytes:,} "
                "are in use; try again later"
            )

    def shrink_to(self, size_bytes: int) -> None:
        """Release what is held beyond this size."""
        self._pool._take_back(self, max(0, self.held_bytes - size_bytes))

    def release(self) -> None:
        """Release everything."""
        if self.held_bytes >= TRIM_BYTES:
            return_freed_memory()
        self._pool._take_back(self, self.held_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def free_bytes() -> int:
    """Return what requests may occupy: the memory of the container, or of the machine, less what this process has."""
    return max(0, int((memory_limit_bytes() - resident_bytes()) * SAFETY_SHARE))


def memory_limit_bytes() -> int:
    """Return the smallest limit that applies to this process: of its control groups, or the machine's memory."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                limits += _read_limits(Path("/sys/fs/cgroup"), path, "memory.max")
                limits += _read_limits(Path("/sys/fs/cgroup/unified"), path, "memory.max")
            elif "memory" in controllers.split(","):
                limits += _read_limits(Path("/sys/fs/cgroup/memory"), path, "memory.limit_in_bytes")
    return min(limits)


def _read_limits(root: Path, group: str, name: str) -> list[int]:
    """Read the limits of a control group and of those that it is in; in a container, only the root can be seen."""
    limits = []
    folder = root / group.lstrip("/")
    for place in {root, folder, *(parent for parent in folder.parents if parent.is_relative_to(root))}:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int((place / name).read_text()))
    return limits


def resident_bytes() -> int:
    """Return the resident set of this process; 0 where the system does not tell (it has no /proc)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


_libc = ctypes.CDLL(None)
_malloc_trim = getattr(_libc, "malloc_trim", None)  # glibc's


def return_freed_memory() -> None:
    """Have the C library give freed pages back to the system."""
    if _malloc_trim:
        _malloc_trim(0)

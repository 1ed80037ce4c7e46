"""The memory budget: what requests that are being read, inflated, parsed and decoded may occupy together.

A request reserves memory before each step that needs it. Requests that do not fit wait in the order in which they
asked, until their deadline. Knows nothing of protocols and models.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from serving.errors import Overloaded, TooLarge
from serving.greenlets import Waiter, wake_all

# Shares of the budget. Small requests have a pool of their own, so that large ones cannot keep them waiting. Of the
# rest, bodies may take a part only, so that requests that have been read can be worked on; a lone one may take all.
SMALL_SHARE = 1 / 8
BODIES_SHARE = 1 / 2

SMALL_STEP_BYTES = 8 * 1024 * 1024  # larger steps are taken from the pool for large requests

# What may have been received of a body that waits for its first memory.
UNCOUNTED_BYTES = 512 * 1024

# gRPC cannot let a message that is being received wait for memory: who is refused counts as waiting for so long.
CONTENDED_AFTER_REFUSAL_S = 1.0

# Of what is free. The rest is for what no request accounts for: responses, sockets, allocators, the process that parses
# large JSON documents, and the page cache, without which the process would read its own code from disk again and again.
SAFETY_SHARE = 0.75

# A reservation of more gives its pages back to the system when it ends, before the next one may use them: the C library
# keeps freed memory per thread, so what one thread has freed another would allocate once more.
TRIM_BYTES = 8 * 1024 * 1024
TRIM_INTERVAL_S = 0.5  # not more often: other threads wait meanwhile when they allocate


# Blocks up to this size are kept when they are freed; the largest that glibc can be asked to keep.
KEPT_BYTES = 32 * 1024 * 1024
ARENAS = 4  # each keeps blocks of its own; by default there are eight for each core


class MemoryBudget:
    """The pools of one process.

    Args:
        total_bytes: of all pools together; None: what the system or the container leaves beside this process, adapted
            by `adapt`.
    """

    def __init__(self, total_bytes: int | None = None) -> None:
        self._is_fixed = total_bytes is not None
        self.small = Pool("memory for small requests")
        self.large = Pool("memory")
        self._divide(free_bytes() if total_bytes is None else total_bytes)

    @property
    def total_bytes(self) -> int:
        """The size of both pools together."""
        return self.small.limit + self.large.limit

    @property
    def used_bytes(self) -> int:
        """What is reserved in both pools."""
        return self.small.used + self.large.used

    def adapt(self, *, in_use: bool = False) -> None:
        """Take note of what models that were loaded or unloaded leave.

        While requests hold memory this does nothing, as freed memory that the allocator keeps looks like the models'.

        Args:
            in_use: adapt even then: once, when the first models are loaded and few requests have been taken.
        """
        used_bytes = self.used_bytes
        if not self._is_fixed and (in_use or not used_bytes):
            self._divide(free_bytes() + used_bytes)

    def _divide(self, total_bytes: int) -> None:
        small_bytes = int(total_bytes * SMALL_SHARE)
        large_bytes = total_bytes - small_bytes
        self.small.resize(small_bytes)
        self.large.resize(large_bytes, body_limit=int(large_bytes * BODIES_SHARE))


class RequestMemory:
    """What one request holds: its body, and what it is being inflated, parsed or decoded to.

    Used by one thread at a time. Once a request holds memory of the pool for large requests, it takes everything from
    there: so no request that holds large memory waits for small memory, and waiting cannot become a circle.
    """

    __slots__ = ("_large", "_small")

    def __init__(self, budget: MemoryBudget) -> None:
        self._small = Reservation(budget.small)
        self._large = Reservation(budget.large)

    @property
    def held_bytes(self) -> int:
        """What the request holds."""
        return self._small.held + self._large.held

    @property
    def is_contended(self) -> bool:
        """Whether others lack memory of which this request holds some."""
        return any(part.held and part.pool.is_contended for part in (self._large, self._small))

    def try_small_body(self, size_bytes: int) -> bool:
        """Reserve memory for a small body, if it is there and nobody waits for it."""
        return self._small.try_grow(size_bytes, is_body=True)

    async def grow_body(self, more_bytes: int, *, is_small: bool, deadline_s: float) -> None:
        """Reserve memory for more of the body; a coroutine waits until it is there. See `Reservation.grow`."""
        reservation = self._small if is_small else self._large
        await reservation.grow_async(more_bytes, is_body=True, deadline_s=deadline_s)

    def try_large_body(self, size_bytes: int) -> bool:
        """Reserve memory for a large body, if it is there and nobody waits for it."""
        is_reserved = self._large.try_grow(size_bytes, is_body=True)
        if not is_reserved:
            self._large.pool.note_refusal()
        return is_reserved

    def shrink_body_to(self, size_bytes: int) -> None:
        """Release what was reserved for a large body beyond its size."""
        self._large.shrink_body_to(size_bytes)

    def check_fits(self, more_bytes: int) -> None:
        """Raise TooLarge if the request could never have so much more to work with."""
        self._large.pool.check_fits(self._large, more_bytes)

    def grow(self, more_bytes: int, *, deadline_s: float | None) -> None:
        """Reserve memory for the next step; a greenlet or thread waits until it is there. See `Reservation.grow`."""
        most_bytes = min(SMALL_STEP_BYTES, self._small.pool.limit // 4)
        is_small = not self._large.held and self._small.held + more_bytes <= most_bytes
        (self._small if is_small else self._large).grow(more_bytes, is_body=False, deadline_s=deadline_s)

    def shrink(self, fewer_bytes: int) -> None:
        """Release what the last step took, and give the freed pages back to the system first if that is much."""
        if fewer_bytes >= TRIM_BYTES:
            return_freed_memory(at_most_every_s=TRIM_INTERVAL_S)
        (self._large if self._large.held > self._large.held_for_body else self._small).shrink(fewer_bytes)

    def release(self) -> None:
        """Release everything; where that is much, give the freed pages back to the system first."""
        if self.held_bytes >= TRIM_BYTES:
            return_freed_memory(at_most_every_s=TRIM_INTERVAL_S)
        self._small.release()
        self._large.release()

    def release_in(self, threads: Executor) -> None:
        """Release everything; in a thread where freed pages are given back, which takes milliseconds."""
        if self.held_bytes >= TRIM_BYTES:
            threads.submit(self.release)
        else:
            self.release()


@dataclass(eq=False, slots=True)
class _Waiter:
    """A reservation that is to grow."""

    reservation: Reservation
    more: int
    is_body: bool
    wake: Callable[[], object] = lambda: None
    is_granted: bool = False
    is_refused: bool = False


class Pool:
    """A number of bytes, or of other things, that reservations share in the order in which they ask.

    Two reservations that have grown and want more could wait for each other for ever. Where all that hold something
    wait, the youngest of them is refused (503), so the oldest always gets on.

    Args:
        what: its name in messages.
        limit: its size.
    """

    def __init__(self, what: str, limit: int = 0) -> None:
        self.what = what
        self.resize(limit)
        self._bodies_used = 0
        self.used = 0
        self._lock = threading.Lock()
        self._waiters: list[_Waiter] = []  # oldest first
        self._holders = 0  # reservations of more than nothing
        self._refused_s = -math.inf  # when there was not enough for one that cannot wait

    def resize(self, limit: int, *, body_limit: int | None = None) -> None:
        """Set the size, and what bodies may take of it: by default all."""
        self.limit = limit
        self.body_limit = limit if body_limit is None else body_limit

    @property
    def has_waiters(self) -> bool:
        """Whether anyone waits."""
        return bool(self._waiters)

    @property
    def is_contended(self) -> bool:
        """Whether anyone waits, or was refused a moment ago."""
        return self.has_waiters or time.monotonic() - self._refused_s < CONTENDED_AFTER_REFUSAL_S

    def note_refusal(self) -> None:
        """Note that there was not enough for a request that cannot wait."""
        self._refused_s = time.monotonic()

    def reserve(self, size: int, *, deadline_s: float | None) -> Reservation:
        """Reserve some; a greenlet or thread waits until it is there. See `Reservation.grow`."""
        reservation = Reservation(self)
        reservation.grow(size, is_body=False, deadline_s=deadline_s)
        return reservation

    def check_fits(self, reservation: Reservation, more: int) -> None:
        """Raise TooLarge if a reservation could never grow by so much."""
        if reservation.held + more > self.limit:
            raise TooLarge(
                f"the request needs about {reservation.held + more:,} bytes of {self.what}, and the service has "
                f"{self.limit:,}; send less at a time"
            )

    def _fits(self, reservation: Reservation, more: int, *, is_body: bool) -> bool:
        if self.used + more > self.limit:
            return False
        others = self._bodies_used - reservation.held_for_body
        return not is_body or not others or self._bodies_used + more <= self.body_limit

    def _try(self, reservation: Reservation, more: int, *, is_body: bool) -> bool:
        with self._lock:
            # Bodies only wait for bodies, and work only for work: neither is held up by the other.
            is_taken = bool(self._waiters) and any(other.is_body == is_body for other in self._waiters)
            if is_taken or not self._fits(reservation, more, is_body=is_body):
                return False
            self._give(reservation, more, is_body=is_body)
            return True

    def _give(self, reservation: Reservation, more: int, *, is_body: bool) -> None:
        self._holders += not reservation.held
        self.used += more
        reservation.held += more
        if is_body:
            self._bodies_used += more
            reservation.held_for_body += more
        self._holders -= not reservation.held

    def _take_all(self, reservation: Reservation) -> None:
        self._holders -= 1
        self.used -= reservation.held
        self._bodies_used -= reservation.held_for_body
        reservation.held = reservation.held_for_body = 0

    def _release(self, reservation: Reservation) -> None:
        with self._lock:
            if reservation.held:
                self._take_all(reservation)
            woken = self._settle() if self._waiters else ()
        for waiter in woken:
            waiter.wake()

    def _shrink(self, reservation: Reservation, fewer: int, *, is_body: bool) -> None:
        with self._lock:
            self._holders -= bool(reservation.held)
            self.used -= fewer
            reservation.held -= fewer
            if is_body:
                self._bodies_used -= fewer
                reservation.held_for_body -= fewer
            self._holders += bool(reservation.held)
            woken = self._settle()
        for waiter in woken:
            waiter.wake()

    def _enqueue(self, waiter: _Waiter) -> None:
        self.check_fits(waiter.reservation, waiter.more)
        if waiter.is_body and len(self._waiters) * UNCOUNTED_BYTES > self.body_limit:
            raise Overloaded("too many uploads wait for memory; try again later")
        with self._lock:
            self._waiters.append(waiter)
            woken = self._settle()
        for other in woken:
            other.wake()

    def _give_up(self, waiter: _Waiter) -> None:
        """Stop waiting, unless it was granted just now."""
        with self._lock:
            if waiter.is_granted or waiter.is_refused:
                return
            self._waiters.remove(waiter)
            waiter.is_refused = True
            woken = self._settle()
        for other in woken:
            other.wake()

    def _fits_waiter(self, waiter: _Waiter) -> bool:
        return self._fits(waiter.reservation, waiter.more, is_body=waiter.is_body)

    def _settle(self) -> Sequence[_Waiter]:
        """Grant what fits, oldest first, and resolve deadlocks; returns whom to wake."""
        woken: list[_Waiter] = []
        while self._waiters:
            granted = self._next_in_turn()
            holding = [waiter for waiter in self._waiters if waiter.reservation.held]
            if granted is None and holding and len(holding) == self._holders:
                # All that hold something wait: one out of turn can go on, or the youngest has to give way.
                granted = next(filter(self._fits_waiter, holding), None)
                if granted is None:
                    youngest = holding[-1]
                    self._waiters.remove(youngest)
                    self._take_all(youngest.reservation)
                    youngest.is_refused = True
                    woken.append(youngest)
                    continue
            if granted is None:
                break
            self._waiters.remove(granted)
            self._give(granted.reservation, granted.more, is_body=granted.is_body)
            granted.is_granted = True
            woken.append(granted)
        return woken

    def _next_in_turn(self) -> _Waiter | None:
        """Return the oldest waiter for work, or the oldest with a body, if there is enough for it."""
        for is_body in (False, True):
            oldest = next((waiter for waiter in self._waiters if waiter.is_body == is_body), None)
            if oldest and self._fits_waiter(oldest):
                return oldest
        return None


class Reservation:
    """What one request holds of a pool; a context manager that releases it. Used by one thread at a time."""

    __slots__ = ("held", "held_for_body", "pool")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.held = 0
        self.held_for_body = 0  # of it

    def try_grow(self, more: int, *, is_body: bool) -> bool:
        """Reserve more if it is there and nobody waits for it."""
        return self.pool._try(self, more, is_body=is_body)

    def grow(self, more: int, *, is_body: bool, deadline_s: float | None) -> None:
        """Reserve more; a greenlet or thread waits until it is there.

        Args:
            more: how much more.
            is_body: whether it is for the body of a request.
            deadline_s: how long to wait, on the clock of `time.monotonic`; None: for ever.

        Raises:
            TooLarge: one reservation could never have so much.
            Overloaded: it was not there in time.
        """
        if self.pool._try(self, more, is_body=is_body):
            return
        waiter = _Waiter(self, more, is_body)
        pause = Waiter()
        waiter.wake = lambda: wake_all([pause])
        self.pool._enqueue(waiter)
        if not pause.wait(None if deadline_s is None else deadline_s - time.monotonic()):
            self.pool._give_up(waiter)
        self._check(waiter)

    async def grow_async(self, more: int, *, is_body: bool, deadline_s: float | None) -> None:
        """Reserve more; a coroutine waits until it is there. See `grow`."""
        if self.pool._try(self, more, is_body=is_body):
            return
        waiter = _Waiter(self, more, is_body)
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        waiter.wake = lambda: loop.call_soon_threadsafe(woken.set)
        self.pool._enqueue(waiter)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if deadline_s is None else deadline_s - time.monotonic()):
                    await woken.wait()
        except asyncio.CancelledError:
            self.pool._give_up(waiter)
            if waiter.is_granted:
                self.pool._shrink(self, more, is_body=is_body)
            raise
        self.pool._give_up(waiter)
        self._check(waiter)

    def _check(self, waiter: _Waiter) -> None:
        if not waiter.is_granted:
            raise Overloaded(
                f"no {self.pool.what} was free in time: {self.pool.used:,} of {self.pool.limit:,} are in use; "
                "try again later"
            )

    def shrink_body_to(self, size: int) -> None:
        """Release what is held for the body beyond this size."""
        self.pool._shrink(self, max(0, self.held_for_body - size), is_body=True)

    def shrink(self, fewer: int) -> None:
        """Release some of what is not held for the body."""
        self.pool._shrink(self, min(fewer, self.held - self.held_for_body), is_body=False)

    def release(self) -> None:
        """Release everything."""
        if not self.held:
            return
        self.pool._release(self)

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


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next call of a model, where it is glibc.

    By default it gives large blocks back to the system at once, and to have them mapped again, page by page, takes a
    sixth of the time of a call with 64 images. The larger blocks of decoded images still go back at once.

    To be called before there are threads: the number of arenas is settled with the first few of them.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # M_TRIM_THRESHOLD and so on of malloc.h
    if mallopt := getattr(_libc, "mallopt", None):
        mallopt(trim_threshold, KEPT_BYTES)
        mallopt(mmap_threshold, KEPT_BYTES)
        mallopt(arena_max, ARENAS)


_trimmed_s = 0.0
_malloc_trim = getattr(_libc, "malloc_trim", None)  # glibc's


def return_freed_memory(*, at_most_every_s: float = 0.0) -> None:
    """Have the C library give freed pages back to the system, unless it did so a moment ago.

    Meanwhile other threads wait for it when they allocate.
    """
    global _trimmed_s
    now_s = time.monotonic()
    if _malloc_trim and now_s - _trimmed_s >= at_most_every_s:
        _trimmed_s = now_s
        _malloc_trim(0)

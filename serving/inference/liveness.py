"""Liveness check: unhealthy when a critical thread has exited or a model call hangs."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

STALLED_S = 120.0  # a longer model call counts as hanging


class Liveness:
    """Watches critical threads and running model calls."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._numbers = itertools.count()
        self._calls: dict[int, float] = {}  # start time of each running call

    def watch_thread(self, thread: threading.Thread) -> None:
        """Report unhealthy once this thread has exited."""
        self._threads.append(thread)

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Watch a model call while the block runs."""
        number = next(self._numbers)
        self._calls[number] = time.monotonic()
        try:
            yield
        finally:
            del self._calls[number]

    @property
    def problem(self) -> str | None:
        """The reason why the process is unhealthy, or None if it is healthy."""
        for thread in self._threads:
            if not thread.is_alive():
                return f"the thread {thread.name} has exited"
        for started_s in tuple(self._calls.values()):
            if time.monotonic() - started_s > STALLED_S:
                return f"a model call has not returned for {time.monotonic() - started_s:.0f} s"
        return None

"""Whether the process is still of use: what only a restart can mend."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

STALLED_S = 120.0  # a call of the model that takes longer does not come back


class Liveness:
    """Knows the threads that must not end and the calls of the models that must."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._numbers = itertools.count()
        self._calls: dict[int, float] = {}  # when each began

    def watch_thread(self, thread: threading.Thread) -> None:
        """Take the process for dead once this thread has ended."""
        self._threads.append(thread)

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Keep an eye on a call of a model while the block runs."""
        number = next(self._numbers)
        self._calls[number] = time.monotonic()
        try:
            yield
        finally:
            del self._calls[number]

    @property
    def problem(self) -> str | None:
        """Why the process is of no use any more, in a sentence; None while it is."""
        for thread in self._threads:
            if not thread.is_alive():
                return f"the thread {thread.name} has ended"
        for started_s in tuple(self._calls.values()):
            if time.monotonic() - started_s > STALLED_S:
                return f"a call of a model has not come back for {time.monotonic() - started_s:.0f} s"
        return None

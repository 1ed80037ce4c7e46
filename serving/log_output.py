"""Writes log lines in a thread, so that neither the event loop nor a request waits for who reads the log."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Any

from typing_extensions import override

MAX_QUEUED_LINES = 10_000  # further ones are dropped
FLUSH_TIMEOUT_S = 2.0  # at the exit, for a reader that is slow

_handlers: weakref.WeakSet[BackgroundHandler] = weakref.WeakSet()


def count_dropped_lines() -> int:
    """Return how many log lines of this process were dropped."""
    return sum(handler.dropped for handler in tuple(_handlers))


class BackgroundHandler(logging.Handler):
    """Formats a line at once, and writes it to a file descriptor in a thread of its own.

    `dropped` counts the lines that were not written: too many were queued, or the descriptor is closed.

    Args:
        descriptor: of a file, pipe or terminal; written without a buffer of the process.
        collect_s: how long lines are collected and then written together. A line at a time would wake the thread for
            each request, which takes the interpreter's lock from the event loop.
        is_shared: whether other processes write to it, too. Then lines are written in pieces of whole lines that a
            pipe takes at once, so that no line of another process gets into one.
    """

    def __init__(self, descriptor: int, *, collect_s: float = 0.0, is_shared: bool = False) -> None:
        super().__init__()
        self.dropped = 0
        self._descriptor = descriptor
        self._collect_s = collect_s
        self._piece_bytes = select.PIPE_BUF if is_shared else sys.maxsize
        self._lines: SimpleQueue[str | threading.Event] = SimpleQueue()  # an event is set once it is reached
        self._is_flushing = threading.Event()
        self._thread = threading.Thread(target=self._write_lines, name="log", daemon=True)
        self._thread.start()
        _handlers.add(self)

    @override
    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        if self._lines.qsize() < MAX_QUEUED_LINES:
            self._lines.put(line)
        else:
            self.dropped += 1

    @override
    def flush(self) -> None:
        """Wait until the queued lines are written, for at most FLUSH_TIMEOUT_S."""
        written = threading.Event()
        self._lines.put(written)
        self._is_flushing.set()
        written.wait(FLUSH_TIMEOUT_S)
        self._is_flushing.clear()

    def _write_lines(self) -> None:
        while True:
            items: list[Any] = [self._lines.get()]
            if self._collect_s:
                self._is_flushing.wait(self._collect_s)
            with contextlib.suppress(Empty):
                while len(items) < MAX_QUEUED_LINES:
                    items.append(self._lines.get_nowait())
            lines = [item for item in items if isinstance(item, str)]
            try:
                for piece in self._join(lines):
                    self._write(piece)
            except OSError:  # closed, or its reader has gone
                self.dropped += len(lines)
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()

    def _join(self, lines: Iterable[str]) -> Iterator[bytes]:
        piece = bytearray()
        for line in lines:
            data = f"{line}\n".encode("utf-8", "backslashreplace")
            if piece and len(piece) + len(data) > self._piece_bytes:
                yield bytes(piece)
                piece.clear()
            piece += data
        yield bytes(piece)

    def _write(self, data: bytes) -> None:
        remaining = memoryview(data)
        while remaining:
            try:
                remaining = remaining[os.write(self._descriptor, remaining) :]
            except BlockingIOError:  # another process has made it non-blocking
                select.select((), (self._descriptor,), ())

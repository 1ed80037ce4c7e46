"""Calls between two processes, over a socket pair."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any


class ChannelClosed(Exception):  # noqa: N818 - named for the condition
    """The other process has ended."""


class Channel:
    """Calls between two processes over a socket pair, in both directions.

    Args:
        connection: one end of the pair.
        handle: returns the reply to a message of the other process, or a future of it; called in the thread that reads,
            so it must not wait.
        on_close: called once the other process has closed its end.
    """

    def __init__(
        self, connection: Connection, handle: Callable[[Any], Any], *, on_close: Callable[[], None] = lambda: None
    ) -> None:
        self._connection = connection
        self._handle = handle
        self._on_close = on_close
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._calls: dict[int, Future[Any]] = {}
        self._is_closed = False
        # Sent in a thread of its own: if a thread that reads waited for the other side to read, both could.
        self._outbox: SimpleQueue[bytes] = SimpleQueue()

    def start(self) -> None:
        """Start to read and send messages, in two threads."""
        for target in (self._read, self._send):
            threading.Thread(target=target, name="channel", daemon=True).start()

    def post(self, message: Any) -> Future[Any]:
        """Send a message; the future has the reply, the other side's exception, or ChannelClosed."""
        future: Future[Any] = Future()
        number = next(self._numbers)
        with self._lock:
            if not self._is_closed:
                self._calls[number] = future
        if self._calls.get(number) is future:
            self._outbox.put(pickle.dumps(("call", number, message)))
        else:
            future.set_exception(ChannelClosed())
        return future

    def call(self, message: Any, *, timeout_s: float | None = None) -> Any:
        """Send a message and wait for the reply.

        Raises:
            ChannelClosed: the other process has ended.
            TimeoutError: it did not reply in time.
            Exception: what the other side raised.
        """
        return self.post(message).result(timeout_s)

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # the other process has ended, which `_read` notices, too
            while True:
                self._connection.send_bytes(self._outbox.get())

    def _read(self) -> None:
        try:
            while True:
                kind, number, content = self._connection.recv()
                if kind == "call":
                    self._respond(number, content)
                elif kind == "reply":
                    self._calls.pop(number).set_result(content)
                else:
                    self._calls.pop(number).set_exception(content)
        except (EOFError, OSError):
            pass
        with self._lock:
            self._is_closed = True
            calls = list(self._calls.values())
            self._calls.clear()
        for future in calls:
            future.set_exception(ChannelClosed())
        self._on_close()

    def _respond(self, number: int, message: Any) -> None:
        try:
            reply = self._handle(message)
        except Exception as error:
            reply = Future()
            reply.set_exception(error)
        if isinstance(reply, Future):
            reply.add_done_callback(lambda future: self._reply(number, future))
        else:
            self._outbox.put(pickle.dumps(("reply", number, reply)))

    def _reply(self, number: int, future: Future[Any]) -> None:
        error = future.exception()
        content = ("reply", number, future.result()) if error is None else ("error", number, error)
        self._outbox.put(pickle.dumps(content))

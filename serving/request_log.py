"""The request log: one record for each request, to the logger `serving.access`."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Self
from urllib.parse import unquote

from serving.request_context import RequestContext

access_logger = logging.getLogger("serving.access")

COLLECT_S = 0.05  # lines of requests are logged together
MAX_COLLECTED_LINES = 10_000  # beyond them a request logs its line itself, and waits for the logger's handlers
CLOSE_TIMEOUT_S = 2.0

_is_plain = re.compile(r"[\w./:<>@+*\[\]-]+").fullmatch


@dataclass(eq=False, slots=True)  # frozen dataclasses are slower to create
class RequestLine:
    """What the log says about a request. As a record's message it is text; the JSON log has its fields."""

    ended_s: float  # Unix time
    request_id: str
    trace_id: str
    caller: str  # the name of the client's token
    client: str  # address, or the peer as gRPC names it
    protocol: str
    method: str  # of HTTP
    route: str
    model: str
    version: int | None
    rows: int  # for an image classifier, images
    status: str
    queue_s: float
    model_s: float
    total_s: float

    def fields(self) -> dict[str, Any]:
        """Return the fields by name, as the JSON log has them."""
        return {
            "request_id": self.request_id,
            "trace_id": self.trace_id or None,
            "caller": self.caller or None,
            "client": read_address(self.client),
            "protocol": self.protocol,
            "method": self.method or None,
            "route": self.route,
            "model": self.model or None,
            "version": self.version,
            "images": self.rows,
            "status": self.status,
            "queue_ms": round(self.queue_s * 1e3, 3),
            "model_ms": round(self.model_s * 1e3, 3),
            "total_ms": round(self.total_s * 1e3, 3),
        }

    def __str__(self) -> str:
        fields = self.fields()
        called = f"{self.method} {self.route}" if self.method else self.route
        line = f"{_quote(fields['client'])} {self.protocol} {called} {self.status} {fields['total_ms']} ms"
        if self.rows:
            line += f" (queue {fields['queue_ms']}, model {fields['model_ms']}) images={self.rows}"
        labels = (("model", "model"), ("version", "version"), ("caller", "caller"), ("id", "request_id"))
        named = [(label, fields[name]) for label, name in (*labels, ("trace", "trace_id"))]
        return line + "".join(f" {label}={_quote(str(value))}" for label, value in named if value is not None)


class RequestLog:
    """Logs requests in a thread of its own, as a context manager.

    A call of the logger takes 14 us in a row of many, and 40 us between the other work of a request, whose code and
    data it displaces from the CPU's caches.
    """

    def __init__(self) -> None:
        self._lines: SimpleQueue[RequestLine | None] = SimpleQueue()  # None: the end
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Log the lines that remain, for at most CLOSE_TIMEOUT_S."""
        self._is_closing.set()
        self._lines.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)

    def add(self, context: RequestContext, seconds: float) -> None:
        """Log a request that has ended after `seconds`, within COLLECT_S."""
        if self._lines.qsize() < MAX_COLLECTED_LINES:
            self._lines.put(make_line(context, seconds))
        else:
            log_request(context, seconds)

    def _run(self) -> None:
        while True:
            first = self._lines.get()
            self._is_closing.wait(COLLECT_S)
            for line in (first, *(self._lines.get_nowait() for _ in range(self._lines.qsize()))):
                if line is None:
                    return
                _log(line)


def log_request(context: RequestContext, seconds: float) -> None:
    """Log a request that has ended after `seconds`, at once."""
    _log(make_line(context, seconds))


def make_line(context: RequestContext, seconds: float) -> RequestLine:
    """Return the line of a request that has ended after `seconds`."""
    return RequestLine(
        time.time(),
        context.request_id,
        context.trace_id,
        context.caller,
        context.client,
        context.protocol,
        context.method,
        context.route,
        context.model,
        context.version,
        context.rows,
        context.status,
        context.queue_s,
        context.model_s,
        seconds,
    )


def read_address(client: str) -> str:
    """Return the address of a client: gRPC names a peer "ipv4:127.0.0.1:5000" or "ipv6:%5B::1%5D:5000"."""
    family, found, rest = client.partition(":")
    return unquote(rest.rpartition(":")[0]).strip("[]") if found and family in ("ipv4", "ipv6") else client


def _log(line: RequestLine) -> None:
    # Made here and not by `access_logger.info`, which looks up the caller's source line.
    record = logging.LogRecord(access_logger.name, logging.INFO, __file__, 0, line, None, None)
    record.created, record.msecs = line.ended_s, line.ended_s % 1 * 1000
    access_logger.handle(record)


def _quote(value: str) -> str:
    return value if _is_plain(value) else json.dumps(value)

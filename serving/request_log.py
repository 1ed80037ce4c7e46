"""The request log: one record for each request, to the logger `serving.access`."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import unquote

from serving.request_context import RequestContext

access_logger = logging.getLogger("serving.access")

_is_plain = re.compile(r"[\w./:<>@+*\[\]-]+").fullmatch


@dataclass(frozen=True, slots=True)
class RequestLine:
    """What the log says about a request. As a record's message it is text; the JSON log has its fields."""

    request_id: str
    trace_id: str | None
    caller: str | None  # the name of the client's token
    client: str  # address
    protocol: str
    method: str | None  # of HTTP
    route: str
    model: str | None
    version: int | None
    images: int  # rows, for another model than an image classifier
    status: str
    queue_ms: float
    model_ms: float
    total_ms: float

    def fields(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        called = f"{self.method} {self.route}" if self.method else self.route
        line = f"{_quote(self.client)} {self.protocol} {called} {self.status} {self.total_ms} ms"
        if self.images:
            line += f" (queue {self.queue_ms}, model {self.model_ms}) images={self.images}"
        named = (
            ("model", self.model),
            ("version", self.version),
            ("caller", self.caller),
            ("id", self.request_id),
            ("trace", self.trace_id),
        )
        return line + "".join(f" {name}={_quote(str(value))}" for name, value in named if value is not None)


def log_request(context: RequestContext, seconds: float) -> None:
    """Write the line of a request that has ended after `seconds`."""
    line = RequestLine(
        context.request_id,
        context.trace_id or None,
        context.caller or None,
        read_address(context.client),
        context.protocol,
        context.method or None,
        context.route,
        context.model or None,
        context.version,
        context.rows,
        context.status,
        round(context.queue_s * 1e3, 3),
        round(context.model_s * 1e3, 3),
        round(seconds * 1e3, 3),
    )
    # Made here and not by `access_logger.info`, which looks up the caller's source line.
    access_logger.handle(logging.LogRecord(access_logger.name, logging.INFO, __file__, 0, line, None, None))


def read_address(client: str) -> str:
    """Return the address of a client: gRPC names a peer "ipv4:127.0.0.1:5000" or "ipv6:%5B::1%5D:5000"."""
    family, found, rest = client.partition(":")
    return unquote(rest.rpartition(":")[0]).strip("[]") if found and family in ("ipv4", "ipv6") else client


def _quote(value: str) -> str:
    return value if _is_plain(value) else json.dumps(value)

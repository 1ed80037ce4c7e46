"""A parsed HTTP request: its scope, the headers that the server itself reads, and the state of its response."""

from __future__ import annotations

import asyncio
import math
import re
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES = 64 * 1024  # request line and headers

TOO_LARGE = "431 Request Header Fields Too Large"
TIMEOUT_HEADER = b"x-request-timeout-s"  # can only shorten the server's request timeout
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+;=%-]*(:[0-9]*)?|\[[0-9A-Fa-f:.]+\](:[0-9]*)?")


class RequestFault(Exception):  # noqa: N818 - named for the condition, like those of serving/errors.py
    """A request that cannot be processed; the server responds with `status` and closes the connection."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class Request(RequestResponseCycle):
    """A request and the state of its response; uvicorn's `receive` waits for more of the body.

    Args:
        connection: the connection that received it.
        scope: the part of an ASGI scope that is used here.
        keep_alive: the connection stays open after the response.
    """

    def __init__(self, connection: HttpToolsProtocol, scope: dict[str, Any], *, keep_alive: bool) -> None:
        self.scope = cast(Any, scope)
        self.transport = connection.transport
        self.flow = connection.flow
        self.message_event = asyncio.Event()
        self.disconnected = False
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = connection.expect_100_continue
        self.body = bytearray()
        self.more_body = True
        self.response_started = False
        self.response_complete = False
        self.declared_bytes: int | None = None  # Content-Length
        self.timeout: bytes | None = None  # X-Request-Timeout-S
        self.timeout_s = 0.0  # from the end of the request to its response
        self.waited_s = 0.0  # for memory for the body; counts towards the timeout


def read_request(connection: HttpToolsProtocol) -> Request:
    """Make the request whose headers the connection's parser has completed.

    Raises:
        RequestFault: the HTTP version or a header is invalid, or the headers are too long.
    """
    parser = connection.parser
    version = parser.get_http_version()
    if version not in ("1.0", "1.1"):
        raise RequestFault("505 HTTP Version Not Supported", f"expected HTTP version 1.0 or 1.1, got {version}")
    target = _origin_form(connection.url)
    url = httptools.parse_url(target)
    scope = {
        "method": parser.get_method().decode("ascii"),
        "http_version": version,
        "target": target,  # an empty query shows only here
        "raw_path": url.path,
        "query_string": url.query or b"",
        "headers": connection.headers,
        "server": connection.server,
        "client": connection.client,
    }
    request = Request(connection, scope, keep_alive=parser.should_keep_alive())
    size, hosts = len(connection.url), 0
    for name, value in connection.headers:
        size += len(name) + len(value) + 4
        if name == b"host":
            hosts += 1
            if not _HOST.fullmatch(value.strip()):
                raise RequestFault("400 Bad Request", "invalid Host header: expected a host name and optionally a port")
        elif name == b"content-length":
            request.declared_bytes = int(value)
        elif name == TIMEOUT_HEADER:
            request.timeout = value
    if size > MAX_HEAD_BYTES:
        raise RequestFault(TOO_LARGE, f"the headers are longer than {MAX_HEAD_BYTES:,} bytes")
    if hosts > 1 or (version == "1.1" and not hosts):
        raise RequestFault("400 Bad Request", f"expected exactly one Host header, got {hosts}")
    return request


def parse_timeout(value: bytes) -> float | None:
    """Return the seconds of an X-Request-Timeout-S header, or None if they are not positive and finite."""
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0.0 < seconds < math.inf else None


def _origin_form(target: bytes) -> bytes:
    """Strip scheme and host (absolute form), and any fragment."""
    target = target.partition(b"#")[0]
    if target.startswith(b"/"):
        return target
    _, found, rest = target.partition(b"://")
    return b"/" + rest.partition(b"/")[2] if found else target

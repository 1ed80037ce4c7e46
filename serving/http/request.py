"""A parsed HTTP request: its scope, headers that the server itself reads, and its body within the memory budget."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serving.greenlets import SMALL_BYTES
from serving.http.wsgi import Environ
from serving.memory import RequestMemory

MAX_HEAD_BYTES = 64 * 1024  # request line and headers

TOO_LARGE = "431 Request Header Fields Too Large"
TIMEOUT_HEADER = b"x-request-timeout-s"  # can only shorten the server's request timeout
GROW_BYTES = 1024 * 1024  # an upload reserves memory in steps of this size

# The minimum upload rate: bytes in each period. It is higher while other requests wait for memory.
UPLOAD_PERIOD_S, UPLOAD_BYTES = 5.0, 5 * 1024
CONTENDED_PERIOD_S, CONTENDED_BYTES = 2.0, 32 * 1024

_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+;=%-]*(:[0-9]*)?|\[[0-9A-Fa-f:.]+\](:[0-9]*)?")


class RequestFault(Exception):  # noqa: N818 - named for the condition, like those of serving/errors.py
    """A request that cannot be processed; the server responds with `status` and closes the connection."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class Request(RequestResponseCycle):
    """A request and the state of its response; uvicorn's `receive` waits for more of the body."""

    def __init__(self, connection: HttpToolsProtocol, scope: dict[str, Any], *, keep_alive: bool) -> None:
        self.scope = cast(Any, scope)  # the part of an ASGI scope that is used here
        self.transport = connection.transport
        self.flow = connection.flow
        self.message_event = asyncio.Event()
        self.disconnected = False
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = connection.expect_100_continue
        self.body = bytearray()
        self.more_body = True
        self.response_complete = False
        self.declared_bytes: int | None = None  # Content-Length; of a chunked body that is too long, what has arrived
        self.environ: Environ | None = None  # made early where there is access control
        self.client: str = scope["client"][0] if scope["client"] else ""  # its IP address
        self.timeout: bytes | None = None  # X-Request-Timeout-S
        self.timeout_s = 0.0  # from the end of the request to its response
        self.waited_s = 0.0  # for memory for the body; counts towards the timeout


def read_request(connection: HttpToolsProtocol) -> Request:
    """Make the request whose headers the connection's parser has completed; raises RequestFault if one is invalid."""
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
        "scheme": connection.scheme,
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


def _origin_form(target: bytes) -> bytes:
    """Strip scheme and host (absolute form), and any fragment."""
    target = target.partition(b"#")[0]
    if target.startswith(b"/"):
        return target
    _, found, rest = target.partition(b"://")
    return b"/" + rest.partition(b"/")[2] if found else target


class BodyReceiver:
    """Receives the body of one request, if it is large or has not fully arrived, with `memory` reserved for it."""

    def __init__(self, request: Request, memory: RequestMemory, *, max_bytes: int) -> None:
        self._request = request
        self._memory = memory
        self._max_bytes = max_bytes
        self._loop = asyncio.get_running_loop()
        self.waits_for_memory = False
        self.period_started_s = self._loop.time()
        self.period_bytes = 0  # received in this period

    async def receive(self) -> bytes | None:
        """Return the body, or None after a client disconnect or a fault in the rest of the request.

        A body that is too long is returned empty: the application refuses the request by its Content-Length.

        Raises:
            TooLarge: the memory budget can never hold it.
            Overloaded: no memory was free before the deadline.
        """
        request = self._request
        declared = request.declared_bytes or 0
        if declared > self._max_bytes:
            request.keep_alive = False
            return b""
        is_small = declared <= SMALL_BYTES
        if not is_small:
            self._memory.check_fits(declared)
        reserved = 0
        received: list[bytes] = []
        size = 0
        while request.more_body or request.body:
            message = cast(dict[str, Any], await request.receive())
            if message["type"] == "http.disconnect":
                return None
            size += len(message["body"])
            if size > self._max_bytes:
                request.keep_alive = False
                request.declared_bytes = size
                return b""
            if size > reserved:
                if is_small and size > SMALL_BYTES:  # a chunked body
                    is_small, reserved = False, 0
                step_bytes = SMALL_BYTES if is_small else GROW_BYTES
                grown = min(size + step_bytes, max(size, declared))
                await self._wait_for_memory(grown - reserved, is_small=is_small)
                reserved = grown
            received.append(message["body"])
        return b"".join(received)

    async def _wait_for_memory(self, more_bytes: int, *, is_small: bool) -> None:
        request = self._request
        self.waits_for_memory = True
        began_s = self._loop.time()
        try:
            deadline_s = time.monotonic() + request.timeout_s - request.waited_s
            await self._memory.grow_body(more_bytes, is_small=is_small, deadline_s=deadline_s)
        finally:
            self.waits_for_memory = False
            waited_s = self._loop.time() - began_s
            request.waited_s += waited_s
            self.period_started_s += waited_s  # backpressure: reading was paused meanwhile

    def check_rate(self, now_s: float) -> None:
        """Raise RequestFault if the client uploads too slowly."""
        period_s, least = UPLOAD_PERIOD_S, UPLOAD_BYTES
        if self._memory.is_contended:
            period_s, least = CONTENDED_PERIOD_S, CONTENDED_BYTES
        if now_s - self.period_started_s < period_s:
            return
        received, self.period_bytes = self.period_bytes, 0
        self.period_started_s = now_s
        if received < least:
            message = f"upload too slow: received {received:,} bytes in {period_s:.0f} s, expected at least {least:,}"
            raise RequestFault("408 Request Timeout", message)

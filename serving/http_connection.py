"""One connection of an HTTP/1.1 client: requests in, by httptools' parser, and answers out, in their order."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from typing import cast

import httptools

from serving.waiting import SMALL_BYTES, LoopGreenlets, caller_is_gone
from serving.wsgi import Environ, Reply, WsgiApp, call_app, make_environ, set_body

logger = logging.getLogger("serving")
access_logger = logging.getLogger("serving.access")

MAX_HEAD_BYTES = 64 * 1024  # of a request's first line and headers
STALLED_S = 30.0  # without a byte of a request that has begun, or of a connection's first
KEEP_ALIVE_S = 75.0  # between two requests: longer than proxies keep a connection for another

_REQUEST_LINE = re.compile(rb"[A-Z]+ \S+ HTTP/")


@dataclass
class HttpLimits:
    """What all connections of a server share.

    Args:
        app: the WSGI application that answers. It is told the length of a body that is too long, by its
            CONTENT_LENGTH, but not given it, and is expected to refuse.
        max_body_bytes: the longest body.
        threads: large requests read and answered at the same time; more wait. Bounds the memory of bodies, too.
        access_log: log a line for each request.
    """

    app: WsgiApp
    max_body_bytes: int
    threads: int
    access_log: bool

    def __post_init__(self) -> None:
        self.greenlets = LoopGreenlets(ThreadPoolExecutor(self.threads, thread_name_prefix="request"))
        self.large = asyncio.Semaphore(self.threads)
        self.connections: set[Connection] = set()
        self.is_stopping = False


@dataclass(eq=False, slots=True)
class _Request:
    target: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    environ: Environ = field(default_factory=dict)
    body: bytes | bytearray = b""
    head_bytes: int = 0
    has_head: bool = False
    is_complete: bool = False
    is_refused: bool = False  # answered already, though it goes on: what comes is thrown away
    is_large: bool = False
    has_place: bool = False  # one of those for large requests
    is_over: bool = False
    keep_alive: bool = True


class Connection(asyncio.Protocol):
    """A connection.

    Small requests are answered in the event loop's thread, as greenlets; large and compressed ones, whose reading
    would keep the others waiting, in one of a few threads.
    """

    def __init__(self, shared: HttpLimits) -> None:
        self._shared = shared
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._request: _Request | None = None  # being read
        self._waiting: deque[_Request] = deque()  # to be answered
        self._answering: _Request | None = None
        self._last_data_s = self._loop.time()
        self._is_first = True
        self._can_write = True
        self._can_read = True

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As for asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._server = transport.get_extra_info("sockname")[:2]
        self._client = transport.get_extra_info("peername")[0]
        self._shared.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """As for asyncio.Protocol."""
        del exc
        self._shared.connections.discard(self)
        for request in (self._request, *self._waiting):
            if request is not None and request is not self._answering:
                self._release(request)
        self._waiting.clear()

    def data_received(self, data: bytes) -> None:
        """As for asyncio.Protocol."""
        self._last_data_s = self._loop.time()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # to a protocol that is not spoken here: answered as the request that it is, the last one
        except httptools.HttpParserInvalidMethodError:
            self._refuse("501 Not Implemented" if _REQUEST_LINE.match(data) else "400 Bad Request")
            return
        except httptools.HttpParserError:
            self._refuse("400 Bad Request")
            return
        request = self._request
        if request is not None and not request.has_head:
            request.head_bytes += len(data)
            if request.head_bytes > MAX_HEAD_BYTES:
                self._refuse("431 Request Header Fields Too Large")
        self._answer_next()

    def pause_writing(self) -> None:
        """As for asyncio.Protocol: no further request is answered before the client has read the answers."""
        self._can_write = False

    def resume_writing(self) -> None:
        """As for asyncio.Protocol."""
        self._can_write = True
        self._answer_next()

    # What the parser calls

    def on_message_begin(self) -> None:
        """As for httptools."""
        self._request = _Request()

    def on_url(self, url: bytes) -> None:
        """As for httptools."""
        assert self._request
        self._request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """As for httptools."""
        assert self._request
        self._request.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """As for httptools."""
        request = self._request
        assert request
        request.has_head = True
        request.keep_alive = self._parser.should_keep_alive() and not self._parser.should_upgrade()
        request.environ = environ = make_environ(
            method=self._parser.get_method().decode("ascii"),
            target=_path_of(request.target),
            version=self._parser.get_http_version(),
            headers=request.headers,
            server=self._server,
            client=self._client,
        )
        if int(environ.get("CONTENT_LENGTH") or 0) > self._shared.max_body_bytes:
            self._refuse_body(request)
        elif environ.get("HTTP_EXPECT", "").lower() == "100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """As for httptools."""
        request = self._request
        assert request
        if request.is_refused:
            return
        if not request.body:
            request.body = body
        else:
            if isinstance(request.body, bytes):
                request.body = bytearray(request.body)
            request.body += body
        if len(request.body) > SMALL_BYTES and not request.is_large:
            request.is_large = True
            self._pause_reading()
            self._loop.create_task(self._read_large(request))
        if len(request.body) > self._shared.max_body_bytes:
            request.environ.pop("HTTP_TRANSFER_ENCODING", None)
            request.environ["CONTENT_LENGTH"] = str(len(request.body))
            request.body = b""
            self._refuse_body(request)

    def on_message_complete(self) -> None:
        """As for httptools."""
        request, self._request = self._request, None
        assert request
        request.is_complete = True
        if request.is_refused:
            self._answer_next()
            return
        if request.body:
            set_body(request.environ, bytes(request.body))
            request.body = b""
        self._enqueue(request)

    # Answering

    def _refuse_body(self, request: _Request) -> None:
        """Let the application refuse a request before its body is there."""
        request.is_refused = True
        self._enqueue(request)

    def _enqueue(self, request: _Request) -> None:
        self._waiting.append(request)
        if len(self._waiting) > 1 or self._answering:
            self._pause_reading()  # one who does not wait for the answers need not be read

    def _answer_next(self) -> None:
        if self._answering or not self._waiting or not self._can_write or self._transport.is_closing():
            return
        self._answering = request = self._waiting.popleft()
        request.environ["serving.caller_is_gone"] = self._transport.is_closing
        if request.is_large or "HTTP_CONTENT_ENCODING" in request.environ:
            self._loop.create_task(self._answer_in_thread(request))
        else:
            self._shared.greenlets.call(self._answer, request)

    def _answer(self, request: _Request) -> None:
        self._finish(request, self._call_app(request))

    async def _answer_in_thread(self, request: _Request) -> None:
        threads = self._shared.greenlets.threads
        self._finish(request, await self._loop.run_in_executor(threads, self._call_app, request))

    def _call_app(self, request: _Request) -> Reply:
        caller_is_gone.set(request.environ["serving.caller_is_gone"])
        try:
            return call_app(self._shared.app, request.environ)
        except Exception:  # the application has answered its own faults already
            logger.exception("the application failed")
            return Reply("500 Internal Server Error", [], b"")

    def _finish(self, request: _Request, reply: Reply) -> None:
        """Write an answer, and see what comes next."""
        self._release(request)
        self._answering = None
        if self._shared.access_log:
            line = f"{request.environ['REQUEST_METHOD']} {request.target.decode('latin-1')}"
            access_logger.info('%s "%s HTTP/%s" %s', self._client, line, self._version(request), reply.status[:3])
        if self._transport.is_closing():
            return
        keep_alive = request.keep_alive and not self._shared.is_stopping
        head = _head(reply, self._connection_header(request, keep_alive), int(self._loop.time()))
        self._transport.write(head if request.environ["REQUEST_METHOD"] == "HEAD" else head + reply.body)
        self._is_first = False
        self._last_data_s = self._loop.time()
        if not keep_alive:
            self._transport.close()
        elif self._waiting:
            self._loop.call_soon(self._answer_next)
        else:
            self._resume_reading()

    def _connection_header(self, request: _Request, keep_alive: bool) -> str:
        if not keep_alive:
            return "connection: close\r\n"
        return "connection: keep-alive\r\n" if self._version(request) == "1.0" else ""

    def _version(self, request: _Request) -> str:
        protocol: str = request.environ["SERVER_PROTOCOL"]
        return protocol.removeprefix("HTTP/")

    # Limits

    async def _read_large(self, request: _Request) -> None:
        """Read on when there is a place for another large request."""
        await self._shared.large.acquire()
        if request.is_over or self._transport.is_closing():
            self._shared.large.release()
        else:
            request.has_place = True
            self._resume_reading()

    def _release(self, request: _Request) -> None:
        """Note that a request is over; its place, if it has one, is the next one's."""
        request.is_over = True
        if request.has_place:
            request.has_place = False
            self._shared.large.release()

    def _pause_reading(self) -> None:
        if self._can_read:
            self._can_read = False
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if not self._can_read and not self._transport.is_closing():
            self._can_read = True
            self._last_data_s = self._loop.time()
            self._transport.resume_reading()

    def _refuse(self, status: str) -> None:
        """End the connection, whatever it was in."""
        if not self._transport.is_closing():
            self._transport.write(f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".encode())
            self._transport.close()

    def close_if_idle(self) -> None:
        """Close the connection where no request is being read or answered."""
        if not (self._request or self._waiting or self._answering):
            self._transport.close()

    def close_if_stalled(self, now_s: float) -> None:
        """Close the connection where its client has kept silent for too long."""
        silent_s = now_s - self._last_data_s
        if self._answering or self._waiting or not self._can_read:
            return
        if self._request and silent_s > STALLED_S:
            self._refuse("408 Request Timeout")
        elif silent_s > (STALLED_S if self._is_first else KEEP_ALIVE_S):
            self._transport.close()


def _path_of(target: bytes) -> bytes:
    """Return path and query of a target, without the host that proxies are sent, and the fragment that nobody is."""
    target = target.partition(b"#")[0]
    if target.startswith(b"/"):
        return target
    _, found, rest = target.partition(b"://")
    return b"/" + rest.partition(b"/")[2] if found else target


def _head(reply: Reply, connection: str, now_s: int) -> bytes:
    headers = "".join([f"\r\n{name}: {value}" for name, value in reply.headers])
    if "\r\nContent-Length: " not in headers:
        headers = f"\r\ncontent-length: {len(reply.body)}{headers}"
    return f"HTTP/1.1 {reply.status}{headers}\r\n{connection}date: {_date(now_s)}\r\n\r\n".encode("latin-1")


@lru_cache(maxsize=1)
def _date(_: int) -> str:
    """Return the time as HTTP writes it; made anew each second of the loop's clock."""
    return formatdate(usegmt=True)

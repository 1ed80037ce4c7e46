"""One HTTP/1.1 connection: uvicorn's protocol, with limits, and with a WSGI application in the place of an ASGI one.

What comes from uvicorn: parsing (httptools), the order of pipelined requests, flow control, keep-alive. What is added:
bounds on everything a client can send, hold or leave unread; upgrade offers are ignored; requests that arrived whole
before a parse error are answered.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import socket
import sys
import time
from collections import deque
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPMethod
from typing import Any, cast

import httptools
import orjson
from typing_extensions import override
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from serving.errors import Overloaded, ServingError
from serving.greenlets import SMALL_BYTES, LoopGreenlets, lower_priority
from serving.http.wsgi import Response, WsgiApp, call_app, make_environ, set_body
from serving.memory import MemoryBudget, RequestMemory
from serving.request_context import RequestContext, current_request

logger = logging.getLogger("serving")
access_logger = logging.getLogger("serving.access")

MAX_HEAD_BYTES = 64 * 1024  # of a request's first line and headers
MAX_TRAILER_BYTES = 16 * 1024  # of trailers and chunk extensions
PARSE_BYTES = 4 * 1024  # parsed at a time, so that one read cannot become thousands of pipelined requests
PARSE_BODY_BYTES = 64 * 1024
CHUNK_OVERHEAD_BYTES = 16  # framing of a chunk: its size and line breaks
GROW_BYTES = 1024 * 1024  # steps in which an upload reserves memory

HEAD_TIMEOUT_S = 10.0  # from a request's first byte to the end of its headers
FIRST_REQUEST_TIMEOUT_S = 30.0  # on a new connection
KEEP_ALIVE_S = 75.0  # between two requests: longer than proxies keep a connection for another
UNREAD_TIMEOUT_S = 30.0  # a response that the client does not read
# After a response that came before the end of the body, so that the client can read it.
LINGER_S, LINGER_BYTES = 5.0, 16 * 1024 * 1024
DISCONNECT_AFTER_EOF_S = 1.0  # see `Connection._client_disconnected`
CLOSE_IDLE_AFTER_S = 0.5  # at shutdown: a request that is already on its way is still answered

# The slowest upload: so many bytes in each period of so many seconds. While others wait for memory, a stalled upload
# loses its place sooner.
UPLOAD_PERIOD_S, UPLOAD_BYTES = 5.0, 5 * 1024
CONTENDED_PERIOD_S, CONTENDED_BYTES = 2.0, 32 * 1024

TCP_CLOSED = 7  # Linux's state of a connection that was reset

TIMEOUT_HEADER = b"x-request-timeout-s"  # shortens the time that a request may take

_TOO_LARGE = "431 Request Header Fields Too Large"
_REQUEST_LINE = re.compile(rb"(?:\A|\r\n)([A-Z-]+) \S+ HTTP/1\.[01]\r\n")
_METHODS = frozenset(method.encode() for method in HTTPMethod)
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+;=%-]*(:[0-9]*)?|\[[0-9A-Fa-f:.]+\](:[0-9]*)?")


@dataclass(eq=False)
class SharedState:
    """What all connections of a server share.

    Args:
        app: the WSGI application.
        budget: memory for request bodies.
        max_body_bytes: the longest body.
        request_timeout_s: the time from the end of a request to its response.
        threads: worker threads for what would block the event loop.
        access_log: log a line for each request.
        urgent_paths: answered before other requests: health checks.
    """

    app: WsgiApp
    budget: MemoryBudget
    max_body_bytes: int
    request_timeout_s: float
    threads: int
    access_log: bool
    urgent_paths: Collection[bytes]

    def __post_init__(self) -> None:
        threads = ThreadPoolExecutor(self.threads, thread_name_prefix="request", initializer=lower_priority)
        self.greenlets = LoopGreenlets(threads)
        self.is_stopping = False
        self.date_header = "\r\n"  # and the empty line behind the headers; renewed every second


class RequestFault(Exception):  # noqa: N818 - a condition, as those of serving/errors.py
    """A request that cannot be processed; its connection is closed after the response."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class Request(RequestResponseCycle):
    """A request and the state of its response; `receive`, uvicorn's, waits for more of its body.

    Args:
        connection: which it came on.
        scope: what ASGI calls so, as far as it is used here.
        keep_alive: the connection stays open after the response.
    """

    def __init__(self, connection: Connection, scope: dict[str, Any], *, keep_alive: bool) -> None:
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
        self.declared_bytes: int | None = None  # its Content-Length
        self.timeout: bytes | None = None  # its X-Request-Timeout-S


class Connection(HttpToolsProtocol):
    """A connection. Small requests that have arrived whole go the short way: no task, no ASGI messages."""

    def __init__(self, config: Config, server_state: ServerState, limits: SharedState) -> None:
        super().__init__(config, server_state, {})
        self.cycle: Request | None = None  # type: ignore[assignment]  # the last request whose headers have come
        self.limits = limits
        # Per-connection state
        self._unparsed = b""  # received while earlier requests are being answered
        self._fault: RequestFault | None = None  # to be answered after the requests before it
        self._eof = False
        self._idle_since_s: float | None = self.loop.time()
        self._is_first = True
        self._closing_since_s: float | None = None
        self._is_lingering = False
        self._lingered_bytes = 0
        self._undrained: Request | None = None  # its response is written, and not yet read
        self._undrained_since_s = 0.0
        self._unread_bytes = 0  # of responses, when it was last looked at
        # Per-request state
        self._pipelined: deque[Request] = deque()  # behind the one that is being responded to
        self._starting: Request | None = None  # its headers are complete, in the data being parsed
        self._head_since_s: float | None = None  # while its headers arrive
        self._head_bytes = 0
        self._body_left = 0  # of a body whose length was declared
        self._excess_bytes = 0  # of trailers and chunk extensions
        # Of the piece being parsed
        self._had_event = False
        self._fed_body_bytes = 0
        self._fed_chunks = 0
        self._memory = RequestMemory(limits.budget)
        self._period_since_s = 0.0
        self._period_bytes = 0
        self._has_receiver = False  # a task receives the body
        self._receiver: asyncio.Task[None] | None = None
        self._waits_for_memory = False
        self._waited_s = 0.0  # for memory
        self._timeout_s = 0.0

    # What the event loop calls

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unparsed = b""
        self._pipelined.clear()
        if self._receiver and self._waits_for_memory:
            self._receiver.cancel()
        if self._undrained:
            self._undrained = None
            self._release()

    @override
    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open for the response to a client that has closed its sending side."""
        self._eof = True
        is_whole = self.cycle is not None and not self.cycle.more_body
        return self._head_since_s is None and not self.is_idle and is_whole

    @override
    def data_received(self, data: bytes) -> None:
        if self._is_lingering:
            self._lingered_bytes += len(data)
            if self._lingered_bytes > LINGER_BYTES:
                self.transport.abort()
        if self._fault or self._is_lingering or self.transport.is_closing():
            return
        self._unparsed = self._unparsed + data if self._unparsed else data
        self._parse()

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self._undrained_since_s = self.loop.time()

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        if self._undrained:
            cycle, self._undrained = self._undrained, None
            self._complete(cycle)

    # Parsing

    def _parse(self) -> None:
        """Parse what was received, until a request has to wait for the response to another."""
        if self.transport.is_closing():
            return
        while self._unparsed and not self._pipelined and not self._fault and not self._is_lingering:
            data, size = self._unparsed, self._piece_bytes()
            self._unparsed = data[size:]
            data = data[:size]
            self._fed_body_bytes = self._fed_chunks = 0
            self._had_event = False
            try:
                self._feed(data)
                self._check_sizes(len(data))
            except RequestFault as fault:
                self._refuse(fault)
            if not self._starting:
                continue
            if self._starting.more_body and 0 < self._body_left <= len(self._unparsed):
                continue  # the rest of its body is here
            cycle, self._starting = self._starting, None
            self._begin(cycle)
        if self._is_lingering:
            return
        is_full = self.cycle is not None and self.cycle.more_body and len(self.cycle.body) > HIGH_WATER_LIMIT
        if self._unparsed or self._pipelined or self._fault or is_full:
            self.flow.pause_reading()
        else:
            self.flow.resume_reading()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # httptools takes what follows the headers for another protocol. None is supported here, so the offer is
            # ignored (RFC 9110, section 7.8): the same headers without it are parsed again.
            if self.parser.get_method() == b"CONNECT":
                raise RequestFault("501 Not Implemented", "CONNECT is not a method of this server") from upgrade
            head = self._head_without_upgrade()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self._feed(head + data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__ or error.__cause__
            if isinstance(cause, RequestFault):
                raise cause from None
            raise RequestFault("400 Bad Request", f"the request cannot be parsed: {cause or error}") from error
        except httptools.HttpParserInvalidMethodError as error:
            if any(line[1] not in _METHODS for line in _REQUEST_LINE.finditer(data)):
                raise RequestFault("501 Not Implemented", "this method is not one of HTTP's") from error
            raise RequestFault("400 Bad Request", "expected a method, a path and a version of HTTP") from error
        except httptools.HttpParserError as error:
            raise RequestFault("400 Bad Request", f"the request cannot be parsed: {error}") from error

    def _head_without_upgrade(self) -> bytes:
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _check_sizes(self, fed_bytes: int) -> None:
        """Refuse headers, trailers and chunk extensions that do not end.

        They are counted in the pieces in which they are parsed, so a little more may pass.
        """
        if self._head_since_s is not None or not self._had_event:  # in the headers, or empty lines before a request
            self._head_bytes += fed_bytes
            if self._head_bytes > MAX_HEAD_BYTES:
                raise RequestFault(_TOO_LARGE, f"the headers are longer than {MAX_HEAD_BYTES:,} bytes")
        else:
            self._head_bytes = 0
        # What a chunk may have beside its data: its size, and an extension of a few bytes.
        excess = fed_bytes - 3 * self._fed_body_bytes - CHUNK_OVERHEAD_BYTES * self._fed_chunks
        self._excess_bytes = max(0, self._excess_bytes + excess) if self._is_in_body else 0
        if self._excess_bytes > MAX_TRAILER_BYTES:
            raise RequestFault(_TOO_LARGE, f"trailers or chunk extensions are longer than {MAX_TRAILER_BYTES:,} bytes")

    @property
    def _is_in_body(self) -> bool:
        return self._head_since_s is None and self.cycle is not None and self.cycle.more_body

    def _piece_bytes(self) -> int:
        """How much to parse at a time: never beyond the end of a body, nor many requests."""
        return min(self._body_left, PARSE_BODY_BYTES) if self._body_left > PARSE_BYTES else PARSE_BYTES

    @override
    def on_message_begin(self) -> None:
        self.url, self.headers = b"", []
        self.expect_100_continue = False
        self._idle_since_s = None
        self._head_since_s = self.loop.time()
        self._had_event = True

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_since_s is None:
            return  # a trailer, which nothing here reads
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    @override
    def on_headers_complete(self) -> None:
        """Begin with the request, or queue it behind those before it.

        In the place of uvicorn's, which describes the request for ASGI.
        """
        parser = self.parser
        if parser.should_upgrade():
            return  # parsed again without the offer
        version = parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise RequestFault("505 HTTP Version Not Supported", "this server takes the versions 1.0 and 1.1 of HTTP")
        target = _origin_form(self.url)
        url = httptools.parse_url(target)
        scope = {
            "method": parser.get_method().decode("ascii"),
            "http_version": version,
            "target": target,  # an empty query shows only here
            "raw_path": url.path,
            "query_string": url.query or b"",
            "headers": self.headers,
            "server": self.server,
            "client": self.client,
        }
        previous = self.cycle
        request = Request(self, scope, keep_alive=parser.should_keep_alive())
        self._read_headers(request, version)
        self.cycle = request
        self._head_since_s = None
        self._had_event = True
        self._body_left = request.declared_bytes or 0
        if previous is None or previous.response_complete:
            self._starting = request
        else:
            self.flow.pause_reading()
            self._pipelined.append(request)

    def _read_headers(self, request: Request, version: str) -> None:
        size, hosts = len(self.url), 0
        for name, value in self.headers:
            size += len(name) + len(value) + 4
            if name == b"host":
                hosts += 1
                if not _HOST.fullmatch(value.strip()):
                    raise RequestFault("400 Bad Request", "the Host header is not a host name")
            elif name == b"content-length":
                request.declared_bytes = int(value)
            elif name == TIMEOUT_HEADER:
                request.timeout = value
        if size > MAX_HEAD_BYTES:
            raise RequestFault(_TOO_LARGE, f"the headers are longer than {MAX_HEAD_BYTES:,} bytes")
        if hosts > 1 or (version == "1.1" and not hosts):
            raise RequestFault("400 Bad Request", f"expected exactly one Host header, got {hosts}")

    @override
    def on_body(self, body: bytes) -> None:
        self._had_event = True
        self._fed_body_bytes += len(body)
        self._period_bytes += len(body)
        self._body_left -= len(body)
        if self.cycle is None or self.cycle.response_complete:
            return
        self.cycle.body += body
        if len(self.cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self.cycle.message_event.set()

    def on_chunk_header(self) -> None:
        """Count a chunk: called by the parser."""
        self._fed_chunks += 1

    @override
    def on_message_complete(self) -> None:
        if self.cycle is None or self.parser.should_upgrade():
            return
        self._had_event = True
        self._body_left = 0
        if not self.cycle.response_complete:
            self.cycle.more_body = False
            self.cycle.message_event.set()

    @override
    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if not self._pipelined and not self._unparsed:
            self.flow.resume_reading()
        if self._pipelined:
            self._begin(self._pipelined.popleft())

    # Requests

    def _begin(self, cycle: Request) -> None:
        self._idle_since_s = None
        self._timeout_s = self.limits.request_timeout_s
        if cycle.timeout is not None:
            if (seconds := _read_seconds(cycle.timeout)) is None:
                got = cycle.timeout[:40].decode("latin-1")
                message = f"expected seconds in the header X-Request-Timeout-S, such as 0.5, got {got}"
                self._write(cycle, _error_response("400 Bad Request", message))
                return
            self._timeout_s = min(self._timeout_s, seconds)
        size = len(cycle.body)
        if not cycle.more_body and size <= SMALL_BYTES and (not size or self._memory.try_small_body(size)):
            body = bytes(cycle.body)
            cycle.body = bytearray()  # uvicorn keeps it until the connection's next request
            self._dispatch(cycle, body)
            return
        self._has_receiver = True
        self._receiver = task = self.loop.create_task(self._receive(cycle))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _receive(self, cycle: Request) -> None:
        """Receive a body that is large or has not yet arrived, within the memory budget."""
        self._period_since_s, self._period_bytes = self.loop.time(), 0
        try:
            try:
                body = await self._receive_body(cycle)
            finally:
                self._has_receiver = False  # before the next request may begin
        except asyncio.CancelledError:
            self._release()
            raise
        except ServingError as error:
            self._send_error(cycle, error)
        except RequestFault as fault:
            cycle.keep_alive = False
            self._write(cycle, _error_response(fault.status, str(fault)))
        else:
            if body is None:  # disconnected
                self._release()
            else:
                self._dispatch(cycle, body)

    async def _receive_body(self, cycle: Request) -> bytes | None:
        """Return the body, or None if the client disconnects.

        A body that is too long is empty: the application refuses the request by its Content-Length.

        Raises:
            RequestFault: the client sends too slowly.
            ServingError: no memory was free for it, or it can never fit.
        """
        declared = cycle.declared_bytes
        if (declared or 0) > self.limits.max_body_bytes:
            cycle.keep_alive = False
            return b""
        is_small = (declared or 0) <= SMALL_BYTES
        if not is_small:
            self._memory.check_fits(declared or 0)
        reserved = 0
        received: list[bytes] = []
        size = 0
        while cycle.more_body or cycle.body:
            message = cast(dict[str, Any], await cycle.receive())
            if message["type"] == "http.disconnect":
                if self._fault and not cycle.disconnected:
                    raise self._fault
                return None
            size += len(message["body"])
            if size > self.limits.max_body_bytes:
                cycle.keep_alive = False
                cast(Any, cycle.scope["headers"]).append((b"content-length", str(size).encode()))
                return b""
            if size > reserved:
                if is_small and size > SMALL_BYTES:  # a chunked body
                    is_small, reserved = False, 0
                step_bytes = SMALL_BYTES if is_small else GROW_BYTES
                grown = min(size + step_bytes, max(size, declared or size))
                await self._wait_for_memory(grown - reserved, is_small=is_small)
                reserved = grown
            received.append(message["body"])
        return b"".join(received)

    async def _wait_for_memory(self, more_bytes: int, *, is_small: bool) -> None:
        self._waits_for_memory = True
        began_s = self.loop.time()
        try:
            deadline_s = time.monotonic() + self._timeout_s - self._waited_s
            await self._memory.grow_body(more_bytes, is_small=is_small, deadline_s=deadline_s)
        finally:
            self._waits_for_memory = False
            waited_s = self.loop.time() - began_s
            self._waited_s += waited_s
            self._period_since_s += waited_s  # in which the client could not send

    def _dispatch(self, cycle: Request, body: bytes) -> None:
        """Have the application respond, in the order in which requests have come."""
        arrived_s = time.monotonic() - self._waited_s
        self._waited_s = 0.0
        timeout_s = self._timeout_s
        context = RequestContext(
            deadline_s=arrived_s + timeout_s,
            client_disconnected=lambda: self._client_disconnected(arrived_s),
            memory=self._memory,
        )
        greenlets = self.limits.greenlets
        is_urgent = cycle.scope["raw_path"] in self.limits.urgent_paths
        if not is_urgent and (late_s := greenlets.queue_s - timeout_s) > 0:
            message = "too many requests wait, and this one could not be answered in time; try again later"
            self._write(cycle, _serving_error_response(Overloaded(message, retry_after_s=max(1, round(late_s)))))
        else:
            greenlets.enqueue(self._respond, cycle, body, context, is_urgent=is_urgent)

    def _client_disconnected(self, arrived_s: float) -> bool:
        """Whether the client is gone.

        One that has only closed its sending side looks the same, and gets its response if that does not take long.
        """
        return self.transport.is_closing() or (self._eof and time.monotonic() - arrived_s > DISCONNECT_AFTER_EOF_S)

    def _respond(self, cycle: Request, body: bytes, context: RequestContext) -> None:
        current_request.set(context)
        environ = make_environ(cycle.scope)
        if body:
            set_body(environ, body)
        del body
        try:
            response = call_app(self.limits.app, environ)
        except Exception:  # the application has handled its own errors already
            logger.exception("the application failed")
            response = Response("500 Internal Server Error", [], b"")
        del environ
        self._write(cycle, response)

    def _send_error(self, cycle: Request, error: ServingError) -> None:
        cycle.keep_alive = False
        self._write(cycle, _serving_error_response(error))

    # Responses

    def _write(self, cycle: Request, response: Response) -> None:
        if self.limits.access_log:
            self._log(cycle, response)
        if self.transport.is_closing() or self._is_lingering:
            self._release()
            return
        if cycle.more_body:  # refused before its end
            cycle.keep_alive = False
        elif self.limits.is_stopping or self._eof:  # the last response closes the connection
            cycle.keep_alive = cycle.keep_alive and bool(self._pipelined or self._unparsed)
        head = self._encode_head(cycle, response)
        if cycle.scope["method"] == "HEAD":
            self.transport.write(head)
        elif len(response.body) > SMALL_BYTES:  # not copied
            self.transport.write(head)
            self.transport.write(response.body)
        else:
            self.transport.write(head + response.body)
        cycle.response_started = True
        if self.flow.write_paused:
            self._undrained = cycle
        else:
            self._complete(cycle)

    def _encode_head(self, cycle: Request, response: Response) -> bytes:
        head = [f"HTTP/1.1 {response.status}\r\n"]
        has_length = False
        for name, value in response.headers:
            head.append(f"{name}: {value}\r\n")
            has_length = has_length or name == "Content-Length"
        if not has_length:
            head.append(f"content-length: {len(response.body)}\r\n")
        if not cycle.keep_alive:
            head.append("connection: close\r\n")
        elif cycle.scope["http_version"] == "1.0":
            head.append("connection: keep-alive\r\n")
        head.append(self.limits.date_header)
        return "".join(head).encode("latin-1")

    def _complete(self, cycle: Request) -> None:
        """Finish a request whose response is written: close the connection, or go on with the next request."""
        self._release()
        cycle.response_complete = True
        cycle.message_event.set()
        self._is_first = False
        self._idle_since_s = self.loop.time()
        if self.transport.is_closing():
            return
        if not cycle.keep_alive:
            self._close(linger=cycle.more_body)
            return
        has_next = bool(self._pipelined)
        self.on_response_complete()
        if self._fault and not has_next:
            self._refuse(self._fault)
        elif self._unparsed:
            self.loop.call_soon(self._parse)

    def _log(self, cycle: Request, response: Response) -> None:
        scope = cycle.scope
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        client = scope["client"][0] if scope["client"] else "-"
        line = f"{scope['method']} {target.decode('latin-1')} HTTP/{scope['http_version']}"
        access_logger.info('%s "%s" %s', client, line, response.status[:3])

    def _refuse(self, fault: RequestFault) -> None:
        """Respond to what cannot be parsed, after the requests before it, and close the connection."""
        self._fault = fault
        self._unparsed = b""
        self.flow.pause_reading()
        broken = self.cycle if self.cycle and self.cycle.more_body else None  # the request that was being parsed
        if broken:
            if self._starting is broken:
                self._starting = None
            broken.response_complete = True
            if self._pipelined and self._pipelined[-1] is broken:
                self._pipelined.pop()
                return  # responded to when the requests before it are
            if self._has_receiver:
                broken.message_event.set()  # wakes `receive`; the task then raises the fault
                return
        elif self.cycle and not self.cycle.response_complete:
            return
        body = _error_body(str(fault))
        self.transport.write(
            b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (fault.status.encode(), len(body), b"" if self.parser.get_method() == b"HEAD" else body)
        )
        self._close(linger=True)

    def _close(self, *, linger: bool = False) -> None:
        """Close the connection; with `linger`, once the client has had time to read the response.

        Closing while unread data come would reset the connection, and take the response from the client.
        """
        self._closing_since_s = self.loop.time()
        if not linger or self._eof:
            self.transport.close()
            return
        self._is_lingering = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _release(self) -> None:
        memory = self._memory
        if memory.held_bytes:
            self._memory = RequestMemory(self.limits.budget)
            memory.release_in(self.limits.greenlets.threads)

    # Time limits

    def check_timeouts(self, now_s: float, late_s: float) -> None:
        """End what takes too long; called every second, or `late_s` later if the event loop was busy."""
        self._period_since_s += late_s  # in which nothing was received
        unread_bytes = self.transport.get_write_buffer_size()
        if unread_bytes < self._unread_bytes:  # the client reads
            self._undrained_since_s = now_s
            if self._closing_since_s is not None:
                self._closing_since_s = now_s
        self._unread_bytes = unread_bytes
        if self._closing_since_s is not None:
            if now_s - self._closing_since_s > UNREAD_TIMEOUT_S:
                self.transport.abort()
        elif self.flow.write_paused:
            if now_s - self._undrained_since_s > UNREAD_TIMEOUT_S:
                self.transport.abort()
        elif self._head_since_s is not None:
            if now_s - self._head_since_s > HEAD_TIMEOUT_S and (self.cycle is None or self.cycle.response_complete):
                self._refuse(RequestFault("408 Request Timeout", f"the headers took longer than {HEAD_TIMEOUT_S:g} s"))
        elif self._idle_since_s is not None:
            limit_s = FIRST_REQUEST_TIMEOUT_S if self._is_first else KEEP_ALIVE_S
            if now_s - self._idle_since_s > limit_s and self.is_idle:
                self._close()
        elif self._waits_for_memory:
            if self._has_gone():
                self.transport.abort()
        elif self._has_receiver:
            self._check_upload_rate(now_s)

    def _has_gone(self) -> bool:
        """Whether the client reset the connection, which the event loop does not notice while reading is paused."""
        if sys.platform != "linux":
            return False  # it keeps its place until the deadline
        info = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return bool(info[0] == TCP_CLOSED)

    def _check_upload_rate(self, now_s: float) -> None:
        period_s, least = UPLOAD_PERIOD_S, UPLOAD_BYTES
        if self._memory.is_contended:
            period_s, least = CONTENDED_PERIOD_S, CONTENDED_BYTES
        if now_s - self._period_since_s < period_s:
            return
        if self._period_bytes < least:
            self._refuse(RequestFault("408 Request Timeout", f"fewer than {least:,} bytes came in {period_s:.0f} s"))
        self._period_since_s, self._period_bytes = now_s, 0

    @property
    def is_idle(self) -> bool:
        """Whether no request is being received or processed."""
        return self._head_since_s is None and (self.cycle is None or self.cycle.response_complete)

    @property
    def has_responded(self) -> bool:
        """Whether the connection has been of use."""
        return not self._is_first

    @property
    def idle_since_s(self) -> float:
        """When the last response was written, or the connection made, on the loop's clock."""
        return self._idle_since_s or 0.0

    @override
    def shutdown(self) -> None:
        """Close the connection after the current response; an idle one after a short delay."""
        if self.is_idle:
            self.loop.call_later(CLOSE_IDLE_AFTER_S, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.is_idle and not self.transport.is_closing():
            self._close()


def _read_seconds(value: bytes) -> float | None:
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


def _error_body(message: str) -> bytes:
    return orjson.dumps({"error": message})


def _error_response(status: str, message: str) -> Response:
    return Response(status, [("Content-Type", "application/json")], _error_body(message))


def _serving_error_response(error: ServingError) -> Response:
    reason = {413: "Content Too Large", 503: "Service Unavailable"}.get(error.status, "Error")
    response = _error_response(f"{error.status} {reason}", str(error))
    if error.retry_after_s is not None:
        response.headers.append(("Retry-After", str(error.retry_after_s)))
    return response

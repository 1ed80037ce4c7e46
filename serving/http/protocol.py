"""One HTTP/1.1 connection: uvicorn's httptools protocol with limits, calling a WSGI application instead of an ASGI one.

uvicorn does the parsing (httptools), flow control and keep-alive. Added here: limits on everything a client can send,
hold or leave unread; Upgrade headers are ignored; complete requests before a parse error get their responses.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import struct
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import override
from uvicorn.config import Config
from uvicorn.server import ServerState

from serving.errors import Overloaded, ServingError
from serving.greenlets import SMALL_BYTES, LoopGreenlets, lower_priority
from serving.http.parser import RequestParser
from serving.http.request import BodyReceiver, Request, RequestFault
from serving.http.wsgi import (
    Environ,
    Response,
    WsgiApp,
    add_body,
    call_app,
    encode_head,
    error_response,
    make_environ,
    refusal_response,
)
from serving.memory import MemoryBudget, RequestMemory
from serving.request_context import UNROUTED, RequestContext, current_request

logger = logging.getLogger("serving")

HEAD_TIMEOUT_S = 10.0  # from the first byte of a request to the end of its headers
FIRST_REQUEST_TIMEOUT_S = 30.0  # idle timeout of a new connection
KEEP_ALIVE_S = 75.0  # idle timeout between two requests; longer than the keep-alive of common proxies
UNREAD_TIMEOUT_S = 30.0  # for a response that the client does not read
# After a response that was sent before the end of the body: time for the client to read it.
LINGER_S, LINGER_BYTES = 5.0, 16 * 1024 * 1024
DISCONNECT_AFTER_EOF_S = 1.0  # see `Connection._client_disconnected`
CLOSE_IDLE_AFTER_S = 0.5  # graceful shutdown: requests that are already on their way still get a response
TLS_WRITE_BYTES = 64 * 1024  # of a large response, encrypted at a time

TCP_CLOSED = 7  # Linux's TCP state after a reset
# Linux's `tcp_info`: packets that are not acknowledged; bytes that are acknowledged, and that are not sent.
_TCP_INFO = struct.Struct("=24xI92xQ16xI")


class AccessControl(Protocol):
    """Decides at the end of a request's headers, before its body is received."""

    def admit(self, environ: Environ) -> Response | None:
        """Return the response to a request that the application must not see; None if it may.

        The environ may be changed; the log has its "REMOTE_ADDR".
        """

    def decorate(self, environ: Environ, response: Response) -> None:
        """Add the headers that every response needs to one that the application has not made."""


@dataclass(eq=False)
class SharedState:
    """State shared by all connections of one server; made in the thread of its event loop."""

    app: WsgiApp
    budget: MemoryBudget  # for request bodies
    max_body_bytes: int
    request_timeout_s: float  # from the end of a request to its response
    threads: int  # for calls that would block the event loop
    urgent_paths: Collection[bytes]  # processed before other requests: health checks
    access: AccessControl | None = None  # None: every request is admitted
    # Called with each request that is refused before it reaches the application; gives it an ID.
    report_refused: Callable[[RequestContext], None] = lambda _: None

    def __post_init__(self) -> None:
        threads = ThreadPoolExecutor(self.threads, thread_name_prefix="request", initializer=lower_priority)
        self.greenlets = LoopGreenlets(threads)
        self.is_stopping = False
        self.date_header = "\r\n"  # the last header and the empty line after it; updated every second


class Connection(RequestParser):
    """One connection. Fast path: a small request that has fully arrived needs no task and no ASGI messages."""

    def __init__(self, config: Config, server_state: ServerState, shared: SharedState) -> None:
        super().__init__(config, server_state)
        self.shared = shared
        self._eof = False
        self.idle_since_s = self.loop.time()  # when the last response was written, or the connection made
        self.has_responded = False
        self._is_closing = False  # the last response is written
        self._lingered_bytes = 0
        self._draining: Request | None = None  # its response is written, but still in the transport's buffer
        self._unread_since_s = 0.0  # the client has read nothing, while the transport's buffer is full or it closes
        self._buffered_bytes = 0  # in the transport's write buffer, at the last check
        self._is_tls = False
        self._unencrypted: memoryview | None = None  # TLS: the rest of a large response
        self._acknowledged_bytes = 0  # TLS: by the client, at the last check
        self._memory = RequestMemory(shared.budget)
        self._receiver: BodyReceiver | None = None
        self._receive_task: asyncio.Task[None] | None = None

    # Protocol interface

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._is_tls = self.scheme == "https"
        if self._is_tls:
            transport.set_write_buffer_limits(TLS_WRITE_BYTES)
        if self.shared.is_stopping:  # accepted before, but its handshake ended now
            self.shutdown()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unparsed = b""
        self._pipelined.clear()
        self._unencrypted = None
        if self._receive_task and self._receiver and self._receiver.waits_for_memory:
            self._receive_task.cancel()
        if self._draining:
            self._draining = None
            self._release()

    @override
    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep a half-closed connection open for the response to a complete request. TLS transports cannot."""
        self._eof = True
        if self._is_tls:
            return False
        is_whole = self.cycle is not None and not self.cycle.more_body
        return self._head_started_s is None and not self.is_idle and is_whole

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
        self._unread_since_s = self.loop.time()

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread_since_s = self.loop.time()
        if self._unencrypted is not None:
            self._write_unencrypted()
        if self._draining and not self.flow.write_paused:
            request, self._draining = self._draining, None
            self._complete(request)

    @override
    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self._receiver:
            self._receiver.period_bytes += len(body)

    # Requests

    @override
    def _begin(self, request: Request) -> None:
        self.idle_since_s = math.inf
        request.timeout_s = self.shared.request_timeout_s
        if self.shared.access:
            request.environ = make_environ(request.scope)
            refusal = self.shared.access.admit(request.environ)
            request.client = request.environ["REMOTE_ADDR"]
            if refusal:
                self._report_refused(request, refusal)
                self._write(request, refusal)
                return
        if request.timeout is not None:
            try:
                seconds = float(request.timeout)
            except ValueError:
                seconds = math.nan
            if not 0.0 < seconds < math.inf:
                got = request.timeout[:40].decode("latin-1")
                message = f"expected seconds in the header X-Request-Timeout-S, such as 0.5, got {got}"
                self._reject(request, error_response("400 Bad Request", message))
                return
            request.timeout_s = min(request.timeout_s, seconds)
        size = len(request.body)
        if not request.more_body and size <= SMALL_BYTES and (not size or self._memory.try_small_body(size)):
            body = bytes(request.body)
            request.body = bytearray()  # uvicorn keeps the request until the next one of the connection
            self._dispatch(request, body)
            return
        self._receiver = BodyReceiver(request, self._memory, max_bytes=self.shared.max_body_bytes)
        self._receive_task = task = self.loop.create_task(self._receive(request, self._receiver))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _receive(self, request: Request, receiver: BodyReceiver) -> None:
        """Receive a body that is large or has not fully arrived, then dispatch the request."""
        try:
            try:
                body = await receiver.receive()
            finally:
                self._receiver = None  # before the next request may begin
        except asyncio.CancelledError:
            self._release()
            raise
        except ServingError as error:
            request.keep_alive = False
            self._reject(request, refusal_response(error), shed_reason=error.shed_reason)
            return
        if body is not None:
            self._dispatch(request, body)
        elif self._fault and not request.disconnected:
            request.keep_alive = False
            self._reject(request, error_response(self._fault.status, str(self._fault)))
        else:
            self._release()

    def _dispatch(self, request: Request, body: bytes) -> None:
        """Queue a complete request for the application; load shedding: refuse it if it would miss its deadline."""
        arrived_s = time.monotonic() - request.waited_s
        context = RequestContext(
            deadline_s=arrived_s + request.timeout_s,
            client_disconnected=lambda: self._client_disconnected(arrived_s),
            memory=self._memory,
        )
        greenlets = self.shared.greenlets
        is_urgent = request.scope["raw_path"] in self.shared.urgent_paths
        if not is_urgent and (late_s := greenlets.queue_s - request.timeout_s) > 0:
            message = "server overloaded: the request would exceed its timeout in the queue; try again later"
            error = Overloaded(message, shed_reason="loop_queue", retry_after_s=max(1, round(late_s)))
            self._reject(request, refusal_response(error), shed_reason=error.shed_reason)
        else:
            greenlets.enqueue(self._respond, request, body, context, is_urgent=is_urgent)

    def _client_disconnected(self, arrived_s: float) -> bool:
        """Return whether the client has closed its connection.

        A client that closed only its sending side (half-close) cannot be distinguished, and gets a response if that
        takes no longer than DISCONNECT_AFTER_EOF_S.
        """
        return self.transport.is_closing() or (self._eof and time.monotonic() - arrived_s > DISCONNECT_AFTER_EOF_S)

    def _respond(self, request: Request, body: bytes, context: RequestContext) -> None:
        current_request.set(context)
        environ, request.environ = request.environ or make_environ(request.scope), None
        add_body(environ, body, declared_bytes=request.declared_bytes)
        del body  # frees the memory as soon as the application drops it
        try:
            response = call_app(self.shared.app, environ)
        except Exception:  # the application handles its own errors, so this is a bug
            logger.exception("the WSGI application raised an exception")
            response = Response("500 Internal Server Error", [("X-Request-ID", context.request_id)], b"")
        del environ
        self._write(request, response)

    # Responses

    def _reject(self, request: Request, response: Response, *, shed_reason: str = "") -> None:
        """Respond to a request that does not reach the application."""
        if self.shared.access and request.environ is not None:
            self.shared.access.decorate(request.environ, response)
        self._report_refused(request, response, shed_reason)
        self._write(request, response)

    def _report_refused(self, request: Request | None, response: Response, shed_reason: str = "") -> None:
        """Report a refused request, and add its ID to the response. Without a request, its headers are not known."""
        context = RequestContext(
            client=request.client if request else self.client[0] if self.client else "",
            status=response.status[:3],
            route=UNROUTED,
            shed_reason=shed_reason,
        )
        if request:
            context.method = request.scope["method"]
            context.started_s -= request.waited_s
            sent = (value for name, value in request.scope["headers"] if name == b"x-request-id")
            context.request_id = next(sent, b"").decode("latin-1")
        self.shared.report_refused(context)
        if context.request_id:
            response.headers.append(("X-Request-ID", context.request_id))

    def _write(self, request: Request, response: Response) -> None:
        if self.transport.is_closing() or self._is_lingering:
            self._release()
            return
        if request.more_body:  # response sent before the end of the body
            request.keep_alive = False
        elif self.shared.is_stopping or self._eof:  # the last response closes the connection
            request.keep_alive = request.keep_alive and bool(self._pipelined or self._unparsed)
        connection = None if request.keep_alive else "close"
        if request.keep_alive and request.scope["http_version"] == "1.0":
            connection = "keep-alive"
        head = encode_head(response, self.shared.date_header, connection=connection)
        if request.scope["method"] == "HEAD":
            self.transport.write(head)
        elif len(response.body) > SMALL_BYTES:  # not copied
            self.transport.write(head)
            if self._is_tls:
                self._unencrypted = memoryview(response.body)
                self._write_unencrypted()
            else:
                self.transport.write(response.body)
        else:
            self.transport.write(head + response.body)
        if self.flow.write_paused:
            self._draining = request
        else:
            self._complete(request)

    def _write_unencrypted(self) -> None:
        """Encrypt more of a large response, until the transport's buffer is full.

        All at once would block the event loop, and hold a second copy in memory.
        """
        while self._unencrypted is not None and not self.flow.write_paused:
            part, rest = self._unencrypted[:TLS_WRITE_BYTES], self._unencrypted[TLS_WRITE_BYTES:]
            self._unencrypted = rest if rest else None
            self.transport.write(part)

    def _complete(self, request: Request) -> None:
        """Finish a request whose response is written: close the connection, or begin the next request."""
        self._release()
        request.response_complete = True
        request.message_event.set()
        self.has_responded = True
        self.idle_since_s = self.loop.time()
        if self.transport.is_closing():
            return
        if not request.keep_alive:
            self._close(linger=request.more_body)
            return
        has_next = bool(self._pipelined)
        if has_next:
            self._begin(self._pipelined.popleft())
        if self._fault and not has_next:
            self._refuse(self._fault)
        elif self._unparsed:
            self.loop.call_soon(self._parse)
        elif not has_next:
            self.flow.resume_reading()

    @override
    def _refuse(self, fault: RequestFault) -> None:
        self._fault = fault
        self._unparsed = b""
        self.flow.pause_reading()
        broken = self.cycle if self.cycle and self.cycle.more_body else None  # the fault is in its body
        if broken:
            if self._starting is broken:
                self._starting = None
            broken.response_complete = True
            if self._pipelined and self._pipelined[-1] is broken:
                self._pipelined.pop()
                return  # `_complete` sends it after the earlier responses
            if self._receiver:
                broken.message_event.set()  # ends the receiver; `_receive` then sends it
                return
        elif self.cycle and not self.cycle.response_complete:
            return
        response = error_response(fault.status, str(fault))
        self._report_refused(broken, response)
        head = encode_head(response, self.shared.date_header, connection="close")
        self.transport.write(head if self.parser.get_method() == b"HEAD" else head + response.body)
        self._close(linger=True)

    def _close(self, *, linger: bool = False) -> None:
        """Close the connection; with `linger`, after the client has had time to read the response.

        Closing with unread data would reset the connection, and the client could lose the response.
        """
        self._is_closing, self._unread_since_s = True, self.loop.time()
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
            self._memory = RequestMemory(self.shared.budget)
            memory.release_in(self.shared.greenlets.threads)

    # Timeouts and shutdown

    def check_timeouts(self, now_s: float, late_s: float) -> None:
        """Enforce the time limits; called every second, or `late_s` later if the event loop was busy."""
        if self._receiver:
            self._receiver.period_started_s += late_s  # the event loop did not read meanwhile
        buffered_bytes = self.transport.get_write_buffer_size()
        if buffered_bytes < self._buffered_bytes:  # the client reads
            self._unread_since_s = now_s
        self._buffered_bytes = buffered_bytes
        if self._is_tls and (self._is_closing or self.flow.write_paused):
            self._check_tls_progress(now_s)
        if self._is_closing or self.flow.write_paused:
            if now_s - self._unread_since_s > UNREAD_TIMEOUT_S:
                self.transport.abort()
        elif self._head_started_s is not None:
            if now_s - self._head_started_s > HEAD_TIMEOUT_S and (self.cycle is None or self.cycle.response_complete):
                self._refuse(RequestFault("408 Request Timeout", f"the headers took longer than {HEAD_TIMEOUT_S:g} s"))
        elif self.is_idle:
            if now_s - self.idle_since_s > (KEEP_ALIVE_S if self.has_responded else FIRST_REQUEST_TIMEOUT_S):
                self._close()
        elif self._receiver and self._receiver.waits_for_memory:
            if self._was_reset():
                self.transport.abort()
        elif self._receiver:
            try:
                self._receiver.check_rate(now_s)
            except RequestFault as fault:
                self._refuse(fault)

    def _check_tls_progress(self, now_s: float) -> None:
        """Do what the transport's buffer size tells for connections without TLS: a TLS transport hides a part of it.

        A closed connection waits for the client to close its side, too. Many clients do so only when they would send
        their next request, so this ends once the client has received everything.
        """
        if sys.platform != "linux":
            return
        sent = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        if len(sent) < _TCP_INFO.size:
            return
        unacknowledged, acknowledged_bytes, unsent_bytes = _TCP_INFO.unpack(sent)
        if acknowledged_bytes != self._acknowledged_bytes:
            self._acknowledged_bytes, self._unread_since_s = acknowledged_bytes, now_s
        elif self.transport.is_closing() and acknowledged_bytes and not unacknowledged and not unsent_bytes:
            self.transport.abort()

    def _was_reset(self) -> bool:
        """Return whether the client reset the connection, which the event loop does not notice while reading is paused.

        Only on Linux; elsewhere the request stays queued until its deadline.
        """
        if sys.platform != "linux":
            return False
        info = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return bool(info[0] == TCP_CLOSED)

    @property
    def is_idle(self) -> bool:
        """Whether no request is being received or processed."""
        return self._head_started_s is None and (self.cycle is None or self.cycle.response_complete)

    @override
    def shutdown(self) -> None:
        """Close the connection after the current response; an idle connection after a short delay."""
        if self.is_idle:
            self.loop.call_later(CLOSE_IDLE_AFTER_S, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.is_idle and not self.transport.is_closing():
            self._close()

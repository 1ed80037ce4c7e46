"""Parses the requests of one HTTP/1.1 connection: limits, pipelining, and ignored Upgrade headers."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import deque
from http import HTTPMethod

import httptools
from typing_extensions import override
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from serving.http.request import MAX_HEAD_BYTES, TOO_LARGE, Request, RequestFault, read_request

PARSE_BYTES = 4 * 1024  # parsed at a time, so that one read cannot become thousands of pipelined requests
PARSE_BODY_BYTES = 64 * 1024
MAX_TRAILER_BYTES = 16 * 1024  # trailers and chunk extensions
CHUNK_OVERHEAD_BYTES = 16  # framing of a chunk: its size and line breaks

_REQUEST_LINE = re.compile(rb"(?:\A|\r\n)([A-Z-]+) \S+ HTTP/1\.[01]\r\n")
_METHODS = frozenset(method.encode() for method in HTTPMethod)


class FramingLimits:
    """Counts the bytes of one connection that are not body data, to refuse headers and trailers that do not end."""

    def __init__(self) -> None:
        self._head_bytes = 0
        self._excess_bytes = 0
        self.begin_piece()

    def begin_piece(self) -> None:
        """Reset the counts of the parser's callbacks, before the next piece is parsed."""
        self.had_event = False  # the parser found the start of a request, the end of its headers, or body data
        self.body_bytes = 0
        self.chunks = 0

    def check(self, piece_bytes: int, *, in_head: bool, in_body: bool) -> None:
        """Check the limits after a piece was parsed; raises RequestFault."""
        if in_head or not self.had_event:  # without an event: empty lines before a request
            self._head_bytes += piece_bytes
            if self._head_bytes > MAX_HEAD_BYTES:
                raise RequestFault(TOO_LARGE, f"the headers are longer than {MAX_HEAD_BYTES:,} bytes")
        else:
            self._head_bytes = 0
        # Each chunk may have its size and an extension of a few bytes.
        excess = piece_bytes - 3 * self.body_bytes - CHUNK_OVERHEAD_BYTES * self.chunks
        self._excess_bytes = max(0, self._excess_bytes + excess) if in_body else 0
        if self._excess_bytes > MAX_TRAILER_BYTES:
            raise RequestFault(TOO_LARGE, f"trailers or chunk extensions are longer than {MAX_TRAILER_BYTES:,} bytes")


class RequestParser(HttpToolsProtocol, ABC):
    """The parsing half of a connection: turns received data into requests and begins them in order."""

    def __init__(self, config: Config, server_state: ServerState) -> None:
        super().__init__(config, server_state, {})
        self.cycle: Request | None = None  # type: ignore[assignment]  # the last request with complete headers
        self._unparsed = b""  # received while earlier requests are processed
        self._pipelined: deque[Request] = deque()  # requests behind the one that is processed
        self._starting: Request | None = None  # its headers completed in the piece being parsed
        self._head_started_s: float | None = None  # None: no headers are being received
        self._body_left_bytes = 0  # of the declared Content-Length
        self._framing = FramingLimits()
        self._fault: RequestFault | None = None  # gets its response after the requests before it
        self._is_lingering = False  # the response is sent and the connection closes: received data is discarded

    @abstractmethod
    def _begin(self, request: Request) -> None:
        """Process a request whose body may not have arrived yet."""

    @abstractmethod
    def _refuse(self, fault: RequestFault) -> None:
        """Send an error response after those of earlier requests, and close the connection."""

    def _parse(self) -> None:
        """Parse the received data, until a request has to wait for the response to an earlier one."""
        if self.transport.is_closing():
            return
        while self._unparsed and not self._pipelined and not self._fault and not self._is_lingering:
            # Never parse beyond the end of a body, nor many requests at once.
            size = min(self._body_left_bytes, PARSE_BODY_BYTES) if self._body_left_bytes > PARSE_BYTES else PARSE_BYTES
            data, self._unparsed = self._unparsed[:size], self._unparsed[size:]
            self._framing.begin_piece()
            try:
                self._feed(data)
                in_head = self._head_started_s is not None
                in_body = not in_head and self.cycle is not None and self.cycle.more_body
                self._framing.check(len(data), in_head=in_head, in_body=in_body)
            except RequestFault as fault:
                self._refuse(fault)
            if not self._starting:
                continue
            if self._starting.more_body and 0 < self._body_left_bytes <= len(self._unparsed):
                continue  # the rest of its body has arrived
            request, self._starting = self._starting, None
            self._begin(request)
        if self._is_lingering:
            return
        # Backpressure: pause reading from a client that sends faster than the server responds.
        is_full = self.cycle is not None and self.cycle.more_body and len(self.cycle.body) > HIGH_WATER_LIMIT
        if self._unparsed or self._pipelined or self._fault or is_full:
            self.flow.pause_reading()
        else:
            self.flow.resume_reading()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # httptools treats the data after the headers as another protocol. None is supported, so the Upgrade header
            # is ignored (RFC 9110, section 7.8): the headers are parsed again without it.
            if self.parser.get_method() == b"CONNECT":
                raise RequestFault("501 Not Implemented", "the method CONNECT is not supported") from upgrade
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
                raise RequestFault("501 Not Implemented", "unknown HTTP method") from error
            message = "invalid request line: expected a method, a path and an HTTP version"
            raise RequestFault("400 Bad Request", message) from error
        except httptools.HttpParserError as error:
            raise RequestFault("400 Bad Request", f"the request cannot be parsed: {error}") from error

    def _head_without_upgrade(self) -> bytes:
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    # Parser callbacks

    @override
    def on_message_begin(self) -> None:
        self.url, self.headers = b"", []
        self.expect_100_continue = False
        self._head_started_s = self.loop.time()
        self._framing.had_event = True

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_started_s is None:
            return  # trailers are ignored
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    @override
    def on_headers_complete(self) -> None:
        """Start the request, or queue it behind earlier ones. Replaces uvicorn's, which builds a full ASGI scope."""
        if self.parser.should_upgrade():
            return  # parsed again without the Upgrade header
        previous = self.cycle
        self.cycle = request = read_request(self)
        self._head_started_s = None
        self._framing.had_event = True
        self._body_left_bytes = request.declared_bytes or 0
        if previous is None or previous.response_complete:
            self._starting = request
        else:
            self.flow.pause_reading()
            self._pipelined.append(request)

    @override
    def on_body(self, body: bytes) -> None:
        self._framing.had_event = True
        self._framing.body_bytes += len(body)
        self._body_left_bytes -= len(body)
        if self.cycle is None or self.cycle.response_complete:
            return
        self.cycle.body += body
        if len(self.cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self.cycle.message_event.set()

    def on_chunk_header(self) -> None:
        """Count the chunks."""
        self._framing.chunks += 1

    @override
    def on_message_complete(self) -> None:
        if self.cycle is None or self.parser.should_upgrade():
            return
        self._framing.had_event = True
        self._body_left_bytes = 0
        if not self.cycle.response_complete:
            self.cycle.more_body = False
            self.cycle.message_event.set()

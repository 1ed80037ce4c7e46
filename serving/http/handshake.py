"""TLS handshakes of accepted connections: a few start in each iteration of the event loop, and slow ones time out."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable

from serving.http.wsgi import encode_head, error_response

HANDSHAKE_TIMEOUT_S = 5.0  # from the accepted connection to the end of its handshake
# One with an RSA certificate takes the event loop 1 to 2 ms, which other connections wait for.
STARTS_PER_ITERATION = 4
# Until the client has read the rest and has closed its side, too. `Connection.check_timeouts` aborts before if it makes
# no progress.
CLOSE_TIMEOUT_S = 600.0

_HANDSHAKE_RECORD = 0x16  # the first byte that a TLS client sends
_DISCARD_BYTES = 64 * 1024


class Handshakes:
    """Makes the TLS transports of accepted connections.

    A connection that sends nothing costs no TLS state: its handshake begins with its first byte.

    Args:
        get_context: returns the context of the current certificate; called for every connection.
        make_protocol: makes the protocol of a connection.
    """

    def __init__(
        self, get_context: Callable[[], ssl.SSLContext], make_protocol: Callable[[], asyncio.Protocol]
    ) -> None:
        self._get_context = get_context
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def connect(self, connection: socket.socket) -> None:
        """Do the handshake of a non-blocking socket, and make its transport.

        Raises:
            OSError: the handshake failed, or the client did not speak TLS; the socket is to be closed.
            TimeoutError: it took too long.
        """
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            await self._wait_for_data(connection)
            first = connection.recv(1, socket.MSG_PEEK)
            if first and first[0] != _HANDSHAKE_RECORD:
                _refuse_plain_http(connection, first)
            if not first or first[0] != _HANDSHAKE_RECORD:
                raise ConnectionAbortedError("not a TLS client")
            await self._wait_for_turn()
            await self._loop.connect_accepted_socket(
                self._make_protocol,
                connection,
                ssl=self._get_context(),
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
                ssl_shutdown_timeout=CLOSE_TIMEOUT_S,
            )

    async def _wait_for_data(self, connection: socket.socket) -> None:
        readable = self._loop.create_future()

        def end() -> None:
            if not readable.done():
                readable.set_result(None)

        self._loop.add_reader(connection, end)
        try:
            await readable
        finally:
            self._loop.remove_reader(connection)

    async def _wait_for_turn(self) -> None:
        turn = self._loop.create_future()
        if not self._waiting:
            self._loop.call_soon(self._start_some)
        self._waiting.append(turn)
        await turn

    def _start_some(self) -> None:
        started = 0
        while self._waiting and started < STARTS_PER_ITERATION:
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled by the timeout
                turn.set_result(None)
                started += 1
        if self._waiting:
            self._loop.call_soon(self._start_some)


def _refuse_plain_http(connection: socket.socket, first: bytes) -> None:
    """Respond to an HTTP request without TLS."""
    if not first.isalpha():
        return
    connection.recv(_DISCARD_BYTES)  # unread data would reset the connection before the client has read the response
    response = error_response("400 Bad Request", "this port expects TLS: use a URL that begins with https://")
    connection.send(encode_head(response, "\r\n", connection="close") + response.body)

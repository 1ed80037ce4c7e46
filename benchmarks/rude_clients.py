"""Clients that hold, break or fill connections instead of reading responses; none of them expects one."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import time
from collections.abc import Callable

from benchmarks import payloads
from benchmarks.hostile import Outcome, Server

STALLED_UPLOADS = 40
STALLED_AFTER_BYTES = 40_000_000
HOLD_S = 3.0
RESET = struct.pack("ii", 1, 0)  # for SO_LINGER: close() sends RST


def _connect(server: Server) -> socket.socket:
    return socket.create_connection(server.http_address, timeout=10)


def _head(server: Server, length: int) -> bytes:
    return (
        f"POST /v1/models/{server.model}:predict HTTP/1.1\r\nHost: service\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def stalled_uploads(server: Server) -> list[Outcome]:
    """Send 40 MB of 60 on each of many connections, then nothing more."""
    started_s = time.monotonic()
    piece = b"[],[],[]," * 100_000
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(_connect(server)) for _ in range(STALLED_UPLOADS)]
        left = dict.fromkeys(connections, STALLED_AFTER_BYTES)
        for connection in connections:
            connection.settimeout(0)
            with contextlib.suppress(OSError):
                connection.send(_head(server, 60_000_000))
        while left and time.monotonic() - started_s < 2 * HOLD_S:
            sent = 0
            for connection in tuple(left):
                try:
                    sent += (count := connection.send(piece))
                    left[connection] -= count
                except BlockingIOError:
                    continue
                except OSError:
                    left[connection] = 0
                if left[connection] <= 0:
                    del left[connection]
            if not sent:
                time.sleep(0.01)
        time.sleep(HOLD_S)
    return [Outcome("stalled uploads", "none", time.monotonic() - started_s, f"{len(left)} not taken in", None)]


def resets(server: Server) -> list[Outcome]:
    """Reset connections: at once, in the head, in the body, and before the response is read."""
    image = payloads.make_small_image()
    upload = (
        f"POST /predict HTTP/1.1\r\nHost: service\r\nContent-Type: image/png\r\nContent-Length: {len(image)}\r\n\r\n"
    )
    request = upload.encode() + image
    for number in range(300):
        with contextlib.suppress(OSError), _connect(server) as connection:
            connection.sendall(request[: (0, 10, len(request) - 20, len(request))[number % 4]])
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    return []


def connection_churn(server: Server) -> list[Outcome]:
    """Open connections and close them, with and without a request."""
    for number in range(300):
        with contextlib.suppress(OSError), _connect(server) as connection:
            if number % 2:
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: service\r\n\r\n")
                connection.recv(4096)
    return []


def half_closed(server: Server) -> list[Outcome]:
    """Close the sending half in the middle of a body, and wait."""
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(50):
            with contextlib.suppress(OSError):
                connection = stack.enter_context(_connect(server))
                connection.sendall(_head(server, 1_000_000) + b'{"instances":')
                connection.shutdown(socket.SHUT_WR)
                connections.append(connection)
        for connection in connections:
            connection.settimeout(1)
            with contextlib.suppress(OSError):
                connection.recv(4096)
    return []


def endless_trailers(server: Server) -> list[Outcome]:
    """Send trailers behind a small chunked body for as long as the server reads them."""
    head = _head(server, 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    trailers = b"X-A: b\r\n" * 10_000
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            with contextlib.suppress(OSError):
                connection = stack.enter_context(_connect(server))
                connection.settimeout(1)
                connection.sendall(head + b"1\r\n[\r\n0\r\n")
                for _ in range(100):
                    connection.sendall(trailers)
    return []


def slow_clients(server: Server) -> list[Outcome]:
    """Send heads and bodies one byte at a time, for a while."""
    upload = _head(server, 1_000_000) + b'{"instances":[' + b"[0]," * 100
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(100):
            with contextlib.suppress(OSError):
                connections.append(stack.enter_context(_connect(server)))
        for connection in connections[::2]:
            with contextlib.suppress(OSError):
                connection.sendall(upload)
        for position in range(30):
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.sendall(upload[position : position + 1])
            time.sleep(HOLD_S / 30)
    return []


def never_reading(server: Server) -> list[Outcome]:
    """Ask for much, and read nothing of it."""
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            with contextlib.suppress(OSError):
                connection = stack.enter_context(_connect(server))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.settimeout(0.2)
                connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: service\r\n\r\n" * 2_000)
        time.sleep(HOLD_S)
    return []


def garbage(server: Server) -> list[Outcome]:
    """Send bytes that are no HTTP, to the HTTP port and to the one of gRPC."""
    host, _, port = server.grpc_address.rpartition(":")
    addresses = (server.http_address, (host, int(port)))
    for number in range(200):
        start = (b"", b"POST / HTTP/1.1\r\n", b"GET /\0 HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")[number % 4]
        with contextlib.suppress(OSError), socket.create_connection(addresses[number % 2], timeout=10) as connection:
            connection.settimeout(0.2)
            connection.sendall(start + os.urandom(random.randrange(1, 4_000)))
            if number % 10 == 0:
                connection.recv(4096)
    return []


RUDE_CLIENTS: dict[str, Callable[[Server], list[Outcome]]] = {
    function.__name__: function
    for function in (
        stalled_uploads,
        resets,
        connection_churn,
        half_closed,
        endless_trailers,
        slow_clients,
        never_reading,
        garbage,
    )
}

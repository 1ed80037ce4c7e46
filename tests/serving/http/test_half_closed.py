"""Half-closed connections: responses to complete requests still arrive, and no resources leak."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack

import pytest

from tests.serving.conftest import Server, picture
from tests.serving.http.conftest import (
    HEALTH,
    MB,
    ROUTES,
    Client,
    head,
    held_ports,
    noisy_png,
    post,
    post_chunked,
    resident_bytes,
    wait_until,
)

PREDICT = ROUTES["predict"]
SMALL = post("/predict", picture("blue"), content_type=b"image/png")
CHUNKED_HEAD = head("/predict", b"Transfer-Encoding: chunked", content_type=b"image/png")
CHUNK = b"1\r\na\r\n"
UPLOAD = head("/predict", b"Content-Length: 50000000", content_type=b"image/png")

WHOLE: dict[str, tuple[bytes, list[int]]] = {
    "get": (HEALTH, [200]),
    "page": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
    "http 1.0": (b"GET /healthz HTTP/1.0\r\n\r\n", [200]),
    "close": (b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", [200]),
    "small": (SMALL, [200]),
    "chunked": (post_chunked("/predict", picture("red"), content_type=b"image/png"), [200]),
    "large": (post("/predict", noisy_png(), content_type=b"image/png"), [200]),
    "large chunked": (post_chunked("/predict", noisy_png(), content_type=b"image/png", size=9_000), [200]),
    "upgrade": (post("/predict", picture("red"), b"Connection: Upgrade", b"Upgrade: h2c"), [415]),
    "pipeline": (SMALL + HEALTH + SMALL, [200, 200, 200]),
    "pipeline with a large request": (HEALTH + post("/predict", noisy_png(), content_type=b"image/png"), [200, 200]),
    "truncated pipeline": (HEALTH + SMALL + SMALL[:-1], [200, 200]),
    "error": (HEALTH + b"no http\r\n\r\n", [200, 400]),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("pause_s", [0, 0.05])
def test_a_half_closed_client_gets_its_responses(server: Server, kind: str, pause_s: float) -> None:
    data, statuses = WHOLE[kind]
    with Client(server.port) as client:
        client.send(data)
        time.sleep(pause_s)
        client.socket.shutdown(socket.SHUT_WR)
        assert [client.read().status for _ in statuses] == statuses
        rest = client.read_to_end()
        assert rest[:12] in (b"", b"HTTP/1.1 400") if kind == "truncated pipeline" else rest == b""


@pytest.mark.parametrize("sent", [b"", b"G", HEALTH[:-1], SMALL[:-1], CHUNKED_HEAD + CHUNK, UPLOAD + b"x" * 300_000])
def test_a_half_close_within_a_request_closes_the_connection(server: Server, sent: bytes) -> None:
    with Client(server.port, timeout_s=5) as client:
        client.send(sent)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read_to_end()[:12] in (b"", b"HTTP/1.1 400")
        wait_until(lambda: not held_ports(server), "the connection is closed")


def test_half_closed_clients_leak_no_memory_and_no_connection(server: Server) -> None:
    before = resident_bytes(server)
    for _ in range(3):
        with ExitStack() as stack:
            clients = [stack.enter_context(Client(server.port)) for _ in range(200)]
            for client in clients:
                client.send(SMALL)
                client.socket.shutdown(socket.SHUT_WR)
            assert {PREDICT.label(client.read().body) for client in clients} == {"blue"}
            assert {client.read_to_end() for client in clients} == {b""}
    wait_until(lambda: not held_ports(server), "the connections are closed")
    assert resident_bytes(server) - before < 40 * MB

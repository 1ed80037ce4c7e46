"""Thousands of concurrent connections: new clients are served quickly, memory is bounded, shutdown is graceful."""

from __future__ import annotations

import asyncio
import resource
import statistics
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Self

import pytest

from tests.serving.conftest import Server, picture
from tests.serving.http.conftest import (
    ALIVE,
    HEALTH,
    MB,
    ROUTES,
    Client,
    count_descriptors,
    health_latency_s,
    held_ports,
    post,
    request,
    resident_bytes,
    wait_until,
)

IDLE = 5_000
ACTIVE = 8_000
FILES = 10_000
DRAIN_TIMEOUT_S = 10

PREDICT = ROUTES["predict"]
SMALL = post("/predict", picture("blue"), content_type=b"image/png")

pytestmark = [
    pytest.mark.timeout(150),
    pytest.mark.skipif(
        resource.getrlimit(resource.RLIMIT_NOFILE)[1] < FILES, reason=f"needs a hard limit of {FILES:,} open files"
    ),
]


@pytest.fixture(autouse=True)
def _many_files() -> Iterator[None]:
    """Raise the limit of this process; the server inherits it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], FILES), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    server = start("--drain-timeout-s", str(DRAIN_TIMEOUT_S))
    server.wait_for("/readyz")
    assert request(server, SMALL).status == 200
    return server


class Connection(asyncio.Protocol):
    """Counts the responses to /healthz, and how the connection ended."""

    def __init__(self) -> None:
        self.responses = 0
        self.lost = False
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        self.responses += self._received.count(ALIVE)
        self._received = self._received[self._received.rfind(b"}") + 1 :]

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.lost = True

    def send(self) -> None:
        self._transport.write(HEALTH)

    def close(self) -> None:
        self._transport.close()


class Crowd:
    """Connections in an event loop that runs in its own thread."""

    def __init__(self, port: int) -> None:
        self.connections: list[Connection] = []
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def connect(self, count: int) -> None:
        self._run(self._connect(count))

    def send(self, over_s: float, share: slice = slice(None)) -> None:
        """Send a request on each connection (or a share of them), evenly spread over `over_s`."""
        self._run(self._send(over_s, share))

    def responses(self) -> int:
        return sum(connection.responses for connection in self.connections)

    def lost(self) -> int:
        return sum(connection.lost for connection in self.connections)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=90)

    async def _connect(self, count: int) -> None:
        for _ in range(0, count, 100):
            made = await asyncio.gather(
                *(self._loop.create_connection(Connection, "127.0.0.1", self._port) for _ in range(100))
            )
            self.connections += [connection for _, connection in made]

    async def _send(self, over_s: float, share: slice) -> None:
        connections = self.connections[share]
        start_s = self._loop.time()
        for number in range(0, len(connections), 20):
            for connection in connections[number : number + 20]:
                connection.send()
            await asyncio.sleep(start_s + over_s * number / len(connections) - self._loop.time())

    async def _close(self) -> None:
        for connection in self.connections:
            connection.close()
        await asyncio.sleep(0)


def check_new_clients(server: Server, rounds: int = 20) -> None:
    """New clients get a response within 0.1 s (median); the maximum leaves room for a busy machine."""
    seconds = []
    for _ in range(rounds):
        seconds.append(health_latency_s(server))
        assert PREDICT.label(request(server, SMALL).body) == "blue"
    assert statistics.median(seconds) < 0.1, seconds
    assert max(seconds) < 1, seconds


def check_shutdown(server: Server, crowd: Crowd) -> None:
    start_s = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - start_s < DRAIN_TIMEOUT_S + 5
    wait_until(lambda: crowd.lost() == len(crowd.connections), "every connection is closed")
    assert "Traceback" not in server.log, server.log


def test_5000_idle_connections(server: Server) -> None:
    """Half of them have sent nothing, half are keep-alive connections."""
    descriptors, before = count_descriptors(server), resident_bytes(server)
    with Client(server.port) as old, Crowd(server.port) as crowd:
        old.send(HEALTH)
        assert old.read().body == ALIVE
        crowd.connect(IDLE)
        crowd.send(2, slice(0, None, 2))
        wait_until(lambda: crowd.responses() == IDLE // 2, f"{IDLE // 2} responses")
        check_new_clients(server)
        old.send(SMALL + HEALTH)
        assert PREDICT.label(old.read().body) == "blue"
        assert old.read().body == ALIVE
        assert crowd.lost() == 0
        assert count_descriptors(server) >= descriptors + IDLE
        assert resident_bytes(server) - before < 200 * MB
        check_shutdown(server, crowd)


def test_8000_active_connections(server: Server) -> None:
    """Each connection sends a request every few seconds."""
    before = resident_bytes(server)
    with Client(server.port) as old, Crowd(server.port) as crowd:
        crowd.connect(ACTIVE)
        for number in range(1, 3):
            sending = threading.Thread(target=crowd.send, args=(8,))
            sending.start()
            while sending.is_alive():
                check_new_clients(server, rounds=5)
                old.send(SMALL)
                assert PREDICT.label(old.read().body) == "blue"
                time.sleep(0.2)
            sending.join()
            wait_until(lambda number=number: crowd.responses() == number * ACTIVE, f"{number} responses for each")  # type: ignore[misc]
        assert crowd.lost() == 0
        assert resident_bytes(server) - before < 300 * MB
        check_shutdown(server, crowd)


def test_closed_connections_leak_no_descriptors_and_no_memory(server: Server) -> None:
    descriptors = count_descriptors(server)
    grown = []
    for _ in range(3):
        with Crowd(server.port) as crowd:
            crowd.connect(2_000)
            crowd.send(1)
            wait_until(lambda crowd=crowd: crowd.responses() == 2_000, "2,000 responses")  # type: ignore[misc]
        wait_until(lambda: not held_ports(server), "the connections are closed")
        wait_until(lambda: count_descriptors(server) <= descriptors, "all descriptors are closed")
        grown.append(resident_bytes(server))
    assert grown[2] - grown[0] < 20 * MB, grown
    check_new_clients(server, rounds=5)
    assert server.stop() == 0

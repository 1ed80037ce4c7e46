"""Clients that reset their connections at any time: no descriptor leaks, and other clients are not affected."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.serving.conftest import Server, picture
from tests.serving.http.conftest import (
    ALIVE,
    HEALTH,
    ROUTES,
    Client,
    count_descriptors,
    head,
    held_ports,
    limit_files,
    post,
    post_chunked,
    request,
    wait_until,
)

LIMITS = (64, 1_024)
PREDICT = ROUTES["predict"]
SMALL = post("/predict", picture("blue"), content_type=b"image/png")
LARGE = post("/v1/models/colours:predict", json.dumps({"instances": [[[[0, 0, 255]] * 32] * 32] * 40}).encode())
CHUNKED = post_chunked("/predict", picture("red"), content_type=b"image/png")
UPGRADE = post("/predict", picture("red"), b"Connection: Upgrade", b"Upgrade: h2c", content_type=b"image/png")

# Data that a client sends before it resets its connection.
MOMENTS = {
    "connected": b"",
    "first byte": b"G",
    "request line": b"POST /predict HTTP/1.1\r\n",
    "headers": HEALTH[:-3],
    "end of headers": HEALTH[:-1],
    "before the body": head("/predict", b"Content-Length: 100"),
    "expect 100-continue": head("/predict", b"Content-Length: 100", b"Expect: 100-continue"),
    "body": SMALL[:-10],
    "large body": LARGE[:-10],
    "chunk": CHUNKED[:-20],
    "trailers": CHUNKED[:-2] + b"X: y\r\n",
    "upgrade": UPGRADE[:-10],
    "small request": HEALTH,
    "request": SMALL,
    "large request": LARGE,
    "chunked request": CHUNKED,
    "upgrade request": UPGRADE,
    "pipeline": HEALTH * 5,
    "pipeline of predictions": SMALL * 20,
    "partial pipeline": SMALL + LARGE + HEALTH[:10],
    "error": b"no http\r\n\r\n",
    "too long": head("/predict", b"Content-Length: 99999999999"),
}


@pytest.fixture(scope="module")
def servers(start: Callable[..., Server]) -> Iterator[dict[int, Server]]:
    """One server per limit of open files."""
    servers = {limit: start("--access-log") for limit in LIMITS}
    for limit, server in servers.items():
        limit_files(server, limit)
    for server in servers.values():
        server.wait_for("/readyz")
    yield servers
    for server in servers.values():
        assert server.stop() == 0
        assert "Traceback" not in server.log, server.log


@pytest.fixture(params=LIMITS, ids=lambda limit: f"ulimit-{limit}")
def server(servers: dict[int, Server], request: pytest.FixtureRequest) -> Server:
    return servers[request.param]


class GoodClient:
    """Sends predictions on one keep-alive connection in a thread; `check` raises its first failure."""

    def __init__(self, server: Server) -> None:
        self.responses = 0
        self._server = server
        self._stop = threading.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with Client(self._server.port) as client:
                while not self._stop.wait(0.002):
                    client.send(SMALL)
                    assert PREDICT.label(client.read().body) == "blue"
                    self.responses += 1
        except BaseException as failure:
            self.failure = failure

    def check(self) -> None:
        self._stop.set()
        self._thread.join()
        if self.failure:
            raise self.failure
        assert self.responses > 10


@contextmanager
def no_leak(server: Server) -> Iterator[None]:
    """Check that another client is served meanwhile, and that no descriptor leaks."""
    assert request(server, SMALL).status == 200  # opens what the first request opens
    wait_until(lambda: not held_ports(server), "connections of the last test are closed")
    before = count_descriptors(server)
    good = GoodClient(server)
    wait_until(lambda: good.responses > 0 or good.failure is not None, "the good client's first response")
    try:
        yield
        # A burst can be over before the next response is due, so the client goes on until it has had its share.
        served = max(good.responses, 10)
        wait_until(lambda: good.responses > served or good.failure is not None, "the good client is still served")
    finally:
        good.check()
    assert request(server, HEALTH).body == ALIVE
    wait_until(lambda: count_descriptors(server) <= before, f"{before} descriptors again", within_s=20)


def test_a_burst_of_connections_that_are_reset_immediately(server: Server) -> None:
    with no_leak(server):
        for _ in range(1_500):
            Client(server.port).reset()


def test_concurrent_bursts_of_resets(server: Server) -> None:
    def burst() -> None:
        for _ in range(300):
            client = Client(server.port)
            client.socket.sendall(HEALTH)
            client.reset()

    with no_leak(server):
        threads = [threading.Thread(target=burst) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("sent", MOMENTS.values(), ids=MOMENTS)
def test_resets_at_any_moment(server: Server, sent: bytes) -> None:
    with no_leak(server):
        for number in range(30):
            client = Client(server.port)
            client.send(sent)
            if number % 3 == 0:  # sometimes the server has time to read it
                time.sleep(0.01)
            client.reset()


def test_connections_that_are_reset_together(server: Server) -> None:
    """The server has accepted all of them before they are reset."""
    with no_leak(server):
        for _ in range(10):
            clients = [Client(server.port) for _ in range(15)]
            for client, sent in zip(clients, MOMENTS.values(), strict=False):
                client.send(sent)
            time.sleep(0.02)
            for client in clients:
                client.reset()


def test_resets_while_a_response_is_read(server: Server) -> None:
    with no_leak(server):
        for _ in range(50):
            client = Client(server.port, receive_buffer=2_048)
            client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
            assert client.socket.recv(100).startswith(b"HTTP/1.1 200")
            client.reset()


def test_resets_on_keep_alive_connections(server: Server) -> None:
    with no_leak(server):
        for number in range(100):
            client = Client(server.port)
            client.send(HEALTH)
            assert client.read().body == ALIVE
            client.send(SMALL[: number * 3])
            client.reset()


def test_clients_that_close_without_a_reset(server: Server) -> None:
    with no_leak(server):
        for sent in MOMENTS.values():
            for _ in range(5):
                with Client(server.port) as client:
                    client.send(sent)


def test_idle_connections_do_not_exhaust_the_descriptors(server: Server) -> None:
    """With more idle connections than descriptors, a new client is served."""
    with no_leak(server):
        silent = [Client(server.port) for _ in range(200)]
        try:
            with Client(server.port, timeout_s=20) as client:
                client.send(HEALTH)
                assert client.read().body == ALIVE
        finally:
            for client in silent:
                client.socket.close()

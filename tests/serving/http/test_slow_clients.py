"""Clients that are slow, idle, or do not read: the server disconnects them, and they delay no other clients."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest

from tests.serving.conftest import Server, picture
from tests.serving.http.conftest import (
    ALIVE,
    HEALTH,
    MB,
    ROUTES,
    Client,
    head,
    health_latency_s,
    held_ports,
    noisy_png,
    post,
    request,
    resident_bytes,
    send_queues,
    wait_until,
)
from tests.serving.speed import measure_slowdown

PREDICT = ROUTES["predict"]
SMALL = post("/predict", picture("blue"), content_type=b"image/png")
CHUNKED_HEAD = head("/predict", b"Transfer-Encoding: chunked", content_type=b"image/png")
CHUNK = b"1\r\na\r\n"
PAGES = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3_388

HEADER_S = 10  # for all headers of a request, from its first byte
SILENT_S = 30  # for the first byte on a new connection
UNREAD_S = 30  # for a response that is not read
UPLOAD_S = 10  # for a body slower than 1 KB per second
LATE_S = 8  # tolerance for closing the connection


UPLOAD = head("/predict", b"Content-Length: 50000000", content_type=b"image/png")

# Each kind of client: the data sent first, the data sent every half second, and its time limit.
SLOW: dict[str, tuple[bytes, Iterator[bytes], int]] = {
    "headers byte by byte": (b"G", itertools.chain(b"%c" % byte for byte in HEALTH[1:]), HEADER_S),
    "header after header": (HEALTH[:-2], itertools.cycle([b"X-A: b\r\n"]), HEADER_S),
    "endless request line": (b"GET /", itertools.cycle([b"a"]), HEADER_S),
    "headers that stop": (HEALTH[:-2], itertools.repeat(b""), HEADER_S),
    "second request's headers": (HEALTH + b"GET /", itertools.cycle([b"a"]), HEADER_S),
    "upgrade's headers": (b"GET / HTTP/1.1\r\nUpgrade: h2c\r\n", itertools.cycle([b"X-A: b\r\n"]), HEADER_S),
    "nothing": (b"", itertools.repeat(b""), SILENT_S),
    "empty lines": (b"\r\n", itertools.cycle([b"\r\n"]), SILENT_S),
    "small body byte by byte": (SMALL[:-80], itertools.chain(b"%c" % byte for byte in SMALL[-80:]), UPLOAD_S),
    "body that stops": (SMALL[:-10], itertools.repeat(b""), UPLOAD_S),
    "body that does not begin": (UPLOAD, itertools.repeat(b""), UPLOAD_S),
    "chunks byte by byte": (CHUNKED_HEAD, itertools.cycle([b"1", b"\r", b"\n", b"a", b"\r", b"\n"]), UPLOAD_S),
    "chunk extension byte by byte": (CHUNKED_HEAD + b"1;", itertools.cycle([b"a"]), UPLOAD_S),
    "trailers byte by byte": (CHUNKED_HEAD + CHUNK + b"0\r\n", itertools.cycle([b"a", b":", b"b\r\n"]), UPLOAD_S),
    "upgrade's body": (
        post("/predict", picture("red"), b"Connection: Upgrade", b"Upgrade: h2c", content_type=b"image/png")[:-60],
        itertools.cycle([b"y"]),
        UPLOAD_S,
    ),
}
STALLED_UPLOADS = 16
UNREADING = 50


class SlowClient:
    """A slow client; `closed_after_s` is set once the server has closed its connection."""

    def __init__(self, server: Server, kind: str, now: bytes, drip: Iterator[bytes], limit_s: float) -> None:
        self.kind, self.limit_s = kind, limit_s
        self.closed_after_s: float | None = None
        self.client = Client(server.port)
        self.port = self.client.socket.getsockname()[1]
        self._drip = drip
        self.client.send(now)
        self.started_s = time.monotonic()

    def drip(self) -> None:
        with suppress(ConnectionError):  # detected by its port
            self.client.socket.send(next(self._drip, b""))

    def status(self) -> bytes:
        """The last status received, or nothing."""
        responses = self.client.read_to_end().split(b"HTTP/1.1 ")
        return responses[-1][:3] if len(responses) > 1 else b""


def use_a_bad_connection(server: Server) -> None:
    """A slow client that makes progress: it sends and reads a few KB per second."""
    data = post("/predict", noisy_png()[:40_000], content_type=b"image/png")
    with Client(server.port, receive_buffer=2_048) as client:
        for start, end in ((0, 20), (20, 100), *((at, at + 2_500) for at in range(100, len(data), 2_500))):
            client.send(data[start:end])
            time.sleep(0.8)
        assert client.read().status == 400  # a truncated image
        client.send(HEALTH + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
        assert client.read().body == ALIVE
        for _ in range(10):
            time.sleep(0.1)
            assert client.read().status == 200


def start_slow_clients(server: Server) -> list[SlowClient]:
    kinds = [(kind, *rest) for kind, rest in SLOW.items()]
    for number in range(STALLED_UPLOADS):
        drip = itertools.cycle([b"y"]) if number % 2 else itertools.repeat(b"")
        kinds.append((f"upload {number}", UPLOAD + b"x" * 300_000, drip, 2 * UPLOAD_S))  # fast for the first period
    return [SlowClient(server, *kind) for kind in kinds]


def start_unreading_clients(server: Server, stack: ExitStack) -> list[Client]:
    """Clients that request many pages with small receive buffers, and read none of them."""
    clients = []
    for _ in range(UNREADING):
        client = stack.enter_context(Client(server.port, receive_buffer=4_096))
        client.socket.setblocking(False)
        clients.append(client)
        rest = memoryview(PAGES)
        try:
            while rest:
                rest = rest[client.socket.send(rest) :]
        except BlockingIOError:
            pass  # backpressure: the server has stopped reading
    return clients


@pytest.mark.timeout(150)
def test_slow_clients_are_disconnected_and_delay_no_others(server: Server) -> None:
    large = post("/predict", noisy_png(), content_type=b"image/png")
    assert len(large) > 1_000_000
    for _ in range(3):
        assert request(server, large).status == 200  # allocates the memory of a large request before the comparison
    with ExitStack() as stack:
        keep_alive = stack.enter_context(Client(server.port))
        keep_alive.send(HEALTH)
        assert keep_alive.read().body == ALIVE
        before = resident_bytes(server)
        bad_connection = stack.enter_context(ThreadPoolExecutor(1)).submit(use_a_bad_connection, server)
        slow = start_slow_clients(server)
        unreading = start_unreading_clients(server, stack)
        unread_s, most_unread = time.monotonic(), 0  # when the server last added to the responses that are not read
        unreading_ports = {client.socket.getsockname()[1] for client in unreading}

        seconds, largest = [], 0
        silent_s = time.monotonic()
        while time.monotonic() < max(silent_s + SILENT_S, unread_s + UNREAD_S) + LATE_S:
            for client in slow:
                client.drip()
            start_s = time.monotonic()
            seconds.append(health_latency_s(server))
            assert request(server, large).status == 200
            assert PREDICT.label(request(server, SMALL).body) == "blue"
            took_s = time.monotonic() - start_s
            assert took_s < 5, f"others waited {took_s:.1f} s"
            largest = max(largest, resident_bytes(server) - before)
            held = send_queues(server)
            for client in slow:
                if client.closed_after_s is None and client.port not in held:
                    client.closed_after_s = time.monotonic() - client.started_s
            if (unread := sum(held.get(port, 0) for port in unreading_ports)) > most_unread:
                unread_s, most_unread = time.monotonic(), unread
            if unreading_ports.isdisjoint(held) and all(client.closed_after_s is not None for client in slow):
                break
            time.sleep(0.5)
        print(
            *(f"{client.kind}: {client.closed_after_s}" for client in slow), f"memory: {largest / MB:.0f} MB", sep="\n"
        )

        late = {c.kind for c in slow if c.closed_after_s is None or c.closed_after_s > c.limit_s + LATE_S}
        assert not late, "not closed in time"
        hasty = {c.kind for c in slow if c.closed_after_s is not None and c.closed_after_s < c.limit_s / 3}
        assert not hasty, "closed too early for a client with a bad connection"
        statuses = {client.kind: client.status() for client in slow}
        refused = {kind for kind in statuses if kind.startswith(("upload", "body", "small body", "chunks byte"))}
        assert {kind: statuses[kind] for kind in refused} == dict.fromkeys(refused, b"408")
        assert {statuses[kind] for kind in SLOW} <= {b"", b"408", b"200", b"400"}

        assert not unreading_ports & held_ports(server), f"not aborted {time.monotonic() - unread_s:.0f} s later"
        assert largest < 150 * MB, f"{largest / MB:.0f} MB for unread responses and stalled uploads"
        slowdown = measure_slowdown()
        assert statistics.median(seconds) < 0.1 * slowdown
        assert max(seconds) < 2 * slowdown

        bad_connection.result(timeout=30)
        keep_alive.send(HEALTH)  # within its idle timeout
        assert keep_alive.read().body == ALIVE


@pytest.mark.timeout(60)
def test_stalled_uploads_are_closed_after_the_drain_timeout(start: Callable[..., Server]) -> None:
    server = start("--drain-timeout-s", "2")
    server.wait_for("/readyz")
    with ExitStack() as stack:
        for _ in range(STALLED_UPLOADS):
            stack.enter_context(Client(server.port)).send(UPLOAD + b"x" * 300_000)
        start_unreading_clients(server, stack)
        start_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start_s < 2 + 4


@pytest.mark.timeout(60)
def test_with_all_connections_taken_by_idle_clients_a_new_one_is_served(start: Callable[..., Server]) -> None:
    """Those that have waited longest are closed for it, and the kernel holds the others until then."""
    most = 20
    server = start("--max-connections", str(most))
    server.wait_for("/readyz")
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(Client(server.port))
        wait_until(lambda: len(held_ports(server)) == most, f"{most} connections")
        new = stack.enter_context(Client(server.port, timeout_s=40))
        new.send(post("/predict", picture("red"), content_type=b"image/png"))
        assert PREDICT.label(new.read().body) == "red"
        assert len(held_ports(server)) <= most
    assert server.stop() == 0
    assert "Traceback" not in server.log

"""Clients that are slow, silent, half-closed or endless: they are cut off in time, and nobody else waits for them."""

from __future__ import annotations

import itertools
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from PIL import Image

from tests.serving.conftest import Server, encode, picture
from tests.serving.http.conftest import (
    ALIVE,
    HEALTH,
    ROUTES,
    Client,
    answered_in,
    chunked,
    head,
    held_ports,
    post,
    post_chunked,
    request,
    resident_bytes,
    wait_until,
)

MB = 1024 * 1024
PREDICT = ROUTES["predict"]
SMALL = post("/predict", picture("blue"), content_type=b"image/png")
CHUNKED_HEAD = head("/predict", b"Transfer-Encoding: chunked", content_type=b"image/png")
CHUNK = b"1\r\na\r\n"
PAGES = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3_388

HEADER_S = 10  # for the whole header of a request, from its first byte
SILENT_S = 30  # for the first byte on a new connection
UNREAD_S = 30  # without a byte of a response read
UPLOAD_S = 10  # without 1 KB a second of a body
LATE_S = 6  # how late each may be noticed


def noisy_png() -> bytes:
    """A picture of more than 300 KB, which is a large upload."""
    noise = np.random.default_rng(0).integers(0, 256, (340, 340, 3), np.uint8)
    return encode(Image.fromarray(noise))


UPLOAD = head("/predict", b"Content-Length: 50000000", content_type=b"image/png")

# Each kind of client: what it sends at once, what it sends every half second, and after how long it has to be gone.
SLOW: dict[str, tuple[bytes, Iterator[bytes], int]] = {
    "headers byte by byte": (b"G", itertools.chain(b"%c" % byte for byte in HEALTH[1:]), HEADER_S),
    "header after header": (HEALTH[:-2], itertools.cycle([b"X-A: b\r\n"]), HEADER_S),
    "endless request line": (b"GET /", itertools.cycle([b"a"]), HEADER_S),
    "headers that stop": (HEALTH[:-2], itertools.repeat(b""), HEADER_S),
    "second request's headers": (HEALTH + b"GE", itertools.cycle([b"T"]), HEADER_S),
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
    """A client of one kind; `gone_after_s` is set once the server has closed its connection."""

    def __init__(self, server: Server, kind: str, now: bytes, drip: Iterator[bytes], limit_s: float) -> None:
        self.kind, self.limit_s = kind, limit_s
        self.gone_after_s: float | None = None
        self.client = Client(server.port)
        self.port = self.client.socket.getsockname()[1]
        self._drip = drip
        self.client.send(now)
        self.started_s = time.monotonic()

    def drip(self) -> None:
        try:
            self.client.socket.send(next(self._drip, b""))
        except ConnectionError:
            pass  # noticed by its port

    def status(self) -> bytes:
        """The last status that it was sent, or nothing."""
        responses = self.client.read_to_end().split(b"HTTP/1.1 ")
        return responses[-1][:3] if len(responses) > 1 else b""


def start_slow_clients(server: Server) -> list[SlowClient]:
    kinds = [(kind, *rest) for kind, rest in SLOW.items()]
    for number in range(STALLED_UPLOADS):
        drip = itertools.cycle([b"y"]) if number % 2 else itertools.repeat(b"")
        kinds.append((f"upload {number}", UPLOAD + b"x" * 300_000, drip, UPLOAD_S))
    return [SlowClient(server, *kind) for kind in kinds]


def start_unreading_clients(server: Server, stack: ExitStack) -> list[Client]:
    """Clients that ask for many pages in small receive buffers, and read none of them."""
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
            pass  # the server reads no more, as it should
    return clients


@pytest.mark.timeout(150)
def test_slow_clients_are_cut_off_in_time_and_nobody_waits_for_them(server: Server) -> None:
    large = post("/predict", noisy_png(), content_type=b"image/png")
    assert len(large) > 300_000
    for _ in range(3):
        assert request(server, large).status == 200  # the memory of a large request is no part of the comparison
    with ExitStack() as stack:
        keep_alive = stack.enter_context(Client(server.port))
        keep_alive.send(HEALTH)
        assert keep_alive.read().body == ALIVE
        before = resident_bytes(server)
        slow = start_slow_clients(server)
        unreading = start_unreading_clients(server, stack)
        unreading_s = time.monotonic()
        unreading_ports = {client.socket.getsockname()[1] for client in unreading}

        seconds, largest = [], 0
        end_s = time.monotonic() + max(SILENT_S, UNREAD_S) + LATE_S
        while time.monotonic() < end_s:
            for client in slow:
                client.drip()
            start_s = time.monotonic()
            seconds.append(answered_in(server))
            assert request(server, large).status == 200
            assert PREDICT.label(request(server, SMALL).body) == "blue"
            took_s = time.monotonic() - start_s
            assert took_s < 5, f"others waited {took_s:.1f} s"
            largest = max(largest, resident_bytes(server) - before)
            held = held_ports(server)
            for client in slow:
                if client.gone_after_s is None and client.port not in held:
                    client.gone_after_s = time.monotonic() - client.started_s
            if unreading_ports.isdisjoint(held) and all(client.gone_after_s is not None for client in slow):
                break
            time.sleep(0.5)
        print(*(f"{client.kind}: {client.gone_after_s}" for client in slow), f"memory: {largest / MB:.0f} MB", sep="\n")

        late = {c.kind for c in slow if c.gone_after_s is None or c.gone_after_s > c.limit_s + LATE_S}
        assert not late, "not closed in time"
        hasty = {c.kind for c in slow if c.gone_after_s is not None and c.gone_after_s < c.limit_s / 3}
        assert not hasty, "closed before a client with a bad connection could go on"
        statuses = {client.kind: client.status() for client in slow}
        refused = {kind for kind in statuses if kind.startswith(("upload", "body", "small body", "chunks byte"))}
        assert {kind: statuses[kind] for kind in refused} == dict.fromkeys(refused, b"408")
        assert {statuses[kind] for kind in SLOW} <= {b"", b"408", b"200"}

        assert not unreading_ports & held_ports(server), f"not aborted {time.monotonic() - unreading_s:.0f} s later"
        assert largest < 150 * MB, f"{largest / MB:.0f} MB for responses that nobody reads and uploads that stall"
        assert statistics.median(seconds) < 0.1
        assert max(seconds) < 2

        keep_alive.send(HEALTH)  # one that idles is welcome all the while
        assert keep_alive.read().body == ALIVE


@pytest.mark.timeout(60)
def test_a_slow_client_that_makes_progress_is_served(server: Server) -> None:
    """A bad connection: headers in a few pieces, the body at some KB a second, and the response read slowly."""
    data = post("/predict", noisy_png()[:40_000] + picture("blue"), content_type=b"image/png")
    with Client(server.port, receive_buffer=2_048) as client, Client(server.port) as other:
        client.send(data[:20])
        time.sleep(1)
        client.send(data[20:100])
        time.sleep(1)
        for start in range(100, len(data), 2_500):
            client.send(data[start : start + 2_500])
            time.sleep(0.9)
        assert client.read().status == 400  # half a picture
        client.send(HEALTH + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
        assert client.read().body == ALIVE
        for _ in range(10):
            time.sleep(0.1)
            assert client.read().status == 200
        other.send(HEALTH)
        assert other.read().body == ALIVE


# Endless messages

LINE = b"X-A: b\r\n"
ENDLESS = {
    "trailers": (CHUNKED_HEAD + CHUNK + b"0\r\n", LINE * 10_000),
    "one trailer": (CHUNKED_HEAD + CHUNK + b"0\r\nX-A: ", b"x" * 80_000),
    "trailer's name": (CHUNKED_HEAD + CHUNK + b"0\r\n", b"x" * 80_000),
    "chunk extension": (CHUNKED_HEAD + b"1;", b"x" * 80_000),
    "chunk extension's value": (CHUNKED_HEAD + b"1;a=", b"x" * 80_000),
    "quoted chunk extension": (CHUNKED_HEAD + b'1;a="', b"x" * 80_000),
    "chunk extensions": (CHUNKED_HEAD, (b"1;" + b"x" * 10_000 + b"\r\na\r\n") * 8),
    "zeros before a chunk size": (CHUNKED_HEAD, b"0" * 80_000),
    "headers": (HEALTH[:-2], LINE * 10_000),
    "headers without values": (HEALTH[:-2], b"a:\r\n" * 20_000),
    "one header": (HEALTH[:-2] + b"X-A: ", b"x" * 80_000),
    "header's name": (HEALTH[:-2], b"x" * 80_000),
    "spaces before a value": (HEALTH[:-2] + b"X-A:", b" " * 80_000),
    "headers after a request": (HEALTH * 3 + HEALTH[:-2], LINE * 10_000),
    "headers after a large request": (post("/predict", b"x" * 70_000) + HEALTH[:-2], LINE * 10_000),
    "headers of an upgrade": (HEALTH[:-2] + b"Connection: Upgrade\r\nUpgrade: h2c\r\n", LINE * 10_000),
    "target": (b"GET /", b"x" * 80_000),
    "query": (b"GET /?", b"x=y&" * 20_000),
    "method": (b"", b"X" * 80_000),
    "empty lines": (b"", b"\r\n" * 40_000),
    "empty lines between requests": (HEALTH, b"\r\n" * 40_000),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_has_no_end_is_cut_off_with_bounded_memory(server: Server, kind: str) -> None:
    start, more = ENDLESS[kind]
    before = resident_bytes(server)
    sent, largest = 0, 0
    with Client(server.port, timeout_s=20) as client:
        client.send(start)
        try:
            while sent < 60_000_000:
                client.send(more)
                sent += len(more)
                largest = max(largest, resident_bytes(server) - before)
        except ConnectionError:
            pass
        assert largest < 40 * MB, f"{largest / MB:.0f} MB of memory"
        assert sent < 60_000_000, "never cut off"
        responses = client.read_to_end().split(b"HTTP/1.1 ")[1:]
    assert responses[-1:] in ([], *([response] for response in responses if response[:3] in REFUSALS)), responses
    assert request(server, HEALTH).body == ALIVE


REFUSALS = (b"400", b"408", b"413", b"414", b"431", b"501")


@pytest.mark.parametrize("size", [10_000, 40_000, 60_000])
def test_a_long_header_is_read(server: Server, size: int) -> None:
    assert request(server, HEALTH[:-2] + b"X-A: " + b"x" * size + b"\r\n\r\n").body == ALIVE
    many = LINE * (size // len(LINE))
    assert request(server, HEALTH[:-2] + many + b"\r\n").body == ALIVE
    assert request(server, b"GET /healthz?" + b"x" * size + b" HTTP/1.1\r\nHost: x\r\n\r\n").body == ALIVE


@pytest.mark.parametrize("split", [70_000, 65_536, 1_000], ids=["at once", "64 KiB", "in pieces"])
@pytest.mark.parametrize("before", [b"", HEALTH, SMALL], ids=["first", "second", "behind a body"])
def test_a_header_of_more_than_64_kib_gets_a_431(server: Server, before: bytes, split: int) -> None:
    """Whatever segments it comes in, and whatever the segments carry besides."""
    data = before + HEALTH[:-2] + b"X-A: " + b"x" * 66_000 + b"\r\n\r\n"
    with Client(server.port) as client:
        try:
            client.send(*(data[start : start + split] for start in range(0, len(data), split)), pause_s=0.0005)
        except ConnectionError:
            pytest.skip("closed before all was sent, and the response lost with it")
        if before:
            assert client.read().status == 200
        response = client.read()
        assert (response.status, response.closes) == (431, True)
        assert client.read_to_end() == b""


def test_small_trailers_are_read(server: Server) -> None:
    data = post_chunked("/predict", picture("red"), content_type=b"image/png")
    with Client(server.port) as client:
        for count in (0, 1, 100, 1_000):
            client.send(data[:-2] + LINE * count + b"\r\n")
            assert PREDICT.label(client.read().body) == "red"


def test_a_body_in_many_small_chunks_is_read(server: Server) -> None:
    body = ROUTES["v1"].body("green") + b" " * 20_000
    data = head("/v1/models/colours:predict", b"Transfer-Encoding: chunked") + chunked(body, 1) + b"0\r\n\r\n"
    with Client(server.port) as client:
        client.send(data + HEALTH)
        assert ROUTES["v1"].label(client.read().body) == "green"
        assert client.read().body == ALIVE


# Half-closed connections

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
    "pipeline with a large one": (HEALTH + post("/predict", noisy_png(), content_type=b"image/png"), [200, 200]),
    "pipeline that is cut": (HEALTH + SMALL + SMALL[:-1], [200, 200]),
    "error": (HEALTH + b"no http\r\n\r\n", [200, 400]),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("pause_s", [0, 0.05])
def test_a_client_that_half_closes_gets_its_responses(server: Server, kind: str, pause_s: float) -> None:
    data, statuses = WHOLE[kind]
    with Client(server.port) as client:
        client.send(data)
        time.sleep(pause_s)
        client.socket.shutdown(socket.SHUT_WR)
        assert [client.read().status for _ in statuses] == statuses
        rest = client.read_to_end()
        assert rest[:12] in (b"", b"HTTP/1.1 400") if kind == "pipeline that is cut" else rest == b""


@pytest.mark.parametrize("sent", [b"", b"G", HEALTH[:-1], SMALL[:-1], CHUNKED_HEAD + CHUNK, UPLOAD + b"x" * 300_000])
def test_a_client_that_half_closes_within_a_request_is_closed(server: Server, sent: bytes) -> None:
    with Client(server.port, timeout_s=5) as client:
        client.send(sent)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read_to_end()[:12] in (b"", b"HTTP/1.1 400")
        wait_until(lambda: client.socket.fileno() < 0 or not held_ports(server), "the connection is closed")


def test_half_closed_clients_keep_no_memory_and_no_connection(server: Server) -> None:
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


@pytest.mark.timeout(60)
def test_stalled_uploads_end_with_the_drain_timeout(start: Callable[..., Server]) -> None:
    server = start("--drain-timeout-s", "2")
    server.wait_for("/readyz")
    with ExitStack() as stack:
        for _ in range(STALLED_UPLOADS):
            stack.enter_context(Client(server.port)).send(UPLOAD + b"x" * 300_000)
        start_unreading_clients(server, stack)
        start_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start_s < 2 + 4

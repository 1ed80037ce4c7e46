"""Endless messages are cut off with bounded memory; long messages within the limits are accepted."""

from __future__ import annotations

from contextlib import suppress

import pytest

from tests.serving.conftest import Server, picture
from tests.serving.http.conftest import (
    ALIVE,
    HEALTH,
    MB,
    ROUTES,
    Client,
    chunked,
    head,
    post,
    post_chunked,
    request,
    resident_bytes,
)

PREDICT = ROUTES["predict"]
SMALL = post("/predict", picture("blue"), content_type=b"image/png")
CHUNKED_HEAD = head("/predict", b"Transfer-Encoding: chunked", content_type=b"image/png")
CHUNK = b"1\r\na\r\n"

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
def test_an_endless_message_is_cut_off_with_bounded_memory(server: Server, kind: str) -> None:
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
def test_a_long_header_within_the_limit_is_accepted(server: Server, size: int) -> None:
    assert request(server, HEALTH[:-2] + b"X-A: " + b"x" * size + b"\r\n\r\n").body == ALIVE
    many = LINE * (size // len(LINE))
    assert request(server, HEALTH[:-2] + many + b"\r\n").body == ALIVE
    assert request(server, b"GET /healthz?" + b"x" * size + b" HTTP/1.1\r\nHost: x\r\n\r\n").body == ALIVE


@pytest.mark.parametrize("split", [70_000, 65_536, 1_000], ids=["at once", "64 KiB", "in pieces"])
@pytest.mark.parametrize("before", [b"", HEALTH, SMALL], ids=["first", "second", "behind a body"])
def test_headers_over_64_kib_return_431(server: Server, before: bytes, split: int) -> None:
    data = before + HEALTH[:-2] + b"X-A: " + b"x" * 66_000 + b"\r\n\r\n"
    with Client(server.port) as client:
        with suppress(ConnectionError):  # the server closes the connection after its response
            client.send(*(data[start : start + split] for start in range(0, len(data), split)), pause_s=0.0005)
        if before:
            assert client.read().status == 200
        response = client.read()
        assert (response.status, response.closes) == (431, True)
        assert client.read_to_end() == b""


def test_small_trailers_are_accepted(server: Server) -> None:
    data = post_chunked("/predict", picture("red"), content_type=b"image/png")
    with Client(server.port) as client:
        for count in (0, 1, 100, 1_000):
            client.send(data[:-2] + LINE * count + b"\r\n")
            assert PREDICT.label(client.read().body) == "red"


def test_a_body_in_many_small_chunks_is_accepted(server: Server) -> None:
    body = ROUTES["v1"].body("green") + b" " * 20_000
    data = head("/v1/models/colours:predict", b"Transfer-Encoding: chunked") + chunked(body, 1) + b"0\r\n\r\n"
    with Client(server.port) as client:
        client.send(data + HEALTH)
        assert ROUTES["v1"].label(client.read().body) == "green"
        assert client.read().body == ALIVE

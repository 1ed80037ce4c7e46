"""Request smuggling: requests with ambiguous framing are refused, and no hidden request gets a response."""

from __future__ import annotations

import pytest

from tests.serving.conftest import Server
from tests.serving.http.conftest import ALIVE, HEALTH, Client, head, request

HIDDEN = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
SIZED = b"Content-Length: %d" % len(HIDDEN)
CHUNKED = b"Transfer-Encoding: chunked"

# Each is followed by the hidden request.
AMBIGUOUS = {
    "length and chunked": [SIZED, CHUNKED],
    "chunked and length": [CHUNKED, SIZED],
    "length 0 and chunked": [b"Content-Length: 0", CHUNKED],
    "two lengths": [b"Content-Length: 0", SIZED],
    "list of lengths": [b"Content-Length: 0, %d" % len(HIDDEN)],
    "negative": [b"Content-Length: -1"],
    "negative zero": [b"Content-Length: -0"],
    "plus": [b"Content-Length: +%d" % len(HIDDEN)],
    "hexadecimal": [b"Content-Length: 0x%x" % len(HIDDEN)],
    "underscore": [b"Content-Length: 1_0"],
    "exponent": [b"Content-Length: 1e1"],
    "fraction": [b"Content-Length: 1.0"],
    "two numbers": [b"Content-Length: 1 0"],
    "length is empty": [b"Content-Length:"],
    "length overflows": [b"Content-Length: 18446744073709551617"],
    "other digits": ["Content-Length: \u0661\u0662".encode()],
    "xchunked": [b"Transfer-Encoding: xchunked"],
    "chunked, identity": [b"Transfer-Encoding: chunked, identity"],
    "identity": [b"Transfer-Encoding: identity", SIZED],
    "gzip": [b"Transfer-Encoding: gzip"],
    "chunked twice": [b"Transfer-Encoding: chunked, chunked"],
    "chunked in two lines": [CHUNKED, b"Transfer-Encoding: identity"],
    "quoted": [b'Transfer-Encoding: "chunked"'],
    "vertical tab": [b"Transfer-Encoding: \x0bchunked"],
    "colon after space": [b"Transfer-Encoding : chunked"],
    "colon after tab": [b"Content-Length\t: %d" % len(HIDDEN)],
    "folded": [b"Transfer-Encoding:\r\n chunked"],
    "folded other": [b"X-Long: a\r\n b"],
    "folded first": [b" Content-Length: 5"],
    "zero in value": [b"X-Zero: a\0b"],
    "zero in name": [b"X-Ze\0ro: a"],
    "CR in value": [b"X-Return: a\rContent-Length: 5"],
    "CR in name": [b"X-Ret\rurn: a"],
    "no name": [b": x"],
    "space in name": [b"X Y: z"],
    "brackets in name": [b"X(Y): z"],
    "umlaut in name": [b"X-\xfc: z"],
}


def split_responses(data: bytes) -> list[bytes]:
    """Split into responses, each from its status line."""
    return [b"HTTP/1." + part for part in data.split(b"HTTP/1.")[1:]]


def exchange(server: Server, data: bytes) -> bytes:
    with Client(server.port) as client:
        client.send(data)
        return client.read_to_end()


@pytest.mark.parametrize("headers", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_an_ambiguous_length_is_refused_and_closes(server: Server, headers: list[bytes]) -> None:
    responses = split_responses(exchange(server, head("/predict", *headers) + HIDDEN + HEALTH))
    assert len(responses) == 1, responses
    assert responses[0][9:12] in (b"400", b"501", b"413"), responses
    assert b"\r\nconnection: close\r\n" in responses[0].lower(), responses


def chunks(data: bytes) -> bytes:
    return head("/v1/models/colours:predict", CHUNKED) + data


BAD_CHUNKS = {
    "size overflows": b"10000000000000002\r\nab\r\n0\r\n\r\n",
    "size overflows to nothing": b"10000000000000000\r\n\r\n",
    "negative": b"-2\r\nab\r\n0\r\n\r\n",
    "plus": b"+2\r\nab\r\n0\r\n\r\n",
    "0x": b"0x2\r\nab\r\n0\r\n\r\n",
    "leading space": b" 2\r\nab\r\n0\r\n\r\n",
    "no size": b"\r\nab\r\n0\r\n\r\n",
    "extension without size": b";x\r\nab\r\n0\r\n\r\n",
    "too long data": b"2\r\nabc\r\n0\r\n\r\n",
    "data ends with LF": b"2\r\nabX\n0\r\n\r\n",
    "CR in extension": b"2;a\rb\r\nab\r\n0\r\n\r\n",
    "LF in extension": b"2;a\nab\r\n0\r\n\r\n",
    "zero in extension": b"2;a\0b\r\nab\r\n0\r\n\r\n",
    "bad trailer": b"2\r\nab\r\n0\r\nBad Trailer\r\n\r\n",
    "length in trailer": b"2\r\nab\r\n0\r\nContent-Length: 9\r\n\r\n",
    "trailer with space": b"2\r\nab\r\n0\r\nX : y\r\n\r\n",
}


@pytest.mark.parametrize("data", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_an_invalid_chunk_is_refused_and_closes(server: Server, data: bytes) -> None:
    responses = split_responses(exchange(server, chunks(data) + HIDDEN + HEALTH))
    assert len(responses) == 1, responses
    assert responses[0][9:12] == b"400", responses


GOOD_CHUNKS = {
    "extension": b'2;name="value"\r\n[]\r\n0\r\n\r\n',
    "zeros before the size": b"0000002\r\n[]\r\n000\r\n\r\n",
    "trailers": b"2\r\n[]\r\n0\r\nX-Checksum: 1\r\nHost: y\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
    "upper case": b"A\r\n[         \r\n1\r\n]\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("data", GOOD_CHUNKS.values(), ids=GOOD_CHUNKS)
def test_unusual_chunks_leave_the_connection_in_sync(server: Server, data: bytes) -> None:
    with Client(server.port) as client:
        for _ in range(2):
            client.send(chunks(data) + HEALTH)
            assert client.read().status == 400  # a JSON list is not a valid request
            assert client.read().body == ALIVE


REQUEST_LINES = [
    b"GET /healthz",
    b"GET /healthz HTTP/1.1 x",
    b"GET /health\0z HTTP/1.1",
    b"GET /health\tz HTTP/1.1",
    b"GET /healthz HTTP/1.2.3",
    b"GET /healthz http/1.1",
    b"GET /healthz HTTP/2.0",
    b"GET HTTP/1.1",
    b"G\0T /healthz HTTP/1.1",
    b"GET healthz HTTP/1.1",
    b" GET /healthz HTTP/1.1",
]


@pytest.mark.parametrize("line", REQUEST_LINES)
def test_an_invalid_request_line_is_refused(server: Server, line: bytes) -> None:
    responses = split_responses(exchange(server, line + b"\r\nHost: x\r\n\r\n" + HEALTH))
    assert len(responses) == 1, responses
    assert responses[0][9:12] in (b"400", b"404", b"501", b"505"), responses


@pytest.mark.parametrize("ending", [b"\n", b"\r"])
def test_bare_lf_and_cr_hide_no_request(server: Server, ending: bytes) -> None:
    """A bare LF may end a line or be refused; a bare CR never ends a line."""
    data = ending.join([b"GET /healthz HTTP/1.1", b"Host: x", b"Connection: close", b"", b""])
    with Client(server.port) as client:
        client.send(data)
        if ending == b"\r":
            client.send(b"\n\r\n\r\n")
        statuses = [part[9:12] for part in split_responses(client.read_to_end())]
    assert statuses in ([b"400"], [b"200"] if ending == b"\n" else [b"400"])


@pytest.mark.parametrize("name", [b"Content_Length", b"Transfer_Encoding", b"content.length"])
def test_a_header_that_resembles_another_is_ignored(server: Server, name: bytes) -> None:
    with Client(server.port) as client:
        client.send(head("/v1/models/colours:predict", name + b": 3", b"Content-Length: 2") + b"[]" + HEALTH)
        assert client.read().status == 400
        assert client.read().body == ALIVE


def test_the_server_still_serves(server: Server) -> None:
    assert request(server, HEALTH).body == ALIVE

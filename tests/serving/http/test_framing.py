"""Message framing: order of responses, parse errors, pipelining and body limits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from tests.serving.conftest import Server, picture
from tests.serving.http.conftest import (
    ALIVE,
    HEALTH,
    JSON,
    ROUTES,
    Client,
    Response,
    chunked,
    error_of,
    head,
    post,
    post_chunked,
    request,
)

MAX_BYTES = 2_000_000
PREDICT = ROUTES["predict"]
BLUE = post("/predict", picture("blue"), content_type=b"image/png")


@pytest.fixture(scope="module")
def server(start: Callable[..., Server]) -> Iterator[Server]:
    server = start("--max-request-bytes", str(MAX_BYTES))
    server.wait_for("/readyz")
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.log, server.log


# Parse errors after complete requests

ERRORS = {
    "header without colon": b"GET / HTTP/1.1\r\nBad Header\r\n\r\n",
    "not http": b"}\r\n\r\n",
    "one brace": b"}",
    "zero bytes": b"\0\0\0\0\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "version": b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    "two lengths": b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "chunk size": b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("whole", [1, 2, 5])
@pytest.mark.parametrize("split", [False, True], ids=["one segment", "two segments"])
def test_complete_requests_before_a_parse_error_get_responses(
    server: Server, error: bytes, whole: int, split: bool
) -> None:
    before = HEALTH + BLUE * (whole - 1)
    with Client(server.port) as client:
        client.send(*((before, error) if split else (before + error,)))
        assert (client.read().status, True) == (200, True)
        for _ in range(whole - 1):
            assert PREDICT.label(client.read().body) == "blue"
        response = client.read()
        assert (response.status, response.closes) == (400, True), response
        assert client.read_to_end() == b""
    assert request(server, HEALTH).body == ALIVE


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_parse_error_returns_400_with_a_message(server: Server, error: bytes) -> None:
    with Client(server.port) as client:
        client.send(error)
        response = client.read()
        assert (response.status, response.closes) == (400, True), response
        assert error_of(response)
        assert client.read_to_end() == b""


@pytest.mark.parametrize("count", [1, 2, 3])
def test_http_1_0_gets_one_response_and_the_connection_closed(server: Server, count: int) -> None:
    with Client(server.port) as client:
        client.send(b"GET /healthz HTTP/1.0\r\n\r\n" * count)
        response = client.read()
        assert (response.status, response.body, response.closes) == (200, ALIVE, True)
        assert client.read_to_end()[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.0 400")


def test_requests_after_connection_close_are_ignored(server: Server) -> None:
    with Client(server.port) as client:
        client.send(HEALTH + HEALTH.replace(b"Host", b"Connection: close\r\nHost") + BLUE)
        assert client.read().body == ALIVE
        assert client.read().body == ALIVE
        assert client.read_to_end()[:12] in (b"", b"HTTP/1.1 400")


@pytest.mark.parametrize("missing", [1, 2, 30])
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_a_content_length_that_is_too_small_returns_400(server: Server, name: str, missing: int) -> None:
    route = ROUTES[name]
    body = route.body("red")
    data = head(route.path, b"Content-Length: %d" % (len(body) - missing)) + body
    with Client(server.port) as client:
        client.send(data)
        response = client.read()
        assert response.status == 400
        assert error_of(response)
        check_error_or_nothing(client.read_to_end())


def check_error_or_nothing(rest: bytes) -> None:
    if rest:
        start, _, body = rest.partition(b"\r\n\r\n")
        assert start.startswith(b"HTTP/1.1 400"), rest
        assert json.loads(body)["error"], rest


# Pipelining


def test_a_partial_request_after_a_large_one_does_not_exceed_the_header_limit(server: Server) -> None:
    large = post("/predict", b"x" * 66_000, content_type=b"image/png")
    for cut in (0, 1, 15, len(HEALTH) - 1):
        with Client(server.port) as client:
            client.send(large + HEALTH[:cut])
            assert client.read().status in (400, 415)
            client.send(HEALTH[cut:])
            assert client.read().body == ALIVE


@pytest.mark.parametrize("write", [post, post_chunked], ids=["length", "chunked"])
@pytest.mark.parametrize("behind", [HEALTH, HEALTH * 3, BLUE])
def test_a_large_request_pipelined_after_a_small_one_is_served(
    server: Server, behind: bytes, write: Callable[..., bytes]
) -> None:
    instances = {"instances": [[[[0, 255, 0]] * 32] * 32] * 50}
    large = write("/v1/models/colours:predict", json.dumps(instances).encode())
    data = BLUE + large + behind
    assert len(data) > 300_000
    with Client(server.port) as client:
        client.send(data[:400], data[400:200_000], data[200_000:])
        assert PREDICT.label(client.read().body) == "blue"
        assert len(json.loads(client.read().body)["predictions"]) == 50
        for _ in range(behind.count(b"HTTP/1.1")):
            assert client.read().status == 200


def test_a_long_pipeline_is_served_in_order(server: Server) -> None:
    colours = ["red", "green", "blue", "blue", "red"] * 40
    data = b"".join(post("/predict", picture(colour), content_type=b"image/png") for colour in colours)
    with Client(server.port) as client:
        client.send(data)
        assert [PREDICT.label(client.read().body) for _ in colours] == colours


# Bodies over the limit


UPLOADS = [("/predict", b"image/png"), ("/v1/models/colours:predict", JSON), ("/v2/models/colours/infer", JSON)]
TOO_LONG = b"x" * (MAX_BYTES + 1)


def check_in_sync_or_closed(client: Client, refusal: Response, data: bytes = b"") -> None:
    """The next response on the connection is that to `BLUE`, or the connection is closed."""
    try:
        client.send(data + BLUE)
        following = client.read()
    except (EOFError, ConnectionError):
        return
    assert not refusal.closes
    assert PREDICT.label(following.body) == "blue"


@pytest.mark.parametrize("body", [b"", TOO_LONG], ids=["kept", "sent anyway"])
@pytest.mark.parametrize("expect", [b"100-continue", b"100-Continue"])
@pytest.mark.parametrize(("path", "content_type"), UPLOADS)
def test_a_413_in_place_of_100_continue_leaves_the_connection_in_sync_or_closed(
    server: Server, path: str, content_type: bytes, expect: bytes, body: bytes
) -> None:
    """A client may omit the body after a final response, or send it anyway."""
    length = b"Content-Length: %d" % len(TOO_LONG)
    with Client(server.port) as client:
        client.send(head(path, length, b"Expect: " + expect, content_type=content_type))
        response = client.read()
        assert response.status == 413
        assert error_of(response)
        check_in_sync_or_closed(client, response, body)


@pytest.mark.parametrize(("path", "content_type"), UPLOADS)
def test_a_client_that_sends_a_body_over_the_limit_can_read_the_413(
    server: Server, path: str, content_type: bytes
) -> None:
    """Most clients read the response only after the whole body is sent, so the server must not reset the connection."""
    with Client(server.port) as client:
        client.send(post(path, TOO_LONG, content_type=content_type))
        response = client.read()
        assert response.status == 413
        assert error_of(response)
        check_in_sync_or_closed(client, response)


@pytest.mark.parametrize("size", [1_000, 100_000, MAX_BYTES + 1])
@pytest.mark.parametrize("expect", [False, True], ids=["", "expect"])
def test_a_chunked_body_that_grows_over_the_limit_is_refused(server: Server, size: int, expect: bool) -> None:
    headers = [b"Transfer-Encoding: chunked", *([b"Expect: 100-continue"] if expect else [])]
    with Client(server.port) as client:
        client.send(head("/predict", *headers, content_type=b"image/png"))
        if expect:
            client.read_continue()
        client.send(chunked(TOO_LONG + b"x" * 1_000, size) + b"0\r\n\r\n")
        response = client.read()
        assert response.status == 413
        check_in_sync_or_closed(client, response)


def test_an_unknown_path_accepts_no_body_over_the_limit(server: Server) -> None:
    with Client(server.port) as client:
        client.send(post("/nowhere", TOO_LONG))
        response = client.read()
        assert response.status in (404, 413)
        check_in_sync_or_closed(client, response)


def test_an_endless_body_over_the_limit_closes_the_connection(server: Server) -> None:
    with Client(server.port) as client:
        client.send(head("/predict", b"Transfer-Encoding: chunked", content_type=b"image/png"))
        try:
            for _ in range(1_000):
                client.send(b"186a0\r\n" + b"x" * 100_000 + b"\r\n")
        except ConnectionError:
            return
        pytest.fail("100 MB were accepted with a limit of 2 MB")


@pytest.mark.parametrize("expect", [b"200-ok", b"100-continue, x", b"nonsense"])
def test_an_unknown_expectation_is_refused_or_ignored(server: Server, expect: bytes) -> None:
    with Client(server.port) as client:
        client.send(post("/predict", picture("red"), b"Expect: " + expect, content_type=b"image/png"))
        response = client.read()
        assert response.status == 417 or PREDICT.label(response.body) == "red"
        try:
            client.send(HEALTH)
            assert client.read().body == ALIVE
        except (EOFError, ConnectionError):
            assert response.closes

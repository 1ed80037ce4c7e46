"""Upgrade headers are ignored: the body is read, and the connection stays open (RFC 9110, section 7.8)."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serving.conftest import Server, picture
from tests.serving.http.conftest import (
    ALIVE,
    HEALTH,
    ROUTES,
    Client,
    Route,
    error_of,
    post,
    post_chunked,
    request,
)

COLOURS = ("red", "green", "blue")
H2C = (
    b"Connection: Upgrade, HTTP2-Settings",
    b"Upgrade: h2c",
    b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
)
WEBSOCKET = (
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    b"Sec-WebSocket-Version: 13",
)
UPGRADES = {
    "h2c": H2C,
    "h2c without settings": (b"Connection: Upgrade", b"Upgrade: h2c"),
    "websocket": WEBSOCKET,
    "websocket by nginx": (b"Upgrade: websocket", b"Connection: upgrade"),
    "tls": (b"Connection: Upgrade", b"Upgrade: TLS/1.0"),
    "nonsense": (b"Connection: Upgrade", b"Upgrade: x-Nothing/7"),
    "several": (b"Connection: Upgrade", b"Upgrade: HTTP/2.0, SHTTP/1.3, IRC/6.9, RTA/x11"),
    "several lines": (b"Upgrade: h2c", b"Connection: keep-alive", b"Connection: Upgrade", b"Upgrade: websocket"),
    "with keep-alive": (b"connection: keep-alive, upgrade", b"upgrade: h2c"),
    "upper case": (b"CONNECTION: UPGRADE", b"UPGRADE: H2C"),
    "empty": (b"Connection: Upgrade", b"Upgrade:"),
    "not listed in Connection": (b"Upgrade: h2c",),
    "without Upgrade": (b"Connection: Upgrade",),
    "h2": (b"Connection: Upgrade", b"Upgrade: h2"),
}
WRITERS = {"length": post, "chunked": post_chunked}

with_every_upgrade = pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
with_every_route = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
with_both_framings = pytest.mark.parametrize("framing", WRITERS)


def make_request(route: Route, colour: str, framing: str, upgrade: tuple[bytes, ...]) -> bytes:
    return WRITERS[framing](route.path, route.body(colour), *upgrade, content_type=route.content_type)


def check(client: Client, route: Route, colour: str) -> None:
    response = client.read()
    assert response.status == 200, response
    assert "upgrade" not in response.headers
    assert not response.closes
    assert route.label(response.body) == colour


@with_every_upgrade
@with_every_route
@with_both_framings
def test_an_upgrade_header_is_ignored(server: Server, route: Route, framing: str, upgrade: tuple[bytes, ...]) -> None:
    with Client(server.port) as client:
        for colour in COLOURS:  # the connection stays open for further upgrade headers
            client.send(make_request(route, colour, framing, upgrade))
            check(client, route, colour)
        client.send(HEALTH)
        assert client.read().body == ALIVE


@with_every_upgrade
def test_an_upgrade_header_without_a_body_is_ignored(server: Server, upgrade: tuple[bytes, ...]) -> None:
    lines = b"\r\n".join([b" /healthz HTTP/1.1", b"Host: x", *upgrade, b"", b""])
    with Client(server.port) as client:
        for method in ("GET", "HEAD", "GET"):
            client.send(method.encode() + lines)
            response = client.read(method)
            assert (response.status, response.body) == (200, ALIVE if method == "GET" else b"")
        client.send(b"OPTIONS" + lines + b"GET" + lines)
        assert (client.read().status, client.read().body) == (200, ALIVE)


@pytest.mark.parametrize("upgrade", [UPGRADES["h2c"], UPGRADES["websocket by nginx"]], ids=["h2c", "websocket"])
@pytest.mark.parametrize("first", ["upgrade", "plain"])
@with_every_route
@with_both_framings
def test_requests_pipelined_after_an_upgrade_header_are_served_in_order(
    server: Server, route: Route, framing: str, first: str, upgrade: tuple[bytes, ...]
) -> None:
    # Requests with and without upgrade headers alternate, in one segment.
    upgrades = (upgrade, ()) if first == "upgrade" else ((), upgrade)
    parts = [make_request(route, colour, framing, upgrades[i % 2]) for i, colour in enumerate(COLOURS * 2)]
    with Client(server.port) as client:
        client.send(HEALTH + b"".join(parts) + HEALTH)
        assert client.read().body == ALIVE
        for colour in COLOURS * 2:
            check(client, route, colour)
        assert client.read().body == ALIVE


@pytest.mark.parametrize("upgrade", [H2C, WEBSOCKET, ()], ids=["h2c", "websocket", "none"])
@pytest.mark.parametrize("route", [ROUTES["predict"], ROUTES["v1"]], ids=["predict", "v1"])
@with_both_framings
def test_an_upgrade_request_may_be_split_anywhere(
    server: Server, route: Route, framing: str, upgrade: tuple[bytes, ...]
) -> None:
    """Two segments, split at every byte; the second one also has the next request."""
    data = make_request(route, "blue", framing, upgrade)
    with Client(server.port) as client:
        for place in range(1, len(data)):
            client.send(data[:place], data[place:] + HEALTH, pause_s=0.001)
            check(client, route, "blue")
            assert client.read().body == ALIVE, f"after a split at {place}: {data[:place]!r}"


@pytest.mark.parametrize("upgrade", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@with_every_route
@with_both_framings
def test_an_upgrade_request_may_arrive_byte_by_byte(
    server: Server, route: Route, framing: str, upgrade: tuple[bytes, ...]
) -> None:
    data = make_request(route, "green", framing, upgrade) + HEALTH
    with Client(server.port) as client:
        for start in range(len(data)):
            client.send(data[start : start + 1])
        check(client, route, "green")
        assert client.read().body == ALIVE


@pytest.mark.parametrize("upgrade", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@with_both_framings
def test_an_upgrade_request_may_have_a_large_body(server: Server, framing: str, upgrade: tuple[bytes, ...]) -> None:
    body = json.dumps({"instances": [[[[0, 0, 255]] * 32] * 32] * 100}).encode()
    assert len(body) > 1_000_000
    data = WRITERS[framing]("/v1/models/colours:predict", body, *upgrade)
    with Client(server.port) as client:
        for _ in range(2):
            client.send(data[:400], data[400:700_000], data[700_000:] + HEALTH)
            response = client.read()
            assert response.status == 200, response
            assert len(json.loads(response.body)["predictions"]) == 100
            assert client.read().body == ALIVE


@pytest.mark.parametrize("upgrade", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@with_both_framings
def test_a_body_that_resembles_a_request_is_not_parsed_as_one(
    server: Server, framing: str, upgrade: tuple[bytes, ...]
) -> None:
    data = WRITERS[framing]("/v1/models/colours:predict", HEALTH, *upgrade, b"Connection: close")
    with Client(server.port) as client:
        client.send(data)
        response = client.read()
        assert response.status == 400
        assert "JSON" in error_of(response)
        assert client.read_to_end() == b""


@with_both_framings
def test_expect_100_continue_works_with_an_upgrade_header(server: Server, framing: str) -> None:
    data = make_request(ROUTES["predict"], "red", framing, (*H2C, b"Expect: 100-continue"))
    end = data.index(b"\r\n\r\n") + 4
    with Client(server.port) as client:
        for _ in range(2):
            client.send(data[:end])
            client.read_continue()
            client.send(data[end:])
            check(client, ROUTES["predict"], "red")


def test_an_upgrade_request_with_connection_close_closes(server: Server) -> None:
    upgrade = (b"Connection: Upgrade, close", b"Upgrade: h2c")
    with Client(server.port) as client:
        client.send(make_request(ROUTES["predict"], "red", "length", upgrade))
        response = client.read()
        assert (response.status, response.closes) == (200, True)
        assert client.read_to_end() == b""


def test_an_upgrade_header_of_http_1_0_is_ignored(server: Server) -> None:
    body = picture("red")
    data = post("/predict", body, *H2C, content_type=b"image/png").replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    with Client(server.port) as client:
        client.send(data)
        response = client.read()
        assert ROUTES["predict"].label(response.body) == "red"
        assert client.read_to_end() == b""


@pytest.mark.parametrize("split", [0, 3, 18, 24])
def test_http_2_with_prior_knowledge_is_refused(server: Server, split: int) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings = b"\0\0\0\x04\0\0\0\0\0"
    data = preface + settings
    with Client(server.port) as client:
        client.send(*([data[:split], data[split:]] if split else [data]), pause_s=0.05)
        response = client.read()
        assert response.status in range(400, 500) or response.status == 505, response
        assert response.closes
        assert not client.read_to_end().startswith(b"HTTP/1.1 2")


@pytest.mark.parametrize("target", [b"example.com:443", b"/predict", b"/healthz"])
def test_connect_opens_no_tunnel(server: Server, target: bytes) -> None:
    data = b"CONNECT " + target + b" HTTP/1.1\r\nHost: example.com:443\r\n\r\n"
    with Client(server.port) as client:
        client.send(data)
        assert client.read().status in (400, 404, 405, 501)
    assert request(server, HEALTH).body == ALIVE


JAVA = """
import java.net.URI;
import java.net.http.*;
import java.nio.file.*;

public class Post {
    static void post(HttpClient client, String url, HttpRequest.BodyPublisher body) throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(url)).header("Content-Type", "application/json")
            .POST(body).build();
        HttpResponse<String> response = client.send(request, HttpResponse.BodyHandlers.ofString());
        System.out.println(response.statusCode() + " " + response.body().replaceAll("\\\\s", ""));
    }

    public static void main(String[] arguments) throws Exception {
        Path file = Path.of(arguments[1]);
        for (HttpClient.Version version : HttpClient.Version.values()) {
            HttpClient client = HttpClient.newBuilder().version(version).build();
            for (int round = 0; round < 2; round++) {
                post(client, arguments[0], HttpRequest.BodyPublishers.ofFile(file));
                post(client, arguments[0], HttpRequest.BodyPublishers.ofInputStream(() -> {
                    try {
                        return Files.newInputStream(file);
                    } catch (java.io.IOException error) {
                        throw new java.io.UncheckedIOException(error);
                    }
                }));
            }
        }
        post(HttpClient.newHttpClient(), arguments[0], HttpRequest.BodyPublishers.ofFile(file));
    }
}
"""


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java 11 or later")
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_javas_http_client_works_with_its_defaults(server: Server, tmp_path: Path, name: str) -> None:
    """It sends `Upgrade: h2c` with the first request of each connection, and so do Spring and Ktor."""
    source, body = tmp_path / "Post.java", tmp_path / "body.json"
    source.write_text(JAVA)
    body.write_bytes(ROUTES[name].body("green"))
    command = ["java", "-XX:TieredStopAtLevel=1", str(source), server.url + ROUTES[name].path, str(body)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    responses = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert [status for status, _ in responses] == ["200"] * 9, result.stdout
    assert {ROUTES[name].label(text.encode()) for _, text in responses} == {"green"}


def has_http_2(curl: str) -> bool:
    return "HTTP2" in subprocess.run([curl, "--version"], capture_output=True, text=True, check=True).stdout.split()


CURL = shutil.which("curl")


@pytest.mark.skipif(CURL is None or not has_http_2(CURL), reason="needs curl with HTTP/2")
@pytest.mark.parametrize("framing", ["length", "chunked"])
@with_every_route
def test_curl_that_prefers_http_2_is_served(server: Server, tmp_path: Path, route: Route, framing: str) -> None:
    """With an address that is not https, it offers h2c in the first request of a connection."""
    assert CURL is not None
    files = {}
    for colour in COLOURS:
        files[colour] = tmp_path / colour
        files[colour].write_bytes(route.body(colour))
    options = ["--http2", "--silent", "--show-error", "--fail", "--verbose", "--max-time", "20"]
    options += ["--header", f"Content-Type: {route.content_type.decode()}"]
    if framing == "chunked":
        options += ["--header", "Transfer-Encoding: chunked"]
    command = [CURL]
    for colour, file in files.items():  # three transfers over one connection
        transfer = ["--data-binary", f"@{file}", "--output", str(tmp_path / f"{colour}.json")]
        command += [*(["--next"] if colour != COLOURS[0] else []), *options, *transfer, server.url + route.path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "> Upgrade: h2c" in done.stderr
    assert done.stderr.count("< HTTP/1.1 200 OK") == len(COLOURS)
    for colour in COLOURS:
        assert route.label((tmp_path / f"{colour}.json").read_bytes()) == colour

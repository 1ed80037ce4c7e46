"""HTTP/1.1 over real connections to a real server: framing, limits, and accepting connections."""

from __future__ import annotations

import asyncio
import gzip
import json
import resource
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
import uvloop

from serving.http.server import ACCEPT_FOR_S, Acceptor, listen
from tests.serving.conftest import Server, picture

MAX_BYTES = 2_000_000


@pytest.fixture(scope="module")
def server(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("http")
    shutil.copytree(colours, folder / "models" / "colours" / "1")
    server = Server(folder / "models", folder / "log", "--max-request-bytes", str(MAX_BYTES), "--threads", "2")
    server.wait_for("/readyz")
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.log


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def read_response(stream: socket.SocketIO) -> tuple[int, dict[str, str], bytes]:
    status = int(stream.readline().split()[1])
    headers = {}
    while line := stream.readline().strip():
        name, _, value = line.decode().partition(": ")
        headers[name.lower()] = value
    return status, headers, stream.read(int(headers["content-length"])) or b""


def send(server: Server, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send a request; return its response, and check that `Connection: close` is honoured."""
    with connect(server) as connection, connection.makefile("rb", buffering=0) as stream:
        connection.sendall(request)
        response = read_response(stream)
        if response[1].get("connection") == "close":
            assert stream.read() == b""
        return response


def post(body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST /predict HTTP/1.1", b"Host: x", b"Content-Type: image/png", *headers]
    return b"\r\n".join([*lines, b"", body])


def label(body: bytes) -> str:
    text: str = json.loads(body)["predictions"][0]["label"]
    return text


def test_pipelined_requests_get_responses_in_order(server: Server) -> None:
    colours = ["red", "blue", "green", "blue"]
    pictures = [picture(colour) for colour in colours]
    with connect(server) as connection, connection.makefile("rb", buffering=0) as stream:
        connection.sendall(b"".join(post(data, b"Content-Length: %d" % len(data)) for data in pictures))
        assert [label(read_response(stream)[2]) for _ in colours] == colours


def test_content_length_is_sent_beside_inference_header_content_length(server: Server) -> None:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
    request = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    response = httpx.post(server.url + "/v2/models/colours/infer", json=request, timeout=10)
    assert int(response.headers["inference-header-content-length"]) < int(response.headers["content-length"])


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_request_may_arrive_in_pieces(server: Server, size: int) -> None:
    data = picture("blue")
    request = post(data, b"Content-Length: %d" % len(data))
    with connect(server) as connection, connection.makefile("rb", buffering=0) as stream:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(request), size):
            connection.sendall(request[start : start + size])
        assert label(read_response(stream)[2]) == "blue"


def test_a_chunked_body_is_joined(server: Server) -> None:
    data = picture("green")
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(data[i : i + 9]), data[i : i + 9]) for i in range(0, len(data), 9))
    status, headers, body = send(server, post(chunks + b"0\r\n\r\n", b"Transfer-Encoding: chunked"))
    assert (status, label(body)) == (200, "green")
    assert "connection" not in headers


def test_keep_alive_follows_http_version_and_connection_header(server: Server) -> None:
    assert send(server, b"GET /healthz HTTP/1.0\r\n\r\n")[1]["connection"] == "close"
    assert send(server, b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")[1]["connection"] == "keep-alive"
    assert send(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")[1]["connection"] == "close"
    # Upgrade headers are ignored.
    upgrade = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert send(server, upgrade)[:2][0] == 200


def test_a_head_response_has_no_body(server: Server) -> None:
    with connect(server) as connection, connection.makefile("rb", buffering=0) as stream:
        connection.sendall(b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in stream.readline()
        while stream.readline().strip():
            pass
        assert read_response(stream)[2] == b'{"status":"alive"}'


def test_an_unknown_method_returns_501(server: Server) -> None:
    assert send(server, b"FOO /healthz HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 501


def test_an_absolute_target_is_accepted(server: Server) -> None:
    assert send(server, b"GET http://x:8501/healthz HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200
    assert send(server, b"GET /health%7A?a=b HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_invalid_http_returns_400_and_closes(server: Server, garbage: bytes) -> None:
    status, headers, _ = send(server, garbage)
    assert (status, headers["connection"]) == (400, "close")


def test_headers_over_the_limit_return_431(server: Server) -> None:
    endless = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 400_000
    with connect(server) as connection:
        try:
            connection.sendall(endless)
            response = connection.recv(100)
        except ConnectionError:  # closed while sending
            response = b""
    assert response.startswith(b"HTTP/1.1 431") or not response
    assert send(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 10_000 + b"\r\n\r\n")[0] == 200


def test_a_header_with_an_underscore_is_ignored(server: Server) -> None:
    data = picture("blue")
    status, _, body = send(server, post(data, b"Content_Length: 3", b"Content-Length: %d" % len(data)))
    assert (status, label(body)) == (200, "blue")


def test_a_body_over_the_limit_is_refused_before_it_is_sent(server: Server) -> None:
    with connect(server) as connection, connection.makefile("rb", buffering=0) as stream:
        connection.sendall(post(b"", b"Content-Length: %d" % (MAX_BYTES + 1), b"Expect: 100-continue"))
        status, headers, _ = read_response(stream)
        assert (status, headers["connection"]) == (413, "close")
        assert stream.read() == b""
    assert httpx.post(server.url + "/predict", content=iter([b"x" * 300_000] * 10)).status_code in (413, 415)


def test_large_requests_are_served(server: Server) -> None:
    pixels = np.full((120, 32, 32, 3), (0, 0, 255), np.uint8)
    body = json.dumps({"instances": pixels.tolist()}).encode()
    assert 256 * 1024 < len(body) < MAX_BYTES
    url = server.url + "/v1/models/colours:predict"
    assert len(httpx.post(url, content=body, timeout=60).json()["predictions"]) == 120
    zipped = httpx.post(url, content=gzip.compress(body), headers={"Content-Encoding": "gzip"}, timeout=60)
    assert len(zipped.json()["predictions"]) == 120


def test_stalled_uploads_do_not_block_other_requests(server: Server) -> None:
    with ExitStack() as stack:
        for length in [1_000_000] * 20 + [1_000] * 100:  # far more than threads
            connection = stack.enter_context(connect(server))
            connection.sendall(post(b"x" * min(length - 1, 300_000), b"Content-Length: %d" % length))
        for _ in range(20):
            response = httpx.post(
                server.url + "/predict", content=picture("blue"), headers={"Content-Type": "image/png"}
            )
            assert response.status_code == 200


def test_a_client_disconnect_frees_the_memory_of_large_requests(server: Server) -> None:
    pixels = np.zeros((100, 32, 32, 3), np.uint8).tolist()
    for _ in range(3):
        with ExitStack() as stack:
            for _ in range(6):
                connection = stack.enter_context(connect(server))
                connection.sendall(post(b"x" * 300_000, b"Content-Length: 1000000"))
            time.sleep(0.2)
    response = httpx.post(server.url + "/v1/models/colours:predict", json={"instances": pixels}, timeout=60)
    assert response.status_code == 200


def test_a_client_disconnect_before_the_response_leaves_no_request_in_flight(server: Server) -> None:
    data = picture("blue")
    for _ in range(50):
        with connect(server) as connection:
            connection.sendall(post(data, b"Content-Length: %d" % len(data)))
    assert httpx.get(server.url + "/healthz").status_code == 200
    server.wait_until(lambda: server.in_flight() == 0)


def test_all_queued_connections_are_accepted_in_one_iteration() -> None:
    made: list[asyncio.BaseTransport] = []

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.append(transport)

    async def serve(listener: socket.socket, clients: list[socket.socket]) -> None:
        acceptor = Acceptor(listener, Protocol)
        for _ in range(10):  # more than one, for the tasks that create the transports
            await asyncio.sleep(0)
        acceptor.close()
        assert len(made) == len(clients)

    listener = listen("127.0.0.1", 0)
    with ExitStack() as stack:
        address = listener.getsockname()
        clients = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(100)]
        uvloop.run(serve(listener, clients))


def test_accepting_connections_does_not_block_the_event_loop() -> None:
    accepted: list[socket.socket] = []
    counts: list[int] = []

    class SlowListener:
        """Takes ACCEPT_FOR_S to accept a connection."""

        def __init__(self, listener: socket.socket) -> None:
            self._listener = listener

        def __getattr__(self, name: str) -> Any:
            return getattr(self._listener, name)

        def accept(self) -> tuple[socket.socket, Any]:
            connection, address = self._listener.accept()
            accepted.append(connection)
            time.sleep(ACCEPT_FOR_S)
            return connection, address

    async def serve(listener: socket.socket) -> None:
        acceptor = Acceptor(cast(socket.socket, SlowListener(listener)), asyncio.Protocol)
        while len(accepted) < 10:
            counts.append(len(accepted))
            await asyncio.sleep(0)
        acceptor.close()
        await asyncio.sleep(0.1)

    listener = listen("127.0.0.1", 0)
    with ExitStack() as stack:
        address = listener.getsockname()
        for _ in range(10):
            stack.enter_context(socket.create_connection(address, timeout=10))
        uvloop.run(serve(listener))
    assert set(counts) == set(range(10))


def test_without_free_descriptors_open_connections_are_served(server: Server) -> None:
    pid = server.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with connect(server) as first, first.makefile("rb", buffering=0) as stream, ExitStack() as stack:
        first.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_response(stream)[0] == 200
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(list(Path(f"/proc/{pid}/fd").iterdir())), limits[1]))
        try:
            for _ in range(3):
                stack.enter_context(connect(server))
            server.wait_until(lambda: "cannot accept connections" in server.log)
            first.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_response(stream)[0] == 200
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert send(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200

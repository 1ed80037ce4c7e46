"""HTTP/1.1 as clients speak it, good and bad, over real connections to a real server."""

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


def read_reply(stream: socket.SocketIO) -> tuple[int, dict[str, str], bytes]:
    status = int(stream.readline().split()[1])
    headers = {}
    while line := stream.readline().strip():
        name, _, value = line.decode().partition(": ")
        headers[name.lower()] = value
    return status, headers, stream.read(int(headers["content-length"])) or b""


def ask(server: Server, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes; return the one reply, after which the connection must be closed if it says so."""
    with connect(server) as connection, connection.makefile("rb", buffering=0) as stream:
        connection.sendall(request)
        reply = read_reply(stream)
        if reply[1].get("connection") == "close":
            assert stream.read() == b""
        return reply


def post(body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST /predict HTTP/1.1", b"Host: x", b"Content-Type: image/png", *headers]
    return b"\r\n".join([*lines, b"", body])


def label(body: bytes) -> str:
    text: str = json.loads(body)["predictions"][0]["label"]
    return text


def test_pipelined_requests_are_answered_in_their_order(server: Server) -> None:
    colours = ["red", "blue", "green", "blue"]
    pictures = [picture(colour) for colour in colours]
    with connect(server) as connection, connection.makefile("rb", buffering=0) as stream:
        connection.sendall(b"".join(post(data, b"Content-Length: %d" % len(data)) for data in pictures))
        assert [label(read_reply(stream)[2]) for _ in colours] == colours


def test_a_reply_tells_its_length_beside_a_header_whose_name_ends_alike(server: Server) -> None:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
    request = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    reply = httpx.post(server.url + "/v2/models/colours/infer", json=request, timeout=10)
    assert int(reply.headers["inference-header-content-length"]) < int(reply.headers["content-length"])


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_request_may_come_in_pieces(server: Server, size: int) -> None:
    data = picture("blue")
    request = post(data, b"Content-Length: %d" % len(data))
    with connect(server) as connection, connection.makefile("rb", buffering=0) as stream:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(request), size):
            connection.sendall(request[start : start + size])
        assert label(read_reply(stream)[2]) == "blue"


def test_a_chunked_body_is_put_together(server: Server) -> None:
    data = picture("green")
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(data[i : i + 9]), data[i : i + 9]) for i in range(0, len(data), 9))
    status, headers, body = ask(server, post(chunks + b"0\r\n\r\n", b"Transfer-Encoding: chunked"))
    assert (status, label(body)) == (200, "green")
    assert "connection" not in headers


def test_old_clients_and_those_that_say_so_are_hung_up_on(server: Server) -> None:
    assert ask(server, b"GET /healthz HTTP/1.0\r\n\r\n")[1]["connection"] == "close"
    assert ask(server, b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")[1]["connection"] == "keep-alive"
    assert ask(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")[1]["connection"] == "close"
    # No protocol to change to is known; what was asked is answered all the same.
    upgrade = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert ask(server, upgrade)[:2][0] == 200


def test_a_head_request_is_answered_without_a_body(server: Server) -> None:
    with connect(server) as connection, connection.makefile("rb", buffering=0) as stream:
        connection.sendall(b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in stream.readline()
        while stream.readline().strip():
            pass
        assert read_reply(stream)[2] == b'{"status":"alive"}'


def test_a_method_that_http_does_not_have_is_not_implemented(server: Server) -> None:
    assert ask(server, b"FOO /healthz HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 501


def test_a_target_may_name_the_host(server: Server) -> None:
    assert ask(server, b"GET http://x:8501/healthz HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200
    assert ask(server, b"GET /health%7A?a=b HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200


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
def test_what_is_no_http_is_refused(server: Server, garbage: bytes) -> None:
    status, headers, _ = ask(server, garbage)
    assert (status, headers["connection"]) == (400, "close")


def test_a_head_has_a_limit(server: Server) -> None:
    endless = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 400_000
    with connect(server) as connection:
        try:
            connection.sendall(endless)
            answer = connection.recv(100)
        except ConnectionError:  # it was hung up on before it had said all
            answer = b""
    assert answer.startswith(b"HTTP/1.1 431") or not answer
    assert ask(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 10_000 + b"\r\n\r\n")[0] == 200


def test_a_header_with_an_underscore_is_not_taken_for_another(server: Server) -> None:
    data = picture("blue")
    status, _, body = ask(server, post(data, b"Content_Length: 3", b"Content-Length: %d" % len(data)))
    assert (status, label(body)) == (200, "blue")


def test_a_body_over_the_limit_is_refused_before_it_comes(server: Server) -> None:
    with connect(server) as connection, connection.makefile("rb", buffering=0) as stream:
        connection.sendall(post(b"", b"Content-Length: %d" % (MAX_BYTES + 1), b"Expect: 100-continue"))
        status, headers, _ = read_reply(stream)
        assert (status, headers["connection"]) == (413, "close")
        assert stream.read() == b""
    assert httpx.post(server.url + "/predict", content=iter([b"x" * 300_000] * 10)).status_code in (413, 415)


def test_large_requests_are_answered_too(server: Server) -> None:
    pixels = np.full((120, 32, 32, 3), (0, 0, 255), np.uint8)
    body = json.dumps({"instances": pixels.tolist()}).encode()
    assert 256 * 1024 < len(body) < MAX_BYTES
    url = server.url + "/v1/models/colours:predict"
    assert len(httpx.post(url, content=body, timeout=60).json()["predictions"]) == 120
    zipped = httpx.post(url, content=gzip.compress(body), headers={"Content-Encoding": "gzip"}, timeout=60)
    assert len(zipped.json()["predictions"]) == 120


def test_uploads_that_stand_still_keep_nobody_waiting(server: Server) -> None:
    with ExitStack() as stack:
        for length in [1_000_000] * 20 + [1_000] * 100:  # far more than there are threads
            connection = stack.enter_context(connect(server))
            connection.sendall(post(b"x" * min(length - 1, 300_000), b"Content-Length: %d" % length))
        for _ in range(20):
            reply = httpx.post(server.url + "/predict", content=picture("blue"), headers={"Content-Type": "image/png"})
            assert reply.status_code == 200


def test_places_for_large_requests_come_back_when_their_clients_go(server: Server) -> None:
    pixels = np.zeros((100, 32, 32, 3), np.uint8).tolist()
    for _ in range(3):
        with ExitStack() as stack:
            for _ in range(6):
                connection = stack.enter_context(connect(server))
                connection.sendall(post(b"x" * 300_000, b"Content-Length: 1000000"))
            time.sleep(0.2)
    reply = httpx.post(server.url + "/v1/models/colours:predict", json={"instances": pixels}, timeout=60)
    assert reply.status_code == 200


def test_clients_that_go_before_the_answer_do_no_harm(server: Server) -> None:
    data = picture("blue")
    for _ in range(50):
        with connect(server) as connection:
            connection.sendall(post(data, b"Content-Length: %d" % len(data)))
    assert httpx.get(server.url + "/healthz").status_code == 200
    server.wait_until(lambda: server.in_flight() == 0)


def test_all_connections_that_wait_are_taken_in_one_turn() -> None:
    made: list[asyncio.BaseTransport] = []

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.append(transport)

    async def serve(listener: socket.socket, clients: list[socket.socket]) -> None:
        acceptor = Acceptor(listener, Protocol)
        for _ in range(10):  # a few more for the tasks that hand each over
            await asyncio.sleep(0)
        acceptor.close()
        assert len(made) == len(clients)

    listener = listen("127.0.0.1", 0)
    with ExitStack() as stack:
        address = listener.getsockname()
        clients = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(100)]
        uvloop.run(serve(listener, clients))


def test_the_connections_that_are_open_have_their_turn_while_others_come() -> None:
    accepted: list[socket.socket] = []
    turns: list[int] = []

    class SlowListener:
        """Accepts one connection in the time that a turn may take."""

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
            turns.append(len(accepted))
            await asyncio.sleep(0)
        acceptor.close()
        await asyncio.sleep(0.1)

    listener = listen("127.0.0.1", 0)
    with ExitStack() as stack:
        address = listener.getsockname()
        for _ in range(10):
            stack.enter_context(socket.create_connection(address, timeout=10))
        uvloop.run(serve(listener))
    assert set(turns) == set(range(10))


def test_out_of_files_it_answers_those_it_has_and_takes_more_later(server: Server) -> None:
    pid = server.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with connect(server) as first, first.makefile("rb", buffering=0) as stream, ExitStack() as stack:
        first.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_reply(stream)[0] == 200
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(list(Path(f"/proc/{pid}/fd").iterdir())), limits[1]))
        try:
            for _ in range(3):
                stack.enter_context(connect(server))
            server.wait_until(lambda: "cannot accept connections" in server.log)
            first.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_reply(stream)[0] == 200
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert ask(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200

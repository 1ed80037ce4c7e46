"""HTTPS connections: handshakes of slow and hostile clients, large bodies, slow readers, and graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest
from typing_extensions import override

from serving.http import handshake, protocol
from serving.http import server as server_module
from serving.http.protocol import Connection, SharedState
from serving.http.server import Server, listen
from serving.memory import MemoryBudget
from serving.tls import load_tls
from tests.serving.certificates import Authority
from tests.serving.http.conftest import MB, Client, post, wait_until

SCHEME = b"GET /scheme HTTP/1.1\r\nHost: x\r\n\r\n"
CLIENT_HELLO = bytes.fromhex("160301")


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Return the URL's scheme, the SHA-256 of the request's body, or so many bytes."""
    path = environ["PATH_INFO"]
    if path == "/scheme":
        body = environ["wsgi.url_scheme"].encode()
    elif path == "/digest":
        body = hashlib.sha256(environ["wsgi.input"].read()).hexdigest().encode()
    else:
        body = bytes(range(250)) * (int(path.rpartition("/")[2]) // 250)
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


class ThreadServer(Server):
    """The HTTP server in a thread of the test's process."""

    def __init__(self, context: Callable[[], ssl.SSLContext], *, max_connections: int = 1_000) -> None:
        def make_shared() -> SharedState:
            return SharedState(
                app,
                MemoryBudget(500 * MB),
                max_body_bytes=100 * MB,
                request_timeout_s=30,
                threads=2,
                urgent_paths=(),
            )

        super().__init__(
            make_shared,
            max_connections=max_connections,
            drain_timeout_s=20,
            on_stop=lambda: None,
            on_second_signal=lambda _: None,
            ssl_context=context,
        )
        listener = listen("127.0.0.1", 0)
        self.port: int = listener.getsockname()[1]
        self._thread = threading.Thread(target=self.run, args=([listener],))
        self._thread.start()
        wait_until(lambda: self.started, "the server listens")

    @override
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @property
    def open_connections(self) -> list[Connection]:
        return cast(list[Connection], list(self.server_state.connections))

    @property
    def handshakes(self) -> int:
        return len(self._acceptor.connecting)

    def stop(self) -> float:
        """Shut down gracefully; returns how long that took, in seconds."""
        started_s = time.monotonic()
        self.should_exit = True
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()
        return time.monotonic() - started_s


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def start(authority: Authority) -> Iterator[Callable[..., ThreadServer]]:
    context = load_tls(authority.issue()).context
    servers: list[ThreadServer] = []

    def start_server(**options: Any) -> ThreadServer:
        servers.append(ThreadServer(lambda: context, **options))
        return servers[-1]

    yield start_server
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server(start: Callable[..., ThreadServer]) -> ThreadServer:
    return start()


@pytest.fixture
def connect(server: ThreadServer, authority: Authority) -> Iterator[Callable[..., Client]]:
    context = authority.client_context()
    with ExitStack() as stack:

        def connect(port: int = server.port, **options: Any) -> Client:
            client = stack.enter_context(Client(port, **options))
            client.socket = context.wrap_socket(client.socket, server_hostname="localhost")
            return client

        yield connect


def get(size: int, *headers: bytes) -> bytes:
    return b"\r\n".join([b"GET /bytes/%d HTTP/1.1" % size, b"Host: x", *headers, b"", b""])


def test_requests_have_the_scheme_https_on_a_kept_and_pipelined_connection(connect: Callable[..., Client]) -> None:
    client = connect()
    client.send(SCHEME)
    assert client.read().body == b"https"
    client.send(SCHEME + get(500) + SCHEME)
    assert [len(client.read().body) for _ in range(3)] == [5, 500, 5]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_protocol_is_http_1_1_over_tls_1_2_or_1_3(
    server: ThreadServer, authority: Authority, version: ssl.TLSVersion
) -> None:
    context = authority.client_context()
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])
    with Client(server.port) as client, context.wrap_socket(client.socket, server_hostname="localhost") as connection:
        assert connection.version() == version.name.replace("_", ".")
        assert connection.selected_alpn_protocol() == "http/1.1"


def test_tls_1_1_is_refused(server: ThreadServer, authority: Authority) -> None:
    context = authority.client_context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with Client(server.port) as client, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(client.socket, server_hostname="localhost")


def test_large_bodies_arrive_in_both_directions(connect: Callable[..., Client]) -> None:
    body = bytes(range(256)) * 40_000  # 10 MB
    client = connect(timeout_s=60)
    client.send(post("/digest", body))
    assert client.read().body == hashlib.sha256(body).hexdigest().encode()
    client.send(get(20_000_000) + SCHEME)
    assert hashlib.sha256(client.read().body).digest() == hashlib.sha256(bytes(range(250)) * 80_000).digest()
    assert client.read().body == b"https"


def test_a_large_response_is_not_encrypted_at_once(server: ThreadServer, connect: Callable[..., Client]) -> None:
    """While one client does not read, its response is in memory once, and others get theirs."""
    slow = connect(receive_buffer=4_096)
    slow.send(get(50_000_000))
    wait_until(lambda: any(c._unencrypted for c in server.open_connections), "the buffer is full")
    fast = connect()
    fast.send(SCHEME)
    assert fast.read().body == b"https"
    (connection,) = [c for c in server.open_connections if c._unencrypted]
    assert len(connection._unencrypted or b"") > 40_000_000
    assert connection.transport.get_write_buffer_size() < 2 * protocol.TLS_WRITE_BYTES + MB


def test_a_slow_reader_gets_the_end_of_its_response_and_one_that_stops_is_disconnected(
    server: ThreadServer, connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system buffers megabytes, so the server cannot write for longer than the timeout though the client reads."""
    monkeypatch.setattr(protocol, "UNREAD_TIMEOUT_S", 1.0)
    wait_until(lambda: not server.open_connections, "connections of earlier tests are closed")
    slow, stopped = connect(receive_buffer=4_096), connect(receive_buffer=4_096)
    for client in (slow, stopped):
        client.send(get(12_000_000, b"Connection: close"))
    received = 0
    slow.socket.settimeout(10)
    for _ in range(8):  # longer than the timeout
        received += len(slow.socket.recv(16_384))
        time.sleep(0.3)
    while data := slow.socket.recv(65_536):
        received += len(data)
    assert received > 12_000_000
    wait_until(lambda: not server.open_connections, "the other one is disconnected")


def test_an_early_response_to_an_upload_can_be_read(connect: Callable[..., Client]) -> None:
    """TLS has no half-close, so the connection stays open while the client may still send."""
    client = connect()
    client.send(b"POST /digest HTTP/1.1\r\nHost: x\r\nContent-Length: 200000000\r\n\r\n", b"x" * 300_000)
    response = client.read()
    assert response.closes
    client.send(b"x" * 300_000)  # is discarded


def test_a_client_that_closes_ends_its_connection(server: ThreadServer, connect: Callable[..., Client]) -> None:
    wait_until(lambda: not server.open_connections, "connections of earlier tests are closed")
    client = connect()
    client.send(SCHEME)
    assert client.read().body == b"https"
    assert isinstance(client.socket, ssl.SSLSocket)
    client.socket = client.socket.unwrap()  # close_notify, and the server's
    assert client.read_to_end() == b""
    wait_until(lambda: not server.open_connections, "the connection is closed")


def test_plain_http_gets_an_explanation(server: ThreadServer) -> None:
    with Client(server.port) as client:
        client.send(SCHEME)
        response = client.read()
        assert (response.status, response.closes) == (400, True)
        assert b"https://" in response.body
        assert client.read_to_end() == b""


def test_hostile_handshakes_are_closed_and_disturb_no_one(
    server: ThreadServer,
    connect: Callable[..., Client],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 1.0)
    caplog.set_level(logging.DEBUG)
    kept = connect()
    with ExitStack() as stack:
        hostile = [stack.enter_context(Client(server.port)) for _ in range(60)]
        sent = [b"", CLIENT_HELLO, b"\0garbage", b"\x16garbage", CLIENT_HELLO + b"\x02\0" + b"x" * 512]
        for client, data in zip(hostile, sent * 12, strict=True):
            client.send(data)
        hostile[0].reset()
        for client in (kept, connect()):
            client.send(SCHEME)
            assert client.read().body == b"https"
        for client in hostile[1:]:
            assert client.read_to_end()[:1] in (b"", b"\x15")  # nothing, or an alert
    wait_until(lambda: server.handshakes == 0, "no handshake is left")
    kept.send(SCHEME)
    assert kept.read().body == b"https"
    assert [record.getMessage() for record in caplog.records if record.name != "asyncio"] == []


def test_handshakes_count_as_connections_and_the_oldest_make_room(
    start: Callable[..., ThreadServer], connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "FRESH_S", 0.2)
    server = start(max_connections=4)
    with ExitStack() as stack:
        silent = [stack.enter_context(Client(server.port)) for _ in range(4)]
        wait_until(lambda: server.handshakes == 4, "all are accepted")
        client = connect(server.port)
        client.send(SCHEME)
        assert client.read().body == b"https"
        assert silent[0].read_to_end() == b""
        assert server.handshakes >= 2


def test_a_few_handshakes_start_in_each_iteration_of_the_event_loop() -> None:
    started: list[int] = []

    async def run() -> None:
        handshakes = handshake.Handshakes(lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), asyncio.Protocol)
        turns = [asyncio.create_task(handshakes._wait_for_turn()) for _ in range(20)]
        turns[1].cancel()  # by its timeout
        while not all(turn.done() for turn in turns):
            await asyncio.sleep(0)
            started.append(sum(turn.done() and not turn.cancelled() for turn in turns))

    asyncio.run(run())
    assert max(after - before for before, after in itertools.pairwise(started)) == 4
    assert started[-1] == 19


def test_graceful_shutdown_sends_close_notify_and_waits_for_no_idle_client(
    start: Callable[..., ThreadServer], connect: Callable[..., Client]
) -> None:
    server = start()
    idle, busy, unread = connect(server.port), connect(server.port), connect(server.port)
    with Client(server.port):  # a handshake that does not begin
        for client in (idle, busy):
            client.send(SCHEME)
            assert client.read().body == b"https"
        unread.send(get(100_000))
        assert unread.socket.recv(1_000)
        busy.send(post("/digest", b"body")[:-1])
        time.sleep(0.1)
        thread = threading.Thread(target=server.stop)
        thread.start()
        time.sleep(0.2)
        busy.send(b"y")
        assert busy.read().closes
        assert idle.socket.recv(1) == b""  # close_notify: without it, ssl raises SSLEOFError
        thread.join(timeout=15)
        assert not thread.is_alive()  # sooner than the drain timeout, though no client has sent its close_notify
        assert len(unread.read_to_end()) > 99_000

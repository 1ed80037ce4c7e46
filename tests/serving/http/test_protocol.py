"""The HTTP protocol in the test process, with a test WSGI application."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from serving.errors import ModelFailed
from serving.greenlets import offload
from serving.http import protocol, request
from serving.http.protocol import Connection, SharedState
from serving.http.server import Acceptor, Server, listen
from serving.memory import MemoryBudget, RequestMemory, Reservation
from serving.request_context import RequestContext, current_request

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
LAST_HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


class Service:
    """A server whose application returns the length of the body; `contexts` are the contexts of its requests."""

    def __init__(self, **options: Any) -> None:
        self.budget = MemoryBudget(options.pop("budget_bytes", 160_000_000))
        self.contexts: list[RequestContext] = []
        self.work: Callable[[], object] = lambda: None  # called for each request except health checks
        self.response: bytes | None = None  # replaces the length of the body
        settings: dict[str, Any] = {
            "max_body_bytes": 50_000_000,
            "request_timeout_s": 30.0,
            "threads": 2,
            "urgent_paths": frozenset({b"/healthz"}),
            **options,
        }
        self.shared = SharedState(self._app, self.budget, **settings)
        self.state = ServerState()
        config = uvicorn.Config(lambda: None, ws="none", lifespan="off", log_config=None, access_log=False)
        listener = listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.acceptor = Acceptor(listener, lambda: Connection(config, self.state, self.shared))

    def _app(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/healthz":
            self.contexts.append(current_request.get())
            self.work()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [self.response or b"%d" % len(environ["wsgi.input"].read())]

    async def connect(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))

    async def send(self, data: bytes) -> tuple[int, bytes]:
        """Send one request on a new connection; returns status and body."""
        client = await self.connect()
        client.send(data)
        try:
            return await client.read()
        finally:
            client.close()

    def check_timeouts(self, after_s: float, *, late_s: float = 0) -> None:
        """Check the timeouts as if `after_s` had passed."""
        for connection in tuple(self.state.connections):
            cast(Connection, connection).check_timeouts(asyncio.get_running_loop().time() + after_s, late_s)


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def read(self, within_s: float = 5) -> tuple[int, bytes]:
        async with asyncio.timeout(within_s):
            head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.split(b"\r\ncontent-length:")[1].split(b"\r\n")[0])
            return int(head[9:12]), await self._reader.readexactly(length)

    async def ends(self, within_s: float = 5) -> bool:
        """Whether the server closes the connection; data before that is skipped."""
        try:
            async with asyncio.timeout(within_s):
                while await self._reader.read(65_536):
                    pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        """Close with an RST."""
        linger = struct.pack("ii", 1, 0)
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()


def run(check: Callable[[Service], Awaitable[None]], **options: Any) -> None:
    async def start() -> None:
        service = Service(**options)
        try:
            await asyncio.wait_for(check(service), 60)
        finally:
            service.acceptor.close()
            for connection in tuple(service.state.connections):
                connection.transport.abort()
            await asyncio.sleep(0.02)
            service.shared.greenlets.threads.shutdown(wait=False)
            gc.collect()

    uvloop.run(start())


async def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.005)


def get(*headers: bytes) -> bytes:
    return b"\r\n".join([b"GET /x HTTP/1.1", b"Host: x", *headers, b"", b""])


def post(length: int, *headers: bytes, sent: int | None = None) -> bytes:
    lines = [b"POST /x HTTP/1.1", b"Host: x", b"Content-Length: %d" % length, *headers]
    return b"\r\n".join([*lines, b"", b""]) + bytes(length if sent is None else sent)


# X-Request-Timeout-S and the request context


@pytest.mark.parametrize("value", [b"", b"abc", b"0", b"-1", b"nan", b"inf", b"1,5", b"1 s", b"\xff", b"1e999"])
def test_an_invalid_timeout_header_returns_400_and_keeps_the_connection(value: bytes) -> None:
    async def check(service: Service) -> None:
        client = await service.connect()
        client.send(post(10, b"X-Request-Timeout-S: " + value))
        status, body = await client.read()
        assert status == 400
        assert b"X-Request-Timeout-S" in body
        client.send(get())
        assert (await client.read())[0] == 200
        assert len(service.contexts) == 1
        assert service.budget.used_bytes == 0

    run(check)


@pytest.mark.parametrize(
    ("headers", "expected_s"),
    [
        ((), 10.0),
        ((b"X-Request-Timeout-S: 2.5",), 2.5),
        ((b"x-request-timeout-s:   1e0  ",), 1.0),
        ((b"X-Request-Timeout-S: 3600",), 10.0),  # can only shorten the timeout
        ((b"X-Request-Timeout-S: 5", b"X-Request-Timeout-S: 3"), 3.0),
    ],
)
def test_the_timeout_header_shortens_the_deadline(headers: tuple[bytes, ...], expected_s: float) -> None:
    async def check(service: Service) -> None:
        before_s = time.monotonic()
        assert (await service.send(get(*headers)))[0] == 200
        deadline_s = service.contexts[0].deadline_s
        assert deadline_s is not None
        assert before_s + expected_s <= deadline_s <= time.monotonic() + expected_s

    run(check, request_timeout_s=10.0)


def test_the_timeout_starts_when_the_body_is_received() -> None:
    async def check(service: Service) -> None:
        client = await service.connect()
        client.send(post(10, b"X-Request-Timeout-S: 0.2", sent=5))
        await asyncio.sleep(0.4)
        client.send(bytes(5))
        assert (await client.read())[0] == 200
        deadline_s = service.contexts[0].deadline_s
        assert deadline_s is not None
        assert deadline_s > time.monotonic()

    run(check)


def test_the_request_context_reports_a_client_disconnect() -> None:
    reported: list[bool] = []

    async def check(service: Service) -> None:
        def work() -> None:
            context = service.contexts[0]
            reported.append(context.client_disconnected())
            offload(time.sleep, 0.2)
            reported.append(context.client_disconnected())

        service.work = work
        client = await service.connect()
        client.send(get())
        await until(lambda: len(reported) == 1)
        client.reset()
        await until(lambda: len(reported) == 2)
        assert reported == [False, True]

    run(check)


def test_load_shedding_refuses_a_request_that_would_miss_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(service: Service) -> None:
        monkeypatch.setattr(type(service.shared.greenlets), "queue_s", 3.0)
        refused: list[RequestContext] = []
        service.shared.report_refused = refused.append
        client = await service.connect()
        client.send(get(b"X-Request-Timeout-S: 2\r\nX-Request-ID: mine"))
        assert (await client.read())[0] == 503
        (context,) = refused
        assert (context.method, context.status, context.request_id) == ("GET", "503", "mine")
        assert context.shed_reason == "loop_queue"
        client.send(get(b"X-Request-Timeout-S: 4"))
        assert (await client.read())[0] == 200
        client.send(HEALTH)  # never refused
        assert (await client.read())[0] == 200
        assert len(service.contexts) == 1

    run(check)


@pytest.mark.parametrize("size", [0, 10, 300_000, 5_000_000])
def test_memory_for_a_body_is_held_until_the_response(size: int) -> None:
    held: list[int] = []

    async def check(service: Service) -> None:
        service.work = lambda: held.append(service.budget.used_bytes)
        assert (await service.send(post(size)))[1] == b"%d" % size
        assert size <= held[0] <= size + request.GROW_BYTES
        await until(lambda: service.budget.used_bytes == 0)

    run(check)


def test_memory_reserved_by_the_application_is_released_after_the_response() -> None:
    async def check(service: Service) -> None:
        service.work = lambda: service.contexts[-1].reserve(20_000_000)
        client = await service.connect()
        client.send(post(10) * 3)
        assert [(await client.read())[0] for _ in range(3)] == [200] * 3
        await until(lambda: service.budget.used_bytes == 0)

    run(check)


def test_memory_reserved_by_the_application_is_released_after_a_client_disconnect() -> None:
    async def check(service: Service) -> None:
        def work() -> None:
            offload(time.sleep, 0.2)
            service.contexts[-1].reserve(20_000_000)

        service.work = work
        client = await service.connect()
        client.send(post(300_000))
        await until(lambda: len(service.contexts) == 1)
        client.reset()
        await until(lambda: not service.state.connections)
        await until(lambda: service.budget.used_bytes == 0)
        await asyncio.sleep(0.4)
        assert service.budget.used_bytes == 0

    run(check)


def test_a_client_disconnect_during_an_upload_releases_its_memory() -> None:
    async def check(service: Service) -> None:
        client = await service.connect()
        client.send(post(20_000_000, sent=5_000_000))
        await until(lambda: service.budget.used_bytes >= 5_000_000)
        client.reset()
        await until(lambda: service.budget.used_bytes == 0)

    run(check)


def test_check_raises_after_a_client_disconnect_or_the_deadline() -> None:
    RequestContext().check()
    RequestContext(deadline_s=time.monotonic() + 60, client_disconnected=lambda: False).check()
    with pytest.raises(ModelFailed, match="deadline exceeded") as late:
        RequestContext(deadline_s=time.monotonic() - 1).check()
    assert late.value.status == 504
    with pytest.raises(ModelFailed, match="client disconnected") as cancelled:
        RequestContext(client_disconnected=lambda: True).check()
    assert cancelled.value.status == 499


def test_reserve_uses_the_memory_of_the_request() -> None:
    budget = MemoryBudget(160_000_000)
    memory = RequestMemory(budget)
    RequestContext(memory=memory).reserve(1_000)
    assert memory.held_bytes == budget.used_bytes == 1_000
    memory.release()
    RequestContext().reserve(10**15)  # unlimited


# Faults


CHUNKED = b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def send_garbage_after_a_body_over_the_limit(check_after: Callable[[Service], Awaitable[None]]) -> None:
    """Send garbage after a body was refused and before the response is sent."""

    async def check(service: Service) -> None:
        client = await service.connect()
        client.send(CHUNKED + b"5\r\nhello")
        await asyncio.sleep(0.05)
        for _ in range(40):  # delays the response
            service.shared.greenlets.enqueue(time.sleep, 0.005)
        client.send(b"\r\n400\r\n" + bytes(1_024))
        await asyncio.sleep(0.02)
        client.send(b"\r\nzz\r\n")
        assert (await client.read())[0] in (400, 413)
        await asyncio.sleep(0.4)  # until the application has responded
        client.close()
        await until(lambda: not service.state.connections)
        await check_after(service)

    run(check, max_body_bytes=1_000)


def test_garbage_after_a_body_over_the_limit_does_not_stop_the_service() -> None:
    async def check(service: Service) -> None:
        assert (await service.send(LAST_HEALTH))[0] == 200

    send_garbage_after_a_body_over_the_limit(check)


def test_garbage_after_a_body_over_the_limit_leaks_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    async def check(service: Service) -> None:
        await asyncio.sleep(0.2)
        assert service.budget.used_bytes == 0

    with caplog.at_level(logging.ERROR):
        send_garbage_after_a_body_over_the_limit(check)
    assert caplog.records == []


def test_garbage_in_the_segment_that_starts_a_body_gets_one_response(caplog: pytest.LogCaptureFixture) -> None:
    async def check(service: Service) -> None:
        status, _ = await service.send(CHUNKED + b"2000\r\n" + bytes(8_192) + b"\r\nzz\r\n")
        assert status == 400
        await asyncio.sleep(0.05)
        assert service.budget.used_bytes == 0

    with caplog.at_level(logging.ERROR):
        run(check)
    assert caplog.records == []


@pytest.mark.parametrize(
    "before",
    [
        b"",
        HEALTH,
    ],
    ids=["alone", "pipelined"],
)
def test_a_stalled_upload_returns_408(before: bytes) -> None:
    async def check(service: Service) -> None:
        client = await service.connect()
        client.send(before + post(2_000_000, sent=10))
        if before:
            assert (await client.read())[0] == 200
        await until(lambda: service.budget.used_bytes > 0)
        for after_s in (6, 12, 18):
            service.check_timeouts(after_s)
            await asyncio.sleep(0.02)
        assert service.budget.used_bytes == 0
        assert (await client.read())[0] == 408

    run(check)


@pytest.mark.parametrize("sizes", [(9_000, 9_000), (9_000, 10), (5_000, 7_000, 100_000)])
def test_pipelined_bodies_that_arrive_together_are_all_received(sizes: tuple[int, ...]) -> None:
    async def check(service: Service) -> None:
        client = await service.connect()
        client.send(b"".join(post(size, sent=size) for size in sizes))
        assert [await client.read() for _ in sizes] == [(200, b"%d" % size) for size in sizes]

    run(check)


def test_time_without_reading_does_not_count_against_the_upload_rate() -> None:
    async def check(service: Service) -> None:
        client = await service.connect()
        client.send(post(2_000_000, sent=10))
        await until(lambda: service.budget.used_bytes > 0)
        service.check_timeouts(6, late_s=5)
        client.send(bytes(2_000_000 - 10))
        assert await client.read() == (200, b"2000000")

    run(check)


@pytest.mark.parametrize("size", [30_000, 60_000])
def test_headers_up_to_the_limit_are_accepted(size: int) -> None:
    async def check(service: Service) -> None:
        headers = [b"X-%05d: %b" % (number, b"v" * 990) for number in range(size // 1_000)]
        assert (await service.send(get(*headers)))[0] == 200

    run(check)


def test_a_slow_reader_gets_its_complete_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "UNREAD_TIMEOUT_S", 3.0)  # less than it reads; more than the kernel collects
    size = 8_000_000

    async def check(service: Service) -> None:
        service.response = bytes(size)
        loop = asyncio.get_running_loop()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
            slow.setblocking(False)
            await loop.sock_connect(slow, ("127.0.0.1", service.port))
            await loop.sock_sendall(slow, get())
            received, checked_s = 0, time.monotonic()
            while received < size:
                data = await loop.sock_recv(slow, 65_536)
                assert data, f"closed after {received:,} of {size:,} bytes"
                received += len(data)
                await asyncio.sleep(0.02)
                if time.monotonic() > checked_s + 0.3:
                    checked_s = time.monotonic()
                    service.check_timeouts(0)

    run(check)


def test_a_reset_while_an_upload_waits_for_memory_releases_its_memory() -> None:
    async def check(service: Service) -> None:
        budget = service.budget.large
        held = Reservation(budget)
        held.grow(budget.body_limit - 9_000_000, is_body=True, deadline_s=None)
        client = await service.connect()
        client.send(post(12_000_000, sent=11_900_000))
        await until(lambda: budget.has_waiters)
        client.reset()
        await asyncio.sleep(0.1)
        service.check_timeouts(0)
        await until(lambda: budget.used == held.held)
        assert not budget.has_waiters

    run(check)


def test_the_timeout_header_limits_the_wait_for_memory() -> None:
    async def check(service: Service) -> None:
        budget = service.budget.large
        held = Reservation(budget)
        held.grow(budget.body_limit, is_body=True, deadline_s=None)
        client = await service.connect()
        client.send(post(2_000_000, b"X-Request-Timeout-S: 0.3"))
        assert (await client.read(within_s=3))[0] == 503

    run(check)


def test_the_connection_limit_is_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.http.server.FRESH_S", 0.05)

    async def check(service: Service) -> None:
        server = Server.__new__(Server)
        server.server_state, server._acceptor, server.max_connections = service.state, service.acceptor, 20
        clients = [await service.connect() for _ in range(20)]
        await asyncio.sleep(0.2)
        service.acceptor._make_room = server._close_longest_idle
        service.acceptor._may_accept = lambda: server.connections < 20
        clients += await asyncio.gather(*(service.connect() for _ in range(100)))
        await asyncio.sleep(0.03)
        assert len(service.state.connections) <= 20
        for client in clients:
            client.close()

    run(check)


def test_slow_headers_return_408_with_the_limit() -> None:
    async def check(service: Service) -> None:
        client = await service.connect()
        client.send(b"POST /x HTTP/1.1\r\nHost:")
        await until(lambda: any(cast(Connection, c)._head_started_s is not None for c in service.state.connections))
        service.check_timeouts(11)
        status, body = await client.read()
        assert (status, json.loads(body)) == (408, {"error": "the headers took longer than 10 s"})

    run(check)

"""The HTTP protocol in this process, with a WSGI application of the tests, so that its insides can be looked at."""

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
from serving.http import body_receiver, protocol
from serving.http.protocol import Connection, SharedState
from serving.http.server import Acceptor, Server, _no_asgi_app, listen
from serving.memory import MemoryBudget, RequestMemory, Reservation
from serving.request_context import RequestContext, current_request

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
LAST_HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


class Service:
    """A server whose application tells the length of the body; `contexts` are those of its requests."""

    def __init__(self, **limits: Any) -> None:
        self.budget = MemoryBudget(limits.pop("budget_bytes", 160_000_000))
        self.contexts: list[RequestContext] = []
        self.work: Callable[[], object] = lambda: None  # done for each request, beside health checks
        self.response: bytes | None = None  # in place of the length of the body
        settings: dict[str, Any] = {
            "max_body_bytes": 50_000_000,
            "request_timeout_s": 30.0,
            "threads": 2,
            "access_log": False,
            "urgent_paths": frozenset({b"/healthz"}),
            **limits,
        }
        self.shared = SharedState(self._app, self.budget, **settings)
        self.state = ServerState()
        config = uvicorn.Config(app=_no_asgi_app, ws="none", lifespan="off", log_config=None, access_log=False)
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

    async def ask(self, data: bytes) -> tuple[int, bytes]:
        """Send one request on a connection of its own; returns status and body."""
        client = await self.connect()
        client.send(data)
        try:
            return await client.read()
        finally:
            client.close()

    def check_timeouts(self, after_s: float, *, late_s: float = 0) -> None:
        """What is done every second, so many seconds from now."""
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
        """Whether the server closes the connection; what is sent before is skipped."""
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
        """Close with an RST, as a client that crashes does."""
        linger = struct.pack("ii", 1, 0)
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()


def run(check: Callable[[Service], Awaitable[None]], **limits: Any) -> None:
    async def start() -> None:
        service = Service(**limits)
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


# X-Request-Timeout-S, and what the application is told of a request


@pytest.mark.parametrize("value", [b"", b"abc", b"0", b"-1", b"nan", b"inf", b"1,5", b"1 s", b"\xff", b"1e999"])
def test_a_timeout_that_is_none_is_refused_and_the_connection_goes_on(value: bytes) -> None:
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
        ((b"X-Request-Timeout-S: 3600",), 10.0),  # it can only shorten it
        ((b"X-Request-Timeout-S: 5", b"X-Request-Timeout-S: 3"), 3.0),
    ],
)
def test_the_deadline_of_a_request(headers: tuple[bytes, ...], expected_s: float) -> None:
    async def check(service: Service) -> None:
        before_s = time.monotonic()
        assert (await service.ask(get(*headers)))[0] == 200
        deadline_s = service.contexts[0].deadline_s
        assert deadline_s is not None
        assert before_s + expected_s <= deadline_s <= time.monotonic() + expected_s

    run(check, request_timeout_s=10.0)


def test_the_time_that_a_body_takes_is_not_the_requests() -> None:
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


def test_the_application_is_told_when_the_client_disconnects() -> None:
    told: list[bool] = []

    async def check(service: Service) -> None:
        def work() -> None:
            context = service.contexts[0]
            told.append(context.client_disconnected())
            offload(time.sleep, 0.2)
            told.append(context.client_disconnected())

        service.work = work
        client = await service.connect()
        client.send(get())
        await until(lambda: len(told) == 1)
        client.reset()
        await until(lambda: len(told) == 2)
        assert told == [False, True]

    run(check)


def test_a_request_that_could_not_have_its_turn_in_time_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(service: Service) -> None:
        monkeypatch.setattr(type(service.shared.greenlets), "queue_s", 3.0)
        client = await service.connect()
        client.send(get(b"X-Request-Timeout-S: 2"))
        assert (await client.read())[0] == 503
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
        assert (await service.ask(post(size)))[1] == b"%d" % size
        assert size <= held[0] <= size + body_receiver.GROW_BYTES
        await until(lambda: service.budget.used_bytes == 0)

    run(check)


def test_what_the_application_reserves_is_released_with_the_response() -> None:
    async def check(service: Service) -> None:
        service.work = lambda: service.contexts[-1].reserve(20_000_000)
        client = await service.connect()
        client.send(post(10) * 3)
        assert [(await client.read())[0] for _ in range(3)] == [200] * 3
        await until(lambda: service.budget.used_bytes == 0)

    run(check)


def test_what_the_application_reserves_is_released_when_the_client_has_gone() -> None:
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


def test_an_upload_that_is_given_up_releases_its_memory() -> None:
    async def check(service: Service) -> None:
        client = await service.connect()
        client.send(post(20_000_000, sent=5_000_000))
        await until(lambda: service.budget.used_bytes >= 5_000_000)
        client.reset()
        await until(lambda: service.budget.used_bytes == 0)

    run(check)


def test_a_context_tells_what_ends_a_request() -> None:
    RequestContext().check()
    RequestContext(deadline_s=time.monotonic() + 60, client_disconnected=lambda: False).check()
    with pytest.raises(ModelFailed, match="deadline passed") as late:
        RequestContext(deadline_s=time.monotonic() - 1).check()
    assert late.value.status == 504
    with pytest.raises(ModelFailed, match="client disconnected") as gone:
        RequestContext(client_disconnected=lambda: True).check()
    assert gone.value.status == 499


def test_a_context_reserves_what_its_request_holds() -> None:
    budget = MemoryBudget(160_000_000)
    memory = RequestMemory(budget)
    RequestContext(memory=memory).reserve(1_000)
    assert memory.held_bytes == budget.used_bytes == 1_000
    memory.release()
    RequestContext().reserve(10**15)  # nobody counts


# Faults


CHUNKED = b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def garbage_behind_a_body_that_is_too_long(check_after: Callable[[Service], Awaitable[None]]) -> None:
    """Send garbage between the refusal of a body and its response."""

    async def check(service: Service) -> None:
        client = await service.connect()
        client.send(CHUNKED + b"5\r\nhello")
        await asyncio.sleep(0.05)
        for _ in range(40):  # other requests, so that this one has to wait for its turn
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


def test_garbage_behind_a_body_that_is_too_long_does_not_stop_the_service() -> None:
    async def check(service: Service) -> None:
        assert (await service.ask(LAST_HEALTH))[0] == 200

    garbage_behind_a_body_that_is_too_long(check)


def test_garbage_behind_a_body_that_is_too_long_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    async def check(service: Service) -> None:
        await asyncio.sleep(0.2)
        assert service.budget.used_bytes == 0

    with caplog.at_level(logging.ERROR):
        garbage_behind_a_body_that_is_too_long(check)
    assert caplog.records == []


def test_garbage_in_the_data_that_a_body_begins_with_is_answered_once(caplog: pytest.LogCaptureFixture) -> None:
    async def check(service: Service) -> None:
        status, _ = await service.ask(CHUNKED + b"2000\r\n" + bytes(8_192) + b"\r\nzz\r\n")
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
def test_a_stalled_upload_is_ended(before: bytes) -> None:
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


def test_an_upload_is_not_ended_for_time_in_which_the_server_did_not_read() -> None:
    async def check(service: Service) -> None:
        client = await service.connect()
        client.send(post(2_000_000, sent=10))
        await until(lambda: service.budget.used_bytes > 0)
        service.check_timeouts(6, late_s=5)
        client.send(bytes(2_000_000 - 10))
        assert await client.read() == (200, b"2000000")

    run(check)


@pytest.mark.parametrize("size", [30_000, 60_000])
def test_headers_up_to_their_limit_are_taken(size: int) -> None:
    async def check(service: Service) -> None:
        headers = [b"X-%05d: %b" % (number, b"v" * 990) for number in range(size // 1_000)]
        assert (await service.ask(get(*headers)))[0] == 200

    run(check)


def test_a_client_that_reads_slowly_gets_all_of_its_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "UNREAD_TIMEOUT_S", 1.0)
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


def test_a_client_that_goes_while_its_upload_waits_for_memory_gives_it_back() -> None:
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


def test_the_timeout_of_a_request_is_also_that_of_waiting_for_memory_for_its_body() -> None:
    async def check(service: Service) -> None:
        budget = service.budget.large
        held = Reservation(budget)
        held.grow(budget.body_limit, is_body=True, deadline_s=None)
        client = await service.connect()
        client.send(post(2_000_000, b"X-Request-Timeout-S: 0.3"))
        assert (await client.read(within_s=3))[0] == 503

    run(check)


def test_no_more_connections_than_the_limit_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.http.server.FRESH_S", 0.05)

    async def check(service: Service) -> None:
        server = Server.__new__(Server)
        server.server_state, server._acceptor, server._max_connections = service.state, service.acceptor, 20
        clients = [await service.connect() for _ in range(20)]
        await asyncio.sleep(0.2)
        service.acceptor._make_room = server._close_longest_idle
        service.acceptor._may_accept = lambda: server._connections < 20
        clients += await asyncio.gather(*(service.connect() for _ in range(100)))
        await asyncio.sleep(0.03)
        assert len(service.state.connections) <= 20
        for client in clients:
            client.close()

    run(check)


def test_headers_that_take_too_long_are_told_the_limit() -> None:
    async def check(service: Service) -> None:
        client = await service.connect()
        client.send(b"POST /x HTTP/1.1\r\nHost:")
        await until(lambda: any(cast(Connection, c)._head_started_s is not None for c in service.state.connections))
        service.check_timeouts(11)
        status, body = await client.read()
        assert (status, json.loads(body)) == (408, {"error": "the headers took longer than 10 s"})

    run(check)

"""Receiving gRPC messages within the memory budget, on real connections to a server with one method."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import uvloop
from google.protobuf.wrappers_pb2 import BytesValue

from serving.errors import InvalidRequest
from serving.greenlets import LoopGreenlets, Waiter, wake_all
from serving.grpc import receiving
from serving.grpc.handlers import OBJECT_BYTES, make_handler
from serving.grpc.receiving import CHANNEL_OPTIONS, COPIES, MessageReceiver
from serving.memory import MemoryBudget, Reservation
from serving.metrics import Metrics
from serving.observer import RequestObserver
from serving.request_context import current_request

BUDGET_BYTES = 160_000_000
MAX_BYTES = 8_000_000
LATE_S = 4 * receiving.POLL_S

Method = Callable[[Any], Any]


class Service:
    """A gRPC server with an echo method."""

    def __init__(self, *, max_bytes: int = MAX_BYTES, method: Method = lambda message: message) -> None:
        self.budget = MemoryBudget(BUDGET_BYTES)
        self.metrics = Metrics()
        self.max_bytes = max_bytes
        self._method = method

    async def start(self, threads: ThreadPoolExecutor) -> None:
        options = [("grpc.max_receive_message_length", self.max_bytes), *CHANNEL_OPTIONS]
        self.server = grpc.aio.server(options=options)
        handler = make_handler(
            self._method,
            BytesValue,
            route="/test/Echo",
            observer=RequestObserver(self.metrics),
            greenlets=LoopGreenlets(threads),
            budget=self.budget,
            receiver=MessageReceiver(self.max_bytes),
        )
        handlers = {"Echo": handler}
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()

    async def stop(self) -> None:
        await self.server.stop(0)
        gc.collect()  # logs unretrieved exceptions of its tasks now

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Connection]:
        """Open a new connection."""
        lengths = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        options = [*lengths, ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", options=options) as channel:
            await channel.channel_ready()
            yield Connection(channel)

    @property
    def used(self) -> int:
        """Reserved memory of the large pool."""
        return self.budget.large.used

    async def assert_at_rest(self) -> None:
        await until(lambda: self.budget.used_bytes == 0)
        assert (self.budget.large._bodies_used, self.budget.large._holders) == (0, 0)


class Connection:
    """One client's connection."""

    def __init__(self, channel: Any) -> None:
        serializers = {
            "request_serializer": BytesValue.SerializeToString,
            "response_deserializer": BytesValue.FromString,
        }
        self._unary = channel.unary_unary("/test/Echo", **serializers)
        self._stream = channel.stream_unary("/test/Echo", **serializers)

    async def echo(self, size: int = 1, *, timeout_s: float | None = 10) -> int:
        """Send a message; returns the length of the response, or raises a grpc.RpcError."""
        response = await self._unary(BytesValue(value=bytes(size)), timeout=timeout_s)
        return len(response.value)

    def begin(self, size: int = 1) -> Any:
        """Begin a call that can be cancelled."""
        return self._unary(BytesValue(value=bytes(size)), timeout=30)

    async def stall(self, *, timeout_s: float | None = None) -> Any:
        """Begin a call without sending a message."""
        call = self._stream(timeout=timeout_s)
        await call.wait_for_connection()
        return call


async def send_late(call: Any, size: int = 1) -> None:
    await call.write(BytesValue(value=bytes(size)))
    await call.done_writing()


async def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.005)


def run(check: Callable[[Service], Awaitable[None]], **options: Any) -> None:
    async def start() -> None:
        with ThreadPoolExecutor(2) as threads:
            service = Service(**options)
            await service.start(threads)
            try:
                await check(service)
            finally:
                await service.stop()

    uvloop.run(start())


def test_messages_are_received_and_their_memory_is_released() -> None:
    async def check(service: Service) -> None:
        async with service.connect() as client:
            sizes = [0, 1, 1_000, 300_000, 5_000_000]
            assert [await client.echo(size) for size in sizes] == sizes
            assert await asyncio.gather(*(client.echo(size % 7) for size in range(200))) == [n % 7 for n in range(200)]
        await service.assert_at_rest()

    run(check)


def test_memory_for_a_message_is_held_until_the_response() -> None:
    held: list[int] = []

    def method(message: Any) -> Any:
        memory = current_request.get().memory
        assert memory
        held.append(memory.held_bytes)
        return message

    async def check(service: Service) -> None:
        async with service.connect() as client:
            await client.echo(1_000_000)
        assert held[0] >= 1_000_000 * (1 + OBJECT_BYTES)
        await service.assert_at_rest()

    run(check, method=method)


def test_a_message_over_the_limit_is_refused() -> None:
    async def check(service: Service) -> None:
        async with service.connect() as client:
            for size in (1_000_001, 20_000_000):
                with pytest.raises(grpc.RpcError) as error:
                    await client.echo(size)
                assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "larger than max" in error.value.details()
            assert await client.echo(900_000) == 900_000  # on the same connection
        await service.assert_at_rest()

    run(check, max_bytes=1_000_000)


def test_a_message_over_the_memory_budget_is_refused() -> None:
    async def check(service: Service) -> None:
        async with service.connect() as client:
            with pytest.raises(grpc.RpcError) as error:
                await client.echo(17_000_000)  # its objects could be eight times as large
            assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "bytes of memory" in error.value.details()
        await service.assert_at_rest()

    run(check, max_bytes=17_500_000)


def test_a_call_without_a_message_is_refused() -> None:
    async def check(service: Service) -> None:
        async with service.connect() as client:
            call = await client.stall()
            await call.done_writing()
            assert await call.code() == grpc.StatusCode.INTERNAL
            assert await call.details() == "the call has no message"
        await service.assert_at_rest()

    run(check)


def test_an_error_of_the_method_becomes_the_status_of_the_call() -> None:
    def method(*_: Any) -> Any:
        raise InvalidRequest("not like this")

    async def check(service: Service) -> None:
        async with service.connect() as client:
            with pytest.raises(grpc.RpcError) as error:
                await client.echo()
            assert (error.value.code(), error.value.details()) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "not like this",
            )
        await service.assert_at_rest()

    run(check, method=method)


LATE_BYTES = COPIES * MAX_BYTES  # reserved for a late message


def hold_bodies(service: Service, *, left: int = 0) -> Reservation:
    """Reserve the memory for large bodies, except `left` bytes."""
    held = Reservation(service.budget.large)
    assert held.try_grow(service.budget.large.body_limit - left, is_body=True)
    return held


def test_a_late_message_reserves_memory_for_the_largest_until_it_arrives() -> None:
    used: list[int] = []

    async def check(service: Service) -> None:
        async with service.connect() as client:
            call = await client.stall()
            await until(lambda: service.used == LATE_BYTES)
            assert await client.echo(5) == 5
            await send_late(call, 100_000)
            assert len((await call).value) == 100_000
        assert used[-1] < 2_000_000 < LATE_BYTES
        await service.assert_at_rest()

    def method(message: Any) -> Any:
        memory = current_request.get().memory
        assert memory
        used.append(memory.held_bytes)
        return message

    run(check, method=method)


def test_calls_without_a_message_do_not_block_others() -> None:
    async def check(service: Service) -> None:
        async with service.connect() as stalled, service.connect() as client:
            calls = [await stalled.stall() for _ in range(50)]
            await until(lambda: any(call.done() for call in calls))
            assert service.used <= service.budget.large.body_limit
            started_s = time.monotonic()
            assert await client.echo(1_000, timeout_s=5) == 1_000
            assert time.monotonic() - started_s < 2
            for call in calls:
                call.cancel()
        await service.assert_at_rest()

    run(check)


def test_a_late_message_without_memory_is_refused_early() -> None:
    async def check(service: Service) -> None:
        held = hold_bodies(service, left=LATE_BYTES - 1)
        async with service.connect() as client:
            call = await client.stall()
            assert await call.code() == grpc.StatusCode.UNAVAILABLE
            assert "no memory is free for a large message" in await call.details()
        assert b'serving_shed_requests_total{reason="memory"} 1.0\n' in service.metrics.render()
        held.release()
        await service.assert_at_rest()

    run(check)


def test_a_slightly_late_small_message_needs_no_memory_for_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "MAX_POLLS", 500)

    async def check(service: Service) -> None:
        held = hold_bodies(service)
        async with service.connect() as client:
            call = await client.stall()
            await asyncio.sleep(LATE_S)
            await send_late(call, 10)
            assert len((await call).value) == 10
        held.release()
        await service.assert_at_rest()

    run(check)


@pytest.mark.parametrize("timeout_s", [None, 3_600])
def test_a_message_that_does_not_arrive_times_out(monkeypatch: pytest.MonkeyPatch, timeout_s: float | None) -> None:
    monkeypatch.setattr(receiving, "TIMEOUT_S", 0.5)

    async def check(service: Service) -> None:
        async with service.connect() as client:
            call = await client.stall(timeout_s=timeout_s)
            assert await call.code() == grpc.StatusCode.UNAVAILABLE
            assert "did not arrive in time" in await call.details()
        await service.assert_at_rest()

    run(check)


def test_a_message_that_does_not_arrive_times_out_earlier_under_contention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "CONTENDED_TIMEOUT_S", 0.5)

    async def check(service: Service) -> None:
        held = hold_bodies(service, left=LATE_BYTES)
        async with service.connect() as stalled, service.connect() as client:
            call = await stalled.stall()
            await until(lambda: service.used == held.held + LATE_BYTES)
            with contextlib.suppress(grpc.RpcError):  # the first call of a connection does not wait
                await client.echo(4_000_000, timeout_s=5)
            assert await client.echo(4_000_000, timeout_s=5) == 4_000_000
            assert await call.code() == grpc.StatusCode.UNAVAILABLE
        held.release()
        await service.assert_at_rest()

    run(check)


def test_a_message_that_does_not_arrive_frees_memory_for_late_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "CONTENDED_TIMEOUT_S", 0.5)

    async def check(service: Service) -> None:
        held = hold_bodies(service, left=LATE_BYTES)
        async with service.connect() as stalled, service.connect() as client:
            await stalled.stall()
            await until(lambda: service.used == held.held + LATE_BYTES)
            for _ in range(5):  # two seconds in total
                call = await client.stall()
                await asyncio.sleep(0.4)
                with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                    await send_late(call, 10)
                if await call.code() == grpc.StatusCode.OK:
                    break
            else:
                pytest.fail("no other client was served during a stalled call")
        held.release()

    run(check)


def test_a_cancelled_call_releases_its_memory() -> None:
    async def check(service: Service) -> None:
        async with service.connect() as client:
            for wait_s in (0, LATE_S):
                call = await client.stall()
                await asyncio.sleep(wait_s)
                call.cancel()
                await service.assert_at_rest()

    run(check)


def test_small_messages_are_not_queued_behind_large_ones() -> None:
    async def check(service: Service) -> None:
        held = hold_bodies(service)
        async with service.connect() as large, service.connect() as client:
            waiting = [asyncio.create_task(large.echo(4_000_000)) for _ in range(3)]
            await until(lambda: service.budget.large.has_waiters or all(task.done() for task in waiting))
            assert await client.echo(1, timeout_s=2) == 1
            held.release()
            await asyncio.gather(*waiting, return_exceptions=True)
        await service.assert_at_rest()

    run(check)


def test_after_a_refused_large_message_the_next_call_waits_for_memory() -> None:
    async def check(service: Service) -> None:
        held = hold_bodies(service)
        async with service.connect() as client:
            with pytest.raises(grpc.RpcError) as error:
                await client.echo(4_000_000)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
            waiting = asyncio.create_task(client.echo(4_000_000))
            await until(lambda: service.budget.large.has_waiters)
            with pytest.raises(grpc.RpcError) as error:
                await client.echo(4_000_000, timeout_s=0.5)
            assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            assert not waiting.done()
            held.release()
            assert await waiting == 4_000_000
        await service.assert_at_rest()

    run(check)


def test_after_a_small_message_the_next_call_needs_no_memory_for_the_largest() -> None:
    async def check(service: Service) -> None:
        async with service.connect() as client:
            for size in (4_000_000, 1):
                await client.echo(size)
            held = hold_bodies(service)
            assert await client.echo(1, timeout_s=5) == 1
            held.release()
        await service.assert_at_rest()

    run(check)


def test_few_large_messages_are_received_without_memory() -> None:
    async def check(service: Service) -> None:
        held = hold_bodies(service)
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(service.connect()) for _ in range(40)]
            await asyncio.gather(*(client.echo(1) for client in clients))
            calls = [client.begin(MAX_BYTES - 100) for client in clients]
            assert {await call.code() for call in calls} == {grpc.StatusCode.UNAVAILABLE}
        held.release()
        await service.assert_at_rest()

    run(check)


def test_stalled_new_connections_delay_others_only_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(service: Service) -> None:
        held = hold_bodies(service)
        async with contextlib.AsyncExitStack() as stack:
            stalled = [await stack.enter_async_context(service.connect()) for _ in range(12)]
            calls = [await client.stall() for client in stalled]
            client = await stack.enter_async_context(service.connect())
            assert await client.echo(1, timeout_s=5) == 1
            assert sum(call.done() for call in calls) >= len(calls) - receiving.MAX_NEW_READS
        held.release()
        await service.assert_at_rest()

    monkeypatch.setattr(receiving, "MAX_POLLS", 10_000)
    run(check)


@pytest.mark.parametrize("has_memory", [True, False])
def test_a_failed_call_frees_its_message_without_garbage_collection(has_memory: bool) -> None:
    def method(*_: Any) -> Any:
        raise InvalidRequest("not like this")

    async def check(service: Service) -> None:
        held = None if has_memory else hold_bodies(service)
        async with service.connect() as client:
            with contextlib.suppress(grpc.RpcError):
                await client.echo(1)
            gc.collect()
            gc.disable()
            tracemalloc.start()
            try:
                for _ in range(5):
                    with pytest.raises(grpc.RpcError):
                        await client.echo(MAX_BYTES - 100, timeout_s=0.5)
                await until(lambda: tracemalloc.get_traced_memory()[0] < MAX_BYTES / 2)
            finally:
                tracemalloc.stop()
                gc.enable()
        if held:
            held.release()
        await service.assert_at_rest()

    run(check, method=method)


def test_a_call_cancelled_during_processing_releases_its_memory() -> None:
    waiters: list[Waiter] = []
    ended: list[bool] = []

    def method(message: Any) -> Any:
        waiters.append(Waiter())
        waiters[0].wait(10)
        current_request.get().reserve(1_000_000)  # like decoding an image
        ended.append(True)
        return message

    async def check(service: Service) -> None:
        async with service.connect() as client:
            call = client.begin()
            await until(lambda: bool(waiters))
            call.cancel()
            await asyncio.sleep(0.1)
            wake_all(waiters)
            await until(lambda: bool(ended))
            await asyncio.sleep(0.05)
            assert service.budget.used_bytes == 0

    run(check, method=method)


def test_a_refused_message_logs_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(receiving, "TIMEOUT_S", 0.2)

    async def check(service: Service) -> None:
        async with service.connect() as client:
            call = await client.stall()
            assert await call.code() == grpc.StatusCode.UNAVAILABLE
        await service.assert_at_rest()

    with caplog.at_level(logging.ERROR):
        run(check)
    assert caplog.records == []

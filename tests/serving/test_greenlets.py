from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import greenlet
import pytest
import uvloop

from serving.greenlets import MAX_IDLE, SLICE_S, LoopGreenlets, Waiter, call_from_loop, offload, run_sized, wake_all
from serving.request_context import RequestContext, current_request


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_waiting_function_does_not_block_the_event_loop(in_thread: bool) -> None:
    waiters: list[Waiter] = []
    threads: list[int] = []

    def wait() -> str:
        threads.append(threading.get_ident())
        waiters.append(Waiter())
        return "woken" if waiters[0].wait(60) else "timed out"

    async def run(pool: ThreadPoolExecutor) -> str:
        waiting = asyncio.create_task(call_from_loop(wait, greenlets=LoopGreenlets(pool), in_thread=in_thread))
        while not waiters:
            await asyncio.sleep(0.001)
        wake_all(waiters)
        return await waiting

    with ThreadPoolExecutor(1) as pool:
        assert asyncio.run(run(pool)) == "woken"
    assert (threads == [threading.get_ident()]) is not in_thread


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_cancelled_call_reports_a_client_disconnect(in_thread: bool) -> None:
    waiters: list[Waiter] = []
    reported: list[bool] = []

    def wait() -> None:
        is_disconnected = current_request.get().client_disconnected
        reported.append(is_disconnected())
        waiters.append(Waiter())
        waiters[0].wait(60)
        reported.append(is_disconnected())

    async def run(pool: ThreadPoolExecutor) -> None:
        waiting = asyncio.create_task(call_from_loop(wait, greenlets=LoopGreenlets(pool), in_thread=in_thread))
        while not waiters:
            await asyncio.sleep(0.001)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        wake_all(waiters)
        while len(reported) < 2:
            await asyncio.sleep(0.001)

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(run(pool))
    assert reported == [False, True]


def test_a_greenlet_is_reused_and_keeps_no_references() -> None:
    class Request:
        def is_disconnected(self) -> bool:
            return True

    seen: list[tuple[greenlet.greenlet, bool]] = []

    def respond(request: Request) -> None:
        seen.append((greenlet.getcurrent(), current_request.get().client_disconnected()))
        current_request.set(RequestContext(client_disconnected=request.is_disconnected))

    async def run(pool: ThreadPoolExecutor) -> None:
        greenlets = LoopGreenlets(pool)
        for _ in range(2):
            request = Request()
            greenlets.call(respond, request)
            reference = weakref.ref(request)
            del request
            assert reference() is None

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(run(pool))
    assert seen[0][0] is seen[1][0]
    assert not seen[1][1]


def test_at_most_max_idle_greenlets_are_kept() -> None:
    waiters: list[Waiter] = []
    results: list[int] = []

    def wait(number: int) -> None:
        waiters.append(Waiter())
        waiters[-1].wait()
        results.append(number)

    async def run(pool: ThreadPoolExecutor) -> int:
        greenlets = LoopGreenlets(pool)
        for number in range(MAX_IDLE + 10):
            greenlets.call(wait, number)
        assert not results
        wake_all(waiters)
        return len(greenlets.idle)

    with ThreadPoolExecutor(1) as pool:
        assert asyncio.run(run(pool)) == MAX_IDLE
    assert results == list(range(MAX_IDLE + 10))


def run(check: Callable[[LoopGreenlets], Awaitable[None]]) -> None:
    """Run a check in a uvloop event loop with a greenlet pool."""

    async def start() -> None:
        with ThreadPoolExecutor(2) as threads:
            await check(LoopGreenlets(threads))

    uvloop.run(start())


async def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.001)


def test_functions_are_called_in_order_and_urgent_ones_first() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        called: list[str] = []
        for name in ("first", "second", "third"):
            greenlets.enqueue(called.append, name)
        greenlets.enqueue(called.append, "urgent", is_urgent=True)
        assert called == []  # not called by `enqueue` itself
        await until(lambda: len(called) == 4)
        assert called == ["urgent", "first", "second", "third"]

    run(check)


def test_a_function_may_enqueue_another() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        called: list[int] = []

        def call(number: int) -> None:
            called.append(number)
            if number < 3:
                greenlets.enqueue(call, number + 1)

        greenlets.enqueue(call, 0)
        await until(lambda: len(called) == 4)
        greenlets.enqueue(call, 3)
        await until(lambda: len(called) == 5)
        assert called == [0, 1, 2, 3, 3]

    run(check)


def test_the_event_loop_runs_between_slices() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        called: list[float] = []
        ticks: list[int] = []

        def work() -> None:
            time.sleep(SLICE_S / 2)
            called.append(time.perf_counter())

        def tick() -> None:
            ticks.append(len(called))
            if len(called) < 40:
                greenlets.loop.call_soon(tick)

        for _ in range(40):
            greenlets.enqueue(work)
        greenlets.loop.call_soon(tick)
        reader, writer = await asyncio.open_connection(sock=await connect_to_echo())
        writer.write(b"x")
        await reader.readexactly(1)
        assert len(called) < 40  # I/O happened while work was queued
        writer.close()
        await until(lambda: len(called) == 40)
        steps = [after - before for before, after in itertools.pairwise(ticks)]
        assert max(steps) <= 4  # calls of half a slice

    run(check)


async def connect_to_echo() -> socket.socket:
    """Return a connection to a thread that echoes."""
    mine, other = socket.socketpair()

    def echo() -> None:
        with other:
            while data := other.recv(100):
                other.sendall(data)

    threading.Thread(target=echo, daemon=True).start()
    mine.setblocking(False)
    return mine


def test_an_urgent_function_waits_for_one_call_only() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        called: list[str] = []

        def work() -> None:
            time.sleep(SLICE_S)
            called.append("work")

        for _ in range(20):
            greenlets.enqueue(work)
        await until(lambda: len(called) > 2)
        before = len(called)
        greenlets.enqueue(called.append, "urgent", is_urgent=True)
        await until(lambda: len(called) == 21)
        assert called.index("urgent") == before

    run(check)


def test_queueing_time_is_estimated_from_earlier_calls() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        assert greenlets.queue_s == 0
        called: list[int] = []

        def work() -> None:
            time.sleep(0.01)
            called.append(1)

        for _ in range(30):
            greenlets.enqueue(work)
        await until(lambda: len(called) == 30)
        assert greenlets.queue_s == 0  # nothing is queued
        for _ in range(50):
            greenlets.enqueue(work)
        # Half a second of work; the estimate is a moving average that starts at 0.
        assert 0.25 < greenlets.queue_s < 2
        await until(lambda: len(called) == 80)

    run(check)


def test_waiting_calls_do_not_raise_the_queueing_time() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        waiters: list[Waiter] = []
        results: list[bool] = []

        def wait() -> None:
            waiters.append(Waiter())
            results.append(waiters[-1].wait(60))

        for _ in range(10):
            greenlets.enqueue(wait)
        await asyncio.sleep(0.1)
        assert len(waiters) == 10
        assert greenlets._call_s < 0.01
        wake_all(waiters)
        await until(lambda: results == [True] * 10)

    run(check)


def test_an_exception_in_a_call_does_not_stop_others() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        greenlets.loop.set_exception_handler(lambda *_: None)
        called: list[int] = []

        def fail() -> None:
            raise RuntimeError("failed")

        greenlets.enqueue(fail)
        greenlets.enqueue(called.append, 1)
        await asyncio.sleep(0.1)
        greenlets.enqueue(called.append, 2)
        await asyncio.sleep(0.1)
        assert called == [1, 2]

    run(check)


def test_an_exception_in_a_woken_call_does_not_stop_others() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        greenlets.loop.set_exception_handler(lambda *_: None)
        waiters: list[Waiter] = []
        woken: list[int] = []

        def wait(number: int) -> None:
            waiters.append(Waiter())
            waiters[-1].wait(60)
            if number == 0:
                raise RuntimeError("failed")
            woken.append(number)

        for number in range(3):
            greenlets.enqueue(wait, number)
        await until(lambda: len(waiters) == 3)
        await asyncio.get_running_loop().run_in_executor(greenlets.threads, wake_all, waiters)
        await asyncio.sleep(0.1)
        assert woken == [1, 2]

    run(check)


def test_wait_returns_at_once_after_wake_all() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        results: list[bool] = []

        def wait() -> None:
            waiter = Waiter()
            wake_all([waiter])
            results.append(waiter.wait(60))

        greenlets.enqueue(wait)
        await until(lambda: results == [True])

    run(check)


def test_wait_times_out_and_leaves_no_timer() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        results: list[bool] = []

        def wait() -> None:
            results.extend((Waiter().wait(0.01), Waiter().wait(0), Waiter().wait(-1)))

        greenlets.enqueue(wait)
        await until(lambda: len(results) == 3)
        assert results == [False] * 3
        greenlets.enqueue(results.append, True)
        await until(lambda: results[-1])

    run(check)


def test_waking_a_timed_out_waiter_does_not_wake_the_next_one() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        waiters: list[Waiter] = []
        results: list[bool] = []

        def wait() -> None:
            for timeout_s in (0.01, 60):
                waiters.append(Waiter())
                results.append(waiters[-1].wait(timeout_s))

        greenlets.enqueue(wait)
        await until(lambda: results == [False])
        wake_all(waiters[:1])
        await asyncio.sleep(0.05)
        assert results == [False]
        wake_all(waiters[1:])
        await until(lambda: results == [False, True])

    run(check)


def test_waking_a_timed_out_waiter_does_not_break_its_greenlet() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        errors: list[object] = []
        greenlets.loop.set_exception_handler(lambda _, problem: errors.append(problem))
        waiters: list[Waiter] = []
        results: list[bool] = []

        def wait() -> None:
            waiters.append(Waiter())
            results.append(waiters[-1].wait(0.01))

        greenlets.enqueue(wait)
        await until(lambda: results == [False])
        await asyncio.get_running_loop().run_in_executor(greenlets.threads, wake_all, waiters)
        await asyncio.sleep(0.05)
        greenlets.enqueue(results.append, True)
        await asyncio.sleep(0.05)
        assert results == [False, True]
        assert not errors

    run(check)


def test_offload_runs_in_a_worker_thread_and_raises_its_exception() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        seen: list[object] = []

        def work(fails: bool) -> int:
            if fails:
                raise KeyError("lost")
            return threading.get_ident()

        def call() -> None:
            seen.append(offload(work, False))
            seen.append(run_sized(10**9, work, False))
            seen.append(run_sized(10, work, False))
            try:
                offload(work, True)
            except KeyError as error:
                seen.append(str(error))

        greenlets.enqueue(call)
        await until(lambda: len(seen) == 4)
        here = threading.get_ident()
        assert (seen[0] == here, seen[1] == here, seen[2] == here) == (False, False, True)
        assert seen[3] == "'lost'"

    run(check)
    assert offload(threading.get_ident) == threading.get_ident()

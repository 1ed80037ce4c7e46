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
def test_a_function_waits_while_the_loop_goes_on(in_thread: bool) -> None:
    pauses: list[Waiter] = []
    threads: list[int] = []

    def wait() -> str:
        threads.append(threading.get_ident())
        pauses.append(Waiter())
        return "went on" if pauses[0].wait(60) else "timed out"

    async def run(pool: ThreadPoolExecutor) -> str:
        waiting = asyncio.create_task(call_from_loop(wait, greenlets=LoopGreenlets(pool), in_thread=in_thread))
        while not pauses:
            await asyncio.sleep(0.001)
        wake_all(pauses)
        return await waiting

    with ThreadPoolExecutor(1) as pool:
        assert asyncio.run(run(pool)) == "went on"
    assert (threads == [threading.get_ident()]) is not in_thread


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_function_that_nobody_waits_for_is_told_so(in_thread: bool) -> None:
    pauses: list[Waiter] = []
    told: list[bool] = []

    def wait() -> None:
        is_gone = current_request.get().client_disconnected
        told.append(is_gone())
        pauses.append(Waiter())
        pauses[0].wait(60)
        told.append(is_gone())

    async def run(pool: ThreadPoolExecutor) -> None:
        waiting = asyncio.create_task(call_from_loop(wait, greenlets=LoopGreenlets(pool), in_thread=in_thread))
        while not pauses:
            await asyncio.sleep(0.001)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        wake_all(pauses)
        while len(told) < 2:
            await asyncio.sleep(0.001)

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(run(pool))
    assert told == [False, True]


def test_a_greenlet_that_is_through_serves_again_and_keeps_nothing() -> None:
    class Request:
        def is_gone(self) -> bool:
            return True

    seen: list[tuple[greenlet.greenlet, bool]] = []

    def answer(request: Request) -> None:
        seen.append((greenlet.getcurrent(), current_request.get().client_disconnected()))
        current_request.set(RequestContext(client_disconnected=request.is_gone))

    async def run(pool: ThreadPoolExecutor) -> None:
        greenlets = LoopGreenlets(pool)
        for _ in range(2):
            request = Request()
            greenlets.call(answer, request)
            gone = weakref.ref(request)
            del request
            assert gone() is None

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(run(pool))
    assert seen[0][0] is seen[1][0]
    assert not seen[1][1]


def test_as_many_greenlets_as_wait_at_once_but_few_are_kept() -> None:
    pauses: list[Waiter] = []
    over: list[int] = []

    def wait(number: int) -> None:
        pauses.append(Waiter())
        pauses[-1].wait()
        over.append(number)

    async def run(pool: ThreadPoolExecutor) -> int:
        greenlets = LoopGreenlets(pool)
        for number in range(MAX_IDLE + 10):
            greenlets.call(wait, number)
        assert not over
        wake_all(pauses)
        return len(greenlets.idle)

    with ThreadPoolExecutor(1) as pool:
        assert asyncio.run(run(pool)) == MAX_IDLE
    assert over == list(range(MAX_IDLE + 10))


def run(check: Callable[[LoopGreenlets], Awaitable[None]]) -> None:
    """Run a check in the loop that the service has, with greenlets in it."""

    async def start() -> None:
        with ThreadPoolExecutor(2) as threads:
            await check(LoopGreenlets(threads))

    uvloop.run(start())


async def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.001)


def test_what_is_enqueued_is_called_in_its_order_and_what_is_urgent_first() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        called: list[str] = []
        for name in ("first", "second", "third"):
            greenlets.enqueue(called.append, name)
        greenlets.enqueue(called.append, "urgent", is_urgent=True)
        assert called == []  # whoever enqueues is through first
        await until(lambda: len(called) == 4)
        assert called == ["urgent", "first", "second", "third"]

    run(check)


def test_what_is_enqueued_meanwhile_has_its_turn() -> None:
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


def test_the_loop_goes_on_between_slices() -> None:
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
        assert len(called) < 40  # data came and went while work was left
        writer.close()
        await until(lambda: len(called) == 40)
        steps = [after - before for before, after in itertools.pairwise(ticks)]
        assert max(steps) <= 4  # calls of half a slice

    run(check)


async def connect_to_echo() -> socket.socket:
    """Return a connection to a thread that sends back what comes."""
    mine, other = socket.socketpair()

    def echo() -> None:
        with other:
            while data := other.recv(100):
                other.sendall(data)

    threading.Thread(target=echo, daemon=True).start()
    mine.setblocking(False)
    return mine


def test_what_is_urgent_waits_for_one_call_only() -> None:
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


def test_the_queue_is_estimated_from_what_calls_have_taken() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        assert greenlets.queue_s == 0
        called: list[int] = []

        def work() -> None:
            time.sleep(0.01)
            called.append(1)

        for _ in range(30):
            greenlets.enqueue(work)
        await until(lambda: len(called) == 30)
        assert greenlets.queue_s == 0  # nothing waits
        for _ in range(50):
            greenlets.enqueue(work)
        # Half a second; the estimate begins at nothing, and follows slowly.
        assert 0.25 < greenlets.queue_s < 2
        await until(lambda: len(called) == 80)

    run(check)


def test_calls_that_wait_do_not_count_for_the_queue() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        pauses: list[Waiter] = []
        over: list[bool] = []

        def wait() -> None:
            pauses.append(Waiter())
            over.append(pauses[-1].wait(60))

        for _ in range(10):
            greenlets.enqueue(wait)
        await asyncio.sleep(0.1)
        assert len(pauses) == 10
        assert greenlets._call_s < 0.01
        wake_all(pauses)
        await until(lambda: over == [True] * 10)

    run(check)


def test_a_call_that_raises_does_not_stop_the_others() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        greenlets.loop.set_exception_handler(lambda *_: None)
        called: list[int] = []

        def fail() -> None:
            raise RuntimeError("not foreseen")

        greenlets.enqueue(fail)
        greenlets.enqueue(called.append, 1)
        await asyncio.sleep(0.1)
        greenlets.enqueue(called.append, 2)
        await asyncio.sleep(0.1)
        assert called == [1, 2]

    run(check)


def test_a_call_that_raises_when_it_is_woken_does_not_keep_the_others_asleep() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        greenlets.loop.set_exception_handler(lambda *_: None)
        pauses: list[Waiter] = []
        woken: list[int] = []

        def wait(number: int) -> None:
            pauses.append(Waiter())
            pauses[-1].wait(60)
            if number == 0:
                raise RuntimeError("not foreseen")
            woken.append(number)

        for number in range(3):
            greenlets.enqueue(wait, number)
        await until(lambda: len(pauses) == 3)
        await asyncio.get_running_loop().run_in_executor(greenlets.threads, wake_all, pauses)
        await asyncio.sleep(0.1)
        assert woken == [1, 2]

    run(check)


def test_a_pause_that_ends_before_it_is_waited_for() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        over: list[bool] = []

        def wait() -> None:
            pause = Waiter()
            wake_all([pause])
            over.append(pause.wait(60))

        greenlets.enqueue(wait)
        await until(lambda: over == [True])

    run(check)


def test_a_pause_that_is_not_ended_times_out_and_leaves_nothing_behind() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        over: list[bool] = []

        def wait() -> None:
            over.extend((Waiter().wait(0.01), Waiter().wait(0), Waiter().wait(-1)))

        greenlets.enqueue(wait)
        await until(lambda: len(over) == 3)
        assert over == [False] * 3
        greenlets.enqueue(over.append, True)
        await until(lambda: over[-1])

    run(check)


def test_the_end_of_a_pause_that_timed_out_does_not_end_the_next_one() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        pauses: list[Waiter] = []
        over: list[bool] = []

        def wait() -> None:
            for timeout_s in (0.01, 60):
                pauses.append(Waiter())
                over.append(pauses[-1].wait(timeout_s))

        greenlets.enqueue(wait)
        await until(lambda: over == [False])
        wake_all(pauses[:1])
        await asyncio.sleep(0.05)
        assert over == [False]
        wake_all(pauses[1:])
        await until(lambda: over == [False, True])

    run(check)


def test_the_end_of_a_pause_that_timed_out_does_not_break_its_greenlet() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        errors: list[object] = []
        greenlets.loop.set_exception_handler(lambda _, problem: errors.append(problem))
        pauses: list[Waiter] = []
        over: list[bool] = []

        def wait() -> None:
            pauses.append(Waiter())
            over.append(pauses[-1].wait(0.01))

        greenlets.enqueue(wait)
        await until(lambda: over == [False])
        await asyncio.get_running_loop().run_in_executor(greenlets.threads, wake_all, pauses)
        await asyncio.sleep(0.05)
        greenlets.enqueue(over.append, True)
        await asyncio.sleep(0.05)
        assert over == [False, True]
        assert not errors

    run(check)


def test_what_takes_long_is_done_by_a_thread_and_its_error_comes_back() -> None:
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

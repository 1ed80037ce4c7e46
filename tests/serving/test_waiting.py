from __future__ import annotations

import asyncio
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import greenlet
import pytest

from serving.request_context import RequestContext, current_request
from serving.waiting import MAX_IDLE, LoopGreenlets, Pause, call_from_loop, end_pauses


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_function_waits_while_the_loop_goes_on(in_thread: bool) -> None:
    pauses: list[Pause] = []
    threads: list[int] = []

    def wait() -> str:
        threads.append(threading.get_ident())
        pauses.append(Pause())
        return "went on" if pauses[0].wait(60) else "timed out"

    async def run(pool: ThreadPoolExecutor) -> str:
        waiting = asyncio.create_task(call_from_loop(wait, greenlets=LoopGreenlets(pool), in_thread=in_thread))
        while not pauses:
            await asyncio.sleep(0.001)
        end_pauses(pauses)
        return await waiting

    with ThreadPoolExecutor(1) as pool:
        assert asyncio.run(run(pool)) == "went on"
    assert (threads == [threading.get_ident()]) is not in_thread


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_function_that_nobody_waits_for_is_told_so(in_thread: bool) -> None:
    pauses: list[Pause] = []
    told: list[bool] = []

    def wait() -> None:
        is_gone = current_request.get().client_disconnected
        told.append(is_gone())
        pauses.append(Pause())
        pauses[0].wait(60)
        told.append(is_gone())

    async def run(pool: ThreadPoolExecutor) -> None:
        waiting = asyncio.create_task(call_from_loop(wait, greenlets=LoopGreenlets(pool), in_thread=in_thread))
        while not pauses:
            await asyncio.sleep(0.001)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        end_pauses(pauses)
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
    pauses: list[Pause] = []
    over: list[int] = []

    def wait(number: int) -> None:
        pauses.append(Pause())
        pauses[-1].wait()
        over.append(number)

    async def run(pool: ThreadPoolExecutor) -> int:
        greenlets = LoopGreenlets(pool)
        for number in range(MAX_IDLE + 10):
            greenlets.call(wait, number)
        assert not over
        end_pauses(pauses)
        return len(greenlets.idle)

    with ThreadPoolExecutor(1) as pool:
        assert asyncio.run(run(pool)) == MAX_IDLE
    assert over == list(range(MAX_IDLE + 10))

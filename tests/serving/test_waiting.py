from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.waiting import Pause, call_from_loop, caller_is_gone, end_pauses


@pytest.mark.parametrize("is_small", [True, False])
def test_a_function_waits_while_the_loop_goes_on(is_small: bool) -> None:
    pauses: list[Pause] = []
    threads: list[int] = []

    def wait() -> str:
        threads.append(threading.get_ident())
        pauses.append(Pause())
        return "went on" if pauses[0].wait(60) else "timed out"

    async def run(pool: ThreadPoolExecutor) -> str:
        waiting = asyncio.create_task(call_from_loop(wait, threads=pool, is_small=is_small))
        while not pauses:
            await asyncio.sleep(0.001)
        end_pauses(pauses)
        return await waiting

    with ThreadPoolExecutor(1) as pool:
        assert asyncio.run(run(pool)) == "went on"
    assert (threads == [threading.get_ident()]) is is_small


@pytest.mark.parametrize("is_small", [True, False])
def test_a_function_that_nobody_waits_for_is_told_so(is_small: bool) -> None:
    pauses: list[Pause] = []
    told: list[bool] = []

    def wait() -> None:
        is_gone = caller_is_gone.get()
        told.append(is_gone())
        pauses.append(Pause())
        pauses[0].wait(60)
        told.append(is_gone())

    async def run(pool: ThreadPoolExecutor) -> None:
        waiting = asyncio.create_task(call_from_loop(wait, threads=pool, is_small=is_small))
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

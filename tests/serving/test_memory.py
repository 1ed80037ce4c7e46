"""The memory budget: pools, reservations and the memory of a request."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import uvloop

from serving import memory
from serving.errors import Overloaded, TooLarge
from serving.greenlets import LoopGreenlets
from serving.memory import (
    SMALL_STEP_BYTES,
    UNCOUNTED_BYTES,
    MemoryBudget,
    Pool,
    RequestMemory,
    Reservation,
)

MB = 1024 * 1024
PATIENCE_S = 20.0  # deadline of reservations that are expected to be granted


def in_s(seconds: float) -> float:
    return time.monotonic() + seconds


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = in_s(PATIENCE_S)
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def hold(pool: Pool, size: int, *, is_body: bool = False) -> Reservation:
    reservation = Reservation(pool)
    assert reservation.try_grow(size, is_body=is_body)
    return reservation


class Waiters:
    """Threads that wait for a pool, oldest first."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.granted: list[str] = []  # in the order of the grants
        self._threads = ThreadPoolExecutor(32)

    def add(
        self, name: str, reservation: Reservation, more: int, *, is_body: bool = False, within_s: float = PATIENCE_S
    ) -> Future[None]:
        before = len(self.pool._queue)

        def grow() -> None:
            reservation.grow(more, is_body=is_body, deadline_s=in_s(within_s))
            self.granted.append(name)

        future = self._threads.submit(grow)
        wait_until(lambda: len(self.pool._queue) > before or future.done())
        return future

    def close(self) -> None:
        self._threads.shutdown()


@contextmanager
def waiters_of(pool: Pool) -> Iterator[Waiters]:
    waiters = Waiters(pool)
    try:
        yield waiters
    finally:
        waiters.close()


def test_a_reservation_that_fits_is_granted_immediately() -> None:
    pool = Pool("memory", 100)
    with pool.reserve(60, deadline_s=in_s(0)) as first, pool.reserve(40, deadline_s=in_s(0)):
        assert (first.held, pool.used) == (60, 100)
    assert (first.held, pool.used) == (0, 0)


def test_a_reservation_over_the_limit_is_refused_immediately() -> None:
    pool = Pool("memory", 100)
    with hold(pool, 70) as held:
        with pytest.raises(TooLarge, match="about 101 bytes of memory, the limit is 100"):
            pool.reserve(101, deadline_s=in_s(PATIENCE_S))
        with pytest.raises(TooLarge, match="about 101 bytes"):  # including held bytes
            held.grow(31, is_body=False, deadline_s=in_s(PATIENCE_S))
        assert held.held == pool.used == 70
    assert not pool.has_waiters


def test_the_queue_is_first_in_first_out() -> None:
    pool = Pool("memory", 100)
    holders = [hold(pool, 50) for _ in range(2)]
    with waiters_of(pool) as waiters:
        reservations = [Reservation(pool) for _ in range(4)]
        futures = [
            waiters.add(str(i), r, more) for i, (r, more) in enumerate(zip(reservations, (80, 10, 60, 10), strict=True))
        ]
        # The second would fit into the free half, but is queued behind the first.
        holders[0].release()
        time.sleep(0.02)
        assert waiters.granted == []
        holders[1].release()
        futures[0].result()
        futures[1].result()
        assert pool.used == 90
        assert sorted(waiters.granted) == ["0", "1"]
        reservations[0].release()
        for future in futures[2:]:
            future.result()
    for reservation in reservations:
        reservation.release()
    assert pool.used == 0


def test_a_new_reservation_does_not_overtake_the_queue() -> None:
    pool = Pool("memory", 100)
    held = hold(pool, 60)
    with waiters_of(pool) as waiters:
        large = Reservation(pool)
        future = waiters.add("large", large, 50)
        assert not Reservation(pool).try_grow(10, is_body=False)
        with pytest.raises(Overloaded):
            pool.reserve(10, deadline_s=in_s(0.02))
        held.release()
        future.result()
        large.release()
    assert pool.used == 0


def test_a_passed_deadline_unblocks_the_queue() -> None:
    pool = Pool("memory", 100)
    held = hold(pool, 60)
    with waiters_of(pool) as waiters:
        late = Reservation(pool)
        refused = waiters.add("late", late, 50, within_s=0.1)
        behind = Reservation(pool)
        granted = waiters.add("behind", behind, 40)
        with pytest.raises(Overloaded, match=r"no memory was free in time: .* of 100 are in use") as error:
            refused.result()
        assert (error.value.status, error.value.retry_after_s) == (503, 1)
        granted.result()  # nothing was released, but the queue moved up
        assert (late.held, behind.held, pool.used) == (0, 40, 100)
        assert not pool.has_waiters
    held.release()
    behind.release()
    assert pool.used == 0


def test_a_past_deadline_grants_free_memory_without_waiting() -> None:
    pool = Pool("memory", 100)
    with pool.reserve(100, deadline_s=in_s(-1)), pytest.raises(Overloaded):
        pool.reserve(1, deadline_s=in_s(-1))
    assert not pool.has_waiters


def bodies_pool() -> Pool:
    pool = Pool("memory")
    pool.resize(10 * MB, body_limit=5 * MB)
    return pool


def test_bodies_share_a_part_of_the_pool() -> None:
    pool = bodies_pool()
    with hold(pool, 4 * MB, is_body=True):
        body = Reservation(pool)
        assert not body.try_grow(2 * MB, is_body=True)
        assert body.try_grow(1 * MB, is_body=True)
        assert not Reservation(pool).try_grow(1, is_body=True)
        body.release()


def test_a_single_body_may_take_the_whole_pool() -> None:
    pool = bodies_pool()
    body = hold(pool, 4 * MB, is_body=True)
    assert body.try_grow(6 * MB, is_body=True)
    with pytest.raises(TooLarge):
        body.grow(1, is_body=True, deadline_s=in_s(PATIENCE_S))
    body.release()
    assert pool._bodies_used == pool.used == 0


def test_queued_bodies_do_not_block_processing() -> None:
    pool = bodies_pool()
    receiving = hold(pool, 5 * MB, is_body=True)
    with waiters_of(pool) as waiters:
        body = Reservation(pool)
        waiting = waiters.add("body", body, MB, is_body=True)
        with pool.reserve(5 * MB, deadline_s=in_s(0)):
            assert not waiting.done()
        receiving.release()
        waiting.result()
        body.release()


def test_queued_processing_does_not_block_bodies() -> None:
    pool = bodies_pool()
    working = hold(pool, 4 * MB)
    with waiters_of(pool) as waiters:
        work = Reservation(pool)
        waiting = waiters.add("work", work, 8 * MB)
        with hold(pool, 4 * MB, is_body=True):
            assert not waiting.done()
            working.release()
            time.sleep(0.01)
            assert not waiting.done()  # the body holds 4 MB
        waiting.result()
        work.release()


def test_the_queue_of_bodies_is_bounded() -> None:
    pool = Pool("memory", 4 * UNCOUNTED_BYTES)
    held = hold(pool, pool.limit)
    with waiters_of(pool) as waiters:
        futures = [waiters.add(str(i), Reservation(pool), 1, is_body=True, within_s=0.5) for i in range(5)]
        with pytest.raises(Overloaded, match="too many uploads wait"):
            Reservation(pool).grow(1, is_body=True, deadline_s=in_s(PATIENCE_S))
        assert len(pool._queue) == 5
        for future in futures:
            with pytest.raises(Overloaded):
                future.result()
    held.release()


def test_a_deadlock_refuses_the_youngest_and_grants_the_oldest() -> None:
    pool = Pool("memory", 100)
    holders = [hold(pool, 30) for _ in range(3)]
    with waiters_of(pool) as waiters:
        futures = [waiters.add(str(i), holder, 40) for i, holder in enumerate(holders)]
        with pytest.raises(Overloaded):
            futures[2].result()
        assert holders[2].held == 0  # its memory is granted to the oldest
        futures[0].result()
        assert holders[0].held == 70
        assert not futures[1].done()
        holders[0].release()
        futures[1].result()
        holders[1].release()
    holders[2].release()  # a second release has no effect
    assert pool.used == pool._holders == 0


def test_a_deadlock_grants_one_that_fits_out_of_order() -> None:
    pool = Pool("memory", 100)
    first, second = hold(pool, 50), hold(pool, 40)
    with waiters_of(pool) as waiters:
        waiting = waiters.add("first", first, 30)
        waiters.add("second", second, 10).result()
        assert second.held == 50
        assert not waiting.done()
        second.release()
        waiting.result()
        first.release()


def test_a_working_holder_is_not_a_deadlock() -> None:
    pool = Pool("memory", 100)
    working, first, second = (hold(pool, 30) for _ in range(3))
    with waiters_of(pool) as waiters:
        futures = [waiters.add("first", first, 40), waiters.add("second", second, 40)]
        time.sleep(0.02)
        assert not any(future.done() for future in futures)
        working.release()
        futures[0].result()
        first.release()
        futures[1].result()
        second.release()
    assert pool.used == 0


def test_a_deadlock_of_bodies_is_resolved() -> None:
    pool = bodies_pool()
    first, second = (hold(pool, 2 * MB, is_body=True) for _ in range(2))
    with waiters_of(pool) as waiters:
        waiting = waiters.add("first", first, 3 * MB, is_body=True)
        refused = waiters.add("second", second, 3 * MB, is_body=True)
        with pytest.raises(Overloaded):
            refused.result()
        waiting.result()
        first.release()
    assert pool._bodies_used == pool.used == 0


async def reserve_async(pool: Pool, size: int, *, deadline_s: float | None) -> Reservation:
    reservation = Reservation(pool)
    await reservation.grow_async(size, is_body=False, deadline_s=deadline_s)
    return reservation


def run_in_loop(check: Callable[[LoopGreenlets], object], make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def run() -> None:
        with ThreadPoolExecutor(4) as threads:
            await check(LoopGreenlets(threads))  # type: ignore[misc]

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(run())


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def make_loop(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    make: Callable[[], asyncio.AbstractEventLoop] = request.param
    return make


def ends_with(order: list[str], name: str) -> bool:
    return order[-1:] == [name]


async def until(condition: Callable[[], bool]) -> None:
    end_s = in_s(PATIENCE_S)
    while not condition():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.001)


def test_greenlets_threads_and_coroutines_share_one_queue(make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        pool = Pool("memory", 100)
        held = hold(pool, 100)
        order: list[str] = []
        mine = {name: Reservation(pool) for name in ("greenlet", "thread", "coroutine")}

        def grow(name: str) -> None:
            mine[name].grow(60, is_body=False, deadline_s=in_s(PATIENCE_S))
            order.append(name)

        async def grow_async(name: str) -> None:
            await mine[name].grow_async(60, is_body=False, deadline_s=in_s(PATIENCE_S))
            order.append(name)

        greenlets.enqueue(grow, "greenlet")
        await until(lambda: len(pool._queue) == 1)
        thread = greenlets.threads.submit(grow, "thread")
        await until(lambda: len(pool._queue) == 2)
        task = asyncio.create_task(grow_async("coroutine"))
        await until(lambda: len(pool._queue) == 3)
        held.release()
        for name in ("greenlet", "thread", "coroutine"):
            await until(partial(ends_with, order, name))
            assert pool.used == 60
            mine[name].release()
        await task
        assert thread.done()
        assert order == ["greenlet", "thread", "coroutine"]
        assert pool.used == 0

    run_in_loop(check, make_loop)


def test_the_deadline_of_a_greenlet_and_of_a_coroutine(make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        pool = Pool("memory", 100)
        held = hold(pool, 100)
        errors: list[Exception] = []

        def grow() -> None:
            try:
                pool.reserve(1, deadline_s=in_s(0.02))
            except Overloaded as error:
                errors.append(error)

        greenlets.enqueue(grow)
        with pytest.raises(Overloaded):
            await reserve_async(pool, 1, deadline_s=in_s(0.02))
        await until(lambda: len(errors) == 1)
        assert not pool.has_waiters
        held.release()
        assert pool.used == 0

    run_in_loop(check, make_loop)


def test_a_cancelled_coroutine_leaves_the_queue(make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def check(_: LoopGreenlets) -> None:
        pool = Pool("memory", 100)
        held = hold(pool, 50)
        cancelled = asyncio.create_task(reserve_async(pool, 60, deadline_s=None))
        await until(lambda: len(pool._queue) == 1)
        behind = asyncio.create_task(reserve_async(pool, 50, deadline_s=None))
        await until(lambda: len(pool._queue) == 2)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        (await behind).release()
        held.release()
        assert pool.used == pool._holders == 0
        assert not pool.has_waiters

    run_in_loop(check, make_loop)


def test_a_coroutine_cancelled_after_its_grant_releases_it(
    make_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def check(_: LoopGreenlets) -> None:
        pool = Pool("memory", 100)
        held = hold(pool, 50)
        task = asyncio.create_task(reserve_async(pool, 60, deadline_s=None))
        await until(lambda: len(pool._queue) == 1)
        held.release()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.used == 0

    run_in_loop(check, make_loop)


def test_many_threads_never_exceed_the_limit() -> None:
    pool = Pool("memory")
    pool.resize(1_000, body_limit=500)
    problems: list[str] = []
    outcomes = {"granted": 0, "refused": 0}

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(60):
            reservation = Reservation(pool)
            try:
                for step in range(chance.randint(1, 3)):
                    before = reservation.held
                    more = chance.randint(1, 400)
                    reservation.grow(more, is_body=step == 0 and chance.random() < 0.5, deadline_s=in_s(0.02))
                    outcomes["granted"] += 1
                    if reservation.held != before + more:
                        problems.append(f"{before} + {more} became {reservation.held}")
                    if pool.used > pool.limit:
                        problems.append(f"{pool.used} of {pool.limit} are used")
                    if chance.random() < 0.3:
                        time.sleep(chance.random() * 0.002)
            except Overloaded:
                outcomes["refused"] += 1
            except TooLarge:
                pass
            finally:
                reservation.release()

    with ThreadPoolExecutor(16) as threads:
        for future in [threads.submit(work, seed) for seed in range(16)]:
            future.result(timeout=60)
    assert not problems, problems[:3]
    assert outcomes["granted"] > 100
    assert outcomes["refused"]
    assert (pool.used, pool._bodies_used, pool._holders, pool._queue) == (0, 0, 0, [])


def test_greenlets_coroutines_and_threads_under_load_release_everything(
    make_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        pool = Pool("memory")
        pool.resize(1_000, body_limit=500)
        chance = random.Random(1)
        ended: list[bool] = []

        def work(sizes: list[int]) -> None:
            reservation = Reservation(pool)
            try:
                for size in sizes:
                    reservation.grow(size, is_body=False, deadline_s=in_s(5))
                    assert pool.used <= pool.limit
                ended.append(True)
            except Overloaded:
                ended.append(False)
            finally:
                reservation.release()

        async def receive(size: int) -> None:
            reservation = Reservation(pool)
            try:
                await reservation.grow_async(size, is_body=True, deadline_s=in_s(5))
                await asyncio.sleep(0)
                assert pool.used <= pool.limit
            finally:
                reservation.release()

        tasks = []
        threads = []
        for _ in range(200):
            greenlets.enqueue(work, [chance.randint(1, 300) for _ in range(3)])
            threads.append(greenlets.threads.submit(work, [chance.randint(1, 300)]))
            tasks.append(asyncio.create_task(receive(chance.randint(1, 400))))
            if chance.random() < 0.3:
                chance.choice(tasks).cancel()
            await asyncio.sleep(0)
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results), results
        await until(lambda: len(ended) == 400)
        for thread in threads:
            thread.result()
        assert (pool.used, pool._bodies_used, pool._holders, pool._queue) == (0, 0, 0, [])

    run_in_loop(check, make_loop)


def test_the_budget_is_divided_into_pools() -> None:
    budget = MemoryBudget(160 * MB)
    assert budget.total_bytes == 160 * MB
    assert (budget.small.limit, budget.large.limit) == (20 * MB, 140 * MB)
    assert budget.large.body_limit == 70 * MB


def test_small_steps_use_the_small_pool_and_large_steps_the_large_pool() -> None:
    budget = MemoryBudget(800 * MB)
    request = RequestMemory(budget)
    assert request.try_small_body(1_000)
    request.grow(SMALL_STEP_BYTES - 1_000, deadline_s=None)
    assert (budget.small.used, budget.large.used) == (SMALL_STEP_BYTES, 0)
    request.grow(1, deadline_s=None)
    assert (budget.small.used, budget.large.used) == (SMALL_STEP_BYTES, 1)
    # It holds large memory, so it no longer uses the small pool.
    request.grow(5, deadline_s=None)
    assert (budget.small.used, budget.large.used) == (SMALL_STEP_BYTES, 6)
    assert request.held_bytes == budget.used_bytes == SMALL_STEP_BYTES + 6
    request.release()
    assert request.held_bytes == budget.used_bytes == 0


def test_a_step_that_never_fits_the_small_pool_uses_the_large_pool() -> None:
    budget = MemoryBudget(40_000_000)
    RequestMemory(budget).grow(6_000_000, deadline_s=in_s(0))
    assert budget.large.used == 6_000_000


def test_shrink_releases_the_step_and_keeps_the_body() -> None:
    budget = MemoryBudget(800 * MB)
    for body_size, step in ((1_000, MB), (1_000, 20 * MB)):
        request = RequestMemory(budget)
        assert request.try_small_body(body_size)
        request.grow(step, deadline_s=None)
        request.shrink(step)
        assert request.held_bytes == budget.used_bytes == body_size
        request.release()
    large = RequestMemory(budget)
    assert large.try_large_body(50 * MB)
    large.grow(MB, deadline_s=None)
    large.shrink(MB)
    assert large.held_bytes == budget.large.used == 50 * MB
    large.shrink_body_to(10 * MB)
    assert large.held_bytes == budget.large._bodies_used == 10 * MB
    large.shrink_body_to(20 * MB)  # never grows
    assert large.held_bytes == 10 * MB
    large.release()
    assert (budget.used_bytes, budget.large._bodies_used, budget.large._holders) == (0, 0, 0)


def test_shrink_grants_queued_reservations() -> None:
    budget = MemoryBudget(80 * MB)
    holding, other = RequestMemory(budget), Reservation(budget.large)
    assert holding.try_large_body(10 * MB)
    holding.grow(budget.large.limit - 10 * MB, deadline_s=None)
    with waiters_of(budget.large) as waiters:
        waiting = waiters.add("other", other, 20 * MB)
        holding.shrink(30 * MB)
        waiting.result()
    other.release()
    holding.release()
    assert budget.used_bytes == 0


def test_try_large_body_marks_the_pool_contended_when_refused() -> None:
    budget = MemoryBudget(80 * MB)
    first, second = RequestMemory(budget), RequestMemory(budget)
    assert first.try_large_body(budget.large.limit)
    assert not first.is_contended
    assert not second.try_large_body(1)
    assert first.is_contended  # for CONTENDED_AFTER_REFUSAL_S
    first.release()


def test_large_requests_do_not_block_small_ones() -> None:
    budget = MemoryBudget(80 * MB)
    large, small = RequestMemory(budget), RequestMemory(budget)
    large.grow(budget.large.limit, deadline_s=None)
    with pytest.raises(Overloaded):
        RequestMemory(budget).grow(9 * MB, deadline_s=in_s(0.01))
    small.grow(MB, deadline_s=in_s(0))
    assert not large.is_contended
    large.release()
    small.release()


def test_is_contended_while_others_wait_for_the_pool() -> None:
    budget = MemoryBudget(80 * MB)
    holding, other = RequestMemory(budget), RequestMemory(budget)
    holding.grow(budget.large.limit, deadline_s=None)
    other.grow(MB, deadline_s=None)
    with waiters_of(budget.large) as waiters:
        waiting = waiters.add("waiting", Reservation(budget.large), MB, within_s=0.2)
        assert holding.is_contended
        assert not other.is_contended
        with pytest.raises(Overloaded):
            waiting.result()
    assert not holding.is_contended
    holding.release()
    other.release()


def test_a_small_body_waits_for_memory() -> None:
    async def check(_: LoopGreenlets) -> None:
        budget = MemoryBudget(80 * MB)
        held = hold(budget.small, budget.small.limit)
        body = RequestMemory(budget)
        assert not body.try_small_body(100)
        task = asyncio.create_task(body.grow_body(100, is_small=True, deadline_s=in_s(PATIENCE_S)))
        await until(lambda: budget.small.has_waiters)
        held.release()
        await task
        assert (body.held_bytes, budget.small.used) == (100, 100)
        body.release()

    run_in_loop(check, uvloop.new_event_loop)


def test_check_fits_includes_held_memory() -> None:
    budget = MemoryBudget(80 * MB)
    request = RequestMemory(budget)
    request.grow(40 * MB, deadline_s=None)
    request.check_fits(30 * MB)
    with pytest.raises(TooLarge):
        request.check_fits(31 * MB)
    request.release()


def test_freed_pages_are_returned_before_a_large_release(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = MemoryBudget(800 * MB)
    trimmed: list[int] = []
    monkeypatch.setattr(memory, "return_freed_memory", lambda **_: trimmed.append(budget.used_bytes))
    for size in (memory.TRIM_BYTES, memory.TRIM_BYTES - 1):
        request = RequestMemory(budget)
        request.grow(size, deadline_s=None)
        request.release()
    assert trimmed == [memory.TRIM_BYTES]  # before the release, and only for the first


def test_the_budget_adapts_to_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"bytes": 800 * MB}
    monkeypatch.setattr(memory, "free_bytes", lambda **_: free["bytes"])
    budget = MemoryBudget()
    assert budget.total_bytes == 800 * MB
    free["bytes"] = 400 * MB
    request = RequestMemory(budget)
    request.grow(MB, deadline_s=None)
    request.release()
    budget.adapt()
    assert budget.total_bytes == 400 * MB
    assert (budget.small.limit, budget.large.body_limit) == (50 * MB, 175 * MB)
    holding = RequestMemory(budget)
    holding.grow(MB, deadline_s=None)
    free["bytes"] = 299 * MB
    budget.adapt()
    assert budget.total_bytes == 400 * MB  # while a request holds memory
    budget.adapt(in_use=True)
    assert budget.total_bytes == 300 * MB
    holding.release()
    fixed = MemoryBudget(100 * MB)
    fixed.adapt()
    assert fixed.total_bytes == 100 * MB


def test_a_release_in_a_greenlet_wakes_a_waiting_thread() -> None:
    async def check(greenlets: LoopGreenlets) -> None:
        pool = Pool("memory", 1)
        held = hold(pool, 1)
        waiting = greenlets.threads.submit(pool.reserve, 1, deadline_s=in_s(PATIENCE_S))
        await until(lambda: pool.has_waiters)
        released_in: list[int] = []
        greenlets.enqueue(lambda: (held.release(), released_in.append(threading.get_ident())))  # type: ignore[arg-type,func-returns-value]
        await until(waiting.done)
        waiting.result().release()
        assert released_in == [threading.get_ident()]
        assert pool.used == 0

    run_in_loop(check, uvloop.new_event_loop)

"""The simulation against queueing theory, and what has to hold for any service times."""

from __future__ import annotations

import math

import numpy as np
import pytest
import simpy

from benchmarks.simulation import Core, Outcome, Request, ServiceTimes, Worker, send_all, simulate_worker
from serving.inference.batcher import LISTEN_EVERY
from serving.settings import Settings

SERVICE_S = 1e-3
REQUESTS = 25_000
ONE_BY_ONE = Settings(max_batch_size=1, max_queue_size=1_000_000)
TIMES = ServiceTimes(
    request_s=300e-6,
    call_s=100e-6,
    wake_s=20e-6,
    cooling_s=1e-3,
    rows=(1, 8, 64),
    model_s=(0.4e-3, 1.1e-3, 6e-3),
    request_sigma=0.3,
)


def arrivals(requests_per_s: float, count: int = REQUESTS, seed: int = 1) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / requests_per_s, count))


def only_model(ratios: tuple[float, ...] = (1.0,)) -> ServiceTimes:
    """A worker that does nothing but call the model: a queue with one server."""
    return ServiceTimes(request_s=0.0, call_s=0.0, model_s=(SERVICE_S,), model_ratios=ratios)


@pytest.mark.parametrize("load", [0.3, 0.8])
def test_constant_calls_wait_as_in_m_d_1(load: float) -> None:
    outcome = simulate_worker(only_model(), arrivals(load / SERVICE_S), settings=ONE_BY_ONE)
    wait_s = load * SERVICE_S / (2 * (1 - load))
    assert outcome.latencies_s.mean() - SERVICE_S == pytest.approx(wait_s, rel=0.05)
    assert outcome.busy_share == pytest.approx(load, rel=0.02)


@pytest.mark.parametrize("load", [0.6])
def test_exponential_calls_wait_as_in_m_m_1(load: float) -> None:
    ratios = tuple(-np.log(1 - (np.arange(2_000) + 0.5) / 2_000))  # the quantiles of the exponential distribution
    outcome = simulate_worker(only_model(ratios), arrivals(load / SERVICE_S), settings=ONE_BY_ONE)
    sojourn_s = SERVICE_S / (1 - load)
    assert outcome.latencies_s.mean() == pytest.approx(sojourn_s, rel=0.06)
    assert outcome.percentile_s(99) == pytest.approx(sojourn_s * math.log(100), rel=0.1)  # it is exponential, too


def test_a_core_is_shared_equally() -> None:
    """M/D/1 with processor sharing: a computation takes 1 / (1 - load) of its time alone, in the mean."""
    env = simpy.Environment()
    core, taken_s = Core(env), []

    def compute(started_s: float):
        yield env.timeout(started_s)
        yield core.run(SERVICE_S)
        taken_s.append(env.now - started_s)

    for each in arrivals(0.6 / SERVICE_S, 10_000):
        env.process(compute(each))
    env.run()
    assert np.mean(taken_s) == pytest.approx(SERVICE_S / 0.4, rel=0.06)


def test_the_first_computation_after_an_idle_time_takes_longer() -> None:
    env = simpy.Environment()
    core, ends_s = Core(env, wake_s=1.0, cooling_s=2.0), []

    def compute():
        for idle_s in (0.0, 2.0, 1e9):
            yield env.timeout(idle_s)
            started_s = env.now
            yield core.run(3.0)
            ends_s.append(env.now - started_s)

    env.process(compute())
    env.run()
    assert ends_s == pytest.approx([3.0, 3.0 + 1 - math.exp(-1), 4.0])


def test_a_halted_core_computes_nothing() -> None:
    env = simpy.Environment()
    core = Core(env)
    ended = core.run(2.0)
    env.timeout(1.0).callbacks.append(lambda _: core.halt(5.0))
    env.timeout(2.0).callbacks.append(lambda _: core.halt(1.0))  # within the first
    env.run(until=ended)
    assert env.now == pytest.approx(7.0)
    assert core.busy_s == pytest.approx(2.0)


@pytest.mark.parametrize("load_per_s", [100, 900, 1_500, 5_000])
def test_every_request_is_answered_once(load_per_s: float) -> None:
    env = simpy.Environment()
    ended: list[Request] = []
    worker = Worker(env, TIMES, np.random.default_rng(0), ended.append)
    requests = [Request(float(each)) for each in arrivals(load_per_s, 3_000)]
    env.process(send_all(env, requests, worker.submit))
    env.run(until=60.0)
    assert len(ended) == len(set(ended)) == len(requests)
    assert not any(request.failed for request in requests)
    assert not worker.unfinished


def run(load_per_s: float, seed: int = 0) -> Outcome:
    return simulate_worker(TIMES, arrivals(load_per_s, 4_000), seed=seed)


def test_the_seed_decides() -> None:
    assert np.array_equal(run(900).latencies_s, run(900).latencies_s)
    assert not np.array_equal(run(900).latencies_s, run(900, seed=1).latencies_s)


def test_batches_grow_with_the_load_and_are_limited() -> None:
    rows = [run(load).rows_per_call for load in (50, 1_200, 10_000)]
    assert rows == sorted(rows)
    assert rows[0] < 1.05
    assert rows[2] > 4
    small = simulate_worker(TIMES, arrivals(10_000, 2_000), settings=Settings(max_batch_size=4, max_queue_size=100_000))
    assert small.rows_per_call <= 4


def test_a_full_queue_refuses() -> None:
    times = ServiceTimes(request_s=1e-5, call_s=0.0, model_s=(0.01,))
    outcome = simulate_worker(times, arrivals(5_000, 2_000), settings=Settings(max_batch_size=1, max_queue_size=50))
    assert outcome.failed
    assert outcome.failed + len(outcome.latencies_s) == 2_000
    assert outcome.latencies_s.max() < 53 * 0.011


def test_a_lone_client_gets_its_call_in_the_event_loop() -> None:
    """As in the batcher: every LISTEN_EVERY-th call, and the first, pay for the thread."""
    times = ServiceTimes(request_s=0.0, call_s=1e-4, model_s=(1e-4,))
    latencies_s = simulate_worker(times, np.arange(1, 10 * LISTEN_EVERY + 1) * 0.01).latencies_s
    assert np.count_nonzero(latencies_s > 1.5e-4) == 10
    assert latencies_s[-2] == pytest.approx(1e-4)


def test_killed_workers_lose_what_they_hold_and_stopped_ones_finish_it() -> None:
    for end, failed in ((Worker.kill, "connection reset"), (Worker.stop, "")):
        env = simpy.Environment()
        worker = Worker(env, TIMES, np.random.default_rng(0))
        first, second = Request(0.0), Request(0.0)
        worker.submit(first)
        end(worker)
        worker.submit(second)
        env.run(until=1.0)
        assert (first.failed, second.failed) == (failed, "connection refused")

"""Discrete-event simulation (simpy) of the service: one worker on one core, and many behind a load balancer.

A worker is what `python -m serving` does with one core: an event loop that reads requests and writes responses, the
batcher with its thread for model calls, and a core that both share. The batcher's rules and constants are those of
`serving/inference/batcher.py`, for requests of one row, with one call at a time, as on one core.

Not simulated: gRPC, requests of several rows, photos that are decoded in worker threads, connections, the network.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from serving.greenlets import SLICE_S
from serving.inference.batcher import FEW_ROWS, LISTEN_EVERY, LONG_CALL_S, SHORT_CALL_S
from serving.settings import Settings

PARSE_SHARE = 0.2  # of a request's time in the event loop, until it is queued for its view
WRITE_SHARE = 0.3  # after its model call

REFUSED = "connection refused"

_Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class ServiceTimes:
    """How long each step of a worker takes on its core, in seconds; measured and fitted by `benchmarks.fleet`."""

    request_s: float  # of the event loop, for a request, without the model
    call_s: float  # for a model call, beside the model: the threads hand over, the batch is put together
    wake_s: float = 0.0  # for the core to begin again after it was idle for long: it slept, and its caches are cold
    cooling_s: float = 1e-3  # of idle time, after which it takes 63 % of that
    rows: Sequence[int] = (1,)  # ascending batch sizes, and the time of the model's call with each
    model_s: Sequence[float] = (0.0,)
    model_ratios: Sequence[float] = (1.0,)  # of single calls to these times; drawn at random
    request_sigma: float = 0.0  # of the lognormal ratio of a single request to `request_s`; its mean is 1
    offset_s: float = 0.0  # from the client and back, without the core
    stalls_per_s: float = 0.0  # how often the core is taken away, by the host and by other processes
    stall_s: Sequence[float] = (0.0,)  # for how long; drawn at random

    def model_call_s(self, rows: int) -> float:
        """Return the time of a model call; beyond the largest size, a row takes as long as there."""
        if rows > self.rows[-1]:
            return self.model_s[-1] * rows / self.rows[-1]
        return float(np.interp(rows, self.rows, self.model_s))


class Request:
    """A request of one image, and what became of it."""

    __slots__ = ("ended_s", "failed", "sent_s")

    def __init__(self, sent_s: float) -> None:
        self.sent_s = sent_s
        self.ended_s = math.inf
        self.failed = ""  # why, if it did


class Core:
    """One core, which its threads share equally (processor sharing). `halt` takes it from all of them.

    Args:
        env: the simulation.
        wake_s: that the first computation takes longer after a long idle time.
        cooling_s: see `ServiceTimes`.
    """

    def __init__(self, env: simpy.Environment, wake_s: float = 0.0, cooling_s: float = 1e-3) -> None:
        self._env, self._wake_s, self._cooling_s = env, wake_s, cooling_s
        self._left_s: dict[simpy.Event, float] = {}  # of each running computation
        self._updated_s = self._idle_since_s = 0.0
        self._halts = 0
        self._timer: simpy.Event | None = None
        self.busy_s = 0.0

    def run(self, work_s: float) -> simpy.Event:
        """Start a computation that takes so long alone; returns the event of its end."""
        self._update()
        if self._wake_s and not self._left_s and self._env.now > self._idle_since_s:
            work_s += self._wake_s * -math.expm1((self._idle_since_s - self._env.now) / self._cooling_s)
        ended = self._env.event()
        self._left_s[ended] = work_s
        self._set_timer()
        return ended

    def halt(self, seconds: float) -> None:
        self._update()
        self._halts += 1
        self._set_timer()
        self._env.timeout(seconds).callbacks.append(self._resume)

    def _resume(self, _: simpy.Event) -> None:
        self._update()
        self._halts -= 1
        self._set_timer()

    def _update(self) -> None:
        elapsed_s, self._updated_s = self._env.now - self._updated_s, self._env.now
        if self._left_s and not self._halts:
            self.busy_s += elapsed_s
            share_s = elapsed_s / len(self._left_s)
            for ended in self._left_s:
                self._left_s[ended] -= share_s

    def _set_timer(self) -> None:
        self._timer = None
        if self._left_s and not self._halts:
            wait_s = min(self._left_s.values()) * len(self._left_s)
            self._timer = self._env.timeout(max(0.0, wait_s))
            self._timer.callbacks.append(self._end_first)

    def _end_first(self, timer: simpy.Event) -> None:
        if timer is not self._timer:
            return  # another computation has begun or ended since
        self._update()
        ended = min(self._left_s, key=self._left_s.__getitem__)
        del self._left_s[ended]
        self._idle_since_s = self._env.now
        ended.succeed()
        self._set_timer()


class Worker:
    """The service with one core.

    Args:
        env: the simulation.
        times: how long each step takes.
        rng: draws what is random.
        on_end: called with each request that has its response, or failed.
        settings: of the service; the batch size, the queue's limit and the deadline count.
    """

    def __init__(
        self,
        env: simpy.Environment,
        times: ServiceTimes,
        rng: np.random.Generator,
        on_end: Callable[[Request], None] = lambda _: None,
        settings: Settings | None = None,
    ) -> None:
        self._env, self._times, self._on_end = env, times, on_end
        self._settings = settings or Settings()
        self.core = Core(env, times.wake_s, times.cooling_s)
        self.calls = 0
        self.unfinished: set[Request] = set()
        self.accepts = True
        self.is_dead = False
        model_s = [0.0, *(times.model_call_s(rows) for rows in range(1, self._settings.max_batch_size + 1))]
        self._model_s = model_s
        self._request_ratios = _Draws(lambda: rng.lognormal(-(times.request_sigma**2) / 2, times.request_sigma, 4_096))
        self._model_ratios = _Draws(lambda: rng.choice(times.model_ratios, 4_096))
        # The event loop: requests that have arrived, functions that are ready, and its event while it has neither.
        self._arrived: list[Request] = []
        self._ready: deque[Callable[[], _Process]] = deque()
        self._wake: simpy.Event | None = None
        # The batcher, as in serving/inference/batcher.py.
        self._queue: deque[Request] = deque()
        self._is_calling = False
        self._is_start_scheduled = False
        self._uncontended_calls = 0
        self._few_rows_s = 0.0
        self._row_s = math.inf
        env.process(self._run_loop())
        if times.stalls_per_s:
            env.process(self._stall(rng))

    def submit(self, request: Request) -> None:
        """Let a request arrive now."""
        if not self.accepts:
            self._end(request, REFUSED)
            return
        self.unfinished.add(request)
        self._arrived.append(request)
        self._wake_loop()

    def stop(self) -> None:
        """Accept no more requests, and finish those that it has."""
        self.accepts = False

    def kill(self) -> None:
        """End the worker; the requests that it holds fail."""
        self.accepts, self.is_dead = False, True
        for request in tuple(self.unfinished):
            self._end(request, "connection reset")

    def _end(self, request: Request, failed: str = "") -> None:
        self.unfinished.discard(request)
        if request.ended_s == math.inf:
            request.ended_s, request.failed = self._env.now + self._times.offset_s, failed
            self._on_end(request)

    # The event loop

    def _wake_loop(self) -> None:
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None

    def _call_soon(self, function: Callable[[], _Process]) -> None:
        self._ready.append(function)
        self._wake_loop()

    def _run_loop(self) -> _Process:
        """Run what is ready, then read what has arrived, as uvloop does."""
        while not self.is_dead:
            if not self._ready and not self._arrived:
                self._wake = self._env.event()
                yield self._wake
            for _ in range(len(self._ready)):
                yield from self._ready.popleft()()
            if self._arrived:
                arrived, self._arrived = self._arrived, []
                yield self.core.run(PARSE_SHARE * self._times.request_s * len(arrived))
                waiting = deque(arrived)
                self._call_soon(lambda waiting=waiting: self._drain(waiting))  # type: ignore[misc]

    def _drain(self, waiting: deque[Request]) -> _Process:
        """Run the views of requests until each waits for the model, for a slice of time."""
        times, started_s = self._times, self._env.now
        while waiting and self._env.now - started_s <= SLICE_S:
            request = waiting.popleft()
            if len(waiting) * times.request_s > self._settings.request_timeout_s:
                self._end(request, "refused: loop_queue")
                continue
            share = 1 - PARSE_SHARE - WRITE_SHARE
            yield self.core.run(share * times.request_s * next(self._request_ratios))
            self._enqueue(request)
        if waiting:
            self._call_soon(lambda: self._drain(waiting))

    def _respond(self, batch: Sequence[Request]) -> _Process:
        for request in batch:
            yield self.core.run(WRITE_SHARE * self._times.request_s * next(self._request_ratios))
            self._end(request)

    # The batcher

    def _enqueue(self, request: Request) -> None:
        if len(self._queue) >= self._settings.max_queue_size:
            self._end(request, "refused: queue_full")
            return
        if self._is_calling or self._queue:
            self._uncontended_calls = -LISTEN_EVERY
        self._queue.append(request)
        if self._is_calling:
            return
        if self._few_rows_s > LONG_CALL_S or len(self._queue) >= FEW_ROWS:
            self._is_calling = True
            self._env.process(self._call_until_idle())
        elif not self._is_start_scheduled:
            self._is_start_scheduled = True
            self._call_soon(self._start_small_call)

    def _start_small_call(self) -> _Process:
        self._is_start_scheduled = False
        if not self._queue or self._is_calling:
            return
        self._is_calling = True
        is_uncontended = self._uncontended_calls > 0 and self._uncontended_calls % LISTEN_EVERY > 0
        if is_uncontended and len(self._queue) * self._row_s < SHORT_CALL_S:
            yield from self._call(self._take_batch(), overhead_s=0.0)
            if not self._queue:
                self._is_calling = False
                return
        self._env.process(self._call_until_idle())

    def _call_until_idle(self) -> _Process:
        while batch := self._take_batch():
            yield from self._call(batch, overhead_s=self._times.call_s)
        self._is_calling = False

    def _take_batch(self) -> list[Request]:
        if self._is_start_scheduled and len(self._queue) < FEW_ROWS:
            return []
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._settings.max_batch_size))]
        if batch:
            self._uncontended_calls += 1
        return batch

    def _call(self, batch: list[Request], *, overhead_s: float) -> _Process:
        started_s, rows = self._env.now, len(batch)
        yield self.core.run(overhead_s + self._model_s[rows] * next(self._model_ratios))
        self.calls += 1
        taken_s = self._env.now - started_s
        self._few_rows_s = taken_s * FEW_ROWS / max(FEW_ROWS, rows)
        self._row_s = taken_s / rows
        self._call_soon(lambda: self._respond(batch))

    def _stall(self, rng: np.random.Generator) -> _Process:
        while not self.is_dead:
            yield self._env.timeout(rng.exponential(1 / self._times.stalls_per_s))
            self.core.halt(float(rng.choice(self._times.stall_s)))


class _Draws:
    """Random numbers one by one, drawn many at a time."""

    def __init__(self, draw: Callable[[], np.ndarray]) -> None:
        self._draw = draw
        self._numbers: list[float] = []

    def __next__(self) -> float:
        if not self._numbers:
            self._numbers = self._draw().tolist()
        return self._numbers.pop()


@dataclass(frozen=True)
class Outcome:
    """What a simulated load came to; latencies in seconds, of the requests that did not fail."""

    latencies_s: np.ndarray
    failed: int
    busy_share: float  # of the core
    rows_per_call: float

    def percentile_s(self, percent: float) -> float:
        return float(np.percentile(self.latencies_s, percent)) if len(self.latencies_s) else math.inf


def simulate_worker(
    times: ServiceTimes,
    due_s: Sequence[float] | np.ndarray,
    *,
    seed: int = 0,
    settings: Settings | None = None,
) -> Outcome:
    """Send requests to one worker when they are due, until each has its response."""
    env = simpy.Environment()
    requests = [Request(float(each)) for each in due_s]
    worker = Worker(env, times, np.random.default_rng(seed), settings=settings)
    env.process(send_all(env, requests, worker.submit))
    last_s = requests[-1].sent_s
    while env.now < last_s or worker.unfinished:
        env.step()
    latencies_s = np.array([request.ended_s - request.sent_s for request in requests if not request.failed])
    failed = sum(bool(request.failed) for request in requests)
    return Outcome(latencies_s, failed, worker.core.busy_s / env.now, len(requests) / max(1, worker.calls))


def send_all(env: simpy.Environment, requests: Iterable[Request], submit: Callable[[Request], None]) -> _Process:
    """Submit each request when it is due."""
    for request in requests:
        if request.sent_s > env.now:
            yield env.timeout(request.sent_s - env.now)
        submit(request)

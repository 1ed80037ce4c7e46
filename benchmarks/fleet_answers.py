"""What a fleet of workers needs, by simulation: replicas for a load, a rolling update, the loss of a zone, and a plan.

A replica is one worker on one core. The load balancer chooses a replica at random for each request. This is the
pessimistic case: a balancer that knows the load of the replicas has shorter queues. With n replicas, requests arrive at
each as a Poisson process of 1/n of the rate. So a single replica is simulated for a fleet of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from benchmarks.open_loop import draw_poisson
from benchmarks.simulation import REFUSED, Request, ServiceTimes, Worker, send_all, simulate_worker
from benchmarks.worker_measurement import Form

REQUESTS = 10_000  # of a simulation that finds a p99
STEPS = 9  # of the bisection: the largest load is found within a five-hundredth of what is possible
# Of Ethernet, IP and TCP, for each segment of data; an acknowledgement for two segments in the other direction.
SEGMENT_BYTES, HEADERS_BYTES = 1_448, 90

_Process = Generator[simpy.Event, Any, None]


def find_largest_load(times: ServiceTimes, *, p99_s: float, requests: int = REQUESTS, seed: int = 0) -> float:
    """Return the most requests a second for which the p99 of a worker's latencies is within a bar; 0 if there is none.

    All loads have the same random arrivals, in another time.
    """
    gaps = np.random.default_rng(seed).exponential(1.0, requests)
    arrivals = np.cumsum(gaps)

    def holds(requests_per_s: float) -> bool:
        outcome = simulate_worker(times, arrivals / requests_per_s, seed=seed)
        return not outcome.failed and outcome.percentile_s(99) <= p99_s

    low, high = 0.0, 1 / (times.request_s + times.model_s[-1] / times.rows[-1])
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def find_largest_loads(cases: Sequence[tuple[ServiceTimes, float]]) -> list[float]:
    """Return `find_largest_load` of several service times and bars, in seconds; computed on all cores."""
    with ProcessPoolExecutor() as processes:
        found = [processes.submit(find_largest_load, times, p99_s=p99_s) for times, p99_s in cases]
        return [each.result() for each in found]


def count_replicas(load_per_s: float, largest_per_s: float) -> int:
    """Return how many replicas share a load so that none has more than the largest."""
    return math.ceil(load_per_s / largest_per_s)


class Fleet:
    """Replicas behind a load balancer that chooses one at random for each request.

    Args:
        env: the simulation.
        times: of every worker.
        seed: of all random numbers.
        retries: how often the balancer repeats a request whose connection was refused or reset, with another replica.
    """

    def __init__(self, env: simpy.Environment, times: ServiceTimes, *, seed: int = 0, retries: int = 0) -> None:
        self._env, self._times, self._retries = env, times, retries
        self._rng = np.random.default_rng(seed)
        self.endpoints: list[Worker] = []  # that the balancer knows
        self.running = 0  # replicas, ready or not
        self.most_running = 0
        self._attempts: dict[Request, int] = {}
        self.ended: list[Request] = []

    def start(self) -> Worker:
        """Start a replica; it is not an endpoint yet."""
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        return Worker(self._env, self._times, np.random.default_rng(self._rng.integers(2**32)), self._end)

    def submit(self, request: Request) -> None:
        if not self.endpoints:
            request.ended_s, request.failed = self._env.now, "no endpoint"
            self.ended.append(request)
            return
        self.endpoints[int(self._rng.integers(len(self.endpoints)))].submit(request)

    def _end(self, request: Request) -> None:
        if request.failed in (REFUSED, "connection reset"):
            attempts = self._attempts.get(request, 0)
            if attempts < self._retries:
                self._attempts[request] = attempts + 1
                request.ended_s, request.failed = math.inf, ""
                self.submit(request)
                return
        self.ended.append(request)


@dataclass(frozen=True)
class Window:
    """The requests that were sent in a part of a simulation."""

    requests: int
    failed: int
    p99_s: float

    @staticmethod
    def of(requests: Sequence[Request], from_s: float, until_s: float) -> Window:
        inside = [request for request in requests if from_s <= request.sent_s < until_s]
        latencies_s = [request.ended_s - request.sent_s for request in inside if not request.failed]
        p99_s = float(np.percentile(latencies_s, 99)) if latencies_s else math.inf
        return Window(len(inside), sum(bool(request.failed) for request in inside), p99_s)


@dataclass(frozen=True)
class Rollout:
    """How a rolling update is done, as a Deployment of Kubernetes does it.

    Args:
        surge: replicas that may be started beyond the number.
        unavailable: replicas that may be missing.
        ready_s: from the start of a replica until it is ready.
        probe_s: between two readiness probes.
        propagation_s: until the load balancer knows that a replica is ready, or is ending.
        pre_stop_s: how long an ending replica still accepts requests.
    """

    surge: int
    unavailable: int
    ready_s: float
    probe_s: float = 5.0
    propagation_s: float = 1.0
    pre_stop_s: float = 5.0


@dataclass(frozen=True)
class RolloutOutcome:
    before: Window
    during: Window
    seconds: float
    most_running: int


def simulate_rollout(
    times: ServiceTimes, rollout: Rollout, *, replicas: int, per_replica_per_s: float, seed: int = 0
) -> RolloutOutcome:
    """Replace all replicas under load, after ten seconds without an update."""
    env = simpy.Environment()
    fleet = Fleet(env, times, seed=seed)
    fleet.endpoints = [fleet.start() for _ in range(replicas)]
    update = _Update(env, fleet, rollout, replicas, np.random.default_rng(seed))
    quiet_s, ended_s = 10.0, [math.inf]

    def run() -> _Process:
        yield env.timeout(quiet_s)
        yield env.process(update.run())
        ended_s[0] = env.now

    env.process(run())
    requests: list[Request] = []
    env.process(_send_until(env, fleet, requests, replicas * per_replica_per_s, seed, lambda: env.now >= ended_s[0]))
    while len(fleet.ended) < len(requests) or ended_s[0] == math.inf:
        env.step()
    before, during = Window.of(requests, 1, quiet_s), Window.of(requests, quiet_s, ended_s[0])
    return RolloutOutcome(before, during, ended_s[0] - quiet_s, fleet.most_running)


@dataclass
class _Update:
    env: simpy.Environment
    fleet: Fleet
    rollout: Rollout
    replicas: int
    rng: np.random.Generator
    ready: int = 0  # replicas, old and new, that are not ending
    changed: simpy.Event | None = None

    def run(self) -> _Process:
        old = list(self.fleet.endpoints)
        self.ready = len(old)
        started = 0
        while old or self.fleet.running > self.replicas or len(self.fleet.endpoints) != self.replicas:
            self.changed = self.env.event()
            while started < self.replicas and self.fleet.running < self.replicas + self.rollout.surge:
                started += 1
                self.env.process(self._get_ready(self.fleet.start()))
            while old and self.ready > self.replicas - self.rollout.unavailable:
                self.ready -= 1
                self.env.process(self._end(old.pop(0)))
            yield self.changed

    def _get_ready(self, worker: Worker) -> _Process:
        rollout = self.rollout
        yield self.env.timeout(rollout.ready_s + self.rng.uniform(0, rollout.probe_s))
        self.ready += 1
        self.env.process(self._announce(worker))
        self._change()

    def _announce(self, worker: Worker) -> _Process:
        yield self.env.timeout(self.rollout.propagation_s)
        self.fleet.endpoints.append(worker)
        self._change()

    def _end(self, worker: Worker) -> _Process:
        rollout = self.rollout
        removed = self.env.timeout(rollout.propagation_s)
        removed.callbacks.append(lambda _: self.fleet.endpoints.remove(worker))
        yield self.env.timeout(rollout.pre_stop_s)
        worker.stop()
        while worker.unfinished:
            yield self.env.timeout(0.02)
        self.fleet.running -= 1
        self._change()
        yield removed
        self._change()

    def _change(self) -> None:
        if self.changed is not None and not self.changed.triggered:
            self.changed.succeed()


@dataclass(frozen=True)
class ZoneOutcome:
    before: Window
    undetected: Window  # until the balancer knows of the loss
    after: Window


def simulate_zone_loss(
    times: ServiceTimes,
    *,
    zones: int,
    per_zone: int,
    load_per_s: float,
    detect_s: float,
    retries: int,
    after_s: float = 10.0,
    seed: int = 0,
) -> ZoneOutcome:
    """Kill all replicas of one zone after ten seconds; the load stays as it is."""
    env = simpy.Environment()
    fleet = Fleet(env, times, seed=seed, retries=retries)
    fleet.endpoints = [fleet.start() for _ in range(zones * per_zone)]
    lost = fleet.endpoints[:per_zone]
    lost_s = 10.0

    def lose() -> _Process:
        yield env.timeout(lost_s)
        for worker in lost:
            worker.kill()
        yield env.timeout(detect_s)
        fleet.endpoints = [worker for worker in fleet.endpoints if worker not in lost]

    env.process(lose())
    until_s = lost_s + detect_s + after_s
    due_s = draw_poisson(np.random.default_rng(seed), requests_per_s=load_per_s, seconds=until_s)
    requests = [Request(float(each)) for each in due_s]
    env.process(send_all(env, requests, fleet.submit))
    while len(fleet.ended) < len(requests):
        env.step()
    windows = ((1.0, lost_s), (lost_s, lost_s + detect_s), (lost_s + detect_s, until_s))
    return ZoneOutcome(*(Window.of(requests, *window) for window in windows))


def simulate_slice(times: ServiceTimes, *, workers: int, per_worker_per_s: float, seconds: float) -> float:
    """Return the p99 of so many workers behind one balancer, in seconds."""
    env = simpy.Environment()
    fleet = Fleet(env, times)
    fleet.endpoints = [fleet.start() for _ in range(workers)]
    due_s = draw_poisson(np.random.default_rng(0), requests_per_s=workers * per_worker_per_s, seconds=seconds)
    requests = [Request(float(each)) for each in due_s]
    env.process(send_all(env, requests, fleet.submit))
    while len(fleet.ended) < len(requests):
        env.step()
    return Window.of(requests, 0, seconds).p99_s


def _send_until(
    env: simpy.Environment,
    fleet: Fleet,
    requests: list[Request],
    requests_per_s: float,
    seed: int,
    is_over: Callable[[], bool],
) -> _Process:
    rng = np.random.default_rng(seed)
    while not is_over():
        yield env.timeout(rng.exponential(1 / requests_per_s))
        requests.append(Request(env.now))
        fleet.submit(requests[-1])


@dataclass(frozen=True)
class Machine:
    """A kind of machine, and what one costs and carries; assumptions, all of them."""

    cores: int
    price_per_core_hour: float
    network_gbit: float  # in each direction
    network_share: float  # of it that may be used
    balancer_per_s: float  # requests that a node of the load balancer takes
    balancer_gbit: float


@dataclass(frozen=True)
class Plan:
    """A fleet for a load of one form."""

    per_core_per_s: float
    cores: int
    machines_by_cores: int
    machines_by_network: int
    network_gbit: float  # the larger direction, of the whole load
    machine_gbit: float  # of one machine
    balancers: int
    cost_per_hour: float

    @property
    def machines(self) -> int:
        return max(self.machines_by_cores, self.machines_by_network)

    @property
    def bottleneck(self) -> str:
        return "processor" if self.machines_by_cores >= self.machines_by_network else "network"


def plan_fleet(load_per_s: float, *, per_core_per_s: float, form: Form, machine: Machine, zones: int) -> Plan:
    """Return the machines for a load that survives the loss of one zone."""
    headroom = zones / (zones - 1) if zones > 1 else 1.0
    cores = math.ceil(headroom * load_per_s / per_core_per_s)
    gbit = load_per_s * max(wire_bytes(form)) * 8 / 1e9
    by_network = math.ceil(headroom * gbit / (machine.network_gbit * machine.network_share))
    by_cores = math.ceil(cores / machine.cores)
    machines = max(by_cores, by_network)
    balancers = max(load_per_s / machine.balancer_per_s, gbit / (machine.balancer_gbit * machine.network_share))
    return Plan(
        per_core_per_s, cores, by_cores, by_network, gbit, gbit * headroom / machines, math.ceil(headroom * balancers),
        machines * machine.cores * machine.price_per_core_hour,
    )  # fmt: skip


def wire_bytes(form: Form) -> tuple[float, float]:
    """Return the bytes of a request to the service and from it, headers and acknowledgements of TCP included."""
    to_service, from_service = (
        size + math.ceil(size / SEGMENT_BYTES) * HEADERS_BYTES for size in (form.request_bytes, form.response_bytes)
    )
    return (
        to_service + math.ceil(form.response_bytes / SEGMENT_BYTES / 2) * HEADERS_BYTES,
        from_service + math.ceil(form.request_bytes / SEGMENT_BYTES / 2) * HEADERS_BYTES,
    )

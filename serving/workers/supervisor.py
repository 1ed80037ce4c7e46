"""The supervisor: starts the workers, restarts those that end, replaces them one by one, and ends them.

It does not import TensorFlow. The main thread starts and ends processes; what workers ask for runs in other threads.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

from serving.app import choose_models, name_remote_models
from serving.errors import StartupError
from serving.inference.version_signature import SignatureVerifier
from serving.metrics.snapshot import EndedProcesses, Snapshot
from serving.process import exit_process
from serving.process_memory import memory_limit_bytes, resident_bytes
from serving.server import log_start, open_port
from serving.settings import Settings
from serving.workers.capacity import divide_settings, format_mib, measure_worker
from serving.workers.channel import Channel, ChannelClosed
from serving.workers.leader import JoinFailed, LeadingRepository, Members
from serving.workers.messages import (
    Accept,
    Beat,
    Connect,
    Failed,
    LoadModel,
    Push,
    ReadOthers,
    Released,
    Reload,
    Retire,
    Serving,
    Setup,
    TakeSnapshot,
    UnloadModel,
)
from serving.workers.sockets import ConnectionTable, hold_port

logger = logging.getLogger("serving")

TICK_S = 0.1
HUNG_S = 30.0  # without a sign of life, after which a worker is replaced
# At this age of their connections, clients of gRPC are told to open new ones; a worker that retires waits so long.
CONNECTION_AGE_S = 10.0
LONGEST_DELAY_S = 30.0  # between two starts of a worker that keeps ending
STABLE_S = 60.0  # a worker that has served for so long starts without a delay when it ends
MAX_FAILED_STARTS = 3  # in a row, while no worker serves
SNAPSHOT_TIMEOUT_S = 2.0  # for a worker to tell its metrics; its last ones count otherwise
RETIRE_FACTOR = 1.5  # of the age of connections, for which a worker that retires waits
STOP_MARGIN_S = 10.0  # after the grace period, until workers are killed


class WorkerProcess:
    """A worker, as the supervisor sees it; a `Member`."""

    def __init__(self, number: int, index: int, process: subprocess.Popen[bytes]) -> None:
        self.number = number
        self.index = index  # in the table of connections
        self.process = process
        self.channel: Channel
        self.is_retiring = False
        self.retires_until_s = math.inf
        self.loads: set[int] = set()
        self.serving_since_s = math.inf
        self.beat_s = math.inf  # of the last sign of life
        self.problem: str | None = None
        self.failure: str | None = None  # why the service cannot start
        self.snapshot = Snapshot()

    @property
    def is_serving(self) -> bool:
        """Whether it accepts connections to both ports."""
        return self.serving_since_s < math.inf

    def post(self, message: Any) -> Future[Any]:
        """Send a message; see `Channel.post`."""
        return self.channel.post(message)

    def __str__(self) -> str:
        return f"worker {self.number} (process {self.process.pid})"


class Supervisor:
    """Runs the service in several processes, until SIGTERM or SIGINT; SIGHUP replaces all workers one by one.

    Args:
        settings: of the service as a whole.
        count: the number of workers.

    Raises:
        StartupError: a port is in use, the models or a setting are invalid, or the workers cannot start.
    """

    def __init__(self, settings: Settings, count: int) -> None:
        self._settings = settings
        self._count = count
        self._worker_settings = divide_settings(settings, count)
        self._listener = open_port(settings.host, settings.rest_port, flag="--rest-port")
        self._grpc_port = (
            open_port(settings.host, settings.grpc_port, flag="--grpc-port", take=hold_port)
            if settings.grpc_port
            else None
        )
        self._table = ConnectionTable(2 * count)
        self._workers: list[WorkerProcess] = []
        self._events: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()  # signals, and errors of threads
        self._tasks = ThreadPoolExecutor(16 + 2 * count, thread_name_prefix="supervisor")
        self._members = Members()
        self._repository = None if settings.remote else self._make_repository()
        self._ended = EndedProcesses()
        self._metrics_lock = threading.Lock()
        self._failures = dict.fromkeys(range(1, count + 1), 0)  # of each number, since it was stable
        self._start_at_s: dict[int, float] = dict.fromkeys(range(1, count + 1), 0.0)  # of those that do not run
        self._failed_starts = 0
        self._restarts = 0
        self._to_replace: list[WorkerProcess] = []  # at SIGHUP
        self._replacement: WorkerProcess | None = None  # of the first of these
        self._ticked_s = time.monotonic()

    def _make_repository(self) -> LeadingRepository:
        settings = self._settings
        return LeadingRepository(
            choose_models(settings),
            self._members,
            required=settings.require_models,
            verify_signature=SignatureVerifier(settings.verify_key) if settings.verify_key else None,
        )

    def run(self) -> None:
        """Serve until a signal. Raises StartupError."""
        signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            for number, handler in signals.items():
                if handler is not signal.SIG_IGN:  # nohup ignores SIGHUP
                    signal.signal(number, lambda number, _: self._events.put(number))
            names = name_remote_models(self._settings) if self._settings.remote else self._all_names()
            port = self._listener.getsockname()[1]
            log_start(self._settings, port, names, processes=self._count)
            if self._repository is not None:
                threading.Thread(target=self._poll, args=(self._repository,), name="models", daemon=True).start()
            while (event := self._next_event()) in (None, signal.SIGHUP):
                if event == signal.SIGHUP:
                    self._replace_all()
                self._tick()
            if isinstance(event, BaseException):
                raise event
            self._drain()
        finally:
            self._kill()
            for number, handler in signals.items():
                signal.signal(number, handler)

    def _all_names(self) -> list[str]:
        return self._repository.all_names() if self._repository is not None else []

    def _next_event(self) -> int | BaseException | None:
        try:
            return self._events.get(timeout=TICK_S)
        except queue.Empty:
            return None

    def _poll(self, repository: LeadingRepository) -> None:
        try:
            repository.load()
        except Exception as error:
            self._events.put(error)
            return
        repository.poll_forever(self._settings.poll_interval_s)

    # Processes, by the main thread only: Linux takes the end of the thread that started a process for that of its
    # parent.

    def _tick(self) -> None:
        now_s = time.monotonic()
        is_late = now_s - self._ticked_s > HUNG_S / 2  # the whole machine was suspended
        self._ticked_s = now_s
        for worker in tuple(self._workers):
            code = worker.process.poll()
            if code is not None:
                self._handle_end(worker, code)
            elif worker.is_retiring:
                if now_s > worker.retires_until_s:
                    worker.process.kill()
            elif is_late:
                worker.beat_s = now_s if worker.is_serving else math.inf
            elif worker.problem or now_s - worker.beat_s > HUNG_S:
                reason = worker.problem or f"no sign of life for {HUNG_S:g} s"
                logger.error("%s hangs (%s); it is replaced", worker, reason)
                worker.process.kill()
                worker.problem, worker.beat_s = None, math.inf
            elif now_s - worker.serving_since_s > STABLE_S:
                self._failures[worker.number] = 0
        for number, start_at_s in tuple(self._start_at_s.items()):
            if now_s >= start_at_s:
                del self._start_at_s[number]
                self._start(number)
        self._replace_next()

    def _start(self, number: int) -> WorkerProcess:
        ours, theirs = multiprocessing.Pipe()
        index = next(each for each in range(2 * self._count) if each not in {other.index for other in self._workers})
        shared = [theirs.fileno(), self._listener.fileno(), self._table.descriptor]
        root = str(Path(__file__).parents[2])
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.workers.worker", *map(str, (os.getpid(), *shared, 2 * self._count))],
            pass_fds=shared,
            process_group=0,  # Ctrl-C is for the supervisor
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))},
        )
        theirs.close()
        worker = WorkerProcess(number, index, process)
        worker.channel = Channel(ours, lambda message: self._handle(worker, message))
        self._workers.append(worker)
        logger.info("%s starts", worker)
        setup = Setup(number, self._count, index, self._worker_settings, CONNECTION_AGE_S)
        self._tasks.submit(self._admit, worker, ours, setup)
        return worker

    def _handle_end(self, worker: WorkerProcess, code: int) -> None:
        with self._metrics_lock:  # its figures count in one of the two
            self._workers.remove(worker)
            self._ended.add(worker.snapshot)
        self._table.clear(worker.index)
        self._tasks.submit(self._members.leave, worker)
        if worker.is_retiring and code == 0:
            logger.info("%s has ended", worker)
            return
        if worker.failure and not any(other.is_serving for other in self._workers):
            raise StartupError(worker.failure)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        reason = f": {worker.failure}" if worker.failure else ""
        logger.error("%s ended with %s%s%s", worker, how, "" if worker.is_serving else " before it served", reason)
        self._failed_starts = 0 if worker.is_serving else self._failed_starts + 1
        if self._failed_starts >= MAX_FAILED_STARTS and not any(other.is_serving for other in self._workers):
            raise StartupError(
                f"workers ended {self._failed_starts} times before they served, the last one, worker {worker.number}, "
                f'with {how}; the reason is in its log, the lines with "worker {worker.number}" on standard error'
            )
        if worker.is_retiring or any(other.number == worker.number for other in self._workers):
            return  # another one has taken over, or will
        failures = self._failures[worker.number]
        delay_s = min(LONGEST_DELAY_S, 2.0 ** (failures - 1)) if failures else 0.0
        self._failures[worker.number] += 1
        self._restarts += 1
        self._start_at_s[worker.number] = time.monotonic() + delay_s

    def _replace_all(self) -> None:
        if self._to_replace:
            logger.info("the workers are being replaced already")
            return
        needed_bytes = measure_worker(self._settings)
        used_bytes = resident_bytes() + sum(resident_bytes(worker.process.pid) for worker in self._workers)
        if (free_bytes := memory_limit_bytes() - used_bytes) < needed_bytes:
            logger.error(
                "the workers are not replaced: a new one starts before an old one ends, and needs about %s; only %s "
                "are free; restart the service instead",
                format_mib(needed_bytes),
                format_mib(free_bytes),
            )
            return
        logger.info("replacing all workers, one by one")
        self._to_replace = [worker for worker in self._workers if not worker.is_retiring]

    def _replace_next(self) -> None:
        """Take the next step of replacing workers: start the new one, then let the old one retire, one at a time."""
        if not self._to_replace:
            return
        old, new = self._to_replace[0], self._replacement
        if old not in self._workers:  # it has retired, or ended by itself
            self._to_replace.pop(0)
            self._replacement = None
        elif new is None:
            self._replacement = self._start(old.number)
        elif new not in self._workers:
            logger.error("%s did not start; the workers that were not replaced yet stay as they are", new)
            self._to_replace.clear()
            self._replacement = None
        elif new.is_serving and not old.is_retiring:
            old.is_retiring = True
            waits_s = RETIRE_FACTOR * CONNECTION_AGE_S + 2 * self._settings.drain_timeout_s + STOP_MARGIN_S
            old.retires_until_s = time.monotonic() + waits_s
            old.post(Retire())

    def _drain(self) -> None:
        """Let all workers finish their requests; a second signal ends them at once."""
        self._listener.close()
        for worker in self._workers:
            worker.is_retiring = True
            worker.process.terminate()
        deadline_s = time.monotonic() + self._settings.drain_timeout_s + STOP_MARGIN_S
        while any(worker.process.poll() is None for worker in self._workers):
            event = self._next_event()
            if event in (signal.SIGTERM, signal.SIGINT):
                self._kill()
                exit_process(128 + int(event))
            if time.monotonic() > deadline_s:
                logger.error("some workers did not end in time; they are killed")
                return

    def _kill(self) -> None:
        for worker in self._workers:
            worker.is_retiring = True
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()

    # What workers ask for, in other threads.

    def _admit(self, worker: WorkerProcess, connection: Connection, setup: Setup) -> None:
        """Set a worker up, and let it accept connections once it has loaded what the others serve."""
        try:
            connection.send(setup)
            worker.channel.start()
            worker.channel.call(Connect())
            while not self._join(worker):
                time.sleep(self._settings.poll_interval_s)
            worker.channel.call(Accept())
        except (ConnectionError, ChannelClosed):
            pass  # it has ended, which the main thread notices
        except Exception:
            logger.exception("%s could not be admitted; it is replaced", worker)
            worker.process.kill()

    def _join(self, worker: WorkerProcess) -> bool:
        try:
            self._members.join(worker)
        except JoinFailed as failed:
            logger.error("%s cannot load what the others serve, and tries again: %s", worker, failed)
            if self._repository is not None and not any(other.is_serving for other in self._workers):
                self._repository.unload_failed(failed.path)
            return False
        return True

    def _handle(self, worker: WorkerProcess, message: Any) -> Any:
        """Handle a message of a worker; returns the reply, or a future of it."""
        match message:
            case Beat():
                worker.beat_s, worker.problem = time.monotonic(), message.problem
            case Serving():
                worker.serving_since_s = time.monotonic()
                logger.info("%s serves", worker)
            case Failed():
                worker.failure = message.reason
            case Push():
                worker.snapshot = message.snapshot
            case Released():
                self._tasks.submit(self._members.release, worker, message.load)
            case ReadOthers():
                return self._tasks.submit(self._read_others, worker, message.known)
            case Reload() | LoadModel() | UnloadModel():
                return self._tasks.submit(self._change_models, message)
        return None

    def _change_models(self, message: Reload | LoadModel | UnloadModel) -> None:
        repository = self._repository
        assert repository is not None  # with --remote, workers refuse these by themselves
        match message:
            case Reload():
                repository.reload(message.configs)
            case LoadModel():
                repository.load_model(message.name)
            case UnloadModel():
                repository.unload_model(message.name)

    def _read_others(self, reader: WorkerProcess, known: frozenset[tuple[str, int | None]] | None) -> list[Snapshot]:
        others = [worker for worker in tuple(self._workers) if worker is not reader and worker.is_serving]
        asked = [(worker, worker.post(TakeSnapshot(forget=known is not None))) for worker in others]
        until_s = time.monotonic() + SNAPSHOT_TIMEOUT_S
        for worker, future in asked:
            with contextlib.suppress(ChannelClosed, TimeoutError):
                worker.snapshot = future.result(max(0.0, until_s - time.monotonic()))
        with self._metrics_lock:
            if known is not None:
                self._ended.forget(set(known))
            running = [worker.snapshot for worker in tuple(self._workers) if worker is not reader]
            return [*running, self._ended.snapshot, Snapshot(families=self._own_metrics())]

    def _own_metrics(self) -> list[Any]:
        serving = sum(worker.is_serving for worker in tuple(self._workers))
        return [
            GaugeMetricFamily("serving_workers", "Workers that serve.", value=serving),
            CounterMetricFamily("serving_worker_restarts", "Workers that were started again.", value=self._restarts),
        ]

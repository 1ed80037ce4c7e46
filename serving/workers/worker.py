"""A worker: the service in a process that a supervisor has started, on sockets that it shares with others."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from typing_extensions import override

from serving.api.flask_app import ServingApp
from serving.app import make_app
from serving.errors import StartupError
from serving.greenlets import lower_priority, run_blocking
from serving.inference.repository import ModelRepository, ModelVersion
from serving.inference.statistics import Statistics
from serving.metrics.models import find_known
from serving.metrics.snapshot import Snapshot
from serving.process import configure_logging, exit_process, import_tensorflow
from serving.process_memory import keep_freed_memory
from serving.request_log import RequestLog
from serving.server import ServerRun, read_certificates
from serving.workers.channel import Channel, ChannelClosed
from serving.workers.follower import FollowingRepository
from serving.workers.messages import (
    Accept,
    Apply,
    Beat,
    Connect,
    Drop,
    Failed,
    Load,
    Push,
    ReadOthers,
    Retire,
    Serving,
    Setup,
    TakeSnapshot,
    WarmUpAgain,
)
from serving.workers.sockets import ConnectionTable, count_connections, leave_port

logger = logging.getLogger("serving")

BEAT_S = 1.0  # between two signs of life
PUSH_S = 2.0  # between two snapshots of the metrics: what a killed worker counted since is lost
READ_OTHERS_TIMEOUT_S = 5.0
AGE_JITTER = 1.1  # of gRPC: the age of a connection is up to a tenth more
LEAVE_INTERVAL_S = 0.2  # between two checks whether the clients of gRPC have gone

PR_SET_PDEATHSIG = 1  # Linux


class Worker:
    """One worker, from its setup to its end.

    Args:
        connection: to the supervisor, the setup already read.
        setup: of this worker.
        listener: the listening socket of HTTP that all workers share.
        table: the number of connections of all workers.
    """

    def __init__(self, connection: Connection, setup: Setup, listener: socket.socket, table: ConnectionTable) -> None:
        self._setup = setup
        self._listener = listener
        self._table = table
        self._channel = Channel(connection, self._handle, on_close=lambda: exit_process(1))
        self._is_connected = False
        self._may_accept = threading.Event()
        # One thread, so that versions change in the order of the messages.
        self._models = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._tasks = ThreadPoolExecutor(2, thread_name_prefix="supervisor", initializer=lower_priority)
        self._repository: FollowingRepository | None = None

    def run(self) -> None:
        """Serve until the supervisor or a signal ends it."""
        settings = self._setup.settings
        if settings.remote:
            import_tensorflow()  # its messages are in TensorFlow's package
        log = RequestLog()
        self._app = app = make_app(settings, follow=self._follow, processes=self._setup.count, log=log.add)
        certificates = read_certificates(settings)
        app.metrics.read_others = self._read_others
        app.inference.read_statistics = lambda versions: run_blocking(self._read_statistics, versions)
        run = _WorkerRun(
            app,
            self._listener,
            certificates,
            channel=self._channel,
            balance=self._table.entry(self._setup.index),
            shared_age_s=self._setup.connection_age_s,
        )
        self._channel.start()
        self._is_connected = True
        self._may_accept.wait()
        threading.Thread(target=self._push_metrics, name="push", daemon=True).start()
        with log:
            run.run()
        with contextlib.suppress(ChannelClosed, TimeoutError):
            self._channel.call(Push(self._take_snapshot(forget=False)), timeout_s=READ_OTHERS_TIMEOUT_S)

    def fail(self, reason: str) -> None:
        """Tell the supervisor why the service cannot start."""
        if not self._is_connected:
            self._channel.start()
        with contextlib.suppress(ChannelClosed, TimeoutError):
            self._channel.call(Failed(reason), timeout_s=READ_OTHERS_TIMEOUT_S)

    def _follow(self, **parts: Any) -> ModelRepository:
        required = self._setup.settings.require_models
        self._repository = FollowingRepository(self._channel, required=required, **parts)
        return self._repository

    def _handle(self, message: Any) -> Any:
        repository = self._repository
        match message:
            case Connect():
                pass
            case Accept():
                self._may_accept.set()
            case TakeSnapshot():
                return self._tasks.submit(self._take_snapshot, forget=message.forget)
            case Retire():
                threading.Thread(target=self._retire, name="retire", daemon=True).start()
            case _ if repository is not None:
                return self._models.submit(self._change_models, repository, message)
        return None

    def _change_models(self, repository: FollowingRepository, message: Any) -> Any:
        match message:
            case Load():
                import_tensorflow()
                return repository.load_version(message)
            case WarmUpAgain():
                return repository.warm_up(message)
            case Drop():
                repository.drop(message.load)
            case Apply():
                repository.apply(message.state)
        return None

    def _retire(self) -> None:
        """End gracefully once the clients of gRPC have gone to other workers, as their connections age."""
        settings = self._setup.settings
        if port := settings.grpc_port:
            leave_port(port)
            until_s = time.monotonic() + self._setup.connection_age_s * AGE_JITTER + settings.drain_timeout_s
            while count_connections(port) and time.monotonic() < until_s:
                time.sleep(LEAVE_INTERVAL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    def _take_snapshot(self, *, forget: bool) -> Snapshot:
        if forget:
            self._app.metrics.forget()
        return self._app.metrics.take_snapshot(_own_statistics(self._app))

    def _push_metrics(self) -> None:
        lower_priority()
        while True:
            time.sleep(PUSH_S)
            try:
                self._channel.call(Push(self._take_snapshot(forget=False)))
            except ChannelClosed:
                return
            except Exception:  # the next one may succeed
                logger.exception("the metrics could not be collected")

    def _read_others(self, *, is_scrape: bool = True) -> Sequence[Snapshot]:
        known = frozenset(find_known(self._app.inference.repository)) if is_scrape else None
        others: Sequence[Snapshot] = self._channel.call(ReadOthers(known), timeout_s=READ_OTHERS_TIMEOUT_S)
        return others

    def _read_statistics(self, versions: Sequence[ModelVersion]) -> list[Statistics]:
        """Return the statistics of versions, in all workers together."""
        others = self._read_others(is_scrape=False)
        result = []
        for version in versions:
            total = Statistics()
            key = version.name, version.version
            for each in (version.statistics, *(other.statistics[key] for other in others if key in other.statistics)):
                total.add(each)
            result.append(total)
        return result


class _WorkerRun(ServerRun):
    """The run of a worker's server, which tells the supervisor that it works."""

    def __init__(self, *arguments: Any, channel: Channel, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._channel = channel
        self._beat_s = 0.0

    @override
    def observe_lag(self, seconds: float) -> None:
        super().observe_lag(seconds)
        now_s = time.monotonic()
        if now_s - self._beat_s >= BEAT_S:
            self._beat_s = now_s
            self._channel.post(Beat(self._app.liveness.problem))

    @override
    def before_load(self) -> None:
        super().before_load()
        self._channel.post(Serving())


def _own_statistics(app: ServingApp) -> dict[tuple[str, int], Statistics]:
    repository = app.inference.repository
    versions = [version for name in repository.names() for version in repository.available(name)]
    return {(version.name, version.version): version.statistics for version in versions}


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, even if it hangs then."""
    with contextlib.suppress(AttributeError):  # not Linux: the channel tells it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        exit_process(1)


def main() -> None:
    """Run a worker; the arguments are the supervisor's process ID, and the descriptors that it has passed on."""
    parent, channel, listener, table, size = map(int, sys.argv[1:])
    end_with_parent(parent)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the supervisor's
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    connection = Connection(channel)
    setup: Setup = connection.recv()
    settings = setup.settings
    keep_freed_memory()
    configure_logging(
        settings.log_level, log_format=settings.log_format, log_requests=settings.access_log, worker=setup.number
    )
    worker = Worker(connection, setup, socket.socket(fileno=listener), ConnectionTable(size, table))
    try:
        worker.run()
    except StartupError as error:
        worker.fail(str(error))
        exit_process(1)
    exit_process(0)


if __name__ == "__main__":
    main()

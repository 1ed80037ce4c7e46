"""The server: it listens, responds until a signal comes, and ends when the last response is out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from functools import partial
from typing import cast

import uvicorn
import uvloop

from serving.http.protocol import Connection, SharedState

logger = logging.getLogger("serving")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
BACKLOG = 2_048  # connections that wait to be accepted
RECEIVE_BUFFER_BYTES = 512 * 1024  # of the system, for each connection: bounds what clients can send ahead
RETRY_S = 0.05  # after a connection could not be accepted
# Where no more connections may be open, idle ones are closed to make room: those that have been silent for so long
# since they were made, and since their last response.
FRESH_S, IN_USE_S = 1.0, 10.0
SPARE_FILES = 40  # descriptors that models, log and gRPC need beside the connections
CONNECT_TIMEOUT_S = 1.0  # to take over a connection that was accepted
ACCEPT_FOR_S = 0.01  # then it is the turn of the connections that are open
LOG_INTERVAL_S = 5.0  # between two lines that say so
TICKS_PER_SECOND = 10  # uvicorn's
CHECK_INTERVAL_S = 1.0  # between two checks of the connections' time limits


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        OSError: the port is in use, or the address is not one of this machine's.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)  # accepted ones inherit it
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def run_http_server(
    make_limits: Callable[[], SharedState],
    listener: socket.socket,
    *,
    max_connections: int,
    drain_timeout_s: int,
    on_stop: Callable[[], None],
    on_second_signal: Callable[[int], None],
) -> None:
    """Respond to requests until SIGTERM, SIGINT or SIGHUP, then finish those in progress.

    Args:
        make_limits: makes what the connections share; called in the event loop's thread.
        listener: a socket that listens.
        max_connections: open at the same time; fewer where the process may not open as many files.
        drain_timeout_s: how long to wait for the last responses.
        on_stop: called once when a signal has come.
        on_second_signal: called with the number of a further signal; expected to end the process.
    """

    async def serve() -> None:
        server = Server(
            make_limits(),
            max_connections=max_connections,
            drain_timeout_s=drain_timeout_s,
            on_stop=on_stop,
            on_second_signal=on_second_signal,
        )
        await server.serve(sockets=[listener])

    uvloop.run(serve())


class Server(uvicorn.Server):
    """uvicorn's server with our signals, limits on connections, and graceful shutdown."""

    def __init__(
        self,
        limits: SharedState,
        *,
        max_connections: int,
        drain_timeout_s: int,
        on_stop: Callable[[], None],
        on_second_signal: Callable[[int], None],
    ) -> None:
        config = uvicorn.Config(
            app=_no_asgi_app, ws="none", lifespan="off", log_config=None, access_log=False, proxy_headers=False
        )
        super().__init__(config)
        self.limits = limits
        self._max_connections = min(max_connections, allowed_connections())
        self._drain_timeout_s = drain_timeout_s
        self._on_stop = on_stop
        self._on_second_signal = on_second_signal
        self._checked_s = math.inf  # when the connections' time limits were last checked

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        assert sockets
        (listener,) = sockets
        make_protocol = partial(Connection, self.config, self.server_state, self.limits)
        self._acceptor = Acceptor(
            listener,
            make_protocol,
            self._close_longest_idle,
            may_accept=lambda: self._connections < self._max_connections,
        )
        self.started = True

    @property
    def _connections(self) -> int:
        return len(self.server_state.connections) + self._acceptor.pending

    async def on_tick(self, counter: int) -> bool:
        """Keep time: called ten times a second."""
        if counter % TICKS_PER_SECOND == 0:
            self.limits.date_header = f"date: {formatdate(usegmt=True)}\r\n\r\n"
            self._check_timeouts()
        return self.should_exit

    def _check_timeouts(self) -> None:
        now_s = asyncio.get_running_loop().time()
        late_s = max(0.0, now_s - self._checked_s - CHECK_INTERVAL_S)
        self._checked_s = now_s
        for connection in cast(tuple[Connection, ...], tuple(self.server_state.connections)):
            try:
                connection.check_timeouts(now_s, late_s)
            except Exception:  # the time limits of the others hold all the same
                logger.exception("a connection's time limits could not be checked")
                connection.transport.abort()

    def _close_longest_idle(self) -> bool:
        """Make room for another connection; returns whether one could be closed."""
        now_s = asyncio.get_running_loop().time()
        idle = [
            connection
            for connection in cast(set[Connection], self.server_state.connections)
            if connection.is_idle
            and not connection.transport.is_closing()
            and now_s - connection.idle_since_s > (IN_USE_S if connection.has_responded else FRESH_S)
        ]
        if not idle:
            return False
        idle.sort(key=lambda connection: (connection.has_responded, connection.idle_since_s))
        for connection in idle[: max(1, len(idle) // 10)]:
            connection.transport.abort()
        return True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002
        """Finish the requests that were received, and close all connections."""
        loop = asyncio.get_running_loop()
        self._on_stop()
        self._acceptor.close()
        self.limits.is_stopping = True
        for connection in tuple(self.server_state.connections):
            connection.shutdown()
        deadline_s = loop.time() + self._drain_timeout_s
        while self.server_state.connections and loop.time() < deadline_s:
            await asyncio.sleep(0.02)
            if loop.time() - self._checked_s >= CHECK_INTERVAL_S:
                self._check_timeouts()
        if unfinished := len(self.server_state.connections):
            logger.error("gave up on %d requests after %d s", unfinished, self._drain_timeout_s)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at the first signal; at the second, at once."""
        loop = asyncio.get_running_loop()

        def stop(number: int) -> None:
            if self.should_exit:
                self._on_second_signal(number)
            self.should_exit = True

        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                loop.add_signal_handler(number, stop, number)
        yield


class Acceptor:
    """Accepts connections, as many in an iteration of the event loop as fit into ACCEPT_FOR_S.

    The loop's own servers accept one per iteration, and iterations are long when many requests come: the last of 256
    new connections would wait for seconds. Without an end, clients that connect and disconnect as fast as they are
    accepted would stop the loop.

    Args:
        listener: a socket that listens; closed with the acceptor.
        make_protocol: makes the protocol of a connection.
        make_room: called where no more connections may be open; returns whether one was closed.
        may_accept: whether another connection may be open.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        make_room: Callable[[], bool] = lambda: False,
        *,
        may_accept: Callable[[], bool] = lambda: True,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._make_protocol = make_protocol
        self._make_room = make_room
        self._may_accept = may_accept
        self._tasks: set[asyncio.Task[object]] = set()  # the loop itself keeps no hold of them
        self._logged_s = -LOG_INTERVAL_S
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    @property
    def pending(self) -> int:
        """Connections that are accepted and have no protocol yet."""
        return len(self._tasks)

    def _accept(self) -> None:
        until_s = time.monotonic() + ACCEPT_FOR_S
        while time.monotonic() < until_s:
            if not self._may_accept() and not self._make_room():
                self._pause("the most connections are open that may be")
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:
                continue  # it has been reset already
            except OSError as error:  # no more files, or no memory: what is open goes on
                if not self._make_room():
                    self._pause(error.strerror or str(error))
                    return
                self._pause_until_closed()
                return
            try:
                connection.getpeername()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError:  # it has been reset already
                connection.close()
                continue
            task = self._loop.create_task(self._connect(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            # uvloop waits for ever for a connection that is reset just now.
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except (OSError, TimeoutError):  # it has been reset
            connection.close()

    def _pause(self, reason: str) -> None:
        now_s = self._loop.time()
        if now_s - self._logged_s > LOG_INTERVAL_S:
            self._logged_s = now_s
            logger.error("cannot take more connections for now: %s", reason)
        self._loop.remove_reader(self._listener)
        self._loop.call_later(RETRY_S, self._resume)

    def _pause_until_closed(self) -> None:
        self._loop.remove_reader(self._listener)
        self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Accept no more."""
        self._loop.remove_reader(self._listener)
        self._listener.close()


def allowed_connections() -> int:
    """Raise the limit on open files as far as allowed; returns how many connections it leaves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft == resource.RLIM_INFINITY:
        return 1_000_000
    return max(8, soft - SPARE_FILES)


async def _no_asgi_app(scope: object, receive: object, send: object) -> None:  # noqa: ARG001
    raise AssertionError("connections call the WSGI application themselves")

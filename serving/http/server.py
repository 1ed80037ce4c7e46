"""The HTTP server: accepts connections, enforces their limits, and shuts down gracefully on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import resource
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from functools import partial
from typing import Protocol, cast

import uvicorn
from typing_extensions import override

from serving.http.handshake import Handshakes
from serving.http.protocol import CLOSE_IDLE_AFTER_S, Connection, SharedState

logger = logging.getLogger("serving")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
BACKLOG = 2_048
RECEIVE_BUFFER_BYTES = 512 * 1024  # SO_RCVBUF of each connection: limits what clients can send ahead
RETRY_S = 0.05  # after a connection could not be accepted
# At the connection limit, idle connections are closed to make room: after this idle time since they were opened, or
# since their last response.
FRESH_S, IN_USE_S = 1.0, 10.0
SPARE_FILES = 40  # file descriptors for models, log and gRPC
CONNECT_TIMEOUT_S = 1.0  # to create the transport of an accepted connection
ACCEPT_FOR_S = 0.01  # per iteration of the event loop
LOG_INTERVAL_S = 5.0  # between two log lines about refused connections
TICKS_PER_SECOND = 10  # of uvicorn's main loop
CHECK_INTERVAL_S = 1.0  # between two checks of the connections' timeouts
YIELD_S = 0.002  # for which a process with more connections than others leaves new ones to them


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises OSError if the port is in use or the address is not one of this machine's."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)  # inherited by connections
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


async def _not_called(scope: object, receive: object, send: object) -> None:
    """Stand in for an ASGI application: connections call the WSGI application themselves."""


class Balance(Protocol):
    """Divides new connections between processes that accept from the same listening socket."""

    def should_accept(self, connections: int) -> bool:
        """Return False if another process has fewer connections; `connections` is the number of this one."""

    def stop(self) -> None:
        """Tell the others that this process accepts no more."""


class Server(uvicorn.Server):
    """uvicorn's server with a connection limit; `run` serves requests until SIGTERM, SIGINT or SIGHUP.

    Its graceful shutdown finishes in-flight requests.

    Args:
        make_shared: makes the state shared by the connections; called in the event-loop thread.
        max_connections: open at the same time; fewer if the process may open fewer files.
        drain_timeout_s: how long a graceful shutdown waits for in-flight requests.
        on_stop: called once on the first signal.
        on_lag: called ten times a second with the seconds by which a timer of the event loop was late.
        on_second_signal: called with the number of the second signal; expected to end the process.
        ssl_context: for HTTPS: returns the context of the current certificate, called for each connection.
        balance: where other processes accept from the same listening socket.
    """

    shared: SharedState

    def __init__(
        self,
        make_shared: Callable[[], SharedState],
        *,
        max_connections: int,
        drain_timeout_s: int,
        on_stop: Callable[[], None],
        on_second_signal: Callable[[int], None],
        ssl_context: Callable[[], ssl.SSLContext] | None = None,
        on_lag: Callable[[float], None] = lambda _: None,
        balance: Balance | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(_not_called, loop="uvloop", ws="none", lifespan="off", log_config=None, access_log=False)
        )
        self._make_shared = make_shared
        self.max_connections = min(max_connections, allowed_connections())
        self._drain_timeout_s = drain_timeout_s
        self._on_stop = on_stop
        self._on_second_signal = on_second_signal
        self._ssl_context = ssl_context
        self._on_lag = on_lag
        self._balance = balance
        self._ticked_s = math.inf
        self._checked_s = math.inf  # last check of the connections' timeouts

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets
        self.shared = self._make_shared()
        balance = self._balance
        self._acceptor = Acceptor(
            sockets[0],
            partial(Connection, self.config, self.server_state, self.shared),
            self._close_longest_idle,
            may_accept=lambda: self.connections < self.max_connections,
            should_accept=lambda: balance is None or balance.should_accept(self.connections),
            ssl_context=self._ssl_context,
        )
        self.started = True

    @property
    def connections(self) -> int:
        """The number of open connections."""
        if not self.started:
            return 0
        return len(self.server_state.connections) + len(self._acceptor.connecting)

    @override
    async def on_tick(self, counter: int) -> bool:
        now_s = asyncio.get_running_loop().time()
        self._on_lag(max(0.0, now_s - self._ticked_s - 1 / TICKS_PER_SECOND))
        self._ticked_s = now_s
        if self._balance is not None:
            self._balance.should_accept(self.connections)  # tells the others how many there are
        if counter % TICKS_PER_SECOND == 0:
            self.shared.date_header = f"date: {formatdate(usegmt=True)}\r\n\r\n"
            self._check_timeouts()
        return self.should_exit

    def _check_timeouts(self) -> None:
        now_s = asyncio.get_running_loop().time()
        late_s = max(0.0, now_s - self._checked_s - CHECK_INTERVAL_S)
        self._checked_s = now_s
        for connection in cast(tuple[Connection, ...], tuple(self.server_state.connections)):
            try:
                connection.check_timeouts(now_s, late_s)
            except Exception:  # a bug; the other connections are still checked
                logger.exception("checking the timeouts of a connection failed")
                connection.transport.abort()

    def _close_longest_idle(self) -> bool:
        """Close idle connections to make room for a new one; returns whether any could be closed."""
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

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Graceful shutdown: finish in-flight requests, then close all connections."""
        loop = asyncio.get_running_loop()
        self._on_stop()
        self._acceptor.close()
        if self._balance is not None:
            self._balance.stop()
        self.shared.is_stopping = True
        for connection in tuple(self.server_state.connections):
            connection.shutdown()
        now_s = loop.time()
        handshakes_until_s, deadline_s = now_s + CLOSE_IDLE_AFTER_S, now_s + self._drain_timeout_s
        while (
            self.server_state.connections or (self._acceptor.connecting and loop.time() < handshakes_until_s)
        ) and loop.time() < deadline_s:
            await asyncio.sleep(0.02)
            if loop.time() - self._checked_s >= CHECK_INTERVAL_S:
                self._check_timeouts()
        if unfinished := len(self.server_state.connections):
            logger.error(
                "graceful shutdown timed out after %d s, %d requests unfinished", self._drain_timeout_s, unfinished
            )

    @override
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Shut down gracefully on the first signal, and immediately on the second."""
        loop = asyncio.get_running_loop()

        def stop(number: int) -> None:
            if self.should_exit:
                self._on_second_signal(number)
            self.should_exit = True

        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                loop.add_signal_handler(number, stop, number)
        yield


class Acceptor:
    """Accepts connections for up to ACCEPT_FOR_S per iteration of the event loop.

    asyncio servers accept one connection per iteration, and iterations are long under load: the last of 256 new
    connections would wait for seconds. Without a time limit, clients that connect and disconnect quickly would block
    the event loop.

    Args:
        listener: a listening socket; closed with the acceptor.
        make_protocol: makes the protocol of a connection.
        make_room: called at the connection limit; returns whether a connection was closed.
        may_accept: returns whether the number of connections is below the limit.
        should_accept: returns whether other processes should not take the next connection instead.
        ssl_context: see `Server`.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        make_room: Callable[[], bool] = lambda: False,
        *,
        may_accept: Callable[[], bool] = lambda: True,
        should_accept: Callable[[], bool] = lambda: True,
        ssl_context: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._make_protocol = make_protocol
        self._make_room = make_room
        self._may_accept = may_accept
        self._should_accept = should_accept
        self._has_yielded = False
        self._handshakes = Handshakes(ssl_context, make_protocol) if ssl_context else None
        # Accepted connections that have no transport yet, oldest first, with the time that they were accepted.
        self.connecting: dict[asyncio.Task[None], float] = {}
        self._logged_s = -LOG_INTERVAL_S
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def _accept(self) -> None:
        until_s = time.monotonic() + ACCEPT_FOR_S
        while time.monotonic() < until_s:
            if not self._may_accept() and not self._close_oldest_handshake() and not self._make_room():
                self._pause("the connection limit is reached")
                return
            if not self._should_accept() and not self._has_yielded:
                self._has_yielded = True  # once: the others may be hung
                self._stop_reading(YIELD_S)
                return
            self._has_yielded = False
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:
                continue  # reset by the client
            except OSError as error:  # out of file descriptors or memory
                self._pause(None if self._make_room() else error.strerror or str(error))
                return
            task = self._loop.create_task(self._connect(connection))
            self.connecting[task] = self._loop.time()
            task.add_done_callback(lambda task: self.connecting.pop(task, None))

    def _close_oldest_handshake(self) -> bool:
        """Close the oldest connection without a transport to make room; returns False if all are recent."""
        for task, accepted_s in self.connecting.items():
            if self._loop.time() - accepted_s < FRESH_S:
                break
            del self.connecting[task]
            task.cancel()
            return True
        return False

    async def _connect(self, connection: socket.socket) -> None:
        try:
            connection.getpeername()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
            if self._handshakes:
                await self._handshakes.connect(connection)
                return
            # uvloop never returns if the connection is reset meanwhile.
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except (OSError, TimeoutError):  # reset by the client; SSLError is an OSError
            connection.close()
        except asyncio.CancelledError:  # by `_close_oldest_handshake`
            connection.close()
            raise

    def _pause(self, reason: str | None) -> None:
        """Stop accepting for RETRY_S; without a reason until the connections that were aborted are closed."""
        now_s = self._loop.time()
        if reason and now_s - self._logged_s > LOG_INTERVAL_S:
            self._logged_s = now_s
            logger.error("cannot accept connections: %s", reason)
        self._stop_reading(RETRY_S if reason else 0)

    def _stop_reading(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Stop accepting connections."""
        self._loop.remove_reader(self._listener)
        self._listener.close()


def allowed_connections() -> int:
    """Raise the limit on open files to its maximum; returns how many connections it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return 1_000_000 if soft == resource.RLIM_INFINITY else max(8, soft - SPARE_FILES)

"""Open-loop load generator: requests are sent when they are due, without waiting for earlier responses.

Latencies count from when a request was due, so a server that stops for a second delays all requests due in it (no
coordinated omission). One thread sends and receives over non-blocking sockets, without an event loop's overhead: about
20 us a request. What it adds to a latency itself is reported as its lag: the time from when a request was due until it
was sent.
"""

from __future__ import annotations

import gc
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np

from benchmarks.load import Measured, Target

OPEN_AT_FIRST = 32  # connections; more are opened when all wait for their responses
LAST_RESPONSE_S = 30.0  # after the last request was due
# Bars of `kept_up`: the lag's p99, in seconds and as a share of the latency's p99.
MAX_LAG_S, MAX_LAG_SHARE = 5e-4, 0.05
_RECEIVE_BYTES = 65_536


@dataclass(frozen=True)
class OpenLoop:
    """What became of the requests of one round: an entry for each, in the order in which they were due."""

    due_s: np.ndarray  # on the clock of time.perf_counter
    lags_s: np.ndarray  # from when it was due until it was sent
    latencies_s: np.ndarray  # from when it was due until its response; infinity if there was none
    failed: np.ndarray  # bool: no response, or another status than 200

    @property
    def kept_up(self) -> bool:
        """Whether the generator sent on time: otherwise the latencies are its own, and not the server's."""
        lag_s, latency_s = np.percentile(self.lags_s, 99), np.percentile(self.latencies_s, 99)
        return bool(lag_s <= max(MAX_LAG_S, MAX_LAG_SHARE * latency_s))

    def summarize(self) -> Measured:
        ended_s = np.max(self.due_s + self.latencies_s, initial=self.due_s[-1], where=np.isfinite(self.latencies_s))
        p50_s, p99_s = np.percentile(self.latencies_s, [50, 99])
        seconds = float(ended_s - self.due_s[0])
        return Measured(len(self.due_s), seconds, p50_s * 1e3, p99_s * 1e3, int(self.failed.sum()))


def draw_poisson(rng: np.random.Generator, *, requests_per_s: float, seconds: float) -> np.ndarray:
    """Return when the requests of independent clients are due, in seconds from 0."""
    count = rng.poisson(requests_per_s * seconds)
    return np.sort(rng.uniform(0, seconds, max(1, count)))


def run_open_loop(target: Target, *, requests_per_s: float, seconds: float) -> Measured:
    """Send requests at a constant rate, from a process that shares its cores with the server."""
    due_s = np.arange(max(1, int(requests_per_s * seconds))) / requests_per_s
    return send_on_time(target, due_s, pause_s=5e-5).summarize()


def send_on_time(target: Target, due_s: Sequence[float] | np.ndarray, *, pause_s: float = 0.0) -> OpenLoop:
    """Send a request at each of these times, which count from the call.

    Args:
        target: over HTTP/1.1; its bodies are sent in turn.
        due_s: ascending.
        pause_s: how long it sleeps when nothing is due and nothing has arrived. 0 on a core of its own: it polls, and
            no response waits until the core has woken up.
    """
    generator = _Generator(target, np.asarray(due_s, dtype=float))
    gc.collect()
    gc.disable()
    try:
        generator.run(pause_s)
    finally:
        gc.enable()
        generator.close()
    return generator.result()


class _Connection:
    """A connection, the request that it waits for, and what has arrived of the response."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.request = -1
        self.unsent = b""
        self.received = b""

    def receive(self) -> bytes | None:
        """Return the head of the response when all of it has arrived, else None.

        Raises:
            OSError: the server has closed the connection.
        """
        data = self.socket.recv(_RECEIVE_BYTES)
        if not data:
            raise ConnectionResetError("the server has closed the connection")
        self.received += data
        head, separator, body = self.received.partition(b"\r\n\r\n")
        if not separator:
            return None
        length = int(head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0] or 0)
        if len(body) < length:
            return None
        self.received = b""
        return head

    def send(self) -> None:
        """Send what is unsent, as much as the socket takes."""
        try:
            sent = self.socket.send(self.unsent)
        except BlockingIOError:
            return
        self.unsent = self.unsent[sent:]


class _Generator:
    def __init__(self, target: Target, due_s: np.ndarray) -> None:
        url = urlsplit(target.url)
        assert url.hostname
        assert url.port
        self._address = (url.hostname, url.port)
        headers = {"Host": f"{url.hostname}:{url.port}", **target.headers}
        head = f"POST {url.path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._messages = [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in target.bodies]
        self._due_s = due_s
        self._sent_s = np.full(len(due_s), np.inf)
        self._responded_s = np.full(len(due_s), np.inf)
        self._failed = np.ones(len(due_s), dtype=bool)
        self._poll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._idle: list[_Connection] = []
        self._waiting = 0
        for _ in range(min(OPEN_AT_FIRST, len(due_s))):
            self._idle.append(self._connect())

    def run(self, pause_s: float) -> None:
        number, count = 0, len(self._due_s)
        self._due_s = self._due_s + time.perf_counter()
        due_s = self._due_s.tolist()
        give_up_s = due_s[-1] + LAST_RESPONSE_S
        while number < count or self._waiting:
            now_s = time.perf_counter()
            while number < count and due_s[number] <= now_s:
                self._send(number)
                number += 1
            events = self._poll.poll(0)
            for descriptor, event in events:
                self._handle(self._connections[descriptor], event)
            if not events and now_s > give_up_s:
                return
            if pause_s and not events and (number == count or due_s[number] - now_s > pause_s):
                time.sleep(pause_s)

    def result(self) -> OpenLoop:
        lags_s, latencies_s = self._sent_s - self._due_s, self._responded_s - self._due_s
        return OpenLoop(self._due_s, lags_s, latencies_s, self._failed)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.socket.close()
        self._poll.close()

    def _connect(self) -> _Connection:
        connection = _Connection(self._address)
        self._connections[connection.socket.fileno()] = connection
        self._poll.register(connection.socket, select.EPOLLIN)
        return connection

    def _disconnect(self, connection: _Connection) -> None:
        self._poll.unregister(connection.socket)
        del self._connections[connection.socket.fileno()]
        connection.socket.close()

    def _send(self, number: int) -> None:
        self._sent_s[number] = time.perf_counter()
        try:
            connection = self._idle.pop() if self._idle else self._connect()
            connection.request = number
            connection.unsent = self._messages[number % len(self._messages)]
            connection.send()
        except OSError:
            return  # it has no response
        self._waiting += 1
        if connection.unsent:
            self._poll.modify(connection.socket, select.EPOLLIN | select.EPOLLOUT)

    def _handle(self, connection: _Connection, event: int) -> None:
        try:
            if event & select.EPOLLOUT:
                connection.send()
                if not connection.unsent:
                    self._poll.modify(connection.socket, select.EPOLLIN)
            head = connection.receive() if event & ~select.EPOLLOUT else None
        except OSError:
            self._disconnect(connection)
            if connection in self._idle:
                self._idle.remove(connection)
            else:
                self._waiting -= 1
            return
        if head is None:
            return
        self._responded_s[connection.request] = time.perf_counter()
        self._failed[connection.request] = not head.startswith(b"HTTP/1.1 200")
        self._waiting -= 1
        if b"connection: close" in head.lower():
            self._disconnect(connection)
        else:
            self._idle.append(connection)

"""The HTTP server: it listens, answers until a signal comes, and ends when the last answer is out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from functools import partial

import uvloop
from flask import Flask

from serving.http_connection import Connection, HttpLimits
from serving.settings import Settings

logger = logging.getLogger("serving")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
BACKLOG = 2_048  # connections that wait to be accepted
RETRY_S = 0.5  # after one could not be, as too many are open


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        OSError: the port is in use, or the address is not one of this machine's.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def run_http_server(app: Flask, settings: Settings, listener: socket.socket, *, on_stop: Callable[[], None]) -> None:
    """Answer requests with a Flask app until SIGTERM, SIGINT or SIGHUP, then those that are under way.

    Args:
        app: what answers.
        settings: limits, and how long to wait for the last answers.
        listener: a socket that listens.
        on_stop: called once when a signal has come.
    """
    uvloop.run(_serve(app, settings, listener, on_stop))


class Acceptor:
    """Takes connections, all that wait at once.

    The loop's own servers take one a turn, and turns are long when many requests come: the last of 256 new connections
    would wait for seconds.

    Args:
        listener: a socket that listens; closed with the acceptor.
        make_protocol: makes what a connection is handed to.
    """

    def __init__(self, listener: socket.socket, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._make_protocol = make_protocol
        self._tasks: set[asyncio.Task[object]] = set()  # the loop itself keeps no hold of them
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:
                continue  # it has gone already
            except OSError as error:  # no more files, or no memory: what is open goes on
                logger.error("cannot take more connections for now: %s", error.strerror)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(RETRY_S, self._accept_again)
                return
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = self._loop.create_task(self._loop.connect_accepted_socket(self._make_protocol, connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _accept_again(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Take no more."""
        self._loop.remove_reader(self._listener)
        self._listener.close()


async def _serve(app: Flask, settings: Settings, listener: socket.socket, on_stop: Callable[[], None]) -> None:
    shared = HttpLimits(
        app,
        max_body_bytes=settings.max_request_bytes,
        threads=settings.threads,
        access_log=settings.access_log,
    )
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            loop.add_signal_handler(number, stop.set)
    acceptor = Acceptor(listener, partial(Connection, shared))
    while not stop.is_set():
        for connection in tuple(shared.connections):
            connection.close_if_stalled(loop.time())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), timeout=1)
    on_stop()
    acceptor.close()
    shared.is_stopping = True
    deadline_s = loop.time() + settings.drain_timeout_s
    while shared.connections and loop.time() < deadline_s:
        for connection in tuple(shared.connections):
            connection.close_if_idle()
        await asyncio.sleep(0.02)
    if shared.connections:
        logger.error("gave up on %d requests after %d s", len(shared.connections), settings.drain_timeout_s)

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
    server = await loop.create_server(partial(Connection, shared), sock=listener, backlog=BACKLOG)
    while not stop.is_set():
        for connection in tuple(shared.connections):
            connection.close_if_stalled(loop.time())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), timeout=1)
    on_stop()
    server.close()
    shared.is_stopping = True
    deadline_s = loop.time() + settings.drain_timeout_s
    while shared.connections and loop.time() < deadline_s:
        for connection in tuple(shared.connections):
            connection.close_if_idle()
        await asyncio.sleep(0.02)
    if shared.connections:
        logger.error("gave up on %d requests after %d s", len(shared.connections), settings.drain_timeout_s)

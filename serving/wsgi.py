"""HTTP requests as WSGI sees them (PEP 3333): an environment for the application, and what it answers."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes

Environ = dict[str, Any]
WsgiApp = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]


@dataclass
class Reply:
    """What a WSGI application answered: "200 OK", the headers, and the whole body."""

    status: str
    headers: list[tuple[str, str]]
    body: bytes


def make_environ(
    *,
    method: str,
    target: bytes,
    version: str,
    headers: Iterable[tuple[bytes, bytes]],
    server: tuple[str, int],
    client: str,
) -> Environ:
    """Make the environment of a request without a body.

    Args:
        method: "GET".
        target: path and query as they stand in the request's first line, percent-encoded.
        version: "1.1".
        headers: names and values in the order they came. Those with a "_" in their name are passed over, as they
            would read like the ones with a "-".
        server: host and port that the request came to.
        client: the address that it came from.
    """
    path, _, query = target.partition(b"?")
    environ: Environ = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": (unquote_to_bytes(path) if b"%" in path else path).decode("latin-1"),
        "QUERY_STRING": query.decode("latin-1"),
        "SERVER_NAME": server[0],
        "SERVER_PORT": str(server[1]),
        "SERVER_PROTOCOL": "HTTP/" + version,
        "REMOTE_ADDR": client,
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.input_terminated": True,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    for name, value in headers:
        if key := _environ_key(name):
            text = value.decode("latin-1")
            environ[key] = f"{environ[key]},{text}" if key in environ else text
    return environ


def set_body(environ: Environ, body: bytes) -> None:
    """Give a request its body, whole."""
    environ["wsgi.input"] = io.BytesIO(body)
    environ["CONTENT_LENGTH"] = str(len(body))
    environ.pop("HTTP_TRANSFER_ENCODING", None)


def call_app(app: WsgiApp, environ: Environ) -> Reply:
    """Have the application answer; raises what it raises."""
    reply = Reply("500 INTERNAL SERVER ERROR", [], b"")

    def start_response(status: str, headers: list[tuple[str, str]], _: Any = None) -> None:
        reply.status, reply.headers = status, headers

    chunks = app(environ, start_response)
    try:
        reply.body = b"".join(chunks)
    finally:
        if close := getattr(chunks, "close", None):
            close()
    return reply


@lru_cache(maxsize=256)
def _environ_key(header: bytes) -> str:
    if b"_" in header:
        return ""
    key = header.decode("latin-1").upper().replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else "HTTP_" + key

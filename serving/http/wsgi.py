"""WSGI (PEP 3333): the environ of a request, the call of the application, and responses as bytes."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes

import orjson

from serving.errors import ServingError

Environ = dict[str, Any]

_REASONS = {
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    413: "Content Too Large",
    429: "Too Many Requests",
    503: "Service Unavailable",
}
WsgiApp = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]


@dataclass(slots=True)
class Response:
    """A WSGI application's response; `status` is like "200 OK"."""

    status: str
    headers: list[tuple[str, str]]
    body: bytes


def make_environ(scope: Mapping[str, Any]) -> Environ:
    """Make the environ of a request from its ASGI scope, which also has the raw request target as "target".

    Without its body, which `add_body` adds.

    Headers with "_" in their name are dropped: in an environ they cannot be distinguished from those with "-".
    """
    path: bytes = scope["raw_path"]
    host, port = scope["server"] or ("", 0)
    environ: Environ = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": "",
        "PATH_INFO": (unquote_to_bytes(path) if b"%" in path else path).decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "REQUEST_URI": scope["target"].decode("latin-1"),
        "SERVER_NAME": host,
        "SERVER_PORT": str(port),
        "SERVER_PROTOCOL": "HTTP/" + scope["http_version"],
        "REMOTE_ADDR": scope["client"][0] if scope["client"] else "",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope["scheme"],
        "wsgi.input_terminated": True,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    for name, value in scope["headers"]:
        if key := _environ_key(name):
            text = value.decode("latin-1")
            environ[key] = f"{environ[key]},{text}" if key in environ else text
    return environ


def add_body(environ: Environ, body: bytes, *, declared_bytes: int | None) -> None:
    """Add the body to an environ: empty, with its declared length, if it is too long."""
    environ["wsgi.input"] = io.BytesIO(body)
    if body:
        environ["CONTENT_LENGTH"] = str(len(body))
        environ.pop("HTTP_TRANSFER_ENCODING", None)
    elif declared_bytes is not None:
        environ["CONTENT_LENGTH"] = str(declared_bytes)


def call_app(app: WsgiApp, environ: Environ) -> Response:
    """Call the application and join its body; exceptions of the application propagate."""
    response = Response("500 INTERNAL SERVER ERROR", [], b"")

    def start_response(status: str, headers: list[tuple[str, str]], _: Any = None) -> None:
        response.status, response.headers = status, headers

    chunks = app(environ, start_response)
    try:
        response.body = b"".join(chunks)
    finally:
        if close := getattr(chunks, "close", None):
            close()
    return response


def encode_head(response: Response, date_header: str, *, connection: str | None) -> bytes:
    """Encode status line and headers: the application's, `Connection` unless None, and last `date_header`."""
    head = [f"HTTP/1.1 {response.status}\r\n"]
    has_length = False
    for name, value in response.headers:
        head.append(f"{name}: {value}\r\n")
        has_length = has_length or name == "Content-Length"
    if not has_length:
        head.append(f"content-length: {len(response.body)}\r\n")
    if connection:
        head.append(f"connection: {connection}\r\n")
    head.append(date_header)
    return "".join(head).encode("latin-1")


def error_response(status: str, message: str) -> Response:
    """Make a JSON error response; `status` is like "400 Bad Request"."""
    return Response(status, [("Content-Type", "application/json")], orjson.dumps({"error": message}))


def refusal_response(error: ServingError) -> Response:
    """Make the response to a request that was refused before it reached the application."""
    reason = _REASONS.get(error.status, "Error")
    response = error_response(f"{error.status} {reason}", str(error))
    if error.retry_after_s is not None:
        response.headers.append(("Retry-After", str(error.retry_after_s)))
    return response


@lru_cache(maxsize=256)
def _environ_key(header: bytes) -> str:
    if b"_" in header:
        return ""
    key = header.decode("latin-1").upper().replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else "HTTP_" + key

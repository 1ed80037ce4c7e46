"""HTTP/1.1 responses as bytes, and the JSON error responses of the server itself."""

from __future__ import annotations

import orjson

from serving.errors import ServingError
from serving.http.request import Request, RequestFault
from serving.http.wsgi import Response


def encode_head(request: Request, response: Response, *, date_header: str) -> bytes:
    """Encode status line and headers; `date_header` ends them."""
    head = [f"HTTP/1.1 {response.status}\r\n"]
    has_length = False
    for name, value in response.headers:
        head.append(f"{name}: {value}\r\n")
        has_length = has_length or name == "Content-Length"
    if not has_length:
        head.append(f"content-length: {len(response.body)}\r\n")
    if not request.keep_alive:
        head.append("connection: close\r\n")
    elif request.scope["http_version"] == "1.0":
        head.append("connection: keep-alive\r\n")
    head.append(date_header)
    return "".join(head).encode("latin-1")


def encode_fault(fault: RequestFault, *, has_body: bool) -> bytes:
    """Encode the whole response to a request that could not be parsed."""
    body = _error_body(str(fault))
    return b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        fault.status.encode(),
        len(body),
        body if has_body else b"",
    )


def error_response(status: str, message: str) -> Response:
    """Make a JSON error response; `status` is like "400 Bad Request"."""
    return Response(status, [("Content-Type", "application/json")], _error_body(message))


def serving_error_response(error: ServingError) -> Response:
    """Make the response to a request that was refused before it reached the application."""
    reason = {413: "Content Too Large", 503: "Service Unavailable"}.get(error.status, "Error")
    response = error_response(f"{error.status} {reason}", str(error))
    if error.retry_after_s is not None:
        response.headers.append(("Retry-After", str(error.retry_after_s)))
    return response


def _error_body(message: str) -> bytes:
    return orjson.dumps({"error": message})

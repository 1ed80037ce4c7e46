"""JSON responses and error responses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
from flask import Response

from serving.errors import ServingError


class PlainResponse(Response):
    """A response with a fast path for 200: no header is recomputed, and the server adds Content-Length.

    As the app's response class it also spares Flask from converting what views return.
    """

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        """Send the response, as a WSGI application."""
        if self.status_code != 200 or environ["REQUEST_METHOD"] == "HEAD" or not isinstance(self.response, list):
            return super().__call__(environ, start_response)
        start_response(self.status, list(self.headers))
        return self.response


def json_response(document: Any, *, status: int = 200) -> PlainResponse:
    """Return a document, which may hold numpy arrays and scalars, as a JSON response."""
    return encoded_response(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), status=status)


def encoded_response(text: bytes, *, status: int = 200) -> PlainResponse:
    """Return encoded JSON as a response."""
    return PlainResponse([text], status, content_type="application/json")


def error_response(error: ServingError) -> PlainResponse:
    """Return the JSON response for an error."""
    response = json_response(error.body(), status=error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response

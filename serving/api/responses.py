"""JSON responses, and the response to an error of the service."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
from flask import Response

from serving.errors import ServingError


class PlainResponse(Response):
    """A response that is sent without further work: the server adds the length.

    It is the app's response class, so Flask does not convert what views return.
    """

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        """Answer as a WSGI application."""
        if self.status_code != 200 or environ["REQUEST_METHOD"] == "HEAD" or not isinstance(self.response, list):
            return super().__call__(environ, start_response)
        start_response(self.status, list(self.headers))
        return self.response


def json_response(document: Any, *, status: int = 200) -> PlainResponse:
    """Make a response of what JSON can hold, and numpy's arrays and scalars."""
    return encoded_response(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), status=status)


def encoded_response(text: bytes, *, status: int = 200) -> PlainResponse:
    """Make a response of encoded JSON."""
    return PlainResponse([text], status, content_type="application/json")


def error_response(error: ServingError) -> PlainResponse:
    """Make the response to an error."""
    response = json_response(error.body(), status=error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response

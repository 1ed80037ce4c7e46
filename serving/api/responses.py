"""Responses that need nothing worked out when they are sent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
from flask import Response


class PlainResponse(Response):
    """A response that is sent as it is: the server adds the length.

    Views make their responses of this class, which is the app's: Flask would have to turn others into it.
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
    """Make a response of JSON that is written already."""
    return PlainResponse([text], status, content_type="application/json")

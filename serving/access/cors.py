"""CORS: lets pages of other origins call the service from a browser."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from serving.errors import StartupError

MAX_AGE_S = 600  # for which a browser may keep the response to a preflight request
ALLOWED_METHODS = "GET, HEAD, POST, OPTIONS"
EXPOSED_HEADERS = "Inference-Header-Content-Length, Retry-After, WWW-Authenticate, X-Request-Id"

_ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~ ,-]*")

Headers = list[tuple[str, str]]


class CorsPolicy:
    """The origins whose pages may call the service: exact ones such as `https://app.example.com`, or `*` for all.

    Cookies and passwords that a browser has stored are never accepted from other origins, so a page has to send its
    token itself.

    Raises:
        StartupError: an origin is neither.
    """

    def __init__(self, origins: Collection[str]) -> None:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise StartupError(
                    f"--cors-origin takes a scheme and a host in lower case, such as https://app.example.com or "
                    f"http://localhost:3000, without a path; or *, not {origin}"
                )
        self._origins = frozenset(origins)
        self._allows_all = "*" in origins

    def headers(self, origin: str | None) -> Headers:
        """Return the headers of a response to a request with this `Origin` header."""
        if self._allows_all:
            allowed: Headers = [("Access-Control-Allow-Origin", "*")]
        elif origin in self._origins:
            assert origin is not None
            allowed = [("Access-Control-Allow-Origin", origin), ("Vary", "Origin")]
        else:
            return [("Vary", "Origin")]
        return [*allowed, ("Access-Control-Expose-Headers", EXPOSED_HEADERS)]

    def preflight(self, environ: Mapping[str, Any]) -> Headers | None:
        """Return the headers of the response to a preflight request of an allowed origin; None for other requests."""
        origin = environ.get("HTTP_ORIGIN")
        if environ["REQUEST_METHOD"] != "OPTIONS" or "HTTP_ACCESS_CONTROL_REQUEST_METHOD" not in environ:
            return None
        if origin is None or not (self._allows_all or origin in self._origins):
            return None
        wanted = environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "")
        allowed = [("Access-Control-Allow-Methods", ALLOWED_METHODS), ("Access-Control-Max-Age", str(MAX_AGE_S))]
        if wanted and _HEADER_NAMES.fullmatch(wanted):
            allowed.append(("Access-Control-Allow-Headers", wanted))
        return [*self.headers(origin), *allowed]

"""Access control of HTTP, on the WSGI environ of a request: for our own server at the end of its headers."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from serving.access.cors import CorsPolicy
from serving.access.peers import PROXY_HEADERS, is_loopback, without_port
from serving.access.policy import METRICS_PATHS, OPEN_PATHS, AccessPolicy, scope_of_path
from serving.access.tokens import ADMIN
from serving.errors import ModelNotFound, PermissionDenied, RateLimited, ServingError, Unauthenticated
from serving.http.wsgi import Environ, Response, refusal_response

TOKEN_NAME = "serving.token_name"  # in the environ of an admitted request: str, "" without a token

_PROXY_KEYS = tuple("HTTP_" + name.upper().replace("-", "_") for name in PROXY_HEADERS)
_REALM = 'realm="serving"'


class HttpAccess:
    """Admits or refuses requests by their headers, and corrects their environ behind proxies and below a prefix.

    Args:
        policy: decides.
        cors: origins whose pages may call; None: none may.
        prefix: the path below which all routes are, such as "/models-api", or "".
        metrics_public: whether metrics need no token.
    """

    def __init__(self, policy: AccessPolicy, cors: CorsPolicy | None, *, prefix: str, metrics_public: bool) -> None:
        self._policy = policy
        self._cors = cors
        self._prefix = prefix
        self._open_paths = OPEN_PATHS | METRICS_PATHS if metrics_public else OPEN_PATHS

    def is_needed(self, *, allows_model_control: bool) -> bool:
        """Return whether any request to an app could be refused or changed, if its routes load models or do not."""
        return bool(
            self._policy.checks_every_call
            or self._policy.proxies.are_any
            or self._cors
            or self._prefix
            or allows_model_control
        )

    def list_refusals(self, path: str, method: str) -> tuple[type[ServingError], ...]:
        """Return the errors that callers can get instead of a route's own response; for /openapi.json."""
        if path in self._open_paths and method in ("GET", "HEAD"):
            return ()
        of_tokens = (Unauthenticated, PermissionDenied) if self._policy.has_tokens else ()
        return (*of_tokens, RateLimited) if self._policy.limits_rate else of_tokens

    def admit(self, environ: Environ) -> Response | None:
        """Return the response to a request that the application must not see; None if it may.

        In the environ, REMOTE_ADDR and wsgi.url_scheme become those of the client of a trusted proxy, the prefix moves
        to SCRIPT_NAME, and TOKEN_NAME is set.
        """
        if self._policy.proxies.are_any:
            self._find_client(environ)
        is_inside = not self._prefix or self._enter_prefix(environ)
        if self._cors and (headers := self._cors.preflight(environ)) is not None:
            return Response("200 OK", headers, b"")
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        response = None
        try:
            if path in self._open_paths and method in ("GET", "HEAD"):
                environ[TOKEN_NAME] = self._policy.identify(_read_credentials(environ)[0])
                return None
            environ[TOKEN_NAME] = self._authorize(environ, path)
            if not is_inside:
                raise ModelNotFound(f"there is nothing at {path}; all paths begin with {self._prefix}/")
            if self._prefix and not path:  # relative URLs in the page need the slash
                response = Response("308 Permanent Redirect", [("Location", f"{self._prefix}/")], b"")
        except ServingError as error:
            response = refusal_response(error)
            if error.status == 401:
                response.headers.append(("WWW-Authenticate", f"Bearer {_REALM}"))
                if "text/html" in environ.get("HTTP_ACCEPT", ""):  # a browser, which can only send passwords
                    response.headers.append(("WWW-Authenticate", f'Basic {_REALM}, charset="UTF-8"'))
        if response:
            self.decorate(environ, response)
        return response

    def decorate(self, environ: Environ, response: Response) -> None:
        """Add the headers that let pages of allowed origins read a response that the application has not made."""
        if self._cors:
            response.headers.extend(self._cors.headers(environ.get("HTTP_ORIGIN")))

    def _find_client(self, environ: Environ) -> None:
        peer = environ.get("REMOTE_ADDR", "")
        if not self._policy.proxies.trusts(peer):
            return
        environ["REMOTE_ADDR"] = self._policy.proxies.find_client(peer, environ.get("HTTP_X_FORWARDED_FOR", ""))
        scheme = environ.get("HTTP_X_FORWARDED_PROTO", "").rpartition(",")[2].strip().lower()
        if scheme in ("http", "https"):
            environ["wsgi.url_scheme"] = scheme

    def _enter_prefix(self, environ: Environ) -> bool:
        """Move the prefix from the path to SCRIPT_NAME; return False if it is missing where it is needed."""
        path, prefix = environ["PATH_INFO"], self._prefix
        if path == prefix or path.startswith(f"{prefix}/"):
            environ["SCRIPT_NAME"], environ["PATH_INFO"] = prefix, path[len(prefix) :]
            return True
        return path in OPEN_PATHS  # for probes, which call the process and not the proxy

    def _authorize(self, environ: Environ, path: str) -> str:
        credentials, is_password = _read_credentials(environ)
        if is_password and environ["REQUEST_METHOD"] not in ("GET", "HEAD") and _is_cross_origin(environ):
            raise PermissionDenied("a password that the browser has stored is not accepted from pages of other origins")
        scope = scope_of_path(path)
        return self._policy.admit(
            scope,
            credentials=credentials,
            address=environ.get("REMOTE_ADDR", ""),
            is_local=scope == ADMIN and _is_local(environ),
        )


def _read_credentials(environ: Environ) -> tuple[bytes, bool]:
    """Return the token in the Authorization header, and whether it is a password (which browsers can ask for)."""
    scheme, _, value = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    match scheme.lower():
        case "bearer":
            return value.strip().encode("latin-1"), False
        case "basic":
            try:
                return base64.b64decode(value.strip(), validate=True).partition(b":")[2], True
            except (binascii.Error, ValueError):
                return b"", True
    return b"", False


def _is_local(environ: Environ) -> bool:
    """Return whether a request is known to come from a program on this machine, and not from a page in its browser."""
    return (
        is_loopback(environ.get("REMOTE_ADDR", ""))
        and not any(key in environ for key in _PROXY_KEYS)
        and is_loopback(
            without_port(environ.get("HTTP_HOST", ""))
        )  # else a page whose host name was made to point here
        and not _is_cross_origin(environ)
    )


def _is_cross_origin(environ: Environ) -> bool:
    """Return whether a browser sent the request for a page of another origin."""
    if environ.get("HTTP_SEC_FETCH_SITE", "none") not in ("same-origin", "none"):
        return True
    origin: Any = environ.get("HTTP_ORIGIN")
    return origin is not None and origin.partition("://")[2] != environ.get("HTTP_HOST", "")

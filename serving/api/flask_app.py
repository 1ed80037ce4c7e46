"""`ServingApp`: Flask with the objects of the service, counted requests, and fast paths for URLs and responses."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from functools import cache
from io import BytesIO
from typing import Any, cast

import flask
import orjson
from flask import Flask, Request, Response, request, request_tearing_down
from flask.json.provider import JSONProvider
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.routing import MapAdapter, Rule

from serving.access.http import TOKEN_NAME, HttpAccess
from serving.access.policy import AccessPolicy
from serving.api.json_process import JsonProcess
from serving.api.operation import Operation
from serving.errors import ServingError
from serving.inference.liveness import Liveness
from serving.inference.service import InferenceService
from serving.memory import MemoryBudget, RequestMemory
from serving.metrics import Metrics
from serving.model_watcher import ModelWatcher
from serving.observer import RequestObserver
from serving.request_context import UNROUTED, RequestContext, current_request
from serving.settings import Settings

# Health checks, which come before other requests and do not wait for models.
URGENT_PATHS = frozenset((b"/healthz", b"/readyz", b"/v2/health/live", b"/v2/health/ready"))

MAX_KNOWN_PATHS = 256

RETRY_AFTER_S = 1  # of responses that name no time of their own


class BufferedRequest(Request):
    """A request whose body the HTTP server has read already (serving/http/wsgi.py): it is not read a second time."""

    def get_data(self, cache: bool = True, as_text: Any = False, parse_form_data: bool = False) -> Any:
        """Return the body, as `werkzeug.Request.get_data` does; raises RequestEntityTooLarge."""
        stream = self.environ["wsgi.input"]
        limit = self.max_content_length
        if isinstance(stream, BytesIO) and not parse_form_data:
            body = stream.getvalue()
            if limit is not None and max(len(body), int(self.environ.get("CONTENT_LENGTH") or 0)) > limit:
                raise RequestEntityTooLarge
        else:
            body = super().get_data(cache, parse_form_data=parse_form_data)
            # Werkzeug ends a body of unknown length at the limit, without a word.
            if len(body) == limit and self.environ.get("wsgi.input_terminated") and stream.read(1):
                raise RequestEntityTooLarge
        return body.decode(errors="replace") if as_text else body


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


class ServingApp(Flask):
    """The Flask app of a service, with the objects that its views use."""

    request_class = BufferedRequest
    response_class = PlainResponse

    def __init__(
        self,
        settings: Settings,
        *,
        inference: InferenceService,
        metrics: Metrics,
        observer: RequestObserver,
        liveness: Liveness,
        memory: MemoryBudget,
        policy: AccessPolicy,
    ) -> None:
        super().__init__("serving.api", static_folder=None)
        self.settings = settings
        self.inference = inference
        self.metrics = metrics
        self.observer = observer
        self.liveness = liveness
        self.memory = memory
        self.policy = policy
        self.access: HttpAccess | None = None  # None: every request is admitted
        self.watcher = ModelWatcher(inference.repository, memory, liveness, poll_interval_s=settings.poll_interval_s)
        self.loads_models = False  # True: the first request starts the watcher; False: the server does
        self.operations: list[Operation] = []  # describe the routes, for /openapi.json
        self.json_process = JsonProcess()
        self.json = OrjsonProvider(self)
        self.url_map.merge_slashes = False  # `//host/path` is not found, and never a redirect
        self.url_map.strict_slashes = False
        self.config["MAX_CONTENT_LENGTH"] = settings.max_request_bytes
        self._known_paths: dict[tuple[str, str], tuple[Rule, Mapping[str, Any]]] = {}

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Respond to a request as a WSGI application."""
        context = current_request.get()

        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            headers.append(("X-Request-ID", context.request_id))  # to Werkzeug's headers it would take 4 us
            return start_response(status, headers, *exc_info)

        if context.memory is not None:  # our own HTTP server has made the context
            _describe(context, environ)
            return self.wsgi_app(environ, start)
        memory = RequestMemory(self.memory)
        context = RequestContext(time.monotonic() + self.settings.request_timeout_s, memory=memory)
        refusal = self.access.admit(environ) if self.access else None
        _describe(context, environ)
        if refusal:
            context.status, context.route, context.shed_reason = refusal.status[:3], UNROUTED, refusal.shed_reason
            self.observer.report(context)
            start(refusal.status, refusal.headers)
            return [refusal.body]
        token = current_request.set(context)
        try:
            if self.loads_models:
                self._load_models(environ["PATH_INFO"].encode("latin-1"), context)
            return self.wsgi_app(environ, start)
        finally:
            current_request.reset(token)
            memory.release()

    def _load_models(self, path: bytes, context: RequestContext) -> None:
        """Load the models in this process at its first request: after a fork, where the server forks."""
        self.watcher.start()
        if path in URGENT_PATHS or self.watcher.wait_for_first_load(self.settings.request_timeout_s):
            self.loads_models = not self.watcher.has_tried
        context.deadline_s = time.monotonic() + self.settings.request_timeout_s

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Match by path and method alone, unless hosts or subdomains matter."""
        by_host = self.url_map.host_matching or self.subdomain_matching
        if request is None or by_host or self.config["SERVER_NAME"] or self.config["TRUSTED_HOSTS"]:
            return super().create_url_adapter(request)
        environ = request.environ
        adapter = KnownPaths(
            self.url_map,
            server_name=environ.get("HTTP_HOST") or environ["SERVER_NAME"],
            script_name=environ.get("SCRIPT_NAME") or "/",
            subdomain="",
            url_scheme=environ["wsgi.url_scheme"],
            path_info=request.path,
            default_method=request.method,
            query_args=environ.get("QUERY_STRING", ""),
        )
        adapter.known = self._known_paths
        return adapter

    def preprocess_request(self) -> ResponseReturnValue | None:
        """Begin the request, and call the hooks."""
        self.observer.begin(current_request.get(), request.environ)
        if self.before_request_funcs or self.url_value_preprocessors:
            return super().preprocess_request()
        return None

    def process_response(self, response: Response) -> Response:
        """Call the hooks, and note the status."""
        response = super().process_response(response)
        status = response.status_code
        if status in (429, 503) and "Retry-After" not in response.headers:
            response.headers["Retry-After"] = str(RETRY_AFTER_S)
        context = current_request.get()
        if not context.route:
            rule = request.url_rule
            context.route = _readable(rule.rule) if rule else "unmatched"
        context.status = str(status)
        return response

    def do_teardown_request(self, exc: BaseException | None = None) -> None:
        """End the request, and call the hooks."""
        self.observer.end(current_request.get())
        if self.teardown_request_funcs or request_tearing_down.receivers:
            super().do_teardown_request(exc)


@cache
def _readable(rule: str) -> str:
    """Return a rule without its converters: `<path:name>` is reported as `<name>`."""
    return re.sub("<[^:<>]+:", "<", rule)


def _describe(context: RequestContext, environ: Mapping[str, Any]) -> None:
    """Note what log and metrics report about a request."""
    context.method = environ["REQUEST_METHOD"]
    context.client = environ.get("REMOTE_ADDR", "")
    context.caller = environ.get(TOKEN_NAME, "")
    context.request_id = environ.get("HTTP_X_REQUEST_ID", "")


# Flask's proxy of the app, typed.
current_app = cast(ServingApp, flask.current_app)


def shows_details() -> bool:
    """Return whether the caller of an open route may see more than a status: with tokens, one that has sent a token."""
    return not current_app.policy.has_tokens or bool(current_request.get().caller)


class KnownPaths(MapAdapter):
    """Caches which rule matches a method and path: a service has few of them."""

    known: dict[tuple[str, str], tuple[Rule, Mapping[str, Any]]]  # the app's, for all its requests

    def match(self, *args: Any, **kwargs: Any) -> Any:
        """Return the rule and its arguments, as `MapAdapter.match` does."""
        if args or kwargs != {"return_rule": True}:  # not Flask's own call
            return super().match(*args, **kwargs)
        key = self.default_method, self.path_info
        found = self.known.get(key)
        if found is None:
            found = super().match(return_rule=True)
            if len(self.known) >= MAX_KNOWN_PATHS:
                self.known.clear()
            self.known[key] = found
        return found[0], dict(found[1])  # hooks may change the arguments


class OrjsonProvider(JSONProvider):
    """JSON by orjson; numpy's arrays and scalars included, so float32 keeps its own digits."""

    def dumps(self, obj: Any, **_: Any) -> str:
        """Return `obj` as JSON text."""
        return orjson.dumps(obj, option=orjson.OPT_SERIALIZE_NUMPY).decode()

    def loads(self, s: str | bytes, **_: Any) -> Any:
        """Return what the JSON text `s` says."""
        return orjson.loads(s)

    def response(self, *args: Any, **kwargs: Any) -> Response:
        """Return `args` or `kwargs` as a JSON response."""
        return json_response(self._prepare_response_obj(args, kwargs))


def json_response(document: Any, *, status: int = 200) -> PlainResponse:
    """Return a document, which may hold numpy arrays and scalars, as a JSON response."""
    return encoded_response(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), status=status)


def encoded_response(text: bytes, *, status: int = 200) -> PlainResponse:
    """Return encoded JSON as a response."""
    return PlainResponse([text], status, content_type="application/json")


def error_response(error: ServingError) -> PlainResponse:
    """Return the JSON response for an error, and note it if it is load shedding."""
    current_request.get().shed_reason = error.shed_reason
    response = json_response(error.body(), status=error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response

"""The spans of a request: one for the server, and parse, queue, model and render below it.

The server's span starts with the request, so that its ID can be logged and sent on. The others are made at the end of
the request, from timestamps. Names and attributes follow OpenTelemetry's semantic conventions.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.propagate import extract, inject
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from typing_extensions import override

from image_formats import __version__
from serving.inference.repository import ModelRepository, ModelVersion
from serving.inference.service import InferenceRequest, InferenceResult, InferenceService
from serving.metrics import Metrics
from serving.observer import Headers, RequestObserver
from serving.request_context import RequestContext, current_request

DEFAULT_SERVICE_NAME = "image-classifier-serving"
FLUSH_TIMEOUT_S = 2.0  # at shutdown; a collector that does not respond must not keep the process alive

# gRPC codes that are errors of the server, by the semantic conventions.
_SERVER_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}


class _HeaderGetter(Getter[Headers]):
    """Reads the headers of a WSGI environ or of gRPC metadata."""

    @override
    def get(self, carrier: Headers, key: str) -> list[str] | None:
        if isinstance(carrier, Mapping):
            value = carrier.get("HTTP_" + key.upper().replace("-", "_"))
            return None if value is None else [value]
        return [value for name, value in carrier if name == key and isinstance(value, str)] or None

    @override
    def keys(self, carrier: Headers) -> list[str]:
        return []


_getter = _HeaderGetter()


class Tracing:
    """Makes the spans and exports them in a thread of their own; a full queue drops spans.

    Args:
        exporter: "otlp" (over HTTP) or "console".
        remote: address of the remote server, or of several, separated by commas; or None.
    """

    def __init__(self, exporter: str, *, remote: str | None = None) -> None:
        names_service = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        )
        own = {} if names_service else {SERVICE_NAME: DEFAULT_SERVICE_NAME}
        self._provider = TracerProvider(  # sampling: OTEL_TRACES_SAMPLER
            resource=Resource.create({**own, "service.version": __version__}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(_make_exporter(exporter)))
        self._tracer = self._provider.get_tracer("serving", __version__)
        self._remote = remote

    def make_observer(self, metrics: Metrics, **options: Any) -> RequestObserver:
        """Return an observer that also traces requests."""
        return TracingObserver(self, metrics, **options)

    def make_inference(self, repository: ModelRepository, **options: Any) -> InferenceService:
        """Return an inference service that takes the timestamps for the spans."""
        return TracedInference(self, repository, **options)

    def begin(self, context: RequestContext, headers: Headers) -> None:
        """Start the server's span of a request, below the span that its headers name."""
        span = self._tracer.start_span(
            context.route or "HTTP",
            context=extract(headers, getter=_getter),
            kind=SpanKind.SERVER,
            start_time=time.time_ns() - int((time.perf_counter() - context.started_s) * 1e9),
        )
        context.span = span
        if (ids := span.get_span_context()).is_valid:
            context.trace_id = f"{ids.trace_id:032x}"
        if span.is_recording() and isinstance(headers, Mapping):
            span.set_attribute("http.request.method", headers["REQUEST_METHOD"])
            span.set_attribute("url.path", headers.get("PATH_INFO", ""))
            span.set_attribute("url.scheme", headers["wsgi.url_scheme"])

    def begin_call(self, context: RequestContext) -> Span | None:
        """Start the span of the remote call, if there is a remote server; its context goes into the call's metadata."""
        if self._remote is None or context.span is None:
            return None
        host, _, port = self._remote.rpartition(":") if "," not in self._remote else (self._remote, "", "")
        span = self._tracer.start_span(
            "tensorflow.serving.PredictionService/Predict",
            context=set_span_in_context(context.span),
            kind=SpanKind.CLIENT,
            attributes={
                "rpc.system.name": "grpc",
                "rpc.method": "tensorflow.serving.PredictionService/Predict",
                "server.address": host,
                **({"server.port": int(port)} if port.isdigit() else {}),
            },
        )
        metadata: dict[str, str] = {}
        inject(metadata, context=set_span_in_context(span))
        context.remote_metadata = tuple(metadata.items())
        return span

    def end(self, context: RequestContext) -> None:
        """End the server's span, with the spans of the request's parts below it."""
        span = context.span
        if not isinstance(span, SdkSpan) or not span.is_recording():  # not sampled
            return
        ended_s = time.perf_counter()
        self._add_parts(context, span, ended_s)
        status = context.status or "500"
        if context.protocol == "HTTP":
            name = f"{context.method or 'HTTP'} {context.route}"
            own: dict[str, Any] = {"http.route": context.route, "http.response.status_code": int(status)}
            is_error = int(status) >= 500
        else:
            name = context.route.lstrip("/")
            own = {"rpc.system.name": "grpc", "rpc.method": name, "rpc.response.status_code": status}
            is_error = status in _SERVER_FAULTS
        span.update_name(name)
        known = {
            "serving.model": context.model,
            "serving.version": context.version,
            "serving.rows": context.rows,
            "serving.request_id": context.request_id,
            "error.type": status if is_error else None,
        }
        span.set_attributes({**own, **{key: value for key, value in known.items() if value not in (None, "", 0)}})
        if is_error:
            span.set_status(Status(StatusCode.ERROR))
        span.end(_to_unix_ns(context, span, ended_s))

    def _add_parts(self, context: RequestContext, span: SdkSpan, ended_s: float) -> None:
        parsed_s = context.parsed_s
        if not parsed_s:
            return
        predicted_s = context.predicted_s or ended_s
        queued_until_s = min(parsed_s + context.queue_s, predicted_s)
        parts = [("parse", context.started_s, parsed_s), ("queue", parsed_s, queued_until_s)]
        if self._remote is None:  # otherwise the call has a span of its own
            # The parts of a long request overlap, so their sum may exceed the time.
            parts.append(("model", queued_until_s, min(queued_until_s + context.model_s, predicted_s)))
        parts.append(("render", predicted_s, ended_s))
        parent = set_span_in_context(span)
        for name, start_s, end_s in parts:
            if end_s > start_s:
                part = self._tracer.start_span(name, context=parent, start_time=_to_unix_ns(context, span, start_s))
                part.end(_to_unix_ns(context, span, end_s))

    def close(self) -> None:
        """Export the remaining spans, for at most `FLUSH_TIMEOUT_S`."""
        thread = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        thread.start()
        thread.join(FLUSH_TIMEOUT_S)


class TracingObserver(RequestObserver):
    """An observer that also traces requests."""

    def __init__(self, tracing: Tracing, metrics: Metrics, **options: Any) -> None:
        super().__init__(metrics, **options)
        self._tracing = tracing

    @override
    def begin(self, context: RequestContext, headers: Headers = ()) -> None:
        super().begin(context)
        self._tracing.begin(context, headers)

    @override
    def end(self, context: RequestContext) -> None:
        self._tracing.end(context)
        super().end(context)

    @override
    def close(self) -> None:
        self._tracing.close()


class TracedInference(InferenceService):
    """An inference service that takes the timestamps for the spans."""

    def __init__(self, tracing: Tracing, repository: ModelRepository, **options: Any) -> None:
        super().__init__(repository, **options)
        self._tracing = tracing

    @override
    def predict(self, version: ModelVersion, request: InferenceRequest) -> InferenceResult:
        context = current_request.get()
        context.parsed_s = context.parsed_s or time.perf_counter()
        call = self._tracing.begin_call(context)
        try:
            return super().predict(version, request)
        except Exception as error:
            if call is not None:
                call.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise
        finally:
            context.predicted_s = time.perf_counter()
            if call is not None:
                call.end()


def _make_exporter(kind: str) -> SpanExporter:
    if kind == "console":
        return ConsoleSpanExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _to_unix_ns(context: RequestContext, span: SdkSpan, counter_s: float) -> int:
    """Return a time of `time.perf_counter` as nanoseconds since 1970, by the start of the request's span."""
    return (span.start_time or 0) + int((counter_s - context.started_s) * 1e9)

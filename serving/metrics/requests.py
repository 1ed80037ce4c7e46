"""Metrics of requests, of HTTP and gRPC alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge

from serving.errors import SHED_REASONS
from serving.metrics.histogram import QUEUE_SECONDS, ROWS, SECONDS, Histogram
from serving.metrics.tensorflow_serving import PredictSeries, TensorFlowServingMetrics
from serving.request_context import RequestContext

_Key = tuple[str, str, int | None, str]  # route, model, version, status


@dataclass(frozen=True, slots=True)
class _Series:
    """The series that a request of one route, model, version and status changes."""

    count: Counter
    seconds: Histogram
    queue_seconds: Histogram | None  # these two of a model only
    rows: Histogram | None
    predict: PredictSeries | None  # of TensorFlow Serving's predict API only


class RequestMetrics:
    """Counts and times requests.

    The series of a request are found by one look-up: `Counter.labels` costs more than the observation itself.
    """

    def __init__(self, registry: CollectorRegistry, tensorflow_serving: TensorFlowServingMetrics) -> None:
        self._tensorflow_serving = tensorflow_serving
        self.in_flight = Gauge("serving_requests_in_flight", "In-flight requests.", registry=registry)
        self._requests = Counter(
            "serving_requests", "Completed requests.", ["route", "model", "status"], registry=registry
        )
        self._seconds = Histogram(
            "serving_request_seconds",
            "Time from the end of a request to its response.",
            ["route", "model", "version"],
            buckets=SECONDS,
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "serving_queue_seconds",
            "Time that a request waited for its first model call.",
            ["model"],
            buckets=QUEUE_SECONDS,
            registry=registry,
        )
        self.rows = Histogram(
            "serving_request_rows",
            "Rows of a predicted request: for an image classifier, images.",
            ["model"],
            buckets=ROWS,
            registry=registry,
        )
        self._shed = Counter(
            "serving_shed_requests", "Requests refused by load shedding.", ["reason"], registry=registry
        )
        for reason in SHED_REASONS:  # a rate needs the zero before the first one
            self._shed.labels(reason)
        self._series: dict[_Key, _Series] = {}
        self._stale: set[_Key] = set()  # at the last `forget`

    def observe(self, context: RequestContext, seconds: float) -> None:
        """Record a request that has ended; `context.model` is empty if it names no served model."""
        key = (context.route, context.model, context.version, context.status)
        series = self._series.get(key) or self._add_series(key)
        series.count.inc()
        series.seconds.observe(seconds)
        if context.queue_s and series.queue_seconds:
            series.queue_seconds.observe(context.queue_s)
        if context.model_s and series.rows:
            series.rows.observe(context.rows)
        if series.predict:
            series.predict.observe(seconds, context.model_s)
        if context.shed_reason:
            self._shed.labels(context.shed_reason).inc()

    def _add_series(self, key: _Key) -> _Series:
        route, model, version, status = key
        self._series[key] = series = _Series(
            self._requests.labels(route, model, status),
            self._seconds.labels(route, model, _label(version)),
            self.queue_seconds.labels(model) if model else None,
            self.rows.labels(model) if model else None,
            self._tensorflow_serving.predict_series(route, model, status),
        )
        return series

    def forget(self, is_known: Callable[[str, int | None], bool]) -> None:
        """Remove the series of versions and models that have gone, at the second scrape that finds them gone.

        So there is a scrape that has their last requests.

        Args:
            is_known: callable(model, version); False if the series can go. `version` is None for the model itself.
        """
        stale = {key for key in tuple(self._series) if key[1] and not is_known(key[1], key[2])}
        gone = stale & self._stale
        for key in gone:
            route, model, version, status = key
            self._series.pop(key, None)
            self._seconds.remove(route, model, _label(version))
            if not is_known(model, None):
                self._requests.remove(route, model, status)
                self.queue_seconds.remove(model)
                self.rows.remove(model)
                self._tensorflow_serving.forget(model)
        self._stale = stale - gone


def _label(version: int | None) -> str:
    return "" if version is None else str(version)

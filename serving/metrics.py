"""What Prometheus reads: this service's own metrics, and TensorFlow Serving's two under their names."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from itertools import accumulate

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString as format_bound  # noqa: N813

from serving.greenlets import lower_priority, wait_for
from serving.inference.repository import ModelRepository
from serving.inference.signatures import Predictor, Signature
from serving.memory import MemoryBudget

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
TFS_MICROSECONDS = tuple(10 * 1.8**step for step in range(33))

# The status labels of TensorFlow Serving, from the HTTP statuses it maps them to (http_server.cc).
TFS_STATUS = {
    200: "OK",
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}

# A gauge beside each counter that says when it began: twice the page, for nothing.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The metrics of one app, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.in_flight = Gauge("serving_requests_in_flight", "Requests being answered.", registry=self._registry)
        self._request_seconds = _Durations(
            "serving_request_seconds", "Time from a request's headers to its reply.", ["route"], SECONDS
        )
        self._decode_seconds = Histogram(
            "serving_decode_seconds",
            "Time to decode one uploaded picture.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._predict_seconds = Histogram(
            "serving_predict_seconds",
            "Time in the model for one signature call.",
            ["model", "signature"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._rows = Counter(
            "serving_predicted_rows",
            "Rows predicted: pictures, for a model of pictures.",
            ["model"],
            registry=self._registry,
        )
        self._call_rows = Histogram(
            "serving_call_rows",
            "Rows in one call of the model: how many requests' rows were gathered.",
            ["model"],
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self._registry,
        )
        self._tfs_latency = _Durations(
            ":tensorflow:serving:request_latency",
            "Time from a request's headers to its reply, in microseconds.",
            ["model_name", "API", "entrypoint"],
            TFS_MICROSECONDS,
        )
        self._requests = _RequestCounts()
        for collector in (self._requests, self._request_seconds, self._tfs_latency):
            self._registry.register(collector)
        self._tfs_requests: Tally[tuple[str, str]] = Tally()
        self._lock = threading.Lock()
        self._renderer = ThreadPoolExecutor(1, thread_name_prefix="metrics", initializer=lower_priority)
        self._page: Future[bytes] | None = None

    def watch(self, repository: ModelRepository) -> None:
        """Show the states of a repository's versions too."""
        self._registry.register(_RepositoryCollector(repository))

    def watch_memory(self, budget: MemoryBudget) -> None:
        """Show the memory budget too."""
        for name, documentation, read in (
            ("serving_memory_budget_bytes", "Memory for all requests together.", lambda: budget.total_bytes),
            ("serving_memory_used_bytes", "Memory that requests hold of the budget.", lambda: budget.used_bytes),
        ):
            Gauge(name, documentation, registry=self._registry).set_function(read)

    def time_predictor(self, model: str, predictor: Predictor) -> Predictor:
        """Wrap a predictor of a model so that its calls are counted and timed."""
        return _TimedPredictor(predictor, model, self._predict_seconds, self._rows, self._call_rows)

    def observe_decode(self, seconds: float) -> None:
        """Record the decoding of one picture."""
        self._decode_seconds.observe(seconds)

    def observe_request(self, *, route: str, model: str, status: int, seconds: float) -> None:
        """Record an answered request; `model` is empty where none of ours was asked for."""
        self._requests.count(route, model, status)
        self._request_seconds.observe((route,), seconds)

    def observe_tfs_predict(self, *, model: str, code: str, seconds: float, api: str) -> None:
        """Record an answered predict call of TensorFlow Serving's API: `api` is "REST" or "GRPC"."""
        self._tfs_latency.observe((model, "predict", api), seconds * 1e6)
        with self._lock:
            self._tfs_requests[model, code] += 1

    def render(self) -> bytes:
        """Return the page in Prometheus' text format, as of this call or later.

        It takes milliseconds, in which other requests would wait, so a thread of its own renders it, and those who ask
        while it is busy share the next rendering.
        """
        with self._lock:
            if self._page is None or self._page.running() or self._page.done():
                self._page = self._renderer.submit(self._render)
            page = self._page
        return wait_for(page)

    def _render(self) -> bytes:
        name = ":tensorflow:serving:request_count"
        with self._lock:
            counts = sorted(self._tfs_requests.items())
        # Written by hand: the library puts "_total" behind a counter's name, TensorFlow Serving does not.
        lines = [f"# HELP {name} Predict requests answered.", f"# TYPE {name} counter"]
        lines += [f'{name}{{model_name="{_escape(m)}",status="{s}"}} {count}' for (m, s), count in counts]
        return generate_latest(self._registry) + ("\n".join(lines) + "\n").encode()


class _TimedPredictor:
    def __init__(self, inner: Predictor, model: str, seconds: Histogram, rows: Counter, call_rows: Histogram) -> None:
        self._inner = inner
        self._rows = rows.labels(model)
        self._call_rows = call_rows.labels(model)
        self._seconds_of = cache(partial(seconds.labels, model))

    @property
    def signatures(self) -> Mapping[str, Signature]:
        return self._inner.signatures

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        started = time.perf_counter()
        outputs = self._inner.predict(signature, inputs, deadline_s=deadline_s)
        self._seconds_of(signature).observe(time.perf_counter() - started)
        rows = next((array.shape[0] for array in inputs.values() if array.ndim), 1)
        self._rows.inc(rows)
        self._call_rows.observe(rows)
        return outputs


# The library's own counters look up each label as text and take a lock for each of the three numbers of a histogram,
# which for a small request is as much work as to read it. These two are counted for every request.


class _RequestCounts(Collector):
    """The counter `serving_requests`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Tally[tuple[str, str, int]] = Tally()

    def count(self, route: str, model: str, status: int) -> None:
        with self._lock:
            self._counts[route, model, status] += 1

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily("serving_requests", "Requests answered.", labels=["route", "model", "status"])
        with self._lock:
            counts = sorted(self._counts.items())
        for (route, model, status), count in counts:
            family.add_metric([route, model, str(status)], count)
        return [family]


class _Durations(Collector):
    """A histogram: how many values of each set of labels are at most as large as each of `bounds`, and their sum."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self._name, self._documentation = name, documentation
        self._labels = labels
        self._bounds = bounds
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}

    def observe(self, labels: tuple[str, ...], value: float) -> None:
        position = bisect_left(self._bounds, value)
        with self._lock:
            if labels not in self._counts:
                self._counts[labels] = [0] * (len(self._bounds) + 1)
                self._sums[labels] = 0.0
            self._counts[labels][position] += 1
            self._sums[labels] += value

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        bounds = [*map(format_bound, self._bounds), "+Inf"]
        with self._lock:
            values = [(labels, list(accumulate(counts)), self._sums[labels]) for labels, counts in self._counts.items()]
        for labels, at_most, total in values:
            family.add_metric(labels, buckets=list(zip(bounds, at_most, strict=True)), sum_value=total)
        return [family]


class _RepositoryCollector(Collector):
    """Reads the repository when Prometheus asks, so that nothing has to be kept in step."""

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository

    def collect(self) -> Iterable[Metric]:
        states = GaugeMetricFamily(
            "serving_model_version_state",
            "1 for the state that a version of a model is in.",
            labels=["model", "version", "state"],
        )
        warmups = GaugeMetricFamily(
            "serving_warmup_records",
            "Warm-up records replayed when the version was loaded.",
            labels=["model", "version"],
        )
        errors = GaugeMetricFamily(
            "serving_model_version_error",
            "1 for a version that could not be loaded, with TensorFlow's code for the reason.",
            labels=["model", "version", "code"],
        )
        warnings = GaugeMetricFamily(
            "serving_model_version_warning",
            "1 for a version that is served with a limitation: model_info, warmup, dependent_rows or folder.",
            labels=["model", "version", "kind"],
        )
        folders = GaugeMetricFamily(
            "serving_folder_unreadable",
            "1 for a folder that cannot be read: of a model, or without one the models folder.",
            labels=["model"],
        )
        ready = GaugeMetricFamily("serving_ready", "1 when at least one model and all required ones can be used.")
        ready.add_metric([], float(self._repository.ready))
        for version in self._repository.all_versions():
            labels = [version.name, str(version.version)]
            states.add_metric([*labels, version.state], 1)
            warmups.add_metric(labels, version.warmup_records)
            if version.error_code != "OK":
                errors.add_metric([*labels, version.error_code], 1)
            for kind in version.warnings:
                warnings.add_metric([*labels, kind], 1)
        for problem in self._repository.folder_problems:
            folders.add_metric([problem.model or ""], 1)
        return [ready, states, errors, warnings, folders, warmups]


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

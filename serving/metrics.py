"""Prometheus metrics: the service's own, and TensorFlow Serving's two under their original names."""

from __future__ import annotations

import threading
import time
from collections import Counter as Tally
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving.errors import HTTP_STATUS_OF_CODE
from serving.greenlets import lower_priority, wait_for
from serving.inference.repository import ModelRepository
from serving.inference.signatures import Predictor, Signature
from serving.memory import MemoryBudget

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
CALL_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TFS_MICROSECONDS = tuple(10 * 1.8**step for step in range(33))

# The status label of TensorFlow Serving for each HTTP status; of several codes, the first is the status's own.
TFS_STATUS = {200: "OK", 413: "RESOURCE_EXHAUSTED", **{s: code for code, s in reversed(HTTP_STATUS_OF_CODE.items())}}


class Metrics:
    """The metrics of one app, in their own registry.

    `Counter.labels` and `Histogram.labels` are cached: they cost more than the observation itself.
    """

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        counter = partial(Counter, registry=registry)
        histogram = partial(Histogram, buckets=SECONDS, registry=registry)
        self.in_flight = Gauge("serving_requests_in_flight", "In-flight requests.", registry=registry)
        requests = counter("serving_requests", "Completed requests.", ["route", "model", "status"])
        request_seconds = histogram(
            "serving_request_seconds",
            "Time from the end of a request to its response.",
            ["route", "model", "version"],
        )
        self._decode_seconds = histogram("serving_decode_seconds", "Time to decode one uploaded image.")
        self._predict_seconds = histogram("serving_predict_seconds", "Time of one model call.", ["model", "signature"])
        self._rows = counter("serving_predicted_rows", "Predicted rows: for an image classifier, images.", ["model"])
        self._call_rows = histogram(
            "serving_call_rows", "Batch size: rows in one model call.", ["model"], buckets=CALL_ROWS
        )
        tfs_latency = histogram(
            ":tensorflow:serving:request_latency",
            "Time from the end of a request to its response, in microseconds.",
            ["model_name", "API", "entrypoint"],
            buckets=TFS_MICROSECONDS,
        )
        self._requests = cache(requests.labels)
        self._request_seconds = cache(request_seconds.labels)
        self._tfs_latency = cache(tfs_latency.labels)
        self._tfs_requests: Tally[tuple[str, str]] = Tally()
        self._lock = threading.Lock()
        self._renderer = ThreadPoolExecutor(1, thread_name_prefix="metrics", initializer=lower_priority)
        self._page: Future[bytes] | None = None

    def watch(self, repository: ModelRepository) -> None:
        """Export the states of a repository's versions."""
        self.registry.register(_RepositoryCollector(repository))

    def watch_memory(self, budget: MemoryBudget) -> None:
        """Export the memory budget and its use."""
        for name, documentation, read in (
            ("serving_memory_budget_bytes", "Memory budget of all requests together.", lambda: budget.total_bytes),
            ("serving_memory_used_bytes", "Memory that requests have reserved.", lambda: budget.used_bytes),
        ):
            Gauge(name, documentation, registry=self.registry).set_function(read)

    def time_predictor(self, model: str, predictor: Predictor) -> Predictor:
        """Wrap a model's predictor to count and time its calls."""
        return _TimedPredictor(predictor, model, self._predict_seconds, self._rows, self._call_rows)

    def observe_decode(self, seconds: float) -> None:
        """Record the time to decode one image."""
        self._decode_seconds.observe(seconds)

    def observe_request(self, *, route: str, model: str, version: int | None, status: str, seconds: float) -> None:
        """Record a completed request; `model` is empty if the request names no served model."""
        self._requests(route, model, status).inc()
        self._request_seconds(route, model, "" if version is None else version).observe(seconds)

    def observe_tfs_predict(self, *, model: str, code: str, seconds: float, api: str) -> None:
        """Record a completed predict call of TensorFlow Serving's API; `api` is "REST" or "GRPC"."""
        self._tfs_latency(model, "predict", api).observe(seconds * 1e6)
        with self._lock:
            self._tfs_requests[model, code] += 1

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format, as of this call or later.

        Rendering takes milliseconds, so it runs in a worker thread. Calls that arrive meanwhile share the next
        rendering.
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
        # Not a `Counter`: prometheus_client appends "_total" to the name, TensorFlow Serving does not.
        lines = [f"# HELP {name} Completed predict requests.", f"# TYPE {name} counter"]
        lines += [f'{name}{{model_name="{_escape(m)}",status="{s}"}} {count}' for (m, s), count in counts]
        return generate_latest(self.registry) + ("\n".join(lines) + "\n").encode()


class _TimedPredictor:
    def __init__(self, inner: Predictor, model: str, seconds: Histogram, rows: Counter, call_rows: Histogram) -> None:
        self._inner = inner
        self.signatures: Mapping[str, Signature] = inner.signatures
        self._rows = rows.labels(model)
        self._call_rows = call_rows.labels(model)
        self._seconds = cache(partial(seconds.labels, model))

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        started = time.perf_counter()
        outputs = self._inner.predict(signature, inputs, deadline_s=deadline_s)
        self._seconds(signature).observe(time.perf_counter() - started)
        rows = next((array.shape[0] for array in inputs.values() if array.ndim), 1)
        self._rows.inc(rows)
        self._call_rows.observe(rows)
        return outputs


class _RepositoryCollector(Collector):
    """Reads the repository at every scrape."""

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository

    def collect(self) -> Iterable[Metric]:
        gauge, of = GaugeMetricFamily, ["model", "version"]
        ready = gauge("serving_ready", "1 if all required models, and at least one model, are available.")
        states = gauge(
            "serving_model_version_state", "1 for the state that a version of a model is in.", labels=[*of, "state"]
        )
        errors = gauge(
            "serving_model_version_error",
            "1 for a version that could not be loaded, with TensorFlow's error code.",
            labels=[*of, "code"],
        )
        warnings = gauge(
            "serving_model_version_warning",
            "1 for a version that is served with a limitation: model_info, warmup, dependent_rows or folder.",
            labels=[*of, "kind"],
        )
        folders = gauge(
            "serving_folder_unreadable",
            "1 for an unreadable model folder; an empty model means the models folder.",
            labels=["model"],
        )
        warmups = gauge("serving_warmup_records", "Warm-up records replayed when the version was loaded.", labels=of)
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

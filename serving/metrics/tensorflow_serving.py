"""The metrics of TensorFlow Serving 2.20 that dashboards use, under their names, labels and units (microseconds).

Two are observed here, for its predict API only. The others are made from the service's own metrics at each scrape, for
the requests of all protocols, so that they cost nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from serving.errors import HTTP_STATUS_OF_CODE
from serving.metrics.histogram import TFS_MICROSECONDS, Histogram

PREFIX = ":tensorflow:serving:"

# The routes that TensorFlow Serving counts, and its names for their APIs.
_PREDICT = {"/v1/models/<model>:predict": "REST", "/tensorflow.serving.PredictionService/Predict": "GRPC"}

# The status label for each HTTP status; of several codes, the first is the status's own.
_STATUS = {200: "OK", 413: "RESOURCE_EXHAUSTED", **{s: code for code, s in reversed(HTTP_STATUS_OF_CODE.items())}}

_Buckets = dict[float, float]  # cumulative counts by upper bound


@dataclass(frozen=True, slots=True)
class PredictSeries:
    """The series of predict calls with one model, API and status."""

    count: Counter
    latency: Histogram
    runtime: Histogram

    def observe(self, seconds: float, model_s: float) -> None:
        """Record a call that has ended, and the time of its model calls; 0 if there was none."""
        self.count.inc()
        self.latency.observe(seconds * 1e6)
        if model_s:
            self.runtime.observe(model_s * 1e6)


class TensorFlowServingMetrics:
    """TensorFlow Serving's metrics of its predict API."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._latency = Histogram(
            PREFIX + "request_latency",
            "Time from the end of a request to its response, in microseconds.",
            ["model_name", "API", "entrypoint"],
            buckets=TFS_MICROSECONDS,
            registry=registry,
        )
        self._runtime = Histogram(
            PREFIX + "runtime_latency",
            "Time of a request's model calls, in microseconds.",
            ["model_name", "API", "runtime"],
            buckets=TFS_MICROSECONDS,
            registry=registry,
        )
        # Not in the registry: prometheus_client appends "_total" to the names of counters, TensorFlow Serving does not.
        self._requests = Counter("tfs_requests", "Completed predict requests.", ["model", "status"], registry=None)

    def predict_series(self, route: str, model: str, status: str) -> PredictSeries | None:
        """Return the series of a route's requests, or None if TensorFlow Serving does not count them."""
        api = _PREDICT.get(route)
        if not api or not model:
            return None
        code = _STATUS.get(int(status), "INTERNAL") if api == "REST" else status
        return PredictSeries(
            self._requests.labels(model, code),
            self._latency.labels(model, "predict", api),
            self._runtime.labels(model, "Predict", "TF1"),
        )

    def forget(self, model: str) -> None:
        """Remove the series of a model."""
        for api in _PREDICT.values():
            self._latency.remove(model, "predict", api)
        self._runtime.remove(model, "Predict", "TF1")
        for code in {*_STATUS.values(), "INTERNAL", "UNKNOWN", "DATA_LOSS"}:
            self._requests.remove(model, code)

    def collect_counters(self, call_rows: Histogram) -> list[Metric]:
        """Return the counters whose names do not end with "_total"; see `render_counters`."""
        (requests,) = self._requests.collect()
        counts = Metric(PREFIX + "request_count", "Completed predict requests.", "counter")
        for sample in requests.samples:
            if sample.name.endswith("_total"):
                labels = {"model_name": sample.labels["model"], "status": sample.labels["status"]}
                counts.add_sample(counts.name, labels, sample.value)
        calls = Metric(PREFIX + "batching_session:wrapped_run_count", "Model calls.", "counter")
        calls.add_sample(
            calls.name, {}, sum(buckets.get(math.inf, 0) for buckets, _ in read_histogram(call_rows).values())
        )
        return [counts, calls]


def render_counters(counters: Iterable[Metric]) -> bytes:
    """Return counters in Prometheus' text format, where prometheus_client would append "_total" to their names."""
    lines = []
    for counter in counters:
        lines += [f"# HELP {counter.name} {counter.documentation}", f"# TYPE {counter.name} counter"]
        for sample in sorted(counter.samples, key=lambda sample: sorted(sample.labels.items())):
            labels = ",".join(f'{name}="{_escape(value)}"' for name, value in sample.labels.items())
            lines.append(f"{sample.name}{f'{{{labels}}}' if labels else ''} {sample.value:.0f}")
    return ("\n".join(lines) + "\n").encode()


class DerivedMetrics(Collector):
    """TensorFlow Serving's histograms and counters that are the service's own ones under other names.

    Args:
        rows, queue_seconds, call_rows: histograms with the label `model`.
    """

    def __init__(self, rows: Histogram, queue_seconds: Histogram, call_rows: Histogram) -> None:
        self._rows = rows
        self._queue_seconds = queue_seconds
        self._call_rows = call_rows

    @override
    def collect(self) -> Iterable[Metric]:
        rows, queue = read_histogram(self._rows), read_histogram(self._queue_seconds)
        total = CounterMetricFamily(PREFIX + "request_example_count", "Rows of predicted requests.", labels=["model"])
        counts = _family("request_example_counts", "Rows of a predicted request.", ["model"])
        latency = _family(
            "batching_session:queuing_latency",
            "Time that a request waited for its first model call, in microseconds.",
            ["thread_pool_name"],
        )
        for model, (buckets, total_rows) in rows.items():
            total.add_metric([model], total_rows)
            _add(counts, [model], buckets, total_rows)
        for model, (buckets, seconds) in queue.items():
            scaled = {round(bound * 1e6, 3): count for bound, count in buckets.items()}
            _add(latency, [model], scaled, seconds * 1e6)
        inputs = _family("batching_session:input_batch_size", "Rows of a predicted request.", [])
        processed = _family("batching_session:processed_batch_size", "Rows of a model call.", [])
        _add(inputs, [], *_sum(rows))
        _add(processed, [], *_sum(read_histogram(self._call_rows)))
        return [total, counts, latency, inputs, processed]


def read_histogram(histogram: Histogram) -> dict[str, tuple[_Buckets, float]]:
    """Return the cumulative counts and the sum of each model of a histogram with the label `model`."""
    buckets: defaultdict[str, _Buckets] = defaultdict(dict)
    sums: dict[str, float] = {}
    (family,) = histogram.collect()
    for sample in family.samples:
        if sample.name.endswith("_bucket"):
            buckets[sample.labels["model"]][float(sample.labels["le"])] = sample.value
        elif sample.name.endswith("_sum"):
            sums[sample.labels["model"]] = sample.value
    return {model: (counts, sums[model]) for model, counts in buckets.items()}


def _family(name: str, documentation: str, labels: list[str]) -> HistogramMetricFamily:
    return HistogramMetricFamily(PREFIX + name, documentation, labels=labels)


def _add(family: HistogramMetricFamily, labels: list[str], buckets: _Buckets, total: float) -> None:
    family.add_metric(
        labels, [("+Inf" if bound == math.inf else f"{bound:.12g}", count) for bound, count in buckets.items()], total
    )


def _sum(histograms: dict[str, tuple[_Buckets, float]]) -> tuple[_Buckets, float]:
    """Return the sum of histograms with the same buckets; one without counts if there is none."""
    summed: _Buckets = {}
    for buckets, _ in histograms.values():
        for bound, count in buckets.items():
            summed[bound] = summed.get(bound, 0) + count
    return summed or {math.inf: 0}, sum(total for _, total in histograms.values())


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

"""Metrics of decoded images, model calls and queues."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Protocol

import numpy as np
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from serving.inference.signatures import Predictor, Signature
from serving.metrics.histogram import CALL_ROWS, SECONDS, Histogram


class Queue(Protocol):
    """A queue of requests for a model."""

    def queued(self) -> tuple[int, int]:
        """Return how many requests and how many rows are queued."""


class PredictionMetrics:
    """Counts and times the decoding of images and the calls of models, and reads their queues."""

    def __init__(self, registry: CollectorRegistry) -> None:
        histogram = partial(Histogram, buckets=SECONDS, registry=registry)
        self._decode_seconds = histogram("serving_decode_seconds", "Time to decode one uploaded image.")
        self._seconds = histogram("serving_predict_seconds", "Time of one model call.", ["model", "signature"])
        self._rows = Counter(
            "serving_predicted_rows",
            "Predicted rows: for an image classifier, images.",
            ["model"],
            registry=registry,
        )
        self.call_rows = histogram(
            "serving_call_rows", "Batch size: rows in one model call.", ["model"], buckets=CALL_ROWS
        )
        self._signatures: dict[str, set[str]] = {}  # of each model
        self._queues = QueueCollector()
        registry.register(self._queues)

    def observe_decode(self, seconds: float) -> None:
        """Record the time to decode one image."""
        self._decode_seconds.observe(seconds)

    def time_predictor(self, model: str, predictor: Predictor) -> Predictor:
        """Wrap a model's predictor to count and time its calls."""
        self._signatures.setdefault(model, set()).update(predictor.signatures)
        return _TimedPredictor(predictor, model, self._seconds, self._rows, self.call_rows)

    def watch_queue(self, model: str, queue: Queue) -> None:
        """Export the length of a model's queue for as long as it exists. A model has one for each version."""
        self._queues.add(model, queue)

    def forget(self, is_known: Callable[[str], bool]) -> None:
        """Remove the series of models that are no longer served."""
        for model in [model for model in self._signatures if not is_known(model)]:
            for signature in self._signatures.pop(model):
                self._seconds.remove(model, signature)
            self._rows.remove(model)
            self.call_rows.remove(model)


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


class QueueCollector(Collector):
    """Reads the queues at every scrape."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: list[tuple[str, weakref.ref[Queue]]] = []

    def add(self, model: str, queue: Queue) -> None:
        """Add a queue; it is removed once it is not referenced elsewhere."""
        with self._lock:
            self._queues = [(name, each) for name, each in self._queues if each() is not None]
            self._queues.append((model, weakref.ref(queue)))

    @override
    def collect(self) -> Iterable[Metric]:
        requests = GaugeMetricFamily("serving_queue_requests", "Requests that wait for a model.", labels=["model"])
        rows = GaugeMetricFamily("serving_queue_rows", "Rows that wait for a model.", labels=["model"])
        with self._lock:
            queues = [(model, queue) for model, each in self._queues if (queue := each()) is not None]
        lengths: dict[str, tuple[int, int]] = {}
        for model, queue in queues:
            more, before = queue.queued(), lengths.get(model, (0, 0))
            lengths[model] = before[0] + more[0], before[1] + more[1]
        for model, length in lengths.items():
            requests.add_metric([model], length[0])
            rows.add_metric([model], length[1])
        return [requests, rows]

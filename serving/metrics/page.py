"""`Metrics`: all metrics of one app, and the page that Prometheus reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from serving.drift import DriftMonitor
from serving.greenlets import lower_priority, wait_for
from serving.inference.repository import ModelRepository
from serving.inference.statistics import Statistics
from serving.metrics.models import RepositoryCollector, find_known
from serving.metrics.predictions import PredictionMetrics
from serving.metrics.process import ProcessMetrics
from serving.metrics.requests import RequestMetrics
from serving.metrics.snapshot import Snapshot, sum_families
from serving.metrics.tensorflow_serving import DerivedMetrics, TensorFlowServingMetrics, render_counters

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one app, by subject, in their own `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.process = ProcessMetrics(self.registry)
        self._tensorflow_serving = TensorFlowServingMetrics(self.registry)
        self.requests = RequestMetrics(self.registry, self._tensorflow_serving)
        self.predictions = PredictionMetrics(self.registry)
        self.registry.register(
            DerivedMetrics(self.requests.rows, self.requests.queue_seconds, self.predictions.call_rows)
        )
        self._repository: ModelRepository | None = None
        self._lock = threading.Lock()
        self._renderer = ThreadPoolExecutor(1, thread_name_prefix="metrics", initializer=lower_priority)
        self._page: Future[bytes] | None = None
        self._drift: DriftMonitor | None = None
        # Set where several processes serve: returns what the others have counted, those that have ended included.
        self.read_others: Callable[[], Sequence[Snapshot]] = tuple

    def watch(self, repository: ModelRepository) -> None:
        """Export the states of a repository's versions, and forget the series of those that have gone."""
        self._repository = repository
        self.registry.register(RepositoryCollector(repository))

    def watch_drift(self, drift: DriftMonitor) -> None:
        """Export the drift of all versions."""
        self._drift = drift
        self.registry.register(drift)

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
        self.forget()
        others = self.read_others()
        counters = self._tensorflow_serving.collect_counters(self.predictions.call_rows)
        if not others:
            return generate_latest(self.registry) + render_counters(counters)
        if self._drift is not None:
            self._drift.others = [each.drift for each in others]
        try:
            families = list(self.registry.collect())
        finally:
            if self._drift is not None:
                self._drift.others = ()
        page = _Families(sum_families([families, *(each.families for each in others)]))
        summed = sum_families([counters, *(each.counters for each in others)])
        return generate_latest(page) + render_counters(summed)

    def forget(self) -> None:
        """Remove the series of versions and models that have gone; once a scrape."""
        if self._repository is not None:
            known = find_known(self._repository)
            self.requests.forget(lambda model, version: (model, version) in known)
            self.predictions.forget(lambda model: (model, None) in known)

    def take_snapshot(self, statistics: Mapping[tuple[str, int], Statistics]) -> Snapshot:
        """Return what this process has counted, and the statistics of its versions."""
        return Snapshot(
            list(self.registry.collect()),
            self._tensorflow_serving.collect_counters(self.predictions.call_rows),
            self._drift.totals() if self._drift is not None else {},
            statistics,
        )


class _Families(Collector):
    """Metrics that are collected already, for `generate_latest`."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    @override
    def collect(self) -> Iterable[Metric]:
        return self._families

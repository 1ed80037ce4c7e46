"""`Metrics`: all metrics of one app, and the page that Prometheus reads."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from prometheus_client import CollectorRegistry, generate_latest

from serving.greenlets import lower_priority, wait_for
from serving.inference.repository import ModelRepository
from serving.metrics.models import RepositoryCollector, find_known
from serving.metrics.predictions import PredictionMetrics
from serving.metrics.process import ProcessMetrics
from serving.metrics.requests import RequestMetrics
from serving.metrics.tensorflow_serving import DerivedMetrics, TensorFlowServingMetrics

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

    def watch(self, repository: ModelRepository) -> None:
        """Export the states of a repository's versions, and forget the series of those that have gone."""
        self._repository = repository
        self.registry.register(RepositoryCollector(repository))

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
        if self._repository is not None:
            known = find_known(self._repository)
            self.requests.forget(lambda model, version: (model, version) in known)
            self.predictions.forget(lambda model: (model, None) in known)
        return generate_latest(self.registry) + self._tensorflow_serving.render(self.predictions.call_rows)

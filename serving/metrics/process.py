"""Metrics of the process: its threads and memory, the event loop, connections and log lines."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, GCCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from serving.log_output import count_dropped_lines
from serving.memory import MemoryBudget
from serving.metrics.histogram import SECONDS, Histogram


class ProcessMetrics:
    """Metrics of the process, next to those of prometheus_client (CPU, memory, open files, garbage collection)."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self._watch("process_threads", "Threads, those of TensorFlow and gRPC included.", count_threads)
        registry.register(_LogCollector())
        self._lag_seconds = Histogram(
            "serving_event_loop_lag_seconds",
            "How late a timer of the HTTP server's event loop was.",
            buckets=SECONDS,
            registry=registry,
        )

    def watch_memory(self, budget: MemoryBudget) -> None:
        """Export the memory budget and its use."""
        self._watch(
            "serving_memory_budget_bytes", "Memory budget of all requests together.", lambda: budget.total_bytes
        )
        self._watch("serving_memory_used_bytes", "Memory that requests have reserved.", lambda: budget.used_bytes)

    def watch_connections(self, count: Callable[[], int], *, limit: int) -> None:
        """Export the number of open HTTP connections, and its limit."""
        self._watch("serving_connections", "Open HTTP connections.", count)
        self._watch("serving_connections_limit", "Most open HTTP connections; more wait.", lambda: limit)

    def observe_loop_lag(self, seconds: float) -> None:
        """Record how late a timer of the event loop was."""
        self._lag_seconds.observe(seconds)

    def _watch(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        Gauge(name, documentation, registry=self._registry).set_function(read)


class _LogCollector(Collector):
    @override
    def collect(self) -> Iterable[Metric]:
        documentation = "Log lines that were dropped because the log's reader was too slow."
        return [CounterMetricFamily("serving_log_lines_dropped", documentation, value=count_dropped_lines())]


def count_threads() -> int:
    """Return the number of threads of the process; outside Linux, of those that Python started."""
    with contextlib.suppress(OSError):
        return sum(1 for _ in Path("/proc/self/task").iterdir())
    return threading.active_count()

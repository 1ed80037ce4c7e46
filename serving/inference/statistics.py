"""Cumulative statistics of a model version since it was loaded, in the terms of Triton's statistics extension."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serving.inference.signatures import Predictor, Signature


@dataclass(slots=True)
class Duration:
    """How often something happened, and how long it took in total."""

    count: int = 0
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.count += 1
        self.total_s += seconds

    def merge(self, other: Duration) -> None:
        """Add what was counted elsewhere."""
        self.count += other.count
        self.total_s += other.total_s


@dataclass(eq=False, slots=True)
class Statistics:
    """The requests of a version, of all protocols, and its model calls. Thread-safe to record.

    Requests are counted once they are validated: one that does not fit the signature is no failure of the model.
    """

    last_request_ms: int = 0  # since 1970; 0: none
    rows: int = 0  # of successful requests
    succeeded: Duration = field(default_factory=Duration)  # requests, from their validation to their outputs
    failed: Duration = field(default_factory=Duration)
    queued: Duration = field(default_factory=Duration)  # of successful requests
    computed: Duration = field(default_factory=Duration)  # the model calls with rows of each successful request
    calls: dict[int, Duration] = field(default_factory=dict)  # successful model calls, by their number of rows
    # A lock each, because event loops record requests while threads record calls: one that waits for the other gives up
    # the interpreter lock.
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _calls_lock: threading.Lock = field(default_factory=threading.Lock)

    def __reduce__(self) -> tuple[Any, ...]:
        # Locks cannot be pickled; a copy has its own.
        durations = self.succeeded, self.failed, self.queued, self.computed
        return Statistics, (self.last_request_ms, self.rows, *durations, self.calls.copy())

    def add(self, other: Statistics) -> None:
        """Add what another process has counted."""
        self.last_request_ms = max(self.last_request_ms, other.last_request_ms)
        self.rows += other.rows
        for name in ("succeeded", "failed", "queued", "computed"):
            getattr(self, name).merge(getattr(other, name))
        for rows, duration in other.calls.items():
            self.calls.setdefault(rows, Duration()).merge(duration)

    def record_success(self, rows: int, *, seconds: float, queue_s: float, model_s: float) -> None:
        """Record a request that has its outputs."""
        with self._lock:
            self.last_request_ms = int(time.time() * 1000)
            self.rows += rows
            self.succeeded.add(seconds)
            self.queued.add(queue_s)
            self.computed.add(model_s)

    def record_failure(self, seconds: float) -> None:
        """Record a request that the model refused or did not process."""
        with self._lock:
            self.last_request_ms = int(time.time() * 1000)
            self.failed.add(seconds)

    def record_call(self, rows: int, seconds: float) -> None:
        """Record a successful model call."""
        with self._calls_lock:
            duration = self.calls.get(rows)
            if duration is None:
                duration = self.calls[rows] = Duration()
            duration.add(seconds)


class CountedPredictor:
    """Predictor that records the calls of another one."""

    def __init__(self, inner: Predictor, statistics: Statistics) -> None:
        self.inner = inner
        self._statistics = statistics
        self.signatures: Mapping[str, Signature] = inner.signatures

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """See `Predictor.predict`."""
        started_s = time.perf_counter()
        outputs = self.inner.predict(signature, inputs, deadline_s=deadline_s)
        seconds = time.perf_counter() - started_s
        rows = next((array.shape[0] for array in inputs.values() if array.ndim), 1)
        self._statistics.record_call(rows, seconds)
        return outputs

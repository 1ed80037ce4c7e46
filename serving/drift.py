"""Drift: compares the predictions of the last hour with those on the validation images.

The latter are in model.json (`reference`); without it, a version has no drift metrics. Requests only append their
outputs to a queue, which is counted when it is full and when the metrics are read.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving.inference.image_classifier import class_names
from serving.inference.model_info import Reference
from serving.inference.repository import ModelRepository, ModelVersion

WINDOW_S, SLICES = 3_600.0, 12  # the window slides by a slice
QUEUED_RESULTS = 32
QUEUED_ROWS = 16  # of one result; larger ones are counted at once, so that the queue stays small
MAX_LABELS = 100  # classes whose shares are exported
# The index of a stable stream is about (classes - 1) / rows, which has to be far below the 0.25 that counts as drift.
MIN_ROWS, MIN_ROWS_PER_CLASS = 200, 20


@dataclass
class Counts:
    """Sums over predictions."""

    classes: np.ndarray  # int64 (classes,)
    rows: int = 0
    confidence: float = 0.0
    typical_rows: int = 0  # rows with a typicality
    typicality: float = 0.0

    def add(self, other: Counts) -> None:
        """Add the sums over other predictions."""
        self.classes += other.classes
        self.rows += other.rows
        self.confidence += other.confidence
        self.typical_rows += other.typical_rows
        self.typicality += other.typicality


@dataclass
class _Slice:
    started_s: float
    counts: Counts


_Queued = tuple[np.ndarray, np.ndarray | None]  # probabilities (n, classes) and typicality (n,)


@dataclass
class Window:
    """The predictions of a version in the last hour."""

    reference: Reference
    clock: Callable[[], float] = time.monotonic
    queue: deque[_Queued] = field(default_factory=deque)
    slices: deque[_Slice] = field(default_factory=deque)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Add the outputs of a request; those without probabilities of the classes are ignored."""
        probabilities = outputs.get("probabilities")
        if probabilities is None or probabilities.ndim != 2:
            return
        self.queue.append((probabilities, outputs.get("typicality")))
        if len(self.queue) >= QUEUED_RESULTS or len(probabilities) > QUEUED_ROWS:
            self._count_queued()

    def total(self) -> Counts:
        """Return the sums over the window."""
        self._count_queued()
        with self.lock:
            self._drop_old()
            total = Counts(np.zeros(len(self.reference.class_shares), np.int64))
            for part in self.slices:
                total.add(part.counts)
        return total

    def _count_queued(self) -> None:
        with self.lock:
            queued = []
            while self.queue:
                queued.append(self.queue.popleft())
            classes = len(self.reference.class_shares)
            queued = [each for each in queued if each[0].shape[1] == classes]
            if not queued:
                return
            counts = self._current()
            probabilities = np.concatenate([each[0] for each in queued])
            counts.classes += np.bincount(probabilities.argmax(axis=1), minlength=classes)
            counts.rows += len(probabilities)
            counts.confidence += float(np.nansum(np.maximum.reduce(probabilities, axis=1), dtype=np.float64))
            if typicalities := [each[1] for each in queued if each[1] is not None]:
                typicality = np.concatenate(typicalities)
                counts.typical_rows += len(typicality)
                counts.typicality += float(np.nansum(typicality, dtype=np.float64))

    def _current(self) -> Counts:
        now_s = self.clock()
        if not self.slices or now_s - self.slices[-1].started_s >= WINDOW_S / SLICES:
            self._drop_old()
            self.slices.append(_Slice(now_s, Counts(np.zeros(len(self.reference.class_shares), np.int64))))
        return self.slices[-1].counts

    def _drop_old(self) -> None:
        oldest_s = self.clock() - WINDOW_S
        while self.slices and self.slices[0].started_s < oldest_s:
            self.slices.popleft()


class DriftMonitor(Collector):
    """The windows of all versions, and their metrics.

    Args:
        repository: only versions that are available are reported and kept.
    """

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository
        self._windows: dict[tuple[str, int], Window] = {}
        self.others: Sequence[Mapping[tuple[str, int], Counts]] = ()  # sums of other processes, for the metrics

    def totals(self) -> dict[tuple[str, int], Counts]:
        """Return the sums of each version in the last hour, in this process."""
        return {key: window.total() for key, window in tuple(self._windows.items())}

    def record(self, version: ModelVersion, outputs: Mapping[str, np.ndarray]) -> None:
        """Add the outputs of a request to a version that has a reference."""
        window = self._windows.get((version.name, version.version))
        if window is None or window.reference is not version.info.reference:
            window = self._open(version, window)
        if window is not None:
            window.record(outputs)

    def _open(self, version: ModelVersion, window: Window | None) -> Window | None:
        """Return a version's window, a new one if there is none or its reference has changed."""
        reference = version.info.reference
        if reference is None:
            return None
        if window is None or window.reference != reference:
            window = self._windows[version.name, version.version] = Window(reference)
        window.reference = reference  # model.json was read again
        return window

    def collect(self) -> Iterable[Metric]:
        """Return the metrics as of now."""
        of = ["model", "version"]
        gauge = GaugeMetricFamily
        rows = gauge("serving_drift_rows", "Predictions of the last hour.", labels=of)
        psi = gauge(
            "serving_drift_psi",
            "Population stability index of the predicted classes, in the last hour against the validation images.",
            labels=of,
        )
        shares = gauge("serving_class_share", "Share of the predictions of the last hour.", labels=[*of, "label"])
        expected = gauge("serving_validation_class_share", "Share of the validation images.", labels=[*of, "label"])
        means = {
            name: gauge(f"serving_mean_{name}", f"Mean {name} of the predictions of the last hour.", labels=of)
            for name in ("confidence", "typicality")
        }
        expected_means = {
            name: gauge(f"serving_validation_mean_{name}", f"Mean {name} of the validation images.", labels=of)
            for name in ("confidence", "typicality")
        }
        for version in self._available():
            labels = [version.name, str(version.version)]
            reference = version.info.reference
            assert reference is not None
            window = self._windows.get((version.name, version.version))
            total = window.total() if window is not None and window.reference == reference else None
            total = self._add_others((version.name, version.version), total)
            expected_means["confidence"].add_metric(labels, reference.mean_confidence)
            expected_means["typicality"].add_metric(labels, reference.mean_typicality)
            rows.add_metric(labels, total.rows if total else 0)
            names = class_names(version, count=len(reference.class_shares))
            has_labels = len(names) <= MAX_LABELS
            for name, share in zip(names, reference.class_shares if has_labels else (), strict=False):
                expected.add_metric([*labels, name], share)
            if total is None or not total.rows:
                continue
            for name, count in zip(names, total.classes.tolist() if has_labels else (), strict=False):
                shares.add_metric([*labels, name], count / total.rows)
            means["confidence"].add_metric(labels, total.confidence / total.rows)
            if total.typical_rows:
                means["typicality"].add_metric(labels, total.typicality / total.typical_rows)
            if total.rows >= max(MIN_ROWS, MIN_ROWS_PER_CLASS * len(names)):
                psi.add_metric(labels, stability_index(total.classes, reference))
        return [rows, psi, shares, expected, *means.values(), *expected_means.values()]

    def _add_others(self, key: tuple[str, int], total: Counts | None) -> Counts | None:
        for counts in (other[key] for other in self.others if key in other):
            if total is None:
                total = Counts(np.zeros_like(counts.classes))
            if total.classes.shape == counts.classes.shape:
                total.add(counts)
        return total

    def _available(self) -> list[ModelVersion]:
        """Return the available versions with a reference, and forget the windows of others."""
        repository = self._repository
        versions = [version for name in repository.names() for version in repository.available(name)]
        known = {(version.name, version.version) for version in versions}
        for key in self._windows.keys() - known:
            self._windows.pop(key, None)
        return [version for version in versions if version.info.reference is not None]


def stability_index(counts: np.ndarray, reference: Reference) -> float:
    """Return the population stability index of predicted classes: 0 for equal shares; from 0.25 on it counts as drift.

    Half a prediction is added to each class on both sides, because the index of an empty class is infinite.

    Args:
        counts: int64 (classes,), predictions of each class.
        reference: the shares to compare with.
    """
    expected = np.array(reference.class_shares) * reference.images + 0.5
    actual = counts + 0.5
    expected, actual = expected / expected.sum(), actual / actual.sum()
    return float(((actual - expected) * np.log(actual / expected)).sum())

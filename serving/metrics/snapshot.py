"""Snapshots of the metrics of one process, and their sum over the processes of a service."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.metrics_core import Metric

from serving.drift import Counts
from serving.inference.statistics import Statistics

VersionKey = tuple[str, int]  # a model and a version

# Gauges and counters that every process has the same value of, or that the responding process computes from the sums.
NOT_SUMMED = (
    "serving_ready",
    "serving_model_",
    "serving_folder_unreadable",
    "serving_warmup_records",
    "serving_drift_",
    "serving_class_share",
    "serving_mean_",
    "serving_validation_",
    "process_max_fds",
)
SMALLEST = ("process_start_time_seconds",)


@dataclass
class Snapshot:
    """What one process has counted.

    `families` are those of prometheus_client's registry, `counters` those that it cannot render.
    """

    families: list[Metric] = field(default_factory=list)
    counters: list[Metric] = field(default_factory=list)
    drift: Mapping[VersionKey, Counts] = field(default_factory=dict)
    statistics: Mapping[VersionKey, Statistics] = field(default_factory=dict)


class EndedProcesses:
    """The counters and histograms of processes that have ended, so that the sums never decrease."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self._stale: set[tuple[str, str]] = set()  # labels at the last `forget`

    def add(self, ended: Snapshot) -> None:
        """Add the last snapshot of a process."""
        old = self.snapshot
        statistics = {key: _copy(each) for key, each in old.statistics.items()}
        for key, each in ended.statistics.items():
            statistics.setdefault(key, Statistics()).add(each)
        self.snapshot = Snapshot(
            families=sum_families([_only_counted(old.families), _only_counted(ended.families)]),
            counters=sum_families([old.counters, ended.counters]),
            statistics=statistics,
        )

    def forget(self, known: set[tuple[str, int | None]]) -> None:
        """Remove the series of versions and models that have gone, at the second scrape that finds them gone.

        Args:
            known: see `metrics.models.find_known`.
        """
        labels = {(str(model), "" if version is None else str(version)) for model, version in known} | {("", "")}
        families = [*self.snapshot.families, *self.snapshot.counters]
        found = {_model_and_version(sample.labels) for family in families for sample in family.samples}
        stale = found - labels
        gone = stale & self._stale
        for family in families:
            family.samples = [each for each in family.samples if _model_and_version(each.labels) not in gone]
        self._stale = stale - gone
        self.snapshot.statistics = {
            key: statistics for key, statistics in self.snapshot.statistics.items() if key in known
        }


def _copy(statistics: Statistics) -> Statistics:
    copied = Statistics()
    copied.add(statistics)
    return copied


def _model_and_version(labels: Mapping[str, str]) -> tuple[str, str]:
    return labels.get("model") or labels.get("model_name") or labels.get("thread_pool_name", ""), labels.get(
        "version", ""
    )


def _only_counted(families: Iterable[Metric]) -> list[Metric]:
    return [
        family
        for family in families
        if family.type in ("counter", "histogram") and not family.name.startswith(NOT_SUMMED)
    ]


def sum_families(processes: Sequence[Iterable[Metric]]) -> list[Metric]:
    """Return the sum of the metrics of several processes, the first of which responds to the request."""
    summed: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for number, families in enumerate(processes):
        for family in families:
            if number and family.name.startswith(NOT_SUMMED):
                continue
            if family.name not in summed:
                summed[family.name] = Metric(family.name, family.documentation, family.type)
                values[family.name] = {}
            combine = _choose(family.name)
            found = values[family.name]
            for sample in family.samples:
                key = sample.name, tuple(sample.labels.items())
                found[key] = combine(found[key], sample.value) if key in found else sample.value
    for name, found in values.items():
        for (sample_name, labels), value in found.items():
            summed[name].add_sample(sample_name, dict(labels), value)
    return list(summed.values())


def _choose(name: str) -> Callable[[float, float], float]:
    return min if name in SMALLEST else lambda one, other: math.fsum((one, other))

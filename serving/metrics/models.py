"""Metrics of models and their versions, read from the repository at every scrape."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from serving.inference.repository import ModelRepository

KEPT_ENDED = 3  # unloaded versions of a model whose series stay on the page


class RepositoryCollector(Collector):
    """Reads the repository at every scrape."""

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository

    @override
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
        load_seconds = gauge("serving_model_load_seconds", "Time to load the version, warm-up included.", labels=of)
        warmup_seconds = gauge("serving_model_warmup_seconds", "Time to replay the warm-up records.", labels=of)
        loads = CounterMetricFamily("serving_model_loads", "Versions that were loaded.", labels=["model"])
        failures = CounterMetricFamily("serving_model_load_failures", "Loads that failed.", labels=["model"])
        ready.add_metric([], float(self._repository.ready))
        for version in self._repository.all_versions():
            labels = [version.name, str(version.version)]
            states.add_metric([*labels, version.state], 1)
            warmups.add_metric(labels, version.warmup_records)
            if version.load_s:
                load_seconds.add_metric(labels, version.load_s)
                warmup_seconds.add_metric(labels, version.warmup_s)
            if version.error_code != "OK":
                errors.add_metric([*labels, version.error_code], 1)
            for kind in version.warnings:
                warnings.add_metric([*labels, kind], 1)
        for problem in self._repository.folder_problems:
            folders.add_metric([problem.model or ""], 1)
        for model in self._repository.all_names():
            count = self._repository.load_counts(model)
            loads.add_metric([model], count.loaded)
            failures.add_metric([model], count.failed)
        remote = gauge(
            "serving_remote_backend_up", "1 if a backend of --remote responded to the last poll.", labels=["backend"]
        )
        for address, is_up in self._repository.backends.items():
            remote.add_metric([address], float(is_up))
        return [
            remote,
            ready,
            states,
            errors,
            warnings,
            folders,
            warmups,
            load_seconds,
            warmup_seconds,
            loads,
            failures,
        ]


def find_known(repository: ModelRepository) -> set[tuple[str, int | None]]:
    """Return the models and versions whose series stay on the page; a model itself has the version None."""
    known: set[tuple[str, int | None]] = set()
    for model in repository.all_names():
        versions = repository.list_versions(model)
        ended = sorted((each.version for each in versions if each.state == "END"), reverse=True)[KEPT_ENDED:]
        known.add((model, None))
        known.update((model, each.version) for each in versions if each.version not in ended)
    return known

"""How many workers fit the processors and the memory, and what each of them gets of the service's limits."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import replace
from pathlib import Path

from serving.errors import StartupError
from serving.inference.model_config import ModelConfig
from serving.inference.model_folders import find_model_versions
from serving.process_memory import cgroup_folders, memory_limit_bytes
from serving.settings import CORES, MIN_MEMORY_BUDGET, Settings

MIB = 1024 * 1024
SUPERVISOR_BYTES = 96 * MIB
WORKER_BYTES = 640 * MIB  # of a process with TensorFlow and a small model
COPIES = 2  # of the model files: while a version replaces another one, both are loaded


def choose_worker_count(settings: Settings) -> int:
    """Return the number of workers: that of the settings, or for `auto` as many as processors and memory allow.

    Raises:
        StartupError: so many workers do not fit the memory, or the system is not Linux.
    """
    if settings.workers == 1:
        return 1
    if not hasattr(os, "memfd_create"):
        if settings.workers == "auto":
            return 1
        raise StartupError(f"--workers {settings.workers} needs Linux; leave it out, or run several services")
    worker_bytes, limit_bytes = measure_worker(settings), memory_limit_bytes()
    fitting = max(1, (limit_bytes - SUPERVISOR_BYTES) // worker_bytes)
    if not isinstance(settings.workers, int):
        return min(count_processors(), fitting)
    if settings.workers > fitting:
        raise StartupError(
            f"--workers {settings.workers} needs about "
            f"{format_mib(settings.workers * worker_bytes + SUPERVISOR_BYTES)}: {format_mib(worker_bytes)} for each "
            f"({format_mib(WORKER_BYTES)} for the process, {format_mib(MIN_MEMORY_BUDGET)} for requests, and "
            f"{COPIES} times the model files) and {format_mib(SUPERVISOR_BYTES)} for the supervisor; the container or "
            f"machine has {format_mib(limit_bytes)}, enough for --workers {fitting}"
        )
    return settings.workers


def measure_worker(settings: Settings) -> int:
    """Return about how many bytes a worker takes: the process, the models, and the smallest memory budget."""
    model_bytes = 0 if settings.remote else sum(map(measure_model, _list_models(settings)))
    return WORKER_BYTES + COPIES * model_bytes + MIN_MEMORY_BUDGET


def count_processors() -> int:
    """Return how many processors this process may use: of its affinity, and of the CPU quota of its cgroups."""
    quotas = [float(CORES)]
    for folder in cgroup_folders("cpu"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = (folder / "cpu.max").read_text().split()  # version 2
            quotas.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota, period = (  # version 1; -1: no quota
                (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
            if int(quota) > 0:
                quotas.append(int(quota) / int(period))
    return max(1, math.floor(min(quotas)))


def measure_model(config: ModelConfig) -> int:
    """Return the bytes of the files of a model's versions that are selected for serving."""
    try:
        found = find_model_versions(config)
        chosen = config.policy.candidates(found)[: config.policy.latest]
        return sum(_measure(found[version]) for version in chosen)
    except OSError:
        return 0  # unreadable at the start; it may come later


def divide_settings(settings: Settings, workers: int) -> Settings:
    """Return the settings of each worker: equal parts of what is one process' limit."""
    budget = settings.memory_budget
    return replace(
        settings,
        threads=max(1, settings.threads // workers),
        concurrency=max(1, settings.concurrency // workers),
        max_connections=max(1, settings.max_connections // workers),
        memory_budget=None if budget is None else max(MIN_MEMORY_BUDGET, budget // workers),
    )


def _list_models(settings: Settings) -> list[ModelConfig]:
    from serving.app import choose_models

    with contextlib.suppress(OSError):
        return list(choose_models(settings)())
    return []


def format_mib(size_bytes: int) -> str:
    """Return a size as the messages on memory have it, such as 1,024 MiB."""
    return f"{size_bytes / MIB:,.0f} MiB"


def _measure(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

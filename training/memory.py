"""Estimates of the memory and disk space that training needs, and the memory that is available.

Memory is checked first because Linux kills a process that runs out of it, without a message.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from image_formats.header import MAX_PIXELS
from training.config import TrainingConfig
from training.errors import MemoryTooSmallError

_FLOAT = 4
_DECODING_BYTES = 9 * MAX_PIXELS  # of the largest image: decoded, converted and rotated


def require_memory(needed_bytes: int, purpose: str, *, advice: str) -> None:
    """Raise `MemoryTooSmallError`, with the numbers, if less than `needed_bytes` is available."""
    available = available_bytes()
    if available is not None and needed_bytes > available:
        raise MemoryTooSmallError(
            f"{purpose} need about {format_bytes(needed_bytes)} of memory, and {format_bytes(available)} are "
            f"available: {advice}"
        )


def network_bytes(config: TrainingConfig, input_shape: tuple[int, int, int], *, classes: int) -> int:
    """Return the approximate memory for training: weights, optimizer variables, and the features of a batch."""
    size = config.recipe.size(config, input_shape, classes=classes)
    gradients = size.weights
    weights = config.recipe.values_per_weight * size.weights + size.frozen
    return _FLOAT * (weights + gradients + config.batch_size * size.features)


def cache_bytes(config: TrainingConfig, images: int, input_shape: tuple[int, int, int], *, classes: int) -> int:
    """Return the size of the features that are kept of the training images, in memory and in the run directory."""
    return _FLOAT * images * config.recipe.size(config, input_shape, classes=classes).cached


def checkpoint_bytes(config: TrainingConfig, input_shape: tuple[int, int, int], *, classes: int) -> int:
    """Return the approximate size of a checkpoint."""
    size = config.recipe.size(config, input_shape, classes=classes)
    return _FLOAT * (config.recipe.values_per_weight * size.weights + size.frozen) + 2**16


def export_bytes(config: TrainingConfig, input_shape: tuple[int, int, int], *, classes: int) -> int:
    """Return the approximate size of an exported version, including warm-up requests."""
    height, width, channels = input_shape
    size = config.recipe.size(config, input_shape, classes=classes)
    return 2 * _FLOAT * (size.weights + size.frozen) + 150 * height * width * channels + 2**20


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory this process can still allocate: the least of machine, control groups and address-space limit.

    `None` if the system does not tell.
    """
    amounts = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        amounts.append(1024 * int((root / "proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]))
    with contextlib.suppress(OSError, ValueError, IndexError):
        limit = int((root / "proc/self/limits").read_text().split("Max address space")[1].split()[0])  # or "unlimited"
        used = int((root / "proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        amounts.append(limit - used)
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                amounts += _group_amounts(root / "sys/fs/cgroup", group, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                mount = root / "sys/fs/cgroup/memory"
                amounts += _group_amounts(mount, group, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return max(0, min(amounts)) if amounts else None


def count_decoding_threads(per_core: int = 1) -> int:
    """Return the number of threads to decode images with: `per_core` for each core, as far as large images fit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    available = available_bytes()
    return per_core * cores if available is None else max(1, min(per_core * cores, available // _DECODING_BYTES))


def format_bytes(count: float) -> str:
    """Format a number of bytes in MiB or GiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _group_amounts(mount: Path, group: str, limit: str, usage: str) -> list[int]:
    """Return the memory left in a control group and its parents; in a container, only the mount is visible."""
    amounts = []
    folder = mount / group.lstrip("/")
    for place in {mount, folder, *(parent for parent in folder.parents if parent.is_relative_to(mount))}:
        with contextlib.suppress(OSError, ValueError):  # missing, or "max"
            left = int((place / limit).read_text()) - int((place / usage).read_text())
            statistics = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            # The page cache counts as used, but is freed when memory runs short.
            amounts.append(left + int(statistics.get("inactive_file", 0)))
    return amounts

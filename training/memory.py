"""How much memory and disk space a training needs, and how much memory there is.

A process that runs out of memory is killed without a message.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from training.config import TrainingConfig
from training.errors import MemoryTooSmallError

_FLOAT = 4


def require_memory(needed_bytes: int, purpose: str, *, advice: str) -> None:
    """Raise `MemoryTooSmallError`, with the numbers, if less than `needed_bytes` is available."""
    available = available_bytes()
    if available is not None and needed_bytes > available:
        raise MemoryTooSmallError(
            f"{purpose} need about {format_bytes(needed_bytes)} of memory, and {format_bytes(available)} are "
            f"available: {advice}"
        )


def network_bytes(config: TrainingConfig, input_shape: tuple[int, int, int], *, classes: int) -> int:
    """Return about what training the config's network takes: weights with their optimizer, and a batch's features."""
    weights, features = config.recipe.size(config, input_shape, classes=classes)
    gradients = weights
    return _FLOAT * (config.recipe.values_per_weight * weights + gradients + config.batch_size * features)


def checkpoint_bytes(config: TrainingConfig, input_shape: tuple[int, int, int], *, classes: int) -> int:
    """Return about how large a checkpoint of the config's network is."""
    weights, _ = config.recipe.size(config, input_shape, classes=classes)
    return _FLOAT * config.recipe.values_per_weight * weights + 2**16


def export_bytes(config: TrainingConfig, input_shape: tuple[int, int, int], *, classes: int) -> int:
    """Return about how large an export of the config's network is, warm-up requests included."""
    height, width, channels = input_shape
    weights, _ = config.recipe.size(config, input_shape, classes=classes)
    return 2 * _FLOAT * weights + 150 * height * width * channels + 2**20


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return how much memory this process can still take: what the machine has left, or less in a control group.

    `None` where the system does not say.
    """
    amounts = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        amounts.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                amounts += _group_amounts(root / "sys/fs/cgroup", group, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                mount = root / "sys/fs/cgroup/memory"
                amounts += _group_amounts(mount, group, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return max(0, min(amounts)) if amounts else None


def format_bytes(count: float) -> str:
    """Return an amount as people read it."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _group_amounts(mount: Path, group: str, limit: str, usage: str) -> list[int]:
    """Return what is left in a control group and in those around it; in a container, only the mount can be seen."""
    amounts = []
    folder = mount / group.lstrip("/")
    for place in {mount, folder, *(parent for parent in folder.parents if parent.is_relative_to(mount))}:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            left = int((place / limit).read_text()) - int((place / usage).read_text())
            statistics = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            # The page cache is counted as used, and given back when memory runs short.
            amounts.append(left + int(statistics.get("inactive_file", 0)))
    return amounts

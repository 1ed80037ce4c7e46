"""The speed of this machine, for bounds of latencies."""

from __future__ import annotations

import json
import statistics
import time

# Estimated for the machine for which the bounds were set, two cores of an AMD EPYC (Zen 4).
REFERENCE_S = 0.045


def measure_slowdown() -> float:
    """Return how many times as long Python takes now as on the reference machine; at least 1."""
    return max(1.0, statistics.median(_measure() for _ in range(5)) / REFERENCE_S)


def _measure() -> float:
    started_s = time.perf_counter()
    for number in range(10_000):
        document = json.loads(json.dumps({"instances": [number, number + 1], "name": f"model-{number}"}))
        sorted(document.items(), key=lambda item: item[0])
    return time.perf_counter() - started_s

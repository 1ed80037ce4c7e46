"""TensorFlow, the loaded signature and a loop, with no server around them: what every server is measured against."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.server_process import resident_mb

_started_s = time.perf_counter()
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

IMPORT_S = time.perf_counter() - _started_s


def time_call(infer: Callable[..., Any], *, rows: int, seconds: float) -> float:
    """Return the median time of a call with so many rows, in milliseconds."""
    shape = infer.structured_input_signature[1]["images"].shape[1:]
    images = np.random.default_rng(0).integers(0, 256, (rows, *shape), dtype=np.uint8)
    times = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        started_s = time.perf_counter()
        outputs = infer(images=tf.constant(images))
        {name: tensor.numpy() for name, tensor in outputs.items()}
        times.append(time.perf_counter() - started_s)
    return float(np.median(times[len(times) // 10 :]) * 1e3)


if __name__ == "__main__":
    path, seconds = sys.argv[1], float(sys.argv[2])
    model = tf.saved_model.load(path)
    infer = model.signatures["serving_default"]
    memory_mb = resident_mb("self")
    one_ms = time_call(infer, rows=1, seconds=seconds) if seconds else 0.0
    images_per_s = 64e3 / time_call(infer, rows=64, seconds=seconds) if seconds else 0.0
    print(json.dumps({"import_s": IMPORT_S, "memory_mb": memory_mb, "one_ms": one_ms, "images_per_s": images_per_s}))

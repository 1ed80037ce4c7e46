"""The loaded signature called in a loop, with no server around it: what every server is measured against."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import tensorflow as tf


def time_call(path: str, *, rows: int, seconds: float) -> float:
    """Return the median time of a call with so many rows, in milliseconds."""
    model = tf.saved_model.load(path)
    infer = model.signatures["serving_default"]
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
    one, many = time_call(path, rows=1, seconds=seconds), time_call(path, rows=64, seconds=seconds)
    print(json.dumps({"one_ms": one, "images_per_s": 64 / many * 1e3}))

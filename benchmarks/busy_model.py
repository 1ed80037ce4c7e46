"""SavedModels that keep a core busy for a given time per row or per call, and one with a large output."""

from __future__ import annotations

import time
from pathlib import Path

import tensorflow as tf

_SIDE = 160  # of the matrices that are multiplied: about half a millisecond a round


def _work(rounds: tf.Tensor) -> tf.Tensor:
    """Multiply matrices so many times, one after another; returns zero."""
    matrix = tf.eye(_SIDE)
    _, product = tf.while_loop(
        lambda done, _: done < rounds,
        lambda done, product: (done + 1, tf.matmul(product, matrix)),
        (0, tf.eye(_SIDE)),
        parallel_iterations=1,
    )
    return tf.reduce_sum(product) - _SIDE


def measure_round_s() -> float:
    """Return how long one round of the work takes here, on one core."""
    work = tf.function(_work, input_signature=[tf.TensorSpec((), tf.int32)])
    work(tf.constant(200))
    started_s = time.perf_counter()
    work(tf.constant(400))
    return (time.perf_counter() - started_s) / 400


def save_busy_model(path: Path, *, row_s: float = 0.0, call_s: float = 0.0, batched: bool = True) -> Path:
    """Write a model that returns `y`, the sum of each row of `x` (float), after it has computed for a while.

    It refuses negative numbers, after the work.

    Args:
        path: its version folder.
        row_s: how long it computes for each row, on one core of this machine, roughly.
        call_s: how long it computes for each call, whatever its rows.
        batched: x is (n, any); otherwise (2,), without a batch dimension.
    """
    round_s = measure_round_s()
    per_row, per_call = round(row_s / round_s), round(call_s / round_s)

    @tf.function(input_signature=[tf.TensorSpec((None, None) if batched else (2,), tf.float32, "x")])
    def compute(x: tf.Tensor) -> dict[str, tf.Tensor]:
        zero = _work(tf.shape(x)[0] * per_row + per_call)
        with tf.control_dependencies([zero, tf.debugging.assert_non_negative(x, message="x is negative")]):
            return {"y": tf.reduce_sum(x, axis=-1) + zero}

    tf.saved_model.save(tf.Module(), str(path), signatures={"serving_default": compute})
    return path


def save_wide_model(path: Path, *, width: int = 250_000) -> Path:
    """Write a model whose output is `width` numbers for each row of `x`, float (n, 1)."""

    @tf.function(input_signature=[tf.TensorSpec((None, 1), tf.float32, "x")])
    def widen(x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": x / tf.range(1.0, width + 1.0)}

    tf.saved_model.save(tf.Module(), str(path), signatures={"serving_default": widen})
    return path

"""What a model returns: probabilities or logits, of several classes or of two by one value.

What is exported is a softmax over logits. A final softmax or sigmoid is removed, so that the logits are exact. One
sigmoid p of two classes becomes the probabilities (1 - p, p): the softmax of the logits (-z/2, z/2), where p is the
sigmoid of z. With (0, z) the first class would have no gradient, and so no heat map. Several sigmoids are rejected: an
image may have several of their labels or none, which one label cannot say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from training.errors import ModelError
from training.importer.inspection import describe_shape
from training.importer.loading import Source
from training.importer.network import Network

_SUM_TOLERANCE = 1e-3
# Operations that end a layer without an activation: what they return are logits, whatever the values.
_LINEAR = ("BiasAdd", "MatMul", "Add", "AddV2", "Conv2D")
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Outputs:
    """How a model's output becomes logits.

    Attributes:
        description: for people.
        classes: number of classes.
        tensor: of the frozen graph, from which the logits are computed.
        to_logits: from this tensor, float32 (n, classes).
        to_probabilities: from the model's own output, float64 (n, classes).
    """

    description: str
    classes: int
    tensor: tf.Tensor
    to_logits: Callable[[tf.Tensor], tf.Tensor]
    to_probabilities: Callable[[np.ndarray], np.ndarray]


def read_outputs(network: Network, values: np.ndarray, *, source: Source) -> Outputs:
    """Find out what a model returns.

    Args:
        network: the model.
        values: its output (n, ...) for some images, under every plausible scale.
        source: for messages.

    Raises:
        ModelError: it does not return one value for each class, or its rows are not those of one classifier.
    """
    found = f"{source.description} returns {describe_shape((None, *values.shape[1:]))}"
    if values.ndim != 2:
        raise ModelError(
            f"{found}; expected one row for each image, (n, classes). A model without its classification head, such as "
            "one built with include_top=False, needs a pooling and a Dense layer, trained, at its end"
        )
    last = network.strip(network.output)
    activation, count = last.op.type, values.shape[1]
    inner = last.op.inputs[0] if activation in ("Softmax", "Sigmoid") else last
    values = values[np.isfinite(values).all(axis=1)]
    within = bool(len(values)) and values.min() >= 0 and values.max() <= 1
    if count == 1:
        return _read_single(activation, inner, last, is_probability=within)
    if activation == "Softmax":
        return Outputs(f"softmax of {count} classes", count, inner, _cast, _same)
    if activation == "Sigmoid":
        raise ModelError(_reject_sigmoids(found, count, values))
    if within and activation not in _LINEAR:
        sums = values.sum(axis=1)
        if np.abs(sums - 1).max() > _SUM_TOLERANCE:
            raise ModelError(_reject_sigmoids(found, count, values))
        return Outputs(f"probabilities of {count} classes", count, last, _log, _same)
    return Outputs(f"logits of {count} classes", count, last, _cast, _softmax)


def _read_single(activation: str, inner: tf.Tensor, last: tf.Tensor, *, is_probability: bool) -> Outputs:
    if activation == "Sigmoid":
        return Outputs("one sigmoid, the probability of the second of two classes", 2, inner, _split, _add_other)
    if activation == "Softmax":
        raise ModelError(
            "the model returns a softmax of one value, which is always 1. Use a sigmoid, and train it again"
        )
    if is_probability and activation not in _LINEAR:
        text = "one probability, of the second of two classes"
        return Outputs(text, 2, last, lambda p: _split(_log(p) - _log(1 - p)), _add_other)
    text = "one logit, of the second of two classes"
    return Outputs(text, 2, last, _split, lambda z: _add_other(1 / (1 + np.exp(-z.astype(np.float64)))))


def _reject_sigmoids(found: str, count: int, values: np.ndarray) -> str:
    sums = values.sum(axis=1)
    return (
        f"{found} of values from 0 to 1 whose rows sum to {sums.min():.3g} to {sums.max():.3g}, not to 1: {count} "
        "independent probabilities, as of several sigmoids. With them an image may have several labels or none, but "
        "the service returns the probabilities of one label. If exactly one label is right for each image, end the "
        "model with softmax instead of sigmoid (model.layers[-1].activation = keras.activations.softmax, then "
        "model.save), and import it with --data to calibrate it"
    )


def _cast(values: tf.Tensor) -> tf.Tensor:
    return tf.cast(values, tf.float32)


def _log(values: tf.Tensor) -> tf.Tensor:
    return tf.math.log(tf.maximum(_cast(values), _TINY))


def _split(logit: tf.Tensor) -> tf.Tensor:
    half = _cast(logit) / 2
    return tf.concat([-half, half], axis=1)


def _same(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)


def _add_other(probability: np.ndarray) -> np.ndarray:
    probability = probability.astype(np.float64)
    return np.concatenate([1 - probability, probability], axis=1)


def _softmax(logits: Any) -> np.ndarray:
    powers: np.ndarray = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    powers /= powers.sum(axis=1, keepdims=True)
    return powers

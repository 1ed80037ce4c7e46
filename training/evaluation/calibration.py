"""Temperature scaling: divides the logits by one number, so that confidence matches accuracy.

Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599), section 4.2. The predicted class never
changes.
"""

from __future__ import annotations

import numpy as np

# The best temperature is 0 if all images are classified correctly, and infinite for noise.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.1, 10.0


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature with the lowest loss, between `MIN_TEMPERATURE` and `MAX_TEMPERATURE`.

    Args:
        probabilities: float32 (n, classes), of images not used for training.
        labels: int64 (n,), true classes, from 0.
    """
    logits = _logits(probabilities)
    own = logits[np.arange(len(labels)), labels]
    # The loss is convex in the inverse temperature, so its slope is 0 at one point: bisection.
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    for _ in range(50):
        inverse = (low + high) / 2
        slope = ((_softmax(inverse * logits) * logits).sum(axis=1) - own).mean()
        low, high = (low, inverse) if slope > 0 else (inverse, high)
    return float(2 / (low + high))


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return the probabilities of the logits divided by `temperature`, float32 (n, classes)."""
    return _softmax(_logits(probabilities) / temperature).astype(np.float32)


def average_logits(*predictions: np.ndarray) -> np.ndarray:
    """Return the probabilities of the mean logits, float32 (n, classes)."""
    return _softmax(np.mean([_logits(probabilities) for probabilities in predictions], axis=0)).astype(np.float32)


def _logits(probabilities: np.ndarray) -> np.ndarray:
    # Up to a constant per row, which does not change the softmax. A probability of 0 counts as the smallest float32.
    return np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers: np.ndarray = np.exp(logits - logits.max(axis=1, keepdims=True))
    powers /= powers.sum(axis=1, keepdims=True)
    return powers

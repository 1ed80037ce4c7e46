"""Temperature scaling: one number that makes a classifier's confidence mean what it says.

Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599), section 4.2. The temperature divides the
logits, so it changes how sure an answer is and never which class it is. Knows only arrays.
"""

from __future__ import annotations

import numpy as np

# On images that are all classified right, the best temperature would be 0, and on noise infinite.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.1, 10.0


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature with the lowest loss, between `MIN_TEMPERATURE` and `MAX_TEMPERATURE`.

    Args:
        probabilities: float32 (n, classes), of images that were not trained on.
        labels: int64 (n,), the right classes, from 0.
    """
    logits = _logits(probabilities)
    own = logits[np.arange(len(labels)), labels]
    # The loss is convex in the inverse of the temperature, so where its slope is 0 there is one place.
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    for _ in range(50):
        inverse = (low + high) / 2
        slope = ((_softmax(inverse * logits) * logits).sum(axis=1) - own).mean()
        low, high = (low, inverse) if slope > 0 else (inverse, high)
    return float(2 / (low + high))


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return float32 (n, classes): the probabilities that the logits divided by `temperature` have."""
    return _softmax(_logits(probabilities) / temperature).astype(np.float32)


def average_views(*views: np.ndarray) -> np.ndarray:
    """Return float32 (n, classes): the probabilities that the mean of the views' logits has."""
    return _softmax(np.mean([_logits(view) for view in views], axis=0)).astype(np.float32)


def _logits(probabilities: np.ndarray) -> np.ndarray:
    # Up to a constant in each row, which a softmax does not see. A probability rounded to 0 counts as the smallest.
    return np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers: np.ndarray = np.exp(logits - logits.max(axis=1, keepdims=True))
    powers /= powers.sum(axis=1, keepdims=True)
    return powers

"""Predictions on the validation images, to compare those in service with. Imports no TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Reference:
    """Predictions of an exported model on the images that it was calibrated on.

    Attributes:
        images: number of images.
        class_shares: share of the images that each class was predicted for; they sum to 1.
        mean_confidence: mean of the highest probability.
        mean_typicality: mean typicality.
    """

    images: int
    class_shares: tuple[float, ...]
    mean_confidence: float
    mean_typicality: float

    def to_json(self) -> dict[str, Any]:
        """Return JSON values: the field `reference` of model.json."""
        return {**vars(self), "class_shares": list(self.class_shares)}


def summarize_predictions(probabilities: np.ndarray, typicality: np.ndarray) -> Reference:
    """Summarize predictions.

    Args:
        probabilities: float32 (n, classes), calibrated, of at least one image.
        typicality: float32 (n,).
    """
    images, classes = probabilities.shape
    counts = np.bincount(probabilities.argmax(axis=1), minlength=classes)
    return Reference(
        images=images,
        class_shares=tuple((counts / images).tolist()),
        mean_confidence=float(probabilities.max(axis=1).mean(dtype=np.float64)),
        mean_typicality=float(typicality.mean(dtype=np.float64)),
    )

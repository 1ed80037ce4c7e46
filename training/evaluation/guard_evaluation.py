"""Results of a guard on the test images and on outliers. Imports no TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.evaluation.conformal import PredictionSets
from training.evaluation.roc import area_under_roc


@dataclass(frozen=True, kw_only=True, eq=False)
class GuardEvaluation:
    """A guard on the test images, and on outliers.

    Attributes:
        typicality: float32 (n,), of the test images.
        outliers: the same for each set of outliers, by name.
        threshold: typicality below which an image is not typical.
        sets: prediction sets of the test images.
    """

    typicality: np.ndarray
    outliers: Mapping[str, np.ndarray]
    threshold: float
    sets: PredictionSets

    @property
    def auroc(self) -> dict[str, float]:
        """Probability that an outlier is less typical than a test image, for each set of outliers."""
        return {name: area_under_roc(self.typicality, found) for name, found in self.outliers.items()}

    @property
    def flagged(self) -> float:
        """Share of the test images that are not typical."""
        return float((self.typicality < self.threshold).mean())

    def to_json(self) -> dict[str, Any]:
        """Return JSON values: the fields `typicality` and `prediction_sets` of model.json."""
        return {
            "typicality": {
                "method": "energy + variation",
                "threshold": self.threshold,
                "flagged_test_images": self.flagged,
                "auroc": self.auroc,
            },
            "prediction_sets": self.sets.to_json(),
        }

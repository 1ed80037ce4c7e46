"""Conformal prediction sets: the labels of an image that cannot be ruled out.

LAC, the least ambiguous sets (Sadinle et al. 2019, arXiv 1609.00451): a label belongs to the set if its probability
reaches a threshold, which is fitted so that the true label does for the wanted share of images. The share holds for
images like those that the threshold was fitted on, whatever the model; no other such rule has smaller sets on average.
A set can be empty: for a model that is more accurate than the wanted share, or an image like none in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

COVERAGE = 0.9  # wanted share of images whose set has the true label


@dataclass(frozen=True)
class PredictionSets:
    """Prediction sets on labelled images that the threshold was not fitted on.

    Attributes:
        threshold: smallest probability of a label in a set.
        coverage: share of images whose set has the true label.
        mean_size: labels in a set, on average.
        sizes: shares of sets with 0, 1, 2, ... labels; they sum to 1.
    """

    threshold: float
    coverage: float
    mean_size: float
    sizes: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"method": "LAC", "wanted_coverage": COVERAGE, **vars(self)}


def fit_set_threshold(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the smallest probability of a label in a set, for a coverage of `COVERAGE` on images like these.

    With fewer than 9 images nothing can be ruled out, and it is 0.

    Args:
        probabilities: float32 (n, classes), of images not used for training.
        labels: int64 (n,), true classes, from 0.
    """
    own = np.sort(probabilities[np.arange(len(labels)), labels])
    # One more than the images, for the one that is asked about: this makes the coverage exact for few images too.
    covered = math.ceil((len(own) + 1) * COVERAGE)
    return float(own[len(own) - covered]) if covered <= len(own) else 0.0


def evaluate_sets(probabilities: np.ndarray, labels: np.ndarray, *, threshold: float) -> PredictionSets:
    """Measure prediction sets on labelled images; arguments as for `fit_set_threshold`."""
    sets = probabilities >= np.float32(threshold)
    sizes = sets.sum(axis=1)
    return PredictionSets(
        threshold=threshold,
        coverage=float(sets[np.arange(len(labels)), labels].mean()),
        mean_size=float(sizes.mean()),
        sizes=tuple((np.bincount(sizes) / len(sizes)).tolist()),
    )

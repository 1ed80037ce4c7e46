"""Weights of the classes in the loss, where some have many more images than others."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

LARGEST_FACTOR = 5  # between the sizes of the largest and the smallest class, up to which no class is weighted
_SHOWN_AT_MOST = 5

logger = logging.getLogger(__name__)


def balance_classes(labels: np.ndarray, class_names: Sequence[str]) -> np.ndarray | None:
    """Return weights by which all classes count the same in the loss; `None` if they are of similar size.

    Args:
        labels: int64 (n,), of the training images.
        class_names: a name for each class.

    Returns:
        float64 (classes,), inverse to the number of images, with a mean of 1 over the images; 0 without images.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    present = counts[counts > 0]
    if present.max() <= LARGEST_FACTOR * present.min():
        return None
    weights: np.ndarray = np.where(counts > 0, len(labels) / (len(present) * np.maximum(counts, 1)), 0.0)
    order = np.argsort(counts, kind="stable")
    shown = [f"{class_names[row]} ({counts[row]:,} images) {weights[row]:.3g}" for row in order if counts[row]]
    if len(shown) > _SHOWN_AT_MOST:
        shown = [*shown[: _SHOWN_AT_MOST - 1], "...", shown[-1]]
    logger.info(
        "the largest class has %.1f times the images of the smallest, so the loss is weighted: %s",
        present.max() / present.min(),
        ", ".join(shown),
    )
    return weights

"""How good a classifier is: accuracy, figures by class, confusion, calibration. Knows only arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class ClassFigures:
    """One class.

    What is not defined is NaN: precision and F1 of a class that is never predicted, recall and F1 of one that
    has no images.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Calibration:
    """Whether a confidence of 80 % is right 80 % of the time (Guo et al. 2017, arXiv 1706.04599, section 2).

    Attributes:
        counts: int64 (bins,), images whose confidence falls into each of the equally wide bins over 0 to 1; a
            confidence on the edge of two belongs to the lower.
        confidences: float64 (bins,), their mean confidence; NaN in an empty bin.
        accuracies: float64 (bins,), their accuracy; NaN in an empty bin.
        expected_calibration_error: the mean distance between the two, weighted by the counts.
    """

    counts: np.ndarray
    confidences: np.ndarray
    accuracies: np.ndarray
    expected_calibration_error: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON can hold them; what is not defined is None."""
        bins = zip(self.counts, self.confidences, self.accuracies, strict=True)
        return {
            "expected_calibration_error": self.expected_calibration_error,
            "bins": [
                {"count": int(count), "confidence": _defined(confidence), "accuracy": _defined(accuracy)}
                for count, confidence, accuracy in bins
            ],
        }


@dataclass(frozen=True)
class Evaluation:
    """What a set of labelled images says of a classifier.

    Attributes:
        accuracy: share of images whose most probable class is the right one.
        loss: mean negative natural logarithm of the right class's probability, which is taken as at least the
            smallest normal float32 (1.2e-38): a probability rounded to 0 would make the mean infinite.
        count: number of images.
        per_class: figures of each class, in the order of the labels.
        confusion: int64 (classes, classes): images of the class of the row, predicted as the class of the column.
        calibration: of the highest probability.
    """

    accuracy: float
    loss: float
    count: int
    per_class: tuple[ClassFigures, ...]
    confusion: np.ndarray
    calibration: Calibration

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON can hold them; what is not defined is None."""
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "count": self.count,
            "per_class": [
                {
                    "name": figures.name,
                    "precision": _defined(figures.precision),
                    "recall": _defined(figures.recall),
                    "f1": _defined(figures.f1),
                    "support": figures.support,
                }
                for figures in self.per_class
            ],
            "confusion": self.confusion.tolist(),
            "calibration": self.calibration.to_json(),
        }


def evaluate(probabilities: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Evaluation:
    """Judge predictions.

    Args:
        probabilities: float32 (n, classes), each row summing to 1.
        labels: int64 (n,), the right classes, from 0.
        class_names: a name for each column.

    Raises:
        ValueError: the shapes do not belong together, there are no images, a probability is NaN, or a label has
            no column.
    """
    if len(labels) == 0 or probabilities.shape != (len(labels), len(class_names)):
        raise ValueError(
            f"expected probabilities ({len(labels)}, {len(class_names)}) of at least one image; "
            f"got {probabilities.shape}"
        )
    if np.isnan(probabilities).any():
        raise ValueError(f"expected probabilities; got NaN for {np.isnan(probabilities).any(axis=1).sum()} images")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise ValueError(f"expected labels from 0 to {len(class_names) - 1}; got {labels.min()} to {labels.max()}")
    predicted = probabilities.argmax(axis=1)
    right = predicted == labels
    confusion = np.zeros((len(class_names), len(class_names)), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    # A softmax's rounding can also give a little more than 1.
    own = np.clip(probabilities[np.arange(len(labels)), labels].astype(np.float64), np.finfo(np.float32).tiny, 1)
    return Evaluation(
        accuracy=float(right.mean()),
        loss=abs(float(np.log(own).mean())),  # a negated 0 would be printed as -0.0000
        count=len(labels),
        per_class=tuple(_class_figures(confusion, class_id, name) for class_id, name in enumerate(class_names)),
        confusion=confusion,
        calibration=_calibrate(probabilities.max(axis=1).astype(np.float64), right),
    )


def _class_figures(confusion: np.ndarray, class_id: int, name: str) -> ClassFigures:
    right = int(confusion[class_id, class_id])
    support, predictions = int(confusion[class_id].sum()), int(confusion[:, class_id].sum())
    return ClassFigures(
        name=name,
        precision=right / predictions if predictions else math.nan,
        recall=right / support if support else math.nan,
        f1=2 * right / (support + predictions) if predictions and support else math.nan,
        support=support,
    )


def _calibrate(confidences: np.ndarray, right: np.ndarray) -> Calibration:
    bins = np.clip(np.ceil(confidences * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    with np.errstate(invalid="ignore"):
        mean_confidences = np.bincount(bins, confidences, CALIBRATION_BINS) / counts
        accuracies = np.bincount(bins, right, CALIBRATION_BINS) / counts
    gaps = np.nan_to_num(np.abs(mean_confidences - accuracies))
    return Calibration(counts, mean_confidences, accuracies, float((gaps * counts).sum() / counts.sum()))


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else float(value)

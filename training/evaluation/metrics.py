"""Metrics of a classifier: accuracy, loss, precision and recall by class, confusion matrix, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of one class; NaN where undefined.

    Precision is undefined for a class that is never predicted, recall for one without images, F1 for both.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Calibration:
    """Accuracy by confidence: 80 % of predictions with confidence 0.8 should be right (arXiv 1706.04599, section 2).

    Attributes:
        counts: int64 (bins,), images in each of the equally wide bins over the confidences 0 to 1. A confidence on
            the edge of two bins belongs to the lower.
        confidences: float64 (bins,), mean confidence; NaN in an empty bin.
        accuracies: float64 (bins,), accuracy; NaN in an empty bin.
        expected_calibration_error: mean absolute difference of the two, weighted by the counts.
    """

    counts: np.ndarray
    confidences: np.ndarray
    accuracies: np.ndarray
    expected_calibration_error: float

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; `None` where undefined."""
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
    """Metrics of a classifier on labelled images.

    Attributes:
        accuracy: share of images whose most probable class is their label, from 0 to 1.
        loss: mean cross-entropy in nats. Probabilities are clipped to the smallest normal float32 (1.2e-38): one
            rounded to 0 would make the mean infinite.
        count: number of images.
        per_class: metrics of each class, in the order of the labels.
        confusion: int64 (classes, classes), number of images by true class (row) and predicted class (column).
        calibration: of the highest probability of each image.
    """

    accuracy: float
    loss: float
    count: int
    per_class: tuple[ClassMetrics, ...]
    confusion: np.ndarray
    calibration: Calibration

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; `None` where undefined."""
        per_class = [
            {name: _defined(value) if isinstance(value, float) else value for name, value in vars(metrics).items()}
            for metrics in self.per_class
        ]
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "count": self.count,
            "per_class": per_class,
            "confusion": self.confusion.tolist(),
            "calibration": self.calibration.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class CalibratedEvaluation:
    """Metrics of a model whose logits are divided by a temperature.

    Attributes:
        evaluation: after the division.
        uncalibrated: calibration before it.
        temperature: the divisor.
        probabilities: float32 (n, classes), of the images, after the division.
    """

    evaluation: Evaluation
    uncalibrated: Calibration
    temperature: float
    probabilities: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; `None` where undefined."""
        return {
            **self.evaluation.to_json(),
            "temperature": self.temperature,
            "uncalibrated": self.uncalibrated.to_json(),
        }


def evaluate(probabilities: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Evaluation:
    """Compare predictions with labels.

    Args:
        probabilities: float32 (n, classes), each row summing to 1.
        labels: int64 (n,), true classes, from 0.
        class_names: a name for each column.

    Raises:
        ValueError: the shapes do not match, there are no images, a probability is NaN, or a label is out of range.
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
    # Rounding in the softmax can also give slightly more than 1.
    own = np.clip(probabilities[np.arange(len(labels)), labels].astype(np.float64), np.finfo(np.float32).tiny, 1)
    return Evaluation(
        accuracy=float(right.mean()),
        loss=abs(float(np.log(own).mean())),  # of -0.0, which would be printed as -0.0000
        count=len(labels),
        per_class=tuple(_class_metrics(confusion, class_id, name) for class_id, name in enumerate(class_names)),
        confusion=confusion,
        calibration=_calibrate(probabilities.max(axis=1).astype(np.float64), right),
    )


def _class_metrics(confusion: np.ndarray, class_id: int, name: str) -> ClassMetrics:
    right = int(confusion[class_id, class_id])
    support, predictions = int(confusion[class_id].sum()), int(confusion[:, class_id].sum())
    return ClassMetrics(
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

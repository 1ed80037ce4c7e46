"""Whether an exported model answers as the trained one: compares logits, as far as float32 can have them equal.

Folding changes the order of the operations, and each rounds in proportion to its numbers. So the differences grow with
the logits, which for a network that is sure of itself are in the hundreds.
"""

from __future__ import annotations

import numpy as np

from training.errors import ExportError

# Of the largest logit. Measured: 1e-5 at most, for every variant and preset, on 32x32 and on 200x150 pixels.
RELATIVE_TOLERANCE = 2e-4
ABSOLUTE_TOLERANCE = 1e-5  # for small logits, whose probabilities are rounded to float32 on the way

# Smaller probabilities are equal. TensorFlow's softmax rounds those below 2.4e-38 to 0 (measured), earlier than float32
# has to (1.2e-38): a relative difference so far down tells nothing.
_SMALLEST = 1e-36


def to_logits(probabilities: np.ndarray) -> np.ndarray:
    """Return logits, float64 (n, classes), that have these probabilities; those below 1e-36 count as 1e-36."""
    return np.log(np.maximum(probabilities.astype(np.float64), _SMALLEST))


def compare_logits(actual: np.ndarray, expected: np.ndarray, *, where: str) -> None:
    """Check that two computations of the same logits agree.

    Args:
        actual: (n, classes).
        expected: (n, classes), of the trained model.
        where: what computed `actual`, for the error.

    Raises:
        ExportError: they differ by more than the tolerance, or have other classes where the margin exceeds it.
    """
    tolerance = _tolerance(expected, where=where)
    difference = float(np.abs(actual - expected).max())
    if not difference <= tolerance:  # so that NaN fails
        raise ExportError(
            f"{where} differs from the trained model: its logits by {difference:.2g}, more than {tolerance:.2g}, "
            f"which is {RELATIVE_TOLERANCE:g} of the largest"
        )
    _compare_classes(actual.argmax(axis=1), expected, tolerance, where=where)


def compare_answers(
    answer: dict[str, np.ndarray], expected: np.ndarray, class_names: tuple[str, ...], *, where: str
) -> None:
    """Check that an exported signature's outputs are those of the trained model.

    Args:
        answer: its outputs `probabilities`, `class_id` and `label`.
        expected: (n, classes), logits of the trained model.
        class_names: a label for each class.
        where: what answered, for the error.

    Raises:
        ExportError: as `compare_logits`, or the outputs do not belong together.
    """
    tolerance = _tolerance(expected, where=where)
    exact = expected.astype(np.float64)
    exact = exact - exact.max(axis=1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    difference = float(np.abs(to_logits(answer["probabilities"]) - np.maximum(exact, np.log(_SMALLEST))).max())
    if not difference <= tolerance:
        raise ExportError(
            f"{where} differs from the trained model: the logarithms of its probabilities by {difference:.2g}, more "
            f"than {tolerance:.2g}"
        )
    class_ids = answer["probabilities"].argmax(axis=1)
    _compare_classes(class_ids, expected, tolerance, where=where)
    labels = [class_names[class_id].encode() for class_id in class_ids]
    if answer["class_id"].tolist() != class_ids.tolist() or answer["label"].tolist() != labels:
        raise ExportError(f"{where} gives labels that do not belong to its probabilities")


def _tolerance(expected: np.ndarray, *, where: str) -> float:
    if not np.isfinite(expected).all():
        raise ExportError(f"{where} cannot be compared: the trained model's own logits are infinite or NaN")
    return max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * float(np.abs(expected).max()))


def _compare_classes(actual: np.ndarray, expected: np.ndarray, tolerance: float, *, where: str) -> None:
    """Check that the classes are the same wherever the best logit leads by more than rounding can change."""
    ordered = np.sort(expected, axis=1)
    margins = ordered[:, -1] - ordered[:, -2] if expected.shape[1] > 1 else np.zeros(len(expected))
    differs = (margins > tolerance) & (actual != expected.argmax(axis=1))
    if differs.any():
        raise ExportError(
            f"{where} differs from the trained model: it gives other labels to {differs.sum()} of {len(actual)} images"
        )

"""Compares the outputs of an exported model with the trained model's logits, within float32 rounding.

Folding reorders operations, and each rounds in proportion to its operands. So the tolerance grows with the logits,
which reach the hundreds for a confident network.
"""

from __future__ import annotations

import numpy as np

from training.errors import ExportError

# Relative to the largest logit. Measured: at most 1e-5 for every variant and preset, at 32x32 and 200x150 pixels.
RELATIVE_TOLERANCE = 2e-4
ABSOLUTE_TOLERANCE = 1e-5  # for small logits, whose probabilities are rounded to float32

HEAT_MAP_TOLERANCE = 1e-3  # of maps from 0 to 1

# Smaller probabilities count as equal. TensorFlow's softmax rounds those below 2.4e-38 to 0 (measured), so relative
# differences near it mean nothing.
_SMALLEST = 1e-36


def to_logits(probabilities: np.ndarray) -> np.ndarray:
    """Return logits, float64 (n, classes), of these probabilities; those below 1e-36 count as 1e-36."""
    return np.log(np.maximum(probabilities.astype(np.float64), _SMALLEST))


def compare_logits(actual: np.ndarray, expected: np.ndarray, *, where: str) -> None:
    """Check that two computations of the same logits agree.

    Args:
        actual: (n, classes).
        expected: (n, classes), of the trained model.
        where: what computed `actual`, for the error message.

    Raises:
        ExportError: they differ by more than the tolerance, or in a class whose margin exceeds it.
    """
    tolerance = _tolerance(expected, where=where)
    difference = float(np.abs(actual - expected).max())
    if not difference <= tolerance:  # so that NaN fails
        raise ExportError(
            f"{where} differs from the trained model: its logits by {difference:.2g}, more than {tolerance:.2g}, "
            f"which is {RELATIVE_TOLERANCE:g} of the largest"
        )
    _compare_classes(actual.argmax(axis=1), expected, tolerance, where=where)


def compare_outputs(
    outputs: dict[str, np.ndarray], expected: np.ndarray, class_names: tuple[str, ...], *, where: str
) -> None:
    """Check that the outputs of an exported signature match the trained model.

    Args:
        outputs: `probabilities`; `class_id` and `label` where the signature has them.
        expected: (n, classes), logits of the trained model.
        class_names: a label for each class.
        where: what returned the outputs, for the error message.

    Raises:
        ExportError: as for `compare_logits`, or class or label do not match the probabilities.
    """
    tolerance = _tolerance(expected, where=where)
    exact = expected.astype(np.float64)
    exact = exact - exact.max(axis=1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    difference = float(np.abs(to_logits(outputs["probabilities"]) - np.maximum(exact, np.log(_SMALLEST))).max())
    if not difference <= tolerance:
        raise ExportError(
            f"{where} differs from the trained model: the logarithms of its probabilities by {difference:.2g}, more "
            f"than {tolerance:.2g}"
        )
    class_ids = outputs["probabilities"].argmax(axis=1)
    _compare_classes(class_ids, expected, tolerance, where=where)
    labels = [class_names[class_id].encode() for class_id in class_ids]
    for name, matching in (("class_id", class_ids.tolist()), ("label", labels)):
        if name in outputs and outputs[name].tolist() != matching:
            raise ExportError(f"{where} returns labels that do not match its probabilities")


def compare_heat_maps(
    outputs: dict[str, np.ndarray], *, expected: dict[str, np.ndarray], logits: np.ndarray, where: str
) -> None:
    """Check that the heat maps of an exported signature are those of the graph that was exported.

    Args:
        outputs: `heat_map` float32 (n, height, width) and `class_id` int64 (n,).
        expected: the same, computed before the export.
        logits: (n, classes), of the trained model.
        where: what returned the outputs, for the error message.

    Raises:
        ExportError: a class differs from the largest logit's, or a heat map from the expected one of the same class.
    """
    _compare_classes(outputs["class_id"], logits, _tolerance(logits, where=where), where=where)
    maps, expected_maps = outputs["heat_map"], expected["heat_map"]
    if maps.shape != expected_maps.shape or not ((maps >= 0) & (maps <= 1)).all():  # so that NaN fails
        raise ExportError(f"{where} returns heat maps that are not {expected_maps.shape} from 0 to 1: {maps.shape}")
    is_same_class = outputs["class_id"] == expected["class_id"]
    difference = float(np.abs(maps - expected_maps)[is_same_class].max(initial=0))
    if difference > HEAT_MAP_TOLERANCE:
        raise ExportError(f"{where} differs from the exported graph: its heat maps by {difference:.2g} of 1")


def _tolerance(expected: np.ndarray, *, where: str) -> float:
    if not np.isfinite(expected).all():
        raise ExportError(f"{where} cannot be compared: the trained model's own logits are infinite or NaN")
    return max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * float(np.abs(expected).max()))


def _compare_classes(actual: np.ndarray, expected: np.ndarray, tolerance: float, *, where: str) -> None:
    """Check that the classes are equal wherever the margin of the largest logit exceeds the tolerance."""
    ordered = np.sort(expected, axis=1)
    margins = ordered[:, -1] - ordered[:, -2] if expected.shape[1] > 1 else np.zeros(len(expected))
    differs = (margins > tolerance) & (actual != expected.argmax(axis=1))
    if differs.any():
        raise ExportError(
            f"{where} differs from the trained model: it returns other labels for {differs.sum()} of {len(actual)} "
            "images"
        )

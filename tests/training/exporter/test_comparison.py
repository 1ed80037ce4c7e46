import numpy as np
import pytest
import tensorflow as tf

from training.errors import ExportError
from training.exporter.comparison import (
    HEAT_MAP_TOLERANCE,
    RELATIVE_TOLERANCE,
    compare_heat_maps,
    compare_logits,
    compare_outputs,
)

NAMES = ("cat", "dog", "fox")
LARGE = np.array([[800.0, -300.0, 20.0], [-5.0, 750.0, 700.0]])
TOLERANCE = RELATIVE_TOLERANCE * 800


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def make_outputs(logits, *, class_ids=None):
    ids = logits.argmax(axis=1) if class_ids is None else np.array(class_ids)
    names = np.array([NAMES[class_id].encode() for class_id in ids], object)
    return {"probabilities": softmax(logits), "class_id": ids, "label": names}


def test_tolerance_is_relative_to_the_largest_logit():
    compare_logits(LARGE + 0.9 * TOLERANCE, LARGE, where="it")
    for wrong in (LARGE + np.array([0, 1.1 * TOLERANCE, 0]), LARGE / 1000, LARGE * np.nan):
        with pytest.raises(ExportError, match="it differs from the trained model: its logits by"):
            compare_logits(wrong, LARGE, where="it")
    with pytest.raises(ExportError, match="differs"):
        compare_logits(LARGE / 1000 + 0.9 * TOLERANCE, LARGE / 1000, where="it")


def test_classes_may_differ_only_within_the_tolerance():
    expected = np.array([[100.0, 100.0 + 0.5e-2, 0.0]])
    compare_logits(expected - [[0, 1e-2, 0]], expected, where="it")
    expected = np.array([[100.0, 100.0 + 2.5e-2, 0.0]])
    wrong = expected + np.array([1.5e-2, -1.5e-2, 0])
    with pytest.raises(ExportError, match="it returns other labels for 1 of 1 images"):
        compare_logits(wrong, expected, where="it")


def test_infinite_logits_are_rejected():
    for value in (np.inf, np.nan):
        with pytest.raises(ExportError, match="the trained model's own logits are infinite or NaN"):
            compare_logits(LARGE, np.where(LARGE == 800, value, LARGE), where="it")


@pytest.mark.parametrize("scale", [1e-3, 0.01, 1, 10])
def test_outputs_are_compared_by_log_probabilities(scale):
    logits = scale * LARGE / 100
    compare_outputs(make_outputs(logits), logits, NAMES, where="it")
    compare_outputs(make_outputs(logits + 7), logits, NAMES, where="it")  # a softmax does not see it
    with pytest.raises(ExportError, match="the logarithms of its probabilities by"):
        compare_outputs(make_outputs(1.1 * logits), logits, NAMES, where="it")
    with pytest.raises(ExportError, match="labels that do not match its probabilities"):
        compare_outputs(make_outputs(logits, class_ids=[0, 2]), logits, NAMES, where="it")


def test_probabilities_of_0_and_1_are_accepted():
    compare_outputs(make_outputs(LARGE), LARGE, NAMES, where="it")
    with pytest.raises(ExportError, match="differs from the trained model"):
        compare_outputs(make_outputs(LARGE[:, ::-1]), LARGE, NAMES, where="it")


def test_probabilities_that_a_softmax_rounds_to_0_are_equal():
    # TensorFlow's softmax gives 0 for all that is smaller than about twice the smallest normal float32.
    margins = np.linspace(80, 95, 3001)
    logits = np.stack([margins, 0 * margins, margins - 1], axis=1).astype(np.float32)
    rounded = make_outputs(logits) | {"probabilities": tf.nn.softmax(logits).numpy()}
    assert 0 < np.count_nonzero(rounded["probabilities"][:, 1]) < len(margins)
    compare_outputs(rounded, logits, NAMES, where="it")
    with pytest.raises(ExportError, match="the logarithms of its probabilities by"):
        compare_outputs(rounded, logits + np.array([0, 0.1, 0], np.float32), NAMES, where="it")


def test_a_signature_may_return_probabilities_alone():
    alone = {"probabilities": softmax(LARGE)}
    compare_outputs(alone, LARGE, NAMES, where="it")
    with pytest.raises(ExportError, match="differs from the trained model"):
        compare_outputs(alone, LARGE[:, ::-1], NAMES, where="it")


def test_heat_maps_are_compared_where_the_classes_are_equal():
    logits = np.array([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    maps = np.random.default_rng(0).random((2, 4, 5), np.float32) * 0.9
    expected = {"heat_map": maps, "class_id": np.array([0, 0])}

    def compare(heat_map, class_id=(0, 0)):
        given = {"heat_map": heat_map, "class_id": np.array(class_id)}
        compare_heat_maps(given, expected=expected, logits=logits, where="it")

    compare(maps + 0.9 * HEAT_MAP_TOLERANCE)
    compare(np.stack([maps[0], 1 - maps[1]]), class_id=(0, 1))  # equal logits
    with pytest.raises(ExportError, match="it differs from the exported graph: its heat maps by"):
        compare(maps + 2 * HEAT_MAP_TOLERANCE)
    with pytest.raises(ExportError, match="it returns other labels for 1 of 2 images"):
        compare(maps, class_id=(1, 0))
    for wrong in (maps[:, :3], maps * np.nan, maps - 1, maps + 1):
        with pytest.raises(ExportError, match=r"heat maps that are not \(2, 4, 5\) from 0 to 1"):
            compare(wrong)

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.evaluation.metrics import evaluate

NAMES = ("cat", "dog", "fox")


def one_hot_ish(rows):
    return np.array(rows, np.float32)


def test_metrics_match_values_calculated_by_hand():
    probabilities = one_hot_ish([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.5, 0.4, 0.1], [0.1, 0.9, 0.0]])
    labels = np.array([0, 0, 1, 1])
    result = evaluate(probabilities, labels, NAMES)
    assert result.accuracy == 0.5
    assert result.count == 4
    assert result.loss == pytest.approx(-np.log([0.8, 0.3, 0.4, 0.9]).mean(), rel=1e-6)
    assert result.confusion.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    cat, dog, fox = result.per_class
    assert (cat.precision, cat.recall, cat.f1, cat.support) == (0.5, 0.5, 0.5, 2)
    assert (dog.precision, dog.recall, dog.support) == (0.5, 0.5, 2)
    assert fox.support == 0
    assert all(map(math.isnan, (fox.precision, fox.recall, fox.f1)))


def test_calibration_matches_values_calculated_by_hand():
    # Two at 0.9, one of them right: 0.4 off. Two at 0.55, both right: 0.45 off.
    probabilities = one_hot_ish([[0.9, 0.1], [0.9, 0.1], [0.55, 0.45], [0.45, 0.55]])
    calibration = evaluate(probabilities, np.array([0, 1, 0, 1]), NAMES[:2]).calibration
    assert calibration.counts.tolist() == [0] * 8 + [2] + [0] * 4 + [2, 0]
    assert calibration.accuracies[13] == 0.5
    assert calibration.confidences[13] == pytest.approx(0.9)
    assert calibration.expected_calibration_error == pytest.approx((0.4 + 0.45) / 2, rel=1e-6)
    assert math.isnan(calibration.accuracies[0])


def test_confidence_on_the_edge_of_two_bins_belongs_to_the_lower():
    # 3/15 as the paper's bins have it: the third is (2/15, 3/15].
    probabilities = np.array([[0.2, 0.2, 0.2, 0.2, 0.2]])
    counts = evaluate(probabilities, np.array([0]), list("abcde")).calibration.counts
    assert np.flatnonzero(counts).tolist() == [2]


def test_confidence_1_is_in_the_last_bin():
    assert evaluate(one_hot_ish([[1, 0, 0]]), np.array([0]), NAMES).calibration.counts.tolist() == [0] * 14 + [1]


def test_loss_is_finite_for_probability_0_of_the_true_class():
    assert 80 < evaluate(one_hot_ish([[1, 0, 0]]), np.array([1]), NAMES).loss < 100


def test_perfect_loss_is_not_negative_zero():
    for right in (1.0, np.nextafter(np.float32(1), np.float32(2))):  # as a float32 softmax rounds
        assert f"{evaluate(one_hot_ish([[right, 0, 0]]), np.array([0]), NAMES).loss:.4f}" == "0.0000"


def test_json_has_no_nan():
    text = json.dumps(evaluate(one_hot_ish([[1, 0, 0]]), np.array([1]), NAMES).to_json(), allow_nan=False)
    assert json.loads(text)["per_class"][1]["precision"] is None


@pytest.mark.parametrize("probabilities", [np.zeros((0, 3), np.float32), np.zeros((2, 2), np.float32)])
def test_wrong_shapes_are_rejected(probabilities):
    with pytest.raises(ValueError, match="expected probabilities"):
        evaluate(probabilities, np.zeros(len(probabilities), np.int64), NAMES)


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range_is_rejected(label):
    with pytest.raises(ValueError, match="expected labels from 0 to 2"):
        evaluate(one_hot_ish([[1, 0, 0]]), np.array([label]), NAMES)


def test_nan_is_rejected():
    with pytest.raises(ValueError, match="NaN for 1 images"):
        evaluate(one_hot_ish([[1, 0, 0], [math.nan, 0, 0]]), np.array([0, 0]), NAMES)


@given(seed=st.integers(0, 10**6), count=st.integers(1, 60), classes=st.integers(2, 12))
def test_metrics_are_consistent(seed, count, classes):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(classes) * 0.3, count).astype(np.float32)
    labels = rng.integers(0, classes, count)
    result = evaluate(probabilities, labels, [f"class {n}" for n in range(classes)])
    assert result.confusion.sum() == count == sum(figures.support for figures in result.per_class)
    assert result.accuracy == pytest.approx(np.trace(result.confusion) / count)
    assert result.calibration.counts.sum() == count
    assert 0 <= result.calibration.expected_calibration_error <= 1
    weighted = np.nansum(result.calibration.accuracies * result.calibration.counts) / count
    assert weighted == pytest.approx(result.accuracy)
    for class_id, figures in enumerate(result.per_class):
        predicted = probabilities.argmax(axis=1) == class_id
        hits = int((predicted & (labels == class_id)).sum())
        assert result.confusion[class_id, class_id] == hits
        assert figures.support == (labels == class_id).sum()
        if predicted.any() and figures.support:
            assert (figures.precision, figures.recall) == (hits / predicted.sum(), hits / figures.support)
        if hits:
            harmonic_mean = 2 / (1 / figures.precision + 1 / figures.recall)
            assert figures.f1 == pytest.approx(harmonic_mean)


@given(seed=st.integers(0, 10**6), count=st.integers(1, 60))
def test_order_of_the_images_does_not_matter(seed, count):
    rng = np.random.default_rng(seed)
    probabilities, labels = rng.dirichlet(np.ones(3), count).astype(np.float32), rng.integers(0, 3, count)
    order = rng.permutation(count)
    one, other = evaluate(probabilities, labels, NAMES), evaluate(probabilities[order], labels[order], NAMES)
    assert one.confusion.tolist() == other.confusion.tolist()
    assert one.loss == pytest.approx(other.loss)
    assert one.calibration.expected_calibration_error == pytest.approx(other.calibration.expected_calibration_error)

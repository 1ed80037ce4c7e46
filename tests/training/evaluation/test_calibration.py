import numpy as np
import pytest

from training.evaluation.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    apply_temperature,
    average_logits,
    fit_temperature,
)
from training.evaluation.metrics import evaluate


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def make_predictions(temperature, *, count=20_000, classes=6, seed=0):
    """Probabilities of a classifier that is too sure of itself by `temperature`, and labels."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(count, classes))
    honest = softmax(logits)
    labels = (honest.cumsum(axis=1) < rng.random((count, 1))).sum(axis=1).clip(max=classes - 1)
    return softmax(logits * temperature), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7, 4.0])
def test_fitted_temperature_is_the_true_one_and_calibrates(temperature):
    probabilities, labels = make_predictions(temperature)
    fitted = fit_temperature(probabilities, labels)
    assert fitted == pytest.approx(temperature, rel=0.03)
    other, other_labels = make_predictions(temperature, seed=1)
    names = [str(n) for n in range(6)]
    after = evaluate(apply_temperature(other, fitted), other_labels, names)
    assert after.calibration.expected_calibration_error < 0.015
    assert after.accuracy == evaluate(other, other_labels, names).accuracy


def test_fitted_temperature_minimizes_the_loss():
    probabilities, labels = make_predictions(1.4, count=500)
    fitted = fit_temperature(probabilities, labels)

    def loss(temperature):
        return evaluate(apply_temperature(probabilities, temperature), labels, [str(n) for n in range(6)]).loss

    assert loss(fitted) < min(loss(fitted * 0.95), loss(fitted * 1.05))


def test_temperature_stays_within_bounds():
    sure, labels = np.array([[1, 0], [0, 1]], np.float32), np.array([0, 1])
    assert fit_temperature(sure, labels) == pytest.approx(MIN_TEMPERATURE)
    assert fit_temperature(sure, labels[::-1]) == pytest.approx(MAX_TEMPERATURE)


def test_a_temperature_of_1_changes_nothing():
    probabilities, _ = make_predictions(1.0, count=100)
    np.testing.assert_allclose(apply_temperature(probabilities, 1.0), probabilities, atol=1e-7)
    assert np.isfinite(apply_temperature(np.array([[1, 0, 0]], np.float32), 3.0)).all()


def test_predictions_are_averaged_as_logits():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 50, 4))
    np.testing.assert_allclose(average_logits(softmax(one), softmax(other)), softmax((one + other) / 2), atol=1e-6)

import json

import numpy as np
import pytest

from training.evaluation.conformal import evaluate_sets, fit_set_threshold


def make_predictions(count, *, classes, sharpness, seed):
    """Return probabilities of a calibrated model, and labels drawn by them."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(classes, sharpness), count)
    labels = (probabilities.cumsum(axis=1) < rng.random((count, 1))).sum(axis=1)
    return probabilities.astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("sharpness", [0.02, 0.5])
def test_the_wanted_share_of_sets_has_the_true_label(classes, sharpness):
    threshold = fit_set_threshold(*make_predictions(5000, classes=classes, sharpness=sharpness, seed=0))
    found = evaluate_sets(*make_predictions(10_000, classes=classes, sharpness=sharpness, seed=1), threshold=threshold)
    assert 0.885 <= found.coverage <= 0.915
    assert found.mean_size == pytest.approx(sum(size * share for size, share in enumerate(found.sizes)))
    assert sum(found.sizes) == pytest.approx(1)


def test_coverage_is_reached_on_average_over_small_fits():
    """With 19 images a quantile without the correction covers 5 % less."""
    coverages = []
    for seed in range(300):
        probabilities, labels = make_predictions(219, classes=4, sharpness=1, seed=seed)
        threshold = fit_set_threshold(probabilities[:19], labels[:19])
        coverages.append(evaluate_sets(probabilities[19:], labels[19:], threshold=threshold).coverage)
    assert 0.89 <= np.mean(coverages) <= 0.91


def test_threshold_is_the_probability_that_nine_of_ten_true_labels_reach():
    own = np.linspace(0.05, 0.95, 19)
    probabilities = np.stack([own, 1 - own], axis=1).astype(np.float32)
    labels = np.zeros(19, np.int64)
    threshold = fit_set_threshold(probabilities, labels)
    assert threshold == np.float32(0.1)
    assert evaluate_sets(probabilities, labels, threshold=threshold).coverage == 18 / 19


def test_few_images_rule_nothing_out():
    probabilities, labels = make_predictions(8, classes=3, sharpness=1, seed=0)
    assert fit_set_threshold(probabilities, labels) == 0
    assert evaluate_sets(probabilities, labels, threshold=0.0).sizes == (0, 0, 0, 1)


def test_accurate_model_has_empty_sets():
    """It is right for more than 90 % of its images, so the least confident get an empty set."""
    confidence = np.linspace(0.6, 1, 1000, dtype=np.float32)
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.zeros(1000, np.int64)
    found = evaluate_sets(probabilities, labels, threshold=fit_set_threshold(probabilities, labels))
    assert found.sizes == pytest.approx((0.099, 0.901))
    assert json.loads(json.dumps(found.to_json()))["coverage"] == found.coverage

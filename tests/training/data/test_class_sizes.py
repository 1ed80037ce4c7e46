import logging

import numpy as np
import pytest

from training.data.class_sizes import balance_classes

NAMES = ("cat", "dog", "owl")


def labels(*counts):
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)


@pytest.mark.parametrize("counts", [(10, 10, 10), (50, 10, 20), (5, 1, 0)])
def test_classes_of_similar_size_are_not_weighted(counts, caplog):
    with caplog.at_level(logging.INFO):
        assert balance_classes(labels(*counts), NAMES) is None
    assert caplog.messages == []


def test_weights_make_all_classes_count_the_same():
    counts = np.array([51, 10, 20])
    weights = balance_classes(labels(*counts), NAMES)
    assert weights is not None
    np.testing.assert_allclose(weights * counts, 81 / 3)
    assert weights[labels(*counts)].mean() == pytest.approx(1)


def test_a_class_without_images_has_no_weight():
    weights = balance_classes(labels(60, 0, 10), NAMES)
    assert weights is not None
    assert weights.tolist() == pytest.approx([70 / 120, 0, 70 / 20])


def test_weights_are_logged_the_smallest_class_first(caplog):
    with caplog.at_level(logging.INFO):
        balance_classes(labels(1200, 100, 300), NAMES)
    (message,) = caplog.messages
    assert message.endswith(
        " 12.0 times the images of the smallest, so the loss is weighted: "
        "dog (100 images) 5.33, owl (300 images) 1.78, cat (1,200 images) 0.444"
    )
    with caplog.at_level(logging.INFO):
        balance_classes(labels(*range(1, 9)), [f"class{number}" for number in range(8)])
    assert "class3 (4 images) 1.12, ..., class7 (8 images) 0.562" in caplog.messages[-1]

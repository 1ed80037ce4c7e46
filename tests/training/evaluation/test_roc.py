import numpy as np
import pytest

from training.evaluation.roc import area_under_roc, compute_roc

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("inliers", "outliers", "area"),
    [([3, 4], [1, 2], 1), ([1, 2], [3, 4], 0), ([1, 1], [1, 1], 0.5), ([1, 2, 3], [2], 0.5), ([0, 2], [1, -1], 0.75)],
)
def test_area_is_the_share_of_pairs_in_order(inliers, outliers, area):
    assert area_under_roc(np.array(inliers, float), np.array(outliers, float)) == area


def test_area_is_that_under_the_curve():
    inliers, outliers = RNG.normal(1, 1, 500).round(1), RNG.normal(0, 2, 300).round(1)  # with ties
    of_inliers, of_outliers = compute_roc(inliers, outliers)
    assert (of_inliers[0], of_outliers[0], of_inliers[-1], of_outliers[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(of_outliers, of_inliers) == pytest.approx(area_under_roc(inliers, outliers))
    assert area_under_roc(inliers, outliers) == pytest.approx(
        ((outliers[:, None] < inliers).mean() + (outliers[:, None] <= inliers).mean()) / 2
    )

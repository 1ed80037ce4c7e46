"""Receiver operating characteristic of a score that separates the images of a dataset from outliers."""

from __future__ import annotations

import numpy as np


def area_under_roc(inliers: np.ndarray, outliers: np.ndarray) -> float:
    """Return the probability that an outlier scores lower than an inlier, from 0 to 1; 0.5 tells nothing.

    Args:
        inliers: float (n,), their scores, at least one.
        outliers: float (m,), the same; ties count half.
    """
    ordered = np.sort(inliers)
    lower = np.searchsorted(ordered, outliers, side="left")
    lower_or_equal = np.searchsorted(ordered, outliers, side="right")
    return float(1 - (lower + lower_or_equal).mean() / (2 * len(inliers)))


def compute_roc(inliers: np.ndarray, outliers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of inliers and of outliers that score below each threshold, float64 (m,), both from 0 to 1."""
    thresholds = np.append(np.unique(np.concatenate([inliers, outliers])), np.inf)
    shares = (np.searchsorted(np.sort(scores), thresholds) / len(scores) for scores in (inliers, outliers))
    of_inliers, of_outliers = shares
    return of_inliers, of_outliers

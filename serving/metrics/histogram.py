"""The histogram of all metrics, and its buckets."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import prometheus_client

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
QUEUE_SECONDS = (0.0001, 0.0002, *SECONDS)
ROWS = tuple(2**step for step in range(15))  # TensorFlow Serving's of `request_example_counts`
CALL_ROWS = ROWS[:14]  # TensorFlow Serving's of `processed_batch_size`
TFS_MICROSECONDS = tuple(10 * 1.8**step for step in range(33))


class Histogram(prometheus_client.Histogram):
    """prometheus_client's histogram, which finds the bucket by bisection instead of one by one.

    It takes 0.64 us an observation instead of 1.03 us (33 buckets; the 10th), and several are made for each request.
    """

    def observe(self, amount: float, exemplar: Any = None) -> None:  # noqa: ARG002 - there are no exemplars here
        """Count a value."""
        self._sum.inc(amount)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(1)

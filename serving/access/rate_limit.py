"""The rate limit: so many requests per second for each caller, with a burst of one second's requests."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from serving.errors import RateLimited

MAX_CALLERS = 100_000  # whose requests are counted; beyond it the one that has been silent longest is forgotten


class RateLimiter:
    """A token bucket for each caller, kept as the time at which the bucket is full again. Thread-safe.

    Args:
        rate: requests per second. As many may come at once, but at least one.
        clock: seconds that only increase.
    """

    def __init__(self, rate: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = 1.0 / rate
        self._burst_s = max(1.0, self._interval_s)  # to fill an empty bucket
        self._rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._full_at_s: OrderedDict[str, float] = OrderedDict()  # by caller, longest silent first

    def admit(self, caller: str) -> None:
        """Count a request.

        Raises:
            RateLimited: the caller has exceeded the limit; the request does not count.
        """
        now_s = self._clock()
        with self._lock:
            full_at_s = max(now_s, self._full_at_s.get(caller, now_s)) + self._interval_s
            wait_s = full_at_s - now_s - self._burst_s
            is_admitted = wait_s <= 1e-9  # rounding
            if is_admitted:
                self._full_at_s[caller] = full_at_s
            self._full_at_s.move_to_end(caller)
            if len(self._full_at_s) > MAX_CALLERS:
                self._full_at_s.popitem(last=False)
        if not is_admitted:
            raise RateLimited(
                f"more than {self._rate:g} requests per second; try again later", retry_after_s=math.ceil(wait_s)
            )

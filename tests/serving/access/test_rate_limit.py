"""Token buckets on a clock that the test turns."""

from __future__ import annotations

import pytest

from serving.access import rate_limit
from serving.access.rate_limit import RateLimiter
from serving.errors import RateLimited


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def count_admitted(limiter: RateLimiter, caller: str, attempts: int) -> int:
    admitted = 0
    for _ in range(attempts):
        try:
            limiter.admit(caller)
            admitted += 1
        except RateLimited:
            pass
    return admitted


@pytest.mark.parametrize(("rate", "burst"), [(10.0, 10), (1.0, 1), (0.1, 1), (2.5, 2)])
def test_a_burst_then_the_rate(rate: float, burst: int) -> None:
    clock = Clock()
    limiter = RateLimiter(rate, clock=clock)
    assert count_admitted(limiter, "a", 100) == burst
    assert count_admitted(limiter, "a", 100) == 0  # refused requests do not count
    clock.now_s += 10 / rate
    assert count_admitted(limiter, "a", 100) == burst  # unused requests are not saved up
    clock.now_s += 1 / rate + 1e-6
    assert count_admitted(limiter, "a", 100) == 1


def test_callers_do_not_share_a_bucket() -> None:
    limiter = RateLimiter(5.0, clock=Clock())
    assert count_admitted(limiter, "a", 9) == 5
    assert count_admitted(limiter, "b", 9) == 5


def test_the_response_says_when_to_try_again() -> None:
    clock = Clock()
    limiter = RateLimiter(0.1, clock=clock)
    limiter.admit("a")
    clock.now_s += 2.5
    with pytest.raises(RateLimited, match=r"more than 0\.1 requests per second") as refused:
        limiter.admit("a")
    assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (429, "RESOURCE_EXHAUSTED", 8)
    clock.now_s += 8
    limiter.admit("a")


def test_the_number_of_buckets_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "MAX_CALLERS", 3)
    limiter = RateLimiter(1.0, clock=Clock())
    for caller in ("a", "b", "c"):
        limiter.admit(caller)
    assert count_admitted(limiter, "a", 1) == 0  # and it is no longer the one silent longest
    limiter.admit("d")
    assert len(limiter._full_at_s) == 3
    assert count_admitted(limiter, "a", 1) == 0
    assert count_admitted(limiter, "b", 1) == 1  # forgotten

"""How long to wait before asking again."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 10.0


def choose_wait_s(attempt: int, *, retry_after: str | None = None) -> float:
    """Return the seconds to wait after failed attempt number `attempt`, counted from 1.

    The wait doubles with each attempt and is shortened by up to a half at random, so that clients that
    failed together don't come back together. It is not less than what the server's `Retry-After` asks
    (RFC 9110, section 10.2.3), and never more than LONGEST_WAIT_S.
    """
    wait_s = FIRST_WAIT_S * 2.0 ** min(attempt - 1, 16) * random.uniform(0.5, 1.0)
    return min(max(wait_s, _read_retry_after_s(retry_after)), LONGEST_WAIT_S)


def _read_retry_after_s(value: str | None) -> float:
    """Return the seconds that a `Retry-After` header asks for, in either of its forms; 0 if it asks for none."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return (when - datetime.now(UTC)).total_seconds()

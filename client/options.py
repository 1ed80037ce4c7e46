"""Options that the HTTP and the gRPC client share: defaults, validation, and retries."""

from __future__ import annotations

import ipaddress
import logging
import math
import random
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from client.errors import ClientError

DEFAULT_BATCH_SIZE = 64  # the service's default maximum for one call of a model
DEFAULT_TIMEOUT_S = 60.0
DEFAULT_RETRIES = 3
MAX_VERSION = 2**63 - 1  # model versions are int64
FIRST_WAIT_S = 0.25  # before a retry; the next are longer: exponential backoff with jitter
LONGEST_WAIT_S = 10.0

logger = logging.getLogger(__name__)


def validate_options(*, model: str | None, version: int | None, timeout_s: float, retries: int) -> None:
    """Raise ValueError if an option of a client is out of range."""
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise ValueError(f"timeout_s must be more than 0 seconds, not {timeout_s}")
    if retries < 0:
        raise ValueError(f"retries must be at least 0, not {retries}")
    if model == "":
        raise ValueError("model must not be empty; omit it if the service has only one model")
    if version is not None and not 0 <= version <= MAX_VERSION:
        raise ValueError(f"version must be from 0 to {MAX_VERSION}, not {version}")


def is_local_host(host: str) -> bool:
    """Return whether a host name or address is this machine, which a proxy on another machine cannot reach."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def choose_retry_wait_s(
    error: ClientError, attempt: int, retries: int, deadline_s: float, *, retry_after: str | None = None
) -> float:
    """Return the seconds to wait after attempt number `attempt`, counted from 1, failed with `error`.

    Raises:
        ClientError: `error`, if no retry is left, or the wait would exceed the deadline of `time.monotonic`.
    """
    wait_s = choose_wait_s(attempt, retry_after=retry_after)
    if attempt > retries or time.monotonic() + wait_s >= deadline_s:
        if attempt == 1:
            raise error
        raise type(error)(f"{error} (tried {attempt} times)") from error.__cause__
    logger.info("%s; retrying in %.1f s", error, wait_s)
    return wait_s


def choose_wait_s(attempt: int, *, retry_after: str | None = None) -> float:
    """Return the seconds to wait after failed attempt number `attempt`, counted from 1.

    The wait doubles with each attempt. Jitter shortens it by up to a half, so that clients that failed together do not
    retry together. It is at least what the server's `Retry-After` requests (RFC 9110, section 10.2.3), and at most
    LONGEST_WAIT_S.
    """
    wait_s = FIRST_WAIT_S * 2.0 ** min(attempt - 1, 16) * random.uniform(0.5, 1.0)
    return min(max(wait_s, _parse_retry_after_s(retry_after)), LONGEST_WAIT_S)


def _parse_retry_after_s(value: str | None) -> float:
    """Return the seconds that a `Retry-After` header requests, as a number or a date; 0 if it is missing or invalid."""
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

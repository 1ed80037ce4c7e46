from __future__ import annotations

import pytest

from serving.errors import (
    InvalidBackendResponse,
    InvalidRequest,
    ModelFailed,
    ModelNotFound,
    NotReady,
    ServingError,
    TooLarge,
)


@pytest.mark.parametrize(
    ("error", "status", "retry_after_s"),
    [
        (NotReady("loading"), 503, 1),
        (ModelFailed("too many wait", code="UNAVAILABLE"), 503, 1),
        (ModelFailed("too much", code="RESOURCE_EXHAUSTED"), 429, 1),
        (ModelFailed("too late", code="DEADLINE_EXCEEDED"), 504, None),
        (ModelFailed("broken", code="INTERNAL"), 500, None),
        (InvalidBackendResponse("no outputs"), 502, None),
        (InvalidRequest("wrong"), 400, None),
        (ModelNotFound("gone"), 404, None),
        (TooLarge("too large"), 413, None),
    ],
)
def test_a_client_is_told_when_to_retry_where_that_can_help(
    error: ServingError, status: int, retry_after_s: int | None
) -> None:
    assert (error.status, error.retry_after_s) == (status, retry_after_s)

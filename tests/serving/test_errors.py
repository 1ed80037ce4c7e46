from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from serving.errors import (
    InvalidBackendResponse,
    InvalidRequest,
    ModelControlOff,
    ModelFailed,
    ModelNotFound,
    ModelNotNamed,
    NotReady,
    Overloaded,
    RateLimited,
    ServingError,
    TooLarge,
    UnreadableImages,
    client_disconnected,
    deadline_exceeded,
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
def test_retryable_errors_have_a_retry_after_header(
    error: ServingError, status: int, retry_after_s: int | None
) -> None:
    assert (error.status, error.retry_after_s) == (status, retry_after_s)


PROBLEMS = [{"index": 1, "file": "b.png", "error": "cut off"}]
WITH_ATTRIBUTES: dict[type[ServingError], ServingError] = {
    UnreadableImages: UnreadableImages(PROBLEMS, image_count=3),
    ModelNotNamed: ModelNotNamed(["a", "b"]),
    Overloaded: Overloaded("no memory", shed_reason="memory", retry_after_s=7),
    ModelControlOff: ModelControlOff(),
    RateLimited: RateLimited("too many", retry_after_s=7),
    ModelFailed: ModelFailed("too much", code="RESOURCE_EXHAUSTED"),
}


def subclasses(kind: type[ServingError]) -> Iterator[type[ServingError]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from subclasses(subclass)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "error",
    [
        *(WITH_ATTRIBUTES.get(kind) or kind(f"a {kind.__name__}") for kind in subclasses(ServingError)),
        deadline_exceeded(),
        client_disconnected(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_its_type_message_and_attributes_when_it_is_pickled(error: ServingError, protocol: int) -> None:
    once = pickle.loads(pickle.dumps(error, protocol))
    for again in (once, pickle.loads(pickle.dumps(once, protocol))):
        assert type(again) is type(error)
        assert (str(again), again.args, again.__dict__) == (str(error), error.args, error.__dict__)
        assert again.body() == error.body()
        assert (again.status, again.code, again.retry_after_s) == (error.status, error.code, error.retry_after_s)

"""The service's exceptions with their HTTP statuses and gRPC codes."""

# Exceptions are named for the condition, without the suffix "Error".
# ruff: noqa: N818

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# HTTP status of each gRPC or TensorFlow code, as in TensorFlow Serving's `model_servers/http_server.cc`.
HTTP_STATUS_OF_CODE = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ABORTED": 409,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


# Why requests are refused by load shedding.
SHED_REASONS = {
    "queue_full": "the queue of the model is full",
    "deadline": "the request would miss its deadline in the queue of the model",
    "loop_queue": "the request would miss its deadline before it is processed",
    "memory": "no memory of the budget was free in time",
    "json_parser": "the parser of large JSON documents was not free in time",
    "new_calls": "too many gRPC calls on new connections wait for their messages",
    "rate_limit": "the caller has sent more requests than it may",
    "slow_message": "a large gRPC message did not arrive in time",
}


class ServingError(Exception):
    """Base class of the errors in responses: `{"error": message}` over HTTP, a status over gRPC.

    `retry_after_s` is the `Retry-After` header of the response, or None if a retry cannot succeed.
    `shed_reason` is the label of load shedding in the metrics, or empty: the request was refused for another reason.
    `tensorflow_serving` is the error for TensorFlow Serving's APIs, if that server has another message or status.
    """

    status = 500
    code = "INTERNAL"
    retry_after_s: int | None = None
    shed_reason = ""
    tensorflow_serving: ServingError | None = None

    def body(self) -> dict[str, Any]:
        """Return the JSON body of the response."""
        return {"error": str(self)}

    def __reduce__(self) -> tuple[Any, ...]:
        # By default pickle calls the class with `args`, which do not fit every subclass's `__init__`.
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[ServingError], args: tuple[Any, ...], attributes: dict[str, Any]) -> ServingError:
    """Return an unpickled error. `__new__` sets the message from `args`."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class InvalidRequest(ServingError):
    """The request is malformed, or does not fit the model's signature."""

    status = 400
    code = "INVALID_ARGUMENT"


class UnreadableImages(InvalidRequest):
    """Some images of a request cannot be decoded, so no image was predicted.

    `problems` has one entry per unreadable image: `index` in the request, `file` (name or None) and `error`.
    """

    def __init__(self, problems: list[dict[str, Any]], *, image_count: int) -> None:
        first = problems[0]
        name = first["file"] or f"image {first['index']}"
        if image_count == 1:
            message = f"the image could not be read: {first['error']}"
        else:
            message = (
                f"{len(problems)} of {image_count} images could not be read, so none was predicted; "
                f"{name}: {first['error']}"
            )
        super().__init__(message)
        self.problems = problems

    def body(self) -> dict[str, Any]:
        """Return the message, and the error of each unreadable image."""
        return {"error": str(self), "errors": self.problems}


class ModelNotNamed(InvalidRequest):
    """Several models are served, and the request names none of them; `models` lists them."""

    def __init__(self, models: Sequence[str]) -> None:
        super().__init__(f"several models are served: {', '.join(models)}; choose one with the query parameter model")
        self.models = list(models)

    def body(self) -> dict[str, Any]:
        """Return the message, and the models for the client's own message."""
        return {"error": str(self), "models": self.models}


class ModelNotFound(ServingError):
    """The model or the version does not exist, or is not available."""

    status = 404
    code = "NOT_FOUND"


class VersionUnloaded(ModelNotFound):
    """The remote servers have unloaded the version since it was resolved; a newer one may have taken its place."""


class Unauthenticated(ServingError):
    """The caller has no valid token."""

    status = 401
    code = "UNAUTHENTICATED"


class PermissionDenied(ServingError):
    """The caller may not do this."""

    status = 403
    code = "PERMISSION_DENIED"


class ModelControlOff(PermissionDenied):
    """The request would load or unload a model, and the service does not allow it."""


class RateLimited(ServingError):
    """The caller has sent more requests than it may."""

    shed_reason = "rate_limit"
    status = 429
    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLarge(ServingError):
    """The request exceeds a limit on bytes, pixels or images."""

    status = 413
    code = "RESOURCE_EXHAUSTED"


class UnsupportedMedia(ServingError):
    """The route does not support the media type of the body."""

    status = 415
    code = "INVALID_ARGUMENT"


class NotReady(ServingError):
    """The model is still being loaded, or the remote server cannot be reached."""

    status = 503
    code = "UNAVAILABLE"
    retry_after_s = 1


class Overloaded(ServingError):
    """Load shedding: the service has no memory or time for the request now.

    `shed_reason` is one of SHED_REASONS.
    """

    status = 503
    code = "UNAVAILABLE"

    def __init__(self, message: str, *, shed_reason: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.shed_reason = shed_reason
        self.retry_after_s = retry_after_s


class ModelFailed(ServingError):
    """The model or the remote server failed, with its status `code`."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = HTTP_STATUS_OF_CODE.get(code, 500)
        if code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
            self.retry_after_s = 1


class InvalidBackendResponse(ServingError):
    """The response of a remote server is malformed, or does not fit the model's signature."""

    status = 502


def deadline_exceeded() -> ModelFailed:
    """Return the error of a request whose deadline has passed."""
    return ModelFailed("deadline exceeded before the request was processed", code="DEADLINE_EXCEEDED")


def client_disconnected() -> ModelFailed:
    """Return the error of a request whose client has closed its connection."""
    return ModelFailed("client disconnected before the request was processed", code="CANCELLED")


class ModelLoadError(Exception):
    """A version on disk cannot be served; `code` is the status API's error code for it."""

    def __init__(self, message: str, *, code: str = "UNKNOWN") -> None:
        super().__init__(message)
        self.code = code


class StartupError(Exception):
    """The service cannot start; the message says what to change."""

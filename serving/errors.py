"""The errors of the service, each with the HTTP status it is answered with."""

# Named for the condition, as the reader of a log or an except clause meets it.
# ruff: noqa: N818

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What the codes of gRPC and TensorFlow are as HTTP statuses: `model_servers/http_server.cc` of TensorFlow Serving.
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


class ServingError(Exception):
    """Anything the service answers instead of a result: `{"error": message}` over HTTP, a status over gRPC.

    ServingError                  500  INTERNAL
    +-- InvalidRequest            400  INVALID_ARGUMENT    it cannot be understood or does not fit the model
    |   +-- UnreadableImages      400  INVALID_ARGUMENT    some of the pictures sent cannot be decoded
    |   +-- ModelNotNamed         400  INVALID_ARGUMENT    several models are served, and it names none
    +-- ModelNotFound             404  NOT_FOUND           no such model, or no such version of it
    +-- TooLarge                  413  RESOURCE_EXHAUSTED  more bytes, pixels or pictures than the service takes
    +-- UnsupportedMedia          415  INVALID_ARGUMENT    a body of a kind the route does not take
    +-- NotReady                  503  UNAVAILABLE         the model is still being loaded
    +-- Overloaded                503  UNAVAILABLE         no memory or time for it now; a later try can succeed
    +-- ModelFailed             (any)  (any)               what TensorFlow itself, or a remote server, refused
    +-- InvalidBackendResponse    502  INTERNAL            a remote server's response cannot be used

    `retry_after_s` is the `Retry-After` header of the response: set where the same request can succeed later.
    `tensorflow_serving` is the error that TensorFlow Serving's APIs respond with instead, where that server has its own
    message or status for the case.
    """

    status = 500
    code = "INTERNAL"
    retry_after_s: int | None = None
    tensorflow_serving: ServingError | None = None

    def body(self) -> dict[str, Any]:
        """Return what the client is sent, as JSON."""
        return {"error": str(self)}

    def __reduce__(self) -> tuple[Any, ...]:
        # By default the class is called with `args`, which the `__init__` of some subclasses does not take.
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[ServingError], args: tuple[Any, ...], attributes: dict[str, Any]) -> ServingError:
    """Return an unpickled error: of `args`, an exception's `__new__` makes its message."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class InvalidRequest(ServingError):
    """The request cannot be understood, or does not fit the model's signature."""

    status = 400
    code = "INVALID_ARGUMENT"


class UnreadableImages(InvalidRequest):
    """Some of the pictures of a request cannot be decoded, so none was predicted.

    `problems` has one entry per unreadable picture: `index` (its position in the request), `file`
    (its name, or None) and `error`.
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
        """Return the message and, beside it, what is wrong with which picture."""
        return {"error": str(self), "errors": self.problems}


class ModelNotNamed(InvalidRequest):
    """Several models are served, and the request names none of these, its `models`."""

    def __init__(self, models: Sequence[str]) -> None:
        super().__init__(f"several models are served: {', '.join(models)}; choose one with the query parameter model")
        self.models = list(models)

    def body(self) -> dict[str, Any]:
        """Return the message and, beside it, the names, with which a client can say it in its own way."""
        return {"error": str(self), "models": self.models}


class ModelNotFound(ServingError):
    """No model of that name, or no such version of it, is being served."""

    status = 404
    code = "NOT_FOUND"


class TooLarge(ServingError):
    """The request holds more bytes, pixels or pictures than the service accepts."""

    status = 413
    code = "RESOURCE_EXHAUSTED"


class UnsupportedMedia(ServingError):
    """The body is of a kind that the route does not take."""

    status = 415
    code = "INVALID_ARGUMENT"


class NotReady(ServingError):
    """The model is still being loaded, or the server that has it cannot be reached; retrying later can work."""

    status = 503
    code = "UNAVAILABLE"
    retry_after_s = 1


class Overloaded(ServingError):
    """The service has no memory or time for the request just now."""

    status = 503
    code = "UNAVAILABLE"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelFailed(ServingError):
    """The signature was refused or failed; `code` is TensorFlow's, or the remote server's, name for it."""

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
    return ModelFailed("the deadline passed before the model could answer", code="DEADLINE_EXCEEDED")


def client_disconnected() -> ModelFailed:
    """Return the error of a request that nobody waits for any more."""
    return ModelFailed("client disconnected before the request was processed", code="CANCELLED")


class ModelLoadError(Exception):
    """A version on disk cannot be served; `code` is the status API's error code for it."""

    def __init__(self, message: str, *, code: str = "UNKNOWN") -> None:
        super().__init__(message)
        self.code = code


class StartupError(Exception):
    """The service cannot start as it was told to; the message says what to change."""

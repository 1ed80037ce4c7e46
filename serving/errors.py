"""The errors of the service, each with the HTTP status it is answered with."""

# Named for the condition, as the reader of a log or an except clause meets it.
# ruff: noqa: N818

from __future__ import annotations

from typing import Any


class ServingError(Exception):
    """Anything the service answers with `{"error": message}` instead of a result.

    ServingError                  500
    +-- InvalidRequest            400   the request cannot be understood or does not fit the model
    |   +-- UnreadableImages      400   some of the pictures sent cannot be decoded
    +-- ModelNotFound             404   no such model, or no such version of it
    +-- TooLarge                  413   more bytes, pixels or pictures than the service accepts
    +-- UnsupportedMedia          415   a body of a kind the route does not take
    +-- NotReady                  503   the model is still being loaded
    +-- ModelFailed             (any)   TensorFlow's own refusal, mapped as TensorFlow Serving maps it

    The statuses are those of TensorFlow Serving's REST API (`model_servers/http_server.cc`).
    """

    status = 500

    def body(self) -> dict[str, Any]:
        """Return what the client is sent, as JSON."""
        return {"error": str(self)}


class InvalidRequest(ServingError):
    """The request cannot be understood, or does not fit the model's signature."""

    status = 400


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


class ModelNotFound(ServingError):
    """No model of that name, or no such version of it, is being served."""

    status = 404


class TooLarge(ServingError):
    """The request holds more bytes, pixels or pictures than the service accepts."""

    status = 413


class UnsupportedMedia(ServingError):
    """The body is of a kind that the route does not take."""

    status = 415


class NotReady(ServingError):
    """The model is still being loaded and warmed up; asking again later will work."""

    status = 503


class ModelFailed(ServingError):
    """TensorFlow refused or failed to run the signature, with the status of its error code."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class ModelLoadError(Exception):
    """A version on disk cannot be served; `code` is the status API's error code for it."""

    def __init__(self, message: str, *, code: str = "UNKNOWN") -> None:
        super().__init__(message)
        self.code = code


class StartupError(Exception):
    """The service cannot start as it was told to; the message says what to change."""

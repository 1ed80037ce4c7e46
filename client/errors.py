"""What can go wrong between a picture and its prediction."""

# Named for the condition, as an except clause reads best.
# ruff: noqa: N818

from __future__ import annotations


class ClientError(Exception):
    """Anything that keeps a client from an answer.

    ClientError
    +-- ImageRejected      one picture cannot be used; the others can
    +-- ConnectionFailed   nobody answers at the address, or hangs up
    +-- RequestTimedOut    the service took the request and did not answer in time
    +-- ServiceNotReady    the service answers 503: it is still loading, or has too much to do
    +-- ModelNotFound      the service does not serve that model or version
    +-- RequestRefused     the service refuses the request as a whole
    +-- UnexpectedReply    what answers is not this service
    """


class ImageRejected(ClientError):
    """One picture cannot be used.

    Attributes:
        file: the picture's name, or `None` if it has none.
        reason: what is wrong with it.
    """

    def __init__(self, file: str | None, reason: str) -> None:
        super().__init__(f"{file or 'a picture without a name'}: {reason}")
        self.file = file
        self.reason = reason


class ConnectionFailed(ClientError):
    """Nobody answers at the address, or whoever does hangs up. Was tried again before it was raised."""


class RequestTimedOut(ClientError):
    """The service took the request and did not answer in time. Not tried again: it may still be busy with it."""


class ServiceNotReady(ClientError):
    """The service answers 503. Was tried again before it was raised."""


class ModelNotFound(ClientError):
    """The service does not serve that model, or not that version of it."""


class RequestRefused(ClientError):
    """The service refuses the request as a whole.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class UnexpectedReply(ClientError):
    """The reply is not one that this service gives; probably something else listens at the address."""

"""Everything that can go wrong between a picture and its prediction."""

# Named for the condition, as the reader of an except clause meets it.
# ruff: noqa: N818

from __future__ import annotations


class ClientError(Exception):
    """Anything that keeps the client from returning a prediction.

    ClientError
    +-- ImageRejected       one picture cannot be read, here or by the service; others can
    +-- ConnectionFailed    no connection to the service, or it broke, on every attempt
    +-- RequestTimedOut     connected, but no whole answer within `timeout_s`
    +-- ServerBusy          503 on every attempt: the service is starting, or overloaded
    +-- ServerFailed        5xx: the service says that it failed
    +-- ModelNotFound       404: no such model, or no such version of it
    +-- RequestRejected     4xx: the service refuses the request as a whole
    +-- UnexpectedReply     what answered does not speak this protocol: another server, a proxy

    Only what ConnectionFailed and ServerBusy stand for is tried again before they are raised.
    Wrong arguments are ValueError and TypeError.
    """


class ImageRejected(ClientError):
    """One picture cannot be read: `file` (None if it had no name), number `index` of those given, from 0."""

    def __init__(self, index: int, file: str | None, reason: str) -> None:
        super().__init__(index, file, reason)
        self.index = index
        self.file = file
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.file or f'picture {self.index} of those given, counted from 0'}: {self.reason}"


class ConnectionFailed(ClientError):
    """There is no connection to the service, or it broke, on every attempt."""


class RequestTimedOut(ClientError):
    """The service took the request and did not answer it in time."""


class ServerBusy(ClientError):
    """The service answered 503 on every attempt: it is still starting, or overloaded."""


class ServerFailed(ClientError):
    """The service failed to answer, through no fault of the request."""


class ModelNotFound(ClientError):
    """The service has no such model, or no such version of it."""


class RequestRejected(ClientError):
    """The service refuses the request as a whole, whatever pictures are in it."""


class UnexpectedReply(ClientError):
    """The reply is not one of this service: something else listens there, or stands between."""

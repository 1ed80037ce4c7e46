"""The errors of the client."""

# Named for the condition, without the suffix "Error", as they read in an except clause.
# ruff: noqa: N818

from __future__ import annotations


class ClientError(Exception):
    """Base class of all errors of the client, except ValueError and TypeError for invalid arguments.

    ClientError
    +-- ImageRejected       one image cannot be read, here or by the service
    +-- ConnectionFailed    no connection to the service, or it was closed
    +-- RequestTimedOut     connected, but no complete response within `timeout_s`
    +-- ServerBusy          503, 429: the service is starting or overloaded, or limits requests
    +-- ServerFailed        5xx: the service failed
    +-- ModelNotFound       404: the service does not have this model or version
    +-- RequestRejected     4xx: the service rejects the request as a whole
    +-- UnexpectedResponse  the response is from another server or a proxy

    After a failed connection, a 503 and a 429 the request is sent again, and the error raised when no retries are left.

    Example:
        >>> from client import Client, ClientError, ImageRejected
        >>> with Client("http://127.0.0.1:8501") as client:
        ...     try:
        ...         client.predict(["red.png", "notes.txt"])
        ...     except ImageRejected as error:
        ...         print(f"image {error.index}: {error}")
        ...     except ClientError as error:
        ...         print(f"no predictions: {error}")
        image 1: notes.txt: not an image
    """


class ImageRejected(ClientError):
    """One image cannot be read: `file` (None if it has no name), at position `index` of the given images, from 0.

    Example:
        >>> from client import Client
        >>> Client("http://127.0.0.1:8501").predict(["red.png", "missing.png"])
        Traceback (most recent call last):
        client.errors.ImageRejected: missing.png: file not found
    """

    def __init__(self, index: int, file: str | None, reason: str) -> None:
        super().__init__(index, file, reason)
        self.index = index
        self.file = file
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.file or f'image {self.index} of those given, counted from 0'}: {self.reason}"


class ConnectionFailed(ClientError):
    """There is no connection to the service, or it was closed, on every attempt.

    Example:
        >>> from client import Client
        >>> Client("http://127.0.0.1:1", retries=0).predict("red.png")
        Traceback (most recent call last):
        client.errors.ConnectionFailed: cannot connect to http://127.0.0.1:1 (...); start the service with ...
    """


class RequestTimedOut(ClientError):
    """The service accepted the request and did not respond in time.

    Example:
        >>> from client import Client
        >>> Client("http://127.0.0.1:8501", timeout_s=0.5).predict("red.png")
        Traceback (most recent call last):
        client.errors.RequestTimedOut: no complete response from http://127.0.0.1:8501 within 0.5 s; allow more time ...
    """


class ServerBusy(ClientError):
    """The service responded with 503 or 429 on every attempt: it is starting or overloaded, or limits requests.

    Example:
        >>> from client import Client
        >>> Client("http://127.0.0.1:8501", retries=0).predict("red.png")
        Traceback (most recent call last):
        client.errors.ServerBusy: the service at http://127.0.0.1:8501 is not ready: colours is being loaded; check ...
    """


class ServerFailed(ClientError):
    """The service failed, although the request may be valid.

    Example:
        >>> from client import Client
        >>> Client("http://127.0.0.1:8501").predict("red.png")
        Traceback (most recent call last):
        client.errors.ServerFailed: the service at http://127.0.0.1:8501 failed (500): an internal error
    """


class ModelNotFound(ClientError):
    """The service does not have this model, or this version of it.

    Example:
        >>> from client import Client
        >>> Client("http://127.0.0.1:8501", model="cats").predict("red.png")
        Traceback (most recent call last):
        client.errors.ModelNotFound: no model cats; served: colours (http://127.0.0.1:8501); ... lists the models
    """


class RequestRejected(ClientError):
    """The service rejects the request as a whole, whatever its images.

    Example:
        >>> from client import Client
        >>> Client("http://127.0.0.1:8501").predict("red.png")
        Traceback (most recent call last):
        client.errors.RequestRejected: the service at http://127.0.0.1:8501 denied access (token required); pass ...
    """


class UnexpectedResponse(ClientError):
    """The response is not one of this service: it is from another server, or from a proxy.

    Example:
        >>> from client import Client
        >>> Client("http://127.0.0.1:8501").predict("red.png")
        Traceback (most recent call last):
        client.errors.UnexpectedResponse: expected predictions as JSON from http://127.0.0.1:8501, got 200 OK, ...
    """

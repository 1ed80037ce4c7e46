"""Converts gRPC errors to those of the client."""

from __future__ import annotations

import re
from typing import Any

import grpc

from client.errors import (
    ClientError,
    ConnectionFailed,
    ModelNotFound,
    RequestRejected,
    RequestTimedOut,
    ServerBusy,
    ServerFailed,
    UnexpectedResponse,
)

# UNAVAILABLE means that the server is busy, or that it cannot be reached; only the details differ.
_NO_CONNECTION = re.compile("connect|socket|reset by peer|resol|goaway", re.IGNORECASE)


class InvalidArgumentError(ClientError):
    """The server rejects the content of a request: one of the images, or their number."""


def read_retry_after(rpc_error: Any) -> str | None:
    """Return the seconds after which a server asks to repeat a failed call, if it does."""
    for key, value in rpc_error.trailing_metadata() or ():
        if key == "retry-after":
            return str(value)
    return None


def make_error(rpc_error: Any, *, target: str, timeout_s: float) -> ClientError:
    """Return the error for a failed call to `target`."""
    code, details = rpc_error.code(), rpc_error.details() or "no details"
    error: ClientError
    match code:
        case grpc.StatusCode.RESOURCE_EXHAUSTED if read_retry_after(rpc_error) is not None:
            error = ServerBusy(f"{target} limits requests: {details}")
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.RESOURCE_EXHAUSTED:
            error = InvalidArgumentError(details)
        case grpc.StatusCode.NOT_FOUND:
            error = ModelNotFound(f"{target} does not have the model or version: {details}")
        case grpc.StatusCode.FAILED_PRECONDITION:
            error = RequestRejected(
                f"{target} rejected the request: {details}; the client needs an image classifier with the signature "
                "image_bytes, as exports of this project have it"
            )
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            error = RequestRejected(
                f"{target} denied access ({details}); pass valid credentials with metadata or a channel (--token)"
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            error = RequestTimedOut(
                f"no response from {target} within {timeout_s:g} s; allow more time with timeout_s "
                "(--timeout), or send fewer images per request with batch_size (--batch-size)"
            )
        case grpc.StatusCode.UNAVAILABLE if _NO_CONNECTION.search(details):
            error = ConnectionFailed(
                f"cannot connect to {target} ({details}); check that it is the gRPC port of a running server"
            )
        case grpc.StatusCode.UNAVAILABLE:
            error = ServerBusy(f"{target} is not ready: {details}")
        case grpc.StatusCode.UNIMPLEMENTED:
            error = UnexpectedResponse(f"the server at {target} is not a TensorFlow Serving: {details}")
        case _:
            error = ServerFailed(f"{target} failed: {code.name}, {details}")
    error.__cause__ = rpc_error
    return error

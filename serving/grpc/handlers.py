"""gRPC method handlers from plain functions: receive, parse, call, serialize; exceptions become the call's status."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from serving.errors import ServingError
from serving.greenlets import LoopGreenlets, call_from_loop, run_sized
from serving.grpc.receiving import MessageReceiver
from serving.memory import MemoryBudget, RequestMemory
from serving.request_context import RequestContext, current_request

logger = logging.getLogger(__name__)

MAX_DETAILS = 4_000  # characters; gRPC sends the details in a header

OBJECT_BYTES = 8  # memory of a parsed message per byte: a one-byte varint becomes an 8-byte integer

_Method = Callable[[Any], Any]
_Failure = tuple[grpc.StatusCode, str]


@dataclass(frozen=True)
class SharedState:
    """State shared by all methods of one server.

    Args:
        greenlets: the pool that processes requests.
        budget: memory for requests.
        receiver: receives their messages.
    """

    greenlets: LoopGreenlets
    budget: MemoryBudget
    receiver: MessageReceiver


def make_handler(
    method: _Method, request_type: Any, *, shared: SharedState, is_long: bool = False
) -> grpc.RpcMethodHandler:
    """Make the handler of a unary method.

    Args:
        method: callable(request) that returns the response.
        request_type: the message class of the request.
        shared: the shared state of the server.
        is_long: the method blocks for long, and is called in a thread.
    """

    async def handle(_: Any, context: Any) -> bytes:
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        memory = RequestMemory(shared.budget)
        is_processed = False
        response, failure = b"", None
        try:
            try:
                data = await shared.receiver.receive(context, memory, deadline_s=deadline_s)
            except ServingError as error:
                failure = getattr(grpc.StatusCode, error.code), str(error)
            else:
                # Runs to its end even if the client cancels the call, so it releases the memory itself.
                is_processed = True
                response, failure = await call_from_loop(
                    lambda: _respond_and_release(method, request_type, data, memory, shared),
                    greenlets=shared.greenlets,
                    in_thread=is_long,
                    make_context=lambda is_cancelled: RequestContext(deadline_s, is_cancelled, memory),
                )
                del data
            # The exception of `abort` is in a reference cycle, which keeps the local variables of this frame until a
            # garbage collection. They must not reference the message, directly or through another exception.
            if failure:
                await context.abort(*failure)
            return response
        finally:
            if not is_processed:
                memory.release_in(shared.greenlets.threads)

    # A unary request is on the wire a stream of one message. As a stream handler, this one reads the message itself and
    # can reserve memory first.
    return grpc.stream_unary_rpc_method_handler(handle)


def _respond_and_release(
    method: _Method, request_type: Any, data: bytes, memory: RequestMemory, shared: SharedState
) -> tuple[bytes, _Failure | None]:
    try:
        return _respond(method, request_type, data)
    finally:
        memory.release_in(shared.greenlets.threads)


def _respond(method: _Method, request_type: Any, data: bytes) -> tuple[bytes, _Failure | None]:
    """Return the serialized response, or the status code and details of the failure."""
    context = current_request.get()
    try:
        context.reserve(len(data) * OBJECT_BYTES)
        message = run_sized(len(data), request_type.FromString, data)
        response: bytes = method(message).SerializeToString()
    except DecodeError:
        name = request_type.DESCRIPTOR.full_name
        return b"", (grpc.StatusCode.INTERNAL, f"the message cannot be parsed as {name}")
    except ServingError as error:
        error = error.tensorflow_serving or error
        return b"", (getattr(grpc.StatusCode, error.code), str(error)[:MAX_DETAILS])
    except Exception:
        logger.exception("unhandled exception in a gRPC method")
        return b"", (grpc.StatusCode.INTERNAL, "internal error; the reason is in the service's log")
    return response, None

"""gRPC method handlers from plain functions: receive, parse, call, serialize; exceptions become the call's status."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
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


def make_handler(
    method: _Method,
    request_type: Any,
    *,
    greenlets: LoopGreenlets,
    budget: MemoryBudget,
    receiver: MessageReceiver,
    is_long: bool = False,
) -> grpc.RpcMethodHandler:
    """Make the handler of a unary method: callable(request) that returns the response.

    Greenlets call it, or a thread if it `is_long`: it blocks for long.
    """

    async def handle(_: Any, context: Any) -> bytes:
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        memory = RequestMemory(budget)
        is_processed = False
        response, failure = b"", None
        try:
            try:
                data = await receiver.receive(context, memory, deadline_s=deadline_s)
            except ServingError as error:
                failure = getattr(grpc.StatusCode, error.code), str(error)
            else:
                # Runs to its end even if the client cancels the call, so it releases the memory itself.
                is_processed = True
                response, failure = await call_from_loop(
                    lambda: _respond(method, request_type, data, greenlets),
                    greenlets=greenlets,
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
                memory.release_in(greenlets.threads)

    # A unary request is on the wire a stream of one message. As a stream handler, this one reads the message itself and
    # can reserve memory first.
    return grpc.stream_unary_rpc_method_handler(handle)


def _respond(
    method: _Method, request_type: Any, data: bytes, greenlets: LoopGreenlets
) -> tuple[bytes, tuple[grpc.StatusCode, str] | None]:
    """Return the serialized response, or the status code and details of the failure; release the request's memory."""
    context = current_request.get()
    try:
        context.reserve(len(data) * OBJECT_BYTES)
        # No local variable for the message: it is freed before its memory is released.
        response: bytes = method(run_sized(len(data), request_type.FromString, data)).SerializeToString()
    except DecodeError:
        name = request_type.DESCRIPTOR.full_name
        return b"", (grpc.StatusCode.INTERNAL, f"the message cannot be parsed as {name}")
    except ServingError as error:
        error = error.tensorflow_serving or error
        return b"", (getattr(grpc.StatusCode, error.code), str(error)[:MAX_DETAILS])
    except Exception:
        logger.exception("unhandled exception in a gRPC method")
        return b"", (grpc.StatusCode.INTERNAL, "internal error; the reason is in the service's log")
    finally:
        assert context.memory is not None
        context.memory.release_in(greenlets.threads)
    return response, None

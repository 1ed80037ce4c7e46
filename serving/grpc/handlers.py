"""A gRPC method made of a plain function: a message in, a message out, and what it raises as the call's status."""

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

MAX_DETAILS = 4_000  # gRPC sends them in a header, which has to stay small

# Memory of a message as objects, per byte: a varint of one byte becomes an integer of 8.
OBJECT_BYTES = 8

_Method = Callable[[Any], Any]
_Failure = tuple[grpc.StatusCode, str]


@dataclass(frozen=True)
class GrpcLimits:
    """What all methods of a server share.

    Args:
        greenlets: where requests are processed.
        budget: memory for requests.
        receiver: of their messages.
    """

    greenlets: LoopGreenlets
    budget: MemoryBudget
    receiver: MessageReceiver


def make_handler(
    method: _Method, request_type: Any, *, limits: GrpcLimits, is_long: bool = False
) -> grpc.RpcMethodHandler:
    """Make the handler of a method with one request and one response.

    Args:
        method: callable(request) that returns the response.
        request_type: the class of the request's message.
        limits: of the server.
        is_long: the method blocks for long, and is called in a thread.
    """

    async def handle(_: Any, context: Any) -> bytes:
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        memory = RequestMemory(limits.budget)
        is_processed = False
        response, failure = b"", None
        try:
            try:
                data = await limits.receiver.receive(context, memory, deadline_s=deadline_s)
            except ServingError as error:
                failure = getattr(grpc.StatusCode, error.code), str(error)
            else:
                # To its end, even where the client cancels the call: so the memory is released there.
                is_processed = True
                response, failure = await call_from_loop(
                    lambda: _respond_and_release(method, request_type, data, memory, limits),
                    greenlets=limits.greenlets,
                    in_thread=is_long,
                    make_context=lambda is_cancelled: RequestContext(deadline_s, is_cancelled, memory),
                )
                del data
            # What `abort` raises is in circles of references: until a garbage collection it stays, and so would what
            # the variables here hold. The message must not be among it, nor an exception, which holds variables, too.
            if failure:
                await context.abort(*failure)
            return response
        finally:
            if not is_processed:
                memory.release_in(limits.greenlets.threads)

    # On the wire, a method with one request is one with a stream of requests that holds one. In that form the handler
    # receives the message itself, and can reserve memory for it.
    return grpc.stream_unary_rpc_method_handler(handle)


def _respond_and_release(
    method: _Method, request_type: Any, data: bytes, memory: RequestMemory, limits: GrpcLimits
) -> tuple[bytes, _Failure | None]:
    try:
        return _respond(method, request_type, data)
    finally:
        memory.release_in(limits.greenlets.threads)


def _respond(method: _Method, request_type: Any, data: bytes) -> tuple[bytes, _Failure | None]:
    """Return the serialized response, or how the call fails; nobody but the log sees a stack trace."""
    context = current_request.get()
    try:
        context.reserve(len(data) * OBJECT_BYTES)
        message = run_sized(len(data), request_type.FromString, data)
        response: bytes = method(message).SerializeToString()
    except DecodeError:
        name = request_type.DESCRIPTOR.full_name
        return b"", (grpc.StatusCode.INTERNAL, f"the message sent is not a {name}: it cannot be parsed")
    except ServingError as error:
        error = error.tensorflow_serving or error
        return b"", (getattr(grpc.StatusCode, error.code), str(error)[:MAX_DETAILS])
    except Exception:
        logger.exception("a gRPC call failed")
        return b"", (grpc.StatusCode.INTERNAL, "internal error; the reason is in the service's log")
    return response, None

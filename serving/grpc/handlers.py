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
from serving.observer import RequestObserver
from serving.request_context import RequestContext, current_request

logger = logging.getLogger(__name__)

MAX_DETAILS = 4_000  # characters; gRPC sends the details in a header

REQUEST_ID = "x-request-id"  # in the metadata

OBJECT_BYTES = 8  # memory of a parsed message per byte: a one-byte varint becomes an 8-byte integer

_Method = Callable[[Any], Any]


def make_handler(
    method: _Method,
    request_type: Any,
    *,
    route: str,
    greenlets: LoopGreenlets,
    budget: MemoryBudget,
    receiver: MessageReceiver,
    observer: RequestObserver,
    is_long: bool = False,
    is_tensorflow_serving: bool = False,
) -> grpc.RpcMethodHandler:
    """Make the handler of a unary method: callable(request) that returns the response. `route` is its path.

    Greenlets call it, or a thread if it `is_long`: it blocks for long. If it `is_tensorflow_serving`, its errors are
    those of that server.
    """

    async def handle(_: Any, call: Any) -> bytes:
        remaining_s = call.time_remaining()
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        memory = RequestMemory(budget)
        admitted = current_request.get()  # of access control, where it is on
        context = RequestContext(
            deadline_s,
            memory=memory,
            caller=admitted.caller,
            client=admitted.client or call.peer(),
            protocol="gRPC",
            route=route,
        )
        metadata = call.invocation_metadata()
        for name, value in metadata:
            if name == REQUEST_ID:
                context.request_id = value
        has_id = bool(context.request_id)
        observer.begin(context, metadata)
        if has_id:
            call.set_trailing_metadata(((REQUEST_ID, context.request_id),))

        def set_disconnected(is_cancelled: Callable[[], bool]) -> RequestContext:
            context.client_disconnected = is_cancelled
            return context

        is_processed = False
        response, failure = b"", None
        try:
            try:
                data = await receiver.receive(call, memory, deadline_s=deadline_s)
            except ServingError as error:
                context.status, context.shed_reason = error.code, error.shed_reason
                failure = getattr(grpc.StatusCode, error.code), str(error)
            else:
                # Runs to its end even if the client cancels the call, so it ends the request itself.
                is_processed = True
                response, failure = await call_from_loop(
                    lambda: _respond(method, request_type, data, greenlets, observer, is_tensorflow_serving),
                    greenlets=greenlets,
                    in_thread=is_long,
                    make_context=set_disconnected,
                )
                del data
            # The exception of `abort` is in a reference cycle, which keeps the local variables of this frame until a
            # garbage collection. They must not reference the message, directly or through another exception.
            if failure:
                await call.abort(*failure)
            return response
        finally:
            if not is_processed:
                context.status = context.status or "CANCELLED"
                observer.end(context)
                memory.release_in(greenlets.threads)

    # A unary request is on the wire a stream of one message. As a stream handler, this one reads the message itself and
    # can reserve memory first.
    return grpc.stream_unary_rpc_method_handler(handle)


def _respond(
    method: _Method,
    request_type: Any,
    data: bytes,
    greenlets: LoopGreenlets,
    observer: RequestObserver,
    is_tensorflow_serving: bool,
) -> tuple[bytes, tuple[grpc.StatusCode, str] | None]:
    """Return the serialized response, or the status code and details of the failure; end the request."""
    context = current_request.get()
    context.status = "INTERNAL"
    try:
        context.reserve(len(data) * OBJECT_BYTES)
        # No local variable for the message: it is freed before its memory is released.
        response: bytes = method(run_sized(len(data), request_type.FromString, data)).SerializeToString()
        context.status = "OK"
    except DecodeError:
        name = request_type.DESCRIPTOR.full_name
        return b"", (grpc.StatusCode.INTERNAL, f"the message cannot be parsed as {name}")
    except ServingError as error:
        if is_tensorflow_serving:
            error = error.tensorflow_serving or error
        context.status, context.shed_reason = error.code, error.shed_reason
        return b"", (getattr(grpc.StatusCode, error.code), str(error)[:MAX_DETAILS])
    except Exception:
        logger.exception("unhandled exception in a gRPC method")
        return b"", (grpc.StatusCode.INTERNAL, "internal error; the reason is in the service's log")
    finally:
        observer.end(context)
        assert context.memory is not None
        context.memory.release_in(greenlets.threads)
    return response, None

"""A gRPC method made of a plain function: a message in, a message out, and what it raises as the call's status."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from serving.errors import ServingError
from serving.waiting import SMALL_BYTES, LoopGreenlets, call_from_loop

logger = logging.getLogger(__name__)

MAX_DETAILS = 4_000  # gRPC sends them in a header, which has to stay small

_Answer = Callable[[Any, float | None], Any]
_Failure = tuple[grpc.StatusCode, str]


def make_handler(
    answer: _Answer, request_type: Any, *, greenlets: LoopGreenlets, is_long: bool = False
) -> grpc.RpcMethodHandler:
    """Make the handler of a method with one request and one reply.

    Args:
        answer: is given the request, and when its answer is of no use any more on the clock of `time.monotonic`, or
            None; returns the reply.
        request_type: the class of the request's message.
        greenlets: where requests are read and answered; large ones in their threads.
        is_long: small ones in their threads too.
    """

    async def handle(data: bytes, context: Any) -> bytes:
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        reply, failure = await call_from_loop(
            lambda: _answer(answer, request_type, data, deadline_s),
            greenlets=greenlets,
            is_small=not is_long and len(data) <= SMALL_BYTES,
        )
        if failure:
            await context.abort(*failure)
        return reply

    return grpc.unary_unary_rpc_method_handler(handle)


def _answer(answer: _Answer, request_type: Any, data: bytes, deadline_s: float | None) -> tuple[bytes, _Failure | None]:
    """Return the serialized reply, or how the call fails; nobody but the log sees a stack trace."""
    try:
        reply: bytes = answer(request_type.FromString(data), deadline_s).SerializeToString()
    except DecodeError:
        name = request_type.DESCRIPTOR.full_name
        return b"", (grpc.StatusCode.INTERNAL, f"the message sent is no {name}: it cannot be parsed")
    except ServingError as error:
        return b"", (getattr(grpc.StatusCode, error.code), str(error)[:MAX_DETAILS])
    except Exception:
        logger.exception("a gRPC call failed")
        return b"", (grpc.StatusCode.INTERNAL, "the service failed to answer; the reason is in its log")
    return reply, None

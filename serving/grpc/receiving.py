"""Receives gRPC messages within the memory budget.

gRPC receives a message whole, and tells its length only then. Most arrive at once. Memory for the largest that is taken
is reserved for one that does not; where there is none, the call ends: a message that is being received cannot wait.
What arrives before that is bounded by what the network carries in the meantime.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

from serving.errors import Overloaded, ServingError
from serving.memory import RequestMemory
from serving.waiting import SMALL_BYTES

AT_ONCE_S = 0.02  # a message that takes longer to arrive is a long one
COPIES = 2  # of a message: gRPC's, and the one that it hands over
PATIENCE_S = 0.2  # without memory for a long message: a small one can be late where the event loop is
CHECK_S = 0.5  # how often a long message is looked at
TIMEOUT_S = 30.0  # for the whole of a message; and for memory, once it is there
CONTENDED_TIMEOUT_S = 5.0  # while others wait for memory


def _retrieve(reading: asyncio.Future[Any]) -> None:
    """Take note of how a read ended: asyncio logs what nobody has looked at, such as that the call was aborted."""
    if not reading.cancelled():
        reading.exception()


async def receive_message(
    context: Any, memory: RequestMemory, *, max_message_bytes: int, deadline_s: float | None
) -> bytes:
    """Receive the message of a call, and reserve memory for it.

    Args:
        context: the call's.
        memory: of the request.
        max_message_bytes: the largest message that the server takes.
        deadline_s: the call's, on the clock of `time.monotonic`.

    Raises:
        Overloaded: there was no memory for it, or it did not arrive in time.
        ServingError: the call has no message.
    """
    began_s = time.monotonic()
    reading = asyncio.ensure_future(context.read())
    reading.add_done_callback(_retrieve)
    await asyncio.wait((reading,), timeout=AT_ONCE_S)
    is_long = not reading.done()
    while is_long and not memory.try_large_body(COPIES * max_message_bytes):
        if time.monotonic() - began_s > PATIENCE_S:
            raise Overloaded("no memory is free for a long message; try again later, or send less at a time")
        await asyncio.wait((reading,), timeout=AT_ONCE_S)
        is_long = not reading.done()
    while not reading.done():
        await asyncio.wait((reading,), timeout=CHECK_S)
        if time.monotonic() - began_s > (CONTENDED_TIMEOUT_S if memory.is_contended else TIMEOUT_S):
            raise Overloaded("the message did not arrive in time")
    message = reading.result()
    if message is grpc.aio.EOF:
        raise ServingError("the call has no message")
    data: bytes = message
    if is_long:
        memory.shrink_body_to(max(1, COPIES * len(data)))
    else:
        waits_until_s = time.monotonic() + TIMEOUT_S if deadline_s is None else deadline_s
        await memory.grow_body(len(data), is_small=len(data) <= SMALL_BYTES, deadline_s=waits_until_s)
    return data

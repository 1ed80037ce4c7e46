"""Receives gRPC messages within the memory budget.

gRPC receives a message whole, and tells its length only then. So a call waits for one of a few places before its
message is received, each counted as the largest message that is taken. A small message has its place for an instant.
One that takes longer moves to a place for long messages, so that small ones do not wait behind it.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

from serving.errors import Overloaded, ServingError
from serving.memory import MemoryBudget, Pool, RequestMemory
from serving.waiting import SMALL_BYTES

LONG_S = 0.05  # a message that takes longer is a long one
TIMEOUT_S = 30.0  # for the whole of a message
CHECK_S = 0.5  # how often a long message is looked at

MIN_PLACES = 3
FRESH_SHARE = 1 / 3  # of the places, for calls whose messages are not known to be long


class MessageReceiver:
    """The places of one server.

    Args:
        budget: its gRPC share decides how many places there are.
        max_message_bytes: the largest message.
    """

    def __init__(self, budget: MemoryBudget, max_message_bytes: int) -> None:
        self.max_message_bytes = min(max_message_bytes, budget.grpc_bytes // MIN_PLACES)
        places = max(MIN_PLACES, budget.grpc_bytes // max(1, self.max_message_bytes))
        fresh = max(1, int(places * FRESH_SHARE))
        self._fresh = Pool("place for a message", fresh)
        self._long = Pool("place for a long message", places - fresh)

    async def receive(self, context: Any, memory: RequestMemory, *, deadline_s: float | None) -> bytes:
        """Receive the message of a call, and reserve memory for it.

        Raises:
            Overloaded: there was no place or memory for it in time, or it did not arrive.
            ServingError: the call has no message.
        """
        if deadline_s is None:
            deadline_s = time.monotonic() + TIMEOUT_S
        with await self._fresh.reserve_async(1, deadline_s=deadline_s) as place:
            reading = asyncio.ensure_future(context.read())
            await asyncio.wait((reading,), timeout=LONG_S)
            if reading.done():
                return await self._keep(reading, memory, deadline_s)
            with await self._move(place, deadline_s):
                while not reading.done() and time.monotonic() < deadline_s:
                    await asyncio.wait((reading,), timeout=CHECK_S)
                if not reading.done():
                    raise Overloaded("the message did not arrive in time")
                return await self._keep(reading, memory, deadline_s)

    async def _move(self, place: Any, deadline_s: float) -> Any:
        """Move a call to a place for long messages; where there is none, it may stay until others wait for its own."""
        while True:
            long_place = self._long.reservation()
            if long_place.try_grow(1, is_body=False):
                place.release()
                return long_place
            if self._fresh.has_waiters or time.monotonic() > deadline_s:
                raise Overloaded("too many long messages are being received; try again later")
            await asyncio.sleep(LONG_S)

    async def _keep(self, reading: asyncio.Future[Any], memory: RequestMemory, deadline_s: float) -> bytes:
        message = reading.result()
        if message is grpc.aio.EOF:
            raise ServingError("the call has no message")
        data: bytes = message
        await memory.grow_body(len(data), is_small=len(data) <= SMALL_BYTES, deadline_s=deadline_s)
        return data

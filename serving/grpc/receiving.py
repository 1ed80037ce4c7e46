"""Receives gRPC messages within the memory budget.

gRPC receives a message whole, tells its length only then, and cannot be made to wait in between. What can wait is the
call: until its message is read, gRPC takes in no more than the first 64 KB of it. So what a connection sent last
decides how its next message is read: after a small one at once; after a large one when memory for the largest is
reserved. Of calls on connections that have sent nothing yet, a few are read at a time.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

from serving.errors import Overloaded, ServingError
from serving.greenlets import SMALL_BYTES
from serving.memory import RequestMemory

COPIES = 3  # of a message while gRPC hands it over: what was received, what it is joined in, and the result

NEW_AT_ONCE = 4  # calls on connections that have sent nothing yet
LATE_AT_ONCE = 4  # late messages without memory, on connections that have sent a small one
MAX_WAITING = 1_000  # calls that wait for their turn

# A message that takes longer to arrive is late, and needs memory for the largest.
AT_ONCE_S = 0.02
# How many times AT_ONCE_S one may go on without. Times at which the event loop looked, and not seconds: where there is
# much to do the loop itself is late, and a small message with it.
GRACE = 2
PATIENCE = 100  # where that keeps nobody waiting

CHECK_S = 0.5  # how often a message with memory is looked at
TIMEOUT_S = 30.0  # for the whole of a message; and for memory
CONTENDED_TIMEOUT_S = 5.0  # while others wait for memory

MAX_CONNECTIONS = 10_000  # that are remembered

# So that no more than the first 64 KB of a message is taken in before it is read: else gRPC adapts that to the network.
CHANNEL_OPTIONS = (("grpc.http2.bdp_probe", 0),)


def _retrieve(reading: asyncio.Future[Any]) -> None:
    """Take note of how a read ended: asyncio logs what nobody has looked at, such as that the call was aborted."""
    if not reading.cancelled():
        reading.exception()


def _begin_reading(context: Any) -> asyncio.Future[Any]:
    reading: asyncio.Future[Any] = asyncio.ensure_future(context.read())
    reading.add_done_callback(_retrieve)
    return reading


class MessageReceiver:
    """Receives the messages of a server's calls, in its event loop.

    Args:
        max_message_bytes: the largest message that the server takes.
    """

    def __init__(self, max_message_bytes: int) -> None:
        self._needed_bytes = COPIES * max_message_bytes
        self._sends_large: dict[str, bool] = {}  # by connection; who sent last is last
        self._turns = asyncio.Semaphore(NEW_AT_ONCE)
        self._waiting = 0  # for a turn
        self._late = 0

    async def receive(self, context: Any, memory: RequestMemory, *, deadline_s: float | None) -> bytes:
        """Receive the message of a call, and reserve memory for it.

        Args:
            context: the call's.
            memory: of the request.
            deadline_s: the call's, on the clock of `time.monotonic`.

        Raises:
            Overloaded: there was no memory for it, or it did not arrive in time.
            ServingError: the call has no message.
        """
        latest_s = time.monotonic() + TIMEOUT_S
        deadline_s = latest_s if deadline_s is None else min(deadline_s, latest_s)
        connection = context.peer()
        sends_large = self._sends_large.get(connection)
        try:
            if sends_large:
                await memory.grow_body(self._needed_bytes, is_small=False, deadline_s=deadline_s)
                reading = _begin_reading(context)
            elif sends_large is None:
                reading = await self._read_in_turn(context, memory, deadline_s)
            else:
                reading = _begin_reading(context)
                await self._wait_after_small(reading, memory)
        except Overloaded:
            self._note(connection, sends_large=True)  # the next time it waits for memory
            raise
        await _wait_with_memory(reading, memory)
        message = reading.result()
        if message is grpc.aio.EOF:
            raise ServingError("the call has no message")
        data: bytes = message
        is_large = len(data) > SMALL_BYTES
        self._note(connection, sends_large=is_large)
        if memory.held_bytes:
            memory.shrink_body_to(max(1, len(data)))
        elif not is_large:
            await memory.grow_body(len(data), is_small=True, deadline_s=deadline_s)
        elif not memory.try_large_body(len(data)):
            raise _no_memory()  # nor can it wait here: many could, and each takes what it would wait for
        return data

    def _note(self, connection: str, *, sends_large: bool) -> None:
        self._sends_large.pop(connection, None)
        self._sends_large[connection] = sends_large
        if len(self._sends_large) > MAX_CONNECTIONS:
            del self._sends_large[next(iter(self._sends_large))]

    async def _read_in_turn(self, context: Any, memory: RequestMemory, deadline_s: float) -> asyncio.Future[Any]:
        """Begin to read on a connection that has sent nothing yet, and wait as `_has_arrived` does."""
        if self._waiting >= MAX_WAITING:
            raise _too_many_new()
        self._waiting += 1
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                await self._turns.acquire()
        except TimeoutError:
            raise _too_many_new() from None
        finally:
            self._waiting -= 1
        try:
            reading = _begin_reading(context)
            count = 0
            while not await self._has_arrived(reading, memory):
                count += 1
                if count >= (GRACE if self._waiting else PATIENCE):
                    raise _no_memory()
        finally:
            self._turns.release()
        return reading

    async def _wait_after_small(self, reading: asyncio.Future[Any], memory: RequestMemory) -> None:
        """Wait as `_has_arrived` does on a connection that has sent a small message."""
        for _ in range(GRACE):
            if await self._has_arrived(reading, memory):
                return
        if self._late >= LATE_AT_ONCE:
            raise _no_memory()
        self._late += 1
        try:
            for _ in range(PATIENCE):
                if await self._has_arrived(reading, memory):
                    return
        finally:
            self._late -= 1
        raise _no_memory()

    async def _has_arrived(self, reading: asyncio.Future[Any], memory: RequestMemory) -> bool:
        """Wait for a moment; returns whether a message is there, or has memory for the largest now."""
        await asyncio.wait((reading,), timeout=AT_ONCE_S)
        return reading.done() or memory.try_large_body(self._needed_bytes)


async def _wait_with_memory(reading: asyncio.Future[Any], memory: RequestMemory) -> None:
    """Wait for a message that has memory."""
    began_s = time.monotonic()
    while not reading.done():
        await asyncio.wait((reading,), timeout=CHECK_S)
        if time.monotonic() - began_s > (CONTENDED_TIMEOUT_S if memory.is_contended else TIMEOUT_S):
            raise Overloaded("the message did not arrive in time")


def _too_many_new() -> Overloaded:
    return Overloaded("too many calls on new connections wait; try again later")


def _no_memory() -> Overloaded:
    return Overloaded("no memory is free for a large message; try again later, or send less at a time")

"""Receives gRPC messages within the memory budget.

gRPC receives a message as a whole, and its length is known only afterwards. Backpressure applies to the call: until its
message is read, gRPC buffers no more than the first 64 KB. So the last message of a connection decides how the next one
is read: after a small message immediately, after a large one once memory for the largest message is reserved. Of the
calls on connections that have sent no message yet, only a few are read concurrently.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc

from serving.errors import Overloaded, ServingError
from serving.greenlets import SMALL_BYTES
from serving.memory import RequestMemory

COPIES = 3  # copies of a message in gRPC: the received slices, the joined buffer, and the result

MAX_NEW_READS = 4  # concurrent reads on connections that have sent no message yet
MAX_LATE_READS = 4  # late messages without memory, on connections that have sent a small message
MAX_WAITING = 1_000  # calls queued for MAX_NEW_READS

# A message that has not arrived at the first poll is late, and needs memory for the largest message. Without it, the
# read ends after a number of polls; not of seconds, because a busy event loop itself delays small messages.
POLL_S = 0.02
GRACE_POLLS = 2
MAX_POLLS = 100  # while no other call is queued

CHECK_S = 0.5  # poll interval once memory is reserved
TIMEOUT_S = 30.0  # to receive a message, and to wait for memory
CONTENDED_TIMEOUT_S = 5.0  # while other requests wait for memory

MAX_CONNECTIONS = 10_000  # connections whose last message size is stored

# Limits gRPC's receive buffer to 64 KB per call; with the probe, gRPC adapts it to the network.
CHANNEL_OPTIONS = (("grpc.http2.bdp_probe", 0),)

_TOO_MANY_NEW = "too many calls on new connections are queued; try again later"
_NO_MEMORY = "no memory is free for a large message; try again later, or send less at a time"


class MessageReceiver:
    """Receives the messages of all calls of a server, up to `max_message_bytes` each, in its event loop."""

    def __init__(self, max_message_bytes: int) -> None:
        self._needed_bytes = COPIES * max_message_bytes
        self._sends_large: dict[str, bool] = {}  # by connection, least recently used first
        self._new_reads = asyncio.Semaphore(MAX_NEW_READS)
        self._waiting = 0  # calls queued for a new read
        self._late = 0

    async def receive(self, context: Any, memory: RequestMemory, *, deadline_s: float | None) -> bytes:
        """Receive the message of a call until `deadline_s` of `time.monotonic()`, and reserve memory for it.

        Raises:
            Overloaded: no memory was free, or the message did not arrive in time.
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
                reading = await self._read_first(context, memory, deadline_s)
            else:
                reading = _begin_reading(context)
                await self._wait_for_small(reading, memory)
        except Overloaded:
            self._note(connection, sends_large=True)  # the next call waits for memory
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
            raise Overloaded(_NO_MEMORY, shed_reason="memory")  # waiting here would keep the message in memory
        return data

    def _note(self, connection: str, *, sends_large: bool) -> None:
        self._sends_large.pop(connection, None)
        self._sends_large[connection] = sends_large
        if len(self._sends_large) > MAX_CONNECTIONS:
            del self._sends_large[next(iter(self._sends_large))]

    async def _read_first(self, context: Any, memory: RequestMemory, deadline_s: float) -> asyncio.Future[Any]:
        """Read on a connection that has sent no message yet, with MAX_NEW_READS at a time."""
        if self._waiting >= MAX_WAITING:
            raise Overloaded(_TOO_MANY_NEW, shed_reason="new_calls")
        self._waiting += 1
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                await self._new_reads.acquire()
        except TimeoutError:
            raise Overloaded(_TOO_MANY_NEW, shed_reason="new_calls") from None
        finally:
            self._waiting -= 1
        try:
            reading = _begin_reading(context)
            if not await self._poll(reading, memory, lambda: GRACE_POLLS if self._waiting else MAX_POLLS):
                raise Overloaded(_NO_MEMORY, shed_reason="memory")
        finally:
            self._new_reads.release()
        return reading

    async def _wait_for_small(self, reading: asyncio.Future[Any], memory: RequestMemory) -> None:
        """Poll for the next message of a connection that has sent a small one."""
        if await self._poll(reading, memory, lambda: GRACE_POLLS):
            return
        if self._late >= MAX_LATE_READS:
            raise Overloaded(_NO_MEMORY, shed_reason="memory")
        self._late += 1
        try:
            if not await self._poll(reading, memory, lambda: MAX_POLLS):
                raise Overloaded(_NO_MEMORY, shed_reason="memory")
        finally:
            self._late -= 1

    async def _poll(self, reading: asyncio.Future[Any], memory: RequestMemory, limit: Callable[[], int]) -> bool:
        """Wait up to `limit()` times POLL_S, until the message has arrived or memory for the largest is reserved."""
        count = 0
        while count < limit():
            await asyncio.wait((reading,), timeout=POLL_S)
            if reading.done() or memory.try_large_body(self._needed_bytes):
                return True
            count += 1
        return False


def _begin_reading(context: Any) -> asyncio.Future[Any]:
    reading: asyncio.Future[Any] = asyncio.ensure_future(context.read())
    # Retrieves the exception, for example of an aborted call: asyncio logs unretrieved ones.
    reading.add_done_callback(lambda _: reading.cancelled() or reading.exception())
    return reading


async def _wait_with_memory(reading: asyncio.Future[Any], memory: RequestMemory) -> None:
    """Wait for a message whose memory is reserved."""
    began_s = time.monotonic()
    while not reading.done():
        await asyncio.wait((reading,), timeout=CHECK_S)
        if time.monotonic() - began_s > (CONTENDED_TIMEOUT_S if memory.is_contended else TIMEOUT_S):
            raise Overloaded("the message did not arrive in time", shed_reason="slow_message")

"""Receives a request body within the memory budget, and enforces the minimum upload rate."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

from serving.greenlets import SMALL_BYTES
from serving.http.request import Request, RequestFault
from serving.memory import RequestMemory

GROW_BYTES = 1024 * 1024  # an upload reserves memory in steps of this size

# The minimum upload rate: bytes in each period. It is higher while other requests wait for memory.
UPLOAD_PERIOD_S, UPLOAD_BYTES = 5.0, 5 * 1024
CONTENDED_PERIOD_S, CONTENDED_BYTES = 2.0, 32 * 1024


class BodyReceiver:
    """Receives the body of one request, if it is large or has not fully arrived.

    Args:
        request: the request; its `timeout_s` also limits the wait for memory.
        memory: reserves memory for the body.
        max_bytes: the longest body.
    """

    def __init__(self, request: Request, memory: RequestMemory, *, max_bytes: int) -> None:
        self._request = request
        self._memory = memory
        self._max_bytes = max_bytes
        self._loop = asyncio.get_running_loop()
        self.waits_for_memory = False
        self.period_started_s = self._loop.time()
        self.period_bytes = 0  # received in this period

    async def receive(self) -> bytes | None:
        """Return the body, or None after a client disconnect or a fault in the rest of the request.

        A body that is too long is returned empty: the application refuses the request by its Content-Length.

        Raises:
            TooLarge: the memory budget can never hold it.
            Overloaded: no memory was free before the deadline.
        """
        request = self._request
        declared = request.declared_bytes
        if (declared or 0) > self._max_bytes:
            request.keep_alive = False
            return b""
        is_small = (declared or 0) <= SMALL_BYTES
        if not is_small:
            self._memory.check_fits(declared or 0)
        reserved = 0
        received: list[bytes] = []
        size = 0
        while request.more_body or request.body:
            message = cast(dict[str, Any], await request.receive())
            if message["type"] == "http.disconnect":
                return None
            size += len(message["body"])
            if size > self._max_bytes:
                request.keep_alive = False
                cast(Any, request.scope["headers"]).append((b"content-length", str(size).encode()))
                return b""
            if size > reserved:
                if is_small and size > SMALL_BYTES:  # a chunked body
                    is_small, reserved = False, 0
                step_bytes = SMALL_BYTES if is_small else GROW_BYTES
                grown = min(size + step_bytes, max(size, declared or size))
                await self._wait_for_memory(grown - reserved, is_small=is_small)
                reserved = grown
            received.append(message["body"])
        return b"".join(received)

    async def _wait_for_memory(self, more_bytes: int, *, is_small: bool) -> None:
        request = self._request
        self.waits_for_memory = True
        began_s = self._loop.time()
        try:
            deadline_s = time.monotonic() + request.timeout_s - request.waited_s
            await self._memory.grow_body(more_bytes, is_small=is_small, deadline_s=deadline_s)
        finally:
            self.waits_for_memory = False
            waited_s = self._loop.time() - began_s
            request.waited_s += waited_s
            self.period_started_s += waited_s  # backpressure: reading was paused meanwhile

    def check_rate(self, now_s: float) -> None:
        """Raise RequestFault if the client uploads too slowly."""
        period_s, least = UPLOAD_PERIOD_S, UPLOAD_BYTES
        if self._memory.is_contended:
            period_s, least = CONTENDED_PERIOD_S, CONTENDED_BYTES
        if now_s - self.period_started_s < period_s:
            return
        received, self.period_bytes = self.period_bytes, 0
        self.period_started_s = now_s
        if received < least:
            message = f"upload too slow: received {received:,} bytes in {period_s:.0f} s, expected at least {least:,}"
            raise RequestFault("408 Request Timeout", message)

"""The standard health service, grpc.health.v1: Check, and Watch for the client-side health checks of gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from serving.errors import ModelNotFound, ServingError
from serving.grpc.receiving import MessageReceiver
from serving.memory import MemoryBudget, RequestMemory

HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

WATCH_INTERVAL_S = 0.2  # between two computations of the health that is reported to all watchers
MAX_WATCHES = 10_000  # each connection of a client has one

_States = health_pb2.HealthCheckResponse
_REQUEST_TIMEOUT_S = 5.0  # to receive the request of a watch


class HealthService:
    """Reports SERVING or NOT_SERVING for the server (an empty name) and each of its services.

    Args:
        services: their names; of any other one Check says NOT_FOUND and Watch SERVICE_UNKNOWN.
        is_serving: whether requests can be processed now.
        receiver: receives the requests of watches, within the `budget`.
    """

    def __init__(
        self,
        services: tuple[str, ...],
        is_serving: Callable[[], bool],
        receiver: MessageReceiver,
        budget: MemoryBudget,
    ) -> None:
        self._services = services
        self._is_serving = is_serving
        self._receiver = receiver
        self._budget = budget
        self._is_draining = self._is_ended = False
        self._watches = 0
        self._reported = int(_States.UNKNOWN)
        self._changed = asyncio.Event()  # set at a change, and replaced
        self._ticker = asyncio.get_running_loop().create_task(self._tick())

    def check(self, request: Any) -> Any:
        """Return the health of a service, or of the server."""
        if request.service not in self._services:
            known = ", ".join(filter(None, self._services))
            raise ModelNotFound(f"unknown service {request.service}; expected one of {known}")
        return _States(status=self._status())

    def make_watch_handler(self) -> grpc.RpcMethodHandler:
        """Return the handler of Watch: the health of a service now, and at every change until the server stops.

        It is a stream handler for the same reason as in `serving.grpc.handlers`. A watch lasts as long as its
        connection, so that it is not among the requests of the metrics.
        """
        return grpc.stream_stream_rpc_method_handler(self._watch)

    async def drain(self, leave_s: float) -> None:
        """Report NOT_SERVING from now on, and end the watches: the server waits for calls in progress.

        Clients that watch get `leave_s` to send their next calls elsewhere. gRPC cancels those that arrive while the
        server stops.
        """
        self._is_draining = True
        self._ticker.cancel()
        if self._watches:
            self._update()
            await asyncio.sleep(leave_s)
        self._is_ended = True
        self._notify()

    def _status(self) -> int:
        serves = not self._is_draining and self._is_serving()
        return int(_States.SERVING if serves else _States.NOT_SERVING)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _update(self) -> int:
        """Compute the status, and let all watches report it if it differs from what any of them has reported last."""
        status = self._status()
        if status != self._reported:
            self._reported = status
            self._notify()
        return status

    async def _tick(self) -> None:
        while True:
            self._update()
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def _watch(self, _: Any, call: Any) -> AsyncIterator[bytes]:
        if self._watches >= MAX_WATCHES:
            await call.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"there are {MAX_WATCHES:,} watches already")
        self._watches += 1
        try:
            is_known = await self._receive_service(call) in self._services
            last = None
            while True:
                status = self._update() if is_known else int(_States.SERVICE_UNKNOWN)
                changed = self._changed
                if status != last:
                    yield _States(status=status).SerializeToString()
                    last = status
                if self._is_ended:
                    return
                await changed.wait()
        finally:
            self._watches -= 1

    async def _receive_service(self, call: Any) -> str:
        """Receive the request of a watch, and return the name of its service."""
        memory = RequestMemory(self._budget)
        try:
            data = await self._receiver.receive(call, memory, deadline_s=time.monotonic() + _REQUEST_TIMEOUT_S)
            name: str = health_pb2.HealthCheckRequest.FromString(data).service
        except ServingError as error:
            failure = getattr(grpc.StatusCode, error.code), str(error)
        except DecodeError:
            failure = grpc.StatusCode.INTERNAL, "the message cannot be parsed as grpc.health.v1.HealthCheckRequest"
        else:
            return name
        finally:
            memory.release()
        await call.abort(*failure)
        raise AssertionError("abort raises")

"""The context of the current request, the same for every protocol: its limits, and what is reported about it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serving.errors import client_disconnected, deadline_exceeded

if TYPE_CHECKING:
    from serving.memory import RequestMemory


@dataclass(eq=False, slots=True)  # frozen dataclasses are slower to create
class RequestContext:
    """The context of one request."""

    # A `time.monotonic()` timestamp after which the response is useless; None: no deadline.
    deadline_s: float | None = None
    # Returns True once the client has closed its connection, so the request can be dropped.
    client_disconnected: Callable[[], bool] = lambda: False
    # The request's part of the memory budget; released by the protocol after the response. None: unlimited.
    memory: RequestMemory | None = None

    # What metrics, log and traces report about the request; filled in while it is processed.
    started_s: float = field(default_factory=time.perf_counter)
    request_id: str = ""  # until `RequestObserver.begin`: as the client sent it
    trace_id: str = ""  # 32 hexadecimal digits; empty without a trace
    caller: str = ""  # the name of the client's token; empty without a token
    client: str = ""  # its address, or the peer as gRPC names it
    protocol: str = "HTTP"  # or "gRPC"
    method: str = ""  # of HTTP
    status: str = ""  # the HTTP status, or the name of the gRPC code
    route: str = ""  # "/v1/models/<model>:predict", or the path of a gRPC method
    model: str = ""  # empty unless the request names a served model
    version: int | None = None
    rows: int = 0
    queue_s: float = 0.0  # in the batcher's queue, until its first model call or its end
    model_s: float = 0.0  # of the model calls with its rows; the parts of a long request may overlap
    shed_reason: str = ""  # `ServingError.shed_reason` of its error
    # Of traces, if they are on (serving/tracing/): the server's span, when the request was parsed and predicted, and
    # the metadata of the call of a remote server.
    span: Any = None
    parsed_s: float = 0.0
    predicted_s: float = 0.0
    remote_metadata: tuple[tuple[str, str], ...] = ()

    def shorten_deadline(self, timeout_s: float) -> None:
        """Bring the deadline forward to `timeout_s` after the request began, unless it is earlier already."""
        left_s = timeout_s - (time.perf_counter() - self.started_s)
        deadline_s = time.monotonic() + left_s
        self.deadline_s = deadline_s if self.deadline_s is None else min(self.deadline_s, deadline_s)

    def reserve(self, size_bytes: int) -> None:
        """Reserve memory for the next step; waits until it is free.

        Raises:
            TooLarge: the memory budget is too small for the request.
            Overloaded: no memory was free before the deadline.
        """
        if self.memory is not None:
            self.memory.grow(size_bytes, deadline_s=self.deadline_s)

    @contextlib.contextmanager
    def reserved(self, size_bytes: int) -> Iterator[None]:
        """Hold memory for the duration of a step. See `reserve` for exceptions."""
        self.reserve(size_bytes)
        try:
            yield
        finally:
            if self.memory is not None:
                self.memory.shrink(size_bytes)

    def check(self) -> None:
        """Check for a client disconnect and the deadline; called before each long step.

        Raises:
            ModelFailed: the client disconnected (CANCELLED), or the deadline has passed (DEADLINE_EXCEEDED).
        """
        if self.client_disconnected():
            raise client_disconnected()
        if self.deadline_s is not None and time.monotonic() >= self.deadline_s:
            raise deadline_exceeded()


UNROUTED = "unrouted"  # the route of requests that are refused before their path is looked at

current_request: ContextVar[RequestContext] = ContextVar("current_request", default=RequestContext())  # noqa: B039

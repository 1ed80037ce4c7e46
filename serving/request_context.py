"""What every protocol knows of the request being processed, for the code that works on it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serving.errors import client_disconnected, deadline_exceeded

if TYPE_CHECKING:
    from serving.memory import RequestMemory


@dataclass(eq=False, slots=True)  # not frozen, which takes longer to make
class RequestContext:
    """One request.

    Args:
        deadline_s: when the response is of no use any more, on the clock of `time.monotonic`; None: never.
        client_disconnected: true once the client has closed its connection, so the request can be dropped.
        memory: what it holds for parsing and decoding; released by the protocol when the response is sent. None:
            nobody counts.
    """

    deadline_s: float | None = None
    client_disconnected: Callable[[], bool] = lambda: False
    memory: RequestMemory | None = None

    def reserve(self, size_bytes: int) -> None:
        """Reserve memory for the next step; waits until there is some.

        Raises:
            TooLarge: the service could never have so much for one request.
            Overloaded: it was not there before the deadline.
        """
        if self.memory is not None:
            self.memory.grow(size_bytes, deadline_s=self.deadline_s)

    @contextlib.contextmanager
    def reserved(self, size_bytes: int) -> Iterator[None]:
        """Hold memory for the duration of a step. Raises what `reserve` does."""
        self.reserve(size_bytes)
        try:
            yield
        finally:
            if self.memory is not None:
                self.memory.shrink(size_bytes)

    def check(self) -> None:
        """Raise an error if nobody waits for the response any more; called before each long step.

        Raises:
            ModelFailed: the client disconnected (CANCELLED), or the deadline has passed (DEADLINE_EXCEEDED).
        """
        if self.client_disconnected():
            raise client_disconnected()
        if self.deadline_s is not None and time.monotonic() >= self.deadline_s:
            raise deadline_exceeded()


current_request: ContextVar[RequestContext] = ContextVar("current_request", default=RequestContext())  # noqa: B039

"""`RequestObserver`: reports every request, of HTTP and gRPC, when it begins and when it has ended."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from random import getrandbits
from typing import Any

from serving.metrics import Metrics
from serving.request_context import RequestContext

# An ID of a client is used if it can be put into a log line and a header as it is.
_is_valid_id = re.compile(r"[!-~]{1,128}").fullmatch


Headers = Mapping[str, Any] | Iterable[tuple[str, str | bytes]]


class RequestObserver:
    """Records each request in the metrics and, if there is one, in the log.

    The HTTP and the gRPC entry point call it once for each request.

    Args:
        metrics: the metrics.
        log: writes a request's line; callable(context, seconds).
    """

    def __init__(self, metrics: Metrics, *, log: Callable[[RequestContext, float], None] | None = None) -> None:
        self._in_flight = metrics.requests.in_flight
        observe = metrics.requests.observe
        self._reports = (observe,) if log is None else (observe, log)

    def begin(self, context: RequestContext, headers: Headers = ()) -> None:  # noqa: ARG002 - for traces
        """Report a request that is going to be processed, and give it an ID unless the client has sent a valid one.

        `headers` are those of the request: a WSGI environ, or gRPC metadata.
        """
        if not (context.request_id and _is_valid_id(context.request_id)):
            context.request_id = f"{getrandbits(64):016x}"
        self._in_flight.inc()

    def end(self, context: RequestContext) -> None:
        """Report a request that has its response; `context` says which."""
        self._in_flight.dec()
        seconds = time.perf_counter() - context.started_s
        context.status = context.status or "500"  # an error of a hook that has no response
        for report in self._reports:
            report(context, seconds)

    def report(self, context: RequestContext) -> None:
        """Report a request that was refused before it was processed."""
        self.begin(context)
        self.end(context)

    def close(self) -> None:
        """Finish reporting, before the process ends."""

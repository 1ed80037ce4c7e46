"""`RequestObserver`: reports every request, of HTTP and gRPC, when it begins and when it has ended."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from serving.metrics import TFS_STATUS, Metrics
from serving.request_context import RequestContext

# The routes that TensorFlow Serving counts, and its names for their APIs.
_TFS_PREDICT = {"/v1/models/<model>:predict": "REST", "/tensorflow.serving.PredictionService/Predict": "GRPC"}


Headers = Mapping[str, Any] | Iterable[tuple[str, str | bytes]]


class RequestObserver:
    """Records each request in the metrics. The HTTP and the gRPC entry point call it once for each request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def begin(self, context: RequestContext, headers: Headers = ()) -> None:  # noqa: ARG002 - for traces
        """Report a request that is going to be processed, and give it an ID unless the client has.

        `headers` are those of the request: a WSGI environ, or gRPC metadata.
        """
        context.request_id = context.request_id or os.urandom(8).hex()
        self._metrics.in_flight.inc()

    def end(self, context: RequestContext) -> None:
        """Report a request that has its response; `context` says which."""
        metrics = self._metrics
        metrics.in_flight.dec()
        seconds = time.perf_counter() - context.started_s
        status = context.status or "500"  # an error of a hook that has no response
        metrics.observe_request(
            route=context.route, model=context.model, version=context.version, status=status, seconds=seconds
        )
        api = _TFS_PREDICT.get(context.route)
        if api and context.model:
            code = TFS_STATUS.get(int(status), "INTERNAL") if api == "REST" else status
            metrics.observe_tfs_predict(model=context.model, code=code, seconds=seconds, api=api)

    def close(self) -> None:
        """Finish reporting, before the process ends."""

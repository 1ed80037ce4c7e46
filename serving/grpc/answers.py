"""How a call over gRPC ends: with a reply, with the status of an error, or with that of a fault."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import grpc

from serving.errors import ServingError

logger = logging.getLogger(__name__)

MAX_DETAILS = 4_000  # gRPC sends them in a header, which has to stay small


class Outcome:
    """What became of a call: `code` is "OK", or the name of the status it is to end with."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self.code = "OK"
        self._details = ""
        self._context = context

    def fail(self, code: str, details: str) -> None:
        """Remember the status to end with."""
        self.code, self._details = code, details

    def abort_if_failed(self) -> None:
        """End the call, by gRPC's own exception, if it failed."""
        if self.code != "OK":
            self._context.abort(getattr(grpc.StatusCode, self.code), self._details[:MAX_DETAILS])


@contextlib.contextmanager
def answering(context: grpc.ServicerContext) -> Iterator[Outcome]:
    """Turn what the block raises into the call's outcome; nobody but the log sees a stack trace."""
    outcome = Outcome(context)
    try:
        yield outcome
    except ServingError as error:
        outcome.fail(error.code, str(error))
    except Exception:
        logger.exception("a gRPC call failed")
        outcome.fail("INTERNAL", "the service failed to answer; the reason is in its log")

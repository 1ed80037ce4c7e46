"""Concurrent requests share calls of the model, and a lone one pays nothing for it.

There is no thread of its own and no waiting for company: whoever asks while the model is free calls it at once, in
the thread that asks. Whoever asks while it is busy queues; when a call ends, the first in the queue is woken to call
the model for all that have come together meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from serving.errors import ModelFailed, ServingError
from serving.liveness import Liveness
from serving.predictor import Predictor, Signature, check_inputs, deadline_exceeded

_GroupKey = tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]


@dataclass(eq=False)
class _Request:
    """One request, or a part of a big one, on its way through the model."""

    key: _GroupKey  # requests with the same key can share a call
    inputs: Mapping[str, np.ndarray]
    rows: int
    deadline_s: float | None
    outputs: dict[str, np.ndarray] | None = None
    error: Exception | None = None
    to_call: list[_Request] | None = None  # set when it is this request's thread that is to call the model
    woken: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.woken.acquire()


class Batcher:
    """A predictor that gathers concurrent calls of another one into batches.

    Only signatures whose inputs and outputs all have a batch axis are gathered; an error is only for the request
    that caused it.

    Args:
        inner: the predictor.
        max_batch_rows: most rows in one call; larger requests are cut into several.
        max_queued_rows: most rows that wait; requests beyond are refused at once.
        concurrency: calls of the model at the same time.
        liveness: is told of every call, so that it can tell when one does not come back.
    """

    def __init__(
        self, inner: Predictor, *, max_batch_rows: int, max_queued_rows: int, concurrency: int, liveness: Liveness
    ) -> None:
        self._inner = inner
        self._liveness = liveness
        self.signatures: Mapping[str, Signature] = inner.signatures
        self._gathered = {name for name, signature in inner.signatures.items() if _has_batch_axis(signature)}
        self._max_batch_rows = max_batch_rows
        self._max_queued_rows = max_queued_rows
        self._concurrency = concurrency
        self._lock = threading.Lock()
        self._queue: deque[_Request] = deque()
        self._queued_rows = 0
        self._calls = 0

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """As `Predictor.predict`; a ModelFailed (503) where too many wait, (504) where the deadline passes."""
        if signature not in self._gathered:
            with self._liveness.call():
                return self._inner.predict(signature, inputs, deadline_s=deadline_s)
        check_inputs(self.signatures[signature], inputs)
        rows = len(next(iter(inputs.values())))
        if rows > self._max_batch_rows:
            return self._predict_parts(signature, inputs, rows, deadline_s)
        key = (signature, tuple((name, array.shape[1:]) for name, array in sorted(inputs.items())))
        request = _Request(key, inputs, rows, deadline_s)
        with self._lock:
            if self._calls < self._concurrency:
                self._calls += 1
                request.to_call = [request]
            elif self._queued_rows + rows > self._max_queued_rows:
                raise ModelFailed(
                    f"too many requests wait for the model: {self._queued_rows} rows of at most "
                    f"{self._max_queued_rows}; try again later",
                    code="UNAVAILABLE",
                )
            else:
                self._queue.append(request)
                self._queued_rows += rows
        if request.to_call is None:
            self._wait(request)
        if request.to_call is not None:
            self._call(request.to_call)
        if request.error is not None:
            raise request.error
        assert request.outputs is not None
        return request.outputs

    def _predict_parts(
        self, signature: str, inputs: Mapping[str, np.ndarray], rows: int, deadline_s: float | None
    ) -> dict[str, np.ndarray]:
        parts = [
            self.predict(
                signature,
                {name: array[start : start + self._max_batch_rows] for name, array in inputs.items()},
                deadline_s=deadline_s,
            )
            for start in range(0, rows, self._max_batch_rows)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _wait(self, request: _Request) -> None:
        """Wait until the request is answered, or is the one to call the model, or its time is up."""
        timeout_s = -1.0 if request.deadline_s is None else max(0.0, request.deadline_s - time.monotonic())
        if request.woken.acquire(timeout=timeout_s):
            return
        with self._lock:
            if request in self._queue:
                self._queue.remove(request)
                self._queued_rows -= request.rows
                raise deadline_exceeded()
        request.woken.acquire()  # it had just been taken from the queue

    def _call(self, requests: Sequence[_Request]) -> None:
        try:
            with self._liveness.call():
                self._answer(requests)
        finally:
            self._hand_over()
            for request in requests[1:]:
                request.woken.release()

    def _hand_over(self) -> None:
        """Wake the first that waits, to call the model for as many of those behind it as fit into one call."""
        with self._lock:
            chosen = self._take_batch()
            if not chosen:
                self._calls -= 1
        if chosen:
            chosen[0].to_call = chosen
            chosen[0].woken.release()

    def _take_batch(self) -> list[_Request]:
        chosen: list[_Request] = []
        rows = 0
        now_s = time.monotonic()
        while self._queue and rows + self._queue[0].rows <= self._max_batch_rows:
            request = self._queue[0]
            expired = request.deadline_s is not None and request.deadline_s <= now_s
            if chosen and not expired and request.key != chosen[0].key:
                break  # another signature or shape: the next call's
            self._queue.popleft()
            self._queued_rows -= request.rows
            if expired:
                request.error = deadline_exceeded()
                request.woken.release()
            else:
                chosen.append(request)
                rows += request.rows
        return chosen

    def _answer(self, requests: Sequence[_Request]) -> None:
        """Set the outputs or the error of every request, with one call of the model if that goes well."""
        if len(requests) > 1:
            try:
                self._answer_together(requests)
            except Exception:  # whose fault it is shows when each is asked alone
                pass
            else:
                return
        for request in requests:
            try:
                request.outputs = self._inner.predict(request.key[0], request.inputs, deadline_s=request.deadline_s)
            except Exception as error:
                request.error = error

    def _answer_together(self, requests: Sequence[_Request]) -> None:
        joined = {name: np.concatenate([request.inputs[name] for request in requests]) for name in requests[0].inputs}
        outputs = self._inner.predict(requests[0].key[0], joined)
        rows = sum(request.rows for request in requests)
        if any(array.ndim == 0 or len(array) != rows for array in outputs.values()):
            raise ServingError("the model does not answer row by row")
        start = 0
        for request in requests:
            end = start + request.rows
            request.outputs = {name: array[start:end] for name, array in outputs.items()}
            start = end


def _has_batch_axis(signature: Signature) -> bool:
    return bool(signature.inputs) and all(
        spec.is_batched for spec in (*signature.inputs.values(), *signature.outputs.values())
    )

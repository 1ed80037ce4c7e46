"""Concurrent requests share calls of the model, and a lone one is not kept waiting for company.

Requests queue up. Where no call of the model runs, one begins at once, with all that have come by then; when it ends,
the next begins with all that have come meanwhile. Batches are not padded: from 8 rows on a row costs the same whatever
their number (0.18 to 0.20 ms for the article's network, with 8 to 64), so what is padded is paid for.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np

from serving.errors import ModelFailed, ServingError
from serving.liveness import Liveness
from serving.predictor import Predictor, Signature, check_inputs, deadline_exceeded
from serving.waiting import Pause, call_soon, caller_is_gone, end_pauses, offload

# Fewer are worth a call only if no more are being read.
FEW_ROWS = 8

# Calls of a model that needs less for a few rows are not made side by side, unless whole batches wait: the core that
# the second would take has requests to read and answers to write meanwhile.
LONG_CALL_S = 0.01

# A call that takes less, for someone who asks alone, is made by whoever asks, even in the event loop's thread: to hand
# it to another thread and its answer back takes a fifth of a millisecond. How long it will take is known from the last
# call with rows of its shape; should it not come back at all, no more does /healthz.
SHORT_CALL_S = 0.001

# Nobody else is heard meanwhile, so one call in so many is left to another thread. Who comes during it is company, and
# all calls are left to other threads until as many in a row have had none.
LISTEN_EVERY = 16

MAX_SHAPES = 64  # whose calls' times are kept

_GroupKey = tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]


@dataclass(eq=False, slots=True)
class _Request:
    """One request, or a part of a big one, on its way through the model."""

    key: _GroupKey  # requests with the same key can share a call
    inputs: Mapping[str, np.ndarray]
    rows: int
    deadline_s: float | None
    is_abandoned: Callable[[], bool]
    pause: Pause = field(default_factory=Pause)
    outputs: dict[str, np.ndarray] | None = None
    error: Exception | None = None


class Batcher:
    """A predictor that gathers concurrent calls of another one into batches.

    Only signatures whose inputs and outputs all have a batch axis are gathered; an error is only for the request
    that caused it.

    Args:
        inner: the predictor.
        threads: where it is called.
        max_batch_rows: most rows in one call; larger requests are cut into several.
        max_queued_rows: most rows that wait; requests beyond are refused at once.
        concurrency: calls of the model at the same time.
        liveness: is told of every call, so that it can tell when one does not come back.
    """

    def __init__(
        self,
        inner: Predictor,
        threads: Executor,
        *,
        max_batch_rows: int,
        max_queued_rows: int,
        concurrency: int,
        liveness: Liveness,
    ) -> None:
        self._inner = inner
        self._threads = threads
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
        self._few_rows_s = 0.0
        self._row_s: dict[_GroupKey, float] = {}  # of the last call
        self._is_kick_due = False
        self._calls_alone = 0  # since someone came while one was due or ran; that sets it below 0

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """As `Predictor.predict`; a ModelFailed (503) where too many wait, (504) where the deadline passes."""
        if signature not in self._gathered:
            return offload(self._predict_alone, signature, inputs, deadline_s)
        check_inputs(self.signatures[signature], inputs)
        requests = self._cut(signature, inputs, deadline_s)
        self._enqueue(requests)
        for request in requests:
            self._wait(request)
        for request in requests:
            if request.error is not None:
                raise request.error
        parts = [request.outputs for request in requests if request.outputs is not None]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _predict_alone(
        self, signature: str, inputs: Mapping[str, np.ndarray], deadline_s: float | None
    ) -> dict[str, np.ndarray]:
        with self._liveness.call():
            return self._inner.predict(signature, inputs, deadline_s=deadline_s)

    def _cut(self, signature: str, inputs: Mapping[str, np.ndarray], deadline_s: float | None) -> list[_Request]:
        """Make requests of at most `max_batch_rows` rows each."""
        rows = len(next(iter(inputs.values())))
        key = (signature, tuple((name, array.shape[1:]) for name, array in sorted(inputs.items())))
        is_abandoned = caller_is_gone.get()
        if rows <= self._max_batch_rows:
            return [_Request(key, inputs, rows, deadline_s, is_abandoned)]
        requests = []
        for start in range(0, rows, self._max_batch_rows):
            part = {name: array[start : start + self._max_batch_rows] for name, array in inputs.items()}
            requests.append(_Request(key, part, min(self._max_batch_rows, rows - start), deadline_s, is_abandoned))
        return requests

    def _enqueue(self, requests: Sequence[_Request]) -> None:
        rows = sum(request.rows for request in requests)
        calls = 0
        with self._lock:
            if self._queued_rows and self._queued_rows + rows > self._max_queued_rows:
                raise ModelFailed(
                    f"too many requests wait for the model: {self._queued_rows} rows of at most "
                    f"{self._max_queued_rows}; try again later",
                    code="UNAVAILABLE",
                )
            if self._calls or self._queue:
                self._calls_alone = -LISTEN_EVERY
            for request in requests:
                self._queue.append(request)
                self._queued_rows += request.rows
                if self._wants_call():
                    self._calls += 1
                    calls += 1
            kick = self._calls == 0 and not self._is_kick_due
            self._is_kick_due |= kick
        for _ in range(calls):
            self._threads.submit(self._call_until_idle)
        if kick:
            call_soon(self._begin_small_call)

    def _begin_small_call(self) -> None:
        """Begin a call with few rows: no more are being read just now."""
        with self._lock:
            self._is_kick_due = False
            if not self._queue or self._calls:
                return
            self._calls += 1
            is_alone = self._calls_alone > 0 and self._calls_alone % LISTEN_EVERY > 0
            is_short = self._queued_rows * self._row_s.get(self._queue[0].key, math.inf) < SHORT_CALL_S
        if is_alone and is_short:
            if not self._call_once():
                return
            with self._lock:
                if not self._queue:
                    self._calls -= 1
                    return
        self._threads.submit(self._call_until_idle)

    def _wants_call(self) -> bool:
        """Whether to begin a call of the model, beside those that run."""
        if self._few_rows_s > LONG_CALL_S:
            return self._calls < self._concurrency
        if self._calls == 0:
            return self._queued_rows >= FEW_ROWS
        return self._queued_rows >= self._max_batch_rows and self._calls < self._concurrency

    def _wait(self, request: _Request) -> None:
        """Wait until the request is answered, or its time is up."""
        if request.pause.wait(None if request.deadline_s is None else request.deadline_s - time.monotonic()):
            return
        with self._lock:
            if request in self._queue:
                self._queue.remove(request)
                self._queued_rows -= request.rows
                request.error = deadline_exceeded()
                return
        request.pause.wait()  # it had just been taken from the queue

    def _call_until_idle(self) -> None:
        """Call the model with what waits, until nothing does."""
        while self._call_once():
            pass

    def _call_once(self) -> bool:
        """Call the model with what waits; returns False, and one call less runs, where nothing does."""
        requests = self._take_batch()
        if not requests:
            return False
        started_s = time.perf_counter()
        with self._liveness.call():
            self._answer(requests)
        call_s, rows = time.perf_counter() - started_s, sum(request.rows for request in requests)
        # Of a full batch only the part that a few rows would take: else many clients would make any model seem slow.
        self._few_rows_s = call_s * FEW_ROWS / max(FEW_ROWS, rows)
        if len(self._row_s) >= MAX_SHAPES:
            self._row_s.clear()
        self._row_s[requests[0].key] = call_s / rows
        end_pauses([request.pause for request in requests])
        return True

    def _take_batch(self) -> list[_Request]:
        """Take requests that fit into one call from the queue; none, and one call less runs, where it is empty."""
        chosen: list[_Request] = []
        refused: list[Pause] = []
        rows = 0
        now_s = time.monotonic()
        with self._lock:
            are_more_to_come = self._is_kick_due and self._queued_rows < FEW_ROWS
            while self._queue and not are_more_to_come and rows + self._queue[0].rows <= self._max_batch_rows:
                request = self._queue[0]
                if request.deadline_s is not None and request.deadline_s <= now_s:
                    request.error = deadline_exceeded()
                elif request.is_abandoned():
                    request.error = ModelFailed("whoever asked has gone", code="CANCELLED")
                elif chosen and request.key != chosen[0].key:
                    break  # another signature or shape: the next call's
                else:
                    chosen.append(request)
                    rows += request.rows
                if request.error is not None:
                    refused.append(request.pause)
                self._queue.popleft()
                self._queued_rows -= request.rows
            if chosen:
                self._calls_alone += 1
            else:
                self._calls -= 1
        end_pauses(refused)
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

"""Dynamic batching: concurrent requests share calls of the model, and a lone one does not wait for company.

Requests queue up. Where no call of the model runs, one begins at once, with all that have come by then; when it ends,
the next begins with all that have come meanwhile. Batches are not padded: from 8 rows on a row costs the same whatever
their number (0.18 to 0.20 ms for the article's network, with 8 to 64), so what is padded is paid for.

Each model has two lanes with calls of their own, so that long requests (many rows, large images) do not hold up short
ones. A request that cannot be finished before its deadline is refused at once (load shedding).
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from serving.errors import Overloaded, ServingError, client_disconnected, deadline_exceeded
from serving.greenlets import Waiter, call_soon, lower_priority, wake_all
from serving.inference.liveness import Liveness
from serving.inference.signatures import Predictor, Signature, count_rows
from serving.request_context import current_request

# Fewer are worth a call only if no more are being read.
FEW_ROWS = 8

# Calls of a model that needs less for a few rows are not made side by side, unless whole batches wait: the core that
# the second would take has requests to read and responses to write meanwhile.
LONG_CALL_S = 0.01

# An inline call: one that takes less, for a lone request, is made by the thread that brought it, even the event loop's:
# to hand it to another thread and its result back takes a fifth of a millisecond. How long it will take is known from
# the last call with rows of its shape; should it not come back at all, no more does /healthz.
SHORT_CALL_S = 0.001

# An inline call blocks the event loop, so every LISTEN_EVERY-th call runs in a worker thread. If a request arrives
# meanwhile, inlining stops until LISTEN_EVERY calls in a row were uncontended.
LISTEN_EVERY = 16

MAX_SHAPES = 64  # whose calls' times are kept

# Requests of more than FEW_ROWS rows that take longer, and those whose files take long to decode, use the long lane.
LONG_REQUEST_S = 0.05

# Estimates of waiting times are multiplied by this before they are compared with a deadline: a request that is finished
# too late has taken the place of one that could have been in time.
ESTIMATE_MARGIN = 1.25

_GroupKey = tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]


@dataclass(eq=False, slots=True)
class _Request:
    """One request, or a part of a long one, on its way through the model."""

    key: _GroupKey  # requests with the same key can share a call
    inputs: Mapping[str, np.ndarray]
    rows: int
    is_alone: bool  # shares its call with no other
    deadline_s: float | None
    is_abandoned: Callable[[], bool]
    waiter: Waiter = field(default_factory=Waiter)
    outputs: dict[str, np.ndarray] | None = None
    error: Exception | None = None


@dataclass(eq=False, slots=True)
class _Lane:
    """A queue with calls of its own."""

    max_calls: int
    threads: ThreadPoolExecutor
    queue: deque[_Request] = field(default_factory=deque)
    queued_rows: int = 0
    calls: int = 0  # that run
    pending_rows: int = 0  # of requests that were admitted and have no result yet
    # Decayed sums of the rows processed and the time that it took, of all calls together.
    done_rows: float = 0.0
    done_s: float = 0.0
    last_end_s: float = 0.0

    @property
    def row_s(self) -> float:
        """Time for a row, at the rate of late; 0 where it is not known."""
        return self.done_s / self.done_rows if self.done_rows else 0.0

    def note_call(self, rows: int, started_s: float, ended_s: float) -> None:
        """Note a call that has ended. What ran beside another call is counted once."""
        self.done_rows = 0.9 * self.done_rows + rows
        self.done_s = 0.9 * self.done_s + max(0.0, ended_s - max(started_s, self.last_end_s))
        self.last_end_s = max(self.last_end_s, ended_s)


class Batcher:
    """A predictor that gathers concurrent calls of another one into batches.

    Only signatures whose inputs and outputs all have a batch axis are gathered; an error is only for the request
    that caused it. Every batcher has threads of its own: a model that is slow holds up no other.

    Args:
        inner: the predictor.
        max_batch_rows: most rows in one call; larger requests are split into several.
        max_queued_rows: while so many rows wait, or more, requests are refused at once.
        concurrency: calls of the model at the same time, in each lane.
        liveness: is told of every call, so that it can tell when one does not come back.
        inspect: looks at the inputs of each request before it is queued: raises an error where they must not be
            processed, and returns whether they take long to decode.
        unbatched: signatures whose rows influence each other; their requests are neither gathered nor split.
    """

    def __init__(
        self,
        inner: Predictor,
        *,
        max_batch_rows: int,
        max_queued_rows: int,
        concurrency: int,
        liveness: Liveness,
        inspect: Callable[[Signature, Mapping[str, np.ndarray]], bool] = lambda *_: False,
        unbatched: Collection[str] = (),
    ) -> None:
        self._inner = inner
        self._liveness = liveness
        self.signatures: Mapping[str, Signature] = inner.signatures
        self._gathered = {name for name, signature in inner.signatures.items() if signature.is_batched} - {*unbatched}
        self._max_batch_rows = max_batch_rows
        self._max_queued_rows = max_queued_rows
        self._concurrency = concurrency
        self._inspect = inspect
        self._lock = threading.Lock()
        self._short = _Lane(concurrency, ThreadPoolExecutor(concurrency, thread_name_prefix="model"))
        slow_threads = ThreadPoolExecutor(concurrency, thread_name_prefix="model-long", initializer=lower_priority)
        self._long = _Lane(max(1, concurrency - 1), slow_threads)
        self._few_rows_s = 0.0
        self._row_s: dict[_GroupKey, float] = {}  # of the last call
        self._is_kick_due = False
        self._uncontended_calls = 0  # since a request came while a call was due or ran; that sets it below 0

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """See `Predictor.predict`. The inputs are valid: `InferenceService.predict` has checked them.

        Raises:
            Overloaded: too many requests wait, or it could not be finished before the deadline.
            ModelFailed: the deadline passed while it waited (DEADLINE_EXCEEDED), or the client disconnected.
        """
        described = self.signatures[signature]
        rows = count_rows(described, inputs)
        takes_long = self._inspect(described, inputs)
        key = (signature, tuple([(name, inputs[name].shape[1:]) for name in described.inputs]))
        is_alone = signature not in self._gathered
        if rows > self._max_batch_rows and not is_alone:
            return self._predict_in_parts(key, inputs, rows, deadline_s)
        takes_long = takes_long or (rows > FEW_ROWS and rows * self._row_s.get(key, 0.0) > LONG_REQUEST_S)
        lane = self._long if takes_long else self._short
        request = _Request(key, inputs, rows, is_alone, deadline_s, current_request.get().client_disconnected)
        self._admit(lane, rows, deadline_s)
        try:
            self._enqueue(lane, request)
            return self._wait(lane, request)
        finally:
            self._leave(lane, rows)

    def _predict_in_parts(
        self, key: _GroupKey, inputs: Mapping[str, np.ndarray], rows: int, deadline_s: float | None
    ) -> dict[str, np.ndarray]:
        """Process a request of more rows than one call takes."""
        self._admit(self._long, rows, deadline_s)
        try:
            outputs = list(self._run(self._long, self._split(key, inputs, rows, deadline_s)))
        finally:
            self._leave(self._long, rows)
        return {name: np.concatenate([part[name] for part in outputs]) for name in outputs[0]}

    def _split(
        self, key: _GroupKey, inputs: Mapping[str, np.ndarray], rows: int, deadline_s: float | None
    ) -> Iterator[_Request]:
        """Make requests of at most `max_batch_rows` rows each."""
        is_abandoned = current_request.get().client_disconnected
        step = self._max_batch_rows
        for start in range(0, rows, step):
            part = {name: array[start : start + step] for name, array in inputs.items()}
            yield _Request(key, part, min(step, rows - start), False, deadline_s, is_abandoned)

    def _run(self, lane: _Lane, parts: Iterator[_Request]) -> Iterator[dict[str, np.ndarray]]:
        """Yield the outputs of each part.

        Only as many parts as can run at once are in the queue, so that long requests take turns; and after a part that
        failed no more are made.
        """
        waiting: deque[_Request] = deque()
        for part in parts:
            if len(waiting) >= lane.max_calls:
                yield self._finish(lane, waiting)
            waiting.append(part)
            self._enqueue(lane, part)
        while waiting:
            yield self._finish(lane, waiting)

    def _finish(self, lane: _Lane, waiting: deque[_Request]) -> dict[str, np.ndarray]:
        """Wait for the first of these requests, and return its outputs; drops the others if it failed."""
        try:
            return self._wait(lane, waiting.popleft())
        except Exception:
            for other in waiting:
                if not self._withdraw(lane, other):
                    other.waiter.wait()  # it has just been taken from the queue
            raise

    def _admit(self, lane: _Lane, rows: int, deadline_s: float | None) -> None:
        """Refuse a request if the queue is full or its deadline cannot be met.

        How many rows the request itself has does not matter, so a large one is not refused where a small one is taken.
        """
        with self._lock:
            if lane.queued_rows >= self._max_queued_rows:
                raise Overloaded(
                    f"too many requests wait for the model: {lane.queued_rows} rows, and no more are taken from "
                    f"{self._max_queued_rows} on; try again later",
                    retry_after_s=max(1, round(lane.queued_rows * lane.row_s)),
                )
            estimate_rows = lane.pending_rows + rows
            if estimate_rows > self._max_batch_rows:  # its batch may fill up behind it
                estimate_rows = math.ceil(estimate_rows / self._max_batch_rows) * self._max_batch_rows
            estimate_s = ESTIMATE_MARGIN * estimate_rows * lane.row_s
            late_s = 0.0 if deadline_s is None else estimate_s - (deadline_s - time.monotonic())
            if lane.pending_rows and late_s > 0:
                raise Overloaded(
                    f"{lane.pending_rows} rows wait for the model, so this request would take about "
                    f"{estimate_s:.1f} s, {late_s:.1f} s more than it may; try again later",
                    retry_after_s=max(1, math.ceil(late_s)),
                )
            lane.pending_rows += rows

    def _leave(self, lane: _Lane, rows: int) -> None:
        """Take note that an admitted request has its result."""
        with self._lock:
            lane.pending_rows -= rows

    def _enqueue(self, lane: _Lane, request: _Request) -> None:
        with self._lock:
            if lane.calls or lane.queue:
                self._uncontended_calls = -LISTEN_EVERY
            lane.queue.append(request)
            lane.queued_rows += request.rows
            is_call_due = self._wants_call(lane)
            lane.calls += is_call_due
            kick = lane is self._short and lane.calls == 0 and not self._is_kick_due
            self._is_kick_due |= kick
        if is_call_due:
            lane.threads.submit(self._call_until_idle, lane)
        if kick:
            call_soon(self._begin_small_call)

    def _begin_small_call(self) -> None:
        """Begin a call with few rows: no more are being read just now."""
        lane = self._short
        with self._lock:
            self._is_kick_due = False
            if not lane.queue or lane.calls:
                return
            lane.calls += 1
            is_uncontended = self._uncontended_calls > 0 and self._uncontended_calls % LISTEN_EVERY > 0
            is_short = lane.queued_rows * self._row_s.get(lane.queue[0].key, math.inf) < SHORT_CALL_S
        if is_uncontended and is_short:
            if not self._call_once(lane):
                return
            with self._lock:
                if not lane.queue:
                    lane.calls -= 1
                    return
        lane.threads.submit(self._call_until_idle, lane)

    def _wants_call(self, lane: _Lane) -> bool:
        """Whether to begin a call of the model, beside those that run."""
        if lane is self._long or self._few_rows_s > LONG_CALL_S:
            return lane.calls < lane.max_calls
        if lane.calls == 0:
            return lane.queued_rows >= FEW_ROWS
        return lane.queued_rows >= self._max_batch_rows and lane.calls < lane.max_calls

    def _wait(self, lane: _Lane, request: _Request) -> dict[str, np.ndarray]:
        """Wait until a request is processed, or its deadline has passed; returns its outputs, or raises its error."""
        timeout_s = None if request.deadline_s is None else request.deadline_s - time.monotonic()
        if not request.waiter.wait(timeout_s):
            if self._withdraw(lane, request):
                raise deadline_exceeded()
            request.waiter.wait()  # it has just been taken from the queue
        if request.error is not None:
            raise request.error
        assert request.outputs is not None
        return request.outputs

    def _withdraw(self, lane: _Lane, request: _Request) -> bool:
        """Take a request from the queue; returns whether it was still there."""
        with self._lock:
            if request not in lane.queue:
                return False
            lane.queue.remove(request)
            lane.queued_rows -= request.rows
            return True

    def _call_until_idle(self, lane: _Lane) -> None:
        """Call the model with what waits, until nothing does."""
        while self._call_once(lane):
            pass

    def _call_once(self, lane: _Lane) -> bool:
        """Call the model with what waits; returns False, and one call less runs, where nothing does."""
        requests = self._take_batch(lane)
        if not requests:
            return False
        started_s = time.perf_counter()
        with self._liveness.call():
            self._process(requests)
        call_s, rows = time.perf_counter() - started_s, sum(request.rows for request in requests)
        row_s = call_s / rows
        with self._lock:
            lane.note_call(rows, started_s, started_s + call_s)
        if lane is self._short:
            # Of a full batch only the part that a few rows would take: many clients do not make a model slow.
            self._few_rows_s = call_s * FEW_ROWS / max(FEW_ROWS, rows)
        if len(self._row_s) >= MAX_SHAPES:
            self._row_s.clear()
        self._row_s[requests[0].key] = row_s
        wake_all([request.waiter for request in requests])
        return True

    def _take_batch(self, lane: _Lane) -> list[_Request]:
        """Take requests that fit into one call from the queue; none, and one call less runs, where it is empty."""
        chosen: list[_Request] = []
        refused: list[Waiter] = []
        rows = 0
        now_s = time.monotonic()
        with self._lock:
            are_more_to_come = lane is self._short and self._is_kick_due and lane.queued_rows < FEW_ROWS
            while lane.queue and not are_more_to_come:
                request = lane.queue[0]
                if request.deadline_s is not None and request.deadline_s <= now_s:
                    request.error = deadline_exceeded()
                elif request.is_abandoned():
                    request.error = client_disconnected()
                elif chosen and (
                    request.is_alone or request.key != chosen[0].key or rows + request.rows > self._max_batch_rows
                ):
                    break  # the next call's
                else:
                    chosen.append(request)
                    rows += request.rows
                if request.error is not None:
                    refused.append(request.waiter)
                lane.queue.popleft()
                lane.queued_rows -= request.rows
                if chosen and (chosen[0].is_alone or lane is self._long):
                    break
            if chosen:
                self._uncontended_calls += 1
            else:
                lane.calls -= 1
        wake_all(refused)
        return chosen

    def _process(self, requests: Sequence[_Request]) -> None:
        """Set the outputs or the error of every request, with one call of the model if that goes well."""
        if len(requests) > 1:
            try:
                self._process_together(requests)
            except Exception:  # which of them is at fault shows when each is processed alone
                pass
            else:
                return
        for request in requests:
            try:
                request.outputs = self._inner.predict(request.key[0], request.inputs, deadline_s=request.deadline_s)
            except Exception as error:
                request.error = error

    def _process_together(self, requests: Sequence[_Request]) -> None:
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

"""Dynamic batching: concurrent requests share model calls; a single request does not wait for others.

Requests are queued. If no model call is running, a call starts at once with all queued requests. When it ends, the next
call starts with all requests that arrived meanwhile. Batches are not padded: from a batch size of 8, the time per row
is constant (0.18 to 0.20 ms for the article's network, with 8 to 64 rows), so padding rows would take as long.

Each model has a short and a long lane, so that long requests (many rows, large images) do not delay short ones. A
request that cannot meet its deadline is refused at once (load shedding).
"""

from __future__ import annotations

import contextlib
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
from serving.request_context import RequestContext, current_request

# A call with fewer rows starts only when the event loop has no more requests to read.
FEW_ROWS = 8

# If a call with FEW_ROWS rows is faster, calls do not run concurrently unless a full batch is queued: the event loop
# needs the second core to read requests and write responses.
LONG_CALL_S = 0.01

# Fast path: a faster call for a single request runs inline in the requesting thread, even in the event loop, because
# a worker thread costs 0.2 ms. The estimate is the time of the last call with the same signature and shape. If an
# inline call hangs, /healthz hangs too.
SHORT_CALL_S = 0.001

# An inline call blocks the event loop, so every LISTEN_EVERY-th call runs in a worker thread. If a request arrives
# meanwhile, inlining stops until LISTEN_EVERY calls in a row were uncontended.
LISTEN_EVERY = 16

MAX_SHAPES = 64  # for which the time of the last call is stored

# Longer requests of more than FEW_ROWS rows, and those with images that decode slowly, use the long lane.
LONG_REQUEST_S = 0.05

# Safety factor of the estimated waiting time: a request that misses its deadline wastes the time of others.
ESTIMATE_MARGIN = 1.25

_GroupKey = tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]


@dataclass(eq=False, slots=True)
class _Request:
    """A queued request, or a part of a long one."""

    key: _GroupKey  # requests with the same key can share a call
    inputs: Mapping[str, np.ndarray]
    rows: int
    is_unbatched: bool  # does not share a call with other requests
    deadline_s: float | None
    context: RequestContext
    waiter: Waiter = field(default_factory=Waiter)
    queued_s: float = field(default_factory=time.perf_counter)
    outputs: dict[str, np.ndarray] | None = None
    error: Exception | None = None


@dataclass(eq=False, slots=True)
class _Load:
    """The requests of one key in a lane: the rows that are pending, and how long a row takes."""

    pending_rows: int = 0  # of admitted requests without a result, in one part
    split_rows: list[int] = field(default_factory=list)  # of each admitted request that is processed in parts
    # Exponentially decayed sums over the calls, for the throughput.
    done_rows: float = 0.0
    done_s: float = 0.0

    def estimate_s(self, rows: float) -> float:
        """Return the time that these rows take, by recent calls; 0 if there was none."""
        return rows * self.done_s / self.done_rows if self.done_rows else 0.0

    def rows_before(self, own_rows: float) -> float:
        """Return the rows that are processed before a request with `own_rows` ends: parts of requests alternate."""
        if not self.split_rows:
            return self.pending_rows
        return self.pending_rows + sum(min(rows, own_rows) for rows in self.split_rows)


@dataclass(eq=False, slots=True)
class _Lane:
    """A queue with its own worker threads."""

    max_calls: int
    threads: ThreadPoolExecutor
    queue: deque[_Request] = field(default_factory=deque)
    queued_rows: int = 0
    calls: int = 0  # running model calls
    # By key: a row of raw pixels takes a hundredth of the time of a photo that has to be decoded.
    loads: dict[_GroupKey, _Load] = field(default_factory=dict)
    last_end_s: float = 0.0  # of a model call

    def load(self, key: _GroupKey) -> _Load:
        """Return the load of a key. If there are too many, those without pending rows are forgotten."""
        load = self.loads.get(key)
        if load is None:
            if len(self.loads) >= MAX_SHAPES:
                self.loads = {other: each for other, each in self.loads.items() if each.pending_rows or each.split_rows}
            load = self.loads[key] = _Load()
        return load

    def estimate_s(self, own_rows: float = math.inf) -> float:
        """Return the time that the pending requests take, or as much of it as passes before a request of `own_rows`."""
        return sum(load.estimate_s(load.rows_before(own_rows)) for load in self.loads.values())

    def record_call(self, key: _GroupKey, rows: int, started_s: float, ended_s: float) -> None:
        """Record the time of a call. Time that overlaps with another call counts once."""
        load = self.load(key)
        load.done_rows = 0.9 * load.done_rows + rows
        load.done_s = 0.9 * load.done_s + max(0.0, ended_s - max(started_s, self.last_end_s))
        self.last_end_s = max(self.last_end_s, ended_s)


class Batcher:
    """Predictor that batches concurrent calls of another predictor. Thread-safe.

    Only signatures whose inputs and outputs all have a batch axis are batched. If a batch fails, its requests run one
    by one, so that only the faulty one fails. Every batcher has its own threads: a slow model does not delay others.

    Args:
        inner: the predictor.
        max_batch_rows: maximum batch size; larger requests are split.
        max_queued_rows: requests are refused while the queue has this many rows or more (load shedding).
        concurrency: maximum number of concurrent model calls in each lane.
        liveness: watches every model call.
        inspect: checks the inputs of a request before it is queued; raises an error for invalid inputs, and returns
            True if they decode slowly.
        unbatched: signatures whose rows influence each other; their requests are neither batched nor split.
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
        self._batched = {name for name, signature in inner.signatures.items() if signature.is_batched} - {*unbatched}
        self._max_batch_rows = max_batch_rows
        self._max_queued_rows = max_queued_rows
        self._concurrency = concurrency
        self._inspect = inspect
        self._lock = threading.Lock()
        self._short = _Lane(concurrency, ThreadPoolExecutor(concurrency, thread_name_prefix="model"))
        slow_threads = ThreadPoolExecutor(concurrency, thread_name_prefix="model-long", initializer=lower_priority)
        self._long = _Lane(max(1, concurrency - 1), slow_threads)
        self._few_rows_s = 0.0
        self._row_s: dict[_GroupKey, float] = {}  # time per row of the last call
        self._is_start_scheduled = False
        self._uncontended_calls = 0  # set to -LISTEN_EVERY when a request arrives during a call

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """See `Predictor.predict`. `InferenceService.predict` has already validated the inputs.

        Raises:
            Overloaded: the queue is full, or the deadline cannot be met (load shedding).
            ModelFailed: the deadline passed while the request was queued, or the client disconnected.
        """
        described = self.signatures[signature]
        rows = count_rows(described, inputs)
        is_long = self._inspect(described, inputs)
        key = (signature, tuple([(name, inputs[name].shape[1:]) for name in described.inputs]))
        if self._is_split(key, rows):
            return self._predict_in_parts(key, inputs, rows, deadline_s)
        is_long = is_long or (rows > FEW_ROWS and rows * self._row_s.get(key, 0.0) > LONG_REQUEST_S)
        lane = self._long if is_long else self._short
        is_unbatched = signature not in self._batched
        request = _Request(key, inputs, rows, is_unbatched, deadline_s, current_request.get())
        self._admit(lane, key, rows, deadline_s)
        try:
            self._enqueue(lane, request)
            return self._wait(lane, request)
        finally:
            self._release(lane, key, rows)

    def queued(self) -> tuple[int, int]:
        """Return how many requests, or parts of long ones, and how many rows are queued."""
        with self._lock:
            return len(self._short.queue) + len(self._long.queue), self._short.queued_rows + self._long.queued_rows

    def shared_rows(self, signature: str) -> int:
        """Return the most rows in a call that several requests share; 1 if a signature's requests share none."""
        return self._max_batch_rows if signature in self._batched else 1

    def _is_split(self, key: _GroupKey, rows: int) -> bool:
        return rows > self._max_batch_rows and key[0] in self._batched

    def _predict_in_parts(
        self, key: _GroupKey, inputs: Mapping[str, np.ndarray], rows: int, deadline_s: float | None
    ) -> dict[str, np.ndarray]:
        self._admit(self._long, key, rows, deadline_s)
        try:
            outputs = list(self._run_parts(self._long, self._split(key, inputs, rows, deadline_s)))
        finally:
            self._release(self._long, key, rows)
        return {name: np.concatenate([part[name] for part in outputs]) for name in outputs[0]}

    def _split(
        self, key: _GroupKey, inputs: Mapping[str, np.ndarray], rows: int, deadline_s: float | None
    ) -> Iterator[_Request]:
        """Make requests of at most `max_batch_rows` rows each."""
        context = current_request.get()
        step = self._max_batch_rows
        for start in range(0, rows, step):
            part = {name: array[start : start + step] for name, array in inputs.items()}
            yield _Request(key, part, min(step, rows - start), False, deadline_s, context)

    def _run_parts(self, lane: _Lane, parts: Iterator[_Request]) -> Iterator[dict[str, np.ndarray]]:
        """Yield the outputs of each part, until one fails. Only `max_calls` are queued, so long requests alternate."""
        waiting: deque[_Request] = deque()
        for part in parts:
            if len(waiting) >= lane.max_calls:
                yield self._wait_for_first(lane, waiting)
            waiting.append(part)
            self._enqueue(lane, part)
        while waiting:
            yield self._wait_for_first(lane, waiting)

    def _wait_for_first(self, lane: _Lane, waiting: deque[_Request]) -> dict[str, np.ndarray]:
        """Wait for the first of these requests and return its outputs; if it fails, withdraw the others."""
        try:
            return self._wait(lane, waiting.popleft())
        except Exception:
            for other in waiting:
                if not self._withdraw(lane, other):
                    other.waiter.wait()  # it is already being processed
            raise

    def _admit(self, lane: _Lane, key: _GroupKey, rows: int, deadline_s: float | None) -> None:
        """Load shedding: refuse a request if the queue is full or its deadline cannot be met.

        The queue limit ignores the rows of the request itself, so large requests are not refused before small ones.
        """
        with self._lock:
            load = lane.load(key)
            if lane.queued_rows >= self._max_queued_rows:
                raise Overloaded(
                    f"the queue of the model is full: {lane.queued_rows} rows are queued, the limit is "
                    f"{self._max_queued_rows}; try again later",
                    shed_reason="queue_full",
                    retry_after_s=max(1, round(lane.estimate_s())),
                )
            estimate_s = ESTIMATE_MARGIN * self._estimate_s(lane, load, rows)
            late_s = 0.0 if deadline_s is None else estimate_s - (deadline_s - time.monotonic())
            if estimate_s and late_s > 0:
                pending_rows = sum(load.rows_before(math.inf) for load in lane.loads.values())
                raise Overloaded(
                    f"{pending_rows} rows are queued or running, so this request would take about "
                    f"{estimate_s:.1f} s and miss its deadline by {late_s:.1f} s; try again later",
                    shed_reason="deadline",
                    retry_after_s=max(1, math.ceil(late_s)),
                )
            if self._is_split(key, rows):
                load.split_rows.append(rows)
            else:
                load.pending_rows += rows

    def _estimate_s(self, lane: _Lane, load: _Load, rows: int) -> float:
        """Return the time until a request has its result; 0 if nothing is pending."""
        before = load.rows_before(rows)
        if not before:
            # Its own rows do not count: a wrong estimate can only be corrected by another call with its key.
            return lane.estimate_s(rows)
        total = before + rows
        if total > self._max_batch_rows:  # later requests may fill up its batch
            total = math.ceil(total / self._max_batch_rows) * self._max_batch_rows
        return lane.estimate_s(rows) + load.estimate_s(total - before)

    def _release(self, lane: _Lane, key: _GroupKey, rows: int) -> None:
        """Subtract the rows of an admitted request that has its result."""
        with self._lock:
            load = lane.loads[key]
            if self._is_split(key, rows):
                load.split_rows.remove(rows)
            else:
                load.pending_rows -= rows

    def _enqueue(self, lane: _Lane, request: _Request) -> None:
        with self._lock:
            if lane.calls or lane.queue:
                self._uncontended_calls = -LISTEN_EVERY
            lane.queue.append(request)
            lane.queued_rows += request.rows
            starts_call = self._should_start_call(lane)
            lane.calls += starts_call
            schedules_start = lane is self._short and lane.calls == 0 and not self._is_start_scheduled
            self._is_start_scheduled |= schedules_start
        if starts_call:
            lane.threads.submit(self._call_until_idle, lane)
        if schedules_start:
            call_soon(self._start_small_call)

    def _start_small_call(self) -> None:
        """Start a call with few rows, now that the event loop has read all requests."""
        lane = self._short
        with self._lock:
            self._is_start_scheduled = False
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

    def _should_start_call(self, lane: _Lane) -> bool:
        if lane is self._long or self._few_rows_s > LONG_CALL_S:
            return lane.calls < lane.max_calls
        if lane.calls == 0:
            return lane.queued_rows >= FEW_ROWS
        return lane.queued_rows >= self._max_batch_rows and lane.calls < lane.max_calls

    def _wait(self, lane: _Lane, request: _Request) -> dict[str, np.ndarray]:
        """Wait for a request until its deadline; returns its outputs or raises its error."""
        timeout_s = None if request.deadline_s is None else request.deadline_s - time.monotonic()
        if not request.waiter.wait(timeout_s):
            if self._withdraw(lane, request):
                request.context.queue_s = time.perf_counter() - request.queued_s
                raise deadline_exceeded()
            request.waiter.wait()  # it is already being processed
        if request.error is not None:
            raise request.error
        assert request.outputs is not None
        return request.outputs

    def _withdraw(self, lane: _Lane, request: _Request) -> bool:
        """Remove a request from the queue; returns False if it is no longer queued."""
        with self._lock:
            if request not in lane.queue:
                return False
            lane.queue.remove(request)
            lane.queued_rows -= request.rows
            return True

    def _call_until_idle(self, lane: _Lane) -> None:
        while self._call_once(lane):
            pass

    def _call_once(self, lane: _Lane) -> bool:
        """Call the model with the next batch. If the queue is empty, decrement `calls` and return False."""
        requests = self._take_batch(lane)
        if not requests:
            return False
        started_s = time.perf_counter()
        with self._liveness.call():
            self._process(requests)
        call_s, rows = time.perf_counter() - started_s, sum(request.rows for request in requests)
        row_s = call_s / rows
        for request in requests:
            context = request.context
            if not context.model_s:  # of its parts, the first
                context.queue_s = started_s - request.queued_s
            context.model_s += call_s
        with self._lock:
            lane.record_call(requests[0].key, rows, started_s, started_s + call_s)
        if lane is self._short:
            # Scaled down for a large batch: the model is not slower because it has many clients.
            self._few_rows_s = call_s * FEW_ROWS / max(FEW_ROWS, rows)
        if len(self._row_s) >= MAX_SHAPES:
            self._row_s.clear()
        self._row_s[requests[0].key] = row_s
        wake_all([request.waiter for request in requests])
        return True

    def _take_batch(self, lane: _Lane) -> list[_Request]:
        """Remove the next batch from the queue. If there is none, decrement `calls`."""
        chosen: list[_Request] = []
        refused: list[Waiter] = []
        rows = 0
        now_s = time.monotonic()
        with self._lock:
            is_reading = lane is self._short and self._is_start_scheduled and lane.queued_rows < FEW_ROWS
            while lane.queue and not is_reading:
                request = lane.queue[0]
                if request.deadline_s is not None and request.deadline_s <= now_s:
                    request.error = deadline_exceeded()
                elif request.context.client_disconnected():
                    request.error = client_disconnected()
                elif chosen and (
                    request.is_unbatched or request.key != chosen[0].key or rows + request.rows > self._max_batch_rows
                ):
                    break  # it starts the next batch
                else:
                    chosen.append(request)
                    rows += request.rows
                if request.error is not None:
                    request.context.queue_s = time.perf_counter() - request.queued_s
                    refused.append(request.waiter)
                lane.queue.popleft()
                lane.queued_rows -= request.rows
                if chosen and (chosen[0].is_unbatched or lane is self._long):
                    break
            if chosen:
                self._uncontended_calls += 1
            else:
                lane.calls -= 1
        wake_all(refused)
        return chosen

    def _process(self, requests: Sequence[_Request]) -> None:
        """Set the outputs or the error of every request. If the batch fails, its requests run one by one."""
        if len(requests) > 1:
            with contextlib.suppress(Exception):  # the individual calls raise the error of the faulty request
                self._process_batch(requests)
                return
        for request in requests:
            try:
                request.outputs = self._inner.predict(request.key[0], request.inputs, deadline_s=request.deadline_s)
            except Exception as error:
                request.error = error

    def _process_batch(self, requests: Sequence[_Request]) -> None:
        joined = {name: np.concatenate([request.inputs[name] for request in requests]) for name in requests[0].inputs}
        outputs = self._inner.predict(requests[0].key[0], joined)
        rows = sum(request.rows for request in requests)
        if any(array.ndim == 0 or len(array) != rows for array in outputs.values()):
            raise ServingError("the number of output rows differs from the number of input rows")
        start = 0
        for request in requests:
            end = start + request.rows
            request.outputs = {name: array[start:end] for name, array in outputs.items()}
            start = end

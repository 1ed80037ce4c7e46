from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from serving.errors import ModelFailed, Overloaded
from serving.inference.batcher import LISTEN_EVERY, MAX_SHAPES, Batcher
from serving.inference.liveness import Liveness
from serving.inference.signatures import Signature, TensorSpec
from serving.request_context import RequestContext, current_request


class Doubler:
    """Doubles floats; records the rows of each call, and blocks while `gate` is cleared."""

    def __init__(self, *, by_row: bool = True) -> None:
        number = TensorSpec("x", "DT_FLOAT", (None, None), "x:0")
        word = TensorSpec("x", "DT_FLOAT", (2,), "x:0")
        self.signatures: Mapping[str, Signature] = {
            "double": Signature("double", "predict", {"x": number}, {"y": number}),
            "negate": Signature("negate", "predict", {"x": number}, {"y": number}),
            "whole": Signature("whole", "predict", {"x": word}, {"y": word}),
        }
        self.calls: list[int] = []
        self.threads: list[int] = []  # thread of each call
        self.takes_s = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self._by_row = by_row

    def predict(self, signature: str, inputs: Mapping[str, np.ndarray], **_: Any) -> dict[str, np.ndarray]:
        x = inputs["x"]
        self.calls.append(len(x))
        self.threads.append(threading.get_ident())
        time.sleep(self.takes_s)
        assert self.gate.wait(60)
        if (x == 13).any():
            raise ModelFailed("13 is not to be doubled", code="ABORTED")
        y = -x if signature == "negate" else 2 * x
        return {"y": y if self._by_row else y[:1]}


def batch(model: Doubler, liveness: Liveness | None = None, **limits: int) -> Batcher:
    settings: dict[str, Any] = {"max_batch_rows": 8, "max_queued_rows": 100, "concurrency": 1, **limits}
    return Batcher(model, liveness=liveness or Liveness(), **settings)


def rows(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.array([[value] for value in values], np.float32)}


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)


def count_pending(lane: Any) -> int:
    return sum(load.pending_rows + sum(load.split_rows) for load in lane.loads.values())


def predict_together(batcher: Batcher, model: Doubler, requests: list[tuple[str, dict[str, np.ndarray]]]) -> list[Any]:
    """Block the model with one call, queue all requests behind it, and return their outputs or errors."""
    model.gate.clear()
    before = len(model.calls)

    def predict(signature: str, inputs: dict[str, np.ndarray]) -> Any:
        try:
            return batcher.predict(signature, inputs)["y"].ravel().tolist()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(requests) + 1) as pool:
        first = pool.submit(predict, "double", rows(0))
        wait_until(lambda: len(model.calls) > before)
        futures = []
        for queued, (signature, inputs) in enumerate(requests, start=1):
            futures.append(pool.submit(predict, signature, inputs))
            while not (len(batcher._short.queue) == queued or futures[-1].done()):
                time.sleep(0.001)
        model.gate.set()
        assert first.result() == [0]
        return [future.result() for future in futures]


def test_a_single_request_is_not_delayed_by_batching() -> None:
    model = Doubler()
    assert batch(model).predict("double", rows(1, 2))["y"].tolist() == [[2], [4]]
    assert model.calls == [2]


def test_short_calls_run_inline_after_the_first_measurement() -> None:
    model = Doubler()
    batcher = batch(model)
    for _ in range(20):
        assert batcher.predict("double", rows(1))["y"].tolist() == [[2]]
        wait_until(lambda: batcher._short.calls == 0)  # otherwise the worker thread may take the next request
    assert model.threads[0] != threading.get_ident()
    assert model.threads.count(threading.get_ident()) > 10
    # The time of a signature and shape does not apply to others.
    batcher.predict("negate", rows(1))
    assert model.threads[-1] != threading.get_ident()


def test_every_nth_uncontended_call_runs_in_a_worker_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.inference.batcher.SHORT_CALL_S", 60.0)  # any call is short
    model = Doubler()
    batcher = batch(model)

    def predict(times: int) -> list[int]:
        """Return the indices of the calls that run in a worker thread."""
        before = len(model.threads)
        for _ in range(times):
            batcher.predict("double", rows(1))
            wait_until(lambda: batcher._short.calls == 0)
        return [call for call, thread in enumerate(model.threads[before:]) if thread != threading.get_ident()]

    assert predict(2 * LISTEN_EVERY + 1) == [0, LISTEN_EVERY, 2 * LISTEN_EVERY]
    predict_together(batcher, model, [("double", rows(1))])
    wait_until(lambda: batcher._short.calls == 0)
    assert predict(LISTEN_EVERY + 2) == list(range(LISTEN_EVERY))


def test_long_calls_never_run_inline() -> None:
    model = Doubler()
    model.takes_s = 0.002
    batcher = batch(model)
    for _ in range(20):
        batcher.predict("double", rows(1))
    assert threading.get_ident() not in model.threads


def test_queued_requests_share_one_call() -> None:
    model = Doubler()
    futures = predict_together(batch(model), model, [("double", rows(1)), ("double", rows(2, 3)), ("double", rows(4))])
    assert futures == [[2], [4, 6], [8]]
    assert model.calls == [1, 4]


def test_a_call_has_at_most_max_batch_rows() -> None:
    model = Doubler()
    futures = predict_together(batch(model), model, [("double", rows(*[i] * 3)) for i in range(5)])
    assert futures == [[2 * i] * 3 for i in range(5)]
    assert model.calls == [1, 6, 6, 3]


def test_signatures_and_shapes_are_batched_separately() -> None:
    model = Doubler()
    wide = {"x": np.ones((1, 2), np.float32)}
    futures = predict_together(batch(model), model, [("double", rows(1)), ("negate", rows(2)), ("double", wide)])
    assert futures == [[2], [-2], [2, 2]]
    assert model.calls == [1, 1, 1, 1]


def test_a_faulty_request_does_not_fail_its_batch() -> None:
    model = Doubler()
    good, bad, other = predict_together(batch(model), model, [("double", rows(v)) for v in (1, 13, 3)])
    assert (good, other) == ([2], [6])
    assert isinstance(bad, ModelFailed)
    assert bad.status == 409


def test_requests_run_one_by_one_if_the_output_rows_differ_from_the_input_rows() -> None:
    model = Doubler(by_row=False)
    assert predict_together(batch(model), model, [("double", rows(1)), ("double", rows(2))]) == [[2], [4]]


def test_a_signature_without_a_batch_axis_is_not_batched() -> None:
    model = Doubler()
    assert batch(model).predict("whole", {"x": np.ones(2, np.float32)})["y"].tolist() == [2, 2]


def test_a_large_request_is_split_and_its_outputs_concatenated() -> None:
    model = Doubler()
    values = list(range(20))
    future = batch(model).predict("double", rows(*[v + 20 for v in values]))["y"].ravel().tolist()
    assert future == [2 * (v + 20) for v in values]
    assert model.calls == [8, 8, 4]


def test_requests_are_refused_while_the_queue_is_full() -> None:
    model = Doubler()
    futures = predict_together(batch(model, max_queued_rows=3), model, [("double", rows(v)) for v in (1, 2, 3, 4)])
    assert futures[:3] == [[2], [4], [6]]
    assert isinstance(futures[3], Overloaded)
    assert (futures[3].code, futures[3].status) == ("UNAVAILABLE", 503)


@pytest.mark.parametrize("signature", ["double", "negate"])
def test_a_request_with_more_rows_than_the_queue_limit_is_accepted(signature: str) -> None:
    """The request may be split (double) or not (negate: its rows influence each other)."""
    model = Doubler()
    batcher = Batcher(
        model,
        max_batch_rows=8,
        max_queued_rows=3,
        concurrency=1,
        liveness=Liveness(),
        unbatched=["negate"],
    )
    values = [20 + value for value in range(50)]
    lane = batcher._short if signature == "negate" else batcher._long
    model.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        small = [pool.submit(batcher.predict, signature, rows(*values[:9]))]
        wait_until(lambda: bool(model.calls))
        small.append(pool.submit(batcher.predict, signature, rows(*values[:2])))
        wait_until(lambda: count_pending(lane) + batcher._short.queued_rows >= 9)
        large = pool.submit(batcher.predict, signature, rows(*values))
        wait_until(lambda: count_pending(lane) >= 59 or large.done())
        model.gate.set()
        factor = 2 if signature == "double" else -1
        assert large.result()["y"].ravel().tolist() == [factor * value for value in values]
        assert [len(future.result()["y"]) for future in small] == [9, 2]


def test_a_request_leaves_the_queue_at_its_deadline() -> None:
    model = Doubler()
    batcher = batch(model)
    model.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batcher.predict, "double", rows(1))
        wait_until(lambda: bool(model.calls))
        with pytest.raises(ModelFailed, match="deadline") as late:
            batcher.predict("double", rows(2), deadline_s=time.monotonic() + 0.05)
        assert late.value.status == 504
        model.gate.set()
        assert first.result()["y"].tolist() == [[2]]
    assert model.calls == [1]
    assert batcher.predict("double", rows(5))["y"].tolist() == [[10]]


def test_full_batches_run_concurrently() -> None:
    model = Doubler()
    batcher = batch(model, concurrency=2)
    model.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(batcher.predict, "double", rows(*[v] * 8)) for v in (1, 2)]
        wait_until(lambda: len(model.calls) == 2)
        model.gate.set()
        assert [future.result()["y"].tolist() for future in futures] == [[[2]] * 8, [[4]] * 8]


def test_long_calls_run_concurrently_with_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.inference.batcher.LONG_CALL_S", 0.0)  # any call is long
    model = Doubler()
    batcher = batch(model, concurrency=2)
    batcher.predict("double", rows(1))
    model.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        futures = []
        for calls, value in enumerate((1, 2), start=2):
            futures.append(pool.submit(batcher.predict, "double", rows(value)))
            while len(model.calls) != calls:
                time.sleep(0.001)
        model.gate.set()
        assert [future.result()["y"].tolist() for future in futures] == [[[2]], [[4]]]


def test_a_request_is_dropped_after_a_client_disconnect() -> None:
    model = Doubler()
    batcher = batch(model)
    model.gate.clear()

    def predict_disconnected() -> None:
        current_request.set(RequestContext(client_disconnected=lambda: True))
        batcher.predict("double", rows(2))

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batcher.predict, "double", rows(1))
        wait_until(lambda: bool(model.calls))
        disconnected = pool.submit(predict_disconnected)
        wait_until(lambda: bool(batcher._short.queue))
        model.gate.set()
        assert first.result()["y"].tolist() == [[2]]
        with pytest.raises(ModelFailed, match="client disconnected"):
            disconnected.result()
    assert model.calls == [1]


def test_every_request_gets_its_own_outputs_under_load() -> None:
    model = Doubler()
    batcher = batch(model, max_queued_rows=10_000)

    def predict(seed: int) -> bool:
        values = np.random.default_rng(seed).integers(100, 1_000_000, (seed % 11 + 1, 1)).astype(np.float32)
        return bool((batcher.predict("double", {"x": values})["y"] == 2 * values).all())

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(predict, range(3_000)))
    assert not batcher._short.queue
    assert batcher._short.queued_rows == batcher._short.calls == batcher._long.calls == 0
    assert max(model.calls) <= 8


def test_liveness_reports_a_hanging_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, liveness = Doubler(), Liveness()
    batcher = batch(model, liveness=liveness)
    model.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(batcher.predict, "double", rows(1))
        wait_until(lambda: bool(model.calls))
        assert liveness.problem is None
        monkeypatch.setattr("serving.inference.liveness.STALLED_S", 0.0)
        assert "has not returned" in str(liveness.problem)
        model.gate.set()
        future.result()
    assert liveness.problem is None


def test_liveness_reports_an_exited_thread() -> None:
    liveness = Liveness()
    thread = threading.Thread(target=lambda: None, name="poller")
    thread.start()
    liveness.watch_thread(thread)
    thread.join()
    assert liveness.problem == "the thread poller has exited"


# Long requests


class Hold:
    """Blocks a model's calls, and releases them one by one."""

    def __init__(self, model: Doubler) -> None:
        self.model = model
        self._calls = threading.Semaphore(0)
        self.seen: list[float] = []  # the first value of each call, in order of their start
        self._predict = model.predict
        model.predict = self._hold  # type: ignore[method-assign]

    def _hold(self, signature: str, inputs: Mapping[str, np.ndarray], **rest: Any) -> dict[str, np.ndarray]:
        self.seen.append(float(inputs["x"].ravel()[0]))
        assert self._calls.acquire(timeout=60)
        return self._predict(signature, inputs, **rest)

    def release(self, calls: int = 1) -> None:
        self._calls.release(calls)

    def wait_for(self, calls: int) -> None:
        wait_until(lambda: len(self.seen) >= calls)


def many(value: float, count: int) -> dict[str, np.ndarray]:
    return {"x": np.full((count, 1), value, np.float32)}


def test_a_long_request_does_not_delay_short_ones() -> None:
    model = Doubler()
    batcher = batch(model)
    slow = threading.Event()
    predict = model.predict

    def block_long_calls(signature: str, inputs: Mapping[str, np.ndarray], **rest: Any) -> dict[str, np.ndarray]:
        if (inputs["x"] == 50).all():
            assert slow.wait(60)
        return predict(signature, inputs, **rest)

    model.predict = block_long_calls  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(batcher.predict, "double", many(50, 64))
        wait_until(lambda: batcher._long.calls == 1)
        for value in range(5):
            assert batcher.predict("double", rows(value))["y"].tolist() == [[2 * value]]
        assert not long.done()
        slow.set()
        assert (long.result()["y"] == 100).all()


def test_long_requests_alternate() -> None:
    model = Doubler()
    batcher = batch(model)
    hold = Hold(model)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batcher.predict, "double", many(1, 32))
        hold.wait_for(1)
        second = pool.submit(batcher.predict, "double", many(2, 32))
        wait_until(lambda: len(batcher._long.queue) == 1)
        for calls in range(2, 9):
            hold.release()
            hold.wait_for(calls)
            # The request of the finished part queues its next part, or is done.
            wait_until(lambda: len(batcher._long.queue) == 1 or first.done())
        hold.release()
        assert (first.result()["y"] == 2).all()
        assert (second.result()["y"] == 4).all()
    assert hold.seen == [1, 2, 1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_parts_after_a_failed_part_are_not_run(concurrency: int) -> None:
    model = Doubler()
    batcher = batch(model, concurrency=concurrency)
    inputs = rows(*range(100, 500))
    inputs["x"][9] = 13  # in the second part of fifty
    with pytest.raises(ModelFailed, match="13 is not to be doubled"):
        batcher.predict("double", inputs)
    # Calls that were already running finish.
    assert len(model.calls) <= 2 + batcher._long.max_calls
    assert not batcher._long.queue
    wait_until(lambda: batcher._long.calls == 0)
    assert batcher._long.queued_rows == 0


def test_outputs_of_parts_keep_their_order() -> None:
    model = Doubler()
    batcher = batch(model, concurrency=4, max_queued_rows=10)
    values = np.arange(1_000, dtype=np.float32)[:, None] + 20
    assert (batcher.predict("double", {"x": values})["y"] == 2 * values).all()
    assert max(model.calls) == 8


def test_a_request_that_cannot_meet_its_deadline_is_refused_at_once() -> None:
    model = Doubler()
    model.takes_s = 0.05
    batcher = batch(model, max_batch_rows=1)
    batcher.predict("double", rows(1))  # measures the time per row
    model.takes_s = 0.0
    model.gate.clear()
    with ThreadPoolExecutor(70) as pool:
        waiting = [pool.submit(batcher.predict, "double", rows(0)) for _ in range(61)]
        wait_until(lambda: batcher._short.queued_rows == 60)  # about three seconds
        started_s = time.monotonic()
        with pytest.raises(
            Overloaded, match="61 rows are queued or running, so this request would take about"
        ) as error:
            batcher.predict("double", rows(2), deadline_s=started_s + 1)
        assert time.monotonic() - started_s < 0.5
        assert error.value.retry_after_s is not None
        assert 1 <= error.value.retry_after_s <= 30
        patient = pool.submit(batcher.predict, "double", rows(3), deadline_s=started_s + 60)
        wait_until(lambda: batcher._short.queued_rows == 61)
        model.gate.set()
        assert patient.result()["y"].tolist() == [[6]]
        for future in waiting:
            future.result()


def key(signature: str, inputs: Mapping[str, np.ndarray]) -> Any:
    return signature, (("x", inputs["x"].shape[1:]),)


def set_row_s(lane: Any, signature: str, row_s: float) -> None:
    """Make the batcher believe that a row takes this long."""
    load = lane.load(key(signature, rows(1)))
    load.done_rows, load.done_s = 1.0, row_s


def test_an_empty_queue_accepts_any_deadline() -> None:
    # A wrong estimate can only be corrected by another call.
    model = Doubler()
    batcher = batch(model)
    set_row_s(batcher._short, "double", 1_000)
    future = batcher.predict("double", rows(1), deadline_s=time.monotonic() + 5)
    assert future["y"].tolist() == [[2]]
    assert batcher._short.load(key("double", rows(1))).estimate_s(1) < 1_000


def test_a_wrong_estimate_is_corrected_while_requests_of_another_kind_are_pending() -> None:
    model = Doubler()
    batcher = batch(model)
    set_row_s(batcher._short, "negate", 1_000)
    model.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(batcher.predict, "double", rows(1))
        wait_until(lambda: bool(model.calls))
        wrong = pool.submit(batcher.predict, "negate", rows(1), deadline_s=time.monotonic() + 60)
        wait_until(lambda: batcher._short.queued_rows == 1 or wrong.done())
        model.gate.set()
        assert wrong.result()["y"].tolist() == [[-1]]
        assert other.result()["y"].tolist() == [[2]]
    assert batcher._short.load(key("negate", rows(1))).estimate_s(1) < 1_000


def test_fast_rows_beside_slow_ones_do_not_count_as_slow() -> None:
    """Requests with many rows of raw pixels beside photos must not shed the requests queued behind them."""
    model = Doubler()
    batcher = batch(model, max_batch_rows=64, max_queued_rows=10_000)
    set_row_s(batcher._long, "double", 0.0002)  # pixels
    set_row_s(batcher._long, "negate", 0.02)  # photos
    model.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        pixels = [pool.submit(batcher.predict, "double", many(1, 8_000)) for _ in range(2)]
        wait_until(lambda: count_pending(batcher._long) == 16_000)  # 3.2 s, and 320 s at the rate of photos
        photos = pool.submit(batcher.predict, "negate", many(2, 1_000), deadline_s=time.monotonic() + 30)
        wait_until(lambda: count_pending(batcher._long) == 17_000 or photos.done())
        with pytest.raises(Overloaded, match="17000 rows are queued or running, so this request would take about 51"):
            batcher.predict("negate", many(3, 1_000), deadline_s=time.monotonic() + 30)
        model.gate.set()
        assert (photos.result()["y"] == -2).all()
        assert all((future.result()["y"] == 2).all() for future in pixels)


def test_a_short_request_waits_for_a_part_of_a_long_one_only() -> None:
    model = Doubler()
    batcher = batch(model, max_batch_rows=64, max_queued_rows=10_000)
    set_row_s(batcher._long, "double", 0.01)
    model.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(batcher.predict, "double", many(1, 8_000))  # 80 s
        wait_until(lambda: bool(model.calls))
        short = pool.submit(batcher.predict, "double", many(2, 100), deadline_s=time.monotonic() + 30)
        wait_until(lambda: count_pending(batcher._long) == 8_100 or short.done())
        with pytest.raises(Overloaded, match="8100 rows are queued or running"):
            batcher.predict("double", many(3, 4_000), deadline_s=time.monotonic() + 30)
        model.gate.set()
        assert (short.result()["y"] == 4).all()
        assert (long.result()["y"] == 2).all()


def test_loads_of_many_shapes_are_bounded() -> None:
    batcher = batch(Doubler())
    for width in range(1, 200):
        batcher.predict("double", {"x": np.ones((1, width), np.float32)})
    assert len(batcher._short.loads) <= MAX_SHAPES


def test_a_long_request_that_cannot_meet_its_deadline_behind_others_is_refused() -> None:
    model = Doubler()
    model.takes_s = 0.02
    batcher = batch(model, max_queued_rows=10_000)
    batcher.predict("double", many(1, 64))
    model.takes_s = 0.0
    model.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(batcher.predict, "double", many(value, 1_000)) for value in range(1, 4)]
        wait_until(lambda: len(batcher._long.queue) == 2)
        # 3,000 rows of 2.5 ms are queued, so a request of one second cannot meet a deadline of two seconds.
        late = pool.submit(batcher.predict, "double", many(9, 400), deadline_s=time.monotonic() + 2)
        try:
            wait_until(lambda: late.done() or len(batcher._long.queue) == 3)
            assert late.done()
            assert isinstance(late.exception(), Overloaded)
        finally:
            model.gate.set()
            for future in waiting:
                future.result()


def batch_slowly(model: Doubler, *, unbatched: Sequence[str] = (), **limits: int) -> Batcher:
    """Batch; requests that contain the number 7 count as slow to decode."""
    settings: dict[str, Any] = {"max_batch_rows": 8, "max_queued_rows": 100, "concurrency": 1, **limits}
    return Batcher(
        model,
        liveness=Liveness(),
        inspect=lambda _, inputs: bool((inputs["x"] == 7).any()),
        unbatched=unbatched,
        **settings,
    )


def test_slowly_decoded_requests_use_the_long_lane() -> None:
    model = Doubler()
    batcher = batch_slowly(model)
    hold = Hold(model)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(batcher.predict, "double", rows(7))
        hold.wait_for(1)
        assert (batcher._long.calls, batcher._short.calls) == (1, 0)
        quick = pool.submit(batcher.predict, "double", rows(1))
        hold.wait_for(2)
        assert hold.seen == [7, 1]
        assert (batcher._long.calls, batcher._short.calls) == (1, 1)
        hold.release(2)
        assert slow.result()["y"].tolist() == [[14]]
        assert quick.result()["y"].tolist() == [[2]]


def test_requests_in_the_long_lane_are_not_batched() -> None:
    model = Doubler()
    batcher = batch_slowly(model)
    model.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(batcher.predict, "double", rows(7)) for _ in range(3)]
        wait_until(lambda: len(batcher._long.queue) == 2)
        model.gate.set()
        assert [future.result()["y"].tolist() for future in futures] == [[[14]]] * 3
    assert model.calls == [1, 1, 1]


def test_a_signature_whose_rows_influence_each_other_is_neither_batched_nor_split() -> None:
    model = Doubler()
    batcher = batch_slowly(model, unbatched=["double"])
    futures = predict_together(batcher, model, [("double", rows(1)), ("double", rows(2, 3)), ("negate", rows(4))])
    assert futures == [[2], [4, 6], [-4]]
    assert model.calls == [1, 1, 2, 1]
    assert (batcher.predict("double", many(3, 20))["y"] == 6).all()
    assert model.calls[4:] == [20]
    # The model's other signatures are batched and split.
    assert (batcher.predict("negate", many(3, 20))["y"] == -3).all()
    assert model.calls[5:] == [8, 8, 4]


def test_every_batcher_has_its_own_threads() -> None:
    slow_model, model = Doubler(), Doubler()
    slow_batcher, batcher = batch(slow_model, concurrency=2), batch(model, concurrency=2)
    slow_model.gate.clear()
    word = {"x": np.ones(2, np.float32)}
    with ThreadPoolExecutor(20) as pool:
        held = [pool.submit(slow_batcher.predict, "whole", word) for _ in range(20)]
        wait_until(lambda: bool(slow_model.calls))
        # All threads of the slow model are busy; the other model has its own.
        assert batcher.predict("whole", word)["y"].tolist() == [2, 2]
        assert batcher.predict("double", many(1, 20))["y"].shape == (20, 1)
        assert not any(future.done() for future in held)
        slow_model.gate.set()
        assert [future.result()["y"].tolist() for future in held] == [[2, 2]] * 20
    assert set(slow_model.threads).isdisjoint({threading.get_ident()})


def test_long_calls_without_a_batch_axis_run_concurrently() -> None:
    model = Doubler()
    batcher = batch(model, concurrency=2)
    word = {"x": np.ones(2, np.float32)}
    model.takes_s = 0.02
    batcher.predict("whole", word)
    model.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(batcher.predict, "whole", word) for _ in range(3)]
        wait_until(lambda: len(model.calls) == 3)
        time.sleep(0.02)
        assert len(model.calls) == 3  # two beside the first call, and no more
        model.gate.set()
        assert [future.result()["y"].tolist() for future in futures] == [[2, 2]] * 3


def test_the_threads_of_an_unused_batcher_exit() -> None:
    model = Doubler()
    batcher = batch(model, concurrency=2)
    batcher.predict("double", many(1, 64))
    batcher.predict("double", rows(1))
    threads = [
        thread
        for thread in threading.enumerate()
        if thread in {*batcher._short.threads._threads, *batcher._long.threads._threads}
    ]
    assert threads
    gone = weakref.ref(batcher)
    del batcher
    gc.collect()
    assert gone() is None
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()

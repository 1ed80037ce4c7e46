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

from serving.errors import InvalidRequest, ModelFailed, Overloaded, TooLarge
from serving.inference.batcher import LISTEN_EVERY, Batcher
from serving.inference.liveness import Liveness
from serving.inference.signatures import Signature, TensorSpec
from serving.request_context import RequestContext, current_request


class Doubler:
    """Doubles floats, row by row; notes the rows of each call, and stays in a call while `gate` is closed."""

    def __init__(self, *, by_row: bool = True) -> None:
        number = TensorSpec("x", "DT_FLOAT", (None, None), "x:0")
        word = TensorSpec("x", "DT_FLOAT", (2,), "x:0")
        self.signatures: Mapping[str, Signature] = {
            "double": Signature("double", "predict", {"x": number}, {"y": number}),
            "negate": Signature("negate", "predict", {"x": number}, {"y": number}),
            "whole": Signature("whole", "predict", {"x": word}, {"y": word}),
        }
        self.calls: list[int] = []
        self.threads: list[int] = []  # that the calls were made in
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
    settings: dict[str, Any] = {
        "max_batch_rows": 8,
        "max_queued_rows": 100,
        "max_request_rows": 1_000,
        "concurrency": 1,
        **limits,
    }
    return Batcher(model, liveness=liveness or Liveness(), **settings)


def rows(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.array([[value] for value in values], np.float32)}


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)


def together(batcher: Batcher, model: Doubler, requests: list[tuple[str, dict[str, np.ndarray]]]) -> list[Any]:
    """Hold the model with one call, let all the requests queue up behind it, and return their results or errors."""
    model.gate.clear()
    before = len(model.calls)

    def ask(signature: str, inputs: dict[str, np.ndarray]) -> Any:
        try:
            return batcher.predict(signature, inputs)["y"].ravel().tolist()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(requests) + 1) as pool:
        first = pool.submit(ask, "double", rows(0))
        wait_until(lambda: len(model.calls) > before)
        answers = []
        for queued, (signature, inputs) in enumerate(requests, start=1):
            answers.append(pool.submit(ask, signature, inputs))
            while not (len(batcher._short.queue) == queued or answers[-1].done()):
                time.sleep(0.001)
        model.gate.set()
        assert first.result() == [0]
        return [answer.result() for answer in answers]


def test_a_lone_request_does_not_wait_for_company() -> None:
    model = Doubler()
    assert batch(model).predict("double", rows(1, 2))["y"].tolist() == [[2], [4]]
    assert model.calls == [2]


def test_short_calls_are_made_by_whoever_asks_once_they_are_known_to_be_short() -> None:
    model = Doubler()
    batcher = batch(model)
    for _ in range(20):
        assert batcher.predict("double", rows(1))["y"].tolist() == [[2]]
        wait_until(lambda: batcher._short.calls == 0)  # else the next would come while the thread still looks for it
    assert model.threads[0] != threading.get_ident()
    assert model.threads.count(threading.get_ident()) > 10
    # What is known of a signature and a shape says nothing of others.
    batcher.predict("negate", rows(1))
    assert model.threads[-1] != threading.get_ident()


def test_who_asks_alone_is_heard_by_another_thread_now_and_then_and_company_always(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.inference.batcher.SHORT_CALL_S", 60.0)  # any call is short
    model = Doubler()
    batcher = batch(model)

    def ask(times: int) -> list[int]:
        """Return which of so many calls are not made by whoever asks."""
        before = len(model.threads)
        for _ in range(times):
            batcher.predict("double", rows(1))
            wait_until(lambda: batcher._short.calls == 0)
        return [call for call, thread in enumerate(model.threads[before:]) if thread != threading.get_ident()]

    assert ask(2 * LISTEN_EVERY + 1) == [0, LISTEN_EVERY, 2 * LISTEN_EVERY]
    together(batcher, model, [("double", rows(1))])
    wait_until(lambda: batcher._short.calls == 0)
    assert ask(LISTEN_EVERY + 2) == list(range(LISTEN_EVERY))


def test_longer_calls_never_keep_whoever_asks() -> None:
    model = Doubler()
    model.takes_s = 0.002
    batcher = batch(model)
    for _ in range(20):
        batcher.predict("double", rows(1))
    assert threading.get_ident() not in model.threads


def test_those_who_wait_share_one_call() -> None:
    model = Doubler()
    answers = together(batch(model), model, [("double", rows(1)), ("double", rows(2, 3)), ("double", rows(4))])
    assert answers == [[2], [4, 6], [8]]
    assert model.calls == [1, 4]


def test_a_call_has_at_most_so_many_rows() -> None:
    model = Doubler()
    answers = together(batch(model), model, [("double", rows(*[i] * 3)) for i in range(5)])
    assert answers == [[2 * i] * 3 for i in range(5)]
    assert model.calls == [1, 6, 6, 3]


def test_another_signature_or_shape_is_another_call() -> None:
    model = Doubler()
    wide = {"x": np.ones((1, 2), np.float32)}
    answers = together(batch(model), model, [("double", rows(1)), ("negate", rows(2)), ("double", wide)])
    assert answers == [[2], [-2], [2, 2]]
    assert model.calls == [1, 1, 1, 1]


def test_an_error_is_only_for_the_request_that_caused_it() -> None:
    model = Doubler()
    good, bad, other = together(batch(model), model, [("double", rows(v)) for v in (1, 13, 3)])
    assert (good, other) == ([2], [6])
    assert isinstance(bad, ModelFailed)
    assert bad.status == 409


def test_a_model_that_does_not_answer_row_by_row_is_asked_for_each_alone() -> None:
    model = Doubler(by_row=False)
    assert together(batch(model), model, [("double", rows(1)), ("double", rows(2))]) == [[2], [4]]


def test_what_does_not_fit_the_signature_never_joins_a_batch() -> None:
    model = Doubler()
    with pytest.raises(InvalidRequest):
        batch(model).predict("double", {"x": np.zeros((1, 1), np.int32)})
    with pytest.raises(InvalidRequest):
        batch(model).predict("double", {"x": np.zeros((0, 1), np.float32)})
    assert model.calls == []


def test_a_signature_without_a_batch_axis_is_called_as_it_is() -> None:
    model = Doubler()
    assert batch(model).predict("whole", {"x": np.ones(2, np.float32)})["y"].tolist() == [2, 2]


def test_a_big_request_is_cut_and_put_together_again() -> None:
    model = Doubler()
    values = list(range(20))
    answer = batch(model).predict("double", rows(*[v + 20 for v in values]))["y"].ravel().tolist()
    assert answer == [2 * (v + 20) for v in values]
    assert model.calls == [8, 8, 4]


def test_beyond_the_queue_requests_are_refused_at_once() -> None:
    model = Doubler()
    answers = together(batch(model, max_queued_rows=3), model, [("double", rows(v)) for v in (1, 2, 3, 4)])
    assert answers[:3] == [[2], [4], [6]]
    assert isinstance(answers[3], Overloaded)
    assert (answers[3].code, answers[3].status) == ("UNAVAILABLE", 503)


@pytest.mark.parametrize("signature", ["double", "negate"])
def test_a_request_with_more_rows_than_the_queue_holds_is_taken_while_others_wait(signature: str) -> None:
    """It may be split (double), or not, as its rows influence each other (negate)."""
    model = Doubler()
    batcher = Batcher(
        model,
        max_batch_rows=8,
        max_queued_rows=3,
        max_request_rows=1_000,
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
        wait_until(lambda: lane.pending_rows + batcher._short.queued_rows >= 9)
        large = pool.submit(batcher.predict, signature, rows(*values))
        wait_until(lambda: lane.pending_rows >= 59 or large.done())
        model.gate.set()
        factor = 2 if signature == "double" else -1
        assert large.result()["y"].ravel().tolist() == [factor * value for value in values]
        assert [len(future.result()["y"]) for future in small] == [9, 2]


def test_who_has_no_time_left_leaves_the_queue() -> None:
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


def test_full_batches_are_called_side_by_side() -> None:
    model = Doubler()
    batcher = batch(model, concurrency=2)
    model.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(batcher.predict, "double", rows(*[v] * 8)) for v in (1, 2)]
        wait_until(lambda: len(model.calls) == 2)
        model.gate.set()
        assert [answer.result()["y"].tolist() for answer in answers] == [[[2]] * 8, [[4]] * 8]


def test_long_calls_run_side_by_side_with_few_rows_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.inference.batcher.LONG_CALL_S", 0.0)  # any call is long
    model = Doubler()
    batcher = batch(model, concurrency=2)
    batcher.predict("double", rows(1))
    model.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        answers = []
        for calls, value in enumerate((1, 2), start=2):
            answers.append(pool.submit(batcher.predict, "double", rows(value)))
            while len(model.calls) != calls:
                time.sleep(0.001)
        model.gate.set()
        assert [answer.result()["y"].tolist() for answer in answers] == [[[2]], [[4]]]


def test_who_has_gone_is_not_predicted_for() -> None:
    model = Doubler()
    batcher = batch(model)
    model.gate.clear()

    def ask_and_go() -> None:
        current_request.set(RequestContext(client_disconnected=lambda: True))
        batcher.predict("double", rows(2))

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batcher.predict, "double", rows(1))
        wait_until(lambda: bool(model.calls))
        gone = pool.submit(ask_and_go)
        wait_until(lambda: bool(batcher._short.queue))
        model.gate.set()
        assert first.result()["y"].tolist() == [[2]]
        with pytest.raises(ModelFailed, match="client disconnected"):
            gone.result()
    assert model.calls == [1]


def test_nothing_is_mixed_up_or_lost_under_load() -> None:
    model = Doubler()
    batcher = batch(model, max_queued_rows=10_000)

    def ask(seed: int) -> bool:
        values = np.random.default_rng(seed).integers(100, 1_000_000, (seed % 11 + 1, 1)).astype(np.float32)
        return bool((batcher.predict("double", {"x": values})["y"] == 2 * values).all())

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(3_000)))
    assert not batcher._short.queue
    assert batcher._short.queued_rows == batcher._short.calls == batcher._long.calls == 0
    assert max(model.calls) <= 8


def test_a_call_that_does_not_come_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, liveness = Doubler(), Liveness()
    batcher = batch(model, liveness=liveness)
    model.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(batcher.predict, "double", rows(1))
        wait_until(lambda: bool(model.calls))
        assert liveness.problem is None
        monkeypatch.setattr("serving.inference.liveness.STALLED_S", 0.0)
        assert "has not come back" in str(liveness.problem)
        model.gate.set()
        answer.result()
    assert liveness.problem is None


def test_a_thread_that_must_not_end_is_missed() -> None:
    liveness = Liveness()
    thread = threading.Thread(target=lambda: None, name="follower")
    thread.start()
    liveness.require(thread)
    thread.join()
    assert liveness.problem == "the thread follower has ended"


# Long requests


class Hold:
    """Holds a model's calls, and lets them go on one by one."""

    def __init__(self, model: Doubler) -> None:
        self.model = model
        self._calls = threading.Semaphore(0)
        self.seen: list[float] = []  # the first value of each call, in order of their beginnings
        self._predict = model.predict
        model.predict = self._hold  # type: ignore[method-assign]

    def _hold(self, signature: str, inputs: Mapping[str, np.ndarray], **rest: Any) -> dict[str, np.ndarray]:
        self.seen.append(float(inputs["x"].ravel()[0]))
        assert self._calls.acquire(timeout=60)
        return self._predict(signature, inputs, **rest)

    def let_go(self, calls: int = 1) -> None:
        self._calls.release(calls)

    def wait_for(self, calls: int) -> None:
        wait_until(lambda: len(self.seen) >= calls)


def many(value: float, count: int) -> dict[str, np.ndarray]:
    return {"x": np.full((count, 1), value, np.float32)}


def test_a_long_request_does_not_hold_up_short_ones() -> None:
    model = Doubler()
    batcher = batch(model)
    slow = threading.Event()
    predict = model.predict

    def stay_in_long_calls(signature: str, inputs: Mapping[str, np.ndarray], **rest: Any) -> dict[str, np.ndarray]:
        if (inputs["x"] == 50).all():
            assert slow.wait(60)
        return predict(signature, inputs, **rest)

    model.predict = stay_in_long_calls  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(batcher.predict, "double", many(50, 64))
        wait_until(lambda: batcher._long.calls == 1)
        for value in range(5):
            assert batcher.predict("double", rows(value))["y"].tolist() == [[2 * value]]
        assert not long.done()
        slow.set()
        assert (long.result()["y"] == 100).all()


def test_long_requests_take_turns() -> None:
    model = Doubler()
    batcher = batch(model)
    hold = Hold(model)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batcher.predict, "double", many(1, 32))
        hold.wait_for(1)
        second = pool.submit(batcher.predict, "double", many(2, 32))
        wait_until(lambda: len(batcher._long.queue) == 1)
        for calls in range(2, 9):
            hold.let_go()
            hold.wait_for(calls)
            # Whose part it was comes back with the next part, or with its whole result.
            wait_until(lambda: len(batcher._long.queue) == 1 or first.done())
        hold.let_go()
        assert (first.result()["y"] == 2).all()
        assert (second.result()["y"] == 4).all()
    assert hold.seen == [1, 2, 1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_after_a_part_that_failed_no_more_are_run(concurrency: int) -> None:
    model = Doubler()
    batcher = batch(model, concurrency=concurrency)
    inputs = rows(*range(100, 500))
    inputs["x"][9] = 13  # in the second part of fifty
    with pytest.raises(ModelFailed, match="13 is not to be doubled"):
        batcher.predict("double", inputs)
    # Of several that run side by side, those that had begun end.
    assert len(model.calls) <= 2 + batcher._long.max_calls
    assert not batcher._long.queue
    wait_until(lambda: batcher._long.calls == 0)
    assert batcher._long.queued_rows == 0


def test_the_parts_of_a_long_request_come_back_in_their_order() -> None:
    model = Doubler()
    batcher = batch(model, concurrency=4, max_queued_rows=10)
    values = np.arange(1_000, dtype=np.float32)[:, None] + 20
    assert (batcher.predict("double", {"x": values})["y"] == 2 * values).all()
    assert max(model.calls) == 8


def test_more_rows_than_a_request_may_have_are_refused() -> None:
    model = Doubler()
    with pytest.raises(TooLarge, match="1,001 rows, and at most 1,000"):
        batch(model).predict("double", many(1, 1_001))
    assert model.calls == []


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    model = Doubler()
    model.takes_s = 0.05
    batcher = batch(model, max_batch_rows=1)
    batcher.predict("double", rows(1))  # from which it knows what a row takes
    model.takes_s = 0.0
    model.gate.clear()
    with ThreadPoolExecutor(70) as pool:
        waiting = [pool.submit(batcher.predict, "double", rows(0)) for _ in range(61)]
        wait_until(lambda: batcher._short.queued_rows == 60)  # about three seconds
        started_s = time.monotonic()
        with pytest.raises(Overloaded, match="61 rows wait for the model, so this request would take about") as error:
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


def test_a_deadline_is_no_reason_to_refuse_where_nobody_waits() -> None:
    # The estimate may be wrong, and would be for ever if nothing was let through.
    model = Doubler()
    batcher = batch(model)
    batcher._short.done_rows, batcher._short.done_s = 1.0, 1_000.0
    answer = batcher.predict("double", rows(1), deadline_s=time.monotonic() + 5)
    assert answer["y"].tolist() == [[2]]
    assert batcher._short.row_s < 1_000.0


def test_a_long_request_that_cannot_be_finished_behind_others_is_refused() -> None:
    model = Doubler()
    model.takes_s = 0.02
    batcher = batch(model, max_queued_rows=10_000)
    batcher.predict("double", many(1, 64))
    model.takes_s = 0.0
    model.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(batcher.predict, "double", many(value, 1_000)) for value in range(1, 4)]
        wait_until(lambda: len(batcher._long.queue) == 2)
        # 3,000 rows of 2.5 ms wait; one that takes a second itself cannot be finished within two.
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
    """Batch, with requests that hold the number 7 taking long to decode."""
    settings: dict[str, Any] = {
        "max_batch_rows": 8,
        "max_queued_rows": 100,
        "max_request_rows": 1_000,
        "concurrency": 1,
        **limits,
    }
    return Batcher(
        model,
        liveness=Liveness(),
        inspect=lambda _, inputs: bool((inputs["x"] == 7).any()),
        unbatched=unbatched,
        **settings,
    )


def test_slow_requests_use_the_other_lane() -> None:
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
        hold.let_go(2)
        assert slow.result()["y"].tolist() == [[14]]
        assert quick.result()["y"].tolist() == [[2]]


def test_requests_in_the_lane_for_long_ones_share_no_call() -> None:
    model = Doubler()
    batcher = batch_slowly(model)
    model.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(batcher.predict, "double", rows(7)) for _ in range(3)]
        wait_until(lambda: len(batcher._long.queue) == 2)
        model.gate.set()
        assert [answer.result()["y"].tolist() for answer in answers] == [[[14]]] * 3
    assert model.calls == [1, 1, 1]


def test_a_signature_whose_rows_influence_each_other_is_neither_gathered_nor_split() -> None:
    model = Doubler()
    batcher = batch_slowly(model, unbatched=["double"])
    answers = together(batcher, model, [("double", rows(1)), ("double", rows(2, 3)), ("negate", rows(4))])
    assert answers == [[2], [4, 6], [-4]]
    assert model.calls == [1, 1, 2, 1]
    assert (batcher.predict("double", many(3, 20))["y"] == 6).all()
    assert model.calls[4:] == [20]
    # The others of the model are.
    assert (batcher.predict("negate", many(3, 20))["y"] == -3).all()
    assert model.calls[5:] == [8, 8, 4]


def test_a_model_without_a_batch_axis_runs_in_its_batchers_threads() -> None:
    slow_model, model = Doubler(), Doubler()
    slow_batcher, batcher = batch(slow_model, concurrency=2), batch(model, concurrency=2)
    slow_model.gate.clear()
    word = {"x": np.ones(2, np.float32)}
    with ThreadPoolExecutor(20) as pool:
        held = [pool.submit(slow_batcher.predict, "whole", word) for _ in range(20)]
        wait_until(lambda: bool(slow_model.calls))
        # All calls of the slow model are taken; the other one has its own.
        assert batcher.predict("whole", word)["y"].tolist() == [2, 2]
        assert batcher.predict("double", many(1, 20))["y"].shape == (20, 1)
        assert not any(future.done() for future in held)
        slow_model.gate.set()
        assert [future.result()["y"].tolist() for future in held] == [[2, 2]] * 20
    assert set(slow_model.threads).isdisjoint({threading.get_ident()})


def test_calls_without_a_batch_axis_run_side_by_side_once_they_are_known_to_be_long() -> None:
    model = Doubler()
    batcher = batch(model, concurrency=2)
    word = {"x": np.ones(2, np.float32)}
    model.takes_s = 0.02
    batcher.predict("whole", word)
    model.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(batcher.predict, "whole", word) for _ in range(3)]
        wait_until(lambda: len(model.calls) == 3)
        time.sleep(0.02)
        assert len(model.calls) == 3  # two beside the first call, and no more
        model.gate.set()
        assert [answer.result()["y"].tolist() for answer in answers] == [[2, 2]] * 3


def test_the_threads_of_a_batcher_that_is_no_longer_used_end() -> None:
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

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from serving.batcher import LISTEN_EVERY, Batcher
from serving.errors import InvalidRequest, ModelFailed, Overloaded
from serving.liveness import Liveness
from serving.predictor import Signature, TensorSpec
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
    settings = {"max_batch_rows": 8, "max_queued_rows": 100, "max_request_rows": 1_000, "concurrency": 1, **limits}
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
            wait_until(lambda queued=queued: len(batcher._short.queue) == queued or answers[-1].done())
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
    monkeypatch.setattr("serving.batcher.SHORT_CALL_S", 60.0)  # any call is short
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
    monkeypatch.setattr("serving.batcher.LONG_CALL_S", 0.0)  # any call is long
    model = Doubler()
    batcher = batch(model, concurrency=2)
    batcher.predict("double", rows(1))
    model.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        answers = []
        for calls, value in enumerate((1, 2), start=2):
            answers.append(pool.submit(batcher.predict, "double", rows(value)))
            wait_until(lambda calls=calls: len(model.calls) == calls)
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
        monkeypatch.setattr("serving.liveness.STALLED_S", 0.0)
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

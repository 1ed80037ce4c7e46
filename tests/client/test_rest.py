"""`RestApi`: requests, retries and responses, without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from client.errors import ClientError, ConnectionFailed, RequestRejected, ServerBusy
from client.images import LoadedImage
from client.predictions import Failure, Prediction
from client.responses import Response
from client.rest import RestApi

IMAGES = [LoadedImage(index, None, f"<image {index}>".encode()) for index in range(4)]
ROW = {"label": "red", "class_id": 0, "confidence": 1.0, "probabilities": {"red": 1.0}}


def make_response(status: int, body: Any, retry_after: str | None = None) -> Response:
    return Response("http://service", status, "reason", "application/json", retry_after, json.dumps(body).encode())


def make_predictions(count: int) -> Response:
    return make_response(200, {"model": {"name": "m", "version": 1}, "predictions": [ROW] * count})


def find_images(content: bytes) -> list[int]:
    return [image.index for image in IMAGES if image.data in content]


def make_api(retries: int = 3) -> Any:  # RestApi, whose flows yield requests or the result
    return RestApi("http://service", model="m", version=2, timeout_s=60, retries=retries)


def test_requests_have_the_model_and_the_images() -> None:
    flow = make_api().predict(IMAGES)
    request = next(flow)
    assert (request.method, request.path, request.params) == ("POST", "/predict", {"model": "m", "version": "2"})
    assert request.headers["Content-Type"].startswith("multipart/form-data; boundary=")
    assert find_images(request.content) == [0, 1, 2, 3]
    assert request.delay_s == 0
    assert [prediction.label for prediction in flow.send(make_predictions(4))] == ["red"] * 4


def test_images_are_sent_again_without_the_unreadable_ones_and_in_halves() -> None:
    flow = make_api().predict(IMAGES)
    next(flow)
    request = flow.send(make_response(400, {"error": "1 bad", "errors": [{"index": 1, "error": "not an image"}]}))
    assert find_images(request.content) == [0, 2, 3]
    request = flow.send(make_response(413, {"error": "too large"}))
    assert find_images(request.content) == [0]
    request = flow.send(make_response(413, {"error": "image-0: too many pixels"}))
    assert find_images(request.content) == [2, 3]
    outcomes = flow.send(make_predictions(2))
    assert outcomes[:2] == [Failure(0, None, "too many pixels"), Failure(1, None, "not an image")]
    assert all(isinstance(outcome, Prediction) for outcome in outcomes[2:])


def test_limits_of_predictions_are_read() -> None:
    flow = make_api().predict(IMAGES[:2])
    next(flow)
    limits = {"typicality": 0.01, "is_typical": False, "label_set": ["red", "blue"]}
    body = {"model": {"name": "m", "version": 1}, "predictions": [{**ROW, **limits}, {**ROW, "typicality": "much"}]}
    limited, plain = flow.send(make_response(200, body))
    assert (limited.typicality, limited.is_typical, limited.label_set) == (0.01, False, ("red", "blue"))
    assert limited.describe_limits() == "unlike the training images; red or blue"
    assert (plain.typicality, plain.is_typical, plain.label_set) == (None, None, None)
    assert not plain.describe_limits()


def test_retries_are_delayed_and_keep_the_deadline() -> None:
    flow = make_api(retries=2).predict(IMAGES)
    first = next(flow)
    second = flow.send(ConnectionFailed("cannot connect"))
    third = flow.send(make_response(503, {"error": "loading"}, retry_after="3"))
    assert 0 < second.delay_s <= 0.25
    assert third.delay_s == 3
    assert first.deadline_s == second.deadline_s == third.deadline_s
    assert first.content == second.content == third.content
    with pytest.raises(ConnectionFailed, match=r"cannot connect \(tried 3 times\)"):
        flow.send(ConnectionFailed("cannot connect"))


def test_a_rate_limit_is_waited_for() -> None:
    flow = make_api(retries=1).predict(IMAGES)
    next(flow)
    assert flow.send(make_response(429, {"error": "more than 1 requests per second"}, retry_after="2")).delay_s == 2
    with pytest.raises(ServerBusy, match="limits requests: more than 1 requests per second"):
        flow.send(make_response(429, {"error": "more than 1 requests per second"}, retry_after="2"))


def test_status_without_a_token() -> None:
    for ready, status in ((True, 200), (False, 503)):
        flow = make_api().get_status()
        next(flow)
        service = flow.send(make_response(status, {"ready": ready}))
        assert (service.ready, service.models) == (ready, ())
        assert ready or "callers with a token" in service.reason


def test_status_is_requested_once() -> None:
    flow = make_api().get_status()
    assert next(flow).path == "/readyz"
    with pytest.raises(RequestRejected, match="denied access"):
        flow.send(make_response(401, {"error": "token required"}))
    flow = make_api().get_status()
    next(flow)
    with pytest.raises(ClientError, match=r"cannot connect$"):
        flow.send(ConnectionFailed("cannot connect"))

"""The service with a remote server that is unreachable, has a maximum batch size, or sends invalid responses."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from flask.testing import FlaskClient
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)
from werkzeug.test import TestResponse

from serving.api.flask_app import ServingApp
from serving.server_process import free_ports
from tests.serving.conftest import Server, picture
from tests.serving.inference.backend import Backend, leave, make_remote_app, predict, v2_request

PREDICT = "tensorflow.serving.PredictionService"
JSON = {"content_type": "application/json"}


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend()
    yield backend
    backend.stop()


@pytest.fixture
def app(backend: Backend) -> ServingApp:
    app = make_remote_app(backend.address)
    app.inference.repository.load()
    return app


@pytest.mark.parametrize("limit", [64, 7, 1])
def test_requests_above_the_maximum_batch_size_are_split(app: ServingApp, backend: Backend, limit: int) -> None:
    backend.limit = limit
    for rows in (limit, limit + 1, 3 * limit + 2):
        response = predict(app.test_client(), rows).json
        assert response is not None
        assert response["outputs"]["y"] == [[2.0 * i, 1.0] for i in range(rows)]
    assert [rows for rows in backend.rows if rows > limit] == [limit + 1]  # the client stores the limit
    assert backend.rows[2:4] == ([limit, 1] if limit > 1 else [1, 1])


def test_a_reduced_maximum_batch_size_is_detected(app: ServingApp, backend: Backend) -> None:
    for limit in (8, 3):
        backend.limit = limit
        response = predict(app.test_client(), 20).json
        assert response is not None
        assert len(response["outputs"]["y"]) == 20
    assert app.test_client().post("/v2/models/m/infer", json=v2_request(10)).status_code == 200


def test_outputs_that_cannot_be_concatenated_are_refused(backend: Backend) -> None:
    def without_rows(definition: Any) -> None:
        for name, array in (("y", np.float32(1)), ("k", np.int64(1))):
            definition.outputs[name].tensor_shape.Clear()
            edits.append(set_output(name, array))

    edits: list[Callable[[Any], None]] = []
    backend.edit_metadata = without_rows

    def apply_edits(response: Any) -> None:
        for edit in edits:
            edit(response)

    backend.edit_response = apply_edits
    backend.limit = 4
    app = make_remote_app(backend.address)
    app.inference.repository.load()
    assert predict(app.test_client(), 4).json == {"outputs": {"y": 1.0, "k": 1}}
    for _ in range(2):
        response = predict(app.test_client(), 5)
        assert (response.status_code, "send at most 4 rows" in (response.json or {})["error"]) == (400, True)


@pytest.mark.parametrize(
    "refusal",
    [
        "Task size 4 is larger than maximum input batch size 0",
        "Task size 4 is larger than maximum input batch size 4",
        "the image is larger than maximum size",
    ],
)
def test_other_errors_are_passed_on(app: ServingApp, backend: Backend, refusal: str) -> None:
    backend.refusal = refusal
    response = predict(app.test_client(), 4)
    assert (response.status_code, response.json) == (400, {"error": refusal})
    assert backend.rows == [4]


def set_output(name: str, array: Any) -> Callable[[Any], None]:
    def edit(response: Any) -> None:
        response.outputs[name].CopyFrom(tf.make_tensor_proto(array))

    return edit


def edit_tensor(edit: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda response: edit(response.outputs["y"])


def rename_output(reply: Any) -> None:
    reply.outputs.pop("k")
    set_output("z", [1])(reply)


INVALID: dict[str, Callable[[Any], None]] = {
    "no outputs": lambda response: response.outputs.clear(),
    "an output missing": lambda response: response.outputs.pop("k"),
    "an output of another name": rename_output,
    "another dtype": set_output("y", np.zeros((2, 2), np.int32)),
    "strings": set_output("y", [[b"a", b"b"], [b"c", b"d"]]),
    "too few rows": set_output("y", np.zeros((1, 2), np.float32)),
    "too many rows": set_output("y", np.zeros((3, 2), np.float32)),
    "no rows": set_output("y", np.zeros((0, 2), np.float32)),
    "another rank": set_output("y", np.zeros(2, np.float32)),
    "a scalar": set_output("y", np.float32(1)),
    "another size": set_output("y", np.zeros((2, 3), np.float32)),
    "too little content": edit_tensor(lambda tensor: setattr(tensor, "tensor_content", b"\0" * 3)),
    "an unknown dtype": edit_tensor(lambda tensor: setattr(tensor, "dtype", 999)),
    "no dtype": edit_tensor(lambda tensor: setattr(tensor, "dtype", 0)),
    "a resource": edit_tensor(lambda tensor: setattr(tensor, "dtype", types_pb2.DT_RESOURCE)),
    "a negative size": edit_tensor(lambda tensor: setattr(tensor.tensor_shape.dim[0], "size", -1)),
    "an unknown rank": edit_tensor(lambda tensor: setattr(tensor.tensor_shape, "unknown_rank", True)),
    "terabytes": edit_tensor(lambda tensor: setattr(tensor.tensor_shape.dim[0], "size", 2**40)),
    "an empty tensor": edit_tensor(lambda tensor: tensor.Clear()),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_response_is_502(app: ServingApp, backend: Backend, case: str) -> None:
    backend.edit_response = INVALID[case]
    client = app.test_client()
    for response in (predict(client, 2), client.post("/v2/models/m/infer", json=v2_request(2))):
        assert response.status_code == 502, response.text
        assert f"invalid response from TensorFlow Serving at {backend.address}" in (response.json or {})["error"]
        assert "Retry-After" not in response.headers
    backend.edit_response = leave
    assert predict(client, 2).status_code == 200


def test_undeclared_outputs_are_dropped(app: ServingApp, backend: Backend) -> None:
    backend.edit_response = set_output("z", [1])
    assert (predict(app.test_client(), 2).json or {})["outputs"].keys() == {"y", "k"}


def test_an_unparsable_response_is_502(app: ServingApp, backend: Backend) -> None:
    def garbage(request: bytes, context: Any) -> bytes:  # noqa: ARG001
        return b"\xff\xff\xff"

    backend.stop()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    handler = grpc.unary_unary_rpc_method_handler(garbage)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(PREDICT, {"Predict": handler}),))
    assert server.add_insecure_port(backend.address) == backend.port
    server.start()
    try:
        response = predict(app.test_client())
        assert (response.status_code, "cannot be parsed" in (response.json or {})["error"]) == (502, True)
    finally:
        server.stop(None).wait()


def set_unknown_dtype(definition: Any) -> None:
    definition.inputs["x"].dtype = 250


def set_unknown_state(status: Any) -> None:
    status.state = 77


def set_unknown_code(status: Any) -> None:
    status.status.error_code = 77


@pytest.mark.parametrize(
    "edit",
    [
        lambda backend: setattr(backend, "edit_metadata", set_unknown_dtype),
        lambda backend: setattr(backend, "edit_status", set_unknown_state),
        lambda backend: setattr(backend, "edit_status", set_unknown_code),
    ],
)
def test_an_invalid_model_description_is_502_and_does_not_affect_others(
    backend: Backend, edit: Callable[[Backend], None]
) -> None:
    edit(backend)
    app = make_remote_app(backend.address, "m", "n", "missing")
    repository = app.inference.repository
    repository.load()
    client = app.test_client()
    for page in ("/readyz", "/metrics", "/models.json", "/", "/v1/models/n"):
        assert client.get(page).status_code == 200
    assert predict(client, model="n").status_code == 200
    assert predict(client, model="missing").status_code == 404
    response = predict(client)
    assert (response.status_code, "invalid response" in (response.json or {})["error"]) == (502, True)
    problems = {model["name"]: model["problem"] for model in client.get("/models.json").json or []}
    assert "invalid response" in problems["m"]


def test_a_model_that_a_restarted_server_loads_again_is_503(app: ServingApp, backend: Backend) -> None:
    client = app.test_client()
    assert predict(client).status_code == 200
    states = get_model_status_pb2.ModelVersionStatus

    def report(state: int, error_code: int = 0) -> TestResponse:
        def edit(status: Any) -> None:
            status.state, status.status.error_code = state, error_code

        backend.edit_status = edit
        app.inference.repository.poll()
        return predict(client)

    for state in (states.START, states.LOADING):
        response = report(state)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert "still being loaded" in (response.json or {})["error"]
    assert report(states.END, error_code=2).status_code == 404
    assert report(states.AVAILABLE).status_code == 200


def send_every_request(client: FlaskClient) -> dict[str, TestResponse]:
    form = {"image": (io.BytesIO(picture("red")), "a.png")}
    return {
        "predict": predict(client),
        "version": client.post("/v1/models/m/versions/1:predict", json={"instances": [[1.0, 2.0]]}),
        "classify": client.post("/v1/models/m:classify", json={"examples": [{"x": 1.0}]}),
        "metadata": client.get("/v1/models/m/metadata"),
        "status": client.get("/v1/models/m"),
        "v2": client.post("/v2/models/m/infer", json=v2_request(1)),
        "v2 metadata": client.get("/v2/models/m"),
        "body": client.post("/predict", data=picture("red"), content_type="image/png"),
        "form": client.post("/predict?model=m", data=form),
    }


def assert_unreachable(client: FlaskClient) -> None:
    for name, response in send_every_request(client).items():
        assert (response.status_code, response.headers.get("Retry-After")) == (503, "1"), name
        assert "cannot be reached" in (response.json or {})["error"], name
    assert client.get("/readyz").status_code == 503
    assert "cannot be reached" in (client.get("/readyz").json or {})["reason"]
    for page in ("/metrics", "/models.json", "/", "/healthz"):
        assert client.get(page).status_code == 200
    assert client.get("/v1/models/nobody").status_code == 404


def test_an_unreachable_server_is_503_from_startup() -> None:
    app = make_remote_app(f"127.0.0.1:{free_ports(1)[0]}")
    repository = app.inference.repository
    client = app.test_client()
    for name, response in send_every_request(client).items():
        assert (response.status_code, response.headers.get("Retry-After")) == (503, "1"), name
    repository.load()
    for _ in range(2):
        assert_unreachable(client)
        repository.poll()


def test_a_stopped_server_is_503_before_and_after_the_next_poll(app: ServingApp, backend: Backend) -> None:
    client = app.test_client()
    assert predict(client).status_code == 200
    backend.stop()
    response = predict(client)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    for _ in range(2):
        app.inference.repository.poll()
        assert_unreachable(client)


@pytest.mark.slow
def test_both_protocols_report_an_unreachable_server(start_server: Callable[..., Server], tmp_path: Path) -> None:
    remote = ("--remote", f"127.0.0.1:{free_ports(1)[0]}", "--remote-model", "m", "--poll-interval-s", "0.2")
    server = start_server(tmp_path / "none", *remote)
    server.wait_for("/readyz", 503)
    server.wait_until(lambda: "not ready: m: TensorFlow Serving at" in server.log)
    for _ in range(3):
        response = httpx.post(server.url + "/v1/models/m:predict", json={"instances": [1]})
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = "m"
        with pytest.raises(grpc.RpcError) as refused:
            prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=30)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        status = get_model_status_pb2.GetModelStatusRequest()
        status.model_spec.name = "m"
        with pytest.raises(grpc.RpcError) as refused:
            model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(status, timeout=30)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert server.stop() == 0

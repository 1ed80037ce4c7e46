"""PredictionService through the official stubs, over a real channel to a server process."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    inference_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from serving.api.flask_app import ServingApp
from serving.app import make_app
from serving.errors import InvalidRequest
from serving.greenlets import SMALL_BYTES
from serving.grpc.services import PredictionService
from serving.settings import Settings
from tests.serving.conftest import Server, picture
from tests.serving.saved_models import save_colour_classifier, save_multiplier

RED = np.zeros((1, 32, 32, 3), np.uint8) + np.array([255, 0, 0], np.uint8)


def make_request(
    model: str = "colours", signature: str = "", output_filter: tuple[str, ...] = (), **inputs: Any
) -> Any:
    request = predict_pb2.PredictRequest(output_filter=output_filter)
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(value if isinstance(value, tensor_pb2.TensorProto) else pack(value))
    return request


def pack(value: Any) -> Any:
    return tf.make_tensor_proto(value)


def refusal(stubs: Any, request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refused:
        stubs.prediction.Predict(request, timeout=60)
    return refused.value.code(), refused.value.details()


def test_pixels_in_tensor_content(stubs: Any) -> None:
    request = make_request(images=np.repeat(RED, 3, axis=0))
    assert request.inputs["images"].tensor_content
    response = stubs.prediction.Predict(request, timeout=60)
    assert (response.model_spec.name, response.model_spec.version.value) == ("colours", 7)
    assert response.model_spec.signature_name == "serving_default"
    assert set(response.outputs) == {"probabilities", "class_id", "label"}
    assert tf.make_ndarray(response.outputs["probabilities"]).shape == (3, 3)
    # Like TensorFlow Serving, responses use the typed fields.
    assert list(response.outputs["label"].string_val) == [b"red"] * 3
    assert list(response.outputs["class_id"].int64_val) == [0, 0, 0]
    assert len(response.outputs["probabilities"].float_val) == 9


def test_pixels_in_typed_values(stubs: Any) -> None:
    tensor = tensor_pb2.TensorProto(dtype=tf.uint8.as_datatype_enum)
    for size in RED.shape:
        tensor.tensor_shape.dim.add().size = size
    tensor.int_val.extend(RED.ravel().tolist())
    response = stubs.prediction.Predict(make_request(images=tensor), timeout=60)
    assert list(response.outputs["label"].string_val) == [b"red"]
    del tensor.int_val[1:]  # one value is repeated for all
    white = stubs.prediction.Predict(make_request(images=tensor), timeout=60)
    assert tf.make_ndarray(white.outputs["probabilities"])[0] == pytest.approx([1 / 3] * 3)


def test_encoded_images(stubs: Any) -> None:
    request = make_request(signature="image_bytes", image_bytes=[picture("blue", kind="JPEG"), picture("green")])
    response = stubs.prediction.Predict(request, timeout=60)
    assert list(response.outputs["label"].string_val) == [b"blue", b"green"]


def test_several_inputs_and_strings(stubs: Any) -> None:
    numbers = make_request("adder", a=np.array([[1, 2]], np.float32), b=np.array([[10, 20]], np.float32))
    assert list(stubs.prediction.Predict(numbers, timeout=60).outputs["sum"].float_val) == [11, 22]
    shouted = stubs.prediction.Predict(make_request("adder", "shout", text="hello"), timeout=60).outputs["shouted"]
    assert (list(shouted.string_val), len(shouted.tensor_shape.dim)) == ([b"HELLO"], 0)


def test_a_call_without_a_deadline_is_served(stubs: Any) -> None:
    response = stubs.prediction.Predict(make_request(images=RED))
    assert list(response.outputs["label"].string_val) == [b"red"]


def test_output_filter_selects_outputs(stubs: Any) -> None:
    response = stubs.prediction.Predict(make_request(images=RED, output_filter=("label",)), timeout=60)
    assert set(response.outputs) == {"label"}


def test_model_spec_selects_the_version(stubs: Any) -> None:
    request = make_request(images=RED)
    request.model_spec.version.value = 7
    assert stubs.prediction.Predict(request, timeout=60).model_spec.version.value == 7
    request.model_spec.version.value = 8
    assert refusal(stubs, request) == (
        grpc.StatusCode.NOT_FOUND,
        "Servable not found for request: Specific(colours, 8)",
    )
    for label in ("stable", ""):
        request.model_spec.version_label = label
        assert refusal(stubs, request) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            f"Unrecognized servable version label: {label}",
        )


@pytest.fixture(scope="module")
def multiplier(tmp_path_factory: pytest.TempPathFactory) -> ServingApp:
    models_dir = tmp_path_factory.mktemp("models")
    save_multiplier(models_dir / "multiplier" / "1")
    app = make_app(Settings(models_dir=models_dir, max_rows=10))
    app.inference.repository.load()
    return app


def multiply(app: ServingApp, **inputs: Any) -> Any:
    service = PredictionService(app.inference, max_bytes=1_000)
    return service.predict(make_request("multiplier", **inputs))


def test_missing_inputs_use_their_default_values(multiplier: ServingApp) -> None:
    x = np.array([1, 2], np.float32)
    assert list(multiply(multiplier, x=x).outputs["y"].float_val) == [3, 6]
    assert list(multiply(multiplier, x=x, k=np.float32(2)).outputs["y"].float_val) == [2, 4]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("k",),
            (
                "Signature input alias: x(feed name: serving_default_x:0) not found in request and no default value "
                "provided. Inputs expected to be in the request {k}, or default input alias set: k"
            ),
        ),
        (
            (),
            (
                "Signature input alias: x(feed name: serving_default_x:0) not found in request and no default value "
                "provided. Inputs expected to be in the request {}, or default input alias set: k"
            ),
        ),
        (("x", "z"), "Inputs contains invalid name. Used request inputs: x, request input: x,z"),
        (
            ("k", "x", "z"),
            (
                "input size does not match signature: 3!=2 len({k,x,z}) != len({k,x}). Sent extra: {z}. "
                "Missing but required: {}."
            ),
        ),
    ],
)
def test_default_values_do_not_hide_wrong_inputs(multiplier: ServingApp, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        multiply(multiplier, **dict.fromkeys(names, np.float32(1)))
    assert str(refused.value) == message


def test_metadata_contains_the_default_values(multiplier: ServingApp) -> None:
    described = multiplier.test_client().get("/v1/models/multiplier/metadata").json
    assert described is not None
    defaults = described["metadata"]["signature_def"]["signature_def"]["serving_default"]["defaults"]
    assert (defaults["k"]["dtype"], defaults["k"]["float_val"]) == ("DT_FLOAT", [3.0])
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "multiplier"
    service = PredictionService(multiplier.inference, max_bytes=1_000)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    service.get_model_metadata(request).metadata["signature_def"].Unpack(signatures)
    assert tf.make_ndarray(signatures.signature_def["serving_default"].defaults["k"]) == 3.0


@pytest.mark.parametrize(
    ("request_", "code", "details"),
    [
        (predict_pb2.PredictRequest(), "INVALID_ARGUMENT", "Missing ModelSpec"),
        (make_request("", images=RED), "INVALID_ARGUMENT", "ModelSpec has no name specified."),
        (make_request("m", images=RED), "NOT_FOUND", "Servable not found for request: Latest(m)"),
        (make_request(signature="x", images=RED), "FAILED_PRECONDITION", 'Serving signature key "x" not found.'),
        (
            make_request(pixels=RED),
            "INVALID_ARGUMENT",
            (
                "Signature input alias: images(feed name: serving_default_images:0) not found in request and no "
                "default value provided. Inputs expected to be in the request {pixels}, or default input alias set: "
            ),
        ),
        (
            make_request(images=RED, more=RED),
            "INVALID_ARGUMENT",
            (
                "input size does not match signature: 2!=1 len({images,more}) != len({images}). Sent extra: {more}. "
                "Missing but required: {}."
            ),
        ),
        (
            make_request(images=RED, output_filter=("x",)),
            "INVALID_ARGUMENT",
            (
                "output tensor alias not found in signature: x Outputs expected to be in the set "
                "{class_id,label,probabilities}."
            ),
        ),
        (
            make_request(images=RED, output_filter=("label", "label")),
            "INVALID_ARGUMENT",
            "duplicate output tensor alias: label",
        ),
        (make_request(images=RED.astype(np.float32)), "INVALID_ARGUMENT", "expected uint8 (n, 32, 32, 3), got float32"),
        (make_request(images=RED[:, :31]), "INVALID_ARGUMENT", "got uint8 (1, 31, 32, 3)"),
        (make_request(images=RED[0]), "INVALID_ARGUMENT", "got uint8 (32, 32, 3)"),
        (make_request(images=RED[:0]), "INVALID_ARGUMENT", "has no rows"),
        (make_request("adder", "shout", text=""), "INVALID_ARGUMENT", "nothing to shout"),
        (make_request(signature="image_bytes", image_bytes=[b"no picture"]), "INVALID_ARGUMENT", ""),
    ],
)
def test_an_invalid_request_returns_tensorflow_servings_status(
    stubs: Any, request_: Any, code: str, details: str
) -> None:
    status, text = refusal(stubs, request_)
    assert (status.name, details in text) == (code, True), text
    assert "Traceback" not in text


def broken_tensor(dtype: int, shape: tuple[int, ...], **fields: Any) -> Any:
    tensor = tensor_pb2.TensorProto(dtype=dtype, **fields)
    for size in shape:
        tensor.tensor_shape.dim.add().size = size
    return tensor


@pytest.mark.parametrize(
    ("tensor", "code", "details"),
    [
        (broken_tensor(4, (1, 32, 32, 3), tensor_content=b"123"), "INVALID_ARGUMENT", "has 3 bytes"),
        (broken_tensor(4, (1, 32, 32, 3)), "INVALID_ARGUMENT", "0 values"),
        (broken_tensor(4, (1,) * 65, int_val=[1]), "INVALID_ARGUMENT", "at most 64 dimensions, got 65"),
        (broken_tensor(4, (1, 1), int_val=[1, 2]), "INVALID_ARGUMENT", "2 values"),
        (broken_tensor(4, (1, 32, 32, 3), int_val=[300]), "INVALID_ARGUMENT", "from 0 to 255"),
        (broken_tensor(4, (-1, 32, 32, 3), int_val=[3]), "INVALID_ARGUMENT", "not fully given"),
        (broken_tensor(4, (2**40, 32, 32, 3), int_val=[3]), "RESOURCE_EXHAUSTED", "rows"),
        (broken_tensor(20, (1,)), "INVALID_ARGUMENT", "DT_RESOURCE cannot be sent"),
        (broken_tensor(999, (1,)), "INVALID_ARGUMENT", "not a dtype"),
        (broken_tensor(7, (1,), string_val=[b"x"]), "INVALID_ARGUMENT", "expected uint8"),
    ],
)
def test_an_inconsistent_tensor_is_refused(stubs: Any, tensor: Any, code: str, details: str) -> None:
    status, text = refusal(stubs, make_request(images=tensor))
    assert (status.name, details in text) == (code, True), text


def test_a_message_over_the_limit_is_refused(stubs: Any) -> None:
    status, _ = refusal(stubs, make_request(images=np.zeros((400, 32, 32, 3), np.uint8)))
    assert status == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_unparsable_message_returns_internal_with_a_reason(stubs: Any) -> None:
    predict = stubs.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    with pytest.raises(grpc.RpcError) as refused:
        predict(b"garbage", timeout=60)
    assert refused.value.code() == grpc.StatusCode.INTERNAL
    assert refused.value.details() == "the message cannot be parsed as tensorflow.serving.PredictRequest"


def test_many_images_in_one_request(stubs: Any) -> None:
    images = np.repeat(RED, 2 * SMALL_BYTES // RED.size, axis=0)
    response = stubs.prediction.Predict(make_request(images=images, output_filter=("label",)), timeout=60)
    assert list(response.outputs["label"].string_val) == [b"red"] * len(images)


def test_thousands_of_concurrent_calls_are_served(server: Server) -> None:
    async def send_all() -> list[Any]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            request = make_request(images=RED, output_filter=("class_id",))
            return await asyncio.gather(*(stub.Predict(request, timeout=60) for _ in range(3_000)))

    assert {response.outputs["class_id"].int64_val[0] for response in asyncio.run(send_all())} == {0}


def test_metadata_equals_that_of_the_rest_api(stubs: Any, server: Server) -> None:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "colours"
    response = stubs.prediction.GetModelMetadata(request, timeout=60)
    assert response.metadata["signature_def"].type_url.endswith("tensorflow.serving.SignatureDefMap")
    described = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(described)
    shape = described.signature_def["serving_default"].inputs["images"].tensor_shape
    assert [axis.size for axis in shape.dim] == [-1, 32, 32, 3]
    rest = httpx.get(server.url + "/v1/models/colours/metadata").json()["metadata"]["signature_def"]["signature_def"]
    assert rest.keys() == set(described.signature_def)
    for name, definition in described.signature_def.items():
        assert definition.method_name == rest[name]["method_name"]
        assert {key: tensor.name for key, tensor in definition.outputs.items()} == {
            key: tensor["name"] for key, tensor in rest[name]["outputs"].items()
        }


@pytest.mark.parametrize(
    ("fields", "details"),
    [([], "must specify at least one metadata_field"), (["x"], "Metadata field x is not supported")],
)
def test_unsupported_metadata_fields_are_refused(stubs: Any, fields: list[str], details: str) -> None:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=fields)
    request.model_spec.name = "colours"
    with pytest.raises(grpc.RpcError) as refused:
        stubs.prediction.GetModelMetadata(request, timeout=60)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details in refused.value.details()


def test_estimator_methods_are_unimplemented(stubs: Any) -> None:
    for method, request in (
        (stubs.prediction.Classify, classification_pb2.ClassificationRequest()),
        (stubs.prediction.Regress, regression_pb2.RegressionRequest()),
        (stubs.prediction.MultiInference, inference_pb2.MultiInferenceRequest()),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            method(request, timeout=60)
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_grpc_and_rest_return_equal_outputs_and_share_metrics(stubs: Any, server: Server) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    over_grpc = tf.make_ndarray(
        stubs.prediction.Predict(make_request(images=images), timeout=60).outputs["probabilities"]
    )
    url = server.url + "/v1/models/colours:predict"
    over_rest = httpx.post(url, json={"inputs": images.tolist()}).json()["outputs"]["probabilities"]
    np.testing.assert_allclose(over_grpc, np.float32(over_rest), atol=1e-6)
    page = httpx.get(server.url + "/metrics").text
    assert ':tensorflow:serving:request_latency_count{API="predict",entrypoint="GRPC",model_name="colours"}' in page
    assert ':tensorflow:serving:request_count{model_name="colours",status="FAILED_PRECONDITION"}' in page


def test_graceful_shutdown_finishes_in_flight_calls(start_server: Callable[..., Server], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    save_colour_classifier(tmp_path / "models" / "colours" / "1", gate=gate)
    server = start_server(tmp_path / "models")
    server.wait_for("/readyz")
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        response = stub.Predict.future(make_request(images=RED), timeout=60)
        server.wait_until(lambda: server.in_flight() == 1)
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: not accepts(server.grpc_port))
        assert not response.done()
        gate.touch()
        assert list(response.result().outputs["label"].string_val) == [b"red"]
    assert server.process.wait(timeout=60) == 0


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True

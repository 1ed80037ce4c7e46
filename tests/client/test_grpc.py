"""`GrpcClient` against a server made with TensorFlow Serving's official messages and stubs."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner
from google.protobuf import wrappers_pb2
from PIL import Image
from tensorflow.core.framework import tensor_pb2, tensor_shape_pb2, types_pb2
from tensorflow_serving.apis import get_model_status_pb2, model_pb2, predict_pb2

from client import (
    ConnectionFailed,
    Failure,
    GrpcClient,
    ImageRejected,
    ImageSource,
    ModelNotFound,
    Prediction,
    RequestRejected,
    RequestTimedOut,
    ServerBusy,
    ServerFailed,
    UnexpectedResponse,
    tensors,
)
from client.__main__ import main
from client.grpc import STATES, GrpcTransport
from client.images import LoadedImage
from client.protos import prediction_pb2
from tests.client.conftest import pixels_of, png_of
from tests.client.grpc_service import GrpcService, Script


def abort(code: grpc.StatusCode, details: str = "as scripted") -> Script:
    return lambda _, context: context.abort(code, details)


def predict(grpc_service: GrpcService, *images: bytes, **options: Any) -> list[Any]:
    transport = GrpcTransport(grpc_service.address, model="m", sleep=lambda _: None, **options)
    try:
        return transport.predict_batch([LoadedImage(index, None, data) for index, data in enumerate(images)])
    finally:
        transport.close()


def encode(colour: str, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels_of(colour)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("as_content", [False, True])
def test_predictions_are_in_order(grpc_service: GrpcService, images: list[Path], as_content: bool) -> None:
    grpc_service.as_content = as_content
    with GrpcClient(grpc_service.address, model="m", batch_size=3) as client:
        predictions = client.predict(images)
    assert [p.label for p in predictions] == ["red", "green", "blue"] * 2 + ["red"]
    assert [p.file for p in predictions] == list(map(str, images))
    assert predictions[0].probabilities == pytest.approx({"red": 1.0, "green": 0.0, "blue": 0.0})
    assert (predictions[0].class_id, predictions[0].model, predictions[0].model_version) == (0, "m", 4)
    sent = [request.inputs["image_bytes"] for request in grpc_service.requests if "class_id" not in request.inputs]
    # Several are sent concurrently, and the server's threads process them in any order.
    files = [image.read_bytes() for image in images]
    assert sorted(list(tensor.string_val) for tensor in sent) == sorted([files[:3], files[3:6], files[6:]])
    # The class names are requested once, of the version in the response.
    (names,) = [request for request in grpc_service.requests if "class_id" in request.inputs]
    assert names.model_spec.version.value == 4


def test_every_form_of_an_image_is_accepted(grpc_service: GrpcService) -> None:
    forms: list[ImageSource] = [png_of("green"), pixels_of("green"), Image.fromarray(pixels_of("green"))]
    encoded = [encode("green", kind) for kind in ("JPEG", "WEBP", "BMP", "GIF")]
    with GrpcClient(grpc_service.address, model="m") as client:
        assert [p.label for p in client.predict([*forms, *encoded])] == ["green"] * 7


def test_unreadable_images_do_not_affect_the_others(grpc_service: GrpcService, images: list[Path]) -> None:
    images[1].write_bytes(b"\xff\xd8\xff broken JPEG")
    images[4].write_bytes(b"not an image")
    images[5].write_bytes(b"RIFF1234WEBPbroken")
    with GrpcClient(grpc_service.address, model="m") as client:
        outcomes = list(client.predict_iter(images))
        with pytest.raises(ImageRejected, match="Unknown image file format"):
            client.predict(images[:3])
    failures = {outcome.index: outcome for outcome in outcomes if isinstance(outcome, Failure)}
    assert failures.keys() == {1, 4, 5}
    assert "Unknown image file format" in failures[1].reason
    assert "expected JPEG, PNG, WebP, AVIF, BMP or GIF" in failures[4].reason
    assert [outcome.label for outcome in outcomes if not isinstance(outcome, Failure)] == ["red", "blue", "red", "red"]


def test_too_large_request_is_sent_in_parts(grpc_service: GrpcService) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
    huge = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    with GrpcClient(grpc_service.address, model="m") as client:
        outcomes = list(client.predict_iter([noise, noise, noise, huge, noise]))
    assert [isinstance(outcome, Failure) for outcome in outcomes] == [False, False, False, True, False]


def test_version_is_requested(grpc_service: GrpcService) -> None:
    predict(grpc_service, png_of("red"), version=4)
    assert grpc_service.requests[0].model_spec.version.value == 4


def test_class_numbers_replace_missing_labels(grpc_service: GrpcService) -> None:
    grpc_service.has_labels = False
    (prediction,) = predict(grpc_service, png_of("blue"))
    assert prediction.label == "blue"
    assert prediction.probabilities == pytest.approx({"0": 0.0, "1": 0.0, "2": 1.0})


def test_busy_server_is_retried(grpc_service: GrpcService) -> None:
    grpc_service.script = [abort(grpc.StatusCode.UNAVAILABLE)] * 2
    (prediction,) = predict(grpc_service, png_of("red"))
    assert prediction.label == "red"
    grpc_service.script = [abort(grpc.StatusCode.UNAVAILABLE, "loading")] * 9
    with pytest.raises(ServerBusy, match=r"is not ready: loading \(tried 3 times\)"):
        predict(grpc_service, png_of("red"), retries=2)
    assert len(grpc_service.script) == 6


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.NOT_FOUND, ModelNotFound),
        (grpc.StatusCode.FAILED_PRECONDITION, RequestRejected),
        (grpc.StatusCode.UNIMPLEMENTED, UnexpectedResponse),
        (grpc.StatusCode.INTERNAL, ServerFailed),
        (grpc.StatusCode.DEADLINE_EXCEEDED, RequestTimedOut),
    ],
)
def test_other_status_codes_are_not_retried(
    grpc_service: GrpcService, code: grpc.StatusCode, error: type[Exception]
) -> None:
    grpc_service.script = [abort(code)] * 2
    with pytest.raises(error, match=r"127\.0\.0\.1"):
        predict(grpc_service, png_of("red"))
    assert len(grpc_service.script) == 1


def test_timeout_is_sent_as_the_deadline(grpc_service: GrpcService) -> None:
    remaining: list[float] = []

    def exceed_deadline(_: Any, context: grpc.ServicerContext) -> None:
        remaining.append(context.time_remaining())
        context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "slow")

    grpc_service.script = [exceed_deadline]
    with pytest.raises(RequestTimedOut, match=r"within 7 s; allow more time with timeout_s \(--timeout\)"):
        predict(grpc_service, png_of("red"), timeout_s=7)
    assert 0 < remaining[0] <= 8


def test_connection_refused(closed_port: int) -> None:
    transport = GrpcTransport(f"127.0.0.1:{closed_port}", model="m", retries=1, sleep=lambda _: None)
    with pytest.raises(ConnectionFailed, match=r"cannot connect to 127\.0\.0\.1.*tried 2 times"):
        transport.predict_batch([LoadedImage(0, None, png_of("red"))])
    with pytest.raises(ConnectionFailed):
        transport.status()


def break_response(change: Callable[[Any], None]) -> Script:
    def respond(request: Any, context: grpc.ServicerContext) -> Any:
        response = GrpcService().Predict(request, context)
        change(response.outputs)
        return response

    return respond


@pytest.mark.parametrize("missing", [["class_id", "label"], ["label"], ["class_id"]])
def test_a_model_may_return_probabilities_alone(grpc_service: GrpcService, missing: list[str]) -> None:
    def drop(outputs: Any) -> None:
        for name in missing:
            outputs.pop(name)

    expected = predict(grpc_service, png_of("green"), png_of("blue"))
    grpc_service.script = [break_response(drop)]
    assert predict(grpc_service, png_of("green"), png_of("blue")) == expected
    assert [(p.label, p.class_id) for p in expected] == [("green", 1), ("blue", 2)]
    grpc_service.has_labels = False
    grpc_service.script = [break_response(drop)]
    assert [p.label for p in predict(grpc_service, png_of("green"))] == ["1"]


@pytest.mark.parametrize(
    "change",
    [
        lambda outputs: outputs.clear(),
        lambda outputs: outputs["label"].string_val.append(b"red"),
        lambda outputs: outputs["probabilities"].float_val.pop(),
        lambda outputs: outputs["probabilities"].tensor_shape.dim.pop(),
        lambda outputs: setattr(outputs["probabilities"], "dtype", 2),
        lambda outputs: setattr(outputs["probabilities"].tensor_shape.dim[0], "size", -1),
        lambda outputs: setattr(outputs["class_id"], "dtype", 3),
    ],
)
def test_invalid_responses_are_rejected(grpc_service: GrpcService, change: Callable[[Any], None]) -> None:
    grpc_service.script = [break_response(change)]
    with pytest.raises(UnexpectedResponse):
        predict(grpc_service, png_of("red"))


def test_status(grpc_service: GrpcService) -> None:
    with GrpcClient(grpc_service.address, model="m") as client:
        status = client.status()
    assert status.ready
    assert [(m.version, m.state, m.error) for m in status.models] == [
        (4, "AVAILABLE", None),
        (5, "END", "damaged"),
    ]


def test_given_channel_is_used_and_stays_open(grpc_service: GrpcService) -> None:
    with grpc.insecure_channel(grpc_service.address) as channel:
        for _ in range(2):
            with GrpcClient(model="m", channel=channel) as client:
                assert [prediction.label for prediction in client.predict(png_of("red"))] == ["red"]
        grpc_service.script = [abort(grpc.StatusCode.INTERNAL)]
        client = GrpcClient("classifier:8500", model="m", channel=channel)
        with pytest.raises(ServerFailed, match="classifier:8500 failed"):
            client.predict(png_of("red"))


def test_close_closes_its_own_channel(grpc_service: GrpcService) -> None:
    client = GrpcClient(grpc_service.address, model="m")
    client.close()
    with pytest.raises(ValueError, match="closed channel"):
        client.status()


def test_target_or_channel_is_required() -> None:
    with pytest.raises(ValueError, match=r"expected a gRPC address such as 127\.0\.0\.1:8500, or a channel; got None"):
        GrpcClient(model="m")


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
def test_denied_access_names_the_channel(grpc_service: GrpcService, code: grpc.StatusCode) -> None:
    grpc_service.script = [abort(code, "token required")]
    with pytest.raises(
        RequestRejected, match=r"denied access \(token required\); pass valid credentials with metadata or a channel"
    ):
        predict(grpc_service, png_of("red"))


@pytest.mark.parametrize("address", ["http://127.0.0.1:8500", "localhost", "localhost:x", "", ":8500", "a b:1"])
def test_target_is_host_and_port(address: str) -> None:
    with pytest.raises(ValueError, match=r"expected a gRPC address such as 127\.0\.0\.1:8500"):
        GrpcClient(address, model="m")


def test_a_rate_limit_is_waited_for_and_not_blamed_on_an_image(grpc_service: GrpcService) -> None:
    def limit(_: Any, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("retry-after", "3"),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "more than 1 requests per second")

    grpc_service.script = [limit]
    waits: list[float] = []
    transport = GrpcTransport(grpc_service.address, model="m", sleep=waits.append)
    (prediction,) = transport.predict_batch([LoadedImage(0, None, png_of("red"))])
    transport.close()
    assert isinstance(prediction, Prediction)
    assert (prediction.label, waits) == ("red", [3.0])
    grpc_service.script = [limit]
    with pytest.raises(ServerBusy, match="limits requests: more than 1"):
        predict(grpc_service, png_of("red"), retries=0)


def test_metadata_is_sent_with_every_call(grpc_service: GrpcService, images: list[Path]) -> None:
    sent: list[str] = []

    def note(request: Any, context: grpc.ServicerContext) -> Any:
        sent.append(dict(context.invocation_metadata())["authorization"])
        return grpc_service.Predict(request, context)

    grpc_service.script = [note]
    arguments = ["--grpc", grpc_service.address, "--model", "m", "--token", "secret", str(images[0])]
    assert CliRunner().invoke(main, ["predict", *arguments]).exit_code == 0
    assert sent == ["Bearer secret"]


def test_command_line(grpc_service: GrpcService, images: list[Path]) -> None:
    run = CliRunner().invoke
    done = run(main, ["predict", "--grpc", grpc_service.address, "--model", "m", *map(str, images[:3])])
    assert done.exit_code == 0, done.output
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["red", "green", "blue"]
    done = run(main, ["status", "--grpc", grpc_service.address, "--model", "m"])
    assert (done.exit_code, done.stdout) == (0, "m  version 4  AVAILABLE\nm  version 5  END  damaged\nready\n")
    done = run(main, ["predict", "--grpc", grpc_service.address, str(images[0])])
    assert (done.exit_code, "--grpc needs --model" in done.stderr) == (2, True)


def fill(messages: Any) -> list[Any]:
    """Make a request and a response with all fields that the client uses."""
    tensor = messages.Tensor if messages is prediction_pb2 else tensor_pb2.TensorProto
    request = messages.PredictRequest(output_filter=["probabilities", "label"])
    request.model_spec.name = "m"
    request.model_spec.version.value = 2**40
    request.model_spec.signature_name = "image_bytes"
    request.inputs["image_bytes"].CopyFrom(tensor(dtype=7, string_val=[b"\xff\xd8", b""]))
    request.inputs["image_bytes"].tensor_shape.dim.add().size = 2
    response = messages.PredictResponse()
    response.model_spec.CopyFrom(request.model_spec)
    response.outputs["probabilities"].CopyFrom(tensor(dtype=1, float_val=[0.5, -1e-9]))
    response.outputs["probabilities"].tensor_shape.unknown_rank = True
    response.outputs["class_id"].CopyFrom(tensor(dtype=9, int64_val=[-1, 2**62], tensor_content=b"12345678"))
    return [request, response]


def test_messages_are_encoded_like_tensorflow_servings() -> None:
    for ours, theirs in zip(fill(prediction_pb2), fill(predict_pb2), strict=True):
        data = ours.SerializeToString(deterministic=True)
        assert data == theirs.SerializeToString(deterministic=True)
        assert type(theirs).FromString(data) == theirs
        assert type(ours).FromString(theirs.SerializeToString(deterministic=True)) == ours
    ours = prediction_pb2.GetModelStatusResponse()
    theirs = get_model_status_pb2.GetModelStatusResponse()
    for response in (ours, theirs):
        status = response.model_version_status.add(version=3, state=50)
        status.status.error_code = 5
        status.status.error_message = "gone"
    assert ours.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)


MESSAGES = prediction_pb2.DESCRIPTOR.message_types_by_name.values()


@pytest.mark.parametrize("field", [field for message in MESSAGES for field in message.fields])
def test_fields_have_tensorflow_servings_numbers(field: Any) -> None:
    theirs = {
        "TensorShape": tensor_shape_pb2.TensorShapeProto,
        "Tensor": tensor_pb2.TensorProto,
        "Version": wrappers_pb2.Int64Value,
        "ModelSpec": model_pb2.ModelSpec,
        "PredictRequest": predict_pb2.PredictRequest,
        "PredictResponse": predict_pb2.PredictResponse,
        "GetModelStatusRequest": get_model_status_pb2.GetModelStatusRequest,
        "GetModelStatusResponse": get_model_status_pb2.GetModelStatusResponse,
        "ModelVersionStatus": get_model_status_pb2.ModelVersionStatus,
        "Status": get_model_status_pb2.ModelVersionStatus().status.__class__,
    }[field.containing_type.name].DESCRIPTOR.fields_by_name[field.name]
    enum, int32 = 14, 5
    assert theirs.number == field.number
    assert field.type == (int32 if theirs.type == enum else theirs.type)
    assert theirs.is_repeated == field.is_repeated


def test_constants_are_tensorflow_servings() -> None:
    names = {"DT_FLOAT", "DT_UINT8", "DT_STRING", "DT_INT64"}
    assert {name: getattr(tensors, name) for name in names} == {name: types_pb2.DataType.Value(name) for name in names}
    states = get_model_status_pb2.ModelVersionStatus.State.items()
    assert {number: name for name, number in states if name != "UNKNOWN"} == STATES


def test_tensors_are_those_of_tensorflow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    for ours, expected in (
        (tensors.make_tensor(tensors.DT_UINT8, *pixels.shape, tensor_content=pixels.tobytes()), pixels),
        (tensors.make_tensor(tensors.DT_INT64, 3, int64_val=range(3)), np.arange(3)),
        (tensors.make_tensor(tensors.DT_STRING, 2, string_val=[b"one", b"two"]), np.array([b"one", b"two"], object)),
    ):
        values = tf.make_ndarray(tensor_pb2.TensorProto.FromString(ours.SerializeToString()))
        assert values.dtype == expected.dtype
        np.testing.assert_array_equal(values, expected)
    for expected in (
        np.array([[0.5, -1e-9], [1, 2]], np.float32),
        np.array([-1, 2**62], np.int64),
        np.array([7], np.float32),
    ):
        theirs = tf.make_tensor_proto(expected)
        values = tensors.read_numbers(prediction_pb2.Tensor.FromString(theirs.SerializeToString()))
        assert values.dtype == expected.dtype
        np.testing.assert_array_equal(values, expected)


def sent_inputs(grpc_service: GrpcService) -> list[str]:
    return [name for request in grpc_service.requests for name in request.inputs if name != "class_id"]


def test_pixels_of_the_models_size_are_sent_without_encoding(grpc_service: GrpcService) -> None:
    given = np.stack([pixels_of(colour) for colour in ("red", "blue", "green")])
    with GrpcClient(grpc_service.address, model="m", batch_size=2) as client:
        results = client.predict_iter(given)
        first = next(results)
        given[:] = 0  # the caller may reuse the array
        assert isinstance(first, Prediction)
        assert first.label == "red"
    with GrpcClient(grpc_service.address, model="m", batch_size=2) as client:
        again = client.predict(np.stack([pixels_of(colour) for colour in ("red", "blue", "green")]))
    assert [prediction.label for prediction in again] == ["red", "blue", "green"]
    assert set(sent_inputs(grpc_service)) == {"images"}


def test_pixels_of_another_size_are_sent_as_files(grpc_service: GrpcService) -> None:
    grpc_service.size = (32, 32, 3)
    with GrpcClient(grpc_service.address, model="m", batch_size=1) as client:
        labels = [client.predict(pixels_of(colour))[0].label for colour in ("red", "blue")]
    assert labels == ["red", "blue"]
    assert sent_inputs(grpc_service) == ["images", "image_bytes", "image_bytes"]  # tried once, and then cached


def test_pixels_among_files_are_sent_as_files(grpc_service: GrpcService) -> None:
    with GrpcClient(grpc_service.address, model="m") as client:
        predictions = client.predict([pixels_of("green"), png_of("blue")])
    assert [prediction.label for prediction in predictions] == ["green", "blue"]
    assert sent_inputs(grpc_service) == ["image_bytes"]

"""`GrpcClient` against a server made with TensorFlow Serving's official messages and stubs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner
from google.protobuf import wrappers_pb2
from PIL import Image
from tensorflow.core.framework import tensor_pb2, tensor_shape_pb2
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from client import (
    ConnectionFailed,
    Failure,
    GrpcClient,
    ImageRejected,
    ModelNotFound,
    RequestRejected,
    RequestTimedOut,
    ServerBusy,
    ServerFailed,
    UnexpectedReply,
)
from client.__main__ import main
from client.grpc import GrpcTransport
from client.images import Picture
from client.protos import prediction_pb2
from tests.client.conftest import pixels_of, png_of
from tests.client.service import COLOURS

Script = Callable[[Any, grpc.ServicerContext], Any]


class Colours(prediction_service_pb2_grpc.PredictionServiceServicer, model_service_pb2_grpc.ModelServiceServicer):
    """A model of three colours, version 4; `script` holds what is done instead for the next requests."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.script: list[Script] = []
        self.has_labels = True
        self.as_content = False
        self.size = (4, 6, 3)
        self.address = ""

    def Predict(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.requests.append(request)
        if self.script:
            return self.script.pop(0)(request, context)
        if request.model_spec.signature_name == "labels":
            return self._labels(request, context)
        if request.model_spec.signature_name == "serving_default":
            images = tf.make_ndarray(request.inputs["images"])
            assert images.dtype == np.uint8
            assert request.inputs["images"].tensor_content
            if images.shape[1:] != self.size:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"expected {self.size}, got {images.shape[1:]}")
            return self._answer(request, list(images.mean(axis=(1, 2)) / images.mean(axis=(1, 2)).sum(axis=1)[:, None]))
        assert request.model_spec.signature_name == "image_bytes"
        rows = []
        for data in request.inputs["image_bytes"].string_val:
            try:
                pixels = np.asarray(Image.open(io.BytesIO(data), formats=["JPEG", "PNG"]).convert("RGB"), np.float32)
            except OSError:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "Unknown image file format")
            rows.append(pixels.mean(axis=(0, 1)) / max(1.0, pixels.mean(axis=(0, 1)).sum()))
        return self._answer(request, rows)

    def _answer(self, request: Any, rows: list[np.ndarray]) -> Any:
        probabilities = np.array(rows, np.float32)
        class_id = probabilities.argmax(axis=1)
        reply = predict_pb2.PredictResponse()
        reply.model_spec.name = request.model_spec.name
        reply.model_spec.version.value = 4
        if self.as_content:
            reply.outputs["probabilities"].CopyFrom(tf.make_tensor_proto(probabilities))
            assert reply.outputs["probabilities"].tensor_content or probabilities.size == 1
        else:
            reply.outputs["probabilities"].dtype = 1
            for size in probabilities.shape:
                reply.outputs["probabilities"].tensor_shape.dim.add().size = size
            reply.outputs["probabilities"].float_val.extend(probabilities.ravel().tolist())
        reply.outputs["class_id"].CopyFrom(tf.make_tensor_proto(class_id.astype(np.int64)))
        reply.outputs["label"].CopyFrom(tf.make_tensor_proto([COLOURS[i] for i in class_id]))
        return reply

    def _labels(self, request: Any, context: grpc.ServicerContext) -> Any:
        if not self.has_labels:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, 'Serving signature key "labels" not found.')
        ids = tf.make_ndarray(request.inputs["class_id"])
        assert ids.dtype == np.int64
        reply = predict_pb2.PredictResponse()
        reply.outputs["label"].CopyFrom(tf.make_tensor_proto([COLOURS[i] for i in ids]))
        return reply

    def GetModelStatus(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802, ARG002
        reply = get_model_status_pb2.GetModelStatusResponse()
        reply.model_version_status.add(version=4, state=30)
        reply.model_version_status.add(version=5, state=50).status.error_message = "damaged"
        return reply


@pytest.fixture
def model() -> Iterator[Colours]:
    servicer = Colours()
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", 200_000)])
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(servicer, server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(None)


def refuse(code: grpc.StatusCode, details: str = "as scripted") -> Script:
    return lambda _, context: context.abort(code, details)


def ask(model: Colours, *pictures: bytes, **options: Any) -> list[Any]:
    transport = GrpcTransport(model.address, model="m", sleep=lambda _: None, **options)
    try:
        return transport.predict_batch([Picture(index, None, data) for index, data in enumerate(pictures)])
    finally:
        transport.close()


def encode(colour: str, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels_of(colour)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("as_content", [False, True])
def test_it_gives_predictions_in_order(model: Colours, pictures: list[Path], as_content: bool) -> None:
    model.as_content = as_content
    with GrpcClient(model.address, model="m", batch_size=3) as client:
        predictions = client.predict(pictures)
    assert [p.label for p in predictions] == ["red", "green", "blue"] * 2 + ["red"]
    assert [p.file for p in predictions] == list(map(str, pictures))
    assert predictions[0].probabilities == pytest.approx({"red": 1.0, "green": 0.0, "blue": 0.0})
    assert (predictions[0].class_id, predictions[0].model, predictions[0].model_version) == (0, "m", 4)
    sent = [request.inputs["image_bytes"] for request in model.requests if "class_id" not in request.inputs]
    # Several are under way at a time, and the server's threads take them in any order.
    files = [picture.read_bytes() for picture in pictures]
    assert sorted(list(tensor.string_val) for tensor in sent) == sorted([files[:3], files[3:6], files[6:]])
    # The names of the classes are asked for once, of the version that answered.
    (names,) = [request for request in model.requests if "class_id" in request.inputs]
    assert names.model_spec.version.value == 4


def test_every_form_of_a_picture_arrives(model: Colours) -> None:
    forms = [png_of("green"), pixels_of("green"), Image.fromarray(pixels_of("green"))]
    encoded = [encode("green", kind) for kind in ("JPEG", "WEBP", "BMP", "GIF")]
    with GrpcClient(model.address, model="m") as client:
        assert [p.label for p in client.predict([*forms, *encoded])] == ["green"] * 7


def test_unreadable_pictures_cost_only_themselves(model: Colours, pictures: list[Path]) -> None:
    pictures[1].write_bytes(b"\xff\xd8\xff broken JPEG")
    pictures[4].write_bytes(b"no picture")
    pictures[5].write_bytes(b"RIFF1234WEBPbroken")
    with GrpcClient(model.address, model="m") as client:
        outcomes = list(client.predict_iter(pictures))
        with pytest.raises(ImageRejected, match="Unknown image file format"):
            client.predict(pictures[:3])
    failures = {outcome.index: outcome for outcome in outcomes if isinstance(outcome, Failure)}
    assert failures.keys() == {1, 4, 5}
    assert "Unknown image file format" in failures[1].reason
    assert "expected JPEG, PNG, WebP, AVIF, BMP or GIF" in failures[4].reason
    assert [outcome.label for outcome in outcomes if not isinstance(outcome, Failure)] == ["red", "blue", "red", "red"]


def test_what_is_too_large_at_once_is_sent_in_parts(model: Colours) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
    huge = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    with GrpcClient(model.address, model="m") as client:
        outcomes = list(client.predict_iter([noise, noise, noise, huge, noise]))
    assert [isinstance(outcome, Failure) for outcome in outcomes] == [False, False, False, True, False]


def test_a_version_is_asked_for(model: Colours) -> None:
    ask(model, png_of("red"), version=4)
    assert model.requests[0].model_spec.version.value == 4
    assert set(model.requests[0].output_filter) == {"probabilities", "class_id", "label"}


def test_without_labels_the_classes_have_numbers(model: Colours) -> None:
    model.has_labels = False
    (prediction,) = ask(model, png_of("blue"))
    assert prediction.label == "blue"
    assert prediction.probabilities == pytest.approx({"0": 0.0, "1": 0.0, "2": 1.0})


def test_it_tries_again_while_the_server_is_busy(model: Colours) -> None:
    model.script = [refuse(grpc.StatusCode.UNAVAILABLE)] * 2
    (prediction,) = ask(model, png_of("red"))
    assert prediction.label == "red"
    model.script = [refuse(grpc.StatusCode.UNAVAILABLE, "loading")] * 9
    with pytest.raises(ServerBusy, match=r"is not ready: loading \(tried 3 times\)"):
        ask(model, png_of("red"), retries=2)
    assert len(model.script) == 6


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.NOT_FOUND, ModelNotFound),
        (grpc.StatusCode.FAILED_PRECONDITION, RequestRejected),
        (grpc.StatusCode.UNIMPLEMENTED, UnexpectedReply),
        (grpc.StatusCode.INTERNAL, ServerFailed),
        (grpc.StatusCode.DEADLINE_EXCEEDED, RequestTimedOut),
    ],
)
def test_a_status_is_an_error_and_is_not_tried_again(
    model: Colours, code: grpc.StatusCode, error: type[Exception]
) -> None:
    model.script = [refuse(code)] * 2
    with pytest.raises(error, match=r"127\.0\.0\.1"):
        ask(model, png_of("red"))
    assert len(model.script) == 1


def test_the_time_is_limited_and_the_server_is_told(model: Colours) -> None:
    remaining: list[float] = []

    def be_slow(_: Any, context: grpc.ServicerContext) -> None:
        remaining.append(context.time_remaining())
        context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "slow")

    model.script = [be_slow]
    with pytest.raises(RequestTimedOut, match=r"within 7 s; allow more time with timeout_s \(--timeout\)"):
        ask(model, png_of("red"), timeout_s=7)
    assert 0 < remaining[0] <= 8


def test_nobody_there(closed_port: int) -> None:
    transport = GrpcTransport(f"127.0.0.1:{closed_port}", model="m", retries=1, sleep=lambda _: None)
    with pytest.raises(ConnectionFailed, match=r"cannot reach 127\.0\.0\.1.*tried 2 times"):
        transport.predict_batch([Picture(0, None, png_of("red"))])
    with pytest.raises(ConnectionFailed):
        transport.status()


def break_reply(change: Callable[[Any], None]) -> Script:
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        reply = Colours().Predict(request, context)
        change(reply.outputs)
        return reply

    return answer


@pytest.mark.parametrize(
    "change",
    [
        lambda outputs: outputs.clear(),
        lambda outputs: outputs.pop("label"),
        lambda outputs: outputs["label"].string_val.append(b"red"),
        lambda outputs: outputs["probabilities"].float_val.pop(),
        lambda outputs: outputs["probabilities"].tensor_shape.dim.pop(),
        lambda outputs: setattr(outputs["probabilities"], "dtype", 2),
        lambda outputs: setattr(outputs["probabilities"].tensor_shape.dim[0], "size", -1),
        lambda outputs: setattr(outputs["class_id"], "dtype", 3),
    ],
)
def test_a_reply_is_not_believed(model: Colours, change: Callable[[Any], None]) -> None:
    model.script = [break_reply(change)]
    with pytest.raises(UnexpectedReply):
        ask(model, png_of("red"))


def test_the_status(model: Colours) -> None:
    with GrpcClient(model.address, model="m") as client:
        status = client.status()
    assert status.ready
    assert [(m.version, m.state, m.error) for m in status.models] == [
        (4, "AVAILABLE", None),
        (5, "END", "damaged"),
    ]


@pytest.mark.parametrize("address", ["http://127.0.0.1:8500", "localhost", "localhost:x", "", ":8500", "a b:1"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ValueError, match=r"expected a gRPC address such as 127\.0\.0\.1:8500"):
        GrpcClient(address, model="m")


def test_the_command(model: Colours, pictures: list[Path]) -> None:
    run = CliRunner().invoke
    done = run(main, ["predict", "--grpc", model.address, "--model", "m", *map(str, pictures[:3])])
    assert done.exit_code == 0, done.output
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["red", "green", "blue"]
    done = run(main, ["status", "--grpc", model.address, "--model", "m"])
    assert (done.exit_code, done.stdout) == (0, "m  version 4  AVAILABLE\nm  version 5  END  damaged\nready\n")
    done = run(main, ["predict", "--grpc", model.address, str(pictures[0])])
    assert (done.exit_code, "--grpc needs --model" in done.stderr) == (2, True)


def fill(messages: Any) -> list[Any]:
    """Make a request and replies with everything in them that the client writes or reads."""
    tensor = messages.Tensor if messages is prediction_pb2 else tensor_pb2.TensorProto
    request = messages.PredictRequest(output_filter=["probabilities", "label"])
    request.model_spec.name = "m"
    request.model_spec.version.value = 2**40
    request.model_spec.signature_name = "image_bytes"
    request.inputs["image_bytes"].CopyFrom(tensor(dtype=7, string_val=[b"\xff\xd8", b""]))
    request.inputs["image_bytes"].tensor_shape.dim.add().size = 2
    reply = messages.PredictResponse()
    reply.model_spec.CopyFrom(request.model_spec)
    reply.outputs["probabilities"].CopyFrom(tensor(dtype=1, float_val=[0.5, -1e-9]))
    reply.outputs["probabilities"].tensor_shape.unknown_rank = True
    reply.outputs["class_id"].CopyFrom(tensor(dtype=9, int64_val=[-1, 2**62], tensor_content=b"12345678"))
    return [request, reply]


def test_our_messages_are_tensorflow_servings_byte_for_byte() -> None:
    for ours, theirs in zip(fill(prediction_pb2), fill(predict_pb2), strict=True):
        data = ours.SerializeToString(deterministic=True)
        assert data == theirs.SerializeToString(deterministic=True)
        assert type(theirs).FromString(data) == theirs
        assert type(ours).FromString(theirs.SerializeToString(deterministic=True)) == ours
    ours = prediction_pb2.GetModelStatusResponse()
    theirs = get_model_status_pb2.GetModelStatusResponse()
    for reply in (ours, theirs):
        status = reply.model_version_status.add(version=3, state=50)
        status.status.error_code = 5
        status.status.error_message = "gone"
    assert ours.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)


MESSAGES = prediction_pb2.DESCRIPTOR.message_types_by_name.values()


@pytest.mark.parametrize("field", [field for message in MESSAGES for field in message.fields])
def test_every_field_has_tensorflow_servings_number(field: Any) -> None:
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


def inputs_sent(model: Colours) -> list[str]:
    return [name for request in model.requests for name in request.inputs if name != "class_id"]


def test_pixels_of_the_model_s_size_are_sent_as_they_are(model: Colours) -> None:
    given = np.stack([pixels_of(colour) for colour in ("red", "blue", "green")])
    with GrpcClient(model.address, model="m", batch_size=2) as client:
        results = client.predict_iter(given)
        first = next(results)
        given[:] = 0  # what was given may be used for something else at once
        assert first.label == "red"
    with GrpcClient(model.address, model="m", batch_size=2) as client:
        again = client.predict(np.stack([pixels_of(colour) for colour in ("red", "blue", "green")]))
    assert [prediction.label for prediction in again] == ["red", "blue", "green"]
    assert set(inputs_sent(model)) == {"images"}


def test_pixels_of_another_size_are_sent_as_files_which_the_model_resizes(model: Colours) -> None:
    model.size = (32, 32, 3)
    with GrpcClient(model.address, model="m", batch_size=1) as client:
        labels = [client.predict(pixels_of(colour))[0].label for colour in ("red", "blue")]
    assert labels == ["red", "blue"]
    assert inputs_sent(model) == ["images", "image_bytes", "image_bytes"]  # tried once, and then known


def test_pixels_among_files_are_sent_as_files(model: Colours) -> None:
    with GrpcClient(model.address, model="m") as client:
        predictions = client.predict([pixels_of("green"), png_of("blue")])
    assert [prediction.label for prediction in predictions] == ["green", "blue"]
    assert inputs_sent(model) == ["image_bytes"]

"""TensorFlow Serving's gRPC API, with the official stubs; the tests also pass against the real server.

TFSERVING_GRPC names a running server (host:port) that serves golden/models.config; by default one is started.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from tests.serving.conftest import Server

GOLDEN = Path(__file__).parent / "golden"
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    address, server = os.environ.get("TFSERVING_GRPC"), None
    if not address:
        folder = tmp_path_factory.mktemp("golden-grpc")
        config = (GOLDEN / "models.config").read_text().replace('"/models/', f'"{GOLDEN}/')
        (folder / "models.config").write_text(config)
        server = Server(folder, folder / "log", "--model-config-file", str(folder / "models.config"))
        server.wait_for("/readyz")
        address = f"127.0.0.1:{server.grpc_port}"
    with grpc.insecure_channel(address) as channel:
        yield channel
    if server:
        assert server.stop() == 0


def predict(channel: grpc.Channel, request: Any) -> Any:
    return prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=60)


def make_request(model: str, signature: str = "", **inputs: Any) -> Any:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    for name, value in inputs.items():
        is_packed = isinstance(value, tensor_pb2.TensorProto)
        request.inputs[name].CopyFrom(value if is_packed else tf.make_tensor_proto(value))
    return request


def flat_tensor(*, dimensions: int) -> tensor_pb2.TensorProto:
    """Return a tensor of one element with this many dimensions."""
    tensor = tensor_pb2.TensorProto(dtype=tf.float32.as_datatype_enum, float_val=[1])
    for _ in range(dimensions):
        tensor.tensor_shape.dim.add().size = 1
    return tensor


def with_label(request: Any, label: str) -> Any:
    request.model_spec.version_label = label
    return request


def test_both_signatures_return_the_same(channel: grpc.Channel) -> None:
    encoded = [tf.io.encode_png(image).numpy() for image in PIXELS]
    results = [
        tf.make_ndarray(predict(channel, request).outputs["probabilities"])
        for request in (make_request("cifar10", images=PIXELS), make_request("cifar10", "bytes", image_bytes=encoded))
    ]
    assert results[0].shape == (2, 10)
    np.testing.assert_allclose(results[0], results[1], atol=1e-6)


def test_versions_and_labels_are_resolved(channel: grpc.Channel) -> None:
    for choice in ({"version": {"value": 1}}, {"version_label": "stable"}, {}):
        request = make_request("cifar10", images=PIXELS)
        request.model_spec.MergeFrom(type(request.model_spec)(**choice))
        response = predict(channel, request)
        assert (response.model_spec.name, response.model_spec.version.value) == ("cifar10", 1)
        assert response.model_spec.signature_name == "serving_default"


def test_outputs_have_the_dtype_and_rank_of_the_signature(channel: grpc.Channel) -> None:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "multi"
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    described = get_model_metadata_pb2.SignatureDefMap()
    assert stub.GetModelMetadata(request, timeout=60).metadata["signature_def"].Unpack(described)
    count = 0
    for name, definition in described.signature_def.items():
        if name == "__saved_model_init_op" or any(t.tensor_shape.unknown_rank for t in definition.inputs.values()):
            continue
        inputs = {}
        for key, tensor in definition.inputs.items():
            shape = [2 if axis.size < 0 else axis.size for axis in tensor.tensor_shape.dim]
            dtype = tf.dtypes.as_dtype(tensor.dtype)
            inputs[key] = tf.fill(shape, "x") if dtype == tf.string else tf.ones(shape, dtype)
        response = predict(channel, make_request("multi", name, **inputs))
        for key, tensor in definition.outputs.items():
            assert response.outputs[key].dtype == tensor.dtype
            array = tf.make_ndarray(response.outputs[key])
            assert not response.outputs[key].tensor_content
            assert response.outputs[key].HasField("tensor_shape")
            assert len(array.shape) == len(tensor.tensor_shape.dim)
        count += 1
    assert count >= 3


@pytest.mark.parametrize(
    ("request_", "code", "details"),
    [
        (make_request("m", images=PIXELS), "NOT_FOUND", "Servable not found for request: Latest(m)"),
        (make_request("cifar10", "x", images=PIXELS), "FAILED_PRECONDITION", 'Serving signature key "x" not found.'),
        (
            make_request("multi", "one", y=np.ones(1, np.float32)),
            "INVALID_ARGUMENT",
            (
                "Signature input alias: x(feed name: one_x:0) not found in request and no default value provided. "
                "Inputs expected to be in the request {y}, or default input alias set: "
            ),
        ),
        (
            make_request("multi", "one", x=np.ones(1, np.float32), y=np.ones(1, np.float32)),
            "INVALID_ARGUMENT",
            "Sent extra: {y}.",
        ),
        (make_request("multi", "one", x=flat_tensor(dimensions=300)), "INVALID_ARGUMENT", "tensor parsing error: x"),
        (
            with_label(make_request("cifar10", images=PIXELS), ""),
            "INVALID_ARGUMENT",
            "Unrecognized servable version label: ",
        ),
        (make_request("cifar10"), "INVALID_ARGUMENT", "input size does not match signature: 0!=1"),
    ],
)
def test_invalid_requests_have_tensorflow_servings_errors(
    channel: grpc.Channel, request_: Any, code: str, details: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        predict(channel, request_)
    assert refused.value.code().name == code
    assert details in refused.value.details()


def test_model_status(channel: grpc.Channel) -> None:
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "cifar10"
    response = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(request, timeout=60)
    assert [(status.version, status.state) for status in response.model_version_status] == [(1, 30)]

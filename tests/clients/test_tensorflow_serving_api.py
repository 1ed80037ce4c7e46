"""Clients as the examples of TensorFlow Serving write them (resnet_client.py, resnet_client_grpc.py, and the like)."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

import serving
from tests.clients.service import pixels


@pytest.fixture(scope="module")
def channel(service: serving.Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(service.grpc_address) as channel:
        yield channel


def predict(channel: grpc.Channel, signature: str, name: str, value: Any) -> Any:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "colours"
    request.model_spec.signature_name = signature
    request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, 10.0)


def test_rest_with_an_image_as_base64(service: serving.Server, image_file: Path) -> None:
    encoded = base64.b64encode(image_file.read_bytes()).decode()
    body = f'{{"signature_name": "image_bytes", "instances": [{{"b64": "{encoded}"}}]}}'
    response = httpx.post(service.url + "/v1/models/colours:predict", content=body)  # without a Content-Type
    response.raise_for_status()
    (prediction,) = response.json()["predictions"]
    assert (prediction["label"], prediction["class_id"]) == ("blue", 2)


def test_rest_with_pixels(service: serving.Server) -> None:
    response = httpx.post(service.url + "/v1/models/colours:predict", json={"instances": pixels(1, 0).tolist()})
    assert [prediction["class_id"] for prediction in response.json()["predictions"]] == [1, 0]


def test_grpc_with_an_image(channel: grpc.Channel, image_file: Path) -> None:
    response = predict(channel, "image_bytes", "image_bytes", [image_file.read_bytes()])
    assert tf.make_ndarray(response.outputs["label"]).tolist() == [b"blue"]
    assert response.model_spec.version.value == 7


def test_grpc_with_pixels(channel: grpc.Channel) -> None:
    response = predict(channel, "serving_default", "images", pixels(2, 1))
    assert list(response.outputs["class_id"].int64_val) == [2, 1]
    assert len(response.outputs["probabilities"].float_val) == 6


def test_grpc_metadata_and_status(channel: grpc.Channel) -> None:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "colours"
    response = prediction_service_pb2_grpc.PredictionServiceStub(channel).GetModelMetadata(request, 10.0)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    assert {"serving_default", "image_bytes"} <= set(signatures.signature_def)
    status_request = get_model_status_pb2.GetModelStatusRequest()
    status_request.model_spec.name = "colours"
    status = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(status_request, 10.0)
    assert [(version.version, version.state) for version in status.model_version_status] == [
        (7, get_model_status_pb2.ModelVersionStatus.AVAILABLE)
    ]

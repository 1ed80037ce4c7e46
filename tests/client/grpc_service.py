"""A small gRPC server with TensorFlow Serving's official messages and stubs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from PIL import Image
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from tests.client.service import COLOURS

Script = Callable[[Any, grpc.ServicerContext], Any]


class GrpcService(prediction_service_pb2_grpc.PredictionServiceServicer, model_service_pb2_grpc.ModelServiceServicer):
    """A model of three colours, version 4. `script` has functions that handle the next requests instead."""

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
            return self._respond(
                request, list(images.mean(axis=(1, 2)) / images.mean(axis=(1, 2)).sum(axis=1)[:, None])
            )
        assert request.model_spec.signature_name == "image_bytes"
        rows = []
        for data in request.inputs["image_bytes"].string_val:
            try:
                pixels = np.asarray(Image.open(io.BytesIO(data), formats=["JPEG", "PNG"]).convert("RGB"), np.float32)
            except OSError:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "Unknown image file format")
            rows.append(pixels.mean(axis=(0, 1)) / max(1.0, pixels.mean(axis=(0, 1)).sum()))
        return self._respond(request, rows)

    def _respond(self, request: Any, rows: list[np.ndarray]) -> Any:
        probabilities = np.array(rows, np.float32)
        class_id = probabilities.argmax(axis=1)
        response = predict_pb2.PredictResponse()
        response.model_spec.name = request.model_spec.name
        response.model_spec.version.value = 4
        if self.as_content:
            response.outputs["probabilities"].CopyFrom(tf.make_tensor_proto(probabilities))
            assert response.outputs["probabilities"].tensor_content or probabilities.size == 1
        else:
            response.outputs["probabilities"].dtype = 1
            for size in probabilities.shape:
                response.outputs["probabilities"].tensor_shape.dim.add().size = size
            response.outputs["probabilities"].float_val.extend(probabilities.ravel().tolist())
        response.outputs["class_id"].CopyFrom(tf.make_tensor_proto(class_id.astype(np.int64)))
        response.outputs["label"].CopyFrom(tf.make_tensor_proto([COLOURS[i] for i in class_id]))
        return response

    def _labels(self, request: Any, context: grpc.ServicerContext) -> Any:
        if not self.has_labels:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, 'Serving signature key "labels" not found.')
        ids = tf.make_ndarray(request.inputs["class_id"])
        assert ids.dtype == np.int64
        response = predict_pb2.PredictResponse()
        response.outputs["label"].CopyFrom(tf.make_tensor_proto([COLOURS[i] for i in ids]))
        return response

    def GetModelStatus(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802, ARG002
        response = get_model_status_pb2.GetModelStatusResponse()
        response.model_version_status.add(version=4, state=30)
        response.model_version_status.add(version=5, state=50).status.error_message = "damaged"
        return response


@contextmanager
def serve() -> Iterator[GrpcService]:
    service = GrpcService()
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", 200_000)])
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(service, server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(service, server)
    service.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield service
    server.stop(None)

"""A gRPC server in this process with the API of TensorFlow Serving, whose responses tests edit; apps in front of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from flask.testing import FlaskClient
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)
from werkzeug.test import TestResponse

from serving.api.flask_app import ServingApp
from serving.app import make_app
from serving.settings import Settings


def leave(message: Any) -> None:
    """Change nothing."""


class Backend(prediction_service_pb2_grpc.PredictionServiceServicer, model_service_pb2_grpc.ModelServiceServicer):
    """A gRPC server with the model `m` (x float32 (n, 2) to y = (version + 1) x, k int64 (n,)) and editable responses.

    Its version 1 is AVAILABLE. It has no health service unless it is `checked`.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, checked: bool = False) -> None:
        self.versions = [1]
        self.limit = 10**9
        message = "Task size {rows} is larger than maximum input batch size {limit}"
        self.limit_refusal = grpc.StatusCode.INVALID_ARGUMENT, message
        self.rows: list[int] = []
        self.edit_response: Callable[[Any], None] = leave
        self.edit_metadata: Callable[[Any], None] = leave
        self.edit_status: Callable[[Any], None] = leave
        self.refusal: str | None = None
        self.code = grpc.StatusCode.INVALID_ARGUMENT  # of the refusal
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        self._health = health.HealthServicer()
        if checked:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(self, self._server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"{host}:{port}")
        self.address = f"{host}:{self.port}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def set_serving(self, serving: bool) -> None:
        """Change what the health service reports."""
        states = health_pb2.HealthCheckResponse
        self._health.set("", states.SERVING if serving else states.NOT_SERVING)

    def GetModelStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.model_spec.name == "missing":
            context.abort(grpc.StatusCode.NOT_FOUND, "Could not find any versions of model missing")
        response = get_model_status_pb2.GetModelStatusResponse()
        for version in self.versions:
            response.model_version_status.add(version=version, state=get_model_status_pb2.ModelVersionStatus.AVAILABLE)
        if request.model_spec.name == "m":
            self.edit_status(response.model_version_status[0])
        return response

    def GetModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        described = get_model_metadata_pb2.SignatureDefMap()
        definition = described.signature_def["serving_default"]
        definition.method_name = "tensorflow/serving/predict"
        for tensors, name, dtype, shape in (
            (definition.inputs, "x", types_pb2.DT_FLOAT, (-1, 2)),
            (definition.outputs, "y", types_pb2.DT_FLOAT, (-1, 2)),
            (definition.outputs, "k", types_pb2.DT_INT64, (-1,)),
        ):
            tensors[name].name = name + ":0"
            tensors[name].dtype = dtype
            for size in shape:
                tensors[name].tensor_shape.dim.add().size = size
        if request.model_spec.name == "m":
            self.edit_metadata(definition)
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.metadata["signature_def"].Pack(described)
        return response

    def Predict(self, request: Any, context: Any) -> Any:  # noqa: N802
        x = tf.make_ndarray(request.inputs["x"])
        self.rows.append(len(x))
        version = request.model_spec.version.value
        if version not in self.versions:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: Specific(m, {version})")
        if self.refusal is not None:
            context.abort(self.code, self.refusal)
        if len(x) > self.limit:
            code, message = self.limit_refusal
            context.abort(code, message.format(rows=len(x), limit=self.limit))
        response = predict_pb2.PredictResponse()
        response.outputs["y"].CopyFrom(tf.make_tensor_proto((version + 1) * x))
        response.outputs["k"].CopyFrom(tf.make_tensor_proto(np.arange(len(x), dtype=np.int64)))
        self.edit_response(response)
        return response


def make_remote_app(address: str, *models: str) -> ServingApp:
    return make_app(Settings(models_dir=Path("unused"), remote=address, remote_models=models or ("m",)))


def predict(client: FlaskClient, rows: int = 1, model: str = "m") -> TestResponse:
    x = [[float(i), 0.5] for i in range(rows)]
    return client.post(f"/v1/models/{model}:predict", json={"inputs": x})


def v2_request(rows: int) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, 2], "data": [1.0] * 2 * rows}]}

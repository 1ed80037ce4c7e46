"""The names and methods of TensorFlow Serving's services, for reflection.

The official package has messages and stubs that work with today's protobuf, but its two modules that describe the
services (`prediction_service_pb2`, `model_service_pb2`) were generated for a protobuf of long ago and no longer load.
So the two files are described here, as `apis/prediction_service.proto` and `apis/model_service.proto` have them.
"""

from __future__ import annotations

from google.protobuf import descriptor_pb2, descriptor_pool
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    predict_pb2,
    regression_pb2,
)

PREDICTION_SERVICE = "tensorflow.serving.PredictionService"
MODEL_SERVICE = "tensorflow.serving.ModelService"

_FILES = (
    (
        "tensorflow_serving/apis/prediction_service.proto",
        PREDICTION_SERVICE,
        {
            "Classify": (classification_pb2.ClassificationRequest, classification_pb2.ClassificationResponse),
            "Regress": (regression_pb2.RegressionRequest, regression_pb2.RegressionResponse),
            "Predict": (predict_pb2.PredictRequest, predict_pb2.PredictResponse),
            "MultiInference": (inference_pb2.MultiInferenceRequest, inference_pb2.MultiInferenceResponse),
            "GetModelMetadata": (
                get_model_metadata_pb2.GetModelMetadataRequest,
                get_model_metadata_pb2.GetModelMetadataResponse,
            ),
        },
    ),
    (
        "tensorflow_serving/apis/model_service.proto",
        MODEL_SERVICE,
        {
            "GetModelStatus": (get_model_status_pb2.GetModelStatusRequest, get_model_status_pb2.GetModelStatusResponse),
            "HandleReloadConfigRequest": (
                model_management_pb2.ReloadConfigRequest,
                model_management_pb2.ReloadConfigResponse,
            ),
        },
    ),
)


def describe_services() -> None:
    """Make both services known to the descriptor pool that reflection answers from. May be called again."""
    pool = descriptor_pool.Default()
    for name, full_name, methods in _FILES:
        package, _, service_name = full_name.rpartition(".")
        messages = [message.DESCRIPTOR for pair in methods.values() for message in pair]
        file = descriptor_pb2.FileDescriptorProto(
            name=name,
            package=package,
            syntax="proto3",
            dependency=sorted({message.file.name for message in messages}),
        )
        service = file.service.add(name=service_name)
        for method, (request, reply) in methods.items():
            service.method.add(
                name=method,
                input_type=f".{request.DESCRIPTOR.full_name}",
                output_type=f".{reply.DESCRIPTOR.full_name}",
            )
        pool.AddSerializedFile(file.SerializeToString())

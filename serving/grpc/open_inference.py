"""`inference.GRPCInferenceService`: the Open Inference Protocol over gRPC, with some of Triton's extensions.

docs/open-inference-protocol.md lists what it has, and the choices where the protocol is unspecific.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf import json_format

from serving.greenlets import run_sized
from serving.grpc.handlers import OBJECT_BYTES
from serving.grpc.open_inference_messages import parse, render
from serving.grpc.protos import open_inference_pb2 as pb2
from serving.inference.liveness import Liveness
from serving.inference.service import InferenceService
from serving.open_inference import descriptions
from serving.open_inference.results import run
from serving.request_context import current_request

SERVICE = pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
OPEN_INFERENCE_SERVICE: str = SERVICE.full_name
POOL = pb2.DESCRIPTOR.pool  # holds the descriptors of the service and its messages

LONG_METHODS = ("RepositoryModelLoad", "RepositoryModelUnload")  # they block for long: they load models


class GrpcInferenceService:
    """The methods of the service. Each takes the request message and returns the response message."""

    def __init__(self, inference: InferenceService, liveness: Liveness) -> None:
        self._inference = inference
        self._liveness = liveness

    def methods(self) -> dict[str, tuple[Callable[[Any], Any], Any]]:
        """Return each method with the class of its request, by the names of the service's descriptor."""
        functions: dict[str, Callable[[Any], Any]] = {
            "ServerLive": lambda _: pb2.ServerLiveResponse(live=self._liveness.problem is None),
            "ServerReady": lambda _: pb2.ServerReadyResponse(ready=self._inference.not_ready_because is None),
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelInfer": self.model_infer,
            "ModelConfig": self.model_config,
            "ModelStatistics": self.model_statistics,
            "RepositoryIndex": self.repository_index,
            "RepositoryModelLoad": self.load_model,
            "RepositoryModelUnload": self.unload_model,
        }
        return {
            method.name: (functions[method.name], getattr(pb2, method.input_type.name)) for method in SERVICE.methods
        }

    def model_infer(self, request: Any) -> Any:
        """Run a model: the signature in the parameter `signature_name`, or the one that has the request's inputs."""
        version = self._inference.resolve(request.model_name, version=request.model_version or None)
        memory = current_request.get().memory
        assert memory is not None
        size = memory.held_bytes // (1 + OBJECT_BYTES)  # of the message; its own ByteSize() would encode it again
        parsed = run_sized(size, parse, request, version.name, version.predictor.signatures)
        result = run(self._inference, version, parsed)
        return run_sized(sum(array.nbytes for array in result.outputs.values()), render, parsed, result)

    def model_ready(self, request: Any) -> Any:
        """Return whether a model, or a version of it, is available; NOT_FOUND for an unknown one."""
        reason = descriptions.explain_not_ready(self._inference, request.name, request.version or None)
        return pb2.ModelReadyResponse(ready=reason is None)

    def server_metadata(self, _: Any) -> Any:
        """Describe the server."""
        return pb2.ServerMetadataResponse(**descriptions.describe_server(self._inference))

    def model_metadata(self, request: Any) -> Any:
        """Describe the signature `serving_default` of a model."""
        described = descriptions.describe_model(self._inference, request.name, request.version or None)
        return json_format.ParseDict(described, pb2.ModelMetadataResponse())

    def model_config(self, request: Any) -> Any:
        """Describe the signature `serving_default` of a model as Triton's model configuration does."""
        config = descriptions.describe_config(self._inference, request.name, request.version or None)
        return json_format.ParseDict({"config": config}, pb2.ModelConfigResponse())

    def model_statistics(self, request: Any) -> Any:
        """Return the statistics of all available versions, of those of a model, or of one."""
        statistics = descriptions.describe_statistics(self._inference, request.name or None, request.version or None)
        return json_format.ParseDict(statistics, pb2.ModelStatisticsResponse())

    def repository_index(self, request: Any) -> Any:
        """List the versions of all models with their states."""
        index = descriptions.list_models(self._inference, ready_only=request.ready)
        return json_format.ParseDict({"models": index}, pb2.RepositoryIndexResponse())

    def load_model(self, request: Any) -> Any:
        """Load a model, also one that was unloaded; responds when it is available."""
        descriptions.check_load_parameters(request.parameters)
        self._inference.load_model(request.model_name)
        return pb2.RepositoryModelLoadResponse()

    def unload_model(self, request: Any) -> Any:
        """Take a model out of service until it is loaded."""
        self._inference.unload_model(request.model_name)
        return pb2.RepositoryModelUnloadResponse()

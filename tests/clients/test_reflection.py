"""A client without generated code: it learns the services by gRPC reflection, as grpcurl and grpc_cli do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import serving


class ReflectionClient:
    """Calls methods by name, with requests and responses as JSON objects."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._database = ProtoReflectionDescriptorDatabase(channel)
        self._pool = descriptor_pool.DescriptorPool(self._database)

    def services(self) -> set[str]:
        return set(self._database.get_services())

    def methods(self, service: str) -> set[str]:
        return {method.name for method in self._pool.FindServiceByName(service).methods}

    def call(self, service: str, method: str, request: dict[str, Any]) -> dict[str, Any]:
        described = self._pool.FindServiceByName(service).FindMethodByName(method)
        call = self._channel.unary_unary(
            f"/{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(described.output_type).FromString,
        )
        message = json_format.ParseDict(request, message_factory.GetMessageClass(described.input_type)())
        response: dict[str, Any] = json_format.MessageToDict(call(message, timeout=30), descriptor_pool=self._pool)
        return response


@pytest.fixture(scope="module")
def client(service: serving.Server) -> Iterator[ReflectionClient]:
    with grpc.insecure_channel(service.grpc_address) as channel:
        yield ReflectionClient(channel)


def test_every_service_is_listed_and_described(client: ReflectionClient) -> None:
    assert client.services() == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
        "tensorflow.serving.ModelService",
        "tensorflow.serving.PredictionService",
    }
    assert "ModelInfer" in client.methods("inference.GRPCInferenceService")
    assert "Predict" in client.methods("tensorflow.serving.PredictionService")
    assert client.methods("grpc.health.v1.Health") >= {"Check", "Watch"}


def test_a_call_of_each_service(client: ReflectionClient) -> None:
    assert client.call("grpc.health.v1.Health", "Check", {}) == {"status": "SERVING"}
    assert client.call("inference.GRPCInferenceService", "ServerReady", {}) == {"ready": True}
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3]}
    contents = {"uintContents": [255, 0, 0] * 1024}
    outputs = [{"name": "probabilities", "parameters": {"classification": {"int64Param": 1}}}]
    request = {"modelName": "colours", "inputs": [{**tensor, "contents": contents}], "outputs": outputs}
    response = client.call("inference.GRPCInferenceService", "ModelInfer", request)
    assert (response["modelName"], response["modelVersion"]) == ("colours", "7")
    predict = {
        "modelSpec": {"name": "multi"},
        "inputs": {
            "a": {"dtype": "DT_FLOAT", "tensorShape": {"dim": [{"size": 1}, {"size": 2}]}, "floatVal": [4, 9]},
            "name_bytes": {"dtype": "DT_STRING", "tensorShape": {"dim": [{"size": 1}]}, "stringVal": ["YQ=="]},
        },
    }
    response = client.call("tensorflow.serving.PredictionService", "Predict", predict)
    assert response["outputs"]["root"]["floatVal"] == [2, 3]
    status = client.call("tensorflow.serving.ModelService", "GetModelStatus", {"modelSpec": {"name": "colours"}})
    assert status["model_version_status"][0]["state"] == "AVAILABLE"


def test_an_error_has_its_status(client: ReflectionClient) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        client.call("inference.GRPCInferenceService", "ModelMetadata", {"name": "unknown"})
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND

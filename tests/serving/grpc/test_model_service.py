"""ModelService, health and reflection through the official stubs."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tensorflow_serving.apis import get_model_status_pb2, model_management_pb2

from tests.serving.conftest import Server
from tests.serving.grpc.conftest import connect


def status_of(stubs: Any, model: str, version: int | None = None) -> list[tuple[int, str, str]]:
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = model
    if version is not None:
        request.model_spec.version.value = version
    states = get_model_status_pb2.ModelVersionStatus.State
    return [
        (status.version, states.Name(status.state), status.status.error_message)
        for status in stubs.models.GetModelStatus(request, timeout=60).model_version_status
    ]


def refusal(call: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value.code().name, refused.value.details()


def test_get_model_status(stubs: Any) -> None:
    assert status_of(stubs, "colours") == [(7, "AVAILABLE", "")]
    assert status_of(stubs, "colours", 7) == [(7, "AVAILABLE", "")]
    assert refusal(lambda: status_of(stubs, "m")) == ("NOT_FOUND", "Could not find any versions of model m")
    assert refusal(lambda: status_of(stubs, "colours", 8)) == (
        "NOT_FOUND",
        "Could not find version 8 of model colours",
    )
    empty = get_model_status_pb2.GetModelStatusRequest()
    assert refusal(lambda: stubs.models.GetModelStatus(empty)) == ("INVALID_ARGUMENT", "Missing ModelSpec")


def test_health_check(stubs: Any) -> None:
    for service in ("", "PredictionService", "ModelService", "tensorflow.serving.PredictionService"):
        response = stubs.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        assert next(stubs.health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60)) == response
    unknown = health_pb2.HealthCheckRequest(service="x")
    assert refusal(lambda: stubs.health.Check(unknown))[0] == "NOT_FOUND"
    watched = next(stubs.health.Watch(unknown, timeout=60))
    assert watched.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def test_reflection_describes_the_services(stubs: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(stubs.channel)

    def reflect(**query: str) -> Any:
        (response,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**query)]), timeout=60)
        return response

    names = {service.name for service in reflect(list_services="").list_services_response.service}
    assert names >= {"tensorflow.serving.PredictionService", "tensorflow.serving.ModelService", "grpc.health.v1.Health"}
    for symbol in ("tensorflow.serving.PredictionService", "tensorflow.serving.ModelService", "tensorflow.TensorProto"):
        assert reflect(file_containing_symbol=symbol).file_descriptor_response.file_descriptor_proto


@pytest.fixture
def own(start_server: Callable[..., Server], models_dir: Path) -> Iterator[tuple[Server, Any]]:
    """A server with `colours` versions 2 and 10 that a test may change."""
    server = start_server(models_dir, "--poll-interval-s", "0.1")
    server.wait_for("/readyz")
    for stubs in connect(server.grpc_port):
        yield server, stubs


def reload(stubs: Any, *models: dict[str, Any]) -> None:
    request = model_management_pb2.ReloadConfigRequest()
    request.config.model_config_list.SetInParent()
    for model in models:
        config = request.config.model_config_list.config.add(
            name=model["name"], base_path=str(model["path"]), model_platform="tensorflow"
        )
        if model.get("all"):
            config.model_version_policy.all.SetInParent()
        for label, version in model.get("labels", {}).items():
            config.version_labels[label] = version
    response = stubs.models.HandleReloadConfigRequest(request, timeout=60)
    assert response.status.error_code == 0


def test_a_reloaded_configuration_replaces_the_served_models(
    own: tuple[Server, Any], models_dir: Path, adder: Path
) -> None:
    server, stubs = own
    shutil.copytree(adder, models_dir / "sums" / "3")
    colours = {"name": "colours", "path": models_dir / "colours", "all": True, "labels": {"stable": 2, "canary": 10}}
    reload(stubs, colours, {"name": "sum", "path": models_dir / "sums"})
    assert status_of(stubs, "colours") == [(10, "AVAILABLE", ""), (2, "AVAILABLE", "")]
    assert status_of(stubs, "sum") == [(3, "AVAILABLE", "")]
    metadata = httpx.get(server.url + "/v1/models/colours/labels/stable/metadata").json()
    assert metadata["model_spec"] == {"name": "colours", "signature_name": "", "version": "2"}
    response = httpx.post(server.url + "/v1/models/sum:predict", json={"inputs": {"a": [[1, 2]], "b": [[3, 4]]}})
    assert response.json() == {"outputs": [[4, 6]]}
    reload(stubs, {"name": "sum", "path": models_dir / "sums"})
    response = httpx.post(server.url + "/v1/models/colours:predict", json={"instances": [[1, 2]]})
    assert response.status_code == 404


def test_an_invalid_configuration_returns_the_reason(own: tuple[Server, Any], models_dir: Path) -> None:
    _, stubs = own
    colours = {"name": "colours", "path": models_dir / "colours"}
    code, details = refusal(lambda: reload(stubs, colours, {"name": "gone", "path": models_dir / "gone"}))
    assert (code, "gone: no version to serve" in details) == ("UNKNOWN", True)
    code, details = refusal(lambda: reload(stubs, colours | {"labels": {"stable": 2}}))
    assert (code, "which is not currently available" in details) == ("FAILED_PRECONDITION", True)
    for model, problem in (
        ({"name": "", "path": "/x"}, "expected a model name"),
        ({"name": "m", "path": "relative"}, "absolute base_path"),
        (colours, "is repeated"),
    ):
        code, details = refusal(partial(reload, stubs, colours, model))
        assert (code, problem in details) == ("INVALID_ARGUMENT", True)
    empty = model_management_pb2.ReloadConfigRequest()
    code, details = refusal(lambda: stubs.models.HandleReloadConfigRequest(empty))
    assert (code, "Only ModelConfigList" in details) == ("INVALID_ARGUMENT", True)
    assert status_of(stubs, "colours")[0] == (10, "AVAILABLE", "")


def test_a_configuration_names_folders_of_the_models_folder_only(
    own: tuple[Server, Any], models_dir: Path, adder: Path
) -> None:
    server, stubs = own
    shutil.copytree(adder, models_dir.parent / "sums" / "3")
    (models_dir / "link").symlink_to(models_dir.parent / "sums")
    for path in (models_dir.parent / "sums", models_dir / ".." / "sums", models_dir / "link", models_dir):
        code, details = refusal(partial(reload, stubs, {"name": "sum", "path": path}))
        assert (code, "base_path must be below the folder of the server's --models-dir" in details) == (
            "INVALID_ARGUMENT",
            True,
        )
        assert str(models_dir.parent) not in details  # paths are in the log only
    assert f"refused to load {models_dir.parent / 'sums'}, which is not below {models_dir}" in server.log
    assert status_of(stubs, "colours")[0] == (10, "AVAILABLE", "")


def test_health_follows_the_models_until_the_server_stops(own: tuple[Server, Any], models_dir: Path) -> None:
    server, stubs = own
    states = health_pb2.HealthCheckResponse
    watch = stubs.health.Watch(health_pb2.HealthCheckRequest(), timeout=120)
    assert next(watch).status == states.SERVING
    (models_dir / "colours").rename(models_dir.parent / "away")
    server.wait_for("/readyz", 503)
    assert httpx.get(server.url + "/readyz").json()["reason"] == "no model is available"
    assert httpx.get(server.url + "/healthz").status_code == 200
    response = stubs.health.Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert response.status == states.NOT_SERVING
    assert httpx.post(server.url + "/predict", content=b"x", headers={"Content-Type": "image/png"}).status_code == 404
    assert next(watch).status == states.NOT_SERVING
    (models_dir.parent / "away").rename(models_dir / "colours")
    assert next(watch).status == states.SERVING
    server.process.send_signal(signal.SIGTERM)
    assert next(watch).status == states.NOT_SERVING
    assert status_of(stubs, "colours")[0][1] == "AVAILABLE"  # a call sent before this client could go elsewhere
    assert list(watch) == []  # ended by the server, not cancelled
    assert server.process.wait(timeout=60) == 0

"""A server process with two models, and the official stubs connected to it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

from tests.serving.conftest import Server


def connect(port: int) -> Iterator[Any]:
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_send_message_length", -1)]) as channel:
        grpc.channel_ready_future(channel).result(timeout=60)
        yield SimpleNamespace(
            channel=channel,
            prediction=prediction_service_pb2_grpc.PredictionServiceStub(channel),
            models=model_service_pb2_grpc.ModelServiceStub(channel),
            health=health_pb2_grpc.HealthStub(channel),
        )


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, colours: Path, adder: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("grpc")
    shutil.copytree(colours, folder / "models" / "colours" / "7")
    shutil.copytree(adder, folder / "models" / "adder" / "1")
    server = Server(folder / "models", folder / "log", "--max-request-bytes", "1000000")
    server.wait_for("/readyz")
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="session")
def stubs(server: Server) -> Iterator[Any]:
    yield from connect(server.grpc_port)

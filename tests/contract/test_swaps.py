"""Version swaps under constant load, one version corrupt: no request fails, no response mixes versions."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from serving.grpc.protos import open_inference_pb2
from tests.serving.conftest import Server

CONNECTIONS = 32
# For a longer run by hand: SWAP_SECONDS=120 SWAP_VERSIONS=20.
SECONDS = float(os.environ.get("SWAP_SECONDS", "12"))
VERSIONS = int(os.environ.get("SWAP_VERSIONS", "6"))


def publish(folder: Path, version: int) -> None:
    """Publish a model that returns its version number in two outputs."""

    class Versioned(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None,), tf.float32, "x")])
        def tell(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"version": tf.fill(tf.shape(x), version), "again": tf.fill(tf.shape(x), version)}

    model = Versioned()
    partial = folder / f".{version}.partial"
    tf.saved_model.save(model, str(partial), signatures={"serving_default": model.tell})
    partial.rename(folder / str(version))


def read(rows: list[dict[str, int]]) -> int:
    (version,) = {value for row in rows for value in row.values()}
    return version


def read_status(server: Server, version: int) -> Any:
    (status,) = httpx.get(f"{server.url}/v1/models/versioned/versions/{version}").json()["model_version_status"]
    return status


@pytest.fixture
def server(tmp_path: Path) -> Any:
    publish(tmp_path / "models" / "versioned", 1)
    server = Server(tmp_path / "models", tmp_path / "log", "--poll-interval-s", "0.2")
    server.wait_for("/readyz")
    yield server
    assert server.stop() == 0


def test_versions_are_swapped_under_load(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "versioned"
    stop = threading.Event()
    seen: list[list[int]] = []

    def predict_over_rest() -> None:
        versions: list[int] = []
        seen.append(versions)
        with httpx.Client(base_url=server.url, timeout=60) as http:
            while not stop.is_set():
                response = http.post("/v1/models/versioned:predict", json={"instances": [1.0, 2.0, 3.0]})
                assert response.status_code == 200, response.text
                versions.append(read(response.json()["predictions"]))

    def predict_over_grpc() -> None:
        versions: list[int] = []
        seen.append(versions)
        request = predict_pb2.PredictRequest()
        request.model_spec.name = "versioned"
        request.inputs["x"].CopyFrom(tf.make_tensor_proto([1.0, 2.0]))
        # Without its own subchannel pool the channel would share a connection with all others.
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", options=options) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            while not stop.is_set():
                response = stub.Predict(request, timeout=60)
                outputs = {name: list(tensor.int_val) for name, tensor in response.outputs.items()}
                version = read([{"version": a, "again": b} for a, b in zip(*outputs.values(), strict=True)])
                assert version == response.model_spec.version.value
                versions.append(version)

    def infer_over_grpc() -> None:
        versions: list[int] = []
        seen.append(versions)
        request = open_inference_pb2.ModelInferRequest(model_name="versioned")
        request.inputs.add(name="x", datatype="FP32", shape=[2]).contents.fp32_contents.extend([1.0, 2.0])
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", options=options) as channel:
            infer = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                request_serializer=open_inference_pb2.ModelInferRequest.SerializeToString,
                response_deserializer=open_inference_pb2.ModelInferResponse.FromString,
            )
            while not stop.is_set():
                response = infer(request, timeout=60)
                outputs = [np.frombuffer(raw, "<i4").tolist() for raw in response.raw_output_contents]
                version = read([{"version": a, "again": b} for a, b in zip(*outputs, strict=True)])
                assert str(version) == response.model_version
                versions.append(version)

    ways = (predict_over_grpc, predict_over_rest, infer_over_grpc, predict_over_rest)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        clients = [pool.submit(ways[n % len(ways)]) for n in range(CONNECTIONS)]
        started_s = time.monotonic()
        corrupt = VERSIONS // 2 + 2
        for version in range(2, VERSIONS + 2):
            if version == corrupt:
                (folder / str(version)).mkdir()
                (folder / str(version) / "saved_model.pb").write_bytes(b"\xff corrupt")
            else:
                publish(folder, version)
            while time.monotonic() - started_s < (version - 1) * SECONDS / VERSIONS:
                if any(client.done() for client in clients):
                    break
                time.sleep(0.05)
        stop.set()
        for client in clients:
            client.result()
    newest = VERSIONS + 1
    server.wait_until(
        lambda: (
            httpx.get(f"{server.url}/v1/models/versioned/versions/{newest}").json()["model_version_status"][0]["state"]
            == "AVAILABLE"
        )
    )
    assert len(seen) == CONNECTIONS
    # A connection never gets an older version than before.
    assert all(versions == sorted(versions) for versions in seen)
    assert {version for versions in seen for version in versions} >= set(range(1, newest)) - {corrupt}
    status = read_status(server, corrupt)
    assert (status["state"], status["status"]["error_code"]) == ("END", "DATA_LOSS")
    page = httpx.get(server.url + "/metrics").text
    assert f'serving_model_version_error{{code="DATA_LOSS",model="versioned",version="{corrupt}"}} 1.0' in page
    count = sum(len(versions) for versions in seen)
    print(f"{count:,} requests over {CONNECTIONS} connections in {SECONDS:.0f} s, {VERSIONS} versions, none failed")

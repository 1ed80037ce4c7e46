"""The service with a remote backend in another process, over gRPC."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from tensorflow_serving.apis import prediction_service_pb2_grpc

from serving.errors import InvalidRequest, ModelFailed, ModelNotFound
from serving.inference.remote import RemoteRepository
from serving.inference.remote_channels import Channels
from serving.inference.remote_predictor import RemotePredictor
from serving.inference.signatures import Signature, TensorSpec
from tests.serving.conftest import Server, picture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory, colours: Path, adder: Path) -> Iterator[Server]:
    """The remote server."""
    folder = tmp_path_factory.mktemp("behind")
    shutil.copytree(colours, folder / "models" / "colours" / "7")
    shutil.copytree(adder, folder / "models" / "adder" / "1")
    server = Server(folder / "models", folder / "log")
    server.wait_for("/readyz")
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory, behind: Server) -> Iterator[Server]:
    """The service with the remote backend; it has no models folder."""
    folder = tmp_path_factory.mktemp("front")
    remote = ("--remote", f"127.0.0.1:{behind.grpc_port}", "--remote-model", "colours", "--remote-model", "adder")
    server = Server(folder / "none", folder / "log", *remote)
    server.wait_for("/readyz")
    yield server
    assert server.stop() == 0


def test_an_upload_gives_the_predictions_of_the_remote_server(front: Server, behind: Server) -> None:
    responses = [
        httpx.post(server.url + "/predict?model=colours", content=picture("red"), headers={"Content-Type": "image/png"})
        for server in (front, behind)
    ]
    assert [response.status_code for response in responses] == [200, 200]
    assert responses[0].json()["model"] == responses[1].json()["model"] == {"name": "colours", "version": 7}
    ours, theirs = (response.json()["predictions"][0] for response in responses)
    assert ours["label"] == theirs["label"] == "red"
    assert list(ours["probabilities"].values()) == pytest.approx(list(theirs["probabilities"].values()), abs=1e-6)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models/colours", None),
        ("GET", "/v1/models/colours/metadata", None),
        ("GET", "/v1/models/nobody", None),
        ("POST", "/v1/models/adder:predict", b'{"inputs": {"a": [[1, 2]], "b": [[3, 4]]}}'),
        ("POST", "/v1/models/adder:predict", b'{"inputs": "hi", "signature_name": "shout"}'),
        ("POST", "/v1/models/adder:predict", b'{"inputs": "", "signature_name": "shout"}'),
        ("POST", "/v1/models/adder:predict", b'{"inputs": {"a": [[1]], "b": [[3, 4]]}}'),
        ("POST", "/v1/models/colours/versions/9:predict", b'{"instances": [1]}'),
        ("POST", "/v1/models/colours:predict", b"{"),
        ("GET", "/v2/models/colours", None),
        ("GET", "/v2/health/ready", None),
        (
            "POST",
            "/v2/models/adder/infer",
            (
                b'{"inputs": [{"name": "a", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]},'
                b' {"name": "b", "shape": [1, 2], "datatype": "FP32", "data": [3, 4]}]}'
            ),
        ),
    ],
)
def test_the_rest_api_equals_that_of_the_remote_server(
    front: Server, behind: Server, method: str, path: str, body: bytes | None
) -> None:
    ours, theirs = (httpx.request(method, server.url + path, content=body) for server in (front, behind))
    assert (ours.status_code, ours.json()) == (theirs.status_code, theirs.json())


def test_the_service_is_not_ready_while_the_remote_server_is_unreachable(
    start_server: Callable[..., Server], models_dir: Path, tmp_path: Path
) -> None:
    behind = start_server(models_dir)
    remote = ("--remote", f"127.0.0.1:{behind.grpc_port}", "--remote-model", "colours", "--poll-interval-s", "0.2")
    front = start_server(tmp_path / "none", *remote)
    behind.wait_for("/readyz")
    front.wait_for("/readyz")
    assert behind.stop() == 0
    front.wait_for("/readyz", 503)
    assert "cannot be reached" in httpx.get(front.url + "/readyz").json()["reason"]
    assert httpx.get(front.url + "/healthz").status_code == 200
    response = httpx.post(front.url + "/predict", content=picture("red"), headers={"Content-Type": "image/png"})
    assert response.status_code in (404, 503)
    assert front.stop() == 0


def test_startup_fails_without_model_names_and_models_folder(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = start_server(tmp_path / "none", "--remote", "127.0.0.1:1")
    assert server.process.wait(timeout=60) == 1
    assert "name each model with --remote-model" in server.log


class Scripted(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Responds to every Predict with the next status of a list."""

    def __init__(self, *codes: grpc.StatusCode) -> None:
        self.codes = list(codes)
        self.remaining_s: list[float] = []

    def Predict(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802, ARG002
        self.remaining_s.append(context.time_remaining())
        context.abort(self.codes.pop(0), "as scripted")


@pytest.fixture
def send() -> Iterator[Callable[..., Scripted]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    stubs = Channels("somewhere:8500").connect([f"127.0.0.1:{port}"])
    spec = TensorSpec("x", "DT_FLOAT", (None,), "x:0")
    signature = Signature("serving_default", "predict", {"x": spec}, {"x": spec})

    def send(scripted: Scripted, deadline_s: float | None = None) -> Scripted:
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(scripted, server)
        predictor = RemotePredictor(stubs, "m", 1, {"serving_default": signature}, address="somewhere:8500")
        predictor.predict("serving_default", {"x": np.zeros(1, np.float32)}, deadline_s=deadline_s)
        return scripted

    yield send
    server.stop(None)


@pytest.mark.parametrize(
    ("code", "error", "status"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest, 400),
        (grpc.StatusCode.NOT_FOUND, ModelNotFound, 404),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ModelFailed, 429),
        (grpc.StatusCode.DEADLINE_EXCEEDED, ModelFailed, 504),
        (grpc.StatusCode.INTERNAL, ModelFailed, 500),
    ],
)
def test_grpc_codes_are_mapped_to_http_statuses_without_retries(
    send: Callable[..., Scripted], code: grpc.StatusCode, error: type[Exception], status: int
) -> None:
    scripted = Scripted(code, code)
    with pytest.raises(error) as raised:
        send(scripted)
    assert raised.value.status == status  # type: ignore[attr-defined]
    assert len(scripted.codes) == 1


def test_only_lost_calls_are_retried(send: Callable[..., Scripted]) -> None:
    unavailable, cancelled = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED  # by a server that stops
    scripted = Scripted(unavailable, cancelled, grpc.StatusCode.INTERNAL, unavailable)
    with pytest.raises(ModelFailed, match="as scripted") as raised:
        send(scripted)
    assert (raised.value.status, scripted.codes) == (500, [unavailable])


def test_three_failed_attempts_give_unavailable(send: Callable[..., Scripted]) -> None:
    scripted = Scripted(*[grpc.StatusCode.UNAVAILABLE] * 4)
    with pytest.raises(ModelFailed, match="somewhere:8500 cannot be reached") as raised:
        send(scripted)
    assert (raised.value.status, len(scripted.codes)) == (503, 1)


def test_the_deadline_is_sent_to_the_remote_server(send: Callable[..., Scripted]) -> None:
    scripted = Scripted(grpc.StatusCode.INTERNAL, grpc.StatusCode.INTERNAL)
    with pytest.raises(ModelFailed):
        send(scripted, time.monotonic() + 5)
    with pytest.raises(ModelFailed):
        send(scripted)
    assert 3 < scripted.remaining_s[0] <= 6
    assert 25 < scripted.remaining_s[1] <= 31


def test_class_names_are_read_from_the_remote_model(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    """The names come from the signature `labels`, because model.json is not available over gRPC."""
    import tensorflow as tf

    class Labelled(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 3), tf.uint8, "images")])
        def classify(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
            rows = tf.shape(images)[0]
            return {
                "probabilities": tf.ensure_shape(tf.tile([[0.75, 0.25]], [rows, 1]), (None, 2)),
                "class_id": tf.zeros([rows], tf.int64),
                "label": tf.fill([rows], "ham"),
            }

        @tf.function(input_signature=[tf.TensorSpec((None,), tf.int64, "class_id")])
        def labels(self, class_id: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"label": tf.gather(tf.constant(["ham", "eggs"]), class_id)}

    model = Labelled()
    signatures = {"serving_default": model.classify, "labels": model.labels}
    tf.saved_model.save(model, str(tmp_path / "models" / "food" / "1"), signatures=signatures)
    behind = start_server(tmp_path / "models")
    behind.wait_for("/readyz")
    repository = RemoteRepository(f"127.0.0.1:{behind.grpc_port}", ["food"])
    repository.load()
    assert repository.ready
    assert repository.resolve("food").info.class_names == ("ham", "eggs")
    assert behind.stop() == 0


def test_requests_to_remote_models_are_counted_and_their_config_has_no_batching(front: Server) -> None:
    def read() -> Any:
        return httpx.get(front.url + "/v2/models/adder/stats").json()["model_stats"][0]

    before = read()
    body = {"inputs": {"a": [[1, 2]] * 3, "b": [[3, 4]] * 3}}
    assert httpx.post(front.url + "/v1/models/adder:predict", json=body).status_code == 200
    after = read()
    assert after["inference_count"] - before["inference_count"] == 3
    assert after["execution_count"] - before["execution_count"] == 1
    assert after["inference_stats"]["compute_infer"]["ns"] > before["inference_stats"]["compute_infer"]["ns"]
    assert "dynamic_batching" not in httpx.get(front.url + "/v2/models/adder/config").json()


def test_remote_models_are_loaded_and_unloaded_by_their_own_server() -> None:
    repository = RemoteRepository("127.0.0.1:1", ["colours"])
    for change in (repository.load_model, repository.unload_model):
        with pytest.raises(ModelFailed, match=r"by the remote server at 127.0.0.1:1") as refused:
            change("colours")
        assert (refused.value.code, refused.value.status) == ("UNIMPLEMENTED", 501)

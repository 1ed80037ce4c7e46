"""OpenTelemetry traces, received by a collector in this process."""

from __future__ import annotations

import logging
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from serving.app import make_app
from serving.errors import StartupError
from serving.inference.tensor_proto import write_tensor
from serving.settings import Settings
from serving.tracing import make_tracing
from tests.serving.conftest import Server, picture
from tests.serving.otlp_collector import Collector, run_collector

pytestmark = pytest.mark.slow

SERVER, CLIENT, INTERNAL = 2, 3, 1  # kinds
ERROR = 2  # status
PARENT = "00f067aa0ba902b7"
VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED", "OTEL_SERVICE_NAME")


def make_traceparent(number: int, *, sampled: bool = True) -> tuple[str, dict[str, str]]:
    """Return a trace id and the header that names it."""
    trace_id = f"{number:032x}"
    return trace_id, {"traceparent": f"00-{trace_id}-{PARENT}-0{int(sampled)}"}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with run_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, colours: Path, collector: Collector) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("traced")
    shutil.copytree(colours, folder / "models" / "colours" / "7")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        server = Server(folder / "models", folder / "log")
    server.wait_for("/readyz")
    yield server
    assert server.stop() == 0


def test_a_request_has_spans_for_its_parts(server: Server, collector: Collector) -> None:
    trace_id, headers = make_traceparent(1)
    form = {"image": ("red.png", picture("red"))}
    response = httpx.post(server.url + "/predict?model=colours", files=form, headers=headers)
    assert response.status_code == 200
    spans = collector.wait_for(trace_id, 5)
    root = spans["POST /predict"]
    assert (root.kind, root.parent_id) == (SERVER, PARENT)
    assert (
        root.attributes.items()
        >= {
            "http.request.method": "POST",
            "http.route": "/predict",
            "http.response.status_code": 200,
            "url.path": "/predict",
            "serving.model": "colours",
            "serving.version": 7,
            "serving.rows": 1,
        }.items()
    )
    assert root.resource["service.name"] == "image-classifier-serving"
    assert root.resource["deployment.environment.name"] == "test"
    parts = [spans[name] for name in ("parse", "queue", "model", "render")]
    assert {(part.kind, part.parent_id) for part in parts} == {(INTERNAL, root.span_id)}
    times = [root.start_ns, *(part.start_ns for part in parts), root.end_ns]
    assert times == sorted(times)
    assert [part.end_ns for part in parts[:2]] == [part.start_ns for part in parts[1:3]]


def test_the_route_of_tensorflow_serving_is_readable(server: Server, collector: Collector) -> None:
    trace_id, headers = make_traceparent(2)
    pixels = np.zeros((2, 32, 32, 3), np.uint8).tolist()
    httpx.post(server.url + "/v1/models/colours:predict", json={"instances": pixels}, headers=headers)
    root = collector.wait_for(trace_id, 5)["POST /v1/models/<model>:predict"]
    assert root.attributes["serving.rows"] == 2


def test_a_grpc_call_has_the_conventions_of_rpc(server: Server, collector: Collector) -> None:
    trace_id, headers = make_traceparent(3)
    missing_id, missing = make_traceparent(4)
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "colours"
    write_tensor(request.inputs["images"], np.zeros((3, 32, 32, 3), np.uint8), dtype_name="DT_UINT8")
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        stub.Predict(request, metadata=tuple(headers.items()))
        request.model_spec.name = "nobody"
        with pytest.raises(grpc.RpcError):
            stub.Predict(request, metadata=tuple(missing.items()))
    name = "tensorflow.serving.PredictionService/Predict"
    root = collector.wait_for(trace_id, 5)[name]
    assert (root.kind, root.parent_id) == (SERVER, PARENT)
    assert root.attributes.items() >= {"rpc.system.name": "grpc", "rpc.method": name, "serving.rows": 3}.items()
    assert root.attributes["rpc.response.status_code"] == "OK"
    refused = collector.wait_for(missing_id, 1)[name]
    assert refused.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert refused.status != ERROR  # the client's


def test_a_request_that_is_not_sampled_has_no_spans(server: Server, collector: Collector) -> None:
    unsampled_id, unsampled = make_traceparent(5, sampled=False)
    sampled_id, sampled = make_traceparent(6)
    for headers in (unsampled, sampled):
        httpx.get(server.url + "/healthz", headers=headers)
    assert set(collector.wait_for(sampled_id, 1)) == {"GET /healthz"}
    assert not [span for span in collector.spans if span.trace_id == unsampled_id]


def test_the_trace_goes_on_to_a_remote_server(
    server: Server, collector: Collector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "front")
    remote = f"127.0.0.1:{server.grpc_port}"
    app = make_app(Settings(models_dir=tmp_path, remote=remote, remote_models=("colours",)))
    app.inference.repository.load()
    trace_id, headers = make_traceparent(7)
    response = app.test_client().post("/predict", data=picture("red"), headers={**headers, "Content-Type": "image/png"})
    assert response.status_code == 200, response.text
    app.observer.close()
    name = "tensorflow.serving.PredictionService/Predict"
    collector.wait_for(trace_id, 9)  # of both services
    spans = [span for span in collector.spans if span.trace_id == trace_id]
    (root,) = (span for span in spans if span.name == "POST /predict")
    (call,) = (span for span in spans if span.name == name and span.kind == CLIENT)
    (there,) = (span for span in spans if span.name == name and span.kind == SERVER)
    assert (root.resource["service.name"], there.resource["service.name"]) == ("front", "image-classifier-serving")
    assert call.parent_id == root.span_id
    assert there.parent_id == call.span_id
    assert call.attributes["server.port"] == server.grpc_port


def test_a_collector_that_is_down_costs_no_request(
    monkeypatch: pytest.MonkeyPatch, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]  # nothing listens there afterwards
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    app = make_app(Settings(models_dir=models_dir))
    client = app.test_client()
    with caplog.at_level(logging.WARNING):
        assert {client.get("/healthz").status_code for _ in range(100)} == {200}
        app.observer.close()
    lines = [record for record in caplog.records if record.name.startswith("opentelemetry")]
    assert 1 <= len(lines) <= 10


def test_traces_are_off_unless_the_environment_asks_for_them() -> None:
    for environ in (
        {},
        {"OTEL_SERVICE_NAME": "images"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_SDK_DISABLED": "true"},
    ):
        assert make_tracing(environ) is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "must be otlp, console or none, not zipkin"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf, not grpc"),
    ],
)
def test_an_exporter_that_is_not_supported(environ: dict[str, str], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        make_tracing(environ)


def test_without_the_extra_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "serving.tracing.spans", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartupError, match=r"not installed; install the extra \[tracing\], or set OTEL_"):
        make_tracing({"OTEL_TRACES_EXPORTER": "otlp"})

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from serving.api.flask_app import ServingApp
from serving.app import make_app
from serving.memory import RequestMemory
from serving.metrics import Metrics
from serving.request_context import RequestContext
from serving.settings import Settings
from tests.serving.conftest import picture


@pytest.fixture
def fresh(models_dir: Path) -> ServingApp:
    """A new app, whose counters start at zero."""
    app = make_app(Settings(models_dir=models_dir))
    app.inference.repository.load()
    return app


def read(client: FlaskClient, path: str = "/metrics") -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Read the metrics like Prometheus."""
    response = client.get(path)
    assert response.status_code == 200
    assert response.content_type.startswith("text/plain; version=0.0.4")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(samples: dict[tuple[str, tuple[tuple[str, str], ...]], float], name: str, **labels: str) -> float:
    return samples.get((name, tuple(sorted(labels.items()))), 0)


def test_requests_images_and_durations_are_counted(fresh: ServingApp) -> None:
    client = fresh.test_client()
    files = [(picture(colour, size=(40, 30)), f"{colour}.png") for colour in ("red", "blue", "lime")]
    data = {f"f{i}": (BytesIO(data), name) for i, (data, name) in enumerate(files)}
    assert client.post("/predict", data=data).status_code == 200
    assert client.post("/predict", data=b"no picture", content_type="image/png").status_code == 400
    assert client.post("/predict?model=invented", data=b"", content_type="image/png").status_code == 404
    assert client.get("/no/such/path").status_code == 404
    samples = read(client)
    count = "serving_requests_total"
    assert value(samples, count, route="/predict", model="colours", status="200") == 1
    assert value(samples, count, route="/predict", model="colours", status="400") == 1
    assert value(samples, count, route="/predict", model="", status="404") == 1
    assert value(samples, count, route="unmatched", model="", status="404") == 1
    durations = "serving_request_seconds_count"
    assert value(samples, durations, route="/predict", model="colours", version="10") == 2
    assert value(samples, durations, route="/predict", model="", version="") == 1
    assert value(samples, "serving_decode_seconds_count") == 4
    assert value(samples, "serving_predicted_rows_total", model="colours") == 3
    predict = {"model": "colours", "signature": "serving_default"}
    assert value(samples, "serving_predict_seconds_count", **predict) == 1
    assert value(samples, "serving_predict_seconds_sum", **predict) > 0
    assert not any("invented" in str(labels) or "/no/such" in str(labels) for _, labels in samples)


def test_png_files_of_the_input_size_are_decoded_by_the_model(fresh: ServingApp) -> None:
    client = fresh.test_client()
    calls = "serving_predict_seconds_count"
    exact, other, jpeg = picture("red"), picture("red", size=(40, 30)), picture("red", kind="JPEG")
    for expected, files in ((1, [exact]), (2, [exact, exact]), (2, [exact, other]), (2, [jpeg]), (2, [exact[:60]])):
        data = {f"f{i}": (BytesIO(file), f"{i}.png") for i, file in enumerate(files)}
        response = client.post("/predict", data=data)
        if files == [exact[:60]]:  # the model refuses it, and Pillow gives the reason
            assert response.status_code == 400
            assert "damaged or cut off" in response.get_json()["errors"][0]["error"]
        else:
            assert [row["label"] for row in response.get_json()["predictions"]] == ["red"] * len(files)
        assert value(read(client), calls, model="colours", signature="image_bytes") == expected


def test_the_states_of_the_versions_are_exported(fresh: ServingApp) -> None:
    samples = read(fresh.test_client())
    assert value(samples, "serving_ready") == 1
    assert value(samples, "serving_warmup_records", model="colours", version="10") == 2
    state = {"model": "colours", "version": "10", "state": "AVAILABLE"}
    assert value(samples, "serving_model_version_state", **state) == 1
    assert value(samples, "process_resident_memory_bytes") > 0


def test_each_app_has_its_own_metrics(fresh: ServingApp, client: FlaskClient) -> None:
    before = read(client)
    fresh.test_client().post("/predict", data=b"", content_type="image/png")
    labels = {"route": "/predict", "model": "colours", "status": "400"}
    assert value(read(fresh.test_client()), "serving_requests_total", **labels) == 1
    assert value(read(client), "serving_requests_total", **labels) == value(before, "serving_requests_total", **labels)


def test_predict_calls_are_counted_under_tensorflow_serving_s_names(fresh: ServingApp) -> None:
    client = fresh.test_client()
    image = np.zeros((1, 32, 32, 3), int).tolist()
    assert client.post("/v1/models/colours:predict", json={"instances": image}).status_code == 200
    assert client.post("/v1/models/colours/versions/10:predict", json={"inputs": image}).status_code == 200
    assert client.post("/v1/models/colours:predict", json={}).status_code == 400
    assert client.post("/v1/models/invented:predict", json={}).status_code == 404
    assert client.get("/v1/models/colours").status_code == 200
    text = client.get("/monitoring/prometheus/metrics").text
    assert ':tensorflow:serving:request_count{model_name="colours",status="OK"} 2\n' in text
    assert ':tensorflow:serving:request_count{model_name="colours",status="INVALID_ARGUMENT"} 1\n' in text
    assert "invented" not in text
    samples = read(client, "/monitoring/prometheus/metrics")
    latency = {"model_name": "colours", "API": "predict", "entrypoint": "REST"}
    assert value(samples, ":tensorflow:serving:request_latency_count", **latency) == 3
    route = "/v1/models/<model>:predict"
    assert value(samples, "serving_request_seconds_count", route=route, model="colours", version="10") == 3
    assert value(samples, "serving_request_seconds_count", route=route, model="", version="") == 1


def test_only_predict_calls_are_counted_under_tensorflow_serving_s_names(fresh: ServingApp) -> None:
    client = fresh.test_client()
    image = np.zeros((1, 32, 32, 3), int).tolist()
    assert client.get("/v1/models/colours:predict").status_code == 400  # not a predict call
    assert client.post("/V1/models/colours:predict", json={"instances": image}).status_code == 200
    assert client.post("/v1/models/colours/labels/none:predict", json={"instances": image}).status_code == 400
    lines = [line for line in client.get("/metrics").text.splitlines() if "request_count{" in line]
    name = ':tensorflow:serving:request_count{model_name="colours",status='
    assert lines == [f'{name}"INVALID_ARGUMENT"}} 1', f'{name}"OK"}} 1']


def test_model_names_are_escaped(fresh: ServingApp) -> None:
    route = "/v1/models/<model>:predict"
    fresh.metrics.requests.observe(RequestContext(route=route, model='a"b\\c', status="200"), 0.001)
    text = fresh.test_client().get("/metrics").text
    assert ':tensorflow:serving:request_count{model_name="a\\"b\\\\c",status="OK"} 1\n' in text


def test_the_memory_budget_is_exported(models_dir: Path) -> None:
    app = make_app(Settings(models_dir=models_dir, memory_budget=100_000_000))
    client = app.test_client()
    page = client.get("/metrics").text
    assert "\nserving_memory_budget_bytes 1e+08\n" in page
    assert "\nserving_memory_used_bytes 0.0\n" in page
    memory = RequestMemory(app.memory)
    memory.grow(3_000_000, deadline_s=None)
    assert "\nserving_memory_used_bytes 3e+06\n" in client.get("/metrics").text
    memory.release()
    assert "\nserving_memory_used_bytes 0.0\n" in client.get("/metrics").text


def test_concurrent_scrapes_share_the_next_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    metrics.requests.observe(RequestContext(route="/a", status="200"), 0.1)
    render = metrics._render
    began, finish = threading.Event(), threading.Event()
    count = 0

    def render_slowly() -> bytes:
        nonlocal count
        count += 1
        began.set()
        assert finish.wait(10)
        return render()

    monkeypatch.setattr(metrics, "_render", render_slowly)
    with ThreadPoolExecutor(20) as threads:
        first = threads.submit(metrics.render)
        assert began.wait(10)
        others = [threads.submit(metrics.render) for _ in range(19)]
        # The callbacks of a Future are in no stub.
        while not (metrics._page and len(metrics._page._done_callbacks) == len(others)):  # type: ignore[attr-defined]
            time.sleep(0.001)
        metrics.requests.observe(RequestContext(route="/b", status="200"), 0.1)
        finish.set()
        pages = [future.result(10) for future in [first, *others]]
    assert count == 2
    assert all(b'route="/b"' in page for page in pages[1:])  # rendered after the request

from __future__ import annotations

import gc
import re
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from serving.api.flask_app import ServingApp
from serving.app import make_app
from serving.errors import SHED_REASONS, ModelFailed, Overloaded
from serving.inference.repository import ModelRepository, VersionStatus
from serving.log_output import count_dropped_lines
from serving.memory import RequestMemory
from serving.metrics import Metrics
from serving.request_context import RequestContext, current_request
from serving.settings import Settings
from tests.serving.conftest import picture
from tests.serving.inference.test_batcher import Doubler, batch, rows, wait_until

SHED = "serving_shed_requests_total"


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
    return parse(response.text)


def parse(page: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
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


# Requests


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/models/colours/versions/10/metadata", "/v1/models/<model>/metadata"),
        ("/v1/models/colours/labels/a:predict", "/v1/<path>"),  # GET
        ("/v1/no/such", "/v1/<path>"),
        ("/v2/models/colours/versions/10", "/v2/models/<model>/versions/<version>"),
        ("/static/page.js", "/static/<filename>"),
        ("/no/such", "unmatched"),
        ("/files/a/b", "/files/<name>"),
    ],
)
def test_routes_are_readable(fresh: ServingApp, path: str, route: str) -> None:
    fresh.add_url_rule("/files/<path:name>", "files", lambda name: name)
    client = fresh.test_client()
    client.get(path)
    routes = {dict(labels)["route"] for name, labels in read(client) if name == "serving_requests_total"}
    assert routes == {route}


@pytest.mark.parametrize("path", ["/predict", "/v1/models/colours:predict", "/v2/models/colours/infer"])
def test_a_shed_request_is_counted_once_by_its_reason(
    fresh: ServingApp, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    client = fresh.test_client()
    assert sum(value(read(client), SHED, reason=reason) for reason in SHED_REASONS) == 0
    assert {dict(labels)["reason"] for name, labels in read(client) if name == SHED} == {*SHED_REASONS}

    def refuse(*_: object, **__: object) -> None:
        raise Overloaded("full", shed_reason="queue_full")

    monkeypatch.setattr(fresh.inference.repository.resolve("colours").predictor, "predict", refuse)
    image = np.zeros((1, 32, 32, 3), int)
    tensor = {"name": "images", "shape": image.shape, "datatype": "UINT8", "data": image.ravel().tolist()}
    body = {"/predict": picture("red"), "/v2/models/colours/infer": {"inputs": [tensor]}}.get(
        path, {"instances": image.tolist()}
    )
    if isinstance(body, bytes):
        response = client.post(path, data=body, content_type="image/png")
    else:
        response = client.post(path, json=body)
    assert response.status_code == 503
    samples = read(client)
    assert value(samples, SHED, reason="queue_full") == 1
    assert sum(value(samples, SHED, reason=reason) for reason in SHED_REASONS) == 1


def test_each_reason_to_shed_a_request_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    table = page.split("`reason` of a shed request:")[1].split("\n\n")[1]
    assert dict(re.findall(r"^\| `(\w+)` \| (.*?)(?: \(`.*)? \|$", table, re.MULTILINE)) == {
        reason: text.replace("the request would", "it would") for reason, text in SHED_REASONS.items()
    }


def test_series_of_models_and_versions_that_have_gone_are_removed_after_a_scrape(
    fresh: ServingApp, models_dir: Path
) -> None:
    client = fresh.test_client()
    image = np.zeros((1, 32, 32, 3), int).tolist()
    assert client.post("/v1/models/colours:predict", json={"instances": image}).status_code == 200
    shutil.rmtree(models_dir / "colours")
    fresh.inference.repository.poll()
    assert ':tensorflow:serving:request_count{model_name="colours",status="OK"} 1' in client.get("/metrics").text
    page = client.get("/metrics").text
    assert 'model="colours"' not in page
    assert 'model_name="colours"' not in page


def test_only_the_newest_ended_versions_keep_their_series() -> None:
    metrics = Metrics()
    ended, serving = range(1, 9), 9
    repository = Statuses([VersionStatus("m", version, state="END") for version in ended], serving)
    metrics.watch(repository)
    for version in (*ended, serving):
        context = RequestContext(route="/r", model="m", version=version, status="200")
        metrics.requests.observe(context, 0.1)
    metrics.render()
    page = metrics.render().decode()
    count = re.compile(r'serving_request_seconds_count{model="m",route="/r",version="(\d+)"} 1')
    assert sorted(map(int, count.findall(page))) == [6, 7, 8, 9]
    assert 'serving_requests_total{model="m",route="/r",status="200"} 9' in page  # a counter without a version stays
    metrics.requests.observe(RequestContext(route="/r", model="m", version=1, status="200"), 0.1)  # it can come back
    assert 'model="m",route="/r",version="1"} 1' in metrics.render().decode()


class Statuses(ModelRepository):
    """A repository with these versions of a model."""

    def __init__(self, ended: list[VersionStatus], serving: int) -> None:
        super().__init__(["m"])
        self._statuses = {"m": {each.version: each for each in [*ended, VersionStatus("m", serving, "AVAILABLE")]}}

    def _poll(self) -> None: ...

    def reload(self, configs: object) -> None: ...

    def load_model(self, name: str) -> None: ...

    def unload_model(self, name: str) -> None: ...


# Queues and model calls


def test_the_queue_of_a_model_is_exported_while_requests_wait() -> None:
    metrics, model = Metrics(), Doubler()
    batchers = [batch(model)]
    metrics.predictions.watch_queue("m", batchers[0])
    model.gate.clear()
    contexts = [RequestContext(model="m", rows=count) for count in (1, 2, 3)]

    def predict(context: RequestContext) -> None:
        current_request.set(context)
        batchers[0].predict("double", rows(*range(context.rows)))
        context.status = "200"
        metrics.requests.observe(context, 0.1)

    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(copy_context().run, predict, contexts[0])]
        wait_until(lambda: len(model.calls) == 1)
        calls += [threads.submit(copy_context().run, predict, context) for context in contexts[1:]]
        wait_until(lambda: batchers[0].queued() == (2, 5))
        page = metrics.render().decode()
        assert 'serving_queue_requests{model="m"} 2.0\n' in page
        assert 'serving_queue_rows{model="m"} 5.0\n' in page
        model.gate.set()
        for call in calls:
            call.result(10)
    samples = parse(metrics.render().decode())
    assert value(samples, "serving_queue_rows", model="m") == 0
    assert value(samples, "serving_queue_seconds_count", model="m") == 3
    waited = sum(context.queue_s for context in contexts)
    assert value(samples, "serving_queue_seconds_sum", model="m") == pytest.approx(waited)
    assert value(samples, "serving_request_rows_sum", model="m") == 6
    assert value(samples, ":tensorflow:serving:request_example_count_total", model="m") == 6
    assert value(samples, ":tensorflow:serving:request_example_counts_bucket", model="m", le="2") == 2
    queuing = ":tensorflow:serving:batching_session:queuing_latency"
    assert value(samples, queuing + "_count", thread_pool_name="m") == 3
    assert value(samples, queuing + "_sum", thread_pool_name="m") == pytest.approx(waited * 1e6)
    assert value(samples, ":tensorflow:serving:batching_session:input_batch_size_sum") == 6
    batchers.clear()
    gc.collect()
    assert "serving_queue_rows{" not in metrics.render().decode()


def test_a_request_that_times_out_in_the_queue_counts_its_wait() -> None:
    model = Doubler()
    batcher = batch(model)
    model.gate.clear()
    context = RequestContext(model="m")
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(batcher.predict, "double", rows(1))
        wait_until(lambda: len(model.calls) == 1)
        token = current_request.set(context)
        try:
            with pytest.raises(ModelFailed, match="deadline"):
                batcher.predict("double", rows(2), deadline_s=time.monotonic() + 0.05)
        finally:
            current_request.reset(token)
            model.gate.set()
        running.result(10)
    assert context.queue_s > 0
    assert context.model_s == 0


def test_model_calls_are_exported_under_tensorflow_servings_names(fresh: ServingApp) -> None:
    client = fresh.test_client()
    image = np.zeros((3, 32, 32, 3), int).tolist()
    assert client.post("/v1/models/colours:predict", json={"instances": image}).status_code == 200
    assert client.post("/v1/models/colours:predict", json={}).status_code == 400
    samples = read(client)
    runtime = {"model_name": "colours", "API": "Predict", "runtime": "TF1"}
    assert value(samples, ":tensorflow:serving:runtime_latency_count", **runtime) == 1
    assert value(samples, ":tensorflow:serving:runtime_latency_sum", **runtime) > 0
    assert value(samples, ":tensorflow:serving:batching_session:processed_batch_size_sum") == 3
    page = client.get("/metrics").text
    assert "\n:tensorflow:serving:batching_session:wrapped_run_count 1\n" in page


# Models and the process


def test_loads_and_failed_loads_are_counted_and_timed(fresh: ServingApp, models_dir: Path) -> None:
    (models_dir / "colours" / "11").mkdir()
    (models_dir / "colours" / "11" / "saved_model.pb").write_bytes(b"no model")
    fresh.inference.repository.poll()
    samples = read(fresh.test_client())
    assert value(samples, "serving_model_loads_total", model="colours") == 1
    assert value(samples, "serving_model_load_failures_total", model="colours") == 1
    of = {"model": "colours", "version": "10"}
    load_s, warmup_s = (value(samples, f"serving_model_{what}_seconds", **of) for what in ("load", "warmup"))
    assert load_s > warmup_s > 0
    assert not any(dict(labels).get("version") == "11" for name, labels in samples if name.endswith("load_seconds"))


def test_the_process_is_described(fresh: ServingApp) -> None:
    samples = read(fresh.test_client())
    for name in ("process_threads", "process_open_fds", "python_gc_collections_total"):
        assert sum(count for (found, _), count in samples.items() if found == name) > 0, name
    assert value(samples, "serving_log_lines_dropped_total") == count_dropped_lines()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus")
def test_promtool_accepts_the_page(fresh: ServingApp) -> None:
    client = fresh.test_client()
    image = np.zeros((1, 32, 32, 3), int).tolist()
    assert client.post("/v1/models/colours:predict", json={"instances": image}).status_code == 200
    assert client.get("/no/such").status_code == 404
    page = client.get("/metrics").text
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True)
    problems = [line.split(" ", 1) for line in done.stderr.splitlines()]
    assert done.returncode in (0, 3), done.stderr  # 3: problems of style
    # TensorFlow Serving's names break two rules.
    assert {name.split(":")[1] for name, _ in problems} == {"tensorflow"}
    assert {problem for _, problem in problems} == {
        "metric names should not contain ':'",
        'counter metrics should have "_total" suffix',
        'non-histogram and non-summary metrics should not have "_count" suffix',
    }

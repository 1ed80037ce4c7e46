from __future__ import annotations

import shutil
import threading
from pathlib import Path

from flask.testing import FlaskClient

from serving.api.flask_app import ServingApp
from serving.app import make_app
from serving.settings import Settings


def test_a_loaded_service_is_alive_and_ready(client: FlaskClient) -> None:
    assert client.get("/healthz").json == {"status": "alive"}
    response = client.get("/readyz")
    assert response.status_code == 200
    assert response.json == {
        "ready": True,
        "reason": None,
        "models": [{"name": "colours", "version": 7, "state": "AVAILABLE", "warmup_records": 2, "error": None}],
        "problems": [],
    }


def test_a_service_that_is_loading_is_alive_and_not_ready(models_dir: Path) -> None:
    client = make_app(Settings(models_dir=models_dir)).test_client()
    assert client.get("/healthz").status_code == 200
    response = client.get("/readyz")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert response.json is not None
    assert (response.json["ready"], response.json["reason"]) == (False, "loading colours")
    refused = client.post("/predict", data=b"x", content_type="image/png")
    assert refused.status_code == 503
    assert "still being loaded" in refused.text


def test_a_model_that_failed_to_load_is_reported_and_others_stay_ready(models_dir: Path, adder: Path) -> None:
    shutil.copytree(adder, models_dir / "adder" / "1")
    for version in ("2", "10"):
        (models_dir / "colours" / version / "saved_model.pb").write_bytes(b"\xff")
    app = make_app(Settings(models_dir=models_dir))
    app.inference.repository.load()
    response = app.test_client().get("/readyz")
    assert response.status_code == 200
    assert response.json is not None
    assert response.json["reason"] is None
    states = {(m["name"], m["version"]): (m["state"], m["error"]) for m in response.json["models"]}
    assert states["adder", 1] == ("AVAILABLE", None)
    assert states["colours", 10][0] == "END"
    assert "Can't parse" in states["colours", 10][1]
    assert 'serving_model_version_state{model="colours",state="END",version="10"} 1.0' in (
        app.test_client().get("/metrics").text
    )
    app = make_app(Settings(models_dir=models_dir, require_models=("colours",)))
    app.inference.repository.load()
    response = app.test_client().get("/readyz")
    assert (response.status_code, (response.json or {})["ready"]) == (503, False)
    assert "colours: Can't parse" in (response.json or {})["reason"]


def test_a_process_that_needs_a_restart_is_503(app: ServingApp) -> None:
    client, liveness = app.test_client(), app.liveness
    assert (client.get("/healthz").status_code, client.get("/v2/health/live").status_code) == (200, 200)
    thread = threading.Thread(target=lambda: None, name="predictor")
    thread.start()
    thread.join()
    liveness.watch_thread(thread)
    try:
        response = client.get("/healthz")
        assert (response.status_code, response.json) == (
            503,
            {"status": "dead", "reason": "the thread predictor has exited"},
        )
        assert response.headers["Retry-After"] == "1"
        assert client.get("/v2/health/live").status_code == 400
    finally:
        liveness._threads.remove(thread)
